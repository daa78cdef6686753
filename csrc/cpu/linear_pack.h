// The operands of linear as 4-byte words along K. A word is one float32, or two bfloat16 where the CPU has a bfloat16
// dot product. float16 is converted to float32; so is bfloat16 on other CPUs, where the two fused steps of dot() would
// be the same chain. Tiles read the words of several rows side by side: interleave() transposes rows in registers, and
// rows that are already in that order are copied.
#pragma once
#include "vec_math.h"

namespace gpt2fast {
namespace {

// Rows of a (K, N) weight to prefetch ahead: they are too far apart for the CPU's own prefetcher.
constexpr int64_t kRowsAhead = 8;

template <class T>
struct Operand {
  static constexpr int kDepth = 1;                                  // elements of K in a word
  static Vec along(const T* p) { return Vec::load(p); }             // kLanes words of one column
  static Vec along(const T* p, int n) { return Vec::load(p, n); }   // the same where only n elements exist
  static Vec across(const T* p, const T*) { return Vec::load(p); }  // one word of kLanes columns, from kDepth rows
  static Vec across(const T* p, const T*, int n) { return Vec::load(p, n); }
  static Vec step(Vec a, Vec b, Vec sum) { return fma(a, b, sum); }
};

#ifdef __AVX512BF16__
template <>
struct Operand<bfloat16> {
  static constexpr int kDepth = 2;
  static Vec along(const bfloat16* p) { return Pairs::load(p).as_vec(); }
  static Vec along(const bfloat16* p, int n) { return Pairs::load(p, n).as_vec(); }
  static Vec across(const bfloat16* p, const bfloat16* q) { return Pairs::zip(p, q).as_vec(); }
  static Vec across(const bfloat16* p, const bfloat16* q, int n) {
    bfloat16 low[Vec::kLanes] = {}, high[Vec::kLanes] = {};
    __builtin_memcpy(low, p, size_t(n) * 2);
    __builtin_memcpy(high, q, size_t(n) * 2);
    return Pairs::zip(low, high).as_vec();
  }
  static Vec step(Vec a, Vec b, Vec sum) { return dot(Pairs::from_vec(a), Pairs::from_vec(b), sum); }
};
#endif

// Memory that is needed next, and that is fetched into the L2 cache while the CPU multiplies: `rows` rows of some
// bytes. The inner loop tells how many steps it takes. The fetches are spread over the last of these steps, as few in
// each as possible: the CPU can wait for a limited number of lines at a time, and what comes too early is evicted.
class Ahead {
 public:
  Ahead() = default;
  template <class T>
  Ahead(const T* first, int64_t stride, int64_t rows, int64_t columns, int64_t steps)
      : row_((const char*)first),
        stride_(stride * int64_t(sizeof(T))),
        bytes_(columns * int64_t(sizeof(T))),
        rows_(columns > 0 ? rows : 0) {
    if (rows_ <= 0 || steps <= 0) return;
    int64_t lines = rows_ * ceil_div(bytes_, kLine);
    per_step_ = ceil_div(lines, steps);
    wait_ = steps - ceil_div(lines, per_step_);
  }

  GPT2FAST_INLINE void steps(int64_t count) {
    wait_ -= count;
    if (wait_ >= 0) return;
    for (int64_t i = 0; i < per_step_ * count && rows_ > 0; ++i) {
      prefetch_l2(row_ + at_);
      if ((at_ += kLine) >= bytes_) at_ = 0, row_ += stride_, --rows_;
    }
  }

 private:
  static constexpr int64_t kLine = 64;

  const char* row_ = nullptr;
  int64_t stride_ = 0, bytes_ = 0, rows_ = 0, at_ = 0;
  int64_t per_step_ = 0, wait_ = 0;
};

// The second row of a word, which is zeros past the end of an odd K.
template <class T>
inline const T* next_row(const T* row, int64_t stride, bool exists) {
  static const T zeros[Vec::kLanes] = {};
  return exists ? row + stride : zeros;
}

// out[k * out_stride + i] = word k of row i. Each store writes kLanes words; those past `rows` have no meaning.
template <class T>
inline void interleave(const T* x, int64_t stride, int rows, int64_t elements, float* out, int64_t out_stride) {
  constexpr int L = Vec::kLanes, D = Operand<T>::kDepth;
  const T* row[L];
  for (int i = 0; i < L; ++i) row[i] = x + (i < rows ? i : rows - 1) * stride;
  int64_t k = 0;
  for (; k + L * D <= elements; k += L * D, out += L * out_stride) {
    Vec r[L];
    for (int i = 0; i < L; ++i) r[i] = Operand<T>::along(row[i] + k);
    Vec::transpose(r);
    for (int i = 0; i < L; ++i) r[i].store(out + i * out_stride);
  }
  if (k < elements) {
    int n = int(elements - k);
    Vec r[L];
    for (int i = 0; i < L; ++i) r[i] = Operand<T>::along(row[i] + k, n);
    Vec::transpose(r);
    for (int i = 0; i * D < n; ++i) r[i].store(out + i * out_stride);
  }
}

// The distance from word k to word k + 1 in rows packed by pack_x. Up to kLanes rows are packed without padding: what a
// store writes past `rows` is overwritten by the next word's store. More rows are padded to whole Vecs.
constexpr int packed_stride(int rows) {
  return rows <= Vec::kLanes ? rows : (rows + Vec::kLanes - 1) / Vec::kLanes * Vec::kLanes;
}

// Packs `rows` rows of x as words [k][i]. It writes up to kLanes - 1 words past the end.
template <class T>
inline void pack_x(const T* x, int64_t stride, int rows, int64_t elements, float* out) {
  constexpr int L = Vec::kLanes, D = Operand<T>::kDepth;
  if (rows == 1) {
    int64_t k = 0;
    for (; k + L * D <= elements; k += L * D) Operand<T>::along(x + k).store(out + k / D);
    if (k < elements) Operand<T>::along(x + k, int(elements - k)).store(out + k / D);
    return;
  }
  for (int i = 0; i < rows; i += L)
    interleave(x + i * stride, stride, rows - i < L ? rows - i : L, elements, out + i, packed_stride(rows));
}

// Packs weight in panels of kVecs vectors of columns, as words [panel][k][column]. Columns past the last are zeros.
// `cached`: an Ahead has fetched the weight.
template <class T, int kVecs>
inline void pack_weight(const T* weight, int64_t stride, int64_t elements, int64_t columns, float* out, bool cached) {
  constexpr int L = Vec::kLanes, D = Operand<T>::kDepth, W = kVecs * L;
  int64_t words = ceil_div(elements, D);
  for (int64_t k = 0; k < words; ++k) {
    const T* p = weight + k * D * stride;
    const T* q = next_row(p, stride, (k + 1) * D <= elements);
    bool zeros = (k + 1) * D > elements;
    for (int d = 0; d < D && !cached; ++d)
      for (int64_t offset = 0; offset < columns * int64_t(sizeof(T)); offset += 64)
        prefetch_l2((const char*)(p + (kRowsAhead * D + d) * stride) + offset);
    for (int64_t n = 0; n < columns; n += L) {
      float* to = out + (n / W * words + k) * W + n % W;
      const T* high = zeros ? q : q + n;
      if (n + L <= columns)
        Operand<T>::across(p + n, high).store(to);
      else
        Operand<T>::across(p + n, high, int(columns - n)).store(to);
    }
    for (int64_t n = ceil_div(columns, L) * L; n % W; n += L) Vec::zero().store(out + (n / W * words + k) * W + n % W);
  }
}

}  // namespace
}  // namespace gpt2fast

// Flash-style attention of one head: softmax(scale q k^T + bias) v by blocks of kKeys keys that start at key 0, with a
// running maximum and sum. Every q.k is one chain over d, every output one chain over keys, lanes hold keys or head
// elements: a row's bits depend neither on the rows beside it nor on keys that it doesn't see.
#pragma once
#include "vec_math.h"

namespace gpt2fast {
namespace {

constexpr int kKeys = 64;        // keys of a block
constexpr int kBandRows = 48;    // queries whose scores of one block stay in the first-level cache
constexpr int kTaskRows = 192;   // queries that share a packed block
constexpr float kLog2E = 1.44269504088896341f;
constexpr float kLn2 = 0.693147180559945309f;

// One head of a call: what attention and decode_attention have in common.
template <class T>
struct Head {
  const T *q, *k, *v;                    // (T, D), (S, D), (S, D)
  int64_t stride_q, stride_k, stride_v;  // of T or S
  T* out;                                // (T, D)
  int64_t stride_out;
  float* lse;        // (T) or null
  const bool* mask;  // (S) or null
  const T* bias;     // (T, S) or null
  int64_t stride_bias[2];
  int64_t S, D;
  int64_t first, offset;  // query i sees keys from `first` on and, if causal, up to offset + i
  int64_t window;         // and, if not 0, after offset + i - window
  bool causal;
  float scale;
  float dropout_p;
  uint64_t seed, row;  // Philox key, and counter of query 0

  int64_t low(int64_t i) const { return window > 0 ? max64(first, offset + i - window + 1) : first; }
  int64_t high(int64_t i) const { return causal ? max64(0, min64(S, offset + i + 1)) : S; }
};

// What an inner product steps over: one float, or a pair of bfloat16.
template <class T>
struct Operand {
  using Element = float;
  using Chunk = Vec;
  static constexpr int kPair = 1;
  static Vec load(const float* p) { return Vec::load(p); }
  static Vec broadcast(const float* p) { return Vec::broadcast(*p); }
  static Vec multiply(Vec a, Vec b, Vec acc) { return fma(a, b, acc); }
};
template <>
struct Operand<bfloat16> {
  using Element = bfloat16;
  using Chunk = Pairs;
  static constexpr int kPair = 2;
  static Pairs load(const bfloat16* p) { return Pairs::load(p); }
  static Pairs broadcast(const bfloat16* p) { return Pairs::broadcast(p); }
  static Vec multiply(Pairs a, Pairs b, Vec acc) { return dot(a, b, acc); }
};

// 2^t for t <= 0 or NaN: degree-6 minimax polynomial, below 1 ulp; 1 at 0, 0 below -150.
inline Vec exp2_nonpositive(Vec t) {
  t = max(Vec::broadcast(-160.f), t);
  Vec n = round(t), r = t - n;
  Vec p = Vec::broadcast(1.5353361959569156e-4f);
  p = fma(p, r, Vec::broadcast(1.3398873852565885e-3f));
  p = fma(p, r, Vec::broadcast(9.61843691766262e-3f));
  p = fma(p, r, Vec::broadcast(5.5503323674201965e-2f));
  p = fma(p, r, Vec::broadcast(0.24022647738456726f));
  p = fma(p, r, Vec::broadcast(0.6931471824645996f));
  p = fma(p, r, Vec::broadcast(1.f));
  return scale2(p, n);
}

// acc[i][j] += sum over steps of a[i] (a row each) times b[j] (kLanes columns each), in the order of the steps.
template <class O, int kRows, int kVectors>
inline void multiply_tile(const typename O::Element* a, int64_t stride_a, const typename O::Element* b, int64_t stride_b,
                          int64_t steps, Vec (&acc)[kRows][kVectors]) {
  for (int64_t s = 0; s < steps; ++s, a += O::kPair, b += stride_b) {
    typename O::Chunk columns[kVectors];
    for (int j = 0; j < kVectors; ++j) columns[j] = O::load(b + j * Vec::kLanes * O::kPair);
    for (int i = 0; i < kRows; ++i) {
      typename O::Chunk row = O::broadcast(a + i * stride_a);
      for (int j = 0; j < kVectors; ++j) acc[i][j] = O::multiply(row, columns[j], acc[i][j]);
    }
  }
}

// Calls f.tile<rows, vectors>(row, column) for tiles that cover rows x vectors and fill the registers where they can.
template <int kRows, int kVectors, class F>
inline void cover_columns(const F& f, int row, int column, int vectors) {
  for (; vectors >= kVectors; vectors -= kVectors, column += kVectors) f.template tile<kRows, kVectors>(row, column);
  if constexpr (kVectors > 1) cover_columns<kRows, kVectors / 2>(f, row, column, vectors);
}
template <int kRows = 6, class F>
inline void cover(const F& f, int row, int rows, int vectors) {
  constexpr int kVectors = kRows == 1 ? (Vec::kLanes < 16 ? 8 : 4) : (Vec::kRegisters >= 32 ? 4 : 2);
  for (; rows >= kRows; rows -= kRows, row += kRows) cover_columns<kRows, kVectors>(f, row, 0, vectors);
  if constexpr (kRows > 1) cover<kRows == 6 ? 4 : kRows / 2>(f, row, rows, vectors);
}

template <class T>
class AttentionTile {
  using O = Operand<T>;
  using Element = typename O::Element;
  static constexpr int kLanes = Vec::kLanes, kPair = O::kPair;

 public:
  // Queries [begin, end), at most kTaskRows of them.
  AttentionTile(const Head<T>& head, int64_t begin, int64_t end) : h(head), begin(begin), rows(int(end - begin)) {
    steps = ceil_div(h.D, kPair);
    vectors = int(ceil_div(h.D, kLanes));
    width = int64_t(vectors) * kLanes;
    stride_query = ceil_div(h.D, 16) * 16 + 16 / kPair * 0;
    int64_t block = kKeys * max64(width, steps * kPair + kLanes * kPair);
    char* p = (char*)scratch<0>(size_t(rows) * (size_t(stride_query) * sizeof(Element) + (width + kLanes + 1) * 4) +
                                2 * block * sizeof(Element) + kBandRows * kKeys * (4 + sizeof(Element)) + 4096);
    auto take = [&](auto*& to, int64_t count) {
      to = (std::remove_reference_t<decltype(to)>)p;
      p += (count * sizeof(*to) + 63) & ~size_t(63);
    };
    take(query, rows * stride_query);
    take(key, block);
    take(value, block);
    take(score, kBandRows * kKeys);
    take(probability, kBandRows * kKeys);
    take(acc, rows * width);
    take(sum, rows * kLanes);
    take(peak, rows);
  }

  void run();

 private:
  const Head<T>& h;
  int64_t begin;
  int rows;
  int64_t steps, width, stride_query;
  int vectors;
  Element *query, *key, *value, *probability;
  float *score, *acc, *sum, *peak;
};

}  // namespace
}  // namespace gpt2fast

// One head of an attention call, and its keys and values, packed: they are copied block by block into the order in
// which the inner products read them. That order is key[d][j] and value[j][d] for key j and element d of the head.
// bfloat16 is packed in pairs along the axis that is summed: d for keys, j for values.
#pragma once
#include "vec_math.h"

namespace gpt2fast {
namespace {

constexpr int kKeys = 64;                          // keys of a block; the first block starts at key 0
constexpr int kFewQueries = 8;                     // up to so many queries use keys and values where they lie
constexpr int kKeysAhead = 32, kValuesAhead = 16;  // rows between the key that is read there and those fetched then
// A head's blocks stay packed for its further queries if there are at most so many blocks and bytes.
constexpr int kPackedBlocks = 256;
constexpr int64_t kPackedBytes = int64_t(2) << 20;

// One head of a call, for attention and for decode_attention.
template <class T>
struct Head {
  const T *q, *k, *v;                    // (T, D), (S, D), (S, D)
  const T *next_k, *next_v;              // the first rows of the next head that are no padding, or null
  int64_t stride_q, stride_k, stride_v;  // between rows, in elements
  T* out;                                // (T, D)
  int64_t stride_out;
  float* lse;        // (T) or null
  const bool* mask;  // (S) or null
  const T* bias;     // (T, S) or null
  int64_t stride_bias[2];
  int64_t queries, S, D;
  int64_t first, offset, window;  // explained by low and high
  bool causal;
  float scale;
  float dropout_p;
  uint64_t seed, row;  // Philox key, and counter of query 0

  // Query i sees keys [low(i), high(i)). Neither bound decreases as i grows.
  int64_t low(int64_t i) const { return window > 0 ? max64(first, offset + i - window + 1) : first; }
  int64_t high(int64_t i) const { return causal ? max64(0, min64(S, offset + i + 1)) : S; }
};

// Head h of row b of the batch, filled as far as both ops have the same arguments.
template <class T, class Args>
inline Head<T> head_of(const Args& a, int64_t b, int64_t h) {
  Head<T> head = {};
  head.q = (const T*)a.q + b * a.stride_q[0] + h * a.stride_q[2];
  head.k = (const T*)a.k + b * a.stride_k[0] + h * a.stride_k[2];
  head.v = (const T*)a.v + b * a.stride_v[0] + h * a.stride_v[2];
  head.stride_q = a.stride_q[1], head.stride_k = a.stride_k[1], head.stride_v = a.stride_v[1];
  head.out = (T*)a.out + (b * a.T * a.H + h) * a.D;
  head.stride_out = a.H * a.D;
  head.queries = a.T, head.D = a.D;
  head.window = a.window, head.scale = a.scale;
  return head;
}

// What one step of an inner product reads: one float, or two bfloat16.
template <class T>
struct AttentionOperand {
  using Element = float;
  using Chunk = Vec;
  static constexpr int kPair = 1;
  static Vec broadcast(const float* p) { return Vec::broadcast(*p); }
  static Vec multiply(Vec a, Vec b, Vec acc) { return fma(a, b, acc); }
  static Vec from_vec(Vec a) { return a; }
  static Vec load(const T* p) { return Vec::load(p); }
  static Vec zip(const T* row, const T*) { return Vec::load(row); }
};
template <>
struct AttentionOperand<bfloat16> {
  using Element = bfloat16;
  using Chunk = Pairs;
  static constexpr int kPair = 2;
  static Pairs broadcast(const bfloat16* p) { return Pairs::broadcast(p); }
  static Vec multiply(Pairs a, Pairs b, Vec acc) { return dot(a, b, acc); }
  static Pairs from_vec(Vec a) { return Pairs::from_vec(a); }
  static Vec load(const bfloat16* p) { return Pairs::load(p).as_vec(); }
  static Pairs zip(const bfloat16* even, const bfloat16* odd) { return Pairs::zip(even, odd); }
};

// A head's keys and values, block by block; choose() makes one block the current one and packs it where needed.
template <class T>
class PackedBlocks {
 public:
  using Element = typename AttentionOperand<T>::Element;
  static constexpr int kLanes = Vec::kLanes, kPair = AttentionOperand<T>::kPair;

  const Head<T> h;
  const int64_t steps;  // of an inner product over D
  const int vectors;    // of a row of D outputs
  const bool in_place;  // nothing is packed: for few queries, copies would cost more than they save

  // The current block: the one chosen last.
  int64_t block = 0;  // its first key
  const Element *key = nullptr, *value = nullptr;
  int hidden = 0;  // how many of its keys the mask hides; visible[j] is 0 for these and 1 for the others
  float visible[kKeys];

  // `rows`: how many queries go over the blocks together. Blocks stay packed only where later queries use them again.
  PackedBlocks(const Head<T>& head, int64_t rows)
      : h(head),
        steps(ceil_div(h.D, kPair)),
        vectors(int(ceil_div(h.D, kLanes))),
        in_place(h.queries <= kFewQueries && !h.mask && h.D % kLanes == 0) {
    if (in_place) return;
    slot = kKeys * (steps * kPair + vectors * kLanes);
    int64_t blocks = ceil_div(h.S, kKeys);
    keep = rows < h.queries && blocks <= min64(kPackedBlocks, kPackedBytes / (slot * int64_t(sizeof(Element))));
    packed = (Element*)scratch<1>(size_t((keep ? blocks : 1) * slot) * sizeof(Element));
  }

  // Makes the block that starts at first_key the current one. Returns false if the mask hides all of it.
  bool choose(int64_t first_key) {
    block = first_key;
    hidden = 0;
    if (in_place) return true;
    int keys = int(min64(h.S - block, kKeys));
    if (h.mask) {
      for (int j = 0; j < kKeys; ++j) visible[j] = j < keys && h.mask[block + j];
      for (int j = 0; j < keys; ++j) hidden += visible[j] == 0;
      if (hidden == keys) return false;
    }
    Element* to = packed + (keep ? block / kKeys * slot : 0);
    key = to;
    value = to + kKeys * steps * kPair;
    if (keep && ready[block / kKeys]) return true;
    if (keep) ready[block / kKeys] = true;
    pack_keys(to, keys);
    pack_values(to + kKeys * steps * kPair, keys);
    return true;
  }

  // r[i] = step s + i of keys j .. j + kLanes of the block, read where they lie. Also fetches keys and values that are
  // needed soon, those of the next head included: a short head would otherwise wait for all of its memory. Fewer than
  // kLanes keys fetch nothing.
  void transposed_keys(int j, int64_t s, Vec (&r)[kLanes]) const {
    int n = int(min64(h.D - s * kPair, kLanes * kPair));
    const T* k = h.k + (block + j) * h.stride_k + s * kPair;
    if (n == kLanes * kPair && block + j + kLanes <= h.S) {
      const T* next_k = ahead(h.k, h.next_k, h.stride_k, block + j + kKeysAhead) + s * kPair;
      const T* next_v = ahead(h.v, h.next_v, h.stride_v, block + j + kValuesAhead) + s * kPair;
      for (int i = 0; i < kLanes; ++i) {
        r[i] = AttentionOperand<T>::load(k + i * h.stride_k);
        prefetch_l2(next_k + i * h.stride_k);
        prefetch_l2(next_v + i * h.stride_v);
      }
    } else {
      for (int i = 0; i < kLanes; ++i) r[i] = block + j + i < h.S ? lanes(k + i * h.stride_k, n) : Vec::zero();
    }
    Vec::transpose(r);
  }

  // Prefetches keys and values [begin, end) of the next block: rows of one head lie far apart in memory.
  void fetch_ahead(int begin, int end, int64_t last) const {
    for (int64_t j = block + kKeys + begin; j < min64(block + kKeys + end, last); ++j)
      for (int64_t d = 0; d < h.D; d += 64 / int(sizeof(T))) {
        prefetch(h.k + j * h.stride_k + d);
        prefetch(h.v + j * h.stride_v + d);
      }
  }

 private:
  // Row j of keys or values, or the row of the next head that is read when this head would be at its row j.
  const T* ahead(const T* rows, const T* next, int64_t stride, int64_t j) const {
    return j < h.S || !next ? rows + j * stride : next + (j - h.S) * stride;
  }

  bool shown(int64_t j, int keys) const { return j < keys && block + j >= h.first && (!hidden || visible[j] > 0); }

  static Vec lanes(const T* p, int n) {
    if constexpr (kPair == 2)
      return (n == kLanes * kPair ? Pairs::load(p) : Pairs::load(p, n)).as_vec();
    else
      return n == kLanes ? Vec::load(p) : Vec::load(p, n);
  }

  // Writes to[s][j], step s of key j. Keys that are not shown are never read; zeros are written for them.
  void pack_keys(Element* to, int keys) const {
    for (int j = 0; j < keys; j += kLanes) {
      bool whole = j + kLanes <= keys && block + j >= h.first && !hidden;
      const T* rows = h.k + (block + j) * h.stride_k;
      for (int64_t s = 0; s < steps; s += kLanes) {
        Vec r[kLanes];
        int n = int(min64(h.D - s * kPair, kLanes * kPair));
        for (int i = 0; i < kLanes; ++i)
          r[i] = whole || shown(j + i, keys) ? lanes(rows + i * h.stride_k + s * kPair, n) : Vec::zero();
        Vec::transpose(r);
        for (int i = 0; i < kLanes && s + i < steps; ++i) {
          Element* at = to + ((s + i) * kKeys + j) * kPair;
          if constexpr (kPair == 2)
            Pairs::from_vec(r[i]).store(at);
          else
            r[i].store(at);
        }
      }
    }
  }

  // Writes to[j][d], or in pairs of keys to[j / 2][d][j % 2].
  void pack_values(Element* to, int keys) const {
    for (int j = 0; j < keys; j += kPair, to += vectors * kLanes * kPair) {
      const T* row = h.v + (block + j) * h.stride_v;
      bool use = shown(j, keys);
      for (int c = 0; c < vectors; ++c) {
        int n = int(min64(h.D - c * kLanes, kLanes));
        Element* at = to + c * kLanes * kPair;
        if constexpr (kPair == 2) {
          const T *even = row + c * kLanes, *odd = even + h.stride_v;
          bool use_odd = shown(j + 1, keys);
          bfloat16 padded[2][kLanes];
          if (n < kLanes || !use || !use_odd) {
            __builtin_memset(padded, 0, sizeof(padded));
            if (use) __builtin_memcpy(padded[0], even, size_t(n) * 2);
            if (use_odd) __builtin_memcpy(padded[1], odd, size_t(n) * 2);
            even = padded[0], odd = padded[1];
          }
          Pairs::zip(even, odd).store(at);
        } else {
          (use ? lanes(row + c * kLanes, n) : Vec::zero()).store(at);
        }
      }
    }
  }

  int64_t slot;  // elements of a packed block
  bool keep;
  Element* packed;
  bool ready[kPackedBlocks] = {};
};

}  // namespace
}  // namespace gpt2fast

// Flash-style attention of a block of queries: blocks of kKeys keys from key 0 on, a running maximum and sum. Lanes
// hold keys, then head elements; each q.k is one chain over d, each output one chain over keys: a row's bits depend
// neither on the rows beside it nor on keys that it does not see.
#pragma once
#include "vec_math.h"

namespace gpt2fast {
namespace {

constexpr int kKeys = 64;             // keys of a block
constexpr int kBandRows = 48;         // queries whose scores against one block stay in the first-level cache
constexpr int kQueriesPerTask = 192;  // queries that share a packed block
constexpr float kLog2E = 1.44269504088896341f;
constexpr double kLn2 = 0.6931471805599453;  // double: lse is a difference of large numbers in backward
constexpr float kLowest = -3.40282346638528860e38f;  // lse of a row that attends to nothing

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
  int64_t first, offset, window;  // see low and high
  bool causal;
  float scale;
  float dropout_p;
  uint64_t seed, row;  // Philox key, and counter of query 0

  // Query i sees keys [low(i), high(i)); neither ever decreases.
  int64_t low(int64_t i) const { return window > 0 ? max64(first, offset + i - window + 1) : first; }
  int64_t high(int64_t i) const { return causal ? max64(0, min64(S, offset + i + 1)) : S; }
};

// What an inner product steps over: one float, or two bfloat16.
template <class T>
struct AttentionOperand {
  using Element = float;
  using Chunk = Vec;
  static constexpr int kPair = 1;
  static Vec broadcast(const float* p) { return Vec::broadcast(*p); }
  static Vec multiply(Vec a, Vec b, Vec acc) { return fma(a, b, acc); }
};
template <>
struct AttentionOperand<bfloat16> {
  using Element = bfloat16;
  using Chunk = Pairs;
  static constexpr int kPair = 2;
  static Pairs broadcast(const bfloat16* p) { return Pairs::broadcast(p); }
  static Vec multiply(Pairs a, Pairs b, Vec acc) { return dot(a, b, acc); }
};

// 2^t for t <= 0 or NaN: degree-6 minimax polynomial, error below 1 ulp; 1 at 0, 0 below -150.
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

// acc[i][j] += the sum over steps of a[i] (one row each) times b[j] (kLanes columns each), in the order of the steps.
template <class O, int kRows, int kVectors>
inline void multiply_tile(const typename O::Element* a, int64_t stride_a, const typename O::Element* b,
                          int64_t stride_b, int64_t steps, Vec (&acc)[kRows][kVectors]) {
  for (int64_t s = 0; s < steps; ++s, a += O::kPair, b += stride_b) {
    typename O::Chunk columns[kVectors];
    for (int j = 0; j < kVectors; ++j) columns[j] = O::Chunk::load(b + j * Vec::kLanes * O::kPair);
    for (int i = 0; i < kRows; ++i) {
      typename O::Chunk row = O::broadcast(a + i * stride_a);
      for (int j = 0; j < kVectors; ++j) acc[i][j] = O::multiply(row, columns[j], acc[i][j]);
    }
  }
}

// f.tile<R, V>(row, column) for tiles of R rows and V vectors that cover rows x vectors.
template <int kRows, int kVectors, class F>
inline void cover_columns(const F& f, int row, int column, int vectors) {
  for (; vectors >= kVectors; vectors -= kVectors, column += kVectors) f.template tile<kRows, kVectors>(row, column);
  if constexpr (kVectors > 1) cover_columns<kRows, kVectors / 2>(f, row, column, vectors);
}
template <int kRows = 6, class F>
inline void cover(const F& f, int row, int rows, int vectors) {
  constexpr int kWide = Vec::kRegisters >= 32 ? 4 : 2;  // 6 x kWide sums, kWide columns and a row fill the registers
  constexpr int kVectors = kRows == 1 && Vec::kLanes < 16 ? 8 : kWide;
  for (; rows >= kRows; rows -= kRows, row += kRows) cover_columns<kRows, kVectors>(f, row, 0, vectors);
  if constexpr (kRows > 1) cover<kRows == 6 ? 4 : kRows / 2>(f, row, rows, vectors);
}

// Queries [begin, begin + rows) of a head, at most kQueriesPerTask of them.
template <class T>
class AttentionTile {
  using O = AttentionOperand<T>;
  using Element = typename O::Element;
  static constexpr int kLanes = Vec::kLanes, kPair = O::kPair;

 public:
  AttentionTile(const Head<T>& h, int64_t begin, int64_t end)
      : h(h), begin(begin), rows(int(end - begin)), steps(ceil_div(h.D, kPair)), vectors(int(ceil_div(h.D, kLanes))) {
    int64_t width = int64_t(vectors) * kLanes;
    char* next = (char*)scratch<0>(size_t(rows) * (sizeof(Element) * (steps * kPair) + 4 * (width + kLanes + 1)) +
                                   sizeof(Element) * kKeys * (steps * kPair + width) + 8 * kBandRows * kKeys + 1024);
    query = take<Element>(next, rows * steps * kPair);
    key = take<Element>(next, kKeys * steps * kPair);
    value = take<Element>(next, kKeys * width);
    probability = take<Element>(next, kBandRows * kKeys);
    score = take<float>(next, kBandRows * kKeys);
    acc = take<float>(next, rows * width);
    sum = take<float>(next, rows * kLanes);
    peak = take<float>(next, rows + kLanes);
  }

  void run() {
    for (int j = 0; j < kKeys; ++j) index[j] = float(j);
    load_queries();
    int64_t low = h.low(begin), high = h.high(begin + rows - 1);
    for (block = low / kKeys * kKeys; block < high; block += kKeys) {
      from = int(max64(low - block, 0)), to = int(min64(high - block, kKeys));
      if (!look()) continue;
      pack_keys();
      pack_values();
      for (band = 0; band < rows; band += kBandRows) attend(min64(rows - band, kBandRows));
    }
    finish();
  }

 private:
  template <class E>
  static E* take(char*& next, int64_t count) {
    E* p = (E*)next;
    next += (size_t(count) * sizeof(E) + 63) & ~size_t(63);
    return p;
  }

  void load_queries() {
    for (int r = 0; r < rows; ++r) {
      const T* p = h.q + (begin + r) * h.stride_q;
      Element* to = query + r * steps * kPair;
      if constexpr (kPair == 2) {
        to[steps * 2 - 1] = {0};
        __builtin_memcpy(to, p, size_t(h.D) * 2);
      } else {
        for (int64_t d = 0; d < h.D; d += kLanes) {
          int n = int(min64(h.D - d, kLanes));
          Vec::load(p + d, n).store(to + d, n);
        }
      }
      peak[r] = -kInfinity;
      Vec::zero().store(sum + r * kLanes);
      for (int c = 0; c < vectors; ++c) Vec::zero().store(acc + (r * vectors + c) * kLanes);
    }
  }

  // Which keys [from, to) of the block the mask shows; false if none.
  bool look() {
    hidden = 0;
    if (!h.mask) return true;
    for (int j = 0; j < kKeys; ++j) {
      bool seen = j >= from && j < to && h.mask[block + j];
      visible[j] = seen;
      hidden += !seen && j >= from && j < to;
    }
    return hidden < to - from;
  }
  bool shown(int j) const { return j >= from && j < to && (!hidden || visible[j] > 0); }

  // key[s][j]: step s of key j. Rows that no query sees are zeros and never read.
  void pack_keys() {
    for (int j = from / kLanes * kLanes; j < to; j += kLanes)
      for (int64_t s = 0; s < steps; s += kLanes) {
        Vec r[kLanes];
        int n = int(min64(h.D - s * kPair, kLanes * kPair));
        for (int i = 0; i < kLanes; ++i) {
          const T* p = h.k + (block + j + i) * h.stride_k + s * kPair;
          if (!shown(j + i))
            r[i] = Vec::zero();
          else if constexpr (kPair == 2)
            r[i] = (n == kLanes * 2 ? Pairs::load(p) : Pairs::load(p, n)).as_vec();
          else
            r[i] = n == kLanes ? Vec::load(p) : Vec::load(p, n);
        }
        Vec::transpose(r);
        for (int i = 0; i < kLanes && s + i < steps; ++i) {
          Element* to = key + ((s + i) * kKeys + j) * kPair;
          if constexpr (kPair == 2)
            Pairs::from_vec(r[i]).store(to);
          else
            r[i].store(to);
        }
      }
  }

  // value[j][d], or pairs of keys: value[j / 2][d][j % 2].
  void pack_values() {
    packed = value, stride_packed = int64_t(vectors) * kLanes * kPair;
    if constexpr (sizeof(T) == 4)
      if (rows <= 6 && !hidden && h.D % kLanes == 0) {  // too few queries to pay for a copy
        packed = h.v + block * h.stride_v, stride_packed = h.stride_v;
        return;
      }
    for (int j = from / kPair * kPair; j < to; j += kPair)
      for (int c = 0; c < vectors; ++c) {
        int n = int(min64(h.D - c * kLanes, kLanes));
        Element* at = value + (j / kPair * vectors + c) * kLanes * kPair;
        if constexpr (kPair == 2) {
          bfloat16 padded[2][kLanes] = {};
          const bfloat16* p[2];
          for (int i = 0; i < 2; ++i) {
            p[i] = h.v + (block + j + i) * h.stride_v + c * kLanes;
            if (shown(j + i) && n == kLanes) continue;
            if (shown(j + i)) __builtin_memcpy(padded[i], p[i], size_t(n) * 2);
            p[i] = padded[i];
          }
          Pairs::zip(p[0], p[1]).store(at);
        } else {
          const T* p = h.v + (block + j) * h.stride_v + c * kLanes;
          (!shown(j) ? Vec::zero() : n == kLanes ? Vec::load(p) : Vec::load(p, n)).store(at);
        }
      }
  }

  struct Scores {
    const AttentionTile& t;
    template <int kRows, int kVectors>
    void tile(int row, int column) const {
      if (column * kLanes >= t.high[row + kRows - 1] || (column + kVectors) * kLanes <= t.low[row]) return;
      Vec s[kRows][kVectors];
      for (int i = 0; i < kRows; ++i)
        for (int j = 0; j < kVectors; ++j) s[i][j] = Vec::zero();
      multiply_tile<O>(t.query + (t.band + row) * t.steps * kPair, t.steps * kPair, t.key + column * kLanes * kPair,
                       kKeys * kPair, t.steps, s);
      for (int i = 0; i < kRows; ++i)
        for (int j = 0; j < kVectors; ++j)
          (s[i][j] * Vec::broadcast(t.h.scale)).store(t.score + (row + i) * kKeys + (column + j) * kLanes);
    }
  };

  struct Values {
    const AttentionTile& t;
    template <int kRows, int kVectors>
    void tile(int row, int column) const {
      int begin = t.low[row] / kPair, end = (t.high[row + kRows - 1] + kPair - 1) / kPair;
      if (begin >= end) return;
      float* at = t.acc + ((t.band + row) * t.vectors + column) * kLanes;
      Vec o[kRows][kVectors];
      for (int i = 0; i < kRows; ++i)
        for (int j = 0; j < kVectors; ++j)
          o[i][j] = Vec::load(at + (i * t.vectors + j) * kLanes) * Vec::broadcast(t.decay[row + i]);
      multiply_tile<O>(t.probability + row * kKeys + begin * kPair, kKeys,
                       t.packed + begin * t.stride_packed + column * kLanes * kPair, t.stride_packed, end - begin, o);
      for (int i = 0; i < kRows; ++i)
        for (int j = 0; j < kVectors; ++j) o[i][j].store(at + (i * t.vectors + j) * kLanes);
    }
  };

  // The block's part in the queries [band, band + n).
  void attend(int n) {
    for (int r = 0; r < n; ++r) {
      int64_t i = begin + band + r;
      low[r] = int(min64(max64(h.low(i) - block, 0), kKeys));
      high[r] = int(min64(max64(h.high(i) - block, 0), kKeys));
    }
    if (low[0] >= high[n - 1]) return;
    cover(Scores{*this}, 0, n, int(ceil_div(high[n - 1], kLanes)));
    for (int r = 0; r < n; ++r) shift[r] = row_peak(r);
    for (int r = 0; r < n; r += kLanes) {  // e^(old maximum - new maximum)
      Vec old = Vec::load(peak + band + r), now = Vec::load(shift + r);
      now.store(peak + band + r);
      now = select_less(Vec::broadcast(-kInfinity), now, now, Vec::zero());
      now.store(shift + r);
      exp2_nonpositive(old - now).store(decay + r);
    }
    for (int r = 0; r < n; ++r) exponentiate(r, low[0] / kLanes, int(ceil_div(high[n - 1], kLanes)));
    cover(Values{*this}, 0, n, vectors);
  }

  // Adds the bias, hides what row r does not see, and returns its new running maximum times log2 e.
  float row_peak(int r) {
    Vec top = Vec::broadcast(-kInfinity);
    bool partial = low[r] % kLanes || high[r] % kLanes;
    for (int c = low[r] / kLanes; c * kLanes < high[r]; ++c) {
      float* at = score + r * kKeys + c * kLanes;
      Vec s = Vec::load(at);
      if (h.bias) s = s + bias(r, c * kLanes);
      if (partial) {
        Vec j = Vec::load(index + c * kLanes);
        s = select_less(j, Vec::broadcast(float(high[r])), s, Vec::broadcast(-kInfinity));
        s = select_less(j, Vec::broadcast(float(low[r])), Vec::broadcast(-kInfinity), s);
      }
      if (hidden) s = select_less(Vec::zero(), Vec::load(visible + c * kLanes), s, Vec::broadcast(-kInfinity));
      if (h.bias || partial || hidden) s.store(at);
      top = max(top, s);
    }
    float now = reduce_max(top) * kLog2E, old = peak[band + r];
    return now > old ? now : old;
  }

  Vec bias(int r, int j) const {
    const T* p = h.bias + (begin + band + r) * h.stride_bias[0] + (block + j) * h.stride_bias[1];
    int n = int(min64(h.S - block - j, kLanes));
    if (h.stride_bias[1] == 1) return n == kLanes ? Vec::load(p) : Vec::load(p, n);
    float x[kLanes] = {};
    for (int i = 0; i < n; ++i) x[i] = to_float(p[i * h.stride_bias[1]]);
    return Vec::load(x);
  }

  // probability[r] = e^(score - maximum) where row r sees a key, else 0, over vectors [first, last); adds up the sum.
  void exponentiate(int r, int first, int last) {
    Vec total = Vec::load(sum + (band + r) * kLanes) * Vec::broadcast(decay[r]);
    int begin = low[r] / kLanes, end = low[r] < high[r] ? int(ceil_div(high[r], kLanes)) : begin;
    float kept[kKeys];
    if (h.dropout_p > 0) dropout(r, begin * kLanes, end * kLanes, kept);
    for (int c = first; c < last; ++c) {
      Vec p = Vec::zero();
      if (c >= begin && c < end) {
        p = exp2_nonpositive(fma(Vec::load(score + r * kKeys + c * kLanes), Vec::broadcast(kLog2E),
                                 Vec::zero() - Vec::broadcast(shift[r])));
        total = total + p;
        if (h.dropout_p > 0) p = p * Vec::load(kept + c * kLanes);
      }
      p.store(probability + r * kKeys + c * kLanes);
    }
    total.store(sum + (band + r) * kLanes);
  }

  void dropout(int r, int begin, int end, float* kept) const {
    for (int j = begin; j < end; j += 4) {
      Philox words(h.seed, uint64_t(block + j) >> 2, h.row + uint64_t(this->begin + band + r));
      for (int i = 0; i < 4; ++i) kept[j + i] = dropout_keeps(words, i, h.dropout_p);
    }
  }

  void finish() {
    float keep = h.dropout_p > 0 ? 1 / (1 - h.dropout_p) : 1;
    for (int r = 0; r < rows; ++r) {
      float total = reduce_add(Vec::load(sum + r * kLanes));
      T* out = h.out + (begin + r) * h.stride_out;
      for (int c = 0; c < vectors; ++c) {
        Vec o = Vec::zero();
        if (total != 0) o = Vec::load(acc + (r * vectors + c) * kLanes) / Vec::broadcast(total) * Vec::broadcast(keep);
        o.store(out + c * kLanes, int(min64(h.D - c * kLanes, kLanes)));
      }
      if (h.lse) h.lse[begin + r] = total == 0 ? kLowest : float(peak[r] * kLn2 + __builtin_log(total));
    }
  }

  const Head<T>& h;
  const int64_t begin;
  const int rows;
  const int64_t steps;  // of an inner product over D
  const int vectors;    // of an output row

  Element *query, *key, *value, *probability;  // (rows, D), (D, kKeys), (kKeys, D), (kBandRows, kKeys)
  float *score, *acc, *sum, *peak;             // (kBandRows, kKeys), (rows, D), (rows, kLanes), (rows)
  const Element* packed;                       // the block's values: value, or the caller's where that will do
  int64_t stride_packed;

  int64_t block;  // the block's first key; from it on, queries of this tile see keys [from, to)
  int from, to, hidden;
  int band;  // the band's first query; low and high are those of Head, relative to the block
  int low[kBandRows], high[kBandRows];
  float shift[kBandRows] = {}, decay[kBandRows], visible[kKeys], index[kKeys];
};

}  // namespace
}  // namespace gpt2fast

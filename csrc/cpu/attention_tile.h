// Attention of a block of queries, as in FlashAttention (Dao et al., 2022): keys and values go by in blocks of kKeys
// from key 0 on, and each query keeps a running maximum, a running sum and its outputs so far. The matrix of scores is
// never in memory. The floor is two products of D multiplications for each query and each key that it sees.
//
// The lanes of a vector hold keys in q k^T, and elements of the head in the product with v. Each q.k is summed in
// chains over d, and each output in one chain over keys. So the bits of a row depend neither on the rows beside it
// nor on keys that it does not see.
#pragma once
#include "attention_pack.h"

namespace gpt2fast {
namespace {

constexpr int kBandRows = 48;         // so many queries' scores against one block stay in the first-level cache
constexpr int kQueriesPerTask = 192;  // so many queries share a packed block
constexpr float kLowest = -3.40282346638528860e38f;  // lse of a row that attends to nothing

// e^x, where x is a score minus the row's maximum. It is not forced inline: the compiler decides.
inline Vec exp_score(Vec x) { return exp_nonpositive<6>(x); }

// acc[i][j] += the sum over steps s of a[i][s] times b(s, j), in the order of the steps. a[i] is a row; b(s, j) is a
// vector of kLanes columns.
template <class O, int kRows, int kVectors, class B>
inline void multiply_tile(const typename O::Element* a, int64_t stride_a, int64_t begin, int64_t end, const B& b,
                          Vec (&acc)[kRows][kVectors]) {
  a += begin * O::kPair;
  for (int64_t s = begin; s < end; ++s, a += O::kPair) {
    typename O::Chunk columns[kVectors];
    for (int j = 0; j < kVectors; ++j) columns[j] = b(s, j);
    for (int i = 0; i < kRows; ++i) {
      typename O::Chunk row = O::broadcast(a + i * stride_a);
      for (int j = 0; j < kVectors; ++j) acc[i][j] = O::multiply(row, columns[j], acc[i][j]);
    }
  }
}

// Calls f.tile<R, V>(row, column) for tiles of R rows and V vectors that together cover rows x vectors.
template <int kRows, int kVectors, class F>
inline void cover_columns(const F& f, int row, int column, int vectors) {
  for (; vectors >= kVectors; vectors -= kVectors, column += kVectors) f.template tile<kRows, kVectors>(row, column);
  if constexpr (kVectors > 1) cover_columns<kRows, kVectors / 2>(f, row, column, vectors);
}
template <int kRows = 6, class F>
inline void cover(const F& f, int row, int rows, int vectors) {
  // 6 x kWide sums, kWide vectors of columns and one vector for the row fill the registers.
  constexpr int kWide = Vec::kRegisters >= 32 ? 4 : 2;
  constexpr int kVectors = kRows == 1 && Vec::kLanes < 16 ? 8 : kWide;
  for (; rows >= kRows; rows -= kRows, row += kRows) cover_columns<kRows, kVectors>(f, row, 0, vectors);
  if constexpr (kRows > 1) cover<kRows == 6 ? 4 : kRows / 2>(f, row, rows, vectors);
}

// Attention of queries [begin, end) of a head, at most kQueriesPerTask of them.
template <class T>
class AttentionTile {
  using O = AttentionOperand<T>;
  using Element = typename O::Element;
  static constexpr int kLanes = Vec::kLanes, kPair = O::kPair;
  static constexpr int64_t kChain = 128 / kPair;  // steps of one chain of q.k: a longer chain has a larger error

 public:
  AttentionTile(PackedBlocks<T>& keys, int64_t begin, int64_t end)
      : keys(keys), h(keys.h), begin(begin), rows(int(end - begin)), steps(keys.steps), vectors(keys.vectors) {
    int64_t width = int64_t(vectors) * kLanes;
    char* next = (char*)scratch<0>(size_t(rows) * (sizeof(Element) * (steps * kPair) + 4 * (width + kLanes + 1)) +
                                   8 * kBandRows * kKeys + 1024);
    query = take<Element>(next, rows * steps * kPair);
    probability = take<Element>(next, kBandRows * kKeys);
    score = take<float>(next, kBandRows * kKeys);
    acc = take<float>(next, rows * width);
    sum = take<float>(next, rows * kLanes);
    peak = take<float>(next, rows + kLanes);
    for (int j = 0; j < kKeys; ++j) index[j] = float(j);
  }

  void run() {
    load_queries();
    last = h.high(begin + rows - 1);
    for (int64_t block = h.low(begin) / kKeys * kKeys; block < last; block += kKeys)
      if (keys.choose(block))
        for (band = 0; band < rows; band += kBandRows) attend(int(min64(rows - band, kBandRows)));
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

  // score = scale q k^T. A tile of keys that none of its queries sees is skipped.
  struct Scores {
    const AttentionTile& t;
    template <int kRows, int kVectors>
    void tile(int row, int column) const {
      int at = t.band + row;
      if (column == 0) t.keys.fetch_ahead(at * kKeys / t.rows, (at + kRows) * kKeys / t.rows, t.last);
      if (column * kLanes >= t.high[row + kRows - 1] || (column + kVectors) * kLanes <= t.low[row]) return;
      float* to = t.score + row * kKeys + column * kLanes;
      const Element* key = t.keys.key + column * kLanes * kPair;
      for (int64_t from = 0; from < t.steps; from += kChain) {
        bool ends = from + kChain >= t.steps;
        Vec scale = Vec::broadcast(ends ? t.h.scale : 1.f), s[kRows][kVectors];
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
          for (int j = 0; j < kVectors; ++j) s[i][j] = Vec::zero();
        multiply_tile<O>(
            t.query + at * t.steps * kPair, t.steps * kPair, from, ends ? t.steps : from + kChain,
            [&](int64_t step, int j) { return O::Chunk::load(key + (step * kKeys + j * kLanes) * kPair); }, s);
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
          for (int j = 0; j < kVectors; ++j) {
            float* total = to + i * kKeys + j * kLanes;
            if (from > 0) s[i][j] = Vec::load(total) + s[i][j];
            (s[i][j] * scale).store(total);
          }
      }
    }
  };

  // acc = decay acc + probability v, over the keys that at least one query of the tile sees.
  struct Outputs {
    const AttentionTile& t;
    template <int kRows, int kVectors>
    void tile(int row, int column) const {
      int first = t.low[row] / kPair, end = (t.high[row + kRows - 1] + kPair - 1) / kPair;
      if (first >= end) return;
      int64_t stride = int64_t(t.vectors) * kLanes;
      float* at = t.acc + (t.band + row) * stride + column * kLanes;
      Vec o[kRows][kVectors];
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
        for (int j = 0; j < kVectors; ++j)
          o[i][j] = Vec::load(at + i * stride + j * kLanes) * Vec::broadcast(t.decay[row + i]);
      const Element* probability = t.probability + row * kKeys;
      if (t.keys.in_place) {
        const T* value = t.h.v + t.keys.block * t.h.stride_v + column * kLanes;
        auto in_place = values_in_place(value, t.h.stride_v, t.low[row], t.high[row + kRows - 1]);
        multiply_tile<O>(probability, kKeys, first, end, in_place, o);
      } else {
        const Element* value = t.keys.value + column * kLanes * kPair;
        auto packed = [&](int64_t s, int j) { return O::Chunk::load(value + (s * stride + j * kLanes) * kPair); };
        multiply_tile<O>(probability, kKeys, first, end, packed, o);
      }
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
        for (int j = 0; j < kVectors; ++j) o[i][j].store(at + i * stride + j * kLanes);
    }
  };

  // Computes what Scores does, for n queries, from keys that are read where they lie and transposed in registers.
  template <int kRows = kFewQueries>
  void scores_in_place(int n) {
    if constexpr (kRows > 1) {
      if (n < kRows) return scores_in_place<kRows - 1>(n);
    }
    Vec scale = Vec::broadcast(h.scale);
    auto step_of = [&](const Vec& key, const Element* q, Vec(&s)[kRows]) __attribute__((always_inline)) {
#pragma GCC unroll 8
      for (int m = 0; m < kRows; ++m) s[m] = O::multiply(O::broadcast(q + m * steps * kPair), O::from_vec(key), s[m]);
    };
    for (int c = low[0] / kLanes; c * kLanes < high[kRows - 1]; ++c) {
      Vec s[kRows], total[kRows];
      for (int m = 0; m < kRows; ++m) s[m] = total[m] = Vec::zero();
      for (int64_t step = 0; step < steps; step += kLanes) {
        if (step > 0 && step % kChain == 0)
          for (int m = 0; m < kRows; ++m) total[m] = total[m] + s[m], s[m] = Vec::zero();
        Vec k[kLanes];
        keys.transposed_keys(c * kLanes, step, k);
        const Element* q = query + step * kPair;
        if (steps - step >= kLanes) {
#pragma GCC unroll 16
          for (int i = 0; i < kLanes; ++i) step_of(k[i], q + i * kPair, s);
        } else {
          for (int i = 0; i < steps - step; ++i) step_of(k[i], q + i * kPair, s);
        }
      }
      for (int m = 0; m < kRows; ++m) ((total[m] + s[m]) * scale).store(score + m * kKeys + c * kLanes);
    }
  }

  // The operand b of multiply_tile: values where they lie, and zeros for those outside [from, to).
  static auto values_in_place(const T* value, int64_t stride, int64_t from, int64_t to) {
    static const T zeros[kLanes * 8] = {};
    return [=](int64_t s, int j) __attribute__((always_inline)) {
      const T *even = value + s * kPair * stride, *odd = even + (kPair - 1) * stride;
      if (kPair == 2 && s * 2 < from) even = zeros;
      if (kPair == 2 && s * 2 + 1 >= to) odd = zeros;
      return O::zip(even + j * kLanes, odd + j * kLanes);
    };
  }

  // Takes the current block of keys into account for queries [band, band + n).
  void attend(int n) {
    for (int r = 0; r < n; ++r) {
      int64_t i = begin + band + r;
      low[r] = int(min64(max64(h.low(i) - keys.block, 0), kKeys));
      high[r] = int(min64(max64(h.high(i) - keys.block, 0), kKeys));
    }
    if (low[0] >= high[n - 1]) return;
    if (keys.in_place)
      scores_in_place(n);
    else
      cover(Scores{*this}, 0, n, int(ceil_div(high[n - 1], kLanes)));
    for (int r = 0; r < n; ++r) shift[r] = row_peak(r);
    for (int r = 0; r < n; r += kLanes) {  // decay = e^(old maximum - new maximum)
      Vec old = Vec::load(peak + band + r), now = Vec::load(shift + r);
      now.store(peak + band + r);
      now = select_less(Vec::broadcast(-kInfinity), now, now, Vec::zero());
      now.store(shift + r);
      exp_score(old - now).store(decay + r);
    }
    for (int r = 0; r < n; ++r) exponentiate(r, low[0] / kLanes, int(ceil_div(high[n - 1], kLanes)));
    cover(Outputs{*this}, 0, n, vectors);
  }

  // Adds the bias to the scores of row r, sets those of keys that it does not see to -infinity, and returns the row's
  // new running maximum.
  float row_peak(int r) {
    Vec top = Vec::broadcast(-kInfinity), none = top;
    Vec from = Vec::broadcast(float(low[r])), to = Vec::broadcast(float(high[r]));
    bool partial = low[r] % kLanes || high[r] % kLanes;
    for (int c = low[r] / kLanes; c * kLanes < high[r]; ++c) {
      float* at = score + r * kKeys + c * kLanes;
      Vec s = Vec::load(at);
      if (h.bias) s = s + bias(r, c * kLanes);
      if (partial) {
        Vec j = Vec::load(index + c * kLanes);
        s = select_less(j, from, none, select_less(j, to, s, none));
      }
      if (keys.hidden) s = select_less(Vec::zero(), Vec::load(keys.visible + c * kLanes), s, none);
      if (h.bias || partial || keys.hidden) s.store(at);
      top = max(top, s);
    }
    float now = reduce_max(top), old = peak[band + r];
    return now > old ? now : old;
  }

  Vec bias(int r, int j) const {
    const T* p = h.bias + (begin + band + r) * h.stride_bias[0] + (keys.block + j) * h.stride_bias[1];
    int n = int(min64(h.S - keys.block - j, kLanes));
    if (h.stride_bias[1] == 1) return n == kLanes ? Vec::load(p) : Vec::load(p, n);
    float x[kLanes] = {};
    for (int i = 0; i < n; ++i) x[i] = to_float(p[i * h.stride_bias[1]]);
    return Vec::load(x);
  }

  // probability = e^(score - maximum) where row r sees the key, and 0 elsewhere, over vectors [first, end). Adds the
  // exponentials to the running sum.
  void exponentiate(int r, int first, int end) {
    int seen = low[r] / kLanes, unseen = low[r] < high[r] ? int(ceil_div(high[r], kLanes)) : seen;
    float kept[kKeys];
    if (h.dropout_p > 0) dropout(r, seen * kLanes, unseen * kLanes, kept);
    float* sums = sum + (band + r) * kLanes;
    Vec total = Vec::load(sums) * Vec::broadcast(decay[r]), top = Vec::broadcast(shift[r]);
    for (int c = first & ~1; c < end; c += 2) {
      Vec p[2] = {Vec::zero(), Vec::zero()};
      for (int i = 0; i < 2; ++i) {
        int at = (c + i) * kLanes;
        if (c + i < seen || c + i >= unseen) continue;
        p[i] = exp_score(Vec::load(score + r * kKeys + at) - top);
        total = total + p[i];
        if (h.dropout_p > 0) p[i] = p[i] * Vec::load(kept + at);
      }
      store_pair(p[0], p[1], probability + r * kKeys + c * kLanes);
    }
    total.store(sums);
  }

  void dropout(int r, int from, int to, float* kept) const {
    for (int j = from; j < to; j += 4) {
      Philox words(h.seed, uint64_t(keys.block + j) >> 2, h.row + uint64_t(begin + band + r));
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
      if (h.lse) h.lse[begin + r] = total == 0 ? kLowest : float(peak[r] + __builtin_log(total));
    }
  }

  PackedBlocks<T>& keys;
  const Head<T>& h;
  const int64_t begin;
  const int rows;
  const int64_t steps;
  const int vectors;

  Element *query, *probability;  // (rows, D), (kBandRows, kKeys)
  // (kBandRows, kKeys), (rows, D), (rows, kLanes), (rows)
  float *score, *acc, *sum, *peak;

  int64_t last;  // no query sees this key or a later one
  int band;  // the band's first query, counted from begin; row r of the band sees keys [low[r], high[r]) of the block
  int low[kBandRows], high[kBandRows];
  float shift[kBandRows] = {}, decay[kBandRows], index[kKeys];
};

// How the work of a call is split. A unit is up to kQueriesPerTask queries of one head. A task is one unit, or several
// tiny ones.
struct AttentionUnits {
  int64_t H, T, rows, per_head, count, per_task;

  AttentionUnits(int64_t B, int64_t H, int64_t T, int64_t S, int64_t D) : H(H), T(T) {
    rows = max64(1, min64(T, kQueriesPerTask));
    per_head = ceil_div(T, rows);
    count = B * H * per_head;
    per_task = max64(1, (int64_t(1) << 17) / max64(1, S * D * (rows + 8)));
  }

  int64_t tasks() const { return ceil_div(count, per_task); }

  // Runs tasks [begin, end); head(b, h) gives the Head of row b and head h. The units of a head go first, last, second,
  // last but one, and so on: late queries see more keys under a causal mask, and in this order any run of tasks has
  // about the same work.
  template <class Storage, class F>
  void run(int64_t begin, int64_t end, F head) const {
    int64_t unit = begin * per_task, stop = min64(end * per_task, count);
    while (unit < stop) {
      int64_t bh = unit / per_head;
      Head<Storage> now = head(bh / H, bh % H);
      if ((bh + 1) * per_head < stop) {
        Head<Storage> next = head((bh + 1) / H, (bh + 1) % H);
        now.next_k = next.k + next.first * next.stride_k, now.next_v = next.v + next.first * next.stride_v;
      }
      PackedBlocks<Storage> keys(now, rows);
      for (; unit < min64(stop, (bh + 1) * per_head); ++unit) {
        int64_t i = unit % per_head, row = (i & 1 ? per_head - 1 - i / 2 : i / 2) * rows;
        AttentionTile<Storage>(keys, row, min64(row + rows, T)).run();
      }
    }
  }
};

}  // namespace
}  // namespace gpt2fast

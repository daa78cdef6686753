// Parts of the kernels in sample.cu: the order of float32 numbers as integers, weights as integers, sums over a block,
// a row of logits, and a list of some of them. Each warp has its own part of the row or of the list.
#pragma once
#include <limits>

#include "cross_entropy.cuh"

namespace gpt2fast::cuda {

constexpr int kSampleThreads = 512;  // threads of a block, which has one row
constexpr int kSampleWarps = kSampleThreads / kWarp;
constexpr int kSampleAhead = 4;  // packs that a thread loads together
constexpr float kInfinity = std::numeric_limits<float>::infinity();
using Mass = unsigned long long;  // a sum of weights

__device__ __forceinline__ int warp_of_block() { return threadIdx.x / kWarp; }
__device__ __forceinline__ int lane_of_warp() { return threadIdx.x % kWarp; }
__device__ __forceinline__ unsigned lanes_before() { return (1u << lane_of_warp()) - 1; }

// Maps float32 to uint32 in the same order. Both zeros map to one key, and NaN maps to the greatest key.
__device__ __forceinline__ uint32_t key_of(float x) {
  if (x != x) return ~0u;
  const uint32_t bits = __float_as_uint(x + 0.0f);  // the addition turns -0 into 0
  return bits >> 31 ? ~bits : bits | 1u << 31;
}

__device__ __forceinline__ float number_of(uint32_t key) { return __uint_as_float(key >> 31 ? key ^ 1u << 31 : ~key); }

// The weight of a score, e^(score - top), as an integer. Its unit is such that the sum of V weights leaves the highest
// two bits free.
struct Weights {
  float top, unit;

  __device__ __forceinline__ Weights(float top, int V) : top(top) {
    const int bits = 32 - __clz(V);
    unit = __uint_as_float(uint32_t(127 + 62 - bits) << 23);
  }

  // The weight is 0 if it is less than `least` times the greatest weight, and if the score is NaN.
  __device__ __forceinline__ Mass operator()(float score, float least = 0) const {
    const float w = power_of_2((score - top) * kLog2E);
    return w >= least ? Mass(w * unit) : 0;
  }
};

template <class N>
__device__ __forceinline__ N sum_of_lanes(N x) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(kAllLanes, x, distance);
  return x;
}

// The sum over the lanes up to and including this one.
template <class N>
__device__ __forceinline__ N sum_up_to(N x) {
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const N got = __shfl_up_sync(kAllLanes, x, distance);
    if (lane_of_warp() >= distance) x += got;
  }
  return x;
}

// Sums over the warps before this one, over this warp, and over the whole block.
struct Sums {
  Mass before, own, total;
};

class Block {
 public:
  // Calls use two rows of shared memory in turn, so that one barrier a call is enough.
  __device__ __forceinline__ Sums sums(Mass x) {
    __shared__ Mass of_warps[2][kSampleWarps];
    Mass(&found)[kSampleWarps] = of_warps[turn_];
    turn_ ^= 1;
    const Mass own = sum_of_lanes(x);
    if (lane_of_warp() == 0) found[warp_of_block()] = own;
    __syncthreads();
    const Mass of_lane = lane_of_warp() < kSampleWarps ? found[lane_of_warp()] : 0;
    const Mass total = sum_of_lanes(of_lane), before = sum_of_lanes(lane_of_warp() < warp_of_block() ? of_lane : 0);
    return {before, own, total};
  }

 private:
  int turn_ = 0;
};

// A row of logits. A warp has a range of steps of it; a step is one pack for each lane. Places are counted from the
// start of the sector of memory that has the row's first logit, so that packs are aligned.
template <class T>
struct Row {
  static constexpr int kWidth = kPack<T>;

  const T* logits;    // place 0
  int before, V;      // places before the row; columns of the row
  int first, last;    // the warp's steps, without `last`
  float temperature;  // 1 leaves the logits as they are

  __device__ __forceinline__ Row(const void* all, int64_t offset, int V, float temperature)
      : V(V), temperature(temperature) {
    const T* row = static_cast<const T*>(all) + offset;
    before = int(reinterpret_cast<uintptr_t>(row) % kSectorBytes / sizeof(T));
    logits = row - before;
    const int steps = (before + V - 1) / (kWarp * kWidth) + 1, each = (steps + kSampleWarps - 1) / kSampleWarps;
    first = min(steps, warp_of_block() * each), last = min(steps, first + each);
  }

  __device__ __forceinline__ int begin() const { return first * kWarp * kWidth; }
  __device__ __forceinline__ bool inside(int place) const { return unsigned(place - before) < unsigned(V); }
  __device__ __forceinline__ float score(float logit) const { return temperature == 1 ? logit : logit / temperature; }

  // Reads a pack. Places outside of the row are -infinity.
  __device__ __forceinline__ void read(int place, float (&x)[kWidth]) const {
    if (place >= before && place + kWidth <= before + V) {
      load<T, kWidth>(logits + place, x);
    } else {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) x[i] = inside(place + i) ? widen(logits[place + i]) : -kInfinity;
    }
  }

  // Calls f(logits, place) for the packs of a lane, in their order. All lanes of a warp make the same number of calls.
  template <class F>
  __device__ __forceinline__ void walk(F&& f) const {
    constexpr int kStep = kWarp * kWidth;
    for (int step = first; step < last;) {
      const int begin = step * kStep, place = begin + lane_of_warp() * kWidth;
      if (step + kSampleAhead <= last && begin >= before && begin + kSampleAhead * kStep <= before + V) {
        float x[kSampleAhead][kWidth];
#pragma unroll
        for (int j = 0; j < kSampleAhead; ++j) load<T, kWidth>(logits + place + j * kStep, x[j]);
#pragma unroll
        for (int j = 0; j < kSampleAhead; ++j) f(x[j], place + j * kStep);
        step += kSampleAhead;
      } else {
        float x[kWidth];
        read(place, x);
        f(x, place);
        ++step;
      }
    }
  }
};

// The columns that a warp has listed, in their order.
struct List {
  static constexpr int kWidth = 1;

  float* scores;
  int32_t* ids;
  int n = 0;

  __device__ __forceinline__ float score(float x) const { return x; }

  template <class F>
  __device__ __forceinline__ void walk(F&& f) const {
    for (int first = 0; first < n; first += kWarp) {
      const int place = first + lane_of_warp();
      const float x[1] = {place < n ? scores[place] : -kInfinity};
      f(x, place);
    }
  }

  // Adds the columns of a pack whose bit in `stays` is set.
  template <int kCount>
  __device__ __forceinline__ void add(unsigned stays, const float (&x)[kCount], int column) {
    if (!__any_sync(kAllLanes, stays)) return;
    const int count = __popc(stays), up_to = sum_up_to(count);
    int place = n + up_to - count;
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      if (stays >> i & 1) scores[place] = x[i], ids[place] = column + i, ++place;
    n += __shfl_sync(kAllLanes, up_to, kWarp - 1);
  }

  // Keeps the scores that are not less than the cut. Of the block's scores that equal the cut, the first `gone` are
  // dropped too; `rank` of these equal scores are in the warps before.
  __device__ __forceinline__ void keep(uint32_t cut, Mass rank, Mass gone) {
    const int listed = n;
    n = 0;
    for (int first = 0; first < listed; first += kWarp) {
      const int place = first + lane_of_warp();
      const bool inside = place < listed;
      const float x = inside ? scores[place] : 0;
      const int32_t id = inside ? ids[place] : 0;
      __syncwarp();  // another lane may overwrite what this lane has just read
      const uint32_t key = key_of(x);
      const unsigned equal = __ballot_sync(kAllLanes, inside && key == cut);
      const bool stays = inside && (key > cut || (key == cut && rank + __popc(equal & lanes_before()) >= gone));
      const unsigned kept = __ballot_sync(kAllLanes, stays);
      const int to = n + __popc(kept & lanes_before());
      if (stays) scores[to] = x, ids[to] = id;
      n += __popc(kept), rank += __popc(equal);
    }
    __syncwarp();
  }
};

}  // namespace gpt2fast::cuda

// What all CUDA kernels share: conversions between float32 and the 16-bit types of dtype.h, memory accesses of 128
// bits, and sums over a warp or a block. Each conversion is one PTX instruction, so that the toolkit's headers for
// 16-bit types are not needed.
#pragma once
#include <initializer_list>

#include "../ops.h"

namespace gpt2fast::cuda {

constexpr int kWarp = 32;
constexpr int kMaxThreads = 1024;  // of a block
constexpr int kPackBytes = 16;     // the widest memory access of a lane
// The bytes of shared memory that a block may have on every architecture. sm_86 and sm_89 have the least.
constexpr int kMostShared = 99 * 1024;
constexpr unsigned kAllLanes = ~0u;
constexpr float kLog2E = 1.4426950408889634f;

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(bfloat16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
__device__ __forceinline__ float widen(float16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}

// x as a T, rounded to the nearest.
template <class T>
__device__ __forceinline__ T narrow(float x);
template <>
__device__ __forceinline__ float narrow<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ bfloat16 narrow<bfloat16>(float x) {
  bfloat16 y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}
template <>
__device__ __forceinline__ float16 narrow<float16>(float x) {
  float16 y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}

// Two neighbouring numbers, rounded to a 16-bit type, in one register. The first is in the low half.
template <class T>
__device__ __forceinline__ uint32_t pair(float first, float second);
template <>
__device__ __forceinline__ uint32_t pair<bfloat16>(float first, float second) {
  uint32_t y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(second), "f"(first));
  return y;
}
template <>
__device__ __forceinline__ uint32_t pair<float16>(float first, float second) {
  uint32_t y;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(second), "f"(first));
  return y;
}

// A pack is kPack<T> neighbouring numbers: one memory access of 128 bits.
template <class T>
constexpr int kPack = kPackBytes / sizeof(T);

// Reads kWidth neighbouring numbers in one access: a pack, from an aligned address, or a single number.
template <class T, int kWidth>
__device__ __forceinline__ void load(const T* from, float (&to)[kWidth]) {
  if constexpr (kWidth == 1) {
    to[0] = widen(*from);
  } else {
    static_assert(kWidth == kPack<T>);
    uint4 raw = *reinterpret_cast<const uint4*>(from);
    uint32_t word[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      if constexpr (sizeof(T) == 4) {
        to[i] = __uint_as_float(word[i]);
      } else {
        to[i] = widen(T{uint16_t(word[i / 2] >> (i % 2 * 16))});
      }
    }
  }
}

template <class T, int kWidth>
__device__ __forceinline__ void store(T* to, const float (&from)[kWidth]) {
  if constexpr (kWidth == 1) {
    *to = narrow<T>(from[0]);
  } else {
    static_assert(kWidth == kPack<T>);
    uint32_t word[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (sizeof(T) == 4) {
        word[i] = __float_as_uint(from[i]);
      } else {
        word[i] = pair<T>(from[2 * i], from[2 * i + 1]);
      }
    }
    // This is inline PTX because the compiler turns an assignment into four stores where it does not see the alignment.
    // Without a "memory" clobber it may move loads across the store. That is safe: no kernel reads what it has stored,
    // and adamw_ stores what it has computed from the numbers that it read at the same address.
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "r"(word[0]),
                 "r"(word[1]), "r"(word[2]), "r"(word[3]));
  }
}

// The sum over the warp, in every lane.
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(kAllLanes, x, distance);
  return x;
}

// The sums of x and y over the block, in every thread. scratch holds one pair for each warp. Two calls may share it if
// the caller has a barrier between them.
__device__ __forceinline__ float2 block_sums(float x, float y, float2 (&scratch)[kWarp]) {
  const int lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  x = warp_sum(x), y = warp_sum(y);
  if (lane == 0) scratch[threadIdx.x / kWarp] = make_float2(x, y);
  __syncthreads();
  const float2 of_warp = lane < warps ? scratch[lane] : make_float2(0, 0);
  return make_float2(warp_sum(of_warp.x), warp_sum(of_warp.y));
}

// --- On the host ---

// Whether accesses of 128 bits are possible: all pointers are aligned to 16 bytes, and all strides (in elements of T)
// are multiples of a pack.
template <class T>
inline bool packed(std::initializer_list<const void*> pointers, std::initializer_list<int64_t> strides) {
  for (const void* p : pointers)
    if (reinterpret_cast<uintptr_t>(p) % kPackBytes) return false;
  for (int64_t s : strides)
    if (s % kPack<T>) return false;
  return true;
}

// The number of threads for a row of C columns: whole warps, such that each thread has at most per_thread columns. It
// is never more than kMaxThreads, so that the threads of a longer row have more columns.
inline int threads_for(int64_t C, int per_thread) {
  int64_t threads = (C + per_thread - 1) / per_thread;
  threads = (threads + kWarp - 1) / kWarp * kWarp;
  return int(threads < kMaxThreads ? threads : kMaxThreads);
}

}  // namespace gpt2fast::cuda

// Kernels with one bug each, where BUG is 1, and the same without it. The line that the machine must name ends in
// "bug: NAME", the other line of a race in "other: NAME".
#include <cuda_pipeline.h>

#include <cstdint>

constexpr bool kBug = BUG;

extern "C" __global__ void off_by_one(const float* x, float* y, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (kBug ? i <= n : i < n) {
    float v = x[i];  // bug: off_by_one
    if (i < n || v > 1e30f) y[i] = v;
  }
}

extern "C" __global__ void wrong_mask(const float* x, float* y, int rows, int columns) {
  int c = threadIdx.x, r = blockIdx.x;
  if (c < (kBug ? rows : columns)) y[r * columns + c] = 2 * x[r * columns + c];  // bug: wrong_mask
}

extern "C" __global__ void reverse(const float* x, float* y) {
  __shared__ float s[128];
  int t = threadIdx.x;
  s[t] = x[t];  // other: missing_barrier
  if (!kBug) __syncthreads();
  y[t] = s[127 - t];  // bug: missing_barrier
}

extern "C" __global__ void sum_of_warp(const float* x, float* y) {
  __shared__ float s[32];
  int t = threadIdx.x;
  s[t] = x[t];
  __syncwarp();
  if (t < 16) {
    s[t] += s[t + 16];  // other: missing_warp_barrier
  }
  if (!kBug) __syncwarp();
  if (t >= 16) {
    y[t] = s[t - 16];  // bug: missing_warp_barrier
  } else {
    y[t] = 0;
  }
}

// 32 x 32 tiles by 32 x 8 threads
extern "C" __global__ void transpose(const float* x, float* y, int n) {
  int c = blockIdx.x * 32 + threadIdx.x, r = blockIdx.y * 32 + threadIdx.y;
  if (kBug) {
    for (int j = 0; j < 32; j += 8) {
      float v = x[(r + j) * n + c];
      y[c * n + r + j] = v;  // bug: uncoalesced
    }
    return;
  }
  __shared__ float tile[32][33];
  for (int j = 0; j < 32; j += 8) tile[threadIdx.y + j][threadIdx.x] = x[(r + j) * n + c];
  __syncthreads();
  c = blockIdx.y * 32 + threadIdx.x, r = blockIdx.x * 32 + threadIdx.y;
  for (int j = 0; j < 32; j += 8) y[(r + j) * n + c] = tile[threadIdx.x][threadIdx.y + j];
}

extern "C" __global__ void through_tile(const float* x, float* y) {
  __shared__ float tile[32 * 33];
  const int pitch = kBug ? 32 : 33;
  tile[threadIdx.y * pitch + threadIdx.x] = x[threadIdx.y * 32 + threadIdx.x];
  __syncthreads();
  float v = tile[threadIdx.x * pitch + threadIdx.y];  // bug: bank_conflict
  y[threadIdx.y * 32 + threadIdx.x] = v;
}

extern "C" __global__ void copied_asynchronously(const float* x, float* y) {
  __shared__ alignas(16) float s[2][128];
  int t = threadIdx.x;
  for (int stage = 0; stage < 2; ++stage) {
    __pipeline_memcpy_async(&s[stage][4 * t], x + stage * 128 + 4 * t, 16);
    __pipeline_commit();
  }
  __pipeline_wait_prior(kBug ? 1 : 0);
  __syncwarp();
  for (int i = t; i < 128; i += 32) {
    float v = s[1][127 - i];  // bug: missing_wait
    y[i] = s[0][i] + v;
  }
}

extern "C" __global__ void accumulate(const float* x, float* y, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) {
    float before = kBug ? y[i] : 0;  // bug: uninitialised
    y[i] = before + x[i];
  }
}

extern "C" __global__ void uninitialised_shared(const float* x, float* y) {
  __shared__ float s[64];
  int t = threadIdx.x;
  if (t < (kBug ? 60 : 64)) s[t] = x[t];
  __syncthreads();
  y[t] = s[63 - t];  // bug: uninitialised_shared
}

extern "C" __global__ void all_but_the_last(const float* x, float* y, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < (kBug ? n - 1 : n)) y[i] = x[i];
}

extern "C" __global__ void misaligned(const float* x, float* y) {
  const float4* from = reinterpret_cast<const float4*>(x + (kBug ? 1 : 0));
  reinterpret_cast<float4*>(y)[threadIdx.x] = from[threadIdx.x];  // bug: misaligned
}

extern "C" __global__ void into_the_neighbour(const float* x, float* y, int64_t apart) {
  int t = threadIdx.x;
  const float* from = kBug ? x + apart : y;
  float v = from[t];  // bug: provenance
  y[t] = v;
}

extern "C" __global__ void never_ends(float* y) {
  volatile float* flag = y;
  while (*flag != (kBug ? 2.0f : 1.0f)) {  // bug: endless
  }
}

// Kernels whose counts follow from their text.
#include <cuda_runtime.h>

extern "C" __global__ void copy(const float* x, float* y, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = x[i];
}

extern "C" __global__ void copy_float4(const float4* x, float4* y) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  y[i] = x[i];
}

extern "C" __global__ void copy_strided(const float* x, float* y, int stride) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  y[i] = x[i * stride];
}

// n x n by 32 x 32 tiles, 32 x 8 threads
template <int kPitch>
__device__ void transpose(const float* x, float* y, int n) {
  __shared__ float tile[32 * kPitch];
  int c = blockIdx.x * 32 + threadIdx.x, r = blockIdx.y * 32 + threadIdx.y;
  for (int j = 0; j < 32; j += 8) tile[(threadIdx.y + j) * kPitch + threadIdx.x] = x[(r + j) * n + c];
  __syncthreads();
  c = blockIdx.y * 32 + threadIdx.x, r = blockIdx.x * 32 + threadIdx.y;
  for (int j = 0; j < 32; j += 8) y[(r + j) * n + c] = tile[threadIdx.x * kPitch + threadIdx.y + j];
}
extern "C" __global__ void transpose_plain(const float* x, float* y, int n) { transpose<32>(x, y, n); }
extern "C" __global__ void transpose_padded(const float* x, float* y, int n) { transpose<33>(x, y, n); }

// n x n, 32 x 32 tiles of A and B, one output a thread; volatile, so that every read is an instruction of its own
extern "C" __global__ void matmul(const float* a, const float* b, float* c, int n) {
  __shared__ volatile float as[32][32], bs[32][32];
  int column = blockIdx.x * 32 + threadIdx.x, row = blockIdx.y * 32 + threadIdx.y;
  float sum = 0;
  for (int k = 0; k < n; k += 32) {
    as[threadIdx.y][threadIdx.x] = a[row * n + k + threadIdx.x];
    bs[threadIdx.y][threadIdx.x] = b[(k + threadIdx.y) * n + column];
    __syncthreads();
    for (int i = 0; i < 32; ++i) sum += as[threadIdx.y][i] * bs[i][threadIdx.x];
    __syncthreads();
  }
  c[row * n + column] = sum;
}

extern "C" __global__ void histogram(const int* x, int* counts) {
  atomicAdd(counts + x[blockIdx.x * blockDim.x + threadIdx.x], 1);
}

extern "C" __global__ void branches(int* y) {
  int t = threadIdx.x, value = 0;
  if (t % 2 == 0) {
    for (int i = 0; i < t; ++i) value += __shfl_xor_sync(__activemask(), i, 0);
  } else {
    value = __clz(t);
    __threadfence();
  }
  y[t] = value;
}

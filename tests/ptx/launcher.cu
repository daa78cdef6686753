// A CUDA extension as its author writes it: nothing here knows the machine.
#include <cstdint>
#include <cstdio>

__constant__ float coefficients[3];
__device__ int launches = 40;

template <typename T>
__global__ void polynomial(const T* x, T* y, int64_t n) {
  extern __shared__ unsigned char raw[];
  T* staged = reinterpret_cast<T*>(raw);
  int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  if (i < n) staged[threadIdx.x] = x[i];
  __syncthreads();
  if (i < n) {
    T v = staged[threadIdx.x];
    y[i] = T(coefficients[0]) + v * (T(coefficients[1]) + v * T(coefficients[2]));
  }
  if (i == 0) atomicAdd(&launches, 1);
}

struct Matrix {
  const float* data;
  int rows, columns;
};

__global__ void row_sums(Matrix m, float* out) {
  float sum = 0;
  for (int c = 0; c < m.columns; ++c) sum += m.data[blockIdx.x * m.columns + c];
  out[blockIdx.x] = sum;
}

__global__ void large_shared(float* y) {
  extern __shared__ float big[];
  big[threadIdx.x * 256] = threadIdx.x;
  __syncthreads();
  y[threadIdx.x] = big[(63 - threadIdx.x) * 256];
}

__global__ void say(int n) { printf("block %d says %d\n", int(blockIdx.x), n); }

extern "C" {

cudaError_t polynomial_float(const float* x, float* y, int64_t n, float c0, float c1, float c2, cudaStream_t stream) {
  const float c[3] = {c0, c1, c2};
  cudaMemcpyToSymbolAsync(coefficients, c, sizeof c, 0, cudaMemcpyHostToDevice, stream);
  polynomial<float><<<(n + 127) / 128, 128, 128 * sizeof(float), stream>>>(x, y, n);
  return cudaGetLastError();
}

int count_launches() {
  int count = 0;
  cudaMemcpyFromSymbol(&count, launches, sizeof count);
  return count;
}

void row_sums_through_device_memory(const float* x, float* out, int rows, int columns) {
  float* copy = nullptr;
  cudaMalloc(&copy, sizeof(float) * rows * columns);
  cudaMemcpy(copy, x, sizeof(float) * rows * columns, cudaMemcpyDefault);
  row_sums<<<rows, 1>>>(Matrix{copy, rows, columns}, out);
  cudaFree(copy);
}

void row_sums_too_late(const float* x, float* out, int rows, int columns) {
  float* copy = nullptr;
  cudaMalloc(&copy, sizeof(float) * rows * columns);
  cudaMemcpy(copy, x, sizeof(float) * rows * columns, cudaMemcpyDefault);
  cudaFree(copy);
  row_sums<<<rows, 1>>>(Matrix{copy, rows, columns}, out);
}

void reverse_large(float* y, bool allowed) {
  if (allowed) cudaFuncSetAttribute(large_shared, cudaFuncAttributeMaxDynamicSharedMemorySize, 65536);
  large_shared<<<1, 64, 65536>>>(y);
}

void speak(int n) { say<<<2, 1>>>(n); }

int multiprocessors(void) {
  int count = 0;
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, 0);
  return count;
}
}

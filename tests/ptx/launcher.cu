// A CUDA extension as its author writes it: nothing here knows the machine.
#include <cstdint>
#include <cstdio>
#include <cstdlib>

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

__global__ void scale(const float* x, float* y, int n, float a) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = a * x[i];
}

__global__ void __launch_bounds__(256) bounded(float* y) { y[threadIdx.x] = 1; }

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

// Host code right and wrong: copies, fills, exits, questions to the runtime.

cudaError_t fill(int allocated, int filled) {
  void* p = nullptr;
  if (allocated) cudaMalloc(&p, allocated);
  cudaError_t error = cudaMemset(p, 0, filled);
  cudaFree(p);
  return error;
}

cudaError_t copy_in(const float* x, int allocated, int copied) {
  void* p = nullptr;
  if (allocated) cudaMalloc(&p, allocated);
  cudaError_t error = cudaMemcpyAsync(p, x, copied, cudaMemcpyHostToDevice, nullptr);
  cudaFree(p);
  return error;
}

cudaError_t copy_into_the_stack(const float* x, bool swapped) {
  float here[4];
  return swapped ? cudaMemcpy(here, x, sizeof here, cudaMemcpyHostToDevice)
                 : cudaMemcpy(here, x, sizeof here, cudaMemcpyDeviceToHost);
}

void copy_of_a_buffer(float* y, int written) {
  float* p = nullptr;
  cudaMalloc(&p, 400);
  if (written) cudaMemset(p, 0, written);
  cudaMemcpy(y, p, 400, cudaMemcpyDeviceToDevice);
  cudaFree(p);
}

void scale_and_check(const float* x, float* y, int n, int blocks) {
  scale<<<blocks, 128>>>(x, y, blocks * 128 > n ? n : blocks * 128, 2.0f);
  if (cudaGetLastError() != cudaSuccess) exit(3);
}

void scale_too_far(const float* x, float* y, int n) {
  scale<<<1, 128>>>(x, y, n, 2.0f);
  if (cudaGetLastError() != cudaSuccess) exit(3);
}

void scale_and_leave(const float* x, float* y, int n) {
  scale<<<1, 128>>>(x, y, n, 2.0f);
  exit(4);
}

void launch_ex(const float* x, float* y, int n, int cluster) {
  cudaLaunchConfig_t config = {};
  config.gridDim = (n + 127) / 128, config.blockDim = 128;
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {unsigned(cluster), 1, 1};
  config.attrs = &attribute, config.numAttrs = cluster ? 1 : 0;
  cudaLaunchKernelEx(&config, scale, x, y, n, 3.0f);
  cudaGetLastError();
}

void occupancy(int* found) {
  cudaFuncAttributes a;
  cudaFuncGetAttributes(&a, scale);
  found[0] = a.numRegs, found[1] = a.maxThreadsPerBlock;
  cudaFuncGetAttributes(&a, bounded);
  found[2] = a.maxThreadsPerBlock;
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&found[3], scale, 128, 0);
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&found[4], scale, 128, 48 * 1024);
  cudaOccupancyMaxPotentialBlockSize(&found[5], &found[6], scale, 0, 0);
}

float events() {
  cudaEvent_t a, b;
  cudaStream_t stream;
  float milliseconds = -1;
  cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
  cudaEventCreate(&a), cudaEventCreate(&b);
  cudaEventRecord(a, stream), cudaEventRecord(b, stream), cudaEventSynchronize(b);
  cudaEventElapsedTime(&milliseconds, a, b);
  cudaEventDestroy(a), cudaEventDestroy(b), cudaStreamDestroy(stream);
  return milliseconds;
}

void kinds_of_memory(const float* x, int* found) {
  void *device, *managed, *host, *pitched;
  size_t pitch = 0;
  int local = 0;
  cudaMalloc(&device, 8), cudaMallocManaged(&managed, 8), cudaMallocHost(&host, 8);
  cudaMallocPitch(&pitched, &pitch, 600, 2);
  const void* all[] = {device, managed, host, x, &local};
  for (int i = 0; i < 5; ++i) {
    cudaPointerAttributes a;
    cudaPointerGetAttributes(&a, all[i]);
    found[i] = a.type;
  }
  found[5] = int(pitch);
  found[6] = cudaMemset2D(pitched, pitch, 0, 600, 2);
  found[7] = cudaMemset2D(pitched, 500, 0, 600, 2);
  cudaGetLastError();
  cudaDeviceGetAttribute(&found[8], cudaDevAttrMaxBlocksPerMultiprocessor, 0);
  cudaFree(device), cudaFree(managed), cudaFreeHost(host), cudaFree(pitched);
}
}

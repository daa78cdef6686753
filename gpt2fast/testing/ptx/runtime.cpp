// The CUDA runtime that `nvcc -cudart none` code is linked with on the PTX machine: launches and memory go to
// callbacks. Linked hidden into each library, so that a real libcudart in the same process is never mixed with it.
// Device memory is host memory, every stream runs at once, and a call that is missing here is an undefined symbol when
// linking.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <string>
#include <unordered_map>
#include <vector>

namespace {

enum MemoryEvent : int { kFreed, kAllocated, kWritten };

struct Callbacks {
  // 0, or -1 after an error that the caller keeps. `image` is the fat binary that holds `kernel`, `allowed` the dynamic
  // shared memory that it may take as its attributes stand.
  int (*launch)(const void* image, const char* kernel, const unsigned* grid, const unsigned* block, size_t shared,
                size_t allowed, void** arguments);
  void (*memory)(void* address, size_t bytes, MemoryEvent event);
  void* (*variable)(const void* image, const char* name, size_t bytes);
};

struct Symbol {
  const void* image;
  std::string name;
  size_t bytes = 0;
  size_t dynamic_shared = 48 * 1024;
};

struct Configuration {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
};

// Function-local: registration runs in other files' static constructors.
struct State {
  std::unordered_map<const void*, Symbol> kernels, variables;
  std::unordered_map<void*, size_t> allocations;
  std::vector<Configuration> configurations;
  const Callbacks* callbacks = nullptr;
  cudaError_t last = cudaSuccess;
};

State& state() {
  static State* one = new State;  // never destroyed: unregistration runs after static destructors
  return *one;
}

cudaError_t remember(cudaError_t error) {
  if (error != cudaSuccess) state().last = error;
  return error;
}

cudaError_t launch(const void* function, dim3 grid, dim3 block, void** arguments, size_t shared) {
  State& s = state();
  if (!s.callbacks) return remember(cudaErrorNoDevice);
  auto found = s.kernels.find(function);
  if (found == s.kernels.end()) return remember(cudaErrorInvalidDeviceFunction);
  const unsigned g[3] = {grid.x, grid.y, grid.z}, b[3] = {block.x, block.y, block.z};
  const Symbol& k = found->second;
  const int status = s.callbacks->launch(k.image, k.name.c_str(), g, b, shared, k.dynamic_shared, arguments);
  return remember(status == 0 ? cudaSuccess : cudaErrorLaunchFailure);
}

cudaError_t written(void* address, size_t bytes) {
  if (state().callbacks) state().callbacks->memory(address, bytes, kWritten);
  return cudaSuccess;
}

char* symbol_address(const void* symbol) {
  State& s = state();
  auto found = s.variables.find(symbol);
  if (!s.callbacks || found == s.variables.end()) return nullptr;
  const Symbol& v = found->second;
  return static_cast<char*>(s.callbacks->variable(v.image, v.name.c_str(), v.bytes));
}

}  // namespace

extern "C" {

__attribute__((visibility("default"))) void gpt2fast_ptx_connect(const Callbacks* callbacks) {
  state().callbacks = callbacks;
  state().last = cudaSuccess;
}

// --- what nvcc's generated code calls ---

void** __cudaRegisterFatBinary(void* wrapper) {
  struct Wrapper {
    int magic, version;
    const void* data;
  };
  return reinterpret_cast<void**>(const_cast<void*>(static_cast<Wrapper*>(wrapper)->data));
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 1; }

void __cudaRegisterFunction(void** image, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
  state().kernels[host] = {image, name};
}

void __cudaRegisterVar(void** image, char* host, char*, const char* name, int, size_t bytes, int, int) {
  state().variables[host] = {image, name, bytes};
}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, struct CUstream_st* stream) {
  state().configurations.push_back({grid, block, shared, stream});
  return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  auto& stack = state().configurations;
  if (stack.empty()) return remember(cudaErrorMissingConfiguration);
  *grid = stack.back().grid, *block = stack.back().block, *shared = stack.back().shared;
  *static_cast<cudaStream_t*>(stream) = stack.back().stream;
  stack.pop_back();
  return cudaSuccess;
}

cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(function));
  return cudaSuccess;
}

cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared,
                               cudaStream_t) {
  return launch(kernel, grid, block, arguments, shared);
}

// --- launches ---

cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** arguments, size_t shared,
                             cudaStream_t) {
  return launch(function, grid, block, arguments, shared);
}

cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  auto found = state().kernels.find(function);
  if (found == state().kernels.end()) return remember(cudaErrorInvalidDeviceFunction);
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    if (value > 163 * 1024) return remember(cudaErrorInvalidValue);
    found->second.dynamic_shared = std::max(found->second.dynamic_shared, size_t(value));
  }
  return cudaSuccess;
}
cudaError_t cudaFuncSetCacheConfig(const void*, cudaFuncCache) { return cudaSuccess; }

// --- memory ---

cudaError_t cudaMalloc(void** address, size_t bytes) {
  if (!state().callbacks) return remember(cudaErrorNoDevice);
  const size_t rounded = (bytes + 255) / 256 * 256;
  *address = std::aligned_alloc(256, rounded ? rounded : 256);
  if (!*address) return remember(cudaErrorMemoryAllocation);
  std::memset(*address, 0xff, rounded);
  state().allocations[*address] = bytes;
  state().callbacks->memory(*address, bytes, kAllocated);
  return cudaSuccess;
}

cudaError_t cudaFree(void* address) {
  if (!address) return cudaSuccess;
  if (!state().allocations.erase(address)) return remember(cudaErrorInvalidValue);
  if (state().callbacks) state().callbacks->memory(address, 0, kFreed);
  std::free(address);
  return cudaSuccess;
}

cudaError_t cudaMallocAsync(void** address, size_t bytes, cudaStream_t) { return cudaMalloc(address, bytes); }
cudaError_t cudaFreeAsync(void* address, cudaStream_t) { return cudaFree(address); }
cudaError_t cudaMallocHost(void** address, size_t bytes) {
  *address = std::malloc(bytes ? bytes : 1);
  return *address ? cudaSuccess : remember(cudaErrorMemoryAllocation);
}
cudaError_t cudaHostAlloc(void** address, size_t bytes, unsigned) { return cudaMallocHost(address, bytes); }
cudaError_t cudaFreeHost(void* address) { return std::free(address), cudaSuccess; }

cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  if (bytes) std::memmove(to, from, bytes);
  return written(to, bytes);
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t) {
  return cudaMemcpy(to, from, bytes, kind);
}
cudaError_t cudaMemcpy2D(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width, size_t height,
                         cudaMemcpyKind) {
  for (size_t row = 0; row < height; ++row)
    cudaMemcpy(static_cast<char*>(to) + row * to_pitch, static_cast<const char*>(from) + row * from_pitch, width,
               cudaMemcpyDefault);
  return cudaSuccess;
}
cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width,
                              size_t height, cudaMemcpyKind kind, cudaStream_t) {
  return cudaMemcpy2D(to, to_pitch, from, from_pitch, width, height, kind);
}
cudaError_t cudaMemset(void* to, int value, size_t bytes) {
  if (bytes) std::memset(to, value, bytes);
  return written(to, bytes);
}
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) { return cudaMemset(to, value, bytes); }

cudaError_t cudaGetSymbolAddress(void** address, const void* symbol) {
  *address = symbol_address(symbol);
  return *address ? cudaSuccess : remember(cudaErrorInvalidSymbol);
}
cudaError_t cudaMemcpyToSymbol(const void* symbol, const void* from, size_t bytes, size_t offset, cudaMemcpyKind) {
  char* to = symbol_address(symbol);
  if (!to || offset + bytes > state().variables[symbol].bytes) return remember(cudaErrorInvalidSymbol);
  return std::memcpy(to + offset, from, bytes), cudaSuccess;
}
cudaError_t cudaMemcpyToSymbolAsync(const void* symbol, const void* from, size_t bytes, size_t offset,
                                    cudaMemcpyKind kind, cudaStream_t) {
  return cudaMemcpyToSymbol(symbol, from, bytes, offset, kind);
}
cudaError_t cudaMemcpyFromSymbol(void* to, const void* symbol, size_t bytes, size_t offset, cudaMemcpyKind) {
  const char* from = symbol_address(symbol);
  if (!from || offset + bytes > state().variables[symbol].bytes) return remember(cudaErrorInvalidSymbol);
  return std::memcpy(to, from + offset, bytes), cudaSuccess;
}

// --- streams and events: everything has happened when it returns. There is no cudaEventElapsedTime: there is no time.

cudaError_t cudaStreamCreate(cudaStream_t* stream) { return *stream = nullptr, cudaSuccess; }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) { return *stream = nullptr, cudaSuccess; }
cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t) { return state().last; }
cudaError_t cudaStreamQuery(cudaStream_t) { return state().last; }
cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) { return cudaSuccess; }
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  return *status = cudaStreamCaptureStatusNone, cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t* event) { return *event = nullptr, cudaSuccess; }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) { return *event = nullptr, cudaSuccess; }
cudaError_t cudaEventDestroy(cudaEvent_t) { return cudaSuccess; }
cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) { return cudaSuccess; }
cudaError_t cudaEventSynchronize(cudaEvent_t) { return state().last; }
cudaError_t cudaEventQuery(cudaEvent_t) { return state().last; }

// --- the device: the smallest of the A100 class that the machine stands for ---

cudaError_t cudaDeviceSynchronize() { return state().last; }
cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaSetDevice(int device) { return device ? remember(cudaErrorInvalidDevice) : cudaSuccess; }
cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
cudaError_t cudaDriverGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int) {
  std::memset(static_cast<void*>(p), 0, sizeof *p);
  std::strcpy(p->name, "gpt2fast PTX machine (sm_80)");
  p->major = 8, p->minor = 0, p->warpSize = 32, p->multiProcessorCount = 108;
  p->maxThreadsPerBlock = 1024, p->maxThreadsPerMultiProcessor = 2048, p->maxBlocksPerMultiProcessor = 32;
  p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024, p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = 2147483647, p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->regsPerBlock = p->regsPerMultiprocessor = 65536, p->totalConstMem = 65536, p->l2CacheSize = 40 << 20;
  p->sharedMemPerBlock = 48 << 10, p->sharedMemPerBlockOptin = 163 << 10, p->sharedMemPerMultiprocessor = 164 << 10;
  p->totalGlobalMem = size_t{40} << 30, p->reservedSharedMemPerBlock = 1024, p->unifiedAddressing = 1;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  cudaDeviceProp p;
  cudaGetDeviceProperties(&p, device);
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor:
      *value = p.major;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = p.minor;
      break;
    case cudaDevAttrMultiProcessorCount:
      *value = p.multiProcessorCount;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *value = int(p.sharedMemPerBlock);
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = int(p.sharedMemPerBlockOptin);
      break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = int(p.sharedMemPerMultiprocessor);
      break;
    case cudaDevAttrMaxThreadsPerBlock:
      *value = p.maxThreadsPerBlock;
      break;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      *value = p.maxThreadsPerMultiProcessor;
      break;
    case cudaDevAttrMaxGridDimX:
      *value = p.maxGridSize[0];
      break;
    case cudaDevAttrMaxRegistersPerMultiprocessor:
      *value = p.regsPerMultiprocessor;
      break;
    case cudaDevAttrWarpSize:
      *value = p.warpSize;
      break;
    case cudaDevAttrL2CacheSize:
      *value = p.l2CacheSize;
      break;
    default:
      return remember(cudaErrorInvalidValue);
  }
  return cudaSuccess;
}

cudaError_t cudaGetLastError() {
  const cudaError_t error = state().last;
  return state().last = cudaSuccess, error;
}
cudaError_t cudaPeekAtLastError() { return state().last; }
const char* cudaGetErrorName(cudaError_t error) { return error == cudaSuccess ? "cudaSuccess" : "cudaError"; }

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorNoDevice:
      return "no PTX machine is running: launch inside `with ptx.machine():`";
    case cudaErrorInvalidDeviceFunction:
      return "a kernel that was not registered with this library";
    case cudaErrorLaunchFailure:
      return "the launch failed on the PTX machine: its report says why";
    case cudaErrorInvalidSymbol:
      return "not a device variable of this library, or out of its bounds";
    case cudaErrorInvalidValue:
      return "a value that the PTX machine's device does not have";
    default:
      return "an error of the stand-in CUDA runtime";
  }
}

}  // extern "C"

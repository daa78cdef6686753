// The CUDA runtime that `nvcc -cudart none` code is linked with on the PTX machine: launches and memory go to
// callbacks. Linked hidden into each library, so that a real libcudart in the same process is never mixed with it.
// Device memory is host memory, every stream runs at once, and a call that is missing here is an undefined symbol when
// linking.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace {

enum MemoryEvent : int { kFreed, kAllocated, kManaged, kHost };
enum Attribute { kRegisters, kStack, kShared, kThreads, kBlocks, kAttributes };

struct Callbacks {
  // 0, or -1 after an error that the caller keeps. `image` is the fat binary that holds `kernel`, `allowed` the dynamic
  // shared memory that it may take as its attributes stand.
  int (*launch)(const void* image, const char* kernel, const unsigned* grid, const unsigned* block, size_t shared,
                size_t allowed, void** arguments);
  void (*memory)(void* address, size_t bytes, MemoryEvent event);
  void* (*variable)(const void* image, const char* name, size_t bytes);
  // Whether `call` may copy `bytes` of `from` to `to`, or fill `to` where there is no `from`; what is copied from
  // memory that nothing wrote does not count as written. 0, or -1 after an error that the caller keeps.
  int (*copy)(const char* call, void* to, const void* from, size_t bytes, int kind, int has_from);
  int (*attributes)(const void* image, const char* kernel, int threads, size_t shared, int* found);
  int (*is_device)(const void* address);
  const char* pending;  // what went wrong and Python has not raised yet: printed where host code exits before
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

struct Allocation {
  size_t bytes;
  MemoryEvent kind;
};

// Function-local: registration runs in other files' static constructors.
struct State {
  std::unordered_map<const void*, Symbol> kernels, variables;
  std::map<const char*, Allocation> allocations;
  std::vector<Configuration> configurations;
  Callbacks* callbacks = nullptr;
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

cudaError_t kernel_attributes(const void* function, int threads, size_t shared, int* found) {
  State& s = state();
  if (!s.callbacks) return remember(cudaErrorNoDevice);
  auto kernel = s.kernels.find(function);
  if (kernel == s.kernels.end()) return remember(cudaErrorInvalidDeviceFunction);
  const Symbol& k = kernel->second;
  return remember(s.callbacks->attributes(k.image, k.name.c_str(), threads, shared, found) ? cudaErrorUnknown
                                                                                           : cudaSuccess);
}

char* symbol_address(const void* symbol) {
  State& s = state();
  auto found = s.variables.find(symbol);
  if (!s.callbacks || found == s.variables.end()) return nullptr;
  const Symbol& v = found->second;
  return static_cast<char*>(s.callbacks->variable(v.image, v.name.c_str(), v.bytes));
}

// Runs where host code calls exit(): Python never gets to raise the error then.
void report_pending() {
  Callbacks* c = state().callbacks;
  if (!c || !c->pending) return;
  std::fprintf(stderr, "%s\n", c->pending);
  c->pending = nullptr;
}

}  // namespace

extern "C" {

__attribute__((visibility("default"))) void gpt2fast_ptx_connect(Callbacks* callbacks) {
  if (!state().callbacks) std::atexit(report_pending);
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

// Clusters and cooperative grids are no part of sm_80 or of the machine, so that their attributes are refused.
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void** arguments) {
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const cudaLaunchAttribute& a = config->attrs[i];
    const auto& cluster = a.val.clusterDim;
    const bool clustered =
        a.id == cudaLaunchAttributeClusterDimension && (cluster.x > 1 || cluster.y > 1 || cluster.z > 1);
    if (clustered || (a.id == cudaLaunchAttributeCooperative && a.val.cooperative))
      return remember(cudaErrorNotSupported);
  }
  return launch(function, config->gridDim, config->blockDim, arguments, config->dynamicSmemBytes);
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

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* function) {
  int found[kAttributes] = {};
  if (cudaError_t error = kernel_attributes(function, 0, 0, found)) return error;
  std::memset(static_cast<void*>(attributes), 0, sizeof *attributes);
  attributes->numRegs = found[kRegisters], attributes->localSizeBytes = found[kStack];
  attributes->sharedSizeBytes = found[kShared], attributes->maxThreadsPerBlock = found[kThreads];
  attributes->maxDynamicSharedSizeBytes = int(state().kernels[function].dynamic_shared);
  attributes->binaryVersion = attributes->ptxVersion = 80;
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void* function, int threads,
                                                                   size_t shared, unsigned) {
  int found[kAttributes] = {};
  if (threads < 1) return remember(cudaErrorInvalidValue);
  if (cudaError_t error = kernel_attributes(function, threads, shared, found)) return error;
  return *blocks = found[kBlocks], cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* function, int threads,
                                                          size_t shared) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, function, threads, shared, 0);
}

}  // extern "C"

// One translation unit, so that an extension of any build links one file.
#include "runtime_device.cpp"
#include "runtime_memory.cpp"

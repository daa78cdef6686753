// The device of runtime.cpp, which includes this file: streams, events, properties, errors.

extern "C" {

// --- streams and events: everything has happened when it returns, and no time passes between two events ---

cudaError_t cudaStreamCreate(cudaStream_t* stream) { return *stream = nullptr, cudaSuccess; }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) { return *stream = nullptr, cudaSuccess; }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int) { return *stream = nullptr, cudaSuccess; }
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) { return *least = *greatest = 0, cudaSuccess; }
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
cudaError_t cudaEventRecordWithFlags(cudaEvent_t, cudaStream_t, unsigned) { return cudaSuccess; }
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t, cudaEvent_t) {
  return *milliseconds = 0, cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t) { return state().last; }
cudaError_t cudaEventQuery(cudaEvent_t) { return state().last; }

// --- the device: the smallest of the A100 class that the machine stands for ---

cudaError_t cudaDeviceSynchronize() { return state().last; }
cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaDeviceReset() { return cudaSuccess; }
cudaError_t cudaDeviceSetCacheConfig(cudaFuncCache) { return cudaSuccess; }
cudaError_t cudaSetDevice(int device) { return device ? remember(cudaErrorInvalidDevice) : cudaSuccess; }
cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
cudaError_t cudaDriverGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int device) {
  if (device) return remember(cudaErrorInvalidDevice);
  std::memset(static_cast<void*>(p), 0, sizeof *p);
  std::strcpy(p->name, "gpt2fast PTX machine (sm_80)");
  p->major = 8, p->minor = 0, p->warpSize = 32, p->multiProcessorCount = 108;
  p->maxThreadsPerBlock = 1024, p->maxThreadsPerMultiProcessor = 2048, p->maxBlocksPerMultiProcessor = 32;
  p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024, p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = 2147483647, p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->regsPerBlock = p->regsPerMultiprocessor = 65536, p->totalConstMem = 65536, p->l2CacheSize = 40 << 20;
  p->sharedMemPerBlock = 48 << 10, p->sharedMemPerBlockOptin = 163 << 10, p->sharedMemPerMultiprocessor = 164 << 10;
  p->totalGlobalMem = size_t{40} << 30, p->reservedSharedMemPerBlock = 1024, p->unifiedAddressing = 1;
  p->managedMemory = p->canMapHostMemory = 1, p->memoryBusWidth = 5120;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  cudaDeviceProp p;
  if (cudaError_t error = cudaGetDeviceProperties(&p, device)) return error;
  const std::pair<cudaDeviceAttr, int> known[] = {
      {cudaDevAttrComputeCapabilityMajor, int(p.major)},
      {cudaDevAttrComputeCapabilityMinor, int(p.minor)},
      {cudaDevAttrMultiProcessorCount, int(p.multiProcessorCount)},
      {cudaDevAttrMaxSharedMemoryPerBlock, int(p.sharedMemPerBlock)},
      {cudaDevAttrMaxSharedMemoryPerBlockOptin, int(p.sharedMemPerBlockOptin)},
      {cudaDevAttrMaxSharedMemoryPerMultiprocessor, int(p.sharedMemPerMultiprocessor)},
      {cudaDevAttrReservedSharedMemoryPerBlock, int(p.reservedSharedMemPerBlock)},
      {cudaDevAttrMaxThreadsPerBlock, int(p.maxThreadsPerBlock)},
      {cudaDevAttrMaxThreadsPerMultiProcessor, int(p.maxThreadsPerMultiProcessor)},
      {cudaDevAttrMaxBlocksPerMultiprocessor, int(p.maxBlocksPerMultiProcessor)},
      {cudaDevAttrMaxBlockDimX, int(p.maxThreadsDim[0])},
      {cudaDevAttrMaxBlockDimY, int(p.maxThreadsDim[1])},
      {cudaDevAttrMaxBlockDimZ, int(p.maxThreadsDim[2])},
      {cudaDevAttrMaxGridDimX, int(p.maxGridSize[0])},
      {cudaDevAttrMaxGridDimY, int(p.maxGridSize[1])},
      {cudaDevAttrMaxGridDimZ, int(p.maxGridSize[2])},
      {cudaDevAttrMaxRegistersPerBlock, int(p.regsPerBlock)},
      {cudaDevAttrMaxRegistersPerMultiprocessor, int(p.regsPerMultiprocessor)},
      {cudaDevAttrWarpSize, int(p.warpSize)},
      {cudaDevAttrL2CacheSize, int(p.l2CacheSize)},
      {cudaDevAttrTotalConstantMemory, int(p.totalConstMem)},
      {cudaDevAttrUnifiedAddressing, int(p.unifiedAddressing)},
      {cudaDevAttrManagedMemory, int(p.managedMemory)},
      {cudaDevAttrConcurrentKernels, int(p.concurrentKernels)},
      {cudaDevAttrGlobalMemoryBusWidth, int(p.memoryBusWidth)},
      {cudaDevAttrCanMapHostMemory, int(p.canMapHostMemory)},
      {cudaDevAttrCooperativeLaunch, int(p.cooperativeLaunch)},
  };
  for (const auto& [name, number] : known)
    if (name == attribute) return *value = number, cudaSuccess;
  return remember(cudaErrorInvalidValue);
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
      return "a value, or a range of memory, that the PTX machine's device does not have";
    case cudaErrorNotSupported:
      return "the PTX machine has no clusters and no cooperative grids";
    default:
      return "an error of the stand-in CUDA runtime";
  }
}

}  // extern "C"

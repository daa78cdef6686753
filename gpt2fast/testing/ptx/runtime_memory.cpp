// The memory of runtime.cpp, which includes this file: allocations, copies that are checked, device variables.

namespace {

cudaError_t allocate(void** address, size_t bytes, MemoryEvent kind) {
  State& s = state();
  if (!s.callbacks) return remember(cudaErrorNoDevice);
  const size_t rounded = (bytes + 255) / 256 * 256;
  *address = std::aligned_alloc(256, rounded ? rounded : 256);
  if (!*address) return remember(cudaErrorMemoryAllocation);
  std::memset(*address, 0xff, rounded);
  s.allocations[static_cast<char*>(*address)] = {bytes, kind};
  s.callbacks->memory(*address, bytes, kind);
  return cudaSuccess;
}

cudaError_t copy(const char* call, void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  if (!bytes) return cudaSuccess;
  if (!state().callbacks) return remember(cudaErrorNoDevice);
  if (state().callbacks->copy(call, to, from, bytes, kind, 1)) return remember(cudaErrorInvalidValue);
  return std::memmove(to, from, bytes), cudaSuccess;
}

cudaError_t fill(const char* call, void* to, int value, size_t bytes) {
  if (!bytes) return cudaSuccess;
  if (!state().callbacks) return remember(cudaErrorNoDevice);
  if (state().callbacks->copy(call, to, nullptr, bytes, cudaMemcpyHostToDevice, 0))
    return remember(cudaErrorInvalidValue);
  return std::memset(to, value, bytes), cudaSuccess;
}

}  // namespace

extern "C" {

cudaError_t cudaMalloc(void** address, size_t bytes) { return allocate(address, bytes, kAllocated); }
cudaError_t cudaMallocAsync(void** address, size_t bytes, cudaStream_t) { return allocate(address, bytes, kAllocated); }
cudaError_t cudaMallocManaged(void** address, size_t bytes, unsigned) { return allocate(address, bytes, kManaged); }
cudaError_t cudaMallocHost(void** address, size_t bytes) { return allocate(address, bytes, kHost); }
cudaError_t cudaHostAlloc(void** address, size_t bytes, unsigned) { return allocate(address, bytes, kHost); }
cudaError_t cudaMallocPitch(void** address, size_t* pitch, size_t width, size_t height) {
  *pitch = (width + 511) / 512 * 512;
  return allocate(address, *pitch * height, kAllocated);
}

cudaError_t cudaFree(void* address) {
  if (!address) return cudaSuccess;
  if (!state().allocations.erase(static_cast<char*>(address))) return remember(cudaErrorInvalidValue);
  if (state().callbacks) state().callbacks->memory(address, 0, kFreed);
  std::free(address);
  return cudaSuccess;
}
cudaError_t cudaFreeAsync(void* address, cudaStream_t) { return cudaFree(address); }
cudaError_t cudaFreeHost(void* address) { return cudaFree(address); }
cudaError_t cudaHostGetDevicePointer(void** device, void* host, unsigned) { return *device = host, cudaSuccess; }
cudaError_t cudaMemGetInfo(size_t* free, size_t* total) { return *free = *total = size_t{40} << 30, cudaSuccess; }

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* address) {
  State& s = state();
  std::memset(static_cast<void*>(attributes), 0, sizeof *attributes);
  attributes->device = -2, attributes->type = cudaMemoryTypeUnregistered;
  attributes->hostPointer = const_cast<void*>(address);
  MemoryEvent kind = kFreed;
  auto after = s.allocations.upper_bound(static_cast<const char*>(address));
  if (after != s.allocations.begin()) {
    const auto& [start, allocation] = *std::prev(after);
    if (static_cast<const char*>(address) < start + allocation.bytes) kind = allocation.kind;
  }
  if (kind == kFreed && s.callbacks && s.callbacks->is_device(address)) kind = kAllocated;
  if (kind == kFreed) return cudaSuccess;
  attributes->type = kind == kHost      ? cudaMemoryTypeHost
                     : kind == kManaged ? cudaMemoryTypeManaged
                                        : cudaMemoryTypeDevice;
  attributes->device = 0, attributes->devicePointer = const_cast<void*>(address);
  if (kind == kAllocated) attributes->hostPointer = nullptr;
  return cudaSuccess;
}

cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  return copy("cudaMemcpy", to, from, bytes, kind);
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t) {
  return copy("cudaMemcpyAsync", to, from, bytes, kind);
}
cudaError_t cudaMemcpy2D(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width, size_t height,
                         cudaMemcpyKind kind) {
  if (width > to_pitch || width > from_pitch) return remember(cudaErrorInvalidPitchValue);
  for (size_t row = 0; row < height; ++row)
    if (cudaError_t error = copy("cudaMemcpy2D", static_cast<char*>(to) + row * to_pitch,
                                 static_cast<const char*>(from) + row * from_pitch, width, kind))
      return error;
  return cudaSuccess;
}
cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width,
                              size_t height, cudaMemcpyKind kind, cudaStream_t) {
  return cudaMemcpy2D(to, to_pitch, from, from_pitch, width, height, kind);
}
cudaError_t cudaMemset(void* to, int value, size_t bytes) { return fill("cudaMemset", to, value, bytes); }
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  return fill("cudaMemsetAsync", to, value, bytes);
}
cudaError_t cudaMemset2D(void* to, size_t pitch, int value, size_t width, size_t height) {
  if (width > pitch) return remember(cudaErrorInvalidPitchValue);
  for (size_t row = 0; row < height; ++row)
    if (cudaError_t error = fill("cudaMemset2D", static_cast<char*>(to) + row * pitch, value, width)) return error;
  return cudaSuccess;
}
cudaError_t cudaMemset2DAsync(void* to, size_t pitch, int value, size_t width, size_t height, cudaStream_t) {
  return cudaMemset2D(to, pitch, value, width, height);
}

// --- device variables ---

cudaError_t cudaGetSymbolAddress(void** address, const void* symbol) {
  *address = symbol_address(symbol);
  return *address ? cudaSuccess : remember(cudaErrorInvalidSymbol);
}
cudaError_t cudaMemcpyToSymbol(const void* symbol, const void* from, size_t bytes, size_t offset, cudaMemcpyKind) {
  char* to = symbol_address(symbol);
  if (!to || offset + bytes > state().variables[symbol].bytes) return remember(cudaErrorInvalidSymbol);
  return copy("cudaMemcpyToSymbol", to + offset, from, bytes, cudaMemcpyHostToDevice);
}
cudaError_t cudaMemcpyToSymbolAsync(const void* symbol, const void* from, size_t bytes, size_t offset,
                                    cudaMemcpyKind kind, cudaStream_t) {
  return cudaMemcpyToSymbol(symbol, from, bytes, offset, kind);
}
cudaError_t cudaMemcpyFromSymbol(void* to, const void* symbol, size_t bytes, size_t offset, cudaMemcpyKind) {
  const char* from = symbol_address(symbol);
  if (!from || offset + bytes > state().variables[symbol].bytes) return remember(cudaErrorInvalidSymbol);
  return copy("cudaMemcpyFromSymbol", to, from + offset, bytes, cudaMemcpyDeviceToHost);
}
cudaError_t cudaMemcpyFromSymbolAsync(void* to, const void* symbol, size_t bytes, size_t offset, cudaMemcpyKind kind,
                                      cudaStream_t) {
  return cudaMemcpyFromSymbol(to, symbol, bytes, offset, kind);
}
cudaError_t cudaGetSymbolSize(size_t* bytes, const void* symbol) {
  auto found = state().variables.find(symbol);
  if (found == state().variables.end()) return remember(cudaErrorInvalidSymbol);
  return *bytes = found->second.bytes, cudaSuccess;
}

}  // extern "C"

// What callers without C++ need beside the kernels.
#include <cuda_runtime.h>

// What an error that a launcher returned means.
extern "C" const char* gpt2fast_error_string(int status) { return cudaGetErrorString(cudaError_t(status)); }

// What callers need besides the kernels if they do not use C++.
#include <cuda_runtime.h>

// The text for an error that a launcher returned.
extern "C" const char* gpt2fast_error_string(int status) { return cudaGetErrorString(cudaError_t(status)); }

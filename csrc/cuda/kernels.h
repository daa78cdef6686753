// The CUDA kernels as C++ offers them: a launcher an op, which takes the op's struct of ops.h and a stream.
//
// Pointers are the device's. A launcher only launches: it neither allocates nor waits, so that a CUDA graph may capture
// it. cudaErrorInvalidValue: it does not cover these sizes, and nothing was launched.
#pragma once
#include <cuda_runtime.h>

#include "../ops.h"

namespace gpt2fast::cuda {

constexpr int64_t kLongestRow = 16384;  // columns of layer_norm and layer_norm_backward
constexpr int64_t kSegmentRows = 256;   // sorted rows of embedding_backward that take two of its parts
constexpr int kAdamwNumbers = 2048;     // of a block of adamw_
constexpr int kNormNumbers = 8192;      // and of gradient_norm

cudaError_t adamw_(const AdamwArgs& args, cudaStream_t stream);
cudaError_t attention(const AttentionArgs& args, cudaStream_t stream);
cudaError_t cross_entropy(const CrossEntropyArgs& args, cudaStream_t stream);
cudaError_t cross_entropy_backward(const CrossEntropyBackwardArgs& args, cudaStream_t stream);
cudaError_t cross_entropy_reduce(const CrossEntropyReduceArgs& args, cudaStream_t stream);
cudaError_t embedding(const EmbeddingArgs& args, cudaStream_t stream);
cudaError_t embedding_backward(const EmbeddingBackwardArgs& args, cudaStream_t stream);
cudaError_t gelu(const GeluArgs& args, cudaStream_t stream);
cudaError_t gelu_backward(const GeluBackwardArgs& args, cudaStream_t stream);
cudaError_t gradient_norm(const GradientNormArgs& args, cudaStream_t stream);
cudaError_t layer_norm(const LayerNormArgs& args, cudaStream_t stream);
cudaError_t layer_norm_backward(const LayerNormBackwardArgs& args, cudaStream_t stream);

}  // namespace gpt2fast::cuda

// The C++ interface of the CUDA kernels: one launcher for each op. It takes the op's struct from ops.h and a stream.
//
// All pointers are device pointers. A launcher only launches: it neither allocates nor waits, so that a CUDA graph may
// capture it. It returns cudaErrorInvalidValue, without launching, if it does not cover the sizes.
#pragma once
#include <cuda_runtime.h>

#include "../ops.h"

namespace gpt2fast::cuda {

constexpr int64_t kLongestRow = 16384;  // the most columns of layer_norm and layer_norm_backward
constexpr int64_t kSegmentRows = 256;   // sorted rows of a segment of embedding_backward; it has two parts
constexpr int kAdamwNumbers = 2048;     // numbers that a block of adamw_ has
constexpr int kNormNumbers = 8192;      // numbers that a block of gradient_norm has
constexpr int kSplitKeys = 64;          // keys that a block of decode_attention has
constexpr int kMostNewTokens = 8;       // the most new tokens of decode_attention

// Where decode_attention finds the keys of a paged cache. k and v are (pages, page_size, H, D). Position p of row b is
// entry p % page_size of page table[b][p / page_size]. S is the number of positions that a row of the table covers.
struct PageTable {
  const void* table;  // int32, or int64 if `wide`; null if the cache has no pages
  int64_t stride_b;
  int64_t page_size;  // a power of two
  bool wide;
};

// Workspace of sample; its rows are `stride_b` numbers apart. `changed` is needed if there are tokens and
// repetition_penalty is not 1, the others if there is a top_k or a top_p. share is 1 - top_p in double precision.
struct SampleSpace {
  float *changed, *scores, *shorter;  // (B, V) each, and 15 numbers more
  int32_t* ids;                       // the same size as scores
  int64_t stride_b;
  double share;
};

cudaError_t adamw_(const AdamwArgs& args, cudaStream_t stream);
cudaError_t attention(const AttentionArgs& args, cudaStream_t stream);
cudaError_t attention_backward(const AttentionBackwardArgs& args, cudaStream_t stream);
cudaError_t cross_entropy(const CrossEntropyArgs& args, cudaStream_t stream);
cudaError_t cross_entropy_backward(const CrossEntropyBackwardArgs& args, cudaStream_t stream);
cudaError_t cross_entropy_reduce(const CrossEntropyReduceArgs& args, cudaStream_t stream);
// parts: workspace of D + 2 floats for each query, each head and each kSplitKeys of S. It may be null if S is at most
// kSplitKeys.
cudaError_t decode_attention(const DecodeAttentionArgs& args, float* parts, const PageTable& pages,
                             cudaStream_t stream);
cudaError_t embedding(const EmbeddingArgs& args, cudaStream_t stream);
cudaError_t embedding_backward(const EmbeddingBackwardArgs& args, cudaStream_t stream);
cudaError_t gelu(const GeluArgs& args, cudaStream_t stream);
cudaError_t gelu_backward(const GeluBackwardArgs& args, cudaStream_t stream);
cudaError_t gradient_norm(const GradientNormArgs& args, cudaStream_t stream);
cudaError_t layer_norm(const LayerNormArgs& args, cudaStream_t stream);
cudaError_t layer_norm_backward(const LayerNormBackwardArgs& args, cudaStream_t stream);
cudaError_t linear_cross_entropy(const LinearCrossEntropyArgs& args, cudaStream_t stream);  // between its products
cudaError_t product(const ProductArgs& args, cudaStream_t stream);  // for linear, linear_backward and mlp_backward
cudaError_t sample(const SampleArgs& args, const SampleSpace& space, cudaStream_t stream);

}  // namespace gpt2fast::cuda

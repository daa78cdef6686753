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
constexpr int kSplitKeys = 64;          // of a block of decode_attention
constexpr int kMostNewTokens = 8;       // of decode_attention

// Where decode_attention finds the keys of a cache in pages. Position p of row b is number p % page_size of the page
// table[b][p / page_size]; k and v are (pages, page_size, H, D), and S is the positions that a row of the table covers.
struct PageTable {
  const void* table;  // int32, or int64 where `wide`; null: there are no pages
  int64_t stride_b;
  int64_t page_size;  // a power of two
  bool wide;
};

// Workspace of sample, rows of it `stride_b` apart: changed where there are tokens and repetition_penalty is not 1, the
// others where there is a top_k or a top_p. share is 1 - top_p before it is rounded to float.
struct SampleSpace {
  float *changed, *scores, *shorter;  // (B, V) each, and 15 numbers more
  int32_t* ids;                       // as scores
  int64_t stride_b;
  double share;
};

cudaError_t adamw_(const AdamwArgs& args, cudaStream_t stream);
cudaError_t attention(const AttentionArgs& args, cudaStream_t stream);
cudaError_t attention_backward(const AttentionBackwardArgs& args, cudaStream_t stream);
cudaError_t cross_entropy(const CrossEntropyArgs& args, cudaStream_t stream);
cudaError_t cross_entropy_backward(const CrossEntropyBackwardArgs& args, cudaStream_t stream);
cudaError_t cross_entropy_reduce(const CrossEntropyReduceArgs& args, cudaStream_t stream);
// parts: workspace of (D + 2) floats for each query of each head and each kSplitKeys of S; null where S is no more.
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
cudaError_t product(const ProductArgs& args, cudaStream_t stream);  // linear, linear_backward and mlp_backward
cudaError_t sample(const SampleArgs& args, const SampleSpace& space, cudaStream_t stream);

}  // namespace gpt2fast::cuda

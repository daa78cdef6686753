// out = activation(a @ b + bias) + residual for matrices of any strides: linear layers and their gradients.
// a is (M, K), b is (K, N) and out is (M, N). gpt2fast/products.py says which strides make which gradient.
//
// A block computes one tile of out and loops along k, the axis that the product sums over. In each step, tiles of a and
// b are copied to shared memory, and each warp multiplies its part of them on tensor cores. In 16 bits, the tiles of
// the next steps are copied while one is multiplied. Bias, activation and residual are applied in float32, before out
// is rounded once. For dweight, the blocks of the first row or column of tiles also add up dy, which they read anyway:
// that is dbias.
//
// The floor is 2 M K N operations where there are many rows, and reading the weight once where there are few. Each tile
// asks for its rows of a and its columns of b again, mostly from the L2 cache. docs/kernels.md counts the bytes and
// products; docs/how/linear.md explains the counts.
#include <type_traits>

#include "kernels.h"
#include "linear.cuh"

namespace gpt2fast::cuda {
namespace {

constexpr int kTogether = 8;  // neighbouring blocks take 8 rows of tiles together, so that columns of b stay in L2
constexpr int kFewRows = 16, kMiddleRows = 512;  // products with up to so many rows of out have smaller tiles

// Which numbers are neighbours in memory: those of a row or of a column of a, and then those of a row or of a column of
// b. kAny is for all other strides and alignments: numbers are copied one by one.
enum class Layout { kRowsRows, kRowsColumns, kColumnsRows, kAny };

// A tile has kTileM rows and kTileN columns of out and takes kTileK numbers along k in a step. kWarpsM x kWarpsN warps
// share it. Tiles of kAllStages steps are in shared memory at a time. kMinBlocks blocks must fit on a multiprocessor,
// which limits the registers.
template <int kTileM, int kTileN, int kTileK, int kWarpsM, int kWarpsN, int kAllStages, int kMinBlocks>
struct Shape {
  static constexpr int kM = kTileM, kN = kTileN, kK = kTileK, kDown = kWarpsM, kAcross = kWarpsN;
  static constexpr int kStages = kAllStages, kBlocks = kMinBlocks;
  static constexpr int kWarps = kDown * kAcross, kThreads = kWarps * kWarp;
};
using Large = Shape<128, 128, 32, 2, 2, 3, 2>;
using Middle = Shape<64, 64, 64, 2, 2, 3, 3>;
using Few = Shape<16, 64, 64, 1, 2, 4, 4>;
using WideMiddle = Shape<64, 64, 32, 2, 2, 1, 3>;  // Wide: for float32
using WideFew = Shape<16, 64, 32, 1, 2, 1, 4>;

template <class T, Layout kLayout, class S>
struct Sizes {
  static constexpr bool kSingly = kLayout == Layout::kAny;
  static constexpr bool kGradient = kSingly || kLayout == Layout::kColumnsRows;  // ProductArgs::sums may be given
  using A = Operand<T, !kGradient, S::kM, S::kK>;
  using B = Operand<T, kLayout == Layout::kRowsColumns, S::kN, S::kK>;
  static constexpr int kStages = kSingly ? 1 : S::kStages;
  static constexpr int kStageBytes = A::kBytes + B::kBytes;
  static constexpr int kWarpM = S::kM / S::kDown, kWarpN = S::kN / S::kAcross;  // a warp's part of the tile of out
  // The scratch holds 16 rows of a warp's part in float32. They go from the lanes that have computed them to the lanes
  // that write them. A row has 8 more numbers than needed, so that 8 numbers of each of 4 rows touch all 32 banks.
  static constexpr int kScratchRow = kWarpN + 8;
  static constexpr int kScratchBytes = S::kWarps * kMma * kScratchRow * sizeof(float);
  static constexpr int kTileBytes = kStages * kStageBytes;
  static constexpr int kSharedBytes = kTileBytes > kScratchBytes ? kTileBytes : kScratchBytes;
  static_assert(kSharedBytes <= kMostShared);
};

// down and across: the rows and columns of tiles of out. whole: the rows of out, and of all tensors of the same width,
// can be accessed 16 bytes at a time.
template <class T, Layout kLayout, class S>
__global__ void __launch_bounds__(S::kThreads, S::kBlocks)
    product_kernel(ProductArgs p, int64_t down, int64_t across, bool whole) {
  using Size = Sizes<T, kLayout, S>;
  using A = typename Size::A;
  using B = typename Size::B;
  constexpr int kStages = Size::kStages, kWarpM = Size::kWarpM, kWarpN = Size::kWarpN, kThreads = S::kThreads;
  extern __shared__ __align__(128) uint16_t memory[];
  const uint32_t shared = uint32_t(__cvta_generic_to_shared(memory));
  const auto tile_a = [&](int stage) { return A{shared + stage * Size::kStageBytes}; };
  const auto tile_b = [&](int stage) { return B{tile_a(stage).start + A::kBytes}; };

  const int64_t first = blockIdx.x / (kTogether * across) * kTogether, inner = blockIdx.x % (kTogether * across);
  const int64_t rows = min(down - first, int64_t(kTogether));
  const int64_t m = (first + inner % rows) * S::kM, n = inner / rows * S::kN;
  const int rows_left = int(min(p.M - m, int64_t(S::kM))), columns_left = int(min(p.N - n, int64_t(S::kN)));
  const T* a = static_cast<const T*>(p.a) + m * p.stride_a_m;
  const T* b = static_cast<const T*>(p.b) + n * p.stride_b_n;
  const auto copy = [&](int stage, int64_t k) {
    const int left = int(min(p.K - k, int64_t(S::kK)));
    const T *from_a = a + k * p.stride_a_k, *from_b = b + k * p.stride_b_k;
    if constexpr (Size::kSingly) {
      tile_a(stage).template copy_singly<kThreads>(from_a, p.stride_a_m, p.stride_a_k, rows_left, left);
      tile_b(stage).template copy_singly<kThreads>(from_b, p.stride_b_n, p.stride_b_k, columns_left, left);
    } else {
      tile_a(stage).template copy<kThreads>(from_a, Size::kGradient ? p.stride_a_k : p.stride_a_m, rows_left, left);
      tile_b(stage).template copy<kThreads>(from_b, kLayout == Layout::kRowsColumns ? p.stride_b_n : p.stride_b_k,
                                            columns_left, left);
    }
  };

  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  const int warp_m = warp / S::kAcross * kWarpM, warp_n = warp % S::kAcross * kWarpN;
  const bool adds_up = p.sums && (p.sums_of_a ? n == 0 : m == 0);
  float sum = 0;  // the sum of the thread's row of a, or of its column of b
  float out[kWarpM / kMma][kWarpN / kHalf][4] = {};
  if constexpr (kStages > 1) {
#pragma unroll
    for (int stage = 0; stage < kStages - 1; ++stage) {
      if (stage * S::kK < p.K) copy(stage, stage * S::kK);
      end_group_of_copies();
    }
  }
  int stage = 0;
  for (int64_t k = 0; k < p.K; k += S::kK) {
    if constexpr (kStages > 1) {
      wait_for_copies_but<kStages - 2>();
      __syncthreads();  // these tiles have arrived, and no warp still reads the tiles before
      const int64_t next = k + (kStages - 1) * S::kK;
      if (next < p.K) copy(stage == 0 ? kStages - 1 : stage - 1, next);
      end_group_of_copies();
    } else {
      __syncthreads();
      copy(0, k);
      __syncthreads();
    }
#pragma unroll
    for (int step = 0; step < S::kK / kMma; ++step) {
      FragmentA<T> of_a[kWarpM / kMma];
#pragma unroll
      for (int i = 0; i < kWarpM / kMma; ++i) tile_a(stage).load_a(of_a[i], warp_m + i * kMma, step);
#pragma unroll
      for (int j = 0; j < kWarpN / kHalf; j += 2) {
        FragmentA<T> of_b;
        tile_b(stage).load_b(of_b, warp_n + j * kHalf, step);
#pragma unroll
        for (int i = 0; i < kWarpM / kMma; ++i) mma<T>(out[i][j], out[i][j + 1], of_a[i], of_b);
      }
    }
    if constexpr (Size::kGradient) {
      static_assert(S::kM <= kThreads && S::kN <= kThreads);
      if (adds_up && p.sums_of_a && threadIdx.x < S::kM) sum += tile_a(stage).sum(threadIdx.x);
      if (adds_up && !p.sums_of_a && threadIdx.x < S::kN) sum += tile_b(stage).sum(threadIdx.x);
    }
    if constexpr (kStages > 1) stage = stage == kStages - 1 ? 0 : stage + 1;
  }
  if (Size::kGradient && adds_up && threadIdx.x < (p.sums_of_a ? rows_left : columns_left))
    static_cast<T*>(p.sums)[(p.sums_of_a ? m : n) + threadIdx.x] = narrow<T>(sum);

  __syncthreads();  // no warp reads tiles any more: their memory becomes scratch
  const uint32_t scratch = shared + warp * kMma * Size::kScratchRow * sizeof(float);
#pragma unroll 1
  for (int part = 0; part < kWarpM / kMma; ++part) {
#pragma unroll
    for (int i = 0; i < kWarpM / kMma; ++i) {
      if (i != part) continue;  // a loop, since registers cannot be indexed at run time
#pragma unroll
      for (int j = 0; j < kWarpN / kHalf; ++j)
#pragma unroll
        for (int r = 0; r < 2; ++r)
          asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(
                           scratch + ((g + 8 * r) * Size::kScratchRow + j * kHalf + 2 * t) * int(sizeof(float))),
                       "f"(out[i][j][2 * r]), "f"(out[i][j][2 * r + 1])
                       : "memory");
    }
    __syncwarp();
    const int64_t row = m + warp_m + part * kMma, column = n + warp_n;
    const auto finish_as = [&](auto tag) {
      using U = decltype(tag);
      if (whole) {
        finish_rows<T, U, kWarpN, Size::kScratchRow, kPack<U>>(p, row, column, scratch);
      } else {
        finish_rows<T, U, kWarpN, Size::kScratchRow, 1>(p, row, column, scratch);
      }
    };
    if (sizeof(T) < sizeof(float) && p.wide) {
      finish_as(float{});
    } else {
      finish_as(T{});
    }
    __syncwarp();
  }
}

template <class T, Layout kLayout, class S>
cudaError_t launch(const ProductArgs& p, cudaStream_t stream) {
  using Size = Sizes<T, kLayout, S>;
  auto* kernel = product_kernel<T, kLayout, S>;
  const int64_t down = (p.M + S::kM - 1) / S::kM, across = (p.N + S::kN - 1) / S::kN;
  if (down > INT32_MAX / across) return cudaErrorInvalidValue;
  const bool whole = packed<T>({p.bias, p.residual, p.out, p.preactivation},
                               {p.N, p.stride_out_m, p.residual ? p.stride_residual_m : 0});
  const cudaError_t status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Size::kSharedBytes);
  if (status != cudaSuccess) return status;
  kernel<<<unsigned(down * across), S::kThreads, Size::kSharedBytes, stream>>>(p, down, across, whole);
  return cudaGetLastError();
}

// Whether a matrix can be copied 16 bytes at a time along its last axis.
template <class T>
bool chunked(const void* from, int64_t columns, int64_t stride, int64_t step) {
  return step == 1 && packed<T>({from}, {columns, stride});
}

template <class T>
cudaError_t launch_fitting(const ProductArgs& p, cudaStream_t stream) {
  constexpr bool kWide = kPlanes<T> > 1;
  using Middling = std::conditional_t<kWide, WideMiddle, Middle>;
  const bool rows_a = chunked<T>(p.a, p.K, p.stride_a_m, p.stride_a_k) && !p.sums;
  const bool columns_a = chunked<T>(p.a, p.M, p.stride_a_k, p.stride_a_m);
  const bool rows_b = chunked<T>(p.b, p.N, p.stride_b_k, p.stride_b_n);
  const bool columns_b = chunked<T>(p.b, p.K, p.stride_b_n, p.stride_b_k);
  const auto by_size = [&](auto layout) {
    constexpr Layout kLayout = decltype(layout)::value;
    if constexpr (kLayout != Layout::kColumnsRows)
      if (p.M <= kFewRows) return launch<T, kLayout, std::conditional_t<kWide, WideFew, Few>>(p, stream);
    if constexpr (!kWide)
      if (p.M > kMiddleRows) return launch<T, kLayout, Large>(p, stream);
    return launch<T, kLayout, Middling>(p, stream);
  };
  if (rows_a && rows_b) return by_size(std::integral_constant<Layout, Layout::kRowsRows>{});
  if (rows_a && columns_b) return by_size(std::integral_constant<Layout, Layout::kRowsColumns>{});
  if (columns_a && rows_b) return by_size(std::integral_constant<Layout, Layout::kColumnsRows>{});
  return launch<T, Layout::kAny, Middling>(p, stream);
}

}  // namespace

cudaError_t product(const ProductArgs& p, cudaStream_t stream) {
  if (p.wide && (p.bias || p.preactivation || p.activation != Activation::kNone)) return cudaErrorInvalidValue;
  if (p.M * p.N == 0) return cudaSuccess;
  cudaError_t status = cudaSuccess;
  with_dtype(p.dtype, [&](auto tag) { status = launch_fitting<typename decltype(tag)::type>(p, stream); });
  return status;
}

}  // namespace gpt2fast::cuda

// The C interface. The arguments are the fields of the struct.
extern "C" int gpt2fast_product(const void* a, const void* b, const void* bias, const void* residual, void* out,
                                void* preactivation, void* sums, int64_t M, int64_t K, int64_t N, int64_t stride_a_m,
                                int64_t stride_a_k, int64_t stride_b_k, int64_t stride_b_n, int64_t stride_residual_m,
                                int64_t stride_out_m, int64_t backward, int64_t sums_of_a, int64_t wide,
                                int64_t activation, int64_t dtype, cudaStream_t stream) {
  using namespace gpt2fast;
  return cuda::product({.a = a,
                        .b = b,
                        .bias = bias,
                        .residual = residual,
                        .out = out,
                        .preactivation = preactivation,
                        .sums = sums,
                        .M = M,
                        .K = K,
                        .N = N,
                        .stride_a_m = stride_a_m,
                        .stride_a_k = stride_a_k,
                        .stride_b_k = stride_b_k,
                        .stride_b_n = stride_b_n,
                        .stride_residual_m = stride_residual_m,
                        .stride_out_m = stride_out_m,
                        .backward = backward != 0,
                        .sums_of_a = sums_of_a != 0,
                        .wide = wide != 0,
                        .activation = Activation(activation),
                        .dtype = DType(dtype)},
                       stream);
}

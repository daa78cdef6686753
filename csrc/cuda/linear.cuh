// Parts of the product kernel in linear.cu: tiles of the operands in shared memory, and the steps after the product.
#pragma once
#include "activation.cuh"
#include "mma.cuh"

namespace gpt2fast::cuda {

// --- Before the product ---

// Bit i is set if i < n: the rows of a tile that exist.
__device__ __forceinline__ uint64_t first_bits(int64_t n) {
  return n >= 64 ? ~uint64_t(0) : n > 0 ? (uint64_t(1) << n) - 1 : 0;
}

// The part of a or b that a block has in one step: kOuter rows of a, or columns of b, with kK numbers of each. kAlongK:
// these kK numbers are neighbours in memory and are a row of a tile. Otherwise a row of the tile has one number of each
// row of a or column of b.
template <class T, bool kAlongK, int kOuter, int kK>
struct Operand {
  static constexpr int kRows = kAlongK ? (kOuter < 64 ? kOuter : 64) : kK;  // rows of a tile, which has at most 64
  using Part = Tile<T, kAlongK ? kK : kOuter, kRows>;
  static constexpr int kParts = kAlongK ? kOuter / kRows : 1;
  static constexpr int kBytes = kParts * Part::kBytes;

  uint32_t start;

  __device__ __forceinline__ Part part(int i) const { return {start + i * Part::kBytes}; }

  // Copies 16 bytes at a time. outer and k are how many exist; the rest of the tile becomes 0.
  template <int kThreads>
  __device__ __forceinline__ void copy(const T* from, int64_t stride, int outer, int k) const {
    if constexpr (kAlongK) {
#pragma unroll
      for (int i = 0; i < kParts; ++i) {
        const int before = i * kRows;
        part(i).template copy<true, kThreads>(from + (before < outer ? before * stride : 0), stride, k,
                                              first_bits(outer - before));
      }
    } else {
      part(0).template copy<true, kThreads>(from, stride, outer, first_bits(k));
    }
  }

  // Copies the numbers one by one, for any strides. Neighbouring threads copy neighbours in memory, if there are any.
  template <int kThreads>
  __device__ __forceinline__ void copy_singly(const T* from, int64_t stride_outer, int64_t stride_k, int outer,
                                              int k) const {
    static_assert(!kAlongK);
    const bool along_k = stride_k == 1;
#pragma unroll 4
    for (int i = threadIdx.x; i < kOuter * kK; i += kThreads) {
      const int row = along_k ? i % kK : i / kOuter, column = along_k ? i / kK : i % kOuter;
      const float x = row < k && column < outer ? widen(from[row * stride_k + column * stride_outer]) : 0;
      Planes<T> word;
      split<T>(x, 0, word);
#pragma unroll
      for (int plane = 0; plane < kPlanes<T>; ++plane)
        asm volatile("st.shared.b16 [%0], %1;" ::"r"(place(row, column, plane)), "h"(uint16_t(word[plane])) : "memory");
    }
  }

  // Loads the rows outer ... outer + 15 of a, with 16 numbers along k of each.
  __device__ __forceinline__ void load_a(FragmentA<T>& to, int outer, int step) const {
    if constexpr (kAlongK) {
      part(outer / kRows).load_a(to, outer % kRows, step);
    } else {
      part(0).load_a_of_columns(to, step * kMma, outer / kMma);
    }
  }

  // Loads the columns outer ... outer + 15 of b, with 16 numbers along k of each.
  __device__ __forceinline__ void load_b(FragmentA<T>& to, int outer, int step) const {
    if constexpr (kAlongK) {
      part(outer / kRows).load_b_of_rows(to, outer % kRows, step);
    } else {
      part(0).load_b(to, step * kMma, outer / kMma);
    }
  }

  // The sum along k of one row of a, or of one column of b.
  __device__ __forceinline__ float sum(int outer) const {
    static_assert(!kAlongK);
    float total = 0;
#pragma unroll 4
    for (int k = 0; k < kK; ++k) {
      float x = 0;  // small planes first, so that the sum is exactly the float32 number
#pragma unroll
      for (int plane = kPlanes<T> - 1; plane >= 0; --plane) {
        uint16_t bits;
        asm volatile("ld.shared.b16 %0, [%1];" : "=h"(bits) : "r"(place(k, outer, plane)) : "memory");
        if constexpr (kPlanes<T> == 1) {
          x = widen(T{bits});
        } else {
          x += widen(bfloat16{bits});
        }
      }
      total += x;
    }
    return total;
  }

 private:
  __device__ __forceinline__ uint32_t place(int row, int column, int plane) const {
    return part(0).at(row, column / kChunk, plane) + column % kChunk * sizeof(uint16_t);
  }
};

// --- After the product ---

template <Activation kForm, int kWidth>
__device__ __forceinline__ void activate_all(float (&x)[kWidth]) {
#pragma unroll
  for (int i = 0; i < kWidth; ++i) x[i] = activate<kForm>(x[i]);
}

template <Activation kForm, int kWidth>
__device__ __forceinline__ void differentiate_all(float (&x)[kWidth], const float (&before)[kWidth]) {
#pragma unroll
  for (int i = 0; i < kWidth; ++i) x[i] *= derivative<kForm>(before[i]);
}

// The steps after the product, for kWidth neighbours of a row of out: bias, activation or its derivative, residual.
template <class T, int kWidth>
__device__ __forceinline__ void finish(const ProductArgs& p, int64_t row, int64_t column, float (&x)[kWidth]) {
  float other[kWidth];
  if (p.bias) {
    load<T, kWidth>(static_cast<const T*>(p.bias) + column, other);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) x[i] += other[i];
  }
  T* preactivation = static_cast<T*>(p.preactivation) + row * p.N + column;
  if (p.backward) {
    load<T, kWidth>(preactivation, other);
    if (p.activation == Activation::kGeluTanh) differentiate_all<Activation::kGeluTanh>(x, other);
    if (p.activation == Activation::kGeluErf) differentiate_all<Activation::kGeluErf>(x, other);
  } else {
    if (p.preactivation) store<T, kWidth>(preactivation, x);
    if (p.activation == Activation::kGeluTanh) activate_all<Activation::kGeluTanh>(x);
    if (p.activation == Activation::kGeluErf) activate_all<Activation::kGeluErf>(x);
  }
  if (p.residual) {
    load<T, kWidth>(static_cast<const T*>(p.residual) + row * p.stride_residual_m + column, other);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) x[i] += other[i];
  }
  store<T, kWidth>(static_cast<T*>(p.out) + row * p.stride_out_m + column, x);
}

// The same if out and residual are float32 (ProductArgs::wide). There is no bias and no activation then.
template <int kWidth>
__device__ __forceinline__ void finish_wide(const ProductArgs& p, int64_t row, int64_t column, float (&x)[kWidth]) {
  if (p.residual) {
    float other[kWidth];
    load<float, kWidth>(static_cast<const float*>(p.residual) + row * p.stride_residual_m + column, other);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) x[i] += other[i];
  }
  store<float, kWidth>(static_cast<float*>(p.out) + row * p.stride_out_m + column, x);
}

// Reads kWidth numbers from the scratch. A lane that needs two times 16 bytes reads them in an order in which 8 lanes
// touch all 32 banks.
template <int kWidth>
__device__ __forceinline__ void read_scratch(uint32_t from, float (&x)[kWidth]) {
  if constexpr (kWidth == 1) {
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x[0]) : "r"(from) : "memory");
  } else {
    constexpr int kParts = kWidth / 4;
    const bool swapped = kParts > 1 && threadIdx.x / 4 % 2;
    float part[kParts][4];
#pragma unroll
    for (int i = 0; i < kParts; ++i)
      asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                   : "=f"(part[i][0]), "=f"(part[i][1]), "=f"(part[i][2]), "=f"(part[i][3])
                   : "r"(from + (swapped ? kParts - 1 - i : i) * kPackBytes)
                   : "memory");
#pragma unroll
    for (int i = 0; i < kWidth; ++i) x[i] = swapped ? part[kParts - 1 - i / 4][i % 4] : part[i / 4][i % 4];
  }
}

// Finishes 16 rows of a warp's part of out: from the scratch to global memory. U is the type of out.
template <class T, class U, int kWarpN, int kScratchRow, int kWidth>
__device__ __forceinline__ void finish_rows(const ProductArgs& p, int64_t row, int64_t column, uint32_t scratch) {
  constexpr int kOfRow = kWarpN / kWidth;
#pragma unroll 1
  for (int i = threadIdx.x % kWarp; i < kMma * kOfRow; i += kWarp) {
    const int down = i / kOfRow, across = i % kOfRow * kWidth;
    if (row + down >= p.M || column + across >= p.N) continue;
    float x[kWidth];
    read_scratch<kWidth>(scratch + (down * kScratchRow + across) * sizeof(float), x);
    if constexpr (sizeof(T) < sizeof(U)) {
      finish_wide<kWidth>(p, row + down, column + across, x);
    } else {
      finish<T, kWidth>(p, row + down, column + across, x);
    }
  }
}

}  // namespace gpt2fast::cuda

// What a block of a product of two matrices has in shared memory, and what follows the product.
#pragma once
#include "activation.cuh"
#include "mma.cuh"

namespace gpt2fast::cuda {

// --- Before the product ---

// Bit i of a row of a tile: whether it is among the first n.
__device__ __forceinline__ uint64_t first_bits(int64_t n) {
  return n >= 64 ? ~uint64_t(0) : n > 0 ? (uint64_t(1) << n) - 1 : 0;
}

// What a block has of a or of b in one step: kOuter rows of a, or columns of b, and kK numbers of each. kAlongK: those
// lie beside each other, and are a row of a tile; else a row has one number of each.
template <class T, bool kAlongK, int kOuter, int kK>
struct Operand {
  static constexpr int kRows = kAlongK ? (kOuter < 64 ? kOuter : 64) : kK;  // of a tile, which has no more than 64
  using Part = Tile<T, kAlongK ? kK : kOuter, kRows>;
  static constexpr int kParts = kAlongK ? kOuter / kRows : 1;
  static constexpr int kBytes = kParts * Part::kBytes;

  uint32_t start;

  __device__ __forceinline__ Part part(int i) const { return {start + i * Part::kBytes}; }

  // By 16 bytes; outer and k: how many are there, the rest of the tile becomes 0.
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

  // One by one, in the order in which they lie beside each other, if they do.
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

  // Rows outer ... outer + 15 of a, and 16 numbers along k of each.
  __device__ __forceinline__ void load_a(FragmentA<T>& to, int outer, int step) const {
    if constexpr (kAlongK) {
      part(outer / kRows).load_a(to, outer % kRows, step);
    } else {
      part(0).load_a_of_columns(to, step * kMma, outer / kMma);
    }
  }

  // Columns outer ... outer + 15 of b, and 16 numbers along k of each.
  __device__ __forceinline__ void load_b(FragmentA<T>& to, int outer, int step) const {
    if constexpr (kAlongK) {
      part(outer / kRows).load_b_of_rows(to, outer % kRows, step);
    } else {
      part(0).load_b(to, step * kMma, outer / kMma);
    }
  }

  // The sum along k of one row of a or column of b.
  __device__ __forceinline__ float sum(int outer) const {
    static_assert(!kAlongK);
    float total = 0;
#pragma unroll 4
    for (int k = 0; k < kK; ++k) {
      float x = 0;  // the smallest plane first: sums are exact
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

// What follows the product, for kWidth neighbours of a row of out.
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

// The same where out and residual are float32, and there is nothing else.
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

// Reads kWidth numbers of the scratch. A lane that needs two times 16 bytes reads them in an order by which 8 lanes
// fill all 32 banks.
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

// 16 rows of out of a warp, from the scratch on. U: out's type.
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

// Matrix products on tensor cores: the layout of operands in registers, tiles in shared memory, and writing of results.
#pragma once
#include "device.cuh"

namespace gpt2fast::cuda {

constexpr int kChunk = 8;  // a chunk is 8 numbers of 16 bits, 16 bytes: a row of ldmatrix, or one cp.async
constexpr int kMma = 16;   // rows and columns of A in one mma, and rows of B
constexpr int kHalf = 8;   // columns of B and C in one mma

// --- Products on tensor cores ---
//
// mma.m16n8k16 multiplies A (16 x 16) by B (16 x 8) and adds the product to C (16 x 8, float32). Lane i of the warp is
// called (g, t) = (i / 4, i % 4). A register of A or B holds two neighbours along k, the axis that the product sums
// over. This is what lane (g, t) holds:
//
//           k: 2t,2t+1  2t+8,2t+9                  n: g                       n: 2t    2t+1
//  A  row g     a[0]       a[2]     B  k: 2t,2t+1   b[0]      C  row g           c[0]   c[1]
//     row g+8   a[1]       a[3]        k: 2t+8,2t+9 b[1]         row g+8         c[2]   c[3]
//
// So the C of two neighbouring products has the layout of the A of a next product. In attention, the probabilities go
// from the first product to the product with v without any exchange between lanes.
//
// float32 has a significand of 24 bits; that of bfloat16, which tensor cores multiply, has 8. A float32 number is split
// into three bfloat16 numbers, its planes, whose sum it is: the number rounded, the remainder rounded, and what is
// left. Of the nine products of planes, the six largest matter.
template <class T>
constexpr int kPlanes = sizeof(T) == 4 ? 3 : 1;

template <class T>
__device__ __forceinline__ void mma_of_planes(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (__is_same(T, float16)) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// Registers of each plane: one, or the four of an operand A.
template <class T>
using Planes = uint32_t[kPlanes<T>];
template <class T>
using FragmentA = uint32_t[kPlanes<T>][4];

// c0 += a b and c1 += a b', where b and b' are two neighbouring tiles of B: registers 0, 1 and registers 2, 3. The six
// products of float32 are first added up among themselves, small ones first. Added to c one by one, the small ones
// would lose their digits once c is large.
template <class T>
__device__ __forceinline__ void mma(float (&c0)[4], float (&c1)[4], const FragmentA<T>& a, const FragmentA<T>& b) {
  if constexpr (kPlanes<T> == 1) {
    mma_of_planes<T>(c0, a[0], b[0][0], b[0][1]);
    mma_of_planes<T>(c1, a[0], b[0][2], b[0][3]);
  } else {
    float sum0[4] = {}, sum1[4] = {};
#pragma unroll
    for (int planes = kPlanes<T> - 1; planes >= 0; --planes)
#pragma unroll
      for (int plane = 0; plane <= planes; ++plane) {
        mma_of_planes<T>(sum0, a[plane], b[planes - plane][0], b[planes - plane][1]);
        mma_of_planes<T>(sum1, a[plane], b[planes - plane][2], b[planes - plane][3]);
      }
#pragma unroll
    for (int i = 0; i < 4; ++i) c0[i] += sum0[i], c1[i] += sum1[i];
  }
}

// Converts two neighbouring numbers to one register for each plane.
template <class T>
__device__ __forceinline__ void split(float x, float y, Planes<T>& to) {
  if constexpr (kPlanes<T> == 1) {
    to[0] = pair<T>(x, y);
  } else {
#pragma unroll
    for (int plane = 0; plane < kPlanes<T>; ++plane) {
      to[plane] = pair<bfloat16>(x, y);
      x -= widen(bfloat16{uint16_t(to[plane])}), y -= widen(bfloat16{uint16_t(to[plane] >> 16)});
    }
  }
}

// Converts C of two neighbouring products to A of the next product.
template <class T>
__device__ __forceinline__ void as_operand(const float (&c0)[4], const float (&c1)[4], FragmentA<T>& a) {
  Planes<T> to[4];
  split<T>(c0[0], c0[1], to[0]), split<T>(c0[2], c0[3], to[1]);
  split<T>(c1[0], c1[1], to[2]), split<T>(c1[2], c1[3], to[3]);
#pragma unroll
  for (int plane = 0; plane < kPlanes<T>; ++plane)
#pragma unroll
    for (int i = 0; i < 4; ++i) a[plane][i] = to[i][plane];
}

// --- Tiles in shared memory ---
//
// A tile has kTileRows rows of kD numbers (a multiple of 16), in chunks of 8; float32 has one such tile for each plane.
// ldmatrix reads one chunk from each of 8 rows at a time, and copies write neighbouring chunks of a row. To avoid bank
// conflicts, both must touch all 32 banks, which hold 8 chunks. So chunk c of row r is stored at place c ^ (r % 8). If
// a row is not a multiple of 8 chunks, neighbouring rows begin in different banks already, and the exchange happens
// within groups of kGroup chunks only, the greatest common divisor of 8 and the chunks of a row.
template <class T, int kD, int kTileRows>
struct Tile {
  static_assert(kD % kMma == 0 && kTileRows <= 64);
  static constexpr int kChunks = kD / kChunk;
  static constexpr int kGroup = kChunks % 8 == 0 ? 8 : kChunks % 4 == 0 ? 4 : 2;
  static constexpr int kPlaneBytes = kTileRows * kD * sizeof(uint16_t);
  static constexpr int kBytes = kPlanes<T> * kPlaneBytes;

  uint32_t start;  // the tile's address in shared memory

  // The address of a chunk.
  __device__ __forceinline__ uint32_t at(int row, int chunk, int plane = 0) const {
    const int place = row * kChunks + (chunk ^ (row / (8 / kGroup) % kGroup));
    return start + plane * kPlaneBytes + place * kPackBytes;
  }

  // Loads the rows row ... row + 15 and the columns 16 step ... 16 step + 15 as A.
  __device__ __forceinline__ void load_a(FragmentA<T>& to, int row, int step) const {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int plane = 0; plane < kPlanes<T>; ++plane)
      load_matrices<false>(to[plane], at(row + lane % 16, 2 * step + lane / 16, plane));
  }

  // Loads the transpose of the same rows and columns as A: the rows of A are columns of the tile.
  __device__ __forceinline__ void load_a_of_columns(FragmentA<T>& to, int row, int step) const {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int plane = 0; plane < kPlanes<T>; ++plane)
      load_matrices<true>(to[plane], at(row + lane / 16 * 8 + lane % 8, 2 * step + lane / 8 % 2, plane));
  }

  // Loads the transpose of the same rows and columns as B of two neighbouring products: columns of B are rows of the
  // tile.
  __device__ __forceinline__ void load_b_of_rows(FragmentA<T>& to, int row, int step) const {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int plane = 0; plane < kPlanes<T>; ++plane)
      load_matrices<false>(to[plane], at(row + lane / 16 * 8 + lane % 8, 2 * step + lane / 8 % 2, plane));
  }

  // Loads the same rows and columns as B of two neighbouring products: columns of B are columns of the tile.
  __device__ __forceinline__ void load_b(FragmentA<T>& to, int row, int step) const {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int plane = 0; plane < kPlanes<T>; ++plane)
      load_matrices<true>(to[plane], at(row + lane % 16, 2 * step + lane / 16, plane));
  }

  // Copies kTileRows rows of D numbers from global memory. Bit r of `wanted` says whether row r is copied. Other rows,
  // and columns from D on, become 0, and their memory is not read. Aligned 16-bit numbers are copied by cp.async;
  // wait_for_copies() must follow.
  template <bool kAligned, int kThreads>
  __device__ __forceinline__ void copy(const T* from, int64_t stride, int D, uint64_t wanted) const {
    // A unit is the numbers that a thread copies at a time; kUnits of them are a row.
    constexpr int kUnit = kPackBytes / sizeof(T), kUnits = kD / kUnit;
    // If a thread has the same unit of all its rows, saying so at compile time saves divisions.
    constexpr bool kSameUnit = kThreads % kUnits == 0;
    const int first_row = threadIdx.x / kUnits, first_unit = threadIdx.x % kUnits;
    // How many copies of a thread are in flight together. cp.async takes no registers, so all of them are; the others
    // are limited by registers.
    constexpr int kTogether = !kAligned ? 1 : kPlanes<T> > 1 ? (kD > 96 ? 1 : 4) : kTileRows * kUnits / kThreads + 1;
#pragma unroll kTogether
    for (int i = 0; i < kTileRows * kUnits; i += kThreads) {
      const int index = i + threadIdx.x;
      const int row = kSameUnit ? first_row + i / kUnits : index / kUnits;
      const int column = (kSameUnit ? first_unit : index % kUnits) * kUnit;
      if (kTileRows * kUnits % kThreads && index >= kTileRows * kUnits) break;
      const bool want = wanted >> row & 1;
      const T* source = from + row * stride + column;
      const uint32_t to = at(row, column / kChunk) + column % kChunk * sizeof(uint16_t);
      if constexpr (kAligned && kPlanes<T> == 1) {
        const int bytes = want && column < D ? kPackBytes : 0;
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(bytes ? source : from), "r"(bytes)
                     : "memory");
      } else {
        float part[kUnit] = {};
        if constexpr (kAligned) {
          if (want && column < D) load<T, kUnit>(source, part);
        } else {
#pragma unroll
          for (int j = 0; j < kUnit; ++j)
            if (want && column + j < D) part[j] = widen(source[j]);
        }
        Planes<T> word[kUnit / 2];
#pragma unroll
        for (int j = 0; j < kUnit / 2; ++j) split<T>(part[2 * j], part[2 * j + 1], word[j]);
#pragma unroll
        for (int plane = 0; plane < kPlanes<T>; ++plane) {
          if constexpr (kPlanes<T> == 1) {
            asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(word[0][0]), "r"(word[1][0]),
                         "r"(word[2][0]), "r"(word[3][0])
                         : "memory");
          } else {
            asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(to + plane * kPlaneBytes), "r"(word[0][plane]),
                         "r"(word[1][plane])
                         : "memory");
          }
        }
      }
    }
  }

 private:
  // Loads four 8 x 8 matrices. Lane i gives the address of row i % 8 of matrix i / 8. It gets the numbers (g, 2t) and
  // (g, 2t+1) of each matrix or, transposed, (2t, g) and (2t+1, g).
  template <bool kTransposed>
  static __device__ __forceinline__ void load_matrices(uint32_t (&to)[4], uint32_t from) {
    if constexpr (kTransposed) {
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                   : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                   : "r"(from)
                   : "memory");
    } else {
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                   : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                   : "r"(from)
                   : "memory");
    }
  }
};

__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// end_group_of_copies() makes a group of the copies since its last call. wait_for_copies_but<kGroups>() waits for all
// groups but the newest kGroups.
__device__ __forceinline__ void end_group_of_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kGroups>
__device__ __forceinline__ void wait_for_copies_but() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

// Writes a warp's C, 16 rows of kD columns, to global memory: rows of D numbers, `stride` apart, of which `rows` exist.
// Each row is multiplied by its factor. 16-bit numbers go through `scratch`, 16 rows of shared memory of this warp, so
// that a lane writes 16 neighbouring bytes. For float32, 4 lanes write 32 neighbouring bytes, a sector, directly.
template <class T, int kD, bool kAligned>
__device__ __forceinline__ void write_rows(const float (&c)[kD / kHalf][4], const float (&factor)[2], uint32_t scratch,
                                           T* to, int64_t stride, int D, int rows) {
  const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  if constexpr (kAligned && kPlanes<T> == 1) {
    const Tile<T, kD, kMma> tile{scratch};
#pragma unroll
    for (int n = 0; n < kD / kHalf; ++n)
#pragma unroll
      for (int r = 0; r < 2; ++r)
        asm volatile("st.shared.b32 [%0], %1;" ::"r"(tile.at(g + 8 * r, n) + t * 4),
                     "r"(pair<T>(c[n][2 * r] * factor[r], c[n][2 * r + 1] * factor[r]))
                     : "memory");
    __syncwarp();
    constexpr int kChunks = kD / kChunk;
#pragma unroll
    for (int i = lane; i < kMma * kChunks; i += kWarp) {
      const int row = i / kChunks, chunk = i % kChunks;
      if (row >= rows || chunk * kChunk >= D) continue;
      uint4 word;
      asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(word.x), "=r"(word.y), "=r"(word.z), "=r"(word.w)
                   : "r"(tile.at(row, chunk))
                   : "memory");
      *reinterpret_cast<uint4*>(to + row * stride + chunk * kChunk) = word;
    }
  } else {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (g + 8 * r >= rows) continue;
      T* row = to + (g + 8 * r) * stride;
#pragma unroll
      for (int n = 0; n < kD / kHalf; ++n) {
        const int column = n * kHalf + 2 * t;
        const float x = c[n][2 * r] * factor[r], y = c[n][2 * r + 1] * factor[r];
        if constexpr (kAligned) {
          if (column < D) *reinterpret_cast<float2*>(row + column) = make_float2(x, y);
        } else {
          if (column < D) row[column] = narrow<T>(x);
          if (column + 1 < D) row[column + 1] = narrow<T>(y);
        }
      }
    }
  }
}

}  // namespace gpt2fast::cuda

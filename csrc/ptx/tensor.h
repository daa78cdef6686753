// Tiles of matrices: read from the registers of a fragment into dense floats, transposed and multiplied.
#pragma once
#include "clones.h"
#include "decode.h"

namespace gpt2fast::ptx {

void decode_load_matrix(Decoder& d);  // tensor_load.cpp

// The elements of A, as they lie in registers. Other is the type of B's elements.
struct Half {
  using Bits = uint16_t;
  using Other = Half;
  static float value(Bits b) { return half_to_float(b); }
};
struct Bfloat {
  using Bits = uint16_t;
  using Other = Bfloat;
  static float value(Bits b) { return bfloat_to_float(b); }
};
struct Tensor32 {  // .tf32: the low 13 bits are ignored
  using Bits = uint32_t;
  using Other = Tensor32;
  static float value(Bits b) { return bit_cast<float>(b & 0xffffe000u); }
};
template <class A, class B>
struct Byte {
  using Bits = A;
  using Other = Byte<B, A>;
  static float value(Bits b) { return float(b); }
};

// Reads a tile: 8 rows of 16 bytes.
template <class E>
inline void widen(const typename E::Bits* from, float* to) {
  for (int i = 0; i < int(128 / sizeof(typename E::Bits)); ++i) to[i] = E::value(from[i]);
}

// Transposes 8 rows of W to W rows of 8.
template <int W, class T>
inline void transpose(const T* from, T* to) {
  for (int r = 0; r < W; ++r)
    for (int c = 0; c < 8; ++c) to[8 * r + c] = from[W * c + r];
}

// c[M][8] += a[M][K] * b[K][8]. The products are added one after the other, in ascending order of k.
template <int M, int K>
inline void multiply_add(const float* a, const float* b, float* c) {
  using Row = float __attribute__((vector_size(32)));
  for (int m = 0; m < M; m += 8) {
    Row sum[8];
    std::memcpy(sum, c + 8 * m, sizeof sum);
    for (int k = 0; k < K; ++k) {
      Row row;
      std::memcpy(&row, b + 8 * k, sizeof row);
      for (int r = 0; r < 8; ++r) sum[r] += a[(m + r) * K + k] * row;
    }
    std::memcpy(c + 8 * m, sum, sizeof sum);
  }
}

}  // namespace gpt2fast::ptx

// The storage types of the kernels, their conversions from and to float on the host, and with_dtype, which turns a
// dtype that is known at run time into a template argument.
#pragma once
#include <cstdint>
#include <cstring>

namespace gpt2fast {

enum class DType : int32_t { kFloat32, kBFloat16, kFloat16 };

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

inline float to_float(float x) { return x; }

inline float to_float(bfloat16 x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

inline float to_float(float16 x) {
  uint32_t sign = uint32_t(x.bits & 0x8000) << 16, exponent = (x.bits >> 10) & 31, mantissa = x.bits & 1023;
  uint32_t bits;
  if (exponent == 0) {  // zero or subnormal: mantissa * 2^-24
    float out = float(mantissa) * 5.9604644775390625e-8f;
    std::memcpy(&bits, &out, 4);
    bits |= sign;
  } else {
    bits = sign | ((exponent == 31 ? 255 : exponent + 112) << 23) | (mantissa << 13);
  }
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

template <class T>
inline T from_float(float x);

template <>
inline float from_float<float>(float x) {
  return x;
}

template <>
inline bfloat16 from_float<bfloat16>(float x) {  // rounds to nearest, ties to even; NaN becomes a quiet NaN
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return {uint16_t((bits >> 16) | 64)};
  return {uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

template <>
inline float16 from_float<float16>(float x) {  // rounds to nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  uint16_t sign = uint16_t((bits >> 16) & 0x8000);
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return {uint16_t(sign | 0x7e00)};
  if (bits >= 0x477ff000) return {uint16_t(sign | 0x7c00)};  // rounds to infinity
  if (bits < 0x38800000) {  // subnormal: adding 2^-1 rounds to a multiple of 2^-24, the unit of subnormal float16
    float magnitude, half = 0.5f;
    std::memcpy(&magnitude, &bits, 4);
    magnitude += half;
    uint32_t sum;
    std::memcpy(&sum, &magnitude, 4);
    return {uint16_t(sign | (sum - 0x3f000000))};
  }
  return {uint16_t(sign | ((bits + 0xfff + ((bits >> 13) & 1) - 0x38000000) >> 13))};
}

template <class T>
struct Type {
  using type = T;
};

// Calls f with the tag of a dtype's storage type. Example:
// with_dtype(args.dtype, [&](auto tag) { using T = typename decltype(tag)::type; ... });
template <class F>
inline void with_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(Type<float>{});
    case DType::kBFloat16:
      return f(Type<bfloat16>{});
    case DType::kFloat16:
      return f(Type<float16>{});
  }
}

}  // namespace gpt2fast

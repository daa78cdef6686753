// Arithmetic of .f16, .bf16 and their pairs: add, sub, mul, fma, min, max, abs, neg, ex2 and tanh. Every result is
// rounded once.
#include <algorithm>

#include "lanes.h"

namespace gpt2fast::ptx {
namespace {

// A 16-bit format. Each of its values is exactly a float. round takes a double that is exact or was rounded to odd.
struct F16 {
  static constexpr uint16_t kNan = 0x7fff;
  static float value(uint16_t x) { return half_to_float(x); }
  static uint16_t round(double x) { return uint16_t(narrow<5, 10>(x)); }
  // The sum or product of two values, computed as a float and rounded again, equals the exact result rounded once.
  static uint16_t round_sum(float x) { return float_to_half(x); }
  static uint16_t flush(uint16_t x) { return x & 0x7c00 ? x : uint16_t(x & 0x8000); }
};
struct BF16 {
  static constexpr uint16_t kNan = 0x7fff;
  static float value(uint16_t x) { return bfloat_to_float(x); }
  static uint16_t round(double x) { return uint16_t(narrow<8, 7>(x)); }
  static uint16_t round_sum(float x) { return float_to_bfloat(x); }
  static uint16_t flush(uint16_t x) { return x; }
};

struct Add {
  template <class H>
  static uint16_t apply(uint16_t a, uint16_t b) {
    return H::round_sum(H::value(a) + H::value(b));
  }
};
struct Subtract {
  template <class H>
  static uint16_t apply(uint16_t a, uint16_t b) {
    return H::round_sum(H::value(a) - H::value(b));
  }
};
struct Multiply {
  template <class H>
  static uint16_t apply(uint16_t a, uint16_t b) {
    return H::round_sum(H::value(a) * H::value(b));
  }
};
struct MultiplyAdd {
  template <class H>
  static uint16_t apply(uint16_t a, uint16_t b, uint16_t c) {
    double product = double(H::value(a)) * double(H::value(b));
    return H::round(add_to_odd(product, H::value(c)));
  }
};
template <bool kMax, bool kNan>
struct Extreme {
  template <class H>
  static uint16_t apply(uint16_t a, uint16_t b) {
    float x = H::value(a), y = H::value(b);
    return H::round_sum(kMax ? maximum(x, y, kNan) : minimum(x, y, kNan));
  }
};
template <bool kMax, bool kNan>
struct ExtremeSigned {
  template <class H>
  static uint16_t apply(uint16_t a, uint16_t b) {
    auto r = Extreme<kMax, kNan>::template apply<H>(a & 0x7fff, b & 0x7fff);
    return uint16_t(r | ((a ^ b) & 0x8000));
  }
};
struct Absolute {
  template <class H>
  static uint16_t apply(uint16_t a) {
    return a & 0x7fff;
  }
};
struct Negative {
  template <class H>
  static uint16_t apply(uint16_t a) {
    return a ^ 0x8000;
  }
};
struct Power2 {
  template <class H>
  static uint16_t apply(uint16_t a) {
    return H::round(std::exp2(double(H::value(a))));
  }
};
struct Tangent {
  template <class H>
  static uint16_t apply(uint16_t a) {
    return H::round(std::tanh(double(H::value(a))));
  }
};

enum Finish : int { kAsIs, kFlush, kSaturate, kFlushSaturate, kRelu, kFlushRelu };

// The operation on one value, with flushing before it and what kFinish asks after it.
template <class F, class H, int kFinish>
struct One {
  static constexpr bool kFlushes = kFinish == kFlush || kFinish == kFlushSaturate || kFinish == kFlushRelu;
  template <class... T>
  static uint16_t apply(T... a) {
    uint16_t r = kFlushes ? H::flush(F::template apply<H>(H::flush(a)...)) : F::template apply<H>(a...);
    bool nan = (r & 0x7fff) > (H::round_sum(INFINITY) & 0x7fff);
    if (kFinish == kSaturate || kFinish == kFlushSaturate)
      return nan || (r & 0x8000) ? uint16_t{0} : std::min(r, H::round_sum(1.0f));
    if (kFinish == kRelu || kFinish == kFlushRelu) return nan ? H::kNan : r & 0x8000 ? uint16_t{0} : r;
    return r;
  }
};

template <class O>
struct Pair {
  template <class... T>
  static uint32_t apply(T... a) {
    return O::apply(uint16_t(a)...) | uint32_t(O::apply(uint16_t(a >> 16)...)) << 16;
  }
};

template <class O, class T, int kSources>
constexpr Handler handler() {
  if constexpr (kSources == 1)
    return unary<O, T, T>;
  else if constexpr (kSources == 2)
    return binary<O, T, T, T>;
  else
    return ternary<O, T, T, T, T>;
}

template <class F, int kSources, int kFinish>
Handler pick(Type t) {
  switch (t) {
    case Type::F16:
      return handler<One<F, F16, kFinish>, uint16_t, kSources>();
    case Type::BF16:
      return handler<One<F, BF16, kFinish>, uint16_t, kSources>();
    case Type::F16x2:
      return handler<Pair<One<F, F16, kFinish>>, uint32_t, kSources>();
    default:
      return handler<Pair<One<F, BF16, kFinish>>, uint32_t, kSources>();
  }
}

// Which of .ftz, .sat and .relu an operation may have.
enum Allowed : int { kNothing = 0, kFtz = 1, kSat = 2, kMayRelu = 4 };

template <class F, int kSources, int kAllowed>
void decode(Decoder& d) {
  d.ins.kind = Class::Half;
  bool flushed = (kAllowed & kFtz) && d.take("ftz");
  bool saturated = (kAllowed & kSat) && d.take("sat");
  bool relu = (kAllowed & kMayRelu) && d.take("relu");
  Type t = d.type({Type::F16, Type::BF16, Type::F16x2, Type::BF16x2});
  if ((flushed || saturated) && (t == Type::BF16 || t == Type::BF16x2)) d.fail(".ftz and .sat are for .f16 only");
  same_operands(d, t, kSources);
  if constexpr (kAllowed & kSat) {
    if (saturated) {
      d.ins.run = flushed ? pick<F, kSources, kFlushSaturate>(t) : pick<F, kSources, kSaturate>(t);
      return;
    }
  }
  if constexpr (kAllowed & kMayRelu) {
    if (relu) {
      d.ins.run = flushed ? pick<F, kSources, kFlushRelu>(t) : pick<F, kSources, kRelu>(t);
      return;
    }
  }
  d.ins.run = flushed ? pick<F, kSources, kFlush>(t) : pick<F, kSources, kAsIs>(t);
}

template <class F, int kSources, int kAllowed, bool kNeedsRounding>
void decode_rounded(Decoder& d) {
  if (!d.take("rn") && kNeedsRounding) d.fail("expected .rn");
  decode<F, kSources, kAllowed>(d);
}

template <bool kMax>
void decode_extreme(Decoder& d) {
  bool nan = d.take("NaN"), with_sign = d.take("xorsign") && d.take("abs");
  if (with_sign)
    return nan ? decode<ExtremeSigned<kMax, true>, 2, kFtz>(d) : decode<ExtremeSigned<kMax, false>, 2, kFtz>(d);
  return nan ? decode<Extreme<kMax, true>, 2, kFtz>(d) : decode<Extreme<kMax, false>, 2, kFtz>(d);
}

template <class F>
void decode_special(Decoder& d) {
  if (!d.take("approx")) d.fail("expected .approx");
  d.take("ftz");  // it changes nothing: a subnormal of .bf16 is a subnormal float, and exp2 of it is 1
  decode<F, 1, kNothing>(d);
  d.ins.kind = Class::Special;
}

}  // namespace

void add_half(Opcodes& table) {
  table["add.half"] = decode_rounded<Add, 2, kFtz | kSat, false>;
  table["sub.half"] = decode_rounded<Subtract, 2, kFtz | kSat, false>;
  table["mul.half"] = decode_rounded<Multiply, 2, kFtz | kSat, false>;
  table["fma.half"] = decode_rounded<MultiplyAdd, 3, kFtz | kSat | kMayRelu, true>;
  table["min.half"] = decode_extreme<false>;
  table["max.half"] = decode_extreme<true>;
  table["abs.half"] = decode<Absolute, 1, kFtz>;
  table["neg.half"] = decode<Negative, 1, kFtz>;
  table["ex2.half"] = decode_special<Power2>;
  table["tanh.half"] = decode_special<Tangent>;
}

}  // namespace gpt2fast::ptx

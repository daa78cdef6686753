// Arithmetic of .f32 and .f64: add, sub, mul, fma, mad, div, rcp and sqrt in all rounding modes; min, max, abs, neg,
// copysign and testp.
#include <cfenv>

#include "lanes.h"
#include "rounding.h"

namespace gpt2fast::ptx {
namespace {

// Computes a double in another rounding mode. It sets the processor's mode, and keeps the compiler from moving the
// operation out.
template <class F>
double in_mode(int mode, F f) {
  if (mode == kNearest) return f();
  constexpr int kModes[] = {FE_TONEAREST, FE_TOWARDZERO, FE_DOWNWARD, FE_UPWARD};
  std::fesetround(kModes[mode]);
  volatile double result = f();
  std::fesetround(FE_TONEAREST);
  return result;
}

template <int kMode>
struct Add {
  static float apply(float a, float b) { return kMode == kNearest ? a + b : add_rounded<kMode>(a, b); }
  static double apply(double a, double b) {
    volatile double x = a, y = b;
    return in_mode(kMode, [&] { return x + y; });
  }
};
template <>
struct Add<kNearest> {
  template <class T>
  static T apply(T a, T b) {
    return a + b;
  }
};
template <int kMode>
struct Subtract {
  template <class T>
  static T apply(T a, T b) {
    return Add<kMode>::apply(a, -b);
  }
};
template <int kMode>
struct Multiply {
  static float apply(float a, float b) { return multiply_rounded<kMode>(a, b); }
  static double apply(double a, double b) {
    volatile double x = a, y = b;
    return in_mode(kMode, [&] { return x * y; });
  }
};
template <>
struct Multiply<kNearest> {
  template <class T>
  static T apply(T a, T b) {
    return a * b;
  }
};
template <int kMode>
struct MultiplyAdd {
  static float apply(float a, float b, float c) { return fma_rounded<kMode>(a, b, c); }
  static double apply(double a, double b, double c) {
    volatile double x = a, y = b, z = c;
    return in_mode(kMode, [&] { return std::fma(x, y, z); });
  }
};
template <>
struct MultiplyAdd<kNearest> {
  static float apply(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
  static double apply(double a, double b, double c) { return __builtin_fma(a, b, c); }
};
template <int kMode>
struct Divide {
  static float apply(float a, float b) { return kMode == kNearest ? a / b : divide_rounded<kMode>(a, b); }
  static double apply(double a, double b) {
    volatile double x = a, y = b;
    return in_mode(kMode, [&] { return x / y; });
  }
};
template <int kMode>
struct Reciprocal {
  template <class T>
  static T apply(T a) {
    return Divide<kMode>::apply(T(1), a);
  }
};
template <int kMode>
struct Root {
  static float apply(float a) { return kMode == kNearest ? std::sqrt(a) : root_rounded<kMode>(a); }
  static double apply(double a) {
    volatile double x = a;
    return in_mode(kMode, [&] { return std::sqrt(x); });
  }
};

// The result of an .f64 operation with NaNs is the first NaN operand, made quiet. The compiler may swap the operands,
// so this is done by hand.
inline double first_nan() { return bit_cast<double>(uint64_t{0xfff8} << 48); }
template <class... T>
double first_nan(double a, T... rest) {
  return a != a ? bit_cast<double>(bit_cast<uint64_t>(a) | uint64_t{1} << 51) : first_nan(rest...);
}

// .ftz flushes subnormals of .f32 before and after the operation. .sat limits the result to [0, 1].
template <class F, bool kFlush, bool kSaturate>
struct Finished {
  template <class... T>
  static auto apply(T... a) {
    auto r = kFlush ? flush(F::apply(flush(a)...)) : F::apply(a...);
    if constexpr (std::is_same_v<decltype(r), double>)
      return r == r ? r : first_nan(a...);
    else
      return kSaturate ? saturate(r) : canonical(r);
  }
};

template <class F, class T, int kSources>
constexpr Handler handler() {
  if constexpr (kSources == 1)
    return unary<F, T, T>;
  else if constexpr (kSources == 2)
    return binary<F, T, T, T>;
  else
    return ternary<F, T, T, T, T>;
}

template <class F, int kSources>
Handler finish(Type t, bool flushed, bool saturated) {
  if (t == Type::F64) return handler<Finished<F, false, false>, double, kSources>();
  if (flushed)
    return saturated ? handler<Finished<F, true, true>, float, kSources>()
                     : handler<Finished<F, true, false>, float, kSources>();
  return saturated ? handler<Finished<F, false, true>, float, kSources>()
                   : handler<Finished<F, false, false>, float, kSources>();
}

template <template <int> class F, int kSources>
Handler pick(Type t, int mode, bool flushed, bool saturated) {
  switch (mode) {
    case kNearest:
      return finish<F<kNearest>, kSources>(t, flushed, saturated);
    case kZero:
      return finish<F<kZero>, kSources>(t, flushed, saturated);
    case kDown:
      return finish<F<kDown>, kSources>(t, flushed, saturated);
    case kUp:
      return finish<F<kUp>, kSources>(t, flushed, saturated);
    default:
      return nullptr;
  }
}

Type float_type(Decoder& d, bool flushed, bool saturated) {
  Type t = d.type({Type::F32, Type::F64});
  if (t == Type::F64 && (flushed || saturated)) d.fail(".ftz and .sat are for .f32 only");
  d.ins.kind = Class::Float;
  return t;
}

// kNeedsMode: the rounding mode must be written, since PTX has no default for it.
template <template <int> class F, int kSources, bool kNeedsMode, bool kMaySaturate = true>
void decode(Decoder& d) {
  int mode = kNearest;
  bool given = d.rounding_at(&mode);
  if (kNeedsMode && !given) d.fail("expected a rounding mode: .rn, .rz, .rm or .rp");
  bool flushed = d.take("ftz"), saturated = kMaySaturate && d.take("sat");
  Type t = float_type(d, flushed, saturated);
  same_operands(d, t, kSources);
  d.own_pointer();
  d.ins.run = pick<F, kSources>(t, mode, flushed, saturated);
}

struct Negative {
  template <class T>
  static T apply(T a) {
    return -a;
  }
};
struct Absolute {
  static float apply(float a) { return std::fabs(a); }
  static double apply(double a) { return std::fabs(a); }
};

// The sign of a NaN is kept, and NaNs are not made canonical.
template <class F, bool kFlush>
struct OfSign {
  template <class T>
  static T apply(T a) {
    return F::apply(kFlush ? flush(a) : a);
  }
};

template <class F>
void decode_sign(Decoder& d) {
  bool flushed = d.take("ftz");
  Type t = float_type(d, flushed, false);
  same_operands(d, t, 1);
  d.own_pointer();
  d.ins.run = t == Type::F64 ? unary<OfSign<F, false>, double, double>
              : flushed      ? unary<OfSign<F, true>, float, float>
                             : unary<OfSign<F, false>, float, float>;
}

template <bool kMax, bool kNan>
struct Extreme {
  template <class T>
  static T apply(T a, T b) {
    return kMax ? maximum(a, b, kNan) : minimum(a, b, kNan);
  }
};
// .xorsign.abs: the minimum or maximum of the absolute values, with the product of the signs.
template <bool kMax, bool kNan>
struct ExtremeSigned {
  static float apply(float a, float b) {
    float r = Extreme<kMax, kNan>::apply(std::fabs(a), std::fabs(b));
    return std::signbit(a) != std::signbit(b) ? -r : r;
  }
  static double apply(double a, double b) { return Extreme<kMax, kNan>::apply(a, b); }
};

template <bool kMax>
void decode_extreme(Decoder& d) {
  bool flushed = d.take("ftz"), nan = d.take("NaN"), with_sign = d.take("xorsign") && d.take("abs");
  Type t = float_type(d, flushed, false);
  if (t == Type::F64 && (nan || with_sign)) d.fail(".NaN and .xorsign.abs are for .f32 only");
  size_t sources = d.left() == 4 ? 3 : 2;
  if (sources == 3) d.fail("three sources need sm_100");
  same_operands(d, t, 2);
  d.own_pointer();
  d.ins.run = with_sign ? nan ? finish<ExtremeSigned<kMax, true>, 2>(t, flushed, false)
                              : finish<ExtremeSigned<kMax, false>, 2>(t, flushed, false)
              : nan     ? finish<Extreme<kMax, true>, 2>(t, flushed, false)
                        : finish<Extreme<kMax, false>, 2>(t, flushed, false);
}

// The sign of a on the value of b.
struct CopySign {
  template <class T>
  static T apply(T a, T b) {
    return std::copysign(b, a);
  }
};

void decode_copy_sign(Decoder& d) {
  Type t = float_type(d, false, false);
  same_operands(d, t, 2);
  d.own_pointer();
  d.ins.run = handler<CopySign, float, 2>();
  if (t == Type::F64) d.ins.run = handler<CopySign, double, 2>();
}

enum Test : int { kFinite, kInfinite, kNumber, kNotANumber, kNormal, kSubnormal };

template <class T>
void test(Warp& w, const Instruction& i, uint32_t mask) {
  const T* a = w.lanes<T>(i.operand[1]);
  int wanted = i.mode[0];
  set_predicate(w.predicate(i.operand[0]), mask, ballot([=](int l) {
                  int c = std::fpclassify(a[l]);
                  switch (wanted) {
                    case kFinite:
                      return c != FP_INFINITE && c != FP_NAN;
                    case kInfinite:
                      return c == FP_INFINITE;
                    case kNumber:
                      return c != FP_NAN;
                    case kNotANumber:
                      return c == FP_NAN;
                    case kNormal:
                      return c == FP_NORMAL || c == FP_ZERO;
                    default:
                      return c == FP_SUBNORMAL;
                  }
                }));
}

void decode_test(Decoder& d) {
  int wanted = d.choose({"finite", "infinite", "number", "notanumber", "normal", "subnormal"});
  if (wanted < 0) d.fail("expected .finite, .infinite, .number, .notanumber, .normal or .subnormal");
  d.ins.mode[0] = uint8_t(wanted);
  Type t = float_type(d, false, false);
  d.write_predicate();
  d.read(t);
  d.ins.run = t == Type::F64 ? test<double> : test<float>;
}

}  // namespace

void add_floating(Opcodes& table) {
  table["add.float"] = decode<Add, 2, false>;
  table["sub.float"] = decode<Subtract, 2, false>;
  table["mul.float"] = decode<Multiply, 2, false>;
  table["fma.float"] = decode<MultiplyAdd, 3, true>;
  table["mad.float"] = decode<MultiplyAdd, 3, true>;
  table["neg.float"] = decode_sign<Negative>;
  table["abs.float"] = decode_sign<Absolute>;
  table["min.float"] = decode_extreme<false>;
  table["max.float"] = decode_extreme<true>;
  table["copysign"] = decode_copy_sign;
  table["testp"] = decode_test;
}

// special.cpp has the approximate forms of div, rcp and sqrt.
void decode_divide(Decoder& d) { decode<Divide, 2, true, false>(d); }
void decode_reciprocal(Decoder& d) { decode<Reciprocal, 1, true, false>(d); }
void decode_root(Decoder& d) { decode<Root, 1, true, false>(d); }

}  // namespace gpt2fast::ptx

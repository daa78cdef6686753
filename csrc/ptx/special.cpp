// Approximate functions: div, rcp, sqrt, rsqrt, ex2, lg2, sin, cos, tanh. PTX gives bounds for their errors. Here the
// host's math library computes them, which is well within the bounds; the bits are not those of a GPU.
#include "lanes.h"

namespace gpt2fast::ptx {

void decode_divide(Decoder& d);  // floating.cpp
void decode_reciprocal(Decoder& d);
void decode_root(Decoder& d);

namespace {

// a * (1 / b). The reciprocal of a large b is 0.
struct Quotient {
  static float apply(float a, float b) {
    bool large = std::fabs(b) > 0x1p126f && std::fabs(b) < INFINITY;
    return large ? a * std::copysign(0.0f, b) : a / b;
  }
};
struct FullQuotient {
  static float apply(float a, float b) { return a / b; }
};
struct Reciprocal {
  static float apply(float a) { return 1 / a; }
};
struct Root {
  static float apply(float a) { return std::sqrt(a); }
};
struct ReciprocalRoot {
  static float apply(float a) { return float(1 / std::sqrt(double(a))); }
};
struct Power2 {
  static float apply(float a) { return std::exp2(a); }
};
struct Logarithm2 {
  static float apply(float a) { return std::log2(a); }
};
struct Sine {
  static float apply(float a) { return std::sin(a); }
};
struct Cosine {
  static float apply(float a) { return std::cos(a); }
};
struct Tangent {
  static float apply(float a) { return std::tanh(a); }
};

template <class F, bool kFlush>
struct Finished {
  template <class... T>
  static float apply(T... a) {
    return canonical(kFlush ? flush(F::apply(flush(a)...)) : F::apply(a...));
  }
};

template <class F, int kSources>
Handler pick(bool flushed) {
  if constexpr (kSources == 1)
    return flushed ? unary<Finished<F, true>, float, float> : unary<Finished<F, false>, float, float>;
  else
    return flushed ? binary<Finished<F, true>, float, float, float> : binary<Finished<F, false>, float, float, float>;
}

template <class F, int kSources>
void decode(Decoder& d) {
  bool flushed = d.take("ftz");
  d.type({Type::F32});
  same_operands(d, Type::F32, kSources);
  d.ins.kind = Class::Special;
  d.ins.run = pick<F, kSources>(flushed);
}

template <class F>
void approximate(Decoder& d) {
  if (!d.take("approx")) d.fail("expected .approx");
  decode<F, 1>(d);
}

// .approx.ftz.f64 uses only the upper 32 bits of its operand and gives only the upper 32 bits of the result.
template <class F>
struct Upper {
  static double apply(double a) {
    double x = bit_cast<double>(bit_cast<uint64_t>(a) & 0xffffffff00000000u);
    return bit_cast<double>(bit_cast<uint64_t>(F::apply(x)) & 0xffffffff00000000u);
  }
};
struct ReciprocalDouble {
  static double apply(double a) { return 1 / a; }
};
struct ReciprocalRootDouble {
  static double apply(double a) { return 1 / std::sqrt(a); }
};

template <class F, class Double>
void with_double(Decoder& d) {
  bool flushed = d.take("ftz");
  Type t = d.type({Type::F32, Type::F64});
  same_operands(d, t, 1);
  d.own_pointer();
  d.ins.kind = Class::Special;
  if (t == Type::F64)
    d.ins.run = flushed ? unary<Upper<Double>, double, double> : unary<Double, double, double>;
  else
    d.ins.run = pick<F, 1>(flushed);
}

void decode_any_reciprocal(Decoder& d) {
  if (d.take("approx")) return with_double<Reciprocal, ReciprocalDouble>(d);
  decode_reciprocal(d);
}

void decode_reciprocal_root(Decoder& d) {
  if (!d.take("approx")) d.fail("expected .approx");
  with_double<ReciprocalRoot, ReciprocalRootDouble>(d);
}

void decode_quotient(Decoder& d) {
  if (d.take("full")) return decode<FullQuotient, 2>(d);
  if (d.take("approx")) return decode<Quotient, 2>(d);
  decode_divide(d);
}

void decode_any_root(Decoder& d) {
  if (d.take("approx")) return decode<Root, 1>(d);
  decode_root(d);
}

}  // namespace

void add_special(Opcodes& table) {
  table["div.float"] = decode_quotient;
  table["rcp"] = decode_any_reciprocal;
  table["sqrt"] = decode_any_root;
  table["rsqrt"] = decode_reciprocal_root;
  table["ex2.float"] = approximate<Power2>;
  table["lg2"] = approximate<Logarithm2>;
  table["sin"] = approximate<Sine>;
  table["cos"] = approximate<Cosine>;
  table["tanh.float"] = approximate<Tangent>;
}

}  // namespace gpt2fast::ptx

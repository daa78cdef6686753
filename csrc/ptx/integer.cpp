// Integer arithmetic: add, sub, mul, mad, div, rem, min, max, abs, neg, sad, dp4a, dp2a, and carries.
#include <algorithm>
#include <limits>

#include "lanes.h"

namespace gpt2fast::ptx {
namespace {

using Wide = __int128;

template <class T>
using Unsigned = std::make_unsigned_t<T>;
template <class T>
using Twice =
    std::conditional_t<sizeof(T) == 2, std::conditional_t<std::is_signed_v<T>, int32_t, uint32_t>,
                       std::conditional_t<sizeof(T) == 4, std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>,
                                          std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>>>;

struct Add {
  template <class T>
  static T apply(T a, T b) {
    return T(Unsigned<T>(a) + Unsigned<T>(b));
  }
};
struct Subtract {
  template <class T>
  static T apply(T a, T b) {
    return T(Unsigned<T>(a) - Unsigned<T>(b));
  }
};
int32_t clamp_to_int(int64_t x) { return int32_t(std::min<int64_t>(std::max<int64_t>(x, INT32_MIN), INT32_MAX)); }
struct AddSaturated {
  static int32_t apply(int32_t a, int32_t b) { return clamp_to_int(int64_t(a) + b); }
};
struct SubtractSaturated {
  static int32_t apply(int32_t a, int32_t b) { return clamp_to_int(int64_t(a) - b); }
};
struct Low {
  template <class T>
  static T apply(T a, T b) {
    return T(Twice<T>(a) * Twice<T>(b));
  }
};
struct High {
  template <class T>
  static T apply(T a, T b) {
    return T(Twice<T>(a) * Twice<T>(b) >> (8 * sizeof(T)));
  }
};
struct Product {
  template <class T>
  static Twice<T> apply(T a, T b) {
    return Twice<T>(a) * Twice<T>(b);
  }
};
struct LowPlus {
  template <class T>
  static T apply(T a, T b, T c) {
    return Add::apply(Low::apply(a, b), c);
  }
};
struct HighPlus {
  template <class T>
  static T apply(T a, T b, T c) {
    return Add::apply(High::apply(a, b), c);
  }
};
struct HighPlusSaturated {
  static int32_t apply(int32_t a, int32_t b, int32_t c) { return clamp_to_int(int64_t(High::apply(a, b)) + c); }
};
struct ProductPlus {
  template <class T>
  static Twice<T> apply(T a, T b, Twice<T> c) {
    return Add::apply(Twice<T>(a) * Twice<T>(b), c);
  }
};
// PTX leaves the result of a division by zero open. These are the results of the hardware.
struct Divide {
  template <class T>
  static T apply(T a, T b) {
    if (b == 0) return T(~T(0));
    if (std::is_signed_v<T> && b == T(-1)) return T(0 - Unsigned<T>(a));
    return T(a / b);
  }
};
struct Remainder {
  template <class T>
  static T apply(T a, T b) {
    if (b == 0) return a;
    if (std::is_signed_v<T> && b == T(-1)) return 0;
    return T(a % b);
  }
};
struct Min {
  template <class T>
  static T apply(T a, T b) {
    return a < b ? a : b;
  }
};
struct Max {
  template <class T>
  static T apply(T a, T b) {
    return a > b ? a : b;
  }
};
struct Negative {
  template <class T>
  static T apply(T a) {
    return T(0 - Unsigned<T>(a));
  }
};
struct Absolute {
  template <class T>
  static T apply(T a) {
    return a < 0 ? T(0 - Unsigned<T>(a)) : a;
  }
};
struct AbsoluteDifference {
  template <class T>
  static T apply(T a, T b, T c) {
    return Add::apply(c, T(a < b ? Unsigned<T>(b) - Unsigned<T>(a) : Unsigned<T>(a) - Unsigned<T>(b)));
  }
};

template <class F, int kSources>
void plain(Decoder& d) {
  Type t = d.type({Type::U16, Type::U32, Type::U64, Type::S16, Type::S32, Type::S64});
  same_operands(d, t, kSources);
  if constexpr (kSources == 1)
    d.ins.run = pick_integer<Unary<F>>(t);
  else if constexpr (kSources == 2)
    d.ins.run = pick_integer<Binary<F>>(t);
  else
    d.ins.run = pick_integer<Ternary<F>>(t);
}

template <class F>
void signed_only(Decoder& d) {
  Type t = d.type({Type::S16, Type::S32, Type::S64});
  same_operands(d, t, 1);
  d.ins.run = pick_integer<Unary<F>>(t);
}

// add.cc, addc{.cc}, sub.cc, subc{.cc}. mode: whether it reads the carry, and whether it writes it.
template <class T, bool kSubtract>
void with_carry(Warp& w, const Instruction& i, uint32_t mask) {
  const T *a = w.lanes<T>(i.operand[1]), *b = w.lanes<T>(i.operand[2]);
  T* d = w.lanes<T>(i.operand[0]);
  for_lanes(mask, [&](int l) {
    Wide in = i.mode[0] ? w.carry >> l & 1 : 0;
    Wide exact = kSubtract ? Wide(a[l]) - b[l] - in : Wide(a[l]) + b[l] + in;
    d[l] = T(exact);
    bool out = exact < 0 || exact > Wide(std::numeric_limits<T>::max());
    if (i.mode[1]) w.carry = (w.carry & ~(1u << l)) | uint32_t(out) << l;
  });
}

// mad.cc, madc{.cc}. The carry is that of adding c to one half of the product.
template <class T, class Half>
void product_with_carry(Warp& w, const Instruction& i, uint32_t mask) {
  const T *a = w.lanes<T>(i.operand[1]), *b = w.lanes<T>(i.operand[2]), *c = w.lanes<T>(i.operand[3]);
  T* d = w.lanes<T>(i.operand[0]);
  for_lanes(mask, [&](int l) {
    Wide in = i.mode[0] ? w.carry >> l & 1 : 0;
    Wide exact = Wide(Unsigned<T>(Half::apply(a[l], b[l]))) + Unsigned<T>(c[l]) + in;
    d[l] = T(exact);
    bool out = exact > Wide(std::numeric_limits<Unsigned<T>>::max());
    if (i.mode[1]) w.carry = (w.carry & ~(1u << l)) | uint32_t(out) << l;
  });
}

template <class Half>
struct ProductWithCarry {
  template <class T>
  static Handler handler() {
    return product_with_carry<T, Half>;
  }
};

void decode_product_with_carry(Decoder& d, bool high, bool reads, bool writes) {
  d.ins.mode[0] = reads;
  d.ins.mode[1] = writes;
  Type t = d.type({Type::U32, Type::S32, Type::U64, Type::S64});
  same_operands(d, t, 3);
  d.ins.run = high ? pick_integer<ProductWithCarry<High>>(t) : pick_integer<ProductWithCarry<Low>>(t);
}

template <bool kSubtract>
void decode_carry(Decoder& d, bool reads, bool writes) {
  d.ins.mode[0] = reads;
  d.ins.mode[1] = writes;
  Type t = d.type({Type::U32, Type::S32, Type::U64, Type::S64});
  same_operands(d, t, 2);
  d.ins.run = bits_of(t) == 64 ? with_carry<uint64_t, kSubtract> : with_carry<uint32_t, kSubtract>;
}

template <class F, class Saturated, bool kSubtract>
void decode_sum(Decoder& d) {
  if (d.take("cc")) return decode_carry<kSubtract>(d, false, true);
  bool saturate = d.take("sat");
  d.carries_pointer();
  if (!saturate) return plain<F, 2>(d);
  d.type({Type::S32});
  same_operands(d, Type::S32, 2);
  d.ins.run = binary<Saturated, int32_t, int32_t, int32_t>;
}

template <bool kSubtract>
void decode_sum_with_carry(Decoder& d) {
  bool writes = d.take("cc");
  decode_carry<kSubtract>(d, true, writes);
}

Type twice(Type t) { return bits_of(t) == 16 ? Type::B32 : Type::B64; }

void decode_multiply(Decoder& d) {
  int part = d.choose({"lo", "hi", "wide"});
  if (part < 0) d.fail("expected .lo, .hi or .wide");
  if (part == 0) return plain<Low, 2>(d);
  if (part == 1) return plain<High, 2>(d);
  Type t = d.type({Type::U16, Type::S16, Type::U32, Type::S32});
  d.write(twice(t));
  d.read(t);
  d.read(t);
  d.ins.run = t == Type::U16   ? binary<Product, uint32_t, uint16_t, uint16_t>
              : t == Type::S16 ? binary<Product, int32_t, int16_t, int16_t>
              : t == Type::U32 ? binary<Product, uint64_t, uint32_t, uint32_t>
                               : binary<Product, int64_t, int32_t, int32_t>;
}

void decode_multiply_add(Decoder& d) {
  int part = d.choose({"lo", "hi", "wide"});
  if (part < 0) d.fail("expected .lo, .hi or .wide");
  if (part < 2 && d.take("cc")) return decode_product_with_carry(d, part == 1, false, true);
  d.carries_pointer();
  if (part == 0) return plain<LowPlus, 3>(d);
  if (part == 1 && d.take("sat")) {
    d.type({Type::S32});
    same_operands(d, Type::S32, 3);
    d.ins.run = ternary<HighPlusSaturated, int32_t, int32_t, int32_t, int32_t>;
    return;
  }
  if (part == 1) return plain<HighPlus, 3>(d);
  Type t = d.type({Type::U16, Type::S16, Type::U32, Type::S32});
  d.write(twice(t));
  d.read(t);
  d.read(t);
  d.read(twice(t));
  d.ins.run = t == Type::U16   ? ternary<ProductPlus, uint32_t, uint16_t, uint16_t, uint32_t>
              : t == Type::S16 ? ternary<ProductPlus, int32_t, int16_t, int16_t, int32_t>
              : t == Type::U32 ? ternary<ProductPlus, uint64_t, uint32_t, uint32_t, uint64_t>
                               : ternary<ProductPlus, int64_t, int32_t, int32_t, int64_t>;
}

void decode_multiply_add_with_carry(Decoder& d) {
  int part = d.choose({"lo", "hi"});
  if (part < 0) d.fail("expected .lo or .hi");
  bool writes = d.take("cc");
  decode_product_with_carry(d, part == 1, true, writes);
}

// dp4a adds four products of bytes. dp2a adds two products, each of a 16-bit half of a and a byte of b; it takes the
// upper or the lower two bytes of b.
template <class A, class B>
struct DotBytes {
  static uint32_t apply(uint32_t a, uint32_t b, uint32_t c) {
    for (int k = 0; k < 32; k += 8) c += uint32_t(int32_t(A(a >> k)) * int32_t(B(b >> k)));
    return c;
  }
};
template <class A, class B, int kShift>
struct DotHalves {
  static uint32_t apply(uint32_t a, uint32_t b, uint32_t c) {
    for (int k = 0; k < 2; ++k) c += uint32_t(int32_t(A(a >> 16 * k)) * int32_t(B(b >> (kShift + 8 * k))));
    return c;
  }
};
template <class F>
constexpr Handler dot() {
  return ternary<F, uint32_t, uint32_t, uint32_t, uint32_t>;
}

void decode_dot_bytes(Decoder& d) {
  bool a = is_signed(d.type({Type::U32, Type::S32})), b = is_signed(d.type({Type::U32, Type::S32}));
  same_operands(d, Type::B32, 3);
  d.ins.run = a   ? b ? dot<DotBytes<int8_t, int8_t>>() : dot<DotBytes<int8_t, uint8_t>>()
              : b ? dot<DotBytes<uint8_t, int8_t>>()
                  : dot<DotBytes<uint8_t, uint8_t>>();
}

template <int kShift>
Handler pick_dot_halves(bool a, bool b) {
  return a   ? b ? dot<DotHalves<int16_t, int8_t, kShift>>() : dot<DotHalves<int16_t, uint8_t, kShift>>()
         : b ? dot<DotHalves<uint16_t, int8_t, kShift>>()
             : dot<DotHalves<uint16_t, uint8_t, kShift>>();
}

void decode_dot_halves(Decoder& d) {
  int part = d.choose({"lo", "hi"});
  if (part < 0) d.fail("expected .lo or .hi");
  bool a = is_signed(d.type({Type::U32, Type::S32})), b = is_signed(d.type({Type::U32, Type::S32}));
  same_operands(d, Type::B32, 3);
  d.ins.run = part ? pick_dot_halves<16>(a, b) : pick_dot_halves<0>(a, b);
}

// mul24 and mad24: the lower or the upper 32 of the product's 48 bits.
template <class T, bool kHigh>
struct Product24 {
  static T apply(T a, T b) {
    auto low = [](T x) { return Twice<T>(T(Unsigned<T>(x) << 8) >> 8); };
    return T(low(a) * low(b) >> (kHigh ? 16 : 0));
  }
  static T apply(T a, T b, T c) { return Add::apply(apply(a, b), c); }
};

template <int kSources>
void decode_24_bits(Decoder& d) {
  int part = d.choose({"lo", "hi"});
  if (part < 0) d.fail("expected .lo or .hi");
  bool is_signed = d.type({Type::U32, Type::S32}) == Type::S32;
  same_operands(d, Type::B32, kSources);
  auto handler = [](auto of, auto t) -> Handler {
    using F = decltype(of);
    using T = decltype(t);
    if constexpr (kSources == 2)
      return binary<F, T, T, T>;
    else
      return ternary<F, T, T, T, T>;
  };
  int32_t s = 0;
  uint32_t u = 0;
  d.ins.run = is_signed ? part ? handler(Product24<int32_t, true>(), s) : handler(Product24<int32_t, false>(), s)
              : part    ? handler(Product24<uint32_t, true>(), u)
                        : handler(Product24<uint32_t, false>(), u);
}

}  // namespace

void add_integer(Opcodes& table) {
  table["add.int"] = decode_sum<Add, AddSaturated, false>;
  table["sub.int"] = decode_sum<Subtract, SubtractSaturated, true>;
  table["addc.int"] = decode_sum_with_carry<false>;
  table["subc.int"] = decode_sum_with_carry<true>;
  table["mul.int"] = decode_multiply;
  table["mad.int"] = decode_multiply_add;
  table["madc.int"] = decode_multiply_add_with_carry;
  table["div.int"] = plain<Divide, 2>;
  table["rem.int"] = plain<Remainder, 2>;
  table["min.int"] = plain<Min, 2>;
  table["max.int"] = plain<Max, 2>;
  table["sad.int"] = plain<AbsoluteDifference, 3>;
  table["neg.int"] = signed_only<Negative>;
  table["abs.int"] = signed_only<Absolute>;
  table["mul24.int"] = decode_24_bits<2>;
  table["mad24.int"] = decode_24_bits<3>;
  table["dp4a.int"] = decode_dot_bytes;
  table["dp2a.int"] = decode_dot_halves;
}

}  // namespace gpt2fast::ptx

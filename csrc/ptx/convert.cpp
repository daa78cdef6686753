// cvt. The usual conversions are loops over lanes that the compiler vectorises; all others go value by value.
#include <algorithm>
#include <limits>

#include "lanes.h"

namespace gpt2fast::ptx {
namespace {

using Wide = __int128;

enum Modes : uint8_t { kFrom, kToWidth, kFromWidth, kRounding };  // mode[…]; widths of the registers
enum Flags : int64_t { kFlushes = 1, kSaturates = 2, kRelu = 4, kSatFinite = 8, kIntegral = 16 };

uint64_t read_lane(const Warp& w, uint32_t offset, int bits, int lane) {
  if (bits == 16) return w.lanes<uint16_t>(offset)[lane];
  return bits == 32 ? w.lanes<uint32_t>(offset)[lane] : w.lanes<uint64_t>(offset)[lane];
}

void write_lane(Warp& w, uint32_t offset, int bits, int lane, uint64_t value) {
  if (bits == 16)
    w.lanes<uint16_t>(offset)[lane] = uint16_t(value);
  else if (bits == 32)
    w.lanes<uint32_t>(offset)[lane] = uint32_t(value);
  else
    w.lanes<uint64_t>(offset)[lane] = value;
}

double float_value(Type t, uint64_t bits) {
  switch (t) {
    case Type::F16:
      return half_to_float(uint16_t(bits));
    case Type::BF16:
      return bfloat_to_float(uint16_t(bits));
    case Type::F32:
      return bit_cast<float>(uint32_t(bits));
    default:
      return bit_cast<double>(bits);
  }
}

Wide integer_value(Type t, uint64_t bits) {
  int shift = 64 - bits_of(t);
  return is_signed(t) ? Wide(int64_t(bits << shift) >> shift) : Wide(bits << shift >> shift);
}

// The value of an integer type that is nearest to x.
Wide clamped(Type t, Wide x) {
  int bits = bits_of(t);
  Wide most = is_signed(t) ? (Wide(1) << (bits - 1)) - 1 : (Wide(1) << bits) - 1;
  Wide least = is_signed(t) ? -(Wide(1) << (bits - 1)) : Wide(0);
  return std::min(std::max(x, least), most);
}

double integral(double x, int mode) {
  switch (mode) {
    case kZero:
      return std::trunc(x);
    case kDown:
      return std::floor(x);
    case kUp:
      return std::ceil(x);
    default:
      return std::nearbyint(x);
  }
}

uint64_t to_integer(Type from, Type to, double x, int mode) {
  int bits = bits_of(to);
  if (x != x) return from != Type::F64 && bits != 64 ? 0 : uint64_t{1} << (bits - 1);
  x = integral(x, mode);
  if (x >= 0x1p64) return uint64_t(clamped(to, Wide(1) << 100));
  if (x <= -0x1p64) return uint64_t(clamped(to, -(Wide(1) << 100)));
  return uint64_t(clamped(to, Wide(x)));
}

// The bits of a finite or infinite number, given as a sign and m * 2^scale.
uint64_t pack(Type to, bool negative, uint64_t m, int scale, int mode) {
  switch (to) {
    case Type::F16:
      return narrow_parts<5, 10>(negative, m, scale, mode);
    case Type::BF16:
      return narrow_parts<8, 7>(negative, m, scale, mode);
    case Type::TF32:
      return narrow_parts<8, 10>(negative, m, scale, mode) << 13;
    case Type::F32:
      return narrow_parts<8, 23>(negative, m, scale, mode);
    default:
      return narrow_parts<11, 52>(negative, m, scale, mode);
  }
}

uint64_t pack(Type to, double x, int mode) {
  switch (to) {
    case Type::F16:
      return narrow<5, 10>(x, mode);
    case Type::BF16:
      return narrow<8, 7>(x, mode);
    case Type::TF32:
      return x != x ? kNanBits : narrow<8, 10>(x, mode) << 13;
    case Type::F32:
      return narrow<8, 23>(x, mode);
    default:
      return bit_cast<uint64_t>(x);
  }
}

double largest(Type t) {
  switch (t) {
    case Type::F16:
      return 65504;
    case Type::BF16:
      return 0x1.fep127;
    case Type::TF32:
      return 0x1.ffcp127;
    case Type::F32:
      return std::numeric_limits<float>::max();
    default:
      return std::numeric_limits<double>::max();
  }
}

uint64_t to_float(Type from, Type to, double x, int mode, int64_t flags) {
  if (flags & kIntegral) x = integral(x, mode);
  if (flags & kSaturates) x = saturate(x);
  if ((flags & kRelu) && x <= 0) x = 0;
  if (from == to || (flags & kIntegral)) return pack(to, x, kNearest);
  uint64_t bits = pack(to, x, mode);
  double there = to == Type::TF32 ? bit_cast<float>(uint32_t(bits)) : float_value(to, bits);
  if ((flags & kSatFinite) && std::fabs(there) > largest(to)) bits = pack(to, std::copysign(largest(to), x), kNearest);
  return bits;
}

uint64_t convert_one(Type from, Type to, uint64_t bits, int mode, int64_t flags) {
  if (is_integer(from)) {
    Wide x = integer_value(from, bits);
    if (is_integer(to)) return uint64_t(flags & kSaturates ? clamped(to, x) : x);
    uint64_t result = pack(to, x < 0, uint64_t(x < 0 ? -x : x), 0, mode);
    return flags & kSaturates ? pack(to, saturate(float_value(to, result)), kNearest) : result;
  }
  double x = float_value(from, bits);
  if ((flags & kFlushes) && from == Type::F32) x = flush(float(x));
  if (is_integer(to)) return to_integer(from, to, x, mode);
  uint64_t result = to_float(from, to, x, mode, flags);
  if ((flags & kFlushes) && to == Type::F32) result = bit_cast<uint32_t>(flush(bit_cast<float>(uint32_t(result))));
  return result;
}

void convert(Warp& w, const Instruction& i, uint32_t mask) {
  auto from = Type(i.mode[kFrom]);
  Type to = i.type;
  for_lanes(mask, [&](int l) {
    uint64_t bits = read_lane(w, i.operand[1], i.mode[kFromWidth], l);
    uint64_t result = convert_one(from, to, bits, i.mode[kRounding], i.immediate);
    if (is_integer(to)) result = uint64_t(integer_value(to, result));  // extended to the register
    write_lane(w, i.operand[0], i.mode[kToWidth], l, result);
  });
}

// d = {a, b}: a goes into the upper half.
void convert_pair(Warp& w, const Instruction& i, uint32_t mask) {
  const auto *a = w.lanes<uint32_t>(i.operand[1]), *b = w.lanes<uint32_t>(i.operand[2]);
  Type to = i.type == Type::F16x2 ? Type::F16 : Type::BF16;
  each(mask, w.lanes<uint32_t>(i.operand[0]), [&](int l) {
    uint64_t high = convert_one(Type::F32, to, a[l], i.mode[kRounding], i.immediate);
    return uint32_t(high << 16 | convert_one(Type::F32, to, b[l], i.mode[kRounding], i.immediate));
  });
}

// The usual conversions.
struct Cast {
  template <class T>
  static T apply(T a) {
    return a;
  }
};
struct ToHalf {
  static uint16_t apply(float a) { return float_to_half(a); }
};
struct ToBfloat {
  static uint16_t apply(float a) { return float_to_bfloat(a); }
};
struct FromHalf {
  static float apply(uint16_t a) { return canonical(half_to_float(a)); }
};
struct FromBfloat {
  static float apply(uint16_t a) { return canonical(bfloat_to_float(a)); }
};
template <class F>
struct ToPair {
  static uint32_t apply(float a, float b) { return uint32_t(F::apply(a)) << 16 | F::apply(b); }
};
struct Truncate {
  static int32_t apply(float a) {
    return a >= 0x1p31f ? INT32_MAX : a >= -0x1p31f ? int32_t(a) : a == a ? INT32_MIN : 0;
  }
};

template <class From>
Handler pick_extension(int to_bits) {
  return to_bits == 16   ? unary<Cast, uint16_t, From>
         : to_bits == 32 ? unary<Cast, uint32_t, From>
                         : unary<Cast, uint64_t, From>;
}

// Conversions between integers whose registers are as wide as the types.
Handler pick_extension(Type from, int to_bits) {
  switch (from) {
    case Type::U16:
      return pick_extension<uint16_t>(to_bits);
    case Type::S16:
      return pick_extension<int16_t>(to_bits);
    case Type::U32:
      return pick_extension<uint32_t>(to_bits);
    case Type::S32:
      return pick_extension<int32_t>(to_bits);
    case Type::U64:
      return pick_extension<uint64_t>(to_bits);
    case Type::S64:
      return pick_extension<int64_t>(to_bits);
    default:
      return nullptr;
  }
}

Handler pick(const Instruction& i) {
  Type from = Type(i.mode[kFrom]), to = i.type;
  bool plain = i.mode[kFromWidth] == bits_of(from) && i.mode[kToWidth] == bits_of(to);
  int64_t flags = i.immediate;
  int mode = i.mode[kRounding];
  if (!plain) return convert;
  if (flags == 0 && is_integer(from) && is_integer(to)) {
    Handler fast = pick_extension(from, bits_of(to));
    return fast ? fast : convert;
  }
  if (from == Type::F32 && to == Type::S32 && mode == kZero && !(flags & ~(kIntegral | kSaturates)))
    return unary<Truncate, int32_t, float>;
  if (flags || mode != kNearest) return convert;
  if (from == Type::F32 && to == Type::F16) return unary<ToHalf, uint16_t, float>;
  if (from == Type::F32 && to == Type::BF16) return unary<ToBfloat, uint16_t, float>;
  if (from == Type::F16 && to == Type::F32) return unary<FromHalf, float, uint16_t>;
  if (from == Type::BF16 && to == Type::F32) return unary<FromBfloat, float, uint16_t>;
  if (from == Type::S32 && to == Type::F32) return unary<Cast, float, int32_t>;
  if (from == Type::U32 && to == Type::F32) return unary<Cast, float, uint32_t>;
  return convert;
}

int64_t take_flags(Decoder& d) {
  int64_t flags = 0;
  if (d.take("ftz")) flags |= kFlushes;
  if (d.take("sat")) flags |= kSaturates;
  if (d.take("relu")) flags |= kRelu;
  if (d.take("satfinite")) flags |= kSatFinite;
  return flags;
}

void decode_pair(Decoder& d, Type to, int mode) {
  d.type({Type::F32});
  d.ins.type = to;
  same_operands(d, Type::B32, 2);
  d.own_pointer();
  bool fast = mode == kNearest && d.ins.immediate == 0;
  d.ins.run = !fast               ? convert_pair
              : to == Type::F16x2 ? binary<ToPair<ToHalf>, uint32_t, float, float>
                                  : binary<ToPair<ToBfloat>, uint32_t, float, float>;
}

bool as_float(Type t) { return is_float(t) && t != Type::F16x2 && t != Type::BF16x2; }

void decode_convert(Decoder& d) {
  d.ins.kind = Class::Convert;
  int mode = kNearest, to_integral = d.choose({"rni", "rzi", "rmi", "rpi"});
  bool rounds = d.rounding_at(&mode);
  if (to_integral >= 0) mode = to_integral;
  d.ins.immediate = take_flags(d);
  d.ins.mode[kRounding] = uint8_t(mode);
  Type to = d.type();
  if (to == Type::F16x2 || to == Type::BF16x2) {
    if (!rounds) d.fail("expected a rounding mode");
    return decode_pair(d, to, mode);
  }
  Type from = d.type();
  d.ins.type = to;
  d.ins.mode[kFrom] = uint8_t(from);
  bool known = (is_integer(from) || (as_float(from) && from != Type::TF32)) && (is_integer(to) || as_float(to));
  if (!known || (to == Type::TF32 && from != Type::F32)) d.fail("unsupported combination of types");
  bool narrows = !is_integer(to) && (is_integer(from) || bits_of(to) < bits_of(from) || to == Type::TF32 ||
                                     (bits_of(to) == 16 && from != to && bits_of(from) == 16));
  if (is_float(from) && is_integer(to) && to_integral < 0) d.fail("expected .rni, .rzi, .rmi or .rpi");
  if (narrows && !rounds && to_integral < 0) d.fail("expected a rounding mode");
  if (mode == kAway && to != Type::TF32) d.fail(".rna is for .tf32 only");
  if (to_integral >= 0) d.ins.immediate |= kIntegral;
  Operand target = d.operand();
  d.write_operand(target,
                  is_integer(to)      ? to
                  : bits_of(to) == 16 ? Type::B16
                  : bits_of(to) == 32 ? Type::B32
                                      : Type::B64,
                  false);
  d.ins.mode[kToWidth] = uint8_t(d.width);
  d.ins.mode[kFromWidth] = uint8_t(d.read_any(from));
  d.ins.run = pick(d.ins);
}

}  // namespace

void add_convert(Opcodes& table) { table["cvt"] = decode_convert; }

}  // namespace gpt2fast::ptx

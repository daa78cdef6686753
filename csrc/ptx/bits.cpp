// Logic, shifts and bit fields.
#include <algorithm>

#include "lanes.h"

namespace gpt2fast::ptx {
namespace {

struct And {
  template <class T>
  static T apply(T a, T b) {
    return T(a & b);
  }
};
struct Or {
  template <class T>
  static T apply(T a, T b) {
    return T(a | b);
  }
};
struct Xor {
  template <class T>
  static T apply(T a, T b) {
    return T(a ^ b);
  }
};
struct Not {
  template <class T>
  static T apply(T a) {
    return T(~a);
  }
};
struct IsZero {
  template <class T>
  static T apply(T a) {
    return T(a == 0);
  }
};

template <class F>
void logic_of_predicates(Warp& w, const Instruction& i, uint32_t mask) {
  uint32_t a = w.predicate(i.operand[1]), b = w.predicate(i.operand[2]);
  set_predicate(w.predicate(i.operand[0]), mask, F::apply(i.mode[0] ? ~a : a, i.mode[1] ? ~b : b));
}

void not_predicate(Warp& w, const Instruction& i, uint32_t mask) {
  uint32_t a = w.predicate(i.operand[1]);
  set_predicate(w.predicate(i.operand[0]), mask, i.mode[0] ? a : ~a);
}

template <class F>
void decode_logic(Decoder& d) {
  Type t = d.type({Type::Pred, Type::B16, Type::B32, Type::B64});
  if (t == Type::Pred) {
    d.write_predicate();
    d.ins.mode[0] = d.read_predicate();
    d.ins.mode[1] = d.read_predicate();
    d.ins.run = logic_of_predicates<F>;
    return;
  }
  same_operands(d, t, 2);
  d.carries_pointer();
  d.ins.run = pick_integer<Binary<F>>(t);
}

void decode_not(Decoder& d) {
  Type t = d.type({Type::Pred, Type::B16, Type::B32, Type::B64});
  if (t == Type::Pred) {
    d.write_predicate();
    d.ins.mode[0] = d.read_predicate();
    d.ins.run = not_predicate;
    return;
  }
  same_operands(d, t, 1);
  d.ins.run = pick_integer<Unary<Not>>(t);
}

void decode_is_zero(Decoder& d) {
  Type t = d.type({Type::B16, Type::B32, Type::B64});
  same_operands(d, t, 1);
  d.ins.run = pick_integer<Unary<IsZero>>(t);
}

// A shift by the width or more gives 0, or the sign in every bit.
struct ShiftLeft {
  template <class T>
  static T apply(T a, uint32_t n) {
    return n < 8 * sizeof(T) ? T(a << n) : T(0);
  }
};
struct ShiftRight {
  template <class T>
  static T apply(T a, uint32_t n) {
    return n < 8 * sizeof(T) ? T(a >> n) : a < 0 ? T(-1) : T(0);
  }
};
template <class F>
struct Shift {
  template <class T>
  static Handler handler() {
    return binary<F, T, T, uint32_t>;
  }
};

template <class F>
void decode_shift(Decoder& d) {
  Type t = d.type();
  if (!is_integer(t) || bits_of(t) < 16) d.fail(std::string("unsupported type .") + name_of(t));
  d.write(t);
  d.read(t);
  d.read(Type::B32);
  d.ins.run = pick_integer<Shift<F>>(t);
}

// A funnel shift of the 64 bits b:a. Left gives the upper half of the shifted value, right the lower half.
template <bool kLeft, bool kWrap>
struct Funnel {
  static uint32_t apply(uint32_t a, uint32_t b, uint32_t n) {
    n = kWrap ? n & 31 : std::min(n, 32u);
    uint64_t both = uint64_t(b) << 32 | a;
    return kLeft ? uint32_t(both << n >> 32) : uint32_t(both >> n);
  }
};

void decode_funnel(Decoder& d) {
  int side = d.choose({"l", "r"}), mode = d.choose({"clamp", "wrap"});
  if (side < 0 || mode < 0) d.fail("expected .l or .r and .clamp or .wrap");
  d.type({Type::B32});
  same_operands(d, Type::B32, 3);
  using U = uint32_t;
  d.ins.run = side == 0 ? mode ? ternary<Funnel<true, true>, U, U, U, U> : ternary<Funnel<true, false>, U, U, U, U>
              : mode    ? ternary<Funnel<false, true>, U, U, U, U>
                        : ternary<Funnel<false, false>, U, U, U, U>;
}

// lop3: bit k of the table is the result where the bits of a, b and c form the number k.
PTX_CLONES void look_up(Warp& w, const Instruction& i, uint32_t mask) {
  const auto *a = w.lanes<uint32_t>(i.operand[1]), *b = w.lanes<uint32_t>(i.operand[2]),
             *c = w.lanes<uint32_t>(i.operand[3]);
  uint32_t table[8];
  for (int k = 0; k < 8; ++k) table[k] = 0 - (uint32_t(i.immediate) >> k & 1);
  each(mask, w.lanes<uint32_t>(i.operand[0]), [=](int l) {
    uint32_t x = a[l], y = b[l], z = c[l];
    return (~x & ((~y & ((~z & table[0]) | (z & table[1]))) | (y & ((~z & table[2]) | (z & table[3]))))) |
           (x & ((~y & ((~z & table[4]) | (z & table[5]))) | (y & ((~z & table[6]) | (z & table[7])))));
  });
}

void decode_look_up(Decoder& d) {
  d.type({Type::B32});
  same_operands(d, Type::B32, 3);
  const Operand& table = d.operand();
  if (table.what != Operand::Integer || table.integer < 0 || table.integer > 255) d.fail("expected a table of 8 bits");
  d.ins.immediate = table.integer;
  d.ins.run = look_up;
}

enum Permute : int { kForward4, kBackward4, kReplicate8, kEdgeLeft, kEdgeRight, kReplicate16, kAny };

uint32_t selectors(int mode, uint32_t n) {
  n &= 3;
  uint32_t s = 0;
  for (uint32_t k = 0; k < 4; ++k) {
    uint32_t byte = mode == kForward4     ? n + k
                    : mode == kBackward4  ? (n - k) & 7
                    : mode == kReplicate8 ? n
                    : mode == kEdgeLeft   ? std::max(n, k)
                    : mode == kEdgeRight  ? std::min(n, k)
                                          : (n & 1) * 2 + (k & 1);
    s |= byte << (4 * k);
  }
  return s;
}

void permute(Warp& w, const Instruction& i, uint32_t mask) {
  const auto *a = w.lanes<uint32_t>(i.operand[1]), *b = w.lanes<uint32_t>(i.operand[2]),
             *c = w.lanes<uint32_t>(i.operand[3]);
  each(mask, w.lanes<uint32_t>(i.operand[0]), [&](int l) {
    uint64_t bytes = uint64_t(b[l]) << 32 | a[l];
    uint32_t s = i.mode[0] == kAny ? c[l] : selectors(i.mode[0], c[l]), result = 0;
    for (int k = 0; k < 4; ++k) {
      uint32_t pick = s >> (4 * k) & 15, byte = uint32_t(bytes >> (8 * (pick & 7))) & 255;
      if (pick & 8) byte = byte & 128 ? 255 : 0;  // its sign
      result |= byte << (8 * k);
    }
    return result;
  });
}

void decode_permute(Decoder& d) {
  d.type({Type::B32});
  int mode = d.choose({"f4e", "b4e", "rc8", "ecl", "ecr", "rc16"});
  d.ins.mode[0] = uint8_t(mode < 0 ? int(kAny) : mode);
  same_operands(d, Type::B32, 3);
  d.ins.run = permute;
}

// bfe: c bits of a from bit b on (b and c are 8-bit numbers). Bits beyond the width are the sign, or 0.
template <class T>
struct Extract {
  static T apply(T a, uint32_t b, uint32_t c) {
    using U = std::make_unsigned_t<T>;
    constexpr uint32_t kBits = 8 * sizeof(T);
    uint32_t from = b & 255, count = c & 255;
    if (count == 0) return 0;
    T shifted = ShiftRight::apply(a, from);
    if (count >= kBits) return shifted;
    uint32_t rest = kBits - count;
    if (!std::is_signed_v<T>) return T(U(shifted) << rest) >> rest;
    // The sign is the last bit of the field that exists.
    bool negative = U(a) >> std::min(from + count - 1, kBits - 1) & 1;
    U kept = U(shifted) & ((U(1) << count) - 1);
    return T(negative ? kept | ~((U(1) << count) - 1) : kept);
  }
};

void decode_extract(Decoder& d) {
  Type t = d.type({Type::U32, Type::S32, Type::U64, Type::S64});
  d.write(t);
  d.read(t);
  d.read(Type::B32);
  d.read(Type::B32);
  d.ins.run = t == Type::U32   ? ternary<Extract<uint32_t>, uint32_t, uint32_t, uint32_t, uint32_t>
              : t == Type::S32 ? ternary<Extract<int32_t>, int32_t, int32_t, uint32_t, uint32_t>
              : t == Type::U64 ? ternary<Extract<uint64_t>, uint64_t, uint64_t, uint32_t, uint32_t>
                               : ternary<Extract<int64_t>, int64_t, int64_t, uint32_t, uint32_t>;
}

// operand: d, the bits to insert, the value that they go into, the first bit, the number of bits
template <class T>
void insert(Warp& w, const Instruction& i, uint32_t mask) {
  constexpr uint32_t kBits = 8 * sizeof(T);
  const T *a = w.lanes<T>(i.operand[1]), *b = w.lanes<T>(i.operand[2]);
  const auto *c = w.lanes<uint32_t>(i.operand[3]), *e = w.lanes<uint32_t>(i.operand[4]);
  each(mask, w.lanes<T>(i.operand[0]), [=](int l) {
    uint32_t from = c[l] & 255, count = e[l] & 255;
    if (from >= kBits) return b[l];
    T field = count >= kBits ? T(~T(0)) : T((T(1) << count) - 1);
    return T((b[l] & ~T(field << from)) | (T(a[l] & field) << from));
  });
}

void decode_insert(Decoder& d) {
  Type t = d.type({Type::B32, Type::B64});
  d.write(t);
  d.read(t);
  d.read(t);
  d.read(Type::B32);
  d.read(Type::B32);
  d.ins.run = t == Type::B32 ? insert<uint32_t> : insert<uint64_t>;
}

struct CountOnes {
  template <class T>
  static uint32_t apply(T a) {
    return uint32_t(__builtin_popcountll(a));
  }
};
struct LeadingZeros {
  template <class T>
  static uint32_t apply(T a) {
    return a == 0 ? 8 * sizeof(T) : uint32_t(__builtin_clzll(a)) - 64 + 8 * sizeof(T);
  }
};
struct Reverse {
  template <class T>
  static T apply(T a) {
    T r = 0;
    for (size_t k = 0; k < 8 * sizeof(T); ++k) r = T(r | (a >> k & 1) << (8 * sizeof(T) - 1 - k));
    return r;
  }
};
// bfind: the most significant bit that differs from the sign, as a position or as the shift that moves it to the top.
template <class T, bool kShiftAmount>
struct FindBit {
  static uint32_t apply(T a) {
    using U = std::make_unsigned_t<T>;
    U bits = a < 0 ? U(~U(a)) : U(a);
    if (bits == 0) return 0xffffffffu;
    uint32_t zeros = LeadingZeros::apply(bits);
    return kShiftAmount ? zeros : uint32_t(8 * sizeof(T)) - 1 - zeros;
  }
};

template <class F>
void decode_count(Decoder& d) {
  Type t = d.type({Type::B32, Type::B64});
  d.write(Type::B32);
  d.read(t);
  d.ins.run = t == Type::B32 ? unary<F, uint32_t, uint32_t> : unary<F, uint32_t, uint64_t>;
}

void decode_reverse(Decoder& d) {
  Type t = d.type({Type::B32, Type::B64});
  same_operands(d, t, 1);
  d.ins.run = t == Type::B32 ? unary<Reverse, uint32_t, uint32_t> : unary<Reverse, uint64_t, uint64_t>;
}

template <bool kShiftAmount>
Handler pick_find(Type t) {
  return t == Type::U32   ? unary<FindBit<uint32_t, kShiftAmount>, uint32_t, uint32_t>
         : t == Type::S32 ? unary<FindBit<int32_t, kShiftAmount>, uint32_t, int32_t>
         : t == Type::U64 ? unary<FindBit<uint64_t, kShiftAmount>, uint32_t, uint64_t>
                          : unary<FindBit<int64_t, kShiftAmount>, uint32_t, int64_t>;
}

void decode_find(Decoder& d) {
  bool shift = d.take("shiftamt");
  Type t = d.type({Type::U32, Type::S32, Type::U64, Type::S64});
  d.write(Type::B32);
  d.read(t);
  d.ins.run = shift ? pick_find<true>(t) : pick_find<false>(t);
}

// szext: the lower n bits, extended by zeros or by the highest of them.
template <class T, bool kWrap>
struct ExtendFrom {
  static uint32_t apply(uint32_t a, uint32_t n) {
    n = kWrap ? n & 31 : std::min(n, 32u);
    return n == 0 ? 0 : uint32_t(T(a << (32 - n)) >> (32 - n));
  }
};
template <bool kWrap>
struct MakeMask {
  static uint32_t apply(uint32_t from, uint32_t count) {
    from = kWrap ? from & 31 : std::min(from, 32u);
    count = kWrap ? count & 31 : std::min(count, 32u);
    return uint32_t(((uint64_t{1} << count) - 1) << from);
  }
};

bool takes_wrap(Decoder& d) {
  int mode = d.choose({"clamp", "wrap"});
  if (mode < 0) d.fail("expected .clamp or .wrap");
  return mode == 1;
}

void decode_extend_from(Decoder& d) {
  bool wrap = takes_wrap(d), is_signed = d.type({Type::U32, Type::S32}) == Type::S32;
  same_operands(d, Type::B32, 2);
  using U = uint32_t;
  d.ins.run = is_signed
                  ? wrap ? binary<ExtendFrom<int32_t, true>, U, U, U> : binary<ExtendFrom<int32_t, false>, U, U, U>
              : wrap ? binary<ExtendFrom<U, true>, U, U, U>
                     : binary<ExtendFrom<U, false>, U, U, U>;
}

void decode_mask(Decoder& d) {
  bool wrap = takes_wrap(d);
  d.type({Type::B32});
  same_operands(d, Type::B32, 2);
  using U = uint32_t;
  d.ins.run = wrap ? binary<MakeMask<true>, U, U, U> : binary<MakeMask<false>, U, U, U>;
}

}  // namespace

void add_bits(Opcodes& table) {
  table["and"] = decode_logic<And>;
  table["or"] = decode_logic<Or>;
  table["xor"] = decode_logic<Xor>;
  table["not"] = decode_not;
  table["cnot"] = decode_is_zero;
  table["shl"] = decode_shift<ShiftLeft>;
  table["shr"] = decode_shift<ShiftRight>;
  table["shf"] = decode_funnel;
  table["lop3"] = decode_look_up;
  table["prmt"] = decode_permute;
  table["szext"] = decode_extend_from;
  table["bmsk"] = decode_mask;
  table["bfe"] = decode_extract;
  table["bfi"] = decode_insert;
  table["popc"] = decode_count<CountOnes>;
  table["clz"] = decode_count<LeadingZeros>;
  table["brev"] = decode_reverse;
  table["bfind"] = decode_find;
}

}  // namespace gpt2fast::ptx

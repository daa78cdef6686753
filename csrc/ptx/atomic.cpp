// atom and red. The lanes of a warp execute one after the other, in order. All threads see the result at once, so that
// memory order and scope matter for the race detection only.
#include <algorithm>
#include <cstring>

#include "check.h"
#include "decode.h"

namespace gpt2fast::ptx {
namespace {

enum Op : uint8_t { kAdd, kMin, kMax, kAnd, kOr, kXor, kExchange, kCompare, kIncrement, kDecrement };

// The new value that an atomic operation computes from the old value, b and, for .cas, c.
template <class T, Op kOp>
struct Whole {
  using Bits = T;
  using U = std::make_unsigned_t<T>;
  static T apply(T old, T b, T c) {
    switch (kOp) {
      case kAdd:
        return T(U(old) + U(b));
      case kMin:
        return std::min(old, b);
      case kMax:
        return std::max(old, b);
      case kAnd:
        return T(old & b);
      case kOr:
        return T(old | b);
      case kXor:
        return T(old ^ b);
      case kExchange:
        return b;
      case kCompare:
        return old == b ? c : old;
      case kIncrement:
        return old >= b ? T(0) : T(old + 1);
      case kDecrement:
        return old == 0 || old > b ? b : T(old - 1);
    }
  }
};

// An .f32 addition flushes subnormals in global memory and keeps them in shared memory.
template <bool kFlushed>
struct AddFloat {
  using Bits = uint32_t;
  static uint32_t apply(uint32_t old, uint32_t b, uint32_t) {
    auto x = bit_cast<float>(old), y = bit_cast<float>(b);
    if (!kFlushed) return bit_cast<uint32_t>(canonical(x + y));
    return bit_cast<uint32_t>(canonical(flush(flush(x) + flush(y))));
  }
};

struct AddDouble {
  using Bits = uint64_t;
  static uint64_t apply(uint64_t old, uint64_t b, uint64_t) {
    return bit_cast<uint64_t>(bit_cast<double>(old) + bit_cast<double>(b));
  }
};

// The sum of two f16 or bf16 must be rounded only once. A float is exact enough for the sum of two f16, and a double
// for that of two bf16.
struct AddHalf {
  using Bits = uint16_t;
  static uint16_t apply(uint16_t old, uint16_t b, uint16_t) {
    return float_to_half(half_to_float(old) + half_to_float(b));
  }
};
struct AddBfloat {
  using Bits = uint16_t;
  static uint16_t apply(uint16_t old, uint16_t b, uint16_t) {
    return uint16_t(narrow<8, 7>(add_to_odd(bfloat_to_float(old), bfloat_to_float(b))));
  }
};

template <class Add>
struct AddPair {
  using Bits = uint32_t;
  static uint32_t apply(uint32_t old, uint32_t b, uint32_t) {
    return Add::apply(uint16_t(old), uint16_t(b), 0) | uint32_t(Add::apply(uint16_t(old >> 16), uint16_t(b >> 16), 0))
                                                           << 16;
  }
};

// operand: [d] address b [c]; mode[0]: there is a d
template <class F>
void atomic(Warp& w, const Instruction& i, uint32_t mask) {
  using T = typename F::Bits;
  uint64_t address[kLanes];
  uint8_t* at[kLanes];
  const uint32_t* o = i.operand + i.mode[0];
  addresses(w, i, i.mode[0], address);
  uint32_t good = access(w, i, mask, address, sizeof(T), Use::Atomic, at);
  const T* b = w.lanes<T>(o[1]);
  const T* c = w.lanes<T>(i.mode[1] ? o[2] : o[1]);
  T result[kLanes] = {};
  bool changed = false;
  for_lanes(good, [&](int l) {
    T old;
    std::memcpy(&old, at[l], sizeof old);
    T fresh = F::apply(old, b[l], c[l]);
    std::memcpy(at[l], &fresh, sizeof fresh);
    result[l] = old;
    changed = changed || fresh != old;
  });
  if (changed) w.launch->wrote = true;
  if (i.mode[0]) each(mask, w.lanes<T>(i.operand[0]), [&](int l) { return result[l]; });
}

// An addition at a generic address treats subnormals as the memory space that the address lies in does.
void add_float_anywhere(Warp& w, const Instruction& i, uint32_t mask) {
  uint64_t address[kLanes];
  addresses(w, i, i.mode[0], address);
  uint32_t shared = mask & ballot([&](int l) { return address[l] - kSharedWindow < kWindowBytes; });
  if (shared) atomic<AddFloat<false>>(w, i, shared);
  if (mask & ~shared) atomic<AddFloat<true>>(w, i, mask & ~shared);
}

template <class T, Op kOp>
constexpr Handler whole() {
  return atomic<Whole<T, kOp>>;
}

template <Op kOp>
Handler pick_bits(Type t) {
  return t == Type::B32 ? whole<uint32_t, kOp>() : t == Type::B64 ? whole<uint64_t, kOp>() : nullptr;
}

template <Op kOp>
Handler pick_order(Type t) {
  switch (t) {
    case Type::U32:
      return whole<uint32_t, kOp>();
    case Type::S32:
      return whole<int32_t, kOp>();
    case Type::U64:
      return whole<uint64_t, kOp>();
    case Type::S64:
      return whole<int64_t, kOp>();
    default:
      return nullptr;
  }
}

Handler pick_add(Type t, Space space) {
  switch (t) {
    case Type::U32:
    case Type::S32:
      return whole<uint32_t, kAdd>();
    case Type::U64:
      return whole<uint64_t, kAdd>();
    case Type::F32:
      return space == Space::Shared    ? atomic<AddFloat<false>>
             : space == Space::Generic ? add_float_anywhere
                                       : atomic<AddFloat<true>>;
    case Type::F64:
      return atomic<AddDouble>;
    case Type::F16:
      return atomic<AddHalf>;
    case Type::BF16:
      return atomic<AddBfloat>;
    case Type::F16x2:
      return atomic<AddPair<AddHalf>>;
    case Type::BF16x2:
      return atomic<AddPair<AddBfloat>>;
    default:
      return nullptr;
  }
}

Handler pick(Op op, Type t, Space space) {
  switch (op) {
    case kAdd:
      return pick_add(t, space);
    case kMin:
      return pick_order<kMin>(t);
    case kMax:
      return pick_order<kMax>(t);
    case kAnd:
      return pick_bits<kAnd>(t);
    case kOr:
      return pick_bits<kOr>(t);
    case kXor:
      return pick_bits<kXor>(t);
    case kExchange:
      return pick_bits<kExchange>(t);
    case kCompare:
      return t == Type::B16 ? whole<uint16_t, kCompare>() : pick_bits<kCompare>(t);
    case kIncrement:
      return t == Type::U32 ? whole<uint32_t, kIncrement>() : nullptr;
    case kDecrement:
      return t == Type::U32 ? whole<uint32_t, kDecrement>() : nullptr;
  }
  return nullptr;
}

void decode_atomic(Decoder& d, bool result) {
  d.ins.kind = Class::Memory;
  d.ins.use = Use::Atomic;
  d.ins.order = kStrong;
  if (d.take("release") || d.take("acq_rel")) d.ins.order |= kRelease;
  if (d.take("cta")) d.ins.order |= kBlockOnly;
  for (const char* free : {"relaxed", "acquire", "gpu", "sys", "cluster"}) d.take(free);
  bool hint = d.take("L2::cache_hint");
  Space space = d.take("global")                            ? Space::Global
                : d.take("shared") || d.take("shared::cta") ? Space::Shared
                                                            : Space::Generic;
  int op = d.choose({"add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec"});
  if (op < 0) d.fail("expected an operation: .add, .min, .max, .and, .or, .xor, .exch, .cas, .inc or .dec");
  if (!result && (op == kExchange || op == kCompare)) d.fail("red has neither .exch nor .cas");
  bool keeps_subnormals = d.take("noftz");
  Type t = d.type();
  bool half = t == Type::F16 || t == Type::BF16 || t == Type::F16x2 || t == Type::BF16x2;
  if (half != keeps_subnormals) d.fail(half ? "16-bit floats need .noftz" : ".noftz is for 16-bit floats only");
  d.ins.bytes = uint8_t(bits_of(t) / 8);
  d.ins.mode[0] = result;
  d.ins.mode[1] = op == kCompare;
  if (result) d.write(t);
  d.address(space);
  d.read(t);
  if (op == kCompare) d.read(t);
  if (hint) {
    d.read(Type::B64);
    d.state.pool.pop_back();
  }
  if (space == Space::Shared || d.ins.space == Space::Shared || d.ins.space == Space::Generic)
    d.state.module.shared_grain = std::min(d.state.module.shared_grain, int(d.ins.bytes));
  d.ins.run = pick(Op(op), t, d.ins.space);
  if (!d.ins.run) d.fail(std::string("this operation does not exist for .") + name_of(t));
}

}  // namespace

void add_atomic(Opcodes& table) {
  table["atom"] = [](Decoder& d) { decode_atomic(d, true); };
  table["red"] = [](Decoder& d) { decode_atomic(d, false); };
}

}  // namespace gpt2fast::ptx

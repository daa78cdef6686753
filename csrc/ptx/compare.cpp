// setp and set: comparisons of integers, floats and halves, ordered and unordered, combined with a predicate.
#include "lanes.h"

namespace gpt2fast::ptx {
namespace {

enum Comparison : int { kEq, kNe, kLt, kLe, kGt, kGe, kEqu, kNeu, kLtu, kLeu, kGtu, kGeu, kNum, kNan };

// With a NaN, the unordered forms are true and all ordered ones are false, including .ne.
template <int kOp>
struct Compare {
  template <class T>
  static bool apply(T a, T b) {
    bool unordered = a != a || b != b;
    switch (kOp) {
      case kEq:
        return a == b;
      case kNe:
        return a != b && !unordered;
      case kLt:
        return a < b;
      case kLe:
        return a <= b;
      case kGt:
        return a > b;
      case kGe:
        return a >= b;
      case kEqu:
        return a == b || unordered;
      case kNeu:
        return a != b;
      case kLtu:
        return !(a >= b);
      case kLeu:
        return !(a > b);
      case kGtu:
        return !(a <= b);
      case kGeu:
        return !(a < b);
      case kNum:
        return !unordered;
      default:
        return unordered;
    }
  }
};

// How the bits of a register are interpreted.
template <class T>
struct Plain {
  using Bits = T;
  static T value(T x) { return x; }
};
struct Flushed {
  using Bits = float;
  static float value(float x) { return flush(x); }
};
struct Half {
  using Bits = uint16_t;
  static float value(uint16_t x) { return half_to_float(x); }
};
struct FlushedHalf {
  using Bits = uint16_t;
  static float value(uint16_t x) { return half_to_float((x & 0x7c00) ? x : uint16_t(x & 0x8000)); }
};
struct Bfloat {
  using Bits = uint16_t;
  static float value(uint16_t x) { return bfloat_to_float(x); }
};
// The lower and the upper half of a pair.
template <class H, int kShift>
struct Part {
  using Bits = uint32_t;
  static float value(uint32_t x) { return H::value(uint16_t(x >> kShift)); }
};

enum Combine : uint8_t { kAlone, kAnd, kOr, kXor };
enum Modes : uint8_t { kCombine, kNegated, kSecond, kPair };

uint32_t combined(const Instruction& i, uint32_t result, uint32_t with) {
  switch (i.mode[kCombine]) {
    case kAnd:
      return result & with;
    case kOr:
      return result | with;
    case kXor:
      return result ^ with;
    default:
      return result;
  }
}

// operand: p [q] a b [c]. q is the opposite of the comparison. For pairs, q is the result of the upper half.
template <int kOp, class V, class Upper>
PTX_CLONES void set_predicates(Warp& w, const Instruction& i, uint32_t mask) {
  const uint32_t* o = i.operand + 1 + i.mode[kSecond];
  const auto *a = w.lanes<typename V::Bits>(o[0]), *b = w.lanes<typename V::Bits>(o[1]);
  uint32_t result = ballot([=](int l) { return Compare<kOp>::apply(V::value(a[l]), V::value(b[l])); });
  uint32_t with = i.mode[kCombine] ? w.predicate(o[2]) : 0;
  if (i.mode[kNegated]) with = ~with;
  if (i.mode[kSecond]) {
    uint32_t second = ~result;
    if (i.mode[kPair])
      second = ballot([=](int l) { return Compare<kOp>::apply(Upper::value(a[l]), Upper::value(b[l])); });
    set_predicate(w.predicate(i.operand[1]), mask, combined(i, second, with));
  }
  set_predicate(w.predicate(i.operand[0]), mask, combined(i, result, with));
}

// operand: d a b [c]; true is all ones, or 1 in a float.
template <int kOp, class V>
PTX_CLONES void set_register(Warp& w, const Instruction& i, uint32_t mask) {
  const auto *a = w.lanes<typename V::Bits>(i.operand[1]), *b = w.lanes<typename V::Bits>(i.operand[2]);
  uint32_t result = ballot([=](int l) { return Compare<kOp>::apply(V::value(a[l]), V::value(b[l])); });
  uint32_t with = i.mode[kCombine] ? w.predicate(i.operand[3]) : 0;
  result = combined(i, result, i.mode[kNegated] ? ~with : with);
  auto value = uint32_t(i.immediate);
  if (i.type == Type::F16 || i.type == Type::BF16)
    each(mask, w.lanes<uint16_t>(i.operand[0]), [=](int l) { return uint16_t(result >> l & 1 ? value : 0); });
  else
    each(mask, w.lanes<uint32_t>(i.operand[0]), [=](int l) { return result >> l & 1 ? value : 0; });
}

template <int kOp, class H>
PTX_CLONES void set_pair(Warp& w, const Instruction& i, uint32_t mask) {
  const auto *a = w.lanes<uint32_t>(i.operand[1]), *b = w.lanes<uint32_t>(i.operand[2]);
  auto value = uint32_t(i.immediate);
  each(mask, w.lanes<uint32_t>(i.operand[0]), [=](int l) {
    bool low = Compare<kOp>::apply(Part<H, 0>::value(a[l]), Part<H, 0>::value(b[l]));
    bool high = Compare<kOp>::apply(Part<H, 16>::value(a[l]), Part<H, 16>::value(b[l]));
    return (low ? value : 0) | (high ? value << 16 : 0);
  });
}

struct Predicates {
  template <int kOp, class V, class Upper>
  static Handler handler() {
    return set_predicates<kOp, V, Upper>;
  }
};
struct Register {
  template <int kOp, class V, class Upper>
  static Handler handler() {
    return set_register<kOp, V>;
  }
};

template <class Make, int kOp>
Handler pick_integer_type(Type t) {
  switch (t) {
    case Type::S16:
      return Make::template handler<kOp, Plain<int16_t>, Plain<int16_t>>();
    case Type::S32:
      return Make::template handler<kOp, Plain<int32_t>, Plain<int32_t>>();
    case Type::S64:
      return Make::template handler<kOp, Plain<int64_t>, Plain<int64_t>>();
    default:
      break;
  }
  switch (bits_of(t)) {
    case 16:
      return Make::template handler<kOp, Plain<uint16_t>, Plain<uint16_t>>();
    case 32:
      return Make::template handler<kOp, Plain<uint32_t>, Plain<uint32_t>>();
    default:
      return Make::template handler<kOp, Plain<uint64_t>, Plain<uint64_t>>();
  }
}

template <class Make, int kOp>
Handler pick_type(Type t, bool flushed) {
  if (is_integer(t)) return kOp <= kGe ? pick_integer_type<Make, (kOp <= kGe ? kOp : 0)>(t) : nullptr;
  switch (t) {
    case Type::F32:
      return flushed ? Make::template handler<kOp, Flushed, Flushed>()
                     : Make::template handler<kOp, Plain<float>, Plain<float>>();
    case Type::F64:
      return Make::template handler<kOp, Plain<double>, Plain<double>>();
    case Type::F16:
      return flushed ? Make::template handler<kOp, FlushedHalf, Half>() : Make::template handler<kOp, Half, Half>();
    case Type::BF16:
      return Make::template handler<kOp, Bfloat, Bfloat>();
    case Type::F16x2:
      return flushed ? Make::template handler<kOp, Part<FlushedHalf, 0>, Part<FlushedHalf, 16>>()
                     : Make::template handler<kOp, Part<Half, 0>, Part<Half, 16>>();
    case Type::BF16x2:
      return Make::template handler<kOp, Part<Bfloat, 0>, Part<Bfloat, 16>>();
    default:
      return nullptr;
  }
}

template <class Make>
Handler pick(int op, Type t, bool flushed) {
  switch (op) {
    case kEq:
      return pick_type<Make, kEq>(t, flushed);
    case kNe:
      return pick_type<Make, kNe>(t, flushed);
    case kLt:
      return pick_type<Make, kLt>(t, flushed);
    case kLe:
      return pick_type<Make, kLe>(t, flushed);
    case kGt:
      return pick_type<Make, kGt>(t, flushed);
    case kGe:
      return pick_type<Make, kGe>(t, flushed);
    case kEqu:
      return pick_type<Make, kEqu>(t, flushed);
    case kNeu:
      return pick_type<Make, kNeu>(t, flushed);
    case kLtu:
      return pick_type<Make, kLtu>(t, flushed);
    case kLeu:
      return pick_type<Make, kLeu>(t, flushed);
    case kGtu:
      return pick_type<Make, kGtu>(t, flushed);
    case kGeu:
      return pick_type<Make, kGeu>(t, flushed);
    case kNum:
      return pick_type<Make, kNum>(t, flushed);
    default:
      return pick_type<Make, kNan>(t, flushed);
  }
}

template <class H>
Handler pick_pair(int op) {
  static constexpr Handler kHandlers[] = {set_pair<kEq, H>,  set_pair<kNe, H>,  set_pair<kLt, H>,  set_pair<kLe, H>,
                                          set_pair<kGt, H>,  set_pair<kGe, H>,  set_pair<kEqu, H>, set_pair<kNeu, H>,
                                          set_pair<kLtu, H>, set_pair<kLeu, H>, set_pair<kGtu, H>, set_pair<kGeu, H>,
                                          set_pair<kNum, H>, set_pair<kNan, H>};
  return kHandlers[op];
}

int comparison(Decoder& d) {
  int op = d.choose({"eq", "ne", "lt", "le", "gt", "ge", "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan"});
  if (op >= 0) return op;
  int unsigned_op = d.choose({"lo", "ls", "hi", "hs"});  // of unsigned integers
  if (unsigned_op < 0) d.fail("expected a comparison");
  return kLt + unsigned_op;
}

void combination(Decoder& d) { d.ins.mode[kCombine] = uint8_t(d.choose({"and", "or", "xor"}) + 1); }

Type compared(Decoder& d, bool flushed) {
  Type t = d.type();
  if (bits_of(t) < 16 || t == Type::TF32) d.fail(std::string("unsupported type .") + name_of(t));
  if (flushed && t != Type::F32 && t != Type::F16 && t != Type::F16x2) d.fail(".ftz is for .f32 and .f16 only");
  d.ins.kind = is_integer(t) ? Class::Int : t == Type::F32 || t == Type::F64 ? Class::Float : Class::Half;
  return t;
}

void read_sources(Decoder& d, Type t) {
  d.read(t);
  d.read(t);
  if (d.ins.mode[kCombine]) d.ins.mode[kNegated] = d.read_predicate();
}

void decode_predicates(Decoder& d) {
  int op = comparison(d);
  combination(d);
  bool flushed = d.take("ftz");
  Type t = compared(d, flushed);
  Operand p = d.operand();
  d.write_operand(p, Type::Pred, true);
  if (!p.pair.empty()) {
    Operand q;
    if (p.pair != "_") q.what = Operand::Name, q.name = p.pair;
    d.write_operand(q, Type::Pred, true);
    d.ins.mode[kSecond] = 1;
  }
  d.ins.mode[kPair] = t == Type::F16x2 || t == Type::BF16x2;
  read_sources(d, t);
  d.ins.run = pick<Predicates>(op, t, flushed);
}

void decode_register(Decoder& d) {
  int op = comparison(d);
  combination(d);
  bool flushed = d.take("ftz");
  Type to = d.type({Type::U32, Type::S32, Type::F32, Type::F16, Type::BF16, Type::F16x2, Type::BF16x2});
  Type t = compared(d, flushed);
  d.ins.type = to;
  d.ins.immediate = to == Type::F32                          ? 0x3f800000
                    : to == Type::F16 || to == Type::F16x2   ? 0x3c00
                    : to == Type::BF16 || to == Type::BF16x2 ? 0x3f80
                                                             : int64_t(kAllLanes);
  d.write(to);
  read_sources(d, t);
  bool pair = t == Type::F16x2 || t == Type::BF16x2;
  if (!pair && bits_of(to) == 32 && (to == Type::F16x2 || to == Type::BF16x2))
    d.fail("a pair is set by comparing pairs");
  if (!pair) {
    d.ins.run = pick<Register>(op, t, flushed);
    return;
  }
  if (d.ins.mode[kCombine]) d.fail("comparisons of pairs are not combined");
  if (bits_of(to) == 32 && is_integer(to)) d.ins.immediate = 0xffff;
  d.ins.run = t == Type::BF16x2 ? pick_pair<Bfloat>(op) : flushed ? pick_pair<FlushedHalf>(op) : pick_pair<Half>(op);
}

}  // namespace

void add_compare(Opcodes& table) {
  table["setp"] = decode_predicates;
  table["set"] = decode_register;
}

}  // namespace gpt2fast::ptx

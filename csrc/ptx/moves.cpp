// mov with packing and unpacking, selp, slct.
#include "lanes.h"

namespace gpt2fast::ptx {
namespace {

struct Same {
  template <class T>
  static T apply(T a) {
    return a;
  }
};

void move_predicate(Warp& w, const Instruction& i, uint32_t mask) {
  uint32_t a = w.predicate(i.operand[1]);
  set_predicate(w.predicate(i.operand[0]), mask, i.mode[0] ? ~a : a);
}

// d = {a, b, …}: `elements` parts of P's width; the first part is the lowest.
template <class D, class P>
PTX_CLONES void pack(Warp& w, const Instruction& i, uint32_t mask) {
  constexpr int kParts = sizeof(D) / sizeof(P);
  const P* parts[kParts];
  for (int k = 0; k < kParts; ++k) parts[k] = w.lanes<P>(i.operand[1 + k]);
  each(mask, w.lanes<D>(i.operand[0]), [&](int l) {
    D d = 0;
    for (int k = 0; k < kParts; ++k) d = D(d | D(parts[k][l]) << (8 * sizeof(P) * size_t(k)));
    return d;
  });
}

// {a, b, …} = s. A part may be the same register as s.
template <class S, class P>
PTX_CLONES void unpack(Warp& w, const Instruction& i, uint32_t mask) {
  constexpr int kParts = sizeof(S) / sizeof(P);
  S s[kLanes];
  std::memcpy(s, w.lanes<S>(i.operand[kParts]), sizeof s);
  for (int k = 0; k < kParts; ++k)
    each(mask, w.lanes<P>(i.operand[k]), [&](int l) { return P(s[l] >> (8 * sizeof(P) * size_t(k))); });
}

// The clock is the number of instructions that the launch has executed, so that every run gives the same values.
// mode[0]: the upper half.
template <class T>
void read_clock(Warp& w, const Instruction& i, uint32_t mask) {
  T now = T(w.launch->instructions >> (i.mode[0] ? 32 : 0));
  each(mask, w.lanes<T>(i.operand[0]), [=](int) { return now; });
}

// The width of the clock that the operand names, or 0 if it names none.
int clock_bits(const Operand& o) {
  const std::string& n = o.name;
  if (n == "%clock" || n == "%clock_hi" || n == "%globaltimer_lo" || n == "%globaltimer_hi") return 32;
  return n == "%clock64" || n == "%globaltimer" ? 64 : 0;
}

Type part_type(Decoder& d, Type whole, size_t parts) {
  int bits = bits_of(whole) / int(parts);
  if (bits != 16 && bits != 32) d.fail("only parts of 16 and 32 bits are supported");
  return bits == 16 ? Type::B16 : Type::B32;
}

template <bool kPack, class W, class P>
constexpr Handler of() {
  return kPack ? Handler(pack<W, P>) : Handler(unpack<W, P>);
}

template <bool kPack>
Handler pick_parts(Type whole, Type part) {
  if (bits_of(whole) == 32) return of<kPack, uint32_t, uint16_t>();
  return part == Type::B16 ? of<kPack, uint64_t, uint16_t>() : of<kPack, uint64_t, uint32_t>();
}

void decode_move(Decoder& d) {
  Type t = d.type();
  if (t == Type::Pred) {
    d.write_predicate();
    d.ins.mode[0] = d.read_predicate();
    d.ins.run = move_predicate;
    return;
  }
  if (bits_of(t) < 16) d.fail(std::string("unsupported type .") + name_of(t));
  Operand to = d.operand();
  if (to.what == Operand::Vector) {
    Type part = part_type(d, t, to.items.size());
    for (const Operand& item : to.items) d.write_operand(item, part, true);
    d.own_pointer();
    d.read(t);
    d.ins.run = pick_parts<false>(t, part);
    return;
  }
  d.write_operand(to, t, true);
  Operand from = d.operand();
  if (from.what == Operand::Vector) {
    Type part = part_type(d, t, from.items.size());
    for (const Operand& item : from.items) d.read_operand(item, part, true);
    d.ins.run = pick_parts<true>(t, part);
    return;
  }
  if (int bits = clock_bits(from)) {
    if (bits != bits_of(t)) d.fail(from.name + " has " + std::to_string(bits) + " bits");
    d.own_pointer();
    d.ins.mode[0] = from.name.size() > 3 && from.name.substr(from.name.size() - 3) == "_hi";
    d.ins.run = bits == 32 ? read_clock<uint32_t> : read_clock<uint64_t>;
    return;
  }
  d.read_operand(from, t, true);
  d.carries_pointer();
  int bits = bits_of(t);
  d.ins.run = bits == 16   ? unary<Same, uint16_t, uint16_t>
              : bits == 32 ? unary<Same, uint32_t, uint32_t>
                           : unary<Same, uint64_t, uint64_t>;
}

// operand: d, a, b, predicate
template <class T>
PTX_CLONES void select(Warp& w, const Instruction& i, uint32_t mask) {
  const T *a = w.lanes<T>(i.operand[1]), *b = w.lanes<T>(i.operand[2]);
  uint32_t p = w.predicate(i.operand[3]);
  if (i.mode[0]) p = ~p;
  each(mask, w.lanes<T>(i.operand[0]), [=](int l) { return p >> l & 1 ? a[l] : b[l]; });
}

void decode_select(Decoder& d) {
  Type t = d.type();
  if (bits_of(t) < 16) d.fail(std::string("unsupported type .") + name_of(t));
  same_operands(d, t, 2);
  d.carries_pointer();
  d.ins.mode[0] = d.read_predicate();
  d.ins.run = bits_of(t) == 16 ? select<uint16_t> : bits_of(t) == 32 ? select<uint32_t> : select<uint64_t>;
}

template <bool kFlushed>
struct BySign {
  template <class T>
  static T apply(T a, T b, int32_t c) {
    return c >= 0 ? a : b;
  }
  template <class T>
  static T apply(T a, T b, float c) {
    return (kFlushed ? flush(c) : c) >= 0 ? a : b;
  }
};

template <class C, bool kFlushed = false>
Handler pick_by_sign(int bits) {
  using F = BySign<kFlushed>;
  return bits == 16   ? ternary<F, uint16_t, uint16_t, uint16_t, C>
         : bits == 32 ? ternary<F, uint32_t, uint32_t, uint32_t, C>
                      : ternary<F, uint64_t, uint64_t, uint64_t, C>;
}

void decode_select_by_sign(Decoder& d) {
  bool flushed = d.take("ftz");
  Type t = d.type();
  if (bits_of(t) < 16) d.fail(std::string("unsupported type .") + name_of(t));
  Type by = d.type({Type::S32, Type::F32});
  if (flushed && by != Type::F32) d.fail(".ftz is for .f32 only");
  same_operands(d, t, 2);
  d.read(by);
  int bits = bits_of(t);
  d.ins.run = by == Type::S32 ? pick_by_sign<int32_t>(bits)
              : flushed       ? pick_by_sign<float, true>(bits)
                              : pick_by_sign<float>(bits);
}

}  // namespace

void add_moves(Opcodes& table) {
  table["mov"] = decode_move;
  table["selp"] = decode_select;
  table["slct"] = decode_select_by_sign;
}

}  // namespace gpt2fast::ptx

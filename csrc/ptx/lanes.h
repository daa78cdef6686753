// Handlers for instructions that treat each lane alone: d = F::apply(a, …), with the operands in PTX's order.
#pragma once
#include "clones.h"
#include "decode.h"
#include "machine.h"

namespace gpt2fast::ptx {

template <class F, class D, class A>
PTX_CLONES void unary(Warp& w, const Instruction& i, uint32_t mask) {
  const A* a = w.lanes<A>(i.operand[1]);
  each(mask, w.lanes<D>(i.operand[0]), [=](int l) { return D(F::apply(a[l])); });
}

template <class F, class D, class A, class B>
PTX_CLONES void binary(Warp& w, const Instruction& i, uint32_t mask) {
  const A* a = w.lanes<A>(i.operand[1]);
  const B* b = w.lanes<B>(i.operand[2]);
  each(mask, w.lanes<D>(i.operand[0]), [=](int l) { return D(F::apply(a[l], b[l])); });
}

template <class F, class D, class A, class B, class C>
PTX_CLONES void ternary(Warp& w, const Instruction& i, uint32_t mask) {
  const A* a = w.lanes<A>(i.operand[1]);
  const B* b = w.lanes<B>(i.operand[2]);
  const C* c = w.lanes<C>(i.operand[3]);
  each(mask, w.lanes<D>(i.operand[0]), [=](int l) { return D(F::apply(a[l], b[l], c[l])); });
}

// Decodes d, a, b, …, all of type t.
inline void same_operands(Decoder& d, Type t, int sources) {
  d.write(t);
  for (int k = 0; k < sources; ++k) d.read(t);
}

// pick<Make>(t) is Make::handler<T>(), where T is the C++ integer with the width and sign of t.
template <class Make>
Handler pick_integer(Type t) {
  switch (bits_of(t)) {
    case 16:
      return is_signed(t) ? Make::template handler<int16_t>() : Make::template handler<uint16_t>();
    case 32:
      return is_signed(t) ? Make::template handler<int32_t>() : Make::template handler<uint32_t>();
    case 64:
      return is_signed(t) ? Make::template handler<int64_t>() : Make::template handler<uint64_t>();
    default:
      return nullptr;
  }
}

template <class F>
struct Unary {
  template <class T>
  static Handler handler() {
    return unary<F, T, T>;
  }
};
template <class F>
struct Binary {
  template <class T>
  static Handler handler() {
    return binary<F, T, T, T>;
  }
};
template <class F>
struct Ternary {
  template <class T>
  static Handler handler() {
    return ternary<F, T, T, T, T>;
  }
};

}  // namespace gpt2fast::ptx

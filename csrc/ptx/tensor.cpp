// mma.sync and movmatrix. A register of a fragment is a tile: its 32 lanes are 8 rows of 16 bytes. Register 2 * kb + h
// of A holds 8 rows from row 8 * h on, and the kb-th group of columns. Register kb of B holds the kb-th group of rows,
// transposed.
#include <cstring>

#include "machine.h"
#include "tensor.h"

namespace gpt2fast::ptx {
namespace {

constexpr int kColumns = 8;  // of B and D, in all shapes

// Copies accumulators between registers and a dense matrix. For .f32 and .s32, lane (g, t) has columns 2t and 2t + 1 of
// row 8 * h + g in registers 2 * h and 2 * h + 1. For .f16, one register has both columns.
template <class C, int M>
void read_accumulators(const Warp& w, const uint32_t* operand, C* c) {
  for (int h = 0; h < M / 8; ++h) {
    const C* even = w.lanes<C>(operand[2 * h]);
    const C* odd = w.lanes<C>(operand[2 * h + 1]);
    for (int l = 0; l < kLanes; ++l) c[64 * h + 2 * l] = even[l], c[64 * h + 2 * l + 1] = odd[l];
  }
}

template <class C, int M>
void write_accumulators(Warp& w, const uint32_t* operand, const C* c) {
  for (int h = 0; h < M / 8; ++h) {
    C* even = w.lanes<C>(operand[2 * h]);
    C* odd = w.lanes<C>(operand[2 * h + 1]);
    for (int l = 0; l < kLanes; ++l) even[l] = c[64 * h + 2 * l], odd[l] = c[64 * h + 2 * l + 1];
  }
}

// A and B as float. The products of two f16, bf16, tf32 or 8-bit integers are exact in float.
template <class E, int M, int K>
void read_factors(const Warp& w, const uint32_t* a_operand, const uint32_t* b_operand, float* a, float* b) {
  constexpr int W = 16 / int(sizeof(typename E::Bits));  // columns of a register of A, rows of one of B
  float tile[8 * W];
  for (int kb = 0; kb < K / W; ++kb) {
    for (int h = 0; h < M / 8; ++h) {
      widen<E>(w.lanes<typename E::Bits>(a_operand[kb * (M / 8) + h]), tile);
      for (int r = 0; r < 8; ++r) std::memcpy(a + (8 * h + r) * K + kb * W, tile + r * W, W * sizeof(float));
    }
  }
  for (int kb = 0; kb < K / W; ++kb) {
    widen<typename E::Other>(w.lanes<typename E::Other::Bits>(b_operand[kb]), tile);
    transpose<W>(tile, b + kb * W * kColumns);
  }
}

template <class E, int M, int K>
constexpr int factor_registers() {
  return M / 8 * K * int(sizeof(typename E::Bits)) / 16;
}

template <class E, int M, int K>
PTX_CLONES void mma_f32(Warp& w, const Instruction& i, uint32_t mask) {
  if (!w.gather_all(mask)) return;
  constexpr int kD = M / 4, kA = factor_registers<E, M, K>(), kB = factor_registers<E, 8, K>();
  alignas(64) float a[M * K], b[K * kColumns], c[M * kColumns];
  read_factors<E, M, K>(w, i.operand + kD, i.operand + kD + kA, a, b);
  read_accumulators<float, M>(w, i.operand + kD + kA + kB, c);
  multiply_add<M, K>(a, b, c);
  for (float& x : c) x = canonical(x);
  write_accumulators<float, M>(w, i.operand, c);
  w.launch->tensor_flops += 2 * M * K * kColumns;
}

// Accumulators of .f16 are summed as float and rounded once.
template <int M, int K>
PTX_CLONES void mma_f16(Warp& w, const Instruction& i, uint32_t mask) {
  if (!w.gather_all(mask)) return;
  constexpr int kD = M / 8, kA = factor_registers<Half, M, K>(), kB = factor_registers<Half, 8, K>();
  alignas(64) float a[M * K], b[K * kColumns], c[M * kColumns];
  read_factors<Half, M, K>(w, i.operand + kD, i.operand + kD + kA, a, b);
  for (int h = 0; h < M / 8; ++h) widen<Half>(w.lanes<uint16_t>(i.operand[kD + kA + kB + h]), c + 64 * h);
  multiply_add<M, K>(a, b, c);
  for (int h = 0; h < M / 8; ++h) {
    auto* d = w.lanes<uint16_t>(i.operand[h]);
    for (int e = 0; e < 64; ++e) d[e] = float_to_half(c[64 * h + e]);
  }
  w.launch->tensor_flops += 2 * M * K * kColumns;
}

// The sum of the products stays below 2^24, so that float holds it exactly. mode[0]: .satfinite.
template <class E, int M, int K>
PTX_CLONES void mma_s32(Warp& w, const Instruction& i, uint32_t mask) {
  if (!w.gather_all(mask)) return;
  constexpr int kD = M / 4, kA = factor_registers<E, M, K>(), kB = factor_registers<E, 8, K>();
  alignas(64) float a[M * K], b[K * kColumns], sum[M * kColumns] = {};
  int32_t c[M * kColumns];
  read_factors<E, M, K>(w, i.operand + kD, i.operand + kD + kA, a, b);
  read_accumulators<int32_t, M>(w, i.operand + kD + kA + kB, c);
  multiply_add<M, K>(a, b, sum);
  for (int e = 0; e < M * kColumns; ++e) {
    int64_t exact = int64_t(c[e]) + int32_t(sum[e]);
    if (i.mode[0]) exact = exact > INT32_MAX ? INT32_MAX : exact < INT32_MIN ? INT32_MIN : exact;
    c[e] = int32_t(uint32_t(exact));
  }
  write_accumulators<int32_t, M>(w, i.operand, c);
  w.launch->tensor_flops += 2 * M * K * kColumns;
}

// m8n8k4: lane (g, t) has A[g][t] and B[t][g].
void mma_f64(Warp& w, const Instruction& i, uint32_t mask) {
  if (!w.gather_all(mask)) return;
  const double* a = w.lanes<double>(i.operand[2]);
  const double* b = w.lanes<double>(i.operand[3]);
  double c[64];
  read_accumulators<double, 8>(w, i.operand + 4, c);
  for (int r = 0; r < 8; ++r)
    for (int k = 0; k < 4; ++k)
      for (int n = 0; n < kColumns; ++n) c[r * 8 + n] = std::fma(a[4 * r + k], b[4 * n + k], c[r * 8 + n]);
  write_accumulators<double, 8>(w, i.operand, c);
  w.launch->tensor_flops += 2 * 8 * 8 * 4;
}

struct Shape {
  const char* name;
  Type d, a, b;  // c has the type of d
  uint8_t registers_d, registers_a, registers_b;
  Handler run;
};

constexpr Type F16 = Type::F16, BF16 = Type::BF16, TF32 = Type::TF32, F32 = Type::F32, F64 = Type::F64, S32 = Type::S32,
               S8 = Type::S8, U8 = Type::U8;
using SS = Byte<int8_t, int8_t>;
using SU = Byte<int8_t, uint8_t>;
using US = Byte<uint8_t, int8_t>;
using UU = Byte<uint8_t, uint8_t>;

const Shape kShapes[] = {
    {"m16n8k8", F16, F16, F16, 2, 2, 1, mma_f16<16, 8>},
    {"m16n8k8", F32, F16, F16, 4, 2, 1, mma_f32<Half, 16, 8>},
    {"m16n8k8", F32, BF16, BF16, 4, 2, 1, mma_f32<Bfloat, 16, 8>},
    {"m16n8k16", F16, F16, F16, 2, 4, 2, mma_f16<16, 16>},
    {"m16n8k16", F32, F16, F16, 4, 4, 2, mma_f32<Half, 16, 16>},
    {"m16n8k16", F32, BF16, BF16, 4, 4, 2, mma_f32<Bfloat, 16, 16>},
    {"m16n8k4", F32, TF32, TF32, 4, 2, 1, mma_f32<Tensor32, 16, 4>},
    {"m16n8k8", F32, TF32, TF32, 4, 4, 2, mma_f32<Tensor32, 16, 8>},
    {"m8n8k4", F64, F64, F64, 2, 1, 1, mma_f64},
    {"m8n8k16", S32, S8, S8, 2, 1, 1, mma_s32<SS, 8, 16>},
    {"m8n8k16", S32, S8, U8, 2, 1, 1, mma_s32<SU, 8, 16>},
    {"m8n8k16", S32, U8, S8, 2, 1, 1, mma_s32<US, 8, 16>},
    {"m8n8k16", S32, U8, U8, 2, 1, 1, mma_s32<UU, 8, 16>},
    {"m16n8k16", S32, S8, S8, 4, 2, 1, mma_s32<SS, 16, 16>},
    {"m16n8k16", S32, S8, U8, 4, 2, 1, mma_s32<SU, 16, 16>},
    {"m16n8k16", S32, U8, S8, 4, 2, 1, mma_s32<US, 16, 16>},
    {"m16n8k16", S32, U8, U8, 4, 2, 1, mma_s32<UU, 16, 16>},
    {"m16n8k32", S32, S8, S8, 4, 4, 2, mma_s32<SS, 16, 32>},
    {"m16n8k32", S32, S8, U8, 4, 4, 2, mma_s32<SU, 16, 32>},
    {"m16n8k32", S32, U8, S8, 4, 4, 2, mma_s32<US, 16, 32>},
    {"m16n8k32", S32, U8, U8, 4, 4, 2, mma_s32<UU, 16, 32>},
};

void expect_registers(Decoder& d, int got, int expected, const char* operand) {
  if (got != expected)
    d.fail(std::string("expected ") + std::to_string(expected) + " registers in " + operand + ", got " +
           std::to_string(got));
}

void decode_mma(Decoder& d) {
  d.ins.kind = Class::Tensor;
  d.ins.sync = true;
  if (!d.take("sync") || !d.take("aligned")) d.fail("expected mma.sync.aligned");
  std::string shape = d.next_modifier();
  if (!shape.empty()) d.drop_modifier();
  if (!d.take("row") || !d.take("col")) d.fail("expected .row.col");
  bool saturate = d.take("satfinite");
  Type result = d.type(), a = d.type(), b = d.type(), c = d.type();
  const Shape* found = nullptr;
  for (const Shape& s : kShapes)
    if (shape == s.name && result == s.d && a == s.a && b == s.b) found = &s;
  if (!found || c != result || (saturate && result != S32)) d.fail("unsupported combination of shape and types");
  Type held = result == F64 ? Type::B64 : Type::B32;
  expect_registers(d, d.write_vector(held), found->registers_d, "d");
  expect_registers(d, d.read_vector(held), found->registers_a, "a");
  expect_registers(d, d.read_vector(held), found->registers_b, "b");
  expect_registers(d, d.read_vector(held), found->registers_d, "c");
  d.own_pointer();
  d.ins.mode[0] = saturate;
  d.ins.type = result;
  d.ins.run = found->run;
}

void move_matrix(Warp& w, const Instruction& i, uint32_t mask) {
  if (!w.gather_all(mask)) return;
  uint16_t t[64];
  transpose<8>(w.lanes<uint16_t>(i.operand[1]), t);
  std::memcpy(w.lanes<uint16_t>(i.operand[0]), t, sizeof t);
}

void decode_move_matrix(Decoder& d) {
  d.ins.sync = true;
  if (!d.take("sync") || !d.take("aligned") || !d.take("m8n8") || !d.take("trans"))
    d.fail("expected movmatrix.sync.aligned.m8n8.trans.b16");
  d.type({Type::B16});
  d.write(Type::B32);
  d.read(Type::B32);
  d.ins.run = move_matrix;
}

}  // namespace

void add_tensor(Opcodes& table) {
  table["mma"] = decode_mma;
  table["movmatrix"] = decode_move_matrix;
  table["ldmatrix"] = decode_load_matrix;
}

}  // namespace gpt2fast::ptx

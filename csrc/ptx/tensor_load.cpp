// ldmatrix. Eight lanes give the addresses of the 8 rows of a matrix, of 16 bytes each. A register gets the matrix row
// by row, so that lane (g, t) has elements 2t and 2t + 1 of row g.
#include <cstring>

#include "check.h"
#include "tensor.h"

namespace gpt2fast::ptx {
namespace {

template <bool kTransposed>
void load_matrix(Warp& w, const Instruction& i, uint32_t mask) {
  if (!w.gather_all(mask)) return;
  uint64_t address[kLanes];
  uint8_t* at[kLanes];
  uint32_t matrices = i.mode[0], lanes = matrices == 4 ? kAllLanes : (1u << 8 * matrices) - 1;
  addresses(w, i, matrices, address);
  if (i.space == Space::Generic) {
    uint32_t outside = 0;
    for_lanes(lanes, [&](int l) { outside |= uint32_t(address[l] - kSharedWindow >= kWindowBytes) << l; });
    if (outside) {
      w.refuse("ldmatrix reads shared memory only, and the address of a row lies outside it", outside);
      return;
    }
    for (uint64_t& a : address) a -= kSharedWindow;
  }
  uint32_t good = access_shared(w, i, lanes, address, 16, Use::Read, at);
  for (uint32_t m = 0; m < matrices; ++m) {
    uint16_t rows[64] = {};
    for (int r = 0; r < 8; ++r)
      if (good >> (8 * m + uint32_t(r)) & 1) std::memcpy(rows + 8 * r, at[8 * m + uint32_t(r)], 16);
    auto* d = w.lanes<uint16_t>(i.operand[m]);
    if (kTransposed)
      transpose<8>(rows, d);
    else
      std::memcpy(d, rows, sizeof rows);
  }
}

}  // namespace

void decode_load_matrix(Decoder& d) {
  d.ins.kind = Class::Memory;
  d.ins.sync = true;
  if (!d.take("sync") || !d.take("aligned") || !d.take("m8n8")) d.fail("expected ldmatrix.sync.aligned.m8n8");
  int matrices = d.take("x1") ? 1 : d.take("x2") ? 2 : d.take("x4") ? 4 : 0;
  if (matrices == 0) d.fail("expected .x1, .x2 or .x4");
  bool transposed = d.take("trans");
  bool shared = d.take("shared") || d.take("shared::cta");
  d.type({Type::B16});
  int registers = d.write_vector(Type::B32);
  if (registers != matrices)
    d.fail("expected " + std::to_string(matrices) + " destinations, got " + std::to_string(registers));
  d.ins.bytes = 16;
  d.ins.use = Use::Read;
  d.ins.mode[0] = uint8_t(matrices);
  d.address(shared ? Space::Shared : Space::Generic);
  d.ins.run = transposed ? load_matrix<true> : load_matrix<false>;
}

}  // namespace gpt2fast::ptx

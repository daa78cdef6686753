// ld and st of every memory space, cvta, isspacep, prefetch and cache policies. The last two change nothing here.
#include "check.h"
#include "decode.h"

namespace gpt2fast::ptx {
namespace {

// operand: destinations, address. S: as stored; D: the register.
template <class S, class D>
void load(Warp& w, const Instruction& i, uint32_t mask) {
  uint64_t address[kLanes];
  uint8_t* at[kLanes];
  uint32_t n = i.elements;
  addresses(w, i, n, address);
  uint32_t good = access(w, i, mask, address, n * sizeof(S), Use::Read, at);
  for (uint32_t e = 0; e < n; ++e) {
    D* d = w.lanes<D>(i.operand[e]);
    if (good != mask) each(mask & ~good, d, [](int) { return D(0); });
    each(good, d, [&](int l) {
      S s;
      std::memcpy(&s, at[l] + e * sizeof(S), sizeof(S));
      return D(s);
    });
  }
}

// A kernel parameter is the same for all lanes. The decoder has checked its bounds.
template <class S, class D>
void load_param(Warp& w, const Instruction& i, uint32_t mask) {
  const uint8_t* base = w.launch->config.params.data() + i.immediate;
  for (uint32_t e = 0; e < i.elements; ++e) {
    S s;
    std::memcpy(&s, base + e * sizeof(S), sizeof(S));
    each(mask, w.lanes<D>(i.operand[e]), [=](int) { return D(s); });
    if (sizeof(S) == 8 && e == 0 && i.target) {
      uint32_t b = w.launch->find_buffer(uint64_t(s));
      w.pointers[i.target] = b == kNone || b > 65000 ? uint16_t{0} : uint16_t(b + 1);
    }
  }
}

// operand: address, sources
template <class S, class R>
void store(Warp& w, const Instruction& i, uint32_t mask) {
  uint64_t address[kLanes];
  uint8_t* at[kLanes];
  uint32_t n = i.elements;
  addresses(w, i, 0, address);
  uint32_t good = access(w, i, mask, address, n * sizeof(S), Use::Write, at);
  for (uint32_t e = 0; e < n; ++e) {
    const R* r = w.lanes<R>(i.operand[1 + e]);
    for_lanes(good, [&](int l) {
      S s = S(r[l]);
      std::memcpy(at[l] + e * sizeof(S), &s, sizeof(S));
    });
  }
}

template <class S>
Handler pick_load(int width, bool param) {
  if (width == 16) return param ? load_param<S, uint16_t> : load<S, uint16_t>;
  if (width == 32) return param ? load_param<S, uint32_t> : load<S, uint32_t>;
  return param ? load_param<S, uint64_t> : load<S, uint64_t>;
}

template <class S>
Handler pick_store(int width) {
  return width == 16 ? store<S, uint16_t> : width == 32 ? store<S, uint32_t> : store<S, uint64_t>;
}

Handler pick_load(Type t, int width, bool param) {
  switch (bits_of(t)) {
    case 8:
      return is_signed(t) ? pick_load<int8_t>(width, param) : pick_load<uint8_t>(width, param);
    case 16:
      return is_signed(t) ? pick_load<int16_t>(width, param) : pick_load<uint16_t>(width, param);
    case 32:
      return is_signed(t) ? pick_load<int32_t>(width, param) : pick_load<uint32_t>(width, param);
    default:
      return pick_load<uint64_t>(width, param);
  }
}

Handler pick_store(Type t, int width) {
  switch (bits_of(t)) {
    case 8:
      return pick_store<uint8_t>(width);
    case 16:
      return pick_store<uint16_t>(width);
    case 32:
      return pick_store<uint32_t>(width);
    default:
      return pick_store<uint64_t>(width);
  }
}

// The modifiers for memory order, scope and caching. Accesses happen in program order and at once here, so that order
// and scope matter for the race detection only.
void memory_modifiers(Decoder& d) {
  if (d.take("volatile") || d.take("relaxed") || d.take("acquire")) d.ins.order |= kStrong;
  if (d.take("release")) d.ins.order |= kStrong | kRelease;
  if (d.take("cta")) d.ins.order |= kBlockOnly;
  static const char* const kFree[] = {"weak",
                                      "gpu",
                                      "sys",
                                      "cluster",
                                      "nc",
                                      "ca",
                                      "cg",
                                      "cs",
                                      "lu",
                                      "cv",
                                      "wb",
                                      "wt",
                                      "L1::evict_normal",
                                      "L1::evict_unchanged",
                                      "L1::evict_first",
                                      "L1::evict_last",
                                      "L1::no_allocate",
                                      "L2::cache_hint",
                                      "L2::64B",
                                      "L2::128B",
                                      "L2::256B",
                                      "L2::evict_last",
                                      "L2::evict_first",
                                      "L2::evict_normal",
                                      "unified"};
  for (const char* m : kFree)
    if (d.take(m) && std::string_view(m) == "L2::cache_hint") d.ins.mode[2] = 1;
}

Space space_of(Decoder& d) {
  static const std::pair<const char*, Space> kSpaces[] = {
      {"global", Space::Global},      {"shared", Space::Shared},    {"shared::cta", Space::Shared},
      {"local", Space::Local},        {"const", Space::Const},      {"param", Space::Param},
      {"param::entry", Space::Param}, {"param::func", Space::Param}};
  for (auto [name, space] : kSpaces)
    if (d.take(name)) return space;
  return Space::Generic;
}

void note_grain(Decoder& d, Space space, int bytes) {
  if (space == Space::Shared || space == Space::Generic)
    d.state.module.shared_grain = std::min(d.state.module.shared_grain, bytes);
}

Type element_type(Decoder& d) {
  d.ins.elements = d.take("v2") ? 2 : d.take("v4") ? 4 : 1;
  Type t = d.type();
  if (t == Type::Pred || t == Type::F16x2 || t == Type::BF16x2 || t == Type::TF32)
    d.fail(std::string("unsupported type .") + name_of(t));
  d.ins.bytes = uint8_t(bits_of(t) / 8);
  if (d.ins.bytes * d.ins.elements > 16) d.fail("a vector has at most 16 bytes");
  return t;
}

void cache_policy(Decoder& d) {
  if (!d.ins.mode[2]) return;
  d.read(Type::B64);
  d.state.pool.pop_back();
}

void decode_load(Decoder& d) {
  d.ins.kind = Class::Memory;
  memory_modifiers(d);
  Space space = space_of(d);
  Type t = element_type(d);
  int n = d.write_vector(t, false), width = d.width;
  if (n != d.ins.elements)
    d.fail("expected " + std::to_string(d.ins.elements) + " destinations, got " + std::to_string(n));
  uint16_t pointer = space == Space::Param ? d.own_pointer() : uint16_t{0};
  d.address(space);
  note_grain(d, d.ins.space, d.ins.bytes * d.ins.elements);
  cache_policy(d);
  bool fixed = d.ins.space == Space::Param && d.fixed_param();
  if (fixed) d.ins.target = pointer;
  d.ins.run = pick_load(t, width, fixed);
}

void decode_store(Decoder& d) {
  d.ins.kind = Class::Memory;
  d.ins.use = Use::Write;
  memory_modifiers(d);
  Space space = space_of(d);
  if (space == Space::Const) d.fail("constant memory cannot be written");
  Type t = element_type(d);
  d.address(space);
  int n = d.read_vector(t, false), width = d.width;
  if (n != d.ins.elements) d.fail("expected " + std::to_string(d.ins.elements) + " sources, got " + std::to_string(n));
  if (width == 8) width = 16;
  note_grain(d, d.ins.space, d.ins.bytes * d.ins.elements);
  cache_policy(d);
  d.ins.run = pick_store(t, width);
}

template <class T>
void shift_window(Warp& w, const Instruction& i, uint32_t mask) {
  const T* a = w.lanes<T>(i.operand[1]);
  T by = T(i.immediate);
  each(mask, w.lanes<T>(i.operand[0]), [=](int l) { return T(a[l] + by); });
}

void decode_cvta(Decoder& d) {
  bool to = d.take("to");
  Space space = space_of(d);
  Type t = d.type({Type::U64, Type::U32});
  if (t == Type::U32) d.fail("only 64-bit generic addresses are supported");
  d.write(t);
  d.read(t);
  d.carries_pointer();
  uint64_t window = space == Space::Shared ? kSharedWindow : space == Space::Local ? kLocalWindow : 0;
  if (space == Space::Param && !d.state.function.entry) window = kLocalWindow;
  d.ins.immediate = int64_t(to ? 0 - window : window);
  d.ins.run = shift_window<uint64_t>;
}

void is_space(Warp& w, const Instruction& i, uint32_t mask) {
  const auto* a = w.lanes<uint64_t>(i.operand[1]);
  Space space = i.space;
  set_predicate(w.predicate(i.operand[0]), mask, ballot([=](int l) {
                  bool shared = a[l] - kSharedWindow < kWindowBytes, local = a[l] - kLocalWindow < kWindowBytes;
                  return space == Space::Shared  ? shared
                         : space == Space::Local ? local
                                                 : space == Space::Global && !shared && !local;
                }));
}

void decode_is_space(Decoder& d) {
  d.ins.space = space_of(d);
  Space space = d.ins.space;
  if (space == Space::Generic || space == Space::Const || space == Space::Param)
    d.fail("expected .global, .shared or .local");
  d.write_predicate();
  d.read(Type::U64);
  d.ins.run = is_space;
}

void nothing(Warp&, const Instruction&, uint32_t) {}

void decode_prefetch(Decoder& d) {
  d.ins.kind = Class::Memory;
  space_of(d);
  if (!d.take("L1") && !d.take("L2") && !d.take("L2::evict_last") && !d.take("L2::evict_normal"))
    d.fail("expected .L1 or .L2");
  d.address(Space::Generic);
  d.ins.run = nothing;
}

// A cache policy is a number that only loads and stores use, and here they ignore it.
void policy(Warp& w, const Instruction& i, uint32_t mask) {
  each(mask, w.lanes<uint64_t>(i.operand[0]), [](int) { return uint64_t{0}; });
}

void decode_policy(Decoder& d) {
  if (!d.take("fractional")) d.fail("expected .fractional");
  if (!d.take("L2::evict_last") && !d.take("L2::evict_first") && !d.take("L2::evict_normal") &&
      !d.take("L2::evict_unchanged"))
    d.fail("expected an eviction priority");
  d.take("L2::evict_unchanged");
  d.type({Type::B64});
  d.write(Type::B64);
  if (d.left()) d.read(Type::F32);
  d.ins.run = policy;
}

}  // namespace

void add_memory(Opcodes& table) {
  table["ld"] = decode_load;
  table["ldu"] = decode_load;
  table["st"] = decode_store;
  table["cvta"] = decode_cvta;
  table["isspacep"] = decode_is_space;
  table["prefetch"] = decode_prefetch;
  table["prefetchu"] = decode_prefetch;
  table["createpolicy"] = decode_policy;
}

}  // namespace gpt2fast::ptx

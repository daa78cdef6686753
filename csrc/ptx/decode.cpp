// The decoder's modifiers and operands, and the table of opcodes.
#include "decode.h"

#include <cstring>

namespace gpt2fast::ptx {
namespace {

const std::map<std::string, Special> kSpecials = {{"%tid.x", Special::TidX},
                                                  {"%tid.y", Special::TidY},
                                                  {"%tid.z", Special::TidZ},
                                                  {"%ntid.x", Special::NtidX},
                                                  {"%ntid.y", Special::NtidY},
                                                  {"%ntid.z", Special::NtidZ},
                                                  {"%ctaid.x", Special::CtaidX},
                                                  {"%ctaid.y", Special::CtaidY},
                                                  {"%ctaid.z", Special::CtaidZ},
                                                  {"%nctaid.x", Special::NctaidX},
                                                  {"%nctaid.y", Special::NctaidY},
                                                  {"%nctaid.z", Special::NctaidZ},
                                                  {"%laneid", Special::LaneId},
                                                  {"%warpid", Special::WarpId},
                                                  {"%nwarpid", Special::NWarpId},
                                                  {"%smid", Special::SmId},
                                                  {"%nsmid", Special::NSmId},
                                                  {"%gridid", Special::GridId},
                                                  {"%lanemask_eq", Special::LaneMaskEq},
                                                  {"%lanemask_lt", Special::LaneMaskLt},
                                                  {"%lanemask_le", Special::LaneMaskLe},
                                                  {"%lanemask_gt", Special::LaneMaskGt},
                                                  {"%lanemask_ge", Special::LaneMaskGe},
                                                  {"%dynamic_smem_size", Special::DynamicSharedBytes},
                                                  {"%total_smem_size", Special::TotalSharedBytes}};

}  // namespace

uint32_t allocate_register(Module& module, int bits) {
  uint32_t bytes = bits == 1 ? 4 : uint32_t(kLanes * bits / 8), align = bits == 1 ? 4 : 64;
  uint32_t offset = (module.register_bytes + align - 1) / align * align;
  module.register_bytes = offset + bytes;
  return offset;
}

uint32_t FunctionState::constant(uint64_t value, int bits) {
  if (bits < 64 && bits > 1) value &= (uint64_t{1} << bits) - 1;
  auto [it, fresh] = constants.try_emplace({bits, value}, 0);
  if (fresh) {
    it->second = allocate_register(module, bits);
    function.constants.push_back({it->second, uint8_t(bits), value});
  }
  return it->second;
}

uint32_t FunctionState::special(Special what, int bits, uint64_t plus) {
  auto [it, fresh] = specials.try_emplace({int(what) * 128 + bits, plus}, 0);
  if (fresh) {
    it->second = allocate_register(module, bits);
    function.specials.push_back({what, it->second, uint8_t(bits), plus});
  }
  return it->second;
}

uint32_t FunctionState::sink(int bits) {
  uint32_t& offset = scratch[bits == 1 ? 2 : bits == 64];
  if (offset == 0) offset = allocate_register(module, bits == 1 ? 1 : bits == 64 ? 64 : 32);
  return offset;
}

void Scopes::open() {
  parents_.push_back(stack_.empty() ? kNone : stack_.back());
  stack_.push_back(uint32_t(tables_.size()));
  tables_.emplace_back();
}

void Scopes::close() { stack_.pop_back(); }

bool Scopes::declare(const std::string& name, const Symbol& symbol) {
  return tables_[stack_.back()].emplace(name, symbol).second;
}

const Symbol* Scopes::find(const std::string& name) const {
  for (size_t i = stack_.size(); i-- > 0;) {
    const auto& table = tables_[stack_[i]];
    auto it = table.find(name);
    if (it != table.end()) return &it->second;
  }
  return nullptr;
}

Decoder::Decoder(FunctionState& s, const Cursor& cursor, uint32_t line, Instruction& instruction, std::string opcode,
                 std::vector<Operand> operands)
    : ins(instruction),
      state(s),
      cursor_(cursor),
      line_(line),
      written_opcode_(opcode),
      operands_(std::move(operands)) {
  size_t begin = opcode.find('.');
  opcode_ = opcode.substr(0, begin);
  while (begin != std::string::npos) {
    size_t end = opcode.find('.', begin + 1);
    modifiers_.push_back(opcode.substr(begin + 1, end == std::string::npos ? end : end - begin - 1));
    begin = end;
  }
}

void Decoder::decode() {
  Type last;
  auto it = opcodes().end();
  if (!modifiers_.empty() && type_from(modifiers_.back(), &last))
    it = opcodes().find(opcode_ + (is_integer(last) || last == Type::Pred     ? ".int"
                                   : bits_of(last) == 64 || last == Type::F32 ? ".float"
                                                                              : ".half"));
  if (it == opcodes().end()) it = opcodes().find(opcode_);
  if (it == opcodes().end()) fail("unknown or unsupported instruction");
  it->second(*this);
  if (!modifiers_.empty()) fail("unsupported modifier ." + modifiers_.front());
  if (next_ != operands_.size())
    fail("expected " + std::to_string(next_) + " operands, got " + std::to_string(operands_.size()));
  if (!ins.run) fail("unsupported combination of modifiers");
  ins.pointer = pointer_of_result_;
  if (carries_ && pointer_of_result_)
    for (size_t i = 0; i < pointers_read_.size() && i < 2; ++i) ins.pointer_from[i] = pointers_read_[i];
}

bool Decoder::take(std::string_view modifier) {
  for (size_t i = 0; i < modifiers_.size(); ++i) {
    if (modifiers_[i] == modifier) {
      modifiers_.erase(modifiers_.begin() + long(i));
      return true;
    }
  }
  return false;
}

int Decoder::choose(std::initializer_list<std::string_view> modifiers) {
  int i = 0;
  for (std::string_view m : modifiers) {
    if (!modifiers_.empty() && modifiers_.front() == m) {
      drop_modifier();
      return i;
    }
    ++i;
  }
  return -1;
}

Type Decoder::type(std::initializer_list<Type> allowed) {
  Type t;
  if (modifiers_.empty()) fail("a type is missing");
  if (!type_from(modifiers_.front(), &t)) fail("expected a type, got unsupported modifier ." + modifiers_.front());
  bool good = allowed.size() == 0;
  for (Type a : allowed) good = good || a == t;
  if (!good) fail(std::string("unsupported type .") + name_of(t));
  drop_modifier();
  return ins.type = t;
}

bool Decoder::rounding_at(int* rounding) {
  int r = choose({"rn", "rz", "rm", "rp", "rna"});
  if (r >= 0) *rounding = r;
  return r >= 0;
}

int Decoder::rounding() {
  int r = kNearest;
  rounding_at(&r);
  return r;
}

Operand& Decoder::operand() {
  if (next_ >= operands_.size()) fail("too few operands: got " + std::to_string(operands_.size()));
  return operands_[next_++];
}

const Symbol* Decoder::symbol(const Operand& o) const { return o.name.empty() ? nullptr : state.scopes.find(o.name); }

bool Decoder::is_register(const Operand& o) const {
  const Symbol* s = o.what == Operand::Name ? symbol(o) : nullptr;
  return s && s->what == Symbol::Register;
}

void Decoder::write_operand(const Operand& o, Type t, bool exact) {
  int bits = bits_of(t);
  if (o.what == Operand::Sink) {
    width = bits == 64 ? 64 : 32;
    return add(state.sink(bits));
  }
  const Symbol* s = o.what == Operand::Name ? symbol(o) : nullptr;
  if (!s || s->what != Symbol::Register)
    fail("the destination must be a register, got " + (o.name.empty() ? "an immediate" : o.name));
  width = bits_of(s->type);
  if ((width == 1) != (bits == 1) || (exact ? width != bits : width < bits))
    fail("." + std::string(name_of(t)) + " needs a destination of " + (exact ? "" : "at least ") +
         std::to_string(bits) + " bits, " + o.name + " is ." + name_of(s->type));
  if (s->pointer) (pointer_of_result_ ? ins.pointer_beside : pointer_of_result_) = s->pointer;
  add(uint32_t(s->value));
}

void Decoder::read_operand(const Operand& o, Type t, bool exact) {
  int bits = bits_of(t);
  width = bits;
  switch (o.what) {
    case Operand::Integer: {
      uint64_t value = uint64_t(o.integer);
      if (t == Type::F32) {
        float f = float(o.integer);
        uint32_t b;
        std::memcpy(&b, &f, 4);
        value = b;
      }
      if (t == Type::F64) {
        double d = double(o.integer);
        std::memcpy(&value, &d, 8);
      }
      return add(state.constant(bits == 1 ? (o.integer ? kAllLanes : 0) : value, bits == 8 ? (width = 16) : bits));
    }
    case Operand::Real: {
      double d = o.real;
      uint64_t value = 0;
      if (o.single) {
        value = uint64_t(o.integer);
        if (bits == 64) {
          std::memcpy(&value, &d, 8);
        }
      } else if (bits == 64)
        std::memcpy(&value, &d, 8);
      else if (bits == 32) {
        float f = float(d);
        std::memcpy(&value, &f, 4);
      } else if (t == Type::BF16)
        value = narrow<8, 7>(d);
      else
        value = narrow<5, 10>(d);
      return add(state.constant(value, bits));
    }
    case Operand::Name:
      break;
    default:
      fail("expected a register or an immediate");
  }
  if (o.name[0] == '%') {
    auto it = kSpecials.find(o.name);
    if (it != kSpecials.end()) {
      width = exact && bits != 32 ? bits : 32;
      return add(state.special(it->second, width));
    }
  }
  if (o.name == "WARP_SZ") return add(state.constant(kLanes, bits));
  const Symbol* s = symbol(o);
  if (!s) fail((o.name[0] == '%' ? "unknown register " : "unknown name ") + o.name);
  if (s->what != Symbol::Register) {
    width = bits >= 64 ? 64 : 32;
    switch (s->what) {
      case Symbol::Dynamic:
        return add(state.special(Special::DynamicSharedStart, width, uint64_t(o.integer)));
      case Symbol::KernelParam:
        return add(state.special(Special::ParamStart, width, s->value + uint64_t(o.integer)));
      case Symbol::Callee:
        fail("indirect calls are not supported: " + o.name);
      default:
        return add(state.constant(s->value + uint64_t(o.integer), width));
    }
  }
  width = bits_of(s->type);
  if ((width == 1) != (bits == 1) || (exact ? width != bits : width < bits))
    fail("." + std::string(name_of(t)) + " needs " + (exact ? "" : "at least ") + std::to_string(bits) + " bits, " +
         o.name + " is ." + name_of(s->type));
  note_pointer(*s);
  add(uint32_t(s->value));
}

void Decoder::note_pointer(const Symbol& s) {
  if (s.pointer) pointers_read_.push_back(s.pointer);
}

void Decoder::write(Type t) { write_operand(operand(), t, true); }
void Decoder::read(Type t) { read_operand(operand(), t, true); }

int Decoder::write_any(int least_bits) {
  write_operand(operand(),
                least_bits <= 8    ? Type::B8
                : least_bits <= 16 ? Type::B16
                : least_bits <= 32 ? Type::B32
                                   : Type::B64,
                false);
  return width;
}

int Decoder::read_any(Type t) {
  read_operand(operand(), t, false);
  return width;
}

void Decoder::write_predicate() { write_operand(operand(), Type::Pred, true); }

bool Decoder::read_predicate() {
  const Operand& o = operand();
  read_operand(o, Type::Pred, true);
  return o.negated;
}

int Decoder::write_vector(Type t, bool exact) {
  Operand o = operand();
  if (o.what != Operand::Vector) return write_operand(o, t, exact), 1;
  int widest = 0;
  for (const Operand& item : o.items) {
    write_operand(item, t, exact);
    if (item.what == Operand::Sink) continue;
    if (widest && widest != width) fail("the registers of a vector must be equally wide");
    widest = width;
  }
  if (widest) width = widest;
  return int(o.items.size());
}

int Decoder::read_vector(Type t, bool exact) {
  Operand o = operand();
  if (o.what != Operand::Vector) return read_operand(o, t, exact), 1;
  int widest = 0;
  for (const Operand& item : o.items) {
    read_operand(item, t, exact);
    if (item.what != Operand::Name) continue;
    if (widest && widest != width) fail("the registers of a vector must be equally wide");
    widest = width;
  }
  if (widest && widest != bits_of(t)) {
    for (const Operand& item : o.items)
      if (item.what != Operand::Name) fail("an immediate beside registers wider than the type");
  }
  if (widest) width = widest;
  return int(o.items.size());
}

void Decoder::address(Space space) {
  Operand o = operand();
  if (o.what == Operand::Name) o.what = Operand::Address;
  if (o.what != Operand::Address) fail("expected an address in brackets");
  ins.space = space;
  const Symbol* s = symbol(o);
  if (!o.name.empty() && !s) fail("unknown name " + o.name);
  if (s && s->what == Symbol::Register) {
    int bits = bits_of(s->type);
    if (bits != 32 && bits != 64)
      fail("an address register must have 32 or 64 bits, " + o.name + " is ." + name_of(s->type));
    ins.wide_address = bits == 64;
    ins.immediate = o.integer;
    ins.target = s->pointer;
    add(uint32_t(s->value));
    if (space == Space::Param && !state.function.entry) ins.space = Space::Local;
    return;
  }
  ins.wide_address = true;
  ins.immediate = o.integer;
  if (!s) return add(state.constant(0, 64));
  if (s->what == Symbol::Callee) fail("expected a variable, " + o.name + " is a function");
  bool fits = space == Space::Generic ||
              (space == Space::Shared && (s->what == Symbol::Shared || s->what == Symbol::Dynamic)) ||
              ((space == Space::Local || space == Space::Param) && s->what == Symbol::Local) ||
              (space == Space::Param && s->what == Symbol::KernelParam) ||
              (s->what == Symbol::Memory && s->variable->space == space);
  if (!fits) fail(o.name + " is not in ." + name_of(space));
  if (space == Space::Generic)
    ins.space = s->what == Symbol::Local                                  ? Space::Local
                : s->what == Symbol::Shared || s->what == Symbol::Dynamic ? Space::Shared
                : s->what == Symbol::KernelParam                          ? Space::Param
                                                                          : s->variable->space;
  if (s->what == Symbol::Local) ins.space = Space::Local;
  if (s->what == Symbol::KernelParam && space == Space::Param) {
    fixed_param_ = true;
    ins.immediate += int64_t(s->value);
    if (ins.immediate < 0 || ins.immediate + ins.bytes * ins.elements > int64_t(state.function.param_bytes))
      fail("reads outside the parameters");
  }
  Operand base = o;
  base.what = Operand::Name;
  base.integer = 0;
  read_operand(base, Type::B64, true);
}

void Decoder::fail(const std::string& why) const { cursor_.fail_at(line_, written_opcode_ + ": " + why); }

const Opcodes& opcodes() {
  static const Opcodes table = [] {
    Opcodes t;
    for (auto add : {add_integer, add_bits, add_moves, add_floating, add_half, add_special, add_compare, add_convert,
                     add_memory, add_async_copy, add_atomic, add_tensor, add_warp, add_control, add_barrier})
      add(t);
    return t;
  }();
  return table;
}

}  // namespace gpt2fast::ptx

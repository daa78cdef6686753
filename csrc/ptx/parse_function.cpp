// Function bodies: scopes, registers, variables, labels and instructions.
#include <algorithm>
#include <cstring>

#include "parse.h"

namespace gpt2fast::ptx {
namespace {

bool knows(const std::string& opcode) {
  for (const char* kind : {"", ".int", ".float", ".half"})
    if (opcodes().count(opcode + kind)) return true;
  return false;
}

}  // namespace

void Parser::body(uint32_t index) {
  cursor_.expect('{');
  Function function = std::move(module_.functions[index]);
  FunctionState state{module_, function, scopes_, {}, {}, {}, {}, {}, {}, {}};
  Body body;
  body.function = index;
  scopes_.open();
  module_.register_bytes = (module_.register_bytes + 4095) / 4096 * 4096;
  function.shared_bytes = shared_end_;
  labels_.clear();
  locations_ = {};
  for (const std::vector<Parameter>* list : {&function.params, &function.results}) {
    for (const Parameter& p : *list) {
      Symbol s;
      s.what = function.entry ? Symbol::KernelParam : Symbol::Local;
      s.type = p.type;
      s.value = p.offset;
      declare(p.name, s);
    }
  }
  for (int depth = 1; depth > 0;) {
    if (cursor_.done()) cursor_.fail("function " + function.name + " has no end");
    if (cursor_.accept('{')) {
      scopes_.open();
      ++depth;
    } else if (cursor_.accept('}')) {
      if (--depth > 0) scopes_.close();
    } else if (!cursor_.accept(';')) {
      statement(state, body, function.name);
    }
  }
  scopes_.close();
  for (size_t i = 0; i < state.branches.size(); ++i) {
    const auto& [at, label] = state.branches[i];
    uint32_t scope = state.branch_scopes[i];
    auto it = labels_.find({scope, label});
    while (it == labels_.end() && scope != kNone) {
      scope = scopes_.parent(scope);
      it = labels_.find({scope, label});
    }
    if (it == labels_.end()) cursor_.fail_at(body.code[at].line, "unknown label " + label);
    body.targets.emplace_back(at, it->second);
  }
  // The end of a function returns, as ret does.
  if (body.code.empty() || body.code.back().guard != kNone || !labels_.empty()) {
    Instruction last;
    last.line = cursor_.line;
    state.pool_start.push_back(uint32_t(state.pool.size()));
    Decoder(state, cursor_, cursor_.line, last, "ret", {}).decode();
    body.code.push_back(last);
  }
  locations_.give(body.code);
  auto pool = std::make_unique<uint32_t[]>(state.pool.size() + 1);
  std::copy(state.pool.begin(), state.pool.end(), pool.get());
  for (size_t i = 0; i < body.code.size(); ++i) body.code[i].operand = pool.get() + state.pool_start[i];
  module_.operands.push_back(std::move(pool));
  if (!function.entry) shared_end_ = function.shared_bytes;
  module_.functions[index] = std::move(function);
  bodies_.push_back(std::move(body));
}

void Parser::statement(FunctionState& state, Body& body, const std::string&) {
  cursor_.skip();
  uint32_t line = cursor_.line;
  size_t begin = cursor_.at;
  if (cursor_.peek() == '@') return instruction(state, body, "", line, begin);
  if (cursor_.peek() == '.') return body_directive(state, cursor_.directive());
  std::string first = cursor_.dotted();
  if (first.empty()) cursor_.fail("expected an instruction");
  if (cursor_.peek() == ':') {
    cursor_.accept(':');
    if (!labels_.emplace(std::make_pair(scopes_.current(), first), uint32_t(body.code.size())).second)
      cursor_.fail_at(line, "label " + first + " is defined twice");
    return;
  }
  instruction(state, body, first, line, begin);
}

void Parser::body_directive(FunctionState& state, const std::string& name) {
  if (name == ".loc") return locations_.read(cursor_);
  if (name == ".reg") return declare_registers(state);
  if (name == ".local" || name == ".param") return declare_local(state);
  if (name == ".shared") return declare_shared(state);
  if (name == ".file") return file();
  if (name == ".pragma") {
    cursor_.string();
    return cursor_.expect(';');
  }
  if (name == ".global" || name == ".const") return variable(name == ".global" ? Space::Global : Space::Const, false);
  cursor_.fail("unsupported directive " + name);
}

void Parser::declare_registers(FunctionState& state) {
  std::string type_name = cursor_.directive();
  Type type;
  if (type_name.empty() || !type_from(std::string_view(type_name).substr(1), &type))
    cursor_.fail("unsupported register type " + type_name);
  if (bits_of(type) == 8) cursor_.fail("registers of 8 bits do not exist");
  auto one = [&](const std::string& name) {
    Symbol s;
    s.type = type;
    s.value = allocate_register(module_, bits_of(type));
    if (bits_of(type) == 64 && module_.pointer_slots < 65535) s.pointer = uint16_t(module_.pointer_slots++);
    (void)state;
    declare(name, s);
  };
  do {
    std::string name = cursor_.name();
    if (!cursor_.accept('<')) {
      one(name);
      continue;
    }
    int64_t count = cursor_.integer();
    cursor_.expect('>');
    for (int64_t i = 0; i < count; ++i) one(name + std::to_string(i));
  } while (cursor_.accept(','));
  cursor_.expect(';');
}

void Parser::declare_local(FunctionState&) {
  Declaration d = declaration();
  if (d.unsized) cursor_.fail(d.name + " needs a size");
  Symbol s;
  s.what = Symbol::Local;
  s.type = d.type;
  s.value = local_place(d.bytes, d.align);
  declare(d.name, s);
  cursor_.expect(';');
}

void Parser::declare_shared(FunctionState& state) {
  Declaration d = declaration();
  Symbol s;
  s.what = d.unsized ? Symbol::Dynamic : Symbol::Shared;
  s.type = d.type;
  if (d.unsized) {
    module_.uses_dynamic_shared = true;
  } else {
    s.value = (state.function.shared_bytes + d.align - 1) / d.align * d.align;
    state.function.shared_bytes = uint32_t(s.value + d.bytes);
  }
  declare(d.name, s);
  cursor_.expect(';');
}

void Parser::instruction(FunctionState& state, Body& body, std::string opcode, uint32_t line, size_t begin) {
  Instruction ins;
  if (cursor_.accept('@')) {
    ins.guard_negated = cursor_.accept('!');
    std::string name = cursor_.name();
    const Symbol* p = scopes_.find(name);
    if (!p || p->what != Symbol::Register || p->type != Type::Pred)
      cursor_.fail("the guard must be a predicate, got " + name);
    ins.guard = uint32_t(p->value);
    opcode = cursor_.dotted();
    if (opcode.empty()) cursor_.fail("expected an instruction");
  }
  ins.line = line;
  locations_.note();
  std::vector<Operand> operands;
  std::string& error = state.function.error;
  try {
    if (!cursor_.accept(';')) {
      do operands.push_back(operand());
      while (cursor_.accept(','));
      cursor_.expect(';');
    }
  } catch (const SyntaxError&) {  // the operands of an unknown instruction may be of an unknown kind
    if (knows(opcode.substr(0, opcode.find('.')))) throw;
    if (error.empty()) error = cursor_.error(line, opcode + ": unknown or unsupported instruction");
    while (!cursor_.done() && !cursor_.accept(';')) cursor_.advance();
    return;
  }
  ins.begin = uint32_t(begin);
  ins.end = uint32_t(cursor_.at);
  state.pool_start.push_back(uint32_t(state.pool.size()));
  Decoder decoder(state, cursor_, line, ins, opcode, std::move(operands));
  size_t branches = state.branches.size();
  try {
    decoder.decode();
  } catch (const SyntaxError& e) {  // a kernel that can reach this instruction is refused at its launch
    if (error.empty()) error = e.what();
  }
  for (; branches < state.branches.size(); ++branches) {
    state.branches[branches].first = body.code.size();
    state.branch_scopes.push_back(scopes_.current());
  }
  body.code.push_back(ins);
}

void Parser::number(Operand& o) {
  bool negative = cursor_.accept('-');
  cursor_.skip();
  char kind = cursor_.peek(1);
  if (cursor_.peek() == '0' && (kind == 'f' || kind == 'F' || kind == 'd' || kind == 'D')) {
    size_t digits = kind == 'f' || kind == 'F' ? 8 : 16;
    uint64_t bits = 0;
    for (size_t i = 0; i < digits; ++i) {
      char c = cursor_.peek(2 + i);
      if (!std::isxdigit(static_cast<unsigned char>(c)))
        cursor_.fail("a hexadecimal float needs " + std::to_string(digits) + " digits");
      bits = bits * 16 + uint64_t(std::isdigit(static_cast<unsigned char>(c)) ? c - '0' : (c | 32) - 'a' + 10);
    }
    cursor_.at += 2 + digits;
    o.what = Operand::Real;
    if (digits == 8) {
      auto narrow_bits = uint32_t(bits);
      float f;
      std::memcpy(&f, &narrow_bits, 4);
      o.single = true;
      o.integer = int64_t(negative ? bits ^ 0x80000000u : bits);
      o.real = negative ? -f : f;
    } else {
      std::memcpy(&o.real, &bits, 8);
      if (negative) o.real = -o.real;
    }
    return;
  }
  size_t end = cursor_.at;
  while (std::isdigit(static_cast<unsigned char>(cursor_.text[end]))) ++end;
  char c = cursor_.text[end];
  if (c == '.' || c == 'e' || c == 'E') {
    size_t used = 0;
    o.what = Operand::Real;
    try {
      o.real = std::stod(cursor_.text.substr(cursor_.at, 64), &used) * (negative ? -1 : 1);
    } catch (const std::exception&) {
      cursor_.fail("bad number");
    }
    cursor_.at += used;
    return;
  }
  o.what = Operand::Integer;
  o.integer = cursor_.integer();
  if (negative) o.integer = int64_t(0 - uint64_t(o.integer));
}

Operand Parser::operand() {
  Operand o;
  cursor_.skip();
  char c = cursor_.peek();
  if (c == '{' || c == '(') {
    o.what = Operand::Vector;
    cursor_.accept(c);
    char close = c == '{' ? '}' : ')';
    while (!cursor_.accept(close)) {
      o.items.push_back(operand());
      cursor_.accept(',');
    }
    return o;
  }
  if (c == '[') {
    cursor_.accept('[');
    Operand inner = operand();
    if (inner.what != Operand::Name && inner.what != Operand::Integer) cursor_.fail("expected an address");
    o.what = Operand::Address;
    o.name = inner.name;
    o.integer = inner.integer;
    cursor_.expect(']');
    return o;
  }
  if (c == '-' || std::isdigit(static_cast<unsigned char>(c))) return number(o), o;
  o.negated = cursor_.accept('!');
  o.name = cursor_.name();
  if (o.name == "_") {
    o.name.clear();
    if (cursor_.accept('|')) o.pair = cursor_.name();
    return o;
  }
  o.what = Operand::Name;
  while (cursor_.peek() == '.' && o.name[0] == '%') o.name += cursor_.dotted();  // %tid.x
  if (cursor_.accept('|')) o.pair = cursor_.name();
  cursor_.skip();
  if (cursor_.peek() == '+' || (cursor_.peek() == '-' && cursor_.peek(1) != '-')) {
    bool minus = cursor_.peek() == '-';
    ++cursor_.at;
    int64_t n = cursor_.integer();
    o.integer = int64_t(minus ? 0 - uint64_t(n) : uint64_t(n));
  }
  return o;
}

}  // namespace gpt2fast::ptx

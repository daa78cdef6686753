// Module directives, variables with their initial values, and the order of functions in memory.
#include "parse.h"

#include <algorithm>
#include <cstring>

namespace gpt2fast::ptx {
namespace {

constexpr int kNewestMajor = 9, kNewestMinor = 0, kNewestTarget = 90;

uint64_t align_up(uint64_t n, uint64_t align) { return (n + align - 1) / align * align; }

}  // namespace

Module::Module(std::string t) : text(std::move(t)) { Parser(*this).parse(); }

const Function& Module::kernel(const std::string& name) const {
  auto it = kernels.find(name);
  if (it != kernels.end()) return functions[it->second];
  std::string names;
  for (const auto& k : kernels) names += (names.empty() ? "" : ", ") + k.first;
  throw std::invalid_argument("no kernel '" + name + "' in this module; it has: " + names);
}

std::string Module::source_of(const Instruction& i) const {
  auto it = files.find(i.file);
  if (it == files.end() || i.source_line == 0) return "";
  return it->second.substr(it->second.find_last_of('/') + 1) + ":" + std::to_string(i.source_line);
}

std::string Module::text_of(const Instruction& i) const {
  std::string out;
  for (size_t at = i.begin; at < i.end; ++at) {
    if (text.compare(at, 2, "//") == 0) {
      while (at < i.end && text[at] != '\n') ++at;
    }
    bool blank = at >= i.end || std::isspace(static_cast<unsigned char>(text[at]));
    if (!blank)
      out += text[at];
    else if (!out.empty() && out.back() != ' ')
      out += ' ';
  }
  return out;
}

void Parser::parse() {
  while (!cursor_.done()) {
    std::string name = cursor_.directive();
    if (name.empty()) cursor_.fail("expected a directive");
    directive(name);
  }
  link();
}

void Parser::directive(const std::string& name) {
  if (name == ".version") return version();
  if (name == ".target") return target();
  if (name == ".address_size") {
    if (cursor_.integer() != 64) cursor_.fail("only 64-bit addresses are supported");
    return;
  }
  if (name == ".file") return file();
  if (name == ".loc" || name == ".pragma") return cursor_.skip_line();
  if (name == ".section") {
    cursor_.dotted();
    return cursor_.skip_braces();
  }
  bool external = false;
  std::string word = name;
  while (word == ".visible" || word == ".extern" || word == ".weak" || word == ".common") {
    external = external || word == ".extern";
    word = cursor_.directive();
  }
  if (word == ".entry") return function(true);
  if (word == ".func") return function(false);
  if (word == ".global") return variable(Space::Global, external);
  if (word == ".const") return variable(Space::Const, external);
  if (word == ".shared") return variable(Space::Shared, external);
  cursor_.fail("unsupported directive " + word);
}

void Parser::version() {
  int64_t major = cursor_.integer();
  cursor_.expect('.');
  int64_t minor = cursor_.integer();
  if (major > kNewestMajor || (major == kNewestMajor && minor > kNewestMinor))
    cursor_.fail("PTX ISA " + std::to_string(major) + "." + std::to_string(minor) +
                 " is newer than the newest supported, " + std::to_string(kNewestMajor) + "." +
                 std::to_string(kNewestMinor));
}

void Parser::target() {
  std::string name = cursor_.name();
  size_t used = 0;
  int number = 0;
  if (name.compare(0, 3, "sm_") == 0 && std::isdigit(static_cast<unsigned char>(name[3 < name.size() ? 3 : 0])))
    number = std::stoi(name.substr(3), &used);
  if (number == 0 || used + 3 != name.size() || number > kNewestTarget)
    cursor_.fail("target " + name + " is not supported: compile for sm_80 (sm_" + std::to_string(kNewestTarget) +
                 " at most)");
  while (cursor_.accept(',')) cursor_.name();
}

void Parser::file() {
  auto index = uint32_t(cursor_.integer());
  module_.files[index] = cursor_.string();
  cursor_.skip_line();
}

Declaration Parser::declaration() {
  Declaration d;
  uint64_t elements = 1;
  for (std::string word = cursor_.directive(); !word.empty(); word = cursor_.directive()) {
    if (word == ".align")
      d.align = uint64_t(cursor_.integer());
    else if (word == ".v2")
      elements = 2;
    else if (word == ".v4")
      elements = 4;
    else if (word == ".ptr" || word == ".global" || word == ".shared" || word == ".const" || word == ".local" ||
             word == ".attribute" || word == ".relocatable")
      continue;
    else if (!type_from(std::string_view(word).substr(1), &d.type))
      cursor_.fail("expected a type, got " + word);
  }
  d.name = cursor_.word();
  if (d.name.empty()) cursor_.fail("expected the name of a variable");
  uint64_t unit = uint64_t(bits_of(d.type)) / 8;
  while (cursor_.accept('[')) {
    if (cursor_.accept(']')) {
      d.unsized = true;
      continue;
    }
    elements *= uint64_t(cursor_.integer());
    cursor_.expect(']');
  }
  d.align = std::max(d.align, unit);
  d.bytes = d.unsized ? 0 : unit * elements;
  return d;
}

void Parser::declare(const std::string& name, const Symbol& symbol) {
  if (!scopes_.declare(name, symbol)) cursor_.fail(name + " is declared twice");
}

void Parser::variable(Space space, bool external) {
  Declaration d = declaration();
  Symbol s;
  s.type = d.type;
  if (space == Space::Shared) {
    if (external || d.unsized) {
      s.what = Symbol::Dynamic;
      module_.uses_dynamic_shared = true;
    } else {
      s.what = Symbol::Shared;
      s.value = align_up(shared_end_, d.align);
      shared_end_ = uint32_t(s.value + d.bytes);
    }
    declare(d.name, s);
    return cursor_.expect(';');
  }
  if (external) cursor_.fail("variable " + d.name + " is defined in another module");
  auto v = std::make_unique<Variable>();
  v->name = d.name;
  v->space = space;
  v->bytes = d.bytes;
  v->storage.resize((d.bytes + 15) / 8 + 1);
  if (cursor_.accept('=')) initialise(*v, d.type);
  s.what = Symbol::Memory;
  s.value = v->address();
  s.variable = v.get();
  declare(d.name, s);
  module_.variables.push_back(std::move(v));
  cursor_.expect(';');
}

void Parser::initialise(Variable& v, Type type) {
  size_t unit = size_t(bits_of(type)) / 8;
  std::vector<char> bytes;
  auto value = [&] {
    Operand o = operand();
    uint64_t bits = uint64_t(o.integer);
    if (o.what == Operand::Name) {
      bool wrapped = o.name == "generic" && cursor_.accept('(');
      if (wrapped) o = operand(), cursor_.expect(')');
      const Symbol* s = scopes_.find(o.name);
      if (!s || s->what != Symbol::Memory) cursor_.fail("expected a variable with an address, got " + o.name);
      bits = s->value + uint64_t(o.integer);
    } else if (o.what == Operand::Real && !o.single) {
      float f = float(o.real);
      if (unit == 8)
        std::memcpy(&bits, &o.real, 8);
      else
        bits = 0, std::memcpy(&bits, &f, 4);
    }
    bytes.insert(bytes.end(), reinterpret_cast<char*>(&bits), reinterpret_cast<char*>(&bits) + unit);
  };
  int depth = 0;
  do {
    while (cursor_.accept('{')) ++depth;
    value();
    while (depth > 0 && cursor_.accept('}')) --depth;
  } while (cursor_.accept(','));
  if (v.bytes == 0) {
    v.bytes = bytes.size();
    v.storage.resize((v.bytes + 15) / 8 + 1);
  }
  if (bytes.size() > v.bytes) cursor_.fail(v.name + " has more initial values than elements");
  std::memcpy(v.storage.data(), bytes.data(), bytes.size());
  v.initialised = true;
}

std::vector<Parameter> Parser::parameters(Function& f) {
  std::vector<Parameter> list;
  if (!cursor_.accept('(')) return list;
  while (!cursor_.accept(')')) {
    std::string space = cursor_.directive();
    if (space != ".param") cursor_.fail("expected .param, got " + space);
    Declaration d = declaration();
    uint64_t offset = f.entry ? align_up(f.param_bytes, d.align) : local_place(d.bytes, d.align);
    if (f.entry) f.param_bytes = uint32_t(offset + d.bytes);
    list.push_back({d.name, d.type, uint32_t(d.bytes), uint32_t(d.align), uint32_t(offset)});
    cursor_.accept(',');
  }
  return list;
}

void Parser::attributes(Function& f) {
  for (;;) {
    cursor_.skip();
    if (cursor_.peek() != '.') return;
    std::string word = cursor_.directive();
    if (word == ".noreturn") continue;
    if (word != ".maxntid" && word != ".reqntid" && word != ".minnctapersm" && word != ".maxnreg" &&
        word != ".maxnctapersm")
      cursor_.fail("unsupported directive " + word);
    uint64_t product = 1;
    do product *= uint64_t(cursor_.integer());
    while (cursor_.accept(','));
    if (word == ".maxntid" || word == ".reqntid") f.max_threads = uint32_t(product);
  }
}

void Parser::function(bool entry) {
  Function f;
  f.entry = entry;
  f.first = kNone;
  std::vector<Parameter> results = parameters(f);
  f.name = cursor_.name();
  const Symbol* known = scopes_.find(f.name);
  uint32_t index = known ? uint32_t(known->value) : uint32_t(module_.functions.size());
  std::vector<Parameter> params = parameters(f);
  attributes(f);
  if (!known) {
    f.results = std::move(results);
    f.params = std::move(params);
    Symbol s;
    s.what = Symbol::Callee;
    s.value = index;
    declare(f.name, s);
    module_.functions.push_back(std::move(f));
  } else {  // the parameters stay where the declaration put them; they get the names of the definition
    Function& declared = module_.functions[index];
    if (declared.params.size() != params.size() || declared.results.size() != results.size())
      cursor_.fail(f.name + " is defined with other parameters than declared");
    for (size_t i = 0; i < params.size(); ++i) declared.params[i].name = params[i].name;
    for (size_t i = 0; i < results.size(); ++i) declared.results[i].name = results[i].name;
  }
  if (cursor_.accept(';')) return;
  if (entry) module_.kernels[module_.functions[index].name] = index;
  body(index);
}

uint64_t Parser::local_place(uint64_t bytes, uint64_t align) {
  uint64_t place = align_up(module_.local_bytes, align);
  module_.local_bytes = uint32_t(place + bytes);
  return place;
}

// Puts callees before callers. Lanes inside a call then have the lowest program counters, so that the others wait for
// them.
void Parser::link() {
  std::vector<int> state(module_.functions.size(), 0);
  std::vector<Body*> order, body_of(module_.functions.size(), nullptr);
  for (Body& b : bodies_) body_of[b.function] = &b;
  std::function<void(uint32_t)> visit = [&](uint32_t index) {
    Function& f = module_.functions[index];
    if (state[index] == 2) return;
    if (!body_of[index]) throw SyntaxError("function " + f.name + " is called but not defined");
    if (state[index] == 1) throw SyntaxError("function " + f.name + " is recursive, which is not supported");
    state[index] = 1;
    for (uint32_t callee : f.calls) visit(callee);
    state[index] = 2;
    if (body_of[index]) order.push_back(body_of[index]);
  };
  for (Body& b : bodies_) visit(b.function);
  uint32_t widest = shared_end_;
  for (Body* b : order) {
    Function& f = module_.functions[b->function];
    f.first = uint32_t(module_.code.size());
    f.count = uint32_t(b->code.size());
    for (auto [at, target] : b->targets) b->code[at].target = f.first + target;
    for (Instruction& i : b->code) i.function = b->function;
    module_.code.insert(module_.code.end(), b->code.begin(), b->code.end());
    widest = std::max(widest, f.shared_bytes);
  }
  module_.dynamic_shared_start = uint32_t(align_up(widest, 128));
  module_.local_bytes = uint32_t(align_up(module_.local_bytes, 16));
}

}  // namespace gpt2fast::ptx

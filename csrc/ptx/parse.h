// The parser's parts: module directives and variables (parse.cpp), function bodies (parse_function.cpp).
#pragma once
#include "decode.h"
#include "locations.h"

namespace gpt2fast::ptx {

// A variable as declared: .space .align N .type name[dims] = {…}
struct Declaration {
  std::string name;
  Type type = Type::B8;
  uint64_t align = 1, bytes = 0;
  bool unsized = false;
};

class Parser {
 public:
  explicit Parser(Module& module) : module_(module), cursor_(module.text) {}
  void parse();

 private:
  struct Body {
    uint32_t function;
    std::vector<Instruction> code;
    std::vector<std::pair<size_t, uint32_t>> targets;  // instruction, its target within the function
  };

  void directive(const std::string& name);
  void version();
  void target();
  void file();
  void variable(Space space, bool external);
  Declaration declaration();
  void initialise(Variable& variable, Type type);
  void function(bool entry);
  std::vector<Parameter> parameters(Function& f);
  void attributes(Function& f);

  void body(uint32_t index);
  void statement(FunctionState& state, Body& body, const std::string& first);
  void body_directive(FunctionState& state, const std::string& name);
  void declare_registers(FunctionState& state);
  void declare_local(FunctionState& state);
  void declare_shared(FunctionState& state);
  void instruction(FunctionState& state, Body& body, std::string opcode, uint32_t line, size_t begin);
  Operand operand();
  void number(Operand& o);
  uint64_t local_place(uint64_t bytes, uint64_t align);
  void declare(const std::string& name, const Symbol& symbol);
  void link();

  Module& module_;
  Cursor cursor_;
  Scopes scopes_;
  std::vector<Body> bodies_;
  uint32_t shared_end_ = 0;  // of module-level .shared variables
  Locations locations_;
  std::map<std::pair<uint32_t, std::string>, uint32_t> labels_;
};

}  // namespace gpt2fast::ptx

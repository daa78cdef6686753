// Translates an instruction from text to an Instruction. Each opcode has a decoder, which takes the modifiers and the
// operands one after the other. If anything is left over, that is an error, and the error names it.
#pragma once
#include <functional>
#include <initializer_list>
#include <utility>

#include "cursor.h"
#include "module.h"
#include "numbers.h"

namespace gpt2fast::ptx {

// What a name stands for.
struct Symbol {
  enum What : uint8_t { Register, Shared, Dynamic, Local, KernelParam, Memory, Callee } what = Register;
  Type type = Type::B32;
  uint64_t value = 0;  // offset in the register file, address in the space, index of the function
  uint16_t pointer = 0;
  Variable* variable = nullptr;
};

struct Operand {
  enum What : uint8_t { Name, Integer, Real, Vector, Address, Sink } what = Sink;
  std::string name;            // Name; Address: its base, or empty
  std::string pair;            // b in a|b
  bool negated = false;        // !a
  int64_t integer = 0;         // Integer; Address: what is added
  double real = 0;             // Real
  bool single = false;         // Real written 0f: integer holds its bits
  std::vector<Operand> items;  // Vector
};

class Scopes;

// What decoders need to know about the function that they are in.
struct FunctionState {
  Module& module;
  Function& function;
  Scopes& scopes;
  std::vector<uint32_t> pool;                            // operands of all its instructions
  std::vector<uint32_t> pool_start;                      // per instruction
  std::vector<std::pair<size_t, std::string>> branches;  // instruction, label
  std::vector<uint32_t> branch_scopes;
  std::map<std::pair<int, uint64_t>, uint32_t> constants;
  std::map<std::pair<int, uint64_t>, uint32_t> specials;
  std::unordered_map<uint64_t, uint16_t> pointer_slots;
  uint32_t scratch[3] = {0, 0, 0};  // registers for unwanted results: 32 bits, 64 bits, a predicate

  uint32_t constant(uint64_t value, int bits);
  uint32_t special(Special what, int bits, uint64_t plus = 0);
  uint32_t sink(int bits);
};

class Scopes {
 public:
  Scopes() { open(); }
  void open();
  void close();
  uint32_t current() const { return stack_.back(); }
  uint32_t parent(uint32_t scope) const { return parents_[scope]; }
  bool declare(const std::string& name, const Symbol& symbol);  // false: the name is declared already
  const Symbol* find(const std::string& name) const;

 private:
  std::vector<uint32_t> stack_, parents_;
  std::vector<std::unordered_map<std::string, Symbol>> tables_;
};

uint32_t allocate_register(Module& module, int bits);

class Decoder {
 public:
  Decoder(FunctionState& state, const Cursor& cursor, uint32_t line, Instruction& instruction, std::string opcode,
          std::vector<Operand> operands);
  void decode();

  Instruction& ins;
  FunctionState& state;

  // Modifiers
  bool take(std::string_view modifier);
  int choose(std::initializer_list<std::string_view> modifiers);  // which is next, -1 for none
  std::string next_modifier() const { return modifiers_.empty() ? "" : modifiers_.front(); }
  void drop_modifier() { modifiers_.erase(modifiers_.begin()); }
  Type type(std::initializer_list<Type> allowed = {});
  int rounding();  // kNearest if no mode is written
  bool rounding_at(int* rounding);

  // Operands, one after the other
  size_t left() const { return operands_.size() - next_; }
  Operand& operand();
  void write(Type t);             // a register of that width
  void read(Type t);              // a register of that width, or an immediate
  int write_any(int least_bits);  // a register with at least so many bits; returns its width
  int read_any(Type t);
  void write_predicate();
  bool read_predicate();                       // returns true if it is negated
  int read_vector(Type t, bool exact = true);  // {…} or one register; returns how many, width gets their width
  int write_vector(Type t, bool exact = true);
  int width = 0;
  void address(Space space);
  bool fixed_param() const { return fixed_param_; }  // the address was that of a kernel's parameter
  void read_operand(const Operand& operand, Type t, bool exact);
  void write_operand(const Operand& operand, Type t, bool exact);
  void add(uint32_t offset) { state.pool.push_back(offset); }
  bool is_register(const Operand& operand) const;
  const Symbol* symbol(const Operand& operand) const;
  // The result's pointer slot, for a handler that sets it itself.
  uint16_t own_pointer() { return std::exchange(pointer_of_result_, uint16_t{0}); }
  // The result is a pointer into the same buffer as the operands.
  void carries_pointer() { carries_ = true; }

  const std::string& opcode() const { return opcode_; }
  uint32_t line() const { return line_; }
  [[noreturn]] void fail(const std::string& why) const;

 private:
  void note_pointer(const Symbol& symbol);

  const Cursor& cursor_;
  uint32_t line_;
  std::string opcode_, written_opcode_;
  std::vector<std::string> modifiers_;
  std::vector<Operand> operands_;
  size_t next_ = 0;
  bool carries_ = false, fixed_param_ = false;
  uint16_t pointer_of_result_ = 0;
  std::vector<uint16_t> pointers_read_;
};

using Decode = void (*)(Decoder&);
using Opcodes = std::unordered_map<std::string, Decode>;
const Opcodes& opcodes();

// Each function adds the opcodes of its file. An opcode that depends on its last type has several entries: add.int,
// add.float (f32, f64) and add.half (f16, bf16 and their pairs).
void add_integer(Opcodes& table);
void add_bits(Opcodes& table);
void add_moves(Opcodes& table);
void add_floating(Opcodes& table);
void add_half(Opcodes& table);
void add_special(Opcodes& table);
void add_compare(Opcodes& table);
void add_convert(Opcodes& table);
void add_memory(Opcodes& table);
void add_async_copy(Opcodes& table);
void add_atomic(Opcodes& table);
void add_tensor(Opcodes& table);
void add_warp(Opcodes& table);
void add_control(Opcodes& table);
void add_barrier(Opcodes& table);

}  // namespace gpt2fast::ptx

// PTX text, decoded for execution. A module is one array of instructions. Operands are byte offsets into a warp's
// register file. A register is an array of 32 lanes, and a predicate is a 32-bit mask. Immediates and special registers
// are registers that no instruction writes.
#pragma once
#include <cstdint>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace gpt2fast::ptx {

constexpr int kLanes = 32;
constexpr uint32_t kAllLanes = 0xffffffffu;
constexpr uint32_t kNone = 0xffffffffu;

// The generic addresses of shared and local memory are windows in which no host pointer lies.
constexpr uint64_t kSharedWindow = uint64_t{1} << 60;
constexpr uint64_t kLocalWindow = uint64_t{2} << 60;
constexpr uint64_t kWindowBytes = uint64_t{1} << 32;

enum class Type : uint8_t {
  U8,
  U16,
  U32,
  U64,
  S8,
  S16,
  S32,
  S64,
  B8,
  B16,
  B32,
  B64,
  F16,
  F16x2,
  BF16,
  BF16x2,
  TF32,
  F32,
  F64,
  Pred
};
int bits_of(Type type);
const char* name_of(Type type);
bool type_from(std::string_view name, Type* type);
inline bool is_signed(Type t) { return t >= Type::S8 && t <= Type::S64; }
inline bool is_integer(Type t) { return t <= Type::B64; }
inline bool is_float(Type t) { return t >= Type::F16 && t <= Type::F64; }

enum class Space : uint8_t { Generic, Global, Shared, Local, Const, Param };
const char* name_of(Space space);

// What an access does with memory.
enum class Use : uint8_t { Read, Write, Atomic };

// How an access orders others. kStrong: it is atomic, volatile, relaxed, acquire or release; a strong read is ordered
// after what was released at its address, even if it is relaxed, since most code relies on that. kRelease: it releases.
// kBlockOnly: it counts for its own block only (.cta).
enum Order : uint8_t { kStrong = 1, kRelease = 2, kBlockOnly = 4 };

// The kind of work that an instruction counts as.
enum class Class : uint8_t { Int, Float, Half, Convert, Special, Tensor, Control, Memory };
constexpr int kClasses = 8;

struct Warp;
struct Instruction;
using Handler = void (*)(Warp&, const Instruction&, uint32_t mask);

struct Instruction {
  Handler run = nullptr;
  const uint32_t* operand = nullptr;  // offsets into the register file: destinations first
  int64_t immediate = 0;              // of an address, what is added to its register; else the handler defines it
  uint32_t guard = kNone;             // predicate
  bool guard_negated = false;
  bool sync = false;          // lanes that the guard excludes continue without the others
  bool wide_address = false;  // the address register has 64 bits
  Space space = Space::Generic;
  Class kind = Class::Int;
  Type type = Type::B32;
  uint8_t bytes = 0, elements = 1;  // of a memory access, per lane: elements * bytes, to which it is aligned
  Use use = Use::Read;              // of a memory access
  uint8_t order = 0;                // of a memory access
  bool copies = false;              // cp.async: reads global memory and writes shared memory
  uint8_t mode[4] = {};             // the handler defines it
  uint32_t target = 0;              // of a branch or a call; of a memory access, the address register's pointer slot
  // Of a 64-bit result: pointer slots, which say which buffer a pointer points into. 0: no slot.
  uint16_t pointer = 0, pointer_from[2] = {}, pointer_beside = 0;
  uint32_t function = 0;  // index into Module::functions
  uint32_t file = 0, source_line = 0;
  uint32_t line = 0;            // of the PTX text
  uint32_t begin = 0, end = 0;  // positions in the PTX text
};

struct Parameter {
  std::string name;
  Type type;
  uint32_t bytes, align, offset;
};

// A register whose lanes are set before the kernel starts.
struct Constant {
  uint32_t offset;
  uint8_t bits;  // 1: a predicate
  uint64_t value;
};

// Special registers. A warp's lanes get their values when the warp starts.
enum class Special : uint8_t {
  TidX,
  TidY,
  TidZ,
  NtidX,
  NtidY,
  NtidZ,
  CtaidX,
  CtaidY,
  CtaidZ,
  NctaidX,
  NctaidY,
  NctaidZ,
  LaneId,
  WarpId,
  NWarpId,
  SmId,
  NSmId,
  GridId,
  LaneMaskEq,
  LaneMaskLt,
  LaneMaskLe,
  LaneMaskGt,
  LaneMaskGe,
  DynamicSharedBytes,
  TotalSharedBytes,
  DynamicSharedStart,
  ParamStart
};

struct SpecialRegister {
  Special what;
  uint32_t offset;
  uint8_t bits;
  uint64_t plus;
};

// A .global or .const variable with storage of its own.
struct Variable {
  std::string name;
  Space space;
  uint32_t align = 1;
  std::vector<uint64_t> storage;
  uint64_t bytes = 0;
  bool initialised = false;
  uint64_t address() const { return reinterpret_cast<uint64_t>(storage.data()); }
};

struct Function {
  std::string name;
  bool entry = false;
  uint32_t first = 0, count = 0;  // its instructions in Module::code
  std::vector<Parameter> params;  // in the parameter block for a kernel, else in local memory
  std::vector<Parameter> results;
  std::vector<Constant> constants;
  std::vector<SpecialRegister> specials;
  std::vector<uint32_t> calls;  // the functions that it calls
  uint32_t shared_bytes = 0;    // its own .shared variables end here
  uint32_t param_bytes = 0;
  uint32_t max_threads = 0;  // .maxntid, .reqntid
  std::string error;         // says which instruction the machine does not know, the first of them
};

struct SyntaxError : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

class Module {
 public:
  explicit Module(std::string text);
  Module(const Module&) = delete;
  Module& operator=(const Module&) = delete;

  const Function& kernel(const std::string& name) const;  // throws std::out_of_range, which lists the names
  std::string source_of(const Instruction& i) const;      // "file.py:17", or "" without .loc
  std::string text_of(const Instruction& i) const;        // its PTX on one line

  std::string text;
  std::vector<Instruction> code;
  std::vector<std::unique_ptr<uint32_t[]>> operands;
  std::vector<Function> functions;
  std::map<std::string, uint32_t> kernels;
  std::vector<std::unique_ptr<Variable>> variables;
  std::unordered_map<uint32_t, std::string> files;
  uint32_t register_bytes = 64;  // of a warp's register file
  uint32_t pointer_slots = 1;    // slot 0 is never read
  uint32_t local_bytes = 0;      // of a thread; each variable of each function has a place of its own
  uint32_t dynamic_shared_start = 0;
  bool uses_dynamic_shared = false;
  int shared_grain = 4;  // the fewest bytes that an instruction reads or writes in shared memory
};

}  // namespace gpt2fast::ptx

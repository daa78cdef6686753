// Names and widths of PTX types.
#include "module.h"

namespace gpt2fast::ptx {
namespace {

struct Row {
  const char* name;
  int bits;
};
constexpr Row kTypes[] = {{"u8", 8},      {"u16", 16},  {"u32", 32}, {"u64", 64},   {"s8", 8},
                          {"s16", 16},    {"s32", 32},  {"s64", 64}, {"b8", 8},     {"b16", 16},
                          {"b32", 32},    {"b64", 64},  {"f16", 16}, {"f16x2", 32}, {"bf16", 16},
                          {"bf16x2", 32}, {"tf32", 32}, {"f32", 32}, {"f64", 64},   {"pred", 1}};
constexpr const char* kSpaces[] = {"generic", "global", "shared", "local", "const", "param"};

}  // namespace

int bits_of(Type type) { return kTypes[int(type)].bits; }
const char* name_of(Type type) { return kTypes[int(type)].name; }
const char* name_of(Space space) { return kSpaces[int(space)]; }

bool type_from(std::string_view name, Type* type) {
  for (int i = 0; i < int(sizeof(kTypes) / sizeof(Row)); ++i)
    if (name == kTypes[i].name) return *type = Type(i), true;
  return false;
}

}  // namespace gpt2fast::ptx

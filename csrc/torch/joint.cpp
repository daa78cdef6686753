#include "joint.h"

#include "coverage.h"
#include "memory.h"

namespace gpt2fast {
namespace {

const Joint kOwn = {
    .declaration_of = [](const char* op) -> const Declaration& { return declaration_of(op); },
    .fits = [](const Declaration& declared, const Value* arguments) { return declared.fits(arguments); },
    .first_floating = [](const Declaration& declared,
                         const Value* arguments) { return declared.first_floating(arguments); },
    .note = [](const char* op, Objection objection) { objections()[op] = objection; },
    .isa = [] { return cpu::table().isa; },
    .empty_output = allocate_output,
};

}  // namespace

const Joint& own_joint() { return kOwn; }

std::map<std::string, Objection, std::less<>>& objections() {
  static auto* by_op = new std::map<std::string, Objection, std::less<>>;
  return *by_op;
}

}  // namespace gpt2fast

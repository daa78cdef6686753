// The source lines of a function's instructions, from .loc directives. Code that was inlined from another file (mostly
// from a library) counts as the line of the kernel's file that called it.
#pragma once
#include <map>
#include <tuple>

#include "cursor.h"

namespace gpt2fast::ptx {

class Locations {
 public:
  void read(Cursor& cursor);                // the cursor is after ".loc"
  void note() { noted_.push_back(last_); }  // an instruction begins
  void give(std::vector<Instruction>& code) const;

 private:
  struct Place {
    uint32_t file = 0, line = 0, column = 0;
    bool operator<(const Place& o) const { return std::tie(file, line, column) < std::tie(o.file, o.line, o.column); }
  };
  static Place place(Cursor& cursor);
  Place at_home(Place p) const;

  Place last_;
  uint32_t home_ = 0;         // the file of the function itself
  uint32_t last_asm_ = 0;     // the inline assembly that the last .loc was in
  std::vector<Place> noted_;  // per instruction
  std::map<Place, Place> callers_;
};

}  // namespace gpt2fast::ptx

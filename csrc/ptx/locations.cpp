#include "locations.h"

namespace gpt2fast::ptx {

Locations::Place Locations::place(Cursor& cursor) {
  Place p;
  p.file = uint32_t(cursor.integer());
  p.line = uint32_t(cursor.integer());
  p.column = uint32_t(cursor.integer());
  return p;
}

// file line column [, function_name label [+ offset], inlined_at file line column]
void Locations::read(Cursor& cursor) {
  Place p = place(cursor);
  // Inside inline assembly, LLVM counts on from the statement's line. The line of the statement is kept instead.
  bool stays = cursor.inline_asm && cursor.inline_asm == last_asm_;
  last_asm_ = cursor.inline_asm;
  while (cursor.peek() == ' ' || cursor.peek() == '\t') cursor.advance();
  bool inlined = false;
  if (cursor.peek() == ',') {
    size_t end = cursor.text.find('\n', cursor.at), at = cursor.text.find("inlined_at", cursor.at);
    if (at < end) {
      cursor.at = at + std::string_view("inlined_at").size();
      callers_.emplace(p, place(cursor));
      inlined = true;
    }
  }
  if (!home_ && !inlined) home_ = p.file;
  if (!stays) last_ = p;
  cursor.skip_line();
}

Locations::Place Locations::at_home(Place p) const {
  Place outer = p;
  for (size_t steps = 0; steps <= callers_.size(); ++steps) {
    if (outer.file == home_) return outer;
    auto it = callers_.find(outer);
    if (it == callers_.end()) break;
    outer = it->second;
  }
  return p;
}

void Locations::give(std::vector<Instruction>& code) const {
  for (size_t i = 0; i < code.size() && i < noted_.size(); ++i) {
    Place p = at_home(noted_[i]);
    code[i].file = p.file;
    code[i].source_line = p.line;
  }
}

}  // namespace gpt2fast::ptx

// Reads PTX text: it skips blanks and comments, keeps the line number, and throws errors that name the current line.
#pragma once
#include <cctype>
#include <string>
#include <string_view>

#include "module.h"

namespace gpt2fast::ptx {

struct Cursor {
  const std::string& text;
  size_t at = 0;
  uint32_t line = 1;
  // The number of the inline assembly that the cursor is in (0: none), and how many there were. Compilers put comments
  // around inline assembly.
  uint32_t inline_asm = 0, inline_asms = 0;

  explicit Cursor(const std::string& t) : text(t) {}

  char peek(size_t ahead = 0) const { return at + ahead < text.size() ? text[at + ahead] : '\0'; }

  void advance() {
    if (text[at] == '\n') ++line;
    ++at;
  }

  void skip() {
    while (at < text.size()) {
      if (std::isspace(static_cast<unsigned char>(text[at]))) {
        advance();
      } else if (text.compare(at, 2, "//") == 0) {
        if (text.compare(at, 19, "// begin inline asm") == 0) inline_asm = ++inline_asms;
        if (text.compare(at, 17, "// end inline asm") == 0) inline_asm = 0;
        while (at < text.size() && text[at] != '\n') ++at;
      } else if (text.compare(at, 2, "/*") == 0) {
        while (at < text.size() && text.compare(at, 2, "*/") != 0) advance();
        if (at < text.size()) at += 2;
      } else {
        return;
      }
    }
  }

  bool done() {
    skip();
    return at >= text.size();
  }

  bool accept(char c) {
    skip();
    if (peek() != c) return false;
    ++at;
    return true;
  }

  void expect(char c) {
    if (!accept(c))
      fail(std::string("expected '") + c + "', got " +
           (at < text.size() ? "'" + std::string(1, peek()) + "'" : "the end"));
  }

  static bool in_word(char c) {
    return std::isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '$' || c == '%';
  }

  // An identifier: letters, digits, _ $ %. It is empty if there is none.
  std::string word() {
    skip();
    size_t begin = at;
    while (in_word(peek())) ++at;
    return text.substr(begin, at - begin);
  }

  std::string name() {
    std::string w = word();
    if (w.empty()) fail("expected a name");
    return w;
  }

  // .name, or an opcode with its modifiers: "ld.global.L1::evict_last.v4.b32"
  std::string dotted() {
    skip();
    size_t begin = at;
    while (in_word(peek()) || peek() == '.' || (peek() == ':' && peek(1) == ':')) at += peek() == ':' ? 2 : 1;
    return text.substr(begin, at - begin);
  }

  // One name with its dot: ".reg" of ".reg.b16".
  std::string directive() {
    skip();
    if (peek() != '.') return "";
    advance();
    return "." + word();
  }

  bool accept(std::string_view w) {
    skip();
    if (text.compare(at, w.size(), w) != 0 || in_word(peek(w.size()))) return false;
    at += w.size();
    return true;
  }

  // An integer as PTX writes it: decimal, 0x, 0b, octal, with U and a sign.
  int64_t integer() {
    skip();
    bool negative = accept('-');
    if (!std::isdigit(static_cast<unsigned char>(peek()))) fail("expected a number");
    size_t used = 0;
    std::string digits = text.substr(at, 70);
    int base = digits[0] != '0' ? 10 : digits[1] == 'x' || digits[1] == 'X' ? 16 : digits[1] == 'b' ? 2 : 8;
    if (base == 2) digits = digits.substr(2), at += 2;
    uint64_t value;
    try {
      value = std::stoull(digits, &used, base);
    } catch (const std::exception&) {
      fail("bad number");
    }
    at += used;
    if (peek() == 'U') ++at;
    return int64_t(negative ? 0 - value : value);
  }

  std::string string() {
    expect('"');
    size_t begin = at;
    while (at < text.size() && peek() != '"') advance();
    std::string s = text.substr(begin, at - begin);
    expect('"');
    return s;
  }

  void skip_line() {
    while (at < text.size() && text[at] != '\n') ++at;
  }

  void skip_braces() {
    expect('{');
    for (int depth = 1; depth > 0;) {
      if (at >= text.size()) fail("'{' without '}'");
      if (peek() == '{') ++depth;
      if (peek() == '}') --depth;
      advance();
    }
  }

  std::string line_text(uint32_t wanted) const {
    size_t begin = 0;
    for (uint32_t l = 1; l < wanted && begin != std::string::npos; ++l) begin = text.find('\n', begin) + 1;
    size_t end = text.find('\n', begin);
    std::string s = text.substr(begin, end == std::string::npos ? end : end - begin);
    size_t first = s.find_first_not_of(" \t"), last = s.find_last_not_of(" \t\r");
    return first == std::string::npos ? "" : s.substr(first, last - first + 1);
  }

  std::string error(uint32_t where, const std::string& why) const {
    return "PTX line " + std::to_string(where) + ": " + why + ": " + line_text(where);
  }
  [[noreturn]] void fail(const std::string& why) const { fail_at(line, why); }
  [[noreturn]] void fail_at(uint32_t where, const std::string& why) const { throw SyntaxError(error(where, why)); }
};

}  // namespace gpt2fast::ptx

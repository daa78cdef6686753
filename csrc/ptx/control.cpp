// Branches, calls, returns, traps and fences, and the functions that the driver supplies to compiled code: vprintf and
// __assertfail.
#include <algorithm>
#include <cstdio>
#include <cstring>

#include "barrier.h"
#include "decode.h"

namespace gpt2fast::ptx {
namespace {

uint8_t* local_of(Warp& w, int lane) {
  return w.block->local.data() + (size_t(w.index) * kLanes + size_t(lane)) * w.launch->module.local_bytes;
}

template <class T>
T local_value(Warp& w, int lane, uint32_t at) {
  T v;
  std::memcpy(&v, local_of(w, lane) + at, sizeof(T));
  return v;
}

void branch(Warp& w, const Instruction& i, uint32_t mask) {
  if (mask == w.active) return w.jump(i.target);
  ++w.launch->divergent_branches;
  w.split(mask, i.target);
}

void leave(Warp& w, const Instruction&, uint32_t mask) {
  w.exit(mask);
  settle_barrier(w);
  count_exited(*w.block);
  w.event = Event::Jump;
}

void copy_local(Warp& w, uint32_t mask, uint32_t from, uint32_t to, uint32_t bytes) {
  for_lanes(mask, [&](int l) {
    uint8_t* base = local_of(w, l);
    std::memcpy(base + to, base + from, bytes);
    size_t shadow = size_t(base - w.block->local.data());
    std::fill_n(w.block->local_written.begin() + long(shadow + to), bytes, uint8_t{1});
  });
}

// operand of a call: parameters, results, then (from, to, bytes) of each
void call(Warp& w, const Instruction& i, uint32_t mask) {
  const uint32_t* o = i.operand + 2;
  for (uint32_t p = 0; p < i.operand[0]; ++p, o += 3) copy_local(w, mask, o[0], o[1], o[2]);
  if (mask != w.active) ++w.launch->divergent_branches;
  for_lanes(mask, [&](int l) { w.calls[l].push_back(w.pc); });
  uint32_t target = w.launch->module.functions[i.target].first;
  if (mask == w.active) return w.jump(target);
  w.split(mask, target);
}

void give_back(Warp& w, const Instruction&, uint32_t mask) {
  uint32_t rest = mask & w.active;
  while (rest) {
    int lane = __builtin_ctz(rest);
    if (w.calls[lane].empty()) {
      uint32_t out = 0;
      for_lanes(rest, [&](int l) { out |= uint32_t(w.calls[l].empty()) << l; });
      rest &= ~out;
      w.exit(out);
      settle_barrier(w);
      count_exited(*w.block);
      continue;
    }
    uint32_t from = w.calls[lane].back(), same = 0;
    for_lanes(rest, [&](int l) { same |= uint32_t(!w.calls[l].empty() && w.calls[l].back() == from) << l; });
    for_lanes(same, [&](int l) { w.calls[l].pop_back(); });
    const Instruction& i = w.launch->module.code[from];
    const uint32_t* o = i.operand + 2 + 3 * i.operand[0];
    for (uint32_t r = 0; r < i.operand[1]; ++r, o += 3) copy_local(w, same, o[0], o[1], o[2]);
    rest &= ~same;
    if (same == w.active) {
      w.jump(from + 1);
      return;
    }
    w.split(same, from + 1);
  }
  w.event = Event::Jump;
}

std::string string_at(Launch& launch, uint64_t address) {
  std::string s;
  uint32_t b = launch.find_buffer(address);
  if (b == kNone) return "(a string outside all buffers)";
  uint64_t end = launch.buffers[b].address + launch.buffers[b].bytes;
  for (; address < end && *reinterpret_cast<const char*>(address); ++address)
    s += *reinterpret_cast<const char*>(address);
  return s;
}

// __assertfail(message, file, line, function, char size)
void assert_fail(Warp& w, const Instruction& i, uint32_t mask) {
  int lane = __builtin_ctz(mask);
  const uint32_t* o = i.operand + 2;
  std::string message = string_at(*w.launch, local_value<uint64_t>(w, lane, o[0]));
  std::string file = string_at(*w.launch, local_value<uint64_t>(w, lane, o[3]));
  uint32_t line = local_value<uint32_t>(w, lane, o[6]);
  std::string function = string_at(*w.launch, local_value<uint64_t>(w, lane, o[9]));
  w.launch->report(
      "assert",
      "device assertion failed: " + message + " (" + file + ":" + std::to_string(line) + ", " + function + ")", w, w.pc,
      lane);
  w.launch->stop();
  w.event = Event::Stop;
}

// Prints one conversion of a printf format. Its argument is at `at` in the packed arguments: doubles and 64-bit
// integers have 8 bytes, all others 4.
std::string print_one(Warp& w, int lane, const std::string& spec, uint64_t args, uint32_t* at) {
  char kind = spec.back();
  bool real = std::string("aAeEfFgG").find(kind) != std::string::npos;
  bool wide =
      real || kind == 's' || kind == 'p' || spec.find('l') != std::string::npos || spec.find('z') != std::string::npos;
  uint32_t size = wide ? 8 : 4;
  *at = (*at + size - 1) / size * size;
  uint64_t bits = 0;
  const uint8_t* from =
      args >= kLocalWindow ? local_of(w, lane) + (args - kLocalWindow) : reinterpret_cast<const uint8_t*>(args);
  if (args >= kLocalWindow && args - kLocalWindow + *at + size > w.launch->module.local_bytes) return "(?)";
  std::memcpy(&bits, from + *at, size);
  *at += size;
  char text[512];
  if (kind == 's') return string_at(*w.launch, bits);
  if (kind == 'c') return std::string(1, char(bits));
  std::string plain;
  for (char c : spec)
    if (c != 'l' && c != 'h' && c != 'z') plain += c;
  if (real)
    std::snprintf(text, sizeof text, plain.c_str(), bit_cast<double>(bits));
  else if (kind == 'p')
    std::snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(bits));
  else {
    plain.insert(plain.size() - 1, "ll");
    bool is_signed = kind == 'd' || kind == 'i';
    long long value = is_signed && !wide ? static_cast<int32_t>(bits) : static_cast<long long>(bits);
    std::snprintf(text, sizeof text, plain.c_str(), value);
  }
  return text;
}

// vprintf(format, arguments) -> number of arguments
void print(Warp& w, const Instruction& i, uint32_t mask) {
  const uint32_t* o = i.operand + 2;
  for_lanes(mask, [&](int lane) {
    std::string format = string_at(*w.launch, local_value<uint64_t>(w, lane, o[0]));
    uint64_t args = local_value<uint64_t>(w, lane, o[3]);
    uint32_t at = 0;
    int32_t count = 0;
    for (size_t c = 0; c < format.size(); ++c) {
      size_t end = format[c] == '%' ? format.find_first_of("diouxXeEfFgGaAcsp%", c + 1) : std::string::npos;
      if (end == std::string::npos) {
        w.launch->output += format[c];
      } else {
        std::string spec = format.substr(c, end - c + 1);
        if (spec.back() == '%')
          w.launch->output += '%';
        else
          w.launch->output += print_one(w, lane, spec, args, &at), ++count;
        c = end;
      }
    }
    if (i.operand[1]) {
      std::memcpy(local_of(w, lane) + i.operand[2 + 3 * i.operand[0] + 1], &count, 4);
      size_t shadow = size_t(local_of(w, lane) - w.block->local.data()) + i.operand[2 + 3 * i.operand[0] + 1];
      std::fill_n(w.block->local_written.begin() + long(shadow), 4, uint8_t{1});
    }
  });
}

void trap(Warp& w, const Instruction&, uint32_t mask) {
  w.launch->report("trap", "trap", w, w.pc, __builtin_ctz(mask));
  w.launch->stop();
  w.event = Event::Stop;
}

void nothing(Warp&, const Instruction&, uint32_t) {}

void decode_branch(Decoder& d) {
  d.take("uni");
  Operand& o = d.operand();
  if (o.what != Operand::Name) d.fail("expected a label");
  d.state.branches.emplace_back(0, o.name);
  d.ins.kind = Class::Control;
  d.ins.run = branch;
}

void decode_call(Decoder& d) {
  d.take("uni");
  d.ins.kind = Class::Control;
  std::vector<Operand> results, arguments;
  Operand o = d.operand();
  if (o.what == Operand::Vector) results = o.items, o = d.operand();
  if (d.left()) arguments = d.operand().items;
  const Symbol* s = d.symbol(o);
  if (!s || s->what != Symbol::Callee) d.fail("indirect calls are not supported, " + o.name + " is no function");
  auto index = uint32_t(s->value);
  const Function& f = d.state.module.functions[index];
  bool printf_like = f.name == "vprintf", assertion = f.name == "__assertfail";
  if (f.name.empty()) d.fail("recursion is not supported");
  if (arguments.size() != f.params.size() || results.size() != f.results.size())
    d.fail(f.name + " takes " + std::to_string(f.params.size()) + " arguments and gives " +
           std::to_string(f.results.size()) + " results");
  d.add(uint32_t(arguments.size()));
  d.add(uint32_t(results.size()));
  auto place = [&](const Operand& a) {
    const Symbol* p = d.symbol(a);
    if (!p || p->what != Symbol::Local) d.fail("arguments of calls must be .param variables");
    return uint32_t(p->value);
  };
  for (size_t a = 0; a < arguments.size(); ++a) {
    d.add(place(arguments[a]));
    d.add(f.params[a].offset);
    d.add(f.params[a].bytes);
  }
  for (size_t r = 0; r < results.size(); ++r) {
    d.add(f.results[r].offset);
    d.add(place(results[r]));
    d.add(f.results[r].bytes);
  }
  d.ins.target = index;
  if (printf_like) {
    d.ins.run = print;
  } else if (assertion) {
    d.ins.run = assert_fail;
  } else {
    d.ins.run = call;
    d.state.function.calls.push_back(index);
  }
}

template <Handler run, bool kSync>
void plain(Decoder& d) {
  d.ins.kind = Class::Control;
  d.ins.sync = kSync;
  d.take("uni");
  d.ins.run = run;
}

// Memory is in program order here anyway, so that a fence matters for the race detection only. mode[0]: the fence is
// for all blocks.
void fence(Warp& w, const Instruction& i, uint32_t) {
  if (w.launch->global_races.on()) w.launch->global_races.fence(w, i.mode[0]);
}

void decode_fence(Decoder& d) {
  d.ins.kind = Class::Control;
  bool alias = d.take("proxy") && d.take("alias");
  d.choose({"sc", "acq_rel"});
  int scope = d.choose({"cta", "gl", "gpu", "sys"});
  if (!alias && scope < 0) d.fail("expected a scope: .cta, .gl, .gpu or .sys");
  d.ins.mode[0] = scope > 0;
  d.ins.run = alias ? nothing : fence;
}

}  // namespace

void add_control(Opcodes& table) {
  table["bra"] = decode_branch;
  table["call"] = decode_call;
  table["ret"] = plain<give_back, true>;
  table["exit"] = plain<leave, true>;
  table["trap"] = plain<trap, false>;
  table["brkpt"] = plain<nothing, false>;
  table["pmevent"] = [](Decoder& d) { d.read(Type::B32), plain<nothing, false>(d); };
  table["membar"] = decode_fence;
  table["fence"] = decode_fence;
  table["nanosleep"] = [](Decoder& d) { d.type({Type::U32}), d.read(Type::U32), plain<nothing, false>(d); };
}

}  // namespace gpt2fast::ptx

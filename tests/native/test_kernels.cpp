// The CPU kernels of one instruction set on the op cases, without torch: the parity rule against float64, guarded and
// NaN-filled memory, and the same bits whether tasks run in one go, or one by one in reverse (by several threads where
// ThreadSanitizer watches).
//   test_kernels             prints the instruction sets that this CPU runs
//   test_kernels CASES ISA   runs the cases that cases.py wrote to CASES
#include <csignal>
#include <thread>

#include "bind.h"
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

namespace {

// Where a crash happened: printed by whoever ends the process.
char current[1024];

void name_the_case() {
  const char* parts[] = {"in case: ", current, "\n"};
  for (const char* part : parts)
    if (write(STDERR_FILENO, part, std::strlen(part)) < 0) return;
}

void die(int number) {
  name_the_case();
  std::signal(number, SIG_DFL);
  std::raise(number);
}

void watch_for_crashes() {
  std::signal(SIGABRT, die);  // UBSan's end, where abort_on_error is set
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_set_death_callback(name_the_case);
#else
  for (int number : {SIGSEGV, SIGBUS, SIGILL, SIGFPE}) std::signal(number, die);
#endif
}

// The errors of one output over the draws of a case. Infinities and NaNs must stand where the truth has them.
struct Errors {
  double squares = 0, worst = -1, got = 0, truth = 0;
  size_t count = 0, at = 0;

  void add(const std::string& dtype, const void* data, const std::vector<double>& truths) {
    for (size_t i = 0; i < truths.size(); ++i) {
      double value = value_at(dtype, data, i), error = std::fabs(value - truths[i]);
      if (!std::isfinite(truths[i])) {
        if (std::isnan(truths[i]) ? std::isnan(value) : value == truths[i]) continue;
        error = HUGE_VAL;
      }
      if (std::isnan(error)) error = HUGE_VAL;
      ++count;
      squares += error * error;
      if (error > worst) worst = error, at = i, got = value, truth = truths[i];
    }
  }

  // Why the output breaks the parity rule, or nothing.
  std::string judge(const Output& output) const {
    double rms = count ? std::sqrt(squares / double(count)) : 0;
    if (worst <= output.max_bound && rms <= output.rms_bound) return "";
    char words[512];
    std::snprintf(words, sizeof words,
                  "  %s: rms %.3g (bound %.3g), max %.3g (bound %.3g); at %zu: got %.9g, truth %.9g\n",
                  output.name.c_str(), rms, output.rms_bound, worst, output.max_bound, at, got, truth);
    return words;
  }
};

// A thread for each run: its scratch memory is new, and as large as this very case needs.
void run_alone(const Run& run, bind::Order order) {
  std::thread([&] { bind::run(gpt2fast::cpu::table(), run, order); }).join();
}

#ifdef __SANITIZE_THREAD__
constexpr bind::Order kApart = bind::Order::kThreads;
#else
constexpr bind::Order kApart = bind::Order::kOneByOne;
#endif

// What is wrong with the kernel on this case, line by line; empty where all is well.
std::string failures(const Case& c) {
  std::string found;
  std::vector<Errors> errors(c.outputs.size());
  for (const Draw& draw : c.draws) {
    Run together(c, draw, Guarded::kBeforeFence), apart(c, draw, Guarded::kAfterFence);
    run_alone(together, bind::Order::kTogether);
    run_alone(apart, kApart);
    for (size_t i = 0; i < c.outputs.size(); ++i) {
      const std::string& name = c.outputs[i].name;
      const Guarded &a = together.out.at(name), &b = apart.out.at(name);
      errors[i].add(c.outputs[i].dtype, a.data(), draw.truths[i]);
      if (a.size() && std::memcmp(a.data(), b.data(), a.size())) found += "  " + name + ": other bits task by task\n";
      if (!a.intact()) found += "  " + name + ": written before its beginning\n";
      if (!b.intact()) found += "  " + name + ": written past its end\n";
    }
  }
  for (size_t i = 0; i < c.outputs.size(); ++i) found += errors[i].judge(c.outputs[i]);
  return found;
}

int run_cases(const char* path, const char* isa) {
  gpt2fast::cpu::set_isa(isa);
  watch_for_crashes();
  Reader reader(path);
  int count = 0, wrong = 0;
  for (Case c; reader.next(c); ++count) {
    std::snprintf(current, sizeof current, "%s %s", c.label.c_str(), isa);
    std::string found = failures(c);
    if (found.empty()) continue;
    ++wrong;
    std::printf("FAILED %s\n%s", current, found.c_str());
  }
  std::printf("%s: %d of %d cases hold\n", isa, count - wrong, count);
  return wrong > 0 || count == 0;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    if (argc == 3) return run_cases(argv[1], argv[2]);
    for (const char* const* isa = gpt2fast::cpu::compiled_isas(); *isa; ++isa)
      if (gpt2fast::cpu::cpu_supports(*isa)) std::puts(*isa);
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "test_kernels: %s\n", error.what());
    return 2;
  }
}

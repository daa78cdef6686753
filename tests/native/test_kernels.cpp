// The CPU kernels of one instruction set on the op cases, without torch: the parity rule against float64, guarded and
// NaN-filled memory, and the same bits whether tasks run in one go or one by one in reverse.
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

void watch_for_crashes() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_set_death_callback(name_the_case);
#else
  for (int signal : {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGABRT})
    std::signal(signal, [](int number) {
      name_the_case();
      std::signal(number, SIG_DFL);
      std::raise(number);
    });
#endif
}

// Why an output breaks the parity rule, or nothing. Infinities and NaNs must stand where the truth has them.
std::string compare(const Expected& e, const void* data) {
  double squares = 0, worst = -1;
  size_t at = 0, finite = 0;
  for (size_t i = 0; i < e.truth.size(); ++i) {
    double got = value_at(e.dtype, data, i), truth = e.truth[i], error = std::fabs(got - truth);
    if (!std::isfinite(truth)) {
      bool same = std::isnan(truth) ? std::isnan(got) : got == truth;
      if (same) continue;
      error = HUGE_VAL;
    } else {
      ++finite;
    }
    if (std::isnan(error)) error = HUGE_VAL;
    squares += error * error;
    if (error > worst) worst = error, at = i;
  }
  double rms = finite ? std::sqrt(squares / double(finite)) : squares;
  if (worst <= e.max_bound && rms <= e.rms_bound) return "";
  char words[512];
  std::snprintf(words, sizeof words, "%s: rms %.3g (bound %.3g), max %.3g (bound %.3g); at %zu: got %.9g, truth %.9g",
                e.name.c_str(), rms, e.rms_bound, worst, e.max_bound, at, value_at(e.dtype, data, at), e.truth[at]);
  return words;
}

// A thread for each run: its scratch memory is new, and as large as this very case needs.
void run_alone(const Run& run, bool one_by_one) {
  std::thread([&] { bind::run(gpt2fast::cpu::table(), run, one_by_one); }).join();
}

// What is wrong with the kernel on this case, line by line; empty where all is well.
std::string failures(const Case& c) {
  Run together(c, Guarded::kBeforeFence), apart(c, Guarded::kAfterFence);
  run_alone(together, false);
  run_alone(apart, true);
  std::string found;
  for (const Expected& e : c.outputs) {
    const Guarded &a = together.out.at(e.name), &b = apart.out.at(e.name);
    std::string why = compare(e, a.data());
    if (!why.empty()) found += "  " + why + "\n";
    if (a.size() && std::memcmp(a.data(), b.data(), a.size())) found += "  " + e.name + ": other bits task by task\n";
    if (!a.intact()) found += "  " + e.name + ": written before its beginning\n";
    if (!b.intact()) found += "  " + e.name + ": written past its end\n";
  }
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

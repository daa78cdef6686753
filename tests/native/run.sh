#!/usr/bin/env bash
# Runs the CPU kernels on the op cases without torch: `sanitize` under AddressSanitizer and UBSan on every instruction
# set of this CPU, `threads` under ThreadSanitizer with four threads a call, `neon` compiled for aarch64 (and emulated
# elsewhere). Reports are those of test_kernels.cpp.
set -euo pipefail
cd "$(dirname "$0")/../.."
mode=${1:-}
folder=build/native/$mode
flags=(-std=c++17 -Wall -Wextra -pthread)
emulator=()
machine=$(uname -m)

# need COMMAND... PACKAGE: the first of the commands that is there, or the way to get it.
need() {
  local package=${*: -1}
  for tool in "${@:1:$#-1}"; do
    command -v "$tool" && return
  done
  echo "tests/native/run.sh: missing: $1. Install it with: sudo apt-get install $package" >&2
  exit 1
}

case $mode in
  sanitize)
    compiler=$(need "${CXX:-g++}" g++)
    flags+=(-fsanitize=address,undefined,float-cast-overflow -fno-sanitize-recover=all -fno-omit-frame-pointer)
    # Checks by call instead of in place, and nothing inlined: a quarter of the time to compile.
    optimise=(-O1 -g1 -fno-inline --param asan-instrumentation-with-call-threshold=0)
    # New heap memory is NaN.
    export ASAN_OPTIONS=malloc_fill_byte=255:max_malloc_fill_size=2147483647 UBSAN_OPTIONS=print_stacktrace=1:abort_on_error=1
    ;;
  threads)
    compiler=$(need "${CXX:-g++}" g++)
    flags+=(-fsanitize=thread)
    optimise=(-O1 -g1)
    ;;
  neon)
    optimise=(-O2 -g1)
    if [ "$machine" = aarch64 ]; then
      compiler=$(need "${CXX:-g++}" g++)
    else
      compiler=$(need aarch64-linux-gnu-g++ g++-aarch64-linux-gnu)
      emulator=("$(need qemu-aarch64 qemu-aarch64-static qemu-user)")
      flags+=(-static)
      machine=aarch64
    fi
    ;;
  *)
    echo "usage: tests/native/run.sh sanitize|threads|neon" >&2
    exit 2
    ;;
esac

# The cases need torch: that of the project's environment, or of $PYTHON.
python=${PYTHON:-.venv/bin/python}
if ! "$python" -c 'import torch, numpy' 2>/dev/null; then
  make --no-print-directory .venv/.torch-cpu
  python=.venv/bin/python
fi

rm -rf "$folder"
mkdir -p "$folder"
"$python" tests/native/cases.py cases "$folder/cases.bin" &
cases=$!

# One line an object: its name and the command that makes it. gpt2fast/compiler_flags.py holds the flags.
compile() { printf '%q ' "$compiler" "${flags[@]}" "${@:3}" "${optimise[@]}" -c "$1" -o "$folder/$2.o" && echo; }
commands() {
  local isa own common=()
  while read -r isa own; do
    if [ "$isa" = common ]; then
      read -ra common <<<"$own"
    else
      # shellcheck disable=SC2086
      compile "csrc/cpu/isa_$isa.cpp" "$isa" "${common[@]}" $own
    fi
  done < <("$python" tests/native/cases.py flags "$machine")
  compile csrc/cpu/dispatch.cpp dispatch
  compile tests/native/test_kernels.cpp test_kernels
}
jobs=$(getconf _NPROCESSORS_ONLN)
commands | xargs -P "$jobs" -d '\n' -n 1 bash -c
"$compiler" "${flags[@]}" "$folder"/*.o -o "$folder/test_kernels"

wait "$cases"
# The slowest, scalar, begins.
"${emulator[@]}" "$folder/test_kernels" | tac |
  xargs -P "$jobs" -n 1 "${emulator[@]}" "$folder/test_kernels" "$folder/cases.bin"
rm "$folder/cases.bin" # some 400 MB, kept where a case fails

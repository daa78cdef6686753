"""The instruction sets that CPU kernels are compiled for, and the compiler's flags.

setup.py runs this file alone, without the package.
"""

import platform

# ISA_FLAGS has the flags of each instruction set NAME. Only csrc/cpu/isa_NAME.cpp is compiled with them.
X86_512 = [
    "-mavx512f",
    "-mavx512bw",
    "-mavx512dq",
    "-mavx512vl",
    "-mavx2",
    "-mfma",
    "-mf16c",
    "-mprefer-vector-width=512",
]
ISA_FLAGS = {
    "x86_64": {
        "scalar": [],
        "avx2": ["-mavx2", "-mfma", "-mf16c"],
        "avx512": X86_512,
        "avx512_bf16": [*X86_512, "-mavx512bf16", "-mavx512vnni"],
    },
    "aarch64": {"scalar": [], "neon": []},
}
FLAGS = [
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-g0",
    "-Wall",
]
KERNEL_STANDARD = "-std=c++17"
PTX_FLAGS = [KERNEL_STANDARD, *FLAGS]  # of gpt2fast._ptx, the core of the PTX machine
BINDING_STANDARD = "-std=c++20"  # torch's headers and the bindings need it


def isas(machine: str | None = None) -> dict[str, list[str]]:
    """A dict from instruction set to flags, for this machine or the named one."""
    machine = machine or platform.machine()
    return ISA_FLAGS.get({"AMD64": "x86_64", "arm64": "aarch64"}.get(machine, machine), {"scalar": []})

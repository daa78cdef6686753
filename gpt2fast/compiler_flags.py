"""The instruction sets that CPU kernels are compiled for, and the flags. setup.py runs this file, by itself."""

import platform

# One row an instruction set: csrc/cpu/isa_NAME.cpp is compiled with these flags and no other file is.
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
        "avx512_bf16": [*X86_512, "-mavx512bf16"],
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
BINDING_STANDARD = "-std=c++20"  # what torch's headers and the bindings are written in


def isas(machine: str | None = None) -> dict[str, list[str]]:
    """The flags by instruction set, of this machine or the one named."""
    machine = machine or platform.machine()
    return ISA_FLAGS.get({"AMD64": "x86_64", "arm64": "aarch64"}.get(machine, machine), {"scalar": []})

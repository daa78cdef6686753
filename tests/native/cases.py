"""Writes the op cases for test_kernels.cpp: inputs, float64 truth and the bounds of the parity rule, in binary.

``cases.py cases FILE`` writes them; ``cases.py flags MACHINE`` prints the flags, a line an
instruction set.
"""

import re
import struct
import sys
from itertools import product
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import gpt2fast.ops  # noqa: E402, F401
from gpt2fast import compiler_flags  # noqa: E402
from gpt2fast.dtypes import dtype_name  # noqa: E402
from gpt2fast.op import OPS  # noqa: E402
from gpt2fast.ops.int8_linear import with_packed_sizes  # noqa: E402
from gpt2fast.packing import packed_shape  # noqa: E402
from gpt2fast.testing import build, inputs, measure, work  # noqa: E402
from gpt2fast.testing.parity import more_seeds  # noqa: E402

LIMIT = 6_000_000  # operations of a case: the sanitizers and the emulator are slow
LAYOUTS = ("contiguous", "sliced")


def strided() -> dict[str, set[str]]:
    """Ops with a kernel in csrc/cpu/dispatch.h, each with the arguments whose strides its struct knows."""
    structs = re.findall(r"^struct (\w+) \{(.*?)^\};", (ROOT / "csrc/ops.h").read_text(), re.M | re.S)
    known = {name: set(re.findall(r"\bstride_([a-z]+)", body)) for name, body in structs}
    table = re.findall(r"Kernel<(\w+)> (\w+);(?: +// (\w+) too)?", (ROOT / "csrc/cpu/dispatch.h").read_text())
    return {op: known[args] & set(OPS[op].tensors) for args, *ops in table for op in ops if op in OPS}


STRIDED = strided()

# What the declared cases leave to sizes above LIMIT, and every length of a loop's tail.
TAILS = (1, 2, 7, 8, 15, 16, 17, 31, 33, 63, 65, 100)
ROWS = [dict(B=3, T=11, C=C) for C in TAILS]
# Too much for the caches, so that the ops named write past them.
STREAMED = {torch.float32: dict(B=1, T=1350, C=1600), torch.bfloat16: dict(B=1, T=2700, C=1600)}
STREAM = ("layer_norm", "gelu")
SHAPES = [(M, 770, 33) for M in (1, 3, 9, 70)] + [(8, 513, 97), (8, 64, 300), (130, 9, 300), (520, 5, 97)]  # M, K, N
EPILOGUES = [
    dict(bias=True),
    dict(activation="gelu_tanh", residual=True),
    dict(bias=True, activation="gelu_erf", keep_preactivation=True, residual=True),
]
CUTS = [
    dict(top_k=2),
    dict(top_p=0.6, tokens=True, repetition_penalty=1.3),
    dict(top_k=5, top_p=0.7, min_p=0.1, temperature=0.6, rows=True),
    dict(temperature=0.0),
]
# Every number of rows of a tile, and outputs and inputs that end within a block, a group or a piece.
PACKED = [dict(B=1, T=M, K=300, N=40, bias=True, **(dict(residual=True) if M % 2 else {})) for M in range(1, 17)]
PACKED += [dict(B=1, T=113, K=64, N=100, bias=True), dict(B=1, T=2, K=8, N=1, bias=True)]
PACKED += [dict(B=2, T=3, K=K, N=K, bias=True, activation="gelu_tanh") for K in TAILS]
EXTRA = dict(
    int8_linear=with_packed_sizes(PACKED, 8),
    int4_linear=with_packed_sizes(PACKED, 4),
    int8_embedding=[
        case | dict(zip("JG", packed_shape(case["V"], case["C"], 8)))
        for case in (dict(B=2, T=3, C=C, V=19, P=8, positions=True, token_types=C % 2 > 0) for C in TAILS)
    ],
    embedding=[dict(B=2, T=3, C=C, V=9, P=8, positions=True, token_types=C % 2 > 0) for C in TAILS]
    + [dict(B=1, T=1, C=768, V=50, P=64, start=37), dict(B=1, T=90, C=1600, V=100, P=128)],
    layer_norm=ROWS,
    add_layer_norm=ROWS,
    gelu=[row | dict(approximate=form) for row in ROWS for form in ("tanh", "none")],
    bias_gelu=[row | dict(approximate="tanh") for row in ROWS],
    linear=[
        dict(B=1, T=M, K=K, N=N, transposed=transposed, **EPILOGUES[i % 3])
        for i, ((M, K, N), transposed) in enumerate(product(SHAPES, (False, True)))
    ]
    + [dict(B=2, T=3, K=K, N=K, bias=True, transposed=K % 2 > 0) for K in TAILS]
    + [dict(B=1, T=17, K=K, N=K, bias=True, transposed=K % 2 == 0) for K in TAILS],
    attention=[dict(B=2, T=9, S=37, H=2, D=D, mask=True) for D in (*TAILS, 40, 72, 96, 128, 255, 256)]
    + [dict(B=1, T=200, S=200, H=2, D=16), dict(B=2, T=50, S=130, H=1, D=80, window=70, mask=True)]
    + [dict(B=2, T=70, S=S, H=2, D=20, bias=True, causal=False, dropout_p=0.1, seed=True) for S in (63, 65, 129)]
    + [dict(B=2, T=9, S=66, H=3, D=12, bias=shape) for shape in ((1, 1, 1, 66), (2, 1, 9, 1), (1, 3, 1, 1))]
    + [dict(B=1, T=3, S=0, H=2, D=8)],
    decode_attention=[dict(B=2, T=1, S=S, H=2, D=24, starts=True) for S in (1, 63, 64, 65, 200)]
    + [dict(B=3, T=2, S=20, H=2, D=D) for D in (*TAILS, 80, 128, 256)],
    cross_entropy=[dict(R=40, V=V, label_smoothing=0.1 * (V % 2)) for V in TAILS],
    sample=[dict(B=6, T=4, V=V, **cut) for V in TAILS for cut in CUTS],
)


def flags(machine: str) -> None:
    print("common", *compiler_flags.FLAGS)
    for isa, own in compiler_flags.isas(machine).items():
        print(isa, *own)


def cases(path: str) -> None:
    torch.set_num_threads(1)  # the compilers have the other cores
    with open(path, "wb") as out:
        for name in STRIDED:
            op = OPS[name]
            small = [case for case in op.cases if work(op, case) <= LIMIT]
            for case in small + EXTRA.get(name, []):
                for dtype, layout in product(op.dtypes, LAYOUTS if STRIDED[name] else LAYOUTS[:1]):
                    Case(out).write(op, case, dtype, layout)
            for dtype, case in STREAMED.items() if name in STREAM else ():
                Case(out).write(op, case, dtype, LAYOUTS[0])


class Case:
    """One case in one dtype and layout. Integers are int64, floats float64, little-endian; a text: length, bytes."""

    def __init__(self, out):
        self.out = out

    def write(self, op, case: dict, dtype, layout: str) -> None:
        runs = [self.run(op, case, dtype, layout)]
        runs += [self.run(op, case, dtype, layout, seed) for seed in more_seeds(op, case, runs[0][2])]
        args = runs[0][0]
        word = dtype_name(dtype)
        self.text(op.name)
        self.text(f"{op.name} {' '.join(f'{k}={v}' for k, v in case.items())} {word} {layout}")
        self.text(word)
        plain = {name: value for name, value in args.items() if name not in op.tensors and value is not None}
        self.integers(len(plain))
        for name, value in plain.items():
            self.text(name)
            self.text(value if isinstance(value, str) else repr(float(value)))
        self.integers(len(op.outputs))
        for i, name in enumerate(op.outputs):
            self.bounds(name, *(torch.stack([run[kind][i] for run in runs]) for kind in (1, 2)))
        self.integers(len(runs))
        for args, plain, truth in runs:
            tensors = {name: args[name] for name in op.tensors if args[name] is not None}
            self.integers(len(tensors))
            for name, tensor in tensors.items():
                self.tensor(name, tensor)
            for p, t in zip(plain, truth):  # integers must equal the reference's
                self.integers(p.numel())
                self.out.write((t if p.is_floating_point() else p).double().contiguous().numpy().tobytes())

    def run(self, op, case: dict, dtype, layout: str, seed: int = 0) -> tuple:
        """Arguments, plain PyTorch's outputs and the truth."""
        args = self.arguments(op, case, dtype, layout, seed)
        return args, inputs.reference(op, args), inputs.reference(op, args, torch.float64)

    @staticmethod
    def arguments(op, case: dict, dtype, layout: str, seed: int) -> dict:
        case = dict(case)
        if op.name == "cross_entropy":
            case["reduction"] = "none"  # the kernel gives the loss of each row
        args = build(op, case, dtype, layout, seed)
        for name in op.tensors:
            if args[name] is not None and name not in STRIDED[op.name]:
                args[name] = args[name].contiguous()
        if isinstance(case.get("bias"), tuple):
            args["bias"] = args["bias"][tuple(slice(n) for n in case["bias"])]
        return args

    def bounds(self, name: str, plain, truth) -> None:
        self.text(name)
        self.text(dtype_name(plain.dtype))
        compared = plain.is_floating_point() and plain.numel()
        found = measure(plain, plain, truth) if compared else dict(rms_bound=0.0, max_bound=0.0)
        self.out.write(struct.pack("<dd", found["rms_bound"], found["max_bound"]))

    def tensor(self, name: str, t) -> None:
        """Sizes, strides, and the memory from the first element to the last, what lies between rows included."""
        self.text(name)
        self.text(dtype_name(t.dtype))
        self.integers(t.dim(), *t.shape, *t.stride())
        span = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride())) if t.numel() else 0
        memory = torch.as_strided(t, (span,), (1,)).view(torch.uint8).numpy().tobytes()
        self.integers(len(memory))
        self.out.write(memory)

    def text(self, words: str) -> None:
        encoded = words.encode()
        self.integers(len(encoded))
        self.out.write(encoded)

    def integers(self, *values: int) -> None:
        self.out.write(struct.pack(f"<{len(values)}q", *values))


if __name__ == "__main__":
    {"cases": cases, "flags": flags}[sys.argv[1]](sys.argv[2])

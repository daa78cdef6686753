"""Runs PTX instructions that treat each lane alone over whole arrays, with all lanes and with some lanes inactive."""

import numpy as np
from programs import load, run, store

PREFIX = {("f", 4): "%f", ("f", 8): "%d", ("u", 2): "%h", ("i", 2): "%h", ("f", 2): "%h"}
INDEX = "mad.lo.u32 %thread, %ctaid.x, 32, %thread;\n"


def register(dtype: np.dtype, index: int) -> str:
    return PREFIX.get((dtype.kind, dtype.itemsize), "%rd" if dtype.itemsize == 8 else "%r") + str(index)


def apply(code: str, result: type, *inputs: np.ndarray, target: str = "sm_80") -> np.ndarray:
    """The code's result {d}, with {a}, {b}, {c}, {e} from the inputs. Each element has a thread.

    The code runs without a guard, and guarded by two complementary predicates. Both must give the same result.
    """
    n = len(inputs[0])
    padded = [np.resize(x, -(-n // 32) * 32) for x in inputs]
    dtype = np.dtype(result)
    names = {name: register(x.dtype, 10 + i) for i, (name, x) in enumerate(zip("abce", padded, strict=False))}
    body = INDEX + "and.b32 %r90, %thread, 3;\nsetp.eq.u32 %p10, %r90, 1;\n"
    for i, (x, name) in enumerate(zip(padded, names.values(), strict=True)):
        body += load(name, i, f"b{8 * x.itemsize}")
    full, parted = register(dtype, 20), register(dtype, 21)
    body += code.format(d=full, **names) + "\n"
    for guard in "@%p10", "@!%p10":
        for line in filter(None, (part.strip() for part in code.format(d=parted, **names).split(";"))):
            body += f"{guard} {line};\n"
    bits = f"b{8 * dtype.itemsize}"
    body += store(full, len(padded), bits) + store(parted, len(padded) + 1, bits)
    out, again = np.zeros(len(padded[0]), dtype), np.zeros(len(padded[0]), dtype)
    run(body, *padded, out, again, grid=(len(out) // 32, 1, 1), target=target)
    unsigned = np.dtype(f"u{dtype.itemsize}")
    np.testing.assert_array_equal(out.view(unsigned), again.view(unsigned), err_msg=f"guarded {code}")
    return out[:n]


def pairs(*values: np.ndarray) -> list[np.ndarray]:
    """All combinations of the values, as arrays of the same length."""
    return [np.ascontiguousarray(x.ravel()) for x in np.meshgrid(*values, indexing="ij")]


def integers(dtype: str, extra: int = 6) -> np.ndarray:
    """Integers at both ends of the range, around zero, with single bits, and random ones."""
    bits = 8 * np.dtype(dtype).itemsize
    random = np.random.default_rng(bits).integers(0, 2**64, extra, dtype=np.uint64).tolist()
    chosen = [
        0,
        1,
        2,
        3,
        7,
        -1,
        -2,
        -5,
        1 << bits - 1,
        (1 << bits - 1) - 1,
        (1 << bits - 1) + 1,
        1 << bits // 2,
        *random,
    ]
    return np.array([x & (1 << bits) - 1 for x in chosen], f"u{bits // 8}").view(dtype)

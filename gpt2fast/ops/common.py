"""Functions that several ops share: wider dtypes, memory layout for a GPU, and Philox random numbers in PyTorch."""

import functools
import math

import torch
from torch import Tensor


def widen(x: Tensor) -> Tensor:
    """Converts float16 and bfloat16 to float32; float32 and float64 stay as they are."""
    return x if x.dtype == torch.float64 else x.float()


def elements(n: dict) -> int:
    """The number of elements of one list of tensors, in a case or call of an op on lists."""
    return sum(math.prod(shape) for shape in n["each"])


def wide_dtype(x: Tensor) -> torch.dtype:
    """The dtype that ``widen`` converts x to."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def multiply(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> None:
    """out = a @ b, or out += a @ b, by PyTorch: a (M, K), b (K, N) of one dtype, out (M, N) in ``wide_dtype`` of it.

    On a CPU, PyTorch rounds a product of 16-bit numbers to 16 bits. For ``add``, the numbers are therefore converted to
    float32 first, which halves the speed.
    """
    if a.dtype == out.dtype:
        out.addmm_(a, b) if add else torch.mm(a, b, out=out)
    elif not a.is_cuda:
        out.addmm_(a.to(out.dtype), b.to(out.dtype)) if add else out.copy_(a @ b)
    elif not add:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    elif _adds_wide(a.device, a.dtype):
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        out.add_(torch.mm(a, b, out_dtype=out.dtype))


@functools.cache
def _adds_wide(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this PyTorch can add a product of 16-bit numbers to float32 in one step. Some versions raise an error."""
    a = torch.zeros(16, 16, device=device, dtype=dtype)
    try:
        torch.addmm(a.float(), a, a, out_dtype=torch.float32)
    except (RuntimeError, TypeError):
        return False
    return True


def aligned(*tensors: Tensor) -> tuple[Tensor, ...]:
    """On a GPU, copies the tensors whose rows are not dense or not aligned to 16 bytes.

    PyTorch's attention reads 16 bytes at a time, whatever the strides are. From a row that is not aligned it reads
    wrong numbers, or the access faults.
    """
    return tuple(t if _is_aligned(t) else t.contiguous() for t in tensors)


def _is_aligned(t: Tensor) -> bool:
    if t.device.type != "cuda":
        return True
    steps = [step * t.element_size() for step in t.stride()[:-1]]
    return t.stride(-1) == 1 and not any(n % 16 for n in (t.data_ptr(), *steps))


_MASK = 0xFFFFFFFF


def philox(key: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The random number generator Philox 4x32-10 (Salmon et al., SC11).

    It maps the key and the two halves of the counter, int64 tensors that broadcast, to four 32-bit words, as int64. The
    bits are the same as those of ``Philox`` in csrc/math.h, for any seed.
    """
    low, high, key = torch.broadcast_tensors(low, high, key)
    k0, k1 = key & _MASK, (key >> 32) & _MASK
    c0, c1, c2, c3 = low & _MASK, (low >> 32) & _MASK, high & _MASK, (high >> 32) & _MASK
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2  # int64 wraps around: the bits equal those of the unsigned product
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3


def uniform53(key: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Float64 uniforms in [0, 1) with 53 bits, from the first two words of a Philox block."""
    first, second, _, _ = philox(key, low, high)
    return ((first << 21) ^ (second >> 11)).double() * 2.0**-53


def dropout_kept(seed: Tensor, p: float, B: int, H: int, T: int, S: int) -> Tensor:
    """(B, H, T, S) bool: which probabilities attention dropout keeps, for ``seed`` (1,) int64."""
    device = seed.device
    row = torch.arange(B * H * T, device=device).view(B, H, T, 1)
    block = torch.arange((S + 3) // 4, device=device)
    words = torch.stack(philox(seed.view(1, 1, 1, 1), block, row), dim=-1)
    uniform = (words >> 8).float() * 2.0**-24
    return uniform.view(B, H, T, -1)[..., :S] >= p

"""Packed weights of 8 and 4 bits: rounds a matrix and lays it out as the kernels read it, and back.

The layout consists of blocks of 16 outputs; a block of groups of 32 inputs; a group of 8 words; and a word of 4 inputs
for each of the 16 outputs. csrc/cpu/packed_linear.h, int8_linear.h and int4_linear.h describe it too. Missing outputs
and inputs of the last block and group are zeros.

Rounding to 8 bits is symmetric with one scale an output. Rounding to 4 bits has one scale for each output and group of
32 inputs. The scale is searched: the one with the least squared error among some that clip the largest values.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

OUTPUTS, INPUTS = 16, 32  # of a block, of a group
WORD = 4  # inputs of a word
ZERO8, ZERO4 = 128, 8  # the byte, and the half byte, of the value 0
HALVES = OUTPUTS * INPUTS // 2  # bytes of a group of 4 bits before its scales
GROUP_BYTES = {8: OUTPUTS * INPUTS, 4: HALVES + 2 * OUTPUTS}
CLIPS = 16  # the number of scales that are tried for a group of 4 bits
LEAST_CLIP = 0.7  # of the scale that clips nothing
SLAB = 1 << 20  # the number of elements that are rounded at a time, so that the temporaries stay in the caches


def packed_shape(outputs: int, inputs: int, bits: int) -> tuple[int, int, int]:
    """The shape of a packed weight: blocks, groups, bytes of a group."""
    return -(-outputs // OUTPUTS), -(-inputs // INPUTS), GROUP_BYTES[bits]


def pack_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds weight (N, K) to 8 bits. Returns the packed weight (blocks, groups, 512) uint8 and scale (N,) float32.

    Raises ValueError where a number is not finite.
    """
    N, K = weight.shape
    packed, scale = weight.new_empty(packed_shape(N, K, 8), dtype=torch.uint8), weight.new_empty(N, dtype=torch.float32)
    for first, rows in _slabs(weight):
        most = rows.abs().amax(1) if K else rows.new_zeros(len(rows))
        step = most / 127
        scale[first : first + len(rows)] = step
        values = (rows / step.where(step > 0, step.new_ones(()))[:, None]).round_().clamp_(-127, 127)
        words = _words((values + ZERO8).to(torch.uint8), ZERO8)
        packed[first // OUTPUTS :][: len(words)] = words.view(*words.shape[:2], GROUP_BYTES[8])
    return packed, scale


def pack_int4(weight: Tensor) -> Tensor:
    """Rounds weight (N, K) to 4 bits. Returns the packed weight (blocks, groups, 288) uint8.

    Raises ValueError where a number is not finite.
    """
    packed = weight.new_empty(packed_shape(*weight.shape, 4), dtype=torch.uint8)
    for first, rows in _slabs(weight):
        groups = _groups(rows)  # (n, G, 32)
        scale = _search_scales(groups)
        values = _round4(groups, scale.float()).flatten(1)
        words = _words((values + ZERO4).to(torch.uint8), ZERO4)  # (blocks, groups, 8, 16, 4)
        here = packed[first // OUTPUTS :][: len(words)]
        halves = words[:, :, 0::2] | words[:, :, 1::2] << 4
        here[..., :HALVES] = halves.flatten(2)
        scales = F.pad(scale, (0, 0, 0, -len(rows) % OUTPUTS)).view(len(words), OUTPUTS, -1).transpose(1, 2)
        here[..., HALVES:] = scales.contiguous().view(torch.uint8)
    return packed


def unpack_int8(packed: Tensor, scale: Tensor, inputs: int) -> Tensor:
    """The weight (N, K) float32 that pack_int8 has rounded, with K = ``inputs``. For a float64 scale, float64."""
    words = packed.view(*packed.shape[:2], INPUTS // WORD, OUTPUTS, WORD)
    return (_rows(words, len(scale), inputs).to(scale.dtype) - ZERO8) * scale[:, None]


def unpack_int4(packed: Tensor, outputs: int, inputs: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight (N, K) that pack_int4 has rounded, with N = ``outputs`` and K = ``inputs``."""
    halves = packed[..., :HALVES].view(*packed.shape[:2], INPUTS // WORD // 2, OUTPUTS, WORD)
    words = torch.stack([halves & 15, halves >> 4], 3).flatten(2, 3)
    scales = (
        packed[..., HALVES:].clone(memory_format=torch.contiguous_format).view(torch.bfloat16).to(dtype)
    )  # (blocks, groups, 16)
    scales = scales.transpose(1, 2).flatten(0, 1)[:outputs].repeat_interleave(INPUTS, 1)[:, :inputs]
    return (_rows(words, outputs, inputs).to(dtype) - ZERO4) * scales


def unpack_rows_int8(packed: Tensor, scale: Tensor, inputs: int, indices: Tensor) -> Tensor:
    """Rows of the weight that pack_int8 has rounded: (..., K) for indices (...) int64."""
    words = packed.view(*packed.shape[:2], INPUTS // WORD, OUTPUTS, WORD)
    rows = words[indices // OUTPUTS, :, :, indices % OUTPUTS].flatten(-3)[..., :inputs]
    return (rows.to(scale.dtype) - ZERO8) * scale[indices][..., None]


def round_inputs(x: Tensor) -> Tensor:
    """x (..., K) as the kernels round it: in each piece of 128 inputs, integers up to 127 times max |x| / 127.

    A piece without a magnitude of 2^-100 or more counts as zeros. A NaN or an infinity makes its whole piece NaN. The
    integers are found in float32, whatever x's dtype is. Returns float32, or float64 for a float64 x.
    """
    piece, K = 128, x.shape[-1]
    pieces = F.pad(x.float(), (0, -K % piece)).unflatten(-1, (-1, piece))
    most = pieces.abs().amax(-1, keepdim=True)
    integers = (pieces * torch.where(most >= 2.0**-100, 127 / most, 0.0)).round().clamp(-127, 127)
    step = most / 127 + (pieces * 0).sum(-1, keepdim=True)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    rounded = integers.nan_to_num().to(wide) * step.to(wide)
    return rounded.flatten(-2)[..., :K]


def _slabs(weight: Tensor):
    """Parts of the rows: (index of the first row, rows float32). Raises ValueError for NaN and infinity."""
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(f"gpt2fast: a weight to pack must be a matrix of floats, got {tuple(weight.shape)}")
    count = max(SLAB // max(weight.shape[1], 1) // OUTPUTS, 1) * OUTPUTS
    for first in range(0, weight.shape[0], count):
        rows = weight[first : first + count].float().contiguous()
        if not bool(rows.isfinite().all()):
            raise ValueError("gpt2fast: a weight to pack must have finite numbers only, got NaN or infinity")
        yield first, rows


def _groups(rows: Tensor) -> Tensor:
    """(n, K) as (n, groups, 32), padded with zeros."""
    return F.pad(rows, (0, -rows.shape[1] % INPUTS)).unflatten(1, (-1, INPUTS))


def _words(values: Tensor, zero: int) -> Tensor:
    """Bytes (n, K) as (blocks, groups, 8 words, 16 outputs, 4 inputs), padded with ``zero``."""
    n, K = values.shape
    padded = F.pad(values, (0, -K % INPUTS, 0, -n % OUTPUTS), value=zero)
    blocks = padded.view(-1, OUTPUTS, padded.shape[1] // INPUTS, INPUTS // WORD, WORD)
    return blocks.permute(0, 2, 3, 1, 4).contiguous()


def _rows(words: Tensor, outputs: int, inputs: int) -> Tensor:
    """The inverse of ``_words``: (N, K)."""
    return words.permute(0, 3, 1, 2, 4).flatten(2).flatten(0, 1)[:outputs, :inputs]


def _round4(groups: Tensor, scale: Tensor) -> Tensor:
    """Integers in [-8, 7] for groups (n, G, 32) and scale (n, G)."""
    inverse = torch.where(scale == 0, 0.0, 1 / scale)
    return (groups * inverse[..., None]).round_().clamp_(-ZERO4, 7)


def _search_scales(groups: Tensor) -> Tensor:
    """The scales (n, G) bfloat16 with the least squared error for groups (n, G, 32).

    The extreme value becomes -8, since there is one more negative integer than positive ones. Smaller scales clip it.
    """
    low, high = groups.aminmax(dim=-1)
    extreme = torch.where(-low > high, low, high)
    full = extreme / -ZERO4
    best = full.to(torch.bfloat16)
    least = torch.full_like(full, torch.inf)
    for step in range(CLIPS):
        clip = 1 - (1 - LEAST_CLIP) * step / (CLIPS - 1)
        scale = (full * clip).to(torch.bfloat16)
        wide = scale.float()
        error = torch.addcmul(groups, _round4(groups, wide), wide[..., None], value=-1).square_().sum(-1)
        better = error < least
        best, least = torch.where(better, scale, best), torch.where(better, error, least)
    return best

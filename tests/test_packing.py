"""Packed weights: what rounding loses, that the layout gives back what was packed, and that bad input is named."""

import pytest
import torch

from gpt2fast import ops, packing
from gpt2fast.testing import assert_close_to_truth, cpu_isa
from gpt2fast.testing.isa import runnable_isas

SUM_OF_SQUARES = 1 + packing.INPUTS * torch.finfo(torch.float32).eps  # how much a sum over a group may be off

SIZES = [(1, 1), (16, 32), (17, 33), (771, 770), (5, 4096)]


@pytest.mark.parametrize("N, K", SIZES)
def test_int8_is_the_nearest_multiple_of_the_scale(N, K):
    weight = torch.randn(N, K)
    packed, scale = packing.pack_int8(weight)
    assert packed.shape == packing.packed_shape(N, K, 8) and packed.dtype == torch.uint8
    assert torch.equal(scale, weight.abs().amax(1) / 127)
    nearest = (weight / scale[:, None]).round() * scale[:, None]
    assert torch.equal(packing.unpack_int8(packed, scale, K), nearest)


@pytest.mark.parametrize("N, K", SIZES)
def test_rows_of_an_int8_table(N, K):
    packed, scale = packing.pack_int8(torch.randn(N, K))
    indices = torch.randint(0, N, (3, 5))
    expected = packing.unpack_int8(packed, scale, K)[indices]
    assert torch.equal(packing.unpack_rows_int8(packed, scale, K, indices), expected)


@pytest.mark.parametrize("N, K", SIZES)
def test_int4_takes_the_best_of_its_scales(N, K):
    """No value of a group is further away than half a scale, but for clipped ones, and no tried scale does better."""
    weight = torch.randn(N, K)
    packed = packing.pack_int4(weight)
    assert packed.shape == packing.packed_shape(N, K, 4)
    back = packing.unpack_int4(packed, N, K)
    error = packing._groups((weight - back).square()).sum(-1)
    groups = packing._groups(weight)
    low, high = groups.aminmax(dim=-1)
    full = torch.where(-low > high, low, high) / -8
    for clip in torch.linspace(1, packing.LEAST_CLIP, packing.CLIPS):
        scale = (full * clip).bfloat16().float()
        tried = (groups / scale[..., None]).nan_to_num().round().clamp(-8, 7) * scale[..., None]
        assert bool((error <= (groups - tried).square().sum(-1) * SUM_OF_SQUARES).all())


def test_zeros_stay_zeros():
    weight = torch.zeros(20, 70)
    packed, scale = packing.pack_int8(weight)
    assert torch.equal(packing.unpack_int8(packed, scale, 70), weight)
    assert torch.equal(packing.unpack_int4(packing.pack_int4(weight), 20, 70), weight)


@pytest.mark.parametrize("pack", (packing.pack_int8, packing.pack_int4))
@pytest.mark.parametrize("bad", (torch.nan, torch.inf))
def test_numbers_that_cannot_be_rounded_are_refused(pack, bad):
    weight = torch.randn(40, 40)
    weight[39, 7] = bad
    with pytest.raises(ValueError, match="must have finite numbers only, got NaN or infinity"):
        pack(weight)


@pytest.mark.parametrize("value", (torch.nan, torch.inf, -torch.inf))
def test_what_is_not_finite_in_x_is_not_hidden(value):
    """The whole row of y is NaN, and no other row changes."""
    weight, bias = torch.randn(40, 300), torch.zeros(40)
    x = torch.randn(3, 300)
    spoilt = x.clone()
    spoilt[1, 200] = value
    packed = packing.pack_int8(weight)
    for run in (lambda x: ops.int8_linear(x, *packed), lambda x: ops.int4_linear(x, packing.pack_int4(weight), bias)):
        good, bad = run(x), run(spoilt)
        assert bool(bad[1].isnan().all()) and torch.equal(bad[::2], good[::2])


def test_tiny_and_huge_x():
    packed = packing.pack_int8(torch.randn(40, 300))
    for factor in (1e-38, 2.0**-100, 1e-20, 1e34):
        x = torch.randn(3, 300) * factor
        truth = packing.round_inputs(x.double()) @ packing.unpack_int8(packed[0], packed[1].double(), 300).t()
        plain = ops.int8_linear.reference(x, *packed)
        assert_close_to_truth(ops.int8_linear(x, *packed), plain, truth, f"x times {factor}")


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("isa", runnable_isas())
def test_a_row_has_the_same_bits_in_every_batch(isa, dtype):
    x = torch.randn(230, 300).to(dtype)
    packed, packed4, bias = packing.pack_int8(torch.randn(70, 300)), packing.pack_int4(torch.randn(70, 300)), x[0, :70]
    with cpu_isa(isa):
        for run in (lambda x: ops.int8_linear(x, *packed), lambda x: ops.int4_linear(x, packed4, bias)):
            whole = run(x)
            for rows in (1, 2, 3, 7, 8, 9, 14, 15, 112, 113):
                assert torch.equal(run(x[:rows]), whole[:rows]), rows


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("activation", ("none", "gelu_tanh", "gelu_erf"))
def test_all_instruction_sets_with_fused_steps_have_the_same_bits(dtype, activation):
    """All but the scalar one, which rounds a product before it adds."""
    x, weight = torch.randn(20, 300).to(dtype), torch.randn(70, 300)
    packed, packed4, bias = packing.pack_int8(weight), packing.pack_int4(weight), torch.randn(70).to(dtype)
    found = []
    for isa in runnable_isas():
        if isa != "scalar":
            with cpu_isa(isa):
                eight = ops.int8_linear(x, *packed, bias, None, activation)
                found.append((eight, ops.int4_linear(x, packed4, bias, None, activation)))
    for eight, four in found[1:]:
        assert torch.equal(eight, found[0][0]) and torch.equal(four, found[0][1])


def test_wrong_blocks_are_named():
    packed, scale = packing.pack_int8(torch.randn(40, 300))
    with pytest.raises(ValueError, match="int8_linear: weight must have 3 blocks of 16 outputs and 11 groups"):
        ops.int8_linear(torch.randn(2, 330), packed, scale)
    with pytest.raises(ValueError, match="int4_linear: weight must have 2 blocks .* for 20 outputs .* got 3 and 10"):
        ops.int4_linear(torch.randn(2, 300), packing.pack_int4(torch.randn(40, 300)), torch.zeros(20))
    with pytest.raises(ValueError, match="int8_embedding: wte must have 3 blocks of 16 rows and 11 groups"):
        ops.int8_embedding(torch.zeros(1, 1, dtype=torch.int64), packed, scale, torch.randn(4, 330))

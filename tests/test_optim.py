"""gpt2fast.AdamW against torch.optim.AdamW: steps, clipping, state, dtypes, stochastic rounding, errors."""

import copy
import io

import pytest
import torch

import gpt2fast
from gpt2fast import ops
from gpt2fast.testing import assert_close_to_truth

SHAPES = ((33, 5), (4099,), (7,), (2, 3, 4))


def parameters(dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=g).to(dtype)) for shape in SHAPES]


def gradients_of_step(step, params):
    g = torch.Generator().manual_seed(100 + step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=g).to(p.dtype)


def run(make, params, steps=4, max_norm=None):
    optimiser = make(params)
    for step in range(steps):
        gradients_of_step(step, params)
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(params, max_norm)
        optimiser.step()
    return [p.detach() for p in params], optimiser


@pytest.mark.parametrize("max_norm", (None, 0.5, 1e9))
def test_steps_are_those_of_torch(max_norm):
    options = dict(lr=0.1, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.3)
    ours, optimiser = run(lambda p: gpt2fast.AdamW(p, max_norm=max_norm, **options), parameters())
    plain, _ = run(lambda p: torch.optim.AdamW(p, foreach=False, **options), parameters(), max_norm=max_norm)
    wide = [torch.nn.Parameter(p.detach().double()) for p in parameters()]
    truth, _ = run(lambda p: torch.optim.AdamW(p, foreach=False, **options), wide, max_norm=max_norm)
    for three in zip(ours, plain, truth):
        assert_close_to_truth(*three)
    if max_norm is not None:
        norms = torch.cat([p.grad.flatten() for p in optimiser.param_groups[0]["params"]]).double().norm()
        assert_close_to_truth(optimiser.norm[None], norms.float()[None], norms[None])


def test_moments_of_bfloat16_parameters_are_float32_and_survive_a_checkpoint():
    params = parameters(torch.bfloat16)
    _, optimiser = run(lambda p: gpt2fast.AdamW(p, lr=0.01), params)
    file = io.BytesIO()
    torch.save(optimiser.state_dict(), file)
    file.seek(0)
    again = [torch.nn.Parameter(p.detach().clone()) for p in params]
    resumed = gpt2fast.AdamW(again, lr=0.5)
    resumed.load_state_dict(torch.load(file))
    assert resumed.param_groups[0]["lr"] == 0.01
    for optimiser_, own in ((optimiser, params), (resumed, again)):
        gradients_of_step(9, own)
        optimiser_.step()
    for p, q in zip(params, again):
        assert torch.equal(p, q)
        for name in ("exp_avg", "exp_avg_sq"):
            assert optimiser.state[p][name].dtype == torch.float32
            assert torch.equal(optimiser.state[p][name], resumed.state[q][name])
    assert resumed.state[again[0]]["step"] is resumed.state[again[1]]["step"] and resumed.state[again[0]]["step"] == 5


def test_the_state_of_torch_s_optimiser_is_taken_over_and_back():
    params = parameters()
    _, theirs = run(lambda p: torch.optim.AdamW(p, lr=0.1), params)

    def copies(dtype=torch.float32):
        return [torch.nn.Parameter(p.detach().clone().to(dtype)) for p in params]

    ours = gpt2fast.AdamW(again := copies())
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    truth = torch.optim.AdamW(wide := copies(torch.float64))
    truth.load_state_dict(copy.deepcopy(theirs.state_dict()))
    back = torch.optim.AdamW(third := copies())
    ours_state = copy.deepcopy(ours.state_dict())
    back.load_state_dict(ours_state | dict(param_groups=theirs.state_dict()["param_groups"]))
    for optimiser, own in ((theirs, params), (ours, again), (truth, wide), (back, third)):
        gradients_of_step(9, own)
        optimiser.step()
    for p, q, t, r in zip(params, again, wide, third):
        assert torch.equal(p, r)
        assert_close_to_truth(q.detach(), p.detach(), t.detach())


def test_parameters_that_get_gradients_later_count_their_own_steps():
    def train(optimiser_of, params):
        optimiser = optimiser_of(params, lr=0.1)
        for step in range(4):
            gradients_of_step(step, params)
            if step < 2:
                params[1].grad = None
            optimiser.step()
        return [p.detach() for p in params]

    wide = [torch.nn.Parameter(p.detach().double()) for p in parameters()]
    ours, plain = train(gpt2fast.AdamW, parameters()), train(torch.optim.AdamW, parameters())
    for three in zip(ours, plain, train(torch.optim.AdamW, wide)):
        assert_close_to_truth(*three)


def test_groups_of_their_own_numbers_and_of_two_dtypes():
    def groups(own):
        return [dict(params=own[:2], weight_decay=0.5), dict(params=own[2:], lr=0.01)]

    found = []
    for kind, dtype in ((gpt2fast.AdamW, None), (torch.optim.AdamW, None), (torch.optim.AdamW, torch.float64)):
        own = parameters()
        own[0], own[3] = (torch.nn.Parameter(own[i].detach().bfloat16()) for i in (0, 3))
        own = own if dtype is None else [torch.nn.Parameter(p.detach().to(dtype)) for p in own]
        given = [torch.Generator().manual_seed(3), *own]
        clip = dict(max_norm=1.0) if kind is gpt2fast.AdamW else {}
        optimiser = kind(groups(own), lr=0.1, **clip)
        for p in own:
            p.grad = torch.randn(p.shape, generator=given[0]).bfloat16().to(p.dtype)
        if not clip:
            torch.nn.utils.clip_grad_norm_(own, 1.0, foreach=False)
        optimiser.step()
        found.append([p.detach() for p in own])
    for three in zip(*found):
        assert_close_to_truth(*three)


def test_stochastic_rounding_keeps_updates_that_are_smaller_than_a_rounding_step():
    """1000 steps of 1e-4 from 1. Rounded to the nearest bfloat16, the weight would never change."""
    moved = {}
    for stochastic in (False, True):
        weight = torch.nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
        optimiser = gpt2fast.AdamW([weight], lr=1e-4, weight_decay=0.0, stochastic_rounding=stochastic, seed=1)
        for _ in range(1000):
            weight.grad = torch.ones_like(weight)
            optimiser.step()
        moved[stochastic] = weight.float()
    assert torch.equal(moved[False], torch.ones(4096))
    # A step goes down by a rounding step r = 2^-8 with probability p = 1e-4 / r. The standard deviation of the weights'
    # mean is therefore sqrt(1000 p (1 - p) / 4096) r; five of these are allowed.
    r = 2.0**-8
    p = 1e-4 / r
    assert abs(moved[True].mean() - 0.9) < 5 * (1000 * p * (1 - p) / 4096) ** 0.5 * r
    assert moved[True].std() > 0


def test_equal_seeds_round_alike_and_infinities_stay():
    def step(seed):
        weight = torch.nn.Parameter(torch.linspace(0.5, 3.0, 999).bfloat16())
        weight.data[7] = float("inf")
        weight.grad = torch.ones_like(weight)
        gpt2fast.AdamW([weight], stochastic_rounding=True, seed=seed).step()
        return weight.detach()

    assert torch.equal(step(3), step(3)) and not torch.equal(step(3), step(4))
    assert step(3)[7] == float("inf")


def test_a_closure_no_gradients_and_copies():
    params = parameters()
    optimiser = gpt2fast.AdamW(params, max_norm=1.0)
    assert optimiser.step(lambda: 5) == 5 and optimiser.norm is None
    copy.deepcopy(optimiser)
    weight = params[0]
    loss = (weight * weight).sum()
    weight.grad = torch.ones_like(weight)
    optimiser.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_bad_input():
    for options, message in (
        (dict(lr=-1.0), r"lr must be at least 0, got -1"),
        (dict(betas=(1.0, 0.9)), r"beta1 must lie in \[0, 1\), got 1"),
        (dict(max_norm=-1.0), "max_norm must be at least 0, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            gpt2fast.AdamW(parameters(), **options)
    with pytest.raises(TypeError, match="params must have a dtype of bfloat16, float16, float32, got float64"):
        gpt2fast.AdamW(parameters(torch.float64))
    with pytest.raises(TypeError, match="params must have a dtype of bfloat16, float32, got float16"):
        gpt2fast.AdamW(parameters(torch.float16), stochastic_rounding=True)
    table = torch.nn.Embedding(5, 3, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match=r"gradients must be dense, got a sparse one of shape \(5, 3\)"):
        gpt2fast.AdamW(table.parameters()).step()
    for name in ("amsgrad", "maximize"):
        theirs = torch.optim.AdamW(parameters(), **{name: True})
        with pytest.raises(ValueError, match=f"gpt2fast.AdamW: {name} must be False in the state, got True"):
            gpt2fast.AdamW(parameters()).load_state_dict(theirs.state_dict())
    weight, moments = [torch.zeros(3)], ([torch.zeros(3)], [torch.zeros(3)])
    with pytest.raises(ValueError, match=r"gpt2fast::adamw_: gradients must have 1 tensors, got 2"):
        ops.adamw_(weight, weight * 2, *moments, torch.ones(()))
    with pytest.raises(ValueError, match=r"gpt2fast::adamw_: gradients\[0\] must have shape \(3,\), got \(4,\)"):
        ops.adamw_(weight, [torch.zeros(4)], *moments, torch.ones(()))
    with pytest.raises(TypeError, match=r"gpt2fast::adamw_: exp_avgs\[0\] must have dtype float32, got bfloat16"):
        ops.adamw_(weight, weight, [torch.zeros(3).bfloat16()], moments[1], torch.ones(()))

"""The whole GPT-2 on the PTX machine, with only Triton's kernels and with only those in CUDA C++: forward, generation,
backward, optimiser steps."""

import copy
import re

import pytest
import torch
from both import PACKAGES, reason_against

pytest.importorskip("gpt2fast._ptx", reason="gpt2fast._ptx is not built")

from gpt2fast import GPT2, AdamW, Config, use_backend
from gpt2fast.testing import assert_close_to_truth, ptx

SIZES = dict(n_layer=2, n_embd=48, n_head=3, vocab_size=97, n_positions=40, bos_token_id=0, eos_token_id=0)
DTYPES = pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))


@pytest.fixture(params=PACKAGES)
def backend(request):
    if why := reason_against(request.param):
        pytest.skip(why)
    return request.param


def names_of(launches):
    """The names of the kernels, without namespaces and template arguments."""
    return [re.search(r"(\w+_kernel)\b", launch.name)[1] for launch in launches]


def models(dtype=torch.float32, **changes):
    """Our model, the plain one and the truth, with the same parameters."""
    torch.manual_seed(3)
    without = dict(embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0)
    ours = GPT2(Config(**SIZES | dict(initializer_range=0.2) | without | changes))
    with torch.no_grad():
        for parameter in ours.parameters():
            if parameter.dim() == 1:  # biases start at 0 and norms at 1, which would hide errors
                parameter.normal_(1.0, 0.1)
    ours = ours.to(dtype)
    return ours, copy.deepcopy(ours), copy.deepcopy(ours).double()


def on_each(backend, function, trio):
    """``function`` of our model with a backend's kernels only, of the plain one and the truth with the references."""
    with ptx.machine() as machine, use_backend(backend):
        found = [function(trio[0])]
    with use_backend("reference"):
        return found + [function(model) for model in trio[1:]], machine.launches


def tokens(B=2, T=11, seed=0):
    return torch.randint(1, SIZES["vocab_size"], (B, T), generator=torch.Generator().manual_seed(seed))


@DTYPES
@pytest.mark.parametrize("padded", (False, True))
def test_logits(backend, padded, dtype):
    mask = torch.ones(2, 11, dtype=torch.bool)
    mask[0, :4] = not padded
    with torch.no_grad():
        found, launches = on_each(backend, lambda model: model(tokens(), mask=mask)[mask], models(dtype))
    assert_close_to_truth(*found, "logits")
    product = dict(triton="linear_kernel", cuda="product_kernel")[backend]
    assert set(names_of(launches)) == {"embedding_kernel", "layer_norm_kernel", product, "attention_kernel"}


@pytest.mark.parametrize(
    "options",
    (
        dict(),
        dict(do_sample=True, top_k=9, top_p=0.9, temperature=1.3),
        dict(do_sample=True, top_k=None, repetition_penalty=1.3),
    ),
    ids=("greedy", "sampled", "penalised"),
)
@pytest.mark.parametrize("padded", (False, True))
def test_generated_tokens(backend, padded, options):
    """The text is the reference's, token by token, also for batches padded on the left."""
    mask = torch.ones(2, 11, dtype=torch.int64)
    mask[0, :4] = int(not padded)

    def generate(model):
        return model.eval().generate(tokens(), mask, max_new_tokens=8, eos_token_id=[], seed=5, **options)

    (ours, plain, _), launches = on_each(backend, generate, models())
    assert torch.equal(ours, plain)
    names = names_of(launches)
    assert names.count("decode_attention_kernel") == 7 * SIZES["n_layer"]
    assert names.count("sample_kernel" if options else "greedy_kernel") == 8


@DTYPES
def test_gradients(backend, dtype):
    ids, targets = tokens(), tokens(seed=1)
    targets[0, :3] = -100

    def gradients(model):
        loss = model(ids, targets=targets)
        loss.backward()
        return [loss.detach(), *(parameter.grad for parameter in model.parameters())]

    trio = models(dtype)
    (ours, plain, truth), _ = on_each(backend, gradients, trio)
    for name, *three in zip(("loss", *dict(trio[0].named_parameters())), ours, plain, truth):
        assert_close_to_truth(*three, name)


@DTYPES
def test_three_optimiser_steps(backend, dtype):
    """Compares losses and parameters after three steps of AdamW with a clipped norm with torch's."""
    options = dict(lr=1e-3, eps=1e-4)

    def train(model, ours):
        own, losses = list(model.parameters()), []
        kind = (lambda p: AdamW(p, max_norm=1.0, **options)) if ours else (lambda p: Adam32(p, **options))
        optimiser = kind(own)
        for step in range(3):
            loss = model(tokens(seed=step), targets=tokens(seed=step + 9))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.detach())
        return [torch.stack(losses), *(parameter.detach() for parameter in own)]

    trio = models(dtype)
    with ptx.machine() as machine, use_backend(backend):
        ours = train(trio[0], True)
    with use_backend("reference"):
        plain, truth = (train(model, False) for model in trio[1:])
    assert ours[0][2] != ours[0][0]
    for name, *three in zip(("losses", *dict(trio[0].named_parameters())), ours, plain, truth):
        assert_close_to_truth(*three, name)
    names = names_of(machine.launches)
    assert names.count("adamw_kernel") == names.count("gradient_norm_kernel") == 3


class Adam32(torch.optim.AdamW):
    """torch's, with gradients clipped to a norm of 1; parameters in bfloat16 are computed in float32 and rounded."""

    def __init__(self, own, **options):
        self.own = own
        self.wide = [torch.nn.Parameter(p.detach().to(torch.promote_types(p.dtype, torch.float32))) for p in own]
        super().__init__(self.wide, foreach=False, **options)

    def zero_grad(self):
        for p in self.own:
            p.grad = None

    def step(self):
        with torch.no_grad():
            for p, w in zip(self.own, self.wide):
                w.copy_(p)
                w.grad = p.grad.to(w.dtype)
        torch.nn.utils.clip_grad_norm_(self.wide, 1.0, foreach=False)
        super().step()
        with torch.no_grad():
            for p, w in zip(self.own, self.wide):
                p.copy_(w)

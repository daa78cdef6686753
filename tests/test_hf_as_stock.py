"""Uses of a model that work with the stock classes work with ours: wrapped and missing parts, counters, tracing, other
devices."""

import copy
import subprocess
import sys

import accelerate
import pytest
import torch
from accelerate.state import AcceleratorState
from test_hf_known_state import IDS, model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2DoubleHeadsModel

import gpt2fast
from gpt2fast.testing import assert_close_to_truth, on

GREEDY = dict(max_new_tokens=6, do_sample=False, pad_token_id=0)


class Wrapper(nn.Module):
    """An embedding behind a module that has no weight of its own."""

    def __init__(self, table):
        super().__init__()
        self.table = table

    def forward(self, x):
        return self.table(x)


def test_a_wrapped_embedding_generates():
    plain = model()
    ours = gpt2fast.optimize(copy.deepcopy(plain))
    ours.set_input_embeddings(Wrapper(ours.get_input_embeddings()))
    assert torch.equal(ours.generate(IDS, **GREEDY), plain.generate(IDS, **GREEDY))
    assert "Wrapper is not the stock class" in str(gpt2fast.report(ours))


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m.transformer.h[1], "attn", nn.Identity()),
        lambda m: delattr(m.transformer, "wte"),
        lambda m: delattr(m.transformer, "wpe"),
        lambda m: setattr(m.transformer.h[0].mlp, "act", None),
        lambda m: setattr(m.transformer.h[0], "mlp", nn.Identity()),
    ],
)
def test_a_report_never_raises(change):
    ours = gpt2fast.optimize(model())
    change(ours)
    assert "generate runs transformers' loop" in gpt2fast.report(ours).reasons[""]


def test_a_checkpoint_with_two_heads_is_read_for_its_text(tmp_path):
    torch.manual_seed(0)
    double = GPT2DoubleHeadsModel(GPT2Config(vocab_size=101, n_positions=64, n_embd=32, n_layer=2, n_head=4)).eval()
    double.save_pretrained(tmp_path)
    read, made = gpt2fast.GPT2.from_pretrained(tmp_path), gpt2fast.GPT2.from_transformers(double)
    assert torch.equal(read(IDS), made(IDS))


def test_generate_under_a_default_device_of_meta():
    ours, native = gpt2fast.optimize(model()), gpt2fast.GPT2.from_transformers(model())
    before = [ours.generate(IDS, **GREEDY), native.generate(IDS, max_new_tokens=6, do_sample=True, seed=1)]
    torch.set_default_device("meta")
    try:
        after = [ours.generate(IDS, **GREEDY), native.generate(IDS, max_new_tokens=6, do_sample=True, seed=1)]
        assert native.generate(IDS, max_new_tokens=2, do_sample=True).shape == (1, IDS.shape[1] + 2)
    finally:
        torch.set_default_device(None)
    assert all(map(torch.equal, before, after))


@pytest.mark.parametrize("target", ["fused", "reference"])
def test_flops_are_counted(target):
    plain = model()
    ours = gpt2fast.optimize(copy.deepcopy(plain))
    counted = []
    for one in (ours, plain):
        with on(target), FlopCounterMode(display=False) as counter:
            one(IDS)
        counts = counter.get_flop_counts()["Global"]
        products = ("aten.addmm", "aten.mm", "gpt2fast.linear")
        counted.append(sum(n for op, n in counts.items() if str(op) in products))
    assert counted[0] == counted[1] > 0


def test_tracing_with_gradients_names_the_way_out():
    class Logits(nn.Module):
        def __init__(self, m):
            super().__init__()
            self.m = m

        def forward(self, ids):
            return self.m(ids, use_cache=False).logits

    ours = gpt2fast.optimize(model())
    with pytest.raises(RuntimeError, match=r"trace gpt2fast.restore\(model\), or trace under torch.no_grad"):
        torch.jit.trace(Logits(ours), IDS)
    expected = ours(IDS).logits
    with torch.no_grad():
        assert torch.equal(torch.jit.trace(Logits(ours), IDS)(IDS), expected)


def test_a_wrapped_forward_is_named():
    ours = gpt2fast.optimize(model())
    inner = ours.forward

    def convert_outputs(*args, **kwargs):
        return inner(*args, **kwargs)

    ours.forward = convert_outputs
    found = gpt2fast.report(ours).reasons[""]
    assert "its forward is replaced by test_hf_as_stock.test_a_wrapped_forward_is_named" in found


@pytest.fixture
def fresh_accelerator():
    """accelerate keeps one precision for the whole process, and another test may have chosen it."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_accelerates_autocast_is_named_and_gone_when_unwrapped(fresh_accelerator):
    ours = gpt2fast.optimize(model())
    expected = ours.generate(IDS, max_new_tokens=5, do_sample=False)
    accelerator = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    prepared = accelerator.prepare(ours)
    for wrapped in (prepared, accelerator.unwrap_model(prepared, keep_fp32_wrapper=True)):
        assert "its forward is replaced by accelerate.utils.operations" in gpt2fast.report(wrapped).reasons[""]
    unwrapped = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    assert "forward" in vars(unwrapped) and gpt2fast.report(unwrapped).reasons == {}
    assert torch.equal(unwrapped.generate(IDS, max_new_tokens=5, do_sample=False), expected)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("value", [torch.inf, -torch.inf])
def test_logits_that_nothing_can_be_drawn_from(backend, value):
    logits = torch.zeros(2, 7)
    logits[1] = value
    draw = (torch.tensor([1]), torch.arange(2))
    with gpt2fast.use_backend(backend):
        with pytest.raises(ValueError, match=f"finite greatest value in each row, got {value} in row 1"):
            gpt2fast.ops.sample(logits, *draw)
        assert gpt2fast.ops.sample(logits, *draw, temperature=0.0).tolist() == [0, 0]


def run_cli(arguments, text=b""):
    command = [sys.executable, "-m", "gpt2fast", "generate", "--json", "-n", "1", "--temperature", "0", *arguments]
    return subprocess.run(command, input=text, capture_output=True)


def test_a_prompt_that_is_no_utf8():
    for done in (run_cli([b"caf\xe9"]), run_cli([], b"caf\xe9")):
        assert done.returncode == 1 and b"the prompt must be UTF-8, got other bytes at" in done.stderr, done


def test_only_the_last_newline_of_standard_input_is_the_shell_s():
    one, three = (run_cli([], b"def f():" + b"\n" * n) for n in (1, 3))
    assert b'"text": "def f():\\n\\n' in three.stdout and b'"text": "def f():\\n\\n' not in one.stdout


@pytest.mark.parametrize("first", ["gpt2fast", "torch.utils.flop_counter"])
def test_flops_are_counted_whichever_is_imported_first(first):
    code = f"""
import {first}, sys, torch, gpt2fast.ops as ops
assert ("triton" in sys.modules) <= ({first!r} != "gpt2fast")
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter:
    ops.gelu(torch.zeros(2, 3, 5))
print(counter.get_total_flops() == ops.gelu.flops(dict(B=2, T=3, C=5)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr


def test_double_backward_through_eager_attention():
    plain = model(attn_implementation="eager")
    ours, exact = gpt2fast.optimize(copy.deepcopy(plain)), copy.deepcopy(plain).double()
    found = []
    for one in (ours, plain, exact):
        first = torch.autograd.grad(one(IDS, labels=IDS).loss, one.transformer.h[0].mlp.c_fc.weight, create_graph=True)
        first[0].square().sum().backward()
        found.append([p.grad for p in one.parameters()])
    for (name, _), *gradients in zip(plain.named_parameters(), *found):
        assert_close_to_truth(*gradients, name)

"""The decoding step in one call of C++: it has the bits of the ops, it is used only where it stands for the same
calculation, and its threads work in every surrounding."""

import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ISAS
from greedy import reference_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2LMHeadModel

import gpt2fast
from gpt2fast import step, use_backend
from gpt2fast.config import Config
from gpt2fast.dtypes import dtype_name
from gpt2fast.extension import _C
from gpt2fast.model import GPT2
from gpt2fast.registration import FLOATING
from gpt2fast.testing import cpu_isa

pytestmark = pytest.mark.skipif(_C is None, reason="gpt2fast._C is not built")
GREEDY = dict(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0)
SIZES = dict(n_embd=48, n_layer=3, n_head=4, n_positions=64, vocab_size=331)


def make(dtype: torch.dtype = torch.float32, **options) -> GPT2:
    torch.manual_seed(0)
    model = GPT2(Config(**SIZES | options)).eval().to(dtype)
    for parameter in model.parameters():  # biases too: otherwise nothing would tell that they are added
        if parameter.dim() == 1:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 331, shape, generator=torch.Generator().manual_seed(seed))


def both(model: GPT2, batch: int, padded: bool = False, prompt: int = 5, count: int = 6):
    """The logits of ``count`` tokens by the step and by the model, each with a cache of its own."""
    ids, mask = tokens(batch, prompt + count), torch.ones(batch, prompt, dtype=torch.bool)
    mask[1::2, :2] = not padded
    positions = (mask.cumsum(1) - 1).masked_fill(~mask, 0)
    caches = [model.new_cache(batch, prompt) for _ in range(2)]  # too small for all tokens: they grow
    found, expected = [], []
    with torch.inference_mode():
        for cache in caches:
            model(ids[:, :prompt], positions, mask if padded else None, cache)
        native = step.Step(model, batch)
        for i in range(prompt, prompt + count):
            at = positions[:, -1:] + 1 + i - prompt if padded else None
            found.append(native.logits(ids[:, i : i + 1].contiguous(), at, caches[0]).clone())
            expected.append(model(ids[:, i : i + 1], at, None, caches[1])[:, -1])
    for ours, others in zip(caches[0].keys + caches[0].values, caches[1].keys + caches[1].values):
        assert torch.equal(ours[:, : prompt + count], others[:, : prompt + count])
    return torch.stack(found), torch.stack(expected)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", FLOATING, ids=dtype_name)
@pytest.mark.parametrize("batch, padded", ((1, False), (3, False), (4, True), (17, True)))
def test_bits_of_the_ops(isa, dtype, batch, padded):
    with cpu_isa(isa):
        found, expected = both(make(dtype), batch, padded)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "options",
    [
        dict(activation_function="gelu"),
        dict(n_inner=75),
        dict(tie_word_embeddings=False),
        dict(scale_attn_weights=False),
        dict(scale_attn_by_inverse_layer_idx=True),
        dict(n_embd=50, n_head=2, layer_norm_epsilon=1e-3),
        dict(n_layer=1),
    ],
    ids=str,
)
def test_every_shape_of_gpt2(options):
    found, expected = both(make(**options), 2)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("threads", (1, 2, 5))
def test_any_number_of_threads(threads, two_threads):
    torch.set_num_threads(threads)
    found, expected = both(make(torch.bfloat16), 3, padded=True)
    assert torch.equal(found, expected)


DRAWS = [dict(), dict(do_sample=True, seed=3, repetition_penalty=1.3), dict(do_sample=True, top_p=0.9, min_p=0.01)]


def count_decodes(monkeypatch) -> list[int]:
    """A list that gets the number of new tokens of each call of ``Step.decode``."""
    counts, decode = [], step.Step.decode

    def counted(self, *args):
        found = decode(self, *args)
        counts.append(found.shape[1])
        return found

    monkeypatch.setattr(step.Step, "decode", counted)
    return counts


@pytest.mark.parametrize("options", DRAWS, ids=str)
@pytest.mark.parametrize("padded", (False, True))
def test_generate_takes_it(options, padded, monkeypatch):
    model, ids, mask = make(), tokens(5, 6), torch.ones(5, 6, dtype=torch.int64)
    mask[2, :3] = int(not padded)
    options = options | dict(
        max_new_tokens=12, eos_token_id=list(range(0, 331, 12)), pad_token_id=1, min_new_tokens=3, seed=3
    )
    calls, forward = [], GPT2.forward
    monkeypatch.setattr(GPT2, "forward", lambda self, *a, **k: calls.append(1) or forward(self, *a, **k))
    found = model.generate(ids, mask, **options)
    assert len(calls) == 1  # of the prompt
    monkeypatch.setattr(step, "obstacle", lambda model: "not wanted")
    assert torch.equal(found, model.generate(ids, mask, **options))
    assert len(calls) > 2


@pytest.mark.parametrize("options", DRAWS, ids=str)
def test_python_sees_a_token_only_where_it_must(options, monkeypatch):
    model, ids, counts = make(), tokens(3, 6), count_decodes(monkeypatch)
    plain = options | dict(max_new_tokens=20, eos_token_id=[], seed=3)
    found = model.generate(ids, **plain)
    assert counts == [19]  # the first token is drawn after the prompt
    counts.clear()
    streamed = []
    streamer = SimpleNamespace(put=lambda t: streamed.append(t.clone()), end=lambda: None)
    assert torch.equal(found, model.generate(ids, streamer=streamer, **plain)) and counts == [1] * 19
    assert torch.equal(torch.cat([streamed[0], *(t[:, None] for t in streamed[1:])], 1), found)
    counts.clear()  # Python is entered after each turn in which a row ends
    end = int(found[1, 15])
    stopped = model.generate(ids, **plain | dict(eos_token_id=end, pad_token_id=7))
    first = [row.index(end) if end in row else 20 for row in found[:, 6:].tolist()]
    turns = sorted({min(until, 19) for until in first} | {0})
    assert counts == [after - before for before, after in zip(turns, turns[1:])]
    for row, until in enumerate(first):
        assert torch.equal(stopped[row, : 7 + until], found[row, : 7 + until])
        assert (stopped[row, 7 + until :] == 7).all()


def test_an_interrupt_does_not_wait_for_the_last_token():
    model = make(n_positions=8192)
    real, ids = torch.zeros(1, dtype=torch.int64), torch.tensor([[3]])

    def interrupt(*_):
        if real[0] > 0:
            signal.setitimer(signal.ITIMER_REAL, 0)
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 1e-3, 1e-3)
    try:
        with torch.inference_mode(), pytest.raises(KeyboardInterrupt):
            native, cache = step.Step(model, 1), model.new_cache(1, 8192)
            native.set_draw(real.clone(), None, GREEDY)
            native.decode(ids, None, real, None, cache, 8000, torch.ones(1, dtype=torch.bool), 0, [])
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert 0 < real[0] < 8000


def test_decode_refuses():
    model, one = make(), torch.tensor([[3]])
    real, alive, seen = torch.tensor([1]), torch.tensor([True]), torch.full((1, 9), -1)
    with torch.inference_mode():
        native = step.Step(model, 1)

        def decode(real=real, seen=None, most=8, alive=alive):
            return native.decode(one.clone(), None, real.clone(), seen, model.new_cache(1, 4), most, alive, 0, [])

        with pytest.raises(ValueError, match="set_draw must be called before decode"):
            decode()
        for seed, rows in ((real.int(), None), (real, real.repeat(2))):
            with pytest.raises((TypeError, ValueError), match="gpt2fast::DecodeStep: (seed|rows) must have"):
                native.set_draw(seed, rows, GREEDY)
        native.set_draw(real, None, GREEDY)
        with pytest.raises(ValueError, match="rows must have shape"):  # the seed before is still in use
            native.set_draw(real + 1, real.repeat(2), GREEDY)
        for wrong, message in (
            (dict(seen=seen.clone().fill_(331)), r"tokens of seen other than -1 must lie in \[0, 331\), got 331"),
            (dict(real=real.int()), "real must have dtype Long, got Int"),
            (dict(alive=alive.repeat(2)), r"alive must have shape \[1\], got \[2\]"),
            (dict(seen=seen[:, :8]), "seen must have more than 8 columns, got 8"),
            (dict(seen=seen.float()), "seen must have dtype Long, got Float"),
        ):
            with pytest.raises((TypeError, ValueError), match="gpt2fast::DecodeStep: " + message):
                decode(**wrong)
        with pytest.raises(ValueError, match=r"at most 64 columns fit \(n_positions\), got 65"):
            decode(most=65)
        assert torch.equal(decode(), decode(seen=seen)) and decode(most=0).shape == (1, 0)


def test_the_drop_in_s_generate_takes_it(monkeypatch):
    model, made = gpt2fast.optimize(reference_model()), []
    monkeypatch.setattr(step, "Step", lambda *a, make=step.Step: made.append(a) or make(*a))
    ids = tokens(2, 7)
    found = model.generate(ids, max_new_tokens=8, do_sample=False)
    assert len(made) == 1
    handle = model.transformer.h[0].mlp.register_forward_hook(lambda *a: None)
    assert torch.equal(found, model.generate(ids, max_new_tokens=8, do_sample=False)) and len(made) == 1
    handle.remove()
    want = GPT2LMHeadModel(model.config)
    want.load_state_dict(model.state_dict())
    assert torch.equal(found, want.eval().generate(ids, max_new_tokens=8, do_sample=False))


def change(model: GPT2, what: str) -> None:
    block = model.h[1]
    {
        "hook": lambda: block.register_forward_hook(lambda *a: None),
        "training": model.train,
        "eps": lambda: setattr(block.ln_2, "eps", 1e-3),
        "scale": lambda: setattr(block.attn, "scale", 0.5),
        "heads": lambda: setattr(block.attn, "n_head", 2),
        "dtype": lambda: block.mlp.c_fc.half(),
        "strides": lambda: setattr(block.mlp.c_fc.weight, "data", block.mlp.c_fc.weight.data.t().contiguous().t()),
        "forward": lambda: setattr(block.mlp, "forward", lambda x, residual: residual),
        "activation": lambda: setattr(model.config, "activation_function", "relu"),
    }[what]()


@pytest.mark.parametrize(
    "what, why",
    (
        ("hook", "h.1: it has a forward hook"),
        ("training", "it is in training mode"),
        ("eps", "h.1: its settings are not the config's"),
        ("scale", "h.1: its settings are not the config's"),
        ("heads", "h.1: its settings are not the config's"),
        ("dtype", "h.1.mlp.c_fc.weight is torch.float16, ln_f.weight is torch.float32"),
        ("strides", "h.1.mlp.c_fc.weight is no contiguous tensor on the CPU"),
        ("forward", "h.1.mlp: its forward is replaced by"),
        ("activation", "settings are not the config's"),
    ),
)
def test_a_model_that_is_changed_is_not_replaced(what, why):
    model = make()
    with torch.inference_mode():
        assert step.obstacle(model) is None
        change(model, what)
        assert why in step.obstacle(model)


def test_what_else_must_see_every_op():
    model = make()
    assert step.obstacle(model) == "autograd or autocast is on"
    with torch.inference_mode():
        with use_backend("fused"):
            assert step.obstacle(model) == "backend 'fused' is in force"
        with use_backend("cpu"):
            assert step.obstacle(model) is None
        with torch.autocast("cpu", torch.bfloat16):
            assert step.obstacle(model) == "autograd or autocast is on"
        with FlopCounterMode(display=False):
            assert step.obstacle(model) == "a mode of torch sees every op"
        assert "head size" in step.obstacle(make(n_embd=520, n_head=2))


def test_holes_in_the_mask_are_not_for_it(monkeypatch):
    model, mask = make(), torch.ones(2, 6, dtype=torch.int64)
    mask[0, 3] = 0
    monkeypatch.setattr(step, "Step", None)
    assert model.generate(tokens(2, 6), mask, max_new_tokens=3).shape == (2, 9)


def test_refused():
    model, one = make(), torch.tensor([[3]])
    native, cache = step.Step(model, 1), model.new_cache(1, 4)
    with torch.inference_mode():
        for tokens, message in (
            (one + 331, r"tokens must lie in \[0, 331\), got 334"),
            (one[0], r"tokens must have shape \[1, 1\], got \[1\]"),
            (one.int(), "tokens must have dtype Long, got Int"),
            (one.expand(2, 1), r"tokens must have shape \[1, 1\], got \[2, 1\]"),
        ):
            with pytest.raises((ValueError, TypeError), match="gpt2fast::DecodeStep: " + message):
                native.logits(tokens, None, cache)
            cache.clear()
        with pytest.raises(ValueError, match=r"positions must lie in \[0, 64\), got 64"):
            native.logits(one, one + 61, cache)
        cache.clear()
        with pytest.raises(ValueError, match=r"keys and values must be \(1, S, 4, 12\) Float on the CPU"):
            native.logits(one, None, model.new_cache(2, 4))
        fixed = model.new_cache(1, 4)
        fixed.fix()
        with pytest.raises(ValueError, match="cache must have no mask but padding on the left, and must not be fixed"):
            native.logits(one, None, fixed)
        expected = model(one, cache=model.new_cache(1, 4))[:, -1]
        assert torch.equal(native.logits(one, None, cache), expected)


SURROUNDINGS = """if True:
    import os, sys, threading
    import torch
    torch.set_num_threads(2)
    import gpt2fast
    from gpt2fast import step

    torch.manual_seed(0)
    model = gpt2fast.GPT2(gpt2fast.Config(n_embd=48, n_layer=2, n_head=4, n_positions=64, vocab_size=331)).eval()
    ids = torch.arange(12).view(2, 6)
    made = []
    Step = step.Step
    step.Step = lambda *a: made.append(1) or Step(*a)

    def run():
        return model.generate(ids, max_new_tokens=20).tolist()

    first = run()
    # several Python threads at a time, each with a team of its own
    found = []
    threads = [threading.Thread(target=lambda: found.append(run())) for _ in range(3)]
    [t.start() for t in threads], [t.join() for t in threads]
    assert found == [first] * 3
    # a child that was forked has none of OpenMP's threads
    cache = model.new_cache(2, 16)
    with torch.inference_mode():
        model(ids, cache=cache)
        native, lengths = Step(model, 2), cache.lengths
        expected = native.logits(ids[:, :1].contiguous(), None, cache).clone()
        cache.length, cache.lengths = 6, lengths
        child = os.fork()
        if child == 0:
            os._exit(0 if torch.equal(native.logits(ids[:, :1].contiguous(), None, cache), expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert run() == first and len(made) >= 5
    print("fine")
"""


def test_python_threads_and_forks():
    done = subprocess.run([sys.executable, "-c", SURROUNDINGS], capture_output=True, text=True, timeout=120)
    assert done.stdout == "fine\n", done.stderr


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system does not pin processes to cores")
def test_more_threads_than_cores():
    """Two threads on one core: a barrier that only spins would wait for whole time slices, 200 times a token."""
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n" + SURROUNDINGS
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "fine\n", done.stderr

"""Generation with a CUDA graph, captured and replayed on the PTX machine: the reference's tokens, from few captures.

The machine's graph holds the calls of one turn with their arguments, as on a GPU, and refuses calls that wait.
"""

import copy
import gc
import weakref

import pytest
import torch
from both import PACKAGES, reason_against
from transformers import GPT2Config

pytest.importorskip("triton")
pytest.importorskip("gpt2fast._ptx", reason="gpt2fast._ptx is not built")

import gpt2fast
from gpt2fast import GPT2, OPS, Config, decoding, use_backend
from gpt2fast.backends import BACKENDS, Backend
from gpt2fast.cuda import library
from gpt2fast.testing import ptx

SIZES = dict(n_layer=2, n_embd=32, n_head=2, vocab_size=61, n_positions=160, bos_token_id=0, eos_token_id=0)
SAMPLED = dict(do_sample=True, top_k=9, top_p=0.9, temperature=1.3)


@pytest.fixture
def model():
    torch.manual_seed(2)
    return GPT2(Config(**SIZES | dict(initializer_range=0.2))).eval()


@pytest.fixture
def captured(monkeypatch):
    """The graphs that were captured."""
    found = []

    class Kept(ptx.CUDAGraph):
        def __init__(self):
            super().__init__()
            found.append(self)

    with ptx.torch_cuda():
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Kept)
        yield found


def prompt(B=2, T=5, padded=False, seed=0):
    mask = torch.ones(B, T, dtype=torch.int64)
    mask[0, :2] = int(not padded)
    return torch.randint(1, 61, (B, T), generator=torch.Generator().manual_seed(seed)), mask


def both(model, ids, mask, backend="triton", **options):
    """Tokens from a backend's kernels and from the references, with the same seed."""
    options = dict(max_new_tokens=24, seed=5, eos_token_id=[]) | options
    with ptx.machine() as machine, use_backend(backend):
        ours = model.generate(ids, mask, **options)
    with use_backend("reference"):
        return ours, model.generate(ids, mask, **options | dict(cuda_graph=None)), machine.launches


@pytest.mark.parametrize(
    "options",
    (
        dict(),
        SAMPLED,
        dict(repetition_penalty=1.4),
        dict(eos_token_id=[3, 4, 5, 6, 7, 8], pad_token_id=2, **SAMPLED),
        dict(eos_token_id=[3, 4, 5, 6, 7, 8], min_new_tokens=6, repetition_penalty=1.2),
    ),
    ids=("greedy", "sampled", "penalised", "ends", "shortest"),
)
@pytest.mark.parametrize("padded", (False, True))
@pytest.mark.parametrize("backend", PACKAGES)
def test_tokens(model, captured, backend, padded, options):
    if why := reason_against(backend):
        pytest.skip(why)
    ours, wanted, launches = both(model, *prompt(padded=padded), backend, **options)
    assert torch.equal(ours, wanted)
    assert len(captured) == 1
    # The prompt and one turn run before the capture. The capture itself runs nothing.
    eager = max(1 + options.get("min_new_tokens", 0), 2)
    assert captured[0].replays == ours.shape[1] - 5 - eager
    assert len({str(launch.kernel) for launch in launches}) > 4


def test_a_batch_size_is_captured_once(model, captured):
    for seed in range(3):
        ours, wanted, _ = both(model, *prompt(seed=seed))
        assert torch.equal(ours, wanted)
    assert len(captured) == 1
    both(model, *prompt(B=3))
    assert len(captured) == 2
    both(model, *prompt())
    assert len(captured) == 2


def test_another_capture_where_a_launch_would_differ(model, captured):
    """Other options, other addresses or numbers in the model, or a cache that is too short need another graph."""
    both(model, *prompt())
    changes = [
        lambda: SAMPLED,
        lambda: dict(prompt=prompt(T=110)),  # with the new tokens, more than LEAST_COLUMNS
        lambda: setattr(model.h[0].ln_1, "eps", 0.1),
        lambda: setattr(model.h[1].attn, "scale", 0.5),
        lambda: setattr(model.wte, "weight", torch.nn.Parameter(model.wte.weight.detach() * 1.5)),
        lambda: model.bfloat16() and None,
    ]
    for count, change in enumerate(changes, 2):
        options = dict(change() or {})
        ours, wanted, _ = both(model, *options.pop("prompt", prompt()), **options)
        assert len(captured) == count
        assert torch.equal(ours, wanted)


def test_weights_changed_in_place_need_no_other_capture(model, captured):
    both(model, *prompt())
    with torch.no_grad():
        model.wte.weight.mul_(1.5)
    ours, wanted, _ = both(model, *prompt())
    assert torch.equal(ours, wanted) and len(captured) == 1


def test_the_graphs_of_a_model_are_few_and_go_with_it(model, captured):
    for B in range(1, decoding.MOST_KEPT + 2):
        both(model, *prompt(B=B, T=3), max_new_tokens=16)
    assert len(decoding._kept[model]) == decoding.MOST_KEPT
    other = GPT2(Config(**SIZES)).eval()
    both(other, *prompt())
    assert other in decoding._kept
    gone = weakref.ref(other)
    del other
    gc.collect()
    assert gone() is None


def test_a_call_in_a_call_has_turns_of_its_own(model, captured):
    """A streamer generates with the same model while its own call is between two turns."""
    ids, mask = prompt()

    class Streamer:
        inner = []

        def put(self, tokens):
            if not self.inner and tokens.dim() == 1:
                self.inner.append(model.generate(ids, mask, max_new_tokens=20, eos_token_id=[]))

        def end(self):
            pass

    with ptx.machine(), use_backend("triton"):
        warm = model.generate(ids, mask, max_new_tokens=24, eos_token_id=[])
        again = model.generate(ids, mask, max_new_tokens=24, eos_token_id=[], streamer=Streamer())
    assert torch.equal(warm, again) and torch.equal(warm[:, :25], Streamer.inner[0])


def test_the_drop_in_s_own_modules_are_captured(captured):
    """All calls share a capture. Training mode, without active dropout, and a replaced module make a new one."""
    torch.manual_seed(2)
    without = dict(embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0)
    drop_in = gpt2fast.GPT2LMHeadModel(GPT2Config(**SIZES, **without, initializer_range=0.2)).eval()
    ids, mask = prompt(padded=True)
    changes = [
        (1, lambda: None),
        (1, lambda: None),
        (1, lambda: drop_in.transformer.h[0].mlp.c_fc.weight.data.mul_(1.5)),
        (2, lambda: drop_in.train()),
        (3, lambda: setattr(drop_in.transformer.h[0], "mlp", copy.deepcopy(drop_in.transformer.h[0].mlp))),
    ]
    for count, change in changes:
        change()
        options = dict(attention_mask=mask, max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0)
        with ptx.machine(), use_backend("triton"):
            ours = drop_in.generate(ids, **options)
        with use_backend("reference"):
            assert torch.equal(ours, drop_in.generate(ids, **options))
        assert len(captured) == count and captured[-1].replays > 0


def test_few_tokens_are_not_worth_a_capture(model, captured):
    both(model, *prompt(), max_new_tokens=decoding.LEAST_TURNS - 1)
    assert not captured
    both(model, *prompt(), max_new_tokens=4, cuda_graph=True)
    assert len(captured) == 1


@pytest.mark.parametrize(
    "spoil, reason",
    (
        (lambda model: model.train(), "the model: it is in training mode"),
        (lambda model: model.h[0].register_forward_hook(print), "h.0: it has a forward hook"),
        (lambda model: setattr(model.h[0].mlp, "forward", print), "h.0.mlp: its forward is replaced by builtins.print"),
        (lambda model: model.h.append(torch.nn.Identity().eval()), "h.2: torch.Identity is not the stock class"),
        (lambda model: model.double(), "wte.weight is float64 on cpu"),
    ),
    ids=("training", "hook", "forward", "part", "dtype"),
)
def test_refused(model, captured, spoil, reason):
    spoil(model)
    with ptx.machine(), pytest.raises(ValueError, match="cuda_graph must be None or False here, got True, but"):
        model.generate(*prompt(), cuda_graph=True)
    with ptx.machine():
        assert decoding.graph_obstacle(model) == reason


def test_refused_where_only_kernels_of_a_package_run(model, captured, monkeypatch):
    triton = Backend("triton", ("cuda",), lambda: "no triton")
    monkeypatch.setitem(BACKENDS, "triton", triton)
    monkeypatch.setitem(vars(library.OURS), "_machine_reason", "no cuda of ours")
    cuda = BACKENDS["cuda"]
    monkeypatch.setitem(BACKENDS, "cuda", Backend("cuda", cuda.devices, cuda.reason))
    OPS["gelu"].kernel("cuda", lambda x, approximate="tanh": x, lambda x, approximate="tanh": None)
    with ptx.machine():
        assert BACKENDS["cuda"].reason() is None
        assert decoding.graph_obstacle(model) == "no triton; no cuda of ours"


def test_refused_without_a_gpu_and_with_holes(model):
    with pytest.raises(ValueError, match="got True, but the model is on cpu, not on a GPU"):
        model.generate(*prompt(), cuda_graph=True)
    ids, mask = prompt()
    mask[1, 2] = 0
    with ptx.machine(), ptx.torch_cuda(), pytest.raises(ValueError, match="hides more than padding on the left"):
        model.generate(ids, mask, cuda_graph=True)


def test_what_waits_is_refused_in_a_capture():
    """The machine's own graph: numbers are frozen, memory is not, and waiting raises, inside of an op as well."""
    x, step = torch.zeros(3), 1
    with ptx.torch_cuda():
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = x + step
            x += y
        assert x.tolist() == [0, 0, 0]
        step = 7
        graph.replay()
        assert x.tolist() == y.tolist() == [1, 1, 1]
        x.fill_(2)
        graph.replay()
        assert x.tolist() == [5, 5, 5]
        for wait in (lambda: x.sum().item(), lambda: x.nonzero(), lambda: torch.tensor([1, 2]), lambda: bool(x[0])):
            with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
                with torch.cuda.graph(torch.cuda.CUDAGraph()):
                    wait()

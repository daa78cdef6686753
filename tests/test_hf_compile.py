"""torch.compile (fullgraph; Inductor too) and torch.export of the drop-in: results, gradients, dropout, any sizes."""

import copy
import io
from collections import Counter

import pytest
import torch
import transformers
from hf_models import Trio, compare, generates_the_same, one_thread, padded, same, same_gradients, tokens, trio  # noqa: F401
from torch._dynamo.utils import counters

import gpt2fast
from gpt2fast.testing import assert_close_to_truth

IDS = tokens()
BACKENDS = pytest.mark.parametrize("backend", ("aot_eager", "inductor"))


@pytest.fixture(autouse=True)
def afresh():
    torch.compiler.reset()
    counters.clear()


ROUNDING = 8 * torch.finfo(torch.float32).eps  # the effect of another order of sums on a loss


@BACKENDS
def test_forward_and_backward(backend):
    models = trio()
    ours = torch.compile(models.ours, fullgraph=True, backend=backend)
    compiled = Trio(models.plain, ours, models.truth)
    for arguments in (
        dict(attention_mask=padded()),
        dict(labels=IDS, token_type_ids=IDS, position_ids=torch.arange(9)[None], use_cache=False),
    ):
        same(compiled, IDS, **arguments)
    for model in compiled:
        model(IDS, labels=IDS, use_cache=False).loss.backward()
    same_gradients(models)


def test_compiled_decoding_with_a_static_cache():
    models = trio()
    step = torch.compile(models.ours, fullgraph=True, backend="aot_eager")
    caches = [transformers.StaticCache(config=models.plain.config, max_cache_len=16) for _ in models]
    with torch.no_grad():
        for model, cache in zip(models, caches):
            model(IDS, past_key_values=cache, attention_mask=padded())
        for i in range(3):
            whole = torch.cat([padded(), torch.ones(3, i + 1, dtype=torch.long)], 1)
            ids = IDS[:, i : i + 1]
            compare(
                *(
                    m(ids, past_key_values=c, attention_mask=whole)
                    for m, c in zip((models.plain, step, models.truth), caches)
                )
            )


@BACKENDS
def test_any_sizes(backend):
    """With dynamic=True there is one graph for all batches and lengths, and one for a single row or token."""
    models = trio()
    compiled = Trio(
        models.plain, torch.compile(models.ours, fullgraph=True, dynamic=True, backend=backend), models.truth
    )
    for B, T in ((3, 9), (2, 5), (4, 17), (5, 30), (1, 1), (2, 48)):
        same(compiled, tokens(B, T))
    assert counters["stats"]["unique_graphs"] <= 2


@BACKENDS
@torch._inductor.config.patch(fallback_random=True)
def test_dropout_in_training(backend):
    """With eager's random numbers, loss and gradients are eager's, so that both directions use the same mask."""
    models = trio(attn_pdrop=0.3, resid_pdrop=0.2, embd_pdrop=0.1).apply(lambda model: model.train())
    again = copy.deepcopy(models.ours)
    step = torch.compile(again, fullgraph=True, backend=backend)
    losses = []
    for call in (models.ours, step):
        torch.manual_seed(4)
        losses.append(call(IDS, labels=IDS, use_cache=False).loss)
        losses[-1].backward()
    # There is no truth for these masks, so compiled is compared with eager. Another order of sums changes a number by a
    # few rounding steps of 1e-7, or by some hundred if a sum cancels. Another mask changes it by its own size.
    assert torch.allclose(*losses, rtol=ROUNDING)
    for (name, eager), compiled in zip(models.ours.named_parameters(), again.parameters()):
        assert torch.allclose(eager.grad, compiled.grad, rtol=1e-4, atol=1e-6), name


def test_dropout_follows_the_seed_with_inductor_s_random_numbers():
    ours = trio(attn_pdrop=0.3, resid_pdrop=0.2, embd_pdrop=0.1).ours.train()
    step, losses = torch.compile(ours, fullgraph=True), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(step(IDS, labels=IDS, use_cache=False).loss.item())
    assert losses[0] == losses[1] != losses[2]
    calm = ours.eval()(IDS, labels=IDS, use_cache=False).loss.item()
    assert step(IDS, labels=IDS, use_cache=False).loss.item() == pytest.approx(calm, rel=ROUNDING)


def test_autocast():
    models = trio()
    step, outputs = torch.compile(models.ours, fullgraph=True, backend="aot_eager"), []
    for model in (models.plain, step):
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            outputs.append(model(IDS, use_cache=False).logits)
    with torch.no_grad():
        compare(*outputs, models.truth(IDS, use_cache=False).logits)


def test_generate_of_a_compiled_model():
    models = trio()
    models.ours.compile(backend="aot_eager")
    generates_the_same(models)
    assert "compiled on its own" in gpt2fast.report(models.ours)[""].reason


def ops_of(program: torch.export.ExportedProgram) -> Counter:
    called = (str(node.target) for node in program.graph.nodes if node.op == "call_function")
    return Counter(name for name in called if name.startswith(("gpt2fast.", "aten.linear", "aten.addmm", "aten.layer")))


def test_export():
    """The exported program runs our ops, for any sizes, and is the same after it was saved and loaded."""
    models = trio()
    sizes = {0: torch.export.Dim("B", min=1, max=8), 1: torch.export.Dim("T", min=2, max=40)}
    program = torch.export.export(
        models.ours, (IDS,), dict(use_cache=False), dynamic_shapes=dict(input_ids=sizes, use_cache=None)
    )
    names = ("embedding", "layer_norm", "linear", "attention")
    assert ops_of(program) == dict(zip((f"gpt2fast.{name}.default" for name in names), (1, 5, 9, 2)))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    for exported in (program, torch.export.load(file)):
        run = exported.module()
        for ids in (IDS, tokens(2, 12)):
            assert torch.equal(run(ids, use_cache=False).logits, models.ours(ids).logits)


def test_export_with_a_mask():
    models = trio()
    arguments = dict(attention_mask=padded(), use_cache=False)
    program = torch.export.export(models.ours, (IDS,), arguments)
    with torch.no_grad():
        found = program.module()(IDS, **arguments).logits
        plain, truth = (model(IDS, attention_mask=padded()).logits for model in (models.plain, models.truth))
    assert_close_to_truth(found, plain, truth)
    assert "gpt2fast.attention.default" in ops_of(program)

"""The report says what really runs: its lines are compared with the ops that a call dispatches."""

import contextlib
import copy
from collections import Counter

import peft
import pytest
import torch
from hf_models import CLASSES, one_thread, padded, tokens, trio  # noqa: F401
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.gpt2 import modeling_gpt2 as stock
from transformers.pytorch_utils import Conv1D

import gpt2fast
from gpt2fast import backends

IDS = tokens()
LABELS = {
    "GPT2LMHeadModel": dict(labels=IDS),
    "GPT2DoubleHeadsModel": dict(labels=IDS),
}
AUTOCAST = {
    "generate runs transformers' loop: autocast is on",
    "residual not fused: under autocast the residual stays in float32",
}
HEADS = {
    "GPT2ForSequenceClassification": "score",
    "GPT2ForTokenClassification": "classifier",
    "GPT2ForQuestionAnswering": "qa_outputs",
    "GPT2DoubleHeadsModel": "multiple_choice_head",
}


class Recorder(TorchDispatchMode):
    """Counts our ops, with what is fused into a linear, and their dtypes."""

    def __init__(self):
        super().__init__()
        self.ops: Counter = Counter()
        self.dtypes: dict[str, set[torch.dtype]] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "gpt2fast":
            name = function._schema.name.removeprefix("gpt2fast::")
            given = dict(zip((a.name for a in function._schema.arguments), args)) | (kwargs or {})
            fused = given.get("activation", "none") if given.get("residual") is None else "residual"
            self.ops[name, None if fused == "none" else fused] += 1
            tensor = next(a for a in args if isinstance(a, torch.Tensor) and a.is_floating_point())
            self.dtypes.setdefault(name, set()).add(tensor.dtype)
        return function(*args, **(kwargs or {}))


def runs(model: nn.Module, ids=IDS, **arguments) -> Recorder:
    with Recorder() as recorder, torch.no_grad():
        model(ids, **arguments)
    return recorder


def says(report: gpt2fast.hf.Report) -> Counter:
    """The same count, from the report's lines. wte and wpe are one op, and an activation inside c_fc is not an op."""
    lines = [line for line in report if line.op and line.op != "decode_attention" and line.fused != "part of c_fc"]
    return Counter((line.op, line.fused) for line in lines if not line.name.endswith("wpe"))


def change_nothing(model):
    pass


def set_tanh(model):
    model.transformer.h[0].mlp.act = nn.Tanh()


def hook(part):
    return lambda model: model.get_submodule(part).register_forward_hook(lambda *args: None)


def norm_without_bias(model):
    model.transformer.h[0].ln_1 = nn.LayerNorm(64, bias=False)
    gpt2fast.optimize(model)


def norm_in_float32(model):
    model.bfloat16().transformer.h[1].ln_2.float()


def tables_that_differ(model):
    model.transformer.wpe.bfloat16()


def add_lora(model):
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True))


def replace_two(model):
    """Conv1D as transformers has it: fused like ours."""
    model.transformer.h[0].attn.c_proj, model.transformer.h[1].mlp.c_fc = Conv1D(64, 64), Conv1D(256, 64)


class OtherMLP(stock.GPT2MLP):
    pass


def replace_class(model):
    model.transformer.h[1].mlp.__class__ = OtherMLP


CHANGES = {
    "nothing": change_nothing,
    "training": lambda model: model.train(),
    "float64": lambda model: model.double(),
    "bfloat16": lambda model: model.bfloat16(),
    "an activation": set_tanh,
    "a hook on c_fc": hook("transformer.h.0.mlp.c_fc"),
    "a hook on an activation": hook("transformer.h.0.mlp.act"),
    "a hook on an attention": hook("transformer.h.0.attn"),
    "a hook on an MLP": hook("transformer.h.0.mlp"),
    "a hook on a norm": hook("transformer.h.0.ln_1"),
    "a hook on the head": hook("lm_head"),
    "a hook on wte": hook("transformer.wte"),
    "a norm without bias": norm_without_bias,
    "a norm in float32": norm_in_float32,
    "tables that differ": tables_that_differ,
    "eager": lambda model: model.set_attn_implementation("eager"),
    "lora": add_lora,
    "an MLP of another class": replace_class,
    "a c_proj and a c_fc that are not switched": replace_two,
    "parts that are not switched": lambda model: gpt2fast.restore(model.transformer.h[0]),
    "a head with a bias": lambda model: setattr(model, "lm_head", nn.Linear(64, 211)),
    "a head of two": lambda model: setattr(model, "lm_head", nn.Sequential(nn.Linear(64, 211))),
    "another loss": lambda model: setattr(model, "loss_function", lambda *args, **kwargs: torch.zeros(())),
    "a stock model": gpt2fast.restore,
}


@pytest.mark.parametrize("autocast", (False, True), ids=("", "autocast"))
@pytest.mark.parametrize("name", CHANGES)
def test_what_runs(name, autocast):
    ours = trio(tie_word_embeddings=False).ours
    CHANGES[name](ours)
    context = torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()
    with context:
        report = gpt2fast.report(ours)
        recorder = runs(ours, attention_mask=padded(), labels=IDS)
    assert says(report) == recorder.ops, str(report)
    if name == "nothing":
        assert set(report.reasons.values()) == (AUTOCAST if autocast else set())
    for line in report:
        if line.op in recorder.dtypes and line.backend is not None:
            on_cpu = torch.float64 not in recorder.dtypes[line.op]
            if line.op == "linear" and backends._has_amx() and ours.get_submodule(line.name).training:
                on_cpu = torch.bfloat16 not in recorder.dtypes[line.op]
            assert (line.backend.startswith("cpu")) is on_cpu, line


@pytest.mark.parametrize("kind", CLASSES)
def test_every_class(kind):
    ours = trio(kind, pad_token_id=0).ours
    report = gpt2fast.report(ours)
    arguments = LABELS.get(kind, dict())
    assert says(report) == runs(ours, **arguments).ops
    head = HEADS.get(kind)
    assert set(report.reasons) == ({head} if head else set())
    if head:
        assert report[head].reason == "transformers' own: a few numbers a row"
    if kind in LABELS:
        assert report[""].op == "decode_attention" and report["lm_head"].op == "linear"
        assert report["loss_function"].op == "cross_entropy"


def test_cross_attention():
    ours = trio(add_cross_attention=True).ours
    encoder = torch.randn(3, 5, 64)
    assert says(gpt2fast.report(ours)) == runs(ours, encoder_hidden_states=encoder, labels=IDS).ops


def test_a_forward_replaced_in_a_class(monkeypatch):
    ours = trio().ours
    forward = nn.LayerNorm.forward
    monkeypatch.setattr(nn.LayerNorm, "forward", lambda self, x: forward(self, x))
    report = gpt2fast.report(ours)
    assert says(report) == runs(ours, labels=IDS).ops and not runs(ours).ops["layer_norm", None]
    assert "forward of torch.LayerNorm is replaced" in report["transformer.ln_f"].reason


def test_on_the_reference_backend():
    ours = trio().ours
    with gpt2fast.use_backend("reference"):
        report = gpt2fast.report(ours)
    assert {line.backend for line in report if line.fused != "part of c_fc"} == {"reference"}
    assert "backend 'reference' is in force" in report["transformer.h.0.attn"].reason


def test_report_of_an_untouched_model():
    models = trio()
    lines = gpt2fast.report(models.ours)
    assert lines.reasons == {}
    assert lines["transformer.h.1.mlp.c_fc"].fused == "gelu_tanh"
    assert lines["transformer.h.0.attn"].op == "attention"
    assert "transformer.h.0-1.attn" in str(lines)
    assert len(lines.to_dict()) == len(lines)
    assert all(line.op is None for line in gpt2fast.report(models.plain))
    training = gpt2fast.report(copy.deepcopy(models.ours).train())
    assert "dropout" in training["transformer.h.0.mlp.c_proj"].reason
    assert training["transformer.h.0.ln_1"].backward == training["lm_head"].backward == "fused"
    dropped = "reference, since PyTorch's fused attention has no dropout on the CPU"
    assert training["transformer.h.0.attn"].backward == dropped
    undropped = gpt2fast.report(trio(attn_pdrop=0.0).ours.train())
    assert undropped["transformer.h.0.attn"].backward == "fused"
    assert "backward on fused" in str(training) and "backward" not in str(lines)
    with gpt2fast.use_backend("reference"):
        assert gpt2fast.report(copy.deepcopy(models.ours).train())["lm_head"].backward == "reference"
    wide = gpt2fast.report(models.ours.double())
    assert "float32, bfloat16 and float16 only" in wide["transformer.h.0.attn"].reason

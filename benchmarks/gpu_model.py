"""The last stage of ``make gpu``: GPT-2 124M in the drop-in and in transformers: prefill, decode, a training step."""

import copy
import functools
from collections.abc import Iterator

import torch

from .gpu_stages import Where, attempt, clock
from .timing import ratios, summarise

SMALL = dict(n_layer=2, n_head=2, n_embd=32, vocab_size=101, n_positions=64)


def rows_of(where: Where) -> Iterator[dict]:
    """A row for each piece of work, with bfloat16 weights. Every contender has a copy of the same model."""
    from transformers import GPT2Config, GPT2LMHeadModel

    import gpt2fast

    torch.manual_seed(0)
    sizes = SMALL | dict(bos_token_id=0, eos_token_id=0) if where.rehearse else {}
    config = GPT2Config(resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, **sizes)
    plain = GPT2LMHeadModel(config).to(where.device).bfloat16().eval()
    plain.generation_config.eos_token_id = None  # so that every run makes all of its tokens
    ours = gpt2fast.optimize(copy.deepcopy(plain))
    models = dict(ours=ours, transformers=plain)
    prompts = [(2, 16)] if where.rehearse else [(1, 512), (8, 512)]
    for B, P in prompts:
        yield attempt(dict(what="prefill", case=f"{B}x{P}"), functools.partial(prefill, where, models, config, B, P))
    for B in (1,) if where.rehearse else (1, 8):
        case = dict(what="decode after 32", case=f"{B}")
        yield attempt(case, functools.partial(decode, where, models, config, B, 4 if where.rehearse else 64))
    B, T = (1, 16) if where.rehearse else (16, 1024)
    yield attempt(dict(what="training step", case=f"{B}x{T}"), functools.partial(train, where, models, config, B, T))
    if not where.rehearse:  # this is last, since compiling takes most of this stage's time
        models = dict(ours=ours, compiled_transformers=torch.compile(plain))
        yield attempt(dict(what="prefill", case="8x512"), functools.partial(prefill, where, models, config, 8, 512))
        yield attempt(
            dict(what="training step", case=f"{B}x{T}"), functools.partial(train, where, models, config, B, T)
        )


def tokens(where: Where, config, B: int, T: int) -> torch.Tensor:
    ids = torch.randint(0, config.vocab_size, (B, T), generator=torch.Generator().manual_seed(T))
    return ids.to(where.device)


def timed(where: Where, calls: dict, rounds: int) -> dict:
    """Wall-clock seconds, including the wait for the device, with the contenders in turn, and the ratios of the pairs
    of each round."""

    def call(function) -> float:
        where.synchronize()
        return clock(lambda: (function(), where.synchronize()))

    times: dict[str, list[float]] = {name: [] for name in calls}
    with where.machine():
        for function in calls.values():
            function()
        for _ in range(1 if where.rehearse else rounds):
            for name, function in calls.items():
                times[name].append(call(function))
    return dict(
        seconds={n: summarise(t) for n, t in times.items()},
        ratios={f"vs {n}": ratios(t, times["ours"]) for n, t in times.items() if n != "ours"},
    )


def prefill(where: Where, models: dict, config, B: int, P: int) -> dict:
    ids = tokens(where, config, B, P)

    def forward(model):
        with torch.inference_mode():
            return model(ids, use_cache=False).logits

    return timed(where, {name: functools.partial(forward, model) for name, model in models.items()}, 10)


def decode(where: Where, models: dict, config, B: int, new: int) -> dict:
    """Compares the drop-in, which decodes with CUDA graphs, transformers, and the native model without graphs."""
    from gpt2fast import GPT2

    ids = tokens(where, config, B, 16 if where.rehearse else 32)

    def generate(model, **options):
        with torch.inference_mode():
            return model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, pad_token_id=0, **options
            )

    calls = {name: functools.partial(generate, model) for name, model in models.items()}
    twin = GPT2.from_transformers(models["transformers"])
    calls["ours_without_graphs"] = functools.partial(generate, twin, eos_token_id=[], cuda_graph=False)
    with where.machine():
        made = {name: call() for name, call in calls.items()}
    for name, out in made.items():
        assert out.shape[1] == ids.shape[1] + new, f"{name} made {out.shape[1] - ids.shape[1]} tokens"
    assert torch.equal(made["ours"], made["ours_without_graphs"]), "a graph draws other tokens"
    found = timed(where, calls, 4)
    return found | dict(tokens_per_second={n: B * new / s["median"] for n, s in found["seconds"].items()})


def train(where: Where, models: dict, config, B: int, T: int) -> dict:
    ids = tokens(where, config, B, T)

    def step(model):
        model.train()
        loss = model(ids, labels=ids).loss
        loss.backward()
        model.zero_grad()
        return loss

    return timed(where, {name: functools.partial(step, model) for name, model in models.items()}, 6)

"""Trains a demo model: ``python -m gpt2fast.demo_model.train`` (stop it at will: it goes on from its checkpoint).

It uses AdamW with warm-up and cosine decay, under bfloat16 autocast. The windows and their order depend only on the
seed.
"""

import argparse
import math
import platform
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from gpt2fast.config import Config
from gpt2fast.model import GPT2

from . import corpus

OUT = Path("build/demo_model")  # the shipped model is elsewhere; only --out can replace it
SEED = 2026
SIZES = dict(vocab_size=2048, n_positions=512, n_embd=256, n_layer=4, n_head=4)
STEPS, WARMUP, BATCH, LEARNING_RATE, WEIGHT_DECAY = 3400, 150, 4, 1.5e-3, 0.1
OTHERWISE = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0)
WINDOW = SIZES["n_positions"]
EVALUATE_EVERY, SAVE_EVERY = 250, 50
BASELINES = dict(unigram=1, trigram=3)


def initialise(model: torch.nn.Module) -> None:
    """GPT-2's initialisation: normals of deviation 0.02, divided by sqrt(2 L) in layers that add to the residual."""
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1:
                residual = name.endswith("c_proj.weight")
                p.normal_(0, 0.02 / math.sqrt(2 * SIZES["n_layer"]) if residual else 0.02, generator=generator)
            else:
                p.fill_(1.0 if ".ln_" in f".{name}" and name.endswith("weight") else 0.0)


def windows(documents: list[np.ndarray], epoch: int) -> torch.Tensor:
    """The windows of an epoch, (n, WINDOW + 1) tokens.

    The files are joined in a new order and cut from a new offset on, and the windows are put in a new order.
    """
    random = np.random.default_rng([SEED, epoch])
    stream = np.concatenate([documents[i] for i in random.permutation(len(documents))])
    stream = stream[random.integers(WINDOW) :]
    starts = random.permutation((len(stream) - 1) // WINDOW) * WINDOW
    return torch.from_numpy(np.stack([stream[s : s + WINDOW + 1] for s in starts]))


def batches(documents: list[np.ndarray], first_step: int):
    """Yields the batches (BATCH, WINDOW + 1) from ``first_step`` on. An epoch ends with its last whole batch."""
    step = epoch = 0
    while True:
        rows = windows(documents, epoch)
        for batch in rows[: len(rows) // BATCH * BATCH].split(BATCH):
            if step >= first_step:
                yield batch
            step += 1
        epoch += 1


def learning_rate(step: int) -> float:
    if step < WARMUP:
        return LEARNING_RATE * (step + 1) / WARMUP
    return LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP)))


def loss_of(model, batch: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(batch[:, :-1])
    return F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten(), reduction=reduction)


@torch.no_grad()
def evaluate(model, tokens: np.ndarray) -> float:
    """The mean loss in nats per token, over windows that do not overlap. Each begins without context."""
    count = (len(tokens) - 1) // WINDOW
    rows = torch.from_numpy(np.stack([tokens[i * WINDOW : (i + 1) * WINDOW + 1] for i in range(count)]))
    return sum(loss_of(model, batch, "sum").item() for batch in rows.split(8)) / (count * WINDOW)


def train(checkpoint: Path, training: list[np.ndarray], validation: np.ndarray):
    """Returns the trained model in float32, and the seconds of the clock and of the processor that it took."""
    model = GPT2(Config(**SIZES, **OTHERWISE))
    initialise(model)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    groups = [dict(params=decayed, weight_decay=WEIGHT_DECAY), dict(params=rest, weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95), fused=True)
    done, seconds, cpu_seconds = 0, 0.0, 0.0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        done, seconds, cpu_seconds = saved["step"], saved["seconds"], saved["cpu_seconds"]
        print(f"going on from step {done}", flush=True)
    clock, cpu_clock, average = time.monotonic() - seconds, time.process_time() - cpu_seconds, math.nan
    for step, batch in zip(range(done, STEPS), batches(training, done)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        loss = loss_of(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average = loss.item() if math.isnan(average) else 0.95 * average + 0.05 * loss.item()
        done, seconds, cpu_seconds = step + 1, time.monotonic() - clock, time.process_time() - cpu_clock
        if done % 25 == 0:
            print(f"step {done}/{STEPS}  loss {average:.3f}  {seconds:.0f} s ({cpu_seconds:.0f} s of CPU)", flush=True)
        if done % EVALUATE_EVERY == 0:
            print(f"step {done}  validation {evaluate(model, validation):.4f}", flush=True)
        if done % SAVE_EVERY == 0 or done == STEPS:
            state = dict(model=model.state_dict(), optimizer=optimizer.state_dict())
            partial = checkpoint.with_suffix(".partial")
            torch.save(state | dict(step=done, seconds=seconds, cpu_seconds=cpu_seconds), partial)
            partial.replace(checkpoint)
    return model, seconds, cpu_seconds


README = """# The demo model

A GPT-2 of {parameters:,} parameters ({sizes}), stored in bfloat16
({size:,} bytes), that `make demo` writes with. It has read Python's standard library and writes something that looks
like it; it knows nothing else.

| | |
| --- | --- |
| made by | `python -m gpt2fast.demo_model.train`, seed {seed} |
| text | the standard library of Python {python} without tests and generated tables: {files} files, {bytes:,} bytes |
| tokenizer | byte-level BPE of {vocab_size} tokens, trained on those of them that are not held out |
| training | {steps} steps of {batch} x {window} tokens: {tokens:,}, {epochs:.1f} times the {unique:,} that there are |
| optimizer | AdamW, learning rate {rate}, {warmup} steps of warm-up, cosine decay to 0, bfloat16 autocast |
| held out | {held_out} of the files, one in twenty by a hash of the path: neither tokenizer nor model has seen them |
| time | {minutes:.0f} min, {cpu_minutes:.0f} min of CPU time, {threads}, beside other work; torch {torch} |

| validation loss | nats a token | bits a byte |
| --- | ---: | ---: |
| unigram | {unigram:.3f} | {unigram_bits:.3f} |
| trigram (interpolated, absolute discounting) | {trigram:.3f} | {trigram_bits:.3f} |
| this model, as stored | **{loss:.3f}** | **{loss_bits:.3f}** |

The n-grams are fitted on the same training tokens. They see the held-out files as one stream; the model sees windows
of {window} tokens, each without what came before. Another Python has other files, and another processor rounds
differently: a run elsewhere gives a model like this one, not the same bytes.
{note}"""


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parses the arguments and checks that both folders are writable, before hours of training."""
    parser = argparse.ArgumentParser(prog="python -m gpt2fast.demo_model.train", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=OUT, help=f"folder for model, tokenizer and README.md ({OUT})")
    parser.add_argument(
        "--checkpoint", type=Path, default=OUT.with_suffix(".pt"), help="what a stopped run goes on from"
    )
    parser.add_argument("--note", default="", help="a paragraph for the end of the README.md")
    args = parser.parse_args(argv)
    for name, folder in (("out", args.out), ("checkpoint", args.checkpoint.parent)):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            parser.error(f"argument --{name}: cannot write into {folder}: {error.strerror}")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    texts = corpus.read()
    training_texts, validation_texts = corpus.split(texts)
    tokenizer = corpus.train_tokenizer(training_texts, SIZES["vocab_size"])
    training = corpus.encode(tokenizer, training_texts)
    validation = np.concatenate(corpus.encode(tokenizer, validation_texts))
    stream, size = np.concatenate(training), sum(len(t.encode()) for t in validation_texts)
    print(f"{len(stream):,} training tokens, {len(validation):,} for validation", flush=True)
    losses = {n: corpus.NGram(stream, o, SIZES["vocab_size"]).loss(validation) for n, o in BASELINES.items()}
    print(losses, flush=True)

    model, seconds, cpu_seconds = train(args.checkpoint, training, validation)
    with tempfile.TemporaryDirectory(dir=args.out) as name:  # --out is changed only when all is there
        made = Path(name)
        tokenizer.save(str(made / "tokenizer.json"), pretty=False)
        model.to(torch.bfloat16).save_pretrained(made)
        losses["loss"] = evaluate(GPT2.from_pretrained(made), validation)
        bits = {f"{n}_bits": corpus.bits_per_byte(v, len(validation), size) for n, v in losses.items()}
        tokens = STEPS * BATCH * WINDOW
        text = README.format(
            parameters=sum(p.numel() for p in model.parameters()),
            sizes=", ".join(f"{k} {v}" for k, v in SIZES.items()),
            vocab_size=SIZES["vocab_size"],
            size=(made / "model.safetensors").stat().st_size,
            seed=SEED,
            python=platform.python_version(),
            files=len(texts),
            held_out=len(validation_texts),
            bytes=sum(len(t.encode()) for t in texts.values()),
            steps=STEPS,
            batch=BATCH,
            window=WINDOW,
            tokens=tokens,
            unique=len(stream),
            epochs=tokens / len(stream),
            rate=LEARNING_RATE,
            warmup=WARMUP,
            minutes=seconds / 60,
            cpu_minutes=cpu_seconds / 60,
            threads=f"{torch.get_num_threads()} thread" + "s" * (torch.get_num_threads() > 1),
            torch=torch.__version__.split("+")[0],
            note=f"\n{args.note}\n" if args.note else "",
            **losses,
            **bits,
        )
        (made / "README.md").write_text(text, encoding="utf-8")
        for path in made.iterdir():
            path.replace(args.out / path.name)
    print(text)


if __name__ == "__main__":
    main()

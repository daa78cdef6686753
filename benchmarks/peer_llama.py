"""llama.cpp for ``python -m benchmarks.peers``, by the packages llama-cpp-python and gguf.

The GGUF file has F32, BF16, Q8_0 or Q4_0 weights. With Q4_0 the table of tokens, which is the head, too, is Q8_0.
"""

from pathlib import Path

import numpy as np

from .peer_engines import Engine, Rows, load_transformers, read_config

TYPES = dict(float32="F32", bfloat16="BF16", int8="Q8_0", int4="Q4_0")
PARTS = {
    "ln_1": "attn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down",
}  # fmt: skip


def write_gguf(checkpoint: Path, path: Path, width: str) -> int:
    """Writes the file. Returns the bytes of weights that a decoding step reads: all but the table of positions."""
    import gguf

    config, kinds = read_config(checkpoint), gguf.GGMLQuantizationType
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_block_count(config["n_layer"])
    writer.add_context_length(config["n_positions"])
    writer.add_embedding_length(config["n_embd"])
    writer.add_feed_forward_length(4 * config["n_embd"])
    writer.add_head_count(config["n_head"])
    writer.add_layer_norm_eps(config["layer_norm_epsilon"])
    writer.add_tokenizer_model("none")  # tokens are numbers here
    writer.add_vocab_size(config["vocab_size"])
    total = 0

    def add(name: str, array: np.ndarray, kind: str) -> None:
        nonlocal total
        kind = kinds[kind]
        data = gguf.quants.quantize(np.ascontiguousarray(array, np.float32), kind)
        writer.add_tensor(name, data, raw_dtype=kind)
        total += data.nbytes * (name != "position_embd.weight")

    weights = load_transformers(checkpoint, "float32").transformer.state_dict()
    add("token_embd.weight", weights["wte.weight"].numpy(), "Q8_0" if width == "int4" else TYPES[width])
    add("position_embd.weight", weights["wpe.weight"].numpy(), "F32")
    for part in ("weight", "bias"):
        add(f"output_norm.{part}", weights[f"ln_f.{part}"].numpy(), "F32")
        for i in range(config["n_layer"]):
            for ours, theirs in PARTS.items():
                array = weights[f"h.{i}.{ours}.{part}"].numpy().T  # Conv1D holds (in, out), GGUF (out, in)
                add(f"blk.{i}.{theirs}.{part}", array, TYPES[width] if array.ndim == 2 else "F32")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return total


class LlamaCpp(Engine):
    """llama-cpp-python, one row at a time.

    Its cache has 16 bits, and so has the table that its GELU reads, whatever the weights have.
    """

    name = "llama-cpp-python"
    modules = {"llama-cpp-python": "llama_cpp", "gguf": "gguf", "transformers": "transformers"}
    bits = dict(float32=32, bfloat16=16, int8=8.5, int4=4.5)
    batches = False
    exact = False

    def build(self, checkpoint: Path, folder: Path) -> None:
        import llama_cpp

        config, path = read_config(checkpoint), folder / "model.gguf"
        self.nbytes, self.vocabulary = write_gguf(checkpoint, path, self.width), config["vocab_size"]
        self.model = llama_cpp.Llama(
            str(path), n_ctx=config["n_positions"], n_threads=self.threads, n_threads_batch=self.threads, verbose=False
        )

    def decode(self, tokens: Rows, new: int) -> Rows:
        import llama_cpp

        self.model.reset()
        ids, found = tokens[0], []
        for _ in range(new):
            self.model.eval(ids)
            logits = llama_cpp.llama_get_logits_ith(self.model.ctx, -1)
            ids = [int(np.ctypeslib.as_array(logits, shape=(self.vocabulary,)).argmax())]
            found += ids
        return [found]

    def streamed_bytes(self, config: dict) -> float:
        return self.nbytes

"""CTranslate2 for ``python -m benchmarks.peers``: converted by its own converter of transformers' checkpoints."""

from pathlib import Path

from .peer_engines import Engine, Rows, load_transformers, read_config


class CTranslate2(Engine):
    """ctranslate2's Generator. Its tokens are words, so the model gets a vocabulary of numbers: 0, 1, 2 and so on."""

    name = "ctranslate2"
    modules = dict(ctranslate2="ctranslate2", transformers="transformers", tokenizers="tokenizers")
    bits = dict(float32=32, bfloat16=16, int8=8)

    def build(self, checkpoint: Path, folder: Path) -> None:
        import ctranslate2

        made, types = folder / "model", ctranslate2.get_supported_compute_types("cpu")
        kind = "int8_float32" if self.width == "int8" else self.width
        if kind not in types:
            raise ValueError(f"ctranslate2 computes in {', '.join(sorted(types))} on this CPU, not in {kind}")
        load_transformers(checkpoint, "float32").save_pretrained(folder / "numbered")
        number_tokens(folder / "numbered", read_config(checkpoint)["vocab_size"])
        converter = ctranslate2.converters.TransformersConverter(str(folder / "numbered"))
        converter.convert(str(made), quantization=kind, force=True)
        self.model = ctranslate2.Generator(
            str(made), device="cpu", compute_type=kind, inter_threads=1, intra_threads=self.threads
        )

    def decode(self, tokens: Rows, new: int) -> Rows:
        prompts = [list(map(str, row)) for row in tokens]
        found = self.model.generate_batch(
            prompts, max_length=new, min_length=new, beam_size=1, include_prompt_in_result=False, end_token=[]
        )
        return [result.sequences_ids[0] for result in found]


def number_tokens(folder: Path, size: int) -> None:
    """Writes a tokenizer, whose words are the numbers of the tokens, beside a checkpoint."""
    import tokenizers
    import transformers

    words = tokenizers.models.WordLevel({str(i): i for i in range(size)}, unk_token="0")
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(words), unk_token="0", bos_token="0", eos_token="0"
    )
    made.save_pretrained(folder)

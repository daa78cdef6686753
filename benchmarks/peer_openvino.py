"""OpenVINO for ``python -m benchmarks.peers``: converted from PyTorch, with the cache as the model's state.

The weights of 8 bits have a scale a row, those of 4 bits a scale for 64 weights, both by nncf. In bfloat16 the file is
float32, and the CPU plugin computes in bfloat16.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .peer_engines import Engine, Rows, load_transformers, read_config

GROUP = 64


class Step(torch.nn.Module):
    """Ids (B, T) and a past of keys and values (B, H, P, D) to logits (B, V) of the last token, and the longer past."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        t, (B, T), P = self.model.transformer, ids.shape, past[0].shape[2]
        H, C = self.model.config.n_head, self.model.config.n_embd
        places = torch.arange(P, P + T, device=ids.device)
        x, mask, present = t.wte(ids) + t.wpe(places), torch.arange(P + T)[None, :] <= places[:, None], []
        for i, block in enumerate(t.h):
            parts = block.attn.c_attn(block.ln_1(x)).split(C, 2)
            q, k, v = (part.view(B, T, H, C // H).transpose(1, 2) for part in parts)
            k, v = torch.cat([past[2 * i], k], 2), torch.cat([past[2 * i + 1], v], 2)
            present += [k, v]
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            x = x + block.attn.c_proj(y.transpose(1, 2).reshape(B, T, C))
            x = x + block.mlp.c_proj(F.gelu(block.mlp.c_fc(block.ln_2(x)), approximate="tanh"))
        return self.model.lm_head(t.ln_f(x[:, -1])), *present


def convert(checkpoint: Path):
    """OpenVINO's model with the inputs ids (B, T) and beam_idx (B,), and with the cache as its state."""
    import openvino
    from openvino import opset13 as op
    from openvino._offline_transformations import apply_make_stateful_transformation

    config = read_config(checkpoint)
    H, D = config["n_head"], config["n_embd"] // config["n_head"]
    names = [f"{kind}{i}" for i in range(config["n_layer"]) for kind in "kv"]
    example = (torch.zeros(2, 3, dtype=torch.long), *(torch.zeros(2, H, 7, D) for _ in names))
    model = openvino.convert_model(Step(load_transformers(checkpoint, "float32")), example_input=example)
    for port, name in zip(model.inputs, ["ids", *(f"past_{n}" for n in names)]):
        port.get_tensor().set_names({name})
        shape = openvino.PartialShape([-1, -1] if name == "ids" else [-1, H, -1, D])
        port.get_node().set_partial_shape(shape)
    for port, name in zip(model.outputs, ["logits", *(f"present_{n}" for n in names)]):
        port.get_tensor().set_names({name})
    model.validate_nodes_and_infer_types()
    # The plugin fuses attention with its cache only if the past is gathered by row, as for beam search.
    beam = op.parameter(openvino.PartialShape([-1]), openvino.Type.i32, name="beam_idx")
    beam.output(0).get_tensor().set_names({"beam_idx"})
    model.add_parameters([beam])
    for name in names:
        port = model.input(f"past_{name}")
        users = port.get_target_inputs()
        gathered = op.gather(port, beam, op.constant(0))
        for user in users:
            user.replace_source_output(gathered.output(0))
    model.validate_nodes_and_infer_types()
    apply_make_stateful_transformation(model, {f"past_{n}": f"present_{n}" for n in names})
    rows = op.gather(op.shape_of(model.input("ids"), output_type="i64"), op.constant([0]), op.constant(0))
    sizes = [op.constant(np.array([size], np.int64)) for size in (H, 0, D)]
    for node in model.get_ops():
        if node.get_type_name() == "ReadValue":  # a state begins empty: (B, H, 0, D)
            node.set_arguments([op.broadcast(op.constant(np.float32(0)), op.concat([rows, *sizes], 0))])
    model.validate_nodes_and_infer_types()
    return model


class OpenVino(Engine):
    """openvino on its CPU plugin."""

    name = "openvino"
    modules = dict(openvino="openvino", transformers="transformers")
    extra = dict(int8=dict(nncf="nncf"), int4=dict(nncf="nncf"))
    bits = dict(float32=32, bfloat16=16, int8=8, int4=4 + 16 / GROUP)

    def build(self, checkpoint: Path, folder: Path) -> None:
        import openvino

        model = convert(checkpoint)
        if self.width in self.extra:
            import nncf

            modes = nncf.CompressWeightsMode
            options = dict(mode=modes.INT8_SYM) if self.width == "int8" else dict(
                mode=modes.INT4_SYM, group_size=GROUP, ratio=1.0, all_layers=True
            )  # fmt: skip
            model = nncf.compress_weights(model, **options)
        openvino.save_model(model, folder / "model.xml", compress_to_fp16=False)
        del model
        precision = "bf16" if self.width == "bfloat16" else "f32"
        settings = dict(INFERENCE_NUM_THREADS=self.threads, PERFORMANCE_HINT="LATENCY",
                        INFERENCE_PRECISION_HINT=precision)  # fmt: skip
        if self.width not in self.extra:
            settings["KV_CACHE_PRECISION"] = precision  # the plugin's default is 8 bits
        self.request = openvino.Core().compile_model(folder / "model.xml", "CPU", settings).create_infer_request()

    def decode(self, tokens: Rows, new: int) -> Rows:
        self.request.reset_state()
        x, beam, found = np.array(tokens, np.int64), np.arange(len(tokens), dtype=np.int32), []
        for _ in range(new):
            self.request.infer(dict(ids=x, beam_idx=beam), share_inputs=True)
            x = self.request.get_tensor("logits").data.argmax(-1)[:, None].astype(np.int64)
            found.append(x)
        return np.concatenate(found, 1).tolist()

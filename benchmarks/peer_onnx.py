"""ONNX Runtime for ``python -m benchmarks.peers``: a graph of its fused operators, written from the checkpoint.

The key-value cache is one buffer for past and present. Weights of 8 and 4 bits are MatMulNBits with a scale for 32
weights, and the activations are rounded to 8 bits (accuracy_level 4).
"""

from pathlib import Path

import numpy as np

from .peer_engines import Engine, Rows, load_transformers, read_config

BLOCK = 32  # weights with one scale
MICROSOFT = "com.microsoft"
ROOM = 64  # the buffers of keys and values have a multiple of this many positions


def quantise(weight: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """MatMulNBits' form of a matrix (K, N): bytes (N, K / 32, 4 * bits), and scales (N * K / 32,), float32.

    Of each block the value of the largest magnitude becomes the least integer, so that the zero point is the default.
    """
    K, N = weight.shape
    blocks = np.ascontiguousarray(weight.T, np.float32).reshape(N, K // BLOCK, BLOCK)
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(-1)[..., None], -1)
    zero = 1 << (bits - 1)
    scales = largest / -zero
    inverse = np.divide(1, scales, out=np.zeros_like(scales), where=scales != 0)
    integers = np.clip(np.rint(blocks * inverse) + zero, 0, 2 * zero - 1).astype(np.uint8)
    if bits == 4:
        integers = integers[..., 0::2] | integers[..., 1::2] << 4
    return integers, scales.reshape(-1)


class Graph:
    """The nodes and the initializers of GPT-2's graph."""

    def __init__(self, checkpoint: Path, bits: int):
        self.config, self.bits, self.nodes, self.initializers = read_config(checkpoint), bits, [], []
        model = load_transformers(checkpoint, "float32")
        self.weights = {k.removeprefix("transformer."): v.numpy() for k, v in model.state_dict().items()}

    def hold(self, name: str, array: np.ndarray) -> str:
        from onnx import numpy_helper

        self.initializers.append(numpy_helper.from_array(np.asarray(array, order="C"), name))
        return name

    def add(self, op: str, inputs: list[str], outputs: str | list[str], domain: str = "", **attributes) -> str:
        from onnx import helper

        outputs = [outputs] if isinstance(outputs, str) else outputs
        self.nodes.append(helper.make_node(op, inputs, outputs, domain=domain, **attributes))
        return outputs[0]

    def product(self, x: str, name: str, weight: np.ndarray, out: str) -> str:
        if self.bits == 32:
            return self.add("MatMul", [x, self.hold(name, weight)], out)
        integers, scales = quantise(weight, self.bits)
        inputs = [x, self.hold(name, integers), self.hold(f"{name}.scales", scales)]
        K, N = weight.shape
        return self.add("MatMulNBits", inputs, out, MICROSOFT, K=K, N=N, bits=self.bits, block_size=BLOCK,
                        accuracy_level=4)  # fmt: skip

    def save(self, path: Path) -> None:
        """Writes the graph: ids (B, T), pos (T,), seqlens_k (B,), total (1,) and the cache to logits (B, V) of the last
        token, and the cache."""
        import onnx
        from onnx import TensorProto, helper

        C, H, layers = (self.config[name] for name in ("n_embd", "n_head", "n_layer"))
        epsilon, w = self.config["layer_norm_epsilon"], self.weights
        for name, array in w.items():
            if array.ndim == 1 or name in ("wte.weight", "wpe.weight"):
                self.hold(name, array)
        self.hold("last", np.array(-1, np.int64))
        rows = self.add("Gather", ["wte.weight", "ids"], "tokens")
        x = self.add("Add", [rows, self.add("Gather", ["wpe.weight", "pos"], "positions")], "x")
        y = self.add("LayerNormalization", [x, "h.0.ln_1.weight", "h.0.ln_1.bias"], "y", epsilon=epsilon)

        def product(x: str, name: str) -> str:
            return self.product(x, f"{name}.matrix", w[f"{name}.weight"], f"{name}.out")

        def normed(x: str, branch: str, bias: str, norm: str, to: str) -> tuple[str, str]:
            inputs = [x, branch, f"{norm}.weight", f"{norm}.bias", f"{bias}.bias"]
            self.add("SkipLayerNormalization", inputs, [f"{to}.y", "", "", f"{to}.x"], MICROSOFT, epsilon=epsilon)
            return f"{to}.x", f"{to}.y"

        for i in range(layers):
            p = f"h.{i}"
            qkv = self.add("Add", [product(y, f"{p}.attn.c_attn"), f"{p}.attn.c_attn.bias"], f"{p}.qkv")
            inputs = [qkv, "", "", f"past_k{i}", f"past_v{i}", "seqlens_k", "total"]
            outputs = [f"{p}.attended", f"present_k{i}", f"present_v{i}"]
            self.add("GroupQueryAttention", inputs, outputs, MICROSOFT, num_heads=H, kv_num_heads=H)
            branch = product(f"{p}.attended", f"{p}.attn.c_proj")
            x, y = normed(x, branch, f"{p}.attn.c_proj", f"{p}.ln_2", f"{p}.middle")
            hidden = self.add("FastGelu", [product(y, f"{p}.mlp.c_fc"), f"{p}.mlp.c_fc.bias"], f"{p}.gelu", MICROSOFT)
            after = "ln_f" if i == layers - 1 else f"h.{i + 1}.ln_1"
            x, y = normed(x, product(hidden, f"{p}.mlp.c_proj"), f"{p}.mlp.c_proj", after, f"{p}.end")
        self.product(self.add("Gather", [y, "last"], "y_last", axis=1), "head", w["wte.weight"].T, "logits")

        def value(name: str, kind, *shape):
            return helper.make_tensor_value_info(name, kind, shape)

        cache = [[value(f"{when}_{n}", TensorProto.FLOAT, "B", H, "S", C // H) for n in names(layers)]
                 for when in ("past", "present")]  # fmt: skip
        inputs = [value("ids", TensorProto.INT64, "B", "T"), value("pos", TensorProto.INT64, "T"),
                  value("seqlens_k", TensorProto.INT32, "B"), value("total", TensorProto.INT32, 1)]  # fmt: skip
        logits = value("logits", TensorProto.FLOAT, "B", self.config["vocab_size"])
        graph = helper.make_graph(self.nodes, "gpt2", [*inputs, *cache[0]], [logits, *cache[1]], self.initializers)
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid(MICROSOFT, 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
        (path.parent / "weights.bin").unlink(missing_ok=True)  # onnx appends to a file that is there
        onnx.save(model, path, save_as_external_data=True, location="weights.bin")


def names(layers: int) -> list[str]:
    return [f"{kind}{i}" for i in range(layers) for kind in "kv"]


class OnnxRuntime(Engine):
    """onnxruntime on its CPU provider."""

    name = "onnxruntime"
    modules = dict(onnxruntime="onnxruntime", onnx="onnx", transformers="transformers")
    bits = dict(float32=32, int8=8 + 32 / BLOCK, int4=4 + 32 / BLOCK)

    def build(self, checkpoint: Path, folder: Path) -> None:
        import onnxruntime

        path = folder / "model.onnx"
        Graph(checkpoint, dict(float32=32, int8=8, int4=4)[self.width]).save(path)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.config, self.buffers = read_config(checkpoint), {}

    def cache(self, B: int, positions: int) -> dict:
        from onnxruntime import OrtValue

        H, room = self.config["n_head"], -(-positions // ROOM) * ROOM
        if (B, room) not in self.buffers:
            shape = B, H, room, self.config["n_embd"] // H
            self.buffers[B, room] = {  # an array each: a value on the CPU is the array's own memory
                name: OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32))
                for name in names(self.config["n_layer"])
            }
        return self.buffers[B, room]

    def decode(self, tokens: Rows, new: int) -> Rows:
        x, past, found = np.array(tokens, np.int64), 0, []
        cache = self.cache(len(x), x.shape[1] + new)
        for _ in range(new):
            total = past + x.shape[1]
            binding = self.session.io_binding()
            binding.bind_cpu_input("ids", x)
            binding.bind_cpu_input("pos", np.arange(past, total))
            binding.bind_cpu_input("seqlens_k", np.full(len(x), total - 1, np.int32))
            binding.bind_cpu_input("total", np.array([total], np.int32))
            binding.bind_output("logits")
            for name, buffer in cache.items():
                binding.bind_ortvalue_input(f"past_{name}", buffer)
                binding.bind_ortvalue_output(f"present_{name}", buffer)
            self.session.run_with_iobinding(binding)
            x, past = binding.get_outputs()[0].numpy().argmax(-1)[:, None].astype(np.int64), total
            found.append(x)
        return np.concatenate(found, 1).tolist()

"""ONNX Runtime as a peer: a checkpoint written as an ONNX graph of the operators that its own tools write for LLaMA.

    python -m benchmarks.onnx_runtime FOLDER KIND        writes FOLDER/KIND.onnx, in a process of its own

`int8` rounds weights by output channel and the activations of each call as one tensor, as `quantize_dynamic` does.
`int8-blocks` and `int4-blocks` are MatMulNBits, as onnxruntime-genai writes: blocks of 32 weights, and `accuracy_level`
4, which lets it round activations to int8 by block. Between the products all is float32, with the attention of
onnxruntime-genai, GroupQueryAttention.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file

BLOCK, ROUNDS_TO_INT8 = 32, 4  # ROUNDS_TO_INT8 is an accuracy_level
CONTRIB = "com.microsoft"
KINDS = {"int8": None, "int8-blocks": 8, "int4-blocks": 4}  # bits of MatMulNBits


class Graph:
    """Nodes in order; weights go to a file beside the graph as they come."""

    def __init__(self, target: Path, bits: int | None, epsilon: float) -> None:
        self.target, self.bits, self.epsilon = target, bits, epsilon
        self.nodes: list[Any] = []
        self.stored: list[Any] = []
        self.values = target.with_suffix(".bin").open("wb")

    def constant(self, name: str, values: np.ndarray) -> str:
        from onnx import StringStringEntryProto, TensorProto, helper

        kept = TensorProto(name=name, dims=values.shape, data_location=TensorProto.EXTERNAL)
        kept.data_type = helper.np_dtype_to_tensor_dtype(values.dtype)
        where = {"location": f"{self.target.stem}.bin", "offset": self.values.tell(), "length": values.nbytes}
        kept.external_data.extend(StringStringEntryProto(key=key, value=str(value)) for key, value in where.items())
        self.values.write(values.tobytes())
        self.values.write(bytes(-values.nbytes % 4096))
        self.stored.append(kept)
        return name

    def add(self, kind: str, inputs: list[str], outputs: list[str], domain: str = "", **settings: Any) -> str:
        from onnx import helper

        self.nodes.append(helper.make_node(kind, inputs, outputs, domain=domain, **settings))
        return outputs[0]

    def norm(self, name: str, stream: str, update: str, scale_D: np.ndarray) -> tuple[str, str]:
        """Add the update, if there is one, to the stream: the normed sum and the sum."""
        scale, settings = self.constant(f"{name}.scale", scale_D), {"epsilon": self.epsilon}
        if not update:
            return self.add("SimplifiedLayerNormalization", [stream, scale], [name], **settings), stream
        outputs = [name, "", "", f"{name}.sum"]
        self.add("SkipSimplifiedLayerNormalization", [stream, update, scale], outputs, CONTRIB, **settings)
        return outputs[0], outputs[3]

    def linear(self, name: str, inputs: str, weight_OI: np.ndarray) -> str:
        """The product with a rounded weight."""
        rows, columns = weight_OI.shape
        if self.bits is None:
            scale_O = np.abs(weight_OI).max(1) / 127
            rounded_IO = np.ascontiguousarray(np.rint(weight_OI / scale_O[:, None]).astype(np.int8).T)
            weights = [self.constant(f"{name}.values", rounded_IO), self.constant(f"{name}.scale", scale_O)]
            return self.add("DynamicQuantizeMatMul", [inputs, *weights], [name], CONTRIB)
        from onnxruntime.capi import _pybind_state as tools

        blocks = columns // BLOCK
        packed = np.zeros((rows, blocks, BLOCK * self.bits // 8), np.uint8)
        scale, zero = np.zeros(rows * blocks, np.float32), np.zeros(rows * blocks * self.bits // 8, np.uint8)
        quantize = getattr(tools, f"quantize_matmul_{self.bits}bits")
        quantize(packed, np.ascontiguousarray(weight_OI.T), scale, zero, BLOCK, rows, columns, True)
        weights = [self.constant(f"{name}.values", packed), self.constant(f"{name}.scale", scale)]
        settings = {"K": columns, "N": rows, "bits": self.bits, "block_size": BLOCK, "accuracy_level": ROUNDS_TO_INT8}
        return self.add("MatMulNBits", [inputs, *weights], [name], CONTRIB, **settings)


def write_onnx(folder: Path, kind: str) -> None:
    """FOLDER/KIND.onnx: ids (B, L) int64, last (B, 1) int64, and the lengths as attention wants them, to states."""
    import onnx
    from onnx import TensorProto, helper

    config = json.loads((folder / "config.json").read_text())
    weights = {name: values.astype(np.float32) for name, values in load_file(folder / "model.safetensors").items()}
    heads, width, layers = config["num_attention_heads"], config["hidden_size"], config["num_hidden_layers"]
    graph = Graph(folder / f"{kind}.onnx", KINDS[kind], config["rms_norm_eps"])
    frequency = 10000.0 ** (-np.arange(0, width // heads, 2) / (width // heads))
    angle = np.arange(config["max_position_embeddings"])[:, None] * frequency
    turns = [graph.constant(f.__name__, f(angle).astype(np.float32)) for f in (np.cos, np.sin)]
    table = graph.constant("embed", weights.pop("model.embed_tokens.weight"))
    stream, update = graph.add("Gather", [table, "ids"], ["embedded"]), ""
    for i in range(layers):
        layer = {name: weights.pop(f"model.layers.{i}.{name}.weight") for name in LAYER}
        qkv = np.concatenate([layer[f"self_attn.{name}_proj"] for name in "qkv"])
        inner, stream = graph.norm(f"layers.{i}.before", stream, update, layer["input_layernorm"])
        mixed = graph.linear(f"layers.{i}.qkv", inner, qkv)
        attended = graph.add(
            "GroupQueryAttention", [mixed, "", "", "", "", "ends", "longest", *turns],
            [f"layers.{i}.attended", f"layers.{i}.keys", f"layers.{i}.values"], CONTRIB,
            num_heads=heads, kv_num_heads=config["num_key_value_heads"], do_rotary=1,
        )  # fmt: skip
        update = graph.linear(f"layers.{i}.o", attended, layer["self_attn.o_proj"])
        inner, stream = graph.norm(f"layers.{i}.between", stream, update, layer["post_attention_layernorm"])
        gate, up = (graph.linear(f"layers.{i}.{name}", inner, layer[f"mlp.{name}_proj"]) for name in ("gate", "up"))
        sigmoid = graph.add("Sigmoid", [gate], [f"layers.{i}.sigmoid"])
        silu = graph.add("Mul", [gate, sigmoid], [f"layers.{i}.silu"])
        product = graph.add("Mul", [silu, up], [f"layers.{i}.product"])
        update = graph.linear(f"layers.{i}.down", product, layer["mlp.down_proj"])
    states, _ = graph.norm("norm", stream, update, weights["model.norm.weight"])
    graph.add("GatherND", [states, "last"], ["state"], batch_dims=1)
    graph.values.close()
    of = helper.make_tensor_value_info
    inputs = [of("ids", TensorProto.INT64, ["B", "L"]), of("last", TensorProto.INT64, ["B", 1])]
    inputs += [of("ends", TensorProto.INT32, ["B"]), of("longest", TensorProto.INT32, [])]
    outputs = [of("state", TensorProto.FLOAT, ["B", width])]
    made = helper.make_graph(graph.nodes, "llama", inputs, outputs, graph.stored)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(CONTRIB, 1)]
    onnx.save(helper.make_model(made, opset_imports=opsets, ir_version=10), graph.target)


LAYER = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
LAYER += ["input_layernorm", "post_attention_layernorm"]


def last_states(folder: Path, kind: str) -> Any:
    """Return a function of padded ids (B, L) and the places (B,) of the last tokens, to their states (B, D)."""
    import onnxruntime

    file = folder / f"{kind}.onnx"
    if not file.exists():
        subprocess.run([sys.executable, "-m", "benchmarks.onnx_runtime", str(folder), kind], check=True)
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(file, settings, providers=["CPUExecutionProvider"])

    def run(ids_BL: np.ndarray, last_B: np.ndarray) -> np.ndarray:
        sizes = {"ends": last_B.astype(np.int32), "longest": np.array(ids_BL.shape[1], np.int32)}
        return session.run(["state"], {"ids": ids_BL, "last": last_B[:, None], **sizes})[0]

    return run


if __name__ == "__main__":
    write_onnx(Path(sys.argv[1]), sys.argv[2])

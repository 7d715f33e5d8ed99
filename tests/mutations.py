"""Damaged, foreign and hostile model folders, made from sound tiny ones by one change: what the fuzz test tries."""

from __future__ import annotations

import io
import json
import pickle
import random
import shutil
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import tokenizers

import lightrm
from lightrm.schemes.int8 import quantize_rows
from tests import test_awq
from tests.conftest import DATA
from tests.zoo import (
    HEAD_WEIGHT,
    LLAMA_CONFIG,
    WIDTH,
    Specimen,
    llama_weights,
    normal,
    prefixed,
    sharded,
    write_tokenizer,
)  # fmt: skip

Files = dict[str, bytes]
IDS = [[5, 9, 33, 71, 2], [7, 3, 90]]
TEXT = "what is", ["sunny weather", "warm"]
# What stands for a number, a name or a list in a stranger's JSON; RAW are written as they are.
STRANGE: tuple[Any, ...] = (
    None, True, -1, 0, 1, 2, 3, 7, 10**6, 10**12, 2**63, 10**30, 0.5, -0.0, 1e-300, 1e300, "", "x", "\0", "ä" * 300,
    "../x", [], [1], {}, {"a": 1}, [[[[]]]], "lstm", "w8a8", "(a+)+$", "{{ 1/0 }}", "{% for i in range(9) %}{{ i }}",
)  # fmt: skip
RAW = ("NaN", "Infinity", "1e999", "1" + "0" * 400, "1" + "0" * 5000, "[" * 3000 + "]" * 3000, '"\\ud800"', "", "@")
MARK = "@@raw@@"


def folders(target: Path) -> dict[str, Path]:
    """One sound folder of each kind."""
    classify = {
        **LLAMA_CONFIG,
        "architectures": ["LlamaForSequenceClassification"],
        "vocab_size": 400,
        "pad_token_id": 0,
    }
    body = llama_weights()
    body["model.embed_tokens.weight"] = normal(400, WIDTH, seed=0, scale=1.0)
    whole = body | {"score.weight": HEAD_WEIGHT}
    made = {}
    for kind in ("safetensors", "bin"):
        shards, index = sharded(whole, kind)
        made[kind] = Specimen(shards, classify, extra=index).write(target / kind)
        text(made[kind], described=kind == "bin")
    made["head"] = Specimen(
        {"pytorch_model.bin": body, "value_head.bin": {"summary.weight": HEAD_WEIGHT}}, classify
    ).write(target / "head")
    name = "model.layers.1.self_attn.q_proj"
    lora = {f"{name}.lora_A.weight": normal(4, WIDTH, seed=1), f"{name}.lora_B.weight": normal(WIDTH, 4, seed=2)}
    lora |= {"score.weight": HEAD_WEIGHT}
    settings = {
        "peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["q_proj"], "rank_pattern": {},
        "alpha_pattern": {}, "base_model_name_or_path": str(made["safetensors"]), "bias": "none",
    }  # fmt: skip
    made["adapter"] = Specimen(
        {"adapter_model.safetensors": prefixed(lora, "base_model.model.")}, classify,
        extra={"adapter_config.json": settings},
    ).write(target / "adapter")  # fmt: skip
    made |= quantized(target)
    for scheme in ("w8a8", "w4a8"):
        rm = lightrm.load(made["safetensors"], scheme=scheme)
        rm.save(target / scheme)
        made[scheme] = target / scheme
    return made


def quantized(target: Path) -> dict[str, Path]:
    """One sound folder of each of some other tools' formats."""
    weights = {"weights": {"num_bits": 8, "strategy": "channel"}, "input_activations": {"num_bits": 8, "type": "int"}}
    settings = {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": {"group_0": weights}}
    body = llama_weights()
    for name in [name for name in body if "proj" in name]:
        values, scale = quantize_rows(body[name])
        body |= {name: values, f"{name}_scale": scale[:, None]}
    config = {**LLAMA_CONFIG, "quantization_config": settings}
    whole = body | {"value_head.weight": HEAD_WEIGHT}
    made = {
        "compressed": Specimen({"model.safetensors": whole}, config).write(target / "compressed"),
        "awq": test_awq.write(target / "awq", test_awq.files()[0]),
        "torchao": target / "torchao",
    }
    shutil.copytree(DATA / "torchao-int8-dynamic", made["torchao"], ignore=shutil.ignore_patterns("cases.jsonl"))
    if find_spec("gguf") is not None:
        from tests import test_gguf, test_gguf_text

        made["gguf"] = target / "gguf"
        made["gguf"].mkdir()
        _, settings = test_gguf_text.byte_level_settings("qwen2", size=300)
        model = test_gguf.plain_model(
            hidden_size=32, intermediate_size=32, num_hidden_layers=1, vocab_size=len(settings["tokenizer.ggml.tokens"])
        )
        test_gguf.write(made["gguf"] / "model.gguf", model, test_gguf.MIXES["Q4_0"], more=settings)
    return made


def text(folder: Path, described: bool) -> None:
    """A tokenizer, as a tokenizer.model or a tokenizer.json, and a chat template."""
    template = "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    write_tokenizer(folder, chat_template=template, bos_token="<s>", eos_token="</s>")
    if not described:
        return
    (folder / "tokenizer.model").unlink()
    letters = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *map(chr, range(32, 127))])}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(letters, [], unk_token="<unk>"))
    made.normalizer = tokenizers.normalizers.Sequence([tokenizers.normalizers.Replace("x", "y")])
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(" +"), "isolated")
    made.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    made.save(str(folder / "tokenizer.json"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": "PreTrainedTokenizerFast"}))


def read(folder: Path) -> Files:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def write(folder: Path, files: Files) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        path.unlink()
    for name, content in files.items():
        (folder / name).write_bytes(content)


def mutated(files: Files, draw: random.Random) -> tuple[Files, str, str]:
    """The files with one of them changed, which one, and how."""
    name = draw.choice(sorted(files))
    content = files[name]
    ways = [flipped, cut, mixed]
    if name.endswith(".json"):
        ways = [in_json] * 6 + ways
    elif name.endswith(".bin"):
        ways += [in_pickle] * 2
    elif name.endswith(".safetensors"):
        ways += [in_header] * 3
    way = draw.choice(ways)
    return files | {name: way(content, draw)}, name, way.__name__


def flipped(content: bytes, draw: random.Random) -> bytes:
    changed = bytearray(content)
    near = draw.random() < 0.5
    for _ in range(draw.choice((1, 1, 2, 8))):
        changed[draw.randrange(min(len(changed), 3000) if near else len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def cut(content: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(content))
    return draw.choice((content[:at], content[at:], b"", content + content[at:], content[:at] + b"\0" * 9))


def mixed(content: bytes, draw: random.Random) -> bytes:
    """Two blocks swapped, one doubled, or one cleared."""
    size = draw.choice((1, 8, 64, 512))
    a, b = sorted(draw.randrange(max(1, len(content) - size)) for _ in range(2))
    one, two = content[a : a + size], content[b : b + size]
    if draw.random() < 0.5 and b >= a + size:
        return content[:a] + two + content[a + size : b] + one + content[b + size :]
    return content[:a] + draw.choice((bytes(len(one)), one + one, b"")) + content[a + size :]


def in_json(content: bytes, draw: random.Random) -> bytes:
    """One place of the object: another value, gone, doubled, or something that is no JSON."""
    value = json.loads(content)
    places = list(places_of(value))
    if not places:
        return b"[]"
    outer, key = draw.choice(places)
    how = draw.randrange(10)
    if how == 0:
        del outer[key]
    elif how == 1 and isinstance(outer, dict):
        outer[str(draw.choice(STRANGE))] = draw.choice(STRANGE)
    elif how == 2:
        raw = draw.choice(RAW)
        outer[key] = MARK
        return json.dumps(value).replace(f'"{MARK}"', raw).encode("utf-8", "replace")
    elif how == 3 and isinstance(outer, dict):
        return content.rstrip()[:-1] + b"," + json.dumps({key: draw.choice(STRANGE)}).encode()[1:]
    elif how == 4:
        other, place = draw.choice(places)
        outer[key] = json.loads(json.dumps(other[place]))
    else:
        outer[key] = draw.choice(STRANGE)
    return json.dumps(value).encode()


def places_of(value: Any) -> Any:
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(min(len(value), 20)):
            yield value, key
            yield from places_of(value[key])


def in_header(content: bytes, draw: random.Random) -> bytes:
    size = int.from_bytes(content[:8], "little")
    header = in_json(content[8 : 8 + size], draw)
    return len(header).to_bytes(8, "little") + header + content[8 + size :]


class Called:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("code of a checkpoint ran",)


def in_pickle(content: bytes, draw: random.Random) -> bytes:
    """The archive with its pickle changed and all CRCs right."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as new:
        for info in old.infolist():
            inner = old.read(info)
            if info.filename.endswith("data.pkl"):
                inner = draw.choice((flipped, cut, mixed, lambda *_: pickle.dumps({"a": Called()}, 2)))(inner, draw)
            new.writestr(info.filename, inner)
    return out.getvalue()

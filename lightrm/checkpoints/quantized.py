"""Which tool quantized the weights, by what config.json says; and the tensors, read through that tool's format.

    quant_method   packing_format, checkpoint_format     read as
    gptq           gptq, or nothing                      GPTQ, zero points stored minus one
    gptq           gptq_v2                               GPTQ, zero points as they are
    auto-round     auto_round:auto_gptq, or nothing      GPTQ, zero points stored minus one
    auto-round     auto_round, auto_round:gptqmodel      GPTQ, zero points as they are
    bitsandbytes                                         nf4, fp4, LLM.int8
    awq            version gemm                          AWQ
    compressed-tensors                                   int8, float8 and packed values, by the tensors
    fp8                                                  float8 in blocks, or with one scale
    torchao                                              int8, taken apart in safetensors

All others are refused by name, and so are tensors that contradict the config. If the config says nothing, the names of
the tensors decide.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lightrm.checkpoints.awq_files import AwqSource, read_awq_terms
from lightrm.checkpoints.bnb_files import MAXIMA, STATE, EightBitSource, FourBitSource, bitsandbytes_source
from lightrm.checkpoints.compressed_files import PACKED, SCALE, CompressedSource
from lightrm.checkpoints.compressed_terms import read_compressed_terms
from lightrm.checkpoints.config import Config, read_config, shown
from lightrm.checkpoints.fp8_files import SCALES, Fp8Source, read_fp8_terms
from lightrm.checkpoints.gptq_files import MARK, GptqSource, Terms, is_gptq
from lightrm.checkpoints.source import PackedSource, TensorSource
from lightrm.checkpoints.torchao_files import MARK as TAKEN_APART
from lightrm.checkpoints.torchao_files import TorchaoSource, said_of_torchao
from lightrm.errors import TensorMismatchError, UnsupportedModelError

GPTQ_VERSIONS = {"gptq": 1, "gptq_v2": 2}
AUTO_ROUND = ("auto-round", "intel/auto-round", "autoround")
AUTO_ROUND_VERSIONS = {"auto_round:auto_gptq": 1, "auto_round": 2, "auto_round:gptqmodel": 2}
BESIDE = {"quantize_config.json": "gptq", "quant_config.json": "awq"}  # files of auto-gptq and AutoAWQ, older than it
ELSEWHERE = {"quantization": "mlx", "compression_config": "compressed-tensors"}  # fields of other tools
BITSANDBYTES_MARKS = (MAXIMA, STATE)
READS = "lightrm reads gptq, auto-round packed as gptq, awq, compressed-tensors, fp8, torchao and bitsandbytes"
CURE = "take the model's full-precision files, or those of a format that lightrm reads"


@dataclass(frozen=True, slots=True)
class Settings:
    """method: name of the tool, in small letters. raw: its settings. where: the file that says it."""

    method: str
    raw: Config
    where: str

    @property
    def packs_as_gptq(self) -> bool:
        return self.method == "gptq" or self.method in AUTO_ROUND


def settings_of(config: Config, folder: Path) -> Settings | None:
    """Return the settings in config.json, or in a file beside it; None if nothing says that the weights are
    quantized."""
    if raw := config.entries("quantization_config"):
        return read_settings(raw, config.path, f"{config.path}, quantization_config,", "unnamed")
    for field, method in ELSEWHERE.items():
        if raw := config.entries(field):
            return read_settings(raw, config.path, f"{config.path}, {field},", method)
    for name, method in BESIDE.items():
        if (folder / name).is_file():
            beside = read_config(folder, name)
            return read_settings(beside.raw, beside.path, str(beside.path), method)
    return None


def read_settings(raw: dict[str, Any], path: Path, where: str, method: str) -> Settings:
    values = Config(raw, path)
    named = values.text("quant_method") if values.has("quant_method") else method
    if named == "unnamed" and (values.flag("load_in_4bit") or values.flag("load_in_8bit")):
        named = "bitsandbytes"  # from before the field was there
    return Settings(named.lower(), values, where)


@dataclass(frozen=True, slots=True)
class Format:
    """How the tensors of a tool are read. marks: endings of names, one of which they must have. holds: the scheme that
    keeps their values, None if they are only widened. read: of the files' own tensors."""

    marks: tuple[str, ...]
    holds: str | None
    read: Callable[[TensorSource], PackedSource]


def format_of(settings: Settings) -> Format:
    """Return how a tool's tensors are read. Raises UnsupportedModelError on one that lightrm does not read."""
    values, where = settings.raw, settings.where
    if settings.method == "bitsandbytes":
        holds = FourBitSource.holds if values.flag("load_in_4bit") else EightBitSource.holds
        return Format(BITSANDBYTES_MARKS, holds, partial(checked_bitsandbytes, settings))
    if settings.method == "awq":
        return Format((MARK,), AwqSource.holds, partial(AwqSource, terms=read_awq_terms(values, where)))
    if settings.method == "compressed-tensors":
        terms = read_compressed_terms(values, where)
        return Format((PACKED, SCALE), terms.holds, partial(CompressedSource, terms=terms))
    if settings.method == "fp8":
        return Format(SCALES, Fp8Source.holds, partial(Fp8Source, terms=read_fp8_terms(values, where)))
    if settings.method == "torchao":
        return Format((TAKEN_APART,), said_of_torchao(values), TorchaoSource)
    if settings.packs_as_gptq:
        return Format((MARK,), GptqSource.holds, partial(GptqSource, terms=terms_of(settings)))
    raise UnsupportedModelError(
        f"{where} says that the weights are quantized by {settings.method!r}, stored in a way that is not "
        f"supported; {READS}: {CURE}"
    )


def terms_of(settings: Settings) -> Terms:
    """Return what the config says of weights in GPTQ's packing. Raises UnsupportedModelError on another packing."""
    values = settings.raw
    fields: tuple[str, ...]
    assumed: int | None
    if settings.method in AUTO_ROUND:
        table, fields, varied = AUTO_ROUND_VERSIONS, ("packing_format",), "extra_config"
        # Before there was the field, kernels' names stood in `backend`, which do not tell.
        assumed = None if values.has("backend") else 1
        usual: dict[str, tuple[object, ...]] = {"data_type": ("int",), "act_bits": (16, 32)}
    else:
        table, fields, varied, assumed = GPTQ_VERSIONS, ("checkpoint_format", "format"), "dynamic", 1
        usual = {"is_marlin_format": (False,), "pack_dtype": ("int32", "torch.int32")}
    for name, allowed in usual.items():
        if values.has(name) and values.raw[name] not in allowed:
            raise UnsupportedModelError(f"{settings.where} says {name} {shown(values.raw[name])}; {READS}: {CURE}")
    found = {values.raw[name] if isinstance(values.raw[name], str) else shown(values.raw[name])
             for name in fields if values.has(name)}  # fmt: skip
    unread = sorted(name for name in found if name not in table)
    if unread or len(found) > 1:
        raise UnsupportedModelError(
            f"{settings.where} says that {settings.method} stored the weights as {', '.join(sorted(found))}; lightrm "
            f"reads one of {', '.join(table)}: {CURE}"
        )
    group = values.raw.get("group_size")
    return Terms(
        where=settings.where,
        version=table[found.pop()] if found else assumed,
        bits=values.integer("bits") if values.has("bits") else None,
        group=group if isinstance(group, int) and not isinstance(group, bool) else None,
        symmetric=values.flag("sym") if values.has("sym") else None,
        ordered=values.flag("desc_act"),
        uniform=not values.entries(varied),
    )


def seen_through(source: TensorSource, config: Config, folder: Path) -> TensorSource:
    """Return the weights read through the format that the config names, or that the tensors show.

    Raises UnsupportedModelError on a format that lightrm does not read, TensorMismatchError if config and tensors
    disagree.
    """
    settings = settings_of(config, folder)
    if settings is None:
        if is_gptq(source):
            return GptqSource(source, Terms("no config", version=1))
        return bitsandbytes_source(source) or source
    form = format_of(settings)
    if shows(source, form.marks):
        return form.read(source)
    if is_gptq(source):
        raise differs(settings, "packed as GPTQ packs (qweight)")
    if (packed := bitsandbytes_source(source)) is not None:
        raise differs(settings, f"bitsandbytes' {packed.holds}")
    raise differs(settings, "not packed: if they are full weights, take the field out of a copy of config.json")


def shows(source: TensorSource, marks: tuple[str, ...]) -> bool:
    """Whether a tensor's name has one of these marks."""
    return any(mark in name for name in source.names for mark in marks)


def checked_bitsandbytes(settings: Settings, source: TensorSource) -> PackedSource:
    """Raises TensorMismatchError."""
    packed = bitsandbytes_source(source)
    assert packed is not None
    values, four = settings.raw, isinstance(packed, FourBitSource)
    if values.has("load_in_4bit") and values.flag("load_in_4bit") != four:
        raise differs(settings, f"{packed.holds} weights")
    kind = values.text("bnb_4bit_quant_type") if four and values.has("bnb_4bit_quant_type") else None
    found = set(packed.kinds.values()) if isinstance(packed, FourBitSource) else set()
    if kind is not None and found - {kind}:
        raise differs(settings, f"of kind {', '.join(sorted(found))}")
    return packed


def differs(settings: Settings, found: str) -> TensorMismatchError:
    return TensorMismatchError(
        f"{settings.where} says that the weights are quantized by {settings.method!r}, but they are {found}"
    )


def said_to_hold(config: Config, folder: Path) -> str | None:
    """Return the scheme that keeps the values of a quantized file, by what the config says; None for any other file.

    Raises UnsupportedModelError on a format that lightrm does not read.
    """
    settings = settings_of(config, folder)
    return None if settings is None else format_of(settings).holds

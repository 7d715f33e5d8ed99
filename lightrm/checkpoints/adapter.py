"""LoRA adapters that were never merged: `adapter_config.json`, low-rank pairs, and a head beside them.

    merged = base + scale * B @ A,   scale = alpha / r, or alpha / sqrt(r) for rank-stabilized LoRA

(arXiv 2106.09685, 2312.03732), in float32, one tensor at a time while loading. Other tensors of the adapter file
(a trained `score` head, biases, some rows of an embedding) replace the base's. Weight-decomposed LoRA (use_dora, arXiv
2402.09353) gives each row of the merged weight a length of its own. Two ways of initialization take their first factors
off the base, when training starts and again when peft loads the adapter, so they are taken off here too:

    pissa    the first r singular triples of the base (arXiv 2404.02948)
    olora    scale * Q_r @ R_r of its QR decomposition (arXiv 2406.01775)

What a setting means is read in peft 0.21; one that is neither read nor known to be harmless is refused, by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from lightrm.checkpoints.config import Config, read_config, shown
from lightrm.checkpoints.source import TensorSource
from lightrm.errors import CheckpointError, ConfigError, NumericsError, TensorMismatchError, UnsupportedModelError

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
WRAPPER = "base_model.model."
LOW_RANK = re.compile(r"(.+)\.lora_(A|B)(?:\.default)?\.weight")
EMBEDDED = re.compile(r"(.+)\.lora_embedding_(A|B)(?:\.default)?(?:\.weight)?")
SHIFT = re.compile(r"(.+)\.lora_B(?:\.default)?\.bias")
TOKENS = re.compile(r"(.+)\.token_adapter\.trainable_tokens_delta(?:\.default)?")
LENGTH = re.compile(r"(.+)\.lora_magnitude_vector(?:\.default)?(?:\.weight)?")
READ_NAMES = """
    peft_type task_type r lora_alpha rank_pattern alpha_pattern use_rslora init_lora_weights base_model_name_or_path
    revision bias lora_bias use_dora trainable_token_indices
"""
# What was trained, which the tensors tell; how it was trained; what belongs to an initialization that is over.
HARMLESS_NAMES = """
    target_modules exclude_modules modules_to_save layers_to_transform layers_pattern lora_dropout inference_mode
    auto_mapping peft_version megatron_core qalora_group_size loftq_config eva_config corda_config lora_ga_config
    runtime_config ensure_weight_tying
"""
READ, HARMLESS = frozenset(READ_NAMES.split()), frozenset(HARMLESS_NAMES.split())
PLAIN = ("true", "false", "gaussian", "orthogonal", "eva", "mica")  # the base stays as it is
TAKEN_OFF = ("pissa", "olora")
MERGE = "merge the adapter with peft first (merge_and_unload, save_pretrained), and load the merged folder"


@dataclass(frozen=True, slots=True)
class Adapter:
    """replaced: base name -> name in the adapter file of a tensor it carries whole.

    The rest goes by the name of the tensor that is changed, in the base or, where it is replaced, in the adapter file.
    pairs: names of its A (r, I) and B (O, r), with their scale; shifts: of a bias, the one that is added with its
    scale; rows: that are replaced, which and by what; lengths: of the rows, where DoRA gives them; transposed: embeddings, whose pairs lie the other way round.
    taken_off: what initialization took off the
    base, if anything; base, revision: where the base model was.
    """

    source: TensorSource
    pairs: dict[str, tuple[str, str]]
    scale: dict[str, float]
    replaced: dict[str, str]
    base: str | None
    shifts: dict[str, str] = field(default_factory=dict)
    rows: dict[str, tuple[tuple[int, ...], str]] = field(default_factory=dict)
    lengths: dict[str, str] = field(default_factory=dict)
    transposed: frozenset[str] = frozenset()
    taken_off: str | None = None
    revision: str | None = None

    def merge(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The merged value of one tensor, float32 where it was touched."""
        if name in self.shifts:
            shift = self.source.read(self.shifts[name]).float()
            if shift.shape != tensor.shape:
                raise TensorMismatchError(
                    f"LoRA bias of {name!r}: {tuple(shift.shape)} does not fit the base's {tuple(tensor.shape)}"
                )
            shifted: torch.Tensor = tensor.float() + self.scale[name] * shift
            return shifted
        if name in self.rows:
            which, stored = self.rows[name]
            new = self.source.read(stored).float()
            if new.shape != (len(which), *tensor.shape[1:]) or not all(0 <= row < len(tensor) for row in which):
                raise TensorMismatchError(
                    f"trained tokens of {name!r}: {tuple(new.shape)} for {len(which)} indices do not fit the base's "
                    f"{tuple(tensor.shape)}"
                )
            tensor = tensor.float().index_copy(0, torch.tensor(which), new)
        if name not in self.pairs:
            return tensor
        low, high = (self.source.read(part).float() for part in self.pairs[name])
        across = name in self.transposed
        weight_OI = tensor.float().T if across else tensor.float()
        if low.shape[1] != weight_OI.shape[1] or high.shape != (weight_OI.shape[0], low.shape[0]):
            raise TensorMismatchError(
                f"LoRA pair of {name!r}: A {tuple(low.shape)} and B {tuple(high.shape)} do not fit "
                f"the base weight {tuple(tensor.shape)}"
            )
        if self.taken_off is not None:
            if not bool(torch.isfinite(weight_OI).all()):
                raise NumericsError(f"{name} of the adapter's base holds NaN or Inf values")
            weight_OI = weight_OI - first_factors(weight_OI, low.shape[0], self.taken_off, self.scale[name])
        merged: torch.Tensor = weight_OI + self.scale[name] * (high @ low)
        if name in self.lengths:
            length_O = self.source.read(self.lengths[name]).float().view(-1)
            if len(length_O) != len(merged):
                raise TensorMismatchError(f"DoRA of {name!r}: {len(length_O)} lengths for {len(merged)} rows")
            merged = merged * (length_O / merged.norm(dim=1)).view(-1, 1)
        return merged.T.contiguous() if across else merged


def first_factors(weight_OI: torch.Tensor, rank: int, kind: str, scale: float) -> torch.Tensor:
    """What the initialization took off a base weight, (O, I) float32.

    The singular vectors come from the smaller Gram matrix in float64: a full decomposition of a layer takes minutes.
    """
    if kind == "olora":
        q, r = torch.linalg.qr(weight_OI)
        projected: torch.Tensor = scale * (q[:, :rank] @ r[:rank])
        return projected
    outputs, inputs = weight_OI.shape
    across = inputs < outputs
    rows = (weight_OI.T if across else weight_OI).double()
    _, vectors = torch.linalg.eigh(rows @ rows.T)  # in ascending order
    first = vectors[:, -rank:]
    taken: torch.Tensor = (first @ (first.T @ rows)).float()
    return taken.T if across else taken


def is_adapter(folder: Path) -> bool:
    return (folder / CONFIG).is_file()


def read_adapter(folder: Path) -> Adapter:
    """Raises CheckpointError, UnsupportedModelError or TensorMismatchError."""
    config = read_config(folder, CONFIG)
    check_settings(config)
    path = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if path is None:
        raise CheckpointError(f"{folder} has {CONFIG} but none of {', '.join(WEIGHTS)}")
    source = TensorSource([path])
    halves: dict[str, dict[str, str]] = {}
    replaced: dict[str, str] = {}
    shifts: dict[str, str] = {}
    lengths: dict[str, str] = {}
    rows: dict[str, str] = {}
    transposed: set[str] = set()
    for name in source.names:
        plain = name.removeprefix(WRAPPER).replace(".base_layer.", ".")
        if match := LOW_RANK.fullmatch(plain) or EMBEDDED.fullmatch(plain):
            weight = f"{match[1]}.weight"
            halves.setdefault(weight, {})[match[2]] = name
            if "lora_embedding_" in plain:
                transposed.add(weight)
        elif match := SHIFT.fullmatch(plain):
            shifts[f"{match[1]}.bias"] = name
        elif match := LENGTH.fullmatch(plain):
            lengths[f"{match[1]}.weight"] = name
        elif match := TOKENS.fullmatch(plain):
            rows[f"{match[1]}.weight"] = name
        elif "lora_" in plain or "trainable_tokens" in plain:
            raise UnsupportedModelError(f"{path}: {name!r} is not a plain LoRA pair; {MERGE}")
        else:
            replaced[plain.replace(".modules_to_save.default", "").replace(".modules_to_save", "")] = name
    alone = [name for name, half in halves.items() if len(half) != 2]
    if alone:
        raise TensorMismatchError(f"{path}: {alone[0]!r} has only one half of its LoRA pair")
    lonely = [name for name in (*shifts, *lengths) if f"{stem_of(name)}.weight" not in halves]
    if lonely:
        raise TensorMismatchError(f"{path}: {lonely[0]!r} is changed, but its layer has no LoRA pair")
    if config.flag("use_dora") != bool(lengths) or (lengths and lengths.keys() != halves.keys()):
        raise TensorMismatchError(
            f"{path}: {len(lengths)} of {len(halves)} pairs have DoRA's lengths, {CONFIG} says use_dora "
            f"{config.flag('use_dora')}"
        )
    taken_off = initialization(config)
    if transposed and (taken_off is not None or lengths):
        kind = "use_dora" if lengths else f"init_lora_weights {taken_off!r}"
        raise UnsupportedModelError(f"{config.path}: {kind} of an embedding; {MERGE}")
    scale = {name: scale_of(config, name, source.shape(half["A"])) for name, half in halves.items()}
    scale |= {bias: scale[f"{stem_of(bias)}.weight"] for bias in shifts}
    at = {name: replaced.get(name, name) for name in (*scale, *rows)}
    base, revision = config.raw.get("base_model_name_or_path"), config.raw.get("revision")
    return Adapter(
        source=source,
        pairs={at[name]: (half["A"], half["B"]) for name, half in halves.items()},
        scale={at[name]: value for name, value in scale.items()},
        replaced=replaced,
        base=base if isinstance(base, str) and base else None,
        shifts={at[bias]: name for bias, name in shifts.items()},
        rows={at[name]: (token_indices(config, name), stored) for name, stored in rows.items()},
        lengths={at[name]: stored for name, stored in lengths.items()},
        transposed=frozenset(at[name] for name in transposed),
        taken_off=taken_off,
        revision=revision if isinstance(revision, str) and revision else None,
    )


def stem_of(name: str) -> str:
    return name.rpartition(".")[0]


def check_settings(config: Config) -> None:
    """Raises UnsupportedModelError on a setting that may change what the adapter is."""
    if config.raw.get("peft_type", "LORA") != "LORA":
        raise UnsupportedModelError(f"{config.path}: peft_type {shown(config.raw['peft_type'])} is not LORA; {MERGE}")
    if config.raw.get("task_type") == "TOKEN_CLS":
        raise UnsupportedModelError(
            f"{config.path}: task_type 'TOKEN_CLS' labels every token; lightrm gives one score to a whole text"
        )
    for name, value in config.raw.items():
        off = value is None or value is False or value in ({}, [], "")
        if name not in READ | HARMLESS and not off and not name.startswith("_"):
            raise UnsupportedModelError(f"{config.path}: {name} {shown(value)} is not supported; {MERGE}")


def token_indices(config: Config, name: str) -> tuple[int, ...]:
    """Which rows of an embedding were trained. Raises ConfigError where the config does not say."""
    said = config.raw.get("trainable_token_indices")
    if isinstance(said, dict):
        said = next((value for key, value in said.items() if f".{name}".endswith(f".{key}.weight")), None)
    if not isinstance(said, list) or not all(isinstance(i, int) and not isinstance(i, bool) for i in said):
        raise ConfigError(f"{config.path}: trainable_token_indices {shown(said)} does not say the rows of {name}")
    return tuple(said)


def initialization(config: Config) -> str | None:
    """What peft takes off the base when it loads the adapter. Raises UnsupportedModelError where that is not known."""
    value = config.raw.get("init_lora_weights", True)
    kind = "true" if value is None else str(value).lower()
    if kind in PLAIN:
        return None
    if kind in TAKEN_OFF:
        return kind
    why = {
        "pissa_niter": "takes factors off the base that were found at random, and are not in the file",
        "corda": "took factors off the base that come from its training texts, and are not in the file",
        "lora_ga": "took factors off the base that come from its first gradients, and are not in the file",
        "loftq": "quantized the base, and trained on that",
    }
    said = next((text for name, text in why.items() if kind.startswith(name)), "is not known: it may change the base")
    raise UnsupportedModelError(
        f"{config.path}: init_lora_weights {shown(value)} {said}. Where it was trained, save it with "
        f"path_initial_model_for_weight_conversion, or {MERGE}"
    )


def scale_of(config: Config, name: str, low: tuple[int, ...]) -> float:
    """What a pair's product is multiplied by. Raises TensorMismatchError if its rank is not the config's."""
    module, rank = stem_of(name), low[0] if low else 0
    ranks, alphas = config.entries("rank_pattern"), config.entries("alpha_pattern")
    promised = pattern_value(config, ranks, module, config.raw.get("r"))
    if rank < 1 or (promised is not None and promised != rank):
        raise TensorMismatchError(f"{config.path}: rank {shown(promised)} for {module}, the file's pair has {rank}")
    alpha = pattern_value(config, alphas, module, config.number("lora_alpha"))
    values = Config({"alpha_pattern": alpha}, config.path)
    return values.number("alpha_pattern") / (rank**0.5 if config.flag("use_rslora") else rank)


def pattern_value(config: Config, patterns: dict[str, object], module: str, default: object) -> object:
    """The first pattern that fits the end of a module's name. Raises ConfigError if one is no regular expression."""
    try:
        return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)
    except re.error as error:
        raise ConfigError(f"{config.path}: a pattern of {listed(patterns)} cannot be read: {error}") from error


def listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))

"""A class of transformers made without memory for its weights: which tensors it has, how large they are, what it takes.

transformers makes the class on PyTorch's meta device from the config alone. So what is said of a model before it is
loaded is what the class itself says.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch

from lightrm.checkpoints.config import Config
from lightrm.checkpoints.named_class import NamedClass, version
from lightrm.errors import ConfigError, UnsupportedModelError
from lightrm.text.checkpoint_tokenizer import quiet

UNLIMITED = 2**20  # positions of a model whose config names no limit
ROPE_BY_LENGTH = {"dynamic", "longrope", "su"}  # their frequencies follow from the longest row of a batch
# Their attention is another one from some length on, padding included.
BY_LENGTH = ("big_bird", "longformer", "mra", "nystromformer", "reformer", "yoso")


@dataclass(frozen=True, slots=True)
class Outline:
    """The size of a model.

    name: its class. family: its model_type. vocabulary: rows of the embedding. linear: weights in the linear layers of
    the model without its head, which bitsandbytes quantizes; linear_rows: their output features; widths: the numbers
    of inputs that they have. tensors: shape of each tensor by its name in a file. head: those outside the backbone.
    attention: transformers' name of the implementation. takes_types: whether token types change the score. pad: the id
    that the config names for padding. length_matters: whether a longer row beside it may change a score.
    """

    name: str
    family: str
    layers: int
    width: int
    ffn_width: int
    heads: int
    vocabulary: int
    max_positions: int
    parameters: int
    linear: int
    linear_rows: int
    widths: tuple[int, ...]
    tensors: dict[str, tuple[int, ...]]
    head: tuple[str, ...]
    attention: str
    takes_types: bool
    pad: int | None
    length_matters: bool

    @property
    def positions(self) -> str:
        """What the positions of tokens mean, in words: it is the class that knows."""
        return f"transformers {version()} {self.name}, {self.attention} attention"

    @property
    def longest_eager(self) -> int:
        """Tokens of one text for which attention holds scores of each token with each, at most; 0 if it holds none."""
        return self.max_positions if self.attention == "eager" else 0

    def __str__(self) -> str:
        return f"{self.family} {self.layers}x{self.width}, {self.heads} heads"


def config_object(config: Config, named: NamedClass) -> Any:
    """Return transformers' config. Raises ConfigError on what it refuses, UnsupportedModelError on an encoder with a
    decoder."""
    kinds = import_module("transformers.models.auto.configuration_auto").CONFIG_MAPPING
    raw = {name: value for name, value in config.raw.items() if name not in ("model_type", "auto_map")}
    with quiet(import_module("transformers")):
        try:
            found = kinds[named.family].from_dict(raw)
        except Exception as error:  # a stranger's config: transformers raises errors of any kind
            raise ConfigError(f"{config.path}: transformers cannot read it for {named.runs}: {first(error)}") from error
    if getattr(found, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{config.path}: {named.name} has an encoder and a decoder; lightrm runs models that are one of the two"
        )
    found.use_cache = False  # one pass over each text
    if hasattr(found, "reference_compile"):
        found.reference_compile = False  # ModernBERT's first versions compile on the first call
    return found


def outline_of(config: Config, named: NamedClass) -> Outline:
    """Return the outline of a class with a config. Raises ConfigError if the class cannot be made with it."""
    theirs = config_object(config, named)
    made = getattr(import_module("transformers"), named.runs)
    try:
        with torch.device("meta"), quiet(import_module("transformers")):
            module = made(theirs)
            text = theirs.get_text_config()
            table = module.get_input_embeddings().weight
    except Exception as error:  # as above
        raise ConfigError(f"{config.path}: transformers cannot make {named.runs} of it: {first(error)}") from error
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    prefix = f"{module.base_model_prefix}."
    parameters = sum(part.numel() for part in module.parameters())
    if named.pooling is not None:
        shapes = {prefix + name: shape for name, shape in shapes.items()}
        shapes |= {"out_proj.weight": (1, text.hidden_size), "out_proj.bias": (1,)}
        parameters += text.hidden_size + 1
    backbone = module if named.pooling is not None else getattr(module, module.base_model_prefix, None)
    if backbone is None:
        raise UnsupportedModelError(f"{config.path}: {named.runs} does not say which of its parts is the model itself")
    linear = [part.weight for part in backbone.modules() if isinstance(part, torch.nn.Linear)]
    segments = getattr(text, "type_vocab_size", None) or 0
    return Outline(
        name=named.name,
        family=named.family,
        layers=int(getattr(text, "num_hidden_layers", 0) or 0),
        width=int(text.hidden_size),
        ffn_width=int(getattr(text, "intermediate_size", 0) or 4 * text.hidden_size),
        heads=int(getattr(text, "num_attention_heads", 0) or 1),
        vocabulary=len(table),
        max_positions=positions_of(module, text),
        parameters=parameters,
        linear=sum(weight.numel() for weight in linear),
        linear_rows=sum(len(weight) for weight in linear),
        widths=tuple(sorted({weight.shape[1] for weight in linear})),
        tensors=shapes,
        head=tuple(name for name in shapes if not name.startswith(prefix)),
        attention=str(getattr(theirs, "_attn_implementation", None) or "eager"),
        takes_types=segments > 1 and "token_type_ids" in inspect.signature(module.forward).parameters,
        pad=pad_of(text),
        length_matters=named.family in BY_LENGTH or bool(rope_kinds(text) & ROPE_BY_LENGTH),
    )


def rope_kinds(text: Any) -> set[str]:
    """Return the kinds of RoPE that a config names, of all its layers or of each kind of layer."""
    found = set()
    for spelling in ("rope_scaling", "rope_parameters"):
        settings = getattr(text, spelling, None)
        for entry in (settings, *settings.values()) if isinstance(settings, dict) else ():
            if isinstance(entry, dict):
                found.add(str(entry.get("rope_type") or entry.get("type")))
    return found


def pad_of(text: Any) -> int | None:
    pad = getattr(text, "pad_token_id", None)
    return pad if isinstance(pad, int) and pad >= 0 else None


def positions_of(module: torch.nn.Module, text: Any) -> int:
    """Return how many tokens a text may have. In a table whose rows begin behind the pad token's, as RoBERTa's do, as
    many rows less stand for positions."""
    longest = getattr(text, "max_position_embeddings", None)
    longest = longest if isinstance(longest, int) and longest > 0 else UNLIMITED
    for name, part in module.named_modules():
        if name.endswith("position_embeddings") and isinstance(part, torch.nn.Embedding):
            unused = 0 if part.padding_idx is None else part.padding_idx + 1
            longest = min(longest, part.num_embeddings - unused)
    return longest


def first(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines)[:300]}"

"""RoPE in config.json -> `Rope`: rope_theta and rope_scaling (transformers 4), or rope_parameters (transformers 5).

A kind of scaling, or a field of one, that is not read here is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lightrm.architecture import LinearScaling, Llama3Scaling, LongRopeScaling, Rope, YarnScaling
from lightrm.checkpoints.config import Config, shown
from lightrm.errors import ConfigError, UnsupportedModelError

ORIGINAL = "original_max_position_embeddings"
FIELDS = {
    "default": (),
    "dynamic": ("factor",),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", ORIGINAL),
    "yarn": (
        "factor", ORIGINAL, "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate",
    ),
    "longrope": ("factor", "short_factor", "long_factor", "attention_factor", ORIGINAL),
}  # fmt: skip
NOTES = ("rope_type", "type", "rope_theta", "finetuned", "partial_rotary_factor", ORIGINAL)
THETA = 10000.0
FAST, SLOW = 32.0, 1.0  # YaRN's defaults


def read_head_width(config: Config) -> int:
    width, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    if not config.has("head_dim") and width % heads:
        raise ConfigError(f"{config.path}: hidden_size {width} is not a multiple of {heads} attention heads")
    return config.integer("head_dim", width // heads)


def read_rope(config: Config, renamed: Mapping[str, str] | None = None, partial: bool = False) -> Rope:
    """Return RoPE's settings. renamed: kinds that a family calls by another name; partial: whether its code knows a
    RoPE on a part of each head."""
    theta = theta_of(config, THETA)
    found = [
        rope_of(config, Config(config.entries(name), config.path), name, theta, renamed, partial)
        for name in ("rope_scaling", "rope_parameters")
        if config.entries(name)
    ]
    if len(found) == 2 and found[0] != found[1]:
        raise ConfigError(f"{config.path}: rope_scaling says {found[0]}, rope_parameters says {found[1]}: which is it?")
    return found[0] if found else rope_of(config, Config({}, config.path), "rope_parameters", theta, renamed, partial)


def theta_of(config: Config, default: float) -> float:
    return config.number("rope_theta", default, positive=True)


def rope_of(
    config: Config,
    values: Config,
    spelling: str,
    theta: float,
    renamed: Mapping[str, str] | None = None,
    partial: bool = False,
) -> Rope:
    """Return the settings of one object. spelling: its name, for messages; theta: where it holds none."""
    kind = values.raw.get("rope_type") or values.raw.get("type") or "default"
    kind = (renamed or {}).get(kind, kind) if isinstance(kind, str) else kind
    if not isinstance(kind, str) or kind not in FIELDS:
        raise UnsupportedModelError(
            f"{config.path}: RoPE scaling {shown(kind)} is not supported; lightrm runs default, linear, llama3, yarn, "
            "longrope and, within max_position_embeddings, dynamic"
        )
    known = (*NOTES, *FIELDS[kind])
    for name, value in values.raw.items():
        halved = name == "partial_rotary_factor" and value != 1 and not partial
        if value is not None and (name not in known or halved):
            raise UnsupportedModelError(
                f"{config.path}: {spelling} has {name} {shown(value)}, which lightrm does not run; of RoPE "
                f"{kind!r} it reads {', '.join(('rope_theta', *FIELDS[kind]))}"
            )
    theta = values.number("rope_theta", theta, positive=True)
    part = 1.0
    if partial:
        part = values.number("partial_rotary_factor", config.number("partial_rotary_factor", 1.0), positive=True)
    if part > 1:
        raise ConfigError(f"{config.path}: partial_rotary_factor is {part:g}, a part of each head is at most 1")
    return Rope(theta, scaling_of(kind, config, values, part), part)


def scaling_of(
    kind: str, config: Config, values: Config, part: float
) -> LinearScaling | Llama3Scaling | YarnScaling | LongRopeScaling | None:
    if kind == "linear":
        return LinearScaling(values.number("factor", positive=True))
    if kind == "llama3":
        low, high = (values.number(f"{end}_freq_factor", positive=True) for end in ("low", "high"))
        if low >= high:
            raise ConfigError(f"{config.path}: low_freq_factor {low:g} must be below high_freq_factor {high:g}")
        return Llama3Scaling(values.number("factor", positive=True), low, high, values.integer(ORIGINAL))
    if kind == "yarn":
        return yarn(config, values)
    if kind == "longrope":
        return longrope(config, values, part)
    return None  # dynamic NTK scaling acts beyond max_position_embeddings only, where lightrm does not go


def original_positions(config: Config, values: Config) -> int:
    """Return the positions before scaling. Phi-3 writes them at the top of its config, where they count first."""
    if config.has(ORIGINAL):
        return config.integer(ORIGINAL)
    return values.integer(ORIGINAL, config.integer("max_position_embeddings"))


def factor_of(config: Config, values: Config, original: int) -> float:
    """Return the factor; where none is given, by how much the positions were extended."""
    return values.number("factor", config.integer("max_position_embeddings") / original, positive=True)


def yarn(config: Config, values: Config) -> YarnScaling:
    original = original_positions(config, values)
    factor = factor_of(config, values, original)
    given = [values.number(name, 0.0) for name in ("mscale", "mscale_all_dim")]
    least = magnitude(factor, given[0]) / magnitude(factor, given[1]) if all(given) else magnitude(factor)
    fast, slow = values.number("beta_fast", FAST) or FAST, values.number("beta_slow", SLOW) or SLOW
    whole = values.raw.get("truncate")
    if whole is not None and not isinstance(whole, bool):
        raise ConfigError(f"{config.path}: field 'truncate' must be true or false, found {shown(whole)}")
    attention = values.number("attention_factor", least, positive=True)
    return YarnScaling(factor, original, fast, slow, attention, whole is not False)


def magnitude(factor: float, scale: float = 1.0) -> float:
    """Return YaRN's factor of cos and sin: 0.1 ln(factor) + 1."""
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def longrope(config: Config, values: Config, part: float) -> LongRopeScaling:
    original = original_positions(config, values)
    factor = factor_of(config, values, original)
    attention = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    pairs = Rope(part=part).turned(read_head_width(config)) // 2
    short, long = (factors(config, values.raw.get(name), name, pairs) for name in ("short_factor", "long_factor"))
    return LongRopeScaling(short, long, original, values.number("attention_factor", attention, positive=True))


def factors(config: Config, found: Any, name: str, pairs: int) -> tuple[float, ...]:
    """Return a list of one factor for each pair of channels that turns. Raises ConfigError on anything else."""
    if not isinstance(found, list) or len(found) != pairs:
        many = f"{len(found)} factors" if isinstance(found, list) else shown(found)
        raise ConfigError(f"{config.path}: field {name!r} must be a list of {pairs} factors, found {many}")
    each = Config(dict(enumerate(found)), config.path)  # type: ignore[arg-type]
    return tuple(each.number(k, positive=True) for k in range(pairs))  # type: ignore[arg-type]

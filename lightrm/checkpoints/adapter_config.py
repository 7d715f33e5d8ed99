"""The settings in adapter_config.json, as peft 0.21 reads them.

A setting that is neither read nor known to be harmless is refused by name.
"""

from __future__ import annotations

import re

from lightrm.checkpoints.config import Config, shown
from lightrm.errors import ConfigError, TensorMismatchError, UnsupportedModelError

MOST_REPEATED = 4  # repetitions in a pattern: each multiplies the time that it may take by the length of a name
CONFIG = "adapter_config.json"
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


def stem_of(name: str) -> str:
    return name.rpartition(".")[0]


def check_settings(config: Config) -> None:
    """Raise UnsupportedModelError on a setting that may change what the adapter does."""
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
    """Return which rows of an embedding were trained. Raises ConfigError if the config does not say."""
    said = config.raw.get("trainable_token_indices")
    if isinstance(said, dict):
        said = next((value for key, value in said.items() if f".{name}".endswith(f".{key}.weight")), None)
    if not isinstance(said, list) or not all(isinstance(i, int) and not isinstance(i, bool) for i in said):
        raise ConfigError(f"{config.path}: trainable_token_indices {shown(said)} does not say the rows of {name}")
    return tuple(said)


def initialization(config: Config) -> str | None:
    """Return what peft subtracts from the base when it loads the adapter. Raises UnsupportedModelError if that is not
    known."""
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
    """Return the factor of a pair's product. Raises TensorMismatchError if its rank is not the config's."""
    module, rank = stem_of(name), low[0] if low else 0
    ranks, alphas = config.entries("rank_pattern"), config.entries("alpha_pattern")
    promised = pattern_value(config, ranks, module, config.raw.get("r"))
    if rank < 1 or (promised is not None and promised != rank):
        raise TensorMismatchError(f"{config.path}: rank {shown(promised)} for {module}, the file's pair has {rank}")
    alpha = pattern_value(config, alphas, module, config.number("lora_alpha"))
    values = Config({"alpha_pattern": alpha}, config.path)
    return values.number("alpha_pattern") / (rank**0.5 if config.flag("use_rslora") else rank)


def pattern_value(config: Config, patterns: dict[str, object], module: str, default: object) -> object:
    """Return the value of the first pattern that fits the end of a module's name.

    Raises ConfigError if a pattern is not a regular expression, or could take forever to match: it repeats a group, or
    has many repetitions.
    """
    for key in patterns:
        if re.search(r"\)\s*[*+{]", key) or len(re.findall(r"[*+{]", key)) > MOST_REPEATED:
            raise ConfigError(
                f"{config.path}: the pattern {key[:200]!r} repeats a group, or more than {MOST_REPEATED} times: "
                "matching it may never end; write the modules' names out"
            )
    try:
        return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)
    except re.error as error:
        patterned = ", ".join(map(repr, patterns))
        raise ConfigError(f"{config.path}: a pattern of {patterned} cannot be read: {error}") from error

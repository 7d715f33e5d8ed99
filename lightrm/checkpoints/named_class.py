"""Which class of transformers a config.json names, if that is a reward model which transformers itself can run.

A class counts if transformers lists it as the sequence classifier of the config's model_type. One more is known:

    GPTNeoXRewardModel    OpenAssistant's own: GPTNeoXModel under `gpt_neox.`, then the linear layer `out_proj` on the
                          last token or on the mean over all tokens, as the config's `pooling` says

transformers is imported here only after the config's names make it likely that it has the class.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Literal

from lightrm.checkpoints.config import Config, shown
from lightrm.checkpoints.head_outputs import check_kind
from lightrm.errors import ConfigError, UnsupportedModelError

KIND = "ForSequenceClassification"
OPEN_ASSISTANT = "GPTNeoXRewardModel"
INSTALL = "pip install 'lightrm[transformers]'"
Pooling = Literal["last", "mean"]


@dataclass(frozen=True, slots=True)
class NamedClass:
    """name: as config.json says it. family: transformers' model_type of its config. runs: the class of transformers
    that is made. pairs: whether it is an encoder, which reads a prompt and a response as a pair of texts. pooling: over
    the tokens of `runs`, where that is a model without a head; None if the class gives the score itself."""

    name: str
    family: str
    runs: str
    pairs: bool
    pooling: Pooling | None = None


def named_class(config: Config, asked: bool) -> NamedClass:
    """Return the class that a config names. asked: whether the caller chose transformers, whatever the config says of
    code of its own. Raises UnsupportedModelError, which says what was found, if transformers has no such class."""
    check_kind(config)
    family, name = config.text("model_type"), config.classes
    found = f"{config.path}: {name or 'no architectures entry'} of model_type {family!r}"
    if name == OPEN_ASSISTANT:
        check_installed(found)
        return NamedClass(name, "gpt_neox", "GPTNeoXModel", pairs=False, pooling=pooling_of(config))
    if not name.endswith(KIND) or " " in name:
        raise UnsupportedModelError(f"{found} is no class of transformers that ends in {KIND}")
    check_installed(found)
    lists = import_module("transformers.models.auto.modeling_auto")
    theirs = lists.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.get(family)
    if theirs != name:
        has = f"which has {theirs} for that model_type" if theirs else "which knows no such model_type here"
        raise UnsupportedModelError(
            f"{found} is not in transformers {version()}, {has}; a newer transformers may have it: pip install -U "
            "transformers"
        )
    own = config.entries("auto_map").get(f"AutoModel{KIND}")
    if own is not None and not asked:
        raise UnsupportedModelError(
            f"{found} is code of the checkpoint's own ({shown(own)}), which lightrm does not run; "
            "engine='transformers' loads transformers' own class of that name instead"
        )
    return NamedClass(name, family, name, pairs=family in lists.MODEL_FOR_MASKED_LM_MAPPING_NAMES)


def pooling_of(config: Config) -> Pooling:
    """Raises ConfigError on anything but the two that the class knows; "last" is its default."""
    named = config.raw.get("pooling") or "last"
    if named not in ("last", "mean"):
        raise ConfigError(f"{config.path}: field 'pooling' must be 'last' or 'mean', found {shown(named)}")
    return "mean" if named == "mean" else "last"


def check_installed(found: str) -> None:
    """Raise UnsupportedModelError if transformers is missing."""
    if find_spec("transformers") is None:
        raise UnsupportedModelError(f"{found} needs transformers, which is not installed: {INSTALL}")


def version() -> str:
    return str(import_module("transformers").__version__)

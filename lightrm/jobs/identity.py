"""What a score depends on: two scores are comparable only if all of it is the same for both.

That is the bytes of weights and adapter, config, tokenizer and chat template, and how the model was loaded. Jobs and
measurements go on only with the same identity, and name what differs.
"""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import version
from typing import Any

from lightrm.checkpoints.contents import DIGITS, parts
from lightrm.scorer import RewardModel

SHOWN = ("model", "scheme", "template")


def identity(rm: RewardModel, model: str) -> dict[str, str]:
    """Return what the scores of a model depend on, each value a short text. model: as the caller named it.

    Raises CheckpointError if a file is gone.
    """
    template = rm.template.name if rm.template is not None else "none"
    return {
        "model": model,
        **parts(rm.checkpoint),
        "scheme": rm.report.scheme.name,
        "template": f"{template}, at most {rm.max_length} tokens",
        "system": "none" if rm.text.system is None else repr(rm.text.system),
        "engine": rm.engine.name,
        "positions": str(rm.engine.architecture.positions),
        "parse_specials": str(rm.text.tokens is not None and rm.text.tokens.parse_specials),
        "strict": str(rm.text.strict),
        "device": rm.device.type,
        "versions": ", ".join(f"{name} {version(name)}" for name in ("lightrm", "transformers")),
        **score_of(rm),
    }


def score_of(rm: RewardModel) -> dict[str, str]:
    """Return what the caller said about what the score is, as far as the files do not."""
    found = {"layout": rm.checkpoint.layout.name} if rm.checkpoint.layout.asked else {}
    if rm.text.steps is not None:
        found["reduce"] = str(rm.text.steps.reduce)
    if rm.attributes:
        head = rm.engine.head
        found["attributes"] = "all" if head.names else digest(head.weights[-1].tolist())
    return found


def summary(by: dict[str, str]) -> dict[str, str]:
    """Return an identity as each scored record stores it: most of it as one fingerprint."""
    rest = {name: value for name, value in by.items() if name not in SHOWN}
    return {
        "model": by["model"],
        "fingerprint": digest(rest),
        "scheme": by["scheme"],
        "template": by["template"],
    }


def digest(value: Any) -> str:
    """Return the hash of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:DIGITS]

"""lightrm: score answers with 7B and 13B reward models on the machine you have.

    >>> import lightrm
    >>> rm = lightrm.load("demo")  # a folder, a hub id, or the bundled model
    >>> best = rm.rank("How do I make tea?", ["Boil water and", "Boil water and pour it over."])[0]
    >>> best.response
    'Boil water and pour it over.'

Names are loaded on first use, so that `import lightrm` stays cheap.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightrm.data.preferences import read_questions
    from lightrm.engine.engine import MemoryWarning
    from lightrm.errors import (
        CheckpointError,
        InputError,
        LightRMError,
        MemoryLimitError,
        NumericsError,
        SchemeError,
        TemplateError,
        TokenizerError,
    )
    from lightrm.measure.measurement import evaluate, measure_fidelity
    from lightrm.opening import KernelWarning, load
    from lightrm.scorer import RewardModel
    from lightrm.text.cutting import TruncationWarning

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "InputError",
    "KernelWarning",
    "LightRMError",
    "MemoryLimitError",
    "MemoryWarning",
    "NumericsError",
    "RewardModel",
    "SchemeError",
    "TemplateError",
    "TokenizerError",
    "TruncationWarning",
    "evaluate",
    "load",
    "measure_fidelity",
    "read_questions",
]


ROOMS = {
    "KernelWarning": "lightrm.opening",
    "MemoryWarning": "lightrm.engine.engine",
    "RewardModel": "lightrm.scorer",
    "TruncationWarning": "lightrm.text.cutting",
    "evaluate": "lightrm.measure.measurement",
    "load": "lightrm.opening",
    "measure_fidelity": "lightrm.measure.measurement",
    "read_questions": "lightrm.data.preferences",
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'lightrm' has no attribute {name!r}")
    room = ROOMS.get(name, "lightrm.errors")
    return getattr(import_module(room), name)


def __dir__() -> list[str]:
    return sorted(__all__)

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
    from lightrm.data.preferences import Question, read_questions
    from lightrm.engine.engine import MemoryWarning
    from lightrm.errors import (
        CheckpointError,
        ConfigError,
        CopyError,
        CorruptFileError,
        DownloadError,
        InputError,
        LightRMError,
        MemoryLimitError,
        MissingHeadError,
        NumericsError,
        SchemeError,
        TemplateError,
        TensorMismatchError,
        TokenizerError,
        TooLongError,
        UnsafePickleError,
        UnsupportedModelError,
    )
    from lightrm.judge.agreement import Estimate
    from lightrm.judge.bounds import Bound, Limit
    from lightrm.judge.evaluation import Evaluation
    from lightrm.judge.exact_ranking import Effort, Ranked, Ranking, Rankings
    from lightrm.judge.fidelity import FidelityReport
    from lightrm.loading.placement import LoadReport
    from lightrm.loading.text_side import TokenizerWarning
    from lightrm.measure.measurement import evaluate, measure_fidelity
    from lightrm.opening import KernelWarning, load
    from lightrm.scorer import RewardModel
    from lightrm.text.cutting import TruncationWarning
    from lightrm.text.explanation import Explanation

__version__ = "0.1.0"

__all__ = [
    "Bound",
    "CheckpointError",
    "ConfigError",
    "CopyError",
    "CorruptFileError",
    "DownloadError",
    "Effort",
    "Estimate",
    "Evaluation",
    "Explanation",
    "FidelityReport",
    "InputError",
    "KernelWarning",
    "LightRMError",
    "Limit",
    "LoadReport",
    "MemoryLimitError",
    "MemoryWarning",
    "MissingHeadError",
    "NumericsError",
    "Question",
    "Ranked",
    "Ranking",
    "Rankings",
    "RewardModel",
    "SchemeError",
    "TemplateError",
    "TensorMismatchError",
    "TokenizerError",
    "TokenizerWarning",
    "TooLongError",
    "TruncationWarning",
    "UnsafePickleError",
    "UnsupportedModelError",
    "evaluate",
    "load",
    "measure_fidelity",
    "read_questions",
]


ROOMS = {
    "Bound": "lightrm.judge.bounds",
    "Effort": "lightrm.judge.exact_ranking",
    "Estimate": "lightrm.judge.agreement",
    "Evaluation": "lightrm.judge.evaluation",
    "Explanation": "lightrm.text.explanation",
    "FidelityReport": "lightrm.judge.fidelity",
    "KernelWarning": "lightrm.opening",
    "Limit": "lightrm.judge.bounds",
    "LoadReport": "lightrm.loading.placement",
    "MemoryWarning": "lightrm.engine.engine",
    "Question": "lightrm.data.preferences",
    "Ranked": "lightrm.judge.exact_ranking",
    "Ranking": "lightrm.judge.exact_ranking",
    "Rankings": "lightrm.judge.exact_ranking",
    "RewardModel": "lightrm.scorer",
    "TokenizerWarning": "lightrm.loading.text_side",
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

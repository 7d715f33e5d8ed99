"""The records of an evaluation with their scores, written as a job writes them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from lightrm.data.data_source import DataSource
from lightrm.jobs.identity import identity, summary
from lightrm.jobs.job import exists, write_output
from lightrm.jobs.job_outputs import Entry, Output, Tell, output_for
from lightrm.scorer import RewardModel


@dataclass(frozen=True, slots=True)
class JudgedRows:
    """An output that is checked before the model is loaded, and written when its scores are known."""

    output: Output
    target: Path

    @classmethod
    def of(cls, source: DataSource, target: Path, tell: Tell) -> JudgedRows:
        """Raises InputError if the output exists, or cannot hold the fields of the source."""
        if target.exists():
            raise exists(target)
        return cls(output_for(source, target, tell), target)

    def write(self, rm: RewardModel, model: str, scores: Mapping[int, list[float]]) -> None:
        """Write the rows that were scored. scores: of the answers of each, by its place among all rows.

        Raises InputError if the source is not what it was.
        """
        write_output(self.output, self.target, self.entries(scores), summary(identity(rm, model)))

    def entries(self, scores: Mapping[int, list[float]]) -> Iterator[Entry]:
        for place, row in enumerate(self.output.source.rows()):
            found = scores.get(place)
            yield row.checksum, None if found is None else [*found], "" if found is not None else "not scored"

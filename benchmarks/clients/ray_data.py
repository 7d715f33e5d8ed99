"""Does Ray Data, with two actors, give the scores of one process? And does a job that was broken off go on?

    python -m benchmarks.clients.ray_data DATA [--answers N]

Runs in an environment that has lightrm and `ray[data]==2.60.0`. Ray starts on this machine, and two actors score
real pairs with the bundled model: prompts as strings, as turns, and with a list of answers a row, in Ray's three batch
formats. Then a job fails halfway, is started again with Ray's checkpoints, and must write each row once.
All scores are compared with one process by their bits. Writes results/ray_data.json and the sentence in the documents.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

import lightrm
from benchmarks.bundled_model import prompt_of, sample
from benchmarks.fidelity import options
from benchmarks.record import measured_on, provenance, quote, this_cpu, write_result
from lightrm.integrations.ray import Scorer

OPTIONS = {"scheme": "w8a8", "max_length": 512}
JOBS = (  # what rows hold, and Ray's batch format; the tests have every pair of them, without Ray
    ("text", "numpy"),
    ("turns", "numpy"),
    ("turns", "pyarrow"),
    ("answers", "pandas"),
)
NAMES = {"text": "prompts as strings", "turns": "prompts as turns", "answers": "lists of answers"}
BATCH = 8
SLOTS = 4  # two for the actors, two for what reads, writes and filters: without, a checkpointed job waits forever


class Marked(Scorer):
    """Says which process scored a row. breaks: the id at which the job fails, once `watched` holds a file of rows."""

    def __init__(self, *, breaks: int | None = None, watched: str = "", **arguments: Any) -> None:
        self.started = time.perf_counter()
        super().__init__("demo", OPTIONS, **arguments)
        self.seconds, self.breaks, self.watched = time.perf_counter() - self.started, breaks, watched

    def __call__(self, batch: Any) -> Any:
        import pyarrow

        if self.breaks is not None and self.breaks in batch["id"].to_pylist():
            end = time.monotonic() + 60
            while not any(Path(self.watched).rglob("*.parquet")) and time.monotonic() < end:
                time.sleep(0.1)
            raise RuntimeError("the machine is gone")
        found = super().__call__(batch)
        if isinstance(found, pyarrow.Table):
            found = found.append_column("process", pyarrow.array([os.getpid()] * len(found)))
            return found.append_column("loading", pyarrow.array([self.seconds] * len(found)))
        marks = {
            "process": np.full(len(found[self.output]), os.getpid()),
            "loading": np.full(len(found[self.output]), self.seconds),
        }
        return {**found, **marks} if isinstance(found, dict) else found.assign(**marks)


def records(data: Path, count: int) -> list[dict[str, Any]]:
    """Rows as people have them: prompts as strings and as turns, one answer, and a list of answers."""
    found = []
    for k, record in enumerate(sample(data / "pairs_dev.jsonl.gz", count // 2)):
        prompt = prompt_of(record)
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        answers = [record["chosen"], record["rejected"]]
        for i, answer in enumerate(answers):
            row = {"id": 2 * k + i, "text": turns[-1]["content"], "turns": turns, "response": answer}
            found.append(row | {"answers": answers[: 1 + i]})
    return found


def expected(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """One process's scores of each form, by id."""
    rm = lightrm.load("demo", **OPTIONS)
    answers = [row["response"] for row in rows]
    lists = iter(
        rm.score_batch([r["turns"] for r in rows for _ in r["answers"]], [a for r in rows for a in r["answers"]])
    )
    return {
        "text": rm.score_batch([row["text"] for row in rows], answers).tolist(),
        "turns": rm.score_batch([row["turns"] for row in rows], answers).tolist(),
        "answers": [[float(next(lists)) for _ in row["answers"]] for row in rows],
    }


def mapped(ray: Any, rows: list[dict[str, Any]], form: str, batch_format: str) -> dict[str, Any]:
    """Score one form of rows with two actors, and read the result as rows."""
    arguments = {"prompt": "turns" if form == "answers" else form}
    arguments |= {"responses": "answers", "output": "score"} if form == "answers" else {}
    made = ray.data.from_items(rows, override_num_blocks=8).map_batches(
        Marked,
        fn_constructor_kwargs=arguments,
        batch_size=BATCH,
        batch_format=batch_format,
        compute=ray.data.ActorPoolStrategy(size=2),
        num_cpus=1,
    )
    with tempfile.TemporaryDirectory() as folder:
        made.write_parquet(folder)
        return by_id(folder)


def by_id(folder: str | Path) -> dict[str, Any]:
    """What Parquet files hold, in the order of the ids."""
    import pyarrow.parquet

    table = pyarrow.concat_tables(
        [pyarrow.parquet.read_table(path) for path in sorted(Path(folder).rglob("*.parquet"))],
        promote_options="default",
    )
    return table.sort_by("id").to_pydict()


def continued(ray: Any, rows: list[dict[str, Any]], right: list[float]) -> dict[str, Any]:
    """A job that fails at its last row, and is started again."""
    from ray.data.checkpoint import CheckpointConfig

    context = ray.data.DataContext.get_current()
    with tempfile.TemporaryDirectory() as root:
        source, target, kept = (str(Path(root) / name) for name in ("source", "target", "kept"))
        ray.data.from_items(rows, override_num_blocks=8).write_parquet(source)
        context.checkpoint_config = CheckpointConfig(
            id_column="id", checkpoint_path=kept, delete_checkpoint_on_success=False
        )

        def run(breaks: int | None) -> None:
            ray.data.read_parquet(source, override_num_blocks=8).map_batches(
                Marked,
                fn_constructor_kwargs={"prompt": "turns", "breaks": breaks, "watched": target},
                batch_size=BATCH,
                batch_format="pyarrow",
                compute=ray.data.ActorPoolStrategy(size=2),
                num_cpus=1,
            ).write_parquet(target)

        failed = False
        try:
            run(rows[-1]["id"])
        except Exception as error:
            failed = "the machine is gone" in str(error)
        before = len(by_id(target)["id"]) if any(Path(target).rglob("*.parquet")) else 0
        run(None)
        found = by_id(target)
        context.checkpoint_config = None
    return {
        "failed": failed,
        "rows before": before,
        "rows after": len(found["id"]),
        "each once": found["id"] == [row["id"] for row in rows],
        "equal": found["score"] == right,
    }


def main() -> None:
    parser = options(__doc__, answers=64)
    arguments = parser.parse_args()
    import ray

    rows = records(arguments.data, arguments.answers)
    right = expected(rows)
    ray.init(num_cpus=SLOTS, include_dashboard=False, logging_level="ERROR")
    found = []
    for form, batch_format in JOBS:
        start = time.perf_counter()
        made = mapped(ray, rows, form, batch_format)
        found.append(
            {
                "rows": form,
                "batch format": batch_format,
                "actors": len(set(made["process"])),
                "equal": made["score"] == right[form] and made["id"] == [row["id"] for row in rows],
                "columns kept": all(made[name] == [row[name] for row in rows] for name in rows[0]),
                "loading, s": max(made["loading"]),
                "job, s": time.perf_counter() - start,
            }
        )
    resumed = continued(ray, rows, right["turns"])
    ray.shutdown()
    result = {"answers": len(rows), "jobs": found, "continued": resumed}
    write_result("ray_data", {**provenance(("torch", "numpy", "ray", "pyarrow", "pandas")), **this_cpu(), **result})
    quote("ray_data", sentence)


def sentence(result: dict[str, Any]) -> str:
    jobs, resumed = result["jobs"], result["continued"]
    equal = all(job["equal"] and job["columns kept"] for job in jobs)
    actors = "two actors" if all(job["actors"] == 2 for job in jobs) else "one or two actors"
    bits = "one process's bit for bit" if equal else "not all one process's"
    shown = ", ".join(f"{NAMES[job['rows']]} in {job['batch format']}" for job in jobs)
    whole = resumed["failed"] and resumed["each once"] and resumed["equal"]
    again = "wrote every row once, with the same scores" if whole else "did not write every row once"
    return (
        f"Ray {result['versions']['ray']}, {actors} on one machine: the scores of {result['answers']} rows are {bits}, "
        f"in each of {len(jobs)} jobs ({shown}). A job that failed after {resumed['rows before']} rows and was started "
        f"again {again}. {measured_on(result)}\n"
    )


if __name__ == "__main__":
    main()

"""Columns of polars in every method of a reward model: `python -m benchmarks.clients.polars_columns`.

The tests hand over columns of pandas, pyarrow and datasets; polars is 54 MB, so it is tried here. Each method must give
the bits that it gives for lists, and refuse what it must refuse.
"""

from __future__ import annotations

from typing import Any

import numpy as np

import lightrm
from benchmarks.record import provenance, quote, write_result
from lightrm.data.preferences import question_of, questions_of
from lightrm.errors import InputError

TEXTS = ["How do I make tea?", "怎样才能睡得更好？", "Why is the sky blue?"]
ANSWERS = ["Boil water and pour it over the leaves.", "睡前不看手机，少喝咖啡。", "Air scatters blue light most."]


def main() -> None:
    import polars as pl

    rm = lightrm.load("demo", scheme="fp32")
    turns = [[{"role": "user", "content": text}] for text in TEXTS]
    said = [{"role": "assistant", "content": text} for text in ANSWERS]
    lists = [ANSWERS, ANSWERS[:1], ANSWERS[:2]]
    frame = pl.DataFrame({"prompt": TEXTS, "turns": turns, "answer": ANSWERS, "said": said, "answers": lists})
    expected = rm.score_batch(TEXTS, ANSWERS)
    ranked = rm.rank_batch(TEXTS, lists)
    kinds = {"String": frame["answer"], "Categorical": frame["answer"].cast(pl.Categorical), "Struct": frame["said"]}
    held: dict[str, bool] = {}
    for name, column in kinds.items():
        held[f"answers as {name}"] = np.array_equal(rm.score_batch(frame["prompt"], column), expected)
    held["conversations"] = np.array_equal(rm.score_batch(frame["turns"], frame["answer"]), expected)
    held["one conversation"] = np.array_equal(rm.score(frame["turns"][1], frame["answer"]), rm.score(TEXTS[1], ANSWERS))
    held["texts"] = np.array_equal(rm.score_text(frame["answer"]), rm.score_text(ANSWERS))
    held["lists of answers"] = positions(rm.rank_batch(frame["prompt"], frame["answers"])) == positions(ranked)
    ids = rm.encode(TEXTS, ANSWERS)
    held["ids"] = np.array_equal(rm.score_ids(pl.Series(ids)), rm.score_ids(ids))
    records = [{"prompt": t, "chosen": a, "rejected": b} for t, a, b in zip(TEXTS, ANSWERS, TEXTS, strict=True)]
    held["a table of records"] = questions_of(pl.DataFrame(records)) == [question_of(record) for record in records]
    held["a missing text"] = "response 1 must be a string, found None" in refused(rm, pl.Series(["a", None]))
    held["numbers"] = "response 0 must be a string, found int 1" in refused(rm, pl.Series([1, 2]))
    held["a table"] = "found DataFrame, a table with the columns 'prompt', 'turns'" in refused(rm, frame)
    held["a lazy table"] = "found LazyFrame, a table: pass one of its columns" in refused(rm, frame.lazy())
    result = {**provenance(("torch", "numpy", "polars")), "held": held}
    write_result("polars_columns", result)
    quote("polars_columns", sentence)


def positions(rankings: Any) -> list[list[int]]:
    return [[one.position for one in ranking] for ranking in rankings]


def refused(rm: lightrm.RewardModel, given: Any) -> str:
    try:
        rm.score("x", given)
    except InputError as error:
        return str(error)
    return ""


def sentence(result: dict[str, Any]) -> str:
    held, version = result["held"], result["versions"]["polars"]
    return (
        f"Columns of polars {version} are tried by a script of their own: {sum(held.values())} of {len(held)} checks "
        f"held ({', '.join(held)}), on {result['date']} at commit {result['commit']}.\n"
    )


if __name__ == "__main__":
    main()

"""Do OpenRLHF, verl and slime get from lightrm's functions what lightrm itself gives?

    python -m benchmarks.clients.trainers DATA --slime FOLDER [--answers N]

Runs in an environment that has lightrm, `openrlhf==0.11.2` and `verl==0.9.1` (installed with --no-deps, and then what
their reward code imports: ray, tensordict, hydra-core, codetiming, cachetools, pylatexenc, aiohttp, httpx, pybase64);
FOLDER is a clone of slime. Their own code loads the function and calls it; only the policy is replaced, by answers that
people wrote. All answers are asked for at once, as in a rollout, and then again in one call of lightrm:

    OpenRLHF  SingleTurnAgentExecutor.execute, given the path of lightrm/integrations/openrlhf.py
    verl      RewardLoopWorker.compute_score_batch, with its own reward.yaml and a custom_reward_function
    slime     async_rm and batched_async_rm, with a custom_rm_path

Writes results/trainers.json and the sentence in the documents.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers

import lightrm
from benchmarks.bundled_model import prompt_of, sample
from benchmarks.fidelity import options
from benchmarks.record import measured_on, provenance, quote, this_cpu, write_result
from lightrm.checkpoints.hub import DEMO_FOLDER
from lightrm.integrations import openrlhf, slime, verl
from lightrm.integrations.column_batches import as_objects

OPTIONS = {"scheme": "w8a8"}
REPEATS = 5
LONGEST = 512  # tokens of a prompt and its answer


class Spoken:
    """Stands in for the engine that generates: gives the tokens of an answer that is known."""

    def __init__(self, token_ids: list[int]) -> None:
        self.token_ids = token_ids

    async def generate(self, prompt_ids: list[int], parameters: object, multi_modal_data: object = None) -> Any:
        await asyncio.sleep(0)
        return SimpleNamespace(outputs=[SimpleNamespace(token_ids=self.token_ids, finish_reason="stop", logprobs=None)])


def asked(data: Path, count: int, tokenizer: Any) -> list[tuple[Any, str]]:
    """Real prompts with their two answers, short enough for all trainers."""
    found = []
    for record in sample(data / "pairs_dev.jsonl.gz", 400):
        turns = prompt_of(record)
        turns = turns if not isinstance(turns, str) else [{"role": "user", "content": turns}]
        for answer in (record["chosen"], record["rejected"]):
            if len(tokenizer(templated(turns) + answer)["input_ids"]) <= LONGEST:
                found.append((turns, answer))
    return found[:count]


def templated(turns: Sequence[dict[str, str]]) -> str:
    """A conversation as a policy's template might write it."""
    return "".join(f"{turn['role'].title()}:{turn['content']}\n\n" for turn in turns) + "Assistant:"


def timed(run: Callable[[], Any]) -> tuple[Any, float]:
    """What a run gives, and the time of the fastest of several: other programs only ever slow one down."""
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        found = run()
        seconds.append(time.perf_counter() - start)
    return found, min(seconds)


def openrlhf_rows(rm: lightrm.RewardModel, pairs: list[tuple[Any, str]], tokenizer: Any) -> dict[str, Any]:
    from openrlhf.utils.agent import SingleTurnAgentExecutor

    executor = SingleTurnAgentExecutor(remote_rm_url=[openrlhf.__file__])
    prompts = [templated(turns) for turns, _ in pairs]
    spoken = [tokenizer(answer, add_special_tokens=False)["input_ids"] for _, answer in pairs]

    async def rollouts() -> list[dict[str, Any]]:
        parameters = SimpleNamespace(max_tokens=LONGEST, logprobs=None)
        return await asyncio.gather(
            *(
                executor.execute(prompt, "label", parameters, 4 * LONGEST, tokenizer, Spoken(ids))
                for prompt, ids in zip(prompts, spoken, strict=True)
            )
        )

    asyncio.run(rollouts())  # loads the model
    outputs, at_once = timed(lambda: asyncio.run(rollouts()))
    queries = [tokenizer.decode(output["observation_tokens"], skip_special_tokens=False) for output in outputs]
    right, together = timed(lambda: rm.score_text(queries))
    found = torch.cat([torch.tensor([output["reward"]]) for output in outputs])  # as OpenRLHF's sampler makes it
    filtered = torch.cat([torch.tensor([output["scores"]]) for output in outputs])
    assert found.shape == filtered.shape == (len(pairs),)
    return row("OpenRLHF", version("openrlhf"), [found.numpy(), filtered.numpy()], right, at_once, together)


def verl_batch(pairs: list[tuple[Any, str]], tokenizer: Any, columns: dict[str, list[Any]]) -> tuple[Any, Any]:
    """What verl's rollout hands to its reward loop, and the token ids of each answer. columns: beside the tensors."""
    from verl import DataProto

    answers = [tokenizer(answer, add_special_tokens=False)["input_ids"] for _, answer in pairs]
    width = max(map(len, answers))
    padded = torch.tensor([ids + [0] * (width - len(ids)) for ids in answers])
    mask = torch.tensor([[1] + [1] * len(ids) + [0] * (width - len(ids)) for ids in answers])
    tensors = {"prompts": torch.ones(len(pairs), 1, dtype=torch.long), "responses": padded, "attention_mask": mask}
    held = {name: as_objects(values) for name, values in columns.items()}
    return DataProto.from_dict(tensors=tensors, non_tensors=held), answers


def commit_of(folder: Path) -> str:
    """The commit of a clone."""
    command = ["git", "-C", str(folder), "rev-parse", "--short=9", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def verl_rows(rm: lightrm.RewardModel, pairs: list[tuple[Any, str]], tokenizer: Any) -> dict[str, Any]:
    import verl as package
    from omegaconf import OmegaConf
    from verl.experimental.reward_loop.reward_loop import RewardLoopWorker

    reward = OmegaConf.load(Path(package.__file__).parent / "trainer" / "config" / "reward" / "reward.yaml")
    reward.custom_reward_function = {
        "path": verl.__file__,
        "name": "compute_score",
        "reward_kwargs": {"model": "demo", "options": OPTIONS},
    }
    model = {"path": str(DEMO_FOLDER), "tokenizer_path": None}
    config = OmegaConf.create({"reward": reward, "actor_rollout_ref": {"model": model}})
    batch, answers = verl_batch(
        pairs,
        tokenizer,
        {
            "data_source": ["pairs_dev"] * len(pairs),
            "reward_model": [{"ground_truth": ""} for _ in pairs],
            "extra_info": [{"index": k} for k in range(len(pairs))],
            "tool_extra_fields": [{"raw_prompt": turns} for turns, _ in pairs],
        },
    )

    with asyncio.Runner() as runner:

        async def made() -> RewardLoopWorker:
            return RewardLoopWorker(config)

        worker = runner.run(made())
        runner.run(worker.compute_score_batch(batch[:1]))  # loads the model
        outputs, at_once = timed(lambda: runner.run(worker.compute_score_batch(batch)))
    spoken = [tokenizer.decode(ids, skip_special_tokens=True) for ids in answers]
    right, together = timed(lambda: rm.score_batch([turns for turns, _ in pairs], spoken))
    found = np.asarray([output["reward_score"] for output in outputs], np.float32)
    return row("verl", version("verl"), [found], right, at_once, together)


def slime_rows(rm: lightrm.RewardModel, pairs: list[tuple[Any, str]], folder: Path) -> dict[str, Any]:
    sys.path.insert(0, str(folder))
    from slime.rollout.rm_hub import async_rm, batched_async_rm
    from slime.utils.types import Sample

    path = f"{slime.__name__}.{slime.custom_rm.__name__}"
    arguments = SimpleNamespace(custom_rm_path=path, apply_chat_template=False, rm_type=None)
    samples = [Sample(prompt=turns, response=answer) for turns, answer in pairs]

    async def rollouts() -> list[float]:
        return await asyncio.gather(*(async_rm(arguments, sample) for sample in samples))

    asyncio.run(rollouts())
    found, at_once = timed(lambda: asyncio.run(rollouts()))
    group = asyncio.run(batched_async_rm(arguments, samples))
    right, together = timed(lambda: rm.score_batch([turns for turns, _ in pairs], [answer for _, answer in pairs]))
    return row(
        "slime", commit_of(folder), [np.asarray(one, np.float32) for one in (found, group)], right, at_once, together
    )


def row(
    name: str, of: str, found: list[np.ndarray], right: np.ndarray, at_once: float, together: float
) -> dict[str, Any]:
    return {
        "trainer": name,
        "version": of,
        "answers": len(right),
        "equal": all(one.tobytes() == right.tobytes() for one in found),
        "at once, s": at_once,
        "one call, s": together,
    }


def main() -> None:
    parser = options(__doc__, answers=64)
    parser.add_argument("--slime", type=Path, required=True, help="a clone of slime")
    arguments = parser.parse_args()
    os.environ |= {"LIGHTRM_MODEL": "demo", "LIGHTRM_OPTIONS": json.dumps(OPTIONS)}
    tokenizer = transformers.AutoTokenizer.from_pretrained(DEMO_FOLDER)
    pairs = asked(arguments.data, arguments.answers, tokenizer)
    rm = lightrm.load("demo", **OPTIONS)
    rm.score_batch([turns for turns, _ in pairs], [answer for _, answer in pairs])
    rows = [
        openrlhf_rows(rm, pairs, tokenizer),
        verl_rows(rm, pairs, tokenizer),
        slime_rows(rm, pairs, arguments.slime),
    ]
    write_result("trainers", {**provenance(("torch", "numpy", "transformers")), **this_cpu(), "rows": rows})
    quote("trainers", sentence)


def sentence(result: dict[str, Any]) -> str:
    rows = result["rows"]
    names = ", ".join(f"{r['trainer']} {r['version']}" for r in rows)
    equal = "are lightrm's bit for bit" if all(r["equal"] for r in rows) else "are not all lightrm's"
    return (
        f"The rewards that the trainers' own code got for {rows[0]['answers']} answers of people, all asked for at "
        f"once ({names}), {equal}. {measured_on(result)}\n"
    )


if __name__ == "__main__":
    main()

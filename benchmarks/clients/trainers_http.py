"""Do OpenRLHF, verl and slime get over HTTP what lightrm itself gives?

    python -m benchmarks.clients.trainers_http DATA --slime FOLDER [--answers N]

Runs in the environment of `benchmarks.clients.trainers`. A server scores with the bundled model in 8 bits. The
trainers' own code asks it for all answers at once, and only the policy is replaced, by answers that people wrote:

    OpenRLHF  SingleTurnAgentExecutor.execute, given the address of /get_reward
    verl      RewardLoopWorker.compute_score_batch, as it asks vLLM (/classify) and SGLang (/v1/embeddings)
    slime     async_rm with --rm-type remote_rm, prompts as turns, and as texts with ?templated=true

Writes results/trainers_http.json and the sentence in the documents.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers

import lightrm
from benchmarks.clients.load import server
from benchmarks.clients.trainers import LONGEST, OPTIONS, Spoken, asked, commit_of, templated, verl_batch
from benchmarks.fidelity import options
from benchmarks.record import measured_on, provenance, quote, this_cpu, write_result
from lightrm.checkpoints.hub import DEMO_FOLDER

Pairs = list[tuple[Any, str]]
CHAT = (  # the bundled model has no chat template, which verl asks of a reward model
    "{{ bos_token }}{% for m in messages %}{{ 'Human' if m.role == 'user' else 'Assistant' }}:{{ m.content }}\n\n"
    "{% endfor %}"
)


def openrlhf_found(rm: lightrm.RewardModel, pairs: Pairs, tokenizer: Any, address: str) -> list[np.ndarray]:
    from openrlhf.utils.agent import SingleTurnAgentExecutor

    executor = SingleTurnAgentExecutor(remote_rm_url=[f"http://{address}/get_reward"])
    parameters = SimpleNamespace(max_tokens=LONGEST, logprobs=None)

    async def rollouts() -> list[dict[str, Any]]:
        spoken = [Spoken(tokenizer(answer, add_special_tokens=False)["input_ids"]) for _, answer in pairs]
        calls = (
            executor.execute(templated(turns), "label", parameters, 4 * LONGEST, tokenizer, one)
            for (turns, _), one in zip(pairs, spoken, strict=True)
        )
        return await asyncio.gather(*calls)

    outputs = asyncio.run(rollouts())
    right = rm.score_text([tokenizer.decode(one["observation_tokens"], skip_special_tokens=False) for one in outputs])
    found = torch.cat([torch.tensor([output["reward"]]).flatten() for output in outputs])
    return [found.numpy(), right]


def verl_found(rm: lightrm.RewardModel, pairs: Pairs, tokenizer: Any, address: str, engine: str) -> list[np.ndarray]:
    import verl as package
    from omegaconf import OmegaConf
    from verl.experimental.reward_loop.reward_loop import RewardLoopWorker

    with tempfile.TemporaryDirectory() as folder:
        tokenizer.chat_template = CHAT
        tokenizer.save_pretrained(folder)
        reward = OmegaConf.load(Path(package.__file__).parent / "trainer" / "config" / "reward" / "reward.yaml")
        reward.reward_model.enable, reward.reward_model.model_path = True, folder
        reward.reward_model.rollout.name = engine
        model = {"path": str(DEMO_FOLDER), "tokenizer_path": None}
        config = OmegaConf.create({"reward": reward, "actor_rollout_ref": {"model": model}})
        batch, _ = verl_batch(pairs, tokenizer, {"raw_prompt": [turns for turns, _ in pairs]})

        async def rollouts() -> tuple[list[dict[str, Any]], list[str]]:
            worker = RewardLoopWorker(config, reward_router_address=address)
            outputs = await worker.compute_score_batch(batch)
            return outputs, [await worker._preprocess_reward_inputs(batch[k : k + 1]) for k in range(len(pairs))]

        outputs, texts = asyncio.run(rollouts())
    return [np.asarray([output["reward_score"] for output in outputs], np.float32), rm.score_text(texts)]


def slime_found(rm: lightrm.RewardModel, pairs: Pairs, address: str, as_texts: bool) -> list[np.ndarray]:
    from slime.rollout import rm_hub
    from slime.utils.types import Sample

    url = f"http://{address}/get_reward" + ("?templated=true" if as_texts else "")
    arguments = SimpleNamespace(custom_rm_path=None, rm_type="remote_rm", rm_url=url, reward_key=None)
    prompts = [templated(turns) if as_texts else turns for turns, _ in pairs]
    samples = [Sample(prompt=prompt, response=answer) for prompt, (_, answer) in zip(prompts, pairs, strict=True)]

    async def rollouts() -> list[float]:
        rm_hub._shared_session = None  # of an earlier event loop
        return await asyncio.gather(*(rm_hub.async_rm(arguments, sample) for sample in samples))

    found = np.asarray(asyncio.run(rollouts()), np.float32)
    answers = [answer for _, answer in pairs]
    if as_texts:
        return [found, rm.score_text([prompt + answer for prompt, answer in zip(prompts, answers, strict=True)])]
    return [found, rm.score_batch(prompts, answers)]


def sentence(result: dict[str, Any]) -> str:
    rows = result["rows"]
    wrong = [row["form"] for row in rows if not row["equal"]]
    versions = ", ".join(f"{name} {of}" for name, of in result["trainers"].items())
    said = "each gets the library's scores bit for bit" if not wrong else f"other scores than the library's: {wrong}"
    forms = "; ".join(row["form"] for row in rows)
    return (
        f"The trainers' own code ({versions}) asked a server for {rows[0]['answers']} answers at once, in these forms: "
        f"{forms}. {said[0].upper()}{said[1:]}. {measured_on(result)}\n"
    )


def main() -> None:
    parser = options(__doc__, answers=64)
    parser.add_argument("--slime", type=Path, required=True, help="a clone of slime")
    arguments = parser.parse_args()
    sys.path.insert(0, str(arguments.slime))
    tokenizer = transformers.AutoTokenizer.from_pretrained(DEMO_FOLDER)
    pairs = asked(arguments.data, arguments.answers, tokenizer)
    rm = lightrm.load("demo", **OPTIONS)
    with server("--scheme", OPTIONS["scheme"]) as port:
        address = f"127.0.0.1:{port}"
        found = {
            "OpenRLHF, /get_reward": openrlhf_found(rm, pairs, tokenizer, address),
            "verl as of vLLM, /classify": verl_found(rm, pairs, tokenizer, address, "vllm"),
            "verl as of SGLang, /v1/embeddings": verl_found(rm, pairs, tokenizer, address, "sglang"),
            "slime, prompts as turns": slime_found(rm, pairs, address, False),
            "slime, ?templated=true": slime_found(rm, pairs, address, True),
        }
    rows = [
        {"form": form, "answers": len(pairs), "equal": ours.shape == right.shape and ours.tobytes() == right.tobytes()}
        for form, (ours, right) in found.items()
    ]
    trainers = {"OpenRLHF": version("openrlhf"), "verl": version("verl"), "slime": commit_of(arguments.slime)}
    result = {**provenance(("torch", "starlette", "uvicorn")), **this_cpu(), "trainers": trainers, "rows": rows}
    write_result("trainers_http", result)
    quote("trainers_http", sentence)


if __name__ == "__main__":
    main()

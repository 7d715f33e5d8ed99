"""A server on loopback: each caller's own form, what waits gathered, neighbours unharmed."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lightrm
from lightrm.errors import InputError
from lightrm.serving.server import warm_up
from tests.serving import Fake, ask, serving, until
from tests.test_process_models import published

PROMPT = "How long do I boil an egg?"
ANSWERS = ["Ten minutes, in water.", "No.", "我不知道。"]


@pytest.fixture(scope="module")
def demo() -> lightrm.RewardModel:
    return lightrm.load("demo", scheme="w8a8")  # whose scores are the same in any batch


@pytest.fixture(scope="module")
def port(demo: lightrm.RewardModel) -> Iterator[int]:
    with serving(demo) as found:
        yield found


def found(port: int, path: str, body: Any) -> Any:
    status, answer, headers = ask(port, path, body)
    assert status == 200, answer
    assert headers["content-type" if "content-type" in headers else "Content-Type"] == "application/json"
    return answer


def test_our_own_form(demo: lightrm.RewardModel, port: int) -> None:
    expected = demo.score(PROMPT, ANSWERS).tolist()
    turns = [{"role": "user", "content": PROMPT}]
    for prompt in (PROMPT, turns):
        answer = found(port, "/score", {"prompt": prompt, "responses": ANSWERS, "model": "any"})
        assert answer == {"model": "a model", "scores": expected}
    said = {"role": "assistant", "content": ANSWERS[0]}
    answer = found(port, "/v1/score", {"prompt": PROMPT, "responses": [said], "system": "Be brief."})
    assert answer["scores"] == demo.score(PROMPT, ANSWERS[:1], system="Be brief.").tolist()
    assert found(port, "/score", {"prompt": PROMPT, "responses": []})["scores"] == []


def test_the_forms_of_vllm(demo: lightrm.RewardModel, port: int) -> None:
    expected = demo.score(PROMPT, ANSWERS).tolist()
    for names in (("queries", "documents"), ("text_1", "text_2")):
        answer = found(port, "/score", dict(zip(names, (PROMPT, ANSWERS), strict=True)))
        assert answer["data"] == [{"index": k, "object": "score", "score": expected[k]} for k in range(3)]
        assert answer["object"] == "list"
    answer = found(port, "/score", {"queries": [PROMPT, "Hi"], "documents": ANSWERS[:2], "use_activation": True})
    raw = demo.score_batch([PROMPT, "Hi"], ANSWERS[:2])
    np.testing.assert_allclose([one["score"] for one in answer["data"]], 1 / (1 + np.exp(-raw)), rtol=1e-6)
    order = sorted(range(3), key=lambda k: -expected[k])
    for path in ("/rerank", "/v1/rerank", "/v2/rerank"):
        documents = [ANSWERS[0], {"text": ANSWERS[1]}, ANSWERS[2]]
        answer = found(port, path, {"query": PROMPT, "documents": documents, "top_n": 2})
        ranked = [{"index": k, "document": {"text": ANSWERS[k]}, "relevance_score": expected[k]} for k in order[:2]]
        assert answer["results"] == ranked
        assert (set(answer), answer["model"]) == ({"id", "model", "results"}, "a model")
    answer = found(port, "/rerank", {"query": PROMPT, "documents": ANSWERS, "return_documents": False, "top_n": 0})
    assert [one["index"] for one in answer["results"]] == order
    assert "document" not in answer["results"][0]


def test_the_form_of_text_embeddings_inference(demo: lightrm.RewardModel, port: int) -> None:
    raw = demo.score(PROMPT, ANSWERS)
    order = np.argsort(-raw).tolist()
    answer = found(port, "/rerank", {"query": PROMPT, "texts": ANSWERS, "raw_scores": True, "return_text": True})
    assert answer == [{"index": k, "score": float(raw[k]), "text": ANSWERS[k]} for k in order]
    answer = found(port, "/rerank", {"query": PROMPT, "texts": ANSWERS})
    assert [one["index"] for one in answer] == order
    assert set(answer[0]) == {"index", "score"}
    np.testing.assert_allclose([one["score"] for one in answer], 1 / (1 + np.exp(-raw[order])), rtol=1e-6)


def test_the_forms_of_trainers(demo: lightrm.RewardModel, port: int) -> None:
    """OpenRLHF and verl send texts that are templated; slime sends one sample, and reads a bare number."""
    texts = [demo.explain(PROMPT, answer).text for answer in ANSWERS]
    expected = demo.score_text(texts).tolist()
    answer = found(port, "/get_reward", {"query": texts, "prompts": [PROMPT] * 3, "labels": [None] * 3})
    assert answer == {"rewards": expected, "scores": expected, "extra_logs": {}}
    answer = found(port, "/get_reward", {"query": texts[0]})
    assert answer["rewards"] == expected[:1]
    answer = found(port, "/classify", {"model": "m", "input": texts[0], "use_activation": False})
    assert answer["data"][-1]["probs"][-1] == expected[0]
    assert answer["data"][0] == {"index": 0, "label": "LABEL_0", "probs": expected[:1], "num_classes": 1}
    answer = found(port, "/v1/embeddings", {"model": "m", "input": texts})
    assert [one["embedding"] for one in answer["data"]] == [[score] for score in expected]
    assert found(port, "/get_reward", {"prompt": PROMPT, "response": ANSWERS[1], "label": "x"}) == expected[1]
    half = len(texts[1]) // 2
    sample = {"prompt": texts[1][:half], "response": texts[1][half:], "label": None}
    assert found(port, "/get_reward?templated=true", sample) == expected[1]


def test_what_needs_no_model(port: int) -> None:
    assert ask(port, "/health")[:2] == (200, {"status": "ok"})
    models = ask(port, "/v1/models")[1]
    assert (models["object"], models["data"][0]["id"], models["data"][0]["object"]) == ("list", "a model", "model")
    ask(port, "/score", {"prompt": PROMPT, "responses": ANSWERS})
    counts = ask(port, "/metrics")[1]
    assert 'lightrm_requests_total{path="/score",status="200"}' in counts
    assert "lightrm_texts_together_sum" in counts
    assert "lightrm_texts_waiting 0.0" in counts


def test_the_document_holds_what_it_names(port: int) -> None:
    described = ask(port, "/openapi.json")[1]
    schemas = described["components"]["schemas"]

    def references(part: Any) -> Iterator[str]:
        if isinstance(part, dict):
            yield from [part["$ref"]] if "$ref" in part else []
            for inner in part.values():
                yield from references(inner)
        elif isinstance(part, list):
            for inner in part:
                yield from references(inner)

    named = {name.removeprefix("#/components/schemas/") for name in references(described)}
    assert named <= set(schemas)
    assert {"ScoreAsked", "PairsAsked", "RerankAsked", "TextsAsked", "RewardsFound", "ErrorFound"} <= named
    for path, methods in described["paths"].items():
        for method in methods:
            assert ask(port, path, None if method == "get" else {})[0] == (200 if method == "get" else 400), path


def test_what_waits_is_scored_together() -> None:
    rm = Fake()
    rm.gate.clear()
    texts = [f"answer {'x' * k}" for k in range(60)]
    with serving(rm) as port, ThreadPoolExecutor(61) as pool:
        first = pool.submit(ask, port, "/score", {"prompt": "p", "responses": ["first"]})
        rm.entered.wait(10)  # the model is busy: everything else waits
        asked = [
            pool.submit(ask, port, "/score", {"prompt": f"p{k % 3}", "responses": [t]}) for k, t in enumerate(texts)
        ]
        until(lambda: "lightrm_texts_waiting 60.0" in ask(port, "/metrics")[1])
        rm.gate.set()
        scores = [one.result()[1]["scores"] for one in asked]
        assert first.result()[1]["scores"] == [5]
    assert scores == [[len(text)] for text in texts]
    assert [len(call) for call in rm.calls] == [1, 60]
    lengths = [len(text) % 3 for text in rm.calls[1]]  # the prompts took turns: equal ones come side by side
    assert sum(a != b for a, b in pairwise(lengths)) == 2


def test_a_text_that_is_refused_harms_no_neighbour(caplog: pytest.LogCaptureFixture) -> None:
    rm = Fake()
    rm.gate.clear()
    texts = [f"{k} crash" if k == 11 else f"{k} refused" if k % 10 == 3 else f"{k}" for k in range(40)]
    with serving(rm) as port, ThreadPoolExecutor(41) as pool:
        pool.submit(ask, port, "/score", {"prompt": "p", "responses": ["first"]})
        rm.entered.wait(10)
        asked = [pool.submit(ask, port, "/score", {"prompt": "p", "responses": [text]}) for text in texts]
        until(lambda: "lightrm_texts_waiting 40.0" in ask(port, "/metrics")[1])
        rm.gate.set()
        answers = [one.result()[:2] for one in asked]
    for text, (status, answer) in zip(texts, answers, strict=True):
        if "crash" in text:
            assert (status, answer["error"]["type"]) == (500, "InternalError")
        elif "refused" in text:
            assert (status, answer["error"]) == (400, {"type": "InputError", "message": "a refused text"})
        else:
            assert (status, answer["scores"]) == (200, [len(text)])
    assert sorted(text for call in rm.calls[1:] for text in call) == sorted(t for t in texts if t.isdigit()), (
        "each once"
    )
    assert "RuntimeError in a request" in caplog.text
    assert "11 crash" not in caplog.text


def test_a_client_that_hangs_up_costs_nothing() -> None:
    rm = Fake()
    rm.gate.clear()
    with serving(rm) as port, ThreadPoolExecutor(2) as pool:
        first = pool.submit(ask, port, "/score", {"prompt": "p", "responses": ["first"]})
        rm.entered.wait(10)
        body = b'{"prompt": "p", "responses": ["never scored"]}'
        head = (
            f"POST /score HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        )
        with socket.create_connection(("127.0.0.1", port)) as gone:
            gone.sendall(head.encode() + b"\r\n\r\n" + body)
            until(lambda: "lightrm_texts_waiting 1.0" in ask(port, "/metrics")[1])
        until(lambda: 'lightrm_requests_total{path="/score",status="499"} 1.0' in ask(port, "/metrics")[1])
        rm.gate.set()
        assert first.result()[0] == 200
        assert ask(port, "/score", {"prompt": "p", "responses": ["next"]})[0] == 200
    assert rm.calls == [["first"], ["next"]]


def test_a_model_without_one_score_is_refused_before_it_is_asked(tmp_path: Path) -> None:
    model = published("skywork", tmp_path)
    with pytest.raises(InputError, match="reduce"):
        warm_up(lightrm.load(model.folder, **model.load))
    rm = lightrm.load(model.folder, reduce="min", **model.load)
    warm_up(rm)
    with serving(rm) as port:
        answer = ask(port, "/score", {"prompt": "6 * 7?", "responses": ["6 * 7 = 42.\n\n42", "41"]})[1]
        assert answer["scores"] == rm.score("6 * 7?", ["6 * 7 = 42.\n\n42", "41"]).tolist()
        status, answer, _ = ask(port, "/classify", {"input": "a text"})
        assert (status, "a process reward model scores the steps" in answer["error"]["message"]) == (400, True)


def test_sigterm_finishes_what_was_accepted(tmp_path: Path) -> None:
    """The command itself, in a process: it says where it listens, scores, and ends when it is told to."""
    program = "from lightrm.cli import main; main()"
    command = [sys.executable, "-c", program, "serve", "demo", "--port", "0", "--scheme", "fp32"]
    environment = {name: value for name, value in os.environ.items() if name != "LIGHTRM_API_KEY"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        assert "demo on http://127.0.0.1:" in line
        port = int(line.rpartition(":")[2])
        assert ask(port, "/health")[0] == 200
        answers: list[int] = []
        many = {"prompt": PROMPT, "responses": ANSWERS * 300}
        asked = threading.Thread(target=lambda: answers.append(ask(port, "/score", many)[0]))
        asked.start()
        until(lambda: ask(port, "/metrics")[1].count("lightrm_texts_together_bucket") and together(port) == 900)
        process.send_signal(signal.SIGTERM)
        asked.join(30)
        assert answers == [200]
        assert process.wait(20) == -signal.SIGTERM, "as a process ends that it stops"
        log = process.stderr.read()
    assert "POST /score 200" in log
    assert "boil" not in log
    with pytest.raises(ConnectionRefusedError):
        http.client.HTTPConnection("127.0.0.1", port, timeout=2).connect()


def together(port: int) -> float:
    """How many texts have gone to the model."""
    line = next(one for one in ask(port, "/metrics")[1].splitlines() if one.startswith("lightrm_texts_together_sum"))
    return float(line.split()[1])

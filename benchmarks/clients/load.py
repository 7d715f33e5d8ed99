"""A server under load on loopback: is an answer lost or swapped, and what does HTTP cost beside a call of the library?

    python -m benchmarks.clients.load [--requests N]

Starts `lightrm serve demo --scheme w8a8` in a process of its own, whose scores are the same bit for bit in any batch:
each answer is compared with what the library gives that text. 64 clients post one answer each, over connections of
their own, and the next as soon as the first is answered. Meanwhile other clients are slow, too large, malformed, or
hang up. Then 64 single posts at once are measured against one call of 64, by HTTP and of the library, in turn. Writes
results/load.json and the table in the documents.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import lightrm
from benchmarks.record import measured_on, provenance, quote, this_cpu, write_result

CLIENTS, SCHEME, ROUNDS = 64, "w8a8", 15
LONGER = (1, 8)  # an answer's words said again and again
PROMPTS = ("How do I boil an egg?", "怎样才能睡得更好？", "Why is the sky blue?", "Write a short poem about rain.")
WORDS = [
    "put",
    "the",
    "egg",
    "in",
    "hot",
    "water",
    "for",
    "ten",
    "minutes",
    "then",
    "cool",
    "it",
    "and",
    "peel",
    "it",
    "under",
    "a",
    "cold",
    "stream",
    "of",
    "water",
]
HEAD = "POST /score HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n"
Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@contextlib.contextmanager
def server(*options: str) -> Iterator[int]:
    """Run `lightrm serve demo` in a process, and yield its port."""
    program = "from lightrm.cli import main; main()"
    command = [sys.executable, "-c", program, "serve", "demo", "--port", "0", *options]
    environment = {name: value for name, value in os.environ.items() if name != "LIGHTRM_API_KEY"}
    with tempfile.TemporaryFile("w+") as log, subprocess.Popen(command, stderr=log, env=environment) as process:
        try:
            line = ""
            while "on http://" not in line:
                time.sleep(0.1)
                assert process.poll() is None, line
                log.seek(0)
                line = next((one for one in log if "on http://" in one), "")
            yield int(line.rpartition(":")[2])
        finally:
            process.terminate()
            process.wait(60)


def drawn(count: int) -> list[tuple[str, str]]:
    """Prompts with answers, no two alike."""
    draw = random.Random(64)
    pairs = []
    for k in range(count):
        words = draw.choices(WORDS, k=draw.randint(3, 40))
        pairs.append((draw.choice(PROMPTS), f"{k}: {' '.join(words)}."))
    return pairs


def request(prompt: str, responses: list[str]) -> bytes:
    body = json.dumps({"prompt": prompt, "responses": responses}).encode()
    return HEAD.format(len(body)).encode() + body


async def asked(connection: Connection, data: bytes) -> tuple[int, Any]:
    reader, writer = connection
    writer.write(data)
    lines = (await reader.readuntil(b"\r\n\r\n")).decode().lower().split("\r\n")
    length = next(int(line.partition(":")[2]) for line in lines if line.startswith("content-length"))
    return int(lines[0].split()[1]), json.loads(await reader.readexactly(length))


async def client(port: int, work: Any, expected: list[float], seconds: list[float], found: Counter[str]) -> None:
    """Post one answer after the other until there are none left."""
    connection = await asyncio.open_connection("127.0.0.1", port)
    for k, (prompt, answer) in work:
        started = time.perf_counter()
        status, body = await asked(connection, request(prompt, [answer]))
        seconds.append(time.perf_counter() - started)
        found["answered" if status == 200 else f"status {status}"] += 1
        found["right"] += status == 200 and body["scores"] == [expected[k]]
    connection[1].close()


async def disturb(port: int, done: asyncio.Event, found: Counter[str]) -> None:
    """Be a bad client in five ways, until the good ones are done."""
    long = request("p", ["x" * 9_000_000])
    cases = {
        "malformed": HEAD.format(5).encode() + b"{nope",
        "too large": long,
        "no request at all": b"\x16\x03\x01\xff" * 9,
        "hung up": request("How do I boil an egg?", ["Never to be read."]),
        "slow": HEAD.format(900).encode() + b"{",
    }
    for kind, data in itertools.cycle(cases.items()):
        if done.is_set():
            return
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(data)
            if kind in ("malformed", "too large", "no request at all"):
                line = await asyncio.wait_for(reader.readline(), 20)
                found[f"{kind}: {line.decode().split()[1] if line else 'closed'}"] += 1
            else:
                await asyncio.sleep(0.02)
                found[kind] += 1
        except OSError as error:
            found[f"{kind}: {type(error).__name__}"] += 1
        writer.close()
        await asyncio.sleep(0.05)


async def under_load(port: int, pairs: list[tuple[str, str]], expected: list[float]) -> dict[str, Any]:
    seconds: list[float] = []
    good: Counter[str] = Counter()
    bad: Counter[str] = Counter()
    done, work = asyncio.Event(), enumerate(pairs)
    others = asyncio.create_task(disturb(port, done, bad))
    started = time.perf_counter()
    await asyncio.gather(*(client(port, work, expected, seconds, good) for _ in range(CLIENTS)))
    took = time.perf_counter() - started
    done.set()
    await others
    cuts = statistics.quantiles(seconds, n=100)
    return {
        "requests": len(pairs), "answers": dict(good), "bad clients": dict(sorted(bad.items())), "seconds": took,
        "p50 ms": 1000 * cuts[49], "p99 ms": 1000 * cuts[98],
    }  # fmt: skip


async def at_once(port: int, rm: lightrm.RewardModel, longer: int) -> dict[str, Any]:
    """Measure 64 answers to a prompt: one call of the library, one post, 64 posts at once; in turn. longer: how many
    times as long as those above."""
    prompt, answers = PROMPTS[0], [" ".join([answer] * longer) for _, answer in drawn(CLIENTS)]
    tokens = sum(map(len, rm.encode([prompt] * CLIENTS, answers))) / CLIENTS
    connections = [await asyncio.open_connection("127.0.0.1", port) for _ in range(CLIENTS)]
    single, whole = [request(prompt, [answer]) for answer in answers], request(prompt, answers)
    took: dict[str, list[float]] = {"library": [], "one post": [], "64 posts": []}
    for k in range(ROUNDS + 2):
        marks = [time.perf_counter()]
        rm.score(prompt, answers)
        marks.append(time.perf_counter())
        await asked(connections[0], whole)
        marks.append(time.perf_counter())
        await asyncio.gather(*map(asked, connections, single))
        marks.append(time.perf_counter())
        if k >= 2:  # the first two warm up
            for name, (before, after) in zip(took, itertools.pairwise(marks), strict=True):
                took[name].append(after - before)
    return (
        {"tokens": tokens}
        | {f"{name} ms": 1000 * statistics.median(values) for name, values in took.items()}
        | {
            "64 posts / one post": statistics.median(
                b / a for a, b in zip(took["one post"], took["64 posts"], strict=True)
            ),
            "one post / library": statistics.median(
                b / a for a, b in zip(took["library"], took["one post"], strict=True)
            ),
        }
    )


def seconds_of(rm: lightrm.RewardModel, prompts: list[str], answers: list[str]) -> float:
    """Measure one call of the library with all texts. It runs before and after the server's turn, and the shorter one
    counts: the machine may do other work meanwhile."""
    started = time.perf_counter()
    rm.score_batch(prompts, answers)
    return time.perf_counter() - started


def table(result: dict[str, Any]) -> str:
    load, once = result["load"], result["at once"]
    lines = [
        "| | |", "| --- | ---: |",
        f"| requests from {result['clients']} clients, one answer each | {load['requests']:,} |",
        f"| lost, refused or wrong | {load['requests'] - load['answers']['right']} |",
        f"| the library alone, in one call of all texts, takes | {load['library / server']:.0%} of that time |",
        f"| answers a second | {load['requests'] / load['seconds']:.0f} |",
        f"| a request's time: median, 99th percentile | {load['p50 ms']:.0f} ms, {load['p99 ms']:.0f} ms |",
        *(
            f"| 64 posts at once of {one['tokens']:.0f} tokens each, against one post of all | "
            f"{one['64 posts / one post']:.2f} x |"
            for one in once
        ),
        *(
            f"| one post of 64 answers of {one['tokens']:.0f} tokens, against the library's call | "
            f"{one['one post / library']:.2f} x |"
            for one in once
        ),
    ]  # fmt: skip
    bad = ", ".join(f"{kind} ({count})" for kind, count in load["bad clients"].items())
    return "\n".join([*lines, "", f"Meanwhile there were bad clients: {bad}. {measured_on(result)}"]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    pairs = drawn(parser.parse_args().requests)
    rm = lightrm.load("demo", scheme=SCHEME)
    prompts, answers = [prompt for prompt, _ in pairs], [answer for _, answer in pairs]
    expected = rm.score_batch(prompts, answers).tolist()
    library = [seconds_of(rm, prompts, answers)]
    with server("--scheme", SCHEME) as port:
        load = asyncio.run(under_load(port, pairs, expected))
        library.append(seconds_of(rm, prompts, answers))
        load["library seconds"] = library
        load["library / server"] = min(library) / load["seconds"]
        once = [asyncio.run(at_once(port, rm, longer)) for longer in LONGER]
    versions = provenance(("torch", "numba", "starlette", "uvicorn", "pydantic"))
    result = {**versions, **this_cpu(), "clients": CLIENTS, "scheme": SCHEME, "load": load, "at once": once}
    write_result("load", result)
    quote("load", table)


if __name__ == "__main__":
    main()

"""Reading the preference data and the text corpus, leaving out what may not be trained on.

Left out of training: every record under CC-BY-SA-4.0, every corpus document that comes from such a record,
and every document that holds a held-out prompt.
"""

from __future__ import annotations

import gzip
import json
import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from lightrm.data.record_forms import dialogue_turns

DOCUMENT_BREAK = "<|doc|>"
# The instruction wrapper of CBBQ, the one CC-BY-SA-4.0 source: it marks its documents in the corpus.
SHARE_ALIKE_MARK = "可选回答："


@dataclass(frozen=True, slots=True)
class Pair:
    """One prompt as Ziya's template wants it, with the preferred and the other answer."""

    prompt: str
    chosen: str
    rejected: str
    lang: str
    source: str


def read_jsonl(path: Path) -> list[dict]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def ziya_prompt(record: dict) -> str:
    """The text before the answer: `Human:{q}\\n\\nAssistant:`, one such block a turn."""
    if record["format"] != "hh":
        return f"Human:{record['prompt'].strip()}\n\nAssistant:"
    speaker = {"user": "Human", "assistant": "Assistant"}
    turns = dialogue_turns(record["prompt"])
    if turns[0]["role"] == "system":  # Ziya knows no system turn: it opens the first user turn
        system = turns.pop(0)["content"]
        turns[0]["content"] = f"{system}\n{turns[0]['content']}"
    return "\n\n".join(f"{speaker[t['role']]}:{t['content']}" for t in turns) + "\n\nAssistant:"


def read_pairs(path: Path, *, share_alike: bool = False) -> list[Pair]:
    """Pairs of one file; `share_alike=True` keeps CC-BY-SA records, for evaluation only."""
    return [
        Pair(ziya_prompt(r), r["chosen"].strip(), r["rejected"].strip(), r["lang"], r["source"])
        for r in read_jsonl(path)
        if (share_alike or "CC-BY-SA" not in r["license"]) and r["chosen"].strip() and r["rejected"].strip()
    ]


def squeeze(text: str) -> str:
    return re.sub(r"\s+", "", text)


def read_corpus(data: Path) -> list[str]:
    """Corpus documents free of share-alike text and of any held-out prompt."""
    held_out = {
        squeeze(record["prompt"])
        for name in ("pairs_dev.jsonl.gz", "lists_dev.jsonl.gz")
        for record in read_jsonl(data / name)
    }
    with gzip.open(data / "corpus_zh_en.txt.gz", "rt", encoding="utf-8") as file:
        documents = [text.strip() for text in file.read().split(DOCUMENT_BREAK)]
    kept = []
    for document in documents:
        if not document or SHARE_ALIKE_MARK in document:
            continue
        squeezed = squeeze(document)
        if any(prompt in squeezed for prompt in held_out if len(prompt) >= 8 and prompt[:8] in squeezed):
            continue
        if any(squeeze(line) in held_out for line in document.split("\n")[:1]):
            continue
        kept.append(document)
    return kept


def is_chinese(text: str) -> bool:
    return len(re.findall(r"[\u4e00-\u9fff]", text)) > 0.2 * len(text)


def neighbours(documents: list[str]) -> list[tuple[str, str, str]]:
    """(a paragraph as a prompt, the next one as its answer, lang): prose whose topic goes on, for relevance."""
    found = []
    for document in documents:
        paragraphs = [re.sub(r"\s*\n\s*", " ", text).strip() for text in document.split("\n\n")]
        prose = [text if is_prose(text) else None for text in paragraphs]
        for text, following in pairwise(prose):
            if text and following:
                found.append((f"Human:{text}\n\nAssistant:", following, "zh" if is_chinese(following) else "en"))
    return found


def is_prose(text: str) -> bool:
    letters = sum(c.isalpha() or c.isspace() for c in text)
    return 40 <= len(text) <= 250 and text[-1] in ".。!?！？" and letters > 0.85 * len(text)


def questions_and_answers(documents: list[str]) -> list[tuple[str, str, str]]:
    """(prompt in Ziya's template, answer, lang) of documents that open with one short question or request."""
    found = []
    for document in documents:
        head, _, rest = document.partition("\n")
        answer = rest.strip().split("\n\n")[0].strip()
        if document.startswith(("Human:", "#")) or not 4 <= len(head) <= 300 or len(answer) < 8:
            continue
        found.append((f"Human:{head.strip()}\n\nAssistant:", answer, "zh" if is_chinese(document) else "en"))
    return found

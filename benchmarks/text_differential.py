"""Is the text side transformers', token for token? Thousands of tokenizer folders and conversations, drawn at random.

    python -m benchmarks.text_differential [--draws 5000] [--show]

`tests/test_text_differential.py` holds a few hundred draws to the same rules. Every kind of tokenizer file, class,
flag, template feature and text is drawn by `tests/tokenizer_draws.py` and `tests/chat_draws.py`;
`tests/text_parity.py` compares.
Writes results/text_differential.json and the sentence in the documents; ends with status 1 if a single comparison
fails.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.record import provenance, quote, write_result

RULES = {
    "chat": "chats, special tokens parsed",
    "text": "plain texts, special tokens parsed",
    "asleep": "chats without a control token in what users wrote, as by default",
    "awake": "chats with control tokens in what users wrote, as by default",
}
FIRST_BATCH = 1000  # the tests draw the batches before


def sentence(result: Mapping[str, Any]) -> str:
    total, faults = sum(result["compared"].values()), sum(result["faults"].values())
    return (
        f"Over {result['folders']:,} drawn tokenizer folders, {total:,} chats and texts were compared with "
        f"transformers {result['versions']['transformers']}: {faults or 'none'} differed. Of "
        f"{result['compared']['awake']:,} in which users spell control tokens, {result['refused by name']['awake']} "
        f"were refused, because the template looks at these tokens ({result['date']}, commit {result['commit']}).\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=5000)
    parser.add_argument("--show", action="store_true", help="print each fault, and write nothing")
    options = parser.parse_args()
    from hypothesis import strategies as st

    from tests.text_parity import Finding, drawn, parsed_specials, protected
    from tests.tokenizer_draws import Folder, folders

    seen: set[int] = set()
    compared, faults, made, refused = Counter[str](), Counter[str](), Counter[str](), Counter[str]()
    classes = Counter[str]()
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:

        def one(data: st.DataObject) -> None:
            folder: Folder = data.draw(folders())
            path = folder.write(Path(tempfile.mkdtemp(dir=scratch)))  # a draw that was given up has left its files
            seen.add(hash(tuple(folder.files.items())))
            for check in (parsed_specials, protected):
                for finding in check(folder, path, data.draw):
                    count(folder, finding)

        def count(folder: Folder, finding: Finding) -> None:
            compared[finding.rule] += 1
            made[finding.rule] += finding.made
            classes[finding.class_name] += 1
            refused[finding.rule] += finding.refused
            faults[finding.rule] += finding.fault is not None
            if finding.fault is not None and options.show:
                print(f"{finding}\n  {folder}\n")

        drawn(one, range(FIRST_BATCH, FIRST_BATCH + options.draws // 10))
    result = {
        **provenance(("transformers", "tokenizers", "sentencepiece", "jinja2", "hypothesis")),
        "folders": len(seen),
        "rules": RULES,
        "compared": dict(compared),
        "transformers gave ids": dict(made),
        "refused by name": dict(refused),
        "faults": {rule: faults[rule] for rule in RULES},
        "transformers' classes": dict(classes.most_common()),
        "seconds": round(time.monotonic() - begun),
    }
    if options.show:
        print(result)
    else:
        write_result("text_differential", result)
        quote("text_differential", sentence)
    sys.exit(1 if faults.total() else 0)


if __name__ == "__main__":
    main()

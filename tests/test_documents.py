"""Every block of code that a reader is shown runs and gives what stands below it; figures in words are the tables."""

from __future__ import annotations

import contextlib
import doctest
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import SkipTest

import click
import pytest
import torch
from click.testing import CliRunner
from sybil import Document, Example, Sybil
from sybil.document import PythonDocStringDocument
from sybil.evaluators.doctest import DocTestEvaluator
from sybil.example import SybilFailure
from sybil.parsers.abstract.doctest import DocTestStringParser
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser, SkipParser

import lightrm
from benchmarks.record import ROOT, read_result
from lightrm.architecture import Alibi, Architecture, Rope
from lightrm.checkpoints.detect import LAYOUTS
from lightrm.checkpoints.hub import DEMO_FOLDER
from lightrm.cli import main
from lightrm.engine.memory import weight_bytes
from lightrm.measure.model_card import read_card
from lightrm.schemes.grammar import parse_scheme
from lightrm.serving import server
from tests.test_exporting import CONFIG, HEAD, WIDTH, body
from tests.zoo import Specimen, normal, write_tokenizer

DOCUMENTS = sorted(
    path
    for path in ROOT.rglob("*.md")
    if not any(part.startswith(".") or part == "build" for part in path.relative_to(ROOT).parts)
)
PAGES = sorted((ROOT / "docs").glob("*.md"))
NUMBER = re.compile(r"-?\d+\.\d*")
NOT_RUN = {  # the only blocks that are not, and why
    "README.md": ["it installs; `make test` on a bare machine does the same"],
    "docs/data.md": ["it needs the network"],
    "docs/getting-started.md": [
        "it installs; `make test` on a bare machine does the same",
        "it installs; `benchmarks/releases.py` does the same",
        "it writes to the shell's own files",
    ],
    "docs/kernels.md": ["it compiles for half a minute", "it needs a card"],
    "docs/ray.md": ["it needs Ray and files of one's own; benchmarks/clients/ray_data.py runs the same"] * 2,
    "docs/serving.md": ["it asks a running server", "it listens to others"],
    "docs/trainers.md": ["it trains a language model; tests/test_trl.py does the same with a tiny one"],
}
PAIRS = [
    {"prompt": "How do I make tea?", "chosen": "Boil water and pour it over the leaves.", "rejected": "Boil water and"},
    {"prompt": "Why is the sky blue?", "chosen": "Air scatters blue light most.", "rejected": "Air scatters blue"},
    {"prompt": "怎样才能睡得更好？", "chosen": "睡前不看手机，少喝咖啡。", "rejected": "睡前不看手机，少喝"},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that every command takes, with its card."""
    folder = tmp_path_factory.mktemp("model")
    weights = body() | {"value_head.weight": HEAD, "model.embed_tokens.weight": normal(400, WIDTH, seed=0)}
    Specimen({"model.safetensors": weights}, CONFIG | {"vocab_size": 400}).write(folder)
    write_tokenizer(folder)
    (reward,) = lightrm.load(folder).score("what?", ["it is"]).round(2)
    (folder / "README.md").write_text(f"```\nquery = 'what?'\nresponse = ['it is']\n# reward: {reward}\n```\n")
    return folder


class Rounded(doctest.OutputChecker):
    """Figures are as far from those shown as their last digit at most: another CPU or card rounds otherwise."""

    def check_output(self, want: str, got: str, optionflags: int) -> bool:
        shown, found = NUMBER.findall(want), NUMBER.findall(got)
        if len(shown) == len(found):
            for a, b in zip(shown, found, strict=True):
                if abs(float(a) - float(b)) <= 10.0 ** -len(a.partition(".")[2]) * 1.01:
                    got = got.replace(b, a, 1)
        return super().check_output(" ".join(want.split()), " ".join(got.split()), optionflags)


def commands(text: str) -> Iterator[list[str]]:
    for line in text.splitlines():
        if words := shlex.split(line, comments=True):
            yield words


def run_commands(example: Example) -> None:
    """Each line in a folder of its own, in which MODEL is a tiny model with a card, and the files that are read are."""
    for number, words in enumerate(commands(example.parsed)):
        if words[0] == "make":
            subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, check=True, capture_output=True)
            continue
        assert words[0] == "lightrm", f"nobody runs {words[0]}"
        folder = example.namespace["folder"] / f"{example.line}-{number}"
        folder.mkdir()
        shutil.copytree(example.namespace["model"], folder / "MODEL")
        (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, PAIRS)))
        shutil.copy(folder / "pairs.jsonl", folder / "texts.jsonl")
        answers = [{"prompt": p["prompt"], "responses": [p["chosen"], p["rejected"]]} for p in PAIRS]
        (folder / "answers.jsonl").write_text("\n".join(map(json.dumps, answers)))
        with pytest.MonkeyPatch.context() as patched:
            patched.chdir(folder)
            patched.setattr(server, "bound", lambda host, port: contextlib.nullcontext())
            patched.setattr(server, "run", lambda app, place, seconds, listening: listening(8000))  # and no more
            found = CliRunner().invoke(main, words[1:])
        assert found.exit_code == 0, f"{' '.join(words)}: {found.output} {found.exception!r}"


DOCTESTS = DocTestStringParser(DocTestEvaluator())
DOCTESTS.evaluator.runner = doctest.DocTestRunner(Rounded())
PYTHON = PythonCodeBlockParser()
PYTHON.doctest_parser = DOCTESTS
SKIPS = SkipParser()
SYBIL = Sybil(parsers=[PYTHON, CodeBlockParser("sh", run_commands), SKIPS], encoding="utf-8")


def evaluated(document: Document, folder: Path, model: Path) -> tuple[int, list[str]]:
    """How many examples ran, and why the others did not."""
    ran, skipped = 0, []
    document.namespace.update(folder=folder, model=model)
    for example in document.examples():
        try:
            example.evaluate()
        except SkipTest as reason:
            skipped.append(str(reason))
        else:
            ran += example.region.evaluator is not SKIPS.skipper
    return ran, skipped


@pytest.mark.usefixtures("few_draws")
@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_block_runs(path: Path, model: Path, tmp_path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    languages = re.findall(r"^```(.*)$", text, re.MULTILINE)[::2]
    assert set(languages) <= {"python", "sh", ""}, "a block that nobody runs"  # without a language: the tree of files
    ran, skipped = evaluated(SYBIL.parse(path), tmp_path, model)
    assert skipped == NOT_RUN.get(path.relative_to(ROOT).as_posix(), [])
    assert ran >= sum(map(bool, languages)) - len(skipped)


def test_every_docstring_runs(model: Path, tmp_path: Path) -> None:
    total = 0
    for path in sorted((ROOT / "lightrm").rglob("*.py")):
        for _, _, text in PythonDocStringDocument.extract_docstrings(path.read_text(encoding="utf-8")):
            document = Document(text, str(path))
            for region in DOCTESTS(text, str(path)):
                document.add(region)
            ran, _ = evaluated(document, tmp_path, model)
            assert ran == text.count(">>> ")
            total += ran
            assert "import lightrm\n" not in text.replace(">>> import lightrm", ""), f"{path}: code that nobody runs"
    assert total >= 3


def test_a_block_that_fails_is_found(model: Path, tmp_path: Path) -> None:
    """The test above can fail: a wrong figure, a raising block, a command that is none."""
    for block in ("python\n>>> 1.25\n1.27", "python\n1 / 0", "sh\nlightrm rate MODEL", "sh\ncurl x"):
        (tmp_path / "x.md").write_text(f"# x\n\n```{block}\n```\n")
        with pytest.raises((SybilFailure, ZeroDivisionError, AssertionError)):
            evaluated(SYBIL.parse(tmp_path / "x.md"), tmp_path, model)
    (tmp_path / "x.md").write_text("# x\n\n```python\n>>> 1.2512\n1.25\n```\n")
    assert evaluated(SYBIL.parse(tmp_path / "x.md"), tmp_path, model) == (1, [])


def test_the_first_example_ranks_as_it_says() -> None:
    """Higher is better, and the proper answer is first; the card's example is the same."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = re.search(r"array\(\[([^]]*)\]", text)
    assert shown is not None
    proper, *others = map(float, shown[1].split(","))
    assert proper > max(others) + 1
    (example,) = read_card(DEMO_FOLDER / "MODEL_CARD.md").examples
    scores = lightrm.load("demo").score(example.prompt, example.responses)
    assert scores.argmax() == 0
    assert example.prompt in text
    assert all(answer in text for answer in example.responses[:2])


def names_of(command: click.Command) -> set[str]:
    return {name for option in command.params for name in (*option.opts, *option.secondary_opts)}


def test_commands_in_the_text_exist() -> None:
    """`lightrm fidelity ... --layers` in a sentence is a command with these options, `python -m x` a module."""
    for path in DOCUMENTS:
        for code in re.findall(r"`([^`\n]+)`", path.read_text(encoding="utf-8")):
            words = code.split()
            if words[0] == "lightrm" and len(words) > 1:
                command = main.commands[words[1]]
                assert {word for word in words if word.startswith("-")} <= names_of(command) | {"--help"}, code
            if words[:2] == ["python", "-m"] and words[2] not in ("pytest", "pip", "build"):
                module = ROOT / words[2].replace(".", "/")
                assert module.with_suffix(".py").is_file() or (module / "__main__.py").is_file(), code


def words_of(name: str) -> str:
    return " ".join((ROOT / name).read_text(encoding="utf-8").split())


def test_figures_in_words_are_those_of_the_tables() -> None:
    """Sentences beside the tables round what the result files hold."""
    readme, fidelity, exact = map(words_of, ("README.md", "docs/fidelity.md", "docs/exact-rankings.md"))
    model = read_result("bundled_model")
    spoilt = [model["corrupted"][f"{lang} {kind}"]["share"] for lang in ("zh", "en") for kind in ("repeated", "cut")]
    foreign = [model["corrupted"][f"{lang} foreign"]["share"] for lang in ("zh", "en")]
    assert f"in {100 * min(spoilt):.0f} to {100 * max(spoilt):.0f} of 100 held-out comparisons" in readme
    assert f"in {100 * min(foreign):.0f} to {100 * max(foreign):.0f}" in readme
    assert f"no more often than a coin ({100 * model['natural']['all']['share']:.1f} %)" in readme
    rows = read_result("fidelity")["models"]["The 135 M reference model"]["rows"]
    error = {name: row["whole"]["mean_error"]["value"] for name, row in rows.items()}
    assert "calibrated w4a8 errs little more than a third as much in 1 % more bytes" in fidelity
    assert 1 / 3 < error["w4a8+cal"] / error["nf4"] < 0.4
    assert round(100 * rows["w4a8+cal"]["bytes"] / rows["nf4"]["bytes"]) == 101
    wholes = [rows[scheme]["whole"]["mean_error"] for scheme in ("w4a8+cal", "w4a8-g32+cal")]
    assert "Groups of 32 are not clearly better there" in fidelity
    assert wholes[0]["low"] < wholes[1]["high"]
    assert "Calibrated w8a8 errs by less than twice what bf16 does" in fidelity
    assert error["w8a8+cal"] < 2 * error["bf16"]
    found = read_result("exact")["models"]["The 135 M reference model"]["w8a8+cal"]
    sure = found["0.995"]
    assert sum(sure[what]["same order"] for what in ("pairs", "lists")) == 1833
    assert "all 1833 questions have float32's order" in exact
    shares = [sure[what]["rescored tokens"] / sure[what]["tokens"] for what in ("pairs", "lists")]
    assert "an eighth of the pairs' tokens is scored again, but two thirds of the lists'" in exact
    assert abs(shares[0] - 1 / 8) < 0.01
    assert abs(shares[1] - 2 / 3) < 0.02
    less = [found["0.99"][what] for what in ("pairs", "lists")]
    share = sum(one["rescored tokens"] for one in less) / sum(one["tokens"] for one in less)
    right = sum(one["same order"] for one in less)
    assert f"At 99 % it is {100 * share:.0f} % of all tokens for {right} questions" in exact


def test_sizes_in_the_table_of_schemes_are_those_that_are_planned() -> None:
    cpu = torch.device("cpu")
    ziya = Architecture("llama", 32, 4096, 11008, 32, 32, 128, 39424, 1e-6, Rope(), 2048)
    baichuan = Architecture("baichuan", 40, 5120, 13696, 40, 40, 128, 64000, 1e-6, Alibi(), 4096)

    def size(scheme: str) -> str:
        return " / ".join(f"{weight_bytes(a, parse_scheme(scheme, cpu)) / 2**30:.1f}" for a in (ziya, baichuan))

    readme = words_of("README.md")
    seven = {scheme: f"({size(scheme).partition(' ')[0]} GiB" for scheme in ("w8a8", "w4a8", "bf16")}
    assert f"`w8a8` {seven['w8a8']} of weights for a 7B model)" in readme
    assert f"`w4a8`, calibrated {seven['w4a8']})" in readme
    assert f"`bf16`, on a GPU `fp16` {seven['bf16']})" in readme
    lines = (ROOT / "docs" / "schemes.md").read_text(encoding="utf-8").splitlines()
    for scheme in ("w8a8", "w4a8", "w4a16", "nf4", "bnb-int8", "bf16"):
        (line,) = (line for line in lines if line.startswith(f"| `{scheme}`"))
        assert f"| {size(scheme)} GiB" in line
    assert any(f"({size('w4a8-g32')} in groups of 32)" in line for line in lines)


def test_the_table_of_layouts_is_what_inspect_says() -> None:
    lines = (ROOT / "docs" / "models.md").read_text().split("## Architectures")[0].splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:3]] for line in lines if line.startswith("| `")]
    assert sorted(rows) == sorted([f"`{layout.name}`", layout.models] for layout in LAYOUTS)


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 170


LINK = re.compile(r"(?<!!)\[[^]]*\]\(([^()\s]+)\)")


def anchors(path: Path) -> set[str]:
    """Of the headings of a document, as GitHub and MkDocs both name them."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in titles}


def broken_links(path: Path) -> list[str]:
    """Links to files and headings that do not exist; the web's are not followed."""
    found = []
    for link in LINK.findall(path.read_text(encoding="utf-8")):
        target, _, anchor = link.partition("#")
        file = (path.parent / target).resolve() if target else path
        if re.match(r"https?://", link):
            continue
        if not file.exists() or (anchor and anchor not in anchors(file)):
            found.append(link)
    return found


def test_links_lead_somewhere(tmp_path: Path) -> None:
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *PAGES):
        assert broken_links(path) == [], path
    (tmp_path / "x.md").write_text("# A title's end\n[a](#a-titles-end) [b](#b) [c](y.md) [d](x.md) [e](https://f)\n")
    assert broken_links(tmp_path / "x.md") == ["#b", "y.md"]


def test_every_page_is_reached_from_the_readme() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert {page.name for page in PAGES} == set(re.findall(r"\(docs/([\w-]+\.md)[#)]", text))


def test_the_site_builds(tmp_path: Path) -> None:
    """Strict: a warning, such as of a broken link, fails. Every public name stands on the API page."""
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    assert {page.stem for page in PAGES} <= {page.stem for page in (tmp_path / "site").glob("*.html")}
    api = (tmp_path / "site" / "api.html").read_text(encoding="utf-8")
    for name in lightrm.__all__:
        assert f'id="lightrm.{name}"' in api, name
    assert "<li><code>strict</code>: raise where a text would be cut.</li>" in api, "parameters stand in a list"

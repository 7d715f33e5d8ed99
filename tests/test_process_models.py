"""Process reward models: each step's score is what the model's own code gives, here on transformers' backbone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, processors

import lightrm
from lightrm import errors
from lightrm.checkpoints.safe import SafeFile
from lightrm.loading.sources import open_source
from tests.vocabularies import BOS, EOS, add_tokens, tokenizer_json

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 2048,
}  # fmt: skip
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>{% if not loop.last %}\n"
    "{% endif %}{% endfor %}"
)
PROMPT = "What is 6 times 7?"
STEPS = ["We need 6 * 7.", "6 * 7 = 42.", "So the answer is\n 42, said <|im_end|> twice."]
OTHER = ["Nothing", "(again)", "41", "42"]


@dataclass(frozen=True)
class Published:
    """A tiny model of one kind. load: options of `lightrm.load`; ids: its own code's text, and where it is read."""

    folder: Path
    load: dict[str, Any]
    model: transformers.PreTrainedModel
    head: tuple[torch.Tensor, ...]
    tokenizer: Any

    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        """Two logits, or one, of every token."""
        with torch.inference_mode():
            x = self.model(torch.tensor([ids])).last_hidden_state[0]
        for k in range(0, len(self.head), 2):
            x = (x if k == 0 else x.relu()) @ self.head[k].T + self.head[k + 1]
        return x


def write_tokenizer(folder: Path, kind: str, *, bos: bool, specials: Sequence[str]) -> Any:
    description = add_tokens(tokenizer_json(kind), [(name, {"special": True}) for name in specials])
    made = Tokenizer.from_str(json.dumps(description))
    if bos:
        made.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", special_tokens=[(BOS, made.token_to_id(BOS))]
        )
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=made, bos_token=BOS, eos_token=EOS)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    return tokenizer


def published(kind: str, folder: Path) -> Published:
    torch.manual_seed(5)
    marks = {"qwen": ["<extra_0>"], "skywork": [], "shepherd": [], "rlhflow": []}[kind]
    added = [BOS, EOS, "<|im_start|>", "<|im_end|>", *marks]
    vocabulary = "metaspace first" if kind == "shepherd" else "llama3"
    tokenizer = write_tokenizer(folder, vocabulary, bos=kind in ("shepherd", "rlhflow"), specials=added)
    if kind == "shepherd":  # one token each for the tag and the signs, as in Mistral's vocabulary
        description = json.loads((folder / "tokenizer.json").read_text())
        table = description["model"]["vocab"]
        pieces = [piece for piece in ("к", "и", "ки", "▁ки", "+", "-", "▁+", "▁-") if piece not in table]
        table |= {piece: len(tokenizer) + k for k, piece in enumerate(pieces)}
        pairs = [["к", "и"], ["▁", "ки"], ["▁", "+"], ["▁", "-"]]
        description["model"]["merges"] = [*pairs, *description["model"]["merges"]]
        (folder / "tokenizer.json").write_text(json.dumps(description))
    families = {"qwen": "Qwen2", "skywork": "Qwen2", "shepherd": "Mistral", "rlhflow": "Llama"}
    family, size = families[kind], len(tokenizer) + 16
    config = getattr(transformers, f"{family}Config")(vocab_size=size, **SIZES)
    whole = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for parameter in whole.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    names = {
        "qwen": "Qwen2ForProcessRewardModel", "skywork": "Qwen2ForPrmModel", "shepherd": "MistralForCausalLM",
        "rlhflow": "LlamaForCausalLM",
    }  # fmt: skip
    tensors = dict(whole.state_dict())
    if kind == "qwen":
        head = tuple(torch.randn(shape) * 0.3 for shape in ((32, 32), (32,), (2, 32), (2,)))
        tensors |= {f"score.{k}": t for k, t in zip(("0.weight", "0.bias", "2.weight", "2.bias"), head, strict=True)}
    elif kind == "skywork":
        head = (torch.randn(1, 32) * 0.3, torch.randn(1))
        tensors |= {"v_head.summary.weight": head[0], "v_head.summary.bias": head[1]}
    else:
        head = (whole.lm_head.weight.detach(), torch.zeros(size))
    whole.config.architectures = [names[kind]]
    whole.config.save_pretrained(folder)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    load = {"shepherd": {"layout": "math_shepherd"}, "rlhflow": {"layout": "rlhflow_prm"}}.get(kind, {})
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)  # the class that the config asks for
    return Published(folder, load, whole.model, head, tokenizer)


KINDS = ("qwen", "skywork", "shepherd", "rlhflow")


@pytest.fixture(scope="module", params=KINDS)
def one(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Published]:
    return request.param, published(request.param, tmp_path_factory.mktemp(request.param))


def steps_for(kind: str, steps: Sequence[str]) -> list[str]:
    """The same steps, without what a form refuses or what the library alone would let act."""
    safe = [step.replace(" <|im_end|>", "") for step in steps]
    return [step.replace("\n", "") for step in safe] if kind == "skywork" else safe


def own_scores(kind: str, model: Published, prompt: str, steps: Sequence[str]) -> np.ndarray:
    """The published inference code, in a few lines."""
    tokenizer = model.tokenizer
    if kind == "qwen":
        messages = [
            {"role": "system", "content": "Please reason step by step, and put your final answer within \\boxed{}."},
            {"role": "user", "content": prompt},
            {"role": "assistant", "content": "<extra_0>".join(steps) + "<extra_0>"},
        ]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False)
        ids = tokenizer.encode(text)
        probabilities = model.logits(ids).softmax(-1)[:, 1]
        mark = tokenizer.encode("<extra_0>")[0]
        return probabilities[torch.tensor(ids) == mark].numpy()
    if kind == "skywork":
        ids, flags = tokenizer.encode(tokenizer.bos_token + prompt + "\n"), []
        for step in "\n".join(steps).split("\n"):
            ids += [*(tokenizer.encode(step) if step else []), tokenizer.encode("\n")[-1]]
            flags.append(len(ids) - 1)
        return model.logits(ids)[:, 0].sigmoid()[flags].numpy()
    if kind == "shepherd":
        candidates, tag = tokenizer.encode("+ -")[1:], tokenizer.encode("ки")[-1]
        ids = tokenizer.encode(f"{prompt} " + "\n".join(f"{step} ки" for step in steps))
        scores = model.logits(ids)[:, candidates].softmax(-1)[:, 0]
        return scores[torch.tensor(ids) == tag].numpy()
    found, conversation = [], []
    candidates = [tokenizer.encode("+")[-1], tokenizer.encode("-")[-1]]
    for k, step in enumerate(steps):
        text = prompt + " " + step if k == 0 else step
        conversation += [{"content": text, "role": "user"}, {"content": "+", "role": "assistant"}]
        rendered = tokenizer.apply_chat_template(conversation, tokenize=False)
        ids = tokenizer(rendered, add_special_tokens=False)["input_ids"]
        found.append(model.logits(ids)[-3, candidates].softmax(-1)[0].numpy())
    return np.asarray(found)


def test_each_step_scores_as_the_models_own_code(one: tuple[str, Published]) -> None:
    kind, model = one
    rm = lightrm.load(model.folder, scheme="fp32", device="cpu", **model.load)
    answers = [steps_for(kind, steps) for steps in (STEPS, OTHER)]
    expected = [own_scores(kind, model, PROMPT, steps) for steps in answers]
    assert np.ptp(np.concatenate(expected)) > 0.05, "and the steps differ"
    found = rm.score_steps(PROMPT, answers)
    assert [one.dtype for one in found] == [np.float32] * 2
    for scores, right in zip(found, expected, strict=True):
        np.testing.assert_allclose(scores, right, atol=1e-4)
    np.testing.assert_allclose(rm.score_steps(PROMPT, answers[0]), expected[0], atol=1e-4)
    for scores, right in zip(rm.score_steps_batch([PROMPT] * 2, answers), expected, strict=True):
        np.testing.assert_allclose(scores, right, atol=1e-4)
    assert rm.score_steps(PROMPT, []).shape == (0,)


def test_w8a8_steps_do_not_depend_on_the_batch(one: tuple[str, Published], tmp_path: Path) -> None:
    kind, model = one
    rm = lightrm.load(model.folder, scheme="w8a8", device="cpu", **model.load)
    answers = [steps_for(kind, steps) for steps in (STEPS, OTHER, [*OTHER, *STEPS])]
    together = rm.score_steps(PROMPT, answers)
    alone = [rm.score_steps(PROMPT, steps) for steps in answers]
    for a, b, steps in zip(together, alone, answers, strict=True):
        assert a.tobytes() == b.tobytes()
        np.testing.assert_allclose(a, own_scores(kind, model, PROMPT, steps), atol=0.1)
    cut = rm.score_steps(PROMPT, answers[0][:2])
    assert cut.tobytes() == together[0][:2].tobytes(), "a step does not see what comes after it"
    rm.save(tmp_path / "folder")
    restored = lightrm.load(tmp_path / "folder", device="cpu", reduce="min")
    for a, b in zip(restored.score_steps(PROMPT, answers), together, strict=True):
        assert a.tobytes() == b.tobytes()


def test_steps_cost_one_pass_over_the_answer(one: tuple[str, Published]) -> None:
    _, model = one
    rm = lightrm.load(model.folder, scheme="fp32", device="cpu", **model.load)
    assert rm.text.steps is not None
    sequences = rm.text.steps.encode([{"role": "user", "content": PROMPT}], ["1"] * 60)
    assert len(sequences) == 60
    assert rm.engine.distinct_tokens(sequences) == len(sequences[-1])


def test_rounding_is_calibrated_on_answers_in_steps(one: tuple[str, Published]) -> None:
    _, model = one
    pairs = [(PROMPT, "6 * 7"), (PROMPT, "42")]
    rm = lightrm.load(model.folder, scheme="w8a8", device="cpu", calibration=pairs, **model.load)
    assert "2 texts" in rm.report.calibration
    assert rm.score_steps(PROMPT, ["42"]).shape == (1,)


@pytest.mark.parametrize(("reduce", "of"), [("min", np.min), ("product", np.prod), ("mean", np.mean)])
def test_one_score_of_the_steps(reduce: str, of: Any, one: tuple[str, Published]) -> None:
    kind, model = one
    rm = lightrm.load(model.folder, scheme="fp32", device="cpu", reduce=reduce, **model.load)
    parts = {"qwen": "\n\n", "rlhflow": "\n\n"}.get(kind, "\n")
    answers = [["We need 6 * 7.", "6 * 7 = 42."], OTHER]
    texts = [parts.join(steps) for steps in answers]
    expected = [of(own_scores(kind, model, PROMPT, steps)) for steps in answers]
    found = rm.score(PROMPT, texts)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-4)
    np.testing.assert_allclose(rm.score_batch([PROMPT] * 2, texts), expected, atol=1e-4)
    assert rm.rank(PROMPT, texts)[0].index == int(np.argmax(expected))


def test_every_call_has_the_score_of_the_steps(one: tuple[str, Published]) -> None:
    """Streamed, explained and encoded: the same bits as `score`, and the steps behind them."""
    kind, model = one
    rm = lightrm.load(model.folder, scheme="w8a8", device="cpu", reduce="product", token_budget=64, **model.load)
    part = {"qwen": "\n\n", "rlhflow": "\n\n"}.get(kind, "\n")
    texts = [part.join(steps) for steps in (["We need 6 * 7.", "6 * 7 = 42."], OTHER, ["42"])]
    scores = rm.score(PROMPT, texts)
    streamed = dict(rm.stream([PROMPT] * 3, texts))
    assert np.asarray([streamed[k] for k in range(3)], np.float32).tobytes() == scores.tobytes()
    assert rm.predict([(PROMPT, text) for text in texts]).tobytes() == scores.tobytes()
    steps = rm.score_steps(PROMPT, OTHER)
    found = rm.explain(PROMPT, texts[1])
    assert found.steps == tuple(zip(OTHER, steps.tolist(), strict=True))
    assert np.float32(found.score) == scores[1]
    assert found.template == f"of steps: {rm.text.steps.form.name}, product of theirs"  # type: ignore[union-attr]
    assert all(step in found.text for step in OTHER)
    assert len(found.pieces) == len(found.token_ids) > len(OTHER)
    assert rm.encode([PROMPT] * 3, texts)[1] == found.token_ids
    assert rm.score_ids([found.token_ids]).tobytes() == steps[-1:].tobytes(), "encoded to where the last step is read"
    assert "'(again)'" in str(found)
    assert "<li>" in found._repr_html_()


def test_who_does_not_say_how_gets_no_single_score(one: tuple[str, Published]) -> None:
    _, model = one
    rm = lightrm.load(model.folder, scheme="fp32", device="cpu", **model.load)
    for call in (
        lambda: rm.score(PROMPT, ["42"]), lambda: rm.rank(PROMPT, ["42"]), lambda: rm.explain(PROMPT, "42"),
        lambda: rm.encode([PROMPT], ["42"]), lambda: list(rm.stream([PROMPT], ["42"])),
        lambda: rm.predict([(PROMPT, "42")]),
    ):  # fmt: skip
        with pytest.raises(lightrm.InputError, match="reduce= one of 'min', 'product', 'last', 'mean'"):
            call()
    with pytest.raises(lightrm.InputError, match="reduce must be one of"):
        lightrm.load(model.folder, reduce="median", **model.load)
    rm = lightrm.load(model.folder, scheme="fp32", device="cpu", reduce="min", **model.load)
    with pytest.raises(lightrm.InputError, match="scores the steps of an answer: use score_steps, or score"):
        rm.score_text(["hello world"])
    with pytest.raises(lightrm.InputError, match="found both"):
        rm.score_steps(PROMPT, ["a", ["b"]])
    with pytest.raises(errors.TooLongError, match="steps are never cut"):
        rm.score_steps(PROMPT, ["word " * 3000])
    with pytest.raises(lightrm.InputError, match="without template="):
        lightrm.load(model.folder, template="ziya", **model.load)


def test_a_step_cannot_spell_a_mark(one: tuple[str, Published]) -> None:
    """What the caller writes is text, or is refused; it never adds a step, nor ends a turn."""
    kind, model = one
    rm = lightrm.load(model.folder, scheme="fp32", device="cpu", **model.load)
    assert rm.text.steps is not None
    turns = [{"role": "user", "content": f"{PROMPT} <|im_end|>{BOS}"}]
    if kind == "shepherd":
        with pytest.raises(lightrm.InputError, match="has 3 tokens 'ки'"):
            rm.score_steps(PROMPT, ["so ки", "42"])
    steps = ["<extra_0>so<extra_0>", "<|im_end|><extra_0>"]
    found = rm.text.steps.encode(turns, steps)
    assert len(found) == 2
    steering = model.tokenizer.convert_tokens_to_ids([BOS, "<|im_end|>", "<|im_start|>", "<extra_0>"])
    plain = rm.text.steps.encode([{"role": "user", "content": PROMPT}], ["so", "42"])
    for which in steering:
        if which is not None:
            assert found[-1].count(which) == plain[-1].count(which)


def test_the_output_layers_rows_alone_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a plain language model stays refused, unless the caller or its hub id says what it is."""
    model = published("rlhflow", tmp_path)
    with pytest.raises(errors.MissingHeadError, match="layout='nemotron' or 'math_shepherd' or 'rlhflow_prm'"):
        lightrm.load(tmp_path)
    with pytest.raises(lightrm.InputError, match="layout must be one of nemotron, math_shepherd, rlhflow_prm"):
        lightrm.load(tmp_path, layout="ziya")
    wholly: list[str] = []
    read = SafeFile.read
    monkeypatch.setattr(SafeFile, "read", lambda self, name: (wholly.append(name), read(self, name))[1])
    rm = lightrm.load(tmp_path, scheme="fp32", device="cpu", layout="nemotron")
    assert "model.norm.weight" in wholly
    assert "lm_head.weight" not in wholly
    ids = [[5, 6, 7], [9, 8]]
    expected = [float(model.logits(one)[-1, 0]) for one in ids]
    np.testing.assert_allclose(rm.score_ids(ids), expected, rtol=1e-4, atol=1e-5)
    assert rm.engine.head.weights[0].shape == (1, 32)
    named = "nvidia/Llama-3.1-Nemotron-70B-Reward-HF"
    monkeypatch.setattr("lightrm.loading.sources.resolve", lambda *_: tmp_path)
    assert open_source(named).checkpoint.layout.name == "nemotron"


def test_skyworks_steps_are_lines(tmp_path: Path) -> None:
    model = published("skywork", tmp_path)
    rm = lightrm.load(tmp_path, scheme="fp32", device="cpu", reduce="last")
    with pytest.raises(lightrm.InputError, match="a step of this model is one line"):
        rm.score_steps(PROMPT, ["a\nb"])
    expected = own_scores("skywork", model, PROMPT, ["a", "", "b"])
    np.testing.assert_allclose(rm.score(PROMPT, ["a\n\nb"]), expected[-1:], atol=1e-4)

"""Text to ids: golden ids of real vocabularies, special tokens that users may not write, and cutting."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lightrm.errors import TemplateError, TokenizerError, TooLongError
from lightrm.text.encoding import Tokens, read_tokens
from lightrm.text.templates import TEMPLATES, Special, Template, Text, find_template
from tests.zoo import write_tokenizer

BARE = Template(name="bare", source="a test", user=(Text("{}"),), bos=True)


def ask(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def ids_of(tokens: Tokens, template: Template, prompt: str, response: str = "", limit: int = 100_000) -> list[int]:
    return tokens.encode(template, ask(prompt), [response], limit, strict=False)[0].token_ids


def cases(shared: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (shared / "golden" / name).read_text().splitlines()]


@pytest.fixture
def llama(shared: Path, tmp_path: Path) -> Path:
    """The LLaMA vocabulary with Ziya's own special_tokens_map (models' facts, not our choice)."""
    shutil.copy(shared / "tokenizers" / "llama.tokenizer.model", tmp_path / "tokenizer.model")
    ziya = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "[PAD]"}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(ziya))
    empty = {
        "bos_token": "",
        "eos_token": "",
        "unk_token": "",
        "add_bos_token": True,
        "tokenizer_class": "LlamaTokenizer",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(empty))
    (tmp_path / "added_tokens.json").write_text('{"[PAD]": 32000}')
    return tmp_path


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    write_tokenizer(tmp_path)
    return tmp_path


def test_ziya_card_ids(llama: Path, shared: Path) -> None:
    """The card's two examples, as transformers' slow tokenizer encodes them: exactly, starting with id 2."""
    tokens = read_tokens(llama)
    for case in cases(shared, "ziya_card.jsonl"):
        for response, expected in zip(case["responses"], case["input_ids"], strict=True):
            assert ids_of(tokens, find_template("ziya"), case["prompt"], response, 1024) == expected
    (llama / "special_tokens_map.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    tokens = read_tokens(llama)
    for case in cases(shared, "ziya_card.jsonl"):
        for response, expected in zip(case["responses"], case["input_ids_if_bos_is_1"], strict=True):
            assert ids_of(tokens, find_template("ziya"), case["prompt"], response, 1024) == expected


def test_llama_awkward_texts(llama: Path, shared: Path) -> None:
    """By default what users write stays text; `parse_specials` repeats Hugging Face's slow tokenizer."""
    (llama / "special_tokens_map.json").write_text('{"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}')
    safe, parity = read_tokens(llama), read_tokens(llama, parse_specials=True)
    different = 0
    for case in cases(shared, "llama_tokenizer_cases.jsonl"):
        limit = len(case["hf_slow_ids"])
        assert ids_of(safe, BARE, case["text"]) == case["raw_sentencepiece_ids"]
        assert ids_of(parity, BARE, case["text"], limit=limit) == case["hf_slow_ids"]
        different += case["hf_slow_ids"] != [*case["raw_sentencepiece_ids"][: limit - 1], 2]
    assert different == 3


def test_baichuan_awkward_texts(shared: Path, tmp_path: Path) -> None:
    shutil.copy(shared / "tokenizers" / "baichuan-13b.tokenizer.model", tmp_path / "tokenizer.model")
    tokens = read_tokens(tmp_path)
    for case in cases(shared, "baichuan_tokenizer_cases.jsonl"):
        found = tokens.vocabulary.encode(case["text"], first=True, glued=False)
        if "<reserved_" in case["text"]:
            live = read_tokens(tmp_path, parse_specials=True).vocabulary.encode(case["text"], first=True, glued=False)
            assert live == case["raw_sentencepiece_ids"]
            assert not {195, 196} & set(found), "a user's <reserved_102> is text"
        else:
            assert found == case["raw_sentencepiece_ids"]


def test_efficient_tuning_ids_of_each_version(shared: Path, tmp_path: Path) -> None:
    """Tails and heads as read from the code of each date (LLaMA-Efficient-Tuning template.py, preprocess.py)."""
    shutil.copy(shared / "tokenizers" / "baichuan-13b.tokenizer.model", tmp_path / "tokenizer.model")
    tokens = read_tokens(tmp_path)
    names = [name for name in TEMPLATES if name.startswith("let-")]
    ids = {name: ids_of(tokens, TEMPLATES[name], "列举一种空气污染。", "好的", 1024) for name in names}
    query = [31106, 31896, 31911, 5243, 9078, 10803, 73]
    old_seam, new_seam = [3155, 79, 5, 20250, 31143], [3155, 79, 31106, 5, 5132, 31143]
    answer = [7905, 18056, 31143, 31106, 31106, 2346]

    def ends(name: str, tail: list[int]) -> bool:
        return ids[name][-len(tail) :] == tail

    assert ends("let-default", [*old_seam, *query, 5, *answer, 2])
    assert ends("let-default-2023-08-04", [3155, 79, 5132, 31143, *query, 5, *answer, 2])
    assert ends("let-default-0.1.6", [*new_seam, *query, 5, *answer, 2])
    assert ids["let-default-0.1.6"] == [1, *ids["let-default-0.1.7"]]
    assert ids["let-default-2023-09-07"] == ids["let-default-0.1.7"][:-1]
    assert ids["let-baichuan"] == [31106, 195, *query[1:], 196, 31106, 2346, 2]
    assert ids["let-baichuan-2023-08-04"] == [195, *query, 196, 31106, 2346, 2]
    assert ids["let-baichuan-2023-08-09"] == [1, *ids["let-baichuan-2023-08-04"]]
    assert ids["let-baichuan-0.1.6"] == [1, 195, *query, 196, 31106, 2346, 195]
    assert ids["let-baichuan-0.1.7"] == [195, *query, 196, 31106, 2346, 195]
    assert ids["let-baichuan-2023-09-07"] == [195, *query, 196, 31106, 2346]


@pytest.mark.parametrize("text", ["<s>", "</s>", "<unk>", "a<reserved_102>b", "<reserved_103></s>"])
def test_users_cannot_write_special_tokens(text: str, tiny: Path) -> None:
    tokens = read_tokens(tiny)
    specials = {tokens.vocabulary.id_of(name) for name in ("<s>", "</s>", "<unk>", "<reserved_102>", "<reserved_103>")}
    assert None not in specials
    assert not specials & set(ids_of(tokens, BARE, text)[1:-1])
    assert specials & set(ids_of(read_tokens(tiny, parse_specials=True), BARE, text)[1:-1])


def test_markup_in_the_vocabulary_stays_vocabulary(tiny: Path) -> None:
    """Baichuan lists HTML tags as user-defined pieces: they are text and keep their single id."""
    tokens = read_tokens(tiny)
    assert tokens.vocabulary.id_of("<p>") in ids_of(tokens, BARE, "a<p>b")


def test_special_tokens_map_is_asked_first(tmp_path: Path) -> None:
    write_tokenizer(
        tmp_path, {"bos_token": "</s>", "eos_token": {"content": "<s>"}}, bos_token="<unk>", eos_token="<unk>"
    )
    assert ids_of(read_tokens(tmp_path), BARE, "")[0] == 2
    assert ids_of(read_tokens(tmp_path), BARE, "")[-1] == 1
    write_tokenizer(tmp_path, {"bos_token": "", "eos_token": ""}, bos_token="<unk>")
    assert ids_of(read_tokens(tmp_path), BARE, "") == [0, 2], "empty strings mean unset; then config, then vocabulary"


def test_bos_follows_the_tokenizer_where_the_template_does_not_say(tmp_path: Path) -> None:
    """Frozen templates obey the rules of 2023; plain text is what transformers' tokenizer makes of it."""
    transformers = pytest.importorskip("transformers")
    frozen = Template(name="frozen", source="a test", user=(Text("{}"),), closing=())
    for config, expected in (
        ({}, True),
        ({"add_bos_token": False}, False),
        ({"tokenizer_class": "BaichuanTokenizer"}, False),
    ):
        write_tokenizer(tmp_path, **config)
        tokens = read_tokens(tmp_path)
        assert (ids_of(tokens, frozen, "hello")[0] == 1) is expected
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)("hello")["input_ids"]
        assert ids_of(tokens, find_template("plain"), "hello") == theirs


def test_cutting_rules(tiny: Path) -> None:
    tokens = read_tokens(tiny)
    prompt, response = "what is the weather today? " * 4, "it is sunny and warm. " * 4
    for rule, keeps in (("response end", slice(None, 19)), ("prompt start", slice(-19, None))):
        template = Template(name="t", source="a test", user=(Text("{}"),), bos=True, cut=rule)  # type: ignore[arg-type]
        whole = ids_of(tokens, template, prompt, response)
        encoded = tokens.encode(template, ask(prompt), [response], 20, strict=False)[0]
        assert len(encoded.token_ids) == 20
        assert encoded.cut == len(whole) - 20
        assert (encoded.token_ids[0], encoded.token_ids[-1]) == (1, 2), "BOS and EOS survive"
        assert (
            encoded.token_ids[:-1] == whole[keeps] if rule == "response end" else encoded.token_ids[1:] == whole[keeps]
        )
        with pytest.raises(TooLongError, match=rf"has {len(whole)} tokens, the limit is 20"):
            tokens.encode(template, ask(prompt), [response], 20, strict=True)
    sides = Template(name="t", source="a test", user=(Text("{}"),), bos=True, cut="each side", joined="none")
    encoded = tokens.encode(sides, ask(prompt), [response], 20, strict=False)[0]
    alone = ids_of(tokens, sides, prompt), ids_of(tokens, sides, "", response)
    assert encoded.token_ids == alone[0][:10] + alone[1][1:10] + [2]


def test_braces_and_slots_in_user_text_are_text(tiny: Path) -> None:
    for template in TEMPLATES.values():
        if not isinstance(template, Template):
            continue
        pieces = [*template.before(ask("{} {0} {name} %s")), *template.answer("{}")]
        text = "".join(p.text for p in pieces if isinstance(p, Text))
        assert "{} {0} {name} %s" in text
        assert text.endswith("{}")


def test_conversations_in_templates() -> None:
    turns = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Bye"},
    ]

    def text(name: str) -> str:
        template = find_template(name)
        assert isinstance(template, Template)
        pieces = [*template.before(turns), *template.answer("See you")]
        return "".join(p.text if isinstance(p, Text) else f"[{p.name}]" for p in pieces)

    assert text("ziya") == "Human:Be kind.\nHi\n\nAssistant:Hello\n\nHuman:Bye\n\nAssistant:See you[eos]"
    assert text("ultrarm") == "Human: Be kind.\nHi\n\nAssistant: Hello\n\nHuman: Bye\n\nAssistant: See you"
    assert text("beaver").startswith(
        "BEGINNING OF CONVERSATION: USER: Be kind.\nHi ASSISTANT:Hello[eos] USER: Bye ASSISTANT:"
    )
    assert text("let-default").startswith("Be kind.\nHuman: Hi\nAssistant: Hello\nHuman: Bye\nAssistant: See you")
    assert text("eurus") == "[INST] Be kind.\nHi [/INST] Hello [INST] Bye [/INST] See you"
    with pytest.raises(TemplateError, match="only a system turn"):
        TEMPLATES["ziya"].before(turns[:1])
    with pytest.raises(TemplateError, match="last turn is not one"):
        TEMPLATES["ziya"].before(turns[:3])
    with pytest.raises(TemplateError, match="no template 'zia'; there are ziya"):
        find_template("zia")


def test_a_template_names_the_special_token_it_lacks(tiny: Path) -> None:
    template = Template(name="t", source="a test", user=(Special("<|im_start|>"), Text("{}")))
    with pytest.raises(TemplateError, match=r"<\|im_start\|>.*choose another template"):
        ids_of(read_tokens(tiny), template, "x")


@pytest.mark.parametrize("content", [b"", b"\x00", b"\xff" * 40, b"<html>not a model</html>"])
def test_unreadable_tokenizers(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(TokenizerError, match=r"tokenizer\.model"):
        read_tokens(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        read_tokens(tmp_path)


def test_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"neither tokenizer\.json nor tokenizer\.model: `score_ids` still works"):
        read_tokens(tmp_path)


def test_any_version_of_protobuf_reads_a_model(tiny: Path) -> None:
    """The classes that come with sentencepiece want one major version; transformers' own are read instead."""
    program = f"""
import sys
from pathlib import Path
sys.modules["sentencepiece.sentencepiece_model_pb2"] = None  # raises ImportError, as another version of protobuf does
from lightrm.text.encoding import read_tokens
tokens = read_tokens(Path({str(tiny)!r}))
print(tokens.vocabulary.encode("hello", first=True, glued=True))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(read_tokens(tiny).vocabulary.encode("hello", first=True, glued=True))

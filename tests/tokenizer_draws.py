"""Hypothesis draws tokenizer folders: every kind of file, with the settings that published folders carry.

What stands here knows file formats alone: neither lightrm nor transformers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy
from tokenizers import processors

from tests import vocabularies
from tests.chat_draws import Family, families, pick, sources
from tests.vocabularies import KINDS, Json, add_tokens, ids_of, sentencepiece_model, tokenizer_json

CONTROL_LIKE = ("<tool_call>", "</think>", "<think>", "[UNUSED_TOKEN_145]", "<eoh>", "<|pad|>", "<extra_0>", "<image>")
PLAIN = ("\n\n", "  ", "hello", "é", "world.", "12", "▁▁", "(", "assistant")  # Gemma has "\n\n" among its added tokens
GENERIC = ("PreTrainedTokenizerFast", "TokenizersBackend", None)
# Classes that build a tokenizer of their own: lightrm may say by name that it does not know them.
OWN = (
    "GPTNeoXTokenizerFast", "CodeLlamaTokenizer", "GemmaTokenizerFast", "CohereTokenizerFast", "RobertaTokenizerFast",
)  # fmt: skip
UNIGRAM = ("T5TokenizerFast", "XLMRobertaTokenizerFast", "BertTokenizerFast", "DebertaV2TokenizerFast")
MAY_BE_REFUSED = frozenset({*OWN, *UNIGRAM, "GemmaTokenizer"})
RARE = (*OWN, "BloomTokenizerFast", "PreTrainedTokenizer", "Phi3Tokenizer")
CLASSES = {
    "model": (*["LlamaTokenizer", "LlamaTokenizerFast", *GENERIC] * 3, "GemmaTokenizer", "CodeLlamaTokenizer"),
    "metaspace": (*["LlamaTokenizer", "LlamaTokenizerFast", *GENERIC] * 3, "GemmaTokenizer", *RARE),
    "bytes": (
        *["Qwen2Tokenizer", "Qwen2TokenizerFast", "GPT2TokenizerFast", "LlamaTokenizerFast", *GENERIC] * 3,
        *RARE,
    ),
    "other": (
        *GENERIC * 6,
        "T5TokenizerFast",
        "XLMRobertaTokenizerFast",
        "BertTokenizerFast",
        "DebertaV2TokenizerFast",
    ),
}
IMAGE = ("image_token", "<image>")  # stands for a dictionary of named tokens
EXTRA = st.lists(pick(*CONTROL_LIKE, *PLAIN), max_size=2, unique=True)
MODEL_TYPES = ("llama", "llama", "llama", "llama", "mistral", "qwen2", "internlm2", "baichuan")
UNKNOWN_CLASSES = {"internlm2": "InternLM2Tokenizer", "baichuan": "BaichuanTokenizer"}
LARGE = int(1e30)
FLAGS = ("lstrip", "rstrip", "single_word", "normalized")


@dataclass(frozen=True, slots=True, repr=False)
class Folder:
    """`files` by name; `family`: the special tokens that its templates write; `added`: all that it declares."""

    files: Mapping[str, bytes]
    family: Family
    added: tuple[str, ...]
    class_name: str | None

    @property
    def user_defined(self) -> tuple[str, ...]:
        """Marks that a tokenizer.model has among its user-defined pieces, where no tokenizer.json hides it."""
        if "tokenizer.json" in self.files:
            return ()
        found = pieces(self.files["tokenizer.model"], USER_DEFINED)
        return tuple(name for name in found if name in self.family.specials)

    def __repr__(self) -> str:
        """What tells it from others: all but vocabularies."""
        lines = [f"Folder of family {self.family.name!r}"]
        for name, content in sorted(self.files.items()):
            if name == "tokenizer.model":
                lines.append(f"{name}: {about_model(content)}")
            else:
                lines.append(
                    f"{name}: {about_json(content.decode()) if name == 'tokenizer.json' else content.decode()}"
                )
        return "\n  ".join(lines)

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))  # Hypothesis shows the fields of a dataclass otherwise

    def write(self, folder: Path) -> Path:
        for name, content in self.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        return folder


ABSENT = object()
CONTROL, USER_DEFINED = 3, 4  # SentencePiece.Type in sentencepiece_model.proto


def seldom(*options: Any) -> SearchStrategy[Any]:
    """Mostly absent: each folder has a few unusual settings, not all of them."""
    return pick(ABSENT, *[ABSENT] * (2 * len(options)), *options)


def pieces(model: bytes, kind: int) -> list[str]:
    from sentencepiece import sentencepiece_model_pb2

    return [piece.piece for piece in sentencepiece_model_pb2.ModelProto.FromString(model).pieces if piece.type == kind]


def about_model(content: bytes) -> str:
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto.FromString(content)
    kinds = {"control": pieces(content, CONTROL), "user-defined": pieces(content, USER_DEFINED)}
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    return (
        f"{'unigram' if trainer.model_type == 1 else 'bpe'}, {kinds}, byte_fallback={trainer.byte_fallback}, "
        f"{normalizer.name}, add_dummy_prefix={normalizer.add_dummy_prefix}, "
        f"remove_extra_whitespaces={normalizer.remove_extra_whitespaces}, split_digits={trainer.split_digits}"
    )


def about_json(content: str) -> str:
    description = json.loads(content)
    model = {key: value for key, value in description.pop("model").items() if key not in ("vocab", "merges")}
    return re.sub(r'("precompiled_charsmap": ")[^"]*', r"\1...", json.dumps({"model": model, **description}))


def present(settings: Mapping[str, Any]) -> Json:
    return {key: value for key, value in settings.items() if value is not ABSENT}


@st.composite
def flags(draw: DrawFn, special: bool | None = None) -> Json:
    """How an added token is matched."""
    true = draw(pick(*[()] * 6, *((name,) for name in FLAGS), ("lstrip", "rstrip"), ("rstrip", "normalized")))
    return {name: name in true for name in FLAGS} | {"special": draw(pick(True, False)) if special is None else special}


@st.composite
def named_token(draw: DrawFn, spelling: str, in_map: bool) -> Any:
    """A special token as a string or as an object, in the forms of the two files."""
    plain = draw(pick(True, True, False))
    if plain:
        return spelling
    token = {"content": spelling, **draw(flags(True))}
    del token["special"]
    return token if in_map else {"__type": "AddedToken", **token}


@st.composite
def named_tokens(draw: DrawFn, family: Family, in_map: bool = False) -> Json:
    """bos_token and the like as one of the files names them: mostly right, sometimes null, absent or another."""
    found: dict[str, Any] = {}
    for role in ("bos", "eos", "pad", "unk"):
        usual = family.roles.get(role)
        others = [None, ABSENT, "", *family.specials]
        spelling = draw(pick(*[usual] * 12, *others)) if usual is not None else draw(seldom(None))
        if spelling is ABSENT or (in_map and spelling is None):
            continue
        found[f"{role}_token"] = draw(named_token(spelling, in_map)) if isinstance(spelling, str) else spelling
    return found


def post_processor(kind: str, bos: tuple[str, int], eos: tuple[str, int]) -> Any:
    if kind == "bytes":
        return processors.ByteLevel(trim_offsets=False)
    if kind == "bert":
        return processors.BertProcessing(eos, bos)
    if kind == "roberta":
        return processors.RobertaProcessing(eos, bos, trim_offsets=True, add_prefix_space=False)
    single = [bos[0] if "bos" in kind else "", "$A", eos[0] if "eos" in kind else ""]
    pieces = [piece for piece in single if piece]
    template = processors.TemplateProcessing(single=pieces, pair=[*pieces, "$B"], special_tokens=[bos, eos])
    return processors.Sequence([processors.ByteLevel(), template]) if "sequence" in kind else template


PROCESSORS = ("none", "none", "bytes", "bert", "roberta", "bos", "eos", "bos eos", "sequence bos", "sequence bos eos")


@st.composite
def with_processor(draw: DrawFn, description: Json, family: Family) -> Json:
    kind = draw(pick(*PROCESSORS))
    ids = ids_of(description)
    known = [(name, ids[name]) for name in (family.roles.get("bos"), family.roles.get("eos")) if name in ids]
    if kind == "none" or not known:
        return description
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(json.dumps(description))
    tokenizer.post_processor = post_processor(kind, known[0], known[-1])
    return vocabularies.as_json(tokenizer)


@st.composite
def json_file(draw: DrawFn, kind: str, family: Family, added: Mapping[str, Json]) -> Json:
    description = add_tokens(tokenizer_json(kind), list(added.items()))
    if draw(pick(*[False] * 5, True)):
        description["truncation"] = {
            "direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0,
        }  # fmt: skip
    return draw(with_processor(description, family))


@st.composite
def model_file(draw: DrawFn, family: Family) -> tuple[bytes, dict[str, int]]:
    """A tokenizer.model whose pieces may hold the family's special tokens, as user-defined or control ones."""
    place = draw(pick("none", "symbols", "control"))
    own = tuple(name for name in family.specials if name not in ("<s>", "</s>", "<unk>"))
    model = sentencepiece_model(
        draw(pick("bpe", "bpe", "unigram")),
        rule=draw(pick("identity", "identity", "nmt_nfkc")),
        symbols=(own if place == "symbols" else ()) + draw(pick((), ("<p>", "\n\n"))),
        control=own if place == "control" else (),
        byte_fallback=draw(pick(True, True, True, False)),
        dummy_prefix=draw(pick(True, True, True, False)),
        split_digits=draw(pick(True, False)),
        extra_spaces=draw(pick(True, True, False)),
    )
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    return model, {processor.id_to_piece(i): i for i in range(processor.get_piece_size())}


def group_of(kind: str) -> str:
    if kind.startswith(("gpt2", "llama3", "qwen")):
        return "bytes"
    return "metaspace" if kind.startswith(("metaspace", "prepend", "gemma", "model")) else "other"


@st.composite
def folders(draw: DrawFn, *, templates: bool = True) -> Folder:
    family = draw(families())
    layout = draw(pick("json", "json", "json", "model", "both"))
    kind = draw(pick(*KINDS)) if layout != "model" else "model"
    group = "model" if layout == "model" else group_of(kind)
    extra = draw(EXTRA)
    declared = {name: draw(flags(name not in family.plain)) for name in family.specials}
    declared |= {name: draw(flags(False if name in PLAIN else None)) for name in extra if name not in declared}

    files: dict[str, Any] = {}
    if layout == "model":
        in_file: set[str] = set()
    else:
        in_file = {name for name in declared if draw(pick(True, True, True, False))}
    ids: dict[str, int] = {}
    if layout != "json":
        files["tokenizer.model"], ids = draw(model_file(family))
    if layout != "model":
        description = draw(json_file(kind, family, {name: declared[name] for name in declared if name in in_file}))
        ids = ids_of(description)
        files["tokenizer.json"] = description

    next_id = max(ids.values()) + 1
    numbered: dict[str, int] = {}
    for name in declared:  # ids as a trainer would have written them
        numbered[name] = ids.get(name, next_id)
        next_id += name not in ids
    where = draw(pick("decoder", "decoder", "added_tokens.json", "named", "nowhere"))
    settings: dict[str, Any] = draw(named_tokens(family))
    if where == "decoder":
        left_out = draw(seldom(*sorted(in_file)))
        settings["added_tokens_decoder"] = {
            str(numbered[name]): {
                "content": name,
                **(declared[name] if name in PLAIN or draw(pick(True, False)) else draw(flags())),
            }
            for name in declared
            if name != left_out
        }
    elif where == "added_tokens.json":
        files["added_tokens.json"] = {name: numbered[name] for name in declared if name not in in_file}
    if draw(pick(True, False, False)):
        files["special_tokens_map.json"] = draw(named_tokens(family, in_map=True))
    model_type = draw(pick(*MODEL_TYPES))
    settings |= draw(options(group, model_type, tuple(name for name in declared if name not in PLAIN)))
    if templates:
        place_templates(files, settings, draw(sources(family)), draw(pick(*PLACES)))
    if not draw(pick(*[False] * 15, True)) or "chat_template" in settings:
        files["tokenizer_config.json"] = settings
    config = {"model_type": model_type, "bos_token_id": 1, "eos_token_id": 2}
    if "tokenizer_class" not in settings and draw(pick(False, False, True)):
        config["tokenizer_class"] = "LlamaTokenizer"
    files["config.json"] = config
    written = {name: content if isinstance(content, bytes) else dumped(content) for name, content in files.items()}
    return Folder(written, family, tuple(declared), settings.get("tokenizer_class"))


def dumped(content: object) -> bytes:
    return (content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)).encode()


@st.composite
def options(draw: DrawFn, group: str, model_type: str, names: tuple[str, ...]) -> Json:
    """What else tokenizer_config.json says."""
    classes = [*CLASSES[group], UNKNOWN_CLASSES.get(model_type)]
    some = [names[:1], (*names[-1:], "<|extra|>")]
    name = draw(pick(*classes))
    found = present(
        {
            "tokenizer_class": ABSENT if name is None else name,
            "legacy": draw(seldom(True, False, None)),
            "add_bos_token": draw(seldom(True, False, None)),
            "add_eos_token": draw(seldom(True, False, None)),
            "add_prefix_space": draw(seldom(True, False, None)),
            "clean_up_tokenization_spaces": draw(seldom(True, False)),
            "split_special_tokens": draw(pick(*[ABSENT] * 8, False, True)),
            "model_max_length": draw(seldom(4, 2048, LARGE)),
            "padding_side": draw(seldom("left", "right")),
            "truncation_side": draw(seldom("left", "right")),
            "additional_special_tokens": draw(seldom(*some)),
            "extra_special_tokens": draw(seldom(*some, (), IMAGE)),
            "audio_token": draw(pick(*[ABSENT] * 5, "<|audio|>")),
        }
    )
    if found.get("extra_special_tokens") == IMAGE:
        found["extra_special_tokens"] = dict([IMAGE])
    return found


PLACES = ("config", "config", "file", "file", "both", "list", "folder", "file and folder", "list without default")


def place_templates(files: dict[str, Any], settings: dict[str, Any], source: str, place: str) -> None:
    """Put the chat template where a folder may have it, with another one where it must not be taken from."""
    decoy = "decoy"
    if place == "config":
        settings["chat_template"] = source
    elif place == "file":
        files["chat_template.jinja"] = source
    elif place == "both":
        files["chat_template.jinja"], settings["chat_template"] = source, decoy
    elif place.startswith("list"):
        name = "other" if place == "list without default" else "default"
        settings["chat_template"] = [{"name": "tool_use", "template": decoy}, {"name": name, "template": source}]
    elif place == "folder":
        settings["chat_template"] = source
        files["additional_chat_templates/default.jinja"] = source
        files["additional_chat_templates/tool_use.jinja"] = decoy
    else:
        files["chat_template.jinja"] = source
        files["additional_chat_templates/rag.jinja"] = decoy

"""The files beside a vocabulary: names of special tokens, added tokens, chat templates, the length limit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightrm.errors import TemplateError, TokenizerError
from lightrm.files import read_json

SANE_LENGTH = 1 << 20  # transformers writes 1e30 for "no limit"
DESCRIBED, MODEL, CONFIG = "tokenizer.json", "tokenizer.model", "tokenizer_config.json"
# Files of other kinds of tokenizers, which transformers reads.
OTHERS = (
    "vocab.json",
    "vocab.txt",
    "tekken.json",
    "tiktoken.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "spm.model",
)


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """What a folder holds. added: tokens that JSON files add to a tokenizer.model, with their ids."""

    folder: Path
    config: dict[str, Any]
    special_map: dict[str, Any]
    added: dict[str, int]
    chat_sources: dict[str, str]

    @property
    def described(self) -> bool:
        """Whether there is more than a tokenizer.model: a tokenizer.json, or another form that transformers reads."""
        return not (self.folder / MODEL).is_file() or (self.folder / DESCRIBED).is_file()

    def named(self, role: str) -> str:
        """Return the spelling of a special token, empty if unset. special_tokens_map.json comes before
        tokenizer_config.json."""
        return special_name(self.special_map, role) or special_name(self.config, role)

    @property
    def max_length(self) -> int | None:
        longest = self.config.get("model_max_length")
        return longest if isinstance(longest, int) and 0 < longest < SANE_LENGTH else None

    def chat_source(self) -> str:
        """Return the Jinja text of the chat template; of several, the one called default. Raises TemplateError if there
        is none."""
        if not self.chat_sources:
            raise TemplateError("the checkpoint has no chat template: pass template=... by name")
        if "default" not in self.chat_sources:
            raise TemplateError(
                f"{self.folder} has the chat templates {', '.join(sorted(self.chat_sources))} and none is called "
                "'default': pass template=... by name"
            )
        return self.chat_sources["default"]


def read_files(folder: Path) -> TokenizerFiles:
    """Read a folder's files. Raises TokenizerError if there is no tokenizer, or a file cannot be read."""
    if not has_tokenizer(folder):
        raise TokenizerError(
            f"{folder} has neither {DESCRIBED} nor {MODEL}: `score_ids` still works; "
            "copy the model's tokenizer files there to score text"
        )
    config = settings(folder / CONFIG)
    return TokenizerFiles(
        folder, config, settings(folder / "special_tokens_map.json"), added_tokens(folder, config),
        read_chat_sources(folder, config),
    )  # fmt: skip


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (DESCRIBED, MODEL, *OTHERS))


def settings(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file, or an empty one if there is no such file. Raises TokenizerError."""
    return read_json(path, TokenizerError) if path.is_file() else {}


def special_name(config: dict[str, Any], role: str) -> str:
    """Return the spelling of a token, given as a string or as an object with `content`; empty if unset."""
    value = config.get(f"{role}_token")
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else ""


def added_tokens(folder: Path, config: dict[str, Any]) -> dict[str, int]:
    found = {text: i for text, i in settings(folder / "added_tokens.json").items() if isinstance(i, int)}
    decoder = config.get("added_tokens_decoder") or {}
    try:
        return found | {token["content"]: int(token_id) for token_id, token in decoder.items()}
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise TokenizerError(f"{folder / CONFIG}: added_tokens_decoder is not readable: {error!r}") from error


def read_chat_sources(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """Return Jinja texts by name. Files of their own replace those in tokenizer_config.json."""
    found = {}
    single = folder / "chat_template.jinja"
    for path in [*sorted((folder / "additional_chat_templates").glob("*.jinja")), single]:
        if path.is_file():
            try:
                found["default" if path == single else path.stem] = path.read_text(encoding="utf-8")
            except (OSError, ValueError) as error:
                raise TokenizerError(f"{path} cannot be read: {error}") from error
    if found:
        return found
    source = config.get("chat_template") or settings(folder / "chat_template.json").get("chat_template")
    if isinstance(source, list):
        try:
            return {entry["name"]: entry["template"] for entry in source}
        except (TypeError, KeyError) as error:
            raise TokenizerError(f"{folder / CONFIG}: chat_template is not readable: {error!r}") from error
    return {"default": source} if isinstance(source, str) else {}

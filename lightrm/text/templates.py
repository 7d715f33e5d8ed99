"""Conversation -> pieces of text: one frozen template for each model family, with the source of its form.

A template yields a list of runs of text and of named special tokens. A user's words only ever go into a `Text`; special
tokens come from the template alone. Slots are replaced, never formatted, so braces in a prompt are text.

BOS and EOS stand for the tokens that the checkpoint's tokenizer files name so.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from lightrm.errors import TemplateError

# {"role": "system" | "user" | "assistant" | "tool", "content": text, or a list of {"type": "text", "text": text}, or
# None where a tool is called}, and fields that a chat template may read.
Turn = dict[str, Any]
# Fields of a turn that a chat template may read, and that the templates of this file cannot express.
READ_ELSEWHERE = (
    "name", "tool_calls", "function_call", "tool_call_id", "reasoning_content", "reasoning", "thinking",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Text:
    """A run of text. glued: it continues the token before it, without the leading space mark of a tokenizer."""

    text: str
    glued: bool = False


@dataclass(frozen=True, slots=True)
class Special:
    """One special token, by its exact spelling, or by the role `bos` or `eos`."""

    name: str


Piece = Text | Special
BOS, EOS = Special("bos"), Special("eos")
Cut = Literal["response end", "prompt start", "each side", "end of the longer text"]
Joined = Literal["all", "prompt", "none"]
# What a trainer does to the end of a text, whatever the template. none: nothing. eos: adds EOS unless it is there (TRL,
# for plain text). openrlhf: strips line breaks, then adds a space and EOS unless EOS is there (OpenRLHF).
Ending = Literal["none", "eos", "openrlhf"]


@dataclass(frozen=True, slots=True)
class Rendered:
    """A text to be tokenized whole. written: spans in which the spelling of a special token is the caller's."""

    text: str
    written: tuple[tuple[int, int], ...]


class WholeTemplate(Protocol):
    """A template whose whole text goes through the checkpoint's own tokenizer. whole: with the BOS and EOS that this
    adds."""

    @property
    def name(self) -> str: ...
    @property
    def cut(self) -> Cut: ...
    @property
    def max_length(self) -> int | None: ...
    @property
    def ending(self) -> Ending: ...
    @property
    def whole(self) -> bool: ...

    def render(self, turns: Sequence[Turn], responses: Sequence[str], specials: re.Pattern[str]) -> list[Rendered]:
        """Return the text of one conversation with each answer. specials: matches the tokens that steer the model."""


@dataclass(frozen=True, slots=True)
class PlainText:
    """The caller's own text: the prompt and the response with nothing between, as `tokenizer(text)` reads it."""

    name: str
    source: str
    ending: Ending = "none"
    cut: Cut = "prompt start"
    max_length: int | None = None
    whole: bool = True

    def __str__(self) -> str:
        return self.name

    def render(self, turns: Sequence[Turn], responses: Sequence[str], specials: re.Pattern[str]) -> list[Rendered]:
        check_said(self.name, turns)
        prompt = "".join(map(said, turns))
        return [Rendered(prompt + response, ((0, len(prompt + response)),)) for response in responses]


@dataclass(frozen=True, slots=True)
class PairTemplate:
    """The prompt is one text of a pair, the response the other (`text.pair_texts`). More turns have no place."""

    name: str
    source: str
    cut: Cut = "end of the longer text"
    max_length: int | None = None

    def __str__(self) -> str:
        return f"{self.name}: tokenizer(prompt, response)"

    def prompt(self, turns: Sequence[Turn]) -> str:
        """Return the one text of a conversation. Raises TemplateError if there is more than one turn."""
        check_said(self.name, turns)
        roles = [str(turn["role"]) for turn in turns]
        if roles != ["user"]:
            raise TemplateError(
                f"template {self.name!r} has a place for one user turn and its answer, found {', '.join(roles)}: write "
                "them into one text as this model's trainer did, or pass template=... to load"
            )
        return str(turns[0]["content"])


@dataclass(frozen=True, slots=True)
class Template:
    """A frozen template.

    opening, user, assistant, closing: pieces with the slot `{}`; the answer begins where `user` ends.
    bos: put BOS first; None does what the tokenizer files say.
    joined: which adjacent texts are tokenized as one string: `all`, those of the `prompt` only, or `none`.
    cut: where a text that is too long is shortened. `response end` keeps EOS; `prompt start` keeps BOS and the whole
    end; `each side` cuts prompt and answer to half of `max_length` each, EOS counted with the answer.
    verified: whether published scores or ids confirm it; the others follow the trainer's code.
    """

    name: str
    source: str
    user: tuple[Piece, ...]
    opening: tuple[Piece, ...] = ()
    assistant: tuple[Piece, ...] = (Text("{}"),)
    closing: tuple[Piece, ...] = (EOS,)
    system: str | None = None
    bos: bool | None = None
    joined: Joined = "all"
    cut: Cut = "response end"
    max_length: int | None = None
    verified: bool = True

    def __str__(self) -> str:
        return self.name if self.verified else f"{self.name}, unverified"

    def before(self, turns: Sequence[Turn]) -> list[Piece]:
        """Return the pieces before the answer. Raises TemplateError if a turn holds something that the template cannot
        express."""
        check_said(self.name, turns)
        system, turns = split_system(turns)
        slot = any("{}" in piece.text for piece in self.opening if isinstance(piece, Text))
        if system is not None and not slot:  # no place for a system text: it opens the first user turn
            if turns[0]["role"] != "user":
                raise TemplateError(f"template {self.name!r}: a system turn must be followed by a user turn")
            first = {"role": "user", "content": f"{system}\n{said(turns[0])}"}
            turns = [first, *turns[1:]]
        before = fill(self.opening, system if system is not None else self.system or "")
        for turn in turns:
            if turn["role"] not in ("user", "assistant"):
                raise TemplateError(
                    f"template {self.name!r} has no place for a turn of role {turn['role']!r}: it knows user and "
                    "assistant, and system as the first"
                )
            before += fill(self.user if turn["role"] == "user" else self.assistant, said(turn))
        if turns[-1]["role"] != "user":
            raise TemplateError(f"template {self.name!r} scores an answer to a user turn, the last turn is not one")
        return before

    def answer(self, response: str) -> list[Piece]:
        """Return the pieces of an answer and what closes it."""
        return [Text(response), *self.closing]


def said(turn: Turn) -> str:
    """Return the content of a turn as one text."""
    content = turn["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content or ())


def check_said(name: str, turns: Sequence[Turn]) -> None:
    """Raise TemplateError if a turn holds more than its content, which would be lost."""
    for turn in turns:
        for field in READ_ELSEWHERE:
            if field in turn:
                raise TemplateError(f"template {name!r} has no place for a turn's {field!r}: write it into its content")


def fill(pieces: Sequence[Piece], content: str) -> list[Piece]:
    return [Text(p.text.replace("{}", content), p.glued) if isinstance(p, Text) else p for p in pieces]


def split_system(turns: Sequence[Turn]) -> tuple[str | None, list[Turn]]:
    """Return the text of a leading system turn, or None, and the other turns."""
    if turns and turns[0]["role"] == "system":
        rest = list(turns[1:])
        if not rest:
            raise TemplateError("a conversation needs a user turn, found only a system turn")
        return said(turns[0]), rest
    return None, list(turns)


LET_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


def efficient_tuning(
    name: str, dates: str, *, system_break: str = "\n", whole_prompt: bool = False, bos: bool | None = False,
    closing: tuple[Piece, ...] = (EOS,),
) -> Template:  # fmt: skip
    """LLaMA-Efficient-Tuning's default template. The ids of a single turn follow its code of those dates.

    Answers are always tokenized apart from the prompt. That later turns are joined by a line break is a guess.
    """
    opening: tuple[Piece, ...] = (Text("{}" + system_break),) if whole_prompt else (Text("{}"), Text(system_break))
    if not system_break:
        opening = (Text("{}"),)
    return Template(
        name=name,
        source=f"LLaMA-Efficient-Tuning, template `default`, {dates}",
        opening=opening,
        user=(Text("Human: {}\nAssistant: "),),
        assistant=(Text("{}\n"),),
        closing=closing,
        system=LET_SYSTEM,
        bos=bos,
        joined="prompt" if whole_prompt else "none",
        cut="each side",
        max_length=1024,
        verified=False,
    )


USER_MARK, ASSISTANT_MARK = Special("<reserved_102>"), Special("<reserved_103>")


def baichuan(name: str, dates: str, *, bos: bool = False, closing: tuple[Piece, ...] = (EOS,)) -> Template:
    """LLaMA-Efficient-Tuning's template for Baichuan chat models, whose pieces are tokenized one by one."""
    return Template(
        name=name,
        source=f"LLaMA-Efficient-Tuning, template `baichuan`, {dates}",
        user=(USER_MARK, Text("{}"), ASSISTANT_MARK),
        closing=closing,
        bos=bos,
        joined="none",
        cut="each side",
        max_length=1024,
        verified=False,
    )


TEMPLATES: dict[str, Template | PlainText | PairTemplate] = {
    template.name: template
    for template in (
        Template(
            name="ziya",
            source="model card of IDEA-CCNL/Ziya-LLaMA-7B-Reward",
            user=(Text("Human:{}\n\nAssistant:"),),
            assistant=(Text("{}\n\n"),),
            bos=True,
            max_length=1024,
        ),
        efficient_tuning("let-default", "up to v0.1.5 (2023-08-02)", whole_prompt=True, bos=None),
        efficient_tuning("let-default-2023-08-04", "2023-08-04 to 08-08", system_break=""),
        efficient_tuning("let-default-0.1.6", "2023-08-09 to 08-17 (v0.1.6)", bos=True),
        efficient_tuning("let-default-0.1.7", "2023-08-17 to 09-07 (v0.1.7)"),
        efficient_tuning("let-default-2023-09-07", "from 2023-09-07", closing=()),
        Template(
            name="let-baichuan",
            source="LLaMA-Efficient-Tuning, template `baichuan`, up to v0.1.5 (2023-08-02)",
            user=(Special("▁"), USER_MARK, Text("{}", glued=True), ASSISTANT_MARK),
            bos=None,
            joined="none",
            cut="each side",
            max_length=1024,
            verified=False,
        ),
        baichuan("let-baichuan-2023-08-04", "2023-08-04 to 08-08, and 08-21 to 09-07"),
        baichuan("let-baichuan-2023-08-09", "2023-08-09 to 08-11", bos=True),
        baichuan("let-baichuan-0.1.6", "2023-08-11 to 08-17 (v0.1.6)", bos=True, closing=(USER_MARK,)),
        baichuan("let-baichuan-0.1.7", "2023-08-17 to 08-21 (v0.1.7)", closing=(USER_MARK,)),
        baichuan("let-baichuan-2023-09-07", "from 2023-09-07", closing=()),
        Template(
            name="ultrarm",
            source="model card of openbmb/UltraRM-13b",
            user=(Text("Human: {}\n\nAssistant: "),),
            assistant=(Text("{}\n\n"),),
            closing=(),
            cut="prompt start",
        ),
        Template(
            name="eurus",
            source="openbmb/Eurus-RM-7b as RewardBench runs it",
            user=(Text("[INST] {} [/INST] "),),
            assistant=(Text("{} "),),
            closing=(),
            cut="prompt start",
            verified=False,
        ),
        Template(
            name="beaver",
            source="PKU-Alignment/safe-rlhf, constants",
            opening=(Text("BEGINNING OF CONVERSATION:"),),
            user=(Text(" USER: {} ASSISTANT:"),),
            assistant=(Text("{}"), EOS),
            cut="prompt start",
        ),
        Template(
            name="oasst",
            source="model card of OpenAssistant/oasst-rm-2.1-pythia-1.4b-epoch-2.5",
            user=(Special("<|prompter|>"), Text("{}"), Special("<|endoftext|>"), Special("<|assistant|>")),
            assistant=(Text("{}"), Special("<|endoftext|>")),
            closing=(Special("<|endoftext|>"),),
            bos=False,
            cut="prompt start",
            verified=False,
        ),
        PlainText("plain", "the caller's own text: the prompt and the response with nothing between"),
        PlainText("plain-eos", "plain, closed with EOS, as TRL's RewardTrainer closes plain text", "eos"),
        PairTemplate("pair", "model card of OpenAssistant/reward-model-deberta-v3-large-v2"),
    )
}
AnyTemplate = Template | WholeTemplate | PairTemplate


def find_template(name: str) -> AnyTemplate:
    """Return the template of a name. Raises TemplateError, which lists the names, if there is none."""
    if name not in TEMPLATES:
        raise TemplateError(
            f"no template {name!r}; there are {', '.join(TEMPLATES)}, and 'chat' for the checkpoint's own"
        )
    return TEMPLATES[name]

"""An answer in steps -> token ids, as each process reward model's own code writes it.

A step's score is read at a token behind the step. Attention is causal, so that is the score of the sequence cut there:
each step becomes the ids from the beginning up to the token at which its score is read. `engine.packing` computes what
they share once.

    extra_0  Qwen2.5-Math-PRM, model card: the chat template with a system prompt; the answer is the steps, each closed
             by `<extra_0>`, where it is read
    lines    Skywork-o1-Open-PRM, prepare_input of its io_utils.py: BOS, the problem and a line break; then each step,
             tokenized by itself, and the last id of a line break, where it is read
    tagged   math-shepherd-mistral-7b-prm, model card: question, a space, and the steps, each closed by " ки", where it
             is read, with a line break between
    turns    RLHFlow's PRMs, prm_evaluate.py: the steps are user turns, the first behind the question, and each is
             answered by "+"; it is read two tokens before the end, where "+" is predicted

No special token in the caller's words acts. Nothing is cut: a text that is too long is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lightrm.errors import InputError, TemplateError, TokenizerError, TooLongError
from lightrm.text.encoding import Tokens
from lightrm.text.guard import Span
from lightrm.text.templates import Turn, check_said

Ids = list[int]
Written = tuple[str, list[Ids]]  # the whole text, and for each step the ids up to where its score is read
MARK, TAG = "<extra_0>", "ки"
SYSTEM = "Please reason step by step, and put your final answer within \\boxed{}."
PLUS = "+"


@dataclass(frozen=True, slots=True)
class StepForm:
    """One way to write steps.

    write: a conversation and its steps -> text and ids. parts: what divides an answer that was given as one text;
    blank: whether parts without a word count as steps, as in the model's own code.
    """

    name: str
    write: Callable[[Tokens, Sequence[Turn], Sequence[str]], Written]
    parts: str
    blank: bool = False

    def divided(self, answer: str) -> list[str]:
        """Return the steps of an answer. Raises InputError if it has none."""
        steps = [step for step in answer.split(self.parts) if self.blank or step.strip()]
        if not steps:
            raise InputError("an answer without a word has no steps to score")
        return steps


def read_marks(tokens: Tokens, turns: Sequence[Turn], steps: Sequence[str]) -> Written:
    """Raises TokenizerError if the tokenizer has no `<extra_0>`, TemplateError if the template changes the answer."""
    mark = tokens.special(MARK)
    if turns[0]["role"] != "system":
        turns = [{"role": "system", "content": SYSTEM}, *turns]
    answer = "".join(step + MARK for step in steps)
    template = tokens.own_template()
    (rendered,) = template.render(turns, [answer], tokens.steering)
    start = rendered.text.rfind(answer)
    if start < 0:
        raise TemplateError("the chat template changes the answer, so that its steps cannot be told apart")
    marks, at = [], start
    for step in steps:
        at += len(step) + len(MARK)
        marks.append((at - len(MARK), at))
    written = without(rendered.written, marks)
    (ids,) = tokens.own.encode_all([rendered.text], whole=True, written=[written])
    return rendered.text, cut_behind(ids, mark, len(steps), MARK)


def read_lines(tokens: Tokens, turns: Sequence[Turn], steps: Sequence[str]) -> Written:
    """Raises InputError on a step with a line break, where Skywork's own code would divide it."""
    question = question_of(turns, "Skywork's process reward models")
    if (broken := next((step for step in steps if "\n" in step), None)) is not None:
        raise InputError(
            f"a step of this model is one line, found a line break in {broken[:60]!r}: pass its lines as steps, or "
            "replace the line break by a space"
        )
    bos = tokens.own.bos
    if not bos:
        raise TokenizerError("Skywork's code puts BOS first, and the tokenizer names none")
    texts = [bos + question + "\n", *steps, "\n"]
    spans = [((len(bos), len(texts[0])),), *(((0, len(text)),) for text in texts[1:])]
    opening, *rest = tokens.own.encode_all(texts, whole=True, written=spans)
    ids, found = list(opening), []
    for step, step_ids in zip(steps, rest, strict=False):
        ids += [*(step_ids if step else ()), rest[-1][-1]]
        found.append(list(ids))
    return texts[0] + "\n".join(steps) + "\n", found


def read_tags(tokens: Tokens, turns: Sequence[Turn], steps: Sequence[str]) -> Written:
    """Raises InputError if a text makes the tag's token itself."""
    text = question_of(turns, "math-shepherd") + " " + "\n".join(f"{step} {TAG}" for step in steps)
    # No special token is spelled by the tag, so the whole text is the caller's.
    ids, tag = tokens.own.encode_all([text, TAG], whole=True, written=[((0, len(text)),), ((0, len(TAG)),)])
    return text, cut_behind(ids, tag[-1], len(steps), TAG)


def read_turns(tokens: Tokens, turns: Sequence[Turn], steps: Sequence[str]) -> Written:
    """Raises TemplateError if the template puts more than one token behind an answer."""
    question = question_of(turns, "RLHFlow's process reward models")
    (plus,) = tokens.own.encode_all([PLUS], whole=True, written=[((0, len(PLUS)),)])
    template, found, text = tokens.own_template(), [], ""
    talk: list[Turn] = []
    for k, step in enumerate(steps):
        said = f"{question} {step.strip()}" if k == 0 else step.strip()
        talk.append({"role": "user", "content": said})
        (rendered,) = template.render(talk, [PLUS], tokens.steering)
        (ids,) = tokens.own.encode_all([rendered.text], whole=False, written=[rendered.written])
        if len(ids) < 3 or ids[-2] != plus[-1]:
            raise TemplateError("the chat template does not end in '+' and one token, as RLHFlow's does")
        found.append(ids[:-2])
        text = rendered.text
        talk.append({"role": "assistant", "content": PLUS})
    return text, found


def cut_behind(ids: Ids, mark: int, count: int, name: str) -> list[Ids]:
    """Return the ids up to each mark. Raises InputError unless there are `count`, one for each step."""
    ends = [k + 1 for k, i in enumerate(ids) if i == mark]
    if len(ends) != count:
        raise InputError(
            f"the text of {count} steps has {len(ends)} tokens {name!r}, which belong behind the steps alone: is one "
            "spelled in the text?"
        )
    return [ids[:end] for end in ends]


def question_of(turns: Sequence[Turn], whose: str) -> str:
    """Return the text of a single user turn. Raises TemplateError on any other conversation."""
    check_said(whose, turns)
    if len(turns) != 1 or turns[0]["role"] != "user":
        raise TemplateError(f"{whose} score steps to one question, found {len(turns)} turns: write them into one")
    return str(turns[0]["content"])


def without(spans: Sequence[Span], marks: Sequence[Span]) -> list[Span]:
    """Return the parts of `spans` that lie in none of the marks. Both are in order."""
    found = []
    for start, end in spans:
        at = start
        for first, last in marks:
            if first < end and last > at:
                if at < first:
                    found.append((at, first))
                at = last
        if at < end:
            found.append((at, end))
    return found


FORMS = {
    form.name: form
    for form in (
        StepForm("extra_0", read_marks, "\n\n"),
        StepForm("lines", read_lines, "\n", blank=True),
        StepForm("tagged", read_tags, "\n"),
        StepForm("turns", read_turns, "\n\n"),
    )
}


@dataclass(frozen=True, slots=True)
class StepTexts:
    """Makes ids of answers in steps. max_length: tokens of one text at most. vocabulary: rows of the embedding. reduce:
    how one score is made of the steps' scores, None if nobody said."""

    tokens: Tokens
    form: StepForm
    max_length: int
    vocabulary: int
    reduce: str | None = None

    def encode(self, turns: Sequence[Turn], steps: Sequence[str]) -> list[Ids]:
        """Return, for each step, the ids up to where its score is read. Errors as in `written`."""
        return self.written(turns, steps)[1] if steps else []

    def written(self, turns: Sequence[Turn], steps: Sequence[str]) -> Written:
        """Return the text of an answer of one step or more, and for each step the ids up to where its score is read.

        Raises InputError, TemplateError or TokenizerError as the form does, TooLongError beyond `max_length`.
        """
        text, found = self.form.write(self.tokens, turns, steps)
        if (length := len(found[-1])) > self.max_length:
            raise TooLongError(f"the steps have {length} tokens, the limit is {self.max_length}: steps are never cut")
        if (largest := max(found[-1])) >= self.vocabulary:
            raise TokenizerError(
                f"the tokenizer gives id {largest}, the embedding has rows 0 to {self.vocabulary - 1}: tokenizer and "
                "weights are not of one model"
            )
        return text, found

"""How a model reads text: its tokenizer and template, how long its texts may be, and where its score is read."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from lightrm.architecture import Architecture
from lightrm.checkpoints.model_files import ModelFiles
from lightrm.checkpoints.score_position import Reading
from lightrm.engine.scoring_engine import Shape
from lightrm.errors import InputError, TemplateError, TokenizerError, UnsupportedModelError
from lightrm.loading.options import LoadOptions
from lightrm.text.chat_template import ChatTemplate
from lightrm.text.conversation import Prompt, opens_itself, responses_of, system_turn, turns_of
from lightrm.text.encoding import Encoded, Tokens, read_tokens
from lightrm.text.explanation import Explanation
from lightrm.text.pair_texts import Segments
from lightrm.text.steps import FORMS, StepTexts
from lightrm.text.templates import AnyTemplate, PairTemplate, Turn, find_template
from lightrm.text.tokenizer_files import has_tokenizer


class TokenizerWarning(UserWarning):
    """A model has a tokenizer that cannot be read: it scores token ids, and no text."""


@dataclass(frozen=True, slots=True)
class TextSide:
    """Turns conversations into the token ids that a model scores.

    tokens, template: None where `missing`, a sentence, says why no text can be scored. folder: where the tokenizer
    lies. reading: where in a sequence the score is read. max_length: tokens of one text at most; strict: raise where a
    text would be cut. vocabulary: rows of the model's embedding. system: the system turn of a prompt that has none.
    steps: how a process reward model reads an answer's steps; None for other models.
    """

    tokens: Tokens | None
    template: AnyTemplate | None
    missing: str
    folder: str
    reading: Reading
    max_length: int
    strict: bool
    vocabulary: int
    system: str | None = None
    steps: StepTexts | None = None

    @property
    def segments(self) -> Segments | None:
        """How the token types of a pair of texts follow from its ids; None for other templates, and if all are 0."""
        pairs = self.tokens is not None and isinstance(self.template, PairTemplate)
        return self.tokens.pairs.segments if self.tokens is not None and pairs else None

    @property
    def side(self) -> str:
        """Where the text of a conversation is cut; "" for a model that scores no text."""
        return "" if self.tokens is None or self.template is None else self.tokens.side(self.template)

    def check(self) -> None:
        """Raise TokenizerError if this model scores no text."""
        self.parts()

    def parts(self) -> tuple[Tokens, AnyTemplate]:
        if self.tokens is None or self.template is None:
            raise TokenizerError(self.missing)
        return self.tokens, self.template

    def encode(self, turns: Sequence[Turn], responses: Sequence[str]) -> list[Encoded]:
        """Return the ids of one conversation with each of its answers, cut to `max_length`.

        Raises TokenizerError, TemplateError, or TooLongError in strict mode.
        """
        tokens, template = self.parts()
        return self.within(tokens.encode(template, self.opened(turns), responses, self.max_length, self.strict))

    def encode_templated(self, texts: Sequence[str]) -> tuple[list[Encoded], str]:
        """Return the ids of texts that are templated already, cut to `max_length`, and which side is cut.

        Raises TokenizerError, TemplateError, or TooLongError in strict mode.
        """
        if self.tokens is None:
            raise TokenizerError(self.missing)
        if self.steps is not None:
            raise InputError("a process reward model scores the steps of an answer: use score_steps, or score")
        if isinstance(self.template, PairTemplate):
            raise TemplateError("this model reads prompt and answer as a pair of texts, not as one: use score")
        found = self.tokens.encode_templated(self.template, texts, self.max_length, self.strict)
        return self.within(found), self.tokens.templated_cut(self.template)

    def opened(self, turns: Sequence[Turn]) -> Sequence[Turn]:
        """Return a conversation with this model's system turn, if there is one and the conversation has none."""
        return turns if self.system is None or opens_itself(turns) else [system_turn(self.system), *turns]

    def within(self, found: list[Encoded]) -> list[Encoded]:
        """Return the same. Raises TokenizerError if the embedding has no row of an id."""
        largest = max((max(encoded.token_ids) for encoded in found), default=0)
        if largest >= self.vocabulary:
            raise TokenizerError(
                f"{self.folder}: the tokenizer gives id {largest}, the embedding has rows 0 to {self.vocabulary - 1}: "
                "tokenizer and weights are not of one model"
            )
        return found

    def explain(self, turns: Sequence[Turn], response: str, encoded: Encoded, score: float) -> Explanation:
        """Return a score with the text, ids and pieces behind it."""
        tokens, template = self.parts()
        pieces = [tokens.piece(i) for i in encoded.token_ids]
        text = tokens.text(template, self.opened(turns), response)
        return Explanation(text, encoded.token_ids, pieces, encoded.cut, str(template), score)

    def read(self, sequences: Iterable[Sequence[int]]) -> list[list[int]]:
        """Return each sequence up to the token that the score is read at; what stands behind it changes nothing.

        Raises InputError if a sequence lacks the token that the score is read at.
        """
        return [self.reading.cut(ids) for ids in sequences]

    def first_texts(self, pairs: Iterable[tuple[Prompt, str]], most: int | None) -> list[list[int]]:
        """Return the ids of calibration texts as scoring would read them: whole texts, from the first on, with at most
        `most` tokens together; all texts if `most` is None.

        Raises TokenizerError for a model without text, InputError if the first text alone has more tokens.
        """
        found: list[list[int]] = []
        count = 0
        for prompt, response in pairs:
            ids = self.whole(turns_of(prompt), responses_of([response]))
            count += len(ids)
            if most is not None and count > most:
                break
            found.append(ids)
        if count and not found:
            raise InputError(f"there is no calibration text of {most} tokens or fewer: the first has {count}")
        return found

    def whole(self, turns: list[Turn], responses: list[str]) -> list[int]:
        """Return the ids of one answer as scoring would read them; of a process reward model, up to its last step."""
        (response,) = responses
        if self.steps is not None:
            return self.steps.encode(turns, self.steps.form.divided(response))[-1]
        (encoded,) = self.encode(turns, responses)
        return self.reading.cut(encoded.token_ids)


def text_side(checkpoint: ModelFiles, a: Shape, options: LoadOptions) -> TextSide:
    """Read a checkpoint's tokenizer and choose its template.

    Raises InputError for max_length; TokenizerError or TemplateError only where a template was asked for by name.
    """
    check_length(options.max_length, a)
    if checkpoint.layout.steps:
        return step_side(checkpoint, a, options)
    template, folder = options.template, checkpoint.base_folder

    def side(tokens: Tokens | None, form: AnyTemplate | None, missing: str) -> TextSide:
        longest = length_limit(options.max_length, form, tokens, a)
        return TextSide(
            tokens, form, missing, str(folder), checkpoint.reading, longest, options.strict, a.vocabulary,
            options.system,
        )  # fmt: skip

    try:
        folder = checkpoint.tokenizer_folder()
        tokens = read_tokens(
            folder,
            parse_specials=options.parse_specials,
            reward_id=checkpoint.reward_id,
            ending=checkpoint.layout.ending,
        )
    except TokenizerError as error:
        if template is not None:
            raise
        if has_tokenizer(folder) or checkpoint.inner is not None:
            warnings.warn(f"only token ids can be scored: {error}", TokenizerWarning, stacklevel=4)
        return side(None, None, str(error))
    name = template or checkpoint.template
    if name is None or (name == "chat" and template is None and not tokens.files.chat_sources):
        layout = checkpoint.layout.name
        return side(tokens, None, f"layout {layout} does not say how its prompts look: pass template=... to load")
    try:
        form = template_of(name, tokens, checkpoint.layout.whole)
    except TemplateError as error:
        if template is not None:
            raise
        return side(tokens, None, str(error))  # nobody asked for it: `score_ids` works without
    return side(tokens, form, "")


def step_side(checkpoint: ModelFiles, a: Shape, options: LoadOptions) -> TextSide:
    """Return the text side of a process reward model, whose own code says how its texts look. Raises InputError if a
    template or a system turn was asked for."""
    for name, given in (("template", options.template), ("system", options.system)):
        if given is not None:
            raise InputError(f"a process reward model's texts have the form of its own code: load it without {name}=")
    if isinstance(a, Architecture) and a.scaled_from is not None and checkpoint.layout.steps != "turns":
        raise UnsupportedModelError(
            f"{checkpoint.config.path}: with longrope the whole answer decides how its steps turn, and lightrm reads "
            "each step in a text that ends there: it does not run this model"
        )
    folder, missing = checkpoint.tokenizer_folder(), "a process reward model scores steps: use score_steps"
    tokens, steps = None, None
    try:
        tokens = read_tokens(folder, parse_specials=options.parse_specials)
    except TokenizerError as error:
        if has_tokenizer(folder):
            warnings.warn(f"only token ids can be scored: {error}", TokenizerWarning, stacklevel=5)
        missing = str(error)
    longest = length_limit(options.max_length, None, tokens, a)
    if tokens is not None:
        steps = StepTexts(tokens, FORMS[checkpoint.layout.steps], longest, a.vocabulary, options.reduce)
    return TextSide(
        tokens, None, missing, str(folder), checkpoint.reading, longest, options.strict, a.vocabulary, steps=steps
    )


def template_of(name: str, tokens: Tokens, whole: bool) -> AnyTemplate:
    """Return a template whose texts this tokenizer can read. Raises TemplateError or TokenizerError."""
    form: AnyTemplate = find_template(name) if name != "chat" else tokens.own_template()
    if isinstance(form, ChatTemplate):
        form = replace(form, whole=whole)
    tokens.prepare(form)
    return form


def check_length(asked: int | None, a: Shape) -> None:
    """Raise InputError if a max_length is below 8 or above the model's positions."""
    if asked is not None and not 8 <= asked <= a.max_positions:
        raise InputError(f"max_length must be between 8 and this model's {a.max_positions} positions, found {asked}")


def length_limit(asked: int | None, template: AnyTemplate | None, tokens: Tokens | None, a: Shape) -> int:
    """Return the longest sequence in tokens: what was asked for, else the template's limit, else the tokenizer's; never
    more than the model has positions."""
    own = template.max_length if template is not None else None
    if own is None and tokens is not None:
        own = tokens.max_length
    return min(asked or own or a.max_positions, a.max_positions)

"""A checkpoint that transformers' own class reads: its files as far as they can be read without the weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lightrm.checkpoints.adapter import is_adapter
from lightrm.checkpoints.config import Config
from lightrm.checkpoints.layout import Outputs
from lightrm.checkpoints.named_class import OPEN_ASSISTANT, NamedClass
from lightrm.checkpoints.quantized import settings_of
from lightrm.checkpoints.score_position import Reading
from lightrm.checkpoints.source import TensorSource, check_index, main_files
from lightrm.errors import TokenizerError, UnsupportedModelError
from lightrm.text.templates import Ending
from lightrm.text.tokenizer_files import read_files


@dataclass(frozen=True, slots=True)
class ClassLayout:
    """Stands where a layout of lightrm's own would: the class knows which tensor is which."""

    name: str
    describes: str
    ending: Ending = "none"
    whole: bool = False
    steps: str = ""
    outputs: Outputs = "attributes"
    asked: bool = False
    rows: None = None
    gate: None = None


@dataclass(frozen=True, slots=True)
class ClassCheckpoint:
    """named: the class. source: the weights, whose names and shapes were read. packed: whether its layers are those of
    a GPTQ file, which transformers hands to optimum and GPTQModel."""

    folder: Path
    config: Config
    named: NamedClass
    source: TensorSource
    packed: bool = False

    @property
    def base_folder(self) -> Path:
        return self.folder

    @property
    def layout(self) -> ClassLayout:
        return ClassLayout(self.named.name, f"transformers {self.named.runs}")

    @property
    def sources(self) -> tuple[TensorSource, ...]:
        return (self.source,)

    @property
    def reward_id(self) -> None:
        return None

    @property
    def inner(self) -> None:
        return None

    @property
    def reading(self) -> Reading:
        if self.named.pooling == "mean":
            return Reading("own", f"the mean over all tokens, as {self.named.name} reads")
        if self.named.pooling == "last":
            return Reading("last", f"as {self.named.name} reads")
        return Reading("own", f"the place that transformers' {self.named.name} reads")

    @property
    def template(self) -> str:
        """An encoder's texts are pairs, unless its files hold a chat template: no bare encoder's do."""
        if self.named.name == OPEN_ASSISTANT:
            return "oasst"
        return "pair" if self.named.pairs and not self.has_chat else "chat"

    @property
    def has_chat(self) -> bool:
        try:
            return bool(read_files(self.folder).chat_sources)
        except TokenizerError:
            return False

    @property
    def stored(self) -> set[str]:
        """The dtypes of the float tensors in the file."""
        dtypes = {self.source.dtype(name) for name in self.source.names}
        return {str(d).removeprefix("torch.") for d in dtypes if d is not None and d.is_floating_point}

    def tokenizer_folder(self) -> Path:
        return self.folder

    def bytes(self) -> int:
        return self.source.bytes()


def open_class_checkpoint(folder: Path, config: Config, named: NamedClass, asked: bool) -> ClassCheckpoint:
    """Read names and shapes of a folder's tensors. Raises a CheckpointError for a damaged file, or for one that holds
    anything but a whole model in float; in GPTQ's format only if the caller asked for transformers."""
    if is_adapter(folder):
        raise UnsupportedModelError(
            f"{folder} is an adapter of {named.name}, and lightrm merges adapters of its own decoders only: merge it "
            "with peft (merge_and_unload), save the model, and load that folder"
        )
    packed = holds_gptq(folder, config, asked)
    source = TensorSource(main_files(folder))
    check_index(folder, source)
    return ClassCheckpoint(folder, config, named, source, packed)


def holds_gptq(folder: Path, config: Config, asked: bool) -> bool:
    """Whether the layers are in GPTQ's format and the caller asked for transformers. Raises UnsupportedModelError if
    they are quantized otherwise."""
    settings = settings_of(config, folder)
    if settings is None:
        return False
    # transformers reads what config.json itself says, and no file beside it
    if asked and settings.method == "gptq" and config.entries("quantization_config"):
        return True
    raise UnsupportedModelError(
        f"{settings.where} says that the weights are quantized by {settings.method!r}; through transformers, lightrm "
        "runs full-precision files, with scheme='nf4' or 'bnb-int8' if you like; GPTQ files with engine='transformers'"
    )

"""Every error that lightrm raises on purpose.

LightRMError
├── CheckpointError            something about the files of a model
│   ├── ConfigError            config.json cannot be read or lacks a field
│   ├── UnsupportedModelError  a model that lightrm does not run, named
│   ├── MissingHeadError       no value head: never replaced by a random one
│   ├── TensorMismatchError    tensors missing, unexpected or of the wrong shape
│   ├── CorruptFileError       a file that is empty, cut short or not what its name says
│   ├── UnsafePickleError      a pickle that holds more than tensors
│   └── DownloadError          a hub id that could not be fetched
├── TokenizerError             tokenizer files missing or unreadable
├── TemplateError              no such template, or it cannot express the conversation
├── SchemeError                no such scheme, or not on this device
├── InputError (ValueError)    what the caller passed to a scoring call
│   └── TooLongError           over the length limit in strict mode
├── MemoryLimitError           one sequence that the memory has no room for
├── CopyError (TypeError)      a model in memory that was to be pickled or copied
└── NumericsError              NaN or Inf in weights or scores
"""

from __future__ import annotations


class LightRMError(Exception):
    """The root: `except lightrm.LightRMError` catches everything below."""


class CheckpointError(LightRMError):
    """Something about the files of a model."""


class ConfigError(CheckpointError):
    """config.json (or one beside it) cannot be read, or a field is missing or of the wrong type."""


class UnsupportedModelError(CheckpointError):
    """The files are fine, but lightrm does not run this kind of model."""


class MissingHeadError(CheckpointError):
    """No value head was found. A random head would give random scores, so loading stops."""


class TensorMismatchError(CheckpointError):
    """Tensors are missing, unexpected, or of the wrong shape."""


class CorruptFileError(CheckpointError):
    """A file is empty, cut short, or not of the format that its name promises."""


class UnsafePickleError(CheckpointError):
    """A pickle asks for more than plain tensors; lightrm never runs code from a checkpoint."""


class DownloadError(CheckpointError):
    """A hub id could not be fetched, and the cache does not hold it."""


class TokenizerError(LightRMError):
    """Tokenizer files are missing or unreadable."""


class TemplateError(LightRMError):
    """No such template, or the template cannot express this conversation."""


class SchemeError(LightRMError):
    """No such quantization scheme, or the device cannot run it."""


class InputError(LightRMError, ValueError):
    """The caller passed something that cannot be scored."""


class TooLongError(InputError):
    """A text is over the length limit, and `strict=True` forbids cutting it."""


class MemoryLimitError(LightRMError):
    """A single sequence needs more memory than there is."""


class CopyError(LightRMError, TypeError):
    """A model in memory cannot be pickled or copied: load it where it is needed."""


class NumericsError(LightRMError):
    """NaN or Inf in weights or scores."""

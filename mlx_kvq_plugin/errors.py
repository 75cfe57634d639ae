"""Every error this package raises on purpose, in one tree.

Messages are one sentence each: what must hold, what was got, what to do.
"""


class KVQError(Exception):
    """Base of every error raised on purpose by mlx-kvq-plugin."""


class SchemeError(KVQError, ValueError):
    """A `kv_scheme` string or `KVQConfig` value cannot be used."""


class CodecError(KVQError, ValueError):
    """A codec name, parameter or input shape cannot be used."""


class CodebookError(KVQError):
    """A stored codebook is damaged, or its folder cannot be used."""


class AllocationError(KVQError):
    """Bits cannot be allocated as asked."""


class CalibrationError(KVQError):
    """A calibration cannot be made, found or used."""


class UnsupportedModelError(KVQError):
    """No model adapter serves this architecture, or the check of one failed."""


class PluginError(KVQError):
    """An entry point is broken, or two of them claim the same name."""


class GenerationError(KVQError, ValueError):
    """An argument of `generate`, a pipeline or a generation config cannot be used."""


class AttentionError(KVQError):
    """No attention function accepts the arguments."""


class CacheStateError(KVQError):
    """A saved cache state cannot be used by this version."""


class PromptCacheError(KVQError):
    """A prompt-cache file cannot be used; nothing was changed."""


class PromptCacheFormatError(PromptCacheError):
    """The file is not a kvq prompt cache, or it is truncated."""


class PromptCacheCorruptError(PromptCacheError):
    """A checksum in the file does not match its content."""


class PromptCacheVersionError(PromptCacheError):
    """The file was written by a newer version of the format."""


class PromptCacheModelError(PromptCacheError):
    """The file belongs to another model."""


class PromptCacheHubError(PromptCacheError):
    """A repository does not take the file, or does not give it out."""


class DemoModelError(KVQError):
    """A demo model could not be downloaded, verified or converted."""


class CorpusError(KVQError, ValueError):
    """No text of this name ships with the package."""


class KernelError(KVQError):
    """A GPU kernel cannot be built for a device, a codec or a shape."""

"""Prompt caches on disk: one safetensors file, checked before it is used, written atomically.

The arrays and the index are laid out as `mlx_lm.models.cache.save_prompt_cache` does, so mlx-lm's own
`load_prompt_cache` (and `mlx_lm.generate --prompt-cache-file`) reads the file once this package is imported. On top,
the metadata entry `kvq` is a JSON header (format version, scheme, adapter, model fingerprint, token ids) and
`kvq_digest` is a BLAKE2b digest of the whole file, computed with that field as zeros.

A model that is spread over several ranks has one file per rank, `name.rank0of2.safetensors`, in format 2, whose header
says which rank of how many wrote it. Files of a whole model are in format 1, as ever.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models import cache as mlx_cache
from safetensors import SafetensorError, safe_open

from .distributed import Placement, placement_of, rankless
from .errors import (
    PromptCacheCorruptError,
    PromptCacheFormatError,
    PromptCacheModelError,
    PromptCacheVersionError,
)
from .loading import compression_of
from .report import cache_report

FORMAT = 2  # the newest; a whole model's file is written as 1, which has no `_PART` in its header

_PART = ("rank", "ranks", "sharding")
_DIGEST_SIZE = 32
_PLACEHOLDER = "0" * (2 * _DIGEST_SIZE)
_DIGEST_KEY = "kvq_digest"
_PIECE = 1 << 22
_FLOAT16_NORMAL = 2.0**-14  # smaller numbers lose digits in float16


@dataclass(frozen=True)
class PromptCacheInfo:
    """The header of a prompt-cache file.

    Attributes:
        format: version of the file format.
        scheme, adapter: of the model that made the cache; `fp16` and empty for an uncompressed one.
        model: repository or path the model came from; may be empty.
        fingerprint: of the model's parameters.
        layers: number of cache entries.
        tokens: stored tokens.
        token_ids: the tokens, or empty if they were not given.
        nbytes, fp16_nbytes: bytes held by the caches, and of the same tokens in 16 bits.
        notes: remark on every cache entry.
        metadata: what the caller stored.
        rank, ranks: which part of the model made it, of how many; 0 of 1 for a whole model.
        sharding: how the model was split (`Placement.sharding`).
    """

    format: int
    scheme: str
    adapter: str
    model: str
    fingerprint: str
    layers: int
    tokens: int
    token_ids: tuple[int, ...]
    nbytes: int
    fp16_nbytes: int
    notes: tuple[str, ...]
    metadata: dict[str, str]
    rank: int = 0
    ranks: int = 1
    sharding: str = ""


def model_fingerprint(model: Any, any_float: bool = False) -> str:
    """Digest of the names, shapes, dtypes and 64 sampled values of every parameter: changes with weights or dtype.

    With `any_float` all float dtypes that the same weights were cast to have one digest: values are compared as
    bfloat16, and those that float16 has too few digits for not at all.
    """
    digest = hashlib.blake2b(digest_size=16)
    samples = []
    parameters: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    for name, value in sorted(parameters.items()):
        sample = value.reshape(-1)[:: max(1, value.size // 64)][:64]
        if any_float and mx.issubdtype(value.dtype, mx.floating):
            sample = mx.where(mx.abs(sample) < _FLOAT16_NORMAL, 0.0, sample).astype(mx.bfloat16)
        digest.update(f"{name} {value.shape} {sample.dtype};".encode())
        samples.append(mx.contiguous(sample).view(mx.uint8))
    mx.eval(samples)
    for sample in samples:
        digest.update(np.array(sample).tobytes())
    return digest.hexdigest()


def save_prompt_cache(
    path: str | Path,
    cache: list[Any],
    *,
    model: Any,
    token_ids: Sequence[int] = (),
    metadata: dict[str, str] | None = None,
) -> PromptCacheInfo:
    """Write a prompt cache atomically: the file is complete under its name, or not there.

    Args:
        path: must end in `.safetensors`; the part of rank 0 of 2 goes to `name.rank0of2.safetensors`.
        cache: caches of every layer, as from `make_prompt_cache`, with at least one token.
        model: the model that filled them; its fingerprint is stored.
        token_ids: the tokens the caches hold, if known.
        metadata: strings to store along; keys without dots. `model` and `tokenizer_config`, which
            `mlx_lm.generate --prompt-cache-file` asks for, are filled in when absent.

    Returns:
        The header written.

    Raises:
        PromptCacheFormatError: for a wrong suffix, an empty cache, or metadata that cannot be stored.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise PromptCacheFormatError(f"a prompt-cache file must end in .safetensors, got {path.name!r}; rename it")
    report = cache_report(cache)
    if report.tokens == 0:
        raise PromptCacheFormatError(
            "a prompt cache must hold tokens to be saved, got empty caches; run the model first"
        )
    stored = dict(metadata or {})
    for key, value in stored.items():
        if "." in key or not isinstance(value, str) or key in ("kvq", _DIGEST_KEY):
            raise PromptCacheFormatError(
                f"metadata must map names without dots (and not kvq) to strings, got {key!r}: {value!r}"
            )
    maker, placement = compression_of(model), placement_of(model)
    path = placement.file(path)
    info = PromptCacheInfo(
        format=FORMAT if placement.ranks > 1 else 1,
        scheme=maker.scheme if maker else "fp16",
        adapter=maker.adapter.name if maker else "",
        model=stored.get("model", maker.source if maker else ""),
        fingerprint=model_fingerprint(model),
        layers=len(cache),
        tokens=report.tokens,
        token_ids=tuple(int(token) for token in token_ids),
        nbytes=report.nbytes,
        fp16_nbytes=report.fp16_nbytes,
        notes=tuple(layer.note for layer in report.layers),
        metadata=stored,
        rank=placement.rank,
        ranks=placement.ranks,
        sharding=placement.sharding,
    )
    header = {name: value for name, value in asdict(info).items() if placement.ranks > 1 or name not in _PART}
    stored = {"model": info.model, "tokenizer_config": "{}", **stored}
    stored |= {"kvq": json.dumps(header), _DIGEST_KEY: _PLACEHOLDER}
    scratch = path.with_name(f".{path.stem}.{os.getpid()}.{secrets.token_hex(4)}.tmp.safetensors")
    try:
        mlx_cache.save_prompt_cache(str(scratch), cache, stored)
        _seal(scratch)
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)
    return info


def _digest_position(path: Path) -> int:
    """Byte position of the digest's value in the file's header, or -1."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length)
    marker = f'{_DIGEST_KEY}":"'.encode()
    at = header.find(marker)
    return -1 if at < 0 else 8 + at + len(marker)


def _digest(path: Path, position: int) -> str:
    """Digest of the file with the bytes of the digest itself as zeros."""
    digest = hashlib.blake2b(digest_size=_DIGEST_SIZE)
    with path.open("rb") as file:
        digest.update(file.read(position))
        file.read(len(_PLACEHOLDER))
        digest.update(_PLACEHOLDER.encode())
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()


def _seal(path: Path) -> None:
    """Put the digest in, and the file on the disk."""
    position = _digest_position(path)
    value = _digest(path, position)
    with path.open("r+b") as file:
        file.seek(position)
        file.write(value.encode())
        file.flush()
        os.fsync(file.fileno())


def read_prompt_cache_info(path: str | Path) -> PromptCacheInfo:
    """The header of a prompt-cache file; reads no arrays and checks no digest.

    Raises:
        PromptCacheFormatError: for a missing, truncated or foreign file.
        PromptCacheVersionError: for a newer format.
    """
    path = Path(path)
    if not path.is_file():
        raise PromptCacheFormatError(f"a prompt-cache file must exist, got {str(path)!r}; check the path")
    try:
        with safe_open(path, framework="np") as file:
            flat = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise PromptCacheFormatError(
            f"{path.name} must be a complete safetensors file, got {str(error).splitlines()[0]}; it is truncated or "
            "damaged: make it again"
        ) from error
    text = flat.get("0.kvq")
    if text is None or f"0.{_DIGEST_KEY}" not in flat:
        raise PromptCacheFormatError(
            f"{path.name} must be written by kvq.save_prompt_cache, got a safetensors file without its header; "
            "load it with the program that wrote it"
        )
    try:
        header = json.loads(text)
        version = int(header["format"])
    except (ValueError, TypeError, KeyError) as error:
        raise PromptCacheCorruptError(
            f"the header of {path.name} must be readable, got {error!r}; make it again"
        ) from error
    if version > FORMAT:
        raise PromptCacheVersionError(
            f"{path.name} must have format {FORMAT} or less, got {version}; install a newer mlx-kvq-plugin"
        )
    try:
        header["token_ids"], header["notes"] = tuple(header["token_ids"]), tuple(header["notes"])
        return PromptCacheInfo(**header)
    except (TypeError, KeyError) as error:
        raise PromptCacheCorruptError(
            f"the header of {path.name} must be complete, got {error!r}; make it again"
        ) from error


def _part_file(path: Path, placement: Placement) -> Path:
    """The file to read for `path`: this rank's own, else one that explains in its header why there is none."""
    if placement.file(path).is_file():
        return placement.file(path)
    if path.is_file():
        return path
    family = rankless(path)
    others = sorted(path.parent.glob(f"{glob.escape(family.stem)}.rank*of*{glob.escape(family.suffix)}"))
    return others[0] if others else placement.file(path)


def _ranks(count: int) -> str:
    return "1 rank" if count == 1 else f"{count} ranks"


def _check_part(path: Path, info: PromptCacheInfo, placement: Placement) -> None:
    if info.ranks != placement.ranks:
        raise PromptCacheModelError(
            f"{path.name} must be resumed with as many ranks as saved it, got {_ranks(placement.ranks)} for a file of "
            f"{_ranks(info.ranks)}; start {_ranks(info.ranks)} or make the cache again"
        )
    if info.rank != placement.rank:
        raise PromptCacheModelError(
            f"rank {placement.rank} must find its own file {placement.file(path).name}, got only {path.name}; "
            "copy it here or make the cache again"
        )
    if info.sharding != placement.sharding:
        raise PromptCacheModelError(
            f"{path.name} must be resumed on a model that is split as when it was saved ({info.sharding}), got a split "
            f"by {placement.sharding}; load the model that way or make the cache again"
        )


def verify_prompt_cache(path: str | Path, model: Any = None) -> PromptCacheInfo:
    """Check a prompt-cache file entirely, and that it belongs to `model` if one is given; reads the whole file.

    Args:
        path: the file; for a part of a model also the name without `.rank0of2`, which stands for this rank's file.
        model: the model that should continue it.

    Raises:
        PromptCacheFormatError, PromptCacheVersionError: as `read_prompt_cache_info`.
        PromptCacheCorruptError: when the digest does not match the content.
        PromptCacheModelError: when another model made it, or another rank or number of ranks.
    """
    path, placement = Path(path), None if model is None else placement_of(model)
    if placement is not None:
        path = _part_file(path, placement)
    info = read_prompt_cache_info(path)
    with safe_open(path, framework="np") as file:
        expected = file.metadata()[f"0.{_DIGEST_KEY}"]
    found = _digest(path, _digest_position(path))
    if found != expected:
        raise PromptCacheCorruptError(
            f"the digest of {path.name} must be {expected[:12]}..., got {found[:12]}...; the file changed after it was "
            "written: make it again"
        )
    if placement is not None:
        _check_part(path, info, placement)
    if model is not None and model_fingerprint(model) != info.fingerprint:
        raise PromptCacheModelError(
            f"{path.name} must be made by this very model (weights and dtype), got one made by "
            f"{info.model or 'an unnamed model'}; load that model or make the cache again"
        )
    return info


def _loaded(path: Path, model: Any, placement: Placement) -> tuple[list[Any], PromptCacheInfo]:
    info = verify_prompt_cache(path, model)
    caches = mlx_cache.load_prompt_cache(str(_part_file(path, placement)))
    mx.eval([cache.state for cache in caches])  # lazy arrays would read the file later, when it may be gone
    for cache, note in zip(caches, info.notes, strict=True):
        cache.kvq_note = note
    return list(caches), info


def _content(info: PromptCacheInfo) -> int:
    """A number above 0 that files of one save have in common."""
    text = json.dumps([info.scheme, info.tokens, info.token_ids, info.metadata], sort_keys=True)
    return 1 + int.from_bytes(hashlib.blake2b(text.encode(), digest_size=3).digest(), "little")


def load_prompt_cache(path: str | Path, model: Any) -> tuple[list[Any], PromptCacheInfo]:
    """Read a prompt cache for `model`, after `verify_prompt_cache`.

    On a model that is spread over several ranks every rank must call this: they all raise when one of them cannot read
    its file, since the others would wait for it for ever.

    Returns:
        The caches, one per layer, which continue bit for bit where they were saved, and the header.

    Raises:
        PromptCacheError: as `verify_prompt_cache`; nothing is changed then.
    """
    path, placement = Path(path), placement_of(model)
    try:
        caches, info = _loaded(path, model, placement)
    except Exception:
        placement.gather(0)
        raise
    contents = placement.gather(_content(info))
    if 0 in contents:
        raise PromptCacheModelError(
            f"every rank must be able to read its file of {path.name}, got an error on rank {contents.index(0)}; "
            "see the message there"
        )
    if len(set(contents)) > 1:
        raise PromptCacheModelError(
            f"the files of {path.name} must hold the same tokens on every rank, got files of different saves; "
            "save again on all ranks"
        )
    return caches, info

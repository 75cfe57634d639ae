"""The state of a cache: what `cache.state` gives to files and copies, and how it is read back.

Arrays without slack, and one JSON string `meta` with everything else, so that a cache is rebuilt before any model or
codec is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from .codecs import Codec
from .errors import CacheStateError
from .frame import KeyFrame

if TYPE_CHECKING:
    from .cache import KVQCache

VERSION = 3  # frames have a constant since 2, channels of values have scales since 3


def pad_tokens(x: mx.array, count: int) -> mx.array:
    """`count` zero tokens appended on axis 2."""
    if count <= 0:
        return x
    return mx.concatenate([x, mx.zeros((*x.shape[:2], count, x.shape[3]), x.dtype)], axis=2)


def state_of(cache: KVQCache) -> dict[str, Any]:
    """The state of a cache that has packed what it can; arrays are views."""
    state: dict[str, Any] = {"meta": json.dumps(_meta(cache), sort_keys=True)}
    if cache.dense_keys is not None:
        keys, values = cache.dense_tokens()
        state["dense"] = {"keys": keys, "values": values}
    if cache._packed:
        state["key_planes"], state["value_planes"] = cache.live_planes(views=True)
    if cache.frame is not None:
        state["frame"] = {name: getattr(cache.frame, name) for name in ("mean", "scale", "constant")}
    if cache.value_scale is not None:
        state["value_scale"] = cache.value_scale
    for name in ("key_statistics", "value_statistics"):
        if getattr(cache, name):
            state[name] = dict(getattr(cache, name))
    if cache._query_energy is not None:
        state["query_energy"] = cache._query_energy
    return state


def _meta(cache: KVQCache) -> dict[str, Any]:
    meta: dict[str, Any] = {
        "version": VERSION,
        "spec": cache.spec.to_dict(),
        "codecs": [cache.key_codec.to_json(), cache.value_codec.to_json()],
        "rotary": cache.rotary.to_dict(),
        "route": cache.route,
        "offset": cache.offset,
        "packed": cache._packed,
        "dense": cache._dense,
        "step": cache._step,
        "shared": cache.shared,
        "padding_refused": cache.padding_refused,
        "frozen": cache._frozen,
        **cache._kind_meta(),
    }
    if cache.dense_keys is not None:
        meta["dense_capacity"] = cache.dense_keys.shape[2]
    if cache.key_planes:
        meta["plane_capacity"] = cache.plane_rows - cache._packed_start
    if cache._rows:
        meta["rows"] = {str(tokens): list(lengths) for tokens, lengths in cache._rows.items()}
    return meta


def meta_of(state: dict[str, Any]) -> dict[str, Any]:
    """The JSON part of a state.

    Raises:
        CacheStateError: for a newer version.
        CodecError: when an installed codec writes other bytes than the state's.
    """
    meta: dict[str, Any] = json.loads(state["meta"])
    if meta["version"] > VERSION:
        raise CacheStateError(
            f"a cache state must have version {VERSION} or less, got {meta['version']}; install a newer mlx-kvq-plugin"
        )
    for config in meta["codecs"]:
        Codec.from_json(config)
    return meta


def restore(cache: KVQCache, meta: dict[str, Any], state: dict[str, Any]) -> None:
    """Put a state into an empty cache of its spec."""
    cache.shared, cache.padding_refused = meta.get("shared", False), meta.get("padding_refused", "")
    cache.offset, cache._packed, cache._dense = meta["offset"], meta["packed"], meta["dense"]
    cache._step, cache._frozen = meta["step"], meta["frozen"]
    if "dense" in state:
        slack = meta["dense_capacity"] - cache._dense
        cache.dense_keys = pad_tokens(state["dense"]["keys"], slack)
        cache.dense_values = pad_tokens(state["dense"]["values"], slack)
    if cache._packed:
        cache._rows = {int(tokens): tuple(lengths) for tokens, lengths in meta.get("rows", {}).items()}
        slack = meta["plane_capacity"] - cache._packed
        keys, values = cache._shared_planes()

        def padded(planes: dict[str, mx.array], shared: Mapping[str, int]) -> dict[str, mx.array]:
            found = {name: rows if name in shared else pad_tokens(rows, slack) for name, rows in planes.items()}
            return {name: mx.contiguous(rows) for name, rows in found.items()}  # what kernels need and views are not

        cache.key_planes = padded(state["key_planes"], keys)
        cache.value_planes = padded(state["value_planes"], values)
    if "frame" in state:
        mean, scale = state["frame"]["mean"], state["frame"]["scale"]
        constant = state["frame"].get("constant")  # states of version 1 have none
        cache.frame = KeyFrame(cache.rotary, mean, scale, mx.zeros_like(mean) if constant is None else constant)
    cache.value_scale = state.get("value_scale")
    if cache.scales_values and cache._frozen and cache.value_scale is None and cache.dense_values is not None:
        B, H, _, D = cache.dense_values.shape  # states before version 3 have none
        cache.value_scale = mx.ones((B, H, 1, D))
    cache.key_statistics = dict(state.get("key_statistics", {}))
    cache.value_statistics = dict(state.get("value_statistics", {}))
    cache._query_energy = state.get("query_energy")

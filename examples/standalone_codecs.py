"""Codecs, distortion curves and a compressed cache on plain arrays, without any model.

    python examples/standalone_codecs.py

Everything is NumPy here; MLX arrays work as well.
"""

import mlx.core as mx
import mlx.nn as nn
import numpy as np

import mlx_kvq_plugin as kvq

HEADS, TOKENS, DIM = 4, 512, 128
draw = np.random.default_rng(0)


def relative_error(x: np.ndarray, decoded: np.ndarray) -> float:
    """Squared error over energy."""
    x = x.astype(np.float64)
    return float(np.sum((x - decoded) ** 2) / np.sum(x**2))


def compare_codecs() -> None:
    """One line a codec: what it stores and what it costs on random directions."""
    x = draw.standard_normal((HEADS, TOKENS, DIM)).astype(np.float16)
    print("codec      bits  error   planes")
    for name in ("tq2", "rvq1", "grouped2", "polar3", "tq4", "affine4"):
        codec = kvq.get_codec(name)
        planes = codec.encode(x)
        error = relative_error(x, codec.decode(planes, DIM))
        shapes = ", ".join(f"{key} {plane.dtype}{plane.shape}" for key, plane in planes.items())
        print(f"{name:9s} {codec.bits_per_element(DIM):5.2f}  {error:.4f}  {shapes}")


def fit_curves() -> None:
    """How fast the error falls with the bits, a factor beta each, on numbers with heavy tails."""
    x = draw.standard_t(3, (HEADS, TOKENS, DIM))
    print("\nfamily    alpha   beta   (error = alpha * beta ** -bits)")
    for family in ("affine", "grouped", "tq"):
        curve = kvq.fit_distortion_curve(family, x, bits=(2, 3, 4))
        print(f"{family:9s} {curve.alpha:5.2f}  {curve.beta:5.2f}")


def attend_to_a_cache() -> None:
    """Keys with a common mean, turned by RoPE: the frame that knows the rope takes the mean out again."""
    rope = nn.RoPE(DIM)
    before = draw.standard_normal((1, HEADS, TOKENS, DIM)) + 4 * draw.standard_normal(DIM)
    keys = np.array(rope(mx.array(before.astype(np.float32))))[0].astype(np.float16)
    values = draw.standard_normal((HEADS, TOKENS, DIM)).astype(np.float16)
    queries = draw.standard_normal((4 * HEADS, TOKENS, DIM)).astype(np.float16)
    exact = reference(queries[:, -1:], keys, values)
    print("\ncache              tokens  packed    bytes  of fp16  error of keys  of the output")
    for label, scheme, options in (
        ("tq3, with the rope", "tq3", {"rope": rope}),
        ("tq3, without it", "tq3", {}),
        ("identity", "identity", {}),
    ):
        kv = kvq.CompressedKV(scheme, **options)
        kv.append(keys[:, :-1], values[:, :-1])
        kv.attend(queries[:, :-1])
        kv.append(keys[:, -1:], values[:, -1:])
        output = kv.attend(queries[:, -1:])
        errors = relative_error(keys, np.array(kv.decode()[0])[0]), relative_error(exact, output)
        print(
            f"{label:18s} {kv.tokens:6d}  {kv.packed_tokens:6d}  {kv.nbytes:7d}  {kv.nbytes / kv.fp16_nbytes:7.2f}"
            f"  {errors[0]:13.4f}  {errors[1]:13.4f}"
        )


def reference(queries: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Attention of the newest token to dense keys and values."""
    keys, values = (np.repeat(x, len(queries) // len(x), axis=0).astype(np.float64) for x in (keys, values))
    scores = queries @ keys.swapaxes(-1, -2) / np.sqrt(DIM)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True) @ values


if __name__ == "__main__":
    compare_codecs()
    fit_curves()
    attend_to_a_cache()

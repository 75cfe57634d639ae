"""Are our quality figures right? A tool of somebody else measures the same caches on the same tokens.

    pip install --no-deps mlx-quant-fidelity==0.10.0
    python examples/outside_judge.py [--schemes tq4 rvq1 turbo4v2] [--stock-bits 4] [--chunks 1]

mlx-quant-fidelity runs a prefix of each chunk, lets the scheme compress it, then scores all later positions in one
forward: KL divergence to the uncompressed model, nats a token. Our ruler (`kvq.compare`) scores the same positions of
the same chunks from forwards of its own. Both run SmolLM2-135M in float32 on the texts of `mlx_kvq_plugin.corpus`.
Exit code 0 if the KL means agree within the tolerance, 1 if not, 2 if the tool is missing or nothing could be
measured. One to two minutes on two CPU cores with OpenBLAS (see the Makefile); MLX's own BLAS is 25 times slower.

A row compares two rulers, not two schemes: `QuantizedKVCache` rounds the scored tokens before they attend to each
other, ours after. `kvq eval` compares schemes, step by step as they decode.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from statistics import fmean
from typing import Any

import mlx.core as mx
import mlx_lm

import mlx_kvq_plugin as kvq
from mlx_kvq_plugin.corpus import CORPUS, corpus_text

JUDGE, JUDGE_VERSION = "mlx-quant-fidelity", "0.10.0"  # pinned: how a cache plugs in may change with any release

# Same weights, tokens, positions and codes: only float32 rounding may differ. Log probabilities down to -32 are rounded
# by up to 1e-6 either way, which averages out over the vocabulary and the positions: ABSOLUTE nats. Our reference runs
# in two pieces, the judge's in one, so matrix products sum in another order: RELATIVE, far above the 1e-5 seen. What
# must not pass: two layers left dense move the mean of tq4 by 0.5%, a prefix off by one token or another seed by 1-5%.
ABSOLUTE, RELATIVE = 1e-6, 1e-3

GROUP_SIZE = 64  # of mlx-lm's QuantizedKVCache

Caches = list[Any]


@dataclass(frozen=True)
class Figures:
    """What a ruler reads: mean KL in nats a token, share of positions with another most likely token."""

    kl: float
    flips: float


@dataclass(frozen=True)
class SchemeMethod:
    """A scheme of ours as the judge wants a cache method (its protocol `KVCacheMethod`).

    Within `guard` the model makes our caches, so the judge's prefix goes through them as any prompt does: it attends to
    itself exactly, and is packed right after. Nothing is left to convert. The judge makes its reference caches before.
    """

    model: Any
    scheme: str
    name: str = "kvq"

    @property
    def label(self) -> str:
        return self.scheme

    @property
    def params(self) -> dict[str, int]:
        return {}

    def check(self, *, head_dim: int | None, model_type: str) -> list[str]:
        return []  # kvq.compress refuses what it cannot do

    def probe_capability(self, empty_cache: Caches) -> None:
        pass

    def make_cache(self, *, n_layers: int) -> Caches:
        raise NotImplementedError("a chunk without a prefix attends to itself exactly: set quantize_start")

    def convert_prefix(self, fp_cache: Caches) -> Caches:
        require_packed(fp_cache, self.scheme)
        return fp_cache

    def guard(self) -> AbstractContextManager[Any]:
        return kvq.compress(self.model, self.scheme)

    def bytes_per_token(self, *, n_layers: int, n_kv_heads: int, head_dim: int) -> int:
        spec = kvq.parse_scheme(self.scheme).layer_spec()
        bits = sum(codec.bits_per_element(head_dim, "float32") for codec in (spec.key_codec, spec.value_codec))
        return round(n_layers * n_kv_heads * head_dim * bits / 8)

    def working_set_bytes(self, *, window: int, n_layers: int, n_kv_heads: int, head_dim: int, dtype_bytes: int) -> int:
        return 2 * window * n_kv_heads * head_dim * dtype_bytes  # one layer's decoded keys and values

    def measured_bytes(self, cache: Caches) -> int:
        from mlx_quant_fidelity.probes.kv_methods import stored_state_bytes

        return stored_state_bytes(cache)

    def provenance(self) -> dict[str, str]:
        return {"package": "mlx-kvq-plugin", "version": version("mlx-kvq-plugin")}

    def report_warnings(self) -> list[str]:
        return []


def require_packed(caches: Caches, scheme: str) -> None:
    """Refuse a prefix that is still dense: it would be scored as perfect."""
    packed = [cache.packed_tokens for cache in caches if isinstance(cache, kvq.KVQCache)]
    if not any(packed):
        raise kvq.KVQError(
            f"scheme {scheme} must pack some of the prefix before the rest is scored, got no packed token; "
            "raise --prefix, or lower recent= in the scheme"
        )


def judged(model: Any, method: Any, chunks: list[mx.array], prefix: int) -> Figures:
    """The judge's figures."""
    from mlx_quant_fidelity.corpora import Corpus, CorpusProvenance
    from mlx_quant_fidelity.probes.kv import score_kv_config

    length = chunks[0].size
    provenance = CorpusProvenance(
        name="mlx_kvq_plugin.corpus",
        split="all",
        tokenizer_id="smollm2",
        chunk_length=length,
        stride=length,
        bos_policy="none",
        final_chunk_policy="drop",
        normalization="raw",
        n_tokens=length * len(chunks),
    )
    report = score_kv_config(
        model, Corpus(tuple(chunks), provenance), model_id="smollm2", method=method, quantize_start=prefix
    )
    expected = len(chunks) * (length - 1 - prefix)
    if report.n_positions != expected:
        raise kvq.KVQError(f"the judge must score {expected} positions, got {report.n_positions}; align the chunks")
    return Figures(report.kl.mean, report.flip_rate)


def logprobs(model: Any, ids: mx.array, prefix: int, convert: Callable[[Caches], Caches]) -> mx.array:
    """Log probabilities `(len(ids) - 1 - prefix, V)`: the prefix in one forward, `convert`, the rest in another."""
    caches = kvq.make_prompt_cache(model)
    model(ids[None, :prefix], cache=caches)
    mx.eval([cache.state for cache in caches])
    logits = model(ids[None, prefix:-1], cache=convert(caches))[0].astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def measured(
    model: Any,
    references: list[mx.array],
    convert: Callable[[Caches], Caches],
    chunks: list[mx.array],
    prefix: int,
) -> Figures:
    """Our figures: `kvq.compare` on each chunk (chunks are equally long, so the mean of means is the mean)."""
    found = []
    for ids, reference in zip(chunks, references, strict=True):
        compressed = logprobs(model, ids, prefix, convert)
        found.append(kvq.compare(reference, compressed, ids[prefix:-1].tolist()))
    return Figures(fmean(f.kl_mean for f in found), 1 - fmean(f.top1 for f in found))


def corpus_chunks(tokenizer: Any, count: int, length: int) -> list[mx.array]:
    """The first `count` chunks of `length` tokens of every text of the package."""
    chunks = []
    for name in CORPUS:
        ids = tokenizer.encode(corpus_text(name), add_special_tokens=False)
        if len(ids) < count * length:
            raise kvq.KVQError(
                f"text {name} must have {count} chunks of {length} tokens, got {len(ids)} tokens; ask for fewer"
            )
        chunks += [mx.array(ids[i * length : (i + 1) * length]) for i in range(count)]
    return chunks


def judge_is_installed() -> bool:
    """Whether the right version is there; says how to get it if not."""
    try:
        found = version(JUDGE)
    except PackageNotFoundError:
        found = "none"
    if found == JUDGE_VERSION:
        return True
    print(
        f"outside_judge: {JUDGE} {JUDGE_VERSION} must be installed, got {found}; install it with: "
        f"pip install --no-deps {JUDGE}=={JUDGE_VERSION}",
        file=sys.stderr,
    )
    return False


def parse_arguments() -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--schemes", nargs="+", default=["tq4", "rvq1", "turbo4v2"], help="kv_scheme strings")
    parser.add_argument(
        "--stock-bits", type=int, default=4, choices=(2, 4, 8), help="of mlx-lm's QuantizedKVCache in the last row"
    )
    parser.add_argument("--chunks", type=int, default=1, help="chunks of each of the three texts")
    parser.add_argument("--length", type=int, default=256, help="tokens of a chunk")
    parser.add_argument("--prefix", type=int, default=128, help="tokens compressed before the rest is scored")
    arguments = parser.parse_args()
    if arguments.chunks < 1 or not 1 <= arguments.prefix <= arguments.length - 2:
        parser.error("--chunks must be at least 1, and --prefix from 1 to --length - 2")
    return arguments


def run(arguments: argparse.Namespace) -> int:
    """Measure and print every row; 1 if a row differs by more than the tolerance, else 0."""
    from mlx_quant_fidelity import StockKVMethod

    started = time.perf_counter()
    model, tokenizer = mlx_lm.load(str(kvq.demo_model_path("smollm2")))[:2]
    model.set_dtype(mx.float32)  # half precision products are slow on CPUs
    chunks = corpus_chunks(tokenizer, arguments.chunks, arguments.length)
    positions = len(chunks) * (arguments.length - 1 - arguments.prefix)
    print(
        f"smollm2 in float32 on {mx.default_device()}: {len(chunks)} chunks of {arguments.length} tokens, "
        f"{arguments.prefix} compressed, {positions} positions scored\n"
    )

    def to_quantized(caches: Caches) -> Caches:
        return [cache.to_quantized(group_size=GROUP_SIZE, bits=arguments.stock_bits) for cache in caches]

    rows: dict[str, tuple[Any, Callable[[], AbstractContextManager[Any]], Callable[[Caches], Caches]]] = {}
    for scheme in arguments.schemes:
        method = SchemeMethod(model, scheme)
        rows[scheme] = (method, method.guard, method.convert_prefix)
    stock = StockKVMethod(bits=arguments.stock_bits, group_size=GROUP_SIZE)
    rows[f"mlx-lm affine {arguments.stock_bits} bit"] = (stock, nullcontext, to_quantized)

    references = [logprobs(model, ids, arguments.prefix, lambda caches: caches) for ids in chunks]
    mx.eval(references)
    columns = ("cache", "judge KL", "our KL", "ours/judge", "judge flips", "our flips")
    table = "{:20}  {:>10}  {:>10}  {:>10}  {:>11}  {:>9}"
    print(table.format(*columns))
    apart = []
    for name, (method, attach, convert) in rows.items():
        judge = judged(model, method, chunks, arguments.prefix)
        with attach():
            own = measured(model, references, convert, chunks, arguments.prefix)
        ratio = f"{own.kl / judge.kl:.6f}" if judge.kl else "-"
        cells = (f"{judge.kl:.6f}", f"{own.kl:.6f}", ratio, f"{judge.flips:.2%}", f"{own.flips:.2%}")
        print(table.format(name, *cells), flush=True)
        if not abs(own.kl - judge.kl) <= ABSOLUTE + RELATIVE * judge.kl:
            apart.append(name)
    print(f"\ntolerance {RELATIVE:.1%} + {ABSOLUTE:g} nats; {time.perf_counter() - started:.0f} s")
    if apart:
        print(f"outside_judge: the two rulers disagree on {', '.join(apart)}", file=sys.stderr)
        return 1
    print("the two rulers agree")
    return 0


def main() -> int:
    arguments = parse_arguments()
    if not judge_is_installed():
        return 2
    try:
        return run(arguments)
    except kvq.KVQError as error:
        print(f"outside_judge: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())

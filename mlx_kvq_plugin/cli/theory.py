"""`kvq precompute` and `kvq validate`: codebooks on the sphere, and codecs against theory."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ..codebook_store import codebook_path, load_codebook
from ..codecs import LEAST_SQUARES, SCALINGS, Published
from ..rotation import HADAMARD, ROTATIONS
from ..sphere import MAX_BITS, MIN_DIM, gaussian_codebook, sphere_mse
from ..theory import (
    SEEDS,
    SIGMAS,
    Measurement,
    Skipped,
    at_rates,
    lossy_codecs,
    validate_codecs,
)
from .arguments import UsageError, add_command, positive

DEFAULT_DIMS = (64, 128, 256)
DEFAULT_BITS = (1, 2, 3, 4)

_LEGEND = f"""\
bits            all-in, per element; codes: those of integers, without scales and norms
mse             E ||x - x^||^2 of random unit vectors x
  band          what the codec's theory allows; bound: the upper bound that its paper proves; paper: what it reports
  x4^-bits      mse over the least possible at so many bits (Shannon), and at so many bits of codes
D*ip            D E (<y,x^> - <y,x>)^2 for independent unit vectors x and y; bound and paper as for mse
bias, slope-1   of <y,x^> over <y,x>, with standard errors; corr: their correlation
A codec fails outside its band, above a bound, below 4^-bits, with other bits than it states, where D*ip is not mse,
with a slope that its scale does not give, or, if it is unbiased, with a bias above {SIGMAS:g} standard errors: one that
has such a bias is measured again, on four times as many other pairs."""


def _run_precompute(options: argparse.Namespace) -> int:
    rows = []
    for dim in options.dim:
        for bits in options.bits:
            book = load_codebook(bits, dim)
            gaussian = tuple(level / math.sqrt(dim) for level in gaussian_codebook(bits).levels)
            row = {
                "bits": bits,
                "dim": dim,
                "mse": book.mse,
                "gaussian_mse": sphere_mse(gaussian, dim),
                "shannon": 4.0**-bits,
                "file": str(codebook_path(bits, dim)),
            }
            rows.append(row)
    if options.json:
        print(json.dumps({"codebooks": rows}, indent=2))
        return 0
    print("Mean squared error of random unit vectors; N(0,1): with the codebook of normal numbers.\n")
    print("bits   dim         mse      N(0,1)        4^-b  file")
    for row in rows:
        print("{bits:4d} {dim:5d} {mse:11.7f} {gaussian_mse:11.7f} {shannon:11.7f}  {file}".format(**row))
    return 0


def _run_validate(options: argparse.Namespace) -> int:
    names = options.codecs or lossy_codecs()
    if options.bits or not options.codecs:
        names = at_rates(names, options.dim, options.bits or DEFAULT_BITS, options.rotation)
    if not names:
        raise UsageError("--bits must be the rates of some codec at these head sizes, got those of none; give others")
    results: list[Measurement | Skipped] = []
    for dim in options.dim:
        found = validate_codecs(names, dim, options.pairs, options.seed, options.rotation, options.scaling)
        results += found
        if not options.json:
            _print_table(dim, found, options)
    measured = [result for result in results if isinstance(result, Measurement)]
    if not measured:
        raise UsageError("--codecs must name one that can do one of the head sizes, got none; give other head sizes")
    failures = [failure for result in measured for failure in result.failures]
    if options.json:
        print(json.dumps(_facts(measured, results, options, failures), indent=2))
    else:
        _print_end(measured, failures)
    return 1 if failures else 0


def _facts(
    measured: Sequence[Measurement],
    results: Sequence[Measurement | Skipped],
    options: argparse.Namespace,
    failures: Sequence[str],
) -> dict[str, Any]:
    rows = [
        {
            **asdict(m),
            "shannon": m.shannon,
            "over_shannon": m.over_shannon,
            "over_shannon_codes": m.over_shannon_codes,
        }
        for m in measured
    ]
    return {
        "seed": options.seed,
        "rotation": options.rotation,
        "scaling": options.scaling,
        "passed": not failures,
        "failures": list(failures),
        "results": rows,
        "skipped": [asdict(result) for result in results if isinstance(result, Skipped)],
    }


def _print_table(dim: int, results: Sequence[Measurement | Skipped], options: argparse.Namespace) -> None:
    width = max(8, *(len(result.codec) for result in results))
    seeds = f"seeds {options.seed} to {options.seed + SEEDS - 1}"
    print(f"head size {dim}, rotation {options.rotation}, scaling {options.scaling}, {seeds}")
    print(
        f"{'codec':{width}s}  bits codes  pairs       mse                band   bound  paper x4^-bits x4^-codes"
        "     D*ip   bound  paper              bias             slope-1     corr"
    )
    for result in results:
        if isinstance(result, Skipped):
            print(f"{result.codec:{width}s} not possible: {result.reason}")
            continue
        band = "-" if result.band is None else "{:.4g}-{:.4g}".format(*result.band)
        said = result.published or Published("")
        verdict = "  FAIL" if result.failures else ""
        print(
            f"{result.codec:{width}s} {result.bits:5.2f} {result.codes:5.2f} {result.pairs:6d} {result.mse:9.4g} "
            f"{band:>19s} {_said(said.mse_bound, 7)} {_said(said.mse)} {result.over_shannon:8.2f} "
            f"{result.over_shannon_codes:9.2f} {result.product:8.4g} {_said(said.product_bound, 7)} "
            f"{_said(said.product)} {result.bias:+9.1e} ± {result.bias_se:.0e} "
            f"{result.slope:+11.5f} ± {result.slope_se:.5f} {result.correlation:8.5f}{verdict}"
        )
    print(flush=True)


def _said(value: float | None, width: int = 6) -> str:
    return f"{'-' if value is None else f'{value:.3g}':>{width}s}"


def _print_end(measured: Sequence[Measurement], failures: Sequence[str]) -> None:
    print(_LEGEND)
    for failure in failures:
        print(f"FAIL {failure}")
    broken = sum(bool(m.failures) for m in measured)
    print(f"{len(measured) - broken} of {len(measured)} within theory")


def _bits(text: str) -> int:
    value = positive(text)
    if value > MAX_BITS:
        raise argparse.ArgumentTypeError(f"must be at most {MAX_BITS}, got {text!r}")
    return value


def _dim(text: str) -> int:
    value = positive(text)
    if value < MIN_DIM:
        raise argparse.ArgumentTypeError(f"must be at least {MIN_DIM}, got {text!r}")
    return value


def _seed(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be an integer of at least 0, got {text!r}")
    return int(text)


def _add_dims(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dim",
        type=_dim,
        nargs="+",
        default=list(DEFAULT_DIMS),
        metavar="D",
        help="head sizes (default: " + " ".join(map(str, DEFAULT_DIMS)) + ")",
    )


def add_commands(commands: Any) -> None:
    """Add `precompute` and `validate`."""
    rates = " ".join(map(str, DEFAULT_BITS))
    precompute = add_command(
        commands,
        "precompute",
        _run_precompute,
        "Compute and store the Lloyd-Max codebooks of coordinates of random unit vectors. What is stored is checked; "
        "KVQ_CACHE_DIR says where it is kept.",
        "  kvq precompute\n  kvq precompute --bits 1 2 3 4 5 6 7 8 --dim 80 96 --json",
    )
    precompute.add_argument(
        "--bits", type=_bits, nargs="+", default=list(DEFAULT_BITS), metavar="B", help=f"rates (default: {rates})"
    )
    _add_dims(precompute)
    precompute.add_argument("--json", action="store_true", help="one JSON object")

    validate = add_command(
        commands,
        "validate",
        _run_validate,
        "Measure codecs on random unit vectors and hold them against theory. Error, inner products and their bias, "
        "with the codec's own estimator. Exit code 1 says that a codec is outside the band that its theory states, "
        "above a proven bound, below the Shannon bound, or biased though stated not to be.",
        "  kvq validate\n"
        "  kvq validate --codecs tq4 tqprod3 --dim 128 --pairs 1000000\n"
        "  kvq validate --codecs tq4 --dim 96 --rotation dense\n"
        "  kvq validate --bits 5 6 8 --json",
    )
    _add_dims(validate)
    validate.add_argument(
        "--bits",
        type=_bits,
        nargs="+",
        metavar="B",
        help=f"codecs with such rates of codes, rounded (default: {rates}, or any with --codecs)",
    )
    validate.add_argument("--codecs", nargs="+", metavar="NAME", help="only these (default: all lossy ones)")
    validate.add_argument(
        "--rotation", choices=ROTATIONS, default=HADAMARD, help="of the codecs that rotate (default: hadamard)"
    )
    validate.add_argument(
        "--scaling", choices=SCALINGS, default=LEAST_SQUARES, help="of tq and rvq (default: least_squares)"
    )
    validate.add_argument(
        "--pairs",
        type=positive,
        default=100_000,
        metavar="N",
        help="at least; a quarter for codecs that are not stated unbiased (default: 100000)",
    )
    validate.add_argument("--seed", type=_seed, default=0, metavar="N", help="of vectors and codecs (default: 0)")
    validate.add_argument("--json", action="store_true", help="one JSON object at the end")

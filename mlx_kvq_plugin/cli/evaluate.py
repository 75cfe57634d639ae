"""`kvq eval` and `kvq frontier`: what schemes cost in quality and memory on a model."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from mlx.utils import tree_flatten

from ..contenders import AFFINE_SCHEMES
from ..corpus import CORPUS, corpus_text
from ..needle import build_haystack
from ..plots import plot_frontier, require_matplotlib
from ..progress import progress_bar
from ..results import Measurement, SchemeResult, machine, pareto_front, remarks, table
from ..ruler import all_schemes, check_scheme, head_dim, measure
from ..schemes import split_part
from .arguments import (
    MODEL_HELP,
    UsageError,
    add_arch_option,
    add_command,
    add_progress_option,
    add_weight_options,
    positive,
)
from .models import LoadedModel, load_model

DEFAULT_SCHEMES = ("tq4", "tq3", "rvq1", "mlx-affine4")
DEPTHS = (0.1, 0.5, 0.9)
NEEDLE_TOKENS = 1000
FILLER = "prose"  # of the corpus, for needle retrieval
PLOTS = (".png", ".svg", ".pdf")


def split_schemes(values: Sequence[str]) -> list[str]:
    """Every scheme of `--schemes` once, in order: `tq4,tq3 rvq1,edges=2,k=tq4,v=tq2` are four.

    A comma stands between schemes and inside one: a part without `=` begins the next scheme, and so does `k=`; any
    other part belongs to the scheme before it.
    """
    found = []
    for value in values:
        scheme: list[str] = []
        for part in filter(None, map(str.strip, value.split(","))):
            names = {_codec_of(known) for known in scheme}
            if (_codec_of(part) == "both" and names - {""}) or (_codec_of(part) == "k" and names & {"both", "k"}):
                found.append(",".join(scheme))
                scheme = []
            scheme.append(part)
        if not scheme:
            raise UsageError(f"a list of schemes must name one, got {value!r}; write for example tq4,tq3 or rvq1")
        found.append(",".join(scheme))
    return list(dict.fromkeys(found))


def _codec_of(part: str) -> str:
    """Which side a part of a scheme names a codec for: `both`, `k`, `v` or ""."""
    name, equals, _ = split_part(part)
    return "both" if not equals else name if name in ("k", "v") else ""


def read_texts(files: Sequence[str]) -> dict[str, str]:
    """Texts by name, of the corpus or of files; raises `UsageError` for files that cannot be read."""
    texts = {name: corpus_text(name) for name in CORPUS} if not files else {}
    for name in files:
        if name in texts:
            raise UsageError(f"a text file must be given once, got {name!r} twice; drop one of them")
        try:
            texts[name] = Path(name).expanduser().read_text(encoding="utf-8")
        except OSError as error:
            raise UsageError(
                f"a text file must be readable, got {error.strerror} for {name!r}; check the path"
            ) from error
        except UnicodeDecodeError as error:
            raise UsageError(f"a text file must be UTF-8 text, got {error} in {name!r}; convert it first") from error
    return texts


def cache_dtype(model: Any) -> str:
    """The type of the model's keys and values: that of its weights that are not quantized."""
    parameters: Any = tree_flatten(model.parameters())
    kinds = [str(value.dtype) for name, value in parameters if "norm" in name]
    return (kinds or [str(value.dtype) for _, value in parameters])[0].removeprefix("mlx.core.")


def _output(value: str, suffixes: Sequence[str]) -> Path:
    path = Path(value).expanduser()
    if suffixes and path.suffix not in suffixes:
        raise UsageError(f"a plot must end in one of {', '.join(suffixes)}, got {path.name!r}; rename it")
    if not path.parent.is_dir():
        raise UsageError(f"the folder of an output file must exist, got {str(path.parent)!r}; make it first")
    if path.is_dir():
        raise UsageError(f"an output file must not be a folder, got {value!r}; name a file in it")
    return path


def _measure(
    options: argparse.Namespace, loaded: LoadedModel, texts: Mapping[str, str], schemes: Sequence[str], haystack: Any
) -> Measurement:
    tokens = {name: list(loaded.tokenizer.encode(text)) for name, text in texts.items()}
    with progress_bar(options.progress) as progress:
        rows = measure(
            loaded.model,
            tokens,
            schemes,
            prefill=options.prefill,
            steps=options.steps,
            haystack=haystack,
            unknown_arch=options.unknown_arch,
            source=loaded.source,
            joint=not options.one_by_one,
            progress=progress,
        )
        return Measurement(
            model=options.model,
            texts=tuple(texts),
            prefill=options.prefill,
            steps=options.steps,
            machine=machine(),
            dtype=cache_dtype(loaded.model),
            rows=tuple(rows),
            joint=not options.one_by_one,
            command=options.command_line,
            measured=now(),
        )


def now() -> str:
    """The time, ISO 8601 with the zone."""
    return datetime.now().astimezone().isoformat(timespec="seconds")


def print_aligned(lines: Sequence[Sequence[str]]) -> None:
    """Columns of text, the first two to the left."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = [f"{c:<{w}s}" if i < 2 else f"{c:>{w}s}" for i, (c, w) in enumerate(zip(line, widths, strict=True))]
        print("  ".join(cells).rstrip())


def _about(found: Measurement) -> str:
    texts = f"{len(found.texts)} texts ({', '.join(found.texts)})" if len(found.texts) > 1 else found.texts[0]
    return f"{found.model}: {texts}, {found.prefill} tokens of prefill and {found.steps} steps"


def _print_end(found: Measurement) -> None:
    for line in remarks(found.rows):
        print(line)
    dense = f"{found.dtype} here" + (", 4 bytes an element" if found.dtype == "float32" else "")
    print(
        "bits: of an element of packed keys and values in a 16-bit model, all-in\n"
        f"MiB: really held by all texts, tokens kept dense ({dense}), statistics and slack counted; ratio: fp16 to that"
        "\n16-bit ratio: the same if the tokens kept dense take 2 bytes an element, as in a 16-bit model\n"
        f"KL: nats a token from mlx-lm's own caches on the same weights; greedy: tokens, of {found.steps}, "
        "before a free run says something else"
    )


def _write(found: Measurement, options: argparse.Namespace, title: str) -> None:
    if options.json is not None:
        _output(options.json, ()).write_text(found.to_json() + "\n", encoding="utf-8")
    if options.plot is not None:
        plot_frontier(found.rows, _output(options.plot, PLOTS), title)


def _check_outputs(options: argparse.Namespace) -> None:
    """Before anything is measured."""
    if options.json is not None:
        _output(options.json, ())
    if options.plot is not None:
        _output(options.plot, PLOTS)
        require_matplotlib()


def _run_eval(options: argparse.Namespace) -> int:
    schemes = _checked(options.schemes or DEFAULT_SCHEMES)
    if not options.needle and (options.depths or options.needle_tokens):
        raise UsageError("--depths and --needle-tokens must come with --needle, got none; add --needle")
    texts = read_texts(options.text)
    _check_outputs(options)
    loaded = load_model(options.model, options.float32)
    haystack = None
    if options.needle:
        depths, tokens = options.depths or DEPTHS, options.needle_tokens or NEEDLE_TOKENS
        haystack = build_haystack(loaded.tokenizer, corpus_text(FILLER), depths, tokens)
    found = _measure(options, loaded, texts, schemes, haystack)
    print(_about(found) + (f", needle in {haystack.tokens} tokens" if haystack else "") + "\n")
    print_aligned(table(found.rows))
    print()
    _print_end(found)
    if haystack is not None:
        print("needle: how much likelier the right key is than the best wrong one, in nats, by depth")
    _write(found, options, _about(found))
    return 0


def _run_frontier(options: argparse.Namespace) -> int:
    schemes = _checked(options.schemes) if options.schemes else []
    texts = read_texts(options.text)
    _check_outputs(options)
    loaded = load_model(options.model, options.float32)
    schemes = schemes or all_schemes(head_dim(loaded.model, options.unknown_arch))
    found = _measure(options, loaded, texts, list(dict.fromkeys([*schemes, *AFFINE_SCHEMES])), None)
    print(_about(found) + "\n")
    rows = sorted((row for row in found.rows if row.overall is not None), key=_by_cost)
    front = {row.scheme for row in pareto_front(rows)}
    head, *lines = table(rows, texts=False)
    marks = ["*" if row.scheme in front else "" for row in rows]
    print_aligned([["", *head], *([mark, *line] for mark, line in zip(marks, lines, strict=True))])
    print("\n*: nothing has fewer bits and a lower mean KL")
    _print_end(found)
    _write(found, options, _about(found))
    return 0


def _checked(values: Sequence[str]) -> list[str]:
    schemes = split_schemes(values)
    for scheme in schemes:
        check_scheme(scheme)
    return schemes


def _by_cost(row: SchemeResult) -> tuple[float, float]:
    assert row.overall is not None
    return row.bits, row.overall.kl_mean


def _depth(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be a fraction from 0 to 1, got {text!r}")
    return value


def _steps(text: str) -> int:
    value = positive(text)
    if value < 2:
        raise argparse.ArgumentTypeError(f"must be at least 2, got {text!r}")
    return value


def _add_options(parser: argparse.ArgumentParser, schemes: str) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument(
        "--schemes",
        nargs="+",
        action="extend",
        metavar="SCHEME",
        help="after spaces or commas, see kvq schemes; after a comma a part without = or k= begins the next scheme "
        '("tq4,rvq1,edges=2,k=tq4,v=tq2" are three); mlx-affine8, 6, 5, 4, 3 and 2 are mlx-lm\'s quantized caches '
        f"(default: {schemes})",
    )
    parser.add_argument(
        "--text",
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE",
        help=f"UTF-8 texts to read instead of the built-in ones ({', '.join(CORPUS)})",
    )
    parser.add_argument(
        "--prefill", type=positive, default=200, metavar="N", help="tokens that are fed at first (default: 200)"
    )
    parser.add_argument(
        "--steps", type=_steps, default=200, metavar="N", help="tokens that are fed one by one (default: 200)"
    )
    parser.add_argument("--json", metavar="FILE", help="write everything that was measured there")
    parser.add_argument("--plot", metavar="FILE", help=f"draw KL against bits there ({', '.join(PLOTS)})")
    parser.add_argument(
        "--one-by-one",
        action="store_true",
        help="give every scheme forwards of its own: slower, but then no figure depends on what else is measured, not "
        "even by the rounding of products of another shape",
    )
    add_arch_option(parser)
    add_weight_options(parser)
    add_progress_option(parser)


def add_commands(commands: Any) -> None:
    """Add `eval` and `frontier`."""
    evaluate = add_command(
        commands,
        "eval",
        _run_eval,
        "Measure what schemes cost on a model. Texts are fed one token at a time through the compressed caches and "
        "through mlx-lm's own on the same weights: KL divergence, agreement, perplexity, greedy text, bytes held, and "
        "retrieval of a key from a long text.",
        "  kvq eval demo:smollm2\n"
        "  kvq eval demo:gemma3 --schemes tq4 k=tq4,v=tq2 rvq1,edges=2 mlx-affine4 --needle\n"
        "  kvq eval ./model --schemes tq4,tq3,rvq1 --text book.txt --prefill 4000 --steps 500 --json cost.json",
    )
    _add_options(evaluate, " ".join(DEFAULT_SCHEMES))
    evaluate.add_argument("--needle", action="store_true", help="also retrieve a key from a long text")
    evaluate.add_argument(
        "--depths",
        type=_depth,
        nargs="+",
        metavar="X",
        help=f"where in the text the key is, from 0 to 1 (default: {' '.join(map(str, DEPTHS))})",
    )
    evaluate.add_argument(
        "--needle-tokens", type=positive, metavar="N", help=f"length of that text (default: {NEEDLE_TOKENS})"
    )
    frontier = add_command(
        commands,
        "frontier",
        _run_frontier,
        "Measure all schemes on a model and mark those that no other one beats in bits and KL divergence. mlx-lm's "
        "quantized caches of 8, 6, 5, 4, 3 and 2 bits are always among them.",
        "  kvq frontier demo:smollm2 --plot frontier.png\n"
        "  kvq frontier ./model --schemes tq4,tq3,tq2 --json frontier.json",
    )
    _add_options(frontier, "all that lose something")

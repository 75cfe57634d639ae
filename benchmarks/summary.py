"""Rewrites the measured tables of README.md and of the docs from the stored results."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from scheme_tables import choices, every_scheme
from stored import MODELS, ROOT, TITLES, on_gpu, one, quality, results, stored, table

SCHEMES = ("tq4", "tq3", "rvq1")
AVERAGES = ("tq@4", "tq@3", "tq@2")
LIMITS = {"tcq4": (0.012, 0.96), "tcq3": (0.04, 0.92), "tcq2": (0.2, 0.83)}  # KL mean, top-1
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


def readme_table() -> str:
    """Memory, quality and speed of the main schemes on the two demo models."""
    rows = []
    for scheme in SCHEMES:
        small = [one("memory", model="smollm2", scheme=scheme, tokens=tokens)["ratio"] for tokens in (1000, 4096)]
        gemma = one("memory", model="gemma3", scheme=scheme, tokens=4096)["ratio"]
        measured = [quality(model)["rows"][scheme] for model in MODELS]
        speed = one("decode", model="smollm2", tokens=1000, scheme=scheme)
        rows.append(
            [
                f"`{scheme}`",
                f"{small[0]:.2f}x / {small[1]:.2f}x",
                f"{gemma:.2f}x",
                " / ".join(f"{row['kl_mean']:.4f}" for row in measured),
                " / ".join(f"{row['top1']:.1%}" for row in measured),
                f"{speed['decode_ratio']:.2f}x",
                f"{speed['prefill_ratio']:.2f}x",
            ]
        )
    head = ["`kv_scheme`", "SmolLM2-135M, smaller at 1,000 / 4,096 tokens", "Gemma 3 270M, at 4,096"]
    head += ["KL to fp16, nats a token", "same top-1 token", "decode speed (CPU)", "prefill speed (CPU)"]
    averages = []
    for scheme in AVERAGES:
        cells = [f"{quality(model)['rows'][scheme]['kl_mean']:.4f}" for model in MODELS]
        averages.append(f"`{scheme}` {' / '.join(cells)}")
    averaged = f"KL with bits allocated by `kvq calibrate`, at equal bits: {', '.join(averages)}."
    return "\n\n".join([table(head, rows), *gpu_speed(), automatic_line(), averaged])


def automatic_line() -> str:
    """What `auto` gains at the bytes of `tq3`, in a sentence."""
    rows, cells = results("automatic")["rows"], []
    for pattern in ("tq3", "auto@.*,family=tq"):
        kl = [f"{row['kl']:.4f}" for row in rows if re.fullmatch(pattern, row["scheme"])]
        cells.append(" / ".join(kl))
    return f"KL at the bytes of `tq3`, in the runs of `automatic.py`: `tq3` {cells[0]}, `auto` {cells[1]}."


def gpu_speed() -> list[str]:
    """A table of decoding speed on a GPU, if there is a stored run."""
    found = on_gpu("decode_gpu")
    if found is None:
        return []
    single = [row for row in found["rows"] if row["batch"] == 1]
    tokens = sorted({row["tokens"] for row in single})
    rows = []
    for scheme in SCHEMES:
        ratios = {row["tokens"]: f"{row['ratio']:.2f}x" for row in single if row["scheme"] == scheme}
        rows.append([f"`{scheme}`", *(ratios[count] for count in tokens)])
    head = [f"decode speed, {single[0]['device']}", *(f"{count:,} tokens stored" for count in tokens)]
    return [table(head, rows)]


def measurements() -> str:
    """Memory and speed."""
    parts = []
    memory = results("memory")
    rows = [
        [r["model"], f"{r['tokens']:,}", f"`{r['scheme']}`", f"{r['allocated'] / 2**20:.2f}", f"{r['ratio']:.2f}x"]
        + [f"{r['nbytes_error']:+.2%}" if "nbytes_error" in r else ""]
        for r in memory["rows"]
    ]
    head = ["model", "tokens", "scheme", "MiB allocated", "smaller than `KVCache`", "`nbytes` against allocated"]
    parts.append(f"## Memory\n\n`python benchmarks/memory.py`; {memory['machine']}.\n\n{table(head, rows)}")
    decode = results("decode")
    rows = [
        [r["model"], f"{r['tokens']:,}", f"`{r['scheme']}`", f"{r['step_ms']:.1f}"]
        + [f"{r['decode_ratio']:.2f}x", f"{r['prefill_ratio']:.2f}x"]
        for r in decode["rows"]
    ]
    head = ["model", "tokens", "scheme", "ms a step", "decode against `KVCache`", "prefill against `KVCache`"]
    parts.append(f"## Speed\n\n`python benchmarks/decode.py`; {decode['machine']}.\n\n{table(head, rows)}")
    return "\n\n".join(parts)


def quality_tables() -> str:
    """Every scheme on both models, by bits, and the settings beside what they change."""
    parts = []
    for model in MODELS:
        found = quality(model)
        rows = sorted((row for row in found["rows"].values() if "error" not in row), key=lambda row: row["bits"])
        lines = [
            [f"`{row['scheme']}`", f"{row['bits']:.2f}", f"{row['nbytes'] / 2**20:.2f}", f"{row['ratio']:.2f}x"]
            + [f"{row['ratio_16bit']:.2f}x", *(f"{row[name]:.4f}" for name in ("kl_mean", "kl_median"))]
            + [f"{row['kl_p99']:.3f}", f"{row['kl_last']:.4f}", f"{row['top1']:.1%}", f"{row['perplexity']:.2f}"]
            + [f"{row['greedy']:.0f}"]
            for row in rows
        ]
        head = ["scheme", "bits", "MiB held", "ratio", "ratio in 16 bits", "KL mean", "median", "p99", "last 64"]
        head += ["top-1", f"perplexity (fp16: {rows[0]['reference_perplexity']:.2f})", "greedy"]
        failed = [f"- `{row['scheme']}`: {row['error']}" for row in found["rows"].values() if "error" in row]
        parts.append(
            f"## {TITLES[model]}\n\n![KL against bits](frontier-{model}.png)\n\n{table(head, lines)}"
            + ("\n\nNot possible on this model:\n\n" + "\n".join(failed) if failed else "")
        )
    parts.append(frontier())
    parts.append(other_texts())
    parts.append(parts_worth())
    parts.append(f"## What settings are worth\n\n{_settings()}")
    texts, machine = ", ".join(found["texts"]), found["machine"]
    return f"Texts: {texts}; {found['prefill']} tokens prefilled, {found['steps']} steps; {machine}.\n\n" + "\n\n".join(
        parts
    )


def frontier() -> str:
    """Trellis codes, of automatic bits too, against scalar ones: after a short and after a long prompt."""
    lines, runs = [], []
    for model in TITLES:
        for name in ("frontier", "frontier-auto", "frontier-far"):
            if not stored(f"{name}-{model}"):
                continue
            found = results(f"{name}-{model}")
            first, last = found["prefill"], found["prefill"] + found["steps"]
            runs.append(f"{first:,} to {last:,}: {', '.join(found['texts'])}")
            lines += [
                [TITLES[model], f"{first:,} to {last:,}", f"`{row['scheme']}`", f"{row['bits']:.2f}"]
                + [f"{row[key]:.4f}" for key in ("kl_mean", "kl_median")]
                + [f"{row['kl_p99']:.3f}", f"{row['top1']:.1%}"]
                + [f"{row['perplexity']:.2f} ({row['reference_perplexity']:.2f})"]
                for row in sorted(found["rows"], key=lambda row: (-row["bits"], row["kl_mean"]))
            ]
    head = ["model", "positions", "scheme", "bits", "KL mean", "median", "p99", "top-1", "perplexity (fp16)"]
    return f"## The frontier\n\nTexts at {'; '.join(dict.fromkeys(runs))}.\n\n{table(head, lines)}"


def other_texts() -> str:
    """Trellis codes on texts of other kinds, one by one; in bold what is outside of `LIMITS`."""
    lines = []
    for model in TITLES:
        if not stored(f"frontier-other-{model}"):
            continue
        found = results(f"frontier-other-{model}")
        rows = {row["scheme"]: row["texts"] for row in found["rows"]}
        for text in found["texts"]:
            cells = []
            for scheme, (kl, top1) in LIMITS.items():
                own = rows[scheme][text]
                cells += [_bold(f"{own['kl_mean']:.4f}", own["kl_mean"] > kl)]
                cells += [_bold(f"{own['top1']:.1%}", own["top1"] < top1)]
            lines.append([TITLES[model], text, f"{rows['tcq4'][text]['reference_perplexity']:.2f}", *cells])
    limits = "; ".join(f"`{scheme}`: {kl}, {top1:.0%}" for scheme, (kl, top1) in LIMITS.items())
    head = ["model", "text", "perplexity, fp16", *(f"`{s}` {what}" for s in LIMITS for what in ("KL mean", "top-1"))]
    about = (
        "`python benchmarks/quality.py --texts german poetry mathematics chat json log --schemes tcq4 tcq3 tcq2 "
        "--prefill 400 --name frontier-other`; texts are described in `benchmarks/texts.py`. In bold: outside of "
        f"{limits}."
    )
    return f"## The frontier on other texts\n\n{about}\n\n{table(head, lines)}\n\n{_flips()}"


def _bold(cell: str, wanted: bool) -> str:
    return f"**{cell}**" if wanted else cell


def _flips() -> str:
    """How sure models are where the most likely token changes."""
    found = results("flips")
    lines = [
        [TITLES[row["model"]], row["text"], f"{row['entropy']:.2f}", f"{row['kl_mean']:.4f}"]
        + [f"{row[key]:.1%}" for key in ("close", "flips", "flips_close", "flips_sure")]
        for row in found["rows"]
    ]
    head = ["model", "text", "entropy, nats", "KL mean"]
    head += ["lead below 0.1 nats", "flips", "of these positions", "where the lead is above 0.5"]
    about = (
        "`python benchmarks/flips.py`: how many nats the most likely token is ahead of the next one with mlx-lm's "
        "caches (its lead), and how often `tcq3` makes another token the most likely one."
    )
    return f"{about}\n\n{table(head, lines)}"


def parts_worth() -> str:
    """The recommended 3 bits with one part taken away or added."""
    found = results("ablation")
    first = found["rows"][0]["part"]
    whole = {row["model"]: row["kl_mean"] for row in found["rows"] if row["part"] == first}
    lines = [
        [TITLES[row["model"]], row["part"], f"`{row['scheme']}`", f"{row['bits']:.2f}", f"{row['ratio']:.2f}x"]
        + [f"{row['kl_mean']:.4f}", f"{row['kl_mean'] / whole[row['model']]:.2f}", f"{row['kl_median']:.4f}"]
        + [f"{row['kl_p99']:.3f}", f"{row['top1']:.1%}"]
        for row in found["rows"]
    ]
    head = ["model", "the recommended 3 bits", "scheme", "bits", "ratio in 16 bits", "KL mean", "of that as it is"]
    head += ["median", "p99", "top-1"]
    about = "`python benchmarks/ablation.py`: documentation, code, story; 400 tokens prefilled, 200 steps."
    return f"## What each part is worth\n\n{about}\n\n{table(head, lines)}"


def _settings() -> str:
    """KL mean of schemes with a setting, and of the schemes without it."""
    lines = []
    for scheme in quality(MODELS[0])["rows"]:
        base, _, setting = scheme.partition(",")
        if not setting or "@" in base or "=" in base:
            continue
        cells = []
        for model in MODELS:
            rows = quality(model)["rows"]
            own, plain = rows.get(scheme, {}), rows.get(base, {})
            cells.append(f"{own['kl_mean']:.4f} ({plain['kl_mean']:.4f})" if "kl_mean" in own else "not possible")
        lines.append([f"`{base}`", f"`{setting}`", *cells])
    head = ["scheme", "with", *(f"KL mean, {TITLES[model]} (without)" for model in MODELS)]
    return table(head, lines)


def allocation() -> str:
    """Average bits by gradients and by activations against the same bits for all heads."""
    lines = []
    for average, same in (("2", "tq2"), ("2.5", "tq2.5"), ("3", "tq3"), ("4", "tq4")):
        cells = []
        for model in MODELS:
            rows = quality(model)["rows"]
            names = (same, f"tq@{average}", f"tq@{average},sensitivity=activation")
            cells += [f"{rows[name]['kl_mean']:.4f}" for name in names]
        lines.append([average, *cells])
    head = ["bits"] + [
        f"{TITLES[m]}: {kind}" for m in MODELS for kind in ("the same for all", "gradient", "activation")
    ]
    machine = quality(MODELS[0])["machine"]
    return "\n\n".join([*automatic(), *context(), _averages(head, lines, machine)])


def automatic() -> list[str]:
    """Automatic bits without a calibration: against the same bits for all layers, and what bounds come to."""
    found = results("automatic")
    equal, bounds = [], []
    for model in MODELS:
        rows = {row["scheme"]: row for row in found["rows"] if row["model"] == model}
        bits = f"{rows['tq3']['bits']:g}"
        names = [name for family in ("tq", "tcq") for name in (f"{family}3", f"auto@{bits},family={family}")]
        equal.append([TITLES[model], bits, *(f"{rows[name]['kl']:.4f}" for name in names)])
        for row in rows.values():
            if row["own_kl"] is not None:
                figures = [f"{row[name]:.4f}" for name in ("predicted_kl", "own_kl", "own_kl_single_steps", "kl")]
                bounds.append([TITLES[model], f"`{row['scheme']}`", f"{row['bits']:.2f}", *figures])
    return [
        "KL mean, nats a token, without a calibration. `python benchmarks/automatic.py` (200 tokens, 100 steps; "
        f"{found['machine']}): at the bytes of `tq3`,",
        table(["model", "bits", "`tq3`", "`auto`, family `tq`", "`tcq3`", "`auto`, family `tcq`"], equal),
        "and with a bound: predicted, measured on the model's own texts, there by the ruler in single steps, and by "
        "the ruler on the texts of [quality](quality.md):",
        table(["model", "scheme", "bits", "predicted", "own texts", "in single steps", "other texts"], bounds),
    ]


def context() -> list[str]:
    """Automatic bits for a context against those that no length is named for."""
    found = results("context")
    rows = [
        [TITLES[row["model"]], f"{row['context']:,}", f"`{row['scheme']}`", f"{row['kl']:.4f}", f"{row['top1']:.1%}"]
        + [f"{row['bits']:.2f}", f"{row['nbytes'] / 2**20:.2f}", f"{row['fp16_nbytes'] / 2**20:.2f}"]
        for row in found["rows"]
    ]
    texts = {row["context"]: row["texts"] for row in found["rows"]}
    about = "; ".join(f"{tokens:,} tokens: {', '.join(names)}" for tokens, names in sorted(texts.items()))
    parts = [
        f"For a context, without a calibration. `python benchmarks/context.py` ({found['machine']}); the last 200 "
        f"positions of {about}; MiB of a text's caches at its end, in a model of 16 bits:",
        table(["model", "tokens", "scheme", "KL mean", "top-1", "bits", "MiB", "MiB, fp16"], rows),
    ]
    if not stored("context-kinds"):
        return parts
    apart = results("context-kinds")["rows"]
    kinds = [
        [f"{row['prefill']:,} to {row['prefill'] + row['steps']:,}", row["kind"], f"{row['kl']:.4f}"]
        + [f"{row['kl_median']:.4f}"]
        for row in apart
    ]
    return [
        *parts,
        f"`{apart[0]['scheme']}` in one kind of layers of {TITLES[apart[0]['model']]}, others as mlx-lm makes them: "
        "`python benchmarks/context.py --kinds`, on the texts of 2,000 tokens.",
        table(["positions", "layers", "KL mean", "KL median"], kinds),
    ]


def _averages(head: list[str], lines: list[list[str]], machine: str) -> str:
    return (
        "KL mean, nats a token, at equal bytes (2.5 bits for all heads are `tq2.5`, whose two scales a token take "
        f"0.25 bits more at head size 64). `python benchmarks/quality.py`; {machine}.\n\n" + table(head, lines)
    )


def serving() -> str:
    """The two servers side by side."""
    found = results("serve")
    rows = [
        [f"`{r['server']}`", f"{r['requests']}", f"{r['errors']}", f"{r['requests/s']:.2f}"]
        + [f"{r.get('speed against mlx_lm.server', 1.0):.2f}x", f"{r['cached share of prompts']:.1%}"]
        + [f"{r['bytes per cached token']:,.0f} ({r['of 16 bits']:.3f})"]
        for r in found["rows"]
    ]
    head = ["server", "requests", "errors", "requests/s", "speed", "prompt tokens found cached"]
    head += ["bytes per cached token (of 16 bits)"]
    return f"`python benchmarks/serve.py`; {found['machine']}.\n\n{table(head, rows)}"


def kernels() -> str:
    """Kernels alone and whole models on a GPU, of what is stored; empty without a run on one."""
    parts = []
    found = on_gpu("decode_gpu")
    if found:
        rows = [
            [f"{r['tokens']:,}" + (f" x {r['batch']}" if r["batch"] > 1 else ""), f"`{r['scheme']}`"]
            + [f"{r['ms']:.2f}", f"{1e3 * r['batch'] / r['ms']:,.0f}", f"{r['ratio']:.2f}x"]
            for r in found["rows"]
        ]
        head = ["tokens stored (x sequences)", "scheme", "ms a step", "tokens/s", "speed against `KVCache`"]
        about = "a model of Qwen3-8B's shape with random 4-bit weights"
        parts.append(_gpu_part("Decoding", "decode_gpu.py", found, about, table(head, rows)))
    found = on_gpu("prefill_memory")
    if found:
        rows = [
            [f"{r['tokens']:,}", f"`{r['scheme']}`", f"{r['seconds']:.2f}", f"{r['time_ratio']:.2f}"]
            + [f"{r['packing_share']:.1%}", f"{r['peak_mib']:,.0f}", f"{r['peak_ratio']:.2f}"]
            for r in found["rows"]
        ]
        head = ["tokens", "scheme", "seconds", "of `KVCache`'s", "of it packing"]
        head += ["peak MiB of caches and attention", "of `KVCache`'s"]
        parts.append(_gpu_part("Prefill", "prefill_memory.py", found, "the same model", table(head, rows)))
    found = on_gpu("attention")
    if found:
        rows = [
            [f"{r['tokens']:,}", f"`{r['scheme']}`", f"{r['gpu_us']:.0f}", f"{r['gpu_ratio']:.2f}x"]
            + [f"{r['tb_s']:.2f}", f"{r['of_copy']:.0%}", f"{r['us']:.0f}", f"{r['ratio']:.2f}x", f"{r['host_us']:.0f}"]
            for r in found["rows"]
        ]
        head = ["tokens", "scheme", "us of the GPU", "speed against fp16", "TB/s", "of a copy's"]
        head += ["us in a chain", "speed against fp16", "us of the host"]
        about = "32 query and 8 KV heads of 128 channels, one new token"
        parts.append(_gpu_part("Attention alone", "attention.py --store", found, about, table(head, rows)))
    found = on_gpu("kernel_encode_decode")
    if found:
        rows = [
            [r["kernel"], f"`{r['scheme']}`", f"{r['tokens']:,}", f"{r['us']:.0f}", f"{r['plain_us']:.0f}"]
            + [f"{r['tb_s']:.2f}", f"{r['of_copy']:.0%}"]
            for r in found["rows"]
        ]
        head = ["kernel", "scheme", "tokens", "us a call", "us of plain operations", "TB/s", "of a copy's"]
        about = "8 KV heads of 128 channels"
        command = "kernel_encode_decode.py --store"
        parts.append(_gpu_part("Encoding and decoding alone", command, found, about, table(head, rows)))
    if stored("byte_levels"):
        found = results("byte_levels")
        rows = [
            [r["model"], f"`{r['scheme']}`", f"{r['kl']:.4f}", f"{r['kl_bytes']:.4f}"]
            + [f"{r['top1']:.1%}", f"{r['top1_bytes']:.1%}"]
            for r in found["rows"]
        ]
        head = ["model", "scheme", "KL, codebook's levels", "levels of bytes", "same top-1 token", "levels of bytes"]
        about = f"quality of decode steps, as in docs/quality.md; {found['machine']}"
        parts.append(f"### Levels of bytes\n\n`python benchmarks/byte_levels.py`: {about}.\n\n{table(head, rows)}")
    return "\n\n".join(parts)


def _gpu_part(title: str, command: str, found: dict[str, Any], about: str, content: str) -> str:
    device = found["rows"][0].get("device", "")
    where = f"{device}, {found['machine']}" if device else found["machine"]
    return f"### {title}\n\n`python benchmarks/{command}`: {about}; {where}.\n\n{content}"


def inserted(text: str, content: str) -> str:
    """`text` with `content` between the markers."""
    return re.sub(f"{BEGIN}.*?{END}", lambda _: f"{BEGIN}\n{content}\n{END}", text, flags=re.DOTALL)


TABLES: dict[str, Callable[[], str]] = {
    "README.md": readme_table,
    "docs/index.md": readme_table,
    "docs/choosing.md": choices,
    "docs/schemes.md": every_scheme,
    "docs/measurements.md": measurements,
    "docs/quality.md": quality_tables,
    "docs/allocation.md": allocation,
    "docs/kernels.md": kernels,
    "docs/serving.md": serving,
}


def main() -> None:
    for name, content in TABLES.items():
        path = ROOT / name
        path.write_text(inserted(path.read_text(), content()))


if __name__ == "__main__":
    main()

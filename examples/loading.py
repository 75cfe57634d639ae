"""What the examples share: their options, and a model that suits the machine."""

from __future__ import annotations

import argparse
from typing import Any

import mlx.core as mx
import mlx_lm

import mlx_kvq_plugin as kvq

DEMO = "demo:"


def options(doc: str | None, scheme: str = "tq4") -> argparse.ArgumentParser:
    """A parser with `--model`, and `--kv-scheme` unless there is none."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--model", default="demo:smollm2", help="folder, repository, demo:smollm2 or demo:gemma3")
    if scheme:
        parser.add_argument("--kv-scheme", default=scheme)
    return parser


def path_of(name: str) -> str:
    """Folder or repository of a model; demo models are made at their first use, without a hub."""
    return str(kvq.demo_model_path(name.removeprefix(DEMO))) if name.startswith(DEMO) else name


def load(name: str, scheme: str | None) -> tuple[Any, Any]:
    """Model and tokenizer, compressed unless the scheme is `None`; float32 on CPUs, where half precision is slow."""
    model, tokenizer = kvq.load(path_of(name), kv_scheme=scheme) if scheme else mlx_lm.load(path_of(name))[:2]
    if mx.default_device() == mx.cpu:
        model.set_dtype(mx.float32)
    return model, tokenizer


def load_hf(name: str, scheme: str) -> kvq.CausalLM:
    """The model with transformers' `generate`."""
    dtype = "float32" if mx.default_device() == mx.cpu else None
    return kvq.AutoModelForCausalLM.from_pretrained(path_of(name), kv_scheme=scheme, dtype=dtype)

"""The texts that ship with the package: found by name, packaged, long enough, and nowhere repeated."""

from __future__ import annotations

import tomllib
from collections import Counter
from pathlib import Path

import pytest
from mlx_lm.utils import load_tokenizer

import mlx_kvq_plugin as kvq
from mlx_kvq_plugin.corpus import CORPUS, corpus_text
from mlx_kvq_plugin.errors import CorpusError

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "mlx_kvq_plugin"
FOLDER = PACKAGE / "corpus"
MIN_TOKENS = 2000


def test_every_text_file_has_a_name_and_every_name_a_file():
    assert sorted(path.stem for path in FOLDER.glob("*.txt")) == sorted(CORPUS)
    for name in CORPUS:
        assert corpus_text(name) == (FOLDER / f"{name}.txt").read_bytes().decode("utf-8")


def test_every_text_file_goes_into_the_wheel():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = settings["tool"]["setuptools"]["package-data"]["mlx_kvq_plugin"]
    packaged = {path for pattern in patterns for path in PACKAGE.glob(pattern)}
    assert {FOLDER / f"{name}.txt" for name in CORPUS} <= packaged


@pytest.mark.parametrize("name", CORPUS)
def test_texts_are_plain_and_of_similar_length(name):
    text = corpus_text(name)
    assert 9_000 <= len(text.encode()) <= 10_500
    assert text.endswith("\n") and not text.endswith("\n\n") and text == text.lstrip()
    assert all(character == "\n" or character.isprintable() for character in text)
    assert not any(line != line.rstrip() for line in text.splitlines())


@pytest.mark.parametrize("name", CORPUS)
def test_no_paragraph_of_a_text_is_repeated(name):
    paragraphs = [" ".join(part.split()) for part in corpus_text(name).split("\n\n") if part.strip()]
    assert len(paragraphs) >= 25
    assert [part for part, count in Counter(paragraphs).items() if count > 1] == []


@pytest.mark.parametrize("name", ["", "Prose", "prose.txt", "../errors", "wikitext"])
def test_an_unknown_name_lists_the_known_ones(name):
    with pytest.raises(CorpusError, match="must be one of prose, code, chat, got") as caught:
        corpus_text(name)
    assert repr(name) in str(caught.value) and isinstance(caught.value, kvq.KVQError)


@pytest.mark.real_model
@pytest.mark.parametrize("name", CORPUS)
def test_texts_are_long_enough_for_calibration(name):
    tokenizer = load_tokenizer(kvq.demo_model_path("smollm2", progress=False))
    assert len(tokenizer.encode(corpus_text(name))) >= MIN_TOKENS

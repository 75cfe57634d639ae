"""Codebooks on disk: what is written is read, and whatever is wrong with a file or folder is told in one sentence."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from mlx_kvq_plugin import codebook_store
from mlx_kvq_plugin.codebook_store import FORMAT, CodebookError, codebook_path, load_codebook
from mlx_kvq_plugin.errors import CodecError
from mlx_kvq_plugin.sphere import ScalarCodebook, sphere_codebook

BITS, DIM = 3, 96


def contents(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    with safe_open(path, framework="numpy") as file:
        return {name: file.get_tensor(name) for name in ("levels", "thresholds")}, dict(file.metadata())


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    """The file of a codebook."""
    load_codebook(BITS, DIM, tmp_path)
    return codebook_path(BITS, DIM, tmp_path)


def rewrite(path: Path, metadata: dict[str, str] | None = None, **arrays: np.ndarray) -> None:
    """Change some metadata and some arrays of a file."""
    old, known = contents(path)
    save_file({**old, **arrays}, path, {**known, **(metadata or {})})


def refused(tmp_path: Path, said: str) -> None:
    """The file is refused in a sentence, and not touched."""
    path = codebook_path(BITS, DIM, tmp_path)
    before = path.read_bytes()
    with pytest.raises(CodebookError, match=said) as caught:
        load_codebook(BITS, DIM, tmp_path)
    assert str(path) in str(caught.value)
    assert str(caught.value).endswith("it is damaged: delete it")
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == before


def test_a_codebook_is_written_once_and_read_back_bit_for_bit(tmp_path, monkeypatch):
    first = load_codebook(BITS, DIM, tmp_path)
    assert first == sphere_codebook(BITS, DIM)
    path = codebook_path(BITS, DIM, tmp_path)
    assert path == tmp_path / "codebooks" / "sphere-3bit-96.safetensors"
    arrays, metadata = contents(path)
    assert metadata["format"] == FORMAT
    assert arrays["levels"].dtype == arrays["thresholds"].dtype == np.float64
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert path.stat().st_mode & 0o777 == 0o644

    written = path.stat().st_mtime_ns
    monkeypatch.setattr(codebook_store, "sphere_codebook", None)  # must not be needed again
    assert load_codebook(BITS, DIM, tmp_path) == first
    assert path.stat().st_mtime_ns == written


def test_the_folder_is_that_of_the_package(tmp_path, monkeypatch):
    monkeypatch.setenv("KVQ_CACHE_DIR", str(tmp_path / "mine"))
    load_codebook(1, 64)
    assert (tmp_path / "mine" / "codebooks" / "sphere-1bit-64.safetensors").exists()


def test_a_truncated_file_is_refused(tmp_path, stored):
    whole = stored.read_bytes()
    for size in (0, 5, 40, len(whole) - 1):
        stored.write_bytes(whole[:size])
        refused(tmp_path, "must be a safetensors file")


def test_a_file_of_something_else_is_refused(tmp_path, stored):
    stored.write_text("levels: 1 2 3")
    refused(tmp_path, "must be a safetensors file")
    save_file({"levels": np.zeros(8)}, stored)
    refused(tmp_path, "must hold 3 bits in 96 dimensions, got metadata {}")


@pytest.mark.parametrize("name", ["format", "bits", "dim"])
def test_wrong_metadata_is_refused(tmp_path, stored, name):
    rewrite(stored, {name: "4"})
    refused(tmp_path, f"must hold 3 bits in 96 dimensions, got metadata .*'{name}': '4'")


@pytest.mark.parametrize("mse", ["0.0334", "nan", "three"])
def test_a_wrong_error_is_refused(tmp_path, stored, mse):
    rewrite(stored, {"mse": mse})
    refused(tmp_path, f"must state the error of its levels, {sphere_codebook(BITS, DIM).mse}, got {mse}")


def test_wrong_arrays_are_refused(tmp_path, stored):
    arrays, metadata = contents(stored)
    levels, thresholds = arrays["levels"], arrays["thresholds"]

    def broken(said: str, **changes: np.ndarray) -> None:
        save_file({**arrays, **changes}, stored, metadata)
        refused(tmp_path, said)

    broken("must hold .*'levels': .*float64.*, got .*float32", levels=levels.astype(np.float32))
    broken(r"must hold .*, got .*'thresholds': \(\(6,\)", thresholds=thresholds[:-1].copy())
    broken("must hold .*, got .*'more'", more=levels)
    broken("must hold ascending levels symmetric about 0", levels=levels[::-1].copy())
    broken("must hold ascending levels symmetric about 0", levels=levels + 1e-6)
    broken("must hold ascending levels symmetric about 0", levels=np.full_like(levels, np.nan))
    broken("must hold thresholds midway between the levels", thresholds=thresholds * (1 + 1e-12))
    wider = 1.001 * levels
    broken("must state the error of its levels", levels=wider, thresholds=0.5 * (wider[1:] + wider[:-1]))


def test_a_file_of_another_version_is_made_again(tmp_path, stored):
    book = sphere_codebook(BITS, DIM)
    rewrite(stored, {"version": "0", "mse": "1.0"}, levels=np.zeros(2))
    assert load_codebook(BITS, DIM, tmp_path) == book
    assert contents(stored)[1]["version"] == str(codebook_store.VERSION)
    np.testing.assert_array_equal(contents(stored)[0]["levels"], book.levels)


def test_a_folder_that_cannot_be_used_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CodebookError, match=r"must be readable and writable, got .*; set KVQ_CACHE_DIR") as caught:
        load_codebook(BITS, DIM, tmp_path / "file")
    assert str(tmp_path / "file" / "codebooks") in str(caught.value)


def test_a_folder_in_place_of_the_file_is_refused(tmp_path):
    codebook_path(BITS, DIM, tmp_path).mkdir(parents=True)
    with pytest.raises(CodebookError):
        load_codebook(BITS, DIM, tmp_path)


def test_a_full_disk_leaves_no_file(tmp_path, monkeypatch):
    def full(source: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(CodebookError, match=r"got .*No space left on device"):
        load_codebook(BITS, DIM, tmp_path)
    assert list((tmp_path / "codebooks").iterdir()) == []


def test_rates_without_a_codebook_make_no_folder(tmp_path):
    with pytest.raises(CodecError, match="1 to 8 bits, got 9"):
        load_codebook(9, DIM, tmp_path)
    with pytest.raises(CodecError, match="dimension of at least 4, got 2"):
        load_codebook(2, 2, tmp_path)
    assert list(tmp_path.iterdir()) == []


WRITER = """
import sys
from pathlib import Path
from mlx_kvq_plugin.codebook_store import codebook_path, load_codebook
folder = Path(sys.argv[1])
print("ready", flush=True)
for _ in range(200):
    codebook_path(2, 16, folder).unlink(missing_ok=True)
    assert load_codebook(2, 16, folder).bits == 2
"""


def test_writers_at_the_same_time_leave_whole_files(tmp_path):
    """Another process deletes, writes and reads the same file: whoever reads finds a whole one or none."""
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    books: list[ScalarCodebook] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "ready\n"
        while other.poll() is None:
            codebook_path(2, 16, tmp_path).unlink(missing_ok=True)
            books.append(load_codebook(2, 16, tmp_path))
        _, error = other.communicate()
    assert other.returncode == 0, error
    assert len(books) > 20 and set(books) == {sphere_codebook(2, 16)}
    assert [path.name for path in (tmp_path / "codebooks").iterdir()] == ["sphere-2bit-16.safetensors"]

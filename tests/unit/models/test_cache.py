"""Fingerprints, and files and folders that are complete or absent."""

from __future__ import annotations

import stat
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from see_ray.config import BaseModelConfig
from see_ray.models.cache import (
    cache_dir,
    create_once,
    fill_atomically,
    folder_fingerprint,
    hash_files,
    write_atomically,
)

# Of the files below, as version 0.1 computed them.
FOLDER = "00617b9623b4af5afe19a7ac09345a4f42174ab83e22379801ef6e19394c5be9"
FILE = "e0de8fee3bdbc000062203d22264b21e2ae13d78b014187ca2dad1bc6b5d1e2d"


@pytest.fixture
def model(tmp_path: Path) -> Any:
    """The files of a base model, as far as fingerprints go."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name, text in (("model.safetensors", "weights"), ("config.json", "{}"), ("tokenizer.json", "tok")):
        (folder / name).write_text(text)
    return folder


def in_threads(count: Any, work: Any) -> None:
    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


# --- where the cache is ----------------------------------------------------------------------


def test_the_configured_folder_wins_over_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEE_CACHE", str(tmp_path / "environment"))
    assert cache_dir(BaseModelConfig(cache_dir=tmp_path / "configured")) == tmp_path / "configured"
    assert cache_dir(BaseModelConfig()) == tmp_path / "environment"
    assert (tmp_path / "environment").is_dir()


# --- fingerprints ----------------------------------------------------------------------------


def test_the_fingerprint_is_that_of_earlier_versions(model: Any, tmp_path: Path) -> None:
    """Experts record it; a change would make every stored expert one of another base model."""
    assert folder_fingerprint(model, tmp_path) == FOLDER
    (tmp_path / "x.gguf").write_text("gguf")
    assert hash_files([tmp_path / "x.gguf"], tmp_path) == FILE


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
def test_the_fingerprint_depends_on_every_file(model: Any, tmp_path: Path, file: str) -> None:
    before = folder_fingerprint(model, tmp_path)
    (model / file).write_text("other contents")
    assert folder_fingerprint(model, tmp_path) != before


def test_other_files_beside_the_model_do_not_count(model: Any, tmp_path: Path) -> None:
    before = folder_fingerprint(model, tmp_path)
    (model / "README.md").write_text("about")
    assert folder_fingerprint(model, tmp_path) == before


def test_the_name_of_a_single_file_does_not_count(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_text("gguf")
    (tmp_path / "b.gguf").write_text("gguf")
    assert hash_files([tmp_path / "a.gguf"], tmp_path) == hash_files([tmp_path / "b.gguf"], tmp_path)


def test_files_are_read_once(model: Any, tmp_path: Path) -> None:
    folder_fingerprint(model, tmp_path)
    (cached,) = (tmp_path / "fingerprints").iterdir()
    cached.write_text("from the cache")
    assert folder_fingerprint(model, tmp_path) == "from the cache"


# --- files -----------------------------------------------------------------------------------


def test_a_file_is_written_whole_into_a_new_folder(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.json"
    write_atomically(path, "日本\n")
    write_atomically(path, "second\n")
    assert path.read_text(encoding="utf-8") == "second\n"
    assert list(path.parent.iterdir()) == [path]


def test_a_written_file_has_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    write_atomically(tmp_path / "file", "")
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    write_atomically(tmp_path / "file", "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(tmp_path / "file", "new" * 100_000 + "\ud800")
    assert (tmp_path / "file").read_text() == "old"
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_a_reader_never_finds_half_a_file(tmp_path: Path) -> None:
    path, done = tmp_path / "file", threading.Event()
    texts = {letter * 200_000 for letter in "ab"}
    write_atomically(path, "a" * 200_000)

    def write() -> None:
        for number in range(50):
            write_atomically(path, "ab"[number % 2] * 200_000)
        done.set()

    threading.Thread(target=write).start()
    while not done.is_set():
        assert path.read_text() in texts


# --- folders ---------------------------------------------------------------------------------


def test_a_folder_appears_when_it_is_complete(tmp_path: Path) -> None:
    def fill(target: Path) -> None:
        assert not (tmp_path / "folder").exists()
        (target / "file").write_text("x")

    fill_atomically(tmp_path / "folder", fill)
    assert (tmp_path / "folder" / "file").read_text() == "x"
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o755


def test_a_folder_that_could_not_be_filled_is_absent(tmp_path: Path) -> None:
    def fill(target: Path) -> None:
        (target / "file").write_text("x")
        raise ValueError("half way")

    with pytest.raises(ValueError, match="half way"):
        fill_atomically(tmp_path / "folder", fill)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_another_process_created_first_remains(tmp_path: Path) -> None:
    def fill(target: Path) -> None:
        (target / "file").write_text("second")
        fill_atomically(tmp_path / "folder", fill_first)

    def fill_first(target: Path) -> None:
        (target / "file").write_text("first")

    fill_atomically(tmp_path / "folder", fill)
    assert (tmp_path / "folder" / "file").read_text() == "first"
    assert list(tmp_path.iterdir()) == [tmp_path / "folder"]


def test_a_cached_folder_is_created_once(tmp_path: Path) -> None:
    fills = []

    def fill(target: Path) -> None:
        fills.append(target)
        time.sleep(0.05)
        (target / "file").write_text("x")
        (target / "file").chmod(0o600)

    in_threads(4, lambda: create_once(tmp_path / "folder", fill))
    create_once(tmp_path / "folder", fill)
    assert len(fills) == 1
    assert stat.S_IMODE((tmp_path / "folder" / "file").stat().st_mode) == 0o644

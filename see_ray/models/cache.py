"""Files that are computed once and then shared: fingerprints, converted models, and atomic writes.

Several processes may ask for the same file or folder at the same time, and may be killed while they write it. So both
appear under their name only when they are complete.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from see_ray.config import BaseModelConfig

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
"""Names of the files that a tokenizer and its chat template may consist of."""


def cache_dir(config: BaseModelConfig) -> Path:
    """The folder for converted models and sampled queries: `base_model.cache_dir`, else `$SEE_CACHE`, else
    `~/.cache/see_ray`. It is created if absent."""
    path = config.cache_dir or Path(os.environ.get("SEE_CACHE") or Path.home() / ".cache" / "see_ray")
    path = Path(path).expanduser()
    path.mkdir(parents=True, exist_ok=True)
    return path


# --- fingerprints --------------------------------------------------------------------------


def folder_fingerprint(folder: Path, cache: Path) -> str:
    """SHA-256 of a base model's weights, configuration, tokenizer and chat template, as hex digits."""
    files = [*sorted(folder.glob("*.safetensors")), folder / "config.json"]
    files += [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    return hash_files(files, cache)


def hash_files(files: list[Path], cache: Path) -> str:
    """SHA-256 over the names and contents of files, as hex digits.

    A large model takes a minute to read, so the result is kept in `cache` under the files' paths, sizes and times of
    modification.
    """
    key = hashlib.sha256()
    for file in files:
        real = file.resolve()
        info = real.stat()
        key.update(f"{real}|{info.st_size}|{info.st_mtime_ns};".encode())
    cached = cache / "fingerprints" / key.hexdigest()
    if cached.is_file():
        return cached.read_text(encoding="utf-8")
    total = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        # The name of a single file, such as a GGUF file, does not count: only its suffix does.
        total.update(f"{file.suffix if len(files) == 1 else file.name}:{digest};".encode())
    write_atomically(cached, total.hexdigest())
    return total.hexdigest()


# --- writing ---------------------------------------------------------------------------------


def write_atomically(path: Path, text: str) -> None:
    """Write a UTF-8 file that readers find whole or not at all; its folder is created if absent.

    If several processes write at the same time, one of their texts remains, in full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def fill_atomically(folder: Path, fill: Callable[[Path], None]) -> None:
    """Create a folder that readers find complete or not at all.

    Args:
        folder: must not exist; if another process creates it meanwhile, that one remains.
        fill: called with an empty folder, which is renamed to `folder` when it returns.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        fill(temporary)
        temporary.chmod(0o755)  # mkdtemp makes it readable for its owner only, but users of one host may share it
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was first
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def create_once(folder: Path, fill: Callable[[Path], None]) -> None:
    """Create a folder of the cache unless it exists; processes that ask at the same time wait for the first.

    Args:
        folder: of the cache.
        fill: called with an empty folder; writes the files.
    """
    if folder.is_dir():
        return
    from filelock import FileLock

    def fill_readable(temporary: Path) -> None:
        fill(temporary)
        for file in temporary.iterdir():
            file.chmod(0o644)

    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            fill_atomically(folder, fill_readable)

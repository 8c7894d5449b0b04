"""How fast an expert is fitted, beside Hugging Face Trainer with PEFT.

On the same rows, base model, LoRA rank and targets, batch size, epochs and number type, in turns:

    hf_trainer   Hugging Face Trainer with a PEFT LoRA, loss on the response only
    full         see_ray's full form: Ray Train, DeepSpeed, no padding
_ray's activated form: Ray Train, DeepSpeed, each prefix computed once
    bare         the activated form's steps in a plain PyTorch loop: what Ray Train and DeepSpeed cost

Times are those of prefixes and steps; starting processes is listed apart. Prints a table; --out writes JSON.

    python jobs/benchmarks/fit.py --data DATA --tasks qa,sum,pe --out bench_fit.json
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from bench_options import Names, data_option, out_option, settings_option, write_json

from see_ray import cluster
from see_ray.cli.progress_bar import TerminalListener
from see_ray.cli.render import table
from see_ray.cli.run import run
from see_ray.config import Config, load_config
from see_ray.cpus import available_cpus
from see_ray.data.reconstruct import Example, ExampleEncoder
from see_ray.data.task import SplitOptions, read_task
from see_ray.fit.launch import fit_expert
from see_ray.fit.spec import FitSpec
from see_ray.models.activation import activation_of
from see_ray.models.base_model import BaseModel, find, load_tokenizer

Seconds = dict[str, float]

KINDS = ("hf_trainer", "full", "activated", "bare")


@dataclass(frozen=True)
class Options:
    """The options of the command line."""

    tasks: list[str]
    rows: int
    epochs: int
    repeats: int
    kinds: list[str]


@click.command()
@data_option()
@click.option("--tasks", type=Names(), default="qa,sum,pe", show_default=True, help="Names of tasks.")
@click.option("--rows", default=32, show_default=True, help="Rows of each task.")
@click.option("--epochs", default=3, show_default=True, help="Epochs of each fit.")
@click.option("--repeats", default=3, show_default=True, help="Runs of each kind; the table has medians.")
@click.option("--kinds", type=Names(), default=",".join(KINDS), show_default=True, help="What to run.")
@out_option
@settings_option
def main(data: Path, out: Path | None, settings: tuple[str, ...], **options: Any) -> None:
    """Measure the tokens a second of a fit."""
    chosen = Options(**options)
    config = load_config(None, ["fit.train_batch_size=8", f"fit.num_train_epochs={chosen.epochs}", *settings])
    cluster.connect()
    base = find(config.base_model)
    report: dict[str, Any] = {}
    with TerminalListener() as listener:
        for name in chosen.tasks:
            examples = accept_examples(data / f"{name}.train.jsonl", chosen.rows, base, config)
            runs: dict[str, list[Seconds]] = defaultdict(list)
            for repeat in range(chosen.repeats):
                for kind in chosen.kinds:
                    listener.step(f"{name}: {kind}, run {repeat + 1} of {chosen.repeats}")
                    runs[kind].append(fit_once(kind, examples, base, config))
                    listener.note(", ".join(f"{what} {value:.1f}" for what, value in runs[kind][-1].items()))
            report[name] = summarize(runs, examples, chosen.epochs)
            write_json(report, out)
    click.echo(as_table(report))


def accept_examples(path: Path, rows: int, base: BaseModel, config: Config) -> list[Example]:
    """A task's rows as accept examples."""
    tokenizer = load_tokenizer(base)
    activation = activation_of(tokenizer, config.base_model, config.fit)
    task = read_task(path, split=SplitOptions(max_rows=rows))
    encoder = ExampleEncoder(tokenizer, activation)
    return [encoder.accept(row) for row in task.train]


def fit_once(kind: str, examples: list[Example], base: BaseModel, config: Config) -> Seconds:
    """One run of a kind: `seconds` of fitting, `start_seconds` of everything else."""
    import ray

    started = time.perf_counter()
    if kind in ("full", "activated"):
        fit = config.fit.model_copy(update={"form": kind, "eval_every_steps": 1 << 20})
        activation = activation_of(load_tokenizer(base), config.base_model, fit)
        with tempfile.TemporaryDirectory() as folder:
            spec = FitSpec(examples, base, config.base_model, activation, fit)
            fitted = fit_expert(f"bench-{kind}", spec, Path(folder))
        seconds = fitted.summary.seconds
    else:
        function = {"hf_trainer": hf_trainer, "bare": bare_loop}[kind]
        remote = ray.remote(num_cpus=config.fit.cpus_per_worker, max_calls=1)(function)  # a new process for each run
        seconds = ray.get(remote.remote(examples, config))
    return {"seconds": seconds, "start_seconds": time.perf_counter() - started - seconds}


def hf_trainer(examples: list[Example], config: Config) -> float:
    """Seconds of Hugging Face Trainer with PEFT, used as in their documentation."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    from see_ray.models.base_model import load_model

    fit = config.fit
    torch.set_num_threads(fit.threads_per_worker or available_cpus())
    base = find(config.base_model)
    model = load_model(base, config.base_model, "cuda" if torch.cuda.is_available() else "cpu")
    lora = LoraConfig(task_type="CAUSAL_LM", r=fit.r, lora_alpha=fit.lora_alpha, target_modules=fit.target_modules)
    model = get_peft_model(model, lora)
    rows = [{"input_ids": [*e.prompt, *e.target], "labels": [-100] * len(e.prompt) + list(e.target)} for e in examples]
    for row in rows:
        row["attention_mask"] = [1] * len(row["input_ids"])
    tokenizer = load_tokenizer(base)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=fit.train_batch_size,
            learning_rate=fit.learning_rate,
            num_train_epochs=fit.num_train_epochs,
            warmup_steps=1,
            lr_scheduler_type="cosine",
            max_grad_norm=fit.max_grad_norm,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
            dataloader_pin_memory=torch.cuda.is_available(),
        )
        trainer = Trainer(
            model=model, args=arguments, train_dataset=rows, data_collator=DataCollatorForSeq2Seq(tokenizer)
        )
        return float(trainer.train().metrics["train_runtime"])


def bare_loop(examples: list[Example], config: Config) -> float:
    """Seconds of the activated form's prefixes and steps, with PyTorch alone."""
    import torch

    from see_ray.fit.local import fit_local
    from see_ray.models.base_model import load_model

    torch.set_num_threads(config.fit.threads_per_worker or available_cpus())
    base = find(config.base_model)
    activation = activation_of(load_tokenizer(base), config.base_model, config.fit)
    model = load_model(base, config.base_model, "cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        spec = FitSpec(examples, base, config.base_model, activation, config.fit)
        return fit_local(spec, model, Path(folder)).seconds


def summarize(runs: dict[str, list[Seconds]], examples: list[Example], epochs: int) -> dict[str, Any]:
    """Tokens a second of each kind, medians, and their ratios."""
    tokens = epochs * sum(len(example.prompt) + len(example.target) for example in examples)
    seconds = {kind: statistics.median(run["seconds"] for run in times) for kind, times in runs.items()}
    rates = {kind: round(tokens / value, 1) for kind, value in seconds.items()}

    def ratio(over: str, under: str) -> float | None:
        return round(rates[over] / rates[under], 3) if over in rates and under in rates else None

    return {
        "tokens_per_s": rates,
        "ratios": {
            "activated_over_hf_trainer": ratio("activated", "hf_trainer"),
            "full_over_hf_trainer": ratio("full", "hf_trainer"),
            "activated_over_bare": ratio("activated", "bare"),
        },
        "rows": len(examples),
        "prompt_tokens": round(statistics.mean(len(example.prompt) for example in examples), 1),
        "response_tokens": round(statistics.mean(len(example.target) - 1 for example in examples), 1),
        "epochs": epochs,
        "runs": dict(runs),
    }


def as_table(report: dict[str, Any]) -> str:
    """A row for each task."""
    kinds = list(next(iter(report.values()))["tokens_per_s"])
    rates = [f"{kind} tokens/s" for kind in kinds]
    head = ["task", "prompt", "response", *rates, "activated/hf", "full/hf", "act./bare"]
    rows = [
        [
            name,
            f"{task['prompt_tokens']:.0f}",
            f"{task['response_tokens']:.0f}",
            *(f"{task['tokens_per_s'][kind]:.0f}" for kind in kinds),
            *("" if ratio is None else f"{ratio:.2f}" for ratio in task["ratios"].values()),
        ]
        for name, task in report.items()
    ]
    return table(head, rows)


if __name__ == "__main__":
    run(main)

"""Kill a fit again and again, at random moments, and compare its result with an undisturbed one.

A task of the demo is fitted undisturbed. Then it is fitted while a process is killed with SIGKILL every few seconds: a
worker, or the driver, with which its Ray ends and which is started again. Where a fit ends before it was killed often
enough, another one begins. Steps, reads of each row and last loss are compared with the undisturbed fit's. Prints a
table; --out writes JSON; exit code 1 if a fit differs.

    python jobs/experiments/kill_fit.py --kills 20 --out kill_fit.json
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click

from see_ray.cli.render import table
from see_ray.cli.run import run
from see_ray.data.demo_tasks import demo_tasks
from see_ray.store.expert_store import ExpertStore

SETTINGS = [
    "reconstruct.general_negatives=16",
    "reconstruct.max_eval_rows=8",
    "fit.train_batch_size=8",
    "fit.checkpoint_every_steps=2",
    "fit.max_failures=10",
    "base_model.dtype=float32",
]

UNDISTURBED = "peace"
"""Name of the fit that is not killed, in the report."""

LOSS_TOLERANCE = 0.02
"""Allowed difference of last losses: the order of sums depends on the number of workers."""

WORKER_SHARE = 0.6
"""Share of the kills that hit a worker, where there is one."""

REPORTED = ("steps", "fewest_reads", "most_reads", "resumed", "first_loss", "last_loss", "losses", "seconds")
SHOWN = ("kills", "drivers killed", "workers killed", "steps", "fewest_reads", "most_reads", "resumed", "last_loss")


@click.command()
@click.option("--kills", default=20, show_default=True, help="Number of kills.")
@click.option("--seed", default=0, show_default=True, help="Decides what is killed, and when.")
@click.option("--rows", default=48, show_default=True, help="Rows of the task.")
@click.option("--epochs", default=4, show_default=True, help="Epochs of the fit.")
@click.option("--workers", default=1, show_default=True, help="Workers of the disturbed fit.")
@click.option("--out", type=click.Path(path_type=Path), help="JSON file to write.")
def main(kills: int, seed: int, rows: int, epochs: int, workers: int, out: Path | None) -> None:
    """Compare killed fits with an undisturbed one."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        task = next(task for task in demo_tasks(rows=rows, test_rows=4) if task.name == "dates")
        (folder / "dates.jsonl").write_text("".join(json.dumps(row) + "\n" for row in task.train), encoding="utf-8")
        settings = [*SETTINGS, f"fit.num_train_epochs={epochs}", f"fit.storage_path={folder / 'runs'}"]
        fits = {UNDISTURBED: fit_and_kill(folder, UNDISTURBED, settings, rng, 0)}
        settings += [f"fit.num_workers={workers}", "fit.cpus_per_worker=0.5"]
        killed = 0
        while killed < kills:
            name = f"trouble {len(fits)}"
            fits[name] = fit_and_kill(folder, name, settings, rng, kills - killed)
            killed += fits[name]["kills"]
            if out:
                out.write_text(json.dumps(fits, indent=2) + "\n", encoding="utf-8")
    click.echo(table(["fit", *SHOWN], [[name, *(str(fit[key]) for key in SHOWN)] for name, fit in fits.items()]))
    reference = fits[UNDISTURBED]
    compared = ("steps", "fewest_reads", "most_reads")
    different = [name for name, fit in fits.items() if any(fit[key] != reference[key] for key in compared)]
    spread = max(abs(fit["last_loss"] - reference["last_loss"]) for fit in fits.values())
    others = ", ".join(different) or "none"
    click.echo(f"{killed} kills; losses differ by at most {spread:.5f}; other steps or reads in: {others}")
    sys.exit(1 if different or spread > LOSS_TOLERANCE else 0)


def fit_and_kill(folder: Path, name: str, settings: list[str], rng: random.Random, kills: int) -> dict[str, Any]:
    """Fit with `see learn` in a process of its own, started again as often as it is killed.

    Returns:
        What was killed, and the fit's summary.
    """
    store = ExpertStore.open(str(folder / name))
    log = folder / f"{name}.log"
    command = learn_command(folder, [*settings, f"store.url={store.url}", f"fit.tracking_dir={folder / 'tracking'}"])
    driver = start(command, log)
    killed = {"drivers killed": 0, "workers killed": 0}
    started = time.monotonic()
    while sum(killed.values()) < kills:
        # Long enough to reach a checkpoint now and then, short enough to hit every phase.
        next_kill = time.monotonic() + rng.uniform(5, 45)
        while time.monotonic() < next_kill and driver.poll() is None:
            time.sleep(0.2)
        if driver.poll() is not None:
            break
        workers = descendants(driver.pid, "RayTrainWorker")
        if workers and rng.random() < WORKER_SHARE:
            os.kill(rng.choice(workers), signal.SIGKILL)
            killed["workers killed"] += 1
        else:
            driver.kill()
            driver.wait()
            killed["drivers killed"] += 1
            time.sleep(3)  # its Ray ends, too
            driver = start(command, log)
        click.echo(f"{time.monotonic() - started:5.0f} s  {killed}")
    if driver.wait(timeout=1800) != 0:
        sys.exit(f"the fit ended with {driver.returncode}:\n{log.read_text()[-3000:]}")
    summary = json.loads(store.read_text(store.head().experts[-1], "fit.json"))
    return {"kills": sum(killed.values()), **killed, **{key: summary[key] for key in REPORTED}}


def learn_command(folder: Path, settings: list[str]) -> list[str]:
    """`see learn`; --force, since the verdict of the gate does not matter here."""
    see = [sys.executable, "-c", "from see_ray.cli.main import main; main()"]
    overrides = [word for setting in settings for word in ("--set", setting)]
    return [*see, "learn", str(folder / "dates.jsonl"), "--force", *overrides]


def start(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as file:
        return subprocess.Popen(command, stdout=file, stderr=file, env={**os.environ, "RAY_ADDRESS": "local"})


def descendants(parent: int, name: str) -> list[int]:
    """Ids of processes below `parent` with `name` in their command line."""
    import psutil

    pids = []
    for process in psutil.Process(parent).children(recursive=True):
        try:
            if name in " ".join(process.cmdline()):
                pids.append(process.pid)
        except psutil.Error:
            continue
    return pids


if __name__ == "__main__":
    run(main)

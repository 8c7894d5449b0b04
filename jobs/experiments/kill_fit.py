"""Kill a fit again and again, at random moments, and see whether it ends as the undisturbed one does.

A task of the demo is fitted once in peace. Then it is fitted while something is killed with SIGKILL every few
seconds: a worker, or the process that started the fit (with it goes its Ray), which is then started again. Where
a fit ends before it was killed often enough, another one begins. Steps, rows read and loss of each are compared
with the undisturbed fit's. Prints a table; --out writes JSON; exit code 1 if any differs.

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

LOSS_WITHIN = 0.02
"""By how much last losses may differ: the order of sums depends on how many workers there are."""


@click.command()
@click.option("--kills", default=20, show_default=True, help="How often something is killed.")
@click.option("--seed", default=0, show_default=True, help="Decides what is killed, and when.")
@click.option("--rows", default=48, show_default=True, help="Rows of the task.")
@click.option("--epochs", default=4, show_default=True, help="Passes over them.")
@click.option("--workers", default=1, show_default=True, help="Workers of the disturbed fit.")
@click.option("--out", type=click.Path(path_type=Path), help="JSON file to write.")
def main(kills: int, seed: int, rows: int, epochs: int, workers: int, out: Path | None) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        task = next(task for task in demo_tasks(rows=rows, test_rows=4) if task.name == "dates")
        (folder / "dates.jsonl").write_text("".join(json.dumps(row) + "\n" for row in task.train), encoding="utf-8")
        settings = [*SETTINGS, f"fit.num_train_epochs={epochs}", f"fit.storage_path={folder / 'runs'}"]
        report = {"peace": learn(folder, "peace", settings, draw := random.Random(seed), 0)}
        settings += [f"fit.num_workers={workers}", "fit.cpus_per_worker=0.5"]
        done = 0
        while done < kills:
            name = f"trouble {len(report)}"
            report[name] = learn(folder, name, settings, draw, kills - done)
            done += report[name]["kills"]
            if out:
                out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    keys = ["kills", "drivers killed", "workers killed", "steps", "fewest_reads", "most_reads", "resumed", "last_loss"]
    print(table(["fit", *keys], [[name, *(str(made[key]) for key in keys)] for name, made in report.items()]))
    wanted = {key: report["peace"][key] for key in ("steps", "fewest_reads", "most_reads")}
    off = [name for name, made in report.items() if any(made[key] != value for key, value in wanted.items())]
    spread = [abs(made["last_loss"] - report["peace"]["last_loss"]) for made in report.values()]
    print(
        f"{done} kills; losses differ by at most {max(spread):.5f}; other steps or reads in: {', '.join(off) or 'none'}"
    )
    sys.exit(1 if off or max(spread) > LOSS_WITHIN else 0)


def learn(folder: Path, name: str, settings: list[str], draw: random.Random, kills: int) -> dict[str, Any]:
    """`see learn` in a process of its own, started again as often as it is killed."""
    store = folder / name
    own = [*settings, f"store.url={store}", f"fit.tracking_dir={folder / 'tracking'}"]
    command = [sys.executable, "-c", "from see_ray.cli.main import main; main()", "learn", str(folder / "dates.jsonl")]
    command += ["--force"]  # this is about fits, not about who gets in
    command += [word for setting in own for word in ("--set", setting)]
    driver = start(command, folder / f"{name}.log")
    killed = {"drivers killed": 0, "workers killed": 0}
    began = time.monotonic()
    while sum(killed.values()) < kills:
        # Long enough to get to a checkpoint now and then, short enough to hit every phase.
        wait = time.monotonic() + draw.uniform(5, 45)
        while time.monotonic() < wait and driver.poll() is None:
            time.sleep(0.2)
        if driver.poll() is not None:
            break
        workers = children(driver.pid, "RayTrainWorker")
        if workers and draw.random() < 0.6:
            os.kill(draw.choice(workers), signal.SIGKILL)
            killed["workers killed"] += 1
        else:
            driver.kill()
            driver.wait()
            killed["drivers killed"] += 1
            time.sleep(3)  # its Ray goes with it
            driver = start(command, folder / f"{name}.log")
        print(f"{time.monotonic() - began:5.0f} s  {killed}", flush=True)
    if driver.wait(timeout=1800) != 0:
        sys.exit(f"the fit ended with {driver.returncode}:\n{(folder / f'{name}.log').read_text()[-3000:]}")
    opened = ExpertStore.open(str(store))
    summary = json.loads(opened.read_text(opened.head().experts[-1], "fit.json"))
    kept = ("steps", "fewest_reads", "most_reads", "resumed", "first_loss", "last_loss", "losses", "seconds")
    return {"kills": sum(killed.values()), **killed, **{key: summary[key] for key in kept}}


def start(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as file:
        return subprocess.Popen(command, stdout=file, stderr=file, env={**os.environ, "RAY_ADDRESS": "local"})


def children(parent: int, name: str) -> list[int]:
    """Processes below `parent` whose title contains `name`."""
    import psutil

    found = []
    for process in psutil.Process(parent).children(recursive=True):
        try:
            if name in " ".join(process.cmdline()):
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


if __name__ == "__main__":
    main()

"""A grid of runs, recipes times seeds, each in a process of its own: one per free GPU, or one at a time on a CPU."""

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

from .arguments import RECIPES

logger = logging.getLogger(__name__)

FREE_SHARE = 0.9  # a GPU of which somebody else uses more than the rest is left alone
SET_BY_LAUNCHERS = ("ACCELERATE_", "FSDP_", "GROUP_", "LOCAL_", "MASTER_", "OMP_NUM_THREADS", "RANK", "TORCHELASTIC_")


@dataclass(frozen=True)
class GridRun:
    """
    One run to be made.

    Args:
        name: for messages.
        folder: what it writes; it has ended when `metrics.json` is there.
        arguments: of `train.py`.
    """

    name: str
    folder: Path
    arguments: list[str]

    @property
    def log(self) -> Path:
        """Where its output goes."""
        return self.folder.parent / f"{self.folder.name}.log"


def expand_rows(names: Sequence[str]) -> list[str]:
    """Replace the names of grids, `recipes/grids/NAME.yaml`, by their rows, each once and in order."""
    rows: list[str] = []
    for name in names:
        path = RECIPES / "grids" / f"{name}.yaml"
        rows += yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else [name]
    return list(dict.fromkeys(rows))


def row_arguments(row: str) -> list[str]:
    """Read `RECIPE,option=value,...` as the words of a command line.

    Raises:
        SystemExit: for a part that is not `option=value`.
    """
    recipe, *changes = row.split(",")
    for change in changes:
        if not all(change.partition("=")):
            raise SystemExit(f"{row!r}: {change!r} is not option=value. A row is RECIPE or RECIPE,option=value,...")
    return [recipe, *(f"--{change.strip()}" for change in changes)]


def free_gpus() -> list[str]:
    """Give the numbers of the GPUs that nobody else is using, as CUDA_VISIBLE_DEVICES names them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(index) for index in range(torch.cuda.device_count())]
    memory = [torch.cuda.mem_get_info(index) for index in range(torch.cuda.device_count())]
    return [name for name, (free, total) in zip(names, memory, strict=True) if free > FREE_SHARE * total]


def run_grid(script: str, runs: Sequence[GridRun]) -> list[GridRun]:
    """Make the runs; gives those that failed, after the others were made all the same."""
    if torch.cuda.is_available() and not free_gpus():
        raise SystemExit("Every GPU is in use: wait, or name one to share in CUDA_VISIBLE_DEVICES.")
    idle: list[str | None] = list(free_gpus()) if torch.cuda.is_available() else [None]
    waiting, running, failed = list(runs), [], []  # type: ignore[var-annotated]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as schedulers end a job: the runs are to end with it
    try:
        while waiting or running:
            while waiting and idle:
                running.append(_start(script, waiting.pop(0), idle.pop(0)))
            for started in [started for started in running if started.process.poll() is not None]:
                running.remove(started)
                idle.append(started.gpu)
                failed += [started.run] if started.process.returncode else []
                logger.warning("%s (%d waiting, %d running)", _outcome(started), len(waiting), len(running))
            time.sleep(0.2)
    finally:  # interrupted: what runs is resumed by the next call
        for started in running:
            started.process.terminate()
        for started in running:
            started.process.wait()
    return failed


@dataclass
class _Started:
    run: GridRun
    gpu: str | None
    process: subprocess.Popen
    since: float


def _start(script: str, run: GridRun, gpu: str | None) -> _Started:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(SET_BY_LAUNCHERS)}
    environment.pop("WORLD_SIZE", None)
    if gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = gpu
    run.log.parent.mkdir(parents=True, exist_ok=True)
    with open(run.log, "a", encoding="utf-8") as log:
        command = [sys.executable, script, *run.arguments]
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
    return _Started(run, gpu, process, time.monotonic())


def _outcome(started: _Started) -> str:
    minutes = (time.monotonic() - started.since) / 60
    if not started.process.returncode:
        return f"{started.run.name}: ended after {minutes:.1f} min"
    output = started.run.log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").splitlines()
    spoken = [line for line in output if line.strip("\x1b[A ") and "%|" not in line]  # no remains of progress bars
    last = spoken[-1] if spoken else "no output"
    return f"{started.run.name}: FAILED after {minutes:.1f} min, {last} ({started.run.log})"

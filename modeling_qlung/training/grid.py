"""A grid of runs, recipes times seeds, each in a process of its own: one per free GPU, or one at a time on a CPU."""

import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from .arguments import RECIPES, recipe_names

try:
    import fcntl
except ImportError:  # Windows, where nothing keeps two processes from making one run
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

FREE_SHARE = 0.9  # a GPU of which somebody else uses more than the rest is left alone
GPU_QUERY = ("nvidia-smi", "--query-gpu=index,uuid,memory.used,memory.total", "--format=csv,noheader,nounits")
SET_BY_LAUNCHERS = {
    "GROUP_RANK",
    "GROUP_WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "RANK",
    "ROLE_NAME",
    "ROLE_RANK",
    "ROLE_WORLD_SIZE",
    "WORLD_SIZE",
}
LAUNCHERS_PREFIXES = ("ACCELERATE_", "FSDP_", "TORCHELASTIC_")


@dataclass(frozen=True)
class GridRow:
    """
    One row of a table.

    Args:
        name: what its folder is called.
        arguments: recipe and options, as words of `train.py`.
        reference: name of the row that it is compared with; its own where it is compared with none.
    """

    name: str
    arguments: list[str]
    reference: str


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
        """Where its output goes. It is locked for as long as the run is being made."""
        return self.folder.parent / f"{self.folder.name}.log"


# ---- Rows ----


def expand_rows(names: Sequence[str], baseline: str | None = None) -> list[GridRow]:
    """Give the rows that are named, those of a grid for its name, each once and in order.

    A grid is `recipes/grids/NAME.yaml`, a list of rows, `ROW` or `ROW: REFERENCE`.

    Args:
        names: grids, and rows as `RECIPE` or `RECIPE,option=value,...`.
        baseline: the row that those without a reference of their own are compared with. Default: the first of their
            grid, for rows of no grid the first of all.

    Raises:
        SystemExit: for a malformed row, two rows of one name, and a baseline or reference that is none of the rows.
    """
    specs: dict[str, str] = {}  # a row's reference by the row, both as they were written
    for name in names:
        grid = RECIPES / "grids" / f"{name}.yaml"
        listed = _read_grid(grid) if grid.is_file() else [(name, None)]
        first = listed[0][0] if grid.is_file() else next(iter(specs), name)
        for spec, reference in listed:
            specs.setdefault(spec, reference or baseline or first)
    rows = {spec: _row_name(spec) for spec in specs}
    for spec, name in rows.items():
        if twin := next((other for other in rows if other != spec and rows[other] == name), None):
            raise SystemExit(f"{spec} and {twin} would both be the row {name}: rename one of the files.")
    known = {name: name for name in rows.values()} | rows
    if baseline is not None and baseline not in known:
        raise SystemExit(f"--baseline {baseline} is none of the rows {', '.join(rows.values())}")
    for spec, reference in specs.items():
        if reference not in known:
            raise SystemExit(f"{spec}: its reference {reference} is none of the rows {', '.join(rows.values())}")
    return [GridRow(rows[spec], row_arguments(spec), known[reference]) for spec, reference in specs.items()]


def row_arguments(row: str) -> list[str]:
    """Read `RECIPE,option=value,...` as the words of a command line.

    Raises:
        SystemExit: for a part that is not `option=value`.
    """
    recipe, *changes = row.split(",")
    for change in changes:
        if not all(change.partition("=")):
            raise SystemExit(
                f"{row!r}: {change!r} is not option=value. A row is RECIPE or RECIPE,option=value,..., and neither a "
                "recipe's path nor a value may hold a comma."
            )
    return [recipe, *(f"--{change.strip()}" for change in changes)]


def _read_grid(path: Path) -> list[tuple[str, str | None]]:
    """Give the rows of a grid, each with its reference if it names one."""
    items = yaml.safe_load(path.read_text(encoding="utf-8"))
    return [pair for item in items for pair in (item.items() if isinstance(item, dict) else [(item, None)])]


def _row_name(row: str) -> str:
    """Name a row after what it says, and files and folders in it by their last part: a folder is called so."""
    recipe, *changes = row_arguments(row)
    parts = [recipe if recipe in recipe_names() else Path(recipe).stem]
    for change in changes:
        option, _, value = change.removeprefix("--").partition("=")
        parts.append(f"{option}={Path(value).name if '/' in value else value}")
    return ",".join(parts)


# ---- Runs ----


def launcher_variables(environ: Mapping[str, str]) -> set[str]:
    """Name the variables by which `accelerate launch` or torchrun makes a process one of several.

    A grid's runs are processes of their own, which would wait for others that never come. OMP_NUM_THREADS is among
    them where it is the 1 that launchers set. A precision given to the launcher, which goes with them, is warned about.
    """
    names = {name for name in environ if name in SET_BY_LAUNCHERS or name.startswith(LAUNCHERS_PREFIXES)}
    if names & {"ACCELERATE_MIXED_PRECISION", "LOCAL_WORLD_SIZE"} and environ.get("OMP_NUM_THREADS") == "1":
        names.add("OMP_NUM_THREADS")
    precision = environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision != "no":
        logger.warning(
            "The launcher's --mixed_precision %s is not passed on: a grid's runs take theirs from --bf16 or --fp16.",
            precision,
        )
    return names


def free_gpus() -> list[str]:
    """Give the GPUs that nobody else is using, as CUDA_VISIBLE_DEVICES names them, otherwise by UUID.

    nvidia-smi is asked: this process itself must not take memory on any of them. What CUDA_VISIBLE_DEVICES names and
    nvidia-smi does not list, a slice of a GPU, counts as free.

    Raises:
        SystemExit: nvidia-smi does not answer.
    """
    try:
        answer = subprocess.run(GPU_QUERY, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise SystemExit(
            f"nvidia-smi does not say which GPUs are free: {error}. Give --use_cpu to do without."
        ) from error
    gpus = [[part.strip() for part in line.split(",")] for line in answer.splitlines() if line.strip()]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [uuid for _, uuid, *_ in gpus] if visible is None else [name.strip() for name in visible.split(",")]
    busy = [gpu for gpu in gpus if _in_use(*gpu[2:])]
    return [name for name in names if not any(name == index or uuid.startswith(name) for index, uuid, *_ in busy)]


def _in_use(used: str, total: str) -> bool:
    """Compare MiB; a GPU that does not tell them is not known to be used."""
    return used.isdecimal() and total.isdecimal() and int(used) > (1 - FREE_SHARE) * int(total)


def run_grid(script: str, runs: Sequence[GridRun], use_gpus: bool) -> list[GridRun]:
    """Make the runs; gives those that failed, after the others were made all the same.

    A run that another process is making is left to it, and counts as failed.

    Args:
        script: train.py.
        runs: what is to be made, in this order.
        use_gpus: make one run per free GPU at a time, rather than one.

    Raises:
        SystemExit: every GPU is in use; this process was told to end, as were its runs then.
    """
    if not runs:
        return []
    idle: list[str | None] = list(free_gpus()) if use_gpus else [None]
    if not idle:
        raise SystemExit("Every GPU is in use: wait, or give --use_cpu.")
    dropped = launcher_variables(os.environ)
    environment = {name: value for name, value in os.environ.items() if name not in dropped}
    waiting, running, failed = list(runs), [], []  # type: ignore[var-annotated]
    with _exit_on_sigterm():
        try:
            while waiting or running:
                while waiting and idle:
                    if started := _start(script, waiting[0], idle[0], environment):
                        running.append(started)
                        idle.pop(0)
                    else:
                        logger.warning("%s: is being made by another process", waiting[0].name)
                        failed.append(waiting[0])
                    waiting.pop(0)
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


@contextlib.contextmanager
def _exit_on_sigterm() -> Iterator[None]:
    """Let SIGTERM, by which schedulers end a job, raise SystemExit; only a main thread may set what it does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


@dataclass
class _Started:
    run: GridRun
    gpu: str | None
    process: subprocess.Popen
    since: float


def _start(script: str, run: GridRun, gpu: str | None, environment: Mapping[str, str]) -> _Started | None:
    """Start a run; gives None if another process has it.

    The lock on the log belongs to the open file, which the run has as its output: it lasts as long as the run, also if
    this process is killed before.
    """
    run.log.parent.mkdir(parents=True, exist_ok=True)
    with open(run.log, "a", encoding="utf-8") as log:
        if fcntl is not None:
            try:
                fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return None
        process = subprocess.Popen(
            [sys.executable, script, *run.arguments],
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**environment, **({} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu})},
        )
    return _Started(run, gpu, process, time.monotonic())


def _outcome(started: _Started) -> str:
    minutes = (time.monotonic() - started.since) / 60
    if not started.process.returncode:
        return f"{started.run.name}: ended after {minutes:.1f} min"
    output = started.run.log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").splitlines()
    spoken = [line for line in output if line.strip("\x1b[A ") and "%|" not in line]  # no remains of progress bars
    last = spoken[-1] if spoken else "no output"
    return f"{started.run.name}: FAILED after {minutes:.1f} min, {last} ({started.run.log})"

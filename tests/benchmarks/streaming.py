"""Training from streamed Parquet: throughput against cycles decoded before, and memory over 200,000 rows.

    python -m tests.benchmarks.streaming [--rows N]

The shards are 2,000 simulated cycles of 2.7 s on average, written once and linked under as many names as the rows ask
for: they are read, decoded, resampled and measured each time they come. Throughput is that of the trainer's own steps,
of two trainers with the same model in turn. Memory is that of the processes of one training with a core for its loader,
in a process that has done nothing else, on Linux.
"""

import argparse
import itertools
import os
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from multiprocessing import get_context, set_start_method
from pathlib import Path
from statistics import median
from typing import Any

import datasets
import torch
from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback

import hf_datasets
from modeling_qlung import QLungFeatureExtractor
from modeling_qlung.training.arguments import Arguments, parse
from modeling_qlung.training.build import build_trainer, fit_extractor
from modeling_qlung.training.data import decode_cycles
from modeling_qlung.training.streaming import ParquetCycles
from modeling_qlung.training.trainer import QLungTrainer

from .timing import machine, measure, print_table

SHARD_PATIENTS, SHARD_ROWS = 100, 2000
ROW_GROUP = 250  # about the 32 MB of `hf_datasets.publish`
RATE = 16000
STEPS, ROUNDS = 10, 5
SMALL = ["--hidden_size=192", "--num_hidden_layers=6", "--num_attention_heads=3", "--intermediate_size=768"]
TINY = ["--hidden_size=16", "--num_hidden_layers=1", "--num_attention_heads=1", "--intermediate_size=32"]
ENCODERS = {
    "width 192, 6 layers, 2 s": [*SMALL, "--duration=2.0"],
    "width 96, 3 layers, 4 s": [],
    "width 16, 1 layer, 1 s": [*TINY, "--duration=1.0"],
}


def load_rows() -> Dataset:
    """Give the rows of a shard."""
    return hf_datasets.load("simulated", split="train", train_patients=SHARD_PATIENTS)


def prepare(folder: Path, number: int) -> None:
    """Write one shard and link it, and leave all that `datasets` caches of it behind."""
    datasets.disable_progress_bars()
    rows = load_rows()
    (folder / "data").mkdir()
    names = [folder / "data" / f"train-{index:05d}-of-{number:05d}.parquet" for index in range(number)]
    rows.cast_column("audio", datasets.Audio(decode=False)).to_parquet(names[0], batch_size=ROW_GROUP)
    for name in names[1:]:
        os.link(names[0], name)
    decode_cycles(rows, RATE)
    open_stream(folder).sample(SHARD_ROWS)


def open_stream(folder: Path) -> ParquetCycles:
    """Open what `prepare` wrote."""
    return ParquetCycles(folder, RATE, cache_dir=folder / "cache")


def arguments(folder: Path, loaders: int, words: list[str]) -> Arguments:
    """`quickstart` without what needs all cycles at once."""
    settings = ["--sampling_power=0", "--select_on=last", "--num_train_epochs=1", "--save_strategy=no", "--seed=1"]
    settings += [
        "--normalization=audioset",
        f"--output_dir={folder}",
        f"--dataloader_num_workers={loaders}",
        "--disable_tqdm=true",
    ]
    return parse(["quickstart", "--per_device_train_batch_size=32", *settings, *words])[1]


class Steps:
    """A trainer's own steps, epoch after epoch, `STEPS` per call."""

    def __init__(self, trainer: QLungTrainer):
        self.trainer = trainer
        trainer.state.max_steps, trainer.current_gradient_accumulation_steps = 1_000_000, 1
        trainer.create_optimizer()
        self.batches = self.load()

    def load(self) -> Generator[dict[str, torch.Tensor], None, None]:
        """Give the loader's batches without end."""
        loader = self.trainer.get_train_dataloader()
        for epoch in itertools.count():
            loader.set_epoch(epoch)
            yield from loader

    def __call__(self) -> None:
        """Take them."""
        for batch in itertools.islice(self.batches, STEPS):
            self.trainer.training_step(self.trainer.model, batch)
            self.trainer.optimizer.step()
            self.trainer.model.zero_grad()


def compare(parts: dict[str, Any], extractor: QLungFeatureExtractor, args: Arguments) -> tuple[float, float, float]:
    """Rows per second from memory and streamed, and the median ratio of their rounds."""
    cases = {name: Steps(build_trainer(rows, None, extractor, args)) for name, rows in parts.items()}
    times = measure(cases, ROUNDS)
    for case in cases.values():
        case.batches.close()  # and with it the loader's processes
    rows = STEPS * args[3].train_batch_size
    memory, streamed = times["memory"].seconds, times["streamed"].seconds
    return rows / median(memory), rows / median(streamed), median(m / s for m, s in zip(memory, streamed, strict=True))


def throughput(train: Dataset, stream: ParquetCycles, folder: Path) -> Iterator[list[object]]:
    """Give rows of the table: where a core is left for the loader's process, and where none is."""
    cores = torch.get_num_threads()
    for title, words in ENCODERS.items():
        extractor = fit_extractor(arguments(folder, 0, words)[0], train)
        for threads, loaders in ((max(1, cores - 1), 1), (cores, 1), (cores, 0)):
            torch.set_num_threads(threads)
            parts, args = {"memory": train, "streamed": stream}, arguments(folder, loaders, words)
            memory, streamed, ratio = compare(parts, extractor, args)
            yield [title, threads, loaders, f"{memory:.0f}", f"{streamed:.0f}", f"{ratio:.3f}"]
    torch.set_num_threads(cores)


def memory_of(pid: int) -> int:
    """Bytes of a process and its descendants; a page that several hold counts once."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
    own = next(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    children = " ".join(path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")).split()
    return own + sum(memory_of(int(child)) for child in children)


class MemoryLog(TrainerCallback):
    """Notes time and memory at every hundredth of the training but the last, where the loader's process may be gone."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.megabytes: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        """Note them."""
        if len(self.seconds) < min(99, 100 * state.global_step // state.max_steps):
            self.seconds.append(time.perf_counter())
            self.megabytes.append(memory_of(os.getpid()) / 2**20)


def print_memory(folder: Path) -> None:
    """Train on every row once, and print the memory that this takes along the way."""
    set_start_method("fork", force=True)  # of the loader, as in a training; a spawned process would spawn it
    datasets.disable_progress_bars()
    torch.set_num_threads(max(1, torch.get_num_threads() - 1))
    stream = open_stream(folder)
    args = arguments(folder, 1, ENCODERS["width 16, 1 layer, 1 s"])
    trainer, log = build_trainer(stream, None, fit_extractor(args[0], stream.sample(SHARD_ROWS)), args), MemoryLog()
    trainer.add_callback(log)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    at = {percent: log.megabytes[percent - 1] for percent in (10, 50, 99)}
    rows = [
        [f"{percent} %", f"{percent * len(stream) // 100:,}", f"{value:.0f}", f"{value / at[10] - 1:+.1%}"]
        for percent, value in at.items()
    ]
    later = sorted(value / at[10] - 1 for value in log.megabytes[10:])
    rate = 0.89 * len(stream) / (log.seconds[-1] - log.seconds[9])
    print_table(["of the epoch", "rows", "MB of all processes", "against 10 %"], rows)
    print(
        f"\nAt the {len(later)} hundredths after: {later[0]:+.1%} to {later[-1]:+.1%}, "
        f"all but the four highest at most {later[-5]:+.1%}; {rate:.0f} rows/s."
    )


def run_apart(function: Callable[..., None], *args: object) -> None:
    """Call it in a process of its own, which neither inherits memory nor leaves any.

    Raises:
        RuntimeError: if it fails.
    """
    process = get_context("spawn").Process(target=function, args=args)
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"{function.__name__} ended with {process.exitcode}")


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=200_000, help="of the training whose memory is noted; 0 for none")
    parser.add_argument("--no_throughput", action="store_true", help="note memory alone")
    args = parser.parse_args()
    print(f"{machine()}\n", flush=True)
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run_apart(prepare, folder, max(1, args.rows // SHARD_ROWS))
        if not args.no_throughput:
            headers = ["encoder and input", "threads of the step", "loader processes"]
            headers += ["rows/s from memory", "rows/s streamed", "ratio"]
            print_table(headers, throughput(decode_cycles(load_rows(), RATE), open_stream(folder), folder))
            print(flush=True)
        if args.rows:
            run_apart(print_memory, folder)


if __name__ == "__main__":
    main()

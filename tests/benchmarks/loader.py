"""What the data path costs on a CPU: milliseconds per clip of each stage, and clips per second of whole loaders.

python -m tests.benchmarks.loader
"""

import os
import tempfile
import time

import torch
from datasets import Dataset, disable_progress_bars
from torch.utils.data import DataLoader

from modeling_qlung import QLungFeatureExtractor
from modeling_qlung.training.augmentation import SpecAugment, WaveformAugment
from modeling_qlung.training.data import CycleCollator

from .timing import machine, measure, print_table
from .training import open_rows, simulate_rows

BATCH = 32


def stages(rows: Dataset) -> list[list[str]]:
    """Time the stages of one batch; gives the rows of a table."""
    extractor = QLungFeatureExtractor()
    collate, augment, mask = CycleCollator(extractor), WaveformAugment(), SpecAugment()
    indices = torch.randperm(len(rows))[:BATCH].tolist()
    batch = rows.__getitems__(indices)
    waveforms = [torch.from_numpy(row["waveform"].copy()) for row in batch]
    clips = collate(batch)["clips"]
    features = extractor.extract_features(clips)
    timings = measure(
        {
            "read rows (memory-mapped)": lambda: rows.__getitems__(indices),
            "cut, pad and fade (of collating)": lambda: [extractor.fit_length(waveform) for waveform in waveforms],
            "collate": lambda: collate(batch),
            "gain and noise": lambda: augment(clips),
            "filterbank": lambda: extractor.extract_features(clips),
            "SpecAugment": lambda: mask(features),
        },
        repeats=20,
    )
    return [[name, f"{1e3 * timing.median / BATCH:.3f}"] for name, timing in timings.items()]


def loader_rate(rows: Dataset, workers: int) -> tuple[float, float]:
    """Give a loader's clips per second after its first batch, and the seconds until that."""
    collate = CycleCollator(QLungFeatureExtractor())
    start = time.perf_counter()
    batches = iter(DataLoader(rows, BATCH, shuffle=True, collate_fn=collate, num_workers=workers, drop_last=True))
    next(batches)
    first = time.perf_counter()
    count = sum(len(batch["clips"]) for batch in batches)
    return count / (time.perf_counter() - first), first - start


def main() -> None:
    """Measure and print."""
    disable_progress_bars()
    print(f"{machine()}\n\nBatches of {BATCH} cycles of 0.5 to 5 s, padded to 8 s at 16 kHz.\n")
    with tempfile.TemporaryDirectory() as folder:
        rows = open_rows(simulate_rows(2048, folder))
        print_table(["stage", "ms per clip"], stages(rows))
        print()
        workers = sorted({0, 1, 2, min(4, os.cpu_count() or 1)})
        rates = ((count, *loader_rate(rows, count)) for count in workers)
        print_table(
            ["workers", "clips/s", "first batch"], ([count, f"{rate:.0f}", f"{s:.2f} s"] for count, rate, s in rates)
        )


if __name__ == "__main__":
    main()

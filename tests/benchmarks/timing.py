"""Interleaved timings, the machine's own limits, and tables: what every benchmark here is made of."""

import datetime
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch


@dataclass(frozen=True)
class Timing:
    """Seconds of one case over its repetitions."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median, in seconds."""
        return float(np.median(self.seconds))

    def __str__(self) -> str:
        low, high = min(self.seconds), max(self.seconds)
        return f"{1e3 * self.median:.4g} ms ({1e3 * low:.4g} to {1e3 * high:.4g})"


def measure(cases: Mapping[str, Callable[[], object]], repeats: int = 5) -> dict[str, Timing]:
    """Time every case once per round, after one round that does not count; the GPU's work is waited for.

    Rounds go through the cases in turn, so that a machine that slows down or is shared slows all of them alike.
    """
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(repeats + 1):
        for name, case in cases.items():
            synchronize()
            start = time.perf_counter()
            case()
            synchronize()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def matmul_rate(dtype: torch.dtype, device: str | torch.device = "cpu", size: int | None = None) -> float:
    """Measure the machine's rate on one large matrix product, in floating-point operations per second."""
    size = size or (8192 if torch.device(device).type == "cuda" else 2048)
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / min(measure({"": lambda: left @ right}, repeats=10)[""].seconds)


def bandwidth(device: str | torch.device = "cpu", megabytes: int = 512) -> float:
    """Measure the machine's memory bandwidth on a copy (one read, one write), in bytes per second."""
    source = torch.ones(megabytes * 2**20 // 4, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / min(measure({"": lambda: target.copy_(source)}, repeats=10)[""].seconds)


def machine() -> str:
    """Name the processor, its threads, the GPU, the versions and the date in one line."""
    names = [line for line in _cpu_information() if line.startswith("model name")]
    processor = names[0].split(":", 1)[1].strip() if names else platform.processor() or platform.machine()
    features = " ".join(name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_int8") if _has(name))
    parts = [f"{processor} ({features}), {torch.get_num_threads()} threads"]
    if torch.cuda.is_available():
        parts.append(f"{torch.cuda.get_device_name()} (CUDA {torch.version.cuda})")
    parts.append(", ".join(f"{name} {version(name)}" for name in ("torch", "transformers")))
    return "; ".join([*parts, datetime.date.today().isoformat()])


def _cpu_information() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []


def _has(feature: str) -> bool:
    return any(line.startswith("flags") and feature in line.split() for line in _cpu_information())


def print_table(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a Markdown table; all columns but the first are aligned to the right."""
    print(f"| {' | '.join(headers)} |")
    print(f"|---|{'---:|' * (len(headers) - 1)}")
    for row in rows:
        print(f"| {' | '.join(map(str, row))} |", flush=True)

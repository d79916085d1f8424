"""Answers of AST base and a small AST: seconds per clip against Transformers' own AST and the machine's limits.

    python -m tests.benchmarks.inference

The reference is `pipeline("audio-classification")` of ASTFeatureExtractor and ASTForAudioClassification, which pad
every clip to 1024 frames. Weights are random; the same clips are given as arrays. On a CPU, and on a GPU where there is
one.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import ASTConfig, ASTFeatureExtractor, ASTForAudioClassification, PreTrainedModel, pipeline

from modeling_qlung import QLungConfig, QLungFeatureExtractor, QLungForAudioClassification
from modeling_qlung.inference import fastest_dtype

from .timing import bandwidth, machine, matmul_rate, measure, print_table

RATE = 16000
SIZES: dict[str, dict[str, Any]] = {
    "base": {},
    "small": {  # of the recipe sprsound-small
        "hidden_size": 192,
        "num_hidden_layers": 6,
        "num_attention_heads": 3,
        "intermediate_size": 768,
        "frequency_stride": 16,
        "time_stride": 16,
    },
}
# Runs where this package is not: prints the seconds from its own start to each stage.
START_UP = """
import json, sys, time
start = time.perf_counter()
import numpy, torch
from transformers import AutoFeatureExtractor, AutoModelForAudioClassification
imported = time.perf_counter()
folder = sys.argv[1]
extractor = AutoFeatureExtractor.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForAudioClassification.from_pretrained(folder, trust_remote_code=True).eval()
loaded = time.perf_counter()
noise = numpy.random.default_rng(0).standard_normal(128000).astype("float32")
with torch.inference_mode():
    model(**extractor(noise, sampling_rate=16000, return_tensors="pt"))
print(json.dumps([imported - start, loaded - imported, time.perf_counter() - loaded]))
"""


@dataclass(frozen=True)
class Case:
    """A row of the table: what answers, the configuration and number format of its encoder, and the call to time."""

    name: str
    encoder: ASTConfig
    dtype: torch.dtype
    answer: Callable[[], object]


def matrix_flops(config: ASTConfig) -> int:
    """Count the floating-point operations of one clip's matrix products: patches, linear maps and attention."""
    width, layers = config.hidden_size, config.num_hidden_layers
    frequencies = (config.num_mel_bins - config.patch_size) // config.frequency_stride + 1
    patches = frequencies * ((config.max_length - config.patch_size) // config.time_stride + 1)
    tokens = patches + 2
    linear = 2 * tokens * (4 * width**2 + 2 * width * config.intermediate_size)
    return layers * (linear + 4 * tokens**2 * width) + 2 * patches * config.patch_size**2 * width


def weight_bytes(case: Case) -> int:
    """Count the bytes of the weights, which a call reads at least once."""
    layers, width = case.encoder.num_hidden_layers, case.encoder.hidden_size
    return layers * (4 * width**2 + 2 * width * case.encoder.intermediate_size) * case.dtype.itemsize


def build(size: str) -> dict[str, tuple[PreTrainedModel, Any]]:
    """Make both models with random weights, and their feature extractors."""
    torch.manual_seed(0)
    options = {**SIZES[size], "num_labels": 4}
    return {
        "reference": (ASTForAudioClassification(ASTConfig(**options)).eval(), ASTFeatureExtractor()),
        "ours": (
            QLungForAudioClassification(QLungConfig(audio_config={**SIZES[size], "max_length": 798})).eval(),
            QLungFeatureExtractor(),
        ),
    }


def classify(model: PreTrainedModel, extractor: QLungFeatureExtractor, clips: list[np.ndarray]) -> torch.Tensor:
    """Answer all clips in one batch, features computed on the model's device."""
    with torch.inference_mode():
        inputs = extractor(clips, sampling_rate=RATE, return_tensors="pt", device=model.device)
        return model(**inputs).logits.softmax(-1).cpu()


def cases(size: str, clips: list[np.ndarray], device: str) -> list[Case]:
    """List what answers these clips: first the reference, then this package, last in its fastest number format."""
    models = build(size)
    reference, extractor = models["reference"]
    options: dict[str, Any] = {"task": "audio-classification", "device": device}
    theirs = pipeline(model=reference, feature_extractor=extractor, **options)
    rows = [Case("Transformers", reference.config, torch.float32, partial(theirs, clips, batch_size=len(clips)))]
    model, ours_extractor = models["ours"]
    encoder = model.config.audio_config
    if len(clips) == 1:
        ours = pipeline(model=model, feature_extractor=ours_extractor, **options)
        rows.append(Case("ours, float32, pipeline", encoder, torch.float32, partial(ours, clips)))
    for dtype in dict.fromkeys([torch.float32, fastest_dtype(device)]):
        copy = build(size)["ours"][0].to(device, dtype)
        name = f"ours, {str(dtype).removeprefix('torch.')}"
        rows.append(Case(name, encoder, dtype, partial(classify, copy, ours_extractor, clips)))
    return rows


def windows(recording: np.ndarray, seconds: float = 8.0, hop: float = 4.0) -> list[np.ndarray]:
    """Cut a recording into windows that overlap by half."""
    length, step = round(seconds * RATE), round(hop * RATE)
    return [recording[start : start + length] for start in range(0, len(recording) - length + 1, step)]


def print_speed(device: str) -> None:
    """Print seconds per clip of every size and input, on one device, and the device's limits."""
    recording = (0.1 * np.random.default_rng(0).standard_normal(60 * RATE)).astype(np.float32)
    inputs = {"one clip of 8 s": (windows(recording)[:1], 9), "60 s, 14 windows": (windows(recording), 3)}
    formats = dict.fromkeys([torch.float32, fastest_dtype(device)])
    rates, rows, memory_rate = dict.fromkeys(formats, 0.0), [], bandwidth(device)
    for size in SIZES:
        for name, (clips, repeats) in inputs.items():
            listed = cases(size, clips, device)
            rates = {dtype: max(rates[dtype], matmul_rate(dtype, device)) for dtype in formats}
            timings = measure({case.name: case.answer for case in listed}, repeats)
            rows += [
                (f"{size}, {name}", case, timings[case.name], timings[listed[0].name], len(clips)) for case in listed
            ]
    limits = (f"{rates[dtype] / 1e9:.4g} GFLOP/s in {str(dtype).removeprefix('torch.')}" for dtype in formats)
    print(f"Limits on {device}: {', '.join(limits)}, {memory_rate / 1e9:.3g} GB/s.\n")
    table = []
    for label, case, timing, reference, number in rows:
        limit = max(number * matrix_flops(case.encoder) / rates[case.dtype], weight_bytes(case) / memory_rate)
        times = np.median(np.divide(reference.seconds, timing.seconds))  # round by round, each under the same load
        per_clip = [f"{1e3 * timing.median / number:.4g}", f"{times:.2f}", f"{limit / timing.median:.0%}"]
        table.append([label, case.name, *per_clip])
    print_table(["AST, input", f"on {device}", "ms per clip", "times as fast", "of the machine's limit"], table)


def print_start_up(repeats: int = 3) -> None:
    """Print the time from a process's start to its first answer, from saved checkpoints, away from this package."""
    with tempfile.TemporaryDirectory() as folder:
        commands = {}
        for size in SIZES:
            for name, parts in build(size).items():
                place = Path(folder, f"{name}_{size}")
                for part in parts:
                    part.save_pretrained(place)
                commands[f"{name}, {size}"] = [sys.executable, "-P", "-c", START_UP, str(place)]
        stages: dict[str, list[list[float]]] = {name: [] for name in commands}
        variables = {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(Path(folder, "modules"))}
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | variables

        def start(name: str) -> None:
            command = subprocess.run(
                commands[name],
                cwd=folder,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                check=True,
            )
            stages[name].append(json.loads(command.stdout.splitlines()[-1]))

        timings = measure({name: partial(start, name) for name in commands}, repeats)
    rows = [
        [name, *(f"{value:.2f}" for value in np.median(stages[name][1:], axis=0)), f"{timings[name].median:.2f}"]
        for name in commands
    ]
    print_table(["start-up, seconds", "imports", "loading", "first answer", "process in all"], rows)


def main() -> None:
    """Print the tables."""
    print(f"{machine()}\n")
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        print_speed(device)
        print()
    print_start_up()


if __name__ == "__main__":
    main()

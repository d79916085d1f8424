"""Training on input of 2, 4 or 8 s against 8 s for all, on the lengths of real cycles and events.

    QLUNG_DATA=FOLDER python -m tests.benchmarks.buckets

FOLDER holds icbhi_2017 and sprsound_2022; their annotations alone are read. A whole training step (filterbank,
SpecAugment, forward, backward, AdamW, bf16, the faster of eager and fused attention) is timed at each length, and the
lengths are weighted by how many rows of an epoch the sampler puts into batches of each. The reference is the step at
8 s of the same run. AdamW's update, which costs a batch of short clips as much as one of long ones, is timed alone too.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import ASTConfig

from modeling_qlung import QLungConfig, QLungFeatureExtractor, QLungForAudioClassification
from modeling_qlung.training.augmentation import SpecAugment
from modeling_qlung.training.sampling import WeightedEpochSampler

from .timing import machine, measure, print_table

EXTRACTOR = QLungFeatureExtractor(durations=[2.0, 4.0, 8.0])
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BATCH_SIZES = {"AST base": {"cuda": 32, "cpu": 4}[DEVICE.type], "AST small": 32}
SIZES = {
    "AST base": {},
    "AST small": {  # of the recipe sprsound-small
        "hidden_size": 192,
        "num_hidden_layers": 6,
        "num_attention_heads": 3,
        "intermediate_size": 768,
        "frequency_stride": 16,
        "time_stride": 16,
    },
}


def icbhi_seconds(folder: Path, with_audio: bool) -> list[float]:
    """Lengths of the annotated cycles, of all recordings or of those whose audio is there."""
    files = sorted((folder / "ICBHI_final_database").glob("*_*.txt"))
    files = [file for file in files if not with_audio or file.with_suffix(".wav").is_file()]
    lines = [line.split() for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    return [float(line[1]) - float(line[0]) for line in lines if len(line) == 4]


def sprsound_seconds(folder: Path) -> list[float]:
    """Lengths of the annotated events of the training part."""
    files = sorted((folder / "BioCAS2022" / "train2022_json").glob("*.json"))
    events = [event for file in files for event in json.loads(file.read_text(encoding="utf-8"))["event_annotation"]]
    return [(float(event["end"]) - float(event["start"])) / 1000 for event in events]


def trained_shares(seconds: Sequence[float], batch_size: int = 32) -> np.ndarray:
    """Shares of an epoch's rows that are in batches of each length."""
    buckets = EXTRACTOR.bucket(np.round(np.array(seconds) * EXTRACTOR.sampling_rate))
    labels = [0] * len(buckets)
    sampler = WeightedEpochSampler(labels, 1, 0.0, replacement=False, buckets=buckets.tolist(), batch_size=batch_size)
    order = buckets[list(sampler)]
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    rows = np.bincount([batch.max() for batch in batches], [len(batch) for batch in batches], minlength=3)
    return rows / rows.sum()


def build(sizes: Mapping[str, int]) -> QLungForAudioClassification:
    """Make a model of these sizes for the three lengths."""
    encoder = ASTConfig(max_length=EXTRACTOR.max_length, **sizes)
    return QLungForAudioClassification(QLungConfig(audio_config=encoder, input_frames=EXTRACTOR.input_frames))


def operations(sizes: Mapping[str, int]) -> list[int]:
    """Floating-point operations of one clip's forward pass at each length, counted without computing them."""
    with torch.device("meta"):
        model = build(sizes).qlung.eval()
        model.set_attn_implementation("eager")
        counts = []
        for frames in EXTRACTOR.input_frames:
            with FlopCounterMode(display=False) as counter:
                model(torch.empty(1, frames, 128))
            counts.append(counter.get_total_flops())
    return counts


def training_step(
    model: QLungForAudioClassification,
    optimizer: torch.optim.Optimizer,
    num_samples: int,
    batch_size: int,
    attention: str,
) -> Callable[[], None]:
    """Make a step on clips of one length."""
    augment = SpecAugment(full_frames=EXTRACTOR.max_length)
    clips = 0.1 * torch.randn(batch_size, num_samples, device=DEVICE)
    labels = torch.arange(batch_size, device=DEVICE) % 4

    def step() -> None:
        model.set_attn_implementation(attention)
        features = augment(EXTRACTOR.extract_features(clips))
        with torch.autocast(DEVICE.type, torch.bfloat16):
            loss = model(features, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def update(model: QLungForAudioClassification, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """Make a step of the optimizer alone."""
    gradients = [torch.zeros_like(parameter) for parameter in model.parameters()]

    def step() -> None:
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        optimizer.zero_grad()

    return step


def seconds_per_clip(model: QLungForAudioClassification, batch_size: int) -> tuple[np.ndarray, float]:
    """Time a step at each length, and the update alone, and give the share of one clip of each."""
    kernels, optimizer = ("eager", "sdpa"), torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
    cases = {
        f"{kernel} {length}": training_step(model, optimizer, length, batch_size, kernel)
        for kernel in kernels
        for length in EXTRACTOR.clip_lengths
    }
    timings = measure({**cases, "update": update(model, optimizer)}, repeats=3)
    medians = [[timings[f"{kernel} {length}"].median for length in EXTRACTOR.clip_lengths] for kernel in kernels]
    return np.min(medians, axis=0) / batch_size, timings["update"].median / batch_size


def main() -> None:
    """Time the steps and print what they cost on each data set."""
    root = Path(os.environ["QLUNG_DATA"])
    data = {
        "ICBHI, cycles at hand": icbhi_seconds(root / "icbhi_2017", with_audio=True),
        "ICBHI, all cycles": icbhi_seconds(root / "icbhi_2017", with_audio=False),
        "SPRSound, training events": sprsound_seconds(root / "sprsound_2022"),
    }
    batches = ", ".join(f"{name} {size}" for name, size in BATCH_SIZES.items())
    print(f"{machine()}; clips per batch: {batches}\n")
    seconds, updates, counts = {}, {}, {}
    for name, sizes in SIZES.items():
        seconds[name], updates[name] = seconds_per_clip(build(sizes).to(DEVICE).train(), BATCH_SIZES[name])
        counts[name] = np.array(operations(sizes), dtype=float)
    lengths = [f"{duration:g} s" for duration in EXTRACTOR.durations or ()]
    print_table(
        ["one training step", *(f"ms per clip, {length}" for length in lengths), "of it update", "GFLOP, forward"],
        [
            [name, *(f"{1e3 * value:.1f}" for value in (*seconds[name], updates[name])), _joined(counts[name] / 1e9)]
            for name in SIZES
        ],
    )
    print()
    rows = []
    for name, values in data.items():
        shares = trained_shares(values)
        costs = [cost for size in SIZES for cost in (counts[size], seconds[size], seconds[size] - updates[size])]
        ratios = [f"{cost[-1] / (shares @ cost):.2f}" for cost in costs]
        rows.append([name, len(values), *(f"{100 * share:.1f} %" for share in shares), *ratios])
    kinds = [f"{size}, {kind}" for size in SIZES for kind in ("by operations", "measured", "but for the update")]
    print_table(["clips per second against 8 s for all", "rows", *lengths, *kinds], rows)


def _joined(values: np.ndarray) -> str:
    return " / ".join(f"{value:.3g}" for value in values)


if __name__ == "__main__":
    main()

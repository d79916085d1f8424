"""What the published Patch-Mix code does otherwise than it says, or than AST's own code does, reproduced by name.

The code is `raymin0223/patch-mix_contrastive_learning` (Bae et al. 2023, arXiv 2305.14032), which many published ICBHI
scores rest on. Nothing here happens unless it is asked for; [`FAULTS`] says what each name stands for.
"""

import dataclasses
import inspect
import io
from collections.abc import Mapping
from statistics import NormalDist
from typing import Any

import soundfile
import torch
from datasets import Audio, Dataset, Features, Value
from datasets.fingerprint import Hasher
from torch import nn
from torchaudio.transforms import Fade, Resample
from transformers import TrainerCallback

from ..inference.audio import read_audio
from .augmentation import SpecAugment

FAULTS = {
    "preparation": "Whole recordings are resampled (torchaudio) and faded over 62.5 ms at both ends, then cut into "
    "cycles. Otherwise: each cycle is cut on the file's own samples and resampled by itself (soxr), without a fade.",
    "position_grid": "AST's positions are made for 128 frames of 798 bands: twelve middle columns, stretched to a grid "
    "of 79 x 12 and added to patches in the order 12 x 79. Otherwise: the middle 79 columns, each in its place.",
    "spec_augment": "No masks with probability 0.16 (a normal draw is compared where a uniform one is meant), and time "
    "masks filled with the mean after the frequency masks. Otherwise: always masks, filled with the mean before them.",
    "moving_average": "The weights go half of each step, and the next step starts there: half the learning rate, and "
    "no average of more than two weights. Otherwise: whole steps, and --ema_decay averages weights beside them.",
}
FADE_S = 1 / 16


def cut_recordings(recordings: Dataset, sampling_rate: int) -> Dataset:
    """Fault "preparation": resample and fade whole recordings, then cut their cycles.

    What follows is as by default, `QLungFeatureExtractor` with cyclic padding to 8 s and its fade of 62.5 ms. (A cycle
    of exactly 8 s, and ICBHI has none, would be faded there by the published code, and is not by ours.)

    Args:
        recordings: rows of `hf_datasets.load(..., config="recordings")`.
        sampling_rate: of the model, in Hz.

    Returns:
        Rows as of `hf_datasets.load(..., config="cycles")`, in the same order, for `data.decode_cycles`; `audio` holds
        float32 WAV bytes at `sampling_rate`. Cached beside the dataset given.

    Raises:
        ValueError: if a cycle holds no sample of its recording.
    """
    shared = {name: kind for name, kind in recordings.features.items() if name not in ("audio", "cycles")}
    marks = recordings.features["cycles"].feature
    wav = {"bytes": Value("binary"), "path": Value("string")}
    # `datasets` knows a function by its name: after a change of the code it would serve what the old code gave.
    code = [inspect.getsource(part) for part in (_cut_recording, _faded_recording, read_audio)]
    cycles = recordings.cast_column("audio", Audio(decode=False)).map(
        _cut_recording,
        batched=True,
        batch_size=1,
        fn_kwargs={"sampling_rate": sampling_rate},
        remove_columns=recordings.column_names,
        features=Features({"audio": wav, **marks, **shared, "cycle_index": Value("int32")}),
        desc="Cut recordings as published",
        new_fingerprint=Hasher.hash([recordings._fingerprint, sampling_rate, *code]),
    )
    return cycles.cast_column("audio", Audio())


def _cut_recording(batch: Mapping[str, list[Any]], sampling_rate: int) -> dict[str, list[Any]]:
    """The cycles of a batch of one recording."""
    recording = {name: values[0] for name, values in batch.items()}
    content, cycles, name = recording.pop("audio")["bytes"], recording.pop("cycles"), recording["recording_id"]
    waveform = _faded_recording(content, sampling_rate)
    columns: dict[str, list[Any]] = {column: [value] * len(cycles) for column, value in recording.items()}
    for mark in ("label", "crackle", "wheeze", "start", "end", "event_type"):
        columns[mark] = [cycle[mark] for cycle in cycles]
    columns |= {"cycle_index": list(range(len(cycles))), "audio": []}
    for index, cycle in enumerate(cycles):
        samples = waveform[int(cycle["start"] * sampling_rate) : int(cycle["end"] * sampling_rate)]
        if not len(samples):
            raise ValueError(
                f"{name}: cycle {index}, from {cycle['start']} to {cycle['end']} s, holds none of the recording's "
                f"{len(waveform) / sampling_rate:.3f} s. Correct the annotation."
            )
        file = io.BytesIO()
        soundfile.write(file, samples.numpy(), sampling_rate, format="WAV", subtype="FLOAT")
        columns["audio"].append({"bytes": file.getvalue(), "path": f"{name}_{index}.wav"})
    return columns


def _faded_recording(content: bytes, sampling_rate: int) -> torch.Tensor:
    """A recording's samples (n,) at `sampling_rate`, by torchaudio's default filter, faded at both ends."""
    rate = soundfile.info(io.BytesIO(content)).samplerate
    waveform = Resample(rate, sampling_rate)(torch.from_numpy(read_audio(content, rate)))
    fade = int(FADE_S * sampling_rate)
    return Fade(fade, fade, "linear")(waveform)


def scramble_position_grid(positions: torch.Tensor, source, target) -> torch.Tensor:
    """Fault "position_grid", in the place of `modeling_qlung.cut_position_grid`.

    The published code gives its AST the frames for the bands and the bands for the frames. So the time axis is cut to
    what 128 frames need (12 of 101 columns), the frequency axis is stretched to 798 bands (79 rows), and the grid comes
    out row by row, 79 x 12. The patches come 12 x 79: patch i, at band i // 79 and time i % 79, gets cell (i // 12,
    i % 12), whose row tells a frequency (i // 12) / 79 and whose column a time within 10 % of the clip.

    Args:
        positions: shape (1, 2 + frequencies * times, hidden), two special tokens first, then frequency-major.
        source: the `ASTConfig` that they were trained with.
        target: the same with a smaller `max_length`.

    Returns:
        Shape (1, 2 + frequencies * fewer times, hidden).

    Raises:
        ValueError: if `target` has no more frames than bands, which the published code never met.
    """
    if target.max_length <= target.num_mel_bins:
        raise ValueError(
            f"The published position grid is known for more frames than bands, and {target.max_length} frames of "
            f"{target.num_mel_bins} bands were asked for. Leave position_grid out, or ask for a longer duration."
        )
    frequencies = (source.num_mel_bins - source.patch_size) // source.frequency_stride + 1
    times = (source.max_length - source.patch_size) // source.time_stride + 1
    rows = (target.max_length - target.patch_size) // target.frequency_stride + 1
    columns = (target.num_mel_bins - target.patch_size) // target.time_stride + 1
    special, grid = positions[:, :2], positions[:, 2:].unflatten(1, (frequencies, times)).permute(0, 3, 1, 2)
    start = times // 2 - columns // 2
    grid = nn.functional.interpolate(grid[..., start : start + columns], size=(rows, columns), mode="bilinear")
    return torch.cat([special, grid.flatten(2).transpose(1, 2)], dim=1)


def spec_augment(augment: SpecAugment) -> SpecAugment:
    """Fault "spec_augment": the same masks, left out where a standard normal draw exceeds 1, and filled step by step.

    The published code also writes its masks into the data set's own arrays. With its workers started anew each epoch
    and no example drawn twice this changes nothing, and it is not reproduced.
    """
    return dataclasses.replace(augment, probability=NormalDist().cdf(1), fill="mean per axis")


class HalfStepCallback(TrainerCallback):
    """Fault "moving_average": after each step, weights and statistics become the mean of before and after it.

    The published code (option `ma_beta` 0.5) copies the model before a batch and puts 0.5 old + 0.5 new back after the
    optimiser's step, whose own state stays. As training goes on from there, nothing is averaged over time: w ← w + Δ/2,
    which for Adam is half the learning rate, and half the pull of new batches on batch-norm statistics.
    """

    def __init__(self) -> None:
        self.before: dict[str, torch.Tensor] = {}

    def on_step_begin(self, args, state, control, *, model: nn.Module, **kwargs):
        """Keeps the weights and statistics that the step starts from."""
        self.before = {name: value.clone() for name, value in _averaged(model)}

    @torch.no_grad()
    def on_step_end(self, args, state, control, *, model: nn.Module, **kwargs):
        """Goes back half of the step."""
        for name, value in _averaged(model):
            value.lerp_(self.before[name], 0.5)
        self.before = {}


def _averaged(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Parameters and floating-point buffers; counters have no mean."""
    return [(name, value) for name, value in model.state_dict().items() if value.is_floating_point()]

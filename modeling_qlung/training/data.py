"""From dataset rows to batches: decode and resample once, fit what the preparation needs, collate."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Audio, Dataset, Features, List, Value, concatenate_datasets
from datasets.fingerprint import Hasher
from tqdm.auto import tqdm

from .. import quality_qlung
from ..evaluation import noises
from ..evaluation.tasks import FOUR_CLASS, Task
from ..feature_extraction_qlung import QLungFeatureExtractor
from ..inference import audio as recordings_audio
from ..quality_qlung import entropy_and_rms, fit_statistics, quality_score

UNLABELLED = -100  # the index that cross-entropy leaves out
KEPT_COLUMNS = ("patient_id", "recording_id", "cycle_index", "device", "fold")
DECODED_FEATURES = {
    "waveform": List(Value("float32")),
    "entropy": Value("float64"),
    "rms": Value("float64"),
    "label": Value("int64"),
}


def decode_cycles(dataset: Dataset, sampling_rate: int, task: Task = FOUR_CLASS) -> Dataset:
    """Decode and resample every cycle once (recording, where the task is about these), and measure its quality.

    Args:
        dataset: rows of `hf_datasets.load(..., config=task.config)`.
        sampling_rate: of the model, in Hz.
        task: gives each row its label.

    Returns:
        A memory-mapped dataset, cached beside the one given, with `waveform` (float32 samples), `entropy` and `rms` as
        recorded, `label` (class of the task, None where it has none), patient_id, recording_id, device, and, where
        there are such, cycle_index and fold.

    Raises:
        ValueError: if the dataset lacks the task's column.
    """
    classes = label_classes(dataset.features, task)
    # `datasets` knows a function by its name: after a change of the code it would serve what the old code gave.
    code = [inspect.getsource(part) for part in (recordings_audio, quality_qlung, decode_row)]
    dropped = [name for name in dataset.column_names if name not in KEPT_COLUMNS]
    kept = {name: dataset.features[name] for name in KEPT_COLUMNS if name in dataset.features}
    decoded = dataset.cast_column("audio", Audio(decode=False)).map(
        decode_row,
        fn_kwargs={"sampling_rate": sampling_rate, "column": task.column, "classes": classes},
        remove_columns=dropped,
        features=Features({**kept, **DECODED_FEATURES}),
        desc="Decode cycles",
        new_fingerprint=Hasher.hash([dataset._fingerprint, sampling_rate, task.column, classes, *code]),
    )
    return decoded.with_format("numpy", columns=["waveform"], output_all_columns=True)


def label_classes(features: Features, task: Task) -> list[int | None]:
    """Give the task's class of each of the dataset's own, None where it has none.

    Raises:
        ValueError: if the dataset lacks the task's column.
    """
    if task.column not in features:
        raise ValueError(
            f"the task {task.name} needs the column {task.column!r}, which this dataset does not have: choose another "
            "--task, or --dataset sprsound"
        )
    return [task.index(name) for name in features[task.column].names]


def decode_row(
    row: Mapping[str, Any], sampling_rate: int, column: str, classes: Sequence[int | None]
) -> dict[str, Any]:
    """Decode one row's `audio` bytes: gives its `waveform`, `entropy` and `rms`, and the `label` of its `column`."""
    waveform = recordings_audio.read_audio(row["audio"]["bytes"], sampling_rate)
    entropy, rms = entropy_and_rms(waveform, sampling_rate)
    label = None if row[column] is None else classes[row[column]]
    return {"waveform": waveform, "entropy": entropy, "rms": rms, "label": label}


def cut_windows(recordings: Dataset, sampling_rate: int, seconds: float, level: float | None = None) -> Dataset:
    """Cut whole recordings into windows, each half of one after the other, labelled by what was annotated within them.

    A window is abnormal where it shares at least half of the shorter of the two with an abnormal cycle or event; it is
    normal where it touches none. What lies between, and what touches an event without one of the four labels, is left
    out, and so are recordings without any annotation: nobody has listened for events in them.

    Args:
        recordings: rows of `hf_datasets.load(..., config="recordings")`.
        sampling_rate: of the model, in Hz.
        seconds: length of a window; shorter recordings are one window.
        level: RMS amplitude that each recording is brought to first, as `LungSoundAnalyzer` does; None leaves it.

    Returns:
        Rows as `decode_cycles` gives them, numbered by `cycle_index`, under the recording's name with the window's
        start; `entropy` and `rms` are of the window as it was recorded.
    """
    code = [inspect.getsource(part) for part in (recordings_audio, quality_qlung, _cut_recording, _label_window)]
    kept = {name: recordings.features[name] for name in KEPT_COLUMNS if name in recordings.features}
    windows = recordings.cast_column("audio", Audio(decode=False)).map(
        _cut_recording,
        batched=True,
        batch_size=1,
        fn_kwargs={"sampling_rate": sampling_rate, "seconds": seconds, "level": level},
        remove_columns=recordings.column_names,
        features=Features({**kept, "cycle_index": Value("int32"), **DECODED_FEATURES}),
        desc="Cut windows",
        new_fingerprint=Hasher.hash([recordings._fingerprint, sampling_rate, seconds, level, *code]),
    )
    return windows.with_format("numpy", columns=["waveform"], output_all_columns=True)


def _cut_recording(
    batch: Mapping[str, list[Any]], sampling_rate: int, seconds: float, level: float | None
) -> dict[str, list[Any]]:
    """The windows of a batch of one recording."""
    row = {name: values[0] for name, values in batch.items()}
    waveform = recordings_audio.read_audio(row["audio"]["bytes"], sampling_rate)
    gain = recordings_audio.gain_to(level, row["audio"]["bytes"])
    length = min(len(waveform), round(seconds * sampling_rate))
    columns: dict[str, list[Any]] = {name: [] for name in (*KEPT_COLUMNS, *DECODED_FEATURES) if name != "fold"}
    if "fold" in row:
        columns["fold"] = []
    starts = range(0, len(waveform) - length + 1, max(1, length // 2)) if row["cycles"] else ()
    for index, first in enumerate(starts):
        start, window = first / sampling_rate, waveform[first : first + length]
        label = _label_window(row["cycles"], start, (first + length) / sampling_rate)
        if label is None:
            continue
        entropy, rms = entropy_and_rms(window, sampling_rate)
        made = {"waveform": gain * window, "entropy": entropy, "rms": rms, "label": label, "cycle_index": index}
        made |= {"recording_id": f"{row['recording_id']}@{start:g}"}
        for name, values in columns.items():
            values.append(made[name] if name in made else row[name])
    return columns


def _label_window(cycles: Sequence[Mapping[str, Any]], start: float, end: float) -> int | None:
    """The label of what was annotated between two times in seconds, None where that is not clear."""
    crackle = wheeze = unclear = False
    for cycle in cycles:
        shared = min(end, cycle["end"]) - max(start, cycle["start"])
        if shared <= 0:
            continue
        if cycle["label"] is None:
            return None
        if shared >= 0.5 * min(end - start, cycle["end"] - cycle["start"]):
            crackle, wheeze = crackle or cycle["crackle"], wheeze or cycle["wheeze"]
        else:
            unclear = unclear or cycle["crackle"] or cycle["wheeze"]
    return None if unclear and not (crackle or wheeze) else crackle + 2 * wheeze


def fit_quality(feature_extractor: QLungFeatureExtractor, train: Dataset, normalization: str) -> None:
    """Fit the quality score's statistics on the training cycles, and store them in the feature extractor."""
    measurements = np.stack([train["entropy"][:], train["rms"][:]], axis=1)
    feature_extractor.quality_normalization = normalization
    feature_extractor.quality_statistics = fit_statistics(measurements, normalization) or None


def fit_normalization(feature_extractor: QLungFeatureExtractor, train: Dataset) -> None:
    """Standardise: fit the feature extractor's mean and std so that training features have mean 0 and deviation 1.

    The extractor divides by 2 `std` (AST's convention), so `std` becomes half of the deviation.
    """
    feature_extractor.mean, feature_extractor.std = 0.0, 0.5
    total, squares, count = 0.0, 0.0, 0
    for row in tqdm(train, desc="Fit normalisation", leave=False):
        clip = feature_extractor.fit_length(torch.from_numpy(row["waveform"]))
        features = feature_extractor.extract_features(clip[None]).double()
        total += float(features.sum())
        squares += float(features.square().sum())
        count += features.numel()
    mean = total / count
    feature_extractor.mean, feature_extractor.std = mean, 0.5 * (squares / count - mean**2) ** 0.5


def add_degraded_copies(cycles: Dataset, share: float, sampling_rate: int, seed: int) -> Dataset:
    """Add copies of cycles, each spoiled in one way of `evaluation.noises` at one of its levels, drawn at random.

    Args:
        cycles: of `decode_cycles`.
        share: of the cycles of which there is to be a copy.
        sampling_rate: of the cycles, 16 kHz.
        seed: of the choice of cycles, ways and levels.

    Returns:
        The cycles and the copies, whose entropy and RMS are measured anew, under the recording's name with the way's.
    """
    chosen = np.random.default_rng(seed).permutation(len(cycles))[: round(share * len(cycles))]
    code = [inspect.getsource(part) for part in (noises, quality_qlung, _degrade_row)]
    copies = cycles.select(np.sort(chosen)).map(
        _degrade_row,
        with_indices=True,
        fn_kwargs={"sampling_rate": sampling_rate, "seed": seed},
        features=cycles.features,
        desc="Spoil copies",
        new_fingerprint=Hasher.hash([cycles._fingerprint, share, seed, sampling_rate, *code]),
    )
    together = concatenate_datasets([cycles.with_format(None), copies.with_format(None)])
    return together.with_format("numpy", columns=["waveform"], output_all_columns=True)


def _degrade_row(row: Mapping[str, Any], index: int, sampling_rate: int, seed: int) -> dict[str, Any]:
    rng = np.random.default_rng((seed, index))
    kind = str(rng.choice(list(noises.DEGRADATIONS)))
    levels = noises.degrade(np.asarray(row["waveform"]), kind, int(rng.integers(2**32)))
    waveform = levels[rng.integers(len(levels))]
    entropy, rms = entropy_and_rms(waveform, sampling_rate)
    name = f"{row['recording_id']}+{kind}"
    return {"waveform": waveform, "entropy": entropy, "rms": rms, "recording_id": name}


def score_quality(feature_extractor: QLungFeatureExtractor, cycles: Dataset) -> np.ndarray:
    """Score every row's quality (n,) in [0, 1]: from its measured entropy and RMS, or, once and cached, as learned."""
    if feature_extractor.quality_score == "learned":
        # Of all that the extractor holds, these alone count: saving it, or another normalisation, changes no score.
        reads = [feature_extractor.quality_parameters, feature_extractor.sampling_rate]
        scored = cycles.select_columns("waveform").map(
            lambda row: {"quality": feature_extractor.quality(row["waveform"])},
            remove_columns=["waveform"],
            desc="Score quality",
            new_fingerprint=Hasher.hash([cycles._fingerprint, inspect.getsource(quality_qlung), reads]),
        )
        return np.array(scored["quality"][:])
    normalization, statistics = feature_extractor.quality_normalization, feature_extractor.quality_statistics
    pairs = zip(cycles["entropy"][:], cycles["rms"][:], strict=True)
    return np.array([quality_score(entropy, rms, normalization, statistics) for entropy, rms in pairs])


def row_id(row: Mapping[str, Any]) -> str:
    """Name a row: `RECORDING:CYCLE`, or `RECORDING` where rows are recordings."""
    return ":".join(str(row[name]) for name in ("recording_id", "cycle_index") if name in row)


def assign_buckets(feature_extractor: QLungFeatureExtractor, cycles: Dataset) -> list[int]:
    """Give the bucket of every row (n,): the index of its clip's length among the extractor's `clip_lengths`."""
    waveforms = cycles.select_columns("waveform").with_format("arrow")
    samples = [pc.list_value_length(batch["waveform"]).to_numpy() for batch in waveforms.iter(1000)]
    return feature_extractor.bucket(np.concatenate(samples)).tolist()


def count_classes(cycles: Dataset, task: Task) -> dict[str, int]:
    """Count the cycles of each class."""
    labels = np.array([label for label in cycles["label"][:] if label is not None], dtype=np.int64)
    return dict(zip(task.classes, np.bincount(labels, minlength=len(task.classes)).tolist(), strict=True))


def control_quality(train: Dataset, quality: np.ndarray, kind: str, seed: int) -> dict[str, float]:
    """Give the training cycles' quality, or replace it by a control that knows nothing of them.

    Args:
        train: the training cycles.
        quality: their scores, (n,).
        kind: `measured` gives each its own; `constant` gives all of them their mean; `shuffled` hands them out at
            random, so that the margins have the same distribution.
        seed: of the shuffle.

    Returns:
        The quality that [`CycleCollator`] is to take for each row, by `row_id`.
    """
    shown = quality
    if kind == "constant":
        shown = np.full_like(quality, quality.mean())
    if kind == "shuffled":
        shown = np.random.default_rng(seed).permutation(quality)
    return dict(zip(map(row_id, train.with_format(None).remove_columns("waveform")), shown.tolist(), strict=True))


class CycleCollator:
    """
    Makes a batch of `clips` (batch, samples), `labels` (batch,) and `quality` (batch,) in [0, 1].

    With several `durations`, each row has the clip that it has by itself, whatever it is batched with; clips end in
    zeros after their `num_samples` (batch,). With `one_length`, for training, all are as long as the batch's longest.

    The filterbank and all augmentation come later, within the training step: a loader runs ahead of it, and random
    numbers drawn in the loader would differ after a resume.

    Args:
        feature_extractor: pads and cuts the waveforms.
        devices: names of the training set's stethoscopes; if given, batches hold the index of each row's, `device`
            (batch,), -1 for another one, which only an evaluation meets.
        quality: what is shown in the place of a row's own quality, by `row_id`.
        one_length: whether the rows of a batch get clips of one length.
    """

    def __init__(
        self,
        feature_extractor: QLungFeatureExtractor,
        devices: Sequence[str] | None = None,
        quality: Mapping[str, float] | None = None,
        one_length: bool = False,
    ):
        self.feature_extractor = feature_extractor
        self.devices = devices
        self.shown_quality = quality or {}
        self.one_length = one_length

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Stack the clips of a batch of rows."""
        extractor, waveforms = self.feature_extractor, [torch.from_numpy(row["waveform"].copy()) for row in rows]
        longest = None
        if self.one_length:
            longest = extractor.clip_lengths[max(extractor.bucket(waveform.numel()) for waveform in waveforms)]
        clips = [extractor.fit_length(waveform, longest) for waveform in waveforms]
        mixed = extractor.durations is not None and not self.one_length
        batch = {
            "clips": torch.nn.utils.rnn.pad_sequence(clips, batch_first=True) if mixed else torch.stack(clips),
            "labels": torch.tensor([UNLABELLED if row["label"] is None else row["label"] for row in rows]),
            "quality": torch.tensor([self.quality(row) for row in rows]),
        }
        if mixed:
            batch["num_samples"] = torch.tensor([clip.numel() for clip in clips])
        if self.devices is not None:
            index = {name: number for number, name in enumerate(self.devices)}
            batch["device"] = torch.tensor([index.get(row["device"], -1) for row in rows])
        return batch

    def quality(self, row: Mapping[str, Any]) -> float:
        """Give what is shown in the place of one row's quality, or score it."""
        shown = self.shown_quality.get(row_id(row)) if self.shown_quality else None
        if shown is not None:
            return shown
        extractor = self.feature_extractor
        if extractor.quality_score == "learned":
            return extractor.quality(row["waveform"])
        return quality_score(row["entropy"], row["rms"], extractor.quality_normalization, extractor.quality_statistics)

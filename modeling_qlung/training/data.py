"""From dataset rows to batches: decode and resample once, fit what the preparation needs, collate."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Audio, Dataset
from datasets.fingerprint import Hasher
from tqdm.auto import tqdm

from .. import quality_qlung
from ..feature_extraction_qlung import QLungFeatureExtractor
from ..inference import audio as recordings
from ..quality_qlung import entropy_and_rms, fit_statistics, quality_score

UNLABELLED = -100  # the index that cross-entropy leaves out
KEPT_COLUMNS = ("label", "patient_id", "recording_id", "cycle_index")


def decode_cycles(dataset: Dataset, sampling_rate: int) -> Dataset:
    """Decode and resample every cycle once, and measure its quality as recorded.

    Args:
        dataset: rows of `hf_datasets.load(..., config="cycles")`.
        sampling_rate: of the model, in Hz.

    Returns:
        A memory-mapped dataset, cached beside the one given, with `waveform` (float32 samples), `entropy`, `rms` and
        the columns label, patient_id, recording_id and cycle_index.
    """
    # `datasets` knows a function by its name: after a change of the code it would serve what the old code gave.
    code = [inspect.getsource(part) for part in (recordings, quality_qlung, _decode_row)]
    dropped = [name for name in dataset.column_names if name not in KEPT_COLUMNS]
    decoded = dataset.cast_column("audio", Audio(decode=False)).map(
        _decode_row,
        fn_kwargs={"sampling_rate": sampling_rate},
        remove_columns=dropped,
        desc="Decode cycles",
        new_fingerprint=Hasher.hash([dataset._fingerprint, sampling_rate, *code]),
    )
    return decoded.with_format("numpy", columns=["waveform"], output_all_columns=True)


def _decode_row(row: Mapping[str, Any], sampling_rate: int) -> dict[str, Any]:
    waveform = recordings.read_audio(row["audio"]["bytes"], sampling_rate)
    entropy, rms = entropy_and_rms(waveform, sampling_rate)
    return {"waveform": waveform, "entropy": entropy, "rms": rms}


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


class CycleCollator:
    """
    Makes a batch of `clips` (batch, samples), `labels` (batch,) and `quality` (batch,) in [0, 1].

    The filterbank and all augmentation come later, within the training step: a loader runs ahead of it, and random
    numbers drawn in the loader would differ after a resume.
    """

    def __init__(self, feature_extractor: QLungFeatureExtractor):
        self.feature_extractor = feature_extractor

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Stack the clips of a batch of rows."""
        clips = [self.feature_extractor.fit_length(torch.from_numpy(row["waveform"].copy())) for row in rows]
        return {
            "clips": torch.stack(clips),
            "labels": torch.tensor([UNLABELLED if row["label"] is None else row["label"] for row in rows]),
            "quality": torch.tensor([self.quality(row) for row in rows]),
        }

    def quality(self, row: Mapping[str, Any]) -> float:
        """Score one row from its measured entropy and RMS."""
        extractor = self.feature_extractor
        return quality_score(row["entropy"], row["rms"], extractor.quality_normalization, extractor.quality_statistics)

"""Confidence intervals that respect that a patient's cycles are alike."""

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .icbhi_score.scores import CLASS_NAMES, confusion_counts, icbhi_rates

# A percentile of the few resamples in which a score exists would describe only those.
_MAX_UNDEFINED = 0.05


def bootstrap_ci(
    labels: ArrayLike,
    predictions: ArrayLike,
    patients: ArrayLike,
    statistic: Callable[[NDArray], dict[str, NDArray]] = icbhi_rates,
    num_classes: int = len(CLASS_NAMES),
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, list[float] | None]:
    """Percentile intervals from resampling patients, each with all of its cycles, with replacement.

    Cluster bootstrap (Davison and Hinkley 1997, section 3.8; percentile interval, Efron and Tibshirani 1993, chapter
    13): cycles of one patient share chest, device and annotator, so resampling cycles would give intervals that are
    too narrow. Resamples are sums of the patients' confusion matrices, weighted by how often each patient was drawn.

    Args:
        labels: (n,) true classes, 0..num_classes-1.
        predictions: (n,) predicted classes.
        patients: (n,) patient of each item, any hashable type that numpy can sort.
        statistic: maps (resamples, C, C) confusion matrices to named (resamples,) values, NaN where undefined.
        num_classes: number of classes C.
        resamples: number of bootstrap resamples.
        level: coverage asked for, in (0, 1).
        seed: the same seed gives the same intervals.

    Returns:
        Name -> [low, high] in the statistic's unit. None where the statistic is undefined in more than 5 % of the
        resamples (rarer ones are left out), and throughout where there is one patient only.

    Raises:
        ValueError: see `confusion_counts`; `patients` of another length; `level` or `resamples` out of range.
    """
    if not 0 < level < 1 or resamples < 1:
        raise ValueError(f"level must be in (0, 1) and resamples at least 1, got level={level}, resamples={resamples}")
    by_patient = _patient_confusions(np.asarray(labels), np.asarray(predictions), np.asarray(patients), num_classes)
    number = len(by_patient)
    draws = np.random.default_rng(seed).multinomial(number, np.full(number, 1 / number), size=resamples)
    values = statistic(np.tensordot(draws, by_patient, axes=1))
    return {name: _percentile_interval(v, level) if number > 1 else None for name, v in values.items()}


def _patient_confusions(labels: NDArray, predictions: NDArray, patients: NDArray, num_classes: int) -> NDArray:
    """(patients, C, C) counts."""
    total = confusion_counts(labels, predictions, num_classes)
    if patients.shape != labels.shape:
        raise ValueError(f"{len(labels)} labels but patients of shape {patients.shape}: give one patient per label")
    names, index = np.unique(patients, return_inverse=True)
    counts = np.zeros((len(names), *total.shape), dtype=np.int64)
    np.add.at(counts, (index, labels, predictions), 1)
    return counts


def _percentile_interval(values: NDArray, level: float) -> list[float] | None:
    known = values[~np.isnan(values)]
    if len(values) - len(known) > _MAX_UNDEFINED * len(values):
        return None
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2])
    return [float(low), float(high)]

"""Whether a score measures quality: how well it tells, how it follows noise, what else it reads.

Quality is high for a good recording. Every function takes scores, and knows nothing of how they were made.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from .bootstrap import weighted_ci

# Scores that saturate rise and fall in the third decimal; that is no lack of monotonicity.
_TOLERANCE = 0.01

Measure = Callable[[NDArray, NDArray, NDArray], NDArray]  # of scores, positive items and weights, as weighted_auroc


def discrimination(
    quality: NDArray, poor: NDArray, patients: ArrayLike, folds: NDArray | None = None
) -> dict[str, Any]:
    """Measure how well low quality finds poor recordings.

    Args:
        quality: (seeds, n), scores of recordings by functions that were not fitted on their patients.
        poor: (n,) bool.
        patients: (n,) patient of each recording.
        folds: (seeds, n), by which function each was scored; left out where one scored all.

    Returns:
        `auroc` and `average_precision`, each {"mean", "sd", "interval"}: mean and standard deviation (None for one)
        over seeds, and the 95 % interval of the mean from a bootstrap over patients, None where no recording is poor,
        or none is usable; with `n`, `poor` and `patients`.
        With `folds` also `auroc_within`, the mean AUROC of the functions, each on what it scored: `auroc` compares
        scores of different functions too, which are calibrated each on its own.
    """
    one = np.zeros(quality.shape, dtype=int)
    measures: dict[str, tuple[Measure, NDArray]] = {
        "auroc": (weighted_auroc, one),
        "average_precision": (weighted_average_precision, one),
    }
    if folds is not None:
        measures["auroc_within"] = (weighted_auroc, folds)
    found: dict[str, Any] = {"n": len(poor), "poor": int(poor.sum()), "patients": len(np.unique(patients))}
    for name, (measure, groups) in measures.items():
        of_seeds = partial(_of_seeds, measure, 1 - quality, poor, groups)
        values = of_seeds(np.ones((1, len(poor))))

        def over_seeds(weights: NDArray, of_seeds: Callable[[NDArray], NDArray] = of_seeds) -> NDArray:
            return of_seeds(weights).mean(axis=0)

        found[name] = {
            "mean": None if np.isnan(values).any() else float(values.mean()),
            "sd": None if np.isnan(values).any() or len(values) < 2 else float(values.std(ddof=1)),
            "interval": weighted_ci(patients, over_seeds),
        }
    return found


def _of_seeds(measure: Measure, scores: NDArray, positive: NDArray, groups: NDArray, weights: NDArray) -> NDArray:
    """Measure scores (seeds, n) within groups (seeds, n), and give each seed's mean over them: (seeds, resamples).

    Groups where the measure is not defined are left out.
    """
    means = []
    for score, group in zip(scores, groups, strict=True):
        within = (group == number for number in np.unique(group))
        values = np.array([measure(score[own], positive[own], weights[:, own]) for own in within])
        there = ~np.isnan(values)
        means.append(_share(np.where(there, values, 0).sum(axis=0), there.sum(axis=0)))
    return np.array(means)


def weighted_auroc(score: NDArray, positive: NDArray, weights: NDArray) -> NDArray:
    """Area under the ROC curve, the probability that a positive item has the higher score, ties counting half.

    Args:
        score: (n,).
        positive: (n,) bool.
        weights: (resamples, n), how often each item is there.

    Returns:
        (resamples,), NaN where there are no positive or no negative items.
    """
    positives, negatives = _by_score(score, positive, weights)
    below = np.cumsum(negatives, axis=1) - negatives
    pairs = positives.sum(axis=1) * negatives.sum(axis=1)
    return _share((positives * (below + negatives / 2)).sum(axis=1), pairs)


def weighted_average_precision(score: NDArray, positive: NDArray, weights: NDArray) -> NDArray:
    """Mean precision at each positive item, in the order of falling score; as `weighted_auroc`."""
    positives, negatives = (part[:, ::-1] for part in _by_score(score, positive, weights))
    hits = np.cumsum(positives, axis=1)
    precision = hits / np.maximum(hits + np.cumsum(negatives, axis=1), np.finfo(float).tiny)
    return _share((positives * precision).sum(axis=1), hits[:, -1])


def _by_score(score: NDArray, positive: NDArray, weights: NDArray) -> tuple[NDArray, NDArray]:
    """Weights (resamples, values) of the positive and of the negative items at each distinct score, rising."""
    order = np.argsort(score, kind="stable")
    ordered, hit = score[order], positive[order]
    first = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    sums = (np.add.reduceat(weights[:, order] * mask, first, axis=1) for mask in (hit, ~hit))
    return next(sums), next(sums)


def _share(part: NDArray, whole: NDArray) -> NDArray:
    return np.divide(part, whole, out=np.full(len(whole), np.nan), where=whole > 0)


def calibration(probability: NDArray, usable: NDArray) -> dict[str, Any]:
    """Compare the probability that a recording is usable with how often it is.

    Args:
        probability: (seeds, n), in [0, 1].
        usable: (n,) bool.

    Returns:
        `brier`, mean squared error (Brier 1950); `brier_constant`, that of always giving the share of usable ones;
        `ece`, the expected calibration error (Naeini et al. 2015) in ten bins; `bins`, for each one that is not empty,
        its mean `probability`, share `usable` and number of scores `n`. All over recordings and seeds.
    """
    given, outcome = probability.ravel(), np.tile(usable, len(probability)).astype(float)
    index = np.minimum((given * 10).astype(int), 9)
    filled = [
        {"probability": float(given[own].mean()), "usable": float(outcome[own].mean()), "n": int(own.sum())}
        for own in (index == number for number in np.unique(index))
    ]
    gaps = [part["n"] * abs(part["probability"] - part["usable"]) for part in filled]
    return {
        "brier": float(np.mean((given - outcome) ** 2)),
        "brier_constant": float(outcome.mean() * (1 - outcome.mean())),
        "ece": float(sum(gaps) / len(given)),
        "bins": filled,
    }


def best_threshold(quality: NDArray, poor: NDArray) -> float:
    """Find the score below which recordings are called poor with the largest sensitivity + specificity (Youden 1950).

    Args:
        quality: (n,).
        poor: (n,) bool, some of each.
    """
    ordered = np.unique(quality)
    places = np.append((ordered[1:] + ordered[:-1]) / 2, ordered[-1] + 1e-9)  # the last calls all poor
    below = np.searchsorted(np.sort(quality[poor]), places) / poor.sum()
    return float(places[np.argmax(below - np.searchsorted(np.sort(quality[~poor]), places) / (~poor).sum())])


def refused(quality: NDArray, poor: NDArray, threshold: float) -> dict[str, float | None]:
    """Measure what a gate does that refuses recordings whose score is below a threshold.

    Args:
        quality: (n,).
        poor: (n,) bool.
        threshold: of the score.

    Returns:
        `threshold`, and the shares of `poor` and of `usable` recordings that are refused, None where there is none.
    """
    below = quality < threshold
    shares = {
        name: float(below[own].mean()) if own.any() else None for name, own in {"poor": poor, "usable": ~poor}.items()
    }
    return {"threshold": threshold, **shares}


def monotonicity(quality: NDArray) -> dict[str, Any]:
    """Measure whether the score falls as a recording gets worse.

    Args:
        quality: (recordings, levels), from as recorded to the worst.

    Returns:
        `mean` score at each level; `spearman`, mean over recordings of the rank correlation of score and level, -1
        where every recording's score falls throughout and 0 for one that does not move; `monotone`, the share of
        recordings whose score nowhere rises by more than 0.01 above its lowest so far.
    """
    rises = quality - np.minimum.accumulate(quality, axis=1)
    ranks = pd.DataFrame(quality).rank(axis=1).to_numpy()
    ranks, levels = (part - part.mean(axis=-1, keepdims=True) for part in (ranks, np.arange(quality.shape[1])))
    norms = np.linalg.norm(ranks, axis=1) * np.linalg.norm(levels)
    return {
        "mean": quality.mean(axis=0).tolist(),
        "spearman": float(np.mean(ranks @ levels / np.where(norms > 0, norms, 1))),
        "monotone": float((rises <= _TOLERANCE).all(axis=1).mean()),
    }


def rank_correlation(first: ArrayLike, second: ArrayLike) -> float | None:
    """Spearman's correlation of two lists of values, None where either does not vary."""
    ranks = pd.DataFrame({"first": np.asarray(first), "second": np.asarray(second)}).rank()
    if len(ranks) < 2 or (ranks.std() == 0).any():
        return None
    return float(np.corrcoef(ranks["first"], ranks["second"])[0, 1])


def change(before: NDArray, after: NDArray, threshold: float, poor: NDArray) -> dict[str, Any]:
    """Measure how far the score of recordings moves under what should not matter.

    Args:
        before: (n,) scores as recorded, or of one part.
        after: (n,) scores of the same recordings, changed, or of another part; NaN where either is not there.
        threshold: below it a recording is called poor.
        poor: (n,) bool.

    Returns:
        `mean` and `p95` (95th percentile) of the absolute change, `spearman`, `crossing` (share of recordings called
        otherwise), mean change with its sign of `usable` and of `poor` recordings, `auroc_before` and `auroc_after`
        (how well these tell poor ones), and `n`; None instead of each where there is no recording.
    """
    there = ~np.isnan(before + after)
    before, after, poor = before[there], after[there], poor[there]
    if not len(before):
        names = ("mean", "p95", "spearman", "crossing", "usable", "poor", "auroc_before", "auroc_after")
        return {**dict.fromkeys(names), "n": 0}
    moved = after - before
    return {
        "mean": float(np.abs(moved).mean()),
        "p95": float(np.quantile(np.abs(moved), 0.95)),
        "spearman": rank_correlation(before, after),
        "crossing": float(((before < threshold) != (after < threshold)).mean()),
        "usable": float(moved[~poor].mean()) if not poor.all() else None,
        "poor": float(moved[poor].mean()) if poor.any() else None,
        "auroc_before": _auroc(before, poor),
        "auroc_after": _auroc(after, poor),
        "n": len(before),
    }


def _auroc(quality: NDArray, poor: NDArray) -> float | None:
    return None if poor.all() or not poor.any() else float(weighted_auroc(-quality, poor, np.ones((1, len(poor))))[0])


def removal(removed: NDArray, control: NDArray, patients: NDArray) -> dict[str, Any]:
    """Compare how the score moves when a finding is cut out with how it moves when as much of a control is.

    Args:
        removed: (n,) change of each recording's score without the finding.
        control: (n,) change without the control, mean over draws.
        patients: (n,) patient of each.

    Returns:
        Mean change `removed` and `control`, their paired `difference`, above 0 where the finding itself lowers the
        score, its 95 % `interval` by patient, `n` and `patients`; None where there is no recording.
    """
    if not len(removed):
        return {**dict.fromkeys(("removed", "control", "difference", "interval")), "n": 0, "patients": 0}
    paired = removed - control
    return {
        "removed": float(removed.mean()),
        "control": float(control.mean()),
        "difference": float(paired.mean()),
        "interval": weighted_ci(patients, lambda weights: weights @ paired / weights.sum(axis=1)),
        "n": len(paired),
        "patients": len(set(patients)),
    }


def class_dependence(quality: NDArray, names: NDArray, reference: str, patients: NDArray) -> dict[str, dict[str, Any]]:
    """Measure whether the score is lower for one class of good recordings than for another: it should not be.

    Args:
        quality: (n,).
        names: (n,) class of each.
        reference: the class that every other is compared with.
        patients: (n,) patient of each.

    Returns:
        For every other class the `auroc`, the probability that one of it scores lower than one of the reference (0.5
        where the score does not see the class), its 95 % `interval` by patient, and the class's `n` and `patients`.

    Raises:
        ValueError: nothing is of the reference class.
    """
    if reference not in names:
        raise ValueError(f"none of {len(names)} is {reference!r}: there is nothing to compare the other classes with")
    found = {}
    for name in sorted(set(names.tolist()) - {reference}):
        kept = (names == name) | (names == reference)
        measure = partial(weighted_auroc, -quality[kept], names[kept] == name)
        found[name] = {
            "auroc": float(measure(np.ones((1, kept.sum())))[0]),
            "interval": weighted_ci(patients[kept], measure),
            "n": int((names == name).sum()),
            "patients": len(set(patients[names == name])),
        }
    return found


def group_share(quality: NDArray, groups: NDArray, patients: NDArray) -> dict[str, Any]:
    """Measure the share of the score's variance that lies between groups (η², Fisher 1925), 0 where they have one mean.

    Args:
        quality: (n,).
        groups: (n,) group of each, such as its device.
        patients: (n,) patient of each.

    Returns:
        `share`, None where the score does not vary, and its 95 % `interval` by patient, which lies above 0 for groups
        without a difference too, since their means differ by chance.
    """
    members = (groups[:, None] == np.unique(groups)).astype(float)

    def share(weights: NDArray) -> NDArray:
        total = weights.sum(axis=1)
        mean = weights @ quality / total
        of_group = weights @ members
        means = np.divide(
            weights @ (members * quality[:, None]), of_group, out=np.zeros_like(of_group), where=of_group > 0
        )
        between = (of_group * (means - mean[:, None]) ** 2).sum(axis=1)
        variance = weights @ quality**2 - total * mean**2
        return _share(between, np.where(variance > 1e-12 * total, variance, 0))

    (value,) = share(np.ones((1, len(quality))))
    return {"share": None if np.isnan(value) else float(value), "interval": weighted_ci(patients, share)}

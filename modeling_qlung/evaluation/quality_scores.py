"""Quality scores as they are measured: refitted in every fold, on recordings of other children."""

import importlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..quality_qlung import NORMALIZATIONS, entropy_and_rms, fit_statistics, quality_levels, quality_score
from ..training.quality import draw_folds, fit_learned
from .quality_measures import best_threshold
from .quality_recordings import Recordings

PASSING = 0.95  # of the usable recordings, at one of the gates

Predict = Callable[[Sequence[Any]], NDArray]


def _as_measured(recordings: Recordings, measured: Sequence[Any], folds: NDArray) -> Predict:
    return np.array


@dataclass(frozen=True)
class Score:
    """
    A quality score, as it is fitted and computed.

    Args:
        measure: maps a waveform (samples,), mono float32 at 16 kHz as recorded, to what the score is computed from.
        fit: maps recordings, what was measured of each and the number of the fold it is in (n,), for what needs parts
            of its own, to a function from measurements of m recordings to their scores (m,) in [0, 1], high for good
            recordings. Left out: what was measured is the score, which learns nothing.
        probability: the score claims to be the probability that a recording is usable.
        repeats: how often the folds are drawn anew, with as many seeds; fewer where fitting takes long.
    """

    measure: Callable[[NDArray], Any]
    fit: Callable[[Recordings, Sequence[Any], NDArray], Predict] = _as_measured
    probability: bool = False
    repeats: int = 5


def _fit_entropy_rms(normalization: str, recordings: Recordings, pairs: Sequence[Any], folds: NDArray) -> Predict:
    statistics = fit_statistics(np.array(pairs), normalization)
    return lambda unseen: np.array([quality_score(h, r, normalization, statistics) for h, r in unseen])


def _entropy_rms(normalization: str) -> Score:
    return Score(entropy_and_rms, partial(_fit_entropy_rms, normalization))


# QLung's own, first as train.py normalises it by default; and the learned one.
SCORES: dict[str, Score] = {
    "entropy_rms": _entropy_rms("percentile"),
    **{f"entropy_rms_{name}": _entropy_rms(name) for name in NORMALIZATIONS if name != "percentile"},
    "learned": Score(quality_levels, fit_learned, probability=True, repeats=1),
}


def find_score(text: str) -> tuple[str, Score]:
    """Give the score of a name in `SCORES`, or of MODULE:NAME, a [`Score`] or a function from waveforms to scores.

    Returns:
        What it is called, and the score.

    Raises:
        ValueError: there is no such score, module or name, or it is neither.
    """
    if text in SCORES:
        return text, SCORES[text]
    module, colon, name = text.partition(":")
    if not colon:
        raise ValueError(f"there is no score {text!r}: take {', '.join(SCORES)}, or your own as MODULE:FUNCTION")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{text}: {error}") from error
    if not (isinstance(found, Score) or callable(found)):
        raise ValueError(f"{text} is {type(found).__name__}: give a function from waveforms to scores, or a Score")
    return name, found if isinstance(found, Score) else Score(found)


class Fitted:
    """
    A score fitted in every fold of some recordings, and on all of them.

    Args:
        name: of the score.
        score: the score.
        recordings: with a `record_label`.
        measured: what was measured of each recording.

    Raises:
        ValueError: a score is not within [0, 1].

    Its `threshold` balances poor recordings refused and usable ones passed; `gates` are thresholds by name. Both are
    chosen on the scores that recordings have while their child is held out.
    """

    def __init__(self, name: str, score: Score, recordings: Recordings, measured: Sequence[Any]) -> None:
        self.name, self.score = name, score
        usable, patients = ~recordings.poor, recordings.patients

        def fit(kept: NDArray, folds: NDArray) -> Predict:
            return score.fit(recordings.take(kept), _at(measured, kept), folds[kept])

        self.out_of_fold = np.empty((score.repeats, len(usable)))
        self.folds = np.empty(self.out_of_fold.shape, dtype=int)  # in which of them each recording was held out
        self._functions: list[Predict] = []  # of the first seed's folds
        for seed, (quality, folds) in enumerate(zip(self.out_of_fold, self.folds, strict=True)):
            folds[:] = draw_folds(usable, patients, seed)
            for number in np.unique(folds).tolist():
                function = fit(np.flatnonzero(folds != number), folds)
                unseen = np.flatnonzero(folds == number)
                quality[unseen] = function(_at(measured, unseen))
                if seed == 0:
                    self._functions.append(function)
        if not ((self.out_of_fold >= 0) & (self.out_of_fold <= 1)).all():
            low, high = self.out_of_fold.min(), self.out_of_fold.max()
            raise ValueError(f"{name} gives scores from {low:.4g} to {high:.4g}: they must be within [0, 1]")
        self.on_others = fit(np.arange(len(usable)), self.folds[0])
        own = self.out_of_fold[0]
        self.threshold = best_threshold(own, ~usable)
        passing = float(np.quantile(own[usable], 1 - PASSING))
        self.gates = {
            "best balance": self.threshold,
            f"{100 * PASSING:.0f} % of usable ones pass": passing,
            "one half": 0.5,
        }

    def on_unseen(self, measured: Sequence[Any], recordings: NDArray) -> NDArray:
        """Score m changed copies or parts of recordings, numbered in `recordings` (m,), as of children never seen."""
        quality = np.empty(len(recordings))
        for number, function in enumerate(self._functions):
            own = np.flatnonzero(self.folds[0, recordings] == number)
            if len(own):
                quality[own] = function(_at(measured, own))
        return quality

    def on_children(self, measured: Sequence[Any], known: NDArray, patients: NDArray) -> NDArray:
        """Score m other recordings, each by what was not fitted on its child.

        Args:
            measured: of each.
            known: patient of each recording of the fitting, in their order.
            patients: (m,) patient of each.
        """
        quality = self.on_others(measured)
        own = np.flatnonzero(np.isin(patients, known))
        names, place = np.unique(known, return_index=True)
        quality[own] = self.on_unseen(_at(measured, own), place[np.searchsorted(names, patients[own])])
        return quality


def _at(items: Sequence[Any], indices: NDArray) -> list[Any]:
    return [items[index] for index in indices]


Measured = dict[Callable[[NDArray], Any], list[Any]]


def measure(waveforms: Iterable[NDArray], scores: Iterable[Score]) -> Measured:
    """Measure waveforms, once for all scores that share their measurements, which stand by `Score.measure`."""
    measured: Measured = {score.measure: [] for score in scores}
    for waveform in waveforms:
        for function, found in measured.items():
            found.append(function(waveform))
    return measured

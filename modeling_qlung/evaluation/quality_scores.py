"""Quality scores as they are measured: refitted in every fold, on recordings of other children."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import datasets
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.model_selection import StratifiedGroupKFold

import hf_datasets
from hf_datasets.labels import EVENT_TYPES

from ..inference import read_audio
from ..quality_qlung import NORMALIZATIONS, entropy_and_rms, fit_statistics, quality_levels, quality_score
from ..training.quality import fit_learned
from .noises import RATE
from .quality_measures import best_threshold

FOLDS = 5
POOR = "Poor Quality"
PASSING = 0.95  # of the usable recordings, at one of the gates

Predict = Callable[[Sequence[Any]], NDArray]


@dataclass(frozen=True)
class Score:
    """
    A quality score, as it is fitted and computed.

    Args:
        measure: maps a waveform (samples,), mono float32 at 16 kHz as recorded, to what the score is computed from.
        fit: maps waveforms, what was measured of each, whether each is usable (n,) and its patient (n,) to a function
            from measurements of m recordings to their scores (m,) in [0, 1], high for good recordings.
        probability: the score claims to be the probability that a recording is usable.
        repeats: how often the folds are drawn anew, with as many seeds; fewer where fitting takes long.
    """

    measure: Callable[[NDArray], Any]
    fit: Callable[[Sequence[NDArray], Sequence[Any], NDArray, NDArray], Predict]
    probability: bool = False
    repeats: int = 5


def _fit_entropy_rms(
    normalization: str, waveforms: Sequence[NDArray], pairs: Sequence[Any], usable: NDArray, patients: NDArray
) -> Predict:
    statistics = fit_statistics(np.array(pairs), normalization)
    return lambda unseen: np.array([quality_score(h, r, normalization, statistics) for h, r in unseen])


def _entropy_rms(normalization: str) -> Score:
    return Score(entropy_and_rms, partial(_fit_entropy_rms, normalization))


# QLung's own, first as train.py normalises it by default; and the learned one, whose logit is calibrated here on one
# fold within those it is fitted on, and on all five where it is fitted to be shipped: that spares half of the time.
SCORES: dict[str, Score] = {
    "entropy_rms": _entropy_rms("percentile"),
    **{f"entropy_rms_{name}": _entropy_rms(name) for name in NORMALIZATIONS if name != "percentile"},
    "learned": Score(quality_levels, fit_learned, probability=True, repeats=1),
}


@dataclass(frozen=True, eq=False)
class Recordings:
    """
    Recordings in memory.

    Args:
        waveforms: (samples,) each, float32, mono at 16 kHz.
        table: one row each, with the columns of `hf_datasets`' config `recordings` apart from `audio`.
    """

    waveforms: list[NDArray]
    table: pd.DataFrame

    @cached_property
    def patients(self) -> NDArray:
        """(n,) names."""
        return self.table["patient_id"].to_numpy(str)

    @cached_property
    def poor(self) -> NDArray:
        """(n,) bool: clinicians called it so."""
        return (self.table["record_label"] == POOR).to_numpy()

    def cut(self, chosen: Iterable[int]) -> tuple[list[NDArray], pd.DataFrame]:
        """Cut the cycles or events out of the chosen recordings: waveforms, and rows with `index` and `event_type`."""
        waveforms, rows = [], []
        for index in chosen:
            for cycle in self.table["cycles"].iloc[index]:
                part = self.waveforms[index][int(cycle["start"] * RATE) : int(cycle["end"] * RATE)]
                if len(part):
                    name = None if cycle["event_type"] is None else EVENT_TYPES[cycle["event_type"]]
                    waveforms.append(part)
                    rows.append({"index": index, "event_type": name})
        return waveforms, pd.DataFrame(rows, columns=["index", "event_type"])


def load(name: str, data_dir: str | None, allow_missing_audio: bool = False) -> dict[str, Recordings]:
    """Read every split's recordings that are there; `all` holds those of every split. See `hf_datasets.load`."""
    splits = {}
    loaded = hf_datasets.load(name, data_dir, config="recordings", allow_missing_audio=allow_missing_audio)
    for split, rows in loaded.items():
        encoded = rows.cast_column("audio", datasets.Audio(decode=False))
        waveforms = [read_audio(audio["bytes"], RATE) for audio in encoded["audio"]]
        table = pd.DataFrame(rows.remove_columns("audio").to_list())
        if "record_label" in table:
            table["record_label"] = rows.features["record_label"].int2str(table["record_label"].tolist())
        splits[split] = Recordings(waveforms, table)
    waveforms = [waveform for part in splits.values() for waveform in part.waveforms]
    splits["all"] = Recordings(waveforms, pd.concat([part.table for part in splits.values()], ignore_index=True))
    return splits


class Fitted:
    """
    A score fitted in every fold of some recordings, and on all of them.

    Args:
        name: of the score.
        score: the score.
        recordings: with a `record_label`.
        measured: what was measured of each recording.

    Its `threshold` balances poor recordings refused and usable ones passed; `gates` are thresholds by name. Both are
    chosen on the scores that recordings have while their child is held out.
    """

    def __init__(self, name: str, score: Score, recordings: Recordings, measured: Sequence[Any]) -> None:
        self.name, self.score = name, score
        usable, patients = ~recordings.poor, recordings.patients

        def fit(kept: NDArray) -> Predict:
            return score.fit(_at(recordings.waveforms, kept), _at(measured, kept), usable[kept], patients[kept])

        self.out_of_fold = np.empty((score.repeats, len(usable)))
        self._functions: list[Predict] = []  # of the first seed's folds
        self._fold = np.empty(len(usable), dtype=int)
        for seed, quality in enumerate(self.out_of_fold):
            folds = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=seed).split(usable, usable, patients)
            for number, (kept, unseen) in enumerate(folds):
                function = fit(kept)
                quality[unseen] = function(_at(measured, unseen))
                if seed == 0:
                    self._functions.append(function)
                    self._fold[unseen] = number
        self.on_others = fit(np.arange(len(usable)))
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
            own = np.flatnonzero(self._fold[recordings] == number)
            if len(own):
                quality[own] = function(_at(measured, own))
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


def choose(recordings: Recordings, among: NDArray, number: int, seed: int = 0) -> NDArray:
    """Draw `number` of the recordings where `among` (n,) is true: one of every patient before a second of any."""
    drawn = pd.Series(np.random.default_rng(seed).permutation(np.flatnonzero(among)))
    turn = drawn.groupby(recordings.patients[drawn]).cumcount()
    return drawn[turn.sort_values(kind="stable").index].to_numpy()[:number]

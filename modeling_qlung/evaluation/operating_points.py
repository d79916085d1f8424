"""What a model finds in whole recordings: sensitivity and specificity at each threshold, on its validation patients.

    python -m modeling_qlung.evaluation.operating_points RUN --data_dir FOLDER [--on DATASET:SPLIT ...]

Scores of cycles that somebody cut out say little of what `LungSoundAnalyzer` finds, which slides windows over
recordings where nobody has. This measures it on the recordings of the patients that the run kept apart, chooses the
threshold there, and writes `operating_points.json` into the run's folder, where the analyzer finds it; and what saying
nothing of recordings of little quality does to the error, with a risk-coverage curve of each part. The quality score is
as the checkpoint carries it: the learned one was fitted on all of SPRSound's training children.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import yaml
from numpy.typing import NDArray

import hf_datasets

from ..feature_extraction_qlung import QLungFeatureExtractor
from ..inference import Analysis, LungSoundAnalyzer, OperatingPoints, fastest_dtype, read_audio
from ..inference.operating_points import FILE_NAME
from ..modeling_qlung import QLungForAudioClassification
from .bootstrap import weighted_ci
from .model_card import DATASETS, SPOILED, describe_operating_points, gate_figure
from .noises import DEGRADATIONS, RATE, UNSEEN, degrade
from .plots import plot_risk_coverage
from .quality_measures import weighted_auroc
from .report import read_predictions, write_text
from .risk_coverage import RiskCoverage, risk_coverage

KEPT_APART = "patients kept apart"
THRESHOLDS = np.linspace(0, 1, 101).round(2)


@dataclass(frozen=True, eq=False)
class Scored:
    """
    Items, and how abnormal a model finds them.

    Args:
        abnormal: (n,) P(abnormal): the largest threshold at which an item is called abnormal.
        truth: (n,) bool: an abnormal sound was annotated.
        patients: (n,) names.
        quality: (n,) of the recordings that the items are, or are in; NaN where the model measures none.
    """

    abnormal: NDArray
    truth: NDArray
    patients: NDArray
    quality: NDArray

    @property
    def counts(self) -> dict[str, int]:
        """How many there are of each."""
        return {"abnormal": int(self.truth.sum()), "normal": int((~self.truth).sum())}

    def rates(self, thresholds: NDArray) -> dict[str, list[float]]:
        """Sensitivity and specificity at each of the thresholds, from which on an item is called abnormal."""
        called = self.abnormal >= thresholds[:, None]
        return {
            "sensitivity": called[:, self.truth].mean(axis=1).tolist(),
            "specificity": (~called[:, ~self.truth]).mean(axis=1).tolist(),
        }

    def best_threshold(self) -> float:
        """The threshold with the largest mean of sensitivity and specificity, the middle one of several."""
        rates = self.rates(THRESHOLDS)
        mean = np.add(rates["sensitivity"], rates["specificity"])
        best = np.flatnonzero(mean == mean.max())
        return float(THRESHOLDS[best[len(best) // 2]])

    def scores(self, threshold: float) -> dict[str, list[float | None]]:
        """AUROC, sensitivity and specificity, each with its 95 % interval from a bootstrap over patients."""
        called = self.abnormal >= threshold
        statistics: dict[str, Callable[[NDArray], NDArray]] = {
            "AUROC": lambda weights: weighted_auroc(self.abnormal, self.truth, weights),
            "sensitivity": lambda weights: _share(weights, called, self.truth),
            "specificity": lambda weights: _share(weights, ~called, ~self.truth),
        }
        scores: dict[str, list[float | None]] = {}
        for name, statistic in statistics.items():
            value = float(statistic(np.ones((1, len(self.truth))))[0])
            interval = weighted_ci(self.patients, statistic) or (None, None)
            scores[name] = [None if np.isnan(value) else value, *interval]
        return scores

    def risk_coverage(self, threshold: float) -> dict[str, RiskCoverage]:
        """Trace abstention by `quality` and by `confidence`, the distance to a threshold; empty without any quality."""
        if not len(self.quality) or np.isnan(self.quality).any():
            return {}
        wrong, confidence = self._wrong(threshold), np.abs(self.abnormal - threshold)
        return {"quality": risk_coverage(wrong, self.quality), "confidence": risk_coverage(wrong, confidence)}

    def gate(self, threshold: float, quality_threshold: float) -> dict[str, float | None]:
        """Say what refusing recordings of little quality does to the error.

        Args:
            threshold: from which on an item is called abnormal.
            quality_threshold: below it, nothing is said.

        Returns:
            `coverage` (share answered), `risk` (share of all that are wrong), `selective_risk` (of the answered ones;
            None where there are none), `selective_risk_confidence` (of as many, the surest), and the areas under both
            risk-coverage curves, `aurc_quality` and `aurc_confidence`. Empty where the model measures no quality.
        """
        curves = self.risk_coverage(threshold)
        if not curves:
            return {}
        wrong, answered = self._wrong(threshold), self.quality >= quality_threshold
        coverage = float(answered.mean())
        return {
            "coverage": coverage,
            "risk": float(wrong.mean()),
            "selective_risk": float(wrong[answered].mean()) if coverage else None,
            "selective_risk_confidence": curves["confidence"].at(coverage) if coverage else None,
            **{f"aurc_{name}": curve.area for name, curve in curves.items()},
        }

    def joined(self, others: "Scored") -> "Scored":
        """Give these items and then others."""
        each = ((getattr(self, part.name), getattr(others, part.name)) for part in fields(self))
        return Scored(*map(np.concatenate, each))

    def _wrong(self, threshold: float) -> NDArray:
        return (self.abnormal >= threshold) != self.truth


def _share(weights: NDArray, part: NDArray, whole: NDArray) -> NDArray:
    """The weighted share of a part (n,) of a whole (n,) for each row of weights (resamples, n), NaN of nothing."""
    total = (weights * whole).sum(axis=1)
    return np.divide((weights * (part & whole)).sum(axis=1), total, out=np.full(len(total), np.nan), where=total > 0)


def score_recordings(analyzer: LungSoundAnalyzer, recordings: datasets.Dataset) -> tuple[Scored, Scored]:
    """Analyze recordings that somebody annotated.

    Args:
        analyzer: of the model.
        recordings: rows of `hf_datasets.load(..., config="recordings")`. Left out are those without any annotation, and
            those whose only findings have none of the four labels.

    Returns:
        The recordings, each called abnormal where anything is marked in it; and the annotated cycles or events within
        them, each as the analyzer scores it where a person gives it.
    """
    whole: list[_Item] = []
    cycles: list[_Item] = []
    for encoded, labelled, patient in _annotated(recordings):
        analysis = analyzer(encoded)
        whole.append(_item(analysis, labelled, patient))
        if labelled:
            by_cycle = analyzer(encoded, cycles=[(cycle["start"], cycle["end"]) for cycle in labelled]).abnormal
            of_each = zip(by_cycle.tolist(), map(_abnormal, labelled), strict=True)
            cycles += [(*of_one, *whole[-1][2:]) for of_one in of_each]
    return _scored(whole), _scored(cycles)


def score_spoiled(analyzer: LungSoundAnalyzer, recordings: datasets.Dataset) -> Scored:
    """Analyze a spoiled copy of each of the recordings that [`score_recordings`] takes, as if it had their findings.

    Each has a kind of noise or of fault, and as much of it, as its place in the recordings draws.
    """
    whole: list[_Item] = []
    kinds = DEGRADATIONS | UNSEEN
    for number, (encoded, labelled, patient) in enumerate(_annotated(recordings)):
        rng = np.random.default_rng(number)
        kind = list(kinds)[rng.integers(len(kinds))]
        copies = degrade(read_audio(encoded), kind, number)
        whole.append(_item(analyzer(copies[rng.integers(len(copies))], RATE), labelled, patient))
    return _scored(whole)


def _annotated(recordings: datasets.Dataset) -> Iterator[tuple[bytes, list[dict[str, Any]], str]]:
    """The encoded audio of each recording that counts, its labelled cycles, and whose it is."""
    for row in recordings.cast_column("audio", datasets.Audio(decode=False)):
        labelled = [cycle for cycle in row["cycles"] if cycle["label"] is not None]
        if row["cycles"] and (any(map(_abnormal, labelled)) or len(labelled) == len(row["cycles"])):
            yield row["audio"]["bytes"], labelled, row["patient_id"]


def _abnormal(cycle: dict[str, Any]) -> bool:
    return bool(cycle["crackle"] or cycle["wheeze"])


def _item(analysis: Analysis, labelled: Sequence[dict[str, Any]], patient: str) -> "_Item":
    quality = np.nan if analysis.quality is None else analysis.quality
    return float(analysis.abnormal.max()), any(map(_abnormal, labelled)), patient, quality


_Item = tuple[float, bool, str, float]


def _scored(items: Sequence[_Item]) -> Scored:
    abnormal, truth, patients, quality = zip(*items, strict=True) if items else ((), (), (), ())
    return Scored(
        np.array(abnormal), np.array(truth, dtype=bool), np.array(patients, dtype=str), np.array(quality, dtype=float)
    )


def measure(analyzer: LungSoundAnalyzer, by_recording: Scored, by_cycle: Scored, about: str) -> OperatingPoints:
    """Measure the thresholds on validation patients' recordings, and choose the one best for recordings.

    Args:
        analyzer: that scored them.
        by_recording: what [`score_recordings`] gave of recordings.
        by_cycle: and of cycles.
        about: a sentence on whom the model was trained and on whom it is measured.

    Raises:
        ValueError: if there are no abnormal recordings or cycles, or no normal ones.
    """
    for unit, scored in (("recordings", by_recording), ("cycles", by_cycle)):
        if not all(scored.counts.values()):
            raise ValueError(f"the validation patients have these {unit}: {scored.counts}; some of each are needed")
    threshold = by_recording.best_threshold()
    return OperatingPoints(
        about=about,
        window=analyzer.window,
        hop=analyzer.hop,
        threshold=threshold,
        quality_threshold=analyzer.quality_threshold,
        level=analyzer.level,
        patients=len(set(by_recording.patients)),
        recordings=by_recording.counts,
        cycles=by_cycle.counts,
        thresholds=THRESHOLDS.tolist(),
        by_recording=by_recording.rates(THRESHOLDS),
        by_cycle=by_cycle.rates(THRESHOLDS),
        scores=[],
    )


def _row(part: str, recordings: Scored, cycles: Scored, gated: dict[str, Scored], points: OperatingPoints) -> dict:
    """What `OperatingPoints.scores` tells of one part."""
    units = {"recordings": recordings, "cycles": cycles}
    scores = {name: {**unit.counts, **unit.scores(points.threshold)} for name, unit in units.items()}
    gates = {name: items.gate(points.threshold, points.quality_threshold) for name, items in gated.items()}
    return {"of": part, **scores, "gates": {name: gate for name, gate in gates.items() if gate}}


def load_recordings(parts: Sequence[str], data_dir: str | None, allow_missing_audio: bool) -> datasets.Dataset:
    """Load the recordings of `DATASET:SPLIT` parts.

    Raises:
        OSError: there is no such folder, or it is not the dataset's.
        ValueError: a part is not `DATASET:SPLIT`, or the dataset has no such split; and as `hf_datasets.load`.
    """
    loaded = []
    for part in parts:
        name, _, split = part.partition(":")
        if not split:
            raise ValueError(f"{part}: give DATASET:SPLIT, such as sprsound:test_intra")
        where = data_dir if name != "simulated" else None
        loaded.append(hf_datasets.load(name, where, "recordings", split, allow_missing_audio=allow_missing_audio))
    shared = [column for column in loaded[0].column_names if all(column in rows.column_names for rows in loaded)]
    return datasets.concatenate_datasets([rows.select_columns(shared) for rows in loaded])


def main(argv: Sequence[str] | None = None) -> None:
    """Measure a run's operating points on its validation patients, and write them beside its weights."""
    parser = argparse.ArgumentParser(
        prog="python -m modeling_qlung.evaluation.operating_points", description=main.__doc__
    )
    parser.add_argument("run", type=Path, help="folder of a run of train.py that kept validation patients apart")
    parser.add_argument("--data_dir", help="folder that holds the datasets; left out: downloaded")
    parser.add_argument("--on", nargs="*", default=[], help="report other recordings too, each as DATASET:SPLIT")
    parser.add_argument("--spoiled", action="store_true", help="measure the gate on noisy copies of all of it too")
    parser.add_argument("--window", type=float, help="length of a window, in s (2, or the model's own)")
    parser.add_argument("--hop", type=float, help="from one window to the next, in s (0.5)")
    parser.add_argument("--quality_threshold", type=float, default=0.5, help="below it, nothing is said")
    parser.add_argument("--allow_missing_audio", action="store_true", help="work on the recordings that are there")
    args = parser.parse_args(argv)
    try:
        options = yaml.safe_load((args.run / "recipe.yaml").read_text(encoding="utf-8"))
        predictions = read_predictions(args.run / "predictions.parquet")
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise SystemExit(f"{args.run} holds no run that has ended: {error}") from error
    validation = predictions[predictions["split"] == "validation"]
    if validation.empty:
        raise SystemExit(f"{args.run} kept no validation patients apart: train with --validation_fraction.")

    # Without the points that an earlier measurement left, which this one replaces.
    extractor = QLungFeatureExtractor.from_pretrained(args.run)
    model = QLungForAudioClassification.from_pretrained(args.run, dtype=fastest_dtype("cpu"))
    analyzer = LungSoundAnalyzer(model, extractor)
    analyzer.window = analyzer.window if args.window is None else args.window
    analyzer.hop = min(analyzer.hop, analyzer.window) if args.hop is None else args.hop
    if not 0 < analyzer.hop <= analyzer.window <= extractor.duration:
        raise SystemExit(
            f"--hop {analyzer.hop:g} --window {analyzer.window:g}: a hop is above 0 and at most a window, and a window "
            f"at most the {extractor.duration:g} s that the model takes."
        )
    if not 0 <= args.quality_threshold <= 1:
        raise SystemExit(f"--quality_threshold {args.quality_threshold:g}: give one from 0 to 1.")
    analyzer.quality_threshold, analyzer.level = args.quality_threshold, options.get("level")
    parts = [f"{options.get('dataset', 'icbhi')}:train", *options.get("also_train", ())]
    try:
        recordings = load_recordings(parts, args.data_dir, args.allow_missing_audio)
        measured_on = {part: load_recordings([part], args.data_dir, args.allow_missing_audio) for part in args.on}
    except (OSError, ValueError) as error:
        raise SystemExit(str(error).replace("allow_missing_audio=True", "--allow_missing_audio")) from error
    kept_apart = set(validation["patient_id"])
    apart = np.array([patient in kept_apart for patient in recordings["patient_id"][:]])
    trained_on = [DATASETS[part.partition(":")[0]] for part in parts]
    people = " and ".join(f"{dataset.title} ({dataset.population})" for dataset in trained_on)
    about = f"Trained on parts of {people}; measured on other patients of these, who were kept apart."
    if extractor.quality_score == "learned":
        about += " The quality score was fitted on SPRSound's training children, those kept apart among them."
    measured_on = {KEPT_APART: recordings.select(np.flatnonzero(apart)), **measured_on}
    scored = {part: score_recordings(analyzer, rows) for part, rows in measured_on.items()}
    try:
        points = measure(analyzer, *scored[KEPT_APART], about)
    except ValueError as error:
        raise SystemExit(f"{args.run}: {error}") from error
    for part, (of_recordings, of_cycles) in scored.items():
        gated = {part: of_recordings}
        if args.spoiled:
            gated[f"{part}{SPOILED}"] = of_recordings.joined(score_spoiled(analyzer, measured_on[part]))
        points.scores.append(_row(part, of_recordings, of_cycles, gated, points))
        for name, items in gated.items():
            if curves := items.risk_coverage(points.threshold):
                title = f"{len(items.truth):,} recordings, {name}"
                plot_risk_coverage(curves, args.run / gate_figure(name), title)
    text = json.dumps({name: _rounded(value) for name, value in asdict(points).items()})
    path = args.run / FILE_NAME
    write_text(path, text + "\n")
    print(f"{path}\n\n{describe_operating_points(OperatingPoints.from_file(path))}")


def _rounded(value):
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main()

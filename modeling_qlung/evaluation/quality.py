"""Does a quality score measure quality? Against clinicians' labels, added noise, and everything it should not read.

    python -m modeling_qlung.evaluation.quality --dataset sprsound --data_dir SPRSOUND [--icbhi_dir ICBHI]

Clinicians called 177 of SPRSound's 1,949 training recordings "Poor Quality" (Zhang et al. 2022). Whatever a score
learns is learned anew in every fold, from recordings of other children, and no recording, nor any noisy copy of it, is
ever scored by a function that was fitted on its child. Other datasets are scored by one fitted on all children.
"""

import argparse
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..inference import resample
from .noises import DEGRADATIONS, degrade
from .quality_figures import Shown, plot_devices, plot_discrimination, plot_monotonicity, plot_recordings
from .quality_measures import (
    calibration,
    change,
    class_dependence,
    discrimination,
    group_share,
    monotonicity,
    rank_correlation,
    refused,
)
from .quality_scores import RATE, SCORES, Fitted, Recordings, Score, choose, load, measure
from .quality_tables import to_markdown

logger = logging.getLogger(__name__)

GOOD_RECORDINGS, POOR_RECORDINGS = 100, 50  # that are degraded and changed; of as many children as there are
GAINS_DB = (-20, -10, 10, 20)
RATES = (4000, 8000, 44100)
SECONDS = (3, 5)
_QUIETEST = 10 * 2.0**-15  # RMS: ten steps of 16 bit

# ---- What is measured of each score; every function gives {score's name: result} ----


def tells_poor(fitted: Sequence[Fitted], recordings: Recordings) -> dict[str, Any]:
    """Measure discrimination, what gates refuse and, of probabilities, calibration, on children not seen in fitting."""
    results = {}
    for one in fitted:
        results[one.name] = discrimination(one.out_of_fold, recordings.poor, recordings.patients)
        results[one.name]["gates"] = _gates(one, one.out_of_fold[0], recordings)
        if one.score.probability:
            results[one.name]["calibration"] = calibration(one.out_of_fold, ~recordings.poor)
    return results


def tells_poor_of_others(fitted: Sequence[Fitted], recordings: Recordings) -> dict[str, Any]:
    """Measure the same on other children's recordings, once, at the same gates."""
    measured = measure(recordings.waveforms, [one.score for one in fitted])
    results = {}
    for one in fitted:
        quality = one.on_others(measured[one.score.measure])[None]
        results[one.name] = discrimination(quality, recordings.poor, recordings.patients)
        results[one.name]["gates"] = _gates(one, quality[0], recordings)
        if one.score.probability:
            results[one.name]["calibration"] = calibration(quality, ~recordings.poor)
    return results


def _gates(one: Fitted, quality: NDArray, recordings: Recordings) -> dict[str, Any]:
    return {name: refused(quality, recordings.poor, threshold) for name, threshold in one.gates.items()}


def falls_with_noise(fitted: Sequence[Fitted], recordings: Recordings) -> dict[str, Any]:
    """Degrade good recordings in every way and at every level; {score: {kind: ...}}."""
    chosen = choose(recordings, ~recordings.poor, GOOD_RECORDINGS)
    results: dict[str, Any] = {one.name: {} for one in fitted}
    for kind, degradation in DEGRADATIONS.items():
        copies = (c for i in chosen for c in (recordings.waveforms[i], *degrade(recordings.waveforms[i], kind, int(i))))
        measured = measure(copies, [one.score for one in fitted])
        levels = 1 + len(degradation.levels)
        for one in fitted:
            quality = one.on_unseen(measured[one.score.measure], np.repeat(chosen, levels)).reshape(-1, levels)
            about = {"unit": degradation.unit, "levels": degradation.levels, "n": len(chosen)}
            results[one.name][kind] = {**about, **monotonicity(quality)}
    return results


def follows_simulated_noise(fitted: Sequence[Fitted]) -> dict[str, Any]:
    """Correlate the score of simulated recordings with their signal-to-noise ratio, over all and by device."""
    simulated = load("simulated", None)["all"]
    measured = measure(simulated.waveforms, [one.score for one in fitted])
    snr, device = simulated.table["snr_db"].to_numpy(), simulated.table["device"].to_numpy(str)
    results = {}
    for one in fitted:
        quality = one.on_others(measured[one.score.measure])
        by_device = {name: rank_correlation(quality[device == name], snr[device == name]) for name in np.unique(device)}
        results[one.name] = {"n": len(snr), "spearman": rank_correlation(quality, snr), "by_device": by_device}
    return results


def changed(waveform: NDArray) -> dict[str, NDArray | None]:
    """Give what of a recording (samples,) should score as it does: other gains, rates it once had, and lengths.

    None stands for gains that would clip it or bring it near the quantisation noise of 16 bit (an RMS of less than ten
    steps), and for parts as long as the whole.
    """
    copies: dict[str, NDArray | None] = {}
    for gain_db in GAINS_DB:
        louder = waveform * np.float32(10 ** (gain_db / 20))
        sound = np.abs(louder).max() <= 1 and np.sqrt(np.mean(louder**2)) >= _QUIETEST
        copies[f"gain {gain_db:+d} dB"] = louder if sound else None
    for rate in RATES:
        copies[f"through {rate / 1000:g} kHz"] = resample(resample(waveform, RATE, rate), rate, RATE)
    half = len(waveform) // 2
    parts = {"first half": waveform[:half], "second half": waveform[half:]}
    parts |= {f"first {seconds} s": waveform[: seconds * RATE] for seconds in SECONDS}
    copies |= {name: part if 0 < len(part) < len(waveform) else None for name, part in parts.items()}
    return {**copies, "twice over": np.tile(waveform, 2)}


def stays(fitted: Sequence[Fitted], recordings: Recordings) -> dict[str, Any]:
    """Change what should not matter of good and of poor recordings; {score: {change: ...}}."""
    good = choose(recordings, ~recordings.poor, GOOD_RECORDINGS)
    chosen = np.concatenate([good, choose(recordings, recordings.poor, POOR_RECORDINGS)])
    results: dict[str, Any] = {one.name: {} for one in fitted}
    copies = [changed(recordings.waveforms[index]) for index in chosen]
    for kind in copies[0]:
        made = [of_one[kind] is not None for of_one in copies]
        measured = measure((c for of_one in copies if (c := of_one[kind]) is not None), [one.score for one in fitted])
        for one in fitted:
            before = one.out_of_fold[0][chosen[made]]
            after = one.on_unseen(measured[one.score.measure], chosen[made])
            results[one.name][kind] = change(before, after, one.threshold)
    return results


def ignores_findings(fitted: Sequence[Fitted], recordings: Recordings) -> dict[str, Any]:
    """Compare abnormal with normal among the good recordings, and abnormal with normal events of these."""
    good = np.flatnonzero(~recordings.poor)
    labels = recordings.table["record_label"].to_numpy(str)
    waveforms, events = recordings.cut(good)
    source, types = events["index"].to_numpy(), events["event_type"].to_numpy(str)
    measured = measure(waveforms, [one.score for one in fitted])
    patients, results = recordings.patients, {}
    for one in fitted:
        of_events = one.on_unseen(measured[one.score.measure], source)
        results[one.name] = {
            "recordings": class_dependence(one.out_of_fold[0][good], labels[good], "Normal", patients[good]),
            "events": class_dependence(of_events, types, "Normal", patients[source]),
        }
    return results


def reads_device(fitted: Sequence[Fitted], icbhi: Recordings) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Compare ICBHI's stethoscopes, on recordings and on cycles.

    Returns:
        {score: {"recordings" or "cycles": {"devices": {device: ...}, "share", "interval"}}}, and the scores themselves
        by score, unit and device, to draw.
    """
    cycles, rows = icbhi.cut(range(len(icbhi.waveforms)))
    device = icbhi.table["device"].to_numpy(str)
    units = {
        "recordings": (icbhi.waveforms, np.arange(len(device))),
        "cycles": (cycles, rows["index"].to_numpy()),
    }
    results: dict[str, Any] = {one.name: {} for one in fitted}
    drawn: dict[str, dict[str, Any]] = {one.name: {} for one in fitted}
    for unit, (waveforms, source) in units.items():
        measured = measure(waveforms, [one.score for one in fitted])
        devices, patients = device[source], icbhi.patients[source]
        for one in fitted:
            quality = one.on_others(measured[one.score.measure])
            of_device = {str(name): quality[devices == name] for name in np.unique(devices)}
            about = {name: _distribution(q, patients[devices == name]) for name, q in of_device.items()}
            results[one.name][unit] = {"devices": about, **group_share(quality, devices, patients)}
            drawn[one.name][unit] = of_device
    return results, drawn


def _distribution(quality: NDArray, patients: NDArray) -> dict[str, Any]:
    p5, median, p95 = np.percentile(quality, [5, 50, 95]).tolist()
    about = {"n": len(quality), "patients": len(set(patients)), "mean": float(quality.mean())}
    return {**about, "sd": float(quality.std()), "p5": p5, "median": median, "p95": p95}


# ---- The command ----


def evaluate(
    scores: Mapping[str, Score], splits: Mapping[str, Recordings], icbhi: Recordings | None, folder: Path
) -> dict[str, Any]:
    """Measure everything of every score, and draw it.

    Args:
        scores: by name, at most six.
        splits: SPRSound's, at least `train`; `test_inter` is scored where it is there.
        icbhi: recordings of ICBHI, where its stethoscopes are to be compared.
        folder: for the figures.

    Returns:
        {experiment: {score's name: results}}, what `quality.json` holds.
    """
    train = splits["train"]
    measured = measure(train.waveforms, scores.values())
    fitted = [Fitted(name, score, train, measured[score.measure]) for name, score in scores.items()]
    results = {"label": tells_poor(fitted, train)}
    if "test_inter" in splits:
        results["label_test_inter"] = tells_poor_of_others(fitted, splits["test_inter"])
    plot_discrimination({one.name: one.out_of_fold for one in fitted}, train.poor, folder / "quality_label.png")
    for one in fitted:
        plot_recordings(*_extremes(one, train), folder / f"quality_recordings_{one.name}.png", one.name)
    experiments: dict[str, Callable[[], dict[str, Any]]] = {
        "noise": lambda: falls_with_noise(fitted, train),
        "simulated": lambda: follows_simulated_noise(fitted),
        "invariance": lambda: stays(fitted, train),
        "findings": lambda: ignores_findings(fitted, train),
    }
    for name, experiment in experiments.items():
        logger.info("%s ...", name)
        results[name] = experiment()
    plot_monotonicity(results["noise"], folder / "quality_noise.png")
    if icbhi is not None:
        results["devices"], drawn = reads_device(fitted, icbhi)
        plot_devices(drawn, folder / "quality_devices.png")
    return results


def _extremes(one: Fitted, recordings: Recordings, number: int = 4) -> tuple[list[Shown], list[Shown]]:
    """The best and the worst recordings, of as many children."""
    quality = one.out_of_fold[0]

    def first(order: NDArray) -> list[Shown]:
        of_children = list(dict.fromkeys(recordings.patients[order]))[:number]
        places = [next(i for i in order if recordings.patients[i] == child) for child in of_children]
        labels = recordings.table["record_label"]
        return [Shown(recordings.waveforms[i], float(quality[i]), labels[i]) for i in places]

    order = np.argsort(quality, kind="stable")
    return first(order[::-1]), first(order)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the scores named on the command line; print tables, write `quality.json` and figures."""
    parser = argparse.ArgumentParser(
        prog="python -m modeling_qlung.evaluation.quality",
        description="Measure whether quality scores measure quality.",
    )
    parser.add_argument("--dataset", choices=["sprsound"], default="sprsound", help="whose labels are the truth")
    parser.add_argument("--data_dir", help="folder that holds BioCAS2022; left out: downloaded")
    parser.add_argument("--icbhi_dir", help="folder that holds ICBHI_final_database: compares its stethoscopes too")
    parser.add_argument("--score", nargs="+", choices=list(SCORES), default=list(SCORES), help="scores to measure")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/quality"))
    parser.add_argument("--allow_missing_audio", action="store_true", help="work on the recordings that are there")
    args = parser.parse_args(argv)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logger.setLevel(logging.INFO)

    splits = load(args.dataset, args.data_dir, args.allow_missing_audio)
    icbhi = load("icbhi", args.icbhi_dir, args.allow_missing_audio)["all"] if args.icbhi_dir else None
    args.output_dir.mkdir(parents=True, exist_ok=True)
    results = evaluate({name: SCORES[name] for name in args.score}, splits, icbhi, args.output_dir)
    text = json.dumps(results, indent=2, allow_nan=False)
    (args.output_dir / "quality.json").write_text(text + "\n", encoding="utf-8")
    print(to_markdown(results))


if __name__ == "__main__":
    main()

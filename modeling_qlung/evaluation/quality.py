"""Does a quality score measure quality? Against clinicians' labels, added noise, and everything it should not read.

    python -m modeling_qlung.evaluation.quality --dataset sprsound --data_dir SPRSOUND [--icbhi_dir ICBHI]

Clinicians called 177 of SPRSound's 1,949 training recordings "Poor Quality" (Zhang et al. 2022). Whatever a score
learns is learned anew in every fold, from recordings of other children, and no recording, nor any noisy copy of it, is
ever scored by a function that was fitted on its child. Other datasets are scored by one fitted on all children. The
learned score is fitted to follow noise and simulated recordings, on other children, draws and devices; four of the
thirteen kinds of noise are not among those that it is fitted to.
"""

import argparse
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_datasets.labels import EVENT_TYPES

from ..inference import resample
from ..quality_parameters_qlung import REASON_THRESHOLDS
from ..quality_qlung import quality_reasons
from ..training.quality import OWN_NOISE, load_sprsound
from .noises import DEGRADATIONS, HALF_SNR_DB, NOISES, UNSEEN, UNSEEN_NOISES, degrade, spoil_half, synthesize
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
    removal,
)
from .quality_recordings import RATE, Recordings, choose, load
from .quality_scores import SCORES, Fitted, Score, find_score, measure
from .quality_tables import to_markdown

logger = logging.getLogger(__name__)

MOST_SCORES = 6  # there are as many colours
GOOD_RECORDINGS, POOR_RECORDINGS = 100, 50  # that are degraded and changed; of as many children as there are
NAMED = 40  # good recordings that are given faults
ALONE, ALONE_S, ALONE_RMS = 20, 10, 0.05  # draws of noise without a recording, how long, how loud
GAINS_DB = (-20, -10, 10, 20)
RATES = (4000, 8000, 44100)
TILTS_DB = (-12, 12)  # between 100 and 1600 Hz, as one stethoscope may differ from another
SECONDS = (3, 5)
MIDDLES_S = (0.5, 0.8)  # of events at least as long
# Compared with each other: parts of one length that share no sample, and one part at two lengths.
PAIRS = (("first half", "second half"), ("first 3 s", "last 3 s"), ("first 3 s", "first 3 s thrice"))
FINDINGS = {
    "wheezes, rhonchi, stridor": ("Wheeze", "Rhonchi", "Stridor", "Wheeze+Crackle"),
    "crackles": ("Coarse Crackle", "Fine Crackle", "Wheeze+Crackle"),
}
CONTROLS = ("other sound", "normal breaths")  # cut out instead: the first may be pauses
DRAWS, TRIES = 5, 20  # of each control, and to find room for one
FADE = RATE // 100  # 10 ms
_STEP = 2.0**-15  # of 16 bits
_QUIETEST = 10 * _STEP  # RMS

# ---- What is measured of each score; every function gives {score's name: result} ----


def tells_poor(fitted: Sequence[Fitted], recordings: Recordings) -> dict[str, Any]:
    """Measure discrimination, what gates refuse and, of probabilities, calibration, on children not seen in fitting."""
    results = {}
    for one in fitted:
        results[one.name] = discrimination(one.out_of_fold, recordings.poor, recordings.patients, one.folds)
        results[one.name]["gates"] = _gates(one, one.out_of_fold[0], recordings)
        if one.score.probability:
            results[one.name]["calibration"] = calibration(one.out_of_fold, ~recordings.poor)
    return results


def tells_poor_of_test(fitted: Sequence[Fitted], train: Recordings, recordings: Recordings) -> dict[str, Any]:
    """Measure the same on a test's recordings, once, at the same gates; of children of `train`, as if never seen."""
    measured = measure(recordings.waveforms, [one.score for one in fitted])
    results = {}
    for one in fitted:
        quality = one.on_children(measured[one.score.measure], train.patients, recordings.patients)[None]
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
    for kind, degradation in (DEGRADATIONS | UNSEEN).items():
        copies = (c for i in chosen for c in (recordings.waveforms[i], *degrade(recordings.waveforms[i], kind, int(i))))
        measured = measure(copies, [one.score for one in fitted])
        levels = 1 + len(degradation.levels)
        for one in fitted:
            quality = one.on_unseen(measured[one.score.measure], np.repeat(chosen, levels)).reshape(-1, levels)
            about = {"unit": degradation.unit, "levels": degradation.levels, "unseen": kind in UNSEEN, "n": len(chosen)}
            results[one.name][kind] = {**about, **monotonicity(quality)}
    return results


def falls_with_noise_in_half(fitted: Sequence[Fitted], recordings: Recordings) -> dict[str, Any]:
    """Add noise to the second half of good recordings alone, weak to loud: half a recording is not a usable one.

    Returns:
        {score: {kind: {`levels`, `n`, `passing` (share that scores one half and more at each), and `monotonicity`}}}.
    """
    chosen = choose(recordings, ~recordings.poor, GOOD_RECORDINGS)
    levels = 1 + len(HALF_SNR_DB)
    results: dict[str, Any] = {one.name: {} for one in fitted}
    for kind in NOISES | UNSEEN_NOISES:
        whole = ((int(index), recordings.waveforms[index]) for index in chosen)
        copies = (copy for seed, waveform in whole for copy in (waveform, *spoil_half(waveform, kind, seed)))
        measured = measure(copies, [one.score for one in fitted])
        for one in fitted:
            quality = one.on_unseen(measured[one.score.measure], np.repeat(chosen, levels)).reshape(-1, levels)
            about = {"levels": HALF_SNR_DB, "n": len(chosen), "passing": (quality >= 0.5).mean(axis=0).tolist()}
            results[one.name][kind] = {**about, **monotonicity(quality)}
    return results


def refuses_noise_alone(fitted: Sequence[Fitted]) -> dict[str, Any]:
    """Score noise without any recording, by what was fitted on all children: nothing of it is usable.

    Returns:
        {score: {kind: {`n`, `mean`, `passing` (share of draws that score one half and more)}}}.
    """
    results: dict[str, Any] = {one.name: {} for one in fitted}
    for number, kind in enumerate(NOISES | UNSEEN_NOISES):
        draws = (synthesize(kind, ALONE_S * RATE, np.random.default_rng((number, n))) for n in range(ALONE))
        measured = measure((ALONE_RMS * draw.astype(np.float32) for draw in draws), [one.score for one in fitted])
        for one in fitted:
            quality = one.on_others(measured[one.score.measure])
            about = {"n": ALONE, "mean": float(quality.mean()), "passing": float((quality >= 0.5).mean())}
            results[one.name][kind] = about
    return results


def gives_reasons(recordings: Recordings) -> dict[str, Any]:
    """Count how often the reasons of `quality_reasons` are given for poor recordings, and for as many usable ones.

    Their thresholds were fitted on 400 of the usable recordings, and on none of the poor ones' labels.

    Returns:
        {"poor", "usable": {`n`, `any` (share with a reason), `reasons`: {reason: share}}}.
    """
    poor = np.flatnonzero(recordings.poor)
    results = {}
    for name, chosen in {"poor": poor, "usable": choose(recordings, ~recordings.poor, len(poor))}.items():
        said = [quality_reasons(recordings.waveforms[index], RATE) for index in chosen]
        shares = {reason: sum(reason in of_one for of_one in said) / len(said) for reason in REASON_THRESHOLDS}
        results[name] = {"n": len(said), "any": sum(map(bool, said)) / len(said), "reasons": shares}
    return results


def names_faults(recordings: Recordings) -> dict[str, Any]:
    """Count how often a fault that a good recording was given is named by its reason.

    Returns:
        {reason: {`kind` of degradation, its `unit` and `levels`, share `named` at each, `n`}}.
    """
    chosen = choose(recordings, ~recordings.poor, NAMED)
    results = {}
    for reason, (kind, _) in OWN_NOISE.items():
        copies = [degrade(recordings.waveforms[index], kind, int(index)) for index in chosen]
        named = np.mean([[reason in quality_reasons(copy, RATE) for copy in of_one] for of_one in copies], axis=0)
        degradation = DEGRADATIONS[kind]
        about = {"kind": kind, "unit": degradation.unit, "levels": degradation.levels}
        results[reason] = {**about, "named": named.tolist(), "n": len(chosen)}
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
    """Give what of a recording (samples,) should score as it does: other gains, rates and lengths, filtered, padded.

    Gains are followed by rounding to 16 bits, as a recorder rounds. What is repeated is joined by cross-fades: a click
    at the seam would be a fault. None stands for gains that would clip it or bring it near the noise of rounding (an
    RMS of less than ten steps), for parts as long as the whole, and for a last part that shares samples with the first
    of its length.
    """
    copies: dict[str, NDArray | None] = {}
    for gain_db in GAINS_DB:
        louder = waveform * np.float32(10 ** (gain_db / 20))
        sound = np.abs(louder).max() <= 1 and np.sqrt(np.mean(louder**2)) >= _QUIETEST
        copies[f"gain {gain_db:+d} dB"] = np.round(louder / _STEP) * np.float32(_STEP) if sound else None
    for rate in RATES:
        copies[f"through {rate / 1000:g} kHz"] = resample(resample(waveform, RATE, rate), rate, RATE)
    for tilt_db in TILTS_DB:
        copies[f"tilted by {tilt_db:+d} dB"] = tilted(waveform, tilt_db)
    half = len(waveform) // 2
    parts = {"first half": waveform[:half], "second half": waveform[half:]}
    parts |= {f"first {seconds} s": waveform[: seconds * RATE] for seconds in SECONDS}
    parts["last 3 s"] = waveform[-3 * RATE :] if len(waveform) >= 6 * RATE else waveform[:0]
    thrice = joined(3 * [parts["first 3 s"]]) if len(parts["first 3 s"]) < len(waveform) else None
    copies |= {name: part if 0 < len(part) < len(waveform) else None for name, part in parts.items()}
    copies |= {"first 3 s thrice": thrice, "twice over": joined(2 * [waveform])}
    return {**copies, "1 s of silence after": np.pad(waveform, (0, RATE))}


def stays(fitted: Sequence[Fitted], recordings: Recordings) -> dict[str, Any]:
    """Change what should not matter of good and of poor recordings, and compare `PAIRS`; {score: {change: ...}}."""
    good = choose(recordings, ~recordings.poor, GOOD_RECORDINGS)
    chosen = np.concatenate([good, choose(recordings, recordings.poor, POOR_RECORDINGS)])
    copies = [changed(recordings.waveforms[index]) for index in chosen]
    after = {one.name: {"as recorded": one.out_of_fold[0][chosen]} for one in fitted}
    for kind in copies[0]:
        made = np.array([of_one[kind] is not None for of_one in copies])
        measured = measure((c for of_one in copies if (c := of_one[kind]) is not None), [one.score for one in fitted])
        for one in fitted:
            after[one.name][kind] = np.full(len(chosen), np.nan)
            after[one.name][kind][made] = one.on_unseen(measured[one.score.measure], chosen[made])
    compared = {kind: ("as recorded", kind) for kind in copies[0]}
    compared |= {f"{second} against {first}": (first, second) for first, second in PAIRS}
    poor = recordings.poor[chosen]
    return {
        one.name: {
            name: change(after[one.name][first], after[one.name][second], one.threshold, poor)
            for name, (first, second) in compared.items()
        }
        for one in fitted
    }


def ignores_findings(fitted: Sequence[Fitted], recordings: Recordings) -> dict[str, Any]:
    """Compare abnormal with normal among the good recordings, and abnormal with normal events of these.

    Wheezes are shorter than breaths, and a score may read how much there is to hear: so also the middles of all events
    that are long enough, as much of each.

    Returns:
        {score: {"recordings", "events" or "middle N s of events": see `class_dependence`}}.
    """
    good = np.flatnonzero(~recordings.poor)
    labels, patients = recordings.table["record_label"].to_numpy(str), recordings.patients
    waveforms, events = recordings.cut(good)
    results: dict[str, Any] = {
        one.name: {"recordings": class_dependence(one.out_of_fold[0][good], labels[good], "Normal", patients[good])}
        for one in fitted
    }
    units: dict[str, float | None] = {"events": None}
    units |= {f"middle {seconds:g} s of events": seconds for seconds in MIDDLES_S}
    for unit, length in units.items():
        chosen = [i for i, waveform in enumerate(waveforms) if not length or len(waveform) >= round(length * RATE)]
        source, types = events["index"].to_numpy()[chosen], events["event_type"].to_numpy(str)[chosen]
        if length and "Normal" not in types:
            continue
        measured = measure((middle(waveforms[index], length) for index in chosen), [one.score for one in fitted])
        for one in fitted:
            quality = one.on_unseen(measured[one.score.measure], source)
            results[one.name][unit] = class_dependence(quality, types, "Normal", patients[source])
    return results


def middle(waveform: NDArray, seconds: float | None) -> NDArray:
    """Give the middle of samples (samples,), all of them for None."""
    length = len(waveform) if seconds is None else round(seconds * RATE)
    start = (len(waveform) - length) // 2
    return waveform[start : start + length]


Spans = list[tuple[int, int]]  # first sample and the one after the last, rising, apart


def without_findings(fitted: Sequence[Fitted], recordings: Recordings) -> dict[str, Any]:
    """Cut the findings out of good recordings, and instead as much of a control in pieces of the same lengths.

    A control is drawn from the same recording, `DRAWS` times: any sound that is not of an abnormal event, or that of
    normal events alone, since a loss of breath may lower a score by itself. Recordings where it finds no room are left
    out, and counted.

    Returns:
        {score: {name in `FINDINGS`: {name in `CONTROLS`: see `removal`, with `left_out`}}}.
    """
    rng = np.random.default_rng(0)
    results: dict[str, Any] = {one.name: {finding: {} for finding in FINDINGS} for one in fitted}
    for finding, control in product(FINDINGS, CONTROLS):
        cuts, left_out = _cuts(recordings, FINDINGS[finding], control, rng)
        chosen = np.array([*cuts], dtype=int)
        copies = (without(recordings.waveforms[index], spans) for index, of_one in cuts.items() for spans in of_one)
        measured = measure(copies, [one.score for one in fitted])
        for one in fitted:
            after = one.on_unseen(measured[one.score.measure], np.repeat(chosen, 1 + DRAWS))
            moved = after.reshape(-1, 1 + DRAWS) - one.out_of_fold[0][chosen, None]
            about = removal(moved[:, 0], moved[:, 1:].mean(axis=1), recordings.patients[chosen])
            results[one.name][finding][control] = {**about, "left_out": left_out}
    return results


def _cuts(
    recordings: Recordings, types: Sequence[str], control: str, rng: np.random.Generator
) -> tuple[dict[int, list[Spans]], int]:
    """{good recording with such events: [where they are, *draws]}, and how many have no room for the control."""
    cuts, left_out = {}, 0
    for index in np.flatnonzero(~recordings.poor).tolist():
        samples, events = len(recordings.waveforms[index]), recordings.table["cycles"].iloc[index]
        found, normal, abnormal = (
            within(events, names, samples) for names in (types, EVENT_TYPES[:1], EVENT_TYPES[1:])
        )
        room = runs(~abnormal if control == "other sound" else normal & ~abnormal)
        draws = [spans for _ in range(DRAWS) if (spans := elsewhere(runs(found), room, rng))]
        if len(draws) == DRAWS:
            cuts[index] = [runs(found), *draws]
        elif found.any():
            left_out += 1
    return cuts, left_out


def within(events: Iterable[Mapping[str, Any]], types: Sequence[str], samples: int) -> NDArray:
    """Give which samples (samples,) of a recording lie within events of these types."""
    mask = np.zeros(samples, dtype=bool)
    for event in events:
        if EVENT_TYPES[event["event_type"]] in types:
            mask[int(event["start"] * RATE) : int(event["end"] * RATE)] = True
    return mask


def runs(mask: NDArray) -> Spans:
    """Give where a mask (samples,) is true."""
    edges = np.flatnonzero(np.diff(mask.astype(np.int8), prepend=0, append=0)).tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))


def elsewhere(spans: Spans, room: Spans, rng: np.random.Generator) -> Spans | None:
    """Draw spans of the same lengths, the longest first, anywhere in the room there is; None where they do not fit."""
    lengths = sorted((stop - start for start, stop in spans), reverse=True)
    for _ in range(TRIES):
        gaps, placed = list(room), []
        for length in lengths:
            starts = np.array([max(0, stop - start - length + 1) for start, stop in gaps])
            if not starts.any():
                break
            gap = int(rng.choice(len(gaps), p=starts / starts.sum()))
            low, high = gaps.pop(gap)
            place = low + int(rng.integers(starts[gap]))
            placed.append((place, place + length))
            gaps += [(low, place), (place + length, high)]
        else:
            return sorted(placed)
    return None


def without(waveform: NDArray, spans: Spans) -> NDArray:
    """Cut spans out of a recording (samples,) and join what is left."""
    edges = [0, *(edge for span in spans for edge in span), len(waveform)]
    return joined([waveform[a:b] for a, b in zip(edges[::2], edges[1::2], strict=True) if a < b])


def joined(parts: Sequence[NDArray]) -> NDArray:
    """Put parts (samples,) one after the other, cross-faded over `FADE` samples.

    Ends put together as they are would click, and a click is a fault of a recording.
    """
    whole, *rest = parts
    for part in rest:
        overlap = min(FADE, len(whole), len(part))
        rise = np.linspace(0, 1, overlap, dtype=np.float32)
        seam = whole[-overlap:] * (1 - rise) + part[:overlap] * rise
        whole = np.concatenate([whole[:-overlap], seam, part[overlap:]])
    return whole


def tilted(waveform: NDArray, tilt_db: float) -> NDArray:
    """Filter a recording (samples,) so that its level at 1600 Hz over that at 100 Hz is `tilt_db` more, without delay.

    The gain is 0 dB at 400 Hz, goes with the octaves, and beyond both frequencies is what it is there.
    """
    octaves = np.log2(np.clip(np.fft.rfftfreq(len(waveform), 1 / RATE), 100, 1600) / 400)
    return np.fft.irfft(np.fft.rfft(waveform) * 10 ** (tilt_db / 4 * octaves / 20), len(waveform)).astype(np.float32)


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
    below = float((quality < 0.5).mean())
    return {**about, "sd": float(quality.std()), "p5": p5, "median": median, "p95": p95, "below_half": below}


# ---- The command ----


def evaluate(
    scores: Mapping[str, Score], splits: Mapping[str, Recordings], icbhi: Recordings | None, folder: Path
) -> dict[str, Any]:
    """Measure everything of every score, and draw it.

    Args:
        scores: by name, at most `MOST_SCORES`.
        splits: SPRSound's: `train`, and the tests that are there.
        icbhi: recordings of ICBHI, where its stethoscopes are to be compared.
        folder: for the figures.

    Returns:
        {experiment: {score's name: results}}, what `quality.json` holds; but `reasons` and `faults`, which belong to no
        score.
    """
    folder.mkdir(parents=True, exist_ok=True)
    train = splits["train"]
    logger.info("fitting in every fold, and telling poor recordings ...")
    measured = measure(train.waveforms, scores.values())
    fitted = [Fitted(name, score, train, measured[score.measure]) for name, score in scores.items()]
    results = {"label": tells_poor(fitted, train)}
    tests = {split: recordings for split, recordings in splits.items() if split.startswith("test")}
    for split, recordings in tests.items():
        results[f"label_{split}"] = tells_poor_of_test(fitted, train, recordings)
    probabilities = [one.name for one in fitted if one.score.probability]
    found = {one.name: one.out_of_fold for one in fitted}
    plot_discrimination(found, probabilities, train.poor, folder / "quality_label.png")
    for one in fitted:
        plot_recordings(*_extremes(one, train), folder / f"quality_recordings_{one.name}.png", one.name)
    experiments: dict[str, Callable[[], dict[str, Any]]] = {
        "noise": lambda: falls_with_noise(fitted, train),
        "half": lambda: falls_with_noise_in_half(fitted, train),
        "alone": lambda: refuses_noise_alone(fitted),
        "simulated": lambda: follows_simulated_noise(fitted),
        "invariance": lambda: stays(fitted, train),
        "findings": lambda: ignores_findings(fitted, train),
        "removal": lambda: without_findings(fitted, train),
        "reasons": lambda: gives_reasons(train),
        "faults": lambda: names_faults(train),
    }
    for name, experiment in experiments.items():
        logger.info("%s ...", name)
        results[name] = experiment()
    plot_monotonicity(results["noise"], folder / "quality_noise.png")
    if icbhi is not None:
        results["devices"], drawn = reads_device(fitted, icbhi)
        plot_devices(drawn, folder / "quality_devices.png")
    return results


def _extremes(one: Fitted, recordings: Recordings) -> tuple[list[Shown], list[Shown]]:
    """The best and the worst recordings, of four children each."""
    quality = one.out_of_fold[0]

    def first(order: NDArray) -> list[Shown]:
        of_children = list(dict.fromkeys(recordings.patients[order]))[:4]
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
    parser.add_argument(
        "--score",
        nargs="+",
        default=list(SCORES),
        help=f"what to measure: {', '.join(SCORES)}, or your own, MODULE:FUNCTION (a waveform at 16 kHz to its score)",
    )
    parser.add_argument("--output_dir", type=Path, default=Path("runs/quality_score"))
    parser.add_argument("--allow_missing_audio", action="store_true", help="work on the recordings that are there")
    args = parser.parse_args(argv)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logger.setLevel(logging.INFO)

    try:
        args.output_dir.mkdir(parents=True, exist_ok=True)
        scores = dict(map(find_score, args.score))
        if len(scores) < len(args.score) or len(scores) > MOST_SCORES:
            raise ValueError(f"--score {' '.join(args.score)}: give at most {MOST_SCORES}, each by a name of its own")
        icbhi = load("icbhi", args.icbhi_dir, args.allow_missing_audio)["all"] if args.icbhi_dir else None
    except (OSError, ValueError) as error:
        raise SystemExit(str(error).replace("allow_missing_audio=True", "--allow_missing_audio")) from error
    splits = load_sprsound(args.data_dir, args.allow_missing_audio)
    results = evaluate(scores, splits, icbhi, args.output_dir)
    text = json.dumps(results, indent=2, allow_nan=False)
    (args.output_dir / "quality.json").write_text(text + "\n", encoding="utf-8")
    print(to_markdown(results))


if __name__ == "__main__":
    main()

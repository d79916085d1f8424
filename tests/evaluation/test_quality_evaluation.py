import json

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.image import imread
from scipy.signal import welch
from scipy.stats import kurtosis, spearmanr
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import hf_datasets
from modeling_qlung.evaluation import quality
from modeling_qlung.evaluation.bootstrap import weighted_ci
from modeling_qlung.evaluation.noises import (
    DEGRADATIONS,
    HALF_SNR_DB,
    NOISES,
    SNR_DB,
    UNSEEN,
    UNSEEN_NOISES,
    add_noise,
    clip,
    degrade,
    drop,
    spoil_half,
    synthesize,
)
from modeling_qlung.evaluation.quality import (
    FADE,
    changed,
    elsewhere,
    ignores_findings,
    middle,
    reads_device,
    runs,
    stays,
    tells_poor,
    tilted,
    within,
    without,
    without_findings,
)
from modeling_qlung.evaluation.quality_measures import (
    best_threshold,
    calibration,
    change,
    class_dependence,
    discrimination,
    group_share,
    monotonicity,
    rank_correlation,
    refused,
    removal,
    weighted_auroc,
    weighted_average_precision,
)
from modeling_qlung.evaluation.quality_recordings import POOR, Recordings, choose, load
from modeling_qlung.evaluation.quality_scores import SCORES, Fitted, Score, measure
from modeling_qlung.evaluation.quality_tables import to_markdown
from modeling_qlung.filterbank_qlung import KaldiFilterbank
from modeling_qlung.quality_qlung import entropy_and_rms, fit_statistics, quality_score
from modeling_qlung.training.quality import OWN_NOISE
from tests import sprsound

RATE = 16000
LABELS = ("Normal", "CAS", "DAS", "Poor Quality")
EVENTS = {"Normal": 0, "CAS": 2, "DAS": 5}


def score_of(function, probability=False):
    """A score that learns nothing."""
    return Score(function, lambda recordings, measured, folds: np.array, probability)


def made_recordings(patients=10, seconds=3.2, seed=0):
    """A recording of each label of each patient: noise, ten times louder where poor; good ones have two events."""
    rng, waveforms, rows = np.random.default_rng(seed), [], []
    for patient in range(patients):
        for label in LABELS:
            loud = 0.2 if label == "Poor Quality" else 0.02
            waveforms.append((loud * rng.uniform(-1, 1, round(seconds * RATE))).astype(np.float32))
            events = [{"start": s, "end": s + 0.5, "event_type": EVENTS[label]} for s in (0.2, 1.0) if label in EVENTS]
            about = {"patient_id": f"p{patient}", "record_label": label, "cycles": events, "device": f"d{patient % 2}"}
            rows.append({"recording_id": f"p{patient}_{label}", **about})
    return Recordings(waveforms, pd.DataFrame(rows))


def fitted_to(score, recordings, name="score"):
    return Fitted(name, score, recordings, measure(recordings.waveforms, [score])[score.measure])


def rms(waveform):
    return float(np.sqrt(np.mean(np.square(waveform, dtype=np.float64))))


# ---- Measures, on scores with known answers ----


def test_weighted_curves_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    score, positive = rng.integers(0, 12, 200) / 12, rng.random(200) < 0.3  # many ties
    weights = rng.integers(0, 4, (5, 200)).astype(float)
    for ours, theirs in ((weighted_auroc, roc_auc_score), (weighted_average_precision, average_precision_score)):
        expected = [theirs(positive, score, sample_weight=w) for w in weights]
        assert ours(score, positive, weights) == pytest.approx(expected)
    one_class = np.zeros((1, 200)) + positive
    assert np.isnan(weighted_auroc(score, positive, one_class)).all()


def test_perfect_blind_and_reversed_scores():
    poor, patients = np.tile([True, False, False, False], 30), np.repeat(np.arange(40), 3)
    perfect = discrimination(np.where(poor, 0.2, 0.9)[None], poor, patients)
    assert perfect["auroc"] == {"mean": 1.0, "sd": None, "interval": [1.0, 1.0]}
    assert perfect["average_precision"]["mean"] == 1.0
    assert (perfect["n"], perfect["poor"], perfect["patients"]) == (120, 30, 40)
    constant = discrimination(np.full((2, 120), 0.7), poor, patients)
    assert constant["auroc"] == {"mean": 0.5, "sd": 0.0, "interval": [0.5, 0.5]}
    assert constant["average_precision"]["mean"] == pytest.approx(0.25)
    assert discrimination(poor.astype(float)[None], poor, patients)["auroc"]["mean"] == 0.0


def test_seeds_are_averaged():
    poor = np.array([True, False])
    found = discrimination(np.array([[0.1, 0.9], [0.9, 0.1]]), poor, ["a", "b"])["auroc"]
    assert found["mean"] == 0.5
    assert found["sd"] == pytest.approx(np.sqrt(0.5))
    assert found["interval"] is None  # half of the resamples have one class only


def test_functions_are_measured_each_on_what_it_scored():
    rng = np.random.default_rng(2)
    folds, poor = rng.integers(0, 3, (2, 300)), rng.random(300) < 0.3
    quality = rng.random((2, 300)) - 0.5 * poor + folds  # each function has a level of its own
    found = discrimination(quality, poor, np.arange(300), folds)
    expected = [
        np.mean([roc_auc_score(poor[fold == n], -one[fold == n]) for n in range(3)])
        for one, fold in zip(quality, folds, strict=True)
    ]
    assert found["auroc_within"]["mean"] == pytest.approx(np.mean(expected))
    assert found["auroc_within"]["sd"] == pytest.approx(np.std(expected, ddof=1))
    low, high = found["auroc_within"]["interval"]
    assert 0.6 < low < np.mean(expected) < high
    assert found["auroc"]["mean"] < low  # a function's usable recordings below another's poor ones
    assert "auroc_within" not in discrimination(quality, poor, np.arange(300))
    without = poor & (folds[0] != 2)  # a fold that holds no poor recording tells nothing
    expected = [roc_auc_score(without[folds[0] == n], -quality[0, folds[0] == n]) for n in (0, 1)]
    found = discrimination(quality[:1], without, np.arange(300), folds[:1])["auroc_within"]
    assert found["mean"] == pytest.approx(np.mean(expected))
    assert found["interval"] is not None


def test_interval_resamples_children_with_all_their_recordings():
    rng = np.random.default_rng(1)
    patients = np.repeat(np.arange(40), 25)
    poor = rng.random(1000) < 0.3
    score = rng.standard_normal(40)[patients] + poor  # alike within a child
    of_children = discrimination(-score[None], poor, patients)["auroc"]["interval"]
    of_recordings = discrimination(-score[None], poor, np.arange(1000))["auroc"]["interval"]
    assert np.ptp(of_children) > 1.3 * np.ptp(of_recordings)


def test_weighted_interval_is_that_of_a_slow_loop():
    rng = np.random.default_rng(2)
    values, patients = rng.standard_normal(30), rng.choice(list("abcdefg"), 30)
    low, high = weighted_ci(patients, lambda w: w @ values / w.sum(axis=1), resamples=300, level=0.9, seed=4)
    draws = np.random.default_rng(4).multinomial(7, [1 / 7] * 7, size=300)
    lists = [[np.tile(values[patients == n], t) for n, t in zip("abcdefg", draw, strict=True)] for draw in draws]
    means = [np.concatenate(drawn).mean() for drawn in lists]
    assert [low, high] == pytest.approx(np.percentile(means, [5, 95]).tolist())
    with pytest.raises(ValueError, match="level=95"):
        weighted_ci(patients, lambda w: w[:, 0], level=95)


def test_calibration_of_honest_and_overconfident_probabilities():
    usable = np.tile([True, True, True, False], 50)
    honest = calibration(np.full((2, 200), 0.75), usable)
    assert honest["ece"] == pytest.approx(0)
    assert honest["brier"] == pytest.approx(honest["brier_constant"]) == pytest.approx(0.1875)
    assert honest["bins"] == [{"probability": 0.75, "usable": 0.75, "n": 400}]
    over = calibration(np.full((1, 200), 0.95), usable)
    assert over["ece"] == pytest.approx(0.2)
    assert over["brier"] == pytest.approx(0.75 * 0.05**2 + 0.25 * 0.95**2)
    perfect = calibration(usable.astype(float)[None], usable)  # 1 falls into the last bin
    assert perfect["brier"] == perfect["ece"] == 0
    assert [part["n"] for part in perfect["bins"]] == [50, 150]


def test_threshold_lies_between_separated_scores():
    assert 0.3 < best_threshold(np.array([0.1, 0.3, 0.6, 0.7]), np.array([True, True, False, False])) < 0.6
    # One good recording among the poor ones: still cheaper to call it poor.
    found = best_threshold(np.array([0.1, 0.2, 0.3, 0.6, 0.7]), np.array([True, False, True, False, False]))
    assert 0.3 < found < 0.6


def test_a_gate_refuses_what_is_below_it():
    quality, poor = np.array([0.1, 0.4, 0.5, 0.2, 0.5, 0.6, 0.7]), np.array([True, True, True, *[False] * 4])
    assert refused(quality, poor, 0.5) == {"threshold": 0.5, "poor": 2 / 3, "usable": 0.25}


def test_monotonicity_of_falling_rising_still_and_jumping_scores():
    falling, rising = np.linspace(1, 0, 9), np.linspace(0, 1, 9)
    found = monotonicity(np.stack([falling, falling**2]))
    assert found["spearman"] == pytest.approx(-1)
    assert found["monotone"] == 1
    assert found["mean"][0] == 1
    assert found["mean"][-1] == 0
    assert monotonicity(rising[None])["spearman"] == pytest.approx(1)
    assert monotonicity(np.full((3, 9), 0.5)) == {"mean": [0.5] * 9, "spearman": 0.0, "monotone": 1.0}
    # A slow rise is one, though no step of it is: what counts is the lowest score so far.
    assert monotonicity(np.linspace(0.5, 0.55, 9)[None])["monotone"] == 0
    jumping = np.array([[0.9, 0.5, 0.505, 0.4], [0.9, 0.5, 0.52, 0.4]])
    assert monotonicity(jumping)["monotone"] == 0.5
    assert monotonicity(jumping)["spearman"] == pytest.approx(spearmanr(jumping[0], range(4)).statistic)


def test_rank_correlation_is_that_of_scipy():
    rng = np.random.default_rng(3)
    first, second = rng.integers(0, 5, 40), rng.integers(0, 5, 40)
    assert rank_correlation(first, second) == pytest.approx(spearmanr(first, second).statistic)
    assert rank_correlation(first, np.ones(40)) is None
    assert rank_correlation([1], [2]) is None


def test_change_counts_what_is_called_otherwise():
    before, after = np.array([0.2, 0.4, 0.6, 0.8]), np.array([0.2, 0.6, 0.6, 0.4])
    poor = np.array([True, True, False, False])
    found = change(before, after, 0.5, poor)
    assert found["mean"] == pytest.approx(0.15)
    assert found["p95"] == pytest.approx(np.percentile([0, 0.2, 0, 0.4], 95))
    assert found["crossing"] == 0.5
    assert (found["poor"], found["usable"]) == pytest.approx((0.1, -0.2))  # up and down
    assert (found["auroc_before"], found["auroc_after"]) == (1.0, pytest.approx(2.5 / 4))
    assert found["n"] == 4
    assert change(before, before, 0.5, poor)["spearman"] == pytest.approx(1)
    there = change(before, np.where(poor, after, np.nan), 0.5, poor)
    assert (there["n"], there["mean"], there["usable"]) == (2, pytest.approx(0.1), None)
    assert there["auroc_after"] is None
    assert set(change(before, np.full(4, np.nan), 0.5, poor).values()) == {None, 0}


def test_removal_compares_within_recordings():
    patients = np.repeat(np.arange(20), 2)
    control = np.random.default_rng(10).standard_normal(40)  # moves a lot, and the finding's removal with it
    found = removal(control + np.tile([0.1, 0.3], 20), control, patients)
    assert found["difference"] == pytest.approx(found["removed"] - found["control"]) == pytest.approx(0.2)
    assert found["interval"] == pytest.approx([0.2, 0.2])
    assert (found["n"], found["patients"]) == (40, 20)
    shifted = removal(control + (patients < 10), control, patients)["interval"]
    assert 0.2 < shifted[0] < 0.5 < shifted[1] < 0.8  # half of the children: their number is drawn
    assert removal(control[:0], control[:0], patients[:0])["difference"] is None


def test_a_score_that_reads_the_finding_is_exposed():
    names, patients = np.tile(["Normal", "CAS", "DAS"], 20), np.repeat(np.arange(20), 3)
    reading = np.select([names == "Normal", names == "CAS"], [0.9, 0.1], 0.9)
    found = class_dependence(reading, names, "Normal", patients)
    assert found["CAS"] == {"auroc": 1.0, "interval": [1.0, 1.0], "n": 20, "patients": 20}
    assert found["DAS"]["auroc"] == 0.5
    with pytest.raises(ValueError, match="none of 60 is 'normal'"):
        class_dependence(reading, names, "normal", patients)


def test_a_score_that_reads_the_device_is_exposed():
    devices, patients = np.tile(["a", "b", "c"], 40), np.arange(120)
    reading = group_share(np.where(devices == "a", 0.9, 0.3), devices, patients)
    assert reading["share"] == pytest.approx(1)
    assert reading["interval"] == pytest.approx([1, 1])
    noise = np.random.default_rng(4).random(120)
    blind = group_share(noise, devices, patients)
    between = sum(40 * (noise[devices == d].mean() - noise.mean()) ** 2 for d in "abc")
    assert blind["share"] == pytest.approx(between / (120 * noise.var()))
    assert blind["share"] < 0.1
    assert group_share(np.ones(120), devices, patients) == {"share": None, "interval": None}


# ---- Noises ----


@pytest.fixture
def breath():
    """3 s of noise of 100 to 1,000 Hz that comes and goes, with the history of 8 kHz."""
    times = np.arange(3 * RATE) / RATE
    spectrum = np.fft.rfft(np.random.default_rng(5).standard_normal(len(times)))
    hertz = np.fft.rfftfreq(len(times), 1 / RATE)
    sound = np.fft.irfft(spectrum * ((hertz > 100) & (hertz < 1000)), len(times))
    return (0.02 * sound * np.sin(np.pi * times) ** 2).astype(np.float32)


@pytest.mark.parametrize("kind", NOISES | UNSEEN_NOISES)
def test_noise_is_added_at_the_ratio_asked_for(breath, kind):
    noise = synthesize(kind, len(breath), np.random.default_rng(6))
    at_level = (DEGRADATIONS | UNSEEN)[kind].prepare(breath, np.random.default_rng(6))
    for snr_db in SNR_DB:
        parts = np.stack([breath, noise, np.ones_like(breath)], axis=1).astype(np.float64)
        (of_breath, of_noise, _), rest, *_ = np.linalg.lstsq(parts, at_level(snr_db).astype(np.float64), rcond=None)
        assert 10 * np.log10(np.var(of_breath * breath) / np.var(of_noise * noise)) == pytest.approx(snr_db, abs=0.1)
        assert rest[0] < 1e-6 * np.sum(np.square(breath))
    assert of_noise > 0


def test_noise_of_any_level_and_offset_is_scaled(breath):
    noise = np.random.default_rng(7).standard_normal(len(breath))
    np.testing.assert_allclose(add_noise(breath, noise, 10), add_noise(breath, 30 * noise + 5, 10), atol=1e-7)


@pytest.mark.parametrize("kind", NOISES | UNSEEN_NOISES)
def test_noise_in_half_is_in_the_second_half_alone(breath, kind):
    copies, half = spoil_half(breath, kind, 1), len(breath) // 2
    assert len(copies) == len(HALF_SNR_DB)
    for copy, snr_db in zip(copies, HALF_SNR_DB, strict=True):
        assert copy.dtype == np.float32
        assert rms(copy) == pytest.approx(rms(breath), rel=1e-3)
        gain = copy[:half] @ breath[:half] / (breath[:half] @ breath[:half])
        np.testing.assert_allclose(copy[:half], gain * breath[:half], atol=1e-6)
        noise = copy[half:] / gain - breath[half:]
        assert 10 * np.log10(np.var(breath) / np.var(noise)) == pytest.approx(snr_db, abs=0.1)
    np.testing.assert_array_equal(copies[0], spoil_half(breath, kind, 1)[0])
    assert not np.array_equal(copies[0], spoil_half(breath, kind, 2)[0])


@pytest.mark.parametrize("kind", DEGRADATIONS | UNSEEN)
def test_degraded_recordings_keep_length_loudness_and_history(breath, kind):
    copies = degrade(breath, kind, 1)
    assert len(copies) == len((DEGRADATIONS | UNSEEN)[kind].levels) == 8
    worse = [np.mean(np.square(copy - breath)) for copy in copies]
    assert worse == sorted(worse)
    for copy in copies:
        assert copy.shape == breath.shape
        assert copy.dtype == np.float32
        assert rms(copy) == pytest.approx(rms(breath), rel=1e-3)
        hertz, power = welch(copy, RATE, nperseg=1024)
        assert power[hertz > 4200].sum() < 1e-4 * power.sum()


@pytest.mark.parametrize("kind", DEGRADATIONS | UNSEEN)
def test_noise_depends_on_the_seed_alone(breath, kind):
    first, again, other = (degrade(breath, kind, seed)[-1] for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert np.array_equal(first, other) == (kind == "clipping")


@pytest.mark.parametrize("kind", DEGRADATIONS | UNSEEN)
@pytest.mark.parametrize("samples", [1, 2000])
def test_short_and_silent_recordings_are_degraded(kind, samples):
    short = np.linspace(-0.1, 0.1, samples, dtype=np.float32)
    assert all(np.isfinite(copy).all() and len(copy) == samples for copy in degrade(short, kind, 0))
    assert not any(copy.any() for copy in degrade(np.zeros(samples, np.float32), kind, 0))


def test_kinds_of_noise_are_what_they_are_called():
    noise = {kind: synthesize(kind, 20 * RATE, np.random.default_rng(8)) for kind in NOISES | UNSEEN_NOISES}
    spectra = {kind: welch(samples, RATE, nperseg=8192) for kind, samples in noise.items()}

    def share(kind, low, high):
        hertz, power = spectra[kind]
        return power[(hertz >= low) & (hertz < high)].sum() / power.sum()

    for samples in noise.values():
        assert samples.std() == pytest.approx(1, rel=1e-3)
        assert abs(samples.mean()) < 1e-3
    assert share("white", 100, 1100) == pytest.approx(share("white", 2000, 3000), rel=0.05)
    assert share("ambient", 100, 200) == pytest.approx(share("ambient", 800, 1600), rel=0.15)  # equal in every octave
    assert share("rumble", 0, 200) > 0.95
    for kind, mains_hz in (("hum", 50), ("60 Hz hum", 60)):
        hertz, power = spectra[kind]
        peaks = hertz[np.argsort(power)[-6:]]
        assert np.abs(peaks - mains_hz * np.round(peaks / mains_hz)).max() < 3
        assert share(kind, 40, 10 * mains_hz + 10) > 0.99
    assert kurtosis(noise["knocks"]) > 10 > 1 > abs(kurtosis(noise["white"]))
    assert share("babble", 200, 3500) > 0.8
    hertz, power = welch(np.abs(noise["babble"]).reshape(-1, 160).mean(axis=1), 100, nperseg=512)
    assert power[(hertz > 2) & (hertz < 10)].sum() > 2 * power[hertz > 10].sum()  # the rhythm of syllables
    assert share("crying", 250, 4000) > 0.98
    assert share("alarm", 390, 1010) > 0.9
    assert share("cloth", 250, 3500) > 0.95
    hertz, power = spectra["music"]
    scale = 261.63 * 2 ** (np.array([0, 2, 4, 5, 7, 9, 11, 12, 14, 16, 17, 19, 21, 23, 24]) / 12)
    assert np.abs(hertz[np.argmax(power)] - scale).min() < 2
    assert share("music", 250, 3200) > 0.95


def test_cries_and_beeps_come_and_go():
    levels = {
        kind: np.abs(synthesize(kind, 60 * RATE, np.random.default_rng(9))).reshape(-1, 160).mean(axis=1)  # each 10 ms
        for kind in ("crying", "alarm", "music")
    }
    sounding = {kind: level > 0.1 * level.max() for kind, level in levels.items()}
    starts = {kind: np.flatnonzero(np.diff(on.astype(int)) > 0) / 100 for kind, on in sounding.items()}
    assert 0.5 < sounding["crying"].mean() < 0.8
    assert 28 <= len(starts["crying"]) <= 66  # one each 0.9 to 2.2 s
    plucked = np.flatnonzero(np.diff(levels["music"]) > 0.2 * levels["music"].max())
    assert 100 < (np.diff(plucked, prepend=-2) > 1).sum() < 235  # one each 0.27 to 0.53 s on average
    gaps = np.diff(starts["alarm"])
    assert np.allclose(gaps[np.abs(gaps - 0.25) > 0.02], 1.5, atol=0.02)  # from the last of three to the next
    assert np.mean(np.abs(gaps - 0.25) < 0.02) == pytest.approx(2 / 3, abs=0.02)


def test_clipping_flattens_the_loudest_samples(breath):
    clipped = clip(breath, 20.0)
    before, after = (np.abs(samples) / rms(samples) for samples in (breath, clipped))
    assert after.max() < 0.5 * before.max()
    level = np.quantile(after, 0.9)  # half of the flat tops
    assert np.mean((after > 0.93 * level) & (after < 1.07 * level)) > 0.12


def test_dropouts_lose_what_they_lost_before(breath):
    lost = [np.abs(drop(breath + np.float32(0.05), 3, percent)) < 0.01 for percent in (10.0, 40.0)]
    assert [np.mean(silent) for silent in lost] == pytest.approx([0.1, 0.4], abs=0.03)
    assert np.mean(lost[0] & ~lost[1]) < 0.005


# ---- Fitting: nothing is scored by what has seen it ----


def test_a_score_that_remembers_children_is_not_rewarded():
    recordings = made_recordings()
    number = {id(waveform): index for index, waveform in enumerate(recordings.waveforms)}
    seen = []

    def fit(kept, measured, folds):
        assert len(set(folds)) == (5 if len(measured) == len(recordings.poor) else 4)
        assert all(len(set(folds[kept.patients == child])) == 1 for child in set(kept.patients))
        assert [number[id(waveform)] for waveform in kept.waveforms] == measured
        assert (kept.poor == recordings.poor[measured]).all()
        seen.append(set(kept.patients))
        return lambda indices: np.array([float(recordings.patients[index] in seen[-1]) for index in indices])

    one = fitted_to(Score(lambda waveform: number[id(waveform)], fit), recordings)
    assert len(seen) == 26  # five folds, five seeds, and all
    assert seen[-1] == set(recordings.patients)
    assert not one.out_of_fold.any()


def test_changed_copies_are_scored_by_the_function_of_their_fold():
    recordings = made_recordings()

    def fit(kept, measured, folds):
        known = set(kept.patients)
        return lambda children: np.array([float(child in known) for child in children])

    one = fitted_to(Score(lambda waveform: "", fit, repeats=2), recordings)
    assert one.out_of_fold.shape == (2, 40)
    rows = np.random.default_rng(9).permutation(len(recordings.waveforms))
    own = recordings.patients[rows]
    assert not one.on_unseen(own, rows).any()
    assert one.on_unseen(np.roll(own, 1), rows).any()
    assert one.on_others(own).all()
    found = one.on_children([own[0], *own], recordings.patients, np.array(["somebody else", *own]))
    assert found[0] == 1
    assert not found[1:].any()


def test_gates_are_chosen_on_scores_out_of_fold():
    recordings = made_recordings()
    quality = np.where(recordings.poor, 0.3, 0.9)
    quality[:5], quality[5] = [0.8, 0.8, 0.8, 0.85, 0.8], 0.2  # a poor one scores well, a usable one badly
    places = {id(waveform): place for place, waveform in enumerate(recordings.waveforms)}
    one = fitted_to(score_of(lambda waveform: quality[places[id(waveform)]]), recordings)
    assert 0.3 < one.threshold == one.gates["best balance"] < 0.8
    assert one.gates["95 % of usable ones pass"] == pytest.approx(np.percentile(quality[~recordings.poor], 5))
    gates = tells_poor([one], recordings)["score"]["gates"]
    assert gates["best balance"] == {"threshold": one.threshold, "poor": 0.9, "usable": 1 / 30}
    assert gates["one half"] == {"threshold": 0.5, "poor": 0.9, "usable": 1 / 30}


def test_scores_that_share_measurements_measure_once():
    calls = []

    def length(waveform):
        calls.append(len(waveform))
        return len(waveform)

    measured = measure([np.zeros(3), np.zeros(5)], [score_of(length), score_of(length)])
    assert calls == [3, 5]
    assert measured == {length: [3, 5]}


def test_recordings_are_drawn_from_as_many_children_as_there_are():
    recordings = made_recordings(patients=10)
    drawn = choose(recordings, ~recordings.poor, 12)
    assert len(set(recordings.patients[drawn[:10]])) == 10
    assert len(set(drawn)) == 12
    assert not recordings.poor[drawn].any()
    assert len(choose(recordings, recordings.poor, 50)) == 10


def test_entropy_rms_is_the_published_score():
    recordings = made_recordings(4)
    pairs = np.array([entropy_and_rms(waveform) for waveform in recordings.waveforms])
    for name, normalization in (("entropy_rms", "percentile"), ("entropy_rms_raw", "raw")):
        statistics = fit_statistics(pairs, normalization)
        expected = [quality_score(*pair, normalization, statistics) for pair in pairs]
        found = SCORES[name].fit(recordings, [*pairs], np.zeros(len(pairs), int))(pairs)
        np.testing.assert_allclose(found, expected)


# ---- Experiments: each finds the score that it is there to find ----


def test_a_score_that_reads_loudness_is_exposed():
    recordings = made_recordings(5)
    loudness = fitted_to(score_of(lambda waveform: 1 / (1 + 50 * rms(waveform))), recordings)
    crossings = fitted_to(score_of(lambda waveform: np.mean(np.diff(np.sign(waveform)) != 0)), recordings)
    assert tells_poor([loudness], recordings)["score"]["auroc"]["mean"] == 1.0
    found, blind = (stays([one], recordings)["score"] for one in (loudness, crossings))
    assert found["gain +10 dB"]["mean"] > 0.1
    assert found["gain +10 dB"]["crossing"] > 0.5
    assert blind["gain +10 dB"]["p95"] < 1e-3  # but for the rounding
    assert blind["gain +10 dB"]["spearman"] > 0.95
    assert blind["gain +10 dB"]["n"] == 20
    assert found["gain +20 dB"]["n"] == 15  # the poor ones, peaks at 0.2, would clip
    assert found["gain -20 dB"]["n"] == 20
    assert found["twice over"]["mean"] < 1e-4  # but for the seam


def test_a_score_that_reads_rate_or_length_is_exposed():
    recordings = made_recordings(5)
    treble = fitted_to(
        score_of(lambda waveform: np.mean(np.square(np.diff(waveform))) / rms(waveform) ** 2 / 4), recordings
    )
    found = stays([treble], recordings)["score"]
    assert found["tilted by -12 dB"]["mean"] > 0.1
    assert found["through 4 kHz"]["mean"] > 0.3
    assert found["through 44.1 kHz"]["mean"] < 0.05
    length = fitted_to(score_of(lambda waveform: len(waveform) / 200_000), recordings)
    found = stays([length], recordings)["score"]
    assert found["first half"]["mean"] == pytest.approx(0.128)
    seam = FADE / 200_000
    assert found["twice over"]["mean"] == pytest.approx(0.256 - seam)
    assert (found["first half"]["usable"], found["twice over"]["poor"]) == pytest.approx((-0.128, 0.256 - seam))
    assert found["second half against first half"]["mean"] == 0  # equally long
    assert found["first 3 s thrice against first 3 s"]["usable"] == pytest.approx(2 * (0.24 - seam))
    assert found["first 5 s"]["n"] == found["last 3 s against first 3 s"]["n"] == 0
    assert found["gain -10 dB"]["mean"] == 0


def test_a_score_that_reads_what_parts_hold_is_told_from_one_that_reads_length():
    recordings = made_recordings(5, seconds=6.4)
    for waveform in recordings.waveforms:
        waveform[-3 * RATE :] = 0.5
    content = fitted_to(score_of(lambda waveform: float(np.mean(waveform))), recordings)
    found = stays([content], recordings)["score"]
    assert found["last 3 s against first 3 s"]["usable"] == pytest.approx(0.5, abs=1e-3)
    assert found["first 3 s thrice against first 3 s"]["mean"] < 1e-4
    assert found["first 3 s"]["mean"] == pytest.approx(0.5 * 3 / 6.4, abs=1e-3)
    assert found["twice over"]["mean"] < 1e-3


def test_a_tilt_rises_by_octaves_between_100_and_1600_hz_without_delay():
    impulse = np.zeros(2000, np.float32)
    impulse[1000] = 1.0
    gains_db = 20 * np.log10(np.abs(np.fft.rfft(tilted(impulse, 12))))  # bins are 8 Hz wide
    assert gains_db[[0, 12, 25, 50, 100, 200, 900]] == pytest.approx([-6, -6, -3, 0, 3, 6, 6], abs=0.05)
    assert np.argmax(tilted(impulse, 12)) == 1000
    np.testing.assert_allclose(tilted(tilted(impulse, 12), -12), impulse, atol=1e-6)


def test_gains_that_clip_or_drown_are_left_out():
    loud, quiet = np.full(RATE, 0.5, np.float32), np.full(RATE, 1e-3, np.float32)
    assert changed(loud)["gain +10 dB"] is None
    assert changed(loud)["gain -20 dB"] is not None
    assert changed(quiet)["gain -20 dB"] is None
    assert changed(quiet)["gain +20 dB"] == pytest.approx(0.01, abs=0.51 / 2**15)
    assert changed(quiet).keys() == changed(loud).keys()
    soft = np.linspace(0.001, 0.02, RATE, dtype=np.float32)
    softer = changed(soft)["gain -20 dB"]
    assert np.unique(softer * 2**15).tolist() == list(range(3, 67))  # in whole steps of 16 bits
    assert softer == pytest.approx(soft / 10, abs=0.51 / 2**15)
    assert changed(loud)["1 s of silence after"].tolist() == [0.5] * RATE + [0.0] * RATE


def test_events_are_compared():
    recordings = made_recordings()
    wheezes = np.array([label == "CAS" for label in recordings.table["record_label"]])
    for index in np.flatnonzero(wheezes):
        recordings.waveforms[index] *= 0.5
    louder = fitted_to(score_of(lambda waveform: min(1.0, 20 * rms(waveform))), recordings)
    found = ignores_findings([louder], recordings)["score"]
    assert found["recordings"]["CAS"]["auroc"] == 1.0
    assert 0.2 < found["recordings"]["DAS"]["auroc"] < 0.8
    assert found["events"]["Wheeze"]["auroc"] == 1.0
    assert (found["events"]["Wheeze"]["n"], found["events"]["Fine Crackle"]["patients"]) == (20, 10)
    assert found["events"].keys() == {"Wheeze", "Fine Crackle"}
    assert found.keys() == {"recordings", "events", "middle 0.5 s of events"}  # none lasts 0.8 s


def test_what_reads_duration_is_blind_to_middles_of_events():
    recordings = made_recordings()
    for label, events in zip(recordings.table["record_label"], recordings.table["cycles"], strict=True):
        for event in events:
            event["end"] = event["start"] + (0.5 if label == "CAS" else 0.7)
    longer = fitted_to(score_of(lambda waveform: len(waveform) / 100_000), recordings)
    found = ignores_findings([longer], recordings)["score"]
    assert found["events"]["Wheeze"]["auroc"] == 1.0
    assert found["middle 0.5 s of events"]["Wheeze"]["auroc"] == 0.5
    assert middle(np.arange(16000), 0.5).tolist() == list(range(4000, 12000))


def test_devices_are_compared():
    recordings = made_recordings()
    louder = fitted_to(score_of(lambda waveform: min(1.0, 20 * rms(waveform))), recordings)
    others = made_recordings(6)
    for index, device in enumerate(others.table["device"]):
        others.waveforms[index] = np.full(3 * RATE, 0.01 if device == "d0" else 0.03, np.float32)
    found, drawn = reads_device([louder], others)
    assert found["score"]["recordings"]["share"] == pytest.approx(1)
    assert found["score"]["recordings"]["devices"]["d1"]["mean"] == pytest.approx(0.6)
    assert found["score"]["cycles"]["devices"]["d0"]["n"] == 18
    assert drawn["score"]["cycles"]["d0"] == pytest.approx(np.full(18, 0.2))


def test_a_finding_that_lowers_the_score_is_told_from_a_loss_of_sound():
    recordings = made_recordings(8)
    for waveform, label in zip(recordings.waveforms, recordings.table["record_label"], strict=True):
        if label == "CAS":
            waveform[round(0.2 * RATE) : round(0.7 * RATE)] = waveform[RATE : round(1.5 * RATE)] = 0.5
    reads_wheezes = score_of(lambda waveform: 1 - float(np.mean(waveform > 0.3)))
    reads_length = score_of(lambda waveform: len(waveform) / 100_000)
    fitted = [fitted_to(reads_wheezes, recordings, "wheezes"), fitted_to(reads_length, recordings, "length")]
    found = without_findings(fitted, recordings)
    wheezes, crackles = (of_controls["other sound"] for of_controls in found["wheezes"].values())
    assert wheezes["removed"] == pytest.approx(1 / 3.2)
    assert wheezes["control"] == pytest.approx(1 / 3.2 - 1 / 2.2, abs=5e-3)  # what is left holds more of them
    assert wheezes["interval"][0] > 0.4
    assert (wheezes["n"], wheezes["patients"], wheezes["left_out"]) == (8, 8, 0)
    assert crackles["removed"] == crackles["control"] == crackles["difference"] == 0
    for of_controls in found["length"].values():
        assert of_controls["other sound"]["removed"] == pytest.approx(-0.16, abs=5e-3)
        assert of_controls["other sound"]["difference"] == pytest.approx(0, abs=2e-3)  # no seam at an end
        nowhere = of_controls["normal breaths"]
        assert (nowhere["n"], nowhere["left_out"], nowhere["difference"]) == (0, 8, None)
    assert found == without_findings(fitted, recordings)


def test_a_loss_of_breath_is_told_from_the_finding():
    recordings = made_recordings(8)
    for index, events in enumerate(recordings.table["cycles"]):
        if recordings.table["record_label"][index] == "CAS":
            events.append({"start": 1.7, "end": 2.9, "event_type": 0})
            for start, stop in ((0.2, 0.7), (1.0, 1.5), (1.7, 2.9)):
                recordings.waveforms[index][round(start * RATE) : round(stop * RATE)] = 0.5
    reads_breath = fitted_to(score_of(lambda waveform: float(np.mean(waveform > 0.3))), recordings)
    wheezes = without_findings([reads_breath], recordings)["score"]["wheezes, rhonchi, stridor"]
    assert wheezes["other sound"]["difference"] < -0.05
    assert wheezes["normal breaths"]["n"] == 8
    assert wheezes["normal breaths"]["control"] == pytest.approx(1.2 / 2.2 - 2.2 / 3.2, abs=5e-3)
    assert wheezes["normal breaths"]["difference"] == pytest.approx(0, abs=1e-2)  # one seam more


def test_recordings_without_room_for_the_control_are_left_out():
    recordings = made_recordings(5)
    for index in range(1, 17, 4):  # of the label CAS, wheezing for 2 s of 3.2 s
        recordings.table["cycles"].iloc[index][0]["end"] = 2.2
    found = without_findings([fitted_to(score_of(rms), recordings)], recordings)["score"]
    wheezes, crackles = (of_controls["other sound"] for of_controls in found.values())
    assert (wheezes["n"], wheezes["left_out"]) == (1, 4)
    assert (crackles["n"], crackles["left_out"]) == (5, 0)
    assert wheezes["interval"] is None  # one child


def test_controls_are_drawn_wherever_there_is_room():
    rng, room = np.random.default_rng(11), [(0, 100), (300, 600), (650, 1000)]
    drawn = [elsewhere([(100, 300), (600, 650)], room, rng) for _ in range(1000)]
    covered = np.zeros(1000)
    for spans in drawn:
        assert sorted(stop - start for start, stop in spans) == [50, 200]
        assert spans[0][1] <= spans[1][0]
        for start, stop in spans:
            covered[start:stop] += 1
    assert not covered[100:300].any()
    assert not covered[600:650].any()
    assert covered.astype(bool).sum() > 740  # the very first and last samples of a gap are rarely drawn
    assert elsewhere([(0, 400)], room, rng) is None
    assert elsewhere([(0, 400), (500, 900)], [(0, 300), (320, 1000)], rng) is None  # 800 of 980, only 680 in one


def test_events_that_touch_are_one_span():
    events = [(1.0, 2.0, 2), (1.5, 1.8, 6), (2.0, 2.5, 2), (4.0, 9.0, 5)]
    rows = [{"start": start, "end": end, "event_type": kind} for start, end, kind in reversed(events)]
    assert runs(within(rows, ("Wheeze", "Wheeze+Crackle"), 5 * RATE)) == [(RATE, round(2.5 * RATE))]
    assert runs(within(rows, ("Fine Crackle",), 5 * RATE)) == [(4 * RATE, 5 * RATE)]
    assert runs(within(rows, ("Fine Crackle",), 4 * RATE)) == runs(within(rows, ("Rhonchi",), 5 * RATE)) == []
    assert runs(~within(rows, ("Fine Crackle",), 5 * RATE)) == [(0, 4 * RATE)]


def test_what_is_left_of_a_recording_joins_without_a_click():
    waveform = np.r_[np.full(1000, 0.4), np.full(500, 9.0), np.full(1000, -0.4)].astype(np.float32)
    left = without(waveform, [(1000, 1500)])
    assert (len(left), left.dtype) == (2000 - FADE, np.float32)
    assert np.abs(np.diff(left)).max() < 1.1 * 0.8 / (FADE - 1)
    np.testing.assert_array_equal(without(waveform, [(0, 1000), (1500, 2500)]), waveform[1000:1500])
    assert len(without(waveform, [(10, 1000), (1005, 1500)])) == 10 + 5 - 5 + 1000 - 10  # parts shorter than a seam


# ---- The whole ----


def fewer(monkeypatch):
    """Two recordings, and draws of noise, for each experiment."""
    for number in ("GOOD_RECORDINGS", "POOR_RECORDINGS", "NAMED", "ALONE"):
        monkeypatch.setattr(quality, number, 2)


def test_everything_is_measured_drawn_and_tabulated(tmp_path, monkeypatch):
    recordings, simulated = made_recordings(5), made_recordings(4, seed=1)
    simulated.table["snr_db"] = np.linspace(5, 30, 16)
    monkeypatch.setattr(quality, "load", lambda name, data_dir: {"all": simulated})
    fewer(monkeypatch)
    scores = {
        "loud": score_of(lambda waveform: 1 / (1 + 50 * rms(waveform)), probability=True),
        "entropy_rms": SCORES["entropy_rms"],
    }
    without_poor = made_recordings(5, seed=4)
    without_poor = without_poor.take(np.flatnonzero(~without_poor.poor))
    splits = {"train": recordings, "test_inter": made_recordings(5, seed=2), "test_intra": without_poor}
    results = quality.evaluate(scores, splits, made_recordings(4, seed=3), tmp_path)
    assert results["label_test_inter"]["loud"]["auroc"]["mean"] == 1.0
    assert results["label"]["loud"]["calibration"]["ece"] > 0
    assert "calibration" not in results["label"]["entropy_rms"]
    for part in ("noise", "half"):
        assert np.ptp(results[part]["loud"]["white"]["mean"]) < 1e-3  # noise changes no recording's loudness
    assert len(results["half"]["entropy_rms"]["cloth"]["passing"]) == 7
    assert results["alone"]["loud"]["crying"] == {"n": 2, "mean": pytest.approx(1 / 3.5, abs=1e-3), "passing": 0.0}
    said = {name: about["reasons"]["broadband noise"] for name, about in results["reasons"].items()}
    assert said == {"poor": 1.0, "usable": 1.0}  # all of them are noise
    assert [about["n"] for about in results["reasons"].values()] == [5, 5]
    json.dumps(results, allow_nan=False)
    text = to_markdown(results)
    assert [found["n"] for found in results["faults"].values()] == [2] * len(OWN_NOISE)
    assert "| broadband noise | 100 % |" in text
    assert text.count("## ") == 13
    assert "| `loud` | as recorded | 10 dB | 0 dB | −10 dB | −20 dB | −30 dB | −40 dB |" in text
    assert "| `loud` | 1.000 ± 0.000 | [1.00, 1.00] | 1.000 ± 0.000 | [1.00, 1.00] |" in text
    assert "| `loud`, by signal-to-noise ratio, never fitted to |" in text
    assert "| `loud`, one half | 0.500 | 100.0 % | 0.0 % |" in text
    assert "| `loud` | crackles | other sound | 5 | 5 | 0 |" in text
    assert "| `loud` | crackles | normal breaths | 0 | 0 | 5 | – | – | – | – |" in text
    assert "nan" not in text
    figures = {path.name for path in tmp_path.iterdir()}
    assert {"quality_label.png", "quality_noise.png", "quality_devices.png", "quality_recordings_loud.png"} <= figures
    for name in figures:
        assert imread(tmp_path / name).std() > 0.02
    assert imread(tmp_path / "quality_recordings_loud.png").shape[1] == 1400


def test_the_command_measures_a_function_of_ones_own(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.py").write_text(
        "import numpy\nfrom modeling_qlung.evaluation.quality_scores import Score\n"
        "def loudness(waveform):\n    return float(abs(waveform).mean())\n"
        "fitted = Score(loudness, lambda recordings, measured, folds: lambda unseen: numpy.full(len(unseen), 0.5))\n"
        "louder = lambda waveform: 100 * loudness(waveform)\n"
        "number = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    fewer(monkeypatch)
    recordings, simulated = made_recordings(5), made_recordings(4, seed=1)
    simulated.table["snr_db"] = np.linspace(5, 30, 16)
    monkeypatch.setattr(quality, "load", lambda name, *_: {"all": simulated})
    monkeypatch.setattr("modeling_qlung.training.quality.load", lambda *_: {"train": recordings})
    out = ["--output_dir", str(tmp_path / "out"), "--score"]
    quality.main([*out, "mine:loudness", "mine:fitted"])
    told = json.loads((tmp_path / "out" / "quality.json").read_text())["label"]
    assert told["loudness"]["auroc"]["mean"] == 0.0, "poor ones are louder"
    assert told["fitted"]["auroc"]["mean"] == 0.5
    assert "| `loudness` | 0.000 ± 0.000 |" in capsys.readouterr().out
    for words, message in (
        (["loudness"], "there is no score 'loudness': take entropy_rms, .*learned, or your own as MODULE:FUNCTION"),
        (["nothing_here:loudness"], "nothing_here:loudness: No module named 'nothing_here'"),
        (["mine:quality"], "mine:quality: module 'mine' has no attribute 'quality'"),
        (["mine:number"], "mine:number is int: give a function from waveforms to scores, or a Score"),
        (["mine:loudness", "mine:loudness"], "give at most 6, each by a name of its own"),
    ):
        with pytest.raises(SystemExit, match=message):
            quality.main([*out, *words])
    with pytest.raises(ValueError, match=r"louder gives scores from 0\.\d+ to \d+\.\d+: they must be within \[0, 1\]"):
        quality.main([*out, "mine:louder"])


def of_children_with_both(root, number):
    """Recordings of each of some children that have a few, some of them poor."""
    children = {}
    for name, annotation in sprsound.annotations(root).items():
        children.setdefault(name.split("_")[0], {})[name] = annotation == POOR
    mixed = [list(own) for own in children.values() if any(own.values()) and not all(own.values()) and len(own) <= 6]
    return mixed[:number]


@pytest.fixture(scope="module")
def real_recordings(real_sprsound, tmp_path_factory):
    """Every poor recording and a quarter of the others."""
    root = tmp_path_factory.mktemp("sprsound")
    called = sprsound.annotations(real_sprsound)
    poor, usable = ([name for name in called if (called[name] == POOR) is wanted] for wanted in (True, False))
    sprsound.link(real_sprsound, root, usable[::4] + poor)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", root / "cache")
        return load("sprsound", str(root), allow_missing_audio=True)["train"]


@pytest.mark.slow
def test_command_on_real_recordings(tmp_path, monkeypatch, capsys, real_sprsound):
    *children, one, other = of_children_with_both(real_sprsound, 10)
    sprsound.link(real_sprsound, tmp_path, [name for own in children for name in own], one + other)
    fewer(monkeypatch)
    monkeypatch.setattr("modeling_qlung.training.quality.FOLDS", 3)
    load_any, few = hf_datasets.load, {"simulated": {"recordings_per_patient": 2}}
    monkeypatch.setattr(hf_datasets, "load", lambda name, *a, **b: load_any(name, *a, **b, **few.get(name, {})))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "out"
    arguments = ["--data_dir", str(tmp_path), "--output_dir", str(folder), "--allow_missing_audio"]
    quality.main([*arguments, "--score", "entropy_rms_raw", "learned"])
    printed = capsys.readouterr().out
    results = json.loads((folder / "quality.json").read_text())
    experiments = ["noise", "half", "alone", "simulated", "invariance", "findings", "removal", "reasons", "faults"]
    assert list(results) == ["label", "label_test_inter", *experiments]
    assert results["label"]["entropy_rms_raw"]["patients"] == 8
    assert results["label_test_inter"]["learned"]["patients"] == 2
    assert results["invariance"]["entropy_rms_raw"]["through 8 kHz"]["mean"] < 1e-3  # the rate that they had
    assert results["noise"]["entropy_rms_raw"]["white"]["spearman"] < -0.9  # noise is what entropy tells
    assert "| `entropy_rms_raw` |" in printed
    assert results["label"]["learned"]["calibration"].keys() == {"brier", "brier_constant", "ece", "bins"}
    louder = [results["invariance"]["learned"][f"gain +{gain_db} dB"]["mean"] for gain_db in (10, 20)]
    assert max(mean for mean in louder if mean is not None) < 0.01  # weaker, the rounding counts a little
    for name in ("quality_label.png", "quality_noise.png", "quality_recordings_learned.png"):
        assert (folder / name).stat().st_size < 400_000


def log_mel_statistics(waveform):
    """396 numbers: of each of 64 bands to 4 kHz six statistics over frames, and twelve of the whole."""
    waveform = np.pad(waveform, (0, max(0, 1000 - len(waveform))))
    energies = KaldiFilterbank(RATE, 85)(torch.from_numpy(waveform)[None])[0, :, :64].numpy()
    step = np.abs(np.diff(energies, axis=0))
    low, high = np.sort(energies, axis=0)[[len(energies) // 20, -1 - len(energies) // 20]]
    bands = [energies.mean(axis=0), energies.std(axis=0), low, high, step.mean(axis=0), step.std(axis=0)]
    frames, level = energies.mean(axis=1), np.abs(waveform) + 1e-6
    whole = [frames.std(), *np.percentile(frames, [5, 25, 50, 75, 95]), kurtosis(waveform), np.log(level.max())]
    whole += [np.log(rms(waveform) + 1e-6), *np.log(np.percentile(level, [50, 95])), np.mean(np.diff(waveform > 0))]
    return np.concatenate([*bands, whole])


def fit_logistic_regression(recordings, measured, folds):
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=2000))
    model.fit(np.array(measured), ~recordings.poor)
    return lambda unseen: model.predict_proba(np.array(unseen))[:, 1]


@pytest.mark.slow
def test_labels_can_be_predicted_for_other_children(real_recordings):
    reference = fitted_to(Score(log_mel_statistics, fit_logistic_regression, True, repeats=1), real_recordings)
    found = tells_poor([reference], real_recordings)["score"]
    assert (found["n"], found["poor"]) == (620, 177)
    low, high = found["auroc"]["interval"]
    assert 0.85 < low < 0.895 < found["auroc"]["mean"] < 0.92 < high < 0.97  # 0.92: of a like set of statistics
    assert found["calibration"]["brier"] < found["calibration"]["brier_constant"]
    assert found["calibration"]["ece"] < 0.05


@pytest.mark.slow
def test_the_learned_score_tells_other_childrens_recordings(real_recordings):
    recordings = real_recordings
    chosen = np.concatenate([choose(recordings, recordings.poor, 90), choose(recordings, ~recordings.poor, 180)])
    recordings = recordings.take(chosen)
    learned = SCORES["learned"]
    unseen = np.isin(recordings.patients, np.unique(recordings.patients)[::4])
    levels = [learned.measure(waveform) for waveform in recordings.waveforms]
    kept = recordings.take(np.flatnonzero(~unseen))
    predict = learned.fit(kept, [], np.unique(kept.patients, return_inverse=True)[1] % 2)
    found = predict([of for of, taken in zip(levels, unseen, strict=True) if taken])
    assert roc_auc_score(~recordings.poor[unseen], found) > 0.85
    about = calibration(found[None], ~recordings.poor[unseen])
    assert about["brier"] < 0.8 * about["brier_constant"]

import math

import numpy as np
import pytest
import torch

import hf_datasets
from modeling_qlung.inference import read_audio, resample
from modeling_qlung.quality_qlung import entropy_and_rms, fit_statistics, quality_score


def reference_entropy(waveform: np.ndarray) -> float:
    """Straight from the definition, in float64, frame by frame."""
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(512) / 512)
    values = []
    for start in range(0, len(waveform) - 511, 256):
        power = np.abs(np.fft.rfft(waveform[start : start + 512] * window))[2:59] ** 2
        share = power / power.sum()
        values.append(-(share * np.log(share)).sum() / math.log(57))
    return float(np.mean(values))


def test_entropy_is_shannons():
    waveform = np.random.default_rng(0).standard_normal(16000)
    assert entropy_and_rms(waveform)[0] == pytest.approx(reference_entropy(waveform), abs=1e-5)


def test_a_tone_has_its_rms_and_little_entropy_noise_has_much():
    time = np.arange(32000) / 16000
    entropy, rms = entropy_and_rms(0.3 * np.sin(2 * np.pi * 500 * time))
    assert rms == pytest.approx(0.3 / math.sqrt(2), rel=1e-3)
    noise_entropy, _ = entropy_and_rms(np.random.default_rng(0).standard_normal(32000))
    assert entropy < 0.35 < 0.85 < noise_entropy


def test_silence_and_the_shortest_waveform_are_defined():
    assert entropy_and_rms(torch.zeros(1000)) == (1.0, 0.0)
    assert all(math.isfinite(value) for value in entropy_and_rms(torch.ones(1)))


@pytest.mark.parametrize(("shape", "rate"), [((0,), 16000), ((2, 10), 16000), ((1000,), 2000)])
def test_what_cannot_be_measured_is_refused(shape, rate):
    with pytest.raises(ValueError, match="needs a"):
        entropy_and_rms(torch.zeros(shape), rate)


def test_the_original_rate_of_a_real_recording_does_not_count(real_icbhi, tmp_path):
    """A 44.1 kHz recording that had been kept at 4 kHz measures the same."""
    rows = hf_datasets.load("icbhi", real_icbhi, "recordings", allow_missing_audio=True, cache_dir=tmp_path)["test"]
    for audio in rows.data.column("audio").to_pylist()[:6]:
        waveform = read_audio(audio["bytes"])
        narrow = resample(resample(waveform, 16000, 4000), 4000, 16000)
        entropy, rms = entropy_and_rms(waveform)
        narrow_entropy, narrow_rms = entropy_and_rms(narrow)
        assert narrow_entropy == pytest.approx(entropy, abs=0.01)
        assert narrow_rms == pytest.approx(rms, rel=0.02)


def test_the_score_is_the_papers():
    assert quality_score(0.6, 0.2) == pytest.approx(1 - 0.7 * 0.6 + 0.3 * 0.2)
    assert quality_score(0.0, 1.0) == 1.0
    assert quality_score(0.5, 0.1, alpha=3.0) == 0.0


MEASUREMENTS = np.stack([np.linspace(0.3, 0.7, 101), np.linspace(0.0, 0.2, 101)], axis=1)


def test_min_max_spans_the_training_set():
    statistics = fit_statistics(MEASUREMENTS, "minmax")
    assert statistics == {"entropy": [0.3, 0.7], "rms": [0.0, 0.2]}
    assert quality_score(0.7, 0.0, "minmax", statistics) == pytest.approx(0.3)
    assert quality_score(0.9, -1, "minmax", statistics) == pytest.approx(0.3)
    assert quality_score(0.5, 0.1, "minmax", statistics) == pytest.approx(1 - 0.35 + 0.15)


def test_percentiles_leave_outliers_out():
    outlier = np.vstack([MEASUREMENTS, [[50.0, 90.0]]])
    statistics = fit_statistics(outlier, "percentile")
    assert statistics["entropy"] == pytest.approx([0.32, 0.684], abs=0.01)


def test_z_scores_go_through_the_normal_distribution():
    statistics = fit_statistics(MEASUREMENTS, "zscore")
    mean, deviation = MEASUREMENTS[:, 0].mean(), MEASUREMENTS[:, 0].std()
    assert statistics["entropy"] == pytest.approx([mean, deviation])
    # One deviation above the mean: 84.13 % of a normal distribution; energy at its mean: one half.
    score = quality_score(mean + deviation, MEASUREMENTS[:, 1].mean(), "zscore", statistics)
    assert score == pytest.approx(1 - 0.7 * 0.8413 + 0.15, abs=1e-4)


def test_missing_statistics_and_unknown_normalisations_are_named():
    assert fit_statistics(MEASUREMENTS, "raw") == {}
    with pytest.raises(ValueError, match=r"softmax.*percentile"):
        fit_statistics(MEASUREMENTS, "softmax")
    with pytest.raises(ValueError, match="needs statistics"):
        quality_score(0.5, 0.1, "minmax")
    with pytest.raises(ValueError, match="do not vary"):
        fit_statistics(np.ones((5, 2)), "minmax")

import json
import math

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

import hf_datasets
from modeling_qlung import QLungFeatureExtractor
from modeling_qlung.evaluation.noises import (
    DEGRADATIONS,
    HALF_SNR_DB,
    NOISES,
    UNSEEN,
    UNSEEN_NOISES,
    degrade,
    spoil_half,
    synthesize,
)
from modeling_qlung.evaluation.quality_recordings import POOR
from modeling_qlung.inference import read_audio, resample
from modeling_qlung.quality_parameters_qlung import QUALITY_PARAMETERS, REASON_THRESHOLDS
from modeling_qlung.quality_qlung import (
    entropy_and_rms,
    fit_statistics,
    learned_quality,
    quality_levels,
    quality_reasons,
    quality_score,
    reason_measurements,
)
from modeling_qlung.training.quality import OWN_NOISE
from tests import sprsound


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


@pytest.mark.parametrize("measure", [entropy_and_rms, quality_levels, quality_reasons])
def test_samples_that_are_no_numbers_are_refused(measure):
    waveform = breath(2.0)
    waveform[100] = np.nan
    with pytest.raises(ValueError, match="needs finite samples"):
        measure(waveform)


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


# ---- The learned score ----


def breath(seconds: float, rate: int = 16000, seed: int = 0) -> np.ndarray:
    """Noise of 150 to 700 Hz that swells every two seconds, over a floor 30 dB below, float32 of RMS 0.03."""
    rng = np.random.default_rng(seed)
    number = round(seconds * rate)
    spectrum = np.fft.rfft(rng.standard_normal(number))
    frequencies = np.fft.rfftfreq(number, 1 / rate)
    spectrum[(frequencies < 150) | (frequencies > 700)] *= 1e-3
    swell = np.sin(np.pi * np.arange(number) / rate / 2) ** 2
    sound = np.fft.irfft(spectrum, number) * (0.05 + swell)
    sound += 10**-1.5 * sound.std() * rng.standard_normal(number)
    return (0.03 * sound / sound.std()).astype(np.float32)


def reference_levels(waveform: np.ndarray) -> np.ndarray:
    """Straight from the definition, in float64, frame by frame."""
    edges = 300 * np.expm1(np.linspace(np.log1p(50 / 300), np.log1p(1800 / 300), 26))
    frequencies = np.arange(513) * 15.625
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(1024) / 1024)
    weights = np.stack([np.interp(frequencies, edges[band : band + 3], [0, 1, 0]) for band in range(24)])
    weights /= weights.sum(axis=1, keepdims=True)
    frames = [waveform[start : start + 1024] * window for start in range(0, len(waveform) - 1023, 512)]
    powers = np.stack([weights @ np.abs(np.fft.rfft(frame)) ** 2 for frame in frames], axis=1)
    own = np.sort(powers, axis=1)[:, (powers.shape[1] - 1) // 2, None]  # of two middle values torch takes the lower one
    return 10 * np.log10(powers / own + 10**-2.5)


def test_levels_are_those_of_the_definition():
    waveform = breath(3.0)
    levels = quality_levels(waveform)
    assert levels.shape == (24, 92)
    np.testing.assert_allclose(levels, reference_levels(waveform.astype(np.float64)), atol=0.01)


def test_a_stethoscopes_frequency_response_does_not_count():
    waveform = breath(6.0)
    response = np.array([1.0, 0.9, 0.4, -0.3])  # treble falls by 12 dB
    filtered = np.convolve(waveform, response)[: len(waveform)]
    levels, other = (quality_levels(one) for one in (waveform, filtered.astype(np.float32)))
    assert (levels - other)[:, 1:].abs().quantile(0.99) < 0.2
    scores = [learned_quality(one, QUALITY_PARAMETERS) for one in (levels, other)]
    assert scores[1] == pytest.approx(scores[0], abs=0.01)


def test_a_sound_over_and_over_is_the_sound():
    levels = quality_levels(breath(3.84))
    levels = levels[:, : levels.shape[1] // 8 * 8]
    scores = [learned_quality(levels.repeat(1, times), QUALITY_PARAMETERS) for times in (1, 2, 5)]
    assert scores == pytest.approx(3 * [scores[0]], abs=1e-5)
    short = breath(0.7)
    torch.testing.assert_close(quality_levels(short), quality_levels(short)[:, :20].repeat(1, 4))


def test_neither_gain_nor_rate_nor_its_history_counts():
    waveform = breath(6.0)
    score = learned_quality(quality_levels(waveform), QUALITY_PARAMETERS)
    for changed, rate in [
        (waveform * 0.1, 16000),
        (waveform * 10, 16000),
        (resample(resample(waveform, 16000, 4000), 4000, 16000), 16000),
        (resample(resample(waveform, 16000, 44100), 44100, 16000), 16000),
        (resample(waveform, 16000, 48000), 48000),
    ]:
        assert learned_quality(quality_levels(changed, rate), QUALITY_PARAMETERS) == pytest.approx(score, abs=0.01)


def test_digital_silence_between_sounds_does_not_raise_the_level():
    waveform = breath(6.0)
    paused = np.concatenate([waveform, np.zeros(160000, dtype=np.float32)])
    levels = quality_levels(waveform)
    # Two frames hold some of both, which moves each band's median a little.
    assert quality_levels(paused)[:, : levels.shape[1]] == pytest.approx(levels.numpy(), abs=0.5)


@pytest.mark.parametrize("waveform", [np.zeros(16000), np.zeros(1)])
def test_silence_is_unusable(waveform):
    assert learned_quality(quality_levels(waveform), QUALITY_PARAMETERS) == 0


@pytest.mark.parametrize("samples", [1, 100, 4800])
def test_the_shortest_waveforms_have_a_score(samples):
    assert 0 <= learned_quality(quality_levels(breath(1.0)[:samples]), QUALITY_PARAMETERS) <= 1


def test_parameters_of_another_network_are_refused():
    levels = quality_levels(breath(2.0))
    with pytest.raises(ValueError, match="quality_parameters are not what"):
        learned_quality(levels, {"layers": []})
    with pytest.raises(ValueError, match="quality_parameters are not what"):
        learned_quality(levels, {**QUALITY_PARAMETERS, "output": {"weight": [1.0, 2.0], "bias": 0.0}})


def test_an_extractor_without_parameters_says_so():
    extractor = QLungFeatureExtractor(quality_score="learned", quality_parameters={})
    with pytest.raises(ValueError, match="quality_parameters are not what"):
        extractor.quality(breath(2.0))


def count(values) -> int:
    if isinstance(values, dict):
        return sum(count(value) for value in values.values())
    return sum(count(value) for value in values) if isinstance(values, list) else 1


def test_its_parameters_are_few():
    assert count(QUALITY_PARAMETERS) == 5857


def test_the_shipped_parameters_are_those_of_this_code():
    """Scores that they gave when they were written: whoever changes what the network reads fits it again."""
    noise = np.random.default_rng(0).standard_normal(96000).astype(np.float32)
    noisy = [breath(6.0) + level * noise for level in (0.05, 0.1, 0.2)]
    scores = [learned_quality(quality_levels(waveform), QUALITY_PARAMETERS) for waveform in noisy]
    assert scores == pytest.approx([0.9480, 0.3911, 0.0283], abs=2e-3)


@pytest.mark.parametrize("quality_score", ["entropy_rms", "learned"])
def test_an_extractor_scores_in_one_call_and_carries_its_parameters(quality_score, tmp_path):
    extractor = QLungFeatureExtractor(quality_score=quality_score)
    waveforms = [breath(9.0), 0.1 * np.random.default_rng(0).standard_normal(16000).astype(np.float32)]
    together = extractor(waveforms, sampling_rate=16000, return_quality=True)["quality"]
    assert together.shape == (2,)
    alone = [extractor(waveform, sampling_rate=16000, return_quality=True)["quality"][0] for waveform in waveforms]
    assert together.tolist() == alone
    extractor.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert stored["quality_parameters"] == (QUALITY_PARAMETERS if quality_score == "learned" else None)
    again = QLungFeatureExtractor.from_pretrained(tmp_path)
    assert again(waveforms, sampling_rate=16000, return_quality=True)["quality"].tolist() == alone


def test_what_an_extractor_reads_is_not_what_the_package_ships():
    none = [0.0] * len(QUALITY_PARAMETERS["output"]["weight"])
    silent = {"layers": QUALITY_PARAMETERS["layers"], "output": {"weight": none, "bias": 0.0}}
    extractor = QLungFeatureExtractor(quality_score="learned", quality_parameters=silent)
    assert extractor.quality(breath(3.0)) == 0.5


def test_an_unknown_quality_score_is_named():
    with pytest.raises(ValueError, match=r"quality_score is 'best'.*learned"):
        QLungFeatureExtractor(quality_score="best")


# ---- Reasons ----


@pytest.fixture(scope="module")
def recordings_of(real_sprsound):
    """The poor (`True`) and as many good (`False`) recordings of SPRSound, of children of every age."""
    called = sprsound.annotations(real_sprsound)
    poor, good = ([name for name in called if (called[name] == POOR) is wanted] for wanted in (True, False))
    chosen = {True: poor, False: good[::10]}
    return {kind: [read_audio(sprsound.wav(real_sprsound, name)) for name in chosen[kind]] for kind in chosen}


@pytest.fixture(scope="module")
def good_recordings(recordings_of):
    return recordings_of[False]


@pytest.fixture(scope="module")
def scores_of(recordings_of):
    extractor = QLungFeatureExtractor(quality_score="learned")
    return {kind: np.array([extractor.quality(one) for one in of_kind]) for kind, of_kind in recordings_of.items()}


def test_the_shipped_parameters_tell_what_they_were_fitted_on(scores_of):
    """How well others are told, `evaluation.quality` measures."""
    poor, good = (scores_of[kind] for kind in (True, False))
    assert np.mean(good[:, None] > poor) > 0.95
    assert np.mean(good) == pytest.approx(0.95, abs=0.05)


def test_the_shipped_score_follows_simulated_noise(tmp_path):
    extractor = QLungFeatureExtractor(quality_score="learned")
    options = {"train_patients": 10, "test_patients": 1, "cache_dir": tmp_path}
    rows = hf_datasets.load("simulated", config="recordings", split="train", **options)
    scores = [extractor.quality(read_audio(audio["bytes"])) for audio in rows.data.column("audio").to_pylist()]
    assert spearmanr(scores, rows["snr_db"][:]).statistic > 0.85


@pytest.mark.parametrize("kind", DEGRADATIONS | UNSEEN)
def test_the_shipped_score_falls_as_noise_is_added(kind, good_recordings, scores_of):
    extractor = QLungFeatureExtractor(quality_score="learned")
    copies = [degrade(waveform, kind, seed)[1::3] for seed, waveform in enumerate(good_recordings[::3])]
    mean = np.mean([[extractor.quality(copy) for copy in of_one] for of_one in copies], axis=0)
    assert (np.diff(mean, prepend=scores_of[False][::3].mean()) < 0).all(), mean


def test_the_shipped_score_refuses_a_half_that_is_loud_noise(good_recordings):
    """Beside it all else is quiet: the score must not take what is left for a clear recording's pause."""
    extractor = QLungFeatureExtractor(quality_score="learned")
    loud, loudest = {}, {}
    for kind in NOISES | UNSEEN_NOISES:
        copies = [spoil_half(waveform, kind, seed) for seed, waveform in enumerate(good_recordings[::9])]
        loud[kind] = np.mean([extractor.quality(of_one[HALF_SNR_DB.index(0)]) for of_one in copies])
        loudest[kind] = np.mean([extractor.quality(of_one[-1]) for of_one in copies])
    assert np.mean([*loud.values()]) < 0.35, loud
    assert max(loudest.values()) < 0.5, loudest
    assert np.mean([*loudest.values()]) < 0.15, loudest


@pytest.mark.parametrize("kind", NOISES | UNSEEN_NOISES)
def test_noise_alone_is_not_usable(kind):
    extractor = QLungFeatureExtractor(quality_score="learned")
    draws = [synthesize(kind, 160000, np.random.default_rng(seed)).astype(np.float32) for seed in range(8)]
    assert np.mean([extractor.quality(0.05 * draw) for draw in draws]) < 0.25


@pytest.mark.parametrize("seed", range(4))
def test_crying_alone_has_a_reason(seed):
    crying = synthesize("crying", 160000, np.random.default_rng(seed)).astype(np.float32)
    assert "speech or crying" in quality_reasons(0.05 * crying)


def muted(waveform: np.ndarray, rate: int = 16000) -> np.ndarray:
    """Half a second of silence in every two."""
    return waveform * ((np.arange(len(waveform)) / rate) % 2 >= 0.5).astype(np.float32)


@pytest.mark.parametrize(
    "change",
    [
        lambda waveform: np.pad(waveform, (0, 16000)),
        lambda waveform: np.pad(waveform, (16000, 16000)),
        muted,
        lambda waveform: np.concatenate([0.1 * waveform[:32000], waveform[32000:]]),
    ],
    ids=["silence after", "silence around", "muted", "2 s 20 dB weaker"],
)
def test_pauses_make_no_recording_good(change, recordings_of, scores_of):
    extractor = QLungFeatureExtractor(quality_score="learned")
    poor = [waveform for waveform, score in zip(recordings_of[True], scores_of[True], strict=True) if score < 0.5]
    assert len(poor) > 100
    assert np.mean([extractor.quality(change(waveform)) < 0.5 for waveform in poor]) > 0.85


def test_every_reason_has_a_threshold():
    assert list(REASON_THRESHOLDS) == list(reason_measurements(breath(2.0)))


def test_good_recordings_have_few_reasons(good_recordings):
    said = [reason for waveform in good_recordings for reason in quality_reasons(waveform)]
    assert max(said.count(reason) for reason in REASON_THRESHOLDS) <= 0.05 * len(good_recordings)


@pytest.mark.parametrize(("reason", "kind", "level"), [(reason, *own) for reason, own in OWN_NOISE.items()])
def test_each_reason_tells_its_own_noise(reason, kind, level, good_recordings):
    told = [reason in quality_reasons(degrade(waveform, kind, 7)[level + 2]) for waveform in good_recordings[:8]]
    assert sum(told) >= 6


@pytest.mark.parametrize("rate", [4000, 8000, 44100])
@pytest.mark.parametrize("percent", [1, 3, 10, 20, 50])
def test_clipping_is_told_whatever_the_rate_and_however_much(rate, percent):
    for seed in range(4):
        recorded = resample(breath(8.0, seed=seed), 16000, rate)
        limit = np.quantile(np.abs(recorded), 1 - percent / 100)
        clipped = resample(np.clip(recorded, -limit, limit).astype(np.float32), rate, 16000)
        assert "clipped" in quality_reasons(clipped)


@pytest.mark.parametrize("rate", [4000, 8000, 44100])
def test_what_is_not_clipped_is_not_called_so_whatever_the_rate(rate):
    for seed in range(4):
        recorded = resample(breath(8.0, seed=seed), 16000, rate)
        assert "clipped" not in quality_reasons(resample(recorded, rate, 16000))


def test_a_weak_recording_is_too_quiet_and_silence_nothing_else():
    assert "too quiet" in quality_reasons(1e-3 * breath(3.0))
    for constant in (0, 0.3, -1):
        assert quality_reasons(np.full(16000, constant, np.float32)) == ["too quiet"]


def test_breath_without_a_rhythm_is_no_breathing():
    rng = np.random.default_rng(0)
    assert "no breathing heard" in quality_reasons(0.03 * rng.standard_normal(100000))
    assert "no breathing heard" not in quality_reasons(breath(8.0))


@pytest.mark.parametrize("mains_hz", [50, 60])
def test_mains_of_either_continent_hum(mains_hz):
    times = np.arange(96000) / 16000
    hum = sum(np.sin(2 * np.pi * mains_hz * harmonic * times) / harmonic for harmonic in range(1, 11))
    assert "mains hum" in quality_reasons(breath(6.0) + 0.03 * hum)
    assert "mains hum" not in quality_reasons(breath(6.0) + 0.03 * np.sin(2 * np.pi * 330 * times))


def test_reasons_do_not_read_the_rate():
    waveform = breath(6.0)
    measured, faster = (
        reason_measurements(waveform, 16000),
        reason_measurements(resample(waveform, 16000, 48000), 48000),
    )
    for name, value in measured.items():
        assert faster[name] == pytest.approx(value, abs=0.3)

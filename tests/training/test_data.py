import io

import numpy as np
import pytest
import soundfile
import soxr
import torch
from scipy.stats import norm

import hf_datasets
from modeling_qlung import QLungFeatureExtractor
from modeling_qlung.training import data
from modeling_qlung.training.data import CycleCollator, decode_cycles, fit_normalization, fit_quality


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    return hf_datasets.load("simulated", train_patients=1, test_patients=1, recordings_per_patient=4, cache_dir=cache)


def test_decoding_gives_each_cycle_at_the_models_rate(simulated):
    decoded = decode_cycles(simulated["train"], 16000)
    audio = simulated["train"].data.column("audio").to_pylist()
    assert len(decoded) == len(audio) == 20
    for row, raw in zip(decoded, audio, strict=True):
        assert row["waveform"].dtype == np.float32
        samples, rate = soundfile.read(io.BytesIO(raw["bytes"]), dtype="float32")
        expected = samples if rate == 16000 else soxr.resample(samples, rate, 16000)
        np.testing.assert_array_equal(row["waveform"], expected)
        assert 0 <= row["entropy"] <= 1
    assert decoded["label"][:] == simulated["train"]["label"][:]


def test_decoding_is_done_again_after_a_change_of_the_code(simulated, monkeypatch):
    first = decode_cycles(simulated["train"], 16000)
    assert decode_cycles(simulated["train"], 16000)._fingerprint == first._fingerprint
    monkeypatch.setattr(data.inspect, "getsource", lambda part: f"another {part}")
    assert decode_cycles(simulated["train"], 16000)._fingerprint != first._fingerprint


def test_normalisation_standardises_the_training_features(simulated):
    extractor = QLungFeatureExtractor(duration=1.0)
    decoded = decode_cycles(simulated["train"], 16000)
    fit_normalization(extractor, decoded)
    features = extractor([row["waveform"] for row in decoded], sampling_rate=16000, return_tensors="pt").input_values
    assert features.mean().item() == pytest.approx(0, abs=1e-4)
    assert features.std(correction=0).item() == pytest.approx(1, abs=1e-4)


def test_quality_of_a_batch_is_that_of_the_feature_extractor(simulated):
    extractor = QLungFeatureExtractor(duration=1.0)
    decoded = decode_cycles(simulated["train"], 16000)
    fit_quality(extractor, decoded, "zscore")
    rows = [decoded[index] for index in range(5)]
    batch = CycleCollator(extractor)(rows)
    waveforms = [row["waveform"] for row in rows]
    expected = extractor(waveforms, sampling_rate=16000, return_tensors="pt", return_quality=True)
    torch.testing.assert_close(batch["quality"], expected.quality)
    torch.testing.assert_close(extractor.extract_features(batch["clips"]), expected.input_values)
    entropy = np.array(decoded["entropy"][:])
    mean, deviation = extractor.quality_statistics["entropy"]
    assert (mean, deviation) == pytest.approx((entropy.mean(), entropy.std()))
    energy = np.array(decoded["rms"][:])
    h = norm.cdf((entropy[0] - mean) / deviation)
    r = norm.cdf((energy[0] - energy.mean()) / energy.std())
    assert batch["quality"][0].item() == pytest.approx(np.clip(1 - 0.7 * h + 0.3 * r, 0, 1), abs=1e-6)


def test_rows_without_a_label_are_marked_for_the_loss_to_leave_out(simulated):
    decoded = decode_cycles(simulated["train"], 16000)
    rows = [{**decoded[0], "label": None}, decoded[1]]
    labels = CycleCollator(QLungFeatureExtractor(duration=1.0))(rows)["labels"]
    assert labels.tolist() == [-100, decoded[1]["label"]]
    assert torch.nn.functional.cross_entropy(torch.zeros(2, 4), labels).item() == pytest.approx(np.log(4))

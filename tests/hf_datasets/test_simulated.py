import io
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import soundfile as sf
from datasets import Audio
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from hf_datasets import LABELS, load
from hf_datasets.simulated import DEVICES, Crackle, Wheeze, draw_plan, read, render, synthesize

SMALL = {"train_patients": 2, "test_patients": 1, "recordings_per_patient": 2}


@pytest.fixture(scope="module")
def default(tmp_path_factory):
    data = load("simulated", cache_dir=tmp_path_factory.mktemp("simulated"))
    return data.cast_column("audio", Audio(decode=False))


def test_default_sizes_and_classes(default):
    for split, size in (("train", 400), ("test", 120)):
        counts = Counter(LABELS[label] for label in default[split]["label"])
        assert counts == {"normal": size // 2, "crackle": size // 5, "wheeze": size // 5, "both": size // 10}


def test_patients_are_disjoint_and_devices_shared(default):
    assert not set(default["train"]["patient_id"]) & set(default["test"]["patient_id"])
    for rows in default.values():
        assert set(rows["device"]) == {device.name for device in DEVICES}


def test_rows_hold_the_devices_rate_and_depth(default):
    devices = {device.name: device for device in DEVICES}
    for row in default["test"]:
        info = sf.info(io.BytesIO(row["audio"]["bytes"]))
        device = devices[row["device"]]
        assert (info.samplerate, info.subtype) == (device.rate, f"PCM_{device.bits}")
        assert info.duration == pytest.approx(row["end"] - row["start"], abs=2 / device.rate)


def test_recordings_config_shares_columns(tmp_path):
    rows = load("simulated", config="recordings", split="train", cache_dir=tmp_path, **SMALL)
    assert rows.num_rows == 4
    marks = rows.remove_columns("audio")[:]["cycles"]
    assert [len(cycles) for cycles in marks] == [5] * 4
    assert all(a["end"] == b["start"] for cycles in marks for a, b in pairwise(cycles))


def test_recordings_depend_on_seed_and_place_alone():
    few, many = read(3, {"train": 1, "test": 1}, 2), read(3, {"train": 3, "test": 1}, 2)
    assert many["train"][:2] == few["train"]
    assert synthesize(many["train"][1].audio) == synthesize(few["train"][1].audio)
    assert read(4, {"train": 1, "test": 1}, 2)["train"][0].audio != few["train"][0].audio
    assert few["train"][0].audio != few["test"][0].audio


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)
def test_signal_to_noise_ratio_is_the_one_asked(device):
    plan = draw_plan((1, 2, 3), device, ["Normal", "Wheeze+Crackle"])
    clean, noise = render(plan)
    assert 10 * np.log10(np.sum(clean**2) / np.sum(noise**2)) == pytest.approx(plan.snr_db, abs=1e-9)
    stored, rate = sf.read(io.BytesIO(synthesize(plan).to_bytes()))
    assert rate == device.rate
    residual = stored - clean  # what was added to the sound, quantisation included
    assert 10 * np.log10(np.sum(clean**2) / np.sum(residual**2)) == pytest.approx(plan.snr_db, abs=0.01)
    assert 0.69 < np.max(np.abs(stored)) < 0.71


def crossings(samples: np.ndarray, rate: float) -> np.ndarray:
    """Times of the sign changes, in seconds."""
    signs = np.sign(samples[np.abs(samples) > 1e-9 * np.max(np.abs(samples))])
    times = np.flatnonzero(np.abs(samples) > 1e-9 * np.max(np.abs(samples))) / rate
    return times[1:][signs[1:] != signs[:-1]]


@pytest.mark.parametrize(("deflection", "two_cycles"), [(0.7e-3, 5e-3), (1.5e-3, 10e-3)], ids=["fine", "coarse"])
def test_crackle_has_its_deflection_and_two_cycles(deflection, two_cycles):
    rate = 1e6
    times = np.arange(-1000, 20000) / rate
    samples = Crackle(0.0, deflection, two_cycles, 2.0).wave(times)
    zeros = crossings(samples, rate) - 1e-3
    assert zeros == pytest.approx([deflection, zeros[1], zeros[2]], abs=3e-6)  # three inside, the fourth is the end
    inside = times[np.abs(samples) > 1e-9]
    assert inside[0] == pytest.approx(0, abs=0.05e-3)
    assert inside[-1] == pytest.approx(two_cycles, abs=0.05e-3)
    widths = np.diff([0, *zeros, two_cycles])
    assert np.all(np.diff(widths) > 0)  # half-waves widen
    assert 1 < np.max(np.abs(samples)) <= 2


def test_drawn_crackles_are_fine_late_and_coarse_early():
    for seed in range(20):
        plan = draw_plan((seed,), DEVICES[3], ["Fine Crackle", "Coarse Crackle"])
        fine_breath, coarse_breath = plan.breaths
        fine = [c for c in plan.crackles if c.start < coarse_breath.start]
        coarse = [c for c in plan.crackles if c.start >= coarse_breath.start]
        assert 6 <= len(fine) <= 15
        assert all(4e-3 < c.two_cycles < 6e-3 for c in fine)
        assert all(8e-3 < c.two_cycles < 12e-3 for c in coarse)
        middle = fine_breath.start + fine_breath.inspiration / 2
        assert all(middle <= c.start <= fine_breath.start + fine_breath.inspiration for c in fine)
        assert any(c.start < coarse_breath.start + coarse_breath.inspiration / 2 for c in coarse)


def test_wheeze_has_its_frequency_level_and_harmonics():
    rate, wheeze = 16000, Wheeze(0.0, 0.5, 430.0, 0.0, 3, 1.7)
    samples = wheeze.wave(np.arange(8000) / rate)
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(8000), 1 << 17))
    frequencies = np.fft.rfftfreq(1 << 17, 1 / rate)
    assert frequencies[np.argmax(spectrum)] == pytest.approx(430, abs=0.5)
    for order, height in ((2, 0.4), (3, 0.15)):
        near = np.abs(frequencies - order * 430) < 50
        assert np.max(spectrum[near]) / np.max(spectrum) == pytest.approx(height, rel=0.01)
    assert np.sqrt(np.mean(samples[1000:7000] ** 2)) == pytest.approx(1.7, rel=0.01)
    assert abs(samples[0]) < 1e-9


def test_wheeze_glides():
    times = np.arange(16000) / 16000
    samples = Wheeze(0.0, 1.0, 400.0, 20.0, 1, 1.0).wave(times)
    for start, expected in ((800, 401), (15200, 419)):
        zeros = crossings(samples[start - 400 : start + 400], 16000)
        assert (len(zeros) - 1) / (zeros[-1] - zeros[0]) / 2 == pytest.approx(expected, abs=2)


def test_drawn_wheezes_are_long_and_in_band():
    for seed in range(40):
        (wheeze,) = draw_plan((seed,), DEVICES[0], ["Wheeze"]).wheezes
        assert wheeze.duration >= 0.25
        assert 100 <= wheeze.frequency <= 1000
        assert 1 <= wheeze.harmonics <= 3
        assert wheeze.harmonics * (wheeze.frequency + abs(wheeze.glide)) < DEVICES[0].rate / 2


def test_breath_is_louder_in_inspiration_and_in_its_band():
    plan = draw_plan((5,), DEVICES[3], ["Normal"] * 5)
    clean, _ = render(plan)
    rate = plan.device.rate
    for breath in plan.breaths:
        inspired = breath.start + breath.inspiration
        inspiration = clean[int(breath.start * rate) : int(inspired * rate)]
        expiration = clean[int(inspired * rate) : int((breath.start + breath.duration) * rate)]
        assert np.std(inspiration) > 2 * np.std(expiration)
    power = np.abs(np.fft.rfft(clean)) ** 2
    frequencies = np.fft.rfftfreq(len(clean), 1 / rate)
    assert np.sum(power[(frequencies > 80) & (frequencies < 1500)]) > 0.9 * np.sum(power)


def features(row) -> list[float]:
    """Hand-made: how peaked the spectrum of 120 to 900 Hz is over time, how spiky the signal is."""
    samples, rate = sf.read(io.BytesIO(row["audio"]["bytes"]))
    size = rate // 10
    frames = samples[: len(samples) // size * size].reshape(-1, size) * np.hanning(size)
    spectrum = np.abs(np.fft.rfft(frames)) ** 2
    band = spectrum[:, 12:90]
    tonality = np.sort(np.log(band.max(1) / np.median(band, 1)))
    differences = np.diff(samples)
    short = np.sqrt(np.convolve(differences**2, np.ones(rate // 200), "same"))
    blocks = short[: len(short) // size * size].reshape(-1, size)
    spikes = np.sort(np.log(blocks.max(1) / np.median(blocks, 1)))
    return [*tonality[[-1, -3, -5]], *spikes[[-1, -3, -5]]]


def test_classes_can_be_learnt_across_patients(default):
    x = {split: np.array([features(row) for row in rows]) for split, rows in default.items()}
    y = {split: np.array(rows["label"]) for split, rows in default.items()}
    model = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=1000))
    predicted = model.fit(x["train"], y["train"]).predict(x["test"])
    assert balanced_accuracy_score(y["test"], predicted) > 0.5  # chance is 0.25


def test_data_dir_and_impossible_sizes_are_refused(tmp_path):
    with pytest.raises(ValueError, match="the simulated dataset reads no files: leave data_dir"):
        load("simulated", tmp_path)
    with pytest.raises(ValueError, match="every class is in each split only from 1 patient and 2 recordings on"):
        load("simulated", recordings_per_patient=1)
    with pytest.raises(ValueError, match="the seed must not be negative"):
        load("simulated", seed=-1)


def test_every_class_in_the_smallest_dataset():
    for seed in range(5):
        for recordings in read(seed, {"train": 1, "test": 1}, 2).values():
            assert {cycle.label for r in recordings for cycle in r.cycles} == set(LABELS)

"""From recording to features: equal to the published code on every real ICBHI cycle at hand."""

import io
import logging

import numpy as np
import pytest
import soundfile
import torch
from datasets import Audio, Dataset, Features, Value, concatenate_datasets

import hf_datasets
from modeling_qlung import QLungFeatureExtractor
from modeling_qlung.training import as_published
from modeling_qlung.training.as_published import cut_recordings
from modeling_qlung.training.data import decode_cycles

from .reference import FIXTURES, digest

RATE = 16000


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """A clip is small: two threads wait for each other longer than they work, on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def prepared(real_icbhi, tmp_path_factory) -> dict[str, Dataset]:
    """All 533 cycles of the recordings at hand, as published and as by default."""
    logging.getLogger("hf_datasets").setLevel(logging.ERROR)  # it would count what is not at hand
    options = {"allow_missing_audio": True, "cache_dir": tmp_path_factory.mktemp("cache")}
    recordings = hf_datasets.load("icbhi", real_icbhi, config="recordings", **options)
    cycles = hf_datasets.load("icbhi", real_icbhi, **options)
    return {
        "published": concatenate_datasets([decode_cycles(cut_recordings(r, RATE), RATE) for r in recordings.values()]),
        "default": concatenate_datasets([decode_cycles(c, RATE) for c in cycles.values()]),
    }


@pytest.fixture(scope="module")
def expected() -> dict[str, np.ndarray]:
    with np.load(FIXTURES / "icbhi_features.npz") as values:
        return dict(values)


def features_of(waveform: np.ndarray) -> np.ndarray:
    """The features (798, 128) of a waveform."""
    return QLungFeatureExtractor()(waveform, sampling_rate=RATE, return_tensors="np").input_values[0]


@pytest.fixture(scope="module")
def published(prepared) -> dict[tuple[str, int], tuple[int, np.ndarray]]:
    """Label and features of each cycle, as published."""
    return {
        (row["recording_id"], row["cycle_index"]): (row["label"], features_of(row["waveform"]))
        for row in prepared["published"]
    }


def test_every_cycle_has_the_features_of_the_published_code(published, expected):
    names = expected["recordings"][expected["recording"]]
    keys = list(zip(names.tolist(), expected["cycle_index"].tolist(), strict=True))
    assert published.keys() == set(keys)
    assert len(keys) == 533
    differences, drifts = [], []
    for number, key in enumerate(keys):
        label, features = published[key]
        assert label == expected["label"][number]
        values, projections = digest(features, *key)
        differences.append(np.abs(values - expected["values"][number]).max())
        drifts.append(np.abs(projections - expected["projections"][number]).max())
    print(
        f"\n533 cycles, as published: largest difference at 64 places {max(differences):.1e}, "
        f"on 16 projections {max(drifts):.1e}"
    )
    assert max(differences) < 1e-3
    assert max(drifts) < 1e-4
    for number, features in zip(expected["whole"], expected["whole_features"], strict=True):
        difference = np.abs(published[keys[number]][1] - features / 4096).max()
        print(f"{keys[number][0]}, cycle {keys[number][1]}, whole: {difference:.1e} (kept in steps of 2.4e-4)")
        assert difference < 1e-3


def test_a_change_of_one_sample_or_of_one_frame_would_show(prepared, expected):
    """The digest is small, and must still fail where the preparation drifts."""
    row = prepared["published"][0]
    key = row["recording_id"], row["cycle_index"]
    features = features_of(row["waveform"])
    values, projections = digest(features, *key)
    later = digest(features_of(row["waveform"][1:]), *key)
    assert np.abs(later[0] - values).max() > 1e-3
    assert np.abs(later[1] - projections).max() > 1e-4
    features[400] += 0.01
    assert np.abs(digest(features, *key)[1] - projections).max() > 1e-4


def test_the_defaults_difference_from_the_published_features_is_bounded(prepared, published):
    """Cut first, soxr, no fade on the recording: small on average, large in single values near silence."""
    means, largest = [], []
    for row in prepared["default"]:
        label, features = published[row["recording_id"], row["cycle_index"]]
        assert row["label"] == label
        difference = np.abs(features - features_of(row["waveform"]))
        means.append(difference.mean())
        largest.append(difference.max())
    print(
        f"\ndefault against published, {len(means)} cycles: mean difference of a cycle, median {np.median(means):.4f}, "
        f"maximum {max(means):.4f}; largest difference of a cycle, median {np.median(largest):.2f}, "
        f"maximum {max(largest):.2f}"
    )
    assert len(means) == len(published)
    assert 1e-3 < np.median(means) < 0.02
    assert max(means) < 0.12
    assert max(largest) < 2.5


def test_cut_recordings_stand_for_cycles(tmp_path):
    """Same rows, columns and order as `cycles`, for what follows; only the sound is prepared otherwise."""
    options = {"train_patients": 1, "test_patients": 1, "recordings_per_patient": 2, "cache_dir": tmp_path}
    recordings = hf_datasets.load("simulated", config="recordings", split="train", **options)
    cycles = hf_datasets.load("simulated", split="train", **options)
    cut = cut_recordings(recordings, RATE)
    for name in set(cycles.column_names) - {"audio"}:
        assert cut[name][:] == cycles[name][:], name
        assert cut.features[name] == cycles.features[name], name
    published, default = decode_cycles(cut, RATE), decode_cycles(cycles, RATE)
    assert published.features == default.features
    for ours, theirs in zip(published, default, strict=True):
        assert abs(len(ours["waveform"]) - len(theirs["waveform"])) <= 2
        middle = slice(2000, 8000)  # free of the recording's fade; up to one sample of the file's rate apart
        assert np.corrcoef(ours["waveform"][middle], theirs["waveform"][middle])[0, 1] > 0.8


def test_recordings_are_cut_again_after_a_change_of_the_code(tmp_path, monkeypatch):
    options = {"train_patients": 1, "test_patients": 1, "recordings_per_patient": 2, "cache_dir": tmp_path}
    recordings = hf_datasets.load("simulated", config="recordings", split="train", **options)
    first = cut_recordings(recordings, RATE)._fingerprint
    assert cut_recordings(recordings, RATE)._fingerprint == first
    assert cut_recordings(recordings, 8000)._fingerprint != first
    monkeypatch.setattr(as_published.inspect, "getsource", lambda part: f"another {part}")
    assert cut_recordings(recordings, RATE)._fingerprint != first


@pytest.fixture
def two_recordings(tmp_path) -> list[dict]:
    options = {"train_patients": 1, "test_patients": 1, "recordings_per_patient": 2, "cache_dir": tmp_path}
    recordings = hf_datasets.load("simulated", config="recordings", split="train", **options)
    rows = recordings.cast_column("audio", Audio(decode=False)).to_list()
    return [{**row, "features": recordings.features} for row in rows]


def as_dataset(rows: list[dict]) -> Dataset:
    """Rows of `two_recordings`, changed, as a dataset again."""
    features = rows[0]["features"]
    plain = Features({**features, "audio": {"bytes": Value("binary"), "path": Value("string")}})
    return Dataset.from_list([{name: row[name] for name in features} for row in rows], features=plain).cast(features)


def test_a_recording_fades_over_a_sixteenth_of_a_second_at_both_ends_and_its_cycles_inside_do_not(two_recordings):
    file = io.BytesIO()
    soundfile.write(file, np.full(4 * RATE, 0.5), RATE, format="WAV", subtype="PCM_16")
    whole = {**two_recordings[0]["cycles"][0], "start": 0.0, "end": 1000.0}
    row = {**two_recordings[0], "audio": {"bytes": file.getvalue(), "path": None}}
    row["cycles"] = [whole, {**whole, "start": 1.0, "end": 2.0001}]
    all_of_it, inside = (r["waveform"] for r in decode_cycles(cut_recordings(as_dataset([row]), RATE), RATE))
    ramp = np.linspace(0, 0.5, RATE // 16)
    np.testing.assert_allclose(all_of_it, [*ramp, *np.full(4 * RATE - 2 * len(ramp), 0.5), *ramp[::-1]], atol=1e-6)
    assert np.array_equal(inside, np.full(int(2.0001 * RATE) - RATE, 0.5, np.float32))


def test_recordings_without_cycles_have_no_rows(two_recordings):
    two_recordings[0]["cycles"] = []
    cut = cut_recordings(as_dataset(two_recordings), RATE)
    assert set(cut["recording_id"][:]) == {two_recordings[1]["recording_id"]}


def test_a_cycle_outside_its_recording_is_named(two_recordings):
    cycle = two_recordings[0]["cycles"][0]
    two_recordings[0]["cycles"] = [{**cycle, "start": 1000.0, "end": 1001.0}]
    name = two_recordings[0]["recording_id"]
    with pytest.raises(ValueError, match=rf"{name}: cycle 0, from 1000.0 to 1001.0 s, holds none of the recording's"):
        cut_recordings(as_dataset(two_recordings), RATE)

import io

import numpy as np
import pytest
import soundfile
import soxr
import torch
from scipy.stats import norm

import hf_datasets
from modeling_qlung import QLungFeatureExtractor
from modeling_qlung.evaluation.tasks import TASKS
from modeling_qlung.quality_qlung import entropy_and_rms
from modeling_qlung.training import data
from modeling_qlung.training.data import (
    CycleCollator,
    add_degraded_copies,
    control_quality,
    cut_windows,
    decode_cycles,
    fit_normalization,
    fit_quality,
    row_id,
    score_quality,
)


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


def test_degraded_copies_are_of_other_names_and_worse_and_the_rest_stays(simulated):
    train = decode_cycles(simulated["train"], 16000)
    more = add_degraded_copies(train, 0.5, 16000, seed=1)
    assert len(more) == 30
    assert [row_id(row) for row in more][:20] == [row_id(row) for row in train]
    assert len({row_id(row) for row in more}) == 30
    originals = {row_id(row): row for row in train}
    kinds = set()
    for number in range(20, 30):
        copy = more[number]
        name, kind = copy["recording_id"].split("+")
        kinds.add(kind)
        original = originals[f"{name}:{copy['cycle_index']}"]
        assert (copy["label"], copy["patient_id"]) == (original["label"], original["patient_id"])
        assert copy["waveform"].shape == original["waveform"].shape
        assert np.abs(copy["waveform"] - original["waveform"]).max() > 0
        assert (copy["entropy"], copy["rms"]) == pytest.approx(entropy_and_rms(copy["waveform"], 16000))
    assert len(kinds) > 1
    again = add_degraded_copies(train, 0.5, 16000, seed=1)
    np.testing.assert_array_equal(again[25]["waveform"], more[25]["waveform"])
    other = add_degraded_copies(train, 0.5, 16000, seed=2)
    assert [row_id(row) for row in other] != [row_id(row) for row in more]


def cycle(start, end, label):
    return {"start": start, "end": end, "label": label, "crackle": label in (1, 3), "wheeze": label in (2, 3)}


@pytest.mark.parametrize(
    ("cycles", "label"),
    [
        ([], 0),
        ([cycle(0.0, 4.0, 0)], 0),
        ([cycle(2.5, 2.7, 1)], 1),  # a short event, all of it
        ([cycle(1.0, 2.6, 1)], None),  # less than half of it
        ([cycle(3.0, 5.0, 2)], 2),  # exactly half
        ([cycle(1.0, 9.0, 3)], 3),  # all of the window
        ([cycle(2.0, 2.5, 1), cycle(3.0, 3.5, 2)], 3),
        ([cycle(2.0, 2.5, 1), cycle(3.8, 5.0, 2)], 1),
        ([cycle(3.9, 5.0, None)], None),  # without one of the four labels
        ([cycle(0.0, 2.0, 1), cycle(4.0, 6.0, 2)], 0),  # they only meet it
    ],
)
def test_a_window_between_2_and_4_s_is_labelled_by_what_it_shares(cycles, label):
    assert data._label_window(cycles, 2.0, 4.0) == label


def simulated_recordings(number, cache):
    options = {"train_patients": 1, "test_patients": 1, "recordings_per_patient": number, "cache_dir": cache}
    return hf_datasets.load("simulated", config="recordings", **options)["train"]


def test_windows_are_parts_of_annotated_recordings_half_a_window_apart(tmp_path):
    recordings = simulated_recordings(4, tmp_path)
    windows = cut_windows(recordings, 16000, 2.0)
    raw = recordings.data.column("audio").to_pylist()
    covered = 0
    for index, row in enumerate(recordings.remove_columns("audio")):
        samples, rate = soundfile.read(io.BytesIO(raw[index]["bytes"]), dtype="float32")
        whole = samples if rate == 16000 else soxr.resample(samples, rate, 16000)
        for window in windows:
            name, _, start = window["recording_id"].partition("@")
            if name == row["recording_id"]:
                first = int(float(start) * 16000)
                assert first == 16000 * window["cycle_index"]
                np.testing.assert_array_equal(window["waveform"], whole[first : first + 32000])
                assert window["label"] == data._label_window(row["cycles"], first / 16000, first / 16000 + 2.0)
                covered += 1
    assert covered == len(windows) == len({row_id(window) for window in windows}) > 40
    entropy, rms = entropy_and_rms(windows[0]["waveform"], 16000)
    assert (windows[0]["entropy"], windows[0]["rms"]) == pytest.approx((entropy, rms))


def test_windows_are_of_recordings_brought_to_one_level(tmp_path):
    recordings = simulated_recordings(2, tmp_path)
    levelled, own = cut_windows(recordings, 16000, 2.0, level=0.05), cut_windows(recordings, 16000, 2.0)
    gains = {}
    for row in recordings.data.to_pylist():
        samples, _ = soundfile.read(io.BytesIO(row["audio"]["bytes"]))
        gains[row["recording_id"]] = 0.05 / samples.std()
    assert len(levelled) == len(own) > 0
    for brought, window in zip(levelled, own, strict=True):
        gain = gains[window["recording_id"].partition("@")[0]]
        np.testing.assert_allclose(brought["waveform"], gain * window["waveform"], rtol=1e-4, atol=1e-7)
        assert (brought["entropy"], brought["rms"]) == (window["entropy"], window["rms"])


def test_nobody_listened_to_poor_recordings_for_events(real_sprsound, tmp_path):
    recordings = hf_datasets.load("sprsound", real_sprsound, "recordings", "test_intra", cache_dir=tmp_path)
    labels = np.array(recordings["record_label"][:])
    poor = np.flatnonzero(labels == recordings.features["record_label"].str2int("Poor Quality"))
    assert len(poor) == 2
    assert len(cut_windows(recordings.select(poor), 16000, 2.0)) == 0
    short = cut_windows(recordings.select(np.flatnonzero(labels == 0)[:3]), 16000, 60.0)
    assert [row["cycle_index"] for row in short] == [0, 0, 0]  # each is shorter than a window


def test_controls_of_quality_reach_the_training_cycles_alone(simulated):
    extractor = QLungFeatureExtractor(duration=1.0)
    train, test = (decode_cycles(simulated[split], 16000) for split in ("train", "test"))
    fit_quality(extractor, train, "percentile")
    measured = score_quality(extractor, train)
    rows = [train[index] for index in range(len(train))]
    assert CycleCollator(extractor)(rows)["quality"].tolist() == pytest.approx(measured)
    assert measured.std() > 0.05

    constant = control_quality(train, measured, "constant", seed=0)
    shown = CycleCollator(extractor, quality=constant)(rows)["quality"].numpy()
    np.testing.assert_allclose(shown, measured.mean(), rtol=1e-6)

    shuffled = control_quality(train, measured, "shuffled", seed=0)
    shown = CycleCollator(extractor, quality=shuffled)(rows)["quality"].numpy()
    np.testing.assert_allclose(np.sort(shown), np.sort(measured), rtol=1e-6)
    assert np.abs(shown - measured).max() > 0.05
    assert control_quality(train, measured, "shuffled", seed=0) == shuffled
    assert control_quality(train, measured, "shuffled", seed=1) != shuffled

    others = [test[index] for index in range(3)]
    assert not {row_id(row) for row in others} & shuffled.keys()
    assert CycleCollator(extractor, quality=shuffled)(others)["quality"].tolist() == pytest.approx(
        score_quality(extractor, test)[:3]
    )


def test_the_learned_quality_is_computed_once_until_its_parameters_change(simulated, tmp_path, monkeypatch):
    extractor = QLungFeatureExtractor(duration=1.0, quality_score="learned")
    train, computed, of_one = decode_cycles(simulated["train"], 16000), [], QLungFeatureExtractor.quality
    monkeypatch.setattr(QLungFeatureExtractor, "quality", lambda *of: computed.append(of_one(*of)) or computed[-1])
    measured = score_quality(extractor, train)
    assert measured.tolist() == computed
    assert len(computed) == 20
    extractor.mean, extractor.std = 1.0, 2.0
    extractor.save_pretrained(tmp_path)
    assert score_quality(extractor, train).tolist() == computed
    assert len(computed) == 20
    output = {**extractor.quality_parameters["output"], "bias": 0.0}
    extractor.quality_parameters = {**extractor.quality_parameters, "output": output}
    assert score_quality(extractor, train).tolist() == computed[20:] != computed[:20]


def test_devices_are_indices_and_an_unknown_one_is_none_of_them(simulated):
    decoded = decode_cycles(simulated["train"], 16000)
    names = sorted(set(decoded["device"][:]))
    rows = [{**decoded[0], "device": name} for name in (*names, "another")]
    batch = CycleCollator(QLungFeatureExtractor(duration=1.0), names)(rows)
    assert batch["device"].tolist() == [*range(len(names)), -1]


def test_a_task_gives_each_row_its_label(simulated):
    events = simulated["train"]
    kinds = events.features["event_type"].names
    named = [None if kind is None else kinds[kind] for kind in events["event_type"][:]]
    for task in (TASKS["1-1"], TASKS["1-2"]):
        labels = decode_cycles(events, 16000, task)["label"][:]
        assert labels == [None if name is None else task.index(name) for name in named]
    binary = decode_cycles(events, 16000, TASKS["two-output"])["label"][:]
    assert binary == [int(label > 0) for label in events["label"][:]]
    with pytest.raises(ValueError, match="the task 2-1 needs the column 'record_label'"):
        decode_cycles(events, 16000, TASKS["2-1"])


def test_recordings_are_rows_of_the_record_tasks(real_sprsound, tmp_path):
    recordings = hf_datasets.load("sprsound", real_sprsound, "recordings", split="test_intra", cache_dir=tmp_path)
    few = recordings.select(range(0, len(recordings), 20))
    for name, poor in (("2-1", 2), ("2-2", 4)):
        decoded = decode_cycles(few, 16000, TASKS[name])
        names = [few.features["record_label"].names[label] for label in few["record_label"][:]]
        assert decoded["label"][:] == [TASKS[name].index(label) for label in names]
        assert TASKS[name].index("Poor Quality") == poor
    assert [row_id(row) for row in decoded] == few["recording_id"][:]
    assert all(len(row["waveform"]) > 16000 * 0.2 for row in decoded)


def test_rows_without_a_label_are_marked_for_the_loss_to_leave_out(simulated):
    decoded = decode_cycles(simulated["train"], 16000)
    rows = [{**decoded[0], "label": None}, decoded[1]]
    labels = CycleCollator(QLungFeatureExtractor(duration=1.0))(rows)["labels"]
    assert labels.tolist() == [-100, decoded[1]["label"]]
    assert torch.nn.functional.cross_entropy(torch.zeros(2, 4), labels).item() == pytest.approx(np.log(4))

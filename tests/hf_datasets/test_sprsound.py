import io
import json
import logging
import shutil
import wave
from collections import Counter

import numpy as np
import pytest
import soundfile as sf
from datasets import Audio, ClassLabel

from hf_datasets import load, sprsound
from hf_datasets.labels import EVENT_TYPES, LABELS, RECORD_LABELS


def with_bytes(dataset):
    return dataset.cast_column("audio", Audio(decode=False))


def test_columns_and_values(small_sprsound, tmp_path):
    data = with_bytes(load("sprsound", small_sprsound, cache_dir=tmp_path / "cache"))
    assert {split: len(rows) for split, rows in data.items()} == {"train": 6, "test_intra": 1, "test_inter": 1}
    features = data["train"].features
    assert features["event_type"] == ClassLabel(names=list(EVENT_TYPES))
    assert features["record_label"] == ClassLabel(names=["Normal", "CAS", "DAS", "CAS & DAS", "Poor Quality"])
    row = data["train"][1]  # its times are numbers in the file, its neighbours' are text
    assert row.pop("audio")["path"] == "401_15.3_0_p1_981_1.wav"
    assert row == {
        "label": 2,
        "crackle": False,
        "wheeze": True,
        "start": 0.4,
        "end": 0.7,
        "recording_id": "401_15.3_0_p1_981",
        "patient_id": "401",
        "location": "p1",
        "device": "Yunting model II",
        "mode": None,
        "age": 15.3,
        "sex": "M",
        "bmi": None,
        "record_label": RECORD_LABELS.index("CAS & DAS"),
        "cycle_index": 1,
        "event_type": EVENT_TYPES.index("Wheeze"),
    }
    assert data["train"][3]["sex"] == "F"
    assert data["test_inter"][0]["record_label"] == 0  # from "recording_annotation"


def test_labels_follow_from_events(small_sprsound, tmp_path):
    train = load("sprsound", small_sprsound, split="train", cache_dir=tmp_path / "cache")
    names = [EVENT_TYPES[number] for number in train["event_type"]]
    assert names == ["Normal", "Wheeze", "Wheeze+Crackle", "Rhonchi", "Stridor", "Fine Crackle"]
    assert train["label"][:] == [0, 2, 3, None, None, 1]
    assert train["crackle"][:] == [False, False, True, None, None, True]
    assert train["wheeze"][:] == [False, True, True, None, None, False]


def test_continuous_as_wheeze_is_another_dataset_in_the_cache(small_sprsound, tmp_path):
    plain = load("sprsound", small_sprsound, split="train", cache_dir=tmp_path / "cache")
    folded = load("sprsound", small_sprsound, split="train", cache_dir=tmp_path / "cache", continuous_as_wheeze=True)
    assert folded["label"][:] == [0, 2, 3, 2, 2, 1]
    assert folded["event_type"][:] == plain["event_type"][:]
    again = load("sprsound", small_sprsound, split="train", cache_dir=tmp_path / "cache")
    assert again["label"][:] == plain["label"][:]


def test_headers_are_repaired_and_samples_kept(small_sprsound, tmp_path):
    for config in ("cycles", "recordings"):
        rows = with_bytes(load("sprsound", small_sprsound, config, "train", cache_dir=tmp_path / "cache"))
        for row in rows:
            original, rate = sf.read(
                small_sprsound / "BioCAS2022" / "train2022_wav" / f"{row['recording_id']}.wav", dtype="int16"
            )
            first, last = (row["start"], row["end"]) if config == "cycles" else (0, 1)
            content = row["audio"]["bytes"]
            assert content[32:34] == b"\2\0"  # block align
            with wave.open(io.BytesIO(content)) as file:
                actual = np.frombuffer(file.readframes(file.getnframes()), "<i2")
            np.testing.assert_array_equal(actual, original[int(first * rate) : int(last * rate)])


def test_poor_quality_is_a_recording_without_events(small_sprsound, tmp_path):
    rows = load("sprsound", small_sprsound, "recordings", "train", cache_dir=tmp_path / "cache").remove_columns("audio")
    by_label = {RECORD_LABELS[row["record_label"]]: row for row in rows}
    assert by_label["Poor Quality"]["cycles"] == []
    assert [event["event_type"] for event in by_label["CAS"]["cycles"]] == [1, 3, 5]
    assert [event["label"] for event in by_label["CAS"]["cycles"]] == [None, None, 1]


def test_split_of_poor_quality_alone_has_no_cycles(small_sprsound, tmp_path):
    for path in (small_sprsound / "BioCAS2022" / "train2022_wav").glob("*_p[14]_*.wav"):
        path.unlink()
    data = load("sprsound", small_sprsound, allow_missing_audio=True, cache_dir=tmp_path / "cache")
    assert {split: len(rows) for split, rows in data.items()} == {"test_intra": 1, "test_inter": 1}
    data = load("sprsound", small_sprsound, "recordings", None, True, tmp_path / "cache")
    assert {split: len(rows) for split, rows in data.items()} == {"train": 1, "test_intra": 1, "test_inter": 1}


def test_absent_part_is_an_absent_split(small_sprsound, tmp_path, caplog):
    shutil.rmtree(small_sprsound / "BioCAS2022" / "test2022_json" / "inter_test_json")
    with caplog.at_level(logging.WARNING):
        data = load("sprsound", small_sprsound, cache_dir=tmp_path / "cache")
    assert list(data) == ["train", "test_intra"]
    assert "holds no test2022_wav with test2022_json/inter_test_json: no split test_inter" in caplog.text
    with pytest.raises(ValueError, match="unknown split of sprsound 'test_inter': choose from all, test_intra, train"):
        load("sprsound", small_sprsound, split="test_inter", cache_dir=tmp_path / "cache")


def test_folder_without_any_part_says_what_to_download(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"train2022_json.*Download https://github.com/.* data_dir"):
        load("sprsound", tmp_path, cache_dir=tmp_path / "cache")


def test_missing_audio(small_sprsound, tmp_path, caplog):
    (small_sprsound / "BioCAS2022" / "train2022_wav" / "402_0.2_1_p4_982.wav").unlink()
    with pytest.raises(FileNotFoundError, match=r"^1 of 5 recordings lack .*: 402_0\.2_1_p4_982\."):
        load("sprsound", small_sprsound, cache_dir=tmp_path / "cache")
    with caplog.at_level(logging.WARNING):
        data = load("sprsound", small_sprsound, allow_missing_audio=True, cache_dir=tmp_path / "cache")
    assert len(data["train"]) == 3
    assert "train 3 cycles of 2 recordings (normal 1, crackle 0, wheeze 1, both 1)" in caplog.text


def test_folders_without_any_annotation(tmp_path):
    for folder in ("train2022_wav", "train2022_json"):
        (tmp_path / "BioCAS2022" / folder).mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="BioCAS2022 holds folders, and no annotated recording in them"):
        load("sprsound", tmp_path, allow_missing_audio=True, cache_dir=tmp_path / "cache")


def test_missing_annotation(small_sprsound, tmp_path, caplog):
    (small_sprsound / "BioCAS2022" / "train2022_json" / "402_0.2_1_p4_982.json").unlink()
    with pytest.raises(FileNotFoundError, match="has 2 of the 3 annotation files of train"):
        load("sprsound", small_sprsound, cache_dir=tmp_path / "cache")
    with caplog.at_level(logging.WARNING):
        data = load("sprsound", small_sprsound, allow_missing_audio=True, cache_dir=tmp_path / "cache")
    assert len(data["train"]) == 3
    assert "has 2 of the 3 annotation files of train" in caplog.text


@pytest.mark.parametrize(
    ("constant", "message"),
    [
        ("RECORDINGS", "train split .* recordings: found 3, expected 2"),
        ("EVENTS", "train split .* events: found 6, expected 2"),
        ("EVENTS_BY_TYPE", "train split .* Normal: found 1, expected 2; Rhonchi: found 1, expected 0"),
    ],
)
def test_wrong_counts_are_refused(small_sprsound, tmp_path, monkeypatch, constant, message):
    monkeypatch.setitem(
        getattr(sprsound, constant), "train", (2, 0, 1, 1, 0, 1, 1) if constant == "EVENTS_BY_TYPE" else 2
    )
    with pytest.raises(ValueError, match=message):
        load("sprsound", small_sprsound, cache_dir=tmp_path / "cache")


GOOD_EVENT = {"start": "0", "end": "500", "type": "Normal"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"event_annotation": []}, "not an SPRSound annotation"),
        ({"record_annotation": "Normal"}, "not an SPRSound annotation"),
        ([], "not an SPRSound annotation"),
        ({"record_annotation": "Bad", "event_annotation": []}, "unknown record label 'Bad'"),
        (
            {"record_annotation": "DAS", "event_annotation": [GOOD_EVENT, {**GOOD_EVENT, "type": "Cough"}]},
            "event 2.*Cough",
        ),
        ({"record_annotation": "DAS", "event_annotation": [{**GOOD_EVENT, "end": "late"}]}, "event 1.*late"),
        ({"record_annotation": "DAS", "event_annotation": [{**GOOD_EVENT, "start": 500}]}, "event 1.*starts at 0.5 s"),
        (
            {"record_annotation": "DAS", "event_annotation": [{"start": 1, "end": 2}]},
            "event 1.*not start, end and type",
        ),
    ],
)
def test_malformed_annotation_is_named(tmp_path, content, message):
    (tmp_path / "1_2_0_p1_3.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"1_2_0_p1_3\.json.*{message}"):
        sprsound.read_annotation(tmp_path / "1_2_0_p1_3.json")


@pytest.mark.parametrize("name", ["401_15.3_2_p1_981", "401_15.3_0_p5_981", "401_old_0_p1_981", "401_15.3_0_p1"])
def test_malformed_name_is_refused(small_sprsound, tmp_path, name):
    folder = small_sprsound / "BioCAS2022" / "train2022_json"
    (folder / "401_15.3_0_p1_981.json").rename(folder / f"{name}.json")
    with pytest.raises(ValueError, match=f"{name}.json is not named patient_age_gender"):
        load("sprsound", small_sprsound, cache_dir=tmp_path / "cache")


def test_download(small_sprsound, tmp_path, monkeypatch, serve):
    archive = tmp_path / "site" / f"SPRSound-{sprsound.COMMIT}"
    archive.parent.mkdir()
    shutil.copytree(small_sprsound, archive)
    shutil.make_archive(str(archive), "zip", archive.parent, archive.name)
    monkeypatch.setattr(sprsound, "URL", f"{serve(archive.parent)}/{archive.name}.zip")
    downloaded = load("sprsound", cache_dir=tmp_path / "cache")
    local = load("sprsound", small_sprsound, cache_dir=tmp_path / "other")
    assert list(downloaded) == list(local)
    for split in local:
        assert downloaded[split].data.table.equals(local[split].data.table)


def test_unreachable_site_says_what_to_do(tmp_path, monkeypatch, network):
    monkeypatch.setattr(sprsound, "URL", "http://127.0.0.1:9/SPRSound.zip")
    with pytest.raises(
        ConnectionError, match=r"Download http://127\.0\.0\.1:9/SPRSound\.zip by hand, unpack it.* data_dir"
    ):
        load("sprsound", cache_dir=tmp_path / "cache")


def test_real_counts_and_samples(real_sprsound, tmp_path):
    data = with_bytes(load("sprsound", real_sprsound, cache_dir=tmp_path))
    assert {split: len(rows) for split, rows in data.items()} == {"train": 6656, "test_intra": 1004}
    labels = Counter(data["train"]["label"])
    assert labels == {0: 5159, 1: 49 + 912, 2: 452, 3: 30, None: 39 + 15}
    assert [LABELS[label] for label in sorted(filter(None, labels))] == ["crackle", "wheeze", "both"]
    assert len(set(data["train"]["patient_id"])) <= 251
    for row in data["train"].select(range(0, 6656, 97)):
        path = real_sprsound / "BioCAS2022" / "train2022_wav" / f"{row['recording_id']}.wav"
        expected, rate = sf.read(path, dtype="int16")
        actual, _ = sf.read(io.BytesIO(row["audio"]["bytes"]), dtype="int16")
        np.testing.assert_array_equal(actual, expected[int(row["start"] * rate) : int(row["end"] * rate)])


def test_real_recordings(real_sprsound):
    splits = sprsound.read(str(real_sprsound), None)
    assert {split: len(recordings) for split, recordings in splits.items()} == {"train": 1949, "test_intra": 379}
    without_events = {split: [r for r in recordings if not r.cycles] for split, recordings in splits.items()}
    assert {split: len(recordings) for split, recordings in without_events.items()} == {"train": 177, "test_intra": 2}
    for split, recordings in splits.items():
        poor = [r for r in recordings if r.metadata["record_label"] == "Poor Quality"]
        assert poor == without_events[split]

import io
import logging
import shutil
import time
from collections import Counter

import numpy as np
import pytest
import soundfile as sf
from datasets import Audio, ClassLabel, Value, load_dataset

import hf_datasets.icbhi as icbhi
from hf_datasets import LABELS, load


def with_bytes(dataset):
    return dataset.cast_column("audio", Audio(decode=False))


def labels_of(dataset) -> dict[str, int]:
    counts = Counter(dataset["label"])
    return {name: counts[number] for number, name in enumerate(LABELS)}


def test_columns_and_values(small_icbhi, tmp_path):
    data = with_bytes(load("icbhi", small_icbhi, cache_dir=tmp_path / "cache"))
    assert {split: len(rows) for split, rows in data.items()} == {"train": 4, "test": 2}
    features = data["train"].features
    assert features["label"] == ClassLabel(names=["normal", "crackle", "wheeze", "both"])
    assert features["fold"] == Value("int8")
    first = data["test"][0]
    assert first["audio"]["path"] == "101_1b1_Al_sc_Meditron_0.wav"
    assert first["bmi"] == pytest.approx(19 / 0.99**2)
    assert {name: value for name, value in first.items() if name not in ("audio", "bmi")} == {
        "label": 0,
        "crackle": False,
        "wheeze": False,
        "start": 0.036,
        "end": 0.579,
        "recording_id": "101_1b1_Al_sc_Meditron",
        "patient_id": "101",
        "location": "Al",
        "device": "Meditron",
        "mode": "sc",
        "age": 3.0,
        "sex": "F",
        "diagnosis": "URTI",
        "fold": 1,
        "cycle_index": 0,
    }
    assert labels_of(data["train"]) == {"normal": 1, "crackle": 1, "wheeze": 1, "both": 1}
    by_patient = {row["patient_id"]: row for row in data["train"]}
    assert [by_patient["102"][name] for name in ("age", "sex", "bmi")] == [0.75, "M", None]  # weight without height
    assert [by_patient["103"][name] for name in ("age", "sex", "bmi", "mode")] == [70.0, "F", 33.5, "mc"]
    assert [by_patient["226"][name] for name in ("age", "sex", "bmi")] == [None, None, None]


def test_cycles_are_bit_exact(small_icbhi, tmp_path):
    data = with_bytes(load("icbhi", small_icbhi, cache_dir=tmp_path / "cache"))
    for row in [*data["train"], *data["test"]]:
        assert_same_samples(row, small_icbhi / "ICBHI_final_database" / f"{row['recording_id']}.wav")


def assert_same_samples(row, path):
    rate = sf.info(path).samplerate
    whole, _ = sf.read(path, dtype="int32")
    expected = whole[int(row["start"] * rate) : int(row["end"] * rate)]
    actual, actual_rate = sf.read(io.BytesIO(row["audio"]["bytes"]), dtype="int32")
    assert actual_rate == rate
    assert sf.info(io.BytesIO(row["audio"]["bytes"])).subtype == sf.info(path).subtype
    np.testing.assert_array_equal(actual, expected)


def test_recordings_config(small_icbhi, tmp_path):
    data = with_bytes(load("icbhi", small_icbhi, config="recordings", cache_dir=tmp_path / "cache"))
    assert {split: len(rows) for split, rows in data.items()} == {"train": 3, "test": 1}
    row = data["test"][0]
    assert row["cycles"] == [
        {"label": 0, "crackle": False, "wheeze": False, "start": 0.036, "end": 0.579, "event_type": None},
        {"label": 1, "crackle": True, "wheeze": False, "start": 0.579, "end": 1.2, "event_type": None},
    ]
    path = small_icbhi / "ICBHI_final_database" / "101_1b1_Al_sc_Meditron.wav"
    actual, _ = sf.read(io.BytesIO(row["audio"]["bytes"]), dtype="int32")
    np.testing.assert_array_equal(actual, sf.read(path, dtype="int32")[0])
    assert row["audio"]["path"] == "101_1b1_Al_sc_Meditron.wav"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("101_1b1_Al_sc_AKGC417L", "101_1b1_Al_sc_Meditron"),
        ("105_1b1_Tc_sc_LittC2SE", "105_1b1_Tc_sc_Meditron"),
        ("226_1b1_Pl_sc_Meditron", "226_1b1_Pl_sc_LittC2SE"),
        ("226_1b1_Pl_sc_LittC2SE", "226_1b1_Pl_sc_LittC2SE"),
        ("226_1b1_Al_sc_LittC2SE", "226_1b1_Al_sc_Meditron"),
        ("103_2b2_Ar_mc_LittC2SE", "103_2b2_Ar_mc_LittC2SE"),
        ("130_2b4_Pl_mc_AKGC417L", "130_2b4_Pl_mc_AKGC417L"),
        ("104_1b1_Al_sc_Litt3200", "104_1b1_Al_sc_Litt3200"),
    ],
)
def test_canonical_name(name, expected):
    assert icbhi.canonical_name(name) == expected


def test_older_names_on_disk_are_the_same_recordings(small_icbhi, tmp_path):
    before = load("icbhi", small_icbhi, cache_dir=tmp_path / "cache")
    database = small_icbhi / "ICBHI_final_database"
    for suffix in ("wav", "txt"):
        (database / f"101_1b1_Al_sc_Meditron.{suffix}").rename(database / f"101_1b1_Al_sc_AKGC417L.{suffix}")
        (database / f"226_1b1_Pl_sc_LittC2SE.{suffix}").rename(database / f"226_1b1_Pl_sc_Meditron.{suffix}")
    after = load("icbhi", small_icbhi, cache_dir=tmp_path / "cache")
    for split in before:
        assert before[split].data.table.equals(after[split].data.table)
    assert set(after["test"]["device"]) == {"Meditron"}


def test_one_recording_under_two_names_is_refused(small_icbhi, tmp_path):
    database = small_icbhi / "ICBHI_final_database"
    shutil.copy(database / "101_1b1_Al_sc_Meditron.wav", database / "101_1b1_Al_sc_LittC2SE.wav")
    with pytest.raises(ValueError, match=r"LittC2SE\.wav and 101_1b1_Al_sc_Meditron\.wav are one recording"):
        load("icbhi", small_icbhi, cache_dir=tmp_path / "cache")


def test_missing_audio_is_an_error_that_counts(small_icbhi, tmp_path):
    database = small_icbhi / "ICBHI_final_database"
    (database / "102_1b1_Ar_sc_Litt3200.wav").unlink()
    (database / "103_2b2_Ar_mc_LittC2SE.txt").unlink()
    with pytest.raises(FileNotFoundError) as error:
        load("icbhi", small_icbhi, cache_dir=tmp_path / "cache")
    assert "2 of 4 recordings lack" in str(error.value)
    assert "102_1b1_Ar_sc_Litt3200, 103_2b2_Ar_mc_LittC2SE" in str(error.value)
    assert "allow_missing_audio=True" in str(error.value)


def test_missing_audio_allowed_is_logged(small_icbhi, tmp_path, caplog):
    (small_icbhi / "ICBHI_final_database" / "103_2b2_Ar_mc_LittC2SE.wav").unlink()
    with caplog.at_level(logging.WARNING):
        data = load("icbhi", small_icbhi, allow_missing_audio=True, cache_dir=tmp_path / "cache")
    assert len(data["train"]) == 2
    assert "1 of 4 recordings lack their audio" in caplog.text
    assert "train 2 cycles of 2 recordings (normal 0, crackle 1, wheeze 1, both 0)" in caplog.text
    assert "test 2 cycles of 1 recordings (normal 1, crackle 1, wheeze 0, both 0)" in caplog.text
    assert data["train"].info.description == caplog.messages[0]


def test_a_split_without_audio_is_absent(small_icbhi, tmp_path):
    (small_icbhi / "ICBHI_final_database" / "101_1b1_Al_sc_Meditron.wav").unlink()
    data = load("icbhi", small_icbhi, allow_missing_audio=True, cache_dir=tmp_path / "cache")
    assert list(data) == ["train"]


def test_no_audio_at_all_is_an_error_even_when_allowed(small_icbhi, tmp_path):
    for path in (small_icbhi / "ICBHI_final_database").glob("*.wav"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match=r"4 of 4 recordings lack .* nothing to work on"):
        load("icbhi", small_icbhi, allow_missing_audio=True, cache_dir=tmp_path / "cache")


def test_added_audio_is_seen_despite_the_cache(small_icbhi, tmp_path):
    audio = small_icbhi / "ICBHI_final_database" / "103_2b2_Ar_mc_LittC2SE.wav"
    audio.rename(tmp_path / "aside.wav")
    assert len(load("icbhi", small_icbhi, "cycles", "train", True, tmp_path / "cache")) == 2
    (tmp_path / "aside.wav").rename(audio)
    assert len(load("icbhi", small_icbhi, "cycles", "train", True, tmp_path / "cache")) == 4


def test_changed_audio_of_the_same_size_is_seen(small_icbhi, tmp_path):
    audio = small_icbhi / "ICBHI_final_database" / "101_1b1_Al_sc_Meditron.wav"
    before = with_bytes(load("icbhi", small_icbhi, cache_dir=tmp_path / "cache"))["test"][0]["audio"]["bytes"]
    audio.write_bytes(audio.read_bytes()[:44] + bytes(audio.stat().st_size - 44))
    after = with_bytes(load("icbhi", small_icbhi, cache_dir=tmp_path / "cache"))["test"][0]["audio"]["bytes"]
    assert len(after) == len(before)
    assert not any(after[44:])


def test_edited_annotation_is_seen(small_icbhi, tmp_path, monkeypatch):
    load("icbhi", small_icbhi, cache_dir=tmp_path / "cache")
    annotation = small_icbhi / "ICBHI_final_database" / "101_1b1_Al_sc_Meditron.txt"
    annotation.write_text(annotation.read_text().replace("1.2\t1\t0", "1.2\t1\t1"))
    monkeypatch.setitem(icbhi.CYCLES, "test", {"normal": 1, "crackle": 0, "wheeze": 0, "both": 1})
    assert load("icbhi", small_icbhi, split="test", cache_dir=tmp_path / "cache")["label"][:] == [0, 3]


def test_unchanged_data_is_not_built_again(small_icbhi, tmp_path):
    first = load("icbhi", small_icbhi, split="train", cache_dir=tmp_path / "cache").cache_files[0]["filename"]
    stamp = icbhi.Path(first).stat().st_mtime_ns
    second = load("icbhi", small_icbhi, split="train", cache_dir=tmp_path / "cache").cache_files[0]["filename"]
    assert (second, icbhi.Path(second).stat().st_mtime_ns) == (first, stamp)


def test_wrong_counts_are_refused(small_icbhi, tmp_path):
    annotation = small_icbhi / "ICBHI_final_database" / "102_1b1_Ar_sc_Litt3200.txt"
    annotation.write_text("0\t0.7\t1\t1\n")
    with pytest.raises(ValueError, match=r"train split .* wheeze: found 0, expected 1; both: found 2, expected 1"):
        load("icbhi", small_icbhi, cache_dir=tmp_path / "cache")


def test_short_split_file_is_refused(small_icbhi, tmp_path):
    (small_icbhi / "ICBHI_challenge_train_test.txt").write_text("101_1b1_Al_sc_Meditron\ttest\n")
    with pytest.raises(ValueError, match=r"official split .* train: found 0, expected 3"):
        load("icbhi", small_icbhi, cache_dir=tmp_path / "cache")


def test_cycle_beyond_the_audio_names_file_and_line(small_icbhi, tmp_path):
    annotation = small_icbhi / "ICBHI_final_database" / "102_1b1_Ar_sc_Litt3200.txt"
    annotation.write_text("1.3\t1.9\t0\t1\n")
    with pytest.raises(ValueError, match=r"102_1b1_Ar_sc_Litt3200\.txt, line 1: no sample between 1\.3 s and 1\.9 s"):
        load("icbhi", small_icbhi, cache_dir=tmp_path / "cache")


@pytest.mark.parametrize(
    "line", ["0.1\t0.5\t0", "0.1\t0.5\t0\t2", "0.1\tx\t0\t1", "0.5\t0.5\t0\t1", "-1\t0.5\t0\t1", "nan\t1\t0\t0"]
)
def test_malformed_annotation_names_file_and_line(small_icbhi, line):
    path = small_icbhi / "ICBHI_final_database" / "102_1b1_Ar_sc_Litt3200.txt"
    path.write_text(f"0\t0.1\t0\t0\n{line}\n")
    with pytest.raises(ValueError, match=r"102_1b1_Ar_sc_Litt3200\.txt, line 2: "):
        icbhi.read_annotation(path)


@pytest.mark.parametrize(
    ("reader", "line"),
    [
        (icbhi.read_split, "101_1b1_Al_sc_Meditron\tvalidation"),
        (icbhi.read_split, "101_1b1_Al_sc_Stethoscope\ttest"),
        (icbhi.read_demographics, "101 3 female NA 19 99"),
        (icbhi.read_demographics, "101 3 F NA 19"),
        (icbhi.read_diagnoses, "101"),
    ],
)
def test_malformed_metadata_names_file_and_line(tmp_path, reader, line):
    (tmp_path / "metadata.txt").write_text(f"\n{line}\n")
    with pytest.raises(ValueError, match=r"metadata\.txt, line 2: .*101"):
        reader(tmp_path / "metadata.txt")


def test_split_file_with_a_recording_twice_is_refused(tmp_path):
    (tmp_path / "split.txt").write_text("101_1b1_Al_sc_Meditron\ttest\n101_1b1_Al_sc_AKGC417L\ttrain\n")
    with pytest.raises(ValueError, match=r"line 2: 101_1b1_Al_sc_AKGC417L stands there twice"):
        icbhi.read_split(tmp_path / "split.txt")


def test_metadata_inside_the_database_folder_and_as_csv(small_icbhi, tmp_path, caplog):
    database = small_icbhi / "ICBHI_final_database"
    (small_icbhi / "ICBHI_challenge_train_test.txt").rename(database / "ICBHI_challenge_train_test.txt")
    (small_icbhi / "demographic_info.txt").unlink()
    (small_icbhi / "ICBHI_Challenge_diagnosis.txt").unlink()
    (database / "patient_diagnosis.csv").write_text("ID,CLASS\n101,URTI\n102,Healthy\n")
    with caplog.at_level(logging.WARNING):
        rows = load("icbhi", small_icbhi, split="test", cache_dir=tmp_path / "cache")
    assert [rows[name][:] for name in ("diagnosis", "age", "sex")] == [["URTI"] * 2, [None] * 2, [None] * 2]
    assert "demographic_info.txt: its columns will be null" in caplog.text


@pytest.mark.parametrize("gone", ["ICBHI_final_database", "ICBHI_challenge_train_test.txt"])
def test_incomplete_folder_says_what_to_download(small_icbhi, tmp_path, gone):
    (small_icbhi / gone).rename(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match=f"{gone}.*Download ICBHI_final_database.zip.*data_dir"):
        load("icbhi", small_icbhi, cache_dir=tmp_path / "cache")


def test_folds_are_five_disjoint_parts_of_126_patients():
    folds = [fold.split() for fold in icbhi.FOLDS]
    assert [len(fold) for fold in folds] == [26, 25, 25, 25, 25]
    assert sorted(patient for fold in folds for patient in fold) == [str(patient) for patient in range(101, 227)]


def test_rows_survive_parquet(small_icbhi, tmp_path):
    rows = load("icbhi", small_icbhi, split="train", cache_dir=tmp_path / "cache")
    rows.to_parquet(tmp_path / "train.parquet")
    path = str(tmp_path / "train.parquet")
    again = load_dataset("parquet", data_files=path, split="train", cache_dir=str(tmp_path / "parquet"))
    assert again.features == rows.features
    assert with_bytes(again)[:] == with_bytes(rows)[:]


def test_unreachable_site_says_what_to_do_at_once(tmp_path, monkeypatch, network):
    monkeypatch.setattr(icbhi, "URL", "http://127.0.0.1:9")  # the discard port: nobody listens
    started = time.monotonic()
    with pytest.raises(ConnectionError, match=r"by hand, unpack the zip, put the text files beside .* as data_dir"):
        load("icbhi", cache_dir=tmp_path / "cache")
    assert time.monotonic() - started < 10


def test_download(small_icbhi, tmp_path, monkeypatch, serve):
    site = tmp_path / "site"
    site.mkdir()
    shutil.make_archive(str(site / "ICBHI_final_database"), "zip", small_icbhi, "ICBHI_final_database")
    shutil.copy(small_icbhi / "ICBHI_challenge_train_test.txt", site)
    shutil.copy(small_icbhi / "ICBHI_Challenge_diagnosis.txt", site)
    shutil.copy(small_icbhi / "demographic_info.txt", site / "ICBHI_Challenge_demographic_information.txt")
    monkeypatch.setattr(icbhi, "URL", serve(site))
    downloaded = load("icbhi", cache_dir=tmp_path / "cache")
    local = load("icbhi", small_icbhi, cache_dir=tmp_path / "other")
    for split in local:
        assert downloaded[split].data.table.equals(local[split].data.table)

    shutil.rmtree(site)  # what is in the cache needs the site no more
    assert len(load("icbhi", split="train", cache_dir=tmp_path / "cache")) == 4


def test_download_that_is_no_database_is_refused(tmp_path, monkeypatch, serve):
    site = tmp_path / "site"
    site.mkdir()
    for name in ("ICBHI_final_database.zip", "ICBHI_challenge_train_test.txt"):
        (site / name).write_text("<html>under maintenance</html>")
    for name in ("ICBHI_Challenge_diagnosis.txt", "ICBHI_Challenge_demographic_information.txt"):
        (site / name).write_text("")
    monkeypatch.setattr(icbhi, "URL", serve(site))
    with pytest.raises(
        ValueError, match=r"ICBHI_final_database\.zip, kept as .*cache.*, holds no ICBHI_final_database"
    ):
        load("icbhi", cache_dir=tmp_path / "cache")


def test_real_counts_and_samples(real_icbhi, tmp_path):
    data = with_bytes(load("icbhi", real_icbhi, allow_missing_audio=True, cache_dir=tmp_path))
    assert labels_of(data["train"]) == {"normal": 227, "crackle": 133, "wheeze": 65, "both": 17}
    assert labels_of(data["test"]) == {"normal": 72, "crackle": 0, "wheeze": 14, "both": 5}
    assert (len(set(data["train"]["recording_id"])), len(set(data["test"]["recording_id"]))) == (43, 13)
    assert sum(name == "226_1b1_Pl_sc_LittC2SE" for name in data["train"]["recording_id"]) == 11
    for row in data["train"].select(range(0, 442, 8)):
        assert_same_samples(row, real_icbhi / "ICBHI_final_database" / f"{row['recording_id']}.wav")


def test_real_missing_audio_is_counted(real_icbhi, tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"^864 of 920 recordings lack their audio .*: 105_1b1_Tc_sc_Meditron, "
    ):
        load("icbhi", real_icbhi, cache_dir=tmp_path)


def test_real_annotations_have_the_published_counts(real_icbhi):
    splits = icbhi.read(str(real_icbhi), None)
    counts = {split: Counter(c.label for r in recordings for c in r.cycles) for split, recordings in splits.items()}
    assert sum(counts["train"].values()) == 4142
    assert sum(counts["test"].values()) == 2756
    assert counts == icbhi.CYCLES
    patients = {split: {r.patient_id for r in recordings} for split, recordings in splits.items()}
    assert patients["train"] & patients["test"] == {"156", "218"}
    everyone = [r.metadata for recordings in splits.values() for r in recordings]
    assert all(metadata["fold"] in range(5) and metadata["diagnosis"] for metadata in everyone)


def test_real_renamed_recordings_all_have_their_new_names(real_icbhi):
    renamed = (real_icbhi / "filename_differences.txt").read_text().replace("'", "").split()
    on_disk = {path.stem for path in (real_icbhi / "ICBHI_final_database").glob("*.txt")}
    assert len(renamed) == 91
    assert {icbhi.canonical_name(name) for name in renamed} <= on_disk
    assert {icbhi.canonical_name(name) for name in on_disk} == on_disk

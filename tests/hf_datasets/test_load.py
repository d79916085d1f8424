import sys
from pathlib import Path

import datasets
import pytest
from datasets import Audio, concatenate_datasets

from hf_datasets import LABELS, load
from hf_datasets.labels import EVENT_TYPES, event_flags, label_of

SMALL = {"train_patients": 1, "test_patients": 1, "recordings_per_patient": 2}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "icbi"}, "unknown dataset 'icbi': choose from icbhi, simulated, sprsound"),
        ({"name": "icbhi", "config": "events"}, "unknown config 'events': choose from cycles, recordings"),
        ({"name": "icbhi", "seed": 1}, "unknown option of icbhi 'seed': choose from none"),
        ({"name": "sprsound", "seed": 1}, "unknown option of sprsound 'seed': choose from continuous_as_wheeze"),
        (
            {"name": "simulated", "patients": 1},
            "unknown option .* recordings_per_patient, seed, test_patients, train_p",
        ),
        ({"name": "simulated", "split": "val"}, "unknown split of simulated 'val': choose from all, test, train"),
        ({"name": "simulated", "split": "train+val[:3]"}, "unknown split of simulated 'val'"),
    ],
)
def test_what_is_unknown_is_answered_with_what_is_known(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load(**arguments, cache_dir=tmp_path)


def test_split_expressions(tmp_path):
    assert load("simulated", split="train[:3]", cache_dir=tmp_path, **SMALL).num_rows == 3
    assert load("simulated", split="train+test", cache_dir=tmp_path, **SMALL).num_rows == 20


def test_relative_folders(small_icbhi, tmp_path, monkeypatch):
    monkeypatch.chdir(small_icbhi.parent)
    relative = load("icbhi", small_icbhi.name, split="train", cache_dir="cache")
    absolute = load("icbhi", small_icbhi, split="train", cache_dir=tmp_path / "cache")
    assert relative.cache_files == absolute.cache_files
    assert Path(relative.cache_files[0]["filename"]).is_relative_to(tmp_path / "cache" / "icbhi")


def test_torchcodec_is_not_needed(small_icbhi, tmp_path, monkeypatch):
    for name in ("torchcodec", "torchcodec.encoders", "torchcodec.decoders"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(datasets.config, "TORCHCODEC_AVAILABLE", False)
    for config in ("cycles", "recordings"):
        data = load("icbhi", small_icbhi, config, cache_dir=tmp_path / "cache")
        assert isinstance(data["train"].features["audio"], Audio)
        audio = data.cast_column("audio", Audio(decode=False))["train"][0]["audio"]
        assert audio["bytes"].startswith(b"RIFF")


def test_version_and_options_are_in_the_cache_key(small_icbhi, tmp_path, monkeypatch):
    from hf_datasets.builder import Icbhi

    folders = [str(small_icbhi), str(tmp_path / "cache")]
    builders = [
        Icbhi("cycles", *folders),
        Icbhi("recordings", *folders),
        Icbhi("cycles", *folders, allow_missing_audio=True),
    ]
    monkeypatch.setattr(Icbhi, "VERSION", datasets.Version("9.0.0"))
    builders.append(Icbhi("cycles", *folders))
    assert len({builder.cache_dir for builder in builders}) == 4


def test_builders_read_the_same_after_datasets_has_patched_their_module(small_icbhi, small_sprsound, tmp_path):
    """`datasets` swaps Path and open in builder modules on first use; neither order nor repetition may show."""
    first = load("icbhi", small_icbhi, cache_dir=tmp_path / "cache")
    load("sprsound", small_sprsound, cache_dir=tmp_path / "cache")
    again = load("icbhi", small_icbhi, cache_dir=tmp_path / "cache")
    assert again["train"].cache_files == first["train"].cache_files


@pytest.mark.parametrize("config", ["cycles", "recordings"])
def test_shared_columns_have_one_type_and_datasets_go_together(small_icbhi, small_sprsound, tmp_path, config):
    parts = [
        load("icbhi", small_icbhi, config, "train", cache_dir=tmp_path / "cache"),
        load("sprsound", small_sprsound, config, "train", cache_dir=tmp_path / "cache"),
        load("simulated", None, config, "train", cache_dir=tmp_path / "cache", **SMALL),
    ]
    shared = set.intersection(*(set(part.column_names) for part in parts))
    assert {"audio", "recording_id", "patient_id", "device", "mode", "age", "sex", "bmi", "location"} < shared
    for name in shared:
        assert parts[0].features[name] == parts[1].features[name] == parts[2].features[name]
    together = concatenate_datasets(parts)
    assert len(together) == sum(map(len, parts))
    assert together.cast_column("audio", Audio(decode=False))[len(parts[0])]["diagnosis"] is None


def test_errors_inside_the_build_come_out_unwrapped(small_icbhi, tmp_path):
    (small_icbhi / "ICBHI_final_database" / "101_1b1_Al_sc_Meditron.wav").write_bytes(b"not audio")
    with pytest.raises(ValueError, match=r"101_1b1_Al_sc_Meditron\.wav is not a WAV file"):
        load("icbhi", small_icbhi, cache_dir=tmp_path / "cache")
    with pytest.raises(ValueError, match="is not a WAV file"):  # and nothing half-made stays in the cache
        load("icbhi", small_icbhi, cache_dir=tmp_path / "cache")


def test_labels():
    assert LABELS == ("normal", "crackle", "wheeze", "both")
    assert [label_of(crackle, wheeze) for wheeze in (False, True) for crackle in (False, True)] == list(LABELS)
    assert label_of(None, True) is None
    flags = {kind: event_flags(kind) for kind in EVENT_TYPES}
    assert {kind for kind, flag in flags.items() if flag == (None, None)} == {"Rhonchi", "Stridor"}
    assert {kind for kind in EVENT_TYPES if event_flags(kind, continuous_as_wheeze=True) == (False, True)} == {
        "Rhonchi",
        "Stridor",
        "Wheeze",
    }
    with pytest.raises(ValueError, match="unknown event type 'Cough': it must be one of Normal"):
        event_flags("Cough")

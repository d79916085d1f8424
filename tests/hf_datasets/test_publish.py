"""What is published of a dataset opens again as the builder's own rows, and says nothing of this machine."""

import dataclasses
import hashlib
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import DatasetCard

from hf_datasets import BUILDERS, icbhi, load, publish, sprsound
from hf_datasets.builder import CONFIGS, Simulated
from hf_datasets.card import COLUMNS, SOURCES, incomplete
from tests.hub_stand_in import HubStandIn, header_errors, hub_stand_in, private_words

SMALL: dict[str, Any] = {"train_patients": 1, "test_patients": 1, "recordings_per_patient": 2}


@pytest.fixture
def small(small_icbhi: Path, small_sprsound: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path | None]:
    """The folder of each dataset, small; of the simulated one there is none."""
    monkeypatch.setitem(BUILDERS, "simulated", partial(Simulated, **SMALL))
    for name, module in (("icbhi", icbhi), ("sprsound", sprsound)):
        monkeypatch.setitem(SOURCES, name, dataclasses.replace(SOURCES[name], recordings=module.RECORDINGS))
    return {"icbhi": small_icbhi, "sprsound": small_sprsound, "simulated": None}


def rows_of(dataset: datasets.Dataset) -> list[dict]:
    return dataset.cast_column("audio", datasets.Audio(decode=False)).to_list()


@pytest.fixture
def without_torchcodec(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torchcodec", "torchcodec.encoders", "torchcodec.decoders"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(datasets.config, "TORCHCODEC_AVAILABLE", False)


@pytest.mark.usefixtures("without_torchcodec")
@pytest.mark.parametrize("name", ["icbhi", "sprsound", "simulated"])
def test_the_written_folder_opens_as_the_builders_rows(name, small, tmp_path):
    data_dir = small[name]
    publish.write_dataset(name, data_dir, tmp_path / "out")
    for config in CONFIGS:
        again = datasets.load_dataset(str(tmp_path / "out"), config, cache_dir=tmp_path / "again")
        builder = BUILDERS[name](config, None if data_dir is None else str(data_dir), str(tmp_path / "cache"))
        builder.download_and_prepare()
        expected = builder.as_dataset()
        assert list(again) == list(expected)
        for split in expected:
            assert again[split].features == expected[split].features
            assert rows_of(again[split]) == rows_of(expected[split])
    assert datasets.get_dataset_default_config_name(str(tmp_path / "out")) == "cycles"
    labels = datasets.load_dataset(str(tmp_path / "out"), cache_dir=tmp_path / "again")["train"].features["label"]
    assert labels.names == ["normal", "crackle", "wheeze", "both"]


@pytest.mark.usefixtures("small")
def test_shards_are_bounded_in_order_and_replace_earlier_ones(tmp_path, monkeypatch):
    whole = publish.write_dataset("simulated", None, tmp_path / "out")
    expected = [pq.read_table(path).to_pylist() for name, path in whole.items() if name.startswith("cycles/train")]
    assert [len(part) for part in expected] == [10]
    monkeypatch.setattr(publish, "ROW_GROUP_BYTES", 1)
    monkeypatch.setattr(publish, "SHARD_BYTES", 1)  # a recording each
    files = publish.write_dataset("simulated", None, tmp_path / "out")
    shards = [path for name, path in files.items() if name.startswith("cycles/train")]
    assert [path.name for path in shards] == [f"train-0000{index}-of-00002.parquet" for index in range(2)]
    assert [row for path in shards for row in pq.read_table(path).to_pylist()] == expected[0]
    assert {path.name for path in (tmp_path / "out" / "cycles").iterdir()} == {
        *(path.name for path in shards),
        "test-00000-of-00002.parquet",
        "test-00001-of-00002.parquet",
    }


def test_memory_holds_a_row_group_and_not_the_split(tmp_path, monkeypatch):
    monkeypatch.setattr(publish, "ROW_GROUP_BYTES", 4_000_000)
    monkeypatch.setattr(publish, "SHARD_BYTES", 40_000_000)
    seen = []
    before = pa.total_allocated_bytes()

    def tables():
        for index in range(120):
            seen.append(pa.total_allocated_bytes() - before)
            yield pa.table({"x": [hashlib.sha256(b"%d" % index).digest() * (1_000_000 // 32)]}, schema=schema)

    schema = pa.schema({"x": pa.binary()})
    paths, rows, size = publish.write_shards(tables(), schema, tmp_path, "train")
    assert (rows, len(paths)) == (120, 3)
    assert size == pytest.approx(120e6, rel=0.01)
    assert max(seen) < 20_000_000
    assert [pq.ParquetFile(path).metadata.num_row_groups for path in paths] == [10, 10, 10]


@pytest.mark.parametrize("name", ["icbhi", "sprsound", "simulated"])
def test_the_card(name, small, tmp_path):
    publish.write_dataset(name, small[name], tmp_path, repo_id="me/sounds")
    card = DatasetCard.load(tmp_path / "README.md")
    assert not header_errors(card.content, "dataset")
    assert card.data.task_categories == ["audio-classification"]
    assert card.data.size_categories == ["n<1K"]
    assert [info["config_name"] for info in card.data.dataset_info] == list(CONFIGS)
    assert (tmp_path / "cycles.png").read_bytes().startswith(b"\x89PNG")
    for part in ('load_dataset("me/sounds")', SOURCES[name].terms, *SOURCES[name].traps, SOURCES[name].citation):
        assert part in card.text
    for config in CONFIGS:
        for column in pq.read_schema(next((tmp_path / config).glob("train-*"))).names:
            assert f"| `{column}` | {COLUMNS[column]} |" in card.text
    expected = {
        "icbhi": [
            "| `train` | 3 | 3 | 4 | 1 | 1 | 1 | 1 |",
            "| `test` | 1 | 1 | 2 | 1 | 1 | 0 | 0 |",
            "none of `test`",
        ],
        "sprsound": ["| `train` | 2 | 3 | 6 | 1 | 1 | 1 | 1 | 2 |", "1 of `test_intra`, none of `test_inter`"],
        "simulated": ["| `train` | 1 | 2 | 10 | 5 | 2 | 2 | 1 |", "none of `test`"],
    }
    assert all(line in card.text for line in expected[name])
    assert ("Every published recording is here." in card.text) == (name != "simulated")


def test_what_is_missing_is_refused_or_told(small, tmp_path):
    folder = small["sprsound"]
    for path in (folder / "BioCAS2022" / "test2022_json" / "inter_test_json").iterdir():
        path.unlink()
    path.parent.rmdir()
    with pytest.raises(FileNotFoundError, match="test_inter has none of 1 recordings"):
        publish.write_dataset("sprsound", folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    files = publish.write_dataset("sprsound", folder, tmp_path / "out", allow_missing_audio=True)
    assert "**Not complete: test_inter has none of 1 recordings.**" in files["README.md"].read_text()
    opened = datasets.load_dataset(str(tmp_path / "out"), cache_dir=tmp_path / "cache")
    assert list(opened) == ["train", "test_intra"]
    assert incomplete(SOURCES["simulated"], {}) == ""


def private_in(folder: Path, *secrets: object) -> list[str]:
    """Where words of this machine stand in a written dataset, compressed columns and metadata included."""
    found = []
    for path in (path for path in folder.rglob("*") if path.is_file()):
        contents = [path.read_bytes()]
        if path.suffix == ".parquet":
            table = pq.read_table(path)
            contents += [repr(row).encode() for row in table.to_pylist()]
            contents += [repr((table.schema.metadata, pq.read_metadata(path).metadata)).encode()]
        found += [f"{path}: {word}" for word in private_words(*secrets) for c in contents if word.encode() in c]
    return found


@pytest.mark.parametrize("name", ["icbhi", "sprsound"])
def test_nothing_of_this_machine_is_written(name, small, tmp_path):
    data_dir = small[name]
    publish.write_dataset(name, data_dir, tmp_path / "out")
    assert not private_in(tmp_path / "out", tmp_path)
    planted = pa.table({"x": [f"{data_dir}/recording.wav"]})
    pq.write_table(planted, tmp_path / "out" / "planted.parquet", compression="zstd")
    assert private_in(tmp_path / "out", tmp_path)


@pytest.fixture
def run_cli(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Run the command in this process, from an empty folder."""

    def run(*arguments: str) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["publish", *arguments])
        publish.main()

    return run


def test_a_dry_run_writes_and_uploads_nothing(small, run_cli, hub: HubStandIn, tmp_path, capsys):
    run_cli("icbhi", f"--data_dir={small['icbhi']}", "--dry_run")
    assert not hub.requests
    assert (tmp_path / "published" / "icbhi" / "cycles" / "train-00000-of-00001.parquet").is_file()
    assert "cycles/train: 4 rows in 1 file\n" in capsys.readouterr().out


def test_one_commit_uploads_all_and_nothing_of_this_machine(small, run_cli, hub: HubStandIn, tmp_path, capsys):
    arguments = ["icbhi", f"--data_dir={small['icbhi']}", "--repo_id=me/icbhi", "--private", "--output_dir=out"]
    run_cli(*arguments)
    there = hub.repositories["datasets/me/icbhi"]
    assert there.private
    assert len(there.commits) == 1
    written = {str(p.relative_to(tmp_path / "out")): p.read_bytes() for p in (tmp_path / "out").rglob("*.*")}
    assert there.files == written
    assert not hub.leaks(tmp_path, small["icbhi"])
    assert "free for research" in capsys.readouterr().out
    (tmp_path / "out" / "notes.txt").write_text("a stranger in the folder stays there")
    run_cli(*arguments)
    assert len(there.commits) == 1
    assert there.files == written


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["icbhi", "--data_dir=nowhere", "--repo_id=me/icbhi"], "nowhere holds no folder ICBHI_final_database"),
        (["icbhi", "--data_dir={icbhi}", "--repo_id=me/a/b"], "'me/a/b' is no repository id: give USER/NAME"),
        (["icbhi", "--data_dir={icbhi}", "--repo_id=you/icbhi"], r"HTTP 403"),
        (["simulated", "--data_dir=here", "--dry_run"], "the simulated dataset reads no files"),
        (["icbhi", "--data_dir={less}", "--dry_run"], "1 of 4 recordings lack .* pass --allow_missing_audio to"),
    ],
)
def test_one_sentence_tells_what_is_wrong(arguments, message, small, run_cli, hub, tmp_path):
    folder = small["icbhi"]
    if "--data_dir={less}" in arguments:
        next((folder / "ICBHI_final_database").glob("102*.wav")).unlink()
    with pytest.raises(SystemExit, match=message) as caught:
        run_cli(*(argument.format(icbhi=folder, less=folder) for argument in arguments))
    assert str(caught.value).startswith("publish: error: ")
    assert "\n" not in str(caught.value)
    assert not hub.repositories
    assert not (tmp_path / "published").exists()


def test_a_repository_or_a_dry_run(run_cli, capsys):
    with pytest.raises(SystemExit):
        run_cli("simulated")
    assert "give --repo_id USER/NAME to upload to, or --dry_run" in capsys.readouterr().err


@pytest.mark.slow
def test_what_was_uploaded_opens_from_the_hub_in_a_clean_process(tmp_path):
    small = f"from hf_datasets import BUILDERS, publish; from functools import partial; B = BUILDERS; S = {SMALL}; "
    small += "B['simulated'] = partial(B['simulated'], **S); publish.main()"
    opened = (
        "import datasets, hashlib; d = datasets.load_dataset('me/sounds', 'recordings')\n"
        "for name, part in d.cast_column('audio', datasets.Audio(decode=False)).items():\n"
        "    print(name, *(hashlib.sha256(row['audio']['bytes']).hexdigest() for row in part))"
    )
    with hub_stand_in() as hub:
        for code, *arguments in ([small, "simulated", "--repo_id=me/sounds"], [opened]):
            command = [sys.executable, "-c", code, *arguments]
            environment = hub.environment(tmp_path / "huggingface")
            done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
            assert done.returncode == 0, done.stderr
    paths = [path for method, path in hub.requests if method in ("POST", "PUT") and "validate-yaml" not in path]
    assert paths[:3] == [
        "/api/repos/create",
        "/api/datasets/me/sounds/preupload/main",
        "/datasets/me/sounds.git/info/lfs/objects/batch",
    ]
    assert [path.split("/")[1] for path in paths[3:-1]] == ["large"] * 5
    assert paths[-1] == "/api/datasets/me/sounds/commit/main"
    assert len(hub.repositories["datasets/me/sounds"].commits) == 1
    assert not hub.leaks(tmp_path)
    expected = load("simulated", config="recordings", cache_dir=tmp_path / "cache", **SMALL)
    lines = [
        " ".join([name, *(hashlib.sha256(row["audio"]["bytes"]).hexdigest() for row in rows_of(part))])
        for name, part in expected.items()
    ]
    assert done.stdout.splitlines() == lines


@pytest.mark.slow
def test_real_recordings(real_icbhi, tmp_path):
    publish.write_dataset("icbhi", real_icbhi, tmp_path / "out", allow_missing_audio=True)
    for config in CONFIGS:
        again = datasets.load_dataset(str(tmp_path / "out"), config, cache_dir=tmp_path / "again")
        expected = load("icbhi", real_icbhi, config, allow_missing_audio=True, cache_dir=tmp_path / "cache")
        assert {split: part.num_rows for split, part in again.items()} == {s: p.num_rows for s, p in expected.items()}
        for split in expected:
            assert again[split].features == expected[split].features
            assert again[split].data.table.equals(expected[split].data.table)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "**Not complete: train has 43 of 539 recordings, test has 13 of 381 recordings.**" in card
    assert "| `train` | 14 | 43 | 442 | 227 | 133 | 65 | 17 |" in card
    assert not private_in(tmp_path / "out", tmp_path, real_icbhi)

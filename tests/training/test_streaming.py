"""Training on streamed Parquet gives what training in memory gives, reads each row once, and resumes exactly."""

from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.data_loader import BatchSamplerShard, skip_first_batches
from torch.utils.data import BatchSampler, DataLoader

import hf_datasets
from modeling_qlung.evaluation.tasks import TASKS
from modeling_qlung.training.arguments import parse
from modeling_qlung.training.build import build_trainer, fit_extractor
from modeling_qlung.training.data import count_classes, decode_cycles, row_id
from modeling_qlung.training.sampling import RowGroupSampler
from modeling_qlung.training.streaming import ParquetCycles
from modeling_qlung.training.trainer import last_whole_checkpoint

from .test_trainer import StopAt

ROWS, GROUP = 100, 7  # 15 row groups in 3 files, of 7 rows and fewer at the files' ends


@pytest.fixture(scope="module")
def simulated(tmp_path_factory) -> datasets.DatasetDict:
    cache = tmp_path_factory.mktemp("cache")
    cycles = hf_datasets.load("simulated", train_patients=5, test_patients=1, cache_dir=cache)
    return cycles.cast_column("audio", datasets.Audio(decode=False))


@pytest.fixture(scope="module")
def shards(simulated, tmp_path_factory) -> Path:
    """A folder such as `push_to_hub` writes."""
    folder = tmp_path_factory.mktemp("shards")
    write(simulated["train"], folder, 3)
    return folder


def write(rows: datasets.Dataset, folder: Path, number: int, split: str = "train") -> None:
    (folder / "data").mkdir(exist_ok=True)
    for index in range(number):
        name = f"{split}-{index:05d}-of-{number:05d}.parquet"
        rows.shard(number, index, contiguous=True).to_parquet(folder / "data" / name, batch_size=GROUP)


def test_rows_are_those_of_memory(simulated, shards, tmp_path):
    decoded = decode_cycles(simulated["train"], 16000)
    stream = ParquetCycles(shards, 16000, cache_dir=tmp_path)
    assert len(stream) == len(decoded) == ROWS
    assert stream.row_group_counts.tolist() == [7, 7, 7, 7, 6, 7, 7, 7, 7, 5, 7, 7, 7, 7, 5]
    for number in (0, 6, 7, 33, 34, 99, 50):
        ours, theirs = stream[number], decoded[number]
        assert ours.keys() == theirs.keys()
        np.testing.assert_array_equal(ours.pop("waveform"), theirs.pop("waveform"))
        assert ours == theirs
    assert stream.class_counts == list(count_classes(decoded, TASKS["4-class"]).values())
    assert stream.patients == set(decoded["patient_id"][:])
    assert stream.devices == sorted(set(decoded["device"][:]))


def test_rows_without_a_label_are_left_out(simulated, tmp_path):
    events = simulated["train"]
    column = [None if index % 3 else label for index, label in enumerate(events["label"][:])]
    some = events.remove_columns("label").add_column("label", column, feature=events.features["label"])
    write(some, tmp_path, 2)
    stream = ParquetCycles(tmp_path, 16000, cache_dir=tmp_path / "cache")
    assert len(stream) == 34
    assert [row_id(stream[number]) for number in range(34)] == [row_id(some[index]) for index in range(0, ROWS, 3)]
    assert [stream[number]["label"] for number in range(34)] == column[::3]


def test_a_task_gives_each_row_its_label(simulated, shards, tmp_path):
    for name in ("1-2", "two-output"):
        decoded = decode_cycles(simulated["train"], 16000, TASKS[name])
        stream = ParquetCycles(shards, 16000, TASKS[name], tmp_path)
        assert [stream[number]["label"] for number in range(0, ROWS, 9)] == decoded["label"][:][::9]
        assert stream.class_counts == list(count_classes(decoded, TASKS[name]).values())


def test_a_sample_is_all_that_there_is_or_some_of_it(simulated, shards, tmp_path):
    stream = ParquetCycles(shards, 16000, cache_dir=tmp_path)
    decoded = decode_cycles(simulated["train"], 16000)
    whole = stream.sample()
    assert Counter(map(row_id, whole)) == Counter(map(row_id, decoded))
    assert whole[0]["waveform"].dtype == np.float32
    data_args = parse(["quickstart", "--duration=1"])[1][0]
    ours, theirs = fit_extractor(data_args, whole), fit_extractor(data_args, decoded)
    assert (ours.mean, ours.std) == pytest.approx((theirs.mean, theirs.std))
    assert ours.quality_statistics == theirs.quality_statistics
    some = stream.sample(20)
    assert len(set(map(row_id, some))) == 20
    assert [row_id(row) for row in some] == [row_id(row) for row in whole][:20]
    assert len({row["patient_id"] for row in some}) > 2, "from several row groups"


def test_what_cannot_be_read_is_named(simulated, shards, tmp_path):
    with pytest.raises(OSError, match="nowhere"):
        ParquetCycles(tmp_path / "nowhere", 16000)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="kind 'csv': it must be Parquet"):
        ParquetCycles(tmp_path / "text", 16000)
    (tmp_path / "test").mkdir()
    write(simulated["test"], tmp_path / "test", 1, "test")
    with pytest.raises(ValueError, match="no Parquet of a split `train`, only of test"):
        ParquetCycles(tmp_path / "test", 16000)
    with pytest.raises(ValueError, match="needs the column 'record_label'"):
        ParquetCycles(shards, 16000, TASKS["2-1"])
    (tmp_path / "bare").mkdir()
    write(simulated["train"].remove_columns("patient_id"), tmp_path / "bare", 1)
    with pytest.raises(ValueError, match="lacks patient_id"):
        ParquetCycles(tmp_path / "bare", 16000)

    def break_audio(row):
        return {"audio": {"bytes": b"RIFF", "path": "x.wav"}} if row["cycle_index"] == 2 else {}

    (tmp_path / "broken").mkdir()
    broken = simulated["train"].map(break_audio)
    write(broken, tmp_path / "broken", 1)
    stream = ParquetCycles(tmp_path / "broken", 16000, cache_dir=tmp_path / "cache")
    with pytest.raises(ValueError, match=r"00001\.parquet: .*cannot be read as audio.*\(recording S00000_0"):
        stream[2]


# ---- The order of an epoch ----


def order(sampler: RowGroupSampler, epoch: int = 0) -> list[int]:
    sampler.set_epoch(epoch)
    return list(sampler)


@pytest.mark.parametrize("lanes", [1, 2, 3, 8])
@pytest.mark.parametrize("batch_size", [1, 4, 16, 1000])
def test_every_row_comes_once_in_an_epoch(lanes, batch_size):
    counts = np.random.default_rng(0).integers(0, 30, 40)
    sampler = RowGroupSampler(counts, batch_size, lanes, seed=3, buffer_size=50)
    first, second = order(sampler, 0), order(sampler, 1)
    assert sorted(first) == sorted(second) == list(range(counts.sum()))
    assert len(sampler) == len(first)
    assert first != second
    assert order(RowGroupSampler(counts, batch_size, lanes, seed=3, buffer_size=50), 1) == second
    assert order(RowGroupSampler(counts, batch_size, lanes, seed=4, buffer_size=50), 1) != second


def test_rows_are_mixed_with_those_of_other_groups():
    rows = np.array(order(RowGroupSampler([100] * 50, 20, lanes=2, buffer_size=1000)))
    groups = rows.reshape(-1, 20) // 100
    assert np.mean([len(set(batch)) for batch in groups]) > 8, "of the ten groups of a buffer"
    assert abs(np.corrcoef(rows, np.arange(len(rows)))[0, 1]) < 0.3


@pytest.mark.parametrize(("processes", "workers"), [(1, 1), (2, 1), (1, 3), (2, 2)])
def test_each_worker_reads_row_groups_of_its_own_once(processes, workers):
    counts, batch_size = [50] * 48, 10
    sampler = RowGroupSampler(counts, batch_size, processes * workers, buffer_size=200)
    readers: dict[int, set[tuple[int, int]]] = {}
    seen: Counter[int] = Counter()
    for process in range(processes):
        shard = BatchSamplerShard(BatchSampler(sampler, batch_size, False), processes, process)
        for number, batch in enumerate(shard):
            seen.update(batch)
            for row in batch:
                readers.setdefault(row // 50, set()).add((process, number % workers))
    assert seen == Counter(range(2400)), "no row twice, none lost"
    extra = sum(len(by) - 1 for by in readers.values())
    assert extra <= processes * workers - 1, "groups at the seams of lanes alone are read by two"


def test_an_epoch_in_order_reads_each_row_group_once(shards, tmp_path, monkeypatch):
    monkeypatch.setattr("modeling_qlung.training.streaming.BUFFER_ROWS", 20)
    stream = ParquetCycles(shards, 16000, cache_dir=tmp_path)
    reads: list[int] = []
    read = stream._read
    monkeypatch.setattr(stream, "_read", lambda group: (reads.append(group), read(group))[1])
    held = 0
    for epoch in range(2):
        for row in order(RowGroupSampler(stream.row_group_counts, 4, buffer_size=20), epoch):
            stream[row]
            held = max(held, sum(map(len, stream._open.values())))
    assert len(reads) <= 2 * 15
    assert set(reads) == set(range(15))
    assert held <= 20 + 7


def test_workers_give_the_rows_and_skipping_reads_nothing(simulated, shards, tmp_path):
    stream = ParquetCycles(shards, 16000, cache_dir=tmp_path)
    decoded = decode_cycles(simulated["train"], 16000)
    sampler = RowGroupSampler(stream.row_group_counts, 8, lanes=2, buffer_size=30)
    options = {"batch_size": 8, "sampler": sampler, "collate_fn": list, "num_workers": 2}
    whole = [[row_id(row) for row in batch] for batch in DataLoader(stream, **options)]
    assert [name for batch in whole for name in batch] == [row_id(decoded[row]) for row in sampler]
    loader = Accelerator(cpu=True).prepare(DataLoader(stream, **options))
    rest = skip_first_batches(loader, 5)
    assert [[row_id(row) for row in batch] for batch in rest] == whole[5:]


# ---- Training ----

SMALL = [
    "--hidden_size=16", "--num_hidden_layers=1", "--num_attention_heads=2", "--intermediate_size=32", "--duration=1",
    "--sampling_power=0", "--per_device_train_batch_size=8", "--disable_tqdm=true", "--use_cpu=true", "--seed=5",
    "--select_on=last", "--learning_rate=0.01",
]  # fmt: skip


def trainer(train, folder: Path, *words: str):
    arguments = parse(["quickstart", *SMALL, f"--output_dir={folder}", *words])[1]
    sample = train.sample() if isinstance(train, ParquetCycles) else train
    torch.manual_seed(0)
    return build_trainer(train, None, fit_extractor(arguments[0], sample), arguments)


def weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_training_streamed_is_training_in_memory_in_that_order(simulated, shards, tmp_path):
    decoded = decode_cycles(simulated["train"], 16000)
    stream = ParquetCycles(shards, 16000, cache_dir=tmp_path / "cache")
    words = ["--num_train_epochs=2", "--save_strategy=no"]
    streamed, in_memory = trainer(stream, tmp_path / "a", *words), trainer(decoded, tmp_path / "b", *words)
    in_memory.feature_extractor.mean = streamed.feature_extractor.mean  # sums in another order: the last bit
    in_memory.feature_extractor.std = streamed.feature_extractor.std
    in_memory.sampler = streamed.sampler
    for each in (streamed, in_memory):
        torch.manual_seed(1)  # of the masks
        each.train()
    assert streamed.state.global_step == in_memory.state.global_step == 26
    assert torch.equal(weights(streamed.model), weights(in_memory.model))
    assert streamed.model.config.class_priors == in_memory.model.config.class_priors


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_that_was_stopped_goes_on_with_the_rows_not_seen(shards, tmp_path, workers):
    stream = ParquetCycles(shards, 16000, cache_dir=tmp_path / "cache")
    words = ["--num_train_epochs=2", "--save_strategy=steps", "--save_steps=17", f"--dataloader_num_workers={workers}"]
    whole = trainer(stream, tmp_path / "whole", *words)
    whole.train()
    stopped = trainer(stream, tmp_path / "parts", *words)
    stopped.add_callback(StopAt(17))
    stopped.train()
    resumed = trainer(ParquetCycles(shards, 16000, cache_dir=tmp_path / "cache"), tmp_path / "parts", *words)
    resumed.train(resume_from_checkpoint=last_whole_checkpoint(tmp_path / "parts"))
    assert stopped.state.global_step == 17
    assert resumed.state.global_step == whole.state.global_step == 26
    assert torch.equal(weights(resumed.model), weights(whole.model))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sampling_power=1"], "--sampling_power 1.0 draws from all of them: set it to 0.0"),
        (["--quality_control=shuffled"], "--quality_control shuffled replaces the quality of all of them"),
        (["--durations", "0.5", "1"], "--durations 0.5 1.0 sorts all of them by length: leave it out"),
        (["--validation_fraction=0.2"], "--validation_fraction 0.2 chooses from all patients: leave it out"),
        (["--dataset=icbhi", "--folds", "0", "1"], "--fold 0 1 chooses from all patients: leave it out"),
        (["--as_published", "preparation"], "--as_published preparation cuts recordings"),
        (["--train_parquet=local:shards-0123"], "took its --train_parquet from a folder, local:shards-0123"),
    ],
)
def test_what_needs_all_cycles_at_once_is_refused(words, message, capsys):
    with pytest.raises(SystemExit):
        parse(["quickstart", *SMALL, "--train_parquet=shards", *words])
    assert message in " ".join(capsys.readouterr().err.split())

"""Training on more cycles than a disk or memory holds decoded: rows of Parquet files, read and decoded as they come.

`datasets` can stream Parquet too, but a resumed run would lose the rows of its shuffle buffer or decode again all that
it had seen, and processes would end their epochs at different steps. Here the files' own metadata say how many rows
there are and where. So rows have numbers, an epoch is an order of numbers that is known before any audio is read, and
the Trainer's loaders, Accelerate's sharding and skipping and the epochs are those of a dataset in memory.
"""

import inspect
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, Features, List, Value
from datasets.fingerprint import Hasher
from pyarrow import parquet

from .. import quality_qlung
from ..evaluation.tasks import FOUR_CLASS, Task
from ..inference import audio as recordings
from .data import DECODED_FEATURES, KEPT_COLUMNS, decode_cycles, decode_row, label_classes
from .sampling import BUFFER_ROWS

SAMPLE_ROWS = 10_000  # on which statistics of the training set are fitted
REQUESTS = 16  # files looked into at once: on the Hub each takes a round trip or two
INDEX_FEATURES = {
    "file": Value("int32"),
    "row_group": Value("int32"),
    "counts": List(Value("int64")),
    "patients": List(Value("string")),
    "devices": List(Value("string")),
}


class ParquetCycles(torch.utils.data.Dataset):
    """
    The labelled training rows of Parquet files, numbered in the order of the files; decoded each time they are read.

    Row groups are the unit of reading, and those last used are kept: take rows in the order of [`RowGroupSampler`].

    Attributes:
        class_counts: number of rows of each class.
        row_group_counts: number of rows of each row group, (groups,).

    Args:
        source: folder or Hub repository as `hf_datasets.publish` writes it, or `push_to_hub` of a `DatasetDict` of
            `hf_datasets.load(..., config=task.config)`.
        sampling_rate: of the model, in Hz.
        task: gives each row its label; rows without one are left out.
        cache_dir: folder where `datasets` keeps the index and the sample.

    Raises:
        ValueError: if the source does not hold Parquet with a training split, or lacks a column.
        OSError: if there is no such source.
    """

    def __init__(
        self, source: str | Path, sampling_rate: int, task: Task = FOUR_CLASS, cache_dir: str | Path | None = None
    ):
        found = parquet_files(source, task.config)
        if "train" not in found:
            raise ValueError(f"{source} has no Parquet of a split `train`, only of {', '.join(found) or 'none'}")
        self.files = list(found["train"])
        self.sampling_rate, self.task = sampling_rate, task
        self.cache_dir = None if cache_dir is None else str(cache_dir)
        self._validation = found.get("validation")
        with parquet.ParquetFile(self.files[0]) as content:
            features = Features.from_arrow_schema(content.schema_arrow)
        if missing := [name for name in ("audio", "patient_id", "recording_id") if name not in features]:
            raise ValueError(f"{self.files[0]} lacks {', '.join(missing)}: write it from the datasets of hf_datasets")
        self.classes = label_classes(features, task)
        self.kept = {name: features[name] for name in KEPT_COLUMNS if name in features}
        self.fingerprint = Hasher.hash([self.files, found["train"].origin_metadata, task.name, self.classes])
        self.index = self._build_index()
        counts = np.array(self.index["counts"][:], dtype=np.int64).reshape(-1, len(task.classes))
        self.class_counts, self.row_group_counts = counts.sum(axis=0).tolist(), counts.sum(axis=1)
        self.ends = np.cumsum(self.row_group_counts)
        if not len(self):
            raise ValueError(f"{source} holds no training row with a label of the task {task.name}")
        self._open: OrderedDict[int, pa.Table] = OrderedDict()  # row groups, the last used at the end

    def validation(self) -> Dataset | None:
        """Load and decode the split `validation`, which is no more than fits, if there is one."""
        if self._validation is None:
            return None
        files = {"validation": self._validation}
        split = datasets.load_dataset("parquet", data_files=files, split="validation", cache_dir=self.cache_dir)
        return decode_cycles(split, self.sampling_rate, self.task)

    def _build_index(self) -> Dataset:
        """One row for each row group: where it is, and who and what is in it. Reads no audio."""
        return Dataset.from_generator(
            _row_groups,
            features=Features(INDEX_FEATURES),
            gen_kwargs={  # tuples: `datasets` would take lists for shards
                "files": tuple(self.files),
                "column": self.task.column,
                "classes": tuple(self.classes),
                "num_classes": len(self.task.classes),
                "with_devices": "device" in self.kept,
            },
            fingerprint=Hasher.hash([self.fingerprint, inspect.getsource(_row_groups), inspect.getsource(_index_file)]),
            cache_dir=self.cache_dir,
        )

    @property
    def patients(self) -> set[str]:
        """The `patient_id` of all rows."""
        return {name for names in self.index["patients"] for name in names}

    @property
    def devices(self) -> list[str]:
        """The stethoscopes of all rows, in order."""
        return sorted({name for names in self.index["devices"] for name in names})

    def __len__(self) -> int:
        return sum(self.class_counts)

    def __getitem__(self, number: int) -> dict[str, Any]:
        group = int(np.searchsorted(self.ends, number, side="right"))
        first = int(self.ends[group] - self.row_group_counts[group])
        return self._decode(self._row_group(group), number - first, group)

    def _row_group(self, group: int) -> pa.Table:
        """The labelled rows of a row group; kept as long as the sampler's buffer may need it."""
        if group in self._open:
            self._open.move_to_end(group)
            return self._open[group]
        table = self._open[group] = self._read(group)
        capacity = BUFFER_ROWS + self.row_group_counts.max()
        while sum(map(len, self._open.values())) > capacity:
            self._open.popitem(last=False)
        pa.default_memory_pool().release_unused()  # or the allocator keeps the peaks of reading
        return table

    def _read(self, group: int) -> pa.Table:
        entry = self.index[group]
        with parquet.ParquetFile(self.files[entry["file"]]) as content:
            columns = ["audio", self.task.column, *self.kept]
            table = content.read_row_group(entry["row_group"], columns, use_threads=False)
        labelled = _labels(table[self.task.column], self.classes) >= 0
        return table if labelled.all() else table.filter(pa.array(labelled))

    def _decode(self, table: pa.Table, row: int, group: int) -> dict[str, Any]:
        content = table.slice(row, 1).to_pylist()[0]
        try:
            decoded = decode_row(content, self.sampling_rate, self.task.column, self.classes)
        except ValueError as error:
            file = self.files[self.index[group]["file"]]
            raise ValueError(f"{file}: {error} (recording {content['recording_id']})") from error
        return {**{name: content[name] for name in self.kept}, **decoded}

    def sample(self, size: int = SAMPLE_ROWS) -> Dataset:
        """Decode the rows of row groups drawn at random, all of them if there are no more than `size`.

        Returns:
            A memory-mapped dataset like that of `decode_cycles`, cached, the same for every seed and process.
        """
        code = [inspect.getsource(part) for part in (recordings, quality_qlung, decode_row)]
        sampled = Dataset.from_generator(
            self._sampled_rows,
            features=Features({**self.kept, **DECODED_FEATURES}),
            gen_kwargs={"size": size},
            fingerprint=Hasher.hash([self.fingerprint, self.sampling_rate, size, *code]),
            cache_dir=self.cache_dir,
        )
        return sampled.with_format("numpy", columns=["waveform"], output_all_columns=True)

    def _sampled_rows(self, size: int) -> Iterator[dict[str, Any]]:
        for group in np.random.default_rng(0).permutation(len(self.ends)).tolist():
            table = self._read(group)
            for row in range(min(len(table), size)):
                yield self._decode(table, row, group)
            size -= len(table)
            if size <= 0:
                return


def parquet_files(source: str | Path, config: str) -> dict[str, Any]:
    """Find the Parquet files of each split, in a folder or on the Hub; of the named configuration where there are some.

    Raises:
        ValueError: if the files there are not Parquet.
        OSError: if there is no such source.
    """
    name = str(source)
    configs = datasets.get_dataset_config_names(name)
    builder = datasets.load_dataset_builder(name, config if config in configs else None)
    if builder.name != "parquet":
        raise ValueError(f"{source} holds a dataset of the kind {builder.name!r}: it must be Parquet files")
    return dict(builder.config.data_files)


def _row_groups(files: Sequence[str], **options: Any) -> Iterator[dict[str, Any]]:
    with ThreadPoolExecutor(REQUESTS) as pool:
        for number, entries in enumerate(pool.map(partial(_index_file, **options), files)):
            yield from ({"file": number, **entry} for entry in entries)


def _index_file(
    file: str, column: str, classes: Sequence[int | None], num_classes: int, with_devices: bool
) -> list[dict[str, Any]]:
    entries = []
    with parquet.ParquetFile(file) as content:
        for number in range(content.num_row_groups):
            columns = [column, "patient_id", *(["device"] if with_devices else [])]
            table = content.read_row_group(number, columns, use_threads=False)
            labels = _labels(table[column], classes)
            labelled = table.filter(pa.array(labels >= 0))
            entries.append(
                {
                    "row_group": number,
                    "counts": np.bincount(labels[labels >= 0], minlength=num_classes),
                    "patients": labelled["patient_id"].unique().to_pylist(),
                    "devices": labelled["device"].unique().drop_null().to_pylist() if with_devices else [],
                }
            )
    return entries


def _labels(column: pa.ChunkedArray, classes: Sequence[int | None]) -> np.ndarray:
    """The task's class of each row, -1 where it has none."""
    known = np.array([*(-1 if index is None else index for index in classes), -1])
    return known[column.fill_null(len(classes)).to_numpy()]

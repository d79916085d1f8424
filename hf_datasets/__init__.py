"""Respiratory-sound datasets as Hugging Face `datasets` builders: ICBHI 2017, SPRSound 2022, and a simulated one.

    from hf_datasets import load

    cycles = load("icbhi", data_dir="/data/icbhi_2017")      # DatasetDict with train and test
    cycles = cycles.cast_column("audio", datasets.Audio(decode=False))  # WAV bytes; reads without torchcodec

Labels, audio and metadata, never a model.
"""

import dataclasses
from collections.abc import Collection
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetGenerationError

from .builder import CONFIGS, Icbhi, LungSoundBuilder, LungSoundConfig, Simulated, Sprsound
from .labels import LABELS

__all__ = ["LABELS", "load"]

BUILDERS: dict[str, type[LungSoundBuilder]] = {"icbhi": Icbhi, "sprsound": Sprsound, "simulated": Simulated}


def load(
    name: str,
    data_dir: str | Path | None = None,
    config: str = "cycles",
    split: str | None = None,
    allow_missing_audio: bool = False,
    cache_dir: str | Path | None = None,
    **options: Any,
) -> datasets.DatasetDict | datasets.Dataset:
    """Load a dataset, building it in the cache first where it is not there.

    Args:
        name: `icbhi`, `sprsound` or `simulated`.
        data_dir: folder that holds `ICBHI_final_database` or `BioCAS2022`; None downloads from the official source.
        config: `cycles` (one row per respiratory cycle or event) or `recordings` (one row per recording).
        split: one split (`train`, `train[:100]`, `train+test_intra`, ...); None: all of them.
        allow_missing_audio: use what is there, with a warning that counts it, where audio or annotations are missing.
        cache_dir: folder of the cache; None: that of `datasets`.
        options: of the builder, for `sprsound` `continuous_as_wheeze`, for `simulated` `seed`, `train_patients`,
            `test_patients`, `recordings_per_patient`.

    Returns:
        A `DatasetDict`, or a `Dataset` where `split` is given. Columns: see `LungSoundBuilder` and the builders. What
        is missing of the recordings stands in `info.description`.

    Raises:
        ValueError: unknown name, config, split or option; malformed files; counts other than the published ones.
        FileNotFoundError: `data_dir` does not hold the dataset, or part of it is missing.
        ConnectionError: the download failed; the message says what to download by hand.
    """
    builder_class = BUILDERS[_one_of("dataset", name, BUILDERS)]
    _one_of("config", config, CONFIGS)
    shared = {field.name for field in dataclasses.fields(LungSoundConfig)}
    own = {field.name for field in dataclasses.fields(builder_class.BUILDER_CONFIG_CLASS)} - shared
    for option in options:
        _one_of(f"option of {name}", option, own)

    folders = (None if folder is None else str(Path(folder).expanduser().resolve()) for folder in (data_dir, cache_dir))
    builder = builder_class(config, *folders, allow_missing_audio=allow_missing_audio, **options)
    for part in split.split("+") if split else ():
        _one_of(f"split of {name}", part.split("[")[0], [*builder.recordings, "all"])
    try:
        builder.download_and_prepare()
    except DatasetGenerationError as error:
        raise (error.__cause__ or error) from None  # the message that names the file, not the one around it
    return builder.as_dataset(split)


def _one_of(kind: str, value: str, valid: Collection[str]) -> str:
    if value not in valid:
        raise ValueError(f"unknown {kind} {value!r}: choose from {', '.join(sorted(valid)) or 'none'}")
    return value

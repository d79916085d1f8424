"""Recordings in memory, as quality scores are fitted on them and measured."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import datasets
import numpy as np
import pandas as pd
from numpy.typing import NDArray

import hf_datasets
from hf_datasets.labels import EVENT_TYPES

from ..inference import read_audio
from .noises import RATE

POOR = "Poor Quality"


@dataclass(frozen=True, eq=False)
class Recordings:
    """
    Recordings in memory.

    Args:
        waveforms: (samples,) each, float32, mono at 16 kHz.
        table: one row each, with the columns of `hf_datasets`' config `recordings` apart from `audio`.
    """

    waveforms: list[NDArray]
    table: pd.DataFrame

    @cached_property
    def patients(self) -> NDArray:
        """(n,) names."""
        return self.table["patient_id"].to_numpy(str)

    @cached_property
    def poor(self) -> NDArray:
        """(n,) bool: clinicians called it so."""
        return (self.table["record_label"] == POOR).to_numpy()

    def take(self, chosen: NDArray) -> "Recordings":
        """Give the chosen ones alone."""
        return Recordings([self.waveforms[index] for index in chosen], self.table.iloc[chosen].reset_index(drop=True))

    def cut(self, chosen: Iterable[int]) -> tuple[list[NDArray], pd.DataFrame]:
        """Cut the cycles or events out of the chosen recordings: waveforms, and rows with `index` and `event_type`."""
        waveforms, rows = [], []
        for index in chosen:
            for cycle in self.table["cycles"].iloc[index]:
                part = self.waveforms[index][int(cycle["start"] * RATE) : int(cycle["end"] * RATE)]
                if len(part):
                    name = None if cycle["event_type"] is None else EVENT_TYPES[cycle["event_type"]]
                    waveforms.append(part)
                    rows.append({"index": index, "event_type": name})
        return waveforms, pd.DataFrame(rows, columns=["index", "event_type"])


def load(name: str, data_dir: str | None, allow_missing_audio: bool = False) -> dict[str, Recordings]:
    """Read every split's recordings that are there; `all` holds those of every split. See `hf_datasets.load`."""
    splits = {}
    loaded = hf_datasets.load(name, data_dir, config="recordings", allow_missing_audio=allow_missing_audio)
    for split, rows in loaded.items():
        encoded = rows.cast_column("audio", datasets.Audio(decode=False))
        waveforms = [read_audio(audio["bytes"], RATE) for audio in encoded["audio"]]
        table = pd.DataFrame(rows.remove_columns("audio").to_list())
        if "record_label" in table:
            table["record_label"] = rows.features["record_label"].int2str(table["record_label"].tolist())
        splits[split] = Recordings(waveforms, table)
    waveforms = [waveform for part in splits.values() for waveform in part.waveforms]
    splits["all"] = Recordings(waveforms, pd.concat([part.table for part in splits.values()], ignore_index=True))
    return splits


def choose(recordings: Recordings, among: NDArray, number: int) -> NDArray:
    """Draw `number` of the recordings where `among` (n,) is true: one of every patient before a second of any."""
    drawn = pd.Series(np.random.default_rng(0).permutation(np.flatnonzero(among)))
    turn = drawn.groupby(recordings.patients[drawn]).cumcount()
    return drawn[turn.sort_values(kind="stable").index].to_numpy()[:number]

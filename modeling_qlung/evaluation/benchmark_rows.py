"""The rows of a benchmark: what their finished runs recorded, predicted and measured, read from their folders."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from numpy.typing import NDArray

from .report import read_predictions
from .tasks import TASKS, Task

Complete = Callable[[Mapping[str, Any]], dict[str, Any]]

OFFICIAL = "official split"

# What tells one run of a row from another, or what is measured of it beside.
_OF_THE_RUN = {"seed", "seeds", "fold", "folds", "inspect_cycles"}
_SELECTION = {"validation": "validation patients", "last": "last epoch"}
_FIGURES = {"quality": "quality.png", "embeddings": "embedding_map.png", "attention": "attention.png"}


@dataclass(frozen=True, eq=False)
class SplitPredictions:
    """
    One test split as the runs of a row predicted it.

    Args:
        items: what was scored: label and patient_id by row_id, in its order.
        predictions: (seeds, n) predicted classes.
        unlabelled: number of items without a label, which are not scored.
    """

    items: pd.DataFrame
    predictions: NDArray[np.int64]
    unlabelled: int


@dataclass(frozen=True, eq=False)
class Row:
    """
    The finished runs of one row.

    Args:
        name: of the row, and of its folder.
        about: what its recipe says of itself.
        recorded: options that differ from the defaults.
        options: every option's value.
        seeds: those that were asked for and have ended, in the order asked for.
        protocol: what was trained and tested on: the official split, or folds.
        splits: what was predicted, by test split; empty while no seed has ended.
        flatness: of each run that has measured it.
        figures: those of the first seed (and its first fold), by title: paths relative to the benchmark's folder.
    """

    name: str
    about: Mapping[str, Any]
    recorded: Mapping[str, Any]
    options: Mapping[str, Any]
    seeds: Sequence[int]
    protocol: str
    splits: Mapping[str, SplitPredictions]
    flatness: Sequence[Mapping[str, float]]
    figures: Mapping[str, str]

    @property
    def task(self) -> Task:
        """What the row's models were asked."""
        return TASKS[self.options["task"]]

    @property
    def selection(self) -> str:
        """Which epoch was kept."""
        asked = self.options["select_on"]
        place = f"{self.options['dataset']} test" if asked == "test" else asked
        return _SELECTION.get(asked, f"best epoch on {place}")


def read_row(folder: Path, complete: Complete, seeds: Sequence[int], folds: Sequence[int] = ()) -> Row:
    """Read the finished runs of one row, of the seeds (and folds) that are asked for.

    Args:
        folder: holds seed_N, or fold_K/seed_N.
        complete: gives every option's value from those that a run has recorded.
        seeds: others in the folder are left alone.
        folds: if given, a seed counts once all of these have ended.

    Raises:
        ValueError: the runs differ in their options, in the splits they were tested on, or in these splits' items.
    """
    parts = [folder / f"fold_{fold}" for fold in folds] or [folder]
    runs = {seed: [part / f"seed_{seed}" for part in parts] for seed in seeds}
    ended = {seed: of for seed, of in runs.items() if all((run / "metrics.json").is_file() for run in of)}
    every = [run for of_seed in ended.values() for run in of_seed]
    about, recorded, fold = _read_recipes(every, folds)
    options = {name: value for name, value in complete(recorded).items() if name not in _OF_THE_RUN}
    flatness = [run / "flatness.json" for run in every]
    figures = {title: every[0] / file for title, file in _FIGURES.items()} if every else {}
    return Row(
        name=folder.name,
        about=about,
        recorded=recorded,
        options=options,
        seeds=list(ended),
        protocol=_protocol(folds or ([] if fold is None else [fold])),
        splits=_read_splits(folder, ended),
        flatness=[json.loads(path.read_text(encoding="utf-8")) for path in flatness if path.is_file()],
        figures={name: path.relative_to(folder.parent).as_posix() for name, path in figures.items() if path.is_file()},
    )


def _protocol(folds: Sequence[int]) -> str:
    listed = ", ".join(map(str, folds))
    return f"fold{'s' if len(folds) > 1 else ''} {listed}" if folds else OFFICIAL


def _read_recipes(runs: Sequence[Path], folds: Sequence[int]) -> tuple[dict[str, Any], dict[str, Any], int | None]:
    """What a row's recipe says of itself, its options, which all of its runs must share, and a fold that is one."""
    about: dict[str, Any] = {}
    shared: dict[str, Any] | None = None
    for run in runs:
        content = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))
        about = content.pop("about", {})
        of_the_run = _OF_THE_RUN if folds else _OF_THE_RUN - {"fold"}
        options = {name: value for name, value in content.items() if name not in of_the_run}
        if shared is not None and options != shared:
            raise ValueError(
                f"{run / 'recipe.yaml'} has other options than {runs[0]}: give these runs rows of their own"
            )
        shared = options
    recorded = shared or {}
    return about, recorded, recorded.pop("fold", None)


def _read_splits(folder: Path, runs: Mapping[int, Sequence[Path]]) -> dict[str, SplitPredictions]:
    tables = []
    for seed, of_seed in runs.items():
        table = pd.concat([read_predictions(run / "predictions.parquet") for run in of_seed])
        # Another dataset's split is predicted by every fold's model: together they are no one's predictions.
        left_out = (table["split"] == "validation") | (table["split"].str.contains(":") & (len(of_seed) > 1))
        tables.append(table[~left_out].assign(seed=seed))
    if not tables:
        return {}
    by_split = pd.concat(tables).groupby("split", sort=False)
    return {str(split): _one_split(f"{folder}, {split}", rows, list(runs)) for split, rows in by_split}


def _one_split(source: str, rows: pd.DataFrame, seeds: Sequence[int]) -> SplitPredictions:
    labelled = rows[rows["label"].notna()]
    if labelled.duplicated(["seed", "row_id"]).any():
        raise ValueError(f"{source}: items were predicted twice with one seed; do its folds overlap?")
    truth = labelled.drop_duplicates(["row_id", "label", "patient_id"]).set_index("row_id")[["label", "patient_id"]]
    predictions = labelled.pivot(index="seed", columns="row_id", values="prediction").reindex(seeds)
    if truth.index.has_duplicates or predictions.isna().to_numpy().any():
        raise ValueError(f"{source}: the seeds were tested on different items or labels; train the odd ones again")
    items = truth.loc[predictions.columns].astype({"label": np.int64})
    unlabelled = rows.loc[rows["label"].isna(), "row_id"].nunique()
    return SplitPredictions(items, predictions.to_numpy(np.int64), unlabelled)

"""What a run leaves behind for its readers: predictions.parquet, metrics.json, and tables over seeds."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from .bootstrap import bootstrap_ci
from .icbhi_score.scores import confusion_counts
from .tasks import FOUR_CLASS, Task

PREDICTION_SCHEMA = pa.schema(
    [
        pa.field("row_id", pa.string(), nullable=False),
        pa.field("patient_id", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("label", pa.int64()),
        pa.field("prediction", pa.int64(), nullable=False),
        pa.field("logits", pa.list_(pa.float32()), nullable=False),
        pa.field("quality", pa.float32()),
    ]
)


def write_predictions(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write predictions.parquet.

    Args:
        path: file to write.
        rows: one mapping per cycle, with exactly the columns of `PREDICTION_SCHEMA`: `row_id`
            (`{recording_id}:{cycle_index}`), `patient_id`, `split`, `label` (class index, None where the cycle has
            none), `prediction` (class index), `logits` (one float per class) and `quality` (in [0, 1], or None).

    Raises:
        ValueError: no rows, a missing or unknown column, a null where the schema has none, logits that are not finite,
            or a `row_id` twice in one split: distributed evaluation must neither lose nor double a cycle.
    """
    records = [dict(row) for row in rows]
    if not records:
        raise ValueError(f"{path}: there are no predictions to write")
    for record in records:
        _check_record(record, path)
    _check_unique(pd.DataFrame(records, columns=["split", "row_id"]), path)
    pq.write_table(pa.Table.from_pylist(records, schema=PREDICTION_SCHEMA), path)


def _check_record(record: dict[str, Any], path: str | Path) -> None:
    difference = set(PREDICTION_SCHEMA.names) ^ record.keys()
    if difference:
        raise ValueError(
            f"{path}: row {record.get('row_id')!r} has missing or unknown columns {sorted(difference)}; "
            f"give exactly {PREDICTION_SCHEMA.names}"
        )
    nulls = [f.name for f in PREDICTION_SCHEMA if not f.nullable and record[f.name] is None]
    if nulls:
        raise ValueError(f"{path}: row {record['row_id']!r} has no {nulls[0]}; only label and quality may be null")
    if not np.isfinite(record["logits"]).all():
        raise ValueError(f"{path}: row {record['row_id']!r} has logits {record['logits']}; did training diverge?")


def _check_unique(predictions: pd.DataFrame, source: str | Path) -> None:
    repeated = predictions[predictions.duplicated(["split", "row_id"])]
    if len(repeated):
        first = repeated.iloc[0]
        raise ValueError(
            f"{source}: {len(repeated)} rows appear twice in one split, first {first.row_id!r} in {first.split!r}; "
            "each cycle must be predicted once (does distributed evaluation pad its last batch?)"
        )


def read_predictions(path: str | Path) -> pd.DataFrame:
    """Read predictions.parquet; `label` and `prediction` are nullable integers, a missing quality is NaN.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file has other columns or types than `write_predictions` gives it.
    """
    table = pq.read_table(path)
    found = {field.name: field.type for field in table.schema}
    expected = {field.name: field.type for field in PREDICTION_SCHEMA}
    if found != expected:
        raise ValueError(f"{path}: columns {found}, expected {expected}; write the file with write_predictions")
    return table.to_pandas(types_mapper={pa.int64(): pd.Int64Dtype()}.get)


def score_predictions(
    predictions: pd.DataFrame, task: Task = FOUR_CLASS, resamples: int = 1000
) -> dict[str, dict[str, Any]]:
    """Score each split of a predictions table.

    Args:
        predictions: what `read_predictions` returns.
        task: what was asked.
        resamples: bootstrap resamples of the patients, for the intervals.

    Returns:
        {split: {...}} in the order of the table: what `Task.scores` returns, in percent; `ci95`, {score:
        [low, high]} by `bootstrap_ci` (None where undefined); `patients`, the number scored; `unlabelled`, the number
        of rows that were left out because they have no label. A split without any label has None for every score.

    Raises:
        ValueError: a `row_id` twice in one split, or a class that the task does not have.
    """
    _check_unique(predictions, "predictions")
    return {str(split): _score_split(rows, task, resamples) for split, rows in predictions.groupby("split", sort=False)}


def _score_split(rows: pd.DataFrame, task: Task, resamples: int) -> dict[str, Any]:
    labelled, size = rows[rows["label"].notna()], len(task.classes)
    counts, intervals = np.zeros((size, size), dtype=np.int64), dict.fromkeys(task.titles)
    if len(labelled):
        labels, predicted = (labelled[name].to_numpy(np.int64) for name in ("label", "prediction"))
        counts = confusion_counts(labels, predicted, size)
        patients = labelled["patient_id"].to_numpy(str)
        intervals = bootstrap_ci(labels, predicted, patients, task.rates, size, resamples)
    return {
        **task.scores_from_confusion(counts),
        "ci95": intervals,
        "patients": labelled["patient_id"].nunique(),
        "unlabelled": len(rows) - len(labelled),
    }


def write_metrics(path: str | Path, metrics: Mapping[str, Any]) -> None:
    """Write metrics.json (UTF-8, indented); undefined scores are null.

    Raises:
        ValueError: a value is NaN or infinite, which JSON cannot hold.
    """
    write_text(path, json.dumps(metrics, indent=2, allow_nan=False) + "\n")


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 file whole or not at all, so that a killed run leaves none cut short."""
    unfinished = Path(f"{path}.unfinished")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)


def summarize_seeds(runs: Sequence[Mapping[str, Any]], task: Task = FOUR_CLASS) -> dict[str, dict[str, dict[str, Any]]]:
    """Mean and standard deviation over seeds.

    Args:
        runs: the metrics of each run, as `score_predictions` returns them.
        task: what was asked.

    Returns:
        {split: {score: {"mean", "sd", "n", "values"}}} in percent. `values` are in the order of `runs`; `n` counts the
        defined ones, `mean` is over these, and `sd` (ddof=1) is None below two of them.

    Raises:
        ValueError: no runs, or runs that scored different splits.
    """
    if not runs:
        raise ValueError("there are no runs to summarise")
    splits = list(runs[0])
    for number, run in enumerate(runs):
        if set(run) != set(splits):
            raise ValueError(f"run {number} scored the splits {sorted(run)}, run 0 scored {sorted(splits)}")
    return {s: {score: mean_sd([run[s][score] for run in runs]) for score in task.titles} for s in splits}


def mean_sd(values: Sequence[float | None]) -> dict[str, Any]:
    """Give `mean`, `sd` (ddof=1, None below two values) and `n` over what is not None, and the `values`."""
    known = [value for value in values if value is not None]
    return {
        "mean": float(np.mean(known)) if known else None,
        "sd": float(np.std(known, ddof=1)) if len(known) > 1 else None,
        "n": len(known),
        "values": list(values),
    }


def format_table(
    summary: Mapping[str, Mapping[str, Mapping[str, Any]]], task: Task = FOUR_CLASS, first_column: str = "split"
) -> str:
    """A Markdown table of mean ± sd, one row per entry.

    Args:
        summary: {row name: {score: {"mean", "sd", "n"}}}: what `summarize_seeds` returns, or one split of several
            recipes under the recipes' names.
        task: what was asked; its scores are the columns.
        first_column: heading of the row names.
    """
    lines = [
        f"| {first_column} | runs | " + " | ".join(task.titles.values()) + " |",
        "|---|" + "---:|" * (len(task.titles) + 1),
    ]
    for name, scores in summary.items():
        runs = max(scores[score]["n"] for score in task.titles)
        cells = [format_mean_sd(scores[score]["mean"], scores[score]["sd"]) for score in task.titles]
        lines.append(f"| {name} | {runs} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def format_scores(metrics: Mapping[str, Mapping[str, Any]], task: Task = FOUR_CLASS) -> str:
    """A Markdown table of one model's scores with their 95 % intervals, one row per split of `score_predictions`."""
    lines = [
        "| split | scored | " + " | ".join(task.titles.values()) + " |",
        "|---|" + "---:|" * (len(task.titles) + 1),
    ]
    for split, scores in metrics.items():
        number = f"{sum(scores['support'].values()):,}"
        if scores["unlabelled"]:
            number += f" ({scores['unlabelled']:,} without label)"
        cells = [
            format_mean_sd(scores[score], None) + (f" {format_interval(interval)}" if interval else "")
            for score, interval in ((score, scores["ci95"][score]) for score in task.titles)
        ]
        lines.append(f"| {split} | {number} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def format_interval(interval: Sequence[float] | None, signed: bool = False) -> str:
    """`[60.12, 63.40]`, or `[−0.50, +2.25]` of a difference; an en dash where undefined."""
    if interval is None:
        return "–"
    ends = ", ".join(f"{end:+.2f}" if signed else f"{end:.2f}" for end in interval)
    return f"[{ends}]".replace("-", "−")


def format_mean_sd(mean: float | None, sd: float | None, spec: str = ".2f") -> str:
    """`62.01 ± 1.18`, `62.01` without a deviation, an en dash without a value."""
    if mean is None:
        return "–"
    return f"{mean:{spec}}" if sd is None else f"{mean:{spec}} ± {sd:{spec}}"

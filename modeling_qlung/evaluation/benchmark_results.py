"""The results of a benchmark's rows: their scores on each test split, and how they compare with another row."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from .benchmark_rows import OFFICIAL, Row, SplitPredictions
from .bootstrap import Difference, bootstrap_ci, paired_difference_ci
from .report import summarize_seeds

RESAMPLES = 5000  # so that an interval's ends, which decide whether it excludes 0, hardly depend on the draw


class Group(NamedTuple):
    """What shares a table: the same dataset trained on, test split, task and protocol."""

    dataset: str
    split: str
    task: str
    protocol: str

    @property
    def tested_on(self) -> str:
        """Dataset and split, `DATASET:SPLIT` being another dataset's."""
        return f"{self.split} (trained on {self.dataset})" if ":" in self.split else f"{self.dataset} {self.split}"

    @property
    def title(self) -> str:
        """For headings."""
        return f"{self.tested_on}, {self.task}, {self.protocol}"

    @property
    def slug(self) -> str:
        """For names of files."""
        return slug("_".join(part for part in self if part != OFFICIAL))


@dataclass(frozen=True, eq=False)
class Result:
    """
    A row's scores on one test split, in percent.

    Args:
        row: the row.
        reference: the row it is compared with; itself for a baseline.
        group: the table it belongs to.
        scores: {score: {"mean", "sd", "n", "values"}} over seeds.
        intervals: {score: [low, high]} of the mean, by `bootstrap_ci`.
        differences: from the reference, {score: ...}; empty where there is none.
        remark: why there is none, or on what seeds it stands; empty where nothing is to be said.
        published: {score: (mean, sd or None)}.
    """

    row: Row
    reference: Row
    group: Group
    scores: Mapping[str, Mapping[str, Any]]
    intervals: Mapping[str, list[float] | None]
    differences: Mapping[str, Difference]
    remark: str
    published: Mapping[str, tuple[float, float | None]]

    @property
    def predicted(self) -> SplitPredictions:
        """What was scored."""
        return self.row.splits[self.group.split]


def compare(rows: Sequence[Row], references: Mapping[str, str]) -> list[Result]:
    """Score every row on every test split, against its reference; in the order of tables, then of rows.

    Args:
        rows: of `read_row`.
        references: {row's name: name of the row it is compared with}.

    Raises:
        ValueError: a reference is none of the rows, or a published score is none of its row's task.
    """
    by_name = {row.name: row for row in rows}
    for name in by_name:
        if references[name] not in by_name:
            raise ValueError(f"{name} is compared with {references[name]!r}, which is none of {', '.join(by_name)}")
    results = [_compare_split(row, split, by_name[references[row.name]]) for row in rows for split in row.splits]
    groups = list(dict.fromkeys(result.group for result in results))
    return sorted(results, key=lambda result: groups.index(result.group))


def _group(row: Row, split: str) -> Group:
    return Group(row.options["dataset"], split, row.task.name, row.protocol)


def _compare_split(row: Row, split: str, reference: Row) -> Result:
    predicted, task = row.splits[split], row.task
    labels, patients = predicted.items["label"].to_numpy(), predicted.items["patient_id"].to_numpy(str)
    settings: dict[str, Any] = {"statistic": task.rates, "num_classes": len(task.classes), "resamples": RESAMPLES}
    ours, differences, remark = predicted.predictions, {}, _why_not_compared(row, split, reference)
    if row is not reference and not remark:
        theirs, paired = reference.splits[split].predictions, True
        shared = [seed for seed in row.seeds if seed in reference.seeds]
        if not shared:
            paired, remark = False, f"`{row.name}` and `{reference.name}` share no seed: theirs are drawn apart"
        elif {*row.seeds} != {*reference.seeds}:
            remark = (
                f"`{row.name}` is compared with `{reference.name}` on the seeds of both, {', '.join(map(str, shared))}"
            )
        if shared:
            ours, theirs = ours[_places(row, shared)], theirs[_places(reference, shared)]
        differences = paired_difference_ci(labels, ours, theirs, patients, paired_seeds=paired, **settings)
    return Result(
        row=row,
        reference=reference,
        group=_group(row, split),
        scores=summarize_seeds([{split: task.scores(labels, p)} for p in predicted.predictions], task)[split],
        intervals=bootstrap_ci(labels, predicted.predictions, patients, **settings),
        differences=differences,
        remark=remark,
        published=published_scores(row, split),
    )


def _places(row: Row, seeds: Sequence[int]) -> list[int]:
    return [row.seeds.index(seed) for seed in seeds]


def _why_not_compared(row: Row, split: str, reference: Row) -> str:
    """Give the reason for which two rows are not compared on a split, an empty string if they are."""
    ours, theirs = _group(row, split), _group(reference, split)
    reason = ""
    if not reference.splits:
        reason = "has no seed that has ended"
    elif split not in reference.splits or ours.dataset != theirs.dataset:
        reason = f"was not tested on {ours.tested_on}"
    elif ours != theirs:
        reason = f"is of the task {theirs.task}, {theirs.protocol}"
    elif not row.splits[split].items.equals(reference.splits[split].items):
        reason = "was tested on other items or labels"
    return reason and f"`{row.name}` is not compared: `{reference.name}` {reason}"


def published_scores(row: Row, split: str) -> dict[str, tuple[float, float | None]]:
    """Give what was published for a row on a split, {score: (mean, sd or None)}.

    A recipe has it as `{score: value}` for the only split of the dataset trained on, or as `{split: {...}}`.

    Raises:
        ValueError: the row's task has no such score.
    """
    published = row.about.get("published") or {}
    own = [name for name in row.splits if ":" not in name]
    nested = any(isinstance(value, Mapping) for value in published.values())
    scores = published.get(split, {}) if nested else published if own == [split] else {}
    if unknown := sorted(set(scores) - set(row.task.titles)):
        raise ValueError(
            f"{row.name}: published {unknown[0]!r} is no score of the task {row.task.name}, which has "
            f"{', '.join(row.task.titles)}"
        )
    parts = {score: [float(part) for part in str(value).split("±")] for score, value in scores.items()}
    return {score: (part[0], part[1] if len(part) > 1 else None) for score, part in parts.items()}


def slug(name: str) -> str:
    """Give a name as part of a file's."""
    return re.sub(r"[^\w.-]+", "-", name)

"""The table of a benchmark: finished runs, row by row, against a baseline and against what was published."""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import yaml
from numpy.typing import NDArray

from .bootstrap import Difference, bootstrap_ci, paired_difference_ci
from .icbhi_score.scores import confusion_counts
from .plots import ScoreLine, plot_benchmark, plot_confusion_matrices, plot_sensitivity
from .report import format_mean_sd, read_predictions, summarize_seeds, write_text
from .tasks import FOUR_CLASS, TASKS, Task

Complete = Callable[[Mapping[str, Any]], dict[str, Any]]

RESAMPLES = 5000  # so that an interval's ends, which decide whether it excludes 0, hardly depend on the draw

# What tells one run of a row from another, or what is measured of it beside.
_OF_THE_RUN = {"seed", "seeds", "fold", "folds", "inspect_cycles"}
_SELECTION = {"validation": "validation patients", "last": "last epoch"}
_FLATNESS_TITLES = {
    "loss": "Training loss",
    "increase_gradient": "Loss increase in the ρ-ball, along the gradient",
    "increase_adaptive": "the same, relative to the weights",
    "top_eigenvalue": "Top Hessian eigenvalue",
}
_FLATNESS_NOTE = (
    "Flatness is that of the plain cross-entropy of training cycles: its increase at distance ρ along the gradient "
    "and at 10 ρ relative to the weights (ASAM), and the Hessian's largest eigenvalue. Only the one relative to the "
    "weights may be compared between heads, none between architectures; all shrink with the training "
    "loss beside them."
)


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
        name: of the row.
        about: what its recipe says of itself.
        recorded: options that differ from the defaults.
        options: every option's value.
        seeds: those that have ended, in order.
        folds: number of folds, 1 without.
        splits: what was predicted, by test split; empty while no seed has ended.
        flatness: of each run that has measured it.
    """

    name: str
    about: Mapping[str, Any]
    recorded: Mapping[str, Any]
    options: dict[str, Any]
    seeds: Sequence[int]
    folds: int
    splits: Mapping[str, SplitPredictions]
    flatness: Sequence[Mapping[str, float]]

    @property
    def task(self) -> Task:
        """What the row's models were asked."""
        return TASKS[self.recorded.get("task", FOUR_CLASS.name)]

    @property
    def selection(self) -> str:
        """Which epoch was kept."""
        return _SELECTION.get(self.options["select_on"], "best epoch on the test set")


class Group(NamedTuple):
    """What shares a table: the same dataset, test split and task."""

    dataset: str
    split: str
    task: str

    @property
    def slug(self) -> str:
        """For names of files."""
        return slug("_".join(self))


@dataclass(frozen=True, eq=False)
class Result:
    """
    A row's scores on one test split, in percent.

    Args:
        row: the row.
        group: the table it belongs to.
        scores: {score: {"mean", "sd", "n", "values"}} over seeds.
        intervals: {score: [low, high]} of the mean, by `bootstrap_ci`.
        differences: from the baseline, {score: ...}; empty where there is none.
        not_compared: why there is none, or an empty string.
        published: {score: (mean, sd or None)}.
    """

    row: Row
    group: Group
    scores: Mapping[str, Mapping[str, Any]]
    intervals: Mapping[str, list[float] | None]
    differences: Mapping[str, Difference]
    not_compared: str
    published: Mapping[str, tuple[float, float | None]]

    @property
    def predicted(self) -> SplitPredictions:
        """What was scored."""
        return self.row.splits[self.group.split]


def write_benchmark(folder: str | Path, rows: Sequence[str], complete: Complete, baseline: str | None = None) -> str:
    """Write table.md, table.csv and figures over the finished runs of a benchmark's folder.

    Scores are made anew from each run's predictions. With folds, a seed's are those of all folds' cycles together.
    Rows share a table if dataset, test split and task are the same; a row is compared with the baseline if both
    predicted the same items with the same labels, by `paired_difference_ci`.

    Args:
        folder: holds ROW/seed_N or ROW/fold_K/seed_N with recipe.yaml, metrics.json, predictions.parquet and, where it
            was measured, flatness.json. A run without metrics.json has not ended and is left out.
        rows: names in the order of the table.
        complete: gives every option's value from those that a run has recorded.
        baseline: one of them; the first if not given.

    Returns:
        The Markdown of table.md.

    Raises:
        ValueError: no rows, an unknown baseline, no run that has ended, runs of one row that differ in more than their
            seed, or a published score that the row's task does not have.
    """
    folder = Path(folder)
    baseline = baseline or next(iter(rows), "")
    if baseline not in rows:
        raise ValueError(f"the baseline {baseline!r} is none of the rows {', '.join(rows)}")
    read = [read_row(folder / name, complete) for name in rows]
    results = compare(read, baseline)
    if not results:
        raise ValueError(f"{folder}: no run of {', '.join(rows)} has ended, there is nothing to tabulate")
    figures = draw(folder, results, baseline)
    markdown = to_markdown(read, results, baseline, figures)
    write_text(folder / "table.csv", to_frame(results, baseline).to_csv(index=False))
    write_text(folder / "table.md", markdown)
    return markdown


def read_row(folder: Path, complete: Complete) -> Row:
    """Read the finished runs of one row; a seed counts once all of its folds have ended.

    Raises:
        ValueError: the runs differ in their options, in the splits they were tested on, or in these splits' items.
    """
    runs = [run for run in (*folder.glob("seed_*"), *folder.glob("fold_*/seed_*")) if run.is_dir()]
    by_seed: dict[int, list[Path]] = {}
    for run in sorted(runs):
        by_seed.setdefault(int(run.name.removeprefix("seed_")), []).append(run)
    folds = max(map(len, by_seed.values()), default=0)
    ended = {
        seed: by_seed[seed]
        for seed in sorted(by_seed)
        if len(by_seed[seed]) == folds and all((run / "metrics.json").is_file() for run in by_seed[seed])
    }
    about, recorded = _read_recipes([run for of_seed in ended.values() for run in of_seed])
    return Row(
        name=folder.name,
        about=about,
        recorded=recorded,
        options={name: value for name, value in complete(recorded).items() if name not in _OF_THE_RUN},
        seeds=list(ended),
        folds=max(folds, 1),
        splits=_read_splits(folder, ended),
        flatness=[json.loads(path.read_text()) for of_seed in ended.values() for path in _flatness_files(of_seed)],
    )


def _flatness_files(runs: Iterable[Path]) -> list[Path]:
    return [run / "flatness.json" for run in runs if (run / "flatness.json").is_file()]


def _read_recipes(runs: Sequence[Path]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a row's recipe says of itself, and its options, which all of its runs must share."""
    about: dict[str, Any] = {}
    recorded: dict[str, Any] | None = None
    for run in runs:
        content = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))
        about = content.pop("about", {})
        options = {name: value for name, value in content.items() if name not in _OF_THE_RUN}
        if recorded is not None and options != recorded:
            raise ValueError(
                f"{run / 'recipe.yaml'} has other options than {runs[0]}: give these runs rows of their own"
            )
        recorded = options
    return about, recorded or {}


def _read_splits(folder: Path, runs: Mapping[int, Sequence[Path]]) -> dict[str, SplitPredictions]:
    tables = []
    for seed, of_seed in runs.items():
        table = pd.concat([read_predictions(run / "predictions.parquet") for run in of_seed])
        tables.append(table[table["split"] != "validation"].assign(seed=seed))
    if not tables:
        return {}
    by_split = pd.concat(tables).groupby("split", sort=False)
    return {str(split): _one_split(f"{folder}, {split}", rows, len(runs)) for split, rows in by_split}


def _one_split(source: str, rows: pd.DataFrame, seeds: int) -> SplitPredictions:
    labelled = rows[rows["label"].notna()]
    if labelled.duplicated(["seed", "row_id"]).any():
        raise ValueError(f"{source}: items were predicted twice with one seed; do its folds overlap?")
    truth = labelled.drop_duplicates(["row_id", "label", "patient_id"]).set_index("row_id")[["label", "patient_id"]]
    predictions = labelled.pivot(index="seed", columns="row_id", values="prediction")
    if truth.index.has_duplicates or len(predictions) != seeds or predictions.isna().to_numpy().any():
        raise ValueError(f"{source}: the seeds were tested on different items or labels; train the odd ones again")
    items = truth.loc[predictions.columns].astype({"label": np.int64})
    unlabelled = rows.loc[rows["label"].isna(), "row_id"].nunique()
    return SplitPredictions(items, predictions.to_numpy(np.int64), unlabelled)


def compare(rows: Sequence[Row], baseline: str) -> list[Result]:
    """Score every row on every test split, against the baseline's row; in the order of tables, then of rows."""
    base = next(row for row in rows if row.name == baseline)
    results = [_compare_split(row, split, base) for row in rows for split in row.splits]
    groups = list(dict.fromkeys(result.group for result in results))
    return sorted(results, key=lambda result: groups.index(result.group))


def _compare_split(row: Row, split: str, base: Row) -> Result:
    ours, task = row.splits[split], row.task
    labels, patients = ours.items["label"].to_numpy(), ours.items["patient_id"].to_numpy(str)
    settings: dict[str, Any] = {"statistic": task.rates, "num_classes": len(task.classes), "resamples": RESAMPLES}
    why_not = _why_not_compared(row, split, base)
    differences: dict[str, Difference] = {}
    if row is not base and not why_not:
        theirs = base.splits[split].predictions
        differences = paired_difference_ci(labels, ours.predictions, theirs, patients, **settings)
    return Result(
        row=row,
        group=Group(row.options["dataset"], split, task.name),
        scores=summarize_seeds([{split: task.scores(labels, p)} for p in ours.predictions], task)[split],
        intervals=bootstrap_ci(labels, ours.predictions, patients, **settings),
        differences=differences,
        not_compared=why_not,
        published=_published(row, split),
    )


def _why_not_compared(row: Row, split: str, base: Row) -> str:
    """Give the reason for which two rows are not compared on a split, an empty string if they are."""
    if split not in base.splits or row.options["dataset"] != base.options["dataset"]:
        return f"{base.name} was not tested on {row.options['dataset']} {split}"
    if row.task != base.task:
        return f"{base.name} is of the task {base.task.name}"
    if not row.splits[split].items.equals(base.splits[split].items):
        return f"{base.name} was tested on other items or labels"
    return ""


def _published(row: Row, split: str) -> dict[str, tuple[float, float | None]]:
    """Give what was published for a row on a split: `{score: value}`, or with several test splits `{split: {...}}`."""
    published = row.about.get("published") or {}
    scores = published.get(split, published if len(row.splits) == 1 else {})
    if unknown := sorted(set(scores) - set(row.task.titles)):
        raise ValueError(
            f"{row.name}: published {unknown[0]!r} is no score of the task {row.task.name}, which has "
            f"{', '.join(row.task.titles)}"
        )
    parts = {score: [float(part) for part in str(value).split("±")] for score, value in scores.items()}
    return {score: (part[0], part[1] if len(part) > 1 else None) for score, part in parts.items()}


def changed(row: Row, base: Row) -> str:
    """List the options in which a row differs from the baseline."""
    if row is base:
        return "baseline"
    ours, theirs = row.options, base.options
    names = [name for name in ours if ours[name] != theirs.get(name) and name in {*row.recorded, *base.recorded}]
    return ", ".join(f"{name} {_show(theirs.get(name))} → {_show(ours[name])}" for name in names) or "nothing"


def _show(value: Any) -> str:
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def to_frame(results: Sequence[Result], baseline: str) -> pd.DataFrame:
    """Make a tidy table, one line per row, test split and score, and one per row and measure of flatness.

    Columns: dataset, split, task, row, score; mean, sd (ddof=1) and n over seeds; low and high, the 95 % interval of
    the mean; baseline, difference, difference_low, difference_high, excludes_zero; published, published_sd, source;
    selection, the rule by which the epoch was chosen. What does not exist is empty.
    """
    lines = []
    for result in results:
        row = result.row
        shared = {**result.group._asdict(), "row": row.name, "selection": row.selection}
        for score in row.task.titles:
            difference = result.differences.get(score, Difference(None, None))
            mean, deviation = result.published.get(score, (None, None))
            lines.append(
                {
                    **shared,
                    "score": score,
                    **{name: result.scores[score][name] for name in ("mean", "sd", "n")},
                    **_ends(result.intervals[score]),
                    "baseline": baseline if result.differences else None,
                    "difference": difference.value,
                    **_ends(difference.interval, "difference_"),
                    "excludes_zero": difference.excludes_zero,
                    "published": mean,
                    "published_sd": deviation,
                    "source": row.about.get("source") if score in result.published else None,
                }
            )
    for row in {result.row.name: result.row for result in results}.values():
        shared = {"dataset": row.options["dataset"], "split": "train", "row": row.name, "selection": row.selection}
        lines += [{**shared, "score": name, **measured} for name, measured in _flatness(row).items()]
    order = ["dataset", "split", "task", "row", "score", "mean", "sd", "n"]
    frame = pd.DataFrame(lines)
    return frame[[*order, *(name for name in frame.columns if name not in order)]]


def _ends(interval: Sequence[float] | None, prefix: str = "") -> dict[str, float | None]:
    low, high = (None, None) if interval is None else interval
    return {f"{prefix}low": low, f"{prefix}high": high}


def _flatness(row: Row) -> dict[str, dict[str, float | int | None]]:
    """Mean and deviation of each measure over the runs that have it."""
    measures: dict[str, dict[str, float | int | None]] = {}
    for name in dict.fromkeys(name for measured in row.flatness for name in measured):
        values = [measured[name] for measured in row.flatness if name in measured]
        sd = float(np.std(values, ddof=1)) if len(values) > 1 else None
        measures[name] = {"mean": float(np.mean(values)), "sd": sd, "n": len(values)}
    return measures


def to_markdown(
    rows: Sequence[Row], results: Sequence[Result], baseline: str, figures: Mapping[Group, Sequence[str]]
) -> str:
    """Write one table for each group of results, each with its notes and figures, and notes on all of them.

    Args:
        rows: every row that was asked for, finished or not.
        results: of `compare`.
        baseline: name of the baseline's row.
        figures: names of image files beside the table.
    """
    base = next(row for row in rows if row.name == baseline)
    sections = []
    for group, members in groupby(results, key=lambda result: result.group):
        together = list(members)
        images = "\n".join(f"![{file.removesuffix('.png')}]({file})" for file in figures.get(group, ()))
        parts = [
            f"### {group.dataset} {group.split}, {group.task}",
            _table(together, base),
            _group_notes(together),
            images,
        ]
        sections.append("\n\n".join(part for part in parts if part))
    return "\n\n".join([*sections, _notes(rows, results, baseline)]) + "\n"


def _table(results: Sequence[Result], base: Row) -> str:
    task = results[0].row.task
    headline = task.titles[task.headline]
    flatness = [name for name in _FLATNESS_TITLES if any(name in _flatness(result.row) for result in results)]
    titles = ["row", "changed, or source", "seeds", "epoch", *task.titles.values(), f"95 % of {headline}"]
    titles += [
        f"Δ {headline} to {base.name}",
        "95 % of Δ",
        "excludes 0",
        *(_FLATNESS_TITLES[name] for name in flatness),
    ]
    numbers = len(titles) - 4
    lines = [titles, ["---"] * 2 + ["---:", "---"] + ["---:"] * numbers]
    for result in results:
        row, difference = result.row, result.differences.get(task.headline, Difference(None, None))
        lines.append(
            [
                f"`{row.name}`",
                changed(row, base),
                str(len(row.seeds)),
                row.selection,
                *(format_mean_sd(result.scores[score]["mean"], result.scores[score]["sd"]) for score in task.titles),
                _format_interval(result.intervals[task.headline]),
                "–" if difference.value is None else _signed(difference.value),
                _format_interval(difference.interval, signed=True),
                {True: "yes", False: "no", None: "–"}[difference.excludes_zero],
                *(_format_measure(_flatness(row).get(name)) for name in flatness),
            ]
        )
        if result.published:
            scores = [format_mean_sd(*result.published.get(score, (None, None))) for score in task.titles]
            told = [row.about.get("source", "no source"), "", row.about.get("selection", "see source")]
            lines.append([f"*{row.name}, published*", *told, *scores, *["–"] * (numbers - len(scores))])
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")


def _format_interval(interval: Sequence[float] | None, signed: bool = False) -> str:
    if interval is None:
        return "–"
    return " to ".join(_signed(end) if signed else f"{end:.2f}" for end in interval)


def _format_measure(measured: Mapping[str, Any] | None) -> str:
    if measured is None:
        return "–"
    return f"{measured['mean']:.3g}" + ("" if measured["sd"] is None else f" ± {measured['sd']:.2g}")


def _group_notes(results: Sequence[Result]) -> str:
    """What a table's columns mean, on whom its numbers stand, and which rows were not compared."""
    task = results[0].row.task
    notes = [task.definition]
    tested: dict[str, list[str]] = {}
    for result in results:
        part, missing = result.predicted, result.row.options["allow_missing_audio"]
        counted = f"{len(part.items):,} items of {part.items['patient_id'].nunique()} patients"
        counted += f"; {part.unlabelled} without a label in this task, not scored"
        counted += "; part of the dataset only, so published scores are of other items" if missing else ""
        tested.setdefault(counted, []).append(result.row.name)
    for counted, names in tested.items():
        notes.append(f"Tested on {counted}" + (f" ({', '.join(names)})." if len(tested) > 1 else "."))
    notes += [f"{result.row.name} is not compared: {result.not_compared}." for result in results if result.not_compared]
    return "\n".join(f"- {note}" for note in notes)


def _notes(rows: Sequence[Row], results: Sequence[Result], baseline: str) -> str:
    """What holds for all tables: intervals, number of comparisons, and what is unfinished."""
    comparisons = sum(1 for result in results if result.differences)
    notes = [
        "Mean ± standard deviation over seeds, in percent. Intervals are 95 % of a bootstrap that draws patients and, "
        "with more than one seed, seeds: they hold the variation between patients and that of training, the latter "
        "roughly where seeds are few.",
        f"Δ is the difference from `{baseline}` on the same items, both scored on the same patients in each resample.",
        f"Comparisons of a headline score: {comparisons}, without correction for their number. Were there nothing to "
        "find, about one in twenty would exclude 0 all the same.",
    ]
    if any(result.published for result in results):
        notes.append("Published rows are as their source gives them, by its own rule for choosing the epoch.")
    if any(row.folds > 1 for row in rows):
        notes.append("With folds, a seed's scores are those of all folds' cycles together, not the mean over folds.")
    if any(row.flatness for row in rows):
        notes.append(_FLATNESS_NOTE)
    every = sorted({seed for row in rows for seed in row.seeds})
    for row in rows:
        if list(row.seeds) != every:
            ended = ", ".join(map(str, row.seeds)) or "none"
            notes.append(f"`{row.name}` is unfinished: of the seeds {', '.join(map(str, every))}, ended: {ended}.")
        if row.about.get("published") and row.splits and not any(r.published for r in results if r.row is row):
            notes.append(f"`{row.name}`: its published scores do not say which of {', '.join(row.splits)} they are of.")
    return "\n".join(f"- {note}" for note in notes)


def draw(folder: Path, results: Sequence[Result], baseline: str) -> dict[Group, list[str]]:
    """Draw each group's scores, confusion matrices summed over seeds, and what each option that was varied does."""
    figures: dict[Group, list[str]] = {}
    for group, members in groupby(results, key=lambda result: result.group):
        together = list(members)
        title, task = f"{group.dataset} {group.split}, {group.task}", together[0].row.task
        files = [f"scores_{group.slug}.png", f"confusion_{group.slug}.png"]
        lines = [_score_line(result) for result in together]
        plot_benchmark(lines, folder / files[0], title, task.titles[task.headline], baseline)
        counts = {result.row.name: _summed_confusion(result) for result in together}
        plot_confusion_matrices(counts, task.classes, folder / files[1], f"{title}, summed over seeds")
        for option, varied in sensitivities(together):
            first = next(result.row for result in together if result in varied)
            files.append(f"sensitivity_{option}_{group.slug}_{slug(first.name)}.png")
            scores = [result.scores[task.headline] for result in varied]
            plot_sensitivity(
                [result.row.options[option] for result in varied],
                [score["mean"] for score in scores],
                [score["sd"] for score in scores],
                folder / files[-1],
                f"{first.name} on {group.dataset} {group.split}",
                option,
                task.titles[task.headline],
            )
        figures[group] = files
    return figures


def _score_line(result: Result) -> ScoreLine:
    headline = result.row.task.headline
    score, published = result.scores[headline], result.published.get(headline)
    interval = result.intervals[headline]
    return ScoreLine(result.row.name, score["mean"], score["sd"], interval, None if published is None else published[0])


def _summed_confusion(result: Result) -> NDArray:
    labels, size = result.predicted.items["label"].to_numpy(), len(result.row.task.classes)
    return sum(confusion_counts(labels, predicted, size) for predicted in result.predicted.predictions)  # type: ignore


def sensitivities(results: Sequence[Result]) -> list[tuple[str, list[Result]]]:
    """Find the numeric options of which at least three values occur among rows that are otherwise equal.

    Args:
        results: of one group.

    Returns:
        Pairs of an option's name and the results, one for each of its values, ascending.
    """
    found = []
    options = [result.row.options for result in results]
    numeric = {name for of_row in options for name, v in of_row.items() if type(v) in (int, float)}
    for option in sorted(numeric):
        alike: dict[str, dict[float, Result]] = {}
        for result, of_row in zip(results, options, strict=True):
            value, others = of_row[option], {name: v for name, v in of_row.items() if name != option}
            if type(value) in (int, float) and result.scores[result.row.task.headline]["mean"] is not None:
                alike.setdefault(json.dumps(others, sort_keys=True), {}).setdefault(value, result)
        found += [(option, [of[value] for value in sorted(of)]) for of in alike.values() if len(of) >= 3]
    return found


def slug(name: str) -> str:
    """Give a name as part of a file's."""
    return re.sub(r"[^\w.-]+", "-", name)

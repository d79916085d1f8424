"""The table of a benchmark: finished runs, row by row, against each other and against what was published."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pandas as pd

from .benchmark_figures import draw
from .benchmark_results import Group, Result, compare
from .benchmark_rows import Complete, Row, read_row
from .bootstrap import Difference
from .report import format_interval, format_mean_sd, mean_sd, write_text

_FLATNESS_TITLES = {
    "loss": "loss",
    "increase_gradient": "along the gradient",
    "increase_worst": "largest found",
    "increase_adaptive": "relative to the weights",
    "top_eigenvalue": "top eigenvalue",
}
_FLATNESS_NOTE = (
    "Of the plain cross-entropy of training cycles: the loss, its increase at distance ρ along the gradient, the "
    "largest increase that gradient ascent finds within ρ, the increase at 10 ρ relative to the weights (ASAM), and "
    "the Hessian's largest eigenvalue. Only the relative increase may be compared between heads, none between "
    "architectures; all shrink with the loss beside them. Mean ± standard deviation over runs."
)


def write_benchmark(
    folder: str | Path,
    references: Mapping[str, str],
    complete: Complete,
    seeds: Sequence[int],
    folds: Sequence[int] = (),
) -> str:
    """Write table.md, table.csv and figures over the finished runs of a benchmark's folder.

    Scores are made anew from each run's predictions. With folds, a seed's are those of all folds' cycles together, and
    other datasets' splits, which every fold's model predicts, are left out. Rows share a table if dataset, test split,
    task and protocol are the same; a row is compared with its reference if both predicted the same items with the same
    labels, by `paired_difference_ci`: on the seeds of both, in pairs of one number, or with seeds drawn apart where
    they share none.

    Args:
        folder: holds ROW/seed_N, or ROW/fold_K/seed_N, with recipe.yaml, metrics.json, predictions.parquet and, where
            it was measured, flatness.json. A run without metrics.json has not ended and is left out.
        references: {row: row that it is compared with}, in the order of the table; a baseline's is itself.
        complete: gives every option's value from those that a run has recorded.
        seeds: those asked for; others in the folder are left alone.
        folds: those asked for, if any; a seed counts once all of these have ended.

    Returns:
        The Markdown of table.md.

    Raises:
        ValueError: a reference is none of the rows, no run has ended, runs of one row differ in more than their seed,
            or a published score is none of its row's task.
    """
    folder = Path(folder)
    rows = [read_row(folder / name, complete, seeds, folds) for name in references]
    results = compare(rows, references)
    if not results:
        raise ValueError(f"{folder}: no run of {', '.join(references)} has ended, there is nothing to tabulate")
    markdown = to_markdown(rows, results, seeds, folds, draw(folder, results))
    write_text(folder / "table.csv", to_frame(results).to_csv(index=False))
    write_text(folder / "table.md", markdown)
    return markdown


def to_frame(results: Sequence[Result]) -> pd.DataFrame:
    """Make a tidy table, one line per row, test split and score, and one per row and measure of flatness.

    Columns: dataset, split, task, protocol, row, score; mean, sd (ddof=1) and n over seeds; low and high, the 95 %
    interval of the mean; reference, difference, difference_low, difference_high, excludes_zero; published,
    published_sd, source; selection, the rule by which the epoch was chosen. What does not exist is empty.
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
                    "reference": result.reference.name if result.differences else None,
                    "difference": difference.value,
                    **_ends(difference.interval, "difference_"),
                    "excludes_zero": difference.excludes_zero,
                    "published": mean,
                    "published_sd": deviation,
                    "source": row.about.get("source") if score in result.published else None,
                }
            )
    for result in {result.row.name: result for result in results}.values():
        row, group = result.row, result.group._replace(split="train")
        shared = {**group._asdict(), "row": row.name, "selection": row.selection}
        for name, measured in _flatness(row).items():
            lines.append({**shared, "score": name, **{key: measured[key] for key in ("mean", "sd", "n")}})
    order = [*Group._fields, "row", "score", "mean", "sd", "n"]
    frame = pd.DataFrame(lines)
    return frame[[*order, *(name for name in frame.columns if name not in order)]]


def _ends(interval: Sequence[float] | None, prefix: str = "") -> dict[str, float | None]:
    low, high = (None, None) if interval is None else interval
    return {f"{prefix}low": low, f"{prefix}high": high}


def _flatness(row: Row) -> dict[str, dict[str, Any]]:
    """Mean and deviation of each measure over the runs that have it."""
    names = dict.fromkeys(name for measured in row.flatness for name in measured)
    return {name: mean_sd([measured.get(name) for measured in row.flatness]) for name in names}


def to_markdown(
    rows: Sequence[Row],
    results: Sequence[Result],
    seeds: Sequence[int],
    folds: Sequence[int],
    figures: Mapping[Group, Sequence[str]],
) -> str:
    """Write one table for each group of results, flatness, links to figures, and notes.

    Args:
        rows: every row that was asked for, finished or not.
        results: of `compare`.
        seeds: those asked for.
        folds: those asked for.
        figures: names of image files beside the table.
    """
    sections = []
    for group, members in groupby(results, key=lambda result: result.group):
        together = list(members)
        images = "\n".join(f"![{file.removesuffix('.png')}]({file})" for file in figures[group])
        sections += [f"### {group.title}", _scores_table(together), _group_notes(together), images]
    measured = [row for row in rows if row.flatness]
    if measured:
        sections += ["### Flatness", _flatness_table(measured), f"- {_FLATNESS_NOTE}"]
    drawn = [row for row in rows if row.figures]
    if drawn:
        sections += ["### Figures of each row", "\n".join(map(_links, drawn))]
    return "\n\n".join([*sections, "### Notes", _notes(rows, results, seeds, folds)]) + "\n"


def _scores_table(results: Sequence[Result]) -> str:
    task = results[0].row.task
    headline = task.titles[task.headline]
    titles = ["row", "changed, or source", "seeds", "epoch", *task.titles.values(), f"95 % of {headline}"]
    titles += [f"Δ {headline}", "95 % of Δ", "excludes 0"]
    numbers = len(titles) - 4
    lines = [titles, ["---"] * 2 + ["---:", "---"] + ["---:"] * numbers]
    for result in results:
        row, difference = result.row, result.differences.get(task.headline, Difference(None, None))
        value = difference.value
        lines.append(
            [
                f"`{row.name}`",
                changed(row, result.reference),
                str(len(row.seeds)),
                row.selection,
                *(format_mean_sd(result.scores[score]["mean"], result.scores[score]["sd"]) for score in task.titles),
                format_interval(result.intervals[task.headline]),
                "–" if value is None else f"{value:+.2f}".replace("-", "−") + f" to `{result.reference.name}`",
                format_interval(difference.interval, signed=True),
                {True: "yes", False: "no", None: "–"}[difference.excludes_zero],
            ]
        )
        if result.published:
            scores = [format_mean_sd(*result.published.get(score, (None, None))) for score in task.titles]
            told = [row.about.get("source", "no source"), "", row.about.get("selection", "see source")]
            lines.append([f"*{row.name}, published*", *told, *scores, *["–"] * (numbers - len(scores))])
    return _table(lines)


def changed(row: Row, reference: Row) -> str:
    """List the options in which a row differs from its reference."""
    if row is reference:
        return "baseline"
    if not reference.seeds:
        return f"not known before `{reference.name}` has ended"
    ours, theirs = row.options, reference.options
    names = [name for name in ours if ours[name] != theirs.get(name) and name in {*row.recorded, *reference.recorded}]
    return ", ".join(f"{name} {_show(theirs.get(name))} → {_show(ours[name])}" for name in names) or "nothing"


def _show(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, list):
        return " ".join(map(_show, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _flatness_table(rows: Sequence[Row]) -> str:
    lines = [["row", "runs", *_FLATNESS_TITLES.values()], ["---", *["---:"] * (len(_FLATNESS_TITLES) + 1)]]
    for row in rows:
        measured = _flatness(row)
        values = [measured.get(name, {"mean": None, "sd": None}) for name in _FLATNESS_TITLES]
        cells = [format_mean_sd(value["mean"], value["sd"], ".3g") for value in values]
        lines.append([f"`{row.name}`", str(len(row.flatness)), *cells])
    return _table(lines)


def _table(lines: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _links(row: Row) -> str:
    links = ", ".join(f"[{title}]({quote(path, safe='/=,')})" for title, path in row.figures.items())
    return f"- `{row.name}`, seed {row.seeds[0]}: {links}"


def _group_notes(results: Sequence[Result]) -> str:
    """What a table's columns mean, on whom its numbers stand, and which rows were compared otherwise or not."""
    notes = [results[0].row.task.definition]
    tested: dict[str, list[str]] = {}
    for result in results:
        part, missing = result.predicted, result.row.options["allow_missing_audio"]
        counted = f"{len(part.items):,} items of {part.items['patient_id'].nunique()} patients"
        counted += f"; {part.unlabelled} without a label in this task, not scored"
        counted += "; part of the dataset only, so published scores are of other items" if missing else ""
        tested.setdefault(counted, []).append(f"`{result.row.name}`")
    for counted, names in tested.items():
        notes.append(f"Tested on {counted}" + (f" ({', '.join(names)})." if len(tested) > 1 else "."))
    notes += [f"{result.remark}." for result in results if result.remark]
    return "\n".join(f"- {note}" for note in notes)


def _notes(rows: Sequence[Row], results: Sequence[Result], seeds: Sequence[int], folds: Sequence[int]) -> str:
    """What holds for all tables: intervals, number of comparisons, and what is unfinished."""
    comparisons = sum(1 for result in results if result.differences)
    notes = [
        "Mean ± standard deviation over seeds, in percent. Intervals are 95 % of a bootstrap that draws patients and, "
        "with more than one seed, seeds: they hold the variation between patients and that of training, the latter "
        "roughly where seeds are few.",
        "Δ is the difference from the row named beside it on the same items, both scored on the same patients in each "
        "resample.",
        f"Comparisons of a headline score: {comparisons}, without correction for their number. Were there nothing to "
        "find, about one in twenty would exclude 0 all the same.",
    ]
    if any(result.published for result in results):
        notes.append("Published rows are as their source gives them, by its own rule for choosing the epoch.")
    if len(folds) > 1:
        notes.append("With folds, a seed's scores are those of all folds' cycles together, not the mean over folds.")
    asked = ", ".join(map(str, seeds)) + (f" (each with the folds {', '.join(map(str, folds))})" if folds else "")
    for row in rows:
        if set(row.seeds) != set(seeds):
            ended = ", ".join(map(str, row.seeds)) or "none"
            notes.append(f"`{row.name}` is unfinished: of the seeds {asked}, ended: {ended}.")
        if row.about.get("published") and row.splits and not any(r.published for r in results if r.row is row):
            notes.append(f"`{row.name}`: its published scores do not say that they are of {' or '.join(row.splits)}.")
    return "\n".join(f"- {note}" for note in notes)

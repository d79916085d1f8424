"""The figures of a benchmark: scores side by side, confusion matrices, and what each varied option does."""

import json
from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .benchmark_results import Group, Result, slug
from .icbhi_score.scores import confusion_counts
from .plots import ScoreLine, plot_benchmark, plot_confusion_matrices, plot_sensitivity


def draw(folder: Path, results: Sequence[Result]) -> dict[Group, list[str]]:
    """Draw each group's scores, confusion matrices summed over seeds, and what each option that was varied does.

    Args:
        folder: to write to.
        results: of `compare`.

    Returns:
        Names of the files, by group.
    """
    figures: dict[Group, list[str]] = {}
    for group, members in groupby(results, key=lambda result: result.group):
        together = list(members)
        task = together[0].row.task
        figures[group] = [f"scores_{group.slug}.png", f"confusion_{group.slug}.png"]
        scores, confusion = (folder / name for name in figures[group])
        lines = [_score_line(result) for result in together]
        # The table names each row's own reference; a figure has room for the one that most rows have.
        (reference, _), *_ = Counter(result.reference.name for result in together).most_common()
        plot_benchmark(lines, scores, group.title, task.titles[task.headline], reference)
        counts = {result.row.name: _summed_confusion(result) for result in together}
        plot_confusion_matrices(counts, task.classes, confusion, f"{group.title}, summed over seeds")
        for option, varied in sensitivities(together):
            first = min(varied, key=together.index)  # of the table: the others are this row, changed
            figures[group].append(_draw_sensitivity(folder, first.row.name, option, varied))
    return figures


def _draw_sensitivity(folder: Path, name: str, option: str, varied: Sequence[Result]) -> str:
    group, task = varied[0].group, varied[0].row.task
    file = f"sensitivity_{option}_{group.slug}_{slug(name)}.png"
    scores = [result.scores[task.headline] for result in varied]
    plot_sensitivity(
        [result.row.options[option] for result in varied],
        [score["mean"] for score in scores],
        [score["sd"] for score in scores],
        folder / file,
        f"{name} on {group.tested_on}",
        option,
        task.titles[task.headline],
    )
    return file


def _score_line(result: Result) -> ScoreLine:
    headline = result.row.task.headline
    score, published = result.scores[headline], result.published.get(headline)
    interval = result.intervals[headline]
    return ScoreLine(result.row.name, score["mean"], score["sd"], interval, None if published is None else published[0])


def _summed_confusion(result: Result) -> NDArray:
    labels, size = result.predicted.items["label"].to_numpy(), len(result.row.task.classes)
    return np.sum([confusion_counts(labels, predicted, size) for predicted in result.predicted.predictions], axis=0)


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

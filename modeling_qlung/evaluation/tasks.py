"""What a model is asked: the classes, the column that holds the truth, and the scores by which it is judged."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .icbhi_score.scores import CLASS_NAMES, confusion_counts, defined, icbhi_rates, per_class
from .protocols import SPRSOUND_TASKS, sprsound_rates


@dataclass(frozen=True)
class Task:
    """
    A classification task.

    Args:
        name: what `--task` calls it.
        classes: names in the order of the model's outputs; the first is the normal one.
        column: column of a dataset's rows that holds the truth, a `ClassLabel`.
        config: `cycles` or `recordings`, the rows that are classified.
        rates: maps confusion matrices (..., C, C) to named scores (...) in percent, NaN where undefined.
        titles: heading of each score in tables.
        headline: the score that chooses the epoch.
        sensitivity: the score that the headline balances against `specificity`.
        definition: of the scores, a sentence or two for readers.
        others: class of all names that `classes` does not list; None leaves them without label.
    """

    name: str
    classes: tuple[str, ...]
    column: str
    config: str
    rates: Callable[[ArrayLike], dict[str, NDArray]]
    titles: Mapping[str, str]
    headline: str
    sensitivity: str
    definition: str
    others: str | None = None

    def index(self, name: str) -> int | None:
        """Give the class of a name in the dataset's own spelling, None for one that has no place in this task."""
        name = name if name in self.classes else self.others  # type: ignore[assignment]
        return None if name is None else self.classes.index(name)

    def scores(self, labels: ArrayLike, predictions: ArrayLike) -> dict[str, Any]:
        """Score predicted classes (n,) against true ones (n,); see `scores_from_confusion`.

        Raises:
            ValueError: see `confusion_counts`.
        """
        return self.scores_from_confusion(confusion_counts(labels, predictions, len(self.classes)))

    def scores_from_confusion(self, confusion: NDArray) -> dict[str, Any]:
        """Give every score and the `recall` per class in percent, None where undefined, and the counts."""
        rates = {name: defined(value) for name, value in self.rates(confusion).items()}
        return {**rates, **per_class(confusion, self.classes)}


def binary_rates(confusion: ArrayLike) -> dict[str, NDArray]:
    """Specificity, sensitivity and their mean of a model with two outputs, from (..., 2, 2) counts."""
    rates = icbhi_rates(np.asarray(confusion))
    return {
        "specificity": rates["specificity"],
        "sensitivity_two_output": rates["sensitivity_2class"],
        "score_two_output": rates["score_2class"],
    }


_FOUR_CLASS_TITLES = {
    "specificity": "Sp",
    "sensitivity_4class": "Se (4-class)",
    "score_4class": "Score (4-class)",
    "sensitivity_2class": "Se (2-class)",
    "score_2class": "Score (2-class)",
}
_FOUR_CLASS_DEFINITION = (
    "Sp = correct normals / normals. Se (4-class) counts an abnormal cycle only when it is given exactly its class, Se "
    "(2-class) when it is given any abnormal class. Score = (Sp + Se) / 2; a 4-class and a 2-class score are not "
    "comparable."
)
_TWO_OUTPUT_TITLES = {
    "specificity": "Sp",
    "sensitivity_two_output": "Se (two-output)",
    "score_two_output": "Score (two-output)",
}
_TWO_OUTPUT_DEFINITION = (
    "The model has two outputs, normal and abnormal: these are not the scores of four classes collapsed to two. Sp = "
    "correct normals / normals, Se = correct abnormals / abnormals, Score = (Sp + Se) / 2."
)
_SPRSOUND_TITLES = {
    "sensitivity": "SE",
    "specificity": "SP",
    "average_score": "AS",
    "harmonic_score": "HS",
    "score": "Score",
}
_SPRSOUND_DEFINITION = (
    "SP = correct normals / normals, SE = items of the other classes given exactly their class / items of the other "
    "classes, AS = (SE + SP) / 2, HS = 2 SE SP / (SE + SP), Score = (AS + HS) / 2."
)


def _challenge(task: str) -> Task:
    """One of SPRSound's challenge tasks; 1-x are on events, 2-x on recordings."""
    column, config = ("event_type", "cycles") if task.startswith("1") else ("record_label", "recordings")
    others = "Adventitious" if task.endswith("-1") else None
    scores = (sprsound_rates, _SPRSOUND_TITLES, "score", "sensitivity", _SPRSOUND_DEFINITION)
    return Task(task, SPRSOUND_TASKS[task], column, config, *scores, others)


FOUR_CLASS = Task(
    "4-class",
    CLASS_NAMES,
    "label",
    "cycles",
    icbhi_rates,
    _FOUR_CLASS_TITLES,
    "score_4class",
    "sensitivity_4class",
    _FOUR_CLASS_DEFINITION,
)
TWO_OUTPUT = Task(
    "two-output",
    ("normal", "abnormal"),
    "label",
    "cycles",
    binary_rates,
    _TWO_OUTPUT_TITLES,
    "score_two_output",
    "sensitivity_two_output",
    _TWO_OUTPUT_DEFINITION,
    others="abnormal",
)
TASKS = {task.name: task for task in (FOUR_CLASS, TWO_OUTPUT, *map(_challenge, SPRSOUND_TASKS))}


def task_of(classes: Sequence[str]) -> Task:
    """Give the task that a checkpoint with these classes was trained for.

    Raises:
        ValueError: there is none.
    """
    for task in TASKS.values():
        if task.classes == tuple(classes):
            return task
    known = "; ".join(f"{task.name} ({', '.join(task.classes)})" for task in TASKS.values())
    raise ValueError(f"no task has the classes {', '.join(classes)}: those known are {known}")

"""SPRSound's four challenge tasks (IEEE BioCAS 2022 and 2023 grand challenges on respiratory sound classification)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .icbhi_score.scores import confusion_counts, defined, per_class, percent

EVENT_TYPES = ("Normal", "Rhonchi", "Wheeze", "Stridor", "Coarse Crackle", "Fine Crackle", "Wheeze+Crackle")
RECORD_LABELS = ("Normal", "CAS", "DAS", "CAS & DAS", "Poor Quality")

# Task 1 is on events, task 2 on recordings; the first class is the negative one.
SPRSOUND_TASKS: dict[str, tuple[str, ...]] = {
    "1-1": ("Normal", "Adventitious"),
    "1-2": EVENT_TYPES,
    "2-1": ("Normal", "Adventitious", "Poor Quality"),
    "2-2": RECORD_LABELS,
}
_FINER_CLASSES = {"1-1": EVENT_TYPES, "2-1": RECORD_LABELS}


def sprsound_rates(confusion: ArrayLike) -> dict[str, NDArray]:
    """SE, SP, AS, HS and the task's score of one confusion matrix, or of a stack of them at once.

    SP = correct normals / normals. SE = items of the other classes given exactly their class / items of the other
    classes; in tasks 2-1 and 2-2 Poor Quality is one of the other classes. AS = (SE + SP) / 2,
    HS = 2 SE SP / (SE + SP) (0 where both are 0), score = (AS + HS) / 2. The challenge's repository names these
    measures without formulas; the exact class is the ICBHI challenge's rule and the stricter reading. Code that first
    merges all classes but normal computes an easier measure, not comparable with this one in tasks 1-2, 2-1 and 2-2.

    Args:
        confusion: (..., C, C) counts, rows the truth, class 0 normal.

    Returns:
        Arrays of shape (...) in percent, NaN where the classes that a score needs are absent.
    """
    counts = np.asarray(confusion, dtype=np.float64)
    exact = np.diagonal(counts, axis1=-2, axis2=-1)
    support = counts.sum(axis=-1)
    specificity = percent(exact[..., 0], support[..., 0])
    sensitivity = percent(exact[..., 1:].sum(axis=-1), support[..., 1:].sum(axis=-1))
    total = sensitivity + specificity
    average = total / 2
    # Where the total is 0 the numerator is 0 too, and so is the limit; NaN stays NaN.
    harmonic = 2 * sensitivity * specificity / np.where(total == 0, 1.0, total)
    return {
        "sensitivity": sensitivity,
        "specificity": specificity,
        "average_score": average,
        "harmonic_score": harmonic,
        "score": (average + harmonic) / 2,
    }


def sprsound_scores(labels: Sequence[str | int], predictions: Sequence[str | int], task: str) -> dict[str, Any]:
    """Score one of the challenge's tasks.

    Args:
        labels: (n,) true classes, either names in SPRSound's own spelling (`SPRSOUND_TASKS`; in tasks 1-1 and 2-1 the
            names of 1-2 and 2-2 are taken too, and their adventitious ones merged) or indices into the task's classes.
        predictions: (n,) predicted classes, likewise.
        task: "1-1" normal / adventitious events, "1-2" seven classes of events, "2-1" normal / adventitious / poor
            quality recordings, "2-2" five classes of recordings.

    Returns:
        `sensitivity`, `specificity`, `average_score`, `harmonic_score`, `score` (see `sprsound_rates`) and `recall` per
        class in percent (0..100), None where undefined; `support` per class; `confusion_matrix`, rows the truth.

    Raises:
        ValueError: an unknown task or class, empty input, or lengths that differ.
    """
    if task not in SPRSOUND_TASKS:
        raise ValueError(f"unknown SPRSound task {task!r}: choose one of {', '.join(SPRSOUND_TASKS)}")
    classes = SPRSOUND_TASKS[task]
    counts = confusion_counts(_indices(labels, task), _indices(predictions, task), len(classes))
    rates = {name: defined(value) for name, value in sprsound_rates(counts).items()}
    return {**rates, **per_class(counts, classes)}


def _indices(values: Sequence[str | int], task: str) -> NDArray:
    """Names to indices into the task's classes; indices pass through and are checked where they are counted."""
    names = list(values)
    if not any(isinstance(name, str) for name in names):
        return np.asarray(names)
    classes = SPRSOUND_TASKS[task]
    index: dict[Any, int] = {name: classes.index("Adventitious") for name in _FINER_CLASSES.get(task, ())}
    index |= {name: position for position, name in enumerate(classes)}
    unknown = [name for name in names if name not in index]
    if unknown:
        raise ValueError(f"task {task} has no class {unknown[0]!r}: its classes are {', '.join(index)}")
    return np.array([index[name] for name in names])

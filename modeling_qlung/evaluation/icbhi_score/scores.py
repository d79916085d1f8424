"""The ICBHI 2017 score, 4-class and 2-class, from labels or from a confusion matrix.

Only numpy is imported here: `evaluate` copies this file beside the metric, and training calls it at every epoch.
"""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

CLASS_NAMES = ("normal", "crackle", "wheeze", "both")


def confusion_counts(labels: ArrayLike, predictions: ArrayLike, num_classes: int = len(CLASS_NAMES)) -> NDArray:
    """Count the pairs of true and predicted class.

    Args:
        labels: (n,) true classes, integers 0..num_classes-1.
        predictions: (n,) predicted classes, integers 0..num_classes-1.
        num_classes: number of classes C.

    Returns:
        (C, C) integer counts, rows the truth, columns the prediction.

    Raises:
        ValueError: the inputs are empty, not 1-D, differ in length, or hold anything but integers 0..C-1.
    """
    truth = _class_indices(labels, "labels", num_classes)
    predicted = _class_indices(predictions, "predictions", num_classes)
    if len(truth) != len(predicted):
        raise ValueError(f"{len(truth)} labels but {len(predicted)} predictions: give one prediction per label")
    if not len(truth):
        raise ValueError("labels and predictions are empty: there is nothing to score")
    pairs = np.bincount(truth * num_classes + predicted, minlength=num_classes**2)
    return pairs.reshape(num_classes, num_classes)


def _class_indices(values: ArrayLike, name: str, num_classes: int) -> NDArray:
    array = np.asarray(values)
    if array.ndim != 1:
        raise ValueError(f"{name} must be 1-D, one class per item, got shape {array.shape}")
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{name} must be integers, got {array.dtype}: cast them, or take the argmax of logits")
    wrong = array[(array < 0) | (array >= num_classes)]
    if wrong.size:
        raise ValueError(
            f"{name} hold {wrong[0]}, outside the classes 0..{num_classes - 1}; leave unlabelled items out"
        )
    return array.astype(np.int64)


def percent(hits: NDArray, total: NDArray) -> NDArray:
    """100 · hits / total elementwise, NaN where total is 0."""
    return np.divide(100.0 * hits, total, out=np.full(np.shape(total), np.nan), where=np.asarray(total) > 0)


def defined(value: Any) -> float | None:
    """A plain float, or None (null in JSON) for NaN."""
    return None if np.isnan(value) else float(value)


def icbhi_rates(confusion: ArrayLike) -> dict[str, NDArray]:
    """The five headline scores of one confusion matrix, or of a stack of them at once.

    Class 0 is normal. Specificity = correct normals / normals. The 4-class sensitivity (Rocha et al. 2019, the measure
    that most papers report) counts an abnormal cycle only when it is given exactly its class, the 2-class sensitivity
    when it is given any abnormal class. Score = (specificity + sensitivity) / 2.

    Args:
        confusion: (..., C, C) counts, rows the truth.

    Returns:
        Arrays of shape (...) in percent, NaN where the classes that a score needs are absent.
    """
    counts = np.asarray(confusion, dtype=np.float64)
    exact = np.diagonal(counts, axis1=-2, axis2=-1)
    support = counts.sum(axis=-1)
    abnormal = support[..., 1:].sum(axis=-1)
    specificity = percent(exact[..., 0], support[..., 0])
    sensitivity_4class = percent(exact[..., 1:].sum(axis=-1), abnormal)
    sensitivity_2class = percent(counts[..., 1:, 1:].sum(axis=(-2, -1)), abnormal)
    return {
        "specificity": specificity,
        "sensitivity_4class": sensitivity_4class,
        "score_4class": (specificity + sensitivity_4class) / 2,
        "sensitivity_2class": sensitivity_2class,
        "score_2class": (specificity + sensitivity_2class) / 2,
    }


def per_class(confusion: NDArray, class_names: tuple[str, ...]) -> dict[str, Any]:
    """Recall in percent (None for an absent class), support and the counts themselves, ready for JSON."""
    support = confusion.sum(axis=-1)
    recall = percent(np.diagonal(confusion), support)
    return {
        "recall": {name: defined(value) for name, value in zip(class_names, recall, strict=True)},
        "support": {name: int(value) for name, value in zip(class_names, support, strict=True)},
        "confusion_matrix": confusion.astype(int).tolist(),
    }


def scores_from_confusion(confusion: ArrayLike) -> dict[str, Any]:
    """Every ICBHI score of one confusion matrix.

    Args:
        confusion: (4, 4) counts in the order normal, crackle, wheeze, both; rows the truth.

    Returns:
        `specificity`, `sensitivity_4class`, `score_4class`, `sensitivity_2class`, `score_2class` (see `icbhi_rates`)
        and `recall` per class in percent (0..100), None where undefined; `support` per class; `confusion_matrix`.

    Raises:
        ValueError: the matrix is not 4 x 4.
    """
    counts = np.asarray(confusion)
    if counts.shape != (len(CLASS_NAMES),) * 2:
        raise ValueError(f"the ICBHI score needs a 4 x 4 confusion matrix, got shape {counts.shape}")
    rates = {name: defined(value) for name, value in icbhi_rates(counts).items()}
    return {**rates, **per_class(counts, CLASS_NAMES)}


def icbhi_scores(labels: ArrayLike, predictions: ArrayLike) -> dict[str, Any]:
    """Every ICBHI score of predicted cycles, in percent (0..100) as the papers' tables give them.

    Args:
        labels: (n,) true classes; 0 normal, 1 crackle, 2 wheeze, 3 both.
        predictions: (n,) predicted classes.

    Returns:
        What `scores_from_confusion` returns.

    Raises:
        ValueError: see `confusion_counts`.
    """
    return scores_from_confusion(confusion_counts(labels, predictions))

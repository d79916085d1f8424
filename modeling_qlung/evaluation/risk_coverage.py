"""What abstaining buys: the error among the items that are answered, as fewer and fewer are."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True)
class RiskCoverage:
    """
    A risk-coverage curve (El-Yaniv & Wiener 2010): items are answered in the order of a score, the surest first.

    Args:
        coverage: share of the items answered, rising to 1, shape (points,).
        risk: share of the answered ones that are wrong, (points,).
        area: mean risk over all coverages (AURC, Geifman & El-Yaniv 2017); a score that says nothing has the risk of
            full coverage.
    """

    coverage: NDArray
    risk: NDArray
    area: float

    def at(self, coverage: float) -> float:
        """Give the risk at a coverage in (0, 1]."""
        return float(np.interp(coverage, self.coverage, self.risk))


def risk_coverage(wrong: ArrayLike, score: ArrayLike) -> RiskCoverage:
    """Trace the risk of answering only the items whose score is highest.

    Items of equal score are answered in random order; the curve is what is expected of it.

    Args:
        wrong: whether each answer is wrong, (n,).
        score: the higher, the sooner an item is answered, (n,).

    Raises:
        ValueError: there is no item, lengths differ, or a score is NaN.
    """
    errors, scores = np.asarray(wrong, dtype=float), np.asarray(score, dtype=float)
    if not errors.size or errors.shape != scores.shape:
        raise ValueError(f"{errors.size} answers and {scores.size} scores: give one of each per item.")
    if np.isnan(scores).any():
        raise ValueError(f"{int(np.isnan(scores).sum())} of {scores.size} scores are NaN: leave these items out.")
    _, inverse, counts = np.unique(-scores, return_inverse=True, return_counts=True)
    expected = (np.bincount(inverse, weights=errors) / counts)[np.sort(inverse)]  # of equal scores, their mean error
    answered = np.arange(1, errors.size + 1)
    risk = np.cumsum(expected) / answered
    return RiskCoverage(answered / errors.size, risk, float(risk.mean()))


def selective_scores(predictions: pd.DataFrame) -> dict[str, RiskCoverage]:
    """Trace abstention by the recording's quality and by the model's confidence, on one split's labelled rows.

    Args:
        predictions: rows of `report.read_predictions`, of one split; at least one with a label and a quality.

    Returns:
        `quality` and `confidence` (the highest of the softmax).
    """
    known = predictions[predictions["label"].notna() & predictions["quality"].notna()]
    wrong = (known["label"] != known["prediction"]).to_numpy(bool)
    logits = np.stack(known["logits"].to_numpy()).astype(float)
    confidence = 1 / np.exp(logits - logits.max(axis=1, keepdims=True)).sum(axis=1)
    return {"quality": risk_coverage(wrong, known["quality"]), "confidence": risk_coverage(wrong, confidence)}

"""Scores, intervals, reports, plots and the model card.

The names below need numpy alone. The others stand in their modules, so that a score costs no pandas, matplotlib or
`evaluate` import: `report` (predictions and metrics files), `plots`, `model_card`, `icbhi_score` (the metric that
`evaluate.load` opens by its path).
"""

from .bootstrap import bootstrap_ci
from .icbhi_score.scores import (
    CLASS_NAMES,
    confusion_counts,
    icbhi_scores,
    scores_from_confusion,
)
from .protocols import sprsound_scores

__all__ = [
    "CLASS_NAMES",
    "bootstrap_ci",
    "confusion_counts",
    "icbhi_scores",
    "scores_from_confusion",
    "sprsound_scores",
]

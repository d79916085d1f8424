"""The ICBHI score as a metric of the `evaluate` library, opened by the path of this folder."""

from typing import Any

import datasets
import evaluate
import numpy as np

# `evaluate` loads this file on its own and copies beside it only what a one-dot import names.
from .scores import icbhi_scores

_DESCRIPTION = """\
Scores of the ICBHI 2017 challenge on respiratory cycles, in percent: specificity (correct normals / normals),
sensitivity and score, 4-class (an abnormal cycle must get exactly its class) and 2-class (any abnormal class counts),
with the recall and support of each class and the confusion matrix. Score = (specificity + sensitivity) / 2."""

_INPUTS = """\
Args:
    predictions: predicted classes; 0 normal, 1 crackle, 2 wheeze, 3 both.
    references: true classes, in the same order.
Returns:
    specificity, sensitivity_4class, score_4class, sensitivity_2class, score_2class: percent, None where undefined.
    recall: percent per class, None for an absent class. support: cycles per class.
    confusion_matrix: 4 x 4 counts, rows the truth.
Example:
    >>> metric = evaluate.load("modeling_qlung/evaluation/icbhi_score")
    >>> metric.compute(predictions=[0, 1, 2, 0], references=[0, 1, 1, 0])["score_4class"]
    75.0"""

_CITATION = """\
@article{rocha2019open,
  title   = {An open access database for the evaluation of respiratory sound classification algorithms},
  author  = {Rocha, Bruno M. and Filos, Dimitris and Mendes, Lu{\\'i}s and others},
  journal = {Physiological Measurement},
  volume  = {40},
  number  = {3},
  pages   = {035001},
  year    = {2019}
}"""


class IcbhiScore(evaluate.Metric):
    """`evaluate.load(".../icbhi_score").compute(predictions=..., references=...)`; the keys of `icbhi_scores`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}),
        )

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, Any]:
        return icbhi_scores(np.asarray(references), np.asarray(predictions))

import itertools

import numpy as np
import pandas as pd
import pytest

from modeling_qlung.evaluation.plots import plot_risk_coverage
from modeling_qlung.evaluation.risk_coverage import risk_coverage, selective_scores


def test_the_surest_are_answered_first():
    curve = risk_coverage([True, False, True, False], [0.1, 0.9, 0.3, 0.6])
    assert curve.coverage.tolist() == [0.25, 0.5, 0.75, 1.0]
    assert curve.risk == pytest.approx([0, 0, 1 / 3, 1 / 2])
    assert curve.area == pytest.approx((1 / 3 + 1 / 2) / 4)
    assert curve.at(0.625) == pytest.approx(1 / 6)


def test_equal_scores_count_as_every_order_of_them_on_average():
    wrong, score = np.array([1, 0, 1, 0, 0]), np.array([0.5, 0.5, 0.5, 0.8, 0.2])
    orders = [[3, *tied, 4] for tied in itertools.permutations([0, 1, 2])]
    expected = np.mean([np.cumsum(wrong[order]) / np.arange(1, 6) for order in orders], axis=0)
    assert risk_coverage(wrong, score).risk == pytest.approx(expected)


def test_a_score_that_says_nothing_has_the_risk_of_answering_all():
    curve = risk_coverage([True, False, False, True, False], np.ones(5))
    assert curve.risk == pytest.approx(np.full(5, 0.4))


@pytest.mark.parametrize(("wrong", "score"), [([], []), ([True], [0.1, 0.2]), ([True, False], [0.1, float("nan")])])
def test_what_cannot_be_ordered_is_refused(wrong, score):
    with pytest.raises(ValueError, match="score"):
        risk_coverage(wrong, score)


def test_confidence_is_the_highest_probability_and_the_unlabelled_are_left_out():
    predictions = pd.DataFrame(
        {
            "label": pd.array([0, 1, None, 1], dtype="Int64"),
            "prediction": pd.array([0, 0, 1, 1], dtype="Int64"),
            "logits": [[3.0, 0.0], [0.2, 0.0], [0.0, 9.0], [900.0, 905.0]],
            "quality": [0.9, 0.1, 0.5, 0.4],
        }
    )
    curves = selective_scores(predictions)
    assert curves["quality"].risk == pytest.approx([0, 0, 1 / 3])
    assert curves["confidence"].risk == pytest.approx([0, 0, 1 / 3])


def test_the_figure_is_drawn_and_needs_a_curve(tmp_path):
    curve = risk_coverage([True, False, False], [0.1, 0.9, 0.3])
    plot_risk_coverage({"quality": curve, "confidence": curve}, tmp_path / "curve.png", "a model")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="no curves"):
        plot_risk_coverage({}, tmp_path / "none.png", "a model")

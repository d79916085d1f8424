import numpy as np
import pytest

from modeling_qlung.evaluation.protocols import SPRSOUND_TASKS, sprsound_scores


def expected_scores(labels, predictions):
    """Counted item by item; 'Normal' is the negative class."""
    normal = [p for y, p in zip(labels, predictions, strict=True) if y == "Normal"]
    other = [y == p for y, p in zip(labels, predictions, strict=True) if y != "Normal"]
    sp, se = normal.count("Normal") / len(normal), sum(other) / len(other)
    mean, harmonic = (se + sp) / 2, 2 / (1 / se + 1 / sp)
    values = {"sensitivity": se, "specificity": sp, "average_score": mean, "harmonic_score": harmonic}
    return {name: 100 * value for name, value in (values | {"score": (mean + harmonic) / 2}).items()}


@pytest.mark.parametrize("task", SPRSOUND_TASKS)
def test_names_and_indices_agree_with_counting(task):
    classes = SPRSOUND_TASKS[task]
    rng = np.random.default_rng(3)
    labels = rng.integers(0, len(classes), 300)
    predictions = np.where(rng.random(300) < 0.6, labels, rng.integers(0, len(classes), 300))
    names, predicted_names = ([classes[i] for i in values] for values in (labels, predictions))
    scores = sprsound_scores(names, predicted_names, task)
    expected = expected_scores(names, predicted_names)
    assert {name: scores[name] for name in expected} == pytest.approx(expected)
    assert scores == sprsound_scores(labels, predictions, task)
    assert list(scores["recall"]) == list(classes)
    assert sum(scores["support"].values()) == 300


def test_another_abnormal_class_is_no_hit():
    scores = sprsound_scores(["Normal", "Wheeze", "Rhonchi"], ["Normal", "Rhonchi", "Rhonchi"], "1-2")
    assert scores["sensitivity"] == 50
    assert scores["specificity"] == 100
    assert scores["harmonic_score"] == pytest.approx(200 / 3)
    assert scores["score"] == pytest.approx((75 + 200 / 3) / 2)


def test_poor_quality_counts_as_not_normal():
    labels = ["Normal", "Poor Quality", "CAS", "Normal"]
    scores = sprsound_scores(labels, ["Normal", "Adventitious", "DAS", "Poor Quality"], "2-1")
    assert scores["specificity"] == 50
    assert scores["sensitivity"] == 50  # CAS merged into Adventitious is hit, Poor Quality is not


def test_finer_names_merge_only_in_the_coarse_tasks():
    fine = ["Normal", "Wheeze+Crackle", "Fine Crackle", "Stridor"]
    assert sprsound_scores(fine, ["Normal", "Rhonchi", "Adventitious", "Normal"], "1-1")["sensitivity"] == (
        pytest.approx(200 / 3)
    )
    with pytest.raises(ValueError, match="task 1-2 has no class 'Adventitious'"):
        sprsound_scores(fine, ["Normal", "Adventitious", "Normal", "Normal"], "1-2")


def test_nothing_right_scores_zero_and_an_absent_side_none():
    assert sprsound_scores([0, 1], [1, 0], "1-1")["score"] == 0
    scores = sprsound_scores([1, 1], [1, 0], "1-1")
    assert scores["sensitivity"] == 50
    assert scores["specificity"] is None
    assert scores["harmonic_score"] is None
    assert scores["score"] is None


@pytest.mark.parametrize(
    ("labels", "predictions", "task", "message"),
    [
        (["Normal"], ["Normal"], "3-1", "unknown SPRSound task '3-1': choose one of 1-1, 1-2, 2-1, 2-2"),
        (["normal"], ["Normal"], "1-1", "no class 'normal'"),
        ([0, 2], [0, 1], "1-1", "labels hold 2"),
        (["Normal"], ["Normal", "CAS"], "2-2", "1 labels but 2 predictions"),
        ([], [], "2-2", "empty"),
    ],
)
def test_wrong_input_is_named(labels, predictions, task, message):
    with pytest.raises(ValueError, match=message):
        sprsound_scores(labels, predictions, task)

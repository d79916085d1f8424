import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix, recall_score

from modeling_qlung.evaluation import icbhi_scores, scores_from_confusion

ROOT = Path(__file__).parents[2]
METRIC = ROOT / "modeling_qlung/evaluation/icbhi_score"
HEADLINES = ("specificity", "sensitivity_4class", "score_4class", "sensitivity_2class", "score_2class")


def counted_by_hand(labels, predictions):
    """The two scores as the papers put them in words, cycle by cycle."""
    normal = [p for y, p in zip(labels, predictions, strict=True) if y == 0]
    abnormal = [(y, p) for y, p in zip(labels, predictions, strict=True) if y != 0]
    sp = 100 * normal.count(0) / len(normal)
    exact = 100 * sum(y == p for y, p in abnormal) / len(abnormal)
    noticed = 100 * sum(p != 0 for _, p in abnormal) / len(abnormal)
    return dict(zip(HEADLINES, (sp, exact, (sp + exact) / 2, noticed, (sp + noticed) / 2), strict=True))


def test_small_example_by_hand():
    scores = icbhi_scores([0, 0, 0, 0, 1, 1, 2, 3], [0, 0, 0, 1, 1, 2, 0, 2])
    assert scores["specificity"] == 75
    assert scores["sensitivity_4class"] == 25
    assert scores["score_4class"] == 50
    assert scores["sensitivity_2class"] == 75
    assert scores["score_2class"] == 75
    assert scores["recall"] == {"normal": 75, "crackle": 50, "wheeze": 0, "both": 0}
    assert scores["support"] == {"normal": 4, "crackle": 2, "wheeze": 1, "both": 1}
    assert scores["confusion_matrix"] == [[3, 1, 0, 0], [0, 1, 1, 0], [1, 0, 0, 0], [0, 0, 1, 0]]


@pytest.mark.parametrize("seed", range(3))
def test_agrees_with_counting_cycles_and_with_sklearn(seed):
    rng = np.random.default_rng(seed)
    labels = rng.choice(4, 500, p=[0.57, 0.24, 0.14, 0.05])
    predictions = np.where(rng.random(500) < 0.5, labels, rng.integers(0, 4, 500))
    scores = icbhi_scores(labels, predictions)
    expected = counted_by_hand(labels.tolist(), predictions.tolist())
    assert {name: scores[name] for name in HEADLINES} == pytest.approx(expected)
    assert list(scores["recall"].values()) == pytest.approx(100 * recall_score(labels, predictions, average=None))
    assert scores["confusion_matrix"] == confusion_matrix(labels, predictions, labels=range(4)).tolist()
    assert scores == scores_from_confusion(scores["confusion_matrix"])


def test_what_has_no_cycles_is_none_and_json_null():
    only_abnormal = icbhi_scores([1, 2], [1, 0])
    assert only_abnormal["specificity"] is None
    assert only_abnormal["sensitivity_4class"] == 50
    assert only_abnormal["score_4class"] is None
    assert only_abnormal["recall"] == {"normal": None, "crackle": 100, "wheeze": 0, "both": None}
    only_normal = icbhi_scores([0, 0], [0, 3])
    assert only_normal["specificity"] == 50
    assert only_normal["sensitivity_4class"] is None
    assert only_normal["sensitivity_2class"] is None
    assert json.loads(json.dumps(only_normal, allow_nan=False)) == only_normal


@pytest.mark.parametrize(
    ("labels", "predictions", "message"),
    [
        ([0, 1], [0], "2 labels but 1 predictions"),
        ([], [], "empty"),
        ([0, 4], [0, 1], "labels hold 4"),
        ([0, 1], [0, -1], "predictions hold -1"),
        ([0.0, 1.0], [0, 1], "labels must be integers, got float64"),
        ([0, 1], [[0.1, 0.9], [0.8, 0.2]], r"predictions must be 1-D.*\(2, 2\)"),
    ],
)
def test_wrong_input_is_named(labels, predictions, message):
    with pytest.raises(ValueError, match=message):
        icbhi_scores(labels, predictions)


def test_confusion_matrix_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"\(3, 3\)"):
        scores_from_confusion(np.eye(3, dtype=int))


def run_elsewhere(code, folder, **environment):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | environment
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_evaluate_loads_the_metric_by_path_offline(tmp_path):
    code = f"""
import evaluate, json, sys
metric = evaluate.load({str(METRIC)!r})
metric.add_batch(predictions=[0, 1, 2], references=[0, 1, 1])
metric.add_batch(predictions=[0, 3], references=[0, 3])
result = metric.compute()
assert not any(name.startswith("modeling_qlung") for name in sys.modules), "the metric must stand alone"
try:
    metric.compute(predictions=[7], references=[0])
except ValueError as error:
    assert "predictions hold 7" in str(error), error
else:
    raise AssertionError("a class outside 0..3 was accepted")
print(json.dumps(result))
"""
    printed = run_elsewhere(code, tmp_path, HF_HUB_OFFLINE="1", HF_EVALUATE_OFFLINE="1", HF_HOME=str(tmp_path / "hf"))
    assert json.loads(printed.splitlines()[-1]) == icbhi_scores([0, 1, 1, 0, 3], [0, 1, 2, 0, 3])


def test_scores_do_not_import_evaluate(tmp_path):
    code = "import sys, modeling_qlung.evaluation; print([m for m in ('evaluate', 'pandas') if m in sys.modules])"
    # The package's own top module imports Transformers, which is no part of this room: put an empty one before it.
    package = tmp_path / "modeling_qlung"
    package.mkdir()
    (package / "evaluation").symlink_to(ROOT / "modeling_qlung/evaluation")
    assert run_elsewhere(code, tmp_path).strip() == "[]"

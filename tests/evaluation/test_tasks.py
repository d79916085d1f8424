import numpy as np
import pytest

from modeling_qlung.evaluation import icbhi_scores, sprsound_scores
from modeling_qlung.evaluation.protocols import EVENT_TYPES, RECORD_LABELS
from modeling_qlung.evaluation.tasks import FOUR_CLASS, TASKS, TWO_OUTPUT, task_of


def items(task, seed=0):
    return np.random.default_rng(seed).integers(0, len(task.classes), (2, 400))


def test_four_classes_are_scored_as_icbhis():
    labels, predictions = items(FOUR_CLASS)
    assert FOUR_CLASS.scores(labels, predictions) == icbhi_scores(labels, predictions)


@pytest.mark.parametrize("name", ["1-1", "1-2", "2-1", "2-2"])
def test_challenge_tasks_are_scored_as_sprsounds(name):
    labels, predictions = items(TASKS[name])
    assert TASKS[name].scores(labels, predictions) == sprsound_scores(labels, predictions, name)


def test_two_outputs_by_hand_and_under_names_of_their_own():
    labels, predictions = np.array([0, 0, 0, 0, 1, 1, 1, 1, 1]), np.array([0, 0, 0, 1, 1, 1, 0, 0, 0])
    scores = TWO_OUTPUT.scores(labels, predictions)
    assert (scores["specificity"], scores["sensitivity_two_output"], scores["score_two_output"]) == (75.0, 40.0, 57.5)
    assert not {"score_2class", "sensitivity_2class"} & scores.keys()


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_a_task_has_one_title_per_score_and_chooses_by_one_of_them(task):
    rates = task.rates(np.ones((3, len(task.classes), len(task.classes))))
    assert rates.keys() == task.titles.keys()
    assert {task.headline, task.sensitivity, "specificity"} <= task.titles.keys()
    assert all(values.shape == (3,) for values in rates.values())
    assert task_of(list(task.classes)) is task


def test_names_become_classes():
    assert [FOUR_CLASS.index(name) for name in ("normal", "both", "Stridor")] == [0, 3, None]
    assert [TWO_OUTPUT.index(name) for name in ("normal", "crackle", "wheeze", "both")] == [0, 1, 1, 1]
    assert [TASKS["1-1"].index(name) for name in EVENT_TYPES] == [0, 1, 1, 1, 1, 1, 1]
    assert [TASKS["1-2"].index(name) for name in EVENT_TYPES] == [0, 1, 2, 3, 4, 5, 6]
    assert [TASKS["2-1"].index(name) for name in RECORD_LABELS] == [0, 1, 1, 1, 2]
    assert [TASKS["2-2"].index(name) for name in RECORD_LABELS] == [0, 1, 2, 3, 4]


def test_unknown_classes_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"classes cat, dog: .*4-class \(normal, crackle, wheeze, both\)"):
        task_of(["cat", "dog"])

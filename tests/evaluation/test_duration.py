"""Durations alone: found where they tell classes, worthless where they do not."""

import datasets
import numpy as np
import pytest

from modeling_qlung.evaluation.duration import predict, score


def rows(labels, durations):
    patients = [str(index % 12) for index in range(len(labels))]
    starts = np.linspace(0, 5, len(labels))
    columns = {"label": labels, "start": starts, "end": starts + durations, "patient_id": patients}
    return datasets.Dataset.from_dict(columns)


def test_durations_that_tell_classes_score_and_others_do_not():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 400)
    telling, blind = 0.5 + labels + 0.2 * rng.random(400), 1 + rng.random(400)
    own = [None if index % 50 == 0 else int(label) for index, label in enumerate(labels)]
    found = score(rows(own, telling), {"test": rows(own, telling), "late": rows(own, telling + 0.05)})
    assert [found[name]["score_4class"] for name in ("test", "late")] == pytest.approx([100, 100], abs=3)
    assert found["test"]["unlabelled"] == 8
    unrelated = score(rows(own, blind), {"test": rows(rng.permutation(labels).tolist(), blind)})["test"]
    assert unrelated["score_4class"] < 45


def test_a_rare_class_is_predicted_too():
    labels = np.array([0] * 96 + [1] * 4)
    durations = np.where(labels == 1, 0.6, np.linspace(0.5, 2.0, 100))
    assert predict(durations, labels, np.array([0.6, 1.8])).tolist() == [1, 0]

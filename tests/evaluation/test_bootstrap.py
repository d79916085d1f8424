import time

import numpy as np
import pytest

from modeling_qlung.evaluation import bootstrap_ci, icbhi_scores, sprsound_scores
from modeling_qlung.evaluation.protocols import SPRSOUND_TASKS, sprsound_rates


def simulated_predictions(rng, patients, cycles):
    """Labels, predictions and patients; how often a patient's cycles are right varies from patient to patient."""
    patient = np.repeat(np.arange(patients), cycles)
    labels = rng.choice(4, len(patient), p=[0.5, 0.25, 0.15, 0.1])
    right = rng.random(len(patient)) < rng.beta(2, 1, patients)[patient]
    return labels, np.where(right, labels, (labels + rng.integers(1, 4, len(patient))) % 4), patient


def resampled_cycle_by_cycle(labels, predictions, patients, resamples, seed):
    """The same resamples, but each one written out as a list of cycles and scored from the start."""
    names = sorted(set(patients))
    draws = np.random.default_rng(seed).multinomial(len(names), [1 / len(names)] * len(names), size=resamples)
    scores = []
    for draw in draws:
        rows = []
        for name, times in zip(names, draw, strict=True):
            rows += np.flatnonzero(patients == name).tolist() * times
        scores.append(icbhi_scores(labels[rows], predictions[rows]))
    return scores


def test_equals_a_slow_loop_over_resampled_cycles():
    labels, predictions, patients = simulated_predictions(np.random.default_rng(0), 9, 12)
    patients = np.array([f"p{p}" for p in patients])
    fast = bootstrap_ci(labels, predictions, patients, resamples=200, seed=7, level=0.9)
    slow = resampled_cycle_by_cycle(labels, predictions, patients, 200, seed=7)
    for name in ("specificity", "sensitivity_4class", "score_4class", "sensitivity_2class", "score_2class"):
        assert fast[name] == pytest.approx(np.percentile([scores[name] for scores in slow], [5, 95]).tolist())


def test_covers_the_truth_where_resampling_cycles_does_not():
    # Expected specificity: mean of Beta(2, 1). 60 data sets of 50 patients; about 57 intervals should hold it.
    truth, covered, covered_by_cycles = 100 * 2 / 3, 0, 0
    rng = np.random.default_rng(1)
    for _ in range(60):
        labels, predictions, patients = simulated_predictions(rng, 50, 30)
        low, high = bootstrap_ci(labels, predictions, patients, resamples=300)["specificity"]
        covered += low <= truth <= high
        low, high = bootstrap_ci(labels, predictions, np.arange(len(labels)), resamples=300)["specificity"]
        covered_by_cycles += low <= truth <= high
    assert 52 <= covered <= 60
    assert covered_by_cycles < 45


def test_icbhi_test_set_takes_well_below_a_second():
    labels, predictions, patients = simulated_predictions(np.random.default_rng(2), 53, 52)
    start = time.perf_counter()
    intervals = bootstrap_ci(labels, predictions, patients)
    assert time.perf_counter() - start < 0.5
    point = icbhi_scores(labels, predictions)
    assert all(low < point[name] < high for name, (low, high) in intervals.items())


def test_seed_decides():
    data = simulated_predictions(np.random.default_rng(3), 10, 10)
    assert bootstrap_ci(*data, seed=1) == bootstrap_ci(*data, seed=1)
    assert bootstrap_ci(*data, seed=1) != bootstrap_ci(*data, seed=2)


def test_statistic_undefined_in_many_resamples_has_no_interval():
    # The only abnormal cycles are one patient's, who is absent from (4/5)^5 = 33 % of the resamples.
    labels, patients = np.zeros(20, dtype=int), np.repeat(np.arange(5), 4)
    labels[:4] = 1
    intervals = bootstrap_ci(labels, labels, patients)
    assert intervals["sensitivity_4class"] is None
    assert intervals["score_2class"] is None
    assert intervals["specificity"] == [100, 100]


def test_statistic_undefined_in_few_resamples_leaves_them_out():
    # Abnormal cycles with 4 of 5 patients: none of the four is drawn in (1/5)^5 = 0.03 % of the resamples.
    patients = np.repeat(np.arange(5), 2)
    labels = np.array([0, 1] * 4 + [0, 0])
    intervals = bootstrap_ci(labels, labels, patients, resamples=20_000)
    assert intervals["sensitivity_4class"] == [100, 100]


def test_one_patient_says_nothing_about_others():
    assert set(bootstrap_ci([0, 1, 0], [0, 1, 1], ["a", "a", "a"]).values()) == {None}


def test_other_statistics_and_classes():
    classes = len(SPRSOUND_TASKS["1-2"])
    rng = np.random.default_rng(4)
    labels, patients = rng.integers(0, classes, 400), rng.integers(0, 40, 400)
    predictions = np.where(rng.random(400) < 0.7, labels, rng.integers(0, classes, 400))
    intervals = bootstrap_ci(labels, predictions, patients, statistic=sprsound_rates, num_classes=classes)
    point = sprsound_scores(labels, predictions, "1-2")
    assert list(intervals) == ["sensitivity", "specificity", "average_score", "harmonic_score", "score"]
    assert all(low < point[name] < high for name, (low, high) in intervals.items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"patients": ["a"]}, "2 labels but patients of shape"),
        ({"labels": [0, 9]}, "labels hold 9"),
        ({"level": 95}, "level=95"),
        ({"resamples": 0}, "resamples=0"),
    ],
)
def test_wrong_input_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        bootstrap_ci(**({"labels": [0, 1], "predictions": [0, 1], "patients": ["a", "b"]} | arguments))

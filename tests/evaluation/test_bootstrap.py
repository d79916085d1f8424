import numpy as np
import pytest

from modeling_qlung.evaluation import CLASS_NAMES, bootstrap_ci, icbhi_scores, sprsound_scores
from modeling_qlung.evaluation.bootstrap import Difference, icbhi_rates, paired_difference_ci
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


def test_all_resamples_are_scored_in_one_call():
    labels, predictions, patients = simulated_predictions(np.random.default_rng(2), 53, 52)
    shapes = []

    def statistic(confusion):
        shapes.append(confusion.shape)
        return icbhi_rates(confusion)

    intervals = bootstrap_ci(labels, predictions, patients, statistic, resamples=1000)
    assert shapes == [(1000, 1, len(CLASS_NAMES), len(CLASS_NAMES))]
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


SCORES = ("specificity", "sensitivity_4class", "score_4class", "sensitivity_2class", "score_2class")


def trained(rng, seeds, patients, cycles, skill=2.0, training=0.0):
    """Labels, predictions (seeds, n) and patients: patients are easy or hard for all seeds, and seeds differ too."""
    patient = np.repeat(np.arange(patients), cycles)
    labels = rng.choice(4, len(patient), p=[0.5, 0.25, 0.15, 0.1])
    ease = skill + rng.normal(0, 1, patients)[patient] + rng.normal(0, training, (seeds, 1))
    right = rng.random((seeds, len(patient))) < 1 / (1 + np.exp(-ease))
    return labels, np.where(right, labels, (labels + rng.integers(1, 4, right.shape)) % 4), patient


def written_out(labels, system, patients, draw, times):
    """Mean over drawn seeds of a score of drawn patients, every drawn cycle in a list of its own."""
    rows = [row for name, n in enumerate(draw) for row in np.flatnonzero(patients == name).tolist() * n]
    scores = [icbhi_scores(labels[rows], predicted[rows]) for predicted in system]
    return {name: sum(n * score[name] for n, score in zip(times, scores, strict=True)) / sum(times) for name in SCORES}


@pytest.mark.parametrize(("ours", "theirs", "paired"), [(3, 3, True), (3, 3, False), (3, 1, False), (2, 4, False)])
def test_difference_equals_a_slow_loop_over_patients_and_seeds(ours, theirs, paired):
    labels, both, patients = trained(np.random.default_rng(5), ours + theirs, 7, 12)
    system, baseline = both[:ours], both[ours:]
    settings = {"resamples": 60, "seed": 3, "level": 0.8, "paired_seeds": paired}
    fast = paired_difference_ci(labels, system, baseline, patients, **settings)
    rng = np.random.default_rng(3)
    draws = rng.multinomial(7, [1 / 7] * 7, size=60)
    times = rng.multinomial(max(ours - 1, 1), [1 / ours] * ours, size=60)
    other_times = times if paired else rng.multinomial(max(theirs - 1, 1), [1 / theirs] * theirs, size=60)
    slow = [
        (written_out(labels, system, patients, draw, n), written_out(labels, baseline, patients, draw, m))
        for draw, n, m in zip(draws, times, other_times, strict=True)
    ]
    points = [[icbhi_scores(labels, p) for p in part] for part in (system, baseline)]
    for name in SCORES:
        assert fast[name].interval == pytest.approx(np.percentile([a[name] - b[name] for a, b in slow], [10, 90]))
        means = [np.mean([point[name] for point in part]) for part in points]
        assert fast[name].value == pytest.approx(means[0] - means[1])


def test_identical_systems_differ_by_nothing_and_a_better_one_by_more():
    labels, system, patients = trained(np.random.default_rng(6), 3, 20, 20, training=0.5)
    same = paired_difference_ci(labels, system, system, patients)
    assert set(map(str, same.values())) == {str(Difference(0.0, [0.0, 0.0]))}
    assert same["score_4class"].excludes_zero is False
    better = paired_difference_ci(labels, np.tile(labels, (3, 1)), system, patients)["score_4class"]
    worse = paired_difference_ci(labels, system, np.tile(labels, (3, 1)), patients)["score_4class"]
    assert better.excludes_zero
    assert worse.excludes_zero
    assert better.value == -worse.value
    assert better.interval == pytest.approx([-worse.interval[1], -worse.interval[0]])


def test_difference_covers_the_truth_because_patients_are_shared_and_seeds_drawn():
    # Two ways to train that are equally good: 57 of 60 intervals should hold 0.
    covered = covered_by_one_seed_of_each = 0
    widths, halves = [], (slice(0, 5), slice(5, 10))
    for number in range(60):
        labels, both, patients = trained(np.random.default_rng(100 + number), 10, 40, 20, training=0.4)
        difference = paired_difference_ci(labels, both[:5], both[5:], patients, resamples=300)["specificity"]
        covered += not difference.excludes_zero
        alone = paired_difference_ci(labels, both[0], both[5], patients, resamples=300)["specificity"]
        covered_by_one_seed_of_each += not alone.excludes_zero
        unpaired = [np.ptp(bootstrap_ci(labels, both[h], patients, resamples=300)["specificity"]) for h in halves]
        widths.append(np.ptp(difference.interval) / np.hypot(*unpaired))
    assert 52 <= covered <= 60
    assert covered_by_one_seed_of_each < 45
    assert np.median(widths) < 0.95


def test_mean_of_seeds_has_the_variance_of_training_and_patients():
    # Without a difference between patients all that is left is training: s² / S, which drawing S - 1 of S gives.
    rng = np.random.default_rng(7)
    labels, patients = np.zeros(4000, dtype=int), np.arange(4000)
    system = (rng.random((4, 4000)) > np.array([[0.5], [0.6], [0.7], [0.8]])).astype(int)
    low, high = bootstrap_ci(labels, system, patients, resamples=4000, level=0.6827)["specificity"]
    deviation = np.std([100 * np.mean(predicted == 0) for predicted in system], ddof=1) / 2
    assert (high - low) / 2 == pytest.approx(deviation, rel=0.2)
    one = bootstrap_ci(labels, system[:1], patients)
    assert one == bootstrap_ci(labels, system[0], patients)


def test_undefined_difference_has_no_verdict():
    labels, patients = np.zeros(8, dtype=int), np.repeat(np.arange(4), 2)
    difference = paired_difference_ci(labels, labels, labels, patients)["score_4class"]
    assert difference == Difference(None, None)
    assert difference.excludes_zero is None
    assert paired_difference_ci([0, 1], [0, 1], [0, 0], ["a", "a"])["sensitivity_4class"] == Difference(100.0, None)


def test_wrong_baseline_is_named():
    with pytest.raises(ValueError, match="2 labels but 3 predictions"):
        paired_difference_ci([0, 1], [[0, 1]], [[0, 1, 1]], ["a", "b"])
    with pytest.raises(ValueError, match="2 and 1 seeds cannot be paired"):
        paired_difference_ci([0, 1], [[0, 1], [1, 1]], [0, 1], ["a", "b"])
    with pytest.raises(ValueError, match="level=95"):
        paired_difference_ci([0, 1], [0, 1], [0, 1], ["a", "b"], level=95)

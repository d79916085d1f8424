import numpy as np
import pytest
import torch
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from sklearn.utils.class_weight import compute_class_weight
from torch.utils.data import DataLoader
from transformers import TrainerControl, TrainerState

from modeling_qlung.training.sampling import SamplerEpochCallback, WeightedEpochSampler, class_weights, patient_split

COUNTS = [160, 80, 10]
LABELS = np.repeat([0, 1, 2], COUNTS).tolist()


def epoch_of(sampler, epoch):
    sampler.set_epoch(epoch)
    return list(sampler)


def test_class_weights():
    balanced = compute_class_weight("balanced", classes=np.arange(3), y=LABELS)
    np.testing.assert_allclose(class_weights(COUNTS), balanced)
    root = class_weights(COUNTS, power=0.5)
    np.testing.assert_allclose(root / root[0], [1, np.sqrt(2), 4])
    assert root[LABELS].mean() == pytest.approx(1)
    np.testing.assert_array_equal(class_weights(COUNTS, power=0), 1)


@pytest.mark.parametrize(("power", "shares"), [(1.0, [1, 1, 1]), (0.5, [4, 2 * np.sqrt(2), 1]), (0.0, [16, 8, 1])])
def test_classes_are_drawn_by_the_power_of_their_frequency(power, shares):
    drawn = np.asarray(LABELS)[list(WeightedEpochSampler(LABELS, 3, power, num_samples=20_000))]
    np.testing.assert_allclose(np.bincount(drawn) / 20_000, np.array(shares) / sum(shares), atol=0.015)


def test_an_epoch_depends_on_seed_and_epoch_alone():
    sampler = WeightedEpochSampler(LABELS, 3, seed=1)
    first = epoch_of(sampler, 2)
    torch.manual_seed(99)
    np.random.default_rng(99).random(3)
    assert epoch_of(sampler, 2) == first == epoch_of(WeightedEpochSampler(LABELS, 3, seed=1), 2)
    others = [epoch_of(sampler, 1), epoch_of(sampler, 3), epoch_of(WeightedEpochSampler(LABELS, 3, seed=2), 1)]
    assert first not in others
    assert others[0] != others[2]
    assert len(first) == len(sampler) == len(LABELS)


def test_power_zero_without_replacement_is_a_shuffle():
    sampler = WeightedEpochSampler(LABELS, 3, power=0, replacement=False)
    indices = epoch_of(sampler, 0)
    assert indices != sorted(indices)
    assert sorted(indices) == list(range(len(LABELS)))
    assert sorted(set(WeightedEpochSampler(LABELS, 3, replacement=False, num_samples=100))) == sorted(
        WeightedEpochSampler(LABELS, 3, replacement=False, num_samples=100)
    )


def test_wrong_labels_are_named():
    with pytest.raises(ValueError, match="Label 2 is not among the 2 classes"):
        WeightedEpochSampler(LABELS, 2)
    with pytest.raises(ValueError, match="Label -1"):
        WeightedEpochSampler([0, 1, -1], 2)
    with pytest.raises(ValueError, match="Drop the examples without a label"):
        WeightedEpochSampler([0, 1, None], 2)
    with pytest.raises(ValueError, match="Class 1 has no training example"):
        class_weights([1, 0, 1])
    with pytest.raises(ValueError, match="without replacement from 3"):
        WeightedEpochSampler([0, 1, 1], 2, num_samples=4, replacement=False)
    with pytest.raises(ValueError, match="labels is empty"):
        WeightedEpochSampler([], 2)
    assert set(WeightedEpochSampler([0, 2], 3)) <= {0, 1}


def sharded_loader(sampler, processes, process):
    """The loader that Accelerate gives to one of several processes."""
    loader = DataLoader(torch.arange(len(LABELS)), batch_size=5, sampler=sampler)
    return prepare_data_loader(loader, num_processes=processes, process_index=process, put_on_device=False)


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("skipped", [0, 7])
def test_accelerate_shards_and_resumes_the_same_epoch(processes, skipped):
    """Batches of all ranks, interleaved, are the sampler's epoch, also when the first ones are skipped on resuming."""
    expected = epoch_of(WeightedEpochSampler(LABELS, 3, seed=4), 3)
    shares = []
    for process in range(processes):
        sampler = WeightedEpochSampler(LABELS, 3, seed=4)
        loader = sharded_loader(sampler, processes, process)
        if skipped:
            loader = skip_first_batches(loader, skipped)
        SamplerEpochCallback(sampler).on_epoch_begin(None, TrainerState(epoch=3.28), TrainerControl())
        loader.set_epoch(3)
        shares.append(list(loader))
    found = torch.cat([batch for batches in zip(*shares, strict=True) for batch in batches]).tolist()
    assert found == expected[skipped * processes * 5 :]


def test_the_callback_starts_with_epoch_zero():
    sampler = WeightedEpochSampler(LABELS, 3)
    sampler.set_epoch(5)
    SamplerEpochCallback(sampler).on_epoch_begin(None, TrainerState(), TrainerControl())
    assert sampler.epoch == 0


def make_patients(patients=40, seed=0):
    """Patients with 5 to 40 cycles and each their own mixture of three classes, the last one rare."""
    generator = np.random.default_rng(seed)
    names, labels = [], []
    for patient in range(patients):
        mixture = generator.dirichlet([2.0, 1.0, 0.3])
        count = int(generator.integers(5, 40))
        names += [f"p{patient}"] * count
        labels += generator.choice(3, count, p=mixture).tolist()
    order = generator.permutation(len(names))
    return np.array(names)[order], np.array(labels)[order]


@pytest.mark.parametrize("fraction", [0.1, 0.2, 0.3])
def test_patients_are_disjoint_and_classes_balanced(fraction):
    patients, labels = make_patients()
    training, validation = patient_split(patients, labels, fraction)
    assert sorted([*training, *validation]) == list(range(len(labels)))
    assert (np.diff(training) > 0).all()
    assert not set(patients[training]) & set(patients[validation])
    shares = np.bincount(labels[validation]) / np.bincount(labels)
    np.testing.assert_allclose(shares, fraction, atol=0.05)


def test_seeds_choose_the_patients():
    patients, labels = make_patients()
    chosen = [set(patients[patient_split(patients, labels, seed=seed)[1]]) for seed in (0, 0, 1, 2)]
    assert chosen[0] == chosen[1]
    assert len({frozenset(group) for group in chosen}) == 3


def test_no_class_leaves_training_and_its_absence_from_validation_is_said():
    """Class 1 belongs to one patient, who has to stay."""
    patients, labels = ["a", "a", "b", "c", "d"], [0, 1, 0, 0, 0]
    for seed in range(10):
        with pytest.warns(UserWarning, match="No validation patient has class 1"):
            training, _ = patient_split(patients, labels, seed=seed)
        assert 1 in training


def test_impossible_splits_are_refused():
    with pytest.raises(ValueError, match="at least two patients, got \\['a'\\]"):
        patient_split(["a", "a"], [0, 1])
    with pytest.raises(ValueError, match="some class would have no training example"):
        patient_split(["a", "b"], [0, 1])
    with pytest.raises(ValueError, match="fraction"):
        patient_split(["a", "b"], [0, 0], fraction=1.0)
    with pytest.raises(ValueError, match="2 patients but 1 labels"):
        patient_split(["a", "b"], [0])


def test_balance_on_the_cycles_of_icbhi(real_icbhi):
    """The official training part: every class within three points of a fifth, whatever the seed."""
    split = dict(
        line.split() for line in (real_icbhi / "ICBHI_challenge_train_test.txt").read_text().splitlines() if line
    )
    patients, labels = [], []
    for path in sorted((real_icbhi / "ICBHI_final_database").glob("*.txt")):
        if split.get(path.stem) == "train":
            for _, _, crackle, wheeze in map(str.split, path.read_text().splitlines()):
                patients.append(path.stem[:3])
                labels.append(int(crackle) + 2 * int(wheeze))
    for seed in range(5):
        _, validation = patient_split(patients, labels, seed=seed)
        shares = np.bincount(np.asarray(labels)[validation], minlength=4) / np.bincount(labels)
        np.testing.assert_allclose(shares, 0.2, atol=0.03)

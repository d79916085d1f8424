"""Which training examples are seen, and how often: class weights, epochs of indices, the validation split."""

import warnings
from collections.abc import Iterator, Sequence

import numpy as np
from sklearn.model_selection import GroupShuffleSplit
from torch.utils.data import Sampler
from transformers import TrainerCallback

CANDIDATE_SPLITS = 1000


def class_weights(labels: Sequence[int], num_classes: int, power: float = 1.0) -> np.ndarray:
    """Class weights 1 / n_c^power, scaled so that their mean over the examples is 1.

    Args:
        labels: Class indices of the training set, (n,).
        num_classes: Number of classes.
        power: 1 is "balanced", 0.5 the inverse square root, 0 gives every class 1.

    Returns:
        (num_classes,), float64.

    Raises:
        ValueError: If a label is out of range or a class has no example.
    """
    counts = _count(labels, num_classes)
    absent = np.flatnonzero(counts == 0)
    if len(absent):
        raise ValueError(f"Class {absent[0]} has no training example, so it has no weight. Drop it from the label map.")
    weights = counts.astype(float) ** -power
    return weights * counts.sum() / (weights * counts).sum()


def _count(labels: Sequence[int], num_classes: int) -> np.ndarray:
    """Examples per class, (num_classes,), after a check of the range."""
    indices = np.asarray(labels)
    if indices.ndim != 1 or not np.issubdtype(indices.dtype, np.integer):
        raise ValueError("labels must be a list of class indices. Drop the examples without a label first.")
    outside = indices[(indices < 0) | (indices >= num_classes)]
    if len(outside):
        raise ValueError(f"Label {outside[0]} is not among the {num_classes} classes 0 to {num_classes - 1}.")
    return np.bincount(indices, minlength=num_classes)


class WeightedEpochSampler(Sampler[int]):
    """Draws each epoch's indices with probabilities 1 / n_c^power, from a generator seeded by (seed, epoch).

    An epoch is the same on every rank (Accelerate gives each its batches) and in a resumed training, whatever any other
    random generator has done; `torch.utils.data.WeightedRandomSampler` is neither. `power=1` is its class-balanced
    sampling, `power=0, replacement=False` a plain shuffle.

    Args:
        labels: Class indices of the training set, (n,).
        num_classes: Number of classes.
        power: Exponent of the class frequency.
        seed: Seed, joined by the epoch.
        num_samples: Indices per epoch; n by default.
        replacement: Whether an example can come twice in one epoch.

    Raises:
        ValueError: If there is no label, a label is out of range, or more samples are asked for than can be drawn
            without replacement.
    """

    # No attribute may be called `generator`: Accelerate would synchronise, checkpoint and reseed it.

    def __init__(
        self,
        labels: Sequence[int],
        num_classes: int,
        power: float = 1.0,
        seed: int = 0,
        num_samples: int | None = None,
        replacement: bool = True,
    ) -> None:
        if len(labels) == 0:
            raise ValueError("There is nothing to sample from: labels is empty.")
        self.num_samples = len(labels) if num_samples is None else num_samples
        if not replacement and self.num_samples > len(labels):
            raise ValueError(
                f"num_samples={self.num_samples} cannot be drawn without replacement from {len(labels)} examples."
            )
        weights = _count(labels, num_classes)[np.asarray(labels)].astype(float) ** -power
        self.probabilities = weights / weights.sum()
        self.seed = seed
        self.replacement = replacement
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch whose indices the next iteration gives."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = np.random.default_rng((self.seed, self.epoch))
        size = len(self.probabilities)
        yield from generator.choice(size, self.num_samples, self.replacement, self.probabilities).tolist()

    def __len__(self) -> int:
        return self.num_samples


class SamplerEpochCallback(TrainerCallback):
    """Tells the sampler the epoch, also where a training on several processes resumes within one.

    There the loader is wrapped twice (skipped batches around the process's share), and neither Trainer's nor
    Accelerate's own `set_epoch` reaches the sampler: it would repeat epoch 0.
    """

    def __init__(self, sampler: WeightedEpochSampler) -> None:
        self.sampler = sampler

    def on_epoch_begin(self, args, state, control, **kwargs):
        """Sets the epoch that is about to start or to be resumed."""
        self.sampler.set_epoch(int(state.epoch or 0))


def patient_split(
    patients: Sequence[str], labels: Sequence[int], fraction: float = 0.2, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Splits examples into training and validation with no patient in both and the classes in balance.

    Of 1000 random splits of the patients it takes the one whose worst divided class comes nearest to `fraction`. No
    class leaves the training part. (scikit-learn's `StratifiedGroupKFold` balances a little more tightly, but offers
    fractions 1 / k only, and with respiratory data hands out nearly the same patients at every seed.)

    Args:
        patients: Patient of each example, (n,).
        labels: Class index of each example, (n,).
        fraction: Share of patients, and about the share of each class, in validation.
        seed: Seed of the random splits.

    Returns:
        Sorted training indices and sorted validation indices.

    Raises:
        ValueError: If there are fewer than two patients, lengths differ, `fraction` is not within (0, 1), or every
            split would leave a class out of training.
    """
    groups, classes = np.asarray(patients), np.asarray(labels)
    if len(groups) != len(classes):
        raise ValueError(f"{len(groups)} patients but {len(classes)} labels: one of each per example is needed.")
    if not 0 < fraction < 1:
        raise ValueError(f"fraction must lie within (0, 1), got {fraction}.")
    if len(np.unique(groups)) < 2:
        raise ValueError(
            f"A patient-disjoint split needs at least two patients, got {np.unique(groups).tolist()} in "
            f"{len(groups)} examples. Give more recordings, or a validation split of your own."
        )
    names, totals = np.unique(classes, return_counts=True)
    one_hot = classes[:, None] == names
    best: tuple[float, np.ndarray, np.ndarray] | None = None
    splitter = GroupShuffleSplit(CANDIDATE_SPLITS, test_size=fraction, random_state=seed)
    for training, validation in splitter.split(groups, groups=groups):
        shares = one_hot[validation].sum(0) / totals
        error = np.abs(shares - fraction).max()
        if shares.max() < 1 and (best is None or error < best[0]):
            best = error, training, validation
    if best is None:
        raise ValueError(
            f"In each of {CANDIDATE_SPLITS} splits at fraction {fraction} some class would have no training example: "
            "too few patients have it. Lower the fraction, or give a validation split of your own."
        )
    absent = names[~one_hot[best[2]].any(0)]
    if len(absent):
        warnings.warn(f"No validation patient has class {', '.join(map(str, absent))}.", stacklevel=2)
    return np.sort(best[1]), np.sort(best[2])

"""Which training examples are seen, and how often: class weights, epochs of indices, the validation split."""

import warnings
from collections.abc import Iterator, Sequence
from itertools import count, islice

import numpy as np
from sklearn.model_selection import GroupShuffleSplit
from torch.utils.data import Sampler
from transformers import TrainerCallback

CANDIDATE_SPLITS = 1000
BUFFER_ROWS = 1000  # of a streamed training set, shuffled together; a loader's worker holds their undecoded audio


def class_weights(class_counts: Sequence[int], power: float = 1.0) -> np.ndarray:
    """Class weights 1 / n_c^power, scaled so that their mean over the examples is 1.

    Args:
        class_counts: Training examples of each class, (num_classes,).
        power: 1 is "balanced", 0.5 the inverse square root, 0 gives every class 1.

    Returns:
        (num_classes,), float64.

    Raises:
        ValueError: If a class has no example.
    """
    counts = np.asarray(class_counts)
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

    With `buckets`, an epoch's indices, drawn as without them, are put into such an order that each step's batches come
    from one bucket: a stock `BatchSampler` and Accelerate's sharding keep them together, and no process waits for
    another's longer input. What is left of a bucket joins the next one, whose rows are longer; an epoch's last step
    takes what is left of the last. An epoch begins with the longest bucket: memory runs out at once or never, and where
    Accelerate fills several processes' last step with the epoch's first rows, these are as long.

    Args:
        labels: Class indices of the training set, (n,).
        num_classes: Number of classes.
        power: Exponent of the class frequency.
        seed: Seed, joined by the epoch.
        num_samples: Indices per epoch; n by default.
        replacement: Whether an example can come twice in one epoch.
        buckets: Bucket of each example, (n,), the shortest 0.
        batch_size: Examples per process and step; only buckets ask for it.
        num_processes: Number of processes; likewise.

    Raises:
        ValueError: If there is no label, a label is out of range, more samples are asked for than can be drawn without
            replacement, or there is not one bucket per label.
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
        buckets: Sequence[int] | None = None,
        batch_size: int = 1,
        num_processes: int = 1,
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
        if buckets is not None and len(buckets) != len(labels):
            raise ValueError(f"There are {len(buckets)} buckets for {len(labels)} labels: one of each per example.")
        self.buckets = None if buckets is None else np.asarray(buckets)
        self.batch_size = batch_size
        self.num_processes = num_processes
        self.seed = seed
        self.replacement = replacement
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch whose indices the next iteration gives."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = np.random.default_rng((self.seed, self.epoch))
        size = len(self.probabilities)
        drawn = generator.choice(size, self.num_samples, self.replacement, self.probabilities)
        yield from (drawn if self.buckets is None else self._by_bucket(drawn, generator)).tolist()

    def _by_bucket(self, drawn: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """Order drawn indices (n,) so that every step's examples are of one bucket."""
        assert self.buckets is not None
        step = self.batch_size * self.num_processes
        steps, rest = np.empty((0, step), dtype=drawn.dtype), drawn[:0]
        for bucket in range(self.buckets.max() + 1):
            own, few = drawn[self.buckets[drawn] == bucket], step - self.num_processes
            # Neighbours go to different processes, of which each gets one of its own at least.
            indices = np.concatenate([rest[:few], own[: self.num_processes], rest[few:], own[self.num_processes :]])
            whole = len(indices) // step * step
            dealt = indices[:whole].reshape(-1, self.batch_size, self.num_processes).swapaxes(1, 2)
            steps, rest = np.concatenate([steps, dealt.reshape(-1, step)]), indices[whole:]
        longest, others = steps[-1:], steps[:-1]
        return np.concatenate([longest.ravel(), generator.permutation(others).ravel(), rest])

    def __len__(self) -> int:
        return self.num_samples


class RowGroupSampler(Sampler[int]):
    """
    Orders an epoch's rows so that every worker of every process reads row groups of its own, each about once.

    Row groups come in an order drawn from (seed, epoch). The sequence of their rows is cut into as many lanes as there
    are workers in all, and batches are taken from lane to lane, as Accelerate and the loader hand them out. Within a
    lane, rows are shuffled among those of consecutive row groups, at least `buffer_size` of them.
    Each row comes once in an epoch. The order depends on the number of lanes, so a run must be resumed with as many
    workers; it depends on nothing else, and what was seen before is skipped without being read.

    Args:
        row_group_counts: rows of each row group, (groups,).
        batch_size: of one process.
        lanes: number of processes times number of workers of each.
        seed: joined by the epoch.
        buffer_size: rows shuffled together.
    """

    def __init__(
        self,
        row_group_counts: Sequence[int] | np.ndarray,
        batch_size: int,
        lanes: int = 1,
        seed: int = 0,
        buffer_size: int = BUFFER_ROWS,
    ):
        self.row_group_counts = np.asarray(row_group_counts)
        self.batch_size = batch_size
        self.lanes = lanes
        self.seed = seed
        self.buffer_size = buffer_size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose rows the next iteration gives."""
        self.epoch = epoch

    def __len__(self) -> int:
        return int(self.row_group_counts.sum())

    def __iter__(self) -> Iterator[int]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(len(self.row_group_counts))
        ends = np.cumsum(self.row_group_counts[order])
        # From a row's place in that sequence to its number.
        shifts = np.cumsum(self.row_group_counts)[order] - ends
        batches, left = divmod(len(self), self.batch_size)
        sizes = [(batches + self.lanes - 1 - lane) // self.lanes * self.batch_size for lane in range(self.lanes)]
        sizes[batches % self.lanes] += left  # the last batch, which is not full
        stops = np.cumsum(sizes).tolist()
        lanes = [
            self._lane(number, stop - size, stop, ends, shifts)
            for number, (size, stop) in enumerate(zip(sizes, stops, strict=True))
        ]
        while batch := [row for lane in lanes for row in islice(lane, self.batch_size)]:
            yield from batch

    def _lane(self, number: int, start: int, stop: int, ends: np.ndarray, shifts: np.ndarray) -> Iterator[int]:
        """Give the rows from `start` to `stop` in the sequence of row groups, shuffled buffer by buffer."""
        rng = np.random.default_rng((self.seed, self.epoch, number))
        buffer: list[np.ndarray] = []
        position = start
        for place in count(int(np.searchsorted(ends, start, side="right"))):
            if position == stop:
                break
            end = min(int(ends[place]), stop)
            buffer.append(np.arange(position, end) + shifts[place])
            position = end
            if position == stop or sum(map(len, buffer)) >= self.buffer_size:
                yield from rng.permutation(np.concatenate(buffer)).tolist()
                buffer = []


class SamplerEpochCallback(TrainerCallback):
    """Tells the sampler the epoch, also where a training on several processes resumes within one.

    There the loader is wrapped twice (skipped batches around the process's share), and neither Trainer's nor
    Accelerate's own `set_epoch` reaches the sampler: it would repeat epoch 0.
    """

    def __init__(self, sampler: WeightedEpochSampler | RowGroupSampler) -> None:
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

"""Fit the learned quality score on clinicians' labels, and its reasons on degraded recordings.

    python -m modeling_qlung.training.quality --data_dir SPRSOUND

The labels are SPRSound's "Poor Quality" of whole recordings (Zhang et al. 2022). The network sees parts of each of two
to ten seconds, often the beginning, sometimes of a copy with a little noise, under the recording's own label, or, as
unusable, of one with much, or of noise alone. No poor recording has an event, so that wheezes would be rare in short
parts: some batches hold events of the usable recordings, as many wheezes and crackles as normal ones, and as short
parts of the poor ones. It needs no copies of other gains, filters or rates: what it reads does not depend on these.

No label says that more noise is worse: that is asked for beside, of copies of one recording with more and less of the
same noise, and of simulated recordings, whose signal-to-noise ratio is known. These are silent between breaths, and a
network would learn that silence is good: some parts have stretches made quieter or silent, and keep their label. Faint
noise lies under some parts and events, for what a recorder adds to a pause tells as little as silence does. And what is
beside loud noise is quiet in comparison, as a clear recording's pauses are: some parts have noise for two fifths of
their time or more, which makes them unusable, and some for a moment, which does not.

Writes `quality_parameters_qlung.py`, and prints how well children that were not in fitting are told. With `--ceiling`
it writes nothing, and prints how well networks of other sizes do, and with fewer children to learn from.
"""

import argparse
import functools
import hashlib
import json
import math
import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from hf_datasets import simulated
from hf_datasets.labels import EVENT_TYPES

from .. import quality_parameters_qlung
from ..evaluation.noises import DEGRADATIONS, NOISES, RATE, degrade, synthesize
from ..evaluation.quality_measures import discrimination
from ..evaluation.quality_recordings import Recordings, load
from ..inference import resample
from ..quality_qlung import (
    LEVEL_BANDS,
    LEVEL_FRAME_S,
    SHORTEST_FRAMES,
    band_powers,
    learned_quality,
    reason_measurements,
    relative_levels,
)

FOLDS = 5
LONGEST = 312  # frames of 32 ms: 10 s
WHOLE_SHARE, BEGINNING_SHARE = 0.5, 0.3  # of batches are of the longest parts, of parts are of a recording's beginning
EVENT_SHARE, LONGEST_EVENT = 0.3, 125  # of batches are of events; frames
EVENT_KINDS = {
    "wheezes": ("Wheeze", "Rhonchi", "Stridor", "Wheeze+Crackle"),
    "crackles": ("Coarse Crackle", "Fine Crackle"),
    "normal": ("Normal",),
}
KINDS_EACH = 2  # of noise, drawn for each recording
LITTLE_SHARE, MUCH_SHARE = 0.1, 0.03  # of parts are of copies with little and with much noise
ALONE_SHARE, ALONE_DRAWS = 0.02, 20  # of parts are noise without a recording, and draws of each kind
MILDEST, SEVEREST = 2, 2  # of the levels of noise are little and much
# Of parts, how long, and by how much. With half as many, pauses lift a fifth of the refused poor recordings over 0.5.
QUIETER_SHARE, QUIETER_FRAMES, QUIETER_DB = 0.3, (6, 94), (10.0, 60.0)
SILENT_SHARE = 0.3  # of what is made quieter
# `FAINT_SHARE` of parts and events have white noise throughout, `FAINT_DB` below them.
FAINT_SHARE, FAINT_DB = 0.3, (25.0, 60.0)
# Such shares of parts (events are too short to be interrupted) have noise of any kind in a portion of them: a long one,
# which makes them unusable but leaves some of what is to be told from a pause, or a moment. Ratios are of powers in the
# mean of all bands, the noise's while it lasts, and so not quite those of `evaluation.noises`.
LONG_SHARE, LONG_PORTION, LONG_SNR_DB = 0.1, (0.4, 0.8), (-40.0, 0.0)
MOMENT_SHARE, MOMENT_PORTION, MOMENT_SNR_DB = 0.1, (0.02, 0.1), (-40.0, 10.0)
CHANNELS, KERNEL, LAYERS = 16, 5, 4
EPOCHS, BATCH_SIZE, LEARNING_RATE = 60, 48, 4e-3

RANKED_SHARE = 0.5  # of steps compare copies with more and less noise
RANKED, COPIES = 12, 3  # recordings then, and copies of each
RANKED_SIMULATED, COPIES_SIMULATED, SIMULATED_WEIGHT = 12, 2, 0.4
STEP = 0.2  # that each further level of noise is to lower the logit by, at least
SIMULATED = 60  # recordings
SIMULATED_SEED = 2**31  # of their own: `hf_datasets` counts from 0
SIMULATED_SNR_DB = range(30, 0, -4)
ALONE_SEED = 2**31  # others than those that `evaluation.quality` draws


class QualityNetwork(nn.Module):
    """
    The network of `quality_qlung.learned_quality`, as it is trained: with batch normalisation and dropout.

    Args:
        channels: of every layer.
    """

    def __init__(self, channels: int = CHANNELS) -> None:
        super().__init__()
        widths = [LEVEL_BANDS, *[channels] * (LAYERS - 1)]
        self.convolutions = nn.ModuleList(
            nn.Conv1d(width, channels, KERNEL, padding=KERNEL // 2, padding_mode="circular", bias=False)
            for width in widths
        )
        self.norms = nn.ModuleList(nn.BatchNorm1d(channels) for _ in widths)
        self.dropout = nn.Dropout(0.05)
        self.output = nn.Linear(2 * channels, 1)

    def forward(self, levels: Tensor) -> Tensor:
        """Map levels (batch, 24, frames) to the logit of being usable (batch,)."""
        hidden = levels
        for number, (convolution, norm) in enumerate(zip(self.convolutions, self.norms, strict=True)):
            if number:
                hidden = self.dropout(F.max_pool1d(hidden, 2))
            hidden = F.relu(norm(convolution(hidden)))
        pooled = torch.cat([hidden.mean(dim=2), hidden.std(dim=2, correction=0)], dim=1)
        return self.output(self.dropout(pooled))[:, 0]

    def export(self, slope: float = 1.0, offset: float = 0.0) -> dict[str, Any]:
        """Give the parameters for `learned_quality`, with every normalisation and the logit's calibration folded in.

        Five significant digits are kept. Call it in evaluation mode.
        """
        layers = []
        pairs = cast("Iterable[tuple[nn.Conv1d, nn.BatchNorm1d]]", zip(self.convolutions, self.norms, strict=True))
        for convolution, norm in pairs:
            fused = fuse_conv_bn_eval(convolution, norm)
            layers.append({"weight": fused.weight, "bias": fused.bias})
        output = {"weight": slope * self.output.weight[0], "bias": slope * self.output.bias[0] + offset}
        return _rounded({"layers": layers, "output": output})


def _rounded(values: Any) -> Any:
    if isinstance(values, dict):
        return {name: _rounded(value) for name, value in values.items()}
    if isinstance(values, Tensor):
        values = values.tolist()
    return [_rounded(value) for value in values] if isinstance(values, list) else float(f"{values:.5g}")


# ---- What it is trained on ----


class Event(NamedTuple):
    """An annotated event, in frames of its recording."""

    type: str
    start: int
    end: int


class Example(NamedTuple):
    """A recording to learn from: its power in bands, as recorded and with `KINDS_EACH` kinds of noise at each level."""

    powers: Tensor  # (24, frames)
    noisy: Tensor  # (kinds, levels, 24, frames), mildest first
    usable: bool
    events: list[Event]


def make_example(waveform: NDArray, usable: bool, events: Sequence[Event]) -> Example:
    """Measure the power in bands of a recording (samples,) at 16 kHz and of copies with noise.

    The kinds of noise, of `DEGRADATIONS`, are drawn by the recording's samples.
    """
    rng = np.random.default_rng(list(hashlib.sha256(waveform.tobytes()).digest()[:8]))
    kinds = rng.choice(list(DEGRADATIONS), KINDS_EACH, replace=False)
    copies = [degrade(waveform, kind, int(rng.integers(2**32))) for kind in kinds]
    noisy = torch.stack([torch.stack([band_powers(copy, RATE) for copy in of_kind]) for of_kind in copies])
    return Example(band_powers(waveform, RATE), noisy, usable, list(events))


@functools.cache
def simulated_powers() -> list[Tensor]:
    """Simulate recordings of devices drawn at random, at `SIMULATED_SNR_DB`: power in bands, (ratios, 24, frames)."""
    found = []
    for seed in range(SIMULATED):
        rng = np.random.default_rng(seed)
        rate = int(rng.choice([4000, 8000, 16000, 44100]))
        low, high = np.exp(rng.uniform(np.log([20, 1200]), np.log([120, 8000])))
        device = simulated.Device("drawn", rate, 24, low, min(high, 0.4 * rate), rng.uniform(-6, 3))
        kinds = rng.choice(["Normal", "Fine Crackle", "Coarse Crackle", "Wheeze", "Wheeze+Crackle"], 4)
        plan = simulated.draw_plan((SIMULATED_SEED, seed), device, kinds.tolist())
        sound, noise = simulated.render(plan)
        mixed = (sound + noise * 10 ** ((plan.snr_db - snr_db) / 20) for snr_db in SIMULATED_SNR_DB)
        found.append(torch.stack([band_powers(resample(one, rate, RATE), RATE) for one in mixed]))
    return found


@functools.cache
def noise_powers() -> dict[str, list[Tensor]]:
    """Synthesise ten seconds of each kind of `NOISES`, several times: power in bands, (24, frames) of each draw."""
    samples = round(LONGEST * LEVEL_FRAME_S * RATE)
    found: dict[str, list[Tensor]] = {}
    for number, kind in enumerate(NOISES):
        rngs = [np.random.default_rng((ALONE_SEED, number, draw)) for draw in range(ALONE_DRAWS)]
        sounds = [0.05 * synthesize(kind, samples, rng).astype(np.float32) for rng in rngs]  # whose level is not read
        found[kind] = [band_powers(sound, RATE) for sound in sounds]
    return found


_remembered: dict[tuple, Example] = {}  # by the recording's digest, label and events: folds share recordings


def make_examples(recordings: Recordings) -> list[Example]:
    """Make an example of every recording, once per process."""
    examples = []
    for waveform, poor, cycles in zip(recordings.waveforms, recordings.poor, recordings.table["cycles"], strict=True):
        events = [
            Event(
                EVENT_TYPES[one["event_type"]],
                int(one["start"] / LEVEL_FRAME_S),
                math.ceil(one["end"] / LEVEL_FRAME_S),
            )
            for one in cycles
        ]
        known = (hashlib.sha256(waveform.tobytes()).digest(), bool(poor), *events)
        if known not in _remembered:
            _remembered[known] = make_example(waveform, not poor, events)
        examples.append(_remembered[known])
    return examples


class Batches:
    """
    Draws what the network is trained on: levels (batch, 24, frames) of parts of one length, and targets (batch,).

    Args:
        examples: the recordings.
        rng: draws.
    """

    def __init__(self, examples: Sequence[Example], rng: np.random.Generator) -> None:
        self.examples, self.rng = examples, rng
        found: dict[str, dict[str, list[tuple[Example, Event]]]] = {kind: defaultdict(list) for kind in EVENT_KINDS}
        for example in examples:
            for event in example.events if example.usable else ():
                kind = next(kind for kind, types in EVENT_KINDS.items() if event.type in types)
                found[kind][event.type].append((example, event))
        self.events = [[*types.values()] for types in found.values() if types]  # by kind and type
        self.durations = [event.end - event.start for types in self.events for events in types for _, event in events]

    def __call__(self, chosen: NDArray) -> tuple[Tensor, Tensor]:
        """Draw a part of each of the chosen recordings (batch,), or an event of any instead of each usable one.

        Some are of a copy with noise, or noise alone; some have pauses, faint noise, or noise for a while.
        """
        if self.events and self.rng.random() < EVENT_SHARE:
            frames = self._length(LONGEST_EVENT)
            drawn = [self._event(self.examples[index]) for index in chosen]
        else:
            frames = LONGEST if self.rng.random() < WHOLE_SHARE else self._length(LONGEST)
            drawn = [self._part(self.examples[index], frames) for index in chosen]
        parts, targets = zip(*drawn, strict=True)
        return batched_levels(parts, frames), torch.tensor(targets)

    def ranked(self, frames: int) -> tuple[Tensor, Tensor]:
        """Draw copies of recordings with different levels of one kind of noise.

        Returns:
            Levels (recordings * copies, 24, frames), and the level of noise of each copy (recordings, copies), 0 where
            it is as recorded.
        """
        ladders = []
        for index in self.rng.integers(len(self.examples), size=RANKED):
            example = self.examples[index]
            ladders.append(torch.cat([example.powers[None], example.noisy[self.rng.integers(KINDS_EACH)]]))
        return self._rungs(ladders, COPIES, frames)

    def ranked_simulated(self, frames: int) -> tuple[Tensor, Tensor]:
        """Draw simulated recordings as `ranked` does; all copies compare with each other: noise of shape (1, all)."""
        ladders = simulated_powers()
        chosen = [ladders[index] for index in self.rng.integers(len(ladders), size=RANKED_SIMULATED)]
        levels, noise = self._rungs(chosen, COPIES_SIMULATED, frames)
        return levels, noise.view(1, -1)

    def _rungs(self, ladders: Sequence[Tensor], number: int, frames: int) -> tuple[Tensor, Tensor]:
        """The same part of some rungs of each ladder (levels, 24, any)."""
        parts: list[Tensor] = []
        noise = []
        for ladder in ladders:
            rungs = self.rng.choice(len(ladder), number, replace=False)
            start = int(self.rng.integers(max(1, ladder.shape[2] - frames + 1)))
            parts += ladder[rungs, :, start : start + frames]
            noise.append(rungs)
        return batched_levels(parts, frames), torch.tensor(np.array(noise))

    def _length(self, longest: int) -> int:
        """Frames: as many of one to two times a length as of two to four times it."""
        return round(math.exp(self.rng.uniform(math.log(SHORTEST_FRAMES), math.log(longest))))

    def _quieter(self, powers: Tensor) -> Tensor:
        """Make one to three stretches of powers (24, frames) quieter or silent, sometimes: pauses tell no quality."""
        if self.rng.random() >= QUIETER_SHARE:
            return powers
        powers, frames = powers.clone(), powers.shape[1]
        for _ in range(self.rng.integers(1, 4)):
            length = min(frames // 3, int(np.exp(self.rng.uniform(*np.log(QUIETER_FRAMES)))))
            start = int(self.rng.integers(frames - length + 1))
            silent = self.rng.random() < SILENT_SHARE
            powers[:, start : start + length] *= 0 if silent else 10 ** (-self.rng.uniform(*QUIETER_DB) / 10)
        return powers

    def _copy(self, example: Example) -> tuple[Tensor, float]:
        """The powers of the recording, sometimes with noise, or of noise alone, and whether it is usable."""
        draw = self.rng.random()
        if draw < LITTLE_SHARE + MUCH_SHARE:
            of_kind = example.noisy[self.rng.integers(KINDS_EACH)]
            if draw < LITTLE_SHARE:
                return of_kind[self.rng.integers(MILDEST)], float(example.usable)
            return of_kind[-1 - self.rng.integers(SEVEREST)], 0.0
        if draw >= 1 - ALONE_SHARE:
            return self._noise(), 0.0
        return example.powers, float(example.usable)

    def _noise(self, kinds: Sequence[str] = tuple(NOISES)) -> Tensor:
        """Draw the powers (24, frames) of noise of one of the kinds."""
        draws = noise_powers()[kinds[int(self.rng.integers(len(kinds)))]]
        return draws[self.rng.integers(len(draws))]

    def _with_noise(
        self, powers: Tensor, portion: float, snr_db: float, kinds: Sequence[str] = tuple(NOISES)
    ) -> Tensor:
        """Add noise to a portion of the frames of powers (24, frames), at a ratio to their mean while it lasts.

        Powers of independent sounds add up. Of knocks and cries a moment may hold a pause: what is left in it is made
        as loud.
        """
        frames = powers.shape[1]
        length = max(1, round(portion * frames))
        start = int(self.rng.integers(frames - length + 1))
        noise = self._noise(kinds)
        noise = noise[:, (torch.arange(length) + int(self.rng.integers(noise.shape[1]))) % noise.shape[1]]
        noise = noise / noise.mean().clamp_min(torch.finfo(noise.dtype).tiny)
        powers = powers.clone()
        powers[:, start : start + length] += noise * (powers.mean() * 10 ** (-snr_db / 10))
        return powers

    def _varied(self, powers: Tensor) -> Tensor:
        """Sometimes vary powers (24, frames) by what tells no quality: stretches made quieter, and faint noise."""
        powers = self._quieter(powers)
        if self.rng.random() < FAINT_SHARE:
            powers = self._with_noise(powers, 1.0, self.rng.uniform(*FAINT_DB), ["white"])
        return powers

    def _disturbed(self, powers: Tensor, target: float) -> tuple[Tensor, float]:
        """Sometimes add noise to powers (24, frames): for a moment, or for long, which makes them unusable."""
        draw = self.rng.random()
        if draw < LONG_SHARE:
            snr_db = self.rng.uniform(*LONG_SNR_DB)
            return self._with_noise(powers, self.rng.uniform(*LONG_PORTION), snr_db), 0.0
        if draw < LONG_SHARE + MOMENT_SHARE:
            snr_db = self.rng.uniform(*MOMENT_SNR_DB)
            return self._with_noise(powers, self.rng.uniform(*MOMENT_PORTION), snr_db), target
        return powers, target

    def _part(self, example: Example, frames: int) -> tuple[Tensor, float]:
        powers, target = self._copy(example)
        starts = max(1, powers.shape[1] - frames + 1)
        start = 0 if self.rng.random() < BEGINNING_SHARE else int(self.rng.integers(starts))
        return self._disturbed(self._varied(powers[:, start : start + frames]), target)

    def _event(self, example: Example) -> tuple[Tensor, float]:
        """Of a usable recording: an event of any, each kind and each type in it as often as others."""
        if example.usable:
            types = self.events[self.rng.integers(len(self.events))]
            events = types[self.rng.integers(len(types))]
            example, event = events[self.rng.integers(len(events))]
            powers, target = self._copy(example)
            start, duration = event.start, event.end - event.start
        else:
            powers, target = self._copy(example)
            duration = self.durations[self.rng.integers(len(self.durations))]
            start = int(self.rng.integers(max(1, powers.shape[1] - duration + 1)))
        start = min(start, powers.shape[1] - min(duration, powers.shape[1]))
        return self._varied(powers[:, start : start + duration]), target


def batched_levels(parts: Sequence[Tensor], frames: int) -> Tensor:
    """Give powers (24, any) each as relative levels (parts, 24, frames), repeated where they are shorter.

    The last repetition may be cut, which moves a band's median a little from that of the part.
    """
    repeated = [part.repeat(1, -(-frames // part.shape[1]))[:, :frames] for part in parts]
    return relative_levels(torch.stack(repeated))


# ---- Training ----

# By channels and examples, which are kept beside it: as long as they are there, no others have their identity.
_networks: dict[tuple[int, ...], tuple[QualityNetwork, Sequence[Example]]] = {}


def _trained(examples: Sequence[Example], channels: int = CHANNELS) -> QualityNetwork:
    """Train a network with seed 0, once per process: one that knows neither of two folds serves both of them."""
    key = (channels, *map(id, examples))
    if key not in _networks:
        _networks[key] = train(examples, channels=channels), examples
    return _networks[key][0]


def train(examples: Sequence[Example], seed: int = 0, channels: int = CHANNELS, epochs: int = EPOCHS) -> QualityNetwork:
    """Train a network on all of the examples: AdamW, one cycle of the rate, mixup (Zhang et al. 2018), level and tilt.

    Half of the steps also ask that more noise lower the logit, see [`noise_loss`].
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = QualityNetwork(channels)
        generator = torch.Generator().manual_seed(seed)
        rng = np.random.default_rng(seed)
        draw = Batches(examples, rng)
        steps = max(1, len(examples) // BATCH_SIZE)
        optimizer = torch.optim.AdamW(network.parameters(), LEARNING_RATE, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=epochs * steps)
        network.train()
        for _ in range(epochs):
            for chosen in np.array_split(rng.permutation(len(examples)), steps):
                levels, usable = _augmented(*draw(chosen), generator, rng)
                frames, ranks = levels.shape[2], rng.random() < RANKED_SHARE
                ranked = [draw.ranked(frames), draw.ranked_simulated(frames)] if ranks else []
                batches = [levels, *(copies for copies, _ in ranked)]
                logits, *of_copies = network(torch.cat(batches)).split([len(batch) for batch in batches])
                # One recording in eleven is poor, and with the noise one target in five is 0: as if three in five were.
                loss = F.binary_cross_entropy_with_logits(logits, usable, weight=1 + 4 * (1 - usable))
                for found, (_, noise), weight in zip(of_copies, ranked, (1.0, SIMULATED_WEIGHT), strict=False):
                    loss = loss + weight * noise_loss(found.view_as(noise), noise)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    return network.eval()


def noise_loss(logits: Tensor, noise: Tensor) -> Tensor:
    """Pairwise ranking hinge loss (Joachims 2002), with a margin of `STEP` for each level of noise.

    The mean over all pairs of a group of max(0, STEP * n - d), where one has n > 0 levels more noise, and d less logit.

    Args:
        logits: (groups, members).
        noise: level of each, the same shape.
    """
    more = noise[:, None, :] - noise[:, :, None]
    less = logits[:, :, None] - logits[:, None, :]
    return F.relu(STEP * more - less)[more > 0].mean()


def _augmented(
    levels: Tensor, usable: Tensor, generator: torch.Generator, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Vary levels (batch, 24, frames): loudness, tilt, direction of time, four bands hidden, two recordings mixed."""
    number = len(levels)
    tilt = torch.linspace(-1, 1, LEVEL_BANDS)[None, :, None]
    shift = torch.randn(number, 2, 1, 1, generator=generator)
    levels = levels + 3 * shift[:, 0] + 2 * shift[:, 1] * tilt
    backwards = torch.rand(number, generator=generator) < 0.5
    levels[backwards] = levels[backwards].flip(2)
    first = torch.randint(LEVEL_BANDS - 4, (number, 1, 1), generator=generator)
    band = torch.arange(LEVEL_BANDS)[None, :, None]
    hidden = (band >= first) & (band < first + 4) & (torch.rand(number, 1, 1, generator=generator) < 0.5)
    levels = torch.where(hidden, levels.mean(dim=(1, 2), keepdim=True), levels)
    if rng.random() < 0.7:
        share, other = rng.beta(0.4, 0.4), torch.randperm(number, generator=generator)
        levels, usable = share * levels + (1 - share) * levels[other], share * usable + (1 - share) * usable[other]
    return levels, usable


def draw_folds(usable: NDArray, patients: NDArray, seed: int = 0) -> NDArray:
    """Draw which of `FOLDS` folds each recording (n,) is in: patients are kept apart, poor recordings spread evenly.

    Raises:
        ValueError: there are fewer than `FOLDS` usable recordings, poor ones or patients.
    """
    counts = {"usable recordings": usable.sum(), "poor ones": (~usable).sum(), "patients": len(set(patients))}
    if min(counts.values()) < FOLDS:
        there = ", ".join(f"{count} {name}" for name, count in counts.items())
        raise ValueError(f"There are {there}: {FOLDS} folds take {FOLDS} of each at least.")
    folds = np.empty(len(usable), dtype=int)
    splits = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=seed).split(usable, usable, patients)
    for number, (_, unseen) in enumerate(splits):
        folds[unseen] = number
    return folds


def held_out_logits(
    examples: Sequence[Example], folds: NDArray, kept: Callable[[int], NDArray] | None = None, channels: int = CHANNELS
) -> NDArray:
    """Give the logits (n,) of recordings by networks fitted on the other folds.

    Args:
        examples: of the recordings.
        folds: (n,), the number of the fold that each is in.
        kept: which recordings (n,), bool, a fold's network may be fitted on; left out: all others.
        channels: of the networks.
    """
    logits = np.empty(len(examples))
    for number in np.unique(folds).tolist():
        others, unseen = folds != number, folds == number
        network = _trained(_where(others if kept is None else others & kept(number), examples), channels)
        logits[unseen] = score(network, _where(unseen, examples))
    return logits


def _where(chosen: NDArray, examples: Sequence[Example]) -> list[Example]:
    return [example for example, taken in zip(examples, chosen, strict=True) if taken]


def fit(examples: Sequence[Example], folds: NDArray) -> tuple[dict[str, Any], NDArray]:
    """Fit the learned score: a network on all recordings, calibrated (Platt 1999) on the logits of held-out ones.

    Args:
        examples: of the recordings.
        folds: (n,), the number of the fold that each is held out in, by patient; each costs one more training.

    Returns:
        The parameters for `learned_quality`, and the calibrated logits (n,) of recordings while they were held out.
    """
    logits = held_out_logits(examples, folds)
    platt = LogisticRegression(C=1e6).fit(logits[:, None], [example.usable for example in examples])
    slope, offset = float(platt.coef_[0, 0]), float(platt.intercept_[0])
    return _trained(examples).export(slope, offset), slope * logits + offset


def fit_learned(
    recordings: Recordings, levels: Sequence[Tensor], folds: NDArray
) -> Callable[[Sequence[Tensor]], NDArray]:
    """Fit the score as [`fit`] does: the form in which `evaluation.quality` refits scores.

    Args:
        recordings: with their labels and events.
        levels: of the recordings, from `quality_levels`; made anew here, with those of copies and parts.
        folds: (n,), the number of the fold that each is in.

    Returns:
        A function from levels of m recordings to their scores (m,).
    """
    parameters, _ = fit(make_examples(recordings), folds)
    return lambda unseen: np.array([learned_quality(one, parameters) for one in unseen])


@torch.no_grad()
def score(network: QualityNetwork, examples: Sequence[Example]) -> NDArray:
    """Give the logits of recordings as they are."""
    return np.array([float(network(relative_levels(example.powers)[None])) for example in examples])


# ---- Reasons ----

# Each reason's own noise, and at which of its levels it is to be told: one sample in a hundred clipped, a fifth of them
# lost, 10 dB of the others. What has no noise of its own is the rest.
OWN_NOISE = {
    "clipped": ("clipping", 1),
    "dropouts": ("dropouts", 4),
    "mains hum": ("hum", 4),
    "low-frequency rumble": ("rumble", 4),
    "handling noise": ("knocks", 4),
    "broadband noise": ("white", 4),
    "speech or crying": ("babble", 4),
}
QUIET_GAIN_DB = -30.0
GOOD_SHARE = 0.985  # of good recordings lie below each threshold


def fit_reasons(waveforms: Sequence[NDArray]) -> dict[str, float]:
    """Fit the thresholds of `quality_reasons` on good recordings and degraded copies of them.

    Each lies halfway between what 98.5 % of the good recordings stay below and the median of copies with the reason's
    own noise, or at the former where that is more.
    """
    clean = [reason_measurements(waveform, RATE) for waveform in waveforms]
    thresholds = {name: float(np.quantile([one[name] for one in clean], GOOD_SHARE)) for name in clean[0]}
    some = list(enumerate(waveforms))[::10]
    spoiled = {
        name: [reason_measurements(degrade(waveform, kind, seed)[level], RATE)[name] for seed, waveform in some]
        for name, (kind, level) in OWN_NOISE.items()
    }
    spoiled["too quiet"] = [one["too quiet"] - QUIET_GAIN_DB for one in clean]
    for name, values in spoiled.items():
        thresholds[name] += max(0.0, float(np.median(values)) - thresholds[name]) / 2
    return {name: float(f"{value:.3g}") for name, value in thresholds.items()}


# ---- How far the labels go ----

ASIDE = 50  # children that no other row is fitted or scored on
WIDTHS = (8, 16, 24, 32)
SHARES = (0.25, 0.5, 0.75)


def ceiling(examples: Sequence[Example], patients: NDArray) -> Iterator[tuple[str, int, NDArray]]:
    """Score recordings of children that were held out, with networks of growing size, fitted on more and more children.

    `ASIDE` children are put aside. Of the others, every fifth in turn is held out; those put aside are scored last, by
    the shipped architecture fitted on all others.

    Args:
        examples: of the recordings.
        patients: (n,).

    Yields:
        What was fitted, how many numbers it has, and its logits (n,), NaN where a recording was not scored.
    """
    aside = np.isin(patients, np.random.default_rng(2022).permutation(np.unique(patients))[:ASIDE])
    known, of_known = _where(~aside, examples), patients[~aside]
    folds = draw_folds(np.array([example.usable for example in known]), of_known)

    def kept(share: float, number: int) -> NDArray:
        others = np.random.default_rng((0, number)).permutation(np.unique(of_known[folds != number]))
        return np.isin(of_known, others[: round(share * len(others))])

    settings = [(1.0, channels) for channels in WIDTHS] + [(share, CHANNELS) for share in SHARES]
    for share, channels in settings:
        logits = np.full(len(examples), np.nan)
        logits[~aside] = held_out_logits(known, folds, functools.partial(kept, share), channels)
        yield f"{channels} channels, {share:.0%} of the children in each fold", _size(channels), logits
    logits = np.full(len(examples), np.nan)
    logits[aside] = score(_trained(known), _where(aside, examples))
    yield f"{CHANNELS} channels, the {ASIDE} children put aside", _size(CHANNELS), logits


def _size(channels: int) -> int:
    """How many numbers are shipped, where each normalisation's two are folded into one bias."""
    return sum(values.numel() for values in QualityNetwork(channels).parameters()) - LAYERS * channels


def print_ceiling(examples: Sequence[Example], patients: NDArray) -> None:
    """Print what [`ceiling`] scores as a Markdown table, with 95 % intervals by child."""
    print("| network | numbers | recordings, poor | AUROC | 95 % |\n| --- | ---: | ---: | ---: | ---: |")
    poor = np.array([not example.usable for example in examples])
    for what, numbers, logits in ceiling(examples, patients):
        scored = ~np.isnan(logits)
        about = discrimination(logits[None, scored], poor[scored], patients[scored])
        auroc, ends = about["auroc"]["mean"], " to ".join(f"{end:.3f}" for end in about["auroc"]["interval"] or ())
        print(f"| {what} | {numbers:,} | {about['n']:,}, {about['poor']} | {auroc:.3f} | {ends} |", flush=True)


# ---- The command ----


def load_sprsound(data_dir: str | None, allow_missing_audio: bool) -> dict[str, Recordings]:
    """Read SPRSound's splits as [`load`] does, for a command.

    Raises:
        SystemExit: it cannot be read, or its training part is not there, or too little of it for `FOLDS` folds.
    """
    try:
        splits = load("sprsound", data_dir, allow_missing_audio)
        if "train" not in splits:
            raise FileNotFoundError(f"{data_dir} holds no training recordings of SPRSound, only {', '.join(splits)}.")
        draw_folds(~splits["train"].poor, splits["train"].patients)
    except (OSError, ValueError) as error:
        raise SystemExit(str(error).replace("allow_missing_audio=True", "--allow_missing_audio")) from error
    return splits


def write(parameters: dict[str, Any], thresholds: dict[str, float], path: Path) -> None:
    """Write the module that the published files import."""
    numbers = "\n".join(textwrap.wrap(json.dumps(parameters), 116, break_long_words=False, break_on_hyphens=False))
    reasons = "".join(f'    "{name}": {value!r},\n' for name, value in thresholds.items())
    path.write_text(
        '"""Parameters of the learned score and of reasons, as `python -m modeling_qlung.training.quality` writes them.'
        f'"""\n\nimport json\nfrom typing import Any\n\nREASON_THRESHOLDS: dict[str, float] = {{\n{reasons}}}\n'
        f'QUALITY_PARAMETERS: dict[str, Any] = json.loads("""\n{numbers}\n""")\n',
        encoding="utf-8",
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Fit on SPRSound's training recordings, write the parameters, and print the discrimination of unseen children."""
    parser = argparse.ArgumentParser(
        prog="python -m modeling_qlung.training.quality", description="Fit the learned quality score."
    )
    parser.add_argument("--data_dir", help="folder that holds BioCAS2022; left out: downloaded")
    parser.add_argument(
        "--ceiling", action="store_true", help="write nothing, but show larger networks and fewer children"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(quality_parameters_qlung.__file__),
        help="Python file to write; left out: that of this package, whose parameters are replaced",
    )
    parser.add_argument("--allow_missing_audio", action="store_true", help="work on the recordings that are there")
    args = parser.parse_args(argv)
    if not args.output.parent.is_dir() or args.output.is_dir():
        parser.error(f"--output {args.output}: give a file in a folder that is there")
    recordings = load_sprsound(args.data_dir, args.allow_missing_audio)["train"]
    examples, usable = make_examples(recordings), ~recordings.poor
    if args.ceiling:
        print_ceiling(examples, recordings.patients)
        return
    parameters, logits = fit(examples, draw_folds(usable, recordings.patients))
    good = np.random.default_rng(0).permutation(np.flatnonzero(usable))[:400]
    write(parameters, fit_reasons([recordings.waveforms[index] for index in good]), args.output)
    brier = np.mean((1 / (1 + np.exp(-logits)) - usable) ** 2)
    print(f"{len(usable)} recordings, {(~usable).sum()} poor ({(~usable).mean():.1%}); written to {args.output}")
    print(f"children not in fitting: AUROC {roc_auc_score(usable, logits):.3f}, Brier score {brier:.4f}")


if __name__ == "__main__":
    main()

"""Fitting the learned quality score, on sounds whose quality is known."""

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from modeling_qlung.evaluation.noises import NOISES, synthesize
from modeling_qlung.evaluation.quality_recordings import POOR, Recordings
from modeling_qlung.quality_qlung import (
    LEVEL_BANDS,
    LEVEL_FRAME_S,
    SHORTEST_FRAMES,
    band_powers,
    learned_quality,
    quality_levels,
    relative_levels,
)
from modeling_qlung.training import quality
from modeling_qlung.training.quality import (
    ASIDE,
    CHANNELS,
    COPIES,
    KINDS_EACH,
    LONGEST,
    OWN_NOISE,
    RANKED,
    SIMULATED_SNR_DB,
    STEP,
    Batches,
    Event,
    Example,
    QualityNetwork,
    ceiling,
    draw_folds,
    fit,
    fit_learned,
    fit_reasons,
    held_out_logits,
    make_example,
    make_examples,
    noise_loss,
    noise_powers,
    print_ceiling,
    simulated_powers,
    train,
)

RECORDINGS = 48


def sound(usable: bool, seed: int, seconds: float = 4.0) -> np.ndarray:
    """Noise of 150 to 700 Hz, that swells as breath does where it is usable and is steady where it is not."""
    rng = np.random.default_rng(seed)
    number = round(seconds * 16000)
    spectrum = np.fft.rfft(rng.standard_normal(number))
    frequencies = np.fft.rfftfreq(number, 1 / 16000)
    spectrum[(frequencies < 150) | (frequencies > 700)] *= 0.01
    swell = np.sin(np.pi * (np.arange(number) / 16000 / 1.5 + rng.random())) ** 2 if usable else 0.5
    made = np.fft.irfft(spectrum, number) * (0.05 + swell)
    return (0.03 * made / made.std()).astype(np.float32)


@pytest.fixture(scope="module", autouse=True)
def few_draws():
    """Fewer simulated recordings and noises than a fit takes: rendering them takes longest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quality, "SIMULATED", 8)
        patch.setattr(quality, "ALONE_DRAWS", 2)
        for rendered in (simulated_powers, noise_powers):
            rendered.cache_clear()
        yield
    for rendered in (simulated_powers, noise_powers):
        rendered.cache_clear()


@pytest.fixture(scope="module")
def recordings():
    """Four of each child, two of three usable, with two events each."""
    usable = np.arange(RECORDINGS) % 3 > 0
    waveforms = [sound(good, seed) for seed, good in enumerate(usable)]
    cycles = [
        [{"start": 0.5, "end": 1.25, "event_type": 0}, {"start": 2.0, "end": 2.5, "event_type": 2}] if good else []
        for good in usable
    ]
    labels = np.where(usable, "Normal", POOR)
    table = pd.DataFrame({"patient_id": np.arange(RECORDINGS) // 4, "record_label": labels, "cycles": cycles})
    return Recordings(waveforms, table)


@pytest.fixture(scope="module")
def examples(recordings):
    return make_examples(recordings)


@pytest.fixture(scope="module")
def folds(recordings):
    return recordings.table["patient_id"].to_numpy() % 2


@pytest.fixture(scope="module")
def fitted(examples, folds):
    return fit(examples, folds)


def test_what_is_exported_is_the_network():
    torch.manual_seed(0)
    network = QualityNetwork().eval()
    for norm in network.norms:
        assert isinstance(norm, nn.BatchNorm1d)
        for values in (norm.running_mean, norm.running_var, norm.weight, norm.bias):
            assert values is not None
            nn.init.uniform_(values, 0.5, 2.0)
    levels = 8 * torch.randn(LEVEL_BANDS, 200)
    with torch.no_grad():
        logit = network(levels[None])[0] / 10
    score = learned_quality(levels, network.export(0.1, -0.4))
    assert score == pytest.approx(float(torch.sigmoid(logit - 0.4)), abs=2e-4)
    assert 0.01 < score < 0.99


def test_copies_are_the_recordings_own_and_come_out_the_same_again(recordings, examples):
    again = make_example(recordings.waveforms[1], True, [])
    assert torch.equal(again.powers, band_powers(recordings.waveforms[1]))
    assert torch.equal(again.noisy, examples[1].noisy)
    assert again.noisy.shape == (KINDS_EACH, 8, *again.powers.shape)
    moved = [(relative_levels(example.noisy) - relative_levels(example.powers)).abs() for example in examples]
    by_level = torch.stack([one.mean(dim=(0, 2, 3)) for one in moved]).mean(dim=0)
    assert (by_level.diff() > 0).all()
    assert by_level[0] > 0


def test_simulated_recordings_differ_in_noise_alone():
    ladders = simulated_powers()
    assert all(len(ladder) == len(SIMULATED_SNR_DB) for ladder in ladders)
    quietest = torch.stack([relative_levels(ladder).quantile(0.05, dim=2).mean(dim=1) for ladder in ladders])
    assert (quietest.diff(dim=1) > 0).float().mean() > 0.9  # pauses fill up
    alike = [torch.corrcoef(ladder.flatten(1))[0] for ladder in ladders]
    assert min(float(one.min()) for one in alike) > 0.8  # one sound throughout
    assert abs(float(torch.corrcoef(torch.stack([ladder[0, :, :200].flatten() for ladder in ladders[:2]]))[0, 1])) < 0.5


def test_more_noise_is_to_lower_the_logit_by_a_step_at_least():
    noise = torch.tensor([[0, 2, 5], [1, 0, 8]])
    assert noise_loss(-STEP * noise, noise) == pytest.approx(0, abs=1e-6)
    assert noise_loss(-9.0 * noise, noise) == 0
    flat = torch.zeros(2, 3)
    assert noise_loss(flat, noise) == pytest.approx(STEP * (2 + 5 + 3 + 1 + 8 + 7) / 6)
    assert noise_loss(1.0 * noise, noise) == pytest.approx((1 + STEP) * (2 + 5 + 3 + 1 + 8 + 7) / 6)


def test_events_are_those_of_usable_recordings_in_frames(examples):
    assert [bool(example.events) for example in examples] == [example.usable for example in examples]
    assert examples[1].events == [Event("Normal", 15, 40), Event("Wheeze", 62, 79)]


def test_of_equal_samples_each_keeps_its_own_label_and_events(recordings):
    table = recordings.table.iloc[[0, 1]].reset_index(drop=True)
    unusable, usable = make_examples(Recordings(2 * [recordings.waveforms[0]], table))
    assert [example.usable for example in (unusable, usable)] == [False, True]
    assert [len(example.events) for example in (unusable, usable)] == [0, 2]
    assert torch.equal(unusable.noisy, usable.noisy)


def counting(number, frames, usable, events=()):
    """An example whose power in every band is the number of its frame, from a thousand times its own on."""
    powers = 1000.0 * number + torch.arange(1.0, frames + 1).expand(LEVEL_BANDS, -1)
    noisy = torch.stack([powers + 0.001 * level for level in range(1, 9)]).expand(KINDS_EACH, -1, -1, -1)
    return Example(powers, noisy, usable, list(events))


def as_recorded(monkeypatch: pytest.MonkeyPatch, event_share: float) -> None:
    """Without noise, and levels as the powers are."""
    monkeypatch.setattr(quality, "EVENT_SHARE", event_share)
    monkeypatch.setattr(quality, "LITTLE_SHARE", 0.0)
    monkeypatch.setattr(quality, "MUCH_SHARE", 0.0)
    monkeypatch.setattr(quality, "ALONE_SHARE", 0.0)
    for share in ("QUIETER_SHARE", "FAINT_SHARE", "LONG_SHARE", "MOMENT_SHARE"):
        monkeypatch.setattr(quality, share, 0.0)
    monkeypatch.setattr(quality, "relative_levels", lambda powers: powers)


def test_parts_are_of_one_length_and_often_the_beginning(monkeypatch: pytest.MonkeyPatch):
    as_recorded(monkeypatch, event_share=0.0)
    draw = Batches([counting(1, 500, True), counting(2, 40, False)], np.random.default_rng(0))
    lengths, starts = [], []
    for _ in range(400):
        levels, targets = draw(np.array([0, 1]))
        assert levels.shape[:2] == (2, LEVEL_BANDS)
        lengths.append(levels.shape[2])
        starts.append(int(levels[0, 0, 0]) - 1001)
        assert torch.equal(levels[0].diff(dim=1), torch.ones(LEVEL_BANDS, lengths[-1] - 1))
        assert torch.equal(levels[1], counting(2, 40, False).powers.repeat(1, 8)[:, : lengths[-1]])
        assert targets[1] == 0
    assert SHORTEST_FRAMES <= min(lengths) < 70
    assert max(lengths) == LONGEST
    assert 0.45 < np.mean(np.array(lengths) == LONGEST) < 0.56
    assert 0.24 < np.mean(np.array(starts) == 0) < 0.37
    assert max(starts) > 300


def test_little_noise_keeps_the_label_and_much_noise_is_unusable(monkeypatch: pytest.MonkeyPatch):
    as_recorded(monkeypatch, event_share=0.0)
    examples = [counting(1, 100, True), counting(2, 100, False)]
    for little, much, levels, target in ((1.0, 0.0, {1, 2}, 1), (0.0, 1.0, {7, 8}, 0)):
        monkeypatch.setattr(quality, "LITTLE_SHARE", little)
        monkeypatch.setattr(quality, "MUCH_SHARE", much)
        draw, seen = Batches(examples, np.random.default_rng(0)), set()
        for _ in range(40):
            drawn, targets = draw(np.arange(2))
            assert targets.tolist() == [target, 0]
            seen.add(round(float(drawn[0, 0, 0] % 1) * 1000))
        assert seen == levels


@pytest.mark.parametrize("event_share", [0.0, 1.0])
def test_noise_alone_is_unusable_in_place_of_any_recording(event_share: float, monkeypatch: pytest.MonkeyPatch):
    as_recorded(monkeypatch, event_share)
    powers = [one for draws in noise_powers().values() for one in draws]
    assert [len(draws) for draws in noise_powers().values()] == [2] * len(NOISES)
    assert all(one.shape == (LEVEL_BANDS, LONGEST - 1) for one in powers)
    assert len({float(one.sum()) for one in powers}) == len(powers)  # all draws differ
    monkeypatch.setattr(quality, "ALONE_SHARE", 0.3)
    monkeypatch.setattr(
        quality, "noise_powers", lambda: {kind: [torch.zeros(LEVEL_BANDS, LONGEST - 1)] for kind in NOISES}
    )
    examples = [counting(1, 400, True, [Event("Normal", 380, 400)]), counting(2, 400, False)]
    draw, alone = Batches(examples, np.random.default_rng(0)), 0
    for _ in range(200):
        levels, targets = draw(np.arange(2))
        of_noise = (levels == 0).all(dim=(1, 2))
        assert targets.tolist() == [float(not of_noise[0]), 0]
        alone += int(of_noise.sum())
    assert 90 < alone < 150


def test_stretches_are_made_quieter_whatever_the_label(monkeypatch: pytest.MonkeyPatch):
    as_recorded(monkeypatch, event_share=0.0)
    monkeypatch.setattr(quality, "QUIETER_SHARE", 1.0)
    examples = [counting(1, 400, True), counting(2, 400, False)]
    draw, silent = Batches(examples, np.random.default_rng(0)), 0
    for _ in range(50):
        levels, targets = draw(np.arange(2))
        assert targets.tolist() == [1, 0]
        for part, lowest in zip(levels[:, 0], (1001, 2001), strict=True):
            quieter = part < lowest
            assert 0 < quieter.sum() < len(part)  # something is left
            assert (part[quieter] < 0.11 * 2500).all()
            silent += bool((part == 0).any())
    assert 30 < silent < 70
    assert examples[0].powers.min() == 1001  # drawn from, not changed


def each_in_its_band() -> dict[str, list[Tensor]]:
    """One draw of each kind of noise, steady, and each in a band of its own."""
    bands = torch.eye(LEVEL_BANDS, dtype=torch.float64)
    return {kind: [bands[band, :, None].expand(-1, LONGEST - 1)] for band, kind in enumerate(NOISES)}


def flat(number: int, usable: bool) -> Example:
    """An example of 400 frames whose power is its number, and that of its events too."""
    powers = torch.full((LEVEL_BANDS, 400), float(number), dtype=torch.float64)
    return Example(powers, powers.expand(KINDS_EACH, 8, -1, -1), usable, [Event("Normal", 100, 180)] if usable else [])


@pytest.mark.parametrize("event_share", [0.0, 1.0])
def test_faint_white_noise_lies_under_all_of_a_part_whatever_the_label(
    event_share: float, monkeypatch: pytest.MonkeyPatch
):
    as_recorded(monkeypatch, event_share)
    monkeypatch.setattr(quality, "FAINT_SHARE", 0.5)
    noise = torch.ones(LEVEL_BANDS, LONGEST - 1, dtype=torch.float64)
    monkeypatch.setattr(quality, "noise_powers", lambda: {**each_in_its_band(), "white": [noise]})
    draw, weaker = Batches([flat(1, True), flat(2, False)], np.random.default_rng(0)), []
    for _ in range(200):
        levels, targets = draw(np.arange(2))
        assert targets.tolist() == [1, 0]
        for part, power in zip(levels, (1, 2), strict=True):
            added = part / power - 1
            assert torch.allclose(added, added[0, 0])  # in all bands and frames, as only the white noise is
            weaker.append(float(added[0, 0]))
    found = -10 * np.log10([one for one in weaker if one])
    assert 160 < len(found) < 240
    assert 25 <= found.min() < 28
    assert 57 < found.max() <= 60
    assert 40 < found.mean() < 45


@pytest.mark.parametrize(
    ("what", "label_kept", "portion", "snr_db"),
    [("LONG", False, (0.4, 0.8), (-40, 0)), ("MOMENT", True, (0.02, 0.1), (-40, 10))],
)
def test_noise_for_long_is_unusable_and_for_a_moment_is_not(
    what: str, label_kept: bool, portion: tuple, snr_db: tuple, monkeypatch: pytest.MonkeyPatch
):
    as_recorded(monkeypatch, event_share=0.0)
    monkeypatch.setattr(quality, "noise_powers", each_in_its_band)
    monkeypatch.setattr(quality, f"{what}_SHARE", 1.0)
    draw = Batches([flat(1, True), flat(2, False)], np.random.default_rng(0))
    portions, ratios, places, kinds = [], [], [], set()
    for _ in range(300):
        levels, targets = draw(np.arange(2))
        assert targets.tolist() == [label_kept, 0]
        for part, power in zip(levels, (1, 2), strict=True):
            added = part / power - 1
            (band,) = torch.unique(added.nonzero()[:, 0]).tolist()  # one kind at a time
            loud = added[band] > 0
            assert loud.int().diff().abs().sum() <= 2  # one stretch
            kinds.add(band)
            places.append(float(loud.nonzero()[0]) / int((~loud).sum()))
            portions.append(float(loud.float().mean()))
            ratios.append(-10 * np.log10(float(added.max()) / LEVEL_BANDS))
    assert kinds == set(range(len(NOISES)))
    for found, (low, high) in ((portions, portion), (ratios, snr_db), (places, (0, 1))):
        assert low - 0.01 < min(found) < max(found) < high + 0.01
        assert max(found) - min(found) > 0.9 * (high - low)


def test_noise_is_heard_from_any_moment_of_it_on(monkeypatch: pytest.MonkeyPatch):
    rising = torch.arange(1.0, LONGEST, dtype=torch.float64).expand(LEVEL_BANDS, -1)
    monkeypatch.setattr(quality, "noise_powers", lambda: {"white": [rising]})
    draw, steady = Batches([flat(1, True)], np.random.default_rng(0)), flat(1, True).powers[:, :20]
    heard = [draw._with_noise(steady, 1.0, 0.0, ["white"])[0] - 1 for _ in range(300)]
    starts = [float(one[0] / (one[1] - one[0])) for one in heard if one.argmax() == 19]  # the others begin again
    assert 10 < 300 - len(starts) < 35
    assert min(starts) < 20 < 270 < max(starts)


def test_each_share_is_of_all_parts(monkeypatch: pytest.MonkeyPatch):
    as_recorded(monkeypatch, event_share=0.0)
    monkeypatch.setattr(quality, "LONG_SHARE", 0.1)
    monkeypatch.setattr(quality, "MOMENT_SHARE", 0.2)
    draw, found = Batches([flat(1, True)], np.random.default_rng(0)), {"long": 0, "moment": 0}
    for _ in range(500):
        levels, targets = draw(np.arange(1))
        noisy = bool((levels > 1).any())
        found["long"] += targets.tolist() == [0]
        found["moment"] += noisy and targets.tolist() == [1]
        assert noisy or targets.tolist() == [1]
    assert 30 < found["long"] < 70
    assert 70 < found["moment"] < 130


def test_events_are_not_interrupted(monkeypatch: pytest.MonkeyPatch):
    as_recorded(monkeypatch, event_share=1.0)
    for share in ("LONG_SHARE", "MOMENT_SHARE"):
        monkeypatch.setattr(quality, share, 0.5)
    levels, targets = Batches([flat(1, True), flat(2, False)], np.random.default_rng(0))(np.arange(2))
    assert targets.tolist() == [1, 0]
    assert levels.max() == 2


@pytest.mark.parametrize("kind", NOISES)
def test_added_powers_are_those_of_the_sounds_added(kind: str, monkeypatch: pytest.MonkeyPatch):
    samples, snr_db = round(LONGEST * LEVEL_FRAME_S * 16000), -6.0

    def measured(sound: np.ndarray) -> Tensor:
        return band_powers(sound) * np.abs(sound).max() ** 2  # of the samples, not of the largest one

    breath, noise = sound(True, 3, samples / 16000), noise_powers()[kind][1]
    powers = measured(breath)
    draw = Batches([Example(powers, torch.empty(0), True, [])], np.random.default_rng(0))
    monkeypatch.setattr(quality, "noise_powers", lambda: {kind: [noise]})
    added = draw._with_noise(powers, 1.0, snr_db, [kind]) - powers
    made = synthesize(kind, samples, np.random.default_rng((quality.ALONE_SEED, [*NOISES].index(kind), 1)))
    made *= np.sqrt(float(powers.mean() / measured(made).mean())) * 10 ** (-snr_db / 20)
    expected = (measured(breath + made) - powers).mean(dim=1)
    loud = expected > 0.2 * expected.max()  # elsewhere what the two sounds share by chance is not small
    assert torch.allclose(added.mean(dim=1)[loud], expected[loud], rtol=0.1)


def test_copies_to_rank_are_the_same_part_of_one_recording(monkeypatch: pytest.MonkeyPatch):
    as_recorded(monkeypatch, event_share=0.0)
    draw = Batches([counting(1, 500, True), counting(2, 100, False)], np.random.default_rng(0))
    levels, noise = draw.ranked(120)
    assert noise.shape == (RANKED, COPIES)
    assert levels.shape == (RANKED * COPIES, LEVEL_BANDS, 120)
    first = levels.view(RANKED, COPIES, LEVEL_BANDS, 120)[..., 0, 0]
    assert torch.allclose((first - first.floor()) * 1000, noise.float(), atol=0.1)
    assert (first.floor() == first.floor()[:, :1]).all()
    assert len(first[:, 0].floor().unique()) > 3
    assert all(len(of_one.unique()) == COPIES for of_one in noise)
    levels, noise = draw.ranked_simulated(120)
    assert noise.shape == (1, len(levels))
    assert set(noise.unique().tolist()) <= set(range(len(SIMULATED_SNR_DB)))


def test_wheezes_and_crackles_are_drawn_as_often_as_normal_events(monkeypatch: pytest.MonkeyPatch):
    as_recorded(monkeypatch, event_share=1.0)
    common = [Event("Normal", start, start + 20) for start in range(0, 200, 20)]
    rare = [Event("Wheeze", 200, 230), Event("Rhonchi", 230, 240), Event("Fine Crackle", 495, 520)]
    examples = [counting(1, 500, True, common), counting(2, 500, True, rare), counting(3, 300, False)]
    draw = Batches(examples, np.random.default_rng(0))
    places = {"normal": 0, "Wheeze": 0, "Rhonchi": 0, "Fine Crackle": 0}
    for _ in range(600):
        levels, targets = draw(np.array([0, 2]))
        assert targets.tolist() == [1.0, 0.0]
        part, poor = levels[0, 0], levels[1, 0]
        assert 3000 < poor.min() <= poor.max() < 3301
        # An event of any usable recording, repeated, whichever was chosen; what passes the end is moved before it.
        found = int(part[0]) - 1
        name = {1200: "Wheeze", 1230: "Rhonchi", 1475: "Fine Crackle"}.get(found - 1000, "normal")
        places[name] += 1
        duration = {"normal": 20, "Wheeze": 30, "Rhonchi": 10, "Fine Crackle": 25}[name]
        assert torch.equal(part[duration : duration + 30], part[:30])
    assert all(160 < count < 240 for count in (places["normal"], places["Fine Crackle"]))
    assert all(70 < places[name] < 130 for name in ("Wheeze", "Rhonchi"))


def test_training_is_repeatable_and_leaves_the_random_state_alone(examples):
    state = torch.get_rng_state()
    first, second, other = (train(examples, seed, epochs=2).export() for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert first == second != other


def test_a_fit_tells_other_patients_recordings_and_is_calibrated_on_them(recordings, folds, fitted):
    usable = ~recordings.poor
    parameters, logits = fitted
    assert all(roc_auc_score(usable[folds == fold], logits[folds == fold]) == 1 for fold in (0, 1))
    assert np.mean(1 / (1 + np.exp(-logits))) == pytest.approx(usable.mean(), abs=0.01)
    unseen = [quality_levels(sound(good, 1000 + seed, 6.0)) for seed, good in enumerate(usable[:24])]
    scores = np.array([learned_quality(levels, parameters) for levels in unseen])
    assert roc_auc_score(usable[:24], scores) > 0.95
    assert scores[usable[:24]].mean() > 0.7 > 0.3 > scores[~usable[:24]].mean()


def test_the_form_that_is_refitted_in_folds_is_the_same_fit(recordings, folds, fitted):
    levels = [quality_levels(waveform) for waveform in recordings.waveforms[:5]]
    scores = fit_learned(recordings, [], folds)(levels)
    assert scores.tolist() == [learned_quality(one, fitted[0]) for one in levels]


class Remembering:
    """In the place of `train`: "networks" that give 1 for recordings of patients they were fitted on, else 0."""

    def __init__(self) -> None:
        self.fitted: list[tuple[int, set[int]]] = []  # channels, and patients whose number their levels are

    def __call__(
        self, examples: Sequence[Example], seed: int = 0, channels: int = CHANNELS
    ) -> Callable[[Tensor], Tensor]:
        known = {int(example.powers[0, 0]) for example in examples}
        self.fitted.append((channels, known))
        return lambda levels: torch.tensor(float(int(levels[0, 0, 0]) in known))


def known_patients(patients: np.ndarray, usable: np.ndarray) -> list[Example]:
    """Examples whose levels are all the number of their patient."""
    return [
        Example(torch.full((LEVEL_BANDS, 20), float(patient)), torch.empty(0), bool(good), [])
        for patient, good in zip(patients, usable, strict=True)
    ]


def test_folds_within_folds_share_networks_and_none_knows_whom_it_scores(monkeypatch: pytest.MonkeyPatch):
    patients, usable = np.repeat(np.arange(30), 3), np.tile([True, True, False], 30)
    examples, folds = known_patients(patients, usable), draw_folds(usable, patients)
    assert np.bincount(folds, ~usable).tolist() == [6] * 5
    assert all(len(set(folds[patients == patient])) == 1 for patient in range(30))
    remembering = Remembering()
    monkeypatch.setattr(quality, "train", remembering)
    monkeypatch.setattr(quality, "relative_levels", lambda powers: powers)
    for left_out in (None, *range(5)):
        chosen = np.flatnonzero(folds != left_out)
        assert not held_out_logits([examples[index] for index in chosen], folds[chosen]).any()
    assert len(remembering.fitted) == 5 + 10  # without one fold, and without two


def test_the_ceiling_is_of_children_not_fitted_on_and_of_those_put_aside(monkeypatch: pytest.MonkeyPatch):
    patients = np.repeat(np.arange(ASIDE + 20), 3)
    usable = np.tile([True, True, False], ASIDE + 20)
    examples = known_patients(patients, usable)
    remembering = Remembering()
    monkeypatch.setattr(quality, "train", remembering)
    monkeypatch.setattr(quality, "relative_levels", lambda powers: powers)
    rows = list(ceiling(examples, patients))
    assert [numbers for _, numbers, _ in rows] == [1969, 5857, 11665, 19393, *[5857] * 4]
    assert all(np.nanmax(logits) == 0 for *_, logits in rows)  # nobody scored was known
    scored = [set(patients[~np.isnan(logits)].tolist()) for *_, logits in rows]
    assert all(children == scored[0] for children in scored[:-1])
    assert len(scored[0]) == 20
    assert len(scored[-1]) == ASIDE
    assert not scored[0] & scored[-1]
    assert all(not known & scored[-1] for _, known in remembering.fitted)
    assert [len(known) for _, known in remembering.fitted[::5]] == [16, 16, 16, 16, 4, 8, 12, 20]
    assert [channels for channels, _ in remembering.fitted[::5]] == [8, 16, 24, 32, 16, 16, 16, 16]


def test_the_ceiling_is_printed_as_a_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    usable, patients = np.tile([True, False], 20), np.arange(40) // 2

    def rows(*_: object) -> list[tuple[str, int, np.ndarray]]:
        return [("all", 7, np.where(usable, 2.0, -1.0)), ("half", 7, np.where(patients < 10, 0.0, np.nan))]

    monkeypatch.setattr(quality, "ceiling", rows)
    print_ceiling([Example(torch.empty(0), torch.empty(0), bool(good), []) for good in usable], patients)
    assert capsys.readouterr().out.splitlines()[2:] == [
        "| all | 7 | 40, 20 | 1.000 | 1.000 to 1.000 |",
        "| half | 7 | 20, 10 | 0.500 | 0.500 to 0.500 |",
    ]


def test_thresholds_lie_between_good_recordings_and_their_degraded_copies():
    good = [sound(True, seed) for seed in range(12)]
    thresholds = fit_reasons(good)
    assert set(OWN_NOISE) < set(thresholds)
    assert thresholds["too quiet"] == pytest.approx(-20 * np.log10(0.03) + 15, abs=0.5)
    assert 0.01 < thresholds["dropouts"] < 0.2
    assert thresholds["no breathing heard"] < -5


def test_the_command_writes_the_fit_as_a_module(
    recordings: Recordings,
    folds: np.ndarray,
    fitted: tuple[dict, np.ndarray],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setattr(quality, "draw_folds", lambda usable, patients: folds)
    path = tmp_path / "written.py"
    monkeypatch.setattr(quality, "load", lambda *of: {"train": recordings})
    quality.main(["--data_dir", str(tmp_path), "--output", str(path)])
    assert "48 recordings, 16 poor (33.3%); written to" in capsys.readouterr().out
    assert max(map(len, path.read_text().splitlines())) <= 120
    spec = importlib.util.spec_from_file_location("written", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    parameters, _ = fitted
    assert parameters == module.QUALITY_PARAMETERS
    usable = np.random.default_rng(0).permutation(np.flatnonzero(~recordings.poor))
    assert fit_reasons([recordings.waveforms[index] for index in usable]) == module.REASON_THRESHOLDS


def test_too_few_recordings_for_folds_are_counted(recordings, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match=r"There are 8 usable recordings, 4 poor ones, 3 patients: 5 folds take 5 of"):
        draw_folds(~recordings.poor[:12], recordings.patients[:12])
    monkeypatch.setattr(quality, "load", lambda *of: {"train": recordings.take(np.arange(12))})
    with pytest.raises(SystemExit, match="4 poor ones"):
        quality.main([])
    monkeypatch.setattr(quality, "load", lambda *of: {"test_intra": recordings, "all": recordings})
    with pytest.raises(SystemExit, match="no training recordings of SPRSound, only test_intra, all"):
        quality.main([])


def test_the_command_says_what_is_missing_before_it_fits(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        quality.main(["--data_dir", str(tmp_path), "--output", str(tmp_path / "no" / "written.py")])
    assert "give a file in a folder that is there" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        quality.main(["--data_dir", str(tmp_path), "--output", str(tmp_path)])
    with pytest.raises(SystemExit, match="BioCAS2022"):
        quality.main(["--data_dir", str(tmp_path), "--output", str(tmp_path / "written.py")])

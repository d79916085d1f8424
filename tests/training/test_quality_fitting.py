"""Fitting the learned quality score, on sounds whose quality is known."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from modeling_qlung.quality_qlung import LEVEL_BANDS, learned_quality, quality_levels
from modeling_qlung.training import quality
from modeling_qlung.training.quality import (
    ASIDE,
    CHANNELS,
    COPIES,
    COPY_SHARES,
    CROP,
    OWN_NOISE,
    SPOILED,
    Examples,
    QualityNetwork,
    ceiling,
    collect,
    fit,
    fit_learned,
    fit_reasons,
    make_copies,
    print_ceiling,
    train,
    write,
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


@pytest.fixture(scope="module")
def recordings():
    """Waveforms, their copies' levels, whether they are usable, and their patients, of four recordings each."""
    usable = np.arange(RECORDINGS) % 3 > 0
    waveforms = [sound(good, seed) for seed, good in enumerate(usable)]
    return waveforms, [make_copies(waveform) for waveform in waveforms], usable, np.arange(RECORDINGS) // 4


@pytest.fixture(scope="module")
def fitted(recordings):
    _, copies, usable, patients = recordings
    return fit(copies, usable, patients, folds=1)


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


def test_copies_are_the_recordings_own_and_come_out_the_same_again(recordings):
    waveforms, copies, _, _ = recordings
    again = make_copies(waveforms[1])
    assert len(again) == len(COPIES) == len(COPY_SHARES)
    assert all(torch.equal(one, other) for one, other in zip(copies[1], again, strict=True))
    assert torch.equal(again[0], quality_levels(waveforms[1]).half())
    little, much = ((again[number] - again[0]).float().abs().mean() for number in (1, SPOILED))
    assert 0 < little < much


def test_what_is_drawn_is_a_part_and_much_noise_is_unusable(recordings):
    _, copies, usable, _ = recordings
    examples = collect(copies, usable)
    generator = torch.Generator().manual_seed(0)
    chosen = torch.arange(RECORDINGS).repeat(20)
    levels, targets = examples.draw(chosen, generator)
    assert levels.shape == (len(chosen), LEVEL_BANDS, CROP)
    for drawn, target, index in zip(levels, targets, chosen.tolist(), strict=True):
        frames = copies[index][0].shape[1]
        # Recordings of 4 s are repeated to 10 s: a part starts anywhere in the first round.
        which = [
            number
            for number, copy in enumerate(copies[index])
            for start in [int((copy.float() - drawn[:, :1]).abs().sum(dim=0).argmin())]
            if torch.equal(copy.repeat(1, 5)[:, start : start + CROP].float(), drawn) and start < frames
        ]
        assert which
        assert float(target) == float(usable[index] and which[0] != SPOILED)


def test_training_is_repeatable_and_leaves_the_random_state_alone(recordings):
    _, copies, usable, _ = recordings
    examples = collect(copies, usable)
    state = torch.get_rng_state()
    first, second, other = (train(examples, seed, epochs=2).export() for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert first == second != other


def test_a_fit_tells_other_patients_recordings_and_is_calibrated_on_a_fold_of_them(recordings, fitted):
    _, _, usable, patients = recordings
    parameters, logits = fitted
    held_out = ~np.isnan(logits)
    assert 0 < held_out.sum() < RECORDINGS / 2
    assert not set(patients[held_out]) & set(patients[~held_out])
    assert roc_auc_score(usable[held_out], logits[held_out]) == 1
    unseen = [quality_levels(sound(good, 1000 + seed, 6.0)) for seed, good in enumerate(usable[:24])]
    scores = np.array([learned_quality(levels, parameters) for levels in unseen])
    assert roc_auc_score(usable[:24], scores) > 0.95
    assert scores[usable[:24]].mean() > 0.7 > 0.3 > scores[~usable[:24]].mean()


def test_the_form_that_is_refitted_in_folds_is_the_same_fit(recordings, fitted):
    waveforms, _, usable, patients = recordings
    levels = [quality_levels(waveform) for waveform in waveforms]
    scores = fit_learned(waveforms, levels, usable, patients)(levels[:5])
    assert scores.tolist() == [learned_quality(one, fitted[0]) for one in levels[:5]]


class Remembering:
    """In the place of `train`: "networks" that give 1 for recordings of patients they were fitted on, else 0."""

    def __init__(self) -> None:
        self.fitted: list[tuple[int, set[int]]] = []  # channels, and patients whose number their levels are

    def __call__(self, examples: Examples, seed: int = 0, channels: int = CHANNELS) -> Callable[[Tensor], Tensor]:
        known = {int(number) for number in examples.levels[:, 0, 0, 0]}
        self.fitted.append((channels, known))
        return lambda levels: torch.tensor(float(int(levels[0, 0, 0]) in known))


def test_the_ceiling_is_of_children_not_fitted_on_and_of_those_put_aside(monkeypatch: pytest.MonkeyPatch):
    patients = np.repeat(np.arange(ASIDE + 20), 3)
    usable = np.tile([True, True, False], ASIDE + 20)
    copies = [[torch.full((LEVEL_BANDS, 20), float(patient)).half()] * len(COPIES) for patient in patients]
    remembering = Remembering()
    monkeypatch.setattr(quality, "train", remembering)
    rows = list(ceiling(copies, usable, patients))
    assert [numbers for _, numbers, _ in rows] == [749, 1977, 5873, 19425, *[1977] * 4]
    assert all(np.nanmax(logits) == 0 for *_, logits in rows)  # nobody scored was known
    scored = [set(patients[~np.isnan(logits)].tolist()) for *_, logits in rows]
    assert all(children == scored[0] for children in scored[:-1])
    assert len(scored[0]) == 20
    assert len(scored[-1]) == ASIDE
    assert not scored[0] & scored[-1]
    assert all(not known & scored[-1] for _, known in remembering.fitted)
    assert [len(known) for _, known in remembering.fitted[::5]] == [16, 16, 16, 16, 4, 8, 12, 20]
    assert [channels for channels, _ in remembering.fitted[::5]] == [4, 8, 16, 32, 8, 8, 8, 8]


def test_the_ceiling_is_printed_as_a_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    usable, patients = np.tile([True, False], 20), np.arange(40) // 2

    def rows(*_: object) -> list[tuple[str, int, np.ndarray]]:
        return [("all", 7, np.where(usable, 2.0, -1.0)), ("half", 7, np.where(patients < 10, 0.0, np.nan))]

    monkeypatch.setattr(quality, "ceiling", rows)
    print_ceiling([], usable, patients)
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


def test_what_is_written_is_read_again(tmp_path: Path):
    parameters = QualityNetwork().eval().export()
    thresholds = {"too quiet": 60.0, "mains hum": 7.25}
    path = tmp_path / "written.py"
    write(parameters, thresholds, path)
    assert max(map(len, path.read_text().splitlines())) <= 120
    spec = importlib.util.spec_from_file_location("written", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (parameters, thresholds) == (module.QUALITY_PARAMETERS, module.REASON_THRESHOLDS)

"""Sampling, class weights, schedule, score, masks and the moving average against the published code's own numbers."""

import json
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments, get_scheduler

from modeling_qlung.evaluation import scores_from_confusion
from modeling_qlung.training.as_published import FAULTS, HalfStepCallback, spec_augment
from modeling_qlung.training.augmentation import SpecAugment
from modeling_qlung.training.losses import CrossEntropyLoss
from modeling_qlung.training.sampling import WeightedEpochSampler, class_weights

from ..training.small_training import cycles, make_trainer, small_model
from .reference import FIXTURES


@pytest.fixture(scope="module")
def published() -> dict[str, Any]:
    return json.loads((FIXTURES / "training.json").read_text(encoding="utf-8"))


def test_weighted_sampling_draws_each_example_as_often(published):
    """On the real counts: 4,142 draws with replacement, by 1 / (share of the class)."""
    labels = np.repeat(np.arange(4), published["class_counts"])
    sampler = WeightedEpochSampler(labels.tolist(), 4, power=1.0, replacement=True)
    expected = np.array(published["sampler"]["probability_of_an_example"])[labels]
    difference = np.abs(sampler.probabilities / expected - 1).max()
    print(f"\nsampling: largest relative difference of an example's probability {difference:.1e}")
    assert difference < 1e-6
    assert (len(sampler), sampler.replacement) == (published["sampler"]["draws"], published["sampler"]["replacement"])


def test_weighted_cross_entropy_is_the_same(published):
    """Its weights sum to 1 and ours have mean 1 over the examples; what they weigh is a weighted mean."""
    weights = class_weights(published["class_counts"])
    ratio = weights / np.array(published["class_weights"])
    case = published["weighted_cross_entropy"]
    logits, targets = torch.tensor(case["logits"]), torch.tensor(case["labels"])
    loss = nn.functional.cross_entropy(logits, targets, torch.tensor(weights, dtype=torch.float32)).item()
    ours = CrossEntropyLoss(scale=1.0, class_weights=weights.tolist())
    difference = abs(loss - case["loss"])
    print(f"\nclass weights: ratio to the published {ratio.mean():.6f}, spread {np.ptp(ratio) / ratio.mean():.1e}")
    print(f"weighted cross-entropy: difference {difference:.1e}")
    assert np.ptp(ratio) / ratio.mean() < 1e-6
    assert difference < 1e-6
    assert ours(torch.zeros_like(logits), targets, torch.ones(6), logits=logits).item() == pytest.approx(
        case["loss"], abs=1e-6
    )


def rates(name: str, steps: int, warmup: int = 0, **options: Any) -> np.ndarray:
    """Learning rate at each step, and after the last, of a Transformers schedule from 5e-5 on: (steps + 1,)."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=5e-5)
    scheduler = get_scheduler(name, optimizer, warmup, steps, scheduler_specific_kwargs=options or None)
    values = [optimizer.param_groups[0]["lr"]]
    for _ in range(steps):
        optimizer.step()
        scheduler.step()
        values.append(optimizer.param_groups[0]["lr"])
    return np.array(values)


def test_the_schedule_is_a_cosine_that_the_published_code_takes_in_steps_of_an_epoch(published):
    """It holds, all through epoch e, the rate that ours reaches at the end of epoch e, above a floor of 5e-8."""
    expected, batches = np.array(published["schedule"]["rates"]), 517
    floored = rates("cosine_with_min_lr", 50 * batches, min_lr_rate=1e-3)
    at_ends = np.abs(floored[batches::batches] - expected).max() / 5e-5
    plain = rates("cosine", 50 * batches)
    floor = np.abs(plain[batches::batches] - expected).max() / 5e-5
    over_epochs = plain[:-1].reshape(50, batches).mean(axis=1)
    lead = (over_epochs - expected) / 5e-5
    print(
        f"\nschedule, in parts of the first rate: with the floor, at the ends of epochs {at_ends:.1e}; without it "
        f"{floor:.1e}; mean over an epoch, ours minus published, {lead.min():.4f} to {lead.max():.4f}"
    )
    assert at_ends < 1e-9
    assert floor < 1.01e-3
    assert -1e-3 < lead.min() < lead.max() < 0.0162  # half an epoch ahead at most: π / 2 · 0.5 / 50


def test_the_published_warmup_starts_at_a_tenth_and_joins_the_cosine(published):
    """Off in the published runs. Ten epochs from lr / 10 to the cosine's value there; ours: from 0 to lr, then down."""
    warm, batches = published["schedule"]["warm"], published["schedule"]["warm"]["batches_per_epoch"]
    expected = np.array(warm["rates"])
    places = (np.arange(50)[:, None] * batches + np.array(warm["batches"])).ravel()
    ours = rates("cosine", 50 * batches, warmup=10 * batches)[places].reshape(expected.shape)
    difference = (ours - expected) / 5e-5
    print(
        f"\nwarm-up, ours minus published, in parts of the rate: first step {difference[0, 0]:.3f}, "
        f"end of warm-up {difference[10, 0]:.3f}, largest {np.abs(difference).max():.3f}"
    )
    assert expected[0, 0] / 5e-5 == pytest.approx(0.1)
    assert difference[0, 0] == pytest.approx(-0.1)
    assert np.abs(difference).max() < 0.25


@pytest.mark.parametrize("case", range(3))
def test_the_score_of_a_confusion_matrix_is_the_same(case, published):
    row = published["scores"][case]
    ours = scores_from_confusion(np.array(row["confusion"]))
    for kind in ("4class", "2class"):
        names = {"specificity": "specificity", "sensitivity": f"sensitivity_{kind}", "score": f"score_{kind}"}
        difference = max(abs(ours[name] - row[kind][theirs]) for theirs, name in names.items())
        print(f"\n{kind} score {ours[f'score_{kind}']:.2f}: largest difference {difference:.1e}")
        assert difference < 1e-6


def test_masks_fall_as_often_as_published_and_as_wide(published):
    draws, generator = published["spec_augment"]["draws"], torch.Generator().manual_seed(0)
    sheet = torch.randn(draws, 4, 128, generator=generator)
    narrow = SpecAugment(time_masks=0)
    changed = (spec_augment(narrow)(sheet, generator) != sheet).flatten(1).any(1).sum().item()
    always = (narrow(sheet, generator) != sheet).flatten(1).any(1).float().mean().item()
    theirs = published["spec_augment"]["changed"]
    print(f"\nmasked: {changed / draws:.4f} of the items, published {theirs / draws:.4f}, by default {always:.4f}")
    # Both masks have width 0 in 1 of 48² cases, and then nothing changes.
    expected = scipy.stats.norm.cdf(1)
    assert changed / draws == pytest.approx(expected, abs=0.01)
    assert theirs / draws == pytest.approx(expected, abs=0.01)
    assert always > 0.998
    for axis, options in {"frequency": {"time_masks": 0}, "time": {"freq_masks": 0}}.items():
        shape = (draws, 1, 128) if axis == "frequency" else (draws, 798, 1)
        one = SpecAugment(**{"freq_masks": 1, "time_masks": 1, **options}, fill=0.0)
        widths = (one(torch.ones(shape), generator) == 0).flatten(1).sum(1)
        counts = np.bincount(widths, minlength=len(published["spec_augment"][f"{axis}_widths"]))
        table = np.stack([counts, published["spec_augment"][f"{axis}_widths"]])
        p = scipy.stats.chi2_contingency(table).pvalue
        print(f"{axis} mask widths 0 to {len(counts) - 1}: same distribution, p = {p:.2f}")
        assert len(counts) == table.shape[1]
        assert p > 1e-3


@pytest.mark.parametrize("options", [{"probability": 1.1}, {"probability": -0.1}, {"fill": "median"}])
def test_mask_options_out_of_range_are_named(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} must"):
        SpecAugment(**options)


def test_the_fill_is_the_published_one(published, monkeypatch):
    """The same masks in the same places: time masks get the mean after the frequency masks."""
    case = published["spec_augment"]["example"]
    features, expected = torch.tensor(case["features"])[None], torch.tensor(case["masked"])[None]
    monkeypatch.setattr("modeling_qlung.training.augmentation._draw_masks", _fixed_masks(case))
    ours = spec_augment(SpecAugment())
    difference = (ours(features, torch.Generator().manual_seed(1)) - expected).abs().max().item()
    default = (SpecAugment()(features) - expected).abs().max().item()
    print(f"\nfill: difference {difference:.1e}; of the default's single mean {default:.2f}")
    assert difference < 1e-5
    assert default > 1e-2


def _fixed_masks(case: dict[str, Any]):
    def draw(batch, size, masks, width, generator):
        spans = case["frequency_masks"] if size == 24 else case["time_masks"]
        positions = torch.arange(size)
        return torch.stack([(positions >= first) & (positions < last) for first, last in spans]).any(0)[None]

    return draw


def test_the_moving_average_is_the_published_one(published):
    """Six steps of Adam, with batch norm, whose running statistics take part (and which would leave a bias before it
    without a gradient, and Adam with the sign of rounding errors).
    """
    case = published["moving_average"]
    net = nn.Sequential(nn.Linear(3, 5, bias=False), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 2))
    net.load_state_dict({name: torch.tensor(value) for name, value in case["start"].items()})
    optimizer = torch.optim.Adam(net.parameters(), lr=case["learning_rate"], weight_decay=case["weight_decay"])
    callback = HalfStepCallback()
    unused = TrainingArguments("unused", use_cpu=True), TrainerState(), TrainerControl()
    largest = 0.0
    for inputs, labels, expected in zip(case["inputs"], case["labels"], case["after_each_step"], strict=True):
        callback.on_step_begin(*unused, model=net)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(torch.tensor(inputs)), torch.tensor(labels)).backward()
        optimizer.step()
        callback.on_step_end(*unused, model=net)
        for name, value in net.state_dict().items():
            if value.is_floating_point():
                largest = max(largest, (value - torch.tensor(expected[name])).abs().max().item())
    print(f"\nmoving average: largest difference after any of six steps {largest:.1e}")
    assert largest < 1e-6


def test_the_published_moving_average_is_half_the_learning_rate(tmp_path):
    """And no average: training with it at a rate is training without it at half of that, weight by weight."""
    trained = {}
    for name, rate, callbacks in (("with", 2e-3, [HalfStepCallback()]), ("without", 1e-3, [])):
        trainer = make_trainer(
            tmp_path / name,
            small_model(),
            cycles(16),
            optim="adamw_torch",
            adam_epsilon=1e-5,  # the keys' biases have no gradient but rounding errors
            learning_rate=rate,
            weight_decay=0.01,
            gradient_accumulation_steps=2,
            callbacks=callbacks,
        )
        trainer.train()
        trained[name] = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    start = small_model().state_dict()
    moved = max((trained["without"][key] - start[key]).abs().max().item() for key in start)
    apart = max((trained["with"][key] - trained["without"][key]).abs().max().item() for key in start)
    print(f"\nhalf steps at a rate of 2e-3 against whole ones at 1e-3: {apart:.1e} apart, {moved:.1e} from the start")
    assert apart < 1e-6
    assert moved > 1e-3


def test_every_fault_is_told():
    assert list(FAULTS) == ["preparation", "position_grid", "spec_augment", "moving_average"]
    assert all("Otherwise: " in meaning for meaning in FAULTS.values())

"""Training and evaluation on input of several lengths: batches of one length, rows prepared by themselves."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from torch.utils.data import DataLoader
from transformers import TrainerControl, TrainerState

from modeling_qlung import QLungFeatureExtractor, QLungForAudioClassification
from modeling_qlung.evaluation.flatness import measure_flatness
from modeling_qlung.evaluation.inspection import embeddings
from modeling_qlung.inference import attention_map
from modeling_qlung.training.augmentation import SpecAugment
from modeling_qlung.training.data import CycleCollator, assign_buckets, fit_normalization
from modeling_qlung.training.losses import CrossEntropyLoss
from modeling_qlung.training.objectives import build_objective
from modeling_qlung.training.sampling import SamplerEpochCallback, WeightedEpochSampler
from modeling_qlung.training.sharpness import SharpnessAwareStep
from modeling_qlung.training.trainer import QLungTrainer

from .small_training import batches, cycles, gradient_at, make_trainer, mean, small_model, train_by_hand
from .test_distributed import launch
from .test_trainer import StopAt, assert_equal_weights, last_whole_checkpoint, weights

DURATIONS = [0.5, 0.9, 1.25]  # the rows last 0.2 to 1.25 s
FRAMES = [48, 88, 123]


def extractor_of(durations: list[float] = DURATIONS, **options) -> QLungFeatureExtractor:
    return QLungFeatureExtractor(duration=durations[-1], durations=durations, **options)


def model_of_several_lengths(seed: int = 0) -> QLungForAudioClassification:
    """Of the lengths above, and with positions that are not all zero, as a fresh AST's are."""
    model = small_model(seed, audio_config={"max_length": 123, "initializer_range": 0.3}, input_frames=FRAMES)
    for parameter in model.qlung.encoder.embeddings.parameters(recurse=False):
        torch.nn.init.normal_(parameter)
    return model


def bucket_trainer(folder: Path, **options) -> QLungTrainer:
    options = {"model": model_of_several_lengths(), "learning_rate": 0.01, **options}
    return make_trainer(folder, feature_extractor=extractor_of(), **options)


# ---- Order of an epoch ----

SIZES = [123, 57, 21]
BUCKETS = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], SIZES))
LABELS = np.random.default_rng(1).integers(0, 3, len(BUCKETS)).tolist()


def bucket_sampler(processes: int = 1, batch_size: int = 4, **options) -> WeightedEpochSampler:
    options = {"power": 0.0, "replacement": False, **options}
    return WeightedEpochSampler(
        LABELS, 3, buckets=BUCKETS.tolist(), batch_size=batch_size, num_processes=processes, seed=3, **options
    )


def epochs_batches(sampler, processes: int, epoch: int = 0, skipped: int = 0) -> list[list[list[int]]]:
    """Indices of each step's batches, by process, as Accelerate hands them out."""
    shares, rows = [], torch.arange(len(LABELS))
    for process in range(processes):
        loader: Any = DataLoader(rows, batch_size=sampler.batch_size, sampler=sampler)  # type: ignore[arg-type]
        loader = prepare_data_loader(loader, num_processes=processes, process_index=process, put_on_device=False)
        loader = skip_first_batches(loader, skipped) if skipped else loader
        SamplerEpochCallback(sampler).on_epoch_begin(None, TrainerState(epoch=epoch), TrainerControl())
        loader.set_epoch(epoch)
        shares.append([batch.tolist() for batch in loader])
    return [list(step) for step in zip(*shares, strict=True)]


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("epoch", [0, 1])
def test_every_row_comes_once_and_steps_are_of_one_bucket(processes, epoch):
    sampler = bucket_sampler(processes)
    steps = epochs_batches(sampler, processes, epoch)
    sampler.set_epoch(epoch)
    order = list(sampler)
    assert sorted(order) == list(range(len(LABELS)))
    seen = [index for step in steps for batch in step for index in batch]
    repeated = len(seen) - len(order)  # Accelerate's own, to fill the last step
    assert repeated < 4 * processes
    assert sorted(seen) == sorted([*order, *order[:repeated]])
    mixed = [step for step in steps[:-1] if len(np.unique(BUCKETS[np.concatenate(step)])) > 1]
    assert len(mixed) <= 2, "what is left of the first bucket and of the second"
    for step in steps[:-1]:
        longest = [BUCKETS[batch].max() for batch in step]
        assert len(set(longest)) == 1, "a process waits for another's longer batch"
    assert BUCKETS[order[: 4 * processes]].min() == 2
    assert {BUCKETS[batch].max() for batch in steps[-1]} == {2}


def test_steps_of_all_buckets_are_shuffled():
    sampler = bucket_sampler()
    first = [BUCKETS[step[0]].max() for step in epochs_batches(sampler, 1)]
    changes = np.count_nonzero(np.diff(first))
    assert changes > 10
    assert [BUCKETS[step[0]].max() for step in epochs_batches(sampler, 1, epoch=1)] != first


def test_an_epoch_is_exactly_resumed():
    for processes in (1, 2):
        whole = epochs_batches(bucket_sampler(processes), processes, epoch=2)
        assert epochs_batches(bucket_sampler(processes), processes, epoch=2, skipped=5) == whole[5:]


def test_buckets_change_the_order_of_a_weighted_draw_and_nothing_else():
    weighted = WeightedEpochSampler(LABELS, 3, power=1.0, seed=3)
    for epoch in range(3):
        sampler = bucket_sampler(power=1.0, replacement=True)
        weighted.set_epoch(epoch)
        sampler.set_epoch(epoch)
        assert sorted(sampler) == sorted(weighted)


def test_fewer_rows_than_a_step_stay_one_batch():
    sampler = WeightedEpochSampler([0, 1, 0], 2, 0, replacement=False, buckets=[0, 2, 0], batch_size=8)
    assert sorted(sampler) == [0, 1, 2]
    with pytest.raises(ValueError, match="2 buckets for 3 labels"):
        WeightedEpochSampler([0, 1, 0], 2, buckets=[0, 1])


# ---- Batches ----


def test_rows_get_the_smallest_length_that_holds_them():
    rows = cycles(40)
    samples = np.array([len(row["waveform"]) for row in rows])
    expected = np.where(samples <= 8000, 0, np.where(samples <= 14400, 1, 2))
    assert set(expected) == {0, 1, 2}
    assert assign_buckets(extractor_of(), rows) == expected.tolist()
    assert assign_buckets(extractor_of(), rows.select([7, 3, 30])) == expected[[7, 3, 30]].tolist()


def test_a_training_batch_is_of_one_length_and_an_evaluated_row_of_its_own():
    extractor, rows = extractor_of(), [cycles(16)[index] for index in range(16)]
    waveforms = [torch.from_numpy(row["waveform"].copy()) for row in rows]
    assert len(set(assign_buckets(extractor, cycles(16)))) == 3
    together = CycleCollator(extractor, one_length=True)(rows)
    assert "num_samples" not in together
    for clip, waveform in zip(together["clips"], waveforms, strict=True):
        assert torch.equal(clip, QLungFeatureExtractor(duration=1.25).fit_length(waveform))
    apart = CycleCollator(extractor)(rows)
    for clip, length, waveform in zip(apart["clips"], apart["num_samples"], waveforms, strict=True):
        own = extractor.fit_length(waveform)
        assert len(own) == length
        assert torch.equal(clip[:length], own)
        assert not clip[length:].any()
    assert "num_samples" not in CycleCollator(QLungFeatureExtractor(duration=1.25))(rows)


def test_normalisation_is_fitted_on_each_row_at_its_own_length():
    extractor, rows = extractor_of(), cycles(30)
    fit_normalization(extractor, rows)
    prepared = [extractor(row["waveform"], sampling_rate=16000).input_values[0] for row in rows]
    values = np.concatenate([features.ravel() for features in prepared])
    assert (values.mean(), values.std()) == pytest.approx((0, 1), abs=1e-4)


def test_time_masks_hide_as_large_a_share_of_shorter_input():
    augment = SpecAugment(freq_masks=0, time_masks=1, time_width=400, full_frames=800, fill=0.0)
    for frames in (800, 200):
        masked = (augment(torch.ones(4000, frames, 2)) == 0)[..., 0].float().mean(dim=1)
        assert masked.max() < 0.5
        assert masked.mean() == pytest.approx(0.25, abs=0.01)
    torch.manual_seed(0)
    features = torch.randn(8, 800, 2)
    one, other = SpecAugment(time_width=400), SpecAugment(time_width=400, full_frames=800)
    assert torch.equal(one(features, torch.manual_seed(1)), other(features, torch.manual_seed(1)))


# ---- Training ----


@pytest.mark.parametrize("accumulation", [1, 2])
def test_training_equals_a_hand_written_loop(tmp_path, accumulation):
    trainer = bucket_trainer(tmp_path, gradient_accumulation_steps=accumulation)
    by_hand, made, loss = copy.deepcopy(trainer.model), batches(trainer), CrossEntropyLoss(scale=10.0)
    assert {batch["input_values"].shape[1] for batch in made} == set(FRAMES)
    before = by_hand.qlung.encoder.embeddings.position_embeddings.clone()
    trainer.train()
    steps = [made[start : start + accumulation] for start in range(0, len(made), accumulation)]
    rule = lambda model, micro, _: mean([gradient_at(model, batch, loss) for batch in micro])  # noqa: E731
    train_by_hand(by_hand, steps, rule, rate=0.01)
    for (name, ours), theirs in zip(trainer.model.named_parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=5e-6, rtol=1e-3, msg=name)
    assert not torch.isclose(trainer.model.qlung.encoder.embeddings.position_embeddings, before).all(dim=-1).any()


def test_a_resumed_training_ends_in_the_same_weights(tmp_path):
    def trainer_of(name, **options):
        settings = {"sharpness": SharpnessAwareStep("looksam", 0.05, 0.7, interval=3), "num_train_epochs": 2}
        saving = {"save_strategy": "steps", "save_steps": 5, "spec_augment": SpecAugment(1, 20, 1, 40, full_frames=123)}
        return bucket_trainer(tmp_path / name, sampling_power=1.0, **settings, **saving, **options)

    whole = trainer_of("whole")
    whole.train()
    trainer_of("parts", callbacks=[StopAt(5)]).train()
    resumed = trainer_of("parts", model=model_of_several_lengths(seed=7))
    resumed.train(resume_from_checkpoint=last_whole_checkpoint(tmp_path / "parts"))
    assert resumed.state.global_step == 16
    assert_equal_weights(weights(resumed.model), weights(whole.model))


@pytest.mark.parametrize("name", ["patch_mix", "patch_mix_contrast", "device_contrast"])
def test_objectives_take_batches_of_every_length(tmp_path, name):
    rows = cycles(24)
    rows = rows.add_column("device", [["A", "B"][index % 2] for index in range(24)])
    rows = rows.with_format("numpy", columns=["waveform"], output_all_columns=True)
    trainer = bucket_trainer(
        tmp_path,
        train=rows,
        objective=build_objective(name),
        devices=["A", "B"],
        sharpness=SharpnessAwareStep("sam"),
        logging_strategy="steps",
        logging_steps=1,
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 6
    assert np.isfinite(losses).all()


# ---- What comes after ----


def alone(model, extractor, rows) -> torch.Tensor:
    """Logits of rows one by one, each as the feature extractor of its own duration prepares it."""
    logits = []
    for row, bucket in zip(rows, assign_buckets(extractor, rows), strict=True):
        single = QLungFeatureExtractor(duration=DURATIONS[bucket], mean=extractor.mean, std=extractor.std)
        inputs = single(row["waveform"], sampling_rate=16000, return_tensors="pt")
        logits.append(model(inputs["input_values"]).logits)
    return torch.cat(logits).detach()


@pytest.mark.parametrize("batch_size", [1, 5, 16])
def test_a_prediction_does_not_depend_on_the_batch(tmp_path, batch_size):
    rows = cycles(13, seed=4)
    trainer = bucket_trainer(tmp_path, per_device_eval_batch_size=batch_size)
    predicted = trainer.predict(rows)
    expected = alone(trainer.model.eval(), trainer.feature_extractor, rows)
    assert predicted.label_ids.tolist() == rows["label"][:]
    torch.testing.assert_close(torch.from_numpy(predicted.predictions), expected, atol=1e-4, rtol=0)
    labels = torch.tensor(rows["label"][:])
    whole = trainer.evaluate(rows)["eval_score_4class"]
    assert whole == pytest.approx(trainer.compute_metrics(predicted)["score_4class"], nan_ok=True)
    if batch_size == 16:
        loss = torch.nn.functional.cross_entropy(expected, labels).item()
        assert predicted.metrics["test_loss"] == pytest.approx(loss, rel=1e-4)


def test_embeddings_attention_and_flatness_are_of_each_rows_own_length():
    extractor, model, rows = extractor_of(), model_of_several_lengths().eval(), cycles(12, seed=4)
    found = torch.from_numpy(embeddings(model, extractor, rows, batch_size=5))
    torch.testing.assert_close(model.head(found)[0].detach(), alone(model, extractor, rows), atol=1e-4, rtol=0)
    short = next(row for row in rows if len(row["waveform"]) <= 8000)
    assert attention_map(model, extractor, short["waveform"]).shape == (4, 12)
    flatness = measure_flatness(model, extractor, rows, num_cycles=12, hessian_cycles=5, batch_size=4, iterations=3)
    loss = torch.nn.functional.cross_entropy(alone(model, extractor, rows), torch.tensor(rows["label"][:]))
    assert flatness["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert np.isfinite(list(flatness.values())).all()


@pytest.mark.slow
def test_two_processes_train_on_one_length_and_predict_each_row_at_its_own(tmp_path):
    done = launch("ddp", "tests/training/buckets_worker.py", str(tmp_path))
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("every check passed") == 2

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import EvalPrediction, TrainerCallback

from modeling_qlung.evaluation import CLASS_NAMES, icbhi_scores
from modeling_qlung.evaluation.tasks import FOUR_CLASS
from modeling_qlung.training.augmentation import SpecAugment, WaveformAugment
from modeling_qlung.training.losses import AdaFaceLoss, CrossEntropyLoss, MarginSchedule, QLungLoss
from modeling_qlung.training.sharpness import SharpnessAwareStep
from modeling_qlung.training.trainer import compute_scores, last_whole_checkpoint

from .small_training import batches, cycles, gradient_at, make_trainer, mean, small_model, train_by_hand


def weights(model) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_equal_weights(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different, f"{len(different)} of {len(one)} parameters differ: {different[:3]}"


@pytest.mark.parametrize("accumulation", [1, 2])
def test_plain_training_equals_a_hand_written_loop(tmp_path, accumulation):
    """Loss and gradient are not multiplied by the accumulation steps."""
    trainer = make_trainer(
        tmp_path, gradient_accumulation_steps=accumulation, logging_strategy="steps", logging_steps=1
    )
    by_hand, made, loss = copy.deepcopy(trainer.model), batches(trainer), CrossEntropyLoss(scale=10.0)
    first = np.mean([loss(by_hand(b["input_values"]).cosines, b["labels"]).item() for b in made[:accumulation]])
    trainer.train()
    steps = [made[start : start + accumulation] for start in range(0, len(made), accumulation)]
    train_by_hand(by_hand, steps, lambda model, micro, _: mean([gradient_at(model, batch, loss) for batch in micro]))
    for ours, theirs in zip(trainer.model.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=1e-4)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(first, rel=1e-4)


def full_method(folder: Path, **options):
    """Everything that has a state or draws random numbers, in one training."""
    settings = {
        "loss": AdaFaceLoss(scale=10.0),
        "sharpness": SharpnessAwareStep("looksam", 0.05, 0.7, interval=3),
        "spec_augment": SpecAugment(1, 20, 1, 10),
        "waveform_augment": WaveformAugment(),
        "margin_schedule": MarginSchedule(0.5),
        "ema_decay": 0.9,
        "sampling_power": 1.0,
        "model": small_model(dropout=0.3, audio_config={"hidden_dropout_prob": 0.1}),
        "eval_dataset": cycles(12, seed=9),
        "optim": "adamw_torch",
        "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine",
        "max_grad_norm": 1.0,
        "num_train_epochs": 3,
        "save_strategy": "steps",
        "save_steps": 4,
        "eval_strategy": "epoch",
    }
    return make_trainer(folder, **{**settings, **options})


class StopAt(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


@pytest.mark.parametrize("stopped_at", [8, 12], ids=["end of an epoch", "within an epoch"])
def test_a_resumed_training_ends_in_the_same_weights(tmp_path, stopped_at):
    whole = full_method(tmp_path / "whole")
    whole.train()
    assert whole.state.global_step == 24
    stopped = full_method(tmp_path / "parts", callbacks=[StopAt(stopped_at)])
    stopped.train()
    assert stopped.state.global_step == stopped_at
    checkpoint = last_whole_checkpoint(tmp_path / "parts")
    assert checkpoint is not None
    assert checkpoint.endswith(f"checkpoint-{stopped_at}")
    torch.manual_seed(123)
    resumed = full_method(
        tmp_path / "parts", model=small_model(seed=77, dropout=0.3, audio_config={"hidden_dropout_prob": 0.1})
    )
    resumed.train(resume_from_checkpoint=checkpoint)
    assert_equal_weights(weights(resumed.model), weights(whole.model))
    assert_equal_weights(resumed.loss.state_dict(), whole.loss.state_dict())


@pytest.mark.parametrize("ema_decay", [None, 0.8])
def test_the_best_checkpoint_is_really_reloaded(tmp_path, ema_decay):
    """Every parameter; the installed Trainer alone would leave most of an AST's as they were in the last epoch."""
    trainer = make_trainer(
        tmp_path,
        eval_dataset=cycles(24, seed=3),
        ema_decay=ema_decay,
        num_train_epochs=4,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="score_4class",
        greater_is_better=True,
    )
    scores = iter([40.0, 60.0, 50.0, 45.0])  # the second epoch is the best
    trainer.compute_metrics = lambda prediction: {"score_4class": next(scores)}
    seen = {}

    class Remember(TrainerCallback):
        def on_epoch_end(self, args, state, control, **kwargs):
            average = None if trainer.ema is None else {n: v.clone() for n, v in trainer.ema.average.items()}
            seen[state.global_step] = average or weights(trainer.model)

    trainer.add_callback(Remember())
    trainer.train()
    assert trainer.state.best_global_step == 16
    assert_equal_weights(weights(trainer.model), seen[16])
    for step in (8, 24, 32):
        same = [name for name in seen[16] if torch.equal(seen[step][name], seen[16][name])]
        assert not same, f"{same} did not move between the epochs"


def test_the_average_is_evaluated_and_is_what_remains(tmp_path):
    trainer = make_trainer(tmp_path, ema_decay=0.5, num_train_epochs=2)
    raw = {}
    averages = [weights(trainer.model)]
    trainer.ema.warmup = False

    class Follow(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raw.update(weights(trainer.model))
            averages.append({name: 0.5 * averages[-1][name] + 0.5 * raw[name] for name in raw})

    trainer.add_callback(Follow())
    trainer.train()
    for name, value in trainer.model.state_dict().items():
        torch.testing.assert_close(value, averages[-1][name], atol=1e-6, rtol=1e-5)
    assert not torch.equal(trainer.model.head.weight, raw["head.weight"])


def test_a_checkpoint_cut_short_is_passed_over(tmp_path):
    for step in (4, 8, 12):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    (tmp_path / "checkpoint-12" / "trainer_state.json").unlink()
    (tmp_path / "checkpoint-8" / "trainer_state.json").write_text('{"global_st')
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    assert not (tmp_path / "checkpoint-12").exists()
    shutil.rmtree(tmp_path / "checkpoint-4")
    assert last_whole_checkpoint(tmp_path) is None
    assert last_whole_checkpoint(tmp_path / "nowhere") is None


def test_margins_grow_along_the_schedule(tmp_path):
    loss = QLungLoss([8, 8, 8, 8])
    factors = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            factors.append(loss.margin_factor)

    make_trainer(tmp_path, loss=loss, margin_schedule=MarginSchedule(0.5), callbacks=[Watch()]).train()
    assert factors == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    "augmentation",
    [{"spec_augment": SpecAugment(1, 60, 1, 20)}, {"waveform_augment": WaveformAugment((0.5, 0.6), 1.0)}],
    ids=["features", "waveforms"],
)
def test_augmentation_acts_in_training_only(tmp_path, augmentation):
    trainer = make_trainer(tmp_path, **augmentation)
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(4)])
    plain = trainer.feature_extractor.extract_features(batch["clips"])
    trainer.model.eval()
    assert torch.equal(trainer._prepare_inputs(dict(batch))["input_values"], plain)
    trainer.model.train()
    changed = trainer._prepare_inputs(dict(batch))["input_values"]
    assert all(not torch.equal(one, other) for one, other in zip(changed, plain, strict=True))


def test_the_loss_gets_what_it_needs(tmp_path):
    """Quality and, of a linear head only, logits."""
    calls = []

    class Spy(CrossEntropyLoss):
        def forward(self, cosines, labels, quality=None, *, logits=None, norms=None):
            calls.append((quality, logits, norms))
            return super().forward(cosines, labels, quality, logits=logits, norms=norms)

    for head in ("angular", "linear"):
        trainer = make_trainer(tmp_path, small_model(head=head), loss=Spy(), max_steps=1)
        trainer.train()
        quality, logits, norms = calls.pop()
        assert norms.shape == (4,)
        rows = [trainer.train_dataset[index] for index in list(trainer.sampler)[:4]]
        expected = [1 - 0.7 * row["entropy"] + 0.3 * row["rms"] for row in rows]
        assert quality.tolist() == pytest.approx(expected)
        assert (logits is None) == (head == "angular")


def test_scores_are_of_the_labelled_rows():
    logits = np.eye(4)[[0, 1, 2, 3, 3, 0]]
    labels = np.array([0, 1, 2, 2, -100, 0])
    scores = compute_scores(FOUR_CLASS)(EvalPrediction(logits, labels))
    expected = icbhi_scores([0, 1, 2, 2, 0], [0, 1, 2, 3, 0])
    assert {name: scores[name] for name in FOUR_CLASS.titles} == {name: expected[name] for name in FOUR_CLASS.titles}
    recalls = [scores[f"recall_{name}"] for name in FOUR_CLASS.classes]
    assert recalls == pytest.approx([expected["recall"][name] or float("nan") for name in CLASS_NAMES], nan_ok=True)
    assert sum(scores[f"predicted_{name}"] for name in FOUR_CLASS.classes) == pytest.approx(100)
    assert scores["sensitivity_2class"] == 100
    assert np.isnan(compute_scores(FOUR_CLASS)(EvalPrediction(logits[:1], labels[:1]))["sensitivity_4class"])


def test_evaluation_reports_plain_cross_entropy(tmp_path):
    trainer = make_trainer(tmp_path, loss=QLungLoss([8, 8, 8, 8]), eval_dataset=cycles(8))
    loss = trainer.evaluate()["eval_loss"]
    batch = trainer.data_collator([trainer.eval_dataset[index] for index in range(8)])
    output = trainer.model(trainer.feature_extractor.extract_features(batch["clips"]), labels=batch["labels"])
    assert loss == pytest.approx(output.loss.item(), rel=1e-4)


def test_evaluation_leaves_unlabelled_rows_out_of_the_loss(tmp_path):
    rows = cycles(8)
    half = rows.map(lambda row, index: {"label": row["label"] if index < 4 else None}, with_indices=True)
    trainer = make_trainer(tmp_path, per_device_eval_batch_size=4)
    labelled = trainer.evaluate(rows.select(range(4)))
    mixed = trainer.evaluate(half)
    assert mixed["eval_score_4class"] == labelled["eval_score_4class"]
    assert np.isfinite(mixed["eval_loss"])
    assert np.isnan(trainer.evaluate(half.select(range(4, 8)))["eval_score_4class"])


def test_a_diverged_loss_is_seen(tmp_path):
    """Transformers' default replaces a NaN in its log by the mean of earlier losses."""

    class Diverged(CrossEntropyLoss):
        def forward(self, cosines, labels, quality=None, *, logits=None, norms=None):
            return cosines.sum() * float("nan")

    trainer = make_trainer(tmp_path, loss=Diverged(), logging_strategy="steps", logging_steps=1, max_steps=1)
    trainer.train()
    assert np.isnan(trainer.state.log_history[0]["loss"])


def test_activation_checkpointing_gives_the_same_gradients(tmp_path):
    trainer = make_trainer(tmp_path)
    batch = batches(trainer)[0]
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            trainer.model.activation_checkpointing_enable()
        trainer.model.zero_grad()
        trainer.model.train()
        trainer.model(batch["input_values"], labels=batch["labels"]).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in trainer.model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_gives_the_features_and_steps_of_a_cpu(tmp_path):
    trainer = make_trainer(tmp_path, sharpness=SharpnessAwareStep("sam"), max_steps=1)
    clips = torch.stack([trainer.data_collator([row])["clips"][0] for row in cycles(4)])
    extractor = trainer.feature_extractor
    on_gpu = extractor.extract_features(clips.cuda())
    torch.testing.assert_close(on_gpu.cpu(), extractor.extract_features(clips), atol=1e-3, rtol=0)
    trainer.train()
    assert trainer.model.device.type == "cuda"

"""What each diagnostic says and when, on histories written by hand, and in a training that really collapses."""

import dataclasses
import logging
import math
import re

import numpy as np
import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from modeling_qlung.evaluation.tasks import TASKS
from modeling_qlung.training import diagnostics
from modeling_qlung.training.arguments import ARGUMENTS
from modeling_qlung.training.diagnostics import TrainingDiagnostics, epoch_losses, finders

from .small_training import cycles, make_trainer, small_model

STEPS = 10  # per epoch
CLASSES = ("normal", "crackle", "wheeze", "both")
FALLING = [1.4 * 0.93**epoch for epoch in range(30)]
HEALTHY = {"specificity": 80.0, "sensitivity_4class": 50.0, "score_4class": 65.0}
HEALTHY |= {f"predicted_{name}": 25.0 for name in CLASSES} | {f"recall_{name}": 50.0 for name in CLASSES}


@pytest.fixture
def said(caplog):
    """The lines written so far."""
    caplog.set_level(logging.WARNING)
    return lambda: [record.message for record in caplog.records if record.name == diagnostics.__name__]


def play(history: list[dict], callback: TrainingDiagnostics | None = None, main_process: bool = True) -> None:
    """Log the entries one after the other, as the Trainer does."""
    callback = callback or TrainingDiagnostics()
    state = TrainerState(is_world_process_zero=main_process, max_steps=int(max(entry["step"] for entry in history)))
    for entry in history:
        state.epoch = entry.get("epoch")
        state.log_history.append(entry)
        callback.on_log(
            TrainingArguments(use_cpu=True), state, TrainerControl(), {k: v for k, v in entry.items() if k != "step"}
        )


def losses(values) -> list[dict]:
    """One training loss per epoch."""
    return [{"loss": value, "epoch": epoch, "step": STEPS * epoch} for epoch, value in enumerate(values, start=1)]


def evaluations(eval_losses, **scores) -> list[dict]:
    """One evaluation per epoch; scores are lists over epochs, or constant."""
    entries = []
    for epoch, value in enumerate(eval_losses, start=1):
        now = {name: score[epoch - 1] if isinstance(score, list) else score for name, score in scores.items()}
        scored = {f"eval_{name}": score for name, score in {**HEALTHY, **now}.items()}
        entries.append({"eval_loss": value, **scored, "epoch": epoch, "step": STEPS * epoch})
    return entries


def together(*histories: list[dict]) -> list[dict]:
    """In the order of a training: an epoch's loss before its evaluation."""
    return sorted((entry for history in histories for entry in history), key=lambda entry: entry["step"])


def test_healthy_training_is_left_in_peace(said):
    play(together(losses(FALLING), evaluations([value + 0.1 for value in FALLING])))
    noise = np.random.default_rng(0)
    play(losses(value * math.exp(0.05 * noise.standard_normal()) for value in FALLING))
    play(losses([1.1417, 0.9538, 0.8783, 0.8306, 0.7742, 0.7225, 0.6861, 0.6468, 0.6153, 0.5806, 0.5577, 0.5614]))
    assert said() == []


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_loss_not_finite_is_said_once_and_nothing_after_it(said, value):
    play(together(losses([1.0, 0.9, value, value, value, value, value]), evaluations([1.0, 1.0, 1.0] + 5 * [9.0])))
    (line,) = said()
    assert line.startswith("Epoch 3: loss is not finite")
    assert "--learning_rate" in line


def test_loss_not_finite_within_an_epoch(said):
    play(
        [{"loss": value, "epoch": step / 10, "step": step} for step, value in enumerate([1.0, 0.9, math.nan], start=1)]
    )
    assert said()[0].startswith("Epoch 0.3: loss is not finite")


def test_evaluation_loss_not_finite(said):
    play(evaluations([1.0, math.nan]))
    assert said()[0].startswith("Epoch 2: eval_loss is not finite")


def test_divergence(said):
    play(losses([1.4, 1.1, 0.9, 1.2, 2.0, 2.6, 3.0]))
    (line,) = said()
    assert line.startswith("Epoch 7: the training loss has risen from 0.9 to 3, above the 1.4 it began with")


@pytest.mark.parametrize(
    "values",
    [
        [1.4, 1.1, 0.9, 3.0, 2.9, 1.3, 0.8],  # a spike that passes
        [1.4, 0.2, 0.1, 0.5, 0.6, 0.7, 0.8],  # doubled, and yet below where it began
        [1.4, 1.3, 1.3, 1.5, 1.6, 1.7, 1.8],  # above where it began, and yet little
        [0.01, 0.005, 0.02, 0.03, 0.04],  # nothing that matters
    ],
)
def test_no_divergence(said, values):
    play(losses(values))
    assert said() == []


def test_oscillation(said):
    play(losses([value * (1.3 if epoch % 2 else 0.7) for epoch, value in enumerate(FALLING)]))
    (line,) = said()
    assert line.startswith("Epoch 8: the training loss oscillates, 30 % around its trend over 8 epochs")


def test_oscillation_of_losses_logged_within_epochs(said):
    values = [value * (1.3 if epoch % 2 else 0.7) for epoch, value in enumerate(FALLING[:10])]
    play([{"loss": values[(step - 1) // 3], "epoch": step / 3, "step": step} for step in range(1, 31)])
    (line,) = said()
    assert line.startswith("Epoch 8: the training loss oscillates, 30 %")


def test_slow_oscillation(said):
    values = [value * (1.4 if epoch // 2 % 2 else 0.6) for epoch, value in enumerate(FALLING)]
    play(losses(values[1:]))
    (line,) = said()
    assert "oscillates" in line


@pytest.mark.parametrize(
    "values",
    [
        [1.4 * 0.5**epoch for epoch in range(12)],  # steep
        [1.4, 0.7, 0.45, 0.35, 0.3, 0.28, 0.27, 0.265, 0.262, 0.26],  # bent
        [value * (3 if epoch == 5 else 1) for epoch, value in enumerate(FALLING[:14])],  # one spike
        [value * (1.1 if epoch % 2 else 0.9) for epoch, value in enumerate(FALLING)],  # little
        [0.02 * (1.5 if epoch % 2 else 0.5) for epoch in range(12)],  # wide, of nothing
        [value * (1.3 if epoch % 2 else 0.7) for epoch, value in enumerate(FALLING[:7])],  # too few
    ],
)
def test_no_oscillation(said, values):
    play(losses(values))
    assert said() == []


def test_noise_between_steps_is_no_oscillation(said):
    """Losses of single batches differ by much more than those of epochs."""
    noise = np.random.default_rng(1)
    history = [
        {"loss": FALLING[0] * math.exp(0.5 * noise.standard_normal()), "epoch": step / 100, "step": step}
        for step in range(1, 1501)
    ]
    assert len(epoch_losses(history)) == 15
    play(history[::5])
    assert said() == []


def test_epoch_losses_leave_out_the_running_epoch():
    history = [{"loss": float(step), "epoch": step / 4, "step": step} for step in range(1, 11)]
    assert epoch_losses(history) == [2.5, 6.5]  # 9 and 10 are of the third
    assert epoch_losses([*history, {"eval_loss": 1.0, "epoch": 3.0, "step": 12}]) == [2.5, 6.5, 9.5]


def test_growing_margins_may_raise_the_training_loss(said):
    rising = [1.0, 1.5, 2.3, 3.0, 3.5]
    history = losses([*rising, *(3.5 * 0.9**epoch for epoch in range(5))])
    play(history, TrainingDiagnostics(margin_warmup=0.5))
    assert said() == []
    play(history)
    assert "diverges" in said()[0]


def test_collapse_to_normal(said):
    play(evaluations([1.0] * 6, specificity=92.0, sensitivity_4class=[10.0, 50.0, 44.9, 30.0, 21.04, 20.0]))
    (line,) = said()
    assert line.startswith(
        "Epoch 5: Sp is 92.0 % and Se (4-class) 21.0 %: abnormal cycles are missed or given the wrong"
    )
    assert "--sampling_power" in line
    assert "--class_weight_power" in line
    assert "--target_margin" in line


@pytest.mark.parametrize(
    ("task", "line"),
    [
        ("two-output", "Sp is 92.0 % and Se (two-output) 20.0 %: abnormal cycles are missed. Try"),
        ("1-2", "SP is 92.0 % and SE 20.0 %: abnormal cycles are missed or given the wrong class. Try"),
        ("2-1", "SP is 92.0 % and SE 20.0 %: abnormal recordings are missed or given the wrong class. Try"),
    ],
)
def test_collapse_to_normal_in_other_tasks(said, task, line):
    asked = TASKS[task]
    low, high = ({f"eval_{asked.sensitivity}": value, "eval_specificity": 92.0} for value in (20.0, 50.0))
    history = [{"eval_loss": 1.0, **low, "epoch": epoch, "step": STEPS * epoch} for epoch in range(1, 5)]
    play([{**entry, **high} for entry in history], TrainingDiagnostics(task=asked))
    assert said() == []
    play(history, TrainingDiagnostics(task=asked))
    assert [found.split(" a higher")[0] for found in said()] == [f"Epoch 3: {line}"]


@pytest.mark.parametrize(
    "scores",
    [
        {"specificity": 92.0, "sensitivity_4class": 45.0},
        {"specificity": 74.9, "sensitivity_4class": 20.0},
        {"specificity": 92.0, "sensitivity_4class": [0.0, 0.0, 46.0, 20.0, 20.0, 46.0]},  # it recovers
        {"specificity": 92.0, "sensitivity_4class": math.nan},  # nothing abnormal in the evaluation
    ],
)
def test_no_collapse_to_normal(said, scores):
    play(evaluations([1.0] * 6, **scores))
    assert said() == []


def test_missing_class(said):
    missing = {
        f"{key}_{name}": [5.0, 0.0, 0.0, 0.0, 0.0] for key in ("predicted", "recall") for name in ("wheeze", "both")
    }
    play(evaluations([1.0] * 5, **missing))
    (line,) = said()
    assert line.startswith("Epoch 4: wheeze and both were never predicted in 3 evaluations")


@pytest.mark.parametrize(
    "scores",
    [
        {"predicted_both": 0.0, "recall_both": math.nan},  # does not occur
        {"predicted_both": [0.0, 0.0, 0.5, 0.0, 0.0], "recall_both": [0.0, 0.0, 0.5, 0.0, 0.0]},
        {"predicted_both": 3.0, "recall_both": 0.0},  # predicted, if wrongly
    ],
)
def test_no_missing_class(said, scores):
    play(evaluations([1.0] * 5, **scores))
    assert said() == []


def test_gap(said):
    risen = [1.2, 1.0, 0.8, 0.95, 1.0, 1.1, 1.3]
    play(together(losses(FALLING[:7]), evaluations(risen, score_4class=[40.0, 50.0, 60.0, 60.0, 58.0, 57.0, 56.0])))
    (line,) = said()
    assert line.startswith(
        "Epoch 6: eval_loss has risen from 0.8 (epoch 3) to 1.1 (Score (4-class) 60.0 → 57.0 %) while the training "
        "loss fell from 1.21 to 0.974"
    )
    assert "--num_train_epochs" in line
    assert "--ema_decay" in line


@pytest.mark.parametrize(
    ("training", "evaluated"),
    [
        (FALLING, [1.2, 1.0, 0.8, 0.86, 0.87, 0.86, 0.87]),  # within 10 %
        (FALLING, [1.2, 1.0, 0.8, 1.0, 1.0, 0.85, 1.0]),  # it comes back
        (FALLING, [1.2, 1.0, 0.8, 1.0, 1.0]),  # two evaluations only
        (FALLING, [0.02, 0.01, 0.03, 0.04, 0.05, 0.05, 0.05]),  # nothing that matters
        ([*FALLING[:3], 1.3, 1.4, 1.5, 1.6], [1.2, 1.0, 0.8, 1.0, 1.1, 1.2, 1.3]),  # training gets worse too
    ],
)
def test_no_gap(said, training, evaluated):
    play(together(losses(training[: len(evaluated)]), evaluations(evaluated)))
    assert said() == []


def test_each_kind_once_and_several_kinds(said):
    bad = {"specificity": 95.0, "sensitivity_4class": 5.0, "predicted_both": 0.0, "recall_both": 0.0}
    oscillating = [value * (1.3 if epoch % 2 else 0.7) for epoch, value in enumerate(FALLING[:20])]
    play(together(losses(oscillating), evaluations([0.5] + [1.0] * 19, **bad)))
    assert len(said()) == 4
    assert all(re.match(r"Epoch \d+: ", line) and "\n" not in line for line in said())


def test_only_the_main_process_speaks(said):
    play(losses([1.0, math.nan]), main_process=False)
    assert said() == []


def test_evaluation_before_training_and_scores_of_other_tasks(said):
    before = {"eval_loss": 1.4, "step": 0}
    bare = [
        {key: entry[key] for key in ("eval_loss", "epoch", "step")} for entry in evaluations([1.0, 0.5, 1, 1, 1, 1])
    ]
    play(together([before], losses(FALLING[:6]), bare))
    assert [line.split(" has")[0] for line in said()] == ["Epoch 5: eval_loss"]


def test_every_option_named_exists(said):
    bad = {"specificity": 95.0, "sensitivity_4class": 5.0, "predicted_both": 0.0, "recall_both": 0.0}
    oscillating = [value * (1.3 if epoch % 2 else 0.7) for epoch, value in enumerate(FALLING[:20])]
    play(together(losses(oscillating), evaluations([0.5] + [1.0] * 19, **bad)))
    play(losses([1.4, 1.1, 0.9, 1.2, 2.0, 2.6, 3.0]))
    play(losses([math.nan]))
    assert len(said()) == len(finders(TASKS["4-class"]))
    named = {option for line in said() for option in re.findall(r"--(\w+)", line)}
    assert named <= {field.name for group in ARGUMENTS for field in dataclasses.fields(group)}


def test_training_that_collapses_says_so(tmp_path, said):
    """Eleven of twelve cycles are normal, and plain cross-entropy soon calls every cycle so."""
    data = cycles(48)
    labels = [0 if index % 12 else 1 + index // 12 % 3 for index in range(48)]
    train = data.remove_columns("label").add_column("label", labels)
    train = train.with_format("numpy", columns=["waveform"], output_all_columns=True)
    options = {"eval_strategy": "epoch", "logging_strategy": "epoch", "num_train_epochs": 5, "optim": "adamw_torch"}
    trainer = make_trainer(
        tmp_path,
        small_model(head="linear"),
        train,
        eval_dataset=train,
        per_device_train_batch_size=16,
        learning_rate=1e-2,
        callbacks=[TrainingDiagnostics()],
        **options,
    )
    trainer.train()
    lines = said()
    assert any(re.match(r"Epoch \d: Sp is 100.0 % and Se \(4-class\) 0.0 %", line) for line in lines)
    assert any(re.search(r"crackle and wheeze and both were never predicted in 3", line) for line in lines)
    assert len(lines) == 2

"""Says, in one line each, what goes wrong in a training while it goes wrong, and what to try."""

import math
from collections.abc import Callable, Iterable
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from ..evaluation.tasks import FOUR_CLASS, Task

logger = logging.get_logger(__name__)

Entry = dict[str, Any]  # of `TrainerState.log_history`

PATIENCE = 3  # epochs or evaluations in a row: the first epochs often call everything normal, and recover
HIGH_SPECIFICITY, LOW_SENSITIVITY = 75.0, 45.0  # percent
WINDOW = 8  # epochs that an oscillation is looked for in
OSCILLATION = 0.15  # deviation of the logarithm of the loss from its trend
DIVERGENCE = 2.0  # the loss against its minimum
GAP = 1.1  # the evaluation loss against its minimum
VISIBLE = 0.05  # nats: relative changes of a loss near 0 mean nothing


class TrainingDiagnostics(TrainerCallback):
    """
    Warns once per kind of trouble, from what the Trainer logs: no pass over data, no number of its own.

    - A loss that is not finite, or that has left its minimum for good.
    - An oscillating training loss.
    - The common collapse to normal: high specificity, the task's sensitivity below 45 %.
    - A class that occurs in the evaluation and is never predicted (reads `eval_recall_*` and `eval_predicted_*`).
    - A growing gap between training and evaluation loss.

    Each line names the epoch, what was seen, and options of `train.py` to try. Only the main process writes.

    Args:
        margin_warmup: share of training over which the loss's margins grow: there the training loss may rise.
        task: what is asked; gives the scores.
    """

    def __init__(self, margin_warmup: float = 0.0, task: Task = FOUR_CLASS):
        self.margin_warmup = margin_warmup
        self.finders = finders(task)
        self._said: set[str] = set()
        self._epochs = 0  # that have ended

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Entry | None = None, **kwargs
    ) -> None:
        """Look at the history each time something is added to it."""
        if not state.is_world_process_zero or not logs or not logs.keys() & {"loss", "eval_loss"}:
            return
        ended = math.floor(round(state.epoch or 0, 3))
        news = "eval_loss" in logs or ended > self._epochs  # what is logged between is only looked at by itself
        self._epochs = ended
        entries = state.log_history if news else state.log_history[-1:]
        history = [entry for entry in entries if "epoch" in entry]  # lacking before the first step
        warm = [entry for entry in history if entry["step"] > self.margin_warmup * state.max_steps]
        for name, find in self.finders.items():
            finding = None if name in self._said else find(warm if name in WARM else history)
            if finding is not None:
                self._said.add(name)
                logger.warning(f"Epoch {round(history[-1]['epoch'], 2):g}: {finding}")
                if name == "not finite":
                    self._said.update(self.finders)  # whatever follows from it is no news


def find_not_finite(history: list[Entry]) -> str | None:
    """Look for a loss that is NaN or infinite."""
    for name in ("loss", "eval_loss"):
        if any(not math.isfinite(entry[name]) for entry in history if name in entry):
            return (
                f"{name} is not finite: the weights are lost. Start again with a lower --learning_rate, --warmup_steps "
                "0.1 and --max_grad_norm 1, and with --bf16 rather than --fp16."
            )
    return None


def find_divergence(history: list[Entry]) -> str | None:
    """Look for a training loss above where it began and above twice its minimum, for three epochs."""
    losses = epoch_losses(history)
    if len(losses) <= PATIENCE:
        return None
    low = min(losses)
    if min(losses[-PATIENCE:]) > max(losses[0], DIVERGENCE * low, low + VISIBLE):
        return (
            f"the training loss has risen from {low:.3g} to {losses[-1]:.3g}, above the {losses[0]:.3g} it began with: "
            "it diverges. Try a lower --learning_rate, --warmup_steps 0.1, --max_grad_norm 1, or a smaller --rho."
        )
    return None


def find_oscillation(history: list[Entry]) -> str | None:
    """Look for a training loss that keeps crossing its own trend, far and often, over the last epochs.

    The trend is the line that fits the logarithm of the loss best. An even fall, however steep, crosses it twice; a
    single spike as often; an oscillation in at least half of the steps.
    """
    losses = epoch_losses(history)[-WINDOW:]
    if len(losses) < WINDOW or min(losses) <= 0:
        return None
    epochs = np.arange(WINDOW)
    logs = np.log(losses)
    off = logs - np.polyval(np.polyfit(epochs, logs, 1), epochs)
    amplitude = float(off.std())
    crossings = sum(bool(a * b < 0) for a, b in pairwise(off))
    if crossings >= WINDOW // 2 and amplitude > OSCILLATION and amplitude * float(np.mean(losses)) > VISIBLE:
        return (
            f"the training loss oscillates, {100 * amplitude:.0f} % around its trend over {WINDOW} epochs (between "
            f"{min(losses):.3g} and {max(losses):.3g}). Try a lower --learning_rate, a larger "
            "--per_device_train_batch_size or --gradient_accumulation_steps, --max_grad_norm 1, or --ema_decay 0.99."
        )
    return None


def find_collapse_to_normal(history: list[Entry], task: Task) -> str | None:
    """Look for high specificity with low sensitivity in every one of the last evaluations."""
    key = f"eval_{task.sensitivity}"
    scores = [(entry["eval_specificity"], entry[key]) for entry in _evaluations(history)[-PATIENCE:] if key in entry]
    collapsed = [sp >= HIGH_SPECIFICITY and se < LOW_SENSITIVITY for sp, se in scores]  # false for NaN
    if len(collapsed) < PATIENCE or not all(collapsed):
        return None
    specificity, sensitivity = scores[-1]
    return (
        f"{task.titles['specificity']} is {specificity:.1f} % and {task.titles[task.sensitivity]} {sensitivity:.1f} %: "
        f"abnormal {task.config} are missed{' or given the wrong class' if len(task.classes) > 2 else ''}. Try a "
        "higher --sampling_power (up to 1) or --class_weight_power, or class margins: --loss qlung with a larger "
        "--target_margin."
    )


def find_missing_class(history: list[Entry]) -> str | None:
    """Look for classes that occur and are predicted in none of the last evaluations."""
    evaluations = _evaluations(history)[-PATIENCE:]
    if len(evaluations) < PATIENCE:
        return None
    names = [key.removeprefix("eval_predicted_") for key in evaluations[-1] if key.startswith("eval_predicted_")]
    missing = [name for name in names if all(_is_missing(entry, name) for entry in evaluations)]
    if not missing:
        return None
    return (
        f"{' and '.join(missing)} {'was' if len(missing) == 1 else 'were'} never predicted in {PATIENCE} evaluations. "
        "Try --sampling_power 1 or --class_weight_power 0.5, and a lower --learning_rate if one class takes all."
    )


def find_gap(history: list[Entry], task: Task) -> str | None:
    """Look for an evaluation loss well above its minimum in the last evaluations while the training loss falls."""
    evaluations = _evaluations(history)
    losses = [entry["eval_loss"] for entry in evaluations]
    if len(losses) <= PATIENCE:
        return None
    best = int(np.argmin(losses))
    low = losses[best]
    after = losses[best + 1 :][-PATIENCE:]
    if len(after) < PATIENCE or min(after) <= max(GAP * low, low + VISIBLE):
        return None
    training = [entry for entry in history if "loss" in entry]
    before = [entry["loss"] for entry in training if entry["step"] <= evaluations[best]["step"]]
    if not before or training[-1]["loss"] >= before[-1]:
        return None
    return (
        f"eval_loss has risen from {low:.3g} (epoch {round(evaluations[best]['epoch'], 2):g}) to {losses[-1]:.3g}"
        f"{_score(evaluations[best], evaluations[-1], task)} while the training loss fell from {before[-1]:.3g} to "
        f"{training[-1]['loss']:.3g}: training cycles are being memorised. Try fewer --num_train_epochs, more "
        "augmentation (--time_masks, --freq_masks, --waveform_augment true), --dropout, or --ema_decay 0.99."
    )


def finders(task: Task) -> dict[str, Callable[[list[Entry]], str | None]]:
    """Give what looks for each kind of trouble, by the kind's name."""
    return {
        "not finite": find_not_finite,
        "divergence": find_divergence,
        "oscillation": find_oscillation,
        "collapse to normal": partial(find_collapse_to_normal, task=task),
        "missing class": find_missing_class,
        "gap": partial(find_gap, task=task),
    }


WARM = {"divergence", "oscillation"}  # these look at a training loss that is to fall; in find_gap a rise is harmless


def epoch_losses(history: Iterable[Entry]) -> list[float]:
    """Mean training loss of each epoch that has ended, so that a loss logged at every step means the same."""
    epochs: dict[int, list[float]] = {}
    now = 0.0
    for entry in history:
        now = max(now, round(entry["epoch"], 3))
        if "loss" in entry:
            epochs.setdefault(math.ceil(round(entry["epoch"], 3)), []).append(entry["loss"])
    return [float(np.mean(losses)) for epoch, losses in epochs.items() if epoch <= now]


def _evaluations(history: Iterable[Entry]) -> list[Entry]:
    return [entry for entry in history if "eval_loss" in entry]


def _is_missing(entry: Entry, name: str) -> bool:
    """Whether a class occurs (its recall is not NaN) and is not predicted once."""
    return entry.get(f"eval_predicted_{name}") == 0 and entry.get(f"eval_recall_{name}") == 0


def _score(then: Entry, now: Entry, task: Task) -> str:
    """The score then and now: a loss can rise, from ever more confident errors, before the score falls."""
    key = f"eval_{task.headline}"
    return f" ({task.titles[task.headline]} {then[key]:.1f} → {now[key]:.1f} %)" if key in now else ""

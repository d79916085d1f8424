"""A Transformers Trainer with QLung's losses, sharpness-aware steps, class-balanced sampling and weight averaging."""

import contextlib
import gc
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import EvalPrediction, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from ..evaluation.tasks import FOUR_CLASS, Task
from ..feature_extraction_qlung import QLungFeatureExtractor
from ..modeling_qlung import QLungForAudioClassification
from .augmentation import SpecAugment, WaveformAugment
from .data import UNLABELLED, CycleCollator
from .ema import WeightEMA
from .losses import ClassificationLoss, MarginSchedule
from .objectives import Objective, Supervised
from .sampling import RowGroupSampler, SamplerEpochCallback, WeightedEpochSampler
from .sharpness import SharpnessAwareStep

logger = logging.get_logger(__name__)

STATE_NAME = "qlung_state.pt"


def compute_scores(task: Task) -> Callable[[EvalPrediction], dict[str, float]]:
    """Make the function that scores logits (n, C) against labels (n,), of the labelled; an undefined score is NaN.

    Beside the task's scores it gives `recall_CLASS` and `predicted_CLASS`, the share of all items that were given the
    class, in percent, for [`TrainingDiagnostics`].
    """

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        labelled = prediction.label_ids != UNLABELLED
        if not labelled.any():
            return dict.fromkeys(task.titles, float("nan"))
        predicted = np.argmax(prediction.predictions[labelled], axis=-1)
        scores = task.scores(prediction.label_ids[labelled], predicted)
        shares = 100 * np.bincount(predicted, minlength=len(task.classes)) / len(predicted)
        values = {
            **{name: scores[name] for name in task.titles},
            **{f"recall_{name}": recall for name, recall in scores["recall"].items()},
            **{f"predicted_{name}": float(share) for name, share in zip(task.classes, shares, strict=True)},
        }
        return {name: float("nan") if value is None else value for name, value in values.items()}

    return compute


class QLungTrainer(Trainer):
    """
    Trains a [`QLungForAudioClassification`] on rows of `decode_cycles`.

    Args:
        loss: what is minimised; evaluation reports plain cross-entropy, comparable between losses.
        objective: how a batch becomes a training loss; the loss of the batch as it is if None.
        task: what is scored.
        feature_extractor: makes the model's input from clips within the step, on the step's device.
        devices: names of the stethoscopes, where the objective asks for them.
        quality: what is shown in the place of a training row's quality, by its `row_id`.
        sampler: gives each epoch's rows.
        sharpness: takes sharpness-aware steps; plain ones if None.
        spec_augment: masks training features.
        waveform_augment: changes training clips.
        margin_schedule: factor of the loss's margins over training.
        ema_decay: averages weights; the average is evaluated, and is the model after `train`.

    Raises:
        ValueError: for averaged weights or a contrastive objective under FSDP or DeepSpeed, which shard the parameters;
            for sharpness-aware steps under either but FSDP2; for an FSDP that would save no whole checkpoint; for an
            objective that does not fit the model.
    """

    model: QLungForAudioClassification
    data_collator: Callable[..., dict[str, Any]]

    def __init__(
        self,
        model: QLungForAudioClassification,
        args: TrainingArguments,
        *,
        loss: ClassificationLoss,
        feature_extractor: QLungFeatureExtractor,
        task: Task = FOUR_CLASS,
        devices: Sequence[str] | None = None,
        quality: Mapping[str, float] | None = None,
        objective: Objective | None = None,
        sampler: WeightedEpochSampler | RowGroupSampler | None = None,
        sharpness: SharpnessAwareStep | None = None,
        spec_augment: SpecAugment | None = None,
        waveform_augment: WaveformAugment | None = None,
        margin_schedule: MarginSchedule | None = None,
        ema_decay: float | None = None,
        **kwargs,
    ):
        self.objective = objective or Supervised()
        self.objective.attach(model)
        super().__init__(
            model,
            args,
            processing_class=feature_extractor,
            data_collator=CycleCollator(feature_extractor, devices, quality, one_length=True),
            compute_metrics=compute_scores(task),
            **kwargs,
        )
        self._check_engine(sharpness, ema_decay)
        self.loss = loss.to(self.args.device)
        self.feature_extractor = feature_extractor
        self.eval_collator = CycleCollator(feature_extractor, devices, quality)
        self.sampler = sampler
        self.sharpness = sharpness
        self.spec_augment = spec_augment
        self.waveform_augment = waveform_augment
        self.margin_schedule = margin_schedule or MarginSchedule()
        self.ema = None if ema_decay is None else WeightEMA(self.model, ema_decay)
        self.add_callback(_StepCallback(self))
        if sampler is not None:
            self.add_callback(SamplerEpochCallback(sampler))

    def _check_engine(self, sharpness: SharpnessAwareStep | None, ema_decay: float | None) -> None:
        """Raise a ValueError for what does not work where the parameters are sharded."""
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        # Asked for on the command line, or set up by `accelerate config`; without an accelerator only the former tells.
        fsdp = f"FSDP{plugin.fsdp_version}" if plugin else "FSDP" if self.args.fsdp else None
        engine = "DeepSpeed" if self.args.deepspeed or self.is_deepspeed_enabled else fsdp
        needs_whole = {
            "--sharpness": sharpness is not None and engine != "FSDP2",
            "--ema_decay": ema_decay is not None,
            "a contrastive --objective": self.objective.projector is not None,
            # In evaluation each process embeds as many lengths as its rows have, and would gather weights as often.
            "several --durations": self.model.config.input_frames is not None,
        }
        refused = " and ".join(name for name, asked in needs_whole.items() if asked)
        if engine and refused:
            raise ValueError(
                f"{engine} shards the parameters, and {refused} cannot be had with it: use DDP (or, for --sharpness "
                "alone, FSDP2), or leave it out."
            )
        if plugin and plugin.state_dict_type.name != "FULL_STATE_DICT":
            raise ValueError(
                f"fsdp_state_dict_type is {plugin.state_dict_type.name}, with which nothing is saved that "
                "`from_pretrained` opens: set it to FULL_STATE_DICT."
            )

    # ---- One step ----

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch=None) -> torch.Tensor:
        """Take one micro-batch forward and backward, sharpness-aware if asked for."""
        model.train()
        self.loss.train()
        self.loss.margin_factor = self.margin_schedule(self.state.global_step / self.state.max_steps)
        inputs = self._prepare_inputs(inputs)
        if self.sharpness is None:
            return self.forward_backward(model, inputs, num_items_in_batch)
        return self.sharpness(self, model, inputs, num_items_in_batch)

    def forward_backward(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch=None) -> torch.Tensor:
        """Take the Trainer's own step at the weights as they are; adds to `.grad`, and gives the loss (detached)."""
        return super().training_step(model, inputs, num_items_in_batch)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Move to the device, and turn clips into features; augmented in training. Prepared inputs stay as they are."""
        inputs = super()._prepare_inputs(inputs)
        if "clips" not in inputs:
            return inputs
        clips, num_samples = inputs.pop("clips"), inputs.pop("num_samples", None)
        training = self.model.training
        if training and self.waveform_augment is not None:
            clips = self.waveform_augment(clips)
        if num_samples is not None:  # in evaluation: an item is prepared and embedded as if it were alone
            features, num_frames = self.feature_extractor.extract_mixed_features(clips, num_samples)
            return {"input_values": features, "num_frames": num_frames, **inputs}
        features = self.feature_extractor.extract_features(clips)
        views = {"input_values": features}
        if training and self.objective.two_views:
            views["second_view"] = features
        if training and self.spec_augment is not None:
            views = {name: self.spec_augment(view) for name, view in views.items()}
        return {**views, **inputs}

    def compute_loss(self, model, inputs, return_outputs: bool = False, num_items_in_batch=None):
        """Give the training loss of a batch; in evaluation plain cross-entropy of the model's own logits."""
        if model.training:
            loss, outputs = self.objective(model, inputs, self.loss)
        else:
            labels = inputs["labels"]
            outputs = model(input_values=inputs["input_values"], num_frames=inputs.get("num_frames"))
            total = nn.functional.cross_entropy(outputs.logits, labels, ignore_index=UNLABELLED, reduction="sum")
            loss = total / (labels != UNLABELLED).sum().clamp_min(1)
        return (loss, outputs) if return_outputs else loss

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Give 0: Transformers' estimate counts text tokens."""
        return 0

    def _get_dataloader(self, *args, is_training: bool = False, **kwargs) -> DataLoader:
        """Make a loader: a training batch has clips of one length, and in evaluation each row its own."""
        collator = self.data_collator
        try:
            self.data_collator = collator if is_training else self.eval_collator
            return super()._get_dataloader(*args, is_training=is_training, **kwargs)
        finally:
            self.data_collator = collator

    def _get_train_sampler(self, train_dataset=None):
        return self.sampler if self.sampler is not None else super()._get_train_sampler(train_dataset)

    # ---- Averaged weights, and what a resumed run needs beside the Trainer's own state ----

    def evaluation_loop(self, *args, **kwargs):
        """Evaluate, with averaged weights while training, and without drawing from training's random numbers."""
        averaged = self.ema is not None and self.is_in_train
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with torch.random.fork_rng(devices), self.ema.swap(self.model) if averaged else contextlib.nullcontext():
            return super().evaluation_loop(*args, **kwargs)

    def train(self, *args, **kwargs):
        """Train, and leave the averaged weights in the model if there are any, and nothing but the model's own."""
        if self.args.process_index:  # the Trainer seeds all processes alike: each would drop and mask the same
            torch.manual_seed(self.args.seed + self.args.process_index)
        output = super().train(*args, **kwargs)
        if self.ema is not None:
            self.ema.apply(self.model)
        self.objective.detach(self.model)
        return output

    def _save(self, *args, **kwargs) -> None:
        """Save the model as what it is: FSDP2 changes its class, whose file goes with the checkpoint."""
        sharded = type(self.model)
        try:
            self.model.__class__ = QLungForAudioClassification
            super()._save(*args, **kwargs)
        finally:
            self.model.__class__ = sharded

    def _save_rng_state(self, output_dir: str) -> None:
        # Before trainer_state.json is written, whose presence tells that a checkpoint is whole.
        super()._save_rng_state(output_dir)
        if self.args.should_save:
            parts = {"loss": self.loss, "objective": self.objective, "sharpness": self.sharpness, "ema": self.ema}
            state = {name: part.state_dict() for name, part in parts.items() if part is not None}
            torch.save(state, Path(output_dir) / STATE_NAME)
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        state = self._load_state(resume_from_checkpoint)
        self.loss.load_state_dict(state["loss"])
        self.objective.load_state_dict(state["objective"])
        if self.sharpness is not None:
            self.sharpness.load_state_dict(state["sharpness"])

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._load_state(str(self.state.best_model_checkpoint))

    def _load_state(self, checkpoint: str) -> dict[str, Any]:
        state = torch.load(Path(checkpoint) / STATE_NAME, map_location=self.model.device, weights_only=True)
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        return state


class _StepCallback(TrainerCallback):
    def __init__(self, trainer: QLungTrainer):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        if self.trainer.ema is not None:
            self.trainer.ema.update(self.trainer.model)


def last_whole_checkpoint(output_dir: str | Path) -> str | None:
    """Give the newest checkpoint folder that was written to its end, removing newer ones that a kill cut short."""
    while Path(output_dir).is_dir() and (checkpoint := get_last_checkpoint(str(output_dir))) is not None:
        try:
            json.loads((Path(checkpoint) / "trainer_state.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):
            logger.warning(f"{checkpoint} was cut short while it was written; it is removed.")
            shutil.rmtree(checkpoint)
            continue
        return checkpoint
    return None


def leave_process_group() -> None:
    """
    End this process's part of the group, and the group's threads, where there is one.

    A thread of gloo that drops a tensor while the interpreter shuts down aborts the process. The group ends only when
    the wrapped models that hold it are collected.
    """
    gc.collect()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()

"""From options to objects: the model, the loss, and the Trainer around them."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import ASTConfig, TrainerCallback

from ..configuration_qlung import QLungConfig
from ..evaluation.tasks import TASKS
from ..feature_extraction_qlung import QLungFeatureExtractor
from ..modeling_qlung import QLungForAudioClassification
from . import as_published
from .arguments import LOSS_OPTIONS, OBJECTIVE_OPTIONS, Arguments, DataArguments, MethodArguments, ModelArguments
from .augmentation import SpecAugment, WaveformAugment
from .data import control_quality, fit_normalization, fit_quality, score_quality
from .diagnostics import TrainingDiagnostics
from .losses import ClassificationLoss, MarginSchedule, build_loss
from .objectives import build_objective
from .sampling import WeightedEpochSampler, class_weights
from .sharpness import SharpnessAwareStep
from .trainer import QLungTrainer


def fit_extractor(args: DataArguments, train: Dataset) -> QLungFeatureExtractor:
    """Make the preparation, fitted on the training cycles where the options say so."""
    extractor = QLungFeatureExtractor(
        duration=args.duration,
        num_frames=args.num_frames,
        front_end=args.front_end,
        padding=args.padding,
        fade_in=args.fade_in,
        fade_out=args.fade_out,
    )
    if args.normalization == "train":
        fit_normalization(extractor, train)
    fit_quality(extractor, train, args.quality_normalization)
    return extractor


def build_model(
    args: ModelArguments,
    max_length: int,
    classes: Sequence[str],
    class_counts: list[int],
    position_grid: Callable[..., torch.Tensor] | None = None,
) -> QLungForAudioClassification:
    """Load the pretrained encoder, or make one from scratch, for an input of `max_length` frames."""
    shared: dict[str, Any] = {
        "id2label": dict(enumerate(classes)),
        "label2id": {name: index for index, name in enumerate(classes)},
        "pooling": args.pooling,
        "head": args.head,
        "scale": args.scale,
        "dropout": args.dropout,
        "class_priors": [count / sum(class_counts) for count in class_counts],
    }
    if args.encoder is not None:
        return QLungForAudioClassification.from_audio_encoder(
            args.encoder, num_frames=max_length, position_grid=position_grid, **shared
        )
    encoder = ASTConfig(
        hidden_size=args.hidden_size,
        num_hidden_layers=args.num_hidden_layers,
        num_attention_heads=args.num_attention_heads,
        intermediate_size=args.intermediate_size,
        initializer_range=args.initializer_range,
        patch_size=args.patch_size,
        frequency_stride=args.patch_stride,
        time_stride=args.patch_stride,
        hidden_dropout_prob=args.hidden_dropout,
        max_length=max_length,
    )
    return QLungForAudioClassification(QLungConfig(audio_config=encoder, **shared))


def build_training_loss(
    args: MethodArguments, scale: float, labels: list[int], counts: list[int]
) -> ClassificationLoss:
    """Build the loss from the options that were set for it."""
    options = _given(args, LOSS_OPTIONS)
    if args.class_weight_power:
        options["class_weights"] = class_weights(labels, len(counts), args.class_weight_power).tolist()
    return build_loss(args.loss, counts, scale=scale, **options)


def _given(args: MethodArguments, names: Sequence[str]) -> dict[str, Any]:
    """The options that were set."""
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def build_trainer(
    train: Dataset, evaluated: Dataset | None, extractor: QLungFeatureExtractor, arguments: Arguments
) -> QLungTrainer:
    """Put the model, the method and the data together.

    Args:
        train: what is trained on, of `decode_cycles`, every row with a label.
        evaluated: what is scored along the way; None for nothing.
        extractor: fitted on `train`.
        arguments: of `parse`.
    """
    data_args, model_args, method, training = arguments
    task = TASKS[data_args.task]
    labels = train["label"][:]
    counts = np.bincount(labels, minlength=len(task.classes)).tolist()
    faults = data_args.as_published or ()
    grid = as_published.scramble_position_grid if "position_grid" in faults else None
    model = build_model(model_args, extractor.max_length, task.classes, counts, grid)
    if model_args.attention is not None:
        model.set_attn_implementation(model_args.attention)
    training.label_names = ["labels"]
    sharpness = None
    if method.sharpness != "none":
        sharpness = SharpnessAwareStep(method.sharpness, method.rho, method.sharpness_alpha, method.sharpness_interval)
    spec_augment = SpecAugment(method.freq_masks, method.freq_width, method.time_masks, method.time_width)
    if "spec_augment" in faults:
        spec_augment = as_published.spec_augment(spec_augment)
    objective = build_objective(method.objective, **_given(method, OBJECTIVE_OPTIONS))
    quality = None
    if data_args.quality_control != "measured":
        measured = score_quality(extractor, train)
        quality = control_quality(train, measured, data_args.quality_control, training.seed)
    callbacks: list[TrainerCallback] = [TrainingDiagnostics(method.margin_warmup, task)]
    if "moving_average" in faults:
        callbacks.append(as_published.HalfStepCallback())
    return QLungTrainer(
        model=model,
        args=training,
        train_dataset=train,
        eval_dataset=evaluated,
        loss=build_training_loss(method, model_args.scale, labels, counts),
        feature_extractor=extractor,
        task=task,
        objective=objective,
        devices=sorted(set(train["device"][:])) if objective.needs_device else None,
        quality=quality,
        callbacks=callbacks,
        sampler=WeightedEpochSampler(
            labels, len(counts), method.sampling_power, training.seed, replacement=method.sampling_power > 0
        ),
        sharpness=sharpness,
        spec_augment=spec_augment,
        waveform_augment=WaveformAugment() if method.waveform_augment else None,
        margin_schedule=MarginSchedule(method.margin_warmup),
        ema_decay=method.ema_decay,
    )

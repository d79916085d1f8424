"""From options to objects: the model, the loss, and the Trainer around them."""

from collections.abc import Callable, Sequence
from typing import Any

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
from .data import assign_buckets, control_quality, count_classes, fit_normalization, fit_quality, score_quality
from .diagnostics import TrainingDiagnostics
from .losses import ClassificationLoss, MarginSchedule, build_loss
from .objectives import build_objective
from .sampling import RowGroupSampler, WeightedEpochSampler, class_weights
from .sharpness import SharpnessAwareStep
from .streaming import ParquetCycles
from .trainer import QLungTrainer


def fit_extractor(args: DataArguments, train: Dataset) -> QLungFeatureExtractor:
    """Make the preparation, fitted on the training cycles where the options say so."""
    extractor = QLungFeatureExtractor(
        duration=args.duration,
        durations=args.durations,
        num_frames=args.num_frames,
        front_end=args.front_end,
        padding=args.padding,
        fade_in=args.fade_in,
        fade_out=args.fade_out,
        quality_score=args.quality,
    )
    if args.normalization == "train":
        fit_normalization(extractor, train)
    fit_quality(extractor, train, args.quality_normalization)
    return extractor


def build_model(
    args: ModelArguments,
    input_frames: list[int],
    classes: Sequence[str],
    class_counts: list[int],
    position_grid: Callable[..., torch.Tensor] | None = None,
) -> QLungForAudioClassification:
    """Load the pretrained encoder, or make one from scratch, for inputs of these numbers of frames, ascending."""
    shared: dict[str, Any] = {
        "id2label": dict(enumerate(classes)),
        "label2id": {name: index for index, name in enumerate(classes)},
        "pooling": args.pooling,
        "head": args.head,
        "scale": args.scale,
        "dropout": args.dropout,
        "class_priors": [count / sum(class_counts) for count in class_counts],
        "input_frames": input_frames if len(input_frames) > 1 else None,
    }
    if args.encoder is not None:
        return QLungForAudioClassification.from_audio_encoder(
            args.encoder, num_frames=input_frames[-1], position_grid=position_grid, **shared
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
        max_length=input_frames[-1],
    )
    return QLungForAudioClassification(QLungConfig(audio_config=encoder, **shared))


def build_training_loss(args: MethodArguments, scale: float, counts: list[int]) -> ClassificationLoss:
    """Build the loss from the options that were set for it."""
    options = _given(args, LOSS_OPTIONS)
    if args.class_weight_power:
        options["class_weights"] = class_weights(counts, args.class_weight_power).tolist()
    return build_loss(args.loss, counts, scale=scale, **options)


def _given(args: MethodArguments, names: Sequence[str]) -> dict[str, Any]:
    """The options that were set."""
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def build_sampler(
    train: Dataset | ParquetCycles, extractor: QLungFeatureExtractor, arguments: Arguments
) -> WeightedEpochSampler | RowGroupSampler:
    """Give the order of an epoch's rows, which is the same on every process."""
    data_args, _, method, training = arguments
    batches: dict[str, Any] = {"batch_size": training.train_batch_size, "seed": training.seed}
    if isinstance(train, ParquetCycles):
        lanes = training.world_size * (training.dataloader_num_workers or 1)
        return RowGroupSampler(train.row_group_counts, lanes=lanes, **batches)
    return WeightedEpochSampler(
        train["label"][:],
        len(TASKS[data_args.task].classes),
        method.sampling_power,
        replacement=method.sampling_power > 0,
        buckets=None if extractor.durations is None else assign_buckets(extractor, train),
        num_processes=training.world_size,
        **batches,
    )


def build_trainer(
    train: Dataset | ParquetCycles, evaluated: Dataset | None, extractor: QLungFeatureExtractor, arguments: Arguments
) -> QLungTrainer:
    """Put the model, the method and the data together.

    Args:
        train: what is trained on: of `decode_cycles`, every row with a label, or streamed.
        evaluated: what is scored along the way; None for nothing.
        extractor: fitted on `train`, or a sample of it.
        arguments: of `parse`.
    """
    data_args, model_args, method, training = arguments
    task = TASKS[data_args.task]
    counts = train.class_counts if isinstance(train, ParquetCycles) else list(count_classes(train, task).values())
    faults = data_args.as_published or ()
    grid = as_published.scramble_position_grid if "position_grid" in faults else None
    model = build_model(model_args, extractor.input_frames, task.classes, counts, grid)
    if model_args.attention is not None:
        model.set_attn_implementation(model_args.attention)
    training.label_names = ["labels"]
    sharpness = None
    if method.sharpness != "none":
        sharpness = SharpnessAwareStep(method.sharpness, method.rho, method.sharpness_alpha, method.sharpness_interval)
    spec_augment = SpecAugment(
        method.freq_masks, method.freq_width, method.time_masks, method.time_width, full_frames=extractor.max_length
    )
    if "spec_augment" in faults:
        spec_augment = as_published.spec_augment(spec_augment)
    objective = build_objective(method.objective, **_given(method, OBJECTIVE_OPTIONS))
    devices = None
    if objective.needs_device:
        devices = train.devices if isinstance(train, ParquetCycles) else sorted(set(train["device"][:]))
    quality = None
    learned = data_args.quality == "learned" and isinstance(train, Dataset)  # scored once, and not in every epoch
    if learned or data_args.quality_control != "measured":
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
        loss=build_training_loss(method, model_args.scale, counts),
        feature_extractor=extractor,
        task=task,
        objective=objective,
        devices=devices,
        quality=quality,
        callbacks=callbacks,
        sampler=build_sampler(train, extractor, arguments),
        sharpness=sharpness,
        spec_augment=spec_augment,
        waveform_augment=WaveformAugment() if method.waveform_augment else None,
        margin_schedule=MarginSchedule(method.margin_warmup),
        ema_decay=method.ema_decay,
    )

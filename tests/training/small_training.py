"""A training small enough for tests: random cycles, a one-layer encoder, and a hand-written loop to compare with."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset

from modeling_qlung import QLungConfig, QLungFeatureExtractor, QLungForAudioClassification
from modeling_qlung.training.arguments import QLungTrainingArguments
from modeling_qlung.training.data import CycleCollator, assign_buckets
from modeling_qlung.training.losses import CrossEntropyLoss
from modeling_qlung.training.sampling import WeightedEpochSampler
from modeling_qlung.training.trainer import QLungTrainer

ENCODER = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


def cycles(number: int = 32, seed: int = 0) -> Dataset:
    """Rows as `decode_cycles` gives them: noise whose colour depends on the label."""
    rng = np.random.default_rng(seed)
    rows = []
    for index in range(number):
        noise = 0.1 * rng.standard_normal(int(rng.integers(3000, 20000)))
        label = index % 4
        waveform = np.convolve(noise, np.ones(1 + 3 * label) / (1 + 3 * label), mode="same").astype(np.float32)
        rows.append(
            {
                "waveform": waveform,
                "entropy": float(rng.uniform(0.3, 0.9)),
                "rms": float(rng.uniform(0, 0.3)),
                "label": label,
                "patient_id": str(index // 4),
                "recording_id": f"recording{index}",
                "cycle_index": 0,
            }
        )
    return Dataset.from_list(rows).with_format("numpy", columns=["waveform"], output_all_columns=True)


def small_model(seed: int = 0, **config) -> QLungForAudioClassification:
    """One layer for 0.5 s."""
    torch.manual_seed(seed)
    return QLungForAudioClassification(
        QLungConfig(audio_config={**ENCODER, "max_length": 48, **config.pop("audio_config", {})}, **config)
    )


def make_trainer(
    folder: Path, model=None, train=None, loss=None, sampling_power: float = 0.0, feature_extractor=None, **options
) -> QLungTrainer:
    """SGD without momentum at a rate of 0.05 over shuffled batches of 4, unless told otherwise."""
    train = cycles() if train is None else train
    own = {"sharpness", "objective", "devices", "spec_augment", "waveform_augment", "margin_schedule", "ema_decay"}
    parts = {name: options.pop(name) for name in own | {"eval_dataset", "callbacks"} if name in options}
    settings = {
        "optim": "sgd",
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 0.0,
        "per_device_train_batch_size": 4,
        "num_train_epochs": 1,
        "save_strategy": "no",
        "eval_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "label_names": ["labels"],
        "seed": 0,
    }
    feature_extractor = feature_extractor or QLungFeatureExtractor(duration=0.5)
    arguments = QLungTrainingArguments(output_dir=str(folder), **{**settings, **options})
    return QLungTrainer(
        small_model() if model is None else model,
        arguments,
        loss=loss or CrossEntropyLoss(scale=10.0),
        feature_extractor=feature_extractor,
        sampler=WeightedEpochSampler(
            train["label"][:],
            4,
            sampling_power,
            replacement=sampling_power > 0,
            buckets=assign_buckets(feature_extractor, train) if feature_extractor.durations else None,
            batch_size=arguments.train_batch_size,
            num_processes=arguments.world_size,
        ),
        train_dataset=train,
        **parts,
    )


def batches(trainer: QLungTrainer, epoch: int = 0) -> list[dict[str, torch.Tensor]]:
    """The epoch's batches as the model takes them, made without the Trainer's loader."""
    assert trainer.sampler is not None
    trainer.sampler.set_epoch(epoch)
    order, size = list(trainer.sampler), trainer.args.per_device_train_batch_size
    collate = CycleCollator(trainer.feature_extractor, trainer.eval_collator.devices, one_length=True)
    made = []
    for start in range(0, len(order), size):
        batch = collate([trainer.train_dataset[index] for index in order[start : start + size]])
        made.append({"input_values": trainer.feature_extractor.extract_features(batch.pop("clips")), **batch})
    trainer.sampler.set_epoch(0)
    return made


Gradient = dict[str, torch.Tensor]


def gradient_at(
    model: torch.nn.Module, batch: dict[str, torch.Tensor], loss, offset: Gradient | None = None
) -> Gradient:
    """Gradient of the loss at the weights plus an offset, computed on a functional copy."""
    weights = {
        name: p.detach().clone() + (0 if offset is None else offset[name]) for name, p in model.named_parameters()
    }
    weights = {name: value.requires_grad_() for name, value in weights.items()}
    output = torch.func.functional_call(model, weights, (batch["input_values"],))
    value = loss(output.cosines, batch["labels"])
    return dict(zip(weights, torch.autograd.grad(value, list(weights.values())), strict=True))


def flat(gradient: Gradient) -> torch.Tensor:
    """All of it as one float64 vector."""
    return torch.cat([part.double().flatten() for part in gradient.values()])


def mean(gradients: list[Gradient]) -> Gradient:
    """Average over micro-batches."""
    return {name: torch.stack([gradient[name] for gradient in gradients]).mean(dim=0) for name in gradients[0]}


def train_by_hand(
    model: torch.nn.Module, steps: list[list[dict[str, torch.Tensor]]], rule: Callable, rate: float = 0.05
):
    """Plain SGD with the gradient that `rule(model, micro_batches, step)` gives; changes the model."""
    for step, micro_batches in enumerate(steps):
        gradient = rule(model, micro_batches, step)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.sub_(rate * gradient[name].to(parameter.dtype))

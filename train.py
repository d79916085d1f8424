"""Train and evaluate a respiratory-sound classifier: `accelerate launch train.py [RECIPE] [--option value ...]`.

A run reads a dataset, fits the preparation on its training cycles, trains, and writes a folder that holds the
checkpoint in its published form, its scores and predictions, figures, a model card, and the recipe to run it again.
"""

import json
import logging
import os
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from datasets import Dataset
from transformers import ASTConfig, set_seed
from transformers.utils import logging as transformers_logging

import hf_datasets
from modeling_qlung import QLungConfig, QLungFeatureExtractor, QLungForAudioClassification
from modeling_qlung.evaluation import CLASS_NAMES
from modeling_qlung.evaluation.model_card import RunDescription, build_model_card
from modeling_qlung.evaluation.plots import plot_confusion_matrix, plot_training_curves
from modeling_qlung.evaluation.report import (
    format_table,
    read_predictions,
    score_predictions,
    summarize_seeds,
    write_metrics,
    write_predictions,
)
from modeling_qlung.training.arguments import (
    Arguments,
    DataArguments,
    MethodArguments,
    ModelArguments,
    QLungTrainingArguments,
    Recipe,
    parse,
)
from modeling_qlung.training.augmentation import SpecAugment, WaveformAugment
from modeling_qlung.training.data import CycleCollator, decode_cycles, fit_normalization, fit_quality
from modeling_qlung.training.losses import ClassificationLoss, MarginSchedule, build_loss
from modeling_qlung.training.sampling import WeightedEpochSampler, class_weights, patient_split
from modeling_qlung.training.sharpness import SharpnessAwareStep
from modeling_qlung.training.trainer import QLungTrainer, last_whole_checkpoint

logger = logging.getLogger("train")

PRIVATE = ("data_dir", "cache_dir", "output_dir")  # folders of this machine, which no published file names


@dataclass
class Data:
    """Decoded cycles: what is trained on, what an epoch is selected on (if anything), and the test splits."""

    train: Dataset
    validation: Dataset | None
    tests: dict[str, Dataset]
    missing: str | None = None  # what of the dataset was not there

    @property
    def class_counts(self) -> list[int]:
        """Training cycles of each class."""
        return np.bincount(self.train["label"][:], minlength=len(CLASS_NAMES)).tolist()


def load_data(args: DataArguments, seed: int, sampling_rate: int) -> Data:
    """Load, decode and split; the validation patients depend on the seed."""
    options: dict[str, Any] = {"continuous_as_wheeze": True} if args.continuous_as_wheeze else {}
    if args.dataset == "simulated":
        options["train_patients"] = args.simulated_patients
    splits = hf_datasets.load(
        args.dataset,
        args.data_dir,
        allow_missing_audio=args.allow_missing_audio,
        cache_dir=args.cache_dir,
        **options,
    )
    missing = splits["train"].info.description or None
    decoded = {name: decode_cycles(split, sampling_rate) for name, split in splits.items()}
    train = decoded.pop("train")
    labelled = np.flatnonzero([label is not None for label in train["label"][:]])
    if len(labelled) < len(train):
        logger.warning(
            "%d of %d training cycles have no label and are not used.", len(train) - len(labelled), len(train)
        )
        train = train.select(labelled)
    validation = None
    if args.validation_fraction > 0:
        kept, held_out = patient_split(train["patient_id"][:], train["label"][:], args.validation_fraction, seed)
        train, validation = train.select(kept), train.select(held_out)
    return Data(train, validation, decoded, missing)


def build_model(args: ModelArguments, max_length: int, class_counts: list[int]) -> QLungForAudioClassification:
    """Load the pretrained encoder, or make one from scratch, for an input of `max_length` frames."""
    shared: dict[str, Any] = {
        "pooling": args.pooling,
        "head": args.head,
        "scale": args.scale,
        "dropout": args.dropout,
        "class_priors": [count / sum(class_counts) for count in class_counts],
    }
    if args.encoder is not None:
        return QLungForAudioClassification.from_audio_encoder(args.encoder, num_frames=max_length, **shared)
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
    names = (
        "margin_weight",
        "margin_scale",
        "quality_share",
        "quality_margin",
        "target_margin",
        "fixed_margin",
        "margin",
        "label_smoothing",
    )
    options = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.class_weight_power:
        options["class_weights"] = class_weights(labels, len(counts), args.class_weight_power).tolist()
    return build_loss(args.loss, counts, scale=scale, **options)


def build_trainer(data: Data, extractor: QLungFeatureExtractor, arguments: Arguments) -> QLungTrainer:
    """Put the model, the method and the data together."""
    _, model_args, method, training = arguments
    labels, counts = data.train["label"][:], data.class_counts
    model = build_model(model_args, extractor.max_length, counts)
    model.set_attn_implementation(model_args.attention)
    selection = {"validation": data.validation, "test": next(iter(data.tests.values())), "last": data.validation}
    evaluated = selection[method.select_on]
    if evaluated is None:
        if method.select_on == "validation":
            raise SystemExit("--select_on validation needs validation patients: set --validation_fraction above 0.")
        training.eval_strategy, training.do_eval = "no", False
    training.label_names = ["labels"]
    training.metric_for_best_model, training.greater_is_better = "score_4class", True
    training.load_best_model_at_end = method.select_on != "last"
    sharpness = None
    if method.sharpness != "none":
        sharpness = SharpnessAwareStep(method.sharpness, method.rho, method.sharpness_alpha, method.sharpness_interval)
    return QLungTrainer(
        model=model,
        args=training,
        train_dataset=data.train,
        eval_dataset=evaluated,
        loss=build_training_loss(method, model_args.scale, labels, counts),
        feature_extractor=extractor,
        sampler=WeightedEpochSampler(
            labels, len(counts), method.sampling_power, training.seed, replacement=method.sampling_power > 0
        ),
        sharpness=sharpness,
        spec_augment=SpecAugment(method.freq_masks, method.freq_width, method.time_masks, method.time_width),
        waveform_augment=WaveformAugment() if method.waveform_augment else None,
        margin_schedule=MarginSchedule(method.margin_warmup),
        ema_decay=method.ema_decay,
    )


def predict(trainer: QLungTrainer, split: str, cycles: Dataset) -> list[dict[str, Any]]:
    """Classify a split: one row per cycle, those without a label too."""
    logits = trainer.predict(cycles, metric_key_prefix=split).predictions
    collator = CycleCollator(trainer.feature_extractor)
    rows = []
    for row, scores in zip(
        cycles.select_columns([n for n in cycles.column_names if n != "waveform"]), logits, strict=True
    ):
        rows.append(
            {
                "row_id": f"{row['recording_id']}:{row['cycle_index']}",
                "patient_id": row["patient_id"],
                "split": split,
                "label": row["label"],
                "prediction": int(scores.argmax()),
                "logits": scores.tolist(),
                "quality": collator.quality(row),
            }
        )
    return rows


def run(recipe: Recipe, arguments: Arguments, argv: list[str], seed: int, run_dir: Path) -> dict[str, Any]:
    """Train and evaluate one seed, or read the scores of a run that has ended; gives its metrics."""
    data_args, _, method, training = arguments
    options = {name: value for name, value in recipe.options.items() if name not in ("seeds", *PRIVATE)} | {
        "seed": seed
    }
    check_same_run(run_dir, options)
    if (run_dir / "metrics.json").is_file():
        logger.warning("%s has ended already; its scores are read, nothing is trained.", run_dir)
        return json.loads((run_dir / "metrics.json").read_text(encoding="utf-8"))

    set_seed(seed)
    training.seed = training.data_seed = seed
    training.output_dir = str(run_dir / "checkpoints")
    extractor = QLungFeatureExtractor(
        duration=data_args.duration,
        num_frames=data_args.num_frames,
        padding=data_args.padding,
        fade_in=data_args.fade_in,
        fade_out=data_args.fade_out,
    )
    with training.main_process_first(desc="reading the data"):
        data = load_data(data_args, seed, extractor.sampling_rate)
    if data_args.normalization == "train":
        fit_normalization(extractor, data.train)
    fit_quality(extractor, data.train, data_args.quality_normalization)

    trainer = build_trainer(data, extractor, arguments)
    if trainer.is_world_process_zero():
        run_dir.mkdir(parents=True, exist_ok=True)
        write_recipe(run_dir / "recipe.yaml", recipe, options)
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint or last_whole_checkpoint(training.output_dir))
    trainer.save_model(str(run_dir))
    (run_dir / "training_args.bin").unlink(missing_ok=True)  # a pickle that names this machine's folders

    splits = {**({"validation": data.validation} if data.validation is not None else {}), **data.tests}
    rows = [row for name, cycles in splits.items() for row in predict(trainer, name, cycles)]
    metrics: dict[str, Any] = {}
    if trainer.is_world_process_zero():
        write_predictions(run_dir / "predictions.parquet", rows)
        metrics = score_predictions(read_predictions(run_dir / "predictions.parquet"))
        for name, scores in metrics.items():
            title = f"{recipe.name}, {data_args.dataset} {name}"
            plot_confusion_matrix(
                scores["confusion_matrix"], CLASS_NAMES, run_dir / f"confusion_matrix_{name}.png", title
            )
        plot_training_curves(trainer.state.log_history, run_dir / "training_curves.png")
        card = build_model_card(describe(recipe, options, data, data_args, method, trainer, metrics, argv, seed))
        (run_dir / "README.md").write_text(card, encoding="utf-8")
        write_metrics(run_dir / "metrics.json", metrics)  # last: a folder with it holds a run that has ended
    trainer.accelerator.wait_for_everyone()
    return metrics


def check_same_run(run_dir: Path, options: dict[str, Any]) -> None:
    """Refuse to continue a run with other options.

    Raises:
        SystemExit: naming the options that differ.
    """
    path = run_dir / "recipe.yaml"
    if not path.is_file():
        return
    before = yaml.safe_load(path.read_text(encoding="utf-8"))
    before.pop("about", None)
    different = sorted(name for name in before.keys() | options.keys() if before.get(name) != options.get(name))
    if different:
        changes = ", ".join(f"{name} {before.get(name)!r} → {options.get(name)!r}" for name in different)
        raise SystemExit(f"{run_dir} holds a run with other options ({changes}): choose another --output_dir.")


def write_recipe(path: Path, recipe: Recipe, options: dict[str, Any]) -> None:
    """Write the options as a recipe that `train.py` takes."""
    content = {"about": recipe.about, **options}
    path.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), encoding="utf-8")


def describe(
    recipe: Recipe,
    options: dict[str, Any],
    data: Data,
    data_args: DataArguments,
    method: MethodArguments,
    trainer: QLungTrainer,
    metrics: dict[str, Any],
    argv: list[str],
    seed: int,
) -> RunDescription:
    """Collect what the model card tells."""
    config, extractor = trainer.model.config, trainer.feature_extractor
    parts = {"train": data.train, **({"validation": data.validation} if data.validation else {}), **data.tests}
    return RunDescription(
        model_name=f"QLung {recipe.name}",
        recipe=recipe.name,
        description=recipe.about.get("description", "options of its own."),
        source=recipe.about.get("source"),
        published=recipe.about.get("published", {}),
        options=options,
        dataset=data_args.dataset,
        counts={name: count_classes(part) for name, part in parts.items()},
        metrics=metrics,
        selection=method.select_on,
        command=public_command(argv),
        versions={name: version(name) for name in ("torch", "transformers", "datasets", "accelerate")},
        seed=seed,
        num_parameters=trainer.model.num_parameters(),
        architecture={
            "encoder": config.audio_config.model_type,
            "layers": config.audio_config.num_hidden_layers,
            "hidden size": config.hidden_size,
            "frames": extractor.max_length,
            "duration (s)": extractor.duration,
            "padding": extractor.padding,
            "pooling": config.pooling,
            "head": config.head,
        },
        quality={"normalization": extractor.quality_normalization, **(extractor.quality_statistics or {})},
        missing=data.missing,
        base_model=options.get("encoder"),
        figures={
            **{f"Confusion matrix, {name}": f"confusion_matrix_{name}.png" for name in metrics},
            "Training curves": "training_curves.png",
        },
    )


def public_command(argv: list[str]) -> str:
    """Give the command that was run, without the folders of this machine."""
    words: list[str] = []
    for word in argv:
        name = word.removeprefix("--").split("=")[0].replace("-", "_")
        if word.startswith("--") and name in PRIVATE:
            words.append(f"--{name} ..." if "=" in word else word)
        else:
            hidden = bool(words) and words[-1].removeprefix("--").replace("-", "_") in PRIVATE
            words.append("..." if hidden else word)
    return " ".join(["accelerate", "launch", "train.py", *words])


def count_classes(cycles: Dataset) -> dict[str, int]:
    """Count the cycles of each class."""
    labels = [label for label in cycles["label"][:] if label is not None]
    return dict(zip(CLASS_NAMES, np.bincount(labels, minlength=len(CLASS_NAMES)).tolist(), strict=True))


def use_all_cores() -> None:
    """Share the cores between the processes: on a CPU, `accelerate launch` and torchrun give each a single thread."""
    launched = os.environ.keys() & {"ACCELERATE_MIXED_PRECISION", "LOCAL_WORLD_SIZE"}
    if launched and os.environ.get("OMP_NUM_THREADS") == "1" and not torch.accelerator.is_available():
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def main(argv: list[str]) -> None:
    """Run a recipe, once per seed, and print its scores."""
    use_all_cores()
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    recipe, arguments = parse(argv)
    training: QLungTrainingArguments = arguments[3]
    if training.process_index:
        transformers_logging.set_verbosity_error()
        logging.disable(logging.WARNING)
    seeds = arguments[2].seeds or [training.seed]
    output_dir = Path(str(training.output_dir))
    runs = []
    for seed in seeds:
        run_dir = output_dir / f"seed_{seed}" if len(seeds) > 1 else output_dir
        _, fresh = parse(argv)  # a run changes its arguments
        runs.append(run(recipe, fresh, argv, seed, run_dir))
    if training.process_index == 0:
        summary = summarize_seeds(runs)
        if len(seeds) > 1:
            write_metrics(output_dir / "summary.json", summary)
        print(f"\n{recipe.name}, {len(seeds)} seed{'s' if len(seeds) > 1 else ''}, in {output_dir}\n")
        print(format_table(summary))


if __name__ == "__main__":
    main(sys.argv[1:])

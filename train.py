"""Train and evaluate a respiratory-sound classifier: `accelerate launch train.py [RECIPE] [--option value ...]`.

A run reads a dataset, fits the preparation on its training cycles, trains, and writes a folder that holds the
checkpoint in its published form, its scores and predictions, figures, a model card, and the recipe to run it again.
"""

import hashlib
import json
import logging
import os
import shutil
import sys
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from datasets import Dataset
from transformers import set_seed
from transformers.utils import logging as transformers_logging

import hf_datasets
import modeling_qlung
from modeling_qlung import QLungFeatureExtractor
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
    write_text,
)
from modeling_qlung.training.arguments import Arguments, DataArguments, MethodArguments, Recipe, parse
from modeling_qlung.training.build import build_trainer
from modeling_qlung.training.data import CycleCollator, decode_cycles, fit_normalization, fit_quality
from modeling_qlung.training.sampling import patient_split
from modeling_qlung.training.trainer import QLungTrainer, last_whole_checkpoint, leave_process_group

logger = logging.getLogger("train")

LOCAL = "local:"  # stands before the name of a pretrained encoder's folder in what is published

# What says where, how fast and how noisily a run goes, and nothing of what comes out: it is neither compared with an
# earlier run nor published (some of it names folders of this machine).
OF_THE_MACHINE = {
    "cache_dir",
    "data_dir",
    "dataloader_num_workers",
    "dataloader_pin_memory",
    "ddp_backend",
    "disable_tqdm",
    "log_level",
    "output_dir",
    "report_to",
    "resume_from_checkpoint",
    "save_total_limit",
    "seeds",
    "use_cpu",
}


@dataclass
class Data:
    """Decoded cycles: training ones, those of validation patients (if any are kept apart), and the test splits."""

    train: Dataset
    validation: Dataset | None
    tests: dict[str, Dataset]
    missing: str | None  # what of the dataset was not there

    @property
    def held_out(self) -> dict[str, Dataset]:
        """Everything that is scored in the end, by name."""
        return {**({} if self.validation is None else {"validation": self.validation}), **self.tests}

    def scored_along(self, select_on: str) -> Dataset | None:
        """Give what is scored during training, for `--select_on`."""
        if select_on in ("validation", "last"):
            return self.validation
        if select_on in self.tests:
            return self.tests[select_on]
        if select_on == "test" and len(self.tests) == 1:
            return next(iter(self.tests.values()))
        raise SystemExit(f"--select_on {select_on}: choose validation, last, or of the test splits {list(self.tests)}.")


def load_data(args: DataArguments, seed: int, sampling_rate: int) -> Data:
    """Load, decode and split; the validation patients depend on the seed."""
    options: dict[str, Any] = {"continuous_as_wheeze": True} if args.continuous_as_wheeze else {}
    if args.dataset == "simulated":
        options["train_patients"] = args.simulated_patients
    splits = hf_datasets.load(
        args.dataset, args.data_dir, allow_missing_audio=args.allow_missing_audio, cache_dir=args.cache_dir, **options
    )
    if "train" not in splits:
        raise SystemExit(f"{args.data_dir} holds no training part of {args.dataset}, only {', '.join(splits)}.")
    missing = splits["train"].info.description or None
    tests = {name: decode_cycles(split, sampling_rate) for name, split in splits.items()}
    train = tests.pop("train")
    labelled = np.flatnonzero([label is not None for label in train["label"][:]])
    if unlabelled := len(train) - len(labelled):
        logger.warning("%d of %d training cycles have no label and are not used.", unlabelled, len(train))
        train = train.select(labelled)
    validation = None
    if args.validation_fraction:
        kept, held_out = patient_split(train["patient_id"][:], train["label"][:], args.validation_fraction, seed)
        train, validation = train.select(kept), train.select(held_out)
    return Data(train, validation, tests, missing)


def fit_extractor(args: DataArguments, train: Dataset) -> QLungFeatureExtractor:
    """Make the preparation, fitted on the training cycles where the options say so."""
    extractor = QLungFeatureExtractor(
        duration=args.duration,
        num_frames=args.num_frames,
        padding=args.padding,
        fade_in=args.fade_in,
        fade_out=args.fade_out,
    )
    if args.normalization == "train":
        fit_normalization(extractor, train)
    fit_quality(extractor, train, args.quality_normalization)
    return extractor


def run(recipe: Recipe, arguments: Arguments, seed: int, run_dir: Path) -> dict[str, Any]:
    """Train and evaluate one seed, or read the scores of a run that has ended; gives its metrics."""
    data_args, _, method, training = arguments
    options = publishable(recipe.options, seed)
    check_same_run(run_dir, options)
    if (run_dir / "metrics.json").is_file():
        logger.warning("%s has ended already; its scores are read, nothing is trained.", run_dir)
        return json.loads((run_dir / "metrics.json").read_text(encoding="utf-8"))

    set_seed(seed)
    training.seed = training.data_seed = seed
    training.output_dir = str(run_dir / "checkpoints")
    try:
        with training.main_process_first(desc="reading the data"):
            data = load_data(data_args, seed, QLungFeatureExtractor().sampling_rate)
        evaluated = data.scored_along(method.select_on)
        trainer = build_trainer(data.train, evaluated, fit_extractor(data_args, data.train), arguments)
    except (OSError, ValueError) as error:  # missing files, no network, impossible settings: their messages say it all
        message = str(error).replace("allow_missing_audio=True", "--allow_missing_audio true")
        raise SystemExit(f"train.py: error: {message}") from error
    if trainer.is_world_process_zero():
        run_dir.mkdir(parents=True, exist_ok=True)
        content = {"about": about(recipe), **options}
        write_text(run_dir / "recipe.yaml", yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
    with training.main_process_first(desc="looking for a checkpoint"):
        checkpoint = training.resume_from_checkpoint or last_whole_checkpoint(training.output_dir)
    trainer.train(resume_from_checkpoint=checkpoint)
    if method.select_on != "last" and trainer.state.best_model_checkpoint is None:
        raise SystemExit(
            f"No epoch could be chosen: score_4class was never defined on {method.select_on}, which lacks normal or "
            "abnormal cycles. Choose another --seed for the validation patients, or --select_on last."
        )
    trainer.save_model(str(run_dir))
    rows = [row for name, cycles in data.held_out.items() for row in predict(trainer, name, cycles)]
    metrics: dict[str, Any] = {}
    if trainer.is_world_process_zero():
        write_predictions(run_dir / "predictions.parquet", rows)
        metrics = score_predictions(read_predictions(run_dir / "predictions.parquet"))
        report(run_dir, describe(recipe, options, data, method, trainer, metrics, seed), trainer.state.log_history)
        # Neither is for publishing: one is a pickle that names this machine's folders, the other was for resuming.
        (run_dir / "training_args.bin").unlink(missing_ok=True)
        shutil.rmtree(training.output_dir, ignore_errors=True)
        write_metrics(run_dir / "metrics.json", metrics)  # last: a folder with it holds a run that has ended
    trainer.accelerator.wait_for_everyone()
    return metrics


def publishable(options: dict[str, Any], seed: int) -> dict[str, Any]:
    """Give the options that say what comes out of a run, without folders of this machine."""
    kept = {name: value for name, value in options.items() if name not in OF_THE_MACHINE}
    folder = Path(kept.get("encoder") or "")
    if "encoder" in kept and folder.is_dir():  # known again by its name and content
        files = sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors"))
        digest = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
        kept["encoder"] = f"{LOCAL}{folder.resolve().name}-{digest[:12]}"
    return {**kept, "seed": seed}


def about(recipe: Recipe) -> dict[str, Any]:
    """Give what a recipe says of itself, or of what was changed in it: then it stands for no published row."""
    changes = {name: value for name, value in recipe.changes.items() if name not in {*OF_THE_MACHINE, "seed"}}
    if not changes:
        return {"recipe": recipe.name, **recipe.about}
    listed = ", ".join(f"{name} {value}" for name, value in publishable(changes, 0).items() if name != "seed")
    description = recipe.about.get("description", "Options of its own.")
    return {"recipe": recipe.name, "description": f"{description} Changed: {listed}."}


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


def predict(trainer: QLungTrainer, split: str, cycles: Dataset) -> list[dict[str, Any]]:
    """Classify a split: one row per cycle, those without a label too."""
    logits = trainer.predict(cycles, metric_key_prefix=split).predictions
    collator = CycleCollator(trainer.feature_extractor)
    known = cycles.with_format(None).remove_columns("waveform")
    return [
        {
            "row_id": f"{row['recording_id']}:{row['cycle_index']}",
            "patient_id": row["patient_id"],
            "split": split,
            "label": row["label"],
            "prediction": int(scores.argmax()),
            "logits": scores.tolist(),
            "quality": collator.quality(row),
        }
        for row, scores in zip(known, logits, strict=True)
    ]


def describe(
    recipe: Recipe,
    options: dict[str, Any],
    data: Data,
    method: MethodArguments,
    trainer: QLungTrainer,
    metrics: dict[str, Any],
    seed: int,
) -> RunDescription:
    """Collect what the model card tells."""
    config, extractor = trainer.model.config, trainer.feature_extractor
    dataset = options.get("dataset", DataArguments.dataset)
    told = about(recipe)
    local = str(options.get("encoder", "")).startswith(LOCAL)
    folders = [name for name, asked in (("data_dir", dataset != "simulated"), ("encoder", local)) if asked]
    training_patients = set(data.train["patient_id"][:])
    return RunDescription(
        model_name=f"QLung {recipe.name}",
        recipe=recipe.name,
        description=told.get("description", "Options of its own."),
        source=told.get("source"),
        published={} if data.missing else told.get("published", {}),
        options=options,
        dataset=dataset,
        counts={name: count_classes(part) for name, part in {"train": data.train, **data.held_out}.items()},
        shared_patients={
            name: len(training_patients & set(part["patient_id"][:])) for name, part in data.held_out.items()
        },
        metrics=metrics,
        selection=method.select_on if method.select_on in ("validation", "last") else "test",
        command=" ".join(["accelerate launch train.py recipe.yaml", *(f"--{name} FOLDER" for name in folders)]),
        versions={
            "qlung": modeling_qlung.__version__,
            **{name: version(name) for name in ("torch", "transformers", "datasets", "accelerate", "numpy", "soxr")},
        },
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
        quality={"normalization": extractor.quality_normalization, **(extractor.quality_statistics or {})}
        if trainer.loss.uses_quality
        else None,
        missing=data.missing,
        base_model=None if local else options.get("encoder"),
        local_weights=options["encoder"].removeprefix(LOCAL) if local else None,
    )


def count_classes(cycles: Dataset) -> dict[str, int]:
    """Count the cycles of each class."""
    labels = [label for label in cycles["label"][:] if label is not None]
    return dict(zip(CLASS_NAMES, np.bincount(labels, minlength=len(CLASS_NAMES)).tolist(), strict=True))


def report(run_dir: Path, description: RunDescription, log_history: list[dict[str, Any]]) -> None:
    """Draw the figures and write the model card."""
    figures = {}
    for name, scores in description.metrics.items():
        figures[f"Confusion matrix, {name}"] = file = f"confusion_matrix_{name}.png"
        title = f"{description.recipe}, {description.dataset} {name}"
        plot_confusion_matrix(scores["confusion_matrix"], CLASS_NAMES, run_dir / file, title)
    if any("loss" in entry or "eval_loss" in entry for entry in log_history):
        figures["Training curves"] = "training_curves.png"
        plot_training_curves(log_history, run_dir / "training_curves.png")
    write_text(run_dir / "README.md", build_model_card(replace(description, figures=figures)))


def use_all_cores() -> None:
    """Share the cores between the processes: on a CPU, `accelerate launch` and torchrun give each a single thread."""
    launched = os.environ.keys() & {"ACCELERATE_MIXED_PRECISION", "LOCAL_WORLD_SIZE"}
    if launched and os.environ.get("OMP_NUM_THREADS") == "1" and not torch.accelerator.is_available():
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def main(argv: list[str]) -> None:
    """Run a recipe, once per seed, and print its scores."""
    use_all_cores()
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    recipe, (_, _, method, training) = parse(argv)
    if training.process_index:
        transformers_logging.set_verbosity_error()
        logging.disable(logging.WARNING)
    output_dir = Path(str(training.output_dir))
    run_dirs = {seed: output_dir / f"seed_{seed}" for seed in method.seeds or ()} or {training.seed: output_dir}
    runs = [run(*parse(argv), seed, run_dir) for seed, run_dir in run_dirs.items()]  # a run changes its arguments
    if training.process_index == 0:
        summary = summarize_seeds(runs)
        if method.seeds:
            write_metrics(output_dir / "summary.json", summary)
        print(f"\n{recipe.name}, {len(runs)} seed{'s' if len(runs) > 1 else ''}, in {output_dir}\n")
        print(format_table(summary))


if __name__ == "__main__":
    main(sys.argv[1:])
    leave_process_group()

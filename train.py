"""Train and evaluate respiratory-sound classifiers.

    accelerate launch train.py [RECIPE] [--option value ...]
    accelerate launch train.py --evaluate CHECKPOINT --on DATASET:SPLIT ... [--option value ...]
    accelerate launch train.py --benchmark ROW ... --seeds 1 2 3 [--option value ...]

A run reads a dataset, fits the preparation on its training cycles, trains, and writes a folder that holds the
checkpoint in its published form, its scores and predictions, figures, a model card, and the recipe to run it again.
An evaluation scores a finished checkpoint on any dataset. A benchmark is a grid of runs, and the table of them all.
"""

import hashlib
import json
import logging
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from datasets import Dataset, concatenate_datasets
from transformers import set_seed
from transformers.utils import logging as transformers_logging

import hf_datasets
import modeling_qlung
from modeling_qlung import QLungFeatureExtractor, QLungForAudioClassification
from modeling_qlung.evaluation.benchmark import write_benchmark
from modeling_qlung.evaluation.inspection import draw_model
from modeling_qlung.evaluation.model_card import RunDescription, build_model_card
from modeling_qlung.evaluation.plots import (
    plot_confusion_matrix,
    plot_quality_histogram,
    plot_training_curves,
)
from modeling_qlung.evaluation.report import (
    format_scores,
    format_table,
    read_predictions,
    score_predictions,
    summarize_seeds,
    write_metrics,
    write_predictions,
    write_text,
)
from modeling_qlung.evaluation.tasks import TASKS, Task, task_of
from modeling_qlung.training.arguments import (
    Arguments,
    DataArguments,
    EvaluationArguments,
    MethodArguments,
    QLungTrainingArguments,
    Recipe,
    complete_options,
    parse,
    parse_benchmark,
    parse_evaluation,
)
from modeling_qlung.training.as_published import cut_recordings
from modeling_qlung.training.build import build_trainer
from modeling_qlung.training.data import (
    CycleCollator,
    control_quality,
    decode_cycles,
    fit_normalization,
    fit_quality,
    score_quality,
)
from modeling_qlung.training.flatness import measure_flatness
from modeling_qlung.training.grid import GridRun, expand_rows, row_arguments, run_grid
from modeling_qlung.training.losses import CrossEntropyLoss
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
    "folds",
    "inspect_cycles",
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


def load_splits(
    args: DataArguments | EvaluationArguments, dataset: str, config: str, **options: Any
) -> dict[str, Dataset]:
    """Load a dataset's splits."""
    shared: dict[str, Any] = {"allow_missing_audio": args.allow_missing_audio, "cache_dir": args.cache_dir}
    return hf_datasets.load(dataset, args.data_dir, config, **shared, **options)


def load_data(args: DataArguments, seed: int, sampling_rate: int) -> Data:
    """Load, decode and split; the validation patients depend on the seed."""
    task = TASKS[args.task]
    options: dict[str, Any] = {"continuous_as_wheeze": True} if args.continuous_as_wheeze else {}
    if args.dataset == "simulated":
        options["train_patients"] = args.simulated_patients
    published = "preparation" in (args.as_published or ())
    splits = load_splits(args, args.dataset, "recordings" if published else task.config, **options)
    if "train" not in splits:
        raise SystemExit(f"{args.data_dir} holds no training part of {args.dataset}, only {', '.join(splits)}.")
    missing = splits["train"].info.description or None
    if published:
        splits = {name: cut_recordings(split, sampling_rate) for name, split in splits.items()}
    tests = {name: decode_cycles(split, sampling_rate, task) for name, split in splits.items()}
    if args.fold is None:
        train = tests.pop("train")
    else:  # RespireNet's folds take no notice of the official split
        together = concatenate_datasets(list(tests.values()))
        in_fold = np.array(together["fold"][:]) == args.fold
        train = together.select(np.flatnonzero(~in_fold))
        tests = {"test": together.select(np.flatnonzero(in_fold))}
    labelled = np.flatnonzero([label is not None for label in train["label"][:]])
    if unlabelled := len(train) - len(labelled):
        logger.warning("%d of %d training %s have no label and are not used.", unlabelled, len(train), task.config)
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
        front_end=args.front_end,
        padding=args.padding,
        fade_in=args.fade_in,
        fade_out=args.fade_out,
    )
    if args.normalization == "train":
        fit_normalization(extractor, train)
    fit_quality(extractor, train, args.quality_normalization)
    return extractor


def with_quality(train: Dataset, extractor: QLungFeatureExtractor, control: str, seed: int) -> Dataset:
    """Give the training cycles the column `quality`, measured or a control."""
    quality = control_quality(train, score_quality(extractor, train), control, seed)
    columns = train.format["columns"]
    return train.add_column("quality", quality).with_format("numpy", columns=columns, output_all_columns=True)


def run(recipe: Recipe, arguments: Arguments, seed: int, run_dir: Path) -> dict[str, Any]:
    """Train and evaluate one seed, or read the scores of a run that has ended; gives its metrics."""
    data_args, _, method, training = arguments
    task = TASKS[data_args.task]
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
            data = load_data(data_args, seed, QLungFeatureExtractor(front_end=data_args.front_end).sampling_rate)
        evaluated = data.scored_along(method.select_on)
        extractor = fit_extractor(data_args, data.train)
        train = with_quality(data.train, extractor, data_args.quality_control, seed)
        trainer = build_trainer(train, evaluated, extractor, arguments)
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
            f"No epoch could be chosen: {task.headline} was never defined on {method.select_on}, which lacks normal or "
            "abnormal cycles. Choose another --seed for the validation patients, or --select_on last."
        )
    trainer.save_model(str(run_dir))
    rows = [row for name, cycles in data.held_out.items() for row in predict(trainer, name, cycles)]
    metrics: dict[str, Any] = {}
    if trainer.is_world_process_zero():
        write_predictions(run_dir / "predictions.parquet", rows)
        metrics = score_predictions(read_predictions(run_dir / "predictions.parquet"), task)
        description = describe(recipe, options, data, method, trainer, metrics, seed)
        figures = draw_run(run_dir, description, train, trainer.state.log_history)
        if method.inspect_cycles:
            parts = {"train": data.train, **data.held_out}
            figures |= draw_model(run_dir, recipe.name, trainer.model, extractor, parts, task)
            flatness = measure_flatness(
                trainer.model,
                extractor,
                data.train,
                num_cycles=method.inspect_cycles,
                batch_size=max(1, training.per_device_train_batch_size // 4),  # the second derivative holds more
            )
            write_metrics(run_dir / "flatness.json", flatness)
        write_text(run_dir / "README.md", build_model_card(replace(description, figures=figures)))
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
            "row_id": ":".join(str(row[name]) for name in ("recording_id", "cycle_index") if name in row),
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
    task = TASKS[options.get("task", DataArguments.task)]
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
        task=task,
        counts={name: count_classes(part, task) for name, part in {"train": data.train, **data.held_out}.items()},
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


def count_classes(cycles: Dataset, task: Task) -> dict[str, int]:
    """Count the cycles of each class."""
    labels = np.array([label for label in cycles["label"][:] if label is not None], dtype=np.int64)
    return dict(zip(task.classes, np.bincount(labels, minlength=len(task.classes)).tolist(), strict=True))


def draw_run(
    run_dir: Path, description: RunDescription, train: Dataset, log_history: list[dict[str, Any]]
) -> dict[str, str]:
    """Draw a run's confusions, training curves and quality; gives the figures' names by their captions."""
    figures, classes = {}, description.task.classes
    for name, scores in description.metrics.items():
        figures[f"Confusion matrix, {name}"] = file = f"confusion_matrix_{name}.png"
        title = f"{description.recipe}, {description.dataset} {name}"
        plot_confusion_matrix(scores["confusion_matrix"], classes, run_dir / file, title)
    if any("loss" in entry or "eval_loss" in entry for entry in log_history):
        figures["Training curves"] = "training_curves.png"
        plot_training_curves(log_history, run_dir / "training_curves.png")
    if description.quality is not None:
        figures["Quality score of the training cycles"] = "quality.png"
        title = f"{description.dataset}, training {description.task.config}"
        plot_quality_histogram(train["quality"][:], train["label"][:], classes, run_dir / "quality.png", title)
    return figures


def use_all_cores() -> None:
    """Share the cores between the processes: on a CPU, `accelerate launch` and torchrun give each a single thread."""
    launched = os.environ.keys() & {"ACCELERATE_MIXED_PRECISION", "LOCAL_WORLD_SIZE"}
    if launched and os.environ.get("OMP_NUM_THREADS") == "1" and not torch.accelerator.is_available():
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def train(argv: list[str]) -> None:
    """Run a recipe, once per fold and seed, and print its scores."""
    recipe, (data, _, method, training) = parse(argv)
    quiet_unless_first(training.process_index)
    runs = [run(*at_fold(argv, fold), seed, run_dir) for fold, seed, run_dir in parts(data, method, training)]
    if training.process_index == 0:
        summary = summarize_seeds(runs, TASKS[data.task])
        output_dir = Path(str(training.output_dir))
        if method.seeds or method.folds:
            write_metrics(output_dir / "summary.json", summary)
        print(f"\n{recipe.name}, {len(runs)} run{'s' if len(runs) > 1 else ''}, in {output_dir}\n")
        print(format_table(summary, TASKS[data.task]))


def evaluate(argv: list[str]) -> None:
    """Score a checkpoint on any dataset, and print its scores."""
    args = parse_evaluation(argv)
    try:
        if not Path(args.evaluate).is_dir() and args.evaluate.startswith(("/", ".", "~")):
            raise OSError(f"{args.evaluate} is neither a folder nor on the Hub")
        model = QLungForAudioClassification.from_pretrained(args.evaluate)
        extractor = QLungFeatureExtractor.from_pretrained(args.evaluate)
        task = task_of(model.config.id2label.values())
        output_dir = Path(args.output_dir or f"runs/evaluation-{Path(args.evaluate).resolve().name}")
        training = QLungTrainingArguments(
            output_dir=str(output_dir),
            per_device_eval_batch_size=args.batch_size,
            use_cpu=args.use_cpu,
            ddp_backend=args.ddp_backend,
            label_names=["labels"],
            eval_strategy="no",
            save_strategy="no",
        )
        quiet_unless_first(training.process_index)
        trainer = QLungTrainer(model, training, loss=CrossEntropyLoss(), feature_extractor=extractor, task=task)
        with training.main_process_first(desc="reading the data"):
            parts = {name: load_part(args, name, extractor.sampling_rate, task) for name in args.on}
    except (OSError, ValueError) as error:
        raise SystemExit(f"train.py: error: {error}") from error
    rows = [row for name, cycles in parts.items() for row in predict(trainer, name, cycles)]
    if trainer.is_world_process_zero():
        output_dir.mkdir(parents=True, exist_ok=True)
        write_predictions(output_dir / "predictions.parquet", rows)
        metrics = score_predictions(read_predictions(output_dir / "predictions.parquet"), task)
        write_metrics(output_dir / "metrics.json", metrics)
        title = Path(args.evaluate).name
        for name, scores in metrics.items():
            figure = output_dir / f"confusion_matrix_{name.replace(':', '_')}.png"
            plot_confusion_matrix(scores["confusion_matrix"], task.classes, figure, f"{title} on {name}")
        draw_model(output_dir, title, model, extractor, parts, task)
        print(f"\n{args.evaluate}, in {output_dir}\n")
        print(format_scores(metrics, task))


def load_part(args: EvaluationArguments, name: str, sampling_rate: int, task: Task) -> Dataset:
    """Load and decode what `DATASET:SPLIT` names.

    Raises:
        ValueError: there is no such dataset or split.
    """
    dataset, _, split = name.partition(":")
    splits = load_splits(args, dataset, task.config)
    if split not in splits:
        raise ValueError(f"{dataset} has no split {split!r} here, only {', '.join(splits)}")
    return decode_cycles(splits[split], sampling_rate, task)


def benchmark(argv: list[str]) -> None:
    """Make the runs of a grid that have not ended, and write the table of all."""
    args, shared = parse_benchmark(argv)
    if args.baseline not in (None, *expand_rows(args.benchmark)):
        raise SystemExit(f"--baseline {args.baseline} is none of the rows {', '.join(expand_rows(args.benchmark))}")
    if os.environ.get("RANK", "0") != "0":  # the grid starts its own processes, one per GPU
        return
    output_dir, rows = Path(args.output_dir), expand_rows(args.benchmark)
    runs = []
    for row in rows:
        for seed in args.seeds:
            folder = output_dir / row / f"seed_{seed}"
            words = [*row_arguments(row), *shared, f"--seed={seed}", f"--inspect_cycles={args.inspect_cycles}"]
            recipe, _ = parse(words)  # a row that cannot run is refused before any runs
            check_same_run(folder, publishable(recipe.options, seed))
            runs.append(GridRun(f"{row}, seed {seed}", folder, [*words, f"--output_dir={folder}"]))
    pending = [run for run in runs if not (run.folder / "metrics.json").is_file()]
    logger.warning("%d runs: %d have ended, %d to do.", len(runs), len(runs) - len(pending), len(pending))
    failed = run_grid(__file__, pending)
    if len(failed) == len(runs):
        raise SystemExit(f"All {len(runs)} runs failed.")
    print(write_benchmark(output_dir, rows, complete_options, args.baseline))
    if failed:
        raise SystemExit(f"{len(failed)} of {len(runs)} runs failed; the same command tries them again.")


def at_fold(argv: list[str], fold: int | None) -> tuple[Recipe, Arguments]:
    """Parse once more, for each run changes its arguments; with the fold that it is about."""
    recipe, arguments = parse(argv)
    if fold is not None:
        arguments[0].fold = recipe.options["fold"] = fold
    return recipe, arguments


def parts(data: DataArguments, method: MethodArguments, training: Any) -> list[tuple[int | None, int, Path]]:
    """Give the fold, seed and folder of each run."""
    found: list[tuple[int | None, int, Path]] = []
    folds: Sequence[int | None] = method.folds or [data.fold]
    for fold in folds:
        for seed in method.seeds or [training.seed]:
            names = [f"fold_{fold}"] * bool(method.folds) + [f"seed_{seed}"] * bool(method.seeds)
            found.append((fold, seed, Path(str(training.output_dir), *names)))
    return found


def quiet_unless_first(process_index: int) -> None:
    """Let one of several processes speak."""
    if process_index:
        transformers_logging.set_verbosity_error()
        logging.disable(logging.WARNING)


def main(argv: list[str]) -> None:
    """Train, evaluate or benchmark, by the first word."""
    use_all_cores()
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    modes = {"--evaluate": evaluate, "--benchmark": benchmark}
    modes.get(argv[0] if argv else "", train)(argv)


if __name__ == "__main__":
    main(sys.argv[1:])
    leave_process_group()

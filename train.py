"""Train and evaluate respiratory-sound classifiers.

    accelerate launch train.py [RECIPE] [--option value ...]
    accelerate launch train.py --evaluate CHECKPOINT --on DATASET:SPLIT ... [--option value ...]
    accelerate launch train.py --benchmark ROW ... --seeds 1 2 3 [--option value ...]

A run reads a dataset, fits the preparation on its training cycles, trains, and writes a folder that holds the
checkpoint in its published form, its scores and predictions, figures, a model card, and the recipe to run it again.
An evaluation scores a finished checkpoint on any dataset. A benchmark is a grid of runs, and the table of them all.
"""

import hashlib
import itertools
import json
import logging
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from datasets import Dataset, concatenate_datasets
from transformers import set_seed
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

import hf_datasets
import modeling_qlung
from hf_datasets.hub import HubError, Repository
from modeling_qlung import QLungFeatureExtractor, QLungForAudioClassification
from modeling_qlung.evaluation.benchmark import write_benchmark
from modeling_qlung.evaluation.flatness import measure_flatness
from modeling_qlung.evaluation.inspection import draw_model
from modeling_qlung.evaluation.model_card import RunDescription, build_model_card
from modeling_qlung.evaluation.plots import (
    plot_confusion_matrix,
    plot_quality_histogram,
    plot_risk_coverage,
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
from modeling_qlung.evaluation.risk_coverage import selective_scores
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
from modeling_qlung.training.build import build_trainer, fit_extractor
from modeling_qlung.training.data import (
    add_degraded_copies,
    count_classes,
    cut_windows,
    decode_cycles,
    row_id,
    score_quality,
)
from modeling_qlung.training.grid import GridRun, expand_rows, launcher_variables, run_grid
from modeling_qlung.training.hub import repository_name, run_files
from modeling_qlung.training.losses import CrossEntropyLoss
from modeling_qlung.training.sampling import patient_split
from modeling_qlung.training.streaming import ParquetCycles
from modeling_qlung.training.trainer import QLungTrainer, last_whole_checkpoint, leave_process_group

logger = logging.getLogger("train")

METRICS, PREDICTIONS, FLATNESS = "metrics.json", "predictions.parquet", "flatness.json"
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
    "hub_always_push",
    "hub_model_id",
    "hub_private_repo",
    "hub_revision",
    "hub_strategy",
    "hub_token",
    "inspect_cycles",
    "log_level",
    "output_dir",
    "push_to_hub",
    "report_to",
    "resume_from_checkpoint",
    "save_total_limit",
    "seeds",
    "use_cpu",
}


# What is scored and how precisely it is computed: a run that changes no more than this still stands for its row.
OF_THE_MEASUREMENT = {
    "also_test",
    "attention",
    "bf16",
    "fp16",
    "per_device_eval_batch_size",
    "select_on",
    "tf32",
    "validation_fraction",
}


@dataclass
class Data:
    """Decoded cycles: training ones, those of validation patients (if any are kept apart), and what is tested on.

    Where the training set is streamed, `train` is a sample of it.
    """

    train: Dataset
    stream: ParquetCycles | None
    validation: Dataset | None
    tests: dict[str, Dataset]
    elsewhere: dict[str, Dataset]  # of other datasets, by `DATASET:SPLIT`
    missing: str | None  # what of the dataset was not there

    @property
    def training_patients(self) -> set[str]:
        """The patients that are trained on."""
        return set(self.train["patient_id"][:]) if self.stream is None else self.stream.patients

    def training_counts(self, task: Task) -> dict[str, int]:
        """Count the training cycles of each class."""
        if self.stream is None:
            return count_classes(self.train, task)
        return dict(zip(task.classes, self.stream.class_counts, strict=True))

    @property
    def held_out(self) -> dict[str, Dataset]:
        """Everything that is scored in the end, by name."""
        return {**({} if self.validation is None else {"validation": self.validation}), **self.tests, **self.elsewhere}

    def scored_along(self, select_on: str) -> Dataset | None:
        """Give what is scored during training, for `--select_on`."""
        if select_on == "validation" and self.validation is None:
            raise SystemExit("--train_parquet has no split `validation`: add one, or choose another --select_on.")
        if select_on in ("validation", "last"):
            return self.validation
        if select_on in self.tests:
            return self.tests[select_on]
        if select_on == "test" and len(self.tests) == 1:
            return next(iter(self.tests.values()))
        raise SystemExit(f"--select_on {select_on}: choose validation, last, or of the test splits {list(self.tests)}.")


def load_rows(args: DataArguments | EvaluationArguments, dataset: str, config: str) -> dict[str, Dataset]:
    """Load a dataset's splits as its builder gives them."""
    options: dict[str, Any] = {}
    if args.continuous_as_wheeze and dataset == "sprsound":
        options["continuous_as_wheeze"] = True
    if isinstance(args, DataArguments) and dataset == "simulated":
        options["train_patients"] = args.simulated_patients
    return hf_datasets.load(
        dataset,
        args.data_dir if dataset != "simulated" else None,
        config,
        allow_missing_audio=args.allow_missing_audio,
        cache_dir=args.cache_dir,
        **options,
    )


def load_splits(
    args: DataArguments | EvaluationArguments,
    dataset: str,
    sampling_rate: int,
    task: Task,
    left_out: str | None = None,
) -> tuple[dict[str, Dataset], str | None]:
    """Load and decode a dataset's splits but the one left out; gives them, and what of the dataset was not there."""
    published = "preparation" in (args.as_published or ())
    splits = load_rows(args, dataset, "recordings" if published or args.windows else task.config)
    missing = next(iter(splits.values())).info.description or None
    splits = {name: split for name, split in splits.items() if name != left_out}
    if args.windows:
        cut = partial(cut_windows, sampling_rate=sampling_rate, seconds=args.windows, level=args.level)
        return {name: cut(split) for name, split in splits.items()}, missing
    if published:
        splits = {name: cut_recordings(split, sampling_rate) for name, split in splits.items()}
    return {name: decode_cycles(split, sampling_rate, task) for name, split in splits.items()}, missing


def load_part(
    args: DataArguments | EvaluationArguments, name: str, sampling_rate: int, task: Task
) -> tuple[Dataset, str | None]:
    """Load and decode what `DATASET:SPLIT` names; gives it, and what of the dataset was not there.

    Raises:
        ValueError: there is no such dataset or split.
    """
    dataset, _, split = name.partition(":")
    splits, missing = load_splits(args, dataset, sampling_rate, task)
    if split not in splits:
        raise ValueError(f"{dataset} has no split {split!r} here, only {', '.join(splits)}")
    return splits[split], missing


def load_data(args: DataArguments, seed: int, sampling_rate: int) -> Data:
    """Load, decode and split; the validation patients depend on the seed."""
    task = TASKS[args.task]
    left_out = None if args.train_parquet is None else "train"
    tests, missing = load_splits(args, args.dataset, sampling_rate, task, left_out)
    if args.train_parquet is not None:
        stream = ParquetCycles(args.train_parquet, sampling_rate, task, args.cache_dir)
        return Data(stream.sample(), stream, stream.validation(), tests, load_elsewhere(args, sampling_rate), missing)
    if "train" not in tests:
        raise SystemExit(f"{args.data_dir} holds no training part of {args.dataset}, only {', '.join(tests)}.")
    if args.fold is None:
        train = tests.pop("train")
    else:  # RespireNet's folds take no notice of the official split
        together = concatenate_datasets(list(tests.values()))
        in_fold = np.array(together["fold"][:]) == args.fold
        train = together.select(np.flatnonzero(~in_fold))
        tests = {"test": together.select(np.flatnonzero(in_fold))}
    for name in args.also_train or ():
        more, lacking = load_part(args, name, sampling_rate, task)
        if shared := sorted(set(train["patient_id"][:]) & set(more["patient_id"][:])):
            raise ValueError(f"{args.dataset} and {name} have patients of one name: {', '.join(shared[:5])}")
        train = join([train, more])
        missing = " ".join(filter(None, (missing, lacking))) or None
    labelled = np.flatnonzero([label is not None for label in train["label"][:]])
    if unlabelled := len(train) - len(labelled):
        logger.warning("%d of %d training %s have no label and are not used.", unlabelled, len(train), task.config)
        train = train.select(labelled)
    validation = None
    if args.validation_fraction:
        kept, held_out = patient_split(train["patient_id"][:], train["label"][:], args.validation_fraction, seed)
        train, validation = train.select(kept), train.select(held_out)
    if args.degraded_copies:
        train = add_degraded_copies(train, args.degraded_copies, sampling_rate, seed)
    return Data(train, None, validation, tests, load_elsewhere(args, sampling_rate), missing)


def join(parts: Sequence[Dataset]) -> Dataset:
    """Put decoded cycles together, with the columns that all of them have."""
    columns = [name for name in parts[0].column_names if all(name in part.column_names for part in parts)]
    together = concatenate_datasets([part.select_columns(columns).with_format(None) for part in parts])
    return together.with_format("numpy", columns=["waveform"], output_all_columns=True)


def load_elsewhere(args: DataArguments, sampling_rate: int) -> dict[str, Dataset]:
    """Load and decode what is tested on beside the dataset's own tests, as far as it is there."""
    elsewhere = {}
    for name in args.also_test or ():
        try:
            elsewhere[name], _ = load_part(args, name, sampling_rate, TASKS[args.task])
        except (OSError, ValueError) as error:  # a row's other dataset may not be at hand
            logger.warning("--also_test %s is left out: %s", name, error)
    return elsewhere


def run(recipe: Recipe, arguments: Arguments, seed: int, run_dir: Path) -> dict[str, Any]:
    """Train, test and inspect one seed, as far as this has not been done; gives its metrics."""
    method, training = arguments[2:]
    options = publishable(recipe.options, seed)
    check_same_run(run_dir, options)
    if ended(run_dir, 0):
        logger.warning("%s has ended already; its scores are read, nothing is trained.", run_dir)
    else:
        train_and_test(recipe, arguments, seed, run_dir, options)
    if training.process_index:
        return {}
    if not ended(run_dir, method.inspect_cycles):
        inspect(arguments, seed, run_dir)
    return json.loads((run_dir / METRICS).read_text(encoding="utf-8"))


def ended(run_dir: Path, inspect_cycles: int) -> bool:
    """Whether a run has been made to its end, and its model been inspected where that was asked for."""
    return all((run_dir / name).is_file() for name in (METRICS, *([FLATNESS] if inspect_cycles else [])))


def train_and_test(recipe: Recipe, arguments: Arguments, seed: int, run_dir: Path, options: dict[str, Any]) -> None:
    """Train and evaluate one seed, from its last checkpoint if there is one."""
    data_args, _, method, training = arguments
    task = TASKS[data_args.task]
    set_seed(seed)
    training.seed = training.data_seed = seed
    training.output_dir = str(run_dir / "checkpoints")
    # The Trainer would push commits of its own under its own card, and pickle the token; `upload` does it in the end.
    training.push_to_hub, training.hub_token = False, None
    try:
        with training.main_process_first(desc="reading the data"):
            data = load_data(data_args, seed, QLungFeatureExtractor(front_end=data_args.front_end).sampling_rate)
        scored = data.scored_along(method.select_on)
        extractor = fit_extractor(data_args, data.train)
        trainer = build_trainer(data.train if data.stream is None else data.stream, scored, extractor, arguments)
    except (OSError, ValueError) as error:  # missing files, no network, impossible settings: their messages say it all
        raise SystemExit(f"train.py: error: {as_options(error)}") from error
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
    if trainer.is_world_process_zero():
        metrics = score(run_dir, rows, task)
        description = describe(recipe, options, data, method, trainer, metrics, seed)
        figures = draw_run(run_dir, description, data.train, trainer)
        write_text(run_dir / "README.md", build_model_card(replace(description, figures=figures)))
        # Neither is for publishing: one is a pickle that names this machine's folders, the other was for resuming.
        (run_dir / "training_args.bin").unlink(missing_ok=True)
        shutil.rmtree(training.output_dir, ignore_errors=True)
        write_metrics(run_dir / METRICS, metrics)  # last: a folder with it holds a run that has ended
    trainer.accelerator.wait_for_everyone()


def inspect(arguments: Arguments, seed: int, run_dir: Path) -> None:
    """Draw how a run's model embeds cycles and where it attends, and measure its flatness."""
    data_args, _, method, training = arguments
    model = QLungForAudioClassification.from_pretrained(run_dir).to(training.device)
    extractor = QLungFeatureExtractor.from_pretrained(run_dir)
    data = load_data(data_args, seed, extractor.sampling_rate)
    parts = {"train": data.train, **data.held_out}
    draw_model(run_dir, f"{run_dir.parent.name}, {run_dir.name}", model, extractor, parts, TASKS[data_args.task])
    # The second derivative holds several times what a training step does.
    batch_size = max(1, training.per_device_train_batch_size // 4)
    flatness = measure_flatness(model, extractor, data.train, num_cycles=method.inspect_cycles, batch_size=batch_size)
    write_metrics(run_dir / FLATNESS, flatness)  # last: it tells that the inspection is whole


def score(folder: Path, rows: list[dict[str, Any]], task: Task) -> dict[str, Any]:
    """Write the predictions, and give their scores."""
    write_predictions(folder / PREDICTIONS, rows)
    return score_predictions(read_predictions(folder / PREDICTIONS), task)


def as_options(error: Exception) -> str:
    """Name what a library's message asks for as it is typed here."""
    return str(error).replace("allow_missing_audio=True", "--allow_missing_audio true")


def publishable(options: dict[str, Any], seed: int) -> dict[str, Any]:
    """Give the options that say what comes out of a run, without folders of this machine."""
    left_out = OF_THE_MACHINE - ({"dataloader_num_workers"} if "train_parquet" in options else set())
    kept = {name: value for name, value in options.items() if name not in left_out}
    folder = Path(kept.get("encoder") or "")
    if "encoder" in kept and folder.is_dir():
        files = sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors"))
        kept["encoder"] = local_name(folder, b"".join(path.read_bytes() for path in files))
    folder = Path(kept.get("train_parquet") or "")
    if "train_parquet" in kept and folder.is_dir():
        files = sorted(folder.rglob("*.parquet"))
        sizes = "".join(f"{path.relative_to(folder)} {path.stat().st_size}\n" for path in files)
        kept["train_parquet"] = local_name(folder, sizes.encode())
    return {**kept, "seed": seed}


def local_name(folder: Path, content: bytes) -> str:
    """Name a folder of this machine so that it is known again, by its own name and what is in it."""
    return f"{LOCAL}{folder.resolve().name}-{hashlib.sha256(content).hexdigest()[:12]}"


def about(recipe: Recipe) -> dict[str, Any]:
    """Give what a recipe says of itself, or of what was changed in it: then it stands for no published row."""
    changes = {name: value for name, value in recipe.changes.items() if name not in {*OF_THE_MACHINE, "seed"}}
    if not changes:
        return {"recipe": recipe.name, **recipe.about}
    listed = ", ".join(f"{name} {value}" for name, value in publishable(changes, 0).items() if name != "seed")
    description = recipe.about.get("description", "Options of its own.")
    kept = {} if changes.keys() - OF_THE_MEASUREMENT else recipe.about
    return {"recipe": recipe.name, **kept, "description": f"{description} Changed: {listed}."}


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
    quality = score_quality(trainer.feature_extractor, cycles)
    known = cycles.with_format(None).remove_columns("waveform")
    return [
        {
            "row_id": row_id(row),
            "patient_id": row["patient_id"],
            "split": split,
            "label": row["label"],
            "prediction": int(scores.argmax()),
            "logits": scores.tolist(),
            "quality": float(score),
        }
        for row, scores, score in zip(known, logits, quality, strict=True)
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
    streamed = str(options.get("train_parquet", "")).startswith(LOCAL)
    needed = {"data_dir": dataset != "simulated", "encoder": local, "train_parquet": streamed}
    folders = [name for name, asked in needed.items() if asked]
    return RunDescription(
        model_name=f"QLung {recipe.name}",
        recipe=recipe.name,
        description=told.get("description", "Options of its own."),
        source=told.get("source"),
        published={} if data.missing else told.get("published", {}),
        options=options,
        datasets=[dataset, *(name.partition(":")[0] for name in options.get("also_train", ()))],
        task=task,
        counts={
            "train": data.training_counts(task),
            **{name: count_classes(part, task) for name, part in data.held_out.items()},
        },
        shared_patients={
            name: len(data.training_patients & set(part["patient_id"][:])) for name, part in data.held_out.items()
        },
        metrics=metrics,
        selection=method.select_on if method.select_on in ("validation", "last") else "test",
        command=" ".join(["accelerate launch train.py recipe.yaml", *(f"--{name} FOLDER" for name in folders)]),
        versions={
            "qlung": modeling_qlung.__version__,
            **{name: version(name) for name in ("torch", "transformers", "datasets", "accelerate", "numpy", "soxr")},
        },
        seed=seed,
        sampling_rate=extractor.sampling_rate,
        num_parameters=trainer.model.num_parameters(),
        architecture={
            "encoder": config.audio_config.model_type,
            "layers": sum(getattr(config.audio_config, "depths", [config.audio_config.num_hidden_layers])),
            "hidden size": config.hidden_size,
            "frames": " or ".join(map(str, extractor.input_frames)),
            "duration (s)": " or ".join(map(str, extractor.durations or [extractor.duration])),
            "padding": extractor.padding,
            "pooling": config.pooling,
            "head": config.head,
        },
        quality=quality_facts(extractor) if trainer.loss.uses_quality or extractor.quality_score == "learned" else None,
        missing=data.missing,
        base_model=None if local else options.get("encoder"),
        local_weights=options["encoder"].removeprefix(LOCAL) if local else None,
    )


def quality_facts(extractor: QLungFeatureExtractor) -> dict[str, Any]:
    """Name the quality score, and how the published one was normalised."""
    if extractor.quality_score == "learned":
        return {"score": "learned"}
    return {"normalization": extractor.quality_normalization, **(extractor.quality_statistics or {})}


def draw_run(run_dir: Path, description: RunDescription, train: Dataset, trainer: QLungTrainer) -> dict[str, str]:
    """Draw a run's confusions, abstention, training curves and quality; gives the figures' names by their captions."""
    figures, classes, trained_on = {}, description.task.classes, " and ".join(description.datasets)
    predictions = read_predictions(run_dir / PREDICTIONS)
    for name, scores in description.metrics.items():
        file = f"confusion_matrix_{name.replace(':', '_')}.png"
        figures[f"Confusion matrix, {name}"] = file
        of = "" if ":" in name else f"{trained_on if name == 'validation' else description.datasets[0]} "
        title = f"{description.recipe}, {of}{name}"
        plot_confusion_matrix(scores["confusion_matrix"], classes, run_dir / file, title)
        answers = predictions[predictions["split"].eq(name) & predictions["label"].notna()]
        if len(answers):
            figures[f"What abstaining buys, {name}"] = file = file.replace("confusion_matrix", "risk_coverage")
            plot_risk_coverage(selective_scores(answers), run_dir / file, title)
    history = trainer.state.log_history
    if any("loss" in entry or "eval_loss" in entry for entry in history):
        figures["Training curves"] = "training_curves.png"
        plot_training_curves(history, run_dir / "training_curves.png", description.task)
    if description.quality is not None:
        figures["Quality score of the training cycles"] = "quality.png"
        quality, title = score_quality(trainer.feature_extractor, train), f"{trained_on}, training cycles"
        plot_quality_histogram(quality, train["label"][:], classes, run_dir / "quality.png", title)
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
    planned = parts(data, method, training)
    repositories = open_repositories(training, [run_dir for *_, run_dir in planned])
    runs = [run(*at_fold(argv, fold), seed, run_dir) for fold, seed, run_dir in planned]
    if training.process_index == 0:
        summary = summarize_seeds(runs, TASKS[data.task])
        output_dir = Path(str(training.output_dir))
        if method.seeds or method.folds:
            write_metrics(output_dir / "summary.json", summary)
        print(f"\n{recipe.name}, {len(runs)} run{'s' if len(runs) > 1 else ''}, in {output_dir}\n")
        print(format_table(summary, TASKS[data.task]))
        upload(repositories, f"Train {recipe.name}")


def open_repositories(training: QLungTrainingArguments, folders: list[Path]) -> dict[Path, Repository]:
    """Make each run's repository on the Hub, if it is to have one, before training: a wrong name or token shows now."""
    if not training.push_to_hub or training.process_index:
        return {}
    options = {"token": training.hub_token, "private": training.hub_private_repo, "revision": training.hub_revision}
    output_dir = Path(str(training.output_dir))
    try:
        names = {folder: repository_name(str(training.hub_model_id), folder, output_dir) for folder in folders}
        return {folder: Repository(name, "model", **options).create() for folder, name in names.items()}
    except HubError as error:
        raise SystemExit(f"train.py: error: {error}") from error


def upload(repositories: dict[Path, Repository], message: str) -> None:
    """Send what is published of each run to its repository, in one commit."""
    for folder, repository in repositories.items():
        try:
            print(f"{folder} is at {repository.push(run_files(folder, repository.repo_id), message)}")
        except (FileNotFoundError, HubError) as error:
            raise SystemExit(f"train.py: error: {error}. Nothing is lost: {folder} holds the whole run.") from error


def evaluate(argv: list[str]) -> None:
    """Score a checkpoint on any dataset, and print its scores."""
    args = parse_evaluation(argv)
    name = "-".join(Path(args.evaluate).resolve().parts[-2:])
    output_dir = Path(args.output_dir or f"runs/evaluation-{name}")
    training = QLungTrainingArguments(
        output_dir=str(output_dir),
        per_device_eval_batch_size=args.per_device_eval_batch_size,
        use_cpu=args.use_cpu,
        ddp_backend=args.ddp_backend,
        label_names=["labels"],
        eval_strategy="no",
        save_strategy="no",
    )
    quiet_unless_first(training.process_index)
    try:
        if args.evaluate.startswith(("/", ".", "~")) and not Path(args.evaluate).is_dir():
            raise OSError(f"{args.evaluate} is neither a folder nor on the Hub")
        model = QLungForAudioClassification.from_pretrained(args.evaluate)
        extractor = QLungFeatureExtractor.from_pretrained(args.evaluate)
        prepare_as_trained(args)
        task = task_of(model.config.id2label.values())
        trainer = QLungTrainer(model, training, loss=CrossEntropyLoss(), feature_extractor=extractor, task=task)
        with training.main_process_first(desc="reading the data"):
            parts = {part: load_part(args, part, extractor.sampling_rate, task)[0] for part in args.on}
    except (OSError, ValueError) as error:
        raise SystemExit(f"train.py: error: {as_options(error)}") from error
    rows = [row for part, cycles in parts.items() for row in predict(trainer, part, cycles)]
    if trainer.is_world_process_zero():
        output_dir.mkdir(parents=True, exist_ok=True)
        metrics = score(output_dir, rows, task)
        write_metrics(output_dir / METRICS, metrics)
        for part, scores in metrics.items():
            figure = output_dir / f"confusion_matrix_{part.replace(':', '_')}.png"
            plot_confusion_matrix(scores["confusion_matrix"], task.classes, figure, f"{name} on {part}")
        draw_model(output_dir, name, model, extractor, parts, task)
        print(f"\n{args.evaluate}, in {output_dir}\n")
        print(format_scores(metrics, task))


def prepare_as_trained(args: EvaluationArguments) -> None:
    """Take from the run's own recipe, where it lies beside the checkpoint, what a checkpoint does not hold."""
    path = cached_file(args.evaluate, "recipe.yaml", _raise_exceptions_for_missing_entries=False)
    if path is not None:
        options = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        args.as_published = options.get("as_published")
        args.continuous_as_wheeze = options.get("continuous_as_wheeze", False)
        args.windows, args.level = options.get("windows"), options.get("level")


def benchmark(argv: list[str]) -> None:
    """Make the runs of a grid that have not ended, and write the table of all."""
    if os.environ.get("RANK", "0") != "0":  # the grid starts its own processes, one per GPU
        return
    for name in launcher_variables(os.environ):  # otherwise this process would wait for those that have left
        del os.environ[name]
    args, shared = parse_benchmark(argv)
    output_dir, rows = Path(args.output_dir), expand_rows(args.benchmark, args.baseline)
    runs, pending = [], []
    folds: Sequence[int | None] = args.folds or [None]
    for row, fold, seed in itertools.product(rows, folds, args.seeds):
        folder = output_dir.joinpath(row.name, *([] if fold is None else [f"fold_{fold}"]), f"seed_{seed}")
        words = [*row.arguments, *shared, f"--seed={seed}", f"--inspect_cycles={args.inspect_cycles}"]
        words += [] if fold is None else [f"--fold={fold}"]
        recipe, arguments = parse(words)  # a row that cannot run is refused before any runs
        data_dir = arguments[0].data_dir
        if data_dir is not None and not Path(data_dir).is_dir():
            raise SystemExit(f"--data_dir {data_dir}: there is no such folder.")
        if arguments[3].push_to_hub:
            raise SystemExit(
                "--benchmark uploads nothing: choose a run, and give its command and --output_dir with --push_to_hub."
            )
        check_same_run(folder, publishable(recipe.options, seed))
        runs.append(GridRun(str(folder.relative_to(output_dir)), folder, [*words, f"--output_dir={folder}"]))
        pending += [] if ended(folder, args.inspect_cycles) else [runs[-1]]
    logger.warning("%d runs: %d have ended, %d to do.", len(runs), len(runs) - len(pending), len(pending))
    failed = run_grid(__file__, pending, use_gpus=torch.cuda.is_available() and not arguments[3].use_cpu)
    if not any((run.folder / METRICS).is_file() for run in runs):
        raise SystemExit(f"All {len(runs)} runs failed.")
    references = {row.name: row.reference for row in rows}
    print(write_benchmark(output_dir, references, complete_options, args.seeds, args.folds or ()))
    if failed:
        raise SystemExit(f"{len(failed)} of {len(runs)} runs failed; the same command tries them again.")


def at_fold(argv: list[str], fold: int | None) -> tuple[Recipe, Arguments]:
    """Parse once more, for each run changes its arguments; with the fold that it is about."""
    recipe, arguments = parse(argv)
    if fold is not None:
        arguments[0].fold = recipe.options["fold"] = recipe.changes["fold"] = fold
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
    modes.get(argv[0].split("=")[0] if argv else "", train)(argv)


if __name__ == "__main__":
    main(sys.argv[1:])
    leave_process_group()

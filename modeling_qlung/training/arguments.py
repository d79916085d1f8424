"""Every option of `train.py`, in the groups that `--help` shows; a recipe sets them, the command line overrides."""

import dataclasses
import inspect
import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Literal, cast

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from ..evaluation.tasks import FOUR_CLASS, TASKS
from ..feature_extraction_qlung import QLungFeatureExtractor
from .as_published import FAULTS
from .losses import LOSSES
from .objectives import OBJECTIVES
from .sharpness import SharpnessAwareStep

RECIPES = Path(__file__).parent / "recipes"
OBJECTIVE_OPTIONS = (
    "mix_beta",
    "contrast_weight",
    "contrast_temperature",
    "contrast_negatives",
    "target_projector",
    "target_gradient",
)
LOSS_OPTIONS = (
    "margin_weight",
    "margin_scale",
    "quality_share",
    "quality_margin",
    "target_margin",
    "fixed_margin",
    "margin",
    "label_smoothing",
)


def _option(default: Any, text: str, **kwargs) -> Any:
    return field(default=default, metadata={"help": text, **kwargs})


@dataclass
class DataArguments:
    """What is trained and tested on, and how a cycle becomes the model's input."""

    _argument_group_name = "data"

    dataset: str = _option("icbhi", "icbhi, sprsound or simulated.")
    task: str = _option("4-class", f"What is asked: {', '.join(TASKS)}; 1-1 to 2-2 are SPRSound's challenge tasks.")
    fold: int | None = _option(
        None, "ICBHI: test on this one of RespireNet's five patient-wise folds, 0 to 4, instead of the official split."
    )
    data_dir: str | None = _option(
        None, "Folder that holds ICBHI_final_database, BioCAS2022, or both; downloaded if not given."
    )
    train_parquet: str | None = _option(
        None,
        "Train on Parquet files instead, read as they come, constant in memory: a folder or a Hub repository with a "
        "split `train`, as `hf_datasets.publish` writes it. Its split `validation`, if any, chooses the epoch; tests "
        "are those of --dataset.",
    )
    cache_dir: str | None = _option(None, "Folder of the built datasets; by default the Hugging Face cache.")
    allow_missing_audio: bool = _option(False, "Train on less if recordings are missing, instead of an error.")
    continuous_as_wheeze: bool = _option(False, "SPRSound: count rhonchi and stridor as wheeze, not as unlabelled.")
    simulated_patients: int = _option(20, "Simulated: number of training patients, each with 20 cycles.")
    validation_fraction: float | None = _option(
        None, "Share of training patients kept for validation. 0.2 where they choose the epoch, otherwise none."
    )
    also_train: list[str] | None = field(
        default=None,
        metadata={
            "help": "Train on more than the dataset's training part, each as DATASET:SPLIT, such as icbhi:train."
        },
    )
    windows: float | None = _option(
        None,
        "Train and test on windows of so many seconds, cut out of whole recordings half a window apart, instead of on "
        "cycles that somebody cut out: as a model meets them that listens to whole recordings.",
    )
    level: float | None = _option(
        None,
        "RMS amplitude that a recording is brought to before windows are cut out of it, so that how loud it was "
        "recorded does not count.",
    )
    also_test: list[str] | None = field(
        default=None,
        metadata={"help": "Score the trained model elsewhere too, each as DATASET:SPLIT, such as sprsound:test_inter."},
    )
    as_published: list[str] | None = field(
        default=None,
        metadata={"help": f"Faults of the published Patch-Mix code to reproduce, by name: {', '.join(FAULTS)}."},
    )
    front_end: Literal["kaldi", "clap"] = _option(
        "kaldi", "Filterbank: Kaldi's at 16 kHz for an AST, CLAP's own at 48 kHz for its audio tower."
    )
    duration: float = _option(8.0, "Length of the model's input, in seconds; shorter cycles are padded.")
    durations: list[float] | None = field(
        default=None,
        metadata={
            "help": "Several lengths instead, in seconds, ascending: a cycle is padded to the smallest that holds it, "
            "and a training batch has cycles of one length. For an AST."
        },
    )
    num_frames: int | None = _option(None, "Length in frames; those beyond the duration are zero. From the duration.")
    padding: Literal["cyclic", "zero", "zero_centered"] = _option("cyclic", "How shorter cycles are padded.")
    fade_in: float = _option(0.0, "Linear fade at a clip's start, in seconds.")
    fade_out: float = _option(0.0625, "Linear fade at a padded clip's end, in seconds.")
    normalization: Literal["audioset", "train"] = _option(
        "audioset",
        "Mean and deviation of the features: the front end's (AudioSet's for an AST, none for CLAP), or fitted on the "
        "training set.",
    )
    quality: Literal["entropy_rms", "learned"] = _option(
        "entropy_rms", "Quality score of the margin: QLung's published one, or the one learned from clinicians' labels."
    )
    quality_normalization: Literal["raw", "minmax", "percentile", "zscore"] = _option(
        "percentile", "entropy_rms: how entropy and energy are normalised, fitted on the training set."
    )
    quality_control: Literal["measured", "constant", "shuffled"] = _option(
        "measured", "Replace the training cycles' quality: by its mean, or by that of other cycles at random."
    )
    degraded_copies: float = _option(
        0.0, "Share of the training cycles of which a copy, spoiled by noise, clipping or dropouts, is trained on too."
    )


@dataclass
class ModelArguments:
    """The encoder, pretrained or from scratch, and the head."""

    _argument_group_name = "model"

    encoder: str | None = _option(
        None,
        "Pretrained AST or CLAP: a Hub id or a folder. Without one, an AST from scratch of the sizes below.",
    )
    hidden_size: int = _option(768, "From scratch: width.")
    num_hidden_layers: int = _option(12, "From scratch: number of layers.")
    num_attention_heads: int = _option(12, "From scratch: number of attention heads.")
    intermediate_size: int = _option(3072, "From scratch: width of the MLPs.")
    initializer_range: float = _option(
        0.02,
        "From scratch: deviation of the initial weights. Narrow encoders need more than the 0.02 of a width of 768.",
    )
    patch_size: int = _option(16, "From scratch: side of a patch, in mel bands and frames.")
    patch_stride: int = _option(10, "From scratch: step between patches in both directions.")
    hidden_dropout: float = _option(0.0, "From scratch: dropout within the layers.")
    attention: Literal["sdpa", "eager"] | None = _option(
        None, "Attention kernel of the training; by default fused where there is one. Eager is faster in bf16 on a CPU."
    )
    pooling: Literal["cls_dist", "mean"] | None = _option(
        None, "Class and distillation tokens (AST's default), or the mean of all tokens (CLAP's)."
    )
    head: Literal["angular", "linear"] = _option("angular", "Cosine or affine logits.")
    scale: float = _option(37.0, "s_a: factor of the cosines in the angular head, and in the loss.")
    dropout: float = _option(0.0, "Dropout on the embedding, before the head.")


@dataclass
class MethodArguments:
    """Loss, sharpness-aware steps, sampling, augmentation, averaging."""

    _argument_group_name = "method"

    loss: str = _option("qlung", "qlung, cross_entropy, arcface, cosface, adaface, ldam or logit_adjusted.")
    margin_weight: float | None = _option(None, "qlung: λ, weight of the margin term (0.4).")
    margin_scale: float | None = _option(None, "qlung: s_d, scale of the margin term (15).")
    quality_share: float | None = _option(None, "qlung: γ, share of the quality margin against the class margin (0.5).")
    quality_margin: float | None = _option(None, "qlung: κ, margin at quality 1, in radians (0.5).")
    target_margin: float | None = _option(None, "qlung: class margin under a uniform prior, in radians (0.2).")
    fixed_margin: float | None = _option(None, "qlung: one constant margin instead, in radians.")
    margin: float | None = _option(None, "arcface, cosface, adaface: the margin.")
    label_smoothing: float | None = _option(None, "Smoothing of the plain cross-entropy's targets (0).")
    class_weight_power: float = _option(0.0, "Weight classes by 1 / n^power in the plain cross-entropy.")
    objective: str = _option(
        "supervised",
        "What the loss is asked of: supervised, patch_mix (mixed patches), patch_mix_contrast, or device_contrast "
        "(SG-SCL, stethoscopes as classes of a contrast).",
    )
    mix_beta: float | None = _option(None, "patch_mix*: the share kept is drawn from Beta(mix_beta, mix_beta) (1).")
    contrast_weight: float | None = _option(None, "*_contrast: weight of the contrast (1).")
    contrast_temperature: float | None = _option(None, "*_contrast: its temperature (0.06).")
    contrast_negatives: Literal["all", "other_class"] | None = _option(
        None, "patch_mix_contrast: contrasted with all items, or with those of other classes (all)."
    )
    target_projector: bool | None = _option(
        None, "patch_mix_contrast: project the unmixed view as well, not the mixed one alone (false)."
    )
    target_gradient: bool | None = _option(
        None, "*_contrast: let the gradient through the view that is contrasted with (false)."
    )
    margin_warmup: float = _option(0.0, "Share of training over which margins grow from 0.")
    sharpness: Literal["none", "sam", "asam", "gsam", "looksam"] = _option("none", "Sharpness-aware minimisation.")
    rho: float = _option(0.05, "Its radius.")
    sharpness_alpha: float = _option(0.4, "gsam, looksam: weight of the orthogonal part.")
    sharpness_interval: int = _option(5, "looksam: steps from one ascent to the next.")
    sampling_power: float = _option(0.0, "Draw cycles with probability 1 / n^power of their class; 0 shuffles.")
    ema_decay: float | None = _option(None, "Average the weights with this decay, and evaluate the average.")
    freq_masks: int = _option(2, "SpecAugment: frequency masks per cycle.")
    freq_width: int = _option(48, "SpecAugment: largest width of a frequency mask, in mel bands.")
    time_masks: int = _option(2, "SpecAugment: time masks per cycle.")
    time_width: int = _option(160, "SpecAugment: largest width of a time mask, in frames of the longest input.")
    waveform_augment: bool = _option(False, "Gain U(0.9, 1.1) and white noise of 1e-4, each half of the time.")
    select_on: str = _option(
        "validation",
        "Which epoch is kept: best score on `validation` patients, the `last` one, or best on the `test` set (a "
        "test split by its name, if there are several), the published habit, which overstates every score.",
    )
    seeds: list[int] | None = field(
        default=None, metadata={"help": "Train once per seed and report mean ± sd. Default: --seed alone."}
    )
    folds: list[int] | None = field(
        default=None, metadata={"help": "Train once per fold (and seed) and report mean ± sd. Default: --fold alone."}
    )
    inspect_cycles: int = _option(
        0,
        "After training, draw the model's embeddings and where it attends, and measure its flatness on this many "
        "training cycles; 0 for neither.",
    )


@dataclass
class QLungTrainingArguments(TrainingArguments):
    """Transformers' own options, with QLung's defaults."""

    _argument_group_name = "training (Transformers' TrainingArguments)"

    output_dir: str | None = _option(None, "Where the run is written. Default: runs/RECIPE.")
    learning_rate: float = _option(5e-5, "Peak learning rate.")
    num_train_epochs: float = _option(50.0, "Number of epochs.")
    per_device_train_batch_size: int = _option(8, "Cycles per device and micro-batch.")
    per_device_eval_batch_size: int = _option(32, "Cycles per device and batch in evaluation.")
    weight_decay: float = _option(1e-6, "Weight decay.")
    lr_scheduler_type: str = _option("cosine", "Shape of the learning rate over training.")
    eval_strategy: str = _option("epoch", "When the selection set is scored; 'no' when nothing is selected.")
    save_strategy: str = _option("epoch", "When a checkpoint is written.")
    save_total_limit: int | None = _option(2, "Checkpoints kept.")
    logging_strategy: str = _option("epoch", "When the training loss is logged.")
    report_to: str = _option("none", "Where metrics are logged beside the run's own files.")
    remove_unused_columns: bool = _option(False, "Kept off: the collator reads more columns than the model names.")
    logging_nan_inf_filter: bool = _option(False, "Kept off: it would hide a diverged loss.")
    ddp_find_unused_parameters: bool | None = _option(False, "Every parameter is used in every step.")
    dataloader_num_workers: int | None = _option(
        None, "Processes that read and pad batches, for each device: by default 2 beside a GPU, none on a CPU."
    )

    def __post_init__(self):
        if not torch.accelerator.is_available():
            self.use_cpu = True  # otherwise Transformers takes bf16 for a request for a GPU
        if self.dataloader_num_workers is None:
            self.dataloader_num_workers = 0 if self.use_cpu else 2
        super().__post_init__()
        # A batch goes to a GPU while that still works on the one before, which is safe from pinned memory alone.
        self.accelerator_config.non_blocking = self.dataloader_pin_memory and self.device.type == "cuda"


@dataclass
class EvaluationArguments:
    """A checkpoint, and what it is tried on."""

    evaluate: str = field(metadata={"help": "Checkpoint: a folder or a Hub id."})
    on: list[str] = field(metadata={"help": "What it is tried on, each as DATASET:SPLIT, such as sprsound:test_inter."})
    data_dir: str | None = _option(
        None, "Folder that holds ICBHI_final_database, BioCAS2022, or both; downloaded if not given."
    )
    cache_dir: str | None = _option(None, "Folder of the built datasets; by default the Hugging Face cache.")
    allow_missing_audio: bool = _option(False, "Score less if recordings are missing, instead of an error.")
    as_published: list[str] | None = field(
        default=None,
        metadata={"help": "As in training; taken from the run's own recipe where it is beside the checkpoint."},
    )
    continuous_as_wheeze: bool = _option(False, "Likewise.")
    windows: float | None = _option(None, "Likewise.")
    level: float | None = _option(None, "Likewise.")
    per_device_eval_batch_size: int = _option(32, "Cycles per device and batch.")
    output_dir: str | None = _option(None, "Where scores are written. Default: runs/evaluation-CHECKPOINT.")
    use_cpu: bool = _option(False, "Leave GPUs alone.")
    ddp_backend: str | None = _option(None, "For several processes; gloo on CPUs.")


@dataclass
class BenchmarkArguments:
    """A grid of runs; all other options go to each of them."""

    benchmark: list[str] = field(
        metadata={"help": "Rows of the table: recipes, RECIPE,option=value,..., or grids such as `study`."}
    )
    seeds: list[int] = field(metadata={"help": "Each row is trained once per seed."})
    folds: list[int] | None = field(default=None, metadata={"help": "And once per fold of RespireNet's, 0 to 4."})
    output_dir: str = _option("runs/benchmark", "Where runs, table and figures are written.")
    baseline: str | None = _option(None, "Row that the others are compared with. Default: the first.")
    inspect_cycles: int = _option(
        128, "Training cycles on which each model's flatness is measured; 0 for neither flatness nor its figures."
    )


ARGUMENTS = (DataArguments, ModelArguments, MethodArguments, QLungTrainingArguments)
Arguments = tuple[DataArguments, ModelArguments, MethodArguments, QLungTrainingArguments]


@dataclass
class Recipe:
    """A named set of options and what it stands for.

    Args:
        name: of the recipe's file.
        about: what the recipe says of itself: `description`, `source`, `published` scores, `unknown`.
        options: every option that differs from its default.
        changes: options that the command line set to something else than the recipe.
    """

    name: str
    about: dict[str, Any]
    options: dict[str, Any]
    changes: dict[str, Any] = field(default_factory=dict)


def recipe_names() -> list[str]:
    """Give the names of the recipes that come with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def read_recipe(name: str) -> Recipe:
    """Read a recipe by its name, or a YAML file of options by its path.

    Raises:
        SystemExit: with one sentence, if there is none, or it holds an unknown option.
    """
    path = RECIPES / f"{name}.yaml"
    if not path.is_file():
        path = Path(name)
    if not path.is_file():
        raise SystemExit(
            f"There is no recipe {name!r}. Choose one of {', '.join(recipe_names())}, or give a YAML file."
        )
    options = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    about = options.pop("about", {})
    if "base" in options:  # what this recipe does not say is as in another one
        options = {**read_recipe(options.pop("base")).options, **options}
    known = {option.name for group in ARGUMENTS for option in dataclasses.fields(group)}
    if unknown := sorted(set(options) - known):
        raise SystemExit(f"{path}: unknown options {', '.join(unknown)}. `train.py --help` lists them all.")
    return Recipe(about.pop("recipe", path.stem), about, options)


def parse(argv: list[str]) -> tuple[Recipe, Arguments]:
    """Parse `[RECIPE] [--option value ...]`; options on the command line override the recipe's.

    Raises:
        SystemExit: after `--help`, and with a message for an unknown recipe, option or value, or options that do not go
            together.
    """
    parser = HfArgumentParser(
        ARGUMENTS,
        usage="train.py [RECIPE] [--option value ...]\n       train.py --evaluate CHECKPOINT --on DATASET:SPLIT ... "
        "[--option value ...]\n       train.py --benchmark ROW ... --seeds N ... [--option value ...]",
        description=f"Train and evaluate. RECIPE: {', '.join(recipe_names())} (default: quickstart), or a YAML file.",
        allow_abbrev=False,
    )
    named = bool(argv) and not argv[0].startswith("-")
    recipe = read_recipe(argv[0] if named else "quickstart")
    _check_numbers(parser, recipe)
    typed = argv[1:] if named else argv
    *defaults, _ = parser.parse_args_into_dataclasses([], return_remaining_strings=True, look_for_args_file=False)
    folder = recipe.name if recipe.name in recipe_names() and not Path(argv[0] if named else "").is_file() else "again"
    words = [f"--output_dir=runs/{folder}", *_as_words(recipe.options), *typed]
    *groups, rest = parser.parse_args_into_dataclasses(words, return_remaining_strings=True, look_for_args_file=False)
    if rest:
        parser.error(f"unknown arguments {' '.join(rest)}; `train.py --help` lists them all")
    arguments = cast(Arguments, tuple(groups))
    given = {word[2:].split("=")[0].replace("-", "_") for word in typed if word.startswith("--")}
    try:
        _settle_task(arguments)
        _settle_durations(arguments, given)
        _settle_stream(arguments)
        _settle_loss(arguments, given)
        _settle_objective(arguments, given)
        _settle_sharpness(arguments, given)
        _settle_hub(arguments, given)
        before, after = _values(defaults), _values(groups)
        recipe.changes = {name: after[name] for name in sorted(given) if after.get(name) != recipe.options.get(name)}
        recipe.options = {name: value for name, value in after.items() if value != before[name]}
        if arguments[0].train_parquet is not None:  # the order of its rows depends on the number of their readers
            recipe.options["dataloader_num_workers"] = after["dataloader_num_workers"]
        _settle_selection(arguments)
    except ValueError as error:
        parser.error(str(error))
    return recipe, arguments


def parse_evaluation(argv: list[str]) -> EvaluationArguments:
    """Parse `--evaluate CHECKPOINT --on DATASET:SPLIT ... [--option value ...]`.

    Raises:
        SystemExit: after `--help`, and with a message for unknown options.
    """
    parser = HfArgumentParser(
        EvaluationArguments,
        usage="train.py --evaluate CHECKPOINT --on DATASET:SPLIT ... [--option value ...]",
        description="Score a checkpoint.",
        allow_abbrev=False,
    )
    arguments, rest = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True, look_for_args_file=False)
    if rest:
        parser.error(f"unknown arguments {' '.join(rest)}; `train.py --evaluate --help` lists them all")
    try:
        _check_parts("on", arguments.on)
    except ValueError as error:
        parser.error(str(error))
    return arguments


def parse_benchmark(argv: list[str]) -> tuple[BenchmarkArguments, list[str]]:
    """Parse `--benchmark ROW ... --seeds N ...`; gives the rest of the words too, which are for every run.

    Raises:
        SystemExit: after `--help`, and with a message for what is missing.
    """
    parser = HfArgumentParser(
        BenchmarkArguments,
        usage="train.py --benchmark ROW ... --seeds N ... [--option value ...]",
        description="Run a grid, or what is left of it, and write the table.",
        allow_abbrev=False,
    )
    arguments, rest = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True, look_for_args_file=False)
    return arguments, rest


def complete_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Give every option's value: those of a recipe, the others' defaults, and the loss's own where it has them."""
    defaults = {f.name: f.default for group in ARGUMENTS for f in dataclasses.fields(group) if f.init}
    complete = {**{n: None if v is dataclasses.MISSING else v for n, v in defaults.items()}, **options}
    for name, parameter in inspect.signature(LOSSES[complete["loss"]]).parameters.items():
        if name in complete and complete[name] is None and parameter.default is not inspect.Parameter.empty:
            complete[name] = parameter.default
    return complete


def _as_words(options: dict[str, Any]) -> list[str]:
    """A recipe's options as a command line, so that their types and choices are checked as there."""
    words: list[str] = []
    for name, value in options.items():
        if isinstance(value, list):
            words += [f"--{name}", *map(str, value)]
        elif value is not None:
            words.append(f"--{name}={json.dumps(value) if isinstance(value, (bool, dict)) else value}")
    return words


def _values(groups: Iterable[Any]) -> dict[str, Any]:
    """Every option's value, enumerations by theirs."""
    values = {f.name: getattr(group, f.name) for group in groups for f in dataclasses.fields(group) if f.init}
    return {name: value.value if isinstance(value, Enum) else value for name, value in values.items()}


def _check_numbers(parser: HfArgumentParser, recipe: Recipe) -> None:
    """YAML reads 5e-5 as text; argparse would convert it quietly, and other readers of the recipe would not."""
    types = {action.dest: action.type for action in parser._actions}
    for name, value in recipe.options.items():
        if isinstance(value, str) and types[name] in (int, float):
            raise SystemExit(
                f"Recipe {recipe.name}: {name} is the text {value!r}. YAML needs a point in such numbers: 5.0e-5."
            )


def _settle_task(arguments: Arguments) -> None:
    """Check that there is such a task, and such folds."""
    data, _, method, _ = arguments
    if data.task not in TASKS:
        raise ValueError(f"there is no task {data.task!r}: choose one of {', '.join(TASKS)}")
    _check_parts("also_train", data.also_train or ())
    _check_parts("also_test", data.also_test or ())
    for part in data.also_train or ():
        if part.partition(":")[0] == data.dataset or part in (data.also_test or ()):
            raise ValueError(f"--also_train {part} is of the dataset that is trained on, or tested on: leave it out")
    if "position_grid" in (data.as_published or ()) and (arguments[1].encoder is None or data.front_end != "kaldi"):
        raise ValueError(
            "--as_published position_grid is about the positions of a pretrained AST: give one as --encoder"
        )
    if "spec_augment" in (data.as_published or ()) and not method.freq_masks + method.time_masks:
        raise ValueError("--as_published spec_augment changes nothing without masks: leave it out")
    if not 0 <= data.degraded_copies <= 1:
        raise ValueError(f"--degraded_copies is {data.degraded_copies}; it must be in [0, 1]")
    if data.degraded_copies and data.front_end != "kaldi":
        raise ValueError("--degraded_copies are made at 16 kHz, for Kaldi's front end alone")
    for fault in data.as_published or ():
        if fault not in FAULTS:
            raise ValueError(f"--as_published {fault}: the faults known are {', '.join(FAULTS)}")
        if fault == "preparation" and (data.front_end != "kaldi" or TASKS[data.task].config != "cycles"):
            raise ValueError("--as_published preparation cuts recordings into cycles, for Kaldi's front end alone")
    if method.folds is not None and data.fold is not None:
        raise ValueError("--fold names one fold and --folds several: give one of the two")
    for fold in [*(method.folds or ()), *([] if data.fold is None else [data.fold])]:
        if data.dataset != "icbhi" or not 0 <= fold < 5 or data.also_train or data.windows:
            raise ValueError(f"--fold {fold}: there are the folds 0 to 4, of icbhi, its cycles alone")
    if data.windows is not None and (data.windows <= 0 or data.task != FOUR_CLASS.name or data.as_published):
        raise ValueError(
            f"--windows {data.windows}: give a positive length in seconds, for the task 4-class and without "
            "--as_published"
        )
    if data.level is not None and (data.level <= 0 or data.windows is None):
        raise ValueError(f"--level {data.level}: give a positive RMS amplitude, and --windows with it")


def _settle_durations(arguments: Arguments, typed: set[str]) -> None:
    """Take the duration from several; the feature extractor checks them too, after the data has been read."""
    data = arguments[0]
    if data.durations is None:
        return
    if "duration" in typed and data.duration != data.durations[-1]:
        raise ValueError(f"--duration {data.duration} goes with no --durations but such that end with it")
    if "position_grid" in (data.as_published or ()):
        raise ValueError("--as_published position_grid is known for one length alone: leave --durations out")
    data.duration = data.durations[-1]
    QLungFeatureExtractor(
        front_end=data.front_end,
        duration=data.duration,
        durations=data.durations,
        num_frames=data.num_frames,
        fade_in=data.fade_in,
        fade_out=data.fade_out,
    )


def _settle_stream(arguments: Arguments) -> None:
    """Refuse what needs every training cycle at hand before the first step, where they are read as they come."""
    data, _, method, _ = arguments
    if data.train_parquet is None:
        return
    needs_all = {
        "--sampling_power": (method.sampling_power, 0.0, "draws from all of them"),
        "--quality_control": (data.quality_control, "measured", "replaces the quality of all of them"),
        "--degraded_copies": (data.degraded_copies, 0.0, "chooses from all of them"),
        "--also_train": (data.also_train, None, "adds rows to them"),
        "--windows": (data.windows, None, "cuts recordings"),
        "--durations": (data.durations, None, "sorts all of them by length"),
        "--validation_fraction": (data.validation_fraction or None, None, "chooses from all patients"),
        "--fold": (data.fold if method.folds is None else method.folds, None, "chooses from all patients"),
    }
    for option, (value, default, what) in needs_all.items():
        if value != default:
            told = " ".join(map(str, value)) if isinstance(value, list) else value
            remedy = "leave it out" if default is None else f"set it to {default}"
            raise ValueError(f"--train_parquet reads cycles as they come, and {option} {told} {what}: {remedy}")
    if "preparation" in (data.as_published or ()):
        raise ValueError("--as_published preparation cuts recordings, and --train_parquet holds cycles: leave one out")


def _check_parts(option: str, parts: Iterable[str]) -> None:
    for part in parts:
        if not all(part.partition(":")):
            raise ValueError(f"--{option} {part}: name dataset and split, such as sprsound:test_inter")


def _settle_sharpness(arguments: Arguments, typed: set[str]) -> None:
    """Check the settings of sharpness-aware steps and averaging before any data is read."""
    method = arguments[2]
    if method.sharpness != "none":
        SharpnessAwareStep(method.sharpness, method.rho, method.sharpness_alpha, method.sharpness_interval)
    elif unused := sorted(typed & {"rho", "sharpness_alpha", "sharpness_interval"}):
        raise ValueError(f"--{unused[0]} changes nothing without --sharpness")
    if method.ema_decay is not None and not 0 <= method.ema_decay < 1:
        raise ValueError(f"--ema_decay is {method.ema_decay}; it must be in [0, 1)")


def _settle_hub(arguments: Arguments, typed: set[str]) -> None:
    """Check what is said of the upload, which comes when a run has ended, in one commit."""
    training = arguments[3]
    if late := sorted(typed & {"hub_strategy", "hub_always_push"}):
        raise ValueError(f"--{late[0]} changes nothing: a run is uploaded once, when it has ended")
    if training.push_to_hub and not training.hub_model_id:
        raise ValueError("--push_to_hub needs the repository's name: give --hub_model_id USER/NAME")
    if not training.push_to_hub and (unused := sorted(typed & {"hub_model_id", "hub_revision"})):
        raise ValueError(f"--{unused[0]} changes nothing without --push_to_hub")


def _settle_loss(arguments: Arguments, typed: set[str]) -> None:
    """Check the loss and the options that go with it."""
    _, model, method, _ = arguments
    known = _settle_options(method, "loss", LOSSES, LOSS_OPTIONS, typed)
    if method.class_weight_power and "class_weights" not in known:
        if "class_weight_power" in typed:
            raise ValueError(f"the loss {method.loss} takes no class weights: leave --class_weight_power out")
        method.class_weight_power = 0.0
    if model.head == "linear" and method.loss in ("arcface", "cosface", "adaface", "ldam"):
        raise ValueError(f"the loss {method.loss} trains cosines, a linear head would infer without: --head angular")


def _settle_objective(arguments: Arguments, typed: set[str]) -> None:
    """Check the objective and the options that go with it."""
    _settle_options(arguments[2], "objective", OBJECTIVES, OBJECTIVE_OPTIONS, typed)


def _settle_options(
    method: MethodArguments, kind: str, registry: Mapping[str, Any], options: Iterable[str], typed: set[str]
) -> Collection[str]:
    """Leave out what a recipe sets for another loss or objective than the one chosen; refuse it where it was typed.

    Gives the names that the chosen one takes.
    """
    chosen = getattr(method, kind)
    if chosen not in registry:
        raise ValueError(f"there is no {kind} {chosen!r}: choose one of {', '.join(registry)}")
    known = inspect.signature(registry[chosen]).parameters
    for name in options:
        if getattr(method, name) is not None and name not in known:
            if name in typed:
                raise ValueError(f"--{name} is no option of the {kind} {chosen}")
            setattr(method, name, None)
    return known


def _settle_selection(arguments: Arguments) -> None:
    """Make validation, evaluation and saving agree with what chooses the epoch."""
    data, _, method, training = arguments
    for name, numbers in (("seeds", method.seeds), ("folds", method.folds)):
        if numbers is not None and len(set(numbers)) < len(numbers):
            raise ValueError(f"--{name} {' '.join(map(str, numbers))} names a {name[:-1]} twice")
    for option, folder in (("encoder", arguments[1].encoder), ("train_parquet", data.train_parquet)):
        if (folder or "").startswith("local:"):
            raise ValueError(f"this run took its --{option} from a folder, {folder}: give it as --{option}")
    if data.validation_fraction is None:
        own = data.train_parquet is None  # a streamed training set brings its validation split along
        data.validation_fraction = 0.2 if method.select_on == "validation" and own else 0.0
    if method.select_on == "validation" and data.validation_fraction == 0 and data.train_parquet is None:
        raise ValueError("--select_on validation needs validation patients: set --validation_fraction above 0")
    if not 0 <= data.validation_fraction < 1:
        raise ValueError(f"--validation_fraction is {data.validation_fraction}; it must be in [0, 1)")
    if training.save_only_model:
        raise ValueError("--save_only_model leaves out what a killed run needs to continue")
    if method.select_on == "last":
        if data.validation_fraction == 0:
            training.eval_strategy, training.do_eval = IntervalStrategy.NO, False
        return
    steps = training.eval_strategy == IntervalStrategy.STEPS and training.save_steps % training.eval_steps
    if training.eval_strategy == IntervalStrategy.NO or training.eval_strategy != training.save_strategy or steps:
        raise ValueError(
            f"--select_on {method.select_on} needs a checkpoint of every epoch or step that is scored: give "
            "--eval_strategy and --save_strategy the same value, and --save_steps a multiple of --eval_steps"
        )
    training.metric_for_best_model, training.greater_is_better = TASKS[data.task].headline, True
    training.load_best_model_at_end = True

"""The model card of a run: what a reader of the Hub needs to use, judge and repeat it."""

import json
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData

from ..inference import OperatingPoints
from .report import format_interval, format_mean_sd
from .tasks import FOUR_CLASS, Task


@dataclass(frozen=True)
class RunDescription:
    """Everything that the card tells about one training run.

    Args:
        model_name: title of the card and name in the model index.
        recipe: name of the recipe.
        description: what the recipe is, in a sentence.
        source: paper and table row that the recipe follows, None where nothing published corresponds to it.
        options: options of the run that differ from the defaults of `train.py`.
        datasets: what was trained on, of "icbhi", "sprsound" and "simulated"; the tests are those of the first.
        counts: {split: {class: cycles}} of the data used, training and validation parts included.
        metrics: {split: scores} as `report.score_predictions` returns them; another dataset's split is called
            `DATASET:SPLIT`.
        selection: what chose the epoch: "validation" (score on validation patients), "last" (nothing) or "test".
        command: the command line that repeats the run.
        versions: {package: version}.
        seed: seed of the run.
        num_parameters: parameters of the model.
        architecture: facts of the checkpoint's config, such as backbone, pooling, head, duration.
        quality: how recording quality was normalised, with the fitted statistics, or `{"score": "learned"}`; None where
            the run did not use it.
        missing: what of the dataset was not there, None where it was complete.
        published: {score: value in percent} of the source's row, or {split: {score: value}} where it stands for
            several; empty where nothing was published.
        base_model: Hub id of the pretrained weights, None when they came from elsewhere.
        local_weights: name and digest of pretrained weights that came from a folder.
        shared_patients: {split: number of its patients who are also in the training part}.
        figures: {caption: file name beside the card}.
        task: what the model was asked.
        sampling_rate: of the waveforms that the model takes, in Hz.
        repo_id: Hub id or folder, for the examples.
    """

    model_name: str
    recipe: str
    description: str
    source: str | None
    options: Mapping[str, Any]
    datasets: Sequence[str]
    counts: Mapping[str, Mapping[str, int]]
    metrics: Mapping[str, Mapping[str, Any]]
    selection: str
    command: str
    versions: Mapping[str, str]
    seed: int
    num_parameters: int
    architecture: Mapping[str, Any]
    quality: Mapping[str, Any] | None = None
    missing: str | None = None
    published: Mapping[str, float | str | Mapping[str, float | str]] = field(default_factory=dict)
    base_model: str | None = None
    local_weights: str | None = None
    shared_patients: Mapping[str, int] = field(default_factory=dict)
    figures: Mapping[str, str] = field(default_factory=dict)
    task: Task = FOUR_CLASS
    sampling_rate: int = 16000
    repo_id: str = "path/to/this/folder"

    def __post_init__(self) -> None:
        for dataset in self.datasets:
            if dataset not in DATASETS:
                raise ValueError(f"dataset is {dataset!r}: the card knows {', '.join(DATASETS)}")
        if self.selection not in _SELECTION:
            raise ValueError(f"selection is {self.selection!r}: the card knows {', '.join(_SELECTION)}")

    @property
    def windows(self) -> float | None:
        """Length in seconds of the windows that were classified, None where it was cycles or recordings."""
        return self.options.get("windows")

    @property
    def unit(self) -> str:
        """What was classified: "cycles", "recordings" or "windows"."""
        return "windows" if self.windows else self.task.config

    @property
    def trained_on(self) -> list["_Dataset"]:
        """What is known of each of the datasets."""
        return [DATASETS[dataset] for dataset in self.datasets]


@dataclass(frozen=True)
class _Dataset:
    title: str
    population: str
    terms: str
    reference: str


DATASETS = {
    "icbhi": _Dataset(
        title="ICBHI 2017",
        population="126 patients of all ages recorded in Portugal and Greece with four devices",
        terms="the ICBHI 2017 database is free for research",
        reference="B. M. Rocha et al., An open access database for the evaluation of respiratory sound classification "
        "algorithms, Physiological Measurement 40(3), 2019",
    ),
    "sprsound": _Dataset(
        title="SPRSound 2022",
        population="children (1 month to 18 years) of one hospital in Shanghai, recorded with one stethoscope",
        terms="SPRSound's terms stand in the LICENSE file of its repository; IEEE DataPort lists its 2023 challenge "
        "under Creative Commons Attribution",
        reference="Q. Zhang et al., SPRSound: Open-Source SJTU Paediatric Respiratory Sound Database, IEEE "
        "Transactions on Biomedical Circuits and Systems 16(5), 2022",
    ),
    "simulated": _Dataset(
        title="Simulated lung sounds",
        population="synthetic sounds, no patient at all: its scores say nothing about real recordings",
        terms="the simulated sounds are generated by the package itself",
        reference="none; the sounds are synthesised",
    ),
}

_SELECTION = {
    "validation": "The epoch was chosen by its score on validation patients, none of whom is in the training part.",
    "last": "No epoch was chosen: these are the scores after the last one.",
    "test": "**The epoch was chosen on the TEST part, as most published numbers were. These scores are optimistic, and "
    "comparable only with numbers chosen the same way.**",
}

_CLASSIFIED = {
    "cycles": "single respiratory cycle",
    "recordings": "whole recording",
    "windows": "{:g} s window",
}
_EXPECTED = {
    "cycles": "one respiratory cycle cut out by hand",
    "recordings": "one whole recording",
    "windows": "any {:g} s of a recording; give longer ones to `LungSoundAnalyzer`, which slides over them",
}

_FEW_PATIENTS = 10  # a percentile bootstrap over fewer clusters undercovers

_CITATION = """\
@inproceedings{kim2026qlung,
  title     = {Quality Adaptive Angular Margin Learning for Respiratory Sound Classification},
  author    = {Kim and Koo and Toikkanen and Kim},
  booktitle = {Interspeech},
  year      = {2026},
  note      = {arXiv:2606.11915}
}
@misc{isik2025sam,
  title  = {Geometry-Aware Optimization for Respiratory Sound Classification: Enhancing Sensitivity with
            {SAM}-Optimized Audio Spectrogram Transformers},
  author = {Isik and others},
  year   = {2025},
  note   = {arXiv:2512.22564}
}"""


def build_model_card(run: RunDescription) -> str:
    """Write the card, README.md beside the checkpoint: a YAML header with the model index, then Markdown."""
    sections = {
        None: f"# {run.model_name}\n\n{_summary(run)}",
        "How to use": _usage(run),
        "Scores": _scores(run),
        "Training data": _training_data(run),
        "Recipe": _recipe(run),
        "Recording quality": _quality(run),
        "Intended use and limits": _limits(run),
        "Licence": f"Code and weights: Apache-2.0. Data: {'; '.join(data.terms for data in run.trained_on)}. No "
        "recording is part of this repository.",
        "Citation": f"```bibtex\n{_CITATION}\n```\n\nData: {'; '.join(data.reference for data in run.trained_on)}.",
    }
    body = "\n\n".join(f"## {title}\n\n{text}" if title else text for title, text in sections.items())
    return f"---\n{_header(run).to_yaml()}\n---\n\n{body}\n"


WHOLE_RECORDINGS = "## In whole recordings"


def describe_operating_points(points: OperatingPoints) -> str:
    """Write the card's section on whole recordings."""
    scores = ("AUROC", "sensitivity", "specificity")
    rows = [
        f"| {part['of']} | {unit} | {part[unit]['abnormal']:,} | {part[unit]['normal']:,} | "
        + " | ".join(_share(part[unit][name]) for name in scores)
        + " |"
        for part in points.scores
        for unit in ("recordings", "cycles")
    ]
    header = ["| of | | abnormal | normal | AUROC % | Se % | Sp % |", "|---|---|---:|---:|---:|---:|---:|"]
    table = "\n".join([*header, *rows])
    return (
        f"{WHOLE_RECORDINGS}\n\n"
        f"`LungSoundAnalyzer` {'brings a recording to one level, ' if points.level else ''}slides windows of "
        f"{points.window:g} s over {'it' if points.level else 'a recording'}, {points.hop:g} s apart, and "
        f"marks what reaches P(abnormal) = {points.threshold:g}. {points.about} There are "
        f"{_plural(points.patients, 'patient')}; a recording counts as abnormal where anything is marked in it, "
        "a cycle or event by the mean over its time. The threshold was chosen on the recordings of the patients kept "
        f"apart, so that their rates are optimistic. Percent, with 95 % intervals by patient:\n\n{table}\n\n"
        f"{_describe_gate(points)}"
        "`operating_points.json` holds the rates of the patients kept apart for every threshold."
    )


SPOILED = ", with spoiled copies"  # ends the name of a part that has them


def gate_figure(part: str) -> str:
    """Name the file of the risk-coverage curve of a part's recordings."""
    return f"risk_coverage_recordings_{re.sub('[^a-z0-9]+', '_', part.lower())}.png"


def _describe_gate(points: OperatingPoints) -> str:
    """What abstaining by quality does to the error in whole recordings; empty where no quality was measured."""
    columns = ("coverage", "risk", "selective_risk", "selective_risk_confidence", "aurc_quality", "aurc_confidence")
    gates = {of: gate for part in points.scores for of, gate in part.get("gates", {}).items()}
    if not gates:
        return ""
    rows = [
        f"| {of} | " + " | ".join("–" if gate[name] is None else f"{100 * gate[name]:.1f}" for name in columns) + " |"
        for of, gate in gates.items()
    ]
    figures = [f"![What abstaining buys, recordings, {of}]({gate_figure(of)})\n\n" for of in gates]
    header = [
        "| of | answered % | wrong % | of those answered | of as many, the surest | by quality | by confidence |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    copies = (
        "; spoiled copies have some noise or fault, little or much of it, and count as what they were made from"
        if any(of.endswith(SPOILED) for of in gates)
        else ""
    )
    return (
        f"Nothing is said of recordings whose quality is below {points.quality_threshold:g}. Those that nobody could "
        f"annotate, the poor ones among them, are not counted{copies}. The last two columns are the mean error where "
        "fewer and fewer recordings are answered, the best, or the surest, first; an order that tells nothing has the "
        "error of all:\n\n" + "\n".join([*header, *rows]) + "\n\n" + "".join(figures)
    )


def _share(score: Sequence[float | None]) -> str:
    """`75.9 (69.0–83.1)`, without an interval where there is none."""
    value, low, high = (None if bound is None else f"{100 * bound:.1f}" for bound in score)
    return "–" if value is None else value if low is None else f"{value} ({low}–{high})"


def _header(run: RunDescription) -> ModelCardData:
    results = [
        EvalResult(
            task_type="audio-classification",
            task_name="Respiratory sound classification",
            dataset_type=dataset,
            dataset_name=" and ".join(data.title for data in run.trained_on)
            if name == "validation"
            else DATASETS[dataset].title,
            dataset_split=split,
            metric_type=score,
            metric_name=title,
            metric_value=round(scores[score], 2),
        )
        for name, scores in run.metrics.items()
        for dataset, split in [name.split(":") if ":" in name else (run.datasets[0], name)]
        for score, title in run.task.titles.items()
        if scores[score] is not None
    ]
    return ModelCardData(
        license="apache-2.0",
        library_name="transformers",
        pipeline_tag="audio-classification",
        tags=["qlung", "respiratory-sounds", "lung-sounds", *run.datasets],
        base_model=run.base_model,
        model_name=run.model_name,
        eval_results=results or None,
    )


def _summary(run: RunDescription) -> str:
    trained_on = " and ".join(f"{data.title} ({data.population})" for data in run.trained_on)
    trained_on = f"parts of {trained_on}" if run.missing else trained_on
    return (
        f"A classifier of {_CLASSIFIED[run.unit].format(run.windows)}s: "
        f"{', '.join(run.task.classes[:-1])} or {run.task.classes[-1]}. "
        f"Trained on {trained_on} with the recipe `{run.recipe}`: {run.description}\n\n"
        "**For research. Not a medical device.**"
    )


def _usage(run: RunDescription) -> str:
    kilohertz, level = f"{run.sampling_rate / 1000:g}", run.options.get("level")
    brought = f", of a recording brought to an RMS amplitude of {level:g}" if level else ""
    return f"""\
`torch` and `transformers` are enough (`soundfile` only reads the file here). The waveform is one
{_CLASSIFIED[run.unit].format(run.windows)}, mono, at {kilohertz} kHz{brought}.

```python
import soundfile
import torch
from transformers import AutoFeatureExtractor, AutoModelForAudioClassification

repo = "{run.repo_id}"
extractor = AutoFeatureExtractor.from_pretrained(repo, trust_remote_code=True)
model = AutoModelForAudioClassification.from_pretrained(repo, trust_remote_code=True).eval()

waveform, rate = soundfile.read("{run.unit.removesuffix("s")}_{kilohertz}khz.wav", dtype="float32")
inputs = extractor(waveform, sampling_rate=rate, return_tensors="pt")
with torch.no_grad():
    logits = model(**inputs).logits
print(model.config.id2label[logits.argmax(-1).item()])
```

or, with a pipeline:

```python
from transformers import pipeline

classify = pipeline("audio-classification", model=repo, trust_remote_code=True)
print(classify({{"raw": waveform, "sampling_rate": rate}}))
```"""


def _scores(run: RunDescription) -> str:
    definition = run.task.definition.replace("cycle", "window") if run.windows else run.task.definition
    parts = [
        f"{_SELECTION[run.selection]}\n\nIn percent. {definition} In brackets: 95 % interval from a bootstrap "
        "over patients, of this one run (it holds no variation between seeds)."
    ]
    parts += [_split_scores(run, split) for split in run.metrics]
    parts += _published(run)
    parts += [f"![{caption}]({name})" for caption, name in run.figures.items()]
    return "\n\n".join(parts)


def _published(run: RunDescription) -> list[str]:
    """One sentence, or one for each split that the source gives scores of."""
    scores = {name: value for name, value in run.published.items() if not isinstance(value, Mapping)}
    by_split = {f" for {name}": value for name, value in run.published.items() if isinstance(value, Mapping)}
    return [
        f"Published in {run.source}{place}: "
        + ", ".join(f"{run.task.titles.get(name, name)} {value}" for name, value in of_split.items())
        + "."
        for place, of_split in ({"": scores} if scores else by_split).items()
    ]


def _split_scores(run: RunDescription, split: str) -> str:
    scores, shared_patients = run.metrics[split], run.shared_patients.get(split, 0)
    items = sum(scores["support"].values())
    header = f"### {split}: {items:,} {run.unit} of {_plural(scores['patients'], 'patient')}"
    rows = [
        f"| {title} | {format_mean_sd(scores[score], None)} | {format_interval(scores['ci95'][score])} |"
        for score, title in run.task.titles.items()
    ]
    classes = [
        f"| {name} | {scores['support'][name]:,} | {format_mean_sd(recall, None)} |"
        for name, recall in scores["recall"].items()
    ]
    tables = ["\n".join(["| measure | % | 95 % interval |", "|---|---:|---:|", *rows])]
    tables.append("\n".join([f"| class | {run.unit} | recall % |", "|---|---:|---:|", *classes]))
    if scores["patients"] < _FEW_PATIENTS:
        tables.append(
            f"Fewer than {_FEW_PATIENTS} patients: the intervals are too narrow, or undefined (–). Do not rely on them."
        )
    if shared_patients:
        tables.append(
            f"**{shared_patients:,} of these {_plural(scores['patients'], 'patient')} are in the training part too**, "
            "as the official split has it: the scores say less about new patients."
        )
    if scores["unlabelled"]:
        unlabelled = _plural(scores["unlabelled"], f"further {run.unit.removesuffix('s')}")
        tables.append(f"{unlabelled} without one of these labels: not scored.")
    return "\n\n".join([header, *tables])


def _plural(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _training_data(run: RunDescription) -> str:
    trained_on = "; ".join(f"{data.title}: {data.population}" for data in run.trained_on)
    classes = list(dict.fromkeys(name for counts in run.counts.values() for name in counts))
    rows = [
        f"| {split} | " + " | ".join(f"{counts.get(name, 0):,}" for name in classes) + f" | {sum(counts.values()):,} |"
        for split, counts in run.counts.items()
    ]
    table = "\n".join([f"| part | {' | '.join(classes)} | all |", "|---|" + "---:|" * (len(classes) + 1), *rows])
    missing = f"**Missing: {run.missing}**" if run.missing else "Nothing of the data was missing."
    return f"{trained_on}. {run.unit.capitalize()}:\n\n{table}\n\n{missing}"


def _recipe(run: RunDescription) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in run.versions.items())
    follows = f"It follows {run.source}." if run.source else "Nothing published corresponds to it."
    origin = run.base_model or run.local_weights
    start = f"fine-tuned from `{origin}`" if origin else "trained from scratch"
    return (
        f"`{run.recipe}`: {run.description} {follows} Seed {run.seed}, {run.num_parameters:,} parameters, {start}. "
        f"To run it again:\n\n```bash\n{run.command}\n```\n\nModel:\n\n{_yaml_block(run.architecture)}\n\n"
        f"Options that differ from the defaults:\n\n{_yaml_block(run.options)}\n\n"
        f"Versions: {versions}."
    )


def _quality(run: RunDescription) -> str:
    if run.quality is None:
        return "This run did not use recording quality."
    if run.quality.get("score") == "learned":
        return (
            "The quality of a cycle is the probability that a clinician would call its recording usable, from a "
            "small network on its levels in bands, fitted on the recordings that SPRSound's annotators called poor, "
            "and made to fall as noise is added, to all of a recording or to much of it. Of children that it was not "
            "fitted on, it tells the poor recordings with an AUROC of 0.96 from the whole of them, and of 0.88 from "
            "three seconds. It knows children's recordings from one stethoscope; what it says of others was not judged "
            "by anybody."
        )
    return (
        "QLung's quality score of a cycle rises with its energy and falls with its spectral entropy; the paper leaves "
        f"the normalisation of both open. Here:\n\n{_yaml_block(run.quality)}\n\n"
        "It is a training signal: on SPRSound, scores of this kind do not tell the recordings that its annotators "
        "called poor (AUROC 0.49 to 0.58, chance is 0.5). Do not use it to accept or refuse a recording."
    )


def _limits(run: RunDescription) -> str:
    populations = "; and ".join(data.population for data in run.trained_on)
    there = "" if run.missing is None else " Not all of them were there: see the training data."
    others = "Expect other scores on other people, stethoscopes and places."
    judged = ""
    if set(run.datasets) != {"simulated"}:
        disagreement = "with the disagreement that listeners have on crackles and wheezes"
        judged = f"\n- The annotations are human judgements, {disagreement}."
    trained_on = f"- It was trained on {populations}.{there} {others}"
    return f"""\
Made to compare methods on public benchmarks and to build research prototypes. It must not be used to diagnose, to
triage or to reassure: it was never tested in care, and no regulator has seen it.

{textwrap.fill(trained_on, 120, subsequent_indent="  ")}
- It expects {_EXPECTED[run.unit].format(run.windows)}.
  Speech, heart sounds, handling noise and wrong cuts were not taught as such, and there is no class for them.
- Its probabilities are a softmax and are not calibrated.{judged}"""


def _yaml_block(values: Mapping[str, Any]) -> str:
    # Through JSON, so that enums, paths and tuples of an options dataclass become plain YAML.
    plain = json.loads(json.dumps(dict(values), default=str))
    return f"```yaml\n{yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)}```"

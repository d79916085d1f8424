"""Figures of runs and benchmarks. They are drawn without pyplot, so that no global backend or figure is touched."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullLocator
from numpy.typing import ArrayLike, NDArray

from .risk_coverage import RiskCoverage
from .tasks import FOUR_CLASS, Task

INK, MUTED, _GRID = "#22313f", "#6b7b8c", "#e6eaee"
# Okabe and Ito's palette, told apart by colour-blind readers too.
_BLUE, _ORANGE, _GREEN, _PURPLE, _SKY = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9"
# Of categories; the first class is the normal one, and recedes.
CATEGORIES = ("#9aa7b3", _BLUE, _ORANGE, _GREEN, _PURPLE, _SKY, "#e69f00")


def plot_confusion_matrix(confusion: ArrayLike, class_names: Sequence[str], path: str | Path, title: str) -> None:
    """Draw a confusion matrix as PNG: percent of each true class by colour and number, counts beneath.

    Args:
        confusion: (C, C) counts, rows the truth.
        class_names: C names.
        path: image file to write.
        title: stands above the matrix; name the model and the split.

    Raises:
        ValueError: the matrix is not C x C.
    """
    counts = _checked_confusion(confusion, class_names)
    size = len(class_names)
    figure = Figure(figsize=(1.9 + 1.0 * size, 1.3 + 0.8 * size), layout=figure_layout())
    axes = figure.add_subplot()
    _draw_confusion(axes, counts, class_names)
    axes.set_xlabel("predicted", color=MUTED)
    axes.set_ylabel("true", color=MUTED)
    axes.set_title(title, loc="left", color=INK, weight="bold", pad=12)
    figure.savefig(path, dpi=160)


def plot_confusion_matrices(
    confusions: Mapping[str, ArrayLike], class_names: Sequence[str], path: str | Path, title: str
) -> None:
    """Draw confusion matrices side by side as PNG, three in a line, two where there are more than five classes.

    Args:
        confusions: name -> (C, C) counts, rows the truth.
        class_names: C names.
        path: image file to write.
        title: stands above all; name what they have in common.

    Raises:
        ValueError: there is none, or one is not C x C.
    """
    if not confusions:
        raise ValueError(f"{path}: there are no confusion matrices to draw")
    size = len(class_names)
    counts = {name: _checked_confusion(confusion, class_names) for name, confusion in confusions.items()}
    columns = min(len(counts), 3 if size <= 5 else 2)
    lines = -(-len(counts) // columns)
    figure = Figure(
        figsize=(0.8 + columns * (0.4 + 0.75 * size), 0.9 + lines * (0.9 + 0.62 * size)), layout=figure_layout()
    )
    grid = figure.subplots(lines, columns, squeeze=False).ravel()
    for number, (name, matrix) in enumerate(counts.items()):
        _draw_confusion(grid[number], matrix, class_names, percent_size=11, first_column=number % columns == 0)
        grid[number].set_title(name, loc="left", color=INK, fontsize=11)
    for axes in grid[len(counts) :]:
        axes.set_axis_off()
    figure.supxlabel("predicted", color=MUTED, fontsize=10)
    figure.supylabel("true", color=MUTED, fontsize=10)
    figure.suptitle(title, x=0.01, ha="left", color=INK, weight="bold")
    figure.savefig(path, dpi=160)


def plot_training_curves(log_history: Sequence[dict[str, Any]], path: str | Path, task: Task = FOUR_CLASS) -> None:
    """Draw loss (left) and scores in percent (right) over epochs as PNG, from `trainer.state.log_history`.

    Args:
        log_history: the Trainer's log: training entries hold `loss` and `epoch`, evaluation entries `eval_loss` and
            the task's scores, each as `eval_SCORE`. Undefined scores (None, NaN) are left out of their line. Without
            evaluation entries the loss stands alone.
        path: image file to write.
        task: what was asked; gives the scores.

    Raises:
        ValueError: the log holds neither a loss nor a score.
    """
    losses = {
        "loss": ("training", MUTED, "-", 1.3),
        "eval_loss": ("evaluation", _BLUE, "-", 2.2),
    }
    panels = [
        (title, lines, limits)
        for title, lines, limits in (("Loss", losses, None), ("Scores in percent", _score_lines(task), (0, 100)))
        if any(_curve(log_history, key)[0] for key in lines)
    ]
    if not panels:
        raise ValueError(f"{path}: the log has no loss and no score in its {len(log_history)} entries; nothing to draw")

    figure = Figure(figsize=(5.4 * len(panels), 3.8), layout=figure_layout())
    for axes, (title, lines, limits) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _draw_lines(axes, log_history, lines)
        axes.set_title(title, loc="left", color=INK, weight="bold")
        axes.set_ylim(limits if limits else (0, None))
    figure.savefig(path, dpi=160)


def _score_lines(task: Task) -> dict[str, tuple[str, str, str, float]]:
    """Label, colour, style and width of each of a task's scores, by its key in the log; the headline stands out."""
    known = {
        task.headline: (_BLUE, "-", 2.2),
        "specificity": (_GREEN, "-", 1.3),
        task.sensitivity: (_ORANGE, "-", 1.3),
    }
    others = zip((name for name in task.titles if name not in known), (_PURPLE, _SKY), strict=False)
    styles = {**known, **{name: (colour, "--", 1.3) for name, colour in others}}
    return {f"eval_{name}": (task.titles[name], *style) for name, style in styles.items()}


@dataclass(frozen=True)
class ScoreLine:
    """
    One line of `plot_benchmark`, in percent.

    Args:
        name: of the row.
        mean: over seeds; None where nothing is scored, which leaves the line to the published value.
        sd: over seeds, None for a single one.
        interval: [low, high] of the mean.
        published: the value that was published for it.
    """

    name: str
    mean: float | None
    sd: float | None = None
    interval: Sequence[float] | None = None
    published: float | None = None


def plot_benchmark(lines: Sequence[ScoreLine], path: str | Path, title: str, score: str, baseline: str) -> None:
    """Draw one line per row as PNG: mean, deviation over seeds, interval and published value.

    Args:
        lines: from top to bottom.
        path: image file to write.
        title: stands above; name dataset, split and task.
        score: names the axis.
        baseline: name of the line whose mean is drawn through all others, if it is there.

    Raises:
        ValueError: there are no lines.
    """
    if not lines:
        raise ValueError(f"{path}: there are no rows to draw")
    figure = Figure(figsize=(9, 1.9 + 0.42 * len(lines)), layout=figure_layout())
    axes = figure.add_subplot()
    rule = next((line.mean for line in lines if line.name == baseline), None)
    if rule is not None:
        axes.axvline(rule, color=MUTED, linewidth=1, dashes=(4, 3), zorder=1)
    for height, line in enumerate(lines):
        _draw_score(axes, height, line)
    axes.set_yticks(range(len(lines)), [line.name for line in lines])
    axes.set_ylim(len(lines) - 0.4, -0.6)
    axes.set_xlabel(f"{score}, percent", color=MUTED)
    quiet(axes)
    axes.tick_params(axis="y", colors=INK, labelsize=10)
    axes.set_title(title, loc="left", color=INK, weight="bold", pad=10)
    shown = {
        "mean ± sd over seeds": _mean_mark(),
        "95 % interval of the mean": Line2D([], [], color=INK, linewidth=1.2),
        "published": None if all(line.published is None for line in lines) else _published_mark(),
        f"baseline, {baseline}": None if rule is None else Line2D([], [], color=MUTED, linewidth=1, dashes=(4, 3)),
    }
    labels, handles = zip(*[(label, mark) for label, mark in shown.items() if mark is not None], strict=True)
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, labelcolor=INK, fontsize=9)
    figure.savefig(path, dpi=160)


def plot_sensitivity(
    values: Sequence[float],
    means: Sequence[float],
    deviations: Sequence[float | None],
    path: str | Path,
    title: str,
    option: str,
    score: str,
) -> None:
    """Draw a score against the values of one option as PNG, mean ± sd over seeds.

    The axis is logarithmic where the values are positive and span a factor of eight or more.

    Args:
        values: of the option, in any order.
        means: of the score at each, in percent.
        deviations: over seeds at each, None for a single one.
        path: image file to write.
        title: stands above.
        option: names the horizontal axis.
        score: names the vertical axis.

    Raises:
        ValueError: the three differ in length.
    """
    order = np.argsort(values)
    x, y, sd = (np.array(part, dtype=float)[order] for part in (values, means, deviations))  # no deviation is NaN
    figure = Figure(figsize=(5.6, 3.8), layout=figure_layout())
    axes = figure.add_subplot()
    if x[0] > 0 and x[-1] >= 8 * x[0]:
        axes.set_xscale("log")
    axes.errorbar(x, y, yerr=sd, color=_BLUE, marker="o", linewidth=1.8, elinewidth=1.2, capsize=3)
    axes.set_xticks(x, [f"{value:g}" for value in x])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(option, color=MUTED)
    axes.set_ylabel(f"{score}, percent", color=MUTED)
    axes.margins(y=0.15)
    quiet(axes)
    axes.set_title(title, loc="left", color=INK, weight="bold", pad=10)
    figure.savefig(path, dpi=160)


def plot_quality_histogram(
    quality: ArrayLike, labels: ArrayLike, class_names: Sequence[str], path: str | Path, title: str
) -> None:
    """Draw how a quality score is distributed in each class as PNG.

    Args:
        quality: (n,) scores in [0, 1].
        labels: (n,) classes, indices into `class_names`.
        class_names: names of the classes; those without a cycle are left out.
        path: image file to write.
        title: stands above; name the dataset and the normalisation.

    Raises:
        ValueError: the two differ in length or are empty, a score is outside [0, 1], or there are more classes than
            colours.
    """
    scores, classes = np.asarray(quality, dtype=float), np.asarray(labels)
    if scores.shape != classes.shape or not scores.size:
        raise ValueError(f"{path}: {scores.shape} scores for {classes.shape} labels; give one each, and at least one")
    if not ((scores >= 0) & (scores <= 1)).all():
        raise ValueError(f"{path}: scores from {scores.min()} to {scores.max()}; they must be in [0, 1]")
    colours = colours_of(class_names, path)
    figure = Figure(figsize=(7.6, 3.9), layout=figure_layout())
    axes = figure.add_subplot()
    edges = np.linspace(0, 1, 26)
    for index, name in enumerate(class_names):
        of_class = scores[classes == index]
        if not of_class.size:
            continue
        share = 100 * np.histogram(of_class, edges)[0] / of_class.size
        label = f"{name}: n = {of_class.size:,}, {of_class.mean():.2f} ± {of_class.std():.2f}"
        axes.stairs(share, edges, color=colours[name], linewidth=2, label=label)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, None)
    axes.set_xlabel("quality score", color=MUTED)
    axes.set_ylabel("percent of the class", color=MUTED)
    quiet(axes)
    axes.legend(frameon=False, labelcolor=INK, fontsize=9, title="mean ± sd", alignment="left")
    axes.set_title(title, loc="left", color=INK, weight="bold", pad=10)
    figure.savefig(path, dpi=160)


def plot_risk_coverage(curves: Mapping[str, RiskCoverage], path: str | Path, title: str) -> None:
    """Draw the error among the answered items against how many are answered as PNG, in percent.

    Args:
        curves: by the name of the score that orders the items; all of the same items.
        path: image file to write.
        title: stands above; name the model and the split.

    Raises:
        ValueError: there is no curve, or more than colours.
    """
    if not curves:
        raise ValueError(f"{path}: there are no curves to draw")
    colours = colours_of(list(curves), path, CATEGORIES[1:])
    figure = Figure(figsize=(5.6, 3.9), layout=figure_layout())
    axes = figure.add_subplot()
    for name, curve in curves.items():
        label = f"{name} (area {100 * curve.area:.1f})"
        axes.plot(100 * curve.coverage, 100 * curve.risk, color=colours[name], linewidth=1.8, label=label)
    whole = 100 * next(iter(curves.values())).risk[-1]
    axes.axhline(whole, color=MUTED, linewidth=1.2, linestyle="--", label=f"none (area {whole:.1f})")
    axes.set_xlim(0, 100)
    axes.set_ylim(0, None)
    axes.set_xlabel("answered, percent", color=MUTED)
    axes.set_ylabel("wrong among them, percent", color=MUTED)
    quiet(axes)
    legend = axes.legend(frameon=False, labelcolor=INK, fontsize=9, title="answered in the order of", alignment="left")
    legend.get_title().set_color(INK)
    axes.set_title(title, loc="left", color=INK, weight="bold", pad=10, fontsize=10.5)
    figure.savefig(path, dpi=160)


def plot_embedding_map(
    embeddings: ArrayLike,
    labels: ArrayLike,
    class_names: Sequence[str],
    groups: Sequence[str],
    path: str | Path,
    title: str,
    grouped_by: str,
    seed: int = 0,
) -> None:
    """Draw a t-SNE map (van der Maaten and Hinton 2008) of embeddings as PNG, coloured by class and by another group.

    Distances between far clusters, and their sizes, mean nothing in such a map. It takes about 10 s for 4,000 items.

    Args:
        embeddings: (n, hidden).
        labels: (n,) classes, indices into `class_names`.
        class_names: names of the classes.
        groups: (n,) names of datasets, splits, devices, ...; as many as there are colours (7) at most.
        path: image file to write.
        title: stands above; name model and data.
        grouped_by: heading of the second panel.
        seed: the same seed gives the same map.

    Raises:
        ValueError: fewer than 4 items, lengths that differ, or more classes or groups than colours.
    """
    from sklearn.manifold import TSNE  # takes a second to import, which other figures need not

    points, classes = np.asarray(embeddings, dtype=np.float32), np.asarray(labels)
    if not len(points) == len(classes) == len(groups) >= 4:
        raise ValueError(
            f"{path}: {len(points)} embeddings, {len(classes)} labels, {len(groups)} groups; as many of each, 4 at "
            "least"
        )
    panels = [
        ("class", [class_names[index] for index in classes], colours_of(class_names, path)),
        (grouped_by, list(groups), colours_of(sorted(set(groups)), path, CATEGORIES[::-1])),
    ]
    places = TSNE(perplexity=min(30.0, (len(points) - 1) / 3), init="pca", random_state=seed).fit_transform(points)
    order = np.random.default_rng(seed).permutation(len(points))  # else the last group hides the others
    figure = Figure(figsize=(10, 5.4), layout=figure_layout())
    for axes, (heading, names, colours) in zip(figure.subplots(1, 2), panels, strict=True):
        size = float(np.clip(12000 / len(points), 6, 40))
        axes.scatter(*places[order].T, s=size, c=[colours[names[i]] for i in order], alpha=0.75, linewidths=0)
        marks = [Line2D([], [], color=c, marker="o", linestyle="", label=n) for n, c in colours.items() if n in names]
        axes.legend(handles=marks, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=4, frameon=False, labelcolor=INK)
        axes.set_title(f"by {heading}", loc="left", color=INK, fontsize=11)
        axes.set(xticks=[], yticks=[])
        axes.set_aspect("equal", adjustable="datalim")
        axes.spines[:].set_color(_GRID)
    figure.suptitle(title, x=0.01, ha="left", color=INK, weight="bold")
    figure.savefig(path, dpi=160)


def plot_attention(
    features: ArrayLike,
    attention: ArrayLike,
    path: str | Path,
    title: str,
    *,
    patch_size: int,
    time_stride: int,
    frequency_stride: int,
    sampling_rate: int = 16000,
    frame_shift: float = 0.01,
    low_hz: float = 20.0,
) -> None:
    """Draw a cycle's log-mel spectrogram and, on the same axes beneath, the attention that its patches are given.

    Args:
        features: (frames, mel bands) of the model's feature extractor.
        attention: (time patches, frequency patches) of `inference.attention_map`.
        path: image file to write.
        title: stands above; name the cycle, its class and what was predicted.
        patch_size: side of a patch, in frames and bands; like the strides, of the encoder's configuration.
        time_stride: frames from one patch to the next.
        frequency_stride: bands from one patch to the next.
        sampling_rate: in Hz; the highest band ends at half of it.
        frame_shift: seconds from one frame to the next.
        low_hz: where the lowest band begins; bands are equally spaced on Kaldi's mel scale.

    Raises:
        ValueError: the patches are not those of such a spectrogram.
    """
    spectrogram, weights = np.asarray(features), np.asarray(attention)
    strides, sizes = (time_stride, frequency_stride), spectrogram.shape
    expected = tuple((size - patch_size) // stride + 1 for size, stride in zip(sizes, strides, strict=True))
    if weights.shape != expected:
        raise ValueError(f"{path}: attention of shape {weights.shape}, but features of {sizes} have {expected} patches")
    figure = Figure(figsize=(9, 5.6), layout=figure_layout())
    panels = figure.subplots(2, 1, sharex=True, sharey=True)
    seconds = sizes[0] * frame_shift
    image = panels[0].imshow(
        spectrogram.T,
        origin="lower",
        aspect="auto",
        cmap="magma",
        extent=(0, seconds, 0, sizes[1]),
        vmin=np.percentile(spectrogram, 1),
        vmax=np.percentile(spectrogram, 99.8),
    )
    figure.colorbar(image, ax=panels[0], label="log-mel, normalised")
    # Patches overlap: each is drawn one stride wide around its centre. 1 is what every patch had if all had the same.
    edges = [(np.arange(n + 1) - 0.5) * s + patch_size / 2 for n, s in zip(weights.shape, strides, strict=True)]
    image = panels[1].pcolormesh(
        edges[0] * frame_shift, edges[1], (weights / weights.mean()).T, cmap="viridis", norm=PowerNorm(0.5, vmin=0)
    )
    figure.colorbar(image, ax=panels[1], label="attention, times the mean")
    for axes, heading in zip(panels, ("spectrogram", "attention of the last layer"), strict=True):
        axes.set_title(heading, loc="left", color=INK, fontsize=11)
        axes.set_ylabel("frequency", color=MUTED)
        axes.tick_params(length=0, colors=MUTED)
        axes.spines[:].set_visible(False)
    ticks = [hertz for hertz in (250, 500, 1000, 2000, 4000, 8000, 16000) if low_hz < hertz <= sampling_rate / 2]
    position = (to_mel(ticks) - to_mel(low_hz)) / (to_mel(sampling_rate / 2) - to_mel(low_hz)) * (sizes[1] + 1) - 0.5
    names = [f"{hertz} Hz" if hertz < 1000 else f"{hertz // 1000} kHz" for hertz in ticks]
    panels[0].set_yticks(position, names)
    panels[0].set_ylim(0, sizes[1])
    panels[1].set_xlim(0, seconds)
    panels[1].set_xlabel("time, seconds", color=MUTED)
    figure.suptitle(title, x=0.01, ha="left", color=INK, weight="bold")
    figure.savefig(path, dpi=160)


def figure_layout() -> ConstrainedLayoutEngine:
    """Give every figure's margins, in inches."""
    return ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.15)


def _checked_confusion(confusion: ArrayLike, class_names: Sequence[str]) -> NDArray:
    counts = np.asarray(confusion)
    if counts.shape != (len(class_names),) * 2:
        raise ValueError(f"{len(class_names)} classes but a confusion matrix of shape {counts.shape}")
    return counts


def _draw_confusion(
    axes: Axes, counts: NDArray, class_names: Sequence[str], percent_size: float = 12, first_column: bool = True
) -> None:
    size = len(class_names)
    support = counts.sum(axis=1)
    share = counts / np.maximum(support, 1)[:, None]
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for row, column in np.ndindex(size, size):
        style: dict[str, Any] = {
            "ha": "center",
            "va": "center",
            "color": "white" if share[row, column] > 0.55 else INK,
        }
        percent = f"{100 * share[row, column]:.1f} %" if support[row] else "–"
        axes.text(column, row - 0.08, percent, fontsize=percent_size, weight="bold", **style)
        axes.text(column, row + 0.22, f"{counts[row, column]:,}", fontsize=0.71 * percent_size, **style)
    # Two-word names would run into each other.
    axes.set_xticks(range(size), [name.replace(" ", "\n").replace("+", "+\n") for name in class_names])
    names = [f"{name}\nn = {n:,}" for name, n in zip(class_names, support, strict=True)]
    axes.set_yticks(range(size), names if first_column else [""] * size)
    axes.set_xticks(np.arange(1, size) - 0.5, minor=True)
    axes.set_yticks(np.arange(1, size) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=2.5)
    axes.tick_params(which="both", length=0, colors=INK)
    axes.spines[:].set_visible(False)


def _draw_score(axes: Axes, height: int, line: ScoreLine) -> None:
    if line.mean is not None:
        if line.sd is not None:
            ends = [line.mean - line.sd, line.mean + line.sd]
            axes.plot(ends, [height] * 2, color=_BLUE, linewidth=6, alpha=0.35, solid_capstyle="butt", zorder=2)
        if line.interval is not None:
            axes.plot(line.interval, [height] * 2, color=INK, linewidth=1.2, zorder=3)
        axes.plot(line.mean, height, "o", color=_BLUE, markersize=8, zorder=4)
    if line.published is not None:
        axes.add_line(_published_mark(line.published, height))


def _published_mark(*place: float) -> Line2D:
    x, y = ([value] for value in place) if place else ([], [])
    return Line2D(x, y, marker="D", markersize=7, color=_ORANGE, markerfacecolor="white", linestyle="", zorder=5)


def _mean_mark() -> tuple[Line2D, Line2D]:
    """One over the other, as legends draw tuples."""
    return (
        Line2D([], [], color=_BLUE, linewidth=6, alpha=0.35, solid_capstyle="butt"),
        Line2D([], [], color=_BLUE, marker="o", markersize=8, linestyle=""),
    )


def quiet(axes: Axes) -> None:
    """Leave of an axis what is read from it."""
    axes.grid(color=_GRID)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, colors=MUTED)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_GRID)


def colours_of(names: Sequence[str], path: str | Path, palette: Sequence[str] = CATEGORIES) -> dict[str, str]:
    """Give each name its colour.

    Raises:
        ValueError: there are more names than colours; the message names the figure's `path`.
    """
    if len(names) > len(palette):
        raise ValueError(f"{path}: {len(names)} categories, more than the {len(palette)} colours: merge some")
    return dict(zip(names, palette, strict=False))


def to_mel(hertz: ArrayLike) -> NDArray:
    """Give frequencies in Hz on Kaldi's mel scale, in the shape given."""
    return 1127.0 * np.log1p(np.asarray(hertz, dtype=float) / 700.0)


def _draw_lines(axes: Axes, log_history: Sequence[dict[str, Any]], lines: dict[str, tuple]) -> None:
    for key, (label, colour, style, width) in lines.items():
        epochs, values = _curve(log_history, key)
        if epochs:
            # A single evaluation is a point, which a line alone would not show.
            marker = "o" if len(epochs) == 1 else None
            axes.plot(epochs, values, style, color=colour, linewidth=width, marker=marker, label=label)
    axes.set_xlabel("epoch", color=MUTED)
    axes.set_xlim(0, None)
    axes.xaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10]))
    quiet(axes)
    axes.legend(frameon=False, labelcolor=INK, fontsize=9)


def _curve(log_history: Sequence[dict[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """Epochs and values of the entries that hold a finite `key`."""
    points = [(e["epoch"], e[key]) for e in log_history if e.get(key) is not None and np.isfinite(e[key])]
    return [epoch for epoch, _ in points], [value for _, value in points]

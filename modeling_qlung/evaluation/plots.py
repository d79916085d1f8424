"""Figures of a run. They are drawn without pyplot, so that no global backend or figure is touched."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

_INK, _MUTED, _GRID = "#22313f", "#6b7b8c", "#e6eaee"
# Okabe and Ito's palette, told apart by colour-blind readers too.
_BLUE, _ORANGE, _GREEN, _PURPLE, _SKY = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9"

_SCORE_LINES = {
    "eval_score_4class": ("Score (4-class)", _BLUE, "-", 2.2),
    "eval_specificity": ("Specificity", _GREEN, "-", 1.3),
    "eval_sensitivity_4class": ("Sensitivity (4-class)", _ORANGE, "-", 1.3),
    "eval_score_2class": ("Score (2-class)", _SKY, "--", 1.6),
    "eval_sensitivity_2class": ("Sensitivity (2-class)", _PURPLE, "--", 1.3),
}


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
    counts = np.asarray(confusion)
    size = len(class_names)
    if counts.shape != (size, size):
        raise ValueError(f"{size} classes but a confusion matrix of shape {counts.shape}")
    support = counts.sum(axis=1)
    share = counts / np.maximum(support, 1)[:, None]

    figure = Figure(figsize=(1.9 + 1.0 * size, 1.3 + 0.8 * size), layout=_layout())
    axes = figure.add_subplot()
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for row, column in np.ndindex(size, size):
        colour = "white" if share[row, column] > 0.55 else _INK
        percent = f"{100 * share[row, column]:.1f} %" if support[row] else "–"
        axes.text(column, row - 0.08, percent, ha="center", va="center", color=colour, fontsize=12, weight="bold")
        axes.text(column, row + 0.22, f"{counts[row, column]:,}", ha="center", va="center", color=colour, fontsize=8.5)
    # Two-word names would run into each other.
    axes.set_xticks(range(size), [name.replace(" ", "\n").replace("+", "+\n") for name in class_names])
    axes.set_yticks(range(size), [f"{name}\nn = {n:,}" for name, n in zip(class_names, support, strict=True)])
    axes.set_xticks(np.arange(1, size) - 0.5, minor=True)
    axes.set_yticks(np.arange(1, size) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=2.5)
    axes.tick_params(which="both", length=0, colors=_INK)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("predicted", color=_MUTED)
    axes.set_ylabel("true", color=_MUTED)
    axes.set_title(title, loc="left", color=_INK, weight="bold", pad=12)
    figure.savefig(path, dpi=160)


def plot_training_curves(log_history: Sequence[dict[str, Any]], path: str | Path) -> None:
    """Draw loss (left) and scores in percent (right) over epochs as PNG, from `trainer.state.log_history`.

    Args:
        log_history: the Trainer's log: training entries hold `loss` and `epoch`, evaluation entries `eval_loss` and
            the scores as `eval_score_4class`, ... Undefined scores (None, NaN) are left out of their line. Without
            evaluation entries the loss stands alone.
        path: image file to write.

    Raises:
        ValueError: the log holds neither a loss nor a score.
    """
    losses = {
        "loss": ("training", _MUTED, "-", 1.3),
        "eval_loss": ("evaluation", _BLUE, "-", 2.2),
    }
    panels = [
        (title, lines, limits)
        for title, lines, limits in (("Loss", losses, None), ("Scores in percent", _SCORE_LINES, (0, 100)))
        if any(_curve(log_history, key)[0] for key in lines)
    ]
    if not panels:
        raise ValueError(f"{path}: the log has no loss and no score in its {len(log_history)} entries; nothing to draw")

    figure = Figure(figsize=(5.4 * len(panels), 3.8), layout=_layout())
    for axes, (title, lines, limits) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _draw_lines(axes, log_history, lines)
        axes.set_title(title, loc="left", color=_INK, weight="bold")
        axes.set_ylim(limits if limits else (0, None))
    figure.savefig(path, dpi=160)


def _layout() -> ConstrainedLayoutEngine:
    return ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.15)


def _draw_lines(axes: Axes, log_history: Sequence[dict[str, Any]], lines: dict[str, tuple]) -> None:
    for key, (label, colour, style, width) in lines.items():
        epochs, values = _curve(log_history, key)
        if epochs:
            # A single evaluation is a point, which a line alone would not show.
            marker = "o" if len(epochs) == 1 else None
            axes.plot(epochs, values, style, color=colour, linewidth=width, marker=marker, label=label)
    axes.set_xlabel("epoch", color=_MUTED)
    axes.set_xlim(0, None)
    axes.xaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10]))
    axes.grid(color=_GRID)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, colors=_MUTED)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_GRID)
    axes.legend(frameon=False, labelcolor=_INK, fontsize=9)


def _curve(log_history: Sequence[dict[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """Epochs and values of the entries that hold a finite `key`."""
    points = [(e["epoch"], e[key]) for e in log_history if e.get(key) is not None and np.isfinite(e[key])]
    return [epoch for epoch, _ in points], [value for _, value in points]

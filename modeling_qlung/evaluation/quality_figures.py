"""The figures of `python -m modeling_qlung.evaluation.quality`."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from ..filterbank_qlung import KaldiFilterbank
from .plots import CATEGORIES, INK, MUTED, colours_of, figure_layout, quiet, to_mel
from .quality_measures import calibration, weighted_auroc

_BANDS, _LOW_HZ, _HIGH_HZ = 80, 20.0, 4000.0
_FRAMES = 5  # of 10 ms, drawn as one


class Shown(NamedTuple):
    """A recording to draw: samples (n,) at 16 kHz, its score, and what clinicians said of it."""

    waveform: NDArray
    quality: float
    label: str


def plot_discrimination(
    qualities: Mapping[str, NDArray], probabilities: Collection[str], poor: NDArray, path: Path
) -> None:
    """Draw ROC curves for "Poor Quality" (first seed; the area: mean over seeds) and reliability (all seeds) as PNG.

    Args:
        qualities: (seeds, n) scores of the same recordings, by name.
        probabilities: names of those that claim to be probabilities: the others have no reliability.
        poor: (n,) bool.
        path: image file to write.

    Raises:
        ValueError: there are more scores than colours.
    """
    colours = colours_of(list(qualities), path, CATEGORIES[1:])
    figure = Figure(figsize=(9.6 if probabilities else 5, 4.6), layout=figure_layout())
    roc, *others = figure.subplots(1, 2 if probabilities else 1, squeeze=False)[0]
    for axes in (roc, *others):
        axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1, dashes=(4, 3))
        axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
    for name, quality in qualities.items():
        order = np.argsort(quality[0], kind="stable")
        last = np.r_[np.diff(quality[0][order]) > 0, True]  # equal scores are called together
        hits, alarms = (np.r_[0, (np.cumsum(part[order]) / part.sum())[last]] for part in (poor, ~poor))
        area = np.mean([weighted_auroc(1 - one, poor, np.ones((1, len(poor)))) for one in quality])
        roc.plot(alarms, hits, color=colours[name], linewidth=1.8, label=f"{name}: {area:.3f}")
    _finish(roc, "Poor recordings found", "usable recordings called poor", "poor recordings called poor")
    title = "AUROC, all folds together"
    legend = roc.legend(frameon=False, labelcolor=INK, fontsize=9, title=title, alignment="left", loc="lower right")
    legend.get_title().set_color(INK)
    for reliability in others:
        for name in probabilities:
            bins = calibration(qualities[name], ~poor)["bins"]
            sizes = [8 + 80 * part["n"] / qualities[name].size for part in bins]
            places = [[part[key] for part in bins] for key in ("probability", "usable")]
            reliability.plot(*places, color=colours[name], linewidth=1.2)
            reliability.scatter(*places, s=sizes, color=colours[name], zorder=3)
        _finish(reliability, "Reliability of probabilities", "score", "share that clinicians call usable")
    figure.savefig(path, dpi=160)


def plot_monotonicity(results: Mapping[str, Any], path: Path) -> None:
    """Draw the mean score of recordings that get worse, a panel for each kind of noise, as PNG.

    Args:
        results: {score: {kind: {"unit", "levels", "unseen", "mean"}}}.
        path: image file to write.

    Raises:
        ValueError: there are more scores than colours.
    """
    colours = colours_of(list(results), path, CATEGORIES[1:])
    kinds = next(iter(results.values()))
    columns = 5
    rows = -(-len(kinds) // columns)
    figure = Figure(figsize=(13.2, 2.7 * rows + 0.4), layout=figure_layout())
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
    for axes, (kind, found) in zip(panels, kinds.items(), strict=False):
        for name, of_score in results.items():
            axes.plot(of_score[kind]["mean"], color=colours[name], linewidth=1.8, marker="o", markersize=3, label=name)
        axes.set_xticks(range(len(found["mean"])), ["–", *(f"{n:g}".replace("-", "−") for n in found["levels"])])
        axes.set_ylim(-0.02, 1.02)
        title = f"{kind}, never fitted to" if found["unseen"] else kind
        _finish(axes, title, {"dB": "SNR, dB", "%": "percent lost"}[found["unit"]], "")
        axes.tick_params(axis="x", labelsize=8)
    for axes in panels[len(kinds) :]:
        axes.set_axis_off()
    figure.supylabel("mean score (–: as recorded)", color=MUTED, fontsize=10)
    handles = panels[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=4, frameon=False, labelcolor=INK)
    figure.savefig(path, dpi=140)


def plot_devices(qualities: Mapping[str, Mapping[str, Mapping[str, NDArray]]], path: Path) -> None:
    """Draw how the scores of each device's recordings and cycles are distributed, as PNG.

    Args:
        qualities: scores (n,) by score's name, unit and device.
        path: image file to write.
    """
    units = list(next(iter(qualities.values())))
    figure = Figure(figsize=(9.6, 0.6 + 2.4 * len(qualities)), layout=figure_layout())
    grid = figure.subplots(len(qualities), len(units), squeeze=False, sharey=True)
    rng = np.random.default_rng(0)
    for row, (name, of_units) in zip(grid, qualities.items(), strict=True):
        for axes, (unit, devices) in zip(row, of_units.items(), strict=True):
            names = [f"{device}\nn = {len(scores):,}" for device, scores in devices.items()]
            lines = {part: {"color": INK} for part in ("boxprops", "whiskerprops", "capprops", "medianprops")}
            axes.boxplot(list(devices.values()), tick_labels=names, whis=(5, 95), showfliers=False, widths=0.6, **lines)
            for place, (scores, colour) in enumerate(zip(devices.values(), CATEGORIES[1:], strict=False), start=1):
                spread = place + rng.uniform(-0.2, 0.2, len(scores))
                axes.scatter(spread, scores, s=8, color=colour, alpha=0.5, linewidths=0)
            axes.set_ylim(-0.02, 1.02)
            _finish(axes, f"{name}, {unit}", "", "score" if axes is row[0] else "")
    figure.savefig(path, dpi=140)


def plot_recordings(best: Sequence[Shown], worst: Sequence[Shown], path: Path, score: str) -> None:
    """Draw log-mel spectrograms of the recordings with the highest and the lowest score as PNG, 1,400 pixels wide.

    Args:
        best: highest first, at least one.
        worst: lowest first, as many.
        path: image file to write.
        score: its name.
    """
    figure = Figure(figsize=(14, 5.8), layout=figure_layout())
    grid = figure.subplots(2, len(best), squeeze=False, sharey=True)
    ticks = [100, 250, 500, 1000, 2000, 4000]
    for row, heading, recordings in zip(grid, ("highest", "lowest"), (best, worst), strict=True):
        for axes, shown in zip(row, recordings, strict=True):
            image, seconds = _log_mel(shown.waveform)
            extent = (0, seconds, to_mel(_LOW_HZ), to_mel(_HIGH_HZ))
            low, high = np.percentile(image, [5, 99.8])
            look: dict[str, Any] = {"origin": "lower", "aspect": "auto", "cmap": "magma", "interpolation": "nearest"}
            axes.imshow(image, extent=extent, vmin=low, vmax=high, **look)
            axes.set_yticks(to_mel(ticks), [f"{t} Hz" if t < 1000 else f"{t // 1000} kHz" for t in ticks])
            axes.tick_params(length=0, colors=MUTED)
            axes.spines[:].set_visible(False)
            axes.set_title(f"{shown.quality:.2f}: {shown.label}", loc="left", color=INK, fontsize=10)
        row[0].set_ylabel(heading, color=INK, fontsize=11)
    title = f"Highest and lowest by {score}, of children not seen in fitting: score, and what clinicians said"
    figure.suptitle(title, x=0.01, ha="left", color=INK, weight="bold")
    figure.supxlabel("seconds", color=MUTED, fontsize=10)
    figure.savefig(path, dpi=100)


def _log_mel(waveform: NDArray) -> tuple[NDArray, float]:
    """Log-mel energies (bands, frames) from 20 Hz to 4 kHz, and the seconds they span."""
    filterbank = KaldiFilterbank(16000, _BANDS)
    padded = np.pad(waveform, (0, max(0, _FRAMES * filterbank.hop_length + filterbank.frame_length - len(waveform))))
    energies = filterbank(torch.from_numpy(padded)[None])[0].numpy()
    frames = len(energies) // _FRAMES
    shown = round(_BANDS * float((to_mel(_HIGH_HZ) - to_mel(_LOW_HZ)) / (to_mel(8000.0) - to_mel(_LOW_HZ))))
    blocks = energies[: frames * _FRAMES, :shown].reshape(frames, _FRAMES, shown)
    return blocks.mean(axis=1).T, frames * _FRAMES * filterbank.hop_length / filterbank.sampling_rate


def _finish(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, loc="left", color=INK, fontsize=11)
    axes.set_xlabel(x, color=MUTED)
    axes.set_ylabel(y, color=MUTED)
    quiet(axes)

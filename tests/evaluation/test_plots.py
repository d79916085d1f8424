import importlib
import sys

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.text import Text
from sklearn.metrics import roc_auc_score

from modeling_qlung.evaluation import plots
from modeling_qlung.evaluation.plots import (
    ScoreLine,
    plot_attention,
    plot_benchmark,
    plot_confusion_matrices,
    plot_confusion_matrix,
    plot_embedding_map,
    plot_quality_histogram,
    plot_sensitivity,
    plot_training_curves,
)
from modeling_qlung.evaluation.quality_figures import plot_discrimination
from modeling_qlung.evaluation.tasks import TASKS

CLASSES = ("normal", "crackle", "wheeze", "both")
LOG = [
    {"loss": 1.4, "grad_norm": 2.0, "learning_rate": 5e-5, "epoch": 0.5, "step": 5},
    {"loss": 1.1, "epoch": 1.0, "step": 10},
    {"eval_loss": 1.2, "eval_score_4class": 50.0, "eval_specificity": 70.0, "epoch": 1.0, "step": 10},
    {"eval_loss": 1.0, "eval_score_4class": None, "eval_specificity": float("nan"), "epoch": 2.0, "step": 20},
    {"eval_loss": 0.9, "eval_score_4class": 60.0, "eval_specificity": 80.0, "epoch": 3.0, "step": 30},
    {"train_runtime": 3.0, "train_loss": 1.2, "epoch": 3.0, "step": 30},
]


@pytest.fixture
def figures(monkeypatch):
    """Figures as they were when saved."""
    saved, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **k: (saved.append(figure), save(figure, *a, **k)))
    return saved


def test_confusion_matrix_shows_percent_and_counts(tmp_path, figures):
    counts = [[1293, 180, 80, 26], [220, 330, 50, 49], [120, 60, 180, 25], [0, 0, 0, 0]]
    plot_confusion_matrix(counts, CLASSES, tmp_path / "confusion.png", "qlung-ast, ICBHI test")
    (axes,) = figures[0].axes
    texts = [text.get_text() for text in axes.texts]
    assert texts[:2] == ["81.9 %", "1,293"]
    assert "50.8 %" in texts
    assert texts[-2:] == ["–", "0"]  # no cycle of the class, so no percentage
    assert axes.get_title(loc="left") == "qlung-ast, ICBHI test"
    assert [label.get_text() for label in axes.get_yticklabels()][1] == "crackle\nn = 649"
    np.testing.assert_allclose(axes.images[0].get_array()[1], np.array(counts[1]) / 649)
    pixels = imread(tmp_path / "confusion.png")
    assert min(pixels.shape[:2]) > 400
    assert pixels.std() > 0.05


def test_confusion_matrix_of_another_size_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"4 classes but a confusion matrix of shape \(3, 3\)"):
        plot_confusion_matrix(np.eye(3), CLASSES, tmp_path / "confusion.png", "")


def test_training_curves_hold_the_log(tmp_path, figures):
    plot_training_curves(LOG, tmp_path / "curves.png")
    loss, scores = figures[0].axes
    lines = {line.get_label(): line.get_xydata().tolist() for axes in (loss, scores) for line in axes.lines}
    assert lines["training"] == [[0.5, 1.4], [1.0, 1.1]]
    assert lines["evaluation"] == [[1.0, 1.2], [2.0, 1.0], [3.0, 0.9]]
    assert lines["Score (4-class)"] == [[1.0, 50.0], [3.0, 60.0]]
    assert lines["Sp"] == [[1.0, 70.0], [3.0, 80.0]]
    assert "Score (2-class)" not in lines
    assert imread(tmp_path / "curves.png").std() > 0.02


@pytest.mark.parametrize("name", TASKS)
def test_training_curves_hold_every_score_of_the_task(tmp_path, figures, name):
    task = TASKS[name]
    scores = {f"eval_{score}": 10.0 + place for place, score in enumerate(task.titles)}
    plot_training_curves([{"eval_loss": 1.0, **scores, "epoch": 1.0, "step": 1}], tmp_path / "curves.png", task)
    lines = {line.get_label(): line for line in figures[0].axes[1].lines}
    drawn = {label: line.get_ydata().tolist() for label, line in lines.items()}
    assert drawn == {title: [10.0 + place] for place, title in enumerate(task.titles.values())}
    assert max(lines, key=lambda label: lines[label].get_linewidth()) == task.titles[task.headline]
    assert len({line.get_color() for line in lines.values()}) == len(lines)


def test_loss_stands_alone_without_evaluation(tmp_path, figures):
    plot_training_curves(LOG[:2], tmp_path / "curves.png")
    assert len(figures[0].axes) == 1


def test_one_evaluation_is_a_visible_point(tmp_path, figures):
    plot_training_curves(LOG[:3], tmp_path / "curves.png")
    assert [line.get_marker() for line in figures[0].axes[1].lines] == ["o", "o"]


def test_empty_log_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no loss and no score in its 1 entries"):
        plot_training_curves(LOG[-1:], tmp_path / "curves.png")


def test_pyplot_and_with_it_the_global_backend_stay_untouched(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it now raises
    importlib.reload(plots).plot_training_curves(LOG, tmp_path / "curves.png")
    plots.plot_confusion_matrix(np.eye(4), CLASSES, tmp_path / "confusion.png", "")
    assert {path.name for path in tmp_path.iterdir()} == {"curves.png", "confusion.png"}


def texts(figure):
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def test_benchmark_shows_mean_deviation_interval_and_what_was_published(tmp_path, figures):
    lines = [
        ScoreLine("ce", 59.5, 1.5, [55.0, 63.0], 59.55),
        ScoreLine("one seed", 61.0, None, None),
        ScoreLine("undefined", None, None, None, 62.01),
    ]
    plot_benchmark(lines, tmp_path / "benchmark.png", "icbhi test", "Score (4-class)", "ce")
    (axes,) = figures[0].axes
    drawn = [[np.asarray(part, dtype=float).tolist() for part in line.get_data()] for line in axes.lines]
    assert [[59.5, 59.5], [0, 1]] in drawn  # the baseline's rule, over the axes' whole height
    assert [[58.0, 61.0], [0, 0]] in drawn
    assert [[55.0, 63.0], [0, 0]] in drawn
    assert [[59.55], [0]] in drawn
    assert [[61.0], [1]] in drawn
    assert [x for x, y in drawn if y == [2]] == [[62.01]]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["ce", "one seed", "undefined"]
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the first on top
    assert {"published", "baseline, ce", "Score (4-class), percent"} <= set(texts(figures[0]))
    plot_benchmark(lines[1:2], tmp_path / "other.png", "", "Score", "ce")
    assert not {"published", "baseline, ce"} & set(texts(figures[1]))


def test_confusion_matrices_stand_side_by_side(tmp_path, figures):
    matrices = {f"row {n}": np.eye(4, dtype=int) * (10 + n) + 1 for n in range(4)}
    plot_confusion_matrices(matrices, CLASSES, tmp_path / "matrices.png", "icbhi test")
    shown = [axes for axes in figures[0].axes if axes.images]
    assert [axes.get_title(loc="left") for axes in shown] == list(matrices)
    for axes, counts in zip(shown, matrices.values(), strict=True):
        np.testing.assert_allclose(axes.images[0].get_array(), counts / counts.sum(axis=1, keepdims=True))
    assert len({axes.get_position().y0 for axes in shown}) == 2  # three in a line
    with pytest.raises(ValueError, match=r"4 classes but a confusion matrix of shape \(2, 2\)"):
        plot_confusion_matrices({"a": np.eye(2)}, CLASSES, tmp_path / "m.png", "")


def test_sensitivity_is_sorted_and_logarithmic_where_values_call_for_it(tmp_path, figures):
    plot_sensitivity([0.1, 0.01, 0.03], [3.0, 1.0, 2.0], [0.5, None, 0.2], tmp_path / "rho.png", "", "rho", "Score")
    plot_sensitivity([0.0, 0.5, 1.0], [3.0, 1.0, 2.0], [0.5, 0.1, 0.2], tmp_path / "share.png", "", "share", "Score")
    rho, share = (figure.axes[0] for figure in figures)
    assert rho.get_xscale() == "log"
    assert share.get_xscale() == "linear"
    assert rho.lines[0].get_xydata().tolist() == [[0.01, 1.0], [0.03, 2.0], [0.1, 3.0]]
    bars = rho.collections[0].get_segments()
    assert not bars[0].size  # one seed has no deviation
    np.testing.assert_allclose(bars[2], [[0.1, 2.5], [0.1, 3.5]])
    assert [label.get_text() for label in rho.get_xticklabels()] == ["0.01", "0.03", "0.1"]


def test_quality_histogram_is_in_percent_of_each_class(tmp_path, figures):
    quality, labels = [0.1, 0.1, 0.1, 0.9, 1.0], [0, 0, 0, 0, 2]
    plot_quality_histogram(quality, labels, CLASSES, tmp_path / "quality.png", "icbhi train")
    steps = {patch.get_label(): patch.get_data() for patch in figures[0].axes[0].patches}
    assert list(steps) == ["normal: n = 4, 0.30 ± 0.35", "wheeze: n = 1, 1.00 ± 0.00"]
    for data, expected in zip(steps.values(), ({2: 75.0, 22: 25.0}, {24: 100.0}), strict=True):
        assert {bin_: value for bin_, value in enumerate(data.values) if value} == expected
        np.testing.assert_allclose(data.edges, np.linspace(0, 1, 26))


def test_embedding_map_shows_clusters_by_class_and_group(tmp_path, figures):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 60)
    groups = np.where(np.arange(60) % 2, "icbhi", "sprsound").tolist()
    embeddings = rng.normal(size=(60, 8)) + 20 * labels[:, None]
    plot_embedding_map(embeddings, labels, CLASSES, groups, tmp_path / "map.png", "", "dataset")
    by_class, by_group = figures[0].axes
    first, second = (axes.collections[0] for axes in (by_class, by_group))
    np.testing.assert_array_equal(first.get_offsets(), second.get_offsets())
    colours = [tuple(colour) for colour in first.get_facecolors()]
    places = np.asarray(first.get_offsets())
    centres = [places[[c == colour for c in colours]].mean(axis=0) for colour in set(colours)]
    assert len(centres) == 2
    spread = max(np.std(places[[c == colour for c in colours]], axis=0).max() for colour in set(colours))
    assert np.linalg.norm(centres[0] - centres[1]) > 2 * spread
    assert by_group.get_title(loc="left") == "by dataset"
    legend = by_class.get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["normal", "crackle"]


def test_attention_shares_the_spectrograms_axes(tmp_path, figures):
    # 48 frames and 128 bands in patches of 16 every 8 frames and 16 bands: 5 x 8.
    features, attention = np.random.default_rng(0).normal(size=(48, 128)), np.full((5, 8), 0.02)
    attention[3, 1] = 0.2
    sizes = {"patch_size": 16, "time_stride": 8, "frequency_stride": 16}
    plot_attention(features, attention, tmp_path / "attention.png", "a crackle", **sizes)
    top, bottom = (axes for axes in figures[0].axes if axes.get_ylabel() == "frequency")
    np.testing.assert_allclose(top.images[0].get_array(), features.T)
    assert top.images[0].get_extent() == [0, pytest.approx(0.48), 0, 128]
    mesh = bottom.collections[0]
    # Patch (3, 1) covers the frames 24 to 40 and the bands 16 to 32; its centre is at 0.32 s and band 24.
    values = mesh.get_array().reshape(8, 5)
    assert np.unravel_index(values.argmax(), values.shape) == (1, 3)
    assert values.mean() == pytest.approx(1)
    corners = mesh.get_coordinates()
    np.testing.assert_allclose(corners[1:3, 3:5].mean(axis=(0, 1)), [0.32, 24])
    # 1 kHz lies in the band whose centre is nearest: bands are equally spaced in mel, from 20 Hz to 8 kHz.
    mel = 1127 * np.log(1 + np.array([20, 1000, 8000]) / 700)
    band = (mel[1] - mel[0]) / ((mel[2] - mel[0]) / 129) - 1
    ticks = {label.get_text(): place for label, place in zip(top.get_yticklabels(), top.get_yticks(), strict=True)}
    assert ticks["1 kHz"] == pytest.approx(band + 0.5)
    with pytest.raises(ValueError, match=r"attention of shape \(8, 5\), but features of \(48, 128\) have \(5, 8\)"):
        plot_attention(features, attention.T, tmp_path / "wrong.png", "", **sizes)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda path: plot_benchmark([], path, "", "", ""), "no rows to draw"),
        (lambda path: plot_confusion_matrices({}, CLASSES, path, ""), "no confusion matrices"),
        (lambda path: plot_quality_histogram([0.5, 1.5], [0, 1], CLASSES, path, ""), "scores from 0.5 to 1.5"),
        (lambda path: plot_quality_histogram([], [], CLASSES, path, ""), "at least one"),
        (lambda path: plot_quality_histogram([0.5], [0], list("abcdefgh"), path, ""), "8 categories, more than the 7"),
        (
            lambda path: plot_embedding_map(np.eye(3), [0] * 3, CLASSES, ["a"] * 3, path, "", ""),
            "3 embeddings, 3 labels, 3 groups",
        ),
    ],
)
def test_what_cannot_be_drawn_is_named(tmp_path, call, message):
    with pytest.raises(ValueError, match=message) as error:
        call(tmp_path / "figure.png")
    assert "figure.png" in str(error.value)


def test_areas_are_means_over_seeds_and_probabilities_alone_have_a_reliability(tmp_path, figures):
    rng = np.random.default_rng(0)
    poor = rng.random(200) < 0.3
    scores = {"loudness": rng.random((3, 200)), "loud": np.where(poor, 0.25, 0.85)[None]}
    plot_discrimination(scores, ["loud"], poor, tmp_path / "label.png")
    roc, reliability = figures[0].axes
    area = np.mean([roc_auc_score(poor, -one) for one in scores["loudness"]])
    assert [text.get_text() for text in roc.get_legend().texts] == [f"loudness: {area:.3f}", "loud: 1.000"]
    _, drawn = reliability.lines
    np.testing.assert_allclose(drawn.get_data(), [[0.25, 0.85], [0, 1]])
    plot_discrimination(scores, [], poor, tmp_path / "label.png")
    assert len(figures[1].axes) == 1

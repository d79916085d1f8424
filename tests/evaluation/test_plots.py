import importlib
import sys

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from modeling_qlung.evaluation import plots
from modeling_qlung.evaluation.plots import plot_confusion_matrix, plot_training_curves

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
    assert lines["Specificity"] == [[1.0, 70.0], [3.0, 80.0]]
    assert "Score (2-class)" not in lines
    assert imread(tmp_path / "curves.png").std() > 0.02


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

"""How far a cycle's duration alone goes: a baseline without a single sample of sound.

    python -m modeling_qlung.evaluation.duration sprsound --data_dir SPRSOUND

Cycles and events are cut by those who annotate them, and crackles and wheezes are cut shorter than breaths. Cyclic
padding shows a model how long a cut is, by the period of its repetition, and zero padding by where it ends. What
duration alone scores, no model of cut cycles should be praised for.
"""

import argparse
from collections.abc import Sequence

import datasets
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.ensemble import GradientBoostingClassifier
from sklearn.utils.class_weight import compute_sample_weight

import hf_datasets

from .report import format_scores, score_predictions
from .tasks import FOUR_CLASS


def predict(durations: NDArray, labels: NDArray, unseen: NDArray) -> NDArray:
    """Predict classes from durations alone.

    Args:
        durations: of training cycles (n,), in s.
        labels: their class indices (n,).
        unseen: durations of other cycles (m,), in s.

    Returns:
        Class indices (m,), of boosted trees that weigh all classes alike.
    """
    trees = GradientBoostingClassifier(random_state=0)
    trees.fit(durations[:, None], labels, sample_weight=compute_sample_weight("balanced", labels))
    return trees.predict(unseen[:, None])


def score(train: datasets.Dataset, tests: dict[str, datasets.Dataset]) -> dict:
    """Score the cycles of each test, as `report.score_predictions` does, by their durations.

    Args:
        train: rows of `hf_datasets.load(...)`; those without a label are left out.
        tests: the same, by name.
    """
    parts = []
    durations, labels = _durations(train), np.array(train["label"][:], dtype=float)
    known = ~np.isnan(labels)
    for name, test in tests.items():
        predicted = predict(durations[known], labels[known].astype(int), _durations(test))
        columns = {"patient_id": test["patient_id"][:], "label": test["label"][:], "prediction": predicted}
        parts.append(pd.DataFrame(columns).assign(split=name, row_id=np.arange(len(test)).astype(str)))
    return score_predictions(pd.concat(parts), FOUR_CLASS)


def _durations(rows: datasets.Dataset) -> NDArray:
    return np.array(rows["end"][:]) - np.array(rows["start"][:])


def main(argv: Sequence[str] | None = None) -> None:
    """Print what durations alone score on the tests of a dataset."""
    parser = argparse.ArgumentParser("python -m modeling_qlung.evaluation.duration", description=main.__doc__)
    parser.add_argument("dataset", choices=["icbhi", "sprsound"])
    parser.add_argument("--data_dir", help="folder of the dataset; left out: downloaded")
    parser.add_argument("--allow_missing_audio", action="store_true", help="work on the recordings that are there")
    args = parser.parse_args(argv)
    tests = dict(hf_datasets.load(args.dataset, args.data_dir, allow_missing_audio=args.allow_missing_audio))
    train = tests.pop("train")
    print(format_scores(score(train, tests), FOUR_CLASS))


if __name__ == "__main__":
    main()

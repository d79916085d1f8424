"""Run on two processes, with input of several lengths; every check is made on each of them."""

import copy
import sys
from pathlib import Path
from typing import Any

import torch

from modeling_qlung.training.losses import CrossEntropyLoss
from modeling_qlung.training.trainer import leave_process_group
from tests.training.small_training import batches, cycles, gradient_at, mean, train_by_hand
from tests.training.test_buckets import alone, bucket_trainer

CPU: dict[str, Any] = {"use_cpu": True, "ddp_backend": "gloo"}


def check_training(folder: Path) -> None:
    """Both processes take batches of one length in every step, and follow plain SGD on both."""
    trainer = bucket_trainer(folder, train=cycles(64), num_train_epochs=2, **CPU)
    by_hand, loss = copy.deepcopy(trainer.model), CrossEntropyLoss(scale=10.0)
    made = [pair for epoch in (0, 1) for pair in zip(*[iter(batches(trainer, epoch))] * 2, strict=True)]
    lengths = [{batch["input_values"].shape[1] for batch in pair} for pair in made]
    assert all(len(length) == 1 for length in lengths)
    assert len(set.union(*lengths)) == 3
    trainer.train()
    rule = lambda model, pair, _: mean([gradient_at(model, batch, loss) for batch in pair])  # noqa: E731
    train_by_hand(by_hand, [list(pair) for pair in made], rule, rate=0.01)
    for (name, ours), theirs in zip(trainer.model.named_parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-3, msg=name)


def check_evaluation(folder: Path) -> None:
    """13 rows over two processes with batches of 4: each once, in order, at its own length."""
    rows = cycles(13, seed=4)
    trainer = bucket_trainer(folder, per_device_eval_batch_size=4, **CPU)
    predicted = trainer.predict(rows)
    assert predicted.label_ids.tolist() == rows["label"][:]
    expected = alone(trainer.model.eval(), trainer.feature_extractor, rows)
    torch.testing.assert_close(torch.from_numpy(predicted.predictions), expected, atol=1e-4, rtol=0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    check_training(Path(sys.argv[1]) / "training")
    check_evaluation(Path(sys.argv[1]) / "evaluation")
    leave_process_group()
    print("every check passed")

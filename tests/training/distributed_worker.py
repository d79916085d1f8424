"""Run by torchrun on two processes; every check is made on each of them."""

import copy
import sys
from pathlib import Path
from typing import Any

import torch

from modeling_qlung.training.losses import AdaFaceLoss
from modeling_qlung.training.objectives import build_objective
from modeling_qlung.training.sharpness import SharpnessAwareStep
from modeling_qlung.training.trainer import leave_process_group
from tests.training.small_training import batches, cycles, gradient_at, make_trainer, mean, small_model, train_by_hand
from tests.training.test_objectives import DEVICES, gradients, rows
from tests.training.test_sharpness import ALPHA, LOSS, RHO, rule
from tests.training.test_trainer import StopAt, last_whole_checkpoint

DDP: dict[str, Any] = {"use_cpu": True, "ddp_backend": "gloo"}


def check_training(folder: Path, method: str) -> None:
    """Two processes with batches of 4 follow the documented rule: each climbs its own ε, gradients are averaged."""
    sharpness = None if method == "plain" else SharpnessAwareStep(method, RHO, ALPHA, interval=2)
    trainer = make_trainer(folder, sharpness=sharpness, num_train_epochs=2, **DDP)
    by_hand = copy.deepcopy(trainer.model)
    steps = [made[start : start + 2] for made in (batches(trainer, 0), batches(trainer, 1)) for start in range(0, 8, 2)]
    trainer.train()
    if method == "plain":
        hand_rule = lambda model, micro, _: mean([gradient_at(model, batch, LOSS) for batch in micro])  # noqa: E731
    else:
        hand_rule = rule(method, {})
    train_by_hand(by_hand, steps, hand_rule)
    for ours, theirs in zip(trainer.model.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=5e-6, rtol=1e-3)
    check_agreement(trainer)


def check_agreement(trainer) -> None:
    """Every process holds the same bits."""
    ours = torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])
    gathered = [torch.empty_like(ours) for _ in range(2)]
    torch.distributed.all_gather(gathered, ours)
    assert torch.equal(gathered[0], gathered[1])


def check_evaluation(folder: Path) -> None:
    """13 rows over two processes with batches of 4: each once, in order."""
    rows = cycles(13, seed=4)
    trainer = make_trainer(folder, per_device_eval_batch_size=4, **DDP)
    together = trainer.predict(rows)
    assert together.predictions.shape == (13, 4)
    assert together.label_ids.tolist() == rows["label"][:]
    batch = trainer.data_collator([rows[index] for index in range(13)])
    with torch.no_grad():
        trainer.model.eval()
        expected = trainer.model(trainer.feature_extractor.extract_features(batch["clips"])).logits
    torch.testing.assert_close(torch.from_numpy(together.predictions), expected, atol=1e-4, rtol=0)


def check_resuming(folder: Path) -> None:
    """Stopped within the second epoch and resumed: the same bits as never stopped, running statistics too."""
    options: dict[str, Any] = {
        "num_train_epochs": 3,
        "save_strategy": "steps",
        "save_steps": 6,
        "sampling_power": 1.0,
        **DDP,
    }
    whole = make_trainer(
        folder / "whole",
        sharpness=SharpnessAwareStep("looksam", RHO, ALPHA, 4),
        loss=AdaFaceLoss(scale=10.0),
        **options,
    )
    whole.train()
    stopped = make_trainer(
        folder / "parts",
        sharpness=SharpnessAwareStep("looksam", RHO, ALPHA, 4),
        loss=AdaFaceLoss(scale=10.0),
        callbacks=[StopAt(6)],
        **options,
    )
    stopped.train()
    resumed = make_trainer(
        folder / "parts",
        sharpness=SharpnessAwareStep("looksam", RHO, ALPHA, 4),
        loss=AdaFaceLoss(scale=10.0),
        **options,
    )
    resumed.train(resume_from_checkpoint=last_whole_checkpoint(folder / "parts"))
    assert resumed.state.global_step == whole.state.global_step == 12
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert resumed.loss.num_batches == whole.loss.num_batches == 12
    assert resumed.loss.state_dict() == whole.loss.state_dict()
    check_agreement(resumed)


def check_random_numbers(folder: Path) -> None:
    """Each process drops and masks on its own."""
    trainer = make_trainer(folder, num_train_epochs=1, **DDP)
    trainer.train()
    drawn = torch.rand(4)
    gathered = [torch.empty_like(drawn) for _ in range(2)]
    torch.distributed.all_gather(gathered, drawn)
    assert not torch.equal(gathered[0], gathered[1])


def check_contrast(folder: Path) -> None:
    """Each process contrasts within its own batch, and gradients are averaged, the projector's too."""
    objective, by_hand_objective = (build_objective("device_contrast", target_gradient=True) for _ in range(2))
    model = small_model(audio_config={"initializer_range": 0.3})
    # A fresh AST's zeros, and embeddings that are nearly alike, would magnify roundings in layer and batch norm.
    torch.nn.init.normal_(model.qlung.encoder.embeddings.position_embeddings)
    trainer = make_trainer(folder, model, rows(), learning_rate=0.005, objective=objective, devices=DEVICES, **DDP)
    by_hand, projector, made = copy.deepcopy(trainer.model), trainer.model.projector, batches(trainer)
    before = copy.deepcopy(projector)
    by_hand_projector = by_hand_objective.projector = by_hand.projector

    def average(model, micro, _):
        views = [{**batch, "second_view": batch["input_values"]} for batch in micro]
        return mean([gradients(by_hand_objective(model, batch, LOSS)[0], model) for batch in views])

    trainer.train()
    train_by_hand(by_hand, [made[start : start + 2] for start in range(0, 8, 2)], average, rate=0.005)
    by_hand_objective.detach(by_hand)
    for ours, theirs in ((trainer.model, by_hand), (projector, by_hand_projector)):
        for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(one, other, atol=5e-6, rtol=1e-3)
    assert not torch.equal(projector[3].weight, before[3].weight)
    check_agreement(trainer)


def check_objectives(folder: Path) -> None:
    """Processes stay in step over the uneven ends of epochs, sharpness-aware too."""
    for name in ("patch_mix", "patch_mix_contrast", "device_contrast"):
        trainer = make_trainer(
            folder / name,
            train=rows(18),
            objective=build_objective(name),
            devices=DEVICES,
            sharpness=SharpnessAwareStep("sam", RHO),
            num_train_epochs=2,
            logging_strategy="steps",
            logging_steps=1,
            **DDP,
        )
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert trainer.state.global_step == len(losses) == 6
        assert torch.tensor(losses).isfinite().all()
        check_agreement(trainer)


if __name__ == "__main__":
    torch.set_num_threads(1)
    root = Path(sys.argv[1])
    for name in ("plain", "sam", "asam", "gsam", "looksam"):
        check_training(root / name, name)
    check_evaluation(root / "evaluation")
    check_resuming(root)
    check_contrast(root / "contrast")
    check_objectives(root / "objectives")
    check_random_numbers(root / "random")
    leave_process_group()
    print("every check passed")

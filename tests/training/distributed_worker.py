"""Run on two processes; every check is made on each of them."""

import copy
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.state import DistributedType, PartialState
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import EvalPrediction

import modeling_qlung
from modeling_qlung import QLungForAudioClassification
from modeling_qlung.evaluation.tasks import FOUR_CLASS
from modeling_qlung.training.losses import AdaFaceLoss
from modeling_qlung.training.objectives import build_objective
from modeling_qlung.training.sharpness import SharpnessAwareStep
from modeling_qlung.training.trainer import QLungTrainer, compute_scores, leave_process_group
from tests.training.small_training import batches, cycles, gradient_at, make_trainer, mean, small_model, train_by_hand
from tests.training.test_objectives import DEVICES, gradients, rows
from tests.training.test_sharpness import ALPHA, LOSS, RHO, rule
from tests.training.test_trainer import StopAt, last_whole_checkpoint

CPU: dict[str, Any] = {"use_cpu": True, "ddp_backend": "gloo"}
PUBLISHED = sorted(path.name for path in Path(modeling_qlung.__file__).parent.glob("*_qlung.py"))
SHARDED = os.environ.get("ACCELERATE_USE_FSDP") == "true"


def shard_on_cpus() -> None:
    """Let CPUs pass for GPUs: on CPUs Accelerate takes DDP where FSDP is asked for, without a word."""
    torch.distributed.init_process_group("gloo")
    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)
    PartialState.set_device = lambda state: setattr(state, "device", torch.device("cpu"))


def steady_model() -> QLungForAudioClassification:
    """A fresh AST's zeros, and embeddings that are nearly alike, would magnify roundings in layer and batch norm."""
    model = small_model(audio_config={"initializer_range": 0.3})
    for parameter in model.qlung.encoder.embeddings.parameters(recurse=False):
        torch.nn.init.normal_(parameter)
    return model


def joined(batches: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The batches of both processes in one: what one process would be given."""
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def whole(parameters: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """The parameters, put together from both processes' shards where they are sharded."""
    detached = (parameter.detach() for parameter in parameters)
    return [part.full_tensor() if isinstance(part, DTensor) else part for part in detached]


def check_training(folder: Path, method: str, accumulation: int = 1) -> None:
    """Two processes with batches of 4 follow the documented rule, their losses too.

    Plain, that of one process with batches of 8. Sharpness-aware, under DDP each climbs its own ε and gradients are
    averaged; under FSDP2 both climb that of the batch of 8.
    """
    sharpness = None if method == "plain" else SharpnessAwareStep(method, RHO, ALPHA, interval=2)
    options: dict[str, Any] = {
        "learning_rate": 0.01,
        "num_train_epochs": 2,
        "gradient_accumulation_steps": accumulation,
        "eval_strategy": "epoch",
        "eval_dataset": cycles(5, seed=3),
        "logging_strategy": "steps",
        "logging_steps": 1,
    }
    trainer = make_trainer(folder, steady_model(), sharpness=sharpness, **options, **CPU)
    by_hand, losses = copy.deepcopy(trainer.model), []
    made = [batch for epoch in (0, 1) for batch in batches(trainer, epoch)]
    steps = [made[start : start + 2 * accumulation] for start in range(0, len(made), 2 * accumulation)]
    trainer.train()
    assert isinstance(trainer.model_wrapped, FSDPModule) == SHARDED
    hand_rule = rule(method, {})

    def follow(model, micro_batches, step):
        globally = [joined(micro_batches[start : start + 2]) for start in range(0, len(micro_batches), 2)]
        with torch.no_grad():
            losses.append(mean_loss(model, globally))
        if method == "plain":
            return mean([gradient_at(model, batch, LOSS) for batch in globally])
        return hand_rule(model, globally if SHARDED else micro_batches, step)

    train_by_hand(by_hand, steps, follow, rate=0.01)
    for (name, ours), theirs in zip(trainer.model.named_parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(whole([ours])[0], theirs, atol=1e-5, rtol=0, msg=name)
    theirs = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    torch.testing.assert_close(torch.tensor(theirs), torch.tensor(losses), atol=1e-5, rtol=1e-5)
    check_agreement(trainer)


def mean_loss(model, batches: list[dict[str, torch.Tensor]]) -> float:
    return float(torch.stack([LOSS(model(batch["input_values"]).cosines, batch["labels"]) for batch in batches]).mean())


def check_agreement(trainer) -> None:
    """Every process holds the same bits."""
    ours = torch.cat([parameter.flatten() for parameter in whole(trainer.model.parameters())])
    gathered = [torch.empty_like(ours) for _ in range(2)]
    torch.distributed.all_gather(gathered, ours)
    assert torch.equal(gathered[0], gathered[1])


def check_epoch(folder: Path) -> None:
    """19 rows in batches of 4: none lost, and none twice but those with which Accelerate fills the last step."""
    trainer = make_trainer(folder, train=cycles(19), **CPU)
    assert trainer.sampler is not None
    order, take = list(trainer.sampler), trainer.data_collator
    seen: list[int] = []

    def watch(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        seen.extend(int(row["recording_id"].removeprefix("recording")) for row in rows)
        return take(rows)

    trainer.data_collator = watch
    assert len(list(trainer.get_train_dataloader())) == 3
    everyone: list[list[int]] = [[], []]
    torch.distributed.all_gather_object(everyone, seen)
    assert sorted([*everyone[0], *everyone[1]]) == sorted([*order, *order[:5]]), f"{order} became {everyone}"


def check_evaluation(folder: Path) -> None:
    """13 rows over two processes with batches of 4: each once, in order, and scored once."""
    rows = cycles(13, seed=4)
    trainer = make_trainer(folder, per_device_eval_batch_size=4, max_steps=1, **CPU)
    trainer.train()
    together = trainer.predict(rows)
    assert together.predictions.shape == (13, 4)
    assert together.label_ids.tolist() == rows["label"][:]
    model = saved(trainer, folder)
    batch = trainer.data_collator([rows[index] for index in range(13)])
    with torch.no_grad():
        expected = model(trainer.feature_extractor.extract_features(batch["clips"])).logits
    torch.testing.assert_close(torch.from_numpy(together.predictions), expected, atol=1e-4, rtol=0)
    scores = compute_scores(FOUR_CLASS)(EvalPrediction(expected.numpy(), together.label_ids))
    for name, score in scores.items():
        torch.testing.assert_close(together.metrics[f"test_{name}"], score, equal_nan=True)


def saved(trainer, folder: Path) -> QLungForAudioClassification:
    """The model as `from_pretrained` opens it, every parameter that of the Trainer, and with its own code."""
    trainer.save_model(str(folder / "saved"))
    trainer.accelerator.wait_for_everyone()
    model = QLungForAudioClassification.from_pretrained(folder / "saved").eval()
    ours = dict(zip(dict(trainer.model.named_parameters()), whole(trainer.model.parameters()), strict=True))
    assert ours.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, ours[name]), name
    assert model.config.auto_map["AutoModelForAudioClassification"] == "modeling_qlung.QLungForAudioClassification"
    assert sorted(path.name for path in (folder / "saved").glob("*.py")) == PUBLISHED
    return model


def check_resuming(folder: Path) -> None:
    """Stopped within the second epoch and resumed: the same bits as never stopped, running statistics too."""
    options: dict[str, Any] = {
        "num_train_epochs": 3,
        "save_strategy": "steps",
        "save_steps": 6,
        "sampling_power": 1.0,
        "optim": "adamw_torch",
        "learning_rate": 0.001,
        **CPU,
    }

    def start(name: str, **more) -> QLungTrainer:
        method = "sam" if SHARDED else "looksam"  # whose direction is not kept where it is sharded
        sharpness, loss = SharpnessAwareStep(method, RHO, ALPHA, 4), AdaFaceLoss(scale=10.0)
        return make_trainer(folder / name, sharpness=sharpness, loss=loss, **options, **more)

    never_stopped = start("whole")
    never_stopped.train()
    start("parts", callbacks=[StopAt(6)]).train()
    resumed = start("parts")
    resumed.train(resume_from_checkpoint=last_whole_checkpoint(folder / "parts"))
    assert resumed.state.global_step == never_stopped.state.global_step == 12
    for ours, theirs in zip(*(whole(trainer.model.parameters()) for trainer in (resumed, never_stopped)), strict=True):
        assert torch.equal(ours, theirs)
    assert resumed.loss.num_batches == never_stopped.loss.num_batches == 12
    assert resumed.loss.state_dict() == never_stopped.loss.state_dict()
    check_agreement(resumed)


def check_random_numbers(folder: Path) -> None:
    """Each process drops and masks on its own."""
    trainer = make_trainer(folder, num_train_epochs=1, **CPU)
    trainer.train()
    drawn = torch.rand(4)
    gathered = [torch.empty_like(drawn) for _ in range(2)]
    torch.distributed.all_gather(gathered, drawn)
    assert not torch.equal(gathered[0], gathered[1])


def check_contrast(folder: Path) -> None:
    """Each process contrasts within its own batch, and gradients are averaged, the projector's too."""
    objective, by_hand_objective = (build_objective("device_contrast", target_gradient=True) for _ in range(2))
    options: dict[str, Any] = {"learning_rate": 0.005, "objective": objective, "devices": DEVICES}
    trainer = make_trainer(folder, steady_model(), rows(), **options, **CPU)
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
            **CPU,
        )
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert trainer.state.global_step == len(losses) == 6
        assert torch.tensor(losses).isfinite().all()
        check_agreement(trainer)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if SHARDED:
        shard_on_cpus()
    root = Path(sys.argv[1])
    for name in ("plain", "sam", "asam", "gsam", "looksam"):
        check_training(root / name, name)
    for name in ("plain", "sam", "looksam"):
        check_training(root / name, name, accumulation=2)
    check_epoch(root / "epoch")
    check_evaluation(root / "evaluation")
    check_resuming(root)
    if not SHARDED:
        check_contrast(root / "contrast")
        check_objectives(root / "objectives")
        check_random_numbers(root / "random")
    leave_process_group()
    print("every check passed")

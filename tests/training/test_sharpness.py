import copy
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.fsdp import StateDictType

from modeling_qlung.training.losses import AdaFaceLoss, CrossEntropyLoss
from modeling_qlung.training.sharpness import SharpnessAwareStep, freeze_statistics

from ..benchmarks.sharpness import build, copies
from .small_training import batches, flat, gradient_at, make_trainer, mean, small_model, train_by_hand

RHO, ALPHA = 0.1, 0.7
LOSS = CrossEntropyLoss(scale=10.0)


def climbed(model, batch, method):
    """Gradient g and gradient g' of one micro-batch, straight from the papers' formulas."""
    g = gradient_at(model, batch, LOSS)
    if method == "asam":
        weights = {name: p.detach().double() for name, p in model.named_parameters()}
        norm = torch.cat([(weights[name].abs() * g[name].double()).flatten() for name in g]).norm()
        epsilon = {name: (RHO * weights[name] ** 2 * g[name].double() / norm).float() for name in g}
    else:
        epsilon = {name: (RHO * g[name].double() / flat(g).norm()).float() for name in g}
    return g, gradient_at(model, batch, LOSS, epsilon)


def rule(method, state):
    """The gradient for the optimiser, as documented in `sharpness.py`."""

    def gradient(model, micro_batches, step):
        if method == "looksam" and step % 2:
            g = mean([gradient_at(model, batch, LOSS) for batch in micro_batches])
            factor = ALPHA * flat(g).norm() / flat(state["v"]).norm()
            return {name: g[name] + factor * state["v"][name] for name in g}
        pairs = [climbed(model, batch, method) for batch in micro_batches]
        g, ascended = (mean([pair[index] for pair in pairs]) for index in (0, 1))
        dot = flat(g) @ flat(ascended)
        if method == "gsam":
            along = dot / flat(ascended).square().sum()
            return {name: ascended[name] - ALPHA * (g[name] - along * ascended[name]) for name in g}
        if method == "looksam":
            along = dot / flat(g).square().sum()
            state["v"] = {name: ascended[name] - along * g[name] for name in g}
        return ascended

    return gradient


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("method", ["sam", "asam", "gsam", "looksam"])
def test_training_equals_the_hand_written_rule(tmp_path, method, accumulation):
    """Eight batches of 4: eight steps, or four steps of 2 x batch 4."""
    sharpness = SharpnessAwareStep(method, RHO, ALPHA, interval=2)
    trainer = make_trainer(tmp_path, sharpness=sharpness, gradient_accumulation_steps=accumulation)
    by_hand, plain = copy.deepcopy(trainer.model), copy.deepcopy(trainer.model)
    made = batches(trainer)
    steps = [made[start : start + accumulation] for start in range(0, len(made), accumulation)]
    trainer.train()
    train_by_hand(by_hand, steps, rule(method, {}))
    train_by_hand(plain, steps, lambda model, micro, _: mean([gradient_at(model, batch, LOSS) for batch in micro]))
    moved = max((p - q).abs().max() for p, q in zip(trainer.model.parameters(), plain.parameters(), strict=True))
    for (name, ours), theirs in zip(trainer.model.named_parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=1e-4, msg=name)
    assert moved > 1e-4, "the sharpness-aware run does not differ from plain training"


def test_clipping_acts_on_the_gradient_at_the_climbed_weights(tmp_path):
    trainer = make_trainer(tmp_path, sharpness=SharpnessAwareStep("sam", RHO), max_grad_norm=0.5, max_steps=1)
    by_hand, batch = copy.deepcopy(trainer.model), batches(trainer)[0]
    _, ascended = climbed(by_hand, batch, "sam")
    norm = flat(ascended).norm()
    assert norm > 0.5
    trainer.train()
    train_by_hand(by_hand, [[batch]], lambda *_: {name: part * 0.5 / norm for name, part in ascended.items()})
    for ours, theirs in zip(trainer.model.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)


def started(trainer):
    """The trainer with what `train` would have prepared before the first step."""
    trainer.state.max_steps = 8
    trainer.current_gradient_accumulation_steps = 1
    trainer.create_optimizer_and_scheduler(8)
    return trainer


@pytest.mark.parametrize("method", ["sam", "asam", "gsam", "looksam"])
def test_weights_come_back_bit_by_bit(tmp_path, method):
    trainer = started(make_trainer(tmp_path, sharpness=SharpnessAwareStep(method, RHO)))
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.training_step(trainer.model, batches(trainer)[0])
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(parameter.grad is not None for parameter in trainer.model.parameters())


def test_weights_come_back_after_an_error_in_the_second_pass(tmp_path, monkeypatch):
    trainer = started(make_trainer(tmp_path, sharpness=SharpnessAwareStep("sam", RHO)))
    before = copy.deepcopy(trainer.model.state_dict())

    take_pass, passes = trainer.forward_backward, []

    def out_of_memory(*args):
        passes.append(args)
        if len(passes) == 1:
            return take_pass(*args)
        assert not torch.equal(trainer.model.head.weight, before["head.weight"]), "not climbed"
        raise torch.OutOfMemoryError

    monkeypatch.setattr(trainer, "forward_backward", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        trainer.training_step(trainer.model, batches(trainer)[0])
    assert len(passes) == 2
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())


def test_both_passes_drop_the_same_units(tmp_path):
    """With a vanishing radius the second pass is the first one, if the masks agree."""
    model = small_model(dropout=0.5, audio_config={"hidden_dropout_prob": 0.3})
    trainer = started(make_trainer(tmp_path, model, sharpness=SharpnessAwareStep("sam", 1e-9)))
    batch = batches(trainer)[0]
    gradients = []
    for sharpness in (trainer.sharpness, None):
        trainer.sharpness = sharpness
        model.zero_grad()
        torch.manual_seed(5)
        trainer.training_step(model, dict(batch))
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
        gradients.append(torch.rand(1))
    for sam, plain in zip(gradients[0], gradients[2], strict=True):
        assert (sam - plain).norm() <= 5e-3 * plain.norm() + 1e-3
    assert torch.equal(gradients[1], gradients[3]), "a step draws as many random numbers with SAM as without"


def test_statistics_move_once_per_step(tmp_path):
    trainer = started(make_trainer(tmp_path, loss=AdaFaceLoss(scale=10.0), sharpness=SharpnessAwareStep("sam", RHO)))
    trainer.training_step(trainer.model, batches(trainer)[0])
    assert trainer.loss.num_batches == 1


def test_frozen_batch_norm_does_not_move():
    norm = torch.nn.BatchNorm1d(3)
    with freeze_statistics(torch.nn.Sequential(norm)):
        frozen = norm(torch.randn(8, 3) + 5)
    assert torch.equal(norm.running_mean, torch.zeros(3))
    assert norm.num_batches_tracked == 0
    assert frozen.mean().abs() < 1e-5, "training still normalises by the batch"
    norm(torch.randn(8, 3) + 5)
    assert norm.num_batches_tracked == 1


@pytest.mark.parametrize("method", ["sam", "gsam", "looksam"])
def test_bfloat16_steps_are_near_those_of_float32(tmp_path, method):
    moved = []
    for bf16 in (False, True):
        trainer = make_trainer(tmp_path, sharpness=SharpnessAwareStep(method, RHO, interval=2), bf16=bf16)
        start = copy.deepcopy(trainer.model)
        trainer.train()
        moved.append(
            torch.cat([(p - q).flatten() for p, q in zip(trainer.model.parameters(), start.parameters(), strict=True)])
        )
    assert torch.nn.functional.cosine_similarity(moved[0], moved[1], dim=0) > 0.98


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "sharp"}, "'sharp'; choose one of sam, asam, gsam, looksam"),
        ({"rho": 0.0}, "rho is 0.0"),
        ({"interval": 0}, "interval is 0"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        SharpnessAwareStep(**options)


@pytest.mark.parametrize(("method", "most"), [("sam", 1), ("asam", 1), ("gsam", 2), ("looksam", 2)])
def test_a_step_holds_one_copy_of_the_parameters_more(tmp_path, method, most):
    """And one further for the decompositions, and for accumulated gradients."""
    encoder = {"hidden_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 512}
    steps, plain = (build(name, encoder, 0.5, 1, tmp_path) for name in (method, "plain"))
    held = copies(steps, plain)
    assert 0.9 < held < most + 0.1
    assert held < copies(steps, plain, micro_batches=2) < most + 1.1


@pytest.fixture
def sharded(monkeypatch):
    """Makes the next Trainer find itself under an engine that shards, as a launcher with GPUs would have it."""
    from accelerate.state import AcceleratorState
    from transformers import Trainer

    build_accelerator = Trainer.create_accelerator_and_postprocess

    def under(engine: str, state_dict: str = "FULL_STATE_DICT") -> None:
        def build_sharded(self):
            build_accelerator(self)
            if engine == "DeepSpeed":
                self.is_deepspeed_enabled = True
            else:
                plugin = SimpleNamespace(fsdp_version=int(engine[-1]), state_dict_type=StateDictType[state_dict])
                monkeypatch.setitem(AcceleratorState._shared_state, "fsdp_plugin", plugin)

        monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", build_sharded)

    return under


@pytest.mark.parametrize("engine", ["FSDP1", "FSDP2", "DeepSpeed"])
def test_sharded_engines_are_refused(tmp_path, engine, sharded):
    """FSDP2 is not, for sharpness-aware steps alone."""
    sharded(engine)
    step = SharpnessAwareStep("sam")
    if engine == "FSDP2":
        make_trainer(tmp_path, sharpness=step)
    else:
        with pytest.raises(ValueError, match=f"{engine} shards the parameters, and --sharpness cannot"):
            make_trainer(tmp_path, sharpness=step)
    with pytest.raises(ValueError, match=f"{engine} shards the parameters, and --ema_decay cannot"):
        make_trainer(tmp_path, ema_decay=0.9)
    make_trainer(tmp_path)


def test_an_engine_that_would_save_no_whole_checkpoint_is_refused(tmp_path, sharded):
    sharded("FSDP2", "SHARDED_STATE_DICT")
    with pytest.raises(ValueError, match=r"fsdp_state_dict_type is SHARDED_STATE_DICT.*set it to FULL_STATE_DICT"):
        make_trainer(tmp_path)

import copy
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from modeling_qlung import QLungForAudioClassification
from modeling_qlung.training.augmentation import SpecAugment
from modeling_qlung.training.losses import AdaFaceLoss, CrossEntropyLoss, QLungLoss
from modeling_qlung.training.objectives import (
    OBJECTIVES,
    DeviceContrast,
    Objective,
    PatchMix,
    PatchMixContrast,
    PatchMixture,
    Projector,
    Supervised,
    build_objective,
    mixed_patches,
    patch_mix_contrast,
    supervised_contrast,
)
from modeling_qlung.training.sharpness import SharpnessAwareStep
from modeling_qlung.training.trainer import last_whole_checkpoint

from .small_training import batches, cycles, make_trainer, small_model
from .test_sharpness import started
from .test_trainer import StopAt, assert_equal_weights, weights

DEVICES = ["A", "B", "C"]
SIDE = 16  # of patches that do not overlap: mixing their embeddings is then cutting and pasting the spectrogram
TILES = {"patch_size": SIDE, "frequency_stride": SIDE, "time_stride": SIDE}
CONTRASTIVE = ["patch_mix_contrast", "device_contrast"]


def rows(number: int = 32, seed: int = 0):
    """Cycles with a stethoscope each."""
    made = cycles(number, seed)
    return made.add_column("device", [DEVICES[(index // 3) % 3] for index in range(number)]).with_format(
        "numpy", columns=["waveform"], output_all_columns=True
    )


def trainer_of(folder: Path, objective: Objective, **options):
    return make_trainer(folder, train=rows(), objective=objective, devices=DEVICES, **options)


def batch_of(number: int = 5, seed: int = 1, dtype=torch.float64) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "input_values": torch.randn(number, 48, 128, generator=generator).to(dtype),
        "second_view": torch.randn(number, 48, 128, generator=generator).to(dtype),
        "labels": torch.tensor([0, 2, 2, 1, 0])[:number],
        "quality": torch.linspace(0.2, 0.9, 5)[:number].to(dtype),
        "device": torch.tensor([1, 0, 1, 1, 2])[:number],
    }


def attached(objective: Objective, **config) -> QLungForAudioClassification:
    """A model in float64, the objective's projector in it."""
    model = small_model(**config)
    objective.attach(model)
    return model.double()


def cosine(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return (one * other).sum() / (one.square().sum().sqrt() * other.square().sum().sqrt())


def written_patch_mix_contrast(mixed, unmixed, partners, share, temperature, labels=None):
    """The paper's equation, one exponential at a time."""
    total = torch.zeros((), dtype=torch.float64)
    for i in range(len(mixed)):
        partner = int(partners[i])
        kept = [
            j for j in range(len(mixed)) if labels is None or labels[j] != labels[i] or j in (i, partner)
        ]  # what i is compared with
        below = torch.stack([(cosine(mixed[i], unmixed[j]) / temperature).exp() for j in kept]).sum()
        for j, weight in ((i, share), (partner, 1 - share)):
            total = total - weight * ((cosine(mixed[i], unmixed[j]) / temperature).exp() / below).log()
    return total / len(mixed)


def written_supervised_contrast(first, second, classes, temperature):
    items = [*first, *second]
    kinds = [*classes.tolist(), *classes.tolist()]
    total = torch.zeros((), dtype=torch.float64)
    for i, anchor in enumerate(items):
        others = [j for j in range(len(items)) if j != i]
        below = torch.stack([(cosine(anchor, items[j]) / temperature).exp() for j in others]).sum()
        same = [j for j in others if kinds[j] == kinds[i]]
        for j in same:
            total = total - ((cosine(anchor, items[j]) / temperature).exp() / below).log() / len(same)
    return total / len(items)


def cut_and_paste(features: torch.Tensor, mixture: PatchMixture) -> torch.Tensor:
    """Mix spectrograms (batch, frames, mel) tile by tile, numbered frequency-major."""
    mixed, times = features.clone(), features.shape[1] // SIDE
    for patch in torch.nonzero(mixture.replaced).flatten().tolist():
        low, start = SIDE * (patch // times), SIDE * (patch % times)
        for item, partner in enumerate(mixture.partners.tolist()):
            tile = features[partner, start : start + SIDE, low : low + SIDE]
            mixed[item, start : start + SIDE, low : low + SIDE] = tile
    return mixed


# ---- Mixing ----


def test_a_draw_follows_the_published_rule():
    for seed in range(20):
        torch.manual_seed(seed)
        mixture = PatchMixture.draw(6, 50, 1.0)
        torch.manual_seed(seed)
        share = torch.distributions.Beta(1.0, 1.0).sample().item()
        assert mixture.replaced.sum() == math.floor(50 * (1 - share))
        assert mixture.share == pytest.approx(1 - math.floor(50 * (1 - share)) / 50)
        assert sorted(mixture.partners.tolist()) == list(range(6))
    torch.manual_seed(0)
    shares = torch.tensor([PatchMixture.draw(2, 1000, 0.2).share for _ in range(400)])
    # Beta(a, a) has mean 1/2 and variance 1 / (4 (2a + 1)).
    assert shares.mean() == pytest.approx(0.5, abs=0.08)
    assert shares.var() == pytest.approx(1 / 5.6, abs=0.02)


def test_every_patch_is_replaced_as_often():
    torch.manual_seed(0)
    counts = torch.stack([PatchMixture.draw(2, 10, 1.0).replaced.double() for _ in range(2000)]).mean(dim=0)
    assert torch.allclose(counts, torch.full((10,), 0.45, dtype=torch.float64), atol=0.05)  # E int(10 u) / 10


def test_mixing_patches_is_cutting_and_pasting_the_spectrogram():
    model = small_model(audio_config=TILES).double().eval()
    features = batch_of()["input_values"]
    torch.manual_seed(3)
    mixture = PatchMixture.draw(5, 24, 1.0)
    assert 0 < mixture.share < 1
    with mixed_patches(model, mixture):
        mixed = model(features).logits
    torch.testing.assert_close(mixed, model(cut_and_paste(features, mixture)).logits)
    assert (mixed - model(features).logits).abs().max() > 1e-3, "the hook is gone afterwards"


def test_the_hook_goes_after_an_error():
    model = small_model().double().eval()
    features, mixture = batch_of()["input_values"], PatchMixture(torch.tensor([1, 0]), torch.ones(7, dtype=torch.bool))
    before = model(features).logits
    with pytest.raises(RuntimeError), mixed_patches(model, mixture):
        model(features)
    assert torch.equal(model(features).logits, before)


# ---- Contrasts ----


@pytest.mark.parametrize("negatives", ["all", "other_class"])
@pytest.mark.parametrize("replaced", [0, 3, 10])
def test_patch_mix_contrast_equals_the_written_equation(replaced, negatives):
    torch.manual_seed(0)
    mixed, unmixed = torch.randn(2, 6, 4, dtype=torch.float64)
    partners, labels = torch.tensor([2, 1, 0, 5, 3, 4]), torch.tensor([0, 0, 1, 0, 2, 1])
    mixture = PatchMixture(partners, torch.arange(10) < replaced)
    given = labels if negatives == "other_class" else None
    for temperature in (0.06, 0.5):
        ours = patch_mix_contrast(mixed, unmixed, mixture, temperature, given)
        theirs = written_patch_mix_contrast(mixed, unmixed, partners, 1 - replaced / 10, temperature, given)
        torch.testing.assert_close(ours, theirs)


def test_supervised_contrast_equals_the_written_equation():
    torch.manual_seed(0)
    first, second = torch.randn(2, 6, 4, dtype=torch.float64)
    for classes in (torch.tensor([0, 3, 0, 1, 1, 0]), torch.arange(6), torch.zeros(6, dtype=torch.long)):
        ours = supervised_contrast(first, second, classes, 0.2)
        torch.testing.assert_close(ours, written_supervised_contrast(first, second, classes, 0.2))


def test_contrasts_have_right_gradients():
    torch.manual_seed(0)
    one, other = (torch.randn(4, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    mixture = PatchMixture(torch.tensor([1, 0, 2, 3]), torch.arange(5) < 2)
    labels = torch.tensor([0, 1, 0, 0])
    for given in (None, labels):
        assert torch.autograd.gradcheck(lambda a, b: patch_mix_contrast(a, b, mixture, 0.3, given), (one, other))  # noqa: B023
    assert torch.autograd.gradcheck(lambda a, b: supervised_contrast(a, b, labels, 0.3), (one, other))


@pytest.mark.parametrize("size", [1e-18, 1e-3, 1e4])
def test_contrasts_stay_finite(size):
    """At the published temperature, of tiny and huge embeddings, and in bfloat16."""
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        embeddings = (size * torch.randn(4, 8)).to(dtype).requires_grad_()
        mixture = PatchMixture(torch.tensor([1, 0, 3, 2]), torch.arange(4) < 2)
        value = patch_mix_contrast(embeddings, embeddings, mixture, 0.06, torch.zeros(4))
        value = value + supervised_contrast(embeddings, embeddings, torch.arange(4), 0.06)
        value.backward()
        assert value.dtype == torch.float32
        assert value.isfinite()
        assert embeddings.grad is not None
        assert embeddings.grad.isfinite().all()


# ---- Objectives against formulas written out on a copy of the model ----


def gradients(value: torch.Tensor, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    named = dict(model.named_parameters())
    return dict(zip(named, torch.autograd.grad(value, list(named.values()), materialize_grads=True), strict=True))


def assert_equal_gradients(one: torch.Tensor, model, other: torch.Tensor, copied) -> None:
    torch.testing.assert_close(one, other)
    ours, theirs = gradients(one, model), gradients(other, copied)
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], msg=name)


def test_supervised_is_the_loss_of_the_batch():
    model, batch, loss = small_model(head="linear").double(), batch_of(), CrossEntropyLoss()
    value, outputs = Supervised()(model, batch, loss)
    torch.testing.assert_close(value, F.cross_entropy(model(batch["input_values"]).logits, batch["labels"]))
    assert outputs.logits.shape == (5, 4)


@pytest.mark.parametrize("head", ["linear", "angular"])
def test_patch_mix_weighs_both_labels_by_their_shares(head):
    objective = PatchMix(mix_beta=0.7)
    model, batch = attached(objective, head=head, audio_config=TILES), batch_of()
    copied = copy.deepcopy(model)
    # The margins of QLung's loss depend on class and quality: the partner's own go with the partner's label.
    loss = (
        QLungLoss([40, 30, 20, 10], scale=10.0) if head == "angular" else CrossEntropyLoss(class_weights=[1, 2, 3, 4])
    )
    torch.manual_seed(8)
    value, _ = objective(model, batch, loss)
    torch.manual_seed(8)
    mixture = PatchMixture.draw(5, 24, 0.7)
    assert 0 < mixture.share < 1
    mixed = copied(cut_and_paste(batch["input_values"], mixture))
    labels, quality, p = batch["labels"], batch["quality"], mixture.partners
    if head == "linear":
        weighted = [
            F.cross_entropy(mixed.logits, y, torch.tensor([1.0, 2, 3, 4]).double()) for y in (labels, labels[p])
        ]
    else:
        weighted = [loss(mixed.cosines, labels, quality), loss(mixed.cosines, labels[p], quality[p])]
    expected = mixture.share * weighted[0] + (1 - mixture.share) * weighted[1]
    assert_equal_gradients(value, model, expected, copied)


def test_running_statistics_of_a_loss_count_a_mixed_batch_once():
    objective, loss = PatchMix(), AdaFaceLoss()
    objective(attached(objective), batch_of(), loss)
    assert loss.num_batches == 1


@pytest.mark.parametrize("negatives", ["all", "other_class"])
@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("gradient", [False, True])
def test_patch_mix_contrast_is_trained_as_written(projected, gradient, negatives):
    objective = PatchMixContrast(1.0, 0.7, 0.2, negatives, target_projector=projected, target_gradient=gradient)
    model, batch, loss = attached(objective, audio_config=TILES), batch_of(), CrossEntropyLoss(scale=10.0)
    copied = copy.deepcopy(model)
    torch.manual_seed(8)
    value, outputs = objective(model, batch, loss)
    torch.manual_seed(8)
    mixture = PatchMixture.draw(5, 24, 1.0)
    unmixed = copied(batch["input_values"])
    mixed = copied(cut_and_paste(batch["input_values"], mixture)).pooler_output
    target = copied.projector(unmixed.pooler_output) if projected else unmixed.pooler_output
    contrast = written_patch_mix_contrast(
        copied.projector(mixed),
        target if gradient else target.detach(),
        mixture.partners,
        mixture.share,
        0.2,
        batch["labels"] if negatives == "other_class" else None,
    )
    expected = F.cross_entropy(10 * unmixed.cosines, batch["labels"]) + 0.7 * contrast
    torch.testing.assert_close(outputs.cosines, unmixed.cosines)
    assert_equal_gradients(value, model, expected, copied)


@pytest.mark.parametrize("gradient", [False, True])
def test_device_contrast_is_trained_as_written(gradient):
    objective = DeviceContrast(0.7, 0.2, target_gradient=gradient)
    model, batch, loss = attached(objective), batch_of(), CrossEntropyLoss(scale=10.0)
    copied = copy.deepcopy(model)
    value, _ = objective(model, batch, loss)
    outputs = copied(batch["input_values"])
    first, second = (copied.projector(copied(batch[name]).pooler_output) for name in ("input_values", "second_view"))
    contrast = written_supervised_contrast(first, second if gradient else second.detach(), batch["device"], 0.2)
    expected = F.cross_entropy(10 * outputs.cosines, batch["labels"]) + 0.7 * contrast
    assert_equal_gradients(value, model, expected, copied)


def test_projector_is_the_written_layers():
    torch.manual_seed(0)
    projector, values = Projector(4, 3).double(), torch.randn(6, 4, dtype=torch.float64)
    first, norm, _, last = projector
    hidden = values @ first.weight.T + first.bias
    standardised = (hidden - hidden.mean(dim=0)) / (hidden.var(dim=0, unbiased=False) + norm.eps).sqrt()
    torch.testing.assert_close(projector(values), standardised.clamp_min(0) @ last.weight.T + last.bias)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_batch_of_one_is_trained_on(name):
    """The last batch of an epoch may be: no batch statistics, no NaN, and every parameter gets its gradient."""
    objective = build_objective(name)
    model = attached(objective)
    batch = {key: value[:1] for key, value in batch_of().items()}
    value, _ = objective(model, batch, CrossEntropyLoss(scale=10.0))
    value.backward()
    torch.testing.assert_close(value, F.cross_entropy(10 * model(batch["input_values"]).cosines, batch["labels"]))
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all()
        assert not (parameter_name.startswith("projector") and parameter.grad.any()), parameter_name


# ---- In the Trainer ----


@pytest.mark.parametrize("name", CONTRASTIVE)
def test_the_projector_is_trained_and_never_published(tmp_path, name):
    own = set(small_model().state_dict())
    trainer = trainer_of(tmp_path, build_objective(name), save_strategy="steps", save_steps=4, max_steps=4)
    before = weights(trainer.model)
    assert {key for key in before if key.startswith("projector.")} == set(before) - own
    projector = trainer.model.projector
    trainer.train()
    assert not torch.equal(projector[3].weight, before["projector.3.weight"])
    assert set(trainer.model.state_dict()) == own
    trainer.save_model(str(tmp_path / "published"))
    for folder in ("checkpoint-4", "published"):
        assert set(load_file(tmp_path / folder / "model.safetensors")) == own
    reloaded = QLungForAudioClassification.from_pretrained(tmp_path / "published")
    assert_equal_weights(weights(reloaded), weights(trainer.model))


@pytest.mark.parametrize("method", ["sam", "asam", "gsam", "looksam"])
def test_an_epoch_may_end_in_a_batch_of_one(tmp_path, method):
    """Sharpness-aware steps write into gradients, those that are 0 among them."""
    options = {"logging_strategy": "steps", "logging_steps": 1, "sharpness": SharpnessAwareStep(method, interval=1)}
    trainer = make_trainer(tmp_path, train=rows(5), objective=DeviceContrast(), devices=DEVICES, **options)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2
    assert all(math.isfinite(loss) for loss in losses)


def everything(folder: Path, name: str, seed: int = 0, **options):
    """What has a state or draws random numbers besides the objective; the seed makes model and projector."""
    return make_trainer(
        folder,
        small_model(seed, dropout=0.3, audio_config={"hidden_dropout_prob": 0.1}),
        rows(16),
        objective=build_objective(name),
        devices=DEVICES,
        spec_augment=SpecAugment(1, 20, 1, 10),
        sharpness=SharpnessAwareStep("sam", 0.05),
        ema_decay=0.9,
        optim="adamw_torch",
        learning_rate=1e-3,
        num_train_epochs=2,
        save_strategy="steps",
        save_steps=6,
        **options,
    )


@pytest.mark.parametrize("name", ["patch_mix", *CONTRASTIVE])
def test_a_resumed_training_ends_in_the_same_weights(tmp_path, name):
    """The projector too, which no file of the model holds: another one would change the weights after it."""
    whole = everything(tmp_path / "whole", name)
    whole.train()
    everything(tmp_path / "parts", name, callbacks=[StopAt(6)]).train()
    checkpoint = last_whole_checkpoint(tmp_path / "parts")
    resumed = everything(tmp_path / "parts", name, seed=77)
    torch.manual_seed(123)
    resumed.train(resume_from_checkpoint=checkpoint)
    assert resumed.state.global_step == whole.state.global_step == 8
    assert_equal_weights(weights(resumed.model), weights(whole.model))
    assert_equal_weights(resumed.ema.average, whole.ema.average)


@pytest.mark.parametrize("name", ["patch_mix", *CONTRASTIVE])
def test_both_passes_of_a_sharpness_aware_step_see_the_same(tmp_path, name):
    """With a vanishing radius the second pass is the first one, if partners, patches, views and masks agree."""
    model = small_model(dropout=0.5, audio_config={"hidden_dropout_prob": 0.3})
    trainer = started(trainer_of(tmp_path, build_objective(name), model=model, spec_augment=SpecAugment(1, 60, 1, 20)))
    rows_of_batch = [trainer.train_dataset[index] for index in range(6)]
    found = []
    for sharpness in (SharpnessAwareStep("sam", 1e-9), None):
        trainer.sharpness = sharpness
        model.zero_grad()
        torch.manual_seed(5)
        trainer.training_step(model, trainer.data_collator(rows_of_batch))
        found.append(([parameter.grad.clone() for parameter in model.parameters()], torch.rand(1)))
    for sam, plain in zip(found[0][0], found[1][0], strict=True):
        assert (sam - plain).norm() <= 5e-3 * plain.norm() + 1e-3
    assert torch.equal(found[0][1], found[1][1]), "a step draws as many random numbers with SAM as without"


def test_batch_statistics_of_the_projector_move_once_per_step(tmp_path):
    objective = PatchMixContrast()
    trainer = started(trainer_of(tmp_path, objective, sharpness=SharpnessAwareStep("sam", 0.05)))
    trainer.training_step(trainer.model, batches(trainer)[0])
    assert objective.projector is not None
    assert objective.projector[1].num_batches_tracked == 1


def test_two_views_are_masked_apart_in_training_only(tmp_path):
    trainer = trainer_of(tmp_path, DeviceContrast(), spec_augment=SpecAugment(1, 60, 1, 20))
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(4)])
    plain = trainer.feature_extractor.extract_features(batch["clips"])
    trainer.model.train()
    prepared = trainer._prepare_inputs(dict(batch))
    assert prepared["device"].tolist() == [0, 0, 0, 1]
    for one, other, clean in zip(prepared["input_values"], prepared["second_view"], plain, strict=True):
        kept = (one == clean) & (other == clean)
        assert kept.any(), "not of the same clip"
        assert not torch.equal(one, other)
    trainer.model.eval()
    assert "second_view" not in trainer._prepare_inputs(dict(batch))


def test_evaluation_neither_mixes_nor_contrasts(tmp_path):
    trainer = trainer_of(tmp_path, PatchMixContrast(), eval_dataset=rows(8))
    supervised = trainer_of(tmp_path, Supervised(), eval_dataset=rows(8))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(supervised.evaluate()["eval_loss"], rel=1e-5)


@pytest.mark.parametrize("name", CONTRASTIVE)
def test_training_lowers_the_contrast(name):
    torch.manual_seed(0)
    objective = build_objective(name, contrast_temperature=0.2)
    model, batch = attached(objective, audio_config=TILES), batch_of()
    batch["second_view"] = batch["input_values"] + 0.1
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    contrasts = []
    for _ in range(15):
        torch.manual_seed(4)
        supervised, _ = Supervised()(model, batch, CrossEntropyLoss(scale=10.0))
        torch.manual_seed(4)
        value, _ = objective(model, batch, CrossEntropyLoss(scale=10.0))
        contrasts.append((value - supervised).item())
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    assert contrasts[-1] < 0.8 * contrasts[0]


# ---- Errors ----


def test_wrong_options_are_named():
    with pytest.raises(ValueError, match=r"Unknown objective 'mixup'. Choose one of: supervised, patch_mix, "):
        build_objective("mixup")
    with pytest.raises(TypeError, match=r"no option contrast_weight\. Its options: mix_beta"):
        build_objective("patch_mix", contrast_weight=1.0)
    with pytest.raises(TypeError, match="Its options: none"):
        build_objective("supervised", mix_beta=1.0)
    with pytest.raises(ValueError, match=r"mix_beta is 0.0; it must be positive"):
        PatchMix(0.0)
    with pytest.raises(ValueError, match=r"contrast_temperature is -1; it must be positive"):
        DeviceContrast(contrast_temperature=-1)
    with pytest.raises(ValueError, match="'others'; choose one of all, other_class"):
        PatchMixContrast(contrast_negatives="others")


def test_a_missing_stethoscope_is_named():
    objective, batch = DeviceContrast(), batch_of()
    model = attached(objective)
    del batch["device"]
    with pytest.raises(ValueError, match="needs each row's stethoscope: give QLungTrainer `devices`"):
        objective(model, batch, CrossEntropyLoss())


@pytest.mark.parametrize("objective", [PatchMix(), PatchMixContrast()])
def test_patches_are_needed_to_mix(objective):
    model = small_model()
    model.config.audio_config.model_type = "clap_audio_model"
    with pytest.raises(ValueError, match="the encoder is a clap_audio_model: choose --objective supervised"):
        objective.attach(model)


def test_sharded_engines_are_refused(tmp_path, monkeypatch):
    from transformers import Trainer

    build = Trainer.create_accelerator_and_postprocess

    def build_sharded(self):
        build(self)
        self.is_deepspeed_enabled = True

    monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", build_sharded)
    with pytest.raises(
        ValueError, match="DeepSpeed shards the parameters, and a contrastive --objective cannot be had"
    ):
        trainer_of(tmp_path, DeviceContrast())
    trainer_of(tmp_path, PatchMix())

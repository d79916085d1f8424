"""Losses against references written with arccos in float64 NumPy or from torch's own cross-entropy."""

import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from modeling_qlung.training.losses import (
    LOSSES,
    AdaFaceLoss,
    ArcFaceLoss,
    ClassificationLoss,
    CosFaceLoss,
    CrossEntropyLoss,
    LDAMLoss,
    LogitAdjustedLoss,
    MarginSchedule,
    QLungLoss,
    build_loss,
)
from modeling_qlung.training.sharpness import freeze_statistics

ICBHI_COUNTS = [2063, 1215, 501, 363]
BATCH = 12


@pytest.fixture
def float64_default():
    """Constants of the losses (class margins, priors) in the precision of the references."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def make_batch(seed=0, dtype=torch.float64):
    """Cosines over the whole range, every class, some targets so far away that θ + 0.5 passes π."""
    generator = torch.Generator().manual_seed(seed)
    cosines = torch.rand(BATCH, 4, generator=generator, dtype=torch.float64) * 1.9 - 0.95
    labels = torch.arange(BATCH) % 4
    cosines[torch.arange(4), labels[:4]] = torch.tensor([-0.999, -0.97, -0.99, 0.99], dtype=torch.float64)
    quality = torch.rand(BATCH, generator=generator, dtype=torch.float64)
    norms = 5 + 3 * torch.rand(BATCH, generator=generator, dtype=torch.float64)
    logits = torch.randn(BATCH, 4, generator=generator, dtype=torch.float64)
    return cosines.to(dtype), labels, quality.to(dtype), logits.to(dtype), norms.to(dtype)


def cross_entropy(scores, labels):
    """Mean of log Σ exp - target, in NumPy."""
    return np.mean(np.log(np.exp(scores).sum(1)) - scores[np.arange(len(labels)), labels])


def arc(cosines, labels, margins):
    """Angles by arccos; past π, ArcFace's straight line."""
    changed = cosines.copy()
    for row, (label, margin) in enumerate(zip(labels, margins, strict=True)):
        angle = np.arccos(cosines[row, label])
        changed[row, label] = (
            np.cos(angle + margin) if angle + margin <= np.pi else np.cos(angle) - margin * np.sin(margin)
        )
    return changed


def less(cosines, labels, margins):
    changed = cosines.copy()
    changed[np.arange(len(labels)), labels] -= margins
    return changed


def qlung_reference(cosines, labels, quality, logits, norms, gamma=0.5):
    priors = np.array(ICBHI_COUNTS) / sum(ICBHI_COUNTS)
    margins = gamma * 0.5 * quality + (1 - gamma) * (0.2 / np.log(4)) * -np.log(priors[labels])
    return cross_entropy(37 * cosines, labels) + 0.4 * cross_entropy(15 * arc(cosines, labels, margins), labels)


def fixed_reference(cosines, labels, quality, logits, norms):
    margins = np.full(len(labels), 0.2)
    return cross_entropy(logits, labels) + 0.4 * cross_entropy(15 * arc(cosines, labels, margins), labels)


def adaface_reference(cosines, labels, quality, logits, norms):
    z = np.clip(0.333 * (norms - norms.mean()) / (norms.std(ddof=1) + 0.001), -1, 1)
    target = np.arccos(cosines[np.arange(len(labels)), labels])
    changed = cosines.copy()
    changed[np.arange(len(labels)), labels] = np.cos(np.clip(target - 0.4 * z, 0, np.pi)) - (0.4 + 0.4 * z)
    return cross_entropy(64 * changed, labels)


def ldam_reference(cosines, labels, quality, logits, norms):
    margins = 0.5 * (363 / np.array(ICBHI_COUNTS)) ** 0.25
    return cross_entropy(30 * less(cosines, labels, margins[labels]), labels)


CASES = {
    "qlung": (lambda: QLungLoss(ICBHI_COUNTS), qlung_reference, False),
    "qlung_quality": (
        lambda: QLungLoss(ICBHI_COUNTS, quality_share=1.0),
        functools.partial(qlung_reference, gamma=1.0),
        False,
    ),
    "qlung_fixed": (lambda: QLungLoss(ICBHI_COUNTS, fixed_margin=0.2), fixed_reference, True),
    "cross_entropy": (lambda: CrossEntropyLoss(), lambda c, y, *_: cross_entropy(37 * c, y), False),
    "arcface": (
        lambda: ArcFaceLoss(),
        lambda c, y, *_: cross_entropy(64 * arc(c, y, np.full(len(y), 0.5)), y),
        False,
    ),
    "cosface": (lambda: CosFaceLoss(), lambda c, y, *_: cross_entropy(64 * less(c, y, 0.35), y), False),
    "adaface": (lambda: AdaFaceLoss(), adaface_reference, False),
    "ldam": (lambda: LDAMLoss(ICBHI_COUNTS), ldam_reference, False),
    "logit_adjusted": (
        lambda: LogitAdjustedLoss(ICBHI_COUNTS, temperature=1.5),
        lambda c, y, q, z, n: cross_entropy(z + 1.5 * np.log(np.array(ICBHI_COUNTS) / sum(ICBHI_COUNTS)), y),
        True,
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("float64_default")
def test_value_and_gradient_match_the_reference(case):
    build, reference, linear_head = CASES[case]
    cosines, labels, quality, logits, norms = make_batch()
    cosines.requires_grad_()
    logits.requires_grad_()
    loss = build()(cosines, labels, quality, logits=logits if linear_head else None, norms=norms)
    arrays = [value.detach().numpy() for value in (cosines, labels, quality, logits, norms)]
    assert loss.ndim == 0
    assert loss.dtype == torch.float64
    assert loss.item() == pytest.approx(reference(*arrays), rel=1e-12)

    loss.backward()
    for position, source in ((0, cosines), (3, logits)):
        expected = np.zeros((BATCH, 4))
        for index in np.ndindex(expected.shape):
            step = 1e-7
            up, down = [array.copy() for array in arrays], [array.copy() for array in arrays]
            up[position][index] += step
            down[position][index] -= step
            expected[index] = (reference(*up) - reference(*down)) / (2 * step)
        found = np.zeros_like(expected) if source.grad is None else source.grad.numpy()
        np.testing.assert_allclose(found, expected, atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("float64_default")
def test_gradcheck(case):
    build, _, linear_head = CASES[case]
    cosines, labels, quality, logits, norms = make_batch(seed=1)
    loss = build().eval()

    def function(cosines, logits):
        return loss(cosines, labels, quality, logits=logits if linear_head else logits * 0 + 37 * cosines, norms=norms)

    assert torch.autograd.gradcheck(function, (cosines.requires_grad_(), logits.requires_grad_()))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("float64_default")
def test_order_of_the_batch_does_not_matter(case):
    build, _, _ = CASES[case]
    cosines, labels, quality, logits, norms = make_batch()
    order = torch.randperm(BATCH, generator=torch.Generator().manual_seed(3))
    plain = build()(cosines, labels, quality, logits=logits, norms=norms)
    shuffled = build()(cosines[order], labels[order], quality[order], logits=logits[order], norms=norms[order])
    assert shuffled.item() == pytest.approx(plain.item(), rel=1e-12)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("value", [1.0, -1.0, 1.0000002])
def test_extreme_cosines_have_finite_loss_and_gradient(case, value):
    build, _, _ = CASES[case]
    cosines = torch.full((4, 4), value).fill_diagonal_(-value).requires_grad_()
    norms = torch.tensor([1e-9, 1.0, 50.0, 1e9])
    for labels in (torch.arange(4), torch.arange(4).flip(0)):
        loss = build()(cosines, labels, torch.ones(4), norms=norms)
        (gradient,) = torch.autograd.grad(loss, cosines)
        assert loss.isfinite()
        assert gradient.isfinite().all()


@pytest.mark.parametrize("case", CASES)
def test_bfloat16_inputs_under_autocast_are_computed_in_float32(case):
    build, _, _ = CASES[case]
    cosines, labels, quality, logits, norms = make_batch(dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = build()(cosines, labels, quality, logits=logits, norms=norms)
    exact = build()(cosines.double(), labels, quality.double(), logits=logits.double(), norms=norms.double())
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)


def test_losses_are_computed_outside_autocast():
    class Product(ClassificationLoss):
        def compute(self, cosines, labels, quality, logits, norms):
            return (cosines @ cosines.T).sum()

    cosines, labels, _, _, _ = make_batch(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert Product()(cosines, labels).dtype == torch.float32


def test_class_margins_of_icbhi():
    margins = QLungLoss(ICBHI_COUNTS).class_margins
    assert [round(value, 4) for value in margins.tolist()] == [0.1006, 0.1769, 0.3047, 0.3512]
    assert QLungLoss([7, 7, 7]).class_margins.tolist() == pytest.approx([0.2, 0.2, 0.2])


@pytest.mark.usefixtures("float64_default")
def test_ablation_rows_are_settings():
    cosines, labels, quality, logits, _ = make_batch()
    plain = QLungLoss(ICBHI_COUNTS, margin_weight=0.0)
    assert plain(cosines, labels) == CrossEntropyLoss()(cosines, labels)
    assert plain(cosines, labels, logits=logits) == F.cross_entropy(logits, labels)
    without_margin = QLungLoss(ICBHI_COUNTS, fixed_margin=0.0)(cosines, labels, logits=logits)
    expected = F.cross_entropy(logits, labels) + 0.4 * F.cross_entropy(15 * cosines, labels)
    assert without_margin.item() == pytest.approx(expected.item(), rel=1e-12)
    class_only = QLungLoss(ICBHI_COUNTS, quality_share=0.0)
    assert class_only(cosines, labels) == class_only(cosines, labels, quality)
    with_class = QLungLoss(ICBHI_COUNTS)
    angular, linear = with_class(cosines, labels, quality), with_class(cosines, labels, quality, logits=logits)
    plain_terms = F.cross_entropy(37 * cosines, labels) - F.cross_entropy(logits, labels)
    assert (angular - linear).item() == pytest.approx(plain_terms.item(), rel=1e-9)


@pytest.mark.usefixtures("float64_default")
def test_smoothing_and_class_weights_reach_the_plain_term_only():
    cosines, labels, quality, _, _ = make_batch()
    weights = torch.tensor([0.5, 1.0, 2.0, 3.0])
    loss = QLungLoss(ICBHI_COUNTS, label_smoothing=0.1, class_weights=weights.tolist())
    log_probabilities = torch.log_softmax(37 * cosines, 1)
    item_weights = weights[labels]
    picked = -(log_probabilities.gather(1, labels[:, None]).squeeze(1) * item_weights).sum()
    spread = -(log_probabilities * weights).sum() / 4
    plain = (0.9 * picked + 0.1 * spread) / item_weights.sum()
    margin_term = QLungLoss(ICBHI_COUNTS)(cosines, labels, quality) - CrossEntropyLoss()(cosines, labels)
    assert loss(cosines, labels, quality).item() == pytest.approx((plain + margin_term).item(), rel=1e-12)


def test_margins_carry_no_gradient():
    cosines, labels, quality, _, norms = make_batch(dtype=torch.float32)
    quality.requires_grad_()
    norms.requires_grad_()
    cosines.requires_grad_()
    for loss in (QLungLoss(ICBHI_COUNTS), AdaFaceLoss()):
        loss(cosines, labels, quality, norms=norms).backward()
    assert quality.grad is None
    assert norms.grad is None


@pytest.mark.parametrize("name", ["qlung", "arcface", "cosface", "adaface", "ldam"])
@pytest.mark.usefixtures("float64_default")
def test_margin_factor_scales_the_margin(name):
    """At factor 0 a margin loss is a softmax at its own scale, and the loss grows with the factor."""
    cosines, labels, quality, _, norms = make_batch()
    loss = build_loss(name, ICBHI_COUNTS)
    values = []
    for loss.margin_factor in (0.0, 0.5, 1.0):
        values.append(loss(cosines, labels, quality, norms=norms).item())
    scales = [(37.0, 1.0), (15.0, 0.4)] if name == "qlung" else [(loss.scale, 1.0)]
    softmax = sum(share * F.cross_entropy(scale * cosines, labels).item() for scale, share in scales)
    assert values[0] == pytest.approx(softmax, rel=1e-12)
    assert values[0] < values[1] < values[2]


def test_quality_is_required_where_it_counts():
    cosines, labels, quality, _, _ = make_batch(dtype=torch.float32)
    with pytest.raises(ValueError, match="needs quality"):
        QLungLoss(ICBHI_COUNTS)(cosines, labels)
    better = QLungLoss(ICBHI_COUNTS)(cosines, labels, torch.ones(BATCH))
    assert better > QLungLoss(ICBHI_COUNTS)(cosines, labels, torch.zeros(BATCH))
    with pytest.raises(ValueError, match="norms"):
        AdaFaceLoss()(cosines, labels, quality)


def test_wrong_shapes_are_named():
    cosines, labels, quality, logits, _ = make_batch(dtype=torch.float32)
    loss = QLungLoss(ICBHI_COUNTS)
    with pytest.raises(ValueError, match="quality must be"):
        loss(cosines, labels, quality[:, None])
    with pytest.raises(ValueError, match="labels must be"):
        loss(cosines, labels[:-1], quality)
    with pytest.raises(ValueError, match="cosines must be"):
        loss(cosines[0], labels, quality)
    with pytest.raises(ValueError, match="must agree in shape"):
        loss(cosines, labels, quality, logits=logits[:, :2])
    with pytest.raises(RuntimeError, match="expanded size"):
        QLungLoss([5, 6])(cosines, labels, quality)


@pytest.mark.parametrize("name", ["qlung", "ldam", "logit_adjusted"])
def test_a_class_without_examples_is_named(name):
    with pytest.raises(ValueError, match="class 2 has no training example"):
        build_loss(name, [5, 6, 0, 3])
    with pytest.raises(ValueError, match="at least two classes"):
        build_loss(name, [5])


def test_adaface_statistics():
    """They start from the first batch, then move by the momentum, in training and outside freeze_statistics only."""
    cosines, labels, _, _, norms = make_batch(dtype=torch.float32)
    loss = AdaFaceLoss(momentum=0.1)
    loss(cosines, labels, norms=norms)
    assert loss.norm_mean == norms.mean()
    assert loss.norm_std == norms.std()
    with freeze_statistics(torch.nn.ModuleDict({"loss": loss})):
        frozen = loss(cosines, labels, norms=2 * norms)
    loss.eval()
    assert loss(cosines, labels, norms=2 * norms) == frozen
    assert loss.norm_mean == norms.mean()
    loss.train()
    loss(cosines, labels, norms=2 * norms)
    assert loss.norm_mean.item() == pytest.approx(1.1 * norms.mean().item(), rel=1e-6)
    assert loss.norm_std.item() == pytest.approx(1.1 * norms.std().item(), rel=1e-6)
    loss(cosines[:1], labels[:1], norms=norms[:1])
    assert loss.num_batches == 2
    restored = AdaFaceLoss()
    restored.load_state_dict(loss.state_dict())
    assert restored.norm_std == loss.norm_std


def test_freeze_statistics_ends_after_an_error():
    loss = AdaFaceLoss()
    with pytest.raises(ValueError, match="norms"), freeze_statistics(loss):
        loss(*make_batch(dtype=torch.float32)[:2])
    assert loss.track_running_stats


def test_a_nearer_target_never_costs_more():
    """cos(θ + m) alone would rise again beyond θ + m = π; the fallback keeps the loss monotonic there."""
    target = torch.linspace(-1, 1, 2001, dtype=torch.float64)
    cosines = torch.stack([target, torch.zeros_like(target)], 1)
    values = torch.stack([ArcFaceLoss()(row[None], torch.tensor([0])) for row in cosines])
    assert (values.diff() <= 0).all()


@pytest.mark.parametrize("name", LOSSES)
def test_every_registered_loss_builds_runs_and_reads_well(name):
    cosines, labels, quality, _, norms = make_batch(dtype=torch.float32)
    loss = build_loss(name, ICBHI_COUNTS, scale=20.0)
    assert loss(cosines, labels, quality, norms=norms).isfinite()
    assert "scale=20" in repr(loss)


def test_the_factory_names_what_exists():
    with pytest.raises(ValueError, match=r"arcfase.*Choose one of: qlung, cross_entropy, arcface"):
        build_loss("arcfase", ICBHI_COUNTS)
    with pytest.raises(TypeError, match=r"'cosface' has no option margn\. Its options: scale, margin"):
        build_loss("cosface", ICBHI_COUNTS, margn=0.1)
    with pytest.raises(ValueError, match="quality_share"):
        build_loss("qlung", ICBHI_COUNTS, quality_share=1.5)
    with pytest.raises(ValueError, match="class_weights"):
        build_loss("cross_entropy", ICBHI_COUNTS, class_weights=[1.0, -1.0, 1.0, 1.0])


def test_margin_schedule():
    schedule = MarginSchedule(warmup_ratio=0.25)
    assert [schedule(progress) for progress in (0.0, 0.125, 0.25, 1.0)] == [0.0, 0.5, 1.0, 1.0]
    assert MarginSchedule()(0.0) == 1.0
    with pytest.raises(ValueError, match="warmup_ratio"):
        MarginSchedule(1.5)

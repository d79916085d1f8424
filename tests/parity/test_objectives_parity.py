"""Our Patch-Mix and SG-SCL against the numbers of the published code; `fixtures` holds them."""

from fractions import Fraction

import numpy as np
import pytest
import torch

from modeling_qlung.training.losses import CrossEntropyLoss
from modeling_qlung.training.objectives import PatchMixture, Projector, patch_mix_contrast, supervised_contrast

from .reference import FIXTURES, uniform

TOLERANCE = {"atol": 2e-5, "rtol": 1e-5}  # of float32 sums in another order, at logits of up to 17


@pytest.fixture(scope="module")
def published() -> dict[str, torch.Tensor]:
    with np.load(FIXTURES / "patch_mix_losses.npz") as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def mixture_of(published, share: float) -> PatchMixture:
    """A mixture that keeps this share of its patches."""
    kept = Fraction(share).limit_denominator(2000)
    assert float(kept) == pytest.approx(share, abs=1e-9)
    return PatchMixture(published["index"], torch.arange(kept.denominator) >= kept.numerator)


@pytest.mark.parametrize("case", range(4))
def test_patch_mix_cross_entropy(published, case):
    mixture = mixture_of(published, published["lam"][case].item())
    for name, weights in (("ce", None), ("ce_weighted", published["class_weights"].tolist())):
        loss = CrossEntropyLoss(class_weights=weights)
        logits = published["logits"].clone().requires_grad_()
        own, other = (loss(logits.tanh(), published[f"labels_{side}"], logits=logits) for side in "ab")
        total = mixture.share * own + (1 - mixture.share) * other
        assert total.item() == pytest.approx(published[name][case].item(), rel=1e-5)
        if weights is None:
            torch.testing.assert_close(torch.autograd.grad(total, logits)[0], published["ce_grad"][case], **TOLERANCE)
    assert torch.equal(published["labels_a"][mixture.partners], published["labels_b"])


@pytest.mark.parametrize("case", range(4))
def test_patch_mix_contrast(published, case):
    mixture = mixture_of(published, published["lam"][case].item())
    unmixed, mixed = published["projection1"], published["projection2"].clone().requires_grad_()
    total = patch_mix_contrast(mixed, unmixed, mixture, 0.06)
    assert total.item() == pytest.approx(published["cl_all"][case].item(), rel=1e-5)
    torch.testing.assert_close(torch.autograd.grad(total, mixed)[0], published["cl_all_grad"][case], **TOLERANCE)
    other_class = patch_mix_contrast(mixed, unmixed, mixture, 0.06, published["labels_a"])
    assert other_class.item() == pytest.approx(published["cl_diff_label"][case].item(), rel=1e-5)
    warm = patch_mix_contrast(mixed, unmixed, mixture, 0.5)
    assert warm.item() == pytest.approx(published["cl_warm"][case].item(), rel=1e-5)


def test_mixed_tokens(published):
    tokens, replaced = published["mix_patches_tokens"], published["mix_patches_mask"]
    beta, count = published["mix_patches_beta"].item(), tokens.shape[1]
    assert len(replaced) == int(count * (1 - beta))
    mixture = PatchMixture(published["mix_patches_index"], torch.isin(torch.arange(count), replaced))
    assert torch.equal(mixture.mix(tokens), published["mix_patches_output"])
    assert mixture.share == pytest.approx(published["mix_patches_lam"].item())


def test_projector(published):
    places = {"linear1": "0", "bn": "1", "linear2": "3"}
    state = {
        ".".join([places[name.split(".")[1]], name.split(".")[2]]): value
        for name, value in published.items()
        if name.startswith("projector.")
    }
    projector = Projector(6, 4)
    projector.load_state_dict(state)
    torch.testing.assert_close(projector(published["projector_input"]), published["projector_output_train"])
    torch.testing.assert_close(projector[1].running_mean, published["projector_running_mean_after"])
    torch.testing.assert_close(projector.eval()(published["projector_input"]), published["projector_output_eval"])


@pytest.mark.parametrize("temperature", [0.06, 0.5])
@pytest.mark.parametrize(
    ("case", "devices"), [("four", [0, 1, 2, 0, 3, 1, 0, 2]), ("one", [2] * 8), ("each", list(range(8)))]
)
def test_device_contrast(case, devices, temperature):
    with np.load(FIXTURES / "device_contrast.npz") as arrays:
        loss, *gradients = (
            torch.from_numpy(arrays[f"{case} {temperature} {name}"])
            for name in ("loss", "gradient first", "gradient second")
        )
    views = [
        torch.from_numpy(3 * uniform(f"device contrast {name}", 8, 12)).requires_grad_() for name in ("first", "second")
    ]
    ours = supervised_contrast(*views, torch.tensor(devices), temperature)
    torch.testing.assert_close(ours, loss, atol=0, rtol=1e-5)
    for view, gradient in zip(torch.autograd.grad(ours, views), gradients, strict=True):
        torch.testing.assert_close(view, gradient, **TOLERANCE)

"""Flatness against closed forms, a full Hessian and steps taken by hand; and the model that it leaves alone."""

import copy
import json
from typing import Any

import numpy as np
import pytest
import torch

from modeling_qlung import QLungFeatureExtractor
from modeling_qlung.evaluation import flatness
from modeling_qlung.evaluation.flatness import LossSurface, measure_flatness, measure_increases, top_eigenvalue
from tests.training.small_training import cycles, gradient_at, make_trainer, small_model

EXTRACTOR = QLungFeatureExtractor(duration=0.5)


def quadratic(eigenvalues, weights, parts: int = 1) -> LossSurface:
    """w·Aw / 2 with those eigenvalues in a rotated basis."""
    size = len(eigenvalues)
    basis, _ = torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    matrix = basis @ torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)) @ basis.T
    first, second = torch.tensor(weights, dtype=torch.float64).split([1, size - 1])
    parameters = [first.requires_grad_(), second.requires_grad_()]

    def part() -> torch.Tensor:
        w = torch.cat(parameters)
        return w @ matrix @ w / (2 * parts)

    return LossSurface(parameters, [part] * parts)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch_of(dataset) -> dict[str, torch.Tensor]:
    """Every row's features and label, prepared here."""
    clips = [EXTRACTOR.fit_length(torch.from_numpy(row["waveform"].copy())) for row in dataset]
    return {"input_values": EXTRACTOR.extract_features(torch.stack(clips)), "labels": torch.tensor(dataset["label"][:])}


def float32_precision() -> tuple[str, str]:
    backends: Any = torch.backends
    return backends.cuda.matmul.fp32_precision, backends.cudnn.conv.fp32_precision


def loss_of(model, batch) -> float:
    with torch.no_grad():
        logits = model(batch["input_values"]).logits.double()
    return float(torch.nn.functional.cross_entropy(logits, batch["labels"]))


# ---- Closed forms ----


@pytest.mark.parametrize("eigenvalues", [[3.0, 1.0, 0.5, -1.0], [2.0, 1.0, 0.0, -7.0], [-1.0, -2.0, -3.0, -9.0]])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_largest_eigenvalue_not_largest_magnitude(eigenvalues, seed):
    surface = quadratic(eigenvalues, [1.0, 2.0, -1.0, 0.5], parts=3)
    start = torch.randn(4, generator=generator(seed), dtype=torch.float64)
    value, residual, products = top_eigenvalue(surface.hessian_product, start, iterations=20)
    assert value == pytest.approx(max(eigenvalues), rel=1e-6)
    assert residual < 1e-6
    assert products <= 6


def test_eigenvalue_stops_at_iterations_and_bounds_its_error():
    spectrum = torch.linspace(0, 10, 400, dtype=torch.float64)
    start = torch.randn(400, generator=generator(), dtype=torch.float64)
    value, residual, products = top_eigenvalue(lambda v: spectrum * v, start, iterations=4)
    assert products == 4
    assert 6 < value < 10
    assert float((spectrum - value).abs().min()) <= residual  # an eigenvalue lies within the residual
    longer, smaller, more = top_eigenvalue(lambda v: spectrum * v, start, iterations=200, tolerance=1e-5)
    assert value < longer <= 10 + 1e-9
    assert longer == pytest.approx(10, rel=1e-3)
    assert smaller < residual
    assert 4 < more < 200


def test_eigenvalue_does_not_stop_where_it_only_stands_still():
    """Started almost along one eigenvector, the first products see little else."""
    spectrum = torch.tensor([5.0, 1.0, 0.0], dtype=torch.float64)
    start = torch.tensor([0.03, 1.0, 0.3], dtype=torch.float64)
    value, residual, _ = top_eigenvalue(lambda v: spectrum * v, start, iterations=20, tolerance=0.5)
    assert (value, residual) == pytest.approx((5.0, 0.0), abs=1e-6)


def test_flat_loss_has_no_curvature():
    assert top_eigenvalue(torch.zeros_like, torch.ones(5), iterations=20) == (0.0, 0.0, 1)


def test_increases_on_a_quadratic():
    """Isotropic, so that every length is known: L = a |w|² / 2 rises by a (ρ |w| + ρ² / 2) straight uphill."""
    surface = quadratic([2.0, 2.0, 2.0], [0.0, 3.0, -4.0])
    result = measure_increases(surface, 0.1, generator())
    uphill = 2 * (0.1 * 5 + 0.1**2 / 2)
    assert result["loss"] == pytest.approx(25)
    assert result["gradient_norm"] == pytest.approx(10)
    assert result["weight_norm"] == pytest.approx(5)
    assert result["increase_gradient"] == pytest.approx(uphill)
    assert result["increase_worst"] == pytest.approx(uphill)
    # ε = 1.0 · w² g / ‖|w| g‖ with g = 2 w
    w = np.array([0.0, 3.0, -4.0])
    step = w**2 * 2 * w / np.linalg.norm(np.abs(w) * 2 * w)
    assert result["increase_adaptive"] == pytest.approx(np.sum((w + step) ** 2) - 25)


def test_ascent_finds_what_the_gradient_misses():
    """At the bottom of a valley along its floor: the gradient points along it, the walls beside it are steeper."""
    matrix = [quadratic([100.0, 0.01], [0.0, 0.0]).hessian_product(axis) for axis in torch.eye(2).double()]
    floor, wall = torch.linalg.eigh(torch.stack(matrix)).eigenvectors.T  # ascending eigenvalues
    surface = quadratic([100.0, 0.01], (100 * floor + 1e-4 * wall).tolist())
    result = measure_increases(surface, 1.0, generator())
    assert result["increase_worst"] > 3 * result["increase_gradient"] > 0
    # Never outside the ball: the largest increase within it is bounded by |g| ρ + λ ρ² / 2.
    assert result["increase_worst"] <= result["gradient_norm"] + 50 + 1e-9


def test_random_directions_average_the_trace():
    """And not the slope, which a step and its opposite take out."""
    surface = quadratic([3.0, 1.0, 0.5, -0.5], [10.0, 20.0, -10.0, 5.0])
    result = measure_increases(surface, 0.2, generator(), num_directions=1000)
    assert result["increase_random"] == pytest.approx(0.2**2 * 4.0 / (2 * 4), rel=0.05)


def test_critical_point_has_no_first_order_worst_direction():
    result = measure_increases(quadratic([3.0, 1.0], [0.0, 0.0]), 0.2, generator())
    assert result["increase_gradient"] == result["increase_worst"] == result["increase_adaptive"] == 0


def test_diverged_weights_are_refused():
    with pytest.raises(ValueError, match=r"loss of the model is nan: its training diverged"):
        measure_increases(quadratic([1.0, 1.0], [float("nan"), 0.0]), 0.05, generator())


# ---- Models ----


def settled(model, seed: int = 0):
    """Add noise to every parameter: at its initialisation AST normalises tokens of length 0, and curves by 1e12."""
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=noise, dtype=parameter.dtype))
    return model


def tiny_float64(**config):
    """Few enough parameters for a full Hessian."""
    sizes = {"hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 4}
    sizes |= {"initializer_range": 0.3, "patch_size": 16, "time_stride": 32, "frequency_stride": 56}
    model = settled(small_model(audio_config=sizes, scale=5.0, **config).double().eval())
    model.qlung.encoder.embeddings.patch_embeddings.requires_grad_(False)  # 1,024 weights by themselves
    return model


@pytest.mark.parametrize("head", ["linear", "angular"])
def test_eigenvalue_matches_the_full_hessian(head):
    model, data = tiny_float64(head=head), cycles(4)
    batch = batch_of(data)
    measured = copy.deepcopy(model)
    measured.set_attn_implementation("eager")
    trained = {name: p.detach() for name, p in measured.named_parameters() if p.requires_grad}
    shapes = [p.shape for p in trained.values()]

    def loss(flat):
        parts = [part.view(shape) for part, shape in zip(flat.split([s.numel() for s in shapes]), shapes, strict=True)]
        weights = dict(zip(trained, parts, strict=True))
        output = torch.func.functional_call(measured, weights, (batch["input_values"],))
        return torch.nn.functional.cross_entropy(output.logits, batch["labels"])

    flat = torch.cat([p.flatten() for p in trained.values()])
    assert 100 < flat.numel() < 300
    expected = torch.linalg.eigvalsh(torch.autograd.functional.hessian(loss, flat, vectorize=True))
    drawn = {"num_cycles": 4, "hessian_cycles": 4, "batch_size": 3, "iterations": 60}
    result = measure_flatness(model, EXTRACTOR, data, **drawn)
    assert expected[0] < -0.2 * expected[-1]  # there are large negative ones to mistake for it
    assert result["top_eigenvalue"] == pytest.approx(float(expected[-1]), rel=1e-3)
    assert abs(result["top_eigenvalue"] - expected).min() <= result["top_eigenvalue_residual"] + 1e-9
    assert result["top_eigenvalue_iterations"] < 60


@pytest.mark.parametrize("head", ["linear", "angular"])
def test_increases_match_steps_taken_by_hand(head):
    model, data, rho = settled(small_model(head=head)).eval(), cycles(8), 0.05
    batch = batch_of(data)

    def cross_entropy(cosines, labels):
        return torch.nn.functional.cross_entropy(model.head.scale * cosines, labels)

    result = measure_flatness(model, EXTRACTOR, data, rho=rho, num_cycles=100, hessian_cycles=2, iterations=1)
    assert result["num_cycles"] == 8
    assert result["loss"] == pytest.approx(loss_of(model, batch), rel=1e-5)
    if head == "linear":
        return  # gradient_at knows cosines only
    gradient = gradient_at(model, batch, cross_entropy)
    norm = torch.stack([part.square().sum() for part in gradient.values()]).sum().sqrt()
    assert result["gradient_norm"] == pytest.approx(float(norm), rel=1e-4)
    adaptive = torch.stack([(p * gradient[n]).square().sum() for n, p in model.named_parameters()]).sum().sqrt()
    moved, scaled = copy.deepcopy(model), copy.deepcopy(model)
    with torch.no_grad():
        for name, p in moved.named_parameters():
            p.add_(rho * gradient[name] / norm)
        for name, p in scaled.named_parameters():
            p.add_(10 * rho * p.square() * gradient[name] / adaptive)
    assert result["increase_gradient"] == pytest.approx(loss_of(moved, batch) - result["loss"], rel=1e-3)
    assert result["increase_adaptive"] == pytest.approx(loss_of(scaled, batch) - result["loss"], rel=1e-3)
    assert result["increase_worst"] >= result["increase_gradient"] > 20 * abs(result["increase_random"])


def test_only_the_adaptive_increase_ignores_the_length_of_class_weights():
    model, data = settled(small_model(head="angular")), cycles(8)
    shorter = copy.deepcopy(model)
    with torch.no_grad():
        shorter.head.weight.mul_(0.01)
    before, after = (measure_flatness(m, EXTRACTOR, data, iterations=1) for m in (model, shorter))
    assert after["loss"] == pytest.approx(before["loss"], rel=1e-5)
    assert after["increase_adaptive"] == pytest.approx(before["increase_adaptive"], rel=1e-3)
    assert after["increase_gradient"] != pytest.approx(before["increase_gradient"], rel=0.2)
    assert after["gradient_norm"] > 1.5 * before["gradient_norm"]


def test_same_seed_same_numbers_whatever_the_batches():
    model, data = settled(small_model()), cycles(16)
    options = {"num_cycles": 6, "hessian_cycles": 4, "iterations": 3}
    first = measure_flatness(model, EXTRACTOR, data, **options)
    torch.rand(7)  # another state of the global generator
    assert measure_flatness(model, EXTRACTOR, data, **options) == first
    chunked = measure_flatness(model, EXTRACTOR, data, batch_size=4, **options)
    increase = first["increase_gradient"]
    for name, value in first.items():
        assert chunked[name] == pytest.approx(value, rel=1e-3, abs=1e-4 * increase), name
    other = measure_flatness(model, EXTRACTOR, data, seed=1, **options)
    assert other["loss"] != first["loss"]
    assert json.loads(json.dumps(first)) == first


def test_draws_labelled_cycles_in_their_natural_shares():
    data = cycles(64)
    labels = [None if index % 4 == 3 else int(index % 8 == 0) for index in range(64)]
    data = (
        data.remove_columns("label")
        .add_column("label", labels)
        .with_format("numpy", columns=["waveform"], output_all_columns=True)
    )
    _, drawn = flatness._draw(EXTRACTOR, data, 1000, seed=0)
    assert torch.bincount(drawn).tolist() == [40, 8]
    features, some = flatness._draw(EXTRACTOR, data, 5, seed=0)
    assert torch.equal(some, drawn[:5])
    assert [item.shape for item in features] == [(48, 128)] * 5
    unlabelled = data.remove_columns("label").add_column("label", [None] * 64)
    with pytest.raises(ValueError, match="None of the 64 cycles has a label"):
        measure_flatness(small_model(), EXTRACTOR, unlabelled)


@pytest.mark.parametrize("name", ["rho", "num_cycles", "hessian_cycles"])
def test_impossible_numbers_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} is 0; it must be positive"):
        measure_flatness(small_model(), EXTRACTOR, cycles(4), **{name: 0})


def test_model_and_random_numbers_stay_bit_identical():
    model, data = small_model(dropout=0.5).train(), cycles(8)
    model.set_attn_implementation("sdpa")
    model.qlung.encoder.layernorm.eval()  # a mixed mode stays mixed
    batch = batch_of(data)
    model(batch["input_values"], labels=batch["labels"]).loss.backward()
    frozen = model.head.weight.requires_grad_(False)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    storage = {name: value.data_ptr() for name, value in model.named_parameters()}
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    modes = [module.training for module in model.modules()]
    precision = float32_precision()
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    config = model.config.to_json_string()

    measure_flatness(model, EXTRACTOR, data, iterations=2)

    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(p.data_ptr() == storage[name] for name, p in model.named_parameters())
    assert all(torch.equal(p.grad, gradients[name]) for name, p in model.named_parameters())
    assert [module.training for module in model.modules()] == modes
    assert model.config._attn_implementation == model.qlung.encoder.config._attn_implementation == "sdpa"
    assert model.config.to_json_string() == config
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002
    assert not frozen.requires_grad
    assert float32_precision() == precision


def test_trained_in_half_precision_measured_in_full(tmp_path):
    trainer = make_trainer(tmp_path, settled(small_model()), bf16=True, max_steps=2)
    trainer.train()
    fresh = small_model()
    fresh.load_state_dict(trainer.model.state_dict())
    results = [measure_flatness(m, EXTRACTOR, cycles(8), iterations=2) for m in (trainer.model, fresh)]
    assert results[0] == results[1]
    halved = measure_flatness(copy.deepcopy(fresh).bfloat16(), EXTRACTOR, cycles(8), iterations=2)
    assert halved["loss"] == pytest.approx(results[1]["loss"], rel=0.05)
    assert halved["increase_random"] != 0  # steps of bfloat16 are wider than ρ moves a weight

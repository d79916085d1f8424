"""How flat the loss is around trained weights: its increase within a radius, and its largest curvature."""

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from datasets import Dataset
from torch import nn

from ..feature_extraction_qlung import QLungFeatureExtractor
from ..modeling_qlung import QLungForAudioClassification

# Kwon et al. 2021 find ASAM's best radius about ten times SAM's.
ADAPTIVE_RADIUS = 10.0


def measure_flatness(
    model: QLungForAudioClassification,
    feature_extractor: QLungFeatureExtractor,
    cycles: Dataset,
    rho: float = 0.05,
    num_cycles: int = 128,
    hessian_cycles: int = 32,
    batch_size: int = 8,
    seed: int = 0,
    iterations: int = 20,
) -> dict[str, float | int]:
    """Measure the flatness of the loss L around a model's weights w.

    L is the plain cross-entropy of the model's own logits, without margins, label smoothing, class weights,
    augmentation or dropout, whatever the model was trained with: every row of a table is measured on the same function.
    It is the mean over cycles drawn once per seed, in the classes' natural shares; two models trained on the same
    cycles are measured on the same ones.

    What can be compared with what:

    - `increase_*` but `increase_adaptive`, and `top_eigenvalue`, measure distance in plain weight space. Where outputs
      do not depend on a weight's length (the angular head's class weights, the layer norm before the pooling), growing
      it makes the loss flatter and changes no prediction (Dinh et al. 2017). Compare models of one architecture, one
      head and one scale whose `weight_norm` is alike.
    - `increase_adaptive` measures distance relative to each weight (Kwon et al. 2021) and ignores such lengths: it may
      be compared between heads and trainings of one architecture as well.
    - None can be compared between architectures or sizes. All grow with the logits' scale and shrink as the loss goes
      to 0 with the confidence of the model: read them beside `loss`. `top_eigenvalue` also depends on
      `hessian_cycles`: fewer cycles give a larger one on average.

    Args:
        model: on the device to measure on; it is copied, and stays as it is. Frozen parameters do not count as weights.
        feature_extractor: makes the model's input.
        cycles: rows of `decode_cycles`, normally those trained on; the ones without a label are left out.
        rho: radius ρ of the ball around w, as in SAM; `increase_adaptive` takes 10 ρ.
        num_cycles: number of cycles that L is the mean over, or all of fewer.
        hessian_cycles: number of these cycles that the eigenvalue is measured on; it costs most of the time.
        batch_size: cycles held at once. With AST base at 8 s the second derivative needs about 4 GB for each, four
            times what a training step needs.
        seed: of the drawn cycles, the random directions and the eigenvalue's starting vector.
        iterations: largest number of Hessian products; fewer are used once the eigenvalue changes by less than 1e-3.

    Returns:
        `num_cycles` and `rho` as used; `loss` L(w), `gradient_norm` |g| and `weight_norm` |w|;
        `increase_gradient`: L(w + ρ g/|g|) - L(w), SAM's own first-order worst direction (Foret et al. 2021);
        `increase_worst`: the largest increase met by projected gradient ascent from there, at least the former;
        `increase_random`: the mean increase over random steps of length ρ and their opposites, for contrast: about
        ρ² / 2 times the mean eigenvalue, which in a large model drowns in float32's rounding, some 1e-6 of the loss;
        `increase_adaptive`: L(w + ε) - L(w), ε = 10 ρ w² g / ‖|w| g‖, elementwise as in ASAM;
        `hessian_cycles` as used, `top_eigenvalue`: the largest (not largest in magnitude) eigenvalue λ of the Hessian;
        `top_eigenvalue_residual`: |Hv - λv| of its unit eigenvector; `top_eigenvalue_iterations`: products used.

    Raises:
        ValueError: if no cycle has a label, a number is not positive, or the loss is not finite.
    """
    for name, value in {"rho": rho, "num_cycles": num_cycles, "hessian_cycles": hessian_cycles}.items():
        if not value > 0:
            raise ValueError(f"{name} is {value}; it must be positive.")
    features, labels = _draw(feature_extractor, cycles, num_cycles, seed)
    generator = torch.Generator().manual_seed(seed)  # on the CPU, so that every device measures the same directions
    with _full_precision():
        measured = _copy_to_measure(model)
        surface = _cross_entropy(measured, features, labels, batch_size)
        fewer = _cross_entropy(measured, features[:hessian_cycles], labels[:hessian_cycles], batch_size)
        increases = measure_increases(surface, rho, generator)
        start = _random_direction(fewer.weights, generator)
        eigenvalue, residual, products = top_eigenvalue(fewer.hessian_product, start, iterations)
    return {
        "num_cycles": len(labels),
        "rho": rho,
        **increases,
        "hessian_cycles": min(hessian_cycles, len(labels)),
        "top_eigenvalue": eigenvalue,
        "top_eigenvalue_residual": residual,
        "top_eigenvalue_iterations": products,
    }


class LossSurface:
    """
    A loss as a function of one flat vector of weights.

    Args:
        parameters: what the loss depends on, whose values are the weights to measure around; every call moves them.
        parts: functions that give one summand of the loss each: memory holds the graph of one at a time.
    """

    def __init__(self, parameters: Sequence[torch.Tensor], parts: Sequence[Callable[[], torch.Tensor]]):
        self.parameters = list(parameters)
        self.parts = list(parts)
        self.weights = _flatten(self.parameters).detach()

    @torch.no_grad()
    def loss(self, weights: torch.Tensor) -> float:
        """Give the loss at weights of shape (n,)."""
        self._move_to(weights)
        return sum(float(part()) for part in self.parts)

    def gradient(self, weights: torch.Tensor) -> tuple[float, torch.Tensor]:
        """Give the loss at weights of shape (n,) and its gradient, (n,)."""
        self._move_to(weights)
        loss, gradient = 0.0, torch.zeros_like(weights)
        for part in self.parts:
            value = part()
            gradient += self._differentiate(value)
            loss += float(value.detach())
        return loss, gradient

    def hessian_product(self, vector: torch.Tensor) -> torch.Tensor:
        """Give H v, (n,), of the Hessian at `self.weights` and a vector v of shape (n,), by differentiating g v."""
        self._move_to(self.weights)
        product = torch.zeros_like(vector)
        for part in self.parts:
            product += self._differentiate(self._differentiate(part(), create_graph=True) @ vector)
        return product

    def _differentiate(self, value: torch.Tensor, create_graph: bool = False) -> torch.Tensor:
        gradient = torch.autograd.grad(
            value, self.parameters, create_graph=create_graph, allow_unused=True, materialize_grads=True
        )
        return _flatten(gradient)

    def _move_to(self, weights: torch.Tensor) -> None:
        nn.utils.vector_to_parameters(weights, self.parameters)


def measure_increases(
    surface: LossSurface, rho: float, generator: torch.Generator, ascent_steps: int = 2, num_directions: int = 2
) -> dict[str, float]:
    """Measure how much the loss grows within a radius ρ; see `measure_flatness` for what is returned.

    Args:
        surface: the loss.
        rho: the radius.
        generator: of the random directions.
        ascent_steps: steps of projected gradient ascent within the ball, after the first one to its edge.
        num_directions: number of random directions.

    Raises:
        ValueError: if the loss is not finite.
    """
    weights = surface.weights
    loss, gradient = surface.gradient(weights)
    if not np.isfinite(loss):
        raise ValueError(f"The loss of the model is {loss}: its training diverged, there is no flatness to measure.")
    climbed = _climb(surface, gradient, rho, ascent_steps)
    adaptive = weights.square() * gradient
    adaptive *= ADAPTIVE_RADIUS * rho / _length(weights.abs() * gradient)
    random = []
    for _ in range(num_directions):  # there and back: the slope would hide what is left of the curvature
        step = rho * _random_direction(weights, generator)
        random += [surface.loss(weights + step) - loss, surface.loss(weights - step) - loss]
    return {
        "loss": loss,
        "gradient_norm": float(gradient.norm()),
        "weight_norm": float(weights.norm()),
        "increase_gradient": climbed[0] - loss,
        "increase_worst": max(climbed) - loss,
        "increase_random": float(np.mean(random)),
        "increase_adaptive": surface.loss(weights + adaptive) - loss,
    }


def _climb(surface: LossSurface, gradient: torch.Tensor, rho: float, steps: int) -> list[float]:
    """Losses along projected gradient ascent: first at ρ g/|g|, then after each further step of length ρ."""
    offset = rho * gradient / _length(gradient)
    losses = []
    for _ in range(steps):
        loss, gradient = surface.gradient(surface.weights + offset)
        losses.append(loss)
        offset = offset + rho * gradient / _length(gradient)
        offset = offset * (rho / _length(offset)).clamp_max(1.0)
    return [*losses, surface.loss(surface.weights + offset)]


def top_eigenvalue(
    product: Callable[[torch.Tensor], torch.Tensor], start: torch.Tensor, iterations: int, tolerance: float = 1e-3
) -> tuple[float, float, int]:
    """Find the largest eigenvalue of a symmetric matrix from its products with vectors.

    By Lanczos's method: power iteration that takes the best vector within all powers so far rather than the last power.
    So it needs a fraction of the products, and finds the largest eigenvalue where power iteration would find the one
    largest in magnitude. Only three vectors are kept: orthogonality is lost first along eigenvectors that have
    been found, which leaves the largest eigenvalue as it is (Paige 1980).

    Args:
        product: gives the matrix times a vector of shape (n,).
        start: shape (n,), with a part along the eigenvector: a random one.
        iterations: largest number of products.
        tolerance: relative change of the eigenvalue from one product to the next at which to stop, once the relative
            residual is below its square root.

    Returns:
        The eigenvalue λ, the residual |Hv - λv| of its unit vector v (within which there is an eigenvalue), and the
        number of products.
    """
    before, vector = torch.zeros_like(start), start / _length(start)
    diagonal: list[float] = []
    beside: list[float] = []
    value = residual = float("nan")
    while len(diagonal) < iterations:
        image = product(vector)
        diagonal.append(float(image @ vector))
        image -= diagonal[-1] * vector
        if beside:
            image -= beside[-1] * before
        length = float(image.norm())
        values, vectors = np.linalg.eigh(np.diag(diagonal) + np.diag(beside, 1) + np.diag(beside, -1))
        last, value, residual = value, float(values[-1]), length * abs(float(vectors[-1, -1]))
        # The value's error goes with the residual's square. A value that stands still beside a large residual belongs
        # to a vector between eigenvectors, from where it will rise again.
        still = abs(value - last) <= tolerance * abs(value) and residual <= tolerance**0.5 * abs(value)
        if still or length == 0:
            break
        beside.append(length)
        before, vector = vector, image / length
    return value, residual, len(diagonal)


# ---- The model's loss as a surface ----


def _draw(
    feature_extractor: QLungFeatureExtractor, cycles: Dataset, number: int, seed: int
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Features of (frames, mel bands) each and labels (n,) of cycles drawn without replacement, in random order."""
    labels = cycles["label"][:]
    labelled = np.flatnonzero([label is not None for label in labels])
    if not len(labelled):
        raise ValueError(f"None of the {len(labels)} cycles has a label: there is no loss to measure.")
    drawn = np.random.default_rng(seed).permutation(labelled)[:number]
    features = []
    for index in drawn:  # one by one: long clips of many cycles need not be in memory together
        clip = feature_extractor.fit_length(torch.from_numpy(cycles[int(index)]["waveform"].copy()))
        features.append(feature_extractor.extract_features(clip[None])[0])
    return features, torch.tensor([labels[index] for index in drawn])


def _copy_to_measure(model: QLungForAudioClassification) -> QLungForAudioClassification:
    """Copy a model for evaluation in at least float32, under the attention that has a second derivative."""
    model = copy.deepcopy(model)
    model.__dict__.pop("forward", None)  # Accelerate's wrapper, which would compute in half precision
    model.zero_grad()
    model.set_attn_implementation("eager")
    return model.eval().to(torch.promote_types(model.dtype, torch.float32))


def _cross_entropy(
    model: QLungForAudioClassification, features: Sequence[torch.Tensor], labels: torch.Tensor, batch_size: int
) -> LossSurface:
    """Mean cross-entropy of the model's logits, in parts of `batch_size` cycles."""

    def part(start: int) -> torch.Tensor:
        items, targets = features[start : start + batch_size], labels[start : start + batch_size].to(model.device)
        batch = nn.utils.rnn.pad_sequence(list(items), batch_first=True).to(model.device)
        logits = model(batch, num_frames=torch.tensor([len(item) for item in items])).logits
        return nn.functional.cross_entropy(logits, targets, reduction="sum") / len(labels)

    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return LossSurface(parameters, [partial(part, start) for start in range(0, len(labels), batch_size)])


@contextlib.contextmanager
def _full_precision() -> Iterator[None]:
    """Keep float32 products whole: TF32, which the Trainer turns on, rounds weights more coarsely than ρ moves them."""
    switches = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)  # type: ignore[attr-defined]
    before = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = "ieee"
        yield
    finally:
        for switch, precision in zip(switches, before, strict=True):
            switch.fp32_precision = precision


# ---- Vectors of all weights ----


def _flatten(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def _length(vector: torch.Tensor) -> torch.Tensor:
    return vector.norm().clamp_min(torch.finfo(vector.dtype).tiny)


def _random_direction(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A unit vector of that size, the same on every device."""
    direction = torch.randn(like.shape, generator=generator, dtype=torch.float32).to(like)
    return direction / direction.norm()

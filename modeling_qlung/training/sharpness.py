"""Sharpness-aware minimisation around any base optimiser, as one training step of a Transformers Trainer.

With g the gradient at the weights w and g' the gradient at w + ε:

- `sam` (Foret et al. 2021): ε = ρ g / ‖g‖; the optimiser gets g'.
- `asam` (Kwon et al. 2021): ε = ρ w² g / ‖|w| g‖, elementwise; the optimiser gets g'.
- `gsam` (Zhuang et al. 2022): ε as in `sam`; it gets g' − α g⊥, with g⊥ the part of g orthogonal to g'.
- `looksam` (Liu et al. 2022): every k-th step as `sam`, keeping v, the part of g' orthogonal to g; in between, in one
  pass, it gets g + α (‖g‖ / ‖v‖) v.

With gradient accumulation and with several processes, every micro-batch of every rank climbs its own ε from its own
gradient ("m-sharpness"); the gradients at the climbed weights are averaged as the Trainer averages any gradient; and
the decompositions of `gsam` and `looksam` act once per optimiser step, on the averages of g and of g'.
"""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from .trainer import QLungTrainer

METHODS = ("sam", "asam", "gsam", "looksam")


class SharpnessAwareStep:
    """
    Takes a training step's forward and backward passes at weights climbed by ε, then puts the weights back bit-exactly.

    Args:
        method: `sam`, `asam`, `gsam` or `looksam`.
        rho: radius ρ of the climb; about ten times larger for `asam`.
        alpha: weight of the orthogonal part in `gsam` and `looksam`.
        interval: k, the steps from one climb to the next in `looksam`.

    Raises:
        ValueError: for an unknown method or a value out of range.
    """

    def __init__(self, method: str = "sam", rho: float = 0.05, alpha: float = 0.4, interval: int = 5):
        if method not in METHODS:
            raise ValueError(f"The sharpness method is {method!r}; choose one of {', '.join(METHODS)}.")
        if rho <= 0:
            raise ValueError(f"rho is {rho}; it must be positive.")
        if interval < 1:
            raise ValueError(f"interval is {interval}; it must be at least 1.")
        self.method = method
        self.rho = rho
        self.alpha = alpha
        self.interval = interval
        self._clean_gradient: list[torch.Tensor] | None = None  # of the running optimiser step, for gsam and looksam
        self._direction: list[torch.Tensor] | None = None  # v of looksam

    def __call__(self, trainer: "QLungTrainer", model: nn.Module, inputs: dict[str, Any], num_items) -> torch.Tensor:
        """Run one micro-batch, leaving its gradient in `.grad`; gives the loss at the unclimbed weights (detached)."""
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if self.method == "looksam" and self._direction is not None and trainer.state.global_step % self.interval:
            loss = trainer.descend(model, inputs, num_items)
            if trainer.accelerator.sync_gradients:
                self._reuse_direction(parameters)
            return loss
        loss, gradient, random_state = self._ascent_gradient(trainer, model, inputs, parameters)
        if self.method in ("gsam", "looksam"):
            self._accumulate(gradient)
        with self._climbed(parameters, gradient), freeze_statistics(model, trainer.loss):
            _set_random_state(random_state)  # both passes drop the same units
            trainer.descend(model, inputs, num_items)
        if self.method in ("gsam", "looksam") and trainer.accelerator.sync_gradients:
            self._decompose(trainer, parameters)
        return loss

    def _ascent_gradient(self, trainer: "QLungTrainer", model: nn.Module, inputs: dict[str, Any], parameters: list):
        """Give this micro-batch's loss and gradient at w, leaving accumulated `.grad` and DDP's hooks alone."""
        random_state = _get_random_state()
        with trainer.accelerator.no_sync(model), trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(model, inputs) / trainer.current_gradient_accumulation_steps
        scaler = trainer.accelerator.scaler  # float16 only; ε does not depend on the scale, g must have that of g'
        scaled = loss if scaler is None else scaler.scale(loss)
        gradient = torch.autograd.grad(scaled, parameters, allow_unused=True, materialize_grads=True)
        return loss.detach(), list(gradient), random_state

    @contextlib.contextmanager
    def _climbed(self, parameters: list[nn.Parameter], gradient: list[torch.Tensor]) -> Iterator[None]:
        backup = [parameter.detach().clone() for parameter in parameters]
        try:
            with torch.no_grad():
                if self.method == "asam":
                    magnitude = torch._foreach_abs(backup)
                    torch._foreach_mul_(gradient, magnitude)
                    scale = self.rho / _norm(gradient)
                    torch._foreach_mul_(gradient, magnitude)
                else:
                    scale = self.rho / _norm(gradient)
                torch._foreach_mul_(gradient, scale)
                torch._foreach_add_([parameter.data for parameter in parameters], gradient)
                gradient.clear()  # the descent pass needs the memory
            yield
        finally:  # by copy: adding ε and taking it away again would leave rounding behind
            with torch.no_grad():
                torch._foreach_copy_([parameter.data for parameter in parameters], backup)

    def _accumulate(self, gradient: list[torch.Tensor]) -> None:
        if self._clean_gradient is None:
            self._clean_gradient = [part.clone() for part in gradient]
        else:
            torch._foreach_add_(self._clean_gradient, gradient)

    @torch.no_grad()
    def _decompose(self, trainer: "QLungTrainer", parameters: list[nn.Parameter]) -> None:
        """Once per optimiser step: act on g and g', both averaged over micro-batches and ranks."""
        assert self._clean_gradient is not None
        clean = trainer.accelerator.reduce(self._clean_gradient, reduction="mean")
        climbed = _gradients(parameters)
        if self.method == "gsam":
            # g⊥ = g − (g·g' / ‖g'‖²) g'
            orthogonal = _orthogonal_part(clean, climbed)
            torch._foreach_mul_(orthogonal, self.alpha)
            torch._foreach_sub_(climbed, orthogonal)
        else:
            direction = _orthogonal_part(climbed, clean)
            # In float16 a step may overflow, and is skipped; its direction must not last for k steps.
            finite = torch.isfinite(_norm(direction))
            before = self._direction or [torch.zeros_like(part) for part in direction]
            self._direction = [torch.where(finite, *pair) for pair in zip(direction, before, strict=True)]
        self._clean_gradient = None

    @torch.no_grad()
    def _reuse_direction(self, parameters: list[nn.Parameter]) -> None:
        assert self._direction is not None
        gradient = _gradients(parameters)
        scale = self.alpha * _norm(gradient) / _norm(self._direction).clamp_min(1e-12)
        torch._foreach_add_(gradient, torch._foreach_mul(self._direction, scale))

    def state_dict(self) -> dict[str, Any]:
        """Give what a resumed run needs: LookSAM's direction."""
        return {"direction": self._direction}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`."""
        self._direction = state["direction"]


@contextlib.contextmanager
def freeze_statistics(*modules: nn.Module) -> Iterator[None]:
    """Hold running statistics still (batch norm's, AdaFace's): a second pass over one batch must not count it twice."""
    tracking = [
        child for module in modules for child in module.modules() if getattr(child, "track_running_stats", False)
    ]
    try:
        for child in tracking:
            child.track_running_stats = False  # type: ignore[assignment]
        yield
    finally:
        for child in tracking:
            child.track_running_stats = True  # type: ignore[assignment]


def _gradients(parameters: list[nn.Parameter]) -> list[torch.Tensor]:
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def _norm(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Norm over all tensors together, on their device: no synchronisation with the host."""
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors)))
    return norm.clamp_min(torch.finfo(norm.dtype).tiny)


def _orthogonal_part(tensors: list[torch.Tensor], axis: list[torch.Tensor]) -> list[torch.Tensor]:
    """Part of `tensors` orthogonal to `axis`, all tensors of each taken as one vector."""
    products = torch._foreach_mul(tensors, axis)
    dot = torch.stack([product.sum() for product in products]).sum()
    return list(torch._foreach_sub(tensors, torch._foreach_mul(axis, dot / _norm(axis).square())))


def _get_random_state() -> tuple[torch.Tensor, list[torch.Tensor]]:
    devices = [torch.cuda.get_rng_state()] if torch.cuda.is_available() else []
    return torch.get_rng_state(), devices


def _set_random_state(state: tuple[torch.Tensor, list[torch.Tensor]]) -> None:
    torch.set_rng_state(state[0])
    for device_state in state[1]:
        torch.cuda.set_rng_state(device_state)

"""Sharpness-aware minimisation around any base optimiser, as one training step of a Transformers Trainer.

With g the gradient at the weights w and g' the gradient at w + ε:

- `sam` (Foret et al. 2021): ε = ρ g / ‖g‖; the optimiser gets g'.
- `asam` (Kwon et al. 2021): ε = ρ w² g / ‖|w| g‖, elementwise; the optimiser gets g'.
- `gsam` (Zhuang et al. 2022): ε as in `sam`; it gets g' − α g⊥, with g⊥ the part of g orthogonal to g'.
- `looksam` (Liu et al. 2022): every k-th step as `sam`, keeping v, the part of g' orthogonal to g; in between, in one
  pass, it gets g + α (‖g‖ / ‖v‖) v.

Every micro-batch climbs its own ε, and the gradients at the climbed weights are averaged as the Trainer averages any
gradient. On several processes, g is

- under DDP each process's own ("m-sharpness"): the climb exchanges nothing;
- under FSDP2 the average over all processes, for none holds the whole of its own; norms are over all shards.

The decompositions of `gsam` and `looksam` act once per optimiser step, on the averages of g and of g' over
micro-batches and processes.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

if TYPE_CHECKING:
    from .trainer import QLungTrainer

METHODS = ("sam", "asam", "gsam", "looksam")


class SharpnessAwareStep:
    """
    Takes a training step's forward and backward passes at weights climbed by ε, then puts the weights back bit-exactly.

    Beside what a plain step holds it needs one copy of the trainable parameters (of their shards under FSDP2), the
    weights to go back to; `gsam` and `looksam` hold one more, and so does gradient accumulation.

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
        self._clean_gradient: torch.Tensor | None = None  # of the running optimiser step, for gsam and looksam; flat
        self._direction: torch.Tensor | None = None  # v of looksam; flat
        self._sharded = False

    def __call__(self, trainer: "QLungTrainer", model: nn.Module, inputs: dict[str, Any], num_items) -> torch.Tensor:
        """Run one micro-batch, leaving its gradient in `.grad`; gives the loss at the unclimbed weights (detached)."""
        # The optimiser's, for between a forward pass and its backward FSDP2 has others in the model.
        parameters = [parameter for group in trainer.optimizer.param_groups for parameter in group["params"]]
        self._sharded = trainer.accelerator.is_fsdp2
        if self._sharded:  # in every pass, within Accelerate's `no_sync` too: only what is reduced lies in `.grad`
            model.set_requires_gradient_sync(True)  # type: ignore[operator]
        last = trainer.accelerator.sync_gradients
        if self.method == "looksam" and self._direction is not None and trainer.state.global_step % self.interval:
            loss = trainer.forward_backward(model, inputs, num_items)
            if last:
                self._reuse_direction(parameters)
            return loss
        loss, gradient = self._ascend(trainer, model, inputs, num_items, parameters)
        if self.method in ("gsam", "looksam"):
            self._accumulate(gradient)
        with self._climbed(parameters, gradient), freeze_statistics(model, trainer.loss):
            trainer.forward_backward(model, inputs, num_items)
        if self.method in ("gsam", "looksam") and last:
            self._decompose(trainer, parameters)
        return loss

    def _ascend(
        self, trainer: "QLungTrainer", model: nn.Module, inputs: dict[str, Any], num_items, parameters: list
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Give this micro-batch's loss and gradient at w, leaving what `.grad` has accumulated as it is.

        A whole backward pass, for FSDP2 reduces nothing in `torch.autograd.grad`. The second pass starts from the same
        random numbers, so that both drop the same units.
        """
        accumulated = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            parameter.grad = None
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        alone = contextlib.nullcontext() if self._sharded else trainer.accelerator.no_sync(model)
        with torch.random.fork_rng(devices), alone:
            loss = trainer.forward_backward(model, inputs, num_items)
        gradient = _gradients(parameters)
        for parameter, before in zip(parameters, accumulated, strict=True):
            parameter.grad = before
        return loss, gradient

    @contextlib.contextmanager
    def _climbed(self, parameters: list[nn.Parameter], gradient: list[torch.Tensor]) -> Iterator[None]:
        weights = _local(parameters)
        backup = torch._foreach_mul(weights, 1.0)  # copies to the bit, all in one call
        try:
            with torch.no_grad():
                if self.method == "asam":
                    torch._foreach_mul_(gradient, weights)  # |w| g up to signs, which a norm does not see
                scale = self.rho / _norm(gradient, parameters)
                if self.method == "asam":
                    torch._foreach_mul_(gradient, weights)
                torch._foreach_mul_(gradient, scale)
                torch._foreach_add_(weights, gradient)
                gradient.clear()  # the descent pass needs the memory
            yield
        finally:  # by copy: adding ε and taking it away again would leave rounding behind
            with torch.no_grad():
                torch._foreach_copy_(weights, backup)

    def _accumulate(self, gradient: list[torch.Tensor]) -> None:
        if self._clean_gradient is None:
            self._direction = None  # it has served, and makes room
            self._clean_gradient = _flat(gradient)
        else:
            torch._foreach_add_(_like(self._clean_gradient, gradient), gradient)

    @torch.no_grad()
    def _decompose(self, trainer: "QLungTrainer", parameters: list[nn.Parameter]) -> None:
        """Once per optimiser step: act on g and g', both averaged over micro-batches and processes."""
        assert self._clean_gradient is not None
        clean, self._clean_gradient = self._clean_gradient, None
        if not self._sharded:
            clean = trainer.accelerator.reduce(clean, reduction="mean")
        gradient = _gradients(parameters)
        dot = _over_shards(clean @ _flat(gradient), parameters)
        if self.method == "gsam":  # g' − α (g − (g·g' / ‖g'‖²) g')
            torch._foreach_mul_(gradient, 1 + self.alpha * dot / _norm(gradient, parameters).square())
            torch._foreach_sub_(gradient, _like(clean.mul_(self.alpha), gradient))
        else:  # v = g' − (g·g' / ‖g‖²) g
            direction = clean.mul_(-dot / _norm([clean], parameters).square())
            torch._foreach_add_(_like(direction, gradient), gradient)
            # In float16 a step may overflow, and is skipped; its direction must not last for k steps.
            finite = torch.isfinite(_norm([direction], parameters))
            self._direction = direction.masked_fill_(~finite, 0)

    @torch.no_grad()
    def _reuse_direction(self, parameters: list[nn.Parameter]) -> None:
        assert self._direction is not None
        gradient = _gradients(parameters)
        scale = self.alpha * _norm(gradient, parameters) / _norm([self._direction], parameters).clamp_min(1e-12)
        torch._foreach_add_(gradient, _like(self._direction * scale, gradient))

    def state_dict(self) -> dict[str, Any]:
        """Give what a resumed run needs: LookSAM's direction. Under FSDP2 it is not kept: that run climbs at once."""
        return {"direction": None if self._sharded else self._direction}

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


@torch.no_grad()
def _local(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """The process's own part of each: its shard under FSDP2, elsewhere all of it. The memory is shared."""
    detached = (tensor.detach() for tensor in tensors)
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in detached]


def _gradients(parameters: list[nn.Parameter]) -> list[torch.Tensor]:
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    return _local(parameter.grad for parameter in parameters if parameter.grad is not None)


def _flat(tensors: list[torch.Tensor]) -> torch.Tensor:
    """All of them in one new vector."""
    return torch.cat([tensor.flatten() for tensor in tensors])


def _like(vector: torch.Tensor, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Views of a vector in the tensors' shapes."""
    parts = vector.split([tensor.numel() for tensor in tensors])
    return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]


def _over_shards(total: torch.Tensor, parameters: Sequence[torch.Tensor]) -> torch.Tensor:
    """Sum of a process's totals over those that hold the other shards of the parameters; its own where none do."""
    first = parameters[0]
    if isinstance(first, DTensor):
        for dimension, placement in enumerate(first.placements):
            if placement.is_shard():
                torch.distributed.all_reduce(total, group=first.device_mesh.get_group(dimension))
    return total


def _norm(tensors: list[torch.Tensor], parameters: Sequence[torch.Tensor]) -> torch.Tensor:
    """Norm over all tensors and all shards together, on their device: no synchronisation with the host."""
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors)))
    norm = _over_shards(norm.square(), parameters).sqrt()
    return norm.clamp_min(torch.finfo(norm.dtype).tiny)

"""Exponential moving average of a model's weights."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn


class WeightEMA:
    """Keeps an exponential moving average of a model's parameters, in at least float32.

    average ← d · average + (1 - d) · parameter after each optimizer step, starting from the parameters as they are now.
    Buffers are left to the model: batch-norm statistics are moving averages already, and counters have no mean.

    Make it once the model is on its device, of the model itself rather than of a wrapper around it.

    Args:
        model: The model to follow.
        decay: d, in [0, 1).
        warmup: Use min(d, (1 + n) / (10 + n)) at the n-th update, as TensorFlow's `ExponentialMovingAverage` does, so
            that a short training is not ruled by its starting weights.

    Raises:
        ValueError: If `decay` is outside [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float, warmup: bool = True) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay must lie in [0, 1), got {decay}.")
        self.decay = decay
        self.warmup = warmup
        self.updates = 0
        self.average = {name: _widened(value).clone() for name, value in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Takes the model's present parameters into the average. Call it after each optimizer step."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.warmup else self.decay
        present = [_widened(value) for value in self._parameters(model)]
        torch._foreach_lerp_(list(self.average.values()), present, 1 - decay)

    @contextlib.contextmanager
    def swap(self, model: nn.Module) -> Iterator[None]:
        """Puts the averaged weights into the model; on leaving, restores its own bit by bit, also after an error."""
        parameters = self._parameters(model)
        with torch.no_grad():
            kept = [value.clone() for value in parameters]
        self.apply(model)
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(parameters, kept)

    @torch.no_grad()
    def apply(self, model: nn.Module) -> None:
        """Puts the averaged weights into the model for good."""
        torch._foreach_copy_(self._parameters(model), list(self.average.values()))

    def _parameters(self, model: nn.Module) -> list[torch.Tensor]:
        """The model's parameters in the order of the average."""
        parameters = dict(model.named_parameters())
        _check_names(parameters, self.average, "The model")
        return [parameters[name] for name in self.average]

    def state_dict(self) -> dict[str, Any]:
        """The average by parameter name and the number of updates, for `torch.save`."""
        return {"updates": self.updates, "average": dict(self.average)}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from what `state_dict` gave.

        Raises:
            ValueError: If names or shapes differ from the model's.
        """
        _check_names(state["average"], self.average, "The saved average")
        for name, value in self.average.items():
            value.copy_(state["average"][name])
        self.updates = state["updates"]


def _widened(value: torch.Tensor) -> torch.Tensor:
    # In bfloat16 a step of 1 - d = 0.001 would be rounded away.
    return value.detach().to(torch.promote_types(value.dtype, torch.float32))


def _check_names(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], owner: str) -> None:
    different = sorted(
        name
        for name in found.keys() | expected.keys()
        if name not in found or name not in expected or found[name].shape != expected[name].shape
    )
    if different:
        raise ValueError(
            f"{owner} differs from the averaged model in {len(different)} parameters, the first {different[0]!r}. "
            "Give the model that the average was made of, unwrapped."
        )

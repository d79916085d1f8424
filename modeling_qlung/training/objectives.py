"""What turns a batch into a training loss: supervised, Patch-Mix, Patch-Mix contrastive, device-supervised contrastive.

An objective decides what the model is shown and what is asked of it; the [`ClassificationLoss`] within it stays a free
choice (published: cross-entropy). One call shape: `objective(model, inputs, loss)` gives a scalar and the outputs.

Under several processes each contrasts within its own batch, as the published code does on its one GPU: the number of
negatives follows the batch per device. Every draw comes from torch's global CPU generator, so that both passes of a
sharpness-aware step, and a resumed run, mix alike.
"""

import contextlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from accelerate.utils import extract_model_from_parallel
from torch import nn

from ..modeling_qlung import QLungClassifierOutput, QLungForAudioClassification
from .augmentation import send
from .losses import ClassificationLoss
from .sharpness import freeze_statistics

Inputs = Mapping[str, torch.Tensor]


class Objective(nn.Module, ABC):
    """
    The call shape that every objective shares. Subclasses implement `forward`.

    `two_views` asks for `second_view` in the inputs: the same clips under another draw of SpecAugment. `needs_device`
    asks for `device`, the index of each row's stethoscope. `projector` is what an objective trains beside the model.
    """

    two_views: bool = False
    needs_device: bool = False
    projector: "Projector | None"

    def __init__(self) -> None:
        super().__init__()
        self.register_module("projector", None)

    def attach(self, model: QLungForAudioClassification) -> None:
        """Put what is trained beside the model into it; call it before optimisers and wrappers see the model."""

    def detach(self, model: QLungForAudioClassification) -> None:
        """Take it out again: the model is as it was, but trained."""

    @abstractmethod
    def forward(
        self, model: nn.Module, inputs: Inputs, loss: ClassificationLoss
    ) -> tuple[torch.Tensor, QLungClassifierOutput]:
        """Compute the training loss of a batch.

        Args:
            model: the attached model, or DDP's wrapper around it.
            inputs: `input_values` (batch, frames, mel bands), `labels` (batch,), `quality` (batch,), and what
                `two_views` and `needs_device` ask for.
            loss: of the classification.

        Returns:
            A scalar tensor, and the outputs that were classified.
        """


class Supervised(Objective):
    """The loss of the model's outputs on the batch as it is."""

    def forward(self, model, inputs, loss):
        """See [`Objective.forward`]."""
        outputs = model(input_values=inputs["input_values"])
        return classification_loss(loss, model, outputs, inputs["labels"], inputs["quality"]), outputs


class PatchMix(Objective):
    """
    Patch-Mix: a share 1 - λ of each item's patches comes from a partner in the batch (Bae et al. 2023, arXiv
    2305.14032), and the loss is λ L(y) + (1 - λ) L(y of the partner).

    Margins of the partner's label are those of the partner's recording: its class, its quality.

    Args:
        mix_beta: λ is drawn from Beta(mix_beta, mix_beta), once per batch; 1 is uniform.

    Raises:
        ValueError: if `mix_beta` is not positive; when attached to a model whose encoder is no AST.
    """

    def __init__(self, mix_beta: float = 1.0) -> None:
        super().__init__()
        self.mix_beta = _positive("mix_beta", mix_beta)

    def attach(self, model):
        """Check that the model has patches; nothing is put into it."""
        _check_patches(model)

    def forward(self, model, inputs, loss):
        """See [`Objective.forward`]; the outputs are those of the mixed items."""
        features, labels, quality = (inputs[name] for name in ("input_values", "labels", "quality"))
        mixture = PatchMixture.draw(len(features), _number_of_patches(model, features), self.mix_beta)
        with mixed_patches(model, mixture):
            outputs = model(input_values=features)
        own = classification_loss(loss, model, outputs, labels, quality)
        with freeze_statistics(loss):  # the same embeddings a second time
            partners = send(mixture.partners, labels.device)
            other = classification_loss(loss, model, outputs, labels[partners], quality[partners])
        return mixture.share * own + (1 - mixture.share) * other, outputs

    def extra_repr(self) -> str:
        """Settings for `print`."""
        return f"mix_beta={self.mix_beta:g}"


class ContrastiveObjective(Objective):
    """
    A classification loss plus a weighted contrast of projected embeddings.

    The projector is a sub-module of the model while it is attached, so that optimiser, DDP, sharpness-aware steps and
    averaging treat it as any other part; files of the model, checkpoints' too, leave it out. What a resumed run needs
    of it is in the objective's own `state_dict`.

    Args:
        contrast_weight: weight of the contrast.
        contrast_temperature: T, which divides the cosines.

    Raises:
        ValueError: if the temperature is not positive.
    """

    def __init__(self, contrast_weight: float, contrast_temperature: float) -> None:
        super().__init__()
        self.contrast_weight = contrast_weight
        self.contrast_temperature = _positive("contrast_temperature", contrast_temperature)

    def attach(self, model):
        """Put a fresh projector into the model, as wide as the embedding."""
        self.projector = Projector(model.config.hidden_size, model.config.hidden_size).to(model.device)
        model.add_module("projector", self.projector)
        model._keys_to_ignore_on_save |= _saved_names(self.projector)

    def detach(self, model):
        """Take the projector out of the model."""
        if self.projector is not None:
            model._keys_to_ignore_on_save -= _saved_names(self.projector)
            del model.projector
            self.projector = None

    def _project(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Project in the projector's own precision."""
        assert self.projector is not None, "attach the objective to the model first"
        with torch.autocast(embeddings.device.type, enabled=False):
            return self.projector(embeddings.to(next(self.projector.parameters()).dtype))

    def _no_contrast(self) -> torch.Tensor:
        """Give 0 for a batch of one, which has no other to contrast with and no batch statistics.

        Its gradient is 0 in every parameter of the projector: DDP waits for each of them in every step.
        """
        assert self.projector is not None, "attach the objective to the model first"
        return torch.stack([(0 * parameter).sum() for parameter in self.projector.parameters()]).sum()

    def extra_repr(self) -> str:
        """Settings for `print`."""
        return f"contrast_weight={self.contrast_weight:g}, contrast_temperature={self.contrast_temperature:g}"


class PatchMixContrast(ContrastiveObjective):
    """
    Patch-Mix contrastive learning (Bae et al. 2023, arXiv 2305.14032): the loss on the unmixed batch, plus
    a contrast that finds in each mixed item the two unmixed ones, by the shares of their patches.

    Args:
        mix_beta: see [`PatchMix`].
        contrast_weight: weight of the contrast (published: α = 1).
        contrast_temperature: T (published: 0.06).
        contrast_negatives: what an item is told from: `all` others (published), or those of an `other_class`.
        target_projector: project the unmixed embeddings too. Published: off, only the mixed ones are projected.
        target_gradient: let the contrast's gradient through the unmixed embeddings. Published: off. (The published
            code's `grad_block` is off and off, `grad_flow` a gradient alone, `project_block` a projector alone.)

    Raises:
        ValueError: if `mix_beta` or the temperature is not positive, or `contrast_negatives` is unknown; when attached
            to a model whose encoder is no AST.
    """

    def __init__(
        self,
        mix_beta: float = 1.0,
        contrast_weight: float = 1.0,
        contrast_temperature: float = 0.06,
        contrast_negatives: Literal["all", "other_class"] = "all",
        target_projector: bool = False,
        target_gradient: bool = False,
    ) -> None:
        super().__init__(contrast_weight, contrast_temperature)
        if contrast_negatives not in ("all", "other_class"):
            raise ValueError(f"contrast_negatives is {contrast_negatives!r}; choose one of all, other_class.")
        self.mix_beta = _positive("mix_beta", mix_beta)
        self.contrast_negatives = contrast_negatives
        self.target_projector = target_projector
        self.target_gradient = target_gradient

    def attach(self, model):
        """Put a fresh projector into the model, which must have patches."""
        _check_patches(model)
        super().attach(model)

    def forward(self, model, inputs, loss):
        """See [`Objective.forward`]; the outputs are those of the unmixed items."""
        features, labels = inputs["input_values"], inputs["labels"]
        outputs = model(input_values=features)
        value = classification_loss(loss, model, outputs, labels, inputs["quality"])
        if len(features) == 1:
            return value + self._no_contrast(), outputs
        mixture = PatchMixture.draw(len(features), _number_of_patches(model, features), self.mix_beta)
        # Not through torch.compile, which would take the graph of the unmixed batch: it does not look for new hooks.
        plain = extract_model_from_parallel(model, keep_torch_compile=False)
        with mixed_patches(model, mixture):
            mixed = plain(input_values=features).pooler_output
        target = outputs.pooler_output if self.target_gradient else outputs.pooler_output.detach()
        if self.target_projector:
            with contextlib.nullcontext() if self.target_gradient else torch.no_grad():
                target = self._project(target)
        contrast = patch_mix_contrast(
            self._project(mixed),
            target,
            mixture,
            self.contrast_temperature,
            labels if self.contrast_negatives == "other_class" else None,
        )
        return value + self.contrast_weight * contrast, outputs

    def extra_repr(self) -> str:
        """Settings for `print`."""
        return (
            f"mix_beta={self.mix_beta:g}, {super().extra_repr()}, contrast_negatives={self.contrast_negatives}, "
            f"target_projector={self.target_projector}, target_gradient={self.target_gradient}"
        )


class DeviceContrast(ContrastiveObjective):
    """
    Stethoscope-guided supervised contrastive learning, SG-SCL (Kim et al. 2024, arXiv 2312.09603): the
    loss, plus a supervised contrast of two views of the batch whose classes are the stethoscopes.

    It is trained as published: items of one stethoscope attract each other, those of different ones repel each other.
    Each item's two views are masked independently. (The published code draws one mask for a whole batch and writes it
    into the batch, so that its second view carries the first's masks too; it also computes a gradient-reversed
    embedding, which this mode leaves unused.)

    Args:
        contrast_weight: weight of the contrast (published: α = 1).
        contrast_temperature: T (published: 0.06).
        target_gradient: let the gradient through the second view too. Published: off (`project1_project2block`).

    Raises:
        ValueError: if the temperature is not positive; when called on inputs without `device`.
    """

    two_views = True
    needs_device = True

    def __init__(
        self, contrast_weight: float = 1.0, contrast_temperature: float = 0.06, target_gradient: bool = False
    ) -> None:
        super().__init__(contrast_weight, contrast_temperature)
        self.target_gradient = target_gradient

    def forward(self, model, inputs, loss):
        """See [`Objective.forward`]; the outputs are those of the first view."""
        if "device" not in inputs:
            raise ValueError("The device contrast needs each row's stethoscope: give QLungTrainer `devices`.")
        outputs = model(input_values=inputs["input_values"])
        value = classification_loss(loss, model, outputs, inputs["labels"], inputs["quality"])
        if len(inputs["device"]) == 1:
            return value + self._no_contrast(), outputs
        first = self._project(outputs.pooler_output)
        with contextlib.nullcontext() if self.target_gradient else torch.no_grad():
            second = self._project(_unwrapped(model)(input_values=inputs["second_view"]).pooler_output)
        contrast = supervised_contrast(first, second, inputs["device"], self.contrast_temperature)
        return value + self.contrast_weight * contrast, outputs

    def extra_repr(self) -> str:
        """Settings for `print`."""
        return f"{super().extra_repr()}, target_gradient={self.target_gradient}"


class Projector(nn.Sequential):
    """Linear, batch norm, ReLU, linear: the projection head of both papers (there 768 to 768)."""

    def __init__(self, input_size: int, output_size: int) -> None:
        super().__init__(
            nn.Linear(input_size, input_size), nn.BatchNorm1d(input_size), nn.ReLU(), nn.Linear(input_size, output_size)
        )


# ---- Mixing ----


@dataclass(frozen=True)
class PatchMixture:
    """
    One draw of Patch-Mix: the same patches of every item are replaced by its partner's.

    Args:
        partners: index of each item's partner, a permutation, (batch,), drawn on the CPU.
        replaced: whether a patch is the partner's, (patches,), bool, drawn on the CPU.
    """

    partners: torch.Tensor
    replaced: torch.Tensor

    @property
    def share(self) -> float:
        """λ, the share of patches that an item keeps."""
        return 1 - float(self.replaced.double().mean())

    @classmethod
    def draw(cls, batch_size: int, num_patches: int, beta: float) -> "PatchMixture":
        """Draw λ from Beta(beta, beta), partners, and the int((1 - λ) patches) that they give."""
        share = float(torch.distributions.Beta(beta, beta).sample())
        partners = torch.randperm(batch_size)
        replaced = torch.zeros(num_patches, dtype=torch.bool)
        replaced[torch.randperm(num_patches)[: int(num_patches * (1 - share))]] = True
        return cls(partners, replaced)

    def mix(self, patches: torch.Tensor) -> torch.Tensor:
        """Mix patch embeddings (batch, patches, hidden), on the mixture's device."""
        return torch.where(self.replaced[:, None], patches[self.partners], patches)


@contextlib.contextmanager
def mixed_patches(model: nn.Module, mixture: PatchMixture) -> Iterator[None]:
    """Let the model's encoder mix its patch embeddings, before it adds the special tokens and the positions."""
    embedding = _unwrapped(model).qlung.encoder.embeddings.patch_embeddings
    device = embedding.projection.weight.device
    sent = PatchMixture(send(mixture.partners, device), send(mixture.replaced, device))
    hook = embedding.register_forward_hook(lambda module, inputs, patches: sent.mix(patches))
    try:
        yield
    finally:
        hook.remove()


def _number_of_patches(model: nn.Module, features: torch.Tensor) -> int:
    """Number of patches that the encoder makes of features (batch, frames, mel bands)."""
    config = _unwrapped(model).config.audio_config
    frames, bands = (size - config.patch_size for size in features.shape[1:])
    return (bands // config.frequency_stride + 1) * (frames // config.time_stride + 1)


def _check_patches(model: QLungForAudioClassification) -> None:
    kind = model.config.audio_config.model_type
    if kind != "audio-spectrogram-transformer":
        raise ValueError(
            f"Patch-Mix mixes the patches of an Audio Spectrogram Transformer, and the encoder is a {kind}: choose "
            "--objective supervised or device_contrast, or another --encoder."
        )


# ---- Losses ----


def classification_loss(
    loss: ClassificationLoss,
    model: nn.Module,
    outputs: QLungClassifierOutput,
    labels: torch.Tensor,
    quality: torch.Tensor,
) -> torch.Tensor:
    """Give the loss what it reads of the outputs: cosines, the logits of a linear head only, lengths of embeddings."""
    assert outputs.pooler_output is not None  # optional in the class, as any field of a ModelOutput
    return loss(
        outputs.cosines,
        labels,
        quality,
        logits=outputs.logits if _unwrapped(model).config.head == "linear" else None,
        norms=outputs.pooler_output.norm(dim=-1),
    )


def patch_mix_contrast(
    mixed: torch.Tensor,
    unmixed: torch.Tensor,
    mixture: PatchMixture,
    temperature: float,
    labels: torch.Tensor | None = None,
) -> torch.Tensor:
    """Contrast mixed with unmixed items (Bae et al. 2023, arXiv 2305.14032).

    With s_ij = cos(mixed_i, unmixed_j) / T and p_i the softmax of s_i over all j, the mean over i of
    -λ log p_ii - (1 - λ) log p_i,partner(i).

    Args:
        mixed: embeddings (batch, hidden).
        unmixed: embeddings (batch, hidden).
        mixture: what was mixed.
        temperature: T.
        labels: classes (batch,); if given, p_i is a softmax over the items of another class and i and partner(i) alone.

    Returns:
        A scalar tensor, of float32 at least.
    """
    with torch.autocast(mixed.device.type, enabled=False):
        similarity = _normalized(mixed) @ _normalized(unmixed).T / temperature
        own = torch.arange(len(mixed), device=mixed.device)
        partners = send(mixture.partners, mixed.device)
        candidates = similarity
        if labels is not None:
            compared = labels[:, None] != labels
            compared[own, own] = True
            compared[own, partners] = True
            candidates = similarity.masked_fill(~compared, float("-inf"))
        attraction = mixture.share * similarity[own, own] + (1 - mixture.share) * similarity[own, partners]
        return (candidates.logsumexp(dim=1) - attraction).mean()


def supervised_contrast(
    first: torch.Tensor, second: torch.Tensor, classes: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Contrast two views of a batch, supervised by a class (Khosla et al. 2020, arXiv 2004.11362, eq. 2).

    With z all 2 · batch embeddings and s_ij = cos(z_i, z_j) / T: the mean over i of the mean over the others j of i's
    class, its own second view among them, of -log(exp s_ij / Σ_{k ≠ i} exp s_ik).

    Args:
        first: embeddings (batch, hidden).
        second: embeddings (batch, hidden) of the same items.
        classes: (batch,).
        temperature: T.

    Returns:
        A scalar tensor, of float32 at least.
    """
    with torch.autocast(first.device.type, enabled=False):
        embeddings = _normalized(torch.cat([first, second]))
        similarity = embeddings @ embeddings.T / temperature
        itself = torch.eye(len(embeddings), dtype=torch.bool, device=first.device)
        classes = classes.repeat(2)
        positives = (classes[:, None] == classes) & ~itself
        attraction = (similarity * positives).sum(dim=1) / positives.sum(dim=1)
        return (similarity.masked_fill(itself, float("-inf")).logsumexp(dim=1) - attraction).mean()


def _normalized(embeddings: torch.Tensor) -> torch.Tensor:
    """Unit length, in float32 at least: the temperature makes sixteen times more of a rounding."""
    return nn.functional.normalize(embeddings.to(torch.promote_types(embeddings.dtype, torch.float32)), dim=1)


# ---- Models ----


def _unwrapped(model: nn.Module) -> QLungForAudioClassification:
    """Give the model within DDP.

    A second view goes through it: another call of DDP would overwrite buffers (a batch norm's) that the first call's
    backward pass needs. Gradients are averaged all the same, by hooks of the parameters.
    """
    return extract_model_from_parallel(model)


def _saved_names(projector: nn.Module) -> set[str]:
    return {f"projector.{name}" for name in projector.state_dict()}


def _positive(name: str, value: float) -> float:
    if value <= 0:
        raise ValueError(f"{name} is {value}; it must be positive.")
    return value


OBJECTIVES: dict[str, type[Objective]] = {
    "supervised": Supervised,
    "patch_mix": PatchMix,
    "patch_mix_contrast": PatchMixContrast,
    "device_contrast": DeviceContrast,
}


def build_objective(name: str, **options) -> Objective:
    """Build the objective registered as `name`.

    Args:
        name: a key of `OBJECTIVES`.
        options: arguments of the objective's class.

    Raises:
        ValueError: if the name is unknown.
        TypeError: if the objective has no such option.
    """
    if name not in OBJECTIVES:
        raise ValueError(f"Unknown objective {name!r}. Choose one of: {', '.join(OBJECTIVES)}.")
    accepted = list(inspect.signature(OBJECTIVES[name]).parameters)
    if unknown := sorted(set(options) - set(accepted)):
        raise TypeError(
            f"Objective {name!r} has no option {', '.join(unknown)}. Its options: {', '.join(accepted) or 'none'}."
        )
    return OBJECTIVES[name](**options)

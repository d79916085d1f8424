"""Classification losses on cosines, each with one call shape: `loss(cosines, labels, quality, logits=, norms=)`.

A loss reads what it needs of its inputs and leaves the rest, so a trainer calls all of them alike. Inference stays the
argmax of the model's own logits: margins and priors exist during training only.
"""

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


class ClassificationLoss(nn.Module, ABC):
    """The call shape that every loss here shares. Subclasses implement `compute`.

    `margin_factor` multiplies the margins of those losses that have one; a [`MarginSchedule`] gives its value.
    """

    margin_factor: float = 1.0
    uses_quality: bool = False

    def forward(
        self,
        cosines: torch.Tensor,
        labels: torch.Tensor,
        quality: torch.Tensor | None = None,
        *,
        logits: torch.Tensor | None = None,
        norms: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Mean loss of a batch, computed outside autocast in at least float32 (float64 stays float64).

        Args:
            cosines: cos θ between embedding and class weights, (batch, C), in [-1, 1].
            labels: Class indices, (batch,), int64.
            quality: Recording quality, (batch,), in [0, 1].
            logits: Logits of a linear head, (batch, C). They replace scale · cosines in plain cross-entropy.
            norms: Lengths of the embeddings, (batch,).

        Returns:
            A scalar tensor.

        Raises:
            ValueError: On a wrong shape, or where an input that this loss needs is missing.
        """
        if cosines.ndim != 2:
            raise ValueError(f"cosines must be (batch, classes), got shape {tuple(cosines.shape)}.")
        for name, value in {"labels": labels, "quality": quality, "norms": norms}.items():
            if value is not None and value.shape != cosines.shape[:1]:
                raise ValueError(f"{name} must be ({len(cosines)},), one per item, got {tuple(value.shape)}.")
        if logits is not None and logits.shape != cosines.shape:
            raise ValueError(f"logits {tuple(logits.shape)} and cosines {tuple(cosines.shape)} must agree in shape.")
        quality, logits, norms = (None if value is None else _widen(value) for value in (quality, logits, norms))
        with torch.autocast(cosines.device.type, enabled=False):
            return self.compute(_widen(cosines), labels, quality, logits, norms)

    @abstractmethod
    def compute(
        self,
        cosines: torch.Tensor,
        labels: torch.Tensor,
        quality: torch.Tensor | None,
        logits: torch.Tensor | None,
        norms: torch.Tensor | None,
    ) -> torch.Tensor:
        """`forward` on checked inputs of at least float32."""


def _widen(values: torch.Tensor) -> torch.Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def class_priors(class_counts: Sequence[int]) -> torch.Tensor:
    """Class priors π_k = n_k / N of the training set, (C,), float64.

    Raises:
        ValueError: If there are fewer than two classes, or a class has no example (its log-prior is infinite).
    """
    if len(class_counts) < 2:
        raise ValueError(f"class_counts needs at least two classes, got {list(class_counts)}.")
    for index, count in enumerate(class_counts):
        if count <= 0:
            raise ValueError(
                f"class_counts[{index}] is {count}: class {index} has no training example. Train on data that has it, "
                "or with a loss that needs no counts, such as cross_entropy or arcface."
            )
    counts = torch.tensor(class_counts, dtype=torch.float64)
    return counts / counts.sum()


def add_angular_margin(cosines: torch.Tensor, labels: torch.Tensor, margins: torch.Tensor) -> torch.Tensor:
    """cos(θ_y + m) in the target's place, the other cosines untouched (ArcFace: Deng et al. 2019, eq. 3).

    Where θ + m would pass π, beyond which the cosine rises again, ArcFace's linear continuation cos θ - m sin m takes
    over; each item has its own threshold. Everything is in cosines: acos has an infinite slope at ±1.

    Args:
        cosines: (batch, C), float32 or float64.
        labels: (batch,).
        margins: In radians, (batch,), in [0, π]. Margins are data: no gradient flows through them.

    Returns:
        (batch, C).
    """
    margins = margins.detach()[:, None]
    target, shifted = _rotate_target(cosines, labels, margins)
    shifted = torch.where(target < -margins.cos(), target - margins * margins.sin(), shifted)
    return cosines.scatter(1, labels[:, None], shifted)


def _rotate_target(
    cosines: torch.Tensor, labels: torch.Tensor, angles: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos θ_y and cos(θ_y + angle), (batch, 1) each like the angles, which are data."""
    eps = torch.finfo(cosines.dtype).eps
    # Just inside ±1, where 1 - cos² is at least ε and the slope of the square root finite.
    target = cosines.gather(1, labels[:, None]).clamp(-1 + eps, 1 - eps)
    sines = (1 - target.square()).sqrt()
    return target, target * angles.cos() - sines * angles.sin()


def _subtract_from_target(cosines: torch.Tensor, labels: torch.Tensor, margins: torch.Tensor) -> torch.Tensor:
    """cos θ_y - m in the target's place; margins (batch,)."""
    return cosines.scatter_add(1, labels[:, None], -margins.detach().to(cosines.dtype)[:, None])


def _check_weights(class_weights: Sequence[float] | None) -> torch.Tensor | None:
    if class_weights is None:
        return None
    weights = torch.as_tensor(class_weights, dtype=torch.get_default_dtype())
    if weights.ndim != 1 or not bool(((weights >= 0) & weights.isfinite()).all()):
        raise ValueError(f"class_weights must be one finite number >= 0 per class, got {list(class_weights)}.")
    return weights


def _numbers(values: torch.Tensor | None) -> str:
    return "None" if values is None else f"[{', '.join(f'{value:.4g}' for value in values.tolist())}]"


class CrossEntropyLoss(ClassificationLoss):
    """Cross-entropy on scale · cosines, or on `logits` where the model has a linear head.

    Args:
        scale: Factor of the cosines.
        label_smoothing: Share of the target's probability that is spread evenly over all classes.
        class_weights: One weight per class; the mean over the batch is weighted by them.
    """

    class_weights: torch.Tensor | None

    def __init__(
        self, scale: float = 37.0, label_smoothing: float = 0.0, class_weights: Sequence[float] | None = None
    ) -> None:
        super().__init__()
        self.scale = scale
        self.label_smoothing = label_smoothing
        self.register_buffer("class_weights", _check_weights(class_weights), persistent=False)

    def compute(self, cosines, labels, quality, logits, norms):
        """See [`ClassificationLoss.forward`]; reads `logits`."""
        scores = self.scale * cosines if logits is None else logits
        weights = None if self.class_weights is None else self.class_weights.to(scores.dtype)
        return F.cross_entropy(scores, labels, weights, label_smoothing=self.label_smoothing)

    def extra_repr(self) -> str:
        """Settings for `print`."""
        return (
            f"scale={self.scale:g}, label_smoothing={self.label_smoothing:g}, "
            f"class_weights={_numbers(self.class_weights)}"
        )


class QLungLoss(ClassificationLoss):
    """QLung's total: cross-entropy plus λ times the dual-factor angular margin loss (arXiv 2606.11915).

    L = CE(s_a cos θ) + λ · CE(s_d cos(θ_y + m_d); s_d cos θ_j, j ≠ y), with m_d = γ κ quality + (1 - γ) m_c(y) and
    the log-scaled class margin m_c(y) = -log π_y · m_target / log C. A uniform prior gives m_target everywhere.

    The published ablation is this class with other settings: `margin_weight=0` (CE), `fixed_margin=0.2` (+ fixed),
    `quality_share=1` (+ quality), the defaults (+ class), all with the `logits` of a linear head; and the defaults
    without `logits` (+ angular classifier). The paper names neither the fixed margin nor γ of the single-factor row.

    Args:
        class_counts: Training examples per class, all positive.
        scale: s_a of the plain cross-entropy.
        margin_scale: s_d of the margin term.
        margin_weight: λ.
        quality_share: γ, in [0, 1].
        quality_margin: κ, the margin in radians at quality 1.
        target_margin: m_target in radians.
        fixed_margin: A constant margin in radians instead of the composite one; then quality does not count.
        label_smoothing: Of the plain cross-entropy only.
        class_weights: Of the plain cross-entropy only, one per class.

    Raises:
        ValueError: If a class has no example or `quality_share` is outside [0, 1]; when called with `quality=None`
            where quality counts.
    """

    class_margins: torch.Tensor

    def __init__(
        self,
        class_counts: Sequence[int],
        scale: float = 37.0,
        margin_scale: float = 15.0,
        margin_weight: float = 0.4,
        quality_share: float = 0.5,
        quality_margin: float = 0.5,
        target_margin: float = 0.2,
        fixed_margin: float | None = None,
        *,
        label_smoothing: float = 0.0,
        class_weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= quality_share <= 1:
            raise ValueError(f"quality_share (γ) must lie in [0, 1], got {quality_share}.")
        self.plain = CrossEntropyLoss(scale, label_smoothing, class_weights)
        self.margin_scale = margin_scale
        self.margin_weight = margin_weight
        self.quality_share = quality_share
        self.quality_margin = quality_margin
        self.fixed_margin = fixed_margin
        self.uses_quality = fixed_margin is None and margin_weight > 0 and quality_share > 0
        margins = -class_priors(class_counts).log() * (target_margin / math.log(len(class_counts)))
        self.register_buffer("class_margins", margins.to(torch.get_default_dtype()), persistent=False)

    def compute(self, cosines, labels, quality, logits, norms):
        """See [`ClassificationLoss.forward`]; reads `quality` and `logits`."""
        loss = self.plain(cosines, labels, logits=logits)
        if self.margin_weight == 0:
            return loss
        margins = self.margin_factor * self._margins(cosines, labels, quality)
        scores = self.margin_scale * add_angular_margin(cosines, labels, margins)
        return loss + self.margin_weight * F.cross_entropy(scores, labels)

    def _margins(self, cosines: torch.Tensor, labels: torch.Tensor, quality: torch.Tensor | None) -> torch.Tensor:
        """Margins in radians, (batch,)."""
        if self.fixed_margin is not None:
            return cosines.new_full(labels.shape, self.fixed_margin)
        # expand_as refuses class counts of another length than the classes at hand.
        class_margins = self.class_margins.expand_as(cosines).gather(1, labels[:, None]).squeeze(1).to(cosines.dtype)
        if self.quality_share == 0:
            return class_margins
        if quality is None:
            raise ValueError(
                f"QLungLoss needs quality, (batch,), because quality_share is {self.quality_share:g}. Give it (the "
                "feature extractor's return_quality=True), or set quality_share=0 or fixed_margin."
            )
        quality_margins = self.quality_margin * quality.to(cosines.dtype)
        return self.quality_share * quality_margins + (1 - self.quality_share) * class_margins

    def extra_repr(self) -> str:
        """Settings for `print`."""
        if self.fixed_margin is None:
            margin = (
                f"quality_share={self.quality_share:g}, quality_margin={self.quality_margin:g}, "
                f"class_margins={_numbers(self.class_margins)}"
            )
        else:
            margin = f"fixed_margin={self.fixed_margin:g}"
        return f"margin_scale={self.margin_scale:g}, margin_weight={self.margin_weight:g}, {margin}"


class ArcFaceLoss(ClassificationLoss):
    """Additive angular margin: softmax over s cos(θ_y + m) (Deng et al. 2019, arXiv 1801.07698, eq. 3).

    Args:
        scale: s.
        margin: m in radians, in [0, π].
    """

    def __init__(self, scale: float = 64.0, margin: float = 0.5) -> None:
        super().__init__()
        self.scale = scale
        self.margin = margin

    def compute(self, cosines, labels, quality, logits, norms):
        """See [`ClassificationLoss.forward`]; reads cosines and labels."""
        margins = cosines.new_full(labels.shape, self.margin_factor * self.margin)
        return F.cross_entropy(self.scale * add_angular_margin(cosines, labels, margins), labels)

    def extra_repr(self) -> str:
        """Settings for `print`."""
        return f"scale={self.scale:g}, margin={self.margin:g}"


class CosFaceLoss(ClassificationLoss):
    """Additive cosine margin: softmax over s (cos θ_y - m) (Wang et al. 2018, arXiv 1801.09414, eq. 4).

    Args:
        scale: s.
        margin: m, in units of the cosine.
    """

    def __init__(self, scale: float = 64.0, margin: float = 0.35) -> None:
        super().__init__()
        self.scale = scale
        self.margin = margin

    def compute(self, cosines, labels, quality, logits, norms):
        """See [`ClassificationLoss.forward`]; reads cosines and labels."""
        margins = cosines.new_full(labels.shape, self.margin_factor * self.margin)
        return F.cross_entropy(self.scale * _subtract_from_target(cosines, labels, margins), labels)

    def extra_repr(self) -> str:
        """Settings for `print`."""
        return f"scale={self.scale:g}, margin={self.margin:g}"


class AdaFaceLoss(ClassificationLoss):
    """Quality-adaptive margin with the embedding's length as quality (Kim et al. 2022, arXiv 2204.00964).

    Softmax over s (cos(θ_y + g_angle) - g_add), with g_angle = -m z, g_add = m z + m and z the embedding's length
    standardised by running statistics, times h, cut to [-1, 1]. θ_y + g_angle is kept within [0, π].

    The statistics of a batch are averaged over processes. They start from the first batch (ours; the reference code
    starts from 20 and 100, lengths of face embeddings), and move only in training mode and outside
    `sharpness.freeze_statistics`. They are part of `state_dict`, and a resumed training needs them.

    Args:
        scale: s.
        margin: m.
        concentration: h: at 1/3, a length three standard deviations from the mean reaches the cut.
        momentum: Weight of a new batch in the running mean and standard deviation.
    """

    norm_mean: torch.Tensor
    norm_std: torch.Tensor
    num_batches: torch.Tensor

    def __init__(
        self, scale: float = 64.0, margin: float = 0.4, concentration: float = 0.333, momentum: float = 0.01
    ) -> None:
        super().__init__()
        self.scale = scale
        self.margin = margin
        self.concentration = concentration
        self.momentum = momentum
        self.track_running_stats = True
        self.register_buffer("norm_mean", torch.tensor(0.0))
        self.register_buffer("norm_std", torch.tensor(1.0))
        self.register_buffer("num_batches", torch.tensor(0))

    def compute(self, cosines, labels, quality, logits, norms):
        """See [`ClassificationLoss.forward`]; reads `norms`."""
        if norms is None:
            raise ValueError("AdaFaceLoss needs norms, (batch,): the lengths of the embeddings before normalisation.")
        norms = norms.detach().clamp(0.001, 100)
        # A single item has no standard deviation, and one NaN would stay in the running value for good.
        if self.training and self.track_running_stats and len(norms) > 1:
            self._update(norms)
        spread = (norms - self.norm_mean) / (self.norm_std + 0.001)
        scaler = (self.concentration * spread).clamp(-1, 1).to(cosines.dtype)
        margin = self.margin_factor * self.margin
        shifted = self._rotate(cosines, labels, -margin * scaler)
        return F.cross_entropy(self.scale * _subtract_from_target(shifted, labels, margin + margin * scaler), labels)

    @torch.no_grad()
    def _update(self, norms: torch.Tensor) -> None:
        weight = torch.where(self.num_batches == 0, 1.0, self.momentum).to(self.norm_mean.dtype)
        statistics = torch.stack([norms.mean(), norms.std()]).to(self.norm_mean.dtype)
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(statistics)
            statistics /= torch.distributed.get_world_size()
        self.norm_mean.lerp_(statistics[0], weight)
        self.norm_std.lerp_(statistics[1], weight)
        self.num_batches += 1

    @staticmethod
    def _rotate(cosines: torch.Tensor, labels: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
        """cos(clip(θ_y + angle, 0, π)) in the target's place; angles (batch,) of either sign."""
        angles = angles[:, None]
        target, shifted = _rotate_target(cosines, labels, angles)
        shifted = torch.where((angles < 0) & (target > angles.cos()), 1.0, shifted)
        shifted = torch.where((angles > 0) & (target < -angles.cos()), -1.0, shifted)
        return cosines.scatter(1, labels[:, None], shifted)

    def extra_repr(self) -> str:
        """Settings for `print`."""
        return (
            f"scale={self.scale:g}, margin={self.margin:g}, concentration={self.concentration:g}, "
            f"momentum={self.momentum:g}"
        )


class LDAMLoss(ClassificationLoss):
    """Label-distribution-aware margin on cosines: softmax over s (cos θ_y - Δ_y) (Cao et al. 2019, arXiv 1906.07413).

    Δ_k is proportional to n_k^(-1/4), and the rarest class has `max_margin`.

    Args:
        class_counts: Training examples per class, all positive.
        scale: s.
        max_margin: Margin of the rarest class, in units of the cosine.
    """

    class_margins: torch.Tensor

    def __init__(self, class_counts: Sequence[int], scale: float = 30.0, max_margin: float = 0.5) -> None:
        super().__init__()
        self.scale = scale
        rarity = class_priors(class_counts).pow(-0.25)
        margins = max_margin * rarity / rarity.max()
        self.register_buffer("class_margins", margins.to(torch.get_default_dtype()), persistent=False)

    def compute(self, cosines, labels, quality, logits, norms):
        """See [`ClassificationLoss.forward`]; reads cosines and labels."""
        margins = self.class_margins.expand_as(cosines).gather(1, labels[:, None]).squeeze(1)
        shifted = _subtract_from_target(cosines, labels, self.margin_factor * margins)
        return F.cross_entropy(self.scale * shifted, labels)

    def extra_repr(self) -> str:
        """Settings for `print`."""
        return f"scale={self.scale:g}, class_margins={_numbers(self.class_margins)}"


class LogitAdjustedLoss(ClassificationLoss):
    """Cross-entropy on logits + τ log π: the prior is learnt around, so that inference leaves it out.

    Menon et al. 2021, arXiv 2007.07314, eq. 10. The logits are scale · cosines, or those of a linear head.

    Args:
        class_counts: Training examples per class, all positive.
        scale: Factor of the cosines.
        temperature: τ.
    """

    log_priors: torch.Tensor

    def __init__(self, class_counts: Sequence[int], scale: float = 37.0, temperature: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.temperature = temperature
        log_priors = class_priors(class_counts).log()
        self.register_buffer("log_priors", log_priors.to(torch.get_default_dtype()), persistent=False)

    def compute(self, cosines, labels, quality, logits, norms):
        """See [`ClassificationLoss.forward`]; reads `logits`."""
        scores = self.scale * cosines if logits is None else logits
        return F.cross_entropy(scores + self.temperature * self.log_priors.expand_as(scores), labels)

    def extra_repr(self) -> str:
        """Settings for `print`."""
        return f"scale={self.scale:g}, temperature={self.temperature:g}, log_priors={_numbers(self.log_priors)}"


LOSSES: dict[str, type[ClassificationLoss]] = {
    "qlung": QLungLoss,
    "cross_entropy": CrossEntropyLoss,
    "arcface": ArcFaceLoss,
    "cosface": CosFaceLoss,
    "adaface": AdaFaceLoss,
    "ldam": LDAMLoss,
    "logit_adjusted": LogitAdjustedLoss,
}


def build_loss(name: str, class_counts: Sequence[int], **options) -> ClassificationLoss:
    """The loss registered as `name`, with `class_counts` given to those that use them.

    Args:
        name: A key of `LOSSES`.
        class_counts: Training examples per class.
        options: Arguments of the loss's class.

    Raises:
        ValueError: If the name is unknown, or a class has no example in a loss that uses the counts.
        TypeError: If the loss has no such option.
    """
    if name not in LOSSES:
        raise ValueError(f"Unknown loss {name!r}. Choose one of: {', '.join(LOSSES)}.")
    kind = LOSSES[name]
    accepted = [parameter for parameter in inspect.signature(kind).parameters if parameter != "class_counts"]
    unknown = sorted(set(options) - set(accepted))
    if unknown:
        raise TypeError(f"Loss {name!r} has no option {', '.join(unknown)}. Its options: {', '.join(accepted)}.")
    if "class_counts" in inspect.signature(kind).parameters:
        options["class_counts"] = class_counts
    return kind(**options)


@dataclass(frozen=True)
class MarginSchedule:
    """Linear warm-up of margins: the `margin_factor` rises from 0 to 1 over the first `warmup_ratio` of training.

    Args:
        warmup_ratio: Share of training, in [0, 1]; 0 gives full margins from the start.
    """

    warmup_ratio: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.warmup_ratio <= 1:
            raise ValueError(f"warmup_ratio is a share of training in [0, 1], got {self.warmup_ratio}.")

    def __call__(self, progress: float) -> float:
        """The factor after the share `progress`, in [0, 1], of training."""
        return min(1.0, progress / self.warmup_ratio) if self.warmup_ratio else 1.0

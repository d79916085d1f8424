"""QLung models: an audio encoder with one pooled embedding, and a head of angular or linear logits over it."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling, ModelOutput
from transformers.models.audio_spectrogram_transformer.modeling_audio_spectrogram_transformer import ASTEmbeddings
from transformers.utils import can_return_tuple

from .configuration_qlung import AST, CLAP, QLungConfig
from .filterbank_qlung import KaldiFilterbank
from .pretrained_qlung import ENCODERS, HUB_OPTIONS, load_audio_encoder


@dataclass
class QLungClassifierOutput(ModelOutput):
    """
    Output of [`QLungForAudioClassification`].

    Args:
        loss (`torch.FloatTensor` of shape `(1,)`, *optional*): cross-entropy of the logits, if labels were given.
        logits (`torch.FloatTensor` of shape `(batch, num_labels)`): class scores before the softmax, float32.
        cosines (`torch.FloatTensor` of shape `(batch, num_labels)`):
            Cosines between the embedding and the class weights, float32; what margin losses act on.
        pooler_output (`torch.FloatTensor` of shape `(batch, hidden_size)`): the embedding.
        hidden_states (`tuple(torch.FloatTensor)`, *optional*): of the encoder, if asked for.
        attentions (`tuple(torch.FloatTensor)`, *optional*):
            Of the encoder, if asked for; AST's need eager attention, CLAP gives each stage's last layer.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    cosines: torch.Tensor | None = None
    pooler_output: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


class QLungHead(nn.Module):
    """
    Classification head. Angular: `scale * cos(embedding, weight)`, no bias (arXiv 2606.11915, section 2);
    linear: `embedding @ weight.T + bias`. Either gives the cosines to the same weights.

    Computed in float32 at least, outside autocast: a bfloat16 cosine has steps of 0.004, times 37.
    """

    def __init__(self, config: QLungConfig):
        super().__init__()
        self.scale = config.scale
        self.weight = nn.Parameter(torch.empty(config.num_labels, config.hidden_size))
        self.bias = nn.Parameter(torch.empty(config.num_labels)) if config.head == "linear" else None

    def forward(self, embedding: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Map embeddings (batch, hidden_size) to logits and cosines, both (batch, num_labels)."""
        dtype = torch.promote_types(embedding.dtype, torch.float32)
        with torch.autocast(embedding.device.type, enabled=False):
            embedding, weight = embedding.to(dtype), self.weight.to(dtype)
            cosines = nn.functional.linear(
                nn.functional.normalize(embedding, dim=-1), nn.functional.normalize(weight, dim=-1)
            )
            if self.bias is None:
                return self.scale * cosines, cosines
            return nn.functional.linear(embedding, weight, self.bias.to(dtype)), cosines

    def extra_repr(self) -> str:
        """Sizes and kind for `print`."""
        kind = f"angular, scale={self.scale}" if self.bias is None else "linear"
        return f"{self.weight.shape[1]} -> {self.weight.shape[0]}, {kind}"


class QLungPreTrainedModel(PreTrainedModel):
    """Initialisation, saving and loading shared by QLung's models."""

    config_class = QLungConfig
    config: QLungConfig
    base_model_prefix = "qlung"
    main_input_name = "input_values"
    input_modalities = ["audio"]  # noqa: RUF012 - Transformers' own class attribute
    supports_gradient_checkpointing = True
    # Otherwise Trainer takes the **kwargs of forward for a loss that scales itself, and multiplies loss and gradients
    # by the number of accumulation steps.
    accepts_loss_kwargs = False

    @property
    def _supports_sdpa(self) -> bool:
        return ENCODERS[self.config.audio_config.model_type][0]._supports_sdpa  # AST's attention, and not CLAP's

    @property
    def _supports_flash_attn(self) -> bool:
        return ENCODERS[self.config.audio_config.model_type][0]._supports_flash_attn

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, QLungHead):
            init.xavier_uniform_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)

    def save_pretrained(self, save_directory, *args, save_original_format: bool = False, **kwargs):
        """Save as Transformers does, in the key names that Trainer restores, and opened by every auto class.

        Trainer reloads the best checkpoint and resumes by the file's key names as they are; in Transformers' original
        format AST's differ, and most weights would silently stay as they were.
        """
        self.config.auto_map = {name: f"modeling_qlung.{cls.__name__}" for name, cls in AUTO_CLASSES.items()}
        return super().save_pretrained(save_directory, *args, save_original_format=save_original_format, **kwargs)

    @classmethod
    def from_audio_encoder(
        cls,
        pretrained_model_name_or_path: str,
        duration: float = 8.0,
        num_frames: int | None = None,
        position_grid: Callable[..., torch.Tensor] | None = None,
        **kwargs,
    ):
        """Start from a pretrained Audio Spectrogram Transformer, or from CLAP's audio tower.

        Of AST's position grid the middle columns are kept for shorter input; for longer input it is stretched.
        CLAP has no such grid; of a whole CLAP, the text tower and the projections stay behind.

        Args:
            pretrained_model_name_or_path: a Hub id such as `MIT/ast-finetuned-audioset-10-10-0.4593` or
                `laion/clap-htsat-unfused`, or a folder.
            duration: length of an AST's input, in seconds at 16 kHz.
            num_frames: length of the input in frames, instead of `duration`.
            position_grid: cuts an AST's grid in the place of [`cut_position_grid`].
            kwargs: arguments of [`QLungConfig`] (pooling, head, ...), and of the Hub (`revision`, `token`,
                `cache_dir`, `local_files_only`, ...).

        Raises:
            OSError: if the weights are neither in a folder of that name nor to be had from the Hub.
            ValueError: if the weights are not AST's or CLAP's, if a key is missing, left over or of another shape, or
                if more frames are asked for than CLAP takes.
        """
        hub = {name: kwargs.pop(name) for name in HUB_OPTIONS if name in kwargs}
        encoder = load_audio_encoder(pretrained_model_name_or_path, **hub)
        state, audio_config = encoder.state_dict(), copy.deepcopy(encoder.config)
        audio_config.name_or_path = ""  # maybe a folder of this machine, which a published checkpoint must not name
        if audio_config.model_type == AST:
            audio_config.max_length = num_frames or KaldiFilterbank().num_frames(round(16000 * duration))
            name, cut = "embeddings.position_embeddings", position_grid or cut_position_grid
            state[name] = cut(state[name], encoder.config, audio_config)
        model = cls(QLungConfig(audio_config=audio_config, **kwargs))
        if num_frames is not None:
            check_length(num_frames, model.config)
        model.base_model.encoder.load_state_dict(state)
        return model


def check_length(num_frames: int, config: QLungConfig) -> None:
    """Raise a ValueError if the encoder does not take an input of so many frames."""
    if config.audio_config.model_type == AST:
        allowed = config.input_frames or [config.max_frames]
        fits, taken = num_frames in allowed, " or ".join(map(str, allowed))
    else:
        fits, taken = num_frames <= config.max_frames, f"at most {config.max_frames}"
    if not fits:
        raise ValueError(
            f"The input has {num_frames} frames and the encoder takes {taken}: prepare the audio with the checkpoint's "
            "own feature extractor."
        )


def cut_position_grid(positions: torch.Tensor, source, target) -> torch.Tensor:
    """Cut AST's position embeddings to fewer frames, or stretch them to more (Gong et al. 2021, in their code).

    Args:
        positions: shape (1, 2 + frequencies * times, hidden), two special tokens first, then frequency-major.
        source: the `ASTConfig` that they were trained with.
        target: the same with another `max_length`.

    Returns:
        Shape (1, 2 + frequencies * wanted times, hidden): the middle columns of the time axis, or, where there are
        fewer than wanted, all of them, interpolated linearly.
    """
    frequencies = (source.num_mel_bins - source.patch_size) // source.frequency_stride + 1
    times, wanted = ((c.max_length - c.patch_size) // c.time_stride + 1 for c in (source, target))
    if wanted <= times:
        return _middle_columns(positions, frequencies, wanted)
    special, grid = positions[:, :2], positions[:, 2:].unflatten(1, (frequencies, times))
    stretched = nn.functional.interpolate(grid.permute(0, 3, 1, 2), size=(frequencies, wanted), mode="bilinear")
    return torch.cat([special, stretched.flatten(2).transpose(1, 2)], dim=1)


def _middle_columns(positions: torch.Tensor, frequencies: int, wanted: int) -> torch.Tensor:
    """Cut a position grid (1, 2 + frequencies * times, hidden) to the `wanted` times in its middle."""
    grid = positions[:, 2:].unflatten(1, (frequencies, -1))
    start = grid.shape[2] // 2 - wanted // 2  # of 101: 50 - int(wanted / 2), as in AST's own code
    return torch.cat([positions[:, :2], grid[:, :, start : start + wanted].flatten(1, 2)], dim=1)


class AnyLengthASTEmbeddings(ASTEmbeddings):
    """AST's patches, tokens and positions; a shorter input gets the positions of [`cut_position_grid`]."""

    def forward(self, input_values: torch.Tensor) -> torch.Tensor:
        """Embed features (batch, frames, mel bands) as tokens (batch, 2 + patches, hidden)."""
        patches = self.patch_embeddings(input_values)
        special = torch.cat([self.cls_token, self.distillation_token], dim=1).expand(len(patches), -1, -1)
        frequencies, times = self.get_shape(self.config)
        wanted, positions = patches.shape[1] // frequencies, self.position_embeddings
        if wanted < times:
            positions = _middle_columns(positions, frequencies, wanted)
        return self.dropout(torch.cat([special, patches], dim=1) + positions)


class PatchProjection(nn.Conv2d):
    """AST's patch convolution as one matrix product.

    The numbers are the convolution's, to float32's rounding. On a CPU, oneDNN's bfloat16 convolution of one channel
    takes 30 to 45 ms per clip of 8 s, a seventh of all of AST base; the product takes 0.6.
    """

    def forward(self, spectrograms: torch.Tensor) -> torch.Tensor:
        """Map (batch, 1, mel bands, frames) to (batch, hidden, frequencies, times)."""
        (height, width), (down, along) = self.kernel_size, self.stride
        patches = spectrograms[:, 0].unfold(1, height, down).unfold(2, width, along).flatten(-2)
        return nn.functional.linear(patches, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


class QLungModel(QLungPreTrainedModel):
    """The encoder and its pooled embedding."""

    _keys_to_ignore_on_load_unexpected = [r"^head\."]  # noqa: RUF012 - a classifier's checkpoint is opened as well

    def __init__(self, config: QLungConfig):
        super().__init__(config)
        self.encoder = ENCODERS[config.audio_config.model_type][0](config.audio_config)
        if config.input_frames is not None:
            self.encoder.embeddings = AnyLengthASTEmbeddings(config.audio_config)
        if config.audio_config.model_type == AST:
            # The same parameters under the same names, without drawing their initial values a second time.
            self.encoder.embeddings.patch_embeddings.projection.__class__ = PatchProjection
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Give the encoder's patch embedding."""
        return self.encoder.get_input_embeddings()

    @can_return_tuple
    def forward(
        self, input_values: torch.Tensor, num_frames: torch.Tensor | None = None, **kwargs
    ) -> BaseModelOutputWithPooling:
        """Embed prepared audio.

        Args:
            input_values: shape (batch, frames, mel bands), from [`QLungFeatureExtractor`].
            num_frames: each item's own frames, (batch,), where some items are shorter than others: those of one length
                are embedded together, without what follows their frames.
            kwargs: passed on to the encoder; `output_hidden_states`, `output_attentions` (of AST, it needs
                `attn_implementation="eager"`, the only one that CLAP has).

        Returns:
            `last_hidden_state` (batch, tokens, hidden_size) and `pooler_output` (batch, hidden_size). AST's tokens are
            the class and the distillation token, then the patches; CLAP's are its last grid. Both grids are
            frequency-major: all times of the lowest band come first. CLAP's `hidden_states` are grids too, (batch,
            channels, height, width), and its `attentions`, of each stage's last layer, (batch * windows, heads,
            tokens, tokens). The `last_hidden_state` of shorter items ends in zeros.

        Raises:
            ValueError: if the number of frames or of mel bands is not what the encoder was built for, if attentions
                are asked of an implementation that does not keep them, or hidden states or attentions of items of
                several lengths.
        """
        if num_frames is None:
            return self._embed(input_values, **kwargs)
        lengths, group = num_frames.unique(return_inverse=True)
        if int(lengths[-1]) > input_values.shape[1]:
            raise ValueError(f"num_frames is {int(lengths[-1])}, and the input has {input_values.shape[1]} frames.")
        if len(lengths) > 1 and (kwargs.get("output_hidden_states") or kwargs.get("output_attentions")):
            raise ValueError(
                f"Items of {' and '.join(map(str, lengths.tolist()))} frames have hidden states and attentions of "
                "several sizes: ask for those of one length at a time."
            )
        parts = [
            self._embed(input_values[group == number, :length], **kwargs)
            for number, length in enumerate(lengths.tolist())
        ]
        if len(parts) == 1:
            return parts[0]
        place = group.argsort(stable=True).argsort()  # of each item among those of all parts
        tokens = [item for part in parts for item in part.last_hidden_state]
        return BaseModelOutputWithPooling(
            last_hidden_state=nn.utils.rnn.pad_sequence(tokens, batch_first=True)[place],
            pooler_output=torch.cat([part.pooler_output for part in parts])[place],
        )

    def _embed(self, input_values: torch.Tensor, **kwargs) -> BaseModelOutputWithPooling:
        """Embed items of one length."""
        _, frames, bands = input_values.shape
        check_length(frames, self.config)
        if bands != (expected := self.config.audio_config.num_mel_bins):
            raise ValueError(
                f"The input has {bands} mel bands and the encoder takes {expected}: prepare the audio with the "
                "checkpoint's own feature extractor."
            )
        if kwargs.get("output_attentions") and self.encoder.config._attn_implementation != "eager":
            raise ValueError(
                f"{self.encoder.config._attn_implementation!r} attention keeps no attention maps: load the model with "
                'attn_implementation="eager", or call model.set_attn_implementation("eager").'
            )
        input_values = input_values.to(self.dtype)
        if self.config.audio_config.model_type == CLAP:
            outputs = self.encoder(input_values[:, None], **kwargs)  # one channel: four are for feature fusion
            tokens, pooled = outputs.last_hidden_state.flatten(2).transpose(1, 2), outputs.pooler_output
        else:
            outputs = self.encoder(input_values, **kwargs)
            tokens = outputs.last_hidden_state
            pooled = tokens.mean(dim=1) if self.config.pooling == "mean" else tokens[:, :2].mean(dim=1)
        return BaseModelOutputWithPooling(
            last_hidden_state=tokens,
            pooler_output=pooled,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class QLungForAudioClassification(QLungPreTrainedModel):
    """The encoder with a classification head."""

    def __init__(self, config: QLungConfig):
        super().__init__(config)
        self.qlung = QLungModel(config)
        self.dropout = nn.Dropout(config.dropout)
        self.head = QLungHead(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self, input_values: torch.Tensor, labels: torch.Tensor | None = None, **kwargs
    ) -> QLungClassifierOutput:
        """Classify prepared audio; never with a margin, which only a training loss adds.

        Args:
            input_values: shape (batch, frames, mel bands), from [`QLungFeatureExtractor`].
            labels: class indices, shape (batch,); adds the plain cross-entropy of the logits.
            kwargs: `num_frames`, and what is passed on to the encoder, see [`QLungModel.forward`].
        """
        outputs = self.qlung(input_values, **kwargs)
        logits, cosines = self.head(self.dropout(outputs.pooler_output))
        return QLungClassifierOutput(
            loss=None if labels is None else nn.functional.cross_entropy(logits, labels),
            logits=logits,
            cosines=cosines,
            pooler_output=outputs.pooler_output,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


AUTO_CLASSES = {"AutoModel": QLungModel, "AutoModelForAudioClassification": QLungForAudioClassification}
for _name, _cls in AUTO_CLASSES.items():
    _cls.register_for_auto_class(_name)

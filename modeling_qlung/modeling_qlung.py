"""QLung models: an audio encoder with one pooled embedding, and a head of angular or linear logits over it."""

import copy
import os
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling, ModelOutput
from transformers.utils import can_return_tuple

from .configuration_qlung import QLungConfig

HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


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
        attentions (`tuple(torch.FloatTensor)`, *optional*): of the encoder, if asked for; needs eager attention.
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
    _no_split_modules = ["ASTEmbeddings", "ASTLayer"]  # noqa: RUF012 - Transformers' own class attribute
    _supports_sdpa = True
    _supports_flash_attn = True
    # Otherwise Trainer takes the **kwargs of forward for a loss that scales itself, and multiplies loss and gradients
    # by the number of accumulation steps.
    accepts_loss_kwargs = False

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
        cls, pretrained_model_name_or_path: str, duration: float = 8.0, num_frames: int | None = None, **kwargs
    ):
        """Start from a pretrained Audio Spectrogram Transformer, its position grid cut for shorter input.

        The grid's middle columns are kept, without interpolation, as AST's authors do.

        Args:
            pretrained_model_name_or_path: a Hub id such as `MIT/ast-finetuned-audioset-10-10-0.4593`, or a folder.
            duration: length of the input, in seconds; gives `num_frames` = 1 + (16000 * duration - 400) // 160.
            num_frames: length of the input in frames, instead of `duration`.
            kwargs: arguments of [`QLungConfig`] (pooling, head, ...), and of the Hub (`revision`, `token`,
                `cache_dir`, `local_files_only`, ...).

        Raises:
            OSError: if the weights are neither in a folder of that name nor to be had from the Hub.
            ValueError: if the weights are not AST's, lack a parameter, or are shorter than the input asked for.
        """
        hub = {name: kwargs.pop(name) for name in HUB_OPTIONS if name in kwargs}
        try:
            encoder, info = AutoModel.from_pretrained(pretrained_model_name_or_path, output_loading_info=True, **hub)
        except OSError as error:
            if os.path.isdir(pretrained_model_name_or_path):
                raise
            if os.path.isabs(pretrained_model_name_or_path) or pretrained_model_name_or_path.startswith((".", "~")):
                raise OSError(f"There is no folder {pretrained_model_name_or_path}.") from error
            raise OSError(
                f"The weights {pretrained_model_name_or_path!r} are no local folder and could not be downloaded. "
                f"With a network: hf download {pretrained_model_name_or_path} --local-dir ast, then give the folder "
                "`ast` (config.json and model.safetensors) instead of the name."
            ) from error
        if encoder.config.model_type != "audio-spectrogram-transformer":
            raise ValueError(f"{pretrained_model_name_or_path} is a {encoder.config.model_type}, not an AST.")
        if info["missing_keys"]:
            raise ValueError(f"{pretrained_model_name_or_path} lacks {sorted(info['missing_keys'])}.")
        audio_config = copy.deepcopy(encoder.config)
        audio_config.name_or_path = ""  # maybe a folder of this machine, which a published checkpoint must not name
        audio_config.max_length = num_frames or 1 + (round(16000 * duration) - 400) // 160
        model = cls(QLungConfig(audio_config=audio_config, **kwargs))
        base = model.qlung if isinstance(model, QLungForAudioClassification) else model
        state = encoder.state_dict()
        name = "embeddings.position_embeddings"
        state[name] = cut_position_grid(state[name], encoder.config, audio_config)
        base.encoder.load_state_dict(state)
        return model


def cut_position_grid(positions: torch.Tensor, source, target) -> torch.Tensor:
    """Cut AST's position embeddings to fewer frames.

    Args:
        positions: shape (1, 2 + frequencies * times, hidden), two special tokens first, then frequency-major.
        source: the `ASTConfig` that they were trained with.
        target: the same with a smaller `max_length`.

    Returns:
        Shape (1, 2 + frequencies * fewer times, hidden): the middle columns of the time axis.

    Raises:
        ValueError: if `target` is longer than `source`.
    """
    frequencies = (source.num_mel_bins - source.patch_size) // source.frequency_stride + 1
    times, fewer = ((c.max_length - c.patch_size) // c.time_stride + 1 for c in (source, target))
    if fewer > times:
        raise ValueError(
            f"The encoder was trained on {source.max_length} frames; {target.max_length} would need positions that it "
            "does not have. Ask for a shorter duration."
        )
    special, grid = positions[:, :2], positions[:, 2:]
    start = (times - fewer) // 2
    grid = grid.unflatten(1, (frequencies, times))[:, :, start : start + fewer]
    return torch.cat([special, grid.flatten(1, 2)], dim=1)


class QLungModel(QLungPreTrainedModel):
    """The encoder and its pooled embedding."""

    _keys_to_ignore_on_load_unexpected = [r"^head\."]  # noqa: RUF012 - a classifier's checkpoint is opened as well

    def __init__(self, config: QLungConfig):
        super().__init__(config)
        self.encoder = AutoModel.from_config(config.audio_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Give the encoder's patch embedding."""
        return self.encoder.get_input_embeddings()

    @can_return_tuple
    def forward(self, input_values: torch.Tensor, **kwargs) -> BaseModelOutputWithPooling:
        """Embed prepared audio.

        Args:
            input_values: shape (batch, frames, mel bands), from [`QLungFeatureExtractor`].
            kwargs: passed on to the encoder; `output_hidden_states`, `output_attentions` (which needs
                `attn_implementation="eager"`).

        Returns:
            `last_hidden_state` (batch, tokens, hidden_size) and `pooler_output` (batch, hidden_size).

        Raises:
            ValueError: if the number of frames is not what the encoder was built for, or if attentions are asked of an
                implementation that does not keep them.
        """
        expected = self.config.audio_config.max_length
        if input_values.shape[1] != expected:
            raise ValueError(
                f"input_values has {input_values.shape[1]} frames and the encoder takes {expected}: prepare the audio "
                "with the checkpoint's own feature extractor."
            )
        if kwargs.get("output_attentions") and self.encoder.config._attn_implementation != "eager":
            raise ValueError(
                f"{self.encoder.config._attn_implementation!r} attention keeps no attention maps: load the model with "
                'attn_implementation="eager", or call model.set_attn_implementation("eager").'
            )
        outputs = self.encoder(input_values.to(self.dtype), **kwargs)
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
            kwargs: passed on to the encoder, see [`QLungModel.forward`].
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

"""Configuration of QLung models: an audio encoder (AST or CLAP's audio tower), a pooling and a classification head."""

import math

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

LABELS = ("normal", "crackle", "wheeze", "both")
AST, CLAP = "audio-spectrogram-transformer", "clap_audio_model"
POOLINGS = {AST: ("cls_dist", "mean"), CLAP: ("mean",)}  # of each encoder, the first is the default
HEADS = ("angular", "linear")


class QLungConfig(PreTrainedConfig):
    r"""
    Configuration of [`QLungModel`] and [`QLungForAudioClassification`].

    The label map (`id2label`, `label2id`) defaults to the four ICBHI classes: normal, crackle, wheeze, both.

    Args:
        audio_config (`dict` or `PreTrainedConfig`, *optional*):
            Configuration of the encoder: an Audio Spectrogram Transformer (`ASTConfig`) or CLAP's audio tower, HTSAT,
            without feature fusion (`ClapAudioConfig`). Defaults to AST base for 8 s of audio (798 frames of 128 mel
            bands).
        pooling (`str`, *optional*):
            `"cls_dist"`, AST's default: the mean of its class and distillation tokens (Gong et al. 2021); `"mean"`: the
            mean over all tokens (SAM-AST, arXiv 2512.22564), the only one of CLAP, which has no such tokens.
        head (`str`, *optional*, defaults to `"angular"`):
            `"angular"`: logits are `scale` times the cosines between embedding and class weights
            (QLung, arXiv 2606.11915); `"linear"`: an affine map.
        scale (`float`, *optional*, defaults to 37.0):
            s_a, the factor from cosines to logits of the angular head.
        dropout (`float`, *optional*, defaults to 0.0):
            Dropout on the pooled embedding, before the head.
        class_priors (`list[float]`, *optional*):
            Share of each class in the training set, in label order; informative at inference.
        input_frames (`list[int]`, *optional*):
            Numbers of frames that an AST takes, ascending, the last one its `max_length`: a shorter input gets the
            middle columns of the position grid. Defaults to `max_length` alone. Not for CLAP.

    Raises:
        ValueError: for an unknown encoder, pooling or head, a CLAP tower with feature fusion or of contradictory
            widths, or a value out of range.
    """

    model_type = "qlung"
    sub_configs = {"audio_config": AutoConfig}  # noqa: RUF012 - Transformers' own class attribute
    keys_to_ignore_at_inference = ["cosines", "pooler_output", "hidden_states", "attentions"]  # noqa: RUF012

    def __init__(
        self,
        audio_config: dict | PreTrainedConfig | None = None,
        pooling: str | None = None,
        head: str = "angular",
        scale: float = 37.0,
        dropout: float = 0.0,
        class_priors: list[float] | None = None,
        input_frames: list[int] | None = None,
        **kwargs,
    ):
        if audio_config is None:
            audio_config = {"max_length": 798}
        if isinstance(audio_config, dict):
            audio_config = dict(audio_config)
            model_type = audio_config.pop("model_type", AST)
            audio_config = CONFIG_MAPPING[model_type](**audio_config)
        self.audio_config: PreTrainedConfig = audio_config
        self._validate_encoder()
        self.pooling = pooling or self.poolings[0]
        self.head = head
        self.scale = scale
        self.dropout = dropout
        self.class_priors = class_priors
        self.input_frames = input_frames
        if kwargs.get("id2label") is None and kwargs.get("num_labels", len(LABELS)) == len(LABELS):
            kwargs["id2label"] = dict(enumerate(LABELS))
            kwargs["label2id"] = {name: index for index, name in enumerate(LABELS)}
        super().__init__(**kwargs)
        self._validate()

    def _validate_encoder(self) -> None:
        encoder = self.audio_config
        if encoder.model_type not in POOLINGS:
            raise ValueError(
                f"audio_config is a {encoder.model_type}; the encoder must be one of {', '.join(POOLINGS)}."
            )
        if encoder.model_type == CLAP:
            if encoder.enable_fusion:
                raise ValueError(
                    "audio_config has enable_fusion=True, which wants four crops of a longer recording: take a tower "
                    "without feature fusion, such as laion/clap-htsat-unfused's."
                )
            width = encoder.patch_embeds_hidden_size * 2 ** (len(encoder.depths) - 1)
            if encoder.hidden_size != width:
                raise ValueError(
                    f"audio_config has hidden_size {encoder.hidden_size}, but its last stage is {width} wide: "
                    "patch_embeds_hidden_size, doubled at every stage but the first."
                )

    def _validate(self) -> None:
        if self.pooling not in self.poolings:
            encoder, poolings = self.audio_config.model_type, ", ".join(self.poolings)
            raise ValueError(f"pooling is {self.pooling!r}; for {encoder} choose one of {poolings}.")
        if self.head not in HEADS:
            raise ValueError(f"head is {self.head!r}; choose one of {', '.join(HEADS)}.")
        if not self.scale > 0:
            raise ValueError(f"scale is {self.scale}; it must be positive.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; it must be in [0, 1).")
        self._validate_input_frames()
        if self.class_priors is not None:
            if len(self.class_priors) != self.num_labels:
                raise ValueError(
                    f"class_priors has {len(self.class_priors)} values for {self.num_labels} labels: give as many, or "
                    "class_priors=None."
                )
            if min(self.class_priors) < 0 or not math.isclose(sum(self.class_priors), 1.0, abs_tol=1e-3):
                raise ValueError(f"class_priors are {self.class_priors}; they must be shares that add up to 1.")

    def _validate_input_frames(self) -> None:
        frames, encoder = self.input_frames, self.audio_config
        if frames is None:
            return
        if encoder.model_type != AST:
            raise ValueError(f"input_frames are {frames}, but CLAP stretches all input to one grid: leave them out.")
        ascend = frames and frames == sorted(set(frames))
        if not ascend or frames[0] < encoder.patch_size or frames[-1] != encoder.max_length:
            raise ValueError(
                f"input_frames are {frames}; they must ascend from at least a patch's {encoder.patch_size} to the "
                f"audio_config's max_length of {encoder.max_length}."
            )

    @property
    def poolings(self) -> tuple[str, ...]:
        """What `pooling` may be for this encoder, its default first."""
        return POOLINGS[self.audio_config.model_type]

    @property
    def hidden_size(self) -> int:
        """Width of the pooled embedding."""
        return self.audio_config.hidden_size

    @property
    def max_frames(self) -> int:
        """Longest input. AST takes no length that is not among `input_frames`; CLAP stretches shorter ones."""
        if self.audio_config.model_type == AST:
            return self.audio_config.max_length
        return self.audio_config.spec_size * (self.audio_config.spec_size // self.audio_config.num_mel_bins)


QLungConfig.register_for_auto_class()

import copy

import pytest
import torch
from safetensors.torch import load_file
from transformers import ASTConfig, ASTModel, AutoModel, ClapAudioConfig, ClapAudioModel

from modeling_qlung import QLungConfig, QLungForAudioClassification, QLungModel
from modeling_qlung.modeling_qlung import PatchProjection, cut_position_grid

from .encoders import TINY_AST, TINY_CLAP


def tiny_config(**kwargs) -> QLungConfig:
    return QLungConfig(audio_config={**TINY_AST, "max_length": 98}, **kwargs)


@pytest.fixture
def features():
    return torch.randn(3, 98, 128, generator=torch.Generator().manual_seed(0))


def test_angular_logits_are_scaled_cosines_of_any_embedding_length(features):
    model = QLungForAudioClassification(tiny_config()).eval()
    output = model(features)
    x, w = output.pooler_output.double(), model.head.weight.double()
    cosines = (x @ w.T) / (x.norm(dim=1)[:, None] * w.norm(dim=1))
    torch.testing.assert_close(output.cosines.double(), cosines, atol=1e-6, rtol=0)
    torch.testing.assert_close(output.logits.double(), 37 * cosines, atol=1e-4, rtol=0)
    with torch.no_grad():
        model.head.weight *= 5
    torch.testing.assert_close(model(features).logits, output.logits, atol=1e-4, rtol=0)


def test_linear_logits_come_with_the_cosines_of_the_same_weights(features):
    model = QLungForAudioClassification(tiny_config(head="linear")).eval()
    with torch.no_grad():
        model.head.bias.copy_(torch.arange(4.0))
    output = model(features)
    expected = output.pooler_output @ model.head.weight.T + torch.arange(4.0)
    torch.testing.assert_close(output.logits, expected)
    reference = torch.nn.functional.cosine_similarity(output.pooler_output[:, None], model.head.weight[None], dim=-1)
    torch.testing.assert_close(output.cosines, reference)


def test_poolings(features):
    tokens_of = {}
    for pooling in ("cls_dist", "mean"):
        torch.manual_seed(0)
        output = QLungModel(tiny_config(pooling=pooling)).eval()(features)
        tokens = output.last_hidden_state
        expected = (tokens[:, 0] + tokens[:, 1]) / 2 if pooling == "cls_dist" else tokens.mean(dim=1)
        torch.testing.assert_close(output.pooler_output, expected)
        tokens_of[pooling] = tokens
    assert tokens_of["mean"].shape == (3, 2 + 12 * 9, 16)


def test_cls_dist_is_asts_own_pooling(features):
    model = QLungModel(tiny_config()).eval()
    torch.testing.assert_close(model(features).pooler_output, model.encoder(features).pooler_output)


def test_the_encoder_gives_transformers_own_numbers_and_starts_from_its_own_weights(features):
    torch.manual_seed(0)
    model = QLungModel(tiny_config()).eval()
    torch.manual_seed(0)
    reference = ASTModel(ASTConfig(**TINY_AST, max_length=98)).eval()
    for (name, value), (expected_name, expected) in zip(
        model.encoder.state_dict().items(), reference.state_dict().items(), strict=True
    ):
        assert name == expected_name
        assert torch.equal(value, expected), name
    torch.testing.assert_close(model(features).last_hidden_state, reference(features).last_hidden_state)


@pytest.mark.parametrize("stride", [(10, 10), (16, 7)])
def test_the_patch_projection_is_the_convolution(stride):
    torch.manual_seed(0)
    convolution = torch.nn.Conv2d(1, 24, (16, 12), stride=stride).double()
    projection = PatchProjection(1, 24, (16, 12), stride=stride).double()
    projection.load_state_dict(convolution.state_dict())
    spectrograms = torch.randn(2, 1, 128, 51, dtype=torch.float64)
    gradients = []
    for layer in (convolution, projection):
        output = layer(spectrograms)
        output.square().sum().backward()
        gradients.append((output, layer.weight.grad, layer.bias.grad))
    for expected, found in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected)


def test_labels_add_plain_cross_entropy(features):
    model = QLungForAudioClassification(tiny_config()).eval()
    labels = torch.tensor([0, 3, 1])
    output = model(features, labels=labels)
    assert output.loss.item() == pytest.approx(torch.nn.functional.cross_entropy(output.logits, labels).item())
    assert model(features).loss is None


def test_dropout_acts_on_the_embedding_in_training_only(features):
    model = QLungForAudioClassification(tiny_config(dropout=0.5))
    assert not torch.equal(model(features).logits, model(features).logits)
    model.eval()
    assert torch.equal(model(features).logits, model(features).logits)


def test_hidden_states_and_attentions_when_asked(features):
    model = QLungForAudioClassification(tiny_config()).eval()
    output = model(features, output_hidden_states=True)
    assert [state.shape for state in output.hidden_states] == [(3, 110, 16)] * 3
    with pytest.raises(ValueError, match="eager"):
        model(features, output_attentions=True)
    model.set_attn_implementation("eager")
    attentions = model(features, output_attentions=True).attentions
    assert [attention.shape for attention in attentions] == [(3, 2, 110, 110)] * 2
    torch.testing.assert_close(attentions[0].sum(dim=-1), torch.ones(3, 2, 110))


def test_attention_is_fused_by_default_and_equals_eager(features):
    model = QLungForAudioClassification(tiny_config()).eval()
    assert model.qlung.encoder.config._attn_implementation == "sdpa"
    fused = model(features).logits
    model.set_attn_implementation("eager")
    torch.testing.assert_close(fused, model(features).logits, atol=1e-4, rtol=0)


def test_tuple_output(features):
    model = QLungForAudioClassification(tiny_config()).eval()
    logits = model(features, return_dict=False)[0]
    assert torch.equal(logits, model(features).logits)


def test_the_head_is_float32_in_a_half_precision_model_and_under_autocast(features):
    model = QLungForAudioClassification(tiny_config()).eval()
    reference = model(features).logits
    with torch.autocast("cpu", torch.bfloat16):
        assert model(features).logits.dtype == torch.float32
    half = copy.deepcopy(model).to(torch.bfloat16)
    output = half(features)
    assert output.logits.dtype == torch.float32
    x, w = output.pooler_output.double(), half.head.weight.double()
    exact = 37 * torch.nn.functional.cosine_similarity(x[:, None], w[None], dim=-1)
    torch.testing.assert_close(output.logits.double(), exact, atol=1e-4, rtol=0)
    torch.testing.assert_close(output.logits, reference, atol=2.0, rtol=0)


def test_wrong_length_is_named():
    model = QLungModel(tiny_config())
    with pytest.raises(ValueError, match="50 frames and the encoder takes 98"):
        model(torch.zeros(1, 50, 128))
    with pytest.raises(ValueError, match="64 mel bands and the encoder takes 128"):
        model(torch.zeros(1, 98, 64))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pooling": "max"}, "pooling is 'max'"),
        ({"head": "cosine"}, "head is 'cosine'"),
        ({"scale": 0.0}, "scale is 0.0"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"class_priors": [0.5, 0.5]}, "2 values for 4 labels"),
        ({"class_priors": [0.5, 0.5, 0.5, 0.5]}, "add up to 1"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**options)


def test_configuration_round_trip(tmp_path):
    config = tiny_config(pooling="mean", head="linear", dropout=0.3, class_priors=[0.4, 0.3, 0.2, 0.1])
    config.save_pretrained(tmp_path)
    loaded = QLungConfig.from_pretrained(tmp_path)
    for name in ("pooling", "head", "scale", "dropout", "class_priors", "id2label"):
        assert getattr(loaded, name) == getattr(config, name)
    assert isinstance(loaded.audio_config, ASTConfig)
    assert loaded.audio_config.max_length == 98
    assert loaded.id2label == {0: "normal", 1: "crackle", 2: "wheeze", 3: "both"}
    assert QLungConfig(id2label={0: "healthy", 1: "ill"}).num_labels == 2


def test_saving_keeps_the_key_names_that_trainer_restores(tmp_path):
    """Transformers would write AST's old names, of which Trainer's own loading restores a quarter."""
    model = QLungForAudioClassification(tiny_config())
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == model.state_dict().keys()


def test_loading_restores_every_parameter_of_both_classes(tmp_path):
    model = QLungForAudioClassification(tiny_config())
    model.save_pretrained(tmp_path)
    loaded, info = QLungForAudioClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base) is QLungModel
    for name, value in model.qlung.state_dict().items():
        assert torch.equal(base.state_dict()[name], value), name


def test_a_new_model_is_initialised():
    model = QLungForAudioClassification(tiny_config(head="linear"))
    assert model.head.weight.std() > 0.05
    assert torch.equal(model.head.bias, torch.zeros(4))
    assert all(parameter.isfinite().all() and not parameter.is_meta for parameter in model.parameters())


def test_loss_is_not_taken_for_one_that_scales_itself():
    assert QLungForAudioClassification.accepts_loss_kwargs is False


# ---- CLAP's audio tower ----


def clap_config(**kwargs) -> QLungConfig:
    return QLungConfig(audio_config=TINY_CLAP, **kwargs)


@pytest.fixture
def decibels():
    """Front end values of 8 s, as quiet as recordings are."""
    return 10 * torch.randn(2, 801, 64, generator=torch.Generator().manual_seed(0)) - 50


def test_clap_needs_its_configuration_alone():
    config = QLungConfig(audio_config=ClapAudioConfig())
    assert (config.pooling, config.hidden_size, config.max_frames) == ("mean", 768, 1024)
    with torch.device("meta"):
        model = QLungForAudioClassification(config)
    assert model.head.weight.shape == (4, 768)


@pytest.mark.parametrize("frames", [64, 801, 1001, 1024])
def test_claps_embedding_is_its_own_and_the_mean_of_its_tokens(frames):
    torch.manual_seed(0)
    model = QLungModel(clap_config()).eval()
    reference = ClapAudioModel(ClapAudioConfig(**model.config.audio_config.to_dict())).eval()
    reference.load_state_dict(model.encoder.state_dict())
    features = torch.randn(2, frames, 64)
    output, expected = model(features), reference(input_features=features[:, None], is_longer=None)
    assert torch.equal(output.pooler_output, expected.pooler_output)
    assert output.last_hidden_state.shape == (2, 2 * 32, 64)
    torch.testing.assert_close(output.last_hidden_state.mean(dim=1), output.pooler_output)
    assert torch.equal(output.last_hidden_state[:, 32], expected.last_hidden_state[:, :, 1, 0])


def test_what_clap_does_not_take_is_named():
    model = QLungModel(clap_config())
    with pytest.raises(ValueError, match="1025 frames and the encoder takes at most 1024"):
        model(torch.zeros(1, 1025, 64))
    with pytest.raises(ValueError, match="128 mel bands and the encoder takes 64"):
        model(torch.zeros(1, 798, 128))
    with pytest.raises(ValueError, match=r"pooling is 'cls_dist'; for clap_audio_model choose one of mean\."):
        clap_config(pooling="cls_dist")
    with pytest.raises(ValueError, match="without feature fusion, such as laion/clap-htsat-unfused's"):
        QLungConfig(audio_config={**TINY_CLAP, "enable_fusion": True})
    with pytest.raises(ValueError, match="hidden_size 768, but its last stage is 64 wide"):
        QLungConfig(audio_config={**TINY_CLAP, "hidden_size": 768})
    with pytest.raises(ValueError, match="audio_config is a vit; the encoder must be one of audio-spectrogram-trans"):
        QLungConfig(audio_config={"model_type": "vit"})


def test_claps_hidden_states_and_attentions(decibels):
    model = QLungForAudioClassification(clap_config()).eval()
    output = model(decibels, output_hidden_states=True, output_attentions=True)
    grids = [(2, 8, 64, 64), (2, 16, 32, 32), (2, 32, 16, 16), (2, 64, 8, 8), (2, 64, 8, 8)]
    assert [state.shape for state in output.hidden_states] == grids
    # Windows of 8 x 8 tokens, of both items: 64, 16, 4 and 1 in each.
    windows = [(128, 1, 64, 64), (32, 1, 64, 64), (8, 2, 64, 64), (2, 2, 64, 64)]
    assert [attention.shape for attention in output.attentions] == windows


def test_clap_has_eager_attention_only():
    model = QLungForAudioClassification(clap_config())
    assert model.config._attn_implementation == model.qlung.encoder.config._attn_implementation == "eager"
    model.set_attn_implementation(model.config._attn_implementation)
    with pytest.raises(ValueError, match="does not support an attention implementation through"):
        model.set_attn_implementation("sdpa")


def test_clap_is_saved_whole_with_its_running_statistics(tmp_path, decibels):
    model = QLungForAudioClassification(clap_config(head="linear")).train()
    model(decibels)
    norm = model.qlung.encoder.audio_encoder.batch_norm
    assert norm.num_batches_tracked == 1
    assert norm.running_mean.mean() < -1, "the statistics have moved"
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == model.state_dict().keys()
    loaded, info = QLungForAudioClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert isinstance(loaded.config.audio_config, ClapAudioConfig)
    assert loaded.config.pooling == "mean"
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert torch.equal(loaded.eval()(decibels).logits, model.eval()(decibels).logits)


def test_claps_other_sizes_survive_saving(tmp_path):
    sizes = {"num_mel_bins": 128, "spec_size": 512, "depths": [1, 2], "num_attention_heads": [2, 4], "hidden_size": 16}
    config = QLungConfig(audio_config={**TINY_CLAP, **sizes})
    config.save_pretrained(tmp_path)
    loaded = QLungConfig.from_pretrained(tmp_path).audio_config
    assert {name: getattr(loaded, name) for name in sizes} == sizes
    assert config.max_frames == 2048


def test_claps_gradients_do_not_change_with_activation_checkpointing(decibels):
    torch.manual_seed(0)
    model = QLungForAudioClassification(clap_config()).train()
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            model.activation_checkpointing_enable()
        model.zero_grad()
        torch.manual_seed(1)
        model(decibels, labels=torch.tensor([0, 1])).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain)


def test_a_half_precision_clap_still_has_a_float32_head(decibels):
    model = QLungForAudioClassification(clap_config()).eval()
    reference = model(decibels).logits
    output = copy.deepcopy(model).to(torch.bfloat16)(decibels)
    assert output.logits.dtype == torch.float32
    torch.testing.assert_close(output.logits, reference, atol=2.0, rtol=0)


# ---- Input of several lengths ----

FRAMES = [48, 98, 198]


def model_of_several_lengths(cls=QLungForAudioClassification, **config):
    """With positions that are not all zero, as a fresh AST's are."""
    torch.manual_seed(0)
    model = cls(QLungConfig(audio_config={**TINY_AST, "max_length": 198}, input_frames=FRAMES, **config)).eval()
    for parameter in model.base_model.encoder.embeddings.parameters(recurse=False):
        torch.nn.init.normal_(parameter)
    return model


def cut_to(model, frames: int):
    """The same weights in a model of that one length."""
    config = QLungConfig(audio_config={**TINY_AST, "max_length": frames}, pooling=model.config.pooling)
    state, name = model.state_dict(), "qlung.encoder.embeddings.position_embeddings"
    state[name] = cut_position_grid(state[name], model.config.audio_config, config.audio_config)
    short = QLungForAudioClassification(config).eval()
    short.load_state_dict(state)
    return short


@pytest.mark.parametrize("frames", FRAMES)
@pytest.mark.parametrize("pooling", ["cls_dist", "mean"])
def test_a_shorter_input_equals_a_model_cut_for_it(frames, pooling):
    model = model_of_several_lengths(pooling=pooling)
    features = torch.randn(2, frames, 128)
    output, expected = model(features), cut_to(model, frames)(features)
    assert torch.equal(output.logits, expected.logits)
    assert torch.equal(output.pooler_output, expected.pooler_output)


def test_one_length_among_several_changes_nothing():
    """At full length, bit for bit the numbers of Transformers' own embeddings."""
    model = model_of_several_lengths()
    plain = QLungForAudioClassification(QLungConfig(audio_config={**TINY_AST, "max_length": 198})).eval()
    plain.load_state_dict(model.state_dict())
    features = torch.randn(2, 198, 128)
    assert torch.equal(model(features).logits, plain(features).logits)


def test_the_gradient_reaches_the_columns_that_were_used():
    model = model_of_several_lengths().train()
    positions = model.qlung.encoder.embeddings.position_embeddings
    model(torch.randn(2, 48, 128), labels=torch.tensor([0, 1])).loss.backward()
    reached = positions.grad[0].abs().sum(dim=-1) > 0
    assert reached[:2].all()
    columns = reached[2:].unflatten(0, (12, 19))
    assert columns.all(dim=0).tolist() == [7 <= column < 11 for column in range(19)]
    assert (columns.any(dim=0) == columns.all(dim=0)).all()


def test_a_mixed_batch_gives_each_item_what_it_gets_alone():
    model = model_of_several_lengths()
    num_frames = torch.tensor([98, 48, 198, 48, 98])
    items = [torch.randn(frames, 128) for frames in num_frames.tolist()]
    batch = torch.nn.utils.rnn.pad_sequence(items, batch_first=True, padding_value=9.0)
    output, hidden = model(batch, num_frames=num_frames), model.qlung(batch, num_frames=num_frames)
    assert hidden.last_hidden_state.shape == (5, 2 + 12 * 19, 16)
    for index, item in enumerate(items):
        alone = model(item[None])
        torch.testing.assert_close(output.logits[index], alone.logits[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(hidden.pooler_output[index], alone.pooler_output[0], atol=1e-5, rtol=1e-5)
        tokens = model.qlung(item[None]).last_hidden_state[0]
        torch.testing.assert_close(hidden.last_hidden_state[index, : len(tokens)], tokens, atol=1e-5, rtol=1e-5)
        assert not hidden.last_hidden_state[index, len(tokens) :].any()
    assert torch.equal(model(batch, num_frames=num_frames, return_dict=False)[0], output.logits)


def test_num_frames_of_one_length_cut_the_rest_off():
    model = model_of_several_lengths()
    batch, num_frames = torch.randn(2, 198, 128), torch.tensor([48, 48])
    output = model(batch, num_frames=num_frames, output_hidden_states=True)
    assert torch.equal(output.logits, model(batch[:, :48]).logits)
    assert output.hidden_states[0].shape == (2, 2 + 12 * 4, 16)


def test_what_lengths_do_not_fit_is_named():
    model = model_of_several_lengths()
    with pytest.raises(ValueError, match="50 frames and the encoder takes 48 or 98 or 198: prepare the audio"):
        model(torch.zeros(1, 50, 128))
    with pytest.raises(ValueError, match="num_frames is 98, and the input has 48 frames"):
        model(torch.zeros(2, 48, 128), num_frames=torch.tensor([48, 98]))
    with pytest.raises(ValueError, match="Items of 48 and 98 frames have hidden states and attentions of several"):
        model(torch.zeros(2, 98, 128), num_frames=torch.tensor([48, 98]), output_hidden_states=True)
    for frames in ([48, 98], [98, 48, 198], [], [10, 198]):
        with pytest.raises(ValueError, match="must ascend from at least a patch's 16 to the audio_config's max_length"):
            QLungConfig(audio_config={**TINY_AST, "max_length": 198}, input_frames=frames)
    with pytest.raises(ValueError, match="CLAP stretches all input to one grid"):
        clap_config(input_frames=[401, 801])


def test_several_lengths_survive_saving(tmp_path):
    model = model_of_several_lengths()
    model.save_pretrained(tmp_path)
    features = torch.randn(2, 48, 128)
    loaded, info = QLungForAudioClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert loaded.config.input_frames == FRAMES
    assert torch.equal(loaded(features).logits, model(features).logits)
    assert torch.equal(AutoModel.from_pretrained(tmp_path)(features).pooler_output, model(features).pooler_output)


def test_a_new_model_of_several_lengths_is_initialised_as_any():
    embeddings = QLungModel(QLungConfig(audio_config={**TINY_AST, "max_length": 198}, input_frames=FRAMES)).encoder
    assert not embeddings.embeddings.position_embeddings.any()
    assert not embeddings.embeddings.cls_token.any()
    assert embeddings.embeddings.patch_embeddings.projection.weight.std() > 0.01

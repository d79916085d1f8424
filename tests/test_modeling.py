import copy

import pytest
import torch
from safetensors.torch import load_file
from transformers import ASTConfig, ASTForAudioClassification, ASTModel, AutoModel

from modeling_qlung import QLungConfig, QLungForAudioClassification, QLungModel
from modeling_qlung.modeling_qlung import cut_position_grid

TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def tiny_config(**kwargs) -> QLungConfig:
    return QLungConfig(audio_config={**TINY, "max_length": 98}, **kwargs)


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


# ---- Pretrained encoders, of the real checkpoint's shape ----


@pytest.fixture(scope="session")
def pretrained_ast(tmp_path_factory):
    """A folder like `MIT/ast-finetuned-audioset-10-10-0.4593`: AST for 1024 frames, with its classifier; narrower."""
    torch.manual_seed(0)
    model = ASTForAudioClassification(ASTConfig(**TINY, num_labels=527))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    folder = tmp_path_factory.mktemp("ast")
    model.save_pretrained(folder)
    return folder


def grid_number(frequency: int, time: int, times: int) -> int:
    """Index among AST's tokens: two special ones, then each frequency's row of times."""
    return 2 + frequency * times + time


@pytest.mark.parametrize("cls", [QLungModel, QLungForAudioClassification])
def test_from_audio_encoder_cuts_the_middle_79_of_101_columns(cls, pretrained_ast):
    model = cls.from_audio_encoder(str(pretrained_ast), duration=8.0, pooling="mean")
    assert model.config.pooling == "mean"
    assert model.config.audio_config.max_length == 798
    encoder, original = model.base_model.encoder, ASTModel.from_pretrained(pretrained_ast)
    positions, before = (e.embeddings.position_embeddings[0] for e in (encoder, original))
    assert positions.shape == (2 + 12 * 79, 16)
    assert before.shape == (2 + 12 * 101, 16)
    assert torch.equal(positions[:2], before[:2])
    for frequency in range(12):
        for time in range(79):
            cut = positions[grid_number(frequency, time, 79)]
            assert torch.equal(cut, before[grid_number(frequency, 11 + time, 101)])
    for name, value in original.state_dict().items():
        if "position_embeddings" not in name:
            assert torch.equal(encoder.state_dict()[name], value), name


def test_the_real_shape_at_full_length_gives_asts_own_embedding(tmp_path):
    """AST base, 12 layers of 768, random weights: saved by Transformers, read by us, same numbers."""
    torch.manual_seed(0)
    original = ASTModel(ASTConfig()).eval()
    torch.nn.init.normal_(original.embeddings.position_embeddings, std=0.02)
    original.save_pretrained(tmp_path)
    model = QLungModel.from_audio_encoder(str(tmp_path), num_frames=1024).eval()
    features = torch.randn(1, 1024, 128)
    with torch.no_grad():
        torch.testing.assert_close(model(features).pooler_output, original(features).pooler_output)
    cut = QLungModel.from_audio_encoder(str(tmp_path), duration=8.0)
    assert cut.encoder.embeddings.position_embeddings.shape == (1, 950, 768)


def test_a_longer_input_than_the_encoder_knows_is_refused():
    long, short = ASTConfig(max_length=1024), ASTConfig(max_length=512)
    with pytest.raises(ValueError, match="512 frames; 1024 would need"):
        cut_position_grid(torch.zeros(1, 2 + 12 * 50, 8), short, long)


def test_other_encoders_and_absent_weights_are_named(tmp_path):
    with pytest.raises(OSError, match="hf download nobody/no-such-ast --local-dir"):
        QLungModel.from_audio_encoder("nobody/no-such-ast")
    QLungModel(tiny_config()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a qlung, not an AST"):
        QLungModel.from_audio_encoder(str(tmp_path))


def test_an_encoder_that_lacks_weights_is_refused(pretrained_ast, tmp_path):
    from safetensors.torch import save_file

    weights = load_file(pretrained_ast / "model.safetensors")
    removed = next(name for name in weights if "layernorm_before.weight" in name)
    del weights[removed]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((pretrained_ast / "config.json").read_text())
    with pytest.raises(ValueError, match=r"lacks \['layers.0.layernorm_before.weight'\]"):
        QLungModel.from_audio_encoder(str(tmp_path))

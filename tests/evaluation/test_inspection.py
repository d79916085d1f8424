import numpy as np
import pytest
import torch
from transformers import ClapAudioConfig

from modeling_qlung import QLungConfig, QLungFeatureExtractor, QLungModel
from modeling_qlung.evaluation.inspection import embeddings
from modeling_qlung.inference import attention_map
from tests.training.small_training import cycles, small_model

EXTRACTOR = QLungFeatureExtractor(duration=0.5)


def test_embeddings_are_the_heads_input_in_the_order_of_the_rows():
    model, rows = small_model(dropout=0.5).train(), cycles(7)
    found = embeddings(model, EXTRACTOR, rows, batch_size=3)
    assert found.shape == (7, 16)
    assert model.training
    model.eval()
    for row, embedding in zip(rows, found, strict=True):
        inputs = EXTRACTOR(row["waveform"], sampling_rate=16000, return_tensors="pt")
        logits = model.head(torch.from_numpy(embedding))[0]
        torch.testing.assert_close(logits, model(**inputs).logits[0], rtol=1e-4, atol=1e-4)


def test_embeddings_of_a_model_without_a_head():
    model = small_model()
    np.testing.assert_allclose(
        embeddings(model.qlung, EXTRACTOR, cycles(2)), embeddings(model, EXTRACTOR, cycles(2)), rtol=1e-5
    )


class OneLoudPatch(QLungFeatureExtractor):
    """Silence but for one patch: 16 bands and 16 frames."""

    def extract_features(self, clips):
        features = torch.zeros(len(clips), 48, 128)
        features[:, 20:36, 40:56] = 3.0  # the third patch in time, the fifth in frequency, at strides of 10
        return features


@pytest.mark.parametrize("pooling", ["cls_dist", "mean"])
def test_attention_finds_the_only_patch_that_differs(pooling):
    model = small_model(pooling=pooling, audio_config={"time_stride": 10, "frequency_stride": 10})
    embedded = model.qlung.encoder.embeddings
    with torch.no_grad():
        embedded.position_embeddings.zero_()
        embedded.patch_embeddings.projection.weight.copy_(0.1 * torch.randn(16, 1, 1, 1))  # sums up each patch
        for parameter in model.qlung.encoder.layers.parameters():
            parameter.normal_()
    found = attention_map(model, OneLoudPatch(duration=0.5), np.ones(8000, dtype=np.float32))
    assert found.shape == (4, 12)
    # Overlapping patches see a part of it; those that do not touch it are alike, and it differs most from these.
    untouched = found[:, [0, 1, 2, 6, 7, 8, 9, 10, 11]]
    assert np.ptp(untouched) < 1e-6
    assert np.unravel_index(np.abs(found - untouched[0, 0]).argmax(), found.shape) == (2, 4)


@pytest.mark.parametrize(("pooling", "queries"), [("cls_dist", slice(0, 2)), ("mean", slice(None))])
def test_attention_is_of_the_tokens_that_are_pooled(pooling, queries):
    model = small_model(pooling=pooling).eval()
    waveform = cycles(1)[0]["waveform"]
    found = attention_map(model, EXTRACTOR, waveform)
    model.set_attn_implementation("eager")
    inputs = EXTRACTOR(waveform, sampling_rate=16000, return_tensors="pt")
    rows = model(**inputs, output_attentions=True).attentions[-1][0, :, queries].mean(dim=(0, 1)).detach()
    times, frequencies = found.shape
    for time in range(times):
        for frequency in range(frequencies):
            assert found[time, frequency] == pytest.approx(float(rows[2 + frequency * times + time]), rel=1e-4)
    assert found.sum() + float(rows[:2].sum()) == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_attention_leaves_the_model_as_it_was(implementation):
    model = small_model().train()
    model.set_attn_implementation(implementation)
    attention_map(model, EXTRACTOR, np.ones(8000, dtype=np.float32))
    assert model.training
    parts = (model, model.qlung, model.qlung.encoder)
    assert {part.config._attn_implementation for part in parts} == {implementation}


def test_clap_has_embeddings_and_says_that_it_has_no_attention_over_time():
    encoder = ClapAudioConfig(
        patch_embeds_hidden_size=8,
        hidden_size=32,
        depths=[1, 1, 1],
        num_attention_heads=[1, 1, 2],
        spec_size=64,
        num_mel_bins=16,
        window_size=4,
    )
    model = QLungModel(QLungConfig(audio_config=encoder, head="linear"))
    extractor = QLungFeatureExtractor(feature_size=16, duration=0.5)
    assert embeddings(model, extractor, cycles(3)).shape == (3, 32)
    with pytest.raises(
        ValueError, match=r"the encoder is clap_audio_model: attention .* audio-spectrogram-transformer"
    ):
        attention_map(model, extractor, np.ones(8000, dtype=np.float32))


def test_embeddings_take_a_dataset_formatted_or_not():
    model, rows = small_model(), cycles(2)
    np.testing.assert_allclose(
        embeddings(model, EXTRACTOR, rows), embeddings(model, EXTRACTOR, rows.with_format(None)), rtol=1e-6
    )

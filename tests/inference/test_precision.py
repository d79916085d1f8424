"""The fastest number format: where it is chosen, and that its decisions are float32's."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForAudioClassification, pipeline

from modeling_qlung import QLungConfig, QLungFeatureExtractor, QLungForAudioClassification
from modeling_qlung.inference import fastest_dtype, read_audio

from ..encoders import TINY_AST


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"avx2": True, "avx512_bf16": True, "amx_bf16": True}, torch.bfloat16),
        ({"avx2": True, "avx512_bf16": True, "amx_bf16": False}, torch.float32),
        ({"architecture": "aarch64"}, torch.float32),
    ],
)
def test_bfloat16_is_chosen_where_a_processor_multiplies_its_matrices(monkeypatch, capabilities, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert fastest_dtype() == fastest_dtype(torch.device("cpu")) == expected


def test_bfloat16_is_chosen_where_a_gpu_does_not_emulate_it(monkeypatch):
    for hardware in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, has=hardware: has)
        assert fastest_dtype("cuda:1") == (torch.bfloat16 if hardware else torch.float32)
    assert fastest_dtype("mps") == torch.float32


def read_cycles(folder: Path) -> tuple[list[np.ndarray], torch.Tensor]:
    """Cut every recording at hand: cycles at 16 kHz, and 1 where there is a crackle or a wheeze."""
    cycles, labels = [], []
    for file in sorted((folder / "ICBHI_final_database").glob("*.wav")):
        recording = read_audio(file)
        for start, end, *sounds in np.loadtxt(file.with_suffix(".txt"), ndmin=2):
            cycles.append(recording[round(16000 * start) : round(16000 * end)])
            labels.append(any(sounds))
    return cycles, torch.tensor(labels).long()


def train(model: QLungForAudioClassification, features: torch.Tensor, labels: torch.Tensor, steps: int) -> None:
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        drawn = torch.randint(len(labels), (32,), generator=generator)
        optimizer.zero_grad()
        model(features[drawn], labels=labels[drawn]).loss.backward()
        optimizer.step()
    model.eval()


@torch.inference_mode()
def probabilities(model: QLungForAudioClassification, features: torch.Tensor) -> torch.Tensor:
    return torch.cat([model(batch).logits.softmax(-1) for batch in features.split(64)])


def test_a_trained_models_decisions_are_those_of_float32(real_icbhi, tmp_path):
    """On every real cycle at hand, from a checkpoint that was saved in float32."""
    extractor = QLungFeatureExtractor(duration=1.0)
    cycles, labels = read_cycles(real_icbhi)
    assert len(cycles) == 533
    features = extractor(cycles, sampling_rate=16000, return_tensors="pt").input_values
    features = (features - features.mean()) / features.std()
    torch.manual_seed(0)
    encoder = {**TINY_AST, "max_length": 98, "frequency_stride": 16, "time_stride": 16}
    model = QLungForAudioClassification(
        QLungConfig(audio_config=encoder, head="linear", id2label={0: "normal", 1: "abnormal"})
    )
    train(model, features, labels, steps=100)
    model.save_pretrained(tmp_path)
    expected = probabilities(model, features)
    assert expected.argmax(-1).eq(labels).float().mean() > labels.bincount().max() / len(labels), "it learnt nothing"
    half = QLungForAudioClassification.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    found = probabilities(half, features)
    agreement = found.argmax(-1).eq(expected.argmax(-1)).float().mean().item()
    largest = (found - expected).abs().max().item()
    print(f"bfloat16 decides {agreement:.2%} of {len(cycles)} cycles as float32; probabilities differ by {largest:.3f}")
    assert agreement >= 0.99
    assert largest < 0.02


def test_a_bfloat16_model_saves_and_opens_as_such_and_answers_in_a_pipeline(tmp_path):
    torch.manual_seed(0)
    model = QLungForAudioClassification(QLungConfig(audio_config={**TINY_AST, "max_length": 98})).to(torch.bfloat16)
    extractor = QLungFeatureExtractor(duration=1.0)
    model.save_pretrained(tmp_path)
    extractor.save_pretrained(tmp_path)
    noise = np.random.default_rng(0).standard_normal(16000).astype(np.float32)
    expected = model.eval()(**extractor(noise, sampling_rate=16000, return_tensors="pt")).logits
    assert expected.dtype == torch.float32
    opened = AutoModelForAudioClassification.from_pretrained(tmp_path)
    assert opened.dtype == torch.bfloat16
    assert torch.equal(opened(**extractor(noise, sampling_rate=16000, return_tensors="pt")).logits, expected)
    classify = pipeline("audio-classification", model=str(tmp_path), dtype=torch.bfloat16, device="cpu")
    scores = {answer["label"]: answer["score"] for answer in classify(noise)}
    assert [scores[name] for name in model.config.label2id] == pytest.approx(expected.softmax(-1)[0].tolist(), abs=1e-6)

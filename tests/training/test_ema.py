import io

import pytest
import torch
from torch import nn

from modeling_qlung.training.ema import WeightEMA


def make_model(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).to(dtype)


def change(model, seed):
    torch.manual_seed(seed)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(torch.randn_like(value))


def weights(model):
    return {name: value.detach().double().clone() for name, value in model.named_parameters()}


@pytest.mark.parametrize("warmup", [True, False])
def test_the_average_is_the_weighted_sum_of_all_weights(warmup):
    """Closed form: the weights of step i count (1 - d_i) Π_{j > i} d_j, those of the start Π d_j."""
    model = make_model()
    ema = WeightEMA(model, decay=0.6, warmup=warmup)
    history = [weights(model)]
    for step in range(1, 13):
        change(model, step)
        ema.update(model)
        history.append(weights(model))
    decays = [min(0.6, (1 + n) / (10 + n)) if warmup else 0.6 for n in range(1, 13)]
    shares = [1.0] + [1 - decay for decay in decays]
    for step, decay in enumerate(decays):
        shares = [share * decay if index <= step else share for index, share in enumerate(shares)]
    assert sum(shares) == pytest.approx(1)
    for name, value in ema.average.items():
        expected = sum(share * past[name] for share, past in zip(shares, history, strict=True))
        torch.testing.assert_close(value.double(), expected, atol=1e-6, rtol=1e-6)


def test_equal_weights_stay_exactly():
    model = make_model()
    ema = WeightEMA(model, decay=0.999)
    for _ in range(50):
        ema.update(model)
    assert all(torch.equal(ema.average[name], value) for name, value in model.named_parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swap_puts_the_average_in_and_restores_bit_by_bit(dtype):
    model = make_model(dtype)
    ema = WeightEMA(model, decay=0.9, warmup=False)
    change(model, 1)
    ema.update(model)
    model(torch.randn(8, 3, dtype=dtype))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with ema.swap(model):
        for name, value in model.named_parameters():
            assert torch.equal(value, ema.average[name].to(dtype))
            assert value.requires_grad
        assert torch.equal(model[1].running_mean, before["1.running_mean"])
        assert not torch.equal(model[0].weight, before["0.weight"])
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_swap_restores_after_an_error():
    model = make_model()
    ema = WeightEMA(model, decay=0.9)
    change(model, 1)
    before = model[0].weight.detach().clone()
    with pytest.raises(RuntimeError, match="mat1 and mat2"), ema.swap(model):
        model(torch.randn(8, 5))
    assert torch.equal(model[0].weight, before)


def test_apply_keeps_the_average_in_the_model():
    model = make_model()
    ema = WeightEMA(model, decay=0.9)
    change(model, 1)
    ema.apply(model)
    assert all(torch.equal(ema.average[name], value) for name, value in model.named_parameters())


def test_the_average_of_bfloat16_weights_is_float32():
    """Averaged in bfloat16, a step of a thousandth would be lost in rounding."""
    model = make_model(torch.bfloat16)
    ema = WeightEMA(model, decay=0.999, warmup=False)
    start = ema.average["0.weight"].clone()
    with torch.no_grad():
        model[0].weight.add_(0.125)
    ema.update(model)
    moved = ema.average["0.weight"] - start
    assert moved.dtype == torch.float32
    torch.testing.assert_close(moved, (model[0].weight.float() - start) * 0.001, rtol=1e-2, atol=1e-6)


def test_continuing_from_a_saved_state_is_exact():
    model = make_model()
    ema = WeightEMA(model, decay=0.9)
    change(model, 1)
    ema.update(model)
    buffer = io.BytesIO()
    torch.save(ema.state_dict(), buffer)
    buffer.seek(0)
    resumed = WeightEMA(model, decay=0.9)
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    change(model, 2)
    for average in (ema, resumed):
        average.update(model)
    assert resumed.updates == 2
    assert all(torch.equal(resumed.average[name], value) for name, value in ema.average.items())


def test_tied_weights_are_averaged_once():
    model = make_model()
    model.append(nn.Linear(4, 2))
    model[3].weight = model[2].weight
    ema = WeightEMA(model, decay=0.5, warmup=False)
    start = model[2].weight.detach().clone()
    change(model, 1)
    ema.update(model)
    torch.testing.assert_close(ema.average["2.weight"], (start + model[2].weight.detach()) / 2)


def test_another_model_is_refused():
    ema = WeightEMA(make_model(), decay=0.9)
    with pytest.raises(ValueError, match=r"The model differs .* '0.bias'"):
        ema.update(nn.Sequential(nn.Linear(3, 5)))
    with pytest.raises(ValueError, match="The saved average differs"):
        ema.load_state_dict({"updates": 1, "average": {}})
    with pytest.raises(ValueError, match="decay"):
        WeightEMA(make_model(), decay=1.0)

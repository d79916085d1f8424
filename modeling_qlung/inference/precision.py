"""The number format in which a model answers fastest on a device, with the same decisions."""

import torch


def fastest_dtype(device: str | torch.device = "cpu") -> torch.dtype:
    """Choose the `dtype` to load a model with: `from_pretrained(checkpoint, dtype=fastest_dtype())`.

    bfloat16 where the device multiplies matrices of it in hardware: Intel's AMX (four times as fast as float32 for AST
    base) and Nvidia's GPUs since Ampere. Elsewhere it is emulated, or as slow as float32 or slower (AVX-512's own
    bfloat16 instructions too), and the choice is float32. The head computes in float32 in either case.

    Args:
        device: where the model will run.
    """
    kind = torch.device(device).type
    if kind == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = kind == "cpu" and bool(torch.cpu.get_capabilities().get("amx_bf16"))
    return torch.bfloat16 if fast else torch.float32

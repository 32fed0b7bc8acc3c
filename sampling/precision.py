"""The types that networks compute in, memory formats, and torch.compile."""

from dataclasses import dataclass

import torch
from torch import nn

DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "float64": torch.float64,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp16": torch.float16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class Precision:
    """What --dtype means for this model, and the types that the networks are cast to.

    A type of None leaves a network as it was loaded.
    """

    name: str  # in words, for the PNG
    vae: torch.dtype | None = None
    denoiser: torch.dtype | None = None


def amplifies_errors(prediction_type: str, steps: int = 1, guidance: float = 1.0) -> bool:
    """Whether a denoiser's errors grow on their way to the picture, so that bf16 is too coarse.

    Where x0 comes from an epsilon, 1 / alpha multiplies them. With tiny-sd in bf16, pictures of
    one step are 37 dB from those in float32, whichever layer is left in float32; in float16, which
    has three more bits, they are at 59 dB; with bf16 in the VAE alone at 60 dB. Guidance multiplies
    them too: over several steps, tiny-turbo in bf16 came to 34 dB.
    """
    return prediction_type == "epsilon" or (guidance > 1 and steps > 1)


def choose_precision(requested: str, device: torch.device, amplified: bool) -> Precision:
    """bf16 for "auto" on a processor that computes in it; otherwise what is loaded already.

    Where the denoiser's errors are `amplified` it stays finer, so that pictures keep 40 dB.
    """
    if requested != "auto":
        return Precision(requested)
    if not computes_in_bf16(device):
        return Precision("float32")
    if not amplified:
        return Precision("bf16", vae=torch.bfloat16, denoiser=torch.bfloat16)
    finer = "float16" if device.type == "cuda" else "float32"  # float16 is slow on a CPU
    return Precision(f"bf16, denoiser {finer}", vae=torch.bfloat16, denoiser=DTYPES[finer])


def computes_in_bf16(device: torch.device) -> bool:
    """Whether the processor itself computes in bf16; elsewhere that is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):
        able = torch.cpu.get_capabilities()
        return any(able.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16"))
    return False


def speed_up(
    vaes: list[nn.Module],
    denoiser: nn.Module,
    graphs: list[nn.Module],
    precision: Precision,
    device: torch.device,
    compiled: bool,
) -> None:
    """Casts the networks, takes the fastest memory format, and compiles each of `graphs`."""
    if precision.vae is not None:
        for network in vaes:
            network.to(precision.vae)
    if precision.denoiser is not None:
        denoiser.to(precision.denoiser)

    # float32 weights stay mapped from their file. Group norms on a GPU undo channels_last, unless
    # they are compiled.
    plain = DTYPES.get(precision.name) == torch.float32
    if not plain and (device.type == "cpu" or compiled):
        for network in (*vaes, denoiser):
            network.to(memory_format=torch.channels_last)

    if compiled:
        # Compiled once for each size of picture; on a GPU as CUDA graphs.
        mode = "reduce-overhead" if device.type == "cuda" else None
        for network in graphs:
            network.compile(dynamic=False, mode=mode)

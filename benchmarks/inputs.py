"""What both sides of a benchmark work on: networks with random weights, a checkpoint, pictures."""

import functools
import pathlib

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from files import bases, checkpoints
from models.pix2pix_turbo import Pix2PixTurbo, Pix2PixTurboConfig

ROOT = pathlib.Path(__file__).parent.parent
PROMPT = "a cat"

# Networks of SD-Turbo's size, as arguments of the classes of `diffusers` and `transformers`.
UNET = dict(
    block_out_channels=(320, 640, 1280, 1280),
    attention_head_dim=(5, 10, 20, 20),
    cross_attention_dim=1024,
    use_linear_projection=True,
    sample_size=64,
)
VAE = dict(
    block_out_channels=(128, 256, 512, 512),
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    latent_channels=4,
    layers_per_block=2,
    norm_num_groups=32,
    sample_size=512,
)
TEXT_ENCODER = dict(
    vocab_size=49408,
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=23,
    num_attention_heads=16,
    hidden_act="gelu",
    projection_dim=512,
)
# The same networks, small, for the tests.
TINY_UNET = UNET | dict(
    block_out_channels=(32, 64),
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    layers_per_block=1,
    attention_head_dim=2,
    cross_attention_dim=32,
)
TINY_VAE = VAE | dict(block_out_channels=(32,) * 4, layers_per_block=1)
TINY_TEXT_ENCODER = TEXT_ENCODER | dict(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=2,
)


def write_random_base(folder: pathlib.Path, tiny: bool, dtype: torch.dtype, device: str) -> None:
    """Writes a base with random weights, by `diffusers` and `transformers` themselves.

    The vocabulary is the tiny base's: tokenizing a prompt takes no measurable time.
    """
    from diffusers import (
        AutoencoderKL,
        EulerDiscreteScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    with torch.device(device):
        vae = AutoencoderKL(**(TINY_VAE if tiny else VAE))
        unet = UNet2DConditionModel(**(TINY_UNET if tiny else UNET))
        text_config = CLIPTextConfig(**(TINY_TEXT_ENCODER if tiny else TEXT_ENCODER))
        text_encoder = CLIPTextModel(text_config)
    vocabulary = ROOT / "tiny" / "tiny" / "tokenizer"
    tokenizer = CLIPTokenizer(
        str(vocabulary / "vocab.json"),
        str(vocabulary / "merges.txt"),
        model_max_length=77,
    )
    scheduler = EulerDiscreteScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        timestep_spacing="trailing",
        steps_offset=1,
    )
    pipeline = StableDiffusionPipeline(
        vae=vae.to(dtype),
        unet=unet.to(dtype),
        text_encoder=text_encoder.to(dtype),
        tokenizer=tokenizer,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)


def write_random_taesd(folder: pathlib.Path, dtype: torch.dtype) -> None:
    """Writes TAESD, in its only size, with random weights."""
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    AutoencoderTiny().to(dtype).save_pretrained(folder)


def write_checkpoint(path: pathlib.Path, folder: str) -> None:
    """Writes a pix2pix-Turbo checkpoint for the base in `folder`.

    Its LoRA is random rather than zero, so that it changes the picture.
    """
    base = bases.load_base(folder, ("vae", "unet", "schedule"))
    rng = torch.Generator().manual_seed(0)
    config = Pix2PixTurboConfig(prediction_type=base.schedule.prediction_type)
    generator = Pix2PixTurbo(base.vae, base.unet, base.schedule, config, rng)
    for name, parameter in generator.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02, generator=rng)
    checkpoints.save_generator(path, generator, "pix2pix_turbo", folder, [PROMPT])


@functools.cache
def pictures(size: int, batch: int) -> list[Image.Image]:
    """Pictures of noise."""
    levels = np.random.default_rng(0).integers(0, 256, (batch, size, size, 3), np.uint8)
    return [Image.fromarray(picture) for picture in levels]


def write_data(folder: pathlib.Path, size: int, batch: int) -> None:
    """Writes a data set for both trainers, with one test picture, which their previews need."""
    for split, count in (("train", max(batch, 2)), ("test", 1)):
        for side in "AB":
            place = folder / f"{split}_{side}"
            place.mkdir(parents=True, exist_ok=True)
            for i, picture in enumerate(pictures(size, count)):
                picture.save(place / f"{i}.png")
    for domain in "ab":
        (folder / f"fixed_prompt_{domain}.txt").write_text(PROMPT)


def module_inputs(
    size: int,
    batch: int,
    width: int,
    dtype: torch.dtype,
    device: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Picture, latent of an eighth of its size, context [B, 77, width] and token ids [B, 77]."""
    rng = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 900, (batch, 77), generator=rng)
    x = torch.randn((batch, 3, size, size), generator=rng)
    z = torch.randn((batch, 4, size // 8, size // 8), generator=rng)
    context = torch.randn((batch, 77, width), generator=rng)
    return x.to(device, dtype), z.to(device, dtype), context.to(device, dtype), ids.to(device)

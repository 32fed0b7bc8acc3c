"""Small Stable Diffusion models that the tests share, and ways to damage and to compare them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import randomise
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from files import bases
from files.hub import ROOT

PARTS = ("vae", "unet", "text_encoder")
TOKENIZER = ROOT / "tiny" / "tiny" / "tokenizer"
UNET = dict(
    block_out_channels=(16, 32),
    layers_per_block=1,
    norm_num_groups=4,
    cross_attention_dim=32,
    sample_size=8,
    attention_head_dim=4,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
)
VAE = dict(
    block_out_channels=(8, 16),
    layers_per_block=1,
    norm_num_groups=4,
    latent_channels=4,
    sample_size=16,
    down_block_types=["DownEncoderBlock2D"] * 2,
    up_block_types=["UpDecoderBlock2D"] * 2,
)
TEXT = dict(hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4)
SCHEDULE = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
TEXTS = ["", "a red circle on blue", "a red circle! " * 30, "isn't it?", "Über!"]


def tiny_pipeline(
    unet: dict = UNET,
    vae: dict = VAE,
    scheduler=None,
    seed: int = 0,
) -> StableDiffusionPipeline:
    """A pipeline of `diffusers` with random weights and the tiny base's vocabulary."""
    torch.manual_seed(seed)
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
    text_config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        **TEXT,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=0,
    )
    if scheduler is None:
        scheduler = DDIMScheduler(
            **SCHEDULE,
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        )
    pipe = StableDiffusionPipeline(
        vae=randomise(AutoencoderKL(**vae), seed),
        unet=randomise(UNet2DConditionModel(**unet), seed + 1),
        text_encoder=randomise(CLIPTextModel(text_config), seed + 2),
        tokenizer=tokenizer,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def peer_tensors(pipe: StableDiffusionPipeline, part: str) -> dict[str, Tensor]:
    """The weights of one of the pipeline's networks, under our names."""
    tensors = getattr(pipe, part).state_dict()
    if part == "text_encoder":
        # transformers 5 leaves the prefix out.
        return {"text_model." + name.removeprefix("text_model."): t for name, t in tensors.items()}
    return tensors


def assert_same_networks(
    base: bases.Base,
    pipe: StableDiffusionPipeline,
    dtype: torch.dtype = torch.float32,
) -> None:
    """All three networks have the pipeline's weights in this type, and are frozen."""
    for part in PARTS:
        ours = getattr(base, part).state_dict()
        theirs = peer_tensors(pipe, part)
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            assert tensor.dtype == dtype
            assert torch.equal(tensor, theirs[name].to(dtype))
        for p in getattr(base, part).parameters():
            assert not p.requires_grad
            assert not p.is_meta


def weight_file(folder: Path, part: str) -> Path:
    if part == "text_encoder":
        return folder / part / "model.safetensors"
    return folder / part / "diffusion_pytorch_model.safetensors"


def edit(path: Path, change: Callable[[dict], dict | None]) -> None:
    """Rewrites a safetensors file. `change` edits its dictionary or returns another one."""
    tensors = load_file(path)
    tensors = change(tensors) or tensors
    tensors = {name: t.clone() for name, t in tensors.items()}
    save_file(tensors, path, {"format": "pt"})


def tokenizer_folder(base: Path, config: dict | None, tokens: dict | None) -> Path:
    """A new tokenizer/ in `base`, with these contents of its two configuration files."""
    folder = base / "tokenizer"
    folder.mkdir()
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(TOKENIZER / name, folder)
    if config is not None:
        config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, **config}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if tokens is not None:
        (folder / "special_tokens_map.json").write_text(json.dumps(tokens))
    return folder


def refusal(call: Callable, error: type = ValueError, expects: bool = True) -> str:
    """The message with which a call fails: one line that says what to do."""
    with pytest.raises(error) as raised:
        call()
    message = str(raised.value)
    assert "\n" not in message
    assert len(message) < 700
    if expects:
        assert "expected" in message or "run the command again" in message
    return message

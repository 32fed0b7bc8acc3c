"""The names of one-file models in files/formats.py.

`diffusers` converts what these functions name back to where it came from.
"""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from conftest import normal
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from files import formats
from models import clip, unet, vae

pytestmark = pytest.mark.usefixtures("one_thread")

# The structure of the real networks, and so their names, at a small width.
UNETS = {
    "SD 1.5": dict(cross_attention_dim=12),
    "SD-Turbo": dict(cross_attention_dim=12, use_linear_projection=True),
    "one layer, attention everywhere": dict(
        cross_attention_dim=12,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 4,
        up_block_types=("CrossAttnUpBlock2D",) * 4,
    ),
}
WIDTHS = dict(block_out_channels=(8, 16, 24, 24), norm_num_groups=4)
TEXT = dict(
    vocab_size=19,
    hidden_size=8,
    intermediate_size=12,
    num_attention_heads=2,
    max_position_embeddings=7,
)
OPEN_CLIP = "cond_stage_model.model."


def random_tensors(network: torch.nn.Module) -> dict[str, Tensor]:
    """A different tensor for each name of the network."""
    state = network.state_dict()
    return {name: normal(*t.shape, seed=i) for i, (name, t) in enumerate(state.items())}


# -------------------- one-file models

def unet_file(config: unet.UNetConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The U-Net's tensors as a one-file model has them."""
    file = {}
    for name, tensor in tensors.items():
        file["model.diffusion_model." + formats.unet_original_name(name, config)] = tensor
    return file


def vae_file(
    config: vae.VAEConfig,
    tensors: dict[str, Tensor],
    prefix: str = "first_stage_model.",
) -> dict[str, Tensor]:
    """The VAE's tensors as a one-file model has them, with 1x1 convolutions in the attention."""
    file = {}
    for name, tensor in tensors.items():
        if ".attentions." in name and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]
        file[prefix + formats.vae_original_name(name, config)] = tensor
    return file


def open_clip_file(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The text encoder's tensors as SD 2.x has them.

    It has a 24th block, and tensors that only serve to compare texts with pictures.
    """
    file: dict[str, Tensor] = {}
    # q, k and v come in the order in which they are put together.
    for name, tensor in tensors.items():
        original, third = formats.open_clip_name(name)
        key = OPEN_CLIP + original
        if third is not None and key in file:
            tensor = torch.cat([file[key], tensor])
        file[key] = tensor
    for name, tensor in [*file.items()]:
        if ".22." in name:
            file[name.replace(".22.", ".23.")] = tensor + 1
    file[OPEN_CLIP + "logit_scale"] = torch.ones(())
    file[OPEN_CLIP + "text_projection"] = normal(8, 8)
    return file


def other_tensors() -> dict[str, Tensor]:
    """What one-file models hold besides the three networks."""
    names = [
        "alphas_cumprod",
        "betas",
        "model_ema.decay",
        "model_ema.num_updates",
        "model_ema.diffusion_modelinput_blocks00weight",
        "sqrt_alphas_cumprod",
        "scale_factor",
    ]
    return {name: torch.ones(1) for name in names}


def same(ours: dict[str, Tensor], peer: dict[str, Tensor]) -> bool:
    if ours.keys() != peer.keys():
        return False
    return all(torch.equal(t, peer[name]) for name, t in ours.items())


# -------------------- the U-Net

@pytest.mark.parametrize("sizes", UNETS.values(), ids=UNETS.keys())
def test_the_unets_names_are_the_original_ones(sizes):
    config = unet.UNetConfig(**WIDTHS, **sizes)
    tensors = random_tensors(unet.UNet(config))
    file = unet_file(config, tensors)
    assert len(file) == len(tensors)
    assert same(convert_ldm_unet_checkpoint(dict(file), vars(config)), tensors)
    assert same(formats.unet_from_original(file | other_tensors(), config), tensors)


def test_the_unets_names_where_the_peer_accepts_two():
    """The up-sampling has the place after the attention, if there is one."""
    names = []
    for i in range(3):
        name = f"up_blocks.{i}.upsamplers.0.conv.weight"
        names.append(formats.unet_original_name(name, unet.UNetConfig()))
    assert names == [
        "output_blocks.2.1.conv.weight",
        "output_blocks.5.2.conv.weight",
        "output_blocks.8.2.conv.weight",
    ]


def test_the_small_unet_has_all_names_of_the_real_one():
    with torch.device("meta"):
        real = unet.UNet(unet.UNetConfig())
        small = unet.UNet(unet.UNetConfig(**WIDTHS, **UNETS["SD 1.5"]))
    assert real.state_dict().keys() == small.state_dict().keys()
    assert len(real.state_dict()) == 686


# -------------------- the VAE

@pytest.mark.parametrize(
    "prefix",
    ["first_stage_model.", ""],
    ids=["one file", "a VAE's own file"],
)
def test_the_vaes_names_are_the_original_ones(prefix):
    config = vae.VAEConfig(**WIDTHS)
    tensors = random_tensors(vae.VAE(config))
    file = vae_file(config, tensors, prefix)
    assert len(file) == 248
    assert same(convert_ldm_vae_checkpoint(dict(file), vars(config)), tensors)

    rest = {f"{prefix}loss.logvar": torch.ones(1), f"{prefix}model_ema.decay": torch.ones(1)}
    if prefix:
        rest |= other_tensors()
    assert same(formats.vae_from_original(file | rest, config), tensors)


# -------------------- the text encoder

@pytest.mark.parametrize("stem", ["cond_stage_model", "conditioner.embedders.0"])
@pytest.mark.parametrize("kept", ["text_model.", ""], ids=["", "without text_model"])
def test_the_text_encoder_of_sd1_keeps_its_names(kept, stem):
    config = clip.TextConfig(**TEXT, num_hidden_layers=12)
    tensors = random_tensors(clip.TextEncoder(config))
    prefix = f"{stem}.transformer."
    file = {prefix + name.replace("text_model.", kept): t for name, t in tensors.items()}
    if kept:
        assert same(convert_ldm_clip_checkpoint(file), tensors)

    rest = {
        f"{prefix}{kept}embeddings.position_ids": torch.arange(7)[None],
        f"{prefix}text_projection.weight": normal(8, 8),
        f"{stem}.logit_scale": torch.ones(()),
    }
    assert same(formats.clip_from_original(file | rest | other_tensors(), config), tensors)


@pytest.mark.parametrize("stem", ["cond_stage_model", "conditioner.embedders.0"])
def test_the_text_encoder_of_sd2_is_split_in_thirds_and_its_last_block_left_out(stem):
    config = clip.TextConfig(**TEXT, num_hidden_layers=23)
    tensors = random_tensors(clip.TextEncoder(config))
    file = open_clip_file(tensors)
    peer = CLIPTextModel(CLIPTextConfig(**TEXT, num_hidden_layers=23))
    assert same(convert_open_clip_checkpoint(peer, dict(file)), tensors)

    file = {name.replace("cond_stage_model", stem): t for name, t in file.items()}
    assert same(formats.clip_from_original(file | other_tensors(), config), tensors)


# -------------------- all three

def test_each_network_finds_its_own_in_one_file():
    unet_config = unet.UNetConfig(**WIDTHS, **UNETS["SD-Turbo"])
    vae_config = vae.VAEConfig(**WIDTHS)
    text_config = clip.TextConfig(**TEXT, num_hidden_layers=23)
    networks = [
        (formats.unet_from_original, unet.UNet(unet_config)),
        (formats.vae_from_original, vae.VAE(vae_config)),
        (formats.clip_from_original, clip.TextEncoder(text_config)),
    ]
    tensors = [random_tensors(network) for _, network in networks]
    file = unet_file(unet_config, tensors[0])
    file |= vae_file(vae_config, tensors[1])
    file |= open_clip_file(tensors[2])
    file |= other_tensors()
    for (from_original, network), own in zip(networks, tensors):
        found = from_original(file, network.config)
        assert same(found, own)
        network.double().load_state_dict(found)


class Larger(NamedTuple):
    """A tensor that only a larger network has."""

    from_original: Callable
    config: object
    name: str


TWO_LAYERS = clip.TextConfig(**TEXT, num_hidden_layers=2)
LARGER = [
    Larger(
        formats.unet_from_original,
        unet.UNetConfig(**WIDTHS),
        "model.diffusion_model.label_emb.0.0.weight",
    ),
    Larger(
        formats.unet_from_original,
        unet.UNetConfig(**WIDTHS),
        "model.diffusion_model.input_blocks.12.0.in_layers.0.weight",
    ),
    Larger(
        formats.vae_from_original,
        vae.VAEConfig(**WIDTHS),
        "first_stage_model.encoder.down.4.block.0.norm1.weight",
    ),
    Larger(
        formats.clip_from_original,
        TWO_LAYERS,
        "cond_stage_model.model.transformer.resblocks.3.ln_1.weight",
    ),
    Larger(
        formats.clip_from_original,
        TWO_LAYERS,
        "cond_stage_model.transformer.text_model.encoder.layers.2.layer_norm1.weight",
    ),
]


@pytest.mark.parametrize("larger", LARGER, ids=lambda larger: larger.name)
def test_a_tensor_of_a_larger_network_is_not_passed_over(larger):
    """It comes back under a name that the network does not have, so that loading refuses it."""
    found = larger.from_original({larger.name: torch.ones(1)}, larger.config)
    (name,) = found
    assert larger.name.endswith(name)

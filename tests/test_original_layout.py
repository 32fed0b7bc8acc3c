"""The names of one-file models in models/unet.py, vae.py and clip.py: `diffusers` converts what they name back to where
it came from."""

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

# The structure of the real ones, and so their names, at a small width.
UNETS = {"SD 1.5": dict(cross_attention_dim=12), "SD-Turbo": dict(cross_attention_dim=12, use_linear_projection=True),
         "one layer, attention everywhere": dict(
             cross_attention_dim=12, layers_per_block=1, down_block_types=("CrossAttnDownBlock2D",) * 4,
             up_block_types=("CrossAttnUpBlock2D",) * 4)}
WIDTHS = dict(block_out_channels=(8, 16, 24, 24), norm_num_groups=4)
TEXTS = dict(vocab_size=19, hidden_size=8, intermediate_size=12, num_attention_heads=2, max_position_embeddings=7)
OPEN_CLIP = "cond_stage_model.model."


def drawn(network: torch.nn.Module) -> dict[str, Tensor]:
    """A tensor for each name of the network, each another."""
    return {name: normal(*t.shape, seed=i) for i, (name, t) in enumerate(network.state_dict().items())}


def others() -> dict[str, Tensor]:
    """What one-file models hold besides."""
    one = torch.ones(1)
    return {"alphas_cumprod": one, "betas": one, "model_ema.decay": one, "model_ema.num_updates": one,
            "model_ema.diffusion_modelinput_blocks00weight": one, "sqrt_alphas_cumprod": one, "scale_factor": one}


def unet_file(config: unet.UNetConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"model.diffusion_model." + formats.unet_original_name(name, config): t for name, t in tensors.items()}


def vae_file(config: vae.VAEConfig, tensors: dict[str, Tensor], prefix="first_stage_model.") -> dict[str, Tensor]:
    return {prefix + formats.vae_original_name(name, config): t[:, :, None, None] if ".attentions." in name and t.ndim == 2
            else t for name, t in tensors.items()}


def open_clip_file(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As SD 2.x has it: with a 24th block and what compares with pictures."""
    file: dict[str, Tensor] = {}
    for name, tensor in tensors.items():  # q, k, v must come in this order
        whole, third = formats.open_clip_name(name)
        if third is not None:
            tensor = torch.cat([file.get(OPEN_CLIP + whole, tensor[:0]), tensor])
        file[OPEN_CLIP + whole] = tensor
    last = {name.replace(".22.", ".23."): t + 1 for name, t in file.items() if ".22." in name}
    return file | last | {OPEN_CLIP + "logit_scale": torch.ones(()), OPEN_CLIP + "text_projection": normal(8, 8)}


def same(ours: dict[str, Tensor], peer: dict[str, Tensor]) -> bool:
    return ours.keys() == peer.keys() and all(torch.equal(t, peer[name]) for name, t in ours.items())


@pytest.mark.parametrize("sizes", UNETS.values(), ids=UNETS.keys())
def test_the_unets_names_are_the_originals(sizes):
    config = unet.UNetConfig(**WIDTHS, **sizes)
    tensors = drawn(unet.UNet(config))
    file = unet_file(config, tensors)
    assert len(file) == len(tensors) and same(convert_ldm_unet_checkpoint(dict(file), vars(config)), tensors)
    assert same(formats.unet_from_original(file | others(), config), tensors)


def test_the_unets_names_where_the_peer_takes_two():
    """The place of the up-sampling follows the attention, where there is one."""
    names = [formats.unet_original_name(f"up_blocks.{i}.upsamplers.0.conv.weight", unet.UNetConfig()) for i in range(3)]
    assert names == ["output_blocks.2.1.conv.weight", "output_blocks.5.2.conv.weight", "output_blocks.8.2.conv.weight"]


def test_the_small_unet_has_all_names_of_the_real_one():
    with torch.device("meta"):
        real, small = unet.UNet(unet.UNetConfig()), unet.UNet(unet.UNetConfig(**WIDTHS, **UNETS["SD 1.5"]))
    assert real.state_dict().keys() == small.state_dict().keys() and len(real.state_dict()) == 686


@pytest.mark.parametrize("prefix", ["first_stage_model.", ""], ids=["one file", "a VAE's own file"])
def test_the_vaes_names_are_the_originals(prefix):
    config = vae.VAEConfig(**WIDTHS)
    tensors = drawn(vae.VAE(config))
    file = vae_file(config, tensors, prefix)
    assert same(convert_ldm_vae_checkpoint(dict(file), vars(config)), tensors) and len(file) == 248
    rest = {f"{prefix}loss.logvar": torch.ones(1), f"{prefix}model_ema.decay": torch.ones(1)}
    assert same(formats.vae_from_original(file | rest | (others() if prefix else {}), config), tensors)


@pytest.mark.parametrize("stem", ["cond_stage_model", "conditioner.embedders.0"])
@pytest.mark.parametrize("kept", ["text_model.", ""], ids=["", "without text_model"])
def test_the_text_encoder_of_sd1_keeps_its_names(kept, stem):
    config = clip.TextConfig(**TEXTS, num_hidden_layers=12)
    tensors = drawn(clip.TextEncoder(config))
    file = {f"{stem}.transformer.{name.replace('text_model.', kept)}": t for name, t in tensors.items()}
    rest = {f"{stem}.transformer.{kept}embeddings.position_ids": torch.arange(7)[None],
            f"{stem}.transformer.text_projection.weight": normal(8, 8), f"{stem}.logit_scale": torch.ones(())}
    if kept:
        assert same(convert_ldm_clip_checkpoint(file), tensors)
    assert same(formats.clip_from_original(file | rest | others(), config), tensors)


@pytest.mark.parametrize("stem", ["cond_stage_model", "conditioner.embedders.0"])
def test_the_text_encoder_of_sd2_takes_its_thirds_and_not_the_last_block(stem):
    config = clip.TextConfig(**TEXTS, num_hidden_layers=23)
    tensors = drawn(clip.TextEncoder(config))
    file = open_clip_file(tensors)
    peer = CLIPTextModel(CLIPTextConfig(**TEXTS, num_hidden_layers=23))
    assert same(convert_open_clip_checkpoint(peer, dict(file)), tensors)
    file = {name.replace("cond_stage_model", stem): t for name, t in file.items()}
    assert same(formats.clip_from_original(file | others(), config), tensors)


def test_each_network_finds_its_own_in_one_file():
    u, v = unet.UNetConfig(**WIDTHS, **UNETS["SD-Turbo"]), vae.VAEConfig(**WIDTHS)
    c = clip.TextConfig(**TEXTS, num_hidden_layers=23)
    networks = [(formats.unet_from_original, unet.UNet(u), u), (formats.vae_from_original, vae.VAE(v), v),
                (formats.clip_from_original, clip.TextEncoder(c), c)]
    tensors = [drawn(network) for _, network, _ in networks]
    file = unet_file(u, tensors[0]) | vae_file(v, tensors[1]) | open_clip_file(tensors[2]) | others()
    for (from_original, network, config), own in zip(networks, tensors):
        found = from_original(file, config)
        assert same(found, own)
        network.double().load_state_dict(found)


@pytest.mark.parametrize("from_original, config, name", [
    (formats.unet_from_original, unet.UNetConfig(**WIDTHS), "model.diffusion_model.label_emb.0.0.weight"),
    (formats.unet_from_original, unet.UNetConfig(**WIDTHS), "model.diffusion_model.input_blocks.12.0.in_layers.0.weight"),
    (formats.vae_from_original, vae.VAEConfig(**WIDTHS), "first_stage_model.encoder.down.4.block.0.norm1.weight"),
    (formats.clip_from_original, clip.TextConfig(**TEXTS, num_hidden_layers=2), "cond_stage_model.model.transformer.resblocks.3.ln_1.weight"),
    (formats.clip_from_original, clip.TextConfig(**TEXTS, num_hidden_layers=2), "cond_stage_model.transformer.text_model.encoder.layers.2."
     "layer_norm1.weight")], ids=lambda value: value if isinstance(value, str) else "")
def test_a_tensor_of_a_larger_network_is_not_passed_over(from_original, config, name):
    """It comes back under a name that the network does not have, so that loading refuses it."""
    found = from_original({name: torch.ones(1)}, config)
    assert len(found) == 1 and name.endswith(next(iter(found)))

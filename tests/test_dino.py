"""DINO agrees with `transformers`' ViT, its resizing with Pillow, the distance with its formula."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import normal, parameters, randomise, relative
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import ViTConfig, ViTModel

from models.dino import (
    DINO,
    VIT_B8,
    DINOConfig,
    from_state_dict,
    prepare,
    self_similarity,
    structure_distance,
)

TINY = DINOConfig(width=24, depth=3, heads=3, patch=8, side=4)


def peer_vit(c: DINOConfig, height: int, width: int) -> ViTModel:
    config = ViTConfig(
        hidden_size=c.width,
        num_hidden_layers=c.depth,
        num_attention_heads=c.heads,
        intermediate_size=4 * c.width,
        image_size=(height, width),
        patch_size=c.patch,
        layer_norm_eps=1e-6,
    )
    return ViTModel(config, add_pooling_layer=False).eval()


def hub_file(peer: ViTModel, folder: Path) -> dict[str, Tensor]:
    """The tensors by the names of the Hub's files, which transformers 5 does not use in memory."""
    peer.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def peer_keys(peer: ViTModel, pixels: Tensor) -> Tensor:
    keys = []
    last = peer.layers[-1].attention.k_proj
    hook = last.register_forward_hook(lambda module, inputs, output: keys.append(output))
    peer(pixels)
    hook.remove()
    return keys[0]


def cubic(n_in: int, n_out: int) -> Tensor:
    """The original's `interpolate(scale_factor=(n_out + 0.1) / n_in, mode="bicubic")` as a matrix.

    Keys' kernel with a = -0.75, and the border repeated.
    """
    a = -0.75
    matrix = torch.zeros(n_out, n_in, dtype=torch.float64)
    for i in range(n_out):
        centre = (i + 0.5) * n_in / (n_out + 0.1) - 0.5
        first = int(np.floor(centre)) - 1
        for j in range(first, first + 4):
            d = abs(j - centre)
            if d <= 1:
                weight = ((a + 2) * d - (a + 3)) * d * d + 1
            else:
                weight = ((d - 5) * d + 8) * d * a - 4 * a
            matrix[i, min(max(j, 0), n_in - 1)] += weight
    return matrix


@torch.no_grad()
def test_tokens_and_keys_are_the_peers_at_the_native_size(tmp_path):
    peer = randomise(peer_vit(TINY, 32, 32).double())
    dino = from_state_dict(hub_file(peer, tmp_path), TINY)
    pixels = normal(2, 3, 32, 32)
    assert relative(dino(pixels), peer(pixels).last_hidden_state) < 1e-9
    assert relative(dino.keys(pixels), peer_keys(peer, pixels)) < 1e-9
    # Pixels beyond the last whole patch are not seen: 37 // 8 is 4.
    padded = torch.nn.functional.pad(pixels, (0, 5, 0, 5))
    assert relative(dino.keys(padded), dino.keys(pixels)) < 1e-9


@torch.no_grad()
@pytest.mark.parametrize("size", [(32, 56), (56, 32), (16, 24), (32, 37), (80, 80)], ids=str)
def test_other_sizes_interpolate_the_positions_as_the_original_does(size, tmp_path):
    """32 x 37 has the native grid, but is not a square: the original interpolates by 4.1 / 4."""
    dino = randomise(DINO(TINY).double())
    h = size[0] // 8
    w = size[1] // 8
    learned = dino.embeddings.position_embeddings
    grid = learned[0, 1:].unflatten(0, (4, 4))
    positions = torch.einsum("yi,xj,ijc->yxc", cubic(4, h), cubic(4, w), grid).flatten(0, 1)
    positions = torch.cat([learned[:, :1], positions[None]], dim=1)
    assert relative(dino.embeddings.positions(*size), positions) < 1e-9

    peer = peer_vit(TINY, 8 * h, 8 * w).double()
    # All of the peer's tensors are replaced below, so that none stays at its random value.
    assert len(hub_file(peer_vit(TINY, 32, 32), tmp_path)) == 5 + 16 * 3 + 1
    for ours, theirs in zip(dino.encoder["layer"], peer.layers):
        q, k, v = ours.attention.attention.values()
        pairs = [
            (q, theirs.attention.q_proj),
            (k, theirs.attention.k_proj),
            (v, theirs.attention.v_proj),
            (ours.attention.output["dense"], theirs.attention.o_proj),
            (ours.layernorm_before, theirs.layernorm_before),
            (ours.layernorm_after, theirs.layernorm_after),
            (ours.intermediate["dense"], theirs.mlp.fc1),
            (ours.output["dense"], theirs.mlp.fc2),
        ]
        for a, b in pairs:
            b.load_state_dict(a.state_dict())
    peer.layernorm.load_state_dict(dino.layernorm.state_dict())
    patches = dino.embeddings.patch_embeddings["projection"]
    peer.embeddings.patch_embeddings.projection.load_state_dict(patches.state_dict())
    peer.embeddings.cls_token.copy_(dino.embeddings.cls_token)
    peer.embeddings.position_embeddings.copy_(positions)

    pixels = normal(2, 3, *size)
    seen = pixels[:, :, :8 * h, :8 * w]
    assert relative(dino(pixels), peer(seen).last_hidden_state) < 1e-9
    assert relative(dino.keys(pixels), peer_keys(peer, seen)) < 1e-9


@pytest.mark.parametrize(
    "size", [(300, 300), (512, 384), (330, 600), (100, 57), (224, 224), (1001, 336)], ids=str
)
def test_preparation_is_pillows_and_torchvisions(size):
    """Resize(224): the short side is 224, the long one rounded down. Then ToTensor, Normalize."""
    H, W = size
    pixels = np.random.default_rng(0).integers(0, 256, (H, W, 3), dtype=np.uint8)
    pixels[:H // 2] //= 255  # black and almost black, so that sums fall on halves
    if W <= H:
        w, h = 224, int(224 * H / W)
    else:
        w, h = int(224 * W / H), 224
    picture = Image.fromarray(pixels)
    width_first = picture.resize((w, H), Image.BILINEAR).resize((w, h), Image.BILINEAR)
    if H <= 2 * W:
        assert np.array_equal(width_first, picture.resize((w, h), Image.BILINEAR))
    levels = torch.from_numpy(np.array(width_first)).permute(2, 0, 1).double()
    mean = torch.tensor([0.485, 0.456, 0.406])
    std = torch.tensor([0.229, 0.224, 0.225])
    expected = (levels / 255 - mean[:, None, None]) / std[:, None, None]
    ours = prepare(torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1)
    assert relative(ours[0].double(), expected) < 1e-6  # one level is 7e-3


@torch.no_grad()
def test_structure_distance_is_the_papers(tmp_path):
    peer = randomise(peer_vit(TINY, 224, 224).double())
    config = DINOConfig(width=24, depth=3, heads=3, side=28)
    dino = from_state_dict(hub_file(peer, tmp_path), config)
    a = normal(2, 3, 70, 70).clamp(-1, 1)
    b = normal(2, 3, 70, 70, seed=1).clamp(-1, 1)
    for i in range(2):
        matrices = []
        for x in (a, b):
            keys = peer_keys(peer, prepare(x[i:i + 1]))[0]
            assert keys.shape == (1 + 28 * 28, 24)
            rows = [torch.cosine_similarity(key[None], keys) for key in keys]
            matrices.append(torch.stack(rows))
        expected = (matrices[0] - matrices[1]).square().mean()
        assert relative(structure_distance(dino, a, b)[i], expected) < 1e-9
    assert structure_distance(dino, a, a).eq(0).all()
    with pytest.raises(ValueError, match="must be of one size"):
        structure_distance(dino, a, b[:, :, 1:])


def test_keys_of_length_zero_have_similarity_zero():
    keys = torch.tensor([[[0.0, 0.0], [3.0, 4.0], [-6.0, -8.0]]])
    expected = torch.tensor([[[0.0, 0, 0], [0, 1, -1], [0, -1, 1]]])
    assert torch.allclose(self_similarity(keys), expected)


def test_files_that_do_not_fit_are_refused_by_the_tensors_name(tmp_path):
    file = hub_file(peer_vit(TINY, 32, 32), tmp_path)
    projection = "embeddings.patch_embeddings.projection.weight"
    with pytest.raises(RuntimeError, match=rf"size mismatch for .*{projection}"):
        from_state_dict(file | {projection: torch.zeros(24, 3, 16, 16)}, TINY)
    with pytest.raises(RuntimeError, match=r"Unexpected.*head\.weight"):
        from_state_dict(file | {"head.weight": torch.zeros(9, 24)}, TINY)
    for name in ("layernorm.bias", "encoder.layer.1.attention.attention.key.bias"):
        with pytest.raises(RuntimeError, match=rf"Missing.*{name}"):
            from_state_dict({n: t for n, t in file.items() if n != name}, TINY)


def test_sizes_of_vit_b8():
    with torch.device("meta"):
        assert parameters(DINO(VIT_B8)) == 85_807_872


@pytest.mark.slow
@torch.no_grad()
def test_vit_b8_in_float32_is_the_peers(tmp_path):
    peer = randomise(peer_vit(VIT_B8, 224, 224))
    dino = from_state_dict(hub_file(peer, tmp_path))
    pixels = normal(1, 3, 224, 224, dtype=torch.float32)
    assert relative(dino(pixels), peer(pixels).last_hidden_state) < 1e-4
    assert relative(dino.keys(pixels), peer_keys(peer, pixels)) < 1e-4

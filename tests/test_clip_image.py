"""CLIP's image encoder agrees with `transformers`: embeddings, inner maps, caption similarity."""

import pytest
import torch
import torch.nn.functional as F
from conftest import normal, parameters, randomise, relative
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from models.clip import (
    CLIP,
    TEXT_B32,
    VISION_B32,
    TextConfig,
    VisionConfig,
    from_state_dict,
    normalise,
    prepare,
)

SIZES = dict(hidden_size=32, intermediate_size=56, num_hidden_layers=3, num_attention_heads=4)
VISION = dict(**SIZES, image_size=48, patch_size=16)
TEXT = dict(
    SIZES,
    hidden_size=24,
    vocab_size=99,
    max_position_embeddings=77,
    hidden_act="quick_gelu",
)

VISION_OF_B32 = dict(
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=12,
    num_attention_heads=12,
    image_size=224,
    patch_size=32,
)
TEXT_OF_B32 = dict(
    hidden_size=512,
    intermediate_size=2048,
    num_hidden_layers=12,
    num_attention_heads=8,
    vocab_size=49408,
)


def peer_clip(vision: dict, text: dict, projection_dim: int) -> CLIPModel:
    ids = dict(eos_token_id=text["vocab_size"] - 1, bos_token_id=0, pad_token_id=1)
    config = CLIPConfig(
        vision_config=vision, text_config=text | ids, projection_dim=projection_dim
    )
    peer = CLIPModel(config).eval()
    for part in peer.children():  # all but the temperature
        randomise(part)
    return peer


def tiny() -> tuple[CLIP, CLIPModel]:
    peer = peer_clip(VISION, TEXT, 20).double()
    vision = VisionConfig(**VISION, projection_dim=20)
    text = TextConfig(**TEXT, eos_token_id=98)
    return from_state_dict(peer.state_dict(), vision, text), peer


def captions(n: int, vocab: int) -> Tensor:
    """Ids of n captions of 5, 14, 23, ... tokens."""
    ids = torch.randint(2, vocab - 1, (n, 77), generator=torch.Generator().manual_seed(1))
    for i in range(n):
        ids[i, 5 + 9 * i:] = vocab - 1
    return ids


@torch.no_grad()
def test_embeddings_and_inner_maps_are_the_peers():
    clip, peer = tiny()
    pixels = normal(3, 3, 48, 48)
    theirs = peer.vision_model(pixels, output_hidden_states=True).hidden_states
    assert relative(clip.image(pixels), peer.get_image_features(pixels).pooler_output) < 1e-9
    first, second, embedding = clip.image.levels(pixels, (1, 2))
    for ours, tokens in ((first, theirs[1]), (second, theirs[2])):
        assert ours.shape == (3, 32, 3, 3)
        # Row 1, column 2, after the class token.
        assert relative(ours[:, :, 1, 2], tokens[:, 1 + 1 * 3 + 2]) < 1e-9
        assert relative(ours.flatten(2).mT, tokens[:, 1:]) < 1e-9
    assert torch.equal(embedding, clip.image(pixels))


@torch.no_grad()
def test_each_picture_is_compared_with_its_own_caption_as_the_peer_does():
    clip, peer = tiny()
    x = normal(3, 3, 60, 40)
    ids = captions(3, 99)
    theirs = peer(input_ids=ids, pixel_values=prepare(x, 48))
    assert relative(clip.embed_captions(ids), peer.get_text_features(ids).pooler_output) < 1e-9
    cosines = theirs.logits_per_image.diagonal() / peer.logit_scale.exp()
    assert relative(clip.similarity(x, clip.embed_captions(ids)), cosines) < 1e-9


def test_the_similaritys_gradient_is_the_peers():
    clip, peer = tiny()
    x = normal(2, 3, 60, 40).requires_grad_()
    ids = captions(2, 99)
    loss = (1 - clip.similarity(x, clip.embed_captions(ids))).sum()
    (ours,) = torch.autograd.grad(loss, x)
    mean = torch.tensor([[[0.48145466]], [[0.4578275]], [[0.40821073]]], dtype=torch.float64)
    std = torch.tensor([[[0.26862954]], [[0.26130258]], [[0.27577711]]], dtype=torch.float64)
    pixels = F.interpolate(((x + 1) / 2 - mean) / std, (48, 48), mode="bilinear")
    a = peer.get_image_features(pixels).pooler_output
    b = peer.get_text_features(ids).pooler_output
    cosines = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
    (theirs,) = torch.autograd.grad((1 - cosines).sum(), x)
    assert relative(ours, theirs) < 1e-9
    assert all(not p.requires_grad for p in clip.parameters())


def test_the_loss_prepares_without_antialiasing():
    x = normal(2, 3, 64, 64)
    # Shrunk to a quarter, each sample falls between the middle four pixels of a block of 4 x 4.
    blocks = normalise(x).unflatten(3, (16, 4)).unflatten(2, (16, 4))
    middle = blocks[:, :, :, 1:3, :, 1:3]
    assert relative(prepare(x, 16), middle.mean((3, 5))) < 1e-12
    white = normalise(torch.ones(1, 3, 1, 1, dtype=torch.float64)).flatten()
    expected = [
        (1 - 0.48145466) / 0.26862954,
        (1 - 0.4578275) / 0.26130258,
        (1 - 0.40821073) / 0.27577711,
    ]
    assert relative(white, torch.tensor(expected, dtype=torch.float64)) < 1e-12


def test_other_pixel_sizes_are_refused():
    with pytest.raises(ValueError, match="takes pixels of 48x48, not of 64x32"):
        tiny()[0].image(torch.zeros(1, 3, 32, 64, dtype=torch.float64))


def test_files_that_do_not_fit_are_refused_by_the_tensors_name():
    clip, peer = tiny()
    configs = (clip.image.config, clip.text.config)
    tensors = peer.state_dict() | {  # older files also hold these
        "vision_model.embeddings.position_ids": torch.arange(10)[None],
        "text_model.embeddings.position_ids": torch.arange(77)[None],
    }
    assert "logit_scale" in tensors
    from_state_dict(tensors, *configs)
    lacking = dict(tensors)
    del lacking["vision_model.post_layernorm.bias"]
    with pytest.raises(RuntimeError, match=r"Missing.*vision_model\.post_layernorm\.bias"):
        from_state_dict(lacking, *configs)
    with pytest.raises(RuntimeError, match=r"Unexpected.*text_projection\.bias"):
        from_state_dict(tensors | {"text_projection.bias": torch.zeros(20)}, *configs)
    with pytest.raises(RuntimeError, match=r"size mismatch for .*visual_projection\.weight"):
        from_state_dict(tensors | {"visual_projection.weight": torch.zeros(8, 8)}, *configs)


def test_sizes_of_vit_b32():
    with torch.device("meta"):
        clip = CLIP(VISION_B32, TEXT_B32)
    assert parameters(clip) == 151_277_312  # OpenAI's 151,277,313 without the temperature
    assert parameters(clip.image) == 87_849_216


@pytest.mark.slow
@torch.no_grad()
def test_vit_b32_in_float32_is_the_peers():
    peer = peer_clip(VISION_OF_B32, TEXT_OF_B32, 512)
    clip = from_state_dict(peer.state_dict())
    x = normal(2, 3, 300, 260, dtype=torch.float32)
    ids = captions(2, 49408)
    theirs = peer(input_ids=ids, pixel_values=prepare(x))
    hidden = peer.vision_model(prepare(x), output_hidden_states=True).hidden_states
    fourth, eighth, embedding = clip.image.levels(prepare(x), (4, 8))
    assert fourth.shape == eighth.shape == (2, 768, 7, 7)
    assert relative(fourth.flatten(2).mT, hidden[4][:, 1:]) < 1e-4
    assert relative(eighth.flatten(2).mT, hidden[8][:, 1:]) < 1e-4
    assert relative(embedding, peer.get_image_features(prepare(x)).pooler_output) < 1e-4
    cosines = theirs.logits_per_image.diagonal() / peer.logit_scale.exp()
    assert relative(clip.similarity(x, clip.embed_captions(ids)), cosines) < 1e-4

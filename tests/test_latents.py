"""What YOSO trains on: latents of pictures, of a cache or of a teacher, and text contexts."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from conftest import normal, relative
from torch import nn

import train_yoso
from files import bases
from files.tensors import fingerprint

torch.set_num_threads(1)
NO_AUTOCAST = contextlib.nullcontext()


def base_of_factor(factor: int) -> SimpleNamespace:
    denoiser = SimpleNamespace(config=SimpleNamespace(in_channels=3))
    return SimpleNamespace(vae=SimpleNamespace(factor=factor), denoiser=denoiser)


def test_the_first_item_or_the_resolution_gives_the_shape_of_a_latent():
    shape, base = train_yoso.latent_shape, base_of_factor(4)
    cached = dict(mean=torch.zeros(4, 5, 6), target=torch.zeros(3, 9, 9))
    assert shape(base, cached, 7) == (4, 5, 6)
    assert shape(base, dict(target=torch.zeros(3, 8, 12)), 7) == (3, 2, 3)
    assert shape(base, {}, 16) == (3, 4, 4)
    assert shape(base_of_factor(1), dict(target=torch.zeros(3, 8, 12)), 7) == (3, 8, 12)
    with pytest.raises(ValueError, match="12x10 pixels; expected sides that are multiples of 4"):
        shape(base, dict(target=torch.zeros(3, 10, 12)), 8)


def test_a_caption_is_encoded_once():
    asked = []

    def encode(captions):
        asked.extend(captions)
        lengths = torch.tensor([[len(caption)] for caption in captions])
        return lengths, 2 * lengths

    cached = train_yoso.cached_encoder(SimpleNamespace(encode=encode), NO_AUTOCAST)
    for _ in range(2):
        contexts = cached(["a", "bcd", "a"])
        assert len(contexts) == 2
        assert contexts[0].tolist() == [[1], [3], [1]]
        assert contexts[1].tolist() == [[2], [6], [2]]
    assert asked == ["a", "bcd"]


class Cache(list):
    """A cache of one item, made with the networks of `base` unless `facts` say otherwise."""

    def __init__(self, base, **facts):
        super().__init__([dict(mean=0)])
        own = dict(
            base="another",
            dtype="float32",
            vae=fingerprint(base.vae),
            text_encoder=fingerprint(base.text_encoder),
        )
        self.facts = own | facts


def test_data_that_a_base_cannot_train_on_are_refused():
    base = SimpleNamespace(vae=nn.Linear(2, 2), text_encoder=nn.Linear(2, 3))

    def check(items, **settings):
        cfg = train_yoso.Config(dataset_folder="the place", base="mine", **settings)
        train_yoso.check_data(items, base, cfg)

    pictures, captions = [dict(target=0)], [{}]
    check(pictures)
    check(pictures, unconditional=True)
    check(pictures, validation_prompts="a cat")
    with pytest.raises(ValueError, match="--validation_prompts has no meaning with --uncond"):
        check(pictures, unconditional=True, validation_prompts="a cat")
    check(captions, teacher="sd-turbo")
    check(Cache(base))
    # Nothing can be said of a text encoder that was cast.
    check(Cache(base, text_encoder="cast", dtype="bfloat16"))
    other_vae = Cache(base, vae="x", dtype="bfloat16")
    other_encoder = Cache(base, text_encoder="x")
    bad = [
        ("captions alone", captions, {}),
        ("leave --teacher out", pictures, dict(teacher="sd-turbo")),
        ("encoded already", Cache(base), dict(validation_prompts="a cat")),
        ("encoded already", Cache(base), dict(unconditional=True)),
        ("whose vae is not that of mine", other_vae, {}),
        ("whose text_encoder is not", other_encoder, {}),
    ]
    for words, items, settings in bad:
        with pytest.raises(ValueError, match=f"the place .*{words}"):
            check(items, **settings)


@torch.no_grad()
def test_noise_samples_the_latents_and_a_teacher_gets_captions_that_others_do_not():
    own = bases.load_base("tiny", dtype=torch.float64)
    teacher = bases.load_base("tiny", dtype=torch.float64, seed=1)
    noise, captions = normal(2, 4, 4, 4), ["b", "c"]
    pictures = normal(2, 3, 16, 16, seed=1).tanh()
    micro_batch = dict(caption=captions, target=pictures, name=captions)

    def encode(micro_batch, teacher=None, unconditional=False, disc_base=own):
        encoder = train_yoso.Encoder(own, disc_base, teacher, (4, 4, 4), unconditional, NO_AUTOCAST)
        return encoder(micro_batch, noise)

    # Pictures: noise samples the VAE's latent.
    x0, contexts, disc_context = encode(micro_batch)
    mean, logvar, _ = own.vae.encode(pictures)
    scaling = own.vae.config.scaling_factor
    mean, std = mean * scaling, (logvar / 2).exp() * scaling
    assert relative(x0, mean + std * noise) < 1e-12
    assert relative(disc_context, own.encode(captions)[0]) < 1e-9
    assert disc_context is contexts[0]

    # Another base of the discriminator encodes captions for itself.
    _, contexts, disc_context = encode(micro_batch, disc_base=teacher)
    assert relative(contexts[0], own.encode(captions)[0]) < 1e-9
    assert relative(disc_context, teacher.encode(captions)[0]) < 1e-9

    # A cache: the same, without networks.
    context = own.encode(captions)[0]
    cached = dict(caption=captions, mean=mean, std=std, context_0=context)
    x0_cached, contexts, disc_context = encode(cached)
    assert relative(x0_cached, x0) < 1e-12
    assert torch.equal(disc_context, context) and torch.equal(contexts[0], context)

    # Captions alone: the teacher draws from the noise, and hears captions that are left out.
    drawn, contexts, disc_context = encode(dict(caption=captions), teacher, unconditional=True)
    assert torch.equal(drawn, train_yoso.one_step(teacher, captions, noise))
    assert relative(disc_context, own.encode(["", ""])[0]) < 1e-9

    with pytest.raises(ValueError, match="'b' is not of the size of the first"):
        encode(micro_batch | dict(target=pictures[:, :, :12]))

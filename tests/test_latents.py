"""What a latent model trains on: latents of pictures, of a cache, of a teacher; and contexts."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from conftest import normal, relative
from torch import nn

import train_yoso
from files import bases
from files.tensors import fingerprint

NO_AUTOCAST = contextlib.nullcontext()


def base(factor: int = 4) -> SimpleNamespace:
    return SimpleNamespace(vae=SimpleNamespace(factor=factor), denoiser=SimpleNamespace(
        config=SimpleNamespace(in_channels=3)))


def test_the_shape_of_a_latent_is_told_by_the_first_item_or_by_the_resolution():
    assert train_yoso.latent_shape(base(), dict(mean=torch.zeros(4, 5, 6), target=torch.zeros(3, 9, 9)), 7) == (4, 5, 6)
    assert train_yoso.latent_shape(base(), dict(target=torch.zeros(3, 8, 12)), 7) == (3, 2, 3)
    assert train_yoso.latent_shape(base(), {}, 16) == (3, 4, 4)
    assert train_yoso.latent_shape(base(1), dict(target=torch.zeros(3)), 7) == (3,)  # a point
    with pytest.raises(ValueError, match="12x10 pixels; expected sides that are multiples of 4"):
        train_yoso.latent_shape(base(), dict(target=torch.zeros(3, 10, 12)), 8)


def test_a_caption_is_encoded_once():
    asked = []

    def encode(texts):
        asked.extend(texts)
        return tuple(torch.tensor([[len(text)] for text in texts]) for _ in range(2))

    remember = train_yoso.remembering(SimpleNamespace(encode=encode), NO_AUTOCAST)
    for _ in range(2):
        contexts = remember(["a", "bcd", "a"])
        assert len(contexts) == 2 and contexts[1].tolist() == [[1], [3], [1]]
    assert asked == ["a", "bcd"]


class Cache(list):
    def __init__(self, base, **facts):
        super().__init__([dict(mean=0)])
        self.facts = dict(base="another", dtype="float32", vae=fingerprint(base.vae),
                          text_encoder=fingerprint(base.text_encoder)) | facts


def test_data_that_a_base_cannot_train_on_are_refused():
    networks = SimpleNamespace(vae=nn.Linear(2, 2), text_encoder=nn.Linear(2, 3))

    def check(items, teacher=None, other_captions=False):
        train_yoso.check_data(items, "the place", networks, "mine", teacher, other_captions)

    check([dict(target=0)])
    check([{}], "sd-turbo")
    check(Cache(networks))
    check(Cache(networks, text_encoder="cast", dtype="bfloat16"))  # nothing can be said of an encoder that was cast
    for words, arguments in {"captions alone": [[{}]], "leave --teacher out": [[dict(target=0)], "sd-turbo"],
                             "encoded already": [Cache(networks), None, "a cat"],
                             "whose vae is not that of mine": [Cache(networks, vae="x", dtype="bfloat16")],
                             "whose text_encoder is not": [Cache(networks, text_encoder="x")]}.items():
        with pytest.raises(ValueError, match=f"the place .*{words}"):
            check(*arguments)


def test_latents_are_placed_by_the_noise_and_a_teacher_hears_what_others_do_not():
    own = bases.load_base("tiny", dtype=torch.float64)
    teacher = bases.load_base("tiny", dtype=torch.float64, seed=1)
    noise, captions = normal(3, 4, 4, 4), ["a", "b", "c"]
    pictures, rows = normal(3, 3, 16, 16, seed=1).tanh(), slice(1, 3)
    batch = dict(caption=captions, target=pictures, name=captions)

    def read(batch, teacher=None, unconditional=False):
        return train_yoso.Reader(own, own, teacher, (4, 4, 4), unconditional, NO_AUTOCAST)(batch, rows, noise[rows])

    x0, contexts, seen = read(batch)
    mean, logvar, _ = own.vae.encode(pictures[rows])
    mean, std = (z * own.vae.config.scaling_factor for z in (mean, (logvar / 2).exp()))
    assert relative(x0, mean + std * noise[rows]) < 1e-12
    assert relative(seen, own.encode(["b", "c"])[0]) < 1e-9 and seen is contexts[0]
    cached = dict(caption=captions, mean=torch.cat([mean[:1], mean]), std=torch.cat([std[:1], std]),
                  context_0=own.encode(captions)[0])
    assert relative(read(cached)[0], x0) < 1e-12 and relative(read(cached)[2], seen) < 1e-9
    drawn, _, unheard = read(dict(caption=captions), teacher, unconditional=True)
    assert torch.equal(drawn, train_yoso.one_step(teacher, ["b", "c"], noise[rows]))
    assert relative(unheard, own.encode(["", ""])[0]) < 1e-9
    with pytest.raises(ValueError, match="'b' is not of the size of the first"):
        read(batch | dict(target=pictures[:, :, :12]))

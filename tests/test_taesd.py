"""models/taesd.py agrees with its peer, `diffusers`' AutoencoderTiny, reads the original names of
TAESD's tensors, and takes the place of a VAE."""

import pytest
import torch
import torch.nn.functional as F
from conftest import gradients, normal, parameters, randomise, relative
from diffusers import AutoencoderTiny
from torch import nn

from files.tensors import from_json
from models.taesd import FIXED, TAESD, TAESDConfig, from_pth
from models.vae import tiled

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIGS = {
    "four levels, as in TAESD": dict(
        encoder_block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
    ),
    "three levels, other widths and blocks": dict(
        encoder_block_out_channels=(6, 6, 6),
        decoder_block_out_channels=(10, 10, 10),
        num_encoder_blocks=(2, 0, 1),
        num_decoder_blocks=(1, 2, 0),
    ),
    "one level, 16 latent channels, grey pictures": dict(
        in_channels=1,
        out_channels=1,
        latent_channels=16,
        encoder_block_out_channels=(4,),
        decoder_block_out_channels=(12,),
        num_encoder_blocks=(1,),
        num_decoder_blocks=(2,),
    ),
}
SIZES = [(32, 32), (16, 40)]

# The layers of the original networks, by their numbers in madebyollin/taesd's taesd.py.
PTH_BLOCKS = dict(
    encoder=[1, 3, 4, 5, 7, 8, 9, 11, 12, 13],
    decoder=[3, 4, 5, 8, 9, 10, 13, 14, 15, 18],
)
PTH_CONVS_WITH_BIAS = dict(encoder=[0, 14], decoder=[1, 19])
PTH_CONVS_WITHOUT_BIAS = dict(encoder=[2, 6, 10], decoder=[7, 12, 17])


def ours_like(peer: AutoencoderTiny) -> TAESD:
    """Our network with the peer's own tensors. Names and shapes must be the same."""
    with torch.device("meta"):
        network = TAESD(from_json(TAESDConfig, known_options(peer)))
    network.load_state_dict(peer.state_dict(), strict=True, assign=True)
    return network


def known_options(peer: AutoencoderTiny) -> dict:
    """The options of the peer's `config.json` that our configuration has."""
    return {name: peer.config[name] for name in vars(TAESDConfig())}


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS.keys())
def pair(request) -> tuple[TAESD, AutoencoderTiny]:
    peer = randomise(AutoencoderTiny(**request.param).double())
    return ours_like(peer), peer


def pth_names(part: str) -> set[str]:
    """The names in `taesd_encoder.pth` or `taesd_decoder.pth`."""
    names = {f"{i}.weight" for i in PTH_CONVS_WITHOUT_BIAS[part]}
    for kind in ("weight", "bias"):
        names |= {f"{i}.{kind}" for i in PTH_CONVS_WITH_BIAS[part]}
        names |= {f"{i}.conv.{j}.{kind}" for i in PTH_BLOCKS[part] for j in (0, 2, 4)}
    return names


class Clamp(nn.Module):
    """Layer 0 of the original decoder."""

    def forward(self, x):
        return torch.tanh(x / 3) * 3


@torch.no_grad()
@pytest.mark.parametrize("size", SIZES)
def test_encode_gives_the_peers_latent(pair, size):
    taesd, peer = pair
    x = normal(2, taesd.config.in_channels, *size)
    mean, logvar, skips = taesd.encode(x)
    assert mean.shape == (2, taesd.config.latent_channels, *(side // taesd.factor for side in size))
    assert relative(mean, peer.encode(x).latents) < 1e-9
    assert skips == []
    # A draw from the latent's distribution is the mean.
    assert torch.equal(mean + torch.exp(logvar / 2) * normal(*mean.shape), mean)


@torch.no_grad()
@pytest.mark.parametrize("size", [(4, 4), (3, 5)])
def test_decode_gives_the_peers_picture(pair, size):
    taesd, peer = pair
    z = 3 * normal(2, taesd.config.latent_channels, *size)  # the tanh makes a difference
    picture = taesd.decode(z)
    sides = [side * taesd.factor for side in size]
    assert picture.shape == (2, taesd.config.out_channels, *sides)
    assert relative(picture, peer.decode(z).sample) < 1e-9


@torch.no_grad()
def test_full_size_agrees_and_has_1_2_million_weights_in_the_decoder():
    peer = randomise(AutoencoderTiny().double())
    taesd = ours_like(peer)
    x = normal(1, 3, 16, 24)
    z = taesd.encode(x)[0]
    assert relative(z, peer.encode(x).latents) < 1e-9
    assert relative(taesd.decode(z), peer.decode(z).sample) < 1e-9
    assert taesd.factor == 8
    assert parameters(taesd.decoder) == 1_222_531


def test_defaults_and_fixed_options_are_the_peers():
    peer = AutoencoderTiny()
    assert known_options(peer) == vars(TAESDConfig())
    assert {name: peer.config[name] for name in FIXED} == FIXED


def test_state_dict_has_the_peers_names_in_order(pair):
    taesd, peer = pair
    own = TAESD(taesd.config).state_dict()
    assert list(own) == list(peer.state_dict())
    assert [t.shape for t in own.values()] == [t.shape for t in peer.state_dict().values()]


def test_gradients_are_the_peers(pair):
    taesd, peer = pair
    x = normal(2, taesd.config.in_channels, 16, 24).requires_grad_(True)
    target = normal(2, taesd.config.out_channels, 16, 24, seed=1)

    ours = taesd.decode(taesd.encode(x)[0])
    theirs = peer.decode(peer.encode(x).latents).sample
    loss = F.mse_loss(ours, target)
    peer_loss = F.mse_loss(theirs, target)

    found = torch.autograd.grad(loss, x, retain_graph=True)[0]
    expected = torch.autograd.grad(peer_loss, x, retain_graph=True)[0]
    assert relative(found, expected) < 1e-9

    found = gradients(taesd, loss)
    expected = gradients(peer, peer_loss)
    assert found.keys() == expected.keys()
    assert max(relative(found[name], expected[name]) for name in found) < 1e-9


@torch.no_grad()
def test_inputs_stay_as_they_are(pair):
    taesd, _ = pair
    x = normal(1, taesd.config.in_channels, 16, 16)
    z = normal(1, taesd.config.latent_channels, 2, 2)
    x_before = x.clone()
    z_before = z.clone()
    taesd.encode(x)
    taesd.decode(z)
    assert torch.equal(x, x_before) and torch.equal(z, z_before)


@torch.no_grad()
def test_latents_and_pictures_have_the_type_of_the_weights(pair):
    taesd, _ = pair
    taesd = taesd.to(torch.bfloat16)
    mean, logvar, _ = taesd.encode(normal(1, taesd.config.in_channels, 16, 16))
    assert mean.dtype == logvar.dtype == torch.bfloat16
    assert taesd.decode(mean.double()).dtype == torch.bfloat16


@torch.no_grad()
def test_tiles_agree_with_the_whole_away_from_their_edges():
    taesd = ours_like(randomise(AutoencoderTiny(**CONFIGS["four levels, as in TAESD"]).double()))
    z = normal(1, 4, 6, 40)
    whole = taesd.decode(z)
    in_tiles = tiled(taesd.decode, [z], (6, 40), tile=24)
    assert in_tiles.shape == whole.shape
    # A pixel sees 19 latents to each side, and the first tile ends at 24.
    assert relative(in_tiles[..., :32], whole[..., :32]) < 1e-9


def test_skips_are_refused():
    taesd = TAESD(from_json(TAESDConfig, CONFIGS["four levels, as in TAESD"]))
    _, _, skips = taesd.encode(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="no skips.*use the VAE") as error:
        taesd.decode(torch.zeros(1, 4, 1, 1), skips)
    assert "\n" not in str(error.value)


def test_original_names_are_all_of_ours():
    encoder = {name: torch.zeros(()) for name in pth_names("encoder")}
    decoder = {name: torch.zeros(()) for name in pth_names("decoder")}
    with torch.device("meta"):
        ours = TAESD(TAESDConfig()).state_dict()
    assert from_pth(encoder, decoder).keys() == ours.keys()


@torch.no_grad()
def test_original_networks_and_back():
    """The original pair of networks, numbered by their order, gives the same tensors and
    pictures."""
    peer = randomise(AutoencoderTiny(**CONFIGS["four levels, as in TAESD"]).double())
    encoder = peer.encoder.layers
    decoder = nn.Sequential(Clamp(), *peer.decoder.layers)
    assert encoder.state_dict().keys() == pth_names("encoder")
    assert decoder.state_dict().keys() == pth_names("decoder")

    taesd = TAESD(from_json(TAESDConfig, known_options(peer))).double()
    tensors = from_pth(encoder.state_dict(), decoder.state_dict())
    taesd.load_state_dict(tensors, strict=True)
    assert all(torch.equal(tensors[name], t) for name, t in peer.state_dict().items())

    # The original networks take and return pictures in [0, 1].
    picture = torch.rand(2, 3, 16, 24, dtype=torch.float64)
    z = encoder(picture)
    assert relative(taesd.encode(2 * picture - 1)[0], z) < 1e-9
    assert relative((taesd.decode(z) + 1) / 2, decoder(z)) < 1e-9


@pytest.mark.parametrize(
    "part, name",
    [
        ("encoder", "encoder.layers.0.weight"),
        ("encoder", "weight"),
        ("encoder", "3"),
        ("decoder", "0.weight"),
        ("decoder", "-1.weight"),
    ],
)
def test_other_names_are_refused_in_one_line(part, name):
    tensors = dict(encoder={}, decoder={})
    tensors[part] = {name: torch.zeros(())}
    with pytest.raises(ValueError, match=f"{name!r}; expected.*taesd_{part}.pth") as error:
        from_pth(**tensors)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(num_encoder_blocks=(1, 3)), r"\[4, 4, 2, 4\] levels"),
        (dict(decoder_block_out_channels=(64,) * 3), r"\[4, 3, 4, 4\] levels"),
        (
            dict(decoder_block_out_channels=(64,) * 3, num_decoder_blocks=(3, 3, 1)),
            r"\[4, 3, 4, 3\] levels",
        ),
        (
            dict(
                encoder_block_out_channels=(),
                decoder_block_out_channels=(),
                num_encoder_blocks=(),
                num_decoder_blocks=(),
            ),
            r"\[0, 0, 0, 0\] levels",
        ),
        (
            dict(encoder_block_out_channels=(64, 64, 32, 32)),
            r"encoder_block_out_channels is \[64, 64, 32, 32\]",
        ),
        (
            dict(decoder_block_out_channels=(32, 64, 64, 64)),
            r"decoder_block_out_channels is \[32, 64, 64, 64\]",
        ),
    ],
)
def test_bad_configurations_are_refused_in_one_line(options, words):
    with pytest.raises(ValueError, match=words) as error:
        TAESDConfig(**options)
    assert "\n" not in str(error.value)


@torch.no_grad()
def test_the_peer_cannot_run_widths_that_differ_either():
    peer = AutoencoderTiny(decoder_block_out_channels=(16, 8, 8, 8))
    with pytest.raises(RuntimeError):
        peer.decode(torch.zeros(1, 4, 2, 2))

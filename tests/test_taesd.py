"""models/taesd.py agrees with its peer, `diffusers`' AutoencoderTiny, reads the original names of
TAESD's tensors, and takes the place of a VAE. files/autoencoders.py finds it in any layout."""

import copy
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import gradients, normal, parameters, randomise, relative
from diffusers import AutoencoderKL, AutoencoderTiny
from pipelines import VAE, refusal, tiny_pipeline
from safetensors.torch import save_file
from torch import nn
from trainer_helpers import read_log, train

import train_yoso
from dataset.pictures import open_picture, to_tensor
from files import autoencoders, bases
from files.autoencoders import load_autoencoder
from files.formats import vae_original_name
from files.tensors import from_json
from models import vae
from models.taesd import FIXED, TAESD, TAESDConfig, from_pth
from models.vae import tiled
from tiny import recipe

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


# -------------------- files

# Of the same factor, 2, and of as many latent channels as the VAE of the tests' pipelines.
SMALL = dict(
    encoder_block_out_channels=(6, 6),
    decoder_block_out_channels=(8, 8),
    num_encoder_blocks=(1, 1),
    num_decoder_blocks=(2, 1),
)
OTHER_SIZES = {
    "channels": dict(SMALL, latent_channels=16),
    "factor": CONFIGS["four levels, as in TAESD"],
}


@pytest.fixture(scope="module")
def peer() -> AutoencoderTiny:
    return randomise(AutoencoderTiny(**SMALL))


@pytest.fixture(scope="module")
def base() -> bases.Base:
    """The base whose VAE is replaced."""
    config = from_json(vae.VAEConfig, {**VAE, "scaling_factor": 0.5})
    return bases.Base("the base", vae=vae.VAE(config).double())


def write_pair(peer: AutoencoderTiny, folder: Path) -> tuple[Path, Path]:
    """The two files of the original code, with the peer's tensors, and a config.json."""
    folder.mkdir()
    peer.save_config(folder)
    encoder = folder / "taesd_encoder.pth"
    decoder = folder / "taesd_decoder.pth"
    torch.save(peer.encoder.layers.state_dict(), encoder)
    torch.save(nn.Sequential(Clamp(), *peer.decoder.layers).state_dict(), decoder)
    return encoder, decoder


def assert_has_weights(network: TAESD, peer: AutoencoderTiny) -> None:
    """Those of the peer, frozen and in float64."""
    assert isinstance(network, TAESD)
    for name, tensor in peer.state_dict().items():
        own = network.get_parameter(name)
        assert torch.equal(own, tensor.double()) and not own.requires_grad


def test_every_layout_is_read(peer, base, tmp_path, monkeypatch):
    flat = tmp_path / "flat"
    peer.save_pretrained(flat)
    pipe = tiny_pipeline()
    pipe.vae = peer
    pipe.save_pretrained(tmp_path / "pipeline")
    encoder, decoder = write_pair(peer, tmp_path / "pair")
    names = [flat, flat / "diffusion_pytorch_model.safetensors", encoder, decoder]
    names += [tmp_path / "pipeline", tmp_path / "pipeline" / "vae"]
    for name in names:
        assert_has_weights(load_autoencoder(str(name), base, torch.float64), peer)

    monkeypatch.setitem(autoencoders.AUTOENCODERS, "taesd", str(flat))
    assert_has_weights(load_autoencoder("taesd", base, torch.float64), peer)


def test_the_original_pair_is_taesd_where_no_config_says_more(base, tmp_path):
    base = bases.Base("of factor 8", vae=vae.VAE(vae.VAEConfig(block_out_channels=(32,) * 4)))
    peer = randomise(AutoencoderTiny())
    _, decoder = write_pair(peer, tmp_path / "pair")
    (tmp_path / "pair" / "config.json").unlink()
    for name in (decoder, decoder.parent):
        assert_has_weights(load_autoencoder(str(name), base, torch.float64), peer)


def test_another_vae_of_the_base_is_read_with_the_names_of_both_codes(base, tmp_path):
    other = randomise(AutoencoderKL(**VAE, scaling_factor=0.5), seed=5)
    config = base.vae.config
    tensors = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    original = {vae_original_name(name, config): tensor for name, tensor in tensors.items()}
    other.save_pretrained(tmp_path / "folder")
    save_file(tensors, tmp_path / "ours.safetensors")
    save_file(original, tmp_path / "original.safetensors")
    for name in ("folder", "ours.safetensors", "original.safetensors"):
        network = load_autoencoder(str(tmp_path / name), base)
        assert isinstance(network, vae.VAE)
        assert all(torch.equal(network.get_parameter(key), tensors[key]) for key in tensors)


def test_a_base_may_have_taesd_for_its_vae_and_is_written_as_the_peer_reads_it(peer, tmp_path):
    pipe = tiny_pipeline()
    pipe.vae = peer
    pipe.save_pretrained(tmp_path / "pipeline")
    loaded = bases.load_base(str(tmp_path / "pipeline"), dtype=torch.float64)
    assert_has_weights(loaded.vae, peer)

    bases.save_folder(tmp_path / "saved", loaded)
    again = AutoencoderTiny.from_pretrained(tmp_path / "saved", subfolder="vae")
    assert from_json(TAESDConfig, known_options(again)) == loaded.vae.config
    assert all(torch.equal(again.state_dict()[name], t) for name, t in peer.state_dict().items())
    index = json.loads((tmp_path / "saved" / "model_index.json").read_text())
    assert index["vae"] == ["diffusers", "AutoencoderTiny"]


@pytest.mark.parametrize("options", OTHER_SIZES.values(), ids=OTHER_SIZES.keys())
def test_an_autoencoder_of_other_latents_is_refused(base, tmp_path, options):
    AutoencoderTiny(**options).save_pretrained(tmp_path)
    message = refusal(lambda: load_autoencoder(str(tmp_path), base))
    assert "4 channels and 1/2, as in the base" in message


def test_a_vae_of_another_latent_space_is_refused(base, tmp_path):
    other = bases.Base("other", vae=copy.deepcopy(base.vae))
    bases.save_folder(tmp_path, other)
    load_autoencoder(str(tmp_path / "vae"), base)
    other.vae.config.scaling_factor = 0.13025  # SDXL's, whose latents have the same shape
    bases.save_folder(tmp_path, other)
    message = refusal(lambda: load_autoencoder(str(tmp_path / "vae"), base))
    assert "the scaling_factor of its latents is 0.13025; expected 0.5, as in the base" in message


def test_other_files_are_refused(peer, base, tmp_path):
    pipe = tiny_pipeline()
    pipe.save_pretrained(tmp_path / "base")
    encoder, decoder = write_pair(peer, tmp_path / "pair")
    encoder.unlink()
    (tmp_path / "notes.txt").write_text("words")
    save_file({"weight": torch.zeros(2)}, tmp_path / "lora.safetensors")
    (tmp_path / "empty").mkdir()
    for name, words in [
        (tmp_path / "base" / "unet", "is of 'UNet2DConditionModel'"),
        (decoder, "one half of TAESD; expected taesd_encoder.pth beside it"),
        (tmp_path / "notes.txt", "notes.txt"),
        (tmp_path / "lora.safetensors", "weight"),
        (tmp_path / "empty", "has no config.json"),
        (tmp_path / "none.safetensors", "there is no"),
    ]:
        assert words in refusal(lambda name=name: load_autoencoder(str(name), base))


def test_yosos_sample_grids_are_decoded_by_another_autoencoder_and_nothing_else(
    tmp_path, monkeypatch
):
    options = dict(SMALL)
    for name, values in SMALL.items():
        options[name] = (*values, values[-1])  # factor 4, as the base tiny
    randomise(AutoencoderTiny(**options)).save_pretrained(tmp_path / "taesd")
    flags = dict(
        dataset_folder="drawn:scenes",
        device="cpu",
        max_train_steps=1,
        train_batch_size=1,
        lambda_gan=0,
        lambda_con=0,
        prior_pictures=0,
        validation_steps=1,
        validation_num_images=2,
    )
    words = [word for name, value in flags.items() for word in (f"--{name}", value)]
    usual = tmp_path / "usual"
    other = tmp_path / "other"
    train(monkeypatch, train_yoso, *words, "--output_dir", usual)
    preview = ("--preview_vae", tmp_path / "taesd")
    train(monkeypatch, train_yoso, *words, "--output_dir", other, *preview)

    weights = [(folder / "model.safetensors").read_bytes() for folder in (usual, other)]
    assert weights[0] == weights[1]
    logs = [read_log(folder)[-1]["val_variety"] for folder in (usual, other)]
    assert logs[0] == logs[1]
    grids = [
        to_tensor(open_picture(folder / "samples" / "000001.png")) for folder in (usual, other)
    ]
    difference = (grids[0] - grids[1]).abs().amax(0)
    assert (difference == 0).float().mean() > 0.4  # the pictures themselves
    assert difference.max() > 0.1


def test_the_recipe_writes_an_autoencoder_for_tiny_turbo_in_little_space(tmp_path, monkeypatch):
    levels = torch.randint(0, 256, (8, 64, 64, 3), dtype=torch.uint8)
    monkeypatch.setattr(recipe, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(recipe, "HERE", tmp_path)
    monkeypatch.setattr(recipe, "drawings", lambda: levels)
    monkeypatch.setattr(recipe, "held_out_drawings", lambda indices: levels[:2])
    recipe.train_taesd(torch.device("cpu"), steps=2, batch=2)

    folder = tmp_path / "tiny-turbo-taesd"
    assert (folder / "diffusion_pytorch_model.safetensors").stat().st_size < 300_000
    turbo = bases.load_base("tiny-turbo", ("vae",))
    network = load_autoencoder(str(folder), turbo)
    assert isinstance(network, TAESD) and network.config == recipe.TAESD
    peer = AutoencoderTiny.from_pretrained(folder).double()
    z = normal(1, 4, 8, 8)
    assert relative(network.double().decode(z), peer.decode(z).sample) < 1e-9
    last = read_log(tmp_path / "runs" / "taesd")[-1]
    assert {"psnr", "psnr_vae", "psnr_encoder", "psnr_decoder"} < last.keys()

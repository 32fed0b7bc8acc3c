"""CycleGAN-Turbo agrees with the official generator, rebuilt here from `diffusers` and `peft`.

It does in both directions. Its two VAEs share all frozen weights in memory. Official `.pkl` files
and our own checkpoints give the pictures of the networks that they were written from.
"""

import copy
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors
import torch
from conftest import gradients, normal, parameters, relative
from diffusers import DDPMScheduler, UNet2DConditionModel
from peft import LoraConfig, get_peft_model_state_dict
from pipelines import SCHEDULE, TEXTS, UNET, tiny_pipeline
from test_pix2pix_turbo import (
    SIZES,
    SKIPS,
    add_official_skip_convs,
    draw,
    encode_with_skips,
)
from torch import Tensor

from files import bases, checkpoints
from files.tensors import assign, cast_frozen
from models import pix2pix_turbo
from models.cyclegan_turbo import CycleGANTurbo, CycleGANTurboConfig, from_official
from models.diffusion import Schedule
from models.lora import ADAPTERS
from models.unet import UNet, UNetConfig
from models.vae import VAE, VAEConfig

pytestmark = pytest.mark.usefixtures("one_thread")

DIRECTIONS = ["a2b", "b2a"]
RANK = 6  # of the U-Net; the VAE's is the official 4
SD_TURBO = dict(
    block_out_channels=(320, 640, 1280, 1280),
    attention_head_dim=(5, 10, 20, 20),
    cross_attention_dim=1024,
    use_linear_projection=True,
    sample_size=64,
)
VAE_LORA = [
    *SKIPS,
    "conv_in",
    "conv_out",
    "conv_shortcut",
    "conv",
    "conv1",
    "conv2",
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
]
UNET_LORA = [
    "to_k",
    "to_q",
    "to_v",
    "to_out.0",
    "conv",
    "conv1",
    "conv2",
    "conv_in",
    "conv_shortcut",
    "conv_out",
    "proj_out",
    "proj_in",
    "ff.net.2",
    "ff.net.0.proj",
]


def official_groups(unet: UNet2DConditionModel) -> dict[str, list[str]]:
    """The layers of the three adapters, by img2img-turbo's rule for the peer's parameter names."""
    groups = dict(encoder=[], decoder=[], others=[])
    for name, _ in unet.named_parameters():
        if "bias" in name or "norm" in name or not any(part in name for part in UNET_LORA):
            continue
        if "down_blocks" in name or "conv_in" in name:
            group = "encoder"
        elif "up_blocks" in name:
            group = "decoder"
        else:
            group = "others"
        groups[group].append(name.replace(".weight", ""))
    return groups


class Official:
    """img2img-turbo's generator with the peers' networks, in float64, LoRA and skips random.

    The scheduler's table is recomputed in float64. Its step still adds noise with a standard
    deviation of 1e-10, by which the pictures differ. The latent is the encoder's mean, or a sample
    with a seed.
    """

    def __init__(self, folder: Path):
        self.base = folder / "base"
        self.pkl = folder / "model.pkl"
        self.scheduler = DDPMScheduler(
            **SCHEDULE, timestep_spacing="trailing", clip_sample=False
        )
        self.scheduler.set_timesteps(1)
        self.timestep = 999
        unet = dict(UNET, use_linear_projection=True)
        pipe = tiny_pipeline(unet, SIZES, self.scheduler).to(torch.float64)
        pipe.save_pretrained(self.base)
        first = SCHEDULE["beta_start"] ** 0.5
        last = SCHEDULE["beta_end"] ** 0.5
        roots = torch.linspace(first, last, 1000, dtype=torch.float64)
        self.scheduler.alphas_cumprod = (1 - roots**2).cumprod(0)

        self.unet = pipe.unet.requires_grad_(False)
        self.groups = official_groups(self.unet)
        for group, names in self.groups.items():
            lora = LoraConfig(
                r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=names
            )
            self.unet.add_adapter(lora, adapter_name=f"default_{group}")
        self.unet.set_adapters([f"default_{group}" for group in self.groups])

        vae = pipe.vae.requires_grad_(False)
        add_official_skip_convs(vae.decoder)
        lora = LoraConfig(r=4, init_lora_weights="gaussian", target_modules=VAE_LORA)
        vae.add_adapter(lora, adapter_name="vae_skip")
        self.vaes = dict(a2b=vae, b2a=copy.deepcopy(vae))

        for seed, network in enumerate([self.unet, *self.vaes.values()]):
            network.double()
            for i, (name, p) in enumerate(network.named_parameters()):
                trained = "lora" in name or "skip_conv" in name
                if trained:
                    p.data = draw(p, 1000 * seed + i)
                p.requires_grad_(trained)
        self.unet.conv_in.base_layer.requires_grad_(True)

    def __call__(
        self,
        x: Tensor,
        context: Tensor,
        direction: str,
        gamma: float | None = 1.0,
        seed: int | None = None,
    ) -> Tensor:
        """`gamma` None is the official code's `ignore_skip`."""
        vae = self.vaes[direction]
        latents, skips = encode_with_skips(vae, x)
        z = latents.mean
        if seed is not None:
            z = latents.sample(torch.Generator().manual_seed(seed))
        z = z * vae.config.scaling_factor

        t = torch.tensor([self.timestep] * len(x))
        predictions = self.unet(z, t, encoder_hidden_states=context).sample
        clean = []
        for prediction, latent in zip(predictions, z):
            t = torch.tensor(self.timestep)
            step = self.scheduler.step(prediction, t, latent, return_dict=True)
            clean.append(step.prev_sample)
        z = torch.stack(clean)

        decoder = vae.decoder
        h = decoder.conv_in(vae.post_quant_conv(z / vae.config.scaling_factor))
        h = decoder.mid_block(h)
        for name, skip, block in zip(SKIPS, reversed(skips), decoder.up_blocks):
            if gamma is not None:
                h = h + getattr(decoder, name)(skip * gamma)
            h = block(h)
        return decoder.conv_out(decoder.conv_act(decoder.conv_norm_out(h))).clamp(-1, 1)

    def saved(self, value: Callable[[Tensor], Tensor] = torch.Tensor.detach) -> dict:
        """The contents of the official file, with the parameters or with a value of each."""
        unet = {name: value(p) for name, p in self.unet.named_parameters()}
        vaes = {}
        for part, direction in [("vae", "a2b"), ("vae_b2a", "b2a")]:
            for name, p in self.vaes[direction].named_parameters():
                vaes[f"{part}.{name}"] = value(p)

        def adapter(group: str) -> dict[str, Tensor]:
            return get_peft_model_state_dict(self.unet, unet, f"default_{group}")

        return dict(
            l_target_modules_encoder=self.groups["encoder"],
            l_target_modules_decoder=self.groups["decoder"],
            l_modules_others=self.groups["others"],
            rank_unet=RANK,
            sd_encoder=adapter("encoder"),
            sd_decoder=adapter("decoder"),
            sd_other=adapter("others"),
            rank_vae=4,
            vae_lora_target_modules=VAE_LORA,
            sd_vae_enc=vaes,
            sd_vae_dec=dict(vaes),
        )


@pytest.fixture(scope="module")
def official(tmp_path_factory) -> Official:
    official = Official(tmp_path_factory.mktemp("official"))
    torch.save(official.saved(), official.pkl)
    return official


def load(official: Official, **options) -> CycleGANTurbo:
    loaded = checkpoints.load_generator(
        str(official.pkl), base=str(official.base), dtype=torch.float64, **options
    )
    return loaded.generator


@pytest.fixture(scope="module")
def generator(official) -> CycleGANTurbo:
    """Our generator, loaded from the official file with unmerged adapters."""
    return load(official, merged=False)


def fresh(
    official: Official, seed: int | None = None, **options
) -> tuple[CycleGANTurbo, bases.Base]:
    """An untrained generator on the official model's base; with a seed, trained weights random."""
    base = bases.load_base(str(official.base))
    config = CycleGANTurboConfig(**(dict(lora_rank_unet=RANK) | options))
    lora_rng = torch.Generator().manual_seed(0)
    generator = CycleGANTurbo(base.vae, base.unet, base.schedule, config, lora_rng)
    if seed is not None:
        trained = [p for p in generator.parameters() if p.requires_grad]
        for i, p in enumerate(trained):
            p.data = draw(p, seed + i)
    return generator, base


def as_official(official: Official, **options) -> CycleGANTurbo:
    """A generator with the official file's weights, ready for training."""
    generator, _ = fresh(official, **options)
    # The file does not hold conv_in.
    tensors = {name: p.detach() for name, p in generator.named_parameters() if p.requires_grad}
    _, found = from_official(torch.load(official.pkl), official.pkl)
    for name, tensor in found.items():
        if generator.config.skips or "skip_conv" not in name:
            tensors[name] = tensor
    assign(generator, tensors, official.pkl)
    return generator


def inputs(height: int = 32, width: int = 32) -> tuple[Tensor, Tensor]:
    """Picture in [-1, 1], context."""
    x = normal(2, 3, height, width).tanh()
    context = normal(2, 7, UNET["cross_attention_dim"], seed=1)
    return x, context


def there_and_back(
    generator: CycleGANTurbo | Official, x: Tensor, context: Tensor
) -> Tensor:
    return generator(generator(x, context, "a2b"), context.flip(0), "b2a")


# -------------------- the forward pass

@torch.no_grad()
@pytest.mark.parametrize("size", [(32, 32), (16, 48), (8, 8), (56, 72)], ids=str)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_official_files_give_the_official_pictures(official, generator, direction, size):
    """Latents of 56 x 72 are 7 x 9, which the U-Net cannot halve."""
    args = *inputs(*size), direction
    expected = official(*args)
    assert (expected.abs() < 1).double().mean() > 0.5  # the clamp does not hide the rest
    assert relative(generator(*args), expected) < 1e-9


@torch.no_grad()
def test_merged_adapters_give_the_official_pictures(official):
    merged = load(official, merged=True)
    assert not any(isinstance(layer, ADAPTERS) for layer in merged.modules())
    for direction in DIRECTIONS:
        assert relative(merged(*inputs(), direction), official(*inputs(), direction)) < 1e-9


@torch.no_grad()
def test_direction_and_caption_make_a_difference_and_other_pictures_do_not(generator):
    x, context = inputs()
    y = generator(x, context, "a2b")
    assert relative(generator(x, context, "b2a"), y) > 0.1
    assert relative(generator(x, context.flip(0), "a2b"), y) > 1e-3
    assert relative(generator(x[1:], context[1:], "a2b"), y[1:]) < 1e-12


@torch.no_grad()
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.7])
def test_skip_scale_is_the_official_gamma(official, generator, direction, gamma):
    args = *inputs(), direction
    assert relative(generator(*args, skip_scale=gamma), official(*args, gamma)) < 1e-9


@torch.no_grad()
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_without_skips_there_are_no_skip_convolutions(official, direction):
    generator = as_official(official, skips=False)
    assert not any("skip_conv" in name for name, _ in generator.named_modules())
    args = *inputs(), direction
    assert relative(generator(*args), official(*args, gamma=None)) < 1e-9


@torch.no_grad()
def test_the_timestep_is_the_one_of_the_settings(official):
    earlier = copy.copy(official)
    earlier.timestep = 199
    earlier.scheduler = copy.deepcopy(official.scheduler)
    earlier.scheduler.timesteps = torch.tensor([199])
    generator = as_official(official, timestep=199)
    args = *inputs(), "a2b"
    assert relative(generator(*args), earlier(*args)) < 1e-9
    assert relative(generator(*args), official(*args)) > 1e-3
    with pytest.raises(ValueError, match="^the timestep is 1000; expected 0 to 999"):
        fresh(official, timestep=1000)


@torch.no_grad()
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_latent_noise_samples_the_latent_as_the_official_code_does(
    official, generator, direction
):
    args = *inputs(), direction
    y = generator(*args, latent_noise=normal(2, 4, 4, 4, seed=7))
    assert relative(y, official(*args, seed=7)) < 1e-9
    assert relative(y, generator(*args)) > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_an_untrained_generator_is_almost_the_base(official, direction):
    base = bases.load_base(str(official.base), ("vae", "unet", "schedule"))
    x, context = inputs()
    z = base.vae.encode(x)[0] * base.vae.config.scaling_factor
    alpha, sigma = base.schedule.alpha[999], base.schedule.sigma[999]
    z = (z - sigma * base.unet(z, 999, context)) / alpha
    expected = base.vae.decode(z / base.vae.config.scaling_factor).clamp(-1, 1)
    generator, _ = fresh(official)
    assert relative(generator(x, context, direction, skip_scale=0.0), expected) < 1e-9
    assert 0 < relative(generator(x, context, direction), expected) < 1e-3


@pytest.mark.parametrize("direction", ["b2b", "A2B", "", None])
def test_an_unknown_direction_is_named(generator, direction):
    with pytest.raises(ValueError) as error:
        generator(*inputs(), direction)
    assert str(error.value) == f"the direction is {direction!r}; expected a2b or b2a"


# -------------------- layers with LoRA

def test_full_size_groups_are_those_of_the_official_rule():
    with torch.device("meta"):
        unet = UNet(UNetConfig(**SD_TURBO))
        peer = UNet2DConditionModel(**SD_TURBO)
        vae = VAE(VAEConfig())
    assert parameters(unet) == parameters(peer) == 865_910_724
    groups = official_groups(peer)
    sizes = {group: len(names) for group, names in groups.items()}
    assert sizes == dict(encoder=94, decoder=147, others=17)

    generator = CycleGANTurbo(vae, unet, Schedule.from_config(SCHEDULE), CycleGANTurboConfig())
    names = []
    for name, layer in generator.named_modules():
        if not isinstance(layer, ADAPTERS):
            continue
        rank, scale = 4, 2.0
        if name.startswith("unet."):
            names.append(name.removeprefix("unet."))
            rank, scale = 128, 1.0
        assert layer.lora_A.weight.shape[0] == rank, name
        assert layer.scale == layer.full_scale == scale, name
    assert set(names) == {*groups["encoder"], *groups["decoder"], *groups["others"]}
    for part in (generator.vae_a2b, generator.vae_b2a):
        convs = [part.decoder.get_submodule(name) for name in SKIPS]
        widths = [(conv.in_channels, conv.out_channels) for conv in convs]
        assert widths == [(512, 512), (256, 512), (128, 512), (128, 256)]


@pytest.mark.parametrize(
    "options, unet, vae",
    [
        ({}, 1.0, 2.0),
        (dict(lora_rank_unet=16, lora_rank_vae=8), 1.0, 1.0),
        (dict(lora_alpha_unet=3.0, lora_alpha_vae=2.0), 0.5, 0.5),
    ],
    ids=str,
)
def test_scale_is_alpha_over_rank_and_alpha_is_the_rank_or_8(official, options, unet, vae):
    generator, _ = fresh(official, **options)
    for part, scale in [
        (generator.unet, unet),
        (generator.vae_a2b, vae),
        (generator.vae_b2a, vae),
    ]:
        adapters = [layer for layer in part.modules() if isinstance(layer, ADAPTERS)]
        assert {layer.scale for layer in adapters} == {scale}


# -------------------- one frozen VAE, two sets of trained weights

def assert_one_frozen_vae(generator: CycleGANTurbo) -> None:
    """Frozen parameters are the same objects in both VAEs; trained ones have their own memory."""
    a2b = dict(generator.vae_a2b.named_parameters())
    b2a = dict(generator.vae_b2a.named_parameters())
    assert a2b.keys() == b2a.keys()
    for name, p in a2b.items():
        if "lora" in name or "skip_conv" in name:
            assert p is not b2a[name], name
            assert p.data_ptr() != b2a[name].data_ptr(), name
        else:
            assert p is b2a[name], name


def test_the_two_vaes_share_every_frozen_parameter_and_no_trained_one(official, generator):
    untrained, _ = fresh(official)
    plain = bases.load_base(str(official.base), ("vae",)).vae
    assert_one_frozen_vae(untrained)
    for name, p in untrained.named_parameters():
        trained = "lora" in name or "skip_conv" in name or name.startswith("unet.conv_in.")
        assert p.requires_grad == trained, name
    own = sum(p.numel() for p in untrained.vae_a2b.parameters() if p.requires_grad)
    assert parameters(untrained) == parameters(plain) + 2 * own + parameters(untrained.unet)

    # The two VAEs' LoRA begins with different random weights.
    a2b = dict(untrained.vae_a2b.named_parameters())
    b2a = dict(untrained.vae_b2a.named_parameters())
    lora_A = [name for name in a2b if "lora_A" in name]
    assert lora_A
    assert not any(torch.equal(a2b[name], b2a[name]) for name in lora_A)

    # It stays one VAE when it is loaded and in another dtype.
    assert_one_frozen_vae(generator)
    assert_one_frozen_vae(untrained.to(torch.bfloat16))
    cast_frozen(untrained.float(), torch.bfloat16)
    assert_one_frozen_vae(untrained)


@pytest.mark.parametrize("direction, other", [DIRECTIONS, DIRECTIONS[::-1]])
def test_one_directions_backward_leaves_the_others_adapters_alone(official, direction, other):
    generator = as_official(official)
    generator(*inputs(), direction).square().sum().backward()
    for name, p in generator.named_parameters():
        if not p.requires_grad or name.startswith(f"vae_{other}."):
            assert p.grad is None, name
        else:
            assert p.grad.any(), name


def test_training_changes_its_own_tensors_and_no_others(official):
    generator, _ = fresh(official)
    before = {name: t.clone() for name, t in generator.state_dict().items()}
    trained = {name for name, p in generator.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in generator.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(2):  # while B is 0, A has no gradient
        optimizer.zero_grad()
        there_and_back(generator, *inputs(16, 24)).square().sum().backward()
        optimizer.step()
    state = generator.state_dict()
    changed = {name for name, t in state.items() if not torch.equal(t, before[name])}
    assert changed == trained
    in_full = {"unet.conv_in.weight", "unet.conv_in.bias"}
    for direction in DIRECTIONS:
        in_full |= {f"vae_{direction}.decoder.{name}.weight" for name in SKIPS}
    assert {name for name in trained if "lora" not in name} == in_full
    assert_one_frozen_vae(generator)


def test_with_all_every_weight_of_both_vaes_is_trained(official):
    generator, _ = fresh(official, train="all")
    found = gradients(generator, there_and_back(generator, *inputs(16, 24)).square().sum())
    names = {name for name, _ in generator.named_parameters()}
    assert not any("lora" in name for name in names)
    assert found.keys() == names == generator.state_dict().keys()
    assert all(g.any() for g in found.values())


# -------------------- gradients

def test_gradients_of_a_cycle_are_the_official_ones_of_the_official_parameters(official):
    x, context = inputs(16, 24)
    weight = normal(*x.shape, seed=5)
    for network in (official.unet, *official.vaes.values()):
        network.zero_grad()
    (there_and_back(official, x, context) * weight).sum().backward()
    # from_official renames gradients as it does parameters.
    _, theirs = from_official(official.saved(lambda p: p.grad), "")
    for name, p in official.unet.conv_in.base_layer.named_parameters():
        theirs[f"unet.conv_in.{name}"] = p.grad

    generator = as_official(official)
    ours = gradients(generator, (there_and_back(generator, x, context) * weight).sum())
    assert ours.keys() == theirs.keys()
    largest = max(t.abs().max() for t in theirs.values())
    for name, gradient in ours.items():
        assert gradient.any(), name
        scale = max(theirs[name].abs().max(), 1e-3 * largest)
        assert (gradient - theirs[name]).abs().max() <= 1e-9 * scale, name


@pytest.mark.parametrize("train", ["lora", "all"])
def test_checkpointed_blocks_give_the_same_gradients(official, train):
    generator, _ = fresh(official, seed=3, train=train)
    calls = []
    blocks = [
        *generator.unet.down_blocks,
        *generator.vae_a2b.encoder.down_blocks,
        *generator.vae_b2a.decoder.up_blocks,
    ]
    for block in blocks:
        block.register_forward_pre_hook(lambda *_: calls.append(1))
    found = []
    for checkpointing in (False, True):
        for network in generator.modules():
            if hasattr(network, "checkpointing"):
                network.checkpointing = checkpointing
        calls.clear()
        loss = there_and_back(generator, *inputs(16, 24)).square().sum()
        found.append(gradients(generator, loss))
        once = len(blocks) + len(generator.unet.down_blocks)  # the U-Net runs twice in a cycle
        assert len(calls) == (2 * once if checkpointing else once)
    for name, gradient in found[0].items():
        assert (gradient - found[1][name]).abs().max() <= 1e-12 * gradient.abs().max(), name


# -------------------- checkpoints

@torch.no_grad()
@pytest.mark.parametrize(
    "train, options",
    [
        ("lora", {}),
        ("all", dict(timestep=199)),
        ("lora", dict(skips=False, conv_in=False)),
        ("lora", dict(timestep=199)),
    ],
    ids=str,
)
def test_what_is_saved_is_what_is_loaded(official, tmp_path, train, options):
    """A LoRA checkpoint opens its base. One of all weights needs no other file.

    The trained `conv_in` is in it too.
    """
    generator, base = fresh(official, seed=7, train=train, **options)
    if generator.config.conv_in:
        generator.unet.conv_in.weight *= 3
        generator.unet.conv_in.bias += 1
    if train == "all":  # the text encoder is trained too
        base.text_encoder.text_model.final_layer_norm.bias += 1
    folder = tmp_path / "base"
    path = tmp_path / "run" / "model.safetensors"
    shutil.copytree(official.base, folder)
    path.parent.mkdir()
    prompts = ["a picture of a", "a picture of b"]
    checkpoints.save_generator(
        path,
        generator,
        "cyclegan_turbo",
        str(folder),
        prompts,
        base.text_encoder,
        base.tokenizer,
    )
    if train == "all":
        shutil.rmtree(folder)
    with safetensors.safe_open(path, "pt") as file:
        names = {*file.keys()}
    trained = {name for name, p in generator.named_parameters() if p.requires_grad}
    assert trained == {name for name in names if not name.startswith("text_encoder.")}
    assert (trained == names) == (train == "lora")
    assert ("unet.conv_in.weight" in names) == generator.config.conv_in
    for merged in (False, True):
        loaded = checkpoints.load_generator(str(path.parent), dtype=torch.float64, merged=merged)
        for direction in DIRECTIONS:
            args = *inputs(), direction
            assert relative(loaded.generator(*args), generator(*args)) < 1e-9
        assert loaded.kind == "cyclegan_turbo"
        assert loaded.base == str(folder)
        assert loaded.prompts == prompts
        assert loaded.generator.config == generator.config
        assert not any(p.requires_grad or p.is_meta for p in loaded.generator.parameters())
    ids = base.tokenizer(TEXTS)
    assert torch.equal(loaded.tokenizer(TEXTS), ids)
    assert torch.equal(loaded.text_encoder(ids), base.text_encoder(ids))


@torch.no_grad()
def test_strength_interpolates_from_the_base_to_the_trained_model(official):
    partly = copy.deepcopy(official)
    for network in (partly.unet, *partly.vaes.values()):
        for name, p in network.named_parameters():
            if "lora_B" in name:
                p *= 0.4
            elif "skip_conv" in name and "lora" not in name:
                p.lerp_(torch.full_like(p, 1e-5), 0.6)
    for merged in (False, True):
        generator = load(official, strength=0.4, merged=merged)
        for direction in DIRECTIONS:
            args = *inputs(), direction
            assert relative(generator(*args), partly(*args)) < 1e-9


def test_files_of_another_kind_are_refused_in_one_line(official):
    paired = dict(
        unet_lora_target_modules=["conv"],
        vae_lora_target_modules=["conv"],
        rank_unet=8,
        rank_vae=4,
        state_dict_unet={},
        state_dict_vae={},
    )
    with pytest.raises(ValueError) as error:
        from_official(paired, "edges.pkl")
    message = str(error.value)
    found = "unet_lora_target_modules, vae_lora_target_modules, rank_unet,"
    assert message.startswith(f"edges.pkl holds {found}")
    expected = "rank_unet, rank_vae, sd_decoder, sd_enc"
    assert f"expected a CycleGAN-Turbo file with {expected}" in message
    assert "\n" not in message

    unpaired = official.saved()
    found = "^day.pkl holds l_target_modules_encoder.*"
    with pytest.raises(ValueError, match=f"{found}; expected a pix2pix-Turbo file"):
        pix2pix_turbo.from_official(unpaired, "day.pkl")
    with pytest.raises(ValueError, match="^list.pkl holds list; expected a CycleGAN-Turbo file"):
        from_official([unpaired], "list.pkl")


def test_damaged_official_files_are_refused_in_one_line(official, tmp_path):
    lacking_a_part = official.saved()
    del lacking_a_part["sd_other"]
    lacking_a_tensor = official.saved()
    del lacking_a_tensor["sd_other"]["conv_out.lora_A.weight"]
    with_another_tensor = official.saved()
    with_another_tensor["sd_encoder"]["other"] = torch.zeros(1)
    of_another_rank = official.saved() | dict(rank_unet=5)

    path = tmp_path / "damaged.pkl"
    for damaged, text in [
        (lacking_a_part, "holds .*; expected a .*with"),
        (lacking_a_tensor, r"lacks unet.conv_out.lora_A.weight \[6, 16, 3, 3\]"),
        (with_another_tensor, "holds unet.other"),
        (of_another_rank, r"lora_A.weight is float64 \[6,.*expected .* \[5,"),
    ]:
        torch.save(damaged, path)
        with pytest.raises(ValueError, match=text) as error:
            checkpoints.load_generator(str(path), base=str(official.base))
        assert str(path) in str(error.value) and "\n" not in str(error.value)

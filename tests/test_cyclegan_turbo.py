"""models/cyclegan_turbo.py agrees in both directions with the official assembly, made here of `diffusers` and `peft`;
its two VAEs are one in memory but for what is trained; official `.pkl` files and our own checkpoints give the pictures
of the networks that they were written from."""

import copy
import shutil
from pathlib import Path

import pytest
import safetensors
import torch
from conftest import gradients, normal, parameters, relative
from diffusers import DDPMScheduler, UNet2DConditionModel
from peft import LoraConfig, get_peft_model_state_dict
from test_pix2pix_turbo import SIZES, SKIPS, draw
from test_weights import SCHEDULE, TEXTS, UNET, tiny_pipeline
from torch import Tensor, nn

from files import bases, checkpoints
from files.tensors import assign, cast_frozen
from models import pix2pix_turbo
from models.cyclegan_turbo import CycleGANTurbo, CycleGANTurboConfig, from_official
from models.lora import ADAPTERS
from models.unet import UNet, UNetConfig
from models.vae import VAE, VAEConfig

pytestmark = pytest.mark.usefixtures("one_thread")

DIRECTIONS = ["a2b", "b2a"]
RANK = 6  # of the U-Net; the VAE's is the official 4
SD_TURBO = dict(
    block_out_channels=(320, 640, 1280, 1280), attention_head_dim=(5, 10, 20, 20), cross_attention_dim=1024,
    use_linear_projection=True, sample_size=64)
VAE_LORA = [*SKIPS, "conv_in", "conv_out", "conv_shortcut", "conv", "conv1", "conv2", "to_q", "to_k", "to_v",
            "to_out.0"]


def official_groups(unet: UNet2DConditionModel) -> dict[str, list[str]]:
    """img2img-turbo's rule for the three adapters, which reads the names of the peer's parameters."""
    wanted = "to_k to_q to_v to_out.0 conv conv1 conv2 conv_in conv_shortcut conv_out proj_out proj_in ff.net.2" \
             " ff.net.0.proj"
    groups = dict(encoder=[], decoder=[], others=[])
    for name, _ in unet.named_parameters():
        if "bias" in name or "norm" in name or not any(part in name for part in wanted.split()):
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
    """img2img-turbo's generator over the peers' own networks, in float64, all LoRA and skip convolutions drawn. Its
    scheduler's table is made again in float64 (its step still adds noise of deviation 1e-10, which is what the pictures
    differ by), and the latent is the encoder's mean unless a seed draws it."""

    def __init__(self, folder: Path):
        self.base, self.pkl = folder / "base", folder / "model.pkl"
        self.scheduler = DDPMScheduler(**SCHEDULE, timestep_spacing="trailing", clip_sample=False)
        self.scheduler.set_timesteps(1)
        pipe = tiny_pipeline(dict(UNET, use_linear_projection=True), SIZES, self.scheduler).to(torch.float64)
        pipe.save_pretrained(self.base)
        roots = torch.linspace(SCHEDULE["beta_start"] ** 0.5, SCHEDULE["beta_end"] ** 0.5, 1000, dtype=torch.float64)
        self.scheduler.alphas_cumprod = (1 - roots ** 2).cumprod(0)

        self.unet, vae = pipe.unet.requires_grad_(False), pipe.vae.requires_grad_(False)
        self.groups = official_groups(self.unet)
        for group, names in self.groups.items():
            self.unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian",
                                             target_modules=names), adapter_name=f"default_{group}")
        self.unet.set_adapters([f"default_{group}" for group in self.groups])
        widths = SIZES["block_out_channels"]
        for name, c_in, c_out in zip(SKIPS, [*widths[-2::-1], widths[0]], [widths[-1], *widths[:0:-1]]):
            setattr(vae.decoder, name, nn.Conv2d(c_in, c_out, 1, bias=False))
        vae.add_adapter(LoraConfig(r=4, init_lora_weights="gaussian", target_modules=VAE_LORA), adapter_name="vae_skip")
        self.vaes = dict(a2b=vae, b2a=copy.deepcopy(vae))
        for seed, network in enumerate([self.unet, *self.vaes.values()]):
            network.double()
            for i, (name, p) in enumerate(network.named_parameters()):
                if trained := "lora" in name or "skip_conv" in name:
                    p.data = draw(p, 1000 * seed + i)
                p.requires_grad_(trained)
        self.unet.conv_in.base_layer.requires_grad_(True)

    def __call__(self, x: Tensor, context: Tensor, direction: str, gamma: float | None = 1.0,
                 seed: int | None = None) -> Tensor:
        """`gamma` None is the official code's `ignore_skip`."""
        vae, skips = self.vaes[direction], []
        hooks = [block.register_forward_pre_hook(lambda _, inputs: skips.insert(0, inputs[0]))
                 for block in vae.encoder.down_blocks]
        latents = vae.encode(x).latent_dist
        for hook in hooks:
            hook.remove()
        z = latents.mean if seed is None else latents.sample(torch.Generator().manual_seed(seed))
        z = z * vae.config.scaling_factor
        prediction = self.unet(z, torch.tensor([999] * len(x)), encoder_hidden_states=context).sample
        z = torch.stack([self.scheduler.step(one, torch.tensor(999), latent, return_dict=True).prev_sample
                         for one, latent in zip(prediction, z)])
        decoder = vae.decoder
        h = decoder.mid_block(decoder.conv_in(vae.post_quant_conv(z / vae.config.scaling_factor)))
        for name, skip, block in zip(SKIPS, skips, decoder.up_blocks):
            h = block(h if gamma is None else h + getattr(decoder, name)(skip * gamma))
        return decoder.conv_out(decoder.conv_act(decoder.conv_norm_out(h))).clamp(-1, 1)

    def saved(self, of=lambda p: p.detach()) -> dict:
        """What the official trainer puts into its file, of the parameters or of their gradients."""
        unet, a2b, b2a = [{name: of(p) for name, p in network.named_parameters()}
                          for network in (self.unet, *self.vaes.values())]
        vaes = {f"vae.{name}": t for name, t in a2b.items()} | {f"vae_b2a.{name}": t for name, t in b2a.items()}
        adapters = {group: get_peft_model_state_dict(self.unet, unet, f"default_{group}") for group in self.groups}
        return dict(
            l_target_modules_encoder=self.groups["encoder"], l_target_modules_decoder=self.groups["decoder"],
            l_modules_others=self.groups["others"], rank_unet=RANK, sd_encoder=adapters["encoder"],
            sd_decoder=adapters["decoder"], sd_other=adapters["others"], rank_vae=4, vae_lora_target_modules=VAE_LORA,
            sd_vae_enc=vaes, sd_vae_dec=dict(vaes))


@pytest.fixture(scope="module")
def official(tmp_path_factory) -> Official:
    official = Official(tmp_path_factory.mktemp("official"))
    torch.save(official.saved(), official.pkl)
    return official


def load(official: Official, **options) -> CycleGANTurbo:
    return checkpoints.load_generator(str(official.pkl), base=str(official.base), dtype=torch.float64, **options).generator


@pytest.fixture(scope="module")
def generator(official) -> CycleGANTurbo:
    """Ours of the official file, adapters not merged."""
    return load(official, merged=False)


def fresh(official: Official, seed: int | None = None, **options) -> tuple[CycleGANTurbo, bases.Base]:
    """A generator on the official model's base: untrained, or with all trained weights drawn."""
    base = bases.load_base(str(official.base))
    options = dict(lora_rank_unet=RANK) | options
    generator = CycleGANTurbo(base.vae, base.unet, base.schedule, CycleGANTurboConfig(**options),
                              torch.Generator().manual_seed(0))
    for i, p in enumerate(p for p in generator.parameters() if p.requires_grad and seed is not None):
        p.data = draw(p, seed + i)
    return generator, base


def as_official(official: Official, **options) -> CycleGANTurbo:
    """The official file's weights, to be trained further."""
    generator, _ = fresh(official, **options)
    tensors = {name: p.detach() for name, p in generator.named_parameters() if p.requires_grad}  # conv_in, if anything
    found = from_official(torch.load(official.pkl), official.pkl)[1]
    tensors |= {name: t for name, t in found.items() if generator.config.skips or "skip_conv" not in name}
    assign(generator, tensors, official.pkl)
    return generator


def inputs(height: int = 32, width: int = 32) -> tuple[Tensor, Tensor]:
    """Picture in [-1, 1], context."""
    return normal(2, 3, height, width).tanh(), normal(2, 7, UNET["cross_attention_dim"], seed=1)


def there_and_back(generator: CycleGANTurbo | Official, x: Tensor, context: Tensor) -> Tensor:
    return generator(generator(x, context, "a2b"), context.flip(0), "b2a")


# ---------------------------------------------------------------------------------------------------- the forward pass


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
def test_directions_and_captions_are_told_apart(generator):
    x, context = inputs()
    y = generator(x, context, "a2b")
    assert relative(generator(x, context, "b2a"), y) > 0.1
    assert relative(generator(x, context.flip(0), "a2b"), y) > 1e-3
    assert relative(generator(x[1:], context[1:], "a2b"), y[1:]) < 1e-12  # pictures do not touch each other


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
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_latent_noise_is_the_official_draw_of_the_latent(official, generator, direction):
    args = *inputs(), direction
    y = generator(*args, latent_noise=normal(2, 4, 4, 4, seed=7))
    assert relative(y, official(*args, seed=7)) < 1e-9
    assert relative(y, generator(*args)) > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_an_untrained_generator_is_the_base_but_for_nearly_nothing(official, direction):
    base = bases.load_base(str(official.base), ("vae", "unet", "schedule"))
    x, context = inputs()
    z = base.vae.encode(x)[0] * base.vae.config.scaling_factor
    z = (z - base.schedule.sigma[999] * base.unet(z, 999, context)) / base.schedule.alpha[999]
    expected = base.vae.decode(z / base.vae.config.scaling_factor).clamp(-1, 1)
    generator, _ = fresh(official)
    assert relative(generator(x, context, direction, skip_scale=0.0), expected) < 1e-9
    assert 0 < relative(generator(x, context, direction), expected) < 1e-3


@pytest.mark.parametrize("direction", ["b2b", "A2B", "", None])
def test_an_unknown_direction_is_named(generator, direction):
    with pytest.raises(ValueError) as error:
        generator(*inputs(), direction)
    assert str(error.value) == f"the direction is {direction!r}; expected a2b or b2a"


# --------------------------------------------------------------------------------------------------- what carries LoRA


def test_full_size_groups_are_those_of_the_official_rule():
    with torch.device("meta"):
        unet, peer, vae = UNet(UNetConfig(**SD_TURBO)), UNet2DConditionModel(**SD_TURBO), VAE(VAEConfig())
    assert parameters(unet) == parameters(peer) == 865_910_724
    theirs = official_groups(peer)
    assert {group: len(names) for group, names in theirs.items()} == dict(encoder=94, decoder=147, others=17)
    generator = CycleGANTurbo(vae, unet, None, CycleGANTurboConfig())
    adapted = {name: layer for name, layer in generator.named_modules() if isinstance(layer, ADAPTERS)}
    assert {name for name in adapted if name.startswith("unet.")} == {f"unet.{n}" for g in theirs.values() for n in g}
    for name, layer in adapted.items():
        rank, scale = (128, 1.0) if name.startswith("unet.") else (4, 2.0)
        assert (layer.lora_A.weight.shape[0], layer.scale, layer.full_scale) == (rank, scale, scale), name
    for part in (generator.vae_a2b, generator.vae_b2a):
        widths = [(conv.in_channels, conv.out_channels) for conv in map(part.decoder.get_submodule, SKIPS)]
        assert widths == [(512, 512), (256, 512), (128, 512), (128, 256)]


@pytest.mark.parametrize("options, unet, vae", [({}, 1.0, 2.0), (dict(lora_rank_unet=16, lora_rank_vae=8), 1.0, 1.0),
                                                (dict(lora_alpha_unet=3.0, lora_alpha_vae=2.0), 0.5, 0.5)], ids=str)
def test_scales_are_alpha_over_rank_and_alpha_is_the_rank_or_eight(official, options, unet, vae):
    generator, _ = fresh(official, **options)
    for part, scale in ((generator.unet, unet), (generator.vae_a2b, vae), (generator.vae_b2a, vae)):
        assert {layer.scale for layer in part.modules() if isinstance(layer, ADAPTERS)} == {scale}


# ------------------------------------------------------------------------------------------------ one VAE, two adapters


def assert_one_frozen_vae(generator: CycleGANTurbo) -> None:
    a2b, b2a = [dict(vae.named_parameters()) for vae in (generator.vae_a2b, generator.vae_b2a)]
    assert a2b.keys() == b2a.keys()
    for name, p in a2b.items():
        if own := "lora" in name or "skip_conv" in name:
            assert p.data_ptr() != b2a[name].data_ptr(), name
        assert (p is b2a[name]) != own, name


def test_the_two_vaes_share_every_frozen_parameter_and_no_trained_one(official, generator):
    untrained, base = fresh(official)
    plain = bases.load_base(str(official.base), ("vae",)).vae
    assert_one_frozen_vae(untrained)
    assert all(p.requires_grad == ("lora" in name or "skip_conv" in name or name.startswith("unet.conv_in."))
               for name, p in untrained.named_parameters())
    own = sum(p.numel() for name, p in untrained.vae_a2b.named_parameters() if p.requires_grad)
    assert parameters(untrained) == parameters(plain) + 2 * own + parameters(untrained.unet)
    a = [layer.lora_A.weight for layer in untrained.vae_b2a.modules() if isinstance(layer, ADAPTERS)]
    b = [layer.lora_A.weight for layer in untrained.vae_a2b.modules() if isinstance(layer, ADAPTERS)]
    assert a and not any(torch.equal(one, other) for one, other in zip(a, b))
    # and it stays so: loaded, and in another type
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


def test_training_changes_its_own_tensors_and_no_other(official):
    generator, _ = fresh(official)
    before = {name: t.clone() for name, t in generator.state_dict().items()}
    trained = {name for name, p in generator.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in generator.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(2):  # A has no gradient before B has left 0
        optimizer.zero_grad()
        there_and_back(generator, *inputs(16, 24)).square().sum().backward()
        optimizer.step()
    assert {name for name, t in generator.state_dict().items() if not torch.equal(t, before[name])} == trained
    assert {name for name in trained if "lora" not in name} == {"unet.conv_in.weight", "unet.conv_in.bias"} | {
        f"vae_{direction}.decoder.{name}.weight" for name in SKIPS for direction in DIRECTIONS}
    assert_one_frozen_vae(generator)


def test_everything_is_trained_with_all_in_two_vaes(official):
    generator, _ = fresh(official, train="all")
    found = gradients(generator, there_and_back(generator, *inputs(16, 24)).square().sum())
    names = {name for name, _ in generator.named_parameters()}
    assert not any("lora" in name for name in names) and names == generator.state_dict().keys()
    assert found.keys() == names and {name for name, g in found.items() if not g.any()} == set()


# ----------------------------------------------------------------------------------------------------------- gradients


def test_gradients_of_a_cycle_are_the_official_ones_of_the_official_parameters(official):
    x, context = inputs(16, 24)
    weight = normal(*x.shape, seed=5)
    for network in (official.unet, *official.vaes.values()):
        network.zero_grad()
    (there_and_back(official, x, context) * weight).sum().backward()
    conv_in = {f"unet.conv_in.{name}": p.grad for name, p in official.unet.conv_in.base_layer.named_parameters()}
    theirs = from_official(official.saved(lambda p: p.grad), "")[1] | conv_in

    generator = as_official(official)
    ours = gradients(generator, (there_and_back(generator, x, context) * weight).sum())
    assert ours.keys() == theirs.keys()
    largest = max(t.abs().max() for t in theirs.values())
    for name, gradient in ours.items():
        assert gradient.any(), name
        assert (gradient - theirs[name]).abs().max() <= 1e-9 * max(theirs[name].abs().max(), 1e-3 * largest), name


@pytest.mark.parametrize("train", ["lora", "all"])
def test_checkpointed_blocks_give_the_same_gradients(official, train):
    generator, _ = fresh(official, seed=3, train=train)
    calls, blocks = [], [*generator.unet.down_blocks, *generator.vae_a2b.encoder.down_blocks,
                         *generator.vae_b2a.decoder.up_blocks]
    for block in blocks:
        block.register_forward_pre_hook(lambda *_: calls.append(1))
    found = []
    for checkpointing in (False, True):
        for network in generator.modules():
            if hasattr(network, "checkpointing"):
                network.checkpointing = checkpointing
        calls.clear()
        found.append(gradients(generator, there_and_back(generator, *inputs(16, 24)).square().sum()))
        expected = len(blocks) + len(generator.unet.down_blocks)  # the U-Net runs twice in a cycle
        assert len(calls) == expected * (1 + checkpointing)
    for name, gradient in found[0].items():
        assert (gradient - found[1][name]).abs().max() <= 1e-12 * gradient.abs().max(), name


# --------------------------------------------------------------------------------------------------------- checkpoints


@torch.no_grad()
@pytest.mark.parametrize("train, options", [("lora", {}), ("all", {}), ("lora", dict(skips=False, conv_in=False))],
                         ids=str)
def test_what_is_saved_is_what_is_loaded(official, tmp_path, train, options):
    """A checkpoint of LoRA opens its base; one of everything needs no other file. The trained `conv_in` is kept."""
    generator, base = fresh(official, seed=7, train=train, **options)
    if generator.config.conv_in:
        generator.unet.conv_in.weight *= 3
        generator.unet.conv_in.bias += 1
    base.text_encoder.text_model.final_layer_norm.bias += train == "all"  # trained too
    folder, path = tmp_path / "base", tmp_path / "run" / "model.safetensors"
    shutil.copytree(official.base, folder)
    path.parent.mkdir()
    prompts = ["a picture of a", "a picture of b"]
    checkpoints.save_generator(path, generator, "cyclegan_turbo", str(folder), prompts, base.text_encoder, base.tokenizer)
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
            assert relative(loaded.generator(*inputs(), direction), generator(*inputs(), direction)) < 1e-9
        assert (loaded.kind, loaded.base, loaded.prompts) == ("cyclegan_turbo", str(folder), prompts)
        assert loaded.generator.config == generator.config
        assert not any(p.requires_grad or p.is_meta for p in loaded.generator.parameters())
    ids = base.tokenizer(TEXTS)
    assert torch.equal(loaded.tokenizer(TEXTS), ids)
    assert torch.equal(loaded.text_encoder(ids), base.text_encoder(ids))


@torch.no_grad()
def test_strength_leads_from_the_base_to_the_trained_model(official):
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
            assert relative(generator(*inputs(), direction), partly(*inputs(), direction)) < 1e-9


def test_files_of_another_kind_are_refused_in_one_line(official, tmp_path):
    paired = dict(unet_lora_target_modules=["conv"], vae_lora_target_modules=["conv"], rank_unet=8, rank_vae=4,
                  state_dict_unet={}, state_dict_vae={})
    cycle = official.saved()
    with pytest.raises(ValueError) as error:
        from_official(paired, "edges.pkl")
    assert str(error.value).startswith("edges.pkl holds unet_lora_target_modules, vae_lora_target_modules, rank_unet,")
    assert "expected a CycleGAN-Turbo file with rank_unet, rank_vae, sd_decoder, sd_enc" in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="^day.pkl holds l_target_modules_encoder.*; expected a pix2pix-Turbo file"):
        pix2pix_turbo.from_official(cycle, "day.pkl")
    with pytest.raises(ValueError, match="^list.pkl holds list; expected a CycleGAN-Turbo file"):
        from_official([cycle], "list.pkl")

    for damage, text in [(lambda saved: saved.pop("sd_other"), "holds .*; expected a .*with"),
                         (lambda saved: saved["sd_other"].pop("conv_out.lora_A.weight"),
                          r"lacks unet.conv_out.lora_A.weight \[6, 16, 3, 3\]"),
                         (lambda saved: saved["sd_encoder"].update(other=torch.zeros(1)), "holds unet.other"),
                         (lambda saved: saved.update(rank_unet=5), r"lora_A.weight is float64 \[6,.*expected .* \[5,")]:
        damaged, path = official.saved(), tmp_path / "damaged.pkl"
        damage(damaged)
        torch.save(damaged, path)
        with pytest.raises(ValueError, match=text) as error:
            checkpoints.load_generator(str(path), base=str(official.base))
        assert str(path) in str(error.value) and "\n" not in str(error.value)

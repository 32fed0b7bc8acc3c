"""models/pix2pix_turbo.py agrees with the official assembly, made here of `diffusers` and `peft`; official `.pkl` files
and our own checkpoints give the pictures of the networks that they were written from."""

import copy
import shutil
from pathlib import Path

import pytest
import safetensors
import torch
from conftest import gradients, normal, relative
from diffusers import DDPMScheduler
from diffusers.utils.peft_utils import set_weights_and_activate_adapters
from peft import LoraConfig
from test_weights import SCHEDULE, TEXTS, UNET, VAE, tiny_pipeline
from torch import Tensor, nn

from files import bases, checkpoints
from files.tensors import assign
from models.lora import LoRAConv2d, LoRALinear, TwinConv2d, set_scale
from models.pix2pix_turbo import UNET_TARGETS, VAE_TARGETS, Pix2PixTurbo, Pix2PixTurboConfig, from_official

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = dict(VAE, block_out_channels=(8, 12, 16, 16), down_block_types=["DownEncoderBlock2D"] * 4,
             up_block_types=["UpDecoderBlock2D"] * 4)
SKIPS = [f"skip_conv_{i}" for i in range(1, 5)]
RS = [0.0, 0.4, 1.0]
MODES = {"deterministic": False, "stochastic": True}


def draw(p: Tensor, seed: int) -> Tensor:
    """A value for a trained parameter that the picture feels."""
    noise = 0.5 * normal(*p.shape, seed=seed)
    return noise / p[0].numel() ** 0.5 if p.ndim > 1 else noise


class OfficialTwin(nn.Module):
    """img2img-turbo's `TwinConv`."""

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.conv_in_pretrained, self.conv_in_curr, self.r = copy.deepcopy(conv), copy.deepcopy(conv), None

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_in_pretrained(x).detach() * (1 - self.r) + self.conv_in_curr(x) * self.r


class Official:
    """img2img-turbo's generator over the peers' own networks, in float64, every trained weight drawn. Two things
    differ: the latent is the encoder's mean, where the official code draws it, and x0 is by the formula (the official
    scheduler's tables are in float32) unless `by_scheduler`."""

    def __init__(self, folder: Path, stochastic: bool, prediction: str = "epsilon"):
        self.scheduler = DDPMScheduler(**SCHEDULE, prediction_type=prediction, timestep_spacing="trailing",
                                       clip_sample=False)
        self.scheduler.set_timesteps(1)
        pipe = tiny_pipeline(vae=SIZES, scheduler=self.scheduler).to(torch.float64)
        self.stochastic, self.base, self.pkl = stochastic, folder / "base", folder / "model.pkl"
        pipe.save_pretrained(self.base)
        self.vae, self.unet = pipe.vae.requires_grad_(False), pipe.unet.requires_grad_(False)
        widths = SIZES["block_out_channels"]
        for name, c_in, c_out in zip(SKIPS, [*widths[-2::-1], widths[0]], [widths[-1], *widths[:0:-1]]):
            setattr(self.vae.decoder, name, nn.Conv2d(c_in, c_out, 1, bias=False))
        if stochastic:
            self.unet.conv_in = OfficialTwin(self.unet.conv_in)
        self.vae.add_adapter(LoraConfig(r=4, init_lora_weights="gaussian", target_modules=[*VAE_TARGETS, *SKIPS]),
                             adapter_name="vae_skip")
        self.unet.add_adapter(LoraConfig(r=8, init_lora_weights="gaussian", target_modules=list(UNET_TARGETS)))
        self.vae.double(), self.unet.double()
        for name, p in [*self.vae.named_parameters(), *self.unet.named_parameters()]:
            if "lora" in name or "skip_conv" in name or name.startswith("conv_in.") and "pretrained" not in name:
                p.data = draw(p, seed=len(name) + p.numel())
                p.requires_grad_(True)

    def set_scale(self, r: float) -> None:
        self.unet.set_adapters(["default"], weights=[r])
        set_weights_and_activate_adapters(self.vae, ["vae_skip"], [r])

    def x0(self, prediction: Tensor, z: Tensor, by_scheduler: bool) -> Tensor:
        if by_scheduler:
            return self.scheduler.step(prediction, self.scheduler.timesteps[0], z).prev_sample
        first, last = SCHEDULE["beta_start"] ** 0.5, SCHEDULE["beta_end"] ** 0.5
        alpha_bar = (1 - torch.linspace(first, last, 1000, dtype=torch.float64) ** 2).prod()
        if self.scheduler.config.prediction_type == "epsilon":
            return (z - (1 - alpha_bar).sqrt() * prediction) / alpha_bar.sqrt()
        return alpha_bar.sqrt() * z - (1 - alpha_bar).sqrt() * prediction

    def __call__(self, x: Tensor, context: Tensor, r: float | None = None, noise: Tensor | None = None,
                 gamma: float = 1.0, by_scheduler: bool = False) -> Tensor:
        skips = []
        hooks = [block.register_forward_pre_hook(lambda _, inputs: skips.append(inputs[0]))
                 for block in self.vae.encoder.down_blocks]
        if r is not None:
            self.set_scale(r)
        z = self.vae.encode(x).latent_dist.mean * self.vae.config.scaling_factor
        for hook in hooks:
            hook.remove()
        if r is not None:
            z, gamma, self.unet.conv_in.r = z * r + noise * (1 - r), gamma * r, r
        z = self.x0(self.unet(z, 999, encoder_hidden_states=context).sample, z, by_scheduler)
        decoder = self.vae.decoder
        h = decoder.mid_block(decoder.conv_in(self.vae.post_quant_conv(z / self.vae.config.scaling_factor)))
        for i, block in enumerate(decoder.up_blocks):
            h = block(h + getattr(decoder, SKIPS[i])(skips[::-1][i] * gamma))
        return decoder.conv_out(decoder.conv_act(decoder.conv_norm_out(h))).clamp(-1, 1)

    def saved(self, unet: dict[str, Tensor], vae: dict[str, Tensor]) -> dict:
        """What the official `save_model` makes of two state dictionaries."""
        return dict(unet_lora_target_modules=list(UNET_TARGETS), vae_lora_target_modules=[*VAE_TARGETS, *SKIPS],
                    rank_unet=8, rank_vae=4,
                    state_dict_unet={k: v for k, v in unet.items() if "lora" in k or "conv_in" in k},
                    state_dict_vae={k: v for k, v in vae.items() if "lora" in k or "skip" in k})

    def save(self) -> None:
        torch.save(self.saved(self.unet.state_dict(), self.vae.state_dict()), self.pkl)


@pytest.fixture(scope="module", params=MODES.values(), ids=MODES.keys())
def official(request, tmp_path_factory) -> Official:
    official = Official(tmp_path_factory.mktemp("official"), request.param)
    official.save()
    return official


def load(official: Official, r: float | None = None, **options) -> Pix2PixTurbo:
    return checkpoints.load_generator(str(official.pkl), str(official.base), r=r, **options).generator


@pytest.fixture(scope="module")
def generator(official) -> Pix2PixTurbo:
    """Ours of the official file, adapters not merged."""
    return load(official, merged=False)


def at(generator: Pix2PixTurbo, x: Tensor, context: Tensor, r: float | None, noise: Tensor | None, **options) -> Tensor:
    set_scale(generator, 1.0 if r is None else r)
    return generator(x, context, r, noise, **options)


def inputs(height: int = 16, width: int = 24) -> tuple[Tensor, Tensor, Tensor]:
    """Condition in [0, 1], context, noise."""
    return (normal(2, 3, height, width).sigmoid(), normal(2, 7, UNET["cross_attention_dim"], seed=1),
            normal(2, 4, height // 8, width // 8, seed=2))


def calls(official: Official, *size: int) -> list[tuple]:
    """(x, context, r, noise) of every way to call this model."""
    x, context, noise = inputs(*size)
    return [(x, context, r, noise) for r in RS] if official.stochastic else [(x, context, None, None)]


# ---------------------------------------------------------------------------------------------------- the forward pass


@torch.no_grad()
@pytest.mark.parametrize("merged", [False, True])
def test_official_files_give_the_official_pictures(official, merged):
    for args in calls(official):
        generator, expected = load(official, args[2], merged=merged), official(*args)
        assert (expected.abs() < 1).float().mean() > 0.5  # the clamp does not hide the rest
        assert relative(generator(*args), expected) < 1e-9
        adapters = [m for m in generator.modules() if isinstance(m, LoRALinear | LoRAConv2d | TwinConv2d)]
        assert bool(adapters) != merged


@torch.no_grad()
def test_the_official_schedulers_one_step_is_our_x0(official, generator):
    for args in calls(official):
        assert relative(at(generator, *args), official(*args, by_scheduler=True)) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.7])
def test_skip_scale_is_the_official_gamma(official, generator, gamma):
    for args in calls(official):
        assert relative(at(generator, *args, skip_scale=gamma), official(*args, gamma)) < 1e-9


@torch.no_grad()
@pytest.mark.parametrize("size", [(8, 8), (8, 40), (24, 8), (56, 72)])
def test_sizes_that_the_unet_cannot_halve_go_through(official, generator, size):
    args = calls(official, *size)[-1]
    y = at(generator, *args)
    assert y.shape == (2, 3, *size)
    assert relative(y, official(*args)) < 1e-9


@torch.no_grad()
def test_pictures_of_a_batch_do_not_touch_each_other(official, generator):
    for args in calls(official):
        alone = at(generator, *(arg[1:] if isinstance(arg, Tensor) else arg for arg in args))
        assert relative(at(generator, *args)[1:], alone) < 1e-12


@torch.no_grad()
def test_bases_that_predict_v_are_translated_by_v(tmp_path):
    official = Official(tmp_path, False, "v_prediction")
    base = bases.load_base(str(official.base), ("vae", "unet", "schedule"))
    config, tensors = from_official(official.saved(official.unet.state_dict(), official.vae.state_dict()), "")
    config.prediction_type = base.schedule.prediction_type
    generator = Pix2PixTurbo(base.vae, base.unet, base.schedule, config)
    assign(generator, tensors, official.pkl)
    x, context, _ = inputs()
    assert relative(generator(x, context), official(x, context)) < 1e-9


@torch.no_grad()
def test_latent_noise_draws_the_latent_from_the_encoders_distribution(generator):
    x, context, eps = inputs()
    set_scale(generator, 1.0)
    mean, logvar, _ = generator.vae.encode(x)
    z = (mean + (0.5 * logvar).exp() * eps) * generator.vae.config.scaling_factor
    expected = generator(x, context, 0.0, z)  # r = 0 hands this to the U-Net, and takes no skips
    assert relative(generator(x, context, skip_scale=0.0, latent_noise=eps), expected) < 1e-12
    assert relative(generator(x, context, skip_scale=0.0), expected) > 1e-3


# ------------------------------------------------------------------------------------------------------------ training


def fresh(official: Official, seed: int | None = None, **options) -> tuple[Pix2PixTurbo, bases.Base]:
    """An untrained generator on the official model's base, with a seed one whose trained weights are drawn."""
    base = bases.load_base(str(official.base))
    generator = Pix2PixTurbo(base.vae, base.unet, base.schedule,
                             Pix2PixTurboConfig(stochastic=official.stochastic, **options))
    for i, p in enumerate(p for p in generator.parameters() if p.requires_grad and seed is not None):
        p.data = draw(p, seed + i)
    return generator.double(), base


@pytest.mark.parametrize("r", [0.0, 0.4])
def test_gradients_are_the_official_ones_of_the_official_parameters(official, r):
    x, context, noise = inputs()
    args = (x, context, r, noise) if official.stochastic else (x, context, None, None)
    weight = normal(*x.shape, seed=5)
    official.unet.zero_grad(), official.vae.zero_grad()
    (official(*args) * weight).sum().backward()
    theirs = [{name: p.grad for name, p in network.named_parameters() if p.requires_grad}
              for network in (official.unet, official.vae)]
    _, theirs = from_official(official.saved(*theirs), "")

    generator, _ = fresh(official)
    assign(generator, from_official(torch.load(official.pkl), "")[1], official.pkl)
    if official.stochastic:
        set_scale(generator, r)
    ours = gradients(generator, (generator(*args) * weight).sum())
    assert ours.keys() == theirs.keys()
    largest = max(t.abs().max() for t in theirs.values())
    for name, gradient in ours.items():
        assert (gradient - theirs[name]).abs().max() <= 1e-9 * max(theirs[name].abs().max(), 1e-3 * largest), name
        if not official.stochastic or r > 0:
            assert gradient.any(), name


def test_lora_training_changes_its_own_tensors_and_no_other(official):
    generator, base = fresh(official)
    before = {name: t.clone() for name, t in generator.state_dict().items()}
    x, context, noise = inputs()
    optimizer = torch.optim.AdamW([p for p in generator.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(2):  # A has no gradient before B has left 0
        optimizer.zero_grad()
        generator(x, context, *([1.0, noise] if official.stochastic else [])).square().sum().backward()
        optimizer.step()
    changed = {name for name, t in generator.state_dict().items() if not torch.equal(t, before[name])}
    trained = {name for name, p in generator.named_parameters() if p.requires_grad}
    assert changed == trained
    assert {n for n in trained if "lora" not in n} == {"unet.conv_in.weight", "unet.conv_in.bias"} | {
        f"vae.decoder.{name}.weight" for name in SKIPS}
    assert {f"vae.decoder.{name}.lora_{part}.weight" for name in SKIPS for part in "AB"} < trained
    if official.stochastic:
        assert torch.equal(generator.unet.conv_in.weight0, before["unet.conv_in.weight"])


def test_everything_is_trained_with_all_and_nothing_is_added_but_skips(official):
    generator, _ = fresh(official, train="all")
    x, context, noise = inputs()
    names = {name for name, _ in generator.named_parameters()}
    assert not any("lora" in name for name in names)
    found = gradients(generator, generator(x, context, *([1.0, noise] if official.stochastic else [])).square().sum())
    assert found.keys() == names
    assert {name for name, g in found.items() if not g.any()} == set()


@torch.no_grad()
def test_an_untrained_generator_is_the_base_but_for_nearly_nothing(official):
    generator, base = fresh(official)
    plain = bases.load_base(str(official.base))
    x, context, noise = inputs()
    z = plain.vae.encode(x)[0] * plain.vae.config.scaling_factor
    alpha, sigma = plain.schedule.alpha[999], plain.schedule.sigma[999]
    z = (z - sigma * plain.unet(z, 999, context)) / alpha
    expected = plain.vae.decode(z / plain.vae.config.scaling_factor).clamp(-1, 1)
    args = [1.0, noise] if official.stochastic else []
    assert relative(generator(x, context, *args, skip_scale=0.0), expected) < 1e-9
    assert 0 < relative(generator(x, context, *args), expected) < 1e-3


# --------------------------------------------------------------------------------------------------------- checkpoints


@torch.no_grad()
@pytest.mark.parametrize("strength, merged", [(0.0, True), (0.5, False), (0.5, True), (1.0, True), (1.5, True)])
def test_strength_scales_the_lora_and_leads_the_rest_from_its_start(official, strength, merged):
    partly, (start, _) = copy.deepcopy(official), fresh(official)
    for network, part in ((partly.unet, "unet"), (partly.vae, "vae")):
        for name, p in network.named_parameters():
            if p.requires_grad and "lora" in name:
                p.data *= strength if "lora_B" in name else 1
            elif p.requires_grad:
                first = start.get_parameter(f"{part}.{name}".replace(".base_layer", "").replace("conv_in_curr.", ""))
                p.data = first + strength * (p - first)
    args = calls(official)[-2 if official.stochastic else 0]
    ours = load(official, args[2], strength=strength, merged=merged)(*args)
    assert relative(ours, partly(*args)) < 1e-9
    if strength == 0:
        assert relative(ours, at(start, *args)) < 1e-9


@torch.no_grad()
@pytest.mark.parametrize("train", ["lora", "all"])
def test_what_is_saved_is_what_is_loaded(official, tmp_path, train):
    """A checkpoint of LoRA opens its base; one of everything needs no other file, for the text either."""
    generator, base = fresh(official, seed=7, train=train)
    base.text_encoder.text_model.final_layer_norm.bias += train == "all"  # trained too
    folder, path = tmp_path / "base", tmp_path / "run" / "model.safetensors"
    shutil.copytree(official.base, folder)
    path.parent.mkdir()
    checkpoints.save_generator(path, generator, "pix2pix_turbo", str(folder), ["drawn", "a cat"], base.text_encoder,
                           base.tokenizer)
    if train == "all":
        shutil.rmtree(folder)
    with safetensors.safe_open(path, "pt") as file:
        names = {*file.keys()}
    trained = {name for name, p in generator.named_parameters() if p.requires_grad}
    assert trained <= names
    assert train == "all" or names == trained  # the base is not copied
    for args in calls(official):
        for merged in (False, True):
            loaded = checkpoints.load_generator(str(path.parent), r=args[2], merged=merged)
            assert relative(loaded.generator(*args), at(generator, *args)) < 1e-9
            assert (loaded.kind, loaded.base, loaded.prompts) == ("pix2pix_turbo", str(folder), ["drawn", "a cat"])
            assert loaded.r == args[2]
            assert loaded.generator.config == generator.config
    ids = base.tokenizer(TEXTS)
    assert torch.equal(loaded.tokenizer(TEXTS), ids)
    assert torch.equal(loaded.text_encoder(ids), base.text_encoder(ids))
    assert not any(p.requires_grad or p.is_meta for p in loaded.text_encoder.parameters())
    for network in (loaded.generator, loaded.text_encoder):
        assert not network.training and not any(p.requires_grad for p in network.parameters())


def test_a_stochastic_checkpoint_stands_at_r_0_4_and_a_deterministic_one_has_no_r(official):
    loaded = checkpoints.load_generator(str(official.pkl), str(official.base), merged=False)
    scales = {m.scale / m.full_scale for m in loaded.generator.modules() if isinstance(m, LoRALinear | LoRAConv2d)}
    if official.stochastic:
        assert loaded.r == 0.4 and max(scales) == pytest.approx(0.4) == min(scales)
    else:
        assert loaded.r is None and scales == {1.0}
        with pytest.raises(ValueError, match="not a stochastic model.*leave --r out"):
            load(official, 0.4)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("merged", [False, True])
def test_a_generator_is_loaded_whole_in_the_type_asked_for(official, dtype, merged):
    loaded = checkpoints.load_generator(str(official.pkl), str(official.base), dtype=dtype, merged=merged)
    tensors = [*loaded.generator.parameters(), *loaded.generator.buffers(), *loaded.text_encoder.parameters()]
    assert {t.dtype for t in tensors} == {dtype}
    args = [t if t is None or isinstance(t, float) else t.to(dtype) for t in calls(official)[-1]]
    set_scale(loaded.generator, 1.0)
    if not official.stochastic and dtype == torch.float32:
        assert relative(loaded.generator(*args).double(), official(*calls(official)[-1])) < 1e-4
    assert loaded.generator(*args).dtype == dtype


def test_an_official_file_without_base_asks_for_sd_turbo(official, monkeypatch):
    asked = []
    monkeypatch.setattr(checkpoints, "load_base", lambda name, **_: asked.append(name) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        checkpoints.load_generator(str(official.pkl))
    assert asked == ["sd-turbo"]

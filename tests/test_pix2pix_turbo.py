"""pix2pix-Turbo agrees with the official generator, rebuilt here from `diffusers` and `peft`.

Official `.pkl` files and our own checkpoints give the pictures of the networks that they were
written from.
"""

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
from pipelines import SCHEDULE, TEXTS, UNET, VAE, tiny_pipeline
from torch import Tensor, nn

from files import bases, checkpoints
from files.tensors import assign
from models.diffusion import Schedule
from models.lora import ADAPTERS, LoRAConv2d, LoRALinear, set_scale
from models.pix2pix_turbo import (
    UNET_TARGETS,
    VAE_TARGETS,
    Pix2PixTurbo,
    Pix2PixTurboConfig,
    check_timestep,
    from_official,
)

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = dict(
    VAE,
    block_out_channels=(8, 12, 16, 16),
    down_block_types=["DownEncoderBlock2D"] * 4,
    up_block_types=["UpDecoderBlock2D"] * 4,
)
SKIPS = [f"skip_conv_{i}" for i in range(1, 5)]
RS = [0.0, 0.4, 1.0]
MODES = {"deterministic": False, "stochastic": True}


def draw(p: Tensor, seed: int) -> Tensor:
    """A random value for a trained parameter, large enough to change the picture."""
    noise = 0.5 * normal(*p.shape, seed=seed)
    return noise / p[0].numel() ** 0.5 if p.ndim > 1 else noise


class OfficialTwin(nn.Module):
    """img2img-turbo's `TwinConv`."""

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.conv_in_pretrained = copy.deepcopy(conv)
        self.conv_in_curr = copy.deepcopy(conv)
        self.r = None

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_in_pretrained(x).detach() * (1 - self.r) + self.conv_in_curr(x) * self.r


def add_official_skip_convs(decoder: nn.Module) -> None:
    widths = SIZES["block_out_channels"]
    widths_in = [*widths[-2::-1], widths[0]]
    widths_out = [widths[-1], *widths[:0:-1]]
    for name, c_in, c_out in zip(SKIPS, widths_in, widths_out):
        setattr(decoder, name, nn.Conv2d(c_in, c_out, 1, bias=False))


class Official:
    """img2img-turbo's generator with the peers' networks, in float64, trained weights random.

    Two things differ. The latent is the encoder's mean, where the official code samples it. And x0
    is computed by the formula unless `by_scheduler`: the official scheduler's tables are float32.
    """

    def __init__(self, folder: Path, stochastic: bool, prediction: str = "epsilon"):
        self.scheduler = DDPMScheduler(
            **SCHEDULE,
            prediction_type=prediction,
            timestep_spacing="trailing",
            clip_sample=False,
        )
        self.scheduler.set_timesteps(1)
        self.timestep = 999
        pipe = tiny_pipeline(vae=SIZES, scheduler=self.scheduler).to(torch.float64)
        self.stochastic = stochastic
        self.base = folder / "base"
        self.pkl = folder / "model.pkl"
        pipe.save_pretrained(self.base)
        self.vae = pipe.vae.requires_grad_(False)
        self.unet = pipe.unet.requires_grad_(False)
        add_official_skip_convs(self.vae.decoder)
        if stochastic:
            self.unet.conv_in = OfficialTwin(self.unet.conv_in)

        lora = LoraConfig(
            r=4, init_lora_weights="gaussian", target_modules=[*VAE_TARGETS, *SKIPS]
        )
        self.vae.add_adapter(lora, adapter_name="vae_skip")
        lora = LoraConfig(r=8, init_lora_weights="gaussian", target_modules=list(UNET_TARGETS))
        self.unet.add_adapter(lora)
        self.vae.double()
        self.unet.double()
        for name, p in [*self.vae.named_parameters(), *self.unet.named_parameters()]:
            conv_in = name.startswith("conv_in.") and "pretrained" not in name
            if "lora" in name or "skip_conv" in name or conv_in:
                p.data = draw(p, seed=len(name) + p.numel())
                p.requires_grad_(True)

    def set_scale(self, r: float) -> None:
        self.unet.set_adapters(["default"], weights=[r])
        set_weights_and_activate_adapters(self.vae, ["vae_skip"], [r])

    def x0(self, prediction: Tensor, z: Tensor, by_scheduler: bool) -> Tensor:
        if by_scheduler:
            return self.scheduler.step(prediction, self.scheduler.timesteps[0], z).prev_sample
        first = SCHEDULE["beta_start"] ** 0.5
        last = SCHEDULE["beta_end"] ** 0.5
        alphas = 1 - torch.linspace(first, last, 1000, dtype=torch.float64) ** 2
        alpha_bar = alphas[:self.timestep + 1].prod()
        if self.scheduler.config.prediction_type == "epsilon":
            return (z - (1 - alpha_bar).sqrt() * prediction) / alpha_bar.sqrt()
        return alpha_bar.sqrt() * z - (1 - alpha_bar).sqrt() * prediction

    def __call__(
        self,
        x: Tensor,
        context: Tensor,
        r: float | None = None,
        noise: Tensor | None = None,
        gamma: float = 1.0,
        by_scheduler: bool = False,
    ) -> Tensor:
        if r is not None:
            self.set_scale(r)
        latents, skips = encode_with_skips(self.vae, x)
        z = latents.mean * self.vae.config.scaling_factor
        if r is not None:
            z = z * r + noise * (1 - r)
            gamma = gamma * r
            self.unet.conv_in.r = r
        prediction = self.unet(z, self.timestep, encoder_hidden_states=context).sample
        z = self.x0(prediction, z, by_scheduler)

        z = self.vae.post_quant_conv(z / self.vae.config.scaling_factor)
        decoder = self.vae.decoder
        h = decoder.mid_block(decoder.conv_in(z))
        for name, skip, block in zip(SKIPS, reversed(skips), decoder.up_blocks):
            h = block(h + getattr(decoder, name)(skip * gamma))
        return decoder.conv_out(decoder.conv_act(decoder.conv_norm_out(h))).clamp(-1, 1)

    def saved(self, unet: dict[str, Tensor], vae: dict[str, Tensor]) -> dict:
        """The contents of an official file, as `save_model` makes it of two state dictionaries."""
        return dict(
            unet_lora_target_modules=list(UNET_TARGETS),
            vae_lora_target_modules=[*VAE_TARGETS, *SKIPS],
            rank_unet=8,
            rank_vae=4,
            state_dict_unet={k: v for k, v in unet.items() if "lora" in k or "conv_in" in k},
            state_dict_vae={k: v for k, v in vae.items() if "lora" in k or "skip" in k},
        )

    def contents(self) -> dict:
        """The contents of the official file of this generator."""
        return self.saved(self.unet.state_dict(), self.vae.state_dict())

    def save(self) -> None:
        torch.save(self.contents(), self.pkl)


def encode_with_skips(vae: nn.Module, x: Tensor) -> tuple:
    """The peer's distribution of latents, and the inputs of its encoder's blocks, first to last."""
    skips = []
    hooks = []
    for block in vae.encoder.down_blocks:
        hook = block.register_forward_pre_hook(lambda _, inputs: skips.append(inputs[0]))
        hooks.append(hook)
    latents = vae.encode(x).latent_dist
    for hook in hooks:
        hook.remove()
    return latents, skips


@pytest.fixture(scope="module", params=MODES.values(), ids=MODES.keys())
def official(request, tmp_path_factory) -> Official:
    official = Official(tmp_path_factory.mktemp("official"), request.param)
    official.save()
    return official


def load(official: Official, r: float | None = None, **options) -> Pix2PixTurbo:
    loaded = checkpoints.load_generator(str(official.pkl), str(official.base), r=r, **options)
    return loaded.generator


@pytest.fixture(scope="module")
def generator(official) -> Pix2PixTurbo:
    """Our generator, loaded from the official file with unmerged adapters."""
    return load(official, merged=False)


def at(
    generator: Pix2PixTurbo,
    x: Tensor,
    context: Tensor,
    r: float | None,
    noise: Tensor | None,
    **options,
) -> Tensor:
    """The picture at r, with the adapters scaled to it."""
    set_scale(generator, 1.0 if r is None else r)
    return generator(x, context, r, noise, **options)


def inputs(height: int = 16, width: int = 24) -> tuple[Tensor, Tensor, Tensor]:
    """Condition in [0, 1], context, noise."""
    x = normal(2, 3, height, width).sigmoid()
    context = normal(2, 7, UNET["cross_attention_dim"], seed=1)
    noise = normal(2, 4, height // 8, width // 8, seed=2)
    return x, context, noise


def calls(official: Official, *size: int) -> list[tuple]:
    """The arguments (x, context, r, noise) of every way to call this model."""
    x, context, noise = inputs(*size)
    if official.stochastic:
        return [(x, context, r, noise) for r in RS]
    return [(x, context, None, None)]


# -------------------- the forward pass

@torch.no_grad()
@pytest.mark.parametrize("merged", [False, True])
def test_official_files_give_the_official_pictures(official, merged):
    for args in calls(official):
        generator = load(official, args[2], merged=merged)
        expected = official(*args)
        assert (expected.abs() < 1).float().mean() > 0.5  # the clamp does not hide the rest
        assert relative(generator(*args), expected) < 1e-9
        adapters = [m for m in generator.modules() if isinstance(m, ADAPTERS)]
        assert bool(adapters) != merged


@pytest.fixture
def another_conv_in(tmp_path) -> Official:
    """A stochastic generator whose original `conv_in` is not its base's."""
    official = Official(tmp_path, stochastic=True)
    for i, p in enumerate(official.unet.conv_in.conv_in_pretrained.parameters()):
        p.data = draw(p, seed=40 + i)
    official.save()
    return official


@torch.no_grad()
@pytest.mark.parametrize("merged", [False, True])
def test_the_original_conv_in_is_the_files_and_not_the_bases(another_conv_in, merged):
    ours = []
    for args in calls(another_conv_in):
        generator = load(another_conv_in, args[2], merged=merged)
        ours.append(generator(*args))
        assert relative(ours[-1], another_conv_in(*args)) < 1e-9

    # With the base's the picture is another one, except at r = 1.
    own = bases.load_base(str(another_conv_in.base), ("unet",)).unet.conv_in
    another_conv_in.unet.conv_in.conv_in_pretrained.load_state_dict(own.state_dict())
    for picture, args in zip(ours, calls(another_conv_in)):
        differs = relative(picture, another_conv_in(*args)) > 1e-3
        assert differs == (args[2] < 1)


@torch.no_grad()
def test_at_strength_0_the_original_conv_in_is_the_bases(another_conv_in):
    generator = load(another_conv_in, 0.4, strength=0.0)
    pretrained = bases.load_base(str(another_conv_in.base), ("unet",)).unet.conv_in
    assert torch.equal(generator.unet.conv_in.weight, pretrained.weight)
    assert torch.equal(generator.unet.conv_in.bias, pretrained.bias)


@pytest.mark.parametrize("change", ["shape", "integers"])
def test_an_original_conv_in_that_does_not_fit_is_refused(another_conv_in, change):
    saved = another_conv_in.contents()
    name = "conv_in.conv_in_pretrained.weight"
    tensor = saved["state_dict_unet"][name]
    saved["state_dict_unet"][name] = tensor[:3] if change == "shape" else tensor.long()
    torch.save(saved, another_conv_in.pkl)
    with pytest.raises(ValueError, match="unet.conv_in.weight0 is .*expected floating point"):
        load(another_conv_in, 0.4)


@torch.no_grad()
def test_one_step_of_the_official_scheduler_is_our_x0(official, generator):
    for args in calls(official):
        expected = official(*args, by_scheduler=True)
        assert relative(at(generator, *args), expected) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.7])
def test_skip_scale_is_the_official_gamma(official, generator, gamma):
    for args in calls(official):
        ours = at(generator, *args, skip_scale=gamma)
        assert relative(ours, official(*args, gamma)) < 1e-9


@torch.no_grad()
def test_without_skips_there_are_no_skip_convolutions(official):
    generator, _ = fresh(official, seed=7, skips=False)
    with_skips, _ = fresh(official, seed=7)
    assert not any("skip_conv" in name for name, _ in generator.named_modules())
    state = generator.state_dict()
    missing, unexpected = with_skips.load_state_dict(state, strict=False)
    assert not unexpected and missing and all("skip_conv" in name for name in missing)
    for args in calls(official):
        expected = at(with_skips, *args, skip_scale=0.0)
        assert relative(at(generator, *args), expected) < 1e-12


@torch.no_grad()
def test_the_timestep_is_the_one_of_the_settings(official):
    last = "^the timestep of a stochastic model is 199; expected the last, 999"
    if official.stochastic:
        with pytest.raises(ValueError, match=last):
            fresh(official, timestep=199)
        return
    earlier = copy.copy(official)
    earlier.timestep = 199
    generator, _ = fresh(official, timestep=199)
    assign(generator, from_official(official.contents(), "")[1], official.pkl)
    x, context, _ = inputs()
    assert relative(generator(x, context), earlier(x, context)) < 1e-9
    assert relative(generator(x, context), official(x, context)) > 1e-3
    with pytest.raises(ValueError, match="^the timestep is 1000; expected 0 to 999"):
        fresh(official, timestep=1000)


def test_a_base_whose_prediction_tells_no_x0_is_refused():
    schedule = Schedule.from_config(SCHEDULE | {"rescale_betas_zero_snr": True})
    check_timestep(999, schedule, "v_prediction")
    with pytest.raises(ValueError, match="^at timestep 999 the base's schedule is pure noise"):
        check_timestep(999, schedule, "epsilon")


@torch.no_grad()
@pytest.mark.parametrize("size", [(8, 8), (8, 40), (24, 8), (56, 72)])
def test_sizes_that_the_unet_cannot_halve_go_through(official, generator, size):
    args = calls(official, *size)[-1]
    y = at(generator, *args)
    assert y.shape == (2, 3, *size)
    assert relative(y, official(*args)) < 1e-9


@torch.no_grad()
def test_pictures_of_a_batch_do_not_affect_each_other(official, generator):
    for args in calls(official):
        second = [arg[1:] if isinstance(arg, Tensor) else arg for arg in args]
        alone = at(generator, *second)
        assert relative(at(generator, *args)[1:], alone) < 1e-12


@torch.no_grad()
def test_bases_that_predict_v_work(tmp_path):
    official = Official(tmp_path, False, "v_prediction")
    base = bases.load_base(str(official.base), ("vae", "unet", "schedule"))
    config, tensors = from_official(official.contents(), "")
    config.prediction_type = base.schedule.prediction_type
    generator = Pix2PixTurbo(base.vae, base.unet, base.schedule, config)
    assign(generator, tensors, official.pkl)
    x, context, _ = inputs()
    assert relative(generator(x, context), official(x, context)) < 1e-9


@torch.no_grad()
def test_latent_noise_samples_the_latent_from_the_encoders_distribution(generator):
    x, context, eps = inputs()
    set_scale(generator, 1.0)
    mean, logvar, _ = generator.vae.encode(x)
    z = (mean + (0.5 * logvar).exp() * eps) * generator.vae.config.scaling_factor
    # At r = 0 the U-Net gets the noise, here z, and there are no skips.
    expected = generator(x, context, 0.0, z)
    sampled = generator(x, context, skip_scale=0.0, latent_noise=eps)
    assert relative(sampled, expected) < 1e-12
    assert relative(generator(x, context, skip_scale=0.0), expected) > 1e-3


# -------------------- training

def fresh(
    official: Official, seed: int | None = None, **options
) -> tuple[Pix2PixTurbo, bases.Base]:
    """An untrained generator on the official model's base; with a seed, trained weights random."""
    base = bases.load_base(str(official.base))
    config = Pix2PixTurboConfig(stochastic=official.stochastic, **options)
    generator = Pix2PixTurbo(base.vae, base.unet, base.schedule, config)
    if seed is not None:
        trained = [p for p in generator.parameters() if p.requires_grad]
        for i, p in enumerate(trained):
            p.data = draw(p, seed + i)
    return generator.double(), base


def at_full_strength(official: Official, noise: Tensor) -> list:
    """The further arguments of a call with the adapters at full strength."""
    return [1.0, noise] if official.stochastic else []


@pytest.mark.parametrize("r", [0.0, 0.4])
def test_gradients_are_the_official_ones_of_the_official_parameters(official, r):
    x, context, noise = inputs()
    args = (x, context, r, noise) if official.stochastic else (x, context, None, None)
    weight = normal(*x.shape, seed=5)
    official.unet.zero_grad()
    official.vae.zero_grad()
    (official(*args) * weight).sum().backward()
    # from_official renames gradients as it does parameters.
    saved = official.saved(trained_gradients(official.unet), trained_gradients(official.vae))
    _, theirs = from_official(saved, "")

    generator, _ = fresh(official)
    assign(generator, from_official(torch.load(official.pkl), "")[1], official.pkl)
    if official.stochastic:
        set_scale(generator, r)
    ours = gradients(generator, (generator(*args) * weight).sum())
    assert ours.keys() == theirs.keys()
    largest = max(t.abs().max() for t in theirs.values())
    for name, gradient in ours.items():
        scale = max(theirs[name].abs().max(), 1e-3 * largest)
        assert (gradient - theirs[name]).abs().max() <= 1e-9 * scale, name
        if not official.stochastic or r > 0:
            assert gradient.any(), name


def trained_gradients(network: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in network.named_parameters() if p.requires_grad}


def test_lora_training_changes_its_own_tensors_and_no_others(official):
    generator, _ = fresh(official)
    before = {name: t.clone() for name, t in generator.state_dict().items()}
    x, context, noise = inputs()
    args = (x, context, *at_full_strength(official, noise))
    optimizer = torch.optim.AdamW([p for p in generator.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(2):  # while B is 0, A has no gradient
        optimizer.zero_grad()
        generator(*args).square().sum().backward()
        optimizer.step()
    state = generator.state_dict()
    changed = {name for name, t in state.items() if not torch.equal(t, before[name])}
    trained = {name for name, p in generator.named_parameters() if p.requires_grad}
    assert changed == trained
    in_full = {"unet.conv_in.weight", "unet.conv_in.bias"}
    in_full |= {f"vae.decoder.{name}.weight" for name in SKIPS}
    assert {name for name in trained if "lora" not in name} == in_full
    for name in SKIPS:
        assert f"vae.decoder.{name}.lora_A.weight" in trained
        assert f"vae.decoder.{name}.lora_B.weight" in trained
    if official.stochastic:
        assert torch.equal(generator.unet.conv_in.weight0, before["unet.conv_in.weight"])


def test_with_all_every_weight_is_trained_and_only_skips_are_added(official):
    generator, _ = fresh(official, train="all")
    x, context, noise = inputs()
    names = {name for name, _ in generator.named_parameters()}
    assert not any("lora" in name for name in names)
    picture = generator(x, context, *at_full_strength(official, noise))
    found = gradients(generator, picture.square().sum())
    assert found.keys() == names
    assert all(g.any() for g in found.values())


@torch.no_grad()
def test_an_untrained_generator_is_almost_the_base(official):
    generator, _ = fresh(official)
    plain = bases.load_base(str(official.base))
    x, context, noise = inputs()
    z = plain.vae.encode(x)[0] * plain.vae.config.scaling_factor
    alpha, sigma = plain.schedule.alpha[999], plain.schedule.sigma[999]
    z = (z - sigma * plain.unet(z, 999, context)) / alpha
    expected = plain.vae.decode(z / plain.vae.config.scaling_factor).clamp(-1, 1)
    args = at_full_strength(official, noise)
    assert relative(generator(x, context, *args, skip_scale=0.0), expected) < 1e-9
    assert 0 < relative(generator(x, context, *args), expected) < 1e-3


# -------------------- checkpoints

@torch.no_grad()
@pytest.mark.parametrize(
    "strength, merged", [(0.0, True), (0.5, False), (0.5, True), (1.0, True), (1.5, True)]
)
def test_strength_scales_the_lora_and_interpolates_the_rest_from_its_start(
    official, strength, merged
):
    partly = copy.deepcopy(official)
    start, _ = fresh(official)
    for network, part in ((partly.unet, "unet"), (partly.vae, "vae")):
        for name, p in network.named_parameters():
            if not p.requires_grad:
                continue
            if "lora_B" in name:
                p.data *= strength
            elif "lora" not in name:
                ours = f"{part}.{name}".replace(".base_layer", "").replace("conv_in_curr.", "")
                first = start.get_parameter(ours)
                p.data = first + strength * (p - first)
    args = calls(official)[-2 if official.stochastic else 0]
    ours = load(official, args[2], strength=strength, merged=merged)(*args)
    assert relative(ours, partly(*args)) < 1e-9
    if strength == 0:
        assert relative(ours, at(start, *args)) < 1e-9


@torch.no_grad()
@pytest.mark.parametrize(
    "train, options",
    [("lora", {}), ("all", {}), ("lora", dict(skips=False)), ("lora", dict(timestep=199))],
    ids=str,
)
def test_what_is_saved_is_what_is_loaded(official, tmp_path, train, options):
    """A LoRA checkpoint opens its base. One of all weights needs no other file."""
    if official.stochastic and "timestep" in options:
        pytest.skip("stochastic models have the last timestep")
    generator, base = fresh(official, seed=7, train=train, **options)
    if train == "all":  # the text encoder is trained too
        base.text_encoder.text_model.final_layer_norm.bias += 1
    folder = tmp_path / "base"
    path = tmp_path / "run" / "model.safetensors"
    shutil.copytree(official.base, folder)
    path.parent.mkdir()
    checkpoints.save_generator(
        path,
        generator,
        "pix2pix_turbo",
        str(folder),
        ["drawn", "a cat"],
        base.text_encoder,
        base.tokenizer,
    )
    if train == "all":
        shutil.rmtree(folder)
    with safetensors.safe_open(path, "pt") as file:
        names = {*file.keys()}
    trained = {name for name, p in generator.named_parameters() if p.requires_grad}
    assert trained <= names
    if train == "lora":  # of the base, only the original of a stochastic model's conv_in is copied
        originals = {"unet.conv_in.weight0", "unet.conv_in.bias0"}
        assert names == trained | (originals if official.stochastic else set())
    for args in calls(official):
        for merged in (False, True):
            loaded = checkpoints.load_generator(str(path.parent), r=args[2], merged=merged)
            assert relative(loaded.generator(*args), at(generator, *args)) < 1e-9
            assert loaded.kind == "pix2pix_turbo"
            assert loaded.base == str(folder)
            assert loaded.prompts == ["drawn", "a cat"]
            assert loaded.r == args[2]
            assert loaded.generator.config == generator.config
    ids = base.tokenizer(TEXTS)
    assert torch.equal(loaded.tokenizer(TEXTS), ids)
    assert torch.equal(loaded.text_encoder(ids), base.text_encoder(ids))
    assert not any(p.requires_grad or p.is_meta for p in loaded.text_encoder.parameters())
    for network in (loaded.generator, loaded.text_encoder):
        assert not network.training and not any(p.requires_grad for p in network.parameters())


def test_a_stochastic_checkpoint_has_r_0_4_by_default_and_a_deterministic_one_has_none(official):
    loaded = checkpoints.load_generator(str(official.pkl), str(official.base), merged=False)
    adapters = [m for m in loaded.generator.modules() if isinstance(m, LoRALinear | LoRAConv2d)]
    scales = {adapter.scale / adapter.full_scale for adapter in adapters}
    if official.stochastic:
        assert loaded.r == 0.4
        assert all(scale == pytest.approx(0.4) for scale in scales)
    else:
        assert loaded.r is None and scales == {1.0}
        with pytest.raises(ValueError, match="not a stochastic model.*leave --r out"):
            load(official, 0.4)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("merged", [False, True])
def test_all_of_a_generator_is_loaded_in_the_dtype_asked_for(official, dtype, merged):
    loaded = checkpoints.load_generator(
        str(official.pkl), str(official.base), dtype=dtype, merged=merged
    )
    tensors = [
        *loaded.generator.parameters(),
        *loaded.generator.buffers(),
        *loaded.text_encoder.parameters(),
    ]
    assert {t.dtype for t in tensors} == {dtype}
    args = [t.to(dtype) if isinstance(t, Tensor) else t for t in calls(official)[-1]]
    set_scale(loaded.generator, 1.0)
    if not official.stochastic and dtype == torch.float32:
        expected = official(*calls(official)[-1])
        assert relative(loaded.generator(*args).double(), expected) < 1e-4
    assert loaded.generator(*args).dtype == dtype


def test_an_official_file_without_a_base_loads_sd_turbo(official, monkeypatch):
    asked = []

    def load_base(name, **_):
        asked.append(name)
        raise ZeroDivisionError

    monkeypatch.setattr(checkpoints, "load_base", load_base)
    with pytest.raises(ZeroDivisionError):
        checkpoints.load_generator(str(official.pkl))
    assert asked == ["sd-turbo"]

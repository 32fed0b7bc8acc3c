"""sample.py on bases other than Stable Diffusion's folders, and with additions to them.

PixArt, LoRA, ControlNets, one-file models and merged models draw what the `diffusers` pipelines
draw; editing and priors do what they promise; an error is one line.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import diffusers.schedulers.scheduling_lcm
import pytest
import torch
from conftest import normal, randomise, relative
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    LCMScheduler,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from pipelines import SCHEDULE, UNET, VAE, tiny_pipeline
from safetensors.torch import load_file, save_file
from test_diffusion import exact_dpm  # noqa: F401 (a fixture)
from test_files_formats_original import open_clip_file, other_tensors, unet_file, vae_file
from test_sample import ALPHA_BAR, PROMPT, command, levels, picture  # noqa: F401
from test_t5 import exact_norm  # noqa: F401
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel, T5Tokenizer

import sample
from dataset import __main__ as dataset_main
from dataset.pictures import open_picture, to_tensor
from files import bases, hub
from models import diffusion, t5

pytestmark = pytest.mark.usefixtures("one_thread")

LINEAR = dict(beta_schedule="linear", beta_start=0.0001, beta_end=0.02)
LINEAR_ALPHA_BAR = (1 - torch.linspace(0.0001, 0.02, 1000, dtype=torch.float64)).cumprod(0)
T5 = dict(
    d_model=24,
    d_kv=8,
    d_ff=40,
    num_layers=2,
    num_heads=4,
    feed_forward_proj="gated-gelu",
)
DIT = dict(
    num_attention_heads=3,
    attention_head_dim=8,
    num_layers=2,
    cross_attention_dim=24,
    caption_channels=24,
    out_channels=8,
    norm_type="ada_norm_single",
    num_embeds_ada_norm=1000,
)


def pixart(scheduler, sample_size: int = 8, seed: int = 0) -> PixArtAlphaPipeline:
    """A PixArt pipeline of `diffusers` with random weights.

    With a sample size of 128 its transformer takes the resolution as an input.
    """
    torch.manual_seed(seed)
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(f"▁{word}", -3.0) for word in PROMPT.split()[:3]]
    pieces += [(letter, -5.0) for letter in "abcdefghiklnorstu"]
    tokenizer = T5Tokenizer(vocab=pieces, extra_ids=0)
    text_encoder = T5EncoderModel(T5Config(vocab_size=len(tokenizer), **T5)).eval()
    transformer = PixArtTransformer2DModel(**DIT, sample_size=sample_size)
    pipe = PixArtAlphaPipeline(
        tokenizer=tokenizer,
        vae=randomise(AutoencoderKL(**VAE), seed),
        scheduler=scheduler,
        text_encoder=randomise(text_encoder, seed + 1),
        transformer=randomise(transformer, seed + 2),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(torch.float64)


def in_float64(scheduler, alpha_bar: Tensor = ALPHA_BAR):
    """Gives the peer's scheduler its tables in float64; it makes them in float32."""
    scheduler.alphas_cumprod = alpha_bar
    if hasattr(scheduler, "final_alpha_cumprod"):
        one = torch.ones(()).double()
        scheduler.final_alpha_cumprod = one if scheduler.config.set_alpha_to_one else alpha_bar[0]
    return scheduler


@pytest.fixture
def float32_noise(monkeypatch):
    """Lets the peer's LCM draw its later noise in float32, as ours does."""
    draw = diffusers.schedulers.scheduling_lcm.randn_tensor

    def draw_in_float32(shape, generator, device, dtype):
        noise = draw(shape, generator=generator, device=device, dtype=torch.float32)
        return noise.to(dtype)

    monkeypatch.setattr(diffusers.schedulers.scheduling_lcm, "randn_tensor", draw_in_float32)


def ours_and_theirs(
    pipe,
    base: bases.Base,
    size: tuple[int, int],
    steps: int,
    guidance: float,
    sampler: str,
    control: sample.Control | None = None,
    **options,
) -> tuple[Tensor, Tensor]:
    """Two pictures by sample.py and by the pipeline, in float64 and from the same noise.

    `options` are further arguments of the pipeline.
    """
    seeds = [3, 4]
    ours = sample.text_to_image(
        base,
        PROMPT,
        seeds,
        size,
        steps,
        sampler,
        guidance,
        control=control,
    )
    width, height = size
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    noise = [torch.randn(1, 4, height // 2, width // 2, generator=g) for g in generators]
    theirs = pipe(
        PROMPT,
        width=width,
        height=height,
        latents=torch.cat(noise).double(),
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=generators,
        num_images_per_prompt=2,
        output_type="pt",
        **options,
    ).images
    assert ours.dtype == torch.float64
    assert ((theirs > 0) & (theirs < 1)).double().mean() > 0.1
    return (ours + 1) / 2, theirs


def same_tensors(ours: nn.Module, theirs: nn.Module) -> bool:
    ours = ours.state_dict()
    theirs = theirs.state_dict()
    if ours.keys() != theirs.keys():
        return False
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


# -------------------- PixArt

SCHEDULERS = dict(ddim=DDIMScheduler, lcm=LCMScheduler, dpm=DPMSolverMultistepScheduler)


@pytest.mark.parametrize(
    "kind, sampler, steps, guidance, size, sample_size",
    [
        ("epsilon", "ddim", 1, 1.0, (16, 16), 8),
        ("v_prediction", "ddim", 1, 1.0, (24, 16), 128),
        ("v_prediction", "lcm", 1, 1.0, (16, 16), 8),
        ("epsilon", "ddim", 4, 4.5, (16, 24), 128),
        ("v_prediction", "lcm", 4, 3.0, (16, 16), 128),
        ("epsilon", "dpm", 4, 4.5, (16, 16), 8),
    ],
)
@pytest.mark.usefixtures("exact_norm", "exact_dpm", "float32_noise")
def test_pixart_draws_what_its_pipeline_draws(
    tmp_path, kind, sampler, steps, guidance, size, sample_size,
):
    """The bound for LCM is 1e-7, because the peer's c_skip is in float32.

    T5's norm and the schedule's tables of the peer are lifted to float64.
    """
    options = dict(LINEAR, prediction_type=kind)
    if sampler == "ddim":
        options |= dict(clip_sample=False, timestep_spacing="trailing")
    scheduler = in_float64(SCHEDULERS[sampler](**options), LINEAR_ALPHA_BAR)
    pipe = pixart(scheduler, sample_size)
    pipe.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len([*tmp_path.glob("text_encoder/*.safetensors")]) > 1

    base = bases.load_base(str(tmp_path), bases.parts_of(str(tmp_path)))
    ours, theirs = ours_and_theirs(
        pipe,
        base,
        size,
        steps,
        guidance,
        sampler,
        use_resolution_binning=False,
    )
    assert relative(ours, theirs) < (1e-7 if sampler == "lcm" else 1e-9)


@pytest.fixture(scope="module")
def dit(tmp_path_factory) -> dict[str, Path]:
    """Folders of three PixArts: one at 512 px, another fine-tuned from it, and one at 1024 px."""
    folders = {}
    for i, (name, sample_size) in enumerate({"512": 8, "tuned": 8, "1024": 128}.items()):
        folders[name] = tmp_path_factory.mktemp(name)
        scheduler = DPMSolverMultistepScheduler(**LINEAR)
        pipe = pixart(scheduler, sample_size, seed=10 * i).to(torch.float32)
        pipe.save_pretrained(folders[name])
    return folders


def weights_in(folder: Path, part: str = "transformer") -> dict[str, Tensor]:
    return load_file(folder / part / "diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize(
    "flags, kind, sampler",
    [
        ([], None, "dpm"),
        (["--prediction_type", "v_prediction"], "v_prediction", "dpm"),
        (["--sampler", "lcm", "--steps", "2"], None, "lcm"),
    ],
)
def test_pixart_knows_its_sampler(dit, command, flags, kind, sampler):  # noqa: F811
    status, paths, err = command(PROMPT, "--base", dit["512"], "--size", "16", *flags)
    assert (status, paths) == (0, ["out.png"]), err
    text = Image.open("out.png").text
    assert text["sampler"] == sampler
    assert text.get("prediction_type") == kind


def test_the_kind_of_prediction_changes_the_picture(dit, command):  # noqa: F811
    options = ["--base", dit["512"], "--size", "16"]
    command(PROMPT, *options, "--output", "a.png")
    command(PROMPT, *options, "--output", "b.png", "--prediction_type", "v_prediction")
    assert not torch.equal(levels("a.png"), levels("b.png"))


def test_pixarts_sides_are_multiples_of_twice_the_factor(dit, command):  # noqa: F811
    status, _, err = command(PROMPT, "--base", dit["512"], "--size", "18")
    assert status == 2
    assert "multiples of 4" in err


@torch.no_grad()
def test_a_transformer_alone_is_a_base_with_pixarts_other_parts(
    dit, tmp_path, monkeypatch, command,  # noqa: F811
):
    alone = tmp_path / "yoso_pixart512"
    snapshot = tmp_path / "models--Luo-Yihong--yoso_pixart512" / "snapshots" / "1a2b"
    stage = tmp_path / "stage"
    shutil.copytree(dit["tuned"] / "transformer", alone)
    shutil.copytree(alone, snapshot)
    monkeypatch.setitem(hub.BASES, "pixart512", str(dit["512"]))
    monkeypatch.setitem(hub.BASES, "yoso512", str(alone))
    bases.save_folder(stage, bases.load_base("yoso512", bases.PIXART), rest="yoso512")

    tuned = bases.load_base(str(dit["tuned"]), bases.PIXART)
    plain = bases.load_base(str(dit["512"]), bases.PIXART)
    for name in ("yoso512", str(alone), str(snapshot), str(stage)):
        base = bases.load_base(name, bases.parts_of(name))
        assert base.schedule.prediction_type == "v_prediction"
        assert same_tensors(base.transformer, tuned.transformer)
        assert same_tensors(base.vae, plain.vae)
        assert same_tensors(base.text_encoder, plain.text_encoder)
    assert command(PROMPT, "--base", "yoso512")[0] == 0
    assert Image.open("out.png").text["sampler"] == "lcm"


def test_another_transformer_alone_has_pixarts_schedule_and_says_so(
    dit, tmp_path, monkeypatch, capsys,  # noqa: F811
):
    alone = tmp_path / "alone"
    shutil.copytree(dit["tuned"] / "transformer", alone)
    monkeypatch.setitem(hub.BASES, "pixart512", str(dit["512"]))
    assert bases.load_base(str(alone), ("schedule",)).schedule.prediction_type == "epsilon"
    assert f"{alone} has no scheduler and gets PixArt's" in capsys.readouterr().err


@torch.no_grad()
def test_a_merged_model_is_the_sum_and_keeps_what_only_one_has(dit, command):  # noqa: F811
    formula = f"{dit['tuned']} + {dit['1024']} - {dit['512']}"
    a = weights_in(dit["tuned"])
    b = weights_in(dit["1024"])
    c = weights_in(dit["512"])
    assert b.keys() > a.keys() == c.keys()
    assert any("resolution_embedder" in name for name in b.keys() - a.keys())

    status, paths, err = command("--merge", formula, "--save", "merged")
    assert (status, paths) == (0, ["merged"]), err
    merged = weights_in(Path("merged"))
    assert merged.keys() == b.keys()
    for name, tensor in merged.items():
        expected = a[name] + b[name] - c[name] if name in a else b[name]
        assert torch.equal(tensor, expected), name
    base = bases.load_base("merged", ("transformer",))
    assert base.transformer.config.sample_size == 128
    tuned_vae = weights_in(dit["tuned"], "vae")
    for name, tensor in weights_in(Path("merged"), "vae").items():
        assert torch.equal(tensor, tuned_vae[name])

    # The tests see no GPU, so "meta" stands for another device.
    elsewhere = bases.load_merged(formula, device="meta")
    for network in elsewhere.networks.values():
        assert all(p.is_meta for p in network.parameters())


@torch.no_grad()
@pytest.mark.usefixtures("exact_norm", "exact_dpm")
def test_diffusers_reads_a_written_pixart_and_draws_the_same(dit, tmp_path):
    base = bases.load_base(str(dit["1024"]), bases.PIXART, torch.float64)
    bases.save_folder(tmp_path, base)
    pipe = PixArtAlphaPipeline.from_pretrained(tmp_path, torch_dtype=torch.float64)
    pipe.set_progress_bar_config(disable=True)
    ours, theirs = ours_and_theirs(
        pipe,
        base,
        (16, 16),
        steps=2,
        guidance=3.0,
        sampler="dpm",
        use_resolution_binning=False,
    )
    assert relative(ours, theirs) < 1e-9


# -------------------- LoRA and ControlNets

ATTENTION = "unet.down_blocks.0.attentions.0."
LORA_LAYERS = {
    f"{ATTENTION}transformer_blocks.0.attn1.to_q": (16, 16),
    f"{ATTENTION}transformer_blocks.0.attn2.to_k": (16, 32),
    f"{ATTENTION}transformer_blocks.0.ff.net.0.proj": (128, 16),
    f"{ATTENTION}proj_in": (16, 16, 1, 1),
    "unet.down_blocks.0.resnets.0.conv1": (16, 16, 3, 3),
    "text_encoder.text_model.encoder.layers.1.self_attn.q_proj": (32, 32),
}


def lora_file(path: Path, scale: float = 0.3) -> Path:
    """Writes a random LoRA of rank 4 for the tiny pipeline's U-Net and text encoder."""
    torch.manual_seed(5)
    tensors = {}
    for name, (n_out, *n_in) in LORA_LAYERS.items():
        kernel = [1 for _ in n_in[1:]]
        A = torch.randn(4, *n_in, dtype=torch.float64)
        B = torch.randn(n_out, 4, *kernel, dtype=torch.float64)
        tensors[f"{name}.lora_A.weight"] = scale * A
        tensors[f"{name}.lora_B.weight"] = scale * B
    save_file(tensors, path)
    return path


@pytest.mark.parametrize("steps, strength", [(1, 1.0), (2, 0.5), (4, 1.0)])
@pytest.mark.usefixtures("float32_noise")
def test_a_lora_with_lcm_draws_what_its_pipeline_draws(tmp_path, steps, strength):
    """The bound is 1e-7, because the peer's c_skip is in float32."""
    pipe = tiny_pipeline(scheduler=in_float64(LCMScheduler(**SCHEDULE)))
    pipe.to(torch.float64).save_pretrained(tmp_path)
    base = bases.load_base(str(tmp_path))
    plain = bases.load_base(str(tmp_path))
    file = lora_file(tmp_path / "lora.safetensors")
    bases.load_lora(str(file) if strength == 1 else f"{file}:{strength}", base)
    pipe.load_lora_weights(tmp_path, weight_name="lora.safetensors", adapter_name="one")
    pipe.set_adapters("one", strength)

    ours, theirs = ours_and_theirs(pipe, base, (16, 16), steps, 1.5, "lcm")
    assert relative(ours, theirs) < 1e-7
    without = sample.text_to_image(plain, PROMPT, [3, 4], (16, 16), steps, "lcm", 1.5)
    assert relative(without, 2 * theirs - 1) > 0.01


CONTROL = dict(
    block_out_channels=(16, 32),
    layers_per_block=1,
    norm_num_groups=4,
    cross_attention_dim=32,
    attention_head_dim=4,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    conditioning_embedding_out_channels=(4, 6),
)


@pytest.mark.parametrize("with_lora", [False, True])
def test_a_controlnet_draws_what_its_pipeline_draws(tmp_path, with_lora):
    scheduler = DDIMScheduler(
        **SCHEDULE,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    plain = tiny_pipeline(scheduler=in_float64(scheduler))
    peer = randomise(ControlNetModel(**CONTROL), seed=8)
    pipe = StableDiffusionControlNetPipeline(
        **plain.components,
        controlnet=peer,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.to(torch.float64)
    plain.save_pretrained(tmp_path / "base")
    peer.save_pretrained(tmp_path / "control")

    base = bases.load_base(str(tmp_path / "base"))
    network = bases.load_controlnet(str(tmp_path / "control"), base.unet)
    if with_lora:
        file = lora_file(tmp_path / "lora.safetensors")
        bases.load_lora(str(file), base)
        pipe.load_lora_weights(tmp_path, weight_name=file.name)

    condition = normal(1, 3, 16, 24).sigmoid()
    made = {}
    for scale in (0.7, 0.0):
        made[scale], theirs = ours_and_theirs(
            pipe,
            base,
            (24, 16),
            steps=4,
            guidance=2.0,
            sampler="ddim",
            control=sample.Control(network, condition, scale),
            image=condition,
            controlnet_conditioning_scale=scale,
        )
        assert relative(made[scale], theirs) < 1e-9
    assert relative(made[0.7], made[0.0]) > 0.01


def test_lora_and_controlnet_are_flags_and_their_result_can_be_saved(
    sd, tmp_path, command, monkeypatch,  # noqa: F811
):
    lora = lora_file(tmp_path / "lora.safetensors")
    ControlNetModel.from_config(CONTROL).save_pretrained(tmp_path / "control")
    edges = picture(tmp_path / "edges.png", 19, 13)
    flags = dict(
        plain=[],
        lora=["--lora", lora],
        twice=["--lora", f"{lora}:0.5", "--lora", f"{lora}:0.5"],
        control=["--controlnet", tmp_path / "control", "--control_image", edges],
    )
    for name, own in flags.items():
        assert command(PROMPT, "--base", sd, *own, "--output", f"{name}.png")[0] == 0
    # The size of the control picture.
    assert Image.open("control.png").size == (19, 13)
    with_lora = levels("lora.png")
    assert (with_lora - levels("twice.png")).abs().max() <= 1
    assert (with_lora - levels("plain.png")).abs().max() > 1

    # Editing pads the input to the base's multiple; so the control picture is, and not stretched.
    sizes = []
    make_condition = sample.make_condition

    def watch(picture, size, base):  # noqa: F811
        sizes.append(size)
        return make_condition(picture, size, base)

    monkeypatch.setattr(sample, "make_condition", watch)
    assert command(PROMPT, "--base", sd, *flags["control"], "--input", edges)[0] == 0
    assert sizes == [(19, 13)]

    of_sd15 = CONTROL | dict(conditioning_embedding_out_channels=(4, 8, 8, 8))
    ControlNetModel.from_config(of_sd15).save_pretrained(tmp_path / "factor8")
    other = ["--controlnet", tmp_path / "factor8", "--control_image", edges, "--save", "never"]
    status, _, err = command(PROMPT, "--base", sd, *other)
    assert status == 2 and "is for a VAE of factor 8" in err and "has factor 2" in err
    assert not Path("never").exists()

    status, paths, _ = command("--base", sd, "--lora", lora, "--save", "saved")
    assert (status, paths) == (0, ["saved"])
    command(PROMPT, "--base", "saved", "--output", "again.png")
    assert torch.equal(levels("again.png"), with_lora)


@pytest.mark.parametrize("use", ["draw", "edit"])
def test_the_control_scale_reaches_the_controlnet(sd, tmp_path, command, use):  # noqa: F811
    randomise(ControlNetModel.from_config(CONTROL)).save_pretrained(tmp_path / "control")
    edges = picture(tmp_path / "edges.png", 16, 16)
    plain = [PROMPT, "--base", sd]
    if use == "edit":
        plain += ["--input", edges]
    flags = [*plain, "--controlnet", tmp_path / "control", "--control_image", edges]
    made = {}
    for scale in (0.0, 0.5, 1.0):
        status, _, err = command(*flags, "--control_scale", scale)
        assert status == 0, err
        assert Image.open("out.png").text["control_scale"] == str(scale)
        made[scale] = levels("out.png")
    command(*plain)
    assert (made[0.0] - levels("out.png")).abs().max() <= 1
    assert (made[0.5] - made[0.0]).abs().max() > 1
    assert (made[0.5] - made[1.0]).abs().max() > 1


def test_a_merge_is_summed_in_float32_and_rounded_once():
    """256 + 1/256 is 256 in bfloat16."""
    values = (2**-8, 256.0, 256.0)
    states = [{"w": torch.tensor([value], dtype=torch.bfloat16)} for value in values]
    for dtype in (None, torch.float64):
        merged = bases._merge_states(states, [1, 1, -1], dtype, "cpu")["w"]
        assert merged.item() == 2**-8 and merged.dtype == (dtype or torch.bfloat16)


# -------------------- one-file models

@pytest.fixture(scope="module")
def sd(tmp_path_factory) -> Path:
    """The folder of a small Stable Diffusion."""
    folder = tmp_path_factory.mktemp("sd")
    tiny_pipeline().save_pretrained(folder)
    return folder


def save_family(folder: Path, is_sd2: bool) -> None:
    """Writes a small Stable Diffusion with the structure of SD 1.x or SD 2.x.

    SD 1.x has 1x1 convolutions and 8 heads, SD 2.x linear layers and heads 64 wide.
    """
    unet_sizes = dict(
        UNET,
        block_out_channels=(64, 128),
        norm_num_groups=32,
        attention_head_dim=(1, 2) if is_sd2 else 8,
        use_linear_projection=is_sd2,
    )
    pipe = tiny_pipeline(unet_sizes, dict(VAE, block_out_channels=(32, 64), norm_num_groups=32))
    vocabulary = len(pipe.tokenizer)
    text_config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=56,
        num_hidden_layers=2,
        num_attention_heads=1,
        hidden_act="gelu" if is_sd2 else "quick_gelu",
        eos_token_id=vocabulary - 1,
    )
    pipe.text_encoder = randomise(CLIPTextModel(text_config))
    pipe.unet = randomise(UNet2DConditionModel(**dict(unet_sizes, cross_attention_dim=64)))
    pipe.save_pretrained(folder)


def one_file_tensors(base: bases.Base, is_sd2: bool) -> dict[str, Tensor]:
    """A base's weights in the original layout."""
    file = unet_file(base.unet.config, base.unet.state_dict())
    file |= vae_file(base.vae.config, base.vae.state_dict())
    file |= other_tensors()
    text = base.text_encoder.state_dict()
    if is_sd2:
        file |= open_clip_file(text)
        for name in [*file]:
            # The last block, which SD 2.x does not run.
            if "resblocks.1." in name:
                file[name.replace("resblocks.1.", "resblocks.2.")] = file[name] + 1
    else:
        for name, tensor in text.items():
            file[f"cond_stage_model.transformer.{name}"] = tensor
    return {name: tensor.clone().contiguous() for name, tensor in file.items()}


@torch.no_grad()
@pytest.mark.parametrize("family", ["sd15", "sd21", "sd-turbo"])
def test_a_one_file_model_is_the_folder_it_was_made_from(tmp_path, monkeypatch, family):
    is_sd2 = family != "sd15"
    save_family(tmp_path / family, is_sd2)
    monkeypatch.setitem(hub.BASES, family, str(tmp_path / family))
    folder = bases.load_base(family)
    tensors = one_file_tensors(folder, is_sd2)
    if family == "sd-turbo":
        stem = "conditioner.embedders.0."
        tensors = {key.replace("cond_stage_model.", stem): t for key, t in tensors.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    torch.save({"state_dict": tensors}, tmp_path / "model.ckpt")

    for name in ("model.safetensors", "model.ckpt"):
        base = bases.load_base(str(tmp_path / name))
        for part in ("vae", "unet", "text_encoder"):
            assert same_tensors(getattr(base, part), getattr(folder, part))
        # As the result of a training stage is saved.
        stage_folder = tmp_path / name.replace(".", "-")
        bases.save_folder(stage_folder, base, rest=str(tmp_path / name))
        stage = bases.load_base(str(stage_folder))
        made = []
        for one in (base, folder, stage):
            made.append(sample.text_to_image(one, PROMPT, [1], (16, 16), 2, guidance=2.0))
        assert torch.equal(made[0], made[1])
        assert torch.equal(made[0], made[2])


@pytest.mark.parametrize("spread, predicted", [(0.2, "v_prediction"), (0.05, "epsilon")])
def test_a_bias_tells_what_a_one_file_model_of_sd2_predicts(
    tmp_path, monkeypatch, capsys, spread, predicted
):
    save_family(tmp_path / "sd21", is_sd2=True)
    monkeypatch.setitem(hub.BASES, "sd21", str(tmp_path / "sd21"))
    tensors = one_file_tensors(bases.load_base("sd21"), is_sd2=True)
    # The small network has not so many blocks.
    name = next(key for key in tensors if key.endswith("transformer_blocks.0.norm1.bias"))
    monkeypatch.setattr(bases, "SD2_BIAS", name)
    tensors[name] = spread * torch.tensor([-1.0, 1.0]).repeat(len(tensors[name]) // 2)
    path = str(tmp_path / "model.safetensors")
    save_file(tensors, path)
    assert bases.load_base(path).schedule.prediction_type == predicted
    assert f"{path} is taken for a model that predicts {predicted}" in capsys.readouterr().err


# -------------------- schedulers

def write_scheduler(folder: Path, name: str, **settings) -> None:
    """Gives a base another scheduler, with only these settings written down."""
    index_file = folder / "model_index.json"
    index = json.loads(index_file.read_text())
    index["scheduler"] = ["diffusers", name]
    index_file.write_text(json.dumps(index))
    config = dict(settings, _class_name=name)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))


@pytest.fixture
def folder(sd, tmp_path) -> Path:
    """A copy of the small Stable Diffusion, to be given other schedulers."""
    return Path(shutil.copytree(sd, tmp_path / "base"))


# What SD-Turbo's file says beside the betas; three of the settings are of other classes.
TURBO = dict(
    SCHEDULE,
    clip_sample=False,
    set_alpha_to_one=False,
    skip_prk_steps=True,
    steps_offset=1,
    timestep_spacing="trailing",
)
KARRAS = dict(SCHEDULE, use_karras_sigmas=True)
OLD_DDIM = dict(SCHEDULE, set_alpha_to_one=False)
LEADING = dict(SCHEDULE, timestep_spacing="leading")
DPM = "DPMSolverMultistepScheduler"
EULER = "EulerDiscreteScheduler"
# A scheduler with all its settings, steps, and how far from the pipeline's picture the one was
# before these settings were read (relative; None: a traceback).
SCHEDULER_FILES = {
    "Euler's spacing": (EULER, SCHEDULE, 4, 1.3e-1),
    "Euler, leading": (EULER, LEADING, 6, 2.7e-2),
    "Euler with Karras's sigmas": (EULER, KARRAS, 6, 8.8e-2),
    "SD-Turbo": (EULER, TURBO, 4, 1.0e-3),
    "SD-Turbo in one step": (EULER, TURBO, 1, 1.2e-3),
    "DPM-Solver's spacing": (DPM, SCHEDULE, 6, 7.3e-2),
    "DPM-Solver with Karras's sigmas": (DPM, KARRAS, 6, 8.7e-2),
    "DDIM from before steps_offset": ("DDIMScheduler", OLD_DDIM, 4, 2.8e-2),
    "DDIM without an offset": ("DDIMScheduler", dict(OLD_DDIM, steps_offset=None), 4, None),
    "LCM's betas": ("LCMScheduler", {}, 2, 1.1e-1),
    "LCM of 20 timesteps": ("LCMScheduler", dict(original_inference_steps=20), 3, 2.2e-1),
    "LCM's factor": ("LCMScheduler", dict(timestep_scaling=0.001), 2, 1.3e-1),
}


@pytest.mark.parametrize(
    "name, settings, steps, before", SCHEDULER_FILES.values(), ids=SCHEDULER_FILES.keys()
)
def test_a_scheduler_is_read_as_its_pipeline_reads_it(
    folder, float32_noise, name, settings, steps, before
):
    """The bound is 1e-5, because the peer's tables are in float32."""
    write_scheduler(folder, name, **settings)
    pipe = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float64)
    pipe.set_progress_bar_config(disable=True)
    base = bases.load_base(str(folder), dtype=torch.float64)
    ours, theirs = ours_and_theirs(pipe, base, (16, 16), steps, 2.0, sampler=None)
    assert relative(ours, theirs) < 1e-5
    assert before is None or before > 1e-4


# Schedulers that are not built, flags, and the sampler that stands in for them.
STANDING_IN = [
    ("PNDMScheduler", {}, [], "ddim"),
    ("DDPMScheduler", {}, [], "ddim"),
    ("EulerAncestralDiscreteScheduler", {}, [], "euler"),
    ("EulerAncestralDiscreteScheduler", {}, ["--steps", 3], "euler"),
    ("EulerAncestralDiscreteScheduler", {}, ["--sampler", "ddim"], None),
    ("HeunDiscreteScheduler", {}, ["--steps", 3], "euler"),
    ("UniPCMultistepScheduler", {}, ["--steps", 3], "dpm"),
    ("UniPCMultistepScheduler", {}, ["--sampler", "euler", "--steps", 3], None),
    ("DPMSolverSinglestepScheduler", {}, ["--steps", 3], "dpm"),
    (
        "DPMSolverMultistepScheduler",
        dict(algorithm_type="sde-dpmsolver++"),
        ["--steps", 3],
        "dpm",
    ),
    ("TCDScheduler", {}, ["--steps", 2], "lcm"),
    ("EulerDiscreteScheduler", {}, ["--steps", 2], None),
    ("LCMScheduler", {}, ["--steps", 2], None),
]


@pytest.mark.parametrize("name, settings, flags, sampler", STANDING_IN)
def test_a_sampler_that_stands_in_is_named_in_one_line(
    folder, command, name, settings, flags, sampler,  # noqa: F811
):
    write_scheduler(folder, name, **SCHEDULE, **settings)
    status, paths, err = command(PROMPT, "--base", folder, *flags)
    assert (status, paths) == (0, ["out.png"]), err
    lines = [line for line in err.splitlines() if "stands in" in line]
    if sampler is None:
        assert lines == []
        return
    (line,) = lines
    assert str(folder) in line
    assert name in line
    assert f"the sampler {sampler} stands in" in line
    assert Image.open("out.png").text["sampler"] == sampler


TEN = dict(SCHEDULE, num_train_timesteps=10)
DDIM = "DDIMScheduler"
LCM = "LCMScheduler"
UNIPC = "UniPCMultistepScheduler"
EXPONENTIAL = dict(SCHEDULE, use_exponential_sigmas=True)
OFFSET = dict(LEADING, steps_offset=1)
# A scheduler with its settings, steps, and words of the error. The groups say what came before.
UNDRAWABLE = {
    # An IndexError.
    "all steps, with an offset": (DDIM, OFFSET, 1000, ["steps_offset of 1", "1000 to 1"]),
    "all of 10 steps": (DDIM, OFFSET | TEN, 10, ["steps_offset of 1", "10 to 1"]),
    "Euler, all steps": (EULER, OFFSET, 1000, ["steps_offset of 1", "take fewer steps"]),
    "DPM-Solver, all steps": (DPM, OFFSET, 1000, ["steps_offset of 1", "take fewer steps"]),
    # A picture of the timestep -1 alone.
    "LCM of 10 timesteps": (LCM, TEN, 2, ["original_inference_steps is 50", "10"]),
    "LCM of 10 timesteps in one step": (LCM, TEN, 1, ["original_inference_steps is 50", "10"]),
    # A picture, as if the setting were not there.
    "third order": (DPM, dict(SCHEDULE, solver_order=3), 4, ["solver_order is 3", "--sampler"]),
    "first order": (DPM, dict(SCHEDULE, solver_order=1), 4, ["solver_order is 1", "--sampler"]),
    "thresholding": (DPM, dict(SCHEDULE, thresholding=True), 1, ["thresholding is True", "dpm"]),
    "exponential sigmas": (EULER, EXPONENTIAL, 4, ["use_exponential_sigmas is True", "euler"]),
    "a sampler that stands in": (UNIPC, EXPONENTIAL, 4, ["use_exponential_sigmas is True", "dpm"]),
    "noise left": (EULER, dict(SCHEDULE, final_sigmas_type="sigma_min"), 1, ["is 'sigma_min'"]),
    # A picture by DDIM.
    "flow matching": ("FlowMatchEulerDiscreteScheduler", {}, 1, ["for flow matching"]),
    "EDM": ("EDMEulerScheduler", {}, 1, ["EDMEulerScheduler", "not supported"]),
    "one's own": ("MyScheduler", {}, 1, ["MyScheduler", "not supported"]),
    # A line that shows Python's TypeError or None without what was expected; the last a picture.
    "no betas": ("PNDMScheduler", dict(SCHEDULE, beta_start=None), 1, ["beta_start is None"]),
    "no timesteps": (DDIM, dict(num_train_timesteps=None), 1, ["num_train_timesteps is None"]),
    "no spacing": (EULER, dict(SCHEDULE, timestep_spacing=None), 4, ["timestep_spacing is None"]),
    "no prediction": (LCM, dict(prediction_type=None), 1, ["prediction_type is None"]),
    "no factor": (LCM, dict(timestep_scaling=None), 1, ["timestep_scaling is None"]),
    # As now.
    "20 of 10 steps": (DDIM, TEN, 20, ["20 steps", "1 to 10"]),
    "20 of Euler's 10 steps": (EULER, TEN, 20, ["20 steps", "1 to 10"]),
    "20 of DPM-Solver's 10 steps": (DPM, TEN, 20, ["20 steps", "1 to 10"]),
}


@pytest.mark.parametrize(
    "name, settings, steps, says", UNDRAWABLE.values(), ids=UNDRAWABLE.keys()
)
def test_a_scheduler_that_cannot_be_followed_is_refused_in_one_line(
    folder, command, name, settings, steps, says,  # noqa: F811
):
    write_scheduler(folder, name, **settings)
    status, out, err = command(PROMPT, "--base", folder, "--steps", steps)
    assert (status, out) == (2, []), err
    (line,) = [line for line in err.splitlines() if "error" in line]
    assert "expected" in line
    assert all(words in line for words in says), line
    assert not any(Path().iterdir())


def test_what_is_not_built_for_a_sampler_hinders_no_other(folder, command):  # noqa: F811
    write_scheduler(folder, DPM, **SCHEDULE, solver_order=3)
    for sampler in ("ddim", "euler", "lcm"):
        flags = ["--base", folder, "--steps", 2, "--sampler", sampler]
        status, _, err = command(PROMPT, *flags)
        assert status == 0, err
    # Nor does it hinder a single step, or what draws nothing.
    assert command(PROMPT, "--base", folder)[0] == 0
    assert command("--base", folder, "--save", "copy")[0] == 0


def test_the_flag_decides_on_the_settings_too(folder, command):  # noqa: F811
    write_scheduler(folder, DDIM, **SCHEDULE, use_lu_lambdas=True, num_train_timesteps=40)
    assert command(PROMPT, "--base", folder, "--steps", 2)[0] == 0
    for sampler, says in [("dpm", "use_lu_lambdas"), ("lcm", "original_inference_steps is 50")]:
        flags = ["--base", folder, "--steps", 2, "--sampler", sampler]
        status, _, err = command(PROMPT, *flags)
        assert status == 2
        assert says in err


# -------------------- editing and priors

@torch.no_grad()
def test_an_edited_picture_leaves_its_input_as_strength_grows_and_forgets_it_at_1(sd):
    base = bases.load_base(str(sd), dtype=torch.float64)
    pictures = normal(4, 3, 16, 16, seed=1).sigmoid()
    other = normal(4, 3, 16, 16, seed=2).sigmoid()
    seeds = [7, 8, 9, 10]

    def edited(source: Tensor, strength: float) -> Tensor:
        return sample.text_to_image(
            base,
            PROMPT,
            seeds,
            (16, 16),
            1,
            "lcm",
            pictures=source,
            strength=strength,
        )

    # The least that editing changes: the VAE's reconstruction.
    least = base.vae.decode(base.vae.encode(2 * pictures - 1)[0])
    distances = []
    for strength in (0.02, 0.2, 0.4, 0.6, 0.8, 1.0):
        difference = edited(pictures, strength) - least
        distances.append(difference.square().mean().item())
    assert distances == sorted(distances)
    assert distances[0] < distances[-1] / 2

    drawn = sample.text_to_image(base, PROMPT, seeds, (16, 16), 1, "lcm")
    assert torch.equal(edited(pictures, 1.0), edited(other, 1.0))
    assert torch.equal(edited(pictures, 1.0), drawn)
    assert not torch.equal(edited(pictures, 0.8), edited(other, 0.8))


def test_editing_takes_pictures_of_any_size_and_folders(sd, tmp_path, command):  # noqa: F811
    picture(tmp_path / "in" / "a.png", 16, 16, seed=0)
    picture(tmp_path / "in" / "b.png", 9, 21, seed=1)
    flags = ["--base", sd, "--input", tmp_path / "in", "--steps", 2]
    status, paths, err = command(PROMPT, *flags)
    assert (status, paths) == (0, ["out/a.png", "out/b.png"]), err
    assert [Image.open(path).size for path in paths] == [(16, 16), (9, 21)]
    assert Image.open(paths[0]).text["strength"] == "0.6"


def test_a_priors_statistics_are_numpys_and_its_noise_is_the_second_draw(
    sd, tmp_path, command, monkeypatch,  # noqa: F811
):
    photos = tmp_path / "photos"
    for seed in range(5):
        picture(photos / f"{seed}.png", 20, 16, seed)
    argv = ["python -m dataset", "prior", str(photos), "--base", str(sd), "--size", "16"]
    monkeypatch.setattr(sys, "argv", [*argv, "--output", "prior.safetensors"])
    dataset_main.main()

    base = bases.load_base(str(sd))
    latents = []
    for path in sorted(photos.iterdir()):
        cropped = open_picture(path).crop((2, 0, 18, 16))
        with torch.no_grad():
            latent, _, _ = base.vae.encode(2 * to_tensor(cropped)[None] - 1)
        latents.append(latent)
    z = torch.cat(latents).double().numpy() * 0.18215
    mean, std = bases.load_prior(Path("prior.safetensors"), (4, 8, 8))
    assert relative(mean.double(), torch.tensor(z.mean(0))) < 1e-5
    assert relative(std.double(), torch.tensor(z.std(0))) < 1e-5

    made = sample.text_to_image(base, PROMPT, [7], (16, 16), sampler="lcm", prior=(mean, std))
    generator = torch.Generator().manual_seed(7)
    noise = torch.randn(1, 4, 8, 8, generator=generator)
    prior_noise = torch.randn(1, 4, 8, 8, generator=generator)
    alpha = base.schedule.alpha[999].float()
    sigma = base.schedule.sigma[999].float()
    x = alpha * (mean + std * prior_noise) + sigma * noise
    with torch.no_grad():
        context = base.text_encoder(base.tokenizer(PROMPT))
        eps = base.unet(x, 999, context)
        x0 = diffusion.predict_x0(eps, x, 999, base.schedule, "epsilon")
        expected = base.vae.decode(x0 / 0.18215).clamp(-1, 1)
    assert relative(made, expected) < 1e-4

    flags = ["--prior", "prior.safetensors", "--sampler", "lcm", "--seed", 7]
    assert command(PROMPT, "--base", sd, *flags)[0] == 0
    assert ((made[0] + 1) * 127.5 - levels("out.png")).abs().max() <= 0.5 + 1e-2


def test_all_edits_of_a_folder_have_the_same_noise_in_a_batch_too(
    sd, tmp_path, command,  # noqa: F811
):
    for seed, name in enumerate("abc"):
        picture(tmp_path / "in" / f"{name}.png", 16, 16, seed=seed)
    flags = [PROMPT, "--base", sd, "--input"]
    status, paths, err = command(*flags, tmp_path / "in", "--batch", 3, "--output", "made")
    assert status == 0 and len(paths) == 3, err
    for path in paths:
        command(*flags, tmp_path / "in" / Path(path).name, "--output", "alone.png")
        assert (levels("alone.png") - levels(path)).abs().max() <= 1


def test_an_edit_follows_guidance_and_the_negative_prompt(sd, tmp_path, command):  # noqa: F811
    source = picture(tmp_path / "in.png", 16, 16)
    base = bases.load_base(str(sd))
    x = to_tensor(open_picture(source))[None]
    made = []
    for negative in ("", "green"):
        flags = ["--guidance", 3, "--negative", negative, "--steps", 2]
        status, _, err = command(PROMPT, "--base", sd, "--input", source, *flags)
        assert status == 0, err
        how = dict(steps=2, guidance=3.0, negative=negative, strength=0.6)
        edited = sample.text_to_image(base, PROMPT, [42], (16, 16), pictures=x, **how)
        made.append(levels("out.png"))
        assert ((edited[0] + 1) * 127.5 - made[-1]).abs().max() <= 0.5 + 1e-2
    assert not torch.equal(*made)


# -------------------- errors

class Code:
    """Unpickling it makes a folder."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


@pytest.fixture
def wrong_files(sd, dit, tmp_path) -> dict[str, Path]:
    """Files for the table below, by their names there."""
    lora = load_file(lora_file(tmp_path / "lora.safetensors"))
    for name, tensor in [*lora.items()]:
        if name.endswith("to_q.lora_A.weight"):
            lora[name] = torch.cat([tensor, tensor], 1)
    save_file(lora, tmp_path / "other.safetensors")
    save_file({"words": torch.ones(2, 3, 4)}, tmp_path / "nothing.safetensors")

    torch.save({"state_dict": Code()}, tmp_path / "code.ckpt")
    torch.save(Code(), tmp_path / "code.pt")
    xl = {
        "conditioner.embedders.0.transformer.text_model.x": torch.ones(1),
        "model.diffusion_model.input_blocks.0.0.weight": torch.ones(1),
        "first_stage_model.encoder.conv_in.weight": torch.ones(1),
    }
    save_file(xl, tmp_path / "xl.safetensors")

    wide = randomise(ControlNetModel(**dict(CONTROL, cross_attention_dim=40)))
    wide.save_pretrained(tmp_path / "wide")
    ControlNetModel(**CONTROL).save_pretrained(tmp_path / "control")
    small_prior = {"mean": torch.zeros(4, 4, 4), "std": torch.ones(4, 4, 4)}
    save_file(small_prior, tmp_path / "prior.safetensors")
    picture(tmp_path / "in.png", 16, 16)

    shards = tmp_path / "shards"
    pipe = pixart(DPMSolverMultistepScheduler(**LINEAR))
    pipe.save_pretrained(shards, max_shard_size="20KB")
    sorted((shards / "text_encoder").glob("*-of-*"))[1].unlink()

    files = {path.name: path for path in tmp_path.iterdir()}
    return dict(B=sd, D=dit["512"], E=dit["1024"]) | files


# What is asked for, and words that the error must have. B is a Stable Diffusion, D a PixArt.
REFUSED = {
    "a T5 shard missing": (
        ["--base", "shards"],
        ["text_encoder/model-00002-of-", "all 7 shards"],
    ),
    "a LoRA for another base": (
        ["--base", "B", "--lora", "other.safetensors"],
        ["other.safetensors", "attn1.to_q", "[4, 32]", "[4, 16]", "expected a LoRA for the base"],
    ),
    "a LoRA for a U-Net on PixArt": (
        ["--base", "D", "--lora", "lora.safetensors"],
        ["lora.safetensors", "transformer"],
    ),
    "a LoRA of nothing": (
        ["--base", "B", "--lora", "nothing.safetensors"],
        ["nothing.safetensors", "words"],
    ),
    "a LoRA that is not there": (
        ["--base", "B", "--lora", "none.safetensors:0.5"],
        ["no none.safetensors", "a LoRA"],
    ),
    "a LoRA with code": (["--base", "B", "--lora", "code.pt"], ["code.pt", "code in it"]),
    "a ControlNet of another width": (
        ["--base", "B", "--controlnet", "wide", "--control_image", "in.png"],
        ["wide/config.json", "cross_attention_dim is 40", "32"],
    ),
    "a ControlNet on PixArt": (
        ["--base", "D", "--controlnet", "control", "--control_image", "in.png"],
        ["is PixArt"],
    ),
    "a ControlNet that is a base": (
        ["--base", "B", "--controlnet", "B", "--control_image", "in.png"],
        ["config.json"],
    ),
    "a ControlNet in one file": (
        ["--base", "B", "--controlnet", "lora.safetensors", "--control_image", "in.png"],
        ["lora.safetensors is a file", "a ControlNet's folder"],
    ),
    "a ControlNet without picture": (
        ["--base", "B", "--controlnet", "control"],
        ["--control_image", "both"],
    ),
    "a one-file model of another family": (
        ["--base", "xl.safetensors"],
        ["xl.safetensors", "cond_stage_model", "1.x"],
    ),
    "a one-file model with code": (["--base", "code.ckpt"], ["code.ckpt", "code in it"]),
    "a one-file model that is a LoRA": (
        ["--base", "lora.safetensors"],
        ["lora.safetensors", "model.diffusion_model"],
    ),
    "a prior of another size": (
        ["--base", "B", "--prior", "prior.safetensors"],
        ["prior.safetensors", "[4, 4, 4]", "[4, 8, 8]"],
    ),
    "a prior that is a LoRA": (
        ["--base", "B", "--prior", "lora.safetensors"],
        ["lora.safetensors", "mean"],
    ),
    "a merge of unlike models": (["--merge", "B + D"], ["has no unet/config.json"]),
    "a merge with a word": (["--merge", "B + none"], ["none is no folder"]),
    "a merge and a base": (["--base", "B", "--merge", "B + B"], ["leave --base out"]),
    "editing without strength": (
        ["--base", "B", "--input", "in.png", "--strength", "0"],
        ["--strength 0.0", "above 0"],
    ),
    "strength of a prompt": (
        ["--base", "B", "--strength", "0.5"],
        ["--strength has no meaning without --input"],
    ),
    "many edits of one picture": (
        ["--base", "B", "--input", "in.png", "--n", "2"],
        ["--n has no meaning with --input"],
    ),
    "another prediction": (
        ["--base", "B", "--prediction_type", "x0"],
        ["--prediction_type", "v_prediction"],
    ),
}


@pytest.mark.parametrize("arguments, says", REFUSED.values(), ids=REFUSED.keys())
def test_an_error_is_one_line_and_nothing_is_written(
    wrong_files, command, arguments, says,  # noqa: F811
):
    named = []
    for argument in arguments:
        words = [str(wrong_files.get(word, word)) for word in argument.split(" ")]
        named.append(" ".join(words))
    status, out, err = command(PROMPT, *named)
    assert (status, out) == (2, []), err
    assert err.startswith("sample.py: error: "), err
    assert err.count("\n") == 1, err
    assert all(words in err for words in says), err
    assert not any(Path().iterdir())


# -------------------- memory

# Loads a text encoder and prints by how many bytes the peak of the process's own memory exceeds the
# network, and the size of the largest tensor.
LOAD = """
import sys, threading, time
import torch
from files import bases


def anonymous():  # in kB
    lines = open("/proc/self/status")
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1])

torch.zeros(1).to(torch.bfloat16)
before = anonymous()
peak = [0]
done = False

def watch():
    while not done:
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.002)

thread = threading.Thread(target=watch)
thread.start()
network = bases.load_base(sys.argv[1], ("text_encoder",), torch.bfloat16).text_encoder
done = True
thread.join()
sizes = [p.numel() * p.element_size() for p in network.parameters()]
print(1024 * (peak[0] - before) - sum(sizes), max(sizes))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's memory counts")
def test_loading_a_sharded_t5_needs_memory_for_itself_and_one_tensor(tmp_path):
    """2.3 GB of float32 in four shards, loaded as bfloat16. The rest of the bound is the
    allocator's."""
    sizes = dict(
        T5,
        d_model=2048,
        d_kv=64,
        num_heads=32,
        d_ff=5120,
        num_layers=12,
        vocab_size=8192,
    )
    folder = tmp_path / "text_encoder"
    folder.mkdir()
    (tmp_path / "model_index.json").write_text(json.dumps({"transformer": []}))
    (folder / "config.json").write_text(json.dumps(dict(sizes, model_type="t5")))

    known = vars(t5.T5Config())
    config = t5.T5Config(**{name: value for name, value in sizes.items() if name in known})
    with torch.device("meta"):
        shapes = [*t5.T5Encoder(config).state_dict().items()]
    assert sum(4 * t.numel() for _, t in shapes) > 2e9
    index = {}
    for i in range(4):
        shard = f"model-{i + 1:05}-of-00004.safetensors"
        own = {name: torch.rand(t.shape) for name, t in shapes[i::4]}
        save_file(own, folder / shard)
        index |= dict.fromkeys(own, shard)
    index_text = json.dumps(dict(weight_map=index))
    (folder / "model.safetensors.index.json").write_text(index_text)

    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(tmp_path)],
        cwd=hub.ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    over, largest = map(int, done.stdout.split())
    assert over < 2 * largest + 64e6

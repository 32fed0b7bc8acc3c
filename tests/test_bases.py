"""Other bases and what is put on them draw what the `diffusers` pipelines draw: PixArt, LoRA, ControlNets, one-file
models, merged models; editing and priors do what they say; what is wrong with a file is one line."""

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
    UNet2DConditionModel,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from test_diffusion import exact_dpm  # noqa: F401 (a fixture)
from test_original_layout import open_clip_file, others, unet_file, vae_file
from test_sample import ALPHA_BAR, PROMPT, command, levels, picture  # noqa: F401
from test_t5 import exact_norm  # noqa: F401
from test_weights import SCHEDULE, UNET, VAE, tiny_pipeline
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel, T5Tokenizer

import sample
from dataset import __main__
from dataset.pictures import open_picture, to_tensor
from files import bases, hub
from models import diffusion, t5

pytestmark = pytest.mark.usefixtures("one_thread")

LINEAR = dict(beta_schedule="linear", beta_start=0.0001, beta_end=0.02)
LINEAR_ALPHA_BAR = (1 - torch.linspace(0.0001, 0.02, 1000, dtype=torch.float64)).cumprod(0)
T5 = dict(d_model=24, d_kv=8, d_ff=40, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu")
DIT = dict(num_attention_heads=3, attention_head_dim=8, num_layers=2, cross_attention_dim=24, caption_channels=24,
           out_channels=8, norm_type="ada_norm_single", num_embeds_ada_norm=1000)


def pixart(scheduler, sample_size: int = 8, seed: int = 0) -> PixArtAlphaPipeline:
    """A whole PixArt pipeline of the peers, every weight drawn; 128 is told its resolution."""
    torch.manual_seed(seed)
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(f"▁{word}", -3.0) for word in PROMPT.split()[:3]] + [(letter, -5.0) for letter in "abcdefghiklnorstu"]
    tokenizer = T5Tokenizer(vocab=pieces, extra_ids=0)
    pipe = PixArtAlphaPipeline(
        tokenizer=tokenizer, vae=randomise(AutoencoderKL(**VAE), seed), scheduler=scheduler,
        text_encoder=randomise(T5EncoderModel(T5Config(vocab_size=len(tokenizer), **T5)).eval(), seed + 1),
        transformer=randomise(PixArtTransformer2DModel(**DIT, sample_size=sample_size), seed + 2))
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(torch.float64)


def fine(scheduler, alpha_bar: Tensor = ALPHA_BAR):
    """The peer's tables in float64: it makes them in float32."""
    scheduler.alphas_cumprod = alpha_bar
    if hasattr(scheduler, "final_alpha_cumprod"):
        scheduler.final_alpha_cumprod = torch.ones(()).double() if scheduler.config.set_alpha_to_one else alpha_bar[0]
    return scheduler


@pytest.fixture
def float32_noise(monkeypatch):
    """LCM's later noise drawn in float32, as ours is."""
    draw = diffusers.schedulers.scheduling_lcm.randn_tensor
    monkeypatch.setattr(diffusers.schedulers.scheduling_lcm, "randn_tensor", lambda shape, generator, device, dtype:
                        draw(shape, generator=generator, device=device, dtype=torch.float32).to(dtype))


def ours_and_theirs(pipe, base: bases.Base, size: tuple[int, int], steps: int, guidance: float, sampler: str,
                    control: sample.Control | None = None, **theirs) -> tuple[Tensor, Tensor]:
    """Two pictures by sample.py and by the pipeline, in float64, of the same noise."""
    seeds = [3, 4]
    ours = sample.text_to_image(base, PROMPT, seeds, size, steps, sampler, guidance, control=control)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    noise = torch.cat([torch.randn(1, 4, size[1] // 2, size[0] // 2, generator=g) for g in generators]).double()
    made = pipe(PROMPT, width=size[0], height=size[1], latents=noise, num_inference_steps=steps,
                guidance_scale=guidance, generator=generators, num_images_per_prompt=2, output_type="pt", **theirs)
    assert ours.dtype == torch.float64 and ((0 < made.images) & (made.images < 1)).double().mean() > 0.1
    return (ours + 1) / 2, made.images


# ------------------------------------------------------------------------------------------------------------- PixArt


@pytest.mark.parametrize("kind, sampler, steps, guidance, size, sample_size", [
    ("epsilon", "ddim", 1, 1.0, (16, 16), 8), ("v_prediction", "ddim", 1, 1.0, (24, 16), 128),
    ("v_prediction", "lcm", 1, 1.0, (16, 16), 8), ("epsilon", "ddim", 4, 4.5, (16, 24), 128),
    ("v_prediction", "lcm", 4, 3.0, (16, 16), 128), ("epsilon", "dpm", 4, 4.5, (16, 16), 8),
])
def test_pixart_draws_what_its_pipeline_draws(tmp_path, exact_norm, exact_dpm, float32_noise, kind, sampler, steps,  # noqa: F811
                                              guidance, size, sample_size):
    """Within 1e-9; LCM's 1e-7: the peer's c_skip is in float32. T5's norm and the tables are lifted to float64."""
    options = dict(LINEAR, prediction_type=kind)
    cls = dict(ddim=DDIMScheduler, lcm=LCMScheduler, dpm=DPMSolverMultistepScheduler)[sampler]
    scheduler = cls(**options, **dict(clip_sample=False, timestep_spacing="trailing") if sampler == "ddim" else {})
    pipe = pixart(fine(scheduler, LINEAR_ALPHA_BAR), sample_size)
    pipe.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len([*tmp_path.glob("text_encoder/*.safetensors")]) > 1
    base = bases.load_base(str(tmp_path), bases.parts_of(str(tmp_path)))
    ours, theirs = ours_and_theirs(pipe, base, size, steps, guidance, sampler, use_resolution_binning=False)
    assert relative(ours, theirs) < (1e-7 if sampler == "lcm" else 1e-9)


@pytest.fixture(scope="module")
def dit(tmp_path_factory) -> dict[str, Path]:
    """Folders: a PixArt at 512, another fine-tuned from it, one at 1024."""
    folders = {}
    for i, (name, sample_size) in enumerate({"512": 8, "tuned": 8, "1024": 128}.items()):
        folders[name] = tmp_path_factory.mktemp(name)
        pixart(DPMSolverMultistepScheduler(**LINEAR), sample_size, seed=10 * i).to(torch.float32).save_pretrained(
            folders[name])
    return folders


def test_pixart_knows_its_sampler_and_has_sides_of_twice_the_factor(dit, command):  # noqa: F811
    for flags, kind, sampler in [([], None, "dpm"), (["--prediction_type", "v_prediction"], "v_prediction", "dpm"),
                                 (["--sampler", "lcm", "--steps", "2"], None, "lcm")]:
        name = f"{len(flags)}.png"
        status, paths, err = command(PROMPT, "--base", dit["512"], "--size", "16", "--output", name, *flags)
        assert (status, paths) == (0, [name]), err
        text = Image.open(name).text
        assert (text["sampler"], text.get("prediction_type")) == (sampler, kind)
    assert not torch.equal(levels("0.png"), levels("2.png"))
    status, _, err = command(PROMPT, "--base", dit["512"], "--size", "18")
    assert status == 2 and "multiples of 4" in err


@torch.no_grad()
def test_a_transformer_alone_is_a_base_with_pixarts_other_parts(dit, tmp_path, monkeypatch, command):  # noqa: F811
    shutil.copytree(dit["tuned"] / "transformer", tmp_path / "alone")
    monkeypatch.setitem(hub.BASES, "pixart512", str(dit["512"]))
    monkeypatch.setitem(hub.BASES, "yoso512", str(tmp_path / "alone"))
    bases.save_folder(tmp_path / "stage", bases.load_base("yoso512", bases.PIXART), rest="yoso512")
    for name, kind in [("yoso512", "v_prediction"), (str(tmp_path / "alone"), "v_prediction"),
                       (str(tmp_path / "stage"), "v_prediction")]:
        base = bases.load_base(name, bases.parts_of(name))
        assert base.schedule.prediction_type == kind
    tuned, plain = (bases.load_base(str(dit[name]), bases.PIXART) for name in ("tuned", "512"))
    for part, other in [("transformer", tuned), ("vae", plain), ("text_encoder", plain)]:
        ours, theirs = getattr(base, part).state_dict(), getattr(other, part).state_dict()
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert command(PROMPT, "--base", "yoso512")[0] == 0
    assert Image.open("out.png").text["sampler"] == "lcm"


@torch.no_grad()
def test_a_merged_model_is_the_sum_and_takes_what_one_alone_has(dit, command):  # noqa: F811
    formula = f"{dit['tuned']} + {dit['1024']} - {dit['512']}"
    a, b, c = (load_file(dit[name] / "transformer" / "diffusion_pytorch_model.safetensors")
               for name in ("tuned", "1024", "512"))
    assert b.keys() > a.keys() == c.keys() and any("resolution_embedder" in name for name in b.keys() - a.keys())
    status, paths, err = command("--merge", formula, "--save", "merged")
    assert (status, paths) == (0, ["merged"]), err
    merged = load_file("merged/transformer/diffusion_pytorch_model.safetensors")
    assert merged.keys() == b.keys()
    for name, tensor in merged.items():
        assert torch.equal(tensor, a[name] + b[name] - c[name] if name in a else b[name]), name
    assert bases.load_base("merged", ("transformer",)).transformer.config.sample_size == 128
    assert all(torch.equal(t, load_file(dit["tuned"] / "vae" / "diffusion_pytorch_model.safetensors")[name])
               for name, t in load_file("merged/vae/diffusion_pytorch_model.safetensors").items())
    elsewhere = bases.load_merged(formula, device="meta")  # no GPU here
    assert all(p.is_meta for network in elsewhere.networks.values() for p in network.parameters())


@torch.no_grad()
def test_diffusers_reads_a_written_pixart_and_draws_the_same(dit, tmp_path, exact_norm, exact_dpm):  # noqa: F811
    base = bases.load_base(str(dit["1024"]), bases.PIXART, torch.float64)
    bases.save_folder(tmp_path, base)
    pipe = PixArtAlphaPipeline.from_pretrained(tmp_path, torch_dtype=torch.float64)
    pipe.set_progress_bar_config(disable=True)
    ours, theirs = ours_and_theirs(pipe, base, (16, 16), 2, 3.0, "dpm", use_resolution_binning=False)
    assert relative(ours, theirs) < 1e-9


# --------------------------------------------------------------------------------------------- LoRA and ControlNets


def lora_file(path: Path, scale: float = 0.3) -> Path:
    """For the tiny Stable Diffusion: attention, feed-forward, a convolution, the text encoder."""
    torch.manual_seed(5)
    attention, tensors = "unet.down_blocks.0.attentions.0.", {}
    for name, (out, *into) in {
        f"{attention}transformer_blocks.0.attn1.to_q": (16, 16),
        f"{attention}transformer_blocks.0.attn2.to_k": (16, 32),
        f"{attention}transformer_blocks.0.ff.net.0.proj": (128, 16), f"{attention}proj_in": (16, 16, 1, 1),
        "unet.down_blocks.0.resnets.0.conv1": (16, 16, 3, 3),
        "text_encoder.text_model.encoder.layers.1.self_attn.q_proj": (32, 32),
    }.items():
        tensors[f"{name}.lora_A.weight"] = scale * torch.randn(4, *into, dtype=torch.float64)
        tensors[f"{name}.lora_B.weight"] = scale * torch.randn(out, 4, *[1 for _ in into[1:]], dtype=torch.float64)
    save_file(tensors, path)
    return path


@pytest.mark.parametrize("steps, strength", [(1, 1.0), (2, 0.5), (4, 1.0)])
def test_a_lora_with_lcm_draws_what_its_pipeline_draws(tmp_path, float32_noise, steps, strength):
    """Within 1e-7: the peer's c_skip is in float32."""
    pipe = tiny_pipeline(scheduler=fine(LCMScheduler(**SCHEDULE))).to(torch.float64)
    pipe.save_pretrained(tmp_path)
    base, plain = (bases.load_base(str(tmp_path)) for _ in range(2))
    file = lora_file(tmp_path / "lora.safetensors")
    bases.load_lora(str(file) if strength == 1 else f"{file}:{strength}", base)
    pipe.load_lora_weights(tmp_path, weight_name="lora.safetensors", adapter_name="one")
    pipe.set_adapters("one", strength)
    ours, theirs = ours_and_theirs(pipe, base, (16, 16), steps, 1.5, "lcm")
    assert relative(ours, theirs) < 1e-7
    assert relative(sample.text_to_image(plain, PROMPT, [3, 4], (16, 16), steps, "lcm", 1.5), 2 * theirs - 1) > 0.01


CONTROL = dict(block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4, cross_attention_dim=32,
               attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
               conditioning_embedding_out_channels=(4, 6))


@pytest.mark.parametrize("with_lora", [False, True])
def test_a_controlnet_draws_what_its_pipeline_draws(tmp_path, with_lora):
    plain = tiny_pipeline(scheduler=fine(DDIMScheduler(**SCHEDULE, clip_sample=False, set_alpha_to_one=False,
                                                       steps_offset=1)))
    peer = randomise(ControlNetModel(**CONTROL), seed=8)
    pipe = StableDiffusionControlNetPipeline(**plain.components, controlnet=peer, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    pipe.to(torch.float64)
    plain.save_pretrained(tmp_path / "base")
    peer.save_pretrained(tmp_path / "control")
    base = bases.load_base(str(tmp_path / "base"))
    network = bases.load_controlnet(str(tmp_path / "control"), base.unet)
    if with_lora:
        lora_file(tmp_path / "lora.safetensors")
        bases.load_lora(str(tmp_path / "lora.safetensors"), base)
        pipe.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    condition = normal(1, 3, 16, 24).sigmoid()
    made = {}
    for scale in (0.7, 0.0):
        control = sample.Control(network, condition, scale)
        made[scale], theirs = ours_and_theirs(pipe, base, (24, 16), 4, 2.0, "ddim", control, image=condition,
                                              controlnet_conditioning_scale=scale)
        assert relative(made[scale], theirs) < 1e-9
    assert relative(made[0.7], made[0.0]) > 0.01


def test_lora_and_controlnet_are_flags_and_what_they_made_can_be_saved(sd, tmp_path, command):  # noqa: F811
    lora = lora_file(tmp_path / "lora.safetensors")
    ControlNetModel.from_config(CONTROL).save_pretrained(tmp_path / "control")
    edges = picture(tmp_path / "edges.png", 19, 13)
    options = dict(plain=[], lora=["--lora", lora], twice=["--lora", f"{lora}:0.5", "--lora", f"{lora}:0.5"],
                   control=["--controlnet", tmp_path / "control", "--control_image", edges])
    for name, flags in options.items():
        assert command(PROMPT, "--base", sd, *flags, "--output", f"{name}.png")[0] == 0
    assert Image.open("control.png").size == (19, 13)  # the control picture's
    plain, lora_, twice = (levels(f"{name}.png") for name in ("plain", "lora", "twice"))
    assert (lora_ - twice).abs().max() <= 1 < (lora_ - plain).abs().max()
    status, paths, _ = command("--base", sd, "--lora", lora, "--save", "saved")
    assert (status, paths) == (0, ["saved"])
    command(PROMPT, "--base", "saved", "--output", "again.png")
    assert torch.equal(levels("again.png"), levels("lora.png"))


# ------------------------------------------------------------------------------------------------- one-file models


@pytest.fixture(scope="module")
def sd(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sd")
    tiny_pipeline().save_pretrained(folder)
    return folder


@torch.no_grad()
@pytest.mark.parametrize("family", ["sd15", "sd21"])
def test_a_one_file_model_is_the_folder_it_was_made_from(tmp_path, monkeypatch, family):
    """Its sizes are those of its family's folder: 1x1 convolutions and 8 heads, or linear layers and heads of 64."""
    new = family == "sd21"
    unet_sizes = dict(UNET, block_out_channels=(64, 128), norm_num_groups=32, attention_head_dim=(1, 2) if new else 8,
                      use_linear_projection=new)
    pipe = tiny_pipeline(unet_sizes, dict(VAE, block_out_channels=(32, 64), norm_num_groups=32))
    vocabulary = len(pipe.tokenizer)
    pipe.text_encoder = randomise(CLIPTextModel(CLIPTextConfig(
        vocab_size=vocabulary, hidden_size=64, intermediate_size=56, num_hidden_layers=2, num_attention_heads=1,
        hidden_act="gelu" if new else "quick_gelu", eos_token_id=vocabulary - 1)))
    pipe.unet.config["cross_attention_dim"] = 64
    pipe.unet = randomise(UNet2DConditionModel(**dict(unet_sizes, cross_attention_dim=64)))
    pipe.save_pretrained(tmp_path / family)
    monkeypatch.setitem(hub.BASES, family, str(tmp_path / family))
    folder = bases.load_base(family)
    file = unet_file(folder.unet.config, folder.unet.state_dict()) | vae_file(folder.vae.config,
                                                                              folder.vae.state_dict()) | others()
    text = folder.text_encoder.state_dict()
    if new:
        file |= open_clip_file(text)
        last = [name for name in file if "resblocks.1." in name]
        file |= {name.replace("resblocks.1.", "resblocks.2."): file[name] + 1 for name in last}
    else:
        file |= {f"cond_stage_model.transformer.{name}": t for name, t in text.items()}
    save_file({name: t.clone().contiguous() for name, t in file.items()}, tmp_path / "model.safetensors")
    torch.save({"state_dict": file}, tmp_path / "model.ckpt")
    for name in ("model.safetensors", "model.ckpt"):
        base = bases.load_base(str(tmp_path / name))
        for part in ("vae", "unet", "text_encoder"):
            ours, theirs = getattr(base, part), getattr(folder, part)
            assert ours.state_dict().keys() == theirs.state_dict().keys()
            assert all(torch.equal(t, theirs.state_dict()[key]) for key, t in ours.state_dict().items())
        bases.save_folder(tmp_path / name.replace(".", "-"), base, rest=str(tmp_path / name))  # as a stage's result
        stage = bases.load_base(str(tmp_path / name.replace(".", "-")))
        made = [sample.text_to_image(b, PROMPT, [1], (16, 16), 2, guidance=2.0) for b in (base, folder, stage)]
        assert torch.equal(made[0], made[1]) and torch.equal(made[0], made[2])


# -------------------------------------------------------------------------------------------------- editing and priors


@torch.no_grad()
def test_an_edited_picture_leaves_its_input_as_strength_grows_and_forgets_it_at_1(sd):
    base = bases.load_base(str(sd), dtype=torch.float64)
    pictures, other = (normal(4, 3, 16, 16, seed=seed).sigmoid() for seed in (1, 2))

    def made(input: Tensor, strength: float) -> Tensor:
        return sample.text_to_image(base, PROMPT, [7, 8, 9, 10], (16, 16), 1, "lcm", pictures=input, strength=strength)

    again = base.vae.decode(base.vae.encode(2 * pictures - 1)[0])  # the least that editing changes
    distances = [(made(pictures, strength / 5) - again).square().mean().item() for strength in (0.1, 1, 2, 3, 4, 5)]
    assert distances == sorted(distances) and distances[0] < distances[-1] / 2
    assert torch.equal(made(pictures, 1.0), made(other, 1.0))
    assert torch.equal(made(pictures, 1.0), sample.text_to_image(base, PROMPT, [7, 8, 9, 10], (16, 16), 1, "lcm"))
    assert not torch.equal(made(pictures, 0.8), made(other, 0.8))


def test_editing_takes_pictures_of_any_size_and_folders(sd, tmp_path, command):  # noqa: F811
    sizes = {"a.png": (16, 16), "b.png": (9, 21)}
    for i, (name, size) in enumerate(sizes.items()):
        picture(tmp_path / "in" / name, *size, seed=i)
    status, paths, err = command(PROMPT, "--base", sd, "--input", tmp_path / "in", "--steps", 2)
    assert (status, paths) == (0, ["out/a.png", "out/b.png"]), err
    assert [Image.open(path).size for path in paths] == [*sizes.values()]
    assert Image.open(paths[0]).text["strength"] == "0.6"


def test_a_priors_statistics_are_numpys_and_its_noise_is_the_second_draw(sd, tmp_path, command, monkeypatch):  # noqa: F811
    for seed in range(5):
        picture(tmp_path / "photos" / f"{seed}.png", 20, 16, seed)
    monkeypatch.setattr(sys, "argv", ["data.py", "prior", str(tmp_path / "photos"), "--base", str(sd), "--size", "16",
                                      "--output", "prior.safetensors"])
    __main__.main()
    base = bases.load_base(str(sd))
    with torch.no_grad():
        z = torch.cat([base.vae.encode(2 * to_tensor(open_picture(path).crop((2, 0, 18, 16)))[None] - 1)[0]
                       for path in sorted((tmp_path / "photos").iterdir())]).double().numpy() * 0.18215
    mean, std = bases.load_prior(Path("prior.safetensors"), (4, 8, 8))
    assert relative(mean.double(), torch.tensor(z.mean(0))) < 1e-5
    assert relative(std.double(), torch.tensor(z.std(0))) < 1e-5
    made = sample.text_to_image(base, PROMPT, [7], (16, 16), sampler="lcm", prior=(mean, std))
    draw = torch.Generator().manual_seed(7)
    noise, n = (torch.randn(1, 4, 8, 8, generator=draw) for _ in range(2))
    x = base.schedule.alpha[999].float() * (mean + std * n) + base.schedule.sigma[999].float() * noise
    with torch.no_grad():
        eps = base.unet(x, 999, base.text_encoder(base.tokenizer(PROMPT)))
        z = diffusion.predict_x0(eps, x, 999, base.schedule, "epsilon")
        assert relative(made, base.vae.decode(z / 0.18215).clamp(-1, 1)) < 1e-4
    assert command(PROMPT, "--base", sd, "--prior", "prior.safetensors", "--sampler", "lcm", "--seed", 7)[0] == 0
    assert ((made[0] + 1) * 127.5 - levels("out.png")).abs().max() <= 0.5 + 1e-2


# ------------------------------------------------------------------------------------------------------- what is wrong


class Code:
    def __reduce__(self):
        return os.mkdir, ("ran",)


@pytest.fixture
def files(sd, dit, tmp_path) -> dict[str, object]:
    """Wrong ones of every kind, by the names of the table below."""
    lora = load_file(lora_file(tmp_path / "lora.safetensors"))
    save_file({name: torch.cat([t, t], 1) if name.endswith("to_q.lora_A.weight") else t for name, t in lora.items()},
              tmp_path / "other.safetensors")
    save_file({"words": torch.ones(2)}, tmp_path / "nothing.safetensors")
    torch.save({"state_dict": Code()}, tmp_path / "code.ckpt")
    torch.save(Code(), tmp_path / "code.pt")
    wide = randomise(ControlNetModel(**dict(CONTROL, cross_attention_dim=40)))
    wide.save_pretrained(tmp_path / "wide")
    ControlNetModel(**CONTROL).save_pretrained(tmp_path / "control")
    save_file({"conditioner.embedders.0.transformer.text_model.x": torch.ones(1),
               "model.diffusion_model.input_blocks.0.0.weight": torch.ones(1),
               "first_stage_model.encoder.conv_in.weight": torch.ones(1)}, tmp_path / "xl.safetensors")
    save_file({"mean": torch.zeros(4, 4, 4), "std": torch.ones(4, 4, 4)}, tmp_path / "prior.safetensors")
    picture(tmp_path / "in.png", 16, 16)
    pixart(DPMSolverMultistepScheduler(**LINEAR)).save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    sorted((tmp_path / "shards" / "text_encoder").glob("*-of-*"))[1].unlink()
    return dict(B=sd, D=dit["512"], E=dit["1024"]) | {path.name: path for path in tmp_path.iterdir()}


# What is asked for, and what the line must say.
REFUSED = {
    "a T5 shard missing": (["--base", "shards"], ["text_encoder/model-00002-of-", "all 7 shards"]),
    "a LoRA for another base": (["--base", "B", "--lora", "other.safetensors"], [
        "other.safetensors", "attn1.to_q", "[4, 32]", "[4, 16]", "expected a LoRA for the base"]),
    "a LoRA for a U-Net on PixArt": (["--base", "D", "--lora", "lora.safetensors"], [
        "lora.safetensors", "transformer"]),
    "a LoRA of nothing": (["--base", "B", "--lora", "nothing.safetensors"], ["nothing.safetensors", "words"]),
    "a LoRA that is not there": (["--base", "B", "--lora", "none.safetensors:0.5"], ["no none.safetensors", "a LoRA"]),
    "a LoRA with code": (["--base", "B", "--lora", "code.pt"], ["code.pt", "code in it"]),
    "a ControlNet of another width": (["--base", "B", "--controlnet", "wide", "--control_image", "in.png"], [
        "wide/config.json", "cross_attention_dim is 40", "32"]),
    "a ControlNet on PixArt": (["--base", "D", "--controlnet", "control", "--control_image", "in.png"], ["is PixArt"]),
    "a ControlNet that is a base": (["--base", "B", "--controlnet", "B", "--control_image", "in.png"], ["config.json"]),
    "a ControlNet without picture": (["--base", "B", "--controlnet", "control"], ["--control_image", "both"]),
    "a one-file model of another family": (["--base", "xl.safetensors"], ["xl.safetensors", "cond_stage_model", "1.x"]),
    "a one-file model with code": (["--base", "code.ckpt"], ["code.ckpt", "code in it"]),
    "a one-file model that is a LoRA": (["--base", "lora.safetensors"], ["lora.safetensors", "model.diffusion_model"]),
    "a prior of another size": (["--base", "B", "--prior", "prior.safetensors"], [
        "prior.safetensors", "[4, 4, 4]", "[4, 8, 8]"]),
    "a prior that is a LoRA": (["--base", "B", "--prior", "lora.safetensors"], ["lora.safetensors", "mean"]),
    "a merge of unlike models": (["--merge", "B + D"], ["has no unet/config.json"]),
    "a merge with a word": (["--merge", "B + none"], ["none is no folder"]),
    "a merge and a base": (["--base", "B", "--merge", "B + B"], ["leave --base out"]),
    "editing without strength": (["--base", "B", "--input", "in.png", "--strength", "0"], [
        "--strength 0.0", "above 0"]),
    "strength of a prompt": (["--base", "B", "--strength", "0.5"], ["--strength has no meaning without --input"]),
    "many edits of one picture": (["--base", "B", "--input", "in.png", "--n", "2"], [
        "--n has no meaning with --input"]),
    "another prediction": (["--base", "B", "--prediction_type", "x0"], ["--prediction_type", "v_prediction"]),
}


@pytest.mark.parametrize("arguments, says", REFUSED.values(), ids=REFUSED.keys())
def test_what_is_wrong_with_a_file_is_one_line_and_writes_nothing(files, command, arguments, says):  # noqa: F811
    named = [" ".join(str(files.get(word, word)) for word in argument.split(" ")) for argument in arguments]
    status, out, err = command(PROMPT, *named)
    assert (status, out) == (2, []), err
    assert err.startswith("sample.py: error: ") and err.count("\n") == 1, err
    assert all(piece in err for piece in says), err
    assert not any(Path().iterdir())


# --------------------------------------------------------------------------------------------------------------- memory


LOAD = """
import sys, threading, time
import torch


def anonymous():  # kB
    return int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1])

torch.zeros(1).to(torch.bfloat16)
before, peak, done = anonymous(), [0], False

def watch():
    while not done:
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.002)

thread = threading.Thread(target=watch)
thread.start()
network = bases.load_base(sys.argv[1], ("text_encoder",), torch.bfloat16).text_encoder
done = True
thread.join()
own = sum(p.numel() * p.element_size() for p in network.parameters())
print(1024 * (peak[0] - before) - own, max(p.numel() * p.element_size() for p in network.parameters()))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's count of a process's memory")
def test_a_sharded_t5_takes_its_own_memory_and_one_tensors(tmp_path):
    """2.3 GB of float32 in four shards, loaded as bfloat16; the rest of the bound is the allocator's."""
    config = dict(T5, d_model=2048, d_kv=64, num_heads=32, d_ff=5120, num_layers=12, vocab_size=8192, model_type="t5")
    for name, text in {"model_index.json": {"transformer": []}, "text_encoder/config.json": config}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(text))
    with torch.device("meta"):
        shapes = [*t5.T5Encoder(t5.T5Config(**{k: v for k, v in config.items() if k in vars(t5.T5Config())})
                                ).state_dict().items()]
    assert sum(4 * t.numel() for _, t in shapes) > 2e9
    index = {}
    for i in range(4):
        shard = f"model-{i + 1:05}-of-00004.safetensors"
        save_file({name: torch.rand(t.shape) for name, t in shapes[i::4]}, tmp_path / "text_encoder" / shard)
        index |= {name: shard for name, _ in shapes[i::4]}
    (tmp_path / "text_encoder" / "model.safetensors.index.json").write_text(json.dumps(dict(weight_map=index)))
    done = subprocess.run([sys.executable, "-c", LOAD, str(tmp_path)], cwd=hub.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    over, largest = map(int, done.stdout.split())
    assert over < 2 * largest + 64e6

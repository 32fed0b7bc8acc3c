"""sample.py draws what the `diffusers` pipelines draw from the same folder and the same noise,
and translates pictures of any size. A user's mistake is one line on stderr and writes nothing."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import diffusers.schedulers.scheduling_lcm
import pytest
import torch
from conftest import normal, randomise, relative
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from pipelines import SCHEDULE, TOKENIZER, VAE, tiny_pipeline
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import sample
import sampling.pace
import sampling.pictures
import sampling.precision
import training
from dataset.pictures import canny, open_picture, pad_to_multiple, sketch, to_picture, to_tensor
from files import autoencoders, bases, checkpoints, tokenizers
from models import clip, t5, unet, vae
from models.cyclegan_turbo import CycleGANTurbo, CycleGANTurboConfig
from models.diffusion import Schedule
from models.lora import set_scale
from models.pix2pix_turbo import Pix2PixTurbo, Pix2PixTurboConfig

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPT = "a red circle on a blue background"
NEGATIVE = "green"
FIRST_BETA = SCHEDULE["beta_start"]
LAST_BETA = SCHEDULE["beta_end"]
BETAS = torch.linspace(FIRST_BETA**0.5, LAST_BETA**0.5, 1000, dtype=torch.float64) ** 2
ALPHA_BAR = (1 - BETAS).cumprod(0)


# -------------------- prompt to picture

def both(
    pipe: StableDiffusionPipeline,
    folder: Path,
    size: tuple[int, int],
    steps: int,
    guidance: float,
    **options,
) -> tuple[Tensor, Tensor]:
    """Two pictures by sample.py and two by the pipeline, in float64, from the same noise."""
    pipe.to(torch.float64).save_pretrained(folder)
    base = bases.load_base(str(folder))
    seeds = [3, 4]
    ours = sample.text_to_image(base, PROMPT, seeds, size, steps, guidance=guidance, **options)

    width, height = size
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    noise = [torch.randn(1, 4, height // 2, width // 2, generator=g) for g in generators]
    theirs = pipe(
        PROMPT,
        negative_prompt=options.get("negative"),
        width=width,
        height=height,
        latents=torch.cat(noise).double(),
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=generators,
        num_images_per_prompt=2,
        output_type="pt",
    ).images
    # Neither of one colour nor clipped.
    assert theirs.std() > 0 and ((0 < theirs) & (theirs < 1)).float().mean() > 0.5
    return (ours + 1) / 2, theirs


@pytest.mark.parametrize("guidance", [0.0, 1.0])
@pytest.mark.parametrize("steps, size", [(1, (16, 16)), (4, (16, 24))])
def test_sd_turbo_draws_what_the_euler_pipeline_draws(tmp_path, steps, size, guidance):
    """Within 1e-6, as the peer's scheduler computes in float32. As there, guidance up to 1 is
    none."""
    pipe = tiny_pipeline(scheduler=EulerDiscreteScheduler(**SCHEDULE, timestep_spacing="trailing"))
    ours, theirs = both(pipe, tmp_path, size, steps, guidance)
    assert relative(ours, theirs) < 1e-6


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_sd_15_draws_what_the_ddim_pipeline_draws(tmp_path, prediction):
    scheduler = DDIMScheduler(
        **SCHEDULE,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction,
    )
    # The peer's own tables are in float32.
    scheduler.alphas_cumprod = ALPHA_BAR
    scheduler.final_alpha_cumprod = ALPHA_BAR[0]
    pipe = tiny_pipeline(scheduler=scheduler)
    ours, theirs = both(pipe, tmp_path, (24, 16), 25, 7.5, negative=NEGATIVE)
    assert relative(ours, theirs) < 1e-9


@pytest.mark.parametrize("steps, guidance", [(4, 1.0), (2, 2.0)])
def test_lcm_draws_what_the_lcm_pipeline_draws(tmp_path, monkeypatch, steps, guidance):
    """Later noise, too, comes from each picture's own generator. Within 1e-7, as the peer's c_skip
    is in float32."""
    scheduler = LCMScheduler(**SCHEDULE)
    scheduler.alphas_cumprod = ALPHA_BAR
    draw = diffusers.schedulers.scheduling_lcm.randn_tensor

    def draw_in_float32(shape, generator, device, dtype):
        return draw(shape, generator=generator, device=device, dtype=torch.float32).to(dtype)

    monkeypatch.setattr(diffusers.schedulers.scheduling_lcm, "randn_tensor", draw_in_float32)
    pipe = tiny_pipeline(scheduler=scheduler)
    ours, theirs = both(pipe, tmp_path, (16, 16), steps, guidance, sampler="lcm")
    assert relative(ours, theirs) < 1e-7


TAESD = dict(
    encoder_block_out_channels=(8, 8),
    decoder_block_out_channels=(8, 8),
    num_encoder_blocks=(1, 1),
    num_decoder_blocks=(1, 1),
)


def with_taesd(folder: Path) -> tuple[StableDiffusionPipeline, bases.Base]:
    """A pipeline and a base of the same weights, in float64, with the same AutoencoderTiny."""
    pipe = tiny_pipeline(scheduler=EulerDiscreteScheduler(**SCHEDULE, timestep_spacing="trailing"))
    tiny = randomise(AutoencoderTiny(**TAESD))
    tiny.decoder.layers[-1].weight.data *= 0.3  # so that less is clipped
    tiny.decoder.layers[-1].bias.data += 0.5
    pipe.save_pretrained(folder / "base")
    tiny.save_pretrained(folder / "taesd")
    base = bases.load_base(str(folder / "base"), dtype=torch.float64)
    base.vae = autoencoders.load_autoencoder(str(folder / "taesd"), base, torch.float64)
    pipe.vae = tiny
    return pipe.to(torch.float64), base


@pytest.mark.parametrize("steps, size", [(1, (16, 16)), (4, (16, 24))])
def test_with_taesd_it_draws_what_the_pipeline_with_autoencoder_tiny_draws(tmp_path, steps, size):
    pipe, base = with_taesd(tmp_path)
    ours = sample.text_to_image(base, PROMPT, [3], size, steps)
    width, height = size
    noise, _ = training.draw_noise([3], (4, height // 2, width // 2))
    theirs = pipe(
        PROMPT,
        width=width,
        height=height,
        latents=noise.double(),
        num_inference_steps=steps,
        guidance_scale=0.0,
        output_type="pt",
    ).images
    assert theirs.std() > 0 and ((0 < theirs) & (theirs < 1)).float().mean() > 0.5
    assert relative((ours + 1) / 2, theirs) < 1e-6


def test_with_taesd_it_edits_as_the_pipeline_with_autoencoder_tiny(tmp_path, monkeypatch):
    """Two steps of the pipeline at strength 0.5 are one, at the timestep of our one step."""
    pipe, base = with_taesd(tmp_path)
    pipe = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    x = normal(1, 3, 24, 16).sigmoid()
    noise, _ = training.draw_noise([3], (4, 12, 8))

    def same_noise(*shape, **options) -> Tensor:
        return noise.double()

    module = diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img
    monkeypatch.setattr(module, "randn_tensor", same_noise)
    ours = sample.text_to_image(base, PROMPT, [3], (16, 24), pictures=x, strength=0.5)
    theirs = pipe(
        PROMPT,
        image=x,
        strength=0.5,
        num_inference_steps=2,
        guidance_scale=0.0,
        output_type="pt",
    ).images
    assert theirs.std() > 0 and ((0 < theirs) & (theirs < 1)).float().mean() > 0.5
    assert relative((ours + 1) / 2, theirs) < 1e-6


@pytest.mark.slow
@torch.no_grad()
def test_full_size_sd_turbo_draws_what_the_pipeline_draws_in_float32():
    """Random weights in the published sizes, shared by both sides: 5.2 GB."""
    text = dict(
        vocab_size=49408,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=23,
        num_attention_heads=16,
        hidden_act="gelu",
    )
    sizes = dict(
        cross_attention_dim=1024,
        attention_head_dim=(5, 10, 20, 20),
        use_linear_projection=True,
    )
    vae_sizes = dict(
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        norm_num_groups=32,
        latent_channels=4,
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
    )
    peers = dict(
        vae=AutoencoderKL(**vae_sizes),
        unet=UNet2DConditionModel(**sizes, sample_size=64),
        text_encoder=CLIPTextModel(CLIPTextConfig(**text, eos_token_id=2)),
    )
    with torch.device("meta"):
        base = bases.Base(
            "",
            vae=vae.VAE(vae.VAEConfig()),
            unet=unet.UNet(unet.UNetConfig(**sizes)),
            text_encoder=clip.TextEncoder(clip.TextConfig(**text)),
        )
    for part, peer in peers.items():
        prefix = "text_model." if part == "text_encoder" else ""
        weights = randomise(peer).state_dict()
        named = {prefix + name.removeprefix(prefix): t for name, t in weights.items()}
        getattr(base, part).load_state_dict(named, assign=True)

    scheduler = EulerDiscreteScheduler(**SCHEDULE, timestep_spacing="trailing")
    base.tokenizer = clip.Tokenizer(tokenizers.load_tokenizer("tiny").pieces)
    base.schedule = Schedule.from_config(json.loads(scheduler.to_json_string()))
    pipe = StableDiffusionPipeline(
        **peers,
        tokenizer=CLIPTokenizer.from_pretrained(TOKENIZER, model_max_length=77),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    noise, _ = training.draw_noise([0], (4, 32, 32))
    theirs = pipe(
        PROMPT,
        width=256,
        height=256,
        latents=noise,
        num_inference_steps=1,
        guidance_scale=0.0,
        output_type="pt",
    ).images
    ours = sample.text_to_image(base, PROMPT, [0], (256, 256))
    assert theirs.std() > 0.01
    assert relative((ours + 1) / 2, theirs) < 1e-4


def test_each_pictures_noise_is_the_first_draw_of_its_own_generator():
    noise, generators = training.draw_noise([7, 8, 9], (4, 2, 3))
    again = torch.Generator().manual_seed(8)
    assert noise.dtype == torch.float32
    assert torch.equal(noise[1:2], torch.randn(1, 4, 2, 3, generator=again))
    assert torch.equal(torch.randn(5, generator=generators[1]), torch.randn(5, generator=again))


# -------------------- the command line

@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A tiny SD-Turbo: factor 2, 16 pixels a side."""
    folder = tmp_path_factory.mktemp("base")
    pipe = tiny_pipeline(scheduler=EulerDiscreteScheduler(**SCHEDULE, timestep_spacing="trailing"))
    pipe.save_pretrained(folder)
    return folder


def trained(base: Path, path: Path, stochastic: bool | None, prompts: list[str]) -> str:
    """A pix2pix-Turbo with random changes, or a CycleGAN-Turbo where `stochastic` is None."""
    loaded = bases.load_base(str(base))
    networks = (loaded.vae, loaded.unet, loaded.schedule)
    if stochastic is None:
        kind = "cyclegan_turbo"
        generator = CycleGANTurbo(*networks, CycleGANTurboConfig(lora_rank_unet=4))
    else:
        kind = "pix2pix_turbo"
        generator = Pix2PixTurbo(*networks, Pix2PixTurboConfig(stochastic=stochastic))
    for i, p in enumerate(p for p in generator.parameters() if p.requires_grad):
        values = normal(*p.shape, seed=i, dtype=torch.float32)
        p.data = 0.5 * values / max(p[0].numel(), 1) ** 0.5
    path.parent.mkdir()
    checkpoints.save_generator(path, generator, kind, str(base), prompts)
    return str(path)


@pytest.fixture(scope="module")
def trained_files(base, tmp_path_factory) -> dict[str, str]:
    """Checkpoints on a base with four levels (factor 8), as in Stable Diffusion."""
    folder = tmp_path_factory.mktemp("trained")
    deep = dict(
        VAE,
        block_out_channels=(8, 8, 12, 12),
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
    )
    tiny_pipeline(vae=deep, scheduler=DDPMScheduler(**SCHEDULE)).save_pretrained(folder / "base")
    files = {
        "one caption": (False, ["a cat"]),
        "many captions": (False, []),
        "stochastic": (True, ["a cat"]),
        "unpaired": (None, ["a day", "a night"]),
    }
    paths = {}
    for name, (stochastic, prompts) in files.items():
        path = folder / name / "model.safetensors"
        paths[name] = trained(folder / "base", path, stochastic, prompts)
    return paths


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """`python sample.py ARGUMENTS` in this process and in an empty folder, in float32 if no
    --dtype is given. Returns its status, the paths it printed, and stderr."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def call(*arguments: object) -> tuple[int, list[str], str]:
        if "--dtype" not in arguments:
            arguments += ("--dtype", "float32")
        monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, arguments)])
        capsys.readouterr()
        try:
            training.run_script(sample.main)
            status = 0
        except SystemExit as stop:
            status = stop.code
        out, err = capsys.readouterr()
        return status, out.splitlines(), err

    return call


def picture(path: Path, width: int, height: int, seed: int = 0) -> Path:
    """Writes something like a photograph: smooth, with an edge."""
    coarse = normal(1, 3, 4, 4, seed=seed)
    x = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")[0]
    path.parent.mkdir(parents=True, exist_ok=True)
    to_picture(x.tanh()).save(path)
    return path


def levels(path: str | Path) -> Tensor:
    return to_tensor(open_picture(path)).mul(255).round()


def assert_holds(path: str, x: Tensor, tolerance: float = 1e-2) -> None:
    """The file holds x [3, H, W] in [-1, 1], rounded to the nearest level."""
    assert ((x + 1) * 127.5 - levels(path)).abs().max() <= 0.5 + tolerance


def test_the_script_draws_a_picture_and_prints_its_path(base, tmp_path):
    script = Path(sample.__file__)
    done = subprocess.run(
        [sys.executable, str(script), PROMPT, "--base", str(base), "--device", "cpu"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert (done.returncode, done.stdout) == (0, "out.png\n"), done.stderr
    assert Image.open(tmp_path / "out.png").size == (16, 16)


def test_a_seed_gives_the_same_picture_whatever_is_drawn_beside_it(base, command):
    """Up to one level of 255, as a batch is added up in another order."""
    flags = [PROMPT, "--base", base, "--size", "24x16", "--seed"]
    status, paths, _ = command(*flags, 10, "--n", 5, "--batch", 3)
    assert (status, paths) == (0, [f"out/{seed}.png" for seed in range(10, 15)])
    pictures = [levels(path) for path in paths]
    assert all(p.shape == (3, 16, 24) for p in pictures)
    assert all((pictures[0] - p).abs().max() > 20 for p in pictures[1:])
    for seed in (10, 12, 14):
        command(*flags, seed, "--output", "alone.png")
        assert (levels("alone.png") - pictures[seed - 10]).abs().max() <= 1


def test_a_png_holds_the_picture_to_the_nearest_level_and_how_it_was_made(base, command):
    options = dict(steps=4, sampler="lcm", guidance=2.0, negative=NEGATIVE)
    flags = [f"--{name}={value}" for name, value in options.items()]
    done = command(PROMPT, "--base", base, "--seed", 5, *flags, "--output", "new/a.png")
    assert done[:2] == (0, ["new/a.png"])
    x = sample.text_to_image(bases.load_base(str(base)), PROMPT, [5], (16, 16), **options)
    assert_holds("new/a.png", x[0], tolerance=1e-3)

    text = Image.open("new/a.png").text
    expected = dict(prompt=PROMPT, seed="5", base=str(base))
    expected |= {name: str(value) for name, value in options.items()}
    assert {name: text[name] for name in expected} == expected
    assert text["version"] and "checkpoint" not in text


@pytest.mark.parametrize("flags, expected", [
    ("a", {}),
    ("a --checkpoint runs/YOSO --strength 0.5", {"strength": 0.5}),
    ("a --input p.png --strength 0.5", {"strength": 0.5}),
    ("a --controlnet C --control_image p.png --preprocess sketch", {"preprocess": "sketch"}),
    (
        "a --controlnet C --control_image p.png --preprocess canny",
        {"preprocess": "canny", "low_threshold": 100, "high_threshold": 200},
    ),
])
def test_a_png_names_the_flags_that_changed_the_picture(flags, expected):
    options = sample.parse(flags.split())
    facts = sample.png_facts(options, "draw", {})
    names = ("strength", "preprocess", "low_threshold", "high_threshold")
    assert {name: facts[name] for name in names if name in facts} == expected


def test_another_autoencoder_draws_and_edits_and_the_base_is_saved_with_its_own(
    base, command, tmp_path
):
    randomise(AutoencoderTiny(**TAESD)).save_pretrained(tmp_path / "taesd")
    source = picture(tmp_path / "in.png", 21, 13)
    flags = [PROMPT, "--base", base, "--vae", tmp_path / "taesd"]
    status, paths, err = command(*flags, "--save", tmp_path / "saved")
    assert (status, paths[-1]) == (0, "out.png"), err
    assert Image.open("out.png").text["vae"] == str(tmp_path / "taesd")

    loaded = bases.load_base(str(base))
    loaded.vae = autoencoders.load_autoencoder(str(tmp_path / "taesd"), loaded)
    assert_holds("out.png", sample.text_to_image(loaded, PROMPT, [42], (16, 16))[0])
    assert isinstance(bases.load_base(str(tmp_path / "saved")).vae, vae.VAE)

    assert command(*flags, "--input", source, "--output", "edited.png")[0] == 0
    x = torch.nn.functional.pad(to_tensor(open_picture(source))[None], (0, 1, 0, 1), mode="reflect")
    edited = sample.text_to_image(loaded, PROMPT, [42], (22, 14), pictures=x, strength=0.6)
    assert_holds("edited.png", edited[0, :, :13, :21])


@pytest.mark.parametrize("size", [(37, 53), (5, 7), (1, 1), (8, 16), (64, 3)])
@pytest.mark.parametrize("kind", ["one caption", "stochastic"])
def test_a_translation_has_the_size_of_its_input(trained_files, command, tmp_path, kind, size):
    source = picture(tmp_path / "in.png", *size)
    status, paths, err = command("--checkpoint", trained_files[kind], "--input", source)
    assert (status, paths) == (0, ["out.png"]), err
    assert Image.open("out.png").size == size


@torch.no_grad()
def test_a_translation_is_the_generators_for_the_padded_picture(trained_files, command, tmp_path):
    source = picture(tmp_path / "in.jpg", 21, 13)
    checkpoint = trained_files["stochastic"]
    translate = ["--checkpoint", checkpoint, "--input", source]
    command(*translate, "--r", 0.7, "--seed", 3, "--skip_scale", 0.5)

    loaded = checkpoints.load_generator(checkpoint, merged=False)
    set_scale(loaded.generator, 0.7)
    x = to_tensor(open_picture(source))[None]
    x = torch.nn.functional.pad(x, (0, 3, 0, 3), mode="reflect")
    noise = torch.randn(1, 4, 2, 3, generator=torch.Generator().manual_seed(3))
    context = loaded.text_encoder(loaded.tokenizer("a cat"))
    y = loaded.generator(x, context, 0.7, noise, 0.5)
    assert_holds("out.png", y[0, :, :13, :21])

    text = Image.open("out.png").text
    expected = dict(prompt="a cat", seed="3", r="0.7", skip_scale="0.5", checkpoint=checkpoint)
    assert {name: text[name] for name in expected} == expected

    others = [("--r", 0.2), ("--seed", 4), ("--strength", 0.5), ("--skip_scale", 1)]
    for flag, value in others:
        given = {"--r": 0.7, "--seed": 3, "--skip_scale": 0.5, flag: value}
        flags = [piece for pair in given.items() for piece in pair]
        command(*translate, "--output", "other.png", *flags)
        assert (levels("other.png") - levels("out.png")).abs().max() > 1, flag


@torch.no_grad()
def test_an_unpaired_translation_follows_its_direction_with_that_domains_caption(
    trained_files, command, tmp_path
):
    source = picture(tmp_path / "in.png", 24, 16)
    checkpoint = trained_files["unpaired"]
    loaded = checkpoints.load_generator(checkpoint, merged=False)
    x = to_tensor(open_picture(source))[None] * 2 - 1
    written = {}
    for direction, prompt, flags in [
        ("a2b", "a night", []),
        ("b2a", "a day", ["--direction", "b2a"]),
    ]:
        status, _, err = command("--checkpoint", checkpoint, "--input", source, *flags)
        assert status == 0, err
        context = loaded.text_encoder(loaded.tokenizer(prompt))
        assert_holds("out.png", loaded.generator(x, context, direction)[0])
        text = Image.open("out.png").text
        assert (text["direction"], text["prompt"]) == (direction, prompt)
        written[direction] = levels("out.png")
    assert (written["a2b"] - written["b2a"]).abs().max() > 1


def test_a_released_name_knows_its_direction_and_caption(
    trained_files, command, tmp_path, monkeypatch
):
    source = picture(tmp_path / "in.png", 16, 16)
    load = checkpoints.load_generator

    def load_stand_in(name, **rest):
        loaded = load(trained_files["unpaired"], **rest)
        loaded.prompts = []  # the released files hold no captions
        return loaded

    monkeypatch.setattr(checkpoints, "load_generator", load_stand_in)
    (tmp_path / "night2day.pkl").touch()
    for name in ("night_to_day", tmp_path / "night2day.pkl"):
        status, _, err = command("--checkpoint", name, "--input", source)
        text = Image.open("out.png").text
        assert (status, text["direction"], text["prompt"]) == (0, "b2a", "driving in the day"), err
    backwards = ["--checkpoint", "night_to_day", "--input", source, "--direction", "a2b"]
    status, _, err = command(*backwards)
    assert status == 2 and "names no caption" in err


def test_the_pictures_of_a_folder_come_out_as_each_alone(trained_files, command, tmp_path):
    """Batches hold one size, two files of the same stem get different names, and files that are
    not pictures are passed over."""
    sizes = {
        "a.png": (16, 16),
        "b.jpg": (16, 16),
        "b.png": (9, 21),
        "c.png": (16, 16),
        "d.png": (16, 16),
    }
    folder = tmp_path / "in"
    for i, (name, size) in enumerate(sizes.items()):
        picture(folder / name, *size, seed=i)
    (folder / "notes.txt").write_text("not a picture")
    (folder / "deeper").mkdir()

    translate = ["--checkpoint", trained_files["stochastic"], "--input"]
    status, paths, _ = command(*translate, folder, "--batch", 3, "--output", "made")
    names = ("a.png", "b.jpg.png", "b.png.png", "c.png", "d.png")
    assert (status, paths) == (0, [f"made/{name}" for name in names])
    for (name, size), path in zip(sizes.items(), paths):
        assert Image.open(path).size == size
        command(*translate, folder / name, "--output", "alone.png")
        assert (levels("alone.png") - levels(path)).abs().max() <= 1


def test_a_bad_picture_in_a_folder_does_not_stop_the_others(trained_files, command, tmp_path):
    folder = tmp_path / "in"
    for name in ("a.png", "c.png"):
        picture(folder / name, 16, 16)
    (folder / "b.png").write_bytes(b"not a picture")
    status, paths, err = command("--checkpoint", trained_files["one caption"], "--input", folder)
    assert (status, paths) == (2, ["out/a.png", "out/c.png"])
    assert str(folder / "b.png") in err.splitlines()[-1]


# What befalls the second of three pictures, by name: its file, or what computing it comes to.
# The error must say what stands behind it.
MISHAPS = {
    "not a picture": (b"not a picture", ["not a picture of a known format"]),
    "cut short": (b"\x89PNG\r\n\x1a\n\0\0", ["b.png is not a"]),
    "empty": (b"", ["b.png is not a"]),
    "NaN": (None, ["out/b.png", "NaN", "damaged"]),
    "out of GPU memory": (torch.OutOfMemoryError("CUDA out of memory"), ["memory", "--tile"]),
    "out of memory": (RuntimeError("DefaultCPUAllocator: can't allocate memory"), ["--tile"]),
    "Python's memory": (MemoryError(), ["too much memory", "--tile"]),
    "a disk": (OSError(5, "Input/output error"), ["Input/output error"]),
    "a bug": (KeyError("weight"), ["Traceback", "KeyError"]),
}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("mishap, says", MISHAPS.values(), ids=MISHAPS.keys())
def test_whatever_befalls_one_picture_the_others_are_made_and_it_is_named(
    trained_files, command, tmp_path, monkeypatch, mishap, says, batch
):
    folder = tmp_path / "in"
    for i, name in enumerate("abc"):
        picture(folder / f"{name}.png", 16, 16, seed=i)
    bad = to_tensor(open_picture(folder / "b.png"))
    translate = sample.translate_pictures

    def translate_or_fail(model, pictures, *inputs, **options):
        translated = translate(model, pictures, *inputs, **options).clone()
        for i, x in enumerate(map(to_tensor, pictures)):
            if torch.equal(x, bad) and mishap is None:
                translated[i, 0, 3, 5] = torch.nan
            elif torch.equal(x, bad):
                raise mishap
        return translated

    if isinstance(mishap, bytes):
        (folder / "b.png").write_bytes(mishap)
    else:
        monkeypatch.setattr(sample, "translate_pictures", translate_or_fail)
    flags = ["--checkpoint", trained_files["one caption"], "--input", folder, "--batch", batch]
    status, paths, err = command(*flags)
    assert (status, paths) == (2, ["out/a.png", "out/c.png"]), err
    assert err.splitlines()[-1].startswith("sample.py: error: 1 of 3 pictures were not made: ")
    assert "b.png" in err.splitlines()[-1]
    assert all(piece in err for piece in says), err


def test_a_failed_preparation_and_an_edit_that_fails_are_kept_for_the_end_too(
    base, trained_files, command, tmp_path, monkeypatch
):
    folder = tmp_path / "in"
    for name, side in [("a", 16), ("b", 24), ("c", 16)]:
        picture(folder / f"{name}.png", side, side)

    def short_of_memory(x: Image.Image | Tensor, *rest) -> Image.Image:
        if max(x.size if isinstance(x, Image.Image) else x.shape) == 24:
            raise MemoryError
        return x

    encode = sample.encode_pictures

    def encode_or_fail(network: vae.VAE, x: Tensor, tile: int) -> Tensor:
        return encode(network, short_of_memory(x), tile)

    monkeypatch.setattr(sample, "canny", short_of_memory)
    monkeypatch.setattr(sample, "encode_pictures", encode_or_fail)
    translator = ["--checkpoint", trained_files["one caption"], "--preprocess", "canny"]
    for flags in (translator, [PROMPT, "--base", base]):
        status, paths, err = command(*flags, "--input", folder)
        assert (status, paths) == (2, ["out/a.png", "out/c.png"]), err
        assert f"{folder / 'b.png'} needs too much memory" in err.splitlines()[-1]


@pytest.mark.parametrize("dtype, advice", [("fp16", "try --dtype float32"), ("float32", "weights")])
def test_nan_is_answered_with_flags_of_this_script(base, command, monkeypatch, dtype, advice):
    def draw_nan(*arguments, **options) -> Tensor:
        return torch.full((1, 3, 16, 16), torch.nan)

    monkeypatch.setattr(sample, "text_to_image", draw_nan)
    status, paths, err = command(PROMPT, "--base", base, "--dtype", dtype)
    assert (status, paths, err.count("\n")) == (2, [], 1)
    assert "out.png" in err and advice in err and "--mixed_precision" not in err


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8", "shift_jis"])
def test_names_that_stdout_cannot_say_are_printed_with_escapes(
    trained_files, tmp_path, encoding
):
    """Some file systems refuse the last name, which is not UTF-8; then there is none such."""
    names = ["\u0142\xf3d\u017a", "\u65e5\u672c", "plain", "\U0001f408", "x" * 245]
    names.append(os.fsdecode(b"latin-\xe9"))
    folder = tmp_path / "in"
    for name in names:
        picture(folder / "plain.png", 16, 16)
        (folder / f"{name}.png").write_bytes((folder / "plain.png").read_bytes())
    flags = ["--checkpoint", trained_files["one caption"], "--input", folder, "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, sample.__file__, *flags],
        cwd=tmp_path,
        capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": encoding},
    )
    assert done.returncode == 0, done.stderr
    assert sorted(path.stem for path in (tmp_path / "out").iterdir()) == sorted(names)
    said = done.stdout.decode(encoding).splitlines()
    expected = [
        f"out/{name}.png".encode(encoding, errors="backslashreplace").decode(encoding)
        for name in names
    ]
    assert sorted(said) == sorted(expected)


@pytest.mark.parametrize("names, made", [
    ("x.png x.jpg x.png.jpg", "x.png.png x.jpg.png x.png.jpg.png"),
    ("x.png x.jpg x.png.jpg x.png.jpg.gif",
     "x.png.png x.jpg.png x.png.jpg.png x.png.jpg.gif.png"),
    ("x.png y.png x.jpg", "x.png.png y.png x.jpg.png"),
    ("x.png y.png.jpg", "x.png y.png.png"),
    ("X.png x.png", "X.png x.png"),
])
def test_no_two_inputs_share_an_output(tmp_path, names, made):
    for name in names.split():
        picture(tmp_path / name, 4, 4)
    targets = sampling.pictures.plan_folder(tmp_path, Path("made"))
    assert {path.name: target.name for path, target in targets.items()} == dict(
        zip(names.split(), made.split())
    )


def canny_with_thresholds(source: Image.Image) -> Image.Image:
    return canny(source, 20, 30)


@pytest.mark.parametrize("flags, prepare", [
    ("--preprocess canny", canny),
    ("--preprocess sketch", sketch),
    ("--preprocess canny --low_threshold 20 --high_threshold 30", canny_with_thresholds),
])
def test_the_input_is_preprocessed_before_all_else(
    trained_files, command, tmp_path, flags, prepare
):
    source = picture(tmp_path / "in.png", 24, 16)
    prepared = prepare(open_picture(source))
    assert 0 < to_tensor(prepared).mean() < 1
    prepared.save(tmp_path / "prepared.png")
    translate = ["--checkpoint", trained_files["one caption"], "--input"]
    command(*translate, source, *flags.split())
    command(*translate, tmp_path / "prepared.png", "--output", "other.png")
    assert torch.equal(levels("out.png"), levels("other.png"))
    command(*translate, source, "--output", "plain.png")
    assert not torch.equal(levels("out.png"), levels("plain.png"))


def test_a_prompt_takes_precedence_over_the_checkpoints_own(trained_files, command, tmp_path):
    source = picture(tmp_path / "in.png", 16, 16)
    translate = ["--checkpoint", trained_files["one caption"], "--input", source, "--output"]
    assert command(*translate, "none.png")[0] == 0
    assert command(*translate, "same.png", "a cat")[0] == 0
    assert command(*translate, "other.png", "a red circle")[0] == 0
    assert torch.equal(levels("none.png"), levels("same.png"))
    assert not torch.equal(levels("none.png"), levels("other.png"))
    checkpoint = trained_files["many captions"]
    assert command("--checkpoint", checkpoint, "--input", source, "a cat")[0] == 0


@pytest.mark.parametrize("dtype, difference", [("bf16", 5), ("fp16", 5), ("float64", 1e-3)])
def test_other_types_draw_nearly_the_same_picture(
    base, trained_files, command, tmp_path, dtype, difference
):
    source = picture(tmp_path / "in.png", 16, 16)
    for arguments in (
        [PROMPT, "--base", base],
        ["--checkpoint", trained_files["stochastic"], "--input", source],
    ):
        command(*arguments)
        assert command(*arguments, "--dtype", dtype, "--output", "other.png")[0] == 0
        assert (levels("out.png") - levels("other.png")).abs().mean() < difference


# Prompts, and what of them is beyond the 22 pieces that the tiny text encoder takes.
LONG_TEXTS = {
    "none": ("", None),
    "just fits": ("a " * 22, None),
    "one word": ("a " * 22 + "red", "red"),
    "two lines": ("a, " * 10 + "a red circle,  \n blue", "circle, blue"),
    "other scripts": ("  a" * 22 + " \u017b\xf3\u0142 \u65e5", "\u017b\xf3\u0142 \u65e5"),
    "very long": ("a " * 22 + "red " * 100, "red " * 50 + "..."),
}


@pytest.mark.parametrize("text, cut", LONG_TEXTS.values(), ids=LONG_TEXTS.keys())
def test_what_the_text_encoder_does_not_see_is_said(
    base, trained_files, command, tmp_path, text, cut
):
    source = picture(tmp_path / "in.png", 16, 16)
    expected = ""
    if cut is not None:
        expected = f"the text encoder takes 24 tokens; this was cut off and has no effect: {cut}\n"
    for flags in (
        [text, "--base", base],
        ["a", "--base", base, "--guidance", 2, "--negative", text],
        [text, "--base", base, "--input", source],
        [text, "--checkpoint", trained_files["many captions"], "--input", source],
    ):
        status, _, err = command(*flags)
        assert (status, err) == (0, expected)


def test_t5s_texts_are_cut_at_its_own_length():
    pieces = tokenizers.load_tokenizer("tiny").pieces
    pieces.add_special_tokens(["<pad>", "</s>"])
    tokenizer = t5.T5Tokenizer(pieces, length=120)
    assert sample.cut_off(tokenizer, "a " * 119) is None
    assert sample.cut_off(tokenizer, " " + "a " * 119 + "Red circle ") == "red circle"


def test_each_png_names_its_own_seed(base, command):
    status, paths, _ = command(PROMPT, "--base", base, "--seed", 10, "--n", 5, "--batch", 3)
    assert status == 0
    assert [Image.open(path).text["seed"] for path in paths] == ["10", "11", "12", "13", "14"]


def test_a_png_names_the_r_that_no_flag_gave(trained_files, command, tmp_path):
    source = picture(tmp_path / "in.png", 16, 16)
    assert command("--checkpoint", trained_files["stochastic"], "--input", source)[0] == 0
    assert Image.open("out.png").text["r"] == "0.4"


# -------------------- speed

def test_the_next_item_is_computed_while_the_caller_works_and_errors_come_in_their_turn():
    begun = threading.Event()

    def items():
        yield "first"
        begun.set()
        yield "second"
        raise ValueError("no third")

    fetched = sampling.pictures.prefetch(items())
    assert next(fetched) == "first" and begun.wait(60) and next(fetched) == "second"
    with pytest.raises(ValueError, match="no third"):
        next(fetched)


@pytest.mark.parametrize("able, dtype", [(True, torch.bfloat16), (False, torch.float32)])
def test_the_default_type_is_bf16_where_the_processor_computes_in_it(monkeypatch, able, dtype):
    """And the PNG will say which type was chosen."""
    monkeypatch.setattr(sampling.precision, "computes_in_bf16", lambda device: able)
    options = sample.parse(["a circle", "--base", "tiny-turbo"])
    loaded = sample.prepare_base(options, torch.device("cpu"))
    weights = [*loaded.base.vae.parameters(), *loaded.base.unet.parameters()]
    assert {weight.dtype for weight in weights} == {dtype}
    assert sampling.precision.DTYPES[loaded.precision] == dtype


@pytest.mark.parametrize(
    "flags, finer",
    [
        ("--base tiny-turbo", False),
        ("--base tiny-turbo --steps 4", False),
        ("--base tiny-turbo --guidance 3", False),
        ("--base tiny-turbo --steps 4 --guidance 3", True),
        ("--base tiny-sd", True),
        ("--base tiny-sd --steps 25", True),
    ],
)
def test_bf16_is_left_out_where_errors_of_the_denoiser_would_grow(monkeypatch, flags, finer):
    monkeypatch.setattr(sampling.precision, "computes_in_bf16", lambda device: True)
    loaded = sample.prepare_base(sample.parse(["a", *flags.split()]), torch.device("cpu"))
    assert loaded.base.vae.decoder.conv_in.weight.dtype == torch.bfloat16
    expected = torch.float32 if finer else torch.bfloat16
    assert loaded.base.unet.conv_in.weight.dtype == expected


@pytest.mark.parametrize("flag", ["checkpoint", "base", "lora", "vae", "size", "controlnet"])
def test_an_unset_variable_of_the_shell_is_no_value(command, flag):
    status, out, err = command(PROMPT, f"--{flag}", "")
    assert (status, out) == (2, []) and f"--{flag} is empty" in err and err.count("\n") == 1


def test_random_weights_are_told_and_an_empty_prompt_is_one(command):
    status, _, err = command("", "--base", "tiny")
    assert status == 0 and err.startswith("tiny: its weights are random")
    assert err.count("\n") == 1


@pytest.mark.parametrize("use", ["translate", "edit", "draw"])
def test_a_picture_that_takes_long_says_so_and_keeps_its_bits(
    base, trained_files, command, tmp_path, monkeypatch, use
):
    source = picture(tmp_path / "in.png", 40, 24)
    flags = ["--checkpoint", trained_files["stochastic"], "--preprocess", "sketch"]
    flags += ["--input", source]
    which = str(source)
    tile = 512  # 64 latents
    if use != "translate":
        flags = [PROMPT, "--base", base, "--input", source]
        tile = 128
    if use == "draw":
        flags = [PROMPT, "--base", base, "--size", "40x24"]
        which = "a picture"
    assert command(*flags)[2] == ""
    monkeypatch.setattr(sampling.pace, "LARGE", 14)
    monkeypatch.setattr(sampling.pace, "CORNER", 4)
    assert command(*flags, "--output", "fast.png")[2] == ""
    monkeypatch.setattr(sampling.pace, "PATIENCE", 0)
    status, _, err = command(*flags, "--output", "slow.png")
    assert status == 0 and err.count("\n") == 1
    advice = f"--tile {tile} computes it in overlapping squares, which takes less memory"
    assert err == f"{which} (40x24 pixels): about 1 min; {advice}\n"
    assert torch.equal(levels("slow.png"), levels("out.png"))
    status, _, err = command(*flags, "--tile", 32)
    how = "in overlapping squares of 32 pixels (--tile)"
    assert err == f"{which} (40x24 pixels): about 1 min; {how}\n"


def test_a_folder_says_once_how_long_its_pictures_take_and_how_many_there_are(
    trained_files, command, tmp_path, monkeypatch
):
    for name in "abc":
        picture(tmp_path / "in" / f"{name}.png", 40, 24)
    monkeypatch.setattr(sampling.pace, "LARGE", 14)
    monkeypatch.setattr(sampling.pace, "CORNER", 4)
    monkeypatch.setattr(sampling.pace, "PATIENCE", 0)
    flags = ["--checkpoint", trained_files["one caption"], "--input", tmp_path / "in"]
    status, paths, err = command(*flags, "--batch", 2)
    assert status == 0 and len(paths) == 3
    assert f"{tmp_path / 'in' / 'a.png'} and 1 more at a time (40x24 pixels)" in err
    assert err.count("about 1 min") == 1 and "3/3" in err


@pytest.mark.parametrize("use", ["edit", "draw"])
def test_with_several_steps_the_second_tells_how_long_all_take(
    base, command, tmp_path, monkeypatch, use
):
    source = picture(tmp_path / "in.png", 16, 16)
    flags = [PROMPT, "--base", base, "--steps", 4]
    if use == "edit":
        flags += ["--input", source]
    command(*flags)
    now = iter(range(0, 1000, 50))
    monkeypatch.setattr(sampling.pace.time, "perf_counter", lambda: next(now))
    status, _, err = command(*flags, "--output", "slow.png")
    assert status == 0, err
    assert err.startswith("a picture (16x16 pixels): about 3 min; --tile 128")
    assert torch.equal(levels("slow.png"), levels("out.png"))


def test_the_estimate_grows_from_the_pixels_to_their_square(monkeypatch, capsys):
    now = iter(range(0, 1000, 3))
    monkeypatch.setattr(sampling.pace.time, "perf_counter", lambda: next(now))
    monkeypatch.setattr(sampling.pace, "PATIENCE", 0)

    def seconds(width: int, height: int, tile: int = 0) -> float:
        seen = []

        def compute(side: int) -> Tensor:
            seen.append(side)
            return torch.zeros(1)

        pace = sampling.pace.Pace(tile, 8, tiles_all=True, tiles_unasked=False, times_small=True)
        pace.estimate("a picture", (width, height), 1, compute)
        assert seen == [64, 256]
        return pace.announced

    assert seconds(1024, 1024) == pytest.approx(3 * 5.6 / 0.25625)
    assert "a picture (1024x1024 pixels): about 1 min; --tile 512" in capsys.readouterr().err
    assert seconds(1024, 1024) / seconds(1024, 768) == pytest.approx(5.6 / 3.9)
    assert seconds(8192, 8192) / seconds(4096, 4096) == pytest.approx(16, rel=0.2)
    # In tiles it grows as the pixels do.
    assert seconds(8192, 8192, 1024) / seconds(4096, 4096, 1024) == pytest.approx(4, rel=0.2)

    def fail(side: int) -> Tensor:
        raise MemoryError

    pace = sampling.pace.Pace(None, 8, tiles_all=True, tiles_unasked=True, times_small=True)
    pace.estimate("a picture", (1024, 1024), 1, fail)
    assert pace.announced is None


def test_a_cpu_computes_huge_pictures_in_tiles_unless_that_is_forbidden(
    base, trained_files, command, tmp_path, monkeypatch
):
    source = picture(tmp_path / "in.png", 72, 40)
    seen = []
    decode = vae.VAE.decode

    def watch_decode(*inputs) -> Tensor:
        decoded = decode(*inputs)
        seen.append(max(decoded.shape[2:]))
        return decoded

    monkeypatch.setattr(vae.VAE, "decode", watch_decode)
    monkeypatch.setattr(sampling.pace, "LARGE", 0)
    monkeypatch.setattr(sampling.pace, "CORNER", 4)
    monkeypatch.setattr(sampling.pace, "TILED", 2000)
    monkeypatch.setattr(sampling.pace, "TILE", 6)
    translate = ["--checkpoint", trained_files["stochastic"], "--input", source]
    prompt = [PROMPT, "--base", base]
    for flags, which, tile in [
        (translate, source, 48),
        ([*prompt, "--input", source], source, 12),
        ([*prompt, "--size", "72x40"], "a picture", 12),
    ]:
        seen.clear()
        status, (path,), err = command(*flags)
        assert status == 0 and max(seen) <= tile
        assert Image.open(path).text["tile"] == str(tile)
        assert err == (
            f"{which} (72x40 pixels): about 1 min; computed in overlapping squares of {tile}"
            " pixels, whose colours may differ; --tile off computes it whole\n"
        )
        for off in ("off", "0"):
            seen.clear()
            status, _, err = command(*flags, "--tile", off)
            assert (status, err, max(seen)) == (0, "", 72)
            assert "tile" not in Image.open(path).text
    on_a_gpu = sampling.pace.Pace(None, 8, tiles_all=True, tiles_unasked=False, times_small=True)
    assert on_a_gpu.tile_of((9000, 9000)) is None


def test_tiles_bound_what_the_networks_see_and_small_pictures_keep_their_bits(
    base, trained_files, command, tmp_path, monkeypatch
):
    small = picture(tmp_path / "small.png", 30, 24)
    large = picture(tmp_path / "large.png", 70, 45)
    seen = []
    encode = vae.VAE.encode
    decode = vae.VAE.decode

    def watch_encode(network, x):
        seen.append(x.shape)
        return encode(network, x)

    def watch_decode(*inputs):
        decoded = decode(*inputs)
        seen.append(decoded.shape)
        return decoded

    monkeypatch.setattr(vae.VAE, "encode", watch_encode)
    monkeypatch.setattr(vae.VAE, "decode", watch_decode)
    prompt = [PROMPT, "--base", base]
    translate = ["--checkpoint", trained_files["stochastic"], "--input"]
    for flags, size in [
        ([*translate, small], (30, 24)),
        ([*translate, large], (70, 45)),
        ([*prompt, "--size", "16"], (16, 16)),
        ([*prompt, "--size", "64x48"], (64, 48)),
        ([*prompt, "--input", large, "--strength", "0.5"], (70, 45)),
    ]:
        command(*flags, "--output", "whole.png")
        seen.clear()
        status, _, err = command(*flags, "--tile", 32)
        assert status == 0 and Image.open("out.png").size == size, err
        assert max(side for shape in seen for side in shape[-2:]) <= 32
        assert torch.equal(levels("out.png"), levels("whole.png")) == (max(size) <= 32)


def test_compiled_networks_draw_the_same_picture(
    base, trained_files, command, tmp_path, monkeypatch
):
    """By the eager backend. What becomes one graph is sample.py's business, machine code is not."""
    compile_network = torch.nn.Module.compile
    calls = []

    def compile_eagerly(network, **options):
        calls.append(options)
        compile_network(network, backend="eager", fullgraph=True, dynamic=options["dynamic"])

    monkeypatch.setattr(torch.nn.Module, "compile", compile_eagerly)
    source = picture(tmp_path / "in.png", 16, 16)
    translate = ["--checkpoint", trained_files["unpaired"], "--input", source]
    for flags, graphs in [([PROMPT, "--base", base], 3), (translate, 1)]:
        command(*flags)
        calls.clear()
        status, _, err = command(*flags, "--compile", "--output", "compiled.png")
        assert status == 0, err
        assert calls == [dict(dynamic=False, mode=None)] * graphs
        assert (levels("compiled.png") - levels("out.png")).abs().max() <= 1


def test_all_steps_share_one_graph(base):
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    networks = bases.load_base(base)
    networks.unet.compile(dynamic=False, backend=backend)
    sample.text_to_image(networks, PROMPT, [0], (16, 16), steps=12)
    assert len(graphs) == 1


@pytest.mark.parametrize("kind", ["unpaired", "stochastic"])
def test_an_exported_program_gives_the_same_picture(trained_files, command, tmp_path, kind):
    source = picture(tmp_path / "in.png", 15, 17)
    translate = ["--checkpoint", trained_files[kind], "--input", source, "--export", "a.pt2"]
    if kind == "stochastic":
        translate += ["a circle", "--r", "0.3"]
    status, paths, err = command(*translate)
    assert (status, paths) == (0, ["a.pt2", "out.png"]), err

    factor = checkpoints.load_generator(trained_files[kind]).generator.vae.factor
    x, _ = pad_to_multiple(to_tensor(open_picture(source))[None], factor)
    inputs = [x]
    if kind == "stochastic":
        noise, _ = training.draw_noise([42], (4, *(side // factor for side in x.shape[2:])))
        inputs.append(noise)
    translated = torch.export.load("a.pt2").module()(*inputs)
    assert_holds("out.png", translated[0, :, :17, :15])


def test_an_exported_program_has_the_direction_and_the_skip_scale(
    trained_files, command, tmp_path
):
    source = picture(tmp_path / "in.png", 16, 16)
    translate = ["--checkpoint", trained_files["unpaired"], "--input", source]
    flags = ["--direction", "b2a", "--skip_scale", 0.3]
    assert command(*translate, *flags, "--export", "a.pt2")[0] == 0
    translated = torch.export.load("a.pt2").module()(to_tensor(open_picture(source))[None])
    assert_holds("out.png", translated[0])


def test_several_pictures_at_a_time_take_as_many_times_as_long():
    settings = dict(tile=None, factor=8, rate=10.0)
    settings |= dict(tiles_all=True, tiles_unasked=True, times_small=True)
    said = []
    for count in (1, 3):
        pace = sampling.pace.Pace(**settings)
        pace.estimate("pictures", (2000, 1500), count, lambda side: pytest.fail("it is known"))
        said.append(pace.announced)
    assert said[1] == pytest.approx(3 * said[0])


# -------------------- a user's mistakes

# Arguments, and what the error must say. T is a prompt, B a base, P a picture, D its folder, and
# C, M, S, U are checkpoints: one caption, many captions, stochastic, unpaired.
REFUSED = {
    "no prompt": ("--base B", ["nothing to draw"]),
    "no prompt where there are many": (
        "--checkpoint M --input P",
        ["names no caption", "expected"],
    ),
    "no input": ("--checkpoint C", ["translates pictures; expected --input"]),
    "no checkpoint": ("--input P", ["expected a translator (--checkpoint), or a prompt"]),
    "missing input": ("--checkpoint C --input none.png", ["none.png"]),
    "input that is no picture": (
        "--checkpoint C --input notes.txt",
        ["notes.txt", "not a picture"],
    ),
    "folder without pictures": (
        "--checkpoint C --input empty",
        ["empty", "no picture", ".png"],
    ),
    "missing checkpoint": (
        "--checkpoint none.pkl --input P",
        ["none.pkl", "edge_to_image"],
    ),
    "checkpoint that is text": (
        "--checkpoint notes.txt --input P",
        ["notes.txt", "checkpoint"],
    ),
    "checkpoint that is a picture": ("--checkpoint P --input P", ["in.png", "checkpoint"]),
    "checkpoint that is a base": ("--checkpoint B --input P", ["model.safetensors"]),
    "base that is a checkpoint": ("T --base C", ["is a translator", "expected a folder"]),
    "missing base": ("T --base none", ["no folder here", "sd-turbo"]),
    "base without network": (
        "T --base someone/model",
        ["someone/model", "could not be fetched"],
    ),
    "base that may not be fetched": (
        "T --base sd-turbo",
        ["sd-turbo", "could not be fetched"],
    ),
    "r above 1": ("--checkpoint S --input P --r 1.5", ["--r 1.5", "0 to 1"]),
    "r below 0": ("--checkpoint S --input P --r -0.1", ["--r -0.1", "0 to 1"]),
    "r that is no number": ("--checkpoint S --input P --r nan", ["--r nan", "finite"]),
    "r of a deterministic model": (
        "--checkpoint C --input P --r 0.5",
        ["--r", "not a stochastic"],
    ),
    "r of a prompt": ("T --base B --r 0.5", ["--r has no meaning without a translator"]),
    "direction of a paired model": (
        "--checkpoint C --input P --direction b2a",
        ["one way"],
    ),
    "r of an unpaired model": (
        "--checkpoint U --input P --r 0.5",
        ["--r", "not a stochastic"],
    ),
    "an embedding for a translator": (
        "--checkpoint C --input P --embedding cat.pt",
        ["--embedding has no meaning with a translator"],
    ),
    "an embedding that is not there": (
        "T --base B --embedding none.pt:<cat>",
        ["there is no none.pt", "expected an embedding"],
    ),
    "an embedding that is text": (
        "T --base B --embedding notes.txt",
        ["notes.txt", "expected an embedding"],
    ),
    "negative prompt without guidance": (
        "T --base B --negative fog",
        ["--negative has no meaning without"],
    ),
    "scale without ControlNet": (
        "T --base B --control_scale 2",
        ["--control_scale has no meaning"],
    ),
    "threshold without canny": (
        "--checkpoint C --input P --low_threshold 9",
        ["--low_threshold has"],
    ),
    "saving into a full folder": (
        "T --base B --save D",
        ["--save", "expected a new or empty one"],
    ),
    "saving what cannot be drawn then": ("T --base B --save new --size 7", ["--size 7"]),
    "saving before too many steps": ("T --base B --save new --steps 1001", ["1001 steps"]),
    "saving before a prior without a meaning": (
        "T --base tiny-turbo --save new --prior notes.txt",
        ["--prior has no meaning for tiny-turbo"],
    ),
    "saving below a file": ("T --base B --save notes.txt/new", ["--save: notes.txt is a file"]),
    "steps of nothing that is drawn": (
        "--base B --save new --steps 4",
        ["--steps has no meaning without a prompt"],
    ),
    "prior that is not there": ("T --base tiny-sd --prior none.st", ["none.st is not a file"]),
    "prior of a base that starts from noise": (
        "T --base tiny-turbo --prior notes.txt",
        ["--prior has no meaning for tiny-turbo"],
    ),
    "output below a picture": ("--checkpoint C --input P --output notes.txt/new", ["is a file"]),
    "strength below 0": ("--checkpoint C --input P --strength -1", ["--strength -1", "0 to 10"]),
    "program below a file": (
        "--checkpoint C --input P --export notes.txt/a.pt2",
        ["--export: notes.txt is a file"],
    ),
    "page below a file": ("--output notes.txt/a.png", ["notes.txt is a file"]),
    "strength that is no number": (
        "--checkpoint C --input P --strength nan",
        ["--strength nan", "finite"],
    ),
    "device without numbers": ("T --base B --device meta", ["--device meta"]),
    "autoencoder of a translator": (
        "--checkpoint C --input P --vae taesd",
        ["--vae has no meaning with a translator, whose skips need the VAE of its base"],
    ),
    "autoencoder of another factor": (
        "T --base tiny-turbo --vae B",
        ["1/2 of a picture's side; expected 4 channels and 1/4"],
    ),
    "~ of nobody": ("T --base ~nobody-here/model", ["~nobody-here/model is no folder here"]),
    "autoencoder that is text": ("T --base B --vae notes.txt", ["notes.txt", "autoencoder"]),
    "autoencoder that may not be fetched": (
        "T --base B --vae taesd",
        ["madebyollin/taesd", "could not be fetched"],
    ),
    "program of a prompt": (
        "T --base B --export a.pt2",
        ["--export has no meaning without a"],
    ),
    "program of a folder": (
        "--checkpoint C --input D --export a.pt2",
        ["--export", "a folder"],
    ),
    "program over the output": (
        "--checkpoint C --input P --export a.png --output a.png",
        ["--export a.png", "a name ending in .pt2"],
    ),
    "program over the input": (
        "--checkpoint C --input P --export P",
        ["--export", "a name ending in .pt2"],
    ),
    "LoRA on a translator": (
        "--checkpoint C --input P --lora x",
        ["--lora has no meaning with"],
    ),
    "steps of a translator": (
        "--checkpoint C --input P --steps 4",
        ["--steps has no meaning with"],
    ),
    "size that is no multiple": ("T --base B --size 15", ["--size 15", "multiples of 2"]),
    "size in words": ("T --base B --size large", ["--size large", "WIDTHxHEIGHT"]),
    "size of three sides": ("T --base B --size 8x8x8", ["--size 8x8x8"]),
    "size in other digits": ("T --base B --size ²", ["--size ²", "WIDTHxHEIGHT"]),
    "size beyond all memory": ("T --base B --size 8000000000", ["up to 65536"]),
    "size 0": ("T --base B --size 0", ["--size 0"]),
    "no steps": ("T --base B --steps 0", ["--steps 0", "1 or more"]),
    "too many steps": ("T --base B --steps 1001", ["1001 steps", "1 to 1000"]),
    "too many LCM steps": (
        "T --base B --steps 51 --sampler lcm",
        ["51 steps", "1 to 50"],
    ),
    "no pictures": ("T --base B --n 0", ["--n 0", "1 or more"]),
    "negative seed": ("T --base B --seed -1", ["--seed -1"]),
    "seed in words": ("T --base B --seed x", ["--seed", "x"]),
    "unknown flag": (
        "T --base B --guidence 2",
        ["--guidence", "did you mean --guidance?"],
    ),
    "unknown sampler": (
        "T --base B --sampler heun",
        ["--sampler", "heun", "ddim", "lcm"],
    ),
    "two prompts": ("T another --base B", ["another"]),
    "several pictures into one file": (
        "T --base B --n 2 --output a.png",
        ["a.png", "folder"],
    ),
    "folder into one file": (
        "--checkpoint C --input D --output a.png",
        ["a.png", "folder"],
    ),
    "another format": ("T --base B --output a.jpg", ["a.jpg", ".png"]),
    "another format of the page": ("--output a.jpg", ["a.jpg", ".png"]),
    "output over the input": (
        "--checkpoint C --input P --output P",
        ["in.png", "another name"],
    ),
    "output over the input, as a folder": (
        "--checkpoint C --input P --output D",
        ["in.png"],
    ),
    "output into the input folder": (
        "--checkpoint C --input D --output D",
        ["is the folder of the input", "another folder"],
    ),
    "output below a file": ("T --base B --output notes.txt/a.png", ["notes.txt"]),
    "unknown device": ("T --base B --device tpu9", ["--device tpu9", "cpu"]),
    "tile too small": ("T --base B --tile 8", ["--tile 8", "32 or more"]),
    "tile that is no number": ("T --base B --tile large", ["--tile large", "or off"]),
    "unknown type": ("T --base B --dtype int8", ["--dtype", "int8", "bf16"]),
}


@pytest.mark.parametrize("arguments, says", REFUSED.values(), ids=REFUSED.keys())
def test_a_users_mistake_is_one_line_and_writes_nothing(
    base, trained_files, command, tmp_path, monkeypatch, arguments, says
):
    source = picture(tmp_path / "pictures" / "in.png", 16, 16)
    names = dict(
        T=PROMPT,
        B=base,
        C=trained_files["one caption"],
        M=trained_files["many captions"],
        S=trained_files["stochastic"],
        U=trained_files["unpaired"],
        P=source,
        D=source.parent,
    )
    Path("notes.txt").write_text("words\n")
    Path("empty").mkdir()
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # where nobody answers
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)

    def all_files() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    before = all_files()
    status, out, err = command(*(names.get(word, word) for word in arguments.split()))
    assert (status, out) == (2, []), err
    assert err.startswith("sample.py: error: ") and err.count("\n") == 1, err
    assert all(piece in err for piece in says), err
    assert all_files() == before

"""sample.py draws what the `diffusers` pipelines draw from the same folder and noise, and translates pictures of any
size; what a user gets wrong is one line, and writes nothing."""

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
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from test_weights import SCHEDULE, TOKENIZER, VAE, tiny_pipeline
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import sample
import training
from dataset.pictures import canny, open_picture, pad_to_multiple, sketch, to_picture, to_tensor
from files import bases, checkpoints, tokenizers
from models import clip, unet, vae
from models.cyclegan_turbo import CycleGANTurbo, CycleGANTurboConfig
from models.diffusion import Schedule
from models.lora import set_scale
from models.pix2pix_turbo import Pix2PixTurbo, Pix2PixTurboConfig

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPT, NEGATIVE = "a red circle on a blue background", "green"
BETAS = torch.linspace(SCHEDULE["beta_start"] ** 0.5, SCHEDULE["beta_end"] ** 0.5, 1000, dtype=torch.float64) ** 2
ALPHA_BAR = (1 - BETAS).cumprod(0)


# -------------------------------------------------------------------------------------------------- text to a picture


def both(pipe: StableDiffusionPipeline, folder: Path, size: tuple[int, int], steps: int, guidance: float,
         **options) -> tuple[Tensor, Tensor]:
    """Two pictures by sample.py and by the pipeline, in float64, of the same noise."""
    pipe.to(torch.float64).save_pretrained(folder)
    base, seeds = bases.load_base(str(folder)), [3, 4]
    ours = sample.text_to_image(base, PROMPT, seeds, size, steps, guidance=guidance, **options)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    noise = torch.cat([torch.randn(1, 4, size[1] // 2, size[0] // 2, generator=g) for g in generators])
    theirs = pipe(PROMPT, negative_prompt=options.get("negative"), width=size[0], height=size[1],
                  latents=noise.double(), num_inference_steps=steps, guidance_scale=guidance, generator=generators,
                  num_images_per_prompt=2, output_type="pt").images
    assert 0 < theirs.std() and ((0 < theirs) & (theirs < 1)).float().mean() > 0.5
    return (ours + 1) / 2, theirs


@pytest.mark.parametrize("guidance", [0.0, 1.0])
@pytest.mark.parametrize("steps, size", [(1, (16, 16)), (4, (16, 24))])
def test_sd_turbo_draws_what_the_euler_pipeline_draws(tmp_path, steps, size, guidance):
    """Within 1e-6: the peer's scheduler computes in float32. Guidance up to 1 is none, as there."""
    pipe = tiny_pipeline(scheduler=EulerDiscreteScheduler(**SCHEDULE, timestep_spacing="trailing"))
    ours, theirs = both(pipe, tmp_path, size, steps, guidance)
    assert relative(ours, theirs) < 1e-6


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_sd_15_draws_what_the_ddim_pipeline_draws(tmp_path, prediction):
    scheduler = DDIMScheduler(**SCHEDULE, clip_sample=False, set_alpha_to_one=False, steps_offset=1,
                              prediction_type=prediction)
    scheduler.alphas_cumprod, scheduler.final_alpha_cumprod = ALPHA_BAR, ALPHA_BAR[0]  # the peer's are in float32
    ours, theirs = both(tiny_pipeline(scheduler=scheduler), tmp_path, (24, 16), 25, 7.5, negative=NEGATIVE)
    assert relative(ours, theirs) < 1e-9


@pytest.mark.parametrize("steps, guidance", [(4, 1.0), (2, 2.0)])
def test_lcm_draws_what_the_lcm_pipeline_draws(tmp_path, monkeypatch, steps, guidance):
    """Each picture's later noise too comes from its own generator. Within 1e-7: the peer's c_skip is in float32."""
    scheduler = LCMScheduler(**SCHEDULE)
    scheduler.alphas_cumprod = ALPHA_BAR
    draw = diffusers.schedulers.scheduling_lcm.randn_tensor
    monkeypatch.setattr(diffusers.schedulers.scheduling_lcm, "randn_tensor", lambda shape, generator, device, dtype:
                        draw(shape, generator=generator, device=device, dtype=torch.float32).to(dtype))
    ours, theirs = both(tiny_pipeline(scheduler=scheduler), tmp_path, (16, 16), steps, guidance, sampler="lcm")
    assert relative(ours, theirs) < 1e-7


@pytest.mark.slow
@torch.no_grad()
def test_full_size_sd_turbo_draws_what_the_pipeline_draws_in_float32():
    """Random weights in the published sizes, shared by both sides: 5.2 GB."""
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER, model_max_length=77)
    text = dict(vocab_size=49408, hidden_size=1024, intermediate_size=4096, num_hidden_layers=23,
                num_attention_heads=16, hidden_act="gelu")
    sizes = dict(cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True)
    levels = dict(block_out_channels=(128, 256, 512, 512), layers_per_block=2, norm_num_groups=32, latent_channels=4,
                  down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4)
    peers = dict(vae=AutoencoderKL(**levels), unet=UNet2DConditionModel(**sizes, sample_size=64),
                 text_encoder=CLIPTextModel(CLIPTextConfig(**text, eos_token_id=2)))
    with torch.device("meta"):
        base = bases.Base("", vae=vae.VAE(vae.VAEConfig()), unet=unet.UNet(unet.UNetConfig(**sizes)),
                            text_encoder=clip.TextEncoder(clip.TextConfig(**text)))
    for part, peer in peers.items():
        prefix = "text_model." if part == "text_encoder" else ""
        getattr(base, part).load_state_dict({prefix + name.removeprefix(prefix): t
                                             for name, t in randomise(peer).state_dict().items()}, assign=True)
    scheduler = EulerDiscreteScheduler(**SCHEDULE, timestep_spacing="trailing")
    base.tokenizer = clip.Tokenizer(tokenizers.load_tokenizer("tiny").pieces)
    base.schedule = Schedule.from_config(json.loads(scheduler.to_json_string()))
    pipe = StableDiffusionPipeline(**peers, tokenizer=tokenizer, scheduler=scheduler, safety_checker=None,
                                   feature_extractor=None, requires_safety_checker=False)
    noise, _ = training.draw_noise([0], (4, 32, 32))
    theirs = pipe(PROMPT, width=256, height=256, latents=noise, num_inference_steps=1, guidance_scale=0.0,
                  output_type="pt").images
    ours = sample.text_to_image(base, PROMPT, [0], (256, 256))
    assert theirs.std() > 0.01
    assert relative((ours + 1) / 2, theirs) < 1e-4


def test_noise_is_one_generators_a_picture_from_its_first_draw_on():
    noise, generators = training.draw_noise([7, 8, 9], (4, 2, 3))
    again = torch.Generator().manual_seed(8)
    assert noise.dtype == torch.float32
    assert torch.equal(noise[1:2], torch.randn(1, 4, 2, 3, generator=again))
    assert torch.equal(torch.randn(5, generator=generators[1]), torch.randn(5, generator=again))


# ------------------------------------------------------------------------------------------------- the command line


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A tiny SD-Turbo: factor 2, 16 pixels a side."""
    folder = tmp_path_factory.mktemp("base")
    tiny_pipeline(scheduler=EulerDiscreteScheduler(**SCHEDULE, timestep_spacing="trailing")).save_pretrained(folder)
    return folder


def trained(base: Path, path: Path, stochastic: bool | None, prompts: list[str]) -> Path:
    """A pix2pix-Turbo, or where `stochastic` is None a CycleGAN-Turbo."""
    loaded = bases.load_base(str(base))
    networks = loaded.vae, loaded.unet, loaded.schedule
    kind = "cyclegan_turbo" if stochastic is None else "pix2pix_turbo"
    generator = CycleGANTurbo(*networks, CycleGANTurboConfig(lora_rank_unet=4)) if stochastic is None else \
        Pix2PixTurbo(*networks, Pix2PixTurboConfig(stochastic=stochastic))
    for i, p in enumerate(p for p in generator.parameters() if p.requires_grad):
        p.data = 0.5 * normal(*p.shape, seed=i, dtype=torch.float32) / max(p[0].numel(), 1) ** 0.5
    path.parent.mkdir()
    checkpoints.save_generator(path, generator, kind, str(base), prompts)
    return path


@pytest.fixture(scope="module")
def trained_files(base, tmp_path_factory) -> dict[str, str]:
    """Four levels (factor 8), as Stable Diffusion."""
    folder = tmp_path_factory.mktemp("trained")
    deep = dict(VAE, block_out_channels=(8, 8, 12, 12), down_block_types=["DownEncoderBlock2D"] * 4,
                up_block_types=["UpDecoderBlock2D"] * 4)
    tiny_pipeline(vae=deep, scheduler=DDPMScheduler(**SCHEDULE)).save_pretrained(folder / "base")
    return {"one caption": str(trained(folder / "base", folder / "a" / "model.safetensors", False, ["a cat"])),
            "many captions": str(trained(folder / "base", folder / "b" / "model.safetensors", False, [])),
            "stochastic": str(trained(folder / "base", folder / "c" / "model.safetensors", True, ["a cat"])),
            "unpaired": str(trained(folder / "base", folder / "d" / "model.safetensors", None, ["a day", "a night"]))}


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """python sample.py ..., within this process, in an empty folder, in float32 unless told: status, paths printed,
    stderr."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def call(*arguments: object) -> tuple[int, list[str], str]:
        arguments += () if "--dtype" in arguments else ("--dtype", "float32")
        monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, arguments)])
        capsys.readouterr()
        try:
            training.run(sample.main)
            status = 0
        except SystemExit as stop:
            status = stop.code
        out, err = capsys.readouterr()
        return status, out.splitlines(), err
    return call


def picture(path: Path, width: int, height: int, seed: int = 0) -> Path:
    """A photograph of sorts: soft, with an edge."""
    x = torch.nn.functional.interpolate(normal(1, 3, 4, 4, seed=seed), (height, width), mode="bicubic")[0]
    path.parent.mkdir(parents=True, exist_ok=True)
    to_picture(x.tanh()).save(path)
    return path


def levels(path: str | Path) -> Tensor:
    return to_tensor(open_picture(path)).mul(255).round()


def test_the_script_draws_a_picture_and_prints_its_path(base, tmp_path):
    script = Path(sample.__file__)
    done = subprocess.run([sys.executable, str(script), PROMPT, "--base", str(base), "--device", "cpu"], cwd=tmp_path,
                          capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert (done.returncode, done.stdout) == (0, "out.png\n"), done.stderr
    assert Image.open(tmp_path / "out.png").size == (16, 16)


def test_a_seed_is_a_picture_whatever_is_drawn_beside_it(base, command):
    """To one level of 255: a batch is added up in another order."""
    status, paths, _ = command(PROMPT, "--base", base, "--n", 5, "--batch", 3, "--seed", 10, "--size", "24x16")
    assert (status, paths) == (0, [f"out/{seed}.png" for seed in range(10, 15)])
    pictures = [levels(path) for path in paths]
    assert all(p.shape == (3, 16, 24) for p in pictures)
    assert all((pictures[0] - p).abs().max() > 20 for p in pictures[1:])
    for seed in (10, 12, 14):
        command(PROMPT, "--base", base, "--seed", seed, "--size", "24x16", "--output", "alone.png")
        assert (levels("alone.png") - pictures[seed - 10]).abs().max() <= 1


def test_a_picture_is_the_networks_to_the_nearest_level_and_says_how_it_was_made(base, command):
    options = dict(steps=4, sampler="lcm", guidance=2.0, negative=NEGATIVE)
    flags = [f"--{name}={value}" for name, value in options.items()]
    assert command(PROMPT, "--base", base, "--seed", 5, *flags, "--output", "new/a.png")[:2] == (0, ["new/a.png"])
    x = sample.text_to_image(bases.load_base(str(base)), PROMPT, [5], (16, 16), **options)
    assert ((x[0] + 1) * 127.5 - levels("new/a.png")).abs().max() <= 0.5 + 1e-3
    text = Image.open("new/a.png").text
    assert {k: text[k] for k in ("prompt", "seed", "base", "steps", "sampler", "guidance", "negative")} == {
        "prompt": PROMPT, "seed": "5", "base": str(base), **{k: str(v) for k, v in options.items()}}
    assert text["version"] and "checkpoint" not in text


@pytest.mark.parametrize("size", [(37, 53), (5, 7), (1, 1), (8, 16), (64, 3)])
@pytest.mark.parametrize("kind", ["one caption", "stochastic"])
def test_a_translation_has_the_size_of_its_input(trained_files, command, tmp_path, kind, size):
    source = picture(tmp_path / "in.png", *size)
    status, paths, err = command("--checkpoint", trained_files[kind], "--input", source)
    assert (status, paths) == (0, ["out.png"]), err
    assert Image.open("out.png").size == size


@torch.no_grad()
def test_a_translation_is_the_generators_of_the_padded_picture(trained_files, command, tmp_path):
    source = picture(tmp_path / "in.jpg", 21, 13)
    command("--checkpoint", trained_files["stochastic"], "--input", source, "--r", 0.7, "--seed", 3, "--skip_scale", 0.5)
    loaded = checkpoints.load_generator(trained_files["stochastic"], merged=False)
    set_scale(loaded.generator, 0.7)
    x = torch.nn.functional.pad(to_tensor(open_picture(source))[None], (0, 3, 0, 3), mode="reflect")
    noise = torch.randn(1, 4, 2, 3, generator=torch.Generator().manual_seed(3))
    y = loaded.generator(x, loaded.text_encoder(loaded.tokenizer("a cat")), 0.7, noise, 0.5)[0, :, :13, :21]
    assert ((y + 1) * 127.5 - levels("out.png")).abs().max() <= 0.5 + 1e-2
    text = Image.open("out.png").text
    assert {k: text[k] for k in ("prompt", "seed", "r", "skip_scale", "checkpoint")} == dict(
        prompt="a cat", seed="3", r="0.7", skip_scale="0.5", checkpoint=trained_files["stochastic"])
    for flag, value in [("--r", 0.2), ("--seed", 4), ("--strength", 0.5), ("--skip_scale", 1)]:
        given = {"--r": 0.7, "--seed": 3, "--skip_scale": 0.5, flag: value}
        command("--checkpoint", trained_files["stochastic"], "--input", source, "--output", "other.png",
                *(piece for pair in given.items() for piece in pair))
        assert (levels("other.png") - levels("out.png")).abs().max() > 1, flag


@torch.no_grad()
def test_an_unpaired_translation_goes_where_the_direction_says_with_its_caption(trained_files, command, tmp_path):
    source = picture(tmp_path / "in.png", 24, 16)
    loaded = checkpoints.load_generator(trained_files["unpaired"], merged=False)
    x = to_tensor(open_picture(source))[None] * 2 - 1
    made = {}
    for direction, prompt, flags in [("a2b", "a night", []), ("b2a", "a day", ["--direction", "b2a"])]:
        status, _, err = command("--checkpoint", trained_files["unpaired"], "--input", source, *flags)
        assert status == 0, err
        y = loaded.generator(x, loaded.text_encoder(loaded.tokenizer(prompt)), direction)[0]
        assert ((y + 1) * 127.5 - levels("out.png")).abs().max() <= 0.5 + 1e-2
        text = Image.open("out.png").text
        assert (text["direction"], text["prompt"]) == (direction, prompt)
        made[direction] = levels("out.png")
    assert (made["a2b"] - made["b2a"]).abs().max() > 1


def test_a_released_name_knows_its_direction_and_caption(trained_files, command, tmp_path, monkeypatch):
    source, path = picture(tmp_path / "in.png", 16, 16), Path(trained_files["unpaired"])
    load = checkpoints.load_generator

    def named(name, *rest):  # the released file has no captions in it
        loaded = load(str(path), *rest)
        loaded.prompts = []
        return loaded

    monkeypatch.setattr(checkpoints, "load_generator", named)
    (tmp_path / "night2day.pkl").touch()
    for name in ("night_to_day", tmp_path / "night2day.pkl"):
        status, _, err = command("--checkpoint", name, "--input", source)
        text = Image.open("out.png").text
        assert (status, text["direction"], text["prompt"]) == (0, "b2a", "driving in the day"), err
    status, _, err = command("--checkpoint", "night_to_day", "--input", source, "--direction", "a2b")
    assert status == 2 and "names no caption" in err


def test_a_folder_goes_in_and_a_folder_comes_out_as_each_alone(trained_files, command, tmp_path):
    """Batches are of one size; a name that two files share is kept apart; what is no picture is passed over."""
    sizes = {"a.png": (16, 16), "b.jpg": (16, 16), "b.png": (9, 21), "c.png": (16, 16), "d.png": (16, 16)}
    for i, (name, size) in enumerate(sizes.items()):
        picture(tmp_path / "in" / name, *size, seed=i)
    (tmp_path / "in" / "notes.txt").write_text("no picture")
    (tmp_path / "in" / "deeper").mkdir()
    status, paths, _ = command("--checkpoint", trained_files["stochastic"], "--input", tmp_path / "in", "--batch", 3,
                               "--output", "made")
    assert status == 0
    assert paths == [f"made/{name}" for name in ("a.png", "b.jpg.png", "b.png.png", "c.png", "d.png")]
    for (name, size), path in zip(sizes.items(), paths):
        assert Image.open(path).size == size
        command("--checkpoint", trained_files["stochastic"], "--input", tmp_path / "in" / name, "--output", "alone.png")
        assert (levels("alone.png") - levels(path)).abs().max() <= 1


def test_a_bad_picture_in_a_folder_does_not_keep_the_others_from_being_made(trained_files, command, tmp_path):
    for name in ("a.png", "c.png"):
        picture(tmp_path / "in" / name, 16, 16)
    (tmp_path / "in" / "b.png").write_bytes(b"no picture")
    status, paths, err = command("--checkpoint", trained_files["one caption"], "--input", tmp_path / "in")
    assert (status, paths) == (2, ["out/a.png", "out/c.png"])
    assert str(tmp_path / "in" / "b.png") in err.splitlines()[-1]


@pytest.mark.parametrize("flags, prepare", [
    (["--preprocess", "canny"], canny), (["--preprocess", "sketch"], sketch),
    (["--preprocess", "canny", "--low_threshold", "20", "--high_threshold", "30"], lambda p: canny(p, 20, 30)),
])
def test_preprocessing_is_done_to_the_input_before_all_else(trained_files, command, tmp_path, flags, prepare):
    source = picture(tmp_path / "in.png", 24, 16)
    prepared = prepare(open_picture(source))
    assert 0 < to_tensor(prepared).mean() < 1
    prepared.save(tmp_path / "prepared.png")
    command("--checkpoint", trained_files["one caption"], "--input", source, *flags)
    command("--checkpoint", trained_files["one caption"], "--input", tmp_path / "prepared.png", "--output", "other.png")
    assert torch.equal(levels("out.png"), levels("other.png"))
    command("--checkpoint", trained_files["one caption"], "--input", source, "--output", "plain.png")
    assert not torch.equal(levels("out.png"), levels("plain.png"))


def test_a_prompt_goes_before_the_checkpoints_own(trained_files, command, tmp_path):
    source = picture(tmp_path / "in.png", 16, 16)
    for prompt, name in [((), "none.png"), (("a cat",), "same.png"), (("a red circle",), "other.png")]:
        assert command("--checkpoint", trained_files["one caption"], "--input", source, *prompt, "--output", name)[0] == 0
    assert torch.equal(levels("none.png"), levels("same.png"))
    assert not torch.equal(levels("none.png"), levels("other.png"))
    assert command("--checkpoint", trained_files["many captions"], "--input", source, "a cat")[0] == 0


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "float64"])
def test_other_types_draw_the_same_picture_nearly(base, trained_files, command, tmp_path, dtype):
    source = picture(tmp_path / "in.png", 16, 16)
    for arguments in ([PROMPT, "--base", base], ["--checkpoint", trained_files["stochastic"], "--input", source]):
        command(*arguments)
        assert command(*arguments, "--dtype", dtype, "--output", "other.png")[0] == 0
        assert (levels("out.png") - levels("other.png")).abs().mean() < (1e-3 if dtype == "float64" else 5)


# ------------------------------------------------------------------------------------------------------------- speed


def test_the_next_is_made_while_the_caller_works_and_its_error_comes_in_its_turn():
    begun = threading.Event()

    def items():
        yield "first"
        begun.set()
        yield "second"
        raise ValueError("no third")

    made = sample.ahead(items())
    assert next(made) == "first" and begun.wait(60) and next(made) == "second"
    with pytest.raises(ValueError, match="no third"):
        next(made)


@pytest.mark.parametrize("able, dtype", [(True, torch.bfloat16), (False, torch.float32)])
def test_the_default_type_is_bf16_where_the_processor_computes_in_it(monkeypatch, able, dtype):
    """And the chosen type is known by its name from there on."""
    monkeypatch.setattr(sample, "computes_in_bf16", lambda device: able)
    args = sample.parse(["a circle", "--base", "tiny-turbo"])
    loaded = sample.load(args, torch.device("cpu"))
    assert {p.dtype for network in (loaded.vae, loaded.unet) for p in network.parameters()} == {dtype}
    assert sample.DTYPES[args.dtype] == dtype


def test_tiles_bound_what_the_networks_see_and_a_small_picture_is_the_same_bits(base, trained_files, command, tmp_path,
                                                                                monkeypatch):
    small, large = picture(tmp_path / "small.png", 30, 24), picture(tmp_path / "large.png", 70, 45)
    prompt, translate = [PROMPT, "--base", base], ["--checkpoint", trained_files["stochastic"], "--input"]
    seen = []
    encode, decode = vae.VAE.encode, vae.VAE.decode
    monkeypatch.setattr(vae.VAE, "encode", lambda self, x: (seen.append(x.shape), encode(self, x))[1])
    monkeypatch.setattr(vae.VAE, "decode", lambda *inputs: (seen.append((made := decode(*inputs)).shape), made)[1])
    for flags, size in [([*translate, small], (30, 24)), ([*translate, large], (70, 45)),
                        ([*prompt, "--size", "16"], (16, 16)), ([*prompt, "--size", "64x48"], (64, 48)),
                        ([*prompt, "--input", large, "--strength", "0.5"], (70, 45))]:
        command(*flags, "--output", "whole.png")
        seen.clear()
        status, _, err = command(*flags, "--tile", 32)
        assert status == 0 and Image.open("out.png").size == size, err
        assert max(side for shape in seen for side in shape[-2:]) <= 32
        assert torch.equal(levels("out.png"), levels("whole.png")) == (max(size) <= 32)


def test_compiled_networks_draw_the_same_picture(base, trained_files, command, tmp_path, monkeypatch):
    """By the eager backend: whether code is made of the graph is not sample.py's business, what is a graph is."""
    compile, how = torch.nn.Module.compile, []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: (
        how.append(options), compile(self, backend="eager", fullgraph=True, dynamic=options["dynamic"])))
    source = picture(tmp_path / "in.png", 16, 16)
    translate = ["--checkpoint", trained_files["unpaired"], "--input", source]
    for flags, graphs in [([PROMPT, "--base", base], 3), (translate, 1)]:
        command(*flags)
        how.clear()
        status, _, err = command(*flags, "--compile", "--output", "compiled.png")
        assert status == 0 and how == graphs * [dict(dynamic=False, mode=None)], err
        assert (levels("compiled.png") - levels("out.png")).abs().max() <= 1


def test_all_steps_are_one_graph(base):
    torch._dynamo.reset()
    made, networks = [], bases.load_base(base)
    networks.unet.compile(dynamic=False, backend=lambda graph, inputs: (made.append(graph), graph.forward)[1])
    sample.text_to_image(networks, PROMPT, [0], (16, 16), steps=12)
    assert len(made) == 1


@pytest.mark.parametrize("kind", ["unpaired", "stochastic"])
def test_an_exported_program_makes_the_same_picture(trained_files, command, tmp_path, kind):
    source = picture(tmp_path / "in.png", 15, 17)
    flags = [] if kind == "unpaired" else ["a circle", "--r", "0.3"]
    status, paths, err = command("--checkpoint", trained_files[kind], "--input", source, *flags, "--export", "a.pt2")
    assert (status, paths) == (0, ["a.pt2", "out.png"]), err
    factor = checkpoints.load_generator(trained_files[kind]).generator.vae.factor
    x, _ = pad_to_multiple(to_tensor(open_picture(source))[None], factor)
    size = [side // factor for side in x.shape[2:]]
    noise = [] if kind == "unpaired" else [training.draw_noise([42], (4, *size))[0]]
    made = torch.export.load("a.pt2").module()(x, *noise)[0, :, :17, :15]
    assert ((made + 1) * 127.5 - levels("out.png")).abs().max() <= 0.5 + 1e-2


# What is asked for (B a base, C and S checkpoints, P a picture, D a folder of one), and what the line must say.
REFUSED = {
    "no prompt": (["--base", "B"], ["nothing to draw"]),
    "no prompt where there are many": (["--checkpoint", "M", "--input", "P"], ["names no caption", "expected"]),
    "no input": (["--checkpoint", "C"], ["a translator (--checkpoint) and --input belong together"]),
    "no checkpoint": (["--input", "P"], ["a translator (--checkpoint) and --input belong together"]),
    "input that is not there": (["--checkpoint", "C", "--input", "none.png"], ["none.png"]),
    "input that is no picture": (["--checkpoint", "C", "--input", "notes.txt"], ["notes.txt", "not a picture"]),
    "folder of no picture": (["--checkpoint", "C", "--input", "empty"], ["empty", "no picture", ".png"]),
    "checkpoint that is not there": (["--checkpoint", "none.pkl", "--input", "P"], ["none.pkl", "edge_to_image"]),
    "checkpoint that is text": (["--checkpoint", "notes.txt", "--input", "P"], ["notes.txt", "checkpoint"]),
    "checkpoint that is a picture": (["--checkpoint", "P", "--input", "P"], ["in.png", "checkpoint"]),
    "checkpoint that is a base": (["--checkpoint", "B", "--input", "P"], ["model.safetensors"]),
    "base that is a checkpoint": ([PROMPT, "--base", "C"], ["is a file", "expected a folder"]),
    "base that is not there": ([PROMPT, "--base", "none"], ["no folder here", "sd-turbo"]),
    "base without network": ([PROMPT, "--base", "someone/model"], ["someone/model", "could not be fetched"]),
    "base that may not be fetched": ([PROMPT, "--base", "sd-turbo"], ["sd-turbo", "could not be fetched"]),
    "r over 1": (["--checkpoint", "S", "--input", "P", "--r", "1.5"], ["--r 1.5", "0 to 1"]),
    "r below 0": (["--checkpoint", "S", "--input", "P", "--r", "-0.1"], ["--r -0.1", "0 to 1"]),
    "r that is no number": (["--checkpoint", "S", "--input", "P", "--r", "nan"], ["--r nan", "finite"]),
    "r of a deterministic model": (["--checkpoint", "C", "--input", "P", "--r", "0.5"], ["--r", "not a stochastic"]),
    "r of a prompt": ([PROMPT, "--base", "B", "--r", "0.5"], ["--r has no meaning without a translator"]),
    "direction of a paired model": (["--checkpoint", "C", "--input", "P", "--direction", "b2a"], ["one way"]),
    "r of an unpaired model": (["--checkpoint", "U", "--input", "P", "--r", "0.5"], ["--r", "not a stochastic"]),
    "negative of nothing": ([PROMPT, "--base", "B", "--negative", "fog"], ["--negative has no meaning without"]),
    "scale of no control": ([PROMPT, "--base", "B", "--control_scale", "2"], ["--control_scale has no meaning"]),
    "threshold of no canny": (["--checkpoint", "C", "--input", "P", "--low_threshold", "9"], ["--low_threshold has"]),
    "a folder that is there": ([PROMPT, "--base", "B", "--save", "D"], ["--save", "expected a new or an empty folder"]),
    "no finite strength": (["--checkpoint", "C", "--input", "P", "--strength", "nan"], ["--strength nan", "finite"]),
    "a device without numbers": ([PROMPT, "--base", "B", "--device", "meta"], ["--device meta"]),
    "a program of a prompt": ([PROMPT, "--base", "B", "--export", "a.pt2"], ["--export has no meaning without a"]),
    "a program of a folder": (["--checkpoint", "C", "--input", "D", "--export", "a.pt2"], ["--export", "a folder"]),
    "a LoRA on a translator": (["--checkpoint", "C", "--input", "P", "--lora", "x"], ["--lora has no meaning with"]),
    "steps of a translator": (["--checkpoint", "C", "--input", "P", "--steps", "4"], ["--steps has no meaning with"]),
    "size no multiple": ([PROMPT, "--base", "B", "--size", "15"], ["--size 15", "multiples of 2"]),
    "size of words": ([PROMPT, "--base", "B", "--size", "large"], ["--size large", "WIDTHxHEIGHT"]),
    "size of three": ([PROMPT, "--base", "B", "--size", "8x8x8"], ["--size 8x8x8"]),
    "size 0": ([PROMPT, "--base", "B", "--size", "0"], ["--size 0"]),
    "no steps": ([PROMPT, "--base", "B", "--steps", "0"], ["--steps 0", "1 or more"]),
    "too many steps": ([PROMPT, "--base", "B", "--steps", "1001"], ["1001 steps", "1 to 1000"]),
    "too many LCM steps": ([PROMPT, "--base", "B", "--steps", "51", "--sampler", "lcm"], ["51 steps", "1 to 50"]),
    "no pictures": ([PROMPT, "--base", "B", "--n", "0"], ["--n 0", "1 or more"]),
    "negative seed": ([PROMPT, "--base", "B", "--seed", "-1"], ["--seed -1"]),
    "seed of words": ([PROMPT, "--base", "B", "--seed", "x"], ["--seed", "x"]),
    "unknown flag": ([PROMPT, "--base", "B", "--guidence", "2"], ["--guidence", "did you mean --guidance?"]),
    "unknown sampler": ([PROMPT, "--base", "B", "--sampler", "euler"], ["--sampler", "euler", "ddim", "lcm"]),
    "two prompts": ([PROMPT, "another", "--base", "B"], ["another"]),
    "several pictures into one file": ([PROMPT, "--base", "B", "--n", "2", "--output", "a.png"], ["a.png", "folder"]),
    "a folder into one file": (["--checkpoint", "C", "--input", "D", "--output", "a.png"], ["a.png", "folder"]),
    "another format": ([PROMPT, "--base", "B", "--output", "a.jpg"], ["a.jpg", ".png"]),
    "output over the input": (["--checkpoint", "C", "--input", "P", "--output", "P"], ["in.png", "another name"]),
    "output over the input, as a folder": (["--checkpoint", "C", "--input", "P", "--output", "D"], ["in.png"]),
    "output into the input folder": (["--checkpoint", "C", "--input", "D", "--output", "D"], ["in.png", "folder"]),
    "output below a file": ([PROMPT, "--base", "B", "--output", "notes.txt/a.png"], ["notes.txt"]),
    "unknown device": ([PROMPT, "--base", "B", "--device", "tpu9"], ["--device tpu9", "cpu"]),
    "a tile too small": ([PROMPT, "--base", "B", "--tile", "8"], ["--tile 8", "32 or more"]),
    "unknown type": ([PROMPT, "--base", "B", "--dtype", "int8"], ["--dtype", "int8", "bf16"]),
}


@pytest.mark.parametrize("arguments, says", REFUSED.values(), ids=REFUSED.keys())
def test_what_a_user_gets_wrong_is_one_line_and_writes_nothing(base, trained_files, command, tmp_path, monkeypatch,
                                                               arguments, says):
    source = picture(tmp_path / "pictures" / "in.png", 16, 16)
    names = dict(B=base, C=trained_files["one caption"], M=trained_files["many captions"], S=trained_files["stochastic"],
                 U=trained_files["unpaired"], P=source, D=source.parent)
    Path("notes.txt").write_text("words\n")
    Path("empty").mkdir()
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # where nobody answers
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    status, out, err = command(*(names.get(piece, piece) for piece in arguments))
    assert (status, out) == (2, []), err
    assert err.startswith("sample.py: error: ") and err.count("\n") == 1, err
    assert all(piece in err for piece in says), err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before

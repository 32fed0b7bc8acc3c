"""On a CUDA device: networks, commands and trainers give what they give on the CPU, in every type that is offered, and
nothing of a picture waits for the processor."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch._dynamo.utils
from conftest import normal, randomise, relative
from PIL import Image
from safetensors.torch import load_file
from test_compile import NAMES, first, inputs, network
from test_controlnet import KINDS as CONTROLNETS
from test_dino import TINY as DINO_TINY
from test_discriminator import UNET as CRITIC
from test_discriminator import VISION
from test_pixart import TINY as PIXART
from test_t5 import TINY as T5
from test_weights import TEXT

import evaluate
from dataset import folders
from dataset.pictures import to_picture, to_tensor
from files.hub import ROOT
from models import clip, controlnet, dino, discriminator, inception, lpips, pixart, t5, unet, vae

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")]

IDS = torch.arange(77)[None] % 99
X, Z = normal(2, 3, 64, 64).clamp(-1, 1), normal(2, 4, 8, 8)
NETWORKS = {
    **{name: lambda name=name: (network(name), *inputs(name, 0)) for name in NAMES},
    "CLIP's text": lambda: (clip.TextEncoder(clip.TextConfig(vocab_size=99, **TEXT)), IDS),
    "CLIP's pictures": lambda: (clip.ImageEncoder(VISION), clip.prepare(X, VISION.image_size)),
    "T5": lambda: (t5.T5Encoder(t5.T5Config(**T5)), IDS, (IDS > 3).double()),
    "PixArt": lambda: (pixart.PixArt(pixart.PixArtConfig(**PIXART, sample_size=128)), Z, 999, normal(2, 9, 20)),
    "ControlNet": lambda: (controlnet.ControlNet(controlnet.ControlNetConfig(**CONTROLNETS["as SD 1.5"])), Z, 999,
                           normal(2, 5, 20), X),
    "patch discriminator": lambda: (discriminator.PatchDiscriminator(8), X, discriminator.draw_augmentation(
        2, torch.Generator().manual_seed(0))),
    "latent discriminator": lambda: (discriminator.LatentDiscriminator(unet.UNet(CRITIC), 24), Z,
                                     torch.tensor([3, 999]), normal(2, 5, CRITIC.cross_attention_dim)),
    "pixel discriminator": lambda: (discriminator.PixelDiscriminator(3, 64, 20, 8), X, torch.tensor([3, 999]),
                                    normal(2, 5, 20)),
    "LPIPS": lambda: (lpips.LPIPS(), X, X.flip(0)),
    "DINO": lambda: (dino.DINO(DINO_TINY), normal(2, 3, 40, 32)),
    "Inception": lambda: (inception.Inception().eval(), normal(1, 3, 299, 299)),
}


def moved(value):
    if isinstance(value, dict):
        return {name: moved(part) for name, part in value.items()}
    return value.cuda() if isinstance(value, torch.Tensor | torch.nn.Module) else value


def flat(result) -> torch.Tensor:
    parts = [result] if isinstance(result, torch.Tensor) else [flat(part) for part in result]
    return torch.cat([part.flatten().cpu() for part in parts])


WITHOUT_TIME = {"VAE encode", "VAE decode", "CLIP's text", "CLIP's pictures", "T5", "patch discriminator", "LPIPS",
                "DINO", "Inception"}  # the sinusoids of a timestep are of float32


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_gives_what_it_gives_on_the_cpu(name):
    here, *given = NETWORKS[name]()
    bound = 1e-9 if name in WITHOUT_TIME else 1e-4
    here = (here if name in NAMES else randomise(here.double())).requires_grad_(True)
    results, gradients = [], []
    for device in (lambda value: value, moved):
        result = flat(device(here)(*map(device, given)))
        here.zero_grad()
        result.square().sum().backward()
        results.append(result.detach())
        gradients.append(flat([p.grad for p in here.parameters() if p.grad is not None]))
    assert relative(results[1], results[0]) < bound
    assert relative(gradients[1], gradients[0]) < bound


@pytest.mark.parametrize("name", NAMES)
@torch.inference_mode()
def test_nothing_waits_inside_a_network(name):
    here, given = network(name).cuda(), [*map(moved, inputs(name, 0))]
    here(*given)
    torch.cuda.set_sync_debug_mode("error")
    try:
        here(*given)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("norm", [unet.GroupNorm(4, 8), vae.GroupNorm(4, 8)], ids=["U-Net", "VAE"])
def test_a_norm_under_autocast_keeps_half_precision_for_the_gradient(norm):
    x, norm, kept = normal(2, 8, 6, 8).bfloat16().cuda().requires_grad_(True), norm.cuda(), []
    with torch.autocast("cuda", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(kept.append, lambda t: t):
        norm(x)
    assert {t.dtype for t in kept if t.shape == x.shape} == {torch.bfloat16}


@pytest.mark.parametrize("name", NAMES)
@torch.inference_mode()
def test_a_compiled_network_is_one_cuda_graph(name):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    here, given = network(name).cuda(), [[*map(moved, inputs(name, seed))] for seed in (0, 1)]
    expected = [first(here(*each)).clone() for each in given]
    compiled = torch.compile(here, fullgraph=True, dynamic=False, mode="reduce-overhead")
    for _ in range(3):  # it warms up, it records, it replays
        made = [first(compiled(*each)).clone() for each in given]
    assert max(map(relative, made, expected)) < 1e-5
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0


# ----------------------------------------------------------------------------------------------------------- commands


def run(script: str, *flags) -> subprocess.CompletedProcess:
    process = subprocess.run([sys.executable, str(ROOT / script), *map(str, flags)], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-3000:]
    return process


def near(one: Path, other: Path, psnr: float, mean: float) -> None:
    """Two files' pictures: PSNR in dB above one bound, mean difference in levels below the other."""
    a, b = (2 * to_tensor(Image.open(path))[None] - 1 for path in (one, other))
    assert a.std() > 0.1 and evaluate.psnr(a, b).item() > psnr and (a - b).abs().mean() * 127.5 < mean


@pytest.fixture
def day(tmp_path) -> list:
    """Flags that translate a drawn scene."""
    to_picture(folders.open_unpaired("drawn:day2night", "test", "no_resize")[0]["a"]).save(tmp_path / "day.png")
    return ["--checkpoint", "day2night", "--input", tmp_path / "day.png"]


@pytest.mark.parametrize("what", ["text", "translation"])
def test_a_sample_is_the_cpu_s(what, day, tmp_path):
    flags = day if what == "translation" else ["a red house on grass in the day"]
    run("sample.py", *flags, "--device", "cpu", "--dtype", "float32", "--output", tmp_path / "cpu.png")
    for name, how, psnr, mean in [("same", ["--dtype", "float32"], 60, 0.1), ("fast", [], 40, 1),
                                  ("compiled", ["--compile"], 40, 1), ("fp16", ["--dtype", "fp16"], 40, 1)]:
        run("sample.py", *flags, "--device", "cuda", *how, "--output", tmp_path / f"{name}.png")
        near(tmp_path / "cpu.png", tmp_path / f"{name}.png", psnr, mean)


def test_an_exported_program_runs_on_the_device(day, tmp_path):
    run("sample.py", *day, "--device", "cuda", "--output", tmp_path / "sample.png", "--export", tmp_path / "it.pt2")
    with torch.inference_mode():
        made = torch.export.load(tmp_path / "it.pt2").module()(to_tensor(Image.open(day[-1]))[None].cuda())[0]
    to_picture(made).save(tmp_path / "exported.png")
    near(tmp_path / "sample.png", tmp_path / "exported.png", 40, 1)


# ----------------------------------------------------------------------------------------------------------- trainers

TRAINERS = "train_pix2pix_turbo.py", "train_cyclegan_turbo.py", "train_yoso.py"
COMMON = ["--max_train_steps", "3", "--train_batch_size", "2", "--num_samples_eval", "2", "--checkpointing_steps", "2"]


def trained(folder) -> tuple[torch.Tensor, list[dict]]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return flat([value.double() for _, value in sorted(load_file(folder / "model.safetensors").items())]), lines


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_trainer_learns_what_it_learns_on_the_cpu(trainer, tmp_path):
    logs = {}
    for device in ("cpu", "cuda"):
        run(trainer, *COMMON, "--dtype", "float64", "--device", device, "--output_dir", tmp_path / device)
        logs[device] = trained(tmp_path / device)
    for here, there in zip(*(lines for _, lines in logs.values())):
        for name in here.keys() & {"l2", "gan", "disc", "cycle", "idt", "kl", "con", "grad_norm"}:
            assert there[name] == pytest.approx(here[name], rel=1e-3), name
    assert relative(logs["cuda"][0], logs["cpu"][0]) < 1e-3  # Adam's first steps take the sign of the least gradient


@pytest.mark.parametrize("how", [["bf16"], ["fp16"], ["bf16", "--gradient_checkpointing"],
                                 ["no", "--train", "all"]], ids=" ".join)
@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_trainer_runs_in_every_type_and_goes_on(trainer, how, tmp_path):
    run(trainer, *COMMON, "--mixed_precision", *how, "--device", "cuda", "--output_dir", tmp_path)
    run(trainer, "--resume", tmp_path, "--max_train_steps", "5")
    _, lines = trained(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]

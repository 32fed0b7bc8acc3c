"""On a CUDA device: networks, commands and trainers give what they give on the CPU, in every type
that is offered, and no network waits for the processor."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch._dynamo.utils
from conftest import normal, randomise, relative
from PIL import Image
from pipelines import TEXT
from safetensors.torch import load_file
from test_compile import NAMES, first, inputs, make_network
from test_controlnet import KINDS as CONTROLNETS
from test_dino import TINY as DINO_TINY
from test_discriminator import UNET as CRITIC
from test_discriminator import VISION
from test_pixart import TINY as PIXART
from test_t5 import TINY as T5
from torch import Tensor, nn

import evaluate
from dataset import folders
from dataset.cache import estimate_prior
from dataset.pictures import to_picture, to_tensor
from files.hub import ROOT
from models import clip, controlnet, dino, discriminator, inception, lpips, pixart, t5, unet, vae

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

IDS = torch.arange(77)[None] % 99
X = normal(2, 3, 64, 64).clamp(-1, 1)
Z = normal(2, 4, 8, 8)
T = torch.tensor([3, 999])


def clip_text():
    return clip.TextEncoder(clip.TextConfig(vocab_size=99, **TEXT)), IDS


def clip_pictures():
    return clip.ImageEncoder(VISION), clip.prepare(X, VISION.image_size)


def t5_text():
    return t5.T5Encoder(t5.T5Config(**T5)), IDS, (IDS > 3).double()


def pixart_1024():
    config = pixart.PixArtConfig(**PIXART, sample_size=128)
    return pixart.PixArt(config), Z, 999, normal(2, 9, 20)


def controlnet_sd15():
    config = controlnet.ControlNetConfig(**CONTROLNETS["as SD 1.5"])
    return controlnet.ControlNet(config), Z, 999, normal(2, 5, 20), X


def patch_discriminator():
    numbers = discriminator.draw_augmentation(2, torch.Generator().manual_seed(0))
    return discriminator.PatchDiscriminator(8), X, numbers


def latent_discriminator():
    D = discriminator.LatentDiscriminator(unet.UNet(CRITIC), 24)
    return D, Z, T, normal(2, 5, CRITIC.cross_attention_dim)


def pixel_discriminator():
    return discriminator.PixelDiscriminator(3, 64, 20, 8), X, T, normal(2, 5, 20)


def perceptual_distance():
    return lpips.LPIPS(), X, X.flip(0)


def dino_features():
    return dino.DINO(DINO_TINY), normal(2, 3, 40, 32)


def inception_features():
    return inception.Inception().eval(), normal(1, 3, 299, 299)


# Functions that return a network and what it takes.
OTHERS = {
    "CLIP's text": clip_text,
    "CLIP's pictures": clip_pictures,
    "T5": t5_text,
    "PixArt": pixart_1024,
    "ControlNet": controlnet_sd15,
    "patch discriminator": patch_discriminator,
    "latent discriminator": latent_discriminator,
    "pixel discriminator": pixel_discriminator,
    "LPIPS": perceptual_distance,
    "DINO": dino_features,
    "Inception": inception_features,
}
# The sinusoids of a timestep are in float32.
WITH_TIME = {
    "U-Net",
    "pix2pix-Turbo",
    "CycleGAN-Turbo",
    "PixArt",
    "ControlNet",
    "latent discriminator",
    "pixel discriminator",
}


def build(name: str) -> tuple[nn.Module, list]:
    """The network of this name in float64, with random weights, and what it takes."""
    if name in NAMES:
        return make_network(name), list(inputs(name, seed=0))
    network, *given = OTHERS[name]()
    return randomise(network.double()), given


def to_cuda(value):
    if isinstance(value, dict):
        return {name: to_cuda(part) for name, part in value.items()}
    return value.cuda() if isinstance(value, Tensor | nn.Module) else value


def flat(result) -> Tensor:
    """All numbers of a tensor, or of nested lists of tensors, on the CPU."""
    if isinstance(result, Tensor):
        return result.flatten().cpu()
    return torch.cat([flat(part) for part in result])


def run_and_differentiate(network: nn.Module, given: list) -> tuple[Tensor, Tensor]:
    """What the network gives, and the gradients of its parameters."""
    result = flat(network(*given))
    network.zero_grad()
    result.square().sum().backward()
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    return result.detach(), flat(gradients)


@pytest.mark.parametrize("name", [*NAMES, *OTHERS])
def test_a_network_gives_what_it_gives_on_the_cpu(name):
    network, given = build(name)
    network.requires_grad_(True)
    bound = 1e-4 if name in WITH_TIME else 1e-9
    result, gradients = run_and_differentiate(network, given)
    on_cuda = run_and_differentiate(to_cuda(network), [to_cuda(value) for value in given])
    assert relative(on_cuda[0], result) < bound
    assert relative(on_cuda[1], gradients) < bound


@pytest.mark.parametrize("name", NAMES)
@torch.inference_mode()
def test_nothing_waits_inside_a_network(name):
    network = make_network(name).cuda()
    given = [to_cuda(value) for value in inputs(name, seed=0)]
    network(*given)
    torch.cuda.set_sync_debug_mode("error")
    try:
        network(*given)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("norm", [unet.GroupNorm(4, 8), vae.GroupNorm(4, 8)], ids=["U-Net", "VAE"])
def test_a_norm_under_autocast_keeps_half_precision_for_the_gradient(norm):
    x = normal(2, 8, 6, 8).bfloat16().cuda().requires_grad_(True)
    norm = norm.cuda()
    kept = []
    hooks = torch.autograd.graph.saved_tensors_hooks(kept.append, lambda tensor: tensor)
    with torch.autocast("cuda", torch.bfloat16), hooks:
        norm(x)
    assert {tensor.dtype for tensor in kept if tensor.shape == x.shape} == {torch.bfloat16}


@pytest.mark.parametrize("name", NAMES)
@torch.inference_mode()
def test_a_compiled_network_is_one_cuda_graph(name):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    network = make_network(name).cuda()
    given = [[to_cuda(value) for value in inputs(name, seed)] for seed in (0, 1)]
    expected = [first(network(*values)).clone() for values in given]
    compiled = torch.compile(network, fullgraph=True, dynamic=False, mode="reduce-overhead")
    for _ in range(3):  # it warms up, it records, it replays
        made = [first(compiled(*values)).clone() for values in given]
    assert max(map(relative, made, expected)) < 1e-5
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0


# --------------------------------------------------------------------------------- commands

def run(script: str, *flags) -> None:
    command = [sys.executable, str(ROOT / script), *map(str, flags)]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-3000:]


def assert_near(one: Path, other: Path, psnr: float, mean: float) -> None:
    """Two files' pictures: PSNR in dB above `psnr`, mean difference in levels below `mean`."""
    a, b = [2 * to_tensor(Image.open(path))[None] - 1 for path in (one, other)]
    assert a.std() > 0.1
    assert evaluate.psnr(a, b).item() > psnr
    assert (a - b).abs().mean() * 127.5 < mean


@pytest.fixture
def day(tmp_path) -> list:
    """Flags that translate a drawn scene from day to night."""
    items = folders.open_unpaired("drawn:day2night", "test", "no_resize")
    to_picture(items[0]["a"]).save(tmp_path / "day.png")
    return ["--checkpoint", "day2night", "--input", tmp_path / "day.png"]


@pytest.mark.parametrize("what", ["text", "translation"])
def test_a_sample_is_that_of_the_cpu(what, day, tmp_path):
    flags = day if what == "translation" else ["a red house on grass in the day"]
    on_cpu = ["--device", "cpu", "--dtype", "float32"]
    run("sample.py", *flags, *on_cpu, "--output", tmp_path / "cpu.png")
    ways = [
        ("same", ["--dtype", "float32"], 60, 0.1),
        ("fast", [], 40, 1),
        ("compiled", ["--compile"], 40, 1),
        ("fp16", ["--dtype", "fp16"], 40, 1),
    ]
    for name, how, psnr, mean in ways:
        path = tmp_path / f"{name}.png"
        run("sample.py", *flags, "--device", "cuda", *how, "--output", path)
        assert_near(tmp_path / "cpu.png", path, psnr, mean)


def test_an_exported_program_runs_on_the_device(day, tmp_path):
    files = ["--output", tmp_path / "sample.png", "--export", tmp_path / "it.pt2"]
    run("sample.py", *day, "--device", "cuda", *files)
    program = torch.export.load(tmp_path / "it.pt2").module()
    with torch.inference_mode():
        made = program(to_tensor(Image.open(day[-1]))[None].cuda())[0]
    to_picture(made).save(tmp_path / "exported.png")
    assert_near(tmp_path / "sample.png", tmp_path / "exported.png", 40, 1)


# --------------------------------------------------------------------------------- trainers

TRAINERS = ["train_pix2pix_turbo.py", "train_cyclegan_turbo.py", "train_yoso.py"]
SHORT = ["--max_train_steps", "3", "--train_batch_size", "2", "--checkpointing_steps", "2"]
SHORT += ["--validation_num_images", "2"]
LOSSES = {"l2", "gan", "disc", "cycle", "idt", "kl", "con", "grad_norm"}


def read_log(folder: Path) -> list[dict]:
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def trained_weights(folder: Path) -> Tensor:
    tensors = load_file(folder / "model.safetensors")
    return flat([tensors[name].double() for name in sorted(tensors)])


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_trainer_learns_what_it_learns_on_the_cpu(trainer, tmp_path):
    for device in ("cpu", "cuda"):
        flags = ["--dtype", "float64", "--device", device]
        run(trainer, *SHORT, *flags, "--output_dir", tmp_path / device)
    cpu, cuda = [tmp_path / device for device in ("cpu", "cuda")]
    for here, there in zip(read_log(cpu), read_log(cuda)):
        for name in here.keys() & LOSSES:
            assert there[name] == pytest.approx(here[name], rel=1e-3), name
    # Adam's first steps take the sign of even the smallest gradient.
    assert relative(trained_weights(cuda), trained_weights(cpu)) < 1e-3


@pytest.mark.parametrize(
    "how",
    [["bf16"], ["fp16"], ["bf16", "--gradient_checkpointing"], ["no", "--train", "all"]],
    ids=" ".join,
)
@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_trainer_runs_in_every_type_and_goes_on(trainer, how, tmp_path):
    flags = ["--mixed_precision", *how, "--device", "cuda", "--output_dir", tmp_path]
    run(trainer, *SHORT, *flags)
    run(trainer, "--resume", tmp_path, "--max_train_steps", "5")
    assert [line["step"] for line in read_log(tmp_path)] == [1, 2, 3, 4, 5]
    assert trained_weights(tmp_path).isfinite().all()


def test_pictures_of_digits_are_learned_from_scratch(tmp_path):
    flags = ["--base", "pixels", "--denoising_steps", "1", "--device", "cuda"]
    run("train_yoso.py", *SHORT, *flags, "--output_dir", tmp_path)
    assert trained_weights(tmp_path).isfinite().all()


@pytest.mark.parametrize("how", [
    ["--adversarial", "noisy"],
    ["--lambda_mismatch", "1"],
    ["--gradient_accumulation_steps", "2"],
    ["--preview_vae", "tiny-turbo-taesd"],
    ["--stage", "adapt_v"],
    ["--stage", "adapt_v", "--train", "all"],
], ids=" ".join)
def test_yoso_runs_with(how, tmp_path):
    run("train_yoso.py", *SHORT, *how, "--device", "cuda", "--output_dir", tmp_path)
    assert trained_weights(tmp_path).isfinite().all()


def test_the_page_is_drawn_by_compiled_networks(tmp_path):
    run("sample.py", "--device", "cuda", "--compile", "--output", tmp_path / "page.png")
    run("sample.py", "--device", "cpu", "--dtype", "float32", "--output", tmp_path / "cpu.png")
    assert_near(tmp_path / "cpu.png", tmp_path / "page.png", 35, 2)


def test_a_prior_is_that_of_the_cpu(tmp_path):
    (tmp_path / "pictures").mkdir()
    for i, item in enumerate(folders.open_paired("drawn:scenes", "test", "no_resize")):
        to_picture(item["target"]).save(tmp_path / "pictures" / f"{i}.png")
        if i == 3:
            break
    priors = []
    for device in ("cpu", "cuda"):
        output = str(tmp_path / f"{device}.safetensors")
        estimate_prior(tmp_path / "pictures", "tiny-turbo", 64, output, device)
        priors.append(load_file(output))
    for name, values in priors[0].items():
        assert relative(priors[1][name], values) < 1e-3

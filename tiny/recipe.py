"""How the tiny bases were made. Each stage builds on what earlier stages wrote:

    python -m tiny.recipe tokenizer     the vocabulary: seconds
    python -m tiny.recipe vae           the autoencoder of drawn scenes
    python -m tiny.recipe decoder       its decoder again, for sharper pictures
    python -m tiny.recipe taesd         a faster one for its latents, for sample.py --vae: minutes
    python -m tiny.recipe classifier    the attribute classifier, for tiny/measure.py
    python -m tiny.recipe sd            tiny-sd: text encoder and U-Net, an ordinary epsilon model
    python -m tiny.recipe sd_more       more of it, where captions decide, and loose captions
    python -m tiny.recipe turbo         tiny-turbo, its one-step model: train_yoso.py and pairs
    python -m tiny.recipe adapters      train_cyclegan_turbo.py twice, train_pix2pix_turbo.py
    python -m tiny.recipe all           one after the other

A stage that was stopped continues where it was. Logs and pictures are in runs/recipe, in a folder
per stage or per run of a trainer.
Training times, machine and figures of the committed weights: tiny/README.md.
"""

import argparse
import json
import math
import multiprocessing
import pathlib
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import pre_tokenizers
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

import training
from files import bases, checkpoints, tokenizers
from files.tensors import read_config, read_tensors, save_tensors
from models import clip, diffusion, taesd, unet, vae
from sampling.precision import computes_in_bf16
from tiny import measure, scenes

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parent
RUNS = ROOT / "runs" / "recipe"
SEED = 0
SIZE = 64
DRAWINGS = 30_000


# -------------------- The tokenizer: CLIP's format, at a hundredth of its size

# Each of these words is one token. Every other text is spelled in letters, or in bytes.
WORDS = """
red green blue yellow orange purple pink brown cyan gray grey white black navy olive lime maroon
gold silver teal violet crimson beige turquoise magenta dark light pale bright deep soft warm cold
circle square triangle star line outline shape background foreground photo picture drawing painting
image sketch of house houses tree trees car cars boat boats hill hills mountain mountains road
river lake sea water grass sand field beach snow rain fog mist storm cloud clouds cloudy clear
sunny rainy snowy foggy sky sun moon stars star lamp lamps window windows lit roof door wall fence
bridge flower flowers bush rock rocks bird birds cat dog man woman person child street city town
village forest garden building facade balcony day night dusk dawn morning evening noon summer
winter spring autumn weather driving heavy in the a an on at by near with without and or to from
under over behind before between beside above below left right middle centre front back side top
bottom one two three four five six seven eight nine ten no many few some big small large little
tall short wide narrow round old new empty full scene view quiet under it is are there that this
its
""".split()


def learn_merges(words: list[str], suffix: str) -> list[tuple[str, str]]:
    """Byte-pair encoding, until every word is one token.

    The most frequent pair of neighbours is merged first; of equally frequent ones the first in
    the alphabet. The last letter of a word carries `suffix`.
    """
    spellings = [[*word[:-1], word[-1] + suffix] for word in words]
    merges = []
    while True:
        counts = Counter()
        for pieces in spellings:
            counts.update(zip(pieces, pieces[1:]))
        if not counts:
            return merges
        pair = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(pair)
        for pieces in spellings:
            merge_pair(pieces, pair)


def merge_pair(pieces: list[str], pair: tuple[str, str]) -> None:
    """Joins every occurrence of a pair in a spelling, from left to right."""
    i = 0
    while i + 1 < len(pieces):
        if (pieces[i], pieces[i + 1]) == pair:
            pieces[i:i + 2] = ["".join(pair)]
        i += 1


def write_tokenizer(folder: pathlib.Path) -> None:
    """Writes vocab.json, merges.txt and tokenizer_config.json.

    Tokens are in CLIP's order: 256 bytes, 256 bytes that end a word, merges, start, end.
    """
    suffix = "</w>"
    start, end = "<|startoftext|>", "<|endoftext|>"
    merges = learn_merges(list(dict.fromkeys(WORDS)), suffix)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [
        *alphabet,
        *(letter + suffix for letter in alphabet),
        *dict.fromkeys(a + b for a, b in merges),
        start,
        end,
    ]
    config = dict(
        tokenizer_class="CLIPTokenizer",
        model_max_length=24,
        bos_token=start,
        eos_token=end,
        pad_token=end,
        unk_token=end,
        do_lower_case=True,
    )

    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {token: i for i, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    lines = "".join(f"{a} {b}\n" for a, b in merges)
    (folder / "merges.txt").write_text("#version: 0.2\n" + lines)
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1))


def train_tokenizer(device: torch.device) -> None:
    write_tokenizer(HERE / "tiny" / "tokenizer")


# -------------------- Drawings

def drawing(index: int, split: str = "train") -> np.ndarray:
    """uint8 [H, W, 3]."""
    return np.asarray(scenes.draw(scenes.nth_scene(split, SEED, index), SIZE))


def drawings() -> Tensor:
    """The first DRAWINGS training scenes, uint8 [N, H, W, 3]. Drawn once, kept in a file."""
    path = RUNS / "drawings.npy"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with multiprocessing.get_context("spawn").Pool() as pool:
            results = pool.imap(drawing, range(DRAWINGS), 100)
            drawn = list(tqdm(results, "drawing", DRAWINGS))
        write_array(path, np.stack(drawn))
    return torch.from_numpy(np.load(path, mmap_mode="r"))


def write_array(path: pathlib.Path, array: np.ndarray) -> None:
    """np.save, but the file is written whole or not at all."""

    def write(temporary: pathlib.Path) -> None:
        with temporary.open("wb") as file:  # to a path, np.save would add .npy
            np.save(file, array)

    training.write_file(path, write)


def held_out_drawings(indices: range) -> Tensor:
    """Test scenes, uint8 [N, H, W, 3]."""
    drawn = [drawing(i, "test") for i in tqdm(indices, "drawing")]
    return torch.from_numpy(np.stack(drawn))


def pictures(levels: Tensor) -> Tensor:
    """uint8 [B, H, W, 3] -> [B, 3, H, W] in [-1, 1]."""
    return levels.permute(0, 3, 1, 2).float() / 127.5 - 1


# -------------------- One training loop for the stages below

def mixed_precision(device: torch.device) -> str:
    """bf16 if the processor computes in it; if it must be emulated, float32 is faster."""
    return "bf16" if computes_in_bf16(device) else "no"


def half_precision(device: torch.device) -> torch.autocast:
    enabled = mixed_precision(device) == "bf16"
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def train(
    stage: str,
    network: nn.Module,
    loss: Callable[[int], Tensor],
    validate: Callable[[int], dict],
    steps: int,
    rate: float,
) -> None:
    """AdamW with warm-up over 200 steps and cosine decay to 0. At the end `network` holds its EMA.

    `loss` takes a step. `validate` takes the number of steps done, measures with the EMA and
    returns values for the log. The state is saved after each validation.
    """
    folder = RUNS / stage
    folder.mkdir(parents=True, exist_ok=True)
    trained = dict(network.requires_grad_(True).named_parameters())
    ema = {name: p.detach().clone() for name, p in trained.items()}
    optimizer = torch.optim.AdamW(trained.values(), betas=(0.9, 0.99), weight_decay=1e-2)
    state = dict(network=network, ema=ema, optimizer=optimizer)
    start = 0
    if (folder / "state.pt").is_file():
        (start,) = training.restore(folder, stage, state, "step")

    log = training.open_log(folder, start)
    clock = time.monotonic()
    for step in tqdm(range(start, steps), stage, steps, initial=start):
        for group in optimizer.param_groups:
            group["lr"] = rate * learning_rate_factor(step, steps)
        value = loss(step)
        training.check_finite({stage: value.item()}, step, ["the drawings"])
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        norm = nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        update_ema(ema, trained, step)

        done = step + 1
        values = {"loss": value.item(), "grad_norm": norm.item()}
        if done % 500 == 0 or done == steps:
            current = {name: p.detach().clone() for name, p in trained.items()}
            network.load_state_dict(ema, strict=False)
            values |= validate(done)
            values["minutes"] = (time.monotonic() - clock) / 60
            print({name: round(number, 4) for name, number in values.items()}, file=sys.stderr)
            network.load_state_dict(current, strict=False)
            training.save_state(folder / "state.pt", dict(base=stage, step=done, **state))
        training.append_log(log, done, values)

    training.plot_losses(log, folder / "losses.png")
    network.load_state_dict(ema, strict=False)


def learning_rate_factor(step: int, steps: int) -> float:
    """Linear warm-up over 200 steps, then half a cosine to 0."""
    rise = min(1, (step + 1) / 200)
    progress = max(0.0, (step - 200) / (steps - 200))
    return rise * (0.5 + 0.5 * math.cos(math.pi * progress))


@torch.no_grad()
def update_ema(ema: dict[str, Tensor], trained: dict[str, Tensor], step: int) -> None:
    """EMA with decay 0.998, and smaller in the beginning."""
    for name, p in trained.items():
        ema[name].lerp_(p, max(0.002, 9 / (step + 10)))


# -------------------- The autoencoder

VAE = vae.VAEConfig(
    block_out_channels=(32, 64, 64),
    layers_per_block=1,
    norm_num_groups=8,
    sample_size=SIZE,
    down_block_types=("DownEncoderBlock2D",) * 3,
    up_block_types=("UpDecoderBlock2D",) * 3,
)


def picture_loss(y: Tensor, x: Tensor) -> Tensor:
    """|y - x| + 2 (y - x)^2 + 0.5 |dy - dx|.

    d are the differences of neighbouring pixels: rain, snow and stars live in them.
    """
    slopes = 0
    for dim in (2, 3):
        slopes = slopes + (y.diff(dim=dim) - x.diff(dim=dim)).abs().mean()
    return F.l1_loss(y, x) + 2 * F.mse_loss(y, x) + 0.5 * slopes


def vae_loss(y: Tensor, x: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
    """picture_loss(y, x) + 1e-4 KL."""
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return picture_loss(y, x) + 1e-4 * kl


def train_vae(device: torch.device, steps: int = 6000, batch: int = 16) -> None:
    torch.manual_seed(SEED)
    network = vae.VAE(VAE).to(device)
    drawn = drawings()
    held_out = pictures(held_out_drawings(range(64))).to(device)

    def loss(step: int) -> Tensor:
        rng = training.rng(SEED, step, "vae")
        rows = torch.randint(len(drawn), (batch,), generator=rng)
        x = pictures(drawn[rows]).to(device)
        with half_precision(device):
            mean, logvar, _ = network.encode(x)
            noise = torch.randn(mean.shape, generator=rng).to(device)
            y = network.decode(mean + (0.5 * logvar.float()).exp() * noise)
        return vae_loss(y.float(), x, mean.float(), logvar.float())

    @torch.no_grad()
    def validate(step: int) -> dict:
        decoded = network.decode(network.encode(held_out)[0]).clamp(-1, 1)
        path = RUNS / "vae" / f"{step:06d}.png"
        training.save_grid(path, [held_out[:24], decoded[:24]], at_least=128)
        return {"psnr": measure.psnr(decoded, held_out).mean().item()}

    train("vae", network, loss, validate, steps, rate=2e-3)
    (RUNS / "latents.npy").unlink(missing_ok=True)  # those of the autoencoder before

    # The scaling factor gives latents a standard deviation of 1.
    means = []
    with torch.no_grad():
        for i in range(0, 2000, 100):
            means.append(network.encode(pictures(drawn[i:i + 100]).to(device))[0])
    network.config.scaling_factor = round(1 / torch.cat(means).std().item(), 4)
    bases.save_folder(HERE / "tiny-turbo", bases.Base("tiny-turbo", vae=network), torch.float16)


# -------------------- A sharper decoder for the same latents

def steepness(x: Tensor) -> Tensor:
    """The root mean square of slopes in windows of 4 x 4 pixels, every 2 pixels."""
    across = F.pad(x.diff(dim=3), (0, 1)).square()
    down = F.pad(x.diff(dim=2), (0, 0, 0, 1)).square()
    energy = (across + down).mean(1, keepdim=True)
    return (F.avg_pool2d(energy, 4, 2) + 1e-4).sqrt()


def sharpening_loss(y: Tensor, x: Tensor) -> Tensor:
    """picture_loss(y, x) + |steepness(y) - steepness(x)|.

    Where the latent does not say where a raindrop is, the first term alone blurs it away; the
    second one wants as many of them, wherever they are.
    """
    return picture_loss(y, x) + F.l1_loss(steepness(y), steepness(x))


def train_decoder(device: torch.device, steps: int = 3000, batch: int = 16) -> None:
    """Goes on with the decoder alone: the encoder, and what was trained on its latents, stay."""
    network = bases.load_base("tiny-turbo", ("vae",), torch.float32, str(device)).vae
    scaling = network.config.scaling_factor
    drawn = drawings()
    mean, std = latents(network, drawn, device)
    held_out = pictures(held_out_drawings(range(96))).to(device)
    with torch.no_grad():
        held_out_mean, _, _ = network.encode(held_out)

    def loss(step: int) -> Tensor:
        rng = training.rng(SEED, step, "decoder")
        rows = torch.randint(len(drawn), (batch,), generator=rng)
        noise = torch.randn(batch, *mean.shape[1:], generator=rng)
        z = (mean[rows] + std[rows] * noise) / scaling
        with half_precision(device):
            y = network.decode(z.to(device))
        return sharpening_loss(y.float(), pictures(drawn[rows]).to(device))

    @torch.no_grad()
    def validate(step: int) -> dict:
        decoded = network.decode(held_out_mean).clamp(-1, 1)
        path = RUNS / "decoder" / f"{step:06d}.png"
        training.save_grid(path, [held_out[:24], decoded[:24]], at_least=128)
        return {
            "psnr": measure.psnr(decoded, held_out).mean().item(),
            "energy": measure.gradient_energy(decoded, held_out),
        }

    decoder = nn.ModuleDict({"decoder": network.decoder, "last": network.post_quant_conv})
    train("decoder", decoder, loss, validate, steps, rate=1e-3)
    bases.save_folder(HERE / "tiny-turbo", bases.Base("tiny-turbo", vae=network), torch.float16)


# -------------------- A tiny autoencoder of the same latents

TAESD = taesd.TAESDConfig(
    encoder_block_out_channels=(12,) * 3,
    decoder_block_out_channels=(32,) * 3,
    num_encoder_blocks=(1, 1, 1),
    num_decoder_blocks=(3, 1, 0),
)


def train_taesd(device: torch.device, steps: int = 10_000, batch: int = 8) -> None:
    """Trains the encoder on the scaled latents of tiny-turbo's VAE, the decoder on the drawings.

    psnr_decoder and psnr_encoder compare with the VAE's pictures, where one half takes the place of
    the VAE's; psnr and psnr_vae are those of either whole autoencoder to the drawings.
    """
    torch.manual_seed(SEED)
    teacher = bases.load_base("tiny-turbo", ("vae",), torch.float32, str(device)).vae
    scaling = teacher.config.scaling_factor
    network = taesd.TAESD(TAESD).to(device)
    drawn = drawings()
    mean, std = latents(teacher, drawn, device)
    held_out = pictures(held_out_drawings(range(64))).to(device)
    with torch.no_grad():
        held_out_mean, _, _ = teacher.encode(held_out)
        decoded = teacher.decode(held_out_mean).clamp(-1, 1)

    def loss(step: int) -> Tensor:
        rng = training.rng(SEED, step, "taesd")
        rows = torch.randint(len(drawn), (batch,), generator=rng)
        x = pictures(drawn[rows]).to(device)
        noise = torch.randn(batch, *mean.shape[1:], generator=rng)
        z = mean[rows] + std[rows] * noise
        with half_precision(device):
            found, _, _ = network.encode(x)
            y = network.decode(z.to(device))
        return F.mse_loss(found.float(), mean[rows].to(device)) + sharpening_loss(y.float(), x)

    @torch.no_grad()
    def validate(step: int) -> dict:
        z, _, _ = network.encode(held_out)
        y = network.decode(held_out_mean * scaling)
        columns = [held_out[:24], decoded[:24], y[:24]]
        training.save_grid(RUNS / "taesd" / f"{step:06d}.png", columns, at_least=128)
        pairs = dict(
            psnr_decoder=(y, decoded),
            psnr_encoder=(teacher.decode(z / scaling), decoded),
            psnr=(network.decode(z), held_out),
            psnr_vae=(decoded, held_out),
        )
        values = {name: measure.psnr(*pair).mean().item() for name, pair in pairs.items()}
        return values | {"energy": measure.gradient_energy(y, held_out)}

    train("taesd", network, loss, validate, steps, rate=4e-3)
    bases.save_network(HERE / "tiny-turbo-taesd", network, torch.float16)


# -------------------- The attribute classifier

def train_classifier(device: torch.device, steps: int = 4000, batch: int = 64) -> None:
    """Trains on all combinations, the held-out ones too, but not on the drawings of a measurement.

    Pictures are blurred and get noise at random, so that the classifier recognises what
    generated pictures show in spite of their flaws.
    """
    torch.manual_seed(SEED)
    network = measure.AttributeClassifier().to(device)
    drawn = drawings()
    more = range(1000, 4000)  # the first test scenes are for measuring
    drawn_more = held_out_drawings(more)
    described = [scenes.nth_scene("train", SEED, i) for i in range(DRAWINGS)]
    described += [scenes.nth_scene("test", SEED, i) for i in more]
    labels = [measure.attributes(scene) for scene in described]
    fields = torch.tensor([own for own, _ in labels])
    things = torch.tensor([own for _, own in labels])
    held_out = [scenes.nth_scene("test", SEED, i) for i in range(200)]
    held_out_pictures = pictures(held_out_drawings(range(200))).to(device)

    def loss(step: int) -> Tensor:
        # The committed weights were trained with random numbers of this name.
        rng = training.rng(SEED, step, "judge")
        half = (batch // 2,)
        usual = torch.randint(DRAWINGS, half, generator=rng)
        others = torch.randint(DRAWINGS, len(described), half, generator=rng)
        rows = torch.cat([usual, others])
        levels = [drawn[usual], drawn_more[others - DRAWINGS]]
        x = blur_and_noise(pictures(torch.cat(levels)), rng)
        with half_precision(device):
            logits = network(x.to(device))
        logits = [row.float() for row in logits]
        return measure.classifier_loss(logits, fields[rows].to(device), things[rows].to(device))

    def validate(step: int) -> dict:
        return measure.attribute_accuracy(network, held_out_pictures, held_out)

    train("classifier", network, loss, validate, steps, rate=3e-3)
    tensors = {name: tensor.half() for name, tensor in network.state_dict().items()}
    save_tensors(HERE / "classifier.safetensors", tensors, {})


def blur_and_noise(x: Tensor, rng: torch.Generator) -> Tensor:
    """Pictures [B, 3, H, W], each blurred and made noisy to a random degree."""
    n = len(x)
    blurred = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    x = torch.lerp(x, blurred, torch.rand(n, 1, 1, 1, generator=rng))
    amount = 0.1 * torch.rand(n, 1, 1, 1, generator=rng)
    return x + amount * torch.randn(x.shape, generator=rng)


# -------------------- tiny-sd: a diffusion model of the latents

UNET = unet.UNetConfig(
    block_out_channels=(48, 88),
    layers_per_block=1,
    attention_head_dim=2,
    cross_attention_dim=64,
    use_linear_projection=True,
    norm_num_groups=8,
    sample_size=SIZE // 4,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
)
SCHEDULE = dict(
    _class_name="DDIMScheduler",
    num_train_timesteps=1000,
    beta_schedule="scaled_linear",
    beta_start=0.00085,
    beta_end=0.012,
    prediction_type="epsilon",
    timestep_spacing="trailing",
    steps_offset=0,
    set_alpha_to_one=True,
    clip_sample=False,
)


def latents(network: vae.VAE, drawn: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Scaled means and standard deviations [N, 4, h, w] of all drawings. Encoded once."""
    path = RUNS / "latents.npy"
    if not path.is_file():
        found = []
        with torch.inference_mode(), half_precision(device):
            for levels in tqdm(drawn.split(200), "latents"):
                mean, logvar, _ = network.encode(pictures(levels).to(device))
                std = (0.5 * logvar.float()).exp()
                found.append(torch.stack([mean.float(), std]).cpu())
        path.parent.mkdir(parents=True, exist_ok=True)
        latents = torch.cat(found, dim=1) * network.config.scaling_factor
        write_array(path, latents.numpy())
    mean, std = torch.from_numpy(np.load(path))
    return mean, std


def train_sd(device: torch.device, steps: int = 4000, batch: int = 64) -> None:
    """tiny-sd from random weights: all noise levels alike, the captions of scenes.caption."""
    base = bases.load_base("tiny-turbo", ("vae",), torch.float32, str(device))
    base.tokenizer = tokenizers.load_tokenizer("tiny")
    base.schedule = diffusion.Schedule.from_config(SCHEDULE)
    config_file = HERE / "tiny" / "text_encoder" / "config.json"
    torch.manual_seed(SEED)
    text_config = read_config(clip.TextConfig, clip.FIXED, config_file)
    base.text_encoder = clip.TextEncoder(text_config).to(device)
    base.unet = unet.UNet(UNET).to(device)

    def draw_timesteps(rng: torch.Generator) -> Tensor:
        return torch.randint(1000, (batch,), generator=rng)

    train_diffusion("sd", base, device, steps, draw_timesteps, loose_share=0)


def continue_sd(device: torch.device, steps: int = 3200, batch: int = 64) -> None:
    """Goes on from the committed tiny-sd, where captions decide, in much noise.

    Half of the batch has t = 1000 sqrt(u), two thirds of the way up on average. Some captions are
    loose ones, so that it understands people who do not know scenes.caption. The committed weights
    had this stage twice: remove runs/recipe/sd_more before the second time.
    """
    base = bases.load_base("tiny-sd", dtype=torch.float32, device=str(device))

    def draw_timesteps(rng: torch.Generator) -> Tensor:
        uniform = torch.rand(batch, generator=rng)
        uniform[::2] = uniform[::2].sqrt()
        return (1000 * uniform).long()

    train_diffusion("sd_more", base, device, steps, draw_timesteps, loose_share=0.15)


def train_diffusion(
    stage: str,
    base: bases.Base,
    device: torch.device,
    steps: int,
    draw_timesteps: Callable[[torch.Generator], Tensor],
    loose_share: float,
) -> None:
    """Trains U-Net and text encoder on epsilon. One caption in ten is dropped, for guidance.

    The text encoder is written to tiny-turbo, as both bases use it, the U-Net to tiny-sd.
    """
    mean, std = latents(base.vae, drawings(), device)
    described = [scenes.nth_scene("train", SEED, i) for i in range(DRAWINGS)]
    ids = base.tokenizer([scenes.caption(scene) for scene in described])
    random = np.random.default_rng(SEED)
    loose_ids = base.tokenizer([scenes.loose_caption(scene, random) for scene in described])
    no_caption = base.tokenizer([""])
    base.unet.to(memory_format=torch.channels_last)

    def loss(step: int) -> Tensor:
        rng = training.rng(SEED, step, "sd")
        t = draw_timesteps(rng)
        batch = len(t)
        rows = torch.randint(DRAWINGS, (batch,), generator=rng)
        noise, eps = torch.randn(2, batch, *mean.shape[1:], generator=rng)
        dropped = torch.rand(batch, 1, generator=rng) < 0.1
        loose = torch.rand(batch, 1, generator=rng) < loose_share
        words = torch.where(loose, loose_ids[rows], ids[rows])
        words = torch.where(dropped, no_caption, words)
        x0 = mean[rows] + std[rows] * noise
        x = diffusion.add_noise(x0, eps, t, base.schedule)
        x = x.to(device, memory_format=torch.channels_last)
        # Plain attention: on a CPU, the backward pass of the fused one is slow at this size.
        with half_precision(device), sdpa_kernel(SDPBackend.MATH):
            context = base.text_encoder(words.to(device))
            predicted = base.unet(x, t.to(device), context)
        return F.mse_loss(predicted.float(), eps.to(device))

    validate = partial(validate_diffusion, stage, base, measure.load_classifier())
    both = nn.ModuleDict(dict(unet=base.unet, text_encoder=base.text_encoder))
    train(stage, both, loss, validate, steps, rate=1e-3)

    shared = bases.Base(
        "tiny-turbo",
        vae=base.vae,
        text_encoder=base.text_encoder,
        tokenizer=base.tokenizer,
    )
    bases.save_folder(HERE / "tiny-turbo", shared, torch.float16)
    bases.save_folder(HERE / "tiny-sd", base, torch.float16, rest="tiny-turbo")
    shutil.rmtree(RUNS / "pairs", ignore_errors=True)  # the tiny-sd before made these


def validate_diffusion(
    stage: str, base: bases.Base, classifier: nn.Module, step: int
) -> dict[str, float]:
    """Shares of attributes right of 48 held-out captions in 25 steps, "guided" with guidance 3."""
    held_out = [scenes.nth_scene("test", SEED, i) for i in range(48)]
    captions = [scenes.caption(scene) for scene in held_out]
    plain = preview(base, captions, 1.0)
    guided = preview(base, captions, 3.0)
    truth = pictures(held_out_drawings(range(24)))
    columns = [truth, plain[:24], guided[:24]]
    training.save_grid(RUNS / stage / f"{step:06d}.png", columns, at_least=128)
    right = measure.attribute_accuracy(classifier, plain, held_out)
    right_guided = measure.attribute_accuracy(classifier, guided, held_out)
    values = {name: right[name] for name in ("object", "colour", "all")}
    return values | {"guided": right_guided["all"]}


@torch.no_grad()
def preview(base: bases.Base, captions: list[str], guidance: float, steps: int = 25) -> Tensor:
    """Draws captions in `steps` steps of DDIM: pictures [N, 3, H, W] on the CPU."""
    side = SIZE // base.vae.factor
    shape = (len(captions), base.unet.config.in_channels, side, side)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    noise = noise.to(next(base.unet.parameters()).device)
    timesteps = diffusion.timesteps(base.schedule, steps)
    z = diffusion.ddim(make_model(base, captions, guidance), noise, timesteps, base.schedule)
    return base.vae.decode(z / base.vae.config.scaling_factor).cpu()


def make_model(base: bases.Base, captions: list[str], guidance: float) -> diffusion.Model:
    """The U-Net as the samplers call it, model(x, t), with classifier-free guidance."""
    device = next(base.unet.parameters()).device
    context = base.text_encoder(base.tokenizer(captions).to(device))

    def plain(x: Tensor, t: float) -> Tensor:
        return base.unet(x, t, context).float()

    if guidance == 1:
        return plain
    no_context = base.text_encoder(base.tokenizer([""]).to(device))
    no_context = no_context.expand(len(captions), -1, -1)

    def guided(x: Tensor, t: float) -> Tensor:
        wanted = plain(x, t)
        unwanted = base.unet(x, t, no_context).float()
        return unwanted + guidance * (wanted - unwanted)

    return guided


# -------------------- tiny-turbo: one step instead of 25

# tiny-sd has learned little about pure noise, and YOSO's KL and consistency terms have weight 0
# there: the discriminator alone would have to teach what a caption asks for. So the one-step model
# first learns from pairs of noise and the picture that tiny-sd makes of it with guidance.
PAIRS = 20_000
CHUNK = 100  # pairs in a file
PAIRS_SEED = 42  # the scenes of drawn:loose, on which YOSO trains
# The runs of train_yoso.py. train_pairs comes between adapt_zsnr and yoso.
YOSO_STAGES = {
    "adapt_v": dict(stage="adapt_v", max_train_steps=250, learning_rate=3e-4),
    "adapt_zsnr": dict(stage="adapt_zsnr", max_train_steps=250, learning_rate=3e-4),
    # A faster discriminator stays at chance, and without wrong captions it hardly reads captions
    # (tiny/README.md). Sampling starts in pure noise: a quarter of the batch is there.
    "yoso": dict(
        lambda_gan=0.1,
        lambda_mismatch=1,
        max_train_steps=1000,
        learning_rate=2e-4,
        disc_adam_beta1=0.5,
        last_share=0.25,
    ),
}
YOSO_COMMON = dict(
    train="all",
    train_batch_size=32,
    resolution=SIZE,
    lr_scheduler="cosine",
    lr_warmup_steps=100,
    adam_beta2=0.99,
    prior_pictures=0,
    ema_decay=0.998,
    viz_freq=500,
    validation_steps=500,
    checkpointing_steps=250,
    seed=SEED,
)


def make_pairs(device: torch.device) -> tuple[list[str], Tensor, Tensor]:
    """Captions, noise [N, 4, h, w], and the scaled latents that tiny-sd makes of both."""
    base = bases.load_base("tiny-sd", dtype=torch.float32, device=str(device))
    side = SIZE // base.vae.factor
    shape = (CHUNK, base.vae.config.latent_channels, side, side)
    captions, noise, latents = [], [], []
    for chunk in tqdm(range(PAIRS // CHUNK), "pairs"):
        own_captions = captions_of(chunk)
        own_noise = torch.randn(shape, generator=torch.Generator().manual_seed(chunk))
        captions += own_captions
        noise.append(own_noise)
        latents.append(stored_latents(chunk, base, own_captions, own_noise.to(device)))
    return captions, torch.cat(noise), torch.cat(latents)


def captions_of(chunk: int) -> list[str]:
    """The captions of CHUNK training scenes, a fifth of them loose ones."""
    random = np.random.default_rng([7, chunk])
    captions = []
    for i in range(chunk * CHUNK, (chunk + 1) * CHUNK):
        scene = scenes.nth_scene("train", PAIRS_SEED, i)
        if random.random() < 0.2:
            captions.append(scenes.loose_caption(scene, random))
        else:
            captions.append(scenes.caption(scene))
    return captions


def stored_latents(chunk: int, base: bases.Base, captions: list[str], noise: Tensor) -> Tensor:
    """guided_latents(...) from the chunk's file, which is written if it is not there."""
    path = RUNS / "pairs" / "latents" / f"{chunk:04d}.npy"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        z = guided_latents(base, captions, noise)
        write_array(path, z.half().cpu().numpy())
    return torch.from_numpy(np.load(path)).float()


@torch.no_grad()
def guided_latents(base: bases.Base, captions: list[str], noise: Tensor) -> Tensor:
    """Scaled latents that a base makes of noise [N, 4, h, w], in 12 steps with guidance 3."""
    steps = 12
    schedule = diffusion.for_sampler(base.schedule, "dpm", steps)
    timesteps = diffusion.dpm_timesteps(schedule, steps)
    x = diffusion.start(noise, timesteps[0], schedule)
    with half_precision(noise.device):
        return diffusion.dpm(make_model(base, captions, 3.0), x, timesteps, schedule)


def train_pairs(
    start: str | pathlib.Path, device: torch.device, steps: int = 3000, batch: int = 32
) -> pathlib.Path:
    """Trains a base to make in one step what tiny-sd made of the same noise. Returns its folder.

    The loss is on v = alpha eps - sigma x0; in pure noise, v is -x0. A quarter of the batch has any
    t, so that the base does not forget lower noise levels. Source: Liu et al. 2023, "InstaFlow: One
    Step is Enough for High-Quality Diffusion-Based Text-to-Image Generation".
    """
    folder = RUNS / "pairs" / "base"
    if (folder / "model_index.json").is_file():  # written last
        return folder
    captions, noise, latents = make_pairs(device)
    base = bases.load_base(str(start), dtype=torch.float32, device=str(device))
    ids = base.tokenizer(captions)
    last = len(base.schedule.alpha) - 1
    base.unet.to(memory_format=torch.channels_last)

    def loss(step: int) -> Tensor:
        rng = training.rng(SEED, step, "pairs")
        rows = torch.randint(PAIRS, (batch,), generator=rng)
        t = torch.randint(last + 1, (batch,), generator=rng)
        t[batch // 4:] = last
        x0, eps = latents[rows], noise[rows]
        alpha, sigma = base.schedule.at(t, x0)
        x = (alpha * x0 + sigma * eps).to(device, memory_format=torch.channels_last)
        v = alpha * eps - sigma * x0
        # Plain attention: on a CPU, the backward pass of the fused one is slow at this size.
        with half_precision(device), sdpa_kernel(SDPBackend.MATH):
            with torch.no_grad():
                context = base.text_encoder(ids[rows].to(device))
            predicted = base.unet(x, t.to(device), context)
        return F.mse_loss(predicted.float(), v.to(device))

    validate = partial(validate_one_step, base, measure.load_classifier())
    train("pairs", base.unet, loss, validate, steps, rate=1e-3)
    bases.save_folder(folder, base, rest="tiny-sd")
    return folder


def validate_one_step(base: bases.Base, classifier: nn.Module, step: int) -> dict[str, float]:
    """Shares of attributes that are right in one step, for 96 held-out captions."""
    held_out = [scenes.nth_scene("test", SEED, i) for i in range(96)]
    captions = [scenes.caption(scene) for scene in held_out]
    drawn = preview(base, captions, 1.0, steps=1)
    training.save_grid(RUNS / "pairs" / f"{step:06d}.png", [drawn[:48]], at_least=128)
    right = measure.attribute_accuracy(classifier, drawn, held_out)
    return {name: right[name] for name in ("object", "colour", "all")}


def run(script: str, *arguments: object) -> None:
    """Runs a script of this repository in its root. ValueError if it fails.

    Ctrl-C reaches the script too, which then saves. `subprocess.run` would kill it; this waits.
    """
    command = [sys.executable, script, *map(str, arguments)]
    process = subprocess.Popen(command, cwd=ROOT)
    try:
        status = process.wait()
    except KeyboardInterrupt:
        process.wait()
        raise
    if status:
        name = " ".join(command[1:3]) if script == "-m" else script
        raise ValueError(f"{name} ended with status {status}: see its message above")


def run_or_resume(script: str, folder: pathlib.Path, **flags: object) -> None:
    """Runs a trainer with these flags, or continues it if `folder` holds its state."""
    if (folder / "state.pt").is_file():
        run(script, "--resume", folder)
        return
    shutil.rmtree(folder, ignore_errors=True)
    run(script, "--output_dir", folder, *command_line(flags))


def command_line(flags: dict[str, object]) -> list[object]:
    """{"seed": 0} -> ["--seed", 0]."""
    words = []
    for name, value in flags.items():
        words += [f"--{name}", value]
    return words


def train_turbo(device: torch.device) -> None:
    flags = dict(base="tiny-sd", size=SIZE, output=RUNS / "cache", batch=64)
    run("-m", "dataset", "cache", "drawn:loose", *command_line(flags))
    v = train_yoso("adapt_v", "tiny-sd", device)
    zero_snr = train_yoso("adapt_zsnr", v, device)
    paired = train_pairs(zero_snr, device)
    sharper = train_yoso("yoso", paired, device)

    turbo = bases.load_base(str(sharper), dtype=torch.float32)
    average_with(turbo.unet, bases.load_base(str(paired), ("unet",), torch.float32).unet)
    config = turbo.schedule.config | dict(_class_name="LCMScheduler")
    turbo.schedule = diffusion.Schedule.from_config(config)
    bases.save_folder(HERE / "tiny-turbo", turbo, torch.float16)


def train_yoso(stage: str, base: str | pathlib.Path, device: torch.device) -> pathlib.Path:
    """Runs a stage of train_yoso.py on a base. Returns the folder of the base that it writes."""
    flags = dict(base=base, dataset_folder=RUNS / "cache", device=device)
    flags |= dict(mixed_precision=mixed_precision(device)) | YOSO_COMMON | YOSO_STAGES[stage]
    run_or_resume("train_yoso.py", RUNS / stage, **flags)
    return RUNS / stage / "base"


@torch.no_grad()
def average_with(network: nn.Module, other: nn.Module) -> None:
    """Changes each weight of `network` to the mean of it and `other`'s.

    `network` was fine-tuned from `other`; the mean keeps part of what each does better. Source:
    Wortsman et al. 2022, "Robust fine-tuning of zero-shot models".
    """
    for own, others in zip(network.parameters(), other.parameters(), strict=True):
        own.lerp_(others, 0.5)


# -------------------- Translators: adapters of tiny-turbo, with the trainers' own settings for it

CYCLEGAN_TURBO = "train_cyclegan_turbo.py"
PIX2PIX_TURBO = "train_pix2pix_turbo.py"
ADAPTERS = {
    "day2night": (CYCLEGAN_TURBO, dict(dataset_folder="drawn:day2night")),
    "clear2rain": (CYCLEGAN_TURBO, dict(dataset_folder="drawn:clear2rain")),
    "edges2scene": (PIX2PIX_TURBO, dict(dataset_folder="drawn:scenes", stochastic=True)),
}


def train_adapters(device: torch.device) -> None:
    """Keeps the weights of each run's best validation."""
    checkpoints.ADAPTERS.mkdir(exist_ok=True)
    for name, (script, own) in ADAPTERS.items():
        flags = dict(base="tiny-turbo", device=device, seed=SEED)
        flags |= dict(mixed_precision=mixed_precision(device)) | own
        run_or_resume(script, RUNS / name, **flags)
        tensors, metadata = read_tensors(RUNS / name / "best.safetensors")
        tensors = {key: tensor.half() for key, tensor in tensors.items()}
        save_tensors(checkpoints.ADAPTERS / f"{name}.safetensors", tensors, metadata)


# -------------------- Command line

STAGES = {
    "tokenizer": train_tokenizer,
    "vae": train_vae,
    "decoder": train_decoder,
    "taesd": train_taesd,
    "classifier": train_classifier,
    "sd": train_sd,
    "sd_more": continue_sd,
    "turbo": train_turbo,
    "adapters": train_adapters,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("stage", choices=[*STAGES, "all"])
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda [auto]")
    args = training.parse_args(parser)
    names = [args.stage]
    if args.stage == "all":
        names = [*STAGES]
    for name in names:
        STAGES[name](training.pick_device(args.device))


if __name__ == "__main__":
    training.run_script(main)

"""How the tiny bases were made, stage by stage, each from what the ones before it wrote:

    python -m tiny.recipe tokenizer        the vocabulary: seconds
    python -m tiny.recipe vae              the autoencoder of drawn scenes
    python -m tiny.recipe judge            what reads attributes from pictures, for measuring
    python -m tiny.recipe sd               tiny-sd, an ordinary diffusion model: text encoder and U-Net, epsilon
    python -m tiny.recipe turbo            tiny-turbo, its one-step model: train_yoso.py, in four stages
    python -m tiny.recipe adapters         translators: train_cyclegan_turbo.py twice, train_pix2pix_turbo.py
    python -m tiny.recipe all              one after the other

A stage that is stopped goes on where it stood; its logs and pictures are in runs/recipe/STAGE. Minutes, machine and
figures of the committed weights: tiny/README.md.

The tokenizer is CLIP's format at a hundredth of its size: all bytes, so every text has ids, and merges that make one
piece of each word below; other words fall into letters."""

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

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import pre_tokenizers
from torch import Tensor, nn
from tqdm import tqdm

import training
from files import bases, checkpoints, tokenizers
from files.tensors import read_config, read_tensors, save_tensors
from models import clip, diffusion, unet, vae
from tiny import measure, scenes

HERE = pathlib.Path(__file__).parent
RUNS = pathlib.Path("runs/recipe")
SEED, SIZE, DRAWINGS = 0, 64, 30_000
VAE = vae.VAEConfig(block_out_channels=(32, 64, 64), layers_per_block=1, norm_num_groups=8, sample_size=SIZE,
                    down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3)
WORDS = """
red green blue yellow orange purple pink brown cyan gray grey white black navy olive lime maroon gold silver teal
violet crimson beige turquoise magenta dark light pale bright deep soft warm cold circle square triangle star line
outline shape background foreground photo picture drawing painting image sketch of house houses tree trees car cars
boat boats hill hills mountain mountains road river lake sea water grass sand field beach snow rain fog mist storm
cloud clouds cloudy clear sunny rainy snowy foggy sky sun moon stars star lamp lamps window windows lit roof door
wall fence bridge flower flowers bush rock rocks bird birds cat dog man woman person child street city town village
forest garden building facade balcony day night dusk dawn morning evening noon summer winter spring autumn weather
driving heavy in the a an on at by near with without and or to from under over behind before between beside above
below left right middle centre front back side top bottom one two three four five six seven eight nine ten no many
few some big small large little tall short wide narrow round old new empty full scene view quiet under it is are
there that this its
""".split()


def learn_merges(words: list[str], suffix: str) -> list[tuple[str, str]]:
    """Byte-pair encoding: the most frequent pair of neighbours becomes one piece (of equals the first in the alphabet),
    until every word is one piece."""
    spellings, merges = [[*word[:-1], word[-1] + suffix] for word in words], []
    while counts := Counter(pair for pieces in spellings for pair in zip(pieces, pieces[1:])):
        a, b = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append((a, b))
        for pieces in spellings:
            i = 0
            while i + 1 < len(pieces):
                if (pieces[i], pieces[i + 1]) == (a, b):
                    pieces[i:i + 2] = [a + b]
                i += 1
    return merges


def write_tokenizer(folder: pathlib.Path) -> None:
    """vocab.json, merges.txt and tokenizer_config.json in CLIP's order: 256 bytes, 256 bytes that end a word, merges,
    start and end token."""
    suffix, specials = "</w>", ["<|startoftext|>", "<|endoftext|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = learn_merges(list(dict.fromkeys(WORDS)), suffix)
    pieces = [*alphabet, *(letter + suffix for letter in alphabet), *dict.fromkeys(a + b for a, b in merges), *specials]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    (folder / "tokenizer_config.json").write_text(json.dumps(
        dict(tokenizer_class="CLIPTokenizer", model_max_length=24, bos_token=specials[0], eos_token=specials[1],
             pad_token=specials[1], unk_token=specials[1], do_lower_case=True), indent=1))


# -------------------- Drawings, and one loop for what is trained on them


UNET = unet.UNetConfig(block_out_channels=(48, 88), layers_per_block=1, attention_head_dim=2, cross_attention_dim=64,
                       use_linear_projection=True, norm_num_groups=8, sample_size=SIZE // 4,
                       down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                       up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"))
SCHEDULE = dict(_class_name="DDIMScheduler", num_train_timesteps=1000, beta_schedule="scaled_linear",
                beta_start=0.00085, beta_end=0.012, prediction_type="epsilon", timestep_spacing="trailing",
                steps_offset=0, set_alpha_to_one=True, clip_sample=False)


def drawing(index: int, split: str = "train") -> np.ndarray:
    return np.asarray(scenes.draw(scenes.nth_scene(split, SEED, index), SIZE))


def drawings() -> Tensor:
    """The first DRAWINGS scenes of the training split, uint8 [N, H, W, 3], drawn once."""
    path = RUNS / "drawings.npy"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with multiprocessing.get_context("spawn").Pool() as pool:
            drawn = list(tqdm(pool.imap(drawing, range(DRAWINGS), 100), "drawing", DRAWINGS))
        np.save(path, np.stack(drawn))
    return torch.from_numpy(np.load(path, mmap_mode="r"))


def pictures(levels: Tensor) -> Tensor:
    """uint8 [B, H, W, 3] -> [B, 3, H, W] in [-1, 1]."""
    return levels.permute(0, 3, 1, 2).float() / 127.5 - 1


def train(stage: str, network: nn.Module, loss: Callable[[int], Tensor], look: Callable[[int], dict], steps: int,
          rate: float, look_every: int = 500) -> None:
    """AdamW at `rate`, with 200 steps of warm-up and a cosine to zero; `network` ends as the running mean of its
    weights. `look` measures and draws with that mean. State is saved with every look."""
    folder, start = RUNS / stage, 0
    folder.mkdir(parents=True, exist_ok=True)
    trained = dict(network.requires_grad_(True).named_parameters())
    mean = {name: p.detach().clone() for name, p in trained.items()}
    optimizer = torch.optim.AdamW(trained.values(), betas=(0.9, 0.99), weight_decay=1e-2)
    kept = dict(network=network, mean=mean, optimizer=optimizer)
    if (folder / "state.pt").is_file():
        start, = training.restore(folder, stage, kept, "step")
    log, clock = training.open_log(folder, start), time.monotonic()
    for step in tqdm(range(start, steps), stage, steps, initial=start):
        fall = max(0.0, (step - 200) / (steps - 200))
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 200) * (0.5 + 0.5 * math.cos(math.pi * fall))
        value = loss(step)
        training.check_finite({stage: value.item()}, step, ["the drawings"])
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        values = {"loss": value.item(), "grad_norm": nn.utils.clip_grad_norm_(trained.values(), 1.0).item()}
        optimizer.step()
        with torch.no_grad():
            for name, p in trained.items():
                mean[name].lerp_(p, max(0.002, 9 / (step + 10)))
        done = step + 1
        if done % look_every == 0 or done == steps:
            now = {name: p.detach().clone() for name, p in trained.items()}
            network.load_state_dict(mean, strict=False)
            values |= look(done) | {"minutes": (time.monotonic() - clock) / 60}
            print({k: round(v, 4) for k, v in values.items()}, file=sys.stderr)
            network.load_state_dict(now, strict=False)
            training.save_state(folder / "state.pt", dict(base=stage, step=done, **kept))
        training.append_log(log, done, values)
    training.plot_losses(log, folder / "losses.png")
    network.load_state_dict(mean, strict=False)


# -------------------- The autoencoder


def vae_loss(made: Tensor, x: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
    """|y - x| + 2 (y - x)^2 + half the absolute difference of slopes (rain, snow, stars) + 1e-4 KL."""
    slopes = sum((made.diff(dim=d) - x.diff(dim=d)).abs().mean() for d in (2, 3))
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return F.l1_loss(made, x) + 2 * F.mse_loss(made, x) + 0.5 * slopes + 1e-4 * kl


def train_vae(device: torch.device, steps: int = 6000, batch: int = 16) -> None:
    torch.manual_seed(SEED)
    network, drawn = vae.VAE(VAE).to(device), drawings()
    held_out = pictures(torch.from_numpy(np.stack([drawing(i, "test") for i in range(64)]))).to(device)

    def autocast() -> torch.autocast:
        return torch.autocast(device.type, torch.bfloat16)

    def loss(step: int) -> Tensor:
        rng = training.rng(SEED, step, "vae")
        x = pictures(drawn[torch.randint(len(drawn), (batch,), generator=rng)]).to(device)
        with autocast():
            mean, logvar, _ = network.encode(x)
            noise = torch.randn(mean.shape, generator=rng).to(device)
            made = network.decode(mean + (0.5 * logvar.float()).exp() * noise)
        return vae_loss(made.float(), x, mean.float(), logvar.float())

    @torch.no_grad()
    def look(step: int) -> dict:
        made = network.decode(network.encode(held_out)[0]).clamp(-1, 1)
        training.save_grid(RUNS / "vae" / f"{step:06d}.png", [held_out[:24], made[:24]], at_least=128)
        return {"psnr": (-10 * ((made - held_out) / 2).square().mean((1, 2, 3)).log10()).mean().item()}

    train("vae", network, loss, look, steps, rate=2e-3)
    with torch.no_grad():
        spread = torch.cat([network.encode(pictures(drawn[i:i + 100]).to(device))[0] for i in range(0, 2000, 100)])
    network.config.scaling_factor = round(1 / spread.std().item(), 4)
    bases.save_folder(HERE / "tiny-turbo", bases.Base("tiny-turbo", vae=network), torch.float16)


# -------------------- The judge


def train_judge(device: torch.device, steps: int = 4000, batch: int = 64) -> None:
    """On drawings of all combinations, those of the test too (other drawings than are measured); blurred and noised at
    random, so that it reads what made pictures show and not what gives them away."""
    torch.manual_seed(SEED)
    network, drawn, others = measure.Judge().to(device), drawings(), range(1000, 4000)  # the first are for measuring
    more = torch.from_numpy(np.stack([drawing(i, "test") for i in tqdm(others, "drawing")]))
    scenery = [*(scenes.nth_scene("train", SEED, i) for i in range(DRAWINGS)),
               *(scenes.nth_scene("test", SEED, i) for i in others)]
    fields, things = map(torch.tensor, zip(*map(measure.attributes, scenery)))
    held_out = [scenes.nth_scene("test", SEED, i) for i in range(200)]
    pictured = pictures(torch.from_numpy(np.stack([drawing(i, "test") for i in range(200)]))).to(device)

    def loss(step: int) -> Tensor:
        rng = training.rng(SEED, step, "judge")
        rows = torch.cat([torch.randint(DRAWINGS, (batch // 2,), generator=rng),
                          torch.randint(DRAWINGS, len(scenery), (batch // 2,), generator=rng)])
        x = pictures(torch.stack([drawn[i] if i < DRAWINGS else more[i - DRAWINGS] for i in rows.tolist()]))
        blur = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
        x = torch.lerp(x, blur, torch.rand(batch, 1, 1, 1, generator=rng))
        x = x + 0.1 * torch.rand(batch, 1, 1, 1, generator=rng) * torch.randn(x.shape, generator=rng)
        with torch.autocast(device.type, torch.bfloat16):
            logits = network(x.to(device))
        return measure.judge_loss([row.float() for row in logits], fields[rows].to(device), things[rows].to(device))

    train("judge", network, loss, lambda step: measure.obeyed(network, pictured, held_out), steps, rate=3e-3)
    save_tensors(HERE / "judge.safetensors", {k: t.half() for k, t in network.state_dict().items()}, {})


# -------------------- tiny-sd: a diffusion model of its latents


def latents(network: vae.VAE, drawn: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Means and deviations [N, 4, h, w] of all drawings, scaled; encoded once."""
    path, found = RUNS / "latents.npy", []
    if not path.is_file():
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16):
            for levels in tqdm(drawn.split(200), "latents"):
                mean, logvar, _ = network.encode(pictures(levels).to(device))
                found.append(torch.stack([mean.float(), (0.5 * logvar.float()).exp()]).cpu())
        np.save(path, torch.cat(found, dim=1) * network.config.scaling_factor)
    return tuple(torch.from_numpy(np.load(path)))


def train_sd(device: torch.device, steps: int = 4000, batch: int = 64) -> None:
    """Noise is predicted at every level alike; a tenth of the captions is left out, for guidance."""
    base = bases.load_base("tiny-turbo", ("vae",), torch.float32, str(device))
    mean, std = latents(base.vae, drawings(), device)
    base.tokenizer, base.schedule = tokenizers.load_tokenizer("tiny"), diffusion.Schedule.from_config(SCHEDULE)
    torch.manual_seed(SEED)
    config = read_config(clip.TextConfig, clip.FIXED, HERE / "tiny" / "text_encoder" / "config.json")
    base.text_encoder, base.unet = clip.TextEncoder(config).to(device), unet.UNet(UNET).to(device)
    scenery = [scenes.nth_scene("train", SEED, i) for i in range(DRAWINGS)]
    ids, nothing = base.tokenizer([scenes.caption(scene) for scene in scenery]), base.tokenizer([""])
    held_out = [scenes.nth_scene("test", SEED, i) for i in range(24)]
    truth = pictures(torch.from_numpy(np.stack([drawing(i, "test") for i in range(24)])))
    asked = base.tokenizer([scenes.caption(scene) for scene in held_out])

    def loss(step: int) -> Tensor:
        rng = training.rng(SEED, step, "sd")
        rows, t = (torch.randint(n, (batch,), generator=rng) for n in (DRAWINGS, 1000))
        noise, eps = torch.randn(2, batch, *mean.shape[1:], generator=rng)
        words = torch.where(torch.rand(batch, 1, generator=rng) < 0.1, nothing, ids[rows])
        x = diffusion.add_noise(mean[rows] + std[rows] * noise, eps, t, base.schedule)
        with torch.autocast(device.type, torch.bfloat16):
            predicted = base.unet(x.to(device), t.to(device), base.text_encoder(words.to(device)))
        return F.mse_loss(predicted.float(), eps.to(device))

    @torch.no_grad()
    def look(step: int) -> dict:
        contexts, columns = [base.text_encoder(words.to(device)) for words in (asked, nothing)], [truth]
        start = torch.randn(len(asked), *mean.shape[1:], generator=torch.Generator().manual_seed(0)).to(device)
        for guidance in (1.0, 3.0):
            def model(x: Tensor, t: int, guidance: float = guidance) -> Tensor:
                wanted = base.unet(x, t, contexts[0])
                unwanted = base.unet(x, t, contexts[1].expand(len(x), -1, -1)) if guidance > 1 else wanted
                return unwanted + guidance * (wanted - unwanted)
            z = diffusion.ddim(model, start, diffusion.timesteps(base.schedule, 25), base.schedule)
            columns.append(base.vae.decode(z / base.vae.config.scaling_factor).cpu())
        training.save_grid(RUNS / "sd" / f"{step:06d}.png", columns, at_least=128)
        return {}

    train("sd", nn.ModuleDict(dict(unet=base.unet, text_encoder=base.text_encoder)), loss, look, steps, rate=1e-3,
          look_every=1000)
    shared = bases.Base("tiny-turbo", vae=base.vae, text_encoder=base.text_encoder, tokenizer=base.tokenizer)
    bases.save_folder(HERE / "tiny-turbo", shared, torch.float16)
    bases.save_folder(HERE / "tiny-sd", base, torch.float16, rest="tiny-turbo")


# -------------------- tiny-turbo: one step instead of 25

# Of train_yoso.py: v instead of epsilon; pure noise at the end; the data alone, so that pure noise with a caption
# becomes blobs of the right colours (an ordinary diffusion model is hardly trained there); then one step.
HEARD = dict(snr_floor=1, last_share=0.25)
STAGES = {
    "adapt_v": dict(stage="adapt_v", max_train_steps=250, learning_rate=3e-4),
    "adapt_zsnr": dict(stage="adapt_zsnr", max_train_steps=250, learning_rate=3e-4),
    "data": dict(lambda_gan=0, lambda_con=0, max_train_steps=1500, learning_rate=5e-4, lr_warmup_steps=50,
                 ema_decay=0.995, **HEARD),
    "yoso": dict(lambda_gan=0.1, max_train_steps=3000, learning_rate=2e-4, disc_lr_ratio=4.0, **HEARD),
}
COMMON = dict(train="all", train_batch_size=32, mixed_precision="bf16", resolution=SIZE, lr_scheduler="cosine",
              lr_warmup_steps=100, adam_beta2=0.99, prior_pictures=0, ema_decay=0.998, viz_freq=500, eval_freq=500,
              checkpointing_steps=250, seed=SEED)


def run(script: str, *argv: object) -> None:
    """Ctrl-C reaches the script too, which saves: it is waited for, where subprocess.run would kill it."""
    process = subprocess.Popen([sys.executable, script, *map(str, argv)], cwd=HERE.parent)
    try:
        status = process.wait()
    except KeyboardInterrupt:
        process.wait()
        raise
    if status:
        raise ValueError(f"{script} ended with status {status}; what it said stands above")


def run_or_resume(script: str, folder: pathlib.Path, **flags: object) -> None:
    if (folder / "state.pt").is_file():
        run(script, "--resume", folder)
    else:
        shutil.rmtree(folder, ignore_errors=True)
        run(script, "--output_dir", folder, *(word for name, value in flags.items() for word in (f"--{name}", value)))


def train_turbo(device: torch.device) -> None:
    cache, base = RUNS / "cache", "tiny-sd"
    run("-m", "dataset", "cache", "drawn:scenes", "--base", base, "--size", SIZE, "--output", cache, "--batch", 64)
    for stage, own in STAGES.items():
        run_or_resume("train_yoso.py", RUNS / stage, base=base, train_data_dir=cache, device=device,
                      **(COMMON | own))
        base = RUNS / stage / "base"
    made = bases.load_base(str(base), dtype=torch.float32)
    made.schedule = diffusion.Schedule.from_config(made.schedule.config | dict(_class_name="LCMScheduler"))
    bases.save_folder(HERE / "tiny-turbo", made, torch.float16)


# -------------------- Translators: adapters of tiny-turbo, by the trainers' own settings for it

ADAPTERS = {
    "day2night": ("train_cyclegan_turbo.py", dict(dataset_folder="drawn:day2night")),
    "clear2rain": ("train_cyclegan_turbo.py", dict(dataset_folder="drawn:clear2rain")),
    "edges2scene": ("train_pix2pix_turbo.py", dict(dataset_folder="drawn:scenes", stochastic=True)),
}


def train_adapters(device: torch.device) -> None:
    checkpoints.ADAPTERS.mkdir(exist_ok=True)
    for name, (script, own) in ADAPTERS.items():
        run_or_resume(script, RUNS / name, base="tiny-turbo", device=device, seed=SEED, mixed_precision="bf16", **own)
        found, metadata = read_tensors(RUNS / name / "model.safetensors")
        save_tensors(checkpoints.ADAPTERS / f"{name}.safetensors",
                             {key: tensor.half() for key, tensor in found.items()}, metadata)


def main() -> None:
    stages = dict(tokenizer=lambda device: write_tokenizer(HERE / "tiny" / "tokenizer"), vae=train_vae,
                  judge=train_judge, sd=train_sd, turbo=train_turbo, adapters=train_adapters)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=[*stages, "all"])
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda [auto]")
    args = training.parse_args(parser)
    for stage in stages if args.stage == "all" else [args.stage]:
        stages[stage](training.pick_device(args.device))


if __name__ == "__main__":
    training.run(main)

"""YOSO in the plane: the whole loop on one page, with the losses of train_yoso.py.

    python -m tiny.gaussians                        # self-cooperation: two minutes on one core
    python -m tiny.gaussians --adversarial data     # a plain GAN: the real side is the data
    python -m tiny.gaussians --adversarial noisy    # UFOGen: both sides noised again

The data are points x0 from 25 narrow Gaussians on a grid, and x_t = alpha_t x0 + sigma_t eps is a
point with noise, of t = 0 ... 999. A small MLP predicts v = alpha_t eps - sigma_t x0 from x_t;
`generated` turns that into a guess at x0, the generator G(x_t, t). From pure noise, at t = 999, G
makes a point in one step. It is trained on every t:

    L = lambda_gan softplus(-D(G(x_t), t)) + lambda_kl min(SNR_t, 5) |G(x_t) - x0|^2

with SNR_t = alpha_t^2 / sigma_t^2, the signal-to-noise ratio. The discriminator D tells G(x_t) from
its real side. In self-cooperation that is G(x_{t-k}), what G itself makes of less of the same noise
(k = 250). Where t <= k it is G(x_0) = x_0: the data, with next to no noise. At each higher t, G
imitates what it makes already from k steps less noise, and so the distribution of the data spreads
upwards, to pure noise. (train_yoso.py has a third term, for consistency.)

The output folder gets samples.png (true points, then samples) and figures.json: how many of the
25 modes are covered, and the share of good samples. What to expect, by seed: tiny/README.md.
"""

import json
import pathlib
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor, nn
from tqdm import tqdm

import training
from models.diffusion import Schedule, start_from_prior
from models.unet import timestep_embedding
from train_yoso import discriminator_loss, generated, logits_of, update_ema, yoso_losses

AXIS = (-4.0, -2.0, 0.0, 2.0, 4.0)
CENTRES = torch.tensor([(x, y) for x in AXIS for y in AXIS])  # [25, 2]
STD = 0.05
SAMPLES = 10_000  # drawn for each measurement
SCHEDULE = dict(
    num_train_timesteps=1000,
    beta_schedule="scaled_linear",
    beta_start=0.00085,
    beta_end=0.012,
    prediction_type="v_prediction",
)


@dataclass
class Config:
    adversarial: Literal["coop", "data", "noisy"] = "coop"  # real: G(x_{t-k}), data, noised data
    lambda_gan: float = 1.0  # weight of the adversarial loss
    lambda_kl: float = 0.5  # weight of the KL term, the distance to the data
    lambda_con: float = 0.0  # weight of the consistency term
    snr_gamma: float = 5.0  # largest weight of a noise level in the KL and consistency terms
    snr_floor: float = 0.0  # smallest weight of a noise level in the KL term
    con_floor: float = 0.0  # the same in the consistency term
    coop_steps: int = 250  # k: D's real side is G(x_{t-k})
    con_steps: int = 25  # the consistency term compares with G this many timesteps lower
    learning_rate: float = 1e-3  # of both networks; warm-up, then cosine to 0
    lr_scheduler: training.Scheduler = "cosine"  # after the warm-up
    lr_warmup_steps: int = 100  # linear warm-up
    ema_decay: float = 0.999  # decay of the EMA per step
    train_batch_size: int = 128  # points per step
    max_train_steps: int = 8000  # optimizer steps
    seed: int = 42  # random seed
    output_dir: str | None = None  # default runs/gaussians-ADVERSARIAL


class MLP(nn.Module):
    """x [B, 2], t [B] in 0 ... 999 -> [B, c_out]: 2 for the generator, 1 for the discriminator."""

    def __init__(self, c_out: int, width: int = 128, layers: int = 3):
        super().__init__()
        self.first = nn.Linear(2, width)
        self.time = nn.Linear(width, width)
        self.hidden = nn.ModuleList([nn.Linear(width, width) for _ in range(layers)])
        self.last = nn.Linear(width, c_out)

    def forward(self, x: Tensor, t: Tensor, context: None = None) -> Tensor:
        t = timestep_embedding(t, self.time.in_features)
        h = self.first(x) + self.time(t.to(x.dtype))
        for layer in self.hidden:
            h = layer(F.silu(h))
        return self.last(F.silu(h))


def data_points(n: int, generator: torch.Generator) -> Tensor:
    """n points [n, 2] of the data."""
    mode = torch.randint(len(CENTRES), (n,), generator=generator)
    return CENTRES[mode] + STD * torch.randn(n, 2, generator=generator)


def train(cfg: Config) -> tuple[nn.Module, Schedule]:
    """Trains YOSO. Returns the denoiser, with its EMA weights, and the schedule."""
    schedule = Schedule.from_config(SCHEDULE)
    torch.manual_seed(cfg.seed)
    denoiser, D = MLP(2), MLP(1)
    optimizer_g = torch.optim.AdamW(denoiser.parameters(), betas=(0.5, 0.99), weight_decay=0)
    optimizer_d = torch.optim.AdamW(D.parameters(), betas=(0.0, 0.99), weight_decay=0)
    trained = dict(denoiser.named_parameters())
    ema = {name: p.detach().clone() for name, p in trained.items()}

    def G(x: Tensor, t: Tensor, context: None) -> Tensor:
        return generated(denoiser(x, t), x, t, schedule)

    for step in tqdm(range(cfg.max_train_steps), f"{cfg.adversarial}, seed {cfg.seed}"):
        rate = training.learning_rate(step, cfg, cfg.max_train_steps)
        training.set_learning_rate(optimizer_g, rate)
        training.set_learning_rate(optimizer_d, rate)
        rng = training.rng(cfg.seed, step, "batch")
        n = cfg.train_batch_size
        x0 = data_points(n, rng)
        t = torch.randint(len(schedule.alpha), (n,), generator=rng)
        eps, noise_real, noise_fake = torch.randn(3, n, 2, generator=rng)

        # The generator's turn. The discriminator only passes the gradient on.
        D.requires_grad_(False)
        terms, fake, real = yoso_losses(
            G,
            D,
            features=None,
            x0=x0,
            context=None,  # points have no captions
            disc_context=None,
            t=t,
            eps=eps,
            schedule=schedule,
            cfg=cfg,
            noise=noise_fake,
        )
        sum(terms.values()).backward()
        nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
        optimizer_g.step()
        optimizer_g.zero_grad()
        update_ema(ema, trained, decay=min(cfg.ema_decay, (1 + step) / (10 + step)))

        # The discriminator's turn: its real side against G(x_t).
        D.requires_grad_(True)
        logits_real = logits_of(D, real, t, None, schedule, cfg, noise_real)
        logits_fake = logits_of(D, fake, t, None, schedule, cfg, noise_fake)
        loss = cfg.lambda_gan * discriminator_loss(logits_real, logits_fake)
        loss.backward()
        optimizer_d.step()
        optimizer_d.zero_grad()

    training.swap(trained, ema)
    return denoiser, schedule


@torch.inference_mode()
def sample(denoiser: nn.Module, schedule: Schedule, n: int, seed: int) -> Tensor:
    """n points [n, 2], made in one step.

    The schedule does not end in pure noise, so sampling starts from the noised prior: mean and
    standard deviation of the data (IPI).
    """
    rng = torch.Generator().manual_seed(seed)
    data = data_points(n, rng)
    eps, prior_noise = torch.randn(2, n, 2, generator=rng)
    last = len(schedule.alpha) - 1
    x = start_from_prior(eps, prior_noise, data.mean(0), data.std(0), last, schedule)
    t = torch.full((n,), last)
    return generated(denoiser(x, t), x, t, schedule)


def measure(samples: Tensor) -> dict[str, float]:
    """Modes covered and share of good samples, of samples [N, 2].

    A sample is good within three standard deviations of a centre. A mode is covered if it gets
    20 good samples per 10,000.
    """
    distance, mode = torch.cdist(samples.double().cpu(), CENTRES.double()).min(dim=1)
    good = distance <= 3 * STD
    count = torch.bincount(mode[good], minlength=len(CENTRES))
    covered = count * SAMPLES >= 20 * len(samples)
    return dict(modes=covered.sum().item(), good=good.double().mean().item())


def scatter(samples: Tensor, size: int = 400) -> Tensor:
    """Samples [N, 2] as dots on a picture [3, size, size] in [-1, 1], with a ring around each
    mode. The frame is -5.5 ... 5.5; points outside are drawn on its edge."""
    picture = Image.new("RGB", (size, size), "white")
    pen = ImageDraw.Draw(picture)
    places = (samples.detach().float().cpu().nan_to_num() / 5.5).clamp(-1, 1)
    places = (places + 1) * (size - 1) / 2
    pen.point([(x, size - 1 - y) for x, y in places.tolist()], fill="#1f5fa8")
    unit = size / 11
    radius = 3 * STD * unit
    for x, y in CENTRES.tolist():
        left = size / 2 + x * unit - radius
        top = size / 2 - y * unit - radius
        pen.ellipse([left, top, left + 2 * radius, top + 2 * radius], outline="#d04040")
    levels = np.asarray(picture, np.float32)
    return torch.from_numpy(levels / 127.5 - 1).permute(2, 0, 1)


def main() -> None:
    cfg = training.parse(Config, {}, {}, __doc__)
    training.check_losses(cfg)
    torch.set_num_threads(1)  # more threads do not help
    folder = pathlib.Path(cfg.output_dir or f"runs/gaussians-{cfg.adversarial}")
    folder.mkdir(parents=True, exist_ok=True)
    denoiser, schedule = train(cfg)
    samples = sample(denoiser, schedule, SAMPLES, cfg.seed)
    figures = measure(samples)
    data = data_points(SAMPLES, torch.Generator().manual_seed(0))
    columns = [scatter(points)[None] for points in (data, samples)]
    training.save_grid(folder / "samples.png", columns)
    training.write_file(
        folder / "figures.json", lambda path: path.write_text(json.dumps(figures, indent=1))
    )
    print(f"{figures['modes']} of 25 modes, {figures['good']:.0%} good samples")
    print(folder / "samples.png")


if __name__ == "__main__":
    training.run_script(main)

"""Noise schedules and samplers: x_t = alpha_t x0 + sigma_t eps, and the ways back.

A schedule is two tables, kept in float64 and cast where they are used. Samplers are functions of (model, x,
timesteps): `model(x, t)` is the network's prediction at a timestep, all else (context, guidance) bound by callers."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

KINDS = ("epsilon", "v_prediction")


@dataclass
class Schedule:
    """alpha_t and sigma_t of x_t = alpha_t x0 + sigma_t eps, and how a checkpoint wants to be sampled."""
    alpha: Tensor  # [T] float64, falls from nearly 1
    sigma: Tensor  # [T] float64, sqrt(1 - alpha^2)
    prediction_type: str = "epsilon"
    timestep_spacing: str = "leading"
    steps_offset: int = 0
    last_alpha_is_one: bool = True  # what DDIM steps to after its last timestep: no noise at all, or the noise of t = 0
    config: dict = field(default_factory=dict)  # what it was made from, to be saved again

    def __post_init__(self):
        self._numbers = self.alpha.tolist(), self.sigma.tolist()

    @classmethod
    def from_config(cls, config: dict) -> "Schedule":
        """From a `scheduler_config.json`. Refuses what is not built here by name."""
        T, kind = config.get("num_train_timesteps", 1000), config.get("beta_schedule", "linear")
        first, last = config.get("beta_start", 0.0001), config.get("beta_end", 0.02)
        if not isinstance(T, int) or not 1 < T <= 100_000:
            raise ValueError(f"the scheduler's num_train_timesteps is {T!r}; expected 2 to 100000")
        if config.get("trained_betas") is not None:
            raise ValueError("the scheduler's configuration holds trained_betas; expected a beta_schedule by name")
        if kind == "scaled_linear":
            betas = torch.linspace(first**0.5, last**0.5, T, dtype=torch.float64) ** 2
        elif kind == "linear":
            betas = torch.linspace(first, last, T, dtype=torch.float64)
        elif kind == "squaredcos_cap_v2":  # Nichol and Dhariwal 2021
            cosine = ((torch.arange(T + 1, dtype=torch.float64) / T + 0.008) / 1.008 * math.pi / 2).cos() ** 2
            betas = (1 - cosine[1:] / cosine[:-1]).clamp(max=0.999)
        else:
            raise ValueError(f"the scheduler's beta_schedule is {kind!r}; built here are 'scaled_linear', 'linear' and"
                             " 'squaredcos_cap_v2'")
        prediction = config.get("prediction_type", "epsilon")
        if prediction not in KINDS:
            raise ValueError(f"the scheduler's prediction_type is {prediction!r}; built here are {KINDS}")
        if not ((0 < betas) & (betas < 1)).all():
            raise ValueError(f"the scheduler's betas go from {first} to {last}; expected numbers between 0 and 1")
        alpha_bar = torch.cumprod(1 - betas, dim=0)
        schedule = cls(alpha_bar.sqrt(), (1 - alpha_bar).sqrt(), prediction, config.get("timestep_spacing", "leading"),
                       config.get("steps_offset", 0), config.get("set_alpha_to_one", True), config)
        return zero_terminal_snr(schedule) if config.get("rescale_betas_zero_snr") else schedule

    def at(self, t: Tensor | int, like: Tensor) -> tuple[Tensor, Tensor]:
        """alpha_t and sigma_t on the device of `like` [B, ...], shaped to multiply it, in its type but float32 at
        least: half precision would lose what 1 / alpha (14.6 at SD-Turbo's t) then multiplies. t: one or [B]."""
        fine = dict(device=like.device, dtype=torch.promote_types(like.dtype, torch.float32))
        ones = (1,) * (like.ndim - 1)
        if isinstance(t, int):  # as numbers: a GPU would wait for a copy, and a compiled graph be cut at it
            return tuple(torch.full((1, *ones), numbers[t], **fine) for numbers in self._numbers)
        return tuple(table[t.cpu()].to(**fine).reshape(-1, *ones) for table in (self.alpha, self.sigma))


def zero_terminal_snr(schedule: Schedule) -> Schedule:
    """Shifts and scales alpha: the last value becomes 0 (pure noise), the first is kept (Lin et al. 2023, alg. 1)."""
    alpha = (schedule.alpha - schedule.alpha[-1]) * schedule.alpha[0] / (schedule.alpha[0] - schedule.alpha[-1])
    return replace(schedule, alpha=alpha, sigma=(1 - alpha**2).sqrt())


def start(noise: Tensor, t: int, schedule: Schedule) -> Tensor:
    """The first latent of text-to-image sampling from standard normal noise [B, 4, h, w]. Euler samplers (SD-Turbo's)
    begin at sigma_t noise, as if the picture were 0; the others at the noise itself."""
    euler = schedule.config.get("_class_name", "").startswith("Euler") and schedule.timestep_spacing != "leading"
    return schedule.at(t, noise)[1] * noise if euler else noise


def predict_x0(prediction: Tensor, x: Tensor, t: Tensor | int, schedule: Schedule, kind: str) -> Tensor:
    """The clean latent that a prediction at x_t stands for: (x_t - sigma eps) / alpha, or alpha x_t - sigma v."""
    alpha, sigma = schedule.at(t, x)
    return (x - sigma * prediction) / alpha if kind == "epsilon" else alpha * x - sigma * prediction


def add_noise(x0: Tensor, eps: Tensor, t: Tensor | int, schedule: Schedule) -> Tensor:
    alpha, sigma = schedule.at(t, x0)
    return alpha * x0 + sigma * eps


def start_from_prior(noise: Tensor, n: Tensor, mean: Tensor, std: Tensor, t: int, schedule: Schedule) -> Tensor:
    """The first latent where the schedule does not end in pure noise (YOSO's informative prior): what was trained at t
    is a noised picture, so noise x_prior = mean + std n, with the mean and deviation [4, h, w] of real pictures'
    scaled latents. noise, n: standard normal, [B, 4, h, w]."""
    return add_noise(mean.to(noise) + std.to(noise) * n, noise, t, schedule)


def mean_and_std(latents: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Of each value over the latents [4, h, w], in float64, one at a time (Welford's way)."""
    count, mean, squares = 0, 0.0, 0.0
    for count, z in enumerate(latents, start=1):
        z = z.cpu().double()
        delta = z - mean
        mean = mean + delta / count
        squares = squares + delta * (z - mean)
    if not count:
        raise ValueError("there are no latents; expected those of at least one picture")
    return mean, (squares / count).sqrt()


def timesteps(schedule: Schedule, steps: int) -> list[int]:
    """`steps` timesteps, high to low, spaced as the checkpoint's scheduler says ("leading", "trailing", "linspace").
    One step is the highest: for "leading" and "linspace" `diffusers` begins at the lowest, where x0 is the noise."""
    T, spacing = len(schedule.alpha), schedule.timestep_spacing
    if not 1 <= steps <= T:
        raise ValueError(f"{steps} steps were asked for; expected 1 to {T}")
    if steps == 1:
        return [T - 1]
    if spacing == "trailing":
        return [round(T - i * T / steps) - 1 for i in range(steps)]
    if spacing == "leading":
        return [i * (T // steps) + schedule.steps_offset for i in reversed(range(steps))]
    if spacing == "linspace":
        return [round(i * (T - 1) / (steps - 1)) for i in reversed(range(steps))]
    raise ValueError(f"the scheduler's timestep_spacing is {spacing!r}; built here are 'leading', 'trailing' and"
                     " 'linspace'")


def dpm_timesteps(schedule: Schedule, steps: int) -> list[int]:
    """The timesteps of DPM-Solver in `diffusers`: but for "trailing" there is one interval more than for DDIM, and the
    last is left for the step to 0."""
    T, spacing = len(schedule.alpha), schedule.timestep_spacing
    if spacing == "leading" and 1 < steps < T - 1:
        return [i * (T // (steps + 1)) + schedule.steps_offset for i in reversed(range(1, steps + 1))]
    if spacing == "linspace" and 1 < steps < T:
        return timesteps(schedule, steps + 1)[:-1]
    return timesteps(schedule, steps)


def at_strength(ts: list[int], strength: float) -> list[int]:
    """As many steps from a lower noise level, for editing: strength 1 is as given, 0.5 half the timesteps."""
    return list(dict.fromkeys(max(round((t + 1) * strength) - 1, 0) for t in ts))


def lcm_timesteps(schedule: Schedule, steps: int, original: int = 50) -> list[int]:
    """The timesteps of latent consistency models: `steps` of the `original` they were distilled on, from the top."""
    T = len(schedule.alpha)
    if not 1 <= steps <= original:
        raise ValueError(f"{steps} steps were asked for; the LCM sampler takes 1 to {original}")
    all_of_them = [(i + 1) * (T // original) - 1 for i in reversed(range(original))]
    return [all_of_them[i * original // steps] for i in range(steps)]


Model = Callable[[Tensor, int], Tensor]


def ddim(model: Model, x: Tensor, ts: list[int], schedule: Schedule) -> Tensor:
    """DDIM with eta 0 (Song et al. 2021). x: the noised latent at ts[0]. For SD-Turbo's trailing steps it takes the
    same path as the Euler sampler of `diffusers`: both follow the same ODE by straight lines in sigma / alpha."""
    for i, t in enumerate(ts):
        alpha, sigma = schedule.at(t, x)
        x0 = predict_x0(model(x, t), x, t, schedule, schedule.prediction_type)
        eps = (x - alpha * x0) / sigma
        if i + 1 < len(ts):
            x = add_noise(x0, eps, ts[i + 1], schedule)
        else:
            x = x0 if schedule.last_alpha_is_one else add_noise(x0, eps, 0, schedule)
    return x


def lcm(model: Model, x: Tensor, ts: list[int], schedule: Schedule, noise: Callable[[], Tensor]) -> Tensor:
    """Latent consistency sampling (Luo et al. 2023): jump to x0, add fresh noise, jump again. `noise()` draws it."""
    for i, t in enumerate(ts):
        s = 10.0 * t
        c_skip, c_out = 0.25 / (s**2 + 0.25), s / (s**2 + 0.25) ** 0.5
        x0 = c_skip * x + c_out * predict_x0(model(x, t), x, t, schedule, schedule.prediction_type)
        x = x0 if i + 1 == len(ts) else add_noise(x0, noise(), ts[i + 1], schedule)
    return x


def dpm(model: Model, x: Tensor, ts: list[int], schedule: Schedule) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022), midpoint: DDIM with x0 drawn on in a straight line in lambda = log(alpha /
    sigma), to the middle of the step. Its first step knows no line; its last goes to sigma = 0, where DDIM is x0. An
    alpha of 0 counts as 2^-12 in lambda, as in `diffusers`."""
    lambdas, before = schedule.alpha.clamp(min=2**-12).log() - schedule.sigma.log(), None
    for i, t in enumerate(ts):
        x0 = predict_x0(model(x, t), x, t, schedule, schedule.prediction_type)
        if i + 1 == len(ts):
            return x0
        middle = x0
        if before is not None:
            r = (lambdas[t] - lambdas[ts[i - 1]]) / (lambdas[ts[i + 1]] - lambdas[t])
            middle = x0 + 0.5 / r.item() * (x0 - before)
        alpha, sigma = schedule.at(t, x)
        x, before = add_noise(middle, (x - alpha * middle) / sigma, ts[i + 1], schedule), x0
    return x

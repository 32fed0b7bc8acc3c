"""Noise schedules and samplers: x_t = alpha_t x0 + sigma_t eps, and the ways back.

A schedule is two tables, kept in float64 and cast where they are used. Samplers are functions of (model, x,
timesteps): `model(x, t)` is the network's prediction at one timestep, whatever it needs besides (context, guidance)
bound by the caller."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

KINDS = ("epsilon", "v_prediction")


@dataclass
class Schedule:
    alpha: Tensor  # [T] float64, falls from nearly 1
    sigma: Tensor  # [T] float64, sqrt(1 - alpha^2)
    prediction_type: str = "epsilon"
    timestep_spacing: str = "leading"
    steps_offset: int = 0
    last_alpha_is_one: bool = True  # what DDIM steps to after its last timestep: no noise at all, or the noise of t = 0
    config: dict = field(default_factory=dict)  # what it was made from, to be saved again

    @classmethod
    def from_config(cls, config: dict) -> "Schedule":
        """From a `scheduler_config.json`. Refuses what is not built here by name."""
        T, kind = config.get("num_train_timesteps", 1000), config.get("beta_schedule", "linear")
        first, last = config.get("beta_start", 0.0001), config.get("beta_end", 0.02)
        if config.get("trained_betas") is not None:
            raise ValueError("the scheduler's configuration holds trained_betas; expected a beta_schedule by name")
        if kind == "scaled_linear":
            betas = torch.linspace(first**0.5, last**0.5, T, dtype=torch.float64) ** 2
        elif kind == "linear":
            betas = torch.linspace(first, last, T, dtype=torch.float64)
        else:
            raise ValueError(f"the scheduler's beta_schedule is {kind!r}; built here are 'scaled_linear' and 'linear'")
        prediction = config.get("prediction_type", "epsilon")
        if prediction not in KINDS:
            raise ValueError(f"the scheduler's prediction_type is {prediction!r}; built here are {KINDS}")
        alpha_bar = torch.cumprod(1 - betas, dim=0)
        schedule = cls(alpha_bar.sqrt(), (1 - alpha_bar).sqrt(), prediction, config.get("timestep_spacing", "leading"),
                       config.get("steps_offset", 0), config.get("set_alpha_to_one", True), config)
        return zero_terminal_snr(schedule) if config.get("rescale_betas_zero_snr") else schedule

    def at(self, t: Tensor | int, like: Tensor) -> tuple[Tensor, Tensor]:
        """alpha_t and sigma_t in the type and on the device of `like` [B, ...], shaped to multiply it. t: one or
        [B]."""
        t = torch.as_tensor(t, device="cpu")
        shape = (-1,) + (1,) * (like.ndim - 1)
        return tuple(table[t].to(device=like.device, dtype=like.dtype).reshape(shape)
                     for table in (self.alpha, self.sigma))


def zero_terminal_snr(schedule: Schedule) -> Schedule:
    """Shifts and scales alpha so that the last value is 0 (pure noise) and the first is kept (Lin et al. 2023, alg.
    1)."""
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


def timesteps(schedule: Schedule, steps: int, spacing: str | None = None) -> list[int]:
    """`steps` timesteps, high to low, spaced as the checkpoint's scheduler says ("leading" or "trailing")."""
    T, spacing = len(schedule.alpha), spacing or schedule.timestep_spacing
    if not 1 <= steps <= T:
        raise ValueError(f"{steps} steps were asked for; expected 1 to {T}")
    if spacing == "trailing":
        return [round(T - i * T / steps) - 1 for i in range(steps)]
    if spacing == "leading":
        return [i * (T // steps) + schedule.steps_offset for i in reversed(range(steps))]
    raise ValueError(f"the scheduler's timestep_spacing is {spacing!r}; built here are 'leading' and 'trailing'")


def lcm_timesteps(schedule: Schedule, steps: int, original: int = 50) -> list[int]:
    """The timesteps of latent consistency models: `steps` of the `original` that they were distilled on, from the
    top."""
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

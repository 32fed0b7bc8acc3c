"""Noise schedules, and the samplers that lead from noise to a clean latent.

A noisy latent is x_t = alpha_t x0 + sigma_t eps, with t from 0 (almost clean) to T - 1 (almost or
entirely noise). A schedule holds alpha and sigma as tables in float64; they are cast where they are
used.

A sampler is a function of (model, x, timesteps, schedule), LCM's also of noise. `model(x, t)` is
the network's prediction at a timestep; the caller has bound everything else to it (context,
guidance).

A base's `scheduler_config.json` is read as the class of `diffusers` that it names would read it,
and, by `for_sampler`, as the class of another sampler would. What is known of these classes is in
schedulers.py.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from models.schedulers import OWN_CLASS, SCHEDULERS, check_built, class_of, read_settings

PREDICTION_TYPES = ("epsilon", "v_prediction")  # what a network may predict
# (x_t, t) -> prediction. Where t is a fraction, x_t lies between two timesteps.
Model = Callable[[Tensor, float], Tensor]
# Samplers that divide by alpha use this in place of an alpha of 0, as `diffusers` does.
LEAST_ALPHA = 2**-12

# -------------------- schedules

def make_betas(settings: dict) -> Tensor:
    """The noise variance [T] that each timestep adds, in float64, from `read_settings`.

    Raises ValueError for a schedule that is not supported.
    """
    T = settings["num_train_timesteps"]
    if not 1 < T <= 100_000:
        raise ValueError(f"the scheduler's num_train_timesteps is {T!r}; expected 2 to 100000")

    kind = settings["beta_schedule"]
    first = settings["beta_start"]
    last = settings["beta_end"]
    if kind == "squaredcos_cap_v2":
        return cosine_betas(T)
    if not (0 < first < 1 and 0 < last < 1):
        raise ValueError(
            f"the scheduler's betas go from {first} to {last}; expected numbers between 0 and 1"
        )
    if kind == "linear":
        return torch.linspace(first, last, T, dtype=torch.float64)
    if kind == "scaled_linear":
        return torch.linspace(first**0.5, last**0.5, T, dtype=torch.float64) ** 2
    raise ValueError(
        f"the scheduler's beta_schedule is {kind!r}; only 'scaled_linear', 'linear' and"
        " 'squaredcos_cap_v2' are supported"
    )


def cosine_betas(T: int) -> Tensor:
    """The cosine schedule of Nichol and Dhariwal 2021, "Improved Denoising Diffusion Probabilistic
    Models", equation 17: betas [T] in float64."""
    t = torch.arange(T + 1, dtype=torch.float64)
    alpha_bar = ((t / T + 0.008) / 1.008 * math.pi / 2).cos() ** 2
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)


@dataclass
class Schedule:
    """The tables alpha and sigma of x_t = alpha_t x0 + sigma_t eps, and how a checkpoint wants to
    be sampled."""

    alpha: Tensor  # [T] float64, falling from nearly 1
    sigma: Tensor  # [T] float64, sqrt(1 - alpha^2)
    prediction_type: str = "epsilon"
    timestep_spacing: str = "leading"
    steps_offset: int = 0
    # Where DDIM goes from its last timestep: to no noise at all, or to the noise of t = 0.
    last_alpha_is_one: bool = True
    # Whether Euler and DPM-Solver space their noise levels as in Karras et al. 2022.
    karras: bool = False
    # The timesteps that a latent consistency model was distilled on, and the factor of t in its
    # boundary condition.
    original_steps: int = 50
    timestep_scaling: float = 10.0
    # The scheduler_config.json that it was made from, to be saved again.
    config: dict = field(default_factory=dict)

    def __post_init__(self):
        self._alpha_numbers = self.alpha.tolist()
        self._sigma_numbers = self.sigma.tolist()
        alpha = above_zero(self.alpha)
        self._ratios = ((1 - alpha**2).sqrt() / alpha).tolist()

    @classmethod
    def from_config(cls, config: dict) -> "Schedule":
        """The schedule of a `scheduler_config.json`.

        Raises ValueError for a class, a schedule or a kind of prediction that is not supported.
        """
        settings = read_settings(config)
        prediction_type = settings["prediction_type"]
        if prediction_type not in PREDICTION_TYPES:
            raise ValueError(
                f"the scheduler's prediction_type is {prediction_type!r}; only"
                f" {' and '.join(map(repr, PREDICTION_TYPES))} are supported"
            )
        if config.get("trained_betas") is not None:
            raise ValueError(
                "the scheduler's configuration holds trained_betas, which is not supported;"
                " expected a beta_schedule by name"
            )

        alpha_bar = torch.cumprod(1 - make_betas(settings), dim=0)
        # A class's own noise schedule is written down, for when another class is to sample from it.
        noise = {key: settings[key] for key in ("beta_schedule", "beta_start", "beta_end")}
        schedule = cls(
            alpha=alpha_bar.sqrt(),
            sigma=(1 - alpha_bar).sqrt(),
            prediction_type=prediction_type,
            config=noise | config,
            **how_to_sample(settings),
        )
        if settings["rescale_betas_zero_snr"]:
            return zero_terminal_snr(schedule)
        return schedule

    def ratio(self, t: float) -> float:
        """sigma / alpha at t. Between two timesteps it is taken from the straight line through
        both, in Karras's spacing from that through its logarithms."""
        low = min(int(t), len(self._ratios) - 2)
        weight = t - low
        if self.karras:
            return self._ratios[low] ** (1 - weight) * self._ratios[low + 1] ** weight
        return self._ratios[low] * (1 - weight) + self._ratios[low + 1] * weight

    def at(self, t: Tensor | float, like: Tensor) -> tuple[Tensor, Tensor]:
        """alpha_t and sigma_t, on the device of `like` [B, ...] and of a shape to multiply it.

        t is one timestep, which may be a fraction, or [B] whole ones. The type is that of `like`,
        but float32 at least: in half precision the rounding errors would grow with 1 / alpha (14.6
        at SD-Turbo's t = 999).
        """
        device = like.device
        dtype = torch.promote_types(like.dtype, torch.float32)
        ones = (1,) * (like.ndim - 1)

        if not isinstance(t, Tensor):
            # Python numbers: a copy from the tables would make the CPU wait for the GPU, and break
            # a compiled graph in two.
            if isinstance(t, int):
                numbers = self._alpha_numbers[t], self._sigma_numbers[t]
            else:
                numbers = alpha_and_sigma(self.ratio(t))
            alpha = torch.full((1, *ones), numbers[0], device=device, dtype=dtype)
            sigma = torch.full((1, *ones), numbers[1], device=device, dtype=dtype)
            return alpha, sigma

        t = t.cpu()
        alpha = self.alpha[t].to(device=device, dtype=dtype).reshape(-1, *ones)
        sigma = self.sigma[t].to(device=device, dtype=dtype).reshape(-1, *ones)
        return alpha, sigma


def how_to_sample(settings: dict) -> dict:
    """The fields of a schedule that its sampler reads, from `read_settings`."""
    return dict(
        timestep_spacing=settings["timestep_spacing"],
        steps_offset=settings["steps_offset"],
        last_alpha_is_one=settings["set_alpha_to_one"],
        karras=settings["use_karras_sigmas"],
        original_steps=settings["original_inference_steps"],
        timestep_scaling=settings["timestep_scaling"],
    )


def above_zero(alpha: Tensor) -> Tensor:
    """The alphas, with LEAST_ALPHA in place of 0. Smaller ones above 0 stay, as in `diffusers`."""
    return torch.where(alpha > 0, alpha, LEAST_ALPHA)


def alpha_and_sigma(ratio: float) -> tuple[float, float]:
    """The two numbers with alpha^2 + sigma^2 = 1 and sigma / alpha = ratio."""
    alpha = (1 + ratio**2) ** -0.5
    return alpha, ratio * alpha


def zero_terminal_snr(schedule: Schedule) -> Schedule:
    """The schedule with alpha shifted and scaled so that the last value is 0 (pure noise) and the
    first stays. Source: Lin et al. 2023, "Common Diffusion Noise Schedules and Sample Steps are
    Flawed", algorithm 1."""
    first = schedule.alpha[0]
    last = schedule.alpha[-1]
    alpha = (schedule.alpha - last) * first / (first - last)
    return replace(schedule, alpha=alpha, sigma=(1 - alpha**2).sqrt())

# -------------------- noise and predictions

def add_noise(x0: Tensor, eps: Tensor, t: Tensor | float, schedule: Schedule) -> Tensor:
    """x_t = alpha_t x0 + sigma_t eps."""
    alpha, sigma = schedule.at(t, x0)
    return alpha * x0 + sigma * eps


def predict_x0(
    prediction: Tensor,
    x: Tensor,
    t: Tensor | float,
    schedule: Schedule,
    prediction_type: str,
) -> Tensor:
    """The clean latent that a network's prediction at x = x_t implies.

    epsilon: (x_t - sigma eps) / alpha; v_prediction: alpha x_t - sigma v.
    """
    alpha, sigma = schedule.at(t, x)
    if prediction_type == "epsilon":
        return (x - sigma * prediction) / alpha
    return alpha * x - sigma * prediction


def check_prediction(prediction_type: str, t: float, schedule: Schedule) -> None:
    """ValueError where a prediction says nothing about x0: epsilon in pure noise."""
    if prediction_type == "epsilon" and schedule.alpha[round(t)] == 0:
        raise ValueError(
            f"at timestep {round(t)} the base's schedule is pure noise, from which a prediction of"
            " epsilon tells no x0; expected a base that predicts v, or rescale_betas_zero_snr false"
            " in its scheduler_config.json"
        )


def less_noisy(t: Tensor, steps: int) -> Tensor:
    """The timesteps `steps` below t, and 0 at least: the lower noise levels t - k of YOSO."""
    return (t - steps).clamp(min=0)


def start(noise: Tensor, t: float, schedule: Schedule) -> Tensor:
    """The first latent of text-to-image sampling, from standard normal noise [B, 4, h, w].

    Euler samplers (SD-Turbo's) start at sigma_t noise, as if x0 were 0, unless their spacing is
    "leading". All others start at the noise.
    """
    if sampler_of(schedule) == "euler" and schedule.timestep_spacing != "leading":
        _, sigma = schedule.at(t, noise)
        return sigma * noise
    return noise


def start_from_prior(
    noise: Tensor,
    n: Tensor,
    mean: Tensor,
    std: Tensor,
    t: float,
    schedule: Schedule,
) -> Tensor:
    """The first latent with YOSO's informative prior, for schedules that do not end in pure noise.

    At the last t the network was trained on noisy pictures, not on noise alone, so sampling starts
    from x0 = mean + std n, noised to t. `mean` and `std` [4, h, w] are those of the scaled latents
    of real pictures; `noise` and `n` are standard normal [B, 4, h, w].
    """
    x0 = mean.to(noise) + std.to(noise) * n
    return add_noise(x0, noise, t, schedule)


def mean_and_std(latents: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [4, h, w] over latents [4, h, w], in float64.

    Takes one latent at a time (Welford's algorithm). Raises ValueError if there is none.
    """
    count = 0
    mean = squares = torch.zeros((), dtype=torch.float64)
    for count, z in enumerate(latents, start=1):
        z = z.cpu().double()
        delta = z - mean
        mean = mean + delta / count
        squares = squares + delta * (z - mean)
    if count == 0:
        raise ValueError("there are no latents; expected those of at least one picture")
    return mean, (squares / count).sqrt()

# -------------------- the sampler of a schedule

def sampler_of(schedule: Schedule) -> str:
    """The sampler that goes with the class of a base's scheduler."""
    return SCHEDULERS[class_of(schedule.config)].sampler


def replaced_scheduler(schedule: Schedule) -> str | None:
    """The class (and algorithm) that the scheduler file names, if `sampler_of` only stands in for
    it; else None."""
    name = class_of(schedule.config)
    algorithm = str(schedule.config.get("algorithm_type"))
    if name not in OWN_CLASS.values():
        return name
    if name == "DPMSolverMultistepScheduler" and algorithm.startswith("sde"):
        return f"{name} with {algorithm}"
    return None


def for_sampler(schedule: Schedule, sampler: str, steps: int) -> Schedule:
    """The schedule with the settings that `sampler` uses for `steps` steps.

    If the file names the class of another sampler, it is read as the class of `sampler` would read
    it, like `from_config` of `diffusers`: a timestep spacing that the file leaves out, for example,
    becomes the default of that class. The noise schedule stays the same.

    Raises ValueError for a setting that would change the picture and is not supported.
    """
    config = schedule.config
    if sampler_of(schedule) != sampler:
        config = config | {"_class_name": OWN_CLASS[sampler]}
    lowest = -math.log(schedule.ratio(len(schedule.alpha) - 1))
    check_built(config, sampler, steps, lowest)
    schedule = replace(schedule, config=config, **how_to_sample(read_settings(config)))
    if sampler in ("euler", "dpm"):
        # Where alpha ends at 0 (pure noise), these two start just short of it, as in `diffusers`,
        # because they divide by alpha.
        alpha = above_zero(schedule.alpha)
        schedule = replace(schedule, alpha=alpha, sigma=(1 - alpha**2).sqrt())
    return schedule

# -------------------- timesteps

def timesteps(schedule: Schedule, steps: int) -> list[int]:
    """`steps` timesteps, from high to low, spaced as the checkpoint's scheduler says: "leading",
    "trailing" or "linspace".

    A single step is the highest timestep. For "leading" and "linspace", `diffusers` would take the
    lowest one, at which the network returns the noise almost unchanged.
    """
    T = len(schedule.alpha)
    spacing = schedule.timestep_spacing
    if not 1 <= steps <= T:
        raise ValueError(f"{steps} steps were asked for; expected 1 to {T}")
    if steps == 1:
        return [T - 1]

    if spacing == "trailing":
        return [round(T - i * T / steps) - 1 for i in range(steps)]
    if spacing == "leading":
        ts = [i * (T // steps) + schedule.steps_offset for i in reversed(range(steps))]
        check_range(ts, schedule)
        return ts
    if spacing == "linspace":
        return [round(i * (T - 1) / (steps - 1)) for i in reversed(range(steps))]
    raise ValueError(
        f"the scheduler's timestep_spacing is {spacing!r}; only 'leading', 'trailing' and"
        " 'linspace' are supported"
    )


def check_range(ts: list[int], schedule: Schedule) -> None:
    """ValueError if steps_offset moves some of the timesteps out of the schedule."""
    last = len(schedule.alpha) - 1
    if ts[-1] < 0 or ts[0] > last:
        raise ValueError(
            f"{len(ts)} steps with the scheduler's steps_offset of {schedule.steps_offset} go from"
            f" timestep {ts[0]} to {ts[-1]}; expected 0 to {last}: take fewer steps"
        )


def euler_timesteps(schedule: Schedule, steps: int) -> list[float]:
    """The timesteps of Euler's method, from high to low, as in `diffusers`.

    They are those of DDIM, but not rounded for "linspace"; or with Karras's noise levels between
    the first and the last of them.
    """
    ts = timesteps(schedule, steps)
    if schedule.karras and steps > 1:
        return karras_timesteps(schedule, ts[0], ts[-1], steps)
    if schedule.timestep_spacing == "linspace" and steps > 1:
        T = len(schedule.alpha)
        return [i * (T - 1) / (steps - 1) for i in reversed(range(steps))]
    return ts


def dpm_timesteps(schedule: Schedule, steps: int) -> list[float]:
    """The timesteps of DPM-Solver, from high to low, as in `diffusers`.

    For "leading" and "linspace" they divide the range into one interval more than those of DDIM;
    the lowest interval is left to the last step, which goes to 0. "trailing" is as for DDIM.
    Karras's noise levels go from the highest timestep to 0.
    """
    T = len(schedule.alpha)
    spacing = schedule.timestep_spacing
    if schedule.karras and 1 < steps <= T:
        return karras_timesteps(schedule, T - 1, 0, steps)
    if spacing == "leading" and 1 < steps < T - 1:
        interval = T // (steps + 1)
        ts = [i * interval + schedule.steps_offset for i in reversed(range(1, steps + 1))]
        check_range(ts, schedule)
        return ts
    if spacing == "linspace" and 1 < steps < T:
        return timesteps(schedule, steps + 1)[:-1]
    return timesteps(schedule, steps)


def karras_timesteps(schedule: Schedule, first: int, last: int, steps: int) -> list[float]:
    """`steps` timesteps from `first` to `last`, at evenly spaced (sigma / alpha)^(1/7).

    They are fractions (Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based
    Generative Models", equation 5).
    """
    highest = schedule.ratio(first) ** (1 / 7)
    lowest = schedule.ratio(last) ** (1 / 7)
    ratios = np.linspace(highest, lowest, steps) ** 7
    known = [schedule.ratio(t) for t in range(len(schedule.alpha))]
    return np.interp(np.log(ratios), np.log(known), range(len(known))).tolist()


def lcm_timesteps(schedule: Schedule, steps: int) -> list[int]:
    """The timesteps of a latent consistency model: `steps` of the `original_steps` timesteps that
    it was distilled on, from high to low."""
    T = len(schedule.alpha)
    original = schedule.original_steps
    if not 1 <= original <= T:
        raise ValueError(
            f"the scheduler's original_inference_steps is {original}; expected 1 to its"
            f" num_train_timesteps, {T}: choose another sampler"
        )
    if not 1 <= steps <= original:
        raise ValueError(f"{steps} steps were asked for; the LCM sampler takes 1 to {original}")
    interval = T // original
    distilled = [(i + 1) * interval - 1 for i in reversed(range(original))]
    return [distilled[i * original // steps] for i in range(steps)]


def at_strength(ts: list[float], strength: float) -> list[int]:
    """The timesteps for editing a picture: `ts`, moved down to a lower noise level and rounded.

    At strength 1 they stay where they are, 0.5 halves them. Those that become equal are merged, so
    there may be fewer.
    """
    lower = [max(round((t + 1) * strength) - 1, 0) for t in ts]
    return list(dict.fromkeys(lower))

# -------------------- samplers

def denoise(
    sampler: str,
    model: Model,
    x: Tensor,
    ts: list,
    schedule: Schedule,
    noise: Callable[[], Tensor],
) -> Tensor:
    """The clean latent to which a sampler leads x; `noise` is for LCM.

    `schedule` is that of `for_sampler`.
    """
    if sampler == "lcm":
        return lcm(model, x, ts, schedule, noise)
    if sampler == "dpm":
        return dpm(model, x, ts, schedule)
    if sampler == "euler":
        return euler(model, x, ts, schedule)
    return ddim(model, x, ts, schedule)


def ddim(model: Model, x: Tensor, ts: list[int], schedule: Schedule) -> Tensor:
    """DDIM with eta = 0, from the noisy latent x at ts[0] (Song et al. 2021, "Denoising Diffusion
    Implicit Models").

    A step from t to s: eps = (x_t - alpha_t x0) / sigma_t, x_s = alpha_s x0 + sigma_s eps. s is the
    next timestep; `diffusers` goes down by T // steps, which misses it where that does not divide.
    """
    for i, t in enumerate(ts):
        alpha, sigma = schedule.at(t, x)
        x0 = predict_x0(model(x, t), x, t, schedule, schedule.prediction_type)
        eps = (x - alpha * x0) / sigma
        if i + 1 < len(ts):
            x = add_noise(x0, eps, ts[i + 1], schedule)
        elif schedule.last_alpha_is_one:
            x = x0
        else:
            x = add_noise(x0, eps, 0, schedule)
    return x


def euler(model: Model, x: Tensor, ts: list[float], schedule: Schedule) -> Tensor:
    """Euler's method without noise, from the noisy latent x at ts[0] (Karras et al. 2022, algorithm
    2, without churn and correction).

    With y = x / alpha and r = sigma / alpha the ODE is dy/dr = eps, so a step from r to q is
    y + (q - r) eps = x0 + q eps: one of DDIM. The last goes to q = 0, so its result is x0.
    """
    return ddim(model, x, ts, replace(schedule, last_alpha_is_one=True))


def lcm(
    model: Model,
    x: Tensor,
    ts: list[int],
    schedule: Schedule,
    noise: Callable[[], Tensor],
) -> Tensor:
    """Latent consistency sampling: jump to x0, add fresh noise, jump again (Luo et al. 2023,
    "Latent Consistency Models"). `noise()` draws standard normal noise of the shape of x."""
    for i, t in enumerate(ts):
        # The boundary condition: a consistency model returns its input at t = 0.
        s = schedule.timestep_scaling * t
        c_skip = 0.25 / (s**2 + 0.25)
        c_out = s / (s**2 + 0.25) ** 0.5

        x0 = predict_x0(model(x, t), x, t, schedule, schedule.prediction_type)
        x0 = c_skip * x + c_out * x0
        if i + 1 < len(ts):
            x = add_noise(x0, noise(), ts[i + 1], schedule)
        else:
            x = x0
    return x


def dpm(model: Model, x: Tensor, ts: list[float], schedule: Schedule) -> Tensor:
    """DPM-Solver++(2M), the midpoint variant (Lu et al. 2022, "DPM-Solver++").

    A step is one of DDIM, with x0 extrapolated to the middle of the step: in a straight line
    through the last two predictions, over lambda = log(alpha / sigma). The first step has one
    prediction only and does not extrapolate. The last goes to sigma = 0, so its result is x0.
    """
    lambdas = [-math.log(schedule.ratio(t)) for t in ts]
    previous_x0 = None
    for i, t in enumerate(ts):
        # As in `diffusers`, the network is told Karras's timesteps rounded.
        x0 = predict_x0(model(x, round(t)), x, t, schedule, schedule.prediction_type)
        if i + 1 == len(ts):
            return x0

        middle = x0
        if previous_x0 is not None and lambdas[i] > lambdas[i - 1]:
            last_step = lambdas[i] - lambdas[i - 1]
            this_step = lambdas[i + 1] - lambdas[i]
            r = last_step / this_step
            middle = x0 + 0.5 / r * (x0 - previous_x0)

        alpha, sigma = schedule.at(t, x)
        eps = (x - alpha * middle) / sigma
        x = add_noise(middle, eps, ts[i + 1], schedule)
        previous_x0 = x0
    return x

"""Noise schedules, and the samplers that lead from noise to a clean latent.

A noisy latent is x_t = alpha_t x0 + sigma_t eps, with t from 0 (almost clean) to T - 1 (almost or
entirely noise). A schedule holds alpha and sigma as tables in float64; they are cast where they are
used.

A sampler is a function of (model, x, timesteps). `model(x, t)` is the network's prediction at a
timestep; the caller has bound everything else to it (context, guidance).
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

KINDS = ("epsilon", "v_prediction")  # what a network may predict

Model = Callable[[Tensor, int], Tensor]  # (x_t, t) -> prediction


def make_betas(config: dict) -> Tensor:
    """The noise variance [T] that each timestep adds, in float64, from a `scheduler_config.json`.

    Raises ValueError for a schedule that is not supported.
    """
    T = config.get("num_train_timesteps", 1000)
    if not isinstance(T, int) or not 1 < T <= 100_000:
        raise ValueError(f"the scheduler's num_train_timesteps is {T!r}; expected 2 to 100000")
    if config.get("trained_betas") is not None:
        raise ValueError(
            "the scheduler's configuration holds trained_betas, which is not supported; expected a"
            " beta_schedule by name"
        )

    kind = config.get("beta_schedule", "linear")
    first = config.get("beta_start", 0.0001)
    last = config.get("beta_end", 0.02)
    if kind == "linear":
        betas = torch.linspace(first, last, T, dtype=torch.float64)
    elif kind == "scaled_linear":
        betas = torch.linspace(first**0.5, last**0.5, T, dtype=torch.float64) ** 2
    elif kind == "squaredcos_cap_v2":
        betas = cosine_betas(T)
    else:
        raise ValueError(
            f"the scheduler's beta_schedule is {kind!r}; only 'scaled_linear', 'linear' and"
            " 'squaredcos_cap_v2' are supported"
        )

    if not ((0 < betas) & (betas < 1)).all():
        raise ValueError(
            f"the scheduler's betas go from {first} to {last}; expected numbers between 0 and 1"
        )
    return betas


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
    # The scheduler_config.json that it was made from, to be saved again.
    config: dict = field(default_factory=dict)

    def __post_init__(self):
        self._alpha_numbers = self.alpha.tolist()
        self._sigma_numbers = self.sigma.tolist()

    @classmethod
    def from_config(cls, config: dict) -> "Schedule":
        """The schedule of a `scheduler_config.json`.

        Raises ValueError for a schedule or a kind of prediction that is not supported.
        """
        betas = make_betas(config)
        prediction_type = config.get("prediction_type", "epsilon")
        if prediction_type not in KINDS:
            raise ValueError(
                f"the scheduler's prediction_type is {prediction_type!r}; only"
                f" {' and '.join(map(repr, KINDS))} are supported"
            )

        alpha_bar = torch.cumprod(1 - betas, dim=0)
        schedule = cls(
            alpha=alpha_bar.sqrt(),
            sigma=(1 - alpha_bar).sqrt(),
            prediction_type=prediction_type,
            timestep_spacing=config.get("timestep_spacing", "leading"),
            steps_offset=config.get("steps_offset", 0),
            last_alpha_is_one=config.get("set_alpha_to_one", True),
            config=config,
        )
        if config.get("rescale_betas_zero_snr"):
            return zero_terminal_snr(schedule)
        return schedule

    def at(self, t: Tensor | int, like: Tensor) -> tuple[Tensor, Tensor]:
        """alpha_t and sigma_t, on the device of `like` [B, ...] and of a shape to multiply it.

        t is one timestep or [B] of them. The type is that of `like`, but float32 at least: in half
        precision the rounding errors would grow with 1 / alpha (14.6 at SD-Turbo's t = 999).
        """
        device = like.device
        dtype = torch.promote_types(like.dtype, torch.float32)
        ones = (1,) * (like.ndim - 1)

        if isinstance(t, int):
            # Python numbers: a copy from the tables would make the CPU wait for the GPU, and break
            # a compiled graph in two.
            alpha = torch.full((1, *ones), self._alpha_numbers[t], device=device, dtype=dtype)
            sigma = torch.full((1, *ones), self._sigma_numbers[t], device=device, dtype=dtype)
            return alpha, sigma

        t = t.cpu()
        alpha = self.alpha[t].to(device=device, dtype=dtype).reshape(-1, *ones)
        sigma = self.sigma[t].to(device=device, dtype=dtype).reshape(-1, *ones)
        return alpha, sigma


def zero_terminal_snr(schedule: Schedule) -> Schedule:
    """The schedule with alpha shifted and scaled so that the last value is 0 (pure noise) and the
    first stays. Source: Lin et al. 2023, "Common Diffusion Noise Schedules and Sample Steps are
    Flawed", algorithm 1."""
    first = schedule.alpha[0]
    last = schedule.alpha[-1]
    alpha = (schedule.alpha - last) * first / (first - last)
    return replace(schedule, alpha=alpha, sigma=(1 - alpha**2).sqrt())


def add_noise(x0: Tensor, eps: Tensor, t: Tensor | int, schedule: Schedule) -> Tensor:
    """x_t = alpha_t x0 + sigma_t eps."""
    alpha, sigma = schedule.at(t, x0)
    return alpha * x0 + sigma * eps


def predict_x0(
    prediction: Tensor,
    x: Tensor,
    t: Tensor | int,
    schedule: Schedule,
    kind: str,
) -> Tensor:
    """The clean latent that a network's prediction at x = x_t implies.

    epsilon: (x_t - sigma eps) / alpha; v_prediction: alpha x_t - sigma v.
    """
    alpha, sigma = schedule.at(t, x)
    if kind == "epsilon":
        return (x - sigma * prediction) / alpha
    return alpha * x - sigma * prediction


def less_noisy(t: Tensor, steps: int) -> Tensor:
    """The timesteps `steps` below t, and 0 at least: the lower noise levels t - k of YOSO."""
    return (t - steps).clamp(min=0)


def start(noise: Tensor, t: int, schedule: Schedule) -> Tensor:
    """The first latent of text-to-image sampling, from standard normal noise [B, 4, h, w].

    Euler samplers (SD-Turbo's) start at sigma_t noise, as if x0 were 0; all others at the noise.
    """
    euler = schedule.config.get("_class_name", "").startswith("Euler")
    if euler and schedule.timestep_spacing != "leading":
        _, sigma = schedule.at(t, noise)
        return sigma * noise
    return noise


def start_from_prior(
    noise: Tensor,
    n: Tensor,
    mean: Tensor,
    std: Tensor,
    t: int,
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
        return [i * (T // steps) + schedule.steps_offset for i in reversed(range(steps))]
    if spacing == "linspace":
        return [round(i * (T - 1) / (steps - 1)) for i in reversed(range(steps))]
    raise ValueError(
        f"the scheduler's timestep_spacing is {spacing!r}; only 'leading', 'trailing' and"
        " 'linspace' are supported"
    )


def dpm_timesteps(schedule: Schedule, steps: int) -> list[int]:
    """The timesteps of DPM-Solver, from high to low, as in `diffusers`.

    For "leading" and "linspace" they divide the range into one interval more than those of DDIM;
    the lowest interval is left to the last step, which goes to 0. "trailing" is as for DDIM.
    """
    T = len(schedule.alpha)
    spacing = schedule.timestep_spacing
    if spacing == "leading" and 1 < steps < T - 1:
        interval = T // (steps + 1)
        return [i * interval + schedule.steps_offset for i in reversed(range(1, steps + 1))]
    if spacing == "linspace" and 1 < steps < T:
        return timesteps(schedule, steps + 1)[:-1]
    return timesteps(schedule, steps)


def lcm_timesteps(schedule: Schedule, steps: int, original: int = 50) -> list[int]:
    """The timesteps of a latent consistency model: `steps` of the `original` timesteps that it was
    distilled on, from high to low."""
    if not 1 <= steps <= original:
        raise ValueError(f"{steps} steps were asked for; the LCM sampler takes 1 to {original}")
    interval = len(schedule.alpha) // original
    distilled = [(i + 1) * interval - 1 for i in reversed(range(original))]
    return [distilled[i * original // steps] for i in range(steps)]


def at_strength(ts: list[int], strength: float) -> list[int]:
    """The timesteps for editing a picture: as many, from a lower noise level.

    Strength 1 keeps them, 0.5 halves them. Timesteps that become equal are taken once.
    """
    lower = [max(round((t + 1) * strength) - 1, 0) for t in ts]
    return list(dict.fromkeys(lower))


def ddim(model: Model, x: Tensor, ts: list[int], schedule: Schedule) -> Tensor:
    """DDIM with eta = 0, from the noisy latent x at ts[0] (Song et al. 2021, "Denoising Diffusion
    Implicit Models").

    With SD-Turbo's "trailing" timesteps this takes the same path as the Euler sampler of
    `diffusers`: both follow the same ODE, in straight lines over sigma / alpha.
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
        s = 10.0 * t
        c_skip = 0.25 / (s**2 + 0.25)
        c_out = s / (s**2 + 0.25) ** 0.5

        x0 = predict_x0(model(x, t), x, t, schedule, schedule.prediction_type)
        x0 = c_skip * x + c_out * x0
        if i + 1 < len(ts):
            x = add_noise(x0, noise(), ts[i + 1], schedule)
        else:
            x = x0
    return x


def dpm(model: Model, x: Tensor, ts: list[int], schedule: Schedule) -> Tensor:
    """DPM-Solver++(2M), the midpoint variant (Lu et al. 2022, "DPM-Solver++").

    A step is one of DDIM, with x0 extrapolated to the middle of the step: in a straight line
    through the last two predictions, over lambda = log(alpha / sigma). The first step has one
    prediction only and does not extrapolate. The last goes to sigma = 0, so its result is x0.
    """
    # As in `diffusers`, an alpha of 0 counts as 2^-12 here, because its logarithm is infinite.
    lambdas = schedule.alpha.clamp(min=2**-12).log() - schedule.sigma.log()
    previous_x0 = None
    for i, t in enumerate(ts):
        x0 = predict_x0(model(x, t), x, t, schedule, schedule.prediction_type)
        if i + 1 == len(ts):
            return x0

        middle = x0
        if previous_x0 is not None:
            last_step = lambdas[t] - lambdas[ts[i - 1]]
            this_step = lambdas[ts[i + 1]] - lambdas[t]
            r = last_step / this_step
            middle = x0 + 0.5 / r.item() * (x0 - previous_x0)

        alpha, sigma = schedule.at(t, x)
        eps = (x - alpha * middle) / sigma
        x = add_noise(middle, eps, ts[i + 1], schedule)
        previous_x0 = x0
    return x

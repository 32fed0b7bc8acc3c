"""models/diffusion.py agrees with its peers, the schedulers of `diffusers`: in tables, timesteps,
single steps, and whole sampling runs."""

import math

import numpy as np
import pytest
import torch
from conftest import normal, relative
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
)
from diffusers.schedulers import scheduling_dpmsolver_multistep
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr
from torch import Tensor

from models.diffusion import (
    Schedule,
    add_noise,
    at_strength,
    ddim,
    dpm,
    dpm_timesteps,
    lcm,
    lcm_timesteps,
    less_noisy,
    mean_and_std,
    predict_x0,
    start_from_prior,
    timesteps,
)

pytestmark = pytest.mark.usefixtures("one_thread")

SD = dict(
    beta_schedule="scaled_linear",
    beta_start=0.00085,
    beta_end=0.012,
    num_train_timesteps=1000,
)
PIXART = dict(beta_schedule="linear", beta_start=0.0001, beta_end=0.02, num_train_timesteps=1000)
SHORT = dict(beta_schedule="scaled_linear", beta_start=0.001, beta_end=0.3, num_train_timesteps=40)
COSINE = dict(beta_schedule="squaredcos_cap_v2", num_train_timesteps=1000)
SETTINGS = {"Stable Diffusion": SD, "PixArt": PIXART, "40 timesteps": SHORT, "cosine": COSINE}
TURBO = dict(SD, timestep_spacing="trailing", steps_offset=1, set_alpha_to_one=False)
PLAIN = dict(clip_sample=False, thresholding=False)


def fine_betas(config: dict) -> np.ndarray:
    """The betas of a configuration in float64."""
    if config["beta_schedule"] == "squaredcos_cap_v2":
        bar = [math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(1001)]
        return np.array([min(1 - b / a, 0.999) for a, b in zip(bar, bar[1:])])
    first = config["beta_start"]
    last = config["beta_end"]
    T = config["num_train_timesteps"]
    if config["beta_schedule"] == "linear":
        return np.linspace(first, last, T)
    return np.linspace(first**0.5, last**0.5, T) ** 2


def fine(peer, zero_snr: bool = False):
    """The peer with its tables in float64.

    In `__init__` each scheduler makes its betas in float32 (`self.betas = torch.linspace(...,
    dtype=torch.float32)`) and derives the other tables from them.
    """
    betas = torch.tensor(fine_betas(peer.config))
    if zero_snr:
        betas = rescale_zero_terminal_snr(betas)
    rounded = peer.alphas_cumprod
    peer.alphas_cumprod = torch.cumprod(1 - betas, dim=0)
    assert relative(peer.alphas_cumprod, rounded.double()) < 1e-5
    if hasattr(peer, "final_alpha_cumprod"):
        one = torch.ones(()).double()
        peer.final_alpha_cumprod = one if peer.config.set_alpha_to_one else peer.alphas_cumprod[0]
    return peer


def smooth(x: Tensor, t: Tensor | int) -> Tensor:
    """Stands for a network: a smooth function of the latent, a different one at each t."""
    return 0.7 * torch.tanh(1.3 * x + 0.001 * float(t)) + 0.1 * x.roll(1, dims=-1)


def sampled_by(peer, x: Tensor) -> Tensor:
    """The peer's latent after all its timesteps, from x."""
    for t in peer.timesteps:
        x = peer.step(smooth(x, t), t, x).prev_sample
    return x


# -------------------------------------------------------------------------------------- tables


@pytest.mark.parametrize("config", SETTINGS.values(), ids=SETTINGS.keys())
def test_tables_are_the_peers(config):
    schedule = Schedule.from_config(config)
    assert schedule.alpha.dtype == schedule.sigma.dtype == torch.float64
    for peer in (DDPMScheduler(**config), DDIMScheduler(**config)):
        theirs = fine(peer).alphas_cumprod
        assert relative(schedule.alpha, theirs.sqrt()) < 1e-9
        assert relative(schedule.sigma, (1 - theirs).sqrt()) < 1e-9


def test_published_figures_at_the_last_timestep():
    schedule = Schedule.from_config(SD)
    alpha = schedule.alpha[999].item()
    sigma = schedule.sigma[999].item()
    assert round(alpha, 7) == 0.0682649
    assert round(sigma, 7) == 0.9976672
    assert round(1 / alpha, 5) == 14.64881
    alpha = Schedule.from_config(PIXART).alpha[999].item()
    assert round(alpha, 7) == 0.0063528
    assert round(1 / alpha, 2) == 157.41


@pytest.mark.parametrize("config", SETTINGS.values(), ids=SETTINGS.keys())
def test_zero_terminal_snr_is_the_peers_and_ends_in_pure_noise(config):
    plain = Schedule.from_config(config)
    schedule = Schedule.from_config(dict(config, rescale_betas_zero_snr=True))
    betas = rescale_zero_terminal_snr(torch.tensor(fine_betas(config)))
    theirs = torch.cumprod(1 - betas, dim=0)
    assert relative(schedule.alpha, theirs.sqrt()) < 1e-9
    assert relative(schedule.sigma, (1 - theirs).sqrt()) < 1e-9
    assert (schedule.alpha[-1], schedule.sigma[-1]) == (0, 1)
    assert schedule.alpha[0].item() == pytest.approx(plain.alpha[0].item(), rel=1e-12)


def test_what_the_configuration_says_is_kept():
    schedule = Schedule.from_config(dict(TURBO, prediction_type="v_prediction"))
    assert schedule.prediction_type == "v_prediction"
    assert schedule.timestep_spacing == "trailing"
    assert schedule.steps_offset == 1
    assert schedule.last_alpha_is_one is False
    assert Schedule.from_config(schedule.config).config == schedule.config
    rescaled = Schedule.from_config(dict(TURBO, rescale_betas_zero_snr=True))
    assert (rescaled.timestep_spacing, rescaled.last_alpha_is_one) == ("trailing", False)


@pytest.mark.parametrize(
    "wrong",
    [dict(beta_schedule="sigmoid"), dict(prediction_type="sample")],
    ids=str,
)
def test_other_schedules_and_predictions_are_refused_by_name(wrong):
    with pytest.raises(ValueError, match=repr(*wrong.values())):
        Schedule.from_config(dict(SD, **wrong))


def test_betas_by_value_are_refused():
    with pytest.raises(ValueError, match="trained_betas"):
        Schedule.from_config(dict(SD, trained_betas=[0.1, 0.2]))


def test_impossible_numbers_of_timesteps_and_betas_are_refused():
    for T in (1, 10**12, "many"):
        with pytest.raises(ValueError, match=f"num_train_timesteps is {T!r}; expected 2 to 100000"):
            Schedule.from_config(dict(SD, num_train_timesteps=T))
    with pytest.raises(ValueError, match="betas go from 0.00085 to 1.5; expected"):
        Schedule.from_config(dict(SD, beta_end=1.5))


# ------------------------------------------------------------------------------------ one step


@pytest.mark.parametrize("t", [0, 1, 500, 999, torch.tensor([999, 3, 250])], ids=str)
def test_add_noise_is_the_peers(t):
    x0 = normal(3, 4, 5, 6)
    eps = normal(3, 4, 5, 6, seed=1)
    theirs = fine(DDPMScheduler(**SD)).add_noise(x0, eps, torch.as_tensor(t).expand(3))
    assert relative(add_noise(x0, eps, t, Schedule.from_config(SD)), theirs) < 1e-9


@pytest.mark.parametrize("t", [1, 500, 999, torch.tensor([999, 3, 250])], ids=str)
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_true_prediction_gives_the_clean_latent_back(kind, t):
    schedule = Schedule.from_config(SD)
    x0 = normal(3, 4, 5, 6)
    eps = normal(3, 4, 5, 6, seed=1)
    x = add_noise(x0, eps, t, schedule)
    v = fine(DDPMScheduler(**SD)).get_velocity(x0, eps, torch.as_tensor(t).expand(3))
    prediction = eps if kind == "epsilon" else v
    assert relative(predict_x0(prediction, x, t, schedule, kind), x0) < 1e-9


@pytest.mark.parametrize("t", [1, 500, 999])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_predicted_clean_latent_is_the_peers(kind, t):
    schedule = Schedule.from_config(SD)
    x = normal(2, 4, 5, 6)
    prediction = normal(2, 4, 5, 6, seed=1)
    for peer in (DDPMScheduler, DDIMScheduler):
        peer = fine(peer(**SD, **PLAIN, prediction_type=kind))
        peer.set_timesteps(1000)
        theirs = peer.step(prediction, t, x).pred_original_sample
        assert relative(predict_x0(prediction, x, t, schedule, kind), theirs) < 1e-9


def test_one_ddpm_step_at_the_last_timestep_is_the_clean_latent():
    """The official translators call a DDPM scheduler with one step. It clamps its variance at
    1e-20, so that 1e-9 of noise remains, and its tables are float32."""
    peer = DDPMScheduler(**SD, **PLAIN, timestep_spacing="trailing")
    peer.set_timesteps(1)
    x = normal(2, 4, 5, 6)
    prediction = normal(2, 4, 5, 6, seed=1)
    generator = torch.Generator().manual_seed(0)
    theirs = peer.step(prediction, peer.timesteps[0], x, generator=generator).prev_sample
    ours = predict_x0(prediction, x, 999, Schedule.from_config(SD), "epsilon")
    assert relative(ours, theirs) < 1e-5


@pytest.mark.parametrize(
    "dtype, computed_in",
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
    ids=str,
)
def test_arithmetic_is_in_the_type_of_the_latent_but_float32_at_least(dtype, computed_in):
    schedule = Schedule.from_config(SD)
    x = normal(2, 4, 5, 6, dtype=dtype)
    x0 = predict_x0(x, x, 999, schedule, "epsilon")
    assert x0.dtype == add_noise(x, x, 3, schedule).dtype == computed_in
    exact = predict_x0(x.double(), x.double(), 999, schedule, "epsilon")
    assert relative(x0.double(), exact) < 1e-4


def test_lower_noise_levels_end_at_zero():
    t = torch.tensor([999, 250, 249, 3, 0])
    assert less_noisy(t, 250).tolist() == [749, 0, 0, 0, 0]
    assert less_noisy(t, 1).tolist() == [998, 249, 248, 2, 0]
    assert torch.equal(less_noisy(t, 0), t)
    assert less_noisy(t, 250).dtype == t.dtype


# ----------------------------------------------------------------------------------- timesteps


@pytest.mark.parametrize("steps", [2, 3, 4, 7, 10, 25, 50])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_timesteps_are_the_peers(spacing, offset, steps):
    config = dict(SD, timestep_spacing=spacing, steps_offset=offset)
    ours = timesteps(Schedule.from_config(config), steps)
    for scheduler in (DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler):
        peer = scheduler(**config)
        peer.set_timesteps(steps)
        assert ours == [int(t) for t in peer.timesteps]


@pytest.mark.parametrize("steps", [2, 4, 25, 1000])
def test_linspace_is_the_peers_and_one_step_of_it_is_the_highest(steps):
    peer = DDIMScheduler(**SD, timestep_spacing="linspace")
    peer.set_timesteps(steps)
    schedule = Schedule.from_config(dict(SD, timestep_spacing="linspace"))
    assert timesteps(schedule, steps) == peer.timesteps.tolist()
    assert timesteps(schedule, 1) == [999]


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_one_step_begins_at_the_most_noise(spacing):
    """The peers begin at timestep 1 for "leading", where the picture is the noise itself."""
    schedule = Schedule.from_config(dict(SD, timestep_spacing=spacing, steps_offset=1))
    assert timesteps(schedule, 1) == dpm_timesteps(schedule, 1) == [999]


def test_lcm_timesteps_are_the_peers_at_every_number_of_steps():
    schedule = Schedule.from_config(SD)
    peer = LCMScheduler(**SD)
    for steps in range(1, 51):
        peer.set_timesteps(steps)
        assert lcm_timesteps(schedule, steps) == peer.timesteps.tolist()
    peer.set_timesteps(3, original_inference_steps=30)
    assert lcm_timesteps(schedule, 3, original=30) == peer.timesteps.tolist()


def test_published_lcm_timesteps():
    schedule = Schedule.from_config(SD)
    assert lcm_timesteps(schedule, 1) == [999]
    assert lcm_timesteps(schedule, 2) == [999, 499]
    assert lcm_timesteps(schedule, 4) == [999, 759, 499, 259]


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_impossible_numbers_of_steps_are_refused(steps):
    schedule = Schedule.from_config(SD)
    with pytest.raises(ValueError, match=f"{steps} steps were asked for; expected 1 to 1000"):
        timesteps(schedule, steps)
    message = f"{steps} steps were asked for; the LCM sampler takes 1 to 50"
    with pytest.raises(ValueError, match=message):
        lcm_timesteps(schedule, steps)


def test_other_spacings_are_refused_by_name():
    schedule = Schedule.from_config(dict(SD, timestep_spacing="karras"))
    for take in (timesteps, dpm_timesteps):
        with pytest.raises(ValueError, match="'karras'"):
            take(schedule, 4)


def test_strength_lowers_the_first_timestep_and_keeps_the_number_of_steps():
    assert at_strength([999], 0.6) == [599]
    assert at_strength([999, 749, 499, 249], 0.5) == [499, 374, 249, 124]
    assert at_strength([999, 749, 499, 249], 1.0) == [999, 749, 499, 249]
    assert at_strength([999, 749, 499, 249], 1e-9) == [0]  # equal timesteps are taken once


# ------------------------------------------------------------------------------------ samplers


@pytest.mark.parametrize("steps", [2, 4, 25])
@pytest.mark.parametrize("to_one", [True, False])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_ddim_takes_the_peers_path(spacing, kind, to_one, steps):
    config = dict(
        SD,
        timestep_spacing=spacing,
        prediction_type=kind,
        set_alpha_to_one=to_one,
        steps_offset=1,
    )
    peer = fine(DDIMScheduler(**config, **PLAIN))
    peer.set_timesteps(steps)
    schedule = Schedule.from_config(config)
    x = normal(2, 4, 5, 6)
    ours = ddim(smooth, x, timesteps(schedule, steps), schedule)
    assert relative(ours, sampled_by(peer, x)) < 1e-9


@pytest.mark.parametrize("steps", [1, 4, 25])
def test_ddim_from_pure_noise_takes_the_peers_path(steps):
    config = dict(
        SD,
        timestep_spacing="trailing",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
    )
    peer = fine(DDIMScheduler(**config, **PLAIN), zero_snr=True)
    peer.set_timesteps(steps)
    schedule = Schedule.from_config(config)
    x = normal(2, 4, 5, 6)
    ours = ddim(smooth, x, timesteps(schedule, steps), schedule)
    assert relative(ours, sampled_by(peer, x)) < 1e-9


@pytest.mark.parametrize("steps", [1, 2, 4, 25])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_ddim_with_trailing_steps_takes_eulers_path(kind, steps):
    """Euler's variable is x / alpha. `step` casts it to float32 (`sample.to(torch.float32)`) and
    its sigmas are float32, hence the bound."""
    config = dict(SD, timestep_spacing="trailing", prediction_type=kind)
    peer = EulerDiscreteScheduler(**config)
    peer.set_timesteps(steps)
    schedule = Schedule.from_config(config)
    noise = normal(2, 4, 5, 6)
    theirs = noise * peer.sigmas[0]
    for t in peer.timesteps:
        prediction = smooth(peer.scale_model_input(theirs, t), t)
        theirs = peer.step(prediction, t, theirs).prev_sample
    x = schedule.sigma[999] * noise
    assert relative(ddim(smooth, x, timesteps(schedule, steps), schedule), theirs) < 1e-5


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_lcm_takes_the_peers_path_with_the_same_noises(kind, steps):
    """The peer is given t as a number, because from a tensor
    `get_scalings_for_boundary_condition_discrete` would compute in float32."""
    config = dict(SD, prediction_type=kind)
    peer = fine(LCMScheduler(**config, **PLAIN))
    peer.set_timesteps(steps)
    schedule = Schedule.from_config(config)
    x = normal(2, 4, 5, 6)
    their_generator = torch.Generator().manual_seed(3)
    our_generator = torch.Generator().manual_seed(3)

    theirs = x
    for t in peer.timesteps.tolist():
        step = peer.step(smooth(theirs, t), t, theirs, generator=their_generator)
        theirs = step.prev_sample

    def noise() -> Tensor:
        return torch.randn(x.shape, generator=our_generator, dtype=x.dtype)

    ours = lcm(smooth, x, lcm_timesteps(schedule, steps), schedule, noise)
    assert relative(ours, theirs) < 1e-9
    # Neither draws noise that it does not use.
    assert torch.equal(our_generator.get_state(), their_generator.get_state())


def test_a_perfect_model_leads_every_sampler_to_its_latent():
    schedule = Schedule.from_config(dict(TURBO, set_alpha_to_one=True))
    x0 = normal(1, 4, 5, 6)

    def model(x: Tensor, t: int) -> Tensor:
        alpha, sigma = schedule.at(t, x)
        return (x - alpha * x0) / sigma

    def noise() -> Tensor:
        return normal(1, 4, 5, 6)

    x = add_noise(x0, normal(1, 4, 5, 6, seed=1), 999, schedule)
    for n in (1, 3, 10):
        made = ddim(model, x, timesteps(schedule, n), schedule)
        assert relative(made, x0) < 1e-9
        # c_skip keeps 2.5e-7 of x at t = 99.
        made = lcm(model, x, lcm_timesteps(schedule, n), schedule, noise)
        assert relative(made, x0) < 1e-5


# ---------------------------------------------------------------------------------- DPM-Solver


class Lifted:
    """torch or numpy, with float64 in the place of float32."""

    def __init__(self, module):
        self.module = module
        self.float32 = module.float64

    def __getattr__(self, name):
        return getattr(self.module, name)


@pytest.fixture
def exact_dpm(monkeypatch):
    """Makes the peer's DPM-Solver compute in float64. It would make its tables, its sigmas and each
    step in float32 (`sample.to(torch.float32)`)."""
    for name in ("torch", "np"):
        lifted = Lifted(getattr(scheduling_dpmsolver_multistep, name))
        monkeypatch.setattr(scheduling_dpmsolver_multistep, name, lifted)


SPACINGS = {
    "leading": dict(timestep_spacing="leading", steps_offset=1),
    "trailing": dict(timestep_spacing="trailing"),
    "linspace": dict(timestep_spacing="linspace"),
}


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", SPACINGS.values(), ids=SPACINGS.keys())
@pytest.mark.parametrize("steps", [2, 4, 14, 15, 25])
def test_dpm_takes_the_peers_path(exact_dpm, steps, spacing, kind):
    config = dict(SD, **spacing, prediction_type=kind)
    peer = DPMSolverMultistepScheduler(**config)
    peer.set_timesteps(steps)
    schedule = Schedule.from_config(config)
    ts = dpm_timesteps(schedule, steps)
    assert ts == peer.timesteps.tolist()

    x = normal(2, 4, 5, 6)
    theirs = sampled_by(peer, x)
    assert theirs.dtype == torch.float64
    assert relative(dpm(smooth, x, ts, schedule), theirs) < 1e-9
    if steps > 2:
        assert relative(ddim(smooth, x, ts, schedule), theirs) > 1e-4


@pytest.mark.parametrize("spacing", SPACINGS.values(), ids=SPACINGS.keys())
@pytest.mark.parametrize("steps", [3, 40, 600])
def test_dpm_timesteps_are_the_peers_at_any_number_of_steps(spacing, steps):
    config = dict(SD, **spacing)
    peer = DPMSolverMultistepScheduler(**config)
    peer.set_timesteps(steps)
    assert dpm_timesteps(Schedule.from_config(config), steps) == peer.timesteps.tolist()


def test_dpm_starts_from_pure_noise_where_the_schedule_ends_in_it(exact_dpm):
    """The bound is 1e-3 because the peer uses 2^-12 for an alpha of 0 everywhere, we only in the
    logarithm."""
    config = dict(
        SD,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    )
    peer = DPMSolverMultistepScheduler(**config)
    peer.set_timesteps(4)
    schedule = Schedule.from_config(config)
    assert schedule.alpha[999] == 0
    x = normal(2, 4, 5, 6)
    ours = dpm(smooth, x, dpm_timesteps(schedule, 4), schedule)
    assert relative(ours, sampled_by(peer, x)) < 1e-3


# -------------------------------------------------------------------------------------- priors


def test_a_prior_is_noised_to_the_first_timestep():
    noise, n, mean, std = (normal(2, 4, 3, 5, seed=seed) for seed in range(4))
    mean = mean[0].float()
    std = std[0].float()
    schedule = Schedule.from_config(SD)
    x0 = mean.double() + std.double() * n
    expected = schedule.alpha[999] * x0 + schedule.sigma[999] * noise
    assert relative(start_from_prior(noise, n, mean, std, 999, schedule), expected) < 1e-9


def test_mean_and_standard_deviation_are_numpys():
    latents = [1e3 + normal(4, 3, 5, seed=seed) for seed in range(7)]
    mean, std = mean_and_std(iter(latents))
    array = torch.stack(latents).numpy()
    assert relative(mean, torch.tensor(array.mean(0))) < 1e-12
    assert relative(std, torch.tensor(array.std(0))) < 1e-9
    with pytest.raises(ValueError, match="at least one"):
        mean_and_std([])

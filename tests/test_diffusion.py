"""models/diffusion.py agrees with its peers, the schedulers of `diffusers`: in settings, tables,
timesteps, single steps, and whole sampling runs."""

import importlib
import inspect
import math
import sys
import types
from dataclasses import replace

import diffusers
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
from diffusers.schedulers import scheduling_dpmsolver_multistep, scheduling_euler_discrete
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr
from torch import Tensor

from models.diffusion import (
    Schedule,
    add_noise,
    at_strength,
    check_prediction,
    ddim,
    denoise,
    dpm,
    dpm_timesteps,
    euler_timesteps,
    for_sampler,
    lcm,
    lcm_timesteps,
    less_noisy,
    mean_and_std,
    predict_x0,
    replaced_scheduler,
    sampler_of,
    start,
    start_from_prior,
    timesteps,
)
from models.schedulers import (
    BUILT,
    IN_ONE_STEP,
    OWN_CLASS,
    SCHEDULERS,
    SHARED_DEFAULTS,
    read_settings,
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


# ------------------------------------------------------------------------------------ settings

TIMESTEPS = dict(
    ddim=timesteps,
    euler=euler_timesteps,
    lcm=lcm_timesteps,
    dpm=dpm_timesteps,
)


@pytest.fixture
def peer_class(monkeypatch):
    """A scheduler class of the installed `diffusers`, by name."""

    def find(name: str) -> type:
        if name != "DPMSolverSDEScheduler":
            return getattr(diffusers, name)
        # Its signature does not need the library without which `diffusers` hides it.
        monkeypatch.setitem(sys.modules, "torchsde", types.ModuleType("torchsde"))
        module = importlib.import_module("diffusers.schedulers.scheduling_dpmsolver_sde")
        return getattr(module, name)

    return find


def defaults_of(cls: type) -> dict:
    """The settings of a scheduler class, with their defaults."""
    parameters = inspect.signature(cls.__init__).parameters
    return {key: value.default for key, value in parameters.items() if key != "self"}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_defaults_are_those_of_the_class(peer_class, name):
    theirs = defaults_of(peer_class(name))
    ours = read_settings({"_class_name": name})
    shared = ours.keys() & theirs.keys()
    assert shared >= {"num_train_timesteps", "beta_schedule", "beta_start", "beta_end"}
    assert {key: ours[key] for key in shared} == {key: theirs[key] for key in shared}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_timesteps_of_the_defaults_are_the_peers(name):
    if SCHEDULERS[name].sampler == "dpm":
        pytest.importorskip("scipy")
    own = OWN_CLASS[SCHEDULERS[name].sampler]
    peer = getattr(diffusers, own)()
    peer.set_timesteps(7)
    schedule = Schedule.from_config({"_class_name": name})
    ours = TIMESTEPS[sampler_of(schedule)](schedule, 7)
    assert ours == pytest.approx(peer.timesteps.tolist(), rel=1e-6)


def test_all_classes_that_stable_diffusions_pipeline_takes_are_known():
    """EDM's scale what the network takes in another way."""
    for name in DDIMScheduler._compatibles:
        assert name in SCHEDULERS or name.startswith("EDM")


# Settings without an effect here, and why.
HARMLESS = dict(
    trained_betas="refused where the betas are made",
    dynamic_thresholding_ratio="of thresholding only",
    sample_max_value="of thresholding only",
    clip_sample_range="of clip_sample only",
    lower_order_final="the last step goes to no noise, and is of first order for it",
    euler_at_final="the last step goes to no noise, and is of first order for it",
    flow_shift="of use_flow_sigmas only",
    use_dynamic_shifting="of use_flow_sigmas only",
    time_shift_type="of use_flow_sigmas only",
    variance_type="the network has dropped its variances already",
    lambda_min_clipped="refused where it has an effect",
)


@pytest.mark.parametrize("sampler, name", OWN_CLASS.items())
def test_every_setting_of_a_samplers_class_is_read_or_refused_or_harmless(sampler, name):
    read = read_settings({"_class_name": name})
    for key, default in defaults_of(getattr(diffusers, name)).items():
        assert key in read or key in BUILT[sampler] or key in HARMLESS, key
        if key in BUILT[sampler] and key != "clip_sample":
            assert default == BUILT[sampler][key][0]


def path_of_peer(sampler: str, settings: dict) -> Tensor:
    """Where the peer's scheduler of a sampler arrives after 7 steps."""
    torch.manual_seed(0)
    peer = getattr(diffusers, OWN_CLASS[sampler])(**SD, **settings)
    peer.set_timesteps(7)
    noise = 3 * normal(2, 4, 5, 6)
    return sampled_by_euler(peer, noise) if sampler == "euler" else sampled_by(peer, noise)


# Samplers, settings that change the peer's path, the last of them one that is not built.
NOT_BUILT = [
    ("ddim", dict(clip_sample=False, thresholding=True)),
    ("ddim", dict(clip_sample=True)),
    ("lcm", dict(thresholding=True)),
    ("lcm", dict(clip_sample=True)),
    ("euler", dict(interpolation_type="log_linear")),
    ("euler", dict(use_exponential_sigmas=True)),
    ("euler", dict(use_beta_sigmas=True)),
    ("euler", dict(final_sigmas_type="sigma_min")),
    ("euler", dict(use_karras_sigmas=True, sigma_min=0.1)),
    ("euler", dict(use_karras_sigmas=True, sigma_max=10.0)),
    ("euler", dict(prediction_type="v_prediction", timestep_type="continuous")),
    ("dpm", dict(solver_order=3)),
    ("dpm", dict(solver_order=1)),
    ("dpm", dict(solver_type="heun")),
    ("dpm", dict(final_sigmas_type="sigma_min")),
    ("dpm", dict(final_sigmas_type="sigma_min", algorithm_type="dpmsolver")),
    ("dpm", dict(thresholding=True)),
    ("dpm", dict(use_exponential_sigmas=True)),
    ("dpm", dict(use_beta_sigmas=True)),
    ("dpm", dict(use_lu_lambdas=True)),
    ("dpm", dict(use_flow_sigmas=True)),
    ("dpm", dict(lambda_min_clipped=-2.0)),
]


@pytest.mark.parametrize("sampler, settings", NOT_BUILT, ids=str)
def test_what_changes_the_picture_and_is_not_built_is_refused_by_name(sampler, settings):
    *_, (key, value) = settings.items()
    rest = {other: settings[other] for other in settings if other != key}
    if sampler == "ddim":
        rest["clip_sample"] = False
    if "use_beta_sigmas" in settings:
        pytest.importorskip("scipy")
    assert relative(path_of_peer(sampler, settings), path_of_peer(sampler, rest)) > 1e-3

    schedule = Schedule.from_config(dict(SD, _class_name=OWN_CLASS[sampler], **settings))
    with pytest.raises(ValueError) as raised:
        for_sampler(schedule, sampler, 7)
    message = str(raised.value)
    assert f"the scheduler's {key} is {value!r}" in message
    assert "expected" in message
    assert "another sampler" in message
    # Other samplers do not know the setting, as their classes do not.
    for other in OWN_CLASS:
        if key not in defaults_of(getattr(diffusers, OWN_CLASS[other])):
            for_sampler(Schedule.from_config(dict(SD, **{key: value})), other, 7)


@pytest.mark.parametrize("sampler, settings", NOT_BUILT, ids=str)
def test_a_single_step_needs_little_of_it(sampler, settings):
    schedule = Schedule.from_config(dict(SD, _class_name=OWN_CLASS[sampler], **settings))
    if any(settings.get(key) for key in IN_ONE_STEP):
        with pytest.raises(ValueError, match="another sampler"):
            for_sampler(schedule, sampler, 1)
    else:
        for_sampler(schedule, sampler, 1)


@pytest.mark.parametrize(
    "sampler, settings",
    [
        ("euler", dict(sigma_min=0.002, sigma_max=80.0)),
        ("euler", dict(timestep_type="continuous")),
        ("dpm", dict(lambda_min_clipped=-5.1)),
        ("dpm", dict(variance_type="fixed_small")),
        ("dpm", dict(lower_order_final=False)),
        ("dpm", dict(euler_at_final=True)),
        ("dpm", dict(solver_type="bh2")),
        ("lcm", dict(clip_sample=None)),
        ("lcm", dict(sample_max_value=3.0)),
    ],
    ids=str,
)
def test_settings_without_an_effect_are_not_refused(sampler, settings):
    assert torch.equal(path_of_peer(sampler, settings), path_of_peer(sampler, {}))
    config = dict(SD, _class_name=OWN_CLASS[sampler], **settings)
    for_sampler(Schedule.from_config(config), sampler, 7)


@pytest.mark.parametrize("sampler", OWN_CLASS)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_another_sampler_reads_the_settings_as_its_class_does_from_the_peers(
    peer_class, name, sampler
):
    """`diffusers` hands settings on by `from_config`, which leaves defaults behind."""
    config = dict(SD, _class_name=name)
    schedule = for_sampler(Schedule.from_config(config), sampler, 7)
    own = OWN_CLASS[SCHEDULERS[name].sampler]
    peer = getattr(diffusers, OWN_CLASS[sampler]).from_config(getattr(diffusers, own)(**SD).config)
    peer.set_timesteps(7)
    ours = TIMESTEPS[sampler](schedule, 7)
    assert ours == pytest.approx(peer.timesteps.tolist(), rel=1e-6)


def test_another_sampler_keeps_the_noise_schedule_of_the_class():
    schedule = Schedule.from_config({"_class_name": "DDPMScheduler"})
    for sampler in OWN_CLASS:
        assert torch.equal(for_sampler(schedule, sampler, 7).alpha, schedule.alpha)
    again = Schedule.from_config(schedule.config | {"_class_name": "LCMScheduler"})
    assert torch.equal(again.alpha, schedule.alpha)


# The class of a base, its sampler here, and what that stands in for.
SAMPLERS = [
    (None, "ddim", None),
    ("DDIMScheduler", "ddim", None),
    ("PNDMScheduler", "ddim", "PNDMScheduler"),
    ("DDPMScheduler", "ddim", "DDPMScheduler"),
    ("LCMScheduler", "lcm", None),
    ("TCDScheduler", "lcm", "TCDScheduler"),
    ("EulerDiscreteScheduler", "euler", None),
    ("EulerAncestralDiscreteScheduler", "euler", "EulerAncestralDiscreteScheduler"),
    ("LMSDiscreteScheduler", "euler", "LMSDiscreteScheduler"),
    ("HeunDiscreteScheduler", "euler", "HeunDiscreteScheduler"),
    ("DPMSolverMultistepScheduler", "dpm", None),
    ("DPMSolverSinglestepScheduler", "dpm", "DPMSolverSinglestepScheduler"),
    ("UniPCMultistepScheduler", "dpm", "UniPCMultistepScheduler"),
]


@pytest.mark.parametrize("name, sampler, replaced", SAMPLERS)
def test_the_sampler_is_that_of_the_class_or_stands_in_for_it(name, sampler, replaced):
    schedule = Schedule.from_config(dict(SD, _class_name=name))
    assert sampler_of(schedule) == sampler
    assert replaced_scheduler(schedule) == replaced


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_class_with_all_its_defaults_written_down_is_sampled(peer_class, name):
    """Of a folder that `diffusers` has saved. Its pipeline sets clip_sample to false."""
    config = defaults_of(peer_class(name)) | dict(_class_name=name, clip_sample=False)
    schedule = Schedule.from_config(config)
    sampler = sampler_of(schedule)
    assert len(TIMESTEPS[sampler](for_sampler(schedule, sampler, 7), 7)) == 7


def test_dpm_stands_in_for_its_variant_with_noise():
    config = dict(SD, _class_name="DPMSolverMultistepScheduler", algorithm_type="sde-dpmsolver++")
    schedule = Schedule.from_config(config)
    assert "sde-dpmsolver++" in replaced_scheduler(schedule)
    for_sampler(schedule, sampler_of(schedule), 7)


@pytest.mark.parametrize(
    "name, says",
    [
        ("FlowMatchEulerDiscreteScheduler", "flow matching"),
        ("FlowMatchLCMScheduler", "flow matching"),
        ("EDMEulerScheduler", "not supported"),
        ("CosineDPMSolverMultistepScheduler", "not supported"),
        ("CMStochasticIterativeScheduler", "not supported"),
        ("MyScheduler", "not supported"),
        (["diffusers", "DDIMScheduler"], "not supported"),
        (3, "not supported"),
    ],
)
def test_other_classes_are_refused_by_name(name, says):
    with pytest.raises(ValueError, match=says) as raised:
        Schedule.from_config(dict(SD, _class_name=name))
    assert str(name)[:20] in str(raised.value)
    assert "expected" in str(raised.value)


@pytest.mark.parametrize("name", [*OWN_CLASS.values(), "PNDMScheduler"])
@pytest.mark.parametrize("key", [*SHARED_DEFAULTS, *SCHEDULERS["DDIMScheduler"]._fields[1:]])
def test_null_is_refused_for_numbers_and_words_and_is_false_otherwise(name, key):
    config = {"_class_name": name, key: None}
    if isinstance(SHARED_DEFAULTS.get(key), bool):
        assert read_settings(config) == read_settings({"_class_name": name})
        return
    with pytest.raises(ValueError, match=f"the scheduler's {key} is None; expected a"):
        Schedule.from_config(config)


@pytest.mark.parametrize(
    "wrong",
    [
        dict(steps_offset="1"),
        dict(steps_offset=1.5),
        dict(steps_offset=True),
        dict(beta_start=[0.1]),
        dict(beta_end=True),
        dict(beta_end=math.nan),
        dict(timestep_scaling=math.inf),
        dict(timestep_scaling=10**30),
        dict(timestep_spacing=3),
        dict(use_karras_sigmas="yes"),
        dict(set_alpha_to_one=1),
        dict(timestep_scaling="ten"),
        dict(original_inference_steps=0.5),
        dict(num_train_timesteps="many"),
    ],
    ids=str,
)
def test_settings_of_another_type_are_refused_by_name(wrong):
    (key, value), *_ = wrong.items()
    with pytest.raises(ValueError) as raised:
        Schedule.from_config(dict(SD) | wrong)
    assert f"the scheduler's {key} is {value!r}; expected" in str(raised.value)


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
    for T in (1, 10**12):
        with pytest.raises(ValueError, match=f"num_train_timesteps is {T}; expected 2 to 100000"):
            Schedule.from_config(dict(SD, num_train_timesteps=T))
    for beta in (1.5, 0, -0.1):
        with pytest.raises(ValueError, match=f"betas go from 0.00085 to {beta}; expected"):
            Schedule.from_config(dict(SD, beta_end=beta))


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


def test_epsilon_in_pure_noise_is_refused():
    noise, usual = Schedule.from_config(ZERO_SNR), Schedule.from_config(SD)
    with pytest.raises(ValueError, match="^at timestep 999 the base's schedule is pure noise"):
        check_prediction("epsilon", 999, noise)
    check_prediction("epsilon", 998.4, noise)
    check_prediction("v_prediction", 999, noise)
    check_prediction("epsilon", 999, usual)


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
    assert lcm_timesteps(replace(schedule, original_steps=30), 3) == peer.timesteps.tolist()


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
    for take in (timesteps, dpm_timesteps, euler_timesteps):
        with pytest.raises(ValueError, match="'karras'"):
            take(schedule, 4)


@pytest.mark.parametrize("take", [timesteps, euler_timesteps, dpm_timesteps])
def test_an_offset_that_leads_out_of_the_schedule_is_refused(take):
    """The peer's DDIM ends in an IndexError there."""
    leading = dict(SD, timestep_spacing="leading")
    for offset, steps in [(1, 1000), (3, 1000), (9, 997), (-400, 10), (10**30, 2)]:
        schedule = Schedule.from_config(dict(leading, steps_offset=offset))
        message = f"steps_offset of {offset} go from .*; expected 0 to 999"
        with pytest.raises(ValueError, match=message):
            take(schedule, steps)
    schedule = Schedule.from_config(dict(leading, steps_offset=1))
    for steps in (1, 2, 300, 500, 997):
        ts = take(schedule, steps)
        assert 0 < ts[-1] <= ts[0] <= 999
    ts = timesteps(schedule, 999)
    peer = DDIMScheduler(**leading, steps_offset=1)
    peer.set_timesteps(999)
    assert ts == peer.timesteps.tolist()


def test_schedules_shorter_than_the_steps_are_refused():
    short = Schedule.from_config(dict(SD, num_train_timesteps=10))
    for take in (timesteps, euler_timesteps, dpm_timesteps):
        for steps in (11, 20, 1000):
            with pytest.raises(ValueError, match=f"{steps} steps were asked for; expected 1 to 10"):
                take(short, steps)
        assert len(take(short, 9)) == 9
    for steps in (1, 4, 20):
        with pytest.raises(ValueError, match="original_inference_steps is 50; expected 1 to .* 10"):
            lcm_timesteps(short, steps)
    for wrong in (0, -3, 1001):
        schedule = Schedule.from_config(dict(SD, original_inference_steps=wrong))
        with pytest.raises(ValueError, match=f"original_inference_steps is {wrong}; expected 1 to"):
            lcm_timesteps(schedule, 2)


def test_a_distilled_schedule_as_long_as_the_whole_is_taken():
    config = dict(SD, num_train_timesteps=10, original_inference_steps=10)
    peer = LCMScheduler(**config)
    schedule = Schedule.from_config(dict(config, _class_name="LCMScheduler"))
    for steps in range(1, 11):
        peer.set_timesteps(steps)
        assert lcm_timesteps(schedule, steps) == peer.timesteps.tolist()


def test_strength_lowers_the_first_timestep_and_keeps_the_number_of_steps():
    assert at_strength([999], 0.6) == [599]
    assert at_strength([999, 749, 499, 249], 0.5) == [499, 374, 249, 124]
    assert at_strength([999, 749, 499, 249], 1.0) == [999, 749, 499, 249]
    assert at_strength([999, 749, 499, 249], 1e-9) == [0]  # equal timesteps are taken once
    assert at_strength([999.0, 666.0, 333.0], 0.5) == [499, 333, 166]
    assert all(isinstance(t, int) for t in at_strength([998.7, 3.2], 0.7))


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


@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
def test_ddim_goes_to_the_next_timestep_where_the_peer_misses_it(spacing):
    """The peer goes down by T // steps, which is the next timestep only where it divides T."""
    config = dict(SD, timestep_spacing=spacing, set_alpha_to_one=False)
    peer = fine(DDIMScheduler(**config, **PLAIN))
    peer.set_timesteps(30)
    schedule = Schedule.from_config(config)
    x = normal(2, 4, 5, 6)
    exact = ddim(smooth, x, timesteps(schedule, 1000), schedule)
    ours = ddim(smooth, x, timesteps(schedule, 30), schedule)
    assert relative(ours, exact) < relative(sampled_by(peer, x), exact) / 2


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


@pytest.mark.parametrize(
    "own",
    [
        {},
        dict(original_inference_steps=25),
        dict(original_inference_steps=100, timestep_scaling=0.01),
    ],
    ids=str,
)
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_lcm_takes_the_peers_path_with_the_same_noises(kind, steps, own):
    """The peer is given t as a number, because from a tensor
    `get_scalings_for_boundary_condition_discrete` would compute in float32."""
    config = dict(SD, prediction_type=kind, **own)
    peer = fine(LCMScheduler(**config, **PLAIN))
    peer.set_timesteps(steps)
    schedule = Schedule.from_config(dict(config, _class_name="LCMScheduler"))
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


@pytest.fixture
def exact_euler(monkeypatch):
    """The same for the peer's Euler, which also rounds its timesteps to float32."""
    for name in ("torch", "np"):
        lifted = Lifted(getattr(scheduling_euler_discrete, name))
        monkeypatch.setattr(scheduling_euler_discrete, name, lifted)


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


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("steps", [2, 4, 14, 25, 100])
def test_dpm_with_karras_sigmas_takes_the_peers_path(exact_dpm, steps, kind):
    config = dict(SD, prediction_type=kind, use_karras_sigmas=True)
    peer = DPMSolverMultistepScheduler(**config)
    peer.set_timesteps(steps)
    schedule = Schedule.from_config(dict(config, _class_name="DPMSolverMultistepScheduler"))
    ts = dpm_timesteps(schedule, steps)
    assert [round(t) for t in ts] == peer.timesteps.tolist()
    assert [schedule.ratio(t) for t in ts] == pytest.approx(peer.sigmas[:-1].tolist(), rel=1e-10)

    x = normal(2, 4, 5, 6)
    theirs = sampled_by(peer, x)
    assert relative(dpm(smooth, x, ts, schedule), theirs) < 1e-9
    plain = Schedule.from_config(dict(config, use_karras_sigmas=False))
    others = dpm(smooth, x, dpm_timesteps(plain, steps), plain)
    assert relative(others, theirs) > 1e-4


ZERO_SNR = dict(SD, rescale_betas_zero_snr=True, timestep_spacing="trailing")


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("karras", [False, True])
def test_dpm_starts_from_pure_noise_where_the_schedule_ends_in_it(exact_dpm, karras, steps, kind):
    config = dict(ZERO_SNR, prediction_type=kind, use_karras_sigmas=karras)
    peer = DPMSolverMultistepScheduler(**config)
    peer.set_timesteps(steps)
    schedule = Schedule.from_config(dict(config, _class_name="DPMSolverMultistepScheduler"))
    assert schedule.alpha[999] == 0
    schedule = for_sampler(schedule, "dpm", steps)
    x = normal(2, 4, 5, 6)
    ours = dpm(smooth, x, dpm_timesteps(schedule, steps), schedule)
    assert relative(ours, sampled_by(peer, x)) < 1e-9


# --------------------------------------------------------------------------------------- Euler


def sampled_by_euler(peer, noise: Tensor) -> Tensor:
    """The peer's latent from noise. It works on x / alpha, and scales it for the network."""
    y = noise * peer.init_noise_sigma
    for t in peer.timesteps:
        prediction = smooth(peer.scale_model_input(y, t), t)
        y = peer.step(prediction, t, y).prev_sample
    return y


def sampled_by_ours(config: dict, noise: Tensor, steps: int) -> Tensor:
    """Our latent from noise, with the sampler of the configuration's class."""
    schedule = Schedule.from_config(config)
    sampler = sampler_of(schedule)
    schedule = for_sampler(schedule, sampler, steps)
    ts = TIMESTEPS[sampler](schedule, steps)
    x = start(noise, ts[0], schedule)
    return denoise(sampler, smooth, x, ts, schedule, torch.zeros_like)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("karras", [False, True])
@pytest.mark.parametrize("spacing", SPACINGS.values(), ids=SPACINGS.keys())
@pytest.mark.parametrize("steps", [2, 3, 4, 7, 25, 100])
def test_euler_takes_the_peers_path(exact_euler, steps, spacing, karras, kind):
    config = dict(SD, **spacing, prediction_type=kind, use_karras_sigmas=karras)
    peer = EulerDiscreteScheduler(**config)
    peer.set_timesteps(steps)
    schedule = Schedule.from_config(config)
    ts = euler_timesteps(schedule, steps)
    assert ts == pytest.approx(peer.timesteps.tolist(), rel=1e-9, abs=1e-9)

    noise = normal(2, 4, 5, 6)
    theirs = sampled_by_euler(peer, noise)
    assert theirs.dtype == torch.float64
    config["_class_name"] = "EulerDiscreteScheduler"
    assert relative(sampled_by_ours(config, noise, steps), theirs) < 1e-9


@pytest.mark.parametrize("spacing", SPACINGS.values(), ids=SPACINGS.keys())
def test_euler_in_the_peers_own_precision(spacing):
    """Its tables, timesteps and steps are in float32, hence the bound."""
    config = dict(SD, **spacing, _class_name="EulerDiscreteScheduler")
    peer = EulerDiscreteScheduler.from_config(config)
    peer.set_timesteps(20)
    noise = normal(2, 4, 5, 6)
    theirs = sampled_by_euler(peer, noise)
    assert relative(sampled_by_ours(config, noise, 20), theirs) < 1e-5


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("karras", [False, True])
def test_euler_starts_from_pure_noise_where_the_schedule_ends_in_it(
    exact_euler, karras, steps, kind
):
    config = dict(ZERO_SNR, prediction_type=kind, use_karras_sigmas=karras)
    peer = EulerDiscreteScheduler(**config)
    peer.set_timesteps(steps)
    noise = normal(2, 4, 5, 6)
    theirs = sampled_by_euler(peer, noise)
    config["_class_name"] = "EulerDiscreteScheduler"
    assert relative(sampled_by_ours(config, noise, steps), theirs) < 1e-8


def test_one_step_of_euler_begins_at_the_most_noise():
    for spacing in SPACINGS.values():
        for karras in (False, True):
            config = dict(SD, **spacing, use_karras_sigmas=karras)
            schedule = Schedule.from_config(config)
            assert euler_timesteps(schedule, 1) == dpm_timesteps(schedule, 1) == [999]


# SD-Turbo's own scheduler_config.json, with settings of other classes among its own.
SD_TURBO = dict(
    SD,
    _class_name="EulerDiscreteScheduler",
    clip_sample=False,
    interpolation_type="linear",
    prediction_type="epsilon",
    set_alpha_to_one=False,
    sigma_max=None,
    sigma_min=None,
    skip_prk_steps=True,
    steps_offset=1,
    timestep_spacing="trailing",
    timestep_type="discrete",
    trained_betas=None,
    use_karras_sigmas=False,
)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_sd_turbo_ends_without_noise(exact_euler, steps):
    """Its set_alpha_to_one is DDIM's, which would leave the noise of t = 0 in the picture."""
    peer = EulerDiscreteScheduler.from_config(SD_TURBO)
    peer.set_timesteps(steps)
    noise = normal(2, 4, 5, 6)
    theirs = sampled_by_euler(peer, noise)
    assert relative(sampled_by_ours(SD_TURBO, noise, steps), theirs) < 1e-9


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

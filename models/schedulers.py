"""`scheduler_config.json`: the scheduler classes of `diffusers`, their settings and defaults.

Bases come with such a file, which names a class and some of its settings. It is read as that class
reads it. Each class has a sampler of diffusion.py that does its work or stands in for it.
"""

from typing import NamedTuple


class Scheduler(NamedTuple):
    """A scheduler class: the sampler that does its work here, and its own defaults."""

    sampler: str
    beta_schedule: str
    beta_start: float
    beta_end: float
    timestep_spacing: str


SCHEDULERS = {
    "DDIMScheduler": Scheduler("ddim", "linear", 0.0001, 0.02, "leading"),
    "DDIMParallelScheduler": Scheduler("ddim", "linear", 0.0001, 0.02, "leading"),
    "DDPMScheduler": Scheduler("ddim", "linear", 0.0001, 0.02, "leading"),
    "DDPMParallelScheduler": Scheduler("ddim", "linear", 0.0001, 0.02, "leading"),
    "PNDMScheduler": Scheduler("ddim", "linear", 0.0001, 0.02, "leading"),
    "LCMScheduler": Scheduler("lcm", "scaled_linear", 0.00085, 0.012, "leading"),
    "TCDScheduler": Scheduler("lcm", "scaled_linear", 0.00085, 0.012, "leading"),
    "EulerDiscreteScheduler": Scheduler("euler", "linear", 0.0001, 0.02, "linspace"),
    "EulerAncestralDiscreteScheduler": Scheduler("euler", "linear", 0.0001, 0.02, "linspace"),
    "LMSDiscreteScheduler": Scheduler("euler", "linear", 0.0001, 0.02, "linspace"),
    "HeunDiscreteScheduler": Scheduler("euler", "linear", 0.00085, 0.012, "linspace"),
    "KDPM2DiscreteScheduler": Scheduler("euler", "linear", 0.00085, 0.012, "linspace"),
    "KDPM2AncestralDiscreteScheduler": Scheduler("euler", "linear", 0.00085, 0.012, "linspace"),
    "DPMSolverMultistepScheduler": Scheduler("dpm", "linear", 0.0001, 0.02, "linspace"),
    "DPMSolverSinglestepScheduler": Scheduler("dpm", "linear", 0.0001, 0.02, "linspace"),
    "DPMSolverSDEScheduler": Scheduler("dpm", "linear", 0.00085, 0.012, "linspace"),
    "DEISMultistepScheduler": Scheduler("dpm", "linear", 0.0001, 0.02, "linspace"),
    "SASolverScheduler": Scheduler("dpm", "linear", 0.0001, 0.02, "linspace"),
    "UniPCMultistepScheduler": Scheduler("dpm", "linear", 0.0001, 0.02, "linspace"),
}
# The class that a sampler was built after. For all other classes it stands in.
OWN_CLASS = dict(
    ddim="DDIMScheduler",
    lcm="LCMScheduler",
    euler="EulerDiscreteScheduler",
    dpm="DPMSolverMultistepScheduler",
)
# The defaults in which the classes agree. They hold for classes without the setting, too: YOSO's
# adaption sets rescale_betas_zero_snr on all.
SHARED_DEFAULTS = dict(
    num_train_timesteps=1000,
    prediction_type="epsilon",
    rescale_betas_zero_snr=False,
    steps_offset=0,
    use_karras_sigmas=False,
    original_inference_steps=50,
    timestep_scaling=10.0,
)
# Settings that change the picture, and the values of them that are built, by sampler.
BUILT: dict[str, dict[str, tuple]] = dict(
    ddim=dict(thresholding=(False,), clip_sample=(False,)),
    lcm=dict(thresholding=(False,), clip_sample=(False,)),
    euler=dict(
        interpolation_type=("linear",),
        timestep_type=("discrete",),
        use_exponential_sigmas=(False,),
        use_beta_sigmas=(False,),
        sigma_min=(None,),
        sigma_max=(None,),
        final_sigmas_type=("zero",),
    ),
    dpm=dict(
        # "deis" and the later solver types are those of the classes that dpm stands in for.
        algorithm_type=("dpmsolver++", "sde-dpmsolver++", "deis", "data_prediction"),
        solver_type=("midpoint", "logrho", "bh1", "bh2"),
        solver_order=(2,),
        thresholding=(False,),
        use_exponential_sigmas=(False,),
        use_beta_sigmas=(False,),
        use_lu_lambdas=(False,),
        use_flow_sigmas=(False,),
        final_sigmas_type=("zero",),
    ),
)
# Settings that have an effect only where another has this value.
ONLY_WITH = dict(
    sigma_min=("use_karras_sigmas", True),
    sigma_max=("use_karras_sigmas", True),
    timestep_type=("prediction_type", "v_prediction"),
)
# Settings that have an effect on a single step, too.
IN_ONE_STEP = ("thresholding", "clip_sample", "final_sigmas_type", "use_flow_sigmas")


def class_of(config: dict) -> str:
    """The scheduler class that a `scheduler_config.json` names, DDIM's where it names none.

    Raises ValueError for a class that is not in the table.
    """
    name = str(config.get("_class_name") or "DDIMScheduler")
    if name in SCHEDULERS:
        return name
    if "Flow" in name:
        raise ValueError(
            f"the scheduler's class {name!r:.60} is for flow matching (Stable Diffusion 3, Flux),"
            " another kind of model; expected DDIMScheduler or another of Stable Diffusion's"
        )
    raise ValueError(
        f"the scheduler's class {name!r:.60} is not supported; expected"
        f" {', '.join(OWN_CLASS.values())} or a relative"
    )


def read_settings(config: dict) -> dict:
    """The settings of a `scheduler_config.json`; those that it lacks are its class's.

    Raises ValueError for a value of the wrong type.
    """
    name = class_of(config)
    defaults = SHARED_DEFAULTS | SCHEDULERS[name]._asdict()
    del defaults["sampler"]
    # The one default that a class has to itself.
    defaults["set_alpha_to_one"] = name != "PNDMScheduler"

    settings = {}
    for key, default in defaults.items():
        value = config.get(key, default)
        if value is None and isinstance(default, bool):
            value = False
        check_type(key, value, default)
        settings[key] = value
    return settings


def check_type(key: str, value: object, default: object) -> None:
    """ValueError if a setting is not of the type of its default."""
    kind = type(default)
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "a word"}
    is_right = type(value) is kind
    if kind is float:
        is_right = type(value) in (int, float) and abs(value) < 1e9
    if not is_right:
        raise ValueError(
            f"the scheduler's {key} is {value!r:.60}; expected {words[kind]}, as {default!r}"
        )


def check_built(config: dict, sampler: str, steps: int, lowest: float) -> None:
    """ValueError if a `scheduler_config.json` asks for what the sampler does not have.

    `lowest` is log(alpha / sigma) at the schedule's last timestep.
    """
    for key, built in BUILT[sampler].items():
        if steps == 1 and key not in IN_ONE_STEP:
            continue
        if key in ONLY_WITH:
            other, needed = ONLY_WITH[key]
            if config.get(other) != needed:
                continue
        value = config.get(key)
        if value is not None and value not in built:
            raise ValueError(
                f"the scheduler's {key} is {value!r:.60}, which the {sampler} sampler does"
                f" not support; expected {built[0]!r}, or another sampler"
            )

    clipped = config.get("lambda_min_clipped")
    is_high = isinstance(clipped, int | float) and clipped > lowest
    if sampler == "dpm" and steps > 1 and is_high:
        raise ValueError(
            f"the scheduler's lambda_min_clipped is {clipped}, which leaves out timesteps and is"
            f" not supported; expected {lowest:.2f} at most, or another sampler than dpm"
        )

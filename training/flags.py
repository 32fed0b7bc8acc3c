"""Flags: a settings dataclass is the command line, its comments are the help texts."""

import argparse
import contextlib
import difflib
import inspect
import json
import math
import pathlib
import re
import types
import typing
from dataclasses import asdict, fields

from training.exits import first_line, say_once
from training.folders import MODELS

# Settings that a resumed run may change, since they do not change what is learned. The global
# batch must stay what it was, and so must the data set's files; only pictures may be replaced.
# (The number of steps or epochs also moves the end of a linear or cosine learning rate.)
MAY_CHANGE = {
    "max_train_steps",
    "max_train_epochs",
    "train_batch_size",
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    "dataset_folder",
    "dataloader_num_workers",
    "device",
    "checkpointing_steps",
    "validation_steps",
    "validation_num_images",
    "validation_prompts",
    "preview_vae",
    "viz_freq",
    "report_to",
    "tracker_project_name",
}
# The smallest value of integer flags. All others are at least 1.
AT_LEAST = {
    "seed": 0,
    "dataloader_num_workers": 0,
    "lr_warmup_steps": 0,
    "denoising_steps": 0,
    "prior_pictures": 0,
}
# Decays, of which 1 would never forget.
BELOW_ONE = {"ema_decay", "adam_beta1", "adam_beta2", "disc_adam_beta1"}
# Ranks above this are in no checkpoint that can be read.
MOST_RANK = 1000
# Flags of other trainers that have no meaning here, and why.
REFUSED = {
    "--enable_xformers_memory_efficient_attention":
        "attention is always fused here (scaled_dot_product_attention)",
    "--allow_tf32": "TF32 is always allowed for float32 matrix products on CUDA",
    "--checkpoints_total_limit": "one state.pt is kept and only ever replaced by a complete one",
    "--set_grads_to_none": "gradients are always set to None",
    "--revision": "to choose a version, name a local folder",
    "--variant": "the files that exist are used, full precision first",
    "--center_crop": "crops are chosen by --train_image_prep",
    "--random_flip": "pictures are flipped by --train_image_prep resized_crop_N_hflip",
    "--noise_offset": "YOSO's loss has no offset",
    "--local_rank": "torchrun passes it through the environment",
}
Scheduler = typing.Literal["constant", "constant_with_warmup", "linear", "cosine"]
Precision = typing.Literal["no", "bf16", "fp16"]


def parse(
    cls: type,
    tables: dict[str, dict],
    aliases: dict[str, str],
    description: str,
    argv: list[str] | None = None,
):
    """Fills a settings dataclass from the command line: one flag per field, its comment as help.

    `tables` maps the name of a base to its defaults, `aliases` other
    spellings of a flag to the field. A value comes from the flag, else from the table, else from
    the dataclass. With --resume FOLDER all values come from FOLDER/config.json, and only those
    in `MAY_CHANGE` may be overridden.
    """
    parser = build_parser(cls, aliases, description)
    given = given_values(parser, argv)
    if "resume" in given:
        return resumed_settings(cls, given, aliases, parser)

    base = str(given.get("base", getattr(cls, "base", "")))
    table = defaults_of(base, tables)
    defaults = {name: value for name, value in table.items() if name not in given}
    if defaults:
        listed = " ".join(f"--{name} {value}" for name, value in defaults.items())
        say_once(f"defaults of the base {base}: {listed}")
    return cls(**{**defaults, **given})


def build_parser(cls: type, aliases: dict[str, str], description: str) -> argparse.ArgumentParser:
    comments = field_comments(cls)
    parser = argparse.ArgumentParser(
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for field in fields(cls):
        names = [f"--{field.name}"]
        names += [f"--{alias}" for alias, name in aliases.items() if name == field.name]
        text = comments.get(field.name, "")
        if field.default is not None:
            text += f" [{field.default}]"
        text = text.strip().replace("%", "%%")
        parser.add_argument(*names, dest=field.name, default=None, help=text, **kind_of(field.type))
    return parser


def field_comments(cls: type) -> dict[str, str]:
    """The comment behind each field of a dataclass, which is its help text."""
    return dict(re.findall(r"^    (\w+):.*?  # (.*)$", inspect.getsource(cls), re.M))


def kind_of(annotation: type) -> dict:
    """How argparse reads a value of this type: T, T | None, or Literal."""
    if isinstance(annotation, types.UnionType):
        annotation = typing.get_args(annotation)[0]
    if annotation is bool:
        return dict(nargs="?", const=True, type=on_or_off, metavar="on|off")
    if typing.get_origin(annotation) is typing.Literal:
        return dict(type=str, choices=typing.get_args(annotation))
    return dict(type=annotation)


def on_or_off(text: str) -> bool:
    """The value of a switch. The flag without a value means "on"."""
    if text.lower() not in ("on", "off", "true", "false"):
        raise argparse.ArgumentTypeError(f"{text}: expected on or off")
    return text.lower() in ("on", "true")


def defaults_of(base: str, tables: dict[str, dict]) -> dict:
    """The table of a base: by its name, or as a folder by its own or by the base it is made of."""
    names = [base]
    folder = pathlib.Path(base)
    if folder.is_dir():
        names.append(folder.name)
        with contextlib.suppress(OSError, ValueError, AttributeError, TypeError):
            index = json.loads((folder / "model_index.json").read_text())
            names.append(pathlib.Path(index.get("rest", "")).name)
    for name in names:
        if name in tables:
            return tables[name]
    return {}


def given_values(parser: argparse.ArgumentParser, argv: list[str] | None) -> dict:
    """The flags that were given. ValueError for a negative number among the floats."""
    parsed = vars(parse_args(parser, argv))
    given = {name: value for name, value in parsed.items() if value is not None}
    for name, value in given.items():
        if type(value) is float and value < 0:
            raise ValueError(f"--{name} {value}: expected 0 or more")
    for name in BELOW_ONE & given.keys():
        if given[name] >= 1:
            raise ValueError(f"--{name} {given[name]}: expected a number from 0, below 1")
    if given.get("max_grad_norm") == 0:
        raise ValueError(
            "--max_grad_norm 0 would clip all gradients to 0; expected more, as 1e9 for no clipping"
        )
    return given


def check_losses(cfg) -> None:
    """ValueError if the weights of all losses are 0."""
    weights = {name: value for name, value in asdict(cfg).items() if name.startswith("lambda_")}
    if not any(weights.values()):
        names = ", ".join(f"--{name}" for name in weights)
        raise ValueError(f"{names} are 0; expected a loss to learn from")


def parse_args(
    parser: argparse.ArgumentParser, argv: list[str] | None = None
) -> argparse.Namespace:
    """parser.parse_args, but errors are ValueErrors of one line that suggest the nearest flag."""

    def refuse(message: str):
        raise ValueError(message)

    parsers = [parser]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            parsers += action.choices.values()
    for one in parsers:
        one.error = refuse

    given, unknown = parser.parse_known_args(argv)
    if unknown:
        known = [name for one in parsers for name in one._option_string_actions]
        refuse(why_unknown(unknown[0], known))
    for name, value in vars(given).items():
        check_number(name, value)
    return given


def why_unknown(argument: str, known: list[str]) -> str:
    name = argument.split("=")[0]
    if name in REFUSED:
        return f"{name} is not needed: {REFUSED[name]}; leave it out"
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}?" if near else "see --help"
    return f"unknown argument {argument}; {hint}"


def check_number(name: str, value: object) -> None:
    """ValueError for an int below its least value or a float that is not finite."""
    if type(value) is int:
        least = AT_LEAST.get(name, 1)
        if not least <= value < 2**63:
            raise ValueError(f"--{name} {value}: expected {least} or more, below 2^63")
        if name.startswith("lora_rank") and value > MOST_RANK:
            raise ValueError(f"--{name} {value}: expected {MOST_RANK} at most")
    if type(value) is float and not math.isfinite(value):
        raise ValueError(f"--{name} {value}: expected a finite number")


def resumed_settings(
    cls: type, given: dict, aliases: dict[str, str], parser: argparse.ArgumentParser
):
    """The settings that a run began with, and those of `MAY_CHANGE` that were given anew."""
    folder = given["resume"]
    saved = saved_settings(cls, pathlib.Path(folder), aliases, parser)
    changed = {name: value for name, value in given.items() if value != saved.get(name)}
    for name in ("resume", "plan"):
        changed.pop(name, None)
    if saved.get("lambda_mismatch") and "train_batch_size" in changed:
        raise ValueError(
            f"--train_batch_size {changed['train_batch_size']}: the run {folder} began with"
            f" {saved['train_batch_size']}, and --lambda_mismatch takes captions within such a"
            " batch: leave it out"
        )
    for name, value in changed.items():
        # A model may have moved. Its frozen weights are compared later.
        has_moved = False
        if name in MODELS and name in saved:
            has_moved = pathlib.Path(value).name == pathlib.Path(saved[name]).name
        if name not in MAY_CHANGE and not has_moved:
            raise ValueError(
                f"--{name} {value} differs from the {saved.get(name)} that the run {folder}"
                f" began with; only {', '.join(sorted(MAY_CHANGE))} may change on"
                " resuming: leave it out"
            )
    if changed:
        listed = [f"--{name} {value} (was {saved.get(name)})" for name, value in changed.items()]
        say_once(f"resuming with {', '.join(listed)}")
    return cls(**{**saved, **given, "output_dir": folder})


def saved_settings(
    cls: type, folder: pathlib.Path, aliases: dict[str, str], parser: argparse.ArgumentParser
) -> dict:
    """The settings in a run's config.json, but those that are None."""
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(
            f"--resume {folder} has no config.json; expected the --output_dir of an earlier run"
        )
    try:  # saved values are checked as flags are
        known = {field.name for field in fields(cls)} | set(aliases)
        values = json.loads(path.read_text()).items()
        flags = [f"--{k}={v}" for k, v in values if k in known and v is not None]
        saved = given_values(parser, flags)
        dropped = [f"{k:.40} {v!s:.40}" for k, v in values if k not in known and v]
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path} does not hold the settings of a run ({first_line(error)});"
            " copy it again, or start a new run"
        ) from None

    if dropped:  # of an older version; what is off changes nothing
        raise ValueError(
            f"{path} asks for {', '.join(dropped)}, which is no longer a setting; go on with the"
            " version that the run began with, or start a new run"
        )
    return saved

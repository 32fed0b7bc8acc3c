"""The command line: settings from flags, from a table of the base's defaults, or from an earlier run; an error is one
line."""

import argparse
import difflib
import inspect
import json
import os
import pathlib
import re
import sys
import types
import typing
from dataclasses import fields

MAY_CHANGE = {"max_train_steps", "checkpointing_steps", "viz_freq", "eval_freq", "dataloader_num_workers", "resume",
              "output_dir"}
AT_LEAST = {"seed": 0, "dataloader_num_workers": 0, "lr_warmup_steps": 0, "prior_pictures": 0}  # other whole numbers: 1
REFUSED = {
    "--enable_xformers_memory_efficient_attention": "attention is always fused here (scaled_dot_product_attention)",
    "--allow_tf32": "TF32 is always allowed for float32 matrix products on CUDA",
    "--checkpoints_total_limit": "one state.pt is kept, and replaced only by a whole one",
    "--set_grads_to_none": "gradients are always set to None",
    "--revision": "name a local folder to choose a version",
    "--variant": "the files that are there are taken, full precision first",
    "--local_rank": "torchrun says it through the environment",
}


def parse(cls: type, tables: dict[str, dict], aliases: dict[str, str], description: str,
          argv: list[str] | None = None):
    """A settings dataclass filled from the command line: one flag a field, its comment as help.

    Values come from, in this order: the flag, the table of the base (whose name begins with the table's), the
    dataclass. With --resume O they are those of O's config.json, and of the flags only `MAY_CHANGE` may differ."""
    comments = dict(re.findall(r"^    (\w+):.*?  # (.*)$", inspect.getsource(cls), re.M))
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in fields(cls):
        kind, choices = f.type, None
        if isinstance(kind, types.UnionType):  # T | None
            kind = typing.get_args(kind)[0]
        if typing.get_origin(kind) is typing.Literal:
            choices, kind = typing.get_args(kind), str
        names = [f"--{f.name}", *(f"--{old}" for old, new in aliases.items() if new == f.name)]
        text = f"{comments.get(f.name, '')} [{f.default}]".strip().replace("%", "%%")
        how = dict(nargs="?", const=True, type=on_or_off, metavar="on|off") if kind is bool else \
            dict(type=kind, choices=choices)
        parser.add_argument(*names, dest=f.name, default=None, help=text, **how)
    given = given_values(parser, argv)
    if "resume" in given:
        return resumed(cls, given, parser)
    base = given.get("base") or next(f.default for f in fields(cls) if f.name == "base")
    table = next((table for name, table in tables.items() if str(base).startswith(name)), {})
    small = {k: v for k, v in table.items() if k not in given}
    if small and int(os.environ.get("RANK", 0)) == 0:
        print(f"defaults of the base {base}: " + " ".join(f"--{k} {v}" for k, v in small.items()), file=sys.stderr)
    return cls(**{**small, **given})


def given_values(parser: argparse.ArgumentParser, argv: list[str] | None) -> dict:
    given = {k: v for k, v in vars(parse_args(parser, argv)).items() if v is not None}
    for name, value in given.items():
        if isinstance(value, int) and not isinstance(value, bool) and value < AT_LEAST.get(name, 1):
            raise ValueError(f"--{name} {value}: expected {AT_LEAST.get(name, 1)} or more")
    return given


def on_or_off(text: str) -> bool:
    """The value of a switch; the flag alone is "on"."""
    if text.lower() not in ("on", "off", "true", "false"):
        raise argparse.ArgumentTypeError(f"{text}: expected on or off")
    return text.lower() in ("on", "true")


def parse_args(parser: argparse.ArgumentParser, argv: list[str] | None = None) -> argparse.Namespace:
    """parser.parse_args, whose errors are ValueErrors of one line: the nearest flag where one is unknown, the reason
    where one has no meaning here."""

    def refuse(message: str):
        raise ValueError(message)

    parser.error = refuse
    given, unknown = parser.parse_known_args(argv)
    known = [name for action in parser._actions for name in action.option_strings]
    for flag in unknown:
        name = flag.split("=")[0]
        if name in REFUSED:
            refuse(f"{name} is not needed: {REFUSED[name]}; leave it out")
        near = difflib.get_close_matches(name, known, n=1)
        refuse(f"unknown argument {flag}" + (f"; did you mean {near[0]}?" if near else "; see --help"))
    return given


def resumed(cls: type, given: dict, parser: argparse.ArgumentParser):
    path = pathlib.Path(given["resume"]) / "config.json"
    if not path.is_file():
        raise ValueError(f"--resume {given['resume']} has no config.json; expected the --output_dir of an earlier run")
    try:  # what was saved is checked as flags are
        saved = {k: v for k, v in json.loads(path.read_text()).items() if k in {f.name for f in fields(cls)}}
        saved = given_values(parser, [f"--{k}={v}" for k, v in saved.items() if v is not None])
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} does not hold the settings of a run ({first_line(error)}); copy it again, or start a"
                         " new run") from None
    for name in given.keys() - MAY_CHANGE:
        if given[name] != saved.get(name):
            raise ValueError(f"--{name} {given[name]} differs from the {saved.get(name)} that the run {given['resume']}"
                             f" began with; only {', '.join(sorted(MAY_CHANGE - {'resume', 'output_dir'}))} may change:"
                             " leave it out")
    return cls(**{**saved, **given, "output_dir": given["resume"]})


def first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:120]

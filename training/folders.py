"""Run folders: files that are written whole or not at all, and the state of a run."""

import contextlib
import hashlib
import json
import os
import pathlib
import time
import zipfile
from collections.abc import Callable
from dataclasses import asdict

import torch
import torch.distributed as dist

from dataset.pictures import SUFFIXES
from training.exits import first_line, say_once

# The folders of a data set in which trainers read pictures, besides the data set's own.
PARTS = ("train", "test", "train_A", "train_B", "test_A", "test_B")
# Settings that name a model, by its path or otherwise.
MODELS = ("base", "init", "teacher", "disc_base", "preview_vae")
# Data sets that come with this code. A folder of such a name is not meant.
BUILT_IN = ("digits",)
# Files that systems put beside pictures.
CLUTTER = ("thumbs.db", "desktop.ini")


def open_run(config, kind: str, rank: int) -> pathlib.Path:
    """The run's folder with its config.json.

    ValueError if it holds a run with saved weights, or files that no run wrote. What a run left
    that ended before its first save is removed.
    """
    if config.output_dir is None:
        name = [f"runs/{kind}-{time.strftime('%Y%m%d-%H%M%S')}"]
        if dist.is_initialized():
            dist.broadcast_object_list(name)
        config.output_dir = name[0]
    folder = pathlib.Path(config.output_dir)
    if rank != 0:
        return folder

    results = [folder / "state.pt", folder / "model.safetensors"]
    if not config.resume and any(path.exists() for path in results):
        raise ValueError(
            f"{folder} holds a run already; continue it with --resume {folder}, or choose another"
            " --output_dir"
        )
    leftovers = files_of_a_run(folder)
    if not config.resume and leftovers and not is_run(folder):
        raise ValueError(
            f"{folder} holds {leftovers[0].name}, which no run wrote and this one would replace;"
            " choose another --output_dir"
        )
    (folder / "samples").mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".*.tmp"):  # of a process that was killed while writing
        leftover.unlink()
    if not config.resume:
        for path in leftovers:  # of a run that ended before its first save
            path.unlink()
        write_settings(folder, config)
    return folder


def files_of_a_run(folder: pathlib.Path) -> list[pathlib.Path]:
    """The files in a folder that a run writes besides state.pt and its model.safetensors."""
    names = ("config.json", "log.jsonl", "best.safetensors")
    found = [folder / name for name in names if (folder / name).exists()]
    return found + sorted(folder.glob("samples/*.png"))


def is_run(folder: pathlib.Path) -> bool:
    """Whether a folder's config.json holds the settings of a run."""
    try:
        return "dataset_folder" in json.loads((folder / "config.json").read_text())
    except (OSError, ValueError, TypeError):
        return False


def write_settings(folder: pathlib.Path, config) -> None:
    """Writes config.json, in which paths hold from any working folder."""
    from files.hub import BASES  # imported here, because python -m dataset check needs no models

    settings = asdict(config)
    source = settings.get("dataset_folder")
    if source and source not in BUILT_IN and os.path.exists(source):
        settings["dataset_folder"] = os.path.abspath(source)
    for name in MODELS:
        model = settings.get(name)
        # A folder may have the name of a base that comes with this code, which is not meant then.
        if model and model not in BASES and os.path.exists(model):
            settings[name] = os.path.abspath(model)
    text = json.dumps(settings, indent=1)
    write_file(folder / "config.json", lambda path: path.write_text(text))


def data_fingerprint(source: str, with_pictures: bool = True) -> str:
    """The hash of the names and sizes of a data set's files, wherever they are.

    A name that is no path (drawn:scenes) stands for itself, and of a single file the size counts.
    Without `with_pictures`, sizes of pictures do not count, so that a broken one may be replaced.
    """
    path = pathlib.Path(source)
    facts = [source]
    if source not in BUILT_IN and path.is_file():
        facts = [f"{path.suffix} {path.stat().st_size}"]
    elif source not in BUILT_IN and path.is_dir():
        folders = [path, *[path / part for part in PARTS]]
        facts = []
        for folder in folders:
            for file in visible_files(folder):
                is_picture = file.suffix.lower() in SUFFIXES
                size = file.stat().st_size if with_pictures or not is_picture else ""
                facts.append(f"{file.relative_to(path).as_posix()} {size}")
    return hashlib.sha256(os.fsencode("\n".join(facts))).hexdigest()[:16]


def visible_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """The files of a folder that are no clutter. None if there is no folder."""
    if not folder.is_dir():
        return []
    files = []
    for path in sorted(folder.iterdir()):
        hidden = path.name.startswith(".") or path.name.lower() in CLUTTER
        if path.is_file() and not hidden:
            files.append(path)
    return files


def write_file(path: pathlib.Path, write: Callable[[pathlib.Path], object]) -> None:
    """Calls `write` with a temporary file beside `path`, then renames that file.

    Whatever happens, `path` is the old file or the new one, complete.
    """
    # A short name: the file's own may be as long as the system allows.
    digest = hashlib.sha256(os.fsencode(path.name)).hexdigest()[:12]
    temporary = path.with_name(f".{digest}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except Exception as error:
        raise OSError(
            f"{path} could not be written ({first_line(error)}); a file that was there is"
            " untouched: make room if the disk is full, and run the command again (a trainer's"
            " with --resume)"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def save_state(path: pathlib.Path, state: dict) -> None:
    """Writes values, tensors, and the state dictionaries of networks, optimizers and scalers."""
    saved = {}
    for name, part in state.items():
        saved[name] = part.state_dict() if hasattr(part, "state_dict") else part

    def write(temporary: pathlib.Path) -> None:
        # Given a path, torch.save writes its name into the file.
        with temporary.open("wb") as file:
            torch.save(saved, file)

    write_file(path, write)


@torch.no_grad()
def restore(
    folder: pathlib.Path,
    frozen_fingerprint: str,
    parts: dict,
    *names: str,
    batch: int | None = None,
    data: str | None = None,
    data_names: str | None = None,
) -> list:
    """Puts a saved state back into `parts` and returns the saved values of `names`.

    Parts are networks, optimizers, scalers, dictionaries of tensors, or None. Only tensors and
    plain values are read, never code. `frozen_fingerprint` is that of the weights that are not
    trained, `batch` the number of items in a step, over all processes, `data` the fingerprint of
    the data set, `data_names` that without the lengths of picture files. ValueError where they
    differ; if only these lengths do, stderr says so.
    """
    path = folder / "state.pt"
    state = read_state(path)
    check_same_run(folder, state, frozen_fingerprint, batch, data, data_names)
    try:
        if not isinstance(state["step"], int):
            raise TypeError(f"its step is {state['step']!r:.100}")
        for name, part in parts.items():
            if isinstance(part, dict):
                for key, tensor in part.items():
                    tensor.copy_(state[name][key])
            elif part is not None:
                keep_fused(part, state[name])
                part.load_state_dict(state[name])
        return [state[name] for name in names]
    except Exception as error:  # other tensors, other shapes, a missing entry
        raise ValueError(
            f"{path} is not of this run ({type(error).__name__}: {first_line(error)}); put its"
            " own state.pt back, or start a new run"
        ) from error


def check_same_run(
    folder: pathlib.Path,
    state: dict,
    frozen_fingerprint: str,
    batch: int | None,
    data: str | None,
    data_names: str | None,
) -> None:
    """ValueError if a run goes on with other frozen weights, batches or data; see restore."""
    if state["base"] != frozen_fingerprint:
        raise ValueError(
            f"the run in {folder} began on a base with other weights (fingerprint"
            f" {state['base']}, now {frozen_fingerprint}); restore the base's files, or start a"
            " new run"
        )
    before = state.get("batch", batch)
    if before != batch:
        raise ValueError(
            f"the run in {folder} has steps of {before} items and these would be of {batch}; choose"
            " --train_batch_size, --gradient_accumulation_steps and the number of processes so"
            f" that their product is {before}"
        )
    if state.get("data", data) != data:
        if state.get("data_names") != data_names:
            raise ValueError(
                f"the data set is not the one that the run in {folder} began with: files were"
                " added, removed or renamed, or captions changed; restore it, or start a new run"
                f" on it (of a translator with --init {folder})"
            )
        say_once(
            f"the files of some pictures have changed since the run in {folder} began (same names,"
            " other lengths); it goes on with the new ones"
        )


def keep_fused(part, saved: dict) -> None:
    """An optimizer's `fused` belongs to its device, and the saved state may be of another."""
    if isinstance(part, torch.optim.Optimizer):
        for group, saved_group in zip(part.param_groups, saved["param_groups"]):
            saved_group["fused"] = group.get("fused")


def read_state(path: pathlib.Path) -> dict:
    folder = path.parent
    if not path.is_file():
        raise ValueError(
            f"{folder} has no state.pt to resume from: the run ended before its first save;"
            " start again"
        )
    try:
        # torch.save never compresses. A compressed file may unpack to any size.
        if zipfile.is_zipfile(path):
            entries = zipfile.ZipFile(path).infolist()
            if any(entry.compress_type for entry in entries):
                raise ValueError("it is compressed, which torch.save never does")
        state = torch.load(path, map_location="cpu", weights_only=True)
        state["base"]  # noqa: B018  raises where the entry is missing
        return state
    except Exception as error:  # a damaged file fails in many ways: zip, pickle, storage
        raise ValueError(
            f"{path} is damaged ({first_line(error)}); the trained weights so far are in"
            f" {folder / 'model.safetensors'}: copy state.pt again, or start a new run"
        ) from None

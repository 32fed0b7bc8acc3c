"""Finding files: in a folder, in the cache of the Hugging Face Hub, on the Hub."""

from __future__ import annotations

import os
import re
import sys
import urllib.parse
import urllib.request
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).parent.parent
# Names for --base: folders of this project and ids of the Hugging Face Hub.
BASES = {
    **{name: str(ROOT / "tiny" / name) for name in ("tiny", "tiny-sd", "tiny-turbo", "pixels")},
    "sd-turbo": "stabilityai/sd-turbo",
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sd21": "stabilityai/stable-diffusion-2-1",
    "pixart512": "PixArt-alpha/PixArt-XL-2-512x512",
    "pixart1024": "PixArt-alpha/PixArt-XL-2-1024-MS",
    "yoso512": "Luo-Yihong/yoso_pixart512",
    "yoso1024": "Luo-Yihong/yoso_pixart1024",
}
LAYOUT = "a folder in the diffusers layout (model_index.json, scheduler/, tokenizer/, text_encoder/, unet/, vae/)"
HUB_ID = r"[\w-][\w.-]*/[\w-][\w.-]*"

def hub_cache() -> Path:
    env = os.environ
    home = env.get("HF_HOME") or Path(env.get("XDG_CACHE_HOME") or "~/.cache", "huggingface").expanduser()
    return Path(env.get("HF_HUB_CACHE") or env.get("HUGGINGFACE_HUB_CACHE") or Path(home, "hub"))


def offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def find(base: str, names: list[str], expected: str | None = None, fetch: bool = True) -> Path | None:
    """The first of `names` (relative paths) that a base has: a folder, a name of the table, or a Hub id, whose
    cache is filled (if `fetch`) where it has none of them. Without one: None, or an error that says `expected`."""
    base = BASES.get(base, base)
    folder = Path(base).expanduser()
    hub = not folder.is_dir()
    if hub:
        if folder.is_file() or not re.fullmatch(HUB_ID, base):
            raise ValueError(f"{base} is {'a file' if folder.is_file() else 'no folder here'}; expected {LAYOUT}, a Hub"
                             f" id (ORGANISATION/NAME) or one of {', '.join(BASES)}")
        repository = hub_cache() / f"models--{base.replace('/', '--')}"
        ref = repository / "refs" / "main"
        commit = ref.read_text().strip() if ref.is_file() else "main"
        folder = repository / "snapshots" / commit
    if here := next((folder / name for name in names if (folder / name).is_file()), None):
        return here
    for name in names if hub and fetch and not offline() else []:
        absent = repository / ".no_exist" / commit / name  # remembers what the Hub does not have
        if absent.is_file():
            continue
        landing = repository / "downloads" / f"{os.getpid()}--{name.replace('/', '--')}"  # each process its own
        endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
        if answered := download(f"{endpoint}/{base}/resolve/{commit}/{name}", landing):
            if not ref.is_file():
                ref.parent.mkdir(parents=True, exist_ok=True)
                ref.write_text(answered)
                folder = repository / "snapshots" / answered
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            return landing.replace(folder / name)
        if ref.is_file():
            absent.parent.mkdir(parents=True, exist_ok=True)
            absent.touch()
    if expected:
        note = f" in {folder}, and HF_HUB_OFFLINE forbids a download" if hub and offline() else ""
        raise ValueError(f"{base} has no {names[0]}{note}; expected {expected}")
    return None


def locate(name: str, names: list[str], expected: str) -> Path:
    """A file by its path, or the first of `names` in a folder or of a Hub id."""
    path = Path(name).expanduser()
    if path.is_dir() or not path.suffix and not path.parent.is_dir() and re.fullmatch(HUB_ID, name):
        return find(name, names, expected)
    if not path.is_file():
        raise ValueError(f"there is no {name}; expected {expected}: a file, a folder or a Hub id")
    return path


def download(url: str, path: Path) -> str | None:
    """Fetches `url` to `path`, under another name until it is complete. Returns the commit that a Hub answer names
    ("main" without one), or None where there is no such file."""
    token, host = os.environ.get("HF_TOKEN"), urllib.parse.urlsplit(url).netloc
    commits, partial = [], path.with_name(f"{path.name}.{os.getpid()}.incomplete")

    def request(target: str) -> urllib.request.Request:  # the token goes to the host that was named and to no other
        named = urllib.parse.urlsplit(target).netloc == host
        return urllib.request.Request(target, headers={"Authorization": f"Bearer {token}"} if token and named else {})

    class Redirects(urllib.request.HTTPRedirectHandler):  # the Hub names the commit in the answer that redirects
        def redirect_request(self, _, file, code, message, headers, target):
            commits.append(headers.get("X-Repo-Commit"))
            return request(target)

    try:
        with urllib.request.build_opener(Redirects).open(request(url), timeout=60) as answer:
            commits.append(answer.headers.get("X-Repo-Commit"))
            size = int(answer.headers.get("Content-Length") or 0)
            print(f"downloading {url}, {size / 1e6:.1f} MB", file=sys.stderr)
            path.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file, tqdm(total=size, unit="B", unit_scale=True, disable=size < 1e7) as bar:
                while block := answer.read(1 << 20):
                    bar.update(file.write(block))
        if size and partial.stat().st_size != size:
            raise OSError(f"it broke off after {partial.stat().st_size} of {size} bytes")
        partial.replace(path)
    except Exception as error:  # OSError and what http.client raises
        if getattr(error, "code", None) == 404:
            return None
        raise OSError(f"{url} could not be fetched ({str(error) or type(error).__name__}); run the command again, set"
                      " HF_TOKEN if it asks for a login, or copy the files to a folder and name that") from None
    finally:
        partial.unlink(missing_ok=True)
    return next(filter(None, commits), "main")


def find_url(url: str, folder: str, fetch: bool = True) -> Path | None:
    """The file of an address, downloaded once (if `fetch`) to a folder beside the Hub's cache; None without one."""
    path = hub_cache().parent / folder / url.rpartition("/")[2]
    if fetch and not path.is_file() and not offline():
        download(url, path)
    return path if path.is_file() else None

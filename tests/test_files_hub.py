"""files/hub.py finds files in folders and in the Hub's cache, and downloads what is missing.

The Hub is a small server on this machine that answers as the real one does.
"""

import hashlib
import os
import re
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

import huggingface_hub
import pytest
from pipelines import assert_same_networks, refusal, tiny_pipeline

import sample
from files import checkpoints, metrics
from files.bases import load_base
from files.hub import find_url
from files.tensors import save_tensors

pytestmark = pytest.mark.usefixtures("one_thread")

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ID = "someone/tiny-model"
VAE_FILE = "vae/diffusion_pytorch_model.safetensors"
UNET_FILE = "unet/diffusion_pytorch_model.safetensors"


class Request(NamedTuple):
    method: str
    path: str
    host: str
    token: str | None

    @property
    def name(self) -> str:
        """The path of the file within the model."""
        return re.sub(rf"^/({ID}/resolve/[^/]*|near|large)/", "", self.path)


class Hub:
    """A server on 127.0.0.1 with one model, /{ID}/resolve/{revision}/{name}.

    As on the Hub, answers name the commit, small files are behind a redirect on the same host
    (/near/, here for model_index.json) and large ones on another host (localhost, /large/).
    """

    def __init__(self):
        self.files: dict[str, bytes] = {}
        self.elsewhere: set[str] = set()  # names of files on the other host
        self.cut: set[str] = set()  # names of files whose downloads break off half way
        self.cut_once: set[str] = set()  # names of those that do so only the first time
        self.status = 404  # of answers for files that do not exist
        self.asked: list[Request] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self):
                hub.answer(self)

            def do_GET(self):
                hub.answer(self)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.server.server_address[1]
        serve = self.server.serve_forever
        threading.Thread(target=serve, args=(0.01,), daemon=True).start()

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        host = handler.headers["Host"].split(":")[0]
        token = handler.headers["Authorization"]
        request = Request(handler.command, handler.path, host, token)
        self.asked.append(request)

        name = request.name
        is_resolve = handler.path.startswith(f"/{ID}/resolve/")
        is_here = is_resolve or handler.path.startswith(("/near/", "/large/"))
        body = self.files.get(name) if is_here else None
        headers = {}
        if is_resolve or handler.path.startswith("/near/"):
            headers["X-Repo-Commit"] = COMMIT
        status = 200
        if body is None:
            status = self.status
            body = b"Entry not found"
            if is_resolve and status == 404:
                headers["X-Error-Code"] = "EntryNotFound" if self.files else "RepoNotFound"
        elif is_resolve and name in self.elsewhere:
            status = 302
            headers["Location"] = f"http://localhost:{self.port}/large/{name}"
            headers["X-Linked-Size"] = str(len(body))
            headers["X-Linked-ETag"] = etag(body)
            body = b"Found"
        elif is_resolve and name == "model_index.json":
            status = 307
            headers["Location"] = f"/near/{name}"
            body = b"Temporary Redirect"
        else:
            headers["ETag"] = etag(body)

        handler.send_response(status)
        for key, value in headers.items():
            handler.send_header(key, value)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        if handler.command == "GET":
            if name in self.cut | self.cut_once:
                self.cut_once.discard(name)
                body = body[:len(body) // 2]
            handler.wfile.write(body)

    def downloads(self) -> list[str]:
        """The names of the files that were sent, or would have been had they existed."""
        return [request.name for request in self.asked if request.method == "GET"]

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


def etag(body: bytes) -> str:
    return f'"{hashlib.sha256(body).hexdigest()}"'


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


@pytest.fixture(scope="module")
def saved(pipe, tmp_path_factory) -> Path:
    """The pipeline as `diffusers` writes it."""
    folder = tmp_path_factory.mktemp("saved")
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture
def hub(saved, tmp_path, monkeypatch) -> Iterator[Hub]:
    """A Hub that has the saved pipeline, and an empty cache in tmp_path."""
    hub = Hub()
    for path in saved.rglob("*"):
        if path.is_file():
            hub.files[str(path.relative_to(saved))] = path.read_bytes()
    for name in ("HF_HUB_OFFLINE", "HF_TOKEN", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{hub.port}")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    # Between its attempts to go on with a download the library waits.
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    # An open session would keep the proxies of earlier requests.
    huggingface_hub.close_session()
    yield hub
    hub.close()


@pytest.fixture
def repository(tmp_path) -> Path:
    """The model's folder in the cache."""
    return tmp_path / "cache" / "models--someone--tiny-model"


# -------------------- models of the Hub

def test_a_model_is_downloaded_once_into_the_hubs_cache(pipe, saved, hub, repository, capsys):
    hub.elsewhere = {UNET_FILE}
    assert_same_networks(load_base(ID), pipe)

    downloads = hub.downloads()
    assert len(downloads) == len({*downloads})
    assert hub.asked[0].path == f"/{ID}/resolve/main/model_index.json"
    for request in hub.asked:
        # After the first file, all are asked for from the same commit.
        if "/resolve/" in request.path and request.name != "model_index.json":
            assert request.path.startswith(f"/{ID}/resolve/{COMMIT}/")

    assert (repository / "refs" / "main").read_text() == COMMIT
    snapshot = repository / "snapshots" / COMMIT
    paths = [path for path in snapshot.rglob("*") if path.is_file()]
    files = {str(path.relative_to(snapshot)) for path in paths}
    assert files == {*downloads}
    assert files == {request.name for request in hub.asked} & hub.files.keys()
    assert "tokenizer/tokenizer.json" in files
    for name in files:
        assert (snapshot / name).read_bytes() == (saved / name).read_bytes()

    size = len(hub.files[UNET_FILE]) / 1e6
    err = capsys.readouterr().err
    assert f"downloading {ID}/{UNET_FILE}, {size:.1f} MB\n" in err
    assert err.count(f"downloading {ID}/") == len(files)

    # The second time nothing is asked for, not even the files that the Hub does not have.
    hub.asked.clear()
    assert_same_networks(load_base(ID), pipe)
    assert hub.asked == []


def test_fp16_is_downloaded_if_the_model_has_nothing_else(pipe, hub):
    renamed = {}
    for name, body in hub.files.items():
        renamed[name.replace("model.safetensors", "model.fp16.safetensors")] = body
    hub.files = renamed
    assert_same_networks(load_base(ID), pipe)


def test_shards_are_downloaded(pipe, hub, tmp_path):
    pipe.unet.save_pretrained(tmp_path / "unet", max_shard_size="300KB")
    del hub.files[UNET_FILE]
    for path in (tmp_path / "unet").iterdir():
        hub.files[f"unet/{path.name}"] = path.read_bytes()
    assert_same_networks(load_base(ID), pipe)
    shards = {name for name in hub.files if "-of-" in name}
    assert len(shards) > 1
    assert sorted(name for name in hub.downloads() if "-of-" in name) == sorted(shards)


CACHE_VARIABLES = {
    "HF_HUB_CACHE": "",
    "HUGGINGFACE_HUB_CACHE": "",
    "HF_HOME": "hub",
    "XDG_CACHE_HOME": "huggingface/hub",
}


@pytest.mark.parametrize("variable", CACHE_VARIABLES)
def test_a_cache_that_others_filled_is_found_without_a_request(
    pipe, saved, hub, tmp_path, monkeypatch, variable,
):
    for name in CACHE_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, str(tmp_path))
    repository = tmp_path / CACHE_VARIABLES[variable] / "models--someone--tiny-model"
    snapshot = repository / "snapshots" / COMMIT

    # The library keeps contents in `blobs`, and links to them in the snapshot.
    paths = [path for path in saved.rglob("*") if path.is_file()]
    for i, path in enumerate(paths):
        blob = repository / "blobs" / str(i)
        link = snapshot / path.relative_to(saved)
        blob.parent.mkdir(parents=True, exist_ok=True)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    optional = snapshot / "tokenizer" / "special_tokens_map.json"
    optional.write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    assert_same_networks(load_base(ID), pipe)
    assert hub.asked == []

    # Offline, a file that is optional is not missed.
    optional.unlink()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert_same_networks(load_base(ID), pipe)
    assert hub.asked == []


def test_offline_the_error_says_that_downloads_are_forbidden(hub, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE forbids a download" in refusal(lambda: load_base(ID))
    monkeypatch.delenv("HF_HUB_OFFLINE")
    load_base(ID, ("vae",))

    hub.asked.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "true")
    load_base(ID, ("vae",))
    message = refusal(lambda: load_base(ID, ("unet",)))
    assert "unet/config.json" in message
    assert "HF_HUB_OFFLINE" in message
    assert hub.asked == []


def test_a_download_that_breaks_off_leaves_nothing_behind_and_can_be_repeated(
    pipe, hub, repository,
):
    hub.cut = {VAE_FILE}
    size = len(hub.files[VAE_FILE])
    message = refusal(lambda: load_base(ID), OSError)
    assert VAE_FILE in message
    assert f"{size // 2} bytes" in message
    assert str(size) in message
    blobs = [path.read_bytes() for path in (repository / "blobs").iterdir()]
    assert all(body in hub.files.values() for body in blobs)
    assert not [path for path in repository.rglob("*") if "diffusion_pytorch_model" in path.name]

    hub.cut = set()
    assert_same_networks(load_base(ID), pipe)


def test_a_download_that_breaks_off_once_is_taken_up_again(pipe, hub):
    hub.cut_once = {VAE_FILE}
    assert_same_networks(load_base(ID), pipe)
    assert hub.downloads().count(VAE_FILE) == 2


def test_a_model_that_the_hub_does_not_have_and_one_that_needs_a_login(hub):
    hub.files = {}
    message = refusal(lambda: load_base(ID), OSError)
    assert "404" in message
    assert "with another name if this one is wrong, or with HF_TOKEN set" in message
    hub.status = 401
    message = refusal(lambda: load_base(ID), OSError)
    assert "401" in message
    assert "HF_TOKEN" in message


def test_a_model_without_an_index_on_the_hub(hub):
    hub.files = {"README.md": b""}
    assert "has no model_index.json" in refusal(lambda: load_base(ID))


def test_no_network_is_one_line(hub):
    hub.close()
    message = refusal(lambda: load_base(ID), OSError)
    assert f"{ID}/resolve/main/model_index.json could not be fetched" in message


def test_the_token_is_sent_to_the_hub_but_not_to_the_host_of_large_files(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.elsewhere = {VAE_FILE}
    load_base(ID, ("vae",))
    tokens = {(request.host, request.token) for request in hub.asked}
    assert tokens == {("127.0.0.1", "Bearer hf_secret"), ("localhost", None)}
    assert "/near/model_index.json" in [request.path for request in hub.asked]


@pytest.mark.parametrize(
    "name, says",
    [
        ("no-such-thing", ["no folder here", "ORGANISATION/NAME", "tiny", "sd-turbo"]),
        ("a/b/c", ["no folder here"]),
        ("../nothing", ["no folder here"]),
        ("", ["has no model_index.json"]),
        ("file.txt", ["is a file"]),
    ],
)
def test_a_name_that_is_nothing_is_refused_without_a_request(
    hub, tmp_path, monkeypatch, name, says,
):
    (tmp_path / "file.txt").touch()
    monkeypatch.chdir(tmp_path)
    message = refusal(lambda: load_base(name))
    assert all(words in message for words in says), message
    assert hub.asked == []


# -------------------- checkpoints and metric networks

def test_a_checkpoint_may_be_a_hub_id_and_a_released_one_is_downloaded_by_name(
    hub, tmp_path, monkeypatch,
):
    hub.files["model.safetensors"] = b"ours"
    hub.files["edge.pkl"] = b"theirs"
    assert checkpoints.find_checkpoint(ID).read_bytes() == b"ours"
    monkeypatch.setattr(checkpoints, "RELEASED", f"http://127.0.0.1:{hub.port}/large")
    monkeypatch.setitem(checkpoints.CHECKPOINTS, "edge", ("edge.pkl", None, None))
    assert checkpoints.find_checkpoint("edge") == tmp_path / "img2img-turbo" / "edge.pkl"

    hub.asked.clear()
    assert checkpoints.find_checkpoint("edge").read_bytes() == b"theirs"
    assert checkpoints.find_checkpoint(ID).read_bytes() == b"ours"
    for name in ("someone/model.pkl", f"{tmp_path.name}/nothing", "nothing"):
        message = refusal(lambda name=name: checkpoints.find_checkpoint(name))
        assert f"there is no {name}" in message
        # The second name begins with a folder that exists here.
        monkeypatch.chdir(tmp_path.parent)
    assert hub.asked == []


def test_a_hub_id_may_have_a_dot(hub):
    message = refusal(lambda: checkpoints.find_checkpoint("someone/pixel-art-v1.5"))
    assert "someone/pixel-art-v1.5 has no model.safetensors" in message
    assert hub.asked


def test_a_folder_of_ones_own_comes_before_a_released_file_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert sample.released_facts("night_to_day")[0] == "b2a"
    assert checkpoints.checkpoint_kind("night_to_day") is None
    metadata = dict(format=checkpoints.FORMAT, kind="cyclegan_turbo")
    (tmp_path / "night_to_day").mkdir()
    save_tensors(tmp_path / "night_to_day" / "model.safetensors", {}, metadata)
    assert sample.released_facts("night_to_day") == (None, None)
    assert checkpoints.checkpoint_kind("night_to_day") == "cyclegan_turbo"


def test_a_released_checkpoint_is_not_downloaded_offline(hub, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    message = refusal(lambda: checkpoints.find_checkpoint("edge_to_image"))
    assert "edge_to_image is not on this machine" in message
    assert "HF_HUB_OFFLINE" in message


def test_a_file_from_a_url_is_complete_or_not_there(hub, tmp_path, capsys):
    hub.files["vgg.pth"] = bytes(3_000_000)
    url = f"http://127.0.0.1:{hub.port}/large/vgg.pth"
    folder = tmp_path / "networks"
    assert find_url(url, "networks", fetch=False) is None
    assert hub.asked == []

    hub.cut = {"vgg.pth"}
    message = refusal(lambda: find_url(url, "networks"), OSError)
    assert "1500000 of 3000000 bytes" in message
    assert str(folder / "vgg.pth") in message
    assert not any(folder.iterdir())

    hub.cut = set()
    path = find_url(url, "networks")
    assert path == folder / "vgg.pth"
    assert path.read_bytes() == hub.files["vgg.pth"]
    assert f"downloading {url}, 3.0 MB\n" in capsys.readouterr().err

    message = refusal(lambda: find_url(url.replace("vgg", "none"), "networks"), OSError)
    assert "none.pth could not be fetched" in message
    assert "404" in message


def test_a_metric_network_of_the_hub_is_looked_for_in_its_cache(hub, tmp_path):
    assert not metrics.has_metric_network("dino")
    assert hub.asked == []
    hub.files = {}
    message = refusal(lambda: metrics.load_metric_network("dino"))
    assert "facebook/dino-vitb8" in message

    weights = tmp_path / "metric_networks" / "pt_inception-2015-12-05-6726825d.pth"
    weights.parent.mkdir()
    weights.write_bytes(b"no weights")
    assert "inception" in refusal(lambda: metrics.load_metric_network("inception"))

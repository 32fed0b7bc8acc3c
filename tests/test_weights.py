"""models/weights.py reads every layout of a base that is in use, from folders and from the Hub's cache; what is wrong
with a file is one line that names it; and `diffusers` reads what it writes."""

import json
import os
import pickle
import re
import shutil
import stat
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import normal, randomise, relative
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from files import bases, checkpoints, metrics
from files.bases import load_base, save_folder
from files.checkpoints import load_generator
from files.hub import ROOT
from files.tensors import cast_frozen, fingerprint, read_tensors
from files.tokenizers import load_tokenizer
from models.lpips import LPIPS
from models.pix2pix_turbo import Pix2PixTurbo, Pix2PixTurboConfig

pytestmark = pytest.mark.usefixtures("one_thread")

PARTS = ("vae", "unet", "text_encoder")
TOKENIZER = ROOT / "tiny" / "tiny" / "tokenizer"
UNET = dict(block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4, cross_attention_dim=32, sample_size=8,
            attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
VAE = dict(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, latent_channels=4, sample_size=16,
           down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2)
TEXT = dict(hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4)
SCHEDULE = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)


def tiny_pipeline(unet: dict = UNET, vae: dict = VAE, scheduler=None, seed: int = 0) -> StableDiffusionPipeline:
    """A whole Stable Diffusion pipeline of the peers, every weight drawn, with the tiny base's vocabulary."""
    torch.manual_seed(seed)
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
    ids = dict(eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id, pad_token_id=0)
    scheduler = scheduler or DDIMScheduler(**SCHEDULE, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    pipe = StableDiffusionPipeline(
        vae=randomise(AutoencoderKL(**vae), seed), unet=randomise(UNet2DConditionModel(**unet), seed + 1),
        text_encoder=randomise(CLIPTextModel(CLIPTextConfig(vocab_size=len(tokenizer), **TEXT, **ids)), seed + 2),
        tokenizer=tokenizer, scheduler=scheduler, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe() -> StableDiffusionPipeline:
    return tiny_pipeline()


@pytest.fixture(scope="module")
def saved(pipe, tmp_path_factory) -> Path:
    """The pipeline as the peers write it, never to be changed."""
    folder = tmp_path_factory.mktemp("saved")
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(saved, tmp_path / "base"))


def peer_tensors(pipe: StableDiffusionPipeline, part: str) -> dict[str, Tensor]:
    prefix = "text_model." if part == "text_encoder" else ""  # which transformers 5 leaves out
    return {prefix + name.removeprefix(prefix): t for name, t in getattr(pipe, part).state_dict().items()}


def assert_same_networks(base: bases.Base, pipe: StableDiffusionPipeline, dtype=torch.float32) -> None:
    for part in PARTS:
        ours, theirs = getattr(base, part).state_dict(), peer_tensors(pipe, part)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name].to(dtype)) and ours[name].dtype == dtype for name in ours)
        assert not any(p.requires_grad or p.is_meta for p in getattr(base, part).parameters())


def edit(path: Path, change) -> None:
    """Rewrites a safetensors file with its dictionary changed."""
    tensors = load_file(path)
    tensors = {name: t.clone() for name, t in (change(tensors) or tensors).items()}
    save_file(tensors, path, {"format": "pt"})


def weight_file(folder: Path, part: str) -> Path:
    return folder / part / ("model.safetensors" if part == "text_encoder" else "diffusion_pytorch_model.safetensors")


# ------------------------------------------------------------------------------------------------------------ layouts


@pytest.mark.parametrize("options", [{}, dict(variant="fp16"), dict(max_shard_size="20KB"),
                                     dict(variant="fp16", max_shard_size="20KB")], ids=str)
def test_whole_and_sharded_files_of_both_precisions_are_read(pipe, tmp_path, options):
    pipe.save_pretrained(tmp_path, **options)
    assert (len([*tmp_path.glob("unet/*.safetensors")]) > 1) == ("max_shard_size" in options)
    assert_same_networks(load_base(str(tmp_path)), pipe)


def test_files_keep_their_type_unless_one_is_asked_for(saved, tmp_path):
    half = StableDiffusionPipeline.from_pretrained(saved, torch_dtype=torch.float16, safety_checker=None)
    half.save_pretrained(tmp_path, variant="fp16")
    assert_same_networks(load_base(str(tmp_path)), half, torch.float16)
    assert_same_networks(load_base(str(tmp_path), dtype=torch.float64), half, torch.float64)


def test_full_precision_goes_before_fp16(pipe, folder):
    randomise(tiny_pipeline().unet, seed=9).save_pretrained(folder / "unet", variant="fp16")
    assert (folder / "unet" / "diffusion_pytorch_model.fp16.safetensors").is_file()
    assert_same_networks(load_base(str(folder)), pipe)


@pytest.mark.parametrize("shape", [(), (1, 1)], ids=["linear", "1x1 convolution"])
def test_older_names_of_the_vaes_attention_are_read(pipe, folder, shape):
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def as_before(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        renamed = {}
        for name, t in tensors.items():
            new = re.sub(r"(attentions\.0\.)(to_q|to_k|to_v|to_out\.0)", lambda m: m[1] + old[m[2]], name)
            renamed[new] = t.reshape(*t.shape, *shape) if new != name and t.ndim == 2 else t
        assert len(renamed.keys() - tensors.keys()) == 16
        return renamed

    edit(weight_file(folder, "vae"), as_before)
    assert_same_networks(load_base(str(folder)), pipe)


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_text_encoders_are_read_with_and_without_prefix_and_positions(pipe, folder, prefix):
    def as_before(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors = {prefix + name.removeprefix("text_model."): t for name, t in tensors.items()}
        return tensors | {f"{prefix}embeddings.position_ids": torch.arange(77)[None]}

    edit(weight_file(folder, "text_encoder"), as_before)
    assert_same_networks(load_base(str(folder)), pipe)
    assert_same_networks(load_base(str(folder), dtype=torch.float64), pipe, torch.float64)


def test_a_whole_clip_models_configuration_serves_its_text_encoder(pipe, folder):
    path = folder / "text_encoder" / "config.json"
    path.write_text(json.dumps(dict(model_type="clip", text_config=json.loads(path.read_text()), vision_config={})))
    assert_same_networks(load_base(str(folder)), pipe)


def test_only_the_parts_asked_for_are_read(folder):
    shutil.rmtree(folder / "unet")
    base = load_base(str(folder), ("vae", "schedule"))
    assert base.vae is not None and base.schedule is not None
    assert base.unet is base.text_encoder is base.tokenizer is None


def mapped_files(network: nn.Module) -> set[str]:
    """The files whose pages are the network's tensors; "" for memory of one's own."""
    areas = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, _, _, _, _, *path = line.split(maxsplit=5)
        start, end = (int(x, 16) for x in span.split("-"))
        areas.append((start, end, path[0] if path and path[0].startswith("/") else ""))
    return {path for t in network.state_dict().values() for start, end, path in areas if start <= t.data_ptr() < end}


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads Linux's list of mapped files")
@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_weights_that_need_no_change_stay_the_files_pages(folder, dtype):
    edit(weight_file(folder, "vae"), lambda tensors: {
        name.replace("to_out.0", "proj_attn"): t[..., None, None] if "to_out.0.weight" in name else t
        for name, t in tensors.items()})
    base = load_base(str(folder), PARTS, dtype)
    for part in PARTS:
        assert mapped_files(getattr(base, part)) == {str(weight_file(folder, part))}
    assert mapped_files(load_base(str(folder), ("vae",), torch.float64).vae) == {""}


def test_drawn_bases_are_drawn_from_the_seed_alone():
    torch.manual_seed(1)
    first = load_base("tiny", ("vae",), seed=5).vae.state_dict()
    torch.manual_seed(2)
    before = torch.random.get_rng_state()
    again, other = (load_base("tiny", ("vae",), seed=seed).vae.state_dict() for seed in (5, 6))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["encoder.conv_in.weight"], other["encoder.conv_in.weight"])


# --------------------------------------------------------------------------------------------------------- tokenizers

TEXTS = ["", "a red circle on blue", "a red circle! " * 30, "isn't it?", "Über!"]
END, NEW = "<|endoftext|>", {"added_tokens_decoder": {}}
AS_TOKEN = dict(content="!", lstrip=False, normalized=False, rstrip=False, single_word=False)


def tokenizer_folder(base: Path, config: dict | None, tokens: dict | None) -> Path:
    folder = base / "tokenizer"
    folder.mkdir()
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(TOKENIZER / name, folder)
    if config is not None:
        config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, **config}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if tokens is not None:
        (folder / "special_tokens_map.json").write_text(json.dumps(tokens))
    return folder


def assert_same_ids(ours, peer: CLIPTokenizer, pad: str) -> None:
    theirs = peer(TEXTS, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    assert torch.equal(ours(TEXTS), theirs)
    assert ours(TEXTS)[0, -1] == peer.get_vocab()[pad]


@pytest.mark.parametrize("config, tokens, pad", [
    ({}, {}, END), (dict(pad_token="!"), None, "!"), ({}, dict(pad_token="!"), "!"),
    ({}, dict(pad_token=AS_TOKEN), "!"),
    (dict(pad_token=END), dict(pad_token="!"), "!"),  # SD 2.1's files
    (dict(pad_token="!"), dict(pad_token=END), END),
    (dict(pad_token="!", **NEW), dict(pad_token=END), "!"),  # SD-Turbo's
    (dict(model_max_length=10**30), None, END),
], ids=str)
def test_padding_is_read_from_the_files_that_transformers_reads_it_from(tmp_path, config, tokens, pad):
    peer = CLIPTokenizer.from_pretrained(tokenizer_folder(tmp_path, config, tokens))
    assert_same_ids(load_tokenizer(str(tmp_path)), peer, pad)


def test_a_tokenizer_without_configuration_is_clips(tmp_path):
    tokenizer_folder(tmp_path, None, None)
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.length == 77 and tokenizer.tokens == dict(pad=END, start="<|startoftext|>", end=END)


@pytest.mark.parametrize("merges", [str, list])
def test_tokenizer_json_alone_serves_with_merges_in_both_of_its_notations(tmp_path, merges):
    peer = CLIPTokenizer.from_pretrained(tokenizer_folder(tmp_path, dict(pad_token="!"), None))
    shutil.rmtree(tmp_path / "tokenizer")
    peer.save_pretrained(tmp_path / "tokenizer")
    path = tmp_path / "tokenizer" / "tokenizer.json"
    assert not (tmp_path / "tokenizer" / "vocab.json").exists()
    whole = json.loads(path.read_text())
    whole["model"]["merges"] = [" ".join(pair) if merges is str else pair for pair in whole["model"]["merges"]]
    path.write_text(json.dumps(whole))
    assert_same_ids(load_tokenizer(str(tmp_path)), peer, "!")


# ------------------------------------------------------------------------------------------------------------ the Hub

COMMIT, ID = "0123456789abcdef0123456789abcdef01234567", "someone/tiny-model"


class Hub:
    """A server of files on 127.0.0.1 that answers as the Hub does: `/{id}/resolve/{revision}/{path}`, the commit in a
    header, large files elsewhere. `files`: path -> content; `asked`: (path, host, token) of every request."""

    def __init__(self):
        self.files, self.asked, self.elsewhere, self.cut, self.status = {}, [], set(), set(), 404
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                hub.asked.append((self.path, self.headers["Host"].split(":")[0], self.headers["Authorization"]))
                match = re.fullmatch(rf"(?:/{ID}/resolve/(main|{COMMIT})|/(?:large|near))/(.+)", self.path)
                body = hub.files.get(match[2]) if match else None
                headers = {"X-Repo-Commit": COMMIT} if match and match[1] else {}
                if body is None:
                    self.send_response(hub.status)
                    body = b"Entry not found"
                elif match[1] and match[2] in hub.elsewhere:
                    self.send_response(302)
                    headers["Location"] = f"http://localhost:{hub.port}/large/{match[2]}"
                    body = b"Found"
                elif match[1] and match[2] == "model_index.json":  # as today's Hub does for small files
                    self.send_response(307)
                    headers["Location"] = f"/near/{match[2]}"
                    body = b"Temporary Redirect"
                else:
                    self.send_response(200)
                for key, value in {**headers, "Content-Length": str(len(body))}.items():
                    self.send_header(key, value)
                self.end_headers()
                self.wfile.write(body[:len(body) // 2] if match and match[2] in hub.cut else body)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def paths(self) -> list[str]:
        return [path.partition("/resolve/")[2].partition("/")[2] for path, *_ in self.asked if "/resolve/" in path]

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def hub(saved, tmp_path, monkeypatch):
    hub = Hub()
    hub.files = {str(path.relative_to(saved)): path.read_bytes() for path in saved.rglob("*") if path.is_file()}
    for name in ("HF_HUB_OFFLINE", "HF_TOKEN", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{hub.port}")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    yield hub
    hub.close()


@pytest.fixture
def repository(tmp_path) -> Path:
    return tmp_path / "cache" / "models--someone--tiny-model"


def test_a_model_is_downloaded_once_into_the_hubs_cache(pipe, saved, hub, repository, capsys):
    hub.elsewhere = {"unet/diffusion_pytorch_model.safetensors"}
    assert_same_networks(load_base(ID), pipe)
    asked = hub.paths()
    assert len(asked) == len({*asked})
    assert hub.asked[0][0] == f"/{ID}/resolve/main/model_index.json"
    assert all(f"/resolve/{COMMIT}/" in path for path, *_ in hub.asked[2:] if "/resolve/" in path)
    assert (repository / "refs" / "main").read_text() == COMMIT
    snapshot = repository / "snapshots" / COMMIT
    files = {str(path.relative_to(snapshot)) for path in snapshot.rglob("*") if path.is_file()}
    assert files == hub.files.keys() & {*asked} and "tokenizer/tokenizer.json" in files
    assert all((snapshot / name).read_bytes() == (saved / name).read_bytes() for name in files)
    size = len(hub.files["unet/diffusion_pytorch_model.safetensors"]) / 1e6
    assert f"unet/diffusion_pytorch_model.safetensors, {size:.1f} MB\n" in capsys.readouterr().err
    hub.asked.clear()
    assert_same_networks(load_base(ID), pipe)
    assert hub.asked == []  # not even for what the Hub does not have


def test_only_fp16_is_fetched_where_there_is_only_that(pipe, hub):
    hub.files = {name.replace("model.safetensors", "model.fp16.safetensors"): body for name, body in hub.files.items()}
    assert_same_networks(load_base(ID), pipe)


def test_shards_are_fetched(pipe, hub, tmp_path):
    pipe.unet.save_pretrained(tmp_path / "unet", max_shard_size="300KB")
    del hub.files["unet/diffusion_pytorch_model.safetensors"]
    hub.files |= {f"unet/{path.name}": path.read_bytes() for path in (tmp_path / "unet").iterdir()}
    assert_same_networks(load_base(ID), pipe)
    assert sum("-of-" in path for path in hub.paths()) == sum("-of-" in path for path in hub.files) > 1


@pytest.mark.parametrize("variable", ["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"])
def test_a_cache_that_others_filled_is_found_and_nobody_asked(pipe, saved, hub, tmp_path, monkeypatch, variable):
    """The Hub's own library keeps contents under `blobs` and links to them."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, str(tmp_path))
    cache = tmp_path / {"HF_HOME": "hub", "XDG_CACHE_HOME": "huggingface/hub"}.get(variable, "")
    repository = cache / "models--someone--tiny-model"
    for i, path in enumerate(path for path in saved.rglob("*") if path.is_file()):
        blob, link = repository / "blobs" / str(i), repository / "snapshots" / COMMIT / path.relative_to(saved)
        for place in (blob, link):
            place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    (link := repository / "snapshots" / COMMIT / "tokenizer" / "special_tokens_map.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    assert_same_networks(load_base(ID), pipe)
    assert hub.asked == []
    link.unlink()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert_same_networks(load_base(ID), pipe)  # a file that need not be there is not missed
    assert hub.asked == []


def test_offline_says_that_it_may_not_ask(hub, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE forbids a download" in refusal(lambda: load_base(ID))
    monkeypatch.delenv("HF_HUB_OFFLINE")
    load_base(ID, ("vae",))
    hub.asked.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "true")
    load_base(ID, ("vae",))
    message = refusal(lambda: load_base(ID, ("unet",)))
    assert "unet/config.json" in message and "HF_HUB_OFFLINE" in message
    assert hub.asked == []


def test_a_download_that_breaks_off_leaves_nothing_behind_and_is_made_good(pipe, hub, repository):
    hub.cut = {"vae/diffusion_pytorch_model.safetensors"}
    size = len(hub.files["vae/diffusion_pytorch_model.safetensors"])
    message = refusal(lambda: load_base(ID), OSError)
    assert "vae/diffusion_pytorch_model.safetensors" in message and f"{size // 2} of {size} bytes" in message
    assert not [path for path in repository.rglob("*") if "diffusion_pytorch_model" in path.name]
    hub.cut = set()
    assert_same_networks(load_base(ID), pipe)


def test_a_model_that_the_hub_does_not_have_and_one_that_it_keeps_closed(hub):
    hub.files = {}
    assert "has no model_index.json" in refusal(lambda: load_base(ID))
    hub.status = 401
    message = refusal(lambda: load_base(ID), OSError)
    assert "401" in message and "HF_TOKEN" in message


def test_no_network_is_one_line(hub):
    hub.close()
    assert f"{ID}/resolve/main/model_index.json could not be fetched" in refusal(lambda: load_base(ID), OSError)


def test_the_token_goes_to_the_hub_and_not_to_where_it_sends_us(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.elsewhere = {"vae/diffusion_pytorch_model.safetensors"}
    load_base(ID, ("vae",))
    hosts = {host: {token for _, other, token in hub.asked if other == host} for _, host, _ in hub.asked}
    assert hosts == {"127.0.0.1": {"Bearer hf_secret"}, "localhost": {None}}
    assert "/near/model_index.json" in [path for path, *_ in hub.asked]


def test_a_checkpoint_may_be_a_hub_id_and_a_released_one_is_fetched_by_name(hub, tmp_path, monkeypatch):
    hub.files["model.safetensors"], hub.files["edge.pkl"] = b"ours", b"theirs"
    assert checkpoints.find_checkpoint(ID).read_bytes() == b"ours"
    monkeypatch.setattr(checkpoints, "RELEASED", f"http://127.0.0.1:{hub.port}/large")
    monkeypatch.setitem(checkpoints.CHECKPOINTS, "edge", ("edge.pkl", None, None))
    assert checkpoints.find_checkpoint("edge") == tmp_path / "img2img-turbo" / "edge.pkl"
    hub.asked.clear()
    assert checkpoints.find_checkpoint("edge").read_bytes() == b"theirs"
    assert checkpoints.find_checkpoint(ID).read_bytes() == b"ours"
    for name in ("someone/model.pkl", f"{tmp_path.name}/nothing", "nothing"):
        assert f"there is no {name}" in refusal(lambda name=name: checkpoints.find_checkpoint(name))
        monkeypatch.chdir(tmp_path.parent)
    assert hub.asked == []


# ------------------------------------------------------------------------------------------------------------- judges


def test_a_judge_is_read_from_its_files_and_known_by_their_hash(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    assert not metrics.has_metric_network("lpips")
    assert "vgg16-397923af.pth" in refusal(lambda: metrics.load_metric_network("lpips"))
    vgg = {name: torch.randn(t.shape) for name, t in LPIPS().state_dict().items() if name.startswith("features.")}
    lin = {name: torch.rand(t.shape) for name, t in LPIPS().state_dict().items() if name.startswith("lin")}
    (tmp_path / "judges").mkdir()
    torch.save(vgg, tmp_path / "judges" / "vgg16-397923af.pth")
    assert not metrics.has_metric_network("lpips")
    torch.save(lin, tmp_path / "judges" / "vgg.pth")
    assert metrics.has_metric_network("lpips")
    judge = metrics.load_metric_network("lpips")
    assert all(torch.equal(t, (vgg | lin)[name]) for name, t in judge.network.state_dict().items())
    assert not any(p.requires_grad for p in judge.network.parameters())
    lin["lin0.model.1.weight"] += 1
    torch.save(lin, tmp_path / "judges" / "vgg.pth")
    assert metrics.load_metric_network("lpips").hash != judge.hash
    del lin["lin0.model.1.weight"]
    torch.save(lin, tmp_path / "judges" / "vgg.pth")
    assert 'Missing key(s) in state_dict: "lin0.model.1.weight"' in refusal(lambda: metrics.load_metric_network("lpips"))


def test_a_judge_of_the_hub_is_looked_for_in_its_cache(hub, tmp_path):
    assert not metrics.has_metric_network("dino") and hub.asked == []
    for name in ("dino", "inception"):
        hub.files = {}
        place = "facebook/dino-vitb8" if name == "dino" else "inception"
        weights_file = tmp_path / "judges" / "pt_inception-2015-12-05-6726825d.pth"
        if name == "inception":
            weights_file.parent.mkdir()
            weights_file.write_bytes(b"no weights")
        assert place in refusal(lambda name=name: metrics.load_metric_network(name))


# ----------------------------------------------------------------------------------------------------------- refusals


def refusal(call, error: type = ValueError, expects: bool = True) -> str:
    """The one line that a call refuses with."""
    with pytest.raises(error) as raised:
        call()
    message = str(raised.value)
    assert "\n" not in message and len(message) < 700
    assert not expects or "expected" in message or "run the command again" in message
    return message


def cut(part: str, end: int):
    """The file of a part, cut at byte `end`."""
    return lambda folder: weight_file(folder, part).write_bytes(weight_file(folder, part).read_bytes()[:end])


def header(text: str | bytes, length: int | None = None, data: bytes = b""):
    """A U-Net file with this header."""
    text = text.encode() if isinstance(text, str) else text
    length = len(text) if length is None else length
    return lambda folder: weight_file(folder, "unet").write_bytes(length.to_bytes(8, "little") + text + data)


def entry(**changes) -> str:
    return json.dumps({"conv_in.weight": dict(dtype="F32", shape=[2], data_offsets=[0, 8]) | changes})


def changed(part: str, name: str, change):
    """One tensor of a part through `change`; None takes it away."""
    def damage(folder: Path) -> None:
        edit(weight_file(folder, part), lambda tensors: {
            k: change(t) if k == name else t for k, t in tensors.items() if k != name or change(t) is not None})
    return damage


def written(name: str, text: str | bytes | None):
    """A file with this content; None takes it away."""
    def damage(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        if text is not None:
            (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return damage


def config(part: str, **changes):
    def damage(folder: Path) -> None:
        path = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return damage


def sharded(change):
    """The U-Net in shards, then `change(folder / "unet")`."""
    def damage(folder: Path) -> None:
        weight_file(folder, "unet").unlink()
        UNet2DConditionModel(**UNET).save_pretrained(folder / "unet", max_shard_size="300KB")
        change(folder / "unet")
    return damage


def only_bin(folder: Path) -> None:
    weight_file(folder, "unet").rename(folder / "unet" / "diffusion_pytorch_model.bin")


def index(**changes):
    def change(unet: Path) -> None:
        path = unet / "diffusion_pytorch_model.safetensors.index.json"
        entries = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({k: v for k, v in entries.items() if v is not None}))
    return sharded(change)


def other_merges(folder: Path) -> None:
    (folder / "tokenizer" / "tokenizer.json").unlink()
    (folder / "tokenizer" / "vocab.json").write_text('{"a": 0, "<|startoftext|>": 1, "<|endoftext|>": 2}')
    (folder / "tokenizer" / "merges.txt").write_text("#version: 0.2\nx y\n")


UNET_FILE, VAE_FILE = "unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"
SDXL = dict(addition_embed_type="text_time", transformer_layers_per_block=[1, 2, 10], time_cond_proj_dim=None)
# What is done to a folder, and the pieces of the line that must say so.
REFUSED = {
    "tensor missing": (changed("unet", "conv_in.bias", lambda t: None), [UNET_FILE, "lacks conv_in.bias [16]"]),
    "tensor of another model": (lambda f: edit(weight_file(f, "vae"), lambda t: t | {"odd.weight": torch.ones(2)}),
                                [VAE_FILE, "odd.weight"]),
    "wrong shape": (changed("unet", "conv_in.bias", lambda t: t[:3]), [UNET_FILE, "conv_in.bias", "[3]", "[16]"]),
    "1x1 where a kernel belongs": (changed("vae", "encoder.conv_in.weight", lambda t: t[..., :1, :1]),
                                   [VAE_FILE, "[8, 3, 1, 1]", "[8, 3, 3, 3]"]),
    "integers": (changed("vae", "quant_conv.bias", lambda t: t.long()), [VAE_FILE, "quant_conv.bias", "int64"]),
    "8-bit floats": (changed("vae", "quant_conv.bias", lambda t: t.to(torch.float8_e4m3fn)), ["float8_e4m3fn"]),
    "no bytes": (cut("unet", 0), [UNET_FILE, "these are 0 bytes"]),
    "cut in the length": (cut("unet", 5), [UNET_FILE, "these are 5 bytes"]),
    "cut in the header": (cut("unet", 300), [UNET_FILE, "these are 300 bytes"]),
    "cut in the data": (cut("unet", 500_000), [UNET_FILE, "these are 500000 bytes"]),
    "cut by one byte": (cut("vae", -1), [VAE_FILE, "copy it again"]),
    "bytes too many": (lambda f: weight_file(f, "vae").open("ab").write(b"0"), [VAE_FILE, "copy it again"]),
    "a page of HTML": (written(UNET_FILE, "<!DOCTYPE html><html>\n" * 20), [UNET_FILE, "copy it again"]),
    "header not JSON": (header("{" * 40), [UNET_FILE, "copy it again"]),
    "header a list": (header("[]"), [UNET_FILE, "copy it again"]),
    "header not text": (header(b"\xff\xfe\x00"), [UNET_FILE, "copy it again"]),
    "header deep": (header('{"a":' * 100_000), [UNET_FILE, "copy it again"]),
    "header said to be 2^63 bytes": (header("{}", 2**63), [UNET_FILE, "copy it again"]),
    "a tensor of 10^12": (header(entry(shape=[10**12], data_offsets=[0, 4 * 10**12])), [UNET_FILE, "copy it again"]),
    "a tensor of 2^100": (header(entry(shape=[2**50, 2**50]), data=bytes(8)), [UNET_FILE, "copy it again"]),
    "offsets beyond the end": (header(entry(), data=bytes(4)), [UNET_FILE, "copy it again"]),
    "offsets backwards": (header(entry(data_offsets=[8, 0]), data=bytes(8)), [UNET_FILE, "copy it again"]),
    "shape of floats": (header(entry(shape=[2.0]), data=bytes(8)), [UNET_FILE, "copy it again"]),
    "entry without shape": (header('{"conv_in.bias": {"dtype": "F32"}}'), [UNET_FILE, "copy it again"]),
    "no tensors": (header("{}"), [UNET_FILE, "lacks"]),
    "no weights": (written(UNET_FILE, None), [UNET_FILE, "safetensors"]),
    "only .bin": (only_bin, [UNET_FILE, ".bin", "save_pretrained"]),
    "a shard missing": (sharded(lambda unet: sorted(unet.glob("*-of-*"))[1].unlink()), ["-00002-of-", "index.json"]),
    "a shard of another model": (sharded(lambda unet: shutil.copy(
        unet.parent / VAE_FILE, sorted(unet.glob("*-of-*"))[1])), ["/unet cannot be used", "holds "]),
    "an index of nothing": (index(weight_map={}), ["index.json", "weight_map"]),
    "an index without map": (index(weight_map=None), ["index.json", "weight_map"]),
    "an index of numbers": (index(weight_map={"conv_in.bias": 3}), ["index.json", "weight_map"]),
    "an index that leads out": (index(weight_map={"conv_in.bias": "../../x.safetensors"}), ["index.json", "../../x"]),
    "config missing": (written("unet/config.json", None), ["has no unet/config.json"]),
    "config broken": (written("unet/config.json", '{"block_out'), ["unet/config.json", "JSON"]),
    "config not text": (written("unet/config.json", b"\xff\xfe{}"), ["unet/config.json", "JSON"]),
    "config a list": (written("unet/config.json", "[1, 2]"), ["unet/config.json", "list"]),
    "config deep": (written("unet/config.json", "[" * 100_000), ["unet/config.json", "RecursionError"]),
    "config of SDXL": (config("unet", **SDXL), ["unet/config.json", "addition_embed_type", "text_time", "None"]),
    "config of other blocks": (config("unet", down_block_types=["AttnDownBlock2D"] * 2),
                               ["unet/config.json", "AttnDownBlock2D", "CrossAttnDownBlock2D"]),
    "config of other sizes": (config("unet", block_out_channels=[16, 48]), [UNET_FILE, "expected"]),
    "config with a word for a number": (config("vae", norm_num_groups="four"), ["vae/config.json", "'four'"]),
    "config with a number for a list": (config("vae", block_out_channels=8), ["vae/config.json"]),
    "config with groups that do not divide": (config("vae", norm_num_groups=7), ["vae/config.json", "7"]),
    "config with no groups": (config("vae", norm_num_groups=0), ["vae/config.json"]),
    "config with negative sizes": (config("unet", block_out_channels=[-16, -32]), ["unet/config.json"]),
    "another activation": (config("text_encoder", hidden_act="relu"), ["text_encoder/config.json", "relu"]),
    "text configuration of nothing": (config("text_encoder", text_config=None), ["text_encoder/config.json"]),
    "another schedule": (config("scheduler", beta_schedule="sigmoid"), ["scheduler_config.json", "sigmoid"]),
    "a schedule of words": (config("scheduler", beta_start="small"), ["scheduler_config.json"]),
    "no schedule": (written("scheduler/scheduler_config.json", None), ["has no scheduler/scheduler_config.json"]),
    "no tokenizer": (written("tokenizer/tokenizer.json", None), ["has no tokenizer/vocab.json", "tokenizer.json"]),
    "no merges": (written("tokenizer/vocab.json", "{}"), ["has no tokenizer/merges.txt"]),
    "merges of others": (other_merges, ["tokenizer/merges.txt", "one model"]),
    "a tokenizer of another kind": (written("tokenizer/tokenizer.json", '{"model": {"type": "Unigram", "vocab": []}}'),
                                    ["tokenizer/tokenizer.json", "BPE"]),
    "a padding that is no piece": (written("tokenizer/tokenizer_config.json", '{"pad_token": "<pad>"}'),
                                   ["tokenizer/tokenizer.json", "'<pad>'"]),
    "a length in words": (written("tokenizer/tokenizer_config.json", '{"model_max_length": "long"}'),
                          ["tokenizer/tokenizer.json"]),
    "no model_index.json": (written("model_index.json", None), ["has no model_index.json"]),
    "model_index.json a word": (written("model_index.json", '"tiny"'), ["model_index.json", "str"]),
}


@pytest.mark.parametrize("damage, says", REFUSED.values(), ids=REFUSED.keys())
def test_a_damaged_folder_is_refused_in_one_line_that_names_the_file(folder, damage, says):
    damage(folder)
    message = refusal(lambda: load_base(str(folder)))
    assert str(folder) in message
    assert all(piece in message for piece in says), message


def test_a_header_may_not_claim_memory(folder):
    """Claims beyond the file's size are seen before anything is made for them."""
    header(entry(shape=[10**12], data_offsets=[0, 4 * 10**12]))(folder)
    with pytest.raises(ValueError):
        read_tensors(weight_file(folder, "unet"))


@pytest.mark.parametrize("name, says", [
    ("no-such-thing", ["no folder here", "ORGANISATION/NAME", "tiny", "sd-turbo"]), ("a/b/c", ["no folder here"]),
    ("../nothing", ["no folder here"]), ("", ["has no model_index.json"]), ("file.txt", ["is a file"]),
])
def test_a_name_that_is_nothing_is_refused_without_asking_the_hub(hub, tmp_path, monkeypatch, name, says):
    (tmp_path / "file.txt").touch()
    monkeypatch.chdir(tmp_path)
    message = refusal(lambda: load_base(name))
    assert all(piece in message for piece in says), message
    assert hub.asked == []


def test_every_cut_of_a_small_file_is_refused(tmp_path):
    path = tmp_path / "small.safetensors"
    save_file({"a": torch.ones(3), "b": torch.ones(2, dtype=torch.float16)}, path)
    whole = path.read_bytes()
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        assert str(path) in refusal(lambda: read_tensors(path))


# -------------------------------------------------------------------------------------------------- writing a folder


@torch.no_grad()
@pytest.mark.parametrize("pad", ["<|endoftext|>", "!"])
def test_diffusers_reads_what_save_folder_wrote_and_computes_the_same(pipe, folder, tmp_path, pad):
    shutil.rmtree(folder / "tokenizer")
    tokenizer_folder(folder, dict(pad_token=pad), None)
    base = load_base(str(folder), dtype=torch.float64)
    save_folder(tmp_path / "written", base)
    peer = StableDiffusionPipeline.from_pretrained(tmp_path / "written", torch_dtype=torch.float64)
    assert type(peer.scheduler) is DDIMScheduler and peer.safety_checker is None
    assert_same_networks(base, peer, torch.float64)
    ids = peer.tokenizer(TEXTS, padding="max_length", truncation=True, return_tensors="pt").input_ids
    assert torch.equal(base.tokenizer(TEXTS), ids)
    context, z, x = base.text_encoder(ids), normal(5, 4, 8, 8), normal(1, 3, 16, 16)
    assert relative(context, peer.text_encoder(ids).last_hidden_state) < 1e-9
    assert relative(base.unet(z, 999, context), peer.unet(z, 999, context).sample) < 1e-9
    assert relative(base.vae.decode(z), peer.vae.decode(z).sample) < 1e-9
    assert relative(base.vae.encode(x)[0], peer.vae.encode(x).latent_dist.mean) < 1e-9
    assert torch.allclose(base.schedule.alpha**2, peer.scheduler.alphas_cumprod.double(), atol=1e-6)


def test_a_written_folder_is_read_back_the_same(pipe, saved, tmp_path):
    base = load_base(str(saved))
    save_folder(tmp_path / "one", base)
    again = load_base(str(tmp_path / "one"))
    assert_same_networks(again, pipe)
    assert torch.equal(again.tokenizer(TEXTS), base.tokenizer(TEXTS))
    assert again.schedule.config == base.schedule.config
    save_folder(tmp_path / "two", again)
    for path in (tmp_path / "one").rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes()
    save_folder(tmp_path / "half", base, torch.float16)
    assert_same_networks(load_base(str(tmp_path / "half")), pipe, torch.float16)


def test_a_drawn_base_is_written_with_its_weights(tmp_path):
    base = load_base("tiny", seed=3)
    save_folder(tmp_path, base)
    again = load_base(str(tmp_path))
    for part in PARTS:
        ours, theirs = getattr(base, part).state_dict(), getattr(again, part).state_dict()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_files_are_readable_by_whom_the_umask_allows(saved, tmp_path):
    before = os.umask(0o027)
    try:
        save_folder(tmp_path, load_base(str(saved), ("vae",)))
    finally:
        os.umask(before)
    assert stat.S_IMODE(weight_file(tmp_path, "vae").stat().st_mode) == 0o640


# --------------------------------------------------------------------------------------------------------- fingerprint


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_a_fingerprint_changes_with_one_value_of_what_counts(saved, dtype):
    def changed(name: str | None, but: tuple[str, ...] = ()) -> str:
        vae = load_base(str(saved), ("vae",), dtype).vae
        if name:
            vae.get_parameter(name).view(-1)[-1] += 1
        return fingerprint(vae, but)

    name = "decoder.conv_out.bias"
    assert changed(None) == changed(None)
    assert changed(name) != changed(None)
    assert changed(name, (name,)) == changed(None, (name,)) != changed(None)


def test_a_fingerprint_is_of_values_and_not_of_where_they_lie():
    layer = nn.Conv2d(4, 4, 3)
    before = fingerprint(layer)
    layer.weight.data = layer.weight.data.to(memory_format=torch.channels_last)
    layer.bias.data = torch.cat([torch.zeros(1), layer.bias.data])[1:]  # not at a multiple of 8 bytes
    assert fingerprint(layer) == before


def test_frozen_weights_alone_are_stored_in_half():
    network = nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.LayerNorm(4), nn.Linear(4, 4))
    network[:3].requires_grad_(False)
    cast_frozen(network, torch.bfloat16)
    assert [p.dtype for p in network.parameters()] == [torch.bfloat16] * 4 + [torch.float32] * 4


# --------------------------------------------------------------------------------------------------------- checkpoints


@pytest.fixture(scope="module", params=["lora", "all"])
def checkpoint(request, saved, tmp_path_factory) -> Path:
    """A sound checkpoint of ours; of one with LoRA the base is `saved`."""
    path = tmp_path_factory.mktemp(request.param) / "model.safetensors"
    base = load_base(str(saved))
    generator = Pix2PixTurbo(base.vae, base.unet, base.schedule, Pix2PixTurboConfig(train=request.param))
    checkpoints.save_generator(path, generator, "pix2pix_turbo", str(saved), ["a cat"], base.text_encoder, base.tokenizer)
    assert load_generator(str(path)).prompts == ["a cat"]
    return path


def remade(path: Path, target: Path, metadata=lambda m: m, tensors=lambda t: t) -> str:
    with safetensors.safe_open(path, "pt") as file:
        before = file.metadata()
    save_file({k: t.clone() for k, t in tensors(load_file(path)).items()}, target, metadata(dict(before)))
    return str(target)


def without(key: str):
    return lambda d: {k: v for k, v in d.items() if k != key}


def config_with(**changes):
    """The metadata with changes of the entries of its `config`; None takes one away."""
    def change(metadata: dict[str, str]) -> dict[str, str]:
        entries = {k: v for k, v in (json.loads(metadata["config"]) | changes).items() if v is not None}
        return metadata | {"config": json.dumps(entries)}
    return change


def generator_with(**changes):
    return lambda m: config_with(generator=json.loads(m["config"])["generator"] | changes)(m)


METADATA = {
    "none": lambda m: {}, "no format": without("format"), "a later format": lambda m: m | dict(format="one 2"),
    "another kind": lambda m: m | dict(kind="yoso"), "no config": without("config"),
    "config cut": lambda m: m | dict(config=m["config"][:50]), "config a list": lambda m: m | dict(config="[]"),
    "config null": lambda m: m | dict(config="null"), "config deep": lambda m: m | dict(config="[" * 100_000),
    "no generator": config_with(generator=None), "a generator of words": config_with(generator="small"),
    "an option of tomorrow": generator_with(wings=2),
    "a rank in words": generator_with(lora_rank_unet="eight", train="lora"),
    "a rank of 0": generator_with(lora_rank_vae=0, train="lora"),
    "a rank of -1": generator_with(lora_rank_vae=-1, train="lora"),
    "targets of nothing": generator_with(unet_targets=["wings"], train="lora"), "no prompts": without("prompts"),
    "prompts cut": lambda m: m | dict(prompts='["a'), "prompts a number": lambda m: m | dict(prompts="3"),
    "no base": without("base"),
}
METADATA_OF_ALL = {
    "no unet": config_with(unet=None), "a unet of words": config_with(unet="large"),
    "a size in words": config_with(vae=dict(norm_num_groups="four")),
    "a size that nothing has": config_with(text_encoder=dict(wings=2)),
    "no schedule": config_with(schedule=None), "another schedule": config_with(schedule=dict(beta_schedule="mine")),
    "no tokenizer": config_with(tokenizer=None), "a tokenizer of words": config_with(tokenizer="words"),
    "a tokenizer of nothing": config_with(tokenizer='{"pieces": "{}"}'), "other sizes": config_with(vae={}),
}


@pytest.mark.parametrize("change", METADATA.values(), ids=METADATA.keys())
def test_a_checkpoint_with_broken_metadata_is_refused_in_one_line(checkpoint, tmp_path, change):
    target = tmp_path / "model.safetensors"
    message = refusal(lambda: load_generator(remade(checkpoint, target, change)))
    assert str(target) in message


@pytest.mark.parametrize("checkpoint", ["all"], indirect=True)
@pytest.mark.parametrize("change", METADATA_OF_ALL.values(), ids=METADATA_OF_ALL.keys())
def test_a_checkpoint_of_everything_needs_its_configurations(checkpoint, tmp_path, change):
    target = tmp_path / "model.safetensors"
    assert str(target) in refusal(lambda: load_generator(remade(checkpoint, target, change)))


SKIP = "vae.decoder.skip_conv_1.weight"


@pytest.mark.parametrize("change, says", [
    (without(SKIP), f"lacks {SKIP} [16, 8, 1, 1]"), (lambda t: {}, "lacks"),
    (lambda t: t | {"odd": torch.ones(2)}, "holds odd"),
    (lambda t: t | {SKIP: t[SKIP][:3]}, f"{SKIP} is float32 [3, 8, 1, 1]; expected floating point [16, 8, 1, 1]"),
    (lambda t: t | {SKIP: t[SKIP].long()}, f"{SKIP} is int64"),
])
def test_a_checkpoint_of_other_tensors_is_refused_by_name(checkpoint, tmp_path, change, says):
    target = tmp_path / "model.safetensors"
    message = refusal(lambda: load_generator(remade(checkpoint, target, tensors=change)))
    assert str(target) in message and says in message


@pytest.mark.parametrize("checkpoint", ["lora"], indirect=True)
def test_a_checkpoint_for_another_base_and_a_base_that_is_gone(checkpoint, saved, folder, tmp_path):
    tiny_pipeline(vae=dict(VAE, block_out_channels=(8, 12))).vae.save_pretrained(folder / "vae")
    message = refusal(lambda: load_generator(str(checkpoint), str(folder)))
    assert str(checkpoint) in message and "[16" in message and "[12" in message
    target = tmp_path / "model.safetensors"
    gone = remade(checkpoint, target, lambda m: m | dict(base="gone"))
    assert "gone is no folder here" in refusal(lambda: load_generator(gone))
    assert load_generator(gone, base=str(saved)).base == str(saved)


@pytest.mark.parametrize("checkpoint", ["all"], indirect=True)
def test_strength_of_a_checkpoint_of_everything_is_refused(checkpoint):
    assert "LoRA" in refusal(lambda: load_generator(str(checkpoint), strength=0.5), expects=False)


class Marker:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_code_in_a_pkl_is_refused_and_does_not_run(tmp_path):
    path, marker = tmp_path / "bad.pkl", tmp_path / "marker"
    saved = dict(rank_unet=8, state_dict_unet={"conv_in.weight": Marker(marker)})
    for write in (lambda: torch.save(saved, path), lambda: path.write_bytes(pickle.dumps(saved))):
        write()
        message = refusal(lambda: load_generator(str(path)))
        assert str(path) in message and "code" in message and "weights_only" not in message
        assert not marker.exists()
    pickle.loads(path.read_bytes())
    assert marker.exists()  # it would have


OFFICIAL = dict(rank_unet=8, rank_vae=4, unet_lora_target_modules=["to_k"], vae_lora_target_modules=["conv1"],
                state_dict_unet={}, state_dict_vae={})


@pytest.mark.parametrize("saved_as, says", [
    ([1, 2], "list"), ({}, "rank_unet"), (OFFICIAL | {"state_dict_unet": []}, "img2img-turbo"),
    (OFFICIAL | {"rank_unet": "eight"}, "'eight'"), (OFFICIAL | {"unet_lora_target_modules": 3}, "img2img-turbo"),
    (OFFICIAL | {"state_dict_unet": {"conv_in.weight": 3}}, "tensors"),
    (OFFICIAL | {"state_dict_unet": {3: torch.ones(2)}}, "img2img-turbo"), (OFFICIAL, "lacks"),
], ids=str)
def test_a_pkl_of_something_else_is_refused_in_one_line(saved, tmp_path, saved_as, says):
    path = tmp_path / "model.pkl"
    torch.save(saved_as, path)
    message = refusal(lambda: load_generator(str(path), base=str(saved)))
    assert str(path) in message and says in message


@pytest.mark.parametrize("content", [b"", b"just words\n" * 20, b"PK\x03\x04" + bytes(50), bytes(5000)], ids=len)
def test_files_that_are_no_checkpoint_are_refused_in_one_line(tmp_path, content):
    for path in (tmp_path / "model.pkl", tmp_path / "model.txt", tmp_path / "model.safetensors"):
        path.write_bytes(content)
        assert str(path) in refusal(lambda path=path: load_generator(str(path)))


def test_safetensors_of_others_are_refused_by_format(saved):
    message = refusal(lambda: load_generator(str(weight_file(saved, "unet"))))
    assert str(weight_file(saved, "unet")) in message and "its format is 'pt', its kind None" in message

"""What users' files and machines do to a run.

Files that are truncated, changed or made to harm; a full disk, a picture that turns unreadable, a
worker that is killed. `campaign_faults.py` is the long version.
"""

import contextlib
import io
import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import sentencepiece
import torch
from hypothesis import strategies as st
from pictures_helpers import cache_settings
from PIL import Image
from safetensors.torch import load_file

import evaluate
import train_cyclegan_turbo
import train_pix2pix_turbo
import train_yoso
import training
from dataset import cache, folders, loader
from dataset.pictures import open_picture
from files import bases, checkpoints, formats, metrics, tokenizers
from files.tensors import save_tensors
from models import clip, diffusion, lora, t5, unet, vae
from models.cyclegan_turbo import CycleGANTurbo, CycleGANTurboConfig
from models.pix2pix_turbo import Pix2PixTurbo, Pix2PixTurboConfig

PICTURES = ("png", "jpg", "webp", "bmp", "tif", "gif", "ppm")


# -------------------- undamaged files of every kind

def small_base() -> bases.Base:
    """Stable Diffusion's three networks with a few thousand weights."""
    torch.manual_seed(0)
    vae_config = vae.VAEConfig(
        block_out_channels=(4, 8),
        layers_per_block=1,
        norm_num_groups=2,
        sample_size=8,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    unet_config = unet.UNetConfig(
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=2,
        sample_size=4,
        attention_head_dim=2,
        cross_attention_dim=8,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
    )
    text_config = clip.TextConfig(979, 8, 16, 1, 2, 24, eos_token_id=978)
    return bases.Base(
        "small",
        vae=vae.VAE(vae_config),
        unet=unet.UNet(unet_config),
        text_encoder=clip.TextEncoder(text_config),
        tokenizer=tokenizers.load_tokenizer("tiny"),
        schedule=bases.load_base("tiny", ("schedule",)).schedule,
    )


def trained_tensors(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in network.named_parameters() if p.requires_grad}


def official_paired(generator: Pix2PixTurbo) -> dict:
    """The trained tensors as the official pix2pix-Turbo script saves them."""
    config = generator.config
    return dict(
        rank_unet=8,
        rank_vae=4,
        unet_lora_target_modules=[*config.unet_targets],
        vae_lora_target_modules=[*config.vae_targets],
        state_dict_unet=trained_tensors(generator.unet),
        state_dict_vae=trained_tensors(generator.vae),
    )


def official_unpaired(generator: CycleGANTurbo) -> dict:
    """The trained tensors as the official CycleGAN-Turbo script saves them."""
    encoder = {}
    decoder = {}
    others = {}
    for name, p in trained_tensors(generator.unet).items():
        if "lora" not in name:
            continue
        if "down_blocks" in name or "conv_in" in name:
            encoder[name] = p
        elif "up_blocks" in name:
            decoder[name] = p
        else:
            others[name] = p

    vae_encoders = {}
    vae_decoders = {}
    for part, prefix in (("vae_a2b", "vae"), ("vae_b2a", "vae_b2a")):
        for name, p in trained_tensors(getattr(generator, part)).items():
            official_name = f"{prefix}.{name}"
            if ".encoder." in official_name:
                vae_encoders[official_name] = p
            else:
                vae_decoders[official_name] = p
    return dict(
        rank_unet=128,
        rank_vae=4,
        sd_encoder=encoder,
        sd_decoder=decoder,
        sd_other=others,
        sd_vae_enc=vae_encoders,
        sd_vae_dec=vae_decoders,
    )


def picture(seed: int, size: int = 16) -> Image.Image:
    levels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)
    return Image.fromarray(levels)


def make_world(folder: Path) -> Path:
    """Writes an undamaged file of every kind that is read anywhere."""
    base = small_base()
    bases.save_folder(folder / "base", base)
    make_translators(folder)
    make_yoso(folder, base)
    make_run(folder / "run", base)
    make_data_sets(folder)
    make_pictures(folder)
    make_tokenizers(folder)
    return folder


def make_translators(folder: Path) -> None:
    """Checkpoints of pix2pix-Turbo and CycleGAN-Turbo, ours and official ones."""
    base_name = str(folder / "base")
    for train in ("lora", "all"):
        base = bases.load_base(base_name)
        config = Pix2PixTurboConfig(train=train)
        generator = Pix2PixTurbo(base.vae, base.unet, base.schedule, config)
        checkpoints.save_generator(
            folder / f"{train}.safetensors",
            generator,
            "pix2pix_turbo",
            base_name,
            ["a circle"],
            base.text_encoder,
            base.tokenizer,
        )
        if train == "lora":
            torch.save(official_paired(generator), folder / "paired.pkl")

    base = bases.load_base(base_name)
    generator = CycleGANTurbo(base.vae, base.unet, base.schedule, CycleGANTurboConfig())
    torch.save(official_unpaired(generator), folder / "unpaired.pkl")


def make_yoso(folder: Path, whole: bases.Base) -> None:
    """Checkpoints of YOSO, a LoRA file for diffusers and a prior."""
    base_name = str(folder / "base")
    base = bases.load_base(base_name)
    prior = (torch.zeros(4, 4, 4), torch.ones(4, 4, 4))
    lora.add_lora(base.unet, ["to_q", "to_v"], 2, 8.0)
    trained = {}
    for name, p in base.unet.named_parameters():
        if "lora" in name:
            trained[f"unet.{name}"] = p
    checkpoints.save_yoso(folder / "yoso.safetensors", base, base_name, trained, prior, 2)

    # A random base is saved whole.
    drawn = replace(whole, random=True)
    checkpoints.save_yoso(folder / "yoso_whole.safetensors", drawn, "small", {}, prior, None)

    settings = '{"unet.lora_alpha": 2, "unet.alpha_pattern": {"to_q": 4}}'
    save_tensors(
        folder / "style.safetensors",
        formats.write_lora(base.unet, "unet"),
        dict(lora_adapter_metadata=settings),
    )
    bases.save_prior(folder / "prior.safetensors", *prior)


def make_run(folder: Path, base: bases.Base) -> None:
    """The folder of a run: settings, state and log."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(vars(Settings())))
    state = dict(
        step=3,
        best=math.inf,
        base="abc",
        trained=dict(base.vae.named_parameters()),
        optimizer=torch.optim.AdamW(base.vae.parameters()),
        discriminator=None,
    )
    training.save_state(folder / "state.pt", state)
    lines = [f'{{"step": {i}, "l2": {1 / i}}}\n' for i in range(1, 9)]
    (folder / "log.jsonl").write_text("".join(lines))


def make_data_sets(folder: Path) -> None:
    """A data set in each layout: pairs (also as two domains), captioned, zip and cache."""
    pairs = folder / "pairs"
    captioned = folder / "captioned"
    counts = {
        pairs / "train_A": 10,
        pairs / "train_B": 10,
        pairs / "test_A": 2,
        pairs / "test_B": 2,
        captioned: 10,
    }
    for path, count in counts.items():
        path.mkdir(parents=True)
        for i in range(count):
            picture(i).save(path / f"{i}.png")

    captions = {f"{i}.png": f"number {i}" for i in range(10)}
    for split in ("train", "test"):
        (pairs / f"{split}_prompts.json").write_text(json.dumps(captions))
    for domain in "ab":
        (pairs / f"fixed_prompt_{domain}.txt").write_text(f"a picture of {domain}")
    rows = []
    for name, caption in captions.items():
        rows.append(json.dumps(dict(file_name=name, text=caption)) + "\n")
    (captioned / "metadata.jsonl").write_text("".join(rows))

    with zipfile.ZipFile(folder / "edm.zip", "w") as archive:
        labels = []
        for i in range(10):
            name = f"00000/{i}.png"
            archive.write(captioned / f"{i}.png", name)
            labels.append([name, i % 3])
        archive.writestr("dataset.json", json.dumps(dict(labels=labels)))

    settings = cache_settings(captioned, folder / "cache", base_name=str(folder / "base"))
    cache.write_cache(**settings)
    read_stats(folder)


def make_pictures(folder: Path) -> None:
    for suffix in PICTURES:
        picture(0).save(folder / f"picture.{suffix}")
    exif = Image.Exif()
    exif[274] = 6
    picture(0).save(folder / "exif.jpg", exif=exif)


def make_tokenizers(folder: Path) -> None:
    """T5's pieces, as SentencePiece writes them and as tokenizer.json."""
    words = ["a red circle", "Ｕ\u0308ber ½ ①", "漢字かな", "<a b='c'>"]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words * 9),
        model_writer=model,
        vocab_size=90,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        normalization_rule_name="nmt_nfkc",
        num_threads=1,
        minloglevel=3,
    )
    (folder / "spiece.model").write_bytes(model.getvalue())
    pieces = tokenizers.pieces_from_spiece(model.getvalue())
    (folder / "t5.json").write_text(pieces.to_str())


@dataclass
class Settings:
    """The settings of a trainer, as far as reading config.json needs them."""

    base: str = "tiny"
    learning_rate: float = 1e-4
    use_ema: bool = True
    max_train_steps: int = 10
    epochs: int | None = None
    output_dir: str | None = None
    resume: str | None = None


# -------------------- readers, which also use what they have read

@torch.inference_mode()
def sample(base: bases.Base, prior: tuple[torch.Tensor, ...] | None = None) -> None:
    x = torch.zeros(1, 4, 4, 4)
    if prior is not None:
        x = prior[0][None]
    (t,) = diffusion.timesteps(base.schedule, 1)
    context = base.encode(["a red circle"])
    v = base.unet(x, t, *context)
    x0 = diffusion.predict_x0(v, x, t, base.schedule, base.schedule.prediction_type)
    base.vae.decode(x0)


def read_base(world: Path) -> None:
    sample(bases.load_base(str(world / "base")))


@torch.inference_mode()
def translate(world: Path, checkpoint: str, base: str | None = None) -> None:
    base_path = None if base is None else str(world / base)
    loaded = checkpoints.load_generator(str(world / checkpoint), base_path)
    context = loaded.text_encoder(loaded.tokenizer("a red circle"))
    x = torch.zeros(1, 3, 8, 8)
    if loaded.kind == "cyclegan_turbo":
        loaded.generator(x, context, "a2b")
    else:
        loaded.generator(x, context)


def sample_yoso(world: Path, checkpoint: str) -> None:
    base, prior = checkpoints.load_yoso(str(world / checkpoint))
    if prior[0].shape == (4, 4, 4):
        sample(base, prior)
    else:
        sample(base)


def sample_with_lora(world: Path) -> None:
    base = bases.load_base(str(world / "base"))
    bases.load_lora(str(world / "style.safetensors"), base)
    sample(base)


def read_prior(world: Path) -> None:
    mean, _ = bases.load_prior(world / "prior.safetensors", (4, 4, 4))
    mean + 1


def resume(world: Path) -> None:
    flags = ["--resume", str(world / "run")]
    cfg = training.parse(Settings, {}, {}, "doc", flags)
    for name, kind in Settings.__annotations__.items():
        assert isinstance(getattr(cfg, name), kind), name


def restore(world: Path) -> None:
    network = small_base().vae
    parts = dict(
        trained=dict(network.named_parameters()),
        optimizer=torch.optim.AdamW(network.parameters()),
    )
    (step,) = training.restore(world / "run", "abc", parts, "step")
    assert isinstance(step, int)


def read_log(world: Path) -> None:
    log = training.open_log(world / "run", 6)
    training.plot_losses(log, world / "losses.png")


def read_items(items: torch.utils.data.Dataset) -> None:
    """A few batches, with their captions as a trainer uses them."""
    for batch in loader.batches(items, 2, 0, 0, 5):
        for caption in batch["caption"]:
            tokenizers.load_tokenizer("tiny")(caption)


def read_pairs(world: Path) -> None:
    read_items(folders.PairedFolder(world / "pairs", "train", "no_resize"))


def read_captioned(world: Path, source: str) -> None:
    read_items(folders.Captioned(world / source, "train", "no_resize"))


def read_cache(world: Path) -> None:
    read_items(folders.open_captioned(world / "cache", "train", "no_resize"))


def read_picture(world: Path, name: str) -> None:
    open_picture(world / name)


def read_stats(world: Path) -> None:
    """Features of two pictures, read from stats.npz if that file is there."""

    def features(x: torch.Tensor) -> torch.Tensor:
        return x[:, :, 0, 0]

    network = metrics.MetricNetwork(features, "first pixel")
    paths = [world / "captioned" / f"{i}.png" for i in range(2)]
    evaluate.folder_features(paths, network, 1, torch.device("cpu"), world / "stats.npz")


def tokenize_t5(pieces: t5.Pieces) -> None:
    text = "U\u0308\u0304 ½ ① 漢字 <extra_id_3> \x85"
    t5.T5Tokenizer(pieces)(["a red circle", text])


def read_spiece(world: Path) -> None:
    content = (world / "spiece.model").read_bytes()
    tokenize_t5(tokenizers.pieces_from_spiece(content))


def read_t5_json(world: Path) -> None:
    text = (world / "t5.json").read_text()
    tokenize_t5(tokenizers.pieces_from_json(text))


# name: (the file that is damaged, what reads it and uses the result)
READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "weights": ("base/vae/diffusion_pytorch_model.safetensors", read_base),
    "checkpoint": ("lora.safetensors", partial(translate, checkpoint="lora.safetensors")),
    "checkpoint of all": ("all.safetensors", partial(translate, checkpoint="all.safetensors")),
    "one-step checkpoint": (
        "yoso.safetensors",
        partial(sample_yoso, checkpoint="yoso.safetensors"),
    ),
    "whole one-step checkpoint": (
        "yoso_whole.safetensors",
        partial(sample_yoso, checkpoint="yoso_whole.safetensors"),
    ),
    "LoRA": ("style.safetensors", sample_with_lora),
    "prior": ("prior.safetensors", read_prior),
    "official paired": ("paired.pkl", partial(translate, checkpoint="paired.pkl", base="base")),
    "official unpaired": (
        "unpaired.pkl",
        partial(translate, checkpoint="unpaired.pkl", base="base"),
    ),
    "state": ("run/state.pt", restore),
    "settings": ("run/config.json", resume),
    "log": ("run/log.jsonl", read_log),
    "captions": ("pairs/train_prompts.json", read_pairs),
    "metadata": ("captioned/metadata.jsonl", partial(read_captioned, source="captioned")),
    "zip": ("edm.zip", partial(read_captioned, source="edm.zip")),
    "cache": ("cache/index.json", read_cache),
    "statistics": ("stats.npz", read_stats),
    "spiece": ("spiece.model", read_spiece),
    "T5's json": ("t5.json", read_t5_json),
}
BASE_FILES = (
    "model_index.json",
    "vae/config.json",
    "unet/config.json",
    "text_encoder/config.json",
    "tokenizer/vocab.json",
    "scheduler/scheduler_config.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/merges.txt",
)
for file_name in BASE_FILES:
    READERS[file_name] = (f"base/{file_name}", read_base)
for suffix in PICTURES:
    file_name = f"picture.{suffix}"
    READERS[suffix] = (file_name, partial(read_picture, name=file_name))
READERS["exif"] = ("exif.jpg", partial(read_picture, name="exif.jpg"))


# -------------------- damage

DEEP = "[" * 100_000
ODD_VALUES = [
    None, True, -1, 0, 1, 3, 77, 10**9, 10**12, -10**30, 0.5, 1e308, math.nan, -math.inf,
    "", "x", "a\nb", "\ud800", "\0", "..", "/dev/zero", "I32", "F16", "F8_E5M2", "F4", "(a+)+$",
    [], {}, [[]], [3, 3], {"x": 1}, "DEEP",
]


def damage_bytes(whole: bytes, draw: random.Random) -> bytes:
    """Truncates the bytes, flips a bit, or inserts, drops or replaces bytes, often near an end."""
    end = draw.choice([len(whole), min(len(whole), 200)])
    i = draw.randrange(end)
    size = draw.choice([1, 2, 8, 100])
    i = draw.choice([i, len(whole) - 1 - i])
    junk = bytes(draw.randrange(256) for _ in range(min(size, 8)))
    if size == 100:
        junk = junk * 12
    flipped = bytes([whole[i] ^ 1 << draw.randrange(8)])
    return draw.choice([
        whole[:i],
        whole[:i] + flipped + whole[i + 1:],
        whole[:i] + junk + whole[i:],
        whole[:i] + whole[i + size:],
        whole[:i] + junk + whole[i + size:],
        whole[:i] + whole[max(i - size, 0):],
    ])


def damage_tree(value: object, draw: random.Random) -> object:
    """The value with one node changed or left out. Text that is JSON is a tree too."""
    if isinstance(value, str) and value[:1] in ("{", "["):
        return dumps(damage_tree(json.loads(value), draw))
    is_leaf = not isinstance(value, dict | list) or not value
    if is_leaf or draw.randrange(12) == 0:
        return draw.choice(ODD_VALUES)

    value = value.copy()
    keys = list(value) if isinstance(value, dict) else range(len(value))
    key = draw.choice(keys)
    node = value.pop(key)
    if draw.randrange(6) == 0:
        return value
    if isinstance(value, dict):
        value[key] = damage_tree(node, draw)
    else:
        value.insert(key, damage_tree(node, draw))
    return value


def dumps(value: object) -> str:
    return json.dumps(value).replace('"DEEP"', DEEP)


def damage_json(content: bytes | str, draw: random.Random) -> bytes:
    return dumps(damage_tree(json.loads(content), draw)).encode()


def rezip(whole: bytes, change: Callable[[str, bytes], bytes]) -> bytes:
    """The archive with `change(name, content)` for each content, and valid checksums."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(whole)) as old, zipfile.ZipFile(file, "w") as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return file.getvalue()


def split_safetensors(whole: bytes) -> tuple[bytes, bytes]:
    """The header of a safetensors file, and the bytes of its tensors."""
    end = 8 + int.from_bytes(whole[:8], "little")
    return whole[8:end], whole[end:]


def join_safetensors(header: bytes, tensors: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + tensors


def damaged(name: str, whole: bytes, draw: random.Random) -> bytes:
    """The file with something wrong in its bytes or in what they say."""
    has_no_structure = name.endswith((".model", ".txt")) or name.startswith(("picture", "exif"))
    if draw.randrange(3) == 0 or has_no_structure:
        return damage_bytes(whole, draw)

    if name.endswith(".safetensors"):
        header, tensors = split_safetensors(whole)
        damage_header = damage_json if draw.randrange(4) else damage_bytes
        return join_safetensors(damage_header(header, draw), tensors)

    if name.endswith((".pkl", ".pt")) and draw.randrange(2):
        saved = torch.load(io.BytesIO(whole), weights_only=True)
        file = io.BytesIO()
        torch.save(damage_tree(saved, draw), file)
        return file.getvalue()

    if name.endswith((".pkl", ".pt", ".zip", ".npz")):
        victim = draw.choice(["data.pkl", "dataset.json", ".png", "data/0", "features.npy"])

        def change(name: str, content: bytes) -> bytes:
            if not name.endswith(victim):
                return content
            if victim == "dataset.json":
                return damage_json(content, draw)
            return damage_bytes(content, draw)

        return rezip(whole, change)

    if name.endswith(".jsonl"):
        lines = whole.splitlines()
        i = draw.randrange(len(lines))
        lines[i] = damage_json(lines[i], draw)
        return b"\n".join(lines)

    return damage_json(whole, draw)


def outcome(call: Callable[[], object]) -> str | None:
    """Runs a call as a script would; returns its error line, or None if it went through.

    Fails on an error that is not one line with exit status 2, on 20 seconds of work, and on
    more than 2 GB of memory.
    """

    def hangs(number, frame) -> None:
        pytest.fail("it hangs")

    signal.signal(signal.SIGPROF, hangs)
    limit = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    used = pages * resource.getpagesize()
    stderr = io.StringIO()
    signal.setitimer(signal.ITIMER_PROF, 20)
    resource.setrlimit(resource.RLIMIT_AS, (used + 2 * 2**30, limit[1]))
    try:
        with contextlib.redirect_stderr(stderr):
            training.run_script(call)
    except SystemExit as end:
        assert end.code == 2
        line = stderr.getvalue().splitlines()[-1]
        assert ": error: " in line, stderr.getvalue()
        assert len(line) < 1200, stderr.getvalue()
        for word in ("MemoryError", "not enough memory", "bad_alloc", "alloc"):
            assert word not in line, line
        return line
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, limit)
    return None


def error_of(call: Callable[[], object]) -> str:
    """The error line of a call that must fail."""
    line = outcome(call)
    assert line is not None, "it was accepted"
    return line


# -------------------- random damage

@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    torch.set_num_threads(1)
    return make_world(tmp_path_factory.mktemp("world"))


@contextlib.contextmanager
def replaced(path: Path, content: bytes):
    """The file has this content for a while."""
    whole = path.read_bytes()
    path.write_bytes(content)
    yield
    path.write_bytes(whole)


@contextlib.contextmanager
def file_size_limit(size: int):
    """No file grows beyond so many bytes, as on a full disk."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


few = hypothesis.settings(max_examples=8, derandomize=True, deadline=None, database=None)


@pytest.mark.parametrize("name", READERS)
@few
@hypothesis.given(draw=st.randoms(use_true_random=False))
def test_a_damaged_file_is_one_line_or_works(world, name, draw):
    place, call = READERS[name]
    whole = (world / place).read_bytes()
    with replaced(world / place, damaged(place, whole, draw)):
        outcome(lambda: call(world))


@pytest.mark.parametrize("name", READERS)
def test_an_undamaged_file_works(world, name):
    _, call = READERS[name]
    assert outcome(lambda: call(world)) is None


@hypothesis.settings(few, max_examples=150)
@hypothesis.given(text=st.text(st.characters(exclude_categories=()), max_size=200))
def test_any_text_is_a_prompt_unless_it_holds_a_lone_surrogate(world, text):
    pieces = tokenizers.pieces_from_spiece((world / "spiece.model").read_bytes())
    has_surrogate = any("\ud800" <= character <= "\udfff" for character in text)
    for tokenize in (tokenizers.load_tokenizer("tiny"), t5.T5Tokenizer(pieces)):
        line = outcome(partial(tokenize, [text]))
        if has_surrogate:
            assert "half a character" in line
        else:
            assert line is None


def test_a_prompt_of_a_hundred_thousand_letters_is_cut_like_any_other(world):
    prompts = ["x" * 10**5, "x " * 10**5]
    assert outcome(lambda: tokenizers.load_tokenizer("tiny")(prompts)) is None
    pieces = tokenizers.pieces_from_json((world / "t5.json").read_text())
    assert outcome(lambda: t5.T5Tokenizer(pieces)(prompts)) is None


def test_a_state_cut_anywhere_near_its_ends_is_refused(world):
    path = world / "run" / "state.pt"
    whole = path.read_bytes()
    size = len(whole)
    ends = [
        *range(0, 100, 9),
        *range(100, size, size // 40),
        *range(size - 99, size, 7),
    ]
    for end in ends:
        with replaced(path, whole[:end]):
            assert "is damaged" in error_of(lambda: restore(world))


# -------------------- files that are made to harm

Damage = Callable[[bytes], bytes]


def with_header(whole: bytes, change: Callable[[dict], None]) -> bytes:
    """A safetensors file whose header was changed in place."""
    header, tensors = split_safetensors(whole)
    header = json.loads(header)
    change(header)
    return join_safetensors(json.dumps(header).encode(), tensors)


def with_huge_tensor(whole: bytes) -> bytes:
    def change(header: dict) -> None:
        header["quant_conv.bias"]["shape"] = [10**12]
        header["quant_conv.bias"]["data_offsets"] = [0, 4 * 10**12]

    return with_header(whole, change)


def with_config(part: str, key: str, value: object) -> Damage:
    """A checkpoint whose metadata claims another config[part][key]."""

    def change(header: dict) -> None:
        metadata = header["__metadata__"]
        config = json.loads(metadata["config"])
        config[part][key] = value
        metadata["config"] = json.dumps(config)

    return partial(with_header, change=change)


def with_saved(change: Callable[[dict], object]) -> Damage:
    """A file of torch.save whose dictionary was changed in place."""

    def damage(whole: bytes) -> bytes:
        saved = torch.load(io.BytesIO(whole), weights_only=True)
        change(saved)
        file = io.BytesIO()
        torch.save(saved, file)
        return file.getvalue()

    return damage


def with_saved_values(**values) -> Damage:
    return with_saved(lambda saved: saved.update(values))


def with_huge_rank(saved: dict) -> None:
    """A rank of 10^8, and a tensor that claims as much in four bytes."""
    name = next(name for name in saved["state_dict_unet"] if "lora_A" in name)
    saved["rank_unet"] = 10**8
    saved["state_dict_unet"][name] = torch.zeros(1).expand(10**8, 8)


def compressed(whole: bytes) -> bytes:
    """The archive with compressed entries, which may unpack to any size."""
    file = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(whole)) as old,
        zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))
    return file.getvalue()


def with_entries(entries: dict) -> Damage:
    """A JSON object with other entries."""

    def damage(whole: bytes) -> bytes:
        return json.dumps(json.loads(whole) | entries).encode()

    return damage


def with_shard(**entries) -> Damage:
    """The index of a cache whose first shard has other entries."""

    def damage(whole: bytes) -> bytes:
        index = json.loads(whole)
        index["shards"]["train"][0] |= entries
        return json.dumps(index).encode()

    return damage


def instead(content: bytes) -> Damage:
    return lambda whole: content


def png_of(width: int, height: int) -> bytes:
    """The start of a PNG file, up to its size."""
    size = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    body = b"IHDR" + size + b"\x08\x02\0\0\0"
    length = (13).to_bytes(4, "big")
    return b"\x89PNG\r\n\x1a\n" + length + body + zlib.crc32(body).to_bytes(4, "big")


class Code:
    """Ends the process when it is unpickled."""

    def __reduce__(self):
        return os._exit, (3,)


DEEP_JSON = instead(b"[" * 100_000)
LONG_NUMBER = instead(b"9" * 10_000)
POSTSCRIPT = instead(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nquit\n")
HALF_CHARACTERS = with_entries({f"{i}.png": "\ud800" for i in range(10)})

# name: (reader, what is done to its file, words of the one line)
HARM = {
    "weights of 10^12": ("weights", with_huge_tensor, "copy it again"),
    "rank of 10^9": (
        "checkpoint",
        with_config("generator", "lora_rank_unet", 10**9),
        "lora_rank_unet",
    ),
    "rank of 10^9 in a .pkl": (
        "official paired",
        with_saved_values(rank_unet=10**9),
        "lora_rank",
    ),
    "rank of 10^8 and a tensor to it": (
        "official paired",
        with_saved(with_huge_rank),
        "img2img-turbo",
    ),
    "10^9 layers in a checkpoint": (
        "checkpoint of all",
        with_config("unet", "layers_per_block", 10**9),
        "layers_per_block",
    ),
    "10^9 layers in a configuration": (
        "text_encoder/config.json",
        with_entries(dict(num_hidden_layers=10**9)),
        "layers",
    ),
    "10^12 timesteps": (
        "scheduler/scheduler_config.json",
        with_entries(dict(num_train_timesteps=10**12)),
        "timesteps",
    ),
    "betas beyond 1": (
        "scheduler/scheduler_config.json",
        with_entries(dict(beta_end=7)),
        "betas",
    ),
    "prompts of length -1": (
        "tokenizer/tokenizer_config.json",
        with_entries(dict(model_max_length=-1)),
        "model_max_length",
    ),
    "prompts beyond positions": (
        "tokenizer/tokenizer_config.json",
        with_entries(dict(model_max_length=77)),
        "a length of 24",
    ),
    "a piece without an embedding": (
        "tokenizer/vocab.json",
        with_entries(dict(zzz=979)),
        "pieces",
    ),
    "heads that do not divide": (
        "text_encoder/config.json",
        with_entries(dict(num_attention_heads=3)),
        "heads",
    ),
    "groups of -1": (
        "unet/config.json",
        with_entries(dict(norm_num_groups=-1)),
        "norm_num_groups is -1",
    ),
    "a compressed .pkl": ("official paired", compressed, "img2img-turbo"),
    "a compressed state": ("state", compressed, "it is compressed"),
    "code in a .pkl": ("official unpaired", with_saved_values(sd_other=Code()), "code"),
    "code in a state": ("state", with_saved_values(best=Code()), "is damaged"),
    "a state of other tensors": ("state", with_saved_values(trained={}), "is not of this run"),
    "deep settings": ("settings", DEEP_JSON, "settings of a run"),
    "deep captions": ("captions", DEEP_JSON, "train_prompts.json"),
    "a number without end": ("captions", LONG_NUMBER, "train_prompts.json"),
    "deep metadata": ("metadata", DEEP_JSON, "metadata.jsonl line 1"),
    "half a character": ("captions", HALF_CHARACTERS, "half a character"),
    "a cache of /dev/zero": ("cache", with_shard(file="/dev/zero"), "the index of a cache"),
    "a cache of other captions": ("cache", with_shard(captions=["one"]), "the index of a cache"),
    "a picture of 10^10": ("png", instead(png_of(100_000, 100_000)), "picture"),
    "PostScript": ("png", POSTSCRIPT, "not a picture of a known format"),
}


@pytest.mark.parametrize("reader, damage, words", HARM.values(), ids=HARM)
def test_a_file_that_is_made_to_harm_is_refused(world, reader, damage, words):
    place, call = READERS[reader]
    whole = (world / place).read_bytes()
    with replaced(world / place, damage(whole)):
        line = error_of(lambda: call(world))
    assert words in line, line


def test_a_damaged_picture_in_a_zip_is_named(world):
    path = world / "edm.zip"
    whole = path.read_bytes()

    def truncate_one_picture(name: str, content: bytes) -> bytes:
        return content[:99] if "/3" in name else content

    with replaced(path, rezip(whole, truncate_one_picture)):
        line = error_of(lambda: read_captioned(world, "edm.zip"))
        assert "edm.zip/00000/3.png" in line

    # The checksum in the zip no longer fits this picture.
    with replaced(path, whole.replace(b"\x89PNG", b"\x88PNG", 1)):
        line = error_of(lambda: read_captioned(world, "edm.zip"))
        assert "00000/0.png in" in line
        assert "CRC-32" in line


def test_the_size_of_what_a_zip_unpacks_to_is_limited(world, monkeypatch):
    for limit, name in [(100, "dataset.json"), (400, "00000/")]:
        monkeypatch.setattr(folders, "MAX_UNZIPPED", limit)
        line = error_of(lambda: read_captioned(world, "edm.zip"))
        assert f"expected {limit} bytes at most" in line
        assert name in line


def test_workers_can_read_a_zip_that_the_trainer_has_opened(world):
    items = folders.Captioned(world / "edm.zip", "train", "no_resize")
    items[0]
    for batch in loader.batches(items, 4, 0, 0, 60, num_workers=2):
        assert batch["target"].shape == (4, 3, 16, 16)


def test_a_caption_may_hold_any_line_separator_but_a_line_feed(world):
    caption = "a\u2028b\x85c"
    rows = []
    for i in range(10):
        row = dict(file_name=f"{i}.png", text=caption)
        rows.append(json.dumps(row, ensure_ascii=False))
    with replaced(world / "captioned" / "metadata.jsonl", "\r\n".join(rows).encode()):
        items = folders.Captioned(world / "captioned", "train", "no_resize")
        assert items.captions[0] == caption


def test_weights_that_do_not_fit_on_the_disk_are_one_line(tmp_path):
    message = "f.safetensors could not be written .*make room"
    with file_size_limit(1000), pytest.raises(OSError, match=message):
        save_tensors(tmp_path / "f.safetensors", dict(a=torch.zeros(10_000)), {})


# -------------------- faults while a trainer runs

SMALL = [
    "--train_batch_size", "2",
    "--viz_freq", "1000",
    "--resolution", "24",
    "--device", "cpu",
    "--max_train_steps", "6",
    "--checkpointing_steps", "2",
]
TRAINERS = {
    train_pix2pix_turbo: [
        "--base", "tiny",
        "--dataset_folder", "{pairs}",
        "--num_samples_eval", "1",
    ],
    train_cyclegan_turbo: [
        "--base", "tiny",
        "--dataset_folder", "{pairs}",
        "--validation_num_images", "1",
        "--disc_width", "8",
    ],
    train_yoso: [
        "--base", "tiny",
        "--train_data_dir", "{pairs}",
        "--num_samples_eval", "1",
        "--prior_pictures", "2",
    ],
}


class Runs:
    """Runs a trainer in this process, undisturbed or with a fault after some step."""

    def __init__(self, trainer, monkeypatch, capsys):
        self.trainer = trainer
        self.monkeypatch = monkeypatch
        self.capsys = capsys
        self.append_log = training.append_log
        # A test has no terminal from which the run could be stopped.
        monkeypatch.setattr(training.run, "catch_stop", lambda: lambda: False)

    def run(self, *flags: str) -> None:
        """To the end, without an error."""
        self.monkeypatch.setattr(training.run, "append_log", self.append_log)
        self._main(flags)
        assert not self._error_lines()

    def run_until(self, step: int, fault: Callable[[], None], *flags: str) -> str:
        """The error line of a run in which the fault strikes at the end of a step."""

        def append_log(path: Path, done: int, values: dict) -> None:
            self.append_log(path, done, values)
            if done == step:
                fault()

        self.monkeypatch.setattr(training.run, "append_log", append_log)
        with pytest.raises(SystemExit) as end:
            self._main(flags)
        assert end.value.code == 2
        (line,) = self._error_lines()
        return line

    def _main(self, flags: tuple[str, ...]) -> None:
        argv = [f"{self.trainer.__name__}.py", *flags]
        self.monkeypatch.setattr(sys, "argv", argv)
        # Lifts afterwards the limit that a fault may have set.
        with file_size_limit(resource.RLIM_INFINITY):
            training.run_script(self.trainer.main)

    def _error_lines(self) -> list[str]:
        prefix = f"{self.trainer.__name__}.py: error: "
        return [line for line in self.capsys.readouterr().err.splitlines() if prefix in line]


def fill_disk(room: int) -> None:
    """No file can grow beyond `room` bytes any more."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))


@pytest.mark.parametrize("trainer", TRAINERS, ids=lambda trainer: trainer.__name__)
def test_a_full_disk_costs_the_steps_since_the_last_save_and_an_unreadable_picture_none(
    trainer, world, tmp_path, monkeypatch, capsys,
):
    """Each stops the run with one line that says what to do.

    Resumed after all of them, the run ends with the same bits as one that was left alone.
    """
    pairs = tmp_path / "pairs"
    cut = tmp_path / "cut"
    shutil.copytree(world / "pairs", pairs)
    runs = Runs(trainer, monkeypatch, capsys)

    def truncate_pictures() -> None:
        for path in pairs.glob("train_?/*.png"):
            path.write_bytes(path.read_bytes()[:100])

    def saved_step() -> int:
        return torch.load(cut / "state.pt", weights_only=True)["step"]

    flags = [flag.format(pairs=pairs) for flag in TRAINERS[trainer]] + SMALL
    runs.run(*flags, "--output_dir", str(tmp_path / "whole"))

    line = runs.run_until(3, partial(fill_disk, 10_000), *flags, "--output_dir", str(cut))
    for words in ("could not be written", "make room", "--resume"):
        assert words in line
    assert saved_step() == 2

    line = runs.run_until(3, partial(fill_disk, 1), "--resume", str(cut))
    assert f"make room, and go on with --resume {cut}" in line
    assert saved_step() == 2

    line = runs.run_until(3, truncate_pictures, "--resume", str(cut))
    assert "png is not a readable picture" in line
    assert "replace or remove it" in line
    assert saved_step() == 3

    shutil.copytree(world / "pairs", pairs, dirs_exist_ok=True)
    runs.run("--resume", str(cut))
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    resumed = load_file(cut / "model.safetensors")
    assert whole.keys() == resumed.keys()
    for name in whole:
        assert torch.equal(whole[name], resumed[name]), name
    assert not list(cut.glob(".*.tmp"))
    log = (cut / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in log] == [1, 2, 3, 4, 5, 6]


LOSES_A_WORKER = """
import multiprocessing, sys
import training
from dataset import folders, loader

def main():
    pairs = folders.PairedFolder(sys.argv[1], "train", "no_resize")
    for step, batch in enumerate(loader.batches(pairs, 2, 0, 0, 1000, num_workers=1)):
        if step == 2:
            multiprocessing.active_children()[0].kill()

training.run_script(main)
"""


def test_a_lost_worker_is_one_line_that_says_how_to_go_on(world):
    process = subprocess.run(
        [sys.executable, "-c", LOSES_A_WORKER, str(world / "pairs")],
        cwd=Path(folders.__file__).parent.parent,
        capture_output=True,
        text=True,
    )
    (line,) = process.stderr.splitlines()
    assert process.returncode == 2
    assert "error: a process that loads pictures was lost (DataLoader work" in line
    assert "go on with --resume" in line
    assert "fewer --dataloader_num_workers" in line

"""What users' files and machines do to a run: files cut, changed or made to harm, a full disk, a picture that turns
unreadable, a lost worker. The long version is `campaign_faults.py`."""

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
from dataclasses import dataclass
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import sentencepiece
import torch
from hypothesis import strategies as st
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

# ------------------------------------------------------------------------------------------ sound files of every kind


def small_base() -> bases.Base:
    """Stable Diffusion's three networks at a few thousand weights."""
    torch.manual_seed(0)
    blocks = {way: (f"CrossAttn{way.title()}Block2D",) * 2 for way in ("down", "up")}
    return bases.Base(
        "small", vae.VAE(vae.VAEConfig(block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2, sample_size=8,
                                       down_block_types=("DownEncoderBlock2D",) * 2,
                                       up_block_types=("UpDecoderBlock2D",) * 2)),
        unet.UNet(unet.UNetConfig(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=2, sample_size=4,
                                  attention_head_dim=2, cross_attention_dim=8, down_block_types=blocks["down"],
                                  up_block_types=blocks["up"])),
        text_encoder=clip.TextEncoder(clip.TextConfig(979, 8, 16, 1, 2, 24, eos_token_id=978)),
        tokenizer=tokenizers.load_tokenizer("tiny"), schedule=bases.load_base("tiny", ("schedule",)).schedule)


def official(generator: torch.nn.Module) -> dict:
    """The trained tensors of a generator as the official scripts save them."""
    def under(network: torch.nn.Module) -> dict:
        return {name: p.detach() for name, p in network.named_parameters() if p.requires_grad}

    if isinstance(generator, Pix2PixTurbo):
        c = generator.config
        return dict(rank_unet=8, rank_vae=4, unet_lora_target_modules=[*c.unet_targets],
                    vae_lora_target_modules=[*c.vae_targets], state_dict_unet=under(generator.unet),
                    state_dict_vae=under(generator.vae))
    groups = dict(encoder={}, decoder={}, others={})
    for name, p in under(generator.unet).items():
        if "lora" in name:
            group = "encoder" if "down_blocks" in name or "conv_in" in name else "decoder" if "up_blocks" in name else \
                "others"
            groups[group][name] = p
    sides = {f"{part}.{name}": p for part in ("vae_a2b", "vae_b2a")
             for name, p in under(getattr(generator, part)).items()}
    sides = {name.replace("vae_a2b.", "vae.", 1): p for name, p in sides.items()}
    return dict(rank_unet=128, rank_vae=4, sd_encoder=groups["encoder"], sd_decoder=groups["decoder"],
                sd_other=groups["others"], sd_vae_enc={k: p for k, p in sides.items() if ".encoder." in k},
                sd_vae_dec={k: p for k, p in sides.items() if ".encoder." not in k})


def picture(seed: int, size: int = 16) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8))


def make_world(folder: Path) -> Path:
    """A sound file of every kind that is read anywhere."""
    base = small_base()
    bases.save_folder(folder / "base", base)
    for name in ("lora", "all"):
        own = bases.load_base(str(folder / "base"))
        generator = Pix2PixTurbo(own.vae, own.unet, own.schedule, Pix2PixTurboConfig(train=name))
        checkpoints.save_generator(folder / f"{name}.safetensors", generator, "pix2pix_turbo", str(folder / "base"),
                               ["a circle"], own.text_encoder, own.tokenizer)
        if name == "lora":
            torch.save(official(generator), folder / "paired.pkl")
    own = bases.load_base(str(folder / "base"))
    torch.save(official(CycleGANTurbo(own.vae, own.unet, own.schedule, CycleGANTurboConfig())), folder / "unpaired.pkl")
    own, prior = bases.load_base(str(folder / "base")), (torch.zeros(4, 4, 4), torch.ones(4, 4, 4))
    lora.add_lora(own.unet, ["to_q", "to_v"], 2, 8.0)
    trained = {f"unet.{name}": p for name, p in own.unet.named_parameters() if "lora" in name}
    checkpoints.save_yoso(folder / "yoso.safetensors", own, str(folder / "base"), trained, prior, 2)
    checkpoints.save_yoso(folder / "yoso_whole.safetensors", bases.Base(**(vars(base) | dict(random=True))), "small",
                      {}, prior, None)
    save_tensors(folder / "style.safetensors", formats.write_lora(own.unet, "unet"),
                         dict(lora_adapter_metadata='{"unet.lora_alpha": 2, "unet.alpha_pattern": {"to_q": 4}}'))
    bases.save_prior(folder / "prior.safetensors", *prior)

    (folder / "run").mkdir()
    (folder / "run" / "config.json").write_text(json.dumps(vars(Settings())))
    training.save_state(folder / "run" / "state.pt", dict(
        step=3, best=math.inf, base="abc", trained=dict(base.vae.named_parameters()),
        optimizer=torch.optim.AdamW(base.vae.parameters()), discriminator=None))
    (folder / "run" / "log.jsonl").write_text("".join(f'{{"step": {i}, "l2": {1 / i}}}\n' for i in range(1, 9)))

    for name in ("pairs/train_A", "pairs/train_B", "pairs/test_A", "pairs/test_B", "captioned"):
        (folder / name).mkdir(parents=True)
        for i in range(2 if "test" in name else 10):
            picture(i).save(folder / name / f"{i}.png")
    for split in ("train", "test"):
        captions = {f"{i}.png": f"number {i}" for i in range(10)}
        (folder / "pairs" / f"{split}_prompts.json").write_text(json.dumps(captions))
    for domain in "ab":
        (folder / "pairs" / f"fixed_prompt_{domain}.txt").write_text(f"a picture of {domain}")
    rows = [json.dumps(dict(file_name=f"{i}.png", text=f"number {i}")) + "\n" for i in range(10)]
    (folder / "captioned" / "metadata.jsonl").write_text("".join(rows))
    with zipfile.ZipFile(folder / "edm.zip", "w") as archive:
        for i in range(10):
            archive.write(folder / "captioned" / f"{i}.png", f"00000/{i}.png")
        archive.writestr("dataset.json", json.dumps(dict(labels=[[f"00000/{i}.png", i % 3] for i in range(10)])))
    cache.write_cache(str(folder / "captioned"), str(folder / "base"), folder / "cache", "resized_crop_8", 8, "text", 0, 4,
               "cpu", "float32")
    for suffix in PICTURES:
        picture(0).save(folder / f"picture.{suffix}")
    read_stats(folder)
    exif = Image.Exif()
    exif[274] = 6
    picture(0).save(folder / "exif.jpg", exif=exif)
    spiece, words = io.BytesIO(), ["a red circle", "Ｕ\u0308ber ½ ①", "漢字かな", "<a b='c'>"]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words * 9), model_writer=spiece, vocab_size=90, hard_vocab_limit=False, pad_id=0,
        eos_id=1, unk_id=2, bos_id=-1, normalization_rule_name="nmt_nfkc", num_threads=1, minloglevel=3)
    (folder / "spiece.model").write_bytes(spiece.getvalue())
    (folder / "t5.json").write_text(tokenizers.pieces_from_spiece((folder / "spiece.model").read_bytes()).to_str())
    return folder


@dataclass
class Settings:
    base: str = "tiny"
    learning_rate: float = 1e-4
    use_ema: bool = True
    max_train_steps: int = 10
    epochs: int | None = None
    output_dir: str | None = None
    resume: str | None = None


# ---------------------------------------------------------------------------------- readers, and use of what they give


@torch.inference_mode()
def draw(base: bases.Base, prior: tuple[torch.Tensor, ...] | None = None) -> None:
    x = torch.zeros(1, 4, 4, 4) if prior is None else prior[0][None]
    t, = diffusion.timesteps(base.schedule, 1)
    v = base.unet(x, t, *base.encode(["a red circle"]))
    base.vae.decode(diffusion.predict_x0(v, x, t, base.schedule, base.schedule.prediction_type))


@torch.inference_mode()
def translate(checkpoint: Path, base: Path | None = None) -> None:
    loaded = checkpoints.load_generator(str(checkpoint), base and str(base))
    context = loaded.text_encoder(loaded.tokenizer("a red circle"))
    loaded.generator(torch.zeros(1, 3, 8, 8), context, *(["a2b"] if loaded.kind == "cyclegan_turbo" else []))


def draw_yoso(checkpoint: Path) -> None:
    base, prior = checkpoints.load_yoso(checkpoint)
    draw(base, prior if prior[0].shape == (4, 4, 4) else None)


def draw_with_lora(world: Path) -> None:
    base = bases.load_base(str(world / "base"))
    bases.load_lora(str(world / "style.safetensors"), base)
    draw(base)


def read_all(items: torch.utils.data.Dataset) -> None:
    for batch in loader.batches(items, 2, 0, 0, 5):
        for caption in batch["caption"]:
            tokenizers.load_tokenizer("tiny")(caption)


def resume(world: Path) -> None:
    cfg = training.parse(Settings, {}, {}, "doc", ["--resume", str(world / "run")])
    for name, kind in Settings.__annotations__.items():
        assert isinstance(getattr(cfg, name), kind), name


def restore(run: Path) -> None:
    network = small_base().vae
    step, = training.restore(run, "abc", dict(
        trained=dict(network.named_parameters()), optimizer=torch.optim.AdamW(network.parameters())), "step")
    assert isinstance(step, int)


def read_log(world: Path) -> None:
    training.plot_losses(training.open_log(world / "run", 6), world / "losses.png")


def tokenize_t5(pieces: t5.Pieces) -> None:
    t5.T5Tokenizer(pieces)(["a red circle", "U\u0308\u0304 ½ ① 漢字 <extra_id_3> \x85"])


def read_stats(world: Path) -> None:
    judge = metrics.MetricNetwork(lambda x: x[:, :, 0, 0], "judge")
    pictures = [world / "captioned" / f"{i}.png" for i in range(2)]
    evaluate.folder_features(pictures, judge, 1, torch.device("cpu"), world / "stats.npz")


# What is read: the file that is damaged, and what reads it and uses what came of it.
READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "weights": ("base/vae/diffusion_pytorch_model.safetensors", lambda w: draw(bases.load_base(str(w / "base")))),
    "checkpoint": ("lora.safetensors", lambda w: translate(w / "lora.safetensors")),
    "checkpoint of all": ("all.safetensors", lambda w: translate(w / "all.safetensors")),
    "one-step checkpoint": ("yoso.safetensors", lambda w: draw_yoso(w / "yoso.safetensors")),
    "whole one-step checkpoint": ("yoso_whole.safetensors", lambda w: draw_yoso(w / "yoso_whole.safetensors")),
    "LoRA": ("style.safetensors", draw_with_lora),
    "prior": ("prior.safetensors", lambda w: bases.load_prior(w / "prior.safetensors", (4, 4, 4))[0] + 1),
    "official paired": ("paired.pkl", lambda w: translate(w / "paired.pkl", w / "base")),
    "official unpaired": ("unpaired.pkl", lambda w: translate(w / "unpaired.pkl", w / "base")),
    "state": ("run/state.pt", lambda w: restore(w / "run")),
    "settings": ("run/config.json", resume),
    "log": ("run/log.jsonl", read_log),
    "captions": ("pairs/train_prompts.json", lambda w: read_all(folders.PairedFolder(w / "pairs", "train", "no_resize"))),
    "metadata": ("captioned/metadata.jsonl", lambda w: read_all(folders.Captioned(w / "captioned", "train", "no_resize"))),
    "zip": ("edm.zip", lambda w: read_all(folders.Captioned(w / "edm.zip", "train", "no_resize"))),
    "cache": ("cache/index.json", lambda w: read_all(folders.open_captioned(w / "cache", "train", "no_resize"))),
    "statistics": ("stats.npz", read_stats),
    "spiece": ("spiece.model", lambda w: tokenize_t5(tokenizers.pieces_from_spiece((w / "spiece.model").read_bytes()))),
    "T5's json": ("t5.json", lambda w: tokenize_t5(tokenizers.pieces_from_json((w / "t5.json").read_text()))),
}
BASE = ["model_index.json", "vae/config.json", "unet/config.json", "text_encoder/config.json", "tokenizer/vocab.json",
        "scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json", "tokenizer/merges.txt"]
READERS |= {name: (f"base/{name}", lambda w: draw(bases.load_base(str(w / "base")))) for name in BASE}
READERS |= {suffix: (f"picture.{suffix}", lambda w, suffix=suffix: open_picture(w / f"picture.{suffix}"))
            for suffix in PICTURES}
READERS |= {"exif": ("exif.jpg", lambda w: open_picture(w / "exif.jpg"))}


# ------------------------------------------------------------------------------------------------------------- damage

DEEP = "[" * 100_000
ODD = [None, True, -1, 0, 1, 3, 77, 10**9, 10**12, -10**30, 0.5, 1e308, math.nan, -math.inf, "", "x", "a\nb", "\ud800",
       "\0", "..", "/dev/zero", "I32", "F16", "F8_E5M2", "F4", "(a+)+$", [], {}, [[]], [3, 3], {"x": 1}, "DEEP"]


def bytes_damaged(whole: bytes, draw: random.Random) -> bytes:
    """Cut, or with bits turned, bytes put in, left out or put in the place of others; often near an end."""
    end = draw.choice([len(whole), min(len(whole), 200)])
    i, size = draw.randrange(end), draw.choice([1, 2, 8, 100])
    i = draw.choice([i, len(whole) - 1 - i])
    junk = bytes(draw.randrange(256) for _ in range(min(size, 8))) * (size // 8 or 1)
    return draw.choice([whole[:i], whole[:i] + bytes([whole[i] ^ 1 << draw.randrange(8)]) + whole[i + 1:],
                        whole[:i] + junk + whole[i:], whole[:i] + whole[i + size:], whole[:i] + junk + whole[i + size:],
                        whole[:i] + whole[max(i - size, 0):]])


def spoiled(value: object, draw: random.Random) -> object:
    """A tree with one node changed or left out; text that is JSON is a tree too."""
    if isinstance(value, str) and value[:1] in ("{", "["):
        return dumps(spoiled(json.loads(value), draw))
    if not isinstance(value, dict | list) or not value or not draw.randrange(12):
        return draw.choice(ODD)
    value = value.copy()
    key = draw.choice(list(value) if isinstance(value, dict) else range(len(value)))
    node = value.pop(key)
    if draw.randrange(6):
        if isinstance(value, dict):
            value[key] = spoiled(node, draw)
        else:
            value.insert(key, spoiled(node, draw))
    return value


def dumps(value: object) -> str:
    return json.dumps(value).replace('"DEEP"', DEEP)


def rezipped(whole: bytes, change: Callable[[str, bytes], bytes]) -> bytes:
    """The archive with `change(name, content)` for each content and all checksums right."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(whole)) as old, zipfile.ZipFile(file, "w") as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return file.getvalue()


def damaged(name: str, whole: bytes, draw: random.Random) -> bytes:
    """A file in which something is wrong, in its bytes or in what it says."""
    if draw.randrange(3) == 0 or name.endswith((".model", ".txt")) or name.startswith(("picture", "exif")):
        return bytes_damaged(whole, draw)
    if name.endswith(".safetensors"):
        n = 8 + int.from_bytes(whole[:8], "little")
        header = whole[8:n]
        header = dumps(spoiled(json.loads(header), draw)).encode() if draw.randrange(4) else bytes_damaged(header, draw)
        return len(header).to_bytes(8, "little") + header + whole[n:]
    if name.endswith((".pkl", ".pt")) and draw.randrange(2):
        saved, file = torch.load(io.BytesIO(whole), weights_only=True), io.BytesIO()
        torch.save(spoiled(saved, draw), file)
        return file.getvalue()
    if name.endswith((".pkl", ".pt", ".zip", ".npz")):
        victim = draw.choice(["data.pkl", "dataset.json", ".png", "data/0", "features.npy"])
        return rezipped(whole, lambda name, content: content if not name.endswith(victim) else
                        dumps(spoiled(json.loads(content), draw)).encode() if victim == "dataset.json" else
                        bytes_damaged(content, draw))
    if name.endswith(".jsonl"):
        lines = whole.decode().splitlines()
        i = draw.randrange(len(lines))
        return "\n".join([*lines[:i], dumps(spoiled(json.loads(lines[i]), draw)), *lines[i + 1:]]).encode()
    return dumps(spoiled(json.loads(whole), draw)).encode()


def outcome(call: Callable[[], object]) -> str | None:
    """The one line with which a script that does this ends in status 2; None where the call went through. Anything
    else, 20 seconds of work and memory beyond 2 GB fail."""
    signal.signal(signal.SIGPROF, lambda number, frame: pytest.fail("it hangs"))
    limit = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    said = io.StringIO()
    signal.setitimer(signal.ITIMER_PROF, 20)
    resource.setrlimit(resource.RLIMIT_AS, (used + 2 * 2**30, limit[1]))
    try:
        with contextlib.redirect_stderr(said):
            training.run(call)
    except SystemExit as end:
        assert end.code == 2
        *_, line = said.getvalue().splitlines()
        assert ": error: " in line and len(line) < 1200, said.getvalue()
        assert not any(word in line for word in ("MemoryError", "not enough memory", "bad_alloc", "alloc")), line
        return line
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, limit)
    return None


# -------------------------------------------------------------------------------------------------------------- tests


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    torch.set_num_threads(1)
    return make_world(tmp_path_factory.mktemp("world"))


@contextlib.contextmanager
def instead(path: Path, content: bytes):
    whole = path.read_bytes()
    path.write_bytes(content)
    yield
    path.write_bytes(whole)


@contextlib.contextmanager
def no_room(size: int = 0):
    """No file grows beyond so many bytes, as on a disk that is full."""
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
    with instead(world / place, damaged(place, (world / place).read_bytes(), draw)):
        outcome(lambda: call(world))


@pytest.mark.parametrize("name", READERS)
def test_a_sound_file_works(world, name):
    assert outcome(lambda: READERS[name][1](world)) is None


@hypothesis.settings(few, max_examples=150)
@hypothesis.given(text=st.text(st.characters(exclude_categories=()), max_size=200))
def test_any_text_is_a_prompt_but_for_halves_of_characters(world, text):
    pieces = tokenizers.pieces_from_spiece((world / "spiece.model").read_bytes())
    for tokenize in (tokenizers.load_tokenizer("tiny"), t5.T5Tokenizer(pieces)):
        said = outcome(lambda tokenize=tokenize: tokenize([text]))
        whole = not any("\ud800" <= character <= "\udfff" for character in text)
        assert said is None if whole else "half a character" in said


def test_a_prompt_of_a_hundred_thousand_letters_is_cut_like_any_other(world):
    assert outcome(lambda: tokenizers.load_tokenizer("tiny")(["x" * 10**5, "x " * 10**5])) is None
    pieces = tokenizers.pieces_from_json((world / "t5.json").read_text())
    assert outcome(lambda: t5.T5Tokenizer(pieces)(["x" * 10**5, "x " * 10**5])) is None


def test_a_state_cut_anywhere_near_its_ends_is_refused(world):
    whole = (world / "run" / "state.pt").read_bytes()
    for end in [*range(0, 100, 9), *range(100, len(whole), len(whole) // 40), *range(len(whole) - 99, len(whole), 7)]:
        with instead(world / "run" / "state.pt", whole[:end]):
            assert "is damaged" in outcome(lambda: restore(world / "run"))


# ------------------------------------------------------------------------------------------ files that are made to harm


def with_header(whole: bytes, change: Callable[[dict], None]) -> bytes:
    n = 8 + int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8:n])
    change(header)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + whole[n:]


def with_config(**changes) -> Callable[[bytes], bytes]:
    """A checkpoint whose metadata says otherwise: generator__lora_rank_unet=3 is config["generator"]["lora_..."]."""
    def change(header: dict) -> None:
        config = json.loads(header["__metadata__"]["config"])
        for path, value in changes.items():
            part, _, key = path.partition("__")
            config[part] = {**config[part], key: value} if key else value
        header["__metadata__"]["config"] = json.dumps(config)
    return lambda whole: with_header(whole, change)


def with_saved(change: Callable[[dict], object]) -> Callable[[bytes], bytes]:
    def damage(whole: bytes) -> bytes:
        saved, file = torch.load(io.BytesIO(whole), weights_only=True), io.BytesIO()
        change(saved)
        torch.save(saved, file)
        return file.getvalue()
    return damage


def packed(whole: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(whole)) as old, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    return file.getvalue()


def with_entry(**entries) -> Callable[[bytes], bytes]:
    return lambda whole: json.dumps(json.loads(whole) | entries).encode()


def png_of(width: int, height: int) -> bytes:
    body = b"IHDR" + width.to_bytes(4) + height.to_bytes(4) + b"\x08\x02\0\0\0"
    return b"\x89PNG\r\n\x1a\n" + (13).to_bytes(4) + body + zlib.crc32(body).to_bytes(4)


class Code:
    """Unpickled, it ends the process."""

    def __reduce__(self):
        return os._exit, (3,)


def huge_tensor(saved: dict) -> None:
    """A rank of 10^8, and a tensor that claims it in four bytes."""
    name = next(name for name in saved["state_dict_unet"] if "lora_A" in name)
    saved["rank_unet"], saved["state_dict_unet"][name] = 10**8, torch.zeros(1).expand(10**8, 8)


def cached(**changes) -> Callable[[bytes], bytes]:
    def damage(whole: bytes) -> bytes:
        index = json.loads(whole)
        index["shards"]["train"][0] |= changes
        return json.dumps(index).encode()
    return damage


HARM = {  # reader: (what is done to its file, a word of the one line)
    "weights of 10^12": ("weights", lambda whole: with_header(whole, lambda h: h["quant_conv.bias"].update(
        shape=[10**12], data_offsets=[0, 4 * 10**12])), "copy it again"),
    "rank of 10^9": ("checkpoint", with_config(generator__lora_rank_unet=10**9), "lora_rank_unet"),
    "rank of 10^9 in a .pkl": ("official paired", with_saved(lambda s: s.update(rank_unet=10**9)), "lora_rank"),
    "rank of 10^8 and a tensor to it": ("official paired", with_saved(huge_tensor), "img2img-turbo"),
    "10^9 layers in a checkpoint": ("checkpoint of all", with_config(unet__layers_per_block=10**9), "layers_per_block"),
    "10^9 layers in a configuration": ("text_encoder/config.json", with_entry(num_hidden_layers=10**9), "layers"),
    "10^12 timesteps": ("scheduler/scheduler_config.json", with_entry(num_train_timesteps=10**12), "timesteps"),
    "betas beyond 1": ("scheduler/scheduler_config.json", with_entry(beta_end=7), "betas"),
    "prompts of 10^9": ("tokenizer/tokenizer_config.json", with_entry(model_max_length=-1), "model_max_length"),
    "prompts beyond positions": ("tokenizer/tokenizer_config.json", with_entry(model_max_length=77), "a length of 24"),
    "a piece without a row": ("tokenizer/vocab.json", with_entry(zzz=979), "pieces"),
    "heads that do not divide": ("text_encoder/config.json", with_entry(num_attention_heads=3), "heads"),
    "groups of -1": ("unet/config.json", with_entry(norm_num_groups=-1), "norm_num_groups is -1"),
    "a packed .pkl": ("official paired", packed, "img2img-turbo"),
    "a packed state": ("state", packed, "is packed"),
    "code in a .pkl": ("official unpaired", with_saved(lambda s: s.update(sd_other=Code())), "code"),
    "code in a state": ("state", with_saved(lambda s: s.update(best=Code())), "is damaged"),
    "a state of other tensors": ("state", with_saved(lambda s: s.update(trained={})), "is not of this run"),
    "deep settings": ("settings", lambda whole: b"[" * 100_000, "settings of a run"),
    "deep captions": ("captions", lambda whole: b"[" * 100_000, "train_prompts.json"),
    "a number without end": ("captions", lambda whole: b"9" * 10_000, "train_prompts.json"),
    "deep metadata": ("metadata", lambda whole: b"[" * 100_000, "metadata.jsonl line 1"),
    "half a character": ("captions", with_entry(**{f"{i}.png": "\ud800" for i in range(10)}), "half a character"),
    "a cache of /dev/zero": ("cache", cached(file="/dev/zero"), "the index of a cache"),
    "a cache of other captions": ("cache", cached(captions=["one"]), "the index of a cache"),
    "a picture of 10^10": ("png", lambda whole: png_of(100_000, 100_000), "picture"),
    "PostScript": ("png", lambda whole: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nquit\n",
                   "not a picture of a known format"),
}


@pytest.mark.parametrize("reader, damage, says", HARM.values(), ids=HARM)
def test_a_file_that_is_made_to_harm_is_refused(world, reader, damage, says):
    place, call = READERS[reader]
    with instead(world / place, damage((world / place).read_bytes())):
        assert says in (line := outcome(lambda: call(world))), line


def test_what_a_zip_unpacks_to_is_limited_and_a_damaged_picture_in_it_is_named(world, monkeypatch):
    whole, call = (world / "edm.zip").read_bytes(), READERS["zip"][1]
    with instead(world / "edm.zip", rezipped(whole, lambda name, content: content[:99] if "/3" in name else content)):
        assert "edm.zip/00000/3.png" in outcome(lambda: call(world)) or "00000/3.png" in outcome(lambda: call(world))
    with instead(world / "edm.zip", whole.replace(b"\x89PNG", b"\x88PNG", 1)):  # its checksum is another then
        assert "00000/0.png in" in (line := outcome(lambda: call(world))) and "CRC-32" in line
    for limit, name in [(100, "dataset.json"), (400, "00000/")]:
        monkeypatch.setattr(folders, "MAX_UNZIPPED", limit)
        assert f"expected {limit} bytes at most" in (line := outcome(lambda: call(world))) and name in line


def test_workers_read_a_zip_that_is_open_in_the_trainer_too(world):
    items = folders.Captioned(world / "edm.zip", "train", "no_resize")
    items[0]
    for batch in loader.batches(items, 4, 0, 0, 60, num_workers=2):
        assert batch["target"].shape == (4, 3, 16, 16)


def test_a_caption_may_hold_any_sign_of_a_line_but_its_end(world):
    rows = [json.dumps(dict(file_name=f"{i}.png", text="a\u2028b\x85c"), ensure_ascii=False) for i in range(10)]
    with instead(world / "captioned" / "metadata.jsonl", "\r\n".join(rows).encode()):
        assert folders.Captioned(world / "captioned", "train", "no_resize").captions[0] == "a\u2028b\x85c"


def test_weights_that_find_no_room_are_one_line(tmp_path):
    with no_room(1000), pytest.raises(OSError, match="f.safetensors could not be written .*make room"):
        save_tensors(tmp_path / "f.safetensors", dict(a=torch.zeros(10_000)), {})


# -------------------------------------------------------------------------------------------- faults under a trainer

SMALL = ["--train_batch_size", "2", "--viz_freq", "1000", "--resolution", "24", "--device", "cpu", "--max_train_steps",
         "6", "--checkpointing_steps", "2"]
TRAINERS = {
    train_pix2pix_turbo: ["--base", "tiny", "--dataset_folder", "{pairs}", "--num_samples_eval", "1"],
    train_cyclegan_turbo: ["--base", "tiny", "--dataset_folder", "{pairs}", "--validation_num_images", "1",
                           "--disc_width", "8"],
    train_yoso: ["--base", "tiny", "--train_data_dir", "{pairs}", "--num_samples_eval", "1", "--prior_pictures", "2"],
}


@pytest.mark.parametrize("trainer", TRAINERS, ids=lambda trainer: trainer.__name__)
def test_a_full_disk_and_an_unreadable_picture_cost_the_steps_since_the_last_save_and_no_more(
        trainer, world, tmp_path, monkeypatch, capsys):
    """Each stops the run with one line that says what to do; gone on with, it ends in the bits of a run left alone."""
    pairs, cut = tmp_path / "pairs", tmp_path / "cut"
    shutil.copytree(world / "pairs", pairs)
    append_log = training.append_log
    monkeypatch.setattr(training, "catch_stop", lambda: lambda: False)

    def run(*argv: str, fault: Callable[[], object] = lambda: None, step: int = 0) -> str:
        """What the run says when the fault has come at the end of that step."""
        def watch(path: Path, done: int, values: dict) -> None:
            append_log(path, done, values)
            if done == step:
                fault()

        monkeypatch.setattr(training, "append_log", watch)
        monkeypatch.setattr(sys, "argv", [f"{trainer.__name__}.py", *argv])
        with pytest.raises(SystemExit) if step else contextlib.nullcontext() as end, no_room(resource.RLIM_INFINITY):
            training.run(trainer.main)
        said = [line for line in capsys.readouterr().err.splitlines() if f"{trainer.__name__}.py: error: " in line]
        assert len(said) == bool(step) and (not step or end.value.code == 2)
        return "".join(said)

    def full_disk() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))

    def full_to_the_last_byte() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1, resource.RLIM_INFINITY))

    def unreadable() -> None:
        for path in pairs.glob("train_?/*.png"):
            path.write_bytes(path.read_bytes()[:100])

    def saved() -> int:
        return torch.load(cut / "state.pt", weights_only=True)["step"]

    flags = [flag.format(pairs=pairs) for flag in TRAINERS[trainer]] + SMALL
    run(*flags, "--output_dir", str(tmp_path / "whole"))
    line = run(*flags, "--output_dir", str(cut), fault=full_disk, step=3)
    assert "could not be written" in line and "make room" in line and "--resume" in line and saved() == 2
    line = run("--resume", str(cut), fault=full_to_the_last_byte, step=3)
    assert f"make room, and go on with --resume {cut}" in line and saved() == 2
    line = run("--resume", str(cut), fault=unreadable, step=3)
    assert "png is not a readable picture" in line and "replace or remove it" in line and saved() == 2
    shutil.copytree(world / "pairs", pairs, dirs_exist_ok=True)
    run("--resume", str(cut))
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert not [*cut.glob(".*.tmp")]
    steps = [json.loads(line)["step"] for line in (cut / "log.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 7))


LOSES_A_WORKER = """
import multiprocessing, sys
import training
from dataset import folders, loader

def main():
    pairs = folders.PairedFolder(sys.argv[1], "train", "no_resize")
    for step, batch in enumerate(loader.batches(pairs, 2, 0, 0, 1000, num_workers=1)):
        if step == 2:
            multiprocessing.active_children()[0].kill()

training.run(main)
"""


def test_a_lost_worker_is_one_line_that_says_how_to_go_on(world):
    process = subprocess.run([sys.executable, "-c", LOSES_A_WORKER, str(world / "pairs")], text=True,
                             capture_output=True, cwd=Path(folders.__file__).parent.parent)
    line, = process.stderr.splitlines()
    assert process.returncode == 2 and "error: a process that prepares pictures was lost (DataLoader work" in line
    assert "go on with --resume" in line and "fewer --dataloader_num_workers" in line

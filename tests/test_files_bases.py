"""files/bases.py reads every layout of a base in use, and refuses damaged ones in one line.

What it writes, `diffusers` reads.
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import normal, randomise, relative
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from pipelines import (
    PARTS,
    SCHEDULE,
    TEXTS,
    UNET,
    VAE,
    assert_same_networks,
    edit,
    refusal,
    tiny_pipeline,
    tokenizer_folder,
    weight_file,
)
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from files.bases import load_base, load_controlnet, load_merged, save_folder
from files.formats import current_name
from models import t5
from models.diffusion import for_sampler

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def pipe() -> StableDiffusionPipeline:
    return tiny_pipeline()


@pytest.fixture(scope="module")
def saved(pipe, tmp_path_factory) -> Path:
    """The pipeline as `diffusers` writes it, never to be changed."""
    folder = tmp_path_factory.mktemp("saved")
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(saved, tmp_path / "base"))


# -------------------- layouts

@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(variant="fp16"),
        dict(max_shard_size="20KB"),
        dict(variant="fp16", max_shard_size="20KB"),
    ],
    ids=str,
)
def test_single_and_sharded_files_of_both_precisions_are_read(pipe, tmp_path, options):
    pipe.save_pretrained(tmp_path, **options)
    files = [*tmp_path.glob("unet/*.safetensors")]
    assert (len(files) > 1) == ("max_shard_size" in options)
    assert_same_networks(load_base(str(tmp_path)), pipe)


def test_weights_keep_their_type_unless_another_is_asked_for(saved, tmp_path):
    half = StableDiffusionPipeline.from_pretrained(
        saved,
        torch_dtype=torch.float16,
        safety_checker=None,
    )
    half.save_pretrained(tmp_path, variant="fp16")
    assert_same_networks(load_base(str(tmp_path)), half, torch.float16)
    assert_same_networks(load_base(str(tmp_path), dtype=torch.float64), half, torch.float64)


def test_full_precision_is_preferred_to_fp16(pipe, folder):
    other = randomise(tiny_pipeline().unet, seed=9)
    other.save_pretrained(folder / "unet", variant="fp16")
    assert (folder / "unet" / "diffusion_pytorch_model.fp16.safetensors").is_file()
    assert_same_networks(load_base(str(folder)), pipe)


@pytest.mark.parametrize("shape", [(), (1, 1)], ids=["linear", "1x1 convolution"])
def test_older_names_of_the_vaes_attention_are_read(pipe, folder, shape):
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def as_before(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        renamed = {}
        for name, tensor in tensors.items():
            match = re.search(r"attentions\.0\.(to_q|to_k|to_v|to_out\.0)", name)
            if match:
                name = name.replace(match[1], older[match[1]])
                if tensor.ndim == 2:
                    tensor = tensor.reshape(*tensor.shape, *shape)
            renamed[name] = tensor
        assert len(renamed.keys() - tensors.keys()) == 16
        return renamed

    edit(weight_file(folder, "vae"), as_before)
    assert_same_networks(load_base(str(folder)), pipe)


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_text_encoders_are_read_with_and_without_prefix_and_positions(pipe, folder, prefix):
    def as_before(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        renamed = {prefix + name.removeprefix("text_model."): t for name, t in tensors.items()}
        renamed[f"{prefix}embeddings.position_ids"] = torch.arange(77)[None]
        return renamed

    edit(weight_file(folder, "text_encoder"), as_before)
    assert_same_networks(load_base(str(folder)), pipe)
    assert_same_networks(load_base(str(folder), dtype=torch.float64), pipe, torch.float64)


def test_the_configuration_of_a_whole_clip_model_serves_its_text_encoder(pipe, folder):
    path = folder / "text_encoder" / "config.json"
    text_config = json.loads(path.read_text())
    whole = dict(model_type="clip", text_config=text_config, vision_config={})
    path.write_text(json.dumps(whole))
    assert_same_networks(load_base(str(folder)), pipe)


def test_only_the_parts_asked_for_are_read(folder):
    shutil.rmtree(folder / "unet")
    base = load_base(str(folder), ("vae", "schedule"))
    assert base.vae is not None
    assert base.schedule is not None
    assert base.unet is None
    assert base.text_encoder is None
    assert base.tokenizer is None


def test_random_bases_depend_on_the_seed_only():
    torch.manual_seed(1)
    first = load_base("tiny", ("vae",), seed=5).vae.state_dict()
    torch.manual_seed(2)
    before = torch.random.get_rng_state()
    again = load_base("tiny", ("vae",), seed=5).vae.state_dict()
    other = load_base("tiny", ("vae",), seed=6).vae.state_dict()
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["encoder.conv_in.weight"], other["encoder.conv_in.weight"])


# -------------------- damages

Damage = Callable[[Path], object]  # what is done to a base's folder


def truncated(part: str, end: int) -> Damage:
    """The weights of a part, cut at byte `end`."""

    def damage(folder: Path) -> None:
        path = weight_file(folder, part)
        path.write_bytes(path.read_bytes()[:end])

    return damage


def header(text: str | bytes, length: int | None = None, data: bytes = b"") -> Damage:
    """A weight file of the U-Net with this header."""
    if isinstance(text, str):
        text = text.encode()
    if length is None:
        length = len(text)

    def damage(folder: Path) -> None:
        weight_file(folder, "unet").write_bytes(length.to_bytes(8, "little") + text + data)

    return damage


def entry(**changes) -> str:
    """A header with one tensor."""
    fields = dict(dtype="F32", shape=[2], data_offsets=[0, 8]) | changes
    return json.dumps({"conv_in.weight": fields})


def changed(part: str, name: str, change: Callable[[Tensor], Tensor]) -> Damage:
    """One tensor of a part put through `change`."""

    def change_one(tensors: dict[str, Tensor]) -> None:
        tensors[name] = change(tensors[name])

    return lambda folder: edit(weight_file(folder, part), change_one)


def without_tensor(part: str, name: str) -> Damage:
    def remove_one(tensors: dict[str, Tensor]) -> None:
        del tensors[name]

    return lambda folder: edit(weight_file(folder, part), remove_one)


def with_tensor(part: str, name: str) -> Damage:
    def add_one(tensors: dict[str, Tensor]) -> None:
        tensors[name] = torch.ones(2)

    return lambda folder: edit(weight_file(folder, part), add_one)


def longer(part: str) -> Damage:
    def damage(folder: Path) -> None:
        with weight_file(folder, part).open("ab") as file:
            file.write(b"0")

    return damage


def written(name: str, text: str | bytes) -> Damage:
    """A file with this content."""
    content = text if isinstance(text, bytes) else text.encode()
    return lambda folder: (folder / name).write_bytes(content)


def removed(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def config(part: str, **changes) -> Damage:
    """Other entries of a part's configuration."""
    name = "scheduler_config.json" if part == "scheduler" else "config.json"

    def damage(folder: Path) -> None:
        path = folder / part / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


def model_index(**changes) -> Damage:
    """Other entries of model_index.json."""

    def damage(folder: Path) -> None:
        path = folder / "model_index.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


def scheduler_class(name: str) -> Damage:
    return model_index(scheduler=["diffusers", name])


def both(first: Damage, second: Damage) -> Damage:
    def damage(folder: Path) -> None:
        first(folder)
        second(folder)

    return damage


def sharded(change: Damage) -> Damage:
    """The U-Net in shards, and something done to its folder."""

    def damage(folder: Path) -> None:
        weight_file(folder, "unet").unlink()
        network = UNet2DConditionModel(**UNET)
        network.save_pretrained(folder / "unet", max_shard_size="300KB")
        change(folder / "unet")

    return damage


def second_shard(unet: Path) -> Path:
    return sorted(unet.glob("*-of-*"))[1]


def remove_a_shard(unet: Path) -> None:
    second_shard(unet).unlink()


def replace_a_shard(unet: Path) -> None:
    shutil.copy(unet.parent / VAE_FILE, second_shard(unet))


def index(**changes) -> Damage:
    """Other entries of the index of shards; None removes one."""

    def change(unet: Path) -> None:
        path = unet / "diffusion_pytorch_model.safetensors.index.json"
        entries = json.loads(path.read_text()) | changes
        entries = {key: value for key, value in entries.items() if value is not None}
        path.write_text(json.dumps(entries))

    return sharded(change)


def only_bin(folder: Path) -> None:
    weight_file(folder, "unet").rename(folder / "unet" / "diffusion_pytorch_model.bin")


def merges_of_another_vocabulary(folder: Path) -> None:
    vocabulary = '{"a": 0, "<|startoftext|>": 1, "<|endoftext|>": 2}'
    (folder / "tokenizer" / "tokenizer.json").unlink()
    (folder / "tokenizer" / "vocab.json").write_text(vocabulary)
    (folder / "tokenizer" / "merges.txt").write_text("#version: 0.2\nx y\n")


UNET_FILE = "unet/diffusion_pytorch_model.safetensors"
VAE_FILE = "vae/diffusion_pytorch_model.safetensors"
UNET_CONFIG = "unet/config.json"
VAE_CONFIG = "vae/config.json"
TEXT_CONFIG = "text_encoder/config.json"
SCHEDULER_CONFIG = "scheduler_config.json"
TOKENIZER_CONFIG = "tokenizer/tokenizer_config.json"
TOKENIZER_FILE = "tokenizer/tokenizer.json"
AGAIN = "copy it again"

SDXL = dict(
    addition_embed_type="text_time",
    transformer_layers_per_block=[1, 2, 10],
    time_cond_proj_dim=None,
)
UNIGRAM = '{"model": {"type": "Unigram", "vocab": []}}'

# What is done to a folder, and the words that the error must have.
DAMAGED_WEIGHTS = {
    "tensor missing": (
        without_tensor("unet", "conv_in.bias"),
        [UNET_FILE, "lacks conv_in.bias [16]"],
    ),
    "tensor of another model": (with_tensor("vae", "odd.weight"), [VAE_FILE, "odd.weight"]),
    "wrong shape": (
        changed("unet", "conv_in.bias", lambda t: t[:3]),
        [UNET_FILE, "conv_in.bias", "[3]", "[16]"],
    ),
    "1x1 in place of a kernel": (
        changed("vae", "encoder.conv_in.weight", lambda t: t[..., :1, :1]),
        [VAE_FILE, "[8, 3, 1, 1]", "[8, 3, 3, 3]"],
    ),
    "integers": (
        changed("vae", "quant_conv.bias", lambda t: t.long()),
        [VAE_FILE, "quant_conv.bias", "int64"],
    ),
    "8-bit floats with scales": (
        with_tensor("vae", "quant_conv.scale_weight"),
        [VAE_FILE, "quant_conv.scale_weight"],
    ),
    "booleans": (
        changed("vae", "quant_conv.bias", lambda t: t > 0),
        [VAE_FILE, "quant_conv.bias", "bool"],
    ),
    "no bytes": (truncated("unet", 0), [UNET_FILE, "these are 0 bytes"]),
    "cut in the length": (truncated("unet", 5), [UNET_FILE, "these are 5 bytes"]),
    "cut in the header": (truncated("unet", 300), [UNET_FILE, "these are 300 bytes"]),
    "cut in the data": (truncated("unet", 500_000), [UNET_FILE, "these are 500000 bytes"]),
    "cut by one byte": (truncated("vae", -1), [VAE_FILE, AGAIN]),
    "a byte too many": (longer("vae"), [VAE_FILE, AGAIN]),
    "a page of HTML": (
        written(UNET_FILE, "<!DOCTYPE html><html>\n" * 20),
        [UNET_FILE, "is a web page"],
    ),
    "header not JSON": (header("{" * 40), [UNET_FILE, AGAIN]),
    "header a list": (header("[]"), [UNET_FILE, AGAIN]),
    "header not text": (header(b"\xff\xfe\x00"), [UNET_FILE, AGAIN]),
    "header deep": (header('{"a":' * 100_000), [UNET_FILE, AGAIN]),
    "header of 2^63 bytes": (header("{}", length=2**63), [UNET_FILE, AGAIN]),
    "a tensor of 10^12": (
        header(entry(shape=[10**12], data_offsets=[0, 4 * 10**12])),
        [UNET_FILE, AGAIN],
    ),
    "a tensor of 2^100": (
        header(entry(shape=[2**50, 2**50]), data=bytes(8)),
        [UNET_FILE, AGAIN],
    ),
    "offsets beyond the end": (header(entry(), data=bytes(4)), [UNET_FILE, AGAIN]),
    "offsets backwards": (
        header(entry(data_offsets=[8, 0]), data=bytes(8)),
        [UNET_FILE, AGAIN],
    ),
    "shape of floats": (header(entry(shape=[2.0]), data=bytes(8)), [UNET_FILE, AGAIN]),
    "entry without shape": (header('{"conv_in.bias": {"dtype": "F32"}}'), [UNET_FILE, AGAIN]),
    "no tensors": (header("{}"), [UNET_FILE, "lacks"]),
    "no weights": (removed(UNET_FILE), [UNET_FILE, "safetensors"]),
    "only .bin": (only_bin, [UNET_FILE, ".bin", "save_pretrained"]),
    "a shard missing": (sharded(remove_a_shard), ["-00002-of-", "index.json"]),
    "a shard of another model": (
        sharded(replace_a_shard),
        ["/unet cannot be used", "holds "],
    ),
    "an index of nothing": (index(weight_map={}), ["index.json", "weight_map"]),
    "an index without map": (index(weight_map=None), ["index.json", "weight_map"]),
    "an index of numbers": (index(weight_map={"conv_in.bias": 3}), ["index.json", "weight_map"]),
    "an index that leads out": (
        index(weight_map={"conv_in.bias": "../../x.safetensors"}),
        ["index.json", "../../x"],
    ),
}
DAMAGED_CONFIGURATIONS = {
    "config missing": (removed(UNET_CONFIG), [f"has no {UNET_CONFIG}"]),
    "config broken": (written(UNET_CONFIG, '{"block_out'), [UNET_CONFIG, "JSON"]),
    "config not text": (written(UNET_CONFIG, b"\xff\xfe{}"), [UNET_CONFIG, "JSON"]),
    "config a list": (written(UNET_CONFIG, "[1, 2]"), [UNET_CONFIG, "list"]),
    "config deep": (written(UNET_CONFIG, "[" * 100_000), [UNET_CONFIG, "RecursionError"]),
    "config of SDXL": (
        config("unet", **SDXL),
        [UNET_CONFIG, "addition_embed_type", "text_time", "None"],
    ),
    "config of other blocks": (
        config("unet", down_block_types=["AttnDownBlock2D"] * 2),
        [UNET_CONFIG, "AttnDownBlock2D", "CrossAttnDownBlock2D"],
    ),
    "config of other sizes": (
        config("unet", block_out_channels=[16, 48]),
        [UNET_FILE, "expected"],
    ),
    "a word for a number": (config("vae", norm_num_groups="four"), [VAE_CONFIG, "'four'"]),
    "unequal numbers": (config("unet", layers_per_block=[1, 2]), [UNET_CONFIG, "(1, 2)"]),
    "unequal transformers": (
        config("unet", transformer_layers_per_block=[1, 2]),
        [UNET_CONFIG, "transformer_layers_per_block", "[1, 2]"],
    ),
    "a list of nothing": (config("unet", layers_per_block=[]), [UNET_CONFIG, "()"]),
    "no groups of the U-Net": (config("unet", norm_num_groups=None), [UNET_CONFIG, "None"]),
    "a number for a list": (config("vae", block_out_channels=8), [VAE_CONFIG]),
    "groups that do not divide": (config("vae", norm_num_groups=7), [VAE_CONFIG, "7"]),
    "no groups": (config("vae", norm_num_groups=0), [VAE_CONFIG]),
    "negative sizes": (config("unet", block_out_channels=[-16, -32]), [UNET_CONFIG]),
    "another activation": (
        config("text_encoder", hidden_act="relu"),
        [TEXT_CONFIG, "relu"],
    ),
    "text configuration of nothing": (config("text_encoder", text_config=None), [TEXT_CONFIG]),
    "another schedule": (
        config("scheduler", beta_schedule="sigmoid"),
        [SCHEDULER_CONFIG, "sigmoid"],
    ),
    "a schedule of words": (config("scheduler", beta_start="small"), [SCHEDULER_CONFIG]),
    "a schedule of nothing": (
        config("scheduler", beta_end=None),
        [SCHEDULER_CONFIG, "beta_end is None", "a number"],
    ),
    "no number of timesteps": (
        config("scheduler", num_train_timesteps=None),
        [SCHEDULER_CONFIG, "num_train_timesteps is None", "a whole number"],
    ),
    "no spacing": (
        config("scheduler", timestep_spacing=None),
        [SCHEDULER_CONFIG, "timestep_spacing is None", "a word"],
    ),
    "a switch that is a word": (
        config("scheduler", rescale_betas_zero_snr="yes"),
        [SCHEDULER_CONFIG, "rescale_betas_zero_snr is 'yes'", "true or false"],
    ),
    "flow matching": (
        scheduler_class("FlowMatchEulerDiscreteScheduler"),
        [SCHEDULER_CONFIG, "FlowMatchEulerDiscreteScheduler", "flow matching"],
    ),
    "a scheduler of one's own": (
        scheduler_class("MyScheduler"),
        [SCHEDULER_CONFIG, "MyScheduler", "DDIMScheduler"],
    ),
    "a scheduler of EDM": (
        scheduler_class("EDMDPMSolverMultistepScheduler"),
        [SCHEDULER_CONFIG, "EDMDPMSolverMultistepScheduler"],
    ),
    "a rest of nothing": (
        both(model_index(rest=None), removed(VAE_CONFIG)),
        ["model_index.json", "rest is None", "another base"],
    ),
    "a rest of a number": (
        both(model_index(rest=3), removed(f"scheduler/{SCHEDULER_CONFIG}")),
        ["model_index.json", "rest is 3", "another base"],
    ),
    "no schedule": (
        removed(f"scheduler/{SCHEDULER_CONFIG}"),
        [f"has no scheduler/{SCHEDULER_CONFIG}"],
    ),
    "no tokenizer": (
        removed(TOKENIZER_FILE),
        ["has no tokenizer/vocab.json", "tokenizer.json"],
    ),
    "no merges": (written("tokenizer/vocab.json", "{}"), ["has no tokenizer/merges.txt"]),
    "merges of another vocabulary": (
        merges_of_another_vocabulary,
        ["tokenizer/merges.txt", "one model"],
    ),
    "a tokenizer of another kind": (written(TOKENIZER_FILE, UNIGRAM), [TOKENIZER_FILE, "BPE"]),
    "a padding that is no piece": (
        written(TOKENIZER_CONFIG, '{"pad_token": "<pad>"}'),
        [TOKENIZER_FILE, "'<pad>'"],
    ),
    "a length in words": (
        written(TOKENIZER_CONFIG, '{"model_max_length": "long"}'),
        [TOKENIZER_FILE],
    ),
    "no model_index.json": (removed("model_index.json"), ["has no model_index.json"]),
    "model_index.json a word": (written("model_index.json", '"tiny"'), ["model_index.json", "str"]),
}
DAMAGED = DAMAGED_WEIGHTS | DAMAGED_CONFIGURATIONS


@pytest.mark.parametrize("damage, says", DAMAGED.values(), ids=DAMAGED.keys())
def test_a_damaged_folder_is_refused_in_one_line_that_names_the_file(folder, damage, says):
    damage(folder)
    message = refusal(lambda: load_base(str(folder)))
    assert str(folder) in message
    assert all(words in message for words in says), message


# -------------------- harmless differences

BESIDE_TEXT = {
    "a projection": ["text_projection.weight"],
    "a projection and a scale": ["text_projection.weight", "logit_scale"],
    "OpenCLIP's projection": ["text_model.text_projection"],
    "a whole CLIP": [
        "vision_model.embeddings.class_embedding",
        "visual_projection.weight",
        "text_projection.weight",
        "logit_scale",
        "vision_model.embeddings.position_ids",
    ],
}


@pytest.mark.parametrize("names", BESIDE_TEXT.values(), ids=BESIDE_TEXT.keys())
def test_what_stands_beside_a_text_encoder_is_left_out(pipe, folder, names):
    def add(tensors: dict[str, Tensor]) -> None:
        for name in names:
            tensors[name] = torch.ones(2)

    edit(weight_file(folder, "text_encoder"), add)
    assert_same_networks(load_base(str(folder)), pipe)


def test_a_clip_text_model_with_projection_is_read(pipe, folder):
    config = CLIPTextConfig.from_pretrained(folder / "text_encoder")
    peer = CLIPTextModelWithProjection(config)
    weights = {}
    for name, tensor in pipe.text_encoder.state_dict().items():
        weights[f"text_model.{name.removeprefix('text_model.')}"] = tensor
    missing, unexpected = peer.load_state_dict(weights, strict=False)
    assert missing == ["text_projection.weight"]
    assert unexpected == []
    shutil.rmtree(folder / "text_encoder")
    peer.save_pretrained(folder / "text_encoder")
    assert_same_networks(load_base(str(folder)), pipe)


def test_the_decoder_of_a_whole_t5_is_left_out():
    config = t5.T5Config(vocab_size=8, d_model=4, d_kv=2, num_heads=2, d_ff=4, num_layers=1)
    with torch.device("meta"):
        network = t5.T5Encoder(config)
    for name in ("decoder.block.0.layer.0.SelfAttention.q.weight", "lm_head.weight"):
        assert current_name(network, name) is None
    for name in network.state_dict():
        assert current_name(network, name) == name


HARMLESS_CONFIGURATIONS = {
    "layers per block": config("unet", layers_per_block=[1, 1]),
    "widths of the context": config("unet", cross_attention_dim=[32, 32]),
    "transformers per block": config("unet", transformer_layers_per_block=[1, 1]),
    "kinds of attention": config("unet", only_cross_attention=[False, False]),
    "heads": config("unet", attention_head_dim=[4, 4]),
    "the U-Net's size": config("unet", sample_size=[8, 8]),
    "no size of the U-Net": config("unet", sample_size=None),
    "no size of the VAE": config("vae", sample_size=None),
    "layers of the VAE": config("vae", layers_per_block=[1, 1]),
}


@pytest.mark.parametrize(
    "change", HARMLESS_CONFIGURATIONS.values(), ids=HARMLESS_CONFIGURATIONS.keys()
)
def test_other_spellings_of_the_same_configuration_are_read(pipe, folder, change):
    change(folder)
    base = load_base(str(folder))
    assert_same_networks(base, pipe)
    assert type(base.unet.config.sample_size) is int
    assert type(base.unet.config.layers_per_block) is int


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
def test_8_bit_floats_are_read_and_cast(saved, folder, kind, dtype):
    def to_8_bits(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.to(kind) for name, tensor in tensors.items()}

    edit(weight_file(folder, "unet"), to_8_bits)
    ours = load_base(str(folder), ("unet",), dtype).unet.state_dict()
    before = load_base(str(saved), ("unet",)).unet.state_dict()
    for name, tensor in ours.items():
        assert tensor.dtype == (dtype or torch.float32)
        assert torch.equal(tensor, before[name].to(kind).to(tensor.dtype))


# -------------------- schedulers

def scheduler(name: str, **settings) -> Damage:
    """A scheduler with these settings alone, of the class that the index names."""
    content = json.dumps(settings | {"_class_name": name})
    path = f"scheduler/{SCHEDULER_CONFIG}"
    return both(scheduler_class(name), written(path, content))


SCHEDULERS = {
    "DDIM": scheduler("DDIMScheduler", **SCHEDULE),
    "DDIM from before steps_offset": scheduler("DDIMScheduler", **SCHEDULE, clip_sample=True),
    "an offset of 0": scheduler("DDIMScheduler", **SCHEDULE, steps_offset=0),
    "an offset of nothing": scheduler("PNDMScheduler", **SCHEDULE, steps_offset=None),
    "an offset of 7": scheduler("DDIMScheduler", **SCHEDULE, steps_offset=7),
    "DDPM": scheduler("DDPMScheduler", **SCHEDULE),
    "no setting at all": scheduler("DDIMScheduler"),
    "Euler": scheduler("EulerDiscreteScheduler", **SCHEDULE),
    "DPM-Solver": scheduler("DPMSolverMultistepScheduler"),
    "LCM": scheduler("LCMScheduler"),
    "another class in the index": both(
        scheduler("LCMScheduler"),
        scheduler_class("DDIMScheduler"),
    ),
    "a class in the index alone": both(
        scheduler("EulerDiscreteScheduler"),
        written(f"scheduler/{SCHEDULER_CONFIG}", "{}"),
    ),
}


@pytest.mark.parametrize("change", SCHEDULERS.values(), ids=SCHEDULERS.keys())
def test_a_scheduler_is_what_the_pipeline_makes_of_it(folder, change):
    change(folder)
    peer = StableDiffusionPipeline.from_pretrained(folder).scheduler
    schedule = load_base(str(folder), ("schedule",)).schedule
    assert schedule.config["_class_name"] == type(peer).__name__
    assert schedule.timestep_spacing == peer.config.timestep_spacing
    assert schedule.steps_offset == peer.config.steps_offset
    assert schedule.config["clip_sample"] is peer.config.get("clip_sample", False)
    assert torch.allclose(schedule.alpha**2, peer.alphas_cumprod.double(), atol=1e-6)


@pytest.mark.parametrize("entry", [None, [], [None, None], ["diffusers"], "DDIMScheduler", 3])
def test_an_index_without_a_scheduler_leaves_the_class_to_its_file(folder, entry):
    scheduler("LCMScheduler")(folder)
    model_index(scheduler=entry)(folder)
    schedule = load_base(str(folder), ("schedule",)).schedule
    assert schedule.config["_class_name"] == "LCMScheduler"


def test_pixart_has_its_scheduler_uncorrected(folder):
    scheduler("DDIMScheduler", clip_sample=True)(folder)
    model_index(transformer=["diffusers", "PixArtTransformer2DModel"])(folder)
    schedule = load_base(str(folder), ("schedule",)).schedule
    assert schedule.steps_offset == 0
    with pytest.raises(ValueError, match="clip_sample is True, which the"):
        for_sampler(schedule, "ddim", 1)


def test_a_base_that_is_its_own_rest_is_refused(folder):
    model_index(rest=str(folder))(folder)
    assert load_base(str(folder)).vae is not None
    shutil.rmtree(folder / "vae")
    assert "expected the name of another base" in refusal(lambda: load_base(str(folder)))


# -------------------- networks that do not fit each other

def unet_like(**sizes) -> Damage:
    """Another U-Net, complete in itself."""

    def change(folder: Path) -> None:
        shutil.rmtree(folder / "unet")
        UNet2DConditionModel(**(UNET | sizes)).save_pretrained(folder / "unet")

    return change


def vae_like(**sizes) -> Damage:
    def change(folder: Path) -> None:
        shutil.rmtree(folder / "vae")
        AutoencoderKL(**(VAE | sizes)).save_pretrained(folder / "vae")

    return change


def text_encoder_of_width(width: int) -> Damage:
    def change(folder: Path) -> None:
        config = CLIPTextConfig.from_pretrained(folder / "text_encoder")
        config.hidden_size = width
        shutil.rmtree(folder / "text_encoder")
        CLIPTextModel(config).save_pretrained(folder / "text_encoder")

    return change


UNLIKE = {
    "inpainting": (unet_like(in_channels=9), ["inpainting", "9 input channels"]),
    "InstructPix2Pix": (unet_like(in_channels=8), ["InstructPix2Pix", "8 input channels"]),
    "depth": (unet_like(in_channels=5), ["depth", "5 input channels"]),
    "upscaler": (unet_like(in_channels=7), ["upscaler", "7 input channels"]),
    "6 channels": (unet_like(in_channels=6), ["unknown kind", "6 input channels"]),
    "8 predicted": (unet_like(out_channels=8), ["4 input channels", "8 input channels"]),
    "a U-Net of 16 latents": (
        unet_like(in_channels=16, out_channels=16),
        ["latents have 4 channels; expected 16"],
    ),
    "a VAE of 16 latents": (
        vae_like(latent_channels=16),
        ["latents have 16 channels; expected 4"],
    ),
    "a wide text encoder": (text_encoder_of_width(64), ["width of 64; expected 32"]),
    "a narrow text encoder": (text_encoder_of_width(16), ["width of 16; expected 32"]),
    "wide cross-attention": (
        unet_like(cross_attention_dim=40),
        ["width of 32; expected 40"],
    ),
}


@pytest.mark.parametrize("change, says", UNLIKE.values(), ids=UNLIKE.keys())
def test_networks_that_do_not_fit_each_other_are_refused(folder, change, says):
    change(folder)
    message = refusal(lambda: load_base(str(folder)))
    assert str(folder) in message
    assert all(words in message for words in says), message


def test_an_inpainting_unet_is_refused_without_the_vae_too(folder):
    unet_like(in_channels=9)(folder)
    assert "inpainting" in refusal(lambda: load_base(str(folder), ("unet",)))
    assert load_base(str(folder), ("vae", "text_encoder", "tokenizer")).vae is not None


def test_a_merge_is_refused_for_its_first_base(folder, saved):
    vae_like(latent_channels=16)(folder)
    message = refusal(lambda: load_merged(f"{folder} + {saved} - {saved}"))
    assert "latents have 16 channels" in message


@pytest.mark.parametrize(
    "channels, kind", [(9, "inpainting"), (8, "InstructPix2Pix"), (5, "depth")]
)
def test_a_one_file_model_of_another_input_is_named(tmp_path, channels, kind):
    tensors = {
        "model.diffusion_model.input_blocks.0.0.weight": torch.ones(320, channels, 3, 3),
        "first_stage_model.encoder.conv_in.weight": torch.ones(1),
        "cond_stage_model.transformer.text_model.x": torch.ones(1),
    }
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)
    assert kind in refusal(lambda: load_base(str(path)))


@pytest.mark.parametrize(
    "sizes, says",
    [
        (dict(in_channels=9), "in_channels is 9; expected 4"),
        (dict(in_channels=16), "in_channels is 16; expected 4"),
        (dict(conditioning_channels=6), "conditioning_channels is 6; expected 3"),
        (dict(cross_attention_dim=40), "cross_attention_dim is 40; expected 32"),
    ],
)
def test_a_controlnet_of_other_channels_is_refused(saved, tmp_path, sizes, says):
    own = ("block_out_channels", "layers_per_block", "norm_num_groups", "cross_attention_dim")
    control = {key: UNET[key] for key in (*own, "attention_head_dim", "down_block_types")}
    ControlNetModel(**(control | sizes)).save_pretrained(tmp_path)
    unet = load_base(str(saved), ("unet",)).unet
    assert says in refusal(lambda: load_controlnet(str(tmp_path), unet))


# -------------------- writing a folder

@torch.no_grad()
@pytest.mark.parametrize("pad", ["<|endoftext|>", "!"])
def test_diffusers_reads_what_save_folder_wrote_and_computes_the_same(folder, tmp_path, pad):
    shutil.rmtree(folder / "tokenizer")
    tokenizer_folder(folder, dict(pad_token=pad), None)
    base = load_base(str(folder), dtype=torch.float64)
    save_folder(tmp_path / "written", base)
    peer = StableDiffusionPipeline.from_pretrained(
        tmp_path / "written",
        torch_dtype=torch.float64,
    )
    assert type(peer.scheduler) is DDIMScheduler
    assert peer.safety_checker is None
    assert_same_networks(base, peer, torch.float64)

    tokens = peer.tokenizer(
        TEXTS,
        padding="max_length",
        truncation=True,
        return_tensors="pt",
    )
    ids = tokens.input_ids
    assert torch.equal(base.tokenizer(TEXTS), ids)
    context = base.text_encoder(ids)
    z = normal(5, 4, 8, 8)
    x = normal(1, 3, 16, 16)
    assert relative(context, peer.text_encoder(ids).last_hidden_state) < 1e-9
    assert relative(base.unet(z, 999, context), peer.unet(z, 999, context).sample) < 1e-9
    assert relative(base.vae.decode(z), peer.vae.decode(z).sample) < 1e-9
    assert relative(base.vae.encode(x)[0], peer.vae.encode(x).latent_dist.mean) < 1e-9
    alpha_bar = peer.scheduler.alphas_cumprod.double()
    assert torch.allclose(base.schedule.alpha**2, alpha_bar, atol=1e-6)


def test_a_written_folder_is_read_back_the_same(pipe, saved, tmp_path):
    base = load_base(str(saved))
    save_folder(tmp_path / "one", base)
    again = load_base(str(tmp_path / "one"))
    assert_same_networks(again, pipe)
    assert torch.equal(again.tokenizer(TEXTS), base.tokenizer(TEXTS))
    assert again.schedule.config == base.schedule.config

    save_folder(tmp_path / "two", again)
    for path in (tmp_path / "one").rglob("*.*"):
        copy = tmp_path / "two" / path.relative_to(tmp_path / "one")
        assert path.read_bytes() == copy.read_bytes()
    save_folder(tmp_path / "half", base, torch.float16)
    assert_same_networks(load_base(str(tmp_path / "half")), pipe, torch.float16)


def test_a_random_base_is_written_with_its_weights(tmp_path):
    base = load_base("tiny", seed=3)
    save_folder(tmp_path, base)
    again = load_base(str(tmp_path))
    for part in PARTS:
        ours = getattr(base, part).state_dict()
        theirs = getattr(again, part).state_dict()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)

"""LoRA files in files/formats.py.

Files that `peft` and `diffusers` write change our networks as they change theirs, and they read
what we write.
"""

import copy
import functools
import json
from pathlib import Path

import pytest
import torch
from conftest import normal, randomise, relative
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_kohya
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from files.bases import Base, load_lora
from files.formats import (
    LoRAPair,
    apply_lora,
    read_lora,
    unet_original_name,
    write_lora,
)
from models.clip import TextConfig, TextEncoder
from models.lora import add_lora
from models.unet import UNet, UNetConfig

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = dict(
    block_out_channels=(8, 16, 24),
    layers_per_block=1,
    norm_num_groups=4,
    cross_attention_dim=12,
    attention_head_dim=2,
    down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
)
TEXT = dict(
    vocab_size=19,
    hidden_size=12,
    intermediate_size=20,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=7,
    hidden_act="gelu",
)
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
UNET_TARGETS = (
    *ATTENTION,
    "proj_in",
    "proj_out",
    "ff.net.0.proj",
    "ff.net.2",
    "conv1",
    "conv2",
    "conv_shortcut",
    "conv",
    "conv_in",
    "conv_out",
    "time_emb_proj",
    "linear_1",
    "linear_2",
)
TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
PARTS = ("unet", "text_encoder")
NAME = "pytorch_lora_weights.safetensors"
Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"

# -------------------- networks of both sides

def float32_values(network: nn.Module) -> nn.Module:
    """Rounds the weights of a float64 network to float32, so that a peer that goes through float32
    rounds nothing."""
    for p in network.parameters():
        p.data = p.data.float().double()
    return network


@functools.cache
def peer_networks() -> tuple[CLIPTextModel, UNet2DConditionModel]:
    config = CLIPTextConfig(**TEXT, eos_token_id=18, bos_token_id=0, pad_token_id=1)
    text = CLIPTextModel(config).eval().double()
    unet = UNet2DConditionModel(**SIZES).double()
    return float32_values(randomise(text)), float32_values(randomise(unet, 1))


def peer_pipeline() -> StableDiffusionPipeline:
    """A new pipeline, always with the same weights."""
    text, unet = copy.deepcopy(peer_networks())
    return StableDiffusionPipeline(
        vae=AutoencoderKL(block_out_channels=(4,), norm_num_groups=2),
        text_encoder=text,
        tokenizer=None,
        unet=unet,
        scheduler=DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def our_networks() -> dict[str, nn.Module]:
    """Our networks with the weights of the peer's."""
    text, unet = peer_networks()
    our_unet = UNet(UNetConfig(**SIZES)).double()
    our_unet.load_state_dict(unet.state_dict())
    our_text = TextEncoder(TextConfig(**TEXT, eos_token_id=18)).double()
    weights = {}
    for name, tensor in text.state_dict().items():
        weights[f"text_model.{name.removeprefix('text_model.')}"] = tensor
    our_text.load_state_dict(weights)
    return {"unet": our_unet, "text_encoder": our_text}


def adapt(
    pipeline: StableDiffusionPipeline,
    rank: int = 4,
    alpha: float = 4.0,
    seed: int = 0,
    unet_targets: tuple[str, ...] = UNET_TARGETS,
    **options,
) -> None:
    """Adds random adapters of `peft` to both networks."""
    for network, targets in [
        (pipeline.unet, unet_targets),
        (pipeline.text_encoder, TEXT_TARGETS),
    ]:
        before = {id(p) for p in network.parameters()}
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), **options)
        network.add_adapter(config)
        for i, p in enumerate(network.parameters()):
            if id(p) not in before:
                p.data = 0.3 * normal(*p.shape, seed=1000 * seed + i)
        float32_values(network)


def adapter_tensors(pipeline: StableDiffusionPipeline) -> dict[str, Tensor]:
    """The adapters of both networks as `peft` names them, after `unet.` and `text_encoder.`."""
    tensors = {}
    for part in PARTS:
        for name, tensor in get_peft_model_state_dict(getattr(pipeline, part)).items():
            tensors[f"{part}.{name}"] = tensor.contiguous()
    return tensors


# -------------------- comparing

def read_file(path: Path, networks: dict[str, nn.Module]):
    with safe_open(path, "pt") as file:
        return read_lora(load_file(path), file.metadata(), networks)


def apply(found, networks: dict[str, nn.Module], strength: float = 1.0) -> dict[str, nn.Module]:
    for part, pairs in found.items():
        apply_lora(networks[part], pairs, strength)
    return networks


@torch.no_grad()
def differences(ours: dict[str, nn.Module], peer: StableDiffusionPipeline) -> dict[str, float]:
    """How much each network's output differs from the peer's."""
    x = normal(2, 4, 8, 8)
    context = normal(2, 7, 12, seed=1)
    ids = torch.randint(1, 17, (2, 7), generator=torch.Generator().manual_seed(0))
    ids[:, -1] = 18
    unet = peer.unet.double()
    text_encoder = peer.text_encoder.double()
    return {
        "unet": relative(ours["unet"](x, 999, context), unet(x, 999, context).sample),
        "text_encoder": relative(
            ours["text_encoder"](ids),
            text_encoder(ids).last_hidden_state,
        ),
    }


def check(folder: Path, peer: StableDiffusionPipeline | None = None, **options) -> None:
    """The file in `folder` does to our networks what it does to the peer's, and does something.

    Without a `peer` that is adapted already, a new one reads the file.
    """
    if peer is None:
        peer = peer_pipeline()
        peer.load_lora_weights(folder, weight_name=NAME, **options)
    networks = our_networks()
    found, unused = read_file(folder / NAME, networks)
    assert unused == []
    assert found
    ours = apply(found, networks)
    assert max(differences(ours, peer).values()) < 1e-9

    without = differences(our_networks(), peer)
    assert all(without[part] > 1e-3 for part in found)


# -------------------- the families of files

@pytest.mark.parametrize(
    "convert, targets, peer_reads_it",
    [
        (dict, UNET_TARGETS, True),
        (convert_state_dict_to_diffusers, ATTENTION, True),
        # A mixture of names, of which the peer itself reads only one kind.
        (convert_state_dict_to_diffusers, UNET_TARGETS, False),
    ],
    ids=["peft", "diffusers", "mixed"],
)
def test_a_file_that_diffusers_saved(tmp_path, convert, targets, peer_reads_it):
    """As the adapters that were saved, and as the peer reads them."""
    peer = peer_pipeline()
    adapt(peer, unet_targets=targets)
    saved = []
    for network in (peer.unet, peer.text_encoder):
        tensors = convert(get_peft_model_state_dict(network))
        saved.append({name: t.contiguous() for name, t in tensors.items()})
    StableDiffusionPipeline.save_lora_weights(tmp_path, *saved)
    check(tmp_path, peer)
    if peer_reads_it:
        check(tmp_path)


ALPHA_PATTERNS = dict(
    alpha=6.0,
    alpha_pattern={"to_k": 2.0, "down_blocks.0.resnets.0.conv1": 10.0, "layers.1.mlp.fc1": 1.0},
    rank_pattern={"to_k": 3},
)


@pytest.mark.parametrize(
    "options",
    [
        dict(alpha=6.0),
        dict(alpha=6.0, use_rslora=True),
        ALPHA_PATTERNS,
        dict(alpha=6.0, use_dora=True),
    ],
    ids=["one alpha", "rslora", "patterns", "dora"],
)
def test_the_alpha_of_the_metadata_overrules_the_rank(tmp_path, options):
    peer = peer_pipeline()
    adapt(peer, **options)

    def settings(network: nn.Module, targets: tuple[str, ...]) -> dict:
        config = network.peft_config["default"].to_dict()
        return {**config, "target_modules": sorted(targets)}

    StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        get_peft_model_state_dict(peer.unet),
        get_peft_model_state_dict(peer.text_encoder),
        unet_lora_adapter_metadata=settings(peer.unet, UNET_TARGETS),
        text_encoder_lora_adapter_metadata=settings(peer.text_encoder, TEXT_TARGETS),
    )
    check(tmp_path, peer)
    # The peer does not find the magnitudes of its own text encoder.
    if "use_dora" not in options:
        check(tmp_path)


def test_a_file_of_the_unet_alone_names_no_part_anywhere(tmp_path):
    peer = peer_pipeline()
    adapt(peer, alpha=6.0)
    peer.text_encoder.delete_adapter("default")
    peer.unet.save_lora_adapter(tmp_path, weight_name=NAME)
    check(tmp_path, peer)


def with_adapter_name(name: str) -> str:
    return name.replace(".weight", ".default.weight")


def with_base_model_first(name: str) -> str:
    return f"base_model.model.{name}"


def with_base_model_after_the_part(name: str) -> str:
    part, _, rest = name.partition(".")
    return f"{part}.base_model.model.{rest}"


def without_part(name: str) -> str:
    return name.partition(".")[2]


@pytest.mark.parametrize(
    "rename",
    [
        with_adapter_name,
        with_base_model_first,
        with_base_model_after_the_part,
        without_part,
    ],
)
def test_other_prefixes_of_peft(tmp_path, rename):
    peer = peer_pipeline()
    adapt(peer)
    tensors = {rename(name): t for name, t in adapter_tensors(peer).items()}
    save_file(tensors, tmp_path / NAME)
    check(tmp_path, peer)


def attention_processor_name(name: str) -> str:
    """peft's name -> the name in the older versions of diffusers with attention processors."""
    layer, _, matrix = name.partition(".lora_")
    stem, _, end = layer.replace(".to_out.0", ".to_out").rpartition(".")
    if name.startswith("unet."):
        stem += ".processor"
    else:
        end = "to_" + end.removesuffix("_proj")
    way = "down" if matrix.startswith("A") else "up"
    return f"{stem}.{end}_lora.{way}.weight"


def test_older_diffusers_with_attention_processors(tmp_path):
    peer = peer_pipeline()
    adapt(peer, unet_targets=ATTENTION)
    peer.text_encoder.delete_adapter("default")
    targets = ["q_proj", "v_proj", "out_proj"]
    config = LoraConfig(r=4, lora_alpha=4, target_modules=targets)
    peer.text_encoder.add_adapter(config)
    for i, (name, p) in enumerate(peer.text_encoder.named_parameters()):
        if ".lora_" in name:
            p.data = 0.3 * normal(*p.shape, seed=i).float().double()

    tensors = adapter_tensors(peer)
    file = {attention_processor_name(name): tensor for name, tensor in tensors.items()}
    assert len(file) == len(tensors)
    assert f"unet.{Q.replace('to_q', 'processor.to_q')}_lora.down.weight" in file
    assert any(name.endswith("self_attn.to_out_lora.up.weight") for name in file)
    save_file(file, tmp_path / NAME)
    check(tmp_path, peer)
    check(tmp_path)


# -------------------- kohya

def kohya_name(name: str) -> str:
    name = name.replace("unet.", "lora_unet_").replace("text_encoder.", "lora_te1_")
    return name.replace(".", "_")


def test_kohya_with_the_names_of_diffusers(tmp_path):
    peer = peer_pipeline()
    adapt(peer)
    file = convert_state_dict_to_kohya(adapter_tensors(peer))
    for name in file:
        if name.endswith(".alpha"):
            file[name] = torch.tensor(3.0)
    assert f"{kohya_name('unet.' + Q)}.lora_down.weight" in file

    older = {}
    for name, tensor in file.items():
        older[name.replace("lora_te1_", "lora_te_text_model_")] = tensor
    assert any(name.startswith("lora_te_text_model_encoder_layers_0_") for name in older)
    for tensors in (file, older):
        save_file(tensors, tmp_path / NAME)
        check(tmp_path)


def test_each_layer_of_kohya_has_its_own_alpha(tmp_path):
    """Compared with the adapters that were saved: the peer reads one alpha for all attention."""
    peer = peer_pipeline()
    adapt(peer)
    file = convert_state_dict_to_kohya(adapter_tensors(peer))
    for part in PARTS:
        for i, (name, layer) in enumerate(getattr(peer, part).named_modules()):
            if isinstance(layer, LoraLayer):
                alpha = 1.0 + i % 5
                layer.scaling["default"] = alpha / 4
                key = f"{kohya_name(f'{part}.{name}')}.alpha"
                assert key in file
                file[key] = torch.tensor(alpha)
    save_file(file, tmp_path / NAME)
    check(tmp_path, peer)


def kohya_with_original_names(peer: StableDiffusionPipeline) -> dict[str, Tensor]:
    """kohya's file of the U-Net's adapters with the original code's names.

    The names come from the peer's own conversion, applied to tensors that are names.
    """
    config = UNetConfig(**SIZES)
    _, network = peer_networks()
    prefix = "model.diffusion_model."
    keys = [prefix + unet_original_name(name, config) for name in network.state_dict()]
    original = convert_ldm_unet_checkpoint({key: key for key in keys}, SIZES)

    alpha = float(peer.unet.peft_config["default"].lora_alpha)
    file = {}
    for key, tensor in adapter_tensors(peer).items():
        if not key.startswith("unet."):
            continue
        name, matrix = key.removeprefix("unet.").split(".lora_")
        stem = original[f"{name}.weight"].removeprefix(prefix).removesuffix(".weight")
        stem = "lora_unet_" + stem.replace(".", "_")
        way = "down" if matrix.startswith("A") else "up"
        file[f"{stem}.lora_{way}.weight"] = tensor
        file[f"{stem}.alpha"] = torch.tensor(alpha)
    return file


def test_kohya_with_the_original_names(tmp_path):
    """As the adapters that were saved, and as the peer reads what it can read.

    In an up-sampler that follows no attention the peer looks for an attention.
    """
    peer = peer_pipeline()
    adapt(peer, alpha=6.0)
    file = kohya_with_original_names(peer)
    assert "lora_unet_input_blocks_1_1_proj_in.alpha" in file
    assert "lora_unet_middle_block_0_in_layers_2.alpha" in file
    assert "lora_unet_output_blocks_1_1_conv.alpha" in file
    save_file(file, tmp_path / NAME)
    peer.text_encoder.delete_adapter("default")
    check(tmp_path, peer)

    readable = {key: t for key, t in file.items() if "_output_blocks_1_1_conv." not in key}
    save_file(readable, tmp_path / NAME)
    check(tmp_path, unet_config=peer.unet.config)


def test_several_at_once_with_their_strengths(tmp_path):
    peer = peer_pipeline()
    networks = our_networks()
    for i, (rank, strength) in enumerate([(4, 0.7), (2, -0.4)]):
        source = peer_pipeline()
        adapt(source, rank=rank, alpha=3.0, seed=i)
        file = tmp_path / f"{i}.safetensors"
        save_file(convert_state_dict_to_kohya(adapter_tensors(source)), file)
        peer.load_lora_weights(tmp_path, weight_name=file.name, adapter_name=f"n{i}")
        found, _ = read_file(file, networks)
        apply(found, networks, strength)
    peer.set_adapters(["n0", "n1"], [0.7, -0.4])
    assert max(differences(networks, peer).values()) < 1e-9


# -------------------- peft's own folders

PEFT_OPTIONS = {
    "the defaults": {},
    "alpha": dict(r=4, lora_alpha=16),
    "rsLoRA": dict(r=4, lora_alpha=16, use_rslora=True),
    "alpha_pattern": dict(
        r=4,
        lora_alpha=16,
        alpha_pattern={"to_k": 2, "^conv_in": 3, r"down_blocks\.0.*to_v": 5.5},
    ),
    "rank_pattern": dict(r=4, lora_alpha=6, rank_pattern={"to_k": 2, "conv_out": 7}),
    "both patterns and rsLoRA": dict(
        r=4,
        lora_alpha=6,
        rank_pattern={"to_k": 2},
        alpha_pattern={"attn1.to_k": 3},
        use_rslora=True,
    ),
    "DoRA": dict(r=4, lora_alpha=6, use_dora=True),
    "DoRA and rsLoRA": dict(r=4, lora_alpha=6, use_dora=True, use_rslora=True),
}


def save_peft(folder: Path, **options):
    """The peer's U-Net with a random adapter, saved by `peft` into a folder."""
    targets = list(UNET_TARGETS)
    _, unet = copy.deepcopy(peer_networks())
    network = get_peft_model(unet, LoraConfig(target_modules=targets, **options))
    for i, (name, p) in enumerate(network.named_parameters()):
        if ".lora_" in name:
            p.data = 0.3 * normal(*p.shape, seed=i)
    network.save_pretrained(folder)
    return network


def our_base() -> Base:
    return Base("tiny", **our_networks())


@torch.no_grad()
def unet_difference(base: Base, peer: nn.Module) -> float:
    x = normal(2, 4, 8, 8)
    context = normal(2, 7, 12, seed=1)
    return relative(base.unet(x, 999, context), peer(x, 999, context).sample)


@pytest.mark.parametrize("options", PEFT_OPTIONS.values(), ids=PEFT_OPTIONS.keys())
def test_the_adapter_config_of_peft_is_obeyed(tmp_path, capsys, options):
    peer = save_peft(tmp_path, **options)
    assert unet_difference(our_base(), peer) > 1e-3
    for name in (tmp_path, tmp_path / "adapter_model.safetensors"):
        base = our_base()
        load_lora(str(name), base)
        assert unet_difference(base, peer) < 1e-9
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("dora", [False, True])
def test_the_strength_of_peft_counts_for_the_product_of_the_matrices(tmp_path, dora):
    peer = save_peft(tmp_path, r=4, lora_alpha=6, use_dora=dora)
    for layer in peer.modules():
        if isinstance(layer, LoraLayer):
            layer.scale_layer(0.4)
    base = our_base()
    load_lora(f"{tmp_path}:0.4", base)
    assert unet_difference(base, peer) < 1e-9


def test_a_missing_adapter_config_is_reported(tmp_path, capsys):
    peer = save_peft(tmp_path, r=4, lora_alpha=4)
    (tmp_path / "adapter_config.json").unlink()
    base = our_base()
    load_lora(str(tmp_path), base)
    assert unet_difference(base, peer) < 1e-9
    assert "no adapter_config.json" in capsys.readouterr().err


PEFT_REFUSED = {
    "another type": (dict(peft_type="LOHA"), "peft_type is 'LOHA'"),
    "AdaLoRA": (dict(peft_type="ADALORA"), "peft_type is 'ADALORA'"),
    "PiSSA": (dict(init_lora_weights="pissa_niter_4"), "init_lora_weights is 'pissa_niter_4'"),
    "OLoRA": (dict(init_lora_weights="olora"), "init_lora_weights is 'olora'"),
    "biases": (dict(lora_bias=True), "lora_bias is True"),
    "some tokens": (dict(alora_invocation_tokens=[3]), "alora_invocation_tokens is [3]"),
    "alpha in words": (dict(lora_alpha="many"), "TypeError"),
    "no alpha": (dict(lora_alpha=None, alpha_pattern=3), "adapter_model.safetensors"),
    "DoRA without magnitudes": (dict(use_dora=True), "without the magnitude"),
}


@pytest.mark.parametrize("changes, says", PEFT_REFUSED.values(), ids=PEFT_REFUSED.keys())
def test_settings_of_peft_that_are_not_supported_are_refused(tmp_path, changes, says):
    save_peft(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError) as error:
        load_lora(str(tmp_path), our_base())
    assert says in str(error.value)


@pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "orthogonal"])
def test_ways_to_initialise_that_leave_the_base_alone_are_accepted(tmp_path, init):
    peer = save_peft(tmp_path, r=4)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(init_lora_weights=init)))
    base = our_base()
    load_lora(str(tmp_path), base)
    assert unet_difference(base, peer) < 1e-9


@pytest.mark.parametrize("ending", ["pt", "bin", "ckpt"])
def test_a_lora_under_state_dict_is_read(tmp_path, ending):
    peer = peer_pipeline()
    adapt(peer)
    path = tmp_path / f"lora.{ending}"
    torch.save({"state_dict": adapter_tensors(peer), "epoch": 3}, path)
    base = our_base()
    load_lora(str(path), base)
    assert max(differences(base.networks, peer).values()) < 1e-9


@pytest.mark.parametrize("saved", [[torch.ones(2)], torch.ones(2), 3], ids=type)
def test_a_saved_object_that_is_no_dictionary_is_refused(tmp_path, saved):
    path = tmp_path / "lora.pt"
    torch.save(saved, path)
    with pytest.raises(ValueError, match="it holds a (list|Tensor|int)"):
        load_lora(str(path), our_base())


# -------------------- shapes

class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 5)
        self.point = nn.Conv2d(6, 5, 1)
        self.wide = nn.Conv2d(6, 5, (3, 1))


@pytest.mark.parametrize(
    "name, a, b",
    [
        ("linear", (2, 6), (5, 2)),
        ("linear", (2, 6, 1, 1), (5, 2, 1, 1)),
        ("point", (2, 6, 1, 1), (5, 2, 1, 1)),
        ("point", (2, 6), (5, 2)),
        ("wide", (2, 6, 3, 1), (5, 2, 1, 1)),
        ("wide", (2, 6, 3, 1), (5, 2)),
        ("linear", (1, 6), (5, 1)),
    ],
)
def test_shapes_of_linear_layers_and_convolutions_fit_either(name, a, b):
    network = Layers().double()
    layer = network.get_submodule(name)
    A = normal(*a)
    B = normal(*b, seed=1)
    before = layer.weight.clone()
    bias = layer.bias

    file = {f"unet.{name}.lora_A.weight": A, f"unet.{name}.lora_B.weight": B}
    found, unused = read_lora(file, None, {"unet": network})
    assert unused == []
    assert found["unet"].keys() == {name}
    assert found["unet"][name].scale == 1.0

    apply_lora(network, found["unet"], 0.5)
    change = torch.einsum("or,ri->oi", B.reshape(5, -1), A.reshape(a[0], -1))
    expected = before + 0.5 * change.reshape(before.shape)
    layer = network.get_submodule(name)
    assert torch.allclose(layer.weight, expected, rtol=0, atol=1e-14)
    assert layer.bias is bias


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_change_of_half_precision_weights_is_rounded_once(dtype):
    network = Layers().to(dtype)
    A = 0.01 * normal(2, 6).half()
    B = 0.1 * normal(5, 2, seed=1).half()
    exact = network.linear.weight.float() + 0.3 * (B.float() @ A.float())
    apply_lora(network, {"linear": LoRAPair(A, B, 0.6)}, 0.5)
    assert network.linear.weight.dtype == dtype
    assert torch.equal(network.linear.weight, exact.to(dtype))


K = Q.replace("attn1.to_q", "attn2.to_k")  # its weight is [8, 12]


@pytest.mark.parametrize(
    "stem, down, up",
    [
        (f"unet.{K}", "lora_A", "lora_B"),
        (f"lora_unet_{K.replace('.', '_')}", "lora_down", "lora_up"),
    ],
    ids=["peft", "kohya"],
)
@pytest.mark.parametrize(
    "a, b, expected",
    [
        ((4, 768), (8, 4), "DOWN.weight is [4, 768], expected [4, 12]"),
        ((4, 12), (320, 4), "UP.weight is [320, 4], expected [8, 4]"),
        ((4, 12), (8, 3), "UP.weight is [8, 3], expected [8, 4]"),
    ],
)
def test_a_file_for_another_base_is_refused_by_key_and_shape(stem, down, up, a, b, expected):
    file = {f"{stem}.{down}.weight": normal(*a), f"{stem}.{up}.weight": normal(*b)}
    with pytest.raises(ValueError) as error:
        read_lora(file, None, our_networks())
    message = expected.replace("DOWN", down).replace("UP", up)
    assert f"{stem}.{message}" in str(error.value)
    assert "another base" in str(error.value)


def test_a_kernel_of_another_size_is_refused():
    file = {
        "unet.conv_in.lora_A.weight": normal(2, 4, 1, 1),
        "unet.conv_in.lora_B.weight": normal(8, 2, 1, 1),
    }
    message = r"conv_in.lora_A.weight is \[2, 4, 1, 1\], expected \[2, 4, 3, 3\]"
    with pytest.raises(ValueError, match=message):
        read_lora(file, None, our_networks())


# -------------------- unknown keys

KOHYA_Q = f"lora_unet_{Q.replace('.', '_')}"
TE2 = "lora_te2_text_model_encoder_layers_0_mlp_fc1"

HARMLESS = [
    f"unet.{Q}.alpha",
    "lora_unet_nothing.alpha",
    f"{KOHYA_Q.replace('to_q', 'to_v')}.alpha",
    "lora_te_text_model_encoder_layers_23_mlp_fc1.lora_down.weight",
    "lora_te_text_projection.lora_up.weight",
    "text_model.embeddings.position_ids",
    "step",
    "global_step",
]


@pytest.mark.parametrize("key", HARMLESS)
def test_harmless_keys_are_left_out_and_named(key):
    good = {f"unet.{Q}.lora_A.weight": normal(2, 8), f"unet.{Q}.lora_B.weight": normal(8, 2)}
    found, unused = read_lora(good | {key: torch.tensor(1.0)}, None, our_networks())
    assert list(found) == ["unet"]
    assert list(found["unet"]) == [Q]
    assert found["unet"][Q].scale == 1.0
    assert unused == [key]


# Keys beside a pair that fits, and the words that the error must have.
APPLIED_IN_PART = {
    "text_encoder_2.text_model.x.lora_A.weight": "SDXL",
    f"{TE2}.lora_down.weight": "SDXL",
    "lora_te2_text_model_encoder_layers_0_self_attn_q_proj.lora_up.weight": "SDXL",
    "lora_unet_input_blocks_7_1_transformer_blocks_9_attn1_to_q.lora_up.weight": "SDXL",
    "unet.mid_block.attentions.0.transformer_blocks.3.ff.net.2.lora_A.weight": "SDXL",
    "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": "Flux",
    "transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": "Flux",
    "lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight": "Stable Diffusion 3",
    "transformer.transformer_blocks.0.attn.add_q_proj.lora_A.weight": "Stable Diffusion 3",
    "diffusion_model.blocks.0.self_attn.q.lora_A.weight": "Wan",
    "down_blocks.0.motion_modules.0.proj_in.lora_A.weight": "AnimateDiff",
    f"{KOHYA_Q}.dora_scale": "DoRA in the spelling of LyCORIS",
    f"{KOHYA_Q}.hada_w1_a": "LoHa",
    f"base_model.model.{Q}.hada_w2_b": "LoHa",
    f"{KOHYA_Q}.hada_t1": "LoHa",
    f"{KOHYA_Q}.lokr_w1": "LoKr",
    f"{KOHYA_Q}.lokr_t2": "LoKr",
    f"{KOHYA_Q}.oft_blocks": "OFT",
    f"base_model.model.{Q}.oft_R.weight": "OFT",
    f"base_model.model.{Q}.boft_R": "BOFT",
    f"base_model.model.{Q}.ia3_l": "IA3",
    f"{KOHYA_Q}.on_input": "IA3",
    f"{KOHYA_Q}.a1.weight": "GLoRA",
    "lora_unet_conv_norm_out.w_norm": "norms",
    "lora_unet_conv_norm_out.b_norm": "norms",
    f"{KOHYA_Q}.diff_b": "whole weights",
    f"{KOHYA_Q}.lora_mid.weight": "Tucker",
    f"unet.{Q}.lora_E": "AdaLoRA",
    f"unet.{Q}.lora_B.bias": "LoRA with a bias",
    f"base_model.model.{Q}.vera_lambda_b": "VeRA",
    "bundle_emb.word.string_to_param.*": "textual inversion",
    "clip_l": "textual inversion",
    f"unet.{Q.replace('to_q', 'to_k')}.lora_A.weight": "without the B",
    f"unet.{Q.replace('to_q', 'to_k')}.lora_B.weight": "without the A",
    f"unet.{Q.replace('to_q', 'to_k')}.lora_magnitude_vector": "without the A and B",
    "text_encoder.conv_in.lora_A.weight": "belong to no layer",
    "transformer.transformer_blocks.0.attn1.to_q.lora_A.weight": "belong to no layer",
    "lora_vae_decoder_conv_in.lora_down.weight": "belong to no layer",
    "unet.nothing.lora_A.weight": "belong to no layer",
}


@pytest.mark.parametrize("key, says", APPLIED_IN_PART.items(), ids=APPLIED_IN_PART.keys())
def test_a_file_of_which_only_a_part_would_apply_is_refused_by_name(key, says):
    good = {f"unet.{Q}.lora_A.weight": normal(2, 8), f"unet.{Q}.lora_B.weight": normal(8, 2)}
    with pytest.raises(ValueError) as error:
        read_lora(good | {key: normal(2, 8)}, None, our_networks())
    assert says in str(error.value)
    assert key in str(error.value)
    # `reading` passes on this many characters.
    assert str(error.value).index(says) < 200


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.uint8, torch.bool])
def test_integers_in_the_place_of_a_matrix_are_refused(dtype):
    file = {
        f"unet.{Q}.lora_A.weight": normal(2, 8),
        f"unet.{Q}.lora_B.weight": torch.ones(8, 2, dtype=dtype),
    }
    with pytest.raises(ValueError, match="lora_B.weight is of .*; expected floating point"):
        read_lora(file, None, our_networks())


def test_8_bit_floats_are_read():
    A = normal(2, 8).to(torch.float8_e4m3fn)
    B = normal(8, 2).to(torch.float8_e5m2)
    file = {f"unet.{Q}.lora_A.weight": A, f"unet.{Q}.lora_B.weight": B}
    networks = our_networks()
    before = networks["unet"].get_submodule(Q).weight
    found, _ = read_lora(file, None, networks)
    after = apply(found, networks)["unet"].get_submodule(Q).weight
    assert torch.equal(after, before + (B.float() @ A.float()).double())


def test_two_lora_of_one_layer_in_a_file_are_refused():
    file = {f"unet.{Q}.lora_A.{name}.weight": normal(2, 8) for name in ("default", "other")}
    message = "lora_A.other.weight and .*lora_A.default.weight are of one layer"
    with pytest.raises(ValueError, match=message):
        read_lora(file, None, our_networks())


def test_reading_changes_neither_the_file_nor_the_networks():
    networks = our_networks()
    file = {f"unet.{Q}.lora_A.weight": normal(2, 8), f"unet.{Q}.lora_B.weight": normal(8, 2)}
    before = copy.deepcopy(networks["unet"].state_dict())
    keys = list(file)
    settings = json.dumps({"unet.r": 2, "unet.lora_alpha": 8})
    read_lora(file, {"lora_adapter_metadata": settings}, networks)
    assert list(file) == keys
    for name, tensor in networks["unet"].state_dict().items():
        assert torch.equal(tensor, before[name])


# -------------------- writing

@torch.no_grad()
@pytest.mark.parametrize("kohya", [False, True], ids=["diffusers", "kohya"])
@pytest.mark.parametrize("rank, alpha", [(4, 8), (3, 1.5)])
def test_diffusers_reads_what_we_write_at_the_same_strength(tmp_path, kohya, rank, alpha):
    networks = our_networks()
    file: dict[str, Tensor] = {}
    layers = 0
    for part, targets in [("unet", UNET_TARGETS), ("text_encoder", TEXT_TARGETS)]:
        network = networks[part]
        add_lora(network, targets, rank, alpha)
        for i, (name, p) in enumerate(network.named_parameters()):
            if ".lora_" in name:
                p.data = 0.3 * normal(*p.shape, seed=i).float().double()
        for layer in network.modules():
            if type(layer).__name__.startswith("LoRA"):
                layers += 1
        file |= write_lora(network, part, kohya)
    assert len(file) == (3 if kohya else 2) * layers
    save_file(file, tmp_path / NAME)

    peer = peer_pipeline()
    peer.load_lora_weights(tmp_path, weight_name=NAME)
    assert max(differences(networks, peer).values()) < 1e-9

    ours = our_networks()
    found, unused = read_file(tmp_path / NAME, ours)
    assert unused == []
    assert max(differences(apply(found, ours), peer).values()) < 1e-9
    assert min(differences(our_networks(), peer).values()) > 1e-3

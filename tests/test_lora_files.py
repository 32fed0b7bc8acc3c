"""LoRA files: what `peft` and `diffusers` write changes our networks as it changes theirs, and they read what we
write."""

import copy
import functools
import json

import pytest
import torch
from conftest import normal, randomise, relative
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_kohya
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from files.formats import apply_lora, read_lora, unet_original_name, write_lora
from models.clip import TextConfig, TextEncoder
from models.lora import add_lora
from models.unet import UNet, UNetConfig

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = dict(block_out_channels=(8, 16, 24), layers_per_block=1, norm_num_groups=4, cross_attention_dim=12,
             attention_head_dim=2, down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
             up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"))
TEXT = dict(vocab_size=19, hidden_size=12, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=7, hidden_act="gelu")
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
UNET_TARGETS = (*ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2", "conv_shortcut",
                "conv", "conv_in", "conv_out", "time_emb_proj", "linear_1", "linear_2")
TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
NAME = "pytorch_lora_weights.safetensors"
Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


def short(network: nn.Module) -> nn.Module:
    """Numbers that float32 holds, in float64: nothing is rounded where a peer goes through float32."""
    for p in network.parameters():
        p.data = p.data.float().double()
    return network


@functools.cache
def peer_networks() -> tuple[CLIPTextModel, UNet2DConditionModel]:
    text = CLIPTextModel(CLIPTextConfig(**TEXT, eos_token_id=18, bos_token_id=0, pad_token_id=1)).eval()
    return short(randomise(text.double())), short(randomise(UNet2DConditionModel(**SIZES).double(), 1))


def peer_pipeline() -> StableDiffusionPipeline:
    """A fresh one, always of the same weights."""
    text, unet = copy.deepcopy(peer_networks())
    vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2)
    return StableDiffusionPipeline(vae, text, None, unet, DDIMScheduler(), None, None, requires_safety_checker=False)


def our_networks() -> dict[str, nn.Module]:
    """With the weights of the peer."""
    text, unet = peer_networks()
    ours = {"unet": UNet(UNetConfig(**SIZES)), "text_encoder": TextEncoder(TextConfig(**TEXT, eos_token_id=18))}
    ours["unet"].double().load_state_dict(unet.state_dict())
    ours["text_encoder"].double().load_state_dict(
        {f"text_model.{name.removeprefix('text_model.')}": t for name, t in text.state_dict().items()})
    return ours


def adapt(pipeline: StableDiffusionPipeline, rank: int = 4, alpha: float = 4.0, seed: int = 0,
          unet_targets: tuple[str, ...] = UNET_TARGETS, **options) -> None:
    """Adapters of peft on both networks, drawn at random."""
    for network, targets in ((pipeline.unet, unet_targets), (pipeline.text_encoder, TEXT_TARGETS)):
        before = {id(p) for p in network.parameters()}
        network.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), **options))
        for i, p in enumerate(network.parameters()):
            if id(p) not in before:
                p.data = 0.3 * normal(*p.shape, seed=1000 * seed + i)
        short(network)


def layers(network: nn.Module) -> dict[str, Tensor]:
    return get_peft_model_state_dict(network)


def packed(pipeline: StableDiffusionPipeline) -> dict[str, Tensor]:
    """As peft names them, with `unet.` and `text_encoder.`."""
    return {f"{part}.{name}": t.contiguous() for part in ("unet", "text_encoder")
            for name, t in layers(getattr(pipeline, part)).items()}


def read_file(path, networks: dict[str, nn.Module]):
    with safe_open(path, "pt") as file:
        return read_lora(load_file(path), file.metadata(), networks)


def apply(found, networks: dict[str, nn.Module], strength: float = 1.0) -> dict[str, nn.Module]:
    for part, pairs in found.items():
        apply_lora(networks[part], pairs, strength)
    return networks


@torch.no_grad()
def differences(ours: dict[str, nn.Module], peer: StableDiffusionPipeline) -> list[float]:
    x, context = normal(2, 4, 8, 8), normal(2, 7, 12, seed=1)
    ids = torch.randint(1, 17, (2, 7), generator=torch.Generator().manual_seed(0))
    ids[:, -1] = 18
    peer.unet.double(), peer.text_encoder.double()
    return [relative(ours["unet"](x, 999, context), peer.unet(x, 999, context).sample),
            relative(ours["text_encoder"](ids), peer.text_encoder(ids).last_hidden_state)]


def check(folder, peer: StableDiffusionPipeline | None = None, **options) -> None:
    """The file in `folder` means to our networks what it means to the peer's, and means something."""
    if peer is None:
        peer = peer_pipeline()
        peer.load_lora_weights(folder, weight_name=NAME, **options)
    networks = our_networks()
    found, unknown = read_file(folder / NAME, networks)
    assert unknown == []
    ours = apply(found, networks)
    assert max(differences(ours, peer)) < 1e-9
    touched = [part for part in ("unet", "text_encoder") if part in found]
    plain = dict(zip(("unet", "text_encoder"), differences(our_networks(), peer)))
    assert touched and all(plain[part] > 1e-3 for part in touched)


# ------------------------------------------------------------------------------------------------------------- families


@pytest.mark.parametrize("convert, targets, whole", [
    (dict, UNET_TARGETS, True), (convert_state_dict_to_diffusers, ATTENTION, True),
    (convert_state_dict_to_diffusers, UNET_TARGETS, False)], ids=["peft", "diffusers", "mixed"])
def test_a_file_that_diffusers_saved(tmp_path, convert, targets, whole):
    """The adapters themselves and, but for the mixed names of which it reads only one kind, the peer's reading."""
    peer = peer_pipeline()
    adapt(peer, unet_targets=targets)
    StableDiffusionPipeline.save_lora_weights(tmp_path, *(
        {name: t.contiguous() for name, t in convert(layers(network)).items()}
        for network in (peer.unet, peer.text_encoder)))
    check(tmp_path, peer)
    if whole:
        check(tmp_path)


@pytest.mark.parametrize("options", [
    dict(alpha=6.0), dict(alpha=6.0, use_rslora=True),
    dict(alpha=6.0, alpha_pattern={"to_k": 2.0, "down_blocks.0.resnets.0.conv1": 10.0, "layers.1.mlp.fc1": 1.0},
         rank_pattern={"to_k": 3})], ids=["one alpha", "rslora", "patterns"])
def test_the_headers_alpha_overrides_the_rank(tmp_path, options):
    peer = peer_pipeline()
    adapt(peer, **options)
    headers = [{**network.peft_config["default"].to_dict(), "target_modules": sorted(targets)}
               for network, targets in ((peer.unet, UNET_TARGETS), (peer.text_encoder, TEXT_TARGETS))]
    StableDiffusionPipeline.save_lora_weights(
        tmp_path, layers(peer.unet), layers(peer.text_encoder), unet_lora_adapter_metadata=headers[0],
        text_encoder_lora_adapter_metadata=headers[1])
    check(tmp_path, peer)
    check(tmp_path)


def test_a_file_of_the_unet_alone_has_neither_prefix_nor_part_in_its_header(tmp_path):
    peer = peer_pipeline()
    adapt(peer, alpha=6.0)
    peer.text_encoder.delete_adapter("default")
    peer.unet.save_lora_adapter(tmp_path, weight_name=NAME)
    check(tmp_path, peer)


@pytest.mark.parametrize("rename", [
    lambda name: name.replace(".weight", ".default.weight"),
    lambda name: f"base_model.model.{name}",
    lambda name: name.replace("unet.", "unet.base_model.model.").replace("encoder.", "encoder.base_model.model.", 1),
    lambda name: name.removeprefix("unet.").removeprefix("text_encoder."),
], ids=["with an adapter's name", "base_model first", "base_model after the part", "without the part"])
def test_other_prefixes_of_peft(tmp_path, rename):
    peer = peer_pipeline()
    adapt(peer)
    save_file({rename(name): t for name, t in packed(peer).items()}, tmp_path / NAME)
    check(tmp_path, peer)


def test_older_diffusers_with_attention_processors(tmp_path):
    peer = peer_pipeline()
    adapt(peer, unet_targets=ATTENTION)
    peer.text_encoder.delete_adapter("default")
    peer.text_encoder.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj", "v_proj", "out_proj"]))
    for i, (name, p) in enumerate(peer.text_encoder.named_parameters()):
        if ".lora_" in name:
            p.data = 0.3 * normal(*p.shape, seed=i).float().double()
    file = {}
    for name, tensor in packed(peer).items():
        name = name.replace(".to_out.0.", ".to_out.").replace("_proj.", ".")
        name = name.replace(".self_attn.", ".self_attn.to_").replace("to_out.lora", "to_out_lora")
        name = name.replace(".lora_A.", "_lora.down.").replace(".lora_B.", "_lora.up.")
        name = name.replace("to_out_lora_lora", "to_out_lora").replace("to_out_lora_A", "to_out_lora.down")
        name = name.replace("to_out_lora_B", "to_out_lora.up")
        if name.startswith("unet."):
            name = name.replace(".attn1.", ".attn1.processor.").replace(".attn2.", ".attn2.processor.")
        file[name] = tensor
    assert f"unet.{Q.replace('to_q', 'processor.to_q')}_lora.down.weight" in file
    assert any(name.endswith("self_attn.to_out_lora.up.weight") for name in file)
    save_file(file, tmp_path / NAME)
    check(tmp_path, peer)
    check(tmp_path)


def kohya_name(name: str) -> str:
    return name.replace("unet.", "lora_unet_").replace("text_encoder.", "lora_te1_").replace(".", "_")


def test_kohya_with_diffusers_names(tmp_path):
    peer = peer_pipeline()
    adapt(peer)
    file = convert_state_dict_to_kohya(packed(peer))
    file |= {name: torch.tensor(3.0) for name in file if name.endswith(".alpha")}
    assert f"{kohya_name('unet.' + Q)}.lora_down.weight" in file
    older = {name.replace("lora_te1_", "lora_te_text_model_"): t for name, t in file.items()}
    assert any(name.startswith("lora_te_text_model_encoder_layers_0_") for name in older)
    for names in (file, older):
        save_file(names, tmp_path / NAME)
        check(tmp_path)


def test_each_layer_of_kohya_has_its_own_alpha(tmp_path):
    """Against the adapters that the file is of: in attention the peer reads one alpha for all."""
    peer = peer_pipeline()
    adapt(peer)
    file = convert_state_dict_to_kohya(packed(peer))
    for part in ("unet", "text_encoder"):
        for i, (name, layer) in enumerate(getattr(peer, part).named_modules()):
            if isinstance(layer, LoraLayer):
                alpha = 1.0 + i % 5
                layer.scaling["default"] = alpha / 4
                assert f"{kohya_name(f'{part}.{name}')}.alpha" in file
                file[f"{kohya_name(f'{part}.{name}')}.alpha"] = torch.tensor(alpha)
    save_file(file, tmp_path / NAME)
    check(tmp_path, peer)


def ldm_kohya(peer: StableDiffusionPipeline) -> dict[str, Tensor]:
    """kohya's file with the original names, found by way of the peer's own conversion."""
    config = UNetConfig(**SIZES)
    keys = [f"model.diffusion_model.{unet_original_name(name, config)}" for name in peer_networks()[1].state_dict()]
    original = {ours: key.removeprefix("model.diffusion_model.").removesuffix(".weight").replace(".", "_")
                for ours, key in convert_ldm_unet_checkpoint({key: key for key in keys}, SIZES).items()}
    file = {}
    for key, tensor in packed(peer).items():
        if key.startswith("unet."):
            name, role = key.removeprefix("unet.").split(".lora_")
            stem = f"lora_unet_{original[f'{name}.weight']}"
            file[f"{stem}.lora_{dict(A='down', B='up')[role[0]]}.weight"] = tensor
            file[f"{stem}.alpha"] = torch.tensor(float(peer.unet.peft_config["default"].lora_alpha))
    return file


def test_kohya_with_the_original_names(tmp_path):
    """Against the adapters that the file is of, and against the peer's reading of what it reads: in up-samplers after
    no attention it looks for an attention."""
    peer = peer_pipeline()
    adapt(peer, alpha=6.0)
    file = ldm_kohya(peer)
    assert {"lora_unet_input_blocks_1_1_proj_in.alpha", "lora_unet_middle_block_0_in_layers_2.alpha",
            "lora_unet_output_blocks_1_1_conv.alpha"} <= file.keys()
    save_file(file, tmp_path / NAME)
    peer.text_encoder.delete_adapter("default")
    check(tmp_path, peer)
    save_file({key: t for key, t in file.items() if "_output_blocks_1_1_conv." not in key}, tmp_path / NAME)
    check(tmp_path, unet_config=peer.unet.config)


def test_several_at_once_with_their_strengths(tmp_path):
    peer, networks = peer_pipeline(), our_networks()
    for i, rank in enumerate((4, 2)):
        source = peer_pipeline()
        adapt(source, rank=rank, alpha=3.0, seed=i)
        save_file(convert_state_dict_to_kohya(packed(source)), tmp_path / f"{i}.safetensors")
        peer.load_lora_weights(tmp_path, weight_name=f"{i}.safetensors", adapter_name=f"n{i}")
        apply(read_file(tmp_path / f"{i}.safetensors", networks)[0], networks, (0.7, -0.4)[i])
    peer.set_adapters(["n0", "n1"], [0.7, -0.4])
    assert max(differences(networks, peer)) < 1e-9


# ------------------------------------------------------------------------------------------------- shapes, strange keys


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.point, self.wide = nn.Linear(6, 5), nn.Conv2d(6, 5, 1), nn.Conv2d(6, 5, (3, 1))


@pytest.mark.parametrize("name, a, b", [
    ("linear", (2, 6), (5, 2)), ("linear", (2, 6, 1, 1), (5, 2, 1, 1)), ("point", (2, 6, 1, 1), (5, 2, 1, 1)),
    ("point", (2, 6), (5, 2)), ("wide", (2, 6, 3, 1), (5, 2, 1, 1)), ("wide", (2, 6, 3, 1), (5, 2)),
    ("linear", (1, 6), (5, 1))])
def test_linear_and_convolution_shapes_go_to_either(name, a, b):
    network, A, B = Layers().double(), normal(*a), normal(*b, seed=1)
    before, bias = network.get_submodule(name).weight.clone(), network.get_submodule(name).bias
    file = {f"unet.{name}.lora_A.weight": A, f"unet.{name}.lora_B.weight": B}
    found, unknown = read_lora(file, None, {"unet": network})
    assert found["unet"].keys() == {name} and found["unet"][name][2] == 1.0 and unknown == []
    apply_lora(network, found["unet"], 0.5)
    layer = network.get_submodule(name)
    expected = before + 0.5 * torch.einsum("or,ri->oi", B.reshape(5, -1), A.reshape(a[0], -1)).reshape(before.shape)
    assert torch.allclose(layer.weight, expected, rtol=0, atol=1e-14) and layer.bias is bias


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_change_of_half_precision_weights_is_rounded_once(dtype):
    network = Layers().to(dtype)
    A, B = 0.01 * normal(2, 6).half(), 0.1 * normal(5, 2, seed=1).half()
    exact = network.linear.weight.float() + 0.3 * (B.float() @ A.float())
    apply_lora(network, {"linear": (A, B, 0.6)}, 0.5)
    assert network.linear.weight.dtype == dtype and torch.equal(network.linear.weight, exact.to(dtype))


@pytest.mark.parametrize("prefix, down, up", [("unet.", "lora_A", "lora_B"), ("lora_unet_", "lora_down", "lora_up")])
def test_a_file_for_another_base_is_refused_by_key_and_shape(prefix, down, up):
    name = Q.replace("attn1.to_q", "attn2.to_k")
    name = name.replace(".", "_") if prefix.endswith("_") else name
    for wrong, shape, a, b in ((down, [4, 768], (4, 768), (8, 4)), (up, [320, 4], (4, 12), (320, 4)),
                               (up, [8, 3], (4, 12), (8, 3))):
        file = {f"{prefix}{name}.{down}.weight": normal(*a), f"{prefix}{name}.{up}.weight": normal(*b)}
        with pytest.raises(ValueError) as error:
            read_lora(file, None, our_networks())
        expected = [4, 12] if wrong == down else [8, 4]
        for part in (f"{prefix}{name}.{wrong}.weight is {shape}, expected {expected}", "another base"):
            assert part in str(error.value)


def test_a_kernel_of_another_size_is_refused():
    file = {"unet.conv_in.lora_A.weight": normal(2, 4, 1, 1), "unet.conv_in.lora_B.weight": normal(8, 2, 1, 1)}
    with pytest.raises(ValueError, match=r"conv_in.lora_A.weight is \[2, 4, 1, 1\], expected \[2, 4, 3, 3\]"):
        read_lora(file, None, our_networks())


def test_keys_that_belong_to_nothing_are_named():
    A, B = normal(2, 8), normal(8, 2)
    good = {f"unet.{Q}.lora_A.weight": A, f"unet.{Q}.lora_B.weight": B}
    strange = {f"unet.{Q}.alpha": torch.tensor(1.0), "text_encoder_2.text_model.x.lora_A.weight": A,
               "lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": A,
               "lora_unet_nothing.alpha": torch.tensor(1.0), f"unet.{Q}.lora_magnitude_vector": A,
               f"lora_unet_{Q.replace('.', '_')}.dora_scale": A, f"lora_unet_{Q.replace('.', '_')}.hada_w1_a": A,
               f"unet.{Q.replace('to_q', 'to_k')}.lora_A.weight": A, "text_encoder.conv_in.lora_A.weight": A, "step": A}
    found, unknown = read_lora(good | strange, None, our_networks())
    assert list(found) == ["unet"] and list(found["unet"]) == [Q] and found["unet"][Q][2] == 1.0
    assert sorted(unknown) == sorted(strange)


def test_two_lora_of_one_layer_in_a_file_are_refused():
    file = {f"unet.{Q}.lora_A.{name}.weight": normal(2, 8) for name in ("default", "other")}
    with pytest.raises(ValueError, match="lora_A.other.weight and .*lora_A.default.weight are of one layer"):
        read_lora(file, None, our_networks())


def test_reading_changes_neither_file_nor_networks():
    networks = our_networks()
    file = {f"unet.{Q}.lora_A.weight": normal(2, 8), f"unet.{Q}.lora_B.weight": normal(8, 2)}
    before, keys = copy.deepcopy(networks["unet"].state_dict()), list(file)
    read_lora(file, {"lora_adapter_metadata": json.dumps({"unet.r": 2, "unet.lora_alpha": 8})}, networks)
    assert list(file) == keys
    assert all(torch.equal(t, before[name]) for name, t in networks["unet"].state_dict().items())


# -------------------------------------------------------------------------------------------------------------- writing


@torch.no_grad()
@pytest.mark.parametrize("kohya", [False, True], ids=["diffusers", "kohya"])
@pytest.mark.parametrize("rank, alpha", [(4, 8), (3, 1.5)])
def test_diffusers_reads_what_we_write_at_the_same_strength(tmp_path, kohya, rank, alpha):
    networks = our_networks()
    file: dict[str, Tensor] = {}
    for part, targets in (("unet", UNET_TARGETS), ("text_encoder", TEXT_TARGETS)):
        add_lora(networks[part], targets, rank, alpha)
        for i, (name, p) in enumerate(networks[part].named_parameters()):
            if ".lora_" in name:
                p.data = 0.3 * normal(*p.shape, seed=i).float().double()
        file |= write_lora(networks[part], part, kohya)
    assert len(file) == (3 if kohya else 2) * sum(
        type(layer).__name__.startswith("LoRA") for network in networks.values() for layer in network.modules())
    save_file(file, tmp_path / NAME)
    peer = peer_pipeline()
    peer.load_lora_weights(tmp_path, weight_name=NAME)
    assert max(differences(networks, peer)) < 1e-9
    ours = our_networks()
    found, unknown = read_file(tmp_path / NAME, ours)
    assert unknown == [] and max(differences(apply(found, ours), peer)) < 1e-9
    assert min(differences(our_networks(), peer)) > 1e-3

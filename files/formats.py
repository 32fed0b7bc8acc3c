"""Names of other layouts: LoRA files, the original code's one-file models, older checkpoints."""

import json
import re

import torch
from torch import Tensor, nn

from models import clip, t5, unet, vae
from models.lora import LoRAConv2d, LoRALinear, merged_weight

# What kohya's names begin with; theirs have underscores for dots. The first of a part is what is written.
KOHYA = {"lora_unet_": "unet", "lora_te_": "text_encoder", "lora_te1_": "text_encoder",
         "lora_transformer_": "transformer"}
# Of all families: MODULE.lora_A.weight, MODULE.lora_A.default.weight with an adapter's name (peft); MODULE.lora.down,
# MODULE.lora_linear_layer.down, MODULE.processor.to_q_lora.down (diffusers, newer to older); MODULE.lora_down (kohya).
KEY = re.compile(r"(.+?)[._]lora(?:_linear_layer)?[._](A|B|down|up)(?:\.[^.]+)?\.weight")
# Ends of module names, and how the older diffusers wrote them.
OLDER = {"to_out.0": "to_out", "q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}

def module_names(network: nn.Module) -> dict[str, str]:
    """Every name that a file may use for a layer of the network -> the layer's own."""
    names = {}
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            ways = {name, name.removeprefix("text_model.")}  # which newer libraries leave out
            ways |= {way.removesuffix(end) + old for way in ways for end, old in OLDER.items() if way.endswith(end)}
            ways |= {way.replace(".", "_") for way in ways}
            if isinstance(network, unet.UNet) and ".lora_" not in name:
                ways.add(unet_original_name(name, network.config).replace(".", "_"))
            names |= dict.fromkeys(ways, name)
    return names


def key_role(key: str) -> tuple[str, str]:
    """The module that a key names, and what it holds of it: "A", "B", "alpha" or "" for what is no LoRA's."""
    if match := KEY.fullmatch(key):
        return match[1], "A" if match[2] in ("A", "down") else "B"
    return key.removesuffix(".alpha"), "alpha" if key.startswith(tuple(KOHYA)) and key.endswith(".alpha") else ""


def find_module(spelling: str, names: dict[str, dict[str, str]]) -> tuple[str, str] | None:
    """The part and the layer that a file's module name means, given `module_names` of the parts."""
    if prefix := next(filter(spelling.startswith, KOHYA), None):
        parts, spelling = [KOHYA[prefix]], spelling.removeprefix(prefix)
    else:
        parts, spelling = list(names), spelling.removeprefix("base_model.model.").replace(".processor.", ".")
        part, _, rest = spelling.partition(".")
        if part in KOHYA.values():  # a file of one network may name none
            parts, spelling = [part], rest.removeprefix("base_model.model.")
    return next(((part, names[part][spelling]) for part in parts if spelling in names.get(part, ())), None)


def adapter_scale(name: str, rank: int, alpha: float | None, settings: dict) -> float:
    """alpha / rank, the file's alpha unless `settings` (of the header) has one; without any it is the rank."""
    alpha = settings.get("lora_alpha", alpha)
    for pattern, own in (settings.get("alpha_pattern") or {}).items():  # as peft: the end of the name
        if any(re.fullmatch(rf"(.*\.)?({pattern})", way) for way in (name, name.removeprefix("text_model."))):
            alpha = own
            break
    return 1.0 if alpha is None else alpha / (rank**0.5 if settings.get("use_rslora") else rank)


def fits(shape: torch.Size, expected: tuple[int, ...]) -> bool:
    """Whether they are one but for ones at the end: [r, c] and [r, c, 1, 1]."""
    n = max(len(shape), len(expected))
    return len(shape) >= 2 and (*shape, *[1] * (n - len(shape))) == (*expected, *[1] * (n - len(expected)))


def read_lora(tensors: dict[str, Tensor], metadata: dict[str, str] | None, networks: dict[str, nn.Module]
              ) -> tuple[dict[str, dict[str, tuple[Tensor, Tensor, float]]], list[str]]:
    """The tensors of a LoRA file and its header -> {part: {layer: (A, B, scale)}}, scale = alpha / rank, and the keys
    that belong to nothing: of other networks, of other kinds of adapter, half a pair.

    `networks` is {"unet": ..., "text_encoder": ...} or {"transformer": ...}. Alpha is the header's where it has a
    `lora_adapter_metadata`; else kohya's own; else the rank. A `MODULE.alpha` beside names with dots belongs to
    nothing: `diffusers` does not read it. A pair that does not fit its layer is an error: it is for another base."""
    names = {part: module_names(network) for part, network in networks.items()}
    pairs: dict[tuple[str, str], dict[str, str]] = {}  # the keys in the file: of A, of B, of alpha
    unknown = []
    for key in tensors:
        spelling, role = key_role(key)
        place = find_module(spelling, names) if role else None
        if place is None:
            unknown.append(key)
        elif (other := pairs.setdefault(place, {}).setdefault(role, key)) != key:
            raise ValueError(f"{key} and {other} are of one layer; expected one LoRA a file")
    header = json.loads((metadata or {}).get("lora_adapter_metadata") or "{}")
    found: dict[str, dict[str, tuple[Tensor, Tensor, float]]] = {}
    for (part, name), keys in pairs.items():
        if not {"A", "B"} <= keys.keys():
            unknown += keys.values()
            continue
        A, B = tensors[keys["A"]], tensors[keys["B"]]
        out, *rest = networks[part].get_submodule(name).weight.shape
        rank = A.shape[0] if A.ndim else 0
        for key, tensor, expected in ((keys["A"], A, (rank, *rest)), (keys["B"], B, (out, rank))):
            if not rank or not fits(tensor.shape, expected):
                raise ValueError(f"{key} is {list(tensor.shape)}, expected {list(expected)} of rank {rank} for"
                                 f" {part}.{name}: the LoRA is for another base")
        alpha = float(tensors[keys["alpha"]]) if "alpha" in keys else None
        own = {key.removeprefix(part + "."): value for key, value in header.items()}  # a file of one part names none
        found.setdefault(part, {})[name] = A, B, adapter_scale(name, rank, alpha, own)
    return found, unknown


def apply_lora(network: nn.Module, pairs: dict[str, tuple[Tensor, Tensor, float]], strength: float) -> None:
    """Adds strength times the change of one part of `read_lora` to the network's weights. Several LoRA add up."""
    for name, (A, B, scale) in pairs.items():
        layer = network.get_submodule(name)
        W = merged_weight(layer.weight, A, B, strength * scale)
        layer.weight = nn.Parameter(W, requires_grad=layer.weight.requires_grad)


def write_lora(network: nn.Module, part: str, kohya: bool = False) -> dict[str, Tensor]:
    """The network's LoRA layers at their full scale as tensors of a file for `diffusers`, or in kohya's names.

    The scale is multiplied into B, where no reader can miss it: every reader takes a file without alpha as alpha =
    rank, and `diffusers` alone knows of the alpha in a header. Kohya's files have an alpha of their own."""
    tensors = {}
    prefix = next(prefix for prefix, named in KOHYA.items() if named == part) if kohya else f"{part}."
    for name, layer in network.named_modules():
        if isinstance(layer, LoRALinear | LoRAConv2d):
            A, B = layer.lora_A.weight.detach(), layer.lora_B.weight.detach()
            if kohya:
                name = prefix + name.replace(".", "_")
                tensors |= {f"{name}.lora_down.weight": A, f"{name}.lora_up.weight": B,
                            f"{name}.alpha": torch.tensor(float(layer.full_scale * len(A)))}
            else:
                tensors |= {f"{prefix}{name}.lora_A.weight": A, f"{prefix}{name}.lora_B.weight": layer.full_scale * B}
    return tensors


def current_name(network: nn.Module, name: str) -> str | None:
    """A tensor's name in today's layout, None for one to ignore: older VAEs call the attention's layers otherwise, and
    text encoders come with a buffer of positions, and with or without a prefix, or with their embedding twice."""
    if isinstance(network, vae.VAE):
        old = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
        return re.sub(r"(attentions\.\d+)\.(query|key|value|proj_attn)\.", lambda m: f"{m[1]}.{old[m[2]]}.", name)
    if isinstance(network, t5.T5Encoder):
        return None if name == "encoder.embed_tokens.weight" else name
    if isinstance(network, clip.TextEncoder):
        return None if name.endswith("position_ids") else "text_model." + name.removeprefix("text_model.")
    return name

# Names of the original code (CompVis/latent-diffusion) outside the blocks, and in a residual block.
UNET_ORIGINAL = {"conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0",
            "time_embedding.linear_2": "time_embed.2", "conv_norm_out": "out.0", "conv_out": "out.2"}
UNET_ORIGINAL_RES = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
                "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}

def unet_original_name(name: str, config: unet.UNetConfig) -> str:
    """Our name of a tensor or a layer -> the original's, without `model.diffusion_model.`. The original numbers the
    blocks through all levels: each has a residual block, then the attention if any; on the way down one more block is
    the down-sampling, on the way up the up-sampling stands last in the level's last."""
    for ours, theirs in UNET_ORIGINAL.items():
        if f"{name}.".startswith(f"{ours}."):
            return theirs + name.removeprefix(ours)
    side, *level, kind, i, rest = name.split(".", 3 if name.startswith("mid_block") else 4)
    i, n = int(i), config.layers_per_block
    if kind == "resnets":
        layer, _, rest = rest.partition(".")
        rest = f"{UNET_ORIGINAL_RES[layer]}.{rest}".removesuffix(".")
    if side == "mid_block":
        return f"middle_block.{1 if kind == 'attentions' else 2 * i}.{rest}"
    first = int(level[0]) * (n + 1)
    if kind == "downsamplers":
        return f"input_blocks.{first + n + 1}.0.{rest.replace('conv', 'op')}"
    if kind == "upsamplers":
        place = 2 if "CrossAttn" in config.up_block_types[int(level[0])] else 1
        return f"output_blocks.{first + n}.{place}.{rest}"
    place = 1 if kind == "attentions" else 0
    return f"input_blocks.{first + i + 1}.{place}.{rest}" if side == "down_blocks" else \
        f"output_blocks.{first + i}.{place}.{rest}"


def unet_from_original(tensors: dict[str, Tensor], config: unet.UNetConfig) -> dict[str, Tensor]:
    """The U-Net's tensors of a one-file model under our names. Its tensors that have no place here keep the name they
    had, for whoever loads them to refuse."""
    prefix = "model.diffusion_model."
    with torch.device("meta"):
        names = {prefix + unet_original_name(name, config): name for name in unet.UNet(config).state_dict()}
    return {names.get(name, name): tensor for name, tensor in tensors.items() if name.startswith(prefix)}

# Our words for the original code's (CompVis/latent-diffusion), to be replaced one after the other.
VAE_ORIGINAL = {"mid_block.resnets.0": "mid.block_1", "mid_block.resnets.1": "mid.block_2",
            "mid_block.attentions.0": "mid.attn_1", "down_blocks": "down", "up_blocks": "up", "resnets": "block",
            "downsamplers.0": "downsample", "upsamplers.0": "upsample", "conv_shortcut": "nin_shortcut",
            "conv_norm_out": "norm_out", "group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v",
            "to_out.0": "proj_out"}

def vae_original_name(name: str, config: vae.VAEConfig) -> str:
    """Our name of a tensor -> the original's, without `first_stage_model.`. The original counts the way up from its
    end. Its attention is of 1x1 convolutions, [C, C, 1, 1], ours of linear layers."""
    for ours, theirs in VAE_ORIGINAL.items():
        name = name.replace(ours, theirs)
    last = len(config.block_out_channels) - 1
    return re.sub(r"\.up\.(\d+)\.", lambda level: f".up.{last - int(level[1])}.", name)


def vae_from_original(tensors: dict[str, Tensor], config: vae.VAEConfig) -> dict[str, Tensor]:
    """The VAE's tensors of a one-file model, or of a VAE's own file, under our names. Its training's losses and running
    averages are left out; what else has no place here keeps the name it had, for whoever loads them to refuse."""
    prefix = "first_stage_model." if any(name.startswith("first_stage_model.") for name in tensors) else ""
    with torch.device("meta"):
        names = {prefix + vae_original_name(name, config): name for name in vae.VAE(config).state_dict()}
    found = {names.get(name, name): tensor for name, tensor in tensors.items()
             if name.startswith(prefix) and not name.removeprefix(prefix).startswith(("loss.", "model_ema."))}
    return {name: t.flatten(1) if ".attentions." in name and t.ndim == 4 else t for name, t in found.items()}

# Our words for OpenCLIP's, to be replaced one after the other.
OPEN_CLIP = {"text_model.": "", "embeddings.token_embedding": "token_embedding",
             "embeddings.position_embedding.weight": "positional_embedding", "encoder.layers": "transformer.resblocks",
             "final_layer_norm": "ln_final", "layer_norm": "ln_", "self_attn": "attn", "fc1": "c_fc", "fc2": "c_proj"}

def open_clip_name(name: str) -> tuple[str, int | None]:
    """Our name of a tensor -> OpenCLIP's, and which third of that it is: q, k and v are one matrix there."""
    for ours, theirs in OPEN_CLIP.items():
        name = name.replace(ours, theirs)
    if match := re.fullmatch(r"(.+)\.([qkv])_proj\.(weight|bias)", name):
        return f"{match[1]}.in_proj_{match[3]}", "qkv".index(match[2])
    return name, None


def clip_from_original(tensors: dict[str, Tensor], config: clip.TextConfig) -> dict[str, Tensor]:
    """The text encoder's tensors of a one-file model under our names: CLIP's own of SD 1.x, OpenCLIP's of SD 2.x. Left
    out are buffers, what only serves to compare with pictures, and OpenCLIP's last block, which SD 2.x does not run.
    What else has no place here keeps the name it had, for whoever loads them to refuse."""
    unused = {"logit_scale", "text_projection", "text_projection.weight", "attn_mask"}
    place = re.compile(r"(?:cond_stage_model|conditioner\.embedders\.0)\.(?:transformer|model)\.(.+)")
    theirs = {match[1]: tensor for name, tensor in tensors.items() if (match := place.fullmatch(name))}
    theirs = {name: t for name, t in theirs.items() if name not in unused and not name.endswith("position_ids")}
    if not any(name.startswith("transformer.resblocks.") for name in theirs):
        return {"text_model." + name.removeprefix("text_model."): tensor for name, tensor in theirs.items()}
    with torch.device("meta"):
        names = {name: open_clip_name(name) for name in clip.TextEncoder(config).state_dict()}
    found = {name: theirs[whole] if third is None else theirs[whole].tensor_split(3)[third]
             for name, (whole, third) in names.items() if whole in theirs}
    placed, last = {whole for whole, _ in names.values()}, f"transformer.resblocks.{config.num_hidden_layers}."
    return found | {name: t for name, t in theirs.items() if name not in placed and not name.startswith(last)}

"""Names of other layouts: LoRA files, the original code's one-file models, older checkpoints."""

from __future__ import annotations

import json
import math
import re
from typing import NamedTuple

import torch
from torch import Tensor, nn

from files import kinds
from models import clip, t5, unet, vae
from models.lora import LoRAConv2d, LoRALinear, merged_weight

# -------------------- LoRA files

class LoRAPair(NamedTuple):
    """The change of one layer's weight, for `models.lora.merged_weight`."""

    A: Tensor
    B: Tensor
    scale: float  # alpha / rank
    magnitude: Tensor | None = None  # of DoRA


# A LoRA of one network, by the names of its layers.
LoRAPairs = dict[str, LoRAPair]

# The part of the model for each prefix of kohya's names. The first prefix of a part is written.
KOHYA = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_transformer_": "transformer",
}
# How LoRA files name the matrices of a layer:
#   peft        MODULE.lora_A.weight, or MODULE.lora_A.ADAPTER.weight
#   diffusers   MODULE.lora.down.weight, or MODULE.lora_linear_layer.down.weight
#   older       MODULE.processor.to_q_lora.down.weight
#   kohya       MODULE.lora_down.weight, with underscores for the dots in MODULE
# and how peft and diffusers name the magnitude of DoRA:
#   MODULE.lora_magnitude_vector, .lora_magnitude_vector.weight or .ADAPTER.weight
MATRIX = re.compile(r"(.+?)[._]lora(?:_linear_layer)?[._](A|B|down|up)(?:\.[^.]+)?\.weight")
MAGNITUDE = re.compile(r"(.+?)\.lora_magnitude_vector(?:\.[^.]+)?(?:\.weight)?")
# Ends of layer names, and how older versions of diffusers wrote them.
OLDER = {
    "to_out.0": "to_out",
    "q_proj": "to_q",
    "k_proj": "to_k",
    "v_proj": "to_v",
    "out_proj": "to_out",
}

# Keys that are left out, because the picture does not change with them.
LORA_HARMLESS = {
    r".+\.alpha": "an alpha without matrices, or beside dotted names: diffusers ignores both",
    r".*text_model[._]encoder[._]layers[._]23[._].+": "OpenCLIP's last block, which SD 2.x skips",
    r"(.*[._])?text_projection[._].+": "a layer after the text encoder's output, not used here",
    r"(.*[._])?position_ids": "a buffer of the text encoder",
    r"(global_)?(step|epoch|iteration)s?": "counters of the training",
}
# Keys of other kinds of adapter, and their names. None of them is supported.
OTHER_ADAPTERS = {
    r"hada_[wt]": "LoHa",
    r"lokr_[wt]": "LoKr",
    r"\.boft_|^boft_": "BOFT",
    r"[._]oft_": "OFT",
    r"ia3_l|\.on_input$": "IA3",
    r"\.[ab][12]\.weight$": "GLoRA",
    r"[._][wb]_norm$|\.(diff|diff_b|set_weight)$": "trained norms or whole weights (LyCORIS)",
    r"dora_scale": "DoRA in the spelling of LyCORIS",
    r"\.scalar$": "LyCORIS with a trained scalar",
    r"lora_mid": "LoCon with Tucker decomposition",
    r"lora_E|ranknum": "AdaLoRA",
    r"vera_lambda": "VeRA",
    r"lora_embedding_[AB]": "LoRA of an embedding",
    r"lora(_[AB]|_up|_down)?(\.[^.]+)?[._]bias$": "LoRA with a bias",
    r"modules_to_save": "peft's modules_to_save",
    r"bundle_emb|emb_params|clip_[lg]$|string_to_": "textual inversion",
}
# Keys of LoRA for other models, and their names. Those for Flux come before those for SDXL and
# SD 3, because its files may have the latter's too.
OTHER_MODELS = {
    r"double_blocks|single_blocks|single_transformer_blocks": "Flux",
    r"joint_blocks|joint_transformer_blocks|add_[qkv]_proj": "Stable Diffusion 3",
    r"lora_te3_|text_encoder_3": "Stable Diffusion 3",
    r"img_mlp|txt_mlp|img_mod|txt_mod": "Qwen-Image",
    r"lora_te2_|text_encoder_2": "SDXL",
    r"(input|output|middle|down|up|mid)_block.*[._]transformer_blocks[._][1-9]": "SDXL",
    r"[._]add_embedding|label_emb": "SDXL",
    r"lora_prior_": "Stable Cascade",
    r"motion_modules": "AnimateDiff",
    r"blocks[._]\d+[._](self_attn|cross_attn|ffn)": "Wan",
    r"context_refiner|noise_refiner": "Lumina",
}
# Settings of peft that make another adapter than plain LoRA, rsLoRA or DoRA if they are set.
PEFT_UNSUPPORTED = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "lora_ga_config",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
)
# Ways of peft to initialise a LoRA that change the base's weights too.
PEFT_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def read_lora(
    tensors: dict[str, Tensor],
    metadata: dict[str, str] | None,
    networks: dict[str, nn.Module],
) -> tuple[dict[str, LoRAPairs], list[str]]:
    """The tensors and the metadata of a LoRA file -> {part: LoRAPairs}, and the unused keys.

    `networks` is {"unet": ..., "text_encoder": ...} or {"transformer": ...}. Unused keys are those
    of `LORA_HARMLESS`.

    Alpha is that of `lora_adapter_metadata` in the metadata, else the alpha of the file's own key
    in kohya's files, else the rank. `MODULE.alpha` beside names with dots is unused: `diffusers`
    does not read it either. ValueError if a pair does not fit its layer (the LoRA is for another
    base), if a layer has two pairs or lacks one half of its pair, and for keys of other kinds of
    adapters or of other models, so that nothing is applied in part.
    """
    _check_kind(tensors, metadata)
    places, unused = _sort_keys(tensors, networks)
    _check_unused(unused, len(tensors), networks)
    header = json.loads((metadata or {}).get("lora_adapter_metadata") or "{}")
    for key, value in header.items():
        _check_peft_setting(key.rpartition(".")[2], value)

    found: dict[str, LoRAPairs] = {}
    for (part, name), keys in places.items():
        if keys.keys() == {"alpha"}:
            unused += keys.values()
            continue
        # The keys of the header begin with the part, unless the file is of one part only.
        settings = {key.removeprefix(f"{part}."): value for key, value in header.items()}
        weight = networks[part].get_submodule(name).weight
        pair = _read_pair(tensors, keys, weight.shape, f"{part}.{name}", settings)
        found.setdefault(part, {})[name] = pair
    return found, unused


def _check_kind(tensors: dict[str, Tensor], metadata: dict[str, str] | None) -> None:
    """ValueError if a file is something else than a LoRA, and it is known what."""
    kind = kinds.of_tensors(tensors, metadata)
    is_ours = kind in kinds.OWN_KINDS.values()
    has_lora = any(_key_role(key)[1] for key in tensors)
    if kind not in (None, kinds.LORA) and (is_ours or not has_lora):
        first = next(iter(tensors), "nothing")
        raise ValueError(f"it is {kind}, with {first} in it")


def _check_unused(unused: list[str], total: int, networks: dict[str, nn.Module]) -> None:
    """ValueError if a key that belongs to no layer is not in `LORA_HARMLESS`."""
    left = [key for key in unused if not any(re.fullmatch(p, key) for p in LORA_HARMLESS)]
    for pattern, name in OTHER_MODELS.items():
        for key in unused:  # an alpha or a projection of another model shows it too
            if re.search(pattern, key):
                raise ValueError(f"it is a LoRA for {name}, as its key {key} shows")
    for pattern, name in OTHER_ADAPTERS.items():
        for key in left:
            if re.search(pattern, key):
                raise ValueError(f"its key {key} is of {name}, which is not supported")
    if left:
        raise ValueError(
            f"it is for another model: {len(left)} of its {total} tensors belong to no layer of the"
            f" {' or '.join(networks)}, {left[0]} the first"
        )


def _check_peft_setting(name: str, value: object) -> None:
    """ValueError for a setting of peft that makes an adapter which is not supported."""
    is_other_type = name == "peft_type" and value != "LORA"
    changes_base = (
        name == "init_lora_weights"
        and isinstance(value, str)
        and value.lower().startswith(PEFT_CHANGES_BASE)
    )
    if is_other_type or changes_base or (name in PEFT_UNSUPPORTED and value):
        raise ValueError(f"peft's setting {name} is {value!r:.100}, which is not supported")


def _sort_keys(
    tensors: dict[str, Tensor],
    networks: dict[str, nn.Module],
) -> tuple[dict[tuple[str, str], dict[str, str]], list[str]]:
    """{(part, layer): {role: key}} of a LoRA file, with the roles of `_key_role`; unused keys."""
    names = {part: _module_names(network) for part, network in networks.items()}
    places: dict[tuple[str, str], dict[str, str]] = {}
    unused = []
    for key in tensors:
        spelling, role = _key_role(key)
        place = _find_layer(spelling, names) if role else None
        if place is None:
            unused.append(key)
            continue
        keys = places.setdefault(place, {})
        if role in keys:
            raise ValueError(f"{key} and {keys[role]} are of one layer; expected one LoRA per file")
        keys[role] = key
    return places, unused


def _key_role(key: str) -> tuple[str, str]:
    """The layer's name in a key, and what the key holds.

    That is "A", "B", "alpha", DoRA's "magnitude", or "" if it is no key of a LoRA.
    """
    match = MATRIX.fullmatch(key)
    if match:
        name, matrix = match.groups()
        return name, "A" if matrix in ("A", "down") else "B"
    match = MAGNITUDE.fullmatch(key)
    if match:
        return match[1], "magnitude"
    if key.startswith(tuple(KOHYA)) and key.endswith(".alpha"):
        return key.removesuffix(".alpha"), "alpha"
    return key, ""


def _module_names(network: nn.Module) -> dict[str, str]:
    """Every name that a LoRA file may use for a layer of the network -> the layer's own name."""
    names = {}
    for name, layer in network.named_modules():
        if not isinstance(layer, nn.Linear | nn.Conv2d):
            continue
        # Newer libraries leave out "text_model.".
        spellings = {name, name.removeprefix("text_model.")}
        for spelling in [*spellings]:
            for ending, older in OLDER.items():
                if spelling.endswith(ending):
                    spellings.add(spelling.removesuffix(ending) + older)
        spellings |= {spelling.replace(".", "_") for spelling in spellings}
        if isinstance(network, unet.UNet) and ".lora_" not in name:
            spellings.add(unet_original_name(name, network.config).replace(".", "_"))
        for spelling in spellings:
            names[spelling] = name
    return names


def _find_layer(spelling: str, names: dict[str, dict[str, str]]) -> tuple[str, str] | None:
    """(part, layer) for a layer's name in a LoRA file, given the `_module_names` of each part."""
    parts = list(names)
    prefix = next((prefix for prefix in KOHYA if spelling.startswith(prefix)), None)
    if prefix:
        parts = [KOHYA[prefix]]
        spelling = spelling.removeprefix(prefix)
    else:
        spelling = spelling.removeprefix("base_model.model.").replace(".processor.", ".")
        # A file of one network may have names without the part.
        first, _, rest = spelling.partition(".")
        if first in KOHYA.values():
            parts = [first]
            spelling = rest.removeprefix("base_model.model.")

    for part in parts:
        if spelling in names.get(part, {}):
            return part, names[part][spelling]
    return None


def _read_pair(
    tensors: dict[str, Tensor],
    keys: dict[str, str],
    weight_shape: torch.Size,
    layer: str,
    settings: dict,
) -> LoRAPair:
    """The pair of a layer, `part.name`, from its `keys` by role and the settings of its part.

    ValueError if it is incomplete or does not fit the layer's weight.
    """
    needed = ["A", "B"]
    if settings.get("use_dora"):
        needed.append("magnitude")
    missing = [role for role in needed if role not in keys]
    if missing:
        found = ", ".join(keys.values())
        raise ValueError(
            f"it is incomplete: for {layer} it holds {found} without the"
            f" {' and '.join(missing)} that belongs to it"
        )

    A = _read_floats(tensors, keys["A"])
    B = _read_floats(tensors, keys["B"])
    rank = A.shape[0] if A.ndim else 0
    n_out, *n_in = weight_shape
    for key, tensor, expected in [
        (keys["A"], A, (rank, *n_in)),
        (keys["B"], B, (n_out, rank)),
    ]:
        if rank == 0 or not _same_shape(tensor.shape, expected):
            raise ValueError(
                f"{key} is {list(tensor.shape)}, expected {list(expected)} of rank {rank} for"
                f" {layer}: the LoRA is for another base"
            )

    magnitude = None
    if "magnitude" in keys:
        magnitude = _read_floats(tensors, keys["magnitude"])
        if magnitude.numel() != n_out:
            raise ValueError(
                f"{keys['magnitude']} is {list(magnitude.shape)}, expected {n_out} numbers for"
                f" {layer}: the LoRA is for another base"
            )
    alpha = float(tensors[keys["alpha"]]) if "alpha" in keys else None
    if alpha is not None and not math.isfinite(alpha):
        raise ValueError(f"{keys['alpha']} is {alpha}: the file is damaged")
    name = layer.partition(".")[2]
    return LoRAPair(A, B, _lora_scale(name, rank, alpha, settings), magnitude)


def _read_floats(tensors: dict[str, Tensor], key: str) -> Tensor:
    """A tensor of a LoRA, in float32 if it is of 8 bits.

    ValueError if it is not floating point, or not finite.
    """
    tensor = tensors[key]
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        found = getattr(tensor, "dtype", type(tensor).__name__)
        raise ValueError(f"{key} is of {found}; expected floating point")
    if tensor.itemsize == 1:
        tensor = tensor.float()
    if not tensor.isfinite().all():
        raise ValueError(f"{key} holds NaN or infinite numbers: the training of the LoRA failed")
    return tensor


def _same_shape(shape: torch.Size, expected: tuple[int, ...]) -> bool:
    """Whether two shapes differ only by ones at the end, as [r, c] and [r, c, 1, 1] do."""
    length = max(len(shape), len(expected))
    padded = (*shape, *[1] * (length - len(shape)))
    padded_expected = (*expected, *[1] * (length - len(expected)))
    return len(shape) >= 2 and padded == padded_expected


def _lora_scale(name: str, rank: int, alpha: float | None, settings: dict) -> float:
    """alpha / rank of a layer, or alpha / sqrt(rank) with rank-stabilised LoRA.

    The alpha of `settings`, from the file's metadata, overrules the given one.
    """
    alpha = settings.get("lora_alpha", alpha)
    # As in peft, a pattern matches the end of the layer's name.
    spellings = (name, name.removeprefix("text_model."))
    for pattern, own in (settings.get("alpha_pattern") or {}).items():
        if any(re.fullmatch(rf"(.*\.)?({pattern})", spelling) for spelling in spellings):
            alpha = own
            break
    if alpha is None:
        return 1.0
    if isinstance(alpha, float) and not math.isfinite(alpha):
        raise ValueError(f"the alpha of {name} is {alpha} in the settings: the file is damaged")
    if settings.get("use_rslora"):
        return alpha / rank**0.5
    return alpha / rank


def apply_lora(network: nn.Module, pairs: LoRAPairs, strength: float) -> None:
    """Adds strength * scale * B A to the network's weights. Several LoRA add up.

    With a magnitude it is DoRA as in `peft`: the strength counts for B A only.
    """
    for name, pair in pairs.items():
        layer = network.get_submodule(name)
        scale = strength * pair.scale
        W = merged_weight(layer.weight, pair.A, pair.B, scale, pair.magnitude)
        layer.weight = nn.Parameter(W, requires_grad=layer.weight.requires_grad)


def write_lora(network: nn.Module, part: str, kohya: bool = False) -> dict[str, Tensor]:
    """The tensors of a LoRA file, for `diffusers` or in kohya's names: the network's LoRA at full
    scale.

    For `diffusers` the scale is multiplied into B. Without an alpha in the file every reader takes
    alpha = rank, and only `diffusers` knows of the alpha in the metadata.
    """
    tensors = {}
    for name, layer in network.named_modules():
        if not isinstance(layer, LoRALinear | LoRAConv2d):
            continue
        A = layer.lora_A.weight.detach()
        B = layer.lora_B.weight.detach()
        if kohya:
            stem = _kohya_prefix(part) + name.replace(".", "_")
            tensors[f"{stem}.lora_down.weight"] = A
            tensors[f"{stem}.lora_up.weight"] = B
            tensors[f"{stem}.alpha"] = torch.tensor(float(layer.full_scale * len(A)))
        else:
            tensors[f"{part}.{name}.lora_A.weight"] = A
            tensors[f"{part}.{name}.lora_B.weight"] = layer.full_scale * B
    return tensors


def _kohya_prefix(part: str) -> str:
    return next(prefix for prefix, named in KOHYA.items() if named == part)

# -------------------- older names

OLDER_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def current_name(network: nn.Module, name: str) -> str | None:
    """The present name of a tensor from a diffusers or transformers file; None for one to ignore.

    Older VAEs name the layers of their attention differently. Text encoders come with or without a
    prefix, with a buffer of positions, with their embedding twice, or with what stands beside them
    in a whole model: a projection, an encoder of pictures, a decoder of texts.
    """
    if isinstance(network, vae.VAE):
        match = re.search(r"attentions\.\d+\.(query|key|value|proj_attn)\.", name)
        if match:
            start, end = match.span(1)
            return name[:start] + OLDER_ATTENTION[match[1]] + name[end:]
        return name
    if isinstance(network, t5.T5Encoder):
        is_unused = name.startswith(("encoder.embed_tokens.", "decoder.", "lm_head."))
        return None if is_unused else name
    if isinstance(network, clip.TextEncoder):
        own = name.removeprefix("text_model.")
        beside = own.startswith(("vision_model.", "visual_projection."))
        if own in CLIP_UNUSED or own.endswith("position_ids") or beside:
            return None
        return "text_model." + own
    return name

# -------------------- one-file models: the U-Net

# Names of the original code (CompVis/latent-diffusion) outside the blocks, and in a residual block.
UNET_ORIGINAL = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
UNET_ORIGINAL_RES = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def unet_original_name(name: str, config: unet.UNetConfig) -> str:
    """Our name of a tensor or a layer -> the original name, without `model.diffusion_model.`.

    The original numbers its blocks through all levels. A block is a residual block, followed by an
    attention if there is one. On the way down, the down-sampling is a block of its own; on the way
    up, the up-sampling stands at the end of the level's last block.
    """
    for ours, original in UNET_ORIGINAL.items():
        if f"{name}.".startswith(f"{ours}."):
            return original + name.removeprefix(ours)

    # SIDE.LEVEL.KIND.INDEX.REST, or mid_block.KIND.INDEX.REST
    if name.startswith("mid_block."):
        _, kind, index, rest = name.split(".", 3)
        place = 1 if kind == "attentions" else 2 * int(index)
        return f"middle_block.{place}.{_unet_original_rest(kind, rest)}"

    side, level, kind, index, rest = name.split(".", 4)
    level = int(level)
    per_level = config.layers_per_block + 1
    first = level * per_level
    if kind == "downsamplers":
        rest = rest.replace("conv", "op")
        return f"input_blocks.{first + per_level}.0.{rest}"
    if kind == "upsamplers":
        has_attention = "CrossAttn" in config.up_block_types[level]
        place = 2 if has_attention else 1
        return f"output_blocks.{first + config.layers_per_block}.{place}.{rest}"

    rest = _unet_original_rest(kind, rest)
    block = first + int(index)
    place = 1 if kind == "attentions" else 0
    if side == "down_blocks":
        return f"input_blocks.{block + 1}.{place}.{rest}"
    return f"output_blocks.{block}.{place}.{rest}"


def _unet_original_rest(kind: str, rest: str) -> str:
    """The end of a name, within its residual block or attention."""
    if kind != "resnets":
        return rest
    layer, dot, tensor = rest.partition(".")
    return UNET_ORIGINAL_RES[layer] + dot + tensor


def unet_from_original(tensors: dict[str, Tensor], config: unet.UNetConfig) -> dict[str, Tensor]:
    """The U-Net's tensors of a one-file model under our names.

    A tensor of the file's U-Net that ours does not have keeps its name, so that loading refuses it.
    """
    prefix = "model.diffusion_model."
    with torch.device("meta"):
        ours = unet.UNet(config).state_dict()
    names = {prefix + unet_original_name(name, config): name for name in ours}
    found = {}
    for name, tensor in tensors.items():
        if name.startswith(prefix):
            found[names.get(name, name)] = tensor
    return found

# -------------------- one-file models: the VAE

# Our words -> the original code's (CompVis/latent-diffusion), to be replaced one after the other.
VAE_ORIGINAL = {
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0": "mid.attn_1",
    "down_blocks": "down",
    "up_blocks": "up",
    "resnets": "block",
    "downsamplers.0": "downsample",
    "upsamplers.0": "upsample",
    "conv_shortcut": "nin_shortcut",
    "conv_norm_out": "norm_out",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}


def vae_original_name(name: str, config: vae.VAEConfig) -> str:
    """Our name of a tensor -> the original name, without `first_stage_model.`.

    The original numbers the levels of the decoder from its end.
    """
    for ours, original in VAE_ORIGINAL.items():
        name = name.replace(ours, original)
    match = re.search(r"\.up\.(\d+)\.", name)
    if match:
        start, end = match.span(1)
        last = len(config.block_out_channels) - 1
        name = f"{name[:start]}{last - int(match[1])}{name[end:]}"
    return name


def vae_from_original(tensors: dict[str, Tensor], config: vae.VAEConfig) -> dict[str, Tensor]:
    """The VAE's tensors of a one-file model, or of a VAE's own file, under our names.

    Losses and EMA weights of its training are left out. Any other tensor that our VAE does not have
    keeps its name, so that loading refuses it.
    """
    prefix = "first_stage_model."
    if not any(name.startswith(prefix) for name in tensors):
        prefix = ""
    with torch.device("meta"):
        ours = vae.VAE(config).state_dict()
    names = {prefix + vae_original_name(name, config): name for name in ours}

    found = {}
    for original, tensor in tensors.items():
        own = original.removeprefix(prefix)
        if not original.startswith(prefix) or own.startswith(("loss.", "model_ema.")):
            continue
        name = names.get(original, original)
        # The original's attention has 1x1 convolutions [C, C, 1, 1], ours has linear layers.
        if ".attentions." in name and tensor.ndim == 4:
            tensor = tensor.flatten(1)
        found[name] = tensor
    return found

# -------------------- one-file models: the text encoder

# Our words -> OpenCLIP's, to be replaced one after the other.
OPEN_CLIP = {
    "text_model.": "",
    "embeddings.token_embedding": "token_embedding",
    "embeddings.position_embedding.weight": "positional_embedding",
    "encoder.layers": "transformer.resblocks",
    "final_layer_norm": "ln_final",
    "layer_norm": "ln_",
    "self_attn": "attn",
    "fc1": "c_fc",
    "fc2": "c_proj",
}
# Tensors that only serve to compare texts with pictures, and a buffer.
CLIP_UNUSED = {"logit_scale", "text_projection", "text_projection.weight", "attn_mask"}


def open_clip_name(name: str) -> tuple[str, int | None]:
    """Our name of a tensor -> OpenCLIP's name, and which third of that tensor it is.

    The third is None for a whole tensor, and 0, 1 or 2 for q, k and v, which are one matrix there.
    """
    for ours, theirs in OPEN_CLIP.items():
        name = name.replace(ours, theirs)
    match = re.fullmatch(r"(.+)\.([qkv])_proj\.(weight|bias)", name)
    if match:
        layer, letter, kind = match.groups()
        return f"{layer}.in_proj_{kind}", "qkv".index(letter)
    return name, None


def clip_from_original(tensors: dict[str, Tensor], config: clip.TextConfig) -> dict[str, Tensor]:
    """The text encoder's tensors of a one-file model under our names.

    SD 1.x has CLIP's own names, SD 2.x those of OpenCLIP, whose last block SD 2.x does not run and
    which is left out. Any other tensor that our encoder does not have keeps its name, so that
    loading refuses it.
    """
    theirs = _original_text_tensors(tensors)
    if not any(name.startswith("transformer.resblocks.") for name in theirs):
        return {"text_model." + name.removeprefix("text_model."): t for name, t in theirs.items()}

    with torch.device("meta"):
        ours = clip.TextEncoder(config).state_dict()
    found = {}
    placed = set()
    for name in ours:
        original, third = open_clip_name(name)
        placed.add(original)
        if original not in theirs:
            continue
        tensor = theirs[original]
        found[name] = tensor if third is None else tensor.tensor_split(3)[third]

    last = f"transformer.resblocks.{config.num_hidden_layers}."
    for name, tensor in theirs.items():
        if name not in placed and not name.startswith(last):
            found[name] = tensor
    return found


def _original_text_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the text encoder in a one-file model, without their prefix."""
    prefix = re.compile(r"(cond_stage_model|conditioner\.embedders\.0)\.(transformer|model)\.")
    found = {}
    for original, tensor in tensors.items():
        match = prefix.match(original)
        if match:
            name = original[match.end():]
            if name and name not in CLIP_UNUSED and not name.endswith("position_ids"):
                found[name] = tensor
    return found

"""LoRA: layers that learn a low-rank change B A of a frozen weight W, y = W x + b + scale B (A x).

`add_lora` replaces named layers of a network in place. A replaced layer keeps its `weight` and `bias` (the same
Parameter objects) and gains `lora_A.weight` [rank, in, ...] and `lora_B.weight` [out, rank, ...]: the names, shapes
and arithmetic of `peft`. Source: Hu et al. 2021.

Below them the tensors of LoRA files, in the formats in use: `read_lora`, `apply_lora`, `write_lora`."""

import functools
import json
import re
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from models import unet


class LoRALinear(nn.Linear):
    """`lora_A` is [rank, in], `lora_B` [out, rank]."""

    def __init__(self, layer: nn.Linear, rank: int, alpha: float):
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias
        self.lora_A = nn.Linear(self.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, self.out_features, bias=False)
        self.scale = self.full_scale = alpha / rank

    def forward(self, x: Tensor) -> Tensor:
        return torch.add(super().forward(x), self.lora_B(self.lora_A(x)), alpha=self.scale)

    def merged(self) -> nn.Linear:
        return _merged(self, nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta"))


class LoRAConv2d(nn.Conv2d):
    """`lora_A` has the layer's kernel, stride and padding; `lora_B` is 1x1."""

    def __init__(self, layer: nn.Conv2d, rank: int, alpha: float):
        super().__init__(layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding,
                         bias=layer.bias is not None, device="meta")
        self.weight, self.bias = layer.weight, layer.bias
        self.lora_A = nn.Conv2d(layer.in_channels, rank, layer.kernel_size, layer.stride, layer.padding, bias=False)
        self.lora_B = nn.Conv2d(rank, layer.out_channels, 1, bias=False)
        self.scale = self.full_scale = alpha / rank

    def forward(self, x: Tensor) -> Tensor:
        return torch.add(super().forward(x), self.lora_B(self.lora_A(x)), alpha=self.scale)

    def merged(self) -> nn.Conv2d:
        layer = nn.Conv2d(self.in_channels, self.out_channels, self.kernel_size, self.stride, self.padding,
                          bias=self.bias is not None, device="meta")
        return _merged(self, layer)


class TwinConv2d(nn.Conv2d):
    """A convolution trained in full beside its frozen original, so that a scale in [0, 1] leads from one to the other
    as a LoRA's scale does: (1 - scale) W0 x + scale W x, no gradient through the first (stochastic `conv_in`)."""

    def __init__(self, layer: nn.Conv2d):
        super().__init__(layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding,
                         bias=layer.bias is not None, device="meta")
        self.weight, self.bias = layer.weight, layer.bias
        self.register_buffer("weight0", layer.weight.detach().clone(), persistent=False)
        self.register_buffer("bias0", layer.bias.detach().clone(), persistent=False)
        self.scale = self.full_scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        trained = super().forward(x)
        if self.scale == 1.0:
            return trained
        with torch.no_grad():
            pretrained = self._conv_forward(x, self.weight0.to(self.weight.dtype), self.bias0.to(self.bias.dtype))
        return (1 - self.scale) * pretrained + self.scale * trained

    def merged(self) -> nn.Conv2d:
        layer = nn.Conv2d(self.in_channels, self.out_channels, self.kernel_size, self.stride, self.padding,
                          device="meta")
        W, b = self.weight.detach(), self.bias.detach()
        layer.weight = nn.Parameter(torch.lerp(self.weight0.to(W.dtype), W, self.scale), requires_grad=False)
        layer.bias = nn.Parameter(torch.lerp(self.bias0.to(b.dtype), b, self.scale), requires_grad=False)
        return layer


ADAPTERS = (LoRALinear, LoRAConv2d, TwinConv2d)


def changed(weight: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """`weight` + scale B A, added in float32, or float64 where one of them is that, and rounded once."""
    fine = functools.reduce(torch.promote_types, (weight.dtype, A.dtype, B.dtype), torch.float32)
    W, A, B = (t.detach().to(weight.device, fine) for t in (weight, A, B))
    return (W + scale * (B.flatten(1) @ A.flatten(1)).view_as(W)).to(weight.dtype)


def _merged(adapter: LoRALinear | LoRAConv2d, layer: nn.Module) -> nn.Module:
    """The plain `layer` with the adapter's changed weight."""
    W = changed(adapter.weight, adapter.lora_A.weight, adapter.lora_B.weight, adapter.scale)
    layer.weight, layer.bias = nn.Parameter(W, requires_grad=False), adapter.bias
    return layer


def replace(module: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(module.get_submodule(parent), child, layer)


def add_lora(module: nn.Module, targets: Iterable[str], rank: int, alpha: float,
             generator: torch.Generator | None = None) -> None:
    """Replaces every linear layer and convolution of `module` whose dotted name is, or ends in, one of `targets`
    (whole parts: `quant_conv` is not `conv`). A starts as Gaussian noise of deviation 1 / rank, B at 0: no change."""
    targets = tuple(targets)
    names = [name for name, layer in module.named_modules()
             if any(name == t or name.endswith("." + t) for t in targets) and isinstance(layer, nn.Linear | nn.Conv2d)]
    if not names:
        raise ValueError(f"no layer of the network is called {', '.join(targets)}:"
                         " the LoRA is for a network of another kind")
    for name in names:
        layer = module.get_submodule(name)
        adapter = LoRALinear(layer, rank, alpha) if isinstance(layer, nn.Linear) else LoRAConv2d(layer, rank, alpha)
        fine = torch.promote_types(layer.weight.dtype, torch.float32)  # the change stays fine where W is stored in half
        for part in (adapter.lora_A, adapter.lora_B):
            part.to(device=layer.weight.device, dtype=fine)
        if not layer.weight.is_meta:
            noise = torch.randn(adapter.lora_A.weight.shape, generator=generator)
            adapter.lora_A.weight.data.copy_(noise / rank)
            adapter.lora_B.weight.data.zero_()
        replace(module, name, adapter)


def set_scale(module: nn.Module, r: float) -> None:
    """Every adapter under `module` works at r times its full strength, from now until the next call. It is one number
    for a whole step: set it before the forward pass and leave it alone until the backward pass is over."""
    for layer in module.modules():
        if isinstance(layer, ADAPTERS):
            layer.scale = r * layer.full_scale


def merge(module: nn.Module) -> nn.Module:
    """Puts plain layers back in place of all adapters, their change added at its present scale: nothing left to
    compute. What has no adapter is copied: one bias left in the file's mapping would keep all of it in memory."""
    merged = {name: layer.merged() for name, layer in module.named_modules() if isinstance(layer, ADAPTERS)}
    for name, layer in merged.items():
        replace(module, name, layer)
    own = {id(layer.weight) for layer in merged.values()}
    for p in module.parameters() if merged else ():
        p.data = p.data if id(p) in own else p.data.clone()
    return module


# ----------------------------------------------------------------------------------------------------------- LoRA files

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
                ways.add(unet.original_name(name, network.config).replace(".", "_"))
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
        W = changed(layer.weight, A, B, strength * scale)
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

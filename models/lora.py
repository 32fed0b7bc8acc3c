"""LoRA: layers that learn a low-rank change B A of a frozen weight W.

    y = W x + b + scale B (A x),    scale = alpha / rank

`add_lora` replaces named layers of a network in place. A replaced layer keeps its `weight` and
`bias` (the same Parameter objects) and gains `lora_A.weight` [rank, in, ...] and `lora_B.weight`
[out, rank, ...]. Names, shapes and arithmetic are those of `peft`.

Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models".
"""

import functools
from collections.abc import Iterable

import torch
from torch import Tensor, nn


def merged_weight(
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    scale: float,
    magnitude: Tensor | None = None,
) -> Tensor:
    """W + scale B A, in the type and on the device of `weight`.

    With a `magnitude` of one number per output it is DoRA: each output's row of the sum is scaled
    to this length (Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation", equation 5).
    Computed in float32, or in float64 if one of them is float64, and rounded once.
    """
    dtypes = (weight.dtype, A.dtype, B.dtype)
    dtype = functools.reduce(torch.promote_types, dtypes, torch.float32)
    W, A, B = (tensor.detach().to(weight.device, dtype) for tensor in (weight, A, B))

    change = scale * (B.flatten(1) @ A.flatten(1)).view_as(W)
    W = W + change
    if magnitude is not None:
        lengths = W.flatten(1).norm(dim=1)
        factors = magnitude.detach().to(weight.device, dtype).flatten() / lengths
        W = W * factors.view(-1, *[1] * (W.ndim - 1))
    return W.to(weight.dtype)


def plain_settings(layer: nn.Linear | nn.Conv2d) -> dict:
    """The arguments of a plain layer of the same sizes that takes no memory: it is on meta."""
    settings = dict(bias=layer.bias is not None, device="meta")
    if isinstance(layer, nn.Linear):
        return settings | dict(in_features=layer.in_features, out_features=layer.out_features)
    return settings | dict(
        in_channels=layer.in_channels,
        out_channels=layer.out_channels,
        kernel_size=layer.kernel_size,
        stride=layer.stride,
        padding=layer.padding,
    )


class LoRALinear(nn.Linear):
    """A linear layer with a LoRA. A is [rank, in], B is [out, rank]."""

    def __init__(self, layer: nn.Linear, rank: int, alpha: float):
        super().__init__(**plain_settings(layer))
        self.weight = layer.weight
        self.bias = layer.bias
        self.lora_A = nn.Linear(self.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, self.out_features, bias=False)
        self.full_scale = alpha / rank
        self.scale = self.full_scale

    def forward(self, x: Tensor) -> Tensor:
        """W x + b + s B (A x)."""
        y = super().forward(x)
        change = self.lora_B(self.lora_A(x))
        return torch.add(y, change, alpha=self.scale)

    def merged(self) -> nn.Linear:
        """A plain layer of the same function, frozen, at the present scale."""
        layer = nn.Linear(**plain_settings(self))
        W = merged_weight(self.weight, self.lora_A.weight, self.lora_B.weight, self.scale)
        layer.weight = nn.Parameter(W, requires_grad=False)
        layer.bias = self.bias
        return layer


class LoRAConv2d(nn.Conv2d):
    """A convolution with a LoRA. A has the kernel, stride and padding of the layer, B is 1x1."""

    def __init__(self, layer: nn.Conv2d, rank: int, alpha: float):
        super().__init__(**plain_settings(layer))
        self.weight = layer.weight
        self.bias = layer.bias
        self.lora_A = nn.Conv2d(
            layer.in_channels,
            rank,
            layer.kernel_size,
            layer.stride,
            layer.padding,
            bias=False,
        )
        self.lora_B = nn.Conv2d(rank, layer.out_channels, 1, bias=False)
        self.full_scale = alpha / rank
        self.scale = self.full_scale

    def forward(self, x: Tensor) -> Tensor:
        """W x + b + s B (A x)."""
        y = super().forward(x)
        change = self.lora_B(self.lora_A(x))
        return torch.add(y, change, alpha=self.scale)

    def merged(self) -> nn.Conv2d:
        """A plain layer of the same function, frozen, at the present scale."""
        layer = nn.Conv2d(**plain_settings(self))
        W = merged_weight(self.weight, self.lora_A.weight, self.lora_B.weight, self.scale)
        layer.weight = nn.Parameter(W, requires_grad=False)
        layer.bias = self.bias
        return layer


class TwinConv2d(nn.Conv2d):
    """A fully trained convolution beside its frozen original, for the stochastic `conv_in`.

    y = (1 - scale) (W0 x + b0) + scale (W x + b): the original at scale 0, the trained layer at 1,
    as a LoRA is absent at 0 and complete at 1. As in the official code, no gradient flows through
    the original, neither to W0 nor to x.
    """

    def __init__(self, layer: nn.Conv2d):
        super().__init__(**plain_settings(layer))
        self.weight = layer.weight
        self.bias = layer.bias
        self.register_buffer("weight0", layer.weight.detach().clone(), persistent=False)
        self.register_buffer("bias0", layer.bias.detach().clone(), persistent=False)
        self.full_scale = 1.0
        self.scale = self.full_scale

    def forward(self, x: Tensor) -> Tensor:
        trained = super().forward(x)
        if self.scale == 1.0:
            return trained

        with torch.no_grad():
            weight0 = self.weight0.to(self.weight.dtype)
            bias0 = self.bias0.to(self.bias.dtype)
            original = self._conv_forward(x, weight0, bias0)
        return (1 - self.scale) * original + self.scale * trained

    def merged(self) -> nn.Conv2d:
        """A plain convolution of the same function, frozen, at the present scale."""
        layer = nn.Conv2d(**plain_settings(self))
        W = self.weight.detach()
        b = self.bias.detach()
        W = torch.lerp(self.weight0.to(W.dtype), W, self.scale)
        b = torch.lerp(self.bias0.to(b.dtype), b, self.scale)
        layer.weight = nn.Parameter(W, requires_grad=False)
        layer.bias = nn.Parameter(b, requires_grad=False)
        return layer


ADAPTERS = (LoRALinear, LoRAConv2d, TwinConv2d)


def replace(module: nn.Module, name: str, layer: nn.Module) -> None:
    """Puts `layer` in the place of the submodule with this dotted name."""
    parent, _, child = name.rpartition(".")
    setattr(module.get_submodule(parent), child, layer)


def target_names(module: nn.Module, targets: tuple[str, ...]) -> list[str]:
    """Dotted names of the linear layers and convolutions whose name is one of `targets`, or ends
    in one after a dot: `conv` does not select `quant_conv`."""
    names = []
    for name, layer in module.named_modules():
        selected = any(name == target or name.endswith("." + target) for target in targets)
        if selected and isinstance(layer, nn.Linear | nn.Conv2d):
            names.append(name)
    return names


def add_lora(
    module: nn.Module,
    targets: Iterable[str],
    rank: int,
    alpha: float,
    generator: torch.Generator | None = None,
) -> None:
    """Gives a LoRA to all layers of `module` that `target_names` selects, in place.

    A starts as Gaussian noise with a standard deviation of 1 / rank, drawn from `generator`, and B
    at 0, so the network's output does not change yet. Raises ValueError if no layer is selected.
    """
    targets = tuple(targets)
    names = target_names(module, targets)
    if not names:
        raise ValueError(
            f"no layer of the network is called {', '.join(targets)}: the LoRA is for another kind"
            " of network"
        )

    for name in names:
        layer = module.get_submodule(name)
        if isinstance(layer, nn.Linear):
            adapter = LoRALinear(layer, rank, alpha)
        else:
            adapter = LoRAConv2d(layer, rank, alpha)

        # Where W is stored in half precision, A and B stay in float32.
        dtype = torch.promote_types(layer.weight.dtype, torch.float32)
        adapter.lora_A.to(device=layer.weight.device, dtype=dtype)
        adapter.lora_B.to(device=layer.weight.device, dtype=dtype)

        if not layer.weight.is_meta:
            noise = torch.randn(adapter.lora_A.weight.shape, generator=generator)
            adapter.lora_A.weight.data.copy_(noise / rank)
            adapter.lora_B.weight.data.zero_()
        replace(module, name, adapter)


def set_scale(module: nn.Module, r: float) -> None:
    """Sets every adapter under `module` to r times its full strength, until the next call.

    Call it before the forward pass, and not again before the backward pass is over: gradient
    checkpointing computes the forward pass a second time there.
    """
    for layer in module.modules():
        if isinstance(layer, ADAPTERS):
            layer.scale = r * layer.full_scale


def merge(module: nn.Module) -> nn.Module:
    """Replaces all adapters by plain layers of the same function, at their present scale.

    After it the network is as fast as without adapters.
    """
    merged = {}
    for name, layer in module.named_modules():
        if isinstance(layer, ADAPTERS):
            merged[name] = layer.merged()
    if not merged:
        return module

    for name, layer in merged.items():
        replace(module, name, layer)

    # All other parameters are copied out of the memory-mapped checkpoint: a single bias left in the
    # mapping would keep the whole file in memory.
    new = {id(layer.weight) for layer in merged.values()}
    for p in module.parameters():
        if id(p) not in new:
            p.data = p.data.clone()
    return module

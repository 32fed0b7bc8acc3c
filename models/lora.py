"""LoRA: layers that learn a low-rank change B A of a frozen weight W, y = W x + b + scale B (A x).

`add_lora` replaces named layers of a network in place. A replaced layer keeps its `weight` and `bias` (the same
Parameter objects) and gains `lora_A.weight` [rank, in, ...] and `lora_B.weight` [out, rank, ...]: the names, shapes
and arithmetic of `peft`. Source: Hu et al. 2021.

Below them the tensors of LoRA files, in the formats in use: `read_lora`, `apply_lora`, `write_lora`."""

import functools
from collections.abc import Iterable

import torch
from torch import Tensor, nn


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


def merged_weight(weight: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """`weight` + scale B A, added in float32, or float64 where one of them is that, and rounded once."""
    fine = functools.reduce(torch.promote_types, (weight.dtype, A.dtype, B.dtype), torch.float32)
    W, A, B = (t.detach().to(weight.device, fine) for t in (weight, A, B))
    return (W + scale * (B.flatten(1) @ A.flatten(1)).view_as(W)).to(weight.dtype)


def _merged(adapter: LoRALinear | LoRAConv2d, layer: nn.Module) -> nn.Module:
    """The plain `layer` with the adapter's changed weight."""
    W = merged_weight(adapter.weight, adapter.lora_A.weight, adapter.lora_B.weight, adapter.scale)
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

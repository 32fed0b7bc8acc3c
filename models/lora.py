"""LoRA: layers that learn a low-rank change B A of a frozen weight W, y = W x + b + scale B (A x).

`add_lora` replaces named layers of a network in place. A replaced layer keeps its `weight` and `bias` (the same
Parameter objects) and gains `lora_A.weight` [rank, in, ...] and `lora_B.weight` [out, rank, ...]: the names, shapes
and arithmetic of `peft`. Source: Hu et al. 2021."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class LoRALinear(nn.Linear):
    def __init__(self, layer: nn.Linear, rank: int, alpha: float):
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias
        self.lora_A = nn.Linear(self.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, self.out_features, bias=False)
        self.scale = self.full_scale = alpha / rank

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.scale * self.lora_B(self.lora_A(x))

    def merged(self) -> nn.Linear:
        layer = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        delta = _fine(self.lora_B.weight) @ _fine(self.lora_A.weight)
        return _with_change(layer, self, delta)


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
        return super().forward(x) + self.scale * self.lora_B(self.lora_A(x))

    def merged(self) -> nn.Conv2d:
        layer = nn.Conv2d(self.in_channels, self.out_channels, self.kernel_size, self.stride, self.padding,
                          bias=self.bias is not None, device="meta")
        delta = _fine(self.lora_B.weight).flatten(1) @ _fine(self.lora_A.weight).flatten(1)
        return _with_change(layer, self, delta.view_as(self.weight))


class TwinConv2d(nn.Conv2d):
    """A convolution trained in full beside its frozen original, so that a scale in [0, 1] leads from one to the other
    as a LoRA's scale does: (1 - scale) W0 x + scale W x, no gradient through the first (pix2pix-Turbo's `conv_in`
    with noise)."""

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


def _fine(weight: Tensor) -> Tensor:
    """In float32, or float64 where it is that."""
    return weight.detach().to(torch.promote_types(weight.dtype, torch.float32))


def _with_change(layer: nn.Module, adapter: LoRALinear | LoRAConv2d, delta: Tensor) -> nn.Module:
    """`layer` with the adapter's weight plus scale times delta, added in float32 or finer and rounded once."""
    W = _fine(adapter.weight) + adapter.scale * delta
    layer.weight = nn.Parameter(W.to(adapter.weight.dtype), requires_grad=False)
    layer.bias = adapter.bias
    return layer


def replace(module: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(module.get_submodule(parent), child, layer)


def add_lora(module: nn.Module, targets: Iterable[str], rank: int, alpha: float,
             generator: torch.Generator | None = None) -> None:
    """Replaces every linear layer and convolution of `module` whose dotted name is, or ends in, one of `targets`
    (whole parts: `quant_conv` is not `conv`). A starts as Gaussian noise of deviation 1 / rank, B at zero: no change
    at first."""
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
    compute."""
    for name, layer in [(n, m) for n, m in module.named_modules() if isinstance(m, ADAPTERS)]:
        replace(module, name, layer.merged())
    return module

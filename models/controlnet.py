"""A ControlNet for Stable Diffusion 1.5 (`ControlNetModel`), made of the U-Net's own blocks: one more copy of its way
down and its middle, which also sees a picture of edges, depth or poses and tells the U-Net what to add to its skips.

Module names are those of a `diffusers` ControlNet folder, so its state dictionary loads as it is. Source: Zhang et al.
2023, "Adding Conditional Control to Text-to-Image Diffusion Models"."""

from dataclasses import dataclass, fields

import torch.nn.functional as F
from torch import Tensor, nn

from models import unet
from models.unet import DownBlock, MidBlock, TimeEmbedding, UNet, UNetConfig

# Options of `config.json` that other ControlNets use and this file does not build.
FIXED = unet.FIXED | dict(controlnet_conditioning_channel_order="rgb", encoder_hid_dim=None,
                          global_pool_conditions=False)


@dataclass
class ControlNetConfig:
    """Defaults are those of SD 1.5's ControlNets."""
    in_channels: int = 4
    conditioning_channels: int = 3
    conditioning_embedding_out_channels: tuple[int, ...] = (16, 32, 96, 256)
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    attention_head_dim: int | tuple[int, ...] = 8  # the NUMBER of heads, as in the U-Net
    num_attention_heads: int | tuple[int, ...] | None = None
    cross_attention_dim: int = 768
    use_linear_projection: bool = False
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    heads = UNetConfig.heads

    def __post_init__(self):
        n, known = len(self.block_out_channels), {"CrossAttnDownBlock2D", "DownBlock2D"}
        if unknown := {*self.down_block_types} - known:
            raise ValueError(f"the ControlNet has blocks {sorted(unknown)}; built here are {sorted(known)}: take a"
                             " ControlNet of Stable Diffusion 1.x or 2.x")
        if len(self.down_block_types) != n or len(self.heads) != n:
            raise ValueError(f"the ControlNet has {n} widths in block_out_channels, but {len(self.down_block_types)}"
                             f" down blocks and {len(self.heads)} head counts: one each is needed")


def zero(conv: nn.Conv2d) -> nn.Conv2d:
    """At the start of training a ControlNet adds nothing."""
    for p in conv.parameters():
        nn.init.zeros_(p)
    return conv


class ConditionEmbedding(nn.Module):
    """A picture [B, 3, H, W] -> [B, c_out, H/8, W/8] (for four widths)."""

    def __init__(self, c_in: int, widths: tuple[int, ...], c_out: int):
        super().__init__()
        self.conv_in = nn.Conv2d(c_in, widths[0], 3, padding=1)
        self.blocks = nn.ModuleList([
            conv for c, c_next in zip(widths[:-1], widths[1:])
            for conv in (nn.Conv2d(c, c, 3, padding=1), nn.Conv2d(c, c_next, 3, padding=1, stride=2))
        ])
        self.conv_out = zero(nn.Conv2d(widths[-1], c_out, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.conv_in(x))
        for conv in self.blocks:
            x = F.silu(conv(x))
        return self.conv_out(x)


class ControlNet(nn.Module):
    """The U-Net's way down and middle once more, with the condition; module names are the files' own."""

    _run, _time = UNet._run, UNet._time

    def __init__(self, config: ControlNetConfig):
        super().__init__()
        self.config = c = config
        widths, n = c.block_out_channels, len(c.block_out_channels)
        c_time = 4 * widths[0]
        self.conv_in = nn.Conv2d(c.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimeEmbedding(widths[0], c_time)
        self.controlnet_cond_embedding = ConditionEmbedding(c.conditioning_channels,
                                                            c.conditioning_embedding_out_channels, widths[0])
        self.down_blocks = nn.ModuleList([
            DownBlock(widths[max(i - 1, 0)], widths[i], c_time, c.heads[i], "CrossAttn" in c.down_block_types[i],
                      i < n - 1, c)
            for i in range(n)
        ])
        self.mid_block = MidBlock(widths[-1], c_time, c.heads[-1], c)
        skips = [widths[0]] + [w for i, w in enumerate(widths) for _ in range(c.layers_per_block + (i < n - 1))]
        self.controlnet_down_blocks = nn.ModuleList([zero(nn.Conv2d(w, w, 1)) for w in skips])
        self.controlnet_mid_block = zero(nn.Conv2d(widths[-1], widths[-1], 1))
        self.checkpointing = False

    @classmethod
    def from_unet(cls, source: UNet) -> "ControlNet":
        """The start of training: a copy of the U-Net's way down, whose residuals are all zero."""
        names = [f.name for f in fields(ControlNetConfig) if hasattr(source.config, f.name)]
        controlnet = cls(ControlNetConfig(**{name: getattr(source.config, name) for name in names}))
        own = controlnet.state_dict()
        controlnet.load_state_dict(own | {name: t for name, t in source.state_dict().items() if name in own})
        return controlnet

    def forward(self, x: Tensor, t: Tensor | int, context: Tensor, condition: Tensor,
                scale: float = 1.0) -> list[Tensor]:
        """x [B, 4, h, w], t and context as for the U-Net, condition [B, 3, 8h, 8w] in [0, 1], RGB -> the residuals that
        `UNet.forward` takes, times `scale`: one a skip, in the order of the way down, and the middle's (12 + 1)."""
        time, hint = self._time(x, t), self.controlnet_cond_embedding(condition)
        if hint.shape[-2:] != x.shape[-2:]:
            (H, W), (h, w) = condition.shape[-2:], x.shape[-2:]
            factor = 2 ** (len(self.config.conditioning_embedding_out_channels) - 1)
            raise ValueError(f"the condition is {W}x{H} pixels (width x height) and the latent {w}x{h}; expected a"
                             f" condition of {factor * w}x{factor * h}")
        skips = [self.conv_in(x) + hint]
        for block in self.down_blocks:
            skips += self._run(block, skips[-1], time, context)
        middle = self._run(self.mid_block, skips[-1], time, context)
        residuals = [conv(skip) for conv, skip in zip(self.controlnet_down_blocks, skips, strict=True)]
        return [scale * residual for residual in [*residuals, self.controlnet_mid_block(middle)]]

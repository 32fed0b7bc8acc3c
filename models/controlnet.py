"""A ControlNet for Stable Diffusion 1.x and 2.x (`ControlNetModel`).

It is a second copy of the U-Net's way down and middle block, made of the same blocks. It also sees
a picture of edges, depth or poses, and returns residuals that the U-Net adds to its skips.

Module names are those of a `diffusers` ControlNet folder, so its state dict loads without renaming.

Source: Zhang et al. 2023, "Adding Conditional Control to Text-to-Image Diffusion Models".
"""

from dataclasses import dataclass, fields

import torch.nn.functional as F
from torch import Tensor, nn

from models import unet
from models.unet import (
    DownBlock,
    MidBlock,
    TimeEmbedding,
    UNet,
    UNetConfig,
    one_per_row,
    run_block,
)

# Options of `config.json` for which only this value is supported. Other ControlNets use others.
FIXED = unet.FIXED | dict(
    controlnet_conditioning_channel_order="rgb",
    encoder_hid_dim=None,
    global_pool_conditions=False,
)


@dataclass
class ControlNetConfig:
    """The options of `config.json`. The defaults are those of the ControlNets for SD 1.5."""

    in_channels: int = 4
    conditioning_channels: int = 3
    conditioning_embedding_out_channels: tuple[int, ...] = (16, 32, 96, 256)
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    attention_head_dim: int | tuple[int, ...] = 8  # the number of heads, as in the U-Net
    num_attention_heads: int | tuple[int, ...] | None = None
    cross_attention_dim: int = 768
    use_linear_projection: bool = False
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)

    # Properties, computed as for the U-Net.
    heads = UNetConfig.heads
    time_width = UNetConfig.time_width

    def __post_init__(self):
        levels = len(self.block_out_channels)
        down = self.down_block_types

        supported = {"CrossAttnDownBlock2D", "DownBlock2D"}
        unknown = {*down} - supported
        if unknown:
            raise ValueError(
                f"the ControlNet has the blocks {sorted(unknown)}, but only {sorted(supported)} are"
                " supported: use a ControlNet of Stable Diffusion 1.x or 2.x"
            )
        if not len(down) == len(self.heads) == levels:
            raise ValueError(
                f"the ControlNet has {levels} widths in block_out_channels, but {len(down)} down"
                f" blocks and {len(self.heads)} head counts: config.json must name one of each per"
                " width"
            )

    @property
    def condition_factor(self) -> int:
        """The side of the condition over the side of the latent (8 in Stable Diffusion)."""
        return 2 ** (len(self.conditioning_embedding_out_channels) - 1)


def zero(conv: nn.Conv2d) -> nn.Conv2d:
    """The convolution with all parameters 0, so that an untrained ControlNet changes nothing."""
    for p in conv.parameters():
        nn.init.zeros_(p)
    return conv


class ConditionEmbedding(nn.Module):
    """Condition [B, 3, 8h, 8w] -> [B, c_out, h, w]. Each width after the first halves the sides."""

    def __init__(self, c_in: int, widths: tuple[int, ...], c_out: int):
        super().__init__()
        self.conv_in = nn.Conv2d(c_in, widths[0], 3, padding=1)
        self.blocks = nn.ModuleList()
        for c, c_next in zip(widths[:-1], widths[1:]):
            self.blocks.append(nn.Conv2d(c, c, 3, padding=1))
            self.blocks.append(nn.Conv2d(c, c_next, 3, padding=1, stride=2))
        self.conv_out = zero(nn.Conv2d(widths[-1], c_out, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.conv_in(x))
        for conv in self.blocks:
            x = F.silu(conv(x))
        return self.conv_out(x)


class ControlNet(nn.Module):
    """The U-Net's way down and middle block, with a 1x1 convolution for each residual."""

    def __init__(self, config: ControlNetConfig):
        super().__init__()
        self.config = config
        widths = config.block_out_channels
        levels = range(len(widths))

        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimeEmbedding(widths[0], config.time_width)  # type: ignore[misc]
        self.controlnet_cond_embedding = ConditionEmbedding(
            config.conditioning_channels,
            config.conditioning_embedding_out_channels,
            widths[0],
        )
        self.down_blocks = nn.ModuleList([DownBlock(level, config) for level in levels])
        self.mid_block = MidBlock(config)

        # One skip comes from conv_in, one from each layer, one from each downsampler.
        skip_widths = [widths[0]]
        for width, block in zip(widths, self.down_blocks):
            skip_widths += [width] * (len(block.resnets) + len(block.downsamplers))
        self.controlnet_down_blocks = nn.ModuleList([
            zero(nn.Conv2d(width, width, 1))
            for width in skip_widths
        ])
        self.controlnet_mid_block = zero(nn.Conv2d(widths[-1], widths[-1], 1))
        self.checkpointing = False

    @classmethod
    def from_unet(cls, source: UNet) -> "ControlNet":
        """A new ControlNet to be trained: a copy of the U-Net's way down. Its residuals are 0."""
        shared = {}
        for field in fields(ControlNetConfig):
            if hasattr(source.config, field.name):
                shared[field.name] = getattr(source.config, field.name)
        controlnet = cls(ControlNetConfig(**shared))

        tensors = controlnet.state_dict()
        for name, tensor in source.state_dict().items():
            if name in tensors:
                tensors[name] = tensor
        controlnet.load_state_dict(tensors)
        return controlnet

    def forward(
        self,
        x: Tensor,
        t: Tensor | int,
        context: Tensor,
        condition: Tensor,
        scale: float = 1.0,
    ) -> list[Tensor]:
        """The residuals that `UNet.forward` takes, multiplied by `scale`: one for each skip, in the
        order of the way down, then that of the middle block (12 + 1 in Stable Diffusion).

        x [B, 4, h, w], t and context are those of the U-Net. The condition is an RGB picture
        [B, 3, 8h, 8w] in [0, 1]. Raises ValueError if its size does not fit the latent.
        """
        time = self.time_embedding(one_per_row(t, x))
        hint = self.controlnet_cond_embedding(condition)  # [B, C, h, w]
        if hint.shape[-2:] != x.shape[-2:]:
            H, W = condition.shape[-2:]
            h, w = x.shape[-2:]
            factor = self.config.condition_factor
            raise ValueError(
                f"the condition is {W}x{H} pixels (width x height) and the latent {w}x{h};"
                f" expected a condition of {factor * w}x{factor * h}"
            )

        skips = [self.conv_in(x) + hint]
        for block in self.down_blocks:
            x = skips[-1]
            skips += run_block(block, x, time, context, checkpointing=self.checkpointing)
        x = skips[-1]
        x = run_block(self.mid_block, x, time, context, checkpointing=self.checkpointing)

        residuals = []
        for conv, skip in zip(self.controlnet_down_blocks, skips, strict=True):
            residuals.append(scale * conv(skip))
        residuals.append(scale * self.controlnet_mid_block(x))
        return residuals

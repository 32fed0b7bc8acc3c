"""What tells real pictures from made ones: the patch discriminator, which needs no download.

Weights are spectrally normalised (Miyato et al. 2018): divided by their largest singular value, which a power
iteration follows. The iteration is not hidden in the forward pass: `spectral_step` takes one, once an optimizer step,
so that the same step in more pieces, or on more processes, stays the same computation. """

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm


class PatchDiscriminator(nn.Module):
    """Picture [B, 3, H, W] in [-1, 1] -> logits [B, 1, ~H/8, ~W/8], one a patch of 70 x 70 pixels. Source: Isola et
    al. 2017, "Image-to-Image Translation with Conditional Adversarial Networks", with spectral norms in place of
    batch norms."""

    def __init__(self, width: int = 64, in_channels: int = 3):
        super().__init__()
        widths, strides = [in_channels, width, 2 * width, 4 * width, 8 * width], [2, 2, 2, 1]
        self.layers = nn.ModuleList([
            spectral_norm(nn.Conv2d(widths[i], widths[i + 1], 4, strides[i], padding=1)) for i in range(4)
        ])
        self.last = spectral_norm(nn.Conv2d(widths[-1], 1, 4, padding=1))
        self.eval()  # in training mode every forward pass would take a power step of its own

    def train(self, mode: bool = True) -> "PatchDiscriminator":
        return super().train(False)

    def forward(self, x: Tensor) -> Tensor:
        if min(x.shape[2:]) < 24:
            raise ValueError(f"pictures of {x.shape[3]}x{x.shape[2]} are too small for the patch discriminator; expected 24"
                             " pixels a side or more, or no adversarial loss (--lambda_gan 0)")
        for layer in self.layers:
            x = F.leaky_relu(layer(x), 0.2)
        return self.last(x)


@torch.no_grad()
def spectral_step(discriminator: nn.Module) -> None:
    """One power iteration of every spectral norm under `discriminator`."""
    for module in discriminator.modules():
        if hasattr(module, "parametrizations"):
            module.parametrizations.train()
            module.weight  # noqa: B018  computing it in training mode takes the step
            module.parametrizations.eval()

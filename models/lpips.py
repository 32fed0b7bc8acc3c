"""LPIPS, the perceptual distance of two pictures: differences between the features of a VGG16, weighted by what people
called alike. Source: Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric";
version 0.1 of the `lpips` package with `net="vgg"`."""

import torch
from torch import Tensor, nn

SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # ImageNet's mean and deviation, for [-1, 1]
CHANNELS, CONVS = (64, 128, 256, 512, 512), (2, 2, 3, 3, 3)
LAST = (3, 8, 15, 22, 29)  # relu1_2, 2_2, 3_3, 4_3, 5_3


class Lin(nn.Module):
    def __init__(self, c: int):
        super().__init__()
        self.model = nn.ModuleList([nn.Identity(), nn.Conv2d(c, 1, 1, bias=False)])  # 0 was a dropout in its training


class LPIPS(nn.Module):
    """`features.N` are torchvision's VGG16 without what follows relu5_3; `linN.model.1` the file of `lpips`."""

    def __init__(self):
        super().__init__()
        layers, c_in = [], 3
        for c, n in zip(CHANNELS, CONVS):
            layers += [nn.MaxPool2d(2)] if layers else []
            for _ in range(n):
                layers += [nn.Conv2d(c_in, c, 3, padding=1), nn.ReLU(inplace=True)]
                c_in = c
        self.features = nn.Sequential(*layers)
        self.lin0, self.lin1, self.lin2, self.lin3, self.lin4 = (Lin(c) for c in CHANNELS)

    def normalised_features(self, x: Tensor) -> list[Tensor]:
        """Pictures -> five maps, each pixel's features of length one (or all zero)."""
        shift, scale = (x.new_tensor(v).view(3, 1, 1) for v in (SHIFT, SCALE))
        x, maps = (x - shift) / scale, []
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in LAST:
                f = x.to(torch.promote_types(x.dtype, torch.float32))  # 1e-10 is zero in half precision
                maps.append(f / (torch.linalg.vector_norm(f, dim=1, keepdim=True) + 1e-10))
        return maps

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] in [-1, 1], 16 pixels a side or more, not resized -> distances [B], differentiable."""
        if a.shape != b.shape or min(a.shape[2:]) < 16:
            raise ValueError(f"LPIPS was given pictures of shapes {list(a.shape)} and {list(b.shape)};"
                             " it takes two of the same shape, of 16 pixels a side or more")
        lins = (self.lin0, self.lin1, self.lin2, self.lin3, self.lin4)
        return sum((lin.model[1].weight * (fa - fb) ** 2).sum(1).mean((1, 2))
                   for lin, fa, fb in zip(lins, self.normalised_features(a), self.normalised_features(b)))


def from_state_dict(vgg: dict[str, Tensor], lin: dict[str, Tensor]) -> LPIPS:
    """LPIPS, frozen, made of torchvision's VGG16 file (its classifier is left out) and of `vgg.pth` of `lpips`."""
    with torch.device("meta"):
        network = LPIPS()
    tensors = {name: t for name, t in (vgg | lin).items() if not name.startswith("classifier.")}
    network.load_state_dict(tensors, assign=True)
    return network.eval().requires_grad_(False)

"""LPIPS: the perceptual distance of two pictures.

It is the difference between the features that VGG16 sees in them, weighted so that it agrees with
what people find similar.

Source: Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features as a Perceptual
Metric"; version 0.1 of the `lpips` package with `net="vgg"`.
"""

import torch
from torch import Tensor, nn

# ImageNet's mean and standard deviation, per channel, of pictures in [-1, 1].
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)

# VGG16's five stages: channels and number of convolutions. A max pool stands between stages.
CHANNELS = (64, 128, 256, 512, 512)
CONVS = (2, 2, 3, 3, 3)
# Where each stage ends in `features`: relu1_2, relu2_2, relu3_3, relu4_3, relu5_3.
LAST = (3, 8, 15, 22, 29)


class Lin(nn.Module):
    """The weight of each channel, as a 1x1 convolution."""

    def __init__(self, c: int):
        super().__init__()
        # The weight is model.1 in the checkpoint; model.0 was a dropout.
        self.model = nn.ModuleList([nn.Identity(), nn.Conv2d(c, 1, 1, bias=False)])


class LPIPS(nn.Module):
    """Module names are those of the files.

    `features.N` is torchvision's VGG16 up to relu5_3, `linN.model.1` the `lpips` package's file.
    """

    def __init__(self):
        super().__init__()
        layers = []
        c_in = 3
        for c, convs in zip(CHANNELS, CONVS):
            if layers:
                layers.append(nn.MaxPool2d(2))
            for _ in range(convs):
                layers.append(nn.Conv2d(c_in, c, 3, padding=1))
                layers.append(nn.ReLU(inplace=True))
                c_in = c
        self.features = nn.Sequential(*layers)
        self.lin0 = Lin(CHANNELS[0])
        self.lin1 = Lin(CHANNELS[1])
        self.lin2 = Lin(CHANNELS[2])
        self.lin3 = Lin(CHANNELS[3])
        self.lin4 = Lin(CHANNELS[4])

    def vgg_features(self, x: Tensor) -> list[Tensor]:
        """Pictures [B, 3, H, W] in [-1, 1] -> the features [B, C, h, w] of VGG's five stages.

        Pictures are not resized; both sides need at least 16 pixels. At least float32 comes out.
        """
        if min(x.shape[2:]) < 16:
            raise ValueError(
                f"VGG was given pictures of shape {list(x.shape)}; it takes 16 pixels a side or"
                " more"
            )
        shift = x.new_tensor(SHIFT).view(3, 1, 1)
        scale = x.new_tensor(SCALE).view(3, 1, 1)
        x = (x - shift) / scale
        features = []
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in LAST:
                features.append(x.to(torch.promote_types(x.dtype, torch.float32)))
        return features

    def distance(self, features_a: list[Tensor], features_b: list[Tensor]) -> Tensor:
        """The distances [B] of pictures whose `vgg_features` these are."""
        lins = (self.lin0, self.lin1, self.lin2, self.lin3, self.lin4)
        distance = 0.0
        for lin, a, b in zip(lins, features_a, features_b):
            weight = lin.model[1].weight  # [1, C, 1, 1]
            difference = (weight * (unit_length(a) - unit_length(b)) ** 2).sum(1)  # [B, h, w]
            distance = distance + difference.mean((1, 2))
        return distance

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] in [-1, 1] -> distances [B], differentiable."""
        if a.shape != b.shape:
            raise ValueError(
                f"LPIPS was given pictures of shapes {list(a.shape)} and {list(b.shape)};"
                " it takes two of the same shape"
            )
        return self.distance(self.vgg_features(a), self.vgg_features(b))


def unit_length(f: Tensor) -> Tensor:
    """Features [B, C, h, w], scaled to length 1 at each pixel, unless all are zero there."""
    length = torch.linalg.vector_norm(f, dim=1, keepdim=True)
    return f / (length + 1e-10)


def from_state_dict(vgg: dict[str, Tensor], lin: dict[str, Tensor]) -> LPIPS:
    """A frozen LPIPS from torchvision's VGG16 file and the `lpips` package's `vgg.pth`."""
    with torch.device("meta"):
        network = LPIPS()
    kept = {}
    for name, tensor in (vgg | lin).items():
        if not name.startswith("classifier."):
            kept[name] = tensor
    network.load_state_dict(kept, assign=True)
    return network.eval().requires_grad_(False)

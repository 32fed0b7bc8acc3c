"""The Inception network of FID, with its weights of 2015: pictures in, 2048 features out.

It differs from torchvision's Inception v3 in three places: average pooling does not count the
padding, the last block has a max pool instead of an average pool, and there are 1008 classes. It
has 23,850,960 parameters. Module names are torchvision's.

Sources: Szegedy et al. 2016, "Rethinking the Inception Architecture for Computer Vision";
`pytorch-fid`. The resizing is `clean-fid`'s: Parmar et al. 2022, "On Aliased Resizing and
Surprising Subtleties in GAN Evaluation".
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# -------------------- layers

class Norm(nn.Module):
    """A batch norm that always uses its stored statistics, even in training mode."""

    def __init__(self, c: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(c))
        self.bias = nn.Parameter(torch.zeros(c))
        self.register_buffer("running_mean", torch.zeros(c))
        self.register_buffer("running_var", torch.ones(c))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, eps=1e-3
        )


class Conv(nn.Module):
    """Convolution, batch norm, ReLU. By default stride 1 keeps the size; stride 2 pads nothing."""

    def __init__(
        self,
        c_in: int,
        c_out: int,
        kernel: int | tuple[int, int],
        stride: int = 1,
        padding: str | None = None,
    ):
        super().__init__()
        if padding is None:
            padding = "same" if stride == 1 else "valid"
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False)
        self.bn = Norm(c_out)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


def mean_pool(x: Tensor) -> Tensor:
    """Mean over 3x3 neighbours, of which the padding does not count."""
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


# -------------------- blocks

class A(nn.Module):
    """`c_in` channels -> 224 + `c_pool`, the same size."""

    def __init__(self, c_in: int, c_pool: int):
        super().__init__()
        self.branch1x1 = Conv(c_in, 64, 1)
        self.branch5x5_1 = Conv(c_in, 48, 1)
        self.branch5x5_2 = Conv(48, 64, 5)
        self.branch3x3dbl_1 = Conv(c_in, 64, 1)
        self.branch3x3dbl_2 = Conv(64, 96, 3)
        self.branch3x3dbl_3 = Conv(96, 96, 3)
        self.branch_pool = Conv(c_in, c_pool, 1)

    def forward(self, x: Tensor) -> Tensor:
        one = self.branch1x1(x)
        five = self.branch5x5_2(self.branch5x5_1(x))
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        double = self.branch3x3dbl_3(double)
        pooled = self.branch_pool(mean_pool(x))
        return torch.cat([one, five, double, pooled], dim=1)


class B(nn.Module):
    """288 channels -> 768, half the size."""

    def __init__(self):
        super().__init__()
        self.branch3x3 = Conv(288, 384, 3, stride=2)
        self.branch3x3dbl_1 = Conv(288, 64, 1)
        self.branch3x3dbl_2 = Conv(64, 96, 3)
        self.branch3x3dbl_3 = Conv(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        single = self.branch3x3(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        double = self.branch3x3dbl_3(double)
        pooled = F.max_pool2d(x, 3, stride=2)
        return torch.cat([single, double, pooled], dim=1)


class C(nn.Module):
    """768 channels -> 768, the same size. A 7x7 convolution is a 1x7 and a 7x1 one in turn."""

    def __init__(self, c: int):
        super().__init__()
        row = (1, 7)
        column = (7, 1)
        self.branch1x1 = Conv(768, 192, 1)
        self.branch7x7_1 = Conv(768, c, 1)
        self.branch7x7_2 = Conv(c, c, row)
        self.branch7x7_3 = Conv(c, 192, column)
        self.branch7x7dbl_1 = Conv(768, c, 1)
        self.branch7x7dbl_2 = Conv(c, c, column)
        self.branch7x7dbl_3 = Conv(c, c, row)
        self.branch7x7dbl_4 = Conv(c, c, column)
        self.branch7x7dbl_5 = Conv(c, 192, row)
        self.branch_pool = Conv(768, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        one = self.branch1x1(x)
        single = self.branch7x7_2(self.branch7x7_1(x))
        single = self.branch7x7_3(single)
        double = self.branch7x7dbl_2(self.branch7x7dbl_1(x))
        double = self.branch7x7dbl_4(self.branch7x7dbl_3(double))
        double = self.branch7x7dbl_5(double)
        pooled = self.branch_pool(mean_pool(x))
        return torch.cat([one, single, double, pooled], dim=1)


class D(nn.Module):
    """768 channels -> 1280, half the size."""

    def __init__(self):
        super().__init__()
        self.branch3x3_1 = Conv(768, 192, 1)
        self.branch3x3_2 = Conv(192, 320, 3, stride=2)
        self.branch7x7x3_1 = Conv(768, 192, 1)
        self.branch7x7x3_2 = Conv(192, 192, (1, 7))
        self.branch7x7x3_3 = Conv(192, 192, (7, 1))
        self.branch7x7x3_4 = Conv(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        short = self.branch3x3_2(self.branch3x3_1(x))
        long = self.branch7x7x3_2(self.branch7x7x3_1(x))
        long = self.branch7x7x3_4(self.branch7x7x3_3(long))
        pooled = F.max_pool2d(x, 3, stride=2)
        return torch.cat([short, long, pooled], dim=1)


class E(nn.Module):
    """`c_in` channels -> 2048, the same size. 1x3 and 3x1 convolutions stand side by side."""

    def __init__(self, c_in: int, max_pool: bool):
        super().__init__()
        row = (1, 3)
        column = (3, 1)
        self.max_pool = max_pool
        self.branch1x1 = Conv(c_in, 320, 1)
        self.branch3x3_1 = Conv(c_in, 384, 1)
        self.branch3x3_2a = Conv(384, 384, row)
        self.branch3x3_2b = Conv(384, 384, column)
        self.branch3x3dbl_1 = Conv(c_in, 448, 1)
        self.branch3x3dbl_2 = Conv(448, 384, 3)
        self.branch3x3dbl_3a = Conv(384, 384, row)
        self.branch3x3dbl_3b = Conv(384, 384, column)
        self.branch_pool = Conv(c_in, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        single = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = F.max_pool2d(x, 3, stride=1, padding=1) if self.max_pool else mean_pool(x)
        branches = [
            self.branch1x1(x),
            self.branch3x3_2a(single),
            self.branch3x3_2b(single),
            self.branch3x3dbl_3a(double),
            self.branch3x3dbl_3b(double),
            self.branch_pool(pooled),
        ]
        return torch.cat(branches, dim=1)


# -------------------- the whole network

class Inception(nn.Module):
    """The network that FID was defined with."""

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3, padding="valid")
        self.Conv2d_2b_3x3 = Conv(32, 64, 3)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3, padding="valid")
        self.Mixed_5b = A(192, 32)
        self.Mixed_5c = A(256, 64)
        self.Mixed_5d = A(288, 64)
        self.Mixed_6a = B()
        self.Mixed_6b = C(128)
        self.Mixed_6c = C(160)
        self.Mixed_6d = C(160)
        self.Mixed_6e = C(192)
        self.Mixed_7a = D()
        self.Mixed_7b = E(1280, max_pool=False)
        self.Mixed_7c = E(2048, max_pool=True)
        self.fc = nn.Linear(2048, 1008)  # in the files, but the features end before it

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, 299, 299] of `prepare` -> features [B, 2048] (pool3)."""
        x = self.Conv2d_1a_3x3(pixels)  # [B, 32, 149, 149]
        x = self.Conv2d_2a_3x3(x)
        x = self.Conv2d_2b_3x3(x)  # [B, 64, 147, 147]
        x = F.max_pool2d(x, 3, stride=2)
        x = self.Conv2d_3b_1x1(x)  # [B, 80, 73, 73]
        x = self.Conv2d_4a_3x3(x)  # [B, 192, 71, 71]
        x = F.max_pool2d(x, 3, stride=2)  # [B, 192, 35, 35]

        x = self.Mixed_5b(x)
        x = self.Mixed_5c(x)
        x = self.Mixed_5d(x)  # [B, 288, 35, 35]
        x = self.Mixed_6a(x)  # [B, 768, 17, 17]
        x = self.Mixed_6b(x)
        x = self.Mixed_6c(x)
        x = self.Mixed_6d(x)
        x = self.Mixed_6e(x)
        x = self.Mixed_7a(x)  # [B, 1280, 8, 8]
        x = self.Mixed_7b(x)
        x = self.Mixed_7c(x)  # [B, 2048, 8, 8]
        return x.mean((2, 3))


def prepare(x: Tensor) -> Tensor:
    """Pictures [B, 3, H, W] in [-1, 1] -> pixels [B, 3, 299, 299] in [-1, 1), as in clean-fid.

    Each channel of the 8-bit picture is resized in floating point by Pillow's antialiased bicubic
    filter, clipped to [0, 255] without rounding, and becomes (x - 128) / 128. No gradient flows.
    """
    # On the CPU, because not every device has float64.
    levels = ((x.detach().cpu().double().clamp(-1, 1) + 1) * 127.5).round()
    levels = F.interpolate(levels, (299, 299), mode="bicubic", antialias=True)
    levels = levels.clamp(0, 255)
    return ((levels - 128) / 128).to(x)


def from_state_dict(tensors: dict[str, Tensor]) -> Inception:
    """A frozen network from the tensors of `pt_inception-2015-12-05-6726825d.pth`."""
    with torch.device("meta"):
        network = Inception()
    kept = {}
    for name, tensor in tensors.items():
        if not name.endswith(".num_batches_tracked"):
            kept[name] = tensor
    network.load_state_dict(kept, assign=True)
    return network.eval().requires_grad_(False)

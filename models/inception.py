"""The Inception network of the FID, with the weights of 2015: pictures in, 2048 features out.

It differs from torchvision's Inception v3 in three places: the average pools do not count the padding, the last block
has a max pool in place of one, and there are 1008 classes. 23,850,960 parameters. Module names are torchvision's.
Sources: Szegedy et al. 2016, "Rethinking the Inception Architecture for Computer Vision"; `pytorch-fid`; the resizing
is `clean-fid`'s (Parmar et al. 2022, "On Aliased Resizing and Surprising Subtleties in GAN Evaluation")."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Norm(nn.Module):
    """A batch norm that only ever uses its stored statistics."""

    def __init__(self, c: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(c)), nn.Parameter(torch.zeros(c))
        self.register_buffer("running_mean", torch.zeros(c))
        self.register_buffer("running_var", torch.ones(c))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=1e-3)


class Conv(nn.Module):
    """With stride 1 as large out as in, with stride 2 without padding."""

    def __init__(self, c_in: int, c_out: int, kernel: int | tuple[int, int], stride: int = 1,
                 padding: str | None = None):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding or ("same" if stride == 1 else "valid"), bias=False)
        self.bn = Norm(c_out)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


def mean_pool(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class A(nn.Module):
    """`c_in` channels -> 224 + `c_pool`, the same size; the pool does not count padding."""

    def __init__(self, c_in: int, c_pool: int):
        super().__init__()
        self.branch1x1 = Conv(c_in, 64, 1)
        self.branch5x5_1, self.branch5x5_2 = Conv(c_in, 48, 1), Conv(48, 64, 5)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Conv(c_in, 64, 1), Conv(64, 96, 3)
        self.branch3x3dbl_3 = Conv(96, 96, 3)
        self.branch_pool = Conv(c_in, c_pool, 1)

    def forward(self, x: Tensor) -> Tensor:
        wide = self.branch5x5_2(self.branch5x5_1(x))
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), wide, double, self.branch_pool(mean_pool(x))], dim=1)


class B(nn.Module):
    """288 channels -> 768, half the size."""

    def __init__(self):
        super().__init__()
        self.branch3x3 = Conv(288, 384, 3, stride=2)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Conv(288, 64, 1), Conv(64, 96, 3)
        self.branch3x3dbl_3 = Conv(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, stride=2)], dim=1)


class C(nn.Module):
    """768 channels -> 768; 7x7 convolutions as a row and a column."""

    def __init__(self, c: int):
        super().__init__()
        row, column = (1, 7), (7, 1)
        self.branch1x1 = Conv(768, 192, 1)
        self.branch7x7_1, self.branch7x7_2, self.branch7x7_3 = Conv(768, c, 1), Conv(c, c, row), Conv(c, 192, column)
        self.branch7x7dbl_1 = Conv(768, c, 1)
        self.branch7x7dbl_2, self.branch7x7dbl_3 = Conv(c, c, column), Conv(c, c, row)
        self.branch7x7dbl_4, self.branch7x7dbl_5 = Conv(c, c, column), Conv(c, 192, row)
        self.branch_pool = Conv(768, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        single = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), single, double, self.branch_pool(mean_pool(x))], dim=1)


class D(nn.Module):
    """768 channels -> 1280, half the size."""

    def __init__(self):
        super().__init__()
        self.branch3x3_1, self.branch3x3_2 = Conv(768, 192, 1), Conv(192, 320, 3, stride=2)
        self.branch7x7x3_1, self.branch7x7x3_2 = Conv(768, 192, 1), Conv(192, 192, (1, 7))
        self.branch7x7x3_3, self.branch7x7x3_4 = Conv(192, 192, (7, 1)), Conv(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        long = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), long, F.max_pool2d(x, 3, stride=2)], dim=1)


class E(nn.Module):
    """`c_in` channels -> 2048; 3x3 convolutions as a row beside a column."""

    def __init__(self, c_in: int, max_pool: bool):
        super().__init__()
        row, column = (1, 3), (3, 1)
        self.max_pool = max_pool
        self.branch1x1 = Conv(c_in, 320, 1)
        self.branch3x3_1 = Conv(c_in, 384, 1)
        self.branch3x3_2a, self.branch3x3_2b = Conv(384, 384, row), Conv(384, 384, column)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Conv(c_in, 448, 1), Conv(448, 384, 3)
        self.branch3x3dbl_3a, self.branch3x3dbl_3b = Conv(384, 384, row), Conv(384, 384, column)
        self.branch_pool = Conv(c_in, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        single = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = F.max_pool2d(x, 3, stride=1, padding=1) if self.max_pool else mean_pool(x)
        return torch.cat([self.branch1x1(x), self.branch3x3_2a(single), self.branch3x3_2b(single),
                          self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double), self.branch_pool(pooled)], dim=1)


class Inception(nn.Module):
    """Pixels of `prepare` [B, 3, 299, 299] -> features [B, 2048], of the network with which FID was defined."""

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3, padding="valid")
        self.Conv2d_2b_3x3 = Conv(32, 64, 3)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3, padding="valid")
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = A(192, 32), A(256, 64), A(288, 64)
        self.Mixed_6a = B()
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = C(128), C(160), C(160), C(192)
        self.Mixed_7a = D()
        self.Mixed_7b, self.Mixed_7c = E(1280, max_pool=False), E(2048, max_pool=True)
        self.fc = nn.Linear(2048, 1008)  # in the files; the features end before it

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, 299, 299] from `prepare` -> features [B, 2048] (pool3)."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(pixels)))  # [B, 64, 147, 147]
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, stride=2)))  # [B, 192, 71, 71]
        x = F.max_pool2d(x, 3, stride=2)
        for block in (self.Mixed_5b, self.Mixed_5c, self.Mixed_5d, self.Mixed_6a, self.Mixed_6b, self.Mixed_6c,
                      self.Mixed_6d, self.Mixed_6e, self.Mixed_7a, self.Mixed_7b, self.Mixed_7c):
            x = block(x)  # [B, 288, 35, 35], from 6a on [B, 768, 17, 17], from 7a on [B, 2048, 8, 8]
        return x.mean((2, 3))


def prepare(x: Tensor) -> Tensor:
    """Pictures [B, 3, H, W] in [-1, 1] -> pixels [B, 3, 299, 299] in [-1, 1), as clean-fid makes them of the 8-bit
    picture: each channel resized as float by Pillow's bicubic, antialiased, not rounded, clipped to [0, 255]; then
    (x - 128) / 128. No gradient flows."""
    levels = ((x.detach().cpu().double().clamp(-1, 1) + 1) * 127.5).round()  # on the CPU: not every device has float64
    levels = F.interpolate(levels, (299, 299), mode="bicubic", antialias=True).clamp(0, 255)
    return ((levels - 128) / 128).to(x)


def from_state_dict(tensors: dict[str, Tensor]) -> Inception:
    """The network, frozen, made of the tensors of `pt_inception-2015-12-05-6726825d.pth`."""
    with torch.device("meta"):
        network = Inception()
    tensors = {name: t for name, t in tensors.items() if not name.endswith(".num_batches_tracked")}
    network.load_state_dict(tensors, assign=True)
    return network.eval().requires_grad_(False)

"""The smallest world: points in the plane, from 25 narrow Gaussians on a grid, and two networks that fit it.

A one-step generator that has learned only a blob, or only some of the modes, is seen at a glance here and told in two
numbers (`measure`). The networks have the call signature of the large ones, so that `train_yoso.py --base gaussians`
runs the same loss functions in a minute or two on one thread. What comes out, by seed: README.md.
"""

from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.utils.data import Dataset

from models.diffusion import Schedule
from models.unet import timestep_embedding
from models.vae import Identity, IdentityConfig

AXIS = (-4.0, -2.0, 0.0, 2.0, 4.0)
CENTRES = torch.tensor([(x, y) for x in AXIS for y in AXIS])  # [25, 2]
DEVIATION = 0.05
SCALING = 1.0  # the coordinates as they are: of deviation 2.8; of deviation 1 the modes are too fine for the MLP
SAMPLES = 10_000  # of a measurement
SCHEDULE = dict(num_train_timesteps=1000, beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012,
                prediction_type="v_prediction", timestep_spacing="trailing")


def draw(n: int, generator: torch.Generator) -> Tensor:
    """n points [n, 2]."""
    mode = torch.randint(len(CENTRES), (n,), generator=generator)
    return CENTRES[mode] + DEVIATION * torch.randn(n, 2, generator=generator)


class Points(Dataset):
    """Items as of `data.PairedFolder`, a point [2] in place of the pictures and no caption."""

    captions = [""]

    def __init__(self, split: str, seed: int = 0, n: int = 50_000):
        offset = 0 if split == "train" else 1
        self.points = draw(n, torch.Generator().manual_seed(2 * seed + offset))

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, item: int | tuple[int, tuple[int, ...]]) -> dict:
        index = item[0] if isinstance(item, tuple) else item
        return dict(target=self.points[index], caption="", name=f"point {index}")


class MLP(nn.Module):
    """x [B, 2], t one timestep or [B] in 0 ... 999 -> [B, c_out]; there is no context to look at. Generator with c_out
    2, discriminator with 1."""

    config = SimpleNamespace(in_channels=2)

    def __init__(self, c_out: int, width: int = 128, layers: int = 3):
        super().__init__()
        self.conv_in = nn.Linear(2, width)
        self.time = nn.Linear(width, width)
        self.hidden = nn.ModuleList([nn.Linear(width, width) for _ in range(layers)])
        self.conv_out = nn.Linear(width, c_out)

    def forward(self, x: Tensor, t: Tensor | int, context: Tensor | None = None) -> Tensor:
        t = torch.as_tensor(t, device=x.device).expand(len(x))
        h = self.conv_in(x) + self.time(timestep_embedding(t, self.time.in_features).to(x.dtype))
        for layer in self.hidden:
            h = layer(F.silu(h))
        return self.conv_out(F.silu(h))


@dataclass
class Base:
    """What a trainer needs of a `bases.Base`. There is no caption, and so no context."""
    denoiser: MLP
    schedule: Schedule
    vae: Identity
    text_encoder = tokenizer = transformer = None

    @staticmethod
    def encode(texts: list[str]) -> tuple[Tensor]:
        return (torch.zeros(len(texts), 0),)


def load_base(seed: int, dtype: torch.dtype, device: torch.device) -> Base:
    torch.manual_seed(seed)
    network = MLP(2).requires_grad_(False).to(device, dtype)
    return Base(network, Schedule.from_config(SCHEDULE), Identity(IdentityConfig(SCALING)))


def measure(samples: Tensor) -> dict[str, float]:
    """Of samples [N, 2]: the share that lies within three deviations of a centre ("good"), and the number of the 25
    modes with at least 20 good samples of every 10,000."""
    distance, mode = torch.cdist(samples.double().cpu(), CENTRES.double()).min(dim=1)
    good = distance <= 3 * DEVIATION
    count = torch.bincount(mode[good], minlength=len(CENTRES))
    return dict(modes=(count * SAMPLES >= 20 * len(samples)).sum().item(), good=good.double().mean().item())


def scatter(samples: Tensor, size: int = 400) -> Tensor:
    """Samples [N, 2] as dots on a picture [3, size, size] in [-1, 1], rings of three deviations where they belong.
    The frame is -5.5 ... 5.5; what lies outside is on its edge."""
    picture = Image.new("RGB", (size, size), "white")
    pen, unit = ImageDraw.Draw(picture), size / 11
    places = ((samples.detach().float().cpu().nan_to_num() / 5.5).clamp(-1, 1) + 1) * (size - 1) / 2
    pen.point([(x, size - 1 - y) for x, y in places.tolist()], fill="#1f5fa8")
    for x, y in CENTRES.tolist():
        r, cx, cy = 3 * DEVIATION * unit, size / 2 + x * unit, size / 2 - y * unit
        pen.ellipse([cx - r, cy - r, cx + r, cy + r], outline="#d04040")
    return torch.from_numpy(np.asarray(picture, np.float32) / 127.5 - 1).permute(2, 0, 1)

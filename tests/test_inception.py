"""FID's Inception network agrees, block by block, with a second implementation of it.

That one follows the paper's tables, with the changes of FID's version. The resizing agrees with
Pillow's.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import normal, parameters, relative
from PIL import Image
from torch import Tensor

from models.inception import Inception, from_state_dict, prepare

ROW7 = (1, 7)
COLUMN7 = (7, 1)
ROW3 = (1, 3)
COLUMN3 = (3, 1)


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    """Random tensors for the network: activations keep their size, batch norms do something."""
    tensors = {}
    for seed, (name, t) in enumerate(Inception().state_dict().items()):
        noise = normal(*t.shape, seed=seed)
        if t.ndim > 1:
            tensors[name] = noise / (t[0].numel() / 2) ** 0.5
        elif name.endswith(("running_var", "bn.weight")):
            tensors[name] = 0.5 + noise.abs()
        else:
            tensors[name] = 0.3 * noise
    return tensors


class Reference:
    """Inception v3 (figures 5, 6, 7 and table 1 of the paper) with the changes of FID's version."""

    def __init__(self, tensors: dict[str, Tensor]):
        self.tensors = tensors

    def outputs(self, x: Tensor) -> dict[str, Tensor]:
        """The output of every block, by name."""
        outputs = {}
        for name, k, stride, pad in [
            ("Conv2d_1a_3x3", 3, 2, False),
            ("Conv2d_2a_3x3", 3, 1, False),
            ("Conv2d_2b_3x3", 3, 1, True),
            ("pool", 3, 2, False),
            ("Conv2d_3b_1x1", 1, 1, True),
            ("Conv2d_4a_3x3", 3, 1, False),
            ("pool", 3, 2, False),
        ]:
            if name == "pool":
                x = F.max_pool2d(x, k, stride)
            else:
                x = self.conv(x, name, (k, k), stride, pad)
                outputs[name] = x
        for which in ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c"):
            name = f"Mixed_{which}"
            x = torch.cat(self.branches(x, which, f"{name}.branch"), dim=1)
            outputs[name] = x
        outputs["features"] = x.mean(3).mean(2)
        return outputs

    def branches(self, x: Tensor, which: str, branch: str) -> list[Tensor]:
        """The branches of one of the blocks 5b ... 7c; `branch` begins their names."""
        if which[0] == "5":
            return [
                self.conv(x, branch + "1x1", (1, 1)),
                self.chain(x, branch + "5x5", [1, 5]),
                self.chain(x, branch + "3x3dbl", [1, 3, 3]),
                self.conv(self.average(x), branch + "_pool", (1, 1)),
            ]
        if which == "6a":
            return [
                self.conv(x, branch + "3x3", (3, 3), 2, False),
                self.chain(x, branch + "3x3dbl", [1, 3, 3], down=True),
                F.max_pool2d(x, 3, 2),
            ]
        if which[0] == "6":
            return [
                self.conv(x, branch + "1x1", (1, 1)),
                self.chain(x, branch + "7x7", [1, ROW7, COLUMN7]),
                self.chain(x, branch + "7x7dbl", [1, COLUMN7, ROW7, COLUMN7, ROW7]),
                self.conv(self.average(x), branch + "_pool", (1, 1)),
            ]
        if which == "7a":
            return [
                self.chain(x, branch + "3x3", [1, 3], down=True),
                self.chain(x, branch + "7x7x3", [1, ROW7, COLUMN7, 3], down=True),
                F.max_pool2d(x, 3, 2),
            ]
        single = self.chain(x, branch + "3x3", [1])
        double = self.chain(x, branch + "3x3dbl", [1, 3])
        pooled = self.average(x) if which == "7b" else F.max_pool2d(x, 3, 1, padding=1)
        return [
            self.conv(x, branch + "1x1", (1, 1)),
            self.conv(single, branch + "3x3_2a", ROW3),
            self.conv(single, branch + "3x3_2b", COLUMN3),
            self.conv(double, branch + "3x3dbl_3a", ROW3),
            self.conv(double, branch + "3x3dbl_3b", COLUMN3),
            self.conv(pooled, branch + "_pool", (1, 1)),
        ]

    def conv(
        self, x: Tensor, name: str, kernel: tuple[int, int], stride: int = 1, pad: bool = True
    ) -> Tensor:
        """Convolution, batch norm, ReLU."""
        weight = self.tensors[f"{name}.conv.weight"]
        assert weight.shape[2:] == kernel and weight.shape[1] == x.shape[1]
        padding = [k // 2 for k in kernel] if pad else 0
        x = F.conv2d(x, weight, stride=stride, padding=padding)
        gain = self.tensors[f"{name}.bn.weight"][:, None, None]
        bias = self.tensors[f"{name}.bn.bias"][:, None, None]
        mean = self.tensors[f"{name}.bn.running_mean"][:, None, None]
        var = self.tensors[f"{name}.bn.running_var"][:, None, None]
        return ((x - mean) / (var + 0.001).sqrt() * gain + bias).clamp(min=0)

    def chain(self, x: Tensor, name: str, kernels: list, down: bool = False) -> Tensor:
        """Numbered convolutions in a row; with `down`, the last has stride 2."""
        for i, k in enumerate(kernels, start=1):
            kernel = (k, k) if isinstance(k, int) else k
            halves = down and i == len(kernels)
            x = self.conv(x, f"{name}_{i}", kernel, stride=2 if halves else 1, pad=not halves)
        return x

    def average(self, x: Tensor) -> Tensor:
        """The mean of those 3 x 3 neighbours that lie in the picture."""
        H, W = x.shape[2:]
        padded = F.pad(x, (1, 1, 1, 1))
        inside = F.pad(torch.ones_like(x), (1, 1, 1, 1))
        total = 0
        count = 0
        for i in range(3):
            for j in range(3):
                total = total + padded[:, :, i:i + H, j:j + W]
                count = count + inside[:, :, i:i + H, j:j + W]
        return total / count


@torch.no_grad()
def test_every_block_is_the_papers_with_the_changes_of_fids_version(weights):
    network = from_state_dict(weights)
    names = {module: name for name, module in network.named_children()}
    seen = {}

    def record(module, inputs, output):
        seen[names[module]] = output

    for module in names:
        module.register_forward_hook(record)
    x = normal(1, 3, 299, 299)
    seen["features"] = network(x)
    expected = Reference(weights).outputs(x)
    assert list(seen) == list(expected)
    assert max(relative(seen[name], expected[name]) for name in seen) < 1e-9
    shapes = {name: list(t.shape[1:]) for name, t in seen.items()}
    assert shapes["Mixed_5d"] == [288, 35, 35] and shapes["Mixed_6e"] == [768, 17, 17]
    assert shapes["Mixed_7c"] == [2048, 8, 8] and shapes["features"] == [2048]


@pytest.mark.parametrize("size", [(64, 96), (299, 299), (450, 1000)], ids=str)
def test_preparation_is_clean_fids(size):
    # Black and white pixels, so that the bicubic filter overshoots and clipping matters.
    picture = np.random.default_rng(0).integers(0, 2, (*size, 3), dtype=np.uint8) * 255
    resized = []
    for channel in picture.transpose(2, 0, 1):
        channel = Image.fromarray(channel.astype(np.float32))
        channel = channel.resize((299, 299), Image.BICUBIC)
        resized.append(np.asarray(channel).clip(0, 255))
    expected = torch.from_numpy(np.stack(resized))
    ours = prepare(torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 127.5 - 1)
    assert ours.min() == -1 and ours.max() == 127 / 128
    assert relative(ours[0], (expected - 128) / 128) < 1e-6
    # Pictures are rounded to 8 bits first, as in a file.
    not_whole = torch.full((1, 3, 9, 9), 100.4 / 127.5 - 1)
    expected = torch.full((1, 3, 299, 299), (100 - 128) / 128)
    assert relative(prepare(not_whole), expected) < 1e-6


def test_files_that_do_not_fit_are_refused_by_the_tensors_name(weights):
    # Newer files also count the batches.
    counted = weights | {"Mixed_5b.branch1x1.bn.num_batches_tracked": torch.tensor(0)}
    assert all(not p.requires_grad for p in from_state_dict(counted).parameters())
    with pytest.raises(RuntimeError, match=r"size mismatch for .*fc\.bias"):  # torchvision's own
        from_state_dict(weights | {"fc.bias": torch.zeros(1000)})
    with pytest.raises(RuntimeError, match=r"Unexpected.*AuxLogits\.fc\.bias"):
        from_state_dict(weights | {"AuxLogits.fc.bias": torch.zeros(1000)})
    with pytest.raises(RuntimeError, match=r"Missing.*Mixed_6a\.branch3x3\.bn\.running_var"):
        lacking = dict(weights)
        del lacking["Mixed_6a.branch3x3.bn.running_var"]
        from_state_dict(lacking)


def test_size_of_the_network():
    assert parameters(Inception()) == 23_850_960

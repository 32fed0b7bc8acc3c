"""models/inception.py agrees, block by block, with the network written a second time from the paper's tables and the
differences of the FID's version; the resizing is Pillow's."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import normal, parameters, relative
from PIL import Image
from torch import Tensor

from models.inception import Inception, from_state_dict, prepare

ROW7, COLUMN7, ROW3, COLUMN3 = (1, 7), (7, 1), (1, 3), (3, 1)


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    """Tensors as published, that keep the size of what goes through them and hide no part of a batch norm."""
    tensors = {}
    for seed, (name, t) in enumerate(Inception().state_dict().items()):
        noise = normal(*t.shape, seed=seed)
        tensors[name] = (noise / (t[0].numel() / 2) ** 0.5 if t.ndim > 1 else
                         0.5 + noise.abs() if name.endswith(("running_var", "bn.weight")) else 0.3 * noise)
    return tensors


def reference(tensors: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
    """What comes out of every block of Inception v3 (figures 5, 6, 7 and table 1 of the paper) in the FID's version."""
    outputs = {}

    def conv(x: Tensor, name: str, kernel: tuple[int, int], stride: int = 1, pad: bool = True) -> Tensor:
        weight = tensors[f"{name}.conv.weight"]
        assert weight.shape[2:] == kernel and weight.shape[1] == x.shape[1]
        x = F.conv2d(x, weight, stride=stride, padding=[k // 2 for k in kernel] if pad else 0)
        gain, bias, mean, var = (tensors[f"{name}.bn.{part}"][:, None, None]
                                 for part in ("weight", "bias", "running_mean", "running_var"))
        return ((x - mean) / (var + 0.001).sqrt() * gain + bias).clamp(min=0)

    def chain(x: Tensor, name: str, *kernels) -> Tensor:
        """Numbered convolutions, one behind the other; the last with stride 2 where the list ends in "down"."""
        down = kernels[-1] == "down"
        kernels = kernels[:-1] if down else kernels
        for i, k in enumerate(kernels, 1):
            last = down and i == len(kernels)
            x = conv(x, f"{name}_{i}", (k, k) if isinstance(k, int) else k, 2 if last else 1, not last)
        return x

    def average(x: Tensor) -> Tensor:
        """Over what of the 3 x 3 neighbours lies in the picture."""
        padded, there = F.pad(x, (1, 1, 1, 1)), F.pad(torch.ones_like(x), (1, 1, 1, 1))
        total, count = (sum(p[:, :, i:i + x.shape[2], j:j + x.shape[3]] for i in range(3) for j in range(3))
                        for p in (padded, there))
        return total / count

    def spread(x: Tensor, name: str) -> list[Tensor]:
        return [conv(x, name + "a", ROW3), conv(x, name + "b", COLUMN3)]

    stem = [("Conv2d_1a_3x3", 3, 2, False), ("Conv2d_2a_3x3", 3, 1, False), ("Conv2d_2b_3x3", 3, 1, True), None,
            ("Conv2d_3b_1x1", 1, 1, True), ("Conv2d_4a_3x3", 3, 1, False), None]
    for layer in stem:
        if layer is None:
            x = F.max_pool2d(x, 3, 2)
        else:
            name, k, stride, pad = layer
            outputs[name] = x = conv(x, name, (k, k), stride, pad)
    for which in ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c"):
        m, down = f"Mixed_{which}.", F.max_pool2d(x, 3, 2)
        if which[0] == "5":
            parts = [conv(x, m + "branch1x1", (1, 1)), chain(x, m + "branch5x5", 1, 5),
                     chain(x, m + "branch3x3dbl", 1, 3, 3), conv(average(x), m + "branch_pool", (1, 1))]
        elif which == "6a":
            parts = [conv(x, m + "branch3x3", (3, 3), 2, False), chain(x, m + "branch3x3dbl", 1, 3, 3, "down"), down]
        elif which[0] == "6":
            parts = [conv(x, m + "branch1x1", (1, 1)), chain(x, m + "branch7x7", 1, ROW7, COLUMN7),
                     chain(x, m + "branch7x7dbl", 1, COLUMN7, ROW7, COLUMN7, ROW7),
                     conv(average(x), m + "branch_pool", (1, 1))]
        elif which == "7a":
            parts = [chain(x, m + "branch3x3", 1, 3, "down"), chain(x, m + "branch7x7x3", 1, ROW7, COLUMN7, 3, "down"),
                     down]
        else:
            pooled = average(x) if which == "7b" else F.max_pool2d(x, 3, 1, padding=1)
            parts = [conv(x, m + "branch1x1", (1, 1)), *spread(chain(x, m + "branch3x3", 1), m + "branch3x3_2"),
                     *spread(chain(x, m + "branch3x3dbl", 1, 3), m + "branch3x3dbl_3"),
                     conv(pooled, m + "branch_pool", (1, 1))]
        outputs[m[:-1]] = x = torch.cat(parts, dim=1)
    return outputs | {"features": x.mean(3).mean(2)}


@torch.no_grad()
def test_every_block_is_the_papers_with_the_fids_differences(weights):
    network, seen = from_state_dict(weights), {}
    for name, module in network.named_children():
        module.register_forward_hook(lambda module, inputs, output, name=name: seen.update({name: output}))
    x = normal(1, 3, 299, 299)
    seen["features"] = network(x)
    expected = reference(weights, x)
    assert list(seen) == list(expected)
    assert max(relative(seen[name], expected[name]) for name in seen) < 1e-9
    shapes = {name: list(t.shape[1:]) for name, t in seen.items()}
    assert shapes["Mixed_5d"] == [288, 35, 35] and shapes["Mixed_6e"] == [768, 17, 17]
    assert shapes["Mixed_7c"] == [2048, 8, 8] and shapes["features"] == [2048]


@pytest.mark.parametrize("size", [(64, 96), (299, 299), (450, 1000)], ids=str)
def test_preparation_is_clean_fids(size):
    picture = np.random.default_rng(0).integers(0, 2, (*size, 3), dtype=np.uint8) * 255  # overshoots, which are clipped
    channels = [Image.fromarray(channel.astype(np.float32)) for channel in picture.transpose(2, 0, 1)]
    resized = [np.asarray(channel.resize((299, 299), Image.BICUBIC)).clip(0, 255) for channel in channels]
    expected = torch.from_numpy(np.stack(resized))
    ours = prepare(torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 127.5 - 1)
    assert ours.min() == -1 and ours.max() == 127 / 128
    assert relative(ours[0], (expected - 128) / 128) < 1e-6
    not_whole = torch.full((1, 3, 9, 9), 100.4 / 127.5 - 1)
    assert relative(prepare(not_whole), torch.full((1, 3, 299, 299), (100 - 128) / 128)) < 1e-6  # a file has 8 bits


def test_files_that_do_not_fit_are_refused_by_the_tensors_name(weights):
    counted = weights | {"Mixed_5b.branch1x1.bn.num_batches_tracked": torch.tensor(0)}  # newer files have it
    assert all(not p.requires_grad for p in from_state_dict(counted).parameters())
    with pytest.raises(RuntimeError, match=r"size mismatch for .*fc\.bias"):  # torchvision's own
        from_state_dict(weights | {"fc.bias": torch.zeros(1000)})
    with pytest.raises(RuntimeError, match=r"Unexpected.*AuxLogits\.fc\.bias"):
        from_state_dict(weights | {"AuxLogits.fc.bias": torch.zeros(1000)})
    with pytest.raises(RuntimeError, match=r"Missing.*Mixed_6a\.branch3x3\.bn\.running_var"):
        from_state_dict({n: t for n, t in weights.items() if n != "Mixed_6a.branch3x3.bn.running_var"})


def test_size_of_the_network():
    assert parameters(Inception()) == 23_850_960

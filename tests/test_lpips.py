"""models/lpips.py agrees with a float64 computation of LPIPS v0.1 (VGG16) from its definition."""

import pytest
import torch
import torch.nn.functional as F
from conftest import normal, parameters, randomise, relative
from torch import Tensor

from models.lpips import LPIPS, SCALE, SHIFT, from_state_dict

CONVS = {0: (3, 64), 2: (64, 64), 5: (64, 128), 7: (128, 128), 10: (128, 256), 12: (256, 256), 14: (256, 256),
         17: (256, 512), 19: (512, 512), 21: (512, 512), 24: (512, 512), 26: (512, 512), 28: (512, 512)}
ENDS = {2: 64, 7: 128, 14: 256, 21: 512, 28: 512}  # relu1_2, 2_2, 3_3, 4_3, 5_3 follow these convolutions


@pytest.fixture(scope="module")
def files() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """As published: torchvision's VGG16 with its classifier (here small), and the weights of `lpips`."""
    vgg = {"classifier.0.weight": torch.zeros(4, 4)}
    for n, (c_in, c) in CONVS.items():
        vgg[f"features.{n}.weight"] = normal(c, c_in, 3, 3, seed=n) / (4.5 * c_in) ** 0.5
        vgg[f"features.{n}.bias"] = 0.1 * normal(c, seed=100 + n)
    lin = {f"lin{i}.model.1.weight": normal(1, c, 1, 1, seed=i).abs() for i, c in enumerate(ENDS.values())}
    return vgg, lin


def definition(vgg: dict[str, Tensor], lin: dict[str, Tensor], a: Tensor, b: Tensor) -> Tensor:
    """The distance [B] as the paper and `lpips` have it."""
    shift = torch.tensor([[[-.030]], [[-.088]], [[-.188]]], dtype=torch.float64)
    scale = torch.tensor([[[.458]], [[.448]], [[.450]]], dtype=torch.float64)
    x, y = (a - shift) / scale, (b - shift) / scale
    distance = torch.zeros(len(a), dtype=a.dtype)
    for n in CONVS:
        weight, bias = vgg[f"features.{n}.weight"], vgg[f"features.{n}.bias"]
        x, y = (F.conv2d(p, weight, bias, padding=1).clamp(min=0) for p in (x, y))
        if n in ENDS:
            level = list(ENDS).index(n)
            p, q = (f / ((f * f).sum(1, keepdim=True).sqrt() + 1e-10) for f in (x, y))
            w = lin[f"lin{level}.model.1.weight"].flatten()
            distance = distance + torch.einsum("bchw,c->bhw", (p - q) ** 2, w).mean((1, 2))
            x, y = (F.max_pool2d(p, 2, 2) if n < 28 else p for p in (x, y))
    return distance


@torch.no_grad()
@pytest.mark.parametrize("size", [(16, 16), (48, 35)], ids=str)
def test_distance_is_the_definitions(files, size):
    a, b = normal(3, 3, *size).clamp(-1, 1), normal(3, 3, *size, seed=1).clamp(-1, 1)
    network = from_state_dict(*files)
    assert relative(network(a, b), definition(*files, a, b)) < 1e-9
    assert relative(network(a, b)[1:2], network(a[1:2], b[1:2])) < 1e-9  # a picture's does not depend on its neighbours
    assert network(a, a).eq(0).all() and network(a, b).gt(0).all()


def test_gradient_to_the_first_picture_is_the_definitions(files):
    a, b = normal(2, 3, 24, 32).clamp(-1, 1).requires_grad_(), normal(2, 3, 24, 32, seed=1).clamp(-1, 1)
    network = from_state_dict(*files)
    (ours,) = torch.autograd.grad(network(a, b).sum(), a)
    (theirs,) = torch.autograd.grad(definition(*files, a, b).sum(), a)
    assert relative(ours, theirs) < 1e-9
    assert all(not p.requires_grad for p in network.parameters())


def test_pixels_without_features_give_gradients_that_are_numbers(files):
    vgg = {name: torch.zeros_like(t) if name == "features.2.bias" else t for name, t in files[0].items()}
    vgg["features.2.weight"] = -vgg["features.2.weight"].abs()  # behind a ReLU: nothing passes
    a = normal(1, 3, 16, 16).requires_grad_()
    (gradient,) = torch.autograd.grad(from_state_dict(vgg, files[1])(a, normal(1, 3, 16, 16, seed=1)).sum(), a)
    assert gradient.isfinite().all()
    half = [{name: t.half() for name, t in file.items()} for file in (vgg, files[1])]
    assert from_state_dict(*half)(a.detach().half(), -a.detach().half()).isfinite().all()  # 1e-10 is zero in half


def test_files_that_do_not_fit_are_refused_by_the_tensors_name(files):
    vgg, lin = files
    with pytest.raises(RuntimeError, match=r"Missing.*features\.28\.bias"):
        from_state_dict({name: t for name, t in vgg.items() if name != "features.28.bias"}, lin)
    with pytest.raises(RuntimeError, match=r"size mismatch for .*lin0\.model\.1\.weight"):
        from_state_dict(vgg, lin | {"lin0.model.1.weight": torch.zeros(1, 192, 1, 1)})
    with pytest.raises(RuntimeError, match=r"Unexpected.*lin5\.model\.1\.weight"):
        from_state_dict(vgg, lin | {"lin5.model.1.weight": torch.zeros(1, 512, 1, 1)})


def test_pictures_that_cannot_be_compared_are_refused():
    network = randomise(LPIPS())
    for a, b in (((1, 3, 32, 32), (1, 3, 32, 31)), ((1, 3, 15, 32), (1, 3, 15, 32))):
        with pytest.raises(ValueError, match="two of the same shape, of 16 pixels a side or more"):
            network(torch.zeros(a), torch.zeros(b))


def test_sizes_of_vgg16():
    assert parameters(LPIPS()) == 14_714_688 + 64 + 128 + 256 + 512 + 512


def test_distance_is_the_lpips_packages_where_it_is_installed():
    """With the weights of the five levels that it brings along, and a random VGG: the trained one is a download."""
    package = pytest.importorskip("lpips")
    peer = package.LPIPS(net="vgg", pnet_rand=True, verbose=False).double().eval()
    for name, values in (("shift", SHIFT), ("scale", SCALE)):  # the peer's are rounded to float32
        setattr(peer.scaling_layer, name, torch.tensor(values, dtype=torch.float64).view(1, 3, 1, 1))
    names = {f"net.slice{i + 1}.{n}": f"features.{n}" for i, (first, last) in enumerate(
        [(0, 4), (4, 9), (9, 16), (16, 23), (23, 30)]) for n in range(first, last)}
    state = peer.state_dict()
    vgg = {f"{names[k.rpartition('.')[0]]}.{k.rpartition('.')[2]}": state[k] for k in state if k.startswith("net.")}
    lin = {k: v for k, v in state.items() if k.startswith("lin") and not k.startswith("lins")}
    a, b = normal(2, 3, 48, 32).clamp(-1, 1), normal(2, 3, 48, 32, seed=1).clamp(-1, 1)
    assert relative(from_state_dict(vgg, lin)(a, b), peer(a, b).flatten()) < 1e-9

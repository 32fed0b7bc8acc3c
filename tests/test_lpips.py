"""LPIPS agrees with a computation of version 0.1 (VGG16) from its definition, in float64."""

import pytest
import torch
import torch.nn.functional as F
from conftest import normal, parameters, randomise, relative
from torch import Tensor

from models.lpips import LPIPS, SCALE, SHIFT, from_state_dict

# VGG16's convolutions: index in `features` -> channels in and out.
CONVS = {
    0: (3, 64),
    2: (64, 64),
    5: (64, 128),
    7: (128, 128),
    10: (128, 256),
    12: (256, 256),
    14: (256, 256),
    17: (256, 512),
    19: (512, 512),
    21: (512, 512),
    24: (512, 512),
    26: (512, 512),
    28: (512, 512),
}
# The convolutions before relu1_2, relu2_2, relu3_3, relu4_3, relu5_3, and their channels.
ENDS = {2: 64, 7: 128, 14: 256, 21: 512, 28: 512}


@pytest.fixture(scope="module")
def files() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Like the published files: VGG16 with a (small) classifier, and the weights of `lpips`."""
    vgg = {"classifier.0.weight": torch.zeros(4, 4)}
    for n, (c_in, c) in CONVS.items():
        vgg[f"features.{n}.weight"] = normal(c, c_in, 3, 3, seed=n) / (4.5 * c_in) ** 0.5
        vgg[f"features.{n}.bias"] = 0.1 * normal(c, seed=100 + n)
    lin = {}
    for i, c in enumerate(ENDS.values()):
        lin[f"lin{i}.model.1.weight"] = normal(1, c, 1, 1, seed=i).abs()
    return vgg, lin


def definition(vgg: dict[str, Tensor], lin: dict[str, Tensor], a: Tensor, b: Tensor) -> Tensor:
    """The distance [B] as the paper and `lpips` define it."""
    shift = torch.tensor([[[-.030]], [[-.088]], [[-.188]]], dtype=torch.float64)
    scale = torch.tensor([[[.458]], [[.448]], [[.450]]], dtype=torch.float64)
    x = (a - shift) / scale
    y = (b - shift) / scale
    distance = torch.zeros(len(a), dtype=a.dtype)
    for n in CONVS:
        weight = vgg[f"features.{n}.weight"]
        bias = vgg[f"features.{n}.bias"]
        x = F.conv2d(x, weight, bias, padding=1).clamp(min=0)
        y = F.conv2d(y, weight, bias, padding=1).clamp(min=0)
        if n in ENDS:
            level = list(ENDS).index(n)
            w = lin[f"lin{level}.model.1.weight"].flatten()
            squares = (unit(x) - unit(y)) ** 2
            distance = distance + torch.einsum("bchw,c->bhw", squares, w).mean((1, 2))
            if n < 28:
                x = F.max_pool2d(x, 2, 2)
                y = F.max_pool2d(y, 2, 2)
    return distance


def unit(f: Tensor) -> Tensor:
    """Features with unit length at each pixel."""
    return f / ((f * f).sum(1, keepdim=True).sqrt() + 1e-10)


@torch.no_grad()
@pytest.mark.parametrize("size", [(16, 16), (48, 35)], ids=str)
def test_distance_is_the_definitions(files, size):
    a = normal(3, 3, *size).clamp(-1, 1)
    b = normal(3, 3, *size, seed=1).clamp(-1, 1)
    network = from_state_dict(*files)
    assert relative(network(a, b), definition(*files, a, b)) < 1e-9
    # A picture's distance does not depend on the others of the batch.
    assert relative(network(a, b)[1:2], network(a[1:2], b[1:2])) < 1e-9
    assert network(a, a).eq(0).all() and network(a, b).gt(0).all()


@torch.no_grad()
def test_features_can_be_computed_once_and_used_for_other_losses_too(files):
    a = normal(2, 3, 24, 32).clamp(-1, 1)
    b = normal(2, 3, 24, 32, seed=1).clamp(-1, 1)
    network = from_state_dict(*files)
    features_a, features_b = network.vgg_features(a), network.vgg_features(b)
    assert torch.equal(network.distance(features_a, features_b), network(a, b))
    # They are the maps after each stage's last ReLU, as VGG16 has them.
    x = (a - a.new_tensor(SHIFT).view(3, 1, 1)) / a.new_tensor(SCALE).view(3, 1, 1)
    for last, ours in zip((3, 8, 15, 22, 29), features_a):
        assert torch.equal(ours, network.features[:last + 1](x))


def test_gradient_to_the_first_picture_is_the_definitions(files):
    a = normal(2, 3, 24, 32).clamp(-1, 1).requires_grad_()
    b = normal(2, 3, 24, 32, seed=1).clamp(-1, 1)
    network = from_state_dict(*files)
    (ours,) = torch.autograd.grad(network(a, b).sum(), a)
    (theirs,) = torch.autograd.grad(definition(*files, a, b).sum(), a)
    assert relative(ours, theirs) < 1e-9
    assert all(not p.requires_grad for p in network.parameters())


def test_pixels_without_features_have_finite_gradients(files):
    vgg, lin = files
    # After a ReLU, negative weights let nothing pass.
    nothing = -vgg["features.2.weight"].abs()
    zero = torch.zeros_like(vgg["features.2.bias"])
    vgg = vgg | {"features.2.weight": nothing, "features.2.bias": zero}
    a = normal(1, 3, 16, 16).requires_grad_()
    distance = from_state_dict(vgg, lin)(a, normal(1, 3, 16, 16, seed=1))
    (gradient,) = torch.autograd.grad(distance.sum(), a)
    assert gradient.isfinite().all()

    half_vgg = {name: t.half() for name, t in vgg.items()}
    half_lin = {name: t.half() for name, t in lin.items()}
    half = a.detach().half()
    assert from_state_dict(half_vgg, half_lin)(half, -half).isfinite().all()


def test_files_that_do_not_fit_are_refused_by_the_tensors_name(files):
    vgg, lin = files
    lacking = dict(vgg)
    del lacking["features.28.bias"]
    with pytest.raises(RuntimeError, match=r"Missing.*features\.28\.bias"):
        from_state_dict(lacking, lin)
    with pytest.raises(RuntimeError, match=r"size mismatch for .*lin0\.model\.1\.weight"):
        from_state_dict(vgg, lin | {"lin0.model.1.weight": torch.zeros(1, 192, 1, 1)})
    with pytest.raises(RuntimeError, match=r"Unexpected.*lin5\.model\.1\.weight"):
        from_state_dict(vgg, lin | {"lin5.model.1.weight": torch.zeros(1, 512, 1, 1)})


def test_pictures_that_cannot_be_compared_are_refused():
    network = randomise(LPIPS())
    for a, b, message in [
        ((1, 3, 32, 32), (1, 3, 32, 31), "two of the same shape"),
        ((1, 3, 15, 32), (1, 3, 15, 32), "16 pixels a side or more"),
    ]:
        with pytest.raises(ValueError, match=message):
            network(torch.zeros(a), torch.zeros(b))


def test_sizes_of_vgg16():
    assert parameters(LPIPS()) == 14_714_688 + 64 + 128 + 256 + 512 + 512


def test_distance_is_the_lpips_packages_where_it_is_installed():
    """With the package's own weights of the five levels, and a random VGG: that is a download."""
    package = pytest.importorskip("lpips")
    peer = package.LPIPS(net="vgg", pnet_rand=True, verbose=False).double().eval()
    # The peer's constants are rounded to float32.
    for name, values in (("shift", SHIFT), ("scale", SCALE)):
        exact = torch.tensor(values, dtype=torch.float64).view(1, 3, 1, 1)
        setattr(peer.scaling_layer, name, exact)

    vgg = {}
    lin = {}
    for name, tensor in peer.state_dict().items():
        if name.startswith("net."):
            # net.sliceI.N.weight is features.N.weight.
            _, _, n, leaf = name.split(".")
            vgg[f"features.{n}.{leaf}"] = tensor
        elif name.startswith("lin") and not name.startswith("lins"):
            lin[name] = tensor
    a = normal(2, 3, 48, 32).clamp(-1, 1)
    b = normal(2, 3, 48, 32, seed=1).clamp(-1, 1)
    assert relative(from_state_dict(vgg, lin)(a, b), peer(a, b).flatten()) < 1e-9

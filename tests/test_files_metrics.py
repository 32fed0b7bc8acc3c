"""files/metrics.py reads metric networks from their files, and knows them by a hash.

Downloading is in test_files_hub.py.
"""

import pytest
import torch
from pipelines import refusal

from files import metrics
from models.lpips import LPIPS

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_metric_network_is_read_from_its_files_and_known_by_their_hash(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    assert not metrics.has_metric_network("lpips")
    message = refusal(lambda: metrics.load_metric_network("lpips"))
    assert "vgg16-397923af.pth" in message
    assert str(tmp_path / "metric_networks") in message

    vgg = {}
    lin = {}
    for name, t in LPIPS().state_dict().items():
        if name.startswith("features."):
            vgg[name] = torch.randn(t.shape)
        elif name.startswith("lin"):
            lin[name] = torch.rand(t.shape)
    # One file is where earlier versions downloaded it, the other is where it goes now.
    vgg_file = tmp_path / "judges" / "vgg16-397923af.pth"
    lin_file = tmp_path / "metric_networks" / "vgg.pth"
    vgg_file.parent.mkdir()
    lin_file.parent.mkdir()
    torch.save(vgg, vgg_file)
    assert not metrics.has_metric_network("lpips")
    torch.save(lin, lin_file)
    assert metrics.has_metric_network("lpips")

    loaded = metrics.load_metric_network("lpips")
    for name, tensor in loaded.network.state_dict().items():
        assert torch.equal(tensor, (vgg | lin)[name])
    assert not any(p.requires_grad for p in loaded.network.parameters())

    lin["lin0.model.1.weight"] += 1
    torch.save(lin, lin_file)
    assert metrics.load_metric_network("lpips").hash != loaded.hash
    del lin["lin0.model.1.weight"]
    torch.save(lin, lin_file)
    message = refusal(lambda: metrics.load_metric_network("lpips"))
    assert 'Missing key(s) in state_dict: "lin0.model.1.weight"' in message

"""files/tensors.py maps weights, refuses damaged files, and tells bases apart by a fingerprint."""

import json
import os
import stat
import tarfile
from pathlib import Path

import pytest
import torch
from pipelines import PARTS, edit, refusal, tiny_pipeline, weight_file
from safetensors.torch import save_file
from torch import Tensor, nn

from files import kinds
from files.bases import load_base, save_folder
from files.tensors import cast_frozen, fingerprint, read_tensors, save_tensors

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A small Stable Diffusion as `diffusers` writes it."""
    folder = tmp_path_factory.mktemp("saved")
    tiny_pipeline().save_pretrained(folder)
    return folder


# -------------------- mapped files

def mapped_files(network: nn.Module) -> set[str]:
    """The files that the network's tensors are mapped from; "" for memory of the process."""
    areas = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, _, _, _, _, *path = line.split(maxsplit=5)
        start, end = (int(address, 16) for address in span.split("-"))
        file = path[0] if path and path[0].startswith("/") else ""
        areas.append((start, end, file))

    files = set()
    for tensor in network.state_dict().values():
        for start, end, file in areas:
            if start <= tensor.data_ptr() < end:
                files.add(file)
    return files


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads Linux's list of mappings")
@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_weights_that_need_no_conversion_stay_mapped(tmp_path, dtype):
    tiny_pipeline().save_pretrained(tmp_path)

    def as_older_versions_do(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        renamed = {}
        for name, tensor in tensors.items():
            if "to_out.0.weight" in name:
                tensor = tensor[..., None, None]
            renamed[name.replace("to_out.0", "proj_attn")] = tensor
        return renamed

    edit(weight_file(tmp_path, "vae"), as_older_versions_do)
    base = load_base(str(tmp_path), PARTS, dtype)
    for part in PARTS:
        assert mapped_files(getattr(base, part)) == {str(weight_file(tmp_path, part))}
    converted = load_base(str(tmp_path), ("vae",), torch.float64)
    assert mapped_files(converted.vae) == {""}


# -------------------- damaged files

def test_a_header_cannot_claim_memory(tmp_path):
    """Claims beyond the file's size are refused before anything is allocated for them."""
    entry = dict(dtype="F32", shape=[10**12], data_offsets=[0, 4 * 10**12])
    header = json.dumps({"conv_in.weight": entry}).encode()
    path = tmp_path / "small.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ValueError):
        read_tensors(path)


def test_every_truncation_of_a_small_file_is_refused(tmp_path):
    path = tmp_path / "small.safetensors"
    save_file({"a": torch.ones(3), "b": torch.ones(2, dtype=torch.float16)}, path)
    whole = path.read_bytes()
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        assert str(path) in refusal(lambda: read_tensors(path))


# -------------------- writing

def test_files_are_readable_by_whom_the_umask_allows(saved, tmp_path):
    before = os.umask(0o027)
    try:
        save_folder(tmp_path, load_base(str(saved), ("vae",)))
    finally:
        os.umask(before)
    assert stat.S_IMODE(weight_file(tmp_path, "vae").stat().st_mode) == 0o640


METADATA = {
    "none": {},
    "one": {"format": "pt"},
    "many": {f"key {i}": f"value {i}" for i in range(20)},
    "escapes": {
        "json": '{"a": ["\\n", 1e-5]}\t\x00\x1f\x7f',
        "slash": "a/b\\c",
        "\x08": "\x0c\r\n",
    },
    "other scripts": {"prompts": "zażółć 夜の街 🌃 \u2028", "é": "e\u0301"},
}


@pytest.mark.parametrize("metadata", METADATA.values(), ids=METADATA.keys())
def test_equal_tensors_and_metadata_give_equal_bytes(tmp_path, metadata):
    tensors = {
        "b": torch.arange(3.0),
        "a": torch.ones(2, dtype=torch.bfloat16),
        "é\n": torch.ones(0),
    }
    contents = set()
    for i in range(8):
        path = tmp_path / f"{i}.safetensors"
        # The order in which they are named must not count either.
        order = sorted(metadata.items(), reverse=i % 2 == 1)
        save_tensors(path, dict(sorted(tensors.items(), reverse=i % 2 == 1)), dict(order))
        contents.add(path.read_bytes())

        read, read_metadata = read_tensors(path)
        assert read_metadata == metadata
        assert read.keys() == tensors.keys()
        assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
    assert len(contents) == 1


# -------------------- networks

@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_a_fingerprint_changes_with_every_value_that_counts(saved, dtype):
    def fingerprint_of(changed: str | None, ignored: tuple[str, ...] = ()) -> str:
        vae = load_base(str(saved), ("vae",), dtype).vae
        if changed:
            vae.get_parameter(changed).view(-1)[-1] += 1
        return fingerprint(vae, ignored)

    name = "decoder.conv_out.bias"
    assert fingerprint_of(None) == fingerprint_of(None)
    assert fingerprint_of(name) != fingerprint_of(None)
    assert fingerprint_of(name, (name,)) == fingerprint_of(None, (name,))
    assert fingerprint_of(None, (name,)) != fingerprint_of(None)


def test_a_fingerprint_does_not_depend_on_the_layout_in_memory():
    layer = nn.Conv2d(4, 4, 3)
    before = fingerprint(layer)
    layer.weight.data = layer.weight.data.to(memory_format=torch.channels_last)
    # At an address that is not a multiple of 8 bytes.
    layer.bias.data = torch.cat([torch.zeros(1), layer.bias.data])[1:]
    assert fingerprint(layer) == before


def test_only_frozen_weights_are_stored_in_half_precision():
    network = nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.GroupNorm(2, 4),
        nn.LayerNorm(4),
        nn.Linear(4, 4),
    )
    network[:3].requires_grad_(False)
    cast_frozen(network, torch.bfloat16)
    dtypes = [p.dtype for p in network.parameters()]
    assert dtypes == [torch.bfloat16] * 4 + [torch.float32] * 4


def test_torchs_oldest_format_is_refused_unread(tmp_path):
    """A tar archive, even one that begins like a pickle: torch's safe reader does not cover it."""
    path = tmp_path / "old.pt"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT, encoding="latin-1") as archive:
        archive.addfile(tarfile.TarInfo("\x80pickle"))
    assert path.read_bytes().startswith(b"\x80")
    assert not kinds.is_torch(path)
    with pytest.raises(ValueError, match="expected weights, from safetensors or torch.save"):
        read_tensors(path)

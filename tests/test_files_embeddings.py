"""files/embeddings.py reads embeddings (textual inversion) as `diffusers` does, and refuses others.

The files are written as the programs write them that users have: `diffusers`, A1111 and kohya, and
the original code.
"""

import io
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from conftest import normal, relative
from diffusers import StableDiffusionPipeline
from pipelines import refusal, tiny_pipeline
from safetensors.torch import save_file
from torch import Tensor, nn

import sample
import training
from files.bases import Base, load_base, save_folder
from files.embeddings import add_embedding, load_embedding
from models import t5

pytestmark = pytest.mark.usefixtures("one_thread")

CAT = "<cat-toy>"
NEXT = 979  # the first number behind the vocabulary
WIDTH = 32
VECTORS = normal(3, WIDTH, dtype=torch.float32)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A small Stable Diffusion as `diffusers` writes it, never to be changed."""
    folder = tmp_path_factory.mktemp("saved")
    tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def base(saved) -> Base:
    return load_base(str(saved), ("text_encoder", "tokenizer"), torch.float64)


# -------------------- writing files

def a1111(vectors: Tensor, **others) -> dict:
    """What A1111 saves."""
    return dict(
        string_to_token={"*": 265},
        string_to_param={"*": vectors},
        name="easy",
        step=499,
        sd_checkpoint="cc6cb27103",
        sd_checkpoint_name="v1-5-pruned",
    ) | others


def original(vectors: Tensor) -> dict:
    """What the original code of textual inversion saves."""
    parameters = nn.ParameterDict({"*": nn.Parameter(vectors)})
    return dict(string_to_token={"*": torch.tensor(265)}, string_to_param=parameters)


def write(path: Path, contents: object) -> Path:
    if path.suffix == ".safetensors":
        save_file(contents, path)
    else:
        torch.save(contents, path)
    return path


# name of the file, what it holds, the word that it is for, how many vectors
FILES = {
    "diffusers, one vector": ("learned_embeds.safetensors", {CAT: VECTORS[0]}, CAT, 1),
    "diffusers, a row": ("learned_embeds.safetensors", {CAT: VECTORS[:1]}, CAT, 1),
    "diffusers, three vectors": ("x.safetensors", {CAT: VECTORS}, CAT, 3),
    "diffusers, .bin": ("learned_embeds.bin", {CAT: VECTORS[0]}, CAT, 1),
    "diffusers, a word of letters": ("a.bin", {"sksword": VECTORS[0]}, "sksword", 1),
    "diffusers, a word with a dot": ("a.bin", {"<v1.5>": VECTORS[0]}, "<v1.5>", 1),
    "diffusers, a word of another kind": ("a.bin", {"<lora>": VECTORS[0]}, "<lora>", 1),
    "A1111": ("file.pt", a1111(VECTORS), "easy", 3),
    "A1111, one vector": ("file.pt", a1111(VECTORS[:1]), "easy", 1),
    "A1111, .bin": ("file.bin", a1111(VECTORS), "easy", 3),
    "half precision": ("file.pt", a1111(VECTORS.half()), "easy", 3),
    "with a gradient": ("file.pt", a1111(VECTORS.clone().requires_grad_()), "easy", 3),
    "a parameter": ("file.pt", a1111(nn.Parameter(VECTORS.clone())), "easy", 3),
}
# Files that the peer does not read, or reads under the word "emb_params".
OWN_FILES = {
    "kohya": ("style.safetensors", {"emb_params": VECTORS}, "style", 3),
    "kohya, one vector": ("style.safetensors", {"emb_params": VECTORS[0]}, "style", 1),
    "kohya, .pt": ("style.pt", {"emb_params": VECTORS}, "style", 3),
    "the original code": ("style.pt", original(VECTORS), "style", 3),
    "A1111 without a name": ("style.pt", a1111(VECTORS, name=None), "style", 3),
    "a tensor alone": ("style.pt", VECTORS, "style", 3),
    "an ordered dictionary": ("style.pt", OrderedDict({CAT: VECTORS}), CAT, 3),
    "8-bit floats": ("x.safetensors", {CAT: VECTORS.to(torch.float8_e4m3fn)}, CAT, 3),
    "the wrong ending": ("x.pt", None, CAT, 3),
}


@torch.no_grad()
@pytest.mark.parametrize("name, contents, word, count", FILES.values(), ids=FILES.keys())
def test_prompts_mean_what_they_mean_to_diffusers(
    saved, base, tmp_path, capsys, name, contents, word, count,
):
    path = write(tmp_path / name, contents)
    add_embedding(str(path), base)
    plural = "s" if count > 1 else ""
    assert capsys.readouterr().err == (
        f"{path}: {word} in a prompt stands for its {count} vector{plural}\n"
    )

    peer = StableDiffusionPipeline.from_pretrained(saved, unet=None, vae=None)
    peer.load_textual_inversion(tmp_path, weight_name=name)
    peer.text_encoder.double()
    for text in (f"a {word} on grass", f"{word}{word}, red", "a red circle", f"{word} " * 20):
        theirs, _ = peer.encode_prompt(text, "cpu", 1, False)
        (ours,) = base.encode([text])
        assert relative(ours, theirs) < 1e-9, text
        rows = peer.tokenizer(
            peer.maybe_convert_prompt(text, peer.tokenizer),
            padding="max_length",
            truncation=True,
        )
        assert base.tokenizer([text])[0].tolist() == rows.input_ids


@pytest.mark.parametrize("name, contents, word, count", OWN_FILES.values(), ids=OWN_FILES.keys())
def test_files_of_other_programs_are_read(base, tmp_path, name, contents, word, count):
    path = tmp_path / name
    if contents is None:
        save_file({CAT: VECTORS}, path)
    else:
        write(path, contents)
    found, vectors = load_embedding(path)
    assert found == word
    assert vectors.shape == (count, WIDTH)
    assert vectors.dtype == torch.float32
    add_embedding(str(path), base)
    ids = base.tokenizer([f"a {word} b"])[0].tolist()
    assert ids[2:2 + count] == list(range(NEXT, NEXT + count))


def test_file_colon_token_gives_the_word(base, tmp_path):
    odd = tmp_path / "with:colon.pt"
    for path, spec, word in [
        (tmp_path / "a.pt", "a.pt:<dog>", "<dog>"),
        (tmp_path / "b.pt", "b.pt:::smile:", "::smile:"),
        (odd, "with:colon.pt", "easy"),
        (odd, "with:colon.pt:<mouse>", "<mouse>"),
    ]:
        write(path, a1111(VECTORS[:1]))
        add_embedding(f"{tmp_path}/{spec}", base)
        assert max(base.tokenizer([f"a {word} b"])[0]) == base.text_encoder.config.vocab_size - 1
    assert base.text_encoder.config.vocab_size == NEXT + 4


def test_a_folder_holds_an_embedding_under_diffusers_names(base, tmp_path):
    write(tmp_path / "learned_embeds.bin", {CAT: VECTORS[0]})
    add_embedding(str(tmp_path), base)
    add_embedding(f"{tmp_path}:<dog>", base)
    assert base.text_encoder.config.vocab_size == NEXT + 2


@torch.no_grad()
def test_several_embeddings_do_not_disturb_each_other_or_other_words(saved, base, tmp_path):
    write(tmp_path / "one.pt", a1111(VECTORS, name="<one>"))
    write(tmp_path / "two.safetensors", {"<two>": VECTORS[0] * 2})
    plain = load_base(str(saved), ("text_encoder", "tokenizer"), torch.float64)
    before = plain.encode(["a red circle"])[0]
    add_embedding(str(tmp_path / "one.pt"), base)
    alone = base.encode(["a <one> circle"])[0]
    add_embedding(str(tmp_path / "two.safetensors"), base)
    assert torch.equal(base.encode(["a <one> circle"])[0], alone)
    assert torch.equal(base.encode(["a red circle"])[0], before)
    ids = base.tokenizer(["<two> <one>"])[0].tolist()
    assert ids[1:5] == [NEXT + 3, NEXT, NEXT + 1, NEXT + 2]
    table = base.text_encoder.text_model.embeddings.token_embedding.weight
    assert torch.equal(table[NEXT:], torch.cat([VECTORS, VECTORS[:1] * 2]).double())
    assert not table.requires_grad


def test_a_prompt_is_cut_where_the_vectors_of_a_word_no_longer_fit(base, tmp_path):
    write(tmp_path / "a.pt", a1111(VECTORS))
    add_embedding(str(tmp_path / "a.pt"), base)
    room = base.tokenizer.limit
    text = "a " * (room - 2)
    assert base.tokenizer.cut_off(f"{text}red") is None
    assert base.tokenizer.cut_off(f"{text}easy end") == "easy end"
    assert base.tokenizer.cut_off("easy " * (room // 3)) is None
    assert sample.cut_off(base.tokenizer, "easy " * (room // 3) + "b c") in ("c", "b c")


@torch.no_grad()
def test_a_base_with_an_embedding_is_saved_for_diffusers(saved, tmp_path):
    write(tmp_path / "a.pt", a1111(VECTORS))
    base = load_base(str(saved), dtype=torch.float64)
    add_embedding(str(tmp_path / "a.pt"), base)
    save_folder(tmp_path / "written", base)
    peer = StableDiffusionPipeline.from_pretrained(
        tmp_path / "written",
        torch_dtype=torch.float64,
    )
    again = load_base(str(tmp_path / "written"))
    for text in ("an easy circle", "a red circle"):
        theirs, _ = peer.encode_prompt(text, "cpu", 1, False)
        assert relative(base.encode([text])[0], theirs) < 1e-9
        assert torch.equal(base.encode([text])[0], again.encode([text])[0])


# -------------------- what is refused

def several(count: int) -> dict:
    return {f"word{i}": VECTORS[0] for i in range(count)}


def two_words() -> dict:
    return a1111(VECTORS, string_to_param={"*": VECTORS, "+": VECTORS})


class Code:
    def __reduce__(self):
        return print, ("run",)


LORA = {
    "unet.mid.to_q.lora_A.weight": torch.ones(2, 4),
    "unet.mid.to_q.lora_B.weight": torch.ones(4, 2),
}
SDXL = dict(clip_l=normal(2, 768).float(), clip_g=normal(2, 1280).float())
WIDE = normal(2, 1024).float()
REFUSED = {
    "for SDXL": ("a.safetensors", SDXL, ["an embedding for SDXL"]),
    "the first half of SDXL": ("a.safetensors", {"clip_l": SDXL["clip_l"]}, ["for SDXL"]),
    "the second half of SDXL": ("a.safetensors", {"clip_g": SDXL["clip_g"]}, ["for SDXL"]),
    "for SD 1.x": ("a.pt", {CAT: SDXL["clip_l"]}, ["768", "Stable Diffusion 1.x", "expected 32"]),
    "for SD 2.x": ("a.pt", a1111(WIDE), ["1024", "Stable Diffusion 2.x", "expected 32"]),
    "for another model": ("a.pt", {CAT: VECTORS[:, :7]}, ["7 numbers, for another model"]),
    "a LoRA": ("a.safetensors", LORA, ["it is a LoRA (for --lora)"]),
    "a LoRA under state_dict": ("a.pt", dict(state_dict=LORA), ["it is a LoRA"]),
    "a VAE": ("a.pt", {"decoder.mid_block.x": WIDE, "encoder.y": WIDE}, ["it is a VAE"]),
    "a text encoder": (
        "a.safetensors",
        {"text_model.encoder.x": WIDE, "text_model.encoder.y": WIDE + 1},
        ["CLIP's text encoder"],
    ),
    "two words": ("a.pt", two_words(), ["it holds 2 embeddings"]),
    "no words": ("a.pt", a1111(VECTORS, string_to_param={}), ["it holds 0 embeddings"]),
    "several tensors": ("a.pt", several(3), ["expected an embedding"]),
    "a list": ("a.pt", [VECTORS], ["it is a saved list"]),
    "nothing": ("a.pt", {}, ["without tensors"]),
    "text for vectors": ("a.pt", {CAT: "cat"}, ["it holds str"]),
    "integers": ("a.pt", {CAT: torch.ones(2, WIDTH).long()}, ["it holds torch.int64"]),
    "three dimensions": ("a.pt", {CAT: torch.ones(2, 3, WIDTH)}, ["[2, 3, 32]", "[n, C]"]),
    "no vectors": ("a.pt", {CAT: torch.ones(0, WIDTH)}, ["[0, 32]"]),
    "a number": ("a.pt", {CAT: torch.ones(())}, ["a tensor []"]),
    "NaN": ("a.pt", {CAT: VECTORS[0] * float("nan")}, ["NaN"]),
    "infinity": ("a.pt", {CAT: VECTORS[0] / 0}, ["infinite"]),
    "a name of another type": ("a.pt", a1111(VECTORS, name=3), ["its name is 3"]),
    "code": ("a.pt", a1111(VECTORS, step=Code()), ["code in it", "print"]),
    "a known word": ("a.pt", {"red</w>": VECTORS[0]}, ["'red</w>' already", "FILE:TOKEN"]),
    "a known piece": ("a.pt", a1111(VECTORS, name="!"), ["'!' already"]),
}


@pytest.mark.parametrize("name, contents, says", REFUSED.values(), ids=REFUSED.keys())
def test_other_files_are_refused_by_name(base, tmp_path, capfd, name, contents, says):
    path = write(tmp_path / name, contents)
    message = refusal(lambda: add_embedding(str(path), base))
    assert str(path) in message
    assert all(words in message for words in says), message
    assert capfd.readouterr() == ("", "")
    # Nothing has been added.
    assert base.tokenizer.pieces.get_vocab_size() == NEXT
    assert base.text_encoder.config.vocab_size == NEXT


def test_a_word_is_added_once(base, tmp_path):
    write(tmp_path / "a.pt", a1111(VECTORS))
    write(tmp_path / "b.pt", a1111(VECTORS[:1], name="easy_1"))
    add_embedding(str(tmp_path / "a.pt"), base)
    for name in ("a.pt", "b.pt"):
        assert "already" in refusal(lambda name=name: add_embedding(str(tmp_path / name), base))


def test_the_word_of_one_embedding_is_not_a_vector_of_the_next(base, tmp_path):
    write(tmp_path / "a.pt", a1111(VECTORS))
    write(tmp_path / "c.pt", a1111(VECTORS[:1], name="easy_3"))
    add_embedding(str(tmp_path / "c.pt"), base)
    message = refusal(lambda: add_embedding(str(tmp_path / "a.pt"), base))
    assert "a token 'easy_3' already" in message


def test_an_embedding_for_t5_is_refused(base, tmp_path):
    config = t5.T5Config(vocab_size=8, d_model=WIDTH, d_kv=2, num_heads=2, d_ff=4, num_layers=1)
    base.text_encoder = t5.T5Encoder(config)
    path = write(tmp_path / "a.pt", a1111(VECTORS))
    assert "is T5" in refusal(lambda: add_embedding(str(path), base))


@pytest.mark.parametrize("end", [0, 5, 100, 700, -1])
def test_damaged_files_are_refused_in_one_line(base, tmp_path, end):
    file = io.BytesIO()
    torch.save(a1111(VECTORS), file)
    path = tmp_path / "a.pt"
    path.write_bytes(file.getvalue()[:end])
    assert str(path) in refusal(lambda: add_embedding(str(path), base))


# -------------------- the command line

def test_sample_draws_with_an_embedding(saved, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.pt", a1111(VECTORS))
    write(tmp_path / "b.safetensors", {"x": VECTORS[0]})
    pictures = []
    for prompt, flags in [
        ("a red circle", []),
        ("a red circle", ["--embedding", "a.pt"]),
        ("an easy circle", []),
        ("an easy circle", ["--embedding", "a.pt", "--embedding", "b.safetensors:<cat>"]),
    ]:
        output = tmp_path / f"{len(pictures)}.png"
        arguments = [prompt, "--base", str(saved), "--device", "cpu", "--output", str(output)]
        monkeypatch.setattr("sys.argv", ["sample.py", *arguments, *flags])
        training.run_script(sample.main)
        pictures.append(sample.open_picture(output).tobytes())
    assert pictures[0] == pictures[1]
    assert pictures[2] != pictures[3]
    err = capsys.readouterr().err
    assert "b.safetensors: <cat> in a prompt stands for its 1 vector" in err

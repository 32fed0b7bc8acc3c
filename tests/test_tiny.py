"""The embedded base: its files are the recipe's, the attribute classifier is right, and the
trained weights can do what tiny/README.md says."""

import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import sample
import sampling.precision
from dataset import folders
from dataset.pictures import open_picture, to_picture, to_tensor
from files import bases, checkpoints, tokenizers
from files.autoencoders import load_autoencoder
from tiny import measure, recipe, scenes


def test_the_tokenizer_in_the_tree_is_the_recipes(tmp_path):
    recipe.write_tokenizer(tmp_path)
    for path in tmp_path.iterdir():
        committed = recipe.HERE / "tiny" / "tokenizer" / path.name
        assert path.read_bytes() == committed.read_bytes(), path.name
    words = list(dict.fromkeys(recipe.WORDS))
    tokenizer = tokenizers.load_tokenizer("tiny")
    ids = tokenizer.pieces.encode(" ".join(words), add_special_tokens=False).ids
    assert len(ids) == len(words)


def test_the_tiny_base_is_drawn_from_its_seed():
    weights = []
    for seed in (1, 1, 2):
        weights.append(bases.load_base("tiny", ("unet",), seed=seed).unet.conv_out.weight)
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_an_untrained_tiny_base_depends_on_its_caption():
    """Another caption changes the untrained prediction by more than a tenth of its size, so
    training has something to begin with."""
    base = bases.load_base("tiny")
    captions = [scenes.caption(scenes.nth_scene("test", 0, i)) for i in range(9)]
    texts = base.text_encoder(base.tokenizer(captions))
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        prediction = base.unet(noise.expand(len(texts), -1, -1, -1), 999, texts)
    assert prediction.std(0).mean() > 0.1 * prediction.std()


@pytest.mark.parametrize("name", ["drawn:scenes"])
def test_drawn_worlds_are_reached_by_name(name):
    assert len(folders.open_paired(name, "test", "no_resize")) > 0


# -------------------- what the trained weights can do


@pytest.fixture(scope="module")
def classifier():
    return measure.load_classifier()


def test_the_classifier_reads_real_drawings_and_not_what_is_not_there(classifier):
    described, truth = measure.held_out(60)
    assert min(measure.attribute_accuracy(classifier, truth, described).values()) > 0.97
    others = described[1:] + described[:1]
    assert measure.attribute_accuracy(classifier, truth, others)["colour"] < 0.3


def test_the_autoencoder_keeps_drawings_with_their_rain_snow_and_stars(classifier):
    described, truth = measure.held_out(60)
    vae = bases.load_base("tiny-turbo", ("vae",), torch.float32).vae
    latents = vae.encode(truth)[0]
    decoded = vae.decode(latents).clamp(-1, 1)
    assert measure.psnr(decoded, truth).mean() > 31.5
    assert 0.8 < measure.gradient_energy(decoded, truth) < 1
    assert measure.attribute_accuracy(classifier, decoded, described)["weather"] > 0.97
    assert 0.9 < (latents * vae.config.scaling_factor).std() < 1.1


def test_the_tiny_autoencoder_takes_the_place_of_the_vae():
    """Its decoder and its encoder, each beside the other half of the VAE."""
    base = bases.load_base("tiny-turbo", ("vae",), torch.float32)
    taesd = load_autoencoder("tiny-turbo-taesd", base, torch.float32)
    scaling = base.vae.config.scaling_factor
    _, truth = measure.held_out(40)
    z, _, _ = base.vae.encode(truth)
    decoded = base.vae.decode(z).clamp(-1, 1)
    assert measure.psnr(taesd.decode(z * scaling), decoded).mean() > 28
    guessed, _, _ = taesd.encode(truth)
    assert measure.psnr(base.vae.decode(guessed / scaling), decoded).mean() > 34
    parameters = sum(p.numel() for p in taesd.parameters())
    assert parameters * 6 < sum(p.numel() for p in base.vae.parameters())
    weights = recipe.HERE / "tiny-turbo-taesd" / "diffusion_pytorch_model.safetensors"
    assert weights.stat().st_size < 300_000


@pytest.mark.parametrize("name, steps, guidance, share", [
    ("tiny-turbo", 1, 1.0, 0.95),
    ("tiny-sd", 12, 3.0, 0.95),
])
def test_captions_are_followed(classifier, name, steps, guidance, share):
    """On held-out combinations; guessing gets a third of the fields right and hardly a colour."""
    found = measure.measure_text(classifier, name, steps, guidance, seed=0, n=16)
    accuracy = found["attributes"]
    assert accuracy["all"] > share and accuracy["time"] > 0.85, found


@pytest.mark.parametrize("task", scenes.TASKS)
def test_a_translation_is_nearer_to_the_truth_than_its_input_and_the_untrained_adapter(task):
    for found in measure.measure_unpaired(task, n=8).values():
        psnr = {name: values["psnr"]["mean"] for name, values in found.items()}
        other = max(psnr["unchanged input"], psnr["untrained adapter"])
        assert psnr["adapter"] > other + 1, (task, psnr)


def test_outlines_become_scenes_that_keep_them_and_follow_the_caption(classifier):
    described, truth = measure.held_out(12)
    lines = [to_tensor(scenes.outlines(scene, 64)) * 2 - 1 for scene in described]
    captions = [scenes.caption(scene) for scene in described]
    wanted = measure.edges(truth)
    near, far = (
        measure.translate("edges2scene", torch.stack(lines), captions, r=r) for r in (1.0, 0.0)
    )
    near_f = measure.edge_f(measure.edges(near), wanted).mean()
    far_f = measure.edge_f(measure.edges(far), wanted).mean()
    assert near_f > far_f
    assert measure.psnr(near, truth).mean() > measure.psnr(far, truth).mean() + 2
    assert measure.attribute_accuracy(classifier, near, described)["all"] > 0.8


def test_the_difference_is_the_mean_over_all_pairs_of_tensors():
    x = torch.tensor([1.0, -1.0])
    assert measure.mean_difference([0 * x, x, 3 * x]) == 2  # of 1, 3 and 2


# -------------------- the recipe


@pytest.mark.slow
def test_the_recipe_trains_adapters_that_load_and_goes_on_with_what_is_done(monkeypatch, tmp_path):
    few = dict(max_train_steps=1, train_batch_size=1, validation_num_images=1)
    adapters = {}
    for name in ("clear2rain", "edges2scene"):
        script, own = recipe.ADAPTERS[name]
        adapters[name] = (script, own | few)
    monkeypatch.setattr(recipe, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(recipe, "ADAPTERS", adapters)
    monkeypatch.setattr(checkpoints, "ADAPTERS", tmp_path / "adapters")
    for _ in range(2):
        recipe.train_adapters(torch.device("cpu"))
    assert checkpoints.load_generator("clear2rain").prompts == [
        "a scene in the day in clear weather",
        "a scene in the day in the rain",
    ]
    assert checkpoints.load_generator("edges2scene").r == 0.4


def test_pairs_are_made_once_and_a_base_learns_from_them(monkeypatch, tmp_path):
    for name, value in dict(RUNS=tmp_path, PAIRS=6, CHUNK=3).items():
        monkeypatch.setattr(recipe, name, value)
    cpu = torch.device("cpu")
    captions, noise, made = recipe.make_pairs(cpu)
    assert len(captions) == 6 and noise.shape == made.shape == (6, 4, 16, 16)
    assert 0.5 < made.std() < 1.5 and (made - noise).abs().mean() > 0.3

    # The second chunk is made anew, the first one comes from its file.
    files = sorted((tmp_path / "pairs" / "latents").iterdir())
    recipe.write_array(files[0], np.zeros((3, 4, 16, 16), np.float16))
    files[1].unlink()
    again_captions, again_noise, again = recipe.make_pairs(cpu)
    assert again_captions == captions and torch.equal(again_noise, noise)
    assert (again[:3] == 0).all() and torch.allclose(again[3:], made[3:], atol=1e-2)

    trained = bases.load_base(str(recipe.train_pairs("tiny-turbo", cpu, steps=2, batch=4)))
    before = bases.load_base("tiny-turbo")
    assert not torch.equal(trained.unet.conv_in.weight, before.unet.conv_in.weight)
    assert trained.schedule.prediction_type == "v_prediction"
    assert (tmp_path / "pairs" / "000002.png").is_file()


def test_an_average_of_networks_is_halfway_between_them():
    first, second = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    halfway = (first.weight + second.weight) / 2
    recipe.average_with(first, second)
    torch.testing.assert_close(first.weight, halfway)


def test_an_array_is_written_whole_or_not_at_all(monkeypatch, tmp_path):
    path = tmp_path / "drawings.npy"
    recipe.write_array(path, np.arange(5))
    assert np.load(path).tolist() == [0, 1, 2, 3, 4]

    def write_a_part(file, array):
        file.write(b"a part")
        raise OSError("no space left")

    monkeypatch.setattr(np, "save", write_a_part)
    with pytest.raises(OSError, match="no space left"):
        recipe.write_array(path, np.arange(6))
    assert np.load(path).tolist() == [0, 1, 2, 3, 4]
    assert [file.name for file in tmp_path.iterdir()] == ["drawings.npy"]


def test_gradient_energy_falls_with_blur_and_steepness_finds_where():
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    blurred = F.avg_pool2d(x, 3, 1, padding=1)
    assert measure.gradient_energy(x, x) == pytest.approx(1)
    assert 0 < measure.gradient_energy(blurred, x) < 0.3
    assert measure.gradient_energy(2 * x, x) == pytest.approx(4)
    mirrored = x.flip(3)
    assert recipe.sharpening_loss(x, x) == 0
    assert (recipe.steepness(mirrored).mean() - recipe.steepness(x).mean()).abs() < 0.02
    assert (recipe.steepness(x) - recipe.steepness(blurred) > 0).all()


def test_a_script_of_the_recipe_that_fails_is_named():
    with pytest.raises(ValueError, match="train_yoso.py ended with status 2"):
        recipe.run("train_yoso.py", "--no_such_flag")


# -------------------- sample.py on the embedded base


def draw(monkeypatch, *arguments) -> None:
    """`python sample.py ARGUMENTS --device cpu` in this process."""
    monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, arguments), "--device", "cpu"])
    sample.main()


def test_the_page_of_the_readme_is_the_one_that_sample_draws(monkeypatch, tmp_path, capsys):
    draw(monkeypatch, "--output", tmp_path / "page.png")
    assert capsys.readouterr().out.strip().endswith("page.png")
    drawn = to_tensor(open_picture(tmp_path / "page.png"))
    committed = to_tensor(open_picture(recipe.ROOT / "assets" / "tiny.png"))
    assert drawn.shape == committed.shape and (drawn - committed).abs().mean() < 2 / 255


@pytest.mark.parametrize("kind", ["text", "pix2pix_turbo", "cyclegan_turbo"])
@pytest.mark.parametrize("name, dtype", [
    ("tiny-turbo", "bf16"),
    ("tiny-sd", "bf16, denoiser float32"),
])
def test_the_fast_default_makes_float32s_pictures(monkeypatch, tmp_path, name, dtype, kind):
    """To 40 dB and 1/255, on any CPU: one without bf16 instructions rounds to bf16. tiny-sd's x0
    comes from an epsilon, whose errors are multiplied by 14.6."""
    monkeypatch.setattr(sampling.precision, "computes_in_bf16", lambda device: True)
    flags = ["--base", name]
    if kind != "text":
        base = bases.load_base(name)
        generator, config, _ = checkpoints.KINDS[kind]
        config = config(prediction_type=base.schedule.prediction_type)
        network = generator(base.vae, base.unet, base.schedule, config)
        path = tmp_path / "model.safetensors"
        checkpoints.save_generator(path, network, kind, name, ["a", "b"])
        to_picture(measure.held_out(2)[1][1]).save(tmp_path / "in.png")
        flags = ["--checkpoint", path, "--input", tmp_path / "in.png"]

    caption = scenes.caption(scenes.nth_scene("test", 0, 1))
    pictures = []
    for chosen in ("float32", "auto"):
        output = tmp_path / f"{chosen}.png"
        draw(monkeypatch, caption, *flags, "--dtype", chosen, "--output", output)
        pictures.append(to_tensor(open_picture(output)))
    exact, fast = pictures
    assert Image.open(output).text["dtype"] == dtype
    assert exact.std() > 0.03
    assert measure.psnr(2 * fast[None] - 1, 2 * exact[None] - 1).item() >= 40
    assert 0 < (fast - exact).abs().mean() <= 1 / 255

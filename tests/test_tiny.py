"""The embedded base : what is held out is never shown, the judge is right, the files are the
recipe's."""

import sys

import pytest
import torch
from PIL import Image

import sample
from dataset import folders
from dataset.pictures import open_picture, to_picture, to_tensor
from files import bases, checkpoints, tokenizers
from tiny import measure, recipe, scenes


def test_the_tokenizer_in_the_tree_is_the_recipes(tmp_path):
    recipe.write_tokenizer(tmp_path)
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (recipe.HERE / "tiny" / "tokenizer" / path.name).read_bytes(), path.name
    tokenizer = tokenizers.load_tokenizer("tiny")
    words = tokenizer.pieces.encode(" ".join(dict.fromkeys(recipe.WORDS)), add_special_tokens=False).ids
    assert len(words) == len(dict.fromkeys(recipe.WORDS))


def test_the_tiny_base_is_drawn_from_its_seed():
    a, b, c = (bases.load_base("tiny", ("unet",), seed=seed).unet.conv_out.weight for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_an_untrained_tiny_base_hears_its_caption():
    """Another caption changes the untrained prediction by more than a tenth of its size: training can begin with it."""
    base = bases.load_base("tiny")
    texts = base.text_encoder(base.tokenizer([scenes.caption(scenes.nth_scene("test", 0, i)) for i in range(9)]))
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).expand(len(texts), -1, -1, -1)
    with torch.no_grad():
        prediction = base.unet(z, 999, texts)
    assert prediction.std(0).mean() > 0.1 * prediction.std()


@pytest.mark.parametrize("name", ["drawn:scenes"])
def test_drawn_worlds_are_reached_by_name(name):
    assert len(folders.open_paired(name, "test", "no_resize")) > 0


# -------------------- what the trained weights can do


@pytest.fixture(scope="module")
def judge():
    return measure.load_judge()


def test_the_judge_reads_real_drawings_and_not_what_is_not_there(judge):
    described, truth = measure.held_out(60)
    assert min(measure.obeyed(judge, truth, described).values()) > 0.97
    others = described[1:] + described[:1]
    assert measure.obeyed(judge, truth, others)["colour"] < 0.3


def test_the_autoencoder_keeps_drawings_with_their_rain_snow_and_stars(judge):
    described, truth = measure.held_out(60)
    network = bases.load_base("tiny-turbo", ("vae",), torch.float32).vae
    made = network.decode(network.encode(truth)[0]).clamp(-1, 1)
    assert measure.psnr(made, truth).mean() > 30
    assert measure.obeyed(judge, made, described)["weather"] > 0.97
    z = network.encode(truth)[0] * network.config.scaling_factor
    assert 0.9 < z.std() < 1.1


@pytest.mark.parametrize("name, steps, guidance, share", [("tiny-turbo", 1, 1.0, 0.8), ("tiny-sd", 12, 3.0, 0.7)])
def test_captions_are_obeyed(judge, monkeypatch, name, steps, guidance, share):
    """On held-out combinations; guessing gets a third of the fields right and hardly a colour."""
    monkeypatch.setattr(measure, "N", 16)
    found = measure.measure_text(judge, name, steps, guidance, 0)
    assert found["obeyed"]["all"] > share and found["obeyed"]["time"] > 0.85, found


@pytest.mark.parametrize("task", scenes.TASKS)
def test_a_translation_is_nearer_to_the_truth_than_the_input_and_than_the_untrained_adapter(monkeypatch, task):
    monkeypatch.setattr(measure, "N", 8)
    for found in measure.measure_unpaired(task).values():
        psnr = {name: values["psnr"]["mean"] for name, values in found.items()}
        assert psnr["adapter"] > max(psnr["doing nothing"], psnr["untrained adapter"]) + 1, (task, psnr)


def test_outlines_become_scenes_that_keep_them_and_obey_the_caption(judge, monkeypatch):
    described, truth = measure.held_out(12)
    x = torch.stack([to_tensor(scenes.outlines(scene, 64)) * 2 - 1 for scene in described])
    captions, goal = [scenes.caption(scene) for scene in described], measure.edges(truth)
    near, far = (measure.translated("edges2scene", x, captions, None, 0, r=r) for r in (1.0, 0.0))
    assert measure.edge_f(measure.edges(near), goal).mean() > measure.edge_f(measure.edges(far), goal).mean()
    assert measure.psnr(near, truth).mean() > measure.psnr(far, truth).mean() + 2
    assert measure.obeyed(judge, near, described)["all"] > 0.8


def test_the_recipe_trains_adapters_that_load_and_goes_on_with_what_is_done(monkeypatch, tmp_path):
    few = dict(max_train_steps=1, train_batch_size=1)
    monkeypatch.setattr(recipe, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(checkpoints, "ADAPTERS", tmp_path / "adapters")
    monkeypatch.setattr(recipe, "ADAPTERS", {name: (script, own | few | {count: 1}) for (name, (script, own)), count in
                                             zip([*recipe.ADAPTERS.items()][1:],
                                                 ("validation_num_images", "num_samples_eval"))})
    for _ in range(2):
        recipe.train_adapters(torch.device("cpu"))
    assert checkpoints.load_generator("clear2rain").prompts == ["a scene in the day in clear weather",
                                                            "a scene in the day in the rain"]
    assert checkpoints.load_generator("edges2scene").r == 0.4


def test_the_page_of_the_readme_is_the_one_that_sample_draws(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["sample.py", "--output", str(tmp_path / "page.png"), "--device", "cpu"])
    sample.main()
    assert capsys.readouterr().out.strip().endswith("page.png")
    pages = [to_tensor(open_picture(path)) for path in
             (tmp_path / "page.png", recipe.HERE.parent / "assets" / "tiny.png")]
    assert pages[0].shape == pages[1].shape and (pages[0] - pages[1]).abs().mean() < 2 / 255


@pytest.mark.parametrize("kind", ["text", "pix2pix_turbo", "cyclegan_turbo"])
@pytest.mark.parametrize("name, dtype", [("tiny-turbo", "bf16"), ("tiny-sd", "bf16, denoiser float32")])
def test_the_fast_default_makes_float32s_pictures(monkeypatch, tmp_path, name, dtype, kind):
    """To 40 dB and 1/255, on any CPU: one that does not compute in bf16 itself rounds to it. tiny-sd's x0 is of an
    epsilon, times 14.6."""
    monkeypatch.setattr(sample, "computes_in_bf16", lambda device: True)
    scene, flags = scenes.nth_scene("test", 0, 1), ["--base", name]
    if kind != "text":
        base = bases.load_base(name)
        generator, config, _ = checkpoints.KINDS[kind]
        made = generator(base.vae, base.unet, base.schedule, config(prediction_type=base.schedule.prediction_type))
        checkpoints.save_generator(tmp_path / "model.safetensors", made, kind, name, ["a", "b"])
        to_picture(measure.held_out(2)[1][1]).save(tmp_path / "in.png")
        flags = ["--checkpoint", str(tmp_path / "model.safetensors"), "--input", str(tmp_path / "in.png")]
    pictures = []
    for chosen in ("float32", "auto"):
        output = str(tmp_path / f"{chosen}.png")
        monkeypatch.setattr(sys, "argv", ["sample.py", scenes.caption(scene), *flags, "--dtype", chosen, "--device",
                                          "cpu", "--output", output])
        sample.main()
        pictures.append(to_tensor(open_picture(output)))
    assert Image.open(output).text["dtype"] == dtype
    assert pictures[0].std() > 0.03
    difference = pictures[1] - pictures[0]
    assert measure.psnr(2 * pictures[1][None] - 1, 2 * pictures[0][None] - 1).item() >= 40
    assert 0 < difference.abs().mean() <= 1 / 255

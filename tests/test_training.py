"""The plumbing: flags, draws, rows, files that are whole or untouched, logs, pictures of them."""

import json
import os
import signal
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pytest
import torch
from PIL import Image

import training


@dataclass
class Config:
    output_dir: str
    resume: str | None = None


def test_an_error_of_the_user_is_one_line_and_status_2_and_a_bug_keeps_its_traceback(capsys):
    def main():
        raise ValueError("found this, expected that")

    with pytest.raises(SystemExit) as caught:
        training.run(main)
    assert caught.value.code == 2 and capsys.readouterr().err.endswith("error: found this, expected that\n")
    with pytest.raises(KeyError):
        training.run(lambda: {}["bug"])

    def odd_name():
        raise ValueError("a\nname")

    with pytest.raises(SystemExit):
        training.run(odd_name)
    assert capsys.readouterr().err.endswith("error: a name\n")


def test_draws_depend_on_seed_step_and_purpose_only():
    def draw(*args):
        return torch.randn(5, generator=training.rng(*args))

    torch.manual_seed(1)
    a = draw(0, 3, "latent")
    torch.manual_seed(2)
    assert torch.equal(a, draw(0, 3, "latent"))
    for other in [(1, 3, "latent"), (0, 4, "latent"), (0, 3, "noise")]:
        assert not torch.equal(a, draw(*other))


@pytest.mark.parametrize("world, batch, accumulation", [(1, 4, 1), (2, 2, 1), (1, 2, 2), (3, 2, 4)])
def test_ranks_and_slices_share_the_global_batch_without_overlap(world, batch, accumulation):
    rows = [row for rank in range(world) for part in training.my_rows(rank, world, batch, accumulation) for row in part]
    assert sorted(rows) == list(range(world * batch * accumulation))


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "state.pt"
    path.write_text("old")

    def broken(temporary):
        temporary.write_text("half of the n")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left.*untouched"):
        training.write_file(path, broken)
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["state.pt"]


def test_a_state_goes_back_into_what_it_was_taken_from(tmp_path):
    def parts():
        network = torch.nn.Linear(3, 2)
        optimizer = torch.optim.AdamW(network.parameters())
        network(torch.ones(3)).sum().backward()
        optimizer.step()
        return dict(trained=dict(network.named_parameters()), mean=dict(weight=torch.randn(2, 3)), network=network,
                    optimizer=optimizer, discriminator=None)

    one, other = parts(), parts()
    trained, mean = dict(other["trained"]), other["mean"]["weight"]
    training.save_state(tmp_path / "state.pt", dict(step=1, base="abc", best=0.5, **one))
    assert training.restore(tmp_path, "abc", other, "step", "best") == [1, 0.5]
    assert all(torch.equal(p, one["trained"][name]) for name, p in trained.items())  # in place
    assert torch.equal(mean, one["mean"]["weight"])
    for name in ("network", "optimizer"):
        a, b = (str(part[name].state_dict()) for part in (one, other))
        assert a == b


def test_a_state_of_other_batches_is_refused(tmp_path):
    training.save_state(tmp_path / "state.pt", dict(step=1, base="abc", batch=8))
    assert training.restore(tmp_path, "abc", {}, "step", batch=8) == [1]
    with pytest.raises(ValueError, match="steps of 8 items and these would be of 2; start as many processes as before"):
        training.restore(tmp_path, "abc", {}, "step", batch=2)


def restore(folder, base):
    return training.restore(folder, base, {}, "step")[0]


def test_a_state_cut_anywhere_or_with_code_in_it_is_refused_in_one_line(tmp_path):
    path = tmp_path / "state.pt"
    training.save_state(path, dict(step=1, base="abc", trained=dict(w=torch.arange(100.0))))
    whole = path.read_bytes()
    assert restore(tmp_path, "abc") == 1
    with pytest.raises(ValueError, match="fingerprint"):
        restore(tmp_path, "other")
    for cut in [0, 1, 50, len(whole) // 2, len(whole) - 60, len(whole) - 1]:
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="is damaged") as caught:
            restore(tmp_path, "abc")
        assert "\n" not in str(caught.value)
    for state in (dict(step=1, base="abc", code=training.rng), dict(step=1), [1, 2]):
        torch.save(state, path)
        with pytest.raises(ValueError, match="is damaged"):
            restore(tmp_path, "abc")
    for state, said in ((dict(base="abc"), "KeyError: 'step'"), (dict(base="abc", step=0.5), "TypeError: .* 0.5")):
        torch.save(state, path)
        with pytest.raises(ValueError, match=f"state.pt is not of this run .{said}.; put its own"):
            restore(tmp_path, "abc")
    torch.save(dict(base="abc", step=1, trained=dict(w=torch.zeros(3))), path)
    with pytest.raises(ValueError, match="state.pt is not of this run"):
        training.restore(tmp_path, "abc", dict(trained=dict(w=torch.zeros(2))), "step")
    path.unlink()
    with pytest.raises(ValueError, match="has no state.pt"):
        restore(tmp_path, "abc")


def test_a_run_is_never_overwritten(tmp_path):
    cfg = Config(output_dir=str(tmp_path / "run"))
    folder = training.open_run(cfg, "kind", 0)
    (folder / "log.jsonl").write_text("of a run that ended before its first save")
    assert not (training.open_run(cfg, "kind", 0) / "log.jsonl").exists()
    (folder / "state.pt").touch()
    with pytest.raises(ValueError, match="holds a run already"):
        training.open_run(cfg, "kind", 0)


def test_log_forgets_the_steps_that_run_again_and_lines_that_a_kill_cut_or_are_of_others(tmp_path):
    path = tmp_path / "log.jsonl"
    for step in range(1, 6):
        training.append_log(path, step, dict(loss=1.0 / step))
    path.write_text(path.read_text() + '7\n[]\n{}\n{"step": "2"}\n{"step": 6, "lo')
    training.open_log(tmp_path, 3)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]


def test_a_stop_is_asked_for_once_and_only_a_second_ctrl_c_does_not_wait():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        stop = training.catch_stop()
        assert not stop()
        for _ in range(3):  # a scheduler tells every process, and torchrun tells its own again
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_loss_that_is_no_number_names_step_and_pictures():
    training.check_finite(dict(l2=1.0), 3, ["a.png"])
    with pytest.raises(ValueError, match=r"step 3.*'gan': nan.*a\.png, b\.png"):
        training.check_finite(dict(l2=1.0, gan=float("nan")), 3, ["a.png", "b.png"])


def test_grid_shows_every_picture_where_it_belongs(tmp_path):
    columns = [torch.full((3, 3, 4, 4), level) for level in (-1.0, 0.0, 1.0)]
    columns[1][2] = 0.5
    training.save_grid(tmp_path / "grid.png", columns, at_least=4)
    page = np.asarray(Image.open(tmp_path / "grid.png"))
    assert page.shape == (8, 28, 3)  # two stacks of two rows, three columns of 4, a gap of 4
    assert page[0, 0, 0] == 0 and page[0, 5, 0] == 128 and page[0, 9, 0] == 255 and page[0, 21, 0] == round(1.5 * 127.5)


def test_plot_is_drawn_from_the_log(tmp_path):
    for step in range(1, 30):
        training.append_log(tmp_path / "log.jsonl", step, dict(loss=1.0 / step, val=float(step % 2)))
    training.plot_losses(tmp_path / "log.jsonl", tmp_path / "losses.png")
    page = np.asarray(Image.open(tmp_path / "losses.png"))
    assert page.shape == (200, 1080, 3) and (page == (31, 95, 168)).all(-1).sum() > 100


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried"),
                                   RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
                                   RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling")])
def test_memory_that_is_short_is_one_line(capsys, error):
    def main():
        raise error

    with pytest.raises(SystemExit) as end:
        training.run(main)
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.count("\n") == 1 and "memory" in err and "--train_batch_size" in err


def test_an_unknown_device_and_a_missing_reporter_are_refused(tmp_path):
    with pytest.raises(ValueError, match="--device warp cannot be used"):
        training.pick_device("warp")
    with pytest.raises(ValueError, match="expected tensorboard, wandb or none"):
        training.open_reporter("printer", tmp_path, "p")


# -------------------- The command line


@dataclass
class Settings:
    base: str = "sd-turbo"  # where from
    learning_rate: float = 1e-4  # how fast
    epochs: int | None = None
    use_ema: bool = False
    kind: Literal["a", "b"] = "a"
    max_train_steps: int = 10
    output_dir: str | None = None
    resume: str | None = None
    dataloader_num_workers: int = 0
    seed: int = 0


TINY = dict(learning_rate=1e-2, seed=7)


def parse(*argv):
    return training.parse(Settings, dict(tiny=TINY), dict(old_name="base"), "doc", list(argv))


def test_flags_fill_the_dataclass_with_its_types():
    cfg = parse("--learning_rate", "0.5", "--epochs", "3", "--use_ema", "--kind", "b", "--old_name", "x/y")
    assert cfg == Settings("x/y", 0.5, 3, True, "b")
    assert parse("--use_ema", "off") == Settings() and parse("--use_ema", "on") == parse("--use_ema") != Settings()


def test_tiny_bases_have_other_defaults_which_flags_override(capsys):
    assert parse("--base", "tiny") == Settings("tiny", 1e-2, seed=7)
    assert "--learning_rate 0.01" in capsys.readouterr().err
    assert parse("--base", "tiny-turbo", "--seed", "1").seed == 1


def test_a_base_by_its_path_has_the_defaults_of_its_name(monkeypatch, tmp_path):
    (tmp_path / "tiny-denoiser" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for path in ("tiny", "./tiny", "/somewhere/tiny", "tiny-denoiser/base"):  # the last is of a run of that name
        assert parse("--base", path).learning_rate == 1e-2
    for path in (str(tmp_path), "runs/v/base"):
        assert parse("--base", path).learning_rate == Settings().learning_rate


@pytest.mark.parametrize("argv, words", [
    (["--learning_rat", "1"], ["unknown argument --learning_rat", "--learning_rate"]),
    (["--kind", "c"], ["--kind", "'a'", "'b'"]),
    (["--learning_rate", "fast"], ["--learning_rate", "fast"]),
    (["--allow_tf32"], ["--allow_tf32 is not needed"]),
    (["--enable_xformers_memory_efficient_attention"], ["fused"]),
    (["stray"], ["stray"]),
    (["--learning_rate", "-1"], ["--learning_rate -1.0", "0 or more"]),
    (["--learning_rate", "inf"], ["--learning_rate inf", "finite"]),
    (["--seed", str(2**64)], ["--seed", "below 2^63"]),
    (["--learning_rate"], ["--learning_rate", "expected one argument"]),
])
def test_wrong_flags_are_one_line_that_helps(argv, words):
    with pytest.raises(ValueError) as caught:
        parse(*argv)
    assert all(w in str(caught.value) for w in words) and "\n" not in str(caught.value)


def test_help_shows_the_comment_and_the_default(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    out = capsys.readouterr().out
    assert "how fast [0.0001]" in out and "--old_name" in out


def test_resume_keeps_the_settings_and_lets_only_steps_change(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(dict(base="b", learning_rate=0.25, max_train_steps=10)))
    cfg = parse("--resume", str(tmp_path), "--max_train_steps", "20", "--base", "b")
    assert (cfg.base, cfg.learning_rate, cfg.max_train_steps, cfg.output_dir) == ("b", 0.25, 20, str(tmp_path))
    with pytest.raises(ValueError, match="--learning_rate 0.5 differs from the 0.25"):
        parse("--resume", str(tmp_path), "--learning_rate", "0.5")
    assert parse("--resume", str(tmp_path), "--dataloader_num_workers", "3").dataloader_num_workers == 3
    with pytest.raises(ValueError, match="no config.json"):
        parse("--resume", str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="--output_dir elsewhere differs from"):
        parse("--resume", str(tmp_path), "--output_dir", "elsewhere")


@pytest.mark.parametrize("text, says", [
    ('{"base": "b"', "Expecting"), ("[1]", "items"), ("[" * 100_000, "recursion"), ('{"seed": "x"}', "--seed"),
    ('{"use_ema": 3}', "--use_ema"), ('{"kind": "c"}', "--kind"), ('{"seed": -1}', "--seed -1"),
])
def test_settings_that_no_flag_would_take_are_refused_on_resuming(tmp_path, text, says):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="config.json does not hold the settings of a run") as caught:
        parse("--resume", str(tmp_path))
    assert says in str(caught.value) and "\n" not in str(caught.value)

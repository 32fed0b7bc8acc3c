"""What the trainers share: flags, random numbers, rows, steps, run folders, logs, grids."""

import json
import math
import os
import signal
import sys
from dataclasses import dataclass, fields
from types import SimpleNamespace
from typing import Literal

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image

import train_cyclegan_turbo
import train_pix2pix_turbo
import train_yoso
import training
from training import folders

torch.set_num_threads(1)


# ------------------------------------------------------------------------------- exit status

def test_an_error_of_the_user_is_one_line_and_status_2_and_a_bug_keeps_its_traceback(capsys):
    def main():
        raise ValueError("found this, expected that")

    with pytest.raises(SystemExit) as caught:
        training.run_script(main)
    assert caught.value.code == 2
    assert capsys.readouterr().err.endswith("error: found this, expected that\n")
    with pytest.raises(KeyError):
        training.run_script(lambda: {}["bug"])

    def odd_name():
        raise ValueError("a\nname")

    with pytest.raises(SystemExit):
        training.run_script(odd_name)
    assert capsys.readouterr().err.endswith("error: a name\n")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"),
        MemoryError(),
    ],
    ids=["CUDA", "CPU", "cuBLAS", "Python"],
)
def test_a_lack_of_memory_is_one_line(capsys, error):
    def main():
        raise error

    with pytest.raises(SystemExit) as end:
        training.run_script(main)
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.count("\n") == 1
    assert "memory" in err and "--train_batch_size" in err


def test_an_unknown_device_and_a_missing_reporter_are_refused(tmp_path):
    with pytest.raises(ValueError, match="--device warp cannot be used"):
        training.pick_device("warp")
    with pytest.raises(ValueError, match="expected tensorboard, wandb or none"):
        training.open_reporter("printer", tmp_path, "p")


# ---------------------------------------------------------------- random numbers and processes

def test_random_numbers_depend_on_seed_step_and_purpose_only():
    def draw(*args):
        return torch.randn(5, generator=training.rng(*args))

    torch.manual_seed(1)
    a = draw(0, 3, "latent")
    torch.manual_seed(2)
    assert torch.equal(a, draw(0, 3, "latent"))
    for other in [(1, 3, "latent"), (0, 4, "latent"), (0, 3, "noise")]:
        assert not torch.equal(a, draw(*other))


@pytest.mark.parametrize("world, batch, slices", [(1, 4, 1), (2, 2, 1), (1, 2, 2), (3, 2, 4)])
def test_ranks_and_slices_share_the_global_batch_without_overlap(world, batch, slices):
    rows = []
    for rank in range(world):
        for part in training.my_rows(rank, world, batch, slices):
            assert len(part) == batch
            rows += part
    assert sorted(rows) == list(range(world * batch * slices))


def test_a_stop_is_asked_for_once_and_only_a_second_ctrl_c_does_not_wait():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        stop = training.catch_stop()
        assert not stop()
        # A scheduler tells every process, and torchrun tells its own again.
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_run_that_ends_closes_its_connections(tmp_path, monkeypatch):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    run = make_run()
    run.folder = tmp_path
    monkeypatch.setattr(training.run, "write_report", lambda *_: None)
    run.finish()
    assert not dist.is_initialized()


# ---------------------------------------------------------------------------------- the run

@dataclass
class RunConfig:
    output_dir: str | None = None
    resume: str | None = None
    seed: int = 42
    device: str = "cpu"
    dtype: str = "float64"
    mixed_precision: str = "no"
    train_batch_size: int = 2
    gradient_accumulation_steps: int = 1
    max_train_steps: int = 10
    max_train_epochs: int | None = None
    learning_rate: float = 1.0
    lr_scheduler: str = "constant"
    lr_warmup_steps: int = 10
    dataset_folder: str = "drawn:scenes"
    report_to: str = "none"
    tracker_project_name: str = "p"
    validation_steps: int = 3
    viz_freq: int = 1
    plan_steps: int | None = None
    validation_num_images: int = 8
    track_val_fid: bool = False


def make_run(items: int = 100, **settings) -> training.Run:
    run = training.Run(RunConfig(**settings), "kind")
    run.prepare(range(items))
    return run


def parameter(*gradient: float) -> tuple[torch.nn.Parameter, torch.optim.Optimizer]:
    """A parameter of zeros with this gradient, and an optimizer that subtracts the gradient."""
    p = torch.nn.Parameter(torch.zeros(len(gradient), dtype=torch.float64))
    p.grad = torch.tensor(gradient, dtype=torch.float64)
    return p, torch.optim.SGD([p], lr=1.0)


@pytest.mark.parametrize(
    "epochs, steps",
    [(None, 10), (1, 2), (2, 4), (50, 10)],
    ids=["steps", "rounded up", "two", "steps come first"],
)
def test_a_plan_ends_after_the_steps_or_the_epochs(epochs, steps):
    settings = dict(train_batch_size=3, gradient_accumulation_steps=2, max_train_epochs=epochs)
    run = make_run(items=11, **settings)
    assert run.global_batch == 6 and run.last_step == steps
    assert run.micro_batches == [[0, 1, 2], [3, 4, 5]] and run.rows == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("rank", [0, 1])
def test_micro_batches_are_rows_of_the_global_batch_with_their_noise(monkeypatch, rank):
    """Noise belongs to a row of the global batch, whoever trains on it."""
    start_ranks = training.start_ranks
    whole = make_run(train_batch_size=8)
    monkeypatch.setattr(
        training.run, "start_ranks", lambda name: (rank, 2, start_ranks(name)[2])
    )
    run = make_run(train_batch_size=2, gradient_accumulation_steps=2)
    assert run.global_batch == 8
    values = torch.tensor(run.rows, dtype=torch.float32)
    batch = {"input": values, "caption": [f"row {row}" for row in run.rows]}
    every = whole.normal(3, "latent", list(range(8)), (4, 5))
    wanted = [[0, 1], [4, 5]] if rank == 0 else [[2, 3], [6, 7]]
    found = []
    for rows, piece in run.split(batch):
        found.append(rows)
        assert piece["input"].tolist() == rows and piece["input"].dtype == torch.float64
        assert piece["caption"] == [f"row {row}" for row in rows]
        assert torch.equal(run.normal(3, "latent", rows, (4, 5)), every[rows])
    assert found == wanted
    assert not torch.equal(every, whole.normal(4, "latent", list(range(8)), (4, 5)))
    assert every.std().item() == pytest.approx(1, abs=0.15) and every.dtype == torch.float64


def test_gradients_of_micro_batches_are_those_of_their_mean():
    run = make_run(gradient_accumulation_steps=2)
    p, optimizer = parameter(0.0)
    for factor in (3.0, 5.0):
        run.backward(factor * p.sum())
    assert p.grad.item() == 4.0
    assert run.update(optimizer) == 4.0 and p.item() == -4.0 and p.grad is None


def test_update_clips_the_norm_of_all_gradients_and_returns_it():
    run = make_run()
    p, optimizer = parameter(3.0, 4.0)
    assert run.update(optimizer, max_norm=10.0) == 5.0
    assert p.tolist() == [-3.0, -4.0]
    p, optimizer = parameter(3.0, 4.0)
    assert run.update(optimizer, max_norm=1.0) == 5.0
    assert p.tolist() == pytest.approx([-0.6, -0.8], rel=1e-5)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_update_takes_no_step_with_a_norm_that_is_not_finite(value):
    run = make_run()
    p, optimizer = parameter(1.0, value)
    norm = run.update(optimizer, max_norm=1.0)
    assert not math.isfinite(norm)
    assert p.tolist() == [0.0, 0.0] and p.grad is None  # nothing is left for the next step
    with pytest.raises(ValueError, match=r"step 8: .*'grad_norm': .*a\.png, b\.png"):
        run.check_finite({"l2": 1.0, "grad_norm": norm}, 7, {"name": ["a.png", "b.png"]})


@pytest.mark.parametrize("step, wrong_advice", [(0, "a lower --learning_rate"), (1, "the base")])
def test_the_learning_rate_is_not_blamed_before_anything_is_trained(step, wrong_advice):
    with pytest.raises(ValueError, match=f"step {step + 1}: the loss became .*a.png") as refused:
        make_run().check_finite({"l2": math.nan}, step, {"name": ["a.png"]})
    assert wrong_advice not in str(refused.value)


def test_fp16_skips_a_step_that_overflows_and_tries_a_smaller_scale():
    run = make_run(mixed_precision="fp16", dtype="float32")
    p, optimizer = parameter(0.0)
    run.backward(p.sum())
    p.grad.fill_(math.inf)
    scale = run.scaler.get_scale()
    norm = run.update(optimizer, max_norm=1.0)
    run.scaler.update()
    assert p.item() == 0 and run.scaler.get_scale() < scale and not math.isfinite(norm)
    # A gradient norm may overflow, a loss may not.
    run.check_finite({"l2": 1.0, "grad_norm": norm, "disc_grad_norm": norm}, 0, {})
    with pytest.raises(ValueError, match="'l2': nan"):
        run.check_finite({"l2": math.nan, "grad_norm": norm}, 0, {})
    # The next step is taken.
    run.backward(p.sum())
    assert run.update(optimizer, max_norm=10.0) == pytest.approx(1.0) and p.item() == -1.0


@pytest.mark.parametrize("precision, half", [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_mixed_precision_sets_autocast_scaler_and_types(precision, half):
    run = make_run(mixed_precision=precision, dtype="float32")
    assert (run.dtype, run.half) == (torch.float32, half)
    with run.autocast:
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == half
    assert run.scaler.is_enabled() == (precision == "fp16")
    run = make_run()
    assert run.half is None and not run.scaler.is_enabled()
    with run.autocast:
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


def test_periodic_jobs_are_due_after_every_so_many_steps_and_after_the_last():
    run = make_run(max_train_steps=7)
    assert [step for step in range(7) if run.due("validation", step)] == [2, 5, 6]
    assert run.due("validation", 0, also=True) and run.due("preview", 0)
    run.rank = 1  # only the first process validates, draws and saves
    assert not any(run.due("preview", step, also=True) for step in range(7))


def test_the_best_validation_is_the_lowest_and_survives_a_resume(tmp_path):
    run = make_run(output_dir=str(tmp_path))
    run.open_folder()
    (tmp_path / "log.jsonl").touch()
    assert not run.improves(math.inf)  # no measure
    assert not run.improves(math.nan)
    assert run.improves(3.0) and not run.improves(3.0) and run.improves(2.0)
    run.save_state(4, "abc", {}, prior=0.5)
    other = make_run(output_dir=str(tmp_path), resume=str(tmp_path))
    other.open_folder()
    assert other.restore("abc", {}, "prior") == [0.5]
    assert (other.first_step, other.best) == (5, 2.0)
    assert not other.improves(2.5) and other.improves(1.5)


def test_recorded_values_are_means_over_micro_batches():
    run = make_run(gradient_accumulation_steps=2)
    losses = {}
    run.record(losses, {"l2": torch.tensor(3.0), "right": 0.5})
    run.record(losses, {"l2": torch.tensor(5.0), "right": 1.0})
    assert losses == {"l2": 4.0, "right": 0.75}


def test_a_loss_that_is_not_finite_names_step_and_pictures():
    training.check_finite(dict(l2=1.0), 3, ["a.png"])
    with pytest.raises(ValueError, match=r"step 4: .*'gan': nan.*a\.png, b\.png"):
        training.check_finite(dict(l2=1.0, gan=math.nan), 3, ["a.png", "b.png"])
    run = make_run()
    run.check_finite(dict(l2=1.0), 3, {})
    names = {"name_a": ["a.png"], "name_b": ["b.png"]}
    with pytest.raises(ValueError, match=r"step 4: .*'gan': inf.*a\.png, b\.png"):
        run.check_finite(dict(gan=math.inf), 3, names)


def test_learning_rates_follow_their_schedules():
    def rate(name, step, last=110):
        cfg = RunConfig(lr_scheduler=name)
        return training.learning_rate(step, cfg, last)

    assert rate("constant", 0) == rate("constant", 100) == 1
    assert rate("constant_with_warmup", 4) == 0.5 and rate("constant_with_warmup", 50) == 1
    assert rate("linear", 60) == 0.5 and rate("linear", 4) == 0.5
    assert rate("cosine", 60) == pytest.approx(0.5) and rate("cosine", 110) == pytest.approx(0)


def test_a_run_sets_the_rate_of_every_optimizer_there_is():
    run = make_run(lr_scheduler="linear", max_train_steps=110)
    _, one = parameter(1.0)
    _, other = parameter(1.0)
    run.set_learning_rate(60, one, None)
    run.set_learning_rate(60, other, scale=4.0)
    assert [optimizer.param_groups[0]["lr"] for optimizer in (one, other)] == [0.5, 2.0]


def test_ema_and_weights_change_places_within_the_context_only():
    p = torch.nn.Parameter(torch.zeros(2))
    trained, ema = {"p": p, "q": torch.nn.Parameter(torch.ones(2))}, {"p": torch.ones(2)}
    with training.swapped(trained, ema):
        assert p.tolist() == [1, 1] and ema["p"].tolist() == [0, 0]
    assert p.tolist() == [0, 0] and ema["p"].tolist() == [1, 1]
    assert trained["q"].tolist() == [1, 1]


def test_ema_and_weights_change_back_and_the_step_is_saved_when_validation_fails():
    p, ema, saved = torch.nn.Parameter(torch.zeros(2)), {"p": torch.ones(2)}, []

    def save(step):
        saved.append((step, p.tolist(), ema["p"].tolist()))

    with training.saved_on_failure(save, 3), training.swapped({"p": p}, ema):
        pass
    assert saved == []

    def fail():
        with training.saved_on_failure(save, 4), training.swapped({"p": p}, ema):
            raise ValueError("no picture")

    with pytest.raises(ValueError, match="no picture"):
        fail()
    assert saved == [(4, [0, 0], [1, 1])]


def test_a_discriminators_accuracy_counts_all_levels():
    real = [torch.tensor([1.0, -1.0]), torch.tensor([2.0, 3.0])]
    fake = [torch.tensor([-1.0, -2.0]), torch.tensor([-3.0, 1.0, 1.0, 1.0])]
    found = training.accuracy(real, fake)
    assert found == {"disc_right_on_real": 0.75, "disc_right_on_fake": 0.5}


def test_a_plan_divides_a_validation_by_the_pictures_that_there_are(monkeypatch):
    run = make_run(plan_steps=1, max_train_steps=1)
    counted = []
    monkeypatch.setattr(run.meter, "finish", counted.append)
    for test_pictures in (3, 20):  # of which 8 are validated
        run.prepare(range(100), range(test_pictures))
        with pytest.raises(SystemExit):
            run.log(0, {})
    assert counted == [3, 8]


# ------------------------------------------------------------------------------- run folders

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
        return dict(
            trained=dict(network.named_parameters()),
            ema=dict(weight=torch.randn(2, 3)),
            network=network,
            optimizer=optimizer,
            discriminator=None,
        )

    one, other = parts(), parts()
    trained, ema = dict(other["trained"]), other["ema"]["weight"]
    training.save_state(tmp_path / "state.pt", dict(step=1, base="abc", best=0.5, **one))
    assert training.restore(tmp_path, "abc", other, "step", "best") == [1, 0.5]
    for name, p in trained.items():  # in place
        assert torch.equal(p, one["trained"][name])
    assert torch.equal(ema, one["ema"]["weight"])
    for name in ("network", "optimizer"):
        assert str(one[name].state_dict()) == str(other[name].state_dict())


def test_a_state_of_other_batches_is_refused(tmp_path):
    training.save_state(tmp_path / "state.pt", dict(step=1, base="abc", batch=8))
    assert training.restore(tmp_path, "abc", {}, "step", batch=8) == [1]
    said = "steps of 8 items and these would be of 2; .* so that their product is 8"
    with pytest.raises(ValueError, match=said):
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
    of_others = {
        "KeyError: 'step'": dict(base="abc"),
        "TypeError: .* 0.5": dict(base="abc", step=0.5),
    }
    for said, state in of_others.items():
        torch.save(state, path)
        with pytest.raises(ValueError, match=f"state.pt is not of this run .{said}.; put its own"):
            restore(tmp_path, "abc")
    torch.save(dict(base="abc", step=1, trained=dict(w=torch.zeros(3))), path)
    with pytest.raises(ValueError, match="state.pt is not of this run"):
        training.restore(tmp_path, "abc", dict(trained=dict(w=torch.zeros(2))), "step")
    path.unlink()
    with pytest.raises(ValueError, match="has no state.pt"):
        restore(tmp_path, "abc")


def test_data_that_come_with_the_code_are_no_folder_of_the_same_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = folders.data_fingerprint("digits")
    (tmp_path / "digits" / "train").mkdir(parents=True)
    (tmp_path / "digits" / "train" / "0.png").touch()
    assert folders.data_fingerprint("digits") == found
    assert folders.data_fingerprint(str(tmp_path / "digits")) != found
    folders.write_settings(tmp_path, RunConfig(dataset_folder="digits"))
    assert json.loads((tmp_path / "config.json").read_text())["dataset_folder"] == "digits"


def test_a_distance_to_one_picture_is_refused_before_the_first_step():
    cfg = RunConfig(track_val_fid=True, validation_num_images=4)
    with pytest.raises(ValueError, match="--track_val_fid with 1 test picture; expected 2 or more"):
        training.Run(cfg, "kind").prepare(range(100), range(1))
    training.Run(cfg, "kind").prepare(range(100), range(2))


def test_a_run_is_never_overwritten(tmp_path):
    cfg = RunConfig(output_dir=str(tmp_path / "run"))
    folder = training.open_run(cfg, "kind", 0)
    (folder / "config.json").write_text(json.dumps(dict(dataset_folder="pairs")))
    leftovers = ["log.jsonl", "best.safetensors", "samples/000100.png"]
    for name in leftovers:
        (folder / name).write_text("of a run that ended before its first save")
    training.open_run(cfg, "kind", 0)
    assert not any((folder / name).exists() for name in leftovers)
    (folder / "state.pt").touch()
    with pytest.raises(ValueError, match="holds a run already"):
        training.open_run(cfg, "kind", 0)


@pytest.mark.parametrize("name", ["config.json", "log.jsonl", "samples/mine.png"])
def test_files_that_no_run_wrote_are_never_replaced(tmp_path, name):
    mine = tmp_path / "own" / name
    mine.parent.mkdir(parents=True)
    mine.write_text('{"settings": "of something else"}')
    with pytest.raises(ValueError, match=f"holds {mine.name}, which no run wrote"):
        training.open_run(RunConfig(output_dir=str(tmp_path / "own")), "kind", 0)
    assert mine.read_text() == '{"settings": "of something else"}'


# --------------------------------------------------------------------------- logs and grids

def test_logged_values_are_means_over_processes(monkeypatch):
    def all_reduce(values):
        values *= 3  # the other process has twice as much

    fake = dict(
        is_initialized=lambda: True,
        get_backend=lambda: "gloo",
        get_world_size=lambda: 2,
        all_reduce=all_reduce,
    )
    for name, function in fake.items():
        monkeypatch.setattr(dist, name, function)
    assert training.mean_over_ranks({"l2": 2.0, "gan": 4.0}) == {"l2": 3.0, "gan": 6.0}



def test_the_log_forgets_steps_that_run_again_and_lines_that_are_cut_or_of_others(tmp_path):
    path = tmp_path / "log.jsonl"
    for step in range(1, 6):
        training.append_log(path, step, dict(loss=1.0 / step))
    path.write_text(path.read_text() + '7\n[]\n{}\n{"step": "2"}\n{"step": 6, "lo')
    training.open_log(tmp_path, 3)
    steps = [json.loads(line)["step"] for line in path.read_text().splitlines()]
    assert steps == [1, 2, 3]


def test_a_grid_shows_every_picture_where_it_belongs(tmp_path):
    columns = [torch.full((3, 3, 4, 4), level) for level in (-1.0, 0.0, 1.0)]
    columns[1][2] = 0.5
    training.save_grid(tmp_path / "grid.png", columns, at_least=4)
    page = np.asarray(Image.open(tmp_path / "grid.png"))
    # Two stacks of two rows, each of three columns 4 wide, with a gap of 4.
    assert page.shape == (8, 28, 3)
    assert page[0, 0, 0] == 0 and page[0, 5, 0] == 128 and page[0, 9, 0] == 255
    assert page[0, 21, 0] == round(1.5 * 127.5)


def test_the_plot_is_drawn_from_the_log(tmp_path):
    for step in range(1, 30):
        values = dict(loss=1.0 / step, val=float(step % 2))
        training.append_log(tmp_path / "log.jsonl", step, values)
    training.plot_losses(tmp_path / "log.jsonl", tmp_path / "losses.png")
    page = np.asarray(Image.open(tmp_path / "losses.png"))
    assert page.shape == (200, 1080, 3)
    assert (page == (31, 95, 168)).all(-1).sum() > 100


def test_reporters_give_each_value_its_name_and_its_step(tmp_path, monkeypatch):
    told = []

    class Writer:
        def __init__(self, folder):
            told.append(folder)

        def add_scalar(self, name, value, step):
            told.append((name, value, step))

    wandb = SimpleNamespace(
        init=lambda **flags: told.append(flags),
        log=lambda values, step: told.append((values, step)),
    )
    board = SimpleNamespace(SummaryWriter=Writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    training.open_reporter("tensorboard", tmp_path, "p")(7, {"l2": 0.5, "gan": 2.0})
    assert told == [str(tmp_path), ("l2", 0.5, 7), ("gan", 2.0, 7)]
    told.clear()
    training.open_reporter("wandb", tmp_path, "p")(7, {"l2": 0.5})
    flags = dict(project="p", dir=str(tmp_path), name=tmp_path.name)
    assert told == [flags, ({"l2": 0.5}, 7)]


def test_a_step_is_told_to_the_reporter_under_the_number_of_the_log(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(training.run, "catch_stop", lambda: None)
    monkeypatch.setattr(training.run, "open_reporter", lambda *_: lambda *step: told.append(step))
    run = make_run(output_dir=str(tmp_path))
    run.open_folder()
    run.start(SimpleNamespace(trained={}), {}, "pairs", preview_items=1)
    run.improves(3.0)
    run.log(0, {"l2": 1.0})
    run.log(1, {"l2": 0.5})
    run.bar.close()
    assert told == [(1, {"l2": 1.0, "val_score": 3.0}), (2, {"l2": 0.5})]
    log = [json.loads(line) for line in run.log_file.read_text().splitlines()]
    assert [(line["step"], line["l2"]) for line in log] == [(1, 1.0), (2, 0.5)]


# ------------------------------------------------------------------------- the command line

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


TABLES = dict(tiny=dict(learning_rate=1e-2, seed=7))
ALIASES = dict(old_name="base", older_name="base", num_epochs="epochs")


def parse(*argv):
    return training.parse(Settings, TABLES, ALIASES, "doc", list(argv))


def test_flags_fill_the_dataclass_with_its_types():
    flags = ["--learning_rate", "0.5", "--epochs", "3", "--use_ema", "--kind", "b"]
    assert parse(*flags, "--old_name", "x/y") == Settings("x/y", 0.5, 3, True, "b")
    assert parse("--use_ema", "off") == Settings()
    assert parse("--use_ema", "on") == parse("--use_ema") != Settings()


def test_tiny_bases_have_other_defaults_which_flags_override(capsys):
    assert parse("--base", "tiny") == Settings("tiny", 1e-2, seed=7)
    assert "--learning_rate 0.01" in capsys.readouterr().err
    assert parse("--base", "tiny-turbo", "--seed", "1").seed == 1


def test_a_base_by_its_path_has_the_defaults_of_its_name_or_of_what_it_is_made_of(
    monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    for name, index in {
        "copies/tiny": "{}",
        "runs/v/base": '{"rest": "/somewhere/tiny"}',
        "runs/w/base": '{"rest": "sd15"}',
        "runs/tiny-run/base": "{",
    }.items():
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "model_index.json").write_text(index)
    for path in ("tiny", "copies/tiny", "runs/v/base"):
        assert parse("--base", path).learning_rate == 1e-2
    # A name on the Hub may end like one of ours.
    for path in ("someone/tiny", "tiny-something", "runs/w/base", "runs/tiny-run/base"):
        assert parse("--base", path).learning_rate == Settings().learning_rate


@pytest.mark.parametrize(
    "argv, words",
    [
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
    ],
)
def test_wrong_flags_are_one_line_that_helps(argv, words):
    with pytest.raises(ValueError) as caught:
        parse(*argv)
    message = str(caught.value)
    assert all(word in message for word in words) and "\n" not in message


def test_help_shows_the_comment_and_the_default(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    out = capsys.readouterr().out
    assert "how fast [0.0001]" in out and "--old_name" in out


def save_settings(folder, **settings):
    (folder / "config.json").write_text(json.dumps(settings))


def test_resume_keeps_the_settings_and_lets_only_steps_change(tmp_path):
    save_settings(tmp_path, base="b", learning_rate=0.25, max_train_steps=10)
    resume = ["--resume", str(tmp_path)]
    cfg = parse(*resume, "--max_train_steps", "20", "--base", "b")
    assert (cfg.base, cfg.learning_rate, cfg.max_train_steps) == ("b", 0.25, 20)
    assert cfg.output_dir == str(tmp_path)
    with pytest.raises(ValueError, match="--learning_rate 0.5 differs from the 0.25"):
        parse(*resume, "--learning_rate", "0.5")
    cfg = parse(*resume, "--dataloader_num_workers", "3")
    assert cfg.dataloader_num_workers == 3
    with pytest.raises(ValueError, match="no config.json"):
        parse("--resume", str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="--output_dir elsewhere differs from"):
        parse(*resume, "--output_dir", "elsewhere")


def test_resume_reads_settings_under_their_older_names(tmp_path):
    save_settings(tmp_path, old_name="b", num_epochs=3, learning_rate=0.25)
    cfg = parse("--resume", str(tmp_path))
    assert (cfg.base, cfg.epochs, cfg.learning_rate) == ("b", 3, 0.25)
    with pytest.raises(ValueError, match="--base c differs from the b"):
        parse("--resume", str(tmp_path), "--older_name", "c")


def test_resume_refuses_a_setting_that_is_gone_unless_it_was_off(tmp_path):
    """Without it the run would go on as another."""
    save_settings(tmp_path, base="b", noise_offset=0.0, center_crop=False, other=None)
    assert parse("--resume", str(tmp_path)).base == "b"
    save_settings(tmp_path, base="b", noise_offset=0.5, center_crop=True)
    with pytest.raises(ValueError, match="asks for noise_offset 0.5, center_crop True") as caught:
        parse("--resume", str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text, says",
    [
        ('{"base": "b"', "Expecting"),
        ("[1]", "items"),
        ("[" * 100_000, "recursion"),
        ('{"seed": "x"}', "--seed"),
        ('{"use_ema": 3}', "--use_ema"),
        ('{"kind": "c"}', "--kind"),
        ('{"seed": -1}', "--seed -1"),
    ],
    ids=["cut", "a list", "deep", "a word", "no switch", "no choice", "negative"],
)
def test_settings_that_no_flag_would_take_are_refused_on_resuming(tmp_path, text, says):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="does not hold the settings of a run") as caught:
        parse("--resume", str(tmp_path))
    assert says in str(caught.value) and "\n" not in str(caught.value)


TRAINERS = [train_pix2pix_turbo, train_cyclegan_turbo, train_yoso]
# Older and other spellings of flags, which every trainer takes.
SPELLINGS = dict(
    pretrained_model_name_or_path="base",
    resume_from_checkpoint="resume",
    num_training_epochs="max_train_epochs",
    eval_freq="validation_steps",
    num_samples_eval="validation_num_images",
)


def test_the_same_setting_has_the_same_name_and_type_in_all_trainers():
    common = {"dataset_folder", "train_image_prep", "test_image_prep", "resolution"}
    common |= {"base", "train", "seed", "device", "dtype", "mixed_precision", "output_dir"}
    common |= {"resume", "validation_steps", "validation_num_images", "track_val_fid"}
    common |= {"max_train_steps", "max_train_epochs", "train_batch_size", "viz_freq"}
    types = {}
    for trainer in TRAINERS:
        own = {field.name: field.type for field in fields(trainer.Config)}
        assert common <= own.keys()
        assert SPELLINGS.items() <= trainer.ALIASES.items()
        assert set(trainer.ALIASES.values()) <= own.keys()
        for name in common:
            assert types.setdefault(name, own[name]) == own[name], name

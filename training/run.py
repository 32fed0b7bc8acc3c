"""The run: what the loops of the three trainers share."""

import contextlib
import math
import pathlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from training.folders import (
    data_fingerprint,
    open_run,
    restore,
    save_state,
    write_file,
    write_settings,
)
from training.logs import append_log, open_log, open_reporter
from training.meter import Meter, reading_speed
from training.plots import plot_losses
from training.processes import average_gradients, catch_stop, leave_ranks, my_rows, start_ranks
from training.report import write_report
from training.steps import check_finite, learning_rate, rng, set_learning_rate
from training.watch import next_warning, recall

# For each periodic job the setting that says after how many steps it is due.
INTERVALS = dict(
    validation="validation_steps",
    preview="viz_freq",
    save="checkpointing_steps",
)
# Losses on the progress bar, in a trainer that has them.
ON_THE_BAR = ("l2", "cycle", "idt", "gan", "kl", "con", "adapt", "disc")


class Run:
    """A training run: device, precision, the split of the batch, the folder and the log.

    Call prepare, open_folder, restore (if resuming) and start, in this order. `autocast` and
    `scaler` follow --mixed_precision; `dtype` is the type of trained weights, `half` that of
    frozen ones (None: the same). `micro_batches` holds this process's rows of the global batch,
    one list per micro-batch. `best` is the score of the best validation so far. With --plan_steps
    a `meter` takes the place of folder and log.
    """

    def __init__(self, cfg, kind: str):
        if cfg.dtype == "float64" and cfg.mixed_precision != "no":
            raise ValueError(
                f"--dtype float64 with --mixed_precision {cfg.mixed_precision}: autocast leaves"
                " float64 as it is; leave one of the two out"
            )
        self.cfg = cfg
        self.kind = kind
        self.rank, self.world, self.device = start_ranks(cfg.device)
        self.dtype = getattr(torch, cfg.dtype)
        self.half = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[cfg.mixed_precision]
        self.autocast = torch.autocast(
            self.device.type, self.half or torch.bfloat16, enabled=self.half is not None
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.half == torch.float16)
        self.first_step = 0
        self.noise_step, self.noise = -1, {}  # of one step, for the whole global batch
        self.best = math.inf
        self.score: float | None = None  # of this step's validation
        self.folder: pathlib.Path | None = None
        self.meter = Meter(self.device, cfg.plan_steps) if cfg.plan_steps else None
        torch.manual_seed(cfg.seed)

    def prepare(self, items: Sequence, test_items: Sequence = ()) -> None:
        """Sets the global batch, this process's rows of it and the last step, for a data set."""
        cfg = self.cfg
        self.items, self.test_items = items, test_items
        compared = min(cfg.validation_num_images, len(test_items))
        if cfg.track_val_fid and compared < 2:
            raise ValueError(
                f"--track_val_fid with {compared} test picture; expected 2 or more: add test"
                " pictures, raise --validation_num_images, or leave the flag out"
            )
        slices = cfg.gradient_accumulation_steps
        self.global_batch = self.world * cfg.train_batch_size * slices
        self.micro_batches = my_rows(self.rank, self.world, cfg.train_batch_size, slices)
        self.rows = [row for rows in self.micro_batches for row in rows]
        self.last_step = cfg.max_train_steps
        if cfg.max_train_epochs:
            steps = math.ceil(cfg.max_train_epochs * len(items) / self.global_batch)
            self.last_step = min(steps, self.last_step)
            self.say(what_ends(cfg, steps))

    def say(self, line: str) -> None:
        """Prints a line on stderr, once for all processes, above a progress bar."""
        if self.rank == 0:
            tqdm.write(line, file=sys.stderr)

    @contextlib.contextmanager
    def first_process_first(self) -> Iterator[None]:
        """The first process goes ahead; the others find what it downloaded."""
        if self.rank:
            dist.barrier()
        yield
        if not self.rank and dist.is_initialized():
            dist.barrier()

    def next_batch(self, batches: Iterator, save: Callable[[int], None], step: int) -> dict:
        """The step's batch. If it cannot be read, the steps before it are saved first.

        Of several processes only the first saves, as the others do not know the best validation. So
        nothing is saved if one of the others cannot read its part.
        """
        try:
            return next(batches)
        except Exception:
            if self.rank == 0 and step > self.first_step:
                save(step - 1)
                self.say(f"saved the {step} steps before that; --resume {self.folder} goes on")
            raise

    def split(self, batch: dict) -> Iterator[tuple[list[int], dict]]:
        """For each micro-batch its rows of the global batch, and its part of `batch`."""
        for i, rows in enumerate(self.micro_batches):
            mine = slice(i * len(rows), (i + 1) * len(rows))
            micro_batch = {name: values[mine] for name, values in batch.items()}
            yield rows, self.to_device(micro_batch)

    def to_device(self, batch: dict) -> dict:
        """The batch with its tensors on the device, in the type of trained weights."""
        moved = dict(batch)
        for name, values in batch.items():
            if isinstance(values, Tensor):
                moved[name] = values.to(self.device, self.dtype)
        return moved

    def normal(self, step: int, what: str, rows: list[int], shape: Iterable[int]) -> Tensor:
        """Standard normal noise [len(rows), *shape] for these rows of the global batch.

        It is drawn once a step, whatever the number of micro-batches.
        """
        if step != self.noise_step:
            self.noise_step, self.noise = step, {}
        key = (what, *shape)
        if key not in self.noise:
            generator = rng(self.cfg.seed, step, what)
            self.noise[key] = torch.randn(self.global_batch, *shape, generator=generator)
        return self.noise[key][rows].to(self.device, self.dtype)

    def set_learning_rate(
        self, step: int, *optimizers: torch.optim.Optimizer | None, scale: float = 1.0
    ) -> None:
        """Sets the step's learning rate, times `scale`."""
        rate = scale * learning_rate(step, self.cfg, self.last_step)
        for optimizer in optimizers:
            set_learning_rate(optimizer, rate)

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of one micro-batch's loss."""
        self.scaler.scale(loss / len(self.micro_batches)).backward()

    def update(self, optimizer: torch.optim.Optimizer, max_norm: float = math.inf) -> float:
        """Averages gradients over processes, clips their norm, steps and clears them.

        Returns the norm before clipping. With a norm that is not finite no step is
        taken: under fp16 the scaler tries a smaller scale, else `check_finite` ends the run.
        """
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        average_gradients(parameters)
        self.scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(parameters, max_norm).item()
        if self.scaler.is_enabled() or math.isfinite(norm):
            self.scaler.step(optimizer)
        optimizer.zero_grad(set_to_none=True)
        return norm

    def due(self, job: str, step: int, also: bool = False) -> bool:
        """Whether rank 0 does a job of `INTERVALS` now: periodically, after the last step, or if
        `also`."""
        if self.meter:
            return self.meter.due(job, step)
        done = step + 1
        every = getattr(self.cfg, INTERVALS[job])
        return self.rank == 0 and (done % every == 0 or done == self.last_step or also)

    def check_finite(self, losses: dict[str, float], step: int, batch: dict) -> None:
        """ValueError where a loss or gradient norm is not finite. The last saved state is kept.

        Under fp16 gradient norms may overflow: the scaler then skips the step by itself.
        """
        checked = dict(losses)
        if self.scaler.is_enabled():
            checked.pop("grad_norm", None)
            checked.pop("disc_grad_norm", None)
        names = [name for key in ("name", "name_a", "name_b") for name in batch.get(key, [])]
        check_finite(checked, step, names)

    def record(self, losses: dict[str, float], values: dict[str, Tensor | float]) -> None:
        """Adds one micro-batch's values to the means over the step's micro-batches."""
        for name, value in values.items():
            if isinstance(value, Tensor):
                value = value.item()
            losses[name] = losses.get(name, 0.0) + value / len(self.micro_batches)

    # ------------------------------------------------------------ the folder and the state

    def open_folder(self) -> None:
        """Makes the run's folder with its config.json."""
        if self.meter:
            return
        self.data = data_fingerprint(self.cfg.dataset_folder)
        self.data_names = data_fingerprint(self.cfg.dataset_folder, with_pictures=False)
        self.folder = open_run(self.cfg, self.kind, self.rank)

    def restore(self, frozen_fingerprint: str, parts: dict, *names: str) -> list:
        """Puts the saved state back into `parts`; returns the saved values of `names`.

        `frozen_fingerprint` is that of all weights that are not trained. Settings that have changed
        are written once all is found to fit.
        """
        step, best, *values = restore(
            self.folder,
            frozen_fingerprint,
            parts,
            "step",
            "best",
            *names,
            batch=self.global_batch,
            data=self.data,
            data_names=self.data_names,
        )
        self.first_step = step
        self.best = best
        if self.rank == 0:
            write_settings(self.folder, self.cfg)
        if self.first_step >= self.last_step:
            self.say(
                f"{self.folder} is at step {step} already and ends at step {self.last_step}:"
                " nothing is left to train without a larger --max_train_steps or"
                " --max_train_epochs"
            )
        return values

    def save_state(self, step: int, frozen_fingerprint: str, parts: dict, **values) -> None:
        """Writes state.pt, from which `restore` goes on to the same bits, and plots the log.

        Save the weights first: a resumed run assumes that they were written.
        """
        if self.meter:
            return
        state = dict(step=step + 1, best=self.best, base=frozen_fingerprint)
        state |= dict(batch=self.global_batch, data=self.data, data_names=self.data_names)
        save_state(self.folder / "state.pt", state | values | parts)
        log = self.folder / "log.jsonl"
        if log.is_file():  # there is none if the first step's validation failed
            plot_losses(log, self.folder / "losses.png")

    def write(self, name: str, write: Callable[[pathlib.Path], object]) -> None:
        """Writes a file of the run's folder, completely or not at all."""
        if not self.meter:
            write_file(self.folder / name, write)

    def improves(self, score: float) -> bool:
        """Whether this validation is the best so far (lower is better). Remembers it."""
        if self.meter:
            return False
        if math.isfinite(score):
            self.score = score
        if not score < self.best:  # NaN is not better either
            return False
        self.best = score
        return True

    # ------------------------------------------------------------ logs

    def start(self, nets, state: dict, items_name: str, preview_items: int) -> None:
        """Says what is about to be trained, opens the log and the progress bar, and makes Ctrl-C a
        request to stop. `state` is what will be saved; `items_name` says what items are: "pairs".
        A preview has `preview_items` of them.
        """
        self.stop_requested = catch_stop()
        if self.meter:
            self.start_meter(nets, state, preview_items)
            return
        if self.rank != 0:
            return
        millions = sum(p.numel() for p in nets.trained.values()) / 1e6
        count = len(self.items)
        what = f"{millions:.2f} M weights on {count} {items_name}"
        print(f"training {what}, {self.device}; {self.folder}", file=sys.stderr)
        self.items_name = items_name
        self.log_file = open_log(self.folder, self.first_step)
        self.history = recall(self.log_file, count, self.last_step)
        self.report = open_reporter(self.cfg.report_to, self.folder, self.cfg.tracker_project_name)
        self.bar = tqdm(total=self.last_step, initial=self.first_step, unit="step")
        self.started = time.monotonic()

    def start_meter(self, nets, state: dict, preview_items: int) -> None:
        """Says what is known before the first step, and makes the last one that of --plan_steps."""
        self.meter.start(
            nets,
            state,
            loading=reading_speed(self.items, self.cfg.seed),
            last_step=self.last_step,
            global_batch=self.global_batch,
            test_items=len(self.test_items),
            preview_items=preview_items,
        )
        self.last_step = self.cfg.plan_steps

    def log(self, step: int, losses: dict[str, float]) -> None:
        """Writes a step's values to log.jsonl and --report_to, and the losses to the bar.

        A validation's score, lower is better, is logged as val_score. With --plan_steps nothing is
        written, and the process ends after the last of them.
        """
        if self.meter and step + 1 == self.last_step:
            self.meter.finish(min(self.cfg.validation_num_images, len(self.test_items)))
            leave_ranks()
            sys.exit(0)
        if self.meter or self.rank != 0:
            return
        done = step + 1
        if self.score is not None:
            losses = losses | {"val_score": self.score}
            self.score = None
        append_log(self.log_file, done, losses | self.warning(done, losses))
        self.report(done, losses)
        items = (done - self.first_step) * self.global_batch
        shown = {name: f"{losses[name]:.3g}" for name in ON_THE_BAR if name in losses}
        shown["items/s"] = f"{items / (time.monotonic() - self.started):.1f}"
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update()

    def warning(self, done: int, losses: dict[str, float]) -> dict[str, str]:
        """The first new warning after this step, for the log, and on stderr; empty without one."""
        self.history.add(done, losses)
        text = next_warning(self.history)
        if text is None:
            return {}
        self.history.note(done, text)
        self.say(f"warning: {text}")
        return {"warning": text}

    def stopped(self, step: int) -> KeyboardInterrupt:
        """The exception that ends a run after a request to stop, once everything is saved."""
        if self.rank == 0 and not self.meter:
            write_report(self, f"stopped after step {step + 1} of {self.last_step}")
        leave_ranks()
        return KeyboardInterrupt(
            f"stopped after step {step + 1}, saved; go on with --resume {self.folder}"
        )

    def finish(self) -> None:
        """Writes report.md and prints the path of the trained weights."""
        if self.rank == 0:
            write_report(self, f"finished {max(self.first_step, self.last_step)} steps")
            print(self.folder / "model.safetensors")
        leave_ranks()


def what_ends(cfg, steps: int) -> str:
    """Which of two limits ends a run. `steps` are those of --max_train_epochs."""
    if steps < cfg.max_train_steps:
        return (
            f"--max_train_epochs {cfg.max_train_epochs} ends the run at step {steps}, before"
            f" --max_train_steps {cfg.max_train_steps}"
        )
    return (
        f"--max_train_steps {cfg.max_train_steps} ends the run, and --max_train_epochs"
        f" {cfg.max_train_epochs} would at step {steps}"
    )

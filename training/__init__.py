"""What the three trainers share, without mathematics of a method and without any network.

    flags.py        a settings dataclass is the command line
    exits.py        errors of one line, exit status
    processes.py    devices, ranks, rows of a batch, requests to stop
    steps.py        random numbers, learning rate, swapping in the EMA, checks
    run.py          the run: what the loops share
    plan.py         --plan: memory and time, tried in processes of their own
    meter.py        what such a process measures
    folders.py      run folders, state files, files written whole
    logs.py         log.jsonl, TensorBoard, W&B
    plots.py        grids of pictures, curves of a log
    watch.py        signals of a preview, warnings in plain words
    report.py       report.md at the end of a run

Losses, networks, optimizers and the order of steps are in the trainers.
"""

from training.exits import (
    explain,
    fail,
    first_line,
    load_or_explain,
    out_of_memory,
    run_script,
    say_once,
)
from training.flags import (
    Precision,
    Scheduler,
    build_parser,
    check_losses,
    field_comments,
    given_values,
    kind_of,
    parse,
    parse_args,
)
from training.folders import open_run, restore, save_state, write_file
from training.logs import append_log, open_log, open_reporter
from training.plan import print_plan
from training.plots import plot_losses, save_grid
from training.processes import (
    average_gradients,
    catch_stop,
    mean_over_ranks,
    my_rows,
    pick_device,
    start_ranks,
)
from training.run import Run
from training.steps import (
    accuracy,
    check_finite,
    draw_noise,
    learning_rate,
    rng,
    saved_on_failure,
    set_learning_rate,
    set_trainable,
    swap,
    swapped,
)
from training.watch import preview_signals

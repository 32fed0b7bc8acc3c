"""What a benchmark leaves behind: a Markdown table and, for growth, a plot."""

import math
import os
import pathlib
import platform
import re
from functools import partial
from importlib import metadata

import torch
from PIL import Image, ImageDraw

import training

LIBRARIES = ("torch", "diffusers", "transformers", "peft")
HEAD = (
    "| | | seconds | / ours (smallest to largest) | TFLOP | of the peak | memory, GB |"
    " difference: largest (mean) |"
)


def machine(device: str) -> str:
    """Processors, threads and versions, in words."""
    info = pathlib.Path("/proc/cpuinfo").read_text()
    cpu = re.search(r"model name\s*: (.*)", info)
    processors = [cpu[1] if cpu else platform.machine()]
    if device == "cuda":
        processors.insert(0, torch.cuda.get_device_name())
    versions = [f"{name} {metadata.version(name)}" for name in LIBRARIES]
    cores = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    return f"{', '.join(processors)}, {cores}; {', '.join(versions)}"


def task_name(task: str | tuple[int, int]) -> str:
    if isinstance(task, str):
        return task
    size, batch = task
    return f"{size} px, batch {batch}"


def table_row(row: dict) -> str:
    """One row of measurements in Markdown. What was not measured is left empty."""
    def number(key: str, form: str) -> str:
        return f"{row[key]:{form}}" if key in row else ""

    ratio = ""
    if "ratio" in row:
        median, low, high = row["ratio"]
        ratio = f"{median:.2f} ({low:.2f} to {high:.2f})"
    difference = ""
    if "difference" in row:
        largest, mean = row["difference"]
        difference = f"{largest:.1g} ({mean:.1g})"
    cells = [
        task_name(row["task"]),
        row["side"],
        number("seconds", ".3g"),
        ratio,
        number("tflop", ".3g"),
        number("of_peak", ".0%"),
        number("peak_gb", ".3g"),
        difference,
    ]
    return f"| {' | '.join(cells)} |"


def write_table(path: pathlib.Path, title: str, rows: list[dict], note: str) -> None:
    """Appends a section with the table to a file."""
    rule = "| --- |" + " --- |" * 7
    lines = ["", f"## {title}", "", note, "", HEAD, rule, *(table_row(row) for row in rows)]
    with path.open("a") as file:
        file.write("\n".join(lines) + "\n")


# -------------------- the plot of growth

WIDTH, HEIGHT = 400, 220  # of one of its four diagrams
MARGIN = 60
BLUE, GREY, LIGHT_GREY = "#1f5fa8", "#666666", "#bbbbbb"


def plot(
    path: pathlib.Path,
    rows: list[dict],
    sizes: list[int],
    batches: list[int],
    size: int,
) -> None:
    """Seconds and memory against size (at batch 1) and against batch (at `size`), log-log."""
    page = Image.new("RGB", (2 * (WIDTH + 2 * MARGIN), 2 * (HEIGHT + 2 * MARGIN)), "white")
    pen = ImageDraw.Draw(page)
    by_size = {row["task"]: row for row in rows}
    columns = [
        ("pixels a side, batch 1", [(n, (n, 1)) for n in sorted(sizes)]),
        (f"batch, {size} px", [(n, (size, n)) for n in sorted(batches)]),
    ]
    quantities = [("seconds", "seconds"), ("peak_gb", "memory, GB")]
    for across, (label, tasks) in enumerate(columns):
        for down, (key, title) in enumerate(quantities):
            corner = (
                MARGIN + across * (WIDTH + 2 * MARGIN),
                MARGIN + down * (HEIGHT + 2 * MARGIN),
            )
            points = [(x, by_size[task][key]) for x, task in tasks]
            diagram(pen, corner, f"{title} against {label}", points)
    path.parent.mkdir(parents=True, exist_ok=True)
    training.write_file(path, partial(page.save, format="PNG"))


def diagram(
    pen: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    title: str,
    points: list[tuple[float, float]],
) -> None:
    left, top = corner
    xs = [x for x, _ in points]
    ys = [y for _, y in points]
    frame = [left - 18, top - 18, left + WIDTH + 18, top + HEIGHT + 18]
    pen.rectangle(frame, outline=LIGHT_GREY)
    pen.text((left, top - 34), title, fill="black")

    places = []
    for x, y in points:
        place = (left + WIDTH * position(x, xs), top + HEIGHT * (1 - position(y, ys)))
        places.append(place)
    pen.line(places, fill=BLUE, width=2)
    for (i, j), (x, y) in zip(places, points):
        pen.ellipse([i - 3, j - 3, i + 3, j + 3], fill=BLUE)
        pen.text((i - 12, j + 5), f"{y:.3g}", fill=BLUE)
        pen.text((i - 8, top + HEIGHT + 22), str(x), fill=GREY)


def position(value: float, values: list[float]) -> float:
    """On a logarithmic axis: 0 at the smallest of the values, 1 at the largest."""
    low, high = math.log(min(values)), math.log(max(values))
    if low == high:
        return 0.0
    return (math.log(value) - low) / (high - low)

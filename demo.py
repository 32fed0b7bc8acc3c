"""A page to draw on, to translate pictures and to describe them, each in one step.

    pip install -e ".[demo]" && python demo.py        # the embedded base, offline
    python demo.py --base sd-turbo --checkpoint sketch_to_image_stochastic

Networks stay loaded, with their LoRA merged. While one request is worked on, only the newest other
one waits. sample.py makes the same pictures.
"""

import base64
import html
import io
import os
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

from PIL import Image, ImageOps
from torch import Tensor

import sample
import training
from dataset.pictures import open_picture, sketch, to_picture, to_tensor
from files import bases, checkpoints, hub
from sampling.pictures import explain_failure
from tiny import page as drawn

# All files that gradio writes, removed at exit. It looks for the folder when it is imported.
FOLDER = tempfile.TemporaryDirectory(prefix="demo-")
os.environ |= dict(GRADIO_TEMP_DIR=FOLDER.name, GRADIO_ANALYTICS_ENABLED="False")
try:
    import gradio as gr
except ImportError:
    gr = None

ASSETS = hub.ROOT / "assets"
MAX_BYTES = 32 * 2**20  # of a file that is dropped on the page
MAX_SEED = 2**32 - 1  # the page's numbers are floats, which do not hold all of sample.py's seeds
# What the adapters of the embedded base translate.
TASKS = {
    "day to night": sample.Options(checkpoint="day2night", direction="a2b"),
    "night to day": sample.Options(checkpoint="day2night", direction="b2a"),
    "clear to rain": sample.Options(checkpoint="clear2rain", direction="a2b"),
    "rain to clear": sample.Options(checkpoint="clear2rain", direction="b2a"),
}


@dataclass(frozen=True)
class Config:
    base: str | None = None  # folder, one-file model, Hub id or name [tiny-turbo; the checkpoint's]
    checkpoint: str | None = None  # any that sample.py takes [the adapters of tiny-turbo]
    size: str | None = None  # of pictures, N or WIDTHxHEIGHT [the base's]
    host: str = "127.0.0.1"  # address to listen on
    port: int | None = None  # port to listen on [the first free one from 7860]


def as_url(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def read_upload(path: str, size: tuple[int, int]) -> Image.Image:
    """The middle of a picture file, scaled to `size` (width, height)."""
    picture = open_picture(path, f"the picture {Path(path).name}")
    return ImageOps.fit(picture, size, Image.Resampling.LANCZOS)


def connect(tab, make: Callable[..., list[Tensor]], inputs: list, output) -> None:
    """Shows the pictures of `make`, [3, H, W] in [-1, 1], anew whenever an input changes."""

    def answer(*values) -> str:
        start = time.perf_counter()
        try:
            pictures = [to_picture(x) for x in make(*values)]
        except Exception as error:
            line = explain_failure(Path("picture"), error)
            return f"<p>{html.escape(line)}</p>"
        took = time.perf_counter() - start
        shown = "".join(f'<img src="{as_url(picture)}">' for picture in pictures)
        return f'<div class="pictures">{shown}</div><p>{1000 * took:.0f} ms</p>'

    # gradio's queue would add tens of milliseconds; one thread keeps requests in order without it.
    newest = dict(trigger_mode="always_last", queue=False, show_progress="hidden")
    changes = [one.change for one in inputs]
    gr.on([tab.select, *changes], answer, inputs, output, **newest, api_visibility="private")


def draw_tab(first: sample.Options, load: Callable) -> None:
    """Outlines to a scene."""
    model, _, size = load(first)
    stochastic = model.r is not None
    official = checkpoints.checkpoint_kind(first.checkpoint) is None
    zoom = max(1, 512 // max(size))  # of the pad

    def draw(drawing: str, caption: str, r: float, seed: int | None) -> list[Tensor]:
        merged, encode, _ = load(replace(first, r=r if stochastic else None))
        _, _, data = drawing.partition(",")
        lines = open_picture(io.BytesIO(base64.b64decode(data)), "the picture on the pad")
        lines = lines.resize(size, Image.Resampling.BOX)
        white = sketch(lines) if official else ImageOps.invert(lines)
        return sample.translate_pictures(merged, [white], encode(caption), seed or 0)

    lines, words = drawn.drawing((zoom * size[0], zoom * size[1]))
    # gradio's own sketch pad takes many times as long to send a stroke.
    script = dict(html_template="", js_on_load=(ASSETS / "demo.js").read_text())
    pen = dict(width=lines.width, height=lines.height, line=max(4, 2 * zoom / 3))
    with gr.Tab("Draw") as tab:
        with gr.Row():
            pad = gr.HTML(as_url(lines), **script, **pen, elem_id="pad")
            output = gr.HTML(elem_id="drawn")
        caption = gr.Textbox(words, label="Caption")
        with gr.Row(visible=stochastic):
            r = gr.Slider(0, 1, 0.7, step=0.05, label="r, noise to drawing")
            seed = gr.Number(42, precision=0, minimum=0, maximum=MAX_SEED, label="Seed")
            again = gr.Button("Again", size="sm", min_width=100, scale=0)
    again.click(lambda seed: (seed or 0) + 1, seed, seed, queue=False)
    connect(tab, draw, [pad, caption, r, seed], output)


def translate_tab(tasks: dict[str, sample.Options], load: Callable) -> None:
    """Pictures of one kind to another. Without a file, the drawn world has examples."""

    def translate(path, example: int, task: str, strength: float, skip_scale: float):
        options = replace(tasks[task], strength=strength)
        # Without its direction, so that both directions share the model in memory.
        model, encode, size = load(replace(options, direction=None))
        direction = options.direction
        if path is None:
            picture = drawn.example(options.checkpoint, direction, example, size)
        else:
            picture = read_upload(path, size)
        context = encode(sample.choose_caption(options, model, direction))
        made = sample.translate_pictures(model, [picture], context, 0, skip_scale, direction)
        return [to_tensor(picture) * 2 - 1, made[0]]

    with gr.Tab("Translate") as tab:
        output = gr.HTML(elem_id="translated")
        task = gr.Radio(list(tasks), value=next(iter(tasks)), show_label=False)
        with gr.Row():
            strength = gr.Slider(0, 1.5, 1, step=0.1, label="Strength")
            skip_scale = gr.Slider(0, 1.5, 1, step=0.1, label="Skip scale")
        with gr.Row():
            example = gr.Slider(0, 99, 8, step=1, label="Example")
            path = gr.File(label="Your picture", height=120)
    connect(tab, translate, [path, example, task, strength, skip_scale], output)


def text_tab(options: sample.Options) -> None:
    """A caption to pictures of four seeds, or to changes of a picture."""
    loaded = sample.prepare_base(options, training.pick_device("auto"))
    trained = sample.trained_size(loaded) if loaded.prior else None
    size = sample.parse_size(options.size or trained, loaded.base)
    prior = sample.choose_prior(options, loaded, size)
    encode = lru_cache(partial(sample.encode_prompt, loaded.base, negative="", guidance=1.0))

    def draw(caption: str, first: int | None, path: str | None, strength: float) -> list[Tensor]:
        seeds = [(first or 0) + i for i in range(4)]
        given: dict = dict(sampler=loaded.sampler, prior=prior, contexts=encode(caption))
        if path is not None:
            pictures = to_tensor(read_upload(path, size)).expand(4, -1, -1, -1)
            given |= dict(pictures=pictures, strength=strength)
        return sample.text_to_image(loaded.base, caption, seeds, size, **given)

    with gr.Tab("Text") as tab:
        caption = gr.Textbox("a red house by a lake at dusk in clear weather", label="Caption")
        output = gr.HTML(elem_id="written")
        seed = gr.Number(42, precision=0, minimum=0, maximum=MAX_SEED, label="Seed")
        with gr.Accordion("Edit a picture", open=False):
            path = gr.File(label="Your picture", height=120)
            strength = gr.Slider(0.1, 1, 0.6, step=0.1, label="Strength")
    connect(tab, draw, [caption, seed, path, strength], output)


def build(cfg: Config):
    """The page, with a tab for each thing that the checkpoint or the base can do."""
    embedded = cfg.checkpoint is None and cfg.base in (None, "tiny-turbo")

    @lru_cache(maxsize=32 if embedded else 1)  # an r or a strength each
    def load(options: sample.Options):
        model, _ = sample.load_translator(options, training.pick_device("auto"))
        base = bases.Base(model.base, vae=model.generator.vae, unet=model.generator.unet)
        encode = lru_cache(partial(sample.encode_caption, model))
        return model, encode, sample.parse_size(cfg.size, base)

    given = sample.Options(base=cfg.base, checkpoint=cfg.checkpoint, size=cfg.size)
    with gr.Blocks(title="One-step diffusion", analytics_enabled=False) as page:
        gr.Markdown("# One-step diffusion\nEach picture is one step of a network on this machine.")
        if embedded:
            draw_tab(replace(given, checkpoint="edges2scene"), load)
            translate_tab(TASKS, load)
        elif cfg.checkpoint and checkpoints.checkpoint_kind(cfg.checkpoint) != "yoso":
            model, _, _ = load(given)
            if model.kind == "pix2pix_turbo":
                draw_tab(given, load)
            else:
                own, _ = sample.released_facts(cfg.checkpoint)
                if not own and not model.prompts:
                    raise ValueError(
                        f"{cfg.checkpoint} names no captions, which the page needs; use sample.py"
                    )
                tasks = {own: replace(given, direction=own)}
                if not own:
                    a, b = model.prompts
                    tasks = {
                        f"to: {b}": replace(given, direction="a2b"),
                        f"to: {a}": replace(given, direction="b2a"),
                    }
                translate_tab(tasks, load)
            given = replace(given, base=model.base, checkpoint=None)
        text_tab(given)
    return page


@contextmanager
def serve(cfg: Config) -> Iterator[str]:
    """Serves the page at the address that it gives."""
    where = dict(server_name=cfg.host, server_port=cfg.port, max_file_size=MAX_BYTES)
    theme = gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    look = dict(theme=theme, css_paths=ASSETS / "demo.css", footer_links=[], quiet=True)
    alone = dict(share=False, run_history=False, ssr_mode=False, max_threads=1)
    page = build(cfg)
    try:
        _, url, _ = page.launch(**where, **look, **alone, prevent_thread_lock=True)
        yield url
    finally:
        page.close(verbose=False)


def main() -> None:
    cfg = training.parse(Config, {}, {}, __doc__)
    if gr is None:
        raise ValueError('the page needs gradio: pip install -e ".[demo]"')
    try:  # gradio itself would try a hundred ports for minutes
        socket.create_server((cfg.host, cfg.port or 0)).close()
    except (OSError, OverflowError) as error:
        raise ValueError(f"{error}; expected another --host or --port") from None
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with serve(cfg) as url:
        print(url, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    training.run_script(main)

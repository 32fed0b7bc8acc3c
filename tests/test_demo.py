"""demo.py in a real browser: what is drawn, typed and dropped on the page becomes the picture that
sample.py makes of it, only the newest request is worked on, and nothing leaves the machine.

`python -m tests.test_demo` writes assets/demo.png, and measures how long a picture takes on the
page and without it.
"""

import base64
import io
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageChops, ImageOps

import demo
import sample
from dataset.pictures import open_picture
from files import bases, checkpoints
from files.hub import ROOT
from models.pix2pix_turbo import Pix2PixTurbo, Pix2PixTurboConfig
from tiny import page as drawn
from tiny.scenes import COLOURS, KINDS

try:
    from playwright.sync_api import Browser, Page, sync_playwright
except ImportError:
    sync_playwright = None

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), None)
MEBIBYTE = 2**20
TABS = {"Draw": "#drawn", "Translate": "#translated", "Text": "#written"}


def why_not() -> str:
    """What a test with a browser misses here; empty if nothing."""
    if demo.gr is None or sync_playwright is None:
        return 'gradio or playwright is missing: pip install -e ".[browser]"'
    if CHROMIUM is None:
        return "there is no chromium: apt-get install chromium"
    return ""


def browser_test(test: Callable) -> Callable:
    skipped = pytest.mark.skipif(bool(why_not()), reason=why_not())
    return pytest.mark.browser(skipped(test))


needs_gradio = pytest.mark.skipif(
    demo.gr is None, reason='gradio is missing: pip install -e ".[demo]"'
)


# -------------------- the page and its visitor

@pytest.fixture(scope="module")
def reached() -> Iterator[list[str]]:
    """The hosts that this process connects to."""
    hosts = []
    connect = socket.socket.connect

    def recorded(self: socket.socket, address) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6):
            hosts.append(address[0])
        connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", recorded)
        yield hosts


@pytest.fixture(scope="module")
def url(reached: list[str]) -> Iterator[str]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "MAX_BYTES", MEBIBYTE)
        with demo.serve(demo.Config()) as url:
            yield url
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


@pytest.fixture
def page(browser: "Browser", url: str) -> Iterator["Page"]:
    """The page with its first picture. In the end, nothing was asked of another machine."""
    page = browser.new_page(viewport=dict(width=1280, height=900))
    requests = []
    page.on("request", lambda request: requests.append(request.url))
    page.goto(url)
    page.wait_for_selector("#drawn img")
    yield page
    page.close()
    assert len(requests) > 10
    assert [request for request in requests if not request.startswith(url)] == []


def open_tab(page: "Page", name: str) -> None:
    page.get_by_role("tab", name=name).click()
    page.wait_for_selector(f"{TABS[name]} img")


def pictures(page: "Page", output: str) -> list[Image.Image]:
    sources = page.locator(f"{output} img").evaluate_all("all => all.map(one => one.src)")
    return [decode(source) for source in sources]


def decode(url: str) -> Image.Image:
    data = url.removeprefix("data:image/png;base64,")
    return open_picture(io.BytesIO(base64.b64decode(data)), "a picture on the page")


def wait_until_shown(page: "Page", output: str, expected: list[Image.Image]) -> None:
    """Fails if these pictures, to the last bit, are not on the page within half a minute."""
    urls = [demo.as_url(picture) for picture in expected]
    page.wait_for_function(
        """([output, urls]) => {
            const shown = [...document.querySelectorAll(output + " img")].map(one => one.src);
            return JSON.stringify(shown) == JSON.stringify(urls);
        }""",
        arg=[output, urls],
    )


def wait_for_another(page: "Page", output: str, before: list[Image.Image]) -> None:
    page.wait_for_function(
        "([output, before]) => document.querySelector(output + ' img').src != before",
        arg=[output, demo.as_url(before[0])],
    )


def stroke(page: "Page", *points: tuple[float, float]) -> None:
    """A line on the pad through points in [0, 1], drawn with the mouse."""
    box = page.locator("#pad canvas").bounding_box()
    places = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in points]
    page.mouse.move(*places[0])
    page.mouse.down()
    for place in places[1:]:
        page.mouse.move(*place, steps=4)
    page.mouse.up()


def outlines(page: "Page", path: Path) -> Path:
    """What is on the pad, white on black and as large as the network's picture, in a file."""
    url = page.locator("#pad canvas").evaluate("canvas => canvas.toDataURL()")
    lines = decode(url).resize((64, 64), Image.Resampling.BOX)
    ImageOps.invert(lines).save(path)
    return path


def png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def drop(page: "Page", name: str, data: bytes) -> None:
    """Drops a file on the visible field for files."""
    transfer = page.evaluate_handle(
        """([name, data]) => {
            const bytes = Uint8Array.from(atob(data), one => one.charCodeAt(0));
            const transfer = new DataTransfer();
            transfer.items.add(new File([bytes], name));
            return transfer;
        }""",
        [name, base64.b64encode(data).decode()],
    )
    field = page.get_by_text("Drop File Here").locator("visible=true")
    field.dispatch_event("drop", dict(dataTransfer=transfer))


@pytest.fixture
def sampled(tmp_path: Path, monkeypatch) -> Callable[..., list[Image.Image]]:
    """What sample.py makes of a command line, in this process."""

    def run(*arguments: object) -> list[Image.Image]:
        output = tmp_path / "sampled"
        shutil.rmtree(output, ignore_errors=True)
        command = ["sample.py", *map(str, arguments), "--output", str(output)]
        monkeypatch.setattr(sys, "argv", command)
        sample.main()
        return [open_picture(path) for path in sorted(output.iterdir())]

    return run


# -------------------- what the page shows

@browser_test
def test_strokes_become_the_picture_that_sample_py_makes_of_them(page, sampled, tmp_path):
    before = pictures(page, "#drawn")
    caption = page.get_by_label("Caption").locator("visible=true")
    words = caption.input_value()
    stroke(page, (0.1, 0.2), (0.3, 0.1), (0.4, 0.3))
    stroke(page, (0.6, 0.8), (0.9, 0.7))
    lines = outlines(page, tmp_path / "outlines.png")
    flags = ["--checkpoint", "edges2scene", "--input", lines, "--r", 0.7, "--seed", 42]
    expected = sampled(words, *flags)
    assert expected != before
    wait_until_shown(page, "#drawn", expected)

    caption.fill("a yellow house on sand at night in clear weather")
    other = sampled("a yellow house on sand at night in clear weather", *flags)
    assert other != expected
    wait_until_shown(page, "#drawn", other)


@browser_test
def test_the_drawing_outlives_a_change_of_tabs_and_goes_by_eraser_and_clear(page, tmp_path):
    def white() -> int:
        with Image.open(outlines(page, tmp_path / "outlines.png")) as picture:
            return sum(picture.convert("L").histogram()[1:])

    stroke(page, (0.1, 0.1), (0.9, 0.2))
    first = white()
    open_tab(page, "Text")
    open_tab(page, "Draw")
    assert white() == first

    before = pictures(page, "#drawn")
    page.get_by_label("Eraser").check()
    stroke(page, (0.0, 0.5), (1.0, 0.5))
    assert 0 < white() < first
    wait_for_another(page, "#drawn", before)
    page.get_by_role("button", name="Clear").click()
    assert white() == 0


@browser_test
def test_again_and_r_while_it_moves_change_the_picture(page):
    before = pictures(page, "#drawn")
    page.get_by_role("button", name="Again").click()
    wait_for_another(page, "#drawn", before)

    before = pictures(page, "#drawn")
    box = page.locator("input[type=range]").locator("visible=true").bounding_box()
    middle = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + 0.7 * box["width"], middle)
    page.mouse.down()
    page.mouse.move(box["x"] + 0.3 * box["width"], middle)
    wait_for_another(page, "#drawn", before)  # the button of the mouse is still down
    page.mouse.up()


@browser_test
def test_examples_are_translated_as_sample_py_does(page, sampled, tmp_path):
    open_tab(page, "Translate")
    for task, options in demo.TASKS.items():
        example = drawn.example(options.checkpoint, options.direction, 8, (64, 64))
        example.save(tmp_path / "example.png")
        flags = ["--checkpoint", options.checkpoint, "--direction", options.direction]
        expected = sampled("--input", tmp_path / "example.png", *flags)
        page.get_by_label(task).check()
        wait_until_shown(page, "#translated", [example, *expected])


@browser_test
def test_a_picture_that_is_dropped_is_translated_with_strength_and_skip_scale(
    page, sampled, tmp_path
):
    scene = drawn.example("day2night", "a2b", 3, (200, 200))
    small = scene.resize((64, 64), Image.Resampling.LANCZOS)
    small.save(tmp_path / "small.png")
    flags = ["--checkpoint", "day2night", "--strength", 0.5, "--skip_scale", 0.2]
    expected = sampled("--input", tmp_path / "small.png", *flags)

    open_tab(page, "Translate")
    drop(page, "scene.png", png(scene))
    page.get_by_label("number input for Strength").fill("0.5")
    page.get_by_label("number input for Skip scale").fill("0.2")
    wait_until_shown(page, "#translated", [small, *expected])


@browser_test
def test_a_caption_becomes_four_pictures_and_edits_a_fifth(page, sampled, tmp_path):
    open_tab(page, "Text")
    words = "a green boat by a lake at dusk in clear weather"
    page.get_by_label("Caption").locator("visible=true").fill(words)
    expected = sampled(words, "--n", 4, "--batch", 4)
    wait_until_shown(page, "#written", expected)

    scene = drawn.example("day2night", "a2b", 3, (64, 64))
    scene.save(tmp_path / "scene.png")
    edited = sampled(words, "--input", tmp_path / "scene.png", "--strength", 0.6)
    page.get_by_text("Edit a picture").click()
    drop(page, "scene.png", png(scene))
    wait_for_another(page, "#written", expected)
    difference = ImageChops.difference(pictures(page, "#written")[0], edited[0])
    assert max(high for _, high in difference.getextrema()) <= 2  # four at a time are rounded anew


@browser_test
def test_of_ten_requests_in_a_burst_the_first_and_the_newest_are_worked_on(
    page, sampled, tmp_path, monkeypatch
):
    words = page.get_by_label("Caption").locator("visible=true").input_value()
    lines = outlines(page, tmp_path / "outlines.png")
    flags = ["--checkpoint", "edges2scene", "--input", lines, "--r", 0.7, "--seed", 10]
    newest = sampled(words, *flags)

    seeds = []
    begun = threading.Event()
    go_on = threading.Event()
    translate = sample.translate_pictures

    def slow(*arguments):
        seeds.append(arguments[3])
        begun.set()
        assert go_on.wait(timeout=30)
        return translate(*arguments)

    monkeypatch.setattr(sample, "translate_pictures", slow)
    number = page.get_by_label("Seed").locator("visible=true")
    number.fill("1")
    assert begun.wait(timeout=30)
    for seed in range(2, 11):
        number.fill(str(seed))
    go_on.set()
    wait_until_shown(page, "#drawn", newest)
    assert seeds == [1, 10]


@browser_test
def test_a_file_that_is_no_picture_is_one_line_on_the_page(page):
    open_tab(page, "Translate")
    drop(page, "letter.png", b"<b>no picture</b>")
    page.get_by_text("the picture letter.png is not a picture").wait_for()
    assert page.locator("#translated").locator("p, img, b").count() == 1


@browser_test
def test_a_file_of_too_many_bytes_is_refused(page):
    open_tab(page, "Translate")
    drop(page, "large.png", bytes(2 * MEBIBYTE))
    page.get_by_text("exceed the maximum allowed size").wait_for()


@browser_test
def test_nothing_is_wider_than_a_telephone_and_all_stays_on_this_machine(page, reached):
    page.set_viewport_size(dict(width=390, height=844))
    for name in TABS:
        open_tab(page, name)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert set(reached) <= {"127.0.0.1", "localhost", "::1"}


# -------------------- other models

def tabs(page) -> list[str]:
    return [block.label for block in page.blocks.values() if isinstance(block, demo.gr.Tab)]


@pytest.fixture
def yoso(tmp_path: Path) -> str:
    """tiny-turbo as if train_yoso.py had made it."""
    base = bases.load_base("tiny-turbo")
    trained = {f"unet.{name}": p for name, p in base.unet.named_parameters()}
    prior = (torch.zeros(4, 16, 16), torch.ones(4, 16, 16))
    checkpoints.save_yoso(tmp_path / "yoso.safetensors", base, "tiny-turbo", trained, prior, None)
    return str(tmp_path / "yoso.safetensors")


@needs_gradio
def test_the_page_has_the_tabs_that_a_model_can_fill(yoso):
    def tabs_of(**settings: str) -> list[str]:
        return tabs(demo.build(demo.Config(**settings)))

    assert tabs_of() == [*TABS]
    assert tabs_of(base="tiny-sd") == ["Text"]
    assert tabs_of(checkpoint=yoso) == ["Text"]
    assert tabs_of(checkpoint="edges2scene", size="32x48") == ["Draw", "Text"]
    assert tabs_of(checkpoint="clear2rain") == ["Translate", "Text"]


@pytest.fixture
def official(tmp_path: Path) -> str:
    """A sketch model as img2img-turbo saves them, on tiny-sd, which predicts epsilon as well."""
    base = bases.load_base("tiny-sd")
    config = Pix2PixTurboConfig()
    generator = Pix2PixTurbo(base.vae, base.unet, base.schedule, config)
    saved: dict = dict(
        rank_unet=config.lora_rank_unet,
        rank_vae=config.lora_rank_vae,
        unet_lora_target_modules=[*config.unet_targets],
        vae_lora_target_modules=[*config.vae_targets],
    )
    for part, network in (("unet", generator.unet), ("vae", generator.vae)):
        trained = {name: p.detach() for name, p in network.named_parameters() if p.requires_grad}
        saved[f"state_dict_{part}"] = trained
    torch.save(saved, tmp_path / "official.pkl")
    return str(tmp_path / "official.pkl")


@needs_gradio
@pytest.mark.usefixtures("one_thread")
def test_an_official_sketch_model_gets_the_drawing_as_preprocess_sketch_makes_it(
    official, sampled, tmp_path
):
    page = demo.build(demo.Config(base="tiny-sd", checkpoint=official))
    (draw,) = [one.fn for one in page.fns.values() if len(one.inputs) == 4][:1]
    lines, caption = drawn.drawing((512, 512))
    answer = draw(demo.as_url(lines), caption, 0.7, 1)
    lines.resize((64, 64), Image.Resampling.BOX).save(tmp_path / "lines.png")
    flags = ["--base", "tiny-sd", "--checkpoint", official]
    expected = sampled(caption, "--input", tmp_path / "lines.png", "--preprocess", "sketch", *flags)
    assert demo.as_url(expected[0]) in answer


@needs_gradio
@pytest.mark.usefixtures("one_thread")
def test_what_is_set_on_the_page_reaches_the_networks(sampled, tmp_path):
    """As in the tests with a browser, where there is none."""
    page = demo.build(demo.Config())
    (translate,) = [one.fn for one in page.fns.values() if len(one.inputs) == 5]
    drawn.example("day2night", "a2b", 3, (64, 64)).save(tmp_path / "scene.png")
    answer = translate(str(tmp_path / "scene.png"), 0, "day to night", 0.5, 0.2)
    flags = ["--checkpoint", "day2night", "--strength", 0.5, "--skip_scale", 0.2]
    (expected,) = sampled("--input", tmp_path / "scene.png", *flags)
    assert demo.as_url(expected) in answer

    draw, write = [one.fn for one in page.fns.values() if len(one.inputs) == 4]
    words = "a green boat by a lake at dusk in clear weather"
    answer = write(words, 7, None, 0.6)
    urls = [demo.as_url(one) for one in sampled(words, "--n", 4, "--batch", 4, "--seed", 7)]
    assert [url in answer for url in urls] == [True] * 4 and len(set(urls)) == 4

    lines, caption = drawn.drawing((64, 64))
    ImageOps.invert(lines).save(tmp_path / "lines.png")
    answer = draw(demo.as_url(lines), caption, 0.2, 5)
    flags = ["--checkpoint", "edges2scene", "--r", 0.2, "--seed", 5]
    (expected,) = sampled(caption, "--input", tmp_path / "lines.png", *flags)
    assert demo.as_url(expected) in answer


# -------------------- the process

@needs_gradio
@pytest.mark.parametrize(
    "flags, says",
    [
        (["--size", "63"], "multiples of 4"),
        (["--port", "70000"], "expected another --host or --port"),
        (["--host", "nowhere.invalid"], "expected another --host or --port"),
        (["--base", "nothing"], "nothing is no folder here"),
        (["--prot", "80"], "did you mean --port?"),
    ],
)
def test_what_cannot_be_served_is_refused(monkeypatch, flags, says):
    monkeypatch.setattr(sys, "argv", ["demo.py", *flags])
    with pytest.raises((ValueError, OSError), match=says):
        demo.main()


def test_without_gradio_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(demo, "gr", None)
    monkeypatch.setattr(sys, "argv", ["demo.py"])
    with pytest.raises(ValueError, match=r'pip install -e "\.\[demo\]"'):
        demo.main()


@needs_gradio
@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM")
def test_it_serves_until_it_is_stopped_and_leaves_nothing_behind(tmp_path):
    environment = os.environ | dict(HOME=str(tmp_path), TMPDIR=str(tmp_path), OMP_NUM_THREADS="1")
    for name in ("XDG_CACHE_HOME", "HF_HOME"):
        environment.pop(name, None)
    environment["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path)  # torch makes that folder for itself
    process = subprocess.Popen(
        [sys.executable, "-B", ROOT / "demo.py"],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    url = process.stdout.readline().strip()
    assert url.startswith("http://127.0.0.1:")
    with urllib.request.urlopen(url) as answer:
        assert "One-step diffusion" in answer.read().decode()
    assert len([*tmp_path.iterdir()]) == 1  # the temporary folder
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert errors == ""
    assert process.returncode == 130
    assert [*tmp_path.iterdir()] == []


# -------------------- figures

# Milliseconds from a stroke or an input to the decoded picture.
TIMED = """async ([output, field, value]) => {
    const image = document.querySelector(output + " img:last-child");
    const changed = new Promise((resolve) => {
        new MutationObserver(resolve).observe(image, {attributeFilter: ["src"]});
    });
    const box = field.getBoundingClientRect();
    const start = performance.now();
    if (field.tagName == "CANVAS") {
        field.setPointerCapture = () => {};
        field.hasPointerCapture = () => true;
        const place = {clientX: box.x + value * box.width, clientY: box.y + 20};
        field.dispatchEvent(new PointerEvent("pointerdown", {buttons: 1, ...place}));
    } else {
        field.value = value;
        field.dispatchEvent(new Event("input", {bubbles: true}));
    }
    await changed;
    await image.decode();
    return performance.now() - start;
}"""


# Strokes, each through points in [0, 1].
HOUSE_AND_TREE = [
    [(0, 0.5), (0.1, 0.43), (0.17, 0.46)],
    [(0.4, 0.47), (0.52, 0.38), (0.65, 0.47)],
    [(0.84, 0.5), (0.92, 0.44), (1, 0.48)],
    [(0, 0.57), (0.11, 0.57)],
    [(0.46, 0.56), (0.66, 0.57)],
    [(0.84, 0.57), (1, 0.56)],
    [(0.13, 0.82), (0.13, 0.62), (0.43, 0.62), (0.43, 0.82), (0.13, 0.82)],
    [(0.09, 0.62), (0.2, 0.46), (0.36, 0.46), (0.47, 0.62), (0.09, 0.62)],
    [(0.18, 0.82), (0.18, 0.7), (0.25, 0.7), (0.25, 0.82)],
    [(0.31, 0.75), (0.31, 0.67), (0.39, 0.67), (0.39, 0.75), (0.31, 0.75)],
    [(0.62, 0.62), (0.75, 0.4), (0.88, 0.62), (0.62, 0.62)],
    [(0.66, 0.62), (0.6, 0.78), (0.9, 0.78), (0.84, 0.62)],
    [(0.72, 0.78), (0.72, 0.85), (0.78, 0.85), (0.78, 0.78)],
]


def without_page() -> dict[str, Callable[[object], object]]:
    """What sample.py itself computes for one picture of each tab."""
    device = torch.device("cpu")
    paired, _ = sample.load_translator(sample.Options(checkpoint="edges2scene", r=0.7), device)
    unpaired, _ = sample.load_translator(sample.Options(checkpoint="day2night"), device)
    loaded = sample.prepare_base(sample.Options(), device)
    lines, caption = drawn.drawing((64, 64))
    outlines = ImageOps.invert(lines)
    scene = drawn.example("day2night", "a2b", 8, (64, 64))
    contexts = [sample.encode_caption(model, caption) for model in (paired, unpaired)]

    def draw(value: object) -> None:
        sample.translate_pictures(paired, [outlines], contexts[0], 42)

    def translate(value: object) -> None:
        arguments = (unpaired, [scene], contexts[1], 42, float(value), "a2b")
        sample.translate_pictures(*arguments)

    def write(value: object) -> None:
        seeds = [42, 43, 44, 45]
        sample.text_to_image(loaded.base, value, seeds, (64, 64), sampler=loaded.sampler)

    return dict(Draw=draw, Translate=translate, Text=write)


def take_picture(page: "Page") -> None:
    """Draws a house and a tree, and writes assets/demo.png."""
    page.get_by_role("button", name="Clear").click()
    for points in HOUSE_AND_TREE:
        stroke(page, *points)
    words = "a red house and a green tree on grass in the day in clear weather"
    page.get_by_label("Caption").locator("visible=true").fill(words)
    page.wait_for_timeout(2000)
    page.screenshot(path=ROOT / "assets" / "demo.png")


def measure(page: "Page", times: int = 20) -> None:
    """Prints medians of the milliseconds of a picture, on the page and without it in turn."""
    captions = [f"a {colour} {kind} on sand" for kind in KINDS for colour in COLOURS]
    values = {
        "Draw": [0.02 + 0.04 * i for i in range(times)],
        "Translate": [f"{0.4 + 0.04 * i:.2f}" for i in range(times)],
        "Text": captions[:times],
    }
    fields = {
        "Draw": page.locator("#pad canvas"),
        "Translate": page.get_by_label("number input for Skip scale"),
        "Text": page.get_by_label("Caption").locator("visible=true"),
    }
    direct = without_page()
    thread = ThreadPoolExecutor(max_workers=1)
    for name in TABS:
        open_tab(page, name)
        field = fields[name].element_handle()
        served = []
        computed = []
        for value in values[name]:
            served.append(page.evaluate(TIMED, [TABS[name], field, value]))
            start = time.perf_counter()
            thread.submit(direct[name], value).result()
            computed.append(1000 * (time.perf_counter() - start))
        added = [one - other for one, other in zip(served, computed)]
        medians = [statistics.median(each) for each in (served, computed, added)]
        print("{}: {:.0f} ms on the page, {:.0f} without, {:+.0f}".format(name, *medians))


def main() -> None:
    with demo.serve(demo.Config()) as url, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport=dict(width=960, height=780))
        page.goto(url)
        page.wait_for_selector("#drawn img")
        take_picture(page)
        measure(page)
        browser.close()


if __name__ == "__main__":
    main()

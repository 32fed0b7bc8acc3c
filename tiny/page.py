"""The page that `python sample.py` draws: what the embedded base and its adapters do in one step."""

import textwrap

import torch
from PIL import Image, ImageDraw
from torch import Tensor

import sample
from dataset.pictures import to_picture, to_tensor
from files import bases, checkpoints
from tiny import scenes

ACROSS, SIDE, BELOW = 4, 160, 40  # pictures in a row, their side on the page, room for a caption


def draw(base: bases.Base, sampler: str, seed: int) -> Tensor:
    """Captions of combinations that training left out, and below them what its adapters make of a picture, side by
    side: a page [3, H, W] in [-1, 1]."""
    device, cells = next(base.unet.parameters()).device, []
    for i in range(12):
        words = scenes.caption(scenes.nth_scene("test", 0, i))
        cells.append((sample.text_to_image(base, words, [seed + i], (64, 64), sampler=sampler), words))
    for i, name in enumerate(("day2night", "clear2rain", "edges2scene", "edges2scene")):
        scene = scenes.nth_scene("test", 1, i, time="day", weather="clear")
        model = checkpoints.load_generator(name, dtype=torch.float32, device=str(device))
        picture, words = (scenes.draw(scene, 64), model.prompts[1]) if model.prompts else \
            (scenes.outlines(scene, 64), scenes.caption(scene))
        context = model.text_encoder(model.tokenizer(words).to(device))
        made = sample.translate_pictures(model, [picture], context, seed, model.r, direction="a2b")
        cells += [(to_tensor(picture)[None] * 2 - 1, f"{name}: from"), (made, f"to: {words}")]
    page = Image.new("RGB", (ACROSS * (SIDE + 8), len(cells) // ACROSS * (SIDE + BELOW)), "white")
    for i, (made, words) in enumerate(cells):
        left, top = i % ACROSS * (SIDE + 8) + 4, i // ACROSS * (SIDE + BELOW) + 4
        page.paste(to_picture(made[0].float().cpu()).resize((SIDE, SIDE), Image.Resampling.BICUBIC), (left, top))
        words = "\n".join(textwrap.wrap(words, 32))
        ImageDraw.Draw(page).multiline_text((left, top + SIDE + 1), words, fill="black", font_size=9, spacing=1)
    return to_tensor(page) * 2 - 1

"""Puts sample pictures of two pretraining runs side by side, with labels: methods.png.

    python energy_pretrain.py --recipe short --corrupt mix --lr 5e-3 --output_dir runs/mix
    python cim_pretrain.py --recipe short
    python .pictures/methods.py runs/mix/samples/step_000374.png runs/cim_respix_vit_nano/samples/step_000374.png
"""
import os
import sys

from PIL import Image, ImageDraw, ImageFont

TILE = 98                                                             # 96 pixels and the border of make_grid
HEADER = 16                                                           # the columns' names, written larger here
ENERGY = ["original", "corrupted", "one step"]
CIM = ["original", "masked", "sample", "sample", "sample", "restored"]
TASKS = ["mask", "super-resolution", "noise", "no colour"]


def pick(path, rows):
    """The given rows of a grid of tiles, one below the other."""
    grid = Image.open(path).convert("RGB")
    image = Image.new("RGB", (grid.width, TILE * len(rows) + 2), "white")
    for i, row in enumerate(rows):
        top = HEADER + TILE * row
        image.paste(grid.crop((0, top, grid.width, top + TILE + 2)), (0, TILE * i))
    return image


def main():
    font = ImageFont.load_default(16)
    energy, cim = pick(sys.argv[1], [0, 2, 4, 6]), pick(sys.argv[2], [0, 1, 2, 3])
    left, gap, top = 136, 34, 58
    page = Image.new("RGB", (left + energy.width + gap + cim.width, top + energy.height), "white")
    draw = ImageDraw.Draw(page)
    for x, image, title, labels in [(left, energy, "Energy: one step downhill", ENERGY),
                                    (left + energy.width + gap, cim, "CIM: samples of the generator", CIM)]:
        page.paste(image, (x, top))
        draw.text((x + image.width / 2, 16), title, "black", font, anchor="mm")
        for i, label in enumerate(labels):
            draw.text((x + TILE * (i + 0.5), 42), label, "black", font, anchor="mm")
    for i, task in enumerate(TASKS):
        draw.text((left - 8, top + TILE * (i + 0.5)), task, "black", font, anchor="rm")
    page.save(os.path.join(os.path.dirname(os.path.abspath(__file__)), "methods.png"))


if __name__ == "__main__":
    main()

"""Puts the sample pictures of the README's two pretraining commands side by side, with labels: methods.png.

    python .pictures/methods.py runs/energy_vit_nano/samples/epoch_0002.png runs/cim_respix_vit_nano/samples/epoch_0002.png
"""
import os
import sys

from PIL import Image, ImageDraw, ImageFont

TILE = 98                                                             # 96 pixels and the border of make_grid
ENERGY = ["original", "corrupted", "1 step", "2 steps", "3 steps"]
CIM = ["original", "masked", "sample", "sample", "sample", "restored"]
TASKS = ["masked", "4x smaller", "noise", "no colour"]


def pick(path, rows):
    """The given rows of a grid of tiles, one below the other."""
    grid = Image.open(path).convert("RGB")
    image = Image.new("RGB", (grid.width, TILE * len(rows) + 2), "white")
    for i, row in enumerate(rows):
        image.paste(grid.crop((0, TILE * row, grid.width, TILE * (row + 1) + 2)), (0, TILE * i))
    return image


def main():
    font = ImageFont.load_default(16)
    energy, cim = pick(sys.argv[1], [0, 2, 4, 6]), pick(sys.argv[2], [0, 1, 2, 3])
    left, gap, top = 92, 34, 58
    page = Image.new("RGB", (left + energy.width + gap + cim.width, top + energy.height), "white")
    draw = ImageDraw.Draw(page)
    for x, image, title, labels in [(left, energy, "Energy: steps downhill in the energy", ENERGY),
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

"""results.jsonl -> .pictures/curves.svg and the table of the README. Needs matplotlib, which nothing else does."""
import json
import os
from collections import defaultdict

import matplotlib
import numpy as np

matplotlib.use("svg")
import matplotlib.pyplot as plt

HERE = os.path.dirname(os.path.abspath(__file__))
CROPS = 45_000                                                        # of an epoch
MEASURES = {"few2": "fine-tuned on 1,000 labels", "few10": "fine-tuned on 4,500 labels",
            "probe": "linear probe on 5,000 labels"}
CURVES = {"energy_sr": ("energy, super-resolution", "tab:red", "-"), "energy_mix": ("energy, mix", "tab:red", ":"),
          "energy_grid": ("energy, grid mask", "tab:red", "--"),
          "autoencoder_sr": ("autoencoder, super-resolution", "tab:gray", "-"),
          "autoencoder_mix": ("autoencoder, mix", "tab:gray", ":"), "mae": ("MAE", "black", "-"),
          "respix": ("CIM, RESPIX", "tab:blue", "-"), "revdet": ("CIM, REVDET", "tab:blue", "--"),
          "beit": ("BEiT alone", "tab:green", "-"), "energy_resnet": ("energy, ResNet", "tab:red", "-"),
          "respix_resnet": ("CIM RESPIX, ResNet", "tab:blue", "-"),
          "revdet_resnet": ("CIM REVDET, ResNet", "tab:blue", "--")}


def read(split="test"):
    """-> {(curve, measure): {crops: {pretraining seed: [top-1 of each fine-tuning seed]}}}."""
    points = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    with open(f"{HERE}/results.jsonl") as file:
        for line in map(json.loads, file):
            if line["split"] == split:
                crops = round(line["epochs"] * CROPS)
                points[line["curve"], line["measure"]][crops][line["seed"]].append(line["top1"])
    return points


def plot(points):
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), constrained_layout=True)
    for axis, (measure, title) in zip(axes, MEASURES.items()):
        for curve, (label, color, style) in CURVES.items():
            scratch = "scratch_resnet" if curve.endswith("resnet") else "scratch"
            doses = points[curve, measure]
            if not doses:
                continue
            start = points[scratch, measure].get(0)
            doses = ({0: start} if start else {}) | dict(sorted(doses.items()))
            x = [max(crops, CROPS / 8) for crops in doses]            # from scratch, at the left edge
            values = [[top1 for seed in runs.values() for top1 in seed] for runs in doses.values()]
            mean = np.array([np.mean(top1) for top1 in values])
            axis.plot(x, mean, style, color=color, label=label, marker="o", markersize=3)
            axis.fill_between(x, [min(top1) for top1 in values], [max(top1) for top1 in values], color=color,
                              alpha=0.08)
        axis.set_xscale("log")
        axis.set_xlabel("crops seen in pretraining (left edge: none)")
        axis.set_title(title)
    axes[0].set_ylabel("top-1 on the 10,000 test images, %")
    axes[0].legend(fontsize=7)
    figure.savefig(f"{HERE}/../.pictures/curves.svg")


def table(points):
    doses = sorted({crops for runs in points.values() for crops in runs})
    for measure, title in MEASURES.items():
        print(f"\n| {title} | " + " | ".join(f"{crops:,}" for crops in doses) + " |")
        print("|---" * (1 + len(doses)) + "|")
        for curve in dict.fromkeys(curve for curve, _ in points):
            cells = []
            for crops in doses:
                runs = points[curve, measure].get(crops)
                values = [top1 for seed in runs.values() for top1 in seed] if runs else []
                spread = f" ± {(max(values) - min(values)) / 2:.1f} ({len(runs)})" if values else ""
                cells.append(f"{np.mean(values):.1f}{spread}" if values else "")
            print(f"| {curve} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    plot(read())
    table(read())

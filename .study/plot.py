"""results.jsonl -> .pictures/curves.svg and tables in Markdown. Needs matplotlib, which nothing else does.

    python .study/plot.py [test | held | claims]
"""
import json
import os
import sys
from collections import defaultdict

import matplotlib
import numpy as np

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "the same file for the same numbers"
import matplotlib.pyplot as plt

HERE = os.path.dirname(os.path.abspath(__file__))
CROPS = 45_000                                                        # of an epoch
MEASURES = {"few2": "fine-tuned on 1,000 labels, 20 epochs", "few2_60": "fine-tuned on 1,000 labels, 60 epochs",
            "few10": "fine-tuned on 4,500 labels, 10 epochs", "few10_30": "fine-tuned on 4,500 labels, 30 epochs",
            "probe": "ridge regression on frozen features, 5,000 labels"}
LABELS = {"scratch": "no pretraining", "scratch_resnet": "ResNet: no pretraining",
          "scratch_groupnorm": "ResNet with energy's GroupNorm: no pretraining",
          "energy_sr": "energy, super-resolution 4x", "energy_sr8": "energy, super-resolution 8x",
          "energy_mix": "energy, mix", "energy_mix8": "energy, mix with 8x", "energy_grid": "energy, grid mask",
          "autoencoder_sr": "autoencoder, super-resolution 4x", "autoencoder_sr8": "autoencoder, super-resolution 8x",
          "autoencoder_mix": "autoencoder, mix", "mae": "MAE", "respix": "CIM, RESPIX", "revdet": "CIM, REVDET",
          "beit": "BEiT alone", "energy_resnet": "ResNet: energy", "respix_resnet": "ResNet: RESPIX",
          "revdet_resnet": "ResNet: REVDET", "energy_n0": "energy, N = 0", "energy_n2": "energy, N = 2",
          "energy_scale1": "energy, without our constant factor", "energy_cls": "energy, of the class token",
          "energy_alpha": "energy, predicted step size",
          "energy_denoise": "energy, denoising", "energy_color": "energy, colorization",
          "energy_random_small": "energy, small random masks", "energy_grid4": "energy, grid mask, cells of 4",
          "energy_mix4": "energy, mix, cells of 4", "energy_mix_no_denoise": "energy, mix without denoising",
          "energy_mix_no_grid": "energy, mix without the grid mask", "energy_decay0.5": "energy, weight decay 0.5",
          "energy_batch128": "energy, batches of 128", "energy_step1": "energy, alpha starts at 1",
          "energy_step0.01": "energy, alpha starts at 0.01", "autoencoder_decay0": "autoencoder, weight decay 0",
          "autoencoder_decay0.5": "autoencoder, weight decay 0.5", "mae_decay0.5": "MAE, weight decay 0.5",
          "respix_uniform": "RESPIX, uniform sampling", "respix_argmax": "RESPIX, the most likely token",
          "respix_pixels": "RESPIX, target not normalized", "respix_patch": "RESPIX, target normalized by patch",
          "respix_unshared": "RESPIX, no shared layers", "respix_depth2": "RESPIX, generator of half the depth",
          "respix_block": "RESPIX, masks in blocks of 40 %", "respix_mae": "RESPIX, a generator like MAE",
          "respix_erase": "RESPIX, random erasing"}
FIGURE = {"energy_sr": "tab:red", "energy_mix4": "tab:orange", "autoencoder_sr": "tab:gray", "mae": "black",
          "respix": "tab:blue", "beit": "tab:green"}
# The rate with the best probe after two epochs, on the held-back images: see the table of rates.
BEST_RATE = {curve: 1e-2 if curve.startswith("respix") else 3e-3 for curve in LABELS}
BEST_RATE |= {"scratch": 0, "scratch_resnet": 0, "scratch_groupnorm": 0, "mae": 1e-3, "mae_decay0.5": 1e-3,
              "energy_resnet": 1e-3, "respix_resnet": 1e-3, "revdet_resnet": 3e-4}


# What a paper says, the curve that it says is better, and the curve to compare it with.
CLAIMS = [
    ("energy, Table 2: better than an autoencoder on super-resolution", "energy_sr", "autoencoder_sr"),
    ("energy, Table 1: better than MAE on the grid mask (rate not tuned)", "energy_grid", "mae"),
    ("ours: energy on super-resolution is better than MAE", "energy_sr", "mae"),
    ("energy, section 4.2, whose models learn the mix: it is better than super-resolution alone", "energy_mix",
     "energy_sr"),
    ("energy, section 4.2, with grid cells of 4 pixels: the mix is better than super-resolution alone", "energy_mix4",
     "energy_sr"),
    ("energy, section 4.2: the mix is better than the grid mask alone", "energy_mix", "energy_grid"),
    ("energy, section 4.2, with grid cells of 4 pixels: the mix is better than the grid mask alone", "energy_mix4",
     "energy_grid4"),
    ("ours: energy is better with grid cells of half a patch than of a whole one", "energy_grid4", "energy_grid"),
    ("ours: energy's mix is better with grid cells of half a patch than of a whole one", "energy_mix4", "energy_mix"),
    ("energy, section 4.2: the mix is better than denoising alone", "energy_mix", "energy_denoise"),
    ("energy, section 4.2: the mix is better than colorization alone", "energy_mix", "energy_color"),
    ("energy, Figure A: one step is better than none (loss: ours)", "energy_sr", "energy_n0"),
    ("energy, section B.1: two steps are better than one", "energy_n2", "energy_sr"),
    ("ours: energy is better with a constant factor than without", "energy_sr", "energy_scale1"),
    ("energy, section A.1 (no claim): a predicted step size is better than a learned one", "energy_alpha",
     "energy_sr"),
    ("energy, Table B: a ResNet gains too", "energy_resnet", "scratch_groupnorm"),
    ("CIM, Table 1: RESPIX is better than BEiT", "respix", "beit"),
    ("CIM, Table 1: REVDET is better than BEiT", "revdet", "beit"),
    ("CIM, Table 2: a ResNet gains with RESPIX", "respix_resnet", "scratch_resnet"),
    ("CIM, Table 2: a ResNet gains with REVDET", "revdet_resnet", "scratch_resnet"),
    ("CIM, section 2.1: a generator of half the depth is better than one of full depth", "respix_depth2", "respix"),
    ("CIM, Table 4: random masking is better than blocks", "respix", "respix_block"),
    ("CIM, Table 5: shared first layers are better than separate ones", "respix", "respix_unshared"),
    ("CIM, Table 6: sliding windows are better than no normalization", "respix", "respix_pixels"),
    ("CIM, Table 6: sliding windows are better than normalization by patch", "respix", "respix_patch"),
    ("CIM, Table 7: sampling from the generator is better than uniform sampling", "respix", "respix_uniform"),
    ("CIM, Table 7: sampling is better than the most likely token", "respix", "respix_argmax"),
    ("CIM, Table 10: tokens are better than a generator that paints like MAE", "respix", "respix_mae"),
    ("CIM, section 3.3, which takes a ResNet: a generator is better than erasing", "respix", "respix_erase"),
]


def read(split):
    """-> {(curve, rate, measure): {crops: {pretraining seed: [top-1 of each fine-tuning seed]}}}."""
    points = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    with open(f"{HERE}/results.jsonl") as file:
        for line in map(json.loads, file):
            if line["split"] == split and line.get("feature", "feature") == "feature":
                crops = round(line["epochs"] * CROPS)
                points[line["curve"], line["lr"], line["measure"]][crops][line["seed"]].append(line["top1"])
    return points


def flat(seeds):
    return [top1 for values in seeds.values() for top1 in values]


def plot(points):
    measures = ["few2_60", "probe"]
    figure, axes = plt.subplots(1, len(measures), figsize=(5.2 * len(measures), 4), layout="constrained")
    for axis, measure in zip(axes, measures):
        for curve, color in FIGURE.items():
            doses = points.get((curve, BEST_RATE[curve], measure))
            if not doses:
                continue
            doses = {CROPS / 4: points["scratch", 0, measure][0]} | dict(sorted(doses.items()))
            values = [flat(seeds) for seeds in doses.values()]
            axis.plot(list(doses), [np.mean(top1) for top1 in values], color=color, label=LABELS[curve], marker="o",
                      markersize=3)
            axis.fill_between(list(doses), [min(top1) for top1 in values], [max(top1) for top1 in values],
                              color=color, alpha=0.07, linewidth=0)
        axis.axhline(np.mean(flat(points["scratch", 0, measure][0])), color="black", linestyle=":", linewidth=1,
                     label="no pretraining")
        axis.set_xscale("log")
        ticks = [CROPS / 4, CROPS / 2, 2 * CROPS, 9 * CROPS, 36 * CROPS]
        axis.set_xticks(ticks, ["none", "22k", "90k", "405k", "1.6M"])
        axis.minorticks_off()
        axis.set_xlim(CROPS / 5, 1.3 * max(max(doses) for doses in points.values()))
        axis.set_xlabel("crops seen in pretraining")
        axis.set_title(MEASURES[measure], fontsize=10)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("top-1 on 10,000 test images, %")
    axes[-1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    figure.savefig(f"{HERE}/../.pictures/curves.svg", metadata={"Date": None})


def table(points):
    """Mean, half of the range of all values, and in brackets the number of pretraining seeds."""
    all_doses = sorted({crops for doses in points.values() for crops in doses})
    order = list(LABELS)
    for measure, title in MEASURES.items():
        rows = sorted({(curve, lr) for curve, lr, name in points if name == measure},
                      key=lambda row: (order.index(row[0]), row[1]))
        if not rows:
            continue
        print(f"\n| {title} | " + " | ".join(f"{crops:,}" for crops in all_doses) + " |")
        print("|---" * (1 + len(all_doses)) + "|")
        for curve, lr in rows:
            cells = []
            for crops in all_doses:
                seeds = points[curve, lr, measure].get(crops)
                values = flat(seeds) if seeds else []
                spread = f" ± {np.ptp(values) / 2:.1f}" if len(values) > 1 else ""
                cells.append(f"{np.mean(values):.1f}{spread} ({len(seeds)})" if values else "")
            print(f"| {LABELS[curve]}{f', rate {lr:g}' if lr else ''} | " + " | ".join(cells) + " |")


def claims(points):
    """Differences of the seeds' means at each length, and where they are decided: larger than three standard errors.

    The standard deviation between seeds is pooled over all points of a measure that have several. A difference with
    one seed on either side is shown without an error and decides nothing. Fine-tuning for 20 epochs (few2) is shown
    only for claims that were not measured with 60.
    """
    shown = set()
    lengths = sorted({crops for doses in points.values() for crops in doses} - {0})
    for measure in ("few2_60", "few2", "probe"):
        means = {(curve, lr, crops): [np.mean(values) for values in seeds.values()]
                 for (curve, lr, name), doses in points.items() if name == measure for crops, seeds in doses.items()}
        squares = sum(len(values) * np.var(values) for values in means.values())
        deviation = np.sqrt(squares / sum(len(values) - 1 for values in means.values()))
        print(f"\n| {MEASURES[measure]} | " + " | ".join(f"{crops:,}" for crops in lengths) + " | |")
        print("|---" * (2 + len(lengths)) + "|")
        for claim, better, worse in CLAIMS:
            if measure == "few2" and claim in shown:
                continue
            cells = []
            decided = {"holds": [], "the other way round": []}
            several = False                                           # seeds on both sides, at any length
            for crops in lengths:
                a = means.get((better, BEST_RATE[better], crops), [])
                b = means.get((worse, BEST_RATE[worse], 0 if worse.startswith("scratch") else crops), [])
                if not a or not b:
                    cells.append("")
                    continue
                difference = np.mean(a) - np.mean(b)
                spread = ""
                if min(len(a), len(b)) > 1:
                    several = True
                    error = deviation * np.sqrt(1 / len(a) + 1 / len(b))
                    spread = f" ± {error:.1f}"
                    if abs(difference) > 3 * error:
                        decided["holds" if difference > 0 else "the other way round"].append(f"{crops:,}")
                cells.append(f"{difference:+.1f}{spread} ({len(a)}, {len(b)})")
            verdict = "; ".join(f"{word} ({', '.join(where)})" for word, where in decided.items() if where)
            if several:
                shown.add(claim)
                print(f"| {claim} | " + " | ".join(cells) + f" | {verdict or 'undecided'} |")
        print(f"\nStandard deviation between pretraining seeds: {deviation:.2f} points.")


if __name__ == "__main__":
    if sys.argv[1:] == ["claims"]:
        claims(read("test"))
        sys.exit()
    split = sys.argv[1] if len(sys.argv) > 1 else "test"
    if split == "test":
        plot(read(split))
    table(read(split))

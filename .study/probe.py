"""Ridge regression on the frozen features of a backbone: where a converged linear probe ends, in seconds.

    python .study/probe.py DATA BACKBONE.pt [--by_block] [--sr_scale 4] [--tune_seeds 0 1 2]

DATA holds train/CLASS/ and val/CLASS/. Each seed draws its own 5,000 training images; all of val/ is used.
Centre crops, standardised features, and the penalty with the least leave-one-out error. For a ViT it measures the
patch mean (`mean`), the class token (`cls`) and both together (`both`), with --by_block of every block; `feature` is
what the backbone returns. --sr_scale probes images of lower resolution, as pretraining on super-resolution sees them.
BatchNorm's statistics, which CIM takes of corrupted images, are first taken anew of the training images.
"""
import argparse
import json
import os
import sys

import numpy as np
import torch
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
import data
import models

LABELS = 5000


@torch.no_grad()
def extract(backbone, dataset, indices, img_size, by_block, sr_scale):
    """-> ({name: features (count, width)}, labels (count,)), as NumPy arrays."""
    crops = data.Transformed(dataset, data.center_transform(img_size), seed=0)
    block_outputs = []
    hooks = [block.register_forward_hook(lambda module, inputs, output: block_outputs.append(output))
             for block in (backbone.blocks if by_block else [])]
    features, labels = {}, []
    for images, label in DataLoader(crops, batch_size=250, sampler=[(0, index) for index in indices]):
        labels.append(label)
        if sr_scale > 1:
            images = data.low_resolution(images, None, sr_scale)
        if isinstance(backbone, models.ViT):
            block_outputs.clear()
            tokens = {"": backbone.forward_tokens(images)}
            tokens |= {f"block{i}_": output for i, output in enumerate(block_outputs)}
            batch = {}
            for name, x in tokens.items():
                batch[f"{name}cls"] = x[:, 0]
                batch[f"{name}mean"] = x[:, 1:].mean(dim=1)
                batch[f"{name}both"] = torch.cat([batch[f"{name}cls"], batch[f"{name}mean"]], dim=1)
            batch["feature"] = batch[backbone.pool]
        else:
            batch = {"feature": backbone(images)}
        for name, value in batch.items():
            features.setdefault(name, []).append(value)
    for hook in hooks:
        hook.remove()
    return ({name: torch.cat(values).double().numpy() for name, values in features.items()},
            torch.cat(labels).numpy())


def ridge_top1(train, train_labels, test, test_labels):
    """Features (count, width) and labels (count,) -> top-1 in percent."""
    mean, std = train.mean(axis=0), train.std(axis=0) + 1e-9
    train, test = (train - mean) / std, (test - mean) / std
    targets = np.eye(train_labels.max() + 1)[train_labels]
    offset = targets.mean(axis=0)
    u, s, vt = np.linalg.svd(train, full_matrices=False)
    projected = u.T @ (targets - offset)
    best_error, best_weights = np.inf, None
    for penalty in np.logspace(-2, 5, 22):
        shrink = s ** 2 / (s ** 2 + penalty)
        residual = targets - offset - (u * shrink) @ projected
        leverage = u ** 2 @ shrink + 1 / len(train)
        error = ((residual / (1 - leverage)[:, None]) ** 2).mean()    # leave-one-out, in closed form
        if error < best_error:
            best_error, best_weights = error, (vt.T * (s / (s ** 2 + penalty))) @ projected
    return 100 * ((test @ best_weights + offset).argmax(axis=1) == test_labels).mean()


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("data")
    p.add_argument("backbone")
    p.add_argument("--by_block", action="store_true")
    p.add_argument("--sr_scale", type=int, default=1)
    p.add_argument("--tune_seeds", type=int, nargs="+", default=[0, 1, 2])
    args = p.parse_args()
    config = models.read_file(args.backbone)["config"]
    backbone = models.load_backbone(args.backbone)
    train_set = data.labelled_dataset(args.data, True, config["img_size"])
    val_set = data.labelled_dataset(args.data, False, config["img_size"])
    draws = {seed: data.few_labels(train_set.targets, LABELS / len(train_set), seed)
             for seed in args.tune_seeds}
    used = sorted(set().union(*draws.values()))
    options = config["img_size"], args.by_block, args.sr_scale
    crops = data.Transformed(train_set, data.center_transform(config["img_size"]), seed=0)
    update_bn(DataLoader(crops, batch_size=250, sampler=[(0, index) for index in used]), backbone)
    backbone.eval()
    train, train_labels = extract(backbone, train_set, used, *options)
    test, test_labels = extract(backbone, val_set, range(len(val_set)), *options)
    for name in train:
        for seed, draw in draws.items():
            rows = np.searchsorted(used, draw)
            top1 = ridge_top1(train[name][rows], train_labels[rows], test[name], test_labels)
            print(json.dumps({"feature": name, "tune_seed": seed, "images": len(test_labels),
                              "top1": round(top1, 2)}))


if __name__ == "__main__":
    main()

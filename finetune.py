"""What pretraining is for: classify, probe, learn from few labels, segment; and the same from scratch.

Starts from what energy_pretrain.py or cim_pretrain.py wrote, or from a state dict in the names of timm, MAE
or torchvision; with both papers' recipes (Wang et al., secs. A.1, B.4; Fang et al., tables 14, 15, sec. 3.2).

    python finetune.py --init runs/energy_vit_nano/backbone.pt --recipe short
    torchrun --nproc_per_node 8 finetune.py --init runs/energy_vit_s/backbone.pt --data /path/to/imagenet
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 \\
        finetune.py --init runs/cim_vit_b/backbone.pt --recipe cim --data /path/to/imagenet       # two nodes

README.md says what was measured, and where. Copy this file with models.py and data.py and it runs elsewhere.
"""
import argparse
import colorsys
import json
import math
import os
import resource
import sys
import time
from contextlib import nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Subset
from torchvision.models.segmentation.fcn import FCNHead
from torchvision.transforms import v2
from torchvision.utils import make_grid, save_image

import data
import models

# CIM: Table 14; erasing as BEiT. Energy (sec. A.1): "most of the settings follow MAE".
CIM = dict(lr=3e-3, batch_size=1024, weight_decay=0.05, warmup_epochs=5, layer_decay=0.8, clip_grad=0.0,
           drop_path=0.1, label_smoothing=0.1, mixup=0.8, cutmix=1.0, randaug=9, erasing=0.25, repeats=1,
           head_norm="layer", loss="ce", img_size=224, test_size=224, crop_ratio=0.95)
ENERGY = CIM | dict(lr=1e-3, layer_decay=0.75, crop_ratio=0.875)
EPOCHS = {"vit_b": 100, "vit_l": 50}                                  # the others: 200
# Nobody's paper: what trains a small model in minutes, where augmentation and slow lower layers only delay.
SHORT = ENERGY | dict(lr=1e-3, batch_size=32, layer_decay=1.0, mixup=0.0, cutmix=0.0, randaug=0, erasing=0.0,
                      head_norm="batch", epochs=2)
# CIM's Table 15, by the epochs of its columns; no erasing in RSB.
RSB_100 = CIM | dict(lr=12e-3, batch_size=2048, weight_decay=0.02, layer_decay=1.0, drop_path=0.0, mixup=0.1,
                     randaug=6, erasing=0.0, loss="bce", img_size=160)
RSB_300 = RSB_100 | dict(label_smoothing=0.0, randaug=7, repeats=3, img_size=224)
RSB_600 = RSB_300 | dict(weight_decay=0.01, label_smoothing=0.1, mixup=0.2, drop_path=0.05)
# Decision: the papers do not say how they probe. As MAE (crops, flips, 90 epochs, no decay), but with AdamW.
PROBE = ENERGY | dict(epochs=90, warmup_epochs=10, weight_decay=0.0, layer_decay=1.0, drop_path=0.0,
                      label_smoothing=0.0, mixup=0.0, cutmix=0.0, randaug=0, erasing=0.0)
# CIM's sec. 3.2: 160,000 steps are 127 epochs of ADE20K, 80,000 are 64. Decision: what it leaves open as in
# BEiT's code (warm-up of 1,500 steps, decay, drop path) and MMSegmentation (powers, ResNet's rate and decay).
SEGMENT_VIT = CIM | dict(lr=3e-4, batch_size=16, epochs=127, warmup_epochs=1.2, img_size=512, power=1.0,
                         mixup=0.0, cutmix=0.0, label_smoothing=0.0, randaug=0, erasing=0.0)
SEGMENT_RESNET = SEGMENT_VIT | dict(lr=1e-2, epochs=64, weight_decay=5e-4, warmup_epochs=0, layer_decay=1.0,
                                    drop_path=0.0, power=0.9)


# ---------------------------------------------------------------- arguments

def parse_args():
    p = argparse.ArgumentParser(description="Fine-tuning and evaluation of pretrained backbones.",
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    g = p.add_argument_group("data and model").add_argument
    g("--data", default="shapes", help="'shapes' (drawn by the program), 'cifar10' (downloaded to ./data) or "
      "a folder: train/CLASS/ and val/CLASS/; to segment, ADE20K's layout")
    g("--task", default="classify", choices=["classify", "segment"], help="what to train for")
    g("--init", metavar="FILE", help="backbone.pt, checkpoint.pt, or a state dict of timm, torchvision or "
      "MAE (with --model); None: from scratch")
    g("--model", choices=models.MODELS, metavar="NAME",
      help=f"{', '.join(models.MODELS)}; None: that of --init, else vit_s")
    g("--img_size", type=int, help="pixels a side; None: that of --init, else 224; to segment 512")
    g("--patch_size", type=int, help="pixels a side of a ViT's patches; None: that of --init, else 16")
    g("--num_classes", type=int, default=150, help="to segment: classes without 0, unlabelled")
    g("--label_fraction", type=float, default=1.0, help="share of each class's labels to train on: 0.01, 0.1")

    g = p.add_argument_group("recipe (None: the recipe's value)").add_argument
    g("--recipe", choices=["energy", "cim", "rsb", "short"], help="the paper's values for what stands below "
      "and for loss, repeated augmentation, test crop; None: rsb (three, by --epochs) for ResNets, else "
      "energy; short: for small models and minutes")
    g("--probe", choices=["linear", "mlp"], help="train one layer, or three, on the frozen backbone")
    g("--head_norm", choices=["layer", "batch"], help="what normalises a ViT's patch mean before the head; "
      "batch: any backbone's feature, better in short runs")
    g("--layer_decay", type=float, help="a ViT block's learning rate over the next one's")
    g("--drop_path", type=float, help="share of images that skip the last block, from 0 in the first on")
    g("--label_smoothing", type=float, help="share of the target spread over all classes")
    g("--mixup", type=float, help="its alpha; 0: none")
    g("--cutmix", type=float, help="its alpha; 0: none; with both, a coin decides for each batch")
    g("--randaug", type=int, help="RandAugment's strength, 1 to 10; 0: none")
    g("--erasing", type=float, help="share of the images from which a rectangle is erased")

    g = p.add_argument_group("training (None: the recipe's value)").add_argument
    g("--epochs", type=int, help="passes over the training pictures")
    g("--warmup_epochs", type=float, help="linear warm-up; None: at most a fifth of the epochs")
    g("--batch_size", type=int, help="images per optimizer step, over all processes")
    g("--accum_steps", type=int, default=1, help="parts to split a batch into when memory is short")
    g("--lr", type=float, help="peak learning rate; None: the recipe's, scaled with the batch size")
    g("--weight_decay", type=float, help="the optimizer's, on matrices and kernels only")
    g("--clip_grad", type=float, help="largest norm of the gradient; 0: no clipping")
    g("--max_steps", type=int, help="stop after so many optimizer steps (smoke runs, benchmarks)")
    g("--seed", type=int, default=0, help="fixes weights, order, augmentation and which labels are kept")

    g = p.add_argument_group("machine").add_argument
    g("--device", default="auto", help="auto (cuda, else mps, else cpu), or a device's name")
    g("--amp", default="auto", choices=["auto", "bf16", "fp16", "off"],
      help="mixed precision; auto: bf16 or fp16 on a GPU, off elsewhere")
    g("--compile", action="store_true", help="torch.compile the step: a minute or two to start, then faster")
    g("--num_workers", type=int, default=min(8, os.cpu_count()), help="loader processes per process")
    g("--output_dir", help="where results go; None: runs/finetune_MODEL")
    g("--resume", action="store_true", help="continue from OUTPUT_DIR/checkpoint.pt if it is there")
    g("--eval_only", action="store_true", help="measure --init or OUTPUT_DIR/checkpoint.pt; writes nothing")
    return p.parse_args()


def resolve(args, found):
    """Fills in place what no flag gave: the model from `found`, --init's config, the rest by the recipe."""
    def fill(values):
        vars(args).update({key: value for key, value in values.items() if getattr(args, key, None) is None})

    fill({key: found.get(key, default) for key, default in
          (("model", "vit_s"), ("patch_size", 16), ("pool", "mean"), ("norm", "batch"))})
    is_vit, segment = args.model.startswith("vit"), args.task == "segment"
    fill({"recipe": "rsb" if args.model.startswith("resnet") else "energy",
          "output_dir": f"runs/finetune_{args.model}"})
    if segment:
        values = dict(SEGMENT_VIT if is_vit else SEGMENT_RESNET)
    elif args.probe:
        values = dict(PROBE)
    elif args.recipe == "rsb":
        epochs = args.epochs or 100
        values = (RSB_600 if epochs >= 600 else RSB_300 if epochs >= 300 else RSB_100) | {"epochs": 100}
    else:
        recipe = {"energy": ENERGY, "cim": CIM, "short": SHORT}[args.recipe]
        values = {"epochs": EPOCHS.get(args.model, 200)} | recipe
    size = args.img_size or found.get("img_size", 224)
    if not segment and (args.img_size or size != 224 or is_vit):      # else Table 15's, which may be two
        values |= {"img_size": size, "test_size": size}
    if values["test_size"] < data.SMALL:
        values["crop_ratio"] = 1.0      # Decision: small pictures are tested whole, not enlarged and cropped
    fill({"epochs": values["epochs"], "batch_size": values["batch_size"]})
    values["lr"] *= args.batch_size / values["batch_size"]
    # Decision: short runs warm up for a fifth of their epochs at most.
    values["warmup_epochs"] = min(values["warmup_epochs"], 0.2 * args.epochs)
    fill(values)
    for name in "epochs batch_size accum_steps img_size patch_size num_classes label_fraction".split():
        if getattr(args, name) <= 0 or name == "label_fraction" and args.label_fraction > 1:
            sys.exit(f"error: --{name} {getattr(args, name)}: must be above 0, a fraction at most 1")
    if is_vit and args.img_size % args.patch_size:
        sys.exit(f"error: --img_size {args.img_size} is not a multiple of --patch_size {args.patch_size}: "
                 "change either")
    if segment and (args.probe or args.label_fraction < 1 or args.head_norm == "batch"):
        sys.exit("error: --probe, --label_fraction, --head_norm are for --task classify: leave them out")
    if args.probe and args.head_norm == "batch":
        sys.exit("error: --head_norm is for training the whole network, a --probe has its own: leave one out")


def read_init(path):
    """A file of weights -> (all it holds, the backbone's state dict, what is known of its config)."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # MAE's files hold their arguments
            content = torch.load(path, map_location="cpu", weights_only=True)
        weights = content.get("model", content.get("state_dict", content))
        weights = {key.removeprefix("module."): value.detach() for key, value in weights.items()}
        found = dict(content.get("config", {}))
    except Exception as error:          # torch raises many kinds for a file that is damaged or another
        sys.exit(f"error: --init {path} is missing, damaged or no file of weights ({type(error).__name__}): "
                 "give a backbone.pt, a checkpoint.pt or a state dict")
    prefix = "backbone." if any(key.startswith("backbone.") for key in weights) else ""  # of a checkpoint.pt
    weights = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
    norm = "batch" if any(key.endswith("running_mean") for key in weights) else "group"
    return content, weights, {"norm": norm} | found


# ---------------------------------------------------------------- what is trained

class Classifier(nn.Module):
    """A backbone and a new head: the whole trained, or with `probe` the head alone on frozen features."""

    def __init__(self, backbone, num_classes, probe=None, head_norm="layer", loss="ce", label_smoothing=0.0):
        super().__init__()
        self.backbone, self.num_classes, self.probe = backbone, num_classes, probe
        self.loss, self.label_smoothing = loss, label_smoothing
        self.counts, width, linear = 4, backbone.width, nn.Linear(backbone.width, num_classes)
        self.patch_mean = isinstance(backbone, models.ViT) and not probe
        if probe:
            backbone.requires_grad_(False)
            # Sec. B.4: mlp is three layers with 768 channels (ViT-B's width) and ReLU. Decision: the features
            # are standardised first, as in MAE.
            hidden = [nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
            self.head = nn.Sequential(nn.BatchNorm1d(width, affine=False),
                                      *(hidden if probe == "mlp" else ()), linear)
        elif self.patch_mean or head_norm == "batch":
            if self.patch_mean:         # as BEiT and MAE: a new norm, of the patch mean, for the last one
                backbone.norm.requires_grad_(False)
            # batch: energy pretraining leaves ViTs one large vector in all features, which a LayerNorm keeps.
            norm = nn.BatchNorm1d(width) if head_norm == "batch" else nn.LayerNorm(width, eps=1e-6)
            self.head = nn.Sequential(norm, linear)
            nn.init.trunc_normal_(linear.weight, std=0.02 * 0.001)
            nn.init.zeros_(linear.bias)
        else:
            self.head = linear

    def train(self, mode=True):
        super().train(mode)
        self.backbone.train(mode and not self.probe)                  # frozen: BatchNorm's statistics, too
        return self

    def logits(self, images):
        """(B, 3, H, W) -> (B, C)."""
        if self.patch_mean:
            return self.head(self.backbone.forward_tokens(images, norm=False)[:, 1:].mean(dim=1))
        return self.head(self.backbone(images))

    def forward(self, images, labels):
        """-> loss; labels: (B,) int64, or after mixing (B, C) shares."""
        logits = self.logits(images).float()
        if self.loss == "ce":
            return F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        # Decision: binary cross entropy (Table 15) on the mixed, smoothed shares; RSB rounds them up to 1.
        targets = F.one_hot(labels, self.num_classes) if labels.ndim == 1 else labels
        targets = targets * (1 - self.label_smoothing) + self.label_smoothing / self.num_classes
        return F.binary_cross_entropy_with_logits(logits, targets)

    def count(self, images, labels):
        """-> (4,) float64: images, sum of cross entropies, right ones, those with the label among five."""
        logits, labels = self.logits(images).float().cpu(), labels.cpu()  # Apple's GPUs have no float64
        loss = F.cross_entropy(logits, labels, reduction="none").double().sum()
        right = logits.topk(min(5, self.num_classes)).indices == labels[:, None]     # (B, 5)
        return torch.stack([loss.new_tensor(len(images)), loss, right[:, 0].sum(), right.sum()])

    def summary(self, counts):
        total, loss, top1, top5 = counts.tolist()
        return {"top1": round(100 * top1 / total, 3), "top5": round(100 * top5 / total, 3),
                "val_loss": round(loss / total, 4)}


class Segmenter(nn.Module):
    """A backbone and a simple head on its feature map (CIM, sec. 3.2): linear for ViTs, else FCN.

    Differs from the paper: no auxiliary head. Masks: (B, H, W) int64, 0 = unlabelled, c = channel c - 1.
    """

    def __init__(self, backbone, num_classes, img_size):
        super().__init__()
        self.backbone, self.num_classes, self.img_size = backbone, num_classes, img_size
        self.counts = num_classes ** 2 + 1
        self.head = nn.Conv2d(backbone.width, num_classes, 1) if isinstance(backbone, models.ViT) else \
            FCNHead(backbone.width, num_classes)

    def logits(self, images):
        """(B, 3, H, W) -> (B, C, H, W)."""
        logits = self.head(self.backbone.forward_map(images)).float()                # (B, C, H/s, W/s)
        return F.interpolate(logits, size=images.shape[2:], mode="bilinear", align_corners=False)

    def forward(self, images, masks):
        """-> cross entropy, averaged over the labelled pixels."""
        loss = F.cross_entropy(self.logits(images), masks - 1, ignore_index=-1, reduction="sum")
        return loss / (masks > 0).sum().clamp(min=1)

    def predict(self, images):
        """(B, 3, H, W) of any size -> (B, C, H, W), single scale: the short side becomes img_size, and the
        logits of square windows along the long side, at most 2/3 of a window apart, are averaged.

        Decision: windows for ResNets too, not only for ViTs, whose position embedding needs them.
        """
        s, size = self.img_size, images.shape[2:]
        images = v2.functional.resize(images, [s], antialias=True)
        h, w = images.shape[2:]
        total, times = images.new_zeros(len(images), self.num_classes, h, w), images.new_zeros(h, w)
        last = h + w - 2 * s                                                         # of the long side
        for i in torch.linspace(0, last, 1 + math.ceil(1.5 * last / s)).long().tolist():
            top, left = min(i, h - s), min(i, w - s)                                 # one of them is 0
            window = (..., slice(top, top + s), slice(left, left + s))
            total[window] += self.logits(images[window])
            times[window] += 1
        return F.interpolate(total / times, size=size, mode="bilinear", align_corners=False)

    def count(self, images, masks):
        """-> (C * C + 1,) float64: labelled pixels as [truth, prediction], and the sum of cross entropies."""
        logits = self.predict(images)
        loss = F.cross_entropy(logits, masks - 1, ignore_index=-1, reduction="none").cpu().double().sum()
        pairs = ((masks - 1) * self.num_classes + logits.argmax(dim=1))[masks > 0].cpu()
        return torch.cat([pairs.bincount(minlength=self.num_classes ** 2).double(), loss[None]])

    def summary(self, counts):
        """mIoU: the mean over the classes that truth or prediction has anywhere in the validation set."""
        confusion, loss = counts[:-1].view(self.num_classes, -1), counts[-1]
        right, total = confusion.diag(), confusion.sum()
        union = confusion.sum(dim=0) + confusion.sum(dim=1) - right
        return {"miou": round(100 * (right / union)[union > 0].mean().item(), 3),
                "pixel_acc": round(100 * (right.sum() / total).item(), 3),
                "val_loss": round((loss / total).item(), 4)}


def layer_groups(model, weight_decay, layer_decay):
    """The optimizer's groups, each with an lr_scale: layer_decay ** (L + 1 - layer), L the number of blocks.

    Layer 0 is the patch embedding with tokens and positions, i + 1 is block i, L + 1 all else (as in BEiT).
    """
    depth, layers, groups = len(getattr(model.backbone, "blocks", ())), {}, []
    for name, param in model.named_parameters():
        layer = depth + 1
        if name.startswith(("backbone.patch_embed.", "backbone.cls_token", "backbone.pos_embed")):
            layer = 0
        elif name.startswith("backbone.blocks."):
            layer = int(name.split(".")[2]) + 1
        layers.setdefault(layer, []).append((name, param))
    for layer, named in layers.items():
        for group in parameter_groups(named, weight_decay):
            groups += [group | {"lr_scale": layer_decay ** (depth + 1 - layer)}] if group["params"] else []
    return groups


def poly_rate(step, total_steps, warmup_steps, peak, power):
    """Linear warm-up from 0, then down to 0 as (1 - progress) ** power (CIM, sec. 3.2)."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    return peak * (1 - (step - warmup_steps) / max(1, total_steps - warmup_steps)) ** power


# ---------------------------------------------------------------- what is measured and shown

@torch.no_grad()
def evaluate(model, loader, device, dtype, world):
    """-> {"top1": %, "top5": %, "val_loss"} or {"miou": %, "pixel_acc": %, "val_loss"} over all images."""
    if world > 1:
        for buffer in model.buffers():  # BatchNorm's statistics differ: take those that are saved
            dist.broadcast(buffer, 0)
    model.eval()
    counts = torch.zeros(model.counts, dtype=torch.float64)
    for batch in loader:
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            counts += model.count(*(part.to(device) for part in batch))
    model.train()
    if world > 1:
        counts = counts.to(device)
        dist.all_reduce(counts)
    return model.summary(counts)


@torch.no_grad()
def save_picture(path, model, dataset, device):
    """A row for each of up to four validation images: image, truth, prediction; unlabelled is black."""
    colors = torch.tensor([(0, 0, 0)] + [colorsys.hsv_to_rgb(0.618 * i % 1, 0.8, 1 - 0.35 * (i % 2))
                                         for i in range(model.num_classes)])         # (1 + C, 3)
    model.eval()
    tiles = []
    for i in torch.linspace(0, len(dataset) - 1, min(4, len(dataset))).long().tolist():
        image, mask = dataset[0, i]
        prediction = model.predict(image[None].to(device))[0].argmax(dim=0).cpu() + 1
        for tile in (data.denormalize(image), colors[mask].movedim(2, 0), colors[prediction].movedim(2, 0)):
            tiles.append(v2.functional.resize(tile, tiles[0].shape[1:] if tiles else tile.shape[1:]))
    model.train()
    save_image(make_grid(tiles, nrow=3, pad_value=1), path)


# ---------------------------------------------------------------- the same, to the letter, in all scripts

def init_processes(device):
    """-> (rank, number of processes, device), from torchrun's environment; without it, a single process."""
    rank, local_rank, world = (int(os.environ.get(name, default))
                               for name, default in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
    if device == "auto":
        mps = torch.backends.mps.is_available()
        device = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        device = torch.device("cuda", local_rank) if device == "cuda" else torch.device(device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        sys.exit(f"error: --device {device} does not work here ({str(error).splitlines()[0]}): take auto")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return rank, world, device


def amp_dtype(amp, device):
    """The type to compute in, None for float32. On a CPU bf16 is emulated, hundreds of times slower: off."""
    if amp == "auto":
        bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        amp = "off" if device.type != "cuda" else "bf16" if bf16 else "fp16"
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[amp]


def learning_rate(step, total_steps, warmup_steps, peak, floor=0.0):
    """Linear warm-up from 0, then half a cosine down to the floor."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def parameter_groups(named_parameters, weight_decay):
    """Trainable weights in two groups; no decay on biases, norms, scales, tokens and position embeddings."""
    no_decay = ("token", "pos_embed", "layer_scale", "relative_position_bias")
    groups = [{"params": [], "weight_decay": weight_decay}, {"params": [], "weight_decay": 0.0}]
    for name, param in named_parameters:
        if param.requires_grad:
            groups[param.ndim <= 1 or any(word in name for word in no_decay)]["params"].append(param)
    return groups


def save(content, path):
    """torch.save that never leaves half a file under the final name."""
    try:
        torch.save(content, path + ".tmp")
        os.replace(path + ".tmp", path)
    except (OSError, RuntimeError) as error:
        sys.exit(f"error: cannot write {path} ({error}): what was there is kept; make room, then --resume")


def load_checkpoint(path, script, config):
    """The contents of a checkpoint.pt of this script and configuration, or one sentence and the end."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        found_script, found = checkpoint["script"], checkpoint["config"]
    except Exception as error:          # torch raises many kinds for a file that is damaged or another
        sys.exit(f"error: {path} is damaged or no checkpoint ({type(error).__name__}): "
                 "delete it to start anew, or put a good copy in its place")
    other = [f"{key} {found.get(key)}, not {new}" for key, new in config.items() if new != found.get(key)]
    if found_script != script or other:
        sys.exit(f"error: {path} is of another model ({', '.join(other) or found_script}): "
                 "give the same flags as then, or another --output_dir")
    return checkpoint


def open_output(folder, resume, rank):
    """Makes the output folder and tries to write there; refuses to overwrite an earlier run's checkpoint."""
    path = f"{folder}/checkpoint.pt"
    if os.path.exists(path) and not resume:
        sys.exit(f"error: {path} is there from an earlier run: add --resume, or choose another --output_dir")
    if rank == 0:
        try:
            os.makedirs(f"{folder}/samples", exist_ok=True)
            open(f"{folder}/log.jsonl", "a" if os.path.exists(path) else "w").close()
        except OSError as error:
            sys.exit(f"error: cannot write to --output_dir {folder} ({error.strerror}): choose another")
    return path


def write_log(folder, line):
    with open(f"{folder}/log.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")


def peak_memory_mb(device):
    """Peak memory in MB: what was allocated on the GPU, else what this process held."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated() / 2 ** 20)
    unit = 2 ** 20 if sys.platform == "darwin" else 2 ** 10
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit)


def check_finite(losses, last_step):
    """Losses (tensors) of the steps up to last_step -> floats; the end, with the step, if one is infinite."""
    losses = torch.stack(losses).tolist() if losses else []
    for step, loss in enumerate(losses, last_step - len(losses) + 1):
        if not math.isfinite(loss):
            sys.exit(f"error: the loss at step {step} is {loss}: the last checkpoint is kept; "
                     "--resume with a lower --lr or with --amp off")
    return losses


# ---------------------------------------------------------------- the loop

def main():
    args = parse_args()
    rank, world, device = init_processes(args.device)
    if args.eval_only and not args.init:
        folder = args.output_dir or f"runs/finetune_{args.model or 'vit_s'}"
        args.init = f"{folder}/checkpoint.pt"
    content, weights, found = read_init(args.init) if args.init else ({}, {}, {})
    checkpoint = None
    if args.eval_only:
        if content.get("script") != "finetune":
            sys.exit(f"error: --eval_only measures a checkpoint.pt of finetune.py, {args.init} is none: "
                     "leave --eval_only out and train a head first")
        checkpoint, checkpoint_path = content, args.init
        vars(args).update(found)                                      # model and test are as they were
    else:
        resolve(args, found)
        if args.batch_size % (world * args.accum_steps):
            sys.exit(f"error: --batch_size {args.batch_size} is not a multiple of {world} processes x "
                     f"{args.accum_steps} --accum_steps: change one of them")
        checkpoint_path = open_output(args.output_dir, args.resume, rank)
    torch.manual_seed(args.seed)

    # Pictures: order, crops and augmentation depend on (seed, epoch, index), mixing on (seed, step, rank).
    segment = args.task == "segment"
    if world > 1 and rank > 0:
        dist.barrier()                                                # the first process may have to download
    train_set, val_set = (data.Segmentation(args.data, train, args.num_classes) if segment else
                          data.labelled_dataset(args.data, train, args.img_size) for train in (True, False))
    if world > 1 and rank == 0:
        dist.barrier()
    classes = None if segment else val_set.classes
    args.num_classes = args.num_classes if segment else len(classes)
    if segment:
        train_view, val_view = (data.segment_transform(args.img_size, train) for train in (True, False))
    else:
        train_view = data.finetune_transform(args.img_size, args.randaug, args.erasing)
        val_view = data.center_transform(args.test_size, args.crop_ratio)
    # Each validation image is in one process only, and in the same batch for any number of processes.
    val_set, size = data.Transformed(val_set, val_view, args.seed), 1 if segment else 64
    keys = [(0, index) for index in range(len(val_set))]
    val_loader = DataLoader(val_set, num_workers=args.num_workers,
                            batch_sampler=[keys[i:i + size] for i in range(0, len(keys), size)][rank::world])

    # Model. The position embedding is trainable now, also where it was fixed before (sec. A.1).
    config = {key: getattr(args, key) for key in ("model", "img_size", "patch_size", "pool", "norm")}
    run = config | {key: getattr(args, key) for key in ("task", "num_classes", "probe", "head_norm", "loss",
                                                        "label_smoothing", "test_size", "crop_ratio")}
    backbone = models.build_model(**config, drop_rate=args.drop_path or 0.0, dilated=segment)
    if weights and not args.eval_only:
        try:
            head_keys = models.load_weights(backbone, weights)
        except ValueError as error:
            sys.exit(f"error: --init {args.init} does not fit --model {args.model}, --patch_size "
                     f"{args.patch_size}: it {error}: give those it was made with, or another file")
    if isinstance(backbone, models.ViT):
        backbone.pos_embed.requires_grad_(True)
    model = Segmenter(backbone, args.num_classes, args.img_size) if segment else \
        Classifier(backbone, args.num_classes, args.probe, args.head_norm, args.loss, args.label_smoothing)
    if args.resume and not args.eval_only and os.path.exists(checkpoint_path):
        checkpoint = load_checkpoint(checkpoint_path, "finetune", run)
    if checkpoint:
        if checkpoint["classes"] != classes:
            sys.exit(f"error: {data.different(classes, checkpoint['classes'])} in --data {args.data} and in "
                     f"{checkpoint_path}: give the data it was trained on")
        model.load_state_dict(checkpoint["model"])
    if segment and world > 1 and device.type == "cuda":               # a GPU's few crops make poor statistics
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model = model.to(device, memory_format=torch.channels_last)       # convolutions run faster so
    dtype = amp_dtype(args.amp, device)
    if args.eval_only:
        measured = evaluate(model, val_loader, device, dtype, world)
        if rank == 0:
            print(json.dumps({"images": len(keys)} | measured))
        return dist.destroy_process_group() if world > 1 else None

    if args.label_fraction < 1:
        train_set = Subset(train_set, data.few_labels(train_set.targets, args.label_fraction, args.seed))
    steps_per_epoch = len(train_set) // args.batch_size
    if steps_per_epoch == 0:
        sys.exit(f"error: --data {args.data} has {len(train_set)} training pictures, fewer than "
                 f"--batch_size {args.batch_size}: lower it")
    sampler = (data.RepeatingSampler if args.repeats > 1 else data.EpochSampler)(
        train_set, world, rank, seed=args.seed, drop_last=True)
    loader = DataLoader(data.Transformed(train_set, train_view, args.seed), sampler=sampler, drop_last=True,
                        batch_size=args.batch_size // (world * args.accum_steps),
                        num_workers=args.num_workers, persistent_workers=args.num_workers > 0,
                        pin_memory=device.type == "cuda")
    mixing = [kind(alpha=alpha, num_classes=args.num_classes)
              for kind, alpha in ((v2.MixUp, args.mixup), (v2.CutMix, args.cutmix)) if alpha]
    mix = v2.RandomChoice(mixing) if mixing else nn.Identity()        # one of them for each batch

    if args.compile:
        model.compile()
    ddp = DistributedDataParallel(model) if world > 1 else model
    groups = layer_groups(model, args.weight_decay, args.layer_decay)
    if segment and not args.model.startswith("vit"):
        optimizer = torch.optim.SGD(groups, lr=args.lr, momentum=0.9)
    else:
        optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.999), fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    step, best, metric = 0, 0.0, "miou" if segment else "top1"
    if checkpoint:
        step, best = checkpoint["step"], checkpoint["best"]
        optimizer.load_state_dict(checkpoint["optimizer"])
        scaler.load_state_dict(checkpoint["scaler"])
    total_steps, warmup_steps = args.epochs * steps_per_epoch, round(args.warmup_epochs * steps_per_epoch)
    last_step = min(total_steps, args.max_steps or total_steps)
    if rank == 0:
        count = sum(param.numel() for param in model.parameters() if param.requires_grad) / 1e6
        print(f"{args.model}: {count:.2f} M weights to train, from "
              + (f"{args.init} (without {', '.join(head_keys) or 'a head'})" if args.init else "scratch") +
              f"\n{', '.join(f'{key} {getattr(args, key)}' for key in ['task', 'recipe', *CIM])}"
              f"\n{len(train_set)} pictures, {steps_per_epoch} steps an epoch; {device.type}, amp {dtype}; "
              f"batch {args.batch_size} = {world} processes x {args.batch_size // world // args.accum_steps} "
              f"x {args.accum_steps} accumulated; peak lr {args.lr:.3g}; from step {step}", flush=True)
        versions = {"torch": torch.__version__, "torchvision": torchvision.__version__}
        write_log(args.output_dir, vars(args) | versions | {"processes": world, "start_step": step})

    start_step, start_time, shown = step, time.time(), time.time()
    while step < last_step:
        epoch = step // steps_per_epoch
        sampler.set_epoch(epoch)
        sampler.skip = step % steps_per_epoch * (args.batch_size // world)  # after a stop by --max_steps
        batches, epoch_losses, losses = iter(loader), [], []
        epoch_start, epoch_time, data_time = step, time.time(), 0.0
        for step in range(step + 1, min((epoch + 1) * steps_per_epoch, last_step) + 1):
            if segment:
                lr = poly_rate(step - 1, total_steps, warmup_steps, args.lr, args.power)
            else:
                lr = learning_rate(step - 1, total_steps, warmup_steps, args.lr, floor=1e-6)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["lr_scale"]
            torch.manual_seed(data.seed_from(args.seed, step, rank))  # of mixing, drop path and dropout
            losses.append(torch.zeros((), device=device))
            for part in range(args.accum_steps):
                waiting = time.time()
                batch = [tensor.to(device, non_blocking=True) for tensor in next(batches)]
                data_time += time.time() - waiting
                images, labels = mix(batch)
                with nullcontext() if part == args.accum_steps - 1 or world == 1 else ddp.no_sync():
                    with torch.autocast(device.type, dtype, enabled=dtype is not None):
                        loss = ddp(images, labels) / args.accum_steps
                    scaler.scale(loss).backward()
                losses[-1] += loss.detach()
            if args.clip_grad:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

            if step == start_step + 1:                                # it warms up and compiles: not timed
                epoch_start, epoch_time, data_time = step, time.time(), 0.0
            if rank == 0 and time.time() - shown > 10:
                epoch_losses += check_finite(losses, step)
                loss, seconds = sum(epoch_losses[-len(losses):]) / len(losses), time.time() - epoch_time
                left = (time.time() - start_time) / (step - start_step) * (last_step - step)
                print(f"epoch {epoch + 1}/{args.epochs}  step {step}/{last_step}  loss {loss:.4f}  "
                      f"lr {lr:.2e}  {(step - epoch_start) * args.batch_size / seconds:.1f} img/s  "
                      f"data {data_time / seconds:.0%}  left {timedelta(seconds=round(left))}", flush=True)
                losses, shown = [], time.time()

        # The end of an epoch (or of the run): all processes evaluate, the first one writes.
        epoch_losses += check_finite(losses, step)
        seconds = time.time() - epoch_time
        loss = torch.tensor(sum(epoch_losses) / len(epoch_losses) / world, device=device)
        if world > 1:
            dist.all_reduce(loss)
        measured = evaluate(model, val_loader, device, dtype, world)
        if not all(math.isfinite(value) for value in (loss.item(), *measured.values())):
            sys.exit(f"error: the weights are not finite after step {step}: the last checkpoint is kept; "
                     "--resume with a lower --lr or with --amp off")
        best = max(best, measured[metric])
        if rank == 0:
            line = {"epoch": epoch + 1, "step": step, "loss": loss.item(), "lr": lr,
                    "img_per_s": round((step - epoch_start) * args.batch_size / seconds, 1),
                    "data_share": round(data_time / seconds, 3),
                    "peak_mem_mb": peak_memory_mb(device), **measured, f"best_{metric}": best}
            print("  ".join(f"{key} {value:.4g}" for key, value in line.items()), flush=True)
            write_log(args.output_dir, line)
            if segment:
                save_picture(f"{args.output_dir}/samples/epoch_{epoch + 1:04d}.png", model, val_set, device)
            save({"model": backbone.state_dict(), "config": config | {"mean": data.MEAN, "std": data.STD}},
                 f"{args.output_dir}/backbone.pt")
            save({"script": "finetune", "config": run, "classes": classes, "best": best, "step": step,
                  "model": model.state_dict(), "optimizer": optimizer.state_dict(),
                  "scaler": scaler.state_dict(), "args": vars(args)}, checkpoint_path)
    if rank == 0:
        print(f"wrote {args.output_dir}: checkpoint.pt, backbone.pt, log.jsonl, samples/", flush=True)
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except data.BadInput as error:      # a loader process wraps it in a traceback, its sentence comes last
        sys.exit("error: " + str(error).strip().splitlines()[-1].removeprefix("data.BadInput: "))

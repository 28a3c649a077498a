"""Fine-tuning and evaluation of pretrained backbones, or the same training from scratch, in one file.

Classification, linear and three-layer probes, few labels and segmentation, with the recipes of both papers:
energy (Wang et al., ICLR 2023, secs. A.1, B.4) and CIM (Fang et al., ICLR 2023, tables 14, 15, sec. 3.2).
--init takes a file of the pretraining scripts, whose config then chooses the recipe, or a state dict with the
parameter names of timm, MAE or torchvision.

    python finetune.py --init runs/energy_vit_nano/backbone.pt --recipe short                    # one process
    torchrun --nproc_per_node 8 finetune.py --init runs/energy_vit_s/backbone.pt --data /path/to/imagenet
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 \\
        finetune.py --init runs/cim_respix_vit_b/backbone.pt --data /path/to/imagenet            # two nodes

Measured on one core of an AMD EPYC, shared with other work, torch 2.14: after 600 steps of energy_pretrain.py
--corrupt sr (vit_nano, patches of 4, CIFAR-10), --recipe short --probe linear --epochs 2 reached 41.1 % top-1
on 2,000 test images in seven minutes; ridge regression on centre crops of 5,000 training images, 41.8 %.
"""
import argparse
import copy
import fcntl
import json
import math
import os
import resource
import sys
import time
from contextlib import suppress
from datetime import timedelta
from functools import partial

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


# ---------------------------------------------------------------- recipes
# The learning rates belong to the recipe's batch size; for another one, they are scaled linearly.

# CIM's Table 14. Decision: with random erasing as in BEiT's code, although the table does not list it.
CIM = dict(epochs=200, lr=3e-3, batch_size=1024, weight_decay=0.05, warmup_epochs=5, layer_decay=0.8,
           clip_grad=0.0, head_norm="layer", drop_path=0.1, loss="ce", label_smoothing=0.1, mixup=0.8,
           cutmix=1.0, randaug=9, erasing=0.25, repeats=1, img_size=224, test_size=224, crop_ratio=0.95)
# Table 14's learning rates by the model and objective of --init; all others take 3e-3. For ViT-S, the table
# has "3e-3 or 4e-3". Decision: REVDET takes the higher one, because ViT-B's REVDET does.
CIM_RATES = {("vit_b", "revdet"): 5e-3, ("vit_s", "revdet"): 4e-3}
# Energy: "most of the experimental settings follow" MAE (sec. 4). Sec. A.1's table was not available.
# Decision: 1e-3 at batch 1,024. A transcript of that table calls 1e-3 the *base* rate; by MAE's rule (base x
# batch / 256), that would be 4e-3 here. Decision: no new norm before the linear layer, because the paper
# replaces only that layer. With 2 % of CIFAR-10's labels (vit_nano, 600 steps of sr, then 10 epochs, mean of
# three seeds), --head_norm none reached 30.3 % top-1, layer 32.1 and batch 35.9.
ENERGY = CIM | dict(lr=1e-3, layer_decay=0.75, head_norm="none", crop_ratio=0.875)
# Energy: Table 3 (its other tables: 100 epochs); CIM: Table 14. Decision: 50 for CIM's ViT-L, too.
EPOCHS = {"vit_b": 100, "vit_l": 50}                    # other models: 200

# The columns of CIM's Table 15, named by their epochs. RSB (Wightman et al., 2021) has no random erasing.
RSB_100 = CIM | dict(epochs=100, lr=12e-3, batch_size=2048, weight_decay=0.02, layer_decay=1.0,
                     head_norm="none", drop_path=0.0, loss="bce", mixup=0.1, randaug=6, erasing=0.0,
                     img_size=160)
RSB_300 = RSB_100 | dict(epochs=300, label_smoothing=0.0, randaug=7, repeats=3, img_size=224)
RSB_600 = RSB_300 | dict(epochs=600, weight_decay=0.01, label_smoothing=0.1, mixup=0.2, drop_path=0.05)
RSB = {100: RSB_100, 300: RSB_300, 600: RSB_600}

NO_AUGMENTATION = dict(mixup=0.0, cutmix=0.0, randaug=0, erasing=0.0)
# Our own recipe, from neither paper, for small models in minutes: without augmentation and layer decay, as
# both would slow the learning down, and with the head_norm that was best above.
SHORT = ENERGY | NO_AUGMENTATION | dict(epochs=2, batch_size=32, layer_decay=1.0, head_norm="batch")

# Decision: the papers do not say how their probes are trained. As in MAE: crops, flips, 90 epochs, no weight
# decay, features standardised by a BatchNorm; but AdamW instead of LARS, which is for batches of thousands.
PROBE = ENERGY | NO_AUGMENTATION | dict(epochs=90, warmup_epochs=10, weight_decay=0.0, layer_decay=1.0,
                                        head_norm="batch", drop_path=0.0, label_smoothing=0.0)
# Our own recipe, for 5,000 images; with 50,000, --epochs 2 takes as many steps. On 5,000 CIFAR-10 images, it
# reached 38.4 % top-1; ridge regression reached 39.8 on augmented crops, 41.8 on centre crops (standard error
# 1.1).
SHORT_PROBE = PROBE | dict(epochs=20, lr=0.1, batch_size=32)

# CIM's sec. 3.2 for ViTs: 160,000 steps are 127 epochs of ADE20K. Decision: what the paper leaves open is
# as in BEiT's code (warm-up of 1,500 steps, weight decay, drop path). ConvNeXt and Swin train like ViTs.
SEGMENT = dict(epochs=127, lr=3e-4, batch_size=16, weight_decay=0.05, warmup_epochs=1.2, layer_decay=0.8,
               clip_grad=0.0, drop_path=0.1, repeats=1, img_size=512, power=1.0)
# For ResNets: SGD; 80,000 steps are 64 epochs. Decision: lr, weight decay and power are MMSegmentation's.
SEGMENT_RESNET = SEGMENT | dict(epochs=64, lr=1e-2, weight_decay=5e-4, warmup_epochs=0, layer_decay=1.0,
                                drop_path=0.0, power=0.9)

# The config entries that describe a backbone, and their defaults where neither --init nor a flag sets any.
BACKBONE = {"model": "vit_s", "img_size": 224, "patch_size": 16, "pool": "mean", "norm": "batch"}
# The other arguments that describe a model, which --eval_only takes from a checkpoint.pt, like BACKBONE's.
HEAD = ("task", "num_classes", "probe", "head_norm", "loss", "label_smoothing", "test_size", "crop_ratio")


# ---------------------------------------------------------------- arguments

def parse_args():
    p = Parser(description="Fine-tuning and evaluation of pretrained backbones.",
               allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    g = p.add_argument_group("data and model").add_argument
    g("--data", default="shapes", help="'shapes' (drawn by the program), 'cifar10' (downloaded to ./data) or "
      "a folder: train/CLASS/ and val/CLASS/; for --task segment, ADE20K's layout")
    g("--task", choices=["classify", "segment"], help="what to train for; None: classify")
    g("--init", metavar="FILE", help="backbone.pt, checkpoint.pt or, with --model, other "
      "weights; None: train from scratch")
    g("--model", choices=models.MODELS, help="None: the one in --init, else vit_s")
    g("--img_size", type=number(int, 8, 4096), help="side in pixels; None: --init's, else 224, "
      "but 160 for rsb's 100 epochs and 512 to segment")
    g("--patch_size", type=number(int, 1, 256), help="a ViT's, in pixels; None: --init's, else 16")
    g("--num_classes", type=number(int, 2, 4096), help="to segment, not counting 0 (unlabelled); None: 150")
    g("--label_fraction", type=number(float, 1e-6, 1), help="fraction of each class to train on; None: all")

    g = p.add_argument_group("recipe (None: the recipe's value)").add_argument
    g("--recipe", choices=["energy", "cim", "rsb", "short"], help="None: rsb (by --epochs) for ResNets, else "
      "that of the method that wrote --init, else energy; short: for small models, in minutes")
    g("--probe", choices=["linear", "mlp"], help="train only one layer, or three, on the frozen backbone")
    g("--head_norm", choices=["none", "layer", "batch"], help="norm before the linear layer; none: the "
      "pretrained feature as it is; layer: a new LayerNorm of a ViT's patch mean, instead of its last one; "
      "batch: for short runs")
    g("--layer_decay", type=number(float, 0.01, 1), help="ratio of a ViT block's rate to the next block's")
    g("--drop_path", type=number(float, 0, 0.99), help="chance of skipping the last block; earlier: less")
    g("--label_smoothing", type=number(float, 0, 0.99), help="fraction of a target spread over all classes")
    g("--mixup", type=number(float, 0, 100), help="MixUp's alpha; 0: off")
    g("--cutmix", type=number(float, 0, 100), help="CutMix's alpha; 0: off; with both, each batch draws one")
    g("--randaug", type=number(int, 0, 10), help="RandAugment's strength; 0: off")
    g("--erasing", type=number(float, 0, 1), help="probability of erasing a rectangle of an image")

    g = p.add_argument_group("training (None: the recipe's value)").add_argument
    g("--epochs", type=number(int, 1), help="passes over the training images")
    g("--warmup_epochs", type=number(float, 0), help="None: the recipe's, at most a fifth of the epochs")
    g("--batch_size", type=number(int, 1), help="images per optimizer step, over all processes")
    g("--accum_steps", type=number(int, 1), default=1, help="parts per batch; raise it when memory is short")
    g("--lr", type=number(float, 1e-12), help="peak rate; None: the recipe's, scaled with the batch size")
    g("--weight_decay", type=number(float, 0, 10), help="the optimizer's, on matrices and kernels only")
    g("--clip_grad", type=number(float, 0), help="largest gradient norm; 0: no clipping")
    g("--max_steps", type=number(int, 1), help="stop after this many steps (smoke runs, benchmarks)")
    g("--seed", type=number(int, 0), default=0, help="fixes weights, order, augmentation and the few labels")

    g = p.add_argument_group("machine").add_argument
    g("--device", default="auto", help="auto (cuda, else mps, else cpu), or a device's name")
    g("--amp", default="auto", choices=["auto", "bf16", "fp16", "off"],
      help="mixed precision; auto: bf16 or fp16 on a CUDA GPU, off elsewhere")
    g("--compile", action="store_true", help="torch.compile the step: a minute or two to start, then faster")
    g("--num_workers", type=number(int, 0, 1024), default=data.default_workers(),
      help="data loader workers per process")
    g("--output_dir", help="where results go; None: runs/finetune_MODEL")
    g("--resume", action="store_true", help="continue from OUTPUT_DIR/checkpoint.pt if it exists")
    g("--eval_only", action="store_true", help="measure --init or OUTPUT_DIR/checkpoint.pt, write nothing")
    args = p.parse_args()
    if args.eval_only and not args.init:
        if not args.output_dir:
            p.error("--eval_only needs a checkpoint to measure: give --init or --output_dir")
        args.init = f"{args.output_dir}/checkpoint.pt"
    return args


def read_init(path):
    """Reads --init -> (the file's content, the backbone's state dict, its config). Raises BadInput."""
    if not path:
        return {}, {}, {}
    try:
        content = models.load_weights_file(path)
        weights = content.get("model", content.get("state_dict", content))
        weights = {key.removeprefix("module."): value for key, value in weights.items()}      # DDP's prefix
    except (AttributeError, ValueError) as error:
        raise data.BadInput(f"--init {path} holds no weights ({error}): give a backbone.pt, a checkpoint.pt "
                            "or a state dict") from None
    # A checkpoint.pt holds the whole model, of which the backbone is a part.
    backbone = {key.removeprefix("backbone."): value for key, value in weights.items()
                if key.startswith("backbone.")}
    given = content.get("config")
    given = given if isinstance(given, dict) else {}
    # The config of a foreign file may have values of other types under these names.
    config = {key: given[key] for key in (*BACKBONE, "method", "objective")
              if given.get(key) and isinstance(given[key], type(BACKBONE.get(key, "")))}
    return content, backbone or weights, config


def choose_recipe(args, config):
    """-> {name: value} for the task, the model and the method that wrote --init, as its config says."""
    is_vit = args.model.startswith("vit")
    is_resnet = args.model.startswith("resnet")
    name = args.recipe
    if name is None and is_resnet:
        name = "rsb"
    elif name is None:
        name = "cim" if config.get("method") in ("cim", "beit") else "energy"

    # Segmentation and probes come first, because the named recipes are for fine-tuning a classifier.
    if args.task == "segment":
        recipe = dict(SEGMENT_RESNET if is_resnet else SEGMENT)
    elif args.probe:
        recipe = dict(SHORT_PROBE if name == "short" else PROBE)
    elif name == "short":
        recipe = dict(SHORT)
    elif name == "rsb":                                               # the longest one within --epochs
        recipe = dict(RSB[max(epochs for epochs in RSB if epochs <= max(100, args.epochs or 0))])
    elif name == "cim":
        lr = CIM_RATES.get((args.model, config.get("objective")), CIM["lr"])
        recipe = CIM | {"lr": lr, "epochs": EPOCHS.get(args.model, 200)}
    else:
        recipe = ENERGY | {"epochs": EPOCHS.get(args.model, 200)}
    if not is_vit:                                                    # these need a ViT's blocks and tokens
        recipe["layer_decay"] = 1.0
        if recipe.get("head_norm") == "layer":
            recipe["head_norm"] = "none"

    if args.task == "classify":
        # Table 15's 100 epochs train ResNets at 160 pixels and test them at 224, unless --img_size or the
        # pretraining sets one size. All others have one.
        size = args.img_size or config.get("img_size", 224)
        if args.img_size or size != 224 or is_vit:
            recipe |= {"img_size": size, "test_size": size}
        # Decision: small images are tested as a whole, not enlarged and cropped.
        if recipe["test_size"] < data.SMALL:
            recipe["crop_ratio"] = 1.0
    recipe["lr"] *= (args.batch_size or recipe["batch_size"]) / recipe["batch_size"]
    # Decision: in short runs, the warm-up takes at most a fifth of the epochs.
    recipe["warmup_epochs"] = min(recipe["warmup_epochs"], 0.2 * (args.epochs or recipe["epochs"]))
    return recipe


def resolve_from_checkpoint(args, content):
    """Takes the model's settings from --init, a checkpoint.pt of this script. Raises BadInput."""
    if content.get("script") != "finetune" or not isinstance(content.get("args"), dict):
        raise data.BadInput(f"--eval_only measures a checkpoint.pt of finetune.py, and {args.init} is not "
                            "one: leave --eval_only out and train a head first")
    for key in (*BACKBONE, *HEAD):
        value = content["args"].get(key)
        if getattr(args, key, None) not in (None, value):
            raise data.BadInput(f"--eval_only measures {args.init} as it was trained, with --{key} {value}: "
                                f"leave --{key} out")
        setattr(args, key, value)


def resolve(args, content, config):
    """Sets what no flag has set: the model from --init's config, the rest from the recipe. -> the recipe.

    With --eval_only, there is no recipe. Raises BadInput for a flag that the task does not use.
    """
    if args.eval_only:
        return resolve_from_checkpoint(args, content)
    args.task = args.task or "classify"
    args.model = args.model or config.get("model", BACKBONE["model"])
    setting, unused = f"--task {args.task}", ["num_classes"]
    if args.task == "segment":
        unused = ["recipe", "probe", "label_fraction", *(name for name in CIM if name not in SEGMENT)]
    elif args.probe:
        setting, unused = "--probe", ["num_classes", "drop_path", "layer_decay"]
    for name in unused:
        if getattr(args, name, None) is not None:
            raise data.BadInput(f"{setting} takes no --{name}: leave it out")
    if args.layer_decay not in (None, 1) and not args.model.startswith("vit"):
        raise data.BadInput(f"--layer_decay is for ViTs, not {args.model}: leave it out")
    recipe = choose_recipe(args, config)
    defaults = BACKBONE | {key: config[key] for key in BACKBONE if key in config} | recipe
    defaults |= {"num_classes": 150, "output_dir": f"runs/finetune_{args.model}"}
    for name, value in defaults.items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    return recipe


# ---------------------------------------------------------------- what is trained

class Classifier(nn.Module):
    """A backbone and a new head. With `probe`, the backbone is frozen and the head alone is trained.

        feature = backbone(image)                           # (B, width), pooled as in pretraining
        feature = mean of the last block's patch tokens     # instead, for a ViT with head_norm "layer"
        logits = linear(norm(feature))                      # probe "mlp": two hidden layers before it
        ce:   -sum(target * log softmax(logits))            # target: smoothed, mixed by MixUp or CutMix
        bce:  mean over the classes of the binary cross entropy of sigmoid(logits) and target
    """

    num_counts = 4
    metric = "top1"

    def __init__(self, backbone, num_classes, probe=None, head_norm="none", loss="ce", label_smoothing=0.0):
        super().__init__()
        self.backbone = backbone
        self.num_classes = num_classes
        self.probe = probe
        self.loss = loss
        self.label_smoothing = label_smoothing
        width = backbone.width
        # The energy paper fine-tunes "by only replacing the linear head h" (sec. 3.2) and keeps the feature.
        # BEiT, whose code CIM builds on, skips the last LayerNorm and puts a new one on the patch mean.
        self.patch_mean = head_norm == "layer" and isinstance(backbone, models.ViT)
        if self.patch_mean:
            backbone.norm.requires_grad_(False)                       # unused, and DDP would wait for it
        if probe:
            backbone.requires_grad_(False)                            # so autograd keeps no graph of it
        # After energy pretraining, all features share one large vector, which "batch" subtracts. This norm
        # needs no weights, because a linear layer follows it.
        norms = {"none": nn.Identity(), "layer": nn.LayerNorm(width, eps=1e-6),
                 "batch": nn.BatchNorm1d(width, affine=False)}
        hidden = []
        if probe == "mlp":
            # Sec. B.4: three layers of 768 channels (ViT-B's width, so here the backbone's) with ReLU.
            hidden = [nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
        linear = nn.Linear(width, num_classes)
        nn.init.trunc_normal_(linear.weight, std=2e-5)                # almost zero, as MAE and BEiT
        nn.init.zeros_(linear.bias)
        self.head = nn.Sequential(norms[head_norm], *hidden, linear)

    def train(self, mode=True):
        super().train(mode)
        self.backbone.train(mode and not self.probe)                  # freezes BatchNorm's statistics, too
        return self

    def logits(self, images):
        """(B, 3, H, W) -> (B, C)."""
        if self.patch_mean:
            feature = self.backbone.forward_tokens(images, norm=False)[:, 1:].mean(dim=1)     # (B, width)
        else:
            feature = self.backbone(images)                                                   # (B, width)
        return self.head(feature)

    def forward(self, images, labels):
        """-> loss; labels: (B,) int64, or (B, C) fractions from MixUp or CutMix."""
        logits = self.logits(images).float()
        if self.loss == "ce":
            return F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        # Decision: the targets (BCE, Table 15) stay mixed, smoothed fractions; RSB rounds them up to 1.
        targets = F.one_hot(labels, self.num_classes) if labels.ndim == 1 else labels         # (B, C)
        targets = targets * (1 - self.label_smoothing) + self.label_smoothing / self.num_classes
        return F.binary_cross_entropy_with_logits(logits, targets)

    def count(self, images, labels):
        """-> (4,) float64: number of images, sum of cross entropies, number of top-1 and of top-5 hits."""
        logits = self.logits(images).float().cpu()                    # Apple's GPUs have no float64
        labels = labels.cpu()
        loss = F.cross_entropy(logits, labels, reduction="none").double().sum()
        hits = logits.topk(min(5, self.num_classes)).indices == labels[:, None]               # (B, 5)
        return torch.stack([loss.new_tensor(len(images)), loss, hits[:, 0].sum(), hits.sum()])

    def summary(self, counts):
        """The summed counts -> {name: number}, "top1" and "top5" in percent."""
        total, loss, top1, top5 = counts.tolist()
        return {"top1": round(100 * top1 / total, 3), "top5": round(100 * top5 / total, 3),
                "val_loss": round(loss / total, 4)}


class Segmenter(nn.Module):
    """A backbone and a simple head on its feature map (CIM, sec. 3.2): one linear layer for ViTs, else FCN.

        logits = enlarge(head(backbone.forward_map(image)))    # (B, C, H, W)
        loss = mean over the labelled pixels of the cross entropy

    Masks are (B, H, W) int64: 0 = unlabelled, c = channel c - 1 of the logits.
    Differs from the paper, whose FCN is MMSegmentation's: the head is torchvision's, with one hidden
    convolution instead of two; there is no auxiliary head, crops of one class are not drawn again
    (`cat_max_ratio`), and the long side of an image is not limited.
    """

    metric = "miou"

    def __init__(self, backbone, num_classes, img_size):
        super().__init__()
        self.backbone = backbone
        self.num_classes = num_classes
        self.img_size = img_size
        self.num_counts = num_classes ** 2 + 1
        if isinstance(backbone, models.ViT):
            self.head = nn.Conv2d(backbone.width, num_classes, 1)
        else:
            self.head = FCNHead(backbone.width, num_classes)

    def logits(self, images):
        """(B, 3, H, W) -> (B, C, H, W)."""
        logits = self.head(self.backbone.forward_map(images)).float()                         # (B, C, h, w)
        return F.interpolate(logits, size=images.shape[2:], mode="bilinear", align_corners=False)

    def forward(self, images, masks):
        """-> cross entropy, averaged over the labelled pixels."""
        loss = F.cross_entropy(self.logits(images), masks - 1, ignore_index=-1, reduction="sum")
        return loss / (masks > 0).sum().clamp(min=1)

    def predict(self, images):
        """(B, 3, H, W) of any size -> logits (B, C, H, W), at a single scale.

        The short side is resized to img_size. Square windows lie along the long side, at most two thirds of a
        window apart, and their logits are averaged. Decision: for ResNets too, although only ViTs require it.
        """
        size = self.img_size
        resized = v2.functional.resize(images, [size], antialias=True)
        h, w = resized.shape[2:]
        total = images.new_zeros(len(images), self.num_classes, h, w)
        num_windows = images.new_zeros(h, w)
        last = max(h, w) - size               # the last window's offset along the long side
        for offset in torch.linspace(0, last, 1 + math.ceil(1.5 * last / size)).long().tolist():
            y = min(offset, h - size)                                 # one of y and x is 0
            x = min(offset, w - size)
            window = (..., slice(y, y + size), slice(x, x + size))
            total[window] += self.logits(resized[window])
            num_windows[window] += 1
        return F.interpolate(total / num_windows, size=images.shape[2:], mode="bilinear", align_corners=False)

    def count(self, images, masks):
        """-> (C * C + 1,) float64: labelled pixels by (truth, prediction), and the sum of cross entropies."""
        logits = self.predict(images)
        loss = F.cross_entropy(logits, masks - 1, ignore_index=-1, reduction="none").cpu().double().sum()
        pairs = ((masks - 1) * self.num_classes + logits.argmax(dim=1))[masks > 0].cpu()
        return torch.cat([pairs.bincount(minlength=self.num_classes ** 2).double(), loss[None]])

    def summary(self, counts):
        """The summed counts -> {name: number}, "miou" and "pixel_acc" in percent. Raises BadInput.

        mIoU is the mean over the classes that occur in the validation set's masks or in the predictions.
        """
        confusion = counts[:-1].view(self.num_classes, -1)            # (truth, prediction)
        total = confusion.sum()
        if total == 0:
            raise data.BadInput("all pixels of the validation masks are 0, unlabelled: check --data")
        hits = confusion.diag()
        union = confusion.sum(dim=0) + confusion.sum(dim=1) - hits
        return {"miou": round(100 * (hits / union)[union > 0].mean().item(), 3),
                "pixel_acc": round(100 * (hits.sum() / total).item(), 3),
                "val_loss": round((counts[-1] / total).item(), 4)}


def layer_groups(model, weight_decay, layer_decay):
    """The optimizer's groups, each with an lr_scale: layer_decay ** (L + 1 - layer), L the number of blocks.

    As in BEiT, layer 0 is the patch embedding with class token and positions, layer i + 1 is block i, and
    layer L + 1 is everything else.
    """
    depth = len(getattr(model.backbone, "blocks", ()))                # only ViTs have them
    layers = {}                                                       # layer: [(name, parameter), ...]
    for name, param in model.named_parameters():
        layer = depth + 1
        if name.startswith(("backbone.patch_embed.", "backbone.cls_token", "backbone.pos_embed")):
            layer = 0
        elif name.startswith("backbone.blocks."):
            layer = int(name.split(".")[2]) + 1
        layers.setdefault(layer, []).append((name, param))
    groups = []
    for layer, named in layers.items():
        for group in models.parameter_groups(named, weight_decay):
            groups.append(group | {"lr_scale": layer_decay ** (depth + 1 - layer)})
    return [group for group in groups if group["params"]]


def build_optimizer(args, model):
    """-> SGD for segmentation with a ResNet (CIM, sec. 3.2), else AdamW (tables 14 and 15)."""
    groups = layer_groups(model, args.weight_decay, args.layer_decay)
    if args.task == "segment" and args.model.startswith("resnet"):
        return torch.optim.SGD(groups, lr=args.lr, momentum=0.9)
    return torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.999), fused=True)


def scheduled_rate(args, step, total_steps, warmup_steps):
    """Linear warm-up from 0, then half a cosine or, to segment, (1 - progress) ** power (CIM, sec. 3.2)."""
    if args.task == "classify" or step < warmup_steps:
        # Decision: the cosine ends at 1e-6, as in BEiT's and MAE's code.
        return learning_rate(step, total_steps, warmup_steps, args.lr, floor=min(1e-6, args.lr))
    return args.lr * (1 - (step - warmup_steps) / max(1, total_steps - warmup_steps)) ** args.power


# ---------------------------------------------------------------- data and model

def build_loader(args, train, rank, world, pin_memory=False):
    """-> DataLoader of this process's training or validation images, with labels or masks. Raises BadInput.

    Order, crops and augmentation depend on (seed, epoch, index) alone, not on the number of processes.
    """
    if args.task == "segment":
        dataset = data.Segmentation(args.data, train, args.num_classes)
        transform = data.segment_transform(args.img_size, train)
    else:
        dataset = data.labelled_dataset(args.data, train, args.img_size)
        if train:
            transform = data.finetune_transform(args.img_size, args.randaug, args.erasing)
        else:
            transform = data.center_transform(args.test_size, args.crop_ratio)
    if not train:
        # Each image is in one process only, and in the same batch for any number of processes. A sampler
        # that pads would count some images twice.
        batch_size = 1 if args.task == "segment" else 64              # the masks differ in size
        keys = [(0, index) for index in range(len(dataset))]          # (epoch, index)
        batches = [keys[i:i + batch_size] for i in range(0, len(keys), batch_size)]
        return DataLoader(data.Transformed(dataset, transform, args.seed), num_workers=args.num_workers,
                          batch_sampler=batches[rank::world])

    if args.label_fraction:
        dataset = Subset(dataset, data.few_labels(dataset.targets, args.label_fraction, args.seed))
    parts = world * args.accum_steps
    if args.batch_size % parts or args.batch_size > len(dataset):
        raise data.BadInput(f"--batch_size {args.batch_size} must be a multiple of {world} processes x "
                            f"{args.accum_steps} --accum_steps, and at most the {len(dataset)} training "
                            f"images of --data {args.data}")
    sampler = data.RepeatingSampler(dataset, world, rank, args.seed, args.batch_size, args.repeats)
    return DataLoader(data.Transformed(dataset, transform, args.seed), sampler=sampler, drop_last=True,
                      batch_size=args.batch_size // parts, num_workers=args.num_workers,
                      persistent_workers=args.num_workers > 0, pin_memory=pin_memory)


def build_mixing(args):
    """-> function that mixes [images, labels]. Decision: each batch gets MixUp or CutMix, as in BEiT."""
    mixes = [mix(alpha=alpha, num_classes=args.num_classes)
             for mix, alpha in [(v2.MixUp, args.mixup), (v2.CutMix, args.cutmix)] if alpha]
    return v2.RandomChoice(mixes) if mixes else nn.Identity()


def build_data_and_model(args, content, weights, device, rank, world):
    """-> (loader of validation images, class names or None for segmentation, model). Raises BadInput."""
    is_segment = args.task == "segment"
    try:
        val_loader = build_loader(args, False, rank, world)
        classes = val_loader.dataset.dataset.classes
        args.num_classes = len(classes) if classes else args.num_classes
        torch.manual_seed(args.seed)
        backbone = models.build_model(args.model, args.img_size, args.patch_size, args.pool, norm=args.norm,
                                      drop_rate=args.drop_path or 0.0, dilated=is_segment)
        if args.init:
            models.load_weights(backbone, weights)
        if isinstance(backbone, models.ViT):
            # Decision: even if it was fixed, as the energy paper has it for sorting.
            backbone.pos_embed.requires_grad_(True)
        if is_segment:
            model = Segmenter(backbone, args.num_classes, args.img_size)
        else:
            model = Classifier(backbone, args.num_classes, args.probe, args.head_norm, args.loss,
                               args.label_smoothing)
        model = model.to(device, memory_format=torch.channels_last)   # faster convolutions
        if args.eval_only:
            check_classes(classes, content, args)
            model.load_state_dict(content["model"])
        else:
            # A dry step of a copy finds what cannot work: images too small, a BatchNorm over a single value.
            count = min(2, args.batch_size // (world * args.accum_steps))
            images = torch.zeros(count, 3, args.img_size, args.img_size, device=device)
            labels = images[:, 0] if is_segment else images[:, 0, 0, 0]
            with torch.no_grad():
                copy.deepcopy(model).train()(images, labels.long())
    except torch.OutOfMemoryError:
        raise
    # A file whose settings were altered by hand may raise any of these.
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = models.one_line(error)
        if args.eval_only:
            raise data.BadInput(f"--init {args.init} is damaged ({reason}): give another one") from None
        raise data.BadInput(f"{args.model}, --init {args.init}, --img_size {args.img_size}, --patch_size "
                            f"{args.patch_size} and --batch_size {args.batch_size} do not fit together "
                            f"({reason}): change one of them") from None
    if is_segment and world > 1 and device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)        # a GPU's few crops make poor statistics
    return val_loader, classes, model


def backbone_config(args, init_config):
    """-> the config of this run's backbone.pt. --init's method and objective stay in it, because they choose
    the recipe of whoever fine-tunes that file again.
    """
    config = {key: getattr(args, key) for key in BACKBONE} | {"mean": data.MEAN, "std": data.STD}
    return {"method": "finetune", "objective": args.task} | init_config | config


def check_classes(classes, checkpoint, args):
    """Raises BadInput unless --data has the classes that the checkpoint was trained on."""
    saved = checkpoint["classes"]
    if saved != classes:
        difference = data.describe_difference(saved or [], classes or [], "the checkpoint", "--data")
        raise data.BadInput(f"--data {args.data} has other classes than the checkpoint ({difference}): give "
                            "the data that it was trained on")


# ---------------------------------------------------------------- what is measured and shown

@torch.no_grad()
def evaluate(model, loader, device, dtype, world):
    """-> {"top1": %, "top5": %, "val_loss"} or {"miou": %, "pixel_acc": %, "val_loss"} of all images."""
    if world > 1:
        # BatchNorm's statistics differ between processes. All take those of the first one, which are saved.
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
    model.eval()
    counts = torch.zeros(model.num_counts, dtype=torch.float64)
    for images, labels in loader:
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            counts += model.count(images.to(device), labels.to(device))
    if world > 1:
        counts = counts.to(device)
        dist.all_reduce(counts)
    return together(model.summary, counts)


@torch.no_grad()
def save_picture(path, model, dataset, device):
    """One row for each of up to four validation images: image, truth, prediction; unlabelled is black.

    The model is in eval mode, and the dataset yields (image (3, H, W), mask (H, W)) of different sizes.
    """
    colors = torch.rand(1 + model.num_classes, 3, generator=torch.Generator().manual_seed(0))
    colors[0] = 0
    tiles = []
    for i in torch.linspace(0, len(dataset) - 1, min(4, len(dataset))).long().tolist():
        image, mask = dataset[0, i]
        prediction = model.predict(image[None].to(device))[0].argmax(dim=0).cpu() + 1
        tiles.append(data.denormalize(image[None])[0])                # (3, H, W)
        tiles.append(colors[mask].movedim(2, 0))
        tiles.append(colors[prediction].movedim(2, 0))
    tiles = [v2.functional.resize(tile, tiles[0].shape[1:]) for tile in tiles]
    write_file(path, partial(save_image, make_grid(tiles, nrow=3, pad_value=1), format="png"))


def start_log(args, recipe, model, num_images, step, device, dtype, world):
    """Prints what is trained, and by which recipe; logs all arguments and the versions."""
    count = sum(param.numel() for param in model.parameters() if param.requires_grad) / 1e6
    print(f"{args.task} {args.model}: {count:.2f} M weights to train, from {args.init or 'scratch'}\n"
          f"{', '.join(f'{name} {getattr(args, name)}' for name in recipe)}\n"
          f"{args.data}: {num_images} images, {num_images // args.batch_size} steps an epoch; "
          f"{world} processes on {device.type}, amp {dtype}; from step {step}", flush=True)
    versions = {"torch": torch.__version__, "torchvision": torchvision.__version__}
    write_log(args.output_dir, vars(args) | versions | {"processes": world, "start_step": step})


# ---------------------------------------------------------------- helpers, identical in all three scripts

class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one sentence, without the usage of every flag."""

    def error(self, message):
        raise data.BadInput(f"{message} (see --help)")


def number(kind, low, high=1e9):
    """-> an argparse type: an int or a float between low and high, which also rules out nan and inf."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low:g} and {high:g}")
        return value
    parse.__name__ = kind.__name__                                    # for argparse's "invalid float value"
    return parse


def init_processes(device):
    """-> (rank, number of processes, device), read from torchrun's environment; one process without it."""
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    if device == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        device = accelerator.type if accelerator else "cpu"
    try:
        if device == "cuda":
            device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
            if 0 < torch.cuda.device_count() < int(os.environ.get("LOCAL_WORLD_SIZE", 1)):
                raise RuntimeError("fewer GPUs than processes")
        device = torch.device(device)
        torch.zeros(1, device=device).item()
    except (AssertionError, ImportError, RuntimeError) as error:
        raise data.BadInput(f"--device {device} does not work here ({str(error).splitlines()[0]}): choose "
                            "auto, and start no more processes than the machine has GPUs") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if world > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        device_id = device if device.type == "cuda" else None
        # The timeout is an hour, because the other processes wait while the first one downloads.
        dist.init_process_group(backend, timeout=timedelta(hours=1), device_id=device_id)
    return rank, world, device


def together(function, *args, first_only=False):
    """-> function(*args), called in each process, or with first_only in the first one, whose result all get.

    If it fails in one process, all raise that error.
    """
    result = error = None
    try:
        if not first_only or int(os.environ.get("RANK", 0)) == 0:
            result = function(*args)
    except (data.BadInput, OSError) as caught:
        error = str(caught) or repr(caught)
    if dist.is_initialized():
        outcomes = [None] * dist.get_world_size()
        dist.all_gather_object(outcomes, (error, result if first_only else None))
        error = next((outcome[0] for outcome in outcomes if outcome[0]), None)
        result = outcomes[0][1] if first_only else result
    if error:
        if dist.is_initialized():
            dist.destroy_process_group()                              # tells run() that all have the error
        raise data.BadInput(error)
    return result


def amp_dtype(amp, device):
    """-> autocast's dtype, or None. "auto" is off on a CPU: emulated bf16 is hundreds of times slower."""
    if amp == "auto" and device.type != "cuda":
        amp = "off"
    elif amp == "auto":
        amp = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[amp]


def learning_rate(step, total_steps, warmup_steps, peak, floor=0.0):
    """Linear warm-up from 0, then half a cosine down to the floor."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def open_output(folder, resume):
    """Creates and locks the output folder. -> True if the run continues from the checkpoint.pt in it."""
    results = [name for name in ("checkpoint.pt", "backbone.pt") if os.path.exists(f"{folder}/{name}")]
    if results and not (resume and "checkpoint.pt" in results):
        way_on = ", or add --resume to continue from it" if "checkpoint.pt" in results else ""
        raise data.BadInput(f"--output_dir {folder} holds the {results[0]} of an earlier run: choose another "
                            f"one{way_on}")
    try:
        os.makedirs(f"{folder}/samples", exist_ok=True)
        # Loader workers do not inherit the lock. The file is never closed: the lock ends with the process.
        fcntl.lockf(os.open(f"{folder}/.lock", os.O_CREAT | os.O_RDWR), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        reason = "another run is using it" if isinstance(error, BlockingIOError) else error.strerror
        raise data.BadInput(f"cannot write to --output_dir {folder} ({reason}): choose another") from None
    return bool(results)


def write_file(path, write):
    """Calls write(temporary path) and renames the file, so that `path` never holds a half-written one."""
    try:
        write(path + ".tmp")
        os.replace(path + ".tmp", path)
    except (OSError, RuntimeError) as error:
        raise data.BadInput(f"cannot write {path} ({str(error).splitlines()[0]}): the earlier file is kept; "
                            "make room, then --resume") from None
    finally:
        with suppress(OSError):
            os.remove(path + ".tmp")


# The arguments that may change when a run is resumed. The others determine the method or the images' order.
MAY_CHANGE = ("epochs", "warmup_epochs", "lr", "clip_grad", "max_steps", "accum_steps", "data", "device",
              "amp", "compile", "num_workers", "tokenizer_dir", "freeze_generator", "output_dir", "resume")


def load_checkpoint(path, script, args, states):
    """Loads a checkpoint.pt of this script into the states, {"model": model, ...}. -> the file's content."""
    try:
        checkpoint = models.load_weights_file(path)
        conflicts = [f"--{key} {value}" for key, value in checkpoint["args"].items()
                     if key not in MAY_CHANGE and getattr(args, key, value) != value]
        if checkpoint["script"] != script or conflicts:
            raise ValueError(f"it was written by {checkpoint['script']}.py {' '.join(conflicts)}")
        for name, state in states.items():
            if name != "scaler" or checkpoint["scaler"]:              # empty in a run without fp16
                state.load_state_dict(checkpoint[name])
        for param, values in states["optimizer"].state.items():       # fused AdamW does not check shapes
            if any(value.ndim and value.shape != param.shape for value in values.values()):
                raise ValueError("the optimizer's state does not fit the weights")
        if not 0 <= checkpoint["step"] < 1e12:
            raise ValueError(f"its step count is {checkpoint['step']}")
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        raise data.BadInput(f"cannot continue from {path} ({reason.removeprefix('ValueError: ')}): --resume "
                            "needs the script, the flags and the folder of the run that wrote it") from None
    return checkpoint


def require_finite(value, step):
    """-> the value: a loss, or a sum that includes one. Raises BadInput if it is not finite."""
    if not math.isfinite(value):
        raise data.BadInput(f"the loss is not finite at or before step {step}: the last checkpoint is kept; "
                            "--resume with a lower --lr, or with --amp off")
    return value


def write_log(folder, line):
    with open(f"{folder}/log.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")


def peak_memory_mb(device):
    """Peak memory in MB: allocated on the GPU, or without one, resident in this process."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated() / 2 ** 20)
    units_per_mb = 2 ** 20 if sys.platform == "darwin" else 2 ** 10   # bytes on macOS, KiB elsewhere
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / units_per_mb)


def run(main):
    """Runs main(). An error that the user can fix ends it with one sentence, which is printed only once."""
    try:
        main()
        if dist.is_initialized():
            dist.destroy_process_group()
    except (data.BadInput, OSError, torch.OutOfMemoryError) as error:
        if int(os.environ.get("LOCAL_RANK", 0)) > 0 and not dist.is_initialized():
            time.sleep(5)     # if the machine's first process has this error too, it ends this one meanwhile
        # A loader worker wraps its error in a traceback, whose last line is the sentence.
        message = (str(error).strip() or repr(error)).splitlines()[-1].removeprefix("data.BadInput: ")
        sys.exit(f"error: {message}")
    except KeyboardInterrupt:
        sys.exit("stopped; --resume continues from the last checkpoint")
    except RuntimeError as error:
        if "DataLoader worker" in str(error):
            reason = str(error).splitlines()[0]
            sys.exit(f"error: {reason} Lower --num_workers if memory is short, then --resume")
        if not dist.is_initialized() or "onnection" not in str(error):
            raise
        sys.exit(f"stopped, because another process cannot be reached: {' '.join(str(error).split())}")


# ---------------------------------------------------------------- the loop

def main():
    args = parse_args()
    rank, world, device = init_processes(args.device)
    dtype = amp_dtype(args.amp, device)
    content, weights, init_config = together(read_init, args.init)
    recipe = together(resolve, args, content, init_config)
    resume = not args.eval_only and together(open_output, args.output_dir, args.resume, first_only=True)
    if args.data == "cifar10":
        together(lambda: len(data.cifar10()), first_only=True)        # downloads it while the others wait
    val_loader, classes, model = together(build_data_and_model, args, content, weights, device, rank, world)
    if args.eval_only:
        measured = evaluate(model, val_loader, device, dtype, world)
        if rank == 0:
            print(json.dumps({"images": len(val_loader.dataset)} | measured))
        return

    del content, weights                                              # --init's, now copied into the model
    loader = together(build_loader, args, True, rank, world, device.type == "cuda")
    mix = build_mixing(args)
    if args.compile:
        model.compile()
    ddp = model
    if world > 1:
        ddp = DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
    optimizer = build_optimizer(args, model)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    config = backbone_config(args, init_config)
    step = 0                                                          # steps done
    best = 0.0                                                        # the best epoch's metric
    if resume:
        states = {"model": model, "optimizer": optimizer, "scaler": scaler}
        checkpoint = together(load_checkpoint, f"{args.output_dir}/checkpoint.pt", "finetune", args, states)
        together(check_classes, classes, checkpoint, args)
        step, best = checkpoint["step"], checkpoint["best"]

    steps_per_epoch = len(loader.dataset) // args.batch_size
    total_steps = args.epochs * steps_per_epoch
    warmup_steps = round(args.warmup_epochs * steps_per_epoch)
    last_step = min(total_steps, args.max_steps or total_steps)
    if rank == 0:
        start_log(args, recipe, model, len(loader.dataset), step, device, dtype, world)

    first_step, shown = step, time.time()
    while step < last_step:
        epoch = step // steps_per_epoch
        epoch_end = min((epoch + 1) * steps_per_epoch, last_step)
        loader.sampler.set_epoch(epoch, skip=step % steps_per_epoch * (args.batch_size // world))
        batches = iter(loader)
        epoch_loss = torch.zeros((), device=device)
        epoch_start = step
        timed_from, start_time = step, time.time()
        model.train()                                                 # a probe's backbone stays in eval mode
        while step < epoch_end:
            lr = scheduled_rate(args, step, total_steps, warmup_steps)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["lr_scale"]
            # Mixing and drop path use this seed, so that a resumed run draws the same as an unbroken one.
            torch.manual_seed(data.seed_from(args.seed, step, rank))
            for i in range(args.accum_steps):
                batch = [tensor.to(device, non_blocking=True) for tensor in next(batches)]
                images, labels = mix(batch)
                # DDP averages the gradients only after the last part of a batch.
                ddp.require_backward_grad_sync = i == args.accum_steps - 1
                with torch.autocast(device.type, dtype, enabled=dtype is not None):
                    loss = ddp(images, labels) / args.accum_steps
                scaler.scale(loss).backward()
                epoch_loss += loss.detach()
            if args.clip_grad:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            step += 1

            if rank == 0 and time.time() - shown > 10:
                loss = require_finite(epoch_loss.item() / (step - epoch_start), step)
                shown = time.time()
                seconds = (shown - start_time) / (step - timed_from)  # per step
                print(f"epoch {epoch + 1}/{args.epochs}  step {step}/{last_step}  loss {loss:.4f}  "
                      f"lr {lr:.2e}  {args.batch_size / seconds:.1f} img/s  "
                      f"left {timedelta(seconds=round(seconds * (last_step - step)))}", flush=True)
            if step == first_step + 1:                                # warm-up and compilation: not timed
                epoch_loss.item()                                     # waits for the GPU
                timed_from, start_time = step, time.time()

        # The end of an epoch (or of the run): all processes evaluate, the first one writes.
        loss = epoch_loss / ((step - epoch_start) * world)
        if world > 1:
            dist.all_reduce(loss)
        loss = loss.item()                                            # waits for the GPU
        seconds = time.time() - start_time
        memory = peak_memory_mb(device)                               # before evaluation adds to it
        measured = evaluate(model, val_loader, device, dtype, world)
        together(require_finite, loss + sum(measured.values()), step)
        best = max(best, measured[model.metric])
        if rank == 0:
            line = {"epoch": epoch + 1, "step": step, "loss": loss, "lr": lr,
                    "img_per_s": round((step - timed_from) * args.batch_size / seconds, 2),
                    "peak_mem_mb": memory, **measured, f"best_{model.metric}": best}
            print("  ".join(f"{key} {value:.4g}" for key, value in line.items()), flush=True)
            write_log(args.output_dir, line)
            if args.task == "segment":
                save_picture(f"{args.output_dir}/samples/epoch_{epoch + 1:04d}.png", model,
                             val_loader.dataset, device)
            content = {"script": "finetune", "config": config, "args": vars(args), "classes": classes,
                       "step": step, "best": best, "model": model.state_dict(),
                       "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
            write_file(f"{args.output_dir}/checkpoint.pt", partial(torch.save, content))
    if rank == 0:
        write_file(f"{args.output_dir}/backbone.pt",
                   partial(torch.save, {"model": model.backbone.state_dict(), "config": config}))
        samples = ", samples/" if args.task == "segment" else ""
        print(f"wrote {args.output_dir}: checkpoint.pt, backbone.pt, log.jsonl{samples}", flush=True)


if __name__ == "__main__":
    run(main)

"""Fine-tuning and evaluation of pretrained backbones, or the same training from scratch, in one file.

Classification, linear and three-layer probes, few labels and segmentation. The recipes are CIM's (Fang et
al., ICLR 2023, tables 14, 15, sec. 3.2) and, for the energy method (Wang et al., ICLR 2023, secs. 4, A.2,
B.4), mostly MAE's, because the text at hand lacks that paper's Table A.
--init takes a file of the pretraining scripts, whose config then chooses the recipe, or a state dict with the
parameter names of timm, MAE or torchvision.

    python finetune.py --init runs/energy_vit_nano/backbone.pt --recipe short   # below: one node, two nodes
    torchrun --nproc_per_node 8 \\
        finetune.py --init runs/energy_vit_s/backbone.pt --data /path/to/imagenet --compile
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 \\
        finetune.py --init runs/cim_respix_vit_b/backbone.pt --data /path/to/imagenet --compile

Measured: after `python energy_pretrain.py --recipe short`, the first command with --label_fraction 0.02 and
--epochs 20 takes 40 seconds on two cores of an AMD EPYC (torch 2.14). Its top-1 on held-out shapes is 79.6 %,
from scratch 72.5 % (means of three seeds).
"""
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")    # before torch starts: idle threads block a busy CPU

import copy
import json
import math
import sys
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Subset
from torchvision.models.segmentation.fcn import FCNHead
from torchvision.transforms import v2
from torchvision.utils import make_grid

import data
import models
from data import number


# ---------------------------------------------------------------- recipes
# The learning rates belong to the recipe's batch size; for another one, they are scaled linearly.

# CIM's Table 14. Decision: with random erasing as in BEiT's code, although the table does not list it.
CIM = dict(epochs=200, lr=3e-3, batch_size=1024, weight_decay=0.05, warmup_epochs=5, layer_decay=0.8,
           clip_grad=0.0, head_norm="layer", drop_path=0.1, loss="ce", label_smoothing=0.1, mixup=0.8,
           cutmix=1.0, randaug=9, erasing=0.25, repeats=1, img_size=224, test_size=224, crop_ratio=0.95)
# Table 14's learning rates by the model and objective of --init; its others are 3e-3. For ViT-S, the table
# has "3e-3 or 4e-3". Decision: REVDET takes the higher one, because ViT-B's REVDET does. Decision: ViT-L,
# which the table lacks, takes ViT-B's values, but 50 epochs.
CIM_RATES = {("vit_b", "revdet"): 5e-3, ("vit_l", "revdet"): 5e-3, ("vit_s", "revdet"): 4e-3}
# Energy: "most of the experimental settings follow" MAE (sec. 4); Table A, with the others, is lost.
# Decision: batch, augmentation and crops are MAE's, and so is drop path, but 0.1 for ViT-L, too, where MAE
# has 0.2. Decision: a *base* rate of 1e-3 and a layer decay of 0.75, the pair of defaults of MAE's public
# code; by its rule (base x batch / 256), the rate is 4e-3 at a batch of 1,024. Decision: no new norm before
# the linear layer, as the paper replaces only that layer. With 2 % of CIFAR-10's labels (vit_nano, 600 steps
# of sr, then 10 epochs at 1e-3, mean of three seeds), --head_norm none reached 30.3 % top-1, layer 32.1 and
# batch 35.9.
ENERGY = CIM | dict(lr=4e-3, layer_decay=0.75, head_norm="none", crop_ratio=0.875)
# ViT-S and ViT-B as in CIM's Table 14. Decision: energy takes these epochs, too, as its Table 3 has 200, 100
# and, for ViT-L, 50 (its Tables 1 and 2: 100).
EPOCHS = {"vit_b": 100, "vit_l": 50}                    # other models: 200

# The columns of CIM's Table 15, named by their epochs. RSB (Wightman et al., 2021) has no random erasing, and
# repeats each image three times where the table has a tick.
# Decision: energy's ResNet takes them too, and CIM's x2 and x4 train at 160 pixels like ResNet-50.
RSB_100 = CIM | dict(epochs=100, lr=12e-3, batch_size=2048, weight_decay=0.02, layer_decay=1.0,
                     head_norm="none", drop_path=0.0, loss="bce", mixup=0.1, randaug=6, erasing=0.0,
                     img_size=160)
RSB_300 = RSB_100 | dict(epochs=300, label_smoothing=0.0, randaug=7, repeats=3, img_size=224)
RSB_600 = RSB_300 | dict(epochs=600, weight_decay=0.01, label_smoothing=0.1, mixup=0.2, drop_path=0.05)
RSB = {100: RSB_100, 300: RSB_300, 600: RSB_600}

NO_AUGMENTATION = dict(mixup=0.0, cutmix=0.0, randaug=0, erasing=0.0)
# Our own recipe, from neither paper, for small models in minutes: without augmentation and layer decay, as
# both would slow the learning down, and with the head_norm that was best above.
SHORT = ENERGY | NO_AUGMENTATION | dict(epochs=2, lr=1e-3, batch_size=32, layer_decay=1.0, head_norm="batch")

# Decision: the papers do not say how their probes are trained. As in MAE: crops, flips, 90 epochs, no weight
# decay, features standardised by a BatchNorm; but AdamW instead of LARS, which is for batches of thousands.
PROBE = ENERGY | NO_AUGMENTATION | dict(epochs=90, lr=1e-3, warmup_epochs=10, weight_decay=0.0,
                                        layer_decay=1.0, head_norm="batch", drop_path=0.0,
                                        label_smoothing=0.0)
# Our own recipe, for 5,000 images; with 50,000, --epochs 2 takes as many steps. On 5,000 CIFAR-10 images, it
# reached 38.4 % top-1; ridge regression reached 39.8 on augmented crops, 41.8 on centre crops (standard error
# 1.1).
SHORT_PROBE = PROBE | dict(epochs=20, lr=0.1, batch_size=32)

# CIM's sec. 3.2 for ViTs: 160,000 steps are 127 epochs of ADE20K. Decision: what the paper leaves open is
# as in BEiT's code (warm-up of 1,500 steps, weight decay, drop path). Decision: energy's ViTs take it, too,
# as that paper names no recipe, and ConvNeXt and Swin train like ViTs.
SEGMENT = dict(epochs=127, lr=3e-4, batch_size=16, weight_decay=0.05, warmup_epochs=1.2, layer_decay=0.8,
               clip_grad=0.0, drop_path=0.1, repeats=1, img_size=512, power=1.0)
# For ResNets: SGD; 80,000 steps are 64 epochs. Decision: lr, weight decay and power are MMSegmentation's;
# here, weight decay spares biases and norms, and the rate ends at 0.
SEGMENT_RESNET = SEGMENT | dict(epochs=64, lr=1e-2, weight_decay=5e-4, warmup_epochs=0, layer_decay=1.0,
                                drop_path=0.0, power=0.9)

# The flags that describe a backbone, and their values where neither --init nor a flag sets any.
BACKBONE = {"model": "vit_s", "img_size": 224, "patch_size": 16, "pool": "mean", "norm": "batch",
            "mean": data.MEAN, "std": data.STD}
# The other arguments that describe a model, which --eval_only takes from a checkpoint.pt, like BACKBONE's.
HEAD = ("task", "num_classes", "probe", "head_norm", "loss", "label_smoothing", "test_size", "crop_ratio")


# ---------------------------------------------------------------- arguments

def parse_args():
    p = data.Parser("Fine-tuning and evaluation of pretrained backbones.")
    g = p.add_argument_group("data and model").add_argument
    g("--data", default="shapes", help="'shapes' (drawn by the program), 'cifar10' (downloaded to ./data) or "
      "a folder: train/CLASS/ and val/CLASS/; for --task segment, ADE20K's layout")
    g("--task", choices=["classify", "segment"], help="what to train for; if not given, classify")
    g("--init", metavar="FILE", help="backbone.pt, checkpoint.pt or, with --model, a state dict (.pth, "
      ".safetensors) of timm, DeiT, MAE, DINO or torchvision; if not given, training starts from scratch")
    g("--model", choices=models.MODELS, metavar="NAME", help="if not given, the one in --init, else vit_s")
    g("--img_size", type=number(int, 8, 4096), help="side in pixels; if not given, --init's, else 224, "
      "but 160 for rsb's 100 epochs, and 512 to segment what was pretrained at 224")
    g("--patch_size", type=number(int, 1, 256), help="a ViT's, in pixels; if not given, --init's, else 16")
    g("--pool", choices=["cls", "mean"],
      help="a ViT's feature: class token or patch mean; if not given, --init's, else mean")
    g("--norm", choices=["batch", "group"], help="a ResNet's; if not given, --init's, else batch")
    g("--mean", type=number(float, 0, 1), nargs=3, metavar="M",
      help="of red, green and blue, to normalise images with; if not given, --init's, else ImageNet's")
    g("--std", type=number(float, 0.001, 1), nargs=3, metavar="S",
      help="as --mean; both are .5 .5 .5 for some of timm's ViTs")
    g("--num_classes", type=number(int, 2, 4096),
      help="to segment, not counting 0 (unlabelled); if not given, 150")
    g("--label_fraction", type=number(float, 1e-6, 1),
      help="fraction of each class to train on; if not given, all. Decision: drawn, not a published list")

    g = p.add_argument_group("recipe (if not given, the recipe's value)").add_argument
    g("--recipe", choices=["energy", "cim", "rsb", "short"],
      help="if not given, rsb (by --epochs) for ResNets, else that of the method that wrote --init, else "
      "energy; short: for small models, in minutes")
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

    g = p.add_argument_group("training (if not given, the recipe's value)").add_argument
    g("--epochs", type=number(int, 1), help="passes over the training images")
    g("--warmup_epochs", type=number(float, 0), help="the recipe's is at most a fifth of the epochs")
    g("--batch_size", type=number(int, 1), help="images per optimizer step, over all processes")
    g("--accum_steps", type=number(int, 1), default=1, help="parts per batch; raise it when memory is short")
    g("--lr", type=number(float, 1e-12),
      help="peak learning rate; the recipe's is scaled with the batch size")
    g("--weight_decay", type=number(float, 0, 10), help="the optimizer's, on matrices and kernels only")
    g("--clip_grad", type=number(float, 0), help="largest gradient norm; 0: no clipping")
    data.add_run_flags(p)
    p.add_argument("--eval_only", action="store_true",
                   help="measure the checkpoint.pt in --init or OUTPUT_DIR, and write nothing")

    typed = p.parse_args()                                            # what is not typed is None
    if typed.eval_only:
        return resolve_from_checkpoint(p, typed)
    config = read_config(typed.init) if typed.init else {}
    typed.task = typed.task or "classify"
    typed.model = typed.model or config.get("model", BACKBONE["model"])
    refuse_unused(p, typed)
    recipe = choose_recipe(typed, config)
    backbone = {name: config.get(name, default) for name, default in BACKBONE.items() if name not in recipe}
    settings = {"task": typed.task, **backbone, **recipe, "num_classes": 150,
                "output_dir": f"runs/finetune_{typed.model}"}
    flags = {name: value for name, value in settings.items() if hasattr(typed, name)}
    # Of a flag given twice, the last one counts: the typed one.
    args = p.parse_args([*data.as_flags(flags), *sys.argv[1:]])
    vars(args).update({name: value for name, value in settings.items() if name not in flags})
    args.recipe_values = {name: getattr(args, name) for name in recipe}
    args.config = {name: config[name] for name in ("method", "objective") if name in config}
    return args


def read_config(path):
    """-> the config in a backbone.pt or checkpoint.pt; an empty one if another program wrote the file."""
    content = models.read_file(path)
    config = content.get("config") if isinstance(content, dict) else None
    if not isinstance(config, dict) or str(config.get("model")) not in models.MODELS:
        return {}
    kinds = {name: (list, tuple) if name in ("mean", "std") else type(BACKBONE.get(name, ""))
             for name in (*BACKBONE, "method", "objective")}
    return {name: config[name] for name, kind in kinds.items() if isinstance(config.get(name), kind)}


def refuse_unused(p, typed):
    """Raises BadInput for a flag that the task does not use."""
    setting, unused = f"--task {typed.task}", ["num_classes"]
    if typed.task == "segment":
        unused = ["recipe", "probe", "label_fraction", *(name for name in CIM if name not in SEGMENT)]
    elif typed.probe:
        setting, unused = "--probe", ["num_classes", "drop_path", "layer_decay"]
    for name in unused:
        if getattr(typed, name, None) is not None:
            p.error(f"{setting} takes no --{name}: leave it out")
    if typed.layer_decay not in (None, 1) and not typed.model.startswith("vit"):
        p.error(f"--layer_decay is for ViTs, not {typed.model}: leave it out")


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

    size = args.img_size or config.get("img_size", 224)
    if args.task == "segment":
        # What was pretrained at another size than the papers' is segmented at its own.
        recipe["img_size"] = size if size != 224 else recipe["img_size"]
    else:
        # Table 15's 100 epochs train ResNets at 160 pixels and test them at 224, unless --img_size or the
        # pretraining sets one size. All others have one.
        if args.img_size or size != 224 or is_vit:
            recipe |= {"img_size": size, "test_size": size}
        # Decision: small images are tested as a whole, not enlarged and cropped.
        if recipe["test_size"] < data.SMALL:
            recipe["crop_ratio"] = 1.0
    recipe["lr"] *= (args.batch_size or recipe["batch_size"]) / recipe["batch_size"]
    # Decision: in short runs, the warm-up takes at most a fifth of the epochs.
    recipe["warmup_epochs"] = min(recipe["warmup_epochs"], 0.2 * (args.epochs or recipe["epochs"]))
    return recipe


def resolve_from_checkpoint(p, typed):
    """-> the arguments for --eval_only: a checkpoint.pt of this script says what was trained."""
    if not typed.init and not typed.output_dir:
        p.error("--eval_only needs a checkpoint to measure: give --init or --output_dir")
    typed.init = typed.init or f"{typed.output_dir}/checkpoint.pt"
    content = models.read_file(typed.init)
    if not isinstance(content, dict) or content.get("script") != "finetune":
        p.error(f"--eval_only measures a checkpoint.pt of finetune.py, and {typed.init} is not one: leave "
                "--eval_only out and train a head first")
    saved = content["args"] if isinstance(content.get("args"), dict) else {}
    for name in (*BACKBONE, *HEAD):
        if getattr(typed, name, None) not in (None, saved.get(name)):
            p.error(f"--eval_only measures {typed.init} as it was trained, with --{name} {saved.get(name)}: "
                    f"leave --{name} out")
    flags = {name: saved.get(name) for name in (*BACKBONE, *HEAD) if hasattr(typed, name)}
    if flags["task"] == "classify":
        flags["num_classes"] = None                                   # counted from --data, without a limit
    args = p.parse_args([*data.as_flags(flags), *sys.argv[1:], "--init", typed.init])
    args.loss, args.drop_path = saved.get("loss"), 0.0
    args.test_size = number(int, 8, 4096)(saved.get("test_size") or args.img_size)
    args.crop_ratio = number(float, 0.1, 1)(saved.get("crop_ratio") or 1.0)
    return args


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

def build_data(args, rank, world, device):
    """-> (loader of training batches, loader of this process's part of the validation images)."""
    train_set, val_set = build_dataset(args, True), build_dataset(args, False)
    check_classes(args, train_set.classes, "the training images", val_set.classes)
    data.check_data(args, train_set, val_set)
    if args.task == "segment":
        transform = data.segment_transform(args.img_size, True, args.mean, args.std)
    else:
        transform = data.finetune_transform(args.img_size, args.randaug, args.erasing, args.mean, args.std)
    if args.label_fraction:
        train_set = Subset(train_set, data.few_labels(train_set.targets, args.label_fraction, args.seed))
    loader = data.endless_loader(args, train_set, transform, rank, world, device, args.repeats)
    return loader, validation_loader(args, val_set, rank, world)


def build_dataset(args, train):
    """-> the training or the validation set; sets args.num_classes to the number of class folders."""
    if args.task == "segment":
        return data.Segmentation(args.data, train, args.num_classes)
    dataset = data.labelled_dataset(args.data, train, args.img_size)
    args.num_classes = len(dataset.classes)
    return dataset


def validation_loader(args, dataset, rank, world):
    """-> DataLoader. Each image is in one process only, and in the same batch for any number of processes; a
    sampler that pads would count some images twice.
    """
    if args.task == "segment":
        transform = data.segment_transform(args.img_size, False, args.mean, args.std)
        batch_size = 1                                                # masks differ in size
    else:
        transform = data.center_transform(args.test_size, args.crop_ratio, args.mean, args.std)
        batch_size = 64
    keys = [(0, index) for index in range(len(dataset))]              # (epoch, index)
    batches = [keys[i:i + batch_size] for i in range(0, len(keys), batch_size)]
    return DataLoader(data.Transformed(dataset, transform, args.seed), num_workers=args.num_workers,
                      worker_init_fn=data.ignore_ctrl_c, batch_sampler=batches[rank::world])


def build_mixing(args):
    """-> function that mixes [images, labels]. Decision: each batch gets MixUp or CutMix, as in BEiT."""
    mixes = [mix(alpha=alpha, num_classes=args.num_classes)
             for mix, alpha in [(v2.MixUp, args.mixup), (v2.CutMix, args.cutmix)] if alpha]
    return v2.RandomChoice(mixes) if mixes else nn.Identity()


def build_model(args, device):
    """-> Classifier or Segmenter on the device, with the weights of --init. Raises BadInput."""
    torch.manual_seed(args.seed)
    content = models.read_file(args.init) if args.init and not args.eval_only else None
    try:
        backbone = models.build_backbone(args.model, args.img_size, args.patch_size, args.pool,
                                         norm=args.norm, drop_rate=args.drop_path,
                                         dilated=args.task == "segment")
        if content is not None:
            models.load_weights(backbone, content)
        if args.task == "segment":
            model = Segmenter(backbone, args.num_classes, args.img_size)
        else:
            model = Classifier(backbone, args.num_classes, args.probe, args.head_norm, args.loss,
                               args.label_smoothing)
    except Exception as error:                                        # a file can hold anything
        raise data.BadInput(f"--init {args.init} does not fit {args.model} with --img_size {args.img_size} "
                            f"and --patch_size {args.patch_size}: {models.one_line(error)}") from None
    if isinstance(backbone, models.ViT):
        # Decision: even if it was fixed, as the energy paper has it for sorting.
        backbone.pos_embed.requires_grad_(True)
        if args.probe:
            backbone.requires_grad_(False)
    return model.to(device, memory_format=torch.channels_last)        # faster convolutions


def check_step(args, model, world, device):
    """A dry step of a copy finds what cannot work: images too small, a BatchNorm over a single value."""
    count = min(2, args.batch_size // (world * args.accum_steps))
    images = torch.zeros(count, 3, args.img_size, args.img_size, device=device)
    labels = images[:, 0] if args.task == "segment" else images[:, 0, 0, 0]
    try:
        with torch.no_grad():
            copy.deepcopy(model).train()(images, labels.long())
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError) as error:
        raise data.BadInput(f"{args.model} cannot take --img_size {args.img_size} with --batch_size "
                            f"{args.batch_size} ({models.one_line(error)}): raise one of them") from None


def prepare(args, resume, rank, world, device):
    """-> (loader, validation loader, model, optimizer, scaler, steps done, the best epoch's metric).

    Raises BadInput and OSError.
    """
    loader, val_loader = build_data(args, rank, world, device)
    model = build_model(args, device)
    check_step(args, model, world, device)
    if args.task == "segment" and world > 1 and device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)        # a GPU's few crops make poor statistics
    optimizer = build_optimizer(args, model)
    scaler = torch.amp.GradScaler(device.type, enabled=amp_dtype(args.amp, device) == torch.float16)
    step = 0
    best = 0.0
    if resume:
        checkpoint = models.restore("finetune", args, model, optimizer, scaler)
        classes = val_loader.dataset.dataset.classes
        check_classes(args, checkpoint.get("classes"), "the checkpoint", classes)
        step = checkpoint["step"]
        best = max([line.get(model.metric, 0.0) for line in data.read_log(args)], default=0.0)
    return loader, val_loader, model, optimizer, scaler, step, best


def backbone_config(args):
    """-> the config of this run's backbone.pt. --init's method and objective stay in it, because they choose
    the recipe of whoever fine-tunes that file again.
    """
    return ({"method": "finetune", "objective": args.task} | args.config
            | {name: getattr(args, name) for name in BACKBONE})


def check_classes(args, classes, source, val_classes):
    """Raises BadInput unless the validation images have the classes of `source`; masks have none: None."""
    if classes != val_classes:
        missing = sorted(set(classes or []) - set(val_classes or []))[:3] or ["none"]
        added = sorted(set(val_classes or []) - set(classes or []))[:3] or ["none"]
        raise data.BadInput(f"the validation images of --data {args.data} must have the classes of {source} "
                            f"(missing: {', '.join(missing)}; too many: {', '.join(added)})")


# ---------------------------------------------------------------- what is measured and shown

@torch.no_grad()
def evaluate(model, loader, device, dtype, world):
    """-> {"top1": %, "top5": %, "val_loss"} or {"miou": %, "pixel_acc": %, "val_loss"} of all images."""
    if world > 1:
        # BatchNorm's statistics differ between processes. All take those of the first one, which are saved.
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
    model.eval()
    if data.is_first():
        print(f"evaluating on {len(loader.dataset)} images", flush=True)
    counts = torch.zeros(model.num_counts, dtype=torch.float64)
    for images, labels in loader:
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            counts += model.count(images.to(device), labels.to(device))
    if world > 1:
        counts = counts.to(device)
        dist.all_reduce(counts)
    return data.together(model.summary, counts)


@torch.no_grad()
def save_picture(path, model, dataset, device, mean, std):
    """One row for each of up to four validation images: image, truth, prediction; unlabelled is black.

    The model is in eval mode, and the dataset yields (image (3, H, W), mask (H, W)) of different sizes.
    """
    colors = torch.rand(1 + model.num_classes, 3, generator=torch.Generator().manual_seed(0))
    colors[0] = 0
    tiles = []
    for i in torch.linspace(0, len(dataset) - 1, min(4, len(dataset))).long().tolist():
        image, mask = dataset[0, i]
        prediction = model.predict(image[None].to(device))[0].argmax(dim=0).cpu() + 1
        tiles.append(data.denormalize(image[None], mean, std)[0])     # (3, H, W)
        tiles.append(colors[mask].movedim(2, 0))
        tiles.append(colors[prediction].movedim(2, 0))
    tiles = [v2.functional.resize(tile, tiles[0].shape[1:]) for tile in tiles]
    data.save_page(path, make_grid(tiles, nrow=3, pad_value=1), ["image", "truth", "prediction"])


def prepare_evaluation(args, rank, world, device):
    """For --eval_only -> (model, validation loader). Raises BadInput and OSError."""
    val_set = build_dataset(args, False)
    check_classes(args, models.read_file(args.init).get("classes"), "the checkpoint", val_set.classes)
    model = build_model(args, device)
    models.restore("finetune", args, model, path=args.init)
    return model, validation_loader(args, val_set, rank, world)


# ---------------------------------------------------------------- helpers, identical in all three scripts

def init_processes():
    """-> (the flags, rank, number of processes, device), under torchrun or without it.

    All processes meet before anything can fail, so that an error in one of them ends all.
    """
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:                                    # tensors on GPUs travel by nccl, others by gloo
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    args = data.together(parse_args)
    return args, rank, world, data.together(data.open_device, args.device)


def amp_dtype(amp, device):
    """-> autocast's dtype, or None. "auto" is off on a CPU: emulated bf16 is hundreds of times slower.

    Decision: bf16 where a GPU has it. The energy paper takes PyTorch's default, which was fp16 at the time;
    CIM's says only "mixed precision".
    """
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


# ---------------------------------------------------------------- the loop

def main():
    args, rank, world, device = init_processes()
    dtype = amp_dtype(args.amp, device)
    if args.eval_only:
        data.fetch_data(args)
        model, val_loader = data.together(prepare_evaluation, args, rank, world, device)
        measured = evaluate(model, val_loader, device, dtype, world)
        if rank == 0:
            print(json.dumps({"images": len(val_loader.dataset)} | measured))
        return
    resume = data.open_output(args)
    # together() ends all processes if one of them has an error.
    prepared = data.together(prepare, args, resume, rank, world, device)
    loader, val_loader, model, optimizer, scaler, step, best = prepared
    data.require_equal(args, loader.dataset)

    mix = build_mixing(args)
    if args.compile:
        model.compile()
    ddp = model
    if world > 1:
        ddp = DistributedDataParallel(model, gradient_as_bucket_view=True)

    steps_per_epoch = len(loader.dataset) // args.batch_size
    total_steps = args.epochs * steps_per_epoch
    warmup_steps = round(args.warmup_epochs * steps_per_epoch)
    last_step = min(total_steps, args.max_steps or total_steps)
    data.start_log(args, f"{args.task} {args.model}, from {args.init or 'scratch'}; "
                   + " ".join(data.as_flags(args.recipe_values)), model, loader.dataset.dataset, step, dtype)

    data.catch_signals()
    loader.sampler.step = step                                        # where a resumed run goes on
    batches = iter(loader)                                            # endless
    first_step = epoch_start = timed_from = step
    line_time = start_time = time.time()
    loss_sum = torch.zeros((), device=device)                         # of this epoch
    stop = False
    model.train()                                                     # a probe's backbone stays in eval mode
    while step < last_step and not stop:
        lr = scheduled_rate(args, step, total_steps, warmup_steps)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        # Mixing and drop path use this seed, so that a resumed run draws the same as an unbroken one.
        torch.manual_seed(data.seed_from(args.seed, step, rank))
        for i in range(args.accum_steps):
            images, labels = mix([x.to(device, non_blocking=device.type == "cuda") for x in next(batches)])
            # DDP averages the gradients only after the last part of a batch.
            ddp.require_backward_grad_sync = i == args.accum_steps - 1
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                loss = ddp(images, labels) / args.accum_steps
            scaler.scale(loss).backward()
            loss_sum += loss.detach()
        if args.clip_grad:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        step += 1

        # A line of the log after the first step, every ten seconds, and where the run is saved. Its loss is
        # the epoch's mean so far, between two saves that of the first process.
        stop = data.stop_requested()                                  # the same answer in all processes
        saves = step % steps_per_epoch == 0 or step == last_step or stop
        is_first_step = step == first_step + 1
        if not saves and (rank > 0 or not is_first_step and time.time() - line_time < 10):
            continue
        loss = loss_sum / (step - epoch_start)
        if saves and world > 1:
            dist.all_reduce(loss)
            loss /= world
        loss = loss.item()                                            # waits for the GPU
        seconds = (time.time() - start_time) / max(1, step - timed_from)
        line = {"step": step, "epoch": step / steps_per_epoch, "loss": loss, "lr": lr,
                "img_per_s": args.batch_size / seconds, "peak_mem_mb": data.peak_memory_mb(device)}
        if saves:
            data.together(data.check_finite, line, model)
            if rank == 0:
                classes = val_loader.dataset.dataset.classes
                models.save_checkpoint("finetune", args, backbone_config(args), step, model, optimizer,
                                       scaler, classes=classes)
        if saves and (not stop or step == last_step):
            measured = evaluate(model, val_loader, device, dtype, world)
            best = max(best, measured[model.metric])
            line |= measured | {f"best_{model.metric}": best}
            if args.task == "segment" and rank == 0:
                path = f"{args.output_dir}/samples/step_{step:06d}.png"
                save_picture(path, model, val_loader.dataset, device, args.mean, args.std)
            model.train()
        if rank == 0:
            data.write_log(args, line, None if is_first_step else seconds * (last_step - step))
        line_time = time.time()
        if saves or is_first_step:                        # neither evaluation nor compilation is timed
            timed_from, start_time = step, line_time
        if saves:
            epoch_start = step
            loss_sum.zero_()

    if rank > 0:
        return
    if step < last_step:
        raise data.BadInput(f"stopped after step {step}; --resume continues from there")
    models.save(f"{args.output_dir}/backbone.pt",
                {"model": model.backbone.state_dict(), "config": backbone_config(args)})
    print(f"wrote {args.output_dir}: checkpoint.pt, backbone.pt, log.jsonl, args.json, samples/")


if __name__ == "__main__":
    data.run(main)

"""Corrupted Image Modeling for Self-Supervised Visual Pre-Training (Fang et al., ICLR 2023), in one file.

A small BEiT, the generator, guesses the DALL-E tokens of masked patches; a sample of its guesses, decoded, is
a plausibly corrupted picture. A ViT or ResNet, the enhancer, sees it and learns to give the original pixels
back (RESPIX) or to tell which tokens were replaced (REVDET). The enhancer is what is kept.

    python cim_pretrain.py --model vit_nano --img_size 32 --patch_size 4 --dvae train            # one process
    torchrun --nproc_per_node 8 cim_pretrain.py --model vit_b --data /path/to/imagenet           # one node
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 \\
        cim_pretrain.py --model resnet50 --objective revdet --data /path/to/imagenet             # two nodes

README.md says what was measured, and where. Copy this file with models.py and data.py and it runs elsewhere.
"""
import argparse
import json
import math
import os
import resource
import sys
import time
from contextlib import nullcontext
from datetime import timedelta
from itertools import islice

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torchvision.transforms.v2.functional import normalize
from torchvision.utils import make_grid, save_image

import data
import models

MASKED = (100 / 196, 120 / 196)                   # the share of patches that is masked (Table 13)
WEIGHT = {"respix": 10.0, "revdet": 1.0}          # of the enhancer's loss; the generator's has 1 (Table 13)


# ---------------------------------------------------------------- arguments

def parse_args():
    p = argparse.ArgumentParser(description="Corrupted Image Modeling (Fang et al., ICLR 2023).",
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    g = p.add_argument_group("data and model").add_argument
    g("--data", default="shapes", help="'shapes' (drawn by the program), 'cifar10' (downloaded to ./data) or "
      "a folder: train/ and val/ with pictures below, or any tree of pictures")
    g("--model", default="vit_b", choices=models.MODELS, metavar="NAME",
      help="the enhancer: " + ", ".join(models.MODELS))
    g("--img_size", type=int, default=224, help="pixels a side; 32 for CIFAR")
    g("--patch_size", type=int, default=16, help="pixels a side of what one token stands for, and of the "
      "patches of the generator and of a ViT; 4 for CIFAR")

    g = p.add_argument_group("method").add_argument
    g("--objective", default="respix", choices=["respix", "revdet"],
      help="the enhancer's: restore the pixels, or detect the replaced tokens")
    g("--target", default="window", choices=["window", "patch", "none"],
      help="respix: normalise the target in a window around each pixel, in each patch as MAE does, or not")
    g("--corrupt", default="generator", choices=["generator", "erase"],
      help="erase: 50%% random erasing and no generator, the ablation that fails for ResNets (respix only)")
    g("--masking", default="random", choices=["random", "block"], help="which patches the generator lacks")
    g("--sampling", default="softmax", choices=["softmax", "argmax", "uniform"],
      help="how tokens are drawn from what the generator predicts; argmax, uniform: the ablations of Table 7")
    g("--gen_depth", type=int, default=4, help="the generator's blocks; the paper takes 4 to 6")
    g("--share", type=int, default=2, help="blocks that a ViT enhancer shares with the generator, besides "
      "the patch embedding; 0: nothing is shared")
    g("--freeze_generator", metavar="FILE", help="a checkpoint.pt whose generator is used and not trained")
    g("--dvae", default="dalle", choices=["dalle", "train"], help="the tokenizer: DALL-E's, or a small one "
      "trained first on the run's own pictures, for small pictures or without internet")
    g("--dvae_dir", default="dalle", help="where encoder.pkl and decoder.pkl are, or are downloaded to")
    g("--dvae_steps", type=int, default=1000, help="training steps of --dvae train")

    g = p.add_argument_group("training").add_argument
    g("--epochs", type=int, default=300, help="passes over the training pictures")
    g("--warmup_epochs", type=float, default=10, help="linear warm-up")
    g("--batch_size", type=int, default=2048, help="images per optimizer step, over all processes")
    g("--accum_steps", type=int, default=1, help="parts to split a batch into when memory is short")
    g("--lr", type=float, help="peak learning rate; None: the paper's, 1.5e-3 x batch_size / 2048; small "
      "models in a run of minutes want 2e-3")
    g("--weight_decay", type=float, default=0.05, help="AdamW's, on matrices and kernels only")
    g("--clip_grad", type=float, default=3.0, help="largest norm of the gradient; 0: no clipping")
    g("--max_steps", type=int, help="stop after so many optimizer steps (smoke runs, benchmarks)")
    g("--seed", type=int, default=0, help="fixes weights, order, crops, masks and samples")

    g = p.add_argument_group("machine").add_argument
    g("--device", default="auto", help="auto (cuda, else mps, else cpu), or a device's name")
    g("--amp", default="auto", choices=["auto", "bf16", "fp16", "off"],
      help="mixed precision; auto: bf16 or fp16 on a GPU, off elsewhere")
    g("--compile", action="store_true", help="torch.compile the step: a minute or two to start, then faster")
    g("--num_workers", type=int, default=min(8, os.cpu_count()), help="loader processes per process")
    g("--output_dir", help="where results go; None: runs/cim_MODEL")
    g("--resume", action="store_true", help="continue from OUTPUT_DIR/checkpoint.pt if it is there")
    args = p.parse_args()

    args.output_dir = args.output_dir or f"runs/cim_{args.model}"
    args.lr = 1.5e-3 * args.batch_size / 2048 if args.lr is None else args.lr
    for name in ("patch_size", "gen_depth", "dvae_steps", "epochs", "batch_size", "accum_steps"):
        if getattr(args, name) < 1:
            p.error(f"--{name} {getattr(args, name)}: must be above 0")
    if args.img_size % args.patch_size:
        p.error(f"--img_size {args.img_size} is no multiple of --patch_size {args.patch_size}: change either")
    if args.corrupt == "erase" and args.objective == "revdet":
        p.error("--corrupt erase replaces no tokens to detect: take --objective respix")
    if args.freeze_generator or not args.model.startswith("vit"):
        args.share = 0                            # shared layers are a ViT's, and learn
    blocks = min(args.gen_depth, models.MODELS[args.model][1].get("depth", args.gen_depth))
    if not 0 <= args.share <= blocks:
        p.error(f"--share {args.share}: generator and enhancer have {blocks} blocks to share at most")
    return args


# ---------------------------------------------------------------- the method

class Generator(nn.Module):
    """The small BEiT (sec. 2.1): embedded patches, some of them masked -> logits of their tokens."""

    def __init__(self, vit, codes):
        super().__init__()
        self.vit = vit
        self.mask_token = nn.Parameter(torch.zeros(1, 1, vit.width))
        self.head = nn.Linear(vit.width, codes)
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, images, mask, positions):
        """(B, 3, H, W), mask (B, N) with True = masked, positions (B, K) -> logits (B, K, codes)."""
        x = self.vit.patch_embed(images)                                             # (B, N, dim)
        x = torch.where(mask[:, :, None], self.mask_token, x)         # Eq. (1): replace(x, m, [MASK])
        x = self.vit.encode(x)[:, 1:]                                                # (B, N, dim)
        x = x.gather(1, positions[:, :, None].expand(-1, -1, x.shape[2]))            # (B, K, dim)
        return self.head(x)


class CIM(nn.Module):
    """Generator and enhancer: a backbone and one linear layer, laid out over pixels or tokens (sec. 2)."""

    def __init__(self, backbone, generator, args):
        super().__init__()
        self.backbone, self.generator = backbone, generator
        self.objective, self.target, self.sampling = args.objective, args.target, args.sampling
        self.patch_size = args.patch_size
        # A position of the backbone covers stride x stride pixels, or (stride / patch_size)^2 tokens.
        side = backbone.stride if args.objective == "respix" else backbone.stride // args.patch_size
        self.head = nn.Conv2d(backbone.width, (3 if args.objective == "respix" else 1) * side ** 2, 1)
        self.unfold = nn.PixelShuffle(side)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def generate(self, images, golden, mask):
        """Images (B, 3, H, W), golden tokens (B, N), mask (B, N) with True = masked -> the generator's loss
        and accuracy at the masked positions, and the tokens (B, N) with its samples there.
        """
        # As many positions for each image, so that shapes are fixed: the masked ones come first.
        positions = mask.byte().argsort(dim=1, descending=True, stable=True)
        positions = positions[:, :round(MASKED[1] * mask.shape[1])]                  # (B, K)
        masked, golden_there = mask.gather(1, positions), golden.gather(1, positions)
        logits = self.generator(images, mask, positions).float()                     # (B, K, codes)
        loss = F.cross_entropy(logits.transpose(1, 2), golden_there, reduction="none")
        loss = (loss * masked).sum() / masked.sum()                   # -log p(g | x^masked), the mean of them
        with torch.no_grad():
            best = logits.argmax(dim=2)
            accuracy = ((best == golden_there) & masked).sum() / masked.sum()
            if self.sampling == "softmax":                            # an exponential race draws from softmax
                sampled = (logits.softmax(dim=2) / torch.empty_like(logits).exponential_()).argmax(dim=2)
            else:
                sampled = best if self.sampling == "argmax" else torch.randint_like(best, logits.shape[2])
            # Eq. (2): x^corrupted = replace(g, m, x^sampled)
            tokens = golden.scatter(1, positions, torch.where(masked, sampled, golden_there))
        return loss, accuracy, tokens

    def corrupt(self, images, golden, mask, dvae):
        """-> (the generator's loss, its accuracy, tokens (B, N), corrupted images (B, 3, H, W))."""
        if self.generator is None:
            # Decision: random erasing of half of the picture, in one rectangle.
            zero = torch.zeros((), device=images.device)
            return zero, zero, golden, data.mask_random(images, None, count=1, area=(0.5, 0.5))
        loss, accuracy, tokens = self.generate(images, golden, mask)
        return loss, accuracy, tokens, detokenize(dvae, tokens, images.shape[3])

    def enhance(self, corrupted):
        """(B, 3, H, W) -> normalised pixels (B, 3, H, W), or logits of "replaced" (B, N)."""
        output = self.unfold(self.head(self.backbone.forward_map(corrupted))).float()
        return output if self.objective == "respix" else output.flatten(1)

    def enhancer_loss(self, output, images, tokens, golden):
        if self.objective == "respix":                                # a combination of l1 and l2 (sec. A.3)
            target = normalize_target(images, self.target, self.patch_size)[0]
            return F.l1_loss(output, target) + F.mse_loss(output, target)
        return F.binary_cross_entropy_with_logits(output, (tokens != golden).float())  # 1 = replaced

    def forward(self, images, golden, mask, dvae):
        """-> (the generator's loss, the enhancer's loss); tokens carry no gradient from one to the other."""
        gen_loss, _, tokens, corrupted = self.corrupt(images, golden, mask, dvae)
        return gen_loss, self.enhancer_loss(self.enhance(corrupted), images, tokens, golden)


def draw_mask(count, args, device):
    """Masks (count, N) of what the generator does not see: True = masked."""
    grid = args.img_size // args.patch_size
    if args.masking == "block":
        return data.block_mask(count, None, grid, MASKED).to(device)
    return data.random_mask(count, None, grid, MASKED, device)


def normalize_target(images, kind, patch_size):
    """RESPIX's target (sec. 2.2, Table 6): ((images - mean) / std, mean, std), all of the images' shape.

    window: mean and std of the 8x8 window around each pixel, 4 pixels before it and 3 behind, reflected at
    the borders; patch: of the patch that the pixel lives in, as MAE does; none: 0 and 1.
    Decision: over the three channels together, with 1e-6 under the root, as MAE.
    """
    if kind == "none":
        return images, torch.zeros_like(images), torch.ones_like(images)
    moments = torch.stack([images, images.square()], dim=1).mean(dim=2)              # (B, 2, H, W)
    if kind == "window":
        moments = F.avg_pool2d(F.pad(moments, (4, 3, 4, 3), mode="reflect"), 8, stride=1)
    else:
        moments = F.interpolate(F.avg_pool2d(moments, patch_size), scale_factor=patch_size)
    mean, square = (moment.expand_as(images) for moment in moments.split(1, dim=1))
    std = ((square - mean.square()).clamp(min=0) + 1e-6).sqrt()
    return (images - mean) / std, mean, std


def init_as_beit(vit):
    """BEiT's initialisation: normal 0.02, and the last layers of block i smaller by sqrt(2 i)."""
    for param in vit.parameters():
        if param.dim() > 1:                                           # all but biases and LayerNorms
            nn.init.trunc_normal_(param, std=0.02)
    for i, block in enumerate(vit.blocks, 1):
        for layer in (block.attn.proj, block.mlp.fc2):
            layer.weight.data /= math.sqrt(2 * i)


def build(args, codes):
    """The CIM model of these arguments, for a tokenizer with so many codes."""
    size = {"img_size": args.img_size, "patch_size": args.patch_size, "pool": "mean", "pos_embed": "learned"}
    backbone = models.build_model(args.model, norm="batch", **size)
    if isinstance(backbone, models.ViT):
        init_as_beit(backbone)
    if args.corrupt == "erase":
        return CIM(backbone, None, args)
    # As wide as a ViT enhancer, and 384 for the others (Table 13); Decision: 96 for resnet_nano.
    alike = args.model if args.model.startswith("vit") else "vit_nano" if "nano" in args.model else "vit_s"
    vit = models.ViT(**models.MODELS[alike][1] | {"depth": args.gen_depth}, **size)
    init_as_beit(vit)
    if args.share:                                                    # sec. 3.3, Table 5
        vit.patch_embed = backbone.patch_embed
        for i in range(args.share):
            vit.blocks[i] = backbone.blocks[i]
    return CIM(backbone, Generator(vit, codes), args)


# ---------------------------------------------------------------- the tokenizer

def tokenizer_view(images, patch_size):
    """Normalised images (B, 3, H, W) -> what the tokenizer sees, in [0, 1]: one token's 8 pixels for a patch.

    Decision: the same crop at another size, bicubic; for 224 and patches of 16 pixels it has 112.
    """
    size = images.shape[3] // patch_size * models.DVAE.stride
    return F.interpolate(data.denormalize(images), size=size, mode="bicubic", antialias=True).clamp(0, 1)


@torch.no_grad()
def tokenize(dvae, images, patch_size):
    """Normalised images (B, 3, H, W) -> golden tokens (B, N), of N = (H / patch_size)^2 patches."""
    return dvae.encode(tokenizer_view(images, patch_size)).flatten(1)


@torch.no_grad()
def detokenize(dvae, tokens, img_size):
    """Tokens (B, N) -> normalised images (B, 3, img_size, img_size)."""
    grid = math.isqrt(tokens.shape[1])
    images = dvae.decode(tokens.view(-1, grid, grid)).float()
    images = F.interpolate(images, size=img_size, mode="bicubic", antialias=True).clamp(0, 1)
    return normalize(images, data.MEAN, data.STD)


class DVAETraining(nn.Module):
    """The loss that trains a small dVAE (Ramesh et al., 2021, sec. 2.1)."""

    def __init__(self, dvae):
        super().__init__()
        self.dvae = dvae

    def forward(self, images, temperature):
        logits = self.dvae.encode_logits(images)                                     # (B, codes, h, w)
        restored = self.dvae.decode(F.gumbel_softmax(logits, temperature, dim=1))
        # Differs from DALL-E: the KL divergence to uniform is that of the codes' mean use, not of each
        # position's distribution, which in short runs leaves a handful of codes in use.
        use = logits.softmax(dim=1).mean(dim=(0, 2, 3))                              # (codes,)
        divergence = math.log(len(use)) - torch.special.entr(use).sum()
        return F.mse_loss(restored, images) + 0.01 * divergence


def train_dvae(args, dataset, val_images, device, rank, world):
    """--dvae train: a small DVAE of the run's own pictures, with a picture and two numbers to judge it by."""
    dvae = models.DVAE(codes=128, width=16, embed_width=64, blocks=1).to(device)
    model = DVAETraining(dvae)
    with torch.no_grad():
        # A fresh encoder gives nearly the same code everywhere. Decision: its last layer is scaled once, so
        # that each code's logit has mean 0 and standard deviation 4: all codes are in use from the start.
        logits = dvae.encode_logits(tokenizer_view(val_images, args.patch_size))     # (B, codes, h, w)
        output, gain = dvae.encoder["blocks"]["output"]["conv"], 4 / logits.std(dim=(0, 2, 3)).clamp(min=1e-3)
        output.w *= gain.view(-1, 1, 1, 1)
        output.b.copy_(-gain * logits.mean(dim=(0, 2, 3)))
    ddp = DistributedDataParallel(model) if world > 1 else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=1e-4)
    sampler = data.EpochSampler(dataset.dataset, world, rank, seed=args.seed)
    loader = DataLoader(dataset, max(1, 32 // world), sampler=sampler, num_workers=args.num_workers)
    step, epoch, shown = 0, 0, time.time()
    while step < args.dvae_steps:
        sampler.set_epoch(epoch)
        epoch += 1
        for images, _ in islice(loader, args.dvae_steps - step):
            step += 1
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step - 1, args.dvae_steps, args.dvae_steps // 20, 3e-3)
            # Gumbel-softmax: from soft to nearly one-hot, as DALL-E's.
            progress = min(1.0, step / (0.8 * args.dvae_steps))
            temperature = 1 / 16 + (1 - 1 / 16) * 0.5 * (1 + math.cos(math.pi * progress))
            torch.manual_seed(data.seed_from(args.seed, step, rank))
            loss = ddp(tokenizer_view(images.to(device), args.patch_size), temperature)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if rank == 0 and (time.time() - shown > 10 or step == args.dvae_steps):
                loss, = check_finite([loss.detach()], step)
                print(f"dVAE  step {step}/{args.dvae_steps}  loss {loss:.4f}", flush=True)
                shown = time.time()
    if rank == 0:
        tokens = tokenize(dvae, val_images, args.patch_size)
        restored = detokenize(dvae, tokens, args.img_size)
        line = {"dvae_psnr": round(psnr(restored, val_images), 2), "dvae_codes_used": len(tokens.unique())}
        print(f"dVAE: {line}", flush=True)
        write_log(args.output_dir, line)
        write_grid(f"{args.output_dir}/samples/dvae.png", [val_images[:8], restored[:8]])
    return dvae


def load_dvae(args, dataset, val_images, device, rank, world):
    """The frozen tokenizer: DALL-E's, or the small one, trained first if this run has none yet."""
    if args.dvae == "dalle":
        paths = [os.path.join(args.dvae_dir, name) for name in ("encoder.pkl", "decoder.pkl")]
        for path in paths:
            if rank == 0 and not os.path.exists(path):
                url = models.DALLE_URL + os.path.basename(path)
                try:
                    os.makedirs(args.dvae_dir, exist_ok=True)
                    torch.hub.download_url_to_file(url, path)         # to a temporary name first
                except OSError as error:
                    sys.exit(f"error: cannot get {url} ({error}): put encoder.pkl and decoder.pkl from there "
                             f"into --dvae_dir {args.dvae_dir}, or take --dvae train")
        if world > 1:
            dist.barrier()
        try:
            dvae = models.load_dalle(*paths)
        except (OSError, ValueError) as error:
            sys.exit(f"error: {error}")
    else:
        # A frozen generator speaks the tokens of the dVAE that it was trained with.
        folder = os.path.dirname(args.freeze_generator) if args.freeze_generator else args.output_dir
        path = os.path.join(folder, "dvae.pt")
        if not os.path.exists(path):
            if args.freeze_generator:
                sys.exit(f"error: {path} is missing, the dVAE of --freeze_generator: put it there")
            dvae = train_dvae(args, dataset, val_images, device, rank, world)
            if rank == 0:
                save({"model": dvae.state_dict(), "config": dvae.config}, path)
            if world > 1:
                dist.barrier()
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
            dvae = models.DVAE(**saved["config"])
            dvae.load_state_dict(saved["model"])
        except Exception as error:          # torch raises many kinds for a file that is damaged or another
            sys.exit(f"error: {path} is damaged or no dVAE ({type(error).__name__}): delete it to train anew")
    return dvae.to(device, memory_format=torch.channels_last).requires_grad_(False).eval()


# ---------------------------------------------------------------- what is measured and shown

def psnr(images, reference):
    """PSNR in dB of two batches of normalised images, from the mean squared error over all of them."""
    error = F.mse_loss(data.denormalize(images), data.denormalize(reference)).item()
    return -10 * math.log10(max(error, 1e-10))


def area_under_curve(scores, labels):
    """AUC: how often a positive (label True) scores above a negative, ties counted half."""
    positive, negative = scores[labels], scores[~labels].sort().values
    below = torch.searchsorted(negative, positive) + torch.searchsorted(negative, positive, right=True)
    return (below.double().mean() / (2 * len(negative))).item()


@torch.no_grad()
def evaluate(model, images, golden, dvae, args):
    """What the two networks do on fixed held-out images, with fixed masks and samples -> {name: number}.

    gen_loss, gen_acc: at the masked positions; replaced: the share of these whose sample is not golden.
    psnr_corrupted, psnr_output: of the enhancer's input and output; psnr_template: of the means alone that
    de-normalising adds to the output. accuracy, precision, recall, auc: of detecting replaced tokens.
    """
    model.eval()
    torch.manual_seed(args.seed)
    parts = []
    for x, g in zip(images.split(64), golden.split(64)):
        mask = draw_mask(len(x), args, x.device)
        gen_loss, gen_acc, tokens, corrupted = model.corrupt(x, g, mask, dvae)
        parts.append((gen_loss.view(1), gen_acc.view(1), mask, tokens, corrupted, model.enhance(corrupted)))
    gen_loss, gen_acc, mask, tokens, corrupted, output = (torch.cat(part) for part in zip(*parts))
    results = {f"{args.objective}_loss": model.enhancer_loss(output, images, tokens, golden).item()}
    replaced = tokens != golden
    if model.generator is not None:
        results |= {"gen_loss": gen_loss.mean().item(), "gen_acc": gen_acc.mean().item(),
                    "replaced": replaced[mask].float().mean().item()}
    if args.objective == "respix":
        _, mean, std = normalize_target(images, args.target, args.patch_size)
        for name, x in (("corrupted", corrupted), ("template", mean), ("output", output * std + mean)):
            results[f"psnr_{name}"] = psnr(x, images)
    else:
        found = output > 0
        hits = (found & replaced).sum()
        results |= {"accuracy": (found == replaced).float().mean().item(),
                    "precision": (hits / found.sum().clamp(min=1)).item(),
                    "recall": (hits / replaced.sum().clamp(min=1)).item(),
                    "auc": area_under_curve(output.flatten(), replaced.flatten())}
    return {name: round(value, 4) for name, value in results.items()}


@torch.no_grad()
def save_picture(path, model, images, golden, dvae, args):
    """A row per image (figs. 2, 3): original, what the generator sees, three samples, and for the last one
    the enhancer's output (respix), or the replaced tokens in white and the enhancer's guess (revdet).
    """
    model.eval()
    torch.manual_seed(args.seed)
    grid = args.img_size // args.patch_size
    mask, columns = draw_mask(len(images), args, images.device), [images]

    def enlarge(values):                                              # (B, N) -> (B, 1, H, W)
        return F.interpolate(values.float().view(-1, 1, grid, grid), scale_factor=args.patch_size)

    if model.generator is not None:
        columns.append(images * (1 - enlarge(mask)))
    for _ in range(1 if model.generator is None else 3):
        _, _, tokens, corrupted = model.corrupt(images, golden, mask, dvae)
        columns.append(corrupted)
    output = model.enhance(corrupted)
    if args.objective == "respix":
        _, mean, std = normalize_target(images, args.target, args.patch_size)
        columns.append(output * std + mean)                           # the original's statistics (sec. A.2)
    else:
        columns += [normalize(enlarge(x).expand_as(images), data.MEAN, data.STD)
                    for x in (tokens != golden, output.sigmoid())]
    write_grid(path, columns)


def write_grid(path, columns):
    """Columns of normalised images (B, 3, H, W) as one PNG, a row per image."""
    tiles = data.denormalize(torch.stack(columns, dim=1).flatten(0, 1))
    tiles = F.interpolate(tiles, scale_factor=max(1, round(96 / tiles.shape[3])), mode="nearest")
    save_image(make_grid(tiles, nrow=len(columns), pad_value=1), path)


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
    if args.batch_size % (world * args.accum_steps):
        sys.exit(f"error: --batch_size {args.batch_size} is not a multiple of {world} processes x "
                 f"{args.accum_steps} --accum_steps: change one of them")
    with torch.device("meta"):
        stride = models.build_model(args.model, patch_size=args.patch_size).stride
    if args.img_size % stride or stride % args.patch_size:
        sys.exit(f"error: {args.model} has stride {stride}: it must divide --img_size {args.img_size} and be "
                 f"a multiple of --patch_size {args.patch_size}")
    checkpoint_path = open_output(args.output_dir, args.resume, rank)
    torch.manual_seed(args.seed)

    # Pictures: order and crops depend on (seed, epoch, index) alone; each process draws its own masks.
    if world > 1 and rank > 0:
        dist.barrier()                                                # the first process may have to download
    train_set, val_set = (data.unlabelled_dataset(args.data, train, args.img_size) for train in (True, False))
    if world > 1 and rank == 0:
        dist.barrier()
    steps_per_epoch = len(train_set) // args.batch_size
    if steps_per_epoch == 0:
        sys.exit(f"error: --data {args.data} has {len(train_set)} training pictures, fewer than "
                 f"--batch_size {args.batch_size}: lower it")
    sampler = data.EpochSampler(train_set, world, rank, seed=args.seed, drop_last=True)
    crops = data.Transformed(train_set, data.pretrain_transform(args.img_size), args.seed)
    loader = DataLoader(crops, sampler=sampler, batch_size=args.batch_size // (world * args.accum_steps),
                        drop_last=True, num_workers=args.num_workers,
                        persistent_workers=args.num_workers > 0, pin_memory=device.type == "cuda")
    val_images = data.fixed_images(val_set, args.img_size).to(device)

    if rank == 0:
        versions = {"torch": torch.__version__, "torchvision": torchvision.__version__}
        write_log(args.output_dir, vars(args) | versions | {"processes": world})

    # Tokenizer and model.
    dvae, golden = None, val_images.new_zeros(len(val_images), (args.img_size // args.patch_size) ** 2).long()
    if args.corrupt == "generator":
        dvae = load_dvae(args, crops, val_images, device, rank, world)
        golden = tokenize(dvae, val_images, args.patch_size)
    torch.manual_seed(args.seed)
    model = build(args, dvae.config["codes"] if dvae else 0).to(device, memory_format=torch.channels_last)
    config = {"model": args.model, "img_size": args.img_size, "patch_size": args.patch_size,
              "pool": "mean", "pos_embed": "learned", "norm": "batch"}
    run = config | {key: getattr(args, key) for key in ("objective", "corrupt", "dvae", "gen_depth", "share")}
    if args.freeze_generator:
        same = {key: run[key] for key in ("img_size", "patch_size", "corrupt", "dvae", "gen_depth")}
        trained = load_checkpoint(args.freeze_generator, "cim_pretrain", same)["model"]
        try:
            model.generator.load_state_dict({key.removeprefix("generator."): value for key, value
                                             in trained.items() if key.startswith("generator.")})
        except RuntimeError:
            sys.exit(f"error: the generator of {args.freeze_generator} has another width: take one from a "
                     "run whose --model is as wide as this one's")
        model.generator.requires_grad_(False)
    if args.compile:
        model.compile()
    ddp = DistributedDataParallel(model) if world > 1 else model
    optimizer = torch.optim.AdamW(parameter_groups(model.named_parameters(), args.weight_decay), lr=args.lr,
                                  betas=(0.9, 0.98), fused=True)
    dtype = amp_dtype(args.amp, device)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    step = 0
    if args.resume and os.path.exists(checkpoint_path):
        checkpoint = load_checkpoint(checkpoint_path, "cim_pretrain", run)
        step = checkpoint["step"]
        for name, part in (("model", model), ("optimizer", optimizer), ("scaler", scaler)):
            part.load_state_dict(checkpoint[name])
    total_steps, warmup_steps = args.epochs * steps_per_epoch, round(args.warmup_epochs * steps_per_epoch)
    last_step = min(total_steps, args.max_steps or total_steps)
    if rank == 0:
        count, codes = sum(param.numel() for param in model.parameters()) / 1e6, dvae and dvae.config["codes"]
        print(f"{args.model}: {count:.2f} M weights with the generator; dVAE of {codes} codes\n"
              f"{len(train_set)} pictures, {steps_per_epoch} steps an epoch; {device.type}, amp {dtype}; "
              f"batch {args.batch_size} = {world} processes x {args.batch_size // world // args.accum_steps} "
              f"x {args.accum_steps} accumulated; peak lr {args.lr:.3g}; from step {step}", flush=True)

    start_step, start_time, shown = step, time.time(), time.time()
    while step < last_step:
        epoch = step // steps_per_epoch
        sampler.set_epoch(epoch)
        sampler.skip = step % steps_per_epoch * (args.batch_size // world)  # after a stop by --max_steps
        batches, epoch_losses, losses = iter(loader), [], []
        epoch_start, epoch_time, data_time = step, time.time(), 0.0
        model.train()
        for step in range(step + 1, min((epoch + 1) * steps_per_epoch, last_step) + 1):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step - 1, total_steps, warmup_steps, args.lr)
            torch.manual_seed(data.seed_from(args.seed, step, rank))  # of masks and samples
            losses.append(torch.zeros((), device=device))
            for part in range(args.accum_steps):
                waiting = time.time()
                images = next(batches)[0].to(device, non_blocking=True)
                data_time += time.time() - waiting
                mask = draw_mask(len(images), args, device)
                tokens = tokenize(dvae, images, args.patch_size) if dvae else None
                with nullcontext() if part == args.accum_steps - 1 or world == 1 else ddp.no_sync():
                    with torch.autocast(device.type, dtype, enabled=dtype is not None):
                        gen_loss, enhancer_loss = ddp(images, tokens, mask, dvae)
                    loss = (gen_loss + WEIGHT[args.objective] * enhancer_loss) / args.accum_steps
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
                      f"lr {group['lr']:.2e}  {(step - epoch_start) * args.batch_size / seconds:.1f} img/s  "
                      f"data {data_time / seconds:.0%}  left {timedelta(seconds=round(left))}", flush=True)
                losses, shown = [], time.time()

        # The end of an epoch (or of the run): all processes evaluate the same, the first one writes.
        epoch_losses += check_finite(losses, step)
        seconds = time.time() - epoch_time
        loss = torch.tensor(sum(epoch_losses) / len(epoch_losses) / world, device=device)
        if world > 1:
            dist.all_reduce(loss)
            for buffer in model.buffers():                            # BatchNorm's, which differ
                dist.broadcast(buffer, 0)
        measured = evaluate(model, val_images, golden, dvae, args)
        if not all(math.isfinite(value) for value in (loss.item(), *measured.values())):
            sys.exit(f"error: the weights are not finite after step {step}: the last checkpoint is kept; "
                     "--resume with a lower --lr or with --amp off")
        if rank == 0:
            line = {"epoch": epoch + 1, "step": step, "loss": loss.item(), "lr": group["lr"],
                    "img_per_s": round((step - epoch_start) * args.batch_size / seconds, 1),
                    "data_share": round(data_time / seconds, 3),
                    "peak_mem_mb": peak_memory_mb(device), **measured}
            print("  ".join(f"{key} {value:.4g}" for key, value in line.items()), flush=True)
            write_log(args.output_dir, line)
            picks = slice(None, None, max(1, len(val_images) // 8))
            save_picture(f"{args.output_dir}/samples/epoch_{epoch + 1:04d}.png", model, val_images[picks][:8],
                         golden[picks][:8], dvae, args)
            save({"model": model.backbone.state_dict(),
                  "config": config | {"mean": data.MEAN, "std": data.STD}}, f"{args.output_dir}/backbone.pt")
            save({"script": "cim_pretrain", "config": run, "step": step, "model": model.state_dict(),
                  "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(), "args": vars(args)},
                 checkpoint_path)
    if rank == 0:
        print(f"wrote {args.output_dir}: checkpoint.pt, backbone.pt, log.jsonl, samples/", flush=True)
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except data.BadInput as error:      # a loader process wraps it in a traceback, its sentence comes last
        sys.exit("error: " + str(error).strip().splitlines()[-1].removeprefix("data.BadInput: "))

"""Corrupted Image Modeling for Self-Supervised Visual Pre-Training (Fang et al., ICLR 2023), in one file.

A small BEiT, the generator, predicts the tokens of masked patches. Tokens sampled from its predictions are
decoded to a plausibly corrupted image. From it, the enhancer, a ViT or a ResNet, learns to restore the
original pixels (RESPIX) or to detect the replaced tokens (REVDET). Only the enhancer is kept. --objective
none trains the generator alone: with the ViT's full depth, this is BEiT, the baseline of Tables 1 and 3,
but without its relative positions and LayerScale.

    python cim_pretrain.py --model vit_nano --img_size 32 --patch_size 4 --tokenizer train       # one process
    torchrun --nproc_per_node 8 cim_pretrain.py --model vit_b --data /path/to/imagenet           # one node
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 \\
        cim_pretrain.py --model resnet50 --objective revdet --data /path/to/imagenet             # two nodes

Measured: the first command with --tokenizer_steps 500 --batch_size 32 --lr 2e-3 --epochs 2 takes two and
a half minutes on two AMD EPYC cores (torch 2.14, fp32). On held-out images, the tokenizer's PSNR is 21.1
dB. The generator predicts 46 % of the masked tokens (chance: 1 %), and its samples replace 77 % of them.
The PSNR is 17.5 dB for corrupted images, 19.1 for the enhancer's output and 15.6 for the window means
alone. At 224 pixels, a ViT-S step takes 1.70 times as long as one of BEiT (--objective none --gen_depth
12), both with the full-size dVAE in fp32.
"""
import argparse
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
from torch.utils.data import DataLoader
from torchvision.utils import make_grid, save_image

import data
import models

WEIGHT = {"respix": 10.0, "revdet": 1.0}    # the enhancer's loss weight (Table 13); the generator's is 1


# ---------------------------------------------------------------- arguments

def parse_args():
    p = Parser(description="Corrupted Image Modeling (Fang et al., ICLR 2023).",
               allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    g = p.add_argument_group("data and model").add_argument
    g("--data", default="shapes", help="'shapes' (built in), 'cifar10' (downloaded) or a folder of images")
    g("--model", default="vit_b", choices=models.MODELS, metavar="NAME", help=", ".join(models.MODELS))
    g("--img_size", type=number(int, 8, 4096), default=224, help="side in pixels; 32 for CIFAR")
    g("--patch_size", type=number(int, 1, 256), default=16, help="side in pixels; 4 for CIFAR")

    g = p.add_argument_group("method").add_argument
    g("--objective", default="respix", choices=["respix", "revdet", "none"],
      help="restore the pixels, detect replaced tokens, or train the generator alone (BEiT)")
    g("--target", default="window", choices=["window", "patch", "none"],
      help="respix: normalise the target in a window around each pixel, in each patch, or not at all")
    g("--generator", default="beit", choices=["beit", "mae", "erase"],
      help="beit samples tokens, mae samples pixels (Table 10); erase: random erasing (sec. 3.3)")
    g("--masking", default="random", choices=["random", "block"], help="mask single patches or blocks")
    g("--mask_ratio", type=number(float, 0.01, 0.99), nargs=2, metavar=("LOW", "HIGH"),
      help="bounds of the masked fraction; None: 100 to 120 of 196 patches, but 0.5 for mae and erase")
    g("--sampling", default="softmax", choices=["softmax", "argmax", "uniform"],
      help="how tokens are drawn from beit's predictions (Table 7)")
    g("--gen_depth", type=number(int, 1, 100), default=4, help="the generator's depth; for --objective none, "
      "give the ViT's own, or finetune.py cannot load it")
    g("--share", type=number(int, 0, 100), default=2,
      help="blocks that a ViT shares with the generator, besides the patch embedding; 0: share nothing")
    g("--freeze_generator", metavar="FILE", help="use this checkpoint.pt's generator without training it")
    g("--tokenizer", choices=["dalle", "vqgan", "train"], help="published weights, or a small dVAE trained "
      "first on the run's own images; None: dalle")
    g("--tokenizer_dir", help="folder with encoder.pkl and decoder.pkl (downloaded if missing), "
      "vqgan.ckpt, or another run's dvae.pt; None: ./tokenizer, but train trains a new dVAE")
    g("--tokenizer_steps", type=number(int, 1), default=1000, help="training steps of --tokenizer train")

    g = p.add_argument_group("training").add_argument
    g("--epochs", type=number(int, 1), default=300, help="passes over the training images")
    # Decision: the paper warms up for 10 epochs, which would be most of a short run.
    g("--warmup_epochs", type=number(float, 0), help="linear warm-up; None: 10, at most 10%% of the epochs")
    g("--batch_size", type=number(int, 1), default=2048, help="images per step, over all processes")
    g("--accum_steps", type=number(int, 1), default=1, help="parts per batch; raise it when memory is short")
    g("--lr", type=number(float, 1e-12), help="peak rate; None: 1.5e-3 x batch_size / 2048; short runs: 2e-3")
    g("--weight_decay", type=number(float, 0, 10), default=0.05, help="on matrices and kernels only")
    g("--clip_grad", type=number(float, 0), default=3.0, help="largest gradient norm; 0: no clipping")
    g("--max_steps", type=number(int, 1), help="stop after this many steps (smoke runs, benchmarks)")
    g("--seed", type=number(int, 0), default=0, help="fixes weights, order, crops, masks and samples")

    g = p.add_argument_group("machine").add_argument
    g("--device", default="auto", help="auto (cuda, else mps, else cpu), or a device's name")
    g("--amp", default="auto", choices=["auto", "bf16", "fp16", "off"],
      help="mixed precision; auto: bf16 or fp16 on a CUDA GPU, off elsewhere")
    g("--compile", action="store_true", help="torch.compile the step: slower to start, then faster")
    g("--num_workers", type=number(int, 0, 1024), default=data.default_workers(),
      help="data loader workers per process")
    g("--output_dir", help="where results go; None: runs/METHOD_MODEL (cim_respix, cim_revdet or beit)")
    g("--resume", action="store_true", help="continue from OUTPUT_DIR/checkpoint.pt if it exists")
    args = p.parse_args()

    is_vit = args.model.startswith("vit")
    has_tokens = args.generator == "beit"
    if not has_tokens and (args.objective != "respix" or args.tokenizer or args.tokenizer_dir
                           or args.sampling != "softmax"):
        p.error(f"--generator {args.generator} has no tokens to sample or to detect: choose --objective "
                "respix, and leave --tokenizer, --tokenizer_dir and --sampling out")
    if args.freeze_generator and args.tokenizer == "train" and args.tokenizer_dir:
        p.error("--freeze_generator comes with its own tokenizer: leave --tokenizer_dir out")
    if args.objective != "respix" and args.target != "window":
        p.error("--target is for --objective respix: leave it out")
    if args.freeze_generator and (args.objective == "none" or args.generator == "erase"):
        p.error("--freeze_generator needs an enhancer to train and a generator to freeze: leave it out")
    if args.objective == "none" and not is_vit:
        p.error(f"--objective none trains the generator alone, a ViT, not {args.model}: choose a ViT")
    if has_tokens:
        args.tokenizer = args.tokenizer or "dalle"
    if args.tokenizer in ("dalle", "vqgan"):
        args.tokenizer_dir = args.tokenizer_dir or "tokenizer"
    # Layers are shared by a ViT enhancer and a generator that is trained with it; else --share is unused.
    if not is_vit or args.objective == "none" or args.generator == "erase" or args.freeze_generator:
        args.share = 0
    method = "beit" if args.objective == "none" else f"cim_{args.objective}"
    args.output_dir = args.output_dir or f"runs/{method}_{args.model}"
    args.lr = args.lr or 1.5e-3 * args.batch_size / 2048
    if args.warmup_epochs is None:
        args.warmup_epochs = min(10, 0.1 * args.epochs)

    args.mask_ratio = args.mask_ratio or ([100 / 196, 120 / 196] if has_tokens else [0.5, 0.5])
    low, high = args.mask_ratio
    num_patches = (args.img_size // args.patch_size) ** 2
    if low > high or round(low * num_patches) < 1 or (args.masking == "block" and low < 16 / 196):
        p.error(f"--mask_ratio {low} {high}: give the lower fraction first; it must mask at least one of "
                f"{num_patches} patches and, with --masking block, 16 / 196 of them, BEiT's smallest block")

    with torch.device("meta"):
        stride = models.build_model(args.model, patch_size=args.patch_size).stride
    if args.img_size % stride or stride % args.patch_size:
        p.error(f"{args.model} has stride {stride}: it must divide --img_size {args.img_size} "
                f"and be a multiple of --patch_size {args.patch_size}")
    parts = args.accum_steps * int(os.environ.get("WORLD_SIZE", 1))
    if args.model.startswith("resnet") and args.batch_size <= parts:
        p.error("a ResNet's BatchNorm needs at least two images at a time: raise --batch_size")
    return args


# ---------------------------------------------------------------- the method

class Generator(nn.Module):
    """The small BEiT of sec. 2.1, or the MAE-like generator of Table 10, which differs in its outputs.

        x = patch embeddings, with [MASK] in place of the masked ones       # Eq. (1)
        x = blocks(x)
        return head(x at the masked positions)                              # logits of all codes, or pixels
    """

    def __init__(self, vit, num_outputs, max_masked):
        super().__init__()
        self.vit = vit
        self.max_masked = max_masked                           # K of an image's N patches
        self.mask_token = nn.Parameter(torch.zeros(1, 1, vit.width))
        self.head = nn.Linear(vit.width, num_outputs)
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, images, mask):
        """Images (B, 3, H, W), mask (B, N) with True = masked -> (outputs (B, K, num_outputs), their
        positions among the N patches (B, K), True where these are masked (B, K)).
        """
        # Fixed shapes: the head sees K positions of each image, its masked ones first. If fewer than K are
        # masked, visible ones follow, which the third output marks False.
        positions = mask.byte().argsort(dim=1, descending=True, stable=True)[:, :self.max_masked]
        x = self.vit.patch_embed(images)                       # (B, N, dim)
        x = torch.where(mask[:, :, None], self.mask_token, x)  # Eq. (1): replace(x, m, [MASK])
        x = self.vit.encode(x)[:, 1:]                          # (B, N, dim)
        x = x.gather(1, positions[:, :, None].expand(-1, -1, x.shape[2]))      # (B, K, dim)
        return self.head(x).float(), positions, mask.gather(1, positions)


class CIM(nn.Module):
    """Generator and enhancer, trained together (secs. 2, A.3). forward() for images and a mask m:

        g = tokenizer.encode(images)                      # golden tokens
        p = generator(images without the patches m)       # Eq. (1)
        generator's loss = -log p(g at m)
        tokens = g, replaced by samples of p at m         # Eq. (2); no gradient passes through it
        output = enhancer(tokenizer.decode(tokens))
        enhancer's loss = l1 + l2 of output - normalised pixels               (respix)
                          or binary cross entropy of output and tokens != g   (revdet)
        return generator's loss + weight * enhancer's loss

    The enhancer is a backbone and one linear layer, whose outputs are rearranged to pixels or tokens. With
    --objective none there is no enhancer, and `backbone` is the generator's ViT.
    """

    def __init__(self, backbone, generator, args):
        super().__init__()
        self.backbone = backbone
        self.generator = generator
        self.args = args
        if args.objective == "none":
            return
        # Decision: each cell of the backbone's map predicts all that it covers: stride x stride pixels, or
        # (stride / patch_size)^2 tokens, that is, 2 x 2 for a ResNet's stride of 32 and patches of 16.
        side = backbone.stride if args.objective == "respix" else backbone.stride // args.patch_size
        channels = 3 if args.objective == "respix" else 1
        self.head = nn.Conv2d(backbone.width, channels * side ** 2, kernel_size=1)
        self.pixel_shuffle = nn.PixelShuffle(side)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def generate_tokens(self, images, golden, mask, sampling):
        """Images (B, 3, H, W), golden tokens (B, N), mask (B, N) with True = masked -> (the generator's loss,
        the tokens with its samples at the masked positions, or None if `sampling` is None).
        """
        logits, positions, masked = self.generator(images, mask)               # (B, K, codes)
        golden_there = golden.gather(1, positions)                             # (B, K)
        loss = F.cross_entropy(logits.flatten(0, 1), golden_there.flatten(), reduction="none")
        loss = (loss * masked.flatten()).sum() / masked.sum().clamp(min=1)     # -log p(g | x^masked)
        if sampling is None:
            return loss, None
        with torch.no_grad():
            if sampling == "softmax":                          # the argmax of p / Exp(1) is a sample of p
                sampled = (logits.softmax(dim=2) / torch.empty_like(logits).exponential_()).argmax(dim=2)
            elif sampling == "argmax":
                sampled = logits.argmax(dim=2)
            else:
                sampled = torch.randint_like(golden_there, logits.shape[2])
            # Eq. (2): x^corrupted = replace(g, m, x^sampled)
            return loss, golden.scatter(1, positions, torch.where(masked, sampled, golden_there))

    def generate_pixels(self, images, mask):
        """The MAE-like generator (Table 10) -> (its loss, the images with sampled pixels in masked patches).

        Decision: the paper "samples RGB color values". Here, each is drawn from a normal distribution around
        the output; its variance is the batch's mean squared error, the maximum-likelihood estimate. Differs
        from sec. A.1, which takes "a MAE-Base model": the network is the same as with tokens.
        """
        p = self.args.patch_size
        patches = models.patchify(images, p)                                   # (B, N, 3 p p)
        output, positions, masked = self.generator(images, mask)               # (B, K, 3 p p)
        place = positions[:, :, None].expand_as(output)
        masked = masked[:, :, None]                                            # (B, K, 1)
        original = patches.gather(1, place)                                    # (B, K, 3 p p)
        error = (output - original).square().mean(dim=2, keepdim=True)
        loss = (error * masked).sum() / masked.sum().clamp(min=1)
        with torch.no_grad():
            sampled = output + loss.sqrt() * torch.randn_like(output)
            patches = patches.scatter(1, place, torch.where(masked, sampled, original))
            return loss, models.unpatchify(patches, p, images.shape[3])

    def corrupt(self, images, mask, tokenizer):
        """-> (the generator's loss, golden tokens (B, N), tokens with samples (B, N), corrupted images).

        Both tokens are None for generators that use no tokenizer.
        """
        if self.args.generator == "erase":
            # Decision: random erasing blanks one rectangle, whose area is drawn from --mask_ratio; the loss
            # takes all pixels, as always in RESPIX.
            corrupted = data.mask_random(images, None, count=1, area=self.args.mask_ratio)
            return torch.zeros((), device=images.device), None, None, corrupted
        if self.args.generator == "mae":
            loss, corrupted = self.generate_pixels(images, mask)
            return loss, None, None, corrupted
        golden = tokenize(tokenizer, images, self.args.patch_size)
        loss, tokens = self.generate_tokens(images, golden, mask, self.args.sampling)
        return loss, golden, tokens, detokenize(tokenizer, tokens, images.shape[3])

    def enhance(self, corrupted):
        """(B, 3, H, W) -> normalised pixels (B, 3, H, W), or logits of being replaced (B, N)."""
        output = self.pixel_shuffle(self.head(self.backbone.forward_map(corrupted))).float()
        return output if self.args.objective == "respix" else output.flatten(1)

    def enhancer_loss(self, output, images, golden, tokens):
        if self.args.objective == "revdet":
            return F.binary_cross_entropy_with_logits(output, (tokens != golden).float())
        target, _, _ = normalize_target(images, self.args.target, self.args.patch_size)
        # Sec. A.3: "a combination of l1 and l2 loss". Decision: both have weight 1.
        return F.l1_loss(output, target) + F.mse_loss(output, target)

    def forward(self, images, mask, tokenizer):
        """-> the loss (). The tokenizer is an argument, not a submodule: it is neither trained nor saved."""
        if self.args.objective == "none":
            golden = tokenize(tokenizer, images, self.args.patch_size)
            return self.generate_tokens(images, golden, mask, sampling=None)[0]
        gen_loss, golden, tokens, corrupted = self.corrupt(images, mask, tokenizer)
        output = self.enhance(corrupted)
        return gen_loss + WEIGHT[self.args.objective] * self.enhancer_loss(output, images, golden, tokens)


def draw_mask(args):
    """-> (N,) booleans, True = masked: the patches of an image that are hidden from the generator."""
    draw = data.block_mask if args.masking == "block" else data.random_mask
    return draw(args.img_size // args.patch_size, args.mask_ratio)


def crop_and_mask(image, label, args):
    """-> (a crop as bytes (3, H, W), its mask (N,)). The loader's workers draw masks, in time for the step."""
    # Decision: the paper does not say how small a crop may be; 0.08 is from BEiT's code.
    return data.pretrain_transform(args.img_size, (0.08, 1.0))(image), draw_mask(args)


def normalize_target(images, target, patch_size):
    """RESPIX's target (sec. 2.2, Table 6): ((images - mean) / std, mean, std), all of the images' shape.

    window: mean and std of the 8x8 window around each pixel (4 pixels before it, 3 after it; reflected at the
    borders). patch: mean and std of the pixel's own patch, as in MAE. none: 0 and 1.
    Decision: statistics of all three channels together, with 1e-6 added to the variance, as in MAE.
    """
    if target == "none":
        return images, torch.zeros_like(images), torch.ones_like(images)
    moments = torch.stack([images, images.square()], dim=1).mean(dim=2)        # (B, 2, H, W)
    if target == "window":
        moments = F.avg_pool2d(F.pad(moments, (4, 3, 4, 3), mode="reflect"), 8, stride=1)
    else:
        moments = F.interpolate(F.avg_pool2d(moments, patch_size), scale_factor=patch_size)
    mean, square = (moment.expand_as(images) for moment in moments.split(1, dim=1))
    std = ((square - mean.square()).clamp(min=0) + 1e-6).sqrt()
    return (images - mean) / std, mean, std


# ---------------------------------------------------------------- the tokenizer
# Any frozen module with `stride`, `codes`, `encode` and `decode`: DALL-E's dVAE, VQGAN, a small dVAE.

def resize(images, size):
    """(B, 3, H, W) in [0, 1] -> (B, 3, size, size). Decision: bicubic (BEiT's code: Lanczos)."""
    if images.shape[3] == size:
        return images
    return F.interpolate(images, size=size, mode="bicubic", antialias=True).clamp(0, 1)


def tokenizer_view(tokenizer, images, patch_size):
    """Normalised images (B, 3, H, W) -> the tokenizer's input in [0, 1], stride x stride pixels per patch.

    Decision: it is the generator's crop, resized. For 224 pixels in patches of 16, DALL-E's dVAE (stride 8)
    sees 112 pixels.
    """
    return resize(data.denormalize(images), images.shape[3] // patch_size * tokenizer.stride)


@torch.no_grad()
def tokenize(tokenizer, images, patch_size):
    """Normalised images (B, 3, H, W) -> golden tokens (B, N), one for each of N = (H / patch_size)^2 patches.

    Decision: encoder and decoder run under the caller's autocast. On a small dVAE, bf16 changes 5.7 % of the
    tokens and fp16 0.7 %. Such tokens are nearly tied: decoded images have the same PSNR (21.14, 21.15 dB).
    """
    return tokenizer.encode(tokenizer_view(tokenizer, images, patch_size)).flatten(1)


@torch.no_grad()
def detokenize(tokenizer, tokens, img_size):
    """Tokens (B, N) -> normalised images (B, 3, img_size, img_size)."""
    grid_size = math.isqrt(tokens.shape[1])
    images = tokenizer.decode(tokens.view(-1, grid_size, grid_size)).float()
    return data.normalize(resize(images, img_size))


def dvae_loss(dvae, images, temperature):
    """The loss of a dVAE (Ramesh et al., 2021, sec. 2.1) for images (B, 3, H, W) in [0, 1]."""
    logits = dvae.encode_logits(images)                                        # (B, codes, h, w)
    restored = dvae.decode(F.gumbel_softmax(logits, temperature, dim=1))
    # Differs from DALL-E: the KL divergence to uniform is taken of the codes' mean use. Taken of each
    # position's distribution, as in DALL-E, it leaves only a handful of codes in use in short runs.
    use = logits.softmax(dim=1).mean(dim=(0, 2, 3)).clamp(min=1e-8)            # (codes,)
    divergence = math.log(len(use)) - torch.special.entr(use).sum()
    return F.mse_loss(restored, images) + 0.01 * divergence


def train_dvae(args, dataset, val_images):
    """-> a small DVAE, trained on crops of the dataset; val_images set the scale of its logits."""
    dvae = models.DVAE(codes=128, width=16, embed_width=64, blocks=1).to(val_images.device)
    with torch.no_grad():
        # A fresh encoder gives nearly the same code everywhere. Decision: its last layer is scaled once, so
        # that each code's logit has mean 0 and standard deviation 4: all codes are then in use.
        logits = dvae.encode_logits(tokenizer_view(dvae, val_images, args.patch_size))
        gain = 4 / logits.std(dim=(0, 2, 3)).clamp(min=1e-3)                   # (codes,)
        output = dvae.encoder["blocks"]["output"]["conv"]
        output.w *= gain.view(-1, 1, 1, 1)
        output.b.copy_(-gain * logits.mean(dim=(0, 2, 3)))
    optimizer = torch.optim.AdamW(dvae.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=1e-4)
    sampler = data.EpochSampler(dataset.dataset, 1, 0, seed=args.seed)
    loader = DataLoader(dataset, 32, sampler=sampler, num_workers=args.num_workers)
    for step in range(args.tokenizer_steps):
        if step % len(loader) == 0:
            sampler.set_epoch(step // len(loader))
            batches = iter(loader)
        lr = learning_rate(step, args.tokenizer_steps, args.tokenizer_steps // 20, 3e-3)
        optimizer.param_groups[0]["lr"] = lr
        # Anneals the Gumbel-softmax from soft to nearly one-hot, as DALL-E does.
        progress = min(1.0, step / (0.8 * args.tokenizer_steps))
        temperature = 1 / 16 + (1 - 1 / 16) * 0.5 * (1 + math.cos(math.pi * progress))
        torch.manual_seed(data.seed_from(args.seed, step, 0))
        images = data.from_bytes(next(batches)[0], val_images.device)
        loss = dvae_loss(dvae, tokenizer_view(dvae, images, args.patch_size), temperature)
        loss.backward()
        nn.utils.clip_grad_norm_(dvae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 99 or step + 1 == args.tokenizer_steps:
            print(f"tokenizer  step {step + 1}/{args.tokenizer_steps}  loss {loss.item():.4f}", flush=True)
    return dvae


def download_dalle(folder):
    """Downloads DALL-E's two files (390 MB) unless they exist."""
    for name in ("encoder.pkl", "decoder.pkl"):
        try:
            if not os.path.exists(f"{folder}/{name}"):
                os.makedirs(folder, exist_ok=True)
                torch.hub.download_url_to_file(models.DALLE_URL + name, f"{folder}/{name}")
        except OSError as error:
            raise data.BadInput(f"cannot download {models.DALLE_URL}{name} ({error}): put it into "
                                f"--tokenizer_dir {folder}, or choose --tokenizer train") from None


def read_tokenizer(name, folder):
    """-> the tokenizer of this name, read from its files in the folder."""
    try:
        if name == "dalle":
            return models.load_dalle(f"{folder}/encoder.pkl", f"{folder}/decoder.pkl")
        if name == "vqgan":
            return models.load_vqgan(f"{folder}/vqgan.ckpt")
        return models.load_dvae(models.load_weights_file(f"{folder}/dvae.pt")["model"])
    except Exception as error:                  # a wrong file can raise errors of many types
        raise data.BadInput(f"cannot read --tokenizer {name} from {folder} ({models.one_line(error)}): put "
                            "its files there (see --tokenizer_dir in --help), or choose another") from None


def read_or_train_dvae(args, dataset, val_images):
    """-> the dVAE of --tokenizer train, which is also written to the output folder."""
    if os.path.exists(f"{args.output_dir}/checkpoint.pt"):            # the run is resumed
        folder = args.output_dir
    elif args.freeze_generator:                                       # it was trained on that run's tokens
        folder = os.path.dirname(args.freeze_generator) or "."
    else:
        folder = args.tokenizer_dir                                   # None: train a new one
    dvae = read_tokenizer("train", folder) if folder else train_dvae(args, dataset, val_images)
    write_file(f"{args.output_dir}/dvae.pt", partial(torch.save, {"model": dvae.state_dict()}))
    return dvae.cpu()


def load_tokenizer(args, dataset, val_images, device, rank, world):
    """-> the frozen tokenizer on the device; None if the generator needs no tokenizer."""
    if args.tokenizer is None:
        return None
    if args.tokenizer == "dalle":
        together(download_dalle, args.tokenizer_dir, first_only=True)
    if args.tokenizer == "train":
        # Process 0 trains it, or reads a file that other machines may not have, and sends it to all.
        tokenizer = together(read_or_train_dvae, args, dataset, val_images, first_only=True)
    else:
        tokenizer = together(read_tokenizer, args.tokenizer, args.tokenizer_dir)
    return tokenizer.to(device, memory_format=torch.channels_last).requires_grad_(False).eval()


# ---------------------------------------------------------------- data and model

def init_as_beit(vit):
    """Normal with std 0.02; the output layers of block i are divided by sqrt(2 i), as in BEiT.

    Decision: the papers state no initialisation. BEiT's code also cuts the normal off at one std.
    """
    for param in vit.parameters():
        if param.dim() > 1:                                    # all but biases and LayerNorms
            nn.init.trunc_normal_(param, std=0.02)
    for i, block in enumerate(vit.blocks, 1):
        block.attn.proj.weight.data /= math.sqrt(2 * i)
        block.mlp.fc2.weight.data /= math.sqrt(2 * i)


def build_generator(args, backbone, size, codes):
    """-> the Generator of `codes` tokens, or of pixels (None). It may share layers with the backbone."""
    # As wide as a ViT enhancer; for others as wide as vit_s, 384 (Table 13). Decision: 96 for resnet_nano.
    template = args.model
    if not isinstance(backbone, models.ViT):
        template = "vit_nano" if args.model == "resnet_nano" else "vit_s"
    vit = models.ViT(**models.MODELS[template][1] | {"depth": args.gen_depth}, **size)
    init_as_beit(vit)
    if args.share:                                             # sec. 3.3, Table 5
        vit.patch_embed = backbone.patch_embed
        for i in range(min(args.share, len(vit.blocks), len(backbone.blocks))):
            vit.blocks[i] = backbone.blocks[i]
    max_masked = round(args.mask_ratio[1] * (args.img_size // args.patch_size) ** 2)
    generator = Generator(vit, codes or 3 * args.patch_size ** 2, max_masked)
    if args.freeze_generator:
        load_generator(generator, args)
        generator.requires_grad_(False)
    return generator


def load_generator(generator, args):
    """Loads the generator's weights from --freeze_generator, an earlier run's checkpoint.pt (sec. A.1)."""
    try:
        checkpoint = models.load_weights_file(args.freeze_generator)
        for key in ("img_size", "patch_size", "gen_depth", "generator", "tokenizer"):
            if checkpoint["args"][key] != getattr(args, key):
                raise ValueError(f"--{key} was {checkpoint['args'][key]}, and is {getattr(args, key)} here")
        state = {key.removeprefix("generator."): value for key, value in checkpoint["model"].items()
                 if key.startswith("generator.")}
        models.load_finite(generator, state)
    except Exception as error:                  # a wrong file can raise errors of many types
        raise data.BadInput(f"--freeze_generator {args.freeze_generator} does not fit "
                            f"({models.one_line(error)}): give the checkpoint.pt of a CIM run with "
                            "the same generator") from None


def build_model(args, codes):
    """-> (the CIM model, its backbone's config); codes: how many the tokenizer has, None without one."""
    size = {"img_size": args.img_size, "patch_size": args.patch_size, "pool": "mean", "pos_embed": "learned"}
    config = {"model": args.model, **size, "norm": "batch"}
    backbone = models.build_model(**config)
    if isinstance(backbone, models.ViT):
        init_as_beit(backbone)
    generator = None if args.generator == "erase" else build_generator(args, backbone, size, codes)
    if args.objective == "none":
        backbone = generator.vit
    config |= {"mean": data.MEAN, "std": data.STD, "objective": args.objective,
               "method": "beit" if args.objective == "none" else "cim"}
    return CIM(backbone, generator, args), config


# ---------------------------------------------------------------- what is measured and shown

def psnr(images, reference):
    """PSNR in dB between two batches of normalised images, from the mean squared error over the batch."""
    error = F.mse_loss(data.denormalize(images), data.denormalize(reference)).item()
    return -10 * math.log10(max(error, 1e-10))


def start_log(args, model, config, tokenizer, images, num_images, world, dtype, step):
    """Prints what the run is going to do, and writes its arguments to log.jsonl.

    Also tests the tokenizer on the held-out images: samples/tokenizer.png, PSNR, codes in use.
    """
    num_weights = sum(param.numel() for param in model.parameters() if param.requires_grad)
    per_part = args.batch_size // world // args.accum_steps
    print(f"{config['method']} {args.objective} {args.model}: {num_weights / 1e6:.2f} M weights to train; "
          f"generator {args.generator}\n"
          f"{args.data}: {num_images} images, {num_images // args.batch_size} steps an epoch; "
          f"{images.device.type}, amp {dtype}\n"
          f"batch {args.batch_size} = {world} processes x {per_part} x {args.accum_steps} accumulated; "
          f"peak lr {args.lr:.3g}; from step {step}", flush=True)
    line = {"torch": torch.__version__, "torchvision": torchvision.__version__, "processes": world}
    if tokenizer:
        tokens = tokenize(tokenizer, images, args.patch_size)
        restored = detokenize(tokenizer, tokens, args.img_size)
        some = slice(None, None, max(1, len(images) // 8))
        write_grid(f"{args.output_dir}/samples/tokenizer.png", [images[some], restored[some]])
        line["tokenizer_psnr"] = round(psnr(restored, images), 2)
        line["codes_used"] = len(tokens.unique())
        print(f"tokenizer {args.tokenizer}: {line['tokenizer_psnr']} dB, {line['codes_used']} of "
              f"{tokenizer.codes} codes in use on {len(images)} held-out images", flush=True)
    write_log(args.output_dir, vars(args) | line | {"start_step": step})


def area_under_curve(scores, labels):
    """AUC: how often a positive (label True) scores above a negative; ties count half."""
    positive = scores[labels]
    negative = scores[~labels].sort().values
    below = torch.searchsorted(negative, positive) + torch.searchsorted(negative, positive, right=True)
    return below.float().mean().item() / (2 * len(negative))


@torch.no_grad()
def evaluate(model, images, tokenizer, args):
    """Measures both networks on fixed held-out images, with fixed masks and samples -> {name: number}.

    gen_loss, gen_acc: at the masked positions; replaced: fraction of these whose sample is not golden.
    psnr_corrupted, psnr_output: of the enhancer's input and output; psnr_template: of the means alone, which
    de-normalising adds to the output. accuracy, precision, recall, auc: of detecting replaced tokens; no auc
    if all tokens are replaced, or none is.
    """
    model.eval()
    torch.manual_seed(args.seed)
    mask = torch.stack([draw_mask(args) for _ in images]).to(images.device)
    gen_loss, golden, tokens, corrupted = model.corrupt(images, mask, tokenizer)
    results = {"psnr_corrupted": psnr(corrupted, images)}
    if args.generator != "erase":
        results["gen_loss"] = gen_loss.item()
    if golden is not None:
        best = model.generate_tokens(images, golden, mask, "argmax")[1]
        replaced = tokens != golden
        results["gen_acc"] = (best == golden)[mask].float().mean().item()
        results["replaced"] = replaced[mask].float().mean().item()
    if args.objective != "none":
        output = model.enhance(corrupted)
        results[f"{args.objective}_loss"] = model.enhancer_loss(output, images, golden, tokens).item()
    if args.objective == "respix":
        _, mean, std = normalize_target(images, args.target, args.patch_size)
        results["psnr_template"] = psnr(mean, images)
        results["psnr_output"] = psnr(output * std + mean, images)
    if args.objective == "revdet":
        detected = output > 0
        hits = (detected & replaced).sum()
        results["accuracy"] = (detected == replaced).float().mean().item()
        results["precision"] = (hits / detected.sum().clamp(min=1)).item()
        results["recall"] = (hits / replaced.sum().clamp(min=1)).item()
        if replaced.any() and not replaced.all():
            results["auc"] = area_under_curve(output.flatten(), replaced.flatten())
    return {name: round(value, 4) for name, value in results.items()}


@torch.no_grad()
def save_picture(path, model, images, tokenizer, args):
    """One row per image (figs. 2, 3): original, what the generator sees, three samples; then, for the last of
    them, the enhancer's output (respix), or the replaced tokens in white and the enhancer's guess (revdet).
    """
    model.eval()
    torch.manual_seed(args.seed)
    mask = torch.stack([draw_mask(args) for _ in images]).to(images.device)
    grid_size = args.img_size // args.patch_size

    def enlarge(values):                                       # (B, N) -> (B, 1, H, W)
        values = values.float().view(-1, 1, grid_size, grid_size)
        return F.interpolate(values, scale_factor=args.patch_size)

    columns = [images]
    if args.generator != "erase":
        columns.append(images * (1 - enlarge(mask)))
    for _ in range(1 if args.generator == "erase" else 3):
        _, golden, tokens, corrupted = model.corrupt(images, mask, tokenizer)
        columns.append(corrupted)
    if args.objective == "respix":
        _, mean, std = normalize_target(images, args.target, args.patch_size)
        columns.append(model.enhance(corrupted) * std + mean)  # the original's statistics (sec. A.2)
    if args.objective == "revdet":
        for values in (tokens != golden, model.enhance(corrupted).sigmoid()):
            columns.append(data.normalize(enlarge(values).expand_as(images)))
    write_grid(path, columns)


def write_grid(path, columns):
    """Columns of normalised images (B, 3, H, W) as one PNG, a row per image."""
    tiles = data.denormalize(torch.stack(columns, dim=1).flatten(0, 1))
    tiles = F.interpolate(tiles, scale_factor=max(1, round(96 / tiles.shape[3])), mode="nearest")
    grid = make_grid(tiles, nrow=len(columns), pad_value=1)
    write_file(path, partial(save_image, grid, format="png"))


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
    resume = together(open_output, args.output_dir, args.resume, first_only=True)
    if args.data == "cifar10":
        together(lambda: len(data.cifar10()), first_only=True)        # downloads it while the others wait
    crop = partial(crop_and_mask, args=args)
    loader, val_images = together(data.pretraining_data, args, crop, rank, world, device)
    val_images = val_images.to(device)
    torch.manual_seed(args.seed)
    tokenizer = load_tokenizer(args, loader.dataset, val_images, device, rank, world)
    codes = tokenizer.codes if tokenizer else None
    torch.manual_seed(args.seed)
    model, config = together(build_model, args, codes)
    model = model.to(device, memory_format=torch.channels_last)

    if args.compile:
        model.compile()
    ddp = model
    if world > 1:
        ddp = DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
    optimizer = torch.optim.AdamW(models.parameter_groups(model.named_parameters(), args.weight_decay),
                                  lr=args.lr, betas=(0.9, 0.98), fused=True)
    dtype = amp_dtype(args.amp, device)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    checkpoint_path = f"{args.output_dir}/checkpoint.pt"
    step = 0
    if resume:
        states = {"model": model, "optimizer": optimizer, "scaler": scaler}
        step = together(load_checkpoint, checkpoint_path, "cim_pretrain", args, states)["step"]

    steps_per_epoch = len(loader.dataset) // args.batch_size
    total_steps = args.epochs * steps_per_epoch
    warmup_steps = round(args.warmup_epochs * steps_per_epoch)
    last_step = min(total_steps, args.max_steps or total_steps)
    if rank == 0:
        start_log(args, model, config, tokenizer, val_images, len(loader.dataset), world, dtype, step)

    first_step, shown = step, time.time()
    while step < last_step:
        epoch = step // steps_per_epoch
        epoch_end = min((epoch + 1) * steps_per_epoch, last_step)
        loader.sampler.set_epoch(epoch, skip=step % steps_per_epoch * (args.batch_size // world))
        batches = iter(loader)
        epoch_loss = torch.zeros((), device=device)
        epoch_start = step
        timed_from, start_time = step, time.time()
        model.train()
        while step < epoch_end:
            # Decision: the learning rate falls to 1e-5, as in BEiT.
            lr = learning_rate(step, total_steps, warmup_steps, args.lr, floor=min(1e-5, args.lr))
            for group in optimizer.param_groups:
                group["lr"] = lr
            torch.manual_seed(data.seed_from(args.seed, step, rank))  # for the samples
            for i in range(args.accum_steps):
                images, mask = next(batches)
                images = data.from_bytes(images, device)
                mask = mask.to(device, non_blocking=True)
                # DDP averages the gradients only after the last part of a batch.
                ddp.require_backward_grad_sync = i == args.accum_steps - 1
                with torch.autocast(device.type, dtype, enabled=dtype is not None):
                    loss = ddp(images, mask, tokenizer) / args.accum_steps
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

        # The end of an epoch, or of the run: the first process evaluates and writes.
        loss = epoch_loss / ((step - epoch_start) * world)
        if world > 1:
            dist.all_reduce(loss)
        loss = loss.item()                                            # waits for the GPU
        seconds = time.time() - start_time
        memory = peak_memory_mb(device)                               # before evaluation adds to it
        measured = evaluate(model, val_images, tokenizer, args) if rank == 0 else {}
        together(require_finite, loss + sum(measured.values()), step)
        if rank == 0:
            line = {"epoch": epoch + 1, "step": step, "loss": loss, "lr": lr,
                    "img_per_s": round((step - timed_from) * args.batch_size / seconds, 2),
                    "peak_mem_mb": memory, **measured}
            print("  ".join(f"{key} {value:.4g}" for key, value in line.items()), flush=True)
            write_log(args.output_dir, line)
            save_picture(f"{args.output_dir}/samples/epoch_{epoch + 1:04d}.png", model,
                         val_images[::max(1, len(val_images) // 8)][:8], tokenizer, args)
            content = {"script": "cim_pretrain", "config": config, "args": vars(args), "step": step,
                       "model": model.state_dict(), "optimizer": optimizer.state_dict(),
                       "scaler": scaler.state_dict()}
            write_file(checkpoint_path, partial(torch.save, content))
    if rank == 0:
        write_file(f"{args.output_dir}/backbone.pt",
                   partial(torch.save, {"model": model.backbone.state_dict(), "config": config}))
        print(f"wrote {args.output_dir}: checkpoint.pt, backbone.pt, log.jsonl, samples/", flush=True)


if __name__ == "__main__":
    run(main)

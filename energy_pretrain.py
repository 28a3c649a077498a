"""Energy-Inspired Self-Supervised Pretraining for Vision Models (Wang et al., ICLR 2023), in one file.

One network and no decoder. Its forward pass assigns an image an energy E(x); its backward pass with respect
to the image gives a restoration step x - alpha * dE/dx. A corrupted image takes one or two such steps
downhill, and the weights learn to lead it back to the original (eq. 5; with --corrupt sort, eq. 7 on the
position embeddings). --method autoencoder trains the baselines of Tables 1 and 2: MAE and its variants.

    python energy_pretrain.py --model vit_nano --img_size 32 --patch_size 4                      # one process
    torchrun --nproc_per_node 8 energy_pretrain.py --model vit_s --data /path/to/imagenet        # one node
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 \\
        energy_pretrain.py --model vit_b --data /path/to/imagenet --batch_size 1024              # two nodes

Measured: the first command with --batch_size 32 --lr 5e-3 --epochs 2 --energy_steps 1 takes a minute on two
CPU cores (torch 2.14). One step raises the PSNR of held-out images from 12.5 to 17.8 dB (mask), from 21.1 to
21.5 (super-resolution), from 14.2 to 20.2 (noise) and from 16.6 to 18.9 (gray).
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
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torchvision.utils import make_grid, save_image

import data
import models

ALPHA = 0.1                                       # the initial step size (sec. A.1)
MIX = ("grid", "sr", "denoise", "color")          # what --corrupt mix draws from (sec. 4.2)
# Decision: the mix masks cells of a grid, the variant that Table 1 compares with MAE.


# ---------------------------------------------------------------- arguments

def parse_args():
    p = Parser(description="Energy-inspired pretraining (Wang et al., ICLR 2023).",
               allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    g = p.add_argument_group("data and model").add_argument
    g("--data", default="shapes", help="'shapes' (drawn by the program), 'cifar10' (downloaded to ./data) or "
      "a folder: train/ and val/ with images inside, or any tree of images")
    g("--model", default="vit_s", choices=models.MODELS, metavar="NAME", help=", ".join(models.MODELS))
    g("--img_size", type=number(int, 8, 4096), default=224, help="side in pixels; 32 for CIFAR")
    g("--patch_size", type=number(int, 1, 256), default=16,
      help="side of a ViT's patches in pixels; 4 for CIFAR")
    # Decision: the paper does not say which feature h takes. Both restore images equally well, and the patch
    # mean's features were the better ones.
    g("--pool", default="mean", choices=["cls", "mean"], help="a ViT's feature: class token or patch mean")

    g = p.add_argument_group("method").add_argument
    g("--method", default="energy", choices=["energy", "autoencoder"],
      help="autoencoder: the paper's baseline, a ViT with a decoder; with --corrupt grid it is MAE")
    g("--corrupt", default="mix", choices=[*MIX, "random_small", "random_large", "mix", "sort"],
      help="the pretext task; mix: one of grid, sr, denoise, color for each image; sort: ViT only")
    g("--energy_steps", type=number(int, 0, 100), metavar="N",
      help="gradient steps on each corrupted image; None: 2; the paper takes 1 in runs of 100 epochs; "
      "0: no step, corrupted images serve as negatives (Figure A)")
    g("--alpha", default="learned", choices=["learned", "predicted"],
      help="the step size: one learned number, or one predicted for each image by a linear head")
    # Decision: the paper's grid cells and super-resolution factor, 16 at 224/16, follow the patch size.
    g("--mask_cell", type=number(int, 1, 1024), help="side of a grid cell in pixels; None: the patch "
      "size; half of that gave small ViTs better features, see .study/README.md")
    # Larger factors need more shared memory than CUDA's antialiased bicubic has.
    g("--sr_scale", type=number(int, 2, 47), help="super-resolution factor; None: the patch size; "
      "here, too, half of that gave better features")
    # Decision: the paper tries several ratios and does not say which one the mix uses; 0.75 is MAE's.
    g("--mask_ratio", type=number(float, 0.01, 0.99), default=0.75,
      help="fraction of the grid's cells that are blanked")

    g = p.add_argument_group("training").add_argument
    g("--epochs", type=number(int, 1), default=200, help="passes over the training images")
    # Decision: the text at hand, which lacks the paper's Table A, states no warm-up and no clipping.
    g("--warmup_epochs", type=number(float, 0), help="linear warm-up; None: 10%% of the epochs, at most 40")
    g("--batch_size", type=number(int, 1), default=256, help="images per optimizer step, over all processes")
    g("--accum_steps", type=number(int, 1), default=1, help="parts per batch; raise it when memory is short")
    g("--lr", type=number(float, 1e-12), help="peak learning rate; None: the paper's, 1e-4 x batch_size / "
      "256; use 5e-3 for vit_nano in runs of a few minutes")
    g("--weight_decay", type=number(float, 0, 10), default=0.05, help="AdamW's, on matrices and kernels only")
    # Decision: a norm of 1.0 is rarely reached, and stops spikes.
    g("--clip_grad", type=number(float, 0), default=1.0, help="largest gradient norm; 0: no clipping")
    g("--max_steps", type=number(int, 1), help="stop after this many steps (smoke runs, benchmarks)")
    g("--seed", type=number(int, 0), default=0, help="fixes weights, order, crops and corruptions")

    g = p.add_argument_group("machine").add_argument
    g("--device", default="auto", help="auto (cuda, else mps, else cpu), or a device's name")
    g("--amp", default="auto", choices=["auto", "bf16", "fp16", "off"],
      help="mixed precision; auto: bf16 or fp16 on a CUDA GPU, off elsewhere")
    g("--compile", action="store_true", help="torch.compile the step: a minute or two to start, then faster")
    g("--num_workers", type=number(int, 0, 1024), default=data.default_workers(),
      help="data loader workers per process")
    g("--output_dir", help="where results go; None: runs/METHOD_MODEL")
    g("--resume", action="store_true", help="continue from OUTPUT_DIR/checkpoint.pt if it exists")
    args = p.parse_args()

    is_vit = args.model.startswith("vit")
    is_energy = args.method == "energy"
    if not is_energy and not is_vit:
        p.error(f"--method autoencoder is for ViTs, not {args.model}: choose a ViT, or --method energy")
    if not is_energy and (args.energy_steps is not None or args.alpha != "learned"):
        p.error("--energy_steps and --alpha are for --method energy: an autoencoder restores in one pass, "
                "so leave them out")
    if args.corrupt == "sort" and (not is_vit or args.patch_size < 3):
        p.error("--corrupt sort shuffles position embeddings and blanks the edges of patches: "
                "choose a ViT, and --patch_size 3 or more")
    args.output_dir = args.output_dir or f"runs/{args.method}_{args.model}"
    if args.energy_steps is None:
        args.energy_steps = 2 if is_energy else 1                     # an autoencoder restores in one pass
    args.mask_cell = args.mask_cell or args.patch_size
    args.sr_scale = args.sr_scale or min(args.patch_size, 47)
    args.lr = args.lr or 1e-4 * args.batch_size / 256
    args.warmup_epochs = min(0.1 * args.epochs, 40) if args.warmup_epochs is None else args.warmup_epochs
    for name, divisor, used in [("--patch_size", args.patch_size, is_vit),
                                ("--mask_cell", args.mask_cell, args.corrupt in ("grid", "mix")),
                                ("--sr_scale", args.sr_scale, args.corrupt in ("sr", "mix"))]:
        if used and args.img_size % divisor:
            p.error(f"--img_size {args.img_size} is not a multiple of {name} {divisor}: change one of them")
    num_cells = (args.img_size // args.mask_cell) ** 2
    if args.corrupt in ("grid", "mix") and not 0 < round(args.mask_ratio * num_cells) < num_cells:
        p.error(f"--mask_ratio {args.mask_ratio} blanks none or all of the {num_cells} cells: change it")
    return args


# ---------------------------------------------------------------- the method

class EnergyModel(nn.Module):
    """E(x) = h(psi(x)) and a step downhill in it (sec. 3.2). main() runs eq. (5), with a forward() per step:

        x = corrupt(images)
        for n in 1 ... N:
            x = x.detach()                           # stop gradient: no path from one step to the next
            x = x - alpha * dE(x)/dx                 # keeps its graph: the weights learn through it
            (mse(x, images) / N).backward()          # right away: the N terms share no graph
        optimizer.step()

    x is what gets restored: images (B, 3, H, W), or the position embeddings (B, M, dim) of their patches
    (sec. 3.4). `scale` is a constant factor of the energy, see calibrate_and_freeze_unused().
    """

    visible_only = False                              # the backbone sees all patches, blank or not

    def __init__(self, backbone, alpha="learned", num_steps=1):
        super().__init__()
        self.backbone = backbone                                      # psi
        # No bias in h: it would have no influence on dE/dx.
        self.head = nn.Linear(backbone.width, 1, bias=False)          # h
        self.num_steps = num_steps                                    # N
        self.register_buffer("scale", torch.ones(()))
        # Sec. A.1: alpha is kept positive. Decision: it is an exponential.
        self.alpha = alpha
        if alpha == "learned":
            self.log_alpha = nn.Parameter(torch.tensor(math.log(ALPHA)))
        else:
            self.alpha_head = nn.Linear(backbone.width, 1)
            nn.init.zeros_(self.alpha_head.weight)
            nn.init.constant_(self.alpha_head.bias, math.log(ALPHA))

    @property
    def positions(self):
        """(1, N, dim): the true position embeddings of the patches, which --corrupt sort shuffles."""
        return self.backbone.pos_embed[:, 1:].detach()

    def energy(self, x, images=None, keep=None):
        """x: images or, with `images` and `keep`, position embeddings. -> (E before `scale` (B,), alpha)."""
        if images is None:
            feature = self.backbone(x)                                # (B, width)
        else:
            feature = self.backbone(images, pos_embed=x, keep=keep)   # (B, width)
        if self.alpha == "learned":
            alpha = self.log_alpha.exp()                              # ()
        else:
            alpha = self.alpha_head(feature).exp().view(-1, *[1] * (x.dim() - 1))  # (B, 1, ...)
        return self.head(feature).squeeze(1), alpha

    def restore(self, x, **context):
        """-> x after one step downhill, with a graph that reaches all weights (unless under no_grad)."""
        # fp16 overflows at 65,504 and ViT-S has a scale of 5,000: what exceeds 1,000 is multiplied in below.
        inner_scale = self.scale.clamp(max=1000)

        def summed_energy(x):
            energy, alpha = self.energy(x, **context)
            return inner_scale * energy.sum(), alpha                  # no image's E depends on another's

        # Fused attention has no second derivative; the MATH backend has one.
        with sdpa_kernel(SDPBackend.MATH):
            # Equals autograd.grad(E, x, create_graph=True), in a form that torch.compile supports.
            gradient, alpha = torch.func.grad(summed_energy, has_aux=True)(x)
        return x - alpha * (self.scale / inner_scale) * gradient      # Eq. (5), (7): x - alpha dE/dx

    def forward(self, x, target, **context):
        """-> (the loss: for N > 0, the MSE of the restored x and the target; the detached restored x)."""
        if self.num_steps == 0:
            # Figure A, N = 0: no step is taken, and corrupted images serve as negatives.
            # Decision: the logistic loss of the energy difference between an image and its corrupted copy.
            difference = self.energy(target, **context)[0] - self.energy(x, **context)[0]
            return F.softplus(difference).mean(), x
        x = self.restore(x.detach(), **context)                       # Eq. (5): SG, the stop gradient
        return F.mse_loss(x, target), x.detach()


class AutoEncoder(nn.Module):
    """The baseline of Tables 1 and 2: a ViT and a decoder, which is not kept (MAE, He et al., 2022).

        tokens = encoder(patches of x)                  # MAE (`keep`, no `images`): the visible patches only
        tokens = decoder(tokens, mask tokens in place of masked patches, fixed positions except for sort)
        MAE:        mse(pixels of the masked patches, each patch normalised)
        sort:       cross entropy(the patch's position among N); the encoder has no position embedding
        otherwise:  mse(all pixels)                     # Decision: not normalised, as in eq. (5)

    It has the interface of EnergyModel.
    """

    def __init__(self, backbone, visible_only=False, sort=False):
        super().__init__()
        self.backbone = backbone
        self.visible_only = visible_only
        # MAE's decoder. Decision: vit_nano and vit_t get two blocks of the encoder's width instead.
        width, depth, heads = 512, 8, 16
        if backbone.width < 384:
            width, depth, heads = backbone.width, 2, backbone.blocks[0].attn.heads
        num_patches = backbone.pos_embed.shape[1] - 1
        self.embed = nn.Linear(backbone.width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.register_buffer("positions", models.sincos_2d(width, math.isqrt(num_patches)), persistent=False)
        self.blocks = nn.ModuleList(models.Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, num_patches if sort else 3 * backbone.stride ** 2)
        if sort:
            backbone.pos_embed.data.zero_()           # fine-tuning starts from these zeros (sec. 4.1)
        for name, param in self.named_parameters():
            if not name.startswith("backbone.") and param.ndim == 2:
                nn.init.xavier_uniform_(param)
        nn.init.normal_(self.mask_token, std=0.02)

    def decode(self, tokens, positions):
        """Tokens (B, 1 + M, width), class token first, and the M patches' positions -> (B, M, outputs)."""
        tokens = torch.cat([tokens[:, :1], tokens[:, 1:] + positions], dim=1)
        for block in self.blocks:
            tokens = block(tokens)
        return self.head(self.norm(tokens))[:, 1:].float()

    def forward(self, x, target, images=None, keep=None):
        """-> (the loss, the detached restored x)."""
        if images is not None:                                                       # sort
            tokens = self.embed(self.backbone.forward_tokens(images, keep=keep))     # (B, 1 + M, width)
            logits = self.decode(tokens, 0)              # (B, M, N); no positions: they are the answer
            loss = F.cross_entropy(logits.flatten(0, 1), keep.flatten())             # keep: true positions
            return loss, self.positions[0, logits.argmax(dim=2)]

        p = self.backbone.stride
        patches = models.patchify(target, p)                                         # (B, N, 3 p p)
        tokens = self.embed(self.backbone.forward_tokens(x, keep=keep))              # (B, 1 + M, width)
        if keep is None:
            output = self.decode(tokens, self.positions)                             # (B, N, 3 p p)
            loss = F.mse_loss(output, patches)
        else:                                                                        # MAE
            B, N, _ = patches.shape
            place = keep[:, :, None].expand(-1, -1, tokens.shape[2])                 # (B, M, width)
            filled = self.mask_token.to(tokens.dtype).expand(B, N, -1).scatter(1, place, tokens[:, 1:])
            output = self.decode(torch.cat([tokens[:, :1], filled], dim=1), self.positions)
            var, mean = torch.var_mean(patches, dim=2, keepdim=True)                 # (B, N, 1) each
            std = (var + 1e-6).sqrt()
            masked = torch.ones(B, N, 1, device=x.device).scatter(1, keep[:, :, None], 0)  # 1 = corrupted
            error = (output - (patches - mean) / std).square()
            loss = (error * masked).sum() / (masked.sum() * error.shape[2])
            # For pictures and PSNR: de-normalised with the original's statistics; visible patches are copied.
            output = torch.where(masked > 0, output * std + mean, patches)
        return loss, models.unpatchify(output.detach(), p, target.shape[3])


def corrupt_pixels(images, generator, task, args):
    """Normalised images (B, 3, H, W) -> the same, corrupted by `task` (secs. 4.1, 4.2)."""
    corruptions = {"grid": partial(data.mask_grid, cell=args.mask_cell, ratio=args.mask_ratio),
                   "random_small": partial(data.mask_random, count=75, area=(0.01, 0.025)),
                   "random_large": partial(data.mask_random, count=25, area=(0.02, 0.05)),
                   "sr": partial(data.low_resolution, scale=args.sr_scale),
                   "denoise": data.noise,
                   "color": data.gray}
    corruptions["mix"] = partial(data.mix, corruptions=[corruptions[name] for name in MIX])
    return corruptions[task](images, generator)


def corrupt_batch(task, images, generator, model, args):
    """-> (x_0, its target, context: the remaining arguments of model(x_0, target, **context))."""
    p = model.backbone.stride
    if task == "sort":
        # Secs. 3.4, A.2: patches stay; their position embeddings, but not the class token's, are shuffled.
        # Patch edges are blanked and half of the patches dropped, so that matching edges is no solution.
        # Decision: positions are shuffled among all patches, before half of the patches are dropped.
        B = len(images)
        N = model.positions.shape[1]
        shuffle, keep = torch.rand(2, B, N, generator=generator, device=images.device).argsort(dim=2)
        keep = keep[:, :math.ceil(N / 2)]                             # (B, M): these patches enter
        shuffled = model.positions[0, shuffle.gather(1, keep)]        # (B, M, dim)
        target = model.positions[0, keep]                             # (B, M, dim)
        return shuffled, target, {"images": data.blank_patch_edges(images, generator, p), "keep": keep}
    if task == "grid" and model.visible_only:
        mask = data.grid_mask(images, generator, args.mask_cell, args.mask_ratio)    # True = corrupted
        patch_mask = mask[:, 0, ::p, ::p].flatten(1)                  # (B, N)
        keep = patch_mask.byte().argsort(dim=1, stable=True)          # the visible patches first
        N = patch_mask.shape[1]
        num_visible = N - round(args.mask_ratio * N)
        return images.masked_fill(mask, 0), images, {"keep": keep[:, :num_visible]}
    return corrupt_pixels(images, generator, task, args), images, {}


def calibrate_and_freeze_unused(model, x, target, context):
    """Scales the energy and freezes unused weights, by a dry step on a batch. -> names of the frozen weights.

    Scale: a fresh network's dE/dx is hundreds of times too small to restore anything, and short runs end
    before the weights have grown. Decision: a constant factor makes dE/dx start with a root mean square of 1.
    Unused weights have no influence on the loss, such as the last LayerNorm's bias, which does not change
    dE/dx. They never get a gradient, and DDP would wait for one.
    """
    if isinstance(model, EnergyModel) and model.num_steps:
        with torch.no_grad():
            step = (x - model.restore(x, **context)) / ALPHA
            model.scale /= step.square().mean().sqrt().clamp(min=1e-12)
    model(x, target, **context)[0].backward()
    unused = [name for name, param in model.named_parameters() if param.requires_grad and param.grad is None]
    for name in unused:
        model.get_parameter(name).requires_grad_(False)
    model.zero_grad()
    return unused


# ---------------------------------------------------------------- data and model

def build_model(args, images):
    """-> (the model, calibrated on the first images; its backbone's config; names of the frozen weights)."""
    # ResNets get GroupNorm instead of BatchNorm (sec. B.3).
    # Decision: ViTs have a fixed sine-cosine position embedding, as in MAE.
    config = {"model": args.model, "img_size": args.img_size, "patch_size": args.patch_size,
              "pool": args.pool, "norm": "group"}
    backbone = models.build_model(**config)
    if args.img_size < backbone.stride:
        raise data.BadInput(f"--img_size {args.img_size} is too small for {args.model}: give at least "
                            f"{backbone.stride}, or choose another model")
    if args.method == "energy":
        model = EnergyModel(backbone, args.alpha, args.energy_steps)
    else:
        is_mae = args.corrupt == "grid" and args.mask_cell == args.patch_size
        model = AutoEncoder(backbone, visible_only=is_mae, sort=args.corrupt == "sort")
    # Channels-last makes convolutions faster, but on a GPU, GroupNorm converts it back and forth.
    layout = torch.contiguous_format if args.model.startswith("resnet") else torch.channels_last
    model = model.to(images.device, memory_format=layout)
    generator = torch.Generator(images.device).manual_seed(args.seed)
    batch = corrupt_batch(args.corrupt, images[:8], generator, model, args)
    unused = calibrate_and_freeze_unused(model, *batch)
    config |= {"mean": data.MEAN, "std": data.STD, "method": args.method, "objective": args.corrupt}
    return model, config, unused


# ---------------------------------------------------------------- what is measured and shown

def start_log(args, model, unused, num_images, world, dtype, step):
    """Prints what the run is going to do, and writes its arguments to log.jsonl."""
    num_weights = sum(param.numel() for param in model.parameters() if param.requires_grad)
    per_part = args.batch_size // world // args.accum_steps
    device = next(model.parameters()).device.type
    print(f"{args.method} {args.model}: {num_weights / 1e6:.2f} M weights to train; frozen, as they have "
          f"no influence on the loss: {', '.join(unused) or 'none'}\n"
          f"{args.data}: {num_images} images, {num_images // args.batch_size} steps an epoch; "
          f"{device}, amp {dtype}\n"
          f"batch {args.batch_size} = {world} processes x {per_part} x {args.accum_steps} accumulated; "
          f"peak lr {args.lr:.3g}; from step {step}", flush=True)
    versions = {"torch": torch.__version__, "torchvision": torchvision.__version__}
    write_log(args.output_dir, vars(args) | versions | {"processes": world, "start_step": step})


@torch.no_grad()
def evaluate(model, tasks, images, args):
    """Measures the model on fixed held-out images (B, 3, H, W) -> {name: number}.

    psnr_TASK_n: PSNR in dB after n steps (0: corrupted), from the mean squared error of all images in [0, 1].
    MAE's PSNR is too high to compare with the energy's, because it uses the original's statistics.
    sorted_n: fraction of the patches whose nearest position is the true one. energy_gap_TASK: mean of
    E(corrupted) - E(clean), which according to the paper should be positive.
    """
    results = {}
    for task in tasks:
        generator = torch.Generator(images.device).manual_seed(args.seed)
        x, target, context = corrupt_batch(task, images, generator, model, args)
        if args.method == "energy":
            gap = model.energy(x, **context)[0] - model.energy(target, **context)[0]     # (B,)
            results[f"energy_gap_{task}"] = round((model.scale * gap.float().mean()).item(), 3)
        for n in range(args.energy_steps + 1):
            if n > 0:
                _, x = model.forward(x, target, **context)            # unlike model(), never compiled
            if task == "sort":
                correct = nearest_position(model.positions, x) == context["keep"]
                results[f"sorted_{n}"] = round(correct.float().mean().item(), 4)
            else:
                error = F.mse_loss(data.denormalize(x), data.denormalize(target)).item()
                results[f"psnr_{task}_{n}"] = round(-10 * math.log10(max(error, 1e-10)), 2)
    return results


@torch.no_grad()
def save_picture(path, model, tasks, images, args):
    """One row per image: original, corrupted, step 1, ..., N, and two beyond N. A mix: two images a task.

    Steps beyond N were not trained and may overshoot. With --corrupt sort, patches that point to one place
    cover each other. MAE's patches have the original's mean and deviation.
    """
    rows = []
    num_steps = args.energy_steps                                     # 1 for an autoencoder
    if args.method == "energy" and num_steps > 0:
        num_steps += 2
    for task, chunk in zip(tasks, images.split(8 // len(tasks))):
        generator = torch.Generator(images.device).manual_seed(args.seed)
        x, target, context = corrupt_batch(task, chunk, generator, model, args)
        row = [chunk]
        for n in range(num_steps + 1):
            if n > 0:
                _, x = model.forward(x, target, **context)
            row.append(paste_patches(model, x, **context) if task == "sort" else x)
        rows.append(torch.stack(row, dim=1))                          # (images, columns, 3, H, W)
    tiles = data.denormalize(torch.cat(rows).flatten(0, 1))
    tiles = F.interpolate(tiles, scale_factor=max(1, round(96 / args.img_size)), mode="nearest")
    grid = make_grid(tiles, nrow=len(row), pad_value=1)
    write_file(path, partial(save_image, grid, format="png"))


def nearest_position(positions, x):
    """Position embeddings x (B, M, dim) -> (B, M): the index of the nearest one in positions (1, N, dim)."""
    return torch.cdist(x, positions.expand(len(x), -1, -1)).argmin(dim=2)


def paste_patches(model, x, images, keep):
    """-> images (B, 3, H, W): each patch in `keep` is pasted where its position embedding in x points."""
    p = model.backbone.stride
    patches = models.patchify(images, p)                              # (B, N, 3 p p)
    source = keep[:, :, None].expand(-1, -1, patches.shape[2])        # (B, M, 3 p p)
    place = nearest_position(model.positions, x)[:, :, None].expand_as(source)
    pasted = torch.zeros_like(patches).scatter(1, place, patches.gather(1, source))
    return models.unpatchify(pasted, p, images.shape[3])


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
    # As in MAE, a crop covers at least a fifth of the image.
    crop = data.pretrain_transform(args.img_size, (0.2, 1.0))
    loader, val_images = together(data.pretraining_data, args, crop, rank, world, device)
    val_images = val_images.to(device)
    torch.manual_seed(args.seed)
    model, config, unused = together(build_model, args, val_images)
    tasks = MIX if args.corrupt == "mix" else (args.corrupt,)

    # In bf16 and fp16, attention's MATH backend otherwise computes in fp32, which takes 28 % more memory.
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    if args.compile:
        torch._dynamo.config.optimize_ddp = False     # DDP's buckets would split the graph inside func.grad
        model.compile()
    ddp = model
    if world > 1:
        ddp = DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
    optimizer = torch.optim.AdamW(models.parameter_groups(model.named_parameters(), args.weight_decay),
                                  lr=args.lr, betas=(0.9, 0.95), fused=True)
    dtype = amp_dtype(args.amp, device)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    checkpoint_path = f"{args.output_dir}/checkpoint.pt"
    step = 0
    if resume:
        states = {"model": model, "optimizer": optimizer, "scaler": scaler}
        step = together(load_checkpoint, checkpoint_path, "energy_pretrain", args, states)["step"]

    steps_per_epoch = len(loader.dataset) // args.batch_size
    total_steps = args.epochs * steps_per_epoch
    warmup_steps = round(args.warmup_epochs * steps_per_epoch)
    last_step = min(total_steps, args.max_steps or total_steps)
    if rank == 0:
        start_log(args, model, unused, len(loader.dataset), world, dtype, step)

    first_step, shown = step, time.time()
    generator = torch.Generator(device)                               # draws the corruptions
    while step < last_step:
        epoch = step // steps_per_epoch
        epoch_end = min((epoch + 1) * steps_per_epoch, last_step)
        loader.sampler.set_epoch(epoch, skip=step % steps_per_epoch * (args.batch_size // world))
        batches = iter(loader)
        epoch_loss = torch.zeros((), device=device)
        epoch_start = step
        timed_from, start_time = step, time.time()
        while step < epoch_end:
            # Decision: the learning rate falls to 0, as in MAE.
            lr = learning_rate(step, total_steps, warmup_steps, args.lr)
            for group in optimizer.param_groups:
                group["lr"] = lr
            generator.manual_seed(data.seed_from(args.seed, step, rank))
            for i in range(args.accum_steps):
                images = data.from_bytes(next(batches)[0], device)
                x, target, context = corrupt_batch(args.corrupt, images, generator, model, args)
                num_terms = max(1, args.energy_steps)
                for n in range(num_terms):
                    # The N terms share no graph: each runs backward at once; memory does not grow with N.
                    # DDP averages the gradients in the last one only.
                    ddp.require_backward_grad_sync = i == args.accum_steps - 1 and n == num_terms - 1
                    with torch.autocast(device.type, dtype, enabled=dtype is not None):
                        loss, x = ddp(x, target, **context)
                    loss = loss / (num_terms * args.accum_steps)
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
        measured = evaluate(model, tasks, val_images, args) if rank == 0 else {}
        together(require_finite, loss + sum(measured.values()), step)
        if rank == 0:
            line = {"epoch": epoch + 1, "step": step, "loss": loss, "lr": lr,
                    "img_per_s": round((step - timed_from) * args.batch_size / seconds, 2),
                    "peak_mem_mb": memory, **measured}
            if args.method == "energy" and args.alpha == "learned":
                line["alpha"] = model.log_alpha.exp().item()
            print("  ".join(f"{key} {value:.4g}" for key, value in line.items()), flush=True)
            write_log(args.output_dir, line)
            save_picture(f"{args.output_dir}/samples/epoch_{epoch + 1:04d}.png", model, tasks,
                         val_images[::max(1, len(val_images) // 8)], args)
            content = {"script": "energy_pretrain", "config": config, "args": vars(args), "step": step,
                       "model": model.state_dict(), "optimizer": optimizer.state_dict(),
                       "scaler": scaler.state_dict()}
            write_file(checkpoint_path, partial(torch.save, content))
    if rank == 0:
        write_file(f"{args.output_dir}/backbone.pt",
                   partial(torch.save, {"model": model.backbone.state_dict(), "config": config}))
        print(f"wrote {args.output_dir}: checkpoint.pt, backbone.pt, log.jsonl, samples/", flush=True)


if __name__ == "__main__":
    run(main)

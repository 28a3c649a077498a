"""Energy-Inspired Self-Supervised Pretraining for Vision Models (Wang et al., ICLR 2023), in one file.

One network and no decoder. Its forward pass assigns an image an energy E(x); its backward pass with respect
to the image gives a restoration step x - alpha * dE/dx. A corrupted image takes one or two such steps
downhill, and the weights learn to lead it back to the original (eq. 5; with --corrupt sort, eq. 7 on the
position embeddings). --method autoencoder trains the baselines of Tables 1 and 2: MAE and its variants.
A comment "Decision:" marks what the paper leaves open, "Differs from" what was changed knowingly.

    python energy_pretrain.py --recipe short                         # one process; below: one node, two nodes
    torchrun --nproc_per_node 8 energy_pretrain.py --model vit_s --data /path/to/imagenet --compile
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 \\
        energy_pretrain.py --model vit_b --data /path/to/imagenet --batch_size 1024 --compile

Measured: the first command takes 110 seconds on two cores of an AMD EPYC (torch 2.14). One step raises the
PSNR of held-out images, drawn shapes at half the resolution, from 24.84 to 27.60 dB.
"""
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")    # before torch starts: idle threads block a busy CPU

import json
import math
import sys
import time
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

import data
import models
from data import number

ALPHA = 0.1                                       # the initial step size (sec. A.1)
MIX = ("grid", "sr", "denoise", "color")          # what --corrupt mix draws from (sec. 4.2)
# Decision: the mix masks cells of a grid, the variant that Table 1 compares with MAE.

# --recipe short, our own: a small model on small images, in minutes on a CPU.
SHORT = dict(model="vit_nano", img_size=32, patch_size=4, corrupt="sr", energy_steps=1, batch_size=32,
             lr=3e-3, epochs=2)


# ---------------------------------------------------------------- arguments

def parse_args():
    p = data.Parser("Energy-inspired pretraining (Wang et al., ICLR 2023).")
    g = p.add_argument_group("data and model").add_argument
    g("--recipe", choices=["short"], help="short: a small model on small images, in minutes on a CPU: "
      + " ".join(data.as_flags(SHORT)))
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
    # Sec. 4: N = 2 unless otherwise specified. Table 3's caption: N = 1, except for runs of 200 epochs.
    g("--energy_steps", type=number(int, 0, 100), metavar="N", default=2,
      help="gradient steps on each corrupted image; Table 3 seems to take 1 for ViT-B and ViT-L; "
      "0: no step, corrupted images serve as negatives (Figure A)")
    g("--energy_scale", type=number(float, 1e-6), metavar="FACTOR",
      help="a constant factor of the energy; 1: the paper's; if not given, it makes the first dE/dx have a "
      "root mean square of 1")
    g("--alpha", default="learned", choices=["learned", "predicted"],
      help="the step size: one learned number, or one predicted for each image by a linear head")
    # Decision: the paper's cells and factor, 16 at 224/16, follow the patch size. On small images they are
    # half of it: a factor equal to the patch size leaves one colour of a patch, and little to learn from.
    g("--mask_cell", type=number(int, 1, 1024), help="side of a grid cell in pixels; if not given, the patch "
      f"size, or below {data.SMALL} pixels half of it")
    # Larger factors need more shared memory than CUDA's antialiased bicubic has.
    g("--sr_scale", type=number(int, 2, 47), help="super-resolution factor; if not given, as --mask_cell")
    # Decision: the paper tries several ratios and does not say which one the mix uses; 0.75 is MAE's.
    g("--mask_ratio", type=number(float, 0.01, 0.99), default=0.75,
      help="fraction of the grid's cells that are blanked")
    g("--sort_whole", action="store_true",
      help="sort all patches with their edges, without the regularisation of sec. A.2: matching edges is "
      "then a trivial solution (sec. 3.4)")

    # Decision: the text at hand lacks the paper's Table A. "Most of the experimental settings follow" MAE
    # (sec. 4): betas, weight decay, cosine and the rule for the rate are MAE's. Rate and batch size are from
    # a transcript of Table A whose source can no longer be found. The baselines take the same, where MAE has
    # a base rate of 1.5e-4 and batches of 4,096.
    g = p.add_argument_group("training").add_argument
    # Decision: 200 for all models, as for Table 3's ViT-S; its caption may mean 100 for ViT-B, 50 for ViT-L.
    g("--epochs", type=number(int, 1), default=200, help="passes over the training images")
    # Decision: warm-up and clipping stand in no text at hand.
    g("--warmup_epochs", type=number(float, 0),
      help="linear warm-up; if not given, a tenth of the epochs, at most 40")
    g("--batch_size", type=number(int, 1), default=256, help="images per optimizer step, over all processes")
    g("--accum_steps", type=number(int, 1), default=1, help="parts per batch; raise it when memory is short")
    g("--lr", type=number(float, 1e-12), help="peak learning rate; if not given, 1e-4 x batch_size / 256; "
      "runs of a few minutes want more")
    g("--weight_decay", type=number(float, 0, 10), default=0.05, help="AdamW's, on matrices and kernels only")
    # Decision: a norm of 1.0 is rarely reached, and stops spikes. MAE does not clip.
    g("--clip_grad", type=number(float, 0), default=1.0, help="largest gradient norm; 0: no clipping")
    data.add_run_flags(p)
    g = p.add_argument_group("evaluation").add_argument
    g("--eval_only", action="store_true",
      help="measure a trained checkpoint.pt on the images of --data, and write a picture of them beside it; "
      "--corrupt and --energy_steps may differ from training")
    g("--init", metavar="FILE", help="the checkpoint.pt to measure; if not given, OUTPUT_DIR/checkpoint.pt")

    args = typed = p.parse_args()                     # typed: without a recipe's or a checkpoint's values
    if args.recipe == "short":
        # Of a flag given twice, the last one counts.
        args = p.parse_args([*data.as_flags(SHORT), *sys.argv[1:]])
    if args.eval_only:
        args.init = args.init or f"{args.output_dir or f'runs/{args.method}_{args.model}'}/checkpoint.pt"
        saved = models.read_args(args.init)
        args = p.parse_args([*data.as_flags(saved), *sys.argv[1:], "--init", args.init])
        if args.method == "autoencoder" and args.corrupt != saved.get("corrupt"):
            p.error("an autoencoder restores only what it was trained on: leave --corrupt out")
    elif args.init:
        p.error("--init is for --eval_only: leave it out")

    is_vit = args.model.startswith("vit")
    if args.method == "autoencoder":
        if not is_vit:
            p.error(f"--method autoencoder is for ViTs, not {args.model}: choose a ViT, or --method energy")
        if args.alpha != "learned" or args.energy_scale or typed.energy_steps != 2:
            p.error("--energy_steps, --energy_scale and --alpha are for --method energy: an autoencoder "
                    "restores in one pass, so leave them out")
        args.energy_steps = 1                                         # one pass counts as one step
    if args.corrupt == "sort" and (not is_vit or args.patch_size < 3 and not args.sort_whole):
        p.error("--corrupt sort shuffles position embeddings and blanks the edges of patches: "
                "choose a ViT, and --patch_size 3 or more")
    args.output_dir = args.output_dir or f"runs/{args.method}_{args.model}"
    cell = max(2, args.patch_size if args.img_size >= data.SMALL else args.patch_size // 2)
    hides_patches = args.method == "autoencoder" and args.corrupt == "grid"
    args.mask_cell = args.mask_cell or (args.patch_size if hides_patches else cell)
    args.sr_scale = args.sr_scale or min(cell, 47)
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
# Shapes: B images, P patches of which M enter the network, N energy steps.

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

    def __init__(self, backbone, alpha="learned", num_steps=1, scale=1.0):
        super().__init__()
        self.backbone = backbone                                      # psi
        # No bias in h: it would have no influence on dE/dx.
        self.head = nn.Linear(backbone.width, 1, bias=False)          # h
        self.num_steps = num_steps                                    # N
        self.register_buffer("scale", torch.tensor(scale))
        # Sec. A.1: alpha is kept positive. Decision: it is an exponential.
        self.alpha = alpha
        if alpha == "learned":
            self.log_alpha = nn.Parameter(torch.tensor(math.log(ALPHA)))
        else:
            self.alpha_head = nn.Linear(backbone.width, 1)
            nn.init.zeros_(self.alpha_head.weight)
            nn.init.constant_(self.alpha_head.bias, math.log(ALPHA))

    @property
    def patch_positions(self):
        """(1, P, dim): the position embedding that stands for each patch's place, for --corrupt sort."""
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
        # fp16 overflows at 65,504, and ViT-S has a scale of 6,631. So at most 1,000 of it enters the
        # gradient, and the rest multiplies the result.
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
        if self.num_steps > 0:
            # Eq. (5) puts the stop gradient (SG) around E's argument alone. Algorithm 1, line 8, puts it
            # around the whole x, so that a step's loss does not reach the step before. This is Algorithm 1.
            x = self.restore(x.detach(), **context)
            return F.mse_loss(x, target), x.detach()
        # Figure A, N = 0: no step is taken, and corrupted images serve as negatives.
        # Decision: the logistic loss of the energy difference between an image and its corrupted copy.
        difference = self.energy(target, **context)[0] - self.energy(x, **context)[0]
        return F.softplus(self.scale * difference).mean(), x


class AutoEncoder(nn.Module):
    """The baseline of Tables 1 and 2: a ViT and a decoder, which is not kept (MAE, He et al., 2022).

        tokens = encoder(patches of x)                  # MAE (`keep`, no `images`): the visible patches only
        tokens = decoder(tokens, mask tokens in place of masked patches, fixed positions except for sort)
        MAE:        mse(pixels of the masked patches, each patch normalised)
        sort:       cross entropy(the patch's position among P); the encoder has no position embedding
                                         # Decision: the paper says "directly predict the position"
        otherwise:  mse(all pixels)                     # Decision: not normalised, as in eq. (5)

    It has the interface of EnergyModel.
    """

    def __init__(self, backbone, sort=False):
        super().__init__()
        self.backbone = backbone
        # MAE's decoder, but for the linear layers' biases, which start at zero in MAE. Decision: vit_nano and
        # vit_t get two blocks of the encoder's width instead.
        width, depth, heads = 512, 8, 16
        if backbone.width < 384:
            width, depth, heads = backbone.width, 2, backbone.blocks[0].attn.heads
        num_patches = backbone.pos_embed.shape[1] - 1
        self.embed = nn.Linear(backbone.width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        positions = models.sincos_2d(width, math.isqrt(num_patches))             # (1, P, width)
        self.register_buffer("patch_positions", positions, persistent=False)
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
        """Tokens (B, 1 + M, width), class token first, and the M patches' position embeddings or 0 ->
        (B, M, outputs).
        """
        tokens = torch.cat([tokens[:, :1], tokens[:, 1:] + positions], dim=1)
        for block in self.blocks:
            tokens = block(tokens)
        return self.head(self.norm(tokens))[:, 1:].float()

    def forward(self, x, target, images=None, keep=None):
        """-> (the loss, the detached restored x)."""
        if images is not None:                                                       # sort
            tokens = self.embed(self.backbone.forward_tokens(images, keep=keep))     # (B, 1 + M, width)
            logits = self.decode(tokens, 0)              # (B, M, P); no positions: they are the answer
            loss = F.cross_entropy(logits.flatten(0, 1), keep.flatten())             # keep: true positions
            return loss, self.patch_positions[0, logits.argmax(dim=2)]

        p = self.backbone.stride
        patches = models.patchify(target, p)                                         # (B, P, 3 p p)
        tokens = self.embed(self.backbone.forward_tokens(x, keep=keep))              # (B, 1 + M, width)
        if keep is None:
            output = self.decode(tokens, self.patch_positions)                             # (B, P, 3 p p)
            loss = F.mse_loss(output, patches)
        else:                                                                        # MAE
            B, P, _ = patches.shape
            place = keep[:, :, None].expand(-1, -1, tokens.shape[2])                 # (B, M, width)
            filled = self.mask_token.to(tokens.dtype).expand(B, P, -1).scatter(1, place, tokens[:, 1:])
            output = self.decode(torch.cat([tokens[:, :1], filled], dim=1), self.patch_positions)
            # As in MAE's code, this variance is the unbiased one.
            var, mean = torch.var_mean(patches, dim=2, keepdim=True)                 # (B, P, 1) each
            std = (var + 1e-6).sqrt()
            masked = torch.ones(B, P, 1, device=x.device).scatter(1, keep[:, :, None], 0)  # 1 = corrupted
            error = (output - (patches - mean) / std).square()
            loss = (error * masked).sum() / (masked.sum() * error.shape[2])
            # For pictures and PSNR: de-normalised with the original's statistics; visible patches are copied.
            output = torch.where(masked > 0, output * std + mean, patches)
        return loss, models.unpatchify(output.detach(), p, target.shape[3])


def corrupt_pixels(images, generator, task, args):
    """Normalised images (B, 3, H, W) -> the same, corrupted by `task` (secs. 4.1, 4.2)."""
    cells = partial(data.blank, mask=data.grid_mask)
    rectangles = partial(data.blank, mask=data.random_rectangles)
    corruptions = {"grid": partial(cells, cell=args.mask_cell, ratio=args.mask_ratio),
                   "random_small": partial(rectangles, count=75, area=(0.01, 0.025)),
                   "random_large": partial(rectangles, count=25, area=(0.02, 0.05)),
                   "sr": partial(data.low_resolution, scale=args.sr_scale),
                   "denoise": data.noise,
                   "color": data.gray}
    corruptions["mix"] = partial(data.mix, corruptions=[corruptions[name] for name in MIX])
    return corruptions[task](images, generator)


def corrupt_batch(task, images, generator, model, args):
    """-> (x_0, its target, context: the remaining arguments of model(x_0, target, **context)).

    Most tasks: x_0 is the corrupted images, the target the images; there is no context.
    MAE: the same, and `keep` (B, M), the indices of the visible patches, the only ones that enter.
    sort: x_0 is shuffled position embeddings (B, M, dim), the target the true ones, `images` what the patches
    are cut from, and `keep` (B, M) which patches enter.
    """
    p = model.backbone.stride
    if task == "sort":
        # Secs. 3.4, A.2: patches stay; their position embeddings, but not the class token's, are shuffled.
        # Patch edges are blanked and half of the patches dropped, so that matching edges is no solution.
        # Decision: positions are shuffled among all patches, before half of the patches are dropped.
        B = len(images)
        P = model.patch_positions.shape[1]
        shuffle, keep = torch.rand(2, B, P, generator=generator, device=images.device).argsort(dim=2)
        if not args.sort_whole:
            keep = keep[:, :math.ceil(P / 2)]                         # (B, M): these patches enter
            images = data.blank_patch_edges(images, generator, p)
        shuffled = model.patch_positions[0, shuffle.gather(1, keep)]  # (B, M, dim)
        target = model.patch_positions[0, keep]                       # (B, M, dim)
        return shuffled, target, {"images": images, "keep": keep}
    if args.method == "autoencoder" and args.corrupt == "grid" and args.mask_cell == p:          # MAE
        mask = data.grid_mask(images, generator, args.mask_cell, args.mask_ratio)    # True = corrupted
        patch_mask = mask[:, 0, ::p, ::p].flatten(1)                  # (B, P)
        keep = patch_mask.byte().argsort(dim=1, stable=True)          # the visible patches first
        P = patch_mask.shape[1]
        num_visible = P - round(args.mask_ratio * P)
        return images.masked_fill(mask, 0), images, {"keep": keep[:, :num_visible]}
    return corrupt_pixels(images, generator, task, args), images, {}


def calibrate_and_freeze_unused(model, x, target, context, calibrate=True):
    """Scales the energy and freezes unused weights, by a forward and backward pass on one batch.

    Scale: a fresh network's dE/dx is far too small to restore anything, and short runs end before the weights
    have grown. Decision: a constant factor makes dE/dx start with a root mean square of 1. It is 6,631 for
    vit_s, 5,581 for vit_b, 1,597 for convnext_t and 402 for resnet50; --energy_scale 1 is the paper's energy.
    Unused weights have no influence on the loss, such as the last LayerNorm's bias, which does not change
    dE/dx. They never get a gradient, and DDP would wait for one.
    """
    if calibrate and isinstance(model, EnergyModel) and model.num_steps:
        with torch.no_grad():
            step = (x - model.restore(x, **context)) / ALPHA
            model.scale /= step.square().mean().sqrt().clamp(min=1e-12)
    model(x, target, **context)[0].backward()
    for param in model.parameters():
        param.requires_grad_(param.grad is not None)
    model.zero_grad()


# ---------------------------------------------------------------- data and model

def backbone_config(args):
    """-> the options of models.build_backbone, and what else fine-tuning wants to know of backbone.pt."""
    # ResNets get GroupNorm instead of BatchNorm (sec. B.3).
    # Decision: ViTs have a fixed sine-cosine position embedding, as in MAE.
    return {"model": args.model, "img_size": args.img_size, "patch_size": args.patch_size, "pool": args.pool,
            "norm": "group", "mean": data.MEAN, "std": data.STD, "method": args.method,
            "objective": args.corrupt}


def build_model(args, images):
    """-> EnergyModel or AutoEncoder on the images' device, made ready on the first of them."""
    torch.manual_seed(args.seed)
    backbone = models.build_backbone(args.model, args.img_size, args.patch_size, args.pool, norm="group")
    if args.img_size < backbone.stride:
        raise data.BadInput(f"--img_size {args.img_size} is too small for {args.model}: give at least "
                            f"{backbone.stride}, or choose another model")
    if args.method == "energy":
        model = EnergyModel(backbone, args.alpha, args.energy_steps, args.energy_scale or 1.0)
    else:
        model = AutoEncoder(backbone, sort=args.corrupt == "sort")
    # Channels-last is faster for convolutions, except in ResNets: on a GPU, their GroupNorm converts each map
    # to the other layout, and the next convolution converts it back.
    layout = torch.contiguous_format if args.model.startswith("resnet") else torch.channels_last
    model = model.to(images.device, memory_format=layout)
    generator = torch.Generator(images.device).manual_seed(args.seed)
    batch = corrupt_batch(args.corrupt, images[:8], generator, model, args)
    calibrate_and_freeze_unused(model, *batch, calibrate=not args.energy_scale)
    return model


def prepare(args, resume, rank, world, device):
    """-> (loader, held-out images, model, optimizer, scaler, steps done). Raises BadInput and OSError."""
    # As in MAE, a crop covers at least a fifth of the image.
    crop = data.pretrain_transform(args.img_size, (0.2, 1.0))
    loader, val_images = data.pretraining_data(args, crop, rank, world, device)
    model = build_model(args, val_images)
    optimizer = torch.optim.AdamW(models.parameter_groups(model.named_parameters(), args.weight_decay),
                                  lr=args.lr, betas=(0.9, 0.95), fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=amp_dtype(args.amp, device) == torch.float16)
    step = 0
    if resume:
        step = models.restore("energy_pretrain", args, model, optimizer, scaler)["step"]
    return loader, val_images, model, optimizer, scaler, step


# ---------------------------------------------------------------- what is measured and shown

@torch.no_grad()
def trajectory(model, task, images, args):
    """-> ([x_0, ..., x_N], target, context): images corrupted with a fixed seed, and restored in N steps."""
    generator = torch.Generator(images.device).manual_seed(args.seed)
    x, target, context = corrupt_batch(task, images, generator, model, args)
    steps = [x]
    for _ in range(args.energy_steps):
        steps.append(model.forward(steps[-1], target, **context)[1])  # unlike model(), never compiled
    return steps, target, context


@torch.no_grad()
def evaluate(model, images, args):
    """Measures the model on fixed held-out images (B, 3, H, W) -> {name: number}.

    psnr_TASK_n: PSNR in dB after n steps (0: corrupted), from the mean squared error of all images in [0, 1].
    MAE's PSNR is too high to compare with the energy's, because it uses the original's statistics.
    sorted_n: fraction of the patches whose nearest position is the true one. energy_gap_TASK: mean of
    E(corrupted) - E(clean), which according to the paper should be positive. energy_drop_TASK: mean of
    E(corrupted) - E(restored), by how much the steps lower the energy.
    """
    results = {}
    for task in MIX if args.corrupt == "mix" else [args.corrupt]:
        steps, target, context = trajectory(model, task, images, args)
        if args.method == "energy":
            def energy(x):
                return model.scale * model.energy(x, **context)[0].float().mean()

            results[f"energy_gap_{task}"] = round((energy(steps[0]) - energy(target)).item(), 3)
            results[f"energy_drop_{task}"] = round((energy(steps[0]) - energy(steps[-1])).item(), 3)
        for n, x in enumerate(steps):
            if task == "sort":
                correct = nearest_position(model.patch_positions, x) == context["keep"]
                results[f"sorted_{n}"] = round(correct.float().mean().item(), 4)
            else:
                error = F.mse_loss(data.denormalize(x), data.denormalize(target)).item()
                results[f"psnr_{task}_{n}"] = round(-10 * math.log10(max(error, 1e-10)), 2)
    return results


def save_picture(path, model, images, args):
    """One row per image: original, corrupted, step 1, ..., N. A mix: two images a task.

    With --corrupt sort, patches that point to one place cover each other. MAE's patches have the original's
    mean and deviation.
    """
    images = images[::max(1, len(images) // 8)]
    tasks = MIX if args.corrupt == "mix" else [args.corrupt]
    rows = []                                                         # a list of columns for each task
    for task, chunk in zip(tasks, images.split(8 // len(tasks))):
        steps, _, context = trajectory(model, task, chunk, args)
        if task == "sort":
            steps = [paste_patches(model, x, **context) for x in steps]
        rows.append([chunk, *steps])
    # zip() leaves out images beyond the eighth.
    names = ["original", "corrupted", *(f"step {n}" for n in range(1, args.energy_steps + 1))]
    if args.method == "autoencoder":
        names[2] = "restored"
    data.save_grid(path, {name: torch.cat(column) for name, column in zip(names, zip(*rows))})


def nearest_position(positions, x):
    """Position embeddings x (B, M, dim) -> (B, M): the index of the nearest one in positions (1, P, dim)."""
    return torch.cdist(x, positions.expand(len(x), -1, -1)).argmin(dim=2)


def paste_patches(model, x, images, keep):
    """-> images (B, 3, H, W): each patch in `keep` is pasted where its position embedding in x points."""
    p = model.backbone.stride
    patches = models.patchify(images, p)                              # (B, P, 3 p p)
    source = keep[:, :, None].expand(-1, -1, patches.shape[2])        # (B, M, 3 p p)
    place = nearest_position(model.patch_positions, x)[:, :, None].expand_as(source)
    pasted = torch.zeros_like(patches).scatter(1, place, patches.gather(1, source))
    return models.unpatchify(pasted, p, images.shape[3])


def evaluate_checkpoint(args, device):
    """--eval_only: prints one line of numbers and writes one picture beside the checkpoint."""
    images = data.evaluation_images(args, device)
    model = build_model(args, images)
    models.restore("energy_pretrain", args, model, path=args.init)
    print(json.dumps({"images": len(images)} | evaluate(model, images, args)), flush=True)
    path = f"{os.path.dirname(args.init) or '.'}/eval_{args.corrupt}.png"
    save_picture(path, model, images, args)
    print(f"wrote {path}", flush=True)


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
    if args.eval_only:
        if rank == 0:
            evaluate_checkpoint(args, device)
        return
    resume = data.open_output(args)
    # together() ends all processes if one of them has an error.
    prepared = data.together(prepare, args, resume, rank, world, device)
    loader, val_images, model, optimizer, scaler, step = prepared
    data.require_equal(args, loader.dataset)
    dtype = amp_dtype(args.amp, device)

    # In bf16 and fp16, attention's MATH backend otherwise computes in fp32, which takes 28 % more memory.
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    if args.compile:
        torch._dynamo.config.optimize_ddp = False     # DDP's buckets would split the graph inside func.grad
        model.compile()
    ddp = model
    if world > 1:
        ddp = DistributedDataParallel(model, gradient_as_bucket_view=True)

    steps_per_epoch = len(loader.dataset) // args.batch_size
    total_steps = args.epochs * steps_per_epoch
    warmup_steps = round(args.warmup_epochs * steps_per_epoch)
    last_step = min(total_steps, args.max_steps or total_steps)
    data.start_log(args, f"{args.method} {args.model}", model, loader.dataset, step, dtype)

    data.catch_signals()
    loader.sampler.step = step                                        # where a resumed run goes on
    batches = iter(loader)                                            # endless
    first_step = epoch_start = timed_from = step
    line_time = start_time = time.time()
    generator = torch.Generator(device)                               # draws the corruptions
    loss_sum = torch.zeros((), device=device)                         # of this epoch
    stop = False
    while step < last_step and not stop:
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
        if saves and rank == 0:
            config = backbone_config(args)
            models.save_checkpoint("energy_pretrain", args, config, step, model, optimizer, scaler)
            if not stop or step == last_step:
                line |= evaluate(model, val_images, args)
                save_picture(f"{args.output_dir}/samples/step_{step:06d}.png", model, val_images, args)
            if args.method == "energy" and args.alpha == "learned":
                line["alpha"] = model.log_alpha.exp().item()
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

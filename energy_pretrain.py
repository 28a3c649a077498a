"""Energy-Inspired Self-Supervised Pretraining for Vision Models (Wang et al., ICLR 2023), in one file.

One network and no decoder. Forward, it gives an image an energy E(x). Backward with respect to the image, it
gives a restoration step x - alpha * dE/dx. A picture is corrupted, stepped downhill once or twice, and the
weights learn to make the result the original (eq. 5; with --corrupt sort, eq. 7 on the position embedding).

    python energy_pretrain.py --model vit_nano --img_size 32 --patch_size 4                      # one process
    torchrun --nproc_per_node 8 energy_pretrain.py --model vit_s --data /path/to/imagenet        # one node
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 \\
        energy_pretrain.py --model vit_b --data /path/to/imagenet --batch_size 1024              # two nodes

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
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torchvision.utils import make_grid, save_image

import data
import models

ALPHA = 0.1                                       # where the step size starts (sec. A.1)
MIX = ("grid", "sr", "denoise", "color")          # what --corrupt mix draws from (sec. 4.2)


# ---------------------------------------------------------------- arguments

def parse_args():
    p = argparse.ArgumentParser(description="Energy-inspired pretraining (Wang et al., ICLR 2023).",
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    g = p.add_argument_group("data and model").add_argument
    g("--data", default="shapes", help="'shapes' (drawn by the program), 'cifar10' (downloaded to ./data) or "
      "a folder: train/ and val/ with pictures below, or any tree of pictures")
    g("--model", default="vit_s", choices=models.MODELS, metavar="NAME", help=", ".join(models.MODELS))
    g("--img_size", type=int, default=224, help="pixels a side; 32 for CIFAR")
    g("--patch_size", type=int, default=16, help="pixels a side of a ViT's patches; 4 for CIFAR")
    g("--pool", default="mean", choices=["cls", "mean"], help="a ViT's feature: class token or patch mean")

    g = p.add_argument_group("method").add_argument
    g("--corrupt", default="mix", choices=[*MIX, "random_small", "random_large", "mix", "sort"],
      help="the pretext task; mix: one of grid, sr, denoise, color for each image; sort: ViT only")
    g("--energy_steps", type=int, default=2, metavar="N",
      help="gradient steps on each corrupted image; the paper takes 1 in runs of 100 epochs")
    g("--alpha", default="learned", choices=["learned", "predicted"],
      help="the step size: one learned number, or one predicted for each image by a linear head")
    # Decision: the paper's cells of 16 pixels and super-resolution of 16x, at 224/16, follow the patch size.
    g("--mask_cell", type=int, help="pixels a side of the grid mask's cells; None: the patch size")
    g("--sr_scale", type=int, help="how many times smaller sr makes a picture; None: the patch size")
    # Decision: the paper tries several ratios and does not say which one mix takes; 0.75 is MAE's.
    g("--mask_ratio", type=float, default=0.75, help="share of the cells that the grid mask blanks")

    g = p.add_argument_group("training").add_argument
    g("--epochs", type=int, default=200, help="passes over the training pictures")
    # Decision: the paper does not state its warm-up.
    g("--warmup_epochs", type=float, help="linear warm-up; None: 10%% of the epochs, at most 40")
    g("--batch_size", type=int, default=256, help="images per optimizer step, over all processes")
    g("--accum_steps", type=int, default=1, help="parts to split a batch into when memory is short")
    g("--lr", type=float, help="peak learning rate; None: the paper's, 1e-4 x batch_size / 256; vit_nano in "
      "a run of minutes wants 5e-3")
    g("--weight_decay", type=float, default=0.05, help="AdamW's, on matrices and kernels only")
    # Decision: the paper states no clipping; 1.0 is rarely reached and catches spikes.
    g("--clip_grad", type=float, default=1.0, help="largest norm of the gradient; 0: no clipping")
    g("--max_steps", type=int, help="stop after so many optimizer steps (smoke runs, benchmarks)")
    g("--seed", type=int, default=0, help="fixes weights, order, crops and corruptions")

    g = p.add_argument_group("machine").add_argument
    g("--device", default="auto", help="auto (cuda, else mps, else cpu), or a device's name")
    g("--amp", default="auto", choices=["auto", "bf16", "fp16", "off"],
      help="mixed precision; auto: bf16 or fp16 on a GPU, off elsewhere")
    g("--compile", action="store_true", help="torch.compile the step: a minute or two to start, then faster")
    g("--num_workers", type=int, default=min(8, os.cpu_count()), help="loader processes per process")
    g("--output_dir", help="where results go; None: runs/energy_MODEL")
    g("--resume", action="store_true", help="continue from OUTPUT_DIR/checkpoint.pt if it is there")
    args = p.parse_args()

    args.output_dir = args.output_dir or f"runs/energy_{args.model}"
    args.mask_cell, args.sr_scale = args.mask_cell or args.patch_size, args.sr_scale or args.patch_size
    args.lr = 1e-4 * args.batch_size / 256 if args.lr is None else args.lr
    args.warmup_epochs = min(0.1 * args.epochs, 40) if args.warmup_epochs is None else args.warmup_epochs
    is_vit = args.model.startswith("vit")
    for name, divisor, used in [("--patch_size", args.patch_size, is_vit),
                                ("--mask_cell", args.mask_cell, args.corrupt in ("grid", "mix")),
                                ("--sr_scale", args.sr_scale, args.corrupt in ("sr", "mix"))]:
        if used and (divisor < 1 or args.img_size % divisor):
            p.error(f"--img_size {args.img_size} is not a multiple of {name} {divisor}: change either")
    if args.corrupt == "sort" and (not is_vit or args.patch_size < 3):
        p.error("--corrupt sort shuffles position embeddings and blanks the edges of patches: "
                "choose a ViT, and --patch_size 3 or more")
    for name in ("energy_steps", "epochs", "batch_size", "accum_steps", "mask_ratio"):
        if getattr(args, name) <= 0 or name == "mask_ratio" and args.mask_ratio > 1:
            p.error(f"--{name} {getattr(args, name)}: must be above 0 (and --mask_ratio at most 1)")
    return args


# ---------------------------------------------------------------- the method

class EnergyModel(nn.Module):
    """E(x) = h(psi(x)) and the step downhill in it (sec. 3.2).

    x is what gets restored: images (B, 3, H, W), or the position embedding (B, M, dim) of images (sec. 3.4).
    """

    def __init__(self, backbone, alpha="learned"):
        super().__init__()
        self.backbone = backbone                                      # psi
        # No bias in h: it would have no influence on dE/dx.
        self.head = nn.Linear(backbone.width, 1, bias=False)          # h
        self.register_buffer("scale", torch.ones(()))                 # of the energy, set once by prepare()
        # Sec. A.1: alpha is kept positive. Decision: by an exponential.
        self.alpha = alpha
        if alpha == "learned":
            self.log_alpha = nn.Parameter(torch.tensor(math.log(ALPHA)))
        else:
            self.alpha_head = nn.Linear(backbone.width, 1)
            nn.init.zeros_(self.alpha_head.weight)
            nn.init.constant_(self.alpha_head.bias, math.log(ALPHA))

    def energy(self, x, images=None, keep=None):
        """-> (sum of the energies, alpha). The sum, not the mean: each image gets its own gradient."""
        feature = self.backbone(x) if images is None else self.backbone(images, pos_embed=x, keep=keep)
        if self.alpha == "learned":
            alpha = self.log_alpha.exp()                              # ()
        else:
            alpha = self.alpha_head(feature).exp().view(-1, *[1] * (x.dim() - 1))  # (B, 1, ...)
        return self.scale * self.head(feature).sum(), alpha

    def restore(self, x, **context):
        """One step downhill: the shape of x, with a graph to all weights (unless under no_grad)."""
        # Fused attention has no second derivative; the MATH backend has.
        with sdpa_kernel(SDPBackend.MATH):
            # What autograd.grad(E, x, create_graph=True) gives, in a form that torch.compile can take too.
            gradient, alpha = torch.func.grad(self.energy, has_aux=True)(x, **context)
        return x - alpha * gradient                                   # Eq. (5), (7): x - alpha dE/dx

    def forward(self, x, target, **context):
        """-> (MSE of the restored x against the target, the restored x without graph)."""
        x = self.restore(x.detach(), **context)                       # Eq. (5): SG, no gradient across steps
        return F.mse_loss(x, target), x.detach()


def make_corruptions(args):
    """name -> function (images, generator) -> corrupted images, for the tasks that corrupt pixels."""
    kinds = {"grid": partial(data.mask_grid, cell=args.mask_cell, ratio=args.mask_ratio),
             "random_small": partial(data.mask_random, count=75, area=(0.01, 0.025)),
             "random_large": partial(data.mask_random, count=25, area=(0.02, 0.05)),
             "sr": partial(data.low_resolution, scale=args.sr_scale),
             "denoise": data.noise,
             "color": data.gray}
    return kinds | {"mix": partial(data.mix, corruptions=[kinds[kind] for kind in MIX])}


def start(kind, images, generator, corruptions, backbone):
    """Corrupts a batch -> (x_0, the target, what else the energy takes).

    sort (sec. 3.4, A.2): the patches stay, their position embeddings are shuffled, not the class token's.
    Patch edges are blanked and half of the patches dropped, so that matching edges does not solve it.
    """
    if kind != "sort":
        return corruptions[kind](images, generator), images, {}
    true = backbone.pos_embed[:, 1:].detach()                         # (1, N, dim)
    B, N = len(images), true.shape[1]
    shuffle, keep = torch.rand(2, B, N, generator=generator, device=images.device).argsort(dim=2)
    keep = keep[:, :math.ceil(N / 2)]                                 # (B, M): these patches enter
    shuffled, target = true[0, shuffle.gather(1, keep)], true[0, keep]  # (B, M, dim) each
    images = data.blank_patch_edges(images, generator, backbone.stride)
    return shuffled, target, {"images": images, "keep": keep}


def prepare(model, x, target, context):
    """What a dry step on a corrupted batch decides, for any backbone; -> names of the weights it froze.

    The energy's scale. A fresh network's dE/dx is hundreds of times too small to restore anything, and short
    runs end before the weights have grown. Decision: a fixed factor lets dE/dx start with root mean square 1.
    Weights without influence on dE/dx, such as the last LayerNorm's bias. Their gradient never comes and DDP
    would wait for it: they are frozen.
    """
    with torch.no_grad():
        model.scale /= ((x - model.restore(x, **context)) / ALPHA).square().mean().sqrt()
    model(x, target, **context)[0].backward()
    unused = [name for name, param in model.named_parameters() if param.requires_grad and param.grad is None]
    for name in unused:
        model.get_parameter(name).requires_grad_(False)
    model.zero_grad()
    return unused


# ---------------------------------------------------------------- what is measured and shown

@torch.no_grad()
def evaluate(model, kinds, images, corruptions, args, rank, world):
    """On fixed held-out images -> {"psnr_KIND_n": dB after n steps; n = 0: corrupted}, of the squared error's
    mean over all images, in [0, 1]; for sort {"sorted_n": share of the patches nearest to their own place}.
    """
    results = {}
    share = torch.arange(len(images), device=images.device)[rank::world]  # each image in one process
    for kind in kinds:
        generator = torch.Generator(images.device).manual_seed(args.seed)
        x, target, context = start(kind, images, generator, corruptions, model.backbone)
        scores = torch.zeros(args.energy_steps + 1, device=images.device)
        for part in share.split(args.batch_size // (world * args.accum_steps)) if len(share) else ():
            x_n, part_context = x[part], {key: value[part] for key, value in context.items()}
            for n in range(args.energy_steps + 1):
                if n > 0:
                    x_n = model.restore(x_n, **part_context)
                if kind == "sort":
                    score = nearest_position(model.backbone.pos_embed[:, 1:], x_n) == part_context["keep"]
                else:
                    score = (data.denormalize(x_n) - data.denormalize(target[part])).square()
                scores[n] += score.float().flatten(1).mean(dim=1).sum()
        if world > 1:
            dist.all_reduce(scores)
        for n, score in enumerate((scores / len(images)).tolist()):
            if kind == "sort":
                results[f"sorted_{n}"] = round(score, 4)
            else:
                results[f"psnr_{kind}_{n}"] = round(-10 * math.log10(max(score, 1e-10)), 2)
    return results


@torch.no_grad()
def save_picture(path, model, kinds, images, corruptions, args):
    """A row per image: original, corrupted, step 1, ..., N, and two steps beyond N; the kinds take turns."""
    rows = []
    for kind, part in zip(kinds, images.split(8 // len(kinds))):
        generator = torch.Generator(images.device).manual_seed(args.seed)
        x, _, context = start(kind, part, generator, corruptions, model.backbone)
        row = [part]
        for _ in range(args.energy_steps + 3):
            row.append(paste_patches(model.backbone, x, **context) if kind == "sort" else x)
            x = model.restore(x, **context)
        rows.append(torch.stack(row, dim=1))                          # (images, columns, 3, H, W)
    tiles = data.denormalize(torch.cat(rows).flatten(0, 1))
    tiles = F.interpolate(tiles, scale_factor=max(1, round(96 / args.img_size)), mode="nearest")
    save_image(make_grid(tiles, nrow=len(row), pad_value=1), path)


def nearest_position(pos_embed, x):
    """(B, M, dim) -> (B, M): the position in pos_embed (1, N, dim) that each embedding is nearest to."""
    return torch.cdist(x, pos_embed.expand(len(x), -1, -1)).argmin(dim=2)


def paste_patches(backbone, x, images, keep):
    """The patches `keep` of the images, each pasted where its position embedding x (B, M, dim) points."""
    p = backbone.stride
    patches = F.unfold(images, p, stride=p)                           # (B, C*p*p, N)
    source = keep[:, None].expand(-1, patches.shape[1], -1)           # (B, C*p*p, M)
    place = nearest_position(backbone.pos_embed[:, 1:], x)[:, None].expand_as(source)
    pasted = torch.zeros_like(patches).scatter(2, place, patches.gather(2, source))
    return F.fold(pasted, images.shape[2:], p, stride=p)


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
    checkpoint_path = open_output(args.output_dir, args.resume, rank)
    torch.manual_seed(args.seed)

    # Pictures: order and crops depend on (seed, epoch, index) alone; each process draws its own corruptions.
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

    # Model. ResNets get GroupNorm instead of BatchNorm (sec. B.3).
    config = {"model": args.model, "img_size": args.img_size, "patch_size": args.patch_size,
              "pool": args.pool, "norm": "group"}
    backbone = models.build_model(**config)
    model = EnergyModel(backbone, args.alpha).to(device, memory_format=torch.channels_last)
    corruptions, kinds = make_corruptions(args), MIX if args.corrupt == "mix" else (args.corrupt,)
    generator = torch.Generator(device).manual_seed(args.seed)
    unused = prepare(model, *start(args.corrupt, val_images[:8], generator, corruptions, backbone))
    if args.compile:
        model.compile()
    ddp = DistributedDataParallel(model) if world > 1 else model
    optimizer = torch.optim.AdamW(parameter_groups(model.named_parameters(), args.weight_decay), lr=args.lr,
                                  betas=(0.9, 0.95), fused=True)
    dtype = amp_dtype(args.amp, device)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    step, run = 0, config | {"corrupt": args.corrupt, "alpha": args.alpha}
    if args.resume and os.path.exists(checkpoint_path):
        checkpoint = load_checkpoint(checkpoint_path, "energy_pretrain", run)
        step = checkpoint["step"]
        for name, part in (("model", model), ("optimizer", optimizer), ("scaler", scaler)):
            part.load_state_dict(checkpoint[name])
    total_steps, warmup_steps = args.epochs * steps_per_epoch, round(args.warmup_epochs * steps_per_epoch)
    last_step = min(total_steps, args.max_steps or total_steps)
    if rank == 0:
        count = sum(param.numel() for param in model.parameters() if param.requires_grad) / 1e6
        print(f"{args.model}: {count:.2f} M weights; frozen, no influence on dE/dx: {', '.join(unused)}\n"
              f"{len(train_set)} pictures, {steps_per_epoch} steps an epoch; {device.type}, amp {dtype}; "
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
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step - 1, total_steps, warmup_steps, args.lr)
            generator.manual_seed(data.seed_from(args.seed, step, rank))
            losses.append(torch.zeros((), device=device))
            for part in range(args.accum_steps):
                waiting = time.time()
                images = next(batches)[0].to(device, non_blocking=True)
                data_time += time.time() - waiting
                x, target, context = start(args.corrupt, images, generator, corruptions, backbone)
                for n in range(args.energy_steps):
                    # The N terms share no graph: each goes backward at once, and memory does not grow with N.
                    last = part == args.accum_steps - 1 and n == args.energy_steps - 1
                    with nullcontext() if last or world == 1 else ddp.no_sync():
                        with torch.autocast(device.type, dtype, enabled=dtype is not None):
                            loss, x = ddp(x, target, **context)
                        loss = loss / (args.energy_steps * args.accum_steps)
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

        # The end of an epoch (or of the run): all processes evaluate, the first one writes.
        epoch_losses += check_finite(losses, step)
        seconds = time.time() - epoch_time
        loss = torch.tensor(sum(epoch_losses) / len(epoch_losses) / world, device=device)
        if world > 1:
            dist.all_reduce(loss)
        measured = evaluate(model, kinds, val_images, corruptions, args, rank, world)
        if not all(math.isfinite(value) for value in (loss.item(), *measured.values())):
            sys.exit(f"error: the weights are not finite after step {step}: the last checkpoint is kept; "
                     "--resume with a lower --lr or with --amp off")
        if rank == 0:
            line = {"epoch": epoch + 1, "step": step, "loss": loss.item(), "lr": group["lr"],
                    "img_per_s": round((step - epoch_start) * args.batch_size / seconds, 1),
                    "data_share": round(data_time / seconds, 3),
                    "peak_mem_mb": peak_memory_mb(device), **measured}
            if args.alpha == "learned":
                line["alpha"] = model.log_alpha.exp().item()
            print("  ".join(f"{key} {value:.4g}" for key, value in line.items()), flush=True)
            write_log(args.output_dir, line)
            save_picture(f"{args.output_dir}/samples/epoch_{epoch + 1:04d}.png", model, kinds,
                         val_images[::max(1, len(val_images) // 8)], corruptions, args)
            save({"model": backbone.state_dict(), "config": config | {"mean": data.MEAN, "std": data.STD}},
                 f"{args.output_dir}/backbone.pt")
            save({"script": "energy_pretrain", "config": run, "step": step, "model": model.state_dict(),
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

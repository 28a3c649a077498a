"""Corrupted Image Modeling for Self-Supervised Visual Pre-Training (Fang et al., ICLR 2023), in one file.

A small BEiT, the generator, predicts the tokens of masked patches. Tokens sampled from its predictions are
decoded to a plausibly corrupted image. From it, the enhancer, a ViT or a ResNet, learns to restore the
original pixels (RESPIX) or to detect the replaced tokens (REVDET). Only the enhancer is kept. --objective
none trains the generator alone: with the ViT's full depth, this is BEiT, the baseline of Tables 1, 3,
9 and 11, but without its relative positions and LayerScale.

    python cim_pretrain.py --recipe short                            # one process; below: one node, two nodes
    torchrun --nproc_per_node 8 cim_pretrain.py --model vit_b --data /path/to/imagenet --compile
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 \\
        cim_pretrain.py --model resnet50 --objective revdet --data /path/to/imagenet --compile

Measured: the first command takes 260 seconds on two cores of an AMD EPYC (torch 2.14). On held-out images,
the generator predicts 43 % of the masked tokens (chance: 1 %), and its samples replace 75 % of them. The PSNR
is 17.5 dB for corrupted images, 19.1 for the enhancer's output and 15.6 for the window means alone.
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
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

import data
import models
from data import number

WEIGHT = {"respix": 10.0, "revdet": 1.0}    # the enhancer's loss weight (Table 13); the generator's is 1

# --recipe short, our own: a small model on small images, in minutes on a CPU.
SHORT = dict(model="vit_nano", img_size=32, patch_size=4, tokenizer="train", tokenizer_steps=500,
             batch_size=32, lr=2e-3, epochs=2)


# ---------------------------------------------------------------- arguments

def parse_args():
    p = data.Parser("Corrupted Image Modeling (Fang et al., ICLR 2023).")
    g = p.add_argument_group("data and model").add_argument
    g("--recipe", choices=["short"], help="short: a small model on small images, in minutes on a CPU: "
      + " ".join(data.as_flags(SHORT)))
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
      help="bounds of the masked fraction; if not given, 100 to 120 of 196 patches, 0.5 for mae and erase")
    g("--sampling", default="softmax", choices=["softmax", "argmax", "uniform"],
      help="how tokens are drawn from beit's predictions (Table 7)")
    g("--gen_depth", type=number(int, 1, 100), default=4, help="the generator's depth; for --objective none, "
      "give the ViT's own, or finetune.py cannot load it")
    g("--share", type=number(int, 0, 100), default=2,
      help="blocks that a ViT shares with the generator, besides the patch embedding; 0: share nothing")
    g("--freeze_generator", metavar="FILE", help="use this checkpoint.pt's generator without training it")
    g("--tokenizer", choices=["dalle", "vqgan", "train"], help="published weights, or a small dVAE trained "
      "first on the run's own images; if not given, dalle")
    g("--tokenizer_dir", help="folder with encoder.pkl and decoder.pkl (downloaded if missing), "
      "vqgan.ckpt, or the dvae.pt of another run; if not given, ./tokenizer, and for train that of the "
      "frozen generator's run, or else a new one is trained")
    g("--tokenizer_steps", type=number(int, 1), default=1000, help="training steps of --tokenizer train")

    g = p.add_argument_group("training").add_argument
    g("--epochs", type=number(int, 1), default=300, help="passes over the training images")
    # Decision: the paper warms up for 10 epochs, which would be most of a short run.
    g("--warmup_epochs", type=number(float, 0),
      help="linear warm-up; if not given, 10, at most a tenth of the epochs")
    g("--batch_size", type=number(int, 1), default=2048, help="images per step, over all processes")
    g("--accum_steps", type=number(int, 1), default=1, help="parts per batch; raise it when memory is short")
    g("--lr", type=number(float, 1e-12), help="peak learning rate; if not given, 1.5e-3 x batch_size / 2048; "
      "runs of a few minutes want more")
    g("--weight_decay", type=number(float, 0, 10), default=0.05, help="on matrices and kernels only")
    g("--clip_grad", type=number(float, 0), default=3.0, help="largest gradient norm; 0: no clipping")
    data.add_run_flags(p)
    g = p.add_argument_group("evaluation").add_argument
    g("--eval_only", action="store_true",
      help="measure a trained checkpoint.pt on the images of --data, and write a picture of them beside it; "
      "masks and sampling may differ from training")
    g("--init", metavar="FILE", help="the checkpoint.pt to measure; if not given, OUTPUT_DIR/checkpoint.pt")

    args = p.parse_args()
    if args.recipe == "short":
        tokens = ("tokenizer", "tokenizer_steps") if args.generator != "beit" else ()
        short = {name: value for name, value in SHORT.items() if name not in tokens}
        # Of a flag given twice, the last one counts.
        args = p.parse_args([*data.as_flags(short), *sys.argv[1:]])
    if args.eval_only:
        args.init = args.init or f"{args.output_dir or default_output_dir(args)}/checkpoint.pt"
        args = p.parse_args([*data.as_flags(models.read_args(args.init)), *sys.argv[1:], "--init", args.init])
    elif args.init:
        p.error("--init is for --eval_only: leave it out")

    is_vit = args.model.startswith("vit")
    has_tokens = args.generator == "beit"
    if not has_tokens and (args.objective != "respix" or args.tokenizer or args.tokenizer_dir
                           or args.sampling != "softmax"):
        p.error(f"--generator {args.generator} has no tokens to sample or to detect: choose --objective "
                "respix, and leave --tokenizer, --tokenizer_dir and --sampling out")
    if args.objective != "respix" and args.target != "window":
        p.error("--target is for --objective respix: leave it out")
    if args.freeze_generator and (args.objective == "none" or args.generator == "erase"):
        p.error("--freeze_generator needs an enhancer to train and a generator to freeze: leave it out")
    if args.objective == "none" and not is_vit:
        p.error(f"--objective none trains the generator alone, a ViT, not {args.model}: choose a ViT")
    if has_tokens:
        args.tokenizer = args.tokenizer or "dalle"
    # Layers are shared by a ViT enhancer and a generator that is trained with it; else --share is unused.
    if not is_vit or args.objective == "none" or args.generator == "erase" or args.freeze_generator:
        args.share = 0
    args.output_dir = args.output_dir or default_output_dir(args)
    args.lr = args.lr or 1.5e-3 * args.batch_size / 2048
    if args.warmup_epochs is None:
        args.warmup_epochs = min(10, 0.1 * args.epochs)

    args.mask_ratio = args.mask_ratio or ([100 / 196, 120 / 196] if has_tokens else [0.5, 0.5])
    low, high = args.mask_ratio
    num_patches = (args.img_size // args.patch_size) ** 2
    if low > high or round(low * num_patches) < 1 or (args.masking == "block" and low < 16 / 196):
        p.error(f"--mask_ratio {low} {high}: give the lower fraction first; it must mask at least one of "
                f"{num_patches} patches and, with --masking block, 16 / 196 of them, BEiT's smallest block")

    parts = args.accum_steps * int(os.environ.get("WORLD_SIZE", 1))
    if args.model.startswith("resnet") and args.batch_size <= parts:
        p.error("a ResNet's BatchNorm needs at least two images at a time: raise --batch_size")
    return args


def default_output_dir(args):
    return f"runs/{'beit' if args.objective == 'none' else f'cim_{args.objective}'}_{args.model}"


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
        indices among the N patches (B, K), True where these are masked (B, K)).
        """
        # Fixed shapes: the head sees K positions of each image, its masked ones first. If fewer than K are
        # masked, visible ones follow, which the third output marks False.
        indices = mask.byte().argsort(dim=1, descending=True, stable=True)[:, :self.max_masked]
        x = self.vit.patch_embed(images)                       # (B, N, dim)
        x = torch.where(mask[:, :, None], self.mask_token, x)  # Eq. (1): replace(x, m, [MASK])
        x = self.vit.encode(x)[:, 1:]                          # (B, N, dim)
        x = x.gather(1, indices[:, :, None].expand(-1, -1, x.shape[2]))      # (B, K, dim)
        return self.head(x).float(), indices, mask.gather(1, indices)


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
    objective "none" there is no enhancer, and `backbone` is the generator's ViT. `generator` is a Generator
    or, for random erasing, None. erase_area: (low, high), fractions of the image's area.
    """

    def __init__(self, backbone, generator, objective, patch_size, target="window", sampling="softmax",
                 erase_area=(0.5, 0.5)):
        super().__init__()
        self.backbone = backbone
        self.generator = generator
        self.objective = objective
        self.patch_size = patch_size
        self.target = target
        self.sampling = sampling
        self.erase_area = erase_area
        if objective == "none":
            return
        # Decision: each cell of the backbone's map predicts all that it covers: stride x stride pixels, or
        # (stride / patch_size)^2 tokens, that is, 2 x 2 for a ResNet's stride of 32 and patches of 16.
        side = backbone.stride if objective == "respix" else backbone.stride // patch_size
        channels = 3 if objective == "respix" else 1
        self.head = nn.Conv2d(backbone.width, channels * side ** 2, kernel_size=1)
        self.pixel_shuffle = nn.PixelShuffle(side)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def generate_tokens(self, images, golden, mask, sampling):
        """Images (B, 3, H, W), golden tokens (B, N), mask (B, N) with True = masked -> (the generator's loss,
        the tokens with its samples at the masked positions, or None if `sampling` is None).
        """
        logits, indices, masked = self.generator(images, mask)                 # (B, K, codes)
        golden_there = golden.gather(1, indices)                               # (B, K)
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
            return loss, golden.scatter(1, indices, torch.where(masked, sampled, golden_there))

    def generate_pixels(self, images, mask):
        """The MAE-like generator (Table 10) -> (its loss, the images with sampled pixels in masked patches).

        Sec. A.1: "we sample RGB color values". Decision: from a normal distribution around the output, whose
        variance is the batch's mean squared error, the maximum-likelihood estimate. Differs from sec. A.1,
        which takes "a MAE-Base model": the network is the same as with tokens.
        """
        patches = models.patchify(images, self.patch_size)                     # (B, N, 3 p p)
        output, indices, masked = self.generator(images, mask)                 # (B, K, 3 p p)
        place = indices[:, :, None].expand_as(output)
        masked = masked[:, :, None]                                            # (B, K, 1)
        original = patches.gather(1, place)                                    # (B, K, 3 p p)
        error = (output - original).square().mean(dim=2, keepdim=True)
        loss = (error * masked).sum() / masked.sum().clamp(min=1)
        with torch.no_grad():
            sampled = output + loss.sqrt() * torch.randn_like(output)
            patches = patches.scatter(1, place, torch.where(masked, sampled, original))
            return loss, models.unpatchify(patches, self.patch_size, images.shape[3])

    def corrupt(self, images, mask, tokenizer):
        """-> (corrupted images, the generator's loss, what was replaced: True for tokens or patches (B, N)).

        With random erasing, what was replaced is pixels: (B, 1, H, W).
        """
        if self.generator is None:
            # Decision: the "50% random erasing" of sec. 3.3 sets one rectangle to the mean colour.
            erased = data.random_rectangles(images, None, count=1, area=self.erase_area)
            return images.masked_fill(erased, 0), torch.zeros((), device=images.device), erased
        if tokenizer is None:
            loss, corrupted = self.generate_pixels(images, mask)
            return corrupted, loss, mask
        golden = tokenize(tokenizer, images, self.patch_size)
        loss, tokens = self.generate_tokens(images, golden, mask, self.sampling)
        return detokenize(tokenizer, tokens, images.shape[3]), loss, tokens != golden

    def enhance(self, corrupted):
        """(B, 3, H, W) -> normalised pixels (B, 3, H, W), or logits of being replaced (B, N)."""
        output = self.pixel_shuffle(self.head(self.backbone.forward_map(corrupted))).float()
        return output if self.objective == "respix" else output.flatten(1)

    def enhancer_loss(self, output, images, replaced):
        if self.objective == "revdet":
            return F.binary_cross_entropy_with_logits(output, replaced.float())
        pixels, _, _ = normalize_target(images, self.target, self.patch_size)
        # Sec. A.3: "a combination of l1 and l2 loss". Decision: both have weight 1.
        error = (output - pixels).abs() + (output - pixels).square()
        if self.generator is not None:
            return error.mean()
        # Sec. 3.3: with random erasing, "the model is required to recover the erased pixels".
        return (error.mean(dim=1, keepdim=True) * replaced).sum() / replaced.sum().clamp(min=1)

    def forward(self, images, mask, tokenizer):
        """-> the loss (). The tokenizer is an argument, not a submodule: it is neither trained nor saved."""
        if self.objective == "none":
            golden = tokenize(tokenizer, images, self.patch_size)
            return self.generate_tokens(images, golden, mask, sampling=None)[0]
        corrupted, gen_loss, replaced = self.corrupt(images, mask, tokenizer)
        output = self.enhance(corrupted)
        return gen_loss + WEIGHT[self.objective] * self.enhancer_loss(output, images, replaced)


def draw_mask(args):
    """-> (N,) booleans, True = masked: the patches of an image that are hidden from the generator."""
    draw = data.block_mask if args.masking == "block" else data.random_mask
    return draw(args.img_size // args.patch_size, args.mask_ratio)


def crop_and_mask(image, label, args):
    """-> (a crop as bytes (3, H, W), its mask (N,)). The loader's workers draw masks, ahead of the step."""
    # Decision: the paper does not say how small a crop may be; 0.08 is from BEiT's code.
    return data.pretrain_transform(args.img_size, (0.08, 1.0))(image), draw_mask(args)


def normalize_target(images, target, patch_size):
    """RESPIX's target (sec. 2.2, Table 6): ((images - mean) / std, mean, std), all of the images' shape.

    window: mean and std of the 8x8 window around each pixel. Decision: it has 4 pixels before the pixel and
    3 after it, and images are reflected at their borders. patch: mean and std of the pixel's own patch, as
    in MAE. none: 0 and 1. Decision: statistics of all three channels together, with 1e-6 added to the
    variance, as in MAE, whose variance is the unbiased one; this is not.
    """
    if target == "none":
        return images, torch.zeros_like(images), torch.ones_like(images)
    # In fp32, E[x^2] - E[x]^2 makes targets of flat regions wrong. (Apple's GPUs have no float64.)
    exact = (images.cpu() if images.device.type == "mps" else images).double()
    moments = torch.stack([exact, exact.square()], dim=1).mean(dim=2)          # (B, 2, H, W)
    if target == "window":
        moments = F.avg_pool2d(F.pad(moments, (4, 3, 4, 3), mode="reflect"), 8, stride=1)
    else:
        moments = F.interpolate(F.avg_pool2d(moments, patch_size), scale_factor=patch_size)
    mean, square = moments.split(1, dim=1)                                     # (B, 1, H, W) each
    std = ((square - mean.square()).clamp(min=0) + 1e-6).sqrt().to(images).expand_as(images)
    mean = mean.to(images).expand_as(images)
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
    batch_size = min(32, len(dataset))
    sampler = data.EndlessSampler(len(dataset), batch_size, seed=args.seed)
    batches = iter(DataLoader(dataset, batch_size, sampler=sampler, num_workers=args.num_workers))
    start = shown = time.time()
    for step in range(args.tokenizer_steps):
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
        if time.time() - shown > 10 or step == 0 or step + 1 == args.tokenizer_steps:
            shown = time.time()
            left = (shown - start) / (step + 1) * (args.tokenizer_steps - step - 1)
            print(f"tokenizer  step {step + 1}/{args.tokenizer_steps}  loss {loss.item():.4f}  "
                  f"left {left:.0f} s", flush=True)
    return dvae


def read_tokenizer(name, folder):
    """-> the tokenizer of this name, read from its files in the folder. Raises BadInput."""
    try:
        if name == "dalle":
            return models.load_dalle(f"{folder}/encoder.pkl", f"{folder}/decoder.pkl")
        if name == "vqgan":
            return models.load_vqgan(f"{folder}/vqgan.ckpt")
        content = models.read_file(f"{folder}/dvae.pt")
        return models.load_dvae(content["model"] if isinstance(content, dict) and "model" in content else {})
    except models.BadFile as error:
        raise data.BadInput(f"cannot read --tokenizer {name} from {folder} ({error}): put its files there "
                            "(see --tokenizer_dir in --help), or choose another") from None


def read_or_train_dvae(args, resume, dataset, val_images):
    """-> the dVAE of --tokenizer train, read or trained, on the CPU. OUTPUT_DIR keeps it as dvae.pt."""
    folder = args.tokenizer_dir
    if args.freeze_generator and not folder:                   # it was trained on the tokens of its own run
        folder = os.path.dirname(args.freeze_generator) or "."
    if resume:
        folder = args.output_dir
    dvae = read_tokenizer("train", folder) if folder else train_dvae(args, dataset, val_images).cpu()
    models.save(f"{args.output_dir}/dvae.pt", {"model": dvae.state_dict()})
    return dvae


def download_dalle(folder, is_to_fetch):
    """Downloads DALL-E's two files (390 MB) unless they exist, if is_to_fetch()."""
    for name in ("encoder.pkl", "decoder.pkl"):
        if is_to_fetch() and not os.path.exists(f"{folder}/{name}"):
            data.download(models.DALLE_URL + name, f"{folder}/{name}", check=models.read_tensors)


def load_tokenizer(args, resume, dataset, val_images):
    """-> the frozen tokenizer on the images' device; None if the generator needs no tokenizer."""
    if args.tokenizer is None:
        return None
    folder = args.tokenizer_dir or "tokenizer"
    if args.tokenizer == "train":                              # other machines may not have its file
        tokenizer = data.together(read_or_train_dvae, args, resume, dataset, val_images, share=True)
    else:
        if args.tokenizer == "dalle":
            data.together(download_dalle, folder, data.is_first)
            data.together(download_dalle, folder, data.is_first_of_machine)    # if it sees no file yet
        tokenizer = data.together(read_tokenizer, args.tokenizer, folder)
    tokenizer = tokenizer.to(val_images.device, memory_format=torch.channels_last)
    return tokenizer.requires_grad_(False).eval()


# ---------------------------------------------------------------- data and model

def init_as_beit(vit):
    """Normal with std 0.02; the output layers of block i are divided by sqrt(2 i), as in BEiT.

    Decision: the papers state no initialisation. BEiT's code cuts the normal off at one std, which leaves a
    std of 0.0108, and starts the patch embedding's bias at zero. Here, the bias keeps PyTorch's default.
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
    # Sec. 3.3, Table 5. Decision: position embeddings and class token are not shared.
    if args.share:
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
    checkpoint = models.read_file(args.freeze_generator)
    try:
        for name in ("img_size", "patch_size", "gen_depth", "generator", "tokenizer"):
            saved = checkpoint["args"][name]
            if saved != getattr(args, name):
                raise ValueError(f"--{name} was {saved}, and is {getattr(args, name)} here")
        state = {key.removeprefix("generator."): value for key, value in checkpoint["model"].items()
                 if key.startswith("generator.")}
        models.load_finite(generator, state)
    except Exception as error:                  # a wrong file can raise errors of many types
        raise data.BadInput(f"--freeze_generator {args.freeze_generator} does not fit "
                            f"({models.one_line(error)}): give the checkpoint.pt of a CIM run with "
                            "the same generator") from None


def backbone_config(args):
    """-> the options of models.build_backbone, and what else fine-tuning wants to know of backbone.pt."""
    return {"model": args.model, "img_size": args.img_size, "patch_size": args.patch_size, "pool": "mean",
            "norm": "batch", "mean": data.MEAN, "std": data.STD, "objective": args.objective,
            "method": "beit" if args.objective == "none" else "cim"}


def build_model(args, codes, device):
    """-> the CIM model on the device; codes: how many the tokenizer has, None without one."""
    torch.manual_seed(args.seed)                               # again, if a tokenizer was trained
    size = {"img_size": args.img_size, "patch_size": args.patch_size, "pool": "mean", "pos_embed": "learned"}
    backbone = models.build_backbone(args.model, **size)
    if args.img_size % backbone.stride or backbone.stride % args.patch_size:
        raise data.BadInput(f"{args.model} has stride {backbone.stride}: it must divide --img_size "
                            f"{args.img_size} and be a multiple of --patch_size {args.patch_size}")
    if isinstance(backbone, models.ViT):
        init_as_beit(backbone)
    generator = None if args.generator == "erase" else build_generator(args, backbone, size, codes)
    if args.objective == "none":
        backbone = generator.vit
    model = CIM(backbone, generator, args.objective, args.patch_size, args.target, args.sampling,
                args.mask_ratio)
    return model.to(device, memory_format=torch.channels_last)


def prepare(args, resume, codes, device):
    """-> (model, optimizer, scaler, steps done). Raises BadInput and OSError."""
    model = build_model(args, codes, device)
    optimizer = torch.optim.AdamW(models.parameter_groups(model.named_parameters(), args.weight_decay),
                                  lr=args.lr, betas=(0.9, 0.98), fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=amp_dtype(args.amp, device) == torch.float16)
    step = 0
    if resume:
        step = models.restore("cim_pretrain", args, model, optimizer, scaler)["step"]
    return model, optimizer, scaler, step


# ---------------------------------------------------------------- what is measured and shown

def psnr(images, reference):
    """PSNR in dB between two batches of normalised images, from the mean squared error over the batch."""
    error = F.mse_loss(data.denormalize(images), data.denormalize(reference)).item()
    return -10 * math.log10(max(error, 1e-10))


def show_tokenizer(args, tokenizer, images):
    """Prints how well the tokenizer restores images (B, 3, H, W), and writes samples/tokenizer.png."""
    tokens = tokenize(tokenizer, images, args.patch_size)
    restored = detokenize(tokenizer, tokens, args.img_size)
    print(f"tokenizer {args.tokenizer}: {psnr(restored, images):.2f} dB, {len(tokens.unique())} of "
          f"{tokenizer.codes} codes in use on {len(images)} held-out images", flush=True)
    columns = {"original": images[:8], "tokenizer": restored[:8]}
    data.save_grid(f"{args.output_dir}/samples/tokenizer.png", columns)


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
    mask = fixed_masks(args, images)
    corrupted, gen_loss, replaced = model.corrupt(images, mask, tokenizer)
    results = {"psnr_corrupted": psnr(corrupted, images)}
    if model.generator is not None:
        results["gen_loss"] = gen_loss.item()
    if tokenizer is not None:
        golden = tokenize(tokenizer, images, args.patch_size)
        best = model.generate_tokens(images, golden, mask, "argmax")[1]
        results["gen_acc"] = (best == golden)[mask].float().mean().item()
        results["replaced"] = replaced[mask].float().mean().item()
    if args.objective != "none":
        output = model.enhance(corrupted)
        results[f"{args.objective}_loss"] = model.enhancer_loss(output, images, replaced).item()
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
    model.train()
    return {name: round(value, 4) for name, value in results.items()}


def fixed_masks(args, images):
    """-> masks (B, N) of these images, the same in each call, as are all samples that are drawn after it."""
    torch.manual_seed(args.seed)
    return torch.stack([draw_mask(args) for _ in images]).to(images.device)


@torch.no_grad()
def save_picture(path, model, images, tokenizer, args):
    """One row per image (figs. 2, 3): original, what the generator sees, three samples; then, for the last of
    them, the enhancer's output (respix), or the replaced tokens in white and the enhancer's guess (revdet).
    """
    model.eval()
    images = images[::max(1, len(images) // 8)][:8]
    mask = fixed_masks(args, images)
    grid_size = args.img_size // args.patch_size

    def enlarge(values):                                       # (B, N) -> (B, 1, H, W)
        values = values.float().view(-1, 1, grid_size, grid_size)
        return F.interpolate(values, scale_factor=args.patch_size)

    columns = {"original": images}
    if model.generator is not None:
        columns["masked"] = images * (1 - enlarge(mask))
    for i in range(1 if model.generator is None else 3):
        corrupted, _, replaced = model.corrupt(images, mask, tokenizer)
        columns[f"sample {i + 1}"] = corrupted
    if args.objective == "respix":
        _, mean, std = normalize_target(images, args.target, args.patch_size)
        columns["restored"] = model.enhance(corrupted) * std + mean    # the original's statistics (sec. A.2)
    if args.objective == "revdet":
        for name, values in (("replaced", replaced), ("detected", model.enhance(corrupted).sigmoid())):
            columns[name] = data.normalize(enlarge(values).expand_as(images))
    data.save_grid(path, columns)
    model.train()


def evaluate_checkpoint(args, device):
    """--eval_only: prints one line of numbers and writes one picture beside the checkpoint."""
    images = data.evaluation_images(args, device)
    folder = os.path.dirname(args.init) or "."
    tokenizer = None
    if args.tokenizer:
        default = folder if args.tokenizer == "train" else "tokenizer"
        tokenizer = read_tokenizer(args.tokenizer, args.tokenizer_dir or default).to(device)
    model = build_model(args, tokenizer.codes if tokenizer else None, device)
    models.restore("cim_pretrain", args, model, path=args.init)
    print(json.dumps({"images": len(images)} | evaluate(model, images, tokenizer, args)), flush=True)
    save_picture(f"{folder}/eval.png", model, images, tokenizer, args)
    print(f"wrote {folder}/eval.png", flush=True)


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
    crop = partial(crop_and_mask, args=args)
    loader, val_images = data.together(data.pretraining_data, args, crop, rank, world, device)
    data.require_equal(args, loader.dataset)
    torch.manual_seed(args.seed)                                      # for a tokenizer that is trained
    tokenizer = load_tokenizer(args, resume, loader.dataset, val_images)
    codes = tokenizer.codes if tokenizer else None
    model, optimizer, scaler, step = data.together(prepare, args, resume, codes, device)
    dtype = amp_dtype(args.amp, device)

    if args.compile:
        model.compile()
    ddp = model
    if world > 1:
        ddp = DistributedDataParallel(model, gradient_as_bucket_view=True)

    steps_per_epoch = len(loader.dataset) // args.batch_size
    total_steps = args.epochs * steps_per_epoch
    warmup_steps = round(args.warmup_epochs * steps_per_epoch)
    last_step = min(total_steps, args.max_steps or total_steps)
    data.start_log(args, f"{args.objective} {args.model}", model, loader.dataset, step, dtype)
    if tokenizer and rank == 0:
        show_tokenizer(args, tokenizer, val_images)

    data.catch_signals()
    loader.sampler.step = step                                        # where a resumed run goes on
    batches = iter(loader)                                            # endless
    first_step = epoch_start = timed_from = step
    line_time = start_time = time.time()
    loss_sum = torch.zeros((), device=device)                         # of this epoch
    stop = False
    model.train()
    while step < last_step and not stop:
        # Decision: the learning rate falls to 1e-5, as in BEiT.
        lr = learning_rate(step, total_steps, warmup_steps, args.lr, floor=min(1e-5, args.lr))
        for group in optimizer.param_groups:
            group["lr"] = lr
        torch.manual_seed(data.seed_from(args.seed, step, rank))      # for the samples, which forward() draws
        for i in range(args.accum_steps):
            images, mask = next(batches)
            images = data.from_bytes(images, device)
            mask = mask.to(device, non_blocking=device.type == "cuda")
            # DDP averages the gradients only after the last part of a batch.
            ddp.require_backward_grad_sync = i == args.accum_steps - 1
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                loss = ddp(images, mask, tokenizer) / args.accum_steps
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
            models.save_checkpoint("cim_pretrain", args, config, step, model, optimizer, scaler)
            if not stop or step == last_step:
                line |= evaluate(model, val_images, tokenizer, args)
                path = f"{args.output_dir}/samples/step_{step:06d}.png"
                save_picture(path, model, val_images, tokenizer, args)
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

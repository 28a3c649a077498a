"""Pictures and what is done to them: datasets, transforms, corruptions. Tensors in, tensors out.

Datasets give (PIL image, label) and `Transformed` turns them into (tensor, label). Tensors of images are
float32, (B, 3, H, W), normalised with MEAN and STD. Masks are boolean: True = corrupted; for segmentation
they hold classes: 0 = unlabelled.
"""
import colorsys
import math
import os
from itertools import islice

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch.utils.data import Dataset
from torch.utils.data.distributed import DistributedSampler
from torchvision import tv_tensors
from torchvision.transforms import v2

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)             # ImageNet's, used for every data set
BICUBIC = v2.InterpolationMode.BICUBIC
SMALL = 128                                                           # pixels; below, crops keep more
GRAY = tuple(round(255 * mean) for mean in MEAN)                     # what shifted and padded images show


class BadInput(Exception):
    """Something the user gave cannot be used; the message is one sentence that names it and the way out."""


def seed_from(*numbers):
    """One 63-bit seed from several non-negative integers, such as (seed, epoch, index)."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


# ---------------------------------------------------------------- datasets

class Shapes(Dataset):
    """Pictures drawn by the program, ten classes, the same for the same (train, index, size) everywhere.

    One or two objects of one class over a ground under a sky. The class fixes the outline, the texture and,
    up to some spread, the hue, so that shape, colour and texture can each be guessed from the other two.
    """

    #           outline      lobes  hue   texture
    CLASSES = [("polygon",   3,     0.00, "plain"),
               ("flower",    5,     0.12, "rings"),
               ("polygon",   4,     0.58, "checks"),
               ("star",      5,     0.15, "plain"),
               ("round",     0,     0.05, "stripes"),
               ("ring",      0,     0.80, "checks"),
               ("star",      4,     0.90, "rings"),
               ("flower",    3,     0.70, "stripes"),
               ("polygon",   6,     0.45, "rings"),
               ("moon",      0,     0.16, "plain")]

    def __init__(self, train, size, length=None):
        self.train, self.size = train, size
        self.length = length or (6_000 if train else 1_000)
        self.classes = [f"{texture} {outline} {lobes}" for outline, lobes, _, texture in self.CLASSES]
        self.targets = [index % 10 for index in range(self.length)]
        self.y, self.x = np.mgrid[0:size, 0:size].astype(np.float32) / size  # pixel coordinates in [0, 1)

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        rng = np.random.default_rng([0 if self.train else 1, index])
        label = index % 10
        picture = self._background(rng)
        for _ in range(rng.integers(1, 3)):
            self._draw(picture, rng, *self.CLASSES[label])
        return Image.fromarray((picture.clip(0, 1) * 255).round().astype(np.uint8)), label

    def _background(self, rng):
        sky = colorsys.hsv_to_rgb(rng.uniform(0.52, 0.66), rng.uniform(0.2, 0.6), rng.uniform(0.75, 1.0))
        ground = colorsys.hsv_to_rgb(rng.uniform(0.08, 0.36), rng.uniform(0.3, 0.6), rng.uniform(0.35, 0.6))
        horizon = rng.uniform(0.45, 0.75) + 0.04 * np.sin(rng.uniform(4, 12) * self.x + rng.uniform(0, 6.3))
        below = ((self.y - horizon) * self.size).clip(0, 1)[:, :, None]  # 1 = ground, one pixel of blur
        haze = 0.5 * (self.y / horizon).clip(0, 1)[:, :, None] ** 2                  # the sky pales downwards
        furrows = 1 + 0.15 * np.sin(60 * (self.y - horizon).clip(0, 1) ** 0.7 + rng.uniform(0, 6.3))
        return (1 - below) * (sky + haze * (1 - np.array(sky))) + below * furrows[:, :, None] * ground

    def _draw(self, picture, rng, outline, lobes, hue, texture):
        radius, turn = rng.uniform(0.15, 0.3), rng.uniform(0, 2 * math.pi)
        u, v = (self.x - rng.uniform(0.2, 0.8)) / radius, (self.y - rng.uniform(0.25, 0.8)) / radius
        r, angle = np.hypot(u, v), np.arctan2(v, u) + turn
        sector = np.mod(angle, 2 * math.pi / max(lobes, 1)) - math.pi / max(lobes, 1)
        if outline == "polygon":
            edge = math.cos(math.pi / lobes) / np.cos(sector)
        elif outline == "star":
            edge = 0.4 + 0.6 * np.abs(sector) * lobes / math.pi
        elif outline == "flower":
            edge = 0.7 + 0.3 * np.cos(lobes * angle)
        else:
            edge = np.ones_like(r)
        inside = edge - r                                                            # > 0 inside, in radii
        if outline == "ring":
            inside = np.minimum(inside, r - 0.5)
        if outline == "moon":
            inside = np.minimum(inside, np.hypot(u - 0.5 * math.cos(turn), v - 0.5 * math.sin(turn)) - 0.8)
        across, along = u * math.cos(turn) + v * math.sin(turn), v * math.cos(turn) - u * math.sin(turn)
        wave = {"plain": np.zeros_like(r), "stripes": np.sin(9 * across), "rings": np.sin(12 * r),
                "checks": np.sin(7 * across) * np.sin(7 * along)}[texture]
        hue = (hue + rng.normal(0, 0.02)) % 1
        color = colorsys.hsv_to_rgb(hue, rng.uniform(0.6, 0.95), rng.uniform(0.7, 1.0))
        light = 0.85 - 0.2 * (u + v) + 0.25 * wave                                   # lit from the upper left
        alpha = (inside * radius * self.size + 0.5).clip(0, 1)[:, :, None]  # one pixel of blur at the edge
        picture += alpha * (light[:, :, None] * color - picture)


def read_rgb(path):
    """The image file as a PIL image in RGB, be it gray, palette, RGBA, CMYK. BadInput names a broken file."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except Exception as error:          # PIL raises OSError, SyntaxError, ValueError ... for broken files
        raise BadInput(f"cannot read the image {path} ({' '.join(str(error).split())}): "
                       "repair or delete it, then run again") from None


class Pictures(Dataset):
    """Image files without labels (the label given is -1)."""

    def __init__(self, paths):
        self.paths = paths

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        return read_rgb(self.paths[index]), -1


def find_images(folder):
    """Sorted paths of all image files below the folder, links followed."""
    extensions = torchvision.datasets.folder.IMG_EXTENSIONS
    return sorted(os.path.join(root, name) for root, _, names in os.walk(folder, followlinks=True)
                  for name in names if name.lower().endswith(extensions))


def unlabelled_dataset(name, train, img_size):
    """The training or held-out pictures of "shapes", "cifar10", or a folder. Raises BadInput.

    A folder with train/ and val/ is used so; from any other tree of images every tenth picture (but not many
    more than 256 in all) is held out.
    """
    if name == "shapes":
        return Shapes(train, img_size)
    if name == "cifar10":
        try:
            return torchvision.datasets.CIFAR10("data", train, download=True)
        except (OSError, RuntimeError) as error:
            raise BadInput(f"cannot get CIFAR-10 into ./data ({error}): put cifar-10-batches-py there, "
                           "or give --data a folder of images") from None
    if not os.path.isdir(name):
        raise BadInput(f"--data {name} is no folder: give a folder of images, 'shapes' or 'cifar10'")
    train_folder, val_folder = os.path.join(name, "train"), os.path.join(name, "val")
    if os.path.isdir(train_folder) and os.path.isdir(val_folder):
        folder = train_folder if train else val_folder
        paths = find_images(folder)
    else:
        folder = train_folder if os.path.isdir(train_folder) else name
        paths = find_images(folder)
        held_out = set(paths[::max(10, len(paths) // 256)])
        paths = [path for path in paths if (path in held_out) != train]
    if not paths:
        raise BadInput(f"no image files to {'train on' if train else 'hold out'} in {folder}: "
                       "give --data a folder with train/ and val/, or one with at least two images")
    return Pictures(paths)


def labelled_dataset(name, train, img_size):
    """"shapes", "cifar10", or a folder with train/CLASS/ and val/CLASS/, the same classes in both.

    The dataset has `classes`, their names in the labels' order, and `targets`, all labels. Raises BadInput.
    """
    if name in ("shapes", "cifar10"):
        return unlabelled_dataset(name, train, img_size)
    folders = {}
    for split in ("train", "val"):
        folders[split] = os.path.join(name, split)
        if not os.path.isdir(folders[split]):
            raise BadInput(f"--data {name} has no folder {split}: give train/CLASS/ and val/CLASS/ with "
                           "pictures, 'shapes' or 'cifar10'")
    train_names, val_names = ({entry.name for entry in os.scandir(folders[split]) if entry.is_dir()}
                              for split in folders)
    if train_names != val_names:
        raise BadInput(f"{different(train_names, val_names)} in {name}/train and {name}/val: "
                       "both need the same class folders")
    try:
        return torchvision.datasets.ImageFolder(folders["train" if train else "val"], loader=read_rgb)
    except FileNotFoundError as error:  # no class folder, or one without pictures
        raise BadInput(f"{str(error).splitlines()[0].rstrip('.')}: "
                       "every class folder needs pictures") from None


def different(names, other):
    """Two collections of class names -> what distinguishes them, for an error message."""
    only = [", ".join(sorted(set(a) - set(b))[:3]) or "none" for a, b in ((names, other), (other, names))]
    return f"classes differ ({len(names)} and {len(other)}, only here or there: {only[0]}; {only[1]})"


def few_labels(targets, fraction, seed):
    """Sorted indices of a class-balanced subset: of each class round(fraction x its number), at least one."""
    order, targets = np.random.default_rng(seed).permutation(len(targets)), np.asarray(targets)
    picks = []
    for label in np.unique(targets):
        members = order[targets[order] == label]
        picks.extend(members[:max(1, round(fraction * len(members)))].tolist())
    return sorted(picks)


class Segmentation(Dataset):
    """Images with masks in ADE20K's layout: (PIL image, Mask (H, W) int32). Raises BadInput.

    root/images/{training,validation}/NAME.jpg, root/annotations/{training,validation}/NAME.png of the same
    size, one channel: 0 = unlabelled, 1 ... num_classes.
    """

    def __init__(self, root, train, num_classes):
        split, self.num_classes = "training" if train else "validation", num_classes
        folder, masks = (os.path.join(root, kind, split) for kind in ("images", "annotations"))
        self.images = find_images(folder)
        if not self.images:
            raise BadInput(f"no image files in {folder}: --task segment wants --data DIR with images/ and "
                           "annotations/, training/ and validation/ in both")
        self.masks = [os.path.join(masks, os.path.splitext(os.path.relpath(path, folder))[0] + ".png")
                      for path in self.images]
        for path in self.masks:
            if not os.path.isfile(path):
                raise BadInput(f"the mask {path} is missing: add it, or take its image away")

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        image, path = read_rgb(self.images[index]), self.masks[index]
        try:
            with Image.open(path) as file:
                mask = np.array(file)
        except Exception as error:
            raise BadInput(f"cannot read the mask {path} ({' '.join(str(error).split())}): "
                           "repair or delete it, then run again") from None
        if mask.shape != image.size[::-1]:
            raise BadInput(f"the mask {path} is {mask.shape}, its image {image.size[::-1]} high and wide: "
                           "make them one size, and masks of one channel")
        if mask.max() > self.num_classes:
            raise BadInput(f"the mask {path} has the label {mask.max()}, above --num_classes "
                           f"{self.num_classes}: raise that, or set the pixels to 0, unlabelled")
        return image, tv_tensors.Mask(mask.astype(np.int32))


# ---------------------------------------------------------------- transforms and order

def pretrain_transform(img_size):
    """PIL image -> (3, img_size, img_size): RandomResizedCrop and flip only, as both papers pretrain."""
    return v2.Compose([v2.RandomResizedCrop(img_size, scale=(0.2, 1.0), interpolation=BICUBIC),
                       v2.RandomHorizontalFlip(), v2.ToImage(), v2.ToDtype(torch.float32, scale=True),
                       v2.Normalize(MEAN, STD)])


def center_transform(img_size, crop_ratio=1.0):
    """PIL image -> (3, img_size, img_size): short side to img_size / crop_ratio, the centre cut out."""
    return v2.Compose([v2.Resize(int(img_size / crop_ratio), interpolation=BICUBIC), v2.CenterCrop(img_size),
                       v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])


def finetune_transform(img_size, randaug, erasing):
    """PIL image -> (3, img_size, img_size): crop, flip, RandAugment of this strength (0 to 10), erasing.

    Differs from the paper: torchvision's RandAugment takes two operations at one fixed strength; the papers'
    (timm's) leaves each out with probability 0.5 and spreads the strength with standard deviation 0.5.
    """
    # Decision: 8 % of a CIFAR picture are 9 x 9 pixels; small pictures keep more.
    scale = (0.08, 1.0) if img_size >= SMALL else (0.35, 1.0)
    steps = [v2.RandomResizedCrop(img_size, scale=scale, interpolation=BICUBIC), v2.RandomHorizontalFlip()]
    if randaug:
        # Strength s of 10 is the bin s of 11; torchvision's default of 31 bins would make 9 a strength of 3.
        steps.append(v2.RandAugment(2, randaug, num_magnitude_bins=11, interpolation=BICUBIC, fill=GRAY))
    steps += [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    return v2.Compose(steps + ([v2.RandomErasing(erasing, value="random")] if erasing else []))


def segment_transform(img_size, train):
    """PIL image, Mask -> (3, H, W), (H, W) int64. Training: short side img_size x U(0.5, 2), a crop of
    img_size x img_size (padding is unlabelled), flip, colours shifted; else the whole image as it is.
    """
    jitter = [v2.RandomResize(img_size // 2, img_size * 2 + 1),
              v2.RandomCrop(img_size, pad_if_needed=True, fill={tv_tensors.Mask: 0, "others": GRAY}),
              v2.RandomHorizontalFlip(), v2.RandomPhotometricDistort()] if train else []
    types = {tv_tensors.Image: torch.float32, tv_tensors.Mask: torch.int64, "others": None}
    return v2.Compose(jitter + [v2.ToImage(), v2.ToDtype(types, scale=True), v2.Normalize(MEAN, STD)])


def fixed_images(dataset, img_size, count=256):
    """Up to `count` pictures spread evenly over the dataset -> (count, 3, img_size, img_size)."""
    transform = center_transform(img_size)
    picks = torch.linspace(0, len(dataset) - 1, min(count, len(dataset))).long().tolist()
    return torch.stack([transform(dataset[i][0]) for i in picks])


class Transformed(Dataset):
    """transform(image, label), with random numbers that depend on (seed, epoch, index) and nothing else:
    not on the number of workers or processes, nor on where a run was killed and resumed.

    Its keys are the pairs (epoch, index) that EpochSampler gives.
    """

    def __init__(self, dataset, transform, seed):
        self.dataset, self.transform, self.seed = dataset, transform, seed

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, key):
        epoch, index = key
        image, label = self.dataset[index]
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed_from(self.seed, epoch, index))  # this CPU's alone: fast
            return self.transform(image, label)


class EpochSampler(DistributedSampler):
    """DistributedSampler that gives (epoch, index), without the first `skip` samples of its process."""

    skip = 0

    def __iter__(self):
        return ((self.epoch, index) for index in islice(super().__iter__(), self.skip, None))


class RepeatingSampler(EpochSampler):
    """Repeated augmentation (Hoffer et al., 2019): each picture `repeats` times in a row, other crops.

    As in DeiT, the copies go to different processes and into one batch, and an epoch stays as long as
    without: it sees a share 1 / repeats of the pictures.
    """

    repeats = 3

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self.dataset), generator=generator)
        for i in range(self.rank + self.skip * self.num_replicas, self.total_size, self.num_replicas):
            copy, index = i % self.repeats, order[i // self.repeats].item()
            yield self.epoch * self.repeats + copy, index            # the copies differ in the seed's "epoch"


def denormalize(images):
    """Normalised images -> [0, 1], clamped."""
    mean, std = (torch.tensor(c, device=images.device).view(3, 1, 1) for c in (MEAN, STD))
    return (images * std + mean).clamp(0, 1)


# ---------------------------------------------------------------- corruptions (energy paper, sec. 4.1)
# Each takes a batch of normalised images (B, 3, H, W) and returns a corrupted copy, drawn per image with
# `generator`, a torch.Generator on the images' device. Blank is 0, the mean colour
# (Decision: the paper does not say which value).

def mask_grid(images, generator, cell, ratio):
    """Blanks round(ratio * cells) cells, squares of `cell` pixels in a regular grid (Gridded, Table 1)."""
    B, _, H, W = images.shape
    h, w = H // cell, W // cell
    rank = torch.rand(B, h * w, generator=generator, device=images.device).argsort(dim=1).argsort(dim=1)
    mask = (rank < round(ratio * h * w)).view(B, 1, h, w)                            # True = corrupted
    mask = mask.repeat_interleave(cell, dim=2).repeat_interleave(cell, dim=3)        # (B, 1, H, W)
    return images.masked_fill(mask, 0)


def mask_random(images, generator, count, area):
    """Blanks `count` rectangles, area share U(*area) and aspect ratio U(0.5, 2) each (Random, Table 1).

    Decision: rectangles lie inside the picture, uniformly, and may overlap.
    """
    B, _, H, W = images.shape
    draw = torch.rand(4, B, count, 1, generator=generator, device=images.device)
    share, aspect = area[0] + (area[1] - area[0]) * draw[0], 0.5 + 1.5 * draw[1]
    height, width = H * (share * aspect).sqrt(), W * (share / aspect).sqrt()  # (B, count, 1), in pixels
    top, left = (H - height) * draw[2], (W - width) * draw[3]
    y, x = (torch.arange(n, device=images.device) + 0.5 for n in (H, W))             # pixel centres
    rows = ((y >= top) & (y < top + height)).float()                                 # (B, count, H)
    columns = ((x >= left) & (x < left + width)).float()                             # (B, count, W)
    mask = (rows.transpose(1, 2) @ columns > 0)[:, None]  # True = in some rectangle
    return images.masked_fill(mask, 0)


def low_resolution(images, generator, scale):
    """Bicubic down by `scale`, nearest up: constant on scale x scale blocks (SR, Table 2).

    Decision: bicubic with antialiasing, as PIL and MATLAB do it.
    """
    H, W = images.shape[2:]
    small = F.interpolate(images, size=(H // scale, W // scale), mode="bicubic", antialias=True)
    return F.interpolate(small, size=(H, W), mode="nearest")


def noise(images, generator):
    """sqrt(gamma) x + sqrt(1 - gamma) eps, eps ~ N(0, I), gamma ~ U(0, 1) per image (Denoising, Table 2)."""
    gamma = torch.rand(len(images), 1, 1, 1, generator=generator, device=images.device)
    eps = torch.randn(images.shape, generator=generator, device=images.device)
    return gamma.sqrt() * images + (1 - gamma).sqrt() * eps


def gray(images, generator):
    """The luma (ITU-R 601) of the un-normalised image in all three channels (Colorization, Table 2)."""
    mean, std, luma = (torch.tensor(c, device=images.device).view(3, 1, 1)
                       for c in (MEAN, STD, (0.299, 0.587, 0.114)))
    return (((images * std + mean) * luma).sum(dim=1, keepdim=True) - mean) / std


def mix(images, generator, corruptions):
    """One of the corruptions, a list of functions f(images, generator), uniformly per image (sec. 4.2)."""
    choice = torch.randint(len(corruptions), (len(images),), generator=generator, device=images.device)
    stack = torch.stack([corrupt(images, generator) for corrupt in corruptions])     # (kinds, B, 3, H, W)
    return stack[choice, torch.arange(len(images), device=images.device)]


def blank_patch_edges(images, generator, patch_size):
    """Blanks the k outermost pixels of every patch, k = 1 or 2 with probability 1/2 per patch (sec. A.2).

    Decision: k = 1 for patches under 5 pixels, of which k = 2 would leave nothing.
    """
    B, _, H, W = images.shape
    p, h, w = patch_size, H // patch_size, W // patch_size
    k = 1 + torch.randint(2 if p >= 5 else 1, (B, h, 1, w, 1), generator=generator, device=images.device)
    i = torch.arange(p, device=images.device)
    depth = torch.minimum(i, p - 1 - i)                                              # 0 at the edge, 1, ...
    depth = torch.minimum(depth.view(p, 1, 1), depth)                                # (p, 1, p)
    mask = (depth < k).reshape(B, 1, H, W)                                           # True = corrupted
    return images.masked_fill(mask, 0)


# ---------------------------------------------------------------- masks of the patches (CIM paper, sec. 2.1)
# Each returns (count, grid * grid) booleans, True = masked. How many are masked is drawn for each image,
# uniformly from share[0] to share[1] of them (Decision: the paper says "100 to 120" of 196).

def random_mask(count, generator, grid, share, device="cpu"):
    """Any positions, each as likely."""
    low, high = (round(part * grid ** 2) for part in share)
    masked = torch.randint(low, high + 1, (count, 1), generator=generator, device=device)
    rank = torch.rand(count, grid ** 2, generator=generator, device=device).argsort(dim=1).argsort(dim=1)
    return rank < masked


def block_mask(count, generator, grid, share):
    """Rectangles, as BEiT (Bao et al., 2021, algorithm 1): never more than the number drawn, at times fewer.

    On a 14 x 14 grid each has 16 patches or more (Decision: the same share on others), and an aspect ratio
    log-uniform in (0.3, 1 / 0.3); when ten in a row do not fit, the mask is done.
    """
    rng = np.random.default_rng(torch.randint(2 ** 62, (1,), generator=generator).item())
    low, high = (round(part * grid ** 2) for part in share)
    smallest = grid ** 2 * 16 / 196
    masks = np.zeros((count, grid, grid), dtype=bool)
    for mask in masks:
        left, tries = rng.integers(low, high + 1), 0
        while left > 0 and tries < 10:
            area = rng.uniform(smallest, max(left, smallest))
            aspect = math.exp(rng.uniform(-1, 1) * math.log(0.3))
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            tries += 1
            if 0 < height < grid and 0 < width < grid:
                top, start = rng.integers(grid - height + 1), rng.integers(grid - width + 1)
                block = mask[top:top + height, start:start + width]
                new = block.size - block.sum()
                if 0 < new <= left:
                    block[:] = True
                    left, tries = left - new, 0
    return torch.from_numpy(masks).flatten(1)

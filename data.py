"""Datasets, transforms, samplers, and corruptions and masks as functions of tensors.

Datasets return (PIL image, label), and `Transformed` turns such a pair into (tensor, label). Image tensors
are float32, (B, 3, H, W), normalised with MEAN and STD. A corruption mask is boolean, True = corrupted; a
segmentation mask holds class numbers, 0 = unlabelled. This file imports nothing from the project.
"""
import colorsys
import math
import os
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler
from torchvision import tv_tensors
from torchvision.transforms import v2

# Decision: ImageNet's mean and standard deviation for all data sets, as in MAE; BEiT's code has 0.5 for both.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
MEAN_COLOR = tuple(round(255 * mean) for mean in MEAN)               # fills what transforms leave empty
BICUBIC = v2.InterpolationMode.BICUBIC
SMALL = 128                    # pixels; of smaller images, the crops for fine-tuning keep a larger fraction
# Pillow may try only these formats: its EPS reader would start Ghostscript for a file of any name.
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")


class BadInput(Exception):
    """The user's input is unusable. The message is one sentence that names it and says how to fix it."""


def seed_from(*numbers):
    """One 63-bit seed from several non-negative integers, such as (seed, epoch, index)."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


# ---------------------------------------------------------------- datasets

class Shapes(Dataset):
    """Images drawn by the program, identical on every machine for the same (train, index, size).

    One or two objects of one of ten classes stand in front of sky and ground. The class sets the outline, the
    texture and, up to some noise, the hue, so that each of the three can be guessed from the other two.
    """

    #           outline  corners  hue   texture
    CLASSES = [("polygon", 3, 0.00, "plain"), ("polygon", 4, 0.58, "stripes"), ("polygon", 6, 0.45, "rings"),
               ("star", 4, 0.90, "rings"), ("star", 5, 0.15, "plain"), ("star", 8, 0.32, "stripes"),
               ("flower", 1, 0.05, "stripes"), ("flower", 3, 0.66, "plain"), ("flower", 5, 0.10, "rings"),
               ("flower", 7, 0.80, "stripes")]

    def __init__(self, train, size, length=None):
        self.train = train
        self.length = length or (6_000 if train else 1_000)
        self.classes = [f"{texture} {outline} {corners}" for outline, corners, _, texture in self.CLASSES]
        self.targets = [index % 10 for index in range(self.length)]
        self.y, self.x = np.mgrid[0:size, 0:size].astype(np.float32) / size      # pixel coordinates in [0, 1)

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        rng = np.random.default_rng([0 if self.train else 1, index])
        outline, corners, hue, texture = self.CLASSES[index % 10]
        sky = colorsys.hsv_to_rgb(rng.uniform(0.52, 0.66), rng.uniform(0.1, 0.5), rng.uniform(0.75, 1))
        ground = colorsys.hsv_to_rgb(rng.uniform(0.08, 0.36), rng.uniform(0.3, 0.6), rng.uniform(0.35, 0.6))
        image = np.where(self.y[:, :, None] < rng.uniform(0.4, 0.75), sky, ground)         # (size, size, 3)
        for _ in range(rng.integers(1, 3)):
            radius = rng.uniform(0.15, 0.3)
            turn = rng.uniform(0, 2 * math.pi)
            u = (self.x - rng.uniform(0.2, 0.8)) / radius            # the object's own coordinates
            v = (self.y - rng.uniform(0.25, 0.8)) / radius
            r = np.hypot(u, v)
            angle = np.mod(np.arctan2(v, u) + turn, 2 * math.pi / corners) - math.pi / corners
            edge = {"polygon": math.cos(math.pi / corners) / np.cos(angle),      # the outline's radius
                    "star": 0.4 + 0.6 * np.abs(angle) * corners / math.pi,
                    "flower": 0.75 - 0.25 * np.cos(corners * angle)}[outline]
            wave = {"plain": 0 * r, "rings": np.sin(12 * r),
                    "stripes": np.sin(9 * u * math.cos(turn) + 9 * v * math.sin(turn))}[texture]
            light = 0.85 - 0.2 * (u + v) + 0.25 * wave               # lit from the upper left
            color = colorsys.hsv_to_rgb((hue + rng.normal(0, 0.02)) % 1, rng.uniform(0.6, 0.95), 0.9)
            opacity = ((edge - r) * radius * len(self.x) + 0.5).clip(0, 1)[:, :, None]     # soft by one pixel
            image += opacity * (light[:, :, None] * color - image)
        return Image.fromarray((255 * image.clip(0, 1)).round().astype(np.uint8)), index % 10


def open_image(path, formats=FORMATS):
    """-> PIL image, turned upright by its EXIF tag. Raises BadInput, which names a broken file."""
    if not os.path.isfile(path):                                     # opening a FIFO could wait forever
        raise BadInput(f"the image {path} is missing or not a regular file: remove it from the data")
    try:
        with Image.open(path, formats=formats) as image:
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return image
    except Exception as error:          # Pillow raises OSError, SyntaxError, ValueError ... for broken files
        raise BadInput(f"cannot read the image {path} ({' '.join(str(error).split())}): repair or delete it; "
                       f"it must be {' or '.join(formats)}") from None


def read_rgb(path):
    """-> PIL image in RGB, converted from gray, palette, RGBA or CMYK. Raises BadInput."""
    image = open_image(path)
    # Pillow's own conversion would clip gray images of more than 8 bits, often to plain white or black.
    # Decision: integers have 16 bits; floats range from 0 to 1 if none is above 1, else from 0 to 255.
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) / 257).clip(0, 255).round().astype(np.uint8))
    elif image.mode == "F":
        pixels = np.nan_to_num(np.asarray(image))
        scale = 255 if pixels.max() <= 1 else 1
        image = Image.fromarray((scale * pixels).clip(0, 255).round().astype(np.uint8))
    return image.convert("RGB")


class Images(Dataset):
    """Image files without labels: each has the label -1."""

    classes = None

    def __init__(self, paths):
        self.paths = paths

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        return read_rgb(self.paths[index]), -1


def find_images(folder):
    """-> sorted paths of all image files below the folder. Links are followed, each folder once."""
    def stop(error):
        raise BadInput(f"cannot read the folder {error.filename} ({error.strerror}): "
                       "make it readable or move it out of the data")

    # Two links to one folder must not count its images twice, and a link to a folder above is a loop.
    visited = set(Path(folder).resolve().parents)
    paths = []
    for root, subfolders, names in os.walk(folder, followlinks=True, onerror=stop):
        subfolders.sort()                                            # the same order on every machine
        real_root = Path(root).resolve()
        if real_root in visited:
            subfolders.clear()                                       # os.walk then goes no deeper
        else:
            visited.add(real_root)
            paths += [os.path.join(root, name) for name in names
                      if name.lower().endswith(torchvision.datasets.folder.IMG_EXTENSIONS)]
    return sorted(paths)


def cifar10(train=True):
    """torchvision's CIFAR-10, downloaded into ./data unless it is there. Raises BadInput."""
    try:
        return torchvision.datasets.CIFAR10("data", train, download=True)
    except (OSError, RuntimeError) as error:
        raise BadInput(f"cannot get CIFAR-10 into ./data ({error}): put cifar-10-batches-py there, "
                       "or give --data a folder of images") from None


def unlabelled_dataset(name, train, img_size):
    """The training or the held-out images of "shapes", "cifar10" or a folder. Raises BadInput.

    In a folder with train/ and val/, val/ is held out. Of any other tree of images, every tenth image is held
    out, at most about 256 in all.
    """
    if name == "shapes":
        return Shapes(train, img_size)
    if name == "cifar10":
        return cifar10(train)
    if not os.path.isdir(name):
        raise BadInput(f"--data {name} is not a folder: give a folder of images, 'shapes' or 'cifar10'")
    folder = f"{name}/train" if os.path.isdir(f"{name}/train") else name
    if folder != name and os.path.isdir(f"{name}/val"):
        folder = folder if train else f"{name}/val"
        paths = find_images(folder)
    else:
        paths = find_images(folder)
        held_out = set(paths[::max(10, len(paths) // 256)])
        paths = [path for path in paths if (path in held_out) != train]
    if not paths:
        raise BadInput(f"no image files to {'train on' if train else 'hold out'} in {folder}: "
                       "give --data a folder with train/ and val/, or one with at least two images")
    return Images(paths)


def labelled_dataset(name, train, img_size):
    """Images and labels of "shapes", "cifar10" or a folder with train/CLASS/ and val/CLASS/.

    train/ and val/ must have the same classes. The dataset has `classes`, their names in the order of the
    labels, and `targets`, the label of each image. Raises BadInput.
    """
    if name in ("shapes", "cifar10"):
        return unlabelled_dataset(name, train, img_size)
    classes = {}
    try:
        for split in ("train", "val"):
            classes[split], _ = torchvision.datasets.folder.find_classes(f"{name}/{split}")
        if classes["train"] != classes["val"]:
            raise BadInput(f"classes differ ({describe_difference(classes['train'], classes['val'])}): "
                           f"give {name}/train and {name}/val the same class folders")
        return torchvision.datasets.ImageFolder(f"{name}/{'train' if train else 'val'}", loader=read_rgb)
    except OSError as error:
        raise BadInput(f"--data {name} does not serve ({error}): give a folder with train/CLASS/ and "
                       "val/CLASS/, images in each class, 'shapes' or 'cifar10'") from None


def describe_difference(train_names, val_names, train_label="train", val_label="val"):
    """Says which class names only one of two sets has, such as "only in train: c; only in val: none"."""
    only_train = sorted(set(train_names) - set(val_names))[:3] or ["none"]
    only_val = sorted(set(val_names) - set(train_names))[:3] or ["none"]
    return f"only in {train_label}: {', '.join(only_train)}; only in {val_label}: {', '.join(only_val)}"


def few_labels(targets, fraction, seed):
    """-> sorted indices of a random subset with round(fraction x size) images of each class, at least one."""
    targets = np.asarray(targets)
    order = np.random.default_rng(seed).permutation(len(targets))
    indices = []
    for label in np.unique(targets):
        members = order[targets[order] == label]
        indices.extend(members[:max(1, round(fraction * len(members)))].tolist())
    return sorted(indices)


class Segmentation(Images):
    """Images with masks in ADE20K's layout: (PIL image, Mask (H, W) int64). Raises BadInput.

    The files are root/images/{training,validation}/NAME.jpg and root/annotations/{training,validation}/
    NAME.png. A mask is as large as its image and has one channel: 0 = unlabelled, 1 to num_classes = class.
    """

    def __init__(self, root, train, num_classes):
        self.num_classes = num_classes
        split = "training" if train else "validation"
        folder = f"{root}/images/{split}"
        super().__init__(find_images(folder) if os.path.isdir(folder) else [])
        if not self.paths:
            raise BadInput(f"no image files in {folder}: --task segment needs --data with images/ and "
                           "annotations/, each with training/ and validation/")
        stems = [os.path.splitext(path[len(folder) + 1:])[0] for path in self.paths]
        self.masks = [f"{root}/annotations/{split}/{stem}.png" for stem in stems]
        for path in self.masks:
            if not os.path.isfile(path):
                raise BadInput(f"the mask {path} is missing: add it or remove its image")

    def __getitem__(self, index):
        image, _ = super().__getitem__(index)
        path = self.masks[index]
        # Only PNG: it is lossless, and its pixels are integers (with a palette, the indices).
        mask = np.array(open_image(path, formats=["PNG"]), dtype=np.int64)
        if mask.shape != image.size[::-1]:
            raise BadInput(f"the mask {path} is {mask.shape}, its image {image.size[::-1]} high and wide: "
                           "give both the same size, and the mask one channel")
        if mask.max() > self.num_classes:
            raise BadInput(f"the mask {path} has the label {mask.max()}, above --num_classes "
                           f"{self.num_classes}: raise it, or set these pixels to 0, unlabelled")
        return image, tv_tensors.Mask(mask)


# ---------------------------------------------------------------- transforms
# Transforms resize tensors of bytes where they can: torchvision's kernel takes a third of Pillow's time, and
# the results differ by 0.025 of 255 levels on average.

TO_FLOAT = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]      # leaves masks alone


def pretrain_transform(img_size, scale):
    """PIL image -> (3, img_size, img_size), uint8: a random crop and flip. from_bytes() normalises a batch.

    The crop covers a fraction U(*scale) of the image's area. Decision: the energy method passes (0.2, 1), as
    in MAE; CIM passes (0.08, 1), as in BEiT's code. Both flip, as CIM's text says; its Table 13 does not.
    """
    return v2.Compose([v2.ToImage(), v2.RandomResizedCrop(img_size, scale=scale, interpolation=BICUBIC),
                       v2.RandomHorizontalFlip()])


def from_bytes(images, device):
    """uint8 images (B, 3, H, W) -> normalised float32 on the device.

    Bytes are a quarter of the floats' size on their way from the loader's workers to the device, and 40 %
    more crops leave a worker in a second if it need not convert them.
    """
    return normalize(images.to(device, non_blocking=True) / 255)


def center_transform(img_size, crop_ratio=1.0):
    """PIL image -> (3, img_size, img_size): short side resized to img_size / crop_ratio, centre crop."""
    return v2.Compose([v2.ToImage(), v2.Resize(int(img_size / crop_ratio), interpolation=BICUBIC),
                       v2.CenterCrop(img_size), *TO_FLOAT])


def finetune_transform(img_size, randaug, erasing):
    """PIL image -> (3, img_size, img_size): crop, flip, RandAugment of this strength (0 to 10), erasing.

    Differs from CIM's paper: torchvision's RandAugment applies two operations of one fixed strength. The
    paper uses timm's, which skips each with probability 0.5 and varies the strength (standard deviation 0.5).
    """
    # Decision: small images keep at least 35 %, because 8 % of a CIFAR image are only 9 x 9 pixels.
    scale = (0.08, 1.0) if img_size >= SMALL else (0.35, 1.0)
    # These steps take PIL images, which torchvision's bicubic rotations need. RandAugment takes most time.
    steps = [v2.RandomResizedCrop(img_size, scale=scale, interpolation=BICUBIC), v2.RandomHorizontalFlip()]
    if randaug:
        # Strength s of 10 is bin s of 11. With torchvision's default of 31 bins, 9 would be a strength of 3.
        steps.append(v2.RandAugment(2, randaug, num_magnitude_bins=11, interpolation=BICUBIC,
                                    fill=MEAN_COLOR))
    steps += [v2.ToImage(), *TO_FLOAT]
    if erasing:
        steps.append(v2.RandomErasing(erasing, value="random"))
    return v2.Compose(steps)


def segment_transform(img_size, train):
    """PIL image, Mask -> (3, H, W), (H, W). Validation takes the whole image at its own size.

    Training: short side resized to img_size x U(0.5, 2), random crop of img_size (padding is unlabelled),
    flip, photometric jitter.
    """
    steps = []
    if train:
        fill = {tv_tensors.Mask: 0, "others": MEAN_COLOR}
        steps = [v2.RandomResize(img_size // 2, img_size * 2 + 1),
                 v2.RandomCrop(img_size, pad_if_needed=True, fill=fill),
                 v2.RandomHorizontalFlip(), v2.RandomPhotometricDistort()]
    return v2.Compose([*steps, v2.ToImage(), *TO_FLOAT])


class Transformed(Dataset):
    """A dataset with a transform(image, label), whose random numbers depend on (seed, epoch, index) alone:
    neither on the number of workers or processes, nor on where a run was killed and resumed.

    Its keys are the pairs (epoch, index) that EpochSampler yields.
    """

    def __init__(self, dataset, transform, seed):
        self.dataset = dataset
        self.transform = transform
        self.seed = seed

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, key):
        epoch, index = key
        image, label = self.dataset[index]
        with torch.random.fork_rng(devices=[]):
            # Seeds only the CPU generator; `torch.manual_seed` also touches CUDA, which takes 0.3 ms.
            torch.default_generator.manual_seed(seed_from(self.seed, epoch, index))
            return self.transform(image, label)


def fixed_images(dataset, img_size, count=32):
    """-> (count, 3, img_size, img_size): up to `count` images, evenly spread over the dataset."""
    transform = center_transform(img_size)
    indices = torch.linspace(0, len(dataset) - 1, min(count, len(dataset))).long().tolist()
    return torch.stack([transform(dataset[index][0]) for index in indices])


# ---------------------------------------------------------------- the order of the samples

def default_workers():
    """-> loader workers per process: this job's CPUs, divided among its processes on this machine; up to 16."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(16, max(1, cpus // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


class EpochSampler(DistributedSampler):
    """DistributedSampler whose items are the keys of `Transformed`, pairs (epoch, index).

    The seed of a crop depends on the epoch. A loader's worker processes live through all epochs and see only
    the keys, so the keys have to carry the epoch.
    """

    skip = 0

    def set_epoch(self, epoch, skip=0):
        """Starts an epoch without this process's first `skip` samples, which a resumed run has seen."""
        super().set_epoch(epoch)
        self.skip = skip

    def __iter__(self):
        return ((self.epoch, index) for index in islice(super().__iter__(), self.skip, None))


def pretraining_data(args, transform, rank, world, device):
    """-> (loader of this process's training crops, held-out images).

    Order and crops depend on (args.seed, epoch, index) alone, not on the number of processes. There are at
    most 32 held-out images: (32, 3, H, W). Raises BadInput.
    """
    train_set = unlabelled_dataset(args.data, True, args.img_size)
    val_set = unlabelled_dataset(args.data, False, args.img_size)
    parts = world * args.accum_steps
    if args.batch_size % parts or args.batch_size > len(train_set):
        raise BadInput(f"--batch_size {args.batch_size} must be a multiple of {world} processes x "
                       f"{args.accum_steps} --accum_steps, and at most the {len(train_set)} training images "
                       f"of --data {args.data}")
    crops = Transformed(train_set, transform, args.seed)
    sampler = EpochSampler(train_set, world, rank, seed=args.seed, drop_last=True)
    loader = DataLoader(crops, sampler=sampler, batch_size=args.batch_size // parts, drop_last=True,
                        num_workers=args.num_workers, persistent_workers=args.num_workers > 0,
                        pin_memory=device.type == "cuda")
    return loader, fixed_images(val_set, args.img_size)


class RepeatingSampler(EpochSampler):
    """Repeated augmentation (Hoffer et al., 2019): each image appears `repeats` times in a batch, in
    different crops. `batch_size` counts the images of all processes.

    As in DeiT, an epoch is as long as without repeats, so it shows only 1 / repeats of the images. A batch
    runs through its distinct images, then through them again. This keeps copies apart: MixUp and CutMix mix
    each image with its neighbour, which must not be a copy of it. With 3 repeats, no neighbours are copies,
    not even in accumulation parts, if each process has more than 10 images per step.
    """

    def __init__(self, dataset, world, rank, seed, batch_size, repeats=3, drop_last=True):
        super().__init__(dataset, world, rank, seed=seed, drop_last=drop_last)
        self.batch_size = batch_size
        self.repeats = repeats

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self.dataset), generator=generator).tolist()
        num_distinct = math.ceil(self.batch_size / self.repeats)
        start = self.rank + self.skip * self.num_replicas
        for position in range(start, self.total_size, self.num_replicas):
            batch, position_in_batch = divmod(position, self.batch_size)
            copy, image = divmod(position_in_batch, num_distinct)
            # The copies differ in the key's "epoch", and therefore in the seed of their crops.
            yield self.epoch * self.repeats + copy, order[batch * num_distinct + image]


# ---------------------------------------------------------------- corruptions (energy paper, sec. 4.1)
# A corruption takes normalised images (B, 3, H, W) and returns a corrupted copy. It draws random numbers for
# each image from `generator`, a torch.Generator on the images' device.
# Decision: "blank" is 0, the mean colour; the paper does not state a value.

def normalize(images):
    """(B, 3, H, W) in [0, 1] -> normalised with MEAN and STD."""
    # With Python numbers for each channel, no call has to wait for a tensor of constants to reach the GPU.
    channels = zip(images.unbind(dim=1), MEAN, STD)
    return torch.stack([(channel - mean) / std for channel, mean, std in channels], dim=1)


def denormalize(images):
    """Normalised images (B, 3, H, W) -> [0, 1], clamped."""
    channels = zip(images.unbind(dim=1), MEAN, STD)
    return torch.stack([channel * std + mean for channel, mean, std in channels], dim=1).clamp(0, 1)


def gray(images, generator):
    """The luma (ITU-R 601) of the un-normalised image in all three channels (Colorization, Table 2)."""
    r, g, b = (channel * std + mean for channel, mean, std in zip(images.unbind(dim=1), MEAN, STD))
    luma = 0.299 * r + 0.587 * g + 0.114 * b
    return normalize(torch.stack([luma, luma, luma], dim=1))


def grid_mask(images, generator, cell, ratio):
    """-> (B, 1, H, W), True = corrupted: round(ratio * cells) cells of a regular grid (Gridded, Table 1).

    A cell is a square with a side of `cell` pixels; H and W are multiples of it.
    """
    B, _, H, W = images.shape
    h = H // cell
    w = W // cell
    order = torch.rand(B, h * w, generator=generator, device=images.device).argsort(dim=1).argsort(dim=1)
    mask = (order < round(ratio * (h * w))).view(B, 1, h, w)
    return mask.repeat_interleave(cell, dim=2).repeat_interleave(cell, dim=3)


def mask_grid(images, generator, cell, ratio):
    """Blanks the cells of `grid_mask`."""
    return images.masked_fill(grid_mask(images, generator, cell, ratio), 0)


def mask_random(images, generator, count, area):
    """Blanks `count` rectangles of area U(*area) and aspect ratio U(0.5, 2) each (Random, Table 1).

    Decision: the paper's "size" is a fraction of the image's area; 75 small rectangles then cover about
    68 % of an image, 25 large ones 54 %. They are placed uniformly inside the image and may overlap.
    """
    B, _, H, W = images.shape
    uniform = torch.rand(4, B, count, 1, generator=generator, device=images.device)
    fraction = area[0] + (area[1] - area[0]) * uniform[0]
    aspect = 0.5 + 1.5 * uniform[1]
    # The aspect ratio of a rectangle that covers more than half of the image may not fit: it is clamped.
    height_fraction = (fraction * aspect).sqrt().clamp(fraction, torch.ones_like(fraction))
    height = H * height_fraction                                     # (B, count, 1), in pixels
    width = W * fraction / height_fraction
    top = (H - height) * uniform[2]
    left = (W - width) * uniform[3]
    y = torch.arange(H, device=images.device) + 0.5                  # pixel centres
    x = torch.arange(W, device=images.device) + 0.5
    rows = ((y >= top) & (y < top + height)).float()                 # (B, count, H)
    columns = ((x >= left) & (x < left + width)).float()             # (B, count, W)
    mask = (rows.transpose(1, 2) @ columns > 0)[:, None]             # (B, 1, H, W), True = corrupted
    return images.masked_fill(mask, 0)


def low_resolution(images, generator, scale):
    """Bicubic down by `scale`, then nearest up to blocks of scale x scale equal pixels (SR, Table 2)."""
    H, W = images.shape[2:]
    # Decision: with antialiasing, as in Pillow and MATLAB; PyTorch's default is without.
    small = F.interpolate(images, size=(H // scale, W // scale), mode="bicubic", antialias=True)
    return F.interpolate(small, size=(H, W), mode="nearest")


def noise(images, generator):
    """sqrt(gamma) x + sqrt(1 - gamma) eps, eps ~ N(0, I), gamma ~ U(0, 1) per image (Denoising, Table 2)."""
    gamma = torch.rand(len(images), 1, 1, 1, generator=generator, device=images.device)
    eps = torch.randn(images.shape, generator=generator, device=images.device)
    return gamma.sqrt() * images + (1 - gamma).sqrt() * eps


def mix(images, generator, corruptions):
    """Each image gets one of the corruptions, functions f(images, generator), drawn uniformly (sec. 4.2)."""
    choice = torch.randint(len(corruptions), (len(images),), generator=generator, device=images.device)
    corrupted = torch.stack([corrupt(images, generator) for corrupt in corruptions])   # (kinds, B, 3, H, W)
    return corrupted[choice, torch.arange(len(images), device=images.device)]


def blank_patch_edges(images, generator, patch_size):
    """Blanks a border of k pixels in every patch, k = 1 or 2 with probability 1/2 each (sec. A.2)."""
    B, _, H, W = images.shape
    p = patch_size
    h = H // p
    w = W // p
    max_k = 2 if p >= 5 else 1       # Decision: k = 1 below 5 pixels, where k = 2 would blank all
    k = 1 + torch.randint(max_k, (B, h, 1, w, 1), generator=generator, device=images.device)
    i = torch.arange(p, device=images.device)
    depth = torch.minimum(i, p - 1 - i)                              # 0 at the edge, 1, ...
    depth = torch.minimum(depth.view(p, 1, 1), depth)                # (p, 1, p)
    mask = (depth < k).reshape(B, 1, H, W)                           # True = corrupted
    return images.masked_fill(mask, 0)


# ---------------------------------------------------------------- masks of patches (CIM paper, sec. 2.1)
# Each returns the mask of one image, (grid_size^2,) booleans, True = masked. `fraction` is (low, high). The
# random numbers are torch's own, which `Transformed` seeds.
# Decision: the number of masked patches is drawn for each image, uniformly between low and high; the paper
# only says "100 to 120" of 196.

def random_mask(grid_size, fraction):
    """A mask of single positions, drawn uniformly without replacement."""
    low, high = (round(bound * grid_size ** 2) for bound in fraction)
    num_masked = torch.randint(low, high + 1, ()).item()
    mask = torch.zeros(grid_size ** 2, dtype=torch.bool)
    mask[torch.randperm(grid_size ** 2)[:num_masked]] = True
    return mask


def block_mask(grid_size, fraction):
    """A mask of rectangles, as in BEiT (Bao et al., 2021, algorithm 1): the number drawn, or sometimes fewer.

    A rectangle's aspect ratio is log-uniform in (0.3, 1 / 0.3), its area uniform between the smallest and
    what is left to mask. A mask is finished when ten rectangles in a row do not fit.
    """
    # In a Python loop, NumPy's random numbers cost far less than a tensor operation for each.
    rng = np.random.default_rng(torch.randint(2 ** 62, ()).item())
    low, high = (round(bound * grid_size ** 2) for bound in fraction)
    smallest = grid_size ** 2 * 16 / 196     # Decision: BEiT's 16 patches of 196 as a fraction of any grid
    mask = np.zeros((grid_size, grid_size), dtype=bool)
    remaining = rng.integers(low, high + 1)
    tries = 0
    while remaining > 0 and tries < 10:
        tries += 1
        area = rng.uniform(*sorted((smallest, remaining)))
        aspect = math.exp(rng.uniform(-1, 1) * math.log(0.3))
        height = round(math.sqrt(area * aspect))
        width = round(math.sqrt(area / aspect))
        if 0 < height < grid_size and 0 < width < grid_size:
            top = rng.integers(grid_size - height + 1)
            left = rng.integers(grid_size - width + 1)
            block = mask[top:top + height, left:left + width]
            num_new = block.size - block.sum()
            if 0 < num_new <= remaining:
                block[:] = True
                remaining -= num_new
                tries = 0
    return torch.from_numpy(mask).flatten()

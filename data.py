"""Datasets, transforms, the order of samples, corruptions as functions of tensors; and, in the last section,
what a run needs besides its method and its loop: flags, folder, log and errors.

Datasets return (PIL image, label), and `Transformed` turns such a pair into (tensor, label). Image tensors
are float32, (B, 3, H, W), normalised with MEAN and STD. A corruption mask is boolean, True = corrupted; a
segmentation mask holds class numbers, 0 = unlabelled. This file imports nothing from the project.
"""
import argparse
import atexit
import colorsys
import errno
import fcntl
import hashlib
import json
import math
import os
import resource
import signal
import sys
import warnings
from collections import Counter
from contextlib import suppress
from datetime import timedelta
from functools import cache, partial
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageOps, PngImagePlugin
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.utils import make_grid

# Decision: ImageNet's mean and standard deviation for all data sets, as in MAE; BEiT's code has 0.5 for both.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
MEAN_COLOR = tuple(round(255 * mean) for mean in MEAN)               # fills what transforms leave empty
BICUBIC = v2.InterpolationMode.BICUBIC
SMALL = 128                    # pixels; of smaller images, the crops for fine-tuning keep a larger fraction
# Pillow may try only these formats: its EPS reader would start Ghostscript for a file of any name.
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")
EXTENSIONS = torchvision.datasets.folder.IMG_EXTENSIONS
PngImagePlugin.MAX_TEXT_CHUNK = 2 ** 26        # a long text in a PNG is no reason to refuse its image


class BadInput(Exception):
    """The user's input is unusable. The message is one sentence that names it and says how to fix it."""

    def __init__(self, message):
        # A loader's worker passes an error on as a traceback, which ends with the sentence.
        super().__init__(" ".join(message.rpartition("BadInput: ")[2].split()))


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
    except Image.DecompressionBombError:
        raise BadInput(f"the image {path} has too many pixels: make it smaller, or remove it") from None
    except Exception as error:          # Pillow raises OSError, SyntaxError, ValueError ... for broken files
        raise BadInput(f"cannot read the image {path} ({error}): repair or delete it; "
                       f"it must be {' or '.join(formats)}") from None
    with suppress(Exception):                                        # a broken EXIF block spoils no image
        ImageOps.exif_transpose(image, in_place=True)
    return image


def read_rgb(path):
    """-> PIL image in RGB, converted from gray, palette, RGBA or CMYK. Raises BadInput."""
    image = open_image(path)
    # Pillow's own conversion would clip gray images of more than 8 bits, often to plain white or black.
    # Decision: integers have 16 bits; floats range from 0 to 1 if none is above 1, else from 0 to 255.
    if image.mode.startswith("I") or image.mode == "F":
        pixels = np.nan_to_num(np.asarray(image, dtype=np.float64))
        full = 65535
        if image.mode == "F":
            full = 1 if pixels.max() <= 1 else 255
        if not 0.1 * full < pixels.max() <= full:
            warnings.warn(f"{path}: the brightest pixel is {pixels.max():g}, and {full} is taken for white: "
                          "scale the images to that range, or they become black or white", stacklevel=2)
        image = Image.fromarray((pixels / full * 255).clip(0, 255).round().astype(np.uint8))
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


class ClassFolders(Images):
    """The image files in folder/CLASS/, at any depth, with the number of the class as the label.

    torchvision's ImageFolder would take hidden files, and follow a link to a folder above. Raises BadInput.
    """

    def __init__(self, folder):
        self.classes = [name for name in visible(os.listdir(folder)) if os.path.isdir(f"{folder}/{name}")]
        super().__init__(find_images(*(f"{folder}/{name}" for name in self.classes)))
        labels = {name: label for label, name in enumerate(self.classes)}
        self.targets = [labels[path[len(folder) + 1:].split("/")[0]] for path in self.paths]
        empty = sorted(set(labels.values()) - set(self.targets))
        if empty:
            raise BadInput(f"no image files in the class folder {folder}/{self.classes[empty[0]]}: add some, "
                           "or remove it")

    def __getitem__(self, index):
        return super().__getitem__(index)[0], self.targets[index]


def visible(names):
    """-> the sorted names that are data: no hidden ones, and not the folder that a Mac adds to zip files."""
    return sorted(name for name in names if not name.startswith(".") and name != "__MACOSX")


def find_images(*folders):
    """-> sorted paths of all image files below the folders. Links are followed, in each folder once.

    Prints how many files were left out because of their formats.
    """
    def stop(error):
        raise BadInput(f"cannot read the folder {error.filename} ({error.strerror}): "
                       "make it readable or move it out of the data")

    paths = []
    others = Counter()
    for folder in folders:
        # Two links to one folder must not count its images twice, and a link to a folder above is a loop.
        visited = set(Path(folder).resolve().parents)
        for root, subfolders, names in os.walk(folder, followlinks=True, onerror=stop):
            subfolders[:] = visible(subfolders)
            real_root = Path(root).resolve()
            if real_root in visited:
                subfolders.clear()                                   # os.walk then goes no deeper
                continue
            visited.add(real_root)
            for name in visible(names):
                if name.lower().endswith(EXTENSIONS):
                    paths.append(os.path.join(root, name))
                else:
                    others[os.path.splitext(name)[1].lower() or "no extension"] += 1
    if others and is_first():
        kinds = ", ".join(f"{count} {kind}" for kind, count in others.most_common(5))
        print(f"{os.path.commonpath(folders)}: left out {others.total()} files of other formats ({kinds})",
              flush=True)
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

    Of a folder that holds train/ and val/, and no others but test/, val/ is held out. Of any other tree of
    images, a hash of an image's path decides, so that adding or deleting others does not move it: one of ten
    images is held out, from 10,000 images on one of 100, and so forth. train=None: val/, or else all images.
    """
    if name == "shapes":
        return Shapes(train, img_size)
    if name == "cifar10":
        return cifar10(train)
    if not os.path.isdir(name):
        raise BadInput(f"--data {name} is not a folder: give a folder of images, 'shapes' or 'cifar10'")
    inside = {entry for entry in visible(os.listdir(name)) if os.path.isdir(f"{name}/{entry}")}
    is_split = "train" in inside and inside <= {"train", "val", "test"}
    folder = f"{name}/train" if is_split else name
    if is_split and "val" in inside:
        folder = folder if train else f"{name}/val"
        paths = find_images(folder)
    else:
        paths = find_images(folder)
        hashes = {path: int(hashlib.sha1(os.path.relpath(path, folder).encode("utf-8", "surrogateescape"))
                            .hexdigest(), 16) for path in paths}
        one_of = 10 ** max(1, len(str(len(paths))) - 3)
        held_out = {path for path in paths if hashes[path] % one_of == 0}
        held_out = held_out or set(sorted(paths, key=hashes.get)[:1])
        paths = [path for path in paths if train is None or (path in held_out) != train]
    if not paths:
        raise BadInput(f"no image files to {'train on' if train else 'hold out'} in {folder}: "
                       "give --data a folder with train/ and val/, or one with at least two images")
    return Images(paths)


def labelled_dataset(name, train, img_size):
    """Images and labels of "shapes", "cifar10" or a folder with train/CLASS/ and val/CLASS/. Raises BadInput.

    It has `classes`, their names in the order of the labels, and `targets`, the label of each image.
    """
    if name in ("shapes", "cifar10"):
        return unlabelled_dataset(name, train, img_size)
    folder = f"{name}/train" if train else f"{name}/val"
    if not os.path.isdir(folder):
        raise BadInput(f"--data {name} needs the folder {folder}: give a folder with train/CLASS/ and "
                       "val/CLASS/, 'shapes' or 'cifar10'")
    dataset = ClassFolders(folder)
    if len(dataset.classes) < 2:
        raise BadInput(f"{folder} has {len(dataset.classes)} class folders: at least two are needed, as "
                       f"{folder}/CLASS/")
    return dataset


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
        some = range(0, len(self), math.ceil(len(self) / 50))        # at most 50 masks
        found = set().union(*(np.unique(self.read_mask(index)).tolist() for index in some)) - {0}
        if len(found) < 2:
            raise BadInput(f"the masks in {root}/annotations/{split} have {len(found)} classes besides 0, at "
                           f"least the {len(some)} that were looked at: {self.CONVENTION}")

    CONVENTION = "classes count from 1, and 0 is unlabelled; if yours count from 0, add 1, and make 255 a 0"

    def read_mask(self, index):
        """-> (H, W) int64"""
        path = self.masks[index]
        # Only PNG: it is lossless, and its pixels are integers (with a palette, the indices).
        mask = np.array(open_image(path, formats=["PNG"]), dtype=np.int64)
        if mask.ndim != 2:
            raise BadInput(f"the mask {path} has {mask.shape[2]} channels: give it one, with class numbers")
        if mask.max() > self.num_classes:
            raise BadInput(f"the mask {path} has the label {mask.max()}, above --num_classes "
                           f"{self.num_classes}: {self.CONVENTION}")
        return mask

    def __getitem__(self, index):
        image, _ = super().__getitem__(index)
        mask = self.read_mask(index)
        if mask.shape != image.size[::-1]:
            raise BadInput(f"the mask {self.masks[index]} is {mask.shape} high and wide, its image "
                           f"{image.size[::-1]}: give both the same size")
        if max(mask.shape) > 8 * min(mask.shape):                    # enlarged, it would take gigabytes
            raise BadInput(f"the image {self.paths[index]} is {mask.shape} high and wide: cut it into parts")
        return image, tv_tensors.Mask(mask)


def find_error(dataset, index):
    """-> the error that dataset[index] raises, or an empty text."""
    try:
        dataset[index]
    except BadInput as error:
        return str(error)
    return ""


def check_data(args, *datasets):
    """With --check_data, opens every image and prints what is wrong with any. Raises BadInput if one is."""
    if not args.check_data or not is_first():
        return
    errors = []
    for dataset in datasets:                                         # the loader's workers open the images
        loader = DataLoader(range(len(dataset)), batch_size=None, num_workers=args.num_workers,
                            collate_fn=partial(find_error, dataset))
        errors += [error for error in loader if error]
    print(*errors, f"{sum(map(len, datasets))} images were opened, {len(errors)} could not be used",
          sep="\n", flush=True)
    if errors:
        raise BadInput(f"{len(errors)} images of --data {args.data} cannot be used: repair or delete them")


# ---------------------------------------------------------------- transforms
# Transforms resize tensors of bytes where they can: torchvision's kernel takes a third of Pillow's time, and
# the results differ by 0.025 of 255 levels on average.

def to_float(mean, std):
    return [v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)]          # leaves masks alone


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
    return normalize(images.to(device, non_blocking=device.type == "cuda") / 255)


def center_transform(img_size, crop_ratio=1.0, mean=MEAN, std=STD):
    """PIL image -> (3, img_size, img_size): short side resized to img_size / crop_ratio, centre crop."""
    return v2.Compose([v2.ToImage(), v2.Lambda(limit_aspect, tv_tensors.Image),
                       v2.Resize(int(img_size / crop_ratio), interpolation=BICUBIC),
                       v2.CenterCrop(img_size), *to_float(mean, std)])


def limit_aspect(image):
    """Cuts the ends off an image over four times as long as wide: enlarged, it would take gigabytes."""
    H, W = image.shape[-2:]
    return v2.functional.center_crop(image, [min(H, 4 * W), min(W, 4 * H)])


def finetune_transform(img_size, randaug, erasing, mean=MEAN, std=STD):
    """PIL image -> (3, img_size, img_size): crop, flip, RandAugment of this strength (0 to 10), erasing.

    Differs from BEiT's and MAE's code, which use timm's RandAugment, and probably from CIM's: "9 / 0.5" in
    its Table 14 reads as timm's strength and standard deviation. timm's skips each operation with probability
    0.5, varies the strength, and has Invert and SolarizeAdd instead of Identity. torchvision's applies two
    operations of one fixed strength.
    """
    # Decision: small images keep at least 35 %, because 8 % of a CIFAR image are only 9 x 9 pixels.
    scale = (0.08, 1.0) if img_size >= SMALL else (0.35, 1.0)
    # These steps take PIL images, which torchvision's bicubic rotations need. RandAugment takes most time.
    steps = [v2.RandomResizedCrop(img_size, scale=scale, interpolation=BICUBIC), v2.RandomHorizontalFlip()]
    if randaug:
        # Strength s of 10 is bin s of 11. With torchvision's default of 31 bins, 9 would be a strength of 3.
        steps.append(v2.RandAugment(2, randaug, num_magnitude_bins=11, interpolation=BICUBIC,
                                    fill=MEAN_COLOR))
    steps += [v2.ToImage(), *to_float(mean, std)]
    if erasing:
        steps.append(v2.RandomErasing(erasing, value="random"))
    return v2.Compose(steps)


def segment_transform(img_size, train, mean=MEAN, std=STD):
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
    return v2.Compose([*steps, v2.ToImage(), *to_float(mean, std)])


class Transformed(Dataset):
    """A dataset with a transform(image, label), whose random numbers depend on (seed, epoch, index) alone:
    neither on the number of workers or processes, nor on where a run was killed and resumed.

    Its keys are the pairs (epoch, index) that EndlessSampler yields.
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


def evaluation_images(args, device):
    """-> (B, 3, H, W), for --eval_only: up to 32 images of val/, or of all that are not split."""
    return fixed_images(unlabelled_dataset(args.data, None, args.img_size), args.img_size).to(device)


# ---------------------------------------------------------------- the order of the samples

def default_workers():
    """-> loader workers per process: this job's CPUs, divided among its processes here, and 16 at most."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(16, max(1, cpus // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


class EndlessSampler(Sampler):
    """The keys of `Transformed`, pairs (epoch, index), of one process: step after step, without end.

    Every epoch has its own order. Each step takes the next `batch_size` images of it, shared out among the
    processes in turn; images too few for another step are left out. A resumed run sets `step`, which counts
    from 0.

    With `repeats` > 1 (repeated augmentation, Hoffer et al., 2019), each image appears that often in a batch,
    in different crops. As in DeiT, an epoch is as long as without repeats, so it shows only 1 / repeats of
    the images. A batch runs through its distinct images, then through them again. This keeps copies apart:
    MixUp and CutMix mix each image with its neighbour, which must not be a copy of it. With 3 repeats, no
    neighbours are copies, not even in accumulation parts, if each process has more than 10 images per step.
    """

    def __init__(self, size, batch_size, rank=0, world=1, seed=0, repeats=1):
        self.size = size
        self.batch_size = batch_size                                 # of all processes
        self.rank = rank
        self.world = world
        self.seed = seed
        self.repeats = repeats
        self.step = 0

    def __iter__(self):
        num_distinct = math.ceil(self.batch_size / self.repeats)
        epoch, step = divmod(self.step, self.size // self.batch_size)
        while True:
            generator = torch.Generator().manual_seed(self.seed + epoch)
            order = torch.randperm(self.size, generator=generator).tolist()
            for batch in range(step, self.size // self.batch_size):
                for position in range(self.rank, self.batch_size, self.world):
                    copy, image = divmod(position, num_distinct)
                    # Copies differ in the key's "epoch", and therefore in the seed of their crops.
                    yield epoch * self.repeats + copy, order[batch * num_distinct + image]
            epoch, step = epoch + 1, 0


def endless_loader(args, dataset, transform, rank, world, device, repeats=1):
    """-> DataLoader of this process's batches, step after step, without end. Raises BadInput."""
    parts = world * args.accum_steps
    if args.batch_size % parts or args.batch_size > len(dataset):
        raise BadInput(f"--batch_size {args.batch_size} must be a multiple of {world} processes x "
                       f"{args.accum_steps} --accum_steps, and at most the {len(dataset)} training images "
                       f"of --data {args.data}")
    sampler = EndlessSampler(len(dataset), args.batch_size, rank, world, args.seed, repeats)
    return DataLoader(Transformed(dataset, transform, args.seed), sampler=sampler,
                      batch_size=args.batch_size // parts, num_workers=args.num_workers,
                      worker_init_fn=ignore_ctrl_c, pin_memory=device.type == "cuda")


def pretraining_data(args, transform, rank, world, device):
    """-> (loader of this process's training crops, up to 32 held-out images (B, 3, H, W))."""
    train_set = unlabelled_dataset(args.data, True, args.img_size)
    val_set = unlabelled_dataset(args.data, False, args.img_size)
    check_data(args, train_set, val_set)
    loader = endless_loader(args, train_set, transform, rank, world, device)
    return loader, fixed_images(val_set, args.img_size).to(device)


# ---------------------------------------------------------------- corruptions (energy paper, sec. 4.1)
# A corruption takes normalised images (B, 3, H, W) and returns a corrupted copy. It draws random numbers for
# each image from `generator`, a torch.Generator on the images' device.
# Decision: "blank" is 0, the mean colour; the paper does not state a value.

def normalize(images):
    """(B, 3, H, W) in [0, 1] -> normalised with MEAN and STD."""
    # With Python numbers for each channel, no call has to wait for a tensor of constants to reach the GPU.
    channels = zip(images.unbind(dim=1), MEAN, STD)
    return torch.stack([(channel - mean) / std for channel, mean, std in channels], dim=1)


def denormalize(images, mean=MEAN, std=STD):
    """Normalised images (B, 3, H, W) -> [0, 1], clamped."""
    channels = zip(images.unbind(dim=1), mean, std)
    return torch.stack([channel * s + m for channel, m, s in channels], dim=1).clamp(0, 1)


def gray(images, generator):
    """The un-normalised image's luma in all channels (Colorization, Table 2). Decision: that of ITU-R 601."""
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


def random_rectangles(images, generator, count, area):
    """-> (B, 1, H, W), True = corrupted: `count` rectangles, area U(*area), aspect ratio U(0.5, 2) (Table 1).

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
    return (rows.transpose(1, 2) @ columns > 0)[:, None]             # (B, 1, H, W)


def blank(images, generator, mask, **options):
    """Blanks the cells of mask=grid_mask or the rectangles of mask=random_rectangles, with their options."""
    return images.masked_fill(mask(images, generator, **options), 0)


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


# ---------------------------------------------------------------- a run: its flags, folder, log and errors

class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one sentence, and whose --help shows each default."""

    def __init__(self, description):
        super().__init__(description=description, allow_abbrev=False, formatter_class=Help)

    def error(self, message):
        raise BadInput(f"{message} (see --help)")


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the default of a flag, unless it is None: then the flag's own text says what is used."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


def number(kind, low, high=1e9):
    """-> an argparse type: an int or a float between low and high, which also rules out nan and inf."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low:g} and {high:g}")
        return value
    parse.__name__ = kind.__name__                                    # for argparse's "invalid float value"
    return parse


def add_run_flags(parser):
    """Adds the flags that have nothing to do with a method: they are the same in all scripts."""
    g = parser.add_argument_group("run").add_argument
    g("--max_steps", type=number(int, 1), help="stop after this many steps (smoke runs, benchmarks)")
    g("--seed", type=number(int, 0), default=0, help="fixes weights, order, crops and all other draws")
    g("--device", default="auto", help="auto (cuda, else mps, else cpu), or a device's name")
    g("--amp", default="auto", choices=["auto", "bf16", "fp16", "off"],
      help="mixed precision; auto: bf16 or fp16 on a CUDA GPU, off elsewhere")
    g("--compile", action="store_true",
      help="torch.compile the step: advised on GPUs; it takes a minute or two to start, and is then faster")
    g("--num_workers", type=number(int, 0, 1024), default=default_workers(),
      help="data loader workers per process; a GPU takes about four")
    g("--check_data", action="store_true", help="first open every image, and name all that cannot be read")
    g("--output_dir", help="where results go; if not given, runs/METHOD_MODEL")
    g("--resume", action="store_true", help="continue from OUTPUT_DIR/checkpoint.pt if it exists")


def as_flags(values):
    """{name: value} -> a command line that sets them."""
    flags = []
    for name, value in values.items():
        if value is True:
            flags.append(f"--{name}")
        elif value is not None and value is not False:
            flags += [f"--{name}", *map(str, value if isinstance(value, (list, tuple)) else [value])]
    return flags


def is_first():
    """True in the process that prints and writes."""
    return int(os.environ.get("RANK", 0)) == 0


def is_first_of_machine():
    return int(os.environ.get("LOCAL_RANK", 0)) == 0


@cache
def message_group():
    """-> the processes' group for messages. It waits for a day, as one may download or train meanwhile."""
    return dist.new_group(backend="gloo", timeout=timedelta(days=1))


def together(function, *args, share=False):
    """-> function(*args), called in each process; with `share` in the first one only, whose result all get.

    If it fails in one process, all end with that error, which the first process of each machine prints.
    """
    if not dist.is_initialized():
        return function(*args)
    group = message_group()
    result = error = None
    try:
        result = function(*args) if is_first() or not share else None
    except (BadInput, OSError) as caught:
        error = str(caught) or repr(caught)
    outcomes = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, (error, result if share else None), group)
    error = next((outcome[0] for outcome in outcomes if outcome[0]), None)
    if error:
        if is_first_of_machine():
            print(f"error: {error}", file=sys.stderr, flush=True)
        dist.barrier(group)                           # once one has ended, torchrun ends the others
        sys.exit(1)
    return outcomes[0][1] if share else result


def require_equal(args, dataset):
    """Ends the run unless all processes have the same flags, paths aside, and as many images."""
    own = ("data", "init", "tokenizer_dir", "freeze_generator", "output_dir", "device", "num_workers")
    values = {f"--{name}": value for name, value in vars(args).items() if name not in own}
    values["the number of images"] = len(dataset)
    first = together(dict, values, share=True)

    def compare():
        names = [name for name in values if values[name] != first.get(name)]
        if names:
            raise BadInput(f"the processes differ in {', '.join(names)}: start all machines with the same "
                           "flags, and give them the same data")

    together(compare)


def open_device(name):
    """-> torch.device: this process's GPU, or the CPU. Raises BadInput."""
    try:
        if name == "auto":
            name = torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
        if name == "cuda":
            # torchrun shows all GPUs to each process, a scheduler may show each its own.
            count = torch.cuda.device_count()
            is_own = count == 1 and "CUDA_VISIBLE_DEVICES" in os.environ
            if 0 < count < int(os.environ.get("LOCAL_WORLD_SIZE", 1)) and not is_own:
                raise RuntimeError("fewer GPUs than processes")
            name = f"cuda:{0 if is_own else os.environ.get('LOCAL_RANK', 0)}"
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (AssertionError, ImportError, RuntimeError) as error:
        raise BadInput(f"--device {name} does not work here ({str(error).splitlines()[0]}): choose "
                       "auto, and start no more processes than the machine has GPUs") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    return device


def open_output(args):
    """Creates and locks --output_dir. -> True, in all processes, if the run continues from a checkpoint."""
    resume = together(create_output, args, share=True)
    fetch_data(args)
    return resume


def fetch_data(args):
    """Downloads CIFAR-10 if --data asks for it: in the first process, then on machines that do not see it."""
    for is_to_fetch in (is_first, is_first_of_machine):
        together(lambda: args.data == "cifar10" and is_to_fetch() and len(cifar10()))


def create_output(args):
    folder = args.output_dir
    results = [name for name in ("checkpoint.pt", "backbone.pt") if os.path.exists(f"{folder}/{name}")]
    if results and not (args.resume and "checkpoint.pt" in results):
        way_on = ", or add --resume to continue from it" if "checkpoint.pt" in results else ""
        raise BadInput(f"--output_dir {folder} holds the {results[0]} of an earlier run: choose another "
                       f"one{way_on}")
    print(f"preparing {args.model} and --data {args.data}; results go to {folder}", flush=True)
    try:
        os.makedirs(f"{folder}/samples", exist_ok=True)
        lock = os.open(f"{folder}/.lock", os.O_CREAT | os.O_RDWR)     # never closed: it ends with the process
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)              # the loader's workers do not inherit it
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            print(f"note: {folder} is on a file system without locks: start one run only", flush=True)
        else:
            in_use = error.errno in (errno.EAGAIN, errno.EACCES) and os.path.exists(f"{folder}/.lock")
            reason = "another run is using it" if in_use else error.strerror
            raise BadInput(f"cannot write to --output_dir {folder} ({reason}): choose another") from None
    atexit.register(remove_unused, folder)
    return bool(results)


def remove_unused(folder):
    """A run that fails before it writes anything leaves no folder."""
    with suppress(OSError):
        os.rmdir(f"{folder}/samples")
        os.remove(f"{folder}/.lock")
        os.rmdir(folder)


def download(url, path, check):
    """Downloads a file, calls check(temporary path), and gives the file its name. Raises BadInput."""
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        print(f"downloading {url}", flush=True)
        torch.hub.download_url_to_file(url, os.path.abspath(f"{path}.part"))
        check(f"{path}.part")                                         # it refuses half of a file, too
        os.replace(f"{path}.part", path)
    except (OSError, HTTPException) as error:
        raise BadInput(f"cannot download {url} ({error or repr(error)}): put it at {path} by hand") from None
    finally:
        with suppress(OSError):
            os.remove(f"{path}.part")


def start_log(args, title, model, dataset, step, dtype):
    """The first process prints what the run is going to do, writes args.json, and removes from log.jsonl what
    a killed run logged after `step`, from which this one continues.
    """
    if not is_first():
        return
    world = dist.get_world_size() if dist.is_initialized() else 1
    trained = sum(param.numel() for param in model.parameters() if param.requires_grad)
    fixed = [name for name, param in model.named_parameters() if not param.requires_grad]
    classes = f" of {len(dataset.classes)} classes" if getattr(dataset, "classes", None) else ""
    print(f"{title}: {trained / 1e6:.2f} M weights to train"
          f"{'; fixed: ' + ', '.join(fixed[:4]) if fixed else ''}{', ...' if len(fixed) > 4 else ''}\n"
          f"{args.data}: {len(dataset)} images{classes}, {len(dataset) // args.batch_size} steps an epoch; "
          f"{next(model.parameters()).device.type}, amp {dtype}\n"
          f"batch {args.batch_size} = {world} processes x {args.batch_size // world // args.accum_steps} x "
          f"{args.accum_steps} accumulated; peak lr {args.lr:.3g}; from step {step}", flush=True)
    versions = {"torch": torch.__version__, "torchvision": torchvision.__version__}
    with open(f"{args.output_dir}/args.json", "w") as file:
        json.dump(vars(args) | versions | {"processes": world, "start_step": step}, file, indent=1)
    kept = [json.dumps(line) + "\n" for line in read_log(args) if line["step"] <= step]
    Path(f"{args.output_dir}/log.jsonl.tmp").write_text("".join(kept))
    os.replace(f"{args.output_dir}/log.jsonl.tmp", f"{args.output_dir}/log.jsonl")


def read_log(args):
    """-> the lines of log.jsonl as dicts, up to one that was cut off when the disk was full."""
    lines = []
    with suppress(FileNotFoundError, ValueError), open(f"{args.output_dir}/log.jsonl") as file:
        for line in file:
            lines.append(json.loads(line))
    return lines


def write_log(args, line, left=None):
    """Prints a line, {name: number}, and appends it to log.jsonl. left: the seconds until the run's end."""
    line = {name: value if isinstance(value, int) else float(f"{value:.5g}") for name, value in line.items()}
    text = "  ".join(f"{name} {value}" for name, value in line.items())
    print(text + (f"  left {timedelta(seconds=round(left))}" if left is not None else ""), flush=True)
    try:
        with open(f"{args.output_dir}/log.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
    except OSError as error:
        raise BadInput(f"cannot write {args.output_dir}/log.jsonl ({error.strerror}): make room, then "
                       "--resume") from None


def check_finite(line, model):
    """Raises BadInput unless all numbers of a log line are finite, and the model's weights."""
    weights = sum(param.detach().sum() for param in model.parameters()).item()
    bad = [name for name, value in (line | {"the weights' sum": weights}).items() if not math.isfinite(value)]
    if bad:
        raise BadInput(f"{bad[0]} is not finite at or before step {line['step']}: the last checkpoint is "
                       "kept; --resume with a lower --lr, or with --amp off")


def peak_memory_mb(device):
    """Peak memory in MB: allocated on the GPU, or without one, resident in this process."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated() / 2 ** 20)
    units_per_mb = 2 ** 20 if sys.platform == "darwin" else 2 ** 10   # bytes on macOS, KiB elsewhere
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / units_per_mb)


def save_grid(path, columns):
    """{name: normalised images (B, 3, H, W)} -> a PNG with a column for each name, a row for each image."""
    tiles = denormalize(torch.stack(list(columns.values()), dim=1).flatten(0, 1))
    tiles = F.interpolate(tiles, scale_factor=max(1, round(96 / tiles.shape[3])), mode="nearest")
    grid = make_grid(tiles, nrow=len(columns), pad_value=1)
    save_page(path, grid, list(columns))


def save_page(path, grid, names):
    """Writes a picture (3, H, W) in [0, 1] under the names of its columns, which are equally wide."""
    image = v2.functional.to_pil_image(grid.cpu())
    page = Image.new("RGB", (image.width, image.height + 16), "white")
    page.paste(image, (0, 16))
    draw = ImageDraw.Draw(page)
    for i, name in enumerate(names):
        draw.text(((i + 0.5) * image.width / len(names), 8), name, "black", anchor="mm")
    page.save(path)


stop_signals = []                                                     # Ctrl-C or SIGTERM since the loop began


def catch_signals():
    """From now on, Ctrl-C and SIGTERM ask for a stop after the step; a second Ctrl-C stops at once."""
    def note(number, frame):
        stop_signals.append(number)
        if number == signal.SIGINT and stop_signals.count(number) > 1:
            raise KeyboardInterrupt

    stop_signals.clear()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, note)


def ignore_ctrl_c(worker):
    """For a loader's workers, which get the terminal's Ctrl-C too, and which the last step still needs."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def stop_requested():
    """-> True in all processes if a signal has asked one of them to stop."""
    requested = torch.tensor(len(stop_signals))
    if dist.is_initialized():
        dist.all_reduce(requested)
    return bool(requested)


# What errors of PyTorch's say, and what to do. Others keep their traceback.
LESS = "raise --accum_steps, or lower --batch_size or --img_size"
ADVICE = {"shared memory": "shared memory is full: in Docker, give --shm-size 8g, or take --num_workers 0",
          "is killed by signal": "a data loader worker was killed; if memory is short, lower --num_workers",
          "can't allocate memory": f"the memory is full: {LESS}",
          "out of memory": f"the GPU's memory is full: {LESS}",
          "Too many open files": "too many files are open: lower --num_workers, or raise `ulimit -n`",
          "onnection": "another process cannot be reached: see its error, then --resume",
          "imed out": "another process did not answer: see its error, then --resume"}


def run(main):
    """Runs main(). An error that the user can mend ends it with one sentence."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")             # file names may hold anything
    try:
        main()
        if dist.is_initialized():
            dist.destroy_process_group()
    except KeyboardInterrupt:
        sys.exit("stopped; --resume continues from the last checkpoint")
    except (BadInput, OSError, RuntimeError) as error:
        if stop_signals and "is killed by signal" in str(error):      # the workers got the signal, too
            sys.exit("stopped; --resume continues from the last checkpoint")
        advice = next((advice for sign, advice in ADVICE.items() if sign in str(error)), None)
        if isinstance(error, BadInput) or (isinstance(error, OSError) and not advice):
            advice = " ".join(str(error).split()) or repr(error)
        if not advice:
            raise
        sys.exit(f"error: {advice}")

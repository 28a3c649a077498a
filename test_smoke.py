"""The tests. They need no network, no GPU and no files but this folder's.

    python -m pytest -q             # the fast ones, less than a minute on two CPU cores
    SLOW=1 python -m pytest -q      # the slow ones too: they compile, start several processes or kill one

All run in one temporary folder, where flags may name images, masked, and the fixtures' folders.
"""
import argparse
import contextlib
import errno
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from http.client import HTTPMessage
from itertools import count, islice
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, PngImagePlugin
from torch import nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

import cim_pretrain as cim
import data
import energy_pretrain as energy
import finetune
import models

cases = pytest.mark.parametrize
slow = pytest.mark.skipif(not os.environ.get("SLOW"), reason="SLOW=1 runs it")
VIT = ["--model", "vit_nano", "--img_size", 16, "--patch_size", 4]
RESNET = ["--model", "resnet_nano"]
SEGMENT = ["--data", "masked", "--task", "segment", "--num_classes", 3, "--img_size", 16]
AUTO = ["--method", "autoencoder"]
TRAIN = ["--tokenizer", "train"]
VQGAN = ["--tokenizer", "vqgan", "--tokenizer_dir", "bad"]
COMMON = ["--data", "images", "--batch_size", 8, "--lr", 1e-3, "--num_workers", 0, "--device", "cpu"]
FLAGS = {energy: [*COMMON, *VIT], cim: [*COMMON, *VIT, "--tokenizer_steps", 3], finetune: COMMON}

# The device of the last test, registered before autograd starts, which counts the devices then.
with contextlib.suppress(AttributeError):                             # an older PyTorch skips that test
    torch.utils.backend_registration._setup_privateuseone_for_python_backend("sim")
    torch.sim.get_amp_supported_dtype = list                          # none: autocast asks, though it is off


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module", autouse=True)
def root(tmp_path_factory):
    """The folder in which all tests run, with two small data sets."""
    root = tmp_path_factory.mktemp("root")

    def save(image, path):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        image.save(root / path)

    # Three classes: 24 images to train on, and 37 held out, which neither 2 nor 3 processes divide.
    for split, i in [*(("train", i) for i in range(24)), *(("val", i) for i in range(37))]:
        image = data.Shapes(split == "train", 20)[10 * i + i % 3][0]
        image = image.convert({0: "L", 1: "P", 2: "RGBA"}.get(i, "RGB"))
        save(image, f"images/{split}/{'abc'[i % 3]}/{i:02d}.png")
    # Images of different sizes with masks of their gray levels, 0 = unlabelled to 3, in ADE20K's layout.
    for split, i in [*(("training", i) for i in range(8)), *(("validation", i) for i in range(5))]:
        image = data.Shapes(True, 40)[i][0].crop((0, 0, 40, 20 + i))
        save(image, f"masked/images/{split}/{i}.png")
        mask = np.array(image.convert("L")) // 64 * (np.arange(20 + i) > 2).astype(np.uint8)[:, None]
        save(Image.fromarray(mask), f"masked/annotations/{split}/{i}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        # Tensors are tiny, and threads that wait for each other take ten times as long on a busy machine.
        patch.setenv("OMP_NUM_THREADS", "1")
        torch.set_num_threads(1)
        yield root


@pytest.fixture(scope="module")
def trained(root):
    """A finished run of each script, in folders of these names: energy, cim, classify, segment."""
    run_here(energy, "--corrupt", "color", "--epochs", 2, "--output_dir", "energy")
    run_here(cim, *TRAIN, "--objective", "revdet", "--masking", "block", "--share", 0, "--accum_steps", 2,
             "--max_steps", 2, "--output_dir", "cim")
    for name, flags in (("classify", []), ("segment", SEGMENT)):
        run_here(finetune, *flags, "--init", "energy/backbone.pt", "--epochs", 2, "--output_dir", name)
    return root


def parse(script, *flags, call=None):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script.__name__, *map(str, flags)])
        return (call or script.parse_args)()


def run_here(script, *flags):
    """Runs a script in this process, which is faster. -> what it printed"""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            parse(script, *FLAGS[script], *flags, call=lambda: data.run(script.main))
        return out.getvalue()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def command(script, *flags, processes=1):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes]
    start = [sys.executable, *(torchrun if processes > 1 else [])]
    return list(map(str, [*start, script.__file__, *FLAGS[script], *flags]))


def run(script, *flags, processes=2):
    return subprocess.run(command(script, *flags, processes=processes), capture_output=True, text=True)


def assert_stops(script, flags, words):
    """The script must end with one sentence that holds all the words. -> the sentence"""
    with pytest.raises(SystemExit) as stop:
        run_here(script, *flags)
    assert "\n" not in stop.value.code                                # and it is no number
    assert [word for word in words.split() if word not in stop.value.code] == [], stop.value.code
    return stop.value.code


def refuses(error, words, function, *args):
    """function(*args) must raise the error with one line that matches the words."""
    with pytest.raises(error, match=f"^[^\n]*{words}[^\n]*$"):
        function(*args)


def read_log(output_dir):
    return [json.loads(line) for line in Path(output_dir, "log.jsonl").read_text().splitlines()]


def weights(output_dir, name="checkpoint.pt"):
    return torch.load(f"{output_dir}/{name}", weights_only=True)["model"]


def different(first, second):
    """Names of the tensors that differ in two state dicts with the same names."""
    assert first.keys() == second.keys()
    return [name for name in first if not torch.equal(first[name], second[name])]


def tiny_vit(**options):
    return models.ViT(dim=16, depth=2, heads=2, img_size=16, patch_size=4, **options)


def save_images(folder, number):
    folder.mkdir(parents=True)
    for i in range(number):
        Image.new("RGB", (20, 16)).save(folder / f"{i:03d}.png")


# ---------------------------------------------------------------- data

def unlabelled(folder):
    """-> the sets of paths to train on and to hold out"""
    return [set(data.unlabelled_dataset(str(folder), train, 16).paths) for train in (True, False)]

def test_held_out_images_stay_where_they_are(tmp_path):
    for folder, number in (("classes/train", 40), ("classes/cat", 40), ("split/train", 40), ("split/val", 3)):
        save_images(tmp_path / folder, number)
    train, val = unlabelled(tmp_path / "classes")                     # a class named train is no split
    assert len(train | val) == len(data.unlabelled_dataset(str(tmp_path / "classes"), None, 16)) == 80
    assert 1 < len(val) == 80 - len(train) < 20
    for path in [*sorted(train)[::2], *sorted(val)[::2]]:
        os.remove(path)
    save_images(tmp_path / "classes/dog", 40)
    train_later, val_later = unlabelled(tmp_path / "classes")
    assert train_later >= set(sorted(train)[1::2]) and val_later >= set(sorted(val)[1::2])
    assert list(map(len, unlabelled(tmp_path / "split"))) == [40, 3]
    images = data.unlabelled_dataset(str(tmp_path / "split"), None, 16)
    assert [len(images), images[0][1], *data.fixed_images(images, 8, count=2).shape] == [3, -1, 2, 3, 8, 8]

def test_hidden_files_are_no_data_and_links_multiply_none(tmp_path, capsys):
    shutil.copytree("images", tmp_path / "images")
    shutil.copytree("masked", tmp_path / "masked")
    for folder in ("images", "images/train", "images/train/a", "images/val/b", "masked/images/training"):
        for name in ("._x.png", ".ipynb_checkpoints/x.png", "__MACOSX/x.png", "x.heic"):
            (tmp_path / folder / name).parent.mkdir(exist_ok=True)
            (tmp_path / folder / name).write_text("no image")
    assert list(map(len, unlabelled(tmp_path / "images"))) == [24, 37]
    assert "images/train: left out 2 files of other formats (2 .heic)" in capsys.readouterr().out
    labelled = [data.labelled_dataset(str(tmp_path / "images"), train, 16) for train in (True, False)]
    assert [labelled[0].classes, *map(len, labelled)] == [["a", "b", "c"], 24, 37]
    assert len(data.Segmentation(tmp_path / "masked", True, 3)) == 8
    for link, folder in (("above", tmp_path / "images/train"), ("1", "../../val"), ("2", "../../val")):
        (tmp_path / "images/train/a" / link).symlink_to(folder)
    assert len(data.find_images(tmp_path / "images/train")) == 24 + 37
    assert len(data.labelled_dataset(str(tmp_path / "images"), True, 16)) == 24 + 37

TURN = Image.Exif()
TURN[0x0112] = 6                                                      # "turn by 90 degrees"
TEXTS = PngImagePlugin.PngInfo()
TEXTS.add_text("Raw profile type exif", "\n\n\nnot hexadecimal")      # a broken EXIF block
TEXTS.add_text("long", "x" * 2 ** 21, zip=True)

@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@cases("name,image,options,expected", [
    ("x.png", Image.fromarray(np.uint16([[0, 25700, 65535]])), {}, [0, 100, 255]),
    ("x.tif", Image.fromarray(np.float32([[0, 0.4, 1]])), {}, [0, 102, 255]),
    ("x.tif", Image.fromarray(np.float32([[0, 102, 255]])), {}, [0, 102, 255]),
    ("x.png", Image.new("L", (3, 1), 255).convert("P"), {"transparency": bytes(256)}, [255] * 3),
    ("x.png", Image.fromarray(np.uint8([[0], [100], [255]])), {"exif": TURN}, [255, 100, 0]),
    ("x.png", Image.fromarray(np.uint8([[0, 100, 255]])), {"pnginfo": TEXTS}, [0, 100, 255])])
def test_images_become_rgb(name, image, options, expected, tmp_path):
    image.save(tmp_path / name, **options)
    assert np.array(data.read_rgb(tmp_path / name))[0].tolist() == [[value] * 3 for value in expected]

def test_odd_images(tmp_path, monkeypatch):
    Image.fromarray(np.uint16([[0, 6000]])).save(tmp_path / "x.png")
    with pytest.warns(UserWarning, match="x.png: the brightest pixel is 6000, and 65535 is"):
        data.read_rgb(tmp_path / "x.png")
    before = data.peak_memory_mb(torch.device("cpu"))
    assert data.center_transform(224)(Image.new("RGB", (1, 10_000))).shape == (3, 224, 224)
    assert data.peak_memory_mb(torch.device("cpu")) < before + 200
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *args: pytest.fail("started Ghostscript"))
    Image.new("RGB", (20, 20)).save(tmp_path / "eps.jpg", format="EPS")
    os.mkfifo(tmp_path / "fifo.jpg")
    for name in ("eps.jpg", "fifo.jpg"):
        refuses(data.BadInput, name, data.read_rgb, tmp_path / name)

def test_masks_keep_their_indices(tmp_path):
    save_images(tmp_path / "images/training", 1)
    (tmp_path / "annotations/training").mkdir(parents=True)
    def open_masks(mask, format="PNG"):
        mask.save(tmp_path / "annotations/training/000.png", format=format)
        return data.Segmentation(tmp_path, True, num_classes=3)

    indices = np.arange(320, dtype=np.uint8).reshape(16, 20) % 4
    palette = Image.fromarray(indices)
    palette.putpalette([9, 9, 9, 0, 0, 0, 255, 0, 0, 0, 255, 0])
    dataset = open_masks(palette)
    image, mask = data.Transformed(dataset, data.segment_transform(16, False), 0)[0, 0]
    assert image.shape == (3, 16, 20) and np.array_equal(mask, indices)
    image, mask = data.Transformed(dataset, data.segment_transform(12, True), 0)[0, 0]
    assert image.shape[1:] == mask.shape == (12, 12)
    assert [image.dtype, mask.dtype] == [torch.float32, torch.int64]
    refuses(data.BadInput, "PNG", open_masks, Image.new("F", (20, 16)), "TIFF")
    for value, problem in ((0, "have 0 classes"), (2, "have 1 classes"), (255, "label 255")):
        words = f"{problem}.*classes count from 1, and 0 is unlabelled"
        refuses(data.BadInput, words, open_masks, Image.new("L", (20, 16), value))

def test_few_labels():
    targets = [0] * 200 + [1] * 100 + [2] * 3
    few = data.few_labels(targets, 0.1, seed=1)
    assert np.bincount(np.array(targets)[few]).tolist() == [20, 10, 1]
    assert few == sorted(set(few)) == data.few_labels(targets, 0.1, seed=1)
    assert few != data.few_labels(targets, 0.1, seed=2)

def first_keys(rank=0, world=1, step=0, number=120, size=62, batch_size=30, repeats=1):
    sampler = data.EndlessSampler(size, batch_size, rank, world, seed=3, repeats=repeats)
    sampler.step = step
    return list(islice(sampler, number))

@cases("repeats", [1, 3])
def test_order_depends_neither_on_processes_nor_on_stops(repeats):
    keys = first_keys(repeats=repeats)                                # two epochs of two steps
    ranks = [first_keys(rank, 3, number=40, repeats=repeats) for rank in range(3)]
    assert [key for together in zip(*ranks) for key in together] == keys
    assert first_keys(step=3, number=30, repeats=repeats) == keys[90:]
    images = [index for _, index in keys]
    assert len(set(keys)) == 120 and len(set(images[:60])) == 60 // repeats and images[60:] != images[:60]

@cases("batch_size,world,accum_steps", [(24, 1, 1), (24, 2, 4), (32, 1, 4), (40, 2, 1)])
def test_repeated_images_are_never_neighbours(batch_size, world, accum_steps):
    for rank in range(world):
        keys = first_keys(rank, world, 0, batch_size // world, 60, batch_size, repeats=3)
        parts = torch.tensor([index for _, index in keys]).chunk(accum_steps)
        assert all((part != part.roll(1)).all() for part in parts)

def test_crops_do_not_depend_on_workers_nor_shapes_on_anything():
    shapes = data.Shapes(True, 20)
    same, held_out = (np.array_equal(shapes[7][0], data.Shapes(train, 20)[7][0]) for train in (True, False))
    assert same and not held_out
    crops = data.Transformed(shapes, data.finetune_transform(16, 9, 0.25), seed=0)
    keys = [(1, 5), (0, 6), (0, 5)]                                   # (epoch, index)
    loaded = list(torch.utils.data.DataLoader(crops, batch_size=None, sampler=keys, num_workers=2))
    assert [label for _, label in loaded] == [5, 6, 5] == [shapes.targets[index] for _, index in keys]
    assert all(torch.equal(image, crops[key][0]) for key, (image, _) in zip(keys, loaded))
    assert not torch.equal(loaded[0][0], loaded[2][0])                # another epoch, another crop
    randaug = next(step for step in crops.transform.transforms if hasattr(step, "magnitude"))
    angles = randaug._AUGMENTATION_SPACE["Rotate"][0](randaug.num_magnitude_bins, 224, 224)
    assert angles[randaug.magnitude] == pytest.approx(27)             # 9 of 10, and 10 is 30 degrees


# ---------------------------------------------------------------- corruptions

NOISE = data.normalize(torch.rand(100, 3, 32, 32, generator=torch.Generator().manual_seed(0)))

def test_masks():
    mask = data.grid_mask(NOISE, torch.Generator(), cell=4, ratio=0.75)
    assert (mask.sum(dim=(1, 2, 3)) == 48 * 16).all()                 # 48 of 64 cells, in every image
    assert torch.equal(mask, mask[:, :, ::4, ::4].repeat_interleave(4, 2).repeat_interleave(4, 3))
    assert mask.float().mean(dim=0).sub(0.75).abs().max() < 0.2       # every cell as often as the others
    blanked = data.blank(NOISE, torch.Generator(), data.grid_mask, cell=4, ratio=0.75)
    assert torch.equal(blanked, NOISE * ~mask)
    images = torch.ones(64, 3, 64, 64)
    one = data.random_rectangles(images, torch.Generator(), 1, (0.01, 0.025))[:, 0].float()
    height, width = (one.amax(dim=dim).sum(dim=1) for dim in (2, 1))
    assert_close(one.sum(dim=(1, 2)), height * width)                 # one full rectangle
    assert 0.4 < (height / width).min() < (height / width).max() < 2.5
    for task, covered in (("random_small", 0.68), ("random_large", 0.54)):
        blank = energy.corrupt_pixels(images, torch.Generator(), task, parse(energy)) == 0
        assert blank.float().mean().item() == pytest.approx(covered, abs=0.03)
    for patch_size, blanked in ((16, {60, 112}), (4, {12})):          # p^2 - (p - 2k)^2 pixels for k = 1, 2
        blank = data.blank_patch_edges(images, torch.Generator(), patch_size)[:, :1] == 0
        patches = F.unfold(blank.float(), patch_size, stride=patch_size)           # (B, p*p, N)
        assert set(patches.sum(dim=1).flatten().tolist()) == blanked
        assert patches[0, :, 0].view(patch_size, patch_size)[0].all()
    fraction = (100 / 196, 120 / 196)                                 # CIM's masks
    random, block = (torch.stack([draw(14, fraction) for _ in range(200)])
                     for draw in (data.random_mask, data.block_mask))
    assert set(random.sum(dim=1).tolist()) == set(range(100, 121))
    assert block.sum(dim=1).max() <= 120 and block.sum(dim=1).float().mean() > 90
    for mask, low, high in ((block, 0.75, 1), (random, 0, 0.55)):     # how often neighbours are alike
        assert low < (mask.view(-1, 14, 14).int().diff(dim=1) == 0).float().mean() < high

def test_other_corruptions():
    out = data.low_resolution(NOISE, None, scale=8)
    assert torch.equal(out, out[:, :, ::8, ::8].repeat_interleave(8, 2).repeat_interleave(8, 3))
    assert_close(out.mean(dim=(2, 3)), NOISE.mean(dim=(2, 3)), atol=0.05, rtol=0)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (data.MEAN, data.STD))
    images = NOISE * std + mean                                       # in [0, 1]
    assert_close([data.denormalize(NOISE), data.normalize(images)], [images, NOISE])
    assert data.denormalize(torch.full((1, 3, 1, 1), 9.0)).max() == 1
    luma = images.mul(torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(dim=1, keepdim=True)
    assert_close(data.denormalize(data.gray(NOISE, None)), luma.expand(-1, 3, -1, -1))
    variance = data.noise(torch.zeros(1000, 3, 8, 8), torch.Generator()).var(dim=(1, 2, 3))
    quantiles = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9])             # of 1 - gamma, which is uniform
    assert_close(variance.quantile(quantiles), quantiles, atol=0.05, rtol=0)
    kinds = [lambda images, generator, k=k: torch.full_like(images, k) for k in range(4)]
    out = data.mix(torch.zeros(4000, 3, 2, 2), torch.Generator(), kinds)           # one for the whole image
    assert (out == out[:, :1, :1, :1]).all() and (out.int().flatten().bincount() - 12_000).abs().max() < 1200


# ---------------------------------------------------------------- backbones

def test_position_embeddings():
    """MAE's formula, in which x comes first, in a slow loop; the class token's entry is zero."""
    pos_embed = tiny_vit().pos_embed[0]
    assert not pos_embed[0].any()
    for place in range(16):
        y, x = divmod(place, 4)
        for i in range(4):
            omega = 1 / 10000 ** (i / 4)
            expected = [math.sin(x * omega), math.cos(x * omega), math.sin(y * omega), math.cos(y * omega)]
            assert pos_embed[1 + place, i::4].tolist() == pytest.approx(expected, abs=1e-6)
    # Another size: the embedding (x, y) remains the position, now of patches half as large.
    y, x = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    pos_embed = torch.cat([torch.full((1, 2), 9.0), torch.stack([x, y], dim=2).flatten(0, 1)])[None]
    assert_close(models.resize_pos_embed(pos_embed, 8), pos_embed)
    resized = models.resize_pos_embed(pos_embed, 16)[0]
    assert resized[0].tolist() == [9, 9]
    centres = ((torch.arange(16) + 0.5) / 2 - 0.5)[4:-4]              # away from the borders
    assert_close(resized[1:].view(16, 16, 2)[4:-4, 4:-4],
                 torch.stack([centres.expand(8, 8), centres[:, None].expand(8, 8)], dim=2))

@cases("name,dilated,blocks,theirs,head", [
    ("vit_nano", False, 4, None, None), ("resnet_nano", False, 4, None, None),
    ("resnet50", False, 16, "resnet50", "fc"), ("resnet50", True, 16, "resnet50", "fc"),
    ("swin_t", False, 12, "swin_t", "head"), ("convnext_t", False, 18, "convnext_tiny", "classifier.2")])
def test_backbones_and_torchvisions(name, dilated, blocks, theirs, head):
    model = models.build_backbone(name, img_size=64, drop_rate=0.3, dilated=dilated).eval()
    images = torch.randn(2, 3, 64, 64)
    feature, feature_map = model(images), model.forward_map(images)
    assert [*feature.shape, *feature_map.shape[2:]] == [2, model.width, *[64 // model.stride] * 2]
    feature_map.square().sum().backward()                             # DDP waits for every gradient
    assert [key for key, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    rates = [module.p for module in model.modules() if isinstance(module, torchvision.ops.StochasticDepth)]
    assert rates == pytest.approx(np.linspace(0, 0.3, blocks).tolist())
    if theirs:                                                        # the weights move there and back
        options = {"replace_stride_with_dilation": [False, dilated, dilated]} if head == "fc" else {}
        with torch.device("meta"):
            theirs = getattr(torchvision.models, theirs)(**options).eval()
        theirs.load_state_dict(model.state_dict(), strict=False, assign=True)
        assert models.load_weights(model, theirs.state_dict()) == [f"{head}.weight", f"{head}.bias"]
        theirs.set_submodule(head, nn.Identity())
        assert_close(theirs(images), feature)


# ---------------------------------------------------------------- tokenizers

def slow_dalle(weights, half, x):
    def conv(name, x):
        w = weights[f"{half}.blocks.{name}.w"]
        return F.conv2d(x, w, weights[f"{half}.blocks.{name}.b"], padding=(w.shape[2] - 1) // 2)

    x = conv("input", x)
    for group in (1, 2, 3, 4):
        for block in (f"group_{group}.block_1", f"group_{group}.block_2"):
            y = x
            for i in (1, 2, 3, 4):
                y = conv(f"{block}.res_path.conv_{i}", y.relu())
            if f"{half}.blocks.{block}.id_path.w" in weights:
                x = conv(f"{block}.id_path", x)
            x = x + y / 64                                            # 4 groups of 2 blocks, squared
        if group < 4:
            x = F.max_pool2d(x, 2) if half == "encoder" else F.interpolate(x, scale_factor=2)
    return conv("output.conv", x.relu())

def test_dalle_equals_slow_formulas(tmp_path):
    start = models.DVAE(codes=32, width=8, embed_width=8, blocks=2)
    for value in start.parameters():
        value.data = torch.randn(value.shape) / (2.5 if value.ndim == 4 else 10)
    images = torch.rand(2, 3, 32, 48)
    tokens = slow_dalle(start.state_dict(), "encoder", 0.8 * images + 0.1).argmax(dim=1)
    codes = F.one_hot(tokens, 32).permute(0, 3, 1, 2).float()
    restored = slow_dalle(start.state_dict(), "decoder", codes)[:, :3].sigmoid().sub(0.1).div(0.8).clamp(0, 1)
    paths = [tmp_path / "encoder.pkl", tmp_path / "decoder.pkl"]
    for path in paths:                                                # whole modules, as the published files
        torch.save(getattr(start, path.stem), path)
    dvae = models.load_dalle(*paths)
    assert different(start.state_dict(), dvae.state_dict()) == []
    assert torch.equal(dvae.encode(images), tokens) and len(tokens.unique()) > 4
    assert_close([dvae.decode(tokens), dvae.decode(codes)], [restored, restored])  # a lookup, late upsampling
    refuses(models.BadFile, "dVAE", models.load_dalle, *paths[::-1])
    refuses(models.BadFile, "VQGAN", models.load_vqgan, paths[0])

def slow_vqgan(weights, images):
    """The formulas of taming-transformers for three levels of one block, the last one with attention."""
    def conv(x, name, **options):
        return F.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], **options)
    def norm(x, name):
        return F.group_norm(x, 32, weights[f"{name}.weight"], weights[f"{name}.bias"], eps=1e-6)
    def block(x, name):
        y = conv(F.silu(norm(x, f"{name}.norm1")), f"{name}.conv1", padding=1)
        y = conv(F.silu(norm(y, f"{name}.norm2")), f"{name}.conv2", padding=1)
        return y + (conv(x, f"{name}.nin_shortcut") if f"{name}.nin_shortcut.weight" in weights else x)
    def attention(x, name):
        q, k, v = (conv(norm(x, f"{name}.norm"), f"{name}.{part}").flatten(2) for part in "qkv")
        scores = torch.einsum("bci,bcj->bij", q, k) / math.sqrt(q.shape[1])
        y = torch.einsum("bij,bcj->bci", scores.softmax(dim=2), v)
        return x + conv(y.view_as(x), f"{name}.proj_out")
    def middle(x, half):
        return block(attention(block(x, f"{half}.mid.block_1"), f"{half}.mid.attn_1"), f"{half}.mid.block_2")

    x = conv(2 * images - 1, "encoder.conv_in", padding=1)
    for i in (0, 1):                                                  # padded on the right and below
        x = F.pad(block(x, f"encoder.down.{i}.block.0"), (0, 1, 0, 1))
        x = conv(x, f"encoder.down.{i}.downsample.conv", stride=2)
    x = middle(attention(block(x, "encoder.down.2.block.0"), "encoder.down.2.attn.0"), "encoder")
    x = conv(conv(F.silu(norm(x, "encoder.norm_out")), "encoder.conv_out", padding=1), "quant_conv")
    codebook = weights["quantize.embedding.weight"]
    gaps = x[:, None] - codebook[:, :, None, None]                    # (B, codes, embed_dim, h, w)
    tokens = gaps.square().sum(dim=2).argmin(dim=1)

    x = conv(conv(codebook[tokens].permute(0, 3, 1, 2), "post_quant_conv"), "decoder.conv_in", padding=1)
    x = middle(x, "decoder")
    for i in (2, 1, 0):
        for j in (0, 1):
            x = block(x, f"decoder.up.{i}.block.{j}")
            x = attention(x, f"decoder.up.2.attn.{j}") if i == 2 else x
        if i > 0:
            x = conv(F.interpolate(x, scale_factor=2), f"decoder.up.{i}.upsample.conv", padding=1)
    x = conv(F.silu(norm(x, "decoder.norm_out")), "decoder.conv_out", padding=1)
    return tokens, (0.5 + 0.5 * x).clamp(0, 1)

def test_vqgan_equals_slow_formulas(tmp_path, monkeypatch):
    """A small one in a file as PyTorch Lightning writes it, whose class is gone when it is read."""
    callback = type("ModelCheckpoint", (), {"__module__": "pytorch_lightning"})
    sizes = dict(codes=50, embed_dim=8, z_channels=16, width=32, multipliers=(2, 4, 2), blocks=1,
                 attention=(False, False, True))
    weights = {key: torch.randn(value.shape) / 5 for key, value in models.VQGAN(**sizes).state_dict().items()}
    content = {"state_dict": weights | {"loss.logvar": torch.ones(1)}, "callbacks": {callback: callback()}}
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pytorch_lightning", argparse.Namespace(ModelCheckpoint=callback))
        torch.save(content, tmp_path / "vqgan.ckpt")
    vqgan = models.load_vqgan(tmp_path / "vqgan.ckpt")
    images = torch.rand(2, 3, 32, 48)
    tokens, restored = slow_vqgan(weights, images)
    assert torch.equal(vqgan.encode(images), tokens) and len(tokens.unique()) > 5
    assert_close(vqgan.decode(tokens), restored, rtol=1e-3, atol=1e-4)
    assert ((restored > 0) & (restored < 1)).float().mean() > 0.1

HUGE = torch.zeros(1).expand(10 ** 9)                                 # of stride 0: a file of it is tiny

@cases("kind,problem", [("complex", "complex64"), ("no codes", ""), ("levels", "256 x 256 pixels"),
                        ("huge", "larger than what the file holds")])
def test_tokenizers_that_cannot_be(kind, problem, tmp_path):
    start, end = "decoder.blocks.input.w", "encoder.blocks.output.conv."
    state = models.DVAE(codes=4, width=32, embed_width=4, blocks=1).state_dict()
    state |= {"complex": {start: state[start] + 0j},
              "huge": {f"{end}w": HUGE.view(-1, 1, 1, 1).expand(-1, 256, 1, 1)},
              "no codes": {f"{end}w": state[f"{end}w"][:0], f"{end}b": state[f"{end}b"][:0],
                           start: state[start][:, :0]}}.get(kind, {})
    if kind == "levels":
        sizes = dict(multipliers=(1,) * 9, attention=(False,) * 9, blocks=1)
        torch.save({"state_dict": models.VQGAN(4, 4, 4, 32, **sizes).state_dict()}, tmp_path / "x.ckpt")
        refuses(models.BadFile, problem, models.load_vqgan, tmp_path / "x.ckpt")
    else:
        refuses(models.BadFile, problem, models.load_dvae, state)
    with torch.device("meta"):                                        # the published ones
        sizes = [[param.numel() for param in part.parameters()] for part in (models.VQGAN(), models.DVAE())]
    assert [(len(part), sum(part)) for part in sizes] == [(343, 72_141_699), (150, 97_616_006)]


# ---------------------------------------------------------------- files from strangers

class Evil:
    def __reduce__(self):
        return os.mkdir, ("ran",)

@pytest.mark.filterwarnings("ignore")
@cases("kind,problem", [
    ("nothing", "is missing"), ("folder", "regular file"), ("FIFO", "regular file"), ("page", "web page"),
    ("truncated", "truncated"), ("tar", "not a weight file"), ("script", ""), ("reduce", ""),
    ("old", re.escape("convert it: torch.save(torch.load(path, weights_only=False), path)"))])
def test_files_run_nothing(kind, problem, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = Path("x.pt")
    content = {"state_dict": {"w": torch.ones(1000)}}
    {"nothing": lambda: None, "folder": path.mkdir, "FIFO": lambda: os.mkfifo(path),
     "page": lambda: path.write_text("<html>"), "tar": lambda: tarfile.open(path, "w").close(),
     "truncated": lambda: (torch.save(content, path), os.truncate(path, 2000)),
     "script": lambda: torch.jit.save(torch.jit.script(nn.ReLU()), path),
     "reduce": lambda: torch.save({"state_dict": Evil()}, path),
     "old": lambda: torch.save(content, path, _use_new_zipfile_serialization=False)}[kind]()
    files = os.listdir()
    for read in (models.read_file, models.read_tensors):
        refuses(models.BadFile, f"x.pt .*{problem}", read, path)
    assert os.listdir() == files
    if kind == "old":                                                 # the advice works
        torch.save(torch.load(path, weights_only=False), path)
        assert models.read_tensors(path)["w"].sum() == 1000

def test_safetensors(tmp_path):
    path = tmp_path / "x.safetensors"
    def read(header, raw):
        header = json.dumps(header).encode()
        path.write_bytes(len(header).to_bytes(8, "little") + header + raw)
        return models.read_file(path)

    w = torch.randn(2, 3)
    good = {"dtype": "F32", "shape": [2, 3], "data_offsets": [8, 32]}
    n = {"dtype": "I64", "shape": [], "data_offsets": [0, 8]}
    raw = b"\7" + bytes(7) + w.numpy().tobytes()
    tensors = read({"__metadata__": {"format": "pt"}, "n": n, "w": good}, raw)
    assert torch.equal(tensors.pop("w"), w) and tensors == {"n": torch.tensor(7)}
    bad = [{"data_offsets": offsets} for offsets in ([0, 80], [-8, 16], [8, 4], [0, 0], 1)]
    for change in (*bad, {"shape": [2, 4]}, {"shape": [-2, -3]}, {"dtype": "F31"}):
        refuses(models.BadFile, "x.safetensors is damaged", read, {"w": good | change}, bytes(40))
    path.write_bytes(b"\xff" * 20)
    refuses(models.BadFile, "x.safetensors is damaged", models.read_file, path)

@cases("changes,result", [
    ({"mask_token": torch.zeros(1), "decoder.bias": torch.zeros(1)}, ["mask_token", "decoder.bias"]),
    ({"norm.weight": None, "norm.bias": None, "fc_norm.weight": torch.ones(16)}, ["fc_norm.weight"]),
    ({"norm.weight": None}, "Missing.*norm.weight"), ({"surprise": torch.zeros(1)}, "Unexpected.*surprise"),
    ({"pos_embed": torch.zeros(1, 8, 16)}, "mismatch for pos_embed"),
    ({"norm.bias": torch.full((16,), torch.nan)}, "NaN in norm.bias"),
    ({"norm.bias": HUGE[:16]}, "norm.bias is larger than what the file holds"),
    ({"pos_embed": HUGE[:16].expand(1, 1001 ** 2 + 1, 16)}, "pos_embed"),
    ({"dist_token": torch.zeros(1, 1, 16)}, "a distilled DeiT"),
    ({"gamma_1": HUGE[:1], "relative_position_index": HUGE[:1]}, "BEiT, with relative positions")])
def test_load_weights_accounts_for_every_key(changes, result):
    state = tiny_vit().state_dict()
    if isinstance(result, str):
        with pytest.raises((RuntimeError, ValueError), match=result):
            models.load_weights(tiny_vit(), state | changes)
        return
    for prefix in ("", "module._orig_mod.", "student.backbone.", "encoder."):
        vit = tiny_vit()
        named = {prefix + key: value for key, value in (state | changes).items()}
        assert models.load_weights(vit, {"model": named}) == result
        assert all(torch.equal(vit.state_dict()[key], state[key]) for key in state.keys() - changes)

@cases("kept", [0, 0.5])
def test_downloads_that_are_not_kept(kept, tmp_path, monkeypatch):
    torch.save({"state_dict": {"x": torch.ones(9)}}, tmp_path / "whole.pt")
    whole = (tmp_path / "whole.pt").read_bytes()
    response = io.BytesIO(whole[:int(kept * len(whole))] or b"<html>")
    response.info = HTTPMessage
    monkeypatch.setattr("torch.hub.urlopen", lambda request: response)
    path = f"{tmp_path}/new/encoder.pkl"
    words = f"cannot download https://x.*truncated or not a weight file.*put it at {path}"
    refuses(data.BadInput, words, data.download, "https://x", path, models.read_tensors)
    assert os.listdir(tmp_path / "new") == []

def test_a_full_disk_keeps_the_earlier_file(tmp_path):
    for name in ("file.tmp", "log.jsonl"):                            # a disk without room
        (tmp_path / name).symlink_to("/dev/full")
    (tmp_path / "file").write_text("earlier")
    refuses(models.BadFile, "/file .*then --resume", models.save, tmp_path / "file", torch.ones(100_000))
    args = argparse.Namespace(output_dir=tmp_path)
    refuses(data.BadInput, "/log.jsonl .*then --resume", data.write_log, args, {"step": 1})
    assert (tmp_path / "file").read_text() == "earlier" and not (tmp_path / "file.tmp").is_symlink()


# ---------------------------------------------------------------- the energy method

def energy_batch(task, model, size=4, flags=()):
    args = parse(energy, *FLAGS[energy], *flags)
    images = torch.randn(size, 3, 16, 16)
    batch = energy.corrupt_batch(task, images, torch.Generator(), model, args)
    energy.calibrate_and_freeze_unused(model, *batch)
    return images, batch

@cases("name", ["cls", "mean", "predicted", "contrast", "resnet", "sort"])
def test_gradients_equal_finite_differences(name):
    """The weights' gradient of eq. (5), which runs through dE/dx, against central differences in float64."""
    backbone = tiny_vit(pool="mean" if name == "mean" else "cls")
    if name == "resnet":
        backbone = models.ResNet((1, 1, 1, 1), width=4, norm="group", small_images=True)
    model = energy.EnergyModel(backbone, name if name == "predicted" else "learned", int(name != "contrast"))
    _, (x, target, context) = energy_batch("sort" if name == "sort" else "color", model)
    context = {key: value.double() if key == "images" else value for key, value in context.items()}
    model.double()
    def loss():
        return model(x.double(), target.double(), **context)[0]

    loss().backward()
    num_checked = 0
    for key, param in [(key, param) for key, param in model.named_parameters() if param.grad is not None]:
        direction = torch.randn_like(param)
        direction *= 1e-7 / direction.norm()                          # so small that no ReLU crosses its kink
        with torch.no_grad():
            param += direction
            above = loss().item()
            param -= 2 * direction
            expected = (above - loss().item()) / 2e-7
            param += direction
        gradient = (param.grad * direction).sum().item() * 1e7
        assert gradient == pytest.approx(expected, rel=1e-3, abs=1e-7), key
        num_checked += key.startswith("backbone.") and expected != 0
    assert num_checked > 15

@cases("flags,calibrated", [([], True), (["--energy_scale", 1], False)])
def test_step_equals_autograd(flags, calibrated):
    images = torch.randn(8, 3, 16, 16)
    model = energy.build_model(parse(energy, *FLAGS[energy], "--corrupt", "color", *flags), images)
    x = data.gray(images, None).requires_grad_()
    gradient, = torch.autograd.grad(model.scale * model.head(model.backbone(x)).sum(), x)
    assert_close(model.restore(x), x - 0.1 * gradient, rtol=1e-4, atol=1e-4)
    assert_close(model.restore(x)[:1], model.restore(x[:1]), rtol=1e-4, atol=1e-4)
    assert (gradient.square().mean().sqrt().item() == pytest.approx(1, abs=1e-3)) == calibrated
    assert calibrated or model.scale == flags[1]
    with torch.autocast("cpu", torch.float16):                        # it ends at 65,504
        model.scale.fill_(1e6)
        assert model.restore(x).isfinite().all()

def test_attention_runs_with_autocast_off(monkeypatch):
    """Inside func.grad, CUDA's autocast would make its MATH backend mix dtypes; a CPU's does not."""
    seen = []
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v: seen.append(
        (torch.is_autocast_enabled("cpu"), q.dtype)) or v)
    with torch.autocast("cpu", torch.bfloat16):
        tiny_vit()(torch.randn(2, 3, 16, 16))
    assert seen == [(False, torch.bfloat16)] * 2

def test_sort_moves_only_the_position_embedding():
    vit = tiny_vit()
    model, before = energy.EnergyModel(vit), vit.pos_embed.clone()
    _, (x, target, context) = energy_batch("sort", model)
    keep, images = context["keep"], context["images"]
    assert x.shape == target.shape == (4, 8, 16)
    assert_close(target, before[0, 1:][keep])
    places = energy.nearest_position(model.patch_positions, x)
    assert all(len(set(row)) == 8 for row in [*keep.tolist(), *places.tolist()])
    assert not torch.equal(places, keep)
    assert x.norm(dim=2).min() > 0 and vit.pos_embed.grad is None     # the class token's entry is 0
    # Dropped patches have no influence; patches pasted at their true places give back the images.
    dropped = models.patchify(images, 4).scatter(1, keep[:, :, None].expand(-1, -1, 48), 0)
    dropped = models.unpatchify(dropped, 4, 16)
    assert_close(model.restore(x, images=images + dropped, keep=keep), model.restore(x, **context))
    assert_close(energy.paste_patches(model, target, images, keep) + dropped, images)

def test_mae_equals_a_slow_loop():
    """Only visible patches enter, and the loss is that of the masked ones, each normalised."""
    model = energy.AutoEncoder(tiny_vit())
    images, (x, target, context) = energy_batch("grid", model, 3, [*AUTO, "--corrupt", "grid"])
    keep = context["keep"]
    assert keep.shape == (3, 4)                                       # a quarter of 16 patches
    loss, restored = model(x, target, **context)
    errors = []
    for b in range(3):
        visible = keep[b].tolist()
        encoded = model.embed(model.backbone.forward_tokens(images[b:b + 1], keep=keep[b:b + 1]))[0]
        tokens = [encoded[0]]                                         # the decoder's, built one by one
        for place in range(16):
            token = encoded[1 + visible.index(place)] if place in visible else model.mask_token[0, 0]
            tokens.append(token + model.patch_positions[0, place])
        output = model.head(model.norm(nn.Sequential(*model.blocks)(torch.stack(tokens)[None])))[0, 1:]
        for place in range(16):
            y, x = divmod(place, 4)
            patch = images[b, :, 4 * y:4 * y + 4, 4 * x:4 * x + 4].flatten()
            shown = restored[b, :, 4 * y:4 * y + 4, 4 * x:4 * x + 4].flatten()
            std = (patch.var() + 1e-6).sqrt()
            if place not in visible:
                errors.append((output[place] - (patch - patch.mean()) / std).square().mean())
            assert_close(shown, patch if place in visible else output[place] * std + patch.mean())
    assert_close(loss, torch.stack(errors).mean())


# ---------------------------------------------------------------- the CIM method

def tiny_cim(*flags):
    """-> (CIM model, tokenizer, images, masks): a vit_nano for 16 tokens in images of 16 pixels."""
    args = parse(cim, *FLAGS[cim], *flags)
    tokenizer = models.DVAE(codes=32, width=8, embed_width=8, blocks=1).requires_grad_(False)
    tokenizer = tokenizer if args.tokenizer else None
    model = cim.build_model(args, 32 if args.tokenizer else None, torch.device("cpu"))
    return model, tokenizer, torch.randn(4, 3, 16, 16), torch.stack([cim.draw_mask(args) for _ in range(4)])

def test_normalised_targets_and_auc_equal_slow_loops():
    images = torch.randn(2, 3, 16, 16).double()
    target, mean, std = cim.normalize_target(images, "window", 4)
    padded = F.pad(images, (4, 3, 4, 3), mode="reflect")
    for b, y, x in [(0, 0, 0), (1, 15, 15), (0, 7, 3), (1, 2, 14)]:
        window = padded[b, :, y:y + 8, x:x + 8]                       # 4 pixels before the pixel, 3 behind it
        expected = (images[b, :, y, x] - window.mean()) / (window.var(correction=0) + 1e-6).sqrt()
        assert_close(target[b, :, y, x], expected)
    assert_close(target * std + mean, images)
    patch = cim.normalize_target(images, "patch", 4)[0][1, :, 4:8, 8:12]
    assert patch.mean().abs() < 1e-6 and abs(patch.std(correction=0) - 1) < 1e-5
    assert torch.equal(cim.normalize_target(images, "none", 4)[0], images)
    flat = torch.full((1, 3, 16, 16), 2.0)                            # where E[x^2] - E[x]^2 fails in fp32
    flat[0, :, 5, 5] += 0.01
    exact = cim.normalize_target(flat.double(), "window", 4)[0].float()
    assert_close(cim.normalize_target(flat, "window", 4)[0], exact, rtol=0, atol=1e-3)
    scores, labels = torch.tensor([0.1, 0.4, 0.4, 0.8, 0.3]), torch.tensor([False, False, True, True, True])
    pairs = [(p > n) + 0.5 * (p == n) for p in scores[labels].tolist() for n in scores[~labels].tolist()]
    assert cim.area_under_curve(scores, labels) == pytest.approx(sum(pairs) / len(pairs))

@cases("generator", ["erase", "mae"])
def test_pixel_loss_equals_a_slow_loop(generator):
    """Of all pixels, but with random erasing of the erased ones, which are a rectangle and become gray."""
    model, _, images, mask = tiny_cim("--generator", generator, "--target", "none")
    corrupted, gen_loss, replaced = model.corrupt(images, mask, None)
    pixels = torch.ones(4, 1, 16, 16, dtype=torch.bool)
    if generator == "erase":
        pixels = (corrupted == 0).all(dim=1, keepdim=True)
        assert 0.3 < pixels.float().mean() < 0.7
        assert torch.equal(pixels, pixels.amax(dim=2, keepdim=True) & pixels.amax(dim=3, keepdim=True))
    else:                                                             # pixels are drawn around the output
        model.generator.head.weight.data.zero_()                      # which is 0
        gen_loss, corrupted = model.generate_pixels(images, mask)
        hidden = mask.view(4, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3).expand_as(images)
        assert_close(gen_loss, images[hidden].square().mean())
        assert torch.equal(corrupted[~hidden], images[~hidden])
        assert abs(corrupted[hidden].std() / gen_loss.sqrt() - 1) < 0.1 > abs(corrupted[hidden].mean())
    output = torch.randn(4, 3, 16, 16)
    gaps = [output[b, c, y, x].item() - images[b, c, y, x].item() for b, _, y, x in pixels.nonzero().tolist()
            for c in range(3)]
    expected = sum(abs(gap) + gap ** 2 for gap in gaps) / len(gaps)
    assert model.enhancer_loss(output, images, replaced).item() == pytest.approx(expected, rel=1e-4)

@cases("share,objective,generator", [(0, "respix", "beit"), (2, "revdet", "beit"), (2, "respix", "mae")])
def test_which_loss_trains_what(share, objective, generator):
    flags = ["--share", share, "--objective", objective, "--generator", generator]
    model, tokenizer, images, mask = tiny_cim(*flags)
    trained = []
    for enhancer in (False, True):
        model.zero_grad()
        corrupted, loss, replaced = model.corrupt(images, mask, tokenizer)
        (model.enhancer_loss(model.enhance(corrupted), images, replaced) if enhancer else loss).backward()
        trained.append({param for param in model.parameters() if param.grad is not None and param.grad.any()})
    assert not trained[0] & set(model.head.parameters())
    assert not trained[1] & {model.generator.mask_token, *model.generator.head.parameters()}
    # Shared: the weight and bias of the patch embedding, and twelve tensors in each of two blocks.
    assert len(trained[0] & trained[1]) == (2 + 2 * 12 if share else 0)
    assert len(trained[0] | trained[1]) == len(list(model.parameters()))

def test_sampled_tokens():
    model, tokenizer, images, mask = tiny_cim("--objective", "revdet")
    golden = torch.randint(32, (4, 16))
    for sampling in ("softmax", "argmax", "uniform"):
        first, second = (model.generate_tokens(images, golden, mask, sampling)[1] for _ in range(2))
        assert torch.equal(first[~mask], golden[~mask]) and not torch.equal(first, golden)
        assert torch.equal(first, second) == (sampling == "argmax")
    # What the generator is sure of is sampled; if that is golden, the loss is that of "not replaced".
    model.generator.head.weight.data.zero_()
    model.generator.head.bias.data[:] = torch.tensor([0.0] * 31 + [50.0])
    golden = torch.full_like(golden, 31)
    loss, tokens = model.generate_tokens(images, golden, mask, "softmax")
    assert loss < 1e-6 and torch.equal(tokens, golden)
    output = model.enhance(cim.detokenize(tokenizer, tokens, 16))
    assert_close(model.enhancer_loss(output, images, tokens != golden), F.softplus(output).mean())
    # Logits log(1), log(2), log(3), log(4) are drawn 1, 2, 3 and 4 times of ten.
    model.generator.head.bias.data[:] = torch.tensor([1.0, 2, 3, 4] + [1e-9] * 28).log()
    drawn = torch.cat([model.generate_tokens(images, golden, mask, "softmax")[1][mask] for _ in range(100)])
    assert (drawn.bincount(minlength=4) / len(drawn) - torch.tensor([0.1, 0.2, 0.3, 0.4])).abs().max() < 0.03

@cases("stride", [2, 4, 8])
def test_the_tokenizer_sees_its_stride_for_each_patch(stride):
    """A tokenizer of two codes, dark and light, and an image of 2 x 2 patches, dark and light."""
    tokenizer = argparse.Namespace(stride=stride)
    tokenizer.encode = lambda images: images.mean(dim=1)[:, ::stride, ::stride].gt(0.5).long()
    tokenizer.decode = lambda tokens: tokens[:, None].float().kron(torch.ones(1, 3, stride, stride))
    images = data.normalize(torch.eye(2).fliplr().kron(torch.ones(4, 4)).expand(1, 3, 8, 8))
    assert cim.tokenizer_view(tokenizer, images, 4).shape[2:] == (2 * stride, 2 * stride)
    tokens = cim.tokenize(tokenizer, images, 4)
    assert tokens.tolist() == [[0, 1, 1, 0]]
    assert torch.allclose(cim.detokenize(tokenizer, tokens, 8), images, atol=1e-5) == (stride == 4)


# ---------------------------------------------------------------- fine-tuning

@cases("flags,config,expected", [
    ("", dict(method="energy"), dict(lr=4e-3, layer_decay=0.75, head_norm="none", epochs=200)),
    ("", dict(model="vit_l", method="autoencoder"), dict(layer_decay=0.75, epochs=50)),
    ("", dict(model="vit_b", method="cim", objective="revdet"), dict(head_norm="layer", lr=5e-3)),
    ("", dict(method="cim", objective="revdet"), dict(lr=4e-3, crop_ratio=0.95)),
    ("--recipe cim", dict(method="energy"), dict(layer_decay=0.8, lr=3e-3)),
    ("--model resnet50", dict(method="cim"), dict(loss="bce", epochs=100, img_size=160, test_size=224)),
    ("--model resnet50 --epochs 599", {}, dict(loss="bce", repeats=3, mixup=0.1, drop_path=0, img_size=224)),
    ("--model resnet50 --epochs 600", {}, dict(repeats=3, mixup=0.2, drop_path=0.05)),
    ("--batch_size 512 --mixup 0 --epochs 10", dict(method="cim", img_size=32),
    dict(lr=1.5e-3, mixup=0, cutmix=1, warmup_epochs=2, img_size=32, test_size=32, crop_ratio=1)),
    ("--lr 1 --warmup_epochs 9 --epochs 10", {}, dict(lr=1, warmup_epochs=9)),
    ("--probe linear", dict(method="cim"), dict(epochs=90, weight_decay=0, head_norm="batch")),
    ("--task segment", dict(model="swin_t", img_size=64), dict(lr=3e-4, layer_decay=1, img_size=64)),
    ("--task segment", dict(model="resnet50"), dict(epochs=64, lr=1e-2, power=0.9)),
    ("", dict(data="nowhere", output_dir="/", seed=7, pool="cls", std=[0.5] * 3),
    dict(data="shapes", output_dir="runs/finetune_vit_s", seed=0, pool="cls", std=[0.5] * 3))])
def test_which_recipe(flags, config, expected, tmp_path):
    torch.save({"config": {"model": "vit_s"} | config}, tmp_path / "x.pt")
    args = parse(finetune, "--init", tmp_path / "x.pt", *flags.split())
    assert {key: getattr(args, key) for key in expected} == expected
    if args.task == "segment":
        optimizer = finetune.build_optimizer(args, finetune.Segmenter(tiny_vit(), 3, 16))
        assert type(optimizer).__name__ == ("SGD" if args.model == "resnet50" else "AdamW")

def test_schedules():
    rate = [finetune.learning_rate(step, 110, 10, 1.0, 1e-6) for step in range(111)]
    assert [rate[0], rate[9], rate[10], rate[110]] == [0.1, 1, 1, 1e-6]
    assert rate[60] == pytest.approx((1 + 1e-6) / 2)
    args = argparse.Namespace(task="segment", lr=1.0, power=0.9)
    rate = [finetune.scheduled_rate(args, step, 110, 10) for step in range(111)]
    assert [rate[0], rate[9], rate[10], rate[60], rate[110]] == [0.1, 1, 1, 0.5 ** 0.9, 0]
    for script, warmup, lr in ((energy, 40, 1e-4 / 4), (cim, 10, 1.5e-3 / 32)):
        args = parse(script, "--epochs", 500, "--batch_size", 64)
        assert [args.warmup_epochs, args.lr] == [warmup, pytest.approx(lr)]
        args = parse(script, "--recipe", "short", "--epochs", 5)
        assert [args.lr, args.epochs, args.warmup_epochs] == [script.SHORT["lr"], 5, 0.5]

def test_layer_decay_and_no_decay():
    model = finetune.Classifier(tiny_vit(pos_embed="learned"), 3, head_norm="layer")
    names = {param: name for name, param in model.named_parameters()}
    groups = {names[param]: (group["lr_scale"], group["weight_decay"])
              for group in finetune.layer_groups(model, 0.05, 0.75) for param in group["params"]}
    assert groups.keys() == {name for name, param in model.named_parameters() if param.requires_grad}
    for name, (scale, decay) in groups.items():
        layer = int(name.split(".")[2]) + 1 if ".blocks." in name else 0
        assert scale == 0.75 ** (0 if name.startswith("head") else 3 - layer), name
        is_kernel = name.endswith("weight") and "norm" not in name and name != "head.0.weight"
        assert decay == (0.05 if is_kernel else 0), name
    model = energy.EnergyModel(tiny_vit(), alpha="predicted")
    not_decayed = models.parameter_groups(model.named_parameters(), 0.05)[1]["params"]
    assert model.alpha_head.weight in set(not_decayed)

@cases("head_norm,pool,loss,smoothing", [
    ("none", "cls", "ce", 0.1), ("none", "mean", "bce", 0.1), ("layer", "cls", "bce", 0.0)])
def test_classifier(head_norm, pool, loss, smoothing):
    vit = tiny_vit(pool=pool)
    model = finetune.Classifier(vit, 4, None, head_norm, loss, smoothing)
    assert model.head[-1].weight.abs().max() < 1e-4
    nn.init.normal_(model.head[-1].weight)
    images, labels = torch.randn(6, 3, 16, 16), torch.tensor([0, 1, 2, 3, 0, 1])
    feature = vit(images)                                             # energy: only the linear head is new
    if head_norm == "layer":                                          # BEiT: a new norm of the patch mean
        feature = F.layer_norm(vit.forward_tokens(images, norm=False)[:, 1:].mean(dim=1), (16,), eps=1e-6)
    logits = feature @ model.head[-1].weight.T
    assert_close(model.logits(images), logits)
    targets = F.one_hot(labels, 4) * (1 - smoothing) + smoothing / 4
    q = logits.sigmoid()
    expected = {"ce": -(targets * logits.log_softmax(dim=1)).sum(dim=1).mean(),
                "bce": -(targets * q.log() + (1 - targets) * (1 - q).log()).mean()}[loss]
    mixed = F.one_hot(labels, 4).float()
    assert_close([model(images, labels), model(images, mixed)], [expected, expected])
    model = finetune.Classifier(tiny_vit(), 4, "mlp", head_norm).train()              # a probe
    assert not model.backbone(images).requires_grad and not model.backbone.training
    assert [type(layer) for layer in model.head][1:] == [nn.Linear, nn.ReLU, nn.Linear, nn.ReLU, nn.Linear]

def test_miou_equals_a_slow_loop():
    model = finetune.Segmenter(tiny_vit(), 4, img_size=16).eval()
    model.head.bias.data[3] = -100                                    # class 4 is nowhere, and does not count
    views = data.Transformed(data.Segmentation("masked", False, 3), data.segment_transform(16, False), 0)
    counts, intersection, union = 0, np.zeros(5), np.zeros(5)
    for i in range(len(views)):
        image, mask = views[0, i]
        counts = counts + model.count(image[None], mask[None])
        prediction = model.predict(image[None])[0].argmax(dim=0) + 1
        for truth, guess in zip(mask.flatten().tolist(), prediction.flatten().tolist()):
            for c in (1, 2, 3, 4):
                intersection[c] += truth == guess == c
                union[c] += truth > 0 and c in (truth, guess)
    expected = 100 * (intersection[1:4] / union[1:4]).mean()
    assert union[4] == 0 < expected < 100
    assert model.summary(counts)["miou"] == pytest.approx(expected, abs=1e-3)
    images, masks = torch.randn(1, 3, 16, 16), torch.randint(1, 4, (1, 16, 16))
    masks[:, :8] = 0                                                  # unlabelled pixels have no loss, either
    assert_close(model(images, masks), F.cross_entropy(model.logits(images)[:, :, 8:], masks[:, 8:] - 1))


# ---------------------------------------------------------------- the scripts

@cases("file", ["README.md", ".study/PAPERS.md"])
def test_the_commands_in_the_documentation_parse(file, monkeypatch):
    text = (Path(energy.__file__).parent / file).read_text().replace("\\\n", " ")
    written = {}                                                      # output folder: its backbone's config
    monkeypatch.setattr(finetune, "read_config", lambda path: written.get(os.path.dirname(path), {}))
    for name, flags in re.findall(r"^(?:python|torchrun) .*?(\w+)\.py(.*)$", text, re.MULTILINE):
        if "--eval_only" not in flags:                                # which reads a checkpoint
            args = parse(sys.modules[name], *flags.split())
            if file != "README.md" and getattr(args, "init", None):
                assert os.path.dirname(args.init) in written          # a folder of a command above
            assert args.output_dir not in written or file == "README.md"
            method = "cim" if name == "cim_pretrain" else "energy"
            written[args.output_dir] = {"model": args.model, "img_size": args.img_size, "method": method}
    assert len(written) > (150 if "PAPERS" in file else 5)


def test_scripts_share_their_helpers():
    banner = "# -+ (?:helpers, identical in all three scripts|the loop)\n"
    parts = [re.split(banner, Path(script.__file__).read_text()) for script in (energy, cim, finetune)]
    assert [len(part) for part in parts] == [3] * 3 and parts[0][1] == parts[1][1] == parts[2][1]

@pytest.fixture(scope="module")
def bad(trained):
    """Folders that are no data sets, and files that are no weights, or those of others."""
    root = trained / "bad"
    for folder, number in (("empty", 0), ("one/train/a", 8), ("one/val/a", 8), ("black/train", 16)):
        save_images(root / folder, number)
    for folder in ("other/train", "other/val", "broken/train", "broken/val", "hollow/train", "hollow/val",
                   "val_only/val"):
        shutil.copytree("images/val", root / folder)
    for path in (root / "hollow/val/c").iterdir():
        path.unlink()
    shutil.move(root / "other/val/c", root / "other/val/d")
    for path in ("train/a/00.png", "val/b/bro\nken.png"):
        (root / "broken" / path).write_text("no image")
    shutil.copytree("masked", root / "sizes")
    for path in (root / "sizes/annotations/training").iterdir():
        Image.fromarray(np.arange(63, dtype=np.uint8).reshape(7, 9) % 4).save(path)
    torch.save([torch.zeros(1)], root / "list.pt")
    # As MAE and taming-transformers write them: with arguments, DDP's prefix, another size, a discriminator.
    torch.manual_seed(0)
    vit = models.build_backbone("vit_nano", 32, 4).state_dict() | {"mask_token": torch.ones(1, 1, 96)}
    state = {"module." + key: value for key, value in vit.items()}
    torch.save({"model": state, "args": argparse.Namespace(lr=1.0)}, root / "mae.pth")
    vqgan = models.VQGAN(24, 8, 8, 32, multipliers=(1, 2, 2), attention=(False, False, True), blocks=1)
    state = vqgan.state_dict() | {"loss.discriminator.main.0.weight": torch.ones(1)}
    torch.save({"state_dict": state, "callbacks": {}, "epoch": 1}, root / "vqgan.ckpt")
    return root

@cases("script,flags,names", [
    (energy, ["--alpha", "predicted", "--corrupt", "sort"], "sorted_0 sorted_2 energy_drop_sort"),
    (energy, ["--amp", "bf16", "--corrupt", "random_small", "--pool", "cls"], "psnr_random_small_2 alpha"),
    (energy, ["--amp", "fp16", "--energy_steps", 0], "psnr_grid_0 energy_gap_grid energy_drop_color"),
    (energy, [*RESNET, "--energy_steps", 1, "--corrupt", "sr", "--clip_grad", 0], "psnr_sr_1"),
    (energy, [*AUTO, "--corrupt", "sort", "--sort_whole"], "sorted_1"),
    (energy, [*AUTO, "--corrupt", "grid"], "psnr_grid_1"),
    (energy, AUTO, "psnr_denoise_1"),
    (cim, [*TRAIN, "--objective", "none", "--mask_ratio", 0.4, 0.4], "gen_loss gen_acc"),
    (cim, ["--generator", "mae", "--target", "patch", "--amp", "bf16"], "psnr_template psnr_output"),
    (cim, ["--generator", "erase", *RESNET, "--target", "none", "--amp", "fp16"], "psnr_output"),
    (cim, VQGAN, "gen_acc psnr_output"),
    (cim, [*TRAIN, "--objective", "revdet", "--data", "bad/black"], "accuracy precision recall"),
    (finetune, ["--init", "bad/mae.pth", *VIT, "--probe", "mlp"], "top1 top5 val_loss best_top1"),
    (finetune, [*SEGMENT, *RESNET], "miou pixel_acc")])
def test_run(script, flags, names, bad, tmp_path):
    run_here(script, *flags, "--max_steps", 2, "--output_dir", tmp_path)
    last = read_log(tmp_path)[-1]
    assert {*names.split(), "loss", "lr", "img_per_s", "peak_mem_mb"} <= last.keys()
    assert np.isfinite(list(last.values())).all()
    assert "top1" in names or (tmp_path / "samples/step_000002.png").exists()
    config = finetune.read_config(tmp_path / "backbone.pt")
    assert config["objective"] in [*flags, "mix", "respix", "classify"] and "method" in config
    backbone = models.load_backbone(tmp_path / "backbone.pt")
    images = data.center_transform(16)(data.read_rgb("images/val/a/00.png"))[None]
    pooled = backbone.forward_map(images).mean(dim=(2, 3))
    assert_close(backbone(images), backbone.forward_tokens(images)[:, 0] if "cls" in flags else pooled)
    trained = {key.removeprefix("backbone."): value for key, value in weights(tmp_path).items()
               if key.startswith("backbone.")}
    assert different(backbone.state_dict(), trained) == []
    if "--probe" in flags:                                            # which leaves the file of MAE as it is
        state = torch.load("bad/mae.pth", weights_only=False)["model"]
        assert all(trained[key].equal(state["module." + key]) for key in trained.keys() - {"pos_embed"})

def test_what_was_trained(trained, tmp_path, monkeypatch):
    log = [(line["step"], line["epoch"], "energy_drop_color" in line) for line in read_log("energy")]
    assert log == [(1, 0.33333, False), (3, 1, True), (6, 2, True)]
    assert sorted(os.listdir("energy/samples")) == ["step_000003.png", "step_000006.png"]
    assert json.loads(Path("energy/args.json").read_text())["energy_steps"] == 2
    assert "pos_embed" in different(weights("energy", "backbone.pt"), weights("classify", "backbone.pt"))
    run_here(energy, "--corrupt", "color", "--epochs", 2, "--accum_steps", 4, "--output_dir", tmp_path)
    assert_close(weights(tmp_path), weights("energy"), rtol=1e-3, atol=2e-4)   # gray is not random
    for script, flags in ((energy, []), (cim, ["--generator", "erase"]), (finetune, VIT)):
        monkeypatch.setattr(script, "evaluate", lambda *args: 1 / 0)  # the checkpoint is written before
        with pytest.raises(ZeroDivisionError):
            run_here(script, *flags, "--max_steps", 1, "--output_dir", tmp_path / script.__name__)
        assert torch.load(tmp_path / script.__name__ / "checkpoint.pt", weights_only=True)["step"] == 1

def contents(folder):
    return {str(path): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}

@cases("script,folder,flags,number,key,picture", [
    (energy, "energy", [], 32, "psnr_color_2", ["energy/eval_color.png"]),
    (energy, "energy", ["--corrupt", "sr", "--energy_steps", 3], 32, "psnr_sr_3", ["energy/eval_sr.png"]),
    (cim, "cim", [], 32, "auc", ["cim/eval.png"]), (finetune, "classify", [], 37, "top5", []),
    (finetune, "classify", ["--data", "bad/val_only"], 37, "top5", []),
    (finetune, "segment", ["--data", "masked"], 5, "miou", [])])
def test_evaluation_repeats_the_log_and_changes_nothing(script, folder, flags, number, key, picture, bad):
    files = contents(folder)
    out = run_here(script, "--eval_only", "--output_dir", folder, *flags)
    measured = json.loads(next(line for line in out.splitlines() if line.startswith("{")))
    assert (measured.pop("images"), key in measured) == (number, True)
    new = contents(folder)
    assert [path for path in new if new[path] != files.get(path)] == picture and files.keys() <= new.keys()
    for path in picture:
        os.remove(path)
    if "--corrupt" not in flags:
        assert measured == {key: pytest.approx(read_log(folder)[-1][key], rel=1e-4) for key in measured}

def test_tokenizer_and_frozen_generator_of_another_run(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(cim, "train_dvae", None)
    flags = [*TRAIN, "--max_steps", 2, "--output_dir", tmp_path]
    run_here(cim, *flags, "--freeze_generator", "cim/checkpoint.pt")
    changed = different(weights("cim"), weights(tmp_path))
    assert changed and not [key for key in changed if key.startswith("generator.")]
    assert different(weights("cim", "dvae.pt"), weights(tmp_path, "dvae.pt")) == []        # of its tokens
    shutil.copy("cim/checkpoint.pt", tmp_path / "moved.pt")
    run_here(cim, *flags, "--freeze_generator", tmp_path / "moved.pt", "--tokenizer_dir", "cim",
             "--output_dir", tmp_path / "new")

@cases("script,flags,trained_parts", [
    (energy, ["--corrupt", "denoise"], {"backbone", "head", "log_alpha"}),
    (cim, [*TRAIN, *RESNET, "--objective", "revdet", "--epochs", 3], {"backbone", "generator", "head"}),
    (finetune, [*RESNET, "--img_size", 16, "--epochs", 300, "--drop_path", 0.2], {"backbone", "head"}),
    (finetune, [*RESNET, "--img_size", 16, "--probe", "linear"], {"head"}),            # a frozen BatchNorm
    (finetune, [*SEGMENT, *RESNET], {"backbone", "head"})])
def test_stopped_and_resumed_runs_are_bit_identical(script, flags, trained_parts, tmp_path, monkeypatch):
    """Stopped in the second epoch, or after it (the masked images have one step an epoch)."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_here(script, *flags, "--max_steps", 6, "--output_dir", whole)
    asked, original = count(1), data.stop_requested
    monkeypatch.setattr(data, "stop_requested", lambda: (
        os.kill(os.getpid(), signal.SIGTERM) if next(asked) == 4 else None, original())[1])
    assert_stops(script, [*flags, "--max_steps", 6, "--output_dir", parts], "stopped after step 4; --resume")
    checkpoint = torch.load(parts / "checkpoint.pt", weights_only=True)
    for group in checkpoint["optimizer"]["param_groups"]:             # only moments have an influence
        group |= {"maximize": True, "weight_decay": 9.0}
    torch.save(checkpoint, parts / "checkpoint.pt")
    with open(parts / "log.jsonl", "a") as file:                      # as if later steps were logged and lost
        file.write('{"step": 5, "loss": 1}\n{"step": 6, "lo')
    run_here(script, *flags, "--max_steps", 6, "--resume", "--output_dir", parts)
    assert different(weights(whole), weights(parts)) == []
    assert {key.split(".")[0] for key in different(checkpoint["model"], weights(parts))} == trained_parts
    changing = {"img_per_s": 0, "loss": 0, "peak_mem_mb": 0}
    assert read_log(whole)[-1] | changing == read_log(parts)[-1] | changing
    steps = [line["step"] for line in read_log(parts)]
    assert steps == sorted(set(steps))

@slow
@cases("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_killed_and_resumed_is_bit_identical(number, tmp_path):
    flags = ["--num_workers", 2, "--epochs", 10, "--output_dir"]
    run_here(energy, *flags, tmp_path / "whole")
    process = subprocess.Popen(command(energy, *flags, tmp_path / "killed"), stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not os.path.exists(tmp_path / "killed/checkpoint.pt"):
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(np.random.default_rng().uniform(0, 0.3))               # a random moment of a later epoch
    send = os.kill if number == signal.SIGTERM else os.killpg         # a terminal's Ctrl-C reaches workers
    send(process.pid, number)
    assert ("; --resume" in process.communicate()[1]) == (number != signal.SIGKILL)
    assert torch.load(tmp_path / "killed/checkpoint.pt", weights_only=True)["step"] < 30
    run_here(energy, *flags, tmp_path / "killed", "--resume")
    assert different(weights(tmp_path / "whole"), weights(tmp_path / "killed")) == []

@slow
@cases("script,flags", [(energy, ["--corrupt", "sort"]), (energy, [*AUTO, "--corrupt", "grid"]),
                        (energy, [*AUTO, "--corrupt", "sort"]), (cim, [*VQGAN, "--sampling", "argmax"])])
def test_compiled_runs_equal_eager_ones(script, flags, bad, tmp_path):
    for name, compiled in (("eager", []), ("compiled", ["--compile"])):
        run_here(script, *flags, *compiled, "--max_steps", 2, "--output_dir", tmp_path / name)
    assert_close(weights(tmp_path / "compiled"), weights(tmp_path / "eager"), rtol=1e-3, atol=2e-4)

# With all patches masked and no sampling, nothing is random.
FULL_MASKS = [*TRAIN, "--tokenizer_dir", "cim", "--mask_ratio", 0.99, 0.99, "--sampling", "argmax"]

@slow
@cases("script,flags,more", [
    (energy, ["--corrupt", "color"], []), (energy, ["--corrupt", "color"], ["--compile"]),
    (cim, FULL_MASKS, []), (cim, FULL_MASKS, ["--compile"]),
    (finetune, [*VIT, "--drop_path", 0, "--mixup", 0, "--cutmix", 0, "--accum_steps", 2], ["--compile"])])
def test_two_processes_train_as_one(script, flags, more, trained, tmp_path):
    flags = [*flags, "--epochs", 2, "--output_dir"]
    result = run(script, *flags, tmp_path / "two", *more)
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "two/args.json").read_text())["processes"] == 2
    run_here(script, *flags, tmp_path / "one")
    assert_close(weights(tmp_path / "two"), weights(tmp_path / "one"), rtol=1e-3, atol=2e-4)

@slow
@cases("name,folder,processes", [("classify", "images", 2), ("segment", "masked", 3)])
def test_processes_measure_the_same_to_the_last_digit(processes, name, folder, trained, tmp_path):
    flags = ["--eval_only", "--init", f"{name}/checkpoint.pt", "--data", folder]
    assert run(finetune, *flags, processes=processes).stdout == run_here(finetune, *flags)
    flags = [*VIT, "--head_norm", "batch", "--batch_size", 2]         # and end in the same sentence
    result = run(finetune, *flags, "--output_dir", tmp_path, processes=2)
    sentence, = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert "--batch_size 2" in sentence


# ---------------------------------------------------------------- one sentence for what the user can mend

INIT = ["--init", "energy/backbone.pt"]
DONE = ["--init", "classify/checkpoint.pt", "--eval_only"]

@cases("script,flags,words", [
    (energy, ["--lr", "nan"], "--lr nan between"),
    (energy, ["--img_size", 18], "--img_size 18 multiple --patch_size 4"),
    (energy, ["--batch_size", 64], "multiple 1 --accum_steps 24 training images --batch_size 64"),
    (energy, ["--data", "bad/empty"], "no image files train bad/empty"),
    (energy, [*AUTO, "--energy_steps", 1], "--energy_steps --method"),
    (energy, ["--data", "bad/broken"], "bro ken.png"),
    (energy, ["--lr", 1e8, "--clip_grad", 0], "loss not finite step --lr"),
    (cim, ["--mask_ratio", 0.6, 0.4], "--mask_ratio lower first"),
    (cim, ["--tokenizer", "dalle"], "encoder.pkl no network by hand"),
    (cim, [*TRAIN, "--freeze_generator", "cim/checkpoint.pt", "--gen_depth", 2], "--gen_depth 4 2"),
    (finetune, ["--init", "bad/list.pt", *VIT], "--init list.pt"),
    (finetune, [*INIT, "--eval_only"], "--eval_only checkpoint.pt finetune.py"),
    (finetune, [*DONE, "--img_size", 64], "--eval_only --img_size 16"),
    (finetune, [*DONE, "--data", "shapes"], "classes checkpoint missing: a, b, c; many: plain"),
    (finetune, [*VIT, "--head_norm", "batch", "--batch_size", 1], "vit_nano --batch_size 1"),
    (finetune, ["--data", "bad/other"], "classes training images missing: c; many: d"),
    (finetune, ["--data", "bad/one"], "bad/one/train has 1 class folders two"),
    (finetune, ["--data", "bad/hollow"], "bad/hollow/val/c no image files"),
    (finetune, [*SEGMENT, *VIT, "--num_classes", 2], "label 3 --num_classes 2"),
    (finetune, [*SEGMENT, *VIT, "--data", "nowhere"], "nowhere/images/ no image files"),
    (finetune, [*SEGMENT, *VIT, "--data", "bad/sizes", "--num_workers", 1], ".png (7, 9)")])
def test_bad_input_is_one_sentence(script, flags, words, bad, tmp_path, monkeypatch):
    at_exit = []
    monkeypatch.setattr("torch.hub.urlopen", lambda request: os.listdir("no network"))
    monkeypatch.setattr("atexit.register", lambda *call: at_exit.append(call))
    assert_stops(script, ["--epochs", 1, "--output_dir", tmp_path / "out", *flags], words)
    for function, *args in at_exit:                                   # a start that fails leaves no folder
        function(*args)
    assert os.listdir(tmp_path) in ([], ["out"]) and not (tmp_path / "out/checkpoint.pt").exists()
    left = os.listdir(tmp_path / "out") if (tmp_path / "out").exists() else ["args.json"]
    assert {"args.json", "dvae.pt"} & {*left}

def test_check_data_names_all_bad_files(bad, capsys):
    args = argparse.Namespace(check_data=True, num_workers=0, data="bad/broken")
    sets = [data.unlabelled_dataset("bad/broken", train, 16) for train in (True, False)]
    refuses(data.BadInput, "2 images of --data bad/broken", data.check_data, args, *sets)
    assert re.search("a/00.png.*\n.*bro ken.png.*\n75 images were opened", capsys.readouterr().out)

def moments(name, value):
    return lambda checkpoint: checkpoint["optimizer"]["state"][0].update({name: value})

@cases("flags,change,words", [
    ([], len, "earlier run --resume"),
    (["--resume", "--corrupt", "sort", "--energy_steps", 1, "--seed", 1, "--batch_size", 16], len,
     "--corrupt color --energy_steps 2 --seed 0 --batch_size 8"),
    (["--resume"], lambda checkpoint: checkpoint.update(args=[1]), "AttributeError"),
    (["--resume"], lambda checkpoint: checkpoint.update(script="finetune"), "finetune.py"),
    (["--resume"], lambda checkpoint: checkpoint["model"]["head.weight"].fill_(math.nan), "NaN head.weight"),
    (["--resume"], moments("exp_avg", torch.tensor(0.0)), "size mismatch exp_avg"),
    (["--resume"], moments("exp_avg", HUGE[:96 * 48].view(96, 3, 4, 4)), "exp_avg larger file"),
    (["--resume"], moments("exp_avg_sq", torch.full((96, 3, 4, 4), math.inf)), "infinite exp_avg_sq"),
    (["--resume"], moments("max_exp_avg_sq", 0), "state max_exp_avg_sq")])
def test_checkpoints_that_do_not_fit(flags, change, words, trained, tmp_path):
    shutil.copytree("energy", tmp_path / "run")
    checkpoint = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, tmp_path / "run/checkpoint.pt")
    flags = ["--corrupt", "color", "--output_dir", tmp_path / "run", *flags]
    assert "--lr" not in assert_stops(energy, flags, words)
    assert read_log(tmp_path / "run") == read_log("energy")

@cases("error,words", [
    (OSError(28, "No space left", "log.jsonl"), "error: [Errno 28] No space left: 'log.jsonl'"),
    (OSError(), "error: OSError"), (OSError("a\nb"), "error: a b"), (KeyboardInterrupt(), "--resume"),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), "lower --num_workers"),
    (RuntimeError("It is possible that workers are out of shared memory."), "--shm-size"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "raise --accum_steps"),
    (torch.OutOfMemoryError("CUDA out of memory."), "GPU"), (OSError(24, "Too many open files"), "ulimit"),
    (RuntimeError("a mistake of ours"), None)])
def test_errors_end_in_a_sentence(error, words):
    def main():
        raise error

    words, kind = (words, SystemExit) if words else ("a mistake of ours", RuntimeError)
    with pytest.raises(kind, match=re.escape(words)) as stop:
        data.run(main)
    assert "\n" not in str(stop.value)

def test_a_folder_has_one_run(tmp_path, monkeypatch, capsys):
    args = argparse.Namespace(data="shapes", model="vit_s", output_dir=str(tmp_path), resume=False)
    code = "import fcntl, sys; x = open('.lock', 'w'); fcntl.lockf(x, 2); print(flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stdin=-1, stdout=-1) as other:
        other.stdout.readline()
        refuses(data.BadInput, "another run is using it", data.open_output, args)
        other.communicate()
    assert data.open_output(args) is False
    assert "without locks" not in capsys.readouterr().out
    def no_locks(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.lockf", no_locks)
    assert data.open_output(args) is False
    assert "without locks" in capsys.readouterr().out

def test_processes_that_differ_end_in_a_sentence(monkeypatch):
    first = {"--lr": 2, "--seed": 0, "the number of images": 3}
    monkeypatch.setattr(data, "together", lambda call, *args, share=False: first if share else call(*args))
    data.require_equal(argparse.Namespace(lr=2, seed=0, num_workers=9), range(3))
    for lr, length, difference in ((1, 3, "--lr"), (2, 4, "the number of images")):
        words = f"the processes differ in {difference}: "
        refuses(data.BadInput, words, data.require_equal, argparse.Namespace(lr=lr, seed=0), range(length))


# ---------------------------------------------------------------- a device that is not the CPU

class Elsewhere(torch.Tensor):
    """A CPU tensor that says it is on the device "sim"."""
    __torch_dispatch__ = classmethod(lambda *args: NotImplemented)    # Simulator computes

    def __new__(cls, inner):
        tensor = torch.Tensor._make_wrapper_subclass(cls, inner.shape, inner.stride(), inner.storage_offset(),
                                                     dtype=inner.dtype, device="sim:0")
        tensor.inner = inner
        return tensor

class Simulator(TorchDispatchMode):
    """Computes on the CPU; as on a GPU, only copies and CPU numbers may meet the other device's tensors."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        leaves = tree_leaves((args, kwargs))
        ours = [leaf for leaf in leaves if isinstance(leaf, Elsewhere)]
        others = [x for x in leaves if torch.is_tensor(x) and x.ndim and not isinstance(x, Elsewhere)]
        copies = func.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_)
        assert copies or not (ours and others), f"{func} mixes devices: {[x.shape for x in others]} on a CPU"
        device = (kwargs or {}).get("device") or (ours[0].device if ours else torch.device("cpu"))
        inner = tree_map_only(Elsewhere, lambda x: x.inner, (args, kwargs or {}))
        out = func(*inner[0], **tree_map_only(torch.device, lambda _: torch.device("cpu"), inner[1]))
        out = tree_map_only(torch.Tensor, Elsewhere, out) if device.type == "sim" else out
        return return_and_correct_aliasing(func, args, kwargs or {}, out) if ours else out

@pytest.mark.skipif(not hasattr(torch, "sim"), reason="needs a newer PyTorch")
@cases("script, flags", [
    (energy, []), (energy, ["--corrupt", "sort"]), (energy, [*AUTO, "--corrupt", "grid"]), (cim, TRAIN),
    (cim, [*TRAIN, "--objective", "revdet", "--masking", "block"]), (finetune, [*VIT, "--recipe", "cim"]),
    (finetune, SEGMENT)])
def test_nothing_mixes_devices(script, flags, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "Generator", lambda device="cpu", new=torch.Generator: new())
    with Simulator():
        run_here(script, *flags, "--model", "vit_nano", "--patch_size", 4, "--max_steps", 1,
                 "--device", "sim", "--output_dir", tmp_path)

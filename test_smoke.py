"""The tests. They need no network, no GPU and no files but this folder's.

    python -m pytest -q             # what takes less than a minute on two CPU cores
    SLOW=1 python -m pytest -q      # and what compiles, starts several processes or kills one

All run in one temporary folder, where the scripts' flags may name images, masked, and with the fixture
`trained` the results of a run of each script: energy, cim, classify, segment.
"""
import argparse
import contextlib
import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import types
from collections import OrderedDict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import cim_pretrain
import data
import energy_pretrain
import finetune
import models

SLOW = bool(os.environ.get("SLOW"))
slow = pytest.mark.skipif(not SLOW, reason="SLOW=1 runs it")
HERE = os.path.dirname(os.path.abspath(__file__))
SIZE = ["--img_size", 16, "--patch_size", 4]
VIT = ["--model", "vit_nano", *SIZE]
RESNET = ["--model", "resnet_nano"]
SEGMENT = ["--data", "masked", "--task", "segment", "--num_classes", 3]
COMMON = ["--data", "images", "--batch_size", 8, "--lr", 1e-3, "--num_workers", 0, "--device", "cpu"]
FLAGS = {energy_pretrain: [*COMMON, *VIT], finetune: COMMON,
         cim_pretrain: [*COMMON, *VIT, "--tokenizer_steps", 3]}
TRAIN = ["--tokenizer", "train"]


def save_images(folder, count, suffix=".png"):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.new("RGB", (20, 16), (i, 100, 200)).save(folder / f"{i:03d}{suffix}")


@pytest.fixture(scope="module", autouse=True)
def root(tmp_path_factory):
    """The folder in which all tests run, with two small data sets."""
    root = tmp_path_factory.mktemp("root")
    # Three classes: 24 images to train on, and 37 held out, which neither 2 nor 3 processes divide.
    for split, length in (("train", 24), ("val", 37)):
        shapes = data.Shapes(split == "train", 20)
        for i in range(length):
            (root / "images" / split / "abc"[i % 3]).mkdir(parents=True, exist_ok=True)
            image = shapes[10 * i + i % 3][0].convert({0: "L", 1: "P", 2: "RGBA"}.get(i, "RGB"))
            image.save(root / "images" / split / "abc"[i % 3] / f"{i:02d}.png")
    # Images of different sizes with masks of their gray levels, 0 = unlabelled to 3, in ADE20K's layout.
    for split, length in (("training", 8), ("validation", 5)):
        for folder in ("images", "annotations"):
            (root / "masked" / folder / split).mkdir(parents=True)
        for i in range(length):
            image = data.Shapes(True, 40)[i][0].crop((0, 0, 40, 20 + i))
            image.save(root / "masked/images" / split / f"{i}.png")
            mask = np.array(image.convert("L")) // 64
            mask[:3] = 0
            Image.fromarray(mask).save(root / "masked/annotations" / split / f"{i}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        yield root


def run(script, *flags, processes=1, check=True):
    """Runs a script as a user does. -> CompletedProcess"""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command += [os.path.join(HERE, f"{script.__name__}.py"), *map(str, [*FLAGS[script], *flags])]
    result = subprocess.run(command, capture_output=True, text=True)
    assert not check or result.returncode == 0, result.stderr
    return result


def run_here(script, *flags):
    """Runs a script in this process, which is faster. -> what it printed"""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        patch.setattr(sys, "argv", [script.__name__, *map(str, [*FLAGS[script], *flags])])
        script.run(script.main)
    return out.getvalue()


def stops_with(script, *flags):
    """-> the one sentence with which the script ends."""
    with pytest.raises(SystemExit) as stop:
        run_here(script, *flags)
    assert isinstance(stop.value.code, str)
    assert "\n" not in stop.value.code
    return stop.value.code


def parse(script, *flags):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script.__name__, *map(str, flags)])
        return script.parse_args()


def read_log(output_dir):
    with open(os.path.join(output_dir, "log.jsonl")) as file:
        return [json.loads(line) for line in file]


def weights(output_dir, name="checkpoint.pt"):
    return torch.load(os.path.join(output_dir, name), weights_only=True)["model"]


def different(first, second):
    """Names of the tensors that differ in two state dicts with the same names."""
    assert first.keys() == second.keys()
    return [name for name in first if not torch.equal(first[name], second[name])]


def tiny_vit(**options):
    return models.ViT(dim=16, depth=2, heads=2, img_size=16, patch_size=4, **options)


@pytest.fixture(scope="module")
def trained(root):
    """A finished run of each script, in folders of these names: energy, cim, classify, segment."""
    run_here(energy_pretrain, "--corrupt", "color", "--epochs", 2, "--output_dir", "energy")
    run_here(cim_pretrain, *TRAIN, "--objective", "revdet", "--masking", "block", "--share", 0,
             "--accum_steps", 2, "--max_steps", 2, "--output_dir", "cim")
    start = ["--init", "energy/backbone.pt", "--epochs", 2]
    run_here(finetune, *start, "--output_dir", "classify")
    run_here(finetune, *start, *SEGMENT, "--img_size", 16, "--output_dir", "segment")
    return root


# ---------------------------------------------------------------- data: files

def test_shapes_are_deterministic_and_held_out():
    train, again, val = data.Shapes(True, 32), data.Shapes(True, 32), data.Shapes(False, 32)
    assert np.array_equal(train[7][0], again[7][0])
    assert not np.array_equal(train[7][0], val[7][0])
    assert train[7][1] == train.targets[7] == 7


def test_unlabelled_folders_hold_images_out(tmp_path):
    save_images(tmp_path / "train", 40)
    train, val = (data.unlabelled_dataset(str(tmp_path), train, 16).paths for train in (True, False))
    assert [len(train), len(val)] == [36, 4]
    assert not set(train) & set(val)
    save_images(tmp_path / "val", 3)
    train, val = (data.unlabelled_dataset(str(tmp_path), train, 16) for train in (True, False))
    assert (len(train), len(val), val[0][1]) == (40, 3, -1)
    assert data.fixed_images(train, 8, count=5).shape == (5, 3, 8, 8)


def test_links_do_not_multiply_images(tmp_path):
    save_images(tmp_path / "train/a", 2)
    save_images(tmp_path / "train/b", 3)
    shutil.copytree(tmp_path / "train", tmp_path / "val")
    (tmp_path / "train/stray.png").touch()
    for link, folder in (("above", tmp_path / "train"), ("link_1", "../../val"), ("link_2", "../../val")):
        (tmp_path / "train/a" / link).symlink_to(folder)
    images = data.labelled_dataset(str(tmp_path), True, 16)
    assert images.classes == ["a", "b"]
    assert images.targets == [images[i][1] for i in range(10)] == 7 * [0] + 3 * [1]
    assert [os.path.relpath(path, tmp_path) for path in images.paths[:3]] == [
        "train/a/000.png", "train/a/001.png", "train/a/link_1/a/000.png"]


WHITE = Image.new("RGB", (3, 1), "white")
TURN = Image.Exif()
TURN[0x0112] = 6                                                      # "turn by 90 degrees"


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize("name,image,options,expected", [
    ("x.png", Image.fromarray(np.uint16([[0, 25700, 65535]])), {}, [0, 100, 255]),
    ("x.tif", Image.fromarray(np.array([[0, 25700, 65535]], ">u2")), {}, [0, 100, 255]),
    ("x.tif", Image.fromarray(np.int32([[0, 25700, 65535]])), {}, [0, 100, 255]),
    ("x.tif", Image.fromarray(np.float32([[0, 0.4, 1]])), {}, [0, 102, 255]),
    ("x.tif", Image.fromarray(np.float32([[0, 102, 255]])), {}, [0, 102, 255]),
    ("x.png", WHITE.convert("1"), {}, [255] * 3),
    ("x.png", WHITE.convert("LA"), {}, [255] * 3),
    ("x.png", WHITE.convert("P"), {"transparency": bytes(range(256))}, [255] * 3),
    ("x.jpg", WHITE.convert("CMYK"), {}, [255] * 3),
    ("x.png", Image.fromarray(np.uint8([[0], [100], [255]])), {"exif": TURN}, [255, 100, 0])])
def test_images_become_rgb(name, image, options, expected, tmp_path):
    image.save(tmp_path / name, **options)
    assert np.array(data.read_rgb(tmp_path / name))[0].tolist() == [[value] * 3 for value in expected]


@pytest.mark.parametrize("problem", ["eps", "truncated", "fifo", "missing"])
def test_hostile_images_end_in_a_sentence(problem, tmp_path, monkeypatch):
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *args: pytest.fail("started Ghostscript"))
    path = tmp_path / "x.jpg"
    if problem == "eps":
        Image.new("RGB", (20, 20)).save(path, format="EPS")
    elif problem == "truncated":
        Image.effect_noise((200, 200), 50).save(path)
        path.write_bytes(path.read_bytes()[:3000])
    elif problem == "fifo":
        os.mkfifo(path)
    with pytest.raises(data.BadInput, match="the image .*x.jpg .*: re") as error:
        data.read_rgb(path)
    assert "\n" not in str(error.value)


def test_masks_keep_their_indices(tmp_path):
    save_images(tmp_path / "images/training", 1)
    (tmp_path / "annotations/training").mkdir(parents=True)
    indices = np.arange(320, dtype=np.uint8).reshape(16, 20) % 4
    palette = Image.fromarray(indices)
    palette.putpalette([9, 9, 9, 0, 0, 0, 255, 0, 0, 0, 255, 0])
    palette.save(tmp_path / "annotations/training/000.png")
    dataset = data.Segmentation(tmp_path, True, num_classes=3)
    image, mask = data.Transformed(dataset, data.segment_transform(16, False), 0)[0, 0]
    assert image.shape == (3, 16, 20)
    assert np.array_equal(mask, indices)
    image, mask = data.Transformed(dataset, data.segment_transform(12, True), 0)[0, 0]
    assert image.shape[1:] == mask.shape == (12, 12)
    assert (image.dtype, mask.dtype) == (torch.float32, torch.int64)
    Image.new("F", (20, 16)).save(dataset.masks[0], format="TIFF")
    with pytest.raises(data.BadInput, match="it must be PNG"):
        dataset[0]


# ---------------------------------------------------------------- data: order and crops

def test_few_labels():
    targets = [0] * 200 + [1] * 100 + [2] * 3
    few = data.few_labels(targets, 0.1, seed=1)
    assert np.bincount(np.array(targets)[few]).tolist() == [20, 10, 1]
    assert few == sorted(set(few))
    assert few == data.few_labels(targets, 0.1, seed=1)
    assert few != data.few_labels(targets, 0.1, seed=2)


def epoch_keys(sampler, world, skip=0, **options):
    """The keys of epoch 2 in each process."""
    keys = []
    for rank in range(world):
        keys_of_rank = sampler(range(60), world, rank, seed=3, drop_last=True, **options)
        keys_of_rank.set_epoch(2, skip)
        keys.append(list(keys_of_rank))
    return keys


@pytest.mark.parametrize("sampler,options", [(data.EpochSampler, {}),
                                             (data.RepeatingSampler, {"batch_size": 30})])
def test_order_does_not_depend_on_processes(sampler, options):
    keys = epoch_keys(sampler, 1, **options)[0]
    assert keys == [key for step in zip(*epoch_keys(sampler, 3, **options)) for key in step]
    assert epoch_keys(sampler, 1, skip=8, **options)[0] == keys[8:]
    assert len(set(keys)) == len(keys) == 60


@pytest.mark.parametrize("world,accum_steps", [(1, 1), (1, 4), (2, 1), (2, 4)])
@pytest.mark.parametrize("batch_size", [24, 32, 40])
def test_repeated_images_are_never_neighbours(batch_size, world, accum_steps):
    keys = epoch_keys(data.RepeatingSampler, 1, batch_size=batch_size)[0][:batch_size]
    assert len({index for _, index in keys}) == -(-batch_size // 3)
    for keys in epoch_keys(data.RepeatingSampler, world, batch_size=batch_size):
        indices = torch.tensor([index for _, index in keys[:batch_size // world]])
        assert len(set(keys)) == len(keys)                            # copies are different crops
        assert all((part != part.roll(1)).all() for part in indices.chunk(accum_steps))


def test_randaugment_strength():
    steps = data.finetune_transform(224, 9, 0.25).transforms
    randaug = next(step for step in steps if hasattr(step, "magnitude"))
    angles = randaug._AUGMENTATION_SPACE["Rotate"][0](randaug.num_magnitude_bins, 224, 224)
    assert angles[randaug.magnitude] == pytest.approx(27)             # 9 of 10, and 10 is 30 degrees


# ---------------------------------------------------------------- data: corruptions

NOISE = data.normalize(torch.rand(100, 3, 32, 32, generator=torch.Generator().manual_seed(0)))


def test_mask_grid():
    mask = data.grid_mask(NOISE, torch.Generator(), cell=4, ratio=0.75)
    assert (mask.sum(dim=(1, 2, 3)) == 48 * 16).all()                 # 48 of 64 cells, in every image
    assert torch.equal(mask, mask[:, :, ::4, ::4].repeat_interleave(4, 2).repeat_interleave(4, 3))
    assert mask.float().mean(dim=0).sub(0.75).abs().max() < 0.2       # every cell as often as the others
    assert torch.equal(data.mask_grid(NOISE, torch.Generator(), cell=4, ratio=0.75), NOISE * ~mask)


@pytest.mark.parametrize("count,area,covered", [(75, (0.01, 0.025), 0.68), (25, (0.02, 0.05), 0.54)])
def test_mask_random(count, area, covered):
    images = torch.ones(64, 3, 64, 64)
    one = (data.mask_random(images, torch.Generator(), 1, area) == 0)[:, 0].float()
    height, width = one.amax(dim=2).sum(dim=1), one.amax(dim=1).sum(dim=1)
    torch.testing.assert_close(one.sum(dim=(1, 2)), height * width)   # one full rectangle
    assert one.mean().item() == pytest.approx(sum(area) / 2, rel=0.1)
    assert 0.4 < (height / width).min() < (height / width).max() < 2.5
    many = data.mask_random(images, torch.Generator(), count, area) == 0
    assert many.float().mean().item() == pytest.approx(covered, abs=0.03)


def test_low_resolution_gray_and_normalize():
    out = data.low_resolution(NOISE, None, scale=8)
    assert torch.equal(out, out[:, :, ::8, ::8].repeat_interleave(8, 2).repeat_interleave(8, 3))
    torch.testing.assert_close(out.mean(dim=(2, 3)), NOISE.mean(dim=(2, 3)), atol=0.05, rtol=0)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (data.MEAN, data.STD))
    images = NOISE * std + mean                                # in [0, 1]
    torch.testing.assert_close(data.denormalize(NOISE), images)
    torch.testing.assert_close(data.normalize(images), NOISE)
    assert data.denormalize(torch.full((1, 3, 1, 1), 9.0)).max() == 1
    r, g, b = images.unbind(dim=1)
    for channel in data.denormalize(data.gray(NOISE, None)).unbind(dim=1):
        torch.testing.assert_close(channel, 0.299 * r + 0.587 * g + 0.114 * b)


def test_noise_and_mix_are_uniform():
    variance = data.noise(torch.zeros(1000, 3, 8, 8), torch.Generator().manual_seed(1)).var(dim=(1, 2, 3))
    quantiles = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9])
    torch.testing.assert_close(variance.quantile(quantiles), quantiles, atol=0.05, rtol=0)
    root_gamma = data.noise(torch.ones(1000, 3, 8, 8), torch.Generator().manual_seed(1)).mean(dim=(1, 2, 3))
    torch.testing.assert_close(root_gamma.square() + variance, torch.ones(1000), atol=0.45, rtol=0)
    kinds = [lambda images, generator, k=k: torch.full_like(images, k) for k in range(4)]
    out = data.mix(torch.zeros(4000, 3, 2, 2), torch.Generator(), kinds)
    assert (out == out[:, :1, :1, :1]).all()                          # one corruption for the whole image
    assert (out[:, 0, 0, 0].int().bincount(minlength=4) - 1000).abs().max() < 100


@pytest.mark.parametrize("patch_size,blanked", [(16, {60, 112}), (4, {12})])
def test_blank_patch_edges(patch_size, blanked):
    mask = data.blank_patch_edges(torch.ones(40, 3, 32, 32), torch.Generator(), patch_size)[:, :1] == 0
    patches = F.unfold(mask.float(), patch_size, stride=patch_size)   # (B, p*p, N)
    counts = patches.sum(dim=1)
    assert set(counts.flatten().tolist()) == blanked                  # p^2 - (p-2k)^2 pixels for k = 1, 2
    assert patches[0, :, 0].view(patch_size, patch_size)[0].all()
    assert (counts == min(blanked)).float().mean().item() == pytest.approx(1 / len(blanked), abs=0.12)


def test_masks_of_patches():
    fraction = (100 / 196, 120 / 196)
    random = data.random_mask(500, torch.Generator(), 14, fraction)
    assert set(random.sum(dim=1).tolist()) == set(range(100, 121))
    assert (random.float().mean(dim=0) - 110 / 196).abs().max() < 0.1
    block = data.block_mask(100, torch.Generator(), 14, fraction)
    assert block.sum(dim=1).max() <= 120
    assert block.sum(dim=1).float().mean() > 90
    equal_below = [(mask.view(-1, 14, 14).int().diff(dim=1) == 0).float().mean() for mask in (block, random)]
    assert equal_below[0] > 0.75
    assert equal_below[1] < 0.55


# ---------------------------------------------------------------- models: backbones

@pytest.mark.parametrize("dilated", [False, True])
def test_resnet_is_torchvisions(dilated):
    ours = models.build_model("resnet50", norm="batch", dilated=dilated)
    with torch.device("meta"):                                        # the weights come from ours
        theirs = torchvision.models.resnet50(replace_stride_with_dilation=[False, dilated, dilated])
    keys = theirs.load_state_dict(ours.state_dict(), strict=False, assign=True)
    assert keys.missing_keys == ["fc.weight", "fc.bias"]
    assert not keys.unexpected_keys
    theirs.fc = nn.Identity()
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(ours(images), theirs(images))          # in training mode: batch statistics too
    assert ours.forward_map(images).shape == (2, 2048, 64 // ours.stride, 64 // ours.stride)


@pytest.mark.parametrize("name,blocks,theirs,head", [
    ("vit_nano", 4, None, None), ("resnet_nano", 4, None, None), ("swin_t", 12, "swin_t", "head"),
    ("convnext_t", 18, "convnext_tiny", "classifier.2")])
def test_backbone_interface(name, blocks, theirs, head):
    model = models.build_model(name, img_size=64, norm="group", drop_rate=0.3).eval()
    images = torch.randn(2, 3, 64, 64)
    feature = model(images)
    assert feature.shape == (2, model.width)
    feature_map = model.forward_map(images)
    assert feature_map.shape == (2, model.width, 64 // model.stride, 64 // model.stride)
    feature_map.square().sum().backward()                             # DDP waits for every gradient
    assert [key for key, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    paths = [path for module in model.modules() for path in
             (getattr(module, "drop_path", None), getattr(module, "stochastic_depth", None)) if path]
    rates = [getattr(path, "p", 0) for path in paths]
    assert rates == pytest.approx(np.linspace(0, 0.3, blocks).tolist())
    if theirs:
        with torch.device("meta"):                                    # the weights come from ours
            theirs = getattr(torchvision.models, theirs)().eval()
        theirs.load_state_dict(model.state_dict(), strict=False, assign=True)
        assert models.load_weights(model, theirs.state_dict()) == [head + ".weight", head + ".bias"]
        theirs.set_submodule(head, nn.Identity())
        torch.testing.assert_close(theirs(images), feature)


def test_vit_pools_places_and_drops():
    images = torch.randn(2, 3, 16, 16)
    vit = tiny_vit(pool="mean")
    torch.testing.assert_close(vit(images), vit.forward_map(images).mean(dim=(2, 3)))
    patches = vit.patch_embed.proj(images).flatten(2).transpose(1, 2)
    torch.testing.assert_close(vit.patch_embed(images), patches)
    order = torch.stack([torch.randperm(16), torch.randperm(16)])     # order is nothing, position all
    torch.testing.assert_close(vit(images, vit.pos_embed[0, 1:][order], order), vit(images))
    torch.testing.assert_close(vit(images, keep=order), vit(images))
    kept = order[:, :5]
    torch.testing.assert_close(vit(images, keep=kept), vit(images, vit.pos_embed[0, 1:][kept], kept))
    assert vit.forward_tokens(images, keep=kept).shape == (2, 6, 16)
    vit = tiny_vit(drop_rate=0.5)                                     # two branches, each skipped or not
    assert len(vit(images[:1].expand(64, -1, -1, -1)).round(decimals=3).unique(dim=0)) == 4


def test_position_embeddings_of_another_size():
    """Smooth images at twice the size, in four times as many patches: the features stay close."""
    torch.manual_seed(0)
    small, large = (models.ViT(48, 2, 3, img_size=size, patch_size=4) for size in (32, 64))
    assert models.load_weights(large, small.state_dict()) == []
    images = F.interpolate(torch.randn(8, 3, 4, 4), size=(64, 64), mode="bicubic")
    expected = small.forward_map(F.interpolate(images, size=(32, 32), mode="bilinear", antialias=True))

    def distance():  # mean square, over that of two images
        error = (F.avg_pool2d(large.forward_map(images), 2) - expected).square().mean()
        return (error / (expected[:4] - expected[4:]).square().mean()).item()

    close = distance()
    large.pos_embed.data[:, 1:] = large.pos_embed[:, 1:].unflatten(1, (16, 16)).transpose(1, 2).flatten(1, 2)
    assert close < 0.05
    assert distance() > 10 * close                                    # x and y exchanged
    torch.testing.assert_close(models.resize_pos_embed(small.pos_embed, 8), small.pos_embed)


@pytest.mark.parametrize("changes,result", [
    ({"mask_token": torch.zeros(1), "decoder.bias": torch.zeros(1)}, ["mask_token", "decoder.bias"]),
    ({"norm.weight": None, "norm.bias": None, "fc_norm.weight": torch.ones(16)}, ["fc_norm.weight"]),
    ({"norm.weight": None}, "^has no norm.weight$"),
    ({"surprise": torch.zeros(1)}, "^has surprise$"),
    ({"cls_token": torch.zeros(1, 1, 8)}, r"^has cls_token of shape \(1, 1, 8\), not \(1, 1, 16\)$"),
    ({"norm.bias": torch.full((16,), torch.nan)}, "^has NaN in norm.bias$")], ids=str)
def test_load_weights_accounts_for_every_key(changes, result):
    state = tiny_vit().state_dict() | changes
    if isinstance(result, list):
        assert models.load_weights(tiny_vit(), state) == result
    else:
        with pytest.raises(ValueError, match=result):
            models.load_weights(tiny_vit(), state)


# ---------------------------------------------------------------- models: tokenizers

class DallEConv2d(nn.Module):
    __module__, __qualname__ = "dall_e.utils", "Conv2d"               # what a pickle calls it

    def __init__(self, n_in, n_out, kw):
        super().__init__()
        self.w = nn.Parameter(torch.randn(n_out, n_in, kw, kw) / 3)
        self.b = nn.Parameter(torch.randn(n_out))
        self.device = torch.device("cpu")

    def forward(self, x):
        return F.conv2d(x, self.w, self.b, padding=(self.w.shape[2] - 1) // 2)


class DallEBlock(nn.Module):
    __module__, __qualname__ = "dall_e.encoder", "EncoderBlock"

    def __init__(self, n_in, n_out, kernels):
        super().__init__()
        h = n_out // 4
        self.id_path = DallEConv2d(n_in, n_out, 1) if n_in != n_out else nn.Identity()
        layers = {}
        for i, (a, b, kernel) in enumerate(zip((n_in, h, h, h), (h, h, h, n_out), kernels), 1):
            layers |= {f"relu_{i}": nn.ReLU(), f"conv_{i}": DallEConv2d(a, b, kernel)}
        self.res_path = nn.Sequential(OrderedDict(layers))

    def forward(self, x):
        return self.id_path(x) + self.res_path(x) / 64                # 4 groups of 2 blocks, squared


def dalle_coder(n_in, stem, widths, n_out, kernels, between):
    """The package's Encoder or Decoder."""
    layers = {"input": DallEConv2d(n_in, widths[0], stem)}
    for i in range(4):
        blocks = {"block_1": DallEBlock(widths[i], widths[i + 1], kernels),
                  "block_2": DallEBlock(widths[i + 1], widths[i + 1], kernels)}
        layers[f"group_{i + 1}"] = nn.Sequential(OrderedDict(blocks | (between if i < 3 else {})))
    layers["output"] = nn.Sequential(OrderedDict(relu=nn.ReLU(), conv=DallEConv2d(widths[4], n_out, 1)))
    return nn.Sequential(OrderedDict(blocks=nn.Sequential(OrderedDict(layers))))


def save_as(content, path, classes, **options):
    """torch.save under the names that `classes` have in modules which are gone when the file is read."""
    names = {".".join(cls.__module__.split(".")[:i + 1]) for cls in classes for i in range(3)}
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setitem(sys.modules, name, types.ModuleType(name))
        for cls in classes:
            setattr(sys.modules[cls.__module__], cls.__qualname__, cls)
        torch.save(content, path, **options)


@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")   # while writing the old format
@pytest.mark.filterwarnings("error::torch.serialization.SourceChangeWarning")   # while reading it
@pytest.mark.parametrize("zip_format", [True, False])
def test_dalle_files_are_read_without_their_package(zip_format, tmp_path):
    torch.manual_seed(0)
    encoder = dalle_coder(3, 7, [8, 8, 16, 32, 64], 32, (3, 3, 3, 1), {"pool": nn.MaxPool2d(2)})
    decoder = dalle_coder(32, 1, [8, 64, 32, 16, 8], 6, (1, 3, 3, 3),
                         {"upsample": nn.Upsample(scale_factor=2, mode="nearest")})
    images = torch.rand(2, 3, 32, 48)
    with torch.no_grad():
        tokens = encoder(0.8 * images + 0.1).argmax(dim=1)
        codes = F.one_hot(tokens, 32).permute(0, 3, 1, 2).float()
        restored = ((decoder(codes)[:, :3].sigmoid() - 0.1) / 0.8).clamp(0, 1)
    paths = [tmp_path / "encoder.pkl", tmp_path / "decoder.pkl"]
    for coder, path in zip((encoder, decoder), paths):
        save_as(coder, path, [DallEConv2d, DallEBlock], _use_new_zipfile_serialization=zip_format)
    dvae = models.load_dalle(*paths)
    assert dvae.config == {"codes": 32, "width": 8, "embed_width": 8, "blocks": 2}
    assert len(tokens.unique()) > 5
    assert torch.equal(dvae.encode(images), tokens)
    torch.testing.assert_close(dvae.decode(tokens), restored)         # a lookup, upsampling after the 1x1
    torch.testing.assert_close(dvae.decode(codes), restored)
    with pytest.raises(ValueError, match="are not the two halves of a DALL-E dVAE"):
        models.load_dalle(*paths[::-1])
    with pytest.raises(ValueError, match="encoder.pkl is not a VQGAN of taming-transformers"):
        models.load_vqgan(paths[0])


def test_tokenizers_have_the_sizes_of_the_published_ones():
    with torch.device("meta"):
        dvae, vqgan = models.DVAE(), models.VQGAN()
    sizes = {name: tensor.numel() for name, tensor in vqgan.state_dict().items()}
    assert {"encoder.down.2.block.0.nin_shortcut.weight", "encoder.down.4.attn.1.proj_out.weight",
            "decoder.up.1.upsample.conv.bias", "decoder.mid.attn_1.q.bias"} < sizes.keys()
    assert (len(sizes), sum(sizes.values())) == (343, 72_141_699)     # of taming-transformers' class
    for part, tensors, numbers in ((dvae.encoder, 74, 53_786_240), (dvae.decoder, 76, 43_829_766)):
        sizes = [param.numel() for param in part.parameters()]
        assert (len(sizes), sum(sizes)) == (tensors, numbers)


def test_vqgan_of_lightning(tmp_path):
    """A small one in a file as PyTorch Lightning writes it, whose class is gone when it is read."""
    class ModelCheckpoint:
        __module__, __qualname__ = "pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint"

    sizes = dict(codes=50, embed_dim=8, z_channels=16, width=32, multipliers=(2, 1, 2), blocks=1,
                 attention=(False, False, True))
    torch.manual_seed(0)
    start = models.VQGAN(**sizes).state_dict()
    weights = {name: torch.randn(tensor.shape) / 5 for name, tensor in start.items()}
    content = {"state_dict": weights | {"loss.logvar": torch.ones(1)}, "epoch": 1,
               "callbacks": {ModelCheckpoint: {"best": np.float64(3), "self": ModelCheckpoint()}}}
    save_as(content, tmp_path / "vqgan.ckpt", [ModelCheckpoint])
    vqgan = models.load_vqgan(tmp_path / "vqgan.ckpt")
    assert (vqgan.config, vqgan.stride) == (sizes, 4)
    assert different(vqgan.state_dict(), weights) == []
    images = torch.rand(2, 3, 32, 48)
    z = []
    vqgan.quant_conv.register_forward_hook(lambda module, inputs, output: z.append(output))
    with torch.no_grad():
        tokens = vqgan.encode(images)
        restored = vqgan.decode(tokens)
    gaps = z[0][:, :, None] - weights["quantize.embedding.weight"].t()[None, :, :, None, None]
    assert torch.equal(tokens, gaps.square().sum(dim=1).argmin(dim=1))
    assert len(tokens.unique()) > 5
    assert tokens.shape == (2, 8, 12)
    assert restored.shape == images.shape
    assert 0 <= restored.min() < restored.max() <= 1


def test_vqgan_pads_on_the_right_and_below():
    level = models.VQGANLevel(32, 32, 0, False, "downsample")
    kernel = torch.zeros(32, 32, 3, 3)
    kernel[:, :, 0, 0] = torch.eye(32)                                # reads its window's first pixel
    level.downsample["conv"].weight.data = kernel
    level.downsample["conv"].bias.data.zero_()
    x = torch.randn(2, 32, 6, 8)
    torch.testing.assert_close(level(x), x[:, :, ::2, ::2])


# ---------------------------------------------------------------- models: files from strangers

READERS = pytest.mark.parametrize("reader", [models.read_tensors, models.load_weights_file])


@READERS
@pytest.mark.parametrize("zip_format", [True, False])
def test_reduce_runs_nothing(reader, zip_format, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"state_dict": Evil()}, tmp_path / "evil.pt", _use_new_zipfile_serialization=zip_format)
    with pytest.raises(ValueError, match="evil.pt is not a file of weights only: it asks for posix.mkdir"):
        reader(tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()


@READERS
@pytest.mark.parametrize("pickled", [
    b"ctorch.nn\nModule\n(N}S'harm'\nI01\nstb.",                 # state of a class, of a function
    b"ctorch._utils\n_rebuild_tensor_v2\n(N}S'__defaults__'\n(I1\ntstb.",
    b"(S'module'\nctorch.nn\nModule\nS'm.py'\nS'its source'\ntQ.",       # torch.load may write a .patch file
    b"csubprocess\nPopen\n(S'touch ran'\ntR."])
def test_old_pickles_change_nothing(reader, pickled, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models.StandIn, "dump_patches", True, raising=False)
    header = [pickle.dumps(part, 2) for part in (0x1950a86a20f9469cfc6c, 1001, {})]     # of torch < 1.6
    (tmp_path / "old.pt").write_bytes(b"".join(header) + b"\x80\x02" + pickled + pickle.dumps([], 2))
    with pytest.raises(ValueError, match="old.pt is "):
        reader("old.pt")
    assert os.listdir() == ["old.pt"]
    assert not hasattr(models.StandIn, "harm")
    assert torch._utils._rebuild_tensor_v2.__defaults__ == (None,)


class Scripted(nn.Module):
    @torch.jit.export
    def __getstate__(self):
        return 0, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[int, bool]):
        print("its code ran")
        self.training = state[1]


@READERS
@pytest.mark.filterwarnings("ignore")
def test_torchscript_is_not_run(reader, tmp_path, capfd):
    torch.jit.save(torch.jit.script(Scripted()), tmp_path / "script.pt")
    torch.load(tmp_path / "script.pt", weights_only=False)
    assert "its code ran" in capfd.readouterr().out
    with pytest.raises(ValueError, match="script.pt is a TorchScript archive or a tar"):
        reader(tmp_path / "script.pt")
    assert "its code ran" not in capfd.readouterr().out


@READERS
def test_tar_is_not_unpacked(reader, tmp_path):
    victim = tmp_path / "victim"
    victim.touch(0o600)
    with tarfile.open(tmp_path / "old.tar", "w") as tar:
        link = tarfile.TarInfo("storages")
        link.type, link.linkname, link.mode = tarfile.LNKTYPE, str(victim), 0o777
        tar.addfile(link)
    with pytest.raises(ValueError, match="old.tar is a TorchScript archive or a tar"):
        reader(tmp_path / "old.tar")
    assert victim.stat().st_mode & 0o777 == 0o600
    assert victim.stat().st_nlink == 1


@pytest.mark.parametrize("depth", [0, 60])
def test_modules_in_modules(depth, tmp_path):
    """A module that contains itself, or 2 ** 60 ways to one module."""
    module = last = DallEBlock(4, 4, ())
    module._parameters = {"w": torch.ones(2)}
    for _ in range(depth):
        last._modules = dict.fromkeys("ab", DallEBlock(4, 4, ()))
        last = last._modules["a"]
    last._modules = {"a": module}
    save_as(module, tmp_path / "m.pkl", [DallEBlock])
    assert list(models.read_tensors(tmp_path / "m.pkl")) == ["w"]


@READERS
@pytest.mark.parametrize("content,problem", [
    (b"<html>", "is a text file, perhaps a web page"), ("half", "is truncated or not a file of weights"),
    (b"", "is empty"), (None, "is missing"), ("folder", "cannot be read: not a regular file")])
def test_unreadable_files_are_named(reader, content, problem, tmp_path):
    path = tmp_path / "x.pt"
    if content == "half":
        torch.save({"state_dict": {"w": torch.ones(1000)}}, path)
        content = path.read_bytes()[:2000]
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=f"x.pt {problem}"):
        reader(path)


# ---------------------------------------------------------------- the energy method

def energy_batch(task, model, size=4):
    """An EnergyModel or AutoEncoder made ready to train, and a batch (x, target, context) for it."""
    args = argparse.Namespace(patch_size=4, mask_cell=4, mask_ratio=0.75, sr_scale=4)
    images = torch.randn(size, 3, 16, 16)
    batch = energy_pretrain.corrupt_batch(task, images, torch.Generator(), model, args)
    energy_pretrain.calibrate_and_freeze_unused(model, *batch)
    return images, batch


def trained_gradients(model, batch, scale=1.0):
    model.zero_grad()
    (scale * model(*batch[:2], **batch[2])[0]).backward()
    return [param.grad.clone() / scale for param in model.parameters() if param.requires_grad]


@pytest.mark.parametrize("name", ["cls", "mean", "predicted", "contrast", "resnet", "sort"])
def test_gradients_equal_finite_differences(name):
    """The weights' gradient of eq. (5), which runs through dE/dx, against central differences in float64."""
    torch.manual_seed(0)
    backbone = tiny_vit(pool="mean" if name == "mean" else "cls")
    if name == "resnet":
        backbone = models.ResNet((1, 1, 1, 1), width=4, norm="group", small_images=True)
    alpha = "predicted" if name == "predicted" else "learned"
    model = energy_pretrain.EnergyModel(backbone, alpha, num_steps=int(name != "contrast"))
    _, (x, target, context) = energy_batch("sort" if name == "sort" else "color", model)
    model, x, target = model.double(), x.double(), target.double()
    if name == "sort":
        context["images"] = context["images"].double()
    model(x, target, **context)[0].backward()
    checked = 0
    for param in model.parameters():
        if param.grad is not None:
            direction = torch.randn_like(param)
            direction *= 1e-7 / direction.norm()                      # so small that no ReLU crosses its kink
            losses = []
            with torch.no_grad():
                for factor in (1, -2):                                # there, and back to the other side
                    param += factor * direction
                    losses.append(model(x, target, **context)[0].item())
                param += direction
            expected = (losses[0] - losses[1]) / 2e-7
            assert (param.grad * direction).sum().item() * 1e7 == pytest.approx(expected, rel=1e-3, abs=1e-7)
            checked += expected != 0
    assert checked > 15


@pytest.mark.parametrize("scale", [None, 5000.0])                     # the second does not fit into fp16
def test_step_equals_autograd(scale):
    torch.manual_seed(0)
    model = energy_pretrain.EnergyModel(tiny_vit())
    x = energy_batch("color", model)[1][0].requires_grad_()
    if scale:
        model.scale.fill_(scale)
    with sdpa_kernel(SDPBackend.MATH):
        energy = model.scale * model.head(model.backbone(x)).sum()
        gradient, = torch.autograd.grad(energy, x)
    torch.testing.assert_close(model.restore(x), x - 0.1 * gradient, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.restore(x)[:1], model.restore(x[:1]), rtol=1e-4, atol=1e-4)
    if not scale:
        assert gradient.square().mean().sqrt().item() == pytest.approx(1, abs=1e-3)  # calibrated


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision(dtype):
    torch.manual_seed(0)
    model = energy_pretrain.EnergyModel(tiny_vit())
    _, batch = energy_batch("color", model)
    expected = torch.stack([gradient.norm() for gradient in trained_gradients(model, batch)])
    with torch.autocast("cpu", dtype):
        norms = torch.stack([gradient.norm() for gradient in trained_gradients(model, batch, scale=1024.0)])
        torch.testing.assert_close(norms, expected, rtol=0.1, atol=0.02 * expected.max().item())
        model.scale.fill_(1e6)                                        # fp16 ends at 65,504
        assert model.restore(batch[0]).isfinite().all()


def test_sort_moves_only_the_position_embedding():
    vit = tiny_vit()
    before = vit.pos_embed.clone()
    model = energy_pretrain.EnergyModel(vit)
    _, (x, target, context) = energy_batch("sort", model)
    keep, images = context["keep"], context["images"]
    assert x.shape == target.shape == (4, 8, 16)
    assert all(len(set(row)) == 8 for row in keep.tolist())
    torch.testing.assert_close(target, before[0, 1:][keep])
    places = energy_pretrain.nearest_position(model.positions, x)
    assert all(len(set(row)) == 8 for row in places.tolist())
    assert not torch.equal(places, keep)
    assert x.norm(dim=2).min() > 0                                    # not the class token, whose entry is 0
    assert vit.pos_embed.grad is None
    # Dropped patches have no influence; patches pasted at their true places give back the images.
    dropped = F.unfold(images, 4, stride=4).scatter(2, keep[:, None].expand(-1, 48, -1), 0)
    dropped = F.fold(dropped, (16, 16), 4, stride=4)
    restored = model.restore(x, images=images + dropped, keep=keep)
    torch.testing.assert_close(restored, model.restore(x, **context))
    pasted = energy_pretrain.paste_patches(model, target, images, keep)
    torch.testing.assert_close(pasted + dropped, images)


def test_mae_equals_a_slow_loop():
    """Only visible patches enter, and the loss is that of the masked ones, each normalised."""
    torch.manual_seed(0)
    model = energy_pretrain.AutoEncoder(tiny_vit(), visible_only=True)
    images, (x, target, context) = energy_batch("grid", model, size=3)
    keep = context["keep"]
    assert keep.shape == (3, 4)                                       # a quarter of 16 patches
    loss, restored = model(x, target, **context)
    errors = []
    for b in range(3):
        encoded = model.embed(model.backbone.forward_tokens(images[b:b + 1], keep=keep[b:b + 1]))[0]
        tokens = [encoded[0]]                                         # the decoder's, built one by one
        for place in range(16):
            token = encoded[1 + keep[b].tolist().index(place)] if place in keep[b] else model.mask_token[0, 0]
            tokens.append(token + model.positions[0, place])
        tokens = torch.stack(tokens)[None]
        for block in model.blocks:
            tokens = block(tokens)
        output = model.head(model.norm(tokens))[0, 1:]
        for place in range(16):
            row, column = 4 * (place // 4), 4 * (place % 4)
            patch = images[b, :, row:row + 4, column:column + 4].flatten()
            shown = restored[b, :, row:row + 4, column:column + 4].flatten()
            if place in keep[b]:
                assert torch.equal(shown, patch)
            else:
                mean, std = patch.mean(), (patch.var() + 1e-6).sqrt()
                errors.append((output[place] - (patch - mean) / std).square().mean())
                torch.testing.assert_close(shown, output[place] * std + mean)
    torch.testing.assert_close(loss, torch.stack(errors).mean())


# ---------------------------------------------------------------- the CIM method

def tiny_cim(*flags):
    """-> (CIM model, tokenizer, images, masks): a vit_nano for 16 tokens in images of 16 pixels."""
    args = parse(cim_pretrain, *FLAGS[cim_pretrain], *flags)
    torch.manual_seed(0)
    dvae = models.DVAE(codes=32, width=8, embed_width=8, blocks=1).requires_grad_(False)
    model, _ = cim_pretrain.build_model(args, 32 if args.tokenizer else None)
    mask = cim_pretrain.draw_mask(4, args, "cpu")
    return model, dvae if args.tokenizer else None, torch.randn(4, 3, 16, 16), mask


def test_normalised_targets_equal_a_slow_loop():
    torch.manual_seed(0)
    images = torch.randn(2, 3, 16, 16).double()
    target, mean, std = cim_pretrain.normalize_target(images, "window", 4)
    padded = F.pad(images, (4, 3, 4, 3), mode="reflect")
    for b, y, x in [(0, 0, 0), (1, 15, 15), (0, 7, 3), (1, 2, 14)]:
        window = padded[b, :, y:y + 8, x:x + 8]                       # 4 pixels before the pixel, 3 behind it
        expected = (images[b, :, y, x] - window.mean()) / (window.var(correction=0) + 1e-6).sqrt()
        torch.testing.assert_close(target[b, :, y, x], expected)
    torch.testing.assert_close(target * std + mean, images)
    patch = cim_pretrain.normalize_target(images, "patch", 4)[0][1, :, 4:8, 8:12]
    assert patch.mean().abs() < 1e-6
    assert abs(patch.std(correction=0) - 1) < 1e-5
    assert torch.equal(cim_pretrain.normalize_target(images, "none", 4)[0], images)


@pytest.mark.parametrize("share,objective,generator", [
    ("0", "respix", "beit"), ("2", "revdet", "beit"), ("2", "respix", "mae")])
def test_which_loss_trains_what(share, objective, generator):
    flags = ["--share", share, "--objective", objective, "--generator", generator]
    model, tokenizer, images, mask = tiny_cim(*flags)
    trained = []
    for enhancer in (False, True):
        model.zero_grad()
        loss, golden, tokens, corrupted = model.corrupt(images, mask, tokenizer)
        if enhancer:
            loss = model.enhancer_loss(model.enhance(corrupted), images, golden, tokens)
        loss.backward()
        trained.append({param for param in model.parameters() if param.grad is not None and param.grad.any()})
    assert not trained[0] & set(model.head.parameters())
    assert not trained[1] & {model.generator.mask_token, *model.generator.head.parameters()}
    # Shared: the weight and bias of the patch embedding, and twelve tensors in each of two blocks.
    assert len(trained[0] & trained[1]) == (2 + 2 * 12 if share == "2" else 0)
    assert len(trained[0] | trained[1]) == len(list(model.parameters()))


def test_sampled_tokens():
    model, tokenizer, images, mask = tiny_cim("--objective", "revdet")
    golden = torch.randint(32, (4, 16))
    for sampling in ("softmax", "argmax", "uniform"):
        first, second = (model.generate_tokens(images, golden, mask, sampling)[1] for _ in range(2))
        assert torch.equal(first[~mask], golden[~mask])
        assert not torch.equal(first, golden)
        assert torch.equal(first, second) == (sampling == "argmax")
    # What the generator is sure of is sampled; then the labels are 0, and the loss is that of "not replaced".
    model.generator.head.weight.data.zero_()
    model.generator.head.bias.data[:] = torch.tensor([0.0] * 31 + [50.0])
    golden = torch.full_like(golden, 31)
    loss, tokens = model.generate_tokens(images, golden, mask, "softmax")
    assert loss < 1e-6
    assert torch.equal(tokens, golden)
    output = model.enhance(cim_pretrain.detokenize(tokenizer, tokens, 16))
    torch.testing.assert_close(model.enhancer_loss(output, images, golden, tokens), F.softplus(output).mean())
    # Logits log(1), log(2), log(3), log(4) are drawn 1, 2, 3 and 4 times of ten.
    model.generator.head.bias.data[:] = torch.tensor([1.0, 2, 3, 4] + [1e-9] * 28).log()
    drawn = torch.cat([model.generate_tokens(images, golden, mask, "softmax")[1][mask] for _ in range(100)])
    assert (drawn.bincount(minlength=4) / len(drawn) - torch.tensor([0.1, 0.2, 0.3, 0.4])).abs().max() < 0.03


def test_sampled_pixels_are_normal_around_the_output():
    model, _, images, mask = tiny_cim("--generator", "mae")
    model.generator.head.weight.data.zero_()                          # it predicts 0 everywhere
    pixels = mask.view(4, 1, 4, 4).repeat_interleave(4, dim=2).repeat_interleave(4, dim=3).expand_as(images)
    loss, corrupted = model.generate_pixels(images, mask)
    torch.testing.assert_close(loss, images[pixels].square().mean())
    assert torch.equal(corrupted[~pixels], images[~pixels])
    drawn = torch.cat([model.generate_pixels(images, mask)[1][pixels] for _ in range(20)])
    assert abs(drawn.mean()) < 0.05
    assert abs(drawn.std() / loss.sqrt() - 1) < 0.05


def test_area_under_curve_equals_a_slow_loop():
    scores, labels = torch.tensor([0.1, 0.4, 0.4, 0.8, 0.3]), torch.tensor([False, False, True, True, True])
    pairs = [(p > n) + 0.5 * (p == n) for p in scores[labels].tolist() for n in scores[~labels].tolist()]
    assert cim_pretrain.area_under_curve(scores, labels) == pytest.approx(sum(pairs) / len(pairs))


@pytest.mark.parametrize("stride", [2, 4, 8])
def test_the_tokenizer_sees_its_stride_for_each_patch(stride):
    tokenizer = types.SimpleNamespace(stride=stride)
    tokenizer.encode = lambda images: images.mean(dim=1)[:, ::stride, ::stride].gt(0.5).long()
    tokenizer.decode = lambda tokens: F.interpolate(tokens[:, None].expand(-1, 3, -1, -1).float(),
                                                    scale_factor=stride)
    images = torch.tensor([[0.0, 1], [1, 0]]).repeat_interleave(4, dim=0).repeat_interleave(4, dim=1)
    images = data.normalize(images.expand(1, 3, 8, 8))
    assert cim_pretrain.tokenizer_view(tokenizer, images, 4).shape[2:] == (2 * stride, 2 * stride)
    tokens = cim_pretrain.tokenize(tokenizer, images, 4)
    assert tokens.tolist() == [[0, 1, 1, 0]]
    restored = cim_pretrain.detokenize(tokenizer, tokens, 8)
    assert torch.allclose(restored, images, atol=1e-5) == (stride == 4)
    assert restored.shape == images.shape


# ---------------------------------------------------------------- fine-tuning

BOTH = dict(batch_size=1024, weight_decay=0.05, warmup_epochs=5, clip_grad=0, drop_path=0.1, loss="ce",
            repeats=1, label_smoothing=0.1, mixup=0.8, cutmix=1, randaug=9, erasing=0.25, img_size=224,
            test_size=224)
ENERGY_RECIPE = BOTH | dict(lr=1e-3, layer_decay=0.75, crop_ratio=0.875, head_norm="none")
CIM_RECIPE = BOTH | dict(lr=3e-3, layer_decay=0.8, crop_ratio=0.95, head_norm="layer")
RSB_RECIPE = BOTH | dict(lr=12e-3, batch_size=2048, weight_decay=0.02, layer_decay=1, drop_path=0, loss="bce",
                         mixup=0.1, erasing=0, head_norm="none", crop_ratio=0.95)


@pytest.mark.parametrize("flags,config,expected", [
    ("--model vit_s", {}, ENERGY_RECIPE | dict(epochs=200)),
    ("", dict(model="vit_b", method="energy"), ENERGY_RECIPE | dict(epochs=100, model="vit_b")),
    ("", dict(model="vit_l", method="autoencoder"), ENERGY_RECIPE | dict(epochs=50)),
    ("", dict(model="vit_b", method="cim", objective="respix"), CIM_RECIPE | dict(epochs=100)),
    ("", dict(model="vit_b", method="cim", objective="revdet"), CIM_RECIPE | dict(epochs=100, lr=5e-3)),
    ("", dict(model="vit_s", method="cim", objective="revdet"), CIM_RECIPE | dict(epochs=200, lr=4e-3)),
    ("--recipe cim", dict(model="vit_s", method="energy"), CIM_RECIPE),
    ("--model resnet50", dict(method="cim"), RSB_RECIPE | dict(epochs=100, randaug=6, img_size=160)),
    ("--model resnet50 --epochs 300", {}, RSB_RECIPE | dict(label_smoothing=0, randaug=7, repeats=3)),
    ("--model resnet50 --epochs 600", {},
     RSB_RECIPE | dict(weight_decay=0.01, randaug=7, repeats=3, mixup=0.2, drop_path=0.05)),
    ("--batch_size 512 --mixup 0 --epochs 10", dict(model="vit_b", img_size=32),
     dict(lr=5e-4, mixup=0, cutmix=1, warmup_epochs=2, img_size=32, test_size=32, crop_ratio=1)),
    ("--probe linear", dict(model="vit_s", method="cim"), dict(epochs=90, weight_decay=0, head_norm="batch")),
    ("--task segment", dict(model="vit_b", img_size=224),
     dict(epochs=127, img_size=512, lr=3e-4, layer_decay=0.8, batch_size=16, power=1, weight_decay=0.05)),
    ("--task segment", dict(model="swin_t"), dict(lr=3e-4, weight_decay=0.05, power=1, layer_decay=1)),
    ("--task segment", dict(model="resnet50"), dict(epochs=64, lr=1e-2, batch_size=16, power=0.9)),
    ("", dict(data="nowhere", output_dir="/", lr=9.0, seed=7),       # a config sets nothing but the model
     dict(data="shapes", output_dir="runs/finetune_vit_s", lr=1e-3, seed=0))])
def test_recipes_are_the_papers(flags, config, expected):
    args = parse(finetune, *flags.split())
    finetune.resolve(args, config, world=1)
    assert {key: getattr(args, key) for key in expected} == expected
    if args.task == "segment":
        optimizer = finetune.build_optimizer(args, finetune.Segmenter(tiny_vit(), 3, 16))
        assert type(optimizer).__name__ == ("SGD" if args.model == "resnet50" else "AdamW")


def test_schedules():
    rate = [finetune.learning_rate(step, 110, 10, 1.0, 1e-6) for step in range(111)]
    assert [rate[0], rate[9], rate[10], rate[110]] == [0.1, 1, 1, 1e-6]
    assert rate[60] == pytest.approx((1 + 1e-6) / 2)
    rate = [finetune.poly_rate(step, 110, 10, 1.0, 0.9) for step in range(111)]
    assert [rate[0], rate[9], rate[10], rate[60], rate[110]] == [0.1, 1, 1, 0.5 ** 0.9, 0]
    for epochs, warmup in ((5, 0.5), (300, 10)):
        assert parse(cim_pretrain, *FLAGS[cim_pretrain], "--epochs", epochs).warmup_epochs == warmup


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
    energy = energy_pretrain.EnergyModel(tiny_vit(), alpha="predicted")
    groups = models.parameter_groups(energy.named_parameters(), 0.05)
    assert any(param is energy.alpha_head.weight for param in groups[1]["params"])


@pytest.mark.parametrize("head_norm,pool", [("none", "cls"), ("none", "mean"), ("layer", "cls")])
@pytest.mark.parametrize("loss,smoothing", [("ce", 0.1), ("bce", 0.1), ("bce", 0.0)])
def test_classifier(head_norm, pool, loss, smoothing):
    torch.manual_seed(0)
    vit = tiny_vit(pool=pool)
    model = finetune.Classifier(vit, 4, None, head_norm, loss, smoothing)
    assert model.head[-1].weight.abs().max() < 1e-4
    nn.init.normal_(model.head[-1].weight)
    images, labels = torch.randn(6, 3, 16, 16), torch.tensor([0, 1, 2, 3, 0, 1])
    feature = vit(images)                                             # energy: only the linear head is new
    if head_norm == "layer":                                          # BEiT: a new norm of the patch mean
        tokens = vit.forward_tokens(images, norm=False)[:, 1:]
        feature = F.layer_norm(tokens.mean(dim=1), (16,), eps=1e-6)
    logits = feature @ model.head[-1].weight.T
    torch.testing.assert_close(model.logits(images), logits)
    targets = F.one_hot(labels, 4) * (1 - smoothing) + smoothing / 4
    q = logits.sigmoid()
    expected = {"ce": -(targets * logits.log_softmax(dim=1)).sum(dim=1).mean(),
                "bce": -(targets * q.log() + (1 - targets) * (1 - q).log()).mean()}[loss]
    torch.testing.assert_close(model(images, labels), expected)
    torch.testing.assert_close(model(images, F.one_hot(labels, 4).float()), expected)     # as after mixing


def test_a_probe_keeps_no_graph_of_the_backbone():
    model = finetune.Classifier(tiny_vit(pos_embed="learned"), 3, "mlp", "batch").train()
    assert not model.backbone(torch.randn(2, 3, 16, 16)).requires_grad
    layers = [type(layer).__name__ for layer in model.head]
    assert layers == ["BatchNorm1d", "Linear", "ReLU", "Linear", "ReLU", "Linear"]
    assert model.training and not model.backbone.training


def test_miou_equals_a_slow_loop():
    torch.manual_seed(0)
    model = finetune.Segmenter(tiny_vit(), 4, img_size=16).eval()
    model.head.bias.data[3] = -100                                    # class 4 is nowhere, and does not count
    views = data.Transformed(data.Segmentation("masked", False, 3), data.segment_transform(16, False), 0)
    counts, intersection, union = 0, [0] * 4, [0] * 4
    for i in range(len(views)):
        image, mask = views[0, i]
        counts = counts + model.count(image[None], mask[None])
        prediction = model.predict(image[None])[0].argmax(dim=0) + 1
        for truth, guess in zip(mask.flatten().tolist(), prediction.flatten().tolist()):
            for c in (1, 2, 3, 4):
                intersection[c - 1] += truth == guess == c
                union[c - 1] += truth > 0 and c in (truth, guess)
    expected = 100 * np.mean([a / b for a, b in zip(intersection, union) if b])
    assert 0 < expected < 100
    assert model.summary(counts)["miou"] == pytest.approx(expected, abs=1e-3)
    mask = torch.randint(1, 4, (1, 16, 16))
    mask[:, :, :8] = 0                                                # unlabelled pixels count nowhere
    image = torch.randn(1, 3, 16, 16)
    expected = F.cross_entropy(model.logits(image)[..., 8:], mask[..., 8:] - 1)
    torch.testing.assert_close(model(image, mask), expected)


# ---------------------------------------------------------------- the scripts

ENERGY, CIM, FINE = energy_pretrain, cim_pretrain, finetune
AUTO = ["--method", "autoencoder"]
COMPILE = ["--compile"] if SLOW else []


def test_scripts_share_their_helpers():
    blocks = []
    for script in (ENERGY, CIM, FINE):
        with open(script.__file__) as file:
            helpers = file.read().split("helpers, identical in all three scripts\n")[1]
        blocks.append(helpers.split(" the loop\n")[0])
    assert blocks[1] == blocks[0]
    assert blocks[2] == blocks[0]


@pytest.fixture(scope="module")
def bad(trained):
    """Folders that are no data sets, and files that are no weights, or those of others."""
    root = trained / "bad"
    for folder in ("empty", "other/train/a", "other/val/b", "two/train/a", "two/val/a"):
        save_images(root / folder, 0 if folder == "empty" else 8)
    for split in ("train", "val"):
        save_images(root / "black" / split, 16)
        for path in (root / "black" / split).iterdir():
            Image.new("RGB", (16, 16)).save(path)
    shutil.copytree("masked", root / "blank")
    for path in (root / "blank/annotations/validation").iterdir():
        Image.new("L", Image.open(path).size).save(path)
    shutil.copytree("masked", root / "sizes")
    for path in (root / "sizes/annotations/training").iterdir():
        Image.new("L", (9, 7)).save(path)
    backbone = torch.load("energy/backbone.pt", weights_only=True)
    nan = {"cls_token": torch.full((1, 1, 96), torch.nan)}
    for name, content in {
            "list": [torch.zeros(1)], "other": {"state_dict": {"encoder.weight": torch.ones(2)}},
            "unknown": backbone | {"config": backbone["config"] | {"model": "vit_huge"}},
            "nan": backbone | {"model": backbone["model"] | nan}}.items():
        torch.save(content, root / f"{name}.pt")
    (root / "page").mkdir()
    for name in ("page.pt", "page/vqgan.ckpt", "page/dvae.pt"):
        (root / name).write_text("<html>")
    # As MAE and taming-transformers write them: with arguments, DDP's prefix, another size, a discriminator.
    torch.manual_seed(0)
    vit = models.build_model("vit_nano", 32, 4).state_dict()
    vit["mask_token"] = torch.ones(1, 1, 96)
    state = {"module." + key: value for key, value in vit.items()}
    torch.save({"model": state, "args": argparse.Namespace(lr=1.0)}, root / "mae.pth")
    vqgan = models.VQGAN(24, 8, 8, 32, multipliers=(1, 1, 1), attention=(False, False, True), blocks=1)
    state = vqgan.state_dict() | {"loss.discriminator.main.0.weight": torch.ones(1)}
    torch.save({"state_dict": state, "callbacks": {}, "epoch": 1}, root / "vqgan.ckpt")
    return root


@pytest.mark.parametrize("script,flags,names,columns", [
    (ENERGY, ["--alpha", "predicted", "--corrupt", "sort"], "sorted_0 sorted_2 energy_gap_sort", 6),
    (ENERGY, ["--amp", "bf16", "--corrupt", "random_small"], "psnr_random_small_2", 6),
    (ENERGY, ["--amp", "fp16", "--corrupt", "random_large"], "psnr_random_large_2", 6),
    (ENERGY, ["--energy_steps", 0], "psnr_grid_0 energy_gap_grid energy_gap_color", 4),
    (ENERGY, [*RESNET, "--energy_steps", 1, "--corrupt", "sr", "--clip_grad", 0], "psnr_sr_1", 5),
    (ENERGY, [*AUTO, "--corrupt", "sort"], "sorted_1", 3),
    (ENERGY, [*AUTO, "--corrupt", "grid"], "psnr_grid_1", 3),
    (ENERGY, [*AUTO, *COMPILE], "psnr_denoise_1", 3),
    (CIM, [*TRAIN, "--objective", "none", "--mask_ratio", 0.4, 0.4], "gen_loss gen_acc", 5),
    (CIM, ["--generator", "mae", "--target", "patch", "--amp", "bf16"], "psnr_template psnr_output", 6),
    (CIM, ["--generator", "erase", *RESNET, "--target", "none", "--amp", "fp16"], "psnr_output", 3),
    (CIM, ["--tokenizer", "vqgan", "--tokenizer_dir", "bad", *COMPILE], "gen_acc psnr_output", 6),
    (CIM, [*TRAIN, "--objective", "revdet", "--data", "bad/black"], "accuracy precision recall", 7),
    (FINE, ["--init", "bad/mae.pth", *VIT, "--probe", "mlp"], "top1 top5 val_loss best_top1", None),
    (FINE, [*SEGMENT, *RESNET, "--img_size", 16], "miou pixel_acc", 3)], ids=str)
def test_run(script, flags, names, columns, bad, tmp_path):
    run_here(script, *flags, "--max_steps", 2, "--output_dir", tmp_path)
    log = read_log(tmp_path)
    assert {*names.split(), "loss", "lr", "img_per_s", "peak_mem_mb"} <= log[-1].keys()
    assert np.isfinite(list(log[-1].values())).all()
    if columns:
        width = Image.open(sorted((tmp_path / "samples").glob("epoch*.png"))[0]).width
        assert width == columns * (42 if script is FINE else 98) + 2
    backbone = torch.load(tmp_path / "backbone.pt", weights_only=True)
    config = backbone["config"]
    assert config.pop("objective") in flags + ["mix", "respix", "classify"]
    assert config.pop("method") in ("energy", "autoencoder", "cim", "beit", "finetune")
    assert (tuple(config.pop("mean")), tuple(config.pop("std"))) == (data.MEAN, data.STD)
    models.build_model(**config).load_state_dict(backbone["model"])


def test_a_probe_leaves_the_file_of_mae_as_it_is(bad, tmp_path):
    flags = ["--init", "bad/mae.pth", *VIT, "--probe", "linear", "--max_steps", 1]
    run_here(FINE, *flags, "--output_dir", tmp_path)
    state = torch.load("bad/mae.pth", weights_only=False)["model"]
    expected = {key.removeprefix("module."): value for key, value in state.items() if "mask_token" not in key}
    expected["pos_embed"] = models.resize_pos_embed(expected["pos_embed"], 4)
    assert different(weights(tmp_path, "backbone.pt"), expected) == []


@slow
@pytest.mark.parametrize("model", ["vit_t", "resnet50", "convnext_t", "swin_t"])
@pytest.mark.parametrize("script,flags", [
    (ENERGY, ["--corrupt", "sr"]), (CIM, ["--generator", "mae"]), (FINE, []), (FINE, SEGMENT)], ids=str)
def test_every_backbone(script, flags, model, tmp_path):
    run_here(script, *flags, "--model", model, "--img_size", 32, "--patch_size", 16, "--batch_size", 4,
             "--max_steps", 1, "--output_dir", tmp_path)


def test_what_was_trained(trained, tmp_path):
    log = read_log("energy")
    assert [line.get("epoch") for line in log] == [None, 1, 2]
    assert log[2].keys() >= {"psnr_color_0", "psnr_color_2", "energy_gap_color", "alpha"}
    flags = ["--corrupt", "color", "--epochs", 2, "--accum_steps", 4]
    run_here(ENERGY, *flags, "--output_dir", tmp_path / "parts")
    for key, value in weights(tmp_path / "parts").items():            # gray is not random
        torch.testing.assert_close(value, weights("energy")[key], rtol=1e-3, atol=2e-4)
    # Evaluation repeats the last line of the log and writes nothing.
    files = sorted(os.listdir("classify"))
    measured = json.loads(run_here(FINE, "--eval_only", "--output_dir", "classify"))
    last = read_log("classify")[2]
    assert measured == {"images": 37} | {key: last[key] for key in ("top1", "top5", "val_loss")}
    assert sorted(os.listdir("classify")) == files
    # A fixed position embedding is trained now.
    assert "pos_embed" in different(weights("energy", "backbone.pt"), weights("classify", "backbone.pt"))


def test_tokenizer_and_frozen_generator_of_another_run(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(cim_pretrain, "train_dvae", None)
    flags = [*TRAIN, "--max_steps", 2, "--output_dir", tmp_path]
    run_here(CIM, *flags, "--freeze_generator", "cim/checkpoint.pt")
    before, after = weights("cim"), weights(tmp_path)
    assert not [key for key in different(before, after) if key.startswith("generator.")]
    assert different(weights("cim", "dvae.pt"), weights(tmp_path, "dvae.pt")) == []
    (tmp_path / "dvae.pt").unlink()
    assert "dvae.pt is missing" in stops_with(CIM, *flags, "--tokenizer_dir", "cim", "--resume")


@pytest.mark.parametrize("script,flags,trained_parts", [
    (ENERGY, [], {"backbone", "head", "log_alpha"}),
    (CIM, [*TRAIN, *RESNET, "--objective", "revdet", "--epochs", 3], {"backbone", "generator", "head"}),
    (FINE, VIT, {"backbone", "head"}),
    (FINE, [*RESNET, "--img_size", 16, "--epochs", 300, "--drop_path", 0.2], {"backbone", "head"}),  # repeats
    (FINE, [*RESNET, "--img_size", 16, "--probe", "linear"], {"head"}),  # with a frozen BatchNorm
    (FINE, [*SEGMENT, *RESNET, "--img_size", 16], {"backbone", "head"})], ids=str)
def test_resumed_runs_are_bit_identical(script, flags, trained_parts, tmp_path):
    """Stopped in the second epoch, or after it (the masked images have one step an epoch)."""
    run_here(script, *flags, "--max_steps", 6, "--output_dir", tmp_path / "whole")
    run_here(script, *flags, "--max_steps", 4, "--output_dir", tmp_path / "parts")
    stopped = weights(tmp_path / "parts")
    run_here(script, *flags, "--max_steps", 6, "--resume", "--output_dir", tmp_path / "parts")
    resumed = weights(tmp_path / "parts")
    assert different(weights(tmp_path / "whole"), resumed) == []
    assert {key.split(".")[0] for key in different(stopped, resumed)} == trained_parts
    first, last = read_log(tmp_path / "whole")[-1], read_log(tmp_path / "parts")[-1]
    measured = first.keys() - {"img_per_s", "loss", "data_fraction", "peak_mem_mb"}
    assert {key: last[key] for key in measured} == {key: first[key] for key in measured}


@slow
def test_killed_and_resumed_is_bit_identical(tmp_path):
    flags = ["--num_workers", 2, "--epochs", 10, "--output_dir"]
    run(ENERGY, *flags, tmp_path / "whole")
    command = [sys.executable, ENERGY.__file__, *map(str, [*FLAGS[ENERGY], *flags]), tmp_path / "killed"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    while not os.path.exists(tmp_path / "killed/checkpoint.pt"):
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(np.random.default_rng().uniform(0, 0.3))               # a random moment of a later epoch
    os.kill(process.pid, signal.SIGKILL)                              # its loaders live on for seconds
    process.wait()
    assert torch.load(tmp_path / "killed/checkpoint.pt", weights_only=True)["step"] < 30
    run(ENERGY, *flags, tmp_path / "killed", "--resume")
    assert different(weights(tmp_path / "whole"), weights(tmp_path / "killed")) == []


def compiled_gradients(model, *batch, **context):
    """The gradients of the model, then those of the model compiled."""
    gradients = []
    for compiled in (False, True):
        if compiled:
            model.compile(backend="inductor" if SLOW else "aot_eager")
        torch.manual_seed(1)
        loss = model(*batch, **context)
        (loss[0] if isinstance(loss, tuple) else loss).backward()
        gradients.append({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
    return gradients


@pytest.mark.parametrize("name", ["energy sr", *[pytest.param(name, marks=slow) for name in (
    "energy sort", "autoencoder sr", "autoencoder grid", "autoencoder sort", "cim")]])
def test_compiled_step_has_the_same_gradients(name):
    torch.manual_seed(0)
    method, _, task = name.partition(" ")
    if method == "cim":
        model, *batch = tiny_cim("--gen_depth", 1, "--share", 1, "--sampling", "argmax")
        batch, context = [batch[1], batch[2], batch[0]], {}
    else:
        vit = models.ViT(dim=16, depth=1, heads=2, img_size=16, patch_size=4)
        model = ENERGY.EnergyModel(vit) if method == "energy" else \
            ENERGY.AutoEncoder(vit, visible_only=task == "grid", sort=task == "sort")
        _, (*batch, context) = energy_batch(task, model)
    eager, compiled = compiled_gradients(model, *batch, **context)
    for key in eager:
        atol = 1e-5 * eager[key].abs().max().item()
        torch.testing.assert_close(compiled[key], eager[key], rtol=1e-3, atol=atol)


@slow
@pytest.mark.parametrize("script,flags", [
    (ENERGY, ["--corrupt", "color"]), (ENERGY, ["--corrupt", "color", "--compile"]),
    # With all patches masked and no sampling, nothing is random.
    (CIM, [*TRAIN, "--tokenizer_dir", "cim", "--mask_ratio", 0.99, 0.99, "--sampling", "argmax"]),
    (FINE, [*VIT, "--drop_path", 0, "--mixup", 0, "--cutmix", 0])], ids=str)
def test_two_processes_train_as_one(script, flags, trained, tmp_path):
    flags = [*flags, "--epochs", 2, "--output_dir"]
    run_here(script, *flags, tmp_path / "one")
    run(script, *flags, tmp_path / "two", processes=2)
    one = weights(tmp_path / "one")
    for key, value in weights(tmp_path / "two").items():
        torch.testing.assert_close(value, one[key], rtol=1e-3, atol=2e-4)


@slow
@pytest.mark.parametrize("script,flags", [
    (CIM, [*TRAIN, *RESNET]), (CIM, ["--generator", "mae", "--model", "convnext_t", "--img_size", 32]),
    (FINE, [*SEGMENT, "--model", "convnext_t", "--img_size", 32])], ids=str)
def test_two_processes_run(script, flags, tmp_path):
    run(script, *flags, "--max_steps", 3, "--output_dir", tmp_path, processes=2)
    assert read_log(tmp_path)[0]["processes"] == 2
    assert np.isfinite(list(read_log(tmp_path)[-1].values())).all()


@slow
@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("name", ["classify", "segment"])
def test_processes_measure_the_same_to_the_last_digit(name, processes, trained):
    folder = "masked" if name == "segment" else "images"
    flags = ["--eval_only", "--init", f"{name}/checkpoint.pt", "--data", folder]
    assert run(FINE, *flags, processes=processes).stdout == run_here(FINE, *flags)


@slow
@pytest.mark.parametrize("flags,sentence", [
    (["--head_norm", "batch", "--batch_size", 2], "error: vit_nano cannot train on batches of 1"),
    (["--batch_size", 9], "error: --batch_size 9 is not a multiple of 2 processes")])
def test_two_processes_end_in_one_sentence(flags, sentence, tmp_path):
    result = run(FINE, *VIT, *flags, "--output_dir", tmp_path, processes=2, check=False)
    assert result.returncode != 0
    assert result.stderr.count(sentence) == 1


# ---------------------------------------------------------------- one sentence for what the user can mend

INIT, DONE = ["--init", "energy/backbone.pt"], ["--init", "classify/checkpoint.pt"]
FREEZE = [*TRAIN, "--freeze_generator"]


@pytest.mark.parametrize("script,flags,sentence", [
    (ENERGY, ["--model", "vit_huge"], "invalid choice: 'vit_huge'"),
    (ENERGY, ["--img_size", 18], "--img_size 18 is not a multiple of --patch_size 4"),
    (ENERGY, ["--batch_size", 15, "--accum_steps", 2], "15 is not a multiple of 1 processes x 2"),
    (ENERGY, ["--batch_size", 64], "has 24 training images, fewer than --batch_size 64"),
    (ENERGY, ["--data", "nowhere"], "--data nowhere is no folder"),
    (ENERGY, ["--data", "bad/empty"], "no image files to train on"),
    (ENERGY, ["--output_dir", "bad/page.pt/runs"], "cannot write to --output_dir"),
    (ENERGY, [*RESNET, "--corrupt", "sort"], "choose a ViT"),
    (ENERGY, [*AUTO, *RESNET], "--method autoencoder is for ViTs"),
    (ENERGY, [*AUTO, "--energy_steps", 1], "--energy_steps and --alpha are for --method energy"),
    (ENERGY, ["--model", "convnext_t"], "convnext_t cannot take --img_size 16"),
    (ENERGY, ["--device", "nonsense"], "--device nonsense does not work here"),
    (ENERGY, ["--lr", 1e8, "--clip_grad", 0], "the loss is not finite at or before step"),
    *[(ENERGY, flag.split(), f"{flag.split()[0]}: ") for flag in (
        "--mask_ratio 1.5", "--lr nan", "--lr inf", "--lr 0", "--clip_grad -1", "--seed -1", "--max_steps 0",
        "--epochs 0", "--num_workers -1", "--weight_decay -0.1", "--energy_steps -1", "--img_size x")],
    (CIM, ["--generator", "mae", "--objective", "revdet"], "--generator mae has no tokens to sample or to"),
    (CIM, ["--generator", "mae", "--tokenizer", "dalle"], "leave --tokenizer and --sampling out"),
    (CIM, ["--generator", "erase", "--freeze_generator", "x"], "needs an enhancer to train and a generator"),
    (CIM, ["--objective", "none", *RESNET], "a ViT, not resnet_nano: choose a ViT"),
    (CIM, ["--share", 9], "--share 9: generator and enhancer have at most 4 blocks"),
    (CIM, ["--mask_ratio", 0.6, 0.4], "give the lower fraction first"),
    (CIM, ["--mask_ratio", 0.02, 0.4], "of 16 patches at least one"),
    (CIM, ["--img_size", 18], "it must divide --img_size 18"),
    (CIM, ["--generator", "mae", *RESNET, "--batch_size", 1], "needs at least two images at a time"),
    (CIM, ["--tokenizer", "dalle"], "encoder.pkl (no network): put it into --tokenizer_dir tokenizer"),
    (CIM, ["--tokenizer", "vqgan"], "vqgan.ckpt is missing"),
    (CIM, ["--tokenizer", "vqgan", "--tokenizer_dir", "bad/page"], "is a text file, perhaps a web page"),
    (CIM, [*TRAIN, "--tokenizer_dir", "bad/page"], "dvae.pt is a text file"),
    (CIM, [*FREEZE, "bad/none.pt"], "dvae.pt is missing"),
    (CIM, [*FREEZE, "cim/checkpoint.pt", "--gen_depth", 2], "--gen_depth was 4, and is 2 here"),
    (CIM, [*FREEZE, "cim/checkpoint.pt", "--model", "vit_t"], "size mismatch for"),
    (CIM, [*FREEZE, "cim/dvae.pt"], "does not fit ('args')"),
    (FINE, ["--init", "nowhere.pt"], "--init nowhere.pt is missing: give a backbone.pt"),
    (FINE, ["--init", "bad/page.pt"], "page.pt is a text file, perhaps a web page: give a backbone.pt"),
    (FINE, ["--init", "bad/list.pt"], "list.pt holds no weights"),
    (FINE, ["--init", "bad/unknown.pt"], "does not fit --model vit_huge, --patch_size 4 (there is no model"),
    (FINE, ["--init", "bad/nan.pt"], "--patch_size 4 (has NaN in cls_token)"),
    (FINE, [*INIT, *RESNET], "(has no conv1.weight"),
    (FINE, [*INIT, "--patch_size", 8], "has patch_embed.proj.weight of shape (96, 3, 4, 4), not (96, 3"),
    (FINE, [*INIT, "--eval_only"], "--eval_only measures a checkpoint.pt of finetune.py"),
    (FINE, [*DONE, "--eval_only", "--img_size", 64], "as it was trained, with --img_size 16: leave"),
    (FINE, [*DONE, "--eval_only", "--data", "bad/two"], "(only in the checkpoint: b, c; only in --d"),
    (FINE, ["--eval_only"], "out/checkpoint.pt is missing"),
    (FINE, [*INIT, "--output_dir", "energy"], "energy holds the checkpoint.pt of an earlier run"),
    (FINE, [*DONE, "--output_dir", "classify", "--resume"], "checkpoint.pt (it is of finetune.py --"),
    (FINE, [*VIT, "--label_fraction", 0.1], "has 3 training images, fewer than --batch_size 8"),
    (FINE, [*VIT, "--head_norm", "batch", "--batch_size", 1], "vit_nano cannot train on batches of 1"),
    (FINE, ["--model", "convnext_t", "--img_size", 16], "convnext_t cannot train on batches of 2"),
    (FINE, [*RESNET, "--layer_decay", 0.5], "--layer_decay is for ViTs"),
    (FINE, ["--data", "bad/other"], "classes differ (only in train: a; only in val: b)"),
    (FINE, [*VIT, "--num_classes", 5], "--task classify takes no --num_classes"),
    (FINE, [*SEGMENT, *VIT, "--recipe", "cim"], "--task segment takes no --recipe"),
    (FINE, [*SEGMENT, *VIT, "--data", "nowhere"], "no image files in nowhere/images/validation"),
    (FINE, [*SEGMENT, *VIT, "--num_classes", 2], "has the label 3, above --num_classes 2"),
    (FINE, [*SEGMENT, *VIT, "--data", "bad/sizes"], ".png is (7, 9), its image (2"),
    (FINE, [*SEGMENT, *VIT, "--data", "bad/blank"], "all pixels of the validation masks are 0, unlabelled"),
    (FINE, ["--mixup", "nan"], "--mixup: nan is not between 0 and 100")], ids=str)
def test_bad_input_is_one_sentence(script, flags, sentence, bad, tmp_path, monkeypatch):
    def offline(*args):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    assert sentence in stops_with(script, "--epochs", 1, "--output_dir", tmp_path / "out", *flags)
    assert not (tmp_path / "out/checkpoint.pt").exists()
    if not any(word in sentence for word in ("finite", "all pixels", ".png is", "has the label")):
        assert not (tmp_path / "out/log.jsonl").exists()              # these alone show while training


def set_to(name, value):
    def change(path):
        torch.save(torch.load(path, weights_only=True) | {name: value}, path)
    return change


@pytest.mark.parametrize("flags,change,sentence", [
    ([], None, "holds the checkpoint.pt of an earlier run"),
    (["--resume", "--corrupt", "sort"], None, "--corrupt color, now sort"),
    (["--resume", "--energy_steps", 1], None, "--energy_steps 2, now 1"),
    (["--resume", "--seed", 1], None, "--seed 0, now 1"),
    (["--resume", "--batch_size", 16], None, "--batch_size 8, now 16"),
    (["--resume"], set_to("model", {}), "(RuntimeError: "),
    (["--resume"], set_to("optimizer", {}), "(KeyError: "),
    (["--resume"], set_to("args", [1]), "(AttributeError: "),
    (["--resume"], set_to("script", "finetune"), "is of finetune.py"),
    (["--resume"], lambda path: os.truncate(path, 1000), "checkpoint.pt is truncated")], ids=str)
def test_checkpoints_that_do_not_fit(flags, change, sentence, trained, tmp_path):
    shutil.copytree("energy", tmp_path / "run")
    if change:
        change(tmp_path / "run/checkpoint.pt")
    flags = ["--corrupt", "color", "--epochs", 2, "--output_dir", tmp_path / "run", *flags]
    assert sentence in stops_with(ENERGY, *flags)
    assert read_log(tmp_path / "run") == read_log("energy")


def test_what_may_change_is_printed(trained, tmp_path):
    shutil.copytree("energy", tmp_path / "run")
    flags = ["--corrupt", "color", "--epochs", 3, "--lr", 5e-4, "--amp", "fp16", "--resume"]
    printed = run_here(ENERGY, *flags, "--output_dir", tmp_path / "run")
    assert "--lr 0.001, now 0.0005" in printed
    assert "--epochs 2, now 3" in printed


@pytest.mark.parametrize("error,sentence", [
    (data.BadInput("Caught BadInput in worker\nTraceback ...\ndata.BadInput: cannot read x.jpg"),
     "error: cannot read x.jpg"),
    (KeyboardInterrupt(), "error: stopped; --resume"),
    (OSError(28, "No space left on device", "log.jsonl"), "error: [Errno 28] No space left on device"),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), "Lower --num_workers"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), "error: CUDA out of memory."),
    (RuntimeError("a mistake of ours"), None)], ids=str)                # that one keeps its traceback
def test_errors_end_in_a_sentence(error, sentence):
    def main():
        raise error

    with pytest.raises(SystemExit if sentence else RuntimeError) as stop:
        ENERGY.run(main)
    assert (sentence or "a mistake of ours") in stop.value.args[0]


def test_a_full_disk_keeps_the_earlier_file(tmp_path):
    path = str(tmp_path / "file")
    ENERGY.write_file(path, lambda name: open(name, "w").write("earlier"))

    def fails(name):
        open(name, "w").write("half")
        raise OSError("No space left on device")

    with pytest.raises(data.BadInput, match="No space left on device.: the earlier one is kept"):
        ENERGY.write_file(path, fails)
    assert open(path).read() == "earlier"
    assert os.listdir(tmp_path) == ["file"]


def test_a_folder_has_one_run(tmp_path):
    lock = ("import fcntl, time; file = open('.lock', 'a'); "
            "fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB); print(1, flush=True)")
    command = [sys.executable, "-c", lock + "; time.sleep(60)"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline()
        with pytest.raises(data.BadInput, match="is in use by another run"):
            ENERGY.open_output(str(tmp_path), False)
        other.kill()
    assert ENERGY.open_output(str(tmp_path), False) is False
    assert b"BlockingIOError" in subprocess.run(command, cwd=tmp_path, capture_output=True).stderr


def test_collapse_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(ENERGY.EnergyModel, "restore", lambda model, x, **context: x + 0 * model.scale)
    monkeypatch.setattr(ENERGY, "calibrate_and_freeze_unused", lambda *args: [])
    monkeypatch.setattr(torch.Tensor, "backward", lambda self: None)
    assert "training has collapsed" in run_here(ENERGY, "--max_steps", 1, "--output_dir", tmp_path)

"""pytest: on a CPU, without network, in minutes. The real scripts run at toy size, two processes included."""
import argparse
import contextlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import types
from collections import OrderedDict

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

import cim_pretrain
import data
import energy_pretrain
import finetune
import models

SCRIPTS = ("energy_pretrain.py", "cim_pretrain.py", "finetune.py")
HERE = os.path.dirname(os.path.abspath(__file__))
TINY = ["--model", "vit_nano", "--img_size", "16", "--patch_size", "4", "--batch_size", "16", "--lr", "1e-3",
        "--num_workers", "2", "--device", "cpu"]


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """48 training and 12 held-out pictures as files, one each gray, palette, RGBA and CMYK."""
    root = tmp_path_factory.mktemp("pictures")
    for split, length in (("train", 48), ("val", 12)):
        (root / split / "a").mkdir(parents=True)
        shapes = data.Shapes(split == "train", 24)
        for i in range(length):
            mode = {0: "L", 1: "P", 2: "RGBA", 3: "CMYK"}.get(i, "RGB")
            name = f"{i:03d}.{'png' if mode in ('P', 'RGBA') else 'jpg'}"
            shapes[i][0].convert(mode).save(root / split / "a" / name)
    return str(root)


def run(script, *args, processes=1, check=True):
    """Runs a script as a user does; -> CompletedProcess."""
    command = [sys.executable] if processes == 1 else \
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command += [os.path.join(HERE, script), *map(str, args)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert not check or result.returncode == 0, result.stderr
    return result


def read_log(output_dir):
    with open(os.path.join(output_dir, "log.jsonl")) as file:
        return [json.loads(line) for line in file]


def weights(output_dir, name="checkpoint.pt"):
    return torch.load(os.path.join(output_dir, name), weights_only=True)["model"]


def tiny_vit(**options):
    return models.ViT(dim=16, depth=2, heads=2, img_size=16, patch_size=4, **options)


def tiny_energy(backbone=None, seed=0, **options):
    """An EnergyModel, ready to train, and a corrupted batch (x, target, context) for it."""
    torch.manual_seed(seed)
    model = energy_pretrain.EnergyModel(backbone or tiny_vit(), **options)
    images = torch.randn(4, 3, 16, 16)
    batch = data.gray(images, None), images, {}
    energy_pretrain.prepare(model, *batch)
    return model, batch


# ---------------------------------------------------------------- models

def test_resnet_is_torchvisions():
    ours, theirs = models.build_model("resnet50", norm="batch"), torchvision.models.resnet50()
    missing = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert missing.missing_keys == ["fc.weight", "fc.bias"] and not missing.unexpected_keys
    theirs.fc = nn.Identity()
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(ours(images), theirs(images))          # in training mode: batch statistics too


BACKBONES = ["vit_nano", "resnet_nano", "convnext_t", "swin_t"]


@pytest.mark.parametrize("name", BACKBONES)
def test_backbone_interface(name):
    model, images = models.build_model(name, img_size=64, norm="group"), torch.randn(2, 3, 64, 64)
    assert model(images).shape == (2, model.width)
    assert model.forward_map(images).shape == (2, model.width, 64 // model.stride, 64 // model.stride)


def test_patch_embed_is_the_convolution():
    embed, images = models.PatchEmbed(8, 4), torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(embed(images), embed.proj(images).flatten(2).transpose(1, 2))


def test_vit_parts():
    images = torch.randn(2, 3, 16, 16)
    vit = tiny_vit(pool="mean")
    torch.testing.assert_close(vit(images), vit.forward_map(images).mean(dim=(2, 3)))
    everything = torch.arange(16).expand(2, -1)
    order = torch.stack([torch.randperm(16), torch.randperm(16)])  # order is nothing, position all
    pos_embed = vit.pos_embed[0, 1:]
    torch.testing.assert_close(vit(images, pos_embed[order], order), vit(images))
    torch.testing.assert_close(vit(images, pos_embed[everything], everything), vit(images))
    assert not vit.pos_embed.requires_grad and tiny_vit(pos_embed="learned").pos_embed.requires_grad
    assert len({tuple(row) for row in models.sincos_2d(16, 4)[0].round(decimals=4).tolist()}) == 16


# ---------------------------------------------------------------- data

def test_shapes_are_deterministic_and_held_out():
    train, again, val = data.Shapes(True, 32), data.Shapes(True, 32), data.Shapes(False, 32)
    assert np.array_equal(train[7][0], again[7][0]) and train[7][1] == 7
    assert not np.array_equal(train[7][0], val[7][0])


def test_folder_modes_split_and_keys(folder):
    train, val = (data.unlabelled_dataset(folder, split, 16) for split in (True, False))
    assert (len(train), len(val)) == (48, 12) and all(train[i][0].mode == "RGB" for i in range(5))
    tree_train, tree_val = (data.unlabelled_dataset(folder + "/train", split, 16) for split in (True, False))
    assert len(tree_train) + len(tree_val) == 48 and not set(tree_train.paths) & set(tree_val.paths)
    crops = data.Transformed(train, data.pretrain_transform(16), seed=0)
    torch.manual_seed(1)
    first = crops[0, 5][0]
    torch.manual_seed(2)
    assert torch.equal(first, crops[0, 5][0]) and not torch.equal(first, crops[1, 5][0])


def test_order_does_not_depend_on_processes():
    def epoch(rank, world, skip=0):
        sampler = data.EpochSampler(range(40), world, rank, seed=3, drop_last=True)
        sampler.set_epoch(2)
        sampler.skip = skip
        return list(sampler)
    both = [pair for pairs in zip(epoch(0, 2), epoch(1, 2)) for pair in pairs]
    assert both == epoch(0, 1) and epoch(0, 1, skip=8) == epoch(0, 1)[8:] and both[0][0] == 2


@pytest.fixture(scope="module")
def noise_images():
    return torchvision.transforms.v2.functional.normalize(torch.rand(400, 3, 32, 32), data.MEAN, data.STD)


def blank(corrupted):
    return (corrupted == 0).all(dim=1)                                # (B, H, W), True = blanked


def test_mask_grid(noise_images):
    out = data.mask_grid(noise_images, torch.Generator(), cell=4, ratio=0.75)
    mask = blank(out)
    assert (mask.sum(dim=(1, 2)) == 48 * 16).all()                    # 48 of 64 cells, in every image
    assert torch.equal(mask, mask[:, ::4, ::4].repeat_interleave(4, 1).repeat_interleave(4, 2))
    assert torch.equal(out[:, 0][~mask], noise_images[:, 0][~mask])
    assert mask.float().mean(dim=0).sub(0.75).abs().max() < 0.12      # every cell as often as the others


@pytest.mark.parametrize("count,area", [(75, (0.01, 0.025)), (25, (0.02, 0.05))])
def test_mask_random(noise_images, count, area):
    images = noise_images[:64].repeat(1, 1, 2, 2)
    one = blank(data.mask_random(images, torch.Generator(), 1, area)).float()
    share, height, width = one.mean(dim=(1, 2)), one.amax(dim=2).sum(dim=1), one.amax(dim=1).sum(dim=1)
    torch.testing.assert_close(share * 64 * 64, height * width)       # one full rectangle
    assert area[0] * 0.8 < share.min() and share.max() < area[1] * 1.2
    assert share.mean().item() == pytest.approx(sum(area) / 2, rel=0.1)
    aspect = height / width
    assert aspect.min() > 0.4 and aspect.max() < 2.5 and aspect.mean().item() == pytest.approx(1.25, abs=0.15)
    # Many rectangles: what as many drawn one by one in a loop blank, on average.
    generator = torch.Generator()
    loop = torch.zeros(64, 64, 64, dtype=torch.bool)
    for _ in range(count):
        loop |= blank(data.mask_random(images, generator, 1, area))
    many = blank(data.mask_random(images, generator, count, area)).float().mean().item()
    assert many == pytest.approx(loop.float().mean().item(), abs=0.03)


def test_low_resolution(noise_images):
    out = data.low_resolution(noise_images, None, scale=8)
    assert torch.equal(out, out[:, :, ::8, ::8].repeat_interleave(8, 2).repeat_interleave(8, 3))
    torch.testing.assert_close(out.mean(dim=(2, 3)), noise_images.mean(dim=(2, 3)), atol=0.05, rtol=0)


def test_noise():
    zeros, ones = torch.zeros(2000, 3, 8, 8), torch.ones(2000, 3, 8, 8)
    one_minus_gamma = data.noise(zeros, torch.Generator().manual_seed(1)).var(dim=(1, 2, 3))
    root_gamma = data.noise(ones, torch.Generator().manual_seed(1)).mean(dim=(1, 2, 3))
    quantiles = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9])
    torch.testing.assert_close(one_minus_gamma.quantile(quantiles), quantiles, atol=0.04, rtol=0)  # U(0, 1)
    torch.testing.assert_close(root_gamma.square() + one_minus_gamma, torch.ones(2000), atol=0.45, rtol=0)


def test_gray(noise_images):
    rgb, grey = data.denormalize(noise_images), data.denormalize(data.gray(noise_images, None))
    torch.testing.assert_close(grey[:, 0], grey[:, 1])
    torch.testing.assert_close(grey[:, 0], grey[:, 2])
    torch.testing.assert_close(grey[:, 0], 0.299 * rgb[:, 0] + 0.587 * rgb[:, 1] + 0.114 * rgb[:, 2])


def test_mix_is_uniform():
    kinds = [lambda images, generator, k=k: torch.full_like(images, k) for k in range(4)]
    out = data.mix(torch.zeros(4000, 3, 2, 2), torch.Generator(), kinds)
    assert (out == out[:, :1, :1, :1]).all()                          # one corruption for the whole image
    assert all(900 < n < 1100 for n in out[:, 0, 0, 0].int().bincount(minlength=4).tolist())


@pytest.mark.parametrize("patch_size,blanked", [(16, {60, 112}), (4, {12})])
def test_blank_patch_edges(patch_size, blanked):
    mask = data.blank_patch_edges(torch.ones(40, 3, 32, 32), torch.Generator(), patch_size)[:, :1] == 0
    patches = F.unfold(mask.float(), patch_size, stride=patch_size)   # (B, p*p, N)
    counts = patches.sum(dim=1)
    assert set(counts.flatten().tolist()) == blanked                  # p^2 - (p-2k)^2 pixels for k = 1, 2
    if len(blanked) == 2:
        assert abs((counts == 60).float().mean().item() - 0.5) < 0.12
        square = patches[0, :, 0].view(16, 16)
        assert square[0].all() and square[:, -1].all() and not square[2:-2, 2:-2].any()


# ---------------------------------------------------------------- the energy step

@pytest.mark.parametrize("name", ["vit-cls", "vit-mean", "vit-predicted", "resnet"])
def test_gradients_equal_finite_differences(name):
    """The weights' gradient of eq. (5), which runs through dE/dx, against central differences in float64."""
    torch.manual_seed(0)
    backbone = tiny_vit(pool="mean" if name == "vit-mean" else "cls")
    if name == "resnet":
        backbone = models.ResNet((1, 1, 1, 1), width=4, norm="group", small_images=True)
    model, (x, target, _) = tiny_energy(backbone, alpha="predicted" if name == "vit-predicted" else "learned")
    model, x, target = model.double(), x.double(), target.double()
    model(x, target)[0].backward()
    checked = 0
    for param in model.parameters():
        if param.requires_grad:
            direction = torch.randn_like(param)
            direction /= direction.norm()
            values = []
            for sign in (1, -1):
                with torch.no_grad():
                    param += sign * 1e-7 * direction                  # so small that no ReLU crosses its kink
                    values.append(model(x, target)[0].item())
                    param -= sign * 1e-7 * direction
            expected = (values[0] - values[1]) / 2e-7
            assert (param.grad * direction).sum().item() == pytest.approx(expected, rel=1e-3, abs=1e-7)
            checked += expected != 0
    assert checked > 15


def test_step_equals_autograd_and_starts_at_scale():
    model, (x, target, _) = tiny_energy()
    leaf = x.clone().requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):
        energy = model.scale * model.head(model.backbone(leaf)).sum()
        gradient, = torch.autograd.grad(energy, leaf, create_graph=True)
    torch.testing.assert_close(model.restore(x), x - 0.1 * gradient)
    assert gradient.square().mean().sqrt().item() == pytest.approx(1, abs=1e-3)
    with torch.no_grad():
        torch.testing.assert_close(model.restore(x), x - 0.1 * gradient)


def test_images_do_not_influence_each_other():
    model, (x, _, _) = tiny_energy(alpha="predicted")
    torch.testing.assert_close(model.restore(x)[:1], model.restore(x[:1]))


def test_compiled_step_has_the_same_gradients():
    model, (x, target, _) = tiny_energy(models.ViT(dim=16, depth=1, heads=2, img_size=16, patch_size=4))
    model(x, target)[0].backward()
    eager = [param.grad.clone() for param in model.parameters() if param.requires_grad]
    model.zero_grad()
    model.compile()
    model(x, target)[0].backward()
    for param, expected in zip((p for p in model.parameters() if p.requires_grad), eager):
        torch.testing.assert_close(param.grad, expected, rtol=1e-3, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_gradients(dtype):
    model, (x, target, _) = tiny_energy()
    norms = []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", dtype, enabled=enabled):
            loss, restored = model(x, target)
        assert loss.dtype == restored.dtype == torch.float32
        (loss * 1024).backward()
        norms.append(torch.stack([p.grad.norm() for p in model.parameters() if p.requires_grad]))
    torch.testing.assert_close(norms[1], norms[0], rtol=0.1, atol=0.02 * norms[0].max().item())


def test_training_restores():
    """A little training on some pictures halves the error of missing colour, after one step and after two."""
    model, _ = tiny_energy()
    center, shapes = data.center_transform(16), data.Shapes(True, 16)
    target = torch.stack([center(shapes[i][0]) for i in range(16)])
    x = data.gray(target, None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        x_n, losses = x, []
        for _ in range(2):
            loss, x_n = model(x_n, target)
            loss.backward()
            losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    assert max(losses) < 0.5 * F.mse_loss(x, target).item()


def test_sort_moves_only_the_position_embedding():
    vit = tiny_vit()
    before = vit.pos_embed.clone()
    torch.manual_seed(0)
    model, images = energy_pretrain.EnergyModel(vit), torch.randn(4, 3, 16, 16)
    x, target, context = energy_pretrain.start("sort", images, torch.Generator(), None, vit)
    energy_pretrain.prepare(model, x, target, context)
    keep = context["keep"]
    assert x.shape == target.shape == (4, 8, 16) and all(len(set(row)) == 8 for row in keep.tolist())
    torch.testing.assert_close(target, before[0, 1:][keep])
    places = energy_pretrain.nearest_position(vit.pos_embed[:, 1:], x)
    assert all(len(set(row)) == 8 for row in places.tolist()) and not torch.equal(places, keep)
    assert x.norm(dim=2).min() > 0  # not the class token's entry, zero
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(x, target, **context)[0].backward()
    optimizer.step()
    assert torch.equal(vit.pos_embed, before) and vit.pos_embed.grad is None
    # Dropped patches have no influence; pictures pasted at their true places are the pictures.
    dropped = F.unfold(context["images"], 4, stride=4).scatter(2, keep[:, None].expand(-1, 48, -1), 0)
    other = F.fold(dropped, (16, 16), 4, stride=4) * 7 + context["images"]
    torch.testing.assert_close(model.restore(x, images=other, keep=keep), model.restore(x, **context))
    pasted = energy_pretrain.paste_patches(vit, target, context["images"], keep)
    torch.testing.assert_close(pasted + F.fold(dropped, (16, 16), 4, stride=4), context["images"])


# ---------------------------------------------------------------- several processes

def _ddp_worker(rank, init_file, out_folder):
    """Two steps of training on a fixed batch, each of two processes with its half of it."""
    torch.set_num_threads(1)                                          # more would fight for the cores
    dist.init_process_group("gloo", init_method=f"file://{init_file}", rank=rank, world_size=2)
    for name in BACKBONES:
        model, _ = _train(name, DistributedDataParallel, slice(rank, None, 2))
        torch.save(model.state_dict(), f"{out_folder}/{name}{rank}.pt")
    dist.destroy_process_group()


def _train(name, wrap, part):
    torch.manual_seed(0)
    model = energy_pretrain.EnergyModel(models.build_model(name, img_size=32, patch_size=8, norm="group"))
    images = torch.randn(4, 3, 32, 32)
    x, target = data.gray(images, None), images
    energy_pretrain.prepare(model, x, target, {})
    wrapped = wrap(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(2):
        loss, _ = wrapped(x[part], target[part])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return model, losses


def test_ddp_equals_one_process(tmp_path):
    mp.spawn(_ddp_worker, (str(tmp_path / "init"), str(tmp_path)), nprocs=2)
    for name in BACKBONES:
        first, second = (torch.load(tmp_path / f"{name}{rank}.pt", weights_only=True) for rank in (0, 1))
        assert all(torch.equal(first[key], second[key]) for key in first)
        alone, losses = _train(name, lambda model: model, slice(None))
        assert losses[0] != losses[1]
        for key, value in alone.state_dict().items():
            torch.testing.assert_close(first[key], value, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- the script, as a user runs it

def test_script_processes_accumulation_and_outputs(folder, tmp_path):
    """Gray is no random corruption: two processes, and four parts, must give what one process gives."""
    flags = [*TINY, "--data", folder, "--corrupt", "color", "--epochs", "2"]
    run("energy_pretrain.py", *flags, "--output_dir", tmp_path / "one")
    run("energy_pretrain.py", *flags, "--output_dir", tmp_path / "two", processes=2)
    run("energy_pretrain.py", *flags, "--output_dir", tmp_path / "parts", "--accum_steps", "4")
    one = weights(tmp_path / "one")
    for other in ("two", "parts"):
        for key, value in weights(tmp_path / other).items():
            torch.testing.assert_close(value, one[key], rtol=1e-3, atol=2e-4)
    log, log_two = read_log(tmp_path / "one"), read_log(tmp_path / "two")
    assert [line.get("epoch") for line in log] == [None, 1, 2] and log[0]["model"] == "vit_nano"
    assert log[2]["psnr_color_2"] == pytest.approx(log_two[2]["psnr_color_2"], abs=0.02)
    assert {"loss", "lr", "img_per_s", "peak_mem_mb", "psnr_color_0", "psnr_color_1", "alpha"} <= set(log[1])
    backbone = torch.load(tmp_path / "one" / "backbone.pt", weights_only=True)
    config = backbone["config"]
    assert config.pop("mean") == data.MEAN and config.pop("std") == data.STD
    models.build_model(**config).load_state_dict(backbone["model"])
    picture = Image.open(tmp_path / "one" / "samples" / "epoch_0002.png")
    assert picture.size == (6 * 98 + 2, 8 * 98 + 2)  # 8 pictures: original, corrupted, 4 steps


@pytest.mark.parametrize("script,flags", [
    ("energy_pretrain.py", []),
    ("cim_pretrain.py", ["--dvae", "train", "--dvae_steps", "3", "--objective", "revdet"]),
    ("finetune.py", ["--batch_size", "8"])])
def test_killed_and_resumed_is_bit_identical(script, flags, folder, labelled, tmp_path):
    flags = [*TINY, *flags, "--epochs", "10", "--data", labelled if script == "finetune.py" else folder,
             "--output_dir"]
    run(script, *flags, tmp_path / "whole")
    command = [sys.executable, os.path.join(HERE, script), *flags, tmp_path / "killed"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    while not os.path.exists(tmp_path / "killed" / "checkpoint.pt"):
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(np.random.default_rng().uniform(0, 0.3))               # a random moment of a later epoch
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert torch.load(tmp_path / "killed" / "checkpoint.pt", weights_only=True)["step"] < 27
    # Stopped once more, in the middle of an epoch, before it goes on to the end.
    run(script, *flags, tmp_path / "killed", "--resume", "--max_steps", "28")
    run(script, *flags, tmp_path / "killed", "--resume")
    whole, resumed = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


@pytest.mark.parametrize("flags", [
    ["--corrupt", "sort", "--alpha", "predicted"], ["--corrupt", "random_small", "--amp", "bf16"],
    ["--corrupt", "random_large", "--amp", "fp16", "--energy_steps", "1"],
    ["--model", "resnet_nano", "--corrupt", "sr", "--clip_grad", "0"]])
def test_script_options(flags, folder, tmp_path):
    run("energy_pretrain.py", *TINY, "--data", folder, *flags, "--max_steps", "2", "--output_dir", tmp_path)
    line = read_log(tmp_path)[1]
    assert np.isfinite(line["loss"]) and any(key.startswith(("psnr", "sorted")) for key in line)


def stops_with(monkeypatch, capsys, flags, script=energy_pretrain):
    """The one sentence with which the script's main() ends."""
    monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, flags)])
    with pytest.raises((SystemExit, data.BadInput)) as stop:
        script.main()
    assert stop.value.args[0] != 0
    message = stop.value.args[0]
    return message if isinstance(message, str) else capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("flags,sentence", [
    (["--model", "vit_huge"], "invalid choice: 'vit_huge'"),
    (["--img_size", "18"], "--img_size 18 is not a multiple of --patch_size 4"),
    (["--batch_size", "15", "--accum_steps", "2"], "--batch_size 15 is not a multiple of 1 processes x 2"),
    (["--batch_size", "64"], "has 48 training pictures, fewer than --batch_size 64"),
    (["--data", "nowhere"], "--data nowhere is no folder"),
    (["--data", "TMP/empty"], "no image files to train on"),
    (["--output_dir", "TMP/file/runs"], "cannot write to --output_dir"),
    (["--model", "resnet_nano", "--corrupt", "sort"], "choose a ViT"),
    (["--mask_ratio", "1.5"], "--mask_ratio 1.5: must be above 0"),
    (["--device", "nonsense"], "--device nonsense does not work here"),
])
def test_bad_input_is_one_sentence(flags, sentence, folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    flags = [flag.replace("TMP", str(tmp_path)) for flag in flags]
    flags = [*TINY, "--data", folder, "--output_dir", tmp_path / "out", *flags]
    assert sentence in stops_with(monkeypatch, capsys, flags)


def test_bad_checkpoints(folder, tmp_path, monkeypatch, capsys):
    flags = [*TINY, "--data", folder, "--output_dir", tmp_path, "--num_workers", "0", "--max_steps", "1"]
    monkeypatch.setattr(sys, "argv", ["energy_pretrain.py", *map(str, flags)])
    energy_pretrain.main()
    path = tmp_path / "checkpoint.pt"
    assert "add --resume" in stops_with(monkeypatch, capsys, flags)
    assert "of another model" in stops_with(monkeypatch, capsys, [*flags, "--resume", "--corrupt", "sort"])
    flags += ["--resume"]
    assert "of another model" in stops_with(monkeypatch, capsys, [*flags, "--model", "resnet_nano"])
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
    assert "damaged or no checkpoint" in stops_with(monkeypatch, capsys, flags)


def test_infinite_loss_and_unreadable_image_are_one_sentence(folder, tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "val").symlink_to(folder + "/val")
    for i in range(16):
        data.Shapes(True, 24)[i][0].save(tmp_path / "train" / f"{i}.jpg")
    flags = [*TINY, "--data", tmp_path, "--clip_grad", 0, "--output_dir"]
    result = run("energy_pretrain.py", *flags, tmp_path / "nan", "--lr", "1e30", check=False)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "the weights are not finite after step 1" in result.stderr and len(result.stderr.splitlines()) == 1
    with pytest.raises(SystemExit, match="the loss at step 7 is nan"):
        energy_pretrain.check_finite([torch.tensor(1.0), torch.tensor(float("nan")), torch.tensor(1.0)], 8)
    broken = tmp_path / "train" / "5.jpg"
    broken.write_bytes(broken.read_bytes()[:200])
    result = run("energy_pretrain.py", *flags, tmp_path / "out", check=False)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert str(broken) in result.stderr and len(result.stderr.splitlines()) == 1


# ---------------------------------------------------------------- fine-tuning

FAST = ["--batch_size", "8", "--lr", "1e-3", "--num_workers", "0", "--device", "cpu"]


def run_here(script, *flags):
    """script.main() in this process, which is faster than in another; -> its last line."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        patch.setattr(sys, "argv", [script.__name__, *map(str, flags)])
        script.main()
    return out.getvalue().splitlines()[-1]


def fine_tune(*flags):
    return run_here(finetune, *FAST, *flags)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """Three classes: 24 pictures to train on, and 37 held out, which neither 2 nor 3 processes divide."""
    root = tmp_path_factory.mktemp("labelled")
    for split, length in (("train", 24), ("val", 37)):
        shapes = data.Shapes(split == "train", 20)
        for i in range(length):
            (root / split / "abc"[i % 3]).mkdir(parents=True, exist_ok=True)
            shapes[10 * i + i % 3][0].save(root / split / "abc"[i % 3] / f"{i:02d}.png")
    return root


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
    """Images of different sizes with masks of their grey levels, 0 = unlabelled to 3, in ADE20K's layout."""
    root = tmp_path_factory.mktemp("masked")
    for split, length in (("training", 8), ("validation", 5)):
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True)
        for i in range(length):
            image = data.Shapes(True, 40)[i][0].crop((0, 0, 40, 20 + i))
            image.save(root / "images" / split / f"{i}.png")
            mask = np.array(image.convert("L")) // 64
            mask[:3] = 0
            Image.fromarray(mask).save(root / "annotations" / split / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def trained(labelled, masked, tmp_path_factory):
    """What energy_pretrain.py wrote after a step, fine-tuned with no flag of the model repeated."""
    root = tmp_path_factory.mktemp("trained")
    run("energy_pretrain.py", *TINY, "--data", labelled, "--max_steps", 1, "--output_dir", root / "energy")
    run("finetune.py", *FAST, "--init", root / "energy/backbone.pt", "--data", labelled, "--epochs", 2,
        "--output_dir", root / "classify")
    fine_tune("--init", root / "energy/checkpoint.pt", "--task", "segment", "--num_classes", 3,
              "--img_size", 16, "--data", masked, "--epochs", 2, "--output_dir", root / "segment")
    return root


def test_scripts_share_their_blocks():
    def block(name):
        with open(os.path.join(HERE, name)) as file:
            text = file.read()
        return text[text.index("- the same, to the letter, in all scripts\n"):text.index("- the loop\n")]
    assert len(block(SCRIPTS[0])) > 4000 and len({block(name) for name in SCRIPTS}) == 1


def test_recipes_are_the_papers(monkeypatch):
    def resolved(*flags, **found):
        monkeypatch.setattr(sys, "argv", ["finetune.py", *map(str, flags)])
        args = finetune.parse_args()
        finetune.resolve(args, found)
        return args
    names = ("epochs lr batch_size weight_decay layer_decay warmup_epochs clip_grad drop_path "
             "label_smoothing mixup cutmix randaug erasing repeats loss img_size test_size "
             "crop_ratio").split()
    vit, rsb, big = (5, 0, .1, .1, .8, 1, 9, .25, 1, "ce", 224, 224), (.012, 2048), ("bce", 224, 224)
    for flags, values in [
            ("vit_s", (200, 1e-3, 1024, .05, .75, *vit, .875)),
            ("vit_b", (100, 1e-3, 1024, .05, .75, *vit, .875)),
            ("vit_l", (50, 1e-3, 1024, .05, .75, *vit, .875)),
            ("vit_s --recipe short", (2, 1e-3, 32, .05, 1, .4, 0, .1, .1, 0, 0, 0, 0, 1, "ce", 224, 224,
                                        .875)),
            ("vit_s --recipe cim", (200, 3e-3, 1024, .05, .8, *vit, .95)),
            ("vit_b --recipe cim", (100, 3e-3, 1024, .05, .8, *vit, .95)),
            ("resnet50", (100, *rsb, .02, 1, 5, 0, 0, .1, .1, 1, 6, 0, 1, "bce", 160, 224, .95)),
            ("resnet50 --epochs 300", (300, *rsb, .02, 1, 5, 0, 0, 0, .1, 1, 7, 0, 3, *big, .95)),
            ("resnet50 --epochs 600", (600, *rsb, .01, 1, 5, 0, .05, .1, .2, 1, 7, 0, 3, *big, .95))]:
        args = resolved("--model", *flags.split())
        assert tuple(getattr(args, name) for name in names) == values, flags
        assert args.head_norm == ("batch" if "short" in flags else "layer")
    args = resolved("--batch_size", 512, "--mixup", 0, "--epochs", 10, model="vit_b", img_size=32)
    assert (args.model, args.lr, args.mixup, args.cutmix, args.warmup_epochs) == ("vit_b", 5e-4, 0, 1, 2)
    assert (args.img_size, args.test_size, args.crop_ratio) == (32, 32, 1)
    for model, values in (("vit_b", (127, 512, 3e-4, .8, 16, 1)), ("resnet50", (64, 512, 1e-2, 1, 16, .9))):
        args = resolved("--task", "segment", model=model, img_size=224)
        assert (args.epochs, args.img_size, args.lr, args.layer_decay, args.batch_size, args.power) == values
    randaug = data.finetune_transform(224, 9, 0.25).transforms[2]
    angles = randaug._AUGMENTATION_SPACE["Rotate"][0](randaug.num_magnitude_bins, 224, 224)
    assert angles[randaug.magnitude] == pytest.approx(27) and angles[-1] == 30        # 9 of 10


def test_schedules():
    rate = [finetune.learning_rate(step, 110, 10, 1.0, 1e-6) for step in range(111)]
    assert rate[0] == 0.1 and rate[9] == rate[10] == 1 and rate[110] == 1e-6
    assert rate[60] == pytest.approx((1 + 1e-6) / 2)
    rate = [finetune.poly_rate(step, 110, 10, 1.0, 0.9) for step in range(111)]
    assert rate[0] == 0.1 and rate[9] == rate[10] == 1 and rate[110] == 0 and rate[60] == 0.5 ** 0.9


def test_layer_decay_and_no_decay():
    model = finetune.Classifier(tiny_vit(pos_embed="learned"), 3)
    names = {param: name for name, param in model.named_parameters()}
    found = {names[param]: (group["lr_scale"], group["weight_decay"])
             for group in finetune.layer_groups(model, 0.05, 0.75) for param in group["params"]}
    assert set(names.values()) - set(found) == {"backbone.norm.weight", "backbone.norm.bias"}  # not in use
    for name, (scale, decay) in found.items():
        layer = 3 if name.startswith("head") else int(name.split(".")[2]) + 1 if ".blocks." in name else 0
        assert scale == 0.75 ** (3 - layer), name
        kernel = name.endswith("weight") and "norm" not in name and name != "head.0.weight"
        assert decay == (0.05 if kernel else 0), name
    groups = finetune.layer_groups(finetune.Classifier(models.build_model("resnet_nano"), 3), 0.02, 1.0)
    assert [(group["lr_scale"], group["weight_decay"]) for group in groups] == [(1, 0.02), (1, 0)]


def test_position_embeddings_of_another_size():
    """Smooth pictures at twice the size, in four times as many patches: the features stay close."""
    torch.manual_seed(0)
    small, large = (models.ViT(48, 2, 3, img_size=size, patch_size=4) for size in (32, 64))
    assert models.load_weights(large, small.state_dict()) == []
    images = F.interpolate(torch.randn(8, 3, 4, 4), size=(64, 64), mode="bicubic")
    half = F.interpolate(images, size=(32, 32), mode="bilinear", antialias=True)

    def distance(model):  # mean square, over that of two pictures
        expected = small.forward_map(half)
        error = (F.avg_pool2d(model.forward_map(images), 2) - expected).square().mean()
        return (error / (expected[:4] - expected[4:]).square().mean()).item()
    close = distance(large)
    large.pos_embed.data[:, 1:] = large.pos_embed[:, 1:].unflatten(1, (16, 16)).transpose(1, 2).flatten(1, 2)
    assert close < 0.05 and distance(large) > 10 * close              # x and y exchanged
    torch.testing.assert_close(models.resize_pos_embed(small.pos_embed, 8), small.pos_embed)


def test_every_key_is_accounted_for():
    for ours, theirs, head in (("resnet50", "resnet50", "fc"), ("swin_t", "swin_t", "head"),
                               ("convnext_t", "convnext_tiny", "classifier.2")):
        ours, theirs = models.build_model(ours).eval(), getattr(torchvision.models, theirs)().eval()
        assert models.load_weights(ours, theirs.state_dict()) == [head + ".weight", head + ".bias"]
        theirs.set_submodule(head, nn.Identity())
        image = torch.ones(1, 3, 64, 64)
        torch.testing.assert_close(ours(image), theirs(image))
    own = tiny_vit().state_dict()
    mae = own | {"mask_token": torch.zeros(1), "decoder_embed.weight": torch.zeros(1)}
    assert models.load_weights(tiny_vit(), mae) == ["mask_token", "decoder_embed.weight"]
    averaged = {key: value for key, value in own.items() if not key.startswith("norm.")}
    averaged_with_its_norm = averaged | {"fc_norm.weight": torch.ones(16)}
    assert models.load_weights(tiny_vit(), averaged_with_its_norm) == ["fc_norm.weight"]
    for weights, problem in ((averaged, "^has no norm.weight, has no norm.bias$"),
                             (own | {"surprise": torch.zeros(1)}, "^has surprise$"),
                             (own | {"cls_token": torch.zeros(1, 1, 8)},
                              r"^has cls_token of shape \(1, 1, 8\), not \(1, 1, 16\)$")):
        with pytest.raises(ValueError, match=problem):
            models.load_weights(tiny_vit(), weights)


def test_dilation_is_torchvisions_and_drop_path_linear():
    ours = models.build_model("resnet50", dilated=True).eval()
    theirs = torchvision.models.resnet50(replace_stride_with_dilation=[False, True, True]).eval()
    models.load_weights(ours, theirs.state_dict())
    theirs.fc, image = nn.Identity(), torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(ours(image), theirs(image))
    assert ours.forward_map(image).shape == (1, 2048, 8, 8)
    for name, count in (("vit_nano", 4), ("resnet_nano", 4), ("convnext_t", 18), ("swin_t", 12)):
        model = models.build_model(name, 32, 4, drop_rate=0.3)
        paths = [path for module in model.modules() for path in
                 (getattr(module, "drop_path", None), getattr(module, "stochastic_depth", None)) if path]
        rates = [getattr(path, "p", 0) for path in paths]
        assert rates == pytest.approx(np.linspace(0, 0.3, count).tolist())
    with torch.no_grad():  # equal pictures differ by what they skip
        pictures = torch.ones(64, 3, 32, 32)
        vit = models.build_model("vit_nano", 32, 4, drop_rate=0.3)
        assert len(vit(pictures).round(decimals=3).unique(dim=0)) > 4
        assert len(vit.eval()(pictures).round(decimals=3).unique(dim=0)) == 1


@pytest.mark.parametrize("probe,layers", [("linear", 1), ("mlp", 3)])
def test_probes_leave_the_backbone_alone(probe, layers):
    model = finetune.Classifier(models.build_model("resnet_nano", norm="batch"), 3, probe).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(finetune.layer_groups(model, 0.0, 1.0), lr=0.1)
    for _ in range(2):
        model(torch.randn(8, 3, 16, 16), torch.arange(8) % 3).backward()
        optimizer.step()
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert sum(isinstance(module, nn.Linear) for module in model.head) == layers
    assert changed == {key for key in before if key.startswith("head.")}


@pytest.mark.parametrize("head_norm", ["layer", "batch"])
def test_only_a_batch_norm_removes_what_all_images_have_in_common(head_norm):
    torch.manual_seed(0)
    model, images = finetune.Classifier(tiny_vit(), 4, head_norm=head_norm).train(), torch.randn(6, 3, 16, 16)
    nn.init.normal_(model.head[1].weight)
    before = model.logits(images)
    model.backbone.blocks[-1].mlp.fc2.bias.data += torch.randn_like(model.backbone.blocks[-1].mlp.fc2.bias)
    assert torch.allclose(before, model.logits(images), atol=1e-4) == (head_norm == "batch")


def test_losses():
    torch.manual_seed(0)
    model, images = finetune.Classifier(tiny_vit(), 4, label_smoothing=0.1), torch.randn(6, 3, 16, 16)
    assert 1e-5 < model.head[1].weight.abs().max() < 1e-4             # a thousandth of the usual
    nn.init.normal_(model.head[1].weight)
    labels = torch.tensor([0, 1, 2, 3, 0, 1])
    targets = F.one_hot(labels, 4) * 0.9 + 0.1 / 4
    p, q = model.logits(images).softmax(dim=1), model.logits(images).sigmoid()
    torch.testing.assert_close(model(images, labels), -(targets * p.log()).sum(dim=1).mean())
    model.loss = "bce"
    expected = -(targets * q.log() + (1 - targets) * (1 - q).log()).mean()
    torch.testing.assert_close(model(images, labels), expected)
    torch.testing.assert_close(model(images, F.one_hot(labels, 4).float()), expected)


def test_few_labels_and_repeated_augmentation():
    targets = [0] * 200 + [1] * 100 + [2] * 3
    few = data.few_labels(targets, 0.1, seed=1)
    assert np.bincount(np.array(targets)[few]).tolist() == [20, 10, 1] and len(set(few)) == 31
    assert few == data.few_labels(targets, 0.1, seed=1) != data.few_labels(targets, 0.1, seed=2)

    def epoch(rank, world, skip=0):
        sampler = data.RepeatingSampler(range(40), world, rank, seed=3, drop_last=True)
        sampler.set_epoch(2)
        sampler.skip = skip
        return list(sampler)
    keys = epoch(0, 1)
    assert keys == [key for pair in zip(epoch(0, 2), epoch(1, 2)) for key in pair]
    assert len(keys) == len(set(keys)) == 40 and epoch(0, 1, skip=7) == keys[7:]
    assert len({index for _, index in keys}) == 14 and keys[0][1] == keys[1][1] == keys[2][1] != keys[3][1]


def test_miou_is_the_slow_one(masked):
    torch.manual_seed(0)
    model = finetune.Segmenter(tiny_vit(), 3, img_size=16).eval()
    views = data.Transformed(data.Segmentation(masked, False, 3), data.segment_transform(16, False), 0)
    counts, inside, union = 0, [0, 0, 0], [0, 0, 0]
    for i in range(len(views)):
        image, mask = views[0, i]
        assert image.shape[1:] == mask.shape
        counts = counts + model.count(image[None], mask[None])
        prediction = model.predict(image[None])[0].argmax(dim=0) + 1
        for truth, guess in zip(mask.flatten().tolist(), prediction.flatten().tolist()):
            for c in (1, 2, 3):
                inside[c - 1] += truth == guess == c
                union[c - 1] += truth > 0 and c in (truth, guess)
    expected = 100 * np.mean([a / b for a, b in zip(inside, union) if b])
    assert model.summary(counts)["miou"] == pytest.approx(expected, abs=1e-3) and 0 < expected < 100
    image, mask = image[None, :, :16, :16], mask[None, :16, :16]      # unlabelled pixels count nowhere
    cut = torch.cat([torch.zeros_like(mask[:, :8]), mask[:, 8:]], dim=1)
    expected = F.cross_entropy(model.logits(image)[:, :, 8:], cut[:, 8:] - 1)
    torch.testing.assert_close(model(image, cut), expected)
    assert model.count(image, cut)[:-1].sum() == (mask[:, 8:] > 0).sum() > 0


def test_fine_tuning_writes_and_evaluates(trained, labelled):
    log = read_log(trained / "classify")
    assert {"top1", "top5", "val_loss", "loss", "lr", "img_per_s", "best_top1"} <= set(log[2])
    assert log[0]["model"] == "vit_nano" and log[0]["img_size"] == 16 and log[2]["top5"] == 100
    measured = fine_tune("--eval_only", "--init", trained / "classify/checkpoint.pt", "--data", labelled)
    assert json.loads(measured) == {"images": 37} | {key: log[2][key] for key in ("top1", "top5", "val_loss")}
    assert Image.open(trained / "segment/samples/epoch_0002.png").size == (3 * 42 + 2, 4 * 22 + 2)
    before, after = weights(trained / "energy", "backbone.pt"), weights(trained / "classify", "backbone.pt")
    assert set(before) == set(after) and not torch.equal(before["pos_embed"], after["pos_embed"])


def _finetune_worker(rank, world, port, folder, jobs):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="localhost",
                      MASTER_PORT=str(port))
    for i, flags in enumerate(jobs):
        with open(f"{folder}/{world}_{i}_{rank}.txt", "w") as file, contextlib.redirect_stdout(file):
            sys.argv = ["finetune.py", *FAST, *map(str, flags)]
            finetune.main()


def test_processes_agree(trained, labelled, masked, tmp_path):
    """1, 2, 3 processes measure the same to the last digit; 1 and 2 train the same, up to rounding."""
    jobs = [["--eval_only", "--init", trained / "classify/checkpoint.pt", "--data", labelled],
            ["--eval_only", "--init", trained / "segment/checkpoint.pt", "--data", masked]]
    train = ["--data", labelled, "--model", "vit_nano", "--img_size", 16, "--patch_size", 4, "--epochs", 2,
             "--drop_path", 0, "--mixup", 0, "--cutmix", 0, "--output_dir"]
    for world in (2, 3):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        more = [[*train, tmp_path / "two"]] if world == 2 else []
        mp.spawn(_finetune_worker, (world, port, tmp_path, jobs + more), nprocs=world)
        for i, job in enumerate(jobs):
            assert (tmp_path / f"{world}_{i}_0.txt").read_text().strip() == fine_tune(*job)
    fine_tune(*train, tmp_path / "one")
    fine_tune(*train, tmp_path / "parts", "--accum_steps", 2)
    one = weights(tmp_path / "one")
    for other in ("two", "parts"):
        for key, value in weights(tmp_path / other).items():
            torch.testing.assert_close(value, one[key], rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("flags", [
    ["--model", "vit_nano", "--patch_size", 4],
    ["--model", "resnet_nano", "--epochs", 300, "--drop_path", 0.2],  # BatchNorm, repeated augmentation
    ["--model", "resnet_nano", "--task", "segment", "--num_classes", 3]])
def test_fine_tuning_resumes_bit_identically(flags, labelled, masked, tmp_path):
    flags += ["--img_size", 16, "--data", masked if "segment" in flags else labelled, "--num_workers", 2]
    stop = 2 if "segment" in flags else 4                             # 1 step an epoch, or 3
    fine_tune(*flags, "--output_dir", tmp_path / "whole", "--max_steps", 6)
    fine_tune(*flags, "--output_dir", tmp_path / "stopped", "--max_steps", stop)
    fine_tune(*flags, "--output_dir", tmp_path / "stopped", "--max_steps", 6, "--resume")
    whole, resumed = weights(tmp_path / "whole"), weights(tmp_path / "stopped")
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    first, last = read_log(tmp_path / "whole")[-1], read_log(tmp_path / "stopped")[-1]
    assert all(first[key] == last[key] for key in first if key.startswith(("top", "miou", "val", "best")))


@pytest.mark.parametrize("flags,sentence", [
    (["--init", "nowhere.pt"], "--init nowhere.pt is missing, damaged or no file of weights"),
    (["--init", "TMP/text.pt"], "text.pt is missing, damaged or no file of weights"),
    (["--model", "vit_t"], "does not fit --model vit_t"),
    (["--model", "resnet_nano"], "it has no conv1.weight"),
    (["--patch_size", 8], "has patch_embed.proj.weight of shape (96, 3, 4, 4), not (96, 3, 8, 8)"),
    (["--eval_only"], "--eval_only measures a checkpoint.pt of finetune.py"),
    (["--img_size", 18], "--img_size 18 is not a multiple of --patch_size 4"),
    (["--label_fraction", 1.5], "--label_fraction 1.5: must be above 0"),
    (["--label_fraction", 0.1], "has 3 training pictures, fewer than --batch_size 8"),
    (["--batch_size", 9, "--accum_steps", 2], "--batch_size 9 is not a multiple of 1 processes x 2"),
    (["--data", "TMP/differ"], "classes differ (3 and 2, only here or there: c; none)"),
    (["--data", "nowhere"], "--data nowhere has no folder train"),
    (["--init", "DONE", "--eval_only", "--data", "TMP/two"], "classes differ (2 and 3, only here or there: "),
    (["--task", "segment", "--probe", "linear"], "are for --task classify"),
    (["--probe", "linear", "--head_norm", "batch"], "--head_norm is for training the whole network"),
    (["--task", "segment", "--data", "nowhere"], "no image files in nowhere/images/training"),
    (["--task", "segment", "--data", "MASKED", "--num_classes", 2], "has the label 3, above --num_classes 2"),
    (["--task", "segment", "--data", "TMP/sizes"], ".png is (7, 9), its image (2"),
])
def test_bad_input_to_fine_tuning(flags, sentence, trained, labelled, masked, tmp_path, monkeypatch, capsys):
    (tmp_path / "text.pt").write_text("a web page")
    for path in ("differ/train/abc", "differ/val/ab", "two/train/ab", "two/val/ab"):
        name, split, classes = path.split("/")
        (tmp_path / name / split).mkdir(parents=True)
        for c in classes:
            (tmp_path / name / split / c).symlink_to(labelled / split / c)
    shutil.copytree(masked, tmp_path / "sizes")
    for path in (tmp_path / "sizes/annotations/training").iterdir():
        Image.new("L", (9, 7)).save(path)
    for word, path in (("TMP", tmp_path), ("MASKED", masked), ("DONE", trained / "classify/checkpoint.pt")):
        flags = [str(flag).replace(word, str(path)) for flag in flags]
    flags = ["--init", trained / "energy/backbone.pt", "--data", labelled, "--epochs", 1, "--output_dir",
             tmp_path / "out", *(["--img_size", 16] if "segment" in flags else []), *flags]
    assert sentence in stops_with(monkeypatch, capsys, [*FAST, *flags], finetune)


def test_init_files_of_others(labelled, tmp_path):
    """MAE's file with its arguments, DDP's prefix and another image size, probed: it stays as it is."""
    vit = models.build_model("vit_nano", 32, 4)
    state = {"module." + key: value for key, value in vit.state_dict().items()}
    state["module.mask_token"] = torch.ones(1, 1, 96)
    torch.save({"model": state, "args": argparse.Namespace(lr=1.0)}, tmp_path / "mae.pth")
    fine_tune("--init", tmp_path / "mae.pth", "--model", "vit_nano", "--patch_size", 4, "--img_size", 16,
              "--data", labelled, "--epochs", 1, "--probe", "mlp", "--output_dir", tmp_path / "out")
    after, expected = weights(tmp_path / "out", "backbone.pt"), vit.state_dict()
    expected["pos_embed"] = models.resize_pos_embed(vit.pos_embed, 4)
    assert after.keys() == expected.keys() and all(torch.equal(after[key], expected[key]) for key in expected)


# ---------------------------------------------------------------- DALL-E's dVAE

class DallEConv2d(nn.Module):
    __module__, __qualname__ = "dall_e.utils", "Conv2d"               # what a pickle calls it

    def __init__(self, n_in, n_out, kw):
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(n_out, n_in, kw, kw) / 3), nn.Parameter(torch.randn(n_out))
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


class DallECoder(nn.Module):
    """The package's Encoder and Decoder alike."""
    __module__, __qualname__ = "dall_e.decoder", "Decoder"

    def __init__(self, n_in, stem, widths, n_out, kernels, between):
        super().__init__()
        layers = {"input": DallEConv2d(n_in, widths[0], stem)}
        for i in range(4):
            blocks = {"block_1": DallEBlock(widths[i], widths[i + 1], kernels),
                      "block_2": DallEBlock(widths[i + 1], widths[i + 1], kernels)}
            layers[f"group_{i + 1}"] = nn.Sequential(OrderedDict(blocks | (between if i < 3 else {})))
        layers["output"] = nn.Sequential(OrderedDict(relu=nn.ReLU(), conv=DallEConv2d(widths[4], n_out, 1)))
        self.blocks = nn.Sequential(OrderedDict(layers))

    def forward(self, x):
        return self.blocks(x)


@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
@pytest.mark.parametrize("zip_format", [True, False])
def test_dalle_files_are_read_without_their_package(zip_format, tmp_path, monkeypatch):
    """Whole modules, pickled under the names of the package dall_e, which is gone when they are read."""
    torch.manual_seed(0)
    encoder = DallECoder(3, 7, [8, 8, 16, 32, 64], 32, (3, 3, 3, 1), {"pool": nn.MaxPool2d(2)})
    decoder = DallECoder(32, 1, [8, 64, 32, 16, 8], 6, (1, 3, 3, 3),
                         {"upsample": nn.Upsample(scale_factor=2, mode="nearest")})
    images = torch.rand(2, 3, 32, 48)
    with torch.no_grad():
        tokens = encoder(0.8 * images + 0.1).argmax(dim=1)
        codes = F.one_hot(tokens, 32).permute(0, 3, 1, 2).float()
        restored = ((decoder(codes)[:, :3].sigmoid() - 0.1) / 0.8).clamp(0, 1)
    monkeypatch.setitem(sys.modules, "dall_e", types.ModuleType("dall_e"))
    for cls in (DallEConv2d, DallEBlock, DallECoder):
        module = types.ModuleType(cls.__module__)
        setattr(module, cls.__qualname__, cls)
        monkeypatch.setitem(sys.modules, cls.__module__, module)
    paths = [tmp_path / "encoder.pkl", tmp_path / "decoder.pkl"]
    for coder, path in zip((encoder, decoder), paths):
        torch.save(coder, path, _use_new_zipfile_serialization=zip_format)
    for name in [name for name in sys.modules if name.startswith("dall_e")]:
        monkeypatch.delitem(sys.modules, name)
    dvae = models.load_dalle(*paths)
    assert dvae.config == {"codes": 32, "width": 8, "embed_width": 8, "blocks": 2}
    with torch.no_grad():
        assert torch.equal(dvae.encode(images), tokens) and len(tokens.unique()) > 5
        torch.testing.assert_close(dvae.decode(tokens), restored)     # a lookup, upsampling after the 1x1
        torch.testing.assert_close(dvae.decode(codes), restored)
    with pytest.raises(ValueError, match="are not the two halves of a DALL-E dVAE"):
        models.load_dalle(*paths[::-1])


def test_other_files_are_no_dalle(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    for content, sentence in ((Evil(), "it asks for posix.mkdir"), ({"w": 1}, "is damaged or something")):
        for zip_format in (True, False):
            torch.save(content, tmp_path / "encoder.pkl", _use_new_zipfile_serialization=zip_format)
            with pytest.raises(ValueError, match=sentence):
                models.load_dalle(tmp_path / "encoder.pkl", tmp_path / "decoder.pkl")
    assert not (tmp_path / "ran").exists()
    (tmp_path / "encoder.pkl").write_text("<html>not found</html>")
    with pytest.raises(ValueError, match="is a text, perhaps a web page"):
        models.load_dalle(tmp_path / "encoder.pkl", tmp_path / "decoder.pkl")


def test_dvae_has_the_size_of_the_published_one():
    with torch.device("meta"):
        dvae = models.DVAE()
    for part, tensors, numbers in ((dvae.encoder, 74, 53_786_240), (dvae.decoder, 76, 43_829_766)):
        sizes = [param.numel() for param in part.parameters()]
        assert len(sizes) == tensors and sum(sizes) == numbers


# ---------------------------------------------------------------- corrupted image modeling

CIM_TINY = [*TINY, "--dvae", "train", "--dvae_steps", "3", "--warmup_epochs", "1"]


def tiny_cim(monkeypatch, *flags):
    """(CIM model, dVAE, images, golden tokens, masks), of a vit_nano for 16 tokens in images of 16 pixels."""
    monkeypatch.setattr(sys, "argv", ["cim_pretrain.py", *TINY, *flags])
    args = cim_pretrain.parse_args()
    torch.manual_seed(0)
    dvae = models.DVAE(codes=32, width=8, embed_width=8, blocks=1).requires_grad_(False)
    model, images = cim_pretrain.build(args, 32), torch.randn(4, 3, 16, 16)
    return model, dvae, images, torch.randint(32, (4, 16)), cim_pretrain.draw_mask(4, args, "cpu")


def test_masks_of_patches():
    share = (100 / 196, 120 / 196)
    random = data.random_mask(500, torch.Generator(), 14, share)
    assert set(random.sum(dim=1).tolist()) == set(range(100, 121))
    assert (random.float().mean(dim=0) - 110 / 196).abs().max() < 0.1
    block = data.block_mask(200, None, 14, share)
    assert block.sum(dim=1).max() <= 120 and block.sum(dim=1).float().mean() > 90
    alike = [(mask.view(-1, 14, 14).diff(dim=1) == 0).float().mean() for mask in (block.int(), random.int())]
    assert alike[0] > 0.75 and alike[1] < 0.55                        # a patch and the one below it


def test_normalised_targets_equal_a_slow_loop():
    torch.manual_seed(0)
    images = torch.randn(2, 3, 16, 16).double()
    target, mean, std = cim_pretrain.normalize_target(images, "window", 4)
    padded = F.pad(images, (4, 3, 4, 3), mode="reflect")
    for b, y, x in [(0, 0, 0), (1, 15, 15), (0, 7, 3), (1, 2, 14)]:
        window = padded[b, :, y:y + 8, x:x + 8]                       # 4 pixels before the pixel, 3 behind it
        assert torch.equal(window[:, 4, 4], images[b, :, y, x])
        expected = (images[b, :, y, x] - window.mean()) / (window.var(correction=0) + 1e-6).sqrt()
        torch.testing.assert_close(target[b, :, y, x], expected)
    torch.testing.assert_close(target * std + mean, images)
    patch = cim_pretrain.normalize_target(images, "patch", 4)[0][1, :, 4:8, 8:12]
    assert patch.mean().abs() < 1e-6 and abs(patch.std(correction=0) - 1) < 1e-5
    assert torch.equal(cim_pretrain.normalize_target(images, "none", 4)[0], images)


@pytest.mark.parametrize("share", ["0", "2"])
@pytest.mark.parametrize("objective", ["respix", "revdet"])
def test_which_loss_trains_what(share, objective, monkeypatch):
    model, dvae, *batch = tiny_cim(monkeypatch, "--share", share, "--objective", objective)
    owners = []
    for i in range(2):
        model.zero_grad()
        model(*batch, dvae)[i].backward()
        owners.append({param for param in model.parameters() if param.grad is not None and param.grad.any()})
    generator, enhancer = owners
    assert not generator & set(model.head.parameters())
    assert not enhancer & {model.generator.mask_token, *model.generator.head.parameters()}
    # Shared: the weight and bias of the patch embedding, and twelve tensors in each of two blocks.
    assert len(generator & enhancer) == (2 + 2 * 12 if share == "2" else 0)
    assert len(generator | enhancer) == len(list(model.parameters()))
    assert all(param.grad is None for param in dvae.parameters())


def test_tokens_of_corrupted_images(monkeypatch):
    model, dvae, images, golden, mask = tiny_cim(monkeypatch, "--objective", "revdet")
    tokens = {}
    for sampling in ("softmax", "argmax", "uniform"):
        model.sampling = sampling
        tokens[sampling] = [model.generate(images, golden, mask)[2] for _ in range(2)]
        for sampled in tokens[sampling]:
            assert torch.equal(sampled[~mask], golden[~mask]) and not torch.equal(sampled, golden)
        assert torch.equal(*tokens[sampling]) == (sampling == "argmax")
    # What the generator is sure of is sampled; then the labels are 0, and the loss is that of "not replaced".
    model.sampling = "softmax"
    model.generator.head.weight.data.zero_()
    model.generator.head.bias.data[:] = torch.tensor([0.0] * 31 + [50.0])
    golden = torch.full_like(golden, 31)
    gen_loss, accuracy, sampled = model.generate(images, golden, mask)
    assert gen_loss < 1e-6 and accuracy == 1 and torch.equal(sampled, golden)
    output = model.enhance(cim_pretrain.detokenize(dvae, sampled, 16))
    loss = model.enhancer_loss(output, images, sampled, golden)
    torch.testing.assert_close(loss, F.softplus(output).mean())
    # Logits log(1), log(2), log(3), log(4) are drawn 1, 2, 3 and 4 times of ten.
    model.generator.head.bias.data[:] = torch.tensor([1.0, 2, 3, 4] + [1e-9] * 28).log()
    drawn = torch.cat([model.generate(images, golden, mask)[2][mask] for _ in range(100)])
    assert (drawn.bincount(minlength=4) / len(drawn) - torch.tensor([0.1, 0.2, 0.3, 0.4])).abs().max() < 0.03


def test_auc():
    scores, labels = torch.tensor([0.1, 0.4, 0.4, 0.8, 0.3]), torch.tensor([False, False, True, True, True])
    pairs = [(p > n) + 0.5 * (p == n) for p in scores[labels].tolist() for n in scores[~labels].tolist()]
    assert cim_pretrain.area_under_curve(scores, labels) == pytest.approx(sum(pairs) / len(pairs))


def _cim_worker(rank, init_file, out_folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{init_file}", rank=rank, world_size=2)
    for name in ("vit_nano", "resnet_nano"):
        model = _train_cim(name, DistributedDataParallel, slice(rank, None, 2))
        torch.save({"model": model.state_dict()}, f"{out_folder}/{name}{rank}.pt")
    dist.destroy_process_group()


def _train_cim(name, wrap, part):
    with pytest.MonkeyPatch.context() as patch:
        model, dvae, images, golden, mask = tiny_cim(patch, "--model", name, "--sampling", "argmax")
    mask = mask[:1].expand(4, -1)                                     # as many are masked in both halves
    wrapped = wrap(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(2):
        sum(wrapped(images[part], golden[part], mask[part], dvae)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def test_cim_ddp_equals_one_process(tmp_path):
    mp.spawn(_cim_worker, (str(tmp_path / "init"), str(tmp_path)), nprocs=2)
    for name in ("vit_nano", "resnet_nano"):
        first, second = (weights(tmp_path, f"{name}{rank}.pt") for rank in (0, 1))
        buffers = [key for key in first if "running" in key]          # BatchNorm's: of each half
        assert all(torch.equal(first[key], second[key]) for key in first if key not in buffers)
        assert bool(buffers) == (name == "resnet_nano")
    alone = _train_cim("vit_nano", lambda model: model, slice(None)).state_dict()
    for key, value in weights(tmp_path, "vit_nano0.pt").items():
        torch.testing.assert_close(value, alone[key], rtol=1e-4, atol=1e-5)


def test_cim_on_two_processes(folder, tmp_path):
    flags = [*CIM_TINY, "--data", folder, "--model", "resnet_nano", "--epochs", "2", "--output_dir", tmp_path]
    run("cim_pretrain.py", *flags, processes=2)
    log = read_log(tmp_path)
    assert [line.get("epoch") for line in log] == [None, None, 1, 2] and log[0]["processes"] == 2
    assert all(np.isfinite([line["loss"], line["gen_loss"], line["psnr_output"]]).all() for line in log[2:])


def test_cim_options_and_outputs(folder, labelled, tmp_path):
    flags = [*CIM_TINY, "--num_workers", "0", "--data", folder, "--max_steps", 2]
    run_here(cim_pretrain, *flags, "--objective", "revdet", "--masking", "block", "--share", 0,
             "--output_dir", tmp_path / "a")
    log = read_log(tmp_path / "a")
    assert log[0]["objective"] == "revdet" and set(log[1]) == {"dvae_psnr", "dvae_codes_used"}
    assert {"gen_loss", "gen_acc", "replaced", "accuracy", "precision", "recall", "auc"} <= set(log[2])
    assert Image.open(tmp_path / "a" / "samples" / "epoch_0001.png").size == (7 * 98 + 2, 8 * 98 + 2)
    assert Image.open(tmp_path / "a" / "samples" / "dvae.png").size == (2 * 98 + 2, 8 * 98 + 2)
    frozen = torch.load(tmp_path / "a" / "checkpoint.pt", weights_only=True)["model"]
    # The generator of that run, kept as it is; its dVAE comes with it.
    run_here(cim_pretrain, *flags, "--freeze_generator", tmp_path / "a" / "checkpoint.pt",
             "--target", "patch", "--amp", "bf16", "--output_dir", tmp_path / "b")
    used = weights(tmp_path / "b")
    assert all(torch.equal(used[key], frozen[key]) for key in frozen if key.startswith("generator."))
    assert not all(torch.equal(used[key], frozen[key]) for key in frozen if key.startswith("backbone."))
    assert {"psnr_corrupted", "psnr_template", "psnr_output"} <= set(read_log(tmp_path / "b")[1])
    run_here(cim_pretrain, *flags, "--model", "resnet_nano", "--corrupt", "erase", "--target", "none",
             "--amp", "fp16", "--accum_steps", 2, "--img_size", 32, "--output_dir", tmp_path / "c")
    backbone = torch.load(tmp_path / "c" / "backbone.pt", weights_only=True)
    assert {"mean", "std"} <= set(backbone["config"])
    config = {key: value for key, value in backbone["config"].items() if key not in ("mean", "std")}
    models.build_model(**config).load_state_dict(backbone["model"])
    assert "gen_acc" not in read_log(tmp_path / "c")[1] and not (tmp_path / "c" / "dvae.pt").exists()
    # What they wrote is fine-tuned without a word about the model.
    for file in ("a/checkpoint.pt", "c/backbone.pt"):
        fine_tune("--init", tmp_path / file, "--data", labelled, "--max_steps", 1,
                  "--output_dir", tmp_path / file[0] / "ft")
    used, tuned = weights(tmp_path / "a", "backbone.pt"), weights(tmp_path / "a" / "ft", "backbone.pt")
    assert used.keys() == tuned.keys() and all((tuned[key] - used[key]).abs().max() < 0.01 for key in used)


def test_cim_bad_input(folder, tmp_path, monkeypatch, capsys):
    flags = [*CIM_TINY, "--data", folder, "--num_workers", "0", "--output_dir", tmp_path / "out"]
    (tmp_path / "other.pt").write_text("nothing")

    def offline(*_):
        raise OSError("no network")
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    for more, sentence in ((["--corrupt", "erase", "--objective", "revdet"], "replaces no tokens to detect"),
                           (["--share", "9"], "--share 9: generator and enhancer have 4 blocks"),
                           (["--img_size", "18"], "--img_size 18 is no multiple of --patch_size 4"),
                           (["--model", "resnet_nano", "--patch_size", "16"], "has stride 8: it must divide"),
                           (["--dvae", "dalle", "--dvae_dir", tmp_path], "encoder.pkl (no network): put"),
                           (["--freeze_generator", tmp_path / "other.pt"], "dvae.pt is missing")):
        assert sentence in stops_with(monkeypatch, capsys, [*flags, *more], cim_pretrain)
    (tmp_path / "dvae.pt").write_text("nothing")
    assert "dvae.pt is damaged or no dVAE" in stops_with(
        monkeypatch, capsys, [*flags, "--freeze_generator", tmp_path / "other.pt"], cim_pretrain)

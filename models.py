"""Backbones and image tokenizers as plain nn.Modules that know nothing of the method that trains them.

The backbones ViT, ResNet, ConvNeXt-T and Swin-T have the attributes `width` and `stride`, and two methods:

    forward(images)      (B, 3, H, W) -> (B, width)                            one pooled feature per image
    forward_map(images)  (B, 3, H, W) -> (B, width, H // stride, W // stride)  the dense feature map

H and W are multiples of `stride`; a ViT takes only images of its `img_size`. Parameter names are timm's (ViT)
and torchvision's (the others), so that weights can be exchanged in both directions.

The tokenizers, DVAE (DALL-E's) and VQGAN, map images to grids of integers and back. The last section reads
and writes weight files, without running any code that a file may contain.
"""
import argparse
import json
import os
import zipfile
from collections import OrderedDict
from contextlib import suppress

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import convnext, swin_transformer
from torchvision.ops import StochasticDepth


# ---------------------------------------------------------------- Vision Transformer

def patchify(images, p):
    """(B, C, H, W) -> (B, N, C * p * p): the N = (H / p) * (W / p) patches of p x p pixels, in raster order.

    The same as F.unfold with kernel and stride p, transposed; but that starts a GPU kernel for each image.
    """
    B, C, H, W = images.shape
    x = images.reshape(B, C, H // p, p, W // p, p).permute(0, 2, 4, 1, 3, 5)        # (B, h, w, C, p, p)
    return x.reshape(B, (H // p) * (W // p), C * p * p)


def unpatchify(patches, p, W):
    """The inverse of patchify for images of width W: (B, N, C * p * p) -> (B, C, H, W)."""
    B, N, D = patches.shape
    w = W // p
    x = patches.reshape(B, N // w, w, D // (p * p), p, p).permute(0, 3, 1, 4, 2, 5)  # (B, C, h, p, w, p)
    return x.reshape(B, D // (p * p), N // w * p, W)


def sincos_2d(dim, grid_size):
    """Fixed 2-D sine-cosine position embedding of MoCo v3 (Chen et al., 2021): (1, grid_size ** 2, dim).

    A quarter of the channels each for sin(x), cos(x), sin(y), cos(y). Decision: in the order of MAE's code.
    `dim` must be a multiple of 4.
    """
    omega = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    y, x = torch.meshgrid(torch.arange(grid_size), torch.arange(grid_size), indexing="ij")
    x = x.reshape(-1, 1) * omega                                                   # (N, dim/4)
    y = y.reshape(-1, 1) * omega                                                   # (N, dim/4)
    return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=1).float()[None]    # (1, N, dim)


def resize_pos_embed(pos_embed, grid_size):
    """A ViT's position embedding for another image size: (1, 1 + N, dim) -> (1, 1 + grid_size ** 2, dim).

    The patches' entries, a square grid, are interpolated (bicubic with antialiasing, as in timm); the class
    token's entry, which is the first, stays as it is.
    """
    cls = pos_embed[:, :1]
    grid = pos_embed[:, 1:]
    side = round(grid.shape[1] ** 0.5)
    if side == grid_size or side ** 2 != grid.shape[1]:              # strict loading refuses the latter
        return pos_embed
    grid = grid.reshape(1, side, side, -1).permute(0, 3, 1, 2).float()             # (1, dim, side, side)
    grid = F.interpolate(grid, size=(grid_size, grid_size), mode="bicubic", antialias=True)
    return torch.cat([cls.float(), grid.flatten(2).transpose(1, 2)], dim=1)        # (1, 1 + M, dim)


class PatchEmbed(nn.Module):
    """(B, 3, H, W) -> (B, N, dim): a linear map of each patch_size x patch_size patch, in raster order."""

    def __init__(self, dim, patch_size):
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(3, dim, kernel_size=patch_size, stride=patch_size)
        nn.init.xavier_uniform_(self.proj.weight.view(dim, -1))      # as a linear layer, which it is

    def forward(self, images):
        # A convolution whose stride is its kernel is a matrix product. Written as one, it is several times
        # faster on a CPU, most of all in the second derivative that the energy method takes.
        x = patchify(images, self.patch_size)                        # (B, N, C*p*p)
        return F.linear(x, self.proj.weight.flatten(1), self.proj.bias)    # (B, N, dim)


class Attention(nn.Module):
    """Multi-head self-attention, (B, N, dim) -> (B, N, dim)."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        B, N, D = x.shape
        qkv = self.qkv(x).view(B, N, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                         # (B, h, N, D/h) each
        # Inside the energy's func.grad, CUDA's autocast would give attention's softmax another dtype than its
        # derivative. Attention needs no autocast: q, k and v have its dtype already.
        with torch.autocast(x.device.type, enabled=False):
            x = F.scaled_dot_product_attention(q, k, v)              # (B, h, N, D/h)
        return self.proj(x.transpose(1, 2).reshape(B, N, D))


class MLP(nn.Module):
    """Two linear layers with a GELU between them, (B, N, dim) -> (B, N, dim)."""

    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm Transformer block, (B, N, dim) -> (B, N, dim)."""

    def __init__(self, dim, heads, drop_rate=0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLP(dim, 4 * dim)
        self.drop_path = StochasticDepth(drop_rate, mode="row")      # per image (Huang et al., 2016)

    def forward(self, x):
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class ViT(nn.Module):
    """Vision Transformer (Dosovitskiy et al., 2021), pre-norm, with a class token.

    pool: "cls" or "mean" (of the patch tokens). pos_embed: "sincos" (fixed, zero for the class token) or
    "learned". drop_rate: rate of stochastic depth in the last block; it rises linearly from 0 in the first.
    Initialised as in MAE: xavier-uniform for linear layers, normal with std 0.02 for the rest.
    """

    def __init__(self, dim, depth, heads, img_size=224, patch_size=16, pool="cls", pos_embed="sincos",
                 drop_rate=0.0):
        super().__init__()
        self.width = dim
        self.stride = patch_size
        self.pool = pool
        self.grid_size = img_size // patch_size
        self.patch_embed = PatchEmbed(dim, patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.grid_size ** 2, dim), pos_embed == "learned")
        rates = torch.linspace(0, drop_rate, depth, device="cpu").tolist()
        self.blocks = nn.ModuleList(Block(dim, heads, rate) for rate in rates)
        self.norm = nn.LayerNorm(dim, eps=1e-6)

        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.cls_token, std=0.02)
        if pos_embed == "learned":
            nn.init.normal_(self.pos_embed, std=0.02)
        else:
            self.pos_embed.data[:, 1:] = sincos_2d(dim, self.grid_size)

    def forward_tokens(self, images, pos_embed=None, keep=None, norm=True):
        """(B, 3, H, W) -> (B, 1 + M, dim), the class token first; norm: apply the last LayerNorm.

        keep: (B, M) int64, the patches that enter; None: all N, in raster order.
        pos_embed: (B, M, dim), used for those patches instead of the model's own (not for the class token).
        """
        x = self.patch_embed(images)                                               # (B, N, dim)
        if keep is not None:
            x = x.gather(1, keep[:, :, None].expand(-1, -1, x.shape[2]))           # (B, M, dim)
            if pos_embed is None:
                pos_embed = self.pos_embed[0, 1:][keep]                            # (B, M, dim)
        return self.encode(x, pos_embed, norm)

    def encode(self, x, pos_embed=None, norm=True):
        """Embedded patches (B, M, dim) -> (B, 1 + M, dim): positions, class token, blocks, LayerNorm."""
        x = x + (self.pos_embed[:, 1:] if pos_embed is None else pos_embed)
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(x.shape[0], -1, -1)  # (B, 1, dim)
        x = torch.cat([cls, x], dim=1)                                             # (B, 1 + M, dim)
        for block in self.blocks:
            x = block(x)
        return self.norm(x) if norm else x

    def forward(self, images, pos_embed=None, keep=None):
        x = self.forward_tokens(images, pos_embed, keep)
        return x[:, 0] if self.pool == "cls" else x[:, 1:].mean(dim=1)

    def forward_map(self, images):
        B, _, H, W = images.shape
        x = self.forward_tokens(images)[:, 1:]                                     # (B, N, dim)
        return x.transpose(1, 2).reshape(B, self.width, H // self.stride, W // self.stride)


# ---------------------------------------------------------------- ResNet

def norm_layer(kind, channels):
    """BatchNorm, or GroupNorm with 32 groups (Wu & He, 2018)."""
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    # Decision: layers of fewer than 64 channels have groups of two channels. A group of one channel would
    # remove its mean over the map, which is what pooling reads.
    return nn.GroupNorm(min(32, channels // 2), channels)


class Bottleneck(nn.Module):
    """Convolutions 1x1, 3x3 (with stride and dilation) and 1x1 (to four times the width), plus a shortcut."""

    def __init__(self, in_channels, width, stride, norm, dilation=1, drop_rate=0.0):
        super().__init__()
        out_channels = 4 * width
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = norm_layer(norm, width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=dilation, dilation=dilation, bias=False)
        self.bn2 = norm_layer(norm, width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = norm_layer(norm, out_channels)
        self.downsample = None
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
                                            norm_layer(norm, out_channels))
        self.drop_path = StochasticDepth(drop_rate, mode="row")

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        y = self.drop_path(self.bn3(self.conv3(y)))
        if self.downsample is not None:
            x = self.downsample(x)
        return F.relu(x + y)


class ResNet(nn.Module):
    """ResNet (He et al., 2016) of bottleneck blocks, the stride on the 3x3 convolution as in torchvision.

    width: channels of the stem; 2x and 4x widen every layer, as SimCLR does. small_images: a 3x3 stem of
    stride 1 without pooling (total stride 8 instead of 32). norm: "batch" or "group". drop_rate: rate of
    stochastic depth in the last block; it rises linearly from 0 in the first. dilated: the last two stages
    dilate their kernels instead of striding, as in torchvision, for a total stride of 8 (for segmentation).

    ReLU's second derivative is zero. The energy method differentiates twice, so ReLU's gates get no gradient,
    and the bias of the last bn3 gets none at all. ReLU stays because weights must fit torchvision's ResNet; a
    smooth activation learned faster (loss 0.437, not 0.461, after 120 steps) and probed equally well.
    """

    def __init__(self, layers, width, norm="batch", small_images=False, drop_rate=0.0, dilated=False):
        super().__init__()
        self.width = 32 * width
        self.stride = 8 if small_images or dilated else 32
        if small_images:
            self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
            self.maxpool = nn.Identity()
        else:
            self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
            self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.bn1 = norm_layer(norm, width)
        in_channels = width
        dilation = 1
        rates = torch.linspace(0, drop_rate, sum(layers), device="cpu").tolist()
        for i, depth in enumerate(layers):
            blocks = []
            dilate = dilated and not small_images and i >= 2
            for j in range(depth):
                stride = 2 if i > 0 and j == 0 and not dilate else 1
                blocks.append(Bottleneck(in_channels, width * 2 ** i, stride, norm, dilation, rates.pop(0)))
                in_channels = 4 * width * 2 ** i
                if dilate and j == 0:
                    dilation *= 2          # from the next block on, in place of the stride
            self.add_module(f"layer{i + 1}", nn.Sequential(*blocks))

        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward_map(self, images):
        x = self.maxpool(F.relu(self.bn1(self.conv1(images))))       # (B, width/32, H/4, W/4); small: H, W
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))  # (B, width, H/stride, W/stride)

    def forward(self, images):
        return self.forward_map(images).mean(dim=(2, 3))


# ---------------------------------------------------------------- torchvision's ConvNeXt-T and Swin-T

class ConvNeXtT(convnext.ConvNeXt):
    """torchvision's convnext_tiny without its last linear layer. Images need at least 32x32 pixels."""

    width = 768
    stride = 32

    def __init__(self, drop_rate=0.0):
        Stage = convnext.CNBlockConfig
        super().__init__([Stage(96, 192, 3), Stage(192, 384, 3), Stage(384, 768, 9), Stage(768, None, 3)],
                         stochastic_depth_prob=drop_rate)
        self.classifier[2] = nn.Identity()
        # Differs from torchvision, which initialises this bias to zero. A blank patch then enters the first
        # LayerNorm as zeros, where the derivative is 1,000 times too large: the first update collapses.
        nn.init.trunc_normal_(self.features[0][0].bias, std=0.02)

    def forward_map(self, images):
        # Decision: torchvision pools and then normalises. A dense map is not pooled, so the last LayerNorm
        # normalises each position, as Swin's does. (If it were left out, DDP would wait for its gradient.)
        return self.classifier[0](self.features(images))             # (B, 768, h, w)


class SwinT(swin_transformer.SwinTransformer):
    """torchvision's swin_t without its head."""

    width = 768
    stride = 32

    def __init__(self, drop_rate=0.0):
        super().__init__(patch_size=[4, 4], embed_dim=96, depths=[2, 2, 6, 2], num_heads=[3, 6, 12, 24],
                         window_size=[7, 7], stochastic_depth_prob=drop_rate)
        self.head = nn.Identity()

    def forward_map(self, images):
        return self.permute(self.norm(self.features(images)))        # (B, h, w, 768) -> (B, 768, h, w)


# ---------------------------------------------------------------- DALL-E's discrete VAE

DALLE_URL = "https://cdn.openai.com/dall-e/"                         # encoder.pkl and decoder.pkl

def upsample(x):
    """Each pixel becomes 2x2 pixels. On a GPU, autocast would promote this plain copy to fp32."""
    with torch.autocast(x.device.type, enabled=False):
        return F.interpolate(x, scale_factor=2, mode="nearest")


class DVAEConv(nn.Module):
    """A convolution that keeps height and width, with DALL-E's parameter names and initialisation."""

    def __init__(self, n_in, n_out, kernel_size):
        super().__init__()
        std = (n_in * kernel_size ** 2) ** -0.5
        self.w = nn.Parameter(std * torch.randn(n_out, n_in, kernel_size, kernel_size))
        self.b = nn.Parameter(torch.zeros(n_out))

    def forward(self, x):
        return F.conv2d(x, self.w, self.b, padding=self.w.shape[-1] // 2)


class DVAEBlock(nn.Module):
    """Four convolutions plus a shortcut. DALL-E's kernel sizes: encoder 3, 3, 3, 1, decoder 1, 3, 3, 3."""

    def __init__(self, n_in, n_out, kernel_sizes, gain):
        super().__init__()
        self.gain = gain
        self.id_path = DVAEConv(n_in, n_out, 1) if n_in != n_out else nn.Identity()
        hidden = n_out // 4
        widths = (n_in, hidden, hidden, hidden, n_out)
        self.res_path = nn.ModuleDict({f"conv_{i + 1}": DVAEConv(widths[i], widths[i + 1], kernel_size)
                                       for i, kernel_size in enumerate(kernel_sizes)})

    def forward(self, x, enlarge=False):
        y = self.res_path["conv_1"](F.relu(x))
        x = self.id_path(x)
        if enlarge:     # DALL-E enlarges before the 1x1 convolutions, with the same result at a higher cost
            x = upsample(x)
            y = upsample(y)
        for name in ("conv_2", "conv_3", "conv_4"):
            y = self.res_path[name](F.relu(y, inplace=True))
        return x + self.gain * y


class DVAE(nn.Module):
    """DALL-E's discrete VAE (Ramesh et al., 2021): images to a grid of tokens, one for 8x8 pixels, and back.

    Layers and names are those of github.com/openai/DALL-E, and the defaults are the sizes of its weights.
    Images are in [0, 1], their sides multiples of 8; tokens are int64 in [0, codes).
    """

    stride = 8

    def __init__(self, codes=8192, width=256, embed_width=128, blocks=2):
        super().__init__()
        self.codes = codes

        def make(n_in, stem_size, widths, n_out, kernel_sizes):
            layers = nn.ModuleDict({"input": DVAEConv(n_in, widths[0], stem_size)})
            for i in range(4):
                sizes = (widths[i],) + (widths[i + 1],) * blocks
                layers[f"group_{i + 1}"] = nn.ModuleDict(
                    {f"block_{j + 1}": DVAEBlock(sizes[j], sizes[j + 1], kernel_sizes, 1 / (4 * blocks) ** 2)
                     for j in range(blocks)})
            layers["output"] = nn.ModuleDict({"conv": DVAEConv(widths[4], n_out, 1)})
            return nn.ModuleDict({"blocks": layers})

        self.encoder = make(3, 7, [width, width, 2 * width, 4 * width, 8 * width], codes, (3, 3, 3, 1))
        # Six channels come out: mean and scale of a logit-Laplace distribution. Only the mean is used here.
        self.decoder = make(codes, 1, [embed_width, 8 * width, 4 * width, 2 * width, width], 6, (1, 3, 3, 3))

    def encode_logits(self, images):
        """(B, 3, 8h, 8w) in [0, 1] -> (B, codes, h, w)."""
        layers = self.encoder["blocks"]
        x = layers["input"](0.8 * images + 0.1)                      # DALL-E's pixel mapping
        for i in range(1, 5):
            for block in layers[f"group_{i}"].values():
                x = block(x)
            if i < 4:
                x = F.max_pool2d(x, 2)
        return layers["output"]["conv"](F.relu(x))

    def encode(self, images):
        """(B, 3, 8h, 8w) in [0, 1] -> tokens (B, h, w)."""
        return self.encode_logits(images).argmax(dim=1)

    def decode(self, tokens):
        """Tokens (B, h, w), or weights of all codes (B, codes, h, w) -> images (B, 3, 8h, 8w) in [0, 1]."""
        layers = self.decoder["blocks"]
        if tokens.dim() == 4:
            x = layers["input"](tokens)
        else:                                                        # a lookup, as if on one-hot codes
            x = F.embedding(tokens, layers["input"].w[:, :, 0, 0].t()) + layers["input"].b
            x = x.permute(0, 3, 1, 2)                                # (B, embed_width, h, w)
        for i in range(1, 5):
            for name, block in layers[f"group_{i}"].items():
                x = block(x, enlarge=i > 1 and name == "block_1")
        output = layers["output"]["conv"]
        x = F.conv2d(F.relu(x), output.w[:3], output.b[:3])
        return ((x.sigmoid() - 0.1) / 0.8).clamp(0, 1)               # undoes DALL-E's pixel mapping


def load_dvae(state):
    """-> the DVAE of a state dict; its sizes follow from the shapes. Raises BadFile for any other dict."""
    try:
        with torch.device("meta"):                                   # the weights come from the state
            dvae = DVAE(codes=len(state["encoder.blocks.output.conv.w"]),
                        width=len(state["encoder.blocks.input.w"]),
                        embed_width=len(state["decoder.blocks.input.w"]),
                        blocks=sum(name.startswith("encoder.blocks.group_1") for name in state) // 8)
        load_finite(dvae, state, assign=True)
        return tested(dvae)
    except Exception as error:                                       # wrong tensors raise many error types
        raise BadFile(f"this is not the encoder and decoder of a dVAE: {one_line(error)}") from None


def load_dalle(encoder_path, decoder_path):
    """-> DVAE with the weights of the published encoder.pkl and decoder.pkl (from DALLE_URL).

    The files are whole modules, pickled in 2021 with classes of the package dall_e, which is not needed here.
    Raises BadFile for any other file.
    """
    encoder = read_tensors(encoder_path)
    decoder = read_tensors(decoder_path)
    return load_dvae({f"encoder.{name}": tensor for name, tensor in encoder.items()}
                     | {f"decoder.{name}": tensor for name, tensor in decoder.items()})


@torch.no_grad()
def tested(tokenizer):
    """-> the tokenizer, in float32, after it has encoded and decoded a small image. Raises ValueError."""
    tokenizer = tokenizer.float()
    if tokenizer.stride > 64:
        raise ValueError(f"a token would stand for {tokenizer.stride} x {tokenizer.stride} pixels")
    images = torch.rand(1, 3, 2 * tokenizer.stride, 2 * tokenizer.stride)
    tokens = tokenizer.encode(images)
    restored = tokenizer.decode(tokens)
    if tokens.shape != (1, 2, 2) or restored.shape != images.shape or not restored.isfinite().all():
        raise ValueError("it does not restore an image")
    return tokenizer


# ---------------------------------------------------------------- VQGAN

class VQGANBlock(nn.Module):
    """Twice GroupNorm, swish and a 3x3 convolution, plus a shortcut."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.norm1 = nn.GroupNorm(32, n_in, eps=1e-6)
        self.conv1 = nn.Conv2d(n_in, n_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(32, n_out, eps=1e-6)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(n_in, n_out, 1) if n_in != n_out else nn.Identity()

    def forward(self, x):
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        return self.nin_shortcut(x) + y


class VQGANAttention(nn.Module):
    """Single-head self-attention over all positions of a map, plus a shortcut."""

    def __init__(self, channels):
        super().__init__()
        self.norm = nn.GroupNorm(32, channels, eps=1e-6)
        for name in ("q", "k", "v", "proj_out"):
            self.add_module(name, nn.Conv2d(channels, channels, 1))

    def forward(self, x):
        y = self.norm(x)                                             # (B, C, h, w)
        q, k, v = (conv(y).flatten(2).transpose(1, 2) for conv in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v)                  # (B, h*w, C)
        return x + self.proj_out(y.transpose(1, 2).reshape(x.shape))


class VQGANLevel(nn.Module):
    """The blocks of one resolution, with attention if asked for. resample: "downsample", "upsample", None."""

    def __init__(self, n_in, n_out, blocks, attention, resample):
        super().__init__()
        widths = [n_in] + [n_out] * blocks
        self.block = nn.ModuleList(VQGANBlock(widths[j], widths[j + 1]) for j in range(blocks))
        self.attn = nn.ModuleList(VQGANAttention(n_out) for _ in range(blocks if attention else 0))
        self.resample = resample
        if resample:
            stride = 2 if resample == "downsample" else 1
            conv = nn.Conv2d(n_out, n_out, 3, stride, padding=2 - stride)
            self.add_module(resample, nn.ModuleDict({"conv": conv}))

    def forward(self, x):
        for j, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[j](x)
        if self.resample == "downsample":
            x = self.downsample["conv"](F.pad(x, (0, 1, 0, 1)))      # padded right and below only
        if self.resample == "upsample":
            x = self.upsample["conv"](upsample(x))
        return x


class VQGAN(nn.Module):
    """VQGAN (Esser et al., 2021): images to a grid of tokens, one for stride x stride pixels, and back.

    Names and layers are those of github.com/CompVis/taming-transformers; the defaults are the sizes of its
    vqgan_imagenet_f16_1024. multipliers: the levels' widths in units of `width`; attention: which levels
    have it. Images are in [0, 1], their sides are multiples of `stride`; tokens are int64 in [0, codes).
    """

    def __init__(self, codes=1024, embed_dim=256, z_channels=256, width=128, multipliers=(1, 1, 2, 2, 4),
                 attention=(False, False, False, False, True), blocks=2):
        super().__init__()
        self.codes = codes
        widths = [width * multiplier for multiplier in multipliers]
        top = widths[-1]
        last = len(widths) - 1
        self.stride = 2 ** last

        def coder(n_in, n_first, n_last, n_out):
            middle = OrderedDict(block_1=VQGANBlock(top, top), attn_1=VQGANAttention(top),
                                 block_2=VQGANBlock(top, top))
            return nn.ModuleDict({"conv_in": nn.Conv2d(n_in, n_first, 3, padding=1),
                                  "mid": nn.Sequential(middle),
                                  "norm_out": nn.GroupNorm(32, n_last, eps=1e-6),
                                  "conv_out": nn.Conv2d(n_last, n_out, 3, padding=1)})

        self.encoder = coder(3, width, top, z_channels)
        self.encoder["down"] = nn.ModuleList()
        self.decoder = coder(z_channels, top, widths[0], 3)
        self.decoder["up"] = nn.ModuleList()                         # numbered like `down`, run in reverse
        for i, n_out in enumerate(widths):
            n_in = width if i == 0 else widths[i - 1]
            down = "downsample" if i < last else None
            self.encoder["down"].append(VQGANLevel(n_in, n_out, blocks, attention[i], down))
            n_in = top if i == last else widths[i + 1]
            up = "upsample" if i > 0 else None
            self.decoder["up"].append(VQGANLevel(n_in, n_out, blocks + 1, attention[i], up))
        self.quantize = nn.ModuleDict({"embedding": nn.Embedding(codes, embed_dim)})
        self.quant_conv = nn.Conv2d(z_channels, embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, z_channels, 1)

    def encode(self, images):
        """(B, 3, stride * h, stride * w) in [0, 1] -> tokens (B, h, w): the nearest codebook entries."""
        layers = self.encoder
        x = layers["conv_in"](2 * images - 1)
        for level in layers["down"]:
            x = level(x)
        x = F.silu(layers["norm_out"](layers["mid"](x)))
        z = self.quant_conv(layers["conv_out"](x)).permute(0, 2, 3, 1)             # (B, h, w, embed_dim)
        # |z - e|^2 = |z|^2 - 2 z.e + |e|^2, and |z|^2 is the same for all codes e. Not in bf16, which
        # rounds the distances of neighbouring codes to the same number.
        codebook = self.quantize["embedding"].weight.float()                       # (codes, embed_dim)
        with torch.autocast(z.device.type, enabled=False):
            distances = codebook.square().sum(dim=1) - 2 * F.linear(z.float(), codebook)
        return distances.argmin(dim=3)                                             # of (B, h, w, codes)

    def decode(self, tokens):
        """Tokens (B, h, w) -> images (B, 3, stride * h, stride * w) in [0, 1]."""
        layers = self.decoder
        z = self.quantize["embedding"](tokens).permute(0, 3, 1, 2)                 # (B, embed_dim, h, w)
        x = layers["mid"](layers["conv_in"](self.post_quant_conv(z)))
        for level in reversed(layers["up"]):
            x = level(x)
        x = layers["conv_out"](F.silu(layers["norm_out"](x)))
        return ((x + 1) / 2).clamp(0, 1)


def load_vqgan(path):
    """-> VQGAN with the weights of a taming-transformers checkpoint, written by PyTorch Lightning.

    Neither package is needed. Sizes follow from the tensors' shapes; the discriminator and everything else in
    the file are dropped. Raises BadFile for any other file.
    """
    parts = ("encoder.", "decoder.", "quantize.", "quant_conv.", "post_quant_conv.")
    state = {name: tensor for name, tensor in read_tensors(path).items() if name.startswith(parts)}
    convs = [name for name in state if name.startswith("encoder.down.") and name.endswith(".conv1.weight")]
    levels = range(sum(".block.0." in name for name in convs))
    try:
        codes, embed_dim = state["quantize.embedding.weight"].shape
        width = len(state["encoder.conv_in.weight"])
        widths = [len(state[f"encoder.down.{i}.block.0.conv1.weight"]) for i in levels]
        with torch.device("meta"):                                   # the weights come from the file
            vqgan = VQGAN(codes, embed_dim, z_channels=len(state["post_quant_conv.weight"]), width=width,
                          multipliers=tuple(channels // width for channels in widths),
                          attention=tuple(f"encoder.down.{i}.attn.0.q.weight" in state for i in levels),
                          blocks=sum(name.startswith("encoder.down.0.") for name in convs))
        load_finite(vqgan, state, assign=True)
        return tested(vqgan)
    except Exception as error:                                       # wrong tensors raise many error types
        raise BadFile(f"{path} is not a VQGAN of taming-transformers: {one_line(error)}") from None


# ---------------------------------------------------------------- by name

MODELS = {
    "vit_nano": (ViT, dict(dim=96, depth=4, heads=3)),               # for a CPU
    "vit_t": (ViT, dict(dim=192, depth=12, heads=3)),
    "vit_s": (ViT, dict(dim=384, depth=12, heads=6)),
    "vit_b": (ViT, dict(dim=768, depth=12, heads=12)),
    "vit_l": (ViT, dict(dim=1024, depth=24, heads=16)),
    "resnet_nano": (ResNet, dict(layers=(1, 1, 1, 1), width=16, small_images=True)),  # for a CPU
    "resnet50": (ResNet, dict(layers=(3, 4, 6, 3), width=64)),
    "resnet50x2": (ResNet, dict(layers=(3, 4, 6, 3), width=128)),
    "resnet50x4": (ResNet, dict(layers=(3, 4, 6, 3), width=256)),
    "convnext_t": (ConvNeXtT, {}),
    "swin_t": (SwinT, {}),
}


def build_backbone(model, img_size=224, patch_size=16, pool="cls", pos_embed="sincos", norm="batch",
                   drop_rate=0.0, dilated=False):
    """-> the backbone named `model`, a key of MODELS. Raises ValueError if there is none of that name.

    ViTs use the next four arguments, ResNets use `norm` and `dilated`, and all models use `drop_rate`.
    """
    if model not in MODELS:
        raise ValueError(f"there is no model {model!r}, only {', '.join(MODELS)}")
    cls, options = MODELS[model]
    if cls is ViT:
        options = dict(options, img_size=img_size, patch_size=patch_size, pool=pool, pos_embed=pos_embed)
    if cls is ResNet:
        options = dict(options, norm=norm, dilated=dilated)
    return cls(**options, drop_rate=drop_rate)


# Decision: neither mask nor class tokens decay. In pretraining, BEiT's code decays the mask token, and MAE's
# both.
NO_DECAY = ("token", "pos_embed", "layer_scale", "relative_position_bias", "alpha_head")


def parameter_groups(named_parameters, weight_decay):
    """-> the trainable parameters in two groups for an optimizer: with weight decay, and without.

    Those without have at most one dimension (biases, norms, alpha), or a word of NO_DECAY in their name.
    """
    decayed = []
    not_decayed = []
    for name, param in named_parameters:
        if not param.requires_grad:
            continue
        if param.ndim <= 1 or any(word in name for word in NO_DECAY):
            not_decayed.append(param)
        else:
            decayed.append(param)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": not_decayed, "weight_decay": 0.0}]


# ---------------------------------------------------------------- weight files

class BadFile(OSError):
    """A weight file cannot be read, used or written. The message is one sentence that names it."""


class StandIn:
    """Replaces the classes of a pickled module. It keeps an object's attributes and ignores all calls."""

    def __init__(self, *args, **options):
        pass

    __setitem__ = append = extend = __init__                         # the other calls that a pickle can make

    def __setstate__(self, state):
        if isinstance(state, dict):
            self.__dict__.update(state)


def read_file(path, stand_in=False):
    """-> the content of a weight file, tensors in plain containers, on the CPU. Raises BadFile.

    It reads PyTorch's zip files and .safetensors, and runs no code in them: torch's restricted unpickler
    builds tensors only. argparse.Namespace is allowed as inert data, as MAE's files hold one; with stand_in
    all other classes become StandIns, of which the tensors can be taken.
    """
    try:
        if os.path.exists(path) and not os.path.isfile(path):        # opening a FIFO could wait forever
            raise ValueError("is not a regular file")
        if str(path).endswith(".safetensors"):
            return read_safetensors(path)
        with open(path, "rb") as file:
            start = file.read(4)
        # Files from before torch 1.6 can make torch read and write freed memory, even with weights_only.
        if start[:1] == b"\x80":
            raise ValueError("has the format before torch 1.6, which cannot be read safely: if you trust its "
                             "origin, convert it: torch.save(torch.load(path, weights_only=False), path)")
        if start != b"PK\x03\x04" or not zipfile.is_zipfile(path):
            raise ValueError("is truncated or not a weight file, perhaps a web page")
        allowed = [argparse.Namespace]
        if stand_in:
            names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
            allowed += [(StandIn, name) for name in names if name != "argparse.Namespace"]
        with torch.serialization.safe_globals(allowed):
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise BadFile(f"{path} is missing") from None
    except OSError as error:
        raise BadFile(f"{path} cannot be read: {str(error.strerror).lower()}") from None
    except ValueError as error:
        raise BadFile(f"{path} {error}") from None
    except Exception as error:                                       # torch.load raises many types
        reason = one_line(error)
        with suppress(Exception):
            names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
            reason = f"it asks for {', '.join(names[:3])}" if names else reason
        raise BadFile(f"{path} is damaged, or holds more than weights ({reason})") from None


SAFETENSORS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
               "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}


def read_safetensors(path):
    """-> {name: tensor}. The file: eight bytes of length, a JSON header of that length, raw numbers."""
    with open(path, "rb") as file:
        content = file.read()
    start = 8 + int.from_bytes(content[:8], "little")
    try:
        tensors = {}
        for name, entry in json.loads(content[8:start]).items():
            if name != "__metadata__":
                first, last = (start + offset for offset in entry["data_offsets"])
                dtype = SAFETENSORS[entry["dtype"]]
                shape = [int(side) for side in entry["shape"]]
                if not start <= first <= last <= len(content) or min(shape, default=0) < 0:
                    raise ValueError
                raw = bytearray(content[first:last])
                numbers = torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)
                tensors[name] = numbers.view(shape)
        return tensors
    except (AttributeError, LookupError, RecursionError, RuntimeError, TypeError, ValueError):
        raise ValueError("is damaged or not a .safetensors file") from None


def read_tensors(path):
    """-> {name: float32 tensor} of a pickled module, or of the "state_dict" in a Lightning checkpoint.

    Such files refer to classes, which are neither imported nor run. Raises BadFile.
    """
    content = read_file(path, stand_in=True)
    try:
        named = content["state_dict"] if isinstance(content, dict) else module_tensors(content, "", set())
        named = {name: tensor for name, tensor in named.items() if torch.is_tensor(tensor)}
        for name, tensor in named.items():
            check_storage(name, tensor)
        return {name: tensor.detach().float() for name, tensor in named.items()}
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise BadFile(f"{path} holds no module ({one_line(error)})") from None


def module_tensors(module, prefix, seen):
    """-> {name: parameter} of a module unpickled with StandIns as classes; seen: ids of visited modules."""
    if id(module) in seen:                                           # a module may contain itself
        return {}
    seen.add(id(module))
    tensors = {prefix + name: tensor for name, tensor in module._parameters.items()}
    for name, child in module._modules.items():
        tensors |= module_tensors(child, f"{prefix}{name}.", seen)
    return tensors


def check_storage(name, tensor):
    """Raises ValueError for a huge tensor that a stride of 0 makes of a tiny file."""
    if tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():
        raise ValueError(f"{name} is larger than what the file holds of it")


def check_tensor(name, tensor, like):
    """Raises ValueError unless a tensor from a file has the shape and kind of `like`, and all its numbers."""
    if tensor.shape != like.shape:
        raise ValueError(f"size mismatch for {name}: {tuple(tensor.shape)}, and {tuple(like.shape)} here")
    if tensor.is_floating_point() != like.is_floating_point() or tensor.is_complex():
        raise ValueError(f"{name} has numbers of type {tensor.dtype}")
    check_storage(name, tensor)
    if tensor.is_floating_point() and not tensor.abs().max() < 1e15:
        raise ValueError(f"has infinite numbers or NaN in {name}")


def load_finite(module, state, **options):
    """Calls module.load_state_dict(state, **options), strictly. Raises RuntimeError and ValueError."""
    expected = module.state_dict()
    for name, tensor in state.items():
        if name in expected:
            check_tensor(name, tensor, expected[name])
    module.load_state_dict(state, **options)


def one_line(error):
    """-> one line of an error's message: the last one of load_state_dict's, which names a tensor."""
    lines = str(error).strip().splitlines() or [repr(error)]
    return (lines[-1] if lines[0].startswith("Error(s)") else lines[0]).strip()[:200]


def save(path, content):
    """torch.save, but `path` never holds a half-written file. Raises BadFile."""
    try:
        torch.save(content, f"{path}.tmp")
        os.replace(f"{path}.tmp", path)
    except (OSError, RuntimeError) as error:
        raise BadFile(f"cannot write {path} ({one_line(error)}): the earlier file is kept; make room, "
                      "then --resume") from None
    finally:
        with suppress(OSError):
            os.remove(f"{path}.tmp")


def read_args(path):
    """-> {name: value}: the arguments that describe the model in a checkpoint.pt of a pretraining script."""
    content = read_file(path)
    left_out = (*MAY_CHANGE, "recipe", "init")
    try:
        return {name: value for name, value in content["args"].items() if name not in left_out}
    except (AttributeError, LookupError, TypeError):
        raise BadFile(f"{path} is no checkpoint.pt of a pretraining script") from None


def save_checkpoint(script, args, config, step, model, optimizer, scaler, **more):
    """Writes OUTPUT_DIR/checkpoint.pt, all that resuming needs. Raises BadFile."""
    save(f"{args.output_dir}/checkpoint.pt",
         {"script": script, "args": vars(args), "config": config, "step": step, "model": model.state_dict(),
          "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(), **more})


# The arguments that may change when a run is resumed. The others determine the method or the images' order.
MAY_CHANGE = ("epochs", "warmup_epochs", "lr", "clip_grad", "max_steps", "accum_steps", "data", "device",
              "amp", "compile", "num_workers", "check_data", "tokenizer_dir", "freeze_generator",
              "output_dir", "resume", "eval_only", "recipe_values")


def restore(script, args, model, optimizer=None, scaler=None, path=None):
    """Loads OUTPUT_DIR/checkpoint.pt, or `path`, into model, optimizer and scaler. -> the file's content.

    Raises BadFile unless the same script wrote it, and, if there is an optimizer, with the same arguments,
    except for those of MAY_CHANGE.
    """
    path = path or f"{args.output_dir}/checkpoint.pt"
    checkpoint = read_file(path)
    try:
        conflicts = [f"--{key} {value}" for key, value in checkpoint["args"].items()
                     if optimizer and key not in MAY_CHANGE and getattr(args, key, value) != value]
        if checkpoint["script"] != script or conflicts:
            raise ValueError(f"it was written by {checkpoint['script']}.py {' '.join(conflicts)}")
        load_finite(model, checkpoint["model"])
        if optimizer:
            load_moments(optimizer, checkpoint["optimizer"]["state"])
            if checkpoint["scaler"]:                                  # empty in a run without fp16
                scaler.load_state_dict(checkpoint["scaler"])
        if not 0 <= int(checkpoint["step"]) < 1e12:
            raise ValueError(f"its step count is {checkpoint['step']}")
    except Exception as error:                               # a file made by hand can raise many types
        reason = f"{type(error).__name__}: {one_line(error)}".removeprefix("ValueError: ")
        raise BadFile(f"cannot continue from {path} ({reason}): this needs the script, the flags and the "
                      "folder of the run that wrote it") from None
    return checkpoint


def load_moments(optimizer, state):
    """Loads AdamW's or SGD's moments, {index of the parameter: {name: tensor}}. Raises ValueError.

    Nothing else of a file enters the optimizer, and moments get their parameter's memory layout: fused AdamW
    checks neither, and would write to memory that is not its own.
    """
    params = [param for group in optimizer.param_groups for param in group["params"]]
    names = {"step", "exp_avg", "exp_avg_sq"} if "betas" in optimizer.defaults else {"momentum_buffer"}
    for index, values in state.items():
        param = params[index]
        if values.keys() != names:
            raise ValueError(f"the optimizer's state has {', '.join(map(str, values))}")
        for name, value in values.items():
            like = torch.zeros((), device=param.device) if name == "step" else param.detach()
            check_tensor(f"the optimizer's {name}", value, like)
            optimizer.state[param][name] = torch.empty_like(like).copy_(value)


# Prefixes under which a backbone's weights stand in the files of wrapped and whole models.
PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.", "encoder.", "student.", "teacher.")
HEADS = ("head.", "head_dist.", "fc.", "fc_norm.", "classifier.2.", "decoder", "mask_token")
# What keys show about a file whose model is not built here.
KINDS = {"dist_token": "a distilled DeiT", "relative_position": "BEiT, with relative positions",
         "gamma_1": "a ViT with LayerScale", ".ls1.": "a ViT with LayerScale",
         "class_token": "torchvision's ViT", "embeddings.": "a model with Hugging Face's names"}


def find_weights(content, prefixes=PREFIXES):
    """-> {name: tensor}: the backbone's weights in a file's content, without prefixes such as "module."."""
    for key in ("model", "state_dict", "teacher", "student"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    weights = {str(key): value for key, value in dict(content).items() if torch.is_tensor(value)}
    prefix = True
    while prefix:
        prefix = next((prefix for prefix in prefixes if any(key.startswith(prefix) for key in weights)), "")
        weights = {key[len(prefix):]: value for key, value in weights.items() if key.startswith(prefix)}
    return weights


def load_weights(backbone, weights):
    """Loads a state dict with the names of timm (ViT), MAE or torchvision. -> its head's keys, not loaded.

    The position embedding is resized if the image size differs. Raises RuntimeError or ValueError for other
    keys that are missing, unknown or of another shape, and for numbers that are not finite.
    """
    expected = backbone.state_dict()
    names = " ".join(map(str, find_weights(weights, prefixes=())))
    kind = next((kind for word, kind in KINDS.items() if word in names), None)
    weights = find_weights(weights)
    if "pos_embed" in expected and "pos_embed" in weights:
        check_storage("pos_embed", weights["pos_embed"])
        weights["pos_embed"] = resize_pos_embed(weights["pos_embed"], backbone.grid_size)

    head_keys = [key for key in weights if key not in expected and key.startswith(HEADS)]
    kept = {}
    if "fc_norm.weight" in weights:        # timm and MAE, if patch means are classified: no last norm
        kept = {key: value for key, value in expected.items() if key in ("norm.weight", "norm.bias")}
    try:
        load_finite(backbone, kept | {key: value for key, value in weights.items() if key not in head_keys})
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"it holds {kind}, which is not built here" if kind else one_line(error)) from None
    return head_keys


def load_backbone(path):
    """-> the backbone of a backbone.pt, in eval mode: backbone(images) is its feature, pooled as in training.

    Images are normalised (B, 3, H, W); data.center_transform(img_size) makes one. If a ViT was fine-tuned
    with --head_norm layer, its head saw another feature, the patch tokens' mean before the last LayerNorm:
    backbone.forward_tokens(images, norm=False)[:, 1:].mean(dim=1). Raises BadFile.
    """
    content = read_file(path)
    try:
        options = {key: content["config"][key] for key in ("model", "img_size", "patch_size", "pool", "norm")}
        backbone = build_backbone(**options)
        load_weights(backbone, content["model"])
    except Exception as error:                               # a file made by hand can raise many types
        raise BadFile(f"{path} is no backbone.pt ({one_line(error)})") from None
    return backbone.eval()

"""Backbones, as plain nn.Modules that know nothing of the method that trains them.

The backbones are ViT, ResNet, ConvNeXt-T and Swin-T; DVAE, DALL-E's tokenizer of images, stands after them.
Every backbone has the same two methods and two numbers:

    forward(images)      (B, 3, H, W) -> (B, width)                          one pooled feature per image
    forward_map(images)  (B, 3, H, W) -> (B, width, H // stride, W // stride)  the dense feature map

ViT uses timm's parameter names and ResNet torchvision's, so that weights move in both directions;
ConvNeXt-T and Swin-T are torchvision's own classes with the classifier taken off.
"""
import math
import os
import pickle
import warnings

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import convnext, swin_transformer
from torchvision.ops import StochasticDepth


# ---------------------------------------------------------------- Vision Transformer

def sincos_2d(dim, grid_size):
    """Fixed 2-D sine-cosine position embedding of MoCo v3 (Chen et al., 2021): (1, grid_size ** 2, dim).

    A quarter of the channels each for sin(x), cos(x), sin(y), cos(y); `dim` must be a multiple of 4.
    """
    omega = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    y, x = torch.meshgrid(torch.arange(grid_size), torch.arange(grid_size), indexing="ij")
    x, y = x.reshape(-1, 1) * omega, y.reshape(-1, 1) * omega                       # (N, dim/4) each
    return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=1).float()[None]    # (1, N, dim)


def resize_pos_embed(pos_embed, grid_size):
    """A ViT's position embedding for another image size: (1, 1 + N, dim) -> (1, 1 + grid_size ** 2, dim).

    The patches' entries, a square grid, are interpolated (bicubic with antialiasing, as timm does it); the
    class token's entry, the first, stays.
    """
    cls, grid = pos_embed[:, :1], pos_embed[:, 1:]
    side = round(grid.shape[1] ** 0.5)
    grid = grid.reshape(1, side, side, -1).permute(0, 3, 1, 2).float()             # (1, dim, side, side)
    grid = F.interpolate(grid, size=(grid_size, grid_size), mode="bicubic", antialias=True)
    return torch.cat([cls.float(), grid.flatten(2).transpose(1, 2)], dim=1)        # (1, 1 + M, dim)


def drop_path(rate):
    """Stochastic depth (Huang et al., 2016): while training, an image skips the branch at this rate."""
    return StochasticDepth(rate, mode="row") if rate > 0 else nn.Identity()


class PatchEmbed(nn.Module):
    """(B, 3, H, W) -> (B, N, dim): one linear map of every patch_size x patch_size patch, in raster order."""

    def __init__(self, dim, patch_size):
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(3, dim, kernel_size=patch_size, stride=patch_size)
        nn.init.xavier_uniform_(self.proj.weight.view(dim, -1))      # as the linear layer that it is

    def forward(self, images):
        B, C, H, W = images.shape
        p = self.patch_size
        # A convolution whose stride is its kernel is a matrix product. Written as one, it is several times
        # faster on a CPU, most of all in the second derivative that the energy method takes.
        x = images.reshape(B, C, H // p, p, W // p, p).permute(0, 2, 4, 1, 3, 5)    # (B, h, w, C, p, p)
        x = x.reshape(B, (H // p) * (W // p), C * p * p)                            # (B, N, C*p*p)
        return F.linear(x, self.proj.weight.flatten(1), self.proj.bias)             # (B, N, dim)


class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        B, N, D = x.shape
        qkv = self.qkv(x).view(B, N, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                         # (B, h, N, D/h) each
        x = F.scaled_dot_product_attention(q, k, v)                  # (B, h, N, D/h)
        return self.proj(x.transpose(1, 2).reshape(B, N, D))


class MLP(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, dim, heads, drop_rate=0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLP(dim, 4 * dim)
        self.drop_path = drop_path(drop_rate)

    def forward(self, x):
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class ViT(nn.Module):
    """Vision Transformer (Dosovitskiy et al., 2021), pre-norm, with a class token.

    pool: "cls" or "mean" (of the patch tokens). pos_embed: "sincos" (fixed; its class token entry is
    zero) or "learned". drop_rate: of stochastic depth in the last block, from 0 in the first on linearly.
    Initialised as MAE does: xavier-uniform linear layers, normal 0.02 for the rest.
    """

    def __init__(self, dim, depth, heads, img_size=224, patch_size=16, pool="cls", pos_embed="sincos",
                 drop_rate=0.0):
        super().__init__()
        self.width, self.stride, self.pool = dim, patch_size, pool
        grid_size = img_size // patch_size
        self.patch_embed = PatchEmbed(dim, patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid_size ** 2, dim), pos_embed == "learned")
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
            self.pos_embed.data[:, 1:] = sincos_2d(dim, grid_size)

    def forward_tokens(self, images, pos_embed=None, keep=None, norm=True):
        """(B, 3, H, W) -> (B, 1 + M, dim), the class token first; norm: through the last LayerNorm.

        keep: (B, M) int64, the patches that enter; None: all N, in raster order.
        pos_embed: (B, M, dim), used for those patches in place of the model's own (not for the class token).
        """
        x = self.patch_embed(images)                                               # (B, N, dim)
        if keep is not None:
            x = x.gather(1, keep[:, :, None].expand(-1, -1, x.shape[2]))           # (B, M, dim)
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
    """BatchNorm, or GroupNorm with 32 groups (Wu & He, 2018); narrow layers get two channels a group."""
    return nn.BatchNorm2d(channels) if kind == "batch" else nn.GroupNorm(min(32, channels // 2), channels)


class Bottleneck(nn.Module):
    """1x1, 3x3 (carries stride and dilation), 1x1 to four times the width, around a shortcut."""

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
        self.drop_path = drop_path(drop_rate)

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        y = self.drop_path(self.bn3(self.conv3(y)))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """ResNet (He et al., 2016) of bottleneck blocks, the stride on the 3x3 convolution as in torchvision.

    width: channels of the stem; 2x and 4x widen every layer, as SimCLR does. small_images: a 3x3 stem of
    stride 1 without pooling (stride 8 in all instead of 32). norm: "batch" or "group". drop_rate: of
    stochastic depth in the last block, from 0 in the first on linearly. dilated: the last stages dilate their
    kernels instead of striding, as torchvision does it, until the stride in all is 8 (for segmentation).
    """

    def __init__(self, layers, width, norm="batch", small_images=False, drop_rate=0.0, dilated=False):
        super().__init__()
        self.width, self.stride = 32 * width, 8 if small_images or dilated else 32
        self.conv1 = nn.Conv2d(3, width, 3 if small_images else 7, 1 if small_images else 2,
                               padding=1 if small_images else 3, bias=False)
        self.bn1 = norm_layer(norm, width)
        self.maxpool = nn.Identity() if small_images else nn.MaxPool2d(3, stride=2, padding=1)
        in_channels, dilation = width, 1
        rates = torch.linspace(0, drop_rate, sum(layers), device="cpu").tolist()
        for i, depth in enumerate(layers):
            blocks = []
            dilate = dilated and not small_images and i >= 2
            for j in range(depth):
                stride = 2 if i > 0 and j == 0 and not dilate else 1
                blocks.append(Bottleneck(in_channels, width * 2 ** i, stride, norm, dilation, rates.pop(0)))
                in_channels = 4 * width * 2 ** i
                if dilate and j == 0:      # it stands in for the stride: from the next block on
                    dilation *= 2
            self.add_module(f"layer{i + 1}", nn.Sequential(*blocks))

        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward_map(self, images):
        x = self.maxpool(F.relu(self.bn1(self.conv1(images))))       # (B, width/32, H/4, W/4)
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))  # (B, width, H/32, W/32)

    def forward(self, images):
        return self.forward_map(images).mean(dim=(2, 3))


# ---------------------------------------------------------------- torchvision's ConvNeXt-T and Swin-T

class ConvNeXtT(convnext.ConvNeXt):
    """torchvision's convnext_tiny without its last linear layer."""

    width, stride = 768, 32

    def __init__(self, drop_rate=0.0):
        Stage = convnext.CNBlockConfig
        super().__init__([Stage(96, 192, 3), Stage(192, 384, 3), Stage(384, 768, 9), Stage(768, None, 3)],
                         stochastic_depth_prob=drop_rate)
        self.classifier[2] = nn.Identity()

    def forward_map(self, images):
        return self.features(images)


class SwinT(swin_transformer.SwinTransformer):
    """torchvision's swin_t without its head."""

    width, stride = 768, 32

    def __init__(self, drop_rate=0.0):
        super().__init__(patch_size=[4, 4], embed_dim=96, depths=[2, 2, 6, 2], num_heads=[3, 6, 12, 24],
                         window_size=[7, 7], stochastic_depth_prob=drop_rate)
        self.head = nn.Identity()

    def forward_map(self, images):
        return self.permute(self.norm(self.features(images)))        # (B, h, w, 768) -> (B, 768, h, w)


# ---------------------------------------------------------------- DALL-E's discrete VAE

DALLE_URL = "https://cdn.openai.com/dall-e/"                         # encoder.pkl and decoder.pkl

class Conv2d(nn.Module):
    """Convolution that keeps the size, with DALL-E's parameter names and initialisation."""

    def __init__(self, n_in, n_out, kernel_size):
        super().__init__()
        std = (n_in * kernel_size ** 2) ** -0.5
        self.w = nn.Parameter(std * torch.randn(n_out, n_in, kernel_size, kernel_size))
        self.b = nn.Parameter(torch.zeros(n_out))

    def forward(self, x):
        return F.conv2d(x, self.w, self.b, padding=self.w.shape[-1] // 2)


class DVAEBlock(nn.Module):
    """Four convolutions around a shortcut: 3, 3, 3, 1 wide in DALL-E's encoder, 1, 3, 3, 3 in its decoder."""

    def __init__(self, n_in, n_out, kernel_sizes, gain):
        super().__init__()
        self.gain, hidden = gain, n_out // 4
        self.id_path = Conv2d(n_in, n_out, 1) if n_in != n_out else nn.Identity()
        widths = (n_in, hidden, hidden, hidden, n_out)
        self.res_path = nn.ModuleDict({f"conv_{i + 1}": Conv2d(widths[i], widths[i + 1], kernel_size)
                                       for i, kernel_size in enumerate(kernel_sizes)})

    def forward(self, x, upsample=False):
        x, y = self.id_path(x), self.res_path["conv_1"](F.relu(x))
        if upsample:    # DALL-E enlarges x first: the same, but 1x1 convolutions are cheaper before
            x, y = (F.interpolate(z, scale_factor=2, mode="nearest") for z in (x, y))
        for name in ("conv_2", "conv_3", "conv_4"):
            y = self.res_path[name](F.relu(y, inplace=True))
        return x + self.gain * y


class DVAE(nn.Module):
    """DALL-E's discrete VAE (Ramesh et al., 2021): images to a grid of tokens, one for 8x8 pixels, and back.

    Names and layers are those of github.com/openai/DALL-E; its published weights have the sizes given as
    defaults here. Images are in [0, 1], their sides multiples of 8; tokens are int64 in [0, codes).
    """

    stride = 8

    def __init__(self, codes=8192, width=256, embed_width=128, blocks=2):
        super().__init__()
        self.config = {"codes": codes, "width": width, "embed_width": embed_width, "blocks": blocks}

        def make(n_in, stem_size, widths, n_out, kernel_sizes):
            layers = nn.ModuleDict({"input": Conv2d(n_in, widths[0], stem_size)})
            for i in range(4):
                sizes = (widths[i],) + (widths[i + 1],) * blocks
                layers[f"group_{i + 1}"] = nn.ModuleDict(
                    {f"block_{j + 1}": DVAEBlock(sizes[j], sizes[j + 1], kernel_sizes, 1 / (4 * blocks) ** 2)
                     for j in range(blocks)})
            layers["output"] = nn.ModuleDict({"conv": Conv2d(widths[4], n_out, 1)})
            return nn.ModuleDict({"blocks": layers})

        self.encoder = make(3, 7, [width, width, 2 * width, 4 * width, 8 * width], codes, (3, 3, 3, 1))
        # Six channels come out: mean and scale of a logit-Laplace distribution. Only the mean is of use here.
        self.decoder = make(codes, 1, [embed_width, 8 * width, 4 * width, 2 * width, width], 6, (1, 3, 3, 3))

    def encode_logits(self, images):
        """(B, 3, 8h, 8w) in [0, 1] -> (B, codes, h, w)."""
        layers = self.encoder["blocks"]
        x = layers["input"](0.8 * images + 0.1)                      # DALL-E's map of pixels
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
        else:                                                        # the same on one-hot codes: a lookup
            x = F.embedding(tokens, layers["input"].w[:, :, 0, 0].t()) + layers["input"].b
            x = x.permute(0, 3, 1, 2)                                # (B, embed_width, h, w)
        for i in range(1, 5):
            for name, block in layers[f"group_{i}"].items():
                x = block(x, upsample=i > 1 and name == "block_1")
        output = layers["output"]["conv"]
        x = F.conv2d(F.relu(x), output.w[:3], output.b[:3])
        return ((x.sigmoid() - 0.1) / 0.8).clamp(0, 1)               # DALL-E's map of pixels undone


def load_dalle(encoder_path, decoder_path):
    """DVAE with the weights of the published encoder.pkl and decoder.pkl. Raises OSError or ValueError.

    The files are whole modules, pickled in 2021 with classes of the package dall_e. No code of theirs runs:
    every class in them is read as an empty stand-in, and only the tensors are taken. The sizes follow from
    the tensors' shapes.
    """
    state = {}
    for part, path in (("encoder", encoder_path), ("decoder", decoder_path)):
        state |= {f"{part}.{name}": tensor for name, tensor in read_pickled_module(path).items()}
    try:
        dvae = DVAE(codes=len(state["encoder.blocks.output.conv.w"]),
                    width=len(state["encoder.blocks.input.w"]),
                    embed_width=len(state["decoder.blocks.input.w"]),
                    blocks=sum(name.startswith("encoder.blocks.group_1") for name in state) // 8)
        dvae.load_state_dict(state)
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"{encoder_path} and {decoder_path} are not the two halves of a DALL-E dVAE "
                         f"({str(error).splitlines()[0]}): put encoder.pkl and decoder.pkl there") from None
    return dvae


class StandIn:
    """Takes the place of every module's class in a pickled file: holds its attributes, does nothing."""

    dump_patches = False                                             # torch.load asks for it


class TensorPickle:
    """What torch.load needs of the module pickle, but for tensors in StandIns only: nothing else is called.

    (weights_only=True could do so for the zip format, but not for files that a torch before 1.6 wrote.)
    """

    class Unpickler(pickle.Unpickler):
        def find_class(self, module, name):
            if module.startswith(("dall_e.", "torch.nn.modules.")):
                return StandIn
            if f"{module}.{name}" in ("builtins.set", "__builtin__.set", "collections.OrderedDict",
                                      "torch.device", "torch._utils._rebuild_parameter",
                                      "torch._utils._rebuild_tensor_v2"):
                return super().find_class(module, name)
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")

    @staticmethod
    def load(file, **options):
        return TensorPickle.Unpickler(file, **options).load()


def read_pickled_module(path):
    """A file of torch.save(module, path) -> {name: tensor}, without its classes, running no code."""
    try:
        with warnings.catch_warnings(action="ignore"):               # that StandIn's source is another
            module = torch.load(path, map_location="cpu", pickle_module=TensorPickle, weights_only=False)
        tensors = {}
        nodes = [("", module)]
        while nodes:
            prefix, node = nodes.pop()
            tensors |= {prefix + name: tensor.detach().float() for name, tensor in node._parameters.items()}
            nodes += [(f"{prefix}{name}.", child) for name, child in node._modules.items()]
        return tensors
    except OSError:
        raise
    except Exception as error:          # UnpicklingError, RuntimeError, EOFError ... for what is no such file
        with open(path, "rb") as file:
            what = "a text, perhaps a web page" if file.read(200).isascii() else "damaged or something else"
        raise ValueError(f"{path} is {what}, not DALL-E's weights ({str(error).strip().splitlines()[0]}): "
                         f"fetch {os.path.basename(path)} again from {DALLE_URL}") from None


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


def build_model(model, img_size=224, patch_size=16, pool="cls", pos_embed="sincos", norm="batch",
                drop_rate=0.0, dilated=False):
    """The backbone named `model` (a key of MODELS). ViTs take the next four arguments, ResNets `norm` and
    `dilated`, all of them `drop_rate`."""
    cls, options = MODELS[model]
    if cls is ViT:
        options = dict(options, img_size=img_size, patch_size=patch_size, pool=pool, pos_embed=pos_embed)
    if cls is ResNet:
        options = dict(options, norm=norm, dilated=dilated)
    return cls(**options, drop_rate=drop_rate)


HEADS = ("head.", "head_dist.", "fc.", "fc_norm.", "classifier.2.", "decoder", "mask_token")


def load_weights(backbone, weights):
    """Loads a state dict in the names of timm (ViT), MAE or torchvision; -> its keys of a head, left behind.

    The position embedding is resized where the image size differs. ValueError says which other key is
    missing, unknown or of another shape.
    """
    own, weights = backbone.state_dict(), dict(weights)
    if "pos_embed" in own and "pos_embed" in weights and weights["pos_embed"].ndim == 3:
        N, side = (math.isqrt(state["pos_embed"].shape[1] - 1) for state in (weights, own))
        if N != side and N ** 2 + 1 == weights["pos_embed"].shape[1]:
            weights["pos_embed"] = resize_pos_embed(weights["pos_embed"], side)
    left = [key for key in weights if key not in own and key.startswith(HEADS)]
    optional = ("num_batches_tracked",)  # not in old files
    if "fc_norm.weight" in weights:      # timm's and MAE's classifiers of patch means have no last norm
        optional += ("norm.weight", "norm.bias")
    wrong = [f"has no {key}" for key in own if key not in weights and not key.endswith(optional)]
    wrong += [f"has {key}" for key in weights if key not in own and key not in left]
    wrong += [f"has {key} of shape {tuple(weights[key].shape)}, not {tuple(own[key].shape)}"
              for key in own if key in weights and weights[key].shape != own[key].shape]
    if wrong:
        raise ValueError(", ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""))
    backbone.load_state_dict({key: weights[key] for key in own if key in weights}, strict=False)
    return left

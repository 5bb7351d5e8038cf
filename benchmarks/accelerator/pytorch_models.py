"""The models of :mod:`benchmarks.accelerator.pytorch`; each maps its inputs to a loss.

Shapes: B images, N tokens (class token included), D width, H heads, K head width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import pytorch_crate

SIZES = {"image": 224, "patch": 16, "width": 768, "heads": 12, "depth": 12}
DEBUG = {"image": 32, "patch": 16, "width": 64, "heads": 4, "depth": 2}
MASK_RATIO, ROP_RATIO = 0.75, 1 / 7


class FusedSubspaceAttention(pytorch_crate.SubspaceAttention):
    """MSSA by PyTorch's fused attention, whose scale is K^-0.5 too."""

    def forward(self, x_BND: Tensor) -> Tensor:
        w_BHNK = self.qkv(x_BND).unflatten(2, (self.heads, -1)).transpose(1, 2)
        return self.to_out(F.scaled_dot_product_attention(w_BHNK, w_BHNK, w_BHNK).transpose(1, 2).flatten(2))


class Crate(nn.Module):
    """CRATE-MAE with fused attention, which draws its own mask noise."""

    def __init__(self, image: int, patch: int, width: int, heads: int, depth: int) -> None:
        super().__init__()
        self.model = pytorch_crate.build(width, heads, depth, image, patch)
        for module in self.model.modules():
            if isinstance(module, pytorch_crate.SubspaceAttention):
                module.__class__ = FusedSubspaceAttention
        self.patches = (image // patch) ** 2

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images, torch.rand(len(images), self.patches, device=images.device))


class Block(nn.Module):
    """A pre-norm ViT block as timm has it: one query-key-value product, fused attention, GELU."""

    def __init__(self, width: int, heads: int, layer_scale: float = 0.0) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        scales = [nn.Parameter(torch.full((width,), layer_scale)) for _ in range(2)] if layer_scale else []
        self.scales = nn.ParameterList(scales)

    def forward(self, x_BND: Tensor, bias_1HNN: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(self.norm1(x_BND)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        bias = None if bias_1HNN is None else bias_1HNN.to(q.dtype).expand(len(q), -1, -1, -1)
        y_BND = self.proj(F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2))
        x_BND = x_BND + (y_BND * self.scales[0] if self.scales else y_BND)
        y_BND = self.fc2(F.gelu(self.fc1(self.norm2(x_BND))))
        return x_BND + (y_BND * self.scales[1] if self.scales else y_BND)


def patchify(images: Tensor, patch: int) -> Tensor:
    """Images (B, 3, S, S) to pixels of patches (B, N, 3 * patch^2)."""
    return F.unfold(images, patch, stride=patch).transpose(1, 2)


class Ropim(nn.Module):
    """A ViT on patches that a random projector, one per image, has replaced; a linear head; l1 on the complement."""

    def __init__(self, image: int, patch: int, width: int, heads: int, depth: int) -> None:
        super().__init__()
        grid = image // patch
        self.patch, self.kept = patch, max(1, round(ROP_RATIO * grid**2))
        self.embed = nn.Conv2d(3, width, patch, patch)
        self.cls = nn.Parameter(torch.zeros(1, 1, width))
        self.table = nn.Parameter(torch.zeros((2 * grid - 1) ** 2 + 3, heads))
        row, column = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
        row, column = row.flatten(), column.flatten()
        index = torch.full((grid**2 + 1,) * 2, len(self.table) - 1)
        rows, columns = (a[:, None] - a[None, :] + grid - 1 for a in (row, column))
        index[1:, 1:] = rows * (2 * grid - 1) + columns
        index[0, 1:], index[1:, 0] = len(self.table) - 3, len(self.table) - 2
        self.register_buffer("index", index)
        self.blocks = nn.ModuleList([Block(width, heads, 0.1) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(width, eps=1e-6), nn.Linear(width, 3 * patch**2)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.embed(images).flatten(2).transpose(1, 2)
        B, N, _ = tokens.shape
        sketch = torch.randint(self.kept, (B, N), device=images.device)
        signs = torch.randint(2, (B, N), device=images.device).float() * 2 - 1
        s_BNM = F.one_hot(sketch, self.kept) * signs[:, :, None]
        s_BNM = (s_BNM / s_BNM.square().sum(1, keepdim=True).clamp(min=1).sqrt()).to(tokens.dtype)
        x = torch.cat([self.cls.expand(B, -1, -1), s_BNM @ (s_BNM.transpose(1, 2) @ tokens)], 1)
        bias = self.table[self.index].permute(2, 0, 1)[None]
        for block in self.blocks:
            x = block(x, bias)
        error = self.head(self.norm(x))[:, 1:] - patchify(images, self.patch)
        return (error - s_BNM @ (s_BNM.transpose(1, 2) @ error.to(s_BNM.dtype))).abs().mean()


class Mae(nn.Module):
    """MAE: the encoder sees a quarter of the patches; a decoder of 8 blocks; l2 on the removed, normalised patches."""

    def __init__(self, image: int, patch: int, width: int, heads: int, depth: int, small: bool = False) -> None:
        super().__init__()
        narrow, decoder_heads, decoder_depth = (64, 4, 2) if small else (512, 16, 8)
        self.patch, grid = patch, image // patch
        self.embed = nn.Conv2d(3, width, patch, patch)
        self.cls = nn.Parameter(torch.zeros(1, 1, width))
        self.mask = nn.Parameter(torch.zeros(1, 1, narrow))
        self.register_buffer("positions", pytorch_crate.sincos_positions(width, grid))
        self.register_buffer("decoder_positions", pytorch_crate.sincos_positions(narrow, grid))
        self.blocks = nn.ModuleList([Block(width, heads) for _ in range(depth)])
        self.norm, self.narrow = nn.LayerNorm(width, eps=1e-6), nn.Linear(width, narrow)
        self.decoder = nn.ModuleList([Block(narrow, decoder_heads) for _ in range(decoder_depth)])
        self.decoder_norm, self.head = nn.LayerNorm(narrow, eps=1e-6), nn.Linear(narrow, 3 * patch**2)

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images).flatten(2).transpose(1, 2) + self.positions[:, 1:]
        B, N, D = x.shape
        kept = int(N * (1 - MASK_RATIO))
        order = torch.rand(B, N, device=images.device).argsort(1)
        restore = order.argsort(1)
        x = torch.gather(x, 1, order[:, :kept, None].expand(-1, -1, D))
        x = torch.cat([(self.cls + self.positions[:, :1]).expand(B, -1, -1), x], 1)
        for block in self.blocks:
            x = block(x)
        x = self.narrow(self.norm(x))
        y = torch.cat([x[:, 1:], self.mask.to(x.dtype).expand(B, N - kept, -1)], 1)
        y = torch.gather(y, 1, restore[:, :, None].expand(-1, -1, y.shape[2]))
        y = torch.cat([x[:, :1], y], 1) + self.decoder_positions
        for block in self.decoder:
            y = block(y)
        target = patchify(images, self.patch)
        target = (target - target.mean(2, keepdim=True)) / (target.var(2, keepdim=True) + 1e-6).sqrt()
        error = (self.head(self.decoder_norm(y))[:, 1:] - target).square().mean(2)
        removed = (restore >= kept).to(error.dtype)
        return (error * removed).sum() / removed.sum()


def mlp(inside: int, hidden: int, outside: int) -> nn.Sequential:
    """Solo-learn's projector and predictor."""
    return nn.Sequential(
        nn.Linear(inside, hidden), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True), nn.Linear(hidden, outside)
    )


class Byol(nn.Module):
    """BYOL: a ResNet and its moving average on two views, a classifier on the features that sends no gradient back."""

    def __init__(self, small: bool) -> None:
        super().__init__()
        import torchvision

        def half() -> nn.Sequential:
            encoder = torchvision.models.resnet18() if small else torchvision.models.resnet50()
            width, encoder.fc = encoder.fc.in_features, nn.Identity()
            return nn.Sequential(encoder, mlp(width, 4096 // (64 if small else 1), 256))

        self.student, self.target = half(), half()
        self.target.load_state_dict(self.student.state_dict())
        self.target.requires_grad_(False)
        self.predictor = mlp(256, 4096 // (64 if small else 1), 256)
        self.classifier = nn.Linear(self.student[1][0].in_features, 1000)

    def forward(self, first: Tensor, second: Tensor, label: Tensor) -> Tensor:
        features = [self.student[0](view) for view in (first, second)]
        predicted = [self.predictor(self.student[1](f)) for f in features]
        with torch.no_grad():
            targets = [self.target(view) for view in (second, first)]
        loss = sum(
            2 - 2 * F.cosine_similarity(p.float(), t.float()).mean() for p, t in zip(predicted, targets, strict=True)
        )
        return loss + sum(F.cross_entropy(self.classifier(f.detach()), label) for f in features) / 2

    @torch.no_grad()
    def after(self) -> None:
        """The target's average."""
        pairs = list(zip(self.target.parameters(), self.student.parameters(), strict=True))
        torch._foreach_lerp_([t for t, _ in pairs], [s for _, s in pairs], 0.01)

    @staticmethod
    def optimizer(parameters: list[Tensor], **fused: Any) -> torch.optim.Optimizer:
        """In place of LARS."""
        return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-6, **fused)


def build(name: str, batch: int, device: torch.device, debug: bool) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The model of a part on the device, with its inputs: random images, channels last."""
    sizes = DEBUG if debug else SIZES

    def images() -> Tensor:
        shape = (batch, 3, sizes["image"], sizes["image"])
        return torch.randn(shape, device=device).contiguous(memory_format=torch.channels_last)

    if name == "byol_resnet50":
        model: nn.Module = Byol(debug).to(device, memory_format=torch.channels_last)
        return model, (images(), images(), torch.randint(1000, (batch,), device=device))
    model = {"crate_mae_b": Crate, "ropim_vit_b": Ropim, "vit_mae_b": Mae}[name](
        **sizes, **({"small": debug} if name == "vit_mae_b" else {})
    )
    return model.to(device, memory_format=torch.channels_last), (images(),)

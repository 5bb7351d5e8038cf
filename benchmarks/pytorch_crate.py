"""CRATE-MAE in plain eager PyTorch, to which the CPU speed of `crate_jax` is compared; the library does not use it.

The module follows Listings 1-3 and equations 2.19-2.21 of "Masked Completion via Structured Diffusion with White-Box
Transformers" (arXiv 2404.02446) and carries the parameter names of the authors' state_dict, so that weights of
their code load and gradients compare directly (tests/test_benchmark_pytorch.py does this). It keeps their choices that
cost time, three products in ISTA and hand-written attention, because their cost is measured.

    python -m benchmarks.pytorch_crate --batch 16 --steps 10 --threads 4

prints one JSON object with the milliseconds of every training step and their median.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCK_NORM_EPS = 1e-5  # inside the blocks; PyTorch's default, which the authors keep there
FINAL_NORM_EPS = 1e-6  # in `norm` and `decoder_norm`


def sincos_positions(width: int, grid: int) -> Tensor:
    """Fixed 2-D sine-cosine positions (1, 1 + grid^2, width); the row of the class token is zero.

    The first half of the channels encodes the column, the second half the row, each as sines followed by cosines.
    """
    if width % 4:
        raise ValueError(f"sine-cosine positions need a width divisible by 4, got {width}")
    frequency = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angle = torch.arange(grid, dtype=torch.float64)[:, None] * frequency
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)
    columns = axis[None, :, :].expand(grid, grid, -1)
    rows = axis[:, None, :].expand(grid, grid, -1)
    table = torch.cat([columns, rows], dim=2).reshape(grid * grid, width)
    return torch.cat([table.new_zeros(1, width), table])[None].float()


class PreNorm(nn.Module):
    """`fn` applied to the layer-normalised tokens (B, N, D)."""

    def __init__(self, width: int, fn: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=BLOCK_NORM_EPS)
        self.fn = fn

    def forward(self, x_BND: Tensor) -> Tensor:
        return self.fn(self.norm(x_BND))


class SubspaceAttention(nn.Module):
    """Multi-head subspace self-attention (eq. 2.8): one projection `qkv` serves as query, key and value.

    The projection has no bias, the output matrix is free and has one; scores are scaled by head_width^-0.5.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"the width must be a multiple of the number of heads, got {width} and {heads}")
        self.heads = heads
        self.scale = (width // heads) ** -0.5
        self.qkv = nn.Linear(width, width, bias=False)
        self.to_out = nn.Sequential(nn.Linear(width, width))

    def forward(self, x_BND: Tensor) -> Tensor:
        w_BHNK = self.qkv(x_BND).unflatten(2, (self.heads, -1)).transpose(1, 2)
        attention_BHNN = (torch.matmul(w_BHNK, w_BHNK.transpose(2, 3)) * self.scale).softmax(dim=-1)
        return self.to_out(torch.matmul(attention_BHNN, w_BHNK).transpose(1, 2).flatten(2))


class Ista(nn.Module):
    """One non-negative proximal step of sparse coding against `weight` (D, D) (eq. 2.9), with three products."""

    def __init__(self, width: int, lam: float, eta: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, width))
        nn.init.kaiming_uniform_(self.weight)
        self.lam = lam
        self.eta = eta

    def forward(self, x_BND: Tensor) -> Tensor:
        code_BND = F.linear(x_BND, self.weight)
        reconstruction_BND = F.linear(code_BND, self.weight.t())
        correlation_BND = F.linear(x_BND, self.weight.t())
        return F.relu(x_BND + self.eta * (correlation_BND - reconstruction_BND) - self.eta * self.lam)


class EncoderBlock(nn.Module):
    """x <- x + MSSA(LN(x)); x <- ISTA(LN(x)), the second without a residual (eq. 2.19)."""

    def __init__(self, width: int, heads: int, lam: float, eta: float) -> None:
        super().__init__()
        pair = nn.ModuleList([PreNorm(width, SubspaceAttention(width, heads)), PreNorm(width, Ista(width, lam, eta))])
        self.layers = nn.ModuleList([pair])

    def forward(self, x_BND: Tensor) -> Tensor:
        attention, ista = self.layers[0]
        return ista(x_BND + attention(x_BND))


class DecoderBlock(nn.Module):
    """g <- E LN(x); x <- g - MSSA(LN(g)) where g itself is not normalised (eq. 2.20, as in the authors' code)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        linear = nn.Linear(width, width, bias=False)
        nn.init.kaiming_uniform_(linear.weight)
        pair = nn.ModuleList([PreNorm(width, linear), PreNorm(width, SubspaceAttention(width, heads))])
        self.layers = nn.ModuleList([pair])

    def forward(self, x_BND: Tensor) -> Tensor:
        linear, attention = self.layers[0]
        g_BND = linear(x_BND)
        return g_BND - attention(g_BND)


class PatchEmbed(nn.Module):
    """Images (B, 3, S, S) to tokens (B, N, D) by a strided convolution."""

    def __init__(self, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, kernel_size=patch, stride=patch)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


class CrateMae(nn.Module):
    """CRATE-MAE; `forward` maps images (B, 3, S, S) and mask noise (B, N) to the pixel loss on removed patches.

    `pos_embed` and `decoder_embed` take no part in the computation; they exist in the authors' checkpoints.
    """

    def __init__(
        self, width: int, heads: int, depth: int, image: int, patch: int, lam: float, eta: float = 0.1
    ) -> None:
        super().__init__()
        if image % patch:
            raise ValueError(f"the image side must be a multiple of the patch side, got {image} and {patch}")
        grid = image // patch
        self.patch = patch
        self.patch_embed = PatchEmbed(width, patch)
        self.cls_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.mask_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.pos_embed = nn.Parameter(sincos_positions(width, grid), requires_grad=False)
        self.decoder_pos_embed = nn.Parameter(sincos_positions(width, grid), requires_grad=False)
        self.blocks = nn.ModuleList([EncoderBlock(width, heads, lam, eta) for _ in range(depth)])
        self.norm = nn.LayerNorm(width, eps=FINAL_NORM_EPS)
        self.decoder_embed = nn.Linear(width, width)
        self.decoder_blocks = nn.ModuleList([DecoderBlock(width, heads) for _ in range(depth)])
        self.decoder_norm = nn.LayerNorm(width, eps=FINAL_NORM_EPS)
        self.decoder_pred = nn.Linear(width, patch * patch * 3)

    def patchify(self, images: Tensor) -> Tensor:
        """Images (B, 3, S, S) to patch pixels (B, N, P) in (row, column, channel) order."""
        batch, channels, side, _ = images.shape
        grid, patch = side // self.patch, self.patch
        split = images.reshape(batch, channels, grid, patch, grid, patch)
        return split.permute(0, 2, 4, 3, 5, 1).reshape(batch, grid * grid, patch * patch * channels)

    def encode(self, images: Tensor, noise_BN: Tensor | None = None, ratio: float = 0.75) -> tuple[Tensor, Tensor]:
        """Latent tokens (B, 1 + N, D) and the mask (B, N) (1 = removed); without noise nothing is removed."""
        x_BND = self.patch_embed(images)
        batch, tokens, width = x_BND.shape
        mask_BN = x_BND.new_zeros(batch, tokens)
        if noise_BN is not None:
            kept = int(tokens * (1 - ratio))
            order_BN = noise_BN.argsort(dim=1)
            restore_BN = order_BN.argsort(dim=1)
            visible = torch.gather(x_BND, 1, order_BN[:, :kept, None].expand(-1, -1, width))
            shuffled = torch.cat([visible, self.mask_token.expand(batch, tokens - kept, -1)], dim=1)
            x_BND = torch.gather(shuffled, 1, restore_BN[:, :, None].expand(-1, -1, width))
            mask_BN = (restore_BN >= kept).to(x_BND.dtype)
        x_BND = x_BND + self.decoder_pos_embed[:, 1:]
        cls = (self.cls_token + self.decoder_pos_embed[:, :1]).expand(batch, -1, -1)
        x_BND = torch.cat([cls, x_BND], dim=1)
        for block in self.blocks:
            x_BND = block(x_BND)
        return self.norm(x_BND), mask_BN

    def decode(self, latent_BND: Tensor) -> Tensor:
        """Latent tokens (B, 1 + N, D) to predicted patch pixels (B, N, P)."""
        x_BND = latent_BND
        for block in self.decoder_blocks:
            x_BND = block(x_BND)
        return self.decoder_pred(self.decoder_norm(x_BND))[:, 1:]

    def forward(self, images: Tensor, noise_BN: Tensor, ratio: float = 0.75) -> Tensor:
        latent_BND, mask_BN = self.encode(images, noise_BN, ratio)
        error_BN = (self.decode(latent_BND) - self.patchify(images)).square().mean(dim=2)
        return (error_BN * mask_BN).sum() / mask_BN.sum()


def build(
    width: int = 384, heads: int = 6, depth: int = 12, image: int = 224, patch: int = 16, lam: float = 0.5
) -> CrateMae:
    """The model to measure; the defaults are CRATE-MAE-Ti (12 encoder and 12 decoder blocks) at 224 pixels."""
    return CrateMae(width, heads, depth, image, patch, lam)


def make_step(model: CrateMae, images: Tensor, learning_rate: float = 3e-5) -> Callable[[], float]:
    """Makes the function that runs one whole training step on `images` (B, 3, S, S) and returns the loss.

    One step draws new mask noise, and runs forward, backward and AdamW with betas (0.9, 0.95) and weight decay 0.1.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    tokens = model.decoder_pos_embed.shape[1] - 1

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = model(images, torch.rand(len(images), tokens))
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def time_steps(step: Callable[[], float], steps: int, warmup: int = 2) -> list[float]:
    """Milliseconds of each of `steps` calls, after `warmup` calls that are not counted.

    Raises:
      FloatingPointError: a loss is NaN or infinite.
    """
    for _ in range(warmup):
        step()
    milliseconds = []
    for _ in range(steps):
        start = time.perf_counter()
        loss = step()
        milliseconds.append(1e3 * (time.perf_counter() - start))
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss}; it must be finite for a valid timing")
    return milliseconds


def main() -> None:
    """Times the training step in eager mode and prints the result as one JSON object."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--image", type=int, default=224)
    parser.add_argument("--patch", type=int, default=16)
    parser.add_argument("--lam", type=float, default=0.5)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = build(args.width, args.heads, args.depth, args.image, args.patch, args.lam)
    images = torch.randn(args.batch, 3, args.image, args.image)
    milliseconds = time_steps(make_step(model, images), args.steps)
    median = statistics.median(milliseconds)
    report = {
        "framework": "pytorch",
        "version": torch.__version__,
        **vars(args),
        "step_ms": [round(value, 2) for value in milliseconds],
        "median_ms": round(median, 2),
        "images_per_second": round(1e3 * args.batch / median, 2),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()

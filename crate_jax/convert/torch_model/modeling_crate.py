# SPDX-License-Identifier: Apache-2.0
"""CRATE and CRATE-MAE in PyTorch, in one file that needs nothing besides PyTorch.

CRATE (arXiv 2306.01129) is a transformer whose layers are steps of an optimisation: each compresses the tokens against
subspaces (MSSA), then makes them sparse in a dictionary (ISTA). CRATE-MAE (arXiv 2404.02446) pre-trains it as a masked
autoencoder; the numbers of equations are those of that paper. In the folder that holds this file, config.json and
model.safetensors:

    from modeling_crate import CrateModel

    model = CrateModel.from_pretrained(".")
    pixel_values = model.preprocess(images)  # uint8 (B, 3, h, w) -> float32 (B, 3, H, W)
    features = model.features(pixel_values)  # one vector per image
    tokens = model(pixel_values).tokens  # (B, 1 + N, D), the class token first

A pre-trained autoencoder has a decoder: `model.loss(pixel_values)` draws a corruption and continues the pre-training;
`model.reconstruct(pixel_values, model.draw(pixel_values))` is a picture. `CrateModel(CrateConfig(...))` is a new model.
`python -m crate_jax.convert export CHECKPOINT --format=torch --out=DIR` wrote this file, and crate_jax reads the folder
back, also after `model.save_pretrained(DIR)`.

Shapes: B batch, H and W pixels, h and w patches per side, N = h * w, M patch tokens that the encoder sees, D width,
E = D in H heads of K, A atoms of a dictionary, P = 3 p * p numbers per patch, C buckets of a projection.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import json
import math
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCK_EPS, FINAL_EPS = 1e-5, 1e-6  # of layer norms: CRATE's blocks; a decoder's last norm and the transformer decoder

CHOICES = {  # the values that fields of CrateConfig may have
    "model_type": ("crate",),
    "interpolation": ("bicubic", "bilinear"),
    "pool": ("cls", "mean", "cls_mean"),
    "positions": ("sincos", "learned", "none"),
    "dictionary": ("complete", "overcomplete"),
    "corruption": ("mask", "rop", "noise", "none"),
    "mask_fill": ("token", "zero", "drop"),
    "rop_buckets": ("balanced", "independent"),
    "rop_signs": ("independent", "balanced"),
    "decoder": ("crate", "transformer", "linear", "none"),
    "decoder_residual": ("stream", "normalised"),
    "init": ("xavier", "mocov3", "timm", "trunc_normal"),
    "loss_target": ("pixel", "patch_normalised"),
    "loss_norm": ("l2", "l1"),
    "loss_region": ("complement", "all"),
}


@dataclasses.dataclass
class CrateConfig:
    """What config.json holds; the defaults are those of CRATE-MAE-Base.

    Attributes:
      image_size: (height, width) in pixels; other sizes that divide into patches work too.
      mean: mean per channel of pixels in [0, 1].
      std: standard deviation per channel of pixels in [0, 1].
      interpolation: bicubic | bilinear, of `preprocess`.
      eval_crop: share of the shorter side that `preprocess` keeps.
      pool: what `features` are: cls, the class token; mean, of the patch tokens; cls_mean, both side by side.
      positions: sincos, a fixed table; learned; none.
      eta: step size of ISTA.
      lam: its sparsity weight lambda.
      dictionary: complete, D x D; overcomplete, with `expansion` times D atoms (CRATE-alpha).
      tied_output: MSSA's output is [U_1 .. U_H] (eq. 2.8), not a free matrix with a bias (released code).
      embed_norm: layer norms before and after the patch projection (supervised CRATE).
      final_norm: a layer norm after the last block, with `final_eps`.
      corruption: mask | rop | noise | none, what the encoder was pre-trained with.
      mask_ratio: share of the patches removed.
      mask_fill: what replaces them: token, a learned one; zero; drop: the encoder sees only the others.
      rop_ratio: rank of the random projection, as a share of N.
      rop_buckets: balanced | independent.
      rop_signs: independent | balanced.
      paper_scale: 0: an exact projector; else the factor on each bucket's sum.
      noise_std: in units of normalised pixels.
      decoder: crate | transformer | linear | none.
      decoder_width: the width of a transformer decoder; 0: it is as wide as the encoder.
      decoder_positions: whether a CRATE decoder adds positions again.
      decoder_residual: stream, g - MSSA(LN(g)); normalised, LN(g) - MSSA(LN(g)).
      init: initial weights of a linear decoder; trunc_normal: those of torch.nn.Linear, as in ROPIM and SimMIM.
      loss_target: pixel | patch_normalised.
      loss_norm: l2 | l1.
      loss_region: complement, (I - P)(x - x^); all, x - x^.
    """

    model_type: str = "crate"
    image_size: tuple[int, ...] = (224, 224)
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    interpolation: str = "bicubic"
    eval_crop: float = 0.875
    pool: str = "cls"
    patch_size: int = 16
    width: int = 768
    depth: int = 12
    heads: int = 12
    positions: str = "sincos"
    eta: float = 0.1
    lam: float = 0.5
    dictionary: str = "complete"
    expansion: int = 4
    tied_output: bool = False
    embed_norm: bool = False
    final_norm: bool = True
    final_eps: float = 1e-6
    corruption: str = "mask"
    mask_ratio: float = 0.75
    mask_fill: str = "token"
    rop_ratio: float = 1 / 7
    rop_buckets: str = "balanced"
    rop_signs: str = "independent"
    paper_scale: float = 0.0
    noise_std: float = 0.5
    decoder: str = "crate"
    decoder_width: int = 0
    decoder_depth: int = 12
    decoder_heads: int = 12
    decoder_positions: bool = False
    decoder_residual: str = "stream"
    init: str = "xavier"
    loss_target: str = "pixel"
    loss_norm: str = "l2"
    loss_region: str = "complement"

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> CrateConfig:
        """The config of config.json; it must have no other fields."""
        unknown = sorted(fields.keys() - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise ValueError(
                f"config.json: unknown field {unknown[0]!r}; a newer modeling_crate.py may have written it"
            )
        return cls(**fields)

    def __post_init__(self) -> None:
        for field, choices in CHOICES.items():
            if getattr(self, field) not in choices:
                raise ValueError(f"{field}={getattr(self, field)!r}: must be one of {', '.join(choices)}")
        self.image_size, self.mean, self.std = tuple(self.image_size), tuple(self.mean), tuple(self.std)

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) patches of an image of `image_size`."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size


class CrateOutput(NamedTuple):
    """What :class:`CrateModel` returns: tokens (B, 1 + M, D), the class token first; pooled (B, D), or (B, 2 D)."""

    tokens: Tensor
    pooled: Tensor


# --- Corruptions: the encoder sees P X, the loss sees (I - P)(X - X^).


class Corruption:
    """Hides nothing; the others replace some of these methods.

    Attributes:
      share: the share of the N patches over which the loss is a mean.
    """

    share = 1.0

    def pixels(self, patches_BNP: Tensor) -> Tensor:
        """Clean patches -> the patches that are embedded."""
        return patches_BNP

    def tokens(self, tokens_BND: Tensor, token_11D: Tensor | None) -> Tensor:
        """P X of embedded patches, (B, N, D) -> (B, M, D); the learned token replaces what is removed."""
        return tokens_BND

    def select(self, table_ND: Tensor) -> Tensor:
        """The positions of the tokens that :meth:`tokens` returns, (N, D) or (B, M, D)."""
        return table_ND

    def restore(self, tokens_BMD: Tensor, token_11D: Tensor | None) -> Tensor:
        """Puts dropped tokens back, as the learned token, (B, M, D) -> (B, N, D)."""
        return tokens_BMD

    def complement(self, error_BNP: Tensor) -> Tensor:
        """(I - P) E of an error over patches."""
        return error_BNP


class Noise(Corruption):
    """Adds noise (B, N, P) to the patches; the loss stays whole."""

    def __init__(self, noise_BNP: Tensor) -> None:
        self.noise_BNP = noise_BNP

    def pixels(self, patches_BNP: Tensor) -> Tensor:
        """X + noise."""
        return patches_BNP + self.noise_BNP.to(patches_BNP.dtype)


class Masking(Corruption):
    """Keeps the `kept` patches with the smallest noise (B, N) and removes the others; `fill` as `config.mask_fill`."""

    def __init__(self, noise_BN: Tensor, kept: int, fill: str = "token") -> None:
        self.order_BN = noise_BN.argsort(dim=1, stable=True)
        self.rank_BN = self.order_BN.argsort(1)
        self.removed_BN1 = (self.rank_BN >= kept)[..., None]
        self.kept, self.fill = kept, fill
        self.share = 1 - kept / noise_BN.shape[1]

    def tokens(self, tokens_BND: Tensor, token_11D: Tensor | None) -> Tensor:
        """Drops the removed tokens, or replaces them."""
        if self.fill == "drop":
            return tokens_BND.gather(1, self.order_BN[:, : self.kept, None].expand(-1, -1, tokens_BND.shape[-1]))
        return self._fill(tokens_BND, token_11D)

    def select(self, table_ND: Tensor) -> Tensor:
        """The rows of the kept tokens if the others are dropped."""
        return table_ND[self.order_BN[:, : self.kept]] if self.fill == "drop" else table_ND

    def restore(self, tokens_BMD: Tensor, token_11D: Tensor | None) -> Tensor:
        """Puts the kept tokens back in their places, and the learned token everywhere else."""
        if self.fill != "drop":
            return tokens_BMD
        source_BN1 = self.rank_BN.clamp(max=self.kept - 1)[..., None]
        return self._fill(tokens_BMD.gather(1, source_BN1.expand(-1, -1, tokens_BMD.shape[-1])), token_11D)

    def _fill(self, tokens_BND: Tensor, token_11D: Tensor | None) -> Tensor:
        if self.fill == "zero":
            return tokens_BND.masked_fill(self.removed_BN1, 0)
        if token_11D is None:
            raise ValueError(f"the model has no mask token for fill={self.fill!r}; fill='zero' needs none")
        return torch.where(self.removed_BN1, token_11D.to(tokens_BND.dtype), tokens_BND)

    def complement(self, error_BNP: Tensor) -> Tensor:
        """The error on removed patches, zero elsewhere."""
        return error_BNP * self.removed_BN1


class Projection(Corruption):
    """Random orthogonal projection over the patches (ROPIM, arXiv 2310.18737, section 3.2), as a count sketch.

    The tokens of one bucket are summed with their signs, and the sum is spread back with the same signs: with the
    factor 1 / (tokens in the bucket) this is an orthogonal projector P = P^T = P^2 of rank C.

    Args:
      bucket_BN: int64 in [0, buckets).
      sign_BN: +1 or -1.
      buckets: C.
      scale: another factor on every sum; 0: the orthogonal projector.
    """

    def __init__(self, bucket_BN: Tensor, sign_BN: Tensor, buckets: int, scale: float = 0.0) -> None:
        self.bucket_BN1, self.sign_BN1 = bucket_BN[..., None], sign_BN[..., None]
        counts_BC = torch.zeros(len(bucket_BN), buckets, device=bucket_BN.device)
        counts_BC = counts_BC.scatter_add(1, bucket_BN, torch.ones_like(sign_BN, dtype=counts_BC.dtype))
        scale_BC = torch.full_like(counts_BC, scale) if scale else 1 / counts_BC.clamp(min=1)
        self.scale_BC1 = scale_BC[..., None]

    def project(self, x_BND: Tensor) -> Tensor:
        """P X."""
        index, sign_BN1 = self.bucket_BN1.expand_as(x_BND), self.sign_BN1.to(x_BND.dtype)
        sums_BCD = x_BND.new_zeros(len(x_BND), self.scale_BC1.shape[1], x_BND.shape[2])
        sums_BCD = sums_BCD.scatter_add(1, index, x_BND * sign_BN1) * self.scale_BC1.to(x_BND.dtype)
        return sums_BCD.gather(1, index) * sign_BN1

    def tokens(self, tokens_BND: Tensor, token_11D: Tensor | None) -> Tensor:
        """P X."""
        return self.project(tokens_BND)

    def complement(self, error_BNP: Tensor) -> Tensor:
        """(I - P) E."""
        return error_BNP - self.project(error_BNP)


def draw(config: CrateConfig, images: int, patches: int, device: Any = None, generator: Any = None) -> Corruption:
    """Draws the corruption of the config's pre-training, for `images` images of `patches` patches."""
    c, B, N = config, images, patches
    on: dict[str, Any] = {"device": device, "generator": generator}
    if c.corruption == "mask":
        return Masking(torch.rand(B, N, **on), int(N * (1 - c.mask_ratio)), c.mask_fill)
    if c.corruption == "noise":
        return Noise(c.noise_std * torch.randn(B, N, 3 * c.patch_size**2, **on))
    if c.corruption == "none":
        return Corruption()
    buckets = max(1, math.ceil(c.rop_ratio * N - 1e-6))
    if c.rop_buckets == "balanced":  # a random permutation of the buckets for each run of as many patches
        bucket_BN = torch.rand(B, -(-N // buckets), buckets, **on).argsort(2).flatten(1)[:, :N]
        if N % buckets:  # any patch may be in the run that is cut short
            places_BN = torch.arange(N, device=device) - torch.randint(N, (B, 1), **on)
            bucket_BN = bucket_BN.gather(1, places_BN % N)
    else:
        bucket_BN = torch.randint(buckets, (B, N), **on)
    order_BN = torch.rand(B, N, **on).argsort(1) if c.rop_signs == "balanced" else torch.randint(2, (B, N), **on)
    plus_BN = order_BN < (N + 1) // 2 if c.rop_signs == "balanced" else order_BN == 1
    sign_BN = torch.where(plus_BN, 1.0, -1.0)
    if c.rop_signs == "balanced" and N % 2:  # the sign of the odd one is drawn
        sign_BN = sign_BN * torch.where(torch.randint(2, (B, 1), **on) == 1, 1.0, -1.0)
    return Projection(bucket_BN, sign_BN, buckets, c.paper_scale)


# --- Patches and positions.


def patchify(images_B3HW: Tensor, patch_size: int) -> Tensor:
    """Cuts images into raster-ordered patches (B, N, P), P as (row, column, channel)."""
    B, _, H, W = images_B3HW.shape
    if H % patch_size or W % patch_size:
        raise ValueError(f"images of {H} x {W} pixels cannot be cut into patches of {patch_size} x {patch_size}")
    x = images_B3HW.reshape(B, 3, H // patch_size, patch_size, W // patch_size, patch_size)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(B, -1, 3 * patch_size**2)


def unpatchify(patches_BNP: Tensor, grid: tuple[int, int], patch_size: int) -> Tensor:
    """Inverse of :func:`patchify`, (B, N, P) -> (B, 3, H, W)."""
    (h, w), p = grid, patch_size
    return patches_BNP.reshape(-1, h, w, p, p, 3).permute(0, 5, 1, 3, 2, 4).reshape(-1, 3, h * p, w * p)


def sincos_positions(grid: tuple[int, int], width: int) -> Tensor:
    """MAE's fixed table (1 + N, D): the first half is the column, the second the row; the class token's row is zero."""
    frequencies = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    rows, columns = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    angles = [coordinate.reshape(-1, 1) * frequencies for coordinate in (columns, rows)]
    table = torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], dim=1)
    return torch.cat([table.new_zeros(1, width), table]).float()


def resize_positions(table_ND: Tensor, grid: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Resizes a table of one row per patch to another grid: bicubic, antialiased (Keys, a = -1/2), as timm does.

    It is `F.interpolate(antialias=True)` as two products, which every device and exporter has.
    """

    def weights(old: int, new: int) -> Tensor:
        centres = (torch.arange(new, dtype=torch.float64) + 0.5) * old / new - 0.5
        x = (centres[:, None] - torch.arange(old)).abs() / max(old / new, 1.0)
        near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
        w = torch.where(x >= 1, far, near).masked_fill(x >= 2, 0)
        return (w / w.sum(1, keepdim=True)).to(table_ND)

    rows, columns = (weights(*sides) for sides in zip(grid, new))  # noqa: B905  (Python 3.9 has no `strict`)
    table = torch.einsum("yh,xw,hwd->yxd", rows, columns, table_ND.reshape(*grid, -1))
    return table.reshape(new[0] * new[1], -1)


# --- The network.

# Of an over-complete dictionary (D, A) the D rows count, as where CRATE-alpha was trained.
kaiming = functools.partial(nn.init.kaiming_uniform_, mode="fan_out")


def dense(inputs: int, outputs: int, bias: bool = True, init: Any = nn.init.xavier_uniform_) -> nn.Linear:
    """A linear layer with CRATE-MAE's initial weights: Xavier-uniform, biases zero."""
    layer = nn.Linear(inputs, outputs, bias)
    init(layer.weight)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def new_token(*shape: int) -> nn.Parameter:
    """A learned token or table, normal with deviation 0.02."""
    return nn.Parameter(0.02 * torch.randn(shape))


class MSSA(nn.Module):
    """Multi-head subspace self-attention: one projection U_k^T z is query, key and value (eq. 2.8).

    SSA(z | U_k) = (U_k^T z) softmax((U_k^T z)^T (U_k^T z)); MSSA(z) = [U_1 .. U_H] [SSA(z | U_1); ..; SSA(z | U_H)].
    Like the released code, the logits have a factor 1 / sqrt(K) and the output is a free matrix, unless it is tied.

    Attributes:
      subspaces: its weight is [U_1 .. U_H]^T.
    """

    def __init__(self, width: int, heads: int, tied_output: bool) -> None:
        super().__init__()
        self.heads = heads
        self.subspaces = dense(width, width, bias=False)
        self.output = None if tied_output else dense(width, width)

    def project(self, z_BND: Tensor) -> Tensor:
        """U_k^T z of all subspaces, (B, N, D) -> (B, H, N, K)."""
        return self.subspaces(z_BND).unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def attention(self, z_BND: Tensor) -> Tensor:
        """The weights that :meth:`forward` averages with, (B, N, D) -> (B, H, N, N)."""
        w_BHNK = self.project(z_BND)
        return (w_BHNK @ w_BHNK.transpose(2, 3) * w_BHNK.shape[-1] ** -0.5).softmax(-1)

    def forward(self, z_BND: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        w_BHNK = self.project(z_BND)
        y_BHNK = F.scaled_dot_product_attention(w_BHNK, w_BHNK, w_BHNK)  # `attention(z) @ w` without the N x N weights
        y_BNE = y_BHNK.transpose(1, 2).flatten(2)
        return y_BNE @ self.subspaces.weight if self.output is None else self.output(y_BNE)


class ISTA(nn.Module):
    """Sparse coding in a dictionary D: proximal-gradient steps on 0.5 |x - D z|^2 + lam |z|_1, z >= 0.

    A complete D takes one step from z = x: ReLU(x + eta D^T (x - D x) - eta lam) (eq. 2.9). An over-complete one takes
    two from z = 0 (CRATE-alpha); the result is then a code of A numbers per token.

    Attributes:
      dictionary: D, (D, A).
    """

    def __init__(self, width: int, atoms: int, overcomplete: bool, eta: float, lam: float) -> None:
        super().__init__()
        self.overcomplete, self.eta, self.lam = overcomplete, eta, lam
        self.dictionary = nn.Parameter(torch.empty(width, atoms))
        kaiming(self.dictionary)

    def step(self, x_BND: Tensor, z_BNA: Tensor) -> Tensor:
        """ReLU(z + eta D^T (x - D z) - eta lam)."""
        residual_BND = x_BND - F.linear(z_BNA, self.dictionary)
        return F.relu(z_BNA + self.eta * F.linear(residual_BND, self.dictionary.T) - self.eta * self.lam)

    def forward(self, x_BND: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, A)."""
        if not self.overcomplete:
            return self.step(x_BND, x_BND)
        first_BNA = F.relu(self.eta * F.linear(x_BND, self.dictionary.T) - self.eta * self.lam)  # D z = 0
        return self.step(x_BND, first_BNA)


class CrateBlock(nn.Module):
    """Z^{l+1/2} = Z^l + MSSA(LN(Z^l)); Z^{l+1} = ISTA(LN(Z^{l+1/2})) (eq. 2.14).

    With an over-complete dictionary a second one, `back`, maps the code back, and its result is added.
    """

    def __init__(self, c: CrateConfig) -> None:
        super().__init__()
        overcomplete = c.dictionary == "overcomplete"
        atoms = c.expansion * c.width if overcomplete else c.width
        self.mssa_norm = nn.LayerNorm(c.width, BLOCK_EPS)
        self.mssa = MSSA(c.width, c.heads, c.tied_output)
        self.ista_norm = nn.LayerNorm(c.width, BLOCK_EPS)
        self.ista = ISTA(c.width, atoms, overcomplete, c.eta, c.lam)
        self.back = dense(atoms, c.width, False, kaiming) if overcomplete else None

    def forward(self, x_BND: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        x_BND = x_BND + self.mssa(self.mssa_norm(x_BND))
        code_BNA = self.ista(self.ista_norm(x_BND))
        return code_BNA if self.back is None else x_BND + self.back(code_BNA)


class Embedding(nn.Module):
    """Patches -> corrupted tokens with positions, behind a class token (eqs. 2.18, B.2)."""

    def __init__(self, c: CrateConfig) -> None:
        super().__init__()
        self.patch_size, self.grid = c.patch_size, c.grid
        pixels = 3 * c.patch_size**2
        self.pixel_norm = nn.LayerNorm(pixels, BLOCK_EPS) if c.embed_norm else nn.Identity()
        self.patch_embed = dense(pixels, c.width)
        self.token_norm = nn.LayerNorm(c.width, BLOCK_EPS) if c.embed_norm else nn.Identity()
        self.cls_token = new_token(1, 1, c.width)
        self.mask_token = new_token(1, 1, c.width) if (c.corruption, c.mask_fill) == ("mask", "token") else None
        self.positions = new_token(1, 1 + c.grid[0] * c.grid[1], c.width) if c.positions == "learned" else None
        fixed = sincos_positions(c.grid, c.width) if c.positions == "sincos" else None
        self.register_buffer("fixed", fixed, persistent=False)

    def table(self, grid: tuple[int, int]) -> Tensor | None:
        """Positions (1 + N, D) for a grid of patches, the class token's first; None: nothing is added."""
        if self.positions is None:
            return self.fixed if self.fixed is None or grid == self.grid else _table_like(self.fixed, grid)
        table = self.positions[0]
        if grid == self.grid:
            return table
        return torch.cat([table[:1], resize_positions(table[1:], self.grid, grid)])

    def forward(self, images_B3HW: Tensor, corruption: Corruption) -> Tensor:
        """(B, 3, H, W) -> (B, 1 + M, D)."""
        patches_BNP = corruption.pixels(patchify(images_B3HW.to(self.patch_embed.weight.dtype), self.patch_size))
        x = self.token_norm(self.patch_embed(self.pixel_norm(patches_BNP)))
        x = corruption.tokens(x, self.mask_token)
        cls_11D = self.cls_token
        table = self.table((images_B3HW.shape[2] // self.patch_size, images_B3HW.shape[3] // self.patch_size))
        if table is not None:
            x, cls_11D = x + corruption.select(table[1:]).to(x.dtype), cls_11D + table[0]
        return torch.cat([cls_11D.to(x.dtype).expand(len(x), -1, -1), x], dim=1)


def _table_like(fixed: Tensor, grid: tuple[int, int]) -> Tensor:
    """The sine-cosine table of another grid, where and of the type of the one that is kept."""
    return sincos_positions(grid, fixed.shape[1]).to(fixed)


class CrateEncoder(nn.Module):
    """Embedding, CRATE blocks, a final norm."""

    def __init__(self, c: CrateConfig) -> None:
        super().__init__()
        self.embedding = Embedding(c)
        self.blocks = nn.ModuleList(CrateBlock(c) for _ in range(c.depth))
        self.norm = nn.LayerNorm(c.width, c.final_eps) if c.final_norm else nn.Identity()

    def forward(self, images_B3HW: Tensor, corruption: Corruption) -> Tensor:
        """(B, 3, H, W) -> (B, 1 + M, D)."""
        x = self.embedding(images_B3HW, corruption)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class CrateDecoderBlock(nn.Module):
    """G = E LN(Y^l); Y^{l+1} = G - MSSA(LN(G)), which undoes a compression step (eq. 2.17)."""

    def __init__(self, c: CrateConfig) -> None:
        super().__init__()
        self.normalised = c.decoder_residual == "normalised"
        self.linear_norm = nn.LayerNorm(c.width, BLOCK_EPS)
        self.linear = dense(c.width, c.width, False, kaiming)
        self.mssa_norm = nn.LayerNorm(c.width, BLOCK_EPS)
        self.mssa = MSSA(c.width, c.decoder_heads, c.tied_output)

    def forward(self, y_BND: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        g_BND = self.linear(self.linear_norm(y_BND))
        normed_BND = self.mssa_norm(g_BND)
        return (normed_BND if self.normalised else g_BND) - self.mssa(normed_BND)


class SelfAttention(nn.Module):
    """The usual multi-head self-attention, of the transformer decoder."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.output = dense(width, 3 * width), dense(width, width)

    def forward(self, x_BND: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        q, k, v = self.qkv(x_BND).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.output(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class TransformerBlock(nn.Module):
    """A pre-norm block of MAE's decoder."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width, FINAL_EPS)
        self.attention = SelfAttention(width, heads)
        self.mlp_norm = nn.LayerNorm(width, FINAL_EPS)
        self.mlp_in, self.mlp_out = dense(width, 4 * width), dense(4 * width, width)

    def forward(self, x_BND: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        x_BND = x_BND + self.attention(self.attention_norm(x_BND))
        return x_BND + self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x_BND))))


class Decoder(nn.Module):
    """Tokens -> patches: CRATE's decoder (eqs. 2.20, 2.21), MAE's transformer, or one linear map (ROPIM, SimMIM)."""

    def __init__(self, c: CrateConfig) -> None:
        super().__init__()
        transformer, linear = c.decoder == "transformer", c.decoder == "linear"
        width = c.decoder_width or c.width
        self.grid = c.grid
        self.embed = dense(c.width, width) if transformer else nn.Identity()
        self.mask_token = new_token(1, 1, width) if (c.corruption, c.mask_fill) == ("mask", "drop") else None
        positions = transformer or (c.decoder_positions and not linear)
        self.register_buffer("fixed", sincos_positions(c.grid, width) if positions else None, persistent=False)
        new_block = (lambda: TransformerBlock(width, c.decoder_heads)) if transformer else lambda: CrateDecoderBlock(c)
        self.blocks = nn.ModuleList(new_block() for _ in range(0 if linear else c.decoder_depth))
        self.norm = nn.Identity() if linear else nn.LayerNorm(width, FINAL_EPS)
        own = linear and c.init == "trunc_normal"
        self.head = (nn.Linear if own else dense)(width, 3 * c.patch_size**2)

    def forward(self, tokens_BMD: Tensor, corruption: Corruption, grid: tuple[int, int]) -> Tensor:
        """Tokens (B, 1 + M, D) of images of (h, w) patches -> patches (B, N, P)."""
        x = self.embed(tokens_BMD)
        x = torch.cat([x[:, :1], corruption.restore(x[:, 1:], self.mask_token)], dim=1)
        if self.fixed is not None:
            x = x + (self.fixed if grid == self.grid else _table_like(self.fixed, grid)).to(x.dtype)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))[:, 1:]


class CrateModel(nn.Module):
    """CRATE, with the decoder of its pre-training if the config has one.

    All methods take normalised images `pixel_values` (B, 3, H, W), as :meth:`preprocess` makes them. There is no
    dropout: training and evaluation compute the same.
    """

    def __init__(self, config: CrateConfig | None = None) -> None:
        super().__init__()
        self.config = CrateConfig() if config is None else config
        self.encoder = CrateEncoder(self.config)
        self.decoder = None if self.config.decoder == "none" else Decoder(self.config)

    def forward(self, pixel_values: Tensor, corruption: Corruption | None = None) -> CrateOutput:
        """The encoder's tokens, and the vector that `config.pool` makes of them; without a corruption of clean images.

        White-box points are in reach of forward hooks: a block's output is Z^{l+1}, `mssa` of a block returns what it
        adds to Z^l.
        """
        tokens_BND = self.encoder(pixel_values, corruption or Corruption())
        return CrateOutput(tokens_BND, self._pool(tokens_BND, self.config.pool))

    def features(self, pixel_values: Tensor, pool: str = "") -> Tensor:
        """One vector per image, (B, D), or (B, 2 D) with `pool` cls_mean; empty: `config.pool`."""
        return self._pool(self(pixel_values).tokens, pool or self.config.pool)

    @staticmethod
    def _pool(tokens_BND: Tensor, pool: str) -> Tensor:
        if pool not in CHOICES["pool"]:
            raise ValueError(f"pool={pool!r}: must be one of {', '.join(CHOICES['pool'])}")
        cls_BD, mean_BD = tokens_BND[:, 0], tokens_BND[:, 1:].mean(1)
        return {"cls": cls_BD, "mean": mean_BD, "cls_mean": torch.cat([cls_BD, mean_BD], -1)}[pool]

    def attention(self, pixel_values: Tensor, block: int | None = None) -> Tensor:
        """Attention of one block, (B, H, 1 + N, 1 + N); `[:, :, 0, 1:]` is the class token's (eqs. B.4, B.5).

        None stands for the last block but one, as in the paper (B.3.2), or for the only block.
        """
        x = self.encoder.embedding(pixel_values, Corruption())
        blocks = list(self.encoder.blocks)
        block = max(len(blocks) - 2, 0) if block is None else block
        for before in blocks[: range(len(blocks))[block]]:
            x = before(x)
        return blocks[block].mssa.attention(blocks[block].mssa_norm(x))

    def draw(self, pixel_values: Tensor, generator: torch.Generator | None = None) -> Corruption:
        """A new corruption of these images, as the config's pre-training draws them."""
        h, w = self._grid(pixel_values)
        return draw(self.config, len(pixel_values), h * w, pixel_values.device, generator)

    def predict(self, pixel_values: Tensor, corruption: Corruption) -> Tensor:
        """The decoder's output, (B, N, P): what `config.loss_target` says."""
        if self.decoder is None:
            raise ValueError("this model has no decoder (config.decoder is 'none')")
        tokens_BMD = self(pixel_values, corruption).tokens
        return self.decoder(tokens_BMD, corruption, self._grid(pixel_values))

    def loss(self, pixel_values: Tensor, corruption: Corruption | None = None) -> Tensor:
        """The loss of pre-training, mean of |(I - P)(x^ - x)|^2 over the patches that P changes (eq. 2.22, B.1)."""
        corruption = self.draw(pixel_values) if corruption is None else corruption
        target_BNP, mean, std = self._target(pixel_values)
        if self.config.loss_target == "patch_normalised":
            target_BNP = (target_BNP - mean) / std
        error_BNP = self.predict(pixel_values, corruption).float() - target_BNP
        if self.config.loss_region == "complement":
            error_BNP = corruption.complement(error_BNP)
        error_BNP = error_BNP.square() if self.config.loss_norm == "l2" else error_BNP.abs()
        return error_BNP.mean() / (corruption.share if self.config.loss_region == "complement" else 1.0)

    def reconstruct(self, pixel_values: Tensor, corruption: Corruption) -> Tensor:
        """The decoder's images x^ in normalised pixels, (B, 3, H, W); times `config.std` plus `mean` they are in 0..1.

        A decoder of patch_normalised pixels gets the true mean and deviation of each patch.
        """
        predicted_BNP = self.predict(pixel_values, corruption).float()
        if self.config.loss_target == "patch_normalised":
            _, mean, std = self._target(pixel_values)
            predicted_BNP = predicted_BNP * std + mean
        return unpatchify(predicted_BNP, self._grid(pixel_values), self.config.patch_size)

    def _target(self, pixel_values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Patches (B, N, P), and the mean and the unbiased deviation of each, (B, N, 1)."""
        patches_BNP = patchify(pixel_values.float(), self.config.patch_size)
        return patches_BNP, patches_BNP.mean(-1, keepdim=True), (patches_BNP.var(-1, keepdim=True) + 1e-6).sqrt()

    def _grid(self, pixel_values: Tensor) -> tuple[int, int]:
        return pixel_values.shape[2] // self.config.patch_size, pixel_values.shape[3] // self.config.patch_size

    def preprocess(self, images: Any) -> Tensor:
        """RGB images uint8 (B, 3, h, w) of any size -> pixel_values (B, 3, *config.image_size), float32.

        The channels may come last, as in NumPy; one image may lack the batch axis, or be an image of PIL. The central
        part, `config.eval_crop` of the shorter side, is resized with antialiasing, as torchvision does.
        """
        if hasattr(images, "convert"):  # of PIL
            pixels = bytearray(images.convert("RGB").tobytes())
            images = torch.frombuffer(pixels, dtype=torch.uint8).reshape(images.height, images.width, 3)
        if not isinstance(images, Tensor):
            images = torch.as_tensor(images.copy())  # an array may be read-only or run backwards
        if images.dtype != torch.uint8:
            raise ValueError(f"preprocess takes uint8 images in 0..255, not {images.dtype}")
        images = images[None] if images.ndim == 3 else images
        if images.ndim == 4 and images.shape[1] != 3:
            images = images.movedim(-1, 1)
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"preprocess takes RGB images (B, 3, h, w), or (h, w, 3), not {tuple(images.shape)}")
        (H, W), (h, w) = self.config.image_size, images.shape[2:]
        scale = max(H / h, W / w) / self.config.eval_crop
        size = [max(H, round(h * scale)), max(W, round(w * scale))]
        x = F.interpolate(images.float(), size, mode=self.config.interpolation, antialias=True)
        top, left = (size[0] - H) // 2, (size[1] - W) // 2
        x = x[..., top : top + H, left : left + W].clamp(0, 255).round() / 255
        mean, std = (x.new_tensor(v)[:, None, None] for v in (self.config.mean, self.config.std))
        return (x - mean) / std

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> CrateModel:
        """Reads config.json and model.safetensors of a folder; parameters are float32, whatever the file holds."""
        folder = Path(folder).expanduser()
        model = cls(CrateConfig.from_dict(json.loads((folder / "config.json").read_text())))
        model.load_state_dict(read_safetensors(folder / "model.safetensors"))
        return model.eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes config.json, model.safetensors and this file; `from_pretrained` and crate_jax read the folder."""
        folder = Path(folder).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(dataclasses.asdict(self.config), indent=2) + "\n")
        write_safetensors(folder / "model.safetensors", self.state_dict())
        if not (folder / Path(__file__).name).exists():
            shutil.copyfile(__file__, folder / Path(__file__).name)


# --- Weights: 8 bytes with the length of a JSON header, the header, the numbers. It is a few lines, and no pickle.

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def read_safetensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, by name."""
    data = bytearray(Path(path).read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    tensors = {}
    for name, entry in json.loads(data[8:start]).items():
        if name != "__metadata__":
            first, shape = start + entry["data_offsets"][0], entry["shape"]
            numbers = torch.frombuffer(data, dtype=DTYPES[entry["dtype"]], count=math.prod(shape), offset=first)
            tensors[name] = numbers.reshape(shape)
    return tensors


def write_safetensors(path: str | Path, tensors: dict[str, Tensor]) -> None:
    """Writes tensors, by name, to a .safetensors file."""
    codes = {dtype: code for code, dtype in DTYPES.items()}
    dense_tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in dense_tensors.items():
        first, end = end, end + tensor.nbytes
        header[name] = {"dtype": codes[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [first, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # numbers begin at a multiple of 8 bytes
    with Path(path).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in dense_tensors.values():
            file.write(ctypes.string_at(tensor.data_ptr(), tensor.nbytes))

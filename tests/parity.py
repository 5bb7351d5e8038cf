"""Compares this library with frozen outputs and gradients of the authors' PyTorch code.

    python -m tests.parity FILE.npz ...

prints one line per file with the largest absolute error over outputs and the largest relative
error over gradients, and exits with status 1 if any exceeds 5e-5 or 5e-4. The weights enter
through the library's own importer (`crate_jax.convert`). What a file holds is recognised from its
arrays: see tests/golden/README.md.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from crate_jax import config as configs
from crate_jax.analysis.alignment import closed_form, corrupted, moments
from crate_jax.convert import import_state_dict
from crate_jax.evals import knn
from crate_jax.methods import reconstruction
from crate_jax.models import autoencoder, representation
from crate_jax.models.corruption import Identity, Masking, Projection
from crate_jax.models.crate import CrateBlock, attend, ista
from crate_jax.models.decoders import CrateDecoderBlock
from crate_jax.models.layers import BLOCK_EPS, attention_weights, layer_norm
from crate_jax.models.patches import grid_shape, patchify, unpatchify
from crate_jax.parallel import parameters
from crate_jax.parallel.parameters import names
from crate_jax.training import optimizer, orthogonality
from tests.parity_joint import joint_steps, load
from tests.parity_resnet import resnet
from tests.parity_views import views

OUTPUT_LIMIT, GRADIENT_LIMIT = 5e-5, 5e-4
File = Mapping[str, np.ndarray]
Errors = dict[str, float]


def strip(file: File, prefix: str) -> dict[str, np.ndarray]:
    """The arrays under a prefix, without it."""
    return {k.removeprefix(prefix): file[k] for k in file if k.startswith(prefix)}


def output_error(ours: jax.Array, theirs: np.ndarray) -> float:
    """Largest absolute difference; shapes must agree."""
    if np.shape(ours) != np.shape(theirs):
        return float("inf")
    return float(np.max(np.abs(np.asarray(ours, np.float64) - theirs)))


def gradient_errors(ours: dict, theirs: dict) -> Errors:
    """Per parameter, the largest difference over the largest entry of the reference."""
    a, b = names(ours), names(theirs)
    if a.keys() != b.keys():
        raise SystemExit(f"gradients differ in names: {sorted(a.keys() ^ b.keys())}")
    return {k: output_error(a[k], b[k]) / max(float(np.max(np.abs(b[k]))), 1e-12) for k in b}


def model_config(file: File) -> ConfigDict:
    """Width, heads, depth, image and patch side from a file's `meta`."""
    _, width, heads, depth, image, patch = (int(v) for v in file["meta"][:6])
    c = configs.base()
    c.encoder.width, c.encoder.heads, c.encoder.depth, c.encoder.patch_size = width, heads, depth, patch
    c.decoder.depth, c.decoder.heads = depth, heads
    c.data.image_size = (image, image)
    return c


def images_of(file: File) -> jax.Array:
    """The file's images, which it holds as NCHW, (B, H, W, 3)."""
    return jnp.asarray(file["in/images_nchw"]).transpose(0, 2, 3, 1)


def crate_blocks(file: File) -> tuple[Errors, Errors]:
    """One encoder and one decoder block."""
    heads, lam = int(file["meta"][2]), float(file["meta"][6])
    params = import_state_dict("crate_blocks", strip(file, "sd/"), (1, 1))
    x, own = jnp.asarray(file["in/tokens"]), params["encoder"]["mssa"]
    encoder = CrateBlock(heads, 0.1, lam, 0, False, jnp.float32)
    decoder = CrateDecoderBlock(heads, False, False, jnp.float32)
    ours = {
        "mssa": attend(x @ own["subspaces"]["kernel"], heads) @ own["output"]["kernel"] + own["output"]["bias"],
        "ista": ista(x, jnp.asarray(params["encoder"]["dictionary"]["kernel"]), 0.1, lam)[0],
        "encoder_block": encoder.apply({"params": params["encoder"]}, x, None)[0],
        "decoder_block": decoder.apply({"params": params["decoder"]}, x, None)[0],
    }
    return {k: output_error(v, file[f"out/{k}"]) for k, v in ours.items()}, {}


def masked_autoencoder(file: File, c: ConfigDict, family: str, drop: bool) -> tuple[Errors, Errors]:
    """CRATE-MAE or ViT-MAE: latent, prediction, mask, losses and the gradients of the pixel loss."""
    grid = grid_shape(c.data.image_size, c.encoder.patch_size)
    params = import_state_dict(family, strip(file, "sd/"), grid)
    images_BHWC = images_of(file)
    patches_BNP = patchify(images_BHWC, c.encoder.patch_size)
    kept = int(np.sum(file["out/mask"][0] == 0))
    corruption = Masking.from_noise(jnp.asarray(file["in/noise"]), kept, drop)
    model = autoencoder.build(c)

    def run(params: dict) -> tuple[jax.Array, dict]:
        latent = model.apply({"params": params}, images_BHWC, corruption, method="encode")
        pred = model.apply({"params": params}, latent, corruption, method="decode")
        loss = reconstruction.loss(pred, reconstruction.target(patches_BNP, c), corruption, c)
        return loss, {"latent": latent, "pred": pred, "mask": corruption.removed_BN, "loss_pixel": loss}

    (_, ours), grads = jax.jit(jax.value_and_grad(run, has_aux=True))(params)
    if "out/loss_normpix" in file:
        c.loss.target = "patch_normalised"
        target = reconstruction.target(patches_BNP, c)
        ours["loss_normpix"] = reconstruction.loss(ours["pred"], target, corruption, c)
    if "out/features_unmasked" in file:
        ours["features_unmasked"] = model.apply({"params": params}, images_BHWC, Identity(), method="encode")
    if "out/attention_block1" in file:
        ours["attention_block1"] = second_block_attention(c, params, images_BHWC)
    outputs = {k: output_error(v, file[f"out/{k}"]) for k, v in ours.items()}
    theirs = import_state_dict(family, strip(file, "grad/"), grid)
    return outputs, gradient_errors(grads, theirs)


def second_block_attention(c: ConfigDict, params: dict, images_BHWC: jax.Array) -> jax.Array:
    """Attention of CRATE's second block on uncorrupted images, from the first block's output."""
    tokens_BND = representation.layers(c)(params, images_BHWC)[1][0]
    block = jax.tree.map(lambda x: x[1], params["encoder"]["blocks"])
    normed = layer_norm(tokens_BND, block["mssa_norm"]["scale"], block["mssa_norm"]["bias"], BLOCK_EPS)
    w_BND = normed @ block["mssa"]["subspaces"]["kernel"]
    w_BHNK = w_BND.reshape(*w_BND.shape[:2], c.encoder.heads, -1).transpose(0, 2, 1, 3)
    return attention_weights(w_BHNK, w_BHNK)


def crate_mae(file: File) -> tuple[Errors, Errors]:
    """CRATE-MAE: mask tokens at the encoder's input, all tokens encoded."""
    c = model_config(file)
    c.encoder.lam = float(file["meta"][6])
    return masked_autoencoder(file, c, "crate_mae", drop=False)


def vit_mae(file: File) -> tuple[Errors, Errors]:
    """ViT-MAE: only kept patches in the encoder, a narrower decoder."""
    c = model_config(file)
    c.encoder.name, c.decoder.name = "vit", "transformer"
    c.corruption.mask_fill = "drop"
    state = strip(file, "sd/")
    c.decoder.width = state["decoder_embed.weight"].shape[0]
    c.decoder.heads = c.encoder.heads * c.decoder.width // c.encoder.width  # heads of the encoder's width
    c.decoder.depth = len({k.split(".")[1] for k in state if k.startswith("decoder_blocks.")})
    return masked_autoencoder(file, c, "vit_mae", drop=True)


def ropim(file: File) -> tuple[Errors, Errors]:
    """ROPIM: the exact projector of the given sketch, relative bias, l1 on the complement."""
    c = model_config(file)
    c.encoder.name, c.encoder.positions, c.encoder.qkv_bias, c.encoder.layer_scale = "vit", "relative", "qv", 0.1
    c.decoder.name, c.corruption.name, c.loss.norm = "linear", "rop", "l1"
    grid = grid_shape(c.data.image_size, c.encoder.patch_size)
    params = import_state_dict("ropim", strip(file, "sd/"), grid)
    images_BHWC = images_of(file)
    patches_BNP = patchify(images_BHWC, c.encoder.patch_size)
    sketch = file["in/sketch"]  # (B, N, K'), one entry of +-1 per token
    corruption = Projection.exact(
        jnp.asarray(np.abs(sketch).argmax(-1), jnp.int32), jnp.asarray(sketch.sum(-1), jnp.float32), sketch.shape[-1]
    )
    model = autoencoder.build(c)

    def run(params: dict) -> tuple[jax.Array, jax.Array]:
        pred = model.apply({"params": params}, images_BHWC, corruption)
        return reconstruction.loss(pred, reconstruction.target(patches_BNP, c), corruption, c), pred

    (loss, pred), grads = jax.jit(jax.value_and_grad(run, has_aux=True))(params)
    images = unpatchify(pred, c.data.image_size, c.encoder.patch_size).transpose(0, 3, 1, 2)
    identity = jnp.broadcast_to(jnp.eye(sketch.shape[1]), file["in/projection"].shape)
    outputs = {
        "projection": output_error(corruption.project(identity), file["in/projection"]),
        "reconstruction_nchw": output_error(images, file["out/reconstruction_nchw"]),
        "loss": output_error(loss, file["out/loss"]),
    }
    theirs = import_state_dict("ropim", strip(file, "grad/"), grid)
    return outputs, gradient_errors(grads, theirs)


def orthogonal(file: File) -> tuple[Errors, Errors]:
    """SO and SRIP of single weights, both Gram matrices; relative errors, the values being large."""
    errors = {}
    for i in range(sum(k.startswith("in/") for k in file)):
        kernel = jnp.asarray(file[f"in/{i}"].T[None], jnp.float32)
        for gram in ("in", "out"):
            w = orthogonality.orient(kernel, gram)
            start = orthogonality.random_directions(jax.random.key(i), 1, w.shape[1])
            ours = {
                f"{i}/frobenius_sq_{gram}": orthogonality.frobenius_squared(w),
                f"{i}/spectral_{gram}": orthogonality.spectral_norm(w, start, 2000)[0][0],
            }
            for name, value in ours.items():
                reference = file[f"out/{name}"]
                errors[name] = output_error(value, reference) / float(reference)
    return errors, {}


def moments_of(x_ND: np.ndarray, y_NC: np.ndarray) -> moments.Moments:
    """Moments of images (N, D) and targets (N, C) without centring, scaling or noise."""
    x, y = np.asarray(x_ND, np.float64), np.asarray(y_NC, np.float64)
    return moments.Moments(x.T @ x, x.T @ y, y.T @ y, len(x))


def joint_loss(m: moments.Moments, lam: float, optimum: closed_form.Optimum) -> float:
    """||W^T V^T X - Y||_F^2 + lam ||Z^T V^T X - X||_F^2 for any V, W and Z; `optimum.loss` is not read."""

    def residual(map_DT: np.ndarray, cross_DT: np.ndarray, energy: float) -> float:
        return float(np.sum(map_DT * (m.second_DD @ map_DT)) - 2 * np.sum(map_DT * cross_DT) + energy)

    V, W, Z = optimum.encoder_DK, optimum.head_KC, optimum.decoder_KD
    supervised = residual(V @ W, m.cross_DC, float(np.trace(m.targets_CC)))
    return supervised + lam * residual(V @ Z, m.second_DD, float(np.trace(m.second_DD)))


def alignment(file: File) -> tuple[Errors, Errors]:
    """The curves on the squared scale; relative errors of Theorem 1's minima count 50-fold, and so are held to 1e-6."""
    images, labels = file["in/X"], np.eye(10)[file["in/labels"]]
    ours = moments_of(images, labels)
    aligner = closed_form.Aligner(ours, images.shape[1])
    errors = {}
    for name, theirs in strip(file, "out/").items():
        if name.startswith("mask"):
            ratio, side = name.removeprefix("mask").split("_patch")
            patch_D = corrupted.patch_of_number((8, 8), (int(side), int(side)), channels=1)
            noisy = corrupted.masking(ours.second_DD, patch_D, float(ratio))
        elif name.startswith("gaussian"):
            noisy = corrupted.gaussian(ours.second_DD, ours.count, float(name.removeprefix("gaussian")))
        elif name == "clean":
            noisy = None
        else:
            lam = float(name.removeprefix("theorem1_loss_lambda"))
            first = moments_of(images[:300], labels[:300])
            found = closed_form.theorem1(first, latents=8, lam=lam)
            worst = max(abs(v / theirs - 1) for v in (found.loss, joint_loss(first, lam, found)))
            errors[name] = float(worst) * OUTPUT_LIMIT / 1e-6
            continue
        curve = aligner.clean() if noisy is None else aligner.curve(noisy)
        errors[name] = output_error(curve.alignment_K, (theirs / 100) ** 2)
    return errors, {}


def lars_run(file: File, case: str, dtype: jax.typing.DTypeLike) -> list[dict[str, jax.Array]]:
    """The parameters after each of four updates of lars_torch with the options of a case of solo-learn's LARS.

    The learning rate of update t is lr (t + 1) / 4, so that a clipped trust ratio depends on t.
    """
    options = json.loads(str(file[f"case/{case}"]))
    c = configs.base()
    c.optimizer.decay_exclude, c.optimizer.decay_vectors = (), not options["exclude_bias_n_norm"]
    c.optimizer.trust_coefficient = options["eta"]
    c.optimizer.clip_lr, c.optimizer.nesterov = options["clip_lr"], options.get("nesterov", False)
    c.optimizer.momentum = float(options.get("momentum", 0))
    inputs = {k: jnp.asarray(v, dtype) for k, v in strip(file, "in/").items()}
    params = {k: v for k, v in inputs.items() if "/" not in k}
    selected = optimizer.decayed(c, params)
    tx = optimizer.OPTIMIZERS["lars_torch"](
        c.optimizer,
        lambda t: options["lr"] * (t + 1) / 4,
        options["weight_decay"],
        lambda tree: parameters.mask(tree, selected),
    )
    state, out = tx.init(params), []
    for t in range(4):
        updates, state = jax.jit(tx.update)({k: inputs[f"grad{t}/{k}"] for k in params}, state, params)
        params = optax.apply_updates(params, updates)
        out.append(params)
    return out


def schedule_rates(file: File, number: str) -> jax.Array:
    """Our learning rates of solo-learn's warm-up and cosine with the settings of a schedule of a file."""
    warmup, total, start, peak, end = (float(v) for v in file[f"schedule/{number}/settings"])
    c = configs.base()
    c.optimizer.update(dict(lr=peak, lr_batch=0, warmup_lr=start, min_lr=end, warmup_epochs=warmup, warmup_peak="last"))
    return optimizer.schedule(c, int(total), 1.0)(jnp.arange(int(total)))


def update_rules(file: File) -> tuple[Errors, Errors]:
    """LARS and schedules of solo-learn; not its schedules of a warm-up of broken steps, which rise above the peak."""
    errors = {}
    for case in strip(file, "case/"):
        for t, params in enumerate(lars_run(file, case, jnp.float32)):
            errors |= {f"{case}/{t}/{k}": output_error(v, file[f"out/{case}/{t}/{k}"]) for k, v in params.items()}
    for name, rates in strip(file, "schedule/").items():
        number, kind = name.split("/")
        if kind == "lr" and file[f"schedule/{number}/settings"][0] % 1 == 0:
            errors[f"schedule/{number}"] = output_error(schedule_rates(file, number), rates)
    return errors, {}


def knn_classes(file: File, k: int, temperature: float) -> np.ndarray:
    """The class that cosine neighbours vote for, of every test row."""
    data = (file["in/train"], file["in/train_labels"], file["in/test"])
    return knn.knn_sweep(*data, int(file["in/train_labels"].max()) + 1, [k], [temperature])[0, 0]


def neighbours(file: File) -> tuple[Errors, Errors]:
    """Top-1 of solo-learn's and lightly's k-NN (shares), and which class lightly's puts first (share that differs)."""
    errors = {}
    for name, theirs in strip(file, "out/").items():
        found = re.fullmatch(r"(solo/cosine_|lightly/)k(\d+)_T([\d.]+)(/ranking)?", name)
        if not found:  # by Euclidean distance, which ours has not
            continue
        ours = knn_classes(file, int(found[2]), float(found[3]))
        if found[4]:
            errors[name] = float(np.mean(ours != theirs[:, 0]))
        else:
            errors[name] = output_error(np.mean(ours == file["in/test_labels"]), theirs[0] / 100)
    return errors, {}


def recognise(file: File) -> Callable[[File], tuple[Errors, Errors]]:
    """Which comparison a file is for."""
    if "in/0/view0" in file:
        return joint_steps
    if "out/layer4_shape" in file:
        return resnet
    if "crop/boxes" in file:
        return views
    if "out/encoder_block" in file:
        return crate_blocks
    if "in/sketch" in file:
        return ropim
    if any(name.startswith("case/") for name in file):
        return update_rules
    if "in/test_labels" in file:
        return neighbours
    if "out/gaussian0.5" in file:
        return alignment
    if "out/0/spectral_in" in file:
        return orthogonal
    if "sd/blocks.0.attn.qkv.weight" in file:
        return vit_mae
    if "sd/blocks.0.layers.0.0.fn.qkv.weight" in file:
        return crate_mae
    raise SystemExit(f"not a file of reference numbers that this comparison knows: arrays {sorted(file)[:5]} ...")


def check(path: str) -> tuple[float, float]:
    """Prints one line for a file; returns (largest output error, largest gradient error)."""
    file = load(Path(path))
    compare = recognise(file)
    with jax.default_matmul_precision("highest"):
        outputs, gradients = compare(file)
    worst_output = max(outputs, key=outputs.__getitem__)
    line = f"{path}  {compare.__name__}  outputs {outputs[worst_output]:.1e} ({worst_output})"
    if gradients:
        worst_gradient = max(gradients, key=gradients.__getitem__)
        line += f"  gradients {gradients[worst_gradient]:.1e} ({worst_gradient})"
    print(line)
    return outputs[worst_output], max(gradients.values(), default=0.0)


def main(paths: list[str]) -> int:
    """Checks every file; returns the exit status."""
    if not paths:
        print("usage: python -m tests.parity FILE.npz ...", file=sys.stderr)
        return 2
    errors = [check(path) for path in paths]
    return int(any(not (o <= OUTPUT_LIMIT and g <= GRADIENT_LIMIT) for o, g in errors))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The reconstruction loss: l1 or l2 on the complement of the error.

Shapes: B batch, N patches, P patch pixels.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from crate_jax.corruption import Corruption, Identity
from crate_jax.patches import standardise

NORMS = {"l2": jnp.square, "l1": jnp.abs}


def target(patches_BNP: jax.Array, config: ConfigDict) -> jax.Array:
    """What is reconstructed, float32: normalised pixels, or pixels standardised per patch."""
    patches_BNP = patches_BNP.astype(jnp.float32)
    return standardise(patches_BNP) if config.loss.target == "patch_normalised" else patches_BNP


def loss(predicted_BNP: jax.Array, target_BNP: jax.Array, corruption: Corruption, config: ConfigDict) -> jax.Array:
    """Mean over images, patches and pixels of |(I - P)(x^ - x)|^n, scalar float32.

    The mean runs over the removed patches for masking (He et al. 2022; CRATE-MAE B.1) and over all
    patches for projection (ROPIM section 3.2), where every patch loses something. `loss.region="all"`
    takes the whole error instead (CRATE-MAE eq. 2.22).
    """
    if config.loss.region == "all":
        corruption = Identity()
    error_BNP = corruption.complement(predicted_BNP.astype(jnp.float32) - target_BNP)
    # Per image first: the mean of a batch then rounds alike however the batch is split over devices.
    per_image_B = jnp.mean(NORMS[config.loss.norm](error_BNP), axis=(1, 2))
    return jnp.mean(per_image_B) / corruption.complement_share()

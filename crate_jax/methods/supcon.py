"""SupCon (Khosla et al., arXiv 2004.11362): all views of a class's images are positives, in place of an image's own.

    L = - mean over rows i of log(sum_{p in P(i)} exp(cos_ip / T) / sum_{a != i} exp(cos_ia / T))

is solo-learn's: L_in of the paper (eq. 3) less log |P(i)|, with the same gradient. config.supcon.positives="mean" is
L_out (eq. 2), which the paper recommends: the mean over P(i) stands outside the logarithm. Both are means over rows,
where the paper has sums.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from crate_jax import data
from crate_jax.errors import DataError
from crate_jax.methods import contrast, joint
from crate_jax.methods.joint import Algorithm, Own, Step
from crate_jax.methods.method import Scalars
from crate_jax.models.projector import MLP
from crate_jax.validation import Key, Section, one_of


def algorithm(config: ConfigDict, width: int, source: data.Source) -> Algorithm:
    """SupCon of a validated config, for features of this width.

    Raises:
      DataError: the training images have no labels.
    """
    if source.class_names is None:
        raise DataError(
            f"config.data.source={config.data.source!r}: config.method='supcon' learns from labels, but the training "
            "images lack them; without labels it is config.method='simclr'"
        )
    o, outside = config.joint, config.supcon.positives == "mean"

    def loss(step: Step) -> tuple[jax.Array, Own, Scalars]:
        projected = step.student("projector", step.features)
        ids = jnp.tile(step.label, len(projected))
        value = contrast.nt_xent(jnp.concatenate(projected), ids, o.temperature, outside)
        return value, {}, {"z_std": joint.spread(projected)}

    heads = {"projector": (MLP((o.hidden, o.out), norm=False, dtype=config.dtype), width)}
    return Algorithm(heads, loss, small_views=True)


SUPCON = Section(
    "supcon",
    "The method supcon.",
    of_the_run=True,
    keys=dict(
        positives=Key(
            "sum", one_of("sum", "mean"), "sum over positives in the logarithm (solo-learn), or mean outside (paper)"
        ),
    ),
)

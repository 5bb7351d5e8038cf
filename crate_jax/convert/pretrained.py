"""Pre-trained encoders, read from a run's workdir or from a file of weights."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from crate_jax.convert import files, weights
from crate_jax.errors import CheckpointError, ConfigError, some
from crate_jax.models.patches import grid_shape
from crate_jax.parallel import distributed
from crate_jax.parallel.parameters import names
from crate_jax.workdir import checkpoint
from crate_jax.workdir.folder import readable


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A pre-trained encoder.

    Attributes:
      name: its origin, for messages and reports.
      config: the whole config of its training run, as a dictionary.
      params: nested dictionaries of NumPy arrays with the key ``encoder``: the parameters that the run's method
        evaluates, averaged (EMA) if the run kept averages.
      sha256: digest of all parameters.
      classes: the names of the run's classes, in the order of a classifier's scores; () if nothing says them.
    """

    name: str
    config: dict[str, Any]
    params: dict[str, Any]
    sha256: str
    classes: tuple[str, ...] = ()

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w), the patches of the training run's images."""
        return grid_shape(self.config["data"]["image_size"], self.config["encoder"]["patch_size"])


def load(path: str, key: str) -> Pretrained:
    """Reads a pre-trained encoder; all processes must call it.

    Args:
      path: a run's workdir, or one of its checkpoints, ``RUN/checkpoints/STEP``; or a file of weights, ours or other
        people's (`crate_jax.convert.weights`), or its folder.
      key: the config key that holds `path`, for messages.

    Raises:
      ConfigError: `path` is empty.
      CheckpointError: there is no (such) checkpoint, it is damaged, its model is unknown, or a file's numbers are not
        all finite.
    """
    if not path:
        raise ConfigError(f"{key} is empty: it must name the workdir of a pre-training run, or a file of weights")
    file = files.weights_file(path)
    if distributed.max_over_processes(int(file is not None)):
        loaded = weights.load(file or readable(path))
        wrong = [name for name, array in names(loaded.params).items() if not np.isfinite(array).all()]
        if wrong:
            raise CheckpointError(f"{path}: holds NaN or infinite numbers, in {some(wrong, ', ')}")
        return Pretrained(str(path), loaded.config, loaded.params, checkpoint.params_sha256(loaded.params))
    params, meta = checkpoint.read_params(path, judged=True)
    run, _ = checkpoint.of_step(path) or (path, None)
    name, classes = f"step {meta['step']} of {run}", tuple(meta.get("classes", ()))
    return Pretrained(name, meta["config"], params, checkpoint.params_sha256(params), classes)

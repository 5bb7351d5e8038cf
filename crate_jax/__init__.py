"""Self-supervised image pre-training in JAX: by reconstruction and by joint embedding.

    import crate_jax

    crate_jax.pretrain("quickstart:method=vibcreg", "runs/first")
    encoder = crate_jax.load("runs/first")
    features = encoder.features(images)

docs/api.md lists what is public. The names are imported when they are first used: JAX takes its time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from crate_jax.api import Encoder, Images, Reconstruction, UserError, get_config, list_configs, load, pretrain

__version__ = "0.1.0"
__all__ = ["Encoder", "Images", "Reconstruction", "UserError", "get_config", "list_configs", "load", "pretrain"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from crate_jax import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""Notices while a run trains that its representation collapses."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable

from crate_jax.parallel import distributed

log = logging.getLogger(__name__)

SPREAD_SHARE = 0.1  # of the deviation of directions that are spread evenly; a healthy run is far above it
ADVICE = (
    "try a lower config.optimizer.lr or a longer warm-up, an orthogonality penalty (config.penalty.name=so or srip), "
    "and under joint embedding batch norm in the heads, another config.joint.tau, or other temperatures"
)


@dataclasses.dataclass
class Fall:
    """Notices that a share falls below a bound, once per fall.

    Training only begins at a low share, and some healthy methods stay there: an untrained encoder uses few dimensions.
    So the share must also have fallen to less than half of the largest that was seen, or of the untrained encoder's.

    Attributes:
      bound: the bound, as a share of what is possible.
      best: the largest share so far.
      fallen: whether the last share that was seen had fallen.
    """

    bound: float
    best: float = 0.0
    fallen: bool = False

    def begins(self, share: float, untrained: Callable[[], float] = lambda: 0.0) -> bool:
        """Takes the next share; returns whether it has fallen and the one before had not.

        Args:
          share: the share of what is possible, in 0..1.
          untrained: returns the share of the untrained encoder; it is only called if the share is below the bound and
            no larger one was seen.

        >>> fall = Fall(bound=0.1)
        >>> [fall.begins(share) for share in (0.05, 0.5, 0.2, 0.04, 0.03, 0.5, 0.04)]
        [False, False, False, True, False, False, True]
        """
        low = share < self.bound
        if low and share >= self.best / 2:
            self.best = max(self.best, untrained())
        self.best = max(self.best, share)
        before, self.fallen = self.fallen, low and share < self.best / 2
        return self.fallen and not before


def rank_share(scores: dict[str, float]) -> float | None:
    """How far RankMe is from 1, its smallest value, as a share of the way to its limit; None if it was not measured.

    >>> rank_share({"rankme": 1.5, "rankme_limit": 11.0})
    0.05
    """
    if "rankme" not in scores or scores["rankme_limit"] <= 1:
        return None
    return (scores["rankme"] - 1) / (scores["rankme_limit"] - 1)


def warn(what: str) -> None:
    """Logs that the representation collapses, and what to try; `what` says which number shows it."""
    if distributed.first():
        log.warning("the representation collapses: %s; %s", what, ADVICE)

"""Runs cases of one part in this process, for :mod:`benchmarks.accelerator.runner`.

    python -m benchmarks.accelerator.child PART SETTINGS CASE [CASE ...]

SETTINGS is JSON. On stdout it writes one JSON object per line: {"case": NAME} when a case begins, and with "row" when
it ends. It ends after a case that failed, since that may have left the device unusable.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import traceback
from typing import Any, NoReturn

from benchmarks.accelerator.parts import ALL, Settings
from crate_jax.flags import one_line


def end_with_parent() -> None:
    """Ends this process when its stdin does: then the parent is gone, and nothing else would stop it."""
    sys.stdin.buffer.read()
    os._exit(1)


def main(part: str, settings: str, *names: str) -> NoReturn:
    """See the module."""
    lines = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print on stdout is for the log

    def say(**event: Any) -> None:
        lines.write(json.dumps(event, default=lambda x: x.tolist()) + "\n")
        lines.flush()

    threading.Thread(target=end_with_parent, daemon=True).start()
    cases = ALL[part].cases(part, Settings(**json.loads(settings)))
    for name in names:
        say(case=name)
        try:
            row = cases[name]()
        except Exception as e:
            traceback.print_exc()
            say(case=name, row={"failed": f"{type(e).__name__}: {one_line(e)}"[:500]})
            break
        say(case=name, row=row)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # libraries may hang while they close a device


if __name__ == "__main__":
    main(*sys.argv[1:])

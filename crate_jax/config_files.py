"""The library's config files, by name: ``cifar10:encoder=crate`` stands for ``configs/cifar10.py:encoder=crate``.

In a checkout they lie beside the package, in ``configs/``; an installed package holds them.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import re
import sys
import traceback
from collections.abc import Iterator
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

from ml_collections import ConfigDict

from crate_jax.errors import ConfigError, UserError


def folder() -> Path:
    """The folder of the library's config files."""
    package = Path(__file__).resolve().parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def names() -> list[str]:
    """The names of the library's config files, sorted."""
    return sorted(path.stem for path in folder().glob("*.py") if path.stem != "__init__")


def card(name: str) -> str:
    """What a config file is for: the first line of its docstring.

    >>> card("quickstart")
    "A white-box masked autoencoder on scikit-learn's digits, without a download."
    """
    return (ast.get_docstring(ast.parse((folder() / f"{name}.py").read_text())) or "").partition("\n")[0]


def find(name: str) -> str:
    """The path of a config file.

    Args:
      name: the name of one of the library's files; or a path; or, where there is no such file, the path that one of
        the library's has in a checkout, ``configs/NAME.py``.

    Raises:
      ConfigError: there is no such file.
    """
    path, library = Path(name), names()
    if name not in library and path.is_file():
        return str(path)
    for ours in library:
        if name in (ours, f"{ours}.py", f"configs/{ours}.py"):
            return str(folder() / f"{ours}.py")
    what = "is a folder, not a config file" if path.is_dir() else "no such file"
    raise ConfigError(f"{name}: {what}; this library's configs are {', '.join(library)}")


def named(text: str) -> ConfigDict:
    """The config of a file, as its ``get_config`` returns it.

    Args:
      text: a name or path as for :func:`find`; what follows a colon is the file's argument.

    Raises:
      ConfigError: there is no such file, it has no ``get_config``, or that takes no argument or refuses this one, or
        the file raises an error, whose line the message names.

    >>> named("cifar10:encoder=vit").encoder.name
    'vit'
    """
    name, colon, argument = text.partition(":")
    path = find(name)
    loader = SourceFileLoader(f"crate_jax_config_{Path(path).stem}", path)
    module = sys.modules[loader.name] = ModuleType(loader.name)  # registered: a dataclass in the file looks it up
    module.__file__ = path
    with _failing(path):
        loader.exec_module(module)
    if not callable(getattr(module, "get_config", None)):
        raise ConfigError(f"{path}: has no function get_config, which returns the config")
    arguments = [argument] * bool(colon)
    try:
        inspect.signature(module.get_config).bind(*arguments)
    except TypeError as e:
        right = f"take one argument, here {argument!r}" if colon else "work without an argument"
        raise ConfigError(f"{path}: get_config must {right} ({e})") from None
    with _failing(path):
        return module.get_config(*arguments)


@contextlib.contextmanager
def _failing(path: str) -> Iterator[None]:
    """Turns what a config file raises into a ConfigError with the line of the file."""
    try:
        yield
    except UserError:
        raise
    except Exception as e:
        lines = [frame.lineno for frame in traceback.extract_tb(e.__traceback__) if frame.filename == path]
        line = e.lineno if isinstance(e, SyntaxError) else next(reversed(lines), None)  # None: it cannot be read
        where = f"{path}, line {line}" if line else path
        raise ConfigError(" ".join(f"{where}: {type(e).__name__}: {message(e)}".split())) from e


def message(error: BaseException) -> str:
    """The message of an error of a config file; for an unknown key our own, with a similar key if there is one."""
    if error.args and isinstance(error.args[0], KeyError):  # an AttributeError holds the KeyError
        error = error.args[0]
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    text = re.sub(r" Other fields present: .*?}\"", "", text, flags=re.DOTALL)  # a locked config lists all its keys
    if not (isinstance(error, KeyError) and text.startswith(("'", '"'))):
        return text
    key, _, hint = " ".join(text.split()).partition(" Did you mean ")
    return f"config: unknown key {key}" + (f"; did you mean {hint.partition(' instead')[0]}?" if hint else "")

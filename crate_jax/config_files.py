"""The library's config files, by name: ``cifar10:encoder=crate`` stands for ``configs/cifar10.py:encoder=crate``.

What follows the colon is the config string; a config file reads it by :func:`parse_arg`.

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
from typing import Any

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

    >>> card("rop_vitb")
    'ROPIM on ImageNet at 224 px (arXiv 2310.18737): random orthogonal projection instead of masking.'
    """
    return (ast.get_docstring(ast.parse((folder() / f"{name}.py").read_text())) or "").partition("\n")[0]


def jobs(name: str) -> set[str]:
    """The jobs that a config file of the library can be for, read from its text: to run it takes the import of JAX.

    >>> sorted(jobs("evaluate")), jobs("cifar10")
    (['evaluate', 'finetune'], {'pretrain'})
    """
    found = {
        constant.value
        for node in ast.walk(ast.parse((folder() / f"{name}.py").read_text()))
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Attribute) and t.attr == "job" for t in node.targets)
        for constant in ast.walk(node.value)
        if isinstance(constant, ast.Constant) and isinstance(constant.value, str)
    }
    return found or {"pretrain"}  # the default of config.job


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


def parse_arg(arg: str | None, **defaults: Any) -> ConfigDict:
    """Parses a config string such as ``"variant=S,penalty=so,debug"``.

    Args:
      arg: comma-separated ``key=value`` pairs; ``key`` alone means ``key=True``.
      **defaults: each allowed key with its default. A tuple lists the allowed values, of which the first is the
        default. Values are cast to the default's type.

    Returns:
      a locked ConfigDict with one entry per key of `defaults`.

    Raises:
      ConfigError: a key is unknown, or a value is not allowed or cannot be cast.

    >>> parse_arg("variant=S,debug", variant=("B", "S"), debug=False, steps=10).to_dict()
    {'debug': True, 'steps': 10, 'variant': 'S'}
    """
    out = {k: v[0] if isinstance(v, tuple) else v for k, v in defaults.items()}
    for item in filter(None, (arg or "").split(",")):
        key, _, text = item.partition("=")
        if key not in defaults:
            valid = f"valid keys: {', '.join(sorted(defaults))}" if defaults else "this config takes none"
            raise ConfigError(f"config string: unknown key '{key}'; {valid}")
        allowed = defaults[key]
        kind = type(out[key])
        if kind is bool:
            text = text or "True"
            if text.lower() not in ("true", "false", "1", "0"):
                raise ConfigError(f"config string: {key}={text} is not a boolean (true or false)")
            value: Any = text.lower() in ("true", "1")
        else:
            try:
                value = kind(text)
            except ValueError:
                raise ConfigError(f"config string: {key}={text!r} is not a valid {kind.__name__}") from None
        if isinstance(allowed, tuple) and value not in allowed:
            raise ConfigError(
                f"config string: {key}={value} is not one of {', '.join(map(str, filter(None, allowed)))}"
            )
        out[key] = value
    return ConfigDict(out).lock()

"""Sets JAX up for the tests, before any test module is imported, and runs the command line for them."""

from __future__ import annotations

import gc
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
DEVICES = 8

# The caller's JAX settings (backend, x64, debug switches) must not decide whether a test passes.
for _name in [name for name in os.environ if name.startswith(("JAX_", "XLA_", "LIBTPU_"))]:
    del os.environ[_name]
os.environ["JAX_PLATFORMS"] = "cpu"
# XLA's threads: a device waits in one for each collective that does not depend on another, and where parameters are
# split there are many. With too few threads the last device finds none, and all wait for it until XLA aborts.
os.environ.setdefault("NPROC", "64")
# NumPy's and SciPy's linear algebra. On a few busy cores the threads of many small products wait for each other, for
# ten times as long as the products take.
os.environ["OPENBLAS_NUM_THREADS"] = "1"

import jax  # noqa: E402  (reads the environment when imported)

from crate_jax.parallel import sharding  # noqa: E402


def _cache_dir() -> Path:
    """Returns the folder of compiled programs, one per kind of CPU: they use its instructions."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line for line in lines if line.startswith(("flags", "Features")))  # x86, ARM
    except (OSError, StopIteration):
        cpu = platform.processor()
    return ROOT / ".cache" / "jax" / f"{platform.machine()}-{hashlib.sha256(cpu.encode()).hexdigest()[:8]}"


def _cache_settings() -> dict[str, str | int]:
    """Returns JAX's cache settings; none where the checkout cannot be written: the cache only saves time."""
    folder = _cache_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return {}
    if not os.access(folder, os.W_OK):
        return {}
    return {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0,
        # Otherwise the keys contain the folder's path, and a copied cache misses every entry.
        "jax_persistent_cache_enable_xla_caches": "none",
    }


CACHE_SETTINGS = _cache_settings()
for _name, _value in CACHE_SETTINGS.items():
    jax.config.update(_name, _value)
# Set here, not in the environment, so that processes started by a test choose their own number.
jax.config.update("jax_num_cpu_devices", DEVICES)


# Most of the suite's time goes into compiling: little of it into making programs fast. The old emitters take a third of
# the new ones' time; jax 0.10 is the last with both. The second flag is one that runs set: with it from the start, what
# is compiled before a run, in it and in other processes has the same key in the cache.
QUICK_TO_COMPILE = ["--xla_backend_optimization_level=0", f"--{sharding.TIMEOUT_FLAG}=300"]
if importlib.metadata.version("jaxlib").startswith("0.10."):
    QUICK_TO_COMPILE.append("--xla_cpu_use_fusion_emitters=false")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds --optimised and --soak."""
    parser.addoption("--soak", type=float, default=180.0, help="seconds of the soak of tests/test_soak.py")
    parser.addoption("--optimised", action="store_true", help="compile programs as users do; takes three times as long")


def pytest_configure(config: pytest.Config) -> None:
    """Says how XLA compiles, here and in all processes of the tests alike: they compare bits."""
    if not config.getoption("--optimised"):
        os.environ["XLA_FLAGS"] = " ".join(QUICK_TO_COMPILE)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Files that the second Python leaves out as a whole are not even imported there."""
    if "not one_python" not in config.getoption("markexpr") or collection_path.suffix != ".py":
        return None
    return True if re.search(r"^pytestmark = .*\bone_python\b", collection_path.read_text(), re.MULTILINE) else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first: a worker that gets one last would leave the others idle (xdist keeps this order)."""
    items.sort(key=lambda item: item.get_closest_marker("one_python") is None)


def pytest_sessionstart(session: pytest.Session) -> None:
    """Fails at once, not in the middle of a sharding test, if JAX was started before this file."""
    if jax.device_count() != DEVICES:
        raise pytest.UsageError(f"the tests need {DEVICES} virtual CPU devices, JAX has {jax.device_count()}")


def pytest_collection_finish() -> None:
    """What is imported stays, so the garbage collector need not visit it: a tenth of the time of what traces much."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


MAPS = Path("/proc/self/maps")
MANY_MAPS = 20_000


@pytest.fixture(scope="module", autouse=True)
def few_programs() -> Iterator[None]:
    """Forgets the compiled programs of earlier modules once there are many.

    Each one takes a few memory maps, of which Linux gives a process 65,530; a worker that has none left is killed by a
    segmentation fault in the next test that compiles.
    """
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > MANY_MAPS:
        jax.clear_caches()
        gc.collect()
    yield


@pytest.fixture(scope="session")
def cli_env() -> dict[str, str]:
    """The environment of a `python -m crate_jax.main` process: none of the caller's settings."""
    kept = ("PATH", "HOME", "USER", "TMPDIR", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "XLA_FLAGS")
    env = {name: os.environ[name] for name in kept if name in os.environ}
    env["JAX_PLATFORMS"] = "cpu"
    env |= {name.upper(): str(value) for name, value in CACHE_SETTINGS.items()}
    return env


@pytest.fixture(scope="session")
def forks(cli_env: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """`python -m tests.forked`, for all commands of this worker: what they import is imported once."""
    command = [sys.executable, "-m", "tests.forked"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, env=cli_env, text=True, **pipes) as process:
        yield process
        process.stdin.close()


@pytest.fixture(scope="session")
def run_cli(forks: subprocess.Popen[str], cli_env: dict[str, str]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`run_cli(args, env={})` runs `python -m crate_jax.main *args` in a process of its own.

    It starts in the checkout (so `--config=configs/...` works), with `cli_env` plus `env`, and
    returns the CompletedProcess with `stdout` and `stderr` as text; it does not raise when the
    command fails. Without `env` the process is a fork of one that has imported the modules.
    """

    def run(args: Sequence[str], env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        args = [*map(str, args)]
        if env is not None:
            command = [sys.executable, "-m", "crate_jax.main", *args]
            return subprocess.run(command, cwd=ROOT, env=cli_env | env, capture_output=True, text=True, timeout=300)
        assert forks.stdin is not None and forks.stdout is not None
        forks.stdin.write(json.dumps({"argv": ["crate_jax.main", *args], "env": {}}) + "\n")
        forks.stdin.flush()
        done = json.loads(forks.stdout.readline())
        return subprocess.CompletedProcess(args, done["status"], done["stdout"], done["stderr"])

    return run


@pytest.fixture(scope="module")
def one_device() -> Iterator[None]:
    """Jobs that run in the tests' own process take the first device: compiling for eight takes longer than they do.

    A mesh that a test makes of devices of its own is left as it is.
    """
    from crate_jax.parallel import sharding

    make_mesh = sharding.make_mesh

    def of_one(*args: Any, **options: Any) -> jax.sharding.Mesh:
        return make_mesh(*args, **(options if len(args) > 2 else {"devices": jax.devices()[:1]} | options))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "make_mesh", of_one)
        yield


@pytest.fixture(scope="session")
def built(cli_env, tmp_path_factory) -> Path:
    """A folder with the wheel, unpacked to `installed`, and the source archive, unpacked to `source`; skips offline."""
    folder = tmp_path_factory.mktemp("built")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(folder / "backend"), "setuptools>=77"]
    if subprocess.run(pip, capture_output=True).returncode:  # the index may be set by the environment
        pytest.skip("setuptools cannot be installed here")
    checkout = folder / "checkout"  # the backend writes beside the sources
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in filter(str.strip, listed.stdout.splitlines()):
        if (ROOT / name).is_file():
            (checkout / name).parent.mkdir(parents=True, exist_ok=True)
            (checkout / name).write_bytes((ROOT / name).read_bytes())
    script = f"""
import shutil
from setuptools import build_meta
out = {str(folder)!r}
shutil.unpack_archive(f"{{out}}/{{build_meta.build_sdist(out)}}", f"{{out}}/source")
shutil.unpack_archive(f"{{out}}/{{build_meta.build_wheel(out)}}", f"{{out}}/installed", "zip")
"""
    env = cli_env | {"PYTHONPATH": str(folder / "backend")}
    subprocess.run([sys.executable, "-c", script], cwd=checkout, env=env, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """The address of an S3 server that holds the bucket ``photos``."""
    moto = pytest.importorskip("moto.server", reason="no S3 server: make install-buckets")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    url = "http://{}:{}".format(*server.get_host_and_port())
    urllib.request.urlopen(urllib.request.Request(f"{url}/photos", method="PUT")).close()
    yield url
    server.stop()


def of_the_server(url: str) -> dict[str, str]:
    """The environment of a process that uses the S3 server of this address."""
    return {"AWS_ENDPOINT_URL_S3": url, "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}

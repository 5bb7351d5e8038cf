"""Every frozen reference file passes `tests.parity`, and the comparison can fail."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from crate_jax.convert import import_state_dict
from crate_jax.errors import ConfigError
from crate_jax.models import crate, gpu_attention, gpu_norm, representation, vit
from tests import parity, parity_resnet
from tests.conftest import ROOT

GOLDEN = sorted((ROOT / "tests" / "golden").glob("*.npz"))
OF_METHODS = "steps_"  # these are compared in tests/methods/test_joint_parity.py
ON_BOTH_PYTHONS = ("augment", "crate_mae_lambda5.0", "optim", "ropim", "vit_mae")  # the others take long
# Blocks of CRATE have both values of lambda, and the features of a ResNet-50 are compared below.
SLOW = ("crate_mae_lambda0.1", "resnet50_imagenet")


def marks(name: str):
    if name in SLOW:
        return pytest.mark.slow
    return () if name in ON_BOTH_PYTHONS else pytest.mark.one_python


@pytest.mark.parametrize(
    "path", [pytest.param(p, id=p.stem, marks=marks(p.stem)) for p in GOLDEN if not p.stem.startswith(OF_METHODS)]
)
def test_reference_numbers(path):
    outputs, gradients = parity.check(str(path))
    assert outputs <= parity.OUTPUT_LIMIT
    assert gradients <= parity.GRADIENT_LIMIT


@pytest.mark.one_python
@pytest.mark.parametrize(
    "name",
    ["crate_blocks_lambda0.1", pytest.param("crate_mae_lambda5.0", marks=pytest.mark.slow)]
    + [pytest.param(name, marks=pytest.mark.slow) for name in ("vit_mae", "ropim")],
)
def test_reference_numbers_by_the_kernels_for_gpus(name, monkeypatch):
    """Interpreted, in float32: MSSA, attention with and without a bias, norms and their skip connections."""
    called = set()

    def interpreted(function):
        def run(*args):
            called.add(function)
            return function(*args, interpret=True)

        return run

    attend = interpreted(gpu_attention.attend)
    for module in (crate, vit):
        monkeypatch.setattr(module, "attention_kernel", lambda *_: attend)
    monkeypatch.setattr(gpu_norm, "fits", lambda x: True)
    passes = gpu_norm.forward, gpu_norm.backward
    for function in passes:
        monkeypatch.setattr(gpu_norm, function.__name__, interpreted(function))
    outputs, gradients = parity.check(str(GOLDEN[0].with_name(f"{name}.npz")))
    assert called == {gpu_attention.attend, *(passes if gradients else passes[:1])}  # the blocks have only outputs
    assert outputs <= parity.OUTPUT_LIMIT
    assert gradients <= parity.GRADIENT_LIMIT


@pytest.mark.one_python
def test_features_of_bottlenecks_are_torchvisions():
    """What is quick to compile of the comparison of a ResNet-50."""
    file = parity.load(GOLDEN[0].with_name("resnet50_imagenet.npz"))
    c = parity_resnet.config_of(file)
    shapes = jax.eval_shape(lambda: representation.init_params(c, jax.random.key(0)))["encoder"]
    params = {"encoder": parity_resnet.tree_like(shapes, parity.strip(file, "sd/"))}
    images = file["in/images_nchw"].transpose(0, 2, 3, 1)
    with jax.default_matmul_precision("highest"):
        features = jax.jit(representation.build(c))(params, images)
    assert parity_resnet.relative(features, file["out/features_eval"]) <= parity.OUTPUT_LIMIT


@pytest.mark.one_python
@pytest.mark.parametrize(
    "name",
    ["crate_blocks_lambda0.1", "alignment_digits"]
    + [
        pytest.param(name, marks=pytest.mark.slow)
        for name in ("crate_mae_lambda0.1", "vit_mae", "ropim", "orthogonality", "optim", "resnet18_cifar")
    ],
)
def test_a_wrong_number_fails(name, tmp_path):
    """An input off by one per cent: status 1."""
    with np.load(ROOT / "tests" / "golden" / f"{name}.npz") as archive:
        file = {k: archive[k].copy() for k in archive.files}
    key = next(k for k in file if k.startswith("in/") and file[k].ndim >= 2 and "noise" not in k and "sketch" not in k)
    file[key] = file[key] * 1.01
    np.savez(tmp_path / "wrong.npz", **file)
    assert parity.main([str(tmp_path / "wrong.npz")]) == 1


@pytest.mark.parametrize("key", ["in/train_labels", "in/test_labels", "out/lightly/k20_T0.07/ranking"])
def test_a_wrong_class_fails(key, tmp_path):
    with np.load(GOLDEN[0].with_name("knn.npz")) as archive:
        file = {k: archive[k].copy() for k in archive.files}
    file[key] = file[key][::-1]
    np.savez(tmp_path / "wrong.npz", **file)
    assert parity.main([str(tmp_path / "wrong.npz")]) == 1


def test_missing_and_unused_names_are_listed():
    with np.load(GOLDEN[0].with_name("vit_mae.npz")) as archive:
        state = parity.strip({k: archive[k] for k in archive.files}, "sd/")
    state["norm.shift"] = state.pop("norm.bias")
    with pytest.raises(ConfigError, match=r"missing norm.bias; not used norm.shift$"):
        import_state_dict("vit_mae", state, (4, 4))


def test_a_position_table_of_another_grid_is_refused():
    with np.load(GOLDEN[0].with_name("vit_mae.npz")) as archive:
        state = parity.strip({k: archive[k] for k in archive.files}, "sd/")
    state["pos_embed"] = state["pos_embed"][:, ::-1]
    with pytest.raises(ConfigError, match="pos_embed"):
        import_state_dict("vit_mae", state, (4, 4))

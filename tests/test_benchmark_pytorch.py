"""The PyTorch yardstick of the benchmarks computes what the authors' code computed (golden files)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed; it is needed by the speed comparison only")

from benchmarks import pytorch_crate  # noqa: E402  (the import needs torch)

REPOSITORY = Path(__file__).resolve().parent.parent
DEAD = {"pos_embed", "decoder_embed.weight", "decoder_embed.bias"}


@pytest.fixture(scope="module", params=["0.1", "5.0"])
def golden(request):
    """The golden numbers as tensors, and a model with their weights."""
    with np.load(REPOSITORY / "tests" / "golden" / f"crate_mae_lambda{request.param}.npz") as file:
        data = {name: torch.from_numpy(np.array(file[name])) for name in file.files}
    _seed, width, heads, depth, image, patch, lam = data["meta"].tolist()
    model = pytorch_crate.build(int(width), int(heads), int(depth), int(image), int(patch), lam)
    weights = {name.removeprefix("sd/"): value for name, value in data.items() if name.startswith("sd/")}
    model.load_state_dict(weights, strict=True)  # strict: our names are exactly the authors'
    return data, model


def test_outputs_match_the_authors(golden):
    data, model = golden
    with torch.no_grad():
        latent, mask = model.encode(data["in/images_nchw"], data["in/noise"])
        predicted = model.decode(latent)
        unmasked, nothing_removed = model.encode(data["in/images_nchw"])
        loss = model(data["in/images_nchw"], data["in/noise"])
    assert torch.equal(mask, data["out/mask"])
    assert not nothing_removed.any()
    for name, value in [("latent", latent), ("pred", predicted), ("features_unmasked", unmasked), ("loss_pixel", loss)]:
        expected = data[f"out/{name}"]
        assert value.shape == expected.shape
        assert (value - expected).abs().max() <= 2e-5, name


def test_gradients_match_the_authors(golden):
    data, model = golden
    model.zero_grad(set_to_none=True)
    model(data["in/images_nchw"], data["in/noise"]).backward()
    computed = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    expected = {name.removeprefix("grad/"): value for name, value in data.items() if name.startswith("grad/")}
    assert set(computed) == set(expected)
    assert DEAD.isdisjoint(computed)
    for name, value in expected.items():
        assert (computed[name] - value).norm() <= 1e-4 * value.norm(), name


def test_positions_match_the_authors(golden):
    data, model = golden
    grid = model.patchify(data["in/images_nchw"]).shape[1]
    positions = pytorch_crate.sincos_positions(data["sd/cls_token"].shape[2], int(grid**0.5))
    torch.testing.assert_close(positions, data["sd/decoder_pos_embed"], atol=1e-6, rtol=0)


def test_training_step_lowers_the_loss_and_leaves_fixed_positions_alone():
    torch.manual_seed(0)
    model = pytorch_crate.build(width=32, heads=2, depth=2, image=32, patch=8, lam=0.1)
    positions = model.decoder_pos_embed.clone()
    step = pytorch_crate.make_step(model, torch.randn(4, 3, 32, 32), learning_rate=3e-3)
    losses = [step() for _ in range(40)]
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])
    assert torch.equal(model.decoder_pos_embed, positions)


def test_script_prints_json():
    command = [sys.executable, "-m", "benchmarks.pytorch_crate", "--batch", "2", "--steps", "3", "--threads", "1"]
    command += ["--width", "32", "--heads", "2", "--depth", "1", "--image", "32", "--patch", "8"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert len(report["step_ms"]) == 3
    assert min(report["step_ms"]) <= report["median_ms"] <= max(report["step_ms"])
    assert (report["batch"], report["threads"], report["width"]) == (2, 1, 32)

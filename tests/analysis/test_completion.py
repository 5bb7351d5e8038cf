"""The error on what was removed, of a small model with its initial weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import cifar10
from crate_jax import data
from crate_jax.analysis.whitebox import completion
from crate_jax.config import validate
from crate_jax.data.pixels import normalise
from crate_jax.errors import DataError
from crate_jax.methods import reconstruction
from crate_jax.methods.reconstruction import loss, target
from crate_jax.models import autoencoder, corruption as corruptions
from crate_jax.models.patches import patchify
from crate_jax.report import Subject
from crate_jax.workdir import pictures

pytestmark = [pytest.mark.one_python, pytest.mark.usefixtures("one_device")]


def tiny(name, **changes):
    c = cifar10.get_config(
        "debug,encoder=vit,corruption=mask" if name == "mask" else "debug,encoder=vit,corruption=rop"
    )
    c.encoder.width, c.encoder.depth, c.encoder.heads, c.whitebox.images = 16, 1, 2, 9
    c.decoder.width, c.decoder.heads = 16 if c.decoder.name == "transformer" else 0, 2
    for key, value in changes.items():
        c.loss[key] = value
    validate(c)
    return c


def subject(name, **changes):
    c = tiny(name, **changes)
    params = jax.jit(lambda key: autoencoder.init_params(c, key))(jax.random.key(0))
    return Subject(name, c, params, None, data.open_split(c, "train"), data.open_split(c, "eval"), None)


@pytest.mark.parametrize("name", ["mask", "rop"])
def test_the_error_is_the_squared_loss_whatever_the_run_was_trained_with(name):
    s = subject(name, norm="l1", region="all")
    found = completion.errors(s.config, s.params, s.train, 9)
    c = tiny(name, norm="l2", region="complement")
    chosen = data.sampling.sample(len(s.train), 9, c.seed)
    images, _ = data.eval_images(c, s.train, chosen)

    @jax.jit  # op by op it takes three times as long
    def of_training(params):
        corruption = corruptions.sampler(c, *autoencoder.patch_numbers(c))(jax.random.split(jax.random.key(c.seed), 9))
        x = normalise(jnp.asarray(images), c)
        predicted = autoencoder.build(c).apply({"params": params}, x, corruption)
        return loss(predicted, target(patchify(x, c.encoder.patch_size), c), corruption, c)

    expected = of_training(s.params)
    assert found.shape == (2, 9) and np.mean(found[0]) == pytest.approx(float(expected), rel=1e-5)


def test_the_section_has_both_splits_and_one_grid_with_one_input_per_corruption():
    runs = [subject("mask"), subject("rop")]
    section = completion.section(runs)
    (table,) = section.tables
    for (name, corruption, of, train, test, ratio, silent), s in zip(table.rows, runs, strict=True):
        assert name == corruption == s.name and of == s.config.loss.target
        assert silent == section.numbers[name]["silent"] and 0.1 < silent < 2  # of normalised pixels
        assert train.value == section.numbers[name]["training"] and train.low < train.value < train.high
        assert ratio == pytest.approx(test.value / train.value)
    (figure,) = section.figures
    columns = 1 + 2 + 2  # originals, one input for each corruption, one completion for each run
    assert figure.content.shape[1] == pictures.GAP + columns * (pictures.CELL + pictures.GAP)


@pytest.mark.parametrize("target", ["pixel", "patch_normalised"])
def test_a_decoder_that_says_nothing_has_the_error_of_what_the_target_gives_away(target):
    """Of normalised patches the means, which are most of an image: no such error is that of learning."""
    s = subject("mask", target=target)
    s.params["decoder"]["head"] = jax.tree.map(jnp.zeros_like, s.params["decoder"]["head"])
    nothing, silent = completion.errors(s.config, s.params, s.test, 9)
    np.testing.assert_allclose(nothing, silent, rtol=1e-5)
    x = patchify(normalise(jnp.asarray(data.eval_images(s.config, s.test, [2, 5])[0]), s.config), 4)
    given = reconstruction.silent(s.config, x)
    assert given.shape == (2, 64, 1)
    expected = np.mean(x, axis=-1, keepdims=True) if target == "patch_normalised" else 0
    np.testing.assert_allclose(given, expected + 0 * given, atol=1e-6)


def test_the_error_of_one_image_has_no_interval():
    assert completion._cells({"training": np.array([[0.3], [1.0]])}) == [0.3, None, None]


def test_runs_without_a_decoder_have_no_such_section():
    s = subject("mask")
    del s.params["decoder"]
    with pytest.raises(DataError, match="no run has a decoder"):
        completion.section([s])

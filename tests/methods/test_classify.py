"""The fine-tuning objective: mixing, erasing, layer-wise rates, and a shared bias copied to every block."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crate_jax import config as configs, data
from crate_jax.errors import CheckpointError, ConfigError
from crate_jax.methods import classify
from crate_jax.models import build_encoder
from crate_jax.models.adopt import adopt_encoder
from crate_jax.training import optimizer

pytestmark = pytest.mark.one_python


def keys(n: int) -> jax.Array:
    return jax.random.split(jax.random.key(0), n)


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_labels_are_mixed_as_their_images_are(mixup, cutmix):
    """Image i is all i: the mean of a mixed one says how much of the other it holds, and so must its label."""
    n = 64
    images = jnp.broadcast_to(jnp.arange(n, dtype=jnp.float32)[:, None, None, None], (n, 12, 20, 3))
    mixed, target = jax.jit(lambda keys: classify.mix(keys, images, jnp.eye(n), mixup, cutmix))(keys(n))
    np.testing.assert_allclose(jnp.sum(target, axis=1), 1.0, atol=1e-5)
    np.testing.assert_allclose(jnp.mean(mixed, axis=(1, 2, 3)), target @ jnp.arange(n, dtype=jnp.float32), atol=1e-3)
    own = jnp.diagonal(target)
    assert float(jnp.std(own)) > 0.1  # each image draws its own weight
    flat = jnp.std(mixed, axis=(1, 2, 3)) < 1e-3  # mixup, or a box over all or nothing
    if mixup and cutmix:
        assert 0.3 < float(jnp.mean(flat)) < 0.8
    elif mixup:
        assert bool(jnp.all(flat))


@pytest.mark.parametrize("parts", [2, 3, 6])
def test_micro_batches_mix_the_pairs_of_the_whole_batch(parts):
    """As the step cuts: micro-batch k holds the images k, k + parts, k + 2 parts ..."""
    n = 12
    images = jax.random.normal(jax.random.key(1), (n, 4, 5, 3))
    whole = classify.mix(keys(n), images, jnp.eye(n), 0.8, 1.0)
    for k in range(parts):
        rows = slice(k, None, parts)
        chex.assert_trees_all_close(
            classify.mix(keys(n)[rows], images[rows], jnp.eye(n)[rows], 0.8, 1.0), tuple(x[rows] for x in whole)
        )
    other = np.asarray(whole[1] - jnp.diag(jnp.diagonal(whole[1]))).sum(axis=1)
    assert (other > 0).mean() > 0.6  # no image is its own partner


@pytest.mark.parametrize(
    ("batch", "accumulate", "name", "message"),
    [
        (4, 4, "mixup", "micro-batches of one"),
        (1, 1, "cutmix", "micro-batches of one"),
        (6, 2, "cutmix", "must be even"),
    ],
)
def test_micro_batches_without_pairs_are_refused(batch, accumulate, name, message):
    c = configs.base()
    c.batch_size, c.accumulate, c.finetune[name] = batch, accumulate, 0.9
    with pytest.raises(ConfigError, match=rf"config\.finetune\.{name}=0\.9: .*{message}"):
        classify.FINETUNE.check(c)
    c.finetune[name] = 0.0
    classify.FINETUNE.check(c)


def test_a_batch_of_odd_size_mixes_every_image():
    mixed = classify.mix(keys(5), jnp.zeros((5, 2, 2, 3)), jnp.eye(5), 0.8, 0.0)[1]
    assert (np.count_nonzero(mixed, axis=1) == 2).all()


def test_erasing_hits_its_share_of_the_images_with_boxes_of_the_right_size():
    images = jnp.full((400, 24, 40, 3), 7.0)
    erased = jax.jit(jax.vmap(lambda k, x: classify.erase(k, x, 0.25)))(keys(400), images)
    changed = np.asarray(jnp.any(erased != 7.0, axis=-1))
    hit = changed.any((1, 2))
    assert 0.18 < hit.mean() < 0.32
    shares = changed[hit].mean((1, 2))
    assert 0.005 < shares.min() and shares.max() < 0.42
    rows, columns = changed[hit].any(2).sum(1), changed[hit].any(1).sum(1)
    np.testing.assert_allclose(shares * 24 * 40, rows * columns)  # filled boxes
    untouched = jax.jit(jax.vmap(lambda k, x: classify.erase(k, x, 0.0)))(keys(400), images)
    np.testing.assert_array_equal(untouched, images)


def test_options_of_a_recipe_reach_the_loss():
    c = configs.base()
    c.data.image_size, c.encoder.patch_size, c.data.source = (8, 12), 4, "synthetic"
    c.encoder.update(dict(name="vit", width=16, depth=2, heads=2))
    source = data.SyntheticSource("train", (8, 12))
    batch = {"image": np.stack([source.read(i) for i in range(8)]), "label": source.labels[:8]}

    def build(key: str, value: float):
        changed = c.copy_and_resolve_references()
        (changed.encoder if key == "drop_path" else changed.finetune)[key] = value
        return classify.build(changed, source)

    def params_of(method):
        return jax.jit(lambda key: method.init(key, lambda drawn: drawn)[0])(jax.random.key(1))

    def loss(method) -> float:
        return float(jax.jit(method.loss)(params, {}, batch, keys(8))[0])

    plain = build("head_init", 1.0)
    params = params_of(plain)
    scaled = params_of(build("head_init", 0.25))["head"]["linear"]["kernel"]
    np.testing.assert_allclose(scaled, 0.25 * params["head"]["linear"]["kernel"], rtol=1e-5)
    expected = loss(plain)
    for key, value in (("label_smoothing", 0.5), ("cutmix", 1.0), ("erase", 1.0), ("drop_path", 0.9)):
        assert abs(loss(build(key, value)) - expected) > 1e-4, key


def relative(positions: str):
    c = configs.base()
    c.data.image_size, c.encoder.patch_size = (8, 12), 4
    c.encoder.update(dict(name="vit", width=16, depth=3, heads=2, positions=positions))
    module = build_encoder(c)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 12, 3)), jnp.float32)
    return module, jax.jit(module.init)(jax.random.key(0), x)["params"], x


def test_a_shared_bias_copied_to_every_block_is_the_same_function():
    shared, params, x = relative("relative")
    table = jax.random.normal(jax.random.key(1), params["relative_bias"].shape)
    params = {**params, "relative_bias": table}
    per_block, others, _ = relative("relative_per_block")
    adopted = adopt_encoder({"encoder": others}, {"encoder": params}, "test", (2, 3), ours=(2, 3))["encoder"]
    assert adopted["blocks"]["relative_bias"].shape == (3, *table.shape)
    apply = jax.jit(shared.apply)
    expected = apply({"params": params}, x)
    np.testing.assert_allclose(jax.jit(per_block.apply)({"params": adopted}, x), expected, atol=1e-5)
    plain = apply({"params": {**params, "relative_bias": 0 * table}}, x)
    assert float(jnp.abs(plain - expected).max()) > 1e-2


def test_another_models_encoder_is_named_array_by_array():
    _, ours, _ = relative("relative")
    _, theirs, _ = relative("relative_per_block")
    with pytest.raises(CheckpointError, match="encoder/blocks/relative_bias: not in this configuration"):
        adopt_encoder({"encoder": ours}, {"encoder": theirs}, "test", (2, 3), ours=(2, 3))
    with pytest.raises(CheckpointError, match="no 'encoder'"):
        adopt_encoder({"encoder": ours}, {"decoder": theirs}, "test", (2, 3), ours=(2, 3))


def test_rates_by_layer_need_a_stack_of_blocks():
    """Without one there is no depth to count: an error; freezing needs none."""
    params = {"encoder": {"stem": {"kernel": jnp.ones((3, 2))}}, "head": {"kernel": jnp.ones((2, 5))}}
    with pytest.raises(ConfigError, match="config.optimizer.layer_decay=0.5: .* no stack of blocks"):
        optimizer.scale_by_layer(params, 0.5, False)
    frozen = optimizer.scale_by_layer(params, 0.5, True).update(params, None, None)[0]
    assert float(jnp.abs(frozen["encoder"]["stem"]["kernel"]).max()) == 0.0
    np.testing.assert_array_equal(frozen["head"]["kernel"], 1.0)


def test_rates_fall_with_the_depth_below_the_head():
    """Embedding decay^(L+1), block l decay^(L-l), last norm, shared bias and head 1; a frozen encoder 0."""
    params = {
        "encoder": {
            "embedding": {"cls_token": jnp.ones((1, 1, 2))},
            "blocks": {"mlp_in": {"kernel": jnp.ones((3, 2, 2))}},
            "norm": {"scale": jnp.ones(2)},
            "relative_bias": jnp.ones((12, 2)),  # as in BEiT's code
        },
        "head": {"linear": {"kernel": jnp.ones((2, 5))}},
        "decoder": {"blocks": {"mlp_in": {"kernel": jnp.ones((5, 2, 2))}}},  # a deeper one changes nothing
    }
    for freeze in (False, True):
        scaled = optimizer.scale_by_layer(params, 0.7, freeze).update(params, None, None)[0]
        kept = float(not freeze)
        np.testing.assert_allclose(scaled["encoder"]["embedding"]["cls_token"], kept * 0.7**4, rtol=1e-6)
        np.testing.assert_allclose(
            scaled["encoder"]["blocks"]["mlp_in"]["kernel"][:, 0, 0], kept * 0.7 ** np.array([3, 2, 1]), rtol=1e-6
        )
        np.testing.assert_allclose(scaled["encoder"]["norm"]["scale"], kept)
        np.testing.assert_allclose(scaled["encoder"]["relative_bias"], kept)
        np.testing.assert_allclose(scaled["head"]["linear"]["kernel"], 1.0)

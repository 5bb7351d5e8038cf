"""ResNets: names, sizes, batch norm over devices and groups, corruptions. tests/parity_resnet.py has the numbers."""

from __future__ import annotations

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crate_jax import config as configs
from crate_jax.config import validate
from crate_jax.errors import CheckpointError, ConfigError
from crate_jax.methods import classify, reconstruction, segment
from crate_jax.models import autoencoder, batch_norm, build_encoder, grids, representation, widths
from crate_jax.models.adopt import adopt_encoder
from crate_jax.models.corruption import Masking
from crate_jax.models.heads import HEADS
from crate_jax.models.patches import patchify
from crate_jax.models.resnet import ARCHITECTURES, Architecture, corrupt_image, draw_groups, max_pool
from crate_jax.parallel import parameters, sharding, target
from crate_jax.training import step as train_step
from tests.models import drawn, drawn_on

pytestmark = pytest.mark.one_python


@pytest.fixture
def short(monkeypatch):
    """One block in each stage of a resnet18, where a test compiles several programs."""
    monkeypatch.setitem(ARCHITECTURES, "resnet18", Architecture((1, 1, 1, 1)))


def thin(encoder: str = "resnet18", size: tuple[int, int] = (12, 8), **encoder_values):
    """A ResNet of 2 channels in its first stage; six 4 x 4 patches for the corruption and a linear decoder."""
    c = configs.base()
    c.steps, c.batch_size, c.data.image_size = 4, 16, size
    c.encoder.update(dict(name=encoder, stage_width=2, stem="cifar", patch_size=4) | encoder_values)
    c.decoder.name, c.evaluation.pool = "linear", "mean"
    c.corruption.mask_ratio = 0.6
    c.optimizer.update(dict(lr=1e-4, lr_batch=0))
    validate(c)
    return c


def test_images_without_a_pixel_for_the_stem_are_refused():
    """A 3 x 3 convolution without padding leaves nothing of two rows; JAX raised ZeroDivisionError."""
    c = thin()
    c.method, c.encoder.stem_padding = "vicreg", 0
    c.data.image_size = (3, 8)
    validate(c)
    c.data.image_size = (2, 8)
    with pytest.raises(ConfigError, match=r"image_size=\(2, 8\): .* sides of at least 3 pixels"):
        validate(c)


def shapes(c):
    return jax.eval_shape(lambda: representation.init_params(c, jax.random.key(0)))["encoder"]


def encoder_of(c):
    return drawn(lambda: representation.init_params(c, jax.random.key(0)))


def autoencoder_of(c):
    return drawn(lambda: autoencoder.init_params(c, jax.random.key(0)))


def images(c, n: int = 16, seed: int = 5) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (n, *c.data.image_size, 3))


def keys(n: int = 16) -> jax.Array:
    return jax.random.split(jax.random.key(9), n)


@pytest.mark.parametrize(
    ("encoder", "stem", "count"),
    [
        ("resnet18", "cifar", 11_168_832),
        ("resnet34", "imagenet", 21_284_672),
        ("resnet50", "imagenet", 23_508_032),
        ("wide_resnet50_2", "imagenet", 66_834_240),
    ],
)
def test_as_many_parameters_as_torchvisions_without_the_classifier(encoder, stem, count):
    """The running statistics are not among them."""
    c = thin(encoder, stage_width=64, stem=stem)
    assert parameters.count(batch_norm.split(shapes(c))[0]) == count


def test_names_and_layouts_that_converters_read():
    tree = {name: x.shape for name, x in parameters.names(shapes(thin("resnet50", stem="imagenet"))).items()}
    assert tree["stem/conv/kernel"] == (7, 7, 3, 2)
    norm = {"scale", "bias", "running_mean", "running_var"}
    assert {n.removeprefix("stem/norm/") for n in tree if n.startswith("stem/norm")} == norm
    block = "stage2/block0/"
    parts = {n.removeprefix(block).split("/")[0] for n in tree if n.startswith(block)}
    assert parts == {"conv1", "norm1", "conv2", "norm2", "conv3", "norm3", "shortcut_conv", "shortcut_norm"}
    assert [tree[f"{block}{n}/kernel"] for n in ("conv1", "conv2", "conv3", "shortcut_conv")] == [
        (1, 1, 8, 4), (3, 3, 4, 4), (1, 1, 4, 16), (1, 1, 8, 16),
    ]  # fmt: skip
    assert "stage2/block1/shortcut_conv/kernel" not in tree and "stage1/block0/shortcut_conv/kernel" in tree


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize(("stem", "padding"), [("imagenet", 2), ("cifar", 2), ("cifar", 1)])
@pytest.mark.parametrize("size", [(33, 45), (224, 160), (7, 5)])
def test_grids_are_the_sides_of_the_maps(stem, padding, size):
    c = thin(stem=stem, stem_padding=padding)
    tokens = jax.eval_shape(representation.layers(c), {"encoder": shapes(c)}, jnp.zeros((2, *size, 3)))[1]
    expected = [(2, h * w, width) for (h, w), width in zip(grids(c, size), widths(c), strict=True)]
    assert [x.shape for x in tokens] == expected
    maps = jax.eval_shape(representation.block_maps(c, (2, 4)), {"encoder": shapes(c)}, jnp.zeros((2, *size, 3)))
    assert [x.shape[1:3] for x in maps] == [grids(c, size)[1], grids(c, size)[3]]


@functools.partial(jax.jit, static_argnums=0)
def pulled(function, g, *args):
    """The value of a function, and its gradients for the gradient `g` of the value."""
    y, pull = jax.vjp(function, *args)
    return y, pull(g)


def textbook(x, scale, bias, groups_BG):
    """Batch norm as its definition, two passes, automatic differentiation; each group by itself."""
    groups_BG = jnp.ones((len(x), 1)) if groups_BG is None else groups_BG
    out = jnp.zeros(x.shape)
    for g in range(groups_BG.shape[1]):
        weight = groups_BG[:, g].reshape(-1, *[1] * (x.ndim - 1))
        count = x.size // x.shape[-1] / len(x) * jnp.sum(groups_BG[:, g])
        mean = jnp.sum(weight * x, tuple(range(x.ndim - 1))) / count
        var = jnp.sum(weight * (x - mean) ** 2, tuple(range(x.ndim - 1))) / count
        out += weight * ((x - mean) / jnp.sqrt(var + 1e-5) * scale + bias)
    return out


@pytest.mark.parametrize("shape", [(6, 5), (6, 3, 2, 5)])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("relu", [False, True])
def test_one_pass_and_its_hand_written_gradient_are_those_of_the_definition(shape, grouped, relu):
    """Also where the mean is a thousand deviations away, since the running mean is near it."""
    rng = np.random.default_rng(0)
    x, g = (jnp.asarray(rng.normal(size=shape) * 0.7 + m, jnp.float32) for m in (1.9, 0.3))
    scale, bias = jnp.asarray(rng.normal(size=(2, 5)), jnp.float32)
    groups = jax.nn.one_hot(jnp.array([0, 2, 1, 1, 0, 2]), 3) if grouped else None

    normalise = batch_norm.normalise_and_rectify if relu else batch_norm.normalise_batch

    def ours(x, scale, bias):
        return normalise(x, scale, bias, jnp.full(5, 1.7), groups)[0]

    def definition(*args):
        y = textbook(*args, groups)
        return jax.nn.relu(y) if relu else y

    y, grads = pulled(ours, g, x, scale, bias)
    expected, expected_grads = pulled(definition, g, x, scale, bias)
    np.testing.assert_allclose(y, expected, atol=2e-6)
    for a, b in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
    far = jax.jit(normalise)(x + 700, scale, bias, jnp.full(5, 701.9), groups)[0]
    np.testing.assert_allclose(far, expected, atol=2e-3)  # of x itself: float32 holds 700 to 3e-5


@pytest.mark.parametrize(("platform", "kind", "barriers"), [("gpu", "NVIDIA H100", 2), ("cpu", "cpu", 0)])
def test_gpus_of_nvidia_rectify_within_the_norm(monkeypatch, platform, kind, barriers):
    monkeypatch.setattr(target, "_device", lambda: (platform, kind))
    norm, x = batch_norm.BatchNorm(relu=True), jnp.asarray(np.random.default_rng(0).normal(size=(6, 5)), jnp.float32)
    params = norm.init(jax.random.key(0), x, False)

    def loss(x):
        return jnp.sum(norm.apply(params, x, True, mutable=[batch_norm.MOVED])[0] * jnp.arange(5.0))

    assert str(jax.make_jaxpr(jax.grad(loss))(x)).count(" optimization_barrier ") == barriers
    expected = jax.nn.relu(textbook(x, jnp.ones(5), jnp.zeros(5), None))
    np.testing.assert_allclose(norm.apply(params, x, True, mutable=[batch_norm.MOVED])[0], expected, atol=2e-6)
    np.testing.assert_allclose(norm.apply(params, x, False), jax.nn.relu(x), atol=2e-5)  # running statistics


def test_groups_are_equal_and_follow_their_images():
    groups = draw_groups(keys(12), 3)
    np.testing.assert_array_equal(groups.sum(0), [4, 4, 4])
    np.testing.assert_array_equal(groups.sum(1), 1)
    order = np.random.default_rng(0).permutation(12)
    np.testing.assert_array_equal(draw_groups(keys(12)[order], 3), groups[order])
    assert not np.array_equal(draw_groups(jax.random.split(jax.random.key(1), 12), 3), groups)
    with pytest.raises(ValueError, match="16 images cannot be cut into 3 groups"):
        draw_groups(keys(16), 3)


@pytest.mark.slow
@pytest.mark.usefixtures("short")
def test_images_of_other_groups_do_not_reach_an_image():
    """With groups the gradient of an image's features is zero at images of other groups; without them it is not."""
    for count in (1, 4):
        c = thin(norm_groups=count)
        read, params = representation.build(c), encoder_of(c)

        def of_first(x, read=read, params=params):
            return jnp.sum(read(params, x, keys())[0] ** 3)

        reached = np.abs(np.asarray(jax.jit(jax.grad(of_first))(images(c)))).max((1, 2, 3)) > 0
        groups = np.asarray(draw_groups(keys(), count))
        np.testing.assert_array_equal(reached, groups @ groups[0] > 0)


@pytest.mark.usefixtures("short")
def test_training_uses_the_batch_and_moves_statistics_and_evaluation_does_not():
    c = thin()
    tree, read = jax.jit(lambda: representation.init_params(c, jax.random.key(0)))(), representation.build(c)
    x = images(c) * 1.3 + 0.4
    alone, together = jax.jit(lambda tree, x: (read(tree, x[:1]), read(tree, x)))(tree, x)
    np.testing.assert_allclose(together[:1], alone, rtol=1e-4, atol=1e-6)
    features, moved = jax.jit(read.train)(tree, x, keys())
    assert np.abs(features - together).max() > 0.05
    kept, statistics = batch_norm.split(moved)
    chex.assert_trees_all_equal(kept, batch_norm.split(tree)[0])
    same = jax.tree.map(lambda a, b: bool(np.all(a == b)), statistics, batch_norm.split(tree)[1])
    assert not any(jax.tree.leaves(same))
    mean = statistics["encoder"]["stem"]["norm"]["running_mean"]
    kernel = tree["encoder"]["stem"]["conv"]["kernel"]
    first = jax.lax.conv_general_dilated(
        x, kernel, (1, 1), ((2, 2), (2, 2)), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    np.testing.assert_allclose(mean, 0.1 * first.mean((0, 1, 2)), atol=1e-6)


def run(c, data: int, model: int = 1, count: int = 3):
    """Losses, the last state on the host and the compiled step of a few steps on a mesh."""
    mesh = sharding.make_mesh(c.batch_size, 1, jax.devices()[: data * model], data, model)
    method = reconstruction.build(c)
    recipe = train_step.make_recipe(c, method, 40)
    state = train_step.make_init(c, method, recipe, mesh, drawn_on(c, method, recipe, mesh))()
    rng = np.random.default_rng(0)
    batches = rng.integers(0, 256, (count, c.batch_size, *c.data.image_size, 3), np.uint8)
    placed = [sharding.put_batch({"image": x}, mesh) for x in batches]
    step = train_step.make_train_step(c, method, recipe, mesh).lower(state, placed[0]).compile()
    losses = []
    for batch in placed:
        state, scalars = step(state, batch)
        losses.append(float(scalars["loss"]))
    return losses, jax.device_get(state), step.as_text()


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize(("groups", "data", "model"), [(4, 2, 1), pytest.param(1, 2, 4, marks=pytest.mark.slow)])
def test_statistics_are_those_of_the_whole_batch_on_any_mesh(groups, data, model, monkeypatch):
    """Also of random groups, which do not follow the devices; with a penalty on the convolutions and an average."""
    monkeypatch.setattr(sharding, "MIN_SPLIT", 2)
    c = thin(norm_groups=groups)
    c.penalty.name, c.penalty.weight, c.optimizer.ema = "so", 1e-3, 0.9
    alone, one, _ = run(c, 1)
    losses, many, text = run(c, data, model)
    np.testing.assert_allclose(losses, alone, rtol=1e-5)
    chex.assert_trees_all_close(many.carried, one.carried, atol=2e-5)
    chex.assert_trees_all_close(many.ema_carried, one.ema_carried, atol=2e-5)
    assert "all-to-all" not in text
    assert set(many.carried) == {"statistics"} and not batch_norm.split(many.params)[1]
    judged = many.judged(reconstruction.build(c))
    chex.assert_trees_all_equal(batch_norm.split(judged)[1], many.ema_carried["statistics"])


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("encoder", ["resnet18", pytest.param("wide_resnet50_2", marks=pytest.mark.slow)])
def test_bfloat16_is_finite_and_near_float32(encoder):
    c = thin(encoder, stem="imagenet")
    params = encoder_of(c)
    exact = jax.jit(representation.build(c))(params, images(c))
    c.dtype = "bfloat16"
    read = representation.build(c)
    chex.assert_trees_all_close(jax.jit(read)(params, images(c)), exact, rtol=0.1, atol=0.02 * float(exact.std()))
    trained, moved = jax.jit(read.train)(params, images(c), keys())
    chex.assert_tree_all_finite((trained, moved))
    chex.assert_trees_all_equal_dtypes(moved, params)


def loss_of(c):
    """(parameters, images) -> loss of one draw of the corruption, in training mode."""
    method = reconstruction.build(c)

    def loss(params, pixels):
        weights, carried = batch_norm.carry(params)
        return method.loss(weights, carried, {"image": pixels}, keys(len(pixels)))[0]

    return loss


def pixels_of(c, n: int = 16) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).integers(0, 256, (n, *c.data.image_size, 3)), jnp.uint8)


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize(
    ("corruption", "decoder"),
    [
        ({"name": "mask"}, "linear"),
        pytest.param({"name": "mask", "mask_fill": "zero"}, "transformer", marks=pytest.mark.slow),
        ({"name": "rop", "rop_ratio": 0.3}, "linear"),
        pytest.param({"name": "noise"}, "linear", marks=pytest.mark.slow),
        pytest.param({"name": "none"}, "linear", marks=pytest.mark.slow),
    ],
)
def test_every_corruption_trains_a_resnet(corruption, decoder):
    """A finite loss, and a gradient for every weight. Maps of 4 x 3 places are resized to 3 x 2 patches."""
    c = thin(stem_padding=2)
    c.corruption.update(corruption)
    c.decoder.update(dict(name=decoder, depth=1, heads=2, width=8 if decoder == "transformer" else 0))
    validate(c)
    params = autoencoder_of(c)
    assert ("mask_token" in params["encoder"]) == (corruption == {"name": "mask"})
    value, grads = jax.jit(jax.value_and_grad(loss_of(c)))(params, pixels_of(c))
    chex.assert_tree_all_finite((value, grads))
    assert not [n for n, g in parameters.names(batch_norm.split(grads)[0]).items() if not np.any(g)]
    method = reconstruction.build(c)
    pictures = jax.eval_shape(method.pictures, params, {"image": pixels_of(c, 2)}, keys(2))
    assert len(pictures) == len(method.columns) and all(p.shape == (2, 12, 8, 3) for p in pictures)


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("fill", ["token", "zero"])
def test_a_removed_patch_does_not_reach_a_resnet(fill):
    """Its pixels have no gradient; the network sees 0 or the learned patch in their place."""
    c = thin()
    c.corruption.mask_fill = fill
    params = autoencoder_of(c)["encoder"]
    noise = jnp.asarray([[0.1, 0.9, 0.2, 0.8, 0.7, 0.3]])
    masking = Masking.from_noise(noise, 3, False, learned=fill == "token")
    encoder = build_encoder(c)

    def total(x):
        return jnp.sum(encoder.apply({"params": params}, x, masking) ** 3)

    per_patch = np.abs(np.asarray(patchify(jax.jit(jax.grad(total))(images(c, 1)), 4))).max((0, 2))
    np.testing.assert_array_equal(per_patch > 0, [True, False, True, False, False, True])
    token = params["mask_token"][0, 0] if fill == "token" else None
    seen = patchify(corrupt_image(images(c, 1), masking, 4, token), 4)[0]
    np.testing.assert_array_equal(seen[1], np.zeros(48) if token is None else token)


@pytest.mark.slow
@pytest.mark.usefixtures("short")
def test_remat_changes_nothing_but_memory():
    c = thin()
    params, x = autoencoder_of(c), pixels_of(c)
    plain = jax.jit(jax.grad(loss_of(c)))
    grads, convolutions = plain(params, x), []
    for c.remat, c.remat_keep in ((False, "nothing"), (True, "products"), (True, "nothing")):
        convolutions.append(str(jax.make_jaxpr(jax.grad(loss_of(c)))(params, x)).count("conv_general_dilated"))
    chex.assert_trees_all_close(jax.jit(jax.grad(loss_of(c)))(params, x), grads, atol=1e-6)
    assert convolutions[0] == convolutions[1] < convolutions[2], convolutions


def test_a_micro_batch_would_have_other_statistics():
    c = thin()
    c.accumulate = 2
    with pytest.raises(ConfigError, match="config.accumulate=2: must be 1"):
        train_step.make_recipe(c, reconstruction.build(c), 40)


def test_the_default_of_decay_exclude_may_match_nothing_in_a_resnet():
    """A pattern of the user's may not."""
    c = thin()
    c.corruption.mask_fill = "zero"
    train_step.make_recipe(c, reconstruction.build(c), 40)
    c.optimizer.decay_exclude = (".*cls_token",)
    with pytest.raises(ConfigError, match="decay_exclude: pattern '.*cls_token' matches none"):
        train_step.make_recipe(c, reconstruction.build(c), 40)


def test_an_encoder_is_adopted_with_its_statistics():
    c = thin()
    ours, theirs = ({"encoder": jax.tree.map(lambda x, v=v: np.full(x.shape, v), shapes(c))} for v in (0.0, 0.9))
    adopted = adopt_encoder(ours, theirs, "test", (4, 4), ours=(3, 2), resize=True)
    assert all(np.all(x == 0.9) for x in jax.tree.leaves(adopted))
    del theirs["encoder"]["stem"]["norm"]["running_var"]
    with pytest.raises(CheckpointError, match="encoder/stem/norm/running_var: not in the checkpoint"):
        adopt_encoder(ours, theirs, "test", (4, 4), ours=(4, 4))


@pytest.mark.slow  # its gradients and its steps on a mesh are quick tests
@pytest.mark.usefixtures("short")
def test_a_resnet_learns_to_reconstruct_and_draws_it():
    """One batch of stripes, masked anew at each step."""
    c = thin(stage_width=4)
    c.steps, c.optimizer.lr = 30, 2e-2
    method, mesh = reconstruction.build(c), sharding.make_mesh(c.batch_size, 1, jax.devices()[:1])
    recipe = train_step.make_recipe(c, method, 16)
    state, step = train_step.make_init(c, method, recipe, mesh)(), train_step.make_train_step(c, method, recipe, mesh)
    stripes = np.where(np.arange(12)[:, None] % 8 < 4, 40, 200) * np.linspace(0.5, 1, 16)[:, None, None]
    x = np.broadcast_to(stripes[..., None], (16, 12, 8, 3)).astype(np.uint8)
    losses = []
    for _ in range(30):
        state, scalars = step(state, sharding.put_batch({"image": x}, mesh))
        losses.append(float(scalars["loss"]))
    assert losses[-1] < 0.3 * losses[0], losses
    pictures = jax.jit(method.pictures)(state.judged(method), {"image": x[:2]}, keys(2))
    assert len(pictures) == len(method.columns) and all(p.shape == (2, 12, 8, 3) for p in pictures)


class Labelled:
    """All that fine-tuning asks of the training images."""

    class_names = ("a", "b", "c")


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("freeze", [False, True])
def test_fine_tuning_moves_the_statistics_of_an_encoder_that_it_trains(freeze):
    """A frozen one keeps them, and reads features in evaluation mode; only then is the loss a mean over images."""
    c = thin()
    c.job, c.finetune.freeze = "finetune", freeze
    method = classify.build(c, Labelled())
    params, carried = drawn(lambda: method.init(jax.random.key(0), lambda tree: tree))
    batch = {"image": pixels_of(c), "label": jnp.arange(16) % 3}
    grads, (after, _) = jax.jit(jax.grad(method.loss, has_aux=True))(params, carried, batch, keys())
    trains = {name: bool(np.any(g)) for name, g in parameters.names(grads["encoder"]).items()}
    assert set(trains.values()) == {not freeze} and method.mean_over_images == freeze
    same = jax.tree.map(lambda a, b: bool(np.all(a == b)), carried, after)
    assert set(jax.tree.leaves(same)) == {freeze} and set(after) == {"statistics"}
    judged = method.judged(params, after)
    assert jax.eval_shape(method.features, judged, batch["image"]).shape == (16, 3)
    chex.assert_trees_all_equal(batch_norm.split(judged)[1], after["statistics"])


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("head", HEADS)
def test_heads_of_segmentation_read_the_stages(head):
    """UPerNet reads all four and predicts at the finest; several maps of the linear head are resized to the first."""
    c = thin(size=(40, 56), stem="imagenet")
    c.segment.head, c.segment.channels, c.segment.blocks = head, 8, () if head == "upernet" else (2, 4)
    read, module = representation.block_maps(c, segment.blocks(c)), HEADS[head](c, 3)
    params = drawn(lambda: representation.with_head(c, module, read)(jax.random.key(0)))

    @jax.jit
    def both(params, x):
        maps = read(params, x)
        return maps, module.apply({"params": params["head"]}, maps)[0], read.train(params, x, keys(2))[1]

    maps, scores, moved = both(params, images(c, 2))
    sides = [(10, 14), (5, 7), (3, 4), (2, 2)]
    assert [x.shape[1:3] for x in maps] == [sides[n - 1] for n in segment.blocks(c)]
    assert scores.shape == (2, *maps[0].shape[1:3], 3) and "pyramid" not in params["head"]
    before, after = (tree["encoder"]["stem"]["norm"]["running_mean"] for tree in (params, moved))
    assert np.all(before != after)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("size", [(6, 7), (5, 8), (1, 2)])
def test_the_max_pool_is_xlas_with_its_gradient(size, dtype):
    """Many places are equal, as after a ReLU or in bfloat16: the gradient goes to the first of them."""
    x = (jnp.round(4 * jax.random.normal(jax.random.key(0), (3, *size, 5))) / 4).astype(dtype)
    g = jax.random.normal(jax.random.key(1), jax.eval_shape(max_pool, x).shape).astype(dtype)
    expected, (expected_dx,) = pulled(lambda x: nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1))), g, x)
    y, (dx,) = pulled(max_pool, g, x)
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(jax.jit(max_pool)(x), expected)
    assert dx.dtype == dtype
    error = np.abs(dx.astype(jnp.float32) - expected_dx.astype(jnp.float32))
    assert error.max() <= 8 * jnp.finfo(dtype).eps


def test_the_max_pool_keeps_what_is_not_a_number():
    x = jnp.zeros((1, 5, 5, 1)).at[0, 4, 2, 0].set(jnp.nan)
    y, _ = pulled(max_pool, jnp.zeros((1, 3, 3, 1)), x)
    np.testing.assert_array_equal(jnp.isnan(y[0, :, :, 0]), [[0, 0, 0], [0, 0, 0], [0, 1, 0]])

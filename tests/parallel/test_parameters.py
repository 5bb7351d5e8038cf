import logging

import jax
import jax.numpy as jnp
import pytest

from crate_jax.errors import ConfigError
from crate_jax.parallel import parameters


@pytest.fixture
def params():
    return {
        "encoder": {
            "patch_embed": {"kernel": jnp.zeros((12, 8)), "bias": jnp.zeros(8)},
            "cls_token": jnp.zeros((1, 1, 8)),
            "blocks": {"mssa": {"kernel": jnp.zeros((3, 8, 8))}, "norm": {"scale": jnp.zeros((3, 8))}},
        },
        "decoder": {"head": {"kernel": jnp.zeros((8, 12))}},
    }


def test_names_are_paths_and_hold_the_leaves(params):
    flat = parameters.names(params)
    assert set(flat) == {
        "decoder/head/kernel",
        "encoder/blocks/mssa/kernel",
        "encoder/blocks/norm/scale",
        "encoder/cls_token",
        "encoder/patch_embed/bias",
        "encoder/patch_embed/kernel",
    }
    assert flat["encoder/cls_token"] is params["encoder"]["cls_token"]


def test_order_does_not_depend_on_how_the_tree_was_built(params):
    reversed_params = {key: dict(reversed(value.items())) for key, value in reversed(params.items())}
    assert list(parameters.names(reversed_params)) == list(parameters.names(params))


def test_shapes_serve_as_well_as_arrays(params):
    shapes = jax.eval_shape(lambda: params)
    assert list(parameters.names(shapes)) == list(parameters.names(params))
    assert parameters.count(shapes) == parameters.count(params) == 12 * 8 + 8 + 8 + 3 * 64 + 3 * 8 + 8 * 12


def test_only_a_whole_component_makes_a_name_stacked():
    assert parameters.is_stacked("encoder/blocks/norm/scale")
    assert not parameters.is_stacked("encoder/blocks_norm/scale")
    assert not parameters.is_stacked("encoder/sub_blocks")


def test_unstacked_ndim_leaves_out_the_layer_axis(params):
    ndims = {name: parameters.unstacked_ndim(name, leaf) for name, leaf in parameters.names(params).items()}
    assert ndims["encoder/blocks/mssa/kernel"] == 2
    assert ndims["encoder/blocks/norm/scale"] == 1
    assert ndims["encoder/patch_embed/kernel"] == 2
    assert ndims["encoder/patch_embed/bias"] == 1


def test_select_matches_whole_names_and_takes_the_excluded_out(params):
    assert parameters.select(params, ("encoder/.*kernel",), (), "penalty") == (
        "encoder/blocks/mssa/kernel",
        "encoder/patch_embed/kernel",
    )
    assert parameters.select(params, (".*kernel",), (".*/patch_embed/.*", "decoder/.*"), "penalty") == (
        "encoder/blocks/mssa/kernel",
    )


@pytest.mark.parametrize(
    "include, exclude, key, pattern",
    [
        (("kernel",), (), "config.penalty.include", "'kernel'"),  # a part of a name is not a name
        ((".*kernel", "encoder/head/kernel"), (), "config.penalty.include", "'encoder/head/kernel'"),
        ((".*kernel",), ("encoder/patch_embed",), "config.penalty.exclude", "'encoder/patch_embed'"),
    ],
)
def test_a_pattern_that_matches_nothing_is_an_error_that_names_it(params, include, exclude, key, pattern):
    with pytest.raises(ConfigError) as error:
        parameters.select(params, include, exclude, "penalty")
    message = str(error.value)
    assert key in message and pattern in message and "/kernel" in message and "\n" not in message


def test_mask_has_the_trees_structure_and_is_true_where_selected(params):
    mask = parameters.mask(params, {"encoder/cls_token", "decoder/head/kernel"})
    assert jax.tree.structure(mask) == jax.tree.structure(params)
    assert [name for name, chosen in parameters.names(mask).items() if chosen] == [
        "decoder/head/kernel",
        "encoder/cls_token",
    ]


def test_log_has_one_line_per_parameter_with_its_rules_and_the_totals(params, caplog):
    with caplog.at_level(logging.INFO, logger="crate_jax.parallel.parameters"):
        parameters.log_rules(params, {"encoder/blocks/mssa/kernel", "decoder/head/kernel"}, {"decoder/head/kernel"})
    head, *rows, total = caplog.messages[-1].splitlines()
    assert head == "6 parameters" and len(rows) == 6
    assert [row.split() for row in rows if row.startswith(("decoder/", "encoder/blocks"))] == [
        ["decoder/head/kernel", "8x12", "96", "decay", "penalty"],
        ["encoder/blocks/mssa/kernel", "3x8x8", "192", "decay"],
        ["encoder/blocks/norm/scale", "3x8", "24"],
    ]
    assert total == "total 424, under weight decay 288, under the penalty 96"

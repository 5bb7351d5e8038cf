"""CRATE for PyTorch: the exported folder, and that its code computes what ours does, where torch is installed."""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib.util
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from crate_jax import config
from crate_jax.config import base
from crate_jax.convert import export_state_dict, files, pretrained, weights
from crate_jax.convert.export import export
from crate_jax.convert.torch_crate import FAMILY, KEYS, MODELING, config_json
from crate_jax.data import decoding
from crate_jax.data.evaluation import central_box
from crate_jax.errors import CheckpointError
from crate_jax.methods import reconstruction
from crate_jax.models import autoencoder, representation
from crate_jax.models.corruption import CLEAN, Masking, Noise, Projection, sampler
from crate_jax.models.patches import patchify
from crate_jax.parallel.parameters import names
from crate_jax.workdir.checkpoint_files import nest

TREE = ast.parse(MODELING.read_text())

# Changes to a small CRATE-MAE. Together they have every switch of the encoder, the decoders and the corruptions.
VARIANTS: dict[str, dict] = {
    "mask token, learned positions": {"encoder.positions": "learned", "encoder.lam": 0.1, "encoder.eta": 0.3},
    "dropped, CRATE decoder": {
        "corruption.mask_fill": "drop", "decoder.positions": True, "evaluation.pool": "mean",
        "loss.target": "patch_normalised", "decoder.heads": 4,
    },
    "dropped, transformer": {
        "corruption.mask_fill": "drop", "decoder.name": "transformer", "decoder.width": 12, "decoder.heads": 3,
        "encoder.positions": "learned", "evaluation.pool": "cls_mean",
    },
    "zeros, tied, no final norm": {
        "corruption.mask_fill": "zero", "encoder.tied_output": True, "encoder.final_norm": False,
        "decoder.residual": "normalised", "loss.norm": "l1",
    },
    "projection, over-complete": {
        "corruption.name": "rop", "encoder.dictionary": "overcomplete", "encoder.expansion": 3, "encoder.lam": 0.02,
        "decoder.name": "linear", "loss.norm": "l1",
    },
    "projection with a scale": {"corruption.name": "rop", "corruption.paper_scale": 0.14, "encoder.expansion": 1,
                                "encoder.dictionary": "overcomplete", "encoder.lam": 0.02},
    "noise, norms, no positions": {
        "corruption.name": "noise", "encoder.embed_norm": True, "encoder.positions": "none", "encoder.final_eps": 1e-2,
        "loss.region": "all", "decoder.positions": True,
    },
    "mask token, whole loss": {"loss.region": "all", "encoder.patch_size": 2, "data.image_size": (10, 14)},
}  # fmt: skip


def config_of(name: str) -> ConfigDict:
    c = base()
    e, d = c.encoder, c.decoder
    c.data.image_size, e.patch_size, e.width, e.depth, e.heads, d.depth, d.heads = (20, 28), 4, 8, 3, 2, 2, 2
    c.data.mean, c.data.std = (0.5, 0.4, 0.3), (0.3, 0.2, 0.25)
    for key, value in VARIANTS[name].items():
        section, name = key.split(".")
        c[section][name] = value
    return c


@functools.cache
def params_of(name: str) -> dict:
    """Parameters of every shape that the variant has, drawn at random; no program is compiled for them."""
    c, rng = config_of(name), np.random.default_rng(0)
    shapes = names(jax.eval_shape(lambda: autoencoder.init_params(c, jax.random.key(0))))
    draw = {name: rng.standard_normal(s.shape, np.float32) for name, s in shapes.items()}
    return nest({n: (n.endswith("scale") + 0.3 * a).astype(np.float32) for n, a in draw.items()})


def exported(name: str, folder, parts=("encoder", "decoder")) -> tuple[ConfigDict, dict]:
    c = config_of(name)
    params = {part: tree for part, tree in params_of(name).items() if part in parts}
    export(c.to_dict(), params, "torch", folder)
    return c, params


# --- Without torch: what is in the folder.


def config_class() -> type:
    """CrateConfig and CHOICES, taken out of the file, which cannot be imported without torch."""

    def name(node: ast.stmt) -> str:
        return getattr(node, "name", ast.unparse(node.targets[0]) if isinstance(node, ast.Assign) else "")

    body = [node for node in TREE.body if name(node) in ("CHOICES", "CrateConfig")]
    scope = {"dataclasses": dataclasses, "__name__": __name__}
    exec(compile(ast.Module(body, []), MODELING.name, "exec"), scope)
    return scope["CrateConfig"]


@pytest.mark.parametrize("name", VARIANTS)
def test_the_folder_holds_code_config_and_weights(tmp_path, name):
    c, params = exported(name, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors", MODELING.name]
    assert (tmp_path / MODELING.name).read_bytes() == MODELING.read_bytes()
    about = json.loads((tmp_path / "config.json").read_text())
    written = config_class()(**about)  # every key is a field
    assert set(about) == {field.name for field in dataclasses.fields(written)}
    for field, key in KEYS.items():
        section, part = key.split(".")
        assert getattr(written, field) == c[section][part], field
    # The file has an attribute of each part of each tensor's name.
    assigned = {
        target.attr
        for node in ast.walk(TREE) if isinstance(node, ast.Assign)
        for target in ast.walk(node) if isinstance(target, ast.Attribute) and isinstance(target.ctx, ast.Store)
    }  # fmt: skip
    state = files.read(tmp_path)[0]
    parts = {part for tensor in state for part in tensor.split(".") if not part.isdigit()}
    assert parts - {"weight", "bias"} <= assigned
    assert sum(a.size for a in state.values()) == sum(a.size for a in names(params).values())


def test_new_configs_are_those_of_crate_mae():
    """The defaults of CrateConfig are the library's, so are its choices; it takes JSON's lists."""
    Config = config_class()
    assert dataclasses.asdict(Config()) == config_json(base(), {"encoder": {}, "decoder": {}})
    small = Config(image_size=[20, 28], patch_size=4)
    assert (small.image_size, small.grid) == ((20, 28), (5, 7))
    with pytest.raises(ValueError, match="model_type='vit': must be one of crate"):
        Config(model_type="vit")
    assert Config.from_dict({"width": 24}).width == 24
    with pytest.raises(ValueError, match="config.json: unknown field 'widht'"):
        Config.from_dict({"widht": 24, "width": 24})
    rules = {field: config.KEYS[key].rule.text for field, key in KEYS.items()}
    choices = Config.__post_init__.__globals__["CHOICES"]
    for field in choices.keys() - {"model_type", "positions"}:  # the encoder of CRATE has fewer kinds of positions
        ours = rules[field].removeprefix("must be one of ").split(", ")
        assert set(choices[field]) - ({"none"} if field == "decoder" else set()) == set(ours), field
    named = {field for field, rule in rules.items() if rule.startswith("must be one of ")}
    assert named == choices.keys() - {"model_type"}


def test_the_file_needs_torch_only():
    imported = [node for node in ast.walk(TREE) if isinstance(node, ast.Import | ast.ImportFrom)]
    roots = {n.module if isinstance(n, ast.ImportFrom) else n.names[0].name for n in imported}
    assert {root.split(".")[0] for root in roots} - set(sys.stdlib_module_names) == {"torch"}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_folder_that_torch_wrote_comes_back_with_the_same_bits(tmp_path, name):
    """Weights from `save_pretrained` do not have our metadata: config.json describes the model."""
    c, params = exported(name, tmp_path)
    files.write(tmp_path / "model.safetensors", files.read(tmp_path)[0], {"format": "pt"})
    back = pretrained.load(str(tmp_path), "config.checkpoint")
    again, expected = names(back.params), names(params)
    assert again.keys() == expected.keys()
    for array, value in expected.items():
        np.testing.assert_array_equal(again[array], value, err_msg=array)
    assert config_json(weights.model_config(back.config, back.params), back.params) == config_json(c, params)


def test_an_encoder_alone_has_no_decoder_and_perhaps_a_mask_token(tmp_path):
    c, params = exported("mask token, learned positions", tmp_path / "token", ["encoder"])
    flat = {n: array for n, array in names(params).items() if not n.endswith("mask_token")}
    export(c.to_dict(), nest({**flat, "head/kernel": np.ones((8, 3))}), "torch", tmp_path / "none")
    for folder, corruption in (("token", "mask"), ("none", "none")):
        about = json.loads((tmp_path / folder / "config.json").read_text())
        assert (about["decoder"], about["corruption"]) == ("none", corruption)
        state = files.read(tmp_path / folder)[0]
        assert ("encoder.embedding.mask_token" in state) == (folder == "token")
        files.write(tmp_path / folder / "model.safetensors", state, {"format": "pt"})
        assert pretrained.load(str(tmp_path / folder), "config.checkpoint").params.keys() == {"encoder"}


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({"heads": None}, "config.encoder.heads=None: must be a whole number"),
        ({"heads": 3}, "config.encoder.width=8: must be a multiple of config.encoder.heads=3"),
        ({"pool": 3}, "its config is damaged .TypeError: .*pool"),
        ({"dictionary": "none"}, "config.encoder.dictionary='none': must be one of complete, overcomplete"),
        ({"tied_output": True}, "decoder/blocks/mssa/output/bias: .*, not expected"),
        ({"positions": "x" * 10_000}, "config.encoder.positions='xxx.*xxx[.]{3}$"),
        ("heads", "the config.json beside it has no 'heads'"),
    ],
)
def test_a_wrong_config_beside_weights_of_torch_is_one_line(tmp_path, changed, line):
    exported("mask token, whole loss", tmp_path)
    files.write(tmp_path / "model.safetensors", files.read(tmp_path)[0], {"format": "pt"})
    about = json.loads((tmp_path / "config.json").read_text())
    about = {k: v for k, v in about.items() if k != changed} if isinstance(changed, str) else about | changed
    (tmp_path / "config.json").write_text(json.dumps(about))
    with pytest.raises(CheckpointError, match=line) as e:
        weights.load(tmp_path)
    assert "\n" not in str(e.value) and len(str(e.value)) < 3000


# --- With torch: the same numbers.


def torch_model(folder):
    """(torch, the exported file as a module, its model)."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed; it compares the exported model with ours")
    spec = importlib.util.spec_from_file_location("modeling_crate", folder / MODELING.name)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return torch, module, module.CrateModel.from_pretrained(folder)


def same_corruption(torch, module, c: ConfigDict, images: int):
    """One corruption, drawn by JAX, of both."""
    N, P = autoencoder.patch_numbers(c)
    noise = np.random.default_rng(1).uniform(size=(images, N)).astype(np.float32)
    drawn = sampler(c, N, P)(jax.random.split(jax.random.key(1), images))
    match drawn:
        case Noise():
            return drawn, module.Noise(torch.tensor(np.asarray(drawn.noise_BNP)))
        case Projection():
            bucket, sign = (torch.tensor(np.asarray(a)) for a in (drawn.bucket_BN, drawn.sign_BN))
            return drawn, module.Projection(bucket.long(), sign, drawn.scale_BK.shape[1], c.corruption.paper_scale)
        case Masking():
            ours = Masking.from_noise(jnp.asarray(noise), drawn.kept, drawn.drop, drawn.learned)
            return ours, module.Masking(torch.tensor(noise), drawn.kept, c.corruption.mask_fill)
    raise AssertionError(drawn)


def relative(theirs, ours) -> float:
    theirs, ours = theirs.detach().double().numpy(), np.asarray(ours, np.float64)
    assert theirs.shape == ours.shape
    return float(np.linalg.norm(theirs - ours) / np.linalg.norm(ours))


@pytest.mark.parametrize("name", VARIANTS)
def test_torch_computes_tokens_loss_and_gradients(tmp_path, name):
    """Tokens of clean and corrupted images, other image sizes, features, loss; gradients of all parameters."""
    c, params = exported(name, tmp_path)
    torch, module, model = torch_model(tmp_path)
    ours = autoencoder.build(c)
    images = np.random.default_rng(2).standard_normal((3, *c.data.image_size, 3), np.float32)
    corruption, theirs = same_corruption(torch, module, c, 3)
    pixels = torch.tensor(images.transpose(0, 3, 1, 2).copy())

    larger = np.concatenate([images[:, :-4], images[:, :-4]], axis=1)  # another number of rows

    @jax.jit
    def outputs(params, images, larger, corruption):
        def loss(params):
            predicted = ours.apply({"params": params}, images, corruption)
            target = reconstruction.target(patchify(images, c.encoder.patch_size), c)
            return reconstruction.loss(predicted, target, corruption, c)

        tokens, clean = (
            ours.apply({"params": params}, images, hidden, method="encode") for hidden in (corruption, CLEAN)
        )
        features = representation.pool(c)(clean), representation.build(c)(params, larger)
        predicted = reconstruction.predict(c, ours.apply, corruption, params, images)[1]
        return tokens, clean, *features, predicted, *jax.value_and_grad(loss)(params)

    with jax.default_matmul_precision("highest"):
        tokens, clean, pooled, other, predicted, value, gradients = outputs(params, images, larger, corruption)
    assert relative(model(pixels, theirs).tokens, tokens) <= 1e-5
    assert relative(model(pixels).tokens, clean) <= 1e-5
    assert relative(model(pixels).pooled, pooled) <= 1e-5
    assert relative(model.features(torch.tensor(larger.transpose(0, 3, 1, 2).copy())), other) <= 1e-5
    computed = model.loss(pixels, theirs)
    assert abs(computed.item() - float(value)) <= 1e-5 * abs(float(value))
    computed.backward()
    expected = export_state_dict(FAMILY, gradients, (5, 7))
    parameters = dict(model.named_parameters())
    assert parameters.keys() == expected.keys()
    for tensor, gradient in expected.items():
        assert relative(parameters[tensor].grad, gradient) <= 1e-4, tensor

    picture = model.reconstruct(pixels, theirs)
    assert relative(module.patchify(picture, c.encoder.patch_size), predicted) <= 1e-5

    brain = model.to(torch.bfloat16)(pixels, theirs).tokens
    assert brain.dtype == torch.bfloat16 and relative(brain, tokens) < 0.05


def test_torch_saves_what_both_read(tmp_path):
    """After a step of training in torch: its own reader, the safetensors library, and ours."""
    exported("dropped, transformer", tmp_path / "a")
    torch, module, model = torch_model(tmp_path / "a")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.25)
    model.save_pretrained(tmp_path / "b")
    import safetensors.torch

    library = safetensors.torch.load_file(tmp_path / "b" / "model.safetensors")
    again = module.CrateModel.from_pretrained(tmp_path / "b")
    assert again.config == model.config
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, library[name]) and torch.equal(tensor, again.state_dict()[name])
    state = export_state_dict(FAMILY, pretrained.load(str(tmp_path / "b"), "config.checkpoint").params, (5, 7))
    for name, tensor in model.state_dict().items():
        np.testing.assert_array_equal(tensor.numpy(), state[name])
    assert (tmp_path / "b" / MODELING.name).read_bytes() == MODELING.read_bytes()
    model.to(torch.bfloat16).save_pretrained(tmp_path / "b")
    np.testing.assert_array_equal(
        files.read(tmp_path / "b")[0]["decoder.head.weight"].astype(np.float32),
        model.decoder.head.weight.detach().float().numpy(),
    )


@pytest.mark.parametrize("name", ["dropped, transformer", "projection, over-complete", "noise, norms, no positions"])
def test_a_new_model_starts_as_ours_does(tmp_path, name):
    """The same constants, and the same deviation and range of what is drawn."""
    exported(name, tmp_path)
    torch, module, model = torch_model(tmp_path)
    c = config_of(name)
    c.encoder.width, c.decoder.width = 48, 0 if c.decoder.name != "transformer" else 36
    params = jax.jit(lambda: autoencoder.init_params(c, jax.random.key(0)))()
    expected = export_state_dict(FAMILY, params, (5, 7))
    torch.manual_seed(0)
    new = module.CrateModel(module.CrateConfig(**config_json(c, params)))
    for tensor, value in new.state_dict().items():
        value, ours = value.numpy(), expected[tensor]
        assert value.shape == ours.shape, tensor
        if ours.std() == 0:
            np.testing.assert_array_equal(value, ours, err_msg=tensor)
        elif ours.size > 1000:
            assert value.std() == pytest.approx(ours.std(), rel=0.1), tensor
            assert np.abs(value).max() == pytest.approx(np.abs(ours).max(), rel=0.25), tensor
    assert sum(p.std() > 0 for p in new.parameters()) == sum(a.std() > 0 for a in expected.values())


@pytest.mark.parametrize("buckets", ["balanced", "independent"])
@pytest.mark.parametrize("signs", ["balanced", "independent"])
def test_torch_draws_projections(tmp_path, buckets, signs):
    """P = P^T = P^2; buckets and signs are balanced where the config says so; every patch is treated alike."""
    exported("projection with a scale", tmp_path)
    torch, module, model = torch_model(tmp_path)
    model.config.rop_buckets, model.config.rop_signs, model.config.paper_scale = buckets, signs, 0.0
    drawn = model.draw(torch.zeros(2000, 3, 20, 28), torch.Generator().manual_seed(0))
    P = drawn.project(torch.eye(35).expand(2000, -1, -1))
    torch.testing.assert_close(P @ P, P)
    torch.testing.assert_close(P, P.transpose(1, 2))
    counts = torch.nn.functional.one_hot(drawn.bucket_BN1[..., 0], 5).sum(1)
    assert bool((counts == 7).all()) == (buckets == "balanced")
    signs_sum = drawn.sign_BN1[..., 0].sum(1)
    assert bool((signs_sum.abs() == 1).all()) == (signs == "balanced") and signs_sum.mean().abs() < 0.5
    diagonal = P.mean(0).diagonal()
    assert (diagonal - diagonal.mean()).abs().max() < 0.02
    model.config.rop_ratio = 0.225  # eight buckets: a run of eight is cut to three
    drawn = model.draw(torch.zeros(4000, 3, 20, 28), torch.Generator().manual_seed(0))
    diagonal = drawn.project(torch.eye(35).expand(4000, -1, -1)).mean(0).diagonal()
    assert (diagonal - diagonal.mean()).abs().max() < 0.02


def test_torch_draws_masks_noise_and_nothing(tmp_path):
    exported("mask token, whole loss", tmp_path)
    torch, module, model = torch_model(tmp_path)
    images = torch.zeros(2000, 3, 10, 14)
    drawn = model.draw(images)
    assert (drawn.removed_BN1.sum(1) == 35 - 8).all() and drawn.share == pytest.approx(27 / 35)
    assert (drawn.removed_BN1.float().mean(0) - 27 / 35).abs().max() < 0.05
    model.config.corruption = "noise"
    noise = model.draw(images).noise_BNP
    assert noise.shape == (2000, 35, 12) and noise.std() == pytest.approx(0.5, rel=0.02)
    model.config.corruption = "none"
    assert type(model.draw(images)) is module.Corruption
    encoder_only = module.CrateModel(dataclasses.replace(model.config, decoder="none"))
    with pytest.raises(ValueError, match="no decoder"):
        encoder_only.loss(images[:1])
    with pytest.raises(ValueError, match="no mask token for fill='token'"):
        encoder_only(images[:1], module.Masking(torch.rand(1, 35), 8))


def test_torch_shows_attention_and_preprocesses(tmp_path):
    exported("mask token, whole loss", tmp_path)
    torch, module, model = torch_model(tmp_path)
    pixels = torch.randn(2, 3, 10, 14, generator=torch.Generator().manual_seed(0))
    weights_BHNN = model.attention(pixels, 1)
    assert torch.equal(model.attention(pixels), model.attention(pixels, max(len(model.encoder.blocks) - 2, 0)))
    one = module.CrateModel(dataclasses.replace(model.config, depth=1))
    assert torch.equal(one.attention(pixels), one.attention(pixels, 0))  # there is no last block but one
    block, z = model.encoder.blocks[1], None

    def keep(module, inputs, output):
        nonlocal z
        z = inputs[0]

    block.mssa.register_forward_hook(keep)
    model(pixels)
    averaged = (weights_BHNN @ block.mssa.project(z)).transpose(1, 2).flatten(2)
    torch.testing.assert_close(block.mssa.output(averaged), block.mssa(z))

    rng = np.random.default_rng(0)
    image = np.asarray(Image.fromarray(rng.integers(0, 256, (8, 12, 3), np.uint8)).resize((96, 64), Image.BICUBIC))
    with pytest.raises(ValueError, match="pool='max': must be one of cls, mean, cls_mean"):
        model.features(pixels, "max")
    model.config.image_size = (28, 28)
    box = central_box(64, 96, (28, 28), 0.875)
    ours = np.asarray(decoding.crop_resize(Image.fromarray(image), box, (28, 28), Image.Resampling.BICUBIC), np.float32)
    theirs = model.preprocess(torch.tensor(image.transpose(2, 0, 1).copy())[None])[0].permute(1, 2, 0)
    theirs = 255 * (theirs * torch.tensor(model.config.std) + torch.tensor(model.config.mean))
    difference = np.abs(theirs.numpy() - ours)
    assert difference.mean() < 0.5 and difference.max() < 4
    batch = model.preprocess(torch.tensor(image.transpose(2, 0, 1).copy())[None])
    flipped = image[::-1].copy()[::-1]  # the same numbers, with a negative stride
    for one in (Image.fromarray(image), image, flipped, image[None], torch.tensor(image.transpose(2, 0, 1).copy())):
        assert torch.equal(model.preprocess(one), batch)
    with pytest.raises(ValueError, match="uint8"):
        model.preprocess(torch.zeros(1, 3, 64, 96))
    with pytest.raises(ValueError, match=r"not \(64, 96\)"):
        model.preprocess(image[..., 0])

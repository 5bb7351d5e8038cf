"""The Python API: what is public, its page, the images it takes, and the functions below that it must agree with."""

from __future__ import annotations

import doctest
import functools
import importlib
import json
import re
import shutil
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image
from sklearn.datasets import load_sample_images

import crate_jax
from crate_jax import api, data, jobs
from crate_jax.analysis.whitebox import measures
from crate_jax.convert import files, weights
from crate_jax.data import given
from crate_jax.data.pixels import normalise
from crate_jax.errors import CheckpointError, ConfigError, DataError
from crate_jax.methods.reconstruction import reconstruct
from crate_jax.models import autoencoder, corruption, representation
from tests.conftest import ROOT

pytestmark = pytest.mark.one_python

RNG = np.random.default_rng(3)
IMAGES = RNG.integers(0, 256, (5, 20, 28, 3), np.uint8)


@pytest.fixture(scope="module")
def page(tmp_path_factory, one_device):
    """The folder in which the examples of docs/api.md have run, and their failures, as text."""
    folder = tmp_path_factory.mktemp("api")
    told: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        text = (ROOT / "docs" / "api.md").read_text()
        test = doctest.DocTestParser().get_doctest(text, {}, "api.md", "docs/api.md", 0)
        results = doctest.DocTestRunner(verbose=False).run(test, out=told.append)
    return folder, results, "".join(told)


@pytest.fixture(scope="module")
def encoder(page):
    """The encoder of the page's run."""
    return crate_jax.load(page[0] / "runs" / "first")


def test_the_examples_of_the_page_hold(page):
    assert page[1].attempted > 20 and not page[1].failed, page[2]


def test_the_page_names_what_there_is():
    rows = re.findall(r"`(crate_jax\.[\w.]+)(?:: ([\w, ]+))?`", (ROOT / "docs" / "api.md").read_text())
    assert len(rows) > 7
    for module, names in rows:
        for name in filter(None, names.split(", ")):
            assert hasattr(importlib.import_module(module), name), (module, name)


def test_the_notebook_runs(page, monkeypatch):
    """Its cells in order, with the tiny form of its config: that of the page's run, which is not trained again."""
    cells = json.loads((ROOT / "docs" / "tour.ipynb").read_text())["cells"]
    cells = [cell for cell in cells if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] for cell in cells), "clear the outputs before you commit"
    text = "\n".join("".join(cell["source"]) for cell in cells)
    tiny = 'get_config("quickstart:debug", {"steps": 3, "log.report": False, "log.pictures": 0})'
    whole_run = 'get_config("quickstart:method=vibcreg", {"steps": 200})'
    for whole, small in ((whole_run, tiny), ("runs/tour", "runs/first")):
        assert whole in text
        text = text.replace(whole, small)
    shown: list[int] = []
    monkeypatch.chdir(page[0])
    monkeypatch.setattr(plt, "show", lambda: shown.append(plt.gcf().number))
    told: dict = {}
    with plt.ioff():
        exec(compile(text, "tour.ipynb", "exec"), told)
    plt.close("all")
    assert len(shown) == 4 and told["features"].shape == (48, 64)
    assert told["crate"].config.encoder.name == "crate" and told["rates"].shape == (12, 4)


# The modules that docs/api.md offers alone, or docs/reference.rst shows, and their public names.
ALONE = {
    "models": {"build_encoder"},
    "models.crate": {"norm_mssa", "ista", "ista_overcomplete"},
    "models.corruption": {"Corruption", "Masking", "Projection", "Noise", "sampler"},
    "models.representation": {"build", "layers", "points", "block_maps", "init_params"},
    "methods": {"METHODS"},
    "training.orthogonality": {"Penalty", "build", "frobenius_squared", "spectral_norm"},
    "evals": {"evaluate"},
    "evals.spectra": {"Measures", "entropy_rank", "measure_features"},
    "analysis.whitebox.measures": {"coding_rate", "subspace_rate", "incoherence"},
    "analysis.alignment.moments": {"Moments", "of_images"},
    "analysis.alignment.closed_form": {"Aligner", "Curve", "Optimum", "theorem1"},
}
# The reference shows what the methods of the table are made of, in place of the table.
ELSEWHERE = {"methods": {"method.Method", "reconstruction.loss", "joint.Algorithm"}}


def listed() -> dict[str, set[str]]:
    """Module -> the names that docs/reference.rst shows of it; a name with its module's is of the module ALONE."""
    found: dict[str, set[str]] = {}
    module = ""
    for kind, name in re.findall(r"^\.\. ([\w:]+):: (.*)", (ROOT / "docs" / "reference.rst").read_text(), re.MULTILINE):
        if kind == "currentmodule":
            module = name
        elif kind.startswith("auto") or kind == "py:data":
            whole = f"{module}.{name}" if "." not in name else name
            home = max(
                (f"crate_jax.{m}" for m in (*ALONE, "api") if whole.startswith(f"crate_jax.{m}.")),
                key=len,
                default="crate_jax.api",
            )
            found.setdefault(home, set()).add(whole.removeprefix(f"{home}.").removeprefix("crate_jax.errors."))
    return found


def test_what_is_public():
    """Whoever adds or removes a name decides it here."""
    of_package = ["Encoder", "Images", "Reconstruction", "UserError", "get_config", "list_configs", "load", "pretrain"]
    assert crate_jax.__all__ == api.__all__ == of_package
    assert {name: set(importlib.import_module(f"crate_jax.{name}").__all__) for name in ALONE} == ALONE
    assert {f"crate_jax.{name}" for name in ALONE} == set(shown := listed()) - {"crate_jax.api"}
    assert {name: shown[f"crate_jax.{name}"] for name in ALONE} == ALONE | ELSEWHERE
    assert shown["crate_jax.api"] == set(of_package)
    public = {name for name in vars(crate_jax.Encoder) if not name.startswith("_")}
    of_images = {"features", "tokens", "attention", "coding_rate", "predict", "reconstruct"}
    assert public == {"config", "untrained", "paths"} | of_images
    assert set(crate_jax.__all__) <= set(dir(crate_jax))
    assert all(getattr(crate_jax, name).__doc__ for name in crate_jax.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nonesuch'"):
        crate_jax.nonesuch  # noqa: B018


def test_without_a_workdir_each_run_has_a_new_folder(tmp_path, monkeypatch):
    """Of two runs within a second, too; an error names the folder; a config that is wrong leaves none."""

    def run(config, workdir):
        assert not any(Path(workdir).iterdir())
        (Path(workdir) / "state").write_text(workdir)
        if config.seed:
            raise KeyboardInterrupt
        return {"steps": 3}

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(api.time, "strftime", lambda form: "now")
    monkeypatch.setitem(jobs.JOBS, "pretrain", types.SimpleNamespace(run=run))
    with pytest.raises(ConfigError, match="config.batch_size"):
        crate_jax.pretrain(crate_jax.get_config("quickstart", {"batch_size": 12, "accumulate": 5}))
    assert not any(tmp_path.iterdir())
    folders = [str(tmp_path / "runs" / name) for name in ("now", "now_2", "now_3")]
    assert [crate_jax.pretrain("quickstart:debug") for _ in "12"] == [{"steps": 3, "workdir": f} for f in folders[:2]]
    with pytest.raises(KeyboardInterrupt) as stopped:
        crate_jax.pretrain(crate_jax.get_config("quickstart:debug", {"seed": 1}))
    assert stopped.value.__notes__ == [f"workdir: {folders[2]}"]
    assert all((Path(folder) / "state").read_text() == folder for folder in folders)
    monkeypatch.setattr(api.distributed, "processes", lambda: 2)
    with pytest.raises(ConfigError, match="workdir is missing"):
        crate_jax.pretrain("quickstart:debug")
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").rename("others")
    (tmp_path / "runs").touch()
    with pytest.raises(crate_jax.UserError, match="no folder can be created"):
        crate_jax.pretrain("quickstart:debug")


def test_the_model_in_the_package_completes_photographs(tmp_path, monkeypatch):
    """It was trained on other images; photographs of 32 px are restored to a quarter of the error of a grey fill."""
    folder = files.BUNDLED / "cifar10_crate"
    assert sum(p.stat().st_size for p in folder.iterdir()) < 2_000_000
    photos = load_sample_images().images
    crops = np.stack([p[y : y + 96, x : x + 96] for p in photos for y in (0, 130, 260) for x in (0, 220, 440)])
    trained = crate_jax.load("cifar10_crate")
    assert trained.config.encoder.name == "crate" and trained.features(crops).shape == (18, 128)
    found = trained.reconstruct(crops)
    error = {name: np.mean((found.original - getattr(found, name)) ** 2) for name in ("corrupted", "completed")}
    assert error["completed"] < error["corrupted"] / 4
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cifar10_crate").mkdir()  # a folder of the user's goes first
    with pytest.raises(crate_jax.UserError, match="cifar10_crate"):
        crate_jax.load("cifar10_crate")


def test_features_are_those_of_the_evaluation(encoder):
    """Of the run's own transform and pooling, row by row, whatever number is encoded at once."""
    c = encoder.config
    assert c.evaluation.pool == "mean"  # the run's; the default is cls
    pixels = data.eval_images(c, given.source(IMAGES, 3), np.arange(5))[0]
    want = representation.build(c)(encoder.params, normalise(jnp.asarray(pixels), c))
    found = encoder.features(IMAGES)
    np.testing.assert_allclose(found, want, atol=2e-5)
    small = crate_jax.Encoder(encoder.name, c, encoder.params, batch_size=1)  # one row per device
    np.testing.assert_allclose(small.features(np.concatenate([IMAGES] * 3)), np.concatenate([found] * 3), atol=2e-5)
    tokens = encoder.tokens(IMAGES)
    np.testing.assert_allclose(encoder.features(IMAGES, pool="cls"), tokens[:, 0], atol=2e-5)
    np.testing.assert_allclose(encoder.features(IMAGES, pool="mean"), tokens[:, 1:].mean(1), atol=2e-5)
    first = encoder.tokens(IMAGES, layer=1)
    np.testing.assert_allclose(encoder.features(IMAGES, pool="cls", layer=1), first[:, 0], atol=2e-5)
    assert np.abs(first - tokens).max() > 0.1


def test_all_forms_of_images_are_the_same_images(encoder, tmp_path):
    want = encoder.features(IMAGES)
    pictures = [Image.fromarray(x) for x in IMAGES]
    for i in (3, 1, 0, 4, 2):
        pictures[i].save(tmp_path / f"{i}.png")
    paths = [tmp_path / f"{i}.png" for i in range(5)]
    opened = [Image.open(path) for path in paths]
    mixed = [IMAGES[0], pictures[1], str(paths[2]), paths[3], opened[4]]
    for images in (list(IMAGES), pictures, tmp_path, str(tmp_path), opened, mixed, jnp.asarray(IMAGES)):
        np.testing.assert_array_equal(encoder.features(images), want)
    assert encoder.paths(tmp_path) == [str(path) for path in paths]
    assert encoder.paths(mixed) == ["images[0]", "images[1]", str(paths[2]), str(paths[3]), "images[4]"]
    for image in (IMAGES[2], pictures[2], paths[2]):
        np.testing.assert_allclose(encoder.features(image), want[2:3], atol=2e-5)
    sizes = [IMAGES[0], IMAGES[1].transpose(1, 0, 2), IMAGES[2, :11]]
    for row, image in zip(encoder.features(sizes), sizes, strict=True):
        np.testing.assert_allclose(row, encoder.features(image)[0], atol=2e-5)


def test_arrays_have_the_layouts_of_npz_files(encoder, tmp_path):
    """Grey images are the same as those of PIL; seen: only (n, H, W, 3) was taken."""
    grey = IMAGES[..., 0]
    want = encoder.features([Image.fromarray(x) for x in grey])
    np.testing.assert_array_equal(want, encoder.features(np.repeat(grey[..., None], 3, -1)))
    for images in (grey, grey[..., None], grey[:, None], list(grey), list(grey[..., None]), jnp.asarray(grey)):
        np.testing.assert_array_equal(encoder.features(images), want)
    first = IMAGES.transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(encoder.features(first), encoder.features(IMAGES))
    np.testing.assert_array_equal(encoder.features(list(first)), encoder.features(IMAGES))
    for name, images in (("grey", grey), ("last", grey[..., None]), ("first", first)):
        np.savez(tmp_path / f"{name}.npz", images=images)
        c = ConfigDict(encoder.config.to_dict())
        c.data.source = f"npz:{tmp_path / name}.npz"
        np.testing.assert_array_equal(encoder.features(data.open_split(c, "train")), encoder.features(images))


def test_a_shape_that_may_be_two_things_is_what_it_was(encoder):
    """The channels come last where both may be; (H, W, 3) is one image."""
    small = IMAGES[:, :3, :3]
    np.testing.assert_array_equal(encoder.features(small), encoder.features([Image.fromarray(x) for x in small]))
    low = IMAGES[:, :3]
    np.testing.assert_array_equal(encoder.features(low), encoder.features([Image.fromarray(x) for x in low]))
    assert encoder.features(IMAGES[0]).shape == encoder.features(IMAGES[0, :3]).shape == (1, 64)
    assert encoder.features(small[0]).shape == (1, 64)


def test_attention_rates_and_pictures(encoder):
    attention = encoder.attention(IMAGES, layer=2)
    np.testing.assert_allclose(attention.sum((2, 3)), 1.0, rtol=1e-5)
    assert np.abs(attention - encoder.attention(IMAGES)).max() > 1e-4  # the last block but one is the first of two
    np.testing.assert_array_equal(encoder.attention(IMAGES), encoder.attention(IMAGES, layer=1))
    with pytest.raises(ConfigError, match="layer=0: the output has no attention"):
        encoder.attention(IMAGES, layer=0)
    c, pictures = encoder.config, encoder.reconstruct(IMAGES, seed=4)
    pixels = data.eval_images(c, given.source(IMAGES, 3), np.arange(5))[0]
    points = representation.points(c)(encoder.params, normalise(jnp.asarray(pixels), c))[1]["after_mssa"][:, :, 1:]
    whole, parts = encoder.coding_rate(IMAGES), encoder.coding_rate(IMAGES, subspaces=True)
    np.testing.assert_allclose(whole[:, 1], measures.coding_rate(points[1]), rtol=1e-4)
    assert whole.shape == parts.shape == (5, 2) and np.abs(whole - parts).min() > 1e-2
    drawn = corruption.sampler(c, *autoencoder.patch_numbers(c))(jax.random.split(jax.random.key(4), 5))
    draw = functools.partial(reconstruct, c, autoencoder.build(c).apply)
    for found, want in zip(pictures, draw(drawn, encoder.params, normalise(jnp.asarray(pixels), c)), strict=True):
        np.testing.assert_allclose(found, want, atol=2e-5)
    compiled = dict(encoder._compiled)
    assert np.abs(pictures.corrupted - encoder.reconstruct(IMAGES, seed=5).corrupted).max() > 0.1
    assert encoder._compiled == compiled  # the seed is an argument of the compiled function


def test_other_parameters_give_other_features(encoder):
    """Whether the whole tree is replaced or one of its arrays."""
    mine = crate_jax.Encoder("mine", encoder.config, jax.tree.map(lambda x: x, encoder.params))
    first = mine.features(IMAGES)
    mine.params["encoder"]["norm"]["scale"] = 3 * mine.params["encoder"]["norm"]["scale"]
    assert np.abs(mine.features(IMAGES) - first).max() > 0.1
    mine.params = encoder.params
    np.testing.assert_array_equal(mine.features(IMAGES), first)


def test_a_config_cannot_change_under_the_compiled_programs(encoder):
    """Else `features` would go on with the old one; a copy makes another encoder."""
    with pytest.raises(AttributeError, match="immutable"):
        encoder.config.data.std = (1.0, 1.0, 1.0)
    with pytest.raises(AttributeError, match="config"):
        encoder.config = encoder.config
    mine = ConfigDict(encoder.config.to_dict())
    other = crate_jax.Encoder("mine", mine, encoder.params)
    mine.data.std = (1.0, 1.0, 1.0)  # too late for `other`
    np.testing.assert_array_equal(other.features(IMAGES), encoder.features(IMAGES))
    changed = crate_jax.Encoder("mine", mine, encoder.params)
    assert np.abs(changed.features(IMAGES) - encoder.features(IMAGES)).max() > 0.1
    assert crate_jax.Encoder.untrained(encoder.config).config == encoder.config


def test_weights_of_a_file(encoder, tmp_path):
    weights.save(tmp_path / "mine.safetensors", encoder.config.to_dict(), {"encoder": encoder.params["encoder"]})
    loaded = crate_jax.load(tmp_path / "mine.safetensors")
    np.testing.assert_array_equal(loaded.features(IMAGES), encoder.features(IMAGES))
    with pytest.raises(ConfigError, match="has no decoder"):
        loaded.reconstruct(IMAGES)
    for wrong in ({"pool": 3}, 3):
        config = encoder.config.to_dict() | {"evaluation": wrong}
        weights.save(tmp_path / "wrong", config, {"encoder": encoder.params["encoder"]})
        with pytest.raises(CheckpointError, match="its config is damaged"):
            crate_jax.load(tmp_path / "wrong")
    shutil.copy(tmp_path / "mine.safetensors", tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="several files of weights"):
        crate_jax.load(tmp_path)


def test_a_resnet_has_a_mean_and_no_attention(tmp_path):
    c = crate_jax.get_config("cifar10:encoder=resnet18,debug", {"evaluation.pool": "cls"})
    shapes = jax.eval_shape(lambda: representation.init_params(c, jax.random.key(0)))
    params = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes)
    weights.save(tmp_path / "resnet.safetensors", c.to_dict(), params)
    encoder = crate_jax.load(tmp_path / "resnet.safetensors")
    assert encoder.config.evaluation.pool == "mean"
    for wrong in (encoder.attention, encoder.coding_rate):
        with pytest.raises(ConfigError, match="^resnet18 has no"):
            wrong(IMAGES)
    with pytest.raises(ConfigError, match="^pool='cls': resnet18 has no class token; set it to mean"):
        encoder.features(IMAGES, pool="cls")


NO_IMAGES = "must be uint8"


@pytest.mark.parametrize(
    ("images", "options", "error", "message"),
    [
        (IMAGES / 255.0, {}, DataError, rf"images: float64 \(5, 20, 28, 3\): {NO_IMAGES}"),
        (IMAGES[..., :2], {}, DataError, rf"images: uint8 \(5, 20, 28, 2\): {NO_IMAGES}"),
        (IMAGES[:, :3, :, :1], {}, DataError, rf"images: uint8 \(5, 3, 28, 1\): {NO_IMAGES}"),
        (IMAGES[0, ..., :1], {}, DataError, r"images: uint8 \(20, 28, 1\): may be one image or several; give one"),
        (
            IMAGES[0].transpose(2, 0, 1),
            {},
            DataError,
            r"uint8 \(3, 20, 28\): may be one image or several",
        ),
        (IMAGES[0, ..., 0], {}, DataError, rf"images: uint8 \(20, 28\): {NO_IMAGES}"),
        (IMAGES[..., 0] / 255.0, {}, DataError, rf"images: float64 \(5, 20, 28\): {NO_IMAGES}"),
        ([IMAGES], {}, DataError, rf"images\[0\]: uint8 \(5, 20, 28, 3\): {NO_IMAGES}"),
        (IMAGES[:0], {}, DataError, "images: there are none"),
        ([IMAGES[0], 7], {}, DataError, rf"images\[1\]: {NO_IMAGES}.*, not int"),
        (7, {}, DataError, f"images: {NO_IMAGES}.*, not int"),
        ("nonesuch", {}, DataError, "nonesuch: cannot be read"),
        # 1 of 151: a run would go on without it
        (
            [IMAGES[0]] * 150 + [__file__],
            {},
            DataError,
            r"^1 of 151 images cannot be decoded; repair them, or leave them out: \S*test_api.py .not an image in a",
        ),
        (IMAGES, {"pool": "max"}, ConfigError, "^pool='max': must be one of cls, mean, cls_mean"),
        (IMAGES, {"layer": 3}, ConfigError, "^layer=3: the encoder has 2 blocks"),
        (IMAGES, {"layer": "last"}, ConfigError, "^layer='last': must be a whole number"),
    ],
)
def test_wrong_images_and_options_are_one_line(encoder, images, options, error, message):
    with pytest.raises(error, match=message) as told:
        encoder.features(images, **options)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("nonesuch", {}, "nonesuch: no such file; this library's configs are align, cifar10"),
        ("quickstart:colour=red", {}, "unknown key 'colour'"),
        ("quickstart", {"encoder.widht": 3}, "no key 'encoder.widht'; did you mean encoder.width"),
        ("quickstart", {"encoder.width": "wide"}, "config.encoder.width='wide': must be a whole number"),
        ("quickstart", {"encoder.width": -3}, "config.encoder.width=-3: must be greater than 0"),
        ("quickstart", {"data.image_size": ("a", 3)}, "config.data.image_size=.*: must hold whole numbers only"),
        ("c.py:c.steps = 'many'", {}, "c.py, line 4: TypeError: Could not override field 'steps'"),
        ("c.py:c.encoder.widht = 3", {}, "c.py, line 4: AttributeError: Key .widht. .* Did you mean .width."),
        ("c.py:c.data.image_size = ('a', 3)", {}, "config.data.image_size=.*: must hold whole numbers only"),
        ("c.py:c.steps = (", {}, "c.py, line 4: SyntaxError"),
        ("c.py:'\x00'", {}, "c.py.*: .*null bytes"),
    ],
)
def test_wrong_configs_are_one_line(name, overrides, message, tmp_path, monkeypatch):
    if name.startswith("c.py"):
        monkeypatch.chdir(tmp_path)
        lines = (
            "from crate_jax.config import base",
            "def get_config():",
            "    c = base()",
            "    " + name[5:],
            "    return c",
        )
        (tmp_path / "c.py").write_text("\n".join(lines))
        name = "c.py"
    with pytest.raises(ConfigError, match=message) as told:
        crate_jax.get_config(name, overrides)
    assert "\n" not in str(told.value)


def test_arguments_of_another_type_are_one_line(encoder, tmp_path):
    """A path is as good as a text wherever the command line takes a path."""
    file = tmp_path / "x.py"
    file.write_text(
        "from configs.quickstart import get_config as other\n\n\ndef get_config():\n    return other('debug')"
    )
    assert crate_jax.get_config(file) == crate_jax.get_config(str(file)) == crate_jax.get_config("quickstart:debug")
    for call, line in (
        (lambda: crate_jax.get_config(3), "name=3: must be a text or a path, not int"),
        (
            lambda: crate_jax.get_config("quickstart", {1: 2}),
            "overrides={1: 2}: must be a dictionary with names of keys",
        ),
        (lambda: crate_jax.get_config("quickstart", ["a"]), "overrides=['a']: must be a dictionary with names of keys"),
        (lambda: crate_jax.load(None), "path=None: must be a text or a path, not NoneType"),
        (lambda: crate_jax.load(b"mae"), "path=b'mae': must be a text or a path, not bytes"),
        (lambda: crate_jax.Encoder.untrained(None), "config=None: must be a text or a path, not NoneType"),
        (lambda: crate_jax.pretrain(file, 7), "workdir=7: must be a text or a path, not int"),
        (lambda: crate_jax.Encoder("mine", encoder.config, encoder.params, 0), "batch_size=0: must be a whole number"),
        (lambda: crate_jax.Encoder("mine", encoder.config, encoder.params, 2.5), "batch_size=2.5: must be a whole"),
    ):
        with pytest.raises(ConfigError, match=re.escape(line)) as told:
            call()
        assert "\n" not in str(told.value)


def test_a_config_gets_the_values_and_only_pretrain_trains(tmp_path):
    c = crate_jax.get_config(
        "cifar10:encoder=vit", {"data.image_size": [16, 24], "steps": np.int64(9), "optimizer.lr": 1}
    )
    assert (c.data.image_size, c.steps, c.optimizer.lr) == ((16, 24), 9, 1.0)
    assert crate_jax.get_config("cifar10", {"data.image_size": 24}).data.image_size == (24,)  # `validate` makes it two
    with pytest.raises(ConfigError, match="config.job='report': must be pretrain; crate-jax report"):
        crate_jax.pretrain("report", tmp_path)

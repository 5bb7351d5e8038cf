"""Every file in configs/ loads, fits together and builds; bad values get one clear line."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import jax
import pytest

from crate_jax import config as configs
from crate_jax.config import validate
from crate_jax.config_files import parse_arg
from crate_jax.convert.pretrained import Pretrained
from crate_jax.errors import ConfigError
from crate_jax.evals.protocols import PROTOCOLS
from crate_jax.jobs import evaluate, finetune
from crate_jax.methods import METHODS
from crate_jax.training import optimizer, orthogonality
from crate_jax.validation import changed_keys, check_types, check_values, flatten
from tests.parity_joint import Source

NAMES = sorted(p.stem for p in (Path(__file__).parent.parent / "configs").glob("*.py") if p.stem != "__init__")
ARGUMENTS = {
    "quickstart": ["", "penalty=so", "penalty=srip", "method=vibcreg", "method=dino,penalty=so"],
    "crate_mae": ["", "variant=Ti", "variant=S", "variant=L", "penalty=srip"],
    "vit_mae": ["", "variant=S", "variant=L", "penalty=so"],
    "rop_vitb": ["", "variant=Ti", "variant=S", "encoder=crate", "variant=Ti,encoder=crate", "penalty=srip"],
    "cifar10": [f"encoder={e},corruption={k}" for e in ("crate", "vit") for k in ("mask", "rop", "noise", "none")]
    + ["penalty=so", "encoder=vit,penalty=srip"],
    "joint": [
        "",
        *(f"method={name}" for name in ("dino", "mocov3", "swav", "wmse", "all4one", "deepclusterv2", "vibcreg")),
        "method=mocov2plus,encoder=resnet50,data=imagenet,penalty=so",
        "method=barlow_twins,data=imagenet",
        "method=mocov3,encoder=vit_tiny,data=imagenet100",
        "method=dino,encoder=vit_tiny,penalty=srip",
        "method=byol,encoder=crate_tiny",
        "method=swav,views=multicrop_cifar",
        "method=simsiam,scale=thin",
    ],
    "joint_lightly": ["", "penalty=so"],
    "photos": [
        "",
        "size=32,encoder=crate,corruption=rop,penalty=so",
        "size=96,encoder=resnet18,method=reconstruction",
        "size=224,corruption=noise",
        "method=simclr,encoder=crate",
        "method=swav,size=32,penalty=srip",
    ],
    "sweep": [
        "",
        "over=lam,base=crate_mae,variant=S",
        "over=rop_ratio",
        "over=rop_ratio,base=rop_vitb,encoder=crate",
        "over=penalty,base=vit_mae",
        "over=gamma,base=joint,method=dino",
        "over=penalty,penalty=srip,seeds=2",
        "base=quickstart",
    ],
}
OF_A_CHECKPOINT = ("evaluate", "segment", "align", "report")  # sizes are those of the checkpoint they are given


def load(name: str, arg: str = ""):
    return importlib.import_module(f"configs.{name}").get_config(arg)


# What these add to the others is in the configs of their methods, which train in tests/methods, and in one other row.
SLOW = {
    "cifar10": [f"encoder={e},corruption={k}" for e, k in (("crate", "rop"), ("crate", "none"), ("vit", "mask"))],
    "joint": ["method=mocov3", "method=swav", "method=barlow_twins,data=imagenet", "method=simsiam,scale=thin"],
    "joint_lightly": ["penalty=so"],
}


def checked(name, arg):
    c = load(name, arg)
    validate(c)
    assert flatten(c).keys() == flatten(configs.base()).keys()
    json.dumps(c.to_dict())
    return c


@pytest.mark.one_python
@pytest.mark.parametrize(
    ("name", "arg"),
    [
        pytest.param(n, a, marks=pytest.mark.slow if a in SLOW.get(n, ()) else ())
        for n in NAMES
        if n not in OF_A_CHECKPOINT
        for a in (*ARGUMENTS[n], f"{ARGUMENTS[n][0]},debug".strip(","))
    ],
)
def test_config_builds(name, arg):
    """Valid, no key outside the base config, and model, penalty and optimiser fit by their shapes.

    The models of `debug` are smaller, and otherwise those without it: one is built, the others are valid.
    """
    c = checked(name, arg)
    if "debug" not in arg:
        checked(name, f"{arg},debug".strip(","))
    method = METHODS[c.method].build(c, Source(100_000))
    shapes = jax.eval_shape(lambda: method.init(jax.random.key(0), lambda drawn: drawn)[0])
    optimizer.build(c, shapes, c.steps or 100_000, 100.0, held=method.held)
    assert bool(orthogonality.build(c, shapes).names) == (c.penalty.name != "none")


def test_vits_of_joint_embedding_are_those_of_solo_learn():
    """MoCo v3's are those of its code, the others timm's; DINO's ViT file has one temperature from the start on."""
    c = load("joint", "method=mocov3,encoder=vit_small,data=imagenet100")
    assert (c.encoder.heads, c.encoder.positions, c.encoder.init) == (12, "sincos", "mocov3")
    c = load("joint", "method=dino,encoder=vit_small,data=imagenet100")
    assert (c.encoder.heads, c.encoder.positions, c.encoder.init, c.dino.warm_epochs) == (6, "learned", "timm", 0)
    assert load("joint", "method=dino,data=imagenet100").dino.warm_epochs == 50
    rates = {m: load("joint", f"method={m},data=imagenet").online.lr for m in ("byol", "mocov2plus", "barlow_twins")}
    assert rates == {"byol": 0.2, "mocov2plus": 0.4, "barlow_twins": 0.1}


@pytest.mark.parametrize("protocol", [*PROTOCOLS, *finetune.PROTOCOLS])
@pytest.mark.parametrize("task", ["", "flowers102"])
def test_every_protocol_fits_a_checkpoint(protocol, task):
    """With the sizes of a checkpoint it is valid; beyond the base config it has the protocol's own options only."""
    arg = f"protocol={protocol}" + (f",task={task}" if task else "")
    c = load("evaluate", arg)
    extra = flatten(c).keys() - flatten(configs.base()).keys()
    assert extra == {f"protocol.{o}" for o in (PROTOCOLS[protocol].options if protocol in PROTOCOLS else ())}
    for pretraining in ("crate_mae", "vit_mae", "rop_vitb"):
        encoder = Pretrained("", load(pretraining).to_dict(), {}, "")
        full = evaluate.inherit(c, encoder) if protocol in PROTOCOLS else finetune.resolve(c, encoder)
        validate(full)
        assert full.protocol.metric == "top1"  # also on Flowers: Table 2 of arXiv 2404.02446
        assert full.data.image_size == (224, 224) and full.encoder.width == 768
        if protocol == "finetune_crate":  # torchvision's RandomResizedCrop, as in the authors' finetune.py
            assert (full.data.crop_scale, full.data.interpolation) == ((0.08, 1.0), "bilinear")


@pytest.mark.parametrize("arg", ["", "head=upernet", "freeze", "head=upernet,freeze,scratch", "debug"])
def test_segmentation_fits_a_checkpoint(arg):
    c = load("segment", arg)
    assert flatten(c).keys() == flatten(configs.base()).keys()
    for pretraining in ("crate_mae", "vit_mae", "rop_vitb"):
        full = finetune.resolve(c, Pretrained("", load(pretraining).to_dict(), {}, ""))
        validate(full)
        assert full.protocol.name in finetune.SEGMENTERS
        assert full.finetune.freeze == ("freeze" in arg)
        assert full.encoder.final_norm == ("upernet" not in arg)


@pytest.mark.one_python
@pytest.mark.parametrize(
    ("arg", "method", "encoder", "stem"),
    [
        ("", "vibcreg", "resnet18", "imagenet"),
        ("size=32", "vibcreg", "resnet18", "imagenet"),
        ("encoder=vit", "reconstruction", "vit", ""),
        ("encoder=crate,method=byol", "byol", "crate", ""),
        ("corruption=noise", "reconstruction", "vit", ""),
        ("corruption=noise,encoder=resnet18,size=96", "reconstruction", "resnet18", "imagenet"),
        ("method=reconstruction,encoder=resnet18,size=32", "reconstruction", "resnet18", "cifar"),
        ("method=ressl", "ressl", "resnet18", "imagenet"),
    ],
)
def test_photos_choose_what_is_not_given(arg, method, encoder, stem):
    c = load("photos", arg)
    assert (c.method, c.encoder.name) == (method, encoder)
    assert encoder != "resnet18" or c.encoder.stem == stem
    assert method == "reconstruction" or c.views.grey == ((0.4, 0.0) if method == "ressl" else (0.4,))


def test_every_config_file_has_a_command_and_a_docstring():
    for name in NAMES:
        doc = importlib.import_module(f"configs.{name}").__doc__
        assert f"--config=configs/{name}.py" in doc


def test_rates_scale_with_the_batch_as_each_paper_does():
    """MAE: 1.5e-4 x 4096 / 256. ROPIM: x 512 / 512. CRATE-MAE: 3e-5 as it stands."""
    for name, peak in (("vit_mae", 2.4e-3), ("rop_vitb", 1.5e-4), ("crate_mae", 3e-5)):
        c = load(name)
        schedule = optimizer.schedule(c, 10_000, 100.0)
        warmup = round(c.optimizer.warmup_epochs * 100)
        assert float(schedule(warmup)) == pytest.approx(peak, rel=1e-5)


ALL_KEYS = configs.KEYS | {f"{p.name}: {name}": key for p in PROTOCOLS.values() for name, key in p.keys.items()}


@pytest.mark.parametrize("name", ALL_KEYS)
def test_every_key_is_declared_whole(name):
    """Its default keeps to its rule, it has a meaning, and what it is read by is a value that another key may have."""
    key = ALL_KEYS[name]
    check_types({name: flatten({"x": key.default})["x"]}, {name: key})
    check_values({name: flatten({"x": key.default})["x"]}, {name: key})
    assert key.meaning and not key.meaning.endswith(".")
    if key.read_by:
        chooser, *values = key.read_by
        assert values and chooser != name
        for value in values:
            check_values({chooser: value}, {chooser: configs.KEYS[chooser]})


def test_every_part_is_a_section():
    names = [section.name for section in configs.SECTIONS]
    assert configs.SOME_METHODS_READ < set(names) and names.count("") == 2 and len(set(names)) == len(names) - 1
    declared = sum(len(section.keys) for section in configs.SECTIONS)
    assert declared == len(configs.KEYS) == len(flatten(configs.base()))


def test_only_what_a_job_reads_is_judged():
    """An encoder alone is not refused for a decoder that it does not have."""
    c = load("cifar10")
    c.decoder.heads, c.corruption.mask_ratio = 5, 0.999
    with pytest.raises(ConfigError, match="at least one must be kept"):
        validate(c)
    c.corruption.mask_ratio = 0.5
    with pytest.raises(ConfigError, match="multiple of config.decoder.heads=5"):
        validate(c)
    with pytest.raises(ConfigError, match="multiple of config.decoder.heads=5"):
        validate(c, configs.parts(c, {"encoder": {}}))  # training reads the decoder, whatever there is of parameters
    for job in ("finetune", "segment", "evaluate", "align", "report"):
        c.job = job
        validate(c)
        c.encoder.heads = 5
        with pytest.raises(ConfigError, match="multiple of config.encoder.heads=5"):
            validate(c)
        c.encoder.heads = 4
    with pytest.raises(ConfigError, match="multiple of config.decoder.heads=5"):
        validate(c, configs.parts(c, {"encoder": {}, "decoder": {}}))


BAD = [
    ({"encoder.name": "resnet"}, r"config.encoder.name='resnet': must be one of crate, vit"),
    ({"decoder.name": "unet"}, r"config.decoder.name='unet'"),
    ({"corruption.name": "blur"}, r"must be one of mask, rop, noise, none"),
    ({"penalty.name": "l2"}, r"must be one of none, so, srip, whiten"),
    ({"optimizer.name": "rmsprop"}, r"must be one of adamw, adam, sgd, lars, lars_torch, lion"),
    ({"data.source": "imagenet"}, r"digits, folder:PATH, .*, synthetic"),
    ({"data.source": "folder:"}, r"config.data.source='folder:'"),
    ({"data.image_size": (30, 32)}, r"image_size=\(30, 32\).*multiples of config.encoder.patch_size=4"),
    ({"encoder.width": 50}, r"config.encoder.width=50: must be a multiple of config.encoder.heads=4"),
    ({"corruption.mask_ratio": 1.0}, r"mask_ratio=1.0: must lie in \(0, 1\)"),
    ({"corruption.mask_ratio": 0.999}, r"at least one must be kept"),
    ({"corruption.rop_ratio": 0.0}, r"rop_ratio=0.0: must lie in \(0, 1\)"),
    ({"corruption.mask_fill": "noise"}, r"must be one of token, zero, drop"),
    ({"corruption.mask_fill": "drop"}, r"needs positions"),
    ({"encoder.positions": "relative"}, r"only encoder.name='vit' has a relative bias"),
    ({"encoder.drop_path": 0.1}, r"only encoder.name='vit'"),
    ({"decoder.width": 64}, r"must be 0 or the encoder's width"),
    ({"penalty.name": "so"}, r"needs a weight above 0"),
    ({"batch_size": 0}, r"config.batch_size=0: must be greater than 0"),
    ({"batch_size": 10, "accumulate": 3}, r"must be a multiple of config.accumulate=3"),
    ({"mesh.data": -1}, r"config.mesh.data=-1: must not be negative"),
    ({"mesh.model": 0}, r"only one of the two can stand for the rest"),
    ({"remat_keep": "all"}, r"must be one of nothing, weights, products"),
    ({"steps": 5}, r"set exactly one of the three"),
    ({"epochs": 0.0}, r"set exactly one of the three"),
    ({"optimizer.lr": float("nan")}, r"must be a finite number"),
    ({"optimizer.lr": -1.0}, r"must be greater than 0"),
    ({"optimizer.warmup_steps": 5}, r"set only one of warmup_steps, warmup_epochs and warmup_share"),
    ({"data.crop_scale": (0.9, 0.1)}, r"two increasing numbers"),
    ({"data.std": (1.0, 0.0, 1.0)}, r"all positive"),
    ({"data.max_undecodable": 2.0}, r"must lie in \[0, 1\]"),
    ({"penalty.include": ("(",)}, r"not a regular expression"),
    ({"log.every": 0}, r"must be greater than 0"),
    ({"whitebox.measure": "both ways"}, r"config.whitebox.measure='both ways': must be one of paper, released, both"),
    ({"whitebox.every": 10, "job": "finetune"}, r"config.whitebox.every=10: must be 0"),
    ({"data.image_size": (32.0, 32.0)}, r"config.data.image_size=.*whole numbers only"),
    ({"data.crop_scale": ("a", "b")}, r"config.data.crop_scale=.*numbers only"),
    ({"data.mean": (float("nan"), 0.0, 0.0)}, r"config.data.mean=.*must be finite"),
    ({"penalty.include": (1,)}, r"config.penalty.include=.*texts only"),
    ({"seed": 10**20}, r"config.seed=1\d+: must lie in"),
    ({"dtype": "float16"}, r"must be one of float32, bfloat16"),
]


@pytest.mark.parametrize(("values", "message"), BAD, ids=[str(v) for v, _ in BAD])
def test_bad_values_are_named(values, message):
    c = load("cifar10")
    for key, value in values.items():
        *section, leaf = key.split(".")
        (c[section[0]] if section else c)[leaf] = value
    with pytest.raises(ConfigError, match=message) as caught:
        validate(c)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arg", "message"),
    [
        ("colour=red", "unknown key 'colour'; valid keys: corruption, debug, encoder, penalty"),
        ("encoder=cnn", "encoder=cnn is not one of crate, vit"),
        ("debug=maybe", "debug=maybe is not a boolean"),
    ],
)
def test_bad_config_strings_are_named(arg, message):
    with pytest.raises(ConfigError, match=message):
        load("cifar10", arg)


def test_parse_arg_casts_to_the_default():
    parsed = parse_arg("n=3,x=0.5,flag", n=1, x=1.0, flag=False, kind=("a", "b"))
    assert parsed.to_dict() == {"n": 3, "x": 0.5, "flag": True, "kind": "a"}
    with pytest.raises(ConfigError, match="n='many' is not a valid int"):
        parse_arg("n=many", n=1)


def test_changed_keys_are_listed():
    a, b = load("cifar10"), load("cifar10")
    b.encoder.width, b.data.image_size = 64, (16, 16)
    assert changed_keys(json.loads(json.dumps(a.to_dict())), b.to_dict()) == [
        "data.image_size: [32, 32] -> [16, 16]",
        "encoder.width: 128 -> 64",
    ]

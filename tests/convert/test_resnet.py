"""ResNets, and the checkpoints of joint-embedding methods: which network is read, and with which stem."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crate_jax.config import base
from crate_jax.convert import __main__ as command, files, pretrained, weights
from crate_jax.convert.describe import Hints, config_of
from crate_jax.convert.export import export
from crate_jax.convert.families import detect, import_state_dict
from crate_jax.errors import CheckpointError
from crate_jax.methods import METHODS
from crate_jax.models import batch_norm, build_encoder, representation
from crate_jax.parallel.parameters import count, names
from crate_jax.training.step import TrainState
from crate_jax.workdir import checkpoint
from tests.convert.test_convert import Pickled, Shapes, filled, linear, norm, random_state, resnet, vit, write_zip
from tests.parity_joint import Source

pytestmark = pytest.mark.one_python

Arrays = dict[str, np.ndarray]
BLOCKS = (2, 2, 2, 2)
IMAGENET, CIFAR = resnet(BLOCKS, 4), resnet(BLOCKS, 4, side=3)
VIT = vit(8, 2, 4, 16)


def a_state(shapes: Shapes, scale: float = 1.0) -> Arrays:
    family = "resnet" if "conv1.weight" in shapes else "timm_vit"
    return {n: np.asarray(a * scale, a.dtype) for n, a in random_state(family, shapes).items()}


PUBLISHED = [  # name, shapes, trained parameters of torchvision's model without fc
    ("resnet18", resnet((2, 2, 2, 2), 64), 11_176_512),
    ("resnet18", resnet((2, 2, 2, 2), 64, side=3), 11_168_832),
    ("resnet34", resnet((3, 4, 6, 3), 64), 21_284_672),
    ("resnet50", resnet((3, 4, 6, 3), 64, factor=4), 23_508_032),
    ("resnet50", resnet((3, 4, 6, 3), 128, factor=4), 93_907_072),  # SwAV's resnet50w2
    ("wide_resnet50_2", resnet((3, 4, 6, 3), 64, factor=4, inner=2), 66_834_240),
]


@pytest.mark.parametrize(("name", "shapes", "trained"), PUBLISHED)
def test_published_resnets_fit(name, shapes, trained):
    state = filled("resnet", shapes | linear("fc", 1000, 8), lambda shape: np.broadcast_to(np.int8(1), shape))
    assert detect(state) == "resnet"
    params = import_state_dict("resnet", state, (0, 0))
    c = config_of("resnet", params, (0, 0), Hints(stem_padding=1))
    assert (c.encoder.name, c.encoder.stage_width) == (name, shapes["conv1.weight"][0])
    assert (c.encoder.stem, c.data.image_size) == (
        ("imagenet", (224, 224)) if shapes["conv1.weight"][2] == 7 else ("cifar", (32, 32))
    )
    weights.require_fit(c.to_dict(), params)
    assert count(batch_norm.split(params)[0]) == trained
    assert count(params) == count(jax.eval_shape(lambda: representation.init_params(c, jax.random.key(0))))


def ours_of(name: str) -> str:
    """Our name of a tensor of torchvision's."""
    parts = name.split(".")
    leaf = {"weight": "scale", "bias": "bias"}.get(parts[-1], parts[-1])
    if parts[0] in ("conv1", "bn1"):
        return "encoder/stem/conv/kernel" if parts[0] == "conv1" else f"encoder/stem/norm/{leaf}"
    block = f"encoder/stage{parts[0][-1]}/block{parts[1]}"
    if parts[2] == "downsample":
        return f"{block}/shortcut_conv/kernel" if parts[3] == "0" else f"{block}/shortcut_norm/{leaf}"
    return f"{block}/{parts[2]}/kernel" if parts[2][:4] == "conv" else f"{block}/norm{parts[2][2:]}/{leaf}"


@pytest.mark.parametrize("shapes", [IMAGENET, resnet((3, 4, 6, 3), 2, factor=4)], ids=["basic", "bottleneck"])
def test_each_tensor_lands_where_its_name_says(shapes):
    state = {n: a for n, a in a_state(shapes).items() if not n.endswith("num_batches_tracked")}
    arrays = names(import_state_dict("resnet", state, (0, 0)))
    assert arrays.keys() == {ours_of(name) for name in state}
    for name, tensor in state.items():
        expected = np.moveaxis(np.moveaxis(tensor, 1, -1), 0, -1) if tensor.ndim == 4 else tensor
        np.testing.assert_array_equal(arrays[ours_of(name)], expected, err_msg=name)


# --- Training scripts' checkpoints: from the tensors of the encoder that counts, and of another, to the saved object.


def under(prefix: str, *parts: Arrays) -> Arrays:
    return {prefix + name: a for part in parts for name, a in part.items()}


def dense(name: str, *rest: str) -> Arrays:
    """A head: layers of which nothing may be read."""
    return {f"{n}.weight": np.full((3, 2), 7.0, np.float32) for n in (name, *rest)}


def numbered(state: Arrays, first: int = 4) -> Arrays:
    """nn.Sequential of a ResNet's children: convolution, norm, (ReLU, pooling,) four stages."""
    parts = {"conv1": "0", "bn1": "1"} | {f"layer{k}": str(first + k - 1) for k in (1, 2, 3, 4)}
    return {".".join([parts[(n := name.split("."))[0]], *n[1:]]): a for name, a in state.items()}


def chunked(state: Arrays) -> Arrays:
    """A ViT whose blocks are in chunks of two, but numbered through."""
    return {
        re.sub(r"^blocks\.(\d+)\.", lambda m: f"blocks.{int(m[1]) // 2}.{m[1]}.", name): a for name, a in state.items()
    }


def shortcut(state: Arrays) -> Arrays:
    return {name.replace("downsample", "shortcut"): a for name, a in state.items()}


def lightning(state: Arrays) -> dict:
    return {"epoch": 3, "global_step": 70, "pytorch-lightning_version": "2.1", "state_dict": state, "loops": {}}


QUEUE = {"queue": np.ones((2, 5), np.float32), "queue_ptr": np.zeros(1, np.int64)}
HEADS = dense("projector.0", "predictor.0", "classifier", "momentum_classifier") | QUEUE
LAYOUTS = {  # kind -> (names and shapes, (encoder, another encoder) -> saved object, prefix, padding of a 3 x 3 stem)
    "torchvision": (IMAGENET, lambda a, b: a | dense("fc"), "", None),
    "barlow twins and vicreg": (IMAGENET, lambda a, b: a, "", None),
    "barlow twins and vicreg, whole": (
        IMAGENET, lambda a, b: {"epoch": 1, "model": under("module.", under("backbone.", a), dense("projector.0"),
                                                         {"bn.running_mean": np.ones(3, np.float32)})},
        "backbone.", None,
    ),
    "swav": (IMAGENET, lambda a, b: under("module.", a, dense("projection_head.0", "prototypes")), "", None),
    "swav, whole": (
        IMAGENET, lambda a, b: {"epoch": 1, "state_dict": under("module.", a, dense("prototypes.prototypes0"))},
        "", None,
    ),
    "simsiam": (
        IMAGENET, lambda a, b: {"state_dict": under("module.", under("encoder.", a, dense("fc.0")),
                                                    dense("predictor.0"))},
        "encoder.", None,
    ),
    "moco v2": (
        IMAGENET, lambda a, b: {"arch": "x", "state_dict": under("module.", under("encoder_q.", a, dense("fc.0")),
                                                                 under("encoder_k.", b, dense("fc.0")), QUEUE)},
        "encoder_q.", None,
    ),
    "moco v3": (
        IMAGENET, lambda a, b: {"state_dict": under("module.", under("base_encoder.", a, dense("fc.0")),
                                                    under("momentum_encoder.", b), dense("predictor.0"))},
        "base_encoder.", None,
    ),
    "moco v3, vit": (
        VIT, lambda a, b: {"state_dict": under("module.", under("base_encoder.", a, dense("head.0")),
                                               under("momentum_encoder.", b, dense("head.0")), dense("predictor.0"))},
        "base_encoder.", None,
    ),
    "dino": (
        IMAGENET, lambda a, b: {"student": under("module.backbone.", b), "epoch": 3,
                                "teacher": under("backbone.", a) | dense("head.mlp.0", "head.last_layer")},
        "backbone.", None,
    ),
    "dino, vit": (VIT, lambda a, b: {"teacher": under("backbone.", a) | dense("head.mlp.0")}, "backbone.", None),
    "byol of lucidrains": (
        IMAGENET, lambda a, b: under("online_encoder.net.", a) | dense("online_encoder.projector.net.0")
        | under("target_encoder.net.", b) | dense("online_predictor.net.0"), "online_encoder.net.", None,
    ),
    "byol of yaox12": (
        IMAGENET, lambda a, b: {"model": under("module.", under("online_network.encoder.", numbered(a)),
                                               under("target_network.encoder.", numbered(b)),
                                               dense("online_network.projetion.l1", "predictor.predictor.l1"))},
        "online_network.encoder.", None,
    ),
    "byol of sthalles": (
        IMAGENET, lambda a, b: {"online_network_state_dict": under("encoder.", numbered(a)) | dense("projetion.net.0"),
                                "target_network_state_dict": under("encoder.", numbered(b))},
        "encoder.", None,
    ),
    "lightly": (IMAGENET, lambda a, b: lightning(under("backbone.", numbered(a)) | dense("projection_head.layers.0")),
                "backbone.", None),
    "lightly, byol": (
        IMAGENET, lambda a, b: lightning(under("backbone.", a) | under("teacher_backbone.", b)
                                         | dense("prediction_head.layers.0", "online_classifier.linear")),
        "backbone.", None,
    ),
    "lightly, dino": (
        IMAGENET, lambda a, b: lightning(under("student_backbone.", numbered(b)) | dense("student_head.layers.0")
                                         | under("teacher_backbone.", numbered(a))), "teacher_backbone.", None,
    ),
    "lightly, vit": (VIT, lambda a, b: lightning(under("backbone.vit.", a) | under("student_backbone.vit.", b)),
                     "backbone.vit.", None),
    "lightly, cifar": (
        CIFAR, lambda a, b: lightning(under("backbone.", numbered(shortcut(a), 2))
                                      | under("backbone_momentum.", numbered(shortcut(b), 2))), "backbone.", 1,
    ),
    "solo-learn": (IMAGENET, lambda a, b: lightning(under("backbone.", a) | under("momentum_backbone.", b) | HEADS),
                   "backbone.", None),
    "solo-learn, cifar": (CIFAR, lambda a, b: lightning(under("backbone.", a) | under("momentum_backbone.", b) | HEADS),
                          "backbone.", 2),
    "solo-learn, old": (CIFAR, lambda a, b: lightning(under("encoder.", a) | under("momentum_encoder.", b) | HEADS),
                        "encoder.", 2),
    "solo-learn, vit": (VIT, lambda a, b: lightning(under("backbone.", a) | HEADS), "backbone.", None),
    "a tensor beside the weights": (
        IMAGENET, lambda a, b: {"best_acc1": np.float32([61.5]), "epoch": np.array(3),
                                "state_dict": under("module.", a)},
        "", None,
    ),
    "dino, all in one": (
        VIT, lambda a, b: under("student.backbone.", b) | under("teacher.backbone.", a) | dense("teacher.head.mlp.0"),
        "teacher.backbone.", None,
    ),
    "ibot": (
        VIT, lambda a, b: {"student": under("module.backbone.", b), "fp16_scaler": {"scale": np.ones(1, np.float32)},
                           "teacher": under("backbone.", a, {"masked_embed": np.ones((1, 8), np.float32)})
                           | dense("head.mlp.0")},
        "backbone.", None,
    ),
    "dinov2": (
        VIT, lambda a, b: {"teacher": under("backbone.", chunked(a), {"mask_token": np.ones((1, 8), np.float32)})
                           | dense("dino_head.mlp.0", "ibot_head.mlp.0")},
        "backbone.", None,
    ),
    "dinov2, flat": (
        VIT, lambda a, b: {"model": under("student.backbone.", chunked(b)) | under("teacher.backbone.", chunked(a))},
        "teacher.backbone.", None,
    ),
    "moco v3, nested": (VIT, lambda a, b: {"momentum_encoder": b, "base_encoder": a | dense("head.0")}, "", None),
    "byol, nested": (IMAGENET, lambda a, b: {"target_network": numbered(b), "online_network": numbered(a)}, "", None),
    "timm with a moving average": (
        VIT, lambda a, b: {"state_dict": b, "state_dict_ema": a, "optimizer": {"state": {0: QUEUE}}}, "", None,
    ),
    "deit with a moving average": (VIT, lambda a, b: {"model": b, "model_ema": under("module.", a)}, "", None),
    "a moving average, flat": (IMAGENET, lambda a, b: under("model.", b) | under("ema_model.", a), "ema_model.", None),
    "an empty moving average": (
        VIT, lambda a, b: {"model": a, "model_ema": {}, "ema": {"decay": np.ones(1, np.float32)}}, "", None,
    ),
    "a moving average beside weights": (
        IMAGENET, lambda a, b: {**b, "ema": under("module.", a), "extra": under("net.", b)}, "", None,
    ),
    "a part of a teacher": (
        VIT, lambda a, b: {"model": a, "teacher": {n: x for n, x in b.items() if n.startswith("blocks.")}}, "", None,
    ),
    "a decoder of the same blocks": (
        VIT, lambda a, b: under("net.vit.", a) | under("net.predictor.", {n: x for n, x in b.items() if "blocks" in n}),
        "net.vit.", None,
    ),
    "any other key": (IMAGENET, lambda a, b: {"my_net": a, "best": np.ones(1, np.float32)}, "", None),
    "any other name": (IMAGENET, lambda a, b: under("net.trunk.", a) | dense("net.neck"), "net.trunk.", None),
}  # fmt: skip


@pytest.mark.parametrize("kind", LAYOUTS)
def test_the_encoder_of_a_checkpoint_is_read(tmp_path, kind):
    shapes, saved, prefix, padding = LAYOUTS[kind]
    a, b = a_state(shapes), a_state(shapes, 0.5)
    path = write_zip(tmp_path / "checkpoint.ckpt", saved(a, b))
    loaded = weights.load(path, hints=Hints(heads=2))
    family = "resnet" if "conv1.weight" in shapes else "timm_vit"
    expected = names(import_state_dict(family, a, (4, 4)))
    assert names(loaded.params).keys() == expected.keys()
    for name, array in names(loaded.params).items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)
    state, about = files.read(path)
    branch, found = weights.choose(state, about, "", "")
    assert branch.prefix == ("" if about["prefix"].endswith(prefix) else prefix)
    assert not found.problem()
    if shapes is CIFAR:
        assert (loaded.config["encoder"]["stem"], loaded.config["encoder"]["stem_padding"]) == ("cifar", padding)
    left = {n for n in state if not n.startswith(branch.prefix)}
    assert sum(branch.outside.values()) == len(left)


def test_the_commands_say_what_is_left_out_and_take_another_network(tmp_path, capsys):
    shapes, saved, *_ = LAYOUTS["solo-learn, cifar"]
    a, b = a_state(shapes), a_state(shapes, 0.5)
    path, out = write_zip(tmp_path / "byol.ckpt", saved(a, b | dense("fc"))), tmp_path / "out.safetensors"
    assert command.main(["inspect", str(path)]) == 0
    shown = capsys.readouterr().out
    parts = f"classifier., momentum_backbone. ({len(b) + 1} tensors), momentum_classifier., predictor., projector."
    assert f"not needed: {parts}, and 2 more (outside of the encoder 'backbone.')" in shown
    assert "num_batches_tracked" in shown and "config.encoder.stem_padding" not in shown  # 2 is the default
    flags = ["--prefix=momentum_backbone.", "--stem-padding=1"]
    assert command.main(["import", str(path), f"--out={out}", *flags]) == 0
    assert "not needed: fc.weight (a classifier's last layer, or a projector)" in capsys.readouterr().out
    ours = pretrained.load(str(out), "config.checkpoint")
    assert ours.config["encoder"]["stem_padding"] == 1
    assert (
        command.main(["import", str(out), f"--out={tmp_path / 'again.safetensors'}", "--stem-padding=2"]) == 0
    )  # of ours, too
    assert weights.load(tmp_path / "again.safetensors").config["encoder"]["stem_padding"] == 2
    capsys.readouterr()
    assert command.main(["import", str(out), f"--out={out}", "--heads=3"]) == 2
    assert "--heads=3: its model has no heads: its encoder is a ResNet" in capsys.readouterr().err
    np.testing.assert_array_equal(
        ours.params["encoder"]["stem"]["conv"]["kernel"], b["conv1.weight"].transpose(2, 3, 1, 0)
    )


def test_running_statistics_are_no_parameters(tmp_path, capsys):
    """As in the log of a training run; seen: `inspect` gave the same run 4,448 more."""
    state = a_state(IMAGENET)
    path = write_zip(tmp_path / "resnet.pth", state)
    assert command.main(["inspect", str(path)]) == 0
    size = sum(a.size for name, a in state.items() if "running_" not in name and "num_batches" not in name)
    assert f"family resnet: {size:,} parameters (encoder {size:,})" in capsys.readouterr().out


def test_a_nested_network_is_named_and_another_can_be_chosen(tmp_path, capsys, caplog):
    shapes, saved, *_ = LAYOUTS["ibot"]
    a, b = a_state(shapes), a_state(shapes, 0.5)
    path = write_zip(tmp_path / "ibot.pth", saved(a, b))
    with caplog.at_level(logging.INFO):
        weights.load(path, hints=Hints(heads=2))
    assert "ibot.pth: teacher.backbone. read as timm_vit; not read: student, head." in caplog.text
    assert command.main(["inspect", str(path), "--heads=2"]) == 0
    assert f"not needed: student ({len(b)} tensors) (another network)" in capsys.readouterr().out
    for prefix in ("student.", "student.module.backbone.", "student.backbone."):
        loaded = weights.load(path, hints=Hints(heads=2), prefix=prefix)
        np.testing.assert_array_equal(loaded.params["encoder"]["norm"]["scale"], b["norm.weight"])
    two = write_zip(tmp_path / "two.pth", {"left": a, "right": b})
    with pytest.raises(CheckpointError, match=r"two.pth: holds several networks, left., right.: choose one .*--prefix"):
        weights.load(two)
    loaded = weights.load(two, hints=Hints(heads=2), prefix="right.")
    np.testing.assert_array_equal(loaded.params["encoder"]["norm"]["scale"], b["norm.weight"])


@pytest.mark.parametrize("builtins", [b"__builtin__", b"builtins"])  # of protocol 2, torch.save's; and of later ones
def test_lightnings_other_objects_are_skipped(tmp_path, builtins):
    """Hyperparameters of omegaconf's types and a callback's state, as opcodes: none of these classes is needed."""
    state = lightning(a_state(IMAGENET))
    pickled = Pickled()
    body = pickled.dumps(state)[:-1]
    config = b"comegaconf.dictconfig\nDictConfig\n)\x81}(" + pickled._item("_content") + b"ccollections\ndefaultdict\n"
    config += b"c" + builtins + b"\ndict\n\x85R(" + pickled._item("lr") + b"comegaconf.nodes\nAnyNode\n)\x81}bu" + b"ub"
    callback = b"cpytorch_lightning.callbacks.model_checkpoint\nModelCheckpoint\n}"
    more = b"(" + pickled._item("hyper_parameters") + config + pickled._item("callbacks") + b"}(" + callback + b"uu."
    path = write_zip(tmp_path / "x.ckpt", state, None)
    import zipfile

    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", body + more)
        for key, flat in pickled.storages.items():
            archive.writestr(f"archive/data/{key}", flat.tobytes())
    assert weights.load(path).family == "resnet"


def without(state: Arrays, *ends: str) -> Arrays:
    return {n: a for n, a in state.items() if not n.endswith(ends)}


def renamed(state: Arrays, **names: str) -> Arrays:
    for old, new in names.items():
        state = {n.replace(old, new): a for n, a in state.items()}
    return state


def wider(state: Arrays, name: str, axis: int) -> Arrays:
    return state | {name: np.concatenate([state[name]] * 2, axis)}


REFUSED = {  # kind -> (tensors, a pattern of the line)
    "a missing tensor": (
        lambda: without(a_state(IMAGENET), "layer2.1.bn1.bias"), r"missing layer2.1.bn1.bias; not used none"
    ),
    "a missing block": (
        lambda: {n: a for n, a in a_state(IMAGENET).items() if not n.startswith("layer2.0")},
        r"missing layer2.0.bn1.bias, .*layer2.0.bn2.bias, and \d+ more; not used none",
    ),
    "an unknown tensor": (lambda: a_state(IMAGENET) | dense("neck"), r"missing none; not used neck.weight"),
    "an unknown tensor of a branch": (
        lambda: under("backbone.", a_state(IMAGENET) | dense("neck")) | dense("projector"),
        r"missing none; not used neck.weight",
    ),
    "a misspelt tensor": (
        lambda: renamed(a_state(IMAGENET), **{"layer1.1.bn2.running_var": "layer1.1.bn2.runing_var"}),
        r"missing layer1.1.bn2.running_var; not used layer1.1.bn2.runing_var",
    ),
    "a shortcut less": (
        lambda: {n: a for n, a in a_state(IMAGENET).items() if "layer3.0.downsample" not in n},
        r"do not fit together: encoder/stage3/block0/shortcut_conv/kernel: missing, not \[1, 1, 8, 16\]",
    ),
    "another shape": (
        lambda: wider(a_state(IMAGENET), "layer3.1.conv2.weight", 0),
        r"encoder/stage3/block1/conv2/kernel: \[3, 3, 16, 32\], not \[3, 3, 16, 16\]",
    ),
    "a vector for a convolution": (
        lambda: a_state(IMAGENET) | {"layer1.0.conv1.weight": np.ones(3, np.float32)},
        r"'layer1.0.conv1.weight' has the shapes \[3\]",
    ),
    "no running statistics": (
        lambda: without(a_state(IMAGENET), ".running_mean", ".running_var", ".num_batches_tracked"),
        r"missing bn1.running_mean, bn1.running_var",
    ),
    "no channels": (
        lambda: a_state(IMAGENET) | {"layer1.0.conv2.weight": np.ones((4, 0, 3, 3), np.float32)},
        "arrays without numbers, layer1.0.conv2.weight",
    ),
    "four channels": (lambda: wider(a_state(IMAGENET), "conv1.weight", 1), r"'conv1.weight' has 7 x 7 pixels and 6"),
    "a stem of 5 x 5": (lambda: a_state(resnet(BLOCKS, 4, side=5)), r"'conv1.weight' has 5 x 5 pixels and 3"),
    "a 3 x 3 stem of unknown padding": (lambda: a_state(CIFAR), r"padding of a 3 x 3 stem.*--stem-padding"),
    "resnet101": (
        lambda: a_state(resnet((3, 4, 23, 3), 2, factor=4)), r"not a known ResNet: \(3, 4, 23, 3\) bottleneck blocks"
    ),
    "resnext": (
        lambda: {n: a[:, ::2].copy() if a.ndim == 4 and ".conv2." in n else a
                 for n, a in a_state(resnet((3, 4, 6, 3), 4, factor=4)).items()},
        r"'layer1.0.conv2.weight' has 2 groups \(ResNeXt\)",
    ),
    "resnet50d": (
        lambda: a_state(IMAGENET) | {"conv1.3.weight": np.ones((4, 4, 3, 3), np.float32)},
        r"'conv1.3.weight' is part of a stem of several convolutions .*not supported",
    ),
    "seresnet50": (lambda: a_state(IMAGENET) | dense("layer1.0.se.fc1"), r"'layer1.0.se.fc1.weight' is a block's att"),
    "clip": (
        lambda: under("visual.", a_state(IMAGENET), norm_of("bn2")) | dense("visual.attnpool.k_proj"),
        r"'attnpool.k_proj.weight' is an attention pooling \(CLIP\)",
    ),
    "two networks of one name": (
        lambda: under("a.encoder.", a_state(IMAGENET)) | under("b.encoder.", a_state(IMAGENET)),
        r"holds several networks, a.encoder., b.encoder.: choose one .*--prefix",
    ),
    "two networks": (
        lambda: under("left.", numbered(a_state(IMAGENET))) | under("right.", a_state(IMAGENET)),
        r"holds several networks, left., right.: choose one .*--prefix",
    ),
    "block numbers without end": (
        lambda: a_state(IMAGENET) | {"layer1.999999999.conv1.weight": np.ones((4, 4, 3, 3), np.float32)},
        r"missing layer1.10",
    ),
    "three numbered stages": (
        lambda: {n: a for n, a in numbered(a_state(IMAGENET)).items() if not n.startswith("7.")}, "not a known model"
    ),
}  # fmt: skip


def norm_of(name: str) -> Arrays:
    return {n: np.ones(shape, np.float32) for n, shape in norm(name, 4).items()}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_such_a_model_is_one_line(tmp_path, capsys, kind):
    state, line = REFUSED[kind]
    path = write_zip(tmp_path / "x.pth", {"state_dict": state()})
    with pytest.raises(CheckpointError, match=rf"x.pth: .*{line}") as e:
        weights.load(path)
    assert "\n" not in str(e.value)
    assert command.main(["inspect", str(path)]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_timms_config_beside_the_file_counts(tmp_path):
    """Its mean and size; and a model that has a ResNet's tensors and computes something else is refused."""
    files.write(tmp_path / "model.safetensors", a_state(IMAGENET), {"format": "pt"})
    images = {"input_size": [3, 160, 160], "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.1], "crop_pct": 0.95}
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "resnet18", "pretrained_cfg": images}))
    data = weights.load(tmp_path / "model.safetensors").config["data"]
    assert (data["image_size"], data["mean"], data["eval_crop"]) == ((160, 160), (0.5, 0.4, 0.3), 0.95)
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "resnetaa50", "pretrained_cfg": images}))
    with pytest.raises(CheckpointError, match="timm's resnetaa50, which computes something else"):
        weights.load(tmp_path / "model.safetensors")


# --- Out.


def test_an_export_has_torchvisions_names_and_says_what_is_left_out(tmp_path):
    """The counts of batches are written as 0; what pre-training added, and a classifier's head, are left out."""
    state = a_state(IMAGENET)
    c, params = read(write_zip(tmp_path / "x.pth", state))
    params["encoder"]["mask_token"] = np.ones((1, 1, 48), np.float32)
    made = export(c, params | {"head": {"kernel": np.ones(3)}}, "torchvision", tmp_path / "out")
    assert sorted(made.left_out) == ["encoder/mask_token", "head"]
    back, about = files.read(tmp_path / "out" / "model.safetensors")
    assert back.keys() == state.keys()
    for name, a in back.items():
        np.testing.assert_array_equal(a, state[name])
        assert a.shape == state[name].shape
        assert a.dtype == (np.int64 if name.endswith("num_batches_tracked") else np.float32)
    assert json.loads(about["metadata"]["crate_jax"])["family"] == "resnet"


@pytest.mark.slow
def test_a_joint_run_exports_the_encoder_with_its_statistics(tmp_path, capsys):
    """Those that the method carries, and not the target's; projector and predictor are left out and named."""
    c = base()
    c.method, c.evaluation.pool, c.data.image_size = "byol", "mean", (16, 16)
    c.encoder.update(dict(name="resnet18", stage_width=4, stem="cifar", stem_padding=1))
    c.joint.update(dict(hidden=8, out=4, predictor_hidden=8))
    method = METHODS["byol"].build(c, Source(40))
    shapes = jax.eval_shape(lambda key: method.init(key, lambda drawn: drawn), jax.random.key(0))
    rng = np.random.default_rng(0)  # drawn, since compiling the initialisation of two ResNets takes long
    params, carried = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), shapes)
    carried["statistics"] = jax.tree.map(np.ones_like, carried["statistics"])
    moved = jax.tree.map(lambda x: x + np.arange(x.size), carried["statistics"])
    state = TrainState(0, params, {**carried, "statistics": moved}, {}, {}, None, {})
    saved = checkpoint.Checkpoints(tmp_path / "run", keep=1)
    saved.save(3, params, state.rest(), {"config": c.to_dict(), "judged": state.judged_names(method)})
    saved.close()
    assert command.main(["export", str(tmp_path / "run"), "--format=torchvision", f"--out={tmp_path / 'out'}"]) == 0
    shown = capsys.readouterr().out
    assert "left out: projector" in shown and "left out: predictor" in shown
    tensors, _ = files.read(tmp_path / "out" / "model.safetensors")
    assert tensors.keys() == CIFAR.keys()
    np.testing.assert_array_equal(tensors["layer2.0.downsample.1.running_mean"], 1 + np.arange(8))
    np.testing.assert_array_equal(tensors["bn1.running_var"], 1 + np.arange(4))
    back = weights.load(tmp_path / "out" / "model.safetensors")
    assert (back.config["encoder"]["stem"], back.config["encoder"]["stem_padding"]) == ("cifar", 1)
    expected = names(jax.device_get(state.judged(method)["encoder"]))
    for name, array in names(back.params["encoder"]).items():
        np.testing.assert_array_equal(array, expected[name])


def read(path: Path, **hints) -> tuple[dict, dict]:
    """(config, parameters) of a file."""
    loaded = weights.load(path, hints=Hints(**hints))
    return loaded.config, loaded.params


# --- Against the libraries themselves, where they are installed.


def shaken_resnet(torch, model):
    """The model with random norms and running statistics too, in evaluation mode."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, x in model.state_dict().items():
            if x.ndim == 1:
                x.add_(0.1 * torch.rand(x.shape, generator=generator))
            elif name.startswith("layer") and x.ndim:
                x.mul_(0.7)  # otherwise deep ones reach 1e2
    return model.eval()


def ours(c: dict, params: dict, images: np.ndarray) -> np.ndarray:
    encoder = build_encoder(weights.model_config(c, params))
    return np.asarray(encoder.apply({"params": params["encoder"]}, jnp.asarray(images))).mean(1)


TORCHVISION = ("resnet18", "resnet34", "resnet50", "wide_resnet50_2")


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_and_timm_compute_the_same_before_and_after(tmp_path, name):
    torch, torchvision = pytest.importorskip("torch"), pytest.importorskip("torchvision")
    timm, safetensors = pytest.importorskip("timm"), pytest.importorskip("safetensors.torch")
    model = shaken_resnet(torch, getattr(torchvision.models, name)())
    torch.save(model.state_dict(), tmp_path / "theirs.pth")
    c, params = read(tmp_path / "theirs.pth")
    assert c["encoder"]["name"] == name
    images = np.random.default_rng(0).standard_normal((2, 64, 96, 3), np.float32)
    pixels = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    model.fc = torch.nn.Identity()
    export(c, params, "torchvision", tmp_path / "torchvision")
    again = getattr(torchvision.models, name)()
    again.fc = torch.nn.Identity()
    again.load_state_dict(safetensors.load_file(tmp_path / "torchvision" / "model.safetensors"), strict=True)
    export(c, params, "timm", tmp_path / "timm")
    of_timm = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True)
    with torch.no_grad():
        theirs = model(pixels).numpy()
        np.testing.assert_allclose(ours(c, params, images), theirs, atol=1e-5)
        np.testing.assert_array_equal(again.eval()(pixels).numpy(), theirs)
        np.testing.assert_allclose(of_timm.eval()(pixels).numpy(), theirs, atol=1e-6)
    assert tuple(timm.data.resolve_model_data_config(of_timm)["input_size"]) == (3, 224, 224)
    torch.save(of_timm.state_dict(), tmp_path / "timm.pth")
    for key, array in names(read(tmp_path / "timm.pth")[1]).items():
        np.testing.assert_array_equal(array, names(params)[key])


@pytest.mark.parametrize("padding", [1, 2])
def test_a_small_stem_computes_what_solo_learns_does(tmp_path, padding):
    """Its ResNet18 for CIFAR, and lightly's way of cutting off the classifier."""
    torch, torchvision = pytest.importorskip("torch"), pytest.importorskip("torchvision")
    model = torchvision.models.resnet18()
    model.conv1, model.maxpool = torch.nn.Conv2d(3, 64, 3, padding=padding, bias=False), torch.nn.Identity()
    shaken_resnet(torch, model)
    sequence = torch.nn.Sequential(*list(model.children())[:-1])
    torch.save({"state_dict": under("backbone.", sequence.state_dict())}, tmp_path / "theirs.ckpt")
    c, params = read(tmp_path / "theirs.ckpt", stem_padding=padding)
    images = np.random.default_rng(0).standard_normal((2, 32, 24, 3), np.float32)
    with torch.no_grad():
        theirs = sequence(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).flatten(1).numpy()
    np.testing.assert_allclose(ours(c, params, images), theirs, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["resnet50d", "seresnet50", "resnext50_32x4d", "resnet50_gn", "resnetaa50", "resnet26"]
)
def test_other_resnets_of_timm_are_refused(tmp_path, name):
    torch, timm = pytest.importorskip("torch"), pytest.importorskip("timm")
    model = timm.create_model(name)
    torch.save(model.state_dict(), tmp_path / "x.pth")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": name, "pretrained_cfg": {}}))
    with pytest.raises(CheckpointError, match="x.pth: "):
        weights.load(tmp_path / "x.pth")

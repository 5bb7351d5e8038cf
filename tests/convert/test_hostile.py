"""Files of weights that were made to harm: each is one line soon, takes little memory and changes nothing."""

from __future__ import annotations

import copy
import json
import os
import pickle
import re
import signal
import struct
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest

from crate_jax.convert import FAMILIES, beside, branches, files, rules, torch_files, weights
from crate_jax.errors import CheckpointError, ConfigError
from tests.convert.test_convert import Pickled, random_state, vit, write_legacy, write_zip

SECONDS, BYTES = 20, 2**24  # the time of an endless loop to be found in; memory besides the file's own size


@pytest.fixture(autouse=True)
def bounded():
    """An endless loop fails instead of hanging; `line` compares the memory."""

    def stop(*_):
        raise BaseException(f"not done after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    tracemalloc.start()
    yield
    tracemalloc.stop()
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def line(path: Path, read=files.read, length: int = 500) -> str:
    """The one line that reading a file ends in, without much memory."""
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    with pytest.raises(CheckpointError) as e:
        read(path)
    taken = tracemalloc.get_traced_memory()[1] - before
    assert taken < BYTES, f"{taken} bytes"
    text = str(e.value)
    assert text.startswith(f"{path}: ") and "\n" not in text and len(text) < length
    return text.removeprefix(f"{path}: ")


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def tensor(shape, strides, offset: int = 0, numel: int = 12, key: str = "0") -> bytes:
    """The operations of a float32 tensor."""
    item = Pickled()._item

    def long(n: int) -> bytes:
        return item(n) if n < 2**31 else b"\x8a\x09" + n.to_bytes(9, "little", signed=True)

    def numbers(values) -> bytes:
        return b"(" + b"".join(map(long, values)) + b"t"

    storage = b"(" + item("storage") + b"ctorch\nFloatStorage\n" + item(key) + item("cpu") + long(numel) + b"tQ"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + long(offset) + numbers(shape) + numbers(strides) + b"tR"


def zip_of(path: Path, tensors: dict[str, bytes], numel: int = 12) -> Path:
    """A checkpoint of tensors that all share the storage '0' of `numel` float32."""
    with zipfile.ZipFile(path, "w") as archive:
        body = b"".join(text(name) + made for name, made in tensors.items())
        archive.writestr("a/data.pkl", b"\x80\x02}(" + body + b"u.")
        archive.writestr("a/data/0", bytes(4 * numel))
    return path


# Pickles of a few bytes, after the mark of protocol 2.
KNOT = b"Nq\x00" + b"0h\x00h\x00\x86q\x00" * 60  # a tuple of one tuple twice, 60 deep
GLOBAL = b"ctorch\nFloatStorage\n"
HUGE = struct.pack("<Q", 3 << 28)
PICKLES = {
    "bytes of 0.8 GB": (b"\x8e" + HUGE + b".", "damaged"),
    "a byte array of 0.8 GB": (b"\x96" + HUGE + b".", "damaged"),
    "a text of 0.8 GB": (b"\x8d" + HUGE + b".", "damaged"),
    "a byte string of 0.8 GB": (b"T" + HUGE[:4] + b".", "damaged"),
    "a number of 0.8 GB": (b"\x8b" + HUGE[:4] + b".", "damaged"),
    "a number of 300 bytes": (b"\x8b" + struct.pack("<i", 300) + b"\1" * 300 + b".", "the operation LONG4"),
    "a frame of 0.8 GB": (b"\x95" + HUGE + b"}.", "no weights found, it has nothing"),
    "a frame in each other": (b"\x95" + HUGE + b"\x95" + HUGE + b"}.", "it has nothing"),
    "a place of 2^32 in the memo": (b"}r\xf0\xff\xff\xff.", "it has nothing"),
    "a place that is not there": (b"h\x07.", "damaged"),
    "a line without end": (b"c" + b"a" * 5000 + b".", "damaged"),
    "an end too early": (b"(.", "damaged"),
    "a mark too few": (b"t.", "damaged"),
    "a key of shared tuples": (b"}(" + KNOT + b"Nu.", "it has nothing"),
    "shared tuples as a storage's key": (
        b"(" + text("storage") + GLOBAL + KNOT + text("cpu") + b"K\x01tQ.",
        "damaged|a storage",
    ),
    "a set of shared tuples": (b"\x8f(" + KNOT + b"\x90.", "not a dictionary"),
    "a dictionary in itself": (b"}q\x00X\x01\0\0\0ah\x00s.", "it has a"),
    "two dictionaries in each other": (b"}q\x00X\x01\0\0\0a}q\x01X\x01\0\0\0bh\x00ss.", "it has a"),
    "a list in itself": (b"]q\x00h\x00a.", "not a dictionary"),
    "tuples 5,000 deep": (b"N" + b"\x85" * 5_000 + b".", "not a dictionary"),
    "lists 5,000 deep": (b"](" * 5_000 + b"e" * 5_000 + b".", "not a dictionary"),
    "a call of a text": (text("a") + b")R.", "a call of something else"),
    "a call of a storage's type": (GLOBAL + b")R.", "a call of something else"),
    "a copy of a dictionary's class": (b"}" + b")\x81.", "a call of something else"),
    "a class of the old kind": (b"(icollections\nOrderedDict\n.", "the operation INST"),
    "an extension": (b"\x82\x01.", "the operation EXT1"),
    "a number as text": (b"I" + b"9" * 5000 + b"\n.", "damaged"),
    "a name of many short words": (text("ab " * 300_000) + b"q\x00h\x00\x93.", "asks for 'ab ab ab "),
    "a name of another thing than text": (b"NN\x93.", "a global name that is not a text"),
    "a shape of many numbers": (
        tensor((1,) * 40, (1,) * 40) + b".",
        "at most 32 numbers",
    ),
    "keys of a list": (b"]Nq\x00Ns.", "something else than a dictionary"),
    "items of a dictionary": (b"}Na.", "something else than a list"),
}


@pytest.mark.parametrize("case", PICKLES)
def test_a_pickle_ends_soon_in_one_line(tmp_path, case):
    body, message = PICKLES[case]
    zipped = write_zip(tmp_path / "a.pth", None, b"\x80\x02" + body)
    legacy = tmp_path / "b.pth"
    parts = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})
    head = b"".join(pickle.dumps(part, protocol=2) for part in parts)
    legacy.write_bytes(head + b"\x80\x02" + body + pickle.dumps([], protocol=2))
    for path in (zipped, legacy):
        said = line(path)
        assert any(words in said for words in message.split("|")), said


def test_the_work_of_a_pickle_is_bounded(tmp_path, monkeypatch):
    """By operations, by what a call copies, by bytes; and the bounds are far above those of a real checkpoint."""
    assert torch_files.MAX_WORK > 30_000 * 25 and torch_files.MAX_PICKLE > 2**25
    monkeypatch.setattr(torch_files, "MAX_WORK", 2000)
    many = b"](" + b"N" * 900 + b"eq\x01"
    ordered = b"ccollections\nOrderedDict\n"
    for body in (b"}" * 3000, many + b"h\x01" * 1100, b"](" + b"]\x00".replace(b"\0", b"") * 3000):
        assert "more than 2000 operations" in line(write_zip(tmp_path / "a.pth", None, b"\x80\x02" + body + b"."))
    pairs = b"](" + b"NN\x86" * 300 + b"eq\x01"  # a dictionary of 300 pairs, asked for again and again
    body = pairs + (ordered + b"h\x01\x85R") * 200
    assert "more than 2000 operations" in line(write_zip(tmp_path / "a.pth", None, b"\x80\x02" + body + b"."))
    monkeypatch.setattr(torch_files, "MAX_PICKLE", 2**20)
    large = b"}" + text("a" * (2**20))
    assert "has 1 MiB or more" in line(write_zip(tmp_path / "a.pth", None, b"\x80\x02" + large + b"Ns."))


def test_a_pickle_changes_nothing_of_ours(tmp_path):
    """Whatever it sets, adds or calls on the table's objects, the next good file is read."""
    good = write_zip(tmp_path / "good.pth", {"a": np.arange(12, dtype=np.float32).reshape(3, 4)})
    before = {
        name: repr(vars(thing)) if hasattr(thing, "__dict__") else "" for name, thing in torch_files.ALLOWED.items()
    }
    for target in (b"ctorch\nFloatStorage\n", b"cargparse\nNamespace\n", b"ccollections\nOrderedDict\n",
                   b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch\nSize\n"):  # fmt: skip
        state = b"}(" + text("dtype") + text("x") + text("append") + b"Nu"
        for change in (b"b", b"N\x86b", b"0" + target + b"N" + state + b"\x86b"):
            body = target + state + change + b"."
            line(write_zip(tmp_path / "a.pth", None, b"\x80\x02" + body))
        for change in (b"Na.", b"(Ne.", text("dtype") + b"Ns.", b"(" + text("dtype") + b"Nu."):
            assert "something else than" in line(write_zip(tmp_path / "a.pth", None, b"\x80\x02" + target + change))
    with pytest.raises(TypeError):
        torch_files.ALLOWED["os.system"] = print
    after = {
        name: repr(vars(thing)) if hasattr(thing, "__dict__") else "" for name, thing in torch_files.ALLOWED.items()
    }
    assert before == after
    np.testing.assert_array_equal(files.read(good)[0]["a"], np.arange(12).reshape(3, 4))


TENSORS = {
    "stride 0 and 2^40 rows": (tensor((2**40, 3), (0, 1)), "they repeat its numbers"),
    "a shape of 2^65": (tensor((2**65,), (0,)), "more than 2^63 bytes"),
    "zero beside a huge size": (tensor((0, 2**62, 2**62), (1, 1, 1)), "damaged"),
    "an offset of 2^66": (tensor((3,), (1,), 2**66), "reaches to element more than 2^63"),
    "a stride of 2^64": (tensor((2, 3), (2**64, 1)), "reaches to element more than 2^63"),
    "a negative offset": (tensor((3,), (1,), -2), "negative or fractional size"),
    "a negative stride": (tensor((3,), (-1,)), "negative or fractional size"),
    "a storage of 2^66 numbers": (tensor((3,), (1,), 0, 2**66), "has 48 bytes, not more than 2^63"),
    "a storage that is not there": (tensor((3,), (1,), 0, 12, "9"), "damaged"),
}


@pytest.mark.parametrize("case", TENSORS)
def test_a_tensor_is_compared_with_its_storage_before_it_is_made(tmp_path, case):
    made, message = TENSORS[case]
    assert message in line(zip_of(tmp_path / "a.pth", {"w": made}))


def test_the_stride_of_a_single_row_may_be_anything(tmp_path):
    path = zip_of(tmp_path / "a.pth", {"w": tensor((1, 3), (2**62, 1), 2)})
    assert files.read(path)[0]["w"].shape == (1, 3)


def test_a_storage_that_tensors_share_is_read_once(tmp_path):
    """A hundred tensors that each have all of it would be a hundred times the file when they are copied."""
    storage, asked = torch_files.Storage("0", np.dtype("<f4"), 12), []
    views = {f"w{i}": torch_files.Tensor(storage, i, (2, 3), (3, 1)) for i in range(3)}
    checkpoint = torch_files.Checkpoint(None, lambda s: asked.append(s) or np.arange(12, dtype="<f4").tobytes(), 99)
    assert checkpoint.arrays(views)["w2"].tolist() == [[2, 3, 4], [5, 6, 7]]
    assert asked == [storage]
    numel = 2**19
    shared = {f"w{i}": tensor((numel,), (1,), 0, numel) for i in range(100)}
    assert "they repeat its numbers" in line(zip_of(tmp_path / "a.pth", shared, numel))


def members(path: Path, numel: int, **options) -> Path:
    with zipfile.ZipFile(path, "w", **options) as archive:
        archive.writestr("a/data.pkl", b"\x80\x02}" + text("w") + tensor((numel,), (1,), 0, numel) + b"s.")
        archive.writestr("a/data/0", bytes(4 * numel))
    return path


def test_parts_of_a_zip_file_are_no_larger_than_the_file(tmp_path):
    """Deflated zeros are a thousandth of what they become; other parts name sizes that they do not have."""
    assert "compressed zip file" in line(members(tmp_path / "a.pth", 2**20, compression=zipfile.ZIP_DEFLATED))
    whole = members(tmp_path / "b.pth", 3).read_bytes()
    entry = whole.rindex(b"PK\x01\x02")  # the storage's, in the central directory: sizes at 20 and 24
    for size in (2**31, 2**32 - 2):
        for at in ((20, 24), (24,), (20,)):
            data = bytearray(whole)
            for offset in at:
                data[entry + offset : entry + offset + 4] = struct.pack("<I", size)
            (tmp_path / "b.pth").write_bytes(data)
            assert "parts have more bytes than the file" in line(tmp_path / "b.pth")


def test_the_directory_of_a_zip_file_is_bounded(tmp_path):
    """Each of its entries, of 47 bytes, becomes an object of 600."""
    path, count = tmp_path / "a.pth", 2**18
    whole = members(path, 3).read_bytes()
    start = whole.index(b"PK\x01\x02")
    one = b"PK\x01\x02" + bytes(24) + struct.pack("<H", 1) + bytes(16) + b"x"
    end = b"PK\x05\x06" + bytes(4) + struct.pack("<HHIIH", 0xFFFF, 0xFFFF, count * len(one), start, 0)
    path.write_bytes(whole[:start] + one * count + end)
    assert f"whose directory has {count * len(one)} bytes, more than the" in line(path)


def test_storages_of_the_older_format_are_no_larger_than_the_file(tmp_path):
    state = {"a": np.arange(12, dtype=np.float32)}
    good = write_legacy(tmp_path / "a.pth", state).read_bytes()
    last = good.rindex(struct.pack("<q", 14))
    assert files.read(tmp_path / "a.pth")[0]["a"].shape == (12,)
    for numel in (2**40, -1):  # also in the pickle, so that both agree
        data = good.replace(b"J" + struct.pack("<i", 14), b"\x8a\x09" + numel.to_bytes(9, "little", signed=True))
        data = data[: data.rindex(struct.pack("<q", 14))] + struct.pack("<q", numel) + good[last + 8 :]
        (tmp_path / "a.pth").write_bytes(data)
        assert ("cut short" if numel > 0 else "negative") in line(tmp_path / "a.pth")
    keys = pickle.dumps(["0"], protocol=2)
    assert keys in good
    bomb = b"\x80\x02](" + KNOT + b"e."
    (tmp_path / "a.pth").write_bytes(good.replace(keys, bomb))
    assert "not listed by name" in line(tmp_path / "a.pth")


def safetensors_of(path: Path, header: object, data: bytes = b"") -> Path:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)
    return path


def entry(shape, end: int, **more) -> dict:
    return {"dtype": "F32", "shape": shape, "data_offsets": [0, end]} | more


HEADERS = {
    "zero beside huge sizes": ({"w": entry([0, 2**62, 2**62], 0), "x": entry([1], 4)}, "which no array has"),
    "too many dimensions": ({"w": entry([1] * 99, 4)}, "which no array has"),
    "an overflow": ({"w": entry([2**62, 8], 4)}, "damaged"),
    "a backward offset": ({"w": entry([1], 4, data_offsets=[4, 0])}, "damaged"),
    "lists 5,000 deep": (b'{"w":' + b"[" * 5_000, "damaged"),
    "a number of 5,000 digits": (
        b'{"w":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,4]}}',
        "damaged",
    ),
    "a list": (b"[1]", "begins with|damaged"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_header_of_safetensors_ends_in_one_line(tmp_path, case):
    header, message = HEADERS[case]
    said = line(safetensors_of(tmp_path / "a.safetensors", header, bytes(4)))
    assert any(words in said for words in message.split("|")), said


def test_a_header_is_no_larger_than_it_need_be(tmp_path):
    path = tmp_path / "a.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 90 << 20) + b"{")
        file.truncate(91 << 20)  # a hole: takes no disk
    assert "its header has 94371840 bytes" in line(path)


def test_names_in_a_line_are_few_and_short(tmp_path):
    path = tmp_path / "a.safetensors"
    assert "is longer than the 500 characters" in line(safetensors_of(path, {"a" * 10_000: entry([1], 4)}, bytes(4)))
    state = random_state("vit", vit(192, 2, 4, 4))
    other = {f"{'b' * 400}{i}": state["cls_token"] for i in range(20)}
    for broken, lists in (({"cls_token"}, 1), ({n for n in state if "mlp" in n}, 2)):
        files.write(path, {n: a for n, a in state.items() if n not in broken} | other, {})
        said = line(path, weights.load, 2000)
        assert (
            "missing " in said and "not used bbb" in said and said.count(" more") == lists and said.count("b...") == 5
        )


def test_names_are_not_looked_for_one_by_one():
    """A header of the largest size has 50,000: compared with each other they would take an hour."""

    class Names(list):
        def __contains__(self, name: object) -> bool:
            raise AssertionError("searched from the beginning")

    names = Names(f"blocks.{i}.attn.qkv.weight" for i in range(9))
    assert "blocks.8.norm1.bias" in rules.match(FAMILIES["timm_vit"], names).missing


def test_metadata_as_deep_as_python_cannot_go_is_damaged(tmp_path):
    metadata = {"crate_jax": "[" * 5_000}
    path = safetensors_of(tmp_path / "a.safetensors", {"__metadata__": metadata, "w": entry([1], 4)}, bytes(4))
    assert "its metadata 'crate_jax' is damaged" in line(path, weights.load)


def test_an_array_without_numbers_is_named(tmp_path):
    for name in ("cls_token", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight"):
        for axis in range(3):
            state = random_state("vit", vit(192, 1, 4, 4))
            empty = state[name]
            if axis >= empty.ndim:
                continue
            state[name] = empty[tuple(slice(0) if a == axis else slice(None) for a in range(empty.ndim))]
            files.write(tmp_path / "a.safetensors", state, {})
            assert f"weights: arrays without numbers, {name}" in line(tmp_path / "a.safetensors", weights.load)


TIMM = {
    "architecture": "vit_tiny_patch16_224",
    "model_args": {"num_heads": 3},
    "pretrained_cfg": {"input_size": [3, 28, 20], "mean": [0.4, 0.5, 0], "std": [0.2, 0.3, 1],
                       "interpolation": "bilinear", "crop_pct": 0.9},
}  # fmt: skip
TRANSFORMERS = {
    "model_type": "vit_mae", "num_attention_heads": 3, "decoder_num_attention_heads": 2, "image_size": [28, 20],
    "norm_pix_loss": True, "mask_ratio": 0.8, "hidden_act": "gelu", "layer_norm_eps": 1e-12,
}  # fmt: skip
IMAGES = {"image_mean": [0.4, 0.5, 0], "image_std": [0.2, 0.3, 1], "resample": 2}
JUNK = (
    None, True, False, 0, -1, 3, 10**30, 1.5, -0.1, float("nan"), float("inf"), 1e300, "", "3", "a\nb", [], [3],
    [3, -4, 5], [3, "a", 5], [3, [4], 5], [None] * 3, [0.1, 0.2, float("nan")], [10**400] * 3, {}, {"a": 1}, [[[]]],
    "x" * 100_000,
)  # fmt: skip


def test_what_a_config_beside_says_is_read(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TIMM))
    read = beside.hints(tmp_path)
    assert (read.heads, read.architecture, read.image_size) == (3, "vit_tiny_patch16_224", (28, 20))
    assert (read.mean, read.std) == ((0.4, 0.5, 0), (0.2, 0.3, 1))
    (tmp_path / "config.json").write_text(json.dumps(TRANSFORMERS))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(IMAGES))
    read = beside.hints(tmp_path)
    assert (read.heads, read.decoder_heads, read.image_size, read.mask_ratio) == (3, 2, (28, 20), 0.8)
    assert (read.mean, read.std, read.target) == ((0.4, 0.5, 0), (0.2, 0.3, 1), "patch_normalised")


def test_relatives_of_vit_in_transformers_are_read_by_the_same_keys(tmp_path):
    """vit_msn, say, whose tensors are named as ViT's: its heads are not those of ViT-S; timm's wrapper is timm's."""
    (tmp_path / "config.json").write_text(json.dumps(TRANSFORMERS | {"model_type": "vit_msn"}))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(IMAGES))
    read = beside.hints(tmp_path)
    assert (read.heads, read.image_size, read.mean) == (3, (28, 20), (0.4, 0.5, 0))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "layer_norm_eps": 0.1}))
    assert beside.hints(tmp_path) == beside.Hints()  # not of a model with heads
    (tmp_path / "config.json").write_text(json.dumps(TIMM | {"model_type": "timm_wrapper", "num_attention_heads": 7}))
    assert beside.hints(tmp_path).heads == 3


def test_another_interpolation_is_a_warning(tmp_path, caplog):
    (tmp_path / "config.json").write_text(json.dumps(TIMM | {"pretrained_cfg": {"interpolation": "lanczos"}}))
    assert beside.hints(tmp_path).interpolation is None
    (tmp_path / "config.json").write_text(json.dumps(TRANSFORMERS))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(IMAGES | {"resample": 1}))
    assert beside.hints(tmp_path).interpolation is None
    assert caplog.messages == [
        f"{file} beside it has {said}, which is not supported (bilinear, bicubic are): bicubic is used"
        for file, said in (("config.json", 'interpolation="lanczos"'), ("preprocessor_config.json", "resample=1"))
    ]


def test_a_config_beside_of_other_types_is_one_line(tmp_path):
    """Whatever stands in the place of a value, its hint is of the right type, or the error names key and value."""
    refused = 0
    places = [(TIMM, (key,)) for key in TIMM] + [(TRANSFORMERS, (key,)) for key in TRANSFORMERS]
    places += [(TIMM, (section, key)) for section in ("model_args", "pretrained_cfg") for key in TIMM[section]]
    places += [(IMAGES, (key,)) for key in IMAGES]
    for about, (*section, key) in places:
        for junk in JUNK:
            changed = copy.deepcopy(about)
            (changed[section[0]] if section else changed)[key] = junk
            files_of = (
                {"config.json": TRANSFORMERS, "preprocessor_config.json": changed}
                if about is IMAGES
                else {"config.json": changed}
            )
            for name, content in files_of.items():
                (tmp_path / name).write_text(json.dumps(content))
            try:
                read = beside.hints(tmp_path)
            except ConfigError as e:
                refused += 1
                said = str(e)
                assert f" has {key}=" in said and "must be " in said and "\n" not in said and len(said) < 400
                continue
            sizes = (read.heads, read.decoder_heads, *(read.image_size or ()))
            assert all(size is None or (type(size) is int and 1 <= size <= 2**14) for size in sizes)
            numbers = (*(read.mean or ()), *(read.std or ()), *([] if read.mask_ratio is None else [read.mask_ratio]))
            assert all(abs(number) < 1e9 for number in numbers) and min(read.std or (1,)) > 0
            assert read.architecture is None or isinstance(read.architecture, str)
            assert read.interpolation in (None, "bicubic", "bilinear")
            assert read.eval_crop is None or 0 < read.eval_crop <= 1
    assert refused > 200
    for name in ("config.json", "preprocessor_config.json"):
        for content in (b"[" * 100_000, b"\xff", b"", b"3", b"9" * 5000, b'{"model_type": "vit"}' + b" " * 2**21):
            (tmp_path / name).write_bytes(content)
            beside.hints(tmp_path)
        (tmp_path / name).unlink()
        os.mkfifo(tmp_path / name)
        beside.hints(tmp_path)


@pytest.mark.parametrize(
    ("said", "line"),
    [
        ({"hidden_act": "gelu", "layer_norm_eps": 1e-12}, ""),
        ({"hidden_act": "gelu_python", "layer_norm_eps": 1e-5}, ""),
        ({"hidden_act": "relu"}, 'config.json beside it has hidden_act="relu": must be gelu, which an encoder here '),
        ({"hidden_act": "quick_gelu"}, 'has hidden_act="quick_gelu": must be gelu'),
        ({"layer_norm_eps": 2e-5}, "config.json beside it has layer_norm_eps=2e-05: must be above 0, at most 1e-05"),
        ({"layer_norm_eps": 0}, "has layer_norm_eps=0: must be above 0"),
    ],
)
def test_what_an_encoder_here_does_not_compute_is_one_line(tmp_path, said, line):
    (tmp_path / "config.json").write_text(json.dumps(TRANSFORMERS | said))
    if not line:
        assert beside.hints(tmp_path).heads == 3
        return
    with pytest.raises(ConfigError, match=re.escape(line)):
        beside.hints(tmp_path)


def test_a_config_beside_is_named_with_the_weights(tmp_path):
    files.write(tmp_path / "a.safetensors", random_state("vit", vit(192, 1, 4, 4)), {})
    (tmp_path / "config.json").write_text(json.dumps(TIMM | {"model_args": {"num_heads": [3]}}))
    said = line(tmp_path / "a.safetensors", weights.load)
    assert said == "config.json beside it has num_heads=[3]: must be a whole number from 1 to 16384"


@pytest.mark.one_python
def test_many_networks_are_not_compared_with_each_other(tmp_path):
    names = [f"net{i}.layer1.0.conv1.weight" for i in range(3000)]
    with pytest.raises(ConfigError, match="holds 3000 networks"):
        branches.find(dict.fromkeys(names, np.empty(0)))
    inner = b"}(" + text("layer1.0.conv1.weight") + tensor((1,), (1,)) + b"u"
    body = b"}(" + b"".join(text(f"n{i}") + inner for i in range(3000)) + b"u"
    path = zip_of(tmp_path / "a.pth", {"a": body})
    assert "holds several networks" in line(path)
    names = b"".join(text(f"{i:06}") + b"N" for i in range(20_000))  # no tensors: to be looked through once
    assert "and 19995 more" in line(write_zip(tmp_path / "a.pth", None, b"\x80\x02}(" + names + b"u."))


def test_what_no_weight_has_is_left_out(tmp_path):
    """A name of 501 characters and keys that are not names do not keep the rest from being read."""
    odd = b"}(" + text("w") + tensor((3,), (1,)) + text("a" * 501) + b"N" + b"(K\x01K\x02tN" + b"NNu"
    read, _ = files.read(zip_of(tmp_path / "a.pth", {"model": odd}))
    assert list(read) == ["w"]

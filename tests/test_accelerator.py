"""benchmarks.accelerator: what fails costs only itself, what is there is not done again, numbers are what they say."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from benchmarks.accelerator import (
    cifar,
    clock,
    exact,
    kernel_times,
    kernels,
    parts,
    profile,
    questions,
    runner,
    table,
    tune,
)
from benchmarks.accelerator.kernels import Attention
from benchmarks.accelerator.parts import ALL, MACHINE, PARTS, Part, Settings
from crate_jax.errors import DataError, UserError
from crate_jax.jobs.sweep import expand
from crate_jax.models import gpu_attention, tpu_attention
from crate_jax.parallel.sharding import BATCH
from tests.conftest import ROOT

pytestmark = pytest.mark.one_python

# Stands in for benchmarks.accelerator.child: what a case does is in its name.
CHILD = """
import json, os, signal, sys, time
part, settings, *names = sys.argv[1:]
settings = json.loads(settings)
def say(**event): print(json.dumps(event), flush=True)
for name in names:
    say(case=name)
    open(os.path.join(settings["out"], "started"), "a").write(name + "\\n")
    if name == "machine":
        versions = {"jax": "0.7"}
        say(case=name, row={"device": os.environ["CARD"], "devices": 1, "platform": "gpu", "runtime": "driver 5",
                            "versions": versions, "python": "3", "cores": 7})
    elif "crash" in name:
        print("it is broken", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGSEGV)
    elif "hang" in name:
        time.sleep(600)
    elif "bad" in name:
        say(case=name, row={"failed": "ValueError: no"})
        break
    elif "absent" in name:
        say(case=name, row={"absent": "torch not installed"})
    else:
        say(case=name, row={"ms": 7.0, "pid": os.getpid(), "wrong": 1, **({"ok": False} if "wrong" in name else {})})
"""


@dataclasses.dataclass(frozen=True)
class Fake(Part):
    names: tuple[str, ...] = ()

    def cases(self, name, settings):
        if not self.names:
            raise ImportError("no such module")
        return dict.fromkeys(self.names)


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Runs parts whose cases are named, {part: (names, limit, alone)}; returns whether all is well."""
    monkeypatch.setattr(runner, "START", 20.0)
    monkeypatch.setenv("CARD", "H7")
    monkeypatch.setattr(runner, "command", lambda *a: [sys.executable, "-c", CHILD, a[0], as_json(a[1]), *a[2]])

    def run(parts, minutes=2.0, **settings):
        parts = {name: Fake("", limit, 0.5, alone, names=names) for name, (names, limit, alone) in parts.items()}
        monkeypatch.setattr(runner, "PARTS", parts)
        monkeypatch.setattr(runner, "ALL", {MACHINE: ALL[MACHINE], **parts})
        (tmp_path / "started").write_text("")
        return runner.run(Settings(str(tmp_path), **settings), minutes, list(parts), lambda rows: None)

    return run


def as_json(settings):
    return json.dumps(dataclasses.asdict(settings))


def started(folder):
    return (folder / "started").read_text().split()[1:]  # without the machine


def rows(folder, part):
    return json.loads((folder / f"{part}.json").read_text())["rows"]


def test_what_fails_crashes_or_hangs_costs_only_its_own_case(command, tmp_path, capfd):
    names = ("a", "bad", "b", "crash", "c", "hang", "d")
    assert not command({"empty": ((), 1.0, False), "one": (names, 1.0, False), "two": (("e", "f"), 9.0, True)})
    found = rows(tmp_path, "one")
    assert list(found) == list(names) and started(tmp_path) == [*names, "e", "f"]
    assert {name for name, row in found.items() if row.get("ms") == 7.0} == set("abcd")
    assert len({found[name]["pid"] for name in "abcd"}) == 4  # a process ends with a case that fails
    assert found["bad"]["failed"] == "ValueError: no"
    assert found["crash"]["failed"] == "its process ended with signal SIGSEGV: it is broken"
    assert found["hang"]["failed"] == "killed after 1 s" and 1 <= found["hang"]["seconds"] < 9
    alone = rows(tmp_path, "two")
    assert alone["e"]["pid"] != alone["f"]["pid"]
    lines = capfd.readouterr().err.splitlines()
    assert lines[0] == "empty: failed: ImportError: no such module"
    assert [line.split(": ")[0] for line in lines[1:]] == ["one/bad", "one/crash", "one/hang"]
    assert all(line.endswith(f"see {tmp_path}/one.log") for line in lines[1:])


def test_the_same_command_does_only_what_is_missing(command, tmp_path):
    parts = {"one": (("a", "absent", "bad"), 9.0, False), "two": (("b", "wrong"), 9.0, False)}
    assert not command(parts)
    assert not json.loads((tmp_path / "one.json").read_text())["finished"]
    assert json.loads((tmp_path / "two.json").read_text())["finished"]
    assert not command(parts)
    assert started(tmp_path) == ["absent", "bad"]  # again: torch may be there now
    more = {"one": (("a", "absent", "new"), 9.0, False), "two": (("b",), 9.0, False)}
    assert command(more)
    assert started(tmp_path) == ["new", "absent"]  # what was never tried comes first
    assert list(rows(tmp_path, "one")) == ["a", "absent", "new"]
    assert command(more, batch=64)
    assert started(tmp_path) == ["a", "absent", "new", "b"]  # other numbers
    (tmp_path / "two.json").write_text('{"rows": ')
    assert command(more, batch=64) and started(tmp_path) == ["b", "absent"]


def test_it_stops_in_time_and_says_what_is_left(command, tmp_path, capfd):
    assert not command({"one": (("a", "hang", "b"), 300.0, False), "two": (("c",), 9.0, False)}, minutes=0.1)
    assert list(rows(tmp_path, "one")) == ["a"]  # the end of the time is no failure of the case
    err = capfd.readouterr().err
    assert "one: no time left for hang, b; the same command goes on with it" in err and "two: no time left for c" in err
    assert not (tmp_path / "two.json").exists()


def test_cases_that_share_the_rest_of_the_time_leave_the_others_their_part(command, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "START", 0.0)
    assert not command({"rest": (("hang", "b"), 0, True), "one": (("a",), 9.0, False)}, minutes=0.12)
    assert started(tmp_path) == ["a", "hang", "b"]  # the rest comes last
    assert (
        rows(tmp_path, "rest")["hang"]["failed"].startswith("killed after ") and rows(tmp_path, "rest")["b"]["ms"] == 7
    )


def test_a_folder_holds_the_numbers_of_one_card(command, tmp_path, monkeypatch):
    assert command({"one": (("a",), 9.0, False)})
    monkeypatch.setenv("CARD", "H8")
    with pytest.raises(
        UserError, match=r"--out=.*: holds numbers of 1 x H7, but this machine has 1 x H8; give another"
    ):
        command({"one": (("a",), 9.0, False)})
    assert rows(tmp_path, "one")["a"]["ms"] == 7.0
    monkeypatch.delenv("CARD")
    with pytest.raises(UserError, match="no device to measure: its process ended with status 1: KeyError: 'CARD'; see"):
        command({"one": (("a",), 9.0, False)})


def test_times_are_medians_of_windows_without_the_warm_up():
    """A clock that a call moves: 9 and 5 s to compile, then 0.5 s, but 3.5 s in one window."""
    at, calls = [0.0], iter([9.0, 5.0, *[0.5] * 3, *[0.5] * 4, *[0.5 + 3] * 4, *[0.5] * 4])
    waited = []

    def call():
        at[0] += next(calls)
        return at[0]

    found = clock.timed(call, seconds=2.0, windows=3, block=waited.append, now=lambda: at[0])
    # One call, and then two, find out how many fill a window.
    assert found == {"ms": 500.0, "ms_range": [500.0, 3500.0], "calls": 4} and next(calls, None) is None
    assert waited[0] == 9.0 and len(waited) == 2 + 2 + 3


@pytest.mark.parametrize(("parts", "biased"), [(1, False), (3, True)])
def test_exact_attention_has_the_gradients_of_its_result(parts, biased):
    rng = np.random.default_rng(0)
    x, g, bias = (rng.normal(size=s) for s in ((2, 5, parts * 6), (2, 5, 6), (2, 5, 5)))
    bias = bias if biased else None
    found = exact.attention(x, bias, g, 2, parts)
    value = lambda x, bias: np.sum(exact.attention(x, bias, g, 2, parts)["y"] * g)  # noqa: E731
    direction, step = rng.normal(size=x.shape), 1e-5
    slope = (value(x + step * direction, bias) - value(x - step * direction, bias)) / (2 * step)
    np.testing.assert_allclose(np.sum(found["dx"] * direction), slope, rtol=1e-7)
    w = x.reshape(2, 5, parts, 2, 3)[:, :, -1]
    assert found["y"].shape == (2, 5, 6) and np.abs(found["y"]).max() <= np.abs(w).max()  # means of values
    if biased:
        direction = rng.normal(size=bias.shape)
        slope = (value(x, bias + step * direction) - value(x, bias - step * direction)) / (2 * step)
        np.testing.assert_allclose(np.sum(found["dbias"] * direction), slope, rtol=1e-7)


def test_kernels_are_right_by_their_distance_from_float64():
    true = {"y": np.array([1.0, -4.0, 2.0, 2.0])}
    plain = {"y": np.array([1.0, -4.02, 2.0, 2.0])}

    def judged(*y: float):
        return kernels.judged(true, {"y": np.array(y)}, plain)

    found = judged(1.007, -4.0, 2.0, 2.0)
    assert found["ok"] and found["plain_errors"]["y"] == pytest.approx(0.005)
    assert found["errors"]["y"] == pytest.approx(0.007 / 4) and found["rms_errors"]["y"] == pytest.approx(0.007 / 8)
    assert not judged(1.009, -4.0, 2.0, 2.0)["ok"]  # 1.1e-3 on the whole
    many = {"y": np.full(2000, 4.0)}
    assert kernels.judged(many, {"y": many["y"] + 0.03 * (np.arange(2000) == 7)}, many)["ok"]
    assert not kernels.judged(many, {"y": many["y"] + 0.05 * (np.arange(2000) == 7)}, many)["ok"]  # one is far off
    assert not judged(1.0, np.nan, 2.0, 2.0)["ok"]


def test_the_kernels_agree_in_interpret_mode():
    case = kernels.Attention(8, 5, 2, 64, dtype="float32")
    assert kernels.compare_attention(case, tpu_attention.attend, True)["ok"]
    twice = lambda *a: 2.0 * tpu_attention.attend(*a)  # noqa: E731
    assert not kernels.compare_attention(case, twice, True)["ok"]


def test_awkward_shapes_are_among_the_cases():
    for platform, widths, batch, types in (("gpu", {32, 64, 80}, 1, {"bfloat16"}), ("tpu", {32, 64}, 8, {"float32"})):
        settings = Settings("", platform=platform)
        found = {n: f for part in ("parity", "parity_more") for n, f in PARTS[part].cases(part, settings).items()}
        shapes = [f.args[0] for n, f in found.items() if isinstance(f.args[0], kernels.Attention)]
        assert {s.tokens for s in shapes} == {5, 197, 577} and {s.width for s in shapes} == widths
        assert min(s.images for s in shapes) == batch and {s.dtype for s in shapes} == {"bfloat16", *types}
        assert {(s.parts, s.biased) for s in shapes if s.tokens == 577} == {(1, False), (3, False), (3, True)}
        if platform == "tpu":
            device = AbstractDevice(device_kind="TPU v5e", num_cores=1, platform=platform)
            mesh = AbstractMesh((1, 1), BATCH, axis_types=(AxisType.Auto,) * 2, abstract_device=device)
            with jax.sharding.use_abstract_mesh(mesh):
                for s in shapes:
                    bias = np.zeros((1, s.heads, s.tokens, s.tokens)) if s.biased else None
                    E = s.heads * s.width
                    assert tpu_attention.fits(s.images, s.tokens, s.heads, E, s.parts, s.dtype, bias), s
        else:
            assert sum(isinstance(f.args[0], kernels.Norm) for f in found.values()) == 3


@dataclasses.dataclass
class Program:
    """Stands in for a kernel with some tiles."""

    ms: float
    y: float = 1.0
    error: str = ""

    def __call__(self):
        if self.error:
            raise ValueError(self.error)
        return {"y": np.array([0.5, -4.0]), "dx": np.array([2.0, 8.0 * self.y])}


def test_tiles_that_fail_or_are_wrong_are_not_the_best_and_cost_only_themselves(monkeypatch):
    monkeypatch.setattr(tune, "timed", lambda program, **_: {"ms": program.ms})
    programs = {"a": Program(0.7), "b": Program(0.1, error="shared memory"), "c": Program(0.2, y=1.06)}
    found = tune.trials(programs | {"d": Program(0.6, y=1.04), "e": Program(0.9)})
    assert found["best"] == "d" and list(found["tried"]) == list("abcde")
    assert found["tried"]["b"] == {"refused": "ValueError: shared memory"}
    assert found["tried"]["d"] == {"ms": 0.6, "differs_by": pytest.approx(0.04)}
    with pytest.raises(RuntimeError, match="no tile runs: ValueError: shared memory"):
        tune.trials({"b": programs["b"]})


def test_tiles_are_varied_one_kernel_at_a_time():
    default = gpu_attention.tiles_for(64, 3)
    for kernel in tune.KERNELS:
        first, *others = tune.choices(default, kernel, tune.TILES, tune.SUMS)
        assert first == default and len(set(others)) == len(others) > 7 and default not in others
        varied = {f.name for t in others for f in dataclasses.fields(t) if getattr(t, f.name) != getattr(first, f.name)}
        assert varied == {kernel, *["sums"] * (kernel == "bias")}
    assert tune.cases("tune", Settings("", platform="tpu")) == {}
    assert list(tune.cases("tune", Settings("", platform="gpu")))[:2] == [
        "ROPIM ViT-B, bias: forward",
        "ROPIM ViT-B, bias: first",
    ]


def test_a_profile_sums_kernels_by_kind_and_what_is_between_them():
    """Two steps of a product beside a copy, a pause of 2 ms, and a fusion, in ns."""
    ms = 1e6
    names = ("nvjet_tst_128x128", "memcpy32_post", "loop_add_fusion_3")
    spans = ((0.0, 5.0), (4.0, 3.0), (9.0, 1.0))
    events = [(name, (start + at) * ms, length * ms) for name, (at, length) in zip(names, spans, strict=True)
              for start in (20.0, 31.0)]  # fmt: skip
    found = profile.summed(events, 2)
    assert (found["span_ms"], found["busy_ms"]) == (10.5, 8.0)
    assert list(found["kinds"].items())[0] == ("product", {"ms": 5.0, "kernels": 1.0})
    assert found["kinds"]["other"] == {"ms": 1.0, "kernels": 1.0}
    assert found["top"][1] == ["memcpy32_post", "copy", 3.0, 1.0]
    with pytest.raises(RuntimeError, match="recorded nothing"):
        profile.summed([], 2)
    text = table.profile({"profile": {"crate_mae_b": found, "vit_mae_b": {"failed": "x"}}})
    assert text.splitlines()[-1] == "| crate_mae_b | 10.50 | 2.50 | 5.00 (1) | 3.00 (1) | 1.00 (1) |"


@pytest.mark.slow
def test_jaxs_kernel_leaves_padded_tokens_out():
    case = Attention(1, 70, 2, 16, 3, dtype="float32")
    arrays = case.draw()
    more = kernel_times.padded(arrays, 58)
    y = kernel_times.triton(*more[:2], 2, 3, tokens=70, interpret=True)
    expected = kernels.plain(*arrays[:2], 2, 3)
    np.testing.assert_allclose(y[:, :70], expected, rtol=1e-4, atol=1e-5)
    biases = kernel_times.padded((arrays[0], jnp.ones((2, 70, 70)), arrays[2]), 2)
    assert [a.shape for a in biases] == [(1, 72, 96), (2, 72, 72), (1, 72, 32)]


def test_the_table_compares_and_leaves_out_what_is_not_there():
    ours = {
        "batch": 128, "ms": 40.0, "images_per_sec": 3200.0, "model_flops_per_image": 5e10, "peak_bytes": 7.5e9,
        "attention": "Triton kernels", "compiled": {"flops": 6e12, "bytes": 9e10},
    }  # fmt: skip
    machine = {
        "device": "H7", "devices": 2, "runtime": "", "nvidia_smi": "H7, 580.1", "python": "3.12", "cores": 16,
        "versions": {"jax": "0.11", "torch": ""},
    }  # fmt: skip
    times = {
        "with_gradients_flops": 3e11, "ours": {"forward_ms": 0.5, "with_gradients_ms": 1.25, "differs_by": 0.01},
        "xla": {"refused": "x"}, "cudnn": {"forward_ms": 0.25, "with_gradients_ms": 1.0, "differs_by": 0.07},
    }  # fmt: skip
    by_old = {"jax": "0.10", "torch": "", "cards": "H7, 570"}
    by_now = {"jax": "0.11", "torch": "", "cards": "H7, 580.1"}
    tried = {"a": {"ms": 0.5, "differs_by": 0.0}, "b": {"ms": 0.4, "differs_by": 0.01}, "c": {"refused": "no"}}
    text = table.markdown(
        {
            MACHINE: {MACHINE: machine},
            "peak": {"matmul": {"flops": 4e14, "by": by_old}, "bandwidth": {"bytes_per_s": 3e12, "by": by_now}},
            "crate_mae_b": {"ours": ours, "pytorch": {"images_per_sec": 1000.0}},
            "ropim_vit_b": {"ours": {"failed": "OutOfMemory: a | b"}},
            "vit_mae_b": {},
            "kernel_times": {"MSSA, B": times},
            "tune": {"MSSA: first": {"default": "a", "best": "b", "tried": tried}},
            "parity": {"MSSA": {"errors": {"y": 0.02, "dx": 0.001}, "plain_errors": {"y": 0.5, "dx": 1}, "ok": False}},
        }
    )
    assert text.startswith("2 x H7 (H7, 580.1); jax 0.11; Python 3.12; 16 cores.")
    # Of two devices' peak 3200 * 5e10 / 8e14. Bytes take 30 ms, FLOPs 15. PyTorch has one device, ours 1600 on each.
    row = "| crate_mae_b | 128 | 3200 | 40.00 | 20.0% | 75.0% | 7.5 | - | 1000 | - | 1.60 | Triton kernels |"
    assert row in text.splitlines()
    assert "| MSSA | y 2.0e-02, dx 1.0e-03 | 5.0e-01, 1.0e+00 | NO |" in text
    assert "| ropim_vit_b: ours | failed | OutOfMemory: a / b |" in text
    assert "| MSSA, B | 0.500 / 1.250 | - / - | 0.250 / 1.000 WRONG | - / - | - / - | 60.0% |" in text
    assert "| MSSA: first | a: 0.500 | b: 0.400 | 1 |" in text
    assert "other versions" in text and "| peak: matmul | jax 0.10, cards H7, 570 |" in text
    assert "vit_mae_b" not in text and "CIFAR" not in text and "| bfloat16 products, TFLOP/s | 400 |" in text


def test_an_npz_becomes_a_folder(tmp_path):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (13, 4, 5, 3), np.uint8), np.arange(13) % 3
    np.savez(tmp_path / "a.npz", images=images, labels=labels)
    source = cifar.unpack(tmp_path / "a.npz", tmp_path / "a")
    assert len(list((source / "train").glob("*/*.bmp"))) == 11 and len(list((source / "test").glob("*/*.bmp"))) == 2
    c = cifar.configured("so", source, Settings(""))
    assert c.penalty.name == "so" and c.penalty.weight == 1e-6
    train = cifar.data.open_split(c, "train")
    assert any(np.array_equal(train.read(0), x) for x in images[labels == 0])
    assert cifar.configured("none", source, Settings("")).penalty.name == "none"
    np.savez(tmp_path / "b.npz", images=images, labels=labels, test_images=images[:2], test_labels=labels[:2])
    source = cifar.unpack(tmp_path / "b.npz", tmp_path / "a")
    assert len(list((source / "train").glob("*/*.bmp"))) == 13 and len(list((source / "test").glob("*/*.bmp"))) == 2
    np.savez(tmp_path / "c.npz", images=images[0], labels=labels)
    with pytest.raises(
        DataError, match=r"c\.npz: images is uint8 \(4, 5, 3\) and labels is int64 \(13,\); they must be"
    ):
        cifar.unpack(tmp_path / "c.npz", tmp_path / "c")
    np.savez(tmp_path / "d.npz", x=images)
    with pytest.raises(DataError, match=r"d\.npz: images is missing and labels is missing; they"):
        cifar.unpack(tmp_path / "d.npz", tmp_path / "d")


def test_the_second_run_on_cifar_has_the_steps_of_the_first(tmp_path):
    settings, path = Settings(str(tmp_path), data="/d"), tmp_path / "cifar10.json"
    assert cifar.earlier(path, settings) is None
    rows = {"so": {"steps": 700, "planned_rate": 9.0}, "none": {"failed": "x"}}
    path.write_text(json.dumps({"settings": runner.key_of("cifar10", settings), "rows": rows}))
    assert cifar.earlier(path, settings) == (700, 9.0)
    assert cifar.earlier(path, dataclasses.replace(settings, data="/e")) is None


@pytest.mark.parametrize("name", questions.QUESTIONS)
def test_each_question_is_a_sweep_of_three_seeds(name, tmp_path):
    config = questions.configured(name, tmp_path, tmp_path / "pairs", Settings(str(tmp_path)))
    settings = expand(config)
    assert {s.seed for s in settings} == {0, 1, 2} and len(settings) == 3 * len(config.sweep["values"])
    assert all(s.config.data.source == f"folder:{tmp_path}" and s.config.steps == 4700 for s in settings)
    assert bool(config.sweep.judge) == name.endswith(("RATIO", "RATIO2"))


def test_joint_embedding_of_a_crate_differs_from_its_reconstruction_in_the_method_only(tmp_path):
    """The encoder, its optimiser, the images, steps and batch are the same."""
    names = ("O-MAE, CRATE", "X-CRATE, MoCo v3", "X-CRATE, VIbCReg")
    mask, *joint = (questions.configured(n, tmp_path, tmp_path, Settings("")) for n in names)
    for c in joint:
        for section in ("encoder", "optimizer"):
            assert {k for k, v in c[section].items() if v != mask[section][k]} <= {
                "decay_exclude", "warmup_peak", "trust_coefficient", "clip_lr", "stage_width"
            }  # fmt: skip
        assert all(c[key] == mask[key] for key in ("batch_size", "steps", "seed"))
    assert "questions" not in parts.DEFAULT  # it takes hours


def test_means_over_seeds_are_shown_with_their_intervals():
    runs = [{"value": "so", "seed": i, "knn_top1": x} for i, x in enumerate((0.25, 0.26))]
    values = questions.summary([*runs, {"value": "none", "knn_top1": 0.5, "probe_top1": None}])
    assert values == {"so": {"knn_top1": [25.5, 19.15, 31.85]}, "none": {"knn_top1": [50.0]}}
    values = {"so": {"knn_top1": [25.5, 19.2, 31.8]}, "none": {"knn_top1": [50.0]}}
    text = table.questions({"questions": {"R-L1": {"values": values}}})
    assert "| 25.5 [19.2, 31.8] |" in text and "| 50.0 |" in text


@pytest.mark.slow
@pytest.mark.parametrize("only", [("peak",), parts.DEFAULT])
def test_the_command_runs_on_a_cpu(only, cli_env, tmp_path):
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "a.npz", images=rng.integers(0, 256, (120, 32, 32, 3), np.uint8), labels=np.arange(120) % 3)
    out = tmp_path / "out"
    line = ["-m", "benchmarks.accelerator", "--debug", "--minutes=12", f"--out={out}", f"--data={tmp_path / 'a.npz'}"]
    line.append(f"--only={','.join(only)}")
    result = subprocess.run([sys.executable, *line], cwd=ROOT, env=cli_env, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr[-2000:] + result.stdout[-2000:]
    assert result.stdout == (out / "table.md").read_text() and result.stderr == ""
    for part in only:
        found = rows(out, part)
        assert set(found) == set(PARTS[part].cases(part, Settings(str(out), debug=True, platform="cpu")))
        assert not any("failed" in row for row in found.values())
    if only is parts.DEFAULT:
        steps = {name: rows(out, "cifar10")[name]["steps"] for name in ("so", "none")}
        assert steps["so"] == steps["none"]
        assert all(0 < row["overlap"] for row in rows(out, "feed").values())
    bad = subprocess.run(
        [sys.executable, *line[:2], "--out", str(out), "--only=a"],
        cwd=ROOT,
        env=cli_env,
        capture_output=True,
        text=True,
    )
    assert bad.returncode == 2 and "--only: unknown a; must be of peak, parity" in bad.stderr

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner, Result

from equifast import Purifier, __version__
from equifast.cli import _tables, app, evaluate
from equifast.demo import load_model, load_scenes
from equifast.evaluate import Cost
from equifast.models import read_image, write_image

MODEL_FILE = """
import torch
def dense():
    torch.manual_seed(0)
    return torch.nn.Conv2d(3, 4, 3, padding=1)
def classifier():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()
    )
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images of several sizes and kinds, and a model."""
    scenes, _ = load_scenes()
    write_image(tmp_path / "in" / "a.png", scenes[0])
    write_image(tmp_path / "in" / "sub" / "b.png", scenes[1][:, :40, :56])
    Image.fromarray((scenes[2].permute(1, 2, 0).numpy() * 255).astype("uint8")).save(tmp_path / "in" / "c.webp")
    write_image(tmp_path / "in" / "dot.png", torch.rand(3, 1, 1))
    (tmp_path / "model.py").write_text(MODEL_FILE)
    return tmp_path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def lines(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "purified.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("terminal", [False, True])
def test_wide_tables_lose_nothing(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file has lines of any length; on a terminal cells go on below."""
    file = io.StringIO()
    monkeypatch.setattr(_tables, "stdout", Console(file=file, force_terminal=terminal, width=80, color_system=None))
    cells = [f"{i}9.5 (65.5-73.{i})" for i in range(10)]
    _tables.show([("areas", ["", *(f"detector {i}" for i in range(10))], [["camvid/train", *cells]])], [], "")
    rows = [line.split("│")[1:-1] for line in file.getvalue().splitlines() if "│" in line]
    assert (len(rows) == 1) is not terminal
    whole = ["".join(parts).replace(" ", "") for parts in zip(*rows, strict=True)]
    assert whole == [text.replace(" ", "") for text in ("camvid/train", *cells)]


def test_bench() -> None:
    done = CliRunner().invoke(app, ["bench", "--model", "demo", "--size", "44x60", "--rounds", "1"])
    assert done.exit_code == 0, done.output
    for part in ("views", "forward", "backward", "similarity", "step", "other", "together"):
        assert f"│ {part}" in done.output
    assert "as a folded copy" in done.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "demo", "--size", "44"], "no size such as 176x240"),
        (["--model", "demo", "--size", "0x3"], "no size such as 176x240"),
        (["--model", "nothing", "--size", "4x3"], "model is 'nothing'"),
        (["--model", "demo", "--size", "44x60", "--features", "nothing"], "no submodule of the model"),
    ],
)
def test_bench_of_nonsense(options: list[str], message: str) -> None:
    done = CliRunner().invoke(app, ["bench", *options])
    assert done.exit_code == 2
    assert message in done.output


def test_purify(folder: Path) -> None:
    result = run("purify", folder / "in", "-o", folder / "out", "--model", "demo")
    assert result.exit_code == 0, result.output
    assert "4 of 4 images purified" in result.output
    written = {str(path.relative_to(folder / "out")) for path in (folder / "out").rglob("*.png")}
    assert written == {"a.png", "c.png", "dot.png", "sub/b.png"}
    records = {line["image"]: line for line in lines(folder / "out")}
    assert set(records) == written
    source = read_image(folder / "in" / "a.png")[None]
    expected = Purifier(load_model())(source)
    assert (read_image(folder / "out" / "a.png") - expected[0]).abs().max() <= 0.5 / 255 + 1e-6
    record = records["a.png"]
    assert record["score_before"] < record["score_after"]  # type: ignore[operator]
    assert record["settings"]["preset"] == "fast"  # type: ignore[index]
    assert (record["height"], record["width"]) == source.shape[2:]


def test_purify_again_does_nothing_and_refuses_other_settings(folder: Path) -> None:
    command = ("purify", folder / "in", "-o", folder / "out", "--model", f"{folder / 'model.py'}:dense")
    assert run(*command).exit_code == 0
    before = (folder / "out" / "purified.jsonl").read_text()
    stamps = [path.stat().st_mtime_ns for path in sorted((folder / "out").rglob("*.png"))]
    assert run(*command).exit_code == 0
    assert (folder / "out" / "purified.jsonl").read_text() == before
    assert [path.stat().st_mtime_ns for path in sorted((folder / "out").rglob("*.png"))] == stamps
    refused = run(*command, "--eps", "4/255")
    assert refused.exit_code == 2
    assert "holds results of other settings (eps was 0.0235" in refused.output.replace("\n", "")
    # a source that changed is purified anew, one that lost its result too, and each image keeps one line
    write_image(folder / "in" / "a.png", torch.rand(3, 20, 20))
    (folder / "out" / "dot.png").unlink()
    assert run(*command).exit_code == 0
    assert len(lines(folder / "out")) == 4
    assert next(line["height"] for line in lines(folder / "out") if line["image"] == "a.png") == 20


def test_random_numbers_that_nobody_knows(folder: Path) -> None:
    results = []
    for seed in ("none", "none", "0", "0"):
        out = folder / f"out{len(results)}"
        command = ("purify", folder / "in" / "a.png", "-o", out, "--model", f"{folder / 'model.py'}:dense")
        assert run(*command, "--seed", seed).exit_code == 0
        results.append((out / "a.png").read_bytes())
    assert results[0] != results[1]
    assert results[2] == results[3]
    assert lines(folder / "out0")[0]["settings"]["seed"] is None  # type: ignore[index]


def test_a_corrupt_file_is_reported_and_the_rest_done(folder: Path) -> None:
    (folder / "in" / "bad.png").write_bytes(b"\x89PNG but not really")
    Image.new("I;16", (4, 4)).save(folder / "in" / "deep.png")
    result = run("purify", folder / "in", "-o", folder / "out", "--model", f"{folder / 'model.py'}:dense")
    assert result.exit_code == 1
    assert "bad.png" in result.output
    assert "deep.png: it has pixels of mode I;16" in result.output.replace("\n", "")
    assert "4 of 6 images purified" in result.output
    assert len(lines(folder / "out")) == 4
    assert not list((folder / "out").rglob("*.partial"))


def test_features_of_a_classifier_are_found(folder: Path) -> None:
    model = f"{folder / 'model.py'}:classifier"
    assert run("purify", folder / "in" / "a.png", "-o", folder / "out", "--model", model).exit_code == 0
    assert lines(folder / "out")[0]["settings"]["features"] == "0"  # type: ignore[index]


def test_killed_and_started_again(folder: Path) -> None:
    """SIGKILL in the middle, half a line in the ledger: the second run does the rest and ends with every line once."""
    scenes, _ = load_scenes()
    for i in range(12):
        write_image(folder / "in" / f"more_{i:02}.png", scenes[i % 4])
    # -P: the installed package, also where the suite is run from a source tree (which has no compiled module)
    command = [sys.executable, "-P", "-m", "equifast.cli", "purify", str(folder / "in")]
    command += ["-o", str(folder / "out"), "--model", "demo"]
    log = folder / "log"
    with log.open("w") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream)
    ledger = folder / "out" / "purified.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (ledger.exists() and ledger.read_text().count("\n") >= 2):
        assert process.poll() is None, log.read_text()
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    done = lines(folder / "out")
    assert 2 <= len(done) < 16
    ledger.write_text(ledger.read_text() + '{"image": "mo')
    result = run("purify", folder / "in", "-o", folder / "out", "--model", "demo")
    assert result.exit_code == 0, result.output
    after = lines(folder / "out")
    assert after[: len(done)] == done
    assert len({line["image"] for line in after}) == len(after) == 16
    assert not list((folder / "out").rglob("*.partial"))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("nowhere", "-o", "out"), "'nowhere' does not exist"),
        ((".", "-o", "out"), "no PNG, JPEG or WebP file in ."),
        (("in", "-o", "out", "--model", "resnet"), "model is 'resnet'; it must be demo,"),
        (("in", "-o", "out", "--preset", "slow"), "preset is 'slow'; it must be one of"),
        (("in", "-o", "out", "--eps", "0"), "'--eps': '0' is no number above 0"),
        (("in", "-o", "out", "--eps", "six"), "'six' is no number above 0, such as"),
        (("in", "-o", "out", "--features", "stage9"), "is no submodule of the model; the nearest names are"),
        (("in", "-o", "out", "--seed", "-1"), "seed is -1; it must be an integer from 0 to 4294967295"),
        (("in", "-o", "out", "--seed", "any"), "'any' is no seed; it must be a whole number, or none"),
        (("in", "-o", "out", "--device", "gpu"), "gpu"),
        (("in", "-o", "in"), "would be overwritten; choose another output folder"),
        (("in", "-o", "out", "--eps", "6"), "eps is 6.0; it must be at most 1, as images lie in [0, 1]: 6/255 rather"),
        (("in", "--model", "demo"), "Missing option"),
        (("in", "-o", "out"), "Missing option"),
    ],
)
def test_bad_arguments(
    folder: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], sentence: str
) -> None:
    empty = folder / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty if arguments[0] == "." else folder)
    monkeypatch.setenv("COLUMNS", "200")
    if "--model" not in arguments and sentence != "Missing option":
        arguments += ("--model", "demo")
    result = run("purify", *arguments)
    assert result.exit_code == 2
    assert sentence in result.output
    assert "Traceback" not in result.output
    assert not (folder / "out").exists()


def test_two_images_of_one_name(folder: Path) -> None:
    write_image(folder / "in" / "c.png", torch.rand(3, 4, 4))
    result = run("purify", folder / "in", "-o", folder / "out", "--model", "demo")
    assert result.exit_code == 2
    assert "would both be written to 'c.png'" in result.output.replace("\n", "")


def test_the_output_is_not_read_again(folder: Path) -> None:
    command = ("purify", folder / "in", "-o", folder / "in" / "out", "--model", f"{folder / 'model.py'}:dense")
    for _ in range(2):
        assert "4 of 4 images purified" in run(*command).output


def test_features_stay_those_of_the_first_image(folder: Path) -> None:
    """Where they are found on their own, and it was done before."""
    (folder / "model.py").write_text(
        "import torch\n"
        "def build():\n"
        "    torch.manual_seed(0)\n"
        "    layers = [torch.nn.Conv2d(3, 4, 3, 2, 1) for _ in range(1)]\n"
        "    layers += [torch.nn.Conv2d(4, 4, 3, 2, 1) for _ in range(4)]\n"
        "    return torch.nn.Sequential(*layers, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())\n"
    )
    for name, side in (("a", 8), ("b", 64)):
        write_image(folder / "sizes" / f"{name}.png", torch.rand(3, side, side))
    command = ("purify", folder / "sizes", "-o", folder / "out", "--model", f"{folder / 'model.py'}:build")
    assert run(*command).exit_code == 0
    whole = [line["settings"] for line in lines(folder / "out")]
    (folder / "out" / "b.png").unlink()
    assert run(*command).exit_code == 0
    again = {line["image"]: line["settings"] for line in lines(folder / "out")}
    assert again["b.png"] == whole[1]
    assert whole[0]["features"] == whole[1]["features"]


def test_a_model_that_asserts_is_told_in_a_sentence(folder: Path) -> None:
    (folder / "model.py").write_text(
        "import torch\n"
        "class Strict(torch.nn.Conv2d):\n"
        "    def forward(self, x):\n"
        "        assert x.shape[2] == 224, 'wrong height'\n"
        "        return {}['none']\n"
        "def build():\n"
        "    return Strict(3, 4, 3)\n"
    )
    for size, sentence in (("20x30", "wrong height"), ("224x30", "KeyError: 'none'")):
        result = run("bench", "--model", f"{folder / 'model.py'}:build", "--size", size)
        assert result.exit_code == 2
        assert f"equifast: {sentence}" in result.output


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are text there")
def test_a_name_that_is_no_text(folder: Path) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    write_image(folder / "odd" / name, torch.rand(3, 20, 24))
    for i in range(20):
        write_image(folder / "clean" / f"{i}.png", torch.rand(3, 20, 24))
    given = ["detect", folder / "odd", "-o", folder / "out", "--model", f"{folder / 'model.py'}:dense"]
    call = "from equifast.cli import app; app()"
    command = [sys.executable, "-P", "-c", call, *map(str, given), "--clean", str(folder / "clean"), "--rate", "0.1"]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONIOENCODING": "utf-8", "COLUMNS": "300"}
    )
    assert done.returncode == 0, done.stderr
    assert "\\udce9" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_device_that_is_not_here(folder: Path) -> None:
    result = run("purify", folder / "in", "-o", folder / "out", "--model", "demo", "--device", "cuda")
    assert result.exit_code == 2
    assert "device is 'cuda', but no CUDA device can be used here" in result.output


def test_features_that_are_no_number(folder: Path) -> None:
    (folder / "nan.py").write_text(
        "import torch\n"
        "class Bad(torch.nn.Conv2d):\n"
        "    def forward(self, x):\n"
        "        return super().forward(x) * (torch.nan if x.shape[-1] > 60 else 1)\n"
        "def build():\n    return Bad(3, 4, 3, padding=1)\n"
    )
    result = run("purify", folder / "in", "-o", folder / "out", "--model", f"{folder / 'nan.py'}:build")
    assert result.exit_code == 1
    assert "2 of 4 images purified" in result.output
    assert "a.png: the model's features have values that are NaN or infinite on it" in result.output
    assert "NaN" not in (folder / "out" / "purified.jsonl").read_text()  # which is no JSON
    assert not (folder / "out" / "a.png").exists()


def test_a_model_that_chokes_on_some(folder: Path) -> None:
    (folder / "model.py").write_text(
        "import torch\n"
        "class Picky(torch.nn.Conv2d):\n"
        "    def forward(self, x):\n"
        "        assert x.shape[2] != 40\n"
        "        return super().forward(x)\n"
        "def build():\n"
        "    torch.manual_seed(0)\n"
        "    return Picky(3, 4, 3, padding=1)\n"
    )
    model = f"{folder / 'model.py'}:build"
    result = run("purify", folder / "in", "-o", folder / "out", "--model", model)
    assert result.exit_code == 1
    assert "3 of 4 images purified" in result.output
    (folder / "model.py").write_text((folder / "model.py").read_text().replace("manual_seed(0)", "manual_seed(1)"))
    changed = run("purify", folder / "in", "-o", folder / "out", "--model", model)
    assert changed.exit_code == 2
    assert "holds results of other settings (weights was" in changed.output.replace("\n", "")


def test_a_foreign_ledger_is_left_alone(folder: Path) -> None:
    (folder / "out").mkdir()
    (folder / "out" / "purified.jsonl").write_text('{"my": "notes"}\n')
    result = run("purify", folder / "in", "-o", folder / "out", "--model", "demo")
    assert result.exit_code == 2
    assert "has a line that equifast did not write" in result.output.replace("\n", "")
    assert (folder / "out" / "purified.jsonl").read_text() == '{"my": "notes"}\n'


def test_version() -> None:
    assert run("--version").output == f"equifast {__version__}\n"


def test_doctor() -> None:
    result = run("doctor")
    assert result.exit_code == 0
    for word in (__version__, torch.__version__, "backend", "threads", "instruction sets", "GPU"):
        assert word in result.output


def test_costs_of_a_busy_machine_are_told() -> None:
    quiet = {"none": Cost(1.0, 1.0, 1.0, 1.0), "fast": Cost(24.0, 20.0, 20.0, 1.0)}
    assert evaluate._busy(quiet) == []
    (warning,) = evaluate._busy({**quiet, "averaging": Cost(20.0, 10.0, 10.0, 1.0)})
    assert "took 2 s beside averaging and 1 s beside none" in warning


@pytest.mark.slow
def test_demo(tmp_path: Path) -> None:
    """The whole demo: a table of every defense, panels that can be read, results that say what the table says."""
    result = run("demo", "-o", tmp_path / "demo", "--scenes", 1)
    assert result.exit_code == 0, result.output
    for word in ("none", "random noise", "averaging", "paper", "fast"):
        assert word in result.output
    results = json.loads((tmp_path / "demo" / "results.json").read_text())
    rows = {row["defense"]: row for row in results["rows"]}
    assert rows["none"]["clean"]["value"] > rows["none"]["pgd"]["value"] + 20
    assert rows["fast"]["pgd"]["value"] > rows["none"]["pgd"]["value"]
    assert rows["fast"]["similarity"] > rows["none"]["similarity"]
    assert rows["fast"]["seconds"] < rows["paper"]["seconds"]
    panels = sorted((tmp_path / "demo").glob("scene_*.png"))
    assert panels
    for panel in panels:
        with Image.open(panel) as image:
            image.verify()
    refused = run("demo", "-o", panels[0])
    assert refused.exit_code == 2
    assert "cannot write to" in refused.output

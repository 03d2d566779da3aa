"""The command as users meet it: quick help, one clear message a mistake, exit codes."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.command import loads_torch, taskvec
from helpers.tasks import write_folder_task
from PIL import Image

from taskvec.command import terminal

SMALL = "name: s\nbackbones: ['lab:random']\ntasks: ['folder:one']\nprobe: {steps: 2}\nfinetune: {steps: 2}\n"


@pytest.mark.parametrize(
    "arguments", [("--help",), ("run", "--help"), ("run", "--no-such"), ("list", "methods"), ("list", "studies")]
)
def test_help_and_lists_need_no_torch(arguments: tuple[str, ...]) -> None:
    assert not loads_torch(*arguments)


def test_a_bad_study_file_and_an_unknown_method_need_no_torch(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("backbones: [\n")
    (tmp_path / "method.yaml").write_text(SMALL + "methods: [tie]\n")
    assert not loads_torch("run", str(tmp_path / "bad.yaml"))
    assert not loads_torch("run", str(tmp_path / "method.yaml"))


def study(folder: Path, text: str = SMALL) -> Path:
    (folder / "s.yaml").write_text(text)
    return folder / "s.yaml"


def broken(folder: Path, how: str) -> list[str | Path]:
    """Prepare one mistake and return the command that meets it."""
    tail: list[str | Path] = ["--out", folder / "out", "--store", folder / "store", "--workers", "1"]
    text = SMALL
    if how == "missing folder":
        text = SMALL.replace("folder:one", "folder:two")
    elif how == "corrupt image":
        (folder / "one" / "train" / "ant" / "003.png").write_bytes(b"not an image")
    elif how == "class only in test":
        (folder / "one" / "test" / "zebra").mkdir()
    elif how == "unknown task":
        text = SMALL.replace("folder:one", "lab:greeek")
    elif how == "unknown backbone":
        text = SMALL.replace("lab:random", "lab:randon")
    elif how == "unknown method":
        text = SMALL + "methods: [task_aritmetic]"
    elif how == "bad YAML":
        text = SMALL + "heads: [kept"
    elif how == "unknown key":
        text = SMALL + "head: [kept]"
    elif how == "same name twice":
        text = SMALL.replace("['folder:one']", "['folder:one', 'folder:./one']")
    elif how == "not a run folder":
        (folder / "out").mkdir()
        (folder / "out" / "thesis.txt").write_text("precious")
    elif how == "another architecture":
        from taskvec.lab import encoders

        text = SMALL.replace("lab:random", f"timm:resnet10t@{encoders.path('supervised')}")
    elif how == "bad device":
        text = SMALL + "device: cuda:7"
    elif how == "odd size":
        text = SMALL.replace("['lab:random']", "[{address: 'lab:random', size: 33}]")
    elif how == "diverged":
        text = SMALL.replace("finetune: {steps: 2}", "finetune: {steps: 40, warmup: 0, learning_rate: 100}")
    return ["run", study(folder, text), *tail]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing folder", r"no task folder at '.*two'\ndid you mean|no task folder at '.*two'"),
        ("corrupt image", r"image '.*one/train/ant/003\.png' cannot be read"),
        ("class only in test", r"class 'zebra' is in '.*test' but not in train/"),
        ("unknown task", "unknown lab task 'greeek'\ndid you mean 'greek'"),
        ("unknown backbone", "unknown lab encoder 'randon'\ndid you mean 'random'"),
        ("unknown method", "unknown merging method 'task_aritmetic'; did you mean 'task_arithmetic'"),
        ("bad YAML", r"s\.yaml, line \d+: not valid YAML"),
        ("unknown key", r"s\.yaml, line 6: unknown key 'head'\ndid you mean 'heads'"),
        ("same name twice", "of the tasks, two are named 'one'"),
        ("not a run folder", r"'.*out' is not empty and not a run folder"),
        ("another architecture", r"supervised\.safetensors' does not fit: it is missing conv1\.0\.weight"),
        ("bad device", "device 'cuda:7' cannot be used"),
        ("odd size", "cannot be made for 33 px"),
        ("diverged", "fine-tune one .*: training diverged at learning rate 100: .*\nlower finetune.learning_rate"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(tmp_path: Path, how: str, message: str) -> None:
    write_folder_task(tmp_path / "one")
    done = taskvec(*broken(tmp_path, how))
    assert done.returncode == 2, done.stderr
    assert re.search(message, done.stderr), done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out" / "results.csv").exists()
    assert not list(tmp_path.glob("store/tmp/*"))
    if how.startswith(("missing", "class", "unknown", "bad")):
        assert not (tmp_path / "out").exists()
    if how == "not a run folder":
        assert (tmp_path / "out" / "thesis.txt").read_text() == "precious"


def test_a_small_study_runs_and_predicts(tmp_path: Path) -> None:
    write_folder_task(tmp_path / "one")
    out = tmp_path / "out"
    done = taskvec("run", study(tmp_path), "--smoke", "--out", out, "--store", tmp_path / "store", "--workers", "1")
    assert done.returncode == 0, done.stderr
    assert f"page: {out / 'report.html'}" in done.stdout
    assert done.stdout.startswith("SMOKE RUN: 2 steps")
    assert done.stderr.startswith(f"SMOKE RUN: reading {tmp_path / 's.yaml'}\nplanning s (backbones: 1, tasks: 1)\n")
    assert max(map(len, done.stderr.splitlines()[1:])) <= 80
    page = (out / "report.html").read_text("utf-8")
    assert page.index('class="smoke"') < page.index("<h1>")
    for text in (done.stdout, page.split('id="words"')[0], (out / "tables.md").read_text("utf-8").split("## What")[0]):
        assert not re.search("gained|beats linear|normalised</th>|normalised \\|", text)
    image = tmp_path / "one" / "test" / "bee" / "000.png"
    answer = taskvec("predict", out, image, "--task", "one")
    assert answer.returncode == 0, answer.stderr
    path, task, label, probability = answer.stdout.strip().split("\t")
    assert (path, task) == (str(image), "one")
    assert label in ("ant", "bee", "cow")
    assert 0 < float(probability) <= 1
    for wrong, message in (
        (["predict", out, tmp_path / "none.png"], "no image at"),
        (["predict", tmp_path, image], "no model in"),
        (["predict", out, image, "--task", "two"], "unknown task 'two'"),
    ):
        failed = taskvec(*wrong)
        assert (failed.returncode, message in failed.stderr, "Traceback" in failed.stderr) == (2, True, False)


@pytest.mark.parametrize("full", ["store", "out"])
def test_a_full_disk_is_told_and_the_run_goes_on_when_there_is_room(tmp_path: Path, full: str) -> None:
    """The first write of weights to the store, or of a model to the run folder, finds the disk full."""
    code = (
        "import errno, sys\nfrom pathlib import Path\nfrom taskvec.command import runs\n"
        "from taskvec.weights import flat\n"
        "from taskvec.command.cli import app\n"
        "def no_room(*_, **__): raise OSError(errno.ENOSPC, 'No space left on device')\n"
        f"if {full!r} == 'store': flat.save_file = no_room\n"
        "else: runs.shutil.copyfile = no_room\n"
        "app(sys.argv[1:])"
    )
    write_folder_task(tmp_path / "one")
    out, store = tmp_path / "out", tmp_path / "store"
    arguments = ["run", study(tmp_path), "--smoke", "--out", out, "--store", store, "--workers", "1"]
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "no space left" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(store.glob("tmp/*"))
    assert [path.name for path in out.iterdir()] == [".taskvec"]
    assert taskvec(*arguments).returncode == 0
    assert (out / "report.html").exists()


def test_ctrl_c_in_the_first_moments_is_no_traceback(tmp_path: Path) -> None:
    write_folder_task(tmp_path / "one")
    command = [sys.executable, "-m", "taskvec", "run", str(study(tmp_path)), "--out", str(tmp_path / "out")]
    for wait in (0.4, 1.0):
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        time.sleep(wait)
        process.send_signal(signal.SIGINT)
        message = process.communicate()[1]
        assert (process.returncode, "Traceback" in message) == (130, False), message


@pytest.mark.parametrize("after", ["pass", "time.sleep(60)"], ids=["ends", "goes on"])
def test_a_library_that_catches_everything_does_not_undo_ctrl_c(after: str) -> None:
    code = f"""
import signal, sys, time
import taskvec.command.cli
from taskvec import __main__ as entry

def app():
    try:
        signal.raise_signal(signal.SIGINT)
    except BaseException:
        {after}

taskvec.command.cli.app = app
entry.TIDYING = 0.5
entry.main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50)
    assert done.returncode == 130, done.stderr
    assert "Traceback" not in done.stderr
    assert "interrupted" in done.stderr


def test_the_lab_can_be_pre_trained_again_and_the_result_loaded(tmp_path: Path) -> None:
    done = taskvec("lab", "pretrain", "supervised", "--steps", "2", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    write_folder_task(tmp_path / "one")
    image = tmp_path / "a.png"
    Image.new("RGB", (40, 40)).save(image)
    text = SMALL.replace("lab:random", f"lab:supervised@{tmp_path / 'supervised.safetensors'}")
    out = tmp_path / "out"
    run = taskvec(
        "run", study(tmp_path, text), "--smoke", "--out", out, "--store", tmp_path / "store", "--workers", "1"
    )
    assert run.returncode == 0, run.stderr
    assert taskvec("predict", out, image).returncode == 0


def test_the_version_is_told_without_torch() -> None:
    assert not loads_torch("--version")
    assert re.fullmatch(r"taskvec \d+\.\d+\S*\n", taskvec("--version").stdout)


def test_exit_codes_are_documented() -> None:
    text = " ".join(taskvec("--help").stdout.split())
    assert "exit codes: 0 done; 1 an error of this program; 2 a mistake to mend; 130, 143 interrupted" in text


@pytest.mark.parametrize(
    "arguments",
    [
        ("run", "\x1b[31mred"), ("run", "--\x1b[31mred"), ("\x1b[31mred",),
        ("plan", "quickstart", "--device", "\x1b[31mred"),
        ("predict", "\x1b[31mred", "\x1b[31mred"), ("merge", "\x1b[31m", "\x1b[31m", "--scale", "1", "--out", "x"),
        ("diff", "\x1b[31m", "\x1b[31m"), ("list", "\x1b[31mred"), ("store", "--store", "\x1b[31mred"),
    ],
)  # fmt: skip
def test_escape_characters_of_the_user_never_reach_the_terminal(arguments: tuple[str, ...]) -> None:
    done = taskvec(*arguments)
    assert done.returncode == 2
    assert "\x1b" not in done.stderr + done.stdout
    assert r"\x1b[31m" in done.stderr


@pytest.mark.parametrize("locale", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}])
def test_a_terminal_that_has_only_ascii_gets_other_signs(tmp_path: Path, locale: dict[str, str]) -> None:
    for arguments in (["list", "methods"], ["list", "tasks"], ["run", tmp_path / "λ.yaml"], ["predict", "λ", "λ.png"]):
        command = [sys.executable, "-m", "taskvec", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, env=os.environ | locale, timeout=120)
        assert b"UnicodeEncodeError" not in done.stderr
        assert b"Traceback" not in done.stderr
        assert done.returncode == (0 if arguments[0] == "list" else 2), done.stderr
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    assert terminal.plain("λ 0.3 ± 1 漢 \x1b", stream) == r"lambda 0.3 +- 1 \u6f22 \x1b"

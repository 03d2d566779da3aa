"""Studies end to end: rows, resumption, honesty of the choice, predictions."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers.reporters import Quiet
from helpers.tasks import write_folder_task

import taskvec as tv
from taskvec.command import runs
from taskvec.core.files import file_digest, read_json
from taskvec.core.locks import workspace
from taskvec.core.notes import listen
from taskvec.engine.publishing import publish
from taskvec.engine.store import Store
from taskvec.report.rows import COLUMNS
from taskvec.report.run_folder import FILES, LOCK, MARKER, writing
from taskvec.study.files import parse_study
from taskvec.study.schema import StudyFile

STUDY = """
name: small
backbones: ["lab:random"]
tasks: ["folder:{root}/one", "folder:{root}/two"]
methods: [{{name: task_arithmetic, scales: "0:1:0.25"}}]
heatmap: {{pairs: 1, points: 3, range: 1, samples: 4}}
probe: {{steps: 20, batch_size: 16, warmup: 2, learning_rates: [0.003, 0.03]}}
finetune: {{steps: {steps}, batch_size: 8, warmup: 2, learning_rate: 0.003}}
"""


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_folder_task(tmp_path / "one")
    write_folder_task(tmp_path / "two", ("red", "blue"), train=15, test=6)
    return tmp_path


def study_file(root: Path, steps: int = 6, more: str = "") -> StudyFile:
    text = STUDY.format(root=root, steps=steps) + more
    return StudyFile(parse_study(text, "small"), text, root)


def run(file: StudyFile, out: Path, store: Path) -> tuple[runs.Outcome, Quiet]:
    watcher = Quiet()
    return runs.run_study(file, out, Store(store), 1, watcher, "taskvec run small"), watcher


def rows_of(out: Path) -> pd.DataFrame:
    return pd.read_csv(out / "results.csv", keep_default_na=False)


def test_a_study_leaves_a_whole_run_folder_and_the_second_run_does_nothing(data: Path) -> None:
    out, store = data / "out", data / "store"
    outcome, _ = run(study_file(data), out, store)
    assert outcome.ran == outcome.steps > 20
    rows = rows_of(out)
    assert tuple(rows.columns) == tuple(COLUMNS)
    assert set(rows.method) == {"probing", "fine_tuned", "task_arithmetic"}
    tried = rows[(rows.method == "task_arithmetic") & (rows.split == "validation") & (rows.heads == "kept")]
    assert sorted(set(tried.scale)) == [0, 0.25, 0.5, 0.75, 1]
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    again, watcher = run(study_file(data), out, store)
    assert (again.ran, again.written, watcher.ran) == (0, False, [])
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == times
    shutil.rmtree(out / "figures")
    shutil.rmtree(out / "models")
    (out / "results.csv").write_text("damaged")
    (out / "notes.txt").write_text("mine")
    (out / "link").symlink_to(data)
    mended, watcher = run(study_file(data), out, store)
    assert (mended.ran, mended.written) == (0, True)
    assert watcher.notes == [
        f"run folder: '{out}/results.csv' was changed since it was written: kept as '{out}/changed/results.csv'"
    ]
    assert (out / "changed" / "results.csv").read_text() == "damaged"
    assert run(study_file(data), out, store)[0].written is False
    assert (out / "figures").is_dir()
    assert tuple(rows_of(out).columns) == tuple(COLUMNS)
    assert (out / "disentanglement.csv").exists()
    text = study_file(data).text.replace("pairs: 1", "pairs: 0")
    run(StudyFile(parse_study(text, "small"), text, data), out, store)
    assert not (out / "disentanglement.csv").exists()
    assert (out / "notes.txt").read_text() == "mine"
    assert (out / "link" / "one").is_dir()
    assert (out / "models" / "random" / "model.json").is_file()


def test_test_rows_exist_only_for_what_validation_chose(data: Path) -> None:
    run(study_file(data), data / "out", data / "store")
    rows = rows_of(data / "out")
    merged = rows[
        (rows.method == "task_arithmetic") & (rows.task == "") & rows.metric.isin(["accuracy", "normalised_accuracy"])
    ]
    for heads in ("kept", "reprobed"):
        own = merged[merged.heads == heads]
        tested = set(own[own.split == "test"].scale)
        assert len(tested) == 1
        measured = own[(own.split == "validation") & (own.metric == "normalised_accuracy")]
        best = measured.value.max()
        assert tested == {measured[measured.value == best].scale.min()}


def test_what_is_chosen_does_not_depend_on_the_test_split(data: Path) -> None:
    other = data / "other"
    for name in ("one", "two"):
        shutil.copytree(data / name, other / name)
        for split_class in (other / name / "test").iterdir():
            for image in list(split_class.iterdir())[1:]:
                image.unlink()
    run(study_file(data), data / "out", data / "store")
    run(study_file(other), data / "out2", data / "store2")
    first, second = rows_of(data / "out"), rows_of(data / "out2")
    keep = [c for c in COLUMNS if c != "artifact"]
    same = [frame[frame.split == "validation"][keep].reset_index(drop=True) for frame in (first, second)]
    pd.testing.assert_frame_equal(*same)
    chosen = [
        f[(f.split == "test") & (f.method == "task_arithmetic")][["heads", "scale"]].drop_duplicates()
        for f in (first, second)
    ]
    assert chosen[0].values.tolist() == chosen[1].values.tolist()


def test_two_workers_and_one_give_the_same_results(data: Path) -> None:
    run(study_file(data), data / "out", data / "store")
    runs.run_study(study_file(data), data / "out2", Store(data / "store2"), 2, Quiet(), "taskvec run small")
    assert (data / "out" / "results.csv").read_bytes() == (data / "out2" / "results.csv").read_bytes()
    assert (data / "out" / "disentanglement.csv").read_bytes() == (data / "out2" / "disentanglement.csv").read_bytes()
    assert (data / "out" / "tables.md").read_bytes() == (data / "out2" / "tables.md").read_bytes()


def test_adding_a_task_keeps_what_does_not_change(data: Path) -> None:
    run(study_file(data, more="heads: [kept]"), data / "out", data / "store")
    write_folder_task(data / "three", ("up", "down"))
    text = study_file(data, more="heads: [kept]").text.replace("]\nmethods", f', "folder:{data}/three"]\nmethods')
    _, watcher = run(StudyFile(parse_study(text, "small"), text, data), data / "out", data / "store")
    assert not [
        label for label in watcher.ran if label.startswith(("decode one", "features of one", "probe one", "load"))
    ]
    assert [label for label in watcher.ran if label.startswith("fine-tune three")]


def test_the_lock_and_the_models_say_how_they_were_made(data: Path) -> None:
    run(study_file(data), data / "out", data / "store")
    lock = read_json(data / "out" / "study.lock.json")
    assert lock["seeds"] == [0]
    assert lock["threads"] == 1
    assert lock["versions"]["torch"]
    ids = set(rows_of(data / "out").artifact)
    assert ids <= set(lock["steps"].values())
    model = read_json(data / "out" / "models" / "random" / "model.json")
    assert [task["name"] for task in model["tasks"]] == ["one", "two"]
    assert model["method"] in ("probing", "task_arithmetic")


def test_the_kept_model_predicts_what_the_study_measured(data: Path) -> None:
    run(study_file(data), data / "out", data / "store")
    model = tv.load(data / "out")
    about, rows = model.about, rows_of(data / "out")
    measured = rows[
        (rows.method == about["method"])
        & (rows.heads == about["heads"])
        & (rows.scale == about["scale"])
        & (rows.split == "test")
        & (rows.metric == "accuracy")
        & (rows.task == "one")
    ]
    files = sorted((data / "one" / "test").glob("*/*.png"))
    answers = model.predict(files, task="one")
    right = np.mean([answer.label == Path(answer.image).parent.name for answer in answers])
    assert right == pytest.approx(float(measured.value.iloc[0]))
    assert {answer.task for answer in model.predict(files[:1])} == {"one", "two"}
    assert all(0 < answer.probability <= 1 for answer in answers)
    with pytest.raises(tv.TaskvecError, match="did you mean 'one'"):
        model.predict(files, task="onee")
    with pytest.raises(tv.TaskvecError, match="no model in"):
        tv.load(data)


# ---------------------------------------------------------------- what is the user's


def published(out: Path, texts: dict[str, str]) -> list[str]:
    """Publish files of these texts to a folder, and return the notes."""
    with listen() as heard, workspace(out / "run") as fresh:
        for name, text in texts.items():
            (fresh / name).parent.mkdir(parents=True, exist_ok=True)
            (fresh / name).write_text(text)
        publish(fresh, out, MARKER, LOCK)
    return heard


def texts_of(out: Path) -> dict[str, str]:
    names = sorted(path for path in out.rglob("*") if path.is_file() and path.name != MARKER)
    return {path.relative_to(out).as_posix(): path.read_text() for path in names}


MINE = dict.fromkeys(("notes.txt", "figures/mine.png", "models/own/x.bin", ".hidden", "a/b.csv"), "mine")
FIRST = {
    "results.csv": "1",
    "figures/a.png": "1",
    "figures/b.png": "1",
    "models/x/model.json": "1",
    LOCK: "1",
}
SECOND = {"results.csv": "2", "figures/a.png": "2", "models/y/model.json": "2", LOCK: "2"}


def test_a_run_folder_replaces_its_own_files_and_no_others(tmp_path: Path) -> None:
    assert published(tmp_path, FIRST) == []
    for name, text in MINE.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "figures" / "elsewhere").symlink_to("/usr")
    (tmp_path / "nowhere").symlink_to(tmp_path / "missing")
    assert published(tmp_path, SECOND) == []
    assert texts_of(tmp_path) == MINE | SECOND
    assert not (tmp_path / "models" / "x").exists()
    assert (tmp_path / "figures" / "elsewhere").is_symlink()
    assert (tmp_path / "nowhere").is_symlink()


def test_files_of_a_run_that_were_changed_are_kept(tmp_path: Path) -> None:
    published(tmp_path, FIRST)
    for name in ("results.csv", "figures/b.png"):
        (tmp_path / name).write_text("edited")
    (tmp_path / "changed").write_text("a file of the user's")
    notes = published(tmp_path, SECOND)
    kept = {f"changed-2/{name}": "edited" for name in ("results.csv", "figures/b.png")}
    assert texts_of(tmp_path) == SECOND | kept | {"changed": "a file of the user's"}
    assert sorted(notes, reverse=True) == [
        f"'{tmp_path}/{n}' was changed since it was written: kept as '{tmp_path}/changed-2/{n}'"
        for n in ("results.csv", "figures/b.png")
    ]


@pytest.mark.parametrize("how", ["file", "folder", "link", "linked folder", "file for a folder"])
def test_what_stands_in_the_way_is_refused_and_nothing_is_touched(tmp_path: Path, how: str) -> None:
    out, mine = tmp_path / "out", tmp_path / "mine"
    mine.mkdir()
    (mine / "a.png").write_text("mine")
    out.mkdir()
    published(out, {"results.csv": "1", LOCK: "1"})
    place = out / "figures" / "a.png"
    (out if "folder" in how and how != "folder" else place.parent).mkdir(exist_ok=True)
    if how == "file":
        place.write_text("mine")
    elif how == "folder":
        place.mkdir()
    elif how == "link":
        place.symlink_to(mine / "a.png")
    elif how == "linked folder":
        (out / "figures").symlink_to(mine)
    else:
        (out / "figures").write_text("mine")
    before = texts_of(tmp_path)
    with pytest.raises(tv.TaskvecError, match="figures.* was not written by this command"):
        published(out, SECOND)
    assert texts_of(tmp_path) == before


def test_a_marker_or_lock_that_names_files_elsewhere_removes_nothing(tmp_path: Path) -> None:
    out, thesis = tmp_path / "out", tmp_path / "thesis.txt"
    out.mkdir()
    thesis.write_text("mine")
    for bad in ('{"files": {"../thesis.txt": "%s"}}', '{"files": ["thesis.txt"]}', "[1]", "{", '{"files": {"a": 3}}'):
        (out / MARKER).write_text(bad.replace("%s", file_digest(thesis)))
        (out / "new.csv").unlink(missing_ok=True)
        published(out, {"new.csv": bad})
        assert thesis.read_text() == "mine"
        assert texts_of(out) == {"new.csv": bad}


def test_a_run_folder_of_an_older_version_names_its_files_in_the_lock(tmp_path: Path) -> None:
    (tmp_path / MARKER).write_text("a run folder of taskvec: report.html, tables.md and results.csv\n")
    for name in ("results.csv", "old.csv", "notes.txt"):
        (tmp_path / name).write_text("1")
    files = {name: file_digest(tmp_path / name) for name in ("results.csv", "old.csv")}
    (tmp_path / LOCK).write_text(json.dumps({"fingerprint": "x", "files": files}))
    assert published(tmp_path, SECOND) == []
    assert texts_of(tmp_path) == SECOND | {"notes.txt": "1"}


KILLED = """
import os, sys
from pathlib import Path
from taskvec.core.locks import workspace
from taskvec.engine.publishing import publish
out, texts, left = Path(sys.argv[1]), eval(sys.argv[2]), 0

def counted(one):
    def call(*args, **kwargs):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), 9)
        return one(*args, **kwargs)
    return call

for name in ("replace", "unlink", "rename", "rmdir", "mkdir"):
    setattr(Path, name, counted(getattr(Path, name)))
for moment in range(99):
    child = os.fork()
    if not child:
        left = moment
        with workspace(out / str(moment) / "run") as fresh:
            for name, text in texts.items():
                os.makedirs((fresh / name).parent, exist_ok=True)
                (fresh / name).write_text(text)
            publish(fresh, out / str(moment), ".taskvec", "study.lock.json")
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        break
print(moment)
"""


def test_a_run_folder_ends_right_whenever_it_was_killed(tmp_path: Path) -> None:
    for moment in range(40):
        (tmp_path / str(moment)).mkdir()
        published(tmp_path / str(moment), FIRST)
        (tmp_path / str(moment) / "notes.txt").write_text("mine")
        (tmp_path / str(moment) / "figures" / "b.png").write_text("edited")
    call = [sys.executable, "-c", KILLED, tmp_path, repr(SECOND)]
    done = subprocess.run(call, capture_output=True, text=True, check=True)
    moments = int(done.stdout)
    assert 10 < moments < 40
    third = SECOND | {"results.csv": "3"}
    for moment in range(moments + 1):
        published(tmp_path / str(moment), third)
        kept = {"notes.txt": "mine", "changed/figures/b.png": "edited"}
        assert texts_of(tmp_path / str(moment)) == third | kept
        assert {path.name for path in (tmp_path / str(moment)).glob(".*")} == {MARKER}


def test_the_second_run_into_one_folder_is_refused_while_the_first_goes_on(tmp_path: Path) -> None:
    with writing(tmp_path / "out"):
        (tmp_path / "out" / ".fresh-12345" / "figures").mkdir(parents=True)
        (tmp_path / "out" / ".fresh-2026" / "thesis").mkdir(parents=True)
        with pytest.raises(tv.TaskvecError, match="another run is writing to"), writing(tmp_path / "out"):
            pass
    with writing(tmp_path / "out"):
        left = sorted(path.name for path in (tmp_path / "out").iterdir())
        assert left == [".fresh-2026", f"{MARKER}-lock"]
    shutil.rmtree(tmp_path / "out" / ".fresh-2026")
    (tmp_path / "out").rmdir()
    with writing(tmp_path / "out" / "deep"):
        pass
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / f"{MARKER}-lock").write_text("of a killed run")
    with writing(tmp_path / "out"):
        pass
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("out", "store"),
    [
        ("out", "out"),
        ("out", "out/store"),
        ("all/out", "all"),
        ("out", "link/../out/deep"),
        ("link/out", "real/out/store"),
        ("out", "data/one/train/store"),
        ("data/one/train/ant/out", "store"),
        ("data/two", "store"),
        ("flat/ant", "store"),
        ("flat/runs/x", "store"),
        ("a class elsewhere/out", "store"),
        ("out", "a class elsewhere/store"),
    ],
)
def test_places_in_each_other_are_refused_before_any_work(data: Path, out: str, store: str) -> None:
    (data / "real").mkdir()
    (data / "link").symlink_to(data / "real")
    (data / "data").mkdir()
    for name in ("one", "two"):
        (data / name).rename(data / "data" / name)
    shutil.copytree(data / "data" / "one" / "train", data / "flat")
    (data / "data" / "one" / "train" / "bee").rename(data / "a class elsewhere")
    (data / "data" / "one" / "train" / "bee").symlink_to(data / "a class elsewhere")
    text = study_file(data / "data").text.replace(f"{data}/data/two", f"{data}/flat")
    before = sorted(data.rglob("*"))
    with pytest.raises(tv.TaskvecError, match="lie one in the other|which is read|not empty and not a run folder"):
        run(StudyFile(parse_study(text, "small"), text, data), data / out, data / store)
    assert sorted(data.rglob("*")) == before


@pytest.mark.parametrize("where", ["tasks", "finetuned", "part", "backbone", "plugin"])
def test_results_never_replace_what_the_study_reads(data: Path, where: str) -> None:
    out = data / "out"
    out.mkdir()
    published(out, {"results.csv": "1", "models/x/encoder.safetensors": "1", LOCK: "1"})
    (data / "one").rename(out / "figures")
    text = study_file(data).text.replace(f"{data}/one", f"{out}/figures" if where == "tasks" else f"{data}/two")
    text = text.replace(f'"folder:{data}/two"]', f'{{address: "folder:{data}/two", name: b}}]')
    if where in ("finetuned", "part"):
        part = "#teacher" if where == "part" else ""
        text = text.replace("name: b", f"name: b, finetuned: '{out}/models/x/encoder.safetensors{part}'")
    if where == "plugin":
        (out / "tables").mkdir()
        (out / "tables" / "mine.py").write_text("")
        text = f"plugins: [{out}/tables/mine.py]\n" + text
    if where == "backbone":
        text = text.replace("lab:random", "timm:vit_tiny_patch16_224@out/models/x/encoder.safetensors")
    before = sorted(data.rglob("*"))
    with listen(), pytest.raises(tv.TaskvecError, match="the study reads '.*', where '.*' has results"):
        run(StudyFile(parse_study(text, "small"), text, data), out, data / "store")
    assert sorted(data.rglob("*")) == before


@pytest.mark.parametrize(
    "out", ["/proc/x", "/dev/null", "file", "file/out", "x" * 300, "nul\0", "loop", "gone", "socket"]
)
def test_run_folders_that_cannot_be_are_clear_errors_before_any_work(data: Path, out: str) -> None:
    (data / "file").write_text("mine")
    (data / "loop").symlink_to(data / "loop")
    (data / "gone").symlink_to(data / "disk that is not there")
    os.mkfifo(data / "socket")
    before = sorted(data.rglob("*"))
    for place, store in ((data / out, data / "store"), (data / "out", data / out)):
        with pytest.raises(tv.TaskvecError, match="cannot use|is no folder|is no path|link to nothing"):
            run(study_file(data), place, store)
    assert sorted(data.rglob("*")) == before


def test_what_is_in_the_way_of_a_run_is_refused_before_any_work(data: Path) -> None:
    out = data / "out"
    inside = ("models/random/model.json", "figures/lambda--random--aligned.png", "tables/table1.tex")
    for name in (*FILES, "models", "figures", *inside, "figures/mine--of-june.png", "models/own/model.json"):
        out.mkdir()
        published(out, {"other.csv": "1"})
        (out / name).parent.mkdir(exist_ok=True, parents=True)
        (out / name).write_text("mine")
        refused = pytest.raises(tv.TaskvecError, match=f"{name}' was not written by this command")
        with nullcontext() if "mine" in name or "own" in name else refused:
            runs.check_free(study_file(data), out)
        assert (out / name).read_text() == "mine"
        shutil.rmtree(out)
    (out / MARKER).mkdir(parents=True)
    with pytest.raises(tv.TaskvecError, match=r"/\.taskvec' was not written by this command"):
        runs.check_free(study_file(data), out)


def command(data: Path, out: str, store: str) -> list[str]:
    (data / "small.yaml").write_text(study_file(data, steps=100).text)
    arguments = [
        "run",
        str(data / "small.yaml"),
        "--out",
        str(data / out),
        "--store",
        str(data / store),
        "--workers",
        "2",
    ]
    return [sys.executable, "-m", "taskvec", *arguments]


def wait_for(path: Path, pattern: str, process: subprocess.Popen[bytes]) -> None:
    while process.poll() is None:
        if list(path.glob(pattern)):
            return
        time.sleep(0.02)
    raise AssertionError("the run ended before the moment to stop it")


def fine_tuning_has_begun(store: Path, process: subprocess.Popen[bytes]) -> None:
    """Wait until both heads are kept, which is when fine-tuning begins."""
    while process.poll() is None:
        records = [p.read_text() for p in store.glob("[0-9a-f][0-9a-f]/*/record.json")]
        if sum('"step": "pick_head"' in text for text in records) == 2:
            time.sleep(0.7)
            return
        time.sleep(0.02)
    raise AssertionError("the run ended before the moment to stop it")


def test_an_interrupted_study_resumes_to_the_same_results(data: Path) -> None:
    for how in (signal.SIGKILL, signal.SIGINT):
        process = subprocess.Popen(command(data, "out", "store"), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        fine_tuning_has_begun(data / "store", process)
        process.send_signal(how)
        message = process.communicate()[1].decode()
        assert not (data / "out" / "results.csv").exists()
        assert list((data / "store").glob("??/*/record.json"))
    assert process.returncode == 130
    assert "interrupted" in message
    assert "Traceback" not in message
    for out, store in (("out", "store"), ("undisturbed", "store2")):
        subprocess.run(command(data, out, store), check=True, capture_output=True)
    same = (
        "results.csv",
        "tables.md",
        "report.html",
        "models/random/model.json",
        "figures/lambda--random--aligned.png",
    )
    for name in same:
        assert (data / "out" / name).read_bytes() == (data / "undisturbed" / name).read_bytes(), name
    assert [path.name for path in (data / "out").glob(".*")] == [MARKER]
    assert os.listdir(data / "store" / "tmp") == []  # noqa: PTH208

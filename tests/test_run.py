"""Studies end to end: rows, resumption, honesty of the choice, predictions."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import write_folder_task
from test_pipeline import Quiet

import taskvec as tv
from taskvec import runs
from taskvec.results import COLUMNS
from taskvec.store import Store, read_json
from taskvec.study import StudyFile
from taskvec.study_files import parse_study

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
    (out / "results.csv").write_text("damaged")
    mended, _ = run(study_file(data), out, store)
    assert (mended.ran, mended.written) == (0, True)
    assert (out / "figures").is_dir()
    assert tuple(rows_of(out).columns) == tuple(COLUMNS)
    assert (out / "disentanglement.csv").exists()
    text = study_file(data).text.replace("pairs: 1", "pairs: 0")
    run(StudyFile(parse_study(text, "small"), text, data), out, store)
    assert not (out / "disentanglement.csv").exists()


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
        if sum('"function": "taskvec.steps:pick_head"' in text for text in records) == 2:
            time.sleep(0.7)
            return
        time.sleep(0.02)
    raise AssertionError("the run ended before the moment to stop it")


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_study_resumes_to_the_same_results(data: Path, how: signal.Signals) -> None:
    process = subprocess.Popen(command(data, "out", "store"), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    fine_tuning_has_begun(data / "store", process)
    process.send_signal(how)
    message = process.communicate()[1].decode()
    if how == signal.SIGINT:
        assert process.returncode == 130
        assert "interrupted" in message
        assert "Traceback" not in message
    assert not (data / "out" / "results.csv").exists()
    before = len(list((data / "store").glob("??/*/record.json")))
    assert before > 0
    for out, store in (("out", "store"), ("undisturbed", "store2")):
        subprocess.run(command(data, out, store), check=True, capture_output=True)
    assert (data / "out" / "results.csv").read_bytes() == (data / "undisturbed" / "results.csv").read_bytes()
    assert os.listdir(data / "store" / "tmp") == []  # noqa: PTH208

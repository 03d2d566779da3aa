"""Artifacts and steps: whole or not at all, skipped when done, resumed when killed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import PATHS
from helpers.reporters import Quiet
from hypothesis import given
from hypothesis import strategies as st

from taskvec.core import locks
from taskvec.core.errors import TaskvecError
from taskvec.core.files import canonical, disk_errors, fingerprint, read_json, write_json
from taskvec.core.notes import listen
from taskvec.core.settings import Probe
from taskvec.engine import pipeline
from taskvec.engine import store as store_module
from taskvec.engine.executors import Inline, Processes, decode, encode
from taskvec.engine.pipeline import Config, Job, Step, Untracked, mapped, step_type
from taskvec.engine.store import RECORD, Store

CALLS: list[str] = []


class Number(Config):
    value: int = 0
    fail: bool = False
    divide: int = 1

    def threaded(self) -> bool:
        return True


@step_type(1, reads=["numbers"], writes=["n.txt"])
def number(config: Number, inputs: Any, out: Path, progress: Any) -> None:
    """Write a number: its own plus those it reads."""
    total = config.value + sum(int((folder / "n.txt").read_text()) for folder in inputs["numbers"] or ())
    if config.fail:
        (out / "half.txt").write_text("half")
        raise TaskvecError("the step failed", "mend it")
    (out / "n.txt").write_text(str(total // config.divide))


class Duration(Config):
    seconds: float


@step_type(1)
def slow(config: Duration, inputs: Any, out: Path, progress: Any) -> None:
    (out / "n.txt").write_text(f"{os.getpid()}")
    progress(0.5)
    time.sleep(config.seconds)


@step_type(1, reads=["numbers"])
def remove(config: Number, inputs: Any, out: Path, progress: Any) -> None:
    """Clear the store that it reads, as another process may."""
    store = Store(out.parent.parent)
    store.clear(store.held())
    number.function(config, inputs, out, progress)


@step_type(1)
def die(config: Config, inputs: Any, out: Path, progress: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@step_type(1, writes=["n.txt", "m.txt"])
def forget(config: Config, inputs: Any, out: Path, progress: Any) -> None:
    (out / "n.txt").write_text("1")


@step_type(1, reads=["tree"], writes=["shape.json"])
def shape(config: Config, inputs: Any, out: Path, progress: Any) -> None:
    """Write the numbers that it reads, nested as they are."""
    write_json(out / "shape.json", mapped(inputs["tree"], lambda folder: int((folder / "n.txt").read_text())))


def step(label: str, value: int, *reads: Step, **config: Any) -> Step:
    return Step(label, number, Number(value=value, **config), {"numbers": reads} if reads else {})


def run(store: Store, *steps: Step) -> tuple[dict[Step, Any], Quiet]:
    watcher = Quiet()
    return pipeline.run(steps, store, Inline(), watcher), watcher


def test_steps_run_in_order_and_a_second_run_does_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path)
    one = step("one", 1)
    two, three = step("two", 2, one), step("three", 3, one)
    last = step("last", 10, two, three)
    done, first = run(store, last)
    assert (done[last].folder / "n.txt").read_text() == "17"
    assert first.ran == ["one", "two", "three", "last"]
    _, again = run(Store(tmp_path), last)
    assert again.ran == []
    assert again.kept == ["one", "two", "three", "last"]


def test_only_what_changes_is_run_again(tmp_path: Path) -> None:
    store = Store(tmp_path)
    run(store, step("sum", 0, step("a", 1), step("b", 2)))
    _, watcher = run(store, step("sum", 0, step("a", 1), step("b", 3)))
    assert watcher.ran == ["b", "sum"]


def test_a_step_whose_inputs_come_out_the_same_is_not_run_again(tmp_path: Path) -> None:
    store = Store(tmp_path)
    run(store, step("after", 5, step("a", 10, divide=10)))
    _, watcher = run(store, step("after", 5, step("a", 11, divide=10)))
    assert watcher.ran == ["a"]


def test_a_failed_step_leaves_nothing_and_keeps_what_was_done(tmp_path: Path) -> None:
    store = Store(tmp_path)
    good = step("good", 1)
    with pytest.raises(TaskvecError, match="the step failed"):
        run(store, step("bad", 2, good, fail=True))
    assert list((tmp_path / "tmp").iterdir()) == []
    _, watcher = run(store, step("mended", 2, good))
    assert watcher.kept == ["good"]


def test_two_steps_of_the_same_work_run_once(tmp_path: Path) -> None:
    store = Store(tmp_path)
    done, watcher = run(store, step("one", 1), step("same", 1))
    assert watcher.ran == ["one"]
    assert len({artifact.id for artifact in done.values()}) == 1


@pytest.mark.parametrize("damage", ["content", "missing", "record", "about", "list", "no record", "outside"])
def test_a_damaged_artifact_is_made_again_and_kept_aside(tmp_path: Path, damage: str) -> None:
    one = step("one", 1)
    done, _ = run(Store(tmp_path), one)
    folder = done[one].folder
    if damage == "content":
        (folder / "n.txt").write_text("2")
        os.utime(folder / "n.txt", ns=(1, 1))  # a clock of a filesystem may tick only some times a second
    elif damage == "missing":
        (folder / "n.txt").unlink()
    elif damage == "no record":
        (folder / RECORD).unlink()
    else:
        record = read_json(folder / RECORD)
        files = record["files"] | ({"../x": "0" * 64} if damage == "outside" else {})
        about = {"about": {"label": 3}, "list": ["label", "function"]}.get(damage, record["about"])
        (folder / RECORD).write_text("{" if damage == "record" else json.dumps({"about": about, "files": files}))
    held = sorted(path.name for path in folder.iterdir())
    again, watcher = run(Store(tmp_path), one)
    assert watcher.ran == ["one"]
    assert (again[one].folder / "n.txt").read_text() == "1"
    aside = tmp_path / "damaged" / folder.name
    assert watcher.notes == [f"one: '{folder}' was damaged; it is made again, and what was there is kept in '{aside}'"]
    assert sorted(path.name for path in aside.iterdir()) == held


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """List the files that are read for their digests from now on."""
    names: list[str] = []
    real = store_module.file_digest
    monkeypatch.setattr(store_module, "file_digest", lambda path: names.append(path.name) or real(path))
    return names


def test_who_wrote_a_file_reads_it_for_its_digest_and_nobody_later(tmp_path: Path, hashed: list[str]) -> None:
    one, two = step("one", 1), step("two", 2)
    run(Store(tmp_path), one, two)
    assert hashed == ["n.txt", "n.txt"]
    done, watcher = run(Store(tmp_path), one, two)
    assert (watcher.ran, len(hashed)) == ([], 2)
    record = done[one].json(RECORD)
    assert record["stamps"] == {"n.txt": [1, (done[one].folder / "n.txt").stat().st_mtime_ns]}
    assert record["files"] == {"n.txt": hashlib.sha256(b"1").hexdigest()}


def test_the_parent_reads_no_file_that_a_worker_has_written(
    tmp_path: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", PATHS)
    one = step("one", 1)
    done = pipeline.run([one], Store(tmp_path), Processes(2), Quiet())
    assert hashed == []
    assert Store(tmp_path).changed(done[one].id) == []


@pytest.mark.parametrize("how", ["copied", "older", "odd"])
def test_what_tells_no_size_and_time_is_read_once(tmp_path: Path, how: str, hashed: list[str]) -> None:
    one, place = step("one", 1), tmp_path / "store"
    folder = run(Store(place), one)[0][one].folder
    if how == "copied":
        os.utime(folder / "n.txt", ns=(5, 5))
    else:
        record = read_json(folder / RECORD)
        record["stamps"] = {"n.txt": ["1", None]}
        if how == "older":
            del record["stamps"]
        (folder / RECORD).write_text(json.dumps(record))
    before = (folder / RECORD).read_bytes()
    hashed.clear()
    for _ in range(3):
        assert run(Store(place), one)[1].ran == []
    assert hashed == ["n.txt"]
    assert (folder / RECORD).read_bytes() == before
    (folder / "n.txt").write_text("2")
    os.utime(folder / "n.txt", ns=(6, 6))
    assert run(Store(place), one)[1].ran == ["one"]


def test_a_file_of_another_size_is_damaged_whatever_its_time(tmp_path: Path, hashed: list[str]) -> None:
    one = step("one", 12)
    path = run(Store(tmp_path), one)[0][one].folder / "n.txt"
    seen = path.stat()
    path.write_text("1")
    os.utime(path, ns=(seen.st_atime_ns, seen.st_mtime_ns))
    hashed.clear()
    store = Store(tmp_path)
    assert store.find(run(store, one)[0][one].id) is not None
    assert hashed == ["n.txt"]  # of the step that was run again


def test_a_byte_that_changed_unseen_is_found_by_reading_all(tmp_path: Path) -> None:
    one, store = step("one", 12), Store(tmp_path)
    artifact = run(store, one)[0][one]
    path = artifact.folder / "n.txt"
    seen = path.stat()
    path.write_text("13")
    os.utime(path, ns=(seen.st_atime_ns, seen.st_mtime_ns))
    assert run(Store(tmp_path), one)[1].ran == []
    assert store.changed(artifact.id) == ["n.txt"]
    path.unlink()
    assert store.changed(artifact.id) == ["n.txt"]
    assert store.changed("0" * 20) == []


def test_files_that_others_put_into_an_artifact_do_not_damage_it_and_stay(tmp_path: Path) -> None:
    one = step("one", 1)
    done, _ = run(Store(tmp_path), one)
    folder = done[one].folder
    for name in (".DS_Store", ".nfs000001", "Thumbs.db", "n.txt~", "n (conflicted copy).txt"):
        (folder / name).write_text("mine")
    again, watcher = run(Store(tmp_path), one, step("two", 1, one))
    assert watcher.ran == ["two"]
    assert again[one].digest == done[one].digest
    assert (folder / "Thumbs.db").read_text() == "mine"
    store = Store(tmp_path)
    with listen() as heard:
        assert [held.label for held in store.clear(store.held())] == ["one", "two"]
    assert len(heard) == 1
    assert not folder.exists()
    kept = sorted(path.name for path in (tmp_path / "foreign" / folder.name).iterdir())
    assert kept == [".DS_Store", ".nfs000001", "Thumbs.db", "n (conflicted copy).txt", "n.txt~"]
    assert run(Store(tmp_path), one)[1].ran == ["one"]


def test_files_that_others_put_into_a_damaged_artifact_stay_when_it_is_cleared(tmp_path: Path) -> None:
    one = step("one", 1)
    folder = run(Store(tmp_path), one)[0][one].folder
    (folder / "n.txt").unlink()
    (folder / "n.txt").mkdir()
    (folder / "n.txt" / "thesis.txt").write_text("mine")
    (folder / "elsewhere").symlink_to(tmp_path)
    assert run(Store(tmp_path), one)[1].ran == ["one"]
    store = Store(tmp_path)
    with listen() as heard:
        store.clear(store.held())
    kept = tmp_path / "foreign" / folder.name
    assert heard == [
        f"elsewhere, n.txt/thesis.txt in '{tmp_path}/damaged/{folder.name}' is no part of it: kept in '{kept}'"
    ]
    assert (kept / "n.txt" / "thesis.txt").read_text() == "mine"
    assert (kept / "elsewhere").is_symlink()
    assert store.held() == []


@pytest.mark.parametrize("seconds", ["text", None, [1], 1e999, float("nan"), 10**400, -1])
def test_a_record_of_odd_seconds_is_one_that_does_not_tell_them(tmp_path: Path, seconds: Any) -> None:
    one = step("one", 1)
    folder = run(Store(tmp_path), one)[0][one].folder
    record = read_json(folder / RECORD)
    record["about"]["seconds"] = seconds
    (folder / RECORD).write_text(json.dumps(record))
    done, watcher = run(Store(tmp_path), one)
    assert watcher.ran == []
    assert np.isnan(done[one].seconds())


def test_a_store_that_is_cleared_during_a_run_is_one_clear_error(tmp_path: Path) -> None:
    store = Store(tmp_path)
    one = step("one", 1)
    two = Step("two", remove, Number(value=2), {"numbers": [one]})
    with pytest.raises(TaskvecError, match="two: '.*' was removed while a run needed it\nrun again"):
        run(store, two)
    assert run(Store(tmp_path), step("two", 2, one))[1].ran == ["one", "two"]


@pytest.mark.parametrize("who", ["another", "an older version"])
def test_what_others_left_in_tmp_stays_and_raises_nothing(tmp_path: Path, who: str) -> None:
    name = "my-own-notes" if who == "another" else f"{socket.gethostname()}-999999-0123456789ab"
    (tmp_path / "tmp" / name).mkdir(parents=True)
    store = Store(tmp_path)
    store.sweep()
    run(store, step("one", 1))
    assert [path.name for path in (tmp_path / "tmp").iterdir()] == [name]


def test_a_folder_of_a_living_process_is_not_swept(tmp_path: Path) -> None:
    living, code = (
        Store(tmp_path),
        "import sys, pathlib, taskvec.engine.store as s; s.Store(pathlib.Path(sys.argv[1])).sweep()",
    )
    folder = living.begin()
    living.sweep()
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    assert folder.is_dir()
    del living
    assert list((tmp_path / "locks").iterdir()) == []


def test_another_machines_folder_is_not_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import os, sys, pathlib, taskvec.engine.store as s\n"
        "store = s.Store(pathlib.Path(sys.argv[1])); store.begin(); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    here = locks.machine()
    monkeypatch.setattr(locks, "machine", lambda: {"elsewhere"})
    Store(tmp_path).sweep()
    assert len(list((tmp_path / "tmp").iterdir())) == 1
    monkeypatch.setattr(locks, "machine", lambda: here)
    monkeypatch.setattr(locks, "fcntl", None)
    Store(tmp_path).sweep()
    assert len(list((tmp_path / "tmp").iterdir())) == 1
    monkeypatch.undo()
    Store(tmp_path).sweep()
    assert list((tmp_path / "tmp").iterdir()) == list((tmp_path / "locks").iterdir()) == []


def test_a_killed_writer_leaves_a_hidden_folder_that_the_next_one_removes(tmp_path: Path) -> None:
    code = (
        "import os, sys, pathlib, taskvec.core.locks as l\n"
        "with l.replacing(pathlib.Path(sys.argv[1])) as new: new.write_text('half'); os.kill(os.getpid(), 9)"
    )
    place = tmp_path / ("ä" * 120)
    place.write_text("whole")
    subprocess.run([sys.executable, "-c", code, str(place)], check=False)
    assert place.read_text() == "whole"
    assert len(list(tmp_path.iterdir())) == 2
    with locks.replacing(place) as new:
        new.write_text("new")
        locks.sweep(tmp_path)
    assert list(tmp_path.iterdir()) == [place]
    assert place.read_text() == "new"


def test_every_artifact_knows_what_made_it(tmp_path: Path) -> None:
    one = step("one", 1)
    two = step("two", 2, one)
    done, _ = run(Store(tmp_path), two)
    about = done[two].json(RECORD)["about"]
    assert about["step"] == "number"
    assert about["config"] == {"value": 2}
    assert about["inputs"] == {"numbers": [done[one].id]}
    assert about["versions"]["torch"]


def test_worker_processes_give_what_this_process_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", PATHS)
    steps = [step(f"s{i}", i) for i in range(4)]
    last = step("last", 0, *steps)
    done = pipeline.run([last], Store(tmp_path / "a"), Processes(2), Quiet())
    here, _ = run(Store(tmp_path / "b"), last)
    assert done[last].digest == here[last].digest
    assert done[last].id == here[last].id


def test_errors_and_sudden_deaths_of_workers_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", PATHS)
    with pytest.raises(TaskvecError, match="the step failed"):
        pipeline.run([step("bad", 1, fail=True)], Store(tmp_path), Processes(2), Quiet())
    with pytest.raises(TaskvecError, match="'gone' was ended by signal 9"):
        pipeline.run([Step("gone", die, Config())], Store(tmp_path), Processes(2), Quiet())
    assert list((tmp_path / "tmp").iterdir()) == []


def test_killing_the_parent_ends_its_workers_and_the_next_run_sweeps(tmp_path: Path) -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from test_pipeline import *\n"
        "s = Step('slow', slow, Duration(seconds=60))\n"
        "pipeline.run([s], Store(Path(sys.argv[2])), Processes(2), Quiet())"
    )
    here = str(Path(__file__).parent)
    env = os.environ | {"PYTHONPATH": PATHS}
    parent = subprocess.Popen([sys.executable, "-c", code, here, str(tmp_path)], env=env)
    pid = wait_for_number(tmp_path / "tmp")
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 10
    while running(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not running(pid)
    assert len(list((tmp_path / "tmp").iterdir())) == 1
    Store(tmp_path).sweep()
    assert list((tmp_path / "tmp").iterdir()) == []


def wait_for_number(folder: Path) -> int:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for file in folder.glob("*/n.txt"):
            if text := file.read_text():
                return int(text)
        time.sleep(0.05)
    raise AssertionError("the step never began")


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_workers_do_not_import_from_the_folder_one_is_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", PATHS)
    (tmp_path / "queue.py").write_text("raise RuntimeError('wrong file')")
    monkeypatch.chdir(tmp_path)
    one = step("one", 1)
    done = pipeline.run([one], Store(tmp_path / "store"), Processes(2), Quiet())
    assert (done[one].folder / "n.txt").read_text() == "1"


def test_a_full_disk_while_finishing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("taskvec.engine.store.json_text", full)
    with pytest.raises(TaskvecError, match="no space left"):
        run(Store(tmp_path), step("one", 1))
    assert list((tmp_path / "tmp").iterdir()) == []


def test_a_full_disk_is_one_clear_message(tmp_path: Path) -> None:
    with pytest.raises(TaskvecError, match="no space left"), disk_errors(tmp_path):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_tree_digest_follows_content_and_not_times(tmp_path: Path) -> None:
    store, root = Store(tmp_path / "store"), tmp_path / "data"
    root.mkdir()
    (root / "a").write_text("1")
    before = store.tree_digest(root, ["a"])
    os.utime(root / "a", (1, 1))
    assert store.tree_digest(root, ["a"]) == before
    (root / "a").write_text("2")
    assert store.tree_digest(root, ["a"]) != before


def test_jobs_survive_the_way_to_a_worker(tmp_path: Path) -> None:
    job = Job(step("one", 1), "abc", {"numbers": ["x"]}, tmp_path)
    back = decode(encode(job))
    assert (back.id, back.inputs, back.folder, back.step.config) == (job.id, job.inputs, job.folder, Number(value=1))


@given(st.dictionaries(st.text(max_size=3), st.integers() | st.floats(allow_nan=False, allow_infinity=False)))
def test_fingerprints_do_not_depend_on_the_order_of_keys(value: dict[str, float]) -> None:
    assert fingerprint(value) == fingerprint(dict(reversed(value.items())))


def test_fingerprints_refuse_what_has_no_stable_form() -> None:
    for value in (float("nan"), {1, 2}, object()):
        with pytest.raises((TypeError, ValueError)):
            canonical(value)


def test_threads_and_version_are_part_of_a_steps_identity_and_labels_are_not() -> None:
    base = Step("a", number, Number(), threads=1)
    same, threads = Step("b", number, Number()), Step("a", number, Number(), threads=2)
    version = Step("a", replace(number, version=2), Number())
    assert pipeline.step_id(base, {}) == pipeline.step_id(same, {})
    assert len({pipeline.step_id(s, {}) for s in (base, threads, version)}) == 3


class Told(Config):
    rate: float
    size: int | None
    fast: bool = False
    probe: Probe = Probe()
    name: Untracked[str] = ""

    def unused(self) -> dict[str, set[str]]:
        return {"probe": {"warmup"}}


def test_what_is_untracked_unused_or_as_it_always_was_is_no_part_of_a_configuration() -> None:
    assert Told(rate=1, size=None, name="x").tracked() == {"rate": 1.0, "size": None}
    changed = Told(rate=1, size=None, fast=True, probe=Probe(steps=3)).tracked()
    assert (changed["fast"], changed["probe"]["steps"]) == (True, 3)
    assert set(Probe.model_fields) - set(changed["probe"]) == {"warmup"}
    with pytest.raises(ValueError, match="fest"):
        Told(rate=1, size=None, fest=True)


def test_where_a_function_lives_is_no_part_of_a_steps_identity() -> None:
    moved = replace(number, function=slow.function)
    assert moved.place != number.place
    assert pipeline.step_id(Step("a", moved, Number()), {}) == pipeline.step_id(Step("a", number, Number()), {})


def test_two_kinds_of_step_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="two kinds of step are named 'number'"):
        step_type(1, name="number")(slow.function)


def test_a_step_of_other_inputs_or_configuration_than_its_type_is_refused() -> None:
    with pytest.raises(ValueError, match="a step 'number' reads no letters"):
        Step("a", number, Number(), {"letters": []})
    with pytest.raises(TypeError, match="a step 'number' takes Number"):
        Step("a", number, Config())


def test_a_file_that_a_step_should_have_written_is_missed(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"step 'a' has not written m\.txt"):
        run(Store(tmp_path), Step("a", forget, Config()))
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.parametrize("executor", [Inline, lambda: Processes(2)])
def test_nested_inputs_keep_their_shape(tmp_path: Path, executor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", PATHS)
    one, two = step("one", 1), step("two", 2)
    nested = Step("nested", shape, Config(), {"tree": [[one, None], [], [[two]]]})
    flat = Step("flat", shape, Config(), {"tree": [one, two]})
    done = pipeline.run([nested, flat], Store(tmp_path), executor(), Quiet())
    assert done[nested].json("shape.json") == [[1, None], [], [[2]]]
    assert done[nested].json(RECORD)["about"]["inputs"] == {"tree": [[done[one].id, None], [], [[done[two].id]]]}
    assert done[nested].id != done[flat].id


def test_what_another_process_makes_meanwhile_is_used(tmp_path: Path) -> None:
    steps = [step("a", 1), step("b", 2)]

    class Together(Inline):
        def start(self, job: Job, *told: Any) -> None:
            if job.step is steps[0]:
                run(Store(tmp_path), step("elsewhere", 2))
            super().start(job, *told)

    watcher = Quiet()
    pipeline.run(steps, Store(tmp_path), Together(), watcher)
    assert (watcher.ran, watcher.kept) == (["a"], ["b"])


def test_the_steps_of_a_plan_start_in_its_order(tmp_path: Path) -> None:
    first = step("first", 1)
    after, other = step("after", 2, first), step("other", 3)
    assert run(Store(tmp_path), after, other)[1].ran == ["first", "after", "other"]


def test_a_step_costs_no_more_in_a_longer_plan(tmp_path: Path) -> None:
    """A step costs as much in a long plan as in a short one: what waits is counted and not looked through."""
    seconds = []
    for count in (100, 1000):
        begin = time.process_time()
        run(Store(tmp_path / str(count)), *(step(f"s{index}", index) for index in range(count)))
        seconds.append((time.process_time() - begin) / count)
    assert seconds[1] < 3 * seconds[0]

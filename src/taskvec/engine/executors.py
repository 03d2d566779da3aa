"""Where steps run: in this process, or in worker processes that end with it.

A worker is ``python -m taskvec.engine.executors``: one JSON line in for each job, JSON lines out for progress and the
end.
It leaves at once when its standard input closes, so that killing the parent leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import math
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from taskvec.core.errors import TaskvecError
from taskvec.core.files import disk_errors, write_json
from taskvec.core.machine import SHARING, VISIBLE, workers_of_gpu
from taskvec.core.notes import library_warnings, listen, print_note, printable
from taskvec.engine.pipeline import Executor, Finished, Job, Step, leaves, mapped
from taskvec.engine.store import NOTES, Content, content_of, present

MOMENT = 0.5
"""Seconds between looks at what workers wrote on standard error."""
LAST = 500
"""Bytes of a dead worker's last words that its error repeats."""
ANSWERS = {"progress", "note", "seconds", "problem", "traceback"}
"""What a worker may answer: one of these a line."""
PATIENCE = 5.0
"""Seconds that a worker which no longer answers has to end."""


def open_executor(workers: int, gpus: Sequence[str] = ()) -> Executor:
    """Return an executor for that many steps at once, on GPUs by their ids; one worker on a CPU is this process itself.

    What computes on GPUs always runs in worker processes, so that this one opens no CUDA context.
    """
    return Processes(workers, gpus) if workers > 1 or gpus else Inline()


def environment(gpu: str | None, sharing: int) -> dict[str, str]:
    """Return the environment of a worker: of a GPU it sees that one alone, and repeats its matrix products bit by bit.

    CUBLAS_WORKSPACE_CONFIG has to be set before CUDA starts (PyTorch's notes on reproducibility).
    """
    if gpu is None:
        return dict(os.environ)
    return {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"} | os.environ | {VISIBLE: gpu, SHARING: str(sharing)}


def perform(job: Job, progress: Callable[[float], None], note: Callable[[str], None]) -> Finished:
    """Run a job in this process with the step's number of threads, and keep what is noted beside its result.

    Float32 is float32 on a GPU too: whatever computes with TF32 says so (``core.compute.arithmetic``).
    Its files are read once more, for their digests, while they are in the system's memory. When it fails its folder is
    removed, and a user's mistake is told with its label.
    """
    start, step = time.perf_counter(), job.step
    inputs = dict.fromkeys(step.type.reads) | {role: mapped(tree, Path) for role, tree in job.inputs.items()}
    try:
        from taskvec.core.compute import arithmetic, threads

        reading, computing = present(leaves(list(inputs.values())), job.folder), threads(step.threads)
        with computing, arithmetic(), disk_errors(job.folder), reading, listen(note) as notes, library_warnings():
            step.type.function(step.config, inputs, job.folder, progress)
            check_written(job)
            if notes:
                write_json(job.folder / NOTES, notes)
            content = content_of(job.folder)
    except BaseException as error:
        shutil.rmtree(job.folder, ignore_errors=True)
        if (explanation := explained(step.label, error)) is error:
            raise
        raise explanation from None
    return Finished(job, time.perf_counter() - start, content)


def check_written(job: Job) -> None:
    """Raise if a step has not written a file that its type declares."""
    names = job.step.type.writes(job.step.config)
    if missing := [name for name in names if not (job.folder / name).exists()]:
        raise RuntimeError(f"step '{job.step.label}' has not written {', '.join(missing)}")


def explained(label: str, error: BaseException) -> BaseException:
    """Return what a user is told of an error in a step; errors that no user can mend stay as they are."""
    if isinstance(error, TaskvecError):
        return TaskvecError(f"{label}: {error.problem}", error.fix)
    if isinstance(error, ImportError):
        problem = f"step '{label}' cannot import what it needs: {error}"
        return TaskvecError(problem, "install what is missing beside taskvec")
    if isinstance(error, MemoryError | RuntimeError) and is_lack_of_memory(error):
        return lack_of_memory(label)
    return error


def lack_of_memory(label: str) -> TaskvecError:
    """Return what a user is told of a step that found no room; several workers of one GPU are named first."""
    fix, sharing = "lower batch_size, raise accumulate, or choose another device", workers_of_gpu()
    if sharing > 1:
        where = f": {sharing} workers share its GPU ({os.environ.get(VISIBLE)})"
        return TaskvecError(f"no memory left in step '{label}'{where}", f"run with fewer --workers, or {fix}")
    return TaskvecError(f"no memory left in step '{label}'", fix)


def is_lack_of_memory(error: Exception) -> bool:
    """Say whether Python or torch, on a CPU or another device, found no room; torch's own kinds are RuntimeErrors."""
    said = re.search(
        r"out of memory|can't allocate memory|not enough memory|CUBLAS_STATUS_ALLOC_FAILED", str(error), re.IGNORECASE
    )
    return isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__ or said is not None


class Inline:
    """Runs each job when it is started, in this process."""

    slots = 1

    def __init__(self) -> None:
        self._finished: list[Finished] = []

    def start(self, job: Job, progress: Callable[[float], None], note: Callable[[str], None]) -> None:
        """Run the job now."""
        self._finished.append(perform(job, progress, note))

    def wait(self) -> list[Finished]:
        """Return what was done since the last call."""
        finished, self._finished = self._finished, []
        return finished

    def close(self) -> None:
        """Nothing is under way."""


@dataclasses.dataclass(eq=False)
class _Worker:
    process: subprocess.Popen[str]
    log: BinaryIO
    gpu: str | None = None
    listener: threading.Thread | None = None
    shown: int = 0
    ended: bool = False
    job: Job | None = None
    progress: Callable[[float], None] = lambda _: None
    note: Callable[[str], None] = lambda _: None

    def written(self) -> str:
        """Return the whole lines that it wrote on standard error since the last call."""
        new = os.pread(self.log.fileno(), self._size() - self.shown, self.shown)
        whole = new[: new.rfind(b"\n") + 1]
        self.shown += len(whole)
        return whole.decode("utf-8", "replace")

    def last_words(self) -> str:
        """Return the last of what it wrote on standard error, which is then not passed on as well."""
        self.shown = self._size()
        return os.pread(self.log.fileno(), LAST, max(0, self.shown - LAST)).decode("utf-8", "replace").strip()

    def _size(self) -> int:
        return os.fstat(self.log.fileno()).st_size


class Processes:
    """A fixed number of worker processes, started when first needed; of GPUs each gets the one with fewest workers."""

    def __init__(self, slots: int, gpus: Sequence[str] = ()) -> None:
        self.slots, self.gpus = slots, gpus
        self._workers: list[_Worker] = []
        self._messages: queue.Queue[tuple[_Worker, dict[str, Any] | None]] = queue.Queue()
        self._said: dict[str, _Worker] = {}

    def start(self, job: Job, progress: Callable[[float], None], note: Callable[[str], None]) -> None:
        """Hand the job to an idle worker."""
        idle = (w for w in self._workers if w.job is None and not w.ended and w.process.poll() is None)
        worker = next(idle, None) or self._hire()
        worker.job, worker.progress, worker.note = job, progress, note
        assert worker.process.stdin is not None
        with contextlib.suppress(OSError):  # one that died while idle: its closed output tells so, and wait() raises
            worker.process.stdin.write(encode(job) + "\n")
            worker.process.stdin.flush()

    def wait(self) -> list[Finished]:
        """Wait for the next job to end, passing on meanwhile what workers report and write."""
        while True:
            self._show()
            try:
                worker, message = self._messages.get(timeout=MOMENT)
            except queue.Empty:
                continue
            job = worker.job
            worker.ended |= message is None
            if message is not None and "said" in message:
                print_note(printable(message["said"]))
                continue
            if job is None:
                continue
            if message is None:
                raise died(worker, job)
            if "progress" in message:
                worker.progress(message["progress"])
            elif "note" in message:
                worker.note(message["note"])
            elif "seconds" in message:
                worker.job = None
                return [Finished(job, message["seconds"], Content(**message["content"]))]
            elif "problem" in message:
                raise TaskvecError(message["problem"], message["fix"])
            else:
                raise RuntimeError(f"step '{job.step.label}' failed\n{message['traceback']}")

    def close(self) -> None:
        """Stop all workers and remove the folders of unfinished jobs."""
        self._show()
        for worker in self._workers:
            worker.process.kill()
            if worker.listener is not None:
                worker.listener.join()
            with contextlib.suppress(OSError):
                worker.process.__exit__(None, None, None)  # closes the pipes and waits
            worker.log.close()
            if worker.job is not None:
                shutil.rmtree(worker.job.folder, ignore_errors=True)
        self._workers.clear()

    def _show(self) -> None:
        """Pass on what workers wrote on standard error; what several say, as libraries may at their start, once."""
        for worker in self._workers:
            for line in worker.written().splitlines():
                if self._said.setdefault(line, worker) is worker:
                    print_note(printable(line))

    def _free_gpu(self) -> str | None:
        """Return the first GPU with the fewest workers that live."""
        busy = [worker.gpu for worker in self._workers if worker.process.poll() is None]
        return min(self.gpus, key=busy.count, default=None)

    def _hire(self) -> _Worker:
        gpu = self._free_gpu()
        env = environment(gpu, math.ceil(self.slots / max(1, len(self.gpus))))
        log = tempfile.TemporaryFile("w+b")  # noqa: SIM115  closed with the worker
        command = [sys.executable, "-P", "-m", "taskvec.engine.executors"]  # -P: no import from the present folder
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log}
        try:
            process = subprocess.Popen(
                command, **pipes, env=env, encoding="utf-8", errors="replace", text=True, start_new_session=True
            )
        except OSError as error:
            log.close()
            raise TaskvecError(f"no worker process can be started: {error}", "run with --workers 1") from None
        worker = _Worker(process, log, gpu)
        worker.listener = threading.Thread(target=self._listen, args=(worker,), daemon=True)
        worker.listener.start()
        self._workers.append(worker)
        return worker

    def _listen(self, worker: _Worker) -> None:
        assert worker.process.stdout is not None
        for line in filter(str.strip, worker.process.stdout):
            self._messages.put((worker, message_of(line)))
        self._messages.put((worker, None))


def message_of(line: str) -> dict[str, Any]:
    """Read what a worker answers; a line that is no answer was printed by something that it loads at its start."""
    with contextlib.suppress(ValueError, RecursionError):
        if isinstance(answer := json.loads(line), dict) and answer.keys() & ANSWERS:
            return answer
    return {"said": line.rstrip("\n")}


def died(worker: _Worker, job: Job) -> TaskvecError:
    """Say how a worker came to its end in mid-job, with what it wrote last."""
    try:
        code = worker.process.wait(PATIENCE)
    except subprocess.TimeoutExpired:  # it has closed its output and lives on
        worker.process.kill()
        code = worker.process.wait()
    reason = f"by signal {-code}" if code < 0 else f"with exit code {code}"
    cause = "is there enough memory?" if code < 0 else "its last words may say why;"
    fix = f"{cause} finished steps are kept: run again to resume, perhaps with --workers 1"
    problem = f"the worker of step '{job.step.label}' was ended {reason}. {printable(worker.last_words())}"
    return TaskvecError(problem.strip(), fix)


def encode(job: Job) -> str:
    """Write a job as one line of JSON; a step's inputs are folders by now, so its dependencies stay behind."""
    step = job.step
    fields = {"place": step.type.place, "label": step.label, "threads": step.threads, "id": job.id}
    config = step.config.model_dump(mode="json")
    return json.dumps(fields | {"config": config, "inputs": job.inputs, "folder": str(job.folder)})


def decode(line: str) -> Job:
    """Read a job from its line of JSON; what its step's module lacks is an error."""
    data = json.loads(line)
    module, _, name = data["place"].partition(":")
    folder = Path(data["folder"])
    try:
        type = getattr(importlib.import_module(module), name)
    except ImportError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise explained(data["label"], error) from None
    step = Step(data["label"], type, type.config.model_validate(data["config"]), threads=data["threads"])
    return Job(step, data["id"], data["inputs"], folder)


def work(lines: TextIO, answers: TextIO) -> None:
    """Perform jobs from ``lines`` one after another; leave the process when ``lines`` ends, even in mid-job."""
    jobs: queue.Queue[str] = queue.Queue()

    def listen() -> None:
        for line in lines:
            jobs.put(line)
        os._exit(1)

    def answer(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    threading.Thread(target=listen, daemon=True).start()
    while True:
        try:
            job = decode(jobs.get())
            done = perform(job, lambda share: answer({"progress": share}), lambda text: answer({"note": text}))
            answer({"seconds": done.seconds, "content": dataclasses.asdict(done.content)})
        except TaskvecError as error:
            answer({"problem": error.problem, "fix": error.fix})
        except Exception:
            answer({"traceback": traceback.format_exc()})


def main() -> None:
    """Serve as a worker: jobs come on standard input, answers go to standard output, prints to standard error."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    answers.write("\n")  # ends a line that something else began
    os.dup2(2, 1)
    work(sys.stdin, answers)


if __name__ == "__main__":
    main()

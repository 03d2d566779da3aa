"""Where steps run: in this process, or in worker processes that end with it.

A worker is ``python -m taskvec.executors``: one JSON line in for each job, JSON lines out for progress and the end.
It leaves at once when its standard input closes, so that killing the parent leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from taskvec.errors import TaskvecError
from taskvec.pipeline import Executor, Finished, Job, Step, perform


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def open_executor(workers: int) -> Executor:
    """Return an executor for that many steps at once; one worker means this process itself."""
    return Inline() if workers <= 1 else Processes(workers)


def resolve(function: str) -> Callable[..., None]:
    """Import the function that a step names as ``module:name``."""
    module, name = function.split(":")
    found: Callable[..., None] = getattr(importlib.import_module(module), name)
    return found


def perform_here(job: Job, progress: Callable[[float], None]) -> Finished:
    """Run a job in this process with the step's number of threads."""
    import torch

    from taskvec.compute import threads

    try:
        with threads(job.step.threads):
            return perform(job, resolve(job.step.function), progress)
    except torch.OutOfMemoryError:
        fix = "lower batch_size, raise accumulate, or choose another device"
        raise TaskvecError(f"no memory left on the device in step '{job.step.label}'", fix) from None


class Inline:
    """Runs each job when it is started, in this process."""

    slots = 1

    def __init__(self) -> None:
        self._finished: list[Finished] = []

    def start(self, job: Job, progress: Callable[[float], None]) -> None:
        """Run the job now."""
        self._finished.append(perform_here(job, progress))

    def wait(self) -> list[Finished]:
        """Return what was done since the last call."""
        finished, self._finished = self._finished, []
        return finished

    def close(self) -> None:
        """Nothing is under way."""


@dataclasses.dataclass
class _Worker:
    process: subprocess.Popen[str]
    log: TextIO
    listener: threading.Thread
    job: Job | None = None
    progress: Callable[[float], None] = lambda _: None


class Processes:
    """A fixed number of worker processes, started when first needed."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self._workers: list[_Worker] = []
        self._messages: queue.Queue[tuple[int, dict[str, Any] | None]] = queue.Queue()

    def start(self, job: Job, progress: Callable[[float], None]) -> None:
        """Hand the job to an idle worker."""
        idle = (w for w in self._workers if w.job is None and w.process.poll() is None)
        worker = next(idle, None) or self._hire()
        worker.job, worker.progress = job, progress
        assert worker.process.stdin is not None
        with contextlib.suppress(OSError):  # one that died while idle: its closed output tells so, and wait() raises
            worker.process.stdin.write(encode(job) + "\n")
            worker.process.stdin.flush()

    def wait(self) -> list[Finished]:
        """Wait for the next job to end, passing progress on meanwhile."""
        while True:
            pid, message = self._messages.get()
            worker = next(w for w in self._workers if w.process.pid == pid)
            job = worker.job
            if job is None:
                continue
            if message is None:
                raise self._died(worker, job)
            if "progress" in message:
                worker.progress(message["progress"])
            elif "seconds" in message:
                worker.job = None
                return [Finished(job, message["seconds"])]
            elif "problem" in message:
                raise TaskvecError(message["problem"], message["fix"])
            else:
                raise RuntimeError(f"step '{job.step.label}' failed\n{message['traceback']}")

    def close(self) -> None:
        """Stop all workers and remove the folders of unfinished jobs."""
        for worker in self._workers:
            worker.process.kill()
            worker.listener.join()
            with contextlib.suppress(OSError):
                worker.process.__exit__(None, None, None)  # closes the pipes and waits
            worker.log.close()
            if worker.job is not None:
                shutil.rmtree(worker.job.folder, ignore_errors=True)
        self._workers.clear()

    def _hire(self) -> _Worker:
        log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115  closed with the worker
        command = [
            sys.executable,
            "-P",
            "-m",
            "taskvec.executors",
        ]  # -P: no import from the folder one happens to be in
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True
        )
        listener = threading.Thread(target=self._listen, args=(process,), daemon=True)
        worker = _Worker(process, log, listener)
        self._workers.append(worker)
        listener.start()
        return worker

    def _listen(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                self._messages.put((process.pid, json.loads(line)))
        finally:  # a worker that dies in mid-line is dead all the same
            self._messages.put((process.pid, None))

    def _died(self, worker: _Worker, job: Job) -> TaskvecError:
        code = worker.process.wait()
        worker.log.seek(0)
        last = worker.log.read()[-500:].strip()
        reason = f"by signal {-code}" if code < 0 else f"with exit code {code}"
        fix = "is there enough memory? finished steps are kept: run again to resume, perhaps with --workers 1"
        return TaskvecError(f"the worker of step '{job.step.label}' was ended {reason}. {last}".strip(), fix)


def encode(job: Job) -> str:
    """Write a job as one line of JSON; a step's inputs are folders by now, so its dependencies stay behind."""
    step = job.step
    fields = {"label": step.label, "function": step.function, "version": step.version, "config": step.config}
    fields["aside"] = dict(step.aside)
    return json.dumps(fields | {"threads": step.threads, "id": job.id, "inputs": job.inputs, "folder": str(job.folder)})


def decode(line: str) -> Job:
    """Read a job from its line of JSON."""
    data = json.loads(line)
    named = {name: data[name] for name in ("label", "function", "version", "config", "threads", "aside")}
    step = Step(**named, inputs={})
    return Job(step, data["id"], data["inputs"], Path(data["folder"]))


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
            done = perform_here(decode(jobs.get()), lambda share: answer({"progress": share}))
            answer({"seconds": done.seconds})
        except TaskvecError as error:
            answer({"problem": error.problem, "fix": error.fix})
        except Exception:
            answer({"traceback": traceback.format_exc()})


def main() -> None:
    """Serve as a worker: jobs come on standard input, answers go to standard output, prints to standard error."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    work(sys.stdin, answers)


if __name__ == "__main__":
    main()

"""Pre-training of the lab's encoders: recipes by name, resumable on one thread, with a record beside the weights."""

from __future__ import annotations

import hashlib
import json
import pickle
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from taskvec.core.compute import threads
from taskvec.core.errors import TaskvecError, unknown
from taskvec.core.files import disk_errors
from taskvec.core.locks import replacing, workspace
from taskvec.core.notes import note
from taskvec.core.progress import Progress, no_progress
from taskvec.core.training import Schedule, make_optimizer, train
from taskvec.engine.publishing import check_names, settle
from taskvec.lab.pretraining.contrastive import Contrastive
from taskvec.lab.pretraining.distillation import SelfDistillation
from taskvec.lab.pretraining.masked import MaskedAutoencoder
from taskvec.lab.pretraining.objective import WARMUP, WEIGHT_DECAY, Objective, mean_of_last
from taskvec.lab.pretraining.supervised import Supervised
from taskvec.lab.vit import VisionTransformer

MEAN = STD = (0.5, 0.5, 0.5)
"""Mean and standard deviation of the pixels, by which images are normalised before they enter an encoder."""
EVERY = 100
"""Steps between two checkpoints."""

Facts = dict[str, Any]


@dataclass(frozen=True)
class Pretraining:
    """One way to pre-train: its objective, made from steps and seed, and the length of the shipped run."""

    objective: Callable[[int, int], Objective[Any]]
    steps: int
    version: int = 1
    """The version of the recipe: raise it when the same steps and seed would give other weights."""


PRETRAININGS: Mapping[str, Pretraining] = MappingProxyType(
    {
        "supervised": Pretraining(Supervised, 7000),
        "supervised-few": Pretraining(partial(Supervised, few=True), 7000),
        "supervised-vit-l": Pretraining(partial(Supervised, width=160, depth=6, heads=5), 7000),
        "mae": Pretraining(MaskedAutoencoder, 7000),
        "dino": Pretraining(SelfDistillation, 8000, version=2),
        "contrastive": Pretraining(Contrastive, 4000),
        "contrastive-few": Pretraining(partial(Contrastive, few=True), 4000),
    }
)
"""How every encoder is pre-trained, by its name."""


class Run:
    """One pre-training under way: objective, optimizer, the losses so far and the CPU seconds they took."""

    def __init__(self, recipe: Pretraining, steps: int, seed: int) -> None:
        """Start from random weights."""
        self.objective = recipe.objective(steps, seed)
        self.schedule = Schedule(steps, warmup=round(WARMUP * steps), weight_decay=WEIGHT_DECAY)
        self.optimizer = make_optimizer(self.objective.groups(), self.schedule)
        self.losses: list[float] = []
        self.seconds = 0.0

    def loss(self, batch: Any) -> Tensor:
        """Return the loss of a batch, and add it to the losses so far."""
        loss = self.objective.loss(batch)
        self.losses.append(float(loss.detach()))
        return loss

    def advance(self, stop: int, after_step: Callable[[int], None], progress: Progress = no_progress) -> None:
        """Train up to step ``stop`` of the schedule."""
        steps = range(len(self.losses), stop)
        begin, before = time.process_time(), self.seconds

        def after(step: int) -> None:
            self.objective.after_step(step)
            self.seconds = before + time.process_time() - begin
            after_step(step)

        batches = map(self.objective.batch, steps)
        groups = self.objective.groups()
        train(
            groups,
            self.loss,
            batches,
            self.schedule,
            optimizer=self.optimizer,
            steps=steps,
            after_step=after,
            progress=progress,
            finite=True,
        )

    def state(self) -> Facts:
        """Return all that a resumed run needs."""
        return {
            "modules": self.objective.modules.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.objective.generator.get_state(),
            "losses": self.losses,
            "seconds": self.seconds,
        }

    def restore(self, state: Facts) -> None:
        """Return to the moment at which ``state`` was taken."""
        self.objective.modules.load_state_dict(state["modules"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.objective.generator.set_state(state["generator"])
        self.losses, self.seconds = list(state["losses"]), state["seconds"]


class Checkpoint:
    """The file of an unfinished run; one of another command or of other versions is not resumed."""

    def __init__(self, path: Path, command: str, recipe: int) -> None:
        """Name the file and what identifies its run: the command, the version of its recipe, the packages."""
        self.path = path
        self.key = {"command": command, "recipe": recipe, **versions()}

    def write(self, run: Run) -> None:
        """Write the state of a run; the file is replaced as a whole."""
        with replacing(self.path) as new:
            torch.save({"key": self.key, **run.state()}, new)

    def read(self) -> Facts | None:
        """Return the saved state, or None where it is damaged, missing or of another run."""
        try:
            state: Facts = torch.load(self.path, weights_only=True)
        except (OSError, EOFError, RuntimeError, pickle.UnpicklingError):
            return None
        if state.pop("key", None) == self.key:
            return state
        note(f"'{self.path}' is of another command or other versions, and is begun anew")
        return None


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file that appears whole or not at all; a different file of its name is moved aside."""
    with workspace(path) as fresh:
        (fresh / path.name).write_bytes(data)
        settle(fresh, path.parent, path.name)


def versions() -> dict[str, str]:
    """Return the versions on which the bytes of an encoder depend."""
    packages = ("torch", "pillow", "matplotlib", "numpy")
    return {"python": platform.python_version()} | {package: version(package) for package in packages}


def round_to_half(module: nn.Module) -> None:
    """Round the weights to float16, the precision in which they are kept, but leave them in float32."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(parameter.half())


def half_bytes(module: nn.Module) -> bytes:
    """Return a module's weights as the bytes of a safetensors file in float16."""
    return save({key: tensor.half().contiguous() for key, tensor in module.state_dict().items()})


def write_encoder(encoder: VisionTransformer, folder: Path, name: str, facts: Mapping[str, Any]) -> Path:
    """Write ``NAME.safetensors`` in float16, then ``NAME.json`` with ``facts`` and what belongs to the file itself."""
    path, data = folder / f"{name}.safetensors", half_bytes(encoder)
    write_bytes(path, data)
    record = {
        **facts,
        "versions": versions(),
        "sha256": hashlib.sha256(data).hexdigest(),
        "architecture": encoder.architecture,
        "mean": MEAN,
        "std": STD,
    }
    write_bytes(path.with_suffix(".json"), (json.dumps(record, indent=2) + "\n").encode())
    return path


def write_text_encoder(objective: Objective[Any], folder: Path, name: str) -> Facts:
    """Write the text encoder of a contrastive objective as ``NAME.text.safetensors``; return its part of the record."""
    if not isinstance(objective, Contrastive):
        return {}
    data = half_bytes(objective.text)
    write_bytes(folder / f"{name}.text.safetensors", data)
    return {"text_sha256": hashlib.sha256(data).hexdigest(), "vocabulary": " ".join(objective.text.indices)}


def command(name: str, steps: int, seed: int) -> str:
    """Return the command that makes an encoder."""
    return f"taskvec lab pretrain {name} --steps {steps} --seed {seed}"


def finish(run: Run, name: str, out: Path, seed: int) -> Path:
    """Round what ships to float16, measure it, and write it with its record."""
    objective, steps, begin = run.objective, run.schedule.steps, time.process_time()
    for module in (objective.encoder, *([objective.text] if isinstance(objective, Contrastive) else [])):
        round_to_half(module.eval())
    figures = {"final_loss": mean_of_last(run.losses), **objective.figures()}
    facts = {
        "command": command(name, steps, seed),
        "recipe": recipe_of(name).version,
        "seed": seed,
        "steps": steps,
        "threads": 1,
        "seconds": round(run.seconds + time.process_time() - begin, 1),
        "figures": figures,
        **write_text_encoder(objective, out, name),
    }
    return write_encoder(objective.encoder, out, name, facts)


def recipe_of(name: str) -> Pretraining:
    """Return a recipe by name; an unknown name raises with the nearest."""
    if name not in PRETRAININGS:
        raise unknown("pre-trained lab encoder", name, PRETRAININGS)
    return PRETRAININGS[name]


def pretrain(name: str, out: Path, steps: int | None = None, seed: int = 0, progress: Progress = no_progress) -> Path:
    """Pre-train one of ``PRETRAININGS`` on one thread and write it to the folder ``out``; return the weights' path.

    The same steps, seed and versions give the same bytes on one type of processor, also if the run was killed and
    started again: it continues from ``.NAME.checkpoint`` in ``out``. An unknown name, a full disk and a file in the
    place of the folder raise.
    """
    recipe = recipe_of(name)
    steps = recipe.steps if steps is None else steps
    if steps < 1:
        raise TaskvecError(f"cannot pre-train for {steps} steps", "ask for one or more")
    check_names(out, (f"{name}.safetensors", f"{name}.json", f"{name}.text.safetensors"))
    checkpoint = Checkpoint(out / f".{name}.checkpoint", command(name, steps, seed), recipe.version)
    with disk_errors(out), threads(1):
        out.mkdir(parents=True, exist_ok=True)
        run = Run(recipe, steps, seed)
        if state := checkpoint.read():
            run.restore(state)

        def save_state(step: int) -> None:
            if (step + 1) % EVERY == 0:
                checkpoint.write(run)

        run.advance(steps, save_state, progress)
        path = finish(run, name, out, seed)
        checkpoint.path.unlink(missing_ok=True)
    return path


def is_made(name: str, out: Path, steps: int | None = None, seed: int = 0) -> bool:
    """Return whether the folder ``out`` holds an undamaged encoder made by the same command."""
    path = out / f"{name}.safetensors"
    try:
        record = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        digests = {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        if "text_sha256" in record:
            text = path.with_suffix(".text.safetensors")
            digests["text_sha256"] = hashlib.sha256(text.read_bytes()).hexdigest()
    except (OSError, ValueError, TypeError):
        return False
    recipe = recipe_of(name)
    made_by = command(name, recipe.steps if steps is None else steps, seed)
    wanted = {**digests, "command": made_by, "recipe": recipe.version}
    return isinstance(record, dict) and all(record.get(key) == value for key, value in wanted.items())


def snapshot(name: str, step: int) -> VisionTransformer:
    """Return the encoder as it was after ``step`` steps of the shipped run (seed 0), rounded to float16.

    Step 0 is its random start, the last step the shipped encoder. It is trained again up to there. A step outside the
    run raises.
    """
    recipe = recipe_of(name)
    if not 0 <= step <= recipe.steps:
        raise TaskvecError(f"'{name}' has no step {step}", f"choose 0 to {recipe.steps}")
    with threads(1):
        run = Run(recipe, recipe.steps, 0)
        run.advance(step, lambda _: None)
    round_to_half(run.objective.encoder)
    return run.objective.encoder.eval()

"""Merging methods in a study: all of them end to end, hyperparameters by search, models of per-task merges."""

from __future__ import annotations

import json
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.reporters import Quiet
from helpers.tasks import write_folder_task

from taskvec.core.errors import TaskvecError
from taskvec.core.files import read_json
from taskvec.core.settings import Finetune
from taskvec.data.images import open_image, resize_and_crop
from taskvec.data.tasks import Task
from taskvec.deploy import model
from taskvec.encoders.backbone import load_backbone
from taskvec.engine.executors import open_executor
from taskvec.engine.pipeline import ordered, run
from taskvec.engine.store import Store
from taskvec.learning import heads
from taskvec.learning.finetuning import finetune
from taskvec.merging import in_memory as buffers
from taskvec.merging.entries import Data
from taskvec.merging.registry import METHODS, find_recipe
from taskvec.report.costs import costs
from taskvec.report.rows import results
from taskvec.report.tables import markdown
from taskvec.study.files import parse_study
from taskvec.study.plan.experiments import plan
from taskvec.study.schema import StudyFile
from taskvec.weights import vectors
from taskvec.weights.flat import Weights

STUDY = """
name: many
backbones: ["lab:random"]
tasks: ["folder:{root}/one", "folder:{root}/two"]
heads: {heads}
heatmap: {{pairs: 0}}
probe: {{steps: 20, batch_size: 16, warmup: 2, learning_rates: [0.03]}}
finetune: {{steps: 6, batch_size: 8, warmup: 2, learning_rate: 0.003}}
methods:
"""
QUICK = {"adamerging": {"steps": 2}, "fisher": {"examples": 4}, "regmean": {"examples": 4}}


def study_file(root: Path, methods: list[dict[str, object]], heads: str = "[kept]") -> StudyFile:
    text = STUDY.format(root=root, heads=heads) + "".join(f"  - {json.dumps(method)}\n" for method in methods)
    return StudyFile(parse_study(text, "many"), text, root)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_folder_task(root / "one")
    write_folder_task(root / "two", ("red", "blue"), train=15, test=6)
    return root


def rows_of(file: StudyFile, root: Path) -> pd.DataFrame:
    """Run the steps of a study, without its figures and page."""
    store = Store(root / "store")
    cells = plan(file, store)
    steps = [step for cell in cells for step in cell.steps()]
    assert len({step.label for step in steps}) == len(steps)
    return results("many", cells, run(steps, store, open_executor(1), Quiet()))


def test_methods_of_every_sort_run_in_a_study(data: Path) -> None:
    names = [
        "task_arithmetic",
        "slerp",
        "emr",
        *(name for name, one in METHODS.items() if one.measure),
        "lines+dare+ties",
    ]
    methods = [{"name": name, "scales": [1.0], "config": QUICK.get(name, {})} for name in names]
    rows = rows_of(study_file(data, methods), data)
    assert set(names) <= set(rows.method)
    test = rows[(rows.split == "test") & (rows.metric == "accuracy") & (rows.task == "")]
    assert set(test.method) >= set(names)
    assert test.value.between(0, 1).all()
    assert set(rows[rows.method == "adamerging"].config) == {'{"steps":2}'}
    assert set(rows[rows.method == "slerp"].config) == {"{}"}


def test_hyperparameters_that_are_lists_are_searched(data: Path) -> None:
    method = {"name": "dare+ties", "scales": "0:1:0.2", "config": {"drop": [0.9, 0.5], "fuse": ["mean", "sum"]}}
    rows = rows_of(study_file(data, [method], "[kept, reprobed]"), data)
    assert "dare+ties" in markdown(rows)
    rows = rows[rows.method == "dare+ties"]
    for kind in ("kept", "reprobed"):
        own = rows[(rows.heads == kind) & (rows.metric == "accuracy") & (rows.task == "")]
        tried = own[own.split == "validation"]
        assert len(set(tried.config)) == 4
        assert not tried.duplicated(["config", "scale"]).any()
        [chosen] = own[own.split == "test"].to_dict("records")
        best = tried.sort_values("value").iloc[-1]
        assert tried[tried.config == chosen["config"]].value.max() == best.value
        for config, group in tried.groupby("config"):
            assert {0, 1} <= set(group.scale)
            whole = kind == "kept" or config == chosen["config"]  # others are tried at coarse scales only
            assert (len(group) > 2) == whole


def test_what_was_measured_of_an_option_holds_when_it_is_chosen(data: Path) -> None:
    ties = {"name": "ties", "scales": "0:1:0.2", "config": {"keep": [0.2, 0.9]}}
    masks = {"name": "tall_masks", "scales": [0.5, 1.0], "config": {"k": [0.2, 0.8]}}
    store, watcher = Store(data / "store"), Quiet()
    [cell] = plan(study_file(data, [ties, masks], "[kept, reprobed]"), store)
    done = run(cell.steps(), store, open_executor(1), watcher)
    assert not [
        label for label in watcher.ran if label.startswith("scales") and "round 1" in label and "chosen" in label
    ]
    for trial in cell.trials:
        assert trial.option is not None
        best = trial.options[done[trial.option].json("option.json")["index"]]
        assert done[trial.merged].digest == done[best.merged].digest
        assert all(done[trial.rounds[0][t]] == done[best.rounds[0][t]] for t in cell.tasks)
        assert (done[trial.selection] == done[best.selection]) == (trial.heads == "kept")
    assert cell.model is not None
    assert cell.model.inputs["options"] == [trial.option for trial in cell.trials]
    spent = costs([cell], done)
    assert (spent[spent.method == "tall_masks"].bytes_per_task > 0).all()


def test_one_data_set_under_two_names_is_two_tasks_in_sets_and_each_is_measured_once(data: Path) -> None:
    text = study_file(data, [{"name": "task_arithmetic", "scales": [0.0, 0.5, 1.0]}]).text
    text = text.replace('tasks: ["', f'tasks: [{{address: "folder:{data}/one", name: again}}, "')
    text += "subsets: {sizes: [2, 3], samples: 2, points: 2, limit: 9}\nnegation: {forget: one, control: again}\n"
    store, watcher = Store(data / "store"), Quiet()
    [cell] = plan(StudyFile(parse_study(text, "many"), text, data), store)
    done = run(cell.steps(), store, open_executor(1), watcher)
    assert len(cell.subsets) == 4
    assert sum("own accuracy" in label for label in watcher.ran) == 2  # the one of again is that of one
    for names, step in cell.subsets.items():
        own = [done[one].json("metrics.json")["validation"] for one in step.inputs["own"] or ()]
        found = done[step].json("subset.json")
        assert found.get("fine_tuned", []) == own
        assert len(own) == (0 if len(names) == 3 else 2)
    rows = results("many", [cell], done)
    assert set(rows.tasks) == {"again+one+two", "again+one", "again+two", "one+two"}
    test = rows[(rows.split == "test") & (rows.metric == "accuracy")]
    assert (
        test[test.tasks == "again+one"]
        .pivot_table(index="method", columns="task", values="value")
        .eval("again == one")
        .all()
    )


def test_a_plain_study_plans_the_steps_that_it_always_had(data: Path) -> None:
    """Long runs are kept by the fingerprints of their steps: what has its default must not appear in them."""
    store = Store(data / "store")
    [cell] = plan(study_file(data, [{"name": "task_arithmetic"}]), store)
    [trial] = cell.trials
    assert trial.merged.config.tracked() == {"method": "task_arithmetic"}
    assert set(trial.merged.inputs) == {"backbone", "finetuned"}
    assert set(trial.rounds[0]["one"].config.tracked()) == {"scales", "device"}
    assert cell.test["one"].config.tracked() == {"candidates": ["kept"], "device": "cpu"}
    assert cell.model is not None
    assert cell.model.config.candidates == [{"method": "task_arithmetic", "heads": "kept"}]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_merges_run_on_the_studys_device_where_they_measure_or_compute_much(data: Path, device: str) -> None:
    methods = ["task_arithmetic", "emr", "dare+ties", "tsv_m", "lines+wudi", "fisher", "regmean"]
    file = study_file(data, [{"name": name, "scales": [1.0]} for name in methods])
    file = StudyFile(file.study.model_copy(update={"device": device}), file.text, data)
    cells = plan(file, Store(data / "none"), estimate=True)
    steps = [step for step in ordered(step for cell in cells for step in cell.steps()) if step.type.name == "merge"]
    places = {step.config.method: step.config.device for step in steps}
    heavy = "" if device == "cpu" else device  # the same identity as ever on a CPU
    expected = {"tsv_m": heavy, "lines+wudi": heavy, "fisher": device, "regmean": device}
    assert places == dict.fromkeys(methods, "") | expected


def test_a_study_says_what_a_method_cannot_do(data: Path) -> None:
    for method, message in (
        ({"name": "tiess"}, "did you mean 'ties'"),
        ({"name": "ties+dare"}, "can only stand at the end"),
        ({"name": "ties", "config": {"kept": 0.1}}, "did you mean 'keep'"),
        ({"name": "ties", "config": {"keep": [0.1, 2]}}, "less than or equal to 1"),
        ({"name": "ties", "config": {"keep": []}}, "empty list"),
        ({"name": "pcb", "config": {"keep": [(index + 1) / 100 for index in range(65)]}}, "at most 64"),
    ):
        with pytest.raises(TaskvecError, match=message):
            study_file(data, [method])
    three = study_file(data, [{"name": "slerp"}])
    text = three.text.replace('two"]', 'two", "lab:digits"]')
    with pytest.raises(TaskvecError, match="merges 2 tasks, and there are 3"):
        plan(StudyFile(parse_study(text, "many"), text, data), Store(data / "store"))


@pytest.mark.parametrize(
    ("tasks", "backbones", "message"),
    [
        (
            "['folder:a/pets', 'folder:b/Pets']",
            "['lab:random']",
            "'pets' and 'Pets' are one name to some disks: folder:a/",
        ),
        ("['folder:a/pets', 'folder:c/pets']", "['lab:random']", "two are named 'pets'.*name: pets-2"),
        ("['folder:a/pets', {address: 'lab:greek', name: pets}]", "['lab:random']", "two are named 'pets'"),
        ("['folder:a+b']", "['lab:random']", "'folder:a[+]b' is one of the tasks, and its name 'a[+]b' has '[+]'"),
        (
            "['folder:a/pets']",
            "['lab:random', {address: 'lab:mae', name: Random}]",
            "'random' and 'Random' are one name",
        ),
        ("['folder:a/pets']", "['hf:one/vit', 'hf:two/vit']", "two are named 'vit': hf:one/vit, hf:two/vit"),
    ],
)
def test_names_that_come_from_addresses_are_checked_before_any_work(
    tmp_path: Path, tasks: str, backbones: str, message: str
) -> None:
    for name in ("a/pets", "b/Pets", "c/pets", "a+b"):
        (tmp_path / name).mkdir(parents=True)
    text = f"tasks: {tasks}\nbackbones: {backbones}"
    with pytest.raises(TaskvecError, match=f"(?s){message}"):
        plan(StudyFile(parse_study(text, "s"), text, tmp_path), Store(tmp_path / "store"))


def tuned(data: Path) -> tuple[Data, list[Weights]]:
    """Fine-tune the lab's random encoder on two tasks for a moment."""
    from taskvec.data.tasks import load_task

    backbone = load_backbone("lab:random")
    tasks: list[Task] = [load_task(f"folder:{data / name}", backbone.preprocessing) for name in ("one", "two")]
    own = [heads.random_head(backbone.width, len(task.classes), seed) for seed, task in enumerate(tasks)]
    settings = Finetune(steps=3, batch_size=8, warmup=0, learning_rate=0.003)
    taus = [
        vectors.subtract(finetune(backbone, task, head, settings), backbone.pretrained)
        for task, head in zip(tasks, own, strict=True)
    ]
    return Data(backbone, taus, tasks, own), taus


@pytest.fixture(scope="module")
def ground(data: Path) -> Data:
    return tuned(data)[0]


def test_a_per_task_model_moves_its_encoder_for_every_task(data: Path, ground: Data, tmp_path: Path) -> None:
    backbone = ground.backbone
    found = buffers.task_directions(find_recipe("emr"), buffers.Buffers(backbone.pretrained, ground.vectors))
    by_name = dict(zip(("one", "two"), ground.heads, strict=True))
    about = {"method": "emr", "heads": "kept", "scale": 1.0, "validation": 0.5}
    classes = [task.classes for task in ground.tasks]
    model.save_model(tmp_path, backbone, backbone.pretrained, by_name, classes, about, found)
    assert read_json(tmp_path / "model.json")["bytes_per_task"] == found.bytes_per_task
    assert found.bytes_per_task < 4 * backbone.pretrained.flat.numel() / 30
    opened = model.load(tmp_path, "cpu")
    image = next((data / "one" / "test").rglob("*.png"))
    answers = {answer.task: answer for answer in opened.predict([image])}
    assert [answers["two"]] == opened.predict([image], "two")
    pixels = resize_and_crop(open_image(image), backbone.preprocessing)
    for index, (name, head) in enumerate(by_name.items()):
        backbone.use(vectors.add(backbone.pretrained, found.of(index)))
        scores = head.logits(backbone.features(np.stack([pixels])))[0].softmax(0)
        assert answers[name].probability == pytest.approx(float(scores.max()), abs=1e-6)
    backbone.use(backbone.pretrained)


def test_fisher_information_is_that_of_the_predictions(ground: Data) -> None:
    """It is above 0 for every parameter, the same twice, and merges to something between the tasks' vectors."""
    recipe = find_recipe("fisher", {"examples": 8})
    found = buffers.measure(recipe, ground)
    again = buffers.measure(recipe, ground)
    parameters = dict(ground.backbone.module.named_parameters())
    assert set(found) == set(parameters)
    for name, values in found.items():
        assert values.shape == (2, *parameters[name].shape)
        assert bool((values[1] > 0).all() and values.isfinite().all())
        assert torch.equal(values, again[name])
    assert torch.equal(ground.backbone.bound.flat, ground.backbone.pretrained.flat)
    merged = buffers.direction(recipe, buffers.Buffers(ground.backbone.pretrained, ground.vectors, 0, found))
    low = torch.minimum(ground.vectors[0].flat, ground.vectors[1].flat) - 1e-6
    high = torch.maximum(ground.vectors[0].flat, ground.vectors[1].flat) + 1e-6
    assert bool(((merged.flat >= low) & (merged.flat <= high)).all())


def test_the_drawn_estimate_of_fisher_information_is_unbiased() -> None:
    """Averaged over draws, the squared gradient by the scores is diag(p) - p p^T on the diagonal."""
    from taskvec.merging.methods.measuring import drawn_surprise

    generator, head = torch.Generator().manual_seed(0), heads.random_head(4, 3, 0)
    scores = torch.tensor([[1.0, 0.0, -1.0]], requires_grad=True)
    squares = torch.zeros(3)
    for _ in range(1000):
        [gradient] = torch.autograd.grad(drawn_surprise(head, scores, generator), scores)
        squares += gradient[0] ** 2 / 1000
    chance = scores.detach()[0].softmax(0)
    assert torch.allclose(squares, chance * (1 - chance), atol=0.04)


def test_gram_matrices_are_those_of_the_layers_inputs(ground: Data) -> None:
    """tr(W G W^T) is the mean of abs(W x)^2, which a forward pass gives; sums of tasks are those of each."""
    from taskvec.data.splits import seeded_choice

    recipe = find_recipe("regmean", {"examples": 10, "off_diagonal": 1.0})
    found, second = (
        buffers.measure(recipe, replace(ground, vectors=[vector], tasks=[task], heads=[head]))
        for vector, task, head in zip(ground.vectors, ground.tasks, ground.heads, strict=True)
    )
    both = buffers.measure(recipe, ground)
    assert all(torch.equal(both[name], found[name] + second[name]) for name in both)
    kinds = {part.name: part.kind for part, _ in buffers.Buffers(ground.backbone.pretrained, ground.vectors)}
    assert set(found) <= {name for name, kind in kinds.items() if kind == "matrix"}
    assert any("patch" in name or "embed" in name for name in found)
    backbone, task = ground.backbone, ground.tasks[0]
    backbone.use(vectors.add(backbone.pretrained, ground.vectors[0]))
    for name in (next(iter(found)), list(found)[-1]):
        layer, outputs = backbone.module.get_submodule(name.removesuffix(".weight")), []
        hook = layer.register_forward_hook(lambda module, inputs, output, outputs=outputs: outputs.append(output))
        backbone.features(task.train.images[seeded_choice(len(task.train), 10, 0)])
        hook.remove()
        weight, bias = layer.weight.detach().flatten(1), getattr(layer, "bias", None)
        moved = outputs[0].movedim(1, -1) if outputs[0].ndim == 4 else outputs[0]
        moved = moved.flatten(0, -2) - (0 if bias is None else bias.detach())
        wanted = moved.square().sum(1).mean()
        products, gram = found[name].float().split([len(weight), weight.shape[1]])
        assert float((weight @ gram @ weight.T).trace()) == pytest.approx(float(wanted), rel=1e-4)
        assert torch.allclose(products, ground.vectors[0][name].flatten(1) @ gram, atol=1e-5)
    backbone.use(backbone.pretrained)


@pytest.mark.parametrize("level", ["layer", "task"])
def test_adamerging_lowers_the_entropy(ground: Data, level: str) -> None:
    from taskvec.merging.methods.measuring import entropy, scored

    recipe = find_recipe("adamerging", {"level": level, "steps": 4, "learning_rate": 0.1, "batch_size": 100})
    found = buffers.measure(recipe, ground)
    rows = torch.stack(list(found.values()))
    assert bool((rows >= 0).all() and (rows <= 1).all())
    assert (len(rows.unique(dim=0)) == 1) == (level == "task")

    def total() -> float:
        with torch.no_grad():
            pairs = zip(ground.tasks, ground.heads, strict=True)
            return sum(float(entropy(scored(ground, head, task.train.images))) for task, head in pairs)

    backbone = ground.backbone
    start = {name: torch.full((2,), 0.3) for name in found}
    values = []
    for coefficients in (start, found):
        entries = buffers.Buffers(backbone.pretrained, ground.vectors, 0, coefficients)
        backbone.use(vectors.add(backbone.pretrained, buffers.direction(recipe, entries)))
        values.append(total())
    backbone.use(backbone.pretrained)
    assert values[1] < values[0]


class Counted(Sequence[Weights]):
    """Vectors that count how many of them are held at most."""

    def __init__(self, given: Sequence[Weights]) -> None:
        self.given, self.held, self.most = given, weakref.WeakSet[torch.Tensor](), 0

    def __len__(self) -> int:
        return len(self.given)

    def __getitem__(self, place: Any) -> Any:
        flat = self.given[place].flat.clone()
        self.held.add(flat)
        self.most = max(self.most, len(self.held))
        return self.given[place].with_flat(flat)


@pytest.mark.parametrize("name", ["fisher", "regmean"])
def test_sums_over_tasks_hold_one_vector_at_a_time(ground: Data, name: str) -> None:
    counted, recipe = Counted([*ground.vectors, *ground.vectors]), find_recipe(name, {"examples": 2})
    data = replace(ground, vectors=counted, tasks=[*ground.tasks, *ground.tasks], heads=[*ground.heads, *ground.heads])
    sums = buffers.measure(recipe, data)
    assert counted.most == 1
    held = sum(values.numel() * values.element_size() for values in sums.values())
    once = buffers.measure(recipe, ground)
    assert held == sum(values.numel() * values.element_size() for values in once.values())


def test_the_gradient_of_coefficients_is_that_of_the_loss(ground: Data) -> None:
    """Against finite differences of the entropy in float32."""
    from taskvec.merging.methods.measuring import entropy, gradients, scored, write_merged
    from taskvec.weights.flat import distinct

    entries, images = distinct(ground.backbone.pretrained), [task.train.images[:4] for task in ground.tasks]
    factors = torch.full((len(entries), 2), 0.3)
    write_merged(ground, entries, factors)
    found = gradients(ground, entries, images)
    place = int(found[:, 0].abs().argmax())

    def loss(step: float) -> float:
        moved = factors.clone()
        moved[place, 0] += step
        write_merged(ground, entries, moved)
        with torch.no_grad():
            return sum(float(entropy(scored(ground, h, x))) for h, x in zip(ground.heads, images, strict=True))

    slope = (loss(0.02) - loss(-0.02)) / 0.04
    ground.backbone.use(ground.backbone.pretrained)
    assert slope == pytest.approx(float(found[place, 0]), rel=0.05)


def test_adamerging_needs_predictions_with_an_entropy(ground: Data) -> None:
    head = heads.random_head(ground.backbone.width, 2, 0, "regression")
    other = Data(ground.backbone, ground.vectors, ground.tasks, [head, head])
    with pytest.raises(TaskvecError, match="no entropy"):
        buffers.measure(find_recipe("adamerging"), other)


def test_the_public_merge_takes_methods_and_hyperparameters(ground: Data) -> None:
    base, taus = ground.backbone.pretrained, ground.vectors
    some, again, other = (buffers.merge(base, taus, 1.0, "dare+average", {"drop": 0.5}, seed) for seed in (1, 1, 2))
    assert torch.equal(some.flat, again.flat)
    assert not torch.equal(some.flat, other.flat)

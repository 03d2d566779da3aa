"""Checkpoints that tasks bring: read as their backbone is, measured as their library does, or refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import timm
import torch
from helpers.reporters import Quiet
from helpers.tasks import CLASSES, make_task, write_folder_task
from helpers.timm_files import classifier, moved, prepare, write
from safetensors.torch import save_file

import taskvec as tv
from taskvec.command import runs
from taskvec.core.files import read_json
from taskvec.data.images import normalise
from taskvec.encoders.loaders.checkpoints import stripped
from taskvec.engine import pipeline
from taskvec.engine.executors import open_executor
from taskvec.engine.store import Store
from taskvec.evaluation.accuracy import accuracy
from taskvec.learning.external import head_of, in_task_order, read_finetuned, read_head
from taskvec.learning.heads import Head, save_heads
from taskvec.report.rows import results
from taskvec.study.files import parse_study
from taskvec.study.plan.experiments import plan
from taskvec.study.schema import StudyFile
from taskvec.weights.flat import save

STUDY = """
name: brought
backbones: [{{address: "timm:{model}@pre.safetensors", size: 32}}]
tasks: [{{address: "folder:one", {keys}}}, "folder:two"{more}]
methods: [{{name: task_arithmetic, scales: "0:1:0.5"}}]
heads: [kept]
heatmap: {{pairs: 1, points: 3, range: 1, samples: 4}}
probe: {{steps: 4, batch_size: 16, warmup: 1, learning_rates: [0.01]}}
finetune: {{steps: 2, batch_size: 8, warmup: 1, learning_rate: 0.001}}
"""


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_folder_task(tmp_path / "one", CLASSES, train=12)
    write_folder_task(tmp_path / "two", ("red", "blue"), train=15, test=6)
    return tmp_path


def study(data: Path, keys: str, model: str = "test_vit", more: str = "", tail: str = "") -> StudyFile:
    text = STUDY.format(model=model, keys=keys, more=more) + tail
    return StudyFile(parse_study(text, "brought"), text, data)


def run(data: Path, file: StudyFile) -> tuple[pd.DataFrame, list[str]]:
    watcher, store = Quiet(), Store(data / "store")
    cells = plan(file, store)
    done = pipeline.run([step for cell in cells for step in cell.steps()], store, open_executor(1), watcher)
    return results("brought", cells, done), watcher.ran


def one(rows: pd.DataFrame, **wanted: object) -> float:
    for column, value in wanted.items():
        rows = rows[rows[column] == value]
    assert len(rows) == 1
    return float(rows.value.iloc[0])


@pytest.mark.parametrize("model", ["test_vit", "test_resnet", "test_convnext"])
def test_a_timm_classifier_is_measured_as_timm_measures_it(data: Path, model: str) -> None:
    tuned = prepare(data, model)
    rows, ran = run(data, study(data, "finetuned: tuned.safetensors", model))
    assert not [label for label in ran if label.startswith("fine-tune one")]
    backbone = tv.load_backbone(f"timm:{model}@{data / 'pre.safetensors'}", size=32, device="cpu")
    task = tv.load_task(f"folder:{data / 'one'}", backbone.preprocessing)
    for name, split in (("validation", task.validation), ("test", task.test)):
        with torch.inference_mode():
            scores = tuned(normalise(torch.from_numpy(split.images), backbone.preprocessing, "cpu"))
        right = float((scores.argmax(1).numpy() == split.labels).mean())
        found = one(rows, method="fine_tuned", task="one", split=name, metric="accuracy")
        assert found == pytest.approx(right)
    kept = rows[(rows.metric == "learning_rate") & (rows.method == "fine_tuned")]
    assert set(kept.task) == {"two"}


def test_scale_0_of_a_brought_head_is_measured_and_not_taken_for_probing(data: Path) -> None:
    prepare(data)
    rows, _ = run(data, study(data, "finetuned: tuned.safetensors"))
    backbone = tv.load_backbone(f"timm:test_vit@{data / 'pre.safetensors'}", size=32, device="cpu")
    task = tv.load_task(f"folder:{data / 'one'}", backbone.preprocessing)
    found = read_finetuned(data / "tuned.safetensors", backbone)
    head = Head(found.classifier["head.weight"], found.classifier["head.bias"])
    want = accuracy(backbone, backbone.pretrained, task.validation, head)
    at = {"method": "task_arithmetic", "task": "one", "split": "validation", "metric": "accuracy", "scale": 0}
    assert one(rows, **at) == pytest.approx(want)


def test_without_a_head_the_probed_one_serves_and_other_tasks_are_left_as_they_were(data: Path) -> None:
    prepare(data)
    rows, first = run(data, study(data, "name: one"))
    backbone = tv.load_backbone(f"timm:test_vit@{data / 'pre.safetensors'}", size=32, device="cpu")
    save(read_finetuned(data / "tuned.safetensors", backbone).encoder, data / "enc.safetensors")
    again, ran = run(data, study(data, "finetuned: enc.safetensors"))
    assert "fine-tune one at 0.001 (test_vit, aligned, seed 0)" in first
    shared = ("load", "decode", "features", "probe", "rate", "head", "fine-tune")
    assert not [label for label in ran if label.startswith(shared)]
    assert [label for label in ran if label.startswith("checkpoint of one")]
    two = {"method": "fine_tuned", "task": "two", "split": "test", "metric": "accuracy"}
    assert one(rows, **two) == one(again, **two)
    at = {"task": "one", "split": "validation", "metric": "accuracy"}
    probed = one(again, **at, method="probing", config="{}")
    assert one(again, **at, method="task_arithmetic", scale=0) == probed
    write_folder_task(data / "three", ("up", "down"))
    _, more = run(data, study(data, "finetuned: enc.safetensors", more=', "folder:three"'))
    assert not [label for label in more if "one" in label and label.startswith(("checkpoint", "decode", "probe"))]
    fewer = study(data, "finetuned: enc.safetensors")
    assert not [label for label in run(data, fewer)[1] if label.startswith(("checkpoint", "fine-tune", "merge"))]


def test_a_head_file_goes_before_the_classifier_and_what_is_left_out_is_recorded(data: Path) -> None:
    tuned = prepare(data)
    save_file({"weight": -tuned.head.weight.detach(), "bias": -tuned.head.bias.detach()}, data / "head.safetensors")
    file = study(data, "finetuned: tuned.safetensors, head: head.safetensors")
    runs.run_study(file, data / "out", Store(data / "store"), 1, Quiet(), "taskvec run brought")
    lock = read_json(data / "out" / "study.lock.json")
    assert lock["left_out"]["test_vit, one"] == ["head.bias", "head.weight"]
    kept = tv.load(data / "out")
    assert list(kept.heads) == ["one", "two"]


def test_classes_in_another_order_are_mapped_by_name(tmp_path: Path) -> None:
    head = Head(torch.arange(12.0).reshape(3, 4), torch.tensor([0.0, 1.0, 2.0]))
    names, task = ("cow", "ant", "bee"), make_task(CLASSES)
    want = in_task_order(head, names, task, "x")
    assert want.bias.tolist() == [1.0, 2.0, 0.0]
    assert torch.equal(want.weight, head.weight[[1, 2, 0]])
    path = tmp_path / "heads.safetensors"
    save_heads({"one": head, "two": Head(torch.zeros(2, 4), torch.zeros(2))}, path)
    assert torch.equal(read_head(path, (), task, 4).weight, head.weight)
    assert torch.equal(read_head(path, names, task, 4).weight, want.weight)
    beside = {"tasks": [{"name": "one", "classes": names}, {"name": "two", "classes": ["a", "b"]}]}
    (tmp_path / "model.json").write_text(json.dumps(beside))
    assert torch.equal(read_head(path, (), task, 4).weight, want.weight)
    save_file({"weight": head.weight}, path, metadata={"classes": json.dumps(names)})
    found = read_head(path, (), task, 4)
    assert torch.equal(found.weight, want.weight)
    assert found.bias.tolist() == [0, 0, 0]


@pytest.mark.parametrize("where", ["metadata", "id2label", "label_names", "model.json", "nowhere", "numbers"])
def test_a_classifier_in_a_checkpoint_is_mapped_by_the_names_that_are_known(
    data: Path, where: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tuned, names = prepare(data), ["cow", "ant", "bee"]
    state = {key: value.contiguous() for key, value in tuned.state_dict().items()}
    save_file(state, data / "tuned.safetensors", {"classes": json.dumps(names)} if where == "metadata" else None)
    for wanted, name, content in (
        ("id2label", "config.json", {"id2label": dict(enumerate(names))}),
        ("label_names", "config.json", {"label_names": names}),
        ("numbers", "config.json", {"id2label": {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}}),
        ("model.json", "model.json", {"tasks": [{"name": "one", "classes": names}]}),
    ):
        if where == wanted:
            (data / name).write_text(json.dumps(content))
    backbone = tv.load_backbone(f"timm:test_vit@{data / 'pre.safetensors'}", size=32, device="cpu")
    found = read_finetuned(data / "tuned.safetensors", backbone)
    unnamed = where in ("nowhere", "numbers")
    want = state["head.weight"] if unnamed else state["head.weight"][[1, 2, 0]]
    assert torch.equal(head_of(found, (), make_task(CLASSES), 64, None).weight, want)
    assert ("tuned.safetensors' names no classes" in capsys.readouterr().err) == unnamed


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        ({"weight": torch.zeros(5, 4)}, {}, "5 outputs, and task 'one' has 3 classes"),
        ({"weight": torch.zeros(3, 6)}, {}, "reads 6 features, and the encoder gives 4"),
        ({"weight": torch.zeros(4, 3)}, {}, r"\[features, classes\]\ntranspose"),
        ({"weight": torch.full((3, 4), torch.nan)}, {}, "NaN or infinity"),
        ({"weight": torch.ones(3, 4, dtype=torch.int8)}, {}, "tensor 'weight' is of type torch.int8"),
        ({"weight": torch.ones(3, 4), "bias": torch.ones(3) > 0}, {}, "tensor 'bias' is of type torch.bool"),
        ({"weight": torch.ones(3, 4).to(torch.complex64)}, {}, "tensor 'weight' is of type torch.complex64"),
        ({"weight": torch.zeros(3, 4), "bias": torch.zeros(2)}, {}, "3 outputs and 2 biases"),
        ({"a.weight": torch.zeros(3, 4), "b.weight": torch.zeros(3, 4)}, {}, "heads of a, b, none of them named 'one'"),
        ({"weight": torch.zeros(3, 4), "scale": torch.zeros(1)}, {}, "not one linear layer: it holds scale"),
        ({"bias": torch.zeros(3)}, {}, "holds no linear layer"),
        ({"weight": torch.zeros(3, 4)}, {"classes": '["ant", "bee", "sow"]'}, "'sow' is none of task.*\n.*'cow'"),
        ({"weight": torch.zeros(3, 4)}, {"classes": '["ant", "bee"]'}, "2 classes are named, and task 'one' has 3"),
        ({"weight": torch.zeros(3, 4)}, {"classes": '["ant", "bee", "bee"]'}, "a class is named twice"),
        ({"weight": torch.zeros(3, 4)}, {"classes": "ant"}, "metadata cannot be understood: classes: Invalid JSON"),
    ],
)
def test_a_head_that_does_not_fit_is_refused(
    tmp_path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str], message: str
) -> None:
    save_file(tensors, tmp_path / "head.safetensors", metadata=metadata)
    with pytest.raises(tv.TaskvecError, match=message):
        read_head(tmp_path / "head.safetensors", (), make_task(CLASSES), 4)


@pytest.mark.parametrize(
    ("keys", "more", "tail", "message"),
    [
        ("finetuned: none.safetensors", "", "", "no file at '.*none.safetensors', which task 'one' names as finetuned"),
        ("finetuned: tuned.pt", "", "", "allow_pickle"),
        ("finetuned: other.safetensors", "", "", "checkpoint of one.*other.safetensors' does not fit: .* cls"),
        ("finetuned: five.safetensors", "", "", "5 outputs, and task 'one' has 3 classes"),
        ("finetuned: bare.safetensors", "", "regimes: [full]", "holds no head for task 'one'"),
        ("head: tuned.safetensors", "", "", "no checkpoint that they go with; add finetuned"),
        ("classes: [a, b]", "", "", "no checkpoint that they go with; add finetuned"),
        ("finetuned: tuned.safetensors", "", "regimes: [aligned, full]", "of one regime, and there are aligned, full"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(data: Path, keys: str, more: str, tail: str, message: str) -> None:
    tuned = prepare(data)
    bare = {key: value for key, value in tuned.state_dict().items() if not key.startswith("head")}
    save_file(bare, data / "bare.safetensors")
    write(classifier("test_vit", 5, 1), data / "five.safetensors")
    write(classifier("test_resnet", 3, 1), data / "other.safetensors")
    torch.save(tuned.state_dict(), data / "tuned.pt")
    with pytest.raises(tv.TaskvecError, match=message):
        run(data, study(data, keys, more=more, tail=tail))


def test_a_checkpoint_belongs_to_one_backbone(data: Path) -> None:
    text = "backbones: ['lab:random', 'lab:mae']\ntasks: [{address: 'folder:one', finetuned: a.safetensors}]\n"
    with pytest.raises(tv.TaskvecError, match="of one backbone, and there are 2"):
        parse_study(text, "s.yaml")


def test_a_vector_that_cannot_be_right_is_told(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare(data)
    backbone = tv.load_backbone(f"timm:test_vit@{data / 'pre.safetensors'}", size=32, device="cpu")
    read_finetuned(data / "pre.safetensors", backbone)
    assert "its task vector is zero" in capsys.readouterr().err
    write(moved(classifier("test_vit", 3, 5), 0.5), data / "far.safetensors")
    read_finetuned(data / "far.safetensors", backbone)
    assert "fine-tuned from another checkpoint?" in capsys.readouterr().err
    read_finetuned(data / "tuned.safetensors", backbone)
    assert "task vector" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("encoder", "head"),
    [
        ("module.", "module."),
        ("_orig_mod.module.",) * 2,
        ("model.", "model."),
        ("backbone.", ""),
        ("model.net.", "model."),
    ],
)
def test_what_a_training_class_puts_before_the_keys_is_taken_off(data: Path, encoder: str, head: str) -> None:
    tuned = prepare(data)
    backbone = tv.load_backbone(f"timm:test_vit@{data / 'pre.safetensors'}", size=32, device="cpu")
    plain = read_finetuned(data / "tuned.safetensors", backbone)
    state = {(head if key.startswith("head.") else encoder) + key: value for key, value in tuned.state_dict().items()}
    save_file(state, data / "wrapped.safetensors")
    found = read_finetuned(data / "wrapped.safetensors", backbone)
    assert torch.equal(found.encoder.flat, plain.encoder.flat)
    assert found.classifier.keys() == plain.classifier.keys() == {"head.weight", "head.bias"}


def test_a_moving_averages_counter_is_taken_off(data: Path) -> None:
    tuned = prepare(data)
    averaged = torch.optim.swa_utils.AveragedModel(tuned)
    save_file(averaged.state_dict(), data / "averaged.safetensors")
    backbone = tv.load_backbone(f"timm:test_vit@{data / 'pre.safetensors'}", size=32, device="cpu")
    plain = read_finetuned(data / "tuned.safetensors", backbone)
    assert torch.equal(read_finetuned(data / "averaged.safetensors", backbone).encoder.flat, plain.encoder.flat)


def test_keys_never_come_to_coincide() -> None:
    both = {"backbone.head.weight": torch.zeros(1), "head.weight": torch.ones(1), "backbone.a": torch.zeros(1)}
    assert stripped(both, ["a"]) == both
    assert stripped({"a": torch.zeros(1), "b": torch.zeros(1)}, ["model.a"]).keys() == {"a", "b"}
    assert stripped({"model.a": torch.zeros(1)}, ["model.a"]).keys() == {"model.a"}


def test_positions_of_another_input_size_are_resampled_as_the_backbones_are(data: Path) -> None:
    torch.manual_seed(2)
    large = timm.create_model("test_vit", num_classes=3, img_size=64)
    write(large, data / "large.safetensors")
    backbone = tv.load_backbone(f"timm:test_vit@{data / 'large.safetensors'}", size=32, device="cpu")
    found = read_finetuned(data / "large.safetensors", backbone)
    assert torch.equal(found.encoder.flat, backbone.pretrained.flat)
    assert replace(found, encoder=found.encoder).classifier["head.weight"].shape == (3, 64)


def test_names_beside_a_checkpoint_are_in_its_fingerprint(data: Path) -> None:
    prepare(data)

    def source() -> dict[str, str]:
        (cell,) = plan(study(data, "finetuned: tuned.safetensors"), Store(data / "store"))
        return next(dict(s.config.source) for s in cell.steps() if s.type.name == "import_finetuned")

    assert list(source()) == ["finetuned"]
    (data / "config.json").write_text(json.dumps({"label_names": ["cow", "ant", "bee"]}))
    assert list(source()) == ["finetuned", "finetuned, config.json"]


def test_timms_classifier_that_reads_another_pool_is_not_taken(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(1)
    start = timm.create_model("test_vit", num_classes=3, img_size=32)
    write(start, data / "pre.safetensors")
    backbone = tv.load_backbone(f"timm:test_vit@{data / 'pre.safetensors'}", size=32, device="cpu")
    tuned = timm.create_model("test_vit", num_classes=3, img_size=32, global_pool="avg", fc_norm=False)
    tuned.load_state_dict(moved(start).state_dict())
    torch.nn.init.normal_(tuned.head.weight)
    timm.models.save_for_hf(tuned, data / "avg", safe_serialization=True)
    probed = Head(torch.zeros(3, 64), torch.zeros(3))
    found = read_finetuned(data / "avg" / "model.safetensors", backbone)
    assert head_of(found, (), make_task(CLASSES), 64, probed) is probed
    assert "reads another feature than this backbone gives; the head of 'one'" in capsys.readouterr().err
    with pytest.raises(tv.TaskvecError, match="another feature .*, and the regime has no head of its own\ngive"):
        head_of(found, (), make_task(CLASSES), 64, None)
    (data / "avg" / "config.json").unlink()  # then it is what the architecture says
    found = read_finetuned(data / "avg" / "model.safetensors", backbone)
    assert torch.equal(head_of(found, (), make_task(CLASSES), 64, probed).weight, tuned.head.weight)


@pytest.mark.parametrize("model", ["deit_tiny_distilled_patch16_224", "levit_128s"])
def test_a_classifier_that_is_no_linear_layer_leaves_the_encoder_to_the_probed_head(data: Path, model: str) -> None:
    torch.manual_seed(0)
    size = {"img_size": 32} if "deit" in model else {}
    write(timm.create_model(model, num_classes=3, **size), data / "pre.safetensors")
    backbone = tv.load_backbone(f"timm:{model}@{data / 'pre.safetensors'}", size=size.get("img_size"), device="cpu")
    found = read_finetuned(data / "pre.safetensors", backbone)
    probed = Head(torch.zeros(3, backbone.width), torch.zeros(3))
    assert head_of(found, (), make_task(CLASSES), backbone.width, probed) is probed
    assert torch.equal(found.encoder.flat, backbone.pretrained.flat)
    with pytest.raises(tv.TaskvecError, match="is not one linear layer, and the regime has no head"):
        head_of(found, (), make_task(CLASSES), backbone.width, None)


def test_a_classifier_that_no_library_knows_is_told(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tuned = prepare(data)
    state = {key.replace("head.", "classifier."): value.contiguous() for key, value in tuned.state_dict().items()}
    save_file(state, data / "own.safetensors")
    backbone = tv.load_backbone(f"timm:test_vit@{data / 'pre.safetensors'}", size=32, device="cpu")
    found = read_finetuned(data / "own.safetensors", backbone)
    assert not found.objection and "none that the library knows" in capsys.readouterr().err


def test_a_part_of_a_file_is_named_in_the_study_and_in_the_fingerprint(data: Path) -> None:
    tuned = prepare(data)
    state = tuned.state_dict()
    torch.save({"student": {key: value + 1 for key, value in state.items()}, "teacher": state}, data / "both.pth")

    def step(part: str) -> tuple[str, dict[str, object]]:
        file = study(data, f'finetuned: "both.pth{part}"', tail="allow_pickle: true\n")
        (cell,) = plan(file, Store(data / "store"))
        found = next(s for s in cell.steps() if s.type.name == "import_finetuned")
        return found.config.tracked(), found.config.model_dump()

    (student, whole), (teacher, _) = step("#student"), step("#teacher")
    assert student["source"] == teacher["source"] and student != teacher
    assert whole["finetuned"] == str(data / "both.pth#student")
    assert "parts" not in step("")[0]
    backbone = tv.load_backbone(f"timm:test_vit@{data / 'pre.safetensors'}", size=32, device="cpu")
    found = read_finetuned(data / "both.pth#student", backbone, allow_pickle=True)
    assert torch.equal(found.encoder["norm.weight"], state["norm.weight"] + 1)
    assert torch.equal(found.classifier["head.weight"], state["head.weight"] + 1)

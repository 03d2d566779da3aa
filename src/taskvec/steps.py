"""What a study's steps do: each reads folders, writes one folder, and keeps nothing in memory.

Every function has the signature ``(config, inputs, out, progress)``: ``inputs`` are the folders of other steps by role.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from taskvec import (
    arithmetic,
    backbones,
    batch_norm,
    brought,
    disentangling,
    evaluation,
    finetuning,
    model,
    search,
    tasks,
    vectors,
)
from taskvec.agreement import agreement_curve
from taskvec.backbones import Backbone
from taskvec.heads import (
    Head,
    Probed,
    accuracy,
    class_texts,
    features_of,
    probe,
    read_heads,
    save_heads,
    zero_shot_head,
)
from taskvec.images import Preprocessing
from taskvec.kinds import CLASSIFICATION, KINDS
from taskvec.merging import ADDITION, buffers, find_recipe
from taskvec.merging.parts import Data
from taskvec.opening import (
    Config,
    Inputs,
    find_head,
    merged_weights,
    open_backbone,
    open_encoder,
    open_head,
    open_heads,
    open_task,
    open_task_vectors,
    open_tasks,
    open_vector,
    open_view,
    save_head,
    scale_key,
    validations,
)
from taskvec.settings import Finetune, Lora, Probe, Surgery
from taskvec.store import read_json, write_json
from taskvec.surgery import operate
from taskvec.tasks import Split, Task
from taskvec.training import Progress
from taskvec.weights import Weights, save, save_tensors


def load_backbone(config: Config, inputs: Inputs, out: Path, progress: Progress) -> None:
    """Load a pre-trained encoder by address and keep its weights as safetensors."""
    backbone = backbones.load_backbone(
        config["address"], config["size"], config["name"], "cpu", config["allow_pickle"], config.get("projection")
    )
    if config.get("batch_norm"):
        batch_norm.check(backbone)
    backbones.write_backbone(backbone, out)


def preprocessing(config: Config, inputs: Inputs, out: Path, progress: Progress) -> None:
    """Keep the part of the preprocessing that decides decoded pixels, so that backbones share decoded tasks."""
    record = read_json(inputs["backbone"][0] / "backbone.json")
    write_json(out / "preprocessing.json", Preprocessing.from_json(record["preprocessing"]).decoding())


def decode_task(config: Config, inputs: Inputs, out: Path, progress: Progress) -> None:
    """Decode the evaluation views of a task's images once."""
    tasks.write_task(config["address"], open_view(inputs), config["limit"], out, progress, **reading(config))


def decode_training(config: Config, inputs: Inputs, out: Path, progress: Progress) -> None:
    """Decode a task's whole training images once."""
    tasks.write_training(config["address"], open_view(inputs), config["limit"], out, progress, **reading(config))


def reading(config: Config) -> Config:
    """Return how images are read: whether corrupt ones are skipped, and what the plan knew of the task."""
    return {"skip_corrupt": config.get("skip_corrupt", False), "known": config["source"]}


def features(config: Config, inputs: Inputs, out: Path, progress: Progress) -> None:
    """Cache the frozen encoder's features of training and validation images."""
    backbone, task = open_backbone(inputs, config), open_task(inputs)
    total = len(task.train) + len(task.validation)
    share = len(task.train) / total
    train, _ = features_of(backbone, task.train, task.kind, lambda x: progress(x * share))
    validation, _ = features_of(backbone, task.validation, task.kind, lambda x: progress(share + x * (1 - share)))
    np.save(out / "train.npy", train.numpy())
    np.save(out / "validation.npy", validation.numpy())


def probe_task(config: Config, inputs: Inputs, out: Path, progress: Progress) -> None:
    """Probe a task at all learning rates on cached features."""
    task, cached = open_task(inputs), inputs["features"][0]
    probed = probe(
        torch.from_numpy(np.load(cached / "train.npy")),
        torch.from_numpy(task.train.labels),
        torch.from_numpy(np.load(cached / "validation.npy")),
        torch.from_numpy(task.validation.labels),
        len(task.classes),
        Probe(**config["probe"]),
        config["seed"],
        progress,
        task.kind,
    )
    save_heads({str(index): head for index, head in enumerate(probed.heads)}, out / "heads.safetensors")
    write_json(out / "probe.json", {"rates": probed.rates, "validation": probed.validation})


def choose_rate(config: Config, inputs: Inputs, out: Path, progress: Progress) -> None:
    """Choose one learning rate by the mean validation accuracy over the probes read; ties go to the smaller."""
    curves = [read_json(folder / "probe.json") for folder in inputs["probes"]]
    means = np.mean([curve["validation"] for curve in curves], axis=0)
    best = Probed(tuple(curves[0]["rates"]), (), tuple(means)).best()
    write_json(out / "rate.json", {"index": best, "rate": curves[0]["rates"][best]})


def pick_head(config: Config, inputs: Inputs, out: Path, progress: Progress) -> None:
    """Keep the head of the chosen learning rate, with its validation accuracy."""
    index = read_json(inputs["rate"][0] / "rate.json")["index"]
    folder = inputs["probe"][0]
    save_head(read_heads(folder / "heads.safetensors")[str(index)], out)
    write_json(out / "metrics.json", {"validation": read_json(folder / "probe.json")["validation"][index]})


def zero_shot(config: Config, inputs: Inputs, out: Path, progress: Progress) -> None:
    """Build a task's head from the captions of its classes, and measure it on validation."""
    backbone, task = open_backbone(inputs, config), open_task(inputs)
    groups = config["captions"]  # one caption a class, or several
    several = isinstance(groups[0], list)
    every = [caption for group in groups for caption in group] if several else groups
    texts, scale = backbones.text_features(config["address"], every, config.get("allow_pickle", False))
    head = zero_shot_head(class_texts(texts, list(map(len, groups))) if several else texts, scale)
    save_head(head, out)
    right = evaluation.correct(backbone, backbone.pretrained, task.validation, head)
    write_json(out / "metrics.json", {"validation": float(right.mean())})


def finetune(config: Config, inputs: Inputs, out: Path, progress: Progress) -> None:
    """Fine-tune the encoder with its head frozen or learning (from a random head if none), and measure both.

    Trials of learning rates keep the measure only: encoders are large, and the winner is trained again with its seed.
    """
    backbone, task = open_backbone(inputs, config), open_task(inputs)
    head = open_head(inputs) if "head" in inputs else None
    settings = finetune_settings(config, inputs)
    how = (settings, config["seed"], config["precision"], progress)
    facts = training_facts(config, settings, backbone)
    try:
        if config["head_learns"]:
            tuned = finetuning.finetune_full(backbone, task, head, *how)
            weights, head = tuned.encoder, tuned.heads[0]
        else:
            assert head is not None
            if "lora" in config:
                weights = finetuning.finetune_lora(backbone, task, head, Lora(**config["lora"]), *how)
            else:
                weights = finetuning.finetune(backbone, task, head, *how)
    except finetuning.DivergedError:
        if "trial" not in config:
            raise
        write_json(out / "metrics.json", {"validation": 0.0, "diverged": True, **facts})
        return
    if "trial" not in config:
        save(weights, out / "encoder.safetensors")
        save_head(head, out)
    right = evaluation.correct(backbone, weights, task.validation, head)
    facts |= {} if head.kind == CLASSIFICATION else {"metric": head.rules.metric}
    write_json(out / "metrics.json", {"validation": float(right.mean()), **facts})


def finetune_settings(config: Config, inputs: Inputs) -> Finetune:
    """Return the settings of fine-tuning, with the learning rate that a search has chosen where there was one."""
    settings = Finetune(**config["finetune"])
    if "rate" not in inputs:
        return settings
    return settings.model_copy(update={"learning_rate": read_json(inputs["rate"][0] / "rate.json")["rate"]})


def training_facts(config: Config, settings: Finetune, backbone: Backbone) -> dict[str, Any]:
    """Return what a fine-tuned encoder's record says of its training."""
    precision = finetuning.training_precision(backbone, config["precision"])
    return {"precision": precision, "learning_rate": settings.learning_rate}


def finetune_joint(config: Config, inputs: Inputs, out: Path, progress: Progress) -> None:
    """Fine-tune one encoder on all tasks at once with their heads frozen, and measure it on every validation split."""
    backbone, every, heads = open_backbone(inputs, config), open_tasks(inputs), open_heads(inputs)
    settings = finetune_settings(config, inputs)
    weights = finetuning.finetune_joint(backbone, every, heads, settings, config["seed"], config["precision"], progress)
    save(weights, out / "encoder.safetensors")
    measured = [
        float(evaluation.correct(backbone, weights, task.validation, head).mean())
        for task, head in zip(every, heads, strict=True)
    ]
    write_json(out / "metrics.json", {"validation": measured, **training_facts(config, settings, backbone)})


def import_finetuned(config: Config, inputs: Inputs, out: Path, progress: Progress) -> None:
    """Take a fine-tuned encoder and its head from files in the place of training, and measure both."""
    backbone, task = open_backbone(inputs, config), replace(open_task(inputs), name=config["name"])
    path, start = Path(config["finetuned"]), open_head(inputs) if "head" in inputs else None
    found = brought.read_finetuned(path, backbone, config["allow_pickle"])
    if "head" in config:
        head = brought.read_head(Path(config["head"]), config["classes"], task, backbone.width)
    else:
        head = brought.head_of(found, config["classes"], task, backbone.width, start)
    save(found.encoder, out / "encoder.safetensors")
    save_head(head, out)
    right = evaluation.correct(backbone, found.encoder, task.validation, head)
    facts: Config = {"metric": head.rules.metric} if head.kind != CLASSIFICATION else {}
    facts |= {"left_out": sorted(found.classifier)} if "head" in config else {}
    write_json(out / "metrics.json", {"validation": float(right.mean()), **facts})


def choose_learning_rate(config: Config, inputs: Inputs, out: Path, progress: Progress) -> None:
    """Choose the fine-tuning rate with the highest validation accuracy on one task; ties go to the smaller."""
    rates, values = config["rates"], validations(inputs["finetuned"])
    best = Probed(tuple(rates), (), tuple(values)).best()
    write_json(out / "rate.json", {"rate": rates[best]})  # no more: what reads it depends on the choice alone


def merge(config: Config, inputs: Inputs, out: Path, progress: Progress) -> None:
    """Make a method's merged task vector out of the fine-tuned encoders, or one for each task."""
    backbone = open_backbone(inputs, config)
    tuned, seed = open_task_vectors(inputs, backbone), config.get("seed", 0)
    recipe = find_recipe(config["method"], config.get("config"))
    statistics: dict[str, torch.Tensor] = {}
    if recipe.measures:
        heads = [head.on(backbone.device) for head in open_heads(inputs, "finetuned")]
        statistics = buffers.measure(recipe, Data(backbone, tuned, open_tasks(inputs), heads, seed, progress))
    entries = buffers.Buffers(backbone.pretrained, tuned, seed, statistics)
    if recipe.per_task:
        found = buffers.task_directions(recipe, entries)
        buffers.save_directions(found, out / buffers.DIRECTIONS)
        write_json(out / "merge.json", {"bytes_per_task": found.bytes_per_task})
    else:
        save(buffers.direction(recipe, entries), out / "direction.safetensors")


def choose_option(config: Config, inputs: Inputs, out: Path, progress: Progress) -> None:
    """Choose the hyperparameters whose best coarse scale is best on validation, and copy their merge."""
    choices = [read_json(folder / "choice.json") for folder in inputs["choices"]]
    best = max(range(len(choices)), key=lambda index: (choices[index]["value"], -index))
    for file in inputs["merged"][best].glob("direction*.safetensors"):
        shutil.copyfile(file, out / file.name)
    write_json(out / "option.json", {"index": best, "settings": config["options"][best]})


def reestimate(config: Config, inputs: Inputs, out: Path, progress: Progress) -> None:
    """Estimate the statistics of batch norm anew at every scale along a merged vector, from training images."""
    backbone = open_backbone(inputs, config)
    vector = open_vector(inputs["merged"][0], backbone, config)
    images = batch_norm.mixed(open_tasks(inputs), config["images"])
    found = {}
    for index, scale in enumerate(config["scales"]):
        weights = vectors.add(backbone.pretrained, vector, scale)
        found[scale_key(scale)] = batch_norm.statistics(batch_norm.reestimate(backbone, weights, images))
        progress((index + 1) / len(config["scales"]))
    save_tensors(found, out / "statistics.safetensors")


def reestimated_curve(config: Config, inputs: Inputs, out: Path, progress: Progress) -> None:
    """Measure a task at every scale with its head kept and the statistics of batch norm estimated anew."""
    backbone, task, head = open_backbone(inputs, config), open_task(inputs), open_head(inputs)
    vector, curve = open_vector(inputs["merged"][0], backbone, config), {}
    for scale in config["scales"]:
        weights = merged_weights(backbone, vector, scale, inputs["statistics"])
        curve[scale] = float(evaluation.correct(backbone, weights, task.validation, head).mean())
        progress(len(curve) / len(config["scales"]))
    _write_curve(out, config["scales"], curve)


def per_task_scales(config: Config, inputs: Inputs, out: Path, progress: Progress) -> None:
    """Search one scale a task from the common one, and write the sum as a merged vector whose scale is 1.

    The search looks at a sample of every validation split; on the whole of it what was found must beat the common one.
    """
    backbone, every, heads = open_backbone(inputs, config), open_tasks(inputs), open_heads(inputs, "finetuned")
    tuned, normal = open_task_vectors(inputs, backbone), validations(inputs["finetuned"])
    start = read_json(inputs["choice"][0] / "choice.json")["scale"]
    few = [replace(task, validation=fewer(task.validation, config["samples"])) for task in every]
    found = search.coordinate_search(
        backbone, tuned, few, heads, fine_tuned_on(few, backbone, tuned, heads), config["grid"], start, progress
    )
    measured = {}
    for scales in ((start,) * len(every), found.scales):
        vectors.move(backbone.bound, backbone.pretrained, tuned, scales)
        measured[scales] = search.accuracies(backbone, every, heads)
    best = max(measured, key=lambda scales: search.value_of(measured[scales], normal))  # ties keep the common one
    total = torch.stack([vector.flat * scale for vector, scale in zip(tuned, best, strict=True)]).sum(0)
    save(backbone.pretrained.with_flat(total), out / "direction.safetensors")
    chosen: dict[str, Any] = {"scale": 1.0, "scales": best, "value": search.value_of(measured[best], normal)}
    chosen |= {"accuracy": float(np.mean(measured[best])), "measured": list(measured.items())}
    write_json(out / "choice.json", chosen | {"tried": [one for one in found.tried if one[0] not in measured]})


def kept_curve(config: Config, inputs: Inputs, out: Path, progress: Progress) -> None:
    """Measure a task at every scale with its head kept; where that head did not learn, its scale 0 is known already."""
    backbone, task, head = open_backbone(inputs, config), open_task(inputs), open_head(inputs)
    vector = open_vector(inputs["merged"][0], backbone, config)
    known = {0.0: validations(inputs["start"])[0]} if "start" in inputs else {}
    scales = [scale for scale in config["scales"] if scale not in known]
    curve = dict(zip(scales, search.kept_curve(backbone, vector, task, head, scales, progress), strict=True))
    _write_curve(out, config["scales"], curve | known)


def reprobed_curve(config: Config, inputs: Inputs, out: Path, progress: Progress) -> None:
    """Fit a task's head again at the scales of this round; scale 0 gives the probed head itself."""
    backbone, task, head = open_backbone(inputs, config), open_task(inputs), open_head(inputs)
    vector = open_vector(inputs["merged"][0], backbone, config)
    rate = read_json(inputs["rate"][0] / "rate.json")["rate"]
    wanted = read_json(inputs["plan"][0] / "choice.json")["next"] if "plan" in inputs else config["scales"]
    scales = [scale for scale in wanted if scale != 0]
    settings = Probe(**config["probe"])
    values, heads = search.reprobed_curve(backbone, vector, task, rate, settings, scales, config["seed"], progress)
    curve = dict(zip(scales, values, strict=True)) | {0.0: validations(inputs["head"])[0]}
    fitted = dict(zip(scales, heads, strict=True)) | ({0.0: head} if 0 in wanted else {})
    save_heads({scale_key(scale): fit for scale, fit in fitted.items()}, out / "heads.safetensors")
    _write_curve(out, wanted, curve)


def _write_curve(out: Path, scales: list[float], values: dict[float, float]) -> None:
    write_json(out / "curve.json", {"scales": scales, "validation": [values[scale] for scale in scales]})


def surgery_curve(config: Config, inputs: Inputs, out: Path, progress: Progress) -> None:
    """Learn a correction of features at the scales of this round, from unlabelled training images; heads are kept."""
    backbone, task, head = open_backbone(inputs, config), open_task(inputs), open_head(inputs, "finetuned")
    vector = open_vector(inputs["merged"][0], backbone, config)
    scales = read_json(inputs["plan"][0] / "choice.json")["next"] if "plan" in inputs else config["scales"]
    settings, per_patch = Surgery(**config["surgery"]), head.rules.per_patch
    backbone.use(open_encoder(inputs["finetuned"][0], backbone))
    wanted = backbone.features(task.train.images, per_patch=per_patch)
    heads, curve = {}, {}
    for scale in scales:
        vectors.move(backbone.bound, backbone.pretrained, [vector], [scale])
        seen = backbone.features(task.train.images, per_patch=per_patch)
        heads[scale] = operate(seen, wanted, head, settings, config["seed"])
        curve[scale] = accuracy(heads[scale], *features_of(backbone, task.validation, task.kind))
        progress(len(curve) / len(scales))
    save_heads({scale_key(scale): fit for scale, fit in heads.items()}, out / "heads.safetensors")
    _write_curve(out, scales, curve)


def agreement(config: Config, inputs: Inputs, out: Path, progress: Progress) -> None:
    """Compare a merged encoder's features with the fine-tuned one's at every scale, on unlabelled training images."""
    backbone, task = open_backbone(inputs, config), open_task(inputs)
    vector, tuned = open_vector(inputs["merged"][0], backbone, config), open_encoder(inputs["finetuned"][0], backbone)
    images, per_patch = fewer(task.train, config["images"]).images, KINDS[task.kind].per_patch
    values = agreement_curve(backbone, vector, tuned, images, config["scales"], per_patch, progress)
    write_json(out / "agreement.json", {"scales": config["scales"], "values": values})


def choose_scale(config: Config, inputs: Inputs, out: Path, progress: Progress) -> None:
    """Choose the scale by mean normalised validation accuracy, and name the scales that a next round should try."""
    tuned = validations(inputs["finetuned"])
    scales: list[float] = []
    rows: list[tuple[float, ...]] = []
    for role in sorted(role for role in inputs if role.startswith("round")):
        curves = [read_json(folder / "curve.json") for folder in inputs[role]]
        scales += curves[0]["scales"]
        rows += zip(*(curve["validation"] for curve in curves), strict=True)
    values = [search.value_of(row, tuned) for row in rows]
    best = search.choose(scales, values)
    after = search.refine(config["grid"], scales, best, config["refine"]) if config["refine"] else []
    chosen = {"scale": best, "value": values[scales.index(best)], "accuracy": float(np.mean(rows[scales.index(best)]))}
    write_json(out / "choice.json", chosen | {"next": after})


def negate(config: Config, inputs: Inputs, out: Path, progress: Progress) -> None:
    """Choose the scale that forgets a task on validation, then test that task and the control before and after."""
    backbone, (forget, control) = open_backbone(inputs, config), open_tasks(inputs)
    first, second = open_heads(inputs)
    vector = open_task_vectors(inputs, backbone)[0]
    found = arithmetic.negate(
        backbone, vector, (forget, control), (first, second), config["scales"], config["keep"], progress
    )
    test = {}
    for name, scale in (("before", 0.0), ("after", found.scale)):
        weights = vectors.add(backbone.pretrained, vector, -scale)
        pairs = ((forget, first), (control, second))
        test[name] = [float(evaluation.correct(backbone, weights, task.test, head).mean()) for task, head in pairs]
    write_json(out / "negation.json", {**vars(found), "names": config["names"], "test": test})


def test_task(config: Config, inputs: Inputs, out: Path, progress: Progress) -> None:
    """Touch a task's test split, once: the baselines, fine-tuned, and what validation chose for every candidate."""
    backbone, task, own = open_backbone(inputs, config), open_task(inputs), open_head(inputs, "finetuned")
    probed = open_head(inputs, "probe")
    right = {"probing": evaluation.correct(backbone, backbone.pretrained, task.test, probed)}
    if "zero_shot" in inputs:
        zero = open_head(inputs, "zero_shot")
        right["zero_shot"] = evaluation.correct(backbone, backbone.pretrained, task.test, zero)
    if "joint" in inputs:
        joint = open_encoder(inputs["joint"][0], backbone)
        right["joint"] = evaluation.correct(backbone, joint, task.test, probed)
    tuned = open_encoder(inputs["finetuned"][0], backbone)
    right["fine_tuned"] = evaluation.correct(backbone, tuned, task.test, own)
    progress(2 / (2 + len(config["candidates"])))
    for index, kind in enumerate(config["candidates"]):
        scale = read_json(inputs["choices"][index] / "choice.json")["scale"]
        vector, estimated = open_vector(inputs["merged"][index], backbone, config), inputs.get(f"statistics{index}", [])
        weights = merged_weights(backbone, vector, scale, estimated)
        head = own if kind == "kept" else find_head(inputs[f"rounds{index}"], scale)
        right[str(index)] = evaluation.correct(backbone, weights, task.test, head)
        progress((3 + index) / (2 + len(config["candidates"])))
    np.savez(out / "correct.npz", **right)  # type: ignore[arg-type]
    write_json(out / "test.json", {name: float(values.mean()) for name, values in right.items()})


def subset(config: Config, inputs: Inputs, out: Path, progress: Progress) -> None:
    """Merge a set of tasks: choose lambda on a sample of validation images, then test; measure the error in the box."""
    backbone, every, heads = open_backbone(inputs, config), open_tasks(inputs), open_heads(inputs, "finetuned")
    tuned = open_task_vectors(inputs, backbone)
    found: dict[str, Any] = {}
    if config["merge"]:
        few = [replace(task, validation=fewer(task.validation, config["samples"])) for task in every]
        normal = fine_tuned_on(few, backbone, tuned, heads)
        merged = search.direction(backbone.pretrained, tuned, ADDITION)
        chosen = search.coarse_search(backbone, merged, few, heads, normal, config["grid"])
        progress(0.5)
        weights = vectors.add(backbone.pretrained, merged, chosen.scale)
        test = list(evaluation.evaluate(backbone, weights, every, heads).values())
        found = {"scale": chosen.scale, "scales": chosen.scales, "validation": chosen.accuracies, "test": test}
        found["fine_tuned"] = normal
        progress(0.8)
    if config["points"]:
        images = [np.load(folder / "images.npy") for folder in inputs["singles"]]
        singles = [np.load(folder / "predictions.npy") for folder in inputs["singles"]]
        how = (config["axis"], config["points"], config["seed"])
        found["error"] = disentangling.set_error(backbone, tuned, heads, images, singles, *how)
    write_json(out / "subset.json", found)


def fine_tuned_on(every: list[Task], backbone: Backbone, tuned: list[Weights], heads: list[Head]) -> list[float]:
    """Measure what the fine-tuned encoder of each task reaches on its validation split."""
    own = zip(tuned, every, heads, strict=True)
    return [search.kept_curve(backbone, vector, task, head, [1.0])[0] for vector, task, head in own]


def fewer(split: Split, count: int) -> Split:
    """Return a seeded choice of at most ``count`` images of a split."""
    order = np.sort(np.random.default_rng(0).permutation(len(split))[:count])
    return Split(split.images[order], split.labels[order])


def gains(config: Config, inputs: Inputs, out: Path, progress: Progress) -> None:
    """Bootstrap what every merge gained over probing, for all tasks together and for each (paired over test images)."""
    right = {
        name: np.load(folder / "correct.npz") for name, folder in zip(config["tasks"], inputs["tests"], strict=True)
    }
    found = {}
    for index in range(len(config["candidates"])):
        ours = {name: arrays[str(index)] for name, arrays in right.items()}
        base = {name: arrays["probing"] for name, arrays in right.items()}
        groups = {"": list(right)} | {name: [name] for name in right}
        found[str(index)] = {
            group: vars(evaluation.paired_gain({n: ours[n] for n in names}, {n: base[n] for n in names}))
            for group, names in groups.items()
        }
    write_json(out / "gains.json", found)


def single_task_predictions(config: Config, inputs: Inputs, out: Path, progress: Progress) -> None:
    """Predict a sample of a task's images under its own vector at every coefficient; all pairs share it."""
    backbone, task, head = open_backbone(inputs, config), open_task(inputs), open_head(inputs, "finetuned")
    vector = open_task_vectors(inputs, backbone)[0]
    images = disentangling.sample(task.test.images, config["samples"])
    np.save(out / "images.npy", images)
    rows = disentangling.single_predictions(backbone, vector, head, images, config["scales"], progress)
    np.save(out / "predictions.npy", rows)


def heatmap(config: Config, inputs: Inputs, out: Path, progress: Progress) -> None:
    """Measure the disentanglement error of a pair of tasks over a grid of coefficients."""
    backbone = open_backbone(inputs, config)
    first, second = open_task_vectors(inputs, backbone)
    heads = open_heads(inputs, "finetuned")
    images = [np.load(folder / "images.npy") for folder in inputs["singles"]]
    singles = [np.load(folder / "predictions.npy") for folder in inputs["singles"]]
    errors = disentangling.disentanglement(
        backbone,
        (first, second),
        (heads[0], heads[1]),
        (images[0], images[1]),
        config["scales"],
        (singles[0], singles[1]),
        progress,
    )
    shares = {"first": errors.first.tolist(), "second": errors.second.tolist()}
    write_json(out / "errors.json", shares | {"scales": config["scales"], "n": [len(images[0]), len(images[1])]})


def build_model(config: Config, inputs: Inputs, out: Path, progress: Progress) -> None:
    """Write the model that was best on validation: the merged encoder, one head a task, and how to use them."""
    backbone = open_backbone(inputs, config)
    best = best_candidate(config, inputs)
    index, scale = best.pop("index"), best["scale"]
    directions = None
    if index is None:
        weights, heads = backbone.pretrained, open_heads(inputs, "probe")
        backbone = replace(backbone, around=None)  # probing needs no expansion
    else:
        heads = open_heads(inputs, "finetuned")
        if best["heads"] != "kept":
            heads = [find_head(inputs[f"rounds{index}-{t}"], scale) for t in range(len(heads))]
        folder = inputs["merged"][index]
        if (folder / buffers.DIRECTIONS).exists():
            weights = backbone.pretrained
            directions = buffers.read_directions(folder / buffers.DIRECTIONS, weights)
        else:
            vector, estimated = open_vector(folder, backbone, config), inputs.get(f"statistics{index}", [])
            weights = merged_weights(backbone, vector, scale, estimated)
    classes = [read_json(folder / "classes.json") for folder in inputs["tasks"]]
    by_name = dict(zip(config["tasks"], heads, strict=True))
    model.save_model(out, backbone, weights, by_name, classes, best, directions)


def best_candidate(config: Config, inputs: Inputs) -> dict[str, Any]:
    """Return what has the highest value on validation: probing, or a merge where one is better than it.

    ``validation`` is its mean accuracy there (a fraction), by which models of several backbones compare.
    """
    tuned, probed = validations(inputs["finetuned"]), validations(inputs["probe"])
    best = {"method": "probing", "heads": "kept", "scale": 0.0, "validation": float(np.mean(probed)), "index": None}
    highest = search.value_of(probed, tuned)
    for index, candidate in enumerate(config["candidates"]):
        choice = read_json(inputs["choices"][index] / "choice.json")
        if choice["value"] > highest:
            highest = choice["value"]
            best = {**candidate, "scale": choice["scale"], "validation": choice["accuracy"], "index": index}
            best |= {"scales": choice["scales"]} if "scales" in choice else {}
            option = inputs["merged"][index] / "option.json"
            best |= {"config": read_json(option)["settings"]} if option.exists() else {}
    return best

"""Task addition in memory on the lab, as a script: prints the table of the paper's columns (about 2 minutes).

python examples/addition.py
"""

from __future__ import annotations

import numpy as np

import taskvec as tv

TASKS = ("lab:greek", "lab:signs", "lab:fonts", "lab:textures")


def main() -> None:
    """Probe, fine-tune, add, search lambda on validation, and test once."""
    backbone = tv.load_backbone("lab:supervised")
    tasks = [tv.load_task(name, backbone.preprocessing) for name in TASKS]
    heads = [tv.fit_head(backbone, task, tv.Probe(steps=1000, warmup=100)) for task in tasks]
    settings = tv.Finetune(steps=400, batch_size=64, warmup=40, learning_rate=4e-4)
    tuned = [tv.finetune(backbone, task, head, settings) for task, head in zip(tasks, heads, strict=True)]
    vectors = [tv.task_vector(backbone, weights) for weights in tuned]
    search = tv.search_scale(backbone, vectors, tasks, heads)
    merged = tv.merge(backbone.pretrained, vectors, search.scale)

    probing = tv.evaluate(backbone, backbone.pretrained, tasks, heads)
    addition = tv.evaluate(backbone, merged, tasks, heads)
    rows = []
    for task, head, weights in zip(tasks, heads, tuned, strict=True):
        fine_tuned = tv.evaluate(backbone, weights, [task], [head])[task.name]
        rows.append((task.name, probing[task.name], fine_tuned, addition[task.name], addition[task.name] / fine_tuned))
    print(f"{'task':10} {'probing':>10} {'fine-tuned':>10} {'addition':>10} {'normalised':>10}   lambda {search.scale}")
    for name, *values in [*rows, ("mean", *np.mean([row[1:] for row in rows], axis=0))]:
        print(f"{name:10} " + " ".join(f"{100 * value:10.1f}" for value in values))


if __name__ == "__main__":
    main()

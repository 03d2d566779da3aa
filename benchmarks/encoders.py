"""The lab's encoders beside each other: records, linear probes, zero-shot accuracy: python benchmarks/encoders.py.

A probe is ridge regression on standardised features of 900 training images of a task, measured on up to 600 others; the
lab's test images are not touched. One line an encoder, in %.
"""

import torch
import torch.nn.functional as F

import taskvec as tv
from taskvec.lab import encoders
from taskvec.lab.drawing import worlds
from taskvec.lab.pretraining import contrastive
from taskvec.learning.heads import zero_shot_head

SHOWN, RIDGE = 900, 0.1


def probe(features: torch.Tensor, labels: torch.Tensor) -> float:
    """Return the share of images beyond the first 900 that ridge regression on those puts into their class."""
    scaled = (features - features.mean(0)) / features.std(0)
    known, targets = scaled[:SHOWN], F.one_hot(labels[:SHOWN]).float()
    weight = torch.linalg.solve(known.T @ known + RIDGE * SHOWN * torch.eye(known.shape[1]), known.T @ targets)
    return float(((scaled[SHOWN:] @ weight).argmax(1) == labels[SHOWN:]).float().mean())


def line(name: str, values: list[float | None]) -> str:
    """Write one line of a table, with the mean of what there is."""
    found = [value for value in values if value is not None]
    cells = ["    –" if value is None else f"{100 * value:5.1f}" for value in (*values, sum(found) / len(found))]
    return f"{name:<22} " + " ".join(f"{cell:>9}" for cell in cells)


def main() -> None:
    """Print probes and zero-shot accuracy of every encoder on every task, and what the records say."""
    images = {task: worlds.draw(task, "train", 1500) for task in worlds.TASKS}
    head = f"{'':<22} " + " ".join(f"{task:>9}" for task in (*worlds.TASKS, "mean"))
    print("linear probe", head, sep="\n")
    for name in ("random", *encoders.pretrained()):
        backbone = tv.load_backbone(f"lab:{name}")
        print(line(name, [probe(backbone.features(x), torch.from_numpy(y)) for x, y in images.values()]), flush=True)
    print("\nzero-shot, among a task's own class names", head, sep="\n")
    for name in filter(encoders.has_text, encoders.pretrained()):
        backbone, scale = tv.load_backbone(f"lab:{name}"), contrastive.logit_scale(name)
        values: list[float | None] = []
        for task, (x, y) in images.items():
            captions = worlds.captions(task)
            found = zero_shot_head(contrastive.text_features(name, captions), scale) if captions else None
            right = found.predict(backbone.features(x)) == torch.from_numpy(y) if found else None
            values.append(None if right is None else float(right.float().mean()))
        print(line(name, values))
    print("\nrecords")
    for name in encoders.pretrained():
        record = encoders.record(name)
        print(f"{name:<22} {record['steps']} steps, {record['seconds']:.0f} s, {record['figures']}")


if __name__ == "__main__":
    main()

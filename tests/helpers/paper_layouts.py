"""Tiny instances of the paper's eight tasks in every layout that people have, in the exact real formats.

``write_all(root)`` writes all eight under a folder, which is then a data root: ``data: ROOT`` or ``$TASKVEC_DATA``.
``VARIANTS[task][layout](root)`` writes one of them in one layout. The images of a task are the same in every layout:
each class is a colour with noise, so a probe can learn it and a test can tell classes apart by their pixels.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

TRAIN, TEST = 14, 4
"""Images of each class."""
FOLDERS: dict[str, tuple[str, ...]] = {
    "cars": (
        "Acura RL Sedan 2012",
        "AM General Hummer SUV 2000",
        "Ram C/V Cargo Van Minivan 2012",
        "smart fortwo 2012",
    ),
    "dtd": ("banded", "blotchy", "polka-dotted", "zigzagged"),
    "eurosat": ("AnnualCrop", "HerbaceousVegetation", "River", "SeaLake"),
    "gtsrb": ("00000", "00001", "00014", "00042"),
    "mnist": tuple("0123456789"),
    "resisc45": ("airplane", "baseball_diamond", "sea_ice", "wetland"),
    "sun397": ("a_abbey", "a_apse_indoor", "b_bakery_shop", "y_youth_hostel"),
    "svhn": tuple("0123456789"),
}
"""Class names as the folders of the published data have them; cars' are those of the devkit, in another order."""


@dataclass(frozen=True)
class Sample:
    """An image of a class (by its place in FOLDERS): its split, its number in the class, its pixels."""

    split: str
    label: int
    number: int
    pixels: np.ndarray


def colour(task: str, label: int) -> np.ndarray:
    """Return the colour of a class; MNIST is grey."""
    level = 30 + 196 * label // (len(FOLDERS[task]) - 1)
    return np.array([level] * 3 if task == "mnist" else [level, 255 - level, (label * 97) % 256])


def samples(task: str) -> Iterator[Sample]:
    """Yield a task's images, split by split and class by class."""
    generator = np.random.default_rng(sorted(FOLDERS).index(task))
    height, width = {"mnist": (28, 28), "svhn": (32, 32), "eurosat": (64, 64)}.get(task, (30, 40))
    for split, count in (("train", TRAIN), ("test", TEST)):
        for label in range(len(FOLDERS[task])):
            for number in range(count):
                noise = generator.integers(-12, 13, (height, width, 1 if task == "mnist" else 3))
                yield Sample(split, label, number, (colour(task, label) + noise).clip(0, 255).astype(np.uint8))


def of(task: str, split: str) -> list[Sample]:
    """Return the images of one split."""
    return [sample for sample in samples(task) if sample.split == split]


def save(pixels: np.ndarray, path: Path) -> None:
    """Write an image file and its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **({"quality": 95} if path.suffix == ".jpg" else {}))


def class_folders(task: str, root: Path, names: dict[str, str], suffix: str = ".jpg") -> None:
    """Write class folders, the splits in folders of the given names."""
    for sample in samples(task):
        name = FOLDERS[task][sample.label]
        save(sample.pixels, root / names[sample.split] / name / f"{name}_{sample.split}_{sample.number:03}{suffix}")


def write_cars(root: Path) -> None:
    """Write Stanford Cars: two flat folders of images, and annotations in Matlab's format."""
    base = root / "stanford_cars"
    (base / "devkit").mkdir(parents=True)
    names = np.empty((1, len(FOLDERS["cars"])), object)
    names[0] = FOLDERS["cars"]
    savemat(base / "devkit" / "cars_meta.mat", {"class_names": names})
    fields = ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname")
    places = {"train": base / "devkit" / "cars_train_annos.mat", "test": base / "cars_test_annos_withlabels.mat"}
    for split, place in places.items():
        chosen = of("cars", split)
        np.random.default_rng(7).shuffle(chosen)  # the published lists are in no order of classes
        rows = np.empty((1, len(chosen)), [(name, object) for name in fields])
        for index, sample in enumerate(chosen):
            file = f"{index + 1:05}.jpg"
            save(sample.pixels, base / f"cars_{split}" / file)
            box = (np.uint8(1), np.uint8(2), np.uint8(38), np.uint8(29))
            rows[0, index] = (*box, np.uint8(sample.label + 1), file)
        savemat(place, {"annotations": rows})


def write_cars_folders(root: Path) -> None:
    """Write Stanford Cars as class folders, in whose names a slash cannot be."""
    for sample in samples("cars"):
        name = FOLDERS["cars"][sample.label].replace("/", "-")
        save(sample.pixels, root / "stanford_cars_folder_based" / sample.split / name / f"{sample.number:05}.jpg")


def write_dtd(root: Path) -> None:
    """Write DTD as published: one tree of images, and ten partitions' lists (the first here)."""
    base = root / "dtd" / "dtd"
    lists: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for sample in samples("dtd"):
        split = "val" if sample.split == "train" and sample.number % 2 else sample.split
        name = FOLDERS["dtd"][sample.label]
        file = f"{name}/{name}_{sample.split}{sample.number:04}.jpg"
        save(sample.pixels, base / "images" / file)
        lists[split].append(file)
    (base / "labels").mkdir()
    for split, files in lists.items():
        (base / "labels" / f"{split}1.txt").write_text("\n".join(files) + "\n")


def write_gtsrb(root: Path) -> None:
    """Write GTSRB: .ppm files in folders by ClassId with a .csv each, test images in one folder with one .csv."""
    base = root / "gtsrb"
    header = "Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId"
    rows: dict[Path, list[str]] = {}
    for index, sample in enumerate(samples("gtsrb")):
        name, training = FOLDERS["gtsrb"][sample.label], sample.split == "train"
        file = f"{sample.number // 30:05}_{sample.number % 30:05}.ppm" if training else f"{index:05}.ppm"
        folder = base / "GTSRB" / (f"Training/{name}" if training else "Final_Test/Images")
        save(sample.pixels, folder / file)
        height, width, _ = sample.pixels.shape
        table = folder / f"GT-{name}.csv" if training else base / "GT-final_test.csv"
        rows.setdefault(table, [header]).append(f"{file};{width};{height};5;5;{width - 5};{height - 5};{int(name)}")
    for table, lines in rows.items():
        table.write_text("\r\n".join(lines) + "\r\n")


def write_mnist(root: Path) -> None:
    """Write MNIST's four files in the idx format: big-endian sizes, then bytes."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for split, prefix in (("train", "train"), ("test", "t10k")):
        chosen = of("mnist", split)
        np.random.default_rng(3).shuffle(chosen)
        pixels = np.stack([sample.pixels[:, :, 0] for sample in chosen])
        labels = np.array([sample.label for sample in chosen], np.uint8)
        header = struct.pack(">IIII", 0x803, len(chosen), 28, 28)
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, len(chosen)) + labels.tobytes())


def write_svhn(root: Path, folder: str = "svhn") -> None:
    """Write SVHN's two .mat files: images along the last axis, the digit 0 with label 10."""
    (root / folder).mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        chosen = of("svhn", split)
        np.random.default_rng(5).shuffle(chosen)
        labels = np.array([[sample.label or 10] for sample in chosen], np.uint8)
        images = np.stack([sample.pixels for sample in chosen], axis=3)
        savemat(root / folder / f"{split}_32x32.mat", {"X": images, "y": labels})


def write_resisc45(root: Path) -> None:
    """Write RESISC45: one tree of class folders, and lists of file names; a third of the training images validate."""
    base = root / "resisc45"
    lists: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for sample in samples("resisc45"):
        name = FOLDERS["resisc45"][sample.label]
        file = f"{name}_{sample.number + 1 + (sample.split == 'test') * 500:03}.jpg"
        save(sample.pixels, base / "NWPU-RESISC45" / name / file)
        lists[sample.split].append(file)
    for number in range(3):
        file = f"airplane_{300 + number}.jpg"
        save(np.full((30, 40, 3), 90 + number, np.uint8), base / "NWPU-RESISC45" / "airplane" / file)
        lists["val"].append(file)
    for split, files in lists.items():
        (base / f"resisc45-{split}.txt").write_text("\n".join(files) + "\n")


def write_sun397(root: Path, lists: str = "SUN397") -> None:
    """Write the original SUN397: folders by first letter and by place, and the lists of partition 1."""
    base = root / "SUN397"
    lines: dict[str, list[str]] = {"train": [], "test": []}
    for sample in samples("sun397"):
        letter, _, name = FOLDERS["sun397"][sample.label].partition("_")
        place = name.replace("apse_indoor", "apse/indoor")
        file = f"/{letter}/{place}/sun_{sample.split}{sample.number:02}.jpg"
        save(sample.pixels, base / file.strip("/"))
        lines[sample.split].append(file)
    (base / "ClassName.txt").write_text("".join(f"{line.rpartition('/')[0]}\n" for line in lines["test"][::TEST]))
    (root / lists).mkdir(exist_ok=True)
    for split, name in (("train", "Training_01.txt"), ("test", "Testing_01.txt")):
        (root / lists / name).write_text("\n".join(lines[split]) + "\n")


def write_eurosat_splits(root: Path) -> None:
    """Write EuroSAT with splits: two of the training images of each class validate."""
    class_folders("eurosat", root / "EuroSAT_splits", {"train": "train", "test": "test"})
    for name in FOLDERS["eurosat"]:
        for path in sorted((root / "EuroSAT_splits" / "train" / name).iterdir())[:2]:
            target = root / "EuroSAT_splits" / "val" / name / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            path.rename(target)


def write_eurosat_flat(root: Path, folder: str = "EuroSAT") -> None:
    """Write EuroSAT as one tree without splits."""
    class_folders("eurosat", root / folder, {"train": "", "test": ""})


def write_parquet(
    root: Path,
    task: str,
    folder: str,
    names: Callable[[str], str] = lambda name: name,
    splits: tuple[str, ...] = ("train", "test"),
    backwards: bool = False,
) -> None:
    """Write a data set of the Hub as its parquet files; its classes may be named otherwise or in reverse order.

    With three splits the first images of each class validate.
    """
    import datasets

    order = list(range(len(FOLDERS[task])))[:: -1 if backwards else 1]
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[names(FOLDERS[task][i]) for i in order])}
    )
    rows: dict[str, list[Sample]] = {split: [] for split in splits}
    for sample in samples(task):
        held_out = sample.split == "train" and sample.number < 4 and "validation" in splits
        rows["validation" if held_out else sample.split].append(sample)
    (root / folder / "data").mkdir(parents=True)
    for split, chosen in rows.items():
        images = [Image.fromarray(s.pixels[:, :, 0] if task == "mnist" else s.pixels) for s in chosen]
        columns = {"image": images, "label": [order.index(s.label) for s in chosen]}
        table = datasets.Dataset.from_dict(columns, features=features)
        table.to_parquet(root / folder / "data" / f"{split}-00000-of-00001.parquet")


def plain(name: str) -> str:
    """Return a class name as a data set of the Hub may spell it."""
    from taskvec.paper.tasks import SIGNS

    by_id = {names[1]: names[0] for names in SIGNS}
    short = name[2:] if name[1:2] == "_" else name
    return by_id.get(name, short).replace("_", " ")


def hub(task: str, folder: str, **how: object) -> Callable[[Path], None]:
    """Return the writer of a task's parquet files."""
    return lambda root: write_parquet(root, task, folder, **how)  # type: ignore[arg-type]


def folders(task: str, place: str) -> Callable[[Path], None]:
    """Return the writer of class folders whose val/ is the test split."""
    return lambda root: class_folders(task, root / place, {"train": "train", "test": "val"})


THREE = ("train", "validation", "test")
VARIANTS: dict[str, dict[str, Callable[[Path], None]]] = {
    "cars": {
        "devkit": write_cars,
        "folders": write_cars_folders,
        "tanganke/stanford_cars": hub("cars", "tanganke/stanford_cars", backwards=True),
    },
    "dtd": {
        "torchvision": write_dtd,
        "folders": folders("dtd", "dtd"),
        "tanganke/dtd": hub("dtd", "tanganke/dtd"),
    },
    "eurosat": {
        "splits": write_eurosat_splits,
        "flat": write_eurosat_flat,
        "torchvision": lambda root: write_eurosat_flat(root, "eurosat/2750"),
        "tanganke/eurosat": hub("eurosat", "eurosat", splits=("train", "test")),
        "timm/eurosat-rgb": hub("eurosat", "timm/eurosat-rgb", splits=THREE, backwards=True),
    },
    "gtsrb": {"torchvision": write_gtsrb, "tanganke/gtsrb": hub("gtsrb", "gtsrb", names=plain, backwards=True)},
    "mnist": {"torchvision": write_mnist, "ylecun/mnist": hub("mnist", "ylecun/mnist")},
    "resisc45": {
        "lists": write_resisc45,
        "tanganke/resisc45": hub("resisc45", "resisc45", names=plain, backwards=True),
        "timm/resisc45": hub("resisc45", "timm/resisc45", splits=THREE),
    },
    "sun397": {
        "folders": folders("sun397", "sun397"),
        "original": write_sun397,
        "partitions": lambda root: write_sun397(root, "Partitions"),
        "tanganke/sun397": hub("sun397", "tanganke/sun397", names=plain),
    },
    "svhn": {
        "torchvision": write_svhn,
        "loose": lambda root: write_svhn(root, "."),
        "ufldl-stanford/svhn": hub("svhn", "ufldl-stanford/svhn/cropped_digits"),
    },
}
"""The writers of every layout of each task; the first is the one that ``write_all`` takes."""


def write_all(root: Path) -> Path:
    """Write all eight tasks under a folder, each in its usual layout, and return the folder."""
    root.mkdir(parents=True, exist_ok=True)
    for variants in VARIANTS.values():
        next(iter(variants.values()))(root)
    return root

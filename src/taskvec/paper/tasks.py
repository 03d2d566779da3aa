"""The paper's eight tasks: their sizes, class names in a canonical order, and where people have them (protocol, Data).

Nothing is read here. Two sources of one data set may order or spell its classes differently; ``canonical`` gives every
class one name and ``in_order`` one order, so that heads of different sources match by name.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from taskvec.core.errors import TaskvecError, unknown

Sizes = tuple[int, int, int]
"""Images to train, to validate, to test."""


@dataclass(frozen=True)
class PaperTask:
    """One of the eight: what it shows, its number of classes, sizes, data sets on the Hub, and layouts on disk.

    ``validation`` says what becomes of a validation split that a source brings: it is the protocol's (``own``), it is
    training data of which a tenth is held out (``join``), or it is left out (``drop``) and a tenth of the rest is.
    ``names`` are class names, each with the other spellings of its sources; where they are all listed their order is
    the canonical one. Other classes have the names of the source. ``other_sizes`` are those of sources that lack some.
    ``side`` is the short side of images in pixels, about, where they are smaller than encoders see.
    """

    description: str
    classes: int
    sizes: Sizes
    hub: tuple[str, ...]
    layouts: tuple[str, ...]
    validation: Literal["own", "join", "drop"] = "drop"
    names: tuple[tuple[str, ...], ...] = ()
    other_sizes: tuple[Sizes, ...] = ()
    side: int | None = None


DIGITS = tuple((str(digit),) for digit in range(10))
LAND = (
    ("annual crop land", "AnnualCrop"),
    ("forest",),
    ("brushland or shrubland", "HerbaceousVegetation"),
    ("highway or road", "Highway"),
    ("industrial buildings or commercial buildings", "Industrial"),
    ("pasture land", "Pasture"),
    ("permanent crop land", "PermanentCrop"),
    ("residential buildings or homes or apartments", "Residential"),
    ("river",),
    ("lake or sea", "SeaLake"),
)
"""EuroSAT's classes in the order of its folders, by the names in CLIP's prompts.md (github.com/openai/CLIP)."""
WARNING, CIRCLE, MANDATORY = "red and white triangle", "red and white circle", "blue circle with white"
SIGNS = tuple(
    (name, f"{index:05d}", str(index))
    for index, name in enumerate(
        (
            *(f"{CIRCLE} {speed} kph speed limit" for speed in (20, 30, 50, 60, 70, 80)),
            "end / de-restriction of 80 kph speed limit",
            *(f"{CIRCLE} {speed} kph speed limit" for speed in (100, 120)),
            f"{CIRCLE} red car and black car no passing",
            f"{CIRCLE} red truck and black car no passing",
            f"{WARNING} road intersection warning",
            "white and yellow diamond priority road",
            "red and white upside down triangle yield right-of-way",
            "stop",
            f"empty {CIRCLE}",
            f"{CIRCLE} no truck entry",
            "red circle with white horizonal stripe no entry",
            f"{WARNING} with exclamation mark warning",
            *(f"{WARNING} with black {turn} curve approaching warning" for turn in ("left", "right", "double")),
            f"{WARNING} rough / bumpy road warning",
            f"{WARNING} car skidding / slipping warning",
            f"{WARNING} with merging / narrow lanes warning",
            f"{WARNING} with person digging / construction / road work warning",
            f"{WARNING} with traffic light approaching warning",
            f"{WARNING} with person walking warning",
            f"{WARNING} with child and person walking warning",
            f"{WARNING} with bicyle warning",
            f"{WARNING} with snowflake / ice warning",
            f"{WARNING} with deer warning",
            "white circle with gray strike bar no speed limit",
            f"{MANDATORY} right turn arrow mandatory",
            f"{MANDATORY} left turn arrow mandatory",
            f"{MANDATORY} forward arrow mandatory",
            f"{MANDATORY} forward or right turn arrow mandatory",
            f"{MANDATORY} forward or left turn arrow mandatory",
            f"{MANDATORY} keep right arrow mandatory",
            f"{MANDATORY} keep left arrow mandatory",
            f"{MANDATORY} arrows indicating a traffic circle",
            "white circle with gray strike bar indicating no passing for cars has ended",
            "white circle with gray strike bar indicating no passing for trucks has ended",
        )
    )
)
"""GTSRB's signs by ClassId, by the names of CLIP's prompts, in its own spelling; folders have five digits."""

TASKS: Mapping[str, PaperTask] = MappingProxyType(
    {
        "cars": PaperTask(
            "models of cars (Stanford Cars)",
            196,
            (7330, 814, 8041),
            ("tanganke/stanford_cars",),
            ("stanford_cars/{cars_train,cars_test,devkit,cars_test_annos_withlabels.mat}",),
            names=(("Ram C/V Cargo Van Minivan 2012",),),
        ),
        "dtd": PaperTask(
            "describable textures (DTD, partition 1)",
            47,
            (3384, 376, 1880),
            ("tanganke/dtd",),
            ("dtd/{train,val}/<class>, where val is the test split", "dtd/dtd/{images,labels} (torchvision)"),
            "join",
        ),
        "eurosat": PaperTask(
            "land use from satellites (EuroSAT, RGB)",
            10,
            (21600, 2700, 2700),
            ("timm/eurosat-rgb", "tanganke/eurosat"),
            ("EuroSAT_splits/{train,val,test}/<class>", "EuroSAT/<class>", "eurosat/2750/<class> (torchvision)"),
            "own",
            LAND,
            ((19440, 2160, 2700),),
            64,
        ),
        "gtsrb": PaperTask(
            "German traffic signs (GTSRB)",
            43,
            (23976, 2664, 12630),
            ("tanganke/gtsrb",),
            ("gtsrb/{GTSRB/Training/<class>,GTSRB/Final_Test/Images,GT-final_test.csv} (torchvision)",),
            names=SIGNS,
            side=50,
        ),
        "mnist": PaperTask(
            "handwritten digits (MNIST)",
            10,
            (55000, 5000, 10000),
            ("ylecun/mnist",),
            ("MNIST/raw/*-ubyte (torchvision)",),
            names=DIGITS,
            side=28,
        ),
        "resisc45": PaperTask(
            "scenes from the air (NWPU-RESISC45)",
            45,
            (17010, 1890, 6300),
            ("tanganke/resisc45", "timm/resisc45"),
            ("resisc45/{NWPU-RESISC45/<class>,resisc45-train.txt,resisc45-test.txt}",),
        ),
        "sun397": PaperTask(
            "scenes (SUN397, partition 1)",
            397,
            (17865, 1985, 19850),
            ("tanganke/sun397",),
            ("sun397/{train,val}/<a_abbey>, where val is the test split", "SUN397/a/abbey with Training_01.txt"),
        ),
        "svhn": PaperTask(
            "house numbers (SVHN, cropped digits)",
            10,
            (68257, 5000, 26032),
            ("ufldl-stanford/svhn@cropped_digits",),
            ("svhn/{train,test}_32x32.mat (torchvision)",),
            names=DIGITS,
            side=32,
        ),
    }
)


def find_task(name: str) -> PaperTask:
    """Return one of the eight tasks, or raise with the nearest names."""
    if name not in TASKS:
        raise unknown("task of the paper", name, TASKS)
    return TASKS[name]


def key(name: str) -> str:
    """Return what two spellings of a class name share: its letters and digits, without case."""
    return "".join(sign for sign in name.casefold() if sign.isalnum())


def canonical(task: str, name: str) -> str:
    """Return the one name of a class: the listed one whose spellings include ``name``, or a plain spelling of it.

    SUN397's ``/a/apse/indoor`` and ``a_apse_indoor`` become ``apse indoor``, MNIST's ``3 - three`` becomes ``3``.
    """
    listed = {key(other): names[0] for names in TASKS[task].names for other in names}
    if TASKS[task].names is DIGITS:
        name = re.sub(r"^\W*(\d)\b.*$", r"\1", name)
    if task == "sun397":
        name = re.sub(r"^/?[a-z][/_]", "", name)
    return listed.get(key(name), re.sub(r"[_/\s]+", " ", name).strip() if task != "cars" else name.strip())


def in_order(task: str, names: Iterable[str]) -> tuple[str, ...]:
    """Return canonical class names in canonical order: as they are listed where all are, else by their letters.

    Two names that are the same class raise.
    """
    about = TASKS[task]
    places = {names[0]: place for place, names in enumerate(about.names) if len(about.names) == about.classes}
    ordered = sorted(names, key=lambda name: (places.get(name, len(places)), key(name), name))
    for one, other in itertools.pairwise(ordered):
        if key(one) == key(other):
            raise TaskvecError(f"paper:{task}: '{one}' and '{other}' are one class", "merge their folders")
    return tuple(ordered)

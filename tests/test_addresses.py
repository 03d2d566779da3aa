"""An address is read once: what it says, what it means from a study's folder, and what its kind's record knows."""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest

import taskvec as tv
from taskvec.data import sources, tasks
from taskvec.data.addresses import Source, TaskAddress
from taskvec.data.images import Preprocessing
from taskvec.data.index import Listing
from taskvec.encoders import addresses, identity
from taskvec.encoders.addresses import BackboneAddress
from taskvec.paper.checkpoints import PAPER

TEXTS = [
    "lab:supervised", "lab:supervised@40", "lab:supervised@in/w.safetensors", "timm:vit_tiny_patch16_224.x@w.pt",
    "hf:owner/name", "hf:a/b@c", "open_clip:ViT-B-16@laion2b", "open_clip:ViT-B-16@in/w.pt", "paper:vit-b16-mae",
    "paper:vit-b16-mae@in",
]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_a_backbones_address_is_written_as_it_was_given_and_read_once(text: str) -> None:
    address = addresses.parse(text)
    assert str(address) == text and address.kind == text.partition(":")[0]
    assert addresses.parse(address, Path("elsewhere")) is address
    again = addresses.parse(text, Path("/data"))
    assert addresses.parse(str(again)) == again
    assert again.default_name == address.default_name


def test_paths_of_a_backbones_address_begin_at_the_studys_folder(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "w.pt").touch()
    assert addresses.parse("hf:model", tmp_path).path == tmp_path / "model"
    assert addresses.parse("hf:owner/model", tmp_path).name == "owner/model"
    part = addresses.parse("timm:x@w.pt#teacher", tmp_path)
    assert (part.path, part.key, part.text) == (tmp_path / "w.pt", "teacher", f"timm:x@{tmp_path / 'w.pt'}#teacher")
    assert addresses.parse("open_clip:ViT-B-16@laion2b", tmp_path).file == "laion2b"


def test_what_an_address_knows_of_its_backbone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert identity.load_cost("lab:supervised@40") > identity.load_cost("lab:supervised") == 10
    assert identity.reads_words("lab:contrastive") and not identity.reads_words("open_clip:ViT-B-16@x")
    rows = {name: addresses.parse(f"paper:{name}").absent for name in PAPER}
    assert rows == {name: checkpoint.repository for name, checkpoint in PAPER.items()}
    assert all(repo.count("/") == 1 for repo in rows.values())
    (tmp_path / "models--timm--vit_base_patch16_224.mae").mkdir()
    assert addresses.parse("paper:vit-b16-mae").absent == ""
    assert addresses.parse("paper:vit-b16-dino@w.pt").absent == ""


def test_public_functions_take_the_types_too() -> None:
    backbone = tv.load_backbone(addresses.parse("lab:random"), device="cpu")
    assert backbone.name == "random"
    with pytest.raises(tv.TaskvecError, match="unknown kind of task 'nothing'"):
        sources.parse("nothing:x")
    with pytest.raises(tv.TaskvecError, match="not of the form kind:name"):
        addresses.parse("lab")
    assert isinstance(addresses.parse("lab:x"), BackboneAddress)


def test_a_new_source_of_tasks_is_one_record(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(rest: str) -> Listing:
        labels = np.arange(40) % 2
        images = np.full((40, 3, 8, 8), 100, np.uint8) + labels[:, None, None, None].astype(np.uint8)
        return Listing(("even", "odd"), dict.fromkeys(("train", "test"), images), {"train": labels, "test": labels})

    stripes = Source(read, lambda: {"stripes:NAME": "made for this test"}, has_whole=False)
    monkeypatch.setattr(sources, "SOURCES", MappingProxyType({**sources.SOURCES, "stripes": stripes}))
    task = tv.load_task(sources.parse("stripes:a/wide@1"), Preprocessing(8))
    assert (task.name, task.classes, len(task.train) + len(task.validation)) == ("wide", ("even", "odd"), 40)
    assert sources.listing()["stripes:NAME"] == "made for this test"
    about = tasks.describe("stripes:wide", lambda root, files: "")
    assert about["images"] == 80 and "listing" in about


@pytest.mark.parametrize("text", ["lab:greek", "paper:dtd@hf", "folder:in", "hf:a/b@c", "torchvision:MNIST@in"])
def test_a_tasks_address_means_the_same_from_anywhere(text: str) -> None:
    address = sources.parse(text)
    assert isinstance(address, TaskAddress) and str(address) == text
    there = sources.parse(text, Path("/data"))
    assert sources.parse(str(there), Path("/elsewhere"), "other") == there
    assert there.default_name == address.default_name

"""The Hugging Face hub: what its cache holds counts, and with no network the answer comes soon and says what to do."""

from __future__ import annotations

import hashlib
import http.server
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers.timm_files import VIT, timm_file
from huggingface_hub import constants

from taskvec.core.errors import TaskvecError
from taskvec.encoders import identity
from taskvec.encoders.addresses import listing
from taskvec.encoders.backbone import load_backbone
from taskvec.encoders.loaders.families import find
from taskvec.paper.checkpoints import PAPER
from taskvec.paper.numbers import MODELS
from taskvec.weights import hub

LIMIT = hub.SECONDS
ADDRESS, REPO = "timm:vit_tiny_patch16_224.augreg_in21k", "timm/vit_tiny_patch16_224.augreg_in21k"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def put(cache: Path, repo: str, file: str, content: bytes) -> None:
    """Lay a file into the hub's cache as a download does."""
    home = cache / f"models--{repo.replace('/', '--')}"
    commit = hashlib.sha1(content).hexdigest()
    (home / "snapshots" / commit).mkdir(parents=True)
    (home / "snapshots" / commit / file).write_bytes(content)
    (home / "refs").mkdir(exist_ok=True)
    (home / "refs" / "main").write_text(commit)


def test_what_is_cached_is_loaded_and_its_content_is_in_the_fingerprint(cache: Path, tmp_path: Path) -> None:
    assert "content" not in identity.describe(ADDRESS, None)
    assert identity.to_download(ADDRESS) == f"{REPO}/model.safetensors"
    path, _ = timm_file(tmp_path, VIT)
    put(cache, REPO, "model.safetensors", path.read_bytes())
    about = identity.describe(ADDRESS, None)
    assert about["content"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert identity.to_download(ADDRESS) == ""
    found = load_backbone(ADDRESS, size=32)
    assert found.origin == {"from": f"{REPO}/model.safetensors", "sha256": about["content"]}
    assert torch.equal(found.pretrained.flat, load_backbone(f"timm:{VIT}@{path}", size=32).pretrained.flat)


def test_offline_says_what_from_where_and_how_to_go_on() -> None:
    start = time.monotonic()
    with pytest.raises(TaskvecError) as caught:
        load_backbone(ADDRESS)
    assert time.monotonic() - start < 5
    for part in (ADDRESS, "model.safetensors", REPO, "HF_HUB_OFFLINE is set", "give a local file", "@FILE"):
        assert part in str(caught.value)


@pytest.fixture
def silent() -> Iterator[str]:
    """Serve connections and answer none."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def point_to(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")


def test_a_network_that_does_not_answer_is_asked_once(monkeypatch: pytest.MonkeyPatch, silent: str) -> None:
    point_to(monkeypatch, silent)
    monkeypatch.setattr(hub, "SECONDS", 0.4)
    start = time.monotonic()
    with pytest.raises(TaskvecError, match=rf"{silent} says: .*\n.*local file"):
        load_backbone(ADDRESS)
    assert time.monotonic() - start < 5
    assert 1.5 * LIMIT < 10


def test_a_file_that_the_hub_lacks_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    class Lacking(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            asked.append(self.path)
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Lacking) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        point_to(monkeypatch, f"http://127.0.0.1:{server.server_port}")
        with pytest.raises(TaskvecError, match="not a .safetensors file"):
            load_backbone(ADDRESS)
        with pytest.raises(TaskvecError, match="which the hub does not hold"):
            load_backbone(ADDRESS, allow_pickle=True)
        server.shutdown()
    assert len(asked) == 3


def test_a_download_goes_into_the_cache_and_is_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    content = b"weights"

    class Serving(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            asked.append(f"{self.command} {self.path}")
            self.send_response(200)
            for name, value in {
                "X-Repo-Commit": "a" * 40,
                "ETag": '"' + hashlib.sha256(content).hexdigest() + '"',
                "Content-Length": str(len(content)),
            }.items():
                self.send_header(name, value)
            self.end_headers()

        def do_GET(self) -> None:
            self.do_HEAD()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Serving) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        point_to(monkeypatch, f"http://127.0.0.1:{server.server_port}")
        found = hub.fetch("owner/name", ("model.safetensors",), False, "x", "y")
        count = len(asked)
        assert found.read_bytes() == content
        assert hub.fetch("owner/name", ("model.safetensors",), False, "x", "y") == found
        server.shutdown()
    assert len(asked) == count and asked[-1].startswith("GET /owner/name/resolve/")


def test_weights_that_are_not_on_the_hub_need_a_file() -> None:
    with pytest.raises(TaskvecError, match=r"no weights of 'legacy_senet154\.in1k' on the hub\ngive a file"):
        identity.describe("timm:legacy_senet154.in1k", None)


def test_every_row_of_the_papers_tables_has_an_address() -> None:
    assert set(PAPER) == set(MODELS)
    assert {f"paper:{name}" for name in MODELS} <= set(listing())
    for name in PAPER:
        assert identity.describe(f"paper:{name}", None, allow_pickle=True)["name"] == name
        assert identity.to_download(f"paper:{name}", allow_pickle=True)


def test_a_checkpoint_of_the_paper_loads_from_a_file_or_a_folder_of_either_library(tmp_path: Path) -> None:
    resolved = {
        "vit-b16-mae": ("timm", "vit_base_patch16_224.mae"),
        "vit-l16-in21k": ("timm", "vit_large_patch16_224.orig_in21k"),
        "vit-b16-clip-2b": ("open_clip", "ViT-B-16"),
    }
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    for row, (kind, name) in resolved.items():
        _, asked = find(f"paper:{row}@weights.safetensors")
        assert (asked.kind, asked.name, asked.file, asked.hub) == (kind, name, "weights.safetensors", None)
        _, asked = find(f"paper:{row}@{tmp_path}")
        assert (asked.kind, asked.name) == ("hf", str(tmp_path))

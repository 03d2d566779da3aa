"""The merging methods against their peers, on the same vectors of a small ViT: the largest relative difference of each.

python benchmarks/parity.py [--environments FOLDER]    # installs the peers there, 2 GB, some minutes

A peer's functions run in its own environment, in float32 and once more in float64. A method is in order when we are
within 1e-5 of the peer in float32, or within 1e-5 of its float64 result where its own float32 result is further away.
Compared are directions, divided by the largest entry; drops are injected. What we do otherwise on purpose
(docs/methods.md) is left out: patch embeddings (peers average them in spectral methods), emr's rescale, tensors of a
few entries in breadcrumbs.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from taskvec.merging.entries import Entry, Masked, describe
from taskvec.merging.registry import apply, find_recipe

PEERS = {
    "fusion": (
        "fusion-bench",
        "average ties dare magmax consensus tall_masks emr tsv_m iso_c iso_cts wudi fisher regmean",
    ),
    "mergekit": ("mergekit", "breadcrumbs della slerp"),
    "peft": ("peft", "task_arithmetic ties dare"),
}
FLATTENED = ("tsv_m", "iso_c", "iso_cts", "wudi")
"""Methods that see a patch embedding as a matrix here, and not in their peer."""
BAR = 1e-5


def environment(folder: Path, package: str) -> Path:
    """Make an environment with a peer (and this one's torch), and return its Python."""
    python = folder / package / "bin" / "python"
    if not python.exists():
        venv.create(folder / package, with_pip=True)
        ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
        packages = Path(subprocess.check_output([python, "-c", ask], text=True).strip())
        (packages / "torch-of-the-caller.pth").write_text(sysconfig.get_path("purelib"))
        subprocess.run([python, "-m", "pip", "install", "-q", package], check=True)
    return python


def vectors(tasks: int, seed: int = 0) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """Return a small ViT's weights and random task vectors with a common part, of matrices that lose rank slowly."""
    torch.manual_seed(seed)
    model = timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=0, img_size=32)
    base = {name: value.clone() for name, value in model.state_dict().items()}
    common = {name: torch.randn_like(value) for name, value in base.items()}
    taus = []
    for _ in range(tasks):
        tau = {name: 0.003 * (0.5 * common[name] + torch.randn_like(value)) for name, value in base.items()}
        for name, value in tau.items():
            if value.ndim == 2:
                tau[name] = value * torch.logspace(0, -2, value.shape[1])
        taus.append(tau)
    return base, taus


def ours(
    name: str, base: dict[str, Tensor], taus: list[dict[str, Tensor]], stored: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Merge by a method of this package; of a per-task one the first task's vector without its rescale."""
    about = describe({key: value.shape for key, value in base.items()})
    kind = {"fisher": "fisher", "regmean": "gram"}.get(name, "")
    entries = []
    for key, value in base.items():
        own = [stored[f"{index}.{kind}.{key}"] for index in range(len(taus)) if f"{index}.{kind}.{key}" in stored]
        pre = torch.zeros_like(value) if name == "slerp" else value
        entry = Entry(key, pre, *about[key], statistics=torch.stack(own) if own else None)
        entries.append((entry, torch.stack([tau[key] for tau in taus])))
    return {
        entry.name: found.shared * found.masks[0] if isinstance(found, Masked) else found
        for entry, found in apply(find_recipe(name), entries)
    }


def difference(one: dict[str, Tensor], other: dict[str, Tensor], skipped: set[str]) -> float:
    """Return the largest difference of entries over the largest entry, of the worst tensor; NaN anywhere is NaN."""
    assert set(one) == set(other)
    found = [
        (one[name].double() - value.double()).abs().max() / value.double().abs().max().clamp(min=1e-30)
        for name, value in other.items()
        if name not in skipped
    ]
    return float(torch.stack(found).max())


def store(folder: Path, base: dict[str, Tensor], taus: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Write what peers read: vectors, our uniform numbers, made-up Fisher information and Gram matrices."""
    about, stored = describe({key: value.shape for key, value in base.items()}), {}
    for index, tau in enumerate(taus):
        for name, value in tau.items():
            stored[f"{index}.tau.{name}"] = value
            stored[f"{index}.uniform.{name}"] = Entry(name, base[name], *about[name]).uniform(index)
            stored[f"{index}.fisher.{name}"] = torch.rand_like(value)
            if value.ndim == 2 and name.endswith(".weight"):
                inputs = torch.randn(4 * value.shape[1], value.shape[1])
                stored[f"{index}.gram.{name}"] = inputs.mT @ inputs / len(inputs)
    save_file(stored, folder / "vectors.safetensors")
    return stored


def compare(folder: Path, peer: str, package: str, names: str, python: Path, tasks: int) -> bool:
    """Print a line for every method of a peer, and say whether all are in order."""
    base, taus = vectors(tasks)
    stored = store(folder, base, taus)
    script = Path(__file__).with_name("parity_peers.py")
    subprocess.run([python, script, folder, peer], check=True)
    version = subprocess.check_output(
        [python, "-c", f"from importlib.metadata import version as v; print(v('{package}'))"], text=True
    ).strip()
    right = True
    for name in names.split():
        narrow, wide = (load_file(folder / f"{name}.{bits}.safetensors") for bits in ("float32", "float64"))
        skipped = {"patch_embed.proj.weight"} if name in FLATTENED else set()
        skipped |= {key for key, value in base.items() if value.numel() < 10} if name == "breadcrumbs" else set()
        found = ours(name, base, taus, stored)
        to_narrow, to_wide = difference(found, narrow, skipped), difference(found, wide, skipped)
        own = difference(narrow, wide, skipped)
        fine = to_narrow <= BAR or to_wide <= min(BAR, own)
        right &= fine
        verdict = "in order" if to_narrow <= BAR else "the peer rounds" if fine else "DIFFERS"
        print(f"{name:<12} {package} {version:<8} {to_narrow:9.1e} {to_wide:9.1e} {own:9.1e}  {verdict}", flush=True)
    return right


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environments", type=Path, default=Path(tempfile.gettempdir()) / "taskvec-peers")
    folder = parser.parse_args().environments
    print("method       peer                  to peer   to f64  peer-f64")
    right = True
    for peer, (package, names) in PEERS.items():
        python = environment(folder, package)
        for group, tasks in ((names.replace("slerp", ""), 3), ("slerp" if "slerp" in names else "", 2)):
            with tempfile.TemporaryDirectory() as place:
                right &= not group or compare(Path(place), peer, package, group, python, tasks)
    sys.exit(not right)


if __name__ == "__main__":
    main()

"""Merge the vectors of ``parity.py`` by a peer's functions, inside the peer's environment (no taskvec here).

python parity_peers.py FOLDER    # reads vectors.safetensors, writes METHOD.DTYPE.safetensors
"""

from __future__ import annotations

import contextlib
import io
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

State = dict[str, Tensor]


def flat(states: list[State]) -> Tensor:
    return torch.stack([torch.cat([value.flatten() for value in state.values()]) for state in states])


def unflat(vector: Tensor, like: State) -> State:
    parts = vector.split([value.numel() for value in like.values()])
    return {name: part.view(value.shape) for (name, value), part in zip(like.items(), parts, strict=True)}


def listed(states: list[State]) -> dict[str, list[Tensor]]:
    return {name: [state[name] for state in states] for name in states[0]}


def fusion_ties(taus: list[State], more: State) -> State:
    from fusion_bench.method.ties_merging.ties_merging_utils import ties_merging

    return unflat(ties_merging(flat(taus), reset_thresh=20, merge_func="dis-mean"), taus[0])


def fusion_dare(taus: list[State], more: State) -> State:
    """Task addition after its random drop, whose uniform numbers are ours."""
    from fusion_bench.method.dare.utils import param_random_drop_

    found: State = {}
    for index, tau in enumerate(taus):
        for name, value in tau.items():
            torch.rand_like = lambda _, key=f"{index}.uniform.{name}": more[key]  # type: ignore[assignment]
            param = value.clone()
            param_random_drop_(param, 0.9, rescale=True)
            found[name] = found[name] + param if name in found else param
    return found


def fusion_magmax(taus: list[State], more: State) -> State:
    from fusion_bench.method.magmax.magmax import _magmax_select

    return dict(_magmax_select(taus))


def fusion_average(taus: list[State], more: State) -> State:
    from fusion_bench.method.simple_average import simple_average

    return dict(simple_average(taus))


def fusion_tall_masks(taus: list[State], more: State) -> State:
    """The sum of the vectors under the first task's mask."""
    from fusion_bench.method.tall_mask.utils import generate_task_masks

    rows = flat(taus)
    masks = generate_task_masks(rows, rows, torch.zeros_like(rows[0]), tall_mask_lambda=0.4)
    return unflat(rows.sum(0) * masks[0], taus[0])


def fusion_consensus(taus: list[State], more: State) -> State:
    from fusion_bench.method.tall_mask.utils import generate_task_masks

    rows = flat(taus)
    masks = generate_task_masks(rows, rows, torch.zeros_like(rows[0]), tall_mask_lambda=0.4)
    return unflat(rows.sum(0) * (masks.sum(0) >= 2), taus[0])


def fusion_emr(taus: list[State], more: State) -> State:
    """The first task's masked vector before its rescale, which FusionBench takes over means of tensors."""
    from fusion_bench.method.emr_merging.utils import emr_merge

    unified, masks, _ = emr_merge(taus)
    return {name: value * masks[name][0] for name, value in unified.items()}


def fusion_tsv_m(taus: list[State], more: State) -> State:
    from fusion_bench.method.task_singular_vector.utils.TSVM_utils import compute_and_sum_svd_mem_reduction

    return dict(compute_and_sum_svd_mem_reduction(taus, accelerator="cpu"))


def fusion_iso_c(taus: list[State], more: State) -> State:
    from fusion_bench.method.isotropic_merging.iso_utils import iso_c

    return dict(iso_c(taus, accelerator="cpu"))


def fusion_iso_cts(taus: list[State], more: State) -> State:
    from fusion_bench.method.isotropic_merging.iso_utils import iso_cts

    return dict(iso_cts(taus, 0.8, accelerator="cpu"))


def fusion_wudi(taus: list[State], more: State) -> State:
    from fusion_bench.method.wudi.wudi import wudi_merging

    return {name: value.detach() for name, value in wudi_merging(taus, accelerator="cpu").items()}


def fusion_fisher(taus: list[State], more: State) -> State:
    from fusion_bench.method.fisher_merging.fisher_merging import merging_with_fisher_weights

    weights = [{name: more[f"{index}.fisher.{name}"] for name in taus[0]} for index in range(len(taus))]
    return merging_with_fisher_weights(listed(taus), weights, torch.ones(len(taus)) / len(taus), True, 1e-6)


def fusion_regmean(taus: list[State], more: State) -> State:
    from fusion_bench.method.regmean.regmean import merging_with_regmean_weights

    names = [key.removeprefix("0.gram.").removesuffix(".weight") for key in more if key.startswith("0.gram.")]
    grams = [{name: more[f"{index}.gram.{name}.weight"] for name in names} for index in range(len(taus))]
    return dict(merging_with_regmean_weights(listed(taus), grams, 0.9))


def mergekit_breadcrumbs(taus: list[State], more: State) -> State:
    from mergekit.sparsify import magnitude_outliers

    return {name: sum(magnitude_outliers(tau[name], 0.2, gamma=0.1) for tau in taus) for name in taus[0]}


def mergekit_della(taus: list[State], more: State) -> State:
    """MagPrune with our uniform numbers, divided by its probabilities (mergekit leaves that out), elected and added."""
    from mergekit.merge_methods.generalized_task_arithmetic import get_mask
    from mergekit.sparsify import della_magprune

    found = {}
    for name in taus[0]:
        kept = []
        for index, tau in enumerate(taus):
            value, uniform, chances = tau[name], more[f"{index}.uniform.{name}"], []
            rows = value.flatten(1) if value.ndim > 1 else value

            def drawn(chance: Tensor, uniform: Tensor = uniform, chances: list[Tensor] = chances) -> Tensor:
                chances.append(chance)
                return (uniform.view(chance.shape) < chance).to(chance.dtype)

            torch.bernoulli = drawn  # type: ignore[assignment]
            torch.argsort = stable  # type: ignore[assignment]  # of equal magnitudes, which else fall either way
            pruned = della_magprune(rows, 0.3, 0.15)
            kept.append((pruned / chances[0].view(pruned.shape)).view(value.shape))
        stack = torch.stack(kept)
        found[name] = (stack * get_mask(stack, "sum")).sum(0)
    return found


def stable(values: Tensor, dim: int, descending: bool = False) -> Tensor:
    return values.argsort(dim=dim, descending=descending, stable=True)


def mergekit_slerp(taus: list[State], more: State) -> State:
    """The vectors themselves as the two models, which are far from parallel."""
    from mergekit.merge_methods.slerp import slerp

    half = torch.tensor([0.5], dtype=next(iter(taus[0].values())).dtype)
    return {name: slerp(half, taus[0][name][None], taus[1][name][None])[0] for name in taus[0]}


def peft_task_arithmetic(taus: list[State], more: State) -> State:
    from peft.utils.merge_utils import task_arithmetic

    return unflat(task_arithmetic(list(flat(taus)), torch.ones(len(taus))), taus[0])


def peft_ties(taus: list[State], more: State) -> State:
    from peft.utils.merge_utils import ties

    return unflat(ties(list(flat(taus)), torch.ones(len(taus)), 0.2), taus[0])


def peft_dare(taus: list[State], more: State) -> State:
    """Task addition after its random drop, whose uniform numbers are ours."""
    from peft.utils.merge_utils import dare_linear

    found = {}
    for name in taus[0]:
        uniform = iter([more[f"{index}.uniform.{name}"] for index in range(len(taus))])
        torch.bernoulli = lambda chance, drawn=uniform: (next(drawn) >= 1 - chance).to(chance.dtype)  # type: ignore[assignment]
        found[name] = dare_linear([tau[name] for tau in taus], torch.ones(len(taus)), 0.1)
    return found


def main(folder: Path, peer: str) -> None:
    stored = load_file(folder / "vectors.safetensors")
    tasks = {int(key.split(".")[0]) for key in stored}
    for dtype in (torch.float32, torch.float64):
        made = {key: value.to(dtype) for key, value in stored.items()}
        taus = [
            {key.split(".tau.", 1)[1]: value for key, value in made.items() if key.startswith(f"{index}.tau.")}
            for index in sorted(tasks)
        ]
        for name, function in list(globals().items()):
            if name.startswith(f"{peer}_"):
                with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                    own = [{key: value.clone() for key, value in tau.items()} for tau in taus]
                    found = function(own, made)
                method = name.removeprefix(f"{peer}_")
                bits = str(dtype).removeprefix("torch.")
                file = folder / f"{method}.{bits}.safetensors"
                save_file({key: value.double().contiguous() for key, value in found.items()}, file)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])

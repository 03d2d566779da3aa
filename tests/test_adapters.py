"""LoRA: the product that is merged, against float64 and peft itself; which layers have adapters."""

from __future__ import annotations

import copy
import sys

import pytest
import timm
import torch
from helpers.encoders import TinyEncoder
from helpers.learning import TUNE
from torch import Tensor, nn

import taskvec as tv
from taskvec.core.errors import TaskvecError
from taskvec.core.settings import Lora
from taskvec.data.images import Preprocessing
from taskvec.data.tasks import Split, Task
from taskvec.encoders.backbone import Backbone, assemble
from taskvec.learning import lora as adapters
from taskvec.learning.finetuning import finetune_tasks
from taskvec.weights.flat import bind

LORA = Lora(rank=2, alpha=6.0)


class Attending(nn.Module):
    """A convolution, torch's own attention and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, stride=4)
        self.mixing = nn.MultiheadAttention(8, 2, batch_first=True)
        self.last = nn.Linear(8, 8)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).mT
        mixed, _ = self.mixing(tokens, tokens, tokens, need_weights=False)
        return self.last(tokens + mixed).mean(1)


def transformer() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, img_size=16, patch_size=8, depth=1, embed_dim=24, num_heads=2
    )


def stirred(module: nn.Module, lora: Lora) -> nn.Module:
    """Return a module with adapters whose B is not zero, as if they had been trained."""
    adapted = adapters.add(module, lora, "x")
    with torch.no_grad():
        for parameter in adapters.parameters(adapted):
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return adapted


def factors(adapted: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Return A and B of every linear layer by its name, in float64."""
    held = {name: p.detach().double() for name, p in adapted.named_parameters() if ".lora_" in name}
    layers = {name.removeprefix("model.").split(".lora_")[0] for name in held}
    return {
        layer: (held[f"model.{layer}.lora_A.default.weight"], held[f"model.{layer}.lora_B.default.weight"])
        for layer in layers
    }


def products(adapted: nn.Module, lora: Lora) -> dict[str, Tensor]:
    """Return alpha / rank * B A of every linear layer by the name of its weight, in float64."""
    return {f"{layer}.weight": lora.alpha / lora.rank * (b @ a) for layer, (a, b) in factors(adapted).items()}


def test_the_task_vector_is_the_exact_product_of_every_linear_layer_and_nothing_else() -> None:
    module = transformer().eval()
    bound = bind(module)
    start = {name: tensor.clone() for name, tensor in bound.state().items()}
    adapted = stirred(module, LORA)
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        want, product = adapted(images), products(adapted, LORA)
    peers = copy.deepcopy(adapted).merge_and_unload().state_dict()  # type: ignore[operator]
    found = adapters.merged(adapted, bound).state()
    assert set(product) == {f"blocks.0.{name}.weight" for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}
    for name, tensor in found.items():
        assert torch.equal(tensor, peers[name])
        moved = tensor.double() - start[name].double()
        assert torch.allclose(moved, product.get(name, torch.zeros_like(moved)), atol=1e-6), name
    plain = transformer().eval()
    plain.load_state_dict(found)
    assert torch.allclose(plain(images), want, atol=1e-5)


def test_merging_products_is_not_merging_a_and_b_apart() -> None:
    module = transformer()
    pairs = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        pairs.append(factors(stirred(copy.deepcopy(module), LORA))["blocks.0.attn.qkv"])
    (a, b), (c, d) = pairs
    exact, apart = b @ a + d @ c, (b + d) @ (a + c)
    assert torch.linalg.matrix_rank(exact) == 2 * LORA.rank
    assert torch.linalg.matrix_rank(apart) == LORA.rank
    assert (apart - exact).norm() > 0.5 * exact.norm()


def test_convolutions_and_torchs_own_attention_have_adapters_where_they_are_named() -> None:
    torch.manual_seed(0)
    module = Attending().eval()
    bound = bind(module)
    start, images = bound.clone().state(), torch.randn(2, 3, 8, 8)
    adapted = stirred(module, Lora(rank=2, layers=("patches", "mixing")))
    with torch.no_grad():
        want = adapted(images)
    found = adapters.merged(adapted, bound).state()
    changed = {name for name, tensor in found.items() if not torch.equal(tensor, start[name])}
    assert changed == {"patches.weight", "mixing.in_proj_weight", "mixing.out_proj.weight"}
    plain = Attending().eval()
    plain.load_state_dict(found)
    assert torch.allclose(plain(images), want, atol=1e-5)


def test_fine_tuning_moves_layers_of_low_rank_only_and_is_reproducible(tasks: list[Task]) -> None:
    backbone = assemble("vit", transformer(), Preprocessing(size=16), {}, "cpu")
    task = Task(
        tasks[0].name, tasks[0].classes, *(enlarged(tasks[0], split) for split in ("train", "validation", "test"))
    )
    head = tv.fit_head(backbone, task, tv.Probe(steps=10, batch_size=16, warmup=0, learning_rates=(0.03,)))
    tuned = finetune_tasks(backbone, [task], [head], TUNE, precision="float32", lora=LORA).encoder
    again = finetune_tasks(backbone, [task], [head], TUNE, precision="float32", lora=LORA).encoder
    assert torch.equal(tuned.flat, again.flat)
    vector = tv.task_vector(backbone, tuned).state()
    ranks = {name: int(torch.linalg.matrix_rank(t, rtol=1e-3)) for name, t in vector.items() if t.any()}
    assert set(ranks) == {f"blocks.0.{name}.weight" for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}
    assert set(ranks.values()) == {LORA.rank}


def enlarged(task: Task, split: str) -> Split:
    part = getattr(task, split)
    return Split(part.images.repeat(2, 2).repeat(2, 3), part.labels)


def test_what_cannot_have_an_adapter_is_told(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TaskvecError, match=r"no layer 'sixth'\n.*known: first, second, third"):
        adapters.adapted_layers(TinyEncoder(), Lora(layers=("sixth",)), "tiny")
    with pytest.raises(TaskvecError, match=r"'tiny' shares 'second.weight' between layers"):
        adapters.adapted_layers(backbone.module, Lora(), "tiny")
    with pytest.raises(TaskvecError, match="'conv' has no linear layer"):
        adapters.adapted_layers(nn.Sequential(nn.Conv2d(3, 4, 2)), Lora(), "conv")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(TaskvecError, match=r"lora needs peft\npip install 'taskvec\[lora\]'"):
        adapters.library()

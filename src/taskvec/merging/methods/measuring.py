"""What methods that look at data measure before they merge: Fisher information, Gram matrices, coefficients.

They look at training images, never at their labels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Float64, UInt8
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from taskvec.core.errors import TaskvecError
from taskvec.core.training import index_batches
from taskvec.data.images import normalise
from taskvec.data.splits import seeded_choice
from taskvec.data.tasks import Task
from taskvec.data.uploads import Images
from taskvec.encoders.backbone import encode
from taskvec.learning.heads import Head
from taskvec.merging.entries import Data
from taskvec.merging.methods.adaptive import Adamerging, Fisher, Regmean, fisher_summand, regmean_summand
from taskvec.merging.recipes import add_up
from taskvec.weights import vectors
from taskvec.weights.flat import Slot, distinct, mend_variances, view

BATCH = 64
Summand = Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], Iterator[tuple[str, Tensor]]]
"""What a task adds to sums by name, from what was measured of it and from its vector."""


def scored(data: Data, head: Head, images: Images) -> Float[Tensor, "batch *patches outputs"]:
    """Return a head's scores of images under the encoder's present weights."""
    backbone = data.backbone
    pixels = images if isinstance(images, Tensor) else torch.from_numpy(np.array(images))
    inputs = normalise(pixels, backbone.preprocessing, backbone.device)
    return head.logits(encode(backbone.module, inputs, head.task_type.per_patch))


@contextlib.contextmanager
def same_gradients(device: str) -> Iterator[None]:
    """Take gradients that are the same twice in a block: on a GPU some kernels add up in any order otherwise.

    Those are of fused attention and of convolutions.
    """
    before = torch.backends.cudnn.deterministic
    with contextlib.ExitStack() as stack:
        if device.startswith("cuda"):
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            stack.callback(setattr, torch.backends.cudnn, "deterministic", before)
            torch.backends.cudnn.deterministic = True
        yield


def summed(data: Data, measured: Callable[[Task, Head], Mapping[str, Tensor]], summand: Summand) -> dict[str, Tensor]:
    """Return the sums over tasks of what each adds to them, measured while the encoder is at its fine-tuned weights.

    Of one task at a time there is a vector and what was measured.
    """
    backbone, sums = data.backbone, dict[str, Tensor]()
    with backbone.at():
        backbone.module.eval()
        for place, (task, head) in enumerate(zip(data.tasks, data.heads, strict=True)):
            vector = data.vectors[place]
            vectors.move(backbone.bound, backbone.pretrained, [vector], [1.0])
            add_up(sums, summand(measured(task, head), vector.state()))
            del vector  # before the next one is read
            data.progress((place + 1) / len(data.tasks))
    return sums


def fisher(data: Data, config: Fisher) -> dict[str, Float32[Tensor, " 2 *shape"]]:
    """Return the sums of ``adaptive.fisher``, by the diagonal Fisher information F of every parameter of each task.

    F = E_x E_y (d log p(y|x) / d theta)^2 with one y drawn from the model's own prediction for each x, an unbiased
    estimate (arXiv 2111.09832). MergeLM adds gradients over classes and images up before it squares them,
    which is another quantity.
    """
    generator = torch.Generator().manual_seed(data.seed)

    def information(task: Task, head: Head) -> dict[str, Tensor]:
        chosen = seeded_choice(len(task.train), config.examples, data.seed)
        images = data.backbone.resident(task.train.images[chosen])
        each = (scored(data, head, images[place : place + 1]) for place in range(len(chosen)))
        return mean_squares(data, (drawn_surprise(head, scores, generator) for scores in each), len(chosen))

    with same_gradients(data.backbone.device):
        return summed(data, information, lambda measured, vector: fisher_summand(measured, vector, config))


def mean_squares(data: Data, losses: Iterable[Float[Tensor, ""]], count: int) -> dict[str, Float32[Tensor, " *shape"]]:
    """Return the mean of the squared gradients of ``count`` losses, by parameter."""
    names, parameters = zip(*data.backbone.module.named_parameters(), strict=True)
    means = [torch.zeros_like(parameter, requires_grad=False) for parameter in parameters]
    for loss in losses:
        for mean, gradient in zip(means, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True):
            if gradient is not None:
                mean += gradient.square() / count
    return dict(zip(names, means, strict=True))


def drawn_surprise(
    head: Head, scores: Float[Tensor, "batch *patches outputs"], generator: torch.Generator
) -> Float[Tensor, ""]:
    """Return -log p of an answer drawn from the prediction: classes by softmax, an angle's outputs as Gaussian."""
    if head.kind == "regression":
        noise = torch.randn(scores.shape, generator=generator).to(scores.device)
        return 0.5 * ((scores + noise).detach() - scores).square().sum()
    flat = scores.flatten(0, -2)
    drawn = torch.multinomial(flat.detach().cpu().softmax(1), 1, generator=generator)[:, 0]
    return F.cross_entropy(flat, drawn.to(flat.device), reduction="sum")


def grams(data: Data, config: Regmean) -> dict[str, Float64[Tensor, "rows inputs"]]:
    """Return the sums of ``adaptive.regmean``, by the mean of x^T x over the inputs x of every linear map of each task.

    Linear maps are linear layers and convolutions. A convolution's inputs are the patches under its kernel; grouped
    ones are left out. Layers that are not called as modules (torch's own multi-head attention) have none.
    """

    def task_grams(task: Task, head: Head) -> dict[str, Tensor]:
        chosen = seeded_choice(len(task.train), config.examples, data.seed)
        images = data.backbone.resident(task.train.images[chosen])
        batches = (images[start : start + BATCH] for start in range(0, len(chosen), BATCH))
        with torch.no_grad():
            return watch(data.backbone.module, lambda: [scored(data, head, batch) for batch in batches])

    return summed(data, task_grams, lambda measured, vector: regmean_summand(measured, vector, config))


def watch(module: nn.Module, run: Callable[[], object]) -> dict[str, Float32[Tensor, "inputs inputs"]]:
    """Return the mean of x^T x of every linear map's inputs while something runs, by the weight's name."""
    sums: dict[str, Tensor] = {}
    rows: dict[str, int] = {}

    def hook_of(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            x = rows_of(layer, inputs[0]).float()
            sums[name] = sums[name] + x.mT @ x if name in sums else x.mT @ x
            rows[name] = rows.get(name, 0) + len(x)

        return hook

    layers = {f"{name}.weight": layer for name, layer in module.named_modules() if is_linear(layer)}
    hooks = [layer.register_forward_hook(hook_of(name)) for name, layer in layers.items()]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return {name: gram / rows[name] for name, gram in sums.items()}


def is_linear(layer: nn.Module) -> bool:
    """Say whether a layer multiplies each input row with one matrix."""
    plain = isinstance(layer, nn.Conv2d) and layer.groups == 1 and not isinstance(layer.padding, str)
    return isinstance(layer, nn.Linear) or plain


def rows_of(layer: nn.Module, inputs: Tensor) -> Float[Tensor, "rows inputs"]:
    """Return what a layer multiplies its weight with: its inputs, or the patches under its kernel."""
    if isinstance(layer, nn.Conv2d):
        patches = F.unfold(inputs, layer.kernel_size, layer.dilation, layer.padding, layer.stride)  # type: ignore[arg-type]
        return patches.mT.flatten(0, 1)
    return inputs.flatten(0, -2)


def coefficients(data: Data, config: Adamerging) -> dict[str, Float32[Tensor, " tasks"]]:
    """Minimise the sum of the tasks' mean entropies over lambda in [0, 1] by Adam (arXiv 2310.02575).

    The authors adapt to test images; here they are training images. The gradient of a coefficient is the product of the
    weights' gradient with its vector, so that no graph of the merge is kept. Running statistics of batch norm have no
    gradient: by layer they keep the coefficient they start with.
    """
    if any(head.kind == "regression" for head in data.heads):
        raise TaskvecError("adamerging: a regression head has no entropy", "leave that task out, or adamerging")
    data = replace(data, vectors=list(data.vectors))  # every step takes all of them
    slots, backbone = distinct(data.backbone.pretrained), data.backbone
    groups = torch.arange(len(slots)) if config.level == "layer" else torch.zeros(len(slots), dtype=torch.int64)
    raw = torch.full((int(groups.max()) + 1, len(data.vectors)), config.start, requires_grad=True)
    optimizer = torch.optim.Adam([raw], lr=config.learning_rate)
    batches = [index_batches(len(task.train), config.batch_size, data.seed) for task in data.tasks]
    with backbone.at(), same_gradients(backbone.device):
        backbone.module.eval()
        for step in range(config.steps):
            each = raw.clamp(0, 1)[groups]
            write_merged(data, slots, each.detach())
            pairs = zip(data.tasks, batches, strict=True)
            images = [task.train.images[next(indices).numpy()] for task, indices in pairs]
            optimizer.zero_grad()
            each.backward(gradients(data, slots, images))
            optimizer.step()
            data.progress((step + 1) / config.steps)
    return dict(zip((slot.name for slot in slots), raw.detach().clamp(0, 1)[groups], strict=True))


def write_merged(data: Data, slots: Sequence[Slot], factors: Float32[Tensor, "slots tasks"]) -> None:
    """Move the encoder to theta_pre + sum_t factor_t tau_t, with factors of each entry's own."""
    bound = data.backbone.bound
    bound.flat.copy_(data.backbone.pretrained.flat)
    for slot, row in zip(slots, factors.tolist(), strict=True):
        for vector, factor in zip(data.vectors, row, strict=True):
            view(bound.flat, slot).add_(view(vector.flat, slot), alpha=factor)
    mend_variances(bound)


def gradients(
    data: Data, slots: Sequence[Slot], images: Sequence[UInt8[np.ndarray, "_ 3 size size"]]
) -> Float32[Tensor, "slots tasks"]:
    """Return the gradient of the summed entropies by every coefficient, at the encoder's present weights.

    The activations of one task's batch at a time are kept.
    """
    parameters, sums = dict(data.backbone.module.named_parameters()), dict[str, Tensor]()
    for head, batch in zip(data.heads, images, strict=True):
        loss = entropy(scored(data, head, batch))
        for name, gradient in zip(
            parameters, torch.autograd.grad(loss, list(parameters.values()), allow_unused=True), strict=True
        ):
            if gradient is not None:  # two names may share one, so that none is added to in place
                sums[name] = sums[name] + gradient if name in sums else gradient
    rows = torch.zeros(len(slots), len(data.vectors), device=data.backbone.device)
    for row, slot in zip(rows, slots, strict=True):
        if slot.name in sums:
            products = [(sums[slot.name] * view(vector.flat, slot)).sum() for vector in data.vectors]
            row.copy_(torch.stack(products))
    return rows.cpu()


def entropy(scores: Float[Tensor, "batch *patches classes"]) -> Float[Tensor, ""]:
    """Return the mean entropy of the predictions."""
    return -(scores.softmax(-1) * scores.log_softmax(-1)).sum(-1).mean()

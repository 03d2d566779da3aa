"""Names of tensors: what wrappers put into them, which belong together, what they say of a file. No torch."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable

WRAPPERS = frozenset(
    {"module", "_module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}
)
"""Parts of names that several devices, compiling, recomputed activations and private gradients add, anywhere."""
AVERAGED = "n_averaged"
"""What torch's AveragedModel counts in."""
DEEPEST = 8
"""Parts of a name that a prefix has at most."""
HEADS = re.compile(
    r"(?!conv|.*att)(\w+_)?(heads?|classifier|pooler)|head_dist|classifier_distill|fc|score|last_linear|mask_token|"
    r"logit_scale|decoder_(embed|pos_embed|blocks|norm|pred)"
)
"""Parts of names of heads and decoders, which stand on an encoder and are none of it."""
FEATURES = re.compile(r"(layer_?)?norm|.*att.*|probe")
"""Parts of names that, next to those, are of the encoder all the same: they make its feature out of its tokens."""
CLASSIFIERS = (
    "head.", "fc.", "classifier.", "head_dist.", "last_linear.", "cls_classifier.", "distillation_classifier.",
    "classifier_distill.",
)  # fmt: skip
"""Key prefixes of heads that a file of an encoder may hold and that are excluded."""
DECODERS = ("decoder.", "decoder_", "mask_token", "masked_embed", "lm_head.")
"""Key prefixes of what masked pre-training reads an encoder with."""
TEXTS = (
    "text.", "text_decoder.", "text_model.", "text_projection", "transformer.", "token_embedding.",
    "positional_embedding", "ln_final.", "logit_scale", "logit_bias",
)  # fmt: skip
"""Key prefixes of a CLIP model's text tower, and of what joins it to the image tower."""
PROJECTORS = ("projector.", "projection_head.", "predictor.", "prototypes.", "dino_head.", "ibot_head.", "dino_loss.")
"""Key prefixes of what self-supervised training puts behind an encoder."""
PARTS = {
    "a classifier": CLASSIFIERS, "a decoder": DECODERS, "a text tower": TEXTS, "a pooler": ("pooler.",),
    "a projection head": PROJECTORS,
}  # fmt: skip
"""The parts of a model beside an encoder, by how the keys of their tensors begin."""
COUNTER = "num_batches_tracked"
"""How the names of batch norm's counters end, which older files lack."""
BUFFERS = ("relative_position_index", "attention_bias_idxs", "position_ids", "token_type_ids", "attn_mask")
"""Ends of names of whole numbers that an architecture makes and training does not change."""
FOREIGN = (
    (r"(^|[._])(lora_[a-zA-Z_]+|hada_w\w+|lokr_w\w+|base_layer)(\.|$)", "adapters such as LoRA, not whole weights",
     "merge them into their base first (peft: merge_and_unload(), diffusers: fuse_lora()), and save that model"),
    (r"\.(absmax|nested_absmax|quant_map|nested_quant_map|qweight|qzeros|g_idx|SCB|weight_format|weight_scale|"
     r"weight_scale_inv|input_scale|zero_point|weight_zero_point|scales)$|quant_state|_packed_params",
     "quantised weights", "take the weights before they were quantised, or let their library dequantise and save them"),
    (r"(^|\.)(exp_avg|exp_avg_sq|momentum_buffer|max_exp_avg_sq)$", "an optimizer's state, not weights",
     "give the model's own state_dict()"),
    (r"flat_param", "parameters that FSDP has flattened", "save them with StateDictType.FULL_STATE_DICT"),
    (r"(^|\.)parametrizations\.", "weights that torch's parametrizations compute",
     "call torch.nn.utils.parametrize.remove_parametrizations on them, and save again"),
    (r"(^|\.)(weight|bias)_mask$", "weights with masks of torch's pruning",
     "call torch.nn.utils.prune.remove, and save again"),
    (r"(^|\.)(fc_norm|pooler\.layernorm)\.",
     "a model whose feature is the normalised mean of its patches (fc_norm), as MAE is fine-tuned",
     "give one that was fine-tuned with the class token (MAE: --cls_token): it is another feature than this encoder's"),
)  # fmt: skip
"""Patterns of names, what a file with them holds, and what to do about it."""


def foreign(names: Iterable[str]) -> tuple[str, str] | None:
    """Say by names of tensors that fit nowhere what a file holds and what to do about it; None where they do not."""
    names = list(names)
    return next((explained for pattern, *explained in FOREIGN if any(re.search(pattern, name) for name in names)), None)  # type: ignore[return-value]


def is_head(name: str) -> bool:
    """Say whether a tensor is of a head or a pooler: of such a part, before any part that is numbered.

    A norm or an attention at its start is trained with the encoder, and makes its feature.
    """
    parts = name.split(".")
    for place, part in enumerate(parts[:DEEPEST]):
        if HEADS.fullmatch(part):
            return not any(map(FEATURES.fullmatch, parts[place + 1 : place + 2]))
        if any(sign.isdigit() for sign in part):
            return False
    return False


def unwrapped(names: Iterable[str], own: Iterable[str] = ()) -> dict[str, str]:
    """Return names without the parts that wrappers add, by name; parts that ``own`` names have stay.

    Where names would come to coincide all stay as they are.
    """
    added = WRAPPERS - {part for name in own for part in name.split(".")}
    bare = {name: _without(name, added) for name in names}
    return bare if len(set(bare.values())) == len(bare) else {name: name for name in bare}


def _without(name: str, added: Collection[str]) -> str:
    *parts, last = name.split(".")
    return ".".join([*(part for part in parts if part not in added), last])


def prefixes(names: Iterable[str], least: float) -> list[str]:
    """Return the beginnings up to a dot that at least so many names share, shortest first; the empty one always."""
    counts: Counter[str] = Counter()
    for name in names:
        parts = name.split(".", DEEPEST)
        counts.update(".".join(parts[:end]) + "." for end in range(1, len(parts)))
    return ["", *sorted((prefix for prefix, count in counts.items() if count >= least), key=len)]


def shifts(names: Collection[str], others: Collection[str]) -> list[tuple[str, str]]:
    """Return the pairs of prefixes behind which most names of both are equal: several only if they compete.

    That must be more than half of ``names``; else, and where equal names do as well, the pair is empty.
    """
    half = len(names) / 2
    tails_by_prefix = {prefix: _behind(prefix, others) for prefix in prefixes(others, half)}
    scores: dict[tuple[str, str], int] = {}
    for prefix in prefixes(names, half):
        tails = _behind(prefix, names)
        for second, other_tails in tails_by_prefix.items():
            pair = _reduced(prefix, second)
            scores[pair] = max(scores.get(pair, 0), len(tails & other_tails))
    best = max(scores.values(), default=0)
    if best <= half or scores["", ""] == best:
        return [("", "")]
    return [pair for pair, score in scores.items() if score == best]


def _behind(prefix: str, names: Iterable[str]) -> set[str]:
    return {name[len(prefix) :] for name in names if name.startswith(prefix)}


def _reduced(first: str, second: str) -> tuple[str, str]:
    """Take equal last parts off two prefixes: they move names in the same way without."""
    a, b = first.split(".")[:-1], second.split(".")[:-1]
    while a and b and a[-1] == b[-1]:
        a.pop()
        b.pop()
    return "".join(f"{part}." for part in a), "".join(f"{part}." for part in b)


def counterparts(names: Collection[str], others: Collection[str], shift: tuple[str, str]) -> dict[str, str]:
    """Return ``names`` by those of ``others`` that belong to them: moved from prefix to prefix, or else equal ones."""
    before, after = shift
    moved = {after + name.removeprefix(before): name for name in names if name.startswith(before)}
    pairs = {moved_name: name for moved_name, name in moved.items() if moved_name in others}
    matched = set(pairs.values())
    return pairs | {name: name for name in names if name not in matched and name in others and name not in pairs}


def parts(keys: Iterable[str], most: int = 3) -> str:
    """Say how many tensors of which parts ``keys`` are, such as ``2 tensors of a classifier (head.bias, ...)``."""
    groups: dict[str, list[str]] = {}
    for key in keys:
        groups.setdefault(part_of(key), []).append(key)
    return ", ".join(f"{len(held)} tensors of {part} ({', '.join(held[:most])})" for part, held in groups.items())


def part_of(key: str) -> str:
    """Name the part of a model that a tensor belongs to, by the beginning of its key or of what follows a dot."""
    tails = [key, *(key[place + 1 :] for place, sign in enumerate(key) if sign == ".")]
    for tail in tails:
        for part, begins in PARTS.items():
            if tail.startswith(begins):
                return part
    return "what the encoder does not use"

"""Shapes in annotations are checked while these tests run."""

from __future__ import annotations

from pathlib import Path

import jaxtyping
import pytest
import torch
from helpers.shapes import WINGS

import taskvec
from taskvec.core.task_types import cross_entropy
from taskvec.learning.heads import Head
from taskvec.merging.methods import averaging

ROOT = Path(taskvec.__file__).parent


def test_every_wing_with_shapes_is_checked() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in ROOT.rglob("*.py") if "jaxtyping" in path.read_text()} <= {
        *WINGS
    }


def test_a_wrong_shape_is_refused_in_functions_and_in_records() -> None:
    with pytest.raises(jaxtyping.TypeCheckError, match="labels"):
        cross_entropy(torch.zeros(4, 3), torch.zeros(5, dtype=torch.int64))
    with pytest.raises(jaxtyping.TypeCheckError):
        Head(torch.zeros(3, 4), torch.zeros(5))


def test_types_that_only_annotations_need_are_imported() -> None:
    assert averaging.Tensor is torch.Tensor


def test_the_type_of_numbers_counts() -> None:
    with pytest.raises(jaxtyping.TypeCheckError, match="vectors"):
        averaging.rows(torch.zeros(2, 3, dtype=torch.float64))

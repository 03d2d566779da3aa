"""The switches of TF32 and autocast: set for a block, and as before after it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from taskvec.core.compute import arithmetic, autocast, set_switches, switches, uses_tf32
from taskvec.core.progress import Progress
from taskvec.engine.executors import perform
from taskvec.engine.pipeline import Config, Inputs, Job, Step, step_type

NEW = hasattr(torch.backends.cuda.matmul, "fp32_precision")
"""Whether torch has the newer switches (2.9)."""


@pytest.mark.parametrize("precision", ["float32", "tf32", "float16"])
def test_both_switches_are_explicit_inside_and_as_before_outside(precision: str) -> None:
    before = switches()
    with arithmetic(precision):
        assert [value == "tf32" for value in switches()] == list(uses_tf32(precision).values())
        assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == (precision == "tf32")
        assert torch.get_float32_matmul_precision() == ("high" if precision == "tf32" else "highest")
        with arithmetic("tf32"):
            assert switches() == ("tf32", "tf32")
        assert switches() == (("tf32",) * 2 if precision == "tf32" else ("ieee",) * 2)
    assert switches() == before


def test_the_switches_are_put_back_after_an_error() -> None:
    before = switches()
    with pytest.raises(ZeroDivisionError), arithmetic("tf32"):
        raise ZeroDivisionError
    assert switches() == before


@pytest.mark.skipif(not NEW, reason="torch before 2.9 has the older switches only")
def test_float32_is_float32_where_a_user_allows_tf32_for_everything() -> None:
    backends = torch.backends
    try:
        backends.fp32_precision, backends.cuda.matmul.fp32_precision = "tf32", "none"
        assert switches() == ("tf32", "tf32")
        with arithmetic("float32"):
            assert switches() == ("ieee", "ieee")
        assert switches() == ("tf32", "tf32")
    finally:
        backends.fp32_precision = "none"
        set_switches(("none", "tf32"))


def test_a_cpu_has_no_switches() -> None:
    before = switches()
    with arithmetic("tf32", "cpu"):
        assert switches() == before


class Casts(TorchDispatchMode):
    """Counts the tensors that are cast."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        """Call the function."""
        self.count += func is torch.ops.aten._to_copy.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("cache", "casts"), [(True, 2 + 3), (False, 3 * 3)])
def test_the_cache_casts_parameters_once(cache: bool, casts: int) -> None:
    layer, images = torch.nn.Linear(8, 4), torch.rand(3, 2, 8)
    with torch.no_grad(), Casts() as counter, autocast("bfloat16", "cpu", cache):
        outputs = [layer(batch) for batch in images]
    assert all(output.dtype == torch.bfloat16 for output in outputs)
    assert counter.count == casts


@step_type(1, writes=["switches.txt"])
def read_switches(config: Config, inputs: Inputs, out: Path, progress: Progress) -> None:
    """Write how both switches stand while a step computes."""
    (out / "switches.txt").write_text(" ".join(switches()))


def test_a_step_computes_in_float32_whatever_stands_outside(tmp_path: Path) -> None:
    with arithmetic("tf32"):
        perform(Job(Step("look", read_switches, Config(), {}), "abc", {}, tmp_path), lambda _: None, lambda _: None)
        assert switches() == ("tf32", "tf32")
    assert (tmp_path / "switches.txt").read_text() == "ieee ieee"

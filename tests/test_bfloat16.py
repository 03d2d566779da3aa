"""Which CPUs train in bfloat16, and from how many features on."""

from __future__ import annotations

import pytest

from taskvec.core import compute

AMD = {"vendor_id": "AuthenticAMD", "flags": "fpu avx512f avx512_bf16 vaes"}
OLDER = {"vendor_id": "AuthenticAMD", "flags": "fpu avx2"}
INTEL = {"vendor_id": "GenuineIntel", "flags": "fpu avx512f avx512_bf16"}


@pytest.mark.parametrize(
    ("facts", "tiles", "widest_float32"),
    [(AMD, False, 383), (OLDER, False, None), (INTEL, False, None), (INTEL, True, 127), ({}, False, None)],
)
def test_bfloat16_is_for_wide_encoders_on_cpus_that_gain_from_it(
    monkeypatch: pytest.MonkeyPatch, facts: dict[str, str], tiles: bool, widest_float32: int | None
) -> None:
    monkeypatch.setattr(compute, "cpu_fact", lambda name: facts.get(name, ""))
    monkeypatch.setattr(compute, "has_tiles", lambda: tiles)
    widths = range(1, 1025)
    chosen = {width: compute.choose_precision("auto", "training", width, "cpu") for width in widths}
    exact = [width for width, precision in chosen.items() if precision == "float32"]
    assert exact == list(range(1, (widest_float32 or 1024) + 1))
    resolved = compute.resolve_precision("auto", "cpu")
    assert chosen == {width: compute.choose_precision(resolved, "training", width, "cpu") for width in widths}
    assert compute.choose_precision("auto", "evaluation", 1024, "cpu") == "float32"
    assert compute.choose_precision("bfloat16", "training", 8, "cpu") == "bfloat16"


def test_facts_of_a_cpu_are_those_of_its_own_line() -> None:
    assert compute.cpu_fact("no such line") == ""
    assert compute.cpu_fact("flags") == "" or "fpu" in compute.cpu_fact("flags").split()

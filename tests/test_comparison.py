"""The paper's tables hold our numbers and the paper's beside them; LaTeX has balanced braces and nothing unescaped."""

from __future__ import annotations

import re

import pandas as pd
import pytest
from helpers import report_rows as fixture

from taskvec.core.errors import TaskvecError
from taskvec.paper import numbers as paper
from taskvec.report import tables
from taskvec.report.paper_tables import (
    Comparison,
    Entry,
    _latex_number,
    comparisons,
    latex_table,
    latex_tables,
    markdown_comparison,
)
from taskvec.report.texts import escape_latex

SPECIAL = r"(?<!\\)(?:\\\\)*[#$%&_^~]"


@pytest.fixture(scope="module")
def run() -> tuple[pd.DataFrame, pd.DataFrame]:
    return fixture.full_run(backbones=("random-init", "sup-21k-L", "clip-large", "sup-1k"), seeds=(0, 1))


def _built(run: tuple[pd.DataFrame, pd.DataFrame], roles: dict[str, str]) -> dict[str, Comparison]:
    return {table.name: table for table in comparisons(*run, roles)}


def _row(table: Comparison, backbone: str) -> dict[str, Entry]:
    rows = (row for _, rows in table.blocks for row in rows)
    return next(row for row in rows if backbone in (row["Model"].ours, row.get("Backbone", Entry("")).ours))


def _value(rows: pd.DataFrame, **wanted: object) -> float:
    rows = rows[rows["tasks"] == "+".join(fixture.EIGHT)]
    found = rows[(rows[list(wanted)] == pd.Series(wanted)).all(axis=1) & (rows["task"] == "")]
    return 100 * float(found.loc[found["split"] == "test", "value"].mean())


def test_rows_stand_in_the_paper_s_order_and_blocks(run: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    built = _built(run, fixture.ROLES)
    assert list(built) == ["table1", "table3", "table4"]
    blocks = [
        (title, [row["Backbone"].ours or row["Model"].ours for row in rows]) for title, rows in built["table1"].blocks
    ]
    assert blocks == [
        ("ViT-B-16", ["sup-1k", "clip-large"]),
        ("ViT-L-14/16", ["sup-21k-L"]),
        ("Other backbones", ["random-init"]),
    ]
    assert [row["Fine-tuning"].ours for row in built["table4"].blocks[0][1]] == ["Encoder", "Full"]


def test_numbers_are_those_of_the_rows_and_of_the_paper(run: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    row = _row(_built(run, fixture.ROLES)["table3"], "clip-large")
    wanted = {"backbone": "clip-large", "regime": "full", "method": "task_arithmetic", "scaling": ""}
    assert row["Addition: absolute"] == (f"{_value(run[0], metric='accuracy', **wanted):.1f}", "47.0")
    assert row["Addition: normalised"] == (f"{_value(run[0], metric='normalised_accuracy', **wanted):.1f}", "48.2")
    assert (row["Addition: λ"], row["Single-task: final"].paper) == (("0.10", "0.30"), "92.0")
    assert "Single-task: probing" not in row
    first = _row(_built(run, fixture.ROLES)["table1"], "sup-1k")
    assert first["Model"] == ("Supervised (IN1k)", "")
    assert str(first["Single-task: probing"]) == "69.7 ± 0.2 (72.1)"
    assert {name for name in first if name.startswith("Beyond")} == {
        "Beyond the paper: joint", "Beyond the paper: gain over probing", "Beyond the paper: ξ in the box",
    }  # fmt: skip


def test_what_the_paper_does_not_print_has_no_grey_number(run: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    encoder, full = _built(run, fixture.ROLES)["table4"].blocks[0][1]
    assert [encoder[f"Addition: {name}"].paper for name in ("absolute", "normalised", "λ")] == ["72.4", "", ""]
    assert [full[f"Addition: {name}"].paper for name in ("absolute", "normalised", "λ")] == ["71.2", "75.9", "0.25"]
    assert not any(entry.paper for entry in _row(_built(run, fixture.ROLES)["table1"], "random-init").values())


def test_without_roles_the_tables_are_there_without_the_paper(run: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    built = _built(run, {})
    assert [title for title, _ in built["table1"].blocks] == [""]
    assert not any(table.has_paper for table in built.values())
    assert "Backbone" not in built["table1"].columns
    assert "paper's own" not in tables.markdown(*run)
    assert _built((fixture.results(regimes=("lora",)), fixture.heatmap()), {}) == {}


def test_a_regime_without_addition_has_no_table() -> None:
    assert comparisons(fixture.results(methods={"iso_c": 0.2}), None, {}) == []


def test_an_unknown_role_is_told_and_an_empty_one_is_none(run: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    with pytest.raises(TaskvecError, match="did you mean 'vit-b16-clip-2b'"):
        latex_tables(*run, {"clip-large": "vit-b16-clip2b"})
    assert latex_tables(*run, {"clip-large": ""}) == latex_tables(*run)


def test_latex_is_balanced_and_escaped(run: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    odd = {"sup-1k": r"a_b & 50% #1 {x} $y$ ~^\z", "random-init": "tiny_random"}
    rows = run[0].replace({"backbone": odd})
    roles = {odd["sup-1k"]: "vit-b16-in1k", "clip-large": "vit-b16-clip-2b"}
    for name, text in latex_tables(rows, run[1], roles).items():
        body = re.sub(r"\$(-|\\[a-z]+)\$", "", "\n".join(text.splitlines()[1:]))
        assert re.sub(r"\\[{}]", "", body).count("{") == re.sub(r"\\[{}]", "", body).count("}")
        lines = [line for line in body.splitlines() if line.endswith(r" \\") and "multicolumn" not in line]
        columns = len(re.search(r"\\begin\{tabular\}\{([lr]+)\}", body).group(1))  # type: ignore[union-attr]
        for line in lines:
            cells = re.split(r"(?<!\\) & ", line.removesuffix(r" \\"))
            assert len(cells) == columns
            assert not re.search(SPECIAL, "".join(cells))
        assert body.count(r"\begin") == body.count(r"\end") == 2
        assert f"\\label{{tab:{name}}}" in body


def test_latex_writes_the_paper_in_grey_and_minus_as_minus(run: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    text = latex_tables(*run, fixture.ROLES)["table3"]
    assert r"39.9 \textcolor{gray}{47.0}" in text
    assert r"$-$37.7 ($-$38.4 to $-$37.0)" in text
    assert "random-init" in text
    assert r"\multicolumn{8}{l}{\textit{ViT-L-14/16}} \\" in text
    assert "gray" not in latex_tables(*run)["table3"]
    assert _latex_number("–") == "--"  # not measured


def test_escaping_for_latex() -> None:
    assert escape_latex("a_b\n λ±ξ – 5%") == r"a\_b $\lambda$$\pm$$\xi$ -- 5\%"


def test_blocks_are_bold_rows_in_markdown(run: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    text = markdown_comparison(_built(run, fixture.ROLES)["table1"])
    lines = text.splitlines()
    assert lines[2].startswith("| **ViT-B-16**")
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1
    assert "(72.1)" in text


def test_the_paper_s_numbers_are_typed_as_printed() -> None:
    assert paper.MODELS["vit-b16-dino"].numbers("aligned") == (82.2, 90.6, 82.2, 90.9, 0.0)
    assert paper.MODELS["vit-l14-clip-2b"].numbers("full")[1:] == (94.1, 70.9, 72.9, 0.40)
    printed = {key: model.numbers("aligned") for key, model in paper.MODELS.items()}
    ratios = {key: 100 * numbers.absolute / numbers.final for key, numbers in printed.items()}
    misfits = [key for key, ratio in ratios.items() if abs(ratio - printed[key].normalised) > 1.7]
    assert misfits == ["vit-b16-clip-400m", "vit-b16-clip-2b"]


def test_latex_without_blocks_has_two_lines_of_headings_and_one_of_numbers() -> None:
    assert latex_table(comparisons(fixture.results(), None, {})[0]).count(r"\\") == 3

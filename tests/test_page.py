"""The page holds everything it shows, escapes what users wrote, and shows the numbers of the tables."""

from __future__ import annotations

import base64
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from helpers import report_rows as fixture
from helpers.html import Reader

from taskvec.core.errors import TaskvecError
from taskvec.report import page, tables
from taskvec.report.claims.claims import claims
from taskvec.report.figures import drawing as figures

EVIL = ("<script>alert(1)</script>", "a|b & \"c\" 'd'", "<img src=http://example.org/x.png>")


def _render(
    folder: Path,
    rows: pd.DataFrame,
    errors: pd.DataFrame | None = None,
    roles: dict[str, str] | None = None,
    **lock: Any,
) -> str:
    """Render with one-pixel pictures in place of the figures, which have tests of their own."""
    for planned in figures.plan(rows, errors, roles):
        (folder / f"{planned.stem}.png").write_bytes(planned.stem.encode())
    return page.render(rows, errors, folder, fixture.LOCK | lock, fixture.STUDY, roles)


def _words(html: str) -> str:
    return " ".join(" ".join(Reader(html).text).replace("\N{NO-BREAK SPACE}", " ").split())


def test_the_page_is_one_file_that_loads_nothing(tmp_path: Path) -> None:
    rows, errors = fixture.results(backbones=("a", "b"), methods={"task_arithmetic": 0.1, "x": 0.2}), None
    read = Reader(_render(tmp_path, rows, errors))
    assert all(load.startswith(("data:image/png;base64,", "#")) for load in read.loads)
    assert not {"script", "link", "iframe", "object"} & set(read.tags)
    assert "url(" not in "".join(read.text)
    assert "@import" not in "".join(read.text)


def test_every_planned_figure_is_inside(tmp_path: Path) -> None:
    rows, errors = fixture.results(backbones=("a", "b")), fixture.heatmap(backbones=("b",))
    read = Reader(_render(tmp_path, rows, errors))
    inside = {base64.b64decode(load.partition(",")[2]).decode() for load in read.loads if load.startswith("data:")}
    assert inside == {planned.stem for planned in figures.plan(rows, errors)}
    assert read.tags.count("figcaption") == len(inside) == 6


def test_the_page_says_what_the_tables_say(tmp_path: Path) -> None:
    rows, errors = fixture.results(), fixture.heatmap()
    words = " ".join(" ".join(Reader(_render(tmp_path, rows, errors)).text).split())
    assert " ".join(tables.headline(rows).split()) in words
    frame = tables.per_task(rows, "lab:supervised", "aligned")
    for row in frame.to_numpy().tolist():
        assert " ".join(row) in words
    assert " ".join(tables.summary(rows, errors).iloc[0]) in words


def test_claims_tables_and_comparisons_come_before_the_folded_parts(tmp_path: Path) -> None:
    rows, heat = fixture.full_run(backbones=("sup-1k", "masked", "clip-large"), seeds=(0,))
    html = _render(tmp_path, rows, heat, fixture.ROLES)
    ids = re.findall(r' id="([a-z0-9-]+)"', html)
    assert ids[:4] == ["claims", "table1", "table3", "table4"]
    assert ids[4:10] == ["summary", "compared-1", "compared-2", "compared-3", "compared-4", "part-1"]
    assert html.count('<details class="part"') == 8
    links = {load.removeprefix("#") for load in Reader(html).loads if load.startswith("#")}
    assert links == set(ids)
    words = _words(html)
    for row in claims(rows, heat, fixture.ROLES).to_numpy().tolist():
        assert " ".join(row) in words
    assert "69.6 (72.1)" in words
    assert "in grey the paper's own" in words


def test_figures_are_numbered_as_in_the_paper_where_the_paper_has_them(tmp_path: Path) -> None:
    rows, heat = fixture.full_run(backbones=("sup-1k", "sup-21k", "clip-large", "sup-21k-L"), seeds=(0,))
    words = _words(_render(tmp_path, rows, heat, fixture.ROLES))
    found = re.findall(r"\(the paper's Figure (\d)\)\. ", words)
    assert [found.count(str(number)) for number in (1, 3, 4, 5, 6, 7, 8, 9)] == [1] * 8
    assert "A λ for each task beside the common one. Dots" in words


def test_two_sections_or_fewer_are_open_and_there_are_no_claims_without_roles(tmp_path: Path) -> None:
    html = _render(tmp_path, *fixture.full_run(backbones=("masked",), seeds=(0,)))
    assert '<details class="part"' not in html
    assert 'id="claims"' not in html
    assert 'id="table3"' in html
    assert "in grey" not in html


def test_a_long_summary_is_folded(tmp_path: Path) -> None:
    rows = fixture.results(backbones=[f"b{i}" for i in range(25)], tasks=("one", "two"), scales=(0.0, 0.1))
    assert "<summary>All 25 rows</summary>" in _render(tmp_path, rows)


def test_what_users_wrote_is_text(tmp_path: Path) -> None:
    rows = fixture.results(tasks=EVIL, backbones=('<b id="x">',)).assign(study="<title>&amp;")
    html = _render(tmp_path, rows, command="taskvec run '<u>.yaml'")
    read = Reader(html)
    words = "".join(read.text)
    assert not {"script", "u", "b"} & set(read.tags)
    assert read.tags.count("title") == 1
    for name in (*EVIL, '<b id="x">', "<title>&amp;", "taskvec run '<u>.yaml'", fixture.STUDY):
        assert name in words


def test_how_to_reproduce_holds_command_study_versions_seeds_and_threads(tmp_path: Path) -> None:
    text = "".join(Reader(_render(tmp_path, fixture.results(), command="taskvec run quick", seeds=[3, 4])).text)
    after = text[text.index("How to reproduce") :]
    for shown in ("taskvec run quick", fixture.STUDY, "torch2.9.0", "seeds3, 4", "threads1", "a09c"):
        assert shown in after


def test_a_page_without_lock_or_heatmap_is_still_a_page(tmp_path: Path) -> None:
    rows = fixture.results(tasks=("only",), heads=("kept",))
    _render(tmp_path, rows)
    text = "".join(Reader(page.render(rows, None, tmp_path, {}, "")).text)
    assert "taskvec run study.yaml" in text
    assert "Weight disentanglement" not in text


def test_a_page_on_tasks_of_several_kinds_names_their_metrics(tmp_path: Path) -> None:
    rows = fixture.mixed()
    html = _render(tmp_path, rows)
    words = _words(html)
    for row in tables.per_task(rows, "lab:random", "aligned").to_numpy().tolist():
        assert " ".join(row) in words
    assert words.count("tasks differ in their metric, so only normalised values have a mean, of gains too") == 2
    assert "the points of the task's own metric that merging adds to probing" in words
    assert "100 is what the fine-tuned encoders reach" in words
    assert "The normalised metric against the number of merged tasks." in words
    assert '<td class="name">patch accuracy</td>' in html
    assert "accuracy points" not in words
    assert "test accuracy" not in words.lower()
    plain = _words(_render(tmp_path, fixture.results()))
    assert "the accuracy points that merging adds to probing" in plain
    assert "100 is the accuracy of the fine-tuned encoders" in plain
    assert "Test accuracy in %, mean over 8 tasks" in plain


def test_every_kind_of_figure_has_a_name_and_words_of_its_own() -> None:
    types = [*figures.OF_REGIMES, *figures.OF_VIEWS]
    assert len({type.name for type in types}) == len({type.title for type in types}) == len(types)
    assert all(all(type.words("aligned", mixed)) for type in types for mixed in (False, True))


def test_rendered_twice_it_is_the_same(tmp_path: Path) -> None:
    assert _render(tmp_path, fixture.results()) == _render(tmp_path, fixture.results())


def test_a_missing_figure_is_told(tmp_path: Path) -> None:
    with pytest.raises(TaskvecError, match="write the figures before the page"):
        page.render(fixture.results(), None, tmp_path, fixture.LOCK, fixture.STUDY)


def test_the_notes_of_a_study_stand_above_its_tables(tmp_path: Path) -> None:
    rows = fixture.results()
    _render(tmp_path, rows)
    html = page.render(rows, None, tmp_path, fixture.LOCK, fixture.STUDY, study_notes=("a <note>",))
    assert html.index("Before you compare") < html.index("a &lt;note&gt;") < html.index("<table")

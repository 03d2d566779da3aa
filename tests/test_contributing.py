"""The check-lists of CONTRIBUTING.md name few files, and files that there are."""

from __future__ import annotations

import sys

from helpers.layers import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "tools"))

from house import GOALS, body_lengths, checklists, code_lines, shapes

TEXT = '''def f(x: Float32[Tensor, " count"]) -> None:
    """Say."""
    # why

    if x:
        return
'''


def test_every_change_has_a_checklist_of_few_files_that_there_are() -> None:
    lists = checklists((REPOSITORY / "CONTRIBUTING.md").read_text("utf-8"))
    assert lists.keys() == GOALS.keys()
    assert {name: files for name, files in lists.items() if not 0 < len(files) <= GOALS[name]} == {}
    missing = {file for files in lists.values() for file in files if not (REPOSITORY / file).is_file()}
    assert missing == set()


def test_lines_and_shapes_are_counted_as_the_house_counts_them() -> None:
    assert code_lines(TEXT) == {1, 5, 6}
    assert list(body_lengths(TEXT)) == [2]
    assert shapes(TEXT) == 1

"""The leaderboard: costs from the steps that an option needs, the table, the figure, and the pick for each budget."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pandas as pd
import pytest
from helpers import report_rows as fixture
from helpers.html import Reader
from helpers.reporters import Quiet
from helpers.tasks import write_folder_task
from hypothesis import given, settings
from hypothesis import strategies as st

import taskvec as tv
from taskvec.command import runs
from taskvec.core.errors import TaskvecError
from taskvec.core.files import read_json
from taskvec.engine.store import Store
from taskvec.merging.variants import Variant
from taskvec.report import costs, page
from taskvec.report.figures import drawing as figures
from taskvec.report.leaderboard import (
    SAME_BUDGET,
    STEP,
    Board,
    Option,
    advice,
    board_table,
    boards,
    frontier,
    markdown_boards,
    picks,
    short_grids,
)
from taskvec.report.rows import COLUMNS
from taskvec.report.scale_guess import guess_table
from taskvec.report.texts import percent
from taskvec.report.verdict import SMOKE, headline
from taskvec.report.views import views
from taskvec.study.files import parse_study
from taskvec.study.schema import StudyFile

METHODS = {"task_arithmetic": 0.05, "iso_c": 0.3, "ties": 0.2, "emr": 0.5}
STUDY = """
name: small
backbones: ["lab:random"]
tasks: ["folder:{root}/one", "folder:{root}/two"]
regimes: [aligned, {{name: joint, steps: 3}}]
methods: [{{name: task_arithmetic, scales: "0:1:0.5"}}, {{name: emr, scales: [0, 1]}}]
heads: [kept, reprobed, surgery]
agreement: 5
surgery: {{steps: 4, rank: 3}}
heatmap: {{pairs: 0}}
probe: {{steps: 20, batch_size: 16, warmup: 2, learning_rates: [0.03]}}
finetune: {{steps: 3, batch_size: 8, warmup: 1, learning_rate: 0.003}}
"""


def rows_with_joint() -> pd.DataFrame:
    rows = fixture.results(seeds=(0, 1), methods=METHODS, scales=(0.0, 0.1, 0.2, 0.3, 0.4))
    joint = rows[rows["method"] == "fine_tuned"].assign(method="joint")
    return pd.concat([rows, joint.assign(value=0.985 * joint["value"])])


def board() -> Board:
    rows = rows_with_joint()
    [found] = boards(rows, fixture.costs(rows, per_task=("emr",)))
    return found


def test_a_board_needs_costs_and_several_methods() -> None:
    rows = fixture.results(methods={"task_arithmetic": 0.1})
    assert boards(rows, fixture.costs(rows)) == []
    assert boards(rows_with_joint(), None) == []


def test_the_table_holds_every_method_once_with_its_costs() -> None:
    frame = board_table(board())
    assert list(frame["Method"][:3]) == ["linear probing", "joint fine-tuning", "individual models"]
    assert list(frame["Method"][3:]) == ["emr", "iso_c", "ties", "addition"]  # by the best on validation
    by_method = frame.set_index("Method")
    assert by_method.loc["individual models", "Stored: encoders"] == "8"
    assert by_method.loc["emr", "Stored: MB"] == f"{(4 * (2 * fixture.ENCODER + 1000) + 8 * 125_000) / 1e6:.1f}"
    assert by_method.loc["linear probing", "Training (s)"] == "10"
    assert by_method.loc["ties", "Training (s)"] == "110"
    kept, reprobed = (f"{kind} heads: merging and search (s)" for kind in ("Kept", "Re-probed"))
    assert float(by_method.loc["ties", kept]) < float(by_method.loc["ties", reprobed])
    assert by_method.loc["joint fine-tuning", kept] == "–"


options = st.builds(
    Option,
    method=st.sampled_from(["a", "b", "c"]),
    heads=st.sampled_from(["kept", "reprobed"]),
    validation=st.floats(0.5, 1.1),
    encoders=st.just(1.0),
    stored=st.just(4e6),
    training=st.just(100.0),
    extra=st.floats(0.1, 1000),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(options, min_size=1, max_size=12))
def test_a_frontier_rises_and_leaves_nothing_better_for_less(found: list[Option]) -> None:
    kept = frontier(found)
    for one, two in itertools.pairwise(kept):
        assert one.extra <= two.extra
        assert two.validation >= one.validation + STEP
    for other in found:  # what is better than a pick costs more, unless a later pick is at least about as good
        cheaper = [one for one in kept if one.extra <= SAME_BUDGET * other.extra]
        assert cheaper
        assert max(one.validation for one in cheaper) > other.validation - STEP


def test_picks_beat_probing_and_more_storage_must_pay() -> None:
    found = board()
    chosen = picks(found)
    probing = found.find("probing")
    assert probing is not None
    assert all(one.validation > probing.validation for one in chosen)
    large = [one for one in chosen if one.encoders > 1]
    assert [one.method for one in large] == [Variant("emr")]
    assert min(one.validation for one in large) > max(one.validation for one in chosen if one.encoders == 1)


def test_the_last_line_says_which_to_pick_in_plain_words() -> None:
    found = board()
    last = markdown_boards([found]).splitlines()[-1]
    assert last.startswith("Which to pick")
    for words in ("linear probing", "with re-probed heads", "MB stored in place of", "Joint fine-tuning"):
        assert f"{words} " in last
    nothing = Board(found.view, tuple(one for one in found.options if not one.merged))
    assert "not worth merging" in advice(nothing)
    assert "individual models (8 encoders, 32.0 MB) are better on validation than linear probing" in advice(nothing)


def test_a_fine_tuned_encoder_that_got_nothing_right_is_named() -> None:
    rows = rows_with_joint()
    rows = rows[~rows["metric"].str.startswith("normalised")]
    none = (rows["method"] == "fine_tuned") & (rows["split"] == "validation") & (rows["task"] == "dtd")
    rows = rows.assign(value=rows["value"].where(~none, 0.0))
    found = Board(views(rows)[0], board().options)
    assert found.view.unlearned == ["dtd"]
    text = advice(found)
    assert text.startswith("Which to pick, in test accuracy: The individual model of dtd got no validation image right")
    assert f"linear probing reaches {percent(found.view.result('probing'))} %" in text
    assert "–" not in text
    assert board().view.unlearned == []


def test_what_the_test_split_does_not_confirm_is_not_picked_and_the_verdict_agrees() -> None:
    rows = rows_with_joint()
    gains = rows["metric"].str.startswith("gain_over_probing")
    rows.loc[gains, "value"] -= 0.2
    spent = fixture.costs(rows)
    [found] = boards(rows, spent)
    assert picks(found) == []
    assert "is the best on validation and no better than that on the test split" in advice(found)
    assert "not worth merging here" in advice(found)
    assert "is worse than linear probing" in headline(rows, spent)
    low = rows["metric"].isin(["normalised_accuracy"]) & rows["split"].eq("validation")
    [without] = boards(rows[~low], spent)  # a fine-tuned accuracy was zero
    assert len(without.options) == len(found.options)


def test_a_trial_run_has_a_board_and_no_advice() -> None:
    text = markdown_boards([board()], smoke=True)
    assert text.splitlines()[2] == SMOKE
    assert "Which to pick" not in text
    assert "normalised |" not in text


def test_a_grid_that_ended_too_early_is_told() -> None:
    """Where the scales above the chosen one were not tried, a wider grid may give more."""
    rows = rows_with_joint()
    assert short_grids(board()) == ""
    merged = rows["method"].isin(["emr", "iso_c"])
    short = rows[~(merged & (rows["split"] == "validation") & (rows["scale"] > rows["method"].map(METHODS)))]
    [found] = boards(short, fixture.costs(short, per_task=("emr",)))
    note = short_grids(found)
    assert note.startswith("The largest scale that was tried was chosen by")
    assert "iso_c" in note and "ties" not in note
    assert note in markdown_boards([found])


def test_the_page_and_the_figures_hold_the_board(tmp_path: Path) -> None:
    rows = rows_with_joint()
    spent = fixture.costs(rows)
    planned = figures.plan(rows, None, None, spent)
    [drawn] = [one for one in planned if one.kind == "leaderboard"]
    assert len(drawn.draw().axes) == 3
    for one in planned:
        (tmp_path / f"{one.stem}.png").write_bytes(b"")
    html = page.render(rows, None, tmp_path, fixture.LOCK, fixture.STUDY, None, spent)
    words = " ".join("".join(Reader(html).text).replace("\N{NO-BREAK SPACE}", " ").split())
    assert advice(boards(rows, spent)[0]) in words
    assert 'id="leaderboard-1"' in html
    assert 'id="leaderboard-1"' not in page.render(rows, None, tmp_path, fixture.LOCK, fixture.STUDY)


@pytest.mark.parametrize(("sign", "correlation"), [(1, "+1.00"), (-1, "-1.00")])
def test_agreement_is_compared_with_the_re_probed_curve(sign: int, correlation: str) -> None:
    rows = rows_with_joint()
    own = (rows["heads"] == "reprobed") & (rows["split"] == "validation") & (rows["metric"] == "normalised_accuracy")
    told = rows[own].assign(metric="agreement", split="train", value=0.5 + sign * rows.loc[own, "value"] / 4)
    rows, spent = pd.concat([rows, told]), fixture.costs(rows)
    more = spent[spent["heads"] == "reprobed"].assign(heads=costs.AGREEMENT, search_seconds=0.1)
    [found] = boards(rows, pd.concat([spent, more]))
    frame = guess_table(found.guesses)
    assert len(frame) == len(METHODS)
    assert set(frame["Rank correlation"]) == {correlation}
    assert (frame["Regret (points)"] == "0.0").all() == (sign == 1)
    best = found.guesses[0]
    assert best.seconds == pytest.approx(0.1 + best.instead_of / 4)  # five scales, one of them 0


# ---------------------------------------------------------------- end to end


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("board")
    write_folder_task(root / "one")
    write_folder_task(root / "two", ("red", "blue"), train=15, test=6)
    text = STUDY.format(root=root)
    file = StudyFile(parse_study(text, "small"), text, root)
    runs.run_study(file, root / "out", Store(root / "store"), 1, Quiet(), "taskvec run small")
    return root


def test_costs_are_those_of_the_steps_in_the_store(run: Path) -> None:
    spent = pd.read_csv(run / "out" / "costs.csv", keep_default_na=False)
    assert tuple(spent.columns) == costs.COLUMNS
    told = [read_json(path)["about"] for path in (run / "store").glob("??/*/record.json")]
    by_kind = pd.DataFrame(told).groupby("step")["seconds"].sum()
    by_option = spent.set_index(["method", "heads"])
    assert by_option.loc[("fine_tuned", "kept"), "training_seconds"] == pytest.approx(by_kind["finetune"])
    joint = by_option.loc[("joint", "kept"), "training_seconds"]
    assert joint == pytest.approx(by_kind["finetune_joint"])
    assert by_option.loc[("probing", "kept"), ["training_seconds", "merging_seconds", "search_seconds"]].sum() == 0
    merges = by_option[by_option["correction"] == ""]
    merges = merges.loc[[("task_arithmetic", "kept"), ("emr", "kept")], "merging_seconds"].sum()
    assert merges == pytest.approx(by_kind["merge"])
    searched = spent[~spent["method"].isin(["probing", "fine_tuned", "joint"])]["search_seconds"].sum()
    kinds = ["kept_curve", "reprobed_curve", "surgery_curve", "choose_scale", "agreement"]
    assert searched == pytest.approx(sum(by_kind[kind] for kind in kinds))


def test_numbers_to_store_are_those_of_the_files(run: Path) -> None:
    spent = pd.read_csv(run / "out" / "costs.csv", keep_default_na=False).set_index(["method", "correction", "heads"])
    model = tv.load(run / "out")
    encoder, width = model.backbone.pretrained.flat.numel(), model.backbone.width
    heads = (width + 1) * 5  # three classes and two
    assert spent.loc[("probing", "", "kept"), "parameters"] == encoder + heads
    assert spent.loc[("fine_tuned", "", "kept"), "parameters"] == 2 * encoder + heads
    assert spent.loc[("emr", "", "reprobed"), "encoders"] == 2
    assert spent.loc[("emr", "", "kept"), "bytes_per_task"] >= encoder / 8
    assert spent.loc[("task_arithmetic", "surgery", "kept"), "parameters"] == encoder + heads + 2 * 2 * 3 * width


def test_results_keep_their_contract_and_the_run_its_board(run: Path) -> None:
    rows = pd.read_csv(run / "out" / "results.csv", keep_default_na=False)
    assert tuple(rows.columns) == tuple(COLUMNS)
    assert set(rows["heads"]) == {"kept", "reprobed"}
    assert not rows["metric"].str.contains("seconds").any()
    merged = rows[(rows["split"] == "test") & (rows["metric"] == "accuracy") & (rows["task"] == "")]
    corrected = merged[merged["correction"] == "surgery"]
    assert {"task_arithmetic", "emr"} == set(corrected["method"])
    assert not merged.duplicated(["method", "correction", "heads"]).any()
    agreed = rows[rows["metric"] == "agreement"]
    assert agreed["value"].between(0, 1).all()
    assert set(agreed["split"]) == {"train"}
    assert sorted(agreed[(agreed["method"] == "task_arithmetic") & (agreed["task"] == "")]["scale"]) == [0, 0.5, 1]
    text = (run / "out" / "leaderboard.md").read_text("utf-8")
    assert re.search(r"\| addition, surgery +\|", text)
    assert "Rank correlation" in text
    assert text.splitlines()[-1].startswith("Which to pick")
    assert list((run / "out" / "figures").glob("leaderboard--*.png"))
    names = [one["name"] for one in json.loads((run / "out" / "models" / "random" / "model.json").read_text())["tasks"]]
    assert names == ["one", "two"]


def test_agreement_without_re_probed_heads_is_refused() -> None:
    text = STUDY.format(root="x").replace("heads: [kept, reprobed, surgery]", "heads: [kept]")
    with pytest.raises(TaskvecError, match="add reprobed"):
        parse_study(text, "small")

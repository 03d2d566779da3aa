"""The tables say what the rows say, and the verdict says no more than its interval allows."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers import report_rows as fixture
from rich.cells import cell_len

from taskvec.core.errors import TaskvecError
from taskvec.core.task_types import TASK_TYPES
from taskvec.merging.variants import PER_TASK, Variant
from taskvec.report import tables, verdict
from taskvec.report.disentanglement import box_error
from taskvec.report.texts import MISSING, escape_latex, escape_markdown, short_backbone, shorten, text_table
from taskvec.report.views import METRICS, find_view, line_search, task_sets


def _value(rows: pd.DataFrame, method: str, heads: str, metric: str, task: str = "") -> float:
    wanted = {"method": method, "heads": heads, "metric": metric, "task": task, "split": "test"}
    found = rows[(rows[list(wanted)] == pd.Series(wanted)).all(axis=1)]
    assert len(found) == 1
    return float(found["value"].iloc[0])


def test_the_verdict_compares_one_encoder_with_separate_ones_and_with_probing() -> None:
    rows = fixture.results()
    kept, again = (100 * _value(rows, "task_arithmetic", h, "gain_over_probing") for h in ("kept", "reprobed"))
    assert tables.headline(rows) == (
        "One encoder for all eight tasks (addition with re-probed heads, lambda 0.30) reaches 80.5 %, 96.0 % of eight "
        "separate fine-tuned encoders (83.8 %), and beats linear probing (75.6 %) by "
        f"{again:.1f} points, 95 % interval {again - 0.7:.1f} to {again + 0.7:.1f}. "
        f"Adding the eight task vectors gained {kept:.1f} points over linear probing with kept heads "
        f"({kept - 0.7:.1f} to {kept + 0.7:.1f}, lambda 0.10)."
    )


def test_the_verdict_tells_what_is_stored_how_far_separate_encoders_are_and_how_to_use_the_model() -> None:
    rows = fixture.results()
    ours = rows[rows["metric"].str.startswith("gain_over_probing")]
    away = ours.assign(metric=ours["metric"].str.replace("probing", "fine_tuned"), value=ours["value"] - 0.08)
    text = tables.headline(pd.concat([rows, away]), fixture.costs(rows))
    assert "(83.8 %; -3.1 points, 95 % interval -3.8 to -2.4)" in text
    stored, separate = ((count * fixture.ENCODER + 1000) * 4 / 1e6 for count in (1, 8))
    assert f"; it stores one encoder and eight heads, {stored:.1f} MB in place of {separate:.1f} MB. Adding" in text
    about = {"regime": "aligned", "seed": 0, "method": "probing", "heads": "kept", "scale": 0.0}
    lock = {"study": {"name": "my"}, "models": {"lab:supervised": about}}
    assert "in this folder: `taskvec predict . image.jpg`" in tables.markdown(rows, lock=lock)
    assert verdict.usage(lock, "a folder") == "taskvec predict 'a folder' image.jpg"
    several = tables.headline(fixture.results(seeds=(0, 1)), lock=lock)
    assert several.endswith(
        "Kept in models/, the best on validation: lab:supervised: linear probing (aligned, seed 0)."
    )


@pytest.mark.parametrize(
    ("width", "answer", "kept"),
    [
        (0.007, "beats linear probing (75.6 %) by 4.9 points", "gained 1.2 points over"),
        (0.0123, "beats linear probing (75.6 %) by 4.9 points", "did not beat linear probing with kept"),
        (0.06, "is no better than linear probing (75.6 %): +4.9 points", "did not beat linear probing with kept"),
    ],
)
def test_the_verdict_claims_no_gain_when_the_interval_reaches_zero(width: float, answer: str, kept: str) -> None:
    text = tables.headline(fixture.results(width=width))
    assert answer in text
    assert kept in text


def test_without_an_interval_the_verdict_says_how_far_and_not_whether() -> None:
    rows = fixture.results(tasks=("one", "two"))
    text = tables.headline(rows[~rows["metric"].str.contains("_low|_high")])
    assert text.startswith("One encoder for both tasks (")
    assert re.search(r"is \+[\d.]+ points from linear probing \([\d.]+ %\), without an interval\. Adding", text)
    assert re.search(r"vectors moved linear probing by \+[\d.]+ points with kept heads, without an interval\.$", text)


def test_the_verdict_calls_a_loss_a_loss() -> None:
    rows = fixture.results(heads=("kept",))
    gains = rows["metric"].str.startswith("gain_over_probing")
    rows.loc[gains, "value"] -= 0.05
    text = tables.headline(rows)
    assert "is worse than linear probing (75.6 %): -3.8 points, 95 % interval -4.5 to -3.1." in text


def test_the_verdict_says_when_probing_is_kept() -> None:
    rows = fixture.results(methods={"task_arithmetic": -0.1}, heads=("kept",), width=0.0)
    assert tables.headline(rows) == (
        "Linear probing, one encoder for all eight tasks, reaches 75.6 %, 89.9 % of eight separate fine-tuned encoders "
        "(83.8 %): no merge was better on validation. Adding the eight task vectors did not beat linear probing with "
        "kept heads (validation chose lambda 0, which is probing itself)."
    )


def test_the_verdict_names_backbones_regimes_and_seeds() -> None:
    names = {"task_arithmetic": 0.1, "iso_c": 0.3, "ties": 0.2}
    rows = fixture.results(backbones=("a", "b"), regimes=("aligned", "full"), seeds=(0, 1), methods=names)
    lines = tables.headline(rows).splitlines()
    assert len(lines) == 4
    assert lines[1].startswith("On a in the full regime over 2 seeds, one encoder for all eight tasks (iso_c with re-")
    assert "Adding the eight task vectors gained" in lines[1]
    alone = tables.headline(fixture.results(methods={"iso_c": 0.3}, tasks=("only",)))
    assert alone.startswith("One encoder for the one task (iso_c with re-probed heads, lambda 0.30) reaches")
    assert "of a fine-tuned encoder" in alone
    assert "Merging the one task vector with iso_c gained" in alone


def test_a_confirmed_merge_is_named_where_what_validation_chose_is_not() -> None:
    """One answer: the leaderboard must not pick what the verdict does not know."""
    rows = fixture.results(methods={"task_arithmetic": 0.02, "iso_c": 0.3, "ties": 0.2}, heads=("kept",))
    lost = (rows["method"] == "iso_c") & rows["metric"].str.startswith("gain_over_probing")
    rows.loc[lost, "value"] -= 0.03
    text = tables.headline(rows)
    assert "iso_c with kept heads, lambda 0.10) reaches" in text
    assert "and is no better than linear probing" in text
    assert "; of the others, ties gained 1.6 points over linear probing with kept heads" in text


@pytest.mark.parametrize(
    ("count", "said"), [(8, "on all tasks ("), (5, "on 5 of 8 tasks ("), (2, "failed on cars, dtd:")]
)
def test_the_verdict_says_that_fine_tuning_itself_failed(count: int, said: str) -> None:
    rows = fixture.results()
    low = rows["method"].eq("fine_tuned") & rows["task"].isin(fixture.EIGHT[:count]) & rows["metric"].eq("accuracy")
    rows.loc[low, "value"] -= 0.4
    text = tables.headline(rows)
    assert "; fine-tuning itself failed" in text
    assert said in text
    assert "fine-tuning" not in tables.headline(fixture.results())


def test_the_verdict_says_that_nothing_was_learned_that_rates_diverged_and_that_a_grid_was_too_short() -> None:
    rows = fixture.results(heads=("kept",), scales=(0.0, 0.05, 0.1))
    same = rows["method"].eq("fine_tuned") & rows["task"].eq("dtd") & rows["metric"].eq("accuracy")
    rows.loc[same, "value"] = rows.loc[rows["method"].eq("probing") & rows["task"].eq("dtd"), "value"].to_numpy()[::2]
    tried = rows[rows["method"].eq("fine_tuned") & rows["split"].eq("validation") & rows["task"].eq("cars")].iloc[:1]
    rates = [
        tried.assign(config=f'{{"learning_rate":{rate}}}', value=value) for rate, value in ((0.1, 0.0), (0.01, 0.5))
    ]
    text = tables.headline(pd.concat([rows, *rates]))
    assert text.endswith(
        "Fine-tuning changed no result on dtd: its task vector may be zero; training diverged, or learned nothing, at "
        "learning rate 0.1; its lambda is the largest that was tried: a wider grid (scales) may give more."
    )


def test_where_nothing_can_be_normalised_the_plain_mean_chooses_as_the_search_did() -> None:
    rows = fixture.results()
    bare = rows[~(rows["metric"].eq("normalised_accuracy") & rows["split"].eq("validation"))]
    assert find_view(bare, "lab:supervised", "aligned").selected == (Variant("task_arithmetic"), "reprobed")


def test_a_trial_run_has_a_banner_and_says_nothing_of_gains() -> None:
    text = tables.markdown(fixture.results(), fixture.heatmap(), lock={"smoke": True})
    assert text.splitlines()[2] == verdict.SMOKE
    before = text.split("## What the words mean")[0]
    assert not re.search("gain|normalised|beat", before.replace(verdict.SMOKE, ""), re.IGNORECASE)


def test_many_backbones_and_regimes_are_summed_up_in_a_line_a_regime() -> None:
    rows, _ = fixture.full_run(backbones=("sup-1k", "self-distilled", "clip-small"), seeds=(0,))
    lines = tables.headline(rows).splitlines()
    assert len(lines) == 5
    assert lines[0] == (
        "In the aligned regime, adding the eight task vectors beat linear probing on 2 of 3 backbones with kept heads, "
        "gains from +0.0 (self-distilled) to +2.5 (clip-small) points; clip-small is the best on validation and "
        "reaches 78.0 %, 92.9 % of separate fine-tuned encoders (probing 75.6, kept heads)."
    )
    assert lines[2].startswith(
        "In the open regime, adding the eight task vectors did not beat linear probing with kept heads (-"
    )
    assert lines[4] == (
        "Of the other methods, addition, λ per task was the best on validation most often, in 8 of 8 pairs of a "
        "backbone and a regime."
    )
    bare = rows[~rows["metric"].str.startswith("gain")]
    assert tables.headline(bare).startswith("In the aligned regime, merging was not compared with linear probing.")
    low = rows["method"].eq("fine_tuned") & rows["backbone"].eq("sup-1k") & rows["metric"].eq("accuracy")
    rows.loc[low, "value"] -= 0.4
    assert tables.headline(rows).splitlines()[5] == (
        "Fine-tuning ends below its own probe on some tasks: sup-1k (aligned), sup-1k (full)."
    )


def test_the_best_backbone_is_chosen_on_validation() -> None:
    rows, _ = fixture.full_run(backbones=("sup-1k", "self-distilled", "clip-small"), seeds=(0,))
    high = rows["backbone"].eq("sup-1k") & rows["regime"].eq("aligned") & rows["split"].eq("test")
    rows.loc[high & rows["metric"].eq("accuracy"), "value"] += 0.2  # the best on the test split only
    assert "clip-small is the best on validation" in tables.headline(rows).splitlines()[0]


def test_nothing_added_is_probing_only_where_the_heads_are_probes() -> None:
    rows, _ = fixture.full_run(backbones=("self-distilled",), seeds=(0,))
    aligned, full = tables.headline(rows).splitlines()
    assert "validation chose lambda 0, which is probing itself" in aligned
    assert "(-36.3 points, -37.0 to -35.6, lambda 0.00)" in full


def test_joint_and_zero_shot_are_baselines_and_not_merges() -> None:
    rows, heat = fixture.full_run(backbones=("clip-small",), seeds=(0,))
    frame = tables.summary(rows, heat)
    assert list(frame["Method"].unique()) == ["addition", "addition, λ per task"]
    assert list(frame["Joint"]) == ["82.8", "82.8", *["–"] * 6]
    assert list(frame["Zero-shot"]) == [*["–"] * 4, *["48.8"] * 4]
    assert "*Zero-shot*" in tables.markdown(rows, heat)


def test_without_merges_or_gains_the_headline_still_says_what_there_is() -> None:
    rows = fixture.results()
    assert "nothing was merged" in tables.headline(rows[rows["method"].isin(["probing", "fine_tuned"])])
    plain = rows[~rows["metric"].str.startswith("gain")]
    assert "was not compared with linear probing" in tables.headline(plain)
    assert "gain" not in " ".join(tables.summary(plain).columns)


def test_mean_row_is_the_mean_of_the_rows_above() -> None:
    frame = tables.per_task(fixture.results(), "lab:supervised", "aligned")
    assert list(frame["Task"]) == [*fixture.EIGHT, "Mean"]
    for column in [
        c for c in frame.columns if c in ("Probing", "Fine-tuned") or c.endswith(("absolute", "normalised"))
    ]:
        values = frame[column].astype(float)
        assert values.iloc[-1] == pytest.approx(values.iloc[:-1].mean(), abs=0.051 + 0.05)


def test_numbers_in_the_markdown_are_those_in_the_rows() -> None:
    rows = fixture.results()
    text = tables.markdown(rows, fixture.heatmap())
    lines = {cells[1].strip(" *"): cells for cells in (line.split("|") for line in text.splitlines()) if len(cells) > 9}
    for task in fixture.EIGHT:
        numbers = [cell.strip() for cell in lines[task][2:]]
        assert numbers[0] == f"{100 * _value(rows, 'probing', 'kept', 'accuracy', task):.1f}"
        assert numbers[1] == f"{100 * _value(rows, 'fine_tuned', 'kept', 'accuracy', task):.1f}"
        assert numbers[2] == f"{100 * _value(rows, 'task_arithmetic', 'kept', 'accuracy', task):.1f}"
        assert numbers[3].startswith(
            f"{100 * _value(rows, 'task_arithmetic', 'kept', 'gain_over_probing', task):+.1f} ("
        )
        assert numbers[4] == f"{100 * _value(rows, 'task_arithmetic', 'kept', 'normalised_accuracy', task):.1f}"
        assert numbers[5] == "0.10"
        assert numbers[6] == f"{100 * _value(rows, 'task_arithmetic', 'reprobed', 'accuracy', task):.1f}"
        assert numbers[9] == "0.30"
    assert text.index("One encoder for all eight") < text.index("## Summary") < text.index("## What the words mean")


def test_all_rows_of_a_table_have_the_same_number_of_cells() -> None:
    odd = ("a|b", "line\nbreak", "x" * 90, "<script>", "*bold*", "_it_", "a\\|b")
    text = tables.markdown(fixture.results(tasks=odd))
    blocks = re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)
    assert len(blocks) == 3
    for block in blocks:
        counts = {len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) for line in block.splitlines()}
        assert len(counts) == 1
    assert "\\<script\\>" in text
    assert "\\*bold\\*" in text
    assert "\\_it\\_" in text
    assert "line break" in text


def test_an_underscore_inside_a_word_is_left_alone() -> None:
    assert escape_markdown("vit_small_patch14") == "vit_small_patch14"


def test_several_seeds_are_mean_and_standard_deviation() -> None:
    rows = fixture.results(seeds=(0, 1, 2))
    per_seed = rows[(rows["method"] == "probing") & (rows["split"] == "test") & (rows["task"] == "")]
    values = 100 * per_seed.loc[per_seed["metric"] == "accuracy", "value"]
    assert tables.summary(rows).loc[0, "Probing"] == f"{values.mean():.1f} ± {values.std():.1f}"
    assert "over seeds" in tables.markdown(rows)
    assert "over seeds" not in tables.markdown(fixture.results())


def test_seeds_that_chose_different_scales_show_the_range() -> None:
    rows = fixture.results(seeds=(0, 1), heads=("kept",))
    second = (rows["seed"] == 1) & (rows["split"] == "test") & (rows["method"] == "task_arithmetic")
    rows.loc[second, "scale"] = 0.15
    assert tables.summary(rows).loc[0, "Kept heads: λ"] == "0.10 to 0.15"
    assert "lambda 0.10 to 0.15" in tables.headline(rows)


def test_summary_has_a_row_for_each_backbone_regime_and_method() -> None:
    rows = fixture.results(
        backbones=("a", "b"), regimes=("aligned", "full"), methods={"iso_c": 0.2, "task_arithmetic": 0.1}
    )
    frame = tables.summary(rows, fixture.heatmap(backbones=("a",)))
    assert len(frame) == 8
    assert list(frame["Method"][:2]) == ["addition", "iso_c"]
    assert list(frame["ξ in the box"][:3]) == ["6.4", "6.4", MISSING]


def test_errors_from_some_images_say_how_sure_they_are() -> None:
    rows, errors = fixture.results(), fixture.heatmap()
    assert "half-width" not in tables.markdown(rows, errors)
    errors = errors.assign(half_width=0.0, images=128)
    assert "half-width" not in tables.markdown(rows, errors)
    errors.loc[3, "half_width"] = 0.0142
    assert "95 % half-width of the mean over pairs: at most 1.4 points." in tables.markdown(rows, errors)


def test_sets_from_some_images_say_how_sure_their_means_are() -> None:
    rows = fixture.results()
    assert tables.sets_notes(rows) == []
    widths = {
        "accuracy_half_width": [0.011, 0.0149],
        "disentanglement_error_half_width": [0.014],
        "accuracy_images": [256],
    }
    more = [rows.iloc[0].to_dict() | {"metric": metric, "value": v} for metric, vs in widths.items() for v in vs]
    (note,) = tables.sets_notes(pd.concat([rows, pd.DataFrame(more)], ignore_index=True))
    assert note.endswith("at most 1.5 points of accuracy and 1.4 points of the disentanglement error.")


def test_columns_that_nothing_fills_are_left_out() -> None:
    frame = tables.summary(fixture.results(heads=("kept",)))
    assert not any("Re-probed" in column or "ξ" in column or "Joint" in column for column in frame.columns)


@pytest.mark.parametrize("points", [7, 11, 13, 21])
def test_the_error_in_the_box_does_not_depend_on_the_grid(points: int) -> None:
    axis = np.linspace(-3, 3, points)
    first, second = (grid.ravel() for grid in np.meshgrid(axis, axis, indexing="ij"))
    rows = pd.DataFrame({"scale_1": first, "scale_2": second, "seed": 0, "backbone": "b", "regime": "aligned"})
    rows = rows.assign(error_1=0.3 + 0.1 * first, error_2=0.2 + 0.05 * second + 0.02 * first * second)
    assert box_error(rows, "b", "aligned").mean == pytest.approx(0.5)
    rows = rows.assign(error_1=first**2, error_2=0.0)  # 1/3, and what straight lines between points add
    step = 6 / (points - 1)
    assert 1 / 3 <= box_error(rows, "b", "aligned").mean <= 1 / 3 + step**2 / 4


def test_subsets_of_tasks_stay_out_of_the_tables() -> None:
    rows, pair = fixture.results(), fixture.results(tasks=fixture.EIGHT[:2])
    assert tables.summary(pd.concat([pair, rows])).equals(tables.summary(rows))


def test_sets_of_tasks_are_rows_by_size_with_the_whole_set_from_the_main_merge() -> None:
    rows, _ = fixture.full_run(backbones=("sup-1k",))
    sets = task_sets(rows, "sup-1k", "full")
    assert list(sets.groupby("size").size()) == [6, 6, 6, 6, 6, 6, 1]
    assert float(sets["normalised_accuracy"].iloc[-1]) == pytest.approx(
        find_view(rows, "sup-1k", "full").cell("task_arithmetic", metric="normalised_accuracy").mean
    )
    assert float(sets["disentanglement_error"].iloc[0]) == pytest.approx(0.1)
    assert task_sets(rows, "sup-1k", "open").empty
    assert task_sets(rows[rows["seed"] == 1], "sup-1k", "aligned").empty


def test_a_number_that_is_nan_in_one_seed_counts_the_others() -> None:
    rows = fixture.results(seeds=(0, 1, 2))
    probing = (rows["method"] == "probing") & (rows["split"] == "test") & (rows["task"] == "")
    rows.loc[probing & (rows["seed"] == 0), "value"] = float("nan")
    known = rows.loc[probing & (rows["seed"] > 0) & (rows["metric"] == "accuracy"), "value"]
    cell = find_view(rows, "lab:supervised", "aligned").cell("probing")
    assert (cell.mean, cell.sd) == (pytest.approx(known.mean()), pytest.approx(known.std()))
    rows.loc[probing, "value"] = float("nan")
    assert tables.summary(rows).get("Probing") is None


def test_rows_read_back_from_a_file_give_the_same_tables(tmp_path: Path) -> None:
    folder = fixture.run_folder(tmp_path, fixture.results(), None)
    read = pd.read_csv(folder / "results.csv", keep_default_na=False)
    assert tables.markdown(read) == tables.markdown(fixture.results())


# ---------------------------------------------------------------- tasks of several kinds


def test_metrics_are_those_of_the_kinds_of_task() -> None:
    assert set(METRICS) == {kind.metric for kind in TASK_TYPES.values()}


def test_each_task_of_another_kind_is_told_in_its_own_metric() -> None:
    frame = tables.per_task(fixture.mixed(), "lab:random", "aligned")
    kept = [f"Kept heads: {name}" for name in ("absolute", "gain (95 % interval)", "normalised", "λ")]
    assert list(frame.columns) == ["Task", "Metric", "Probing", "Fine-tuned", "Normalised: probing", *kept]
    assert frame.to_numpy().tolist() == [
        ["greek", "accuracy", "50.0", "80.0", "62.5", "60.0", "+10.0 (8.0 to 12.0)", "75.0", "0.20"],
        ["ink", "patch accuracy", "60.0", "75.0", "80.0", "60.0", "+0.0 (-2.0 to 2.0)", "80.0", "0.20"],
        ["angle", "within 15°", "40.0", "50.0", "80.0", "45.0", "+5.0 (3.0 to 7.0)", "90.0", "0.20"],
        ["street", "accuracy", "70.0", "100.0", "70.0", "83.0", "+13.0 (11.0 to 15.0)", "83.0", "0.20"],
        ["Mean", "–", "–", "–", "73.1", "–", "+8.9 (7.9 to 9.9)", "82.0", "0.20"],
    ]


def test_one_lambda_a_task_is_told_task_by_task() -> None:
    rows, _ = fixture.full_run(backbones=("sup-1k",), seeds=(0,))
    frame = tables.per_task(rows, "sup-1k", "aligned", PER_TASK)
    told = frame.set_index("Task")["Kept heads: λ"]
    assert list(told[:-1]) == ["0.00", "0.05", "0.10", "0.15", "0.20", "0.00", "0.05", "0.10"]
    assert told["Mean"] == tables.per_task(rows, "sup-1k", "aligned").set_index("Task")["Kept heads: λ"]["Mean"]


def test_the_summary_of_a_mixed_cell_holds_only_what_has_a_mean() -> None:
    frame = tables.summary(fixture.mixed())
    kept = ["Kept heads: gain (95 % interval)", "Kept heads: normalised", "Kept heads: λ"]
    assert list(frame.columns) == ["Backbone", "Regime", "Method", "Normalised: probing", *kept]
    assert list(frame.iloc[0])[3:] == ["73.1", "+8.9 (7.9 to 9.9)", "82.0", "0.20"]


def test_the_words_fit_tasks_of_several_kinds() -> None:
    text = tables.markdown(fixture.mixed())
    said = "Test split in %; tasks differ in their metric, so only normalised values have a mean, of gains too."
    assert text.count(said) == 2
    assert "*within 15°* the share of test images whose predicted angle is off by 15 degrees or less" in text
    assert "chosen by the mean normalised metric" in text
    assert "accuracy points" not in text
    assert "test accuracy" not in text.lower()
    assert "| **Mean** | **–** " in text
    assert tables.headline(fixture.mixed()) == (
        "One encoder for all four tasks (addition with kept heads, lambda 0.20) reaches 82.0 % of fine-tuned, and "
        "beats linear probing (73.1 % of fine-tuned) by 8.9 normalised points, 95 % interval 7.9 to 9.9."
    )


def test_headlines_compare_mixed_cells_by_normalised_metrics() -> None:
    rows = fixture.mixed(backbones=[f"b{i}" for i in range(5)])
    said = "b0 is the best on validation and reaches 82.0 % of fine-tuned (probing 73.1, kept heads)."
    assert tables.headline(rows).endswith(said)
    bare = fixture.mixed()
    bare = bare[bare["method"].isin(["probing", "fine_tuned"])]
    assert tables.headline(bare) == (
        "Linear probing, one encoder for all four tasks, reaches 73.1 % of fine-tuned: nothing was merged."
    )


def test_tasks_of_one_other_kind_have_a_mean() -> None:
    rows = fixture.mixed(tasks=("ink",))
    frame = tables.per_task(rows, "lab:random", "aligned")
    assert list(frame["Metric"]) == ["patch accuracy", "–"]
    assert list(frame["Kept heads: absolute"]) == ["60.0", "60.0"]
    assert "Test patch accuracy in %, mean over 1 task." in tables.markdown(rows)


def test_the_line_search_of_a_mixed_cell_is_by_the_metric_that_chose() -> None:
    one = find_view(fixture.mixed(), "lab:random", "aligned")
    found = line_search(one, "task_arithmetic", "kept")
    ratios = [0.05 / tuned for tuned in (0.8, 0.75, 0.5, 1.0)]
    lower = 82 - 100 * sum(ratios) / 4
    assert list(found["mean"]) == pytest.approx([lower, 82, lower])
    assert list(found["chosen"]) == [False, True, False]
    assert {method.name: value for method, value in one.validation.items()} == {
        "probing": pytest.approx(0.73125),
        "fine_tuned": 1,
        "task_arithmetic": pytest.approx(0.82),
    }


def test_sets_of_mixed_tasks_are_normalised_each_by_its_own_metric() -> None:
    sets = task_sets(fixture.mixed(), "lab:random", "aligned").set_index("tasks")
    assert dict(sets["normalised_accuracy"]) == pytest.approx(
        {"greek+street": 0.85, "greek+ink": 0.9, "ink+angle": 0.95, "greek+ink+angle+street": 0.82}
    )
    assert sets["accuracy"].isna().all()


def test_mistakes_are_told() -> None:
    rows = fixture.results()
    with pytest.raises(TaskvecError, match="columns scale, value"):
        tables.headline(rows.drop(columns=["scale", "value"]))
    with pytest.raises(TaskvecError, match="without a row"):
        tables.summary(rows.iloc[:0])
    with pytest.raises(TaskvecError, match="lab:supervised"):
        tables.per_task(rows, "lab:supervise", "aligned")
    with pytest.raises(TaskvecError, match="task_arithmetic"):
        tables.per_task(rows, "lab:supervised", "aligned", "task_arithmatic")


def test_a_backbone_from_a_file_is_named_without_its_folder() -> None:
    assert short_backbone("timm:vit_s@/data/models/dino.safetensors") == "timm:vit_s@dino.safetensors"
    assert short_backbone("hf:facebook/dino-vitb16") == "hf:facebook/dino-vitb16"


def test_the_notes_of_a_study_stand_above_its_tables() -> None:
    text = tables.markdown(fixture.results(), notes=("one_ had *less* time",))
    assert text.index("## Before you compare") < text.index(r"one\_ had \*less\* time") < text.index("## Summary")
    assert "## Before you compare" not in tables.markdown(fixture.results())


# ---------------------------------------------------------------- on a terminal


@pytest.mark.parametrize("width", [40, 60, 80, 100, 120, 200])
def test_a_table_fits_the_terminal_breaks_no_word_and_shows_the_gain(width: int) -> None:
    frame = tables.per_task(fixture.results(), "lab:supervised", "aligned")
    text = text_table(frame, width)
    assert max(map(cell_len, text.splitlines())) <= width
    assert text.count("gain") == 2
    assert ("normalised" in text) == (width >= 100)
    assert ("(95 % interval)" in text) == (width >= 200)
    for task in fixture.EIGHT:
        assert task in text
    assert "+5.3" in text


def test_long_and_wide_names_lose_their_middle() -> None:
    names = ["a" * 90, "漢" * 50, "short"]
    frame = tables.per_task(fixture.results(tasks=names), "lab:supervised", "aligned")
    text = text_table(frame, 80)
    assert max(map(cell_len, text.splitlines())) <= 80
    assert "…" in text
    assert shorten("abcdefghij", 5) == "abc…j"
    assert shorten("abc", 5) == "abc"


def test_tables_of_other_shapes_are_split_and_keep_every_column() -> None:
    frame = pd.DataFrame({"Layer": ["blocks.0", "head"], **{f"checkpoint-{i}": ["1.234%", "5%"] for i in range(9)}})
    text = text_table(frame, 60)
    assert max(map(len, text.splitlines())) <= 60
    assert all(f"checkpoint-{i}" in text for i in range(9))
    assert text.count("blocks.0") > 1


def test_control_characters_in_names_are_escapes_in_every_table() -> None:
    rows = fixture.results(tasks=("red\x1b[31m", "bell\x07"), backbones=("b\x1b[0m",))
    for text in (tables.markdown(rows), tables.headline(rows), text_table(tables.summary(rows), 80)):
        assert "\x1b" not in text and "\x07" not in text
    assert r"red\\x1b\[31m" in tables.markdown(rows)


def test_names_that_begin_with_a_bracket_or_a_star_do_not_belong_to_the_line_break_before() -> None:
    assert escape_latex("[a] *b") == "{[}a{]} {*}b"

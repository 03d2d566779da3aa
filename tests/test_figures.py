"""The figures draw what the rows say, name their axes, hold odd names, and come out the same each time."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers import report_rows as fixture
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from taskvec.core.errors import TaskvecError
from taskvec.report.figures import counts, curves, dots, emergence, heatmaps, registry, style
from taskvec.report.figures import drawing as figures
from taskvec.report.figures.style import line_styles

PLACE = ("lab:supervised", "aligned")


def _line(ax: Axes, label: str) -> tuple[np.ndarray, np.ndarray]:
    line = next(line for line in ax.get_lines() if str(line.get_label()).startswith(label))
    return np.asarray(line.get_xdata(), float), np.asarray(line.get_ydata(), float)


def _rings(ax: Axes) -> list[float]:
    return [float(x) for line in ax.get_lines() if line.get_gid() == "chosen" for x in line.get_xdata()]


def _panels(figure: Figure) -> list[Axes]:
    return [ax for ax in figure.axes if ax.get_title(loc="left")]


def test_lambda_curve_draws_validation_and_marks_the_choice() -> None:
    rows = fixture.results()
    whole, close = curves.lambda_curve(rows, *PLACE).axes
    wanted = rows[(rows["split"] == "validation") & (rows["metric"] == "normalised_accuracy") & (rows["task"] == "")]
    kept = wanted[(wanted["method"] == "task_arithmetic") & (wanted["heads"] == "kept")]
    x, y = _line(whole, "kept heads")
    assert x == pytest.approx(kept["scale"].to_numpy(float))
    assert y == pytest.approx(100 * kept["value"].to_numpy(float))
    assert _rings(whole) == [0.1, 0.3]
    level = 100 * float(wanted.loc[wanted["method"] == "probing", "value"].iloc[0])
    assert _line(whole, "probing")[1] == pytest.approx([level, level])
    assert close.get_ylim()[0] < level < close.get_ylim()[1]
    assert whole.get_xlabel() == "scaling coefficient λ"
    assert "(%)" in whole.get_ylabel()


def test_lambda_curve_of_several_configurations_draws_the_chosen_one() -> None:
    rows = fixture.results(heads=("kept",))
    other = rows[(rows["method"] == "task_arithmetic") & (rows["split"] == "validation")]
    other = other.assign(config='{"keep":0.1}', value=0.01)
    both = curves.lambda_curve(pd.concat([other, rows]), *PLACE).axes[0]
    assert _line(both, "kept")[1] == pytest.approx(_line(curves.lambda_curve(rows, *PLACE).axes[0], "kept")[1])


def test_seeds_make_a_band_and_methods_and_backbones_a_line_each() -> None:
    rows = fixture.results(backbones=("a", "b", "c"), seeds=(0, 1), methods={"task_arithmetic": 0.1, "iso_c": 0.3})
    kept, reprobed = curves.lambda_methods(rows, "a", "aligned").axes
    assert (kept.get_title(loc="left"), reprobed.get_title(loc="left")) == ("kept heads", "re-probed heads")
    assert len(kept.collections) == 2
    assert _line(kept, "iso_c")[1].max() > _line(kept, "addition")[1].max()
    backbones = curves.lambda_curves(rows, "aligned").axes[0]
    assert [_line(backbones, name)[0].size for name in ("a", "b", "c")] == [21, 21, 21]
    colours = {line.get_color() for line in backbones.get_lines() if line.get_label() in ("a", "b", "c")}
    assert len(colours) == 3


def test_accuracies_has_a_row_for_each_task_and_the_mean_with_units() -> None:
    rows = fixture.results()
    left, right = dots.accuracies(rows, *PLACE).axes
    assert [label.get_text() for label in left.get_yticklabels()] == [*fixture.EIGHT, "mean"]
    assert left.get_xlabel() == "test accuracy (%)"
    assert right.get_xlabel() == "gain over probing\n(points, 95 % interval)"
    labels = left.get_legend_handles_labels()[1]
    names = ["probing", "addition, kept heads (λ = 0.10)", "addition, re-probed heads (λ = 0.30)", "fine-tuned"]
    assert labels == names
    drawn = left.containers[0].lines[0].get_xdata()
    wanted = (rows["method"] == "probing") & (rows["split"] == "test") & (rows["metric"] == "accuracy")
    assert list(drawn) == pytest.approx(list(100 * rows.loc[wanted, "value"]))


def test_method_gains_has_a_row_for_each_method() -> None:
    rows = fixture.results(methods={"ties": 0.1, "task_arithmetic": 0.2})
    axes = dots.method_gains(rows, *PLACE).axes
    assert [label.get_text() for label in axes[0].get_yticklabels()] == ["addition", "ties"]


def test_heatmap_has_a_red_box_equal_axes_and_a_star_at_zero() -> None:
    figure = heatmaps.heatmaps(fixture.heatmap(), *PLACE)
    panels = _panels(figure)
    assert [ax.get_title(loc="left") for ax in panels] == ["mean of the pairs", "cars + dtd", "mnist + svhn"]
    for ax in panels:
        box = [patch for patch in ax.patches if isinstance(patch, Rectangle)][-1]
        assert (box.get_xy(), box.get_width(), box.get_height()) == ((-1, -1), 2, 2)
        red, green, blue, _ = box.get_edgecolor()
        assert red > 0.8 > 0.1 > max(green, blue)
        assert ax.get_aspect() == 1
        assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in ax.get_lines()] == [(0, 0)]
        assert ax.get_xlim() == pytest.approx((-3.3, 3.3))
    assert (panels[1].get_xlabel(), panels[1].get_ylabel()) == ("λ of cars", "λ of dtd")
    assert figure.axes[-1].get_ylabel() == "weight disentanglement error ξ (%)"


def test_heatmaps_from_some_images_say_how_sure_they_are() -> None:
    rows = fixture.heatmap(points=3)
    assert not heatmaps.heatmaps(rows, *PLACE).get_supxlabel()
    sampled = rows.assign(half_width=0.0142, images=64)
    for figure in (heatmaps.heatmaps(sampled, *PLACE), heatmaps.by_backbone(sampled, PLACE[:1], PLACE[1], "one")):
        assert figure.get_supxlabel() == "95 % half-width of the mean over pairs: at most 1.4 points"


def test_heatmap_puts_the_first_scale_on_x_and_is_light_where_disentangled() -> None:
    rows = fixture.heatmap(pairs=[("cars", "dtd")])
    rows[["error_1", "error_2"]] = 0.0
    rows.loc[(rows["scale_1"] == 3) & (rows["scale_2"] == 0), "error_2"] = 0.5
    (panel,) = _panels(heatmaps.heatmaps(rows, *PLACE))
    values = np.ma.getdata(panel.collections[0].get_array()).reshape(11, 11)
    assert values[5, 10] == pytest.approx(50)
    assert values.sum() == pytest.approx(50)
    light, dark = (sum(heatmaps.MAP(level)[:3]) for level in (0.0, 1.0))
    assert light > 2 > 1 > dark


def test_more_pairs_than_fit_are_counted_in_the_title() -> None:
    pairs = [(f"t{i}", f"t{j}") for i in range(9) for j in range(i)]
    figure = heatmaps.heatmaps(fixture.heatmap(pairs=pairs, points=3), *PLACE)
    assert len(_panels(figure)) == heatmaps.MOST_PANELS + 1
    assert "28 of 36 pairs shown" in figure.get_suptitle()


def test_written_twice_the_files_are_the_same_and_hold_no_date(tmp_path: Path) -> None:
    rows, errors = fixture.results(tasks=("one", "two"), scales=(0.0, 0.1, 0.3)), fixture.heatmap(points=3)
    names = figures.write(rows, errors, tmp_path)
    stems = [f"{kind}--lab-supervised--aligned" for kind in ("accuracies", "lambda", "heatmap")]
    assert names == [f"{stem}.{ending}" for stem in stems for ending in ("png", "pdf")]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    first = {name: (tmp_path / name).read_bytes() for name in names}
    for name, data in first.items():
        assert b"CreationDate" not in data
        assert data.startswith(b"%PDF" if name.endswith("pdf") else b"\x89PNG")
    assert figures._encode(dots.accuracies(rows, *PLACE), "png") == first[f"{stems[0]}.png"]
    again = heatmaps.heatmaps(errors, *PLACE)
    assert figures._encode(again, "png") == first[f"{stems[2]}.png"]
    again.set_layout_engine("none")
    assert figures._encode(again, "pdf") == first[f"{stems[2]}.pdf"]


def test_several_processes_draw_the_same_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, errors = fixture.results(tasks=("one", "two"), scales=(0.0, 0.1)), fixture.heatmap(points=3)
    alone = figures.write(rows, errors, tmp_path / "alone")
    monkeypatch.setattr(figures, "SHARE", 1)
    monkeypatch.setattr(figures, "cores", lambda: 2)
    assert figures.write(rows, errors, tmp_path / "shared") == alone
    for name in alone:
        assert (tmp_path / "shared" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
    (tmp_path / "shared" / alone[2]).unlink()
    (tmp_path / "shared" / alone[2]).mkdir()  # the other process cannot write there
    with pytest.raises(RuntimeError, match="drew figures has failed"):
        figures.write(rows, errors, tmp_path / "shared")


def test_odd_and_many_names_are_drawn_without_a_warning() -> None:
    odd = ["a|b <i>&$x$_^{", "日本\n語", "x" * 80, "100 %", "\\frac"] + [f"task {i}" for i in range(7)]
    rows = fixture.results(tasks=odd, backbones=("b$@/x/" + "y" * 90, "日本"), scales=(0.0, 0.1), heads=("kept",))
    errors = fixture.heatmap(backbones=("日本",), pairs=[(odd[0], odd[1])], points=3)
    for planned in figures.plan(rows, errors):
        planned.draw().draw_without_rendering()
        assert planned.stem.isascii()
        assert len(planned.stem) < 120


def test_file_names_of_different_backbones_differ() -> None:
    names = ("lab:a", "lab/a", "lab:a@/x/f.pt", "lab:a@/y/f.pt", "日", "本", "x" * 99, "x" * 98)
    stems = [figures._stem("lambda", name, "full") for name in names]
    assert len(set(stems)) == len(stems)
    assert figures._stem("lambda", "lab:x", "open-full") != figures._stem("lambda", "lab:x-open", "full")


def test_one_task_one_scale_and_no_probing_still_give_figures() -> None:
    rows = fixture.results(tasks=("only",), scales=(0.3,))
    rows = rows[(rows["method"] != "probing") & ~rows["metric"].str.startswith("gain")]
    for planned in figures.plan(rows, None):
        planned.draw().draw_without_rendering()


def test_without_normalised_accuracy_the_curve_says_why() -> None:
    rows = fixture.results(methods={"task_arithmetic": 0.1, "iso_c": 0.2}, backbones=("a", "b"), scales=(0.0, 0.1))
    rows = rows[rows["metric"] != "normalised_accuracy"]
    found = [curves.lambda_curve(rows, "a", "aligned"), curves.lambda_methods(rows, "a", "aligned")]
    for figure in [*found, curves.lambda_curves(rows, "aligned")]:
        assert "a fine-tuned accuracy is zero" in figure.axes[0].texts[0].get_text()
    found[0].draw_without_rendering()


# ---------------------------------------------------------------- many backbones


@pytest.fixture(scope="module")
def whole() -> tuple[pd.DataFrame, pd.DataFrame]:
    return fixture.full_run(seeds=(0,))


def _kinds(planned: list[figures.Planned], regime: str) -> list[str]:
    return [one.kind for one in planned if one.regime == regime and not one.backbone]


def test_every_figure_of_the_paper_is_planned_once(whole: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    planned = figures.plan(*whole, fixture.ROLES)
    both = ["backbones", "heatmaps-algorithm", "heatmaps-data", "heatmaps-scale", "combinations", "counts-all"]
    both += ["counts-data", "counts-scale", "errors", "scales"]
    assert _kinds(planned, "aligned") == _kinds(planned, "full") == both
    assert _kinds(planned, "open") == ["backbones", "scales"]
    assert len({one.stem for one in planned}) == len(planned)
    own = [one.kind for one in planned if (one.backbone, one.regime) == ("clip-large", "open")]
    assert own == ["accuracies", "gains", "lambda"]


def test_without_roles_all_backbones_are_compared(whole: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    plain = ["backbones", "heatmaps-all", "combinations", "counts-all", "errors", "scales"]
    assert _kinds(figures.plan(*whole), "aligned") == plain
    one = figures.plan(*fixture.full_run(backbones=("masked",), seeds=(0,)))
    assert _kinds(one, "aligned") == ["combinations", "errors", "scales"]


def test_backbones_are_grouped_as_in_the_paper(whole: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    found = {group.name: group.backbones for group in registry.groups(whole[0], fixture.ROLES)}
    assert found["algorithm"] == ["sup-1k", "masked", "self-distilled", "clip-large", "random-init"]
    assert found["data"] == ["sup-1k", "sup-21k", "clip-small", "clip-large"]
    assert found["scale"] == ["sup-21k", "sup-21k-L"]
    with pytest.raises(TaskvecError, match="vit-b16-mae"):
        registry.groups(whole[0], {"masked": "vit-b16-mea"})


def test_heatmaps_of_backbones_are_means_over_pairs_on_one_scale(whole: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    heat = whole[1]
    figure = heatmaps.by_backbone(heat, ["masked", "clip-large"], "full", "two of them")
    first, second = _panels(figure)
    assert (first.get_title(loc="left"), second.get_title(loc="left")) == ("masked", "clip-large")
    assert figure.get_suptitle() == "full, two of them (mean of 3 pairs of tasks)"
    own = heat[(heat["backbone"] == "masked") & (heat["regime"] == "full")]
    corner = own[(own["scale_1"] == 3) & (own["scale_2"] == -3)]
    values = np.ma.getdata(first.collections[0].get_array()).reshape(11, 11)
    assert values[0, 10] == pytest.approx(100 * (corner["error_1"] + corner["error_2"]).mean())
    assert first.collections[0].get_clim() == second.collections[0].get_clim() == (0, 100)


def test_combinations_draw_every_set_and_the_mean_of_each_size(whole: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    absolute, normalised = counts.combinations(whole[0], "sup-1k", "full").axes
    assert absolute.get_ylabel() == "test accuracy (%)"
    x, y = _line(normalised, "one set")
    assert len(x) == 37
    sizes, means = _line(normalised, "mean")
    assert list(sizes) == [2, 3, 4, 5, 6, 7, 8]
    assert means == pytest.approx([y[x == size].mean() for size in sizes])


def test_counts_have_a_line_for_each_backbone_in_its_own_style(whole: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    figure = counts.by_count(whole[0], ["masked", "clip-large"], "full", "two of them")
    styles = [(line.get_color(), line.get_marker()) for line in figure.axes[0].get_lines()]
    alone = counts.error_by_count(whole[0], ["clip-large"], "aligned", "one").axes[0]
    assert [(line.get_color(), line.get_marker()) for line in alone.get_lines()] == styles[1:]
    assert _line(alone, "clip-large")[1] == pytest.approx([2, 3, 4, 5, 6, 7, 8])
    assert "ξ (%)" in alone.get_ylabel()


def test_no_two_backbones_look_alike_and_snapshots_look_like_their_encoder() -> None:
    names = [f"b{i}" for i in range(9)] + [f"{name}{at}" for name in ("x", "y") for at in ("@0", "@30", "@100", "")]
    styles = line_styles(pd.DataFrame({"backbone": names}))
    looks = {name: (style["color"], style["marker"], str(style["linestyle"])) for name, style in styles.items()}
    assert len(set(looks.values())) == len(names)
    for name in ("x", "y"):
        assert len({looks[f"{name}{at}"][:2] for at in ("@0", "@30", "@100", "")}) == 1
    assert len({(look[0], look[1]) for name, look in looks.items() if "@" not in name}) == 11


def test_the_common_scale_is_that_of_the_seeds_with_one_a_task() -> None:
    rows, _ = fixture.full_run(backbones=("sup-1k",), tasks=fixture.EIGHT[:3], seeds=(0, 1))
    one = (rows["method"] == "task_arithmetic") & (rows["scaling"] == "")
    rows.loc[one & (rows["seed"] == 1) & (rows["split"] == "test"), "scale"] = 0.4
    rows = rows[(rows["scaling"] != "per-task") | (rows["seed"] == 0)]
    assert list(_line(dots.scales(rows, "aligned").axes[0], "common")[0]) == pytest.approx([0.1, 0.1])


def test_scales_draw_a_dot_a_task_and_the_common_one(whole: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    rows = whole[0][whole[0]["backbone"].isin(["sup-1k", "masked", "clip-small"])]
    panels = dots.scales(rows, "aligned").axes
    assert [ax.get_title(loc="left") for ax in panels] == ["sup-1k", "masked", "clip-small"]
    assert [label.get_text() for label in panels[0].get_yticklabels()] == list(fixture.EIGHT)
    places = panels[0].containers[0].lines[0].get_xdata()
    assert list(places) == pytest.approx([0.0, 0.05, 0.1, 0.15, 0.2, 0.0, 0.05, 0.1])
    assert list(_line(panels[0], "common")[0]) == pytest.approx([0.1, 0.1])


def test_a_run_with_holes_is_still_drawn() -> None:
    rows, heat = fixture.full_run(backbones=("sup-1k", "masked", "clip-large"), tasks=fixture.EIGHT[:3], seeds=(0,))
    lacking = (rows["backbone"] == "masked") & (rows["metric"] == "normalised_accuracy")
    rows.loc[lacking & (rows["task"] == ""), "value"] = float("nan")
    heat = heat[(heat["backbone"] != "masked") | (heat["task_1"] == "cars")]
    for planned in figures.plan(rows, heat, fixture.ROLES):
        if planned.regime in ("aligned", "open") and planned.backbone in ("", "masked"):
            planned.draw().draw_without_rendering()


# ---------------------------------------------------------------- tasks of several kinds


def test_dots_of_mixed_tasks_are_in_their_own_metrics_and_have_no_mean() -> None:
    left, right = dots.accuracies(fixture.mixed(), "lab:random", "aligned").axes
    names = [
        "greek (accuracy)",
        "ink (patch accuracy)",
        "angle (within 15°)",
        "street (accuracy)",
        "mean (gain: normalised)",
    ]
    assert [label.get_text() for label in left.get_yticklabels()] == names
    assert left.get_xlabel() == "test split, own metric of each task (%)"
    assert left.get_legend_handles_labels()[1] == ["probing", "addition, kept heads (λ = 0.20)", "fine-tuned"]
    drawn = np.asarray(left.containers[1].lines[0].get_xdata(), float)
    assert drawn[:4] == pytest.approx([60, 60, 45, 83])
    assert np.isnan(drawn[4])
    assert [text.get_text() for text in left.texts] == ["no mean of different metrics"]
    assert list(right.get_lines()[5].get_xdata()) == pytest.approx([10, 0, 5, 13, 8.875])


def test_curves_of_mixed_tasks_are_of_the_normalised_metric() -> None:
    rows = fixture.mixed(backbones=("a", "b"))
    for figure in (curves.lambda_curve(rows, "a", "aligned"), curves.lambda_curves(rows, "aligned")):
        ax = figure.axes[0]
        assert ax.get_ylabel() == "normalised metric on validation (%)"
        assert _rings(ax)[0] == 0.2
        assert figure.axes[0].get_lines()[-2].get_ydata()[1] == pytest.approx(82)
    none = rows[~rows["metric"].str.startswith("normalised")]
    text = curves.lambda_curve(none, "a", "aligned").axes[0].texts[0].get_text()
    assert text == "no normalised metric:\na fine-tuned metric is zero"


def test_methods_on_mixed_tasks_are_compared_by_normalised_metrics() -> None:
    rows = fixture.mixed()
    other = rows[rows["method"] == "task_arithmetic"].assign(method="iso_c")
    left = dots.method_gains(pd.concat([rows, other]), "lab:random", "aligned").axes[0]
    assert left.get_xlabel() == "normalised test metric (%), mean over tasks"
    assert list(left.containers[0].lines[0].get_xdata()) == pytest.approx([82, 82])
    assert [line.get_xdata()[0] for line in left.get_lines()[:2]] == pytest.approx([73.125, 100])


def test_sets_of_mixed_tasks_have_one_panel() -> None:
    rows = fixture.mixed(backbones=("a", "b"))
    (alone,) = counts.combinations(rows, "a", "aligned").axes
    assert alone.get_ylabel() == "normalised test metric (%)"
    assert list(_line(alone, "mean")[1]) == pytest.approx([90, 82])
    (both,) = counts.by_count(rows, ["a", "b"], "aligned", "two of them").axes
    assert list(_line(both, "b")[1]) == pytest.approx([90, 82])
    assert _kinds(figures.plan(rows, None), "aligned") == ["backbones", "combinations", "counts-all"]


def test_along_pre_training_mixed_tasks_are_normalised() -> None:
    panels = emergence.emergence(fixture.mixed(backbones=("e@1", "e")), None, "aligned").axes
    assert panels[1].get_title(loc="left") == "addition, fine-tuned = 100 (%)"
    assert panels[3].get_title(loc="left") == "fine-tuned = 100; probing dotted (%)"
    assert [list(line.get_ydata()) for line in panels[3].get_lines()] == [
        pytest.approx([100, 100]),
        pytest.approx([73.125, 73.125]),
    ]


def test_mistakes_are_told() -> None:
    rows = fixture.results()
    with pytest.raises(TaskvecError, match="lab:supervised"):
        dots.accuracies(rows, "lab:supervise", "aligned")
    with pytest.raises(TaskvecError, match="task_arithmetic"):
        curves.lambda_curve(rows, *PLACE, method="task_arithmetics")
    with pytest.raises(TaskvecError, match="aligned"):
        curves.lambda_curves(rows, "alined")
    with pytest.raises(TaskvecError, match="lab:supervised, aligned"):
        heatmaps.heatmaps(fixture.heatmap(), "lab:super", "aligned")
    with pytest.raises(TaskvecError, match="none is known"):
        counts.combinations(rows, *PLACE)
    with pytest.raises(TaskvecError, match="none|aligned"):
        dots.scales(rows, "aligned")


# ---------------------------------------------------------------- legible


def test_lines_of_any_number_of_encoders_differ() -> None:
    for colours in (style.CYCLE, style.WIDE_CYCLE):
        looks = [tuple(map(str, style.line_style(i, colours).values())) for i in range(36)]
        assert len(set(looks)) == len(looks)
        first = [style.line_style(i, colours)["color"] for i in range(len(colours))]
        assert len(set(first)) == len(first)


@pytest.mark.parametrize("names", [8, 12])
def test_no_legend_leaves_the_figure(names: int) -> None:
    rows, _ = fixture.full_run(backbones=("sup-1k", "sup-21k", "clip-large", "sup-21k-L"), seeds=(0,))
    rows = pd.concat([rows.assign(backbone=rows["backbone"] + f"-number-{i}") for i in range(names // 4)])
    for one in figures.plan(rows):
        if one.kind in ("errors", "counts-all", "backbones"):
            figure = one.draw()
            figure.savefig(io.BytesIO(), dpi=50)
            [legend] = figure.legends
            inside, whole = legend.get_window_extent(), figure.bbox
            assert inside.x0 >= whole.x0 - 1 and inside.x1 <= whole.x1 + 1, one.stem


@pytest.mark.parametrize(("methods", "pairs"), [(10, 3), (2, 2), (3, 1)])
def test_nothing_is_cut_off_at_the_edge_of_a_figure(methods: int, pairs: int) -> None:
    boosts = {
        name: 0.05 * place for place, name in enumerate(("task_arithmetic", *(f"way-{i}" for i in range(methods))))
    }
    rows = fixture.results(methods=boosts, seeds=(0, 1))
    heat = fixture.heatmap(pairs=[("cars", "dtd"), ("mnist", "svhn"), ("gtsrb", "sun397")][:pairs])
    for one in figures.plan(rows, heat, None, fixture.costs(rows)):
        figure = one.draw()
        figure.savefig(io.BytesIO(), dpi=50)
        drawn = figure.get_tightbbox()
        width, height = figure.get_size_inches()
        ends = (drawn.x0, drawn.y0, width - drawn.x1, height - drawn.y1)
        assert min(ends) > -0.03, (one.stem, ends)


def test_figures_of_a_trial_run_say_so(tmp_path: Path) -> None:
    drawn: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "save", lambda figure, *_: drawn.append(figure.get_suptitle()))
        figures.write(fixture.results(tasks=("one", "two")), None, tmp_path, smoke=True)
    assert drawn and all(title.startswith("SMOKE RUN: ") for title in drawn)

"""Gains are paired differences to the best baseline of the same budget."""

from __future__ import annotations

import pytest
from helpers import result
from scipy import stats

from oss_exp.evaluation.comparison import Line, Result, columns, html, markdown, with_gains
from oss_exp.evaluation.psnr import Interval


def lines_of(*results: Result) -> dict[str, Line]:
    """Return the lines of a comparison by their strategies."""
    return {line.result.strategy: line for line in with_gains(results)}


EDM = result("edm", {1: 20.0, 2: 22.0, 3: 24.0, 4: 30.0}, baseline=True)
DDIM = result("ddim", {1: 19.0, 2: 30.0, 3: 20.0, 4: 20.0}, baseline=True)
OURS = result("ours", {1: 23.0, 2: 26.0, 3: 26.0, 4: 35.0})


def test_the_gain_is_the_paired_difference_to_the_best_baseline():
    line = lines_of(OURS, DDIM, EDM)["ours"]
    assert line.rival is EDM
    # Differences 3, 4, 2, 5: mean 3.5, standard deviation sqrt(5/3), 3 degrees of freedom.
    half = stats.t.ppf(0.975, 3) * (5 / 3) ** 0.5 / 2
    assert (line.gain.mean, line.gain.n) == (3.5, 4)
    assert (line.gain.low, line.gain.high) == pytest.approx((3.5 - half, 3.5 + half), abs=1e-12)


def test_the_gain_counts_only_the_samples_that_both_have():
    few = result("few", {3: 30.0, 4: 32.0, 99: 90.0})
    gain = lines_of(few, EDM)["few"].gain
    assert (gain.mean, gain.n) == (4.0, 2)


def test_without_a_common_sample_there_is_no_gain():
    assert lines_of(result("far", {7: 30.0, 8: 30.0}), EDM)["far"].gain is None


def test_one_common_sample_gives_a_gain_without_an_interval():
    line = lines_of(result("one", {4: 31.0, 9: 30.0}), EDM)["one"]
    assert line.gain == Interval(1.0, None, None, 1)
    assert columns([line])[1][0][5] == "+1.00"


def test_the_best_baseline_is_marked_and_the_others_are_compared_with_it():
    lines = with_gains([OURS, DDIM, EDM])
    ours, edm, ddim = lines
    assert [line.result.strategy for line in lines] == ["ours", "edm", "ddim"]
    assert ours.gain is not None
    assert edm.gain is None
    assert ddim.gain.mean == pytest.approx(-1.75)
    assert [row[5] for row in columns(lines)[1]] == ["+3.50 ± 2.05", "*", "-1.75 ± 11.93"]


def test_without_a_baseline_there_is_no_gain():
    (line,) = with_gains([OURS])
    assert (line.rival, line.gain) == (None, None)
    assert columns([line])[1][0][5] == ""


@pytest.mark.parametrize("other", [{"nfe": 10}, {"group": "another teacher"}])
def test_a_better_baseline_of_another_budget_or_group_is_no_rival(other):
    better = result("better", {1: 50.0, 2: 50.0, 3: 50.0, 4: 50.0}, baseline=True, **other)
    lines = lines_of(OURS, EDM, better)
    assert lines["ours"].rival is EDM
    assert lines["better"].rival is better


def test_lines_are_by_budget_then_best_first():
    results = [
        result("a", {1: 1}, nfe=9),
        result("b", {1: 2}, nfe=3),
        result("c", {1: 3}, nfe=3),
    ]
    assert [line.result.strategy for line in with_gains(results)] == ["c", "b", "a"]


def test_the_markdown_table_has_a_row_for_every_result():
    text = markdown(with_gains([OURS, DDIM, EDM]))
    header, _, *rows = [line for line in text.splitlines() if line.startswith("|")]
    titles = "strategy | K | NFE | start | PSNR, dB | gain, dB | worst 1 % | spread | n | planning"
    assert header == f"| {titles} |"
    assert rows[0].startswith("| ours | 5 | 5 | pinned | 27.50 ± ")
    assert len(rows) == 3


def test_the_markdown_table_of_several_runs_has_a_column_for_them():
    text = markdown(with_gains([OURS, result("edm", {1: 20.0}, run="7")]))
    assert text.startswith("| run | strategy |")
    assert "| 7 | edm |" in text


def test_the_html_table_escapes_names_of_users():
    text = html(with_gains([OURS, EDM, result("<b>mine</b>", {1: 10.0})]), "a & b")
    assert "<caption>a &amp; b</caption>" in text
    assert "<td>&lt;b&gt;mine&lt;/b&gt;</td>" in text
    assert "<th>edm</th><th>5</th>" in text  # the best baseline's row is the bold one
    assert "<td>ours</td><td>5</td>" in text

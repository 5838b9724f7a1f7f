"""GenEval's rules against the verdicts of the published program (oracles I)."""

import json
import re
from collections import Counter

import numpy as np
import pytest
from helpers import ORACLES, mostly_slow

from oss_exp.geneval.rules import TASKS, Rules, iou, judge, read_metadata, relative_position, scores

KNOWN = json.loads((ORACLES / "geneval_scoring.json").read_text())
CASES = KNOWN["hand_cases"] + KNOWN["random_cases"] + KNOWN["max_overlap_option"]


def plain(reason: str) -> set:
    """Return the parts of a reason as sets, since two relations have no order in the original."""
    return {frozenset(re.split(r" and |, found ", line)) for line in reason.split("\n") if line}


@pytest.mark.parametrize("number", mostly_slow(range(len(CASES)), *range(0, len(CASES), 5)))
def test_verdicts_of_the_original(number):
    case = CASES[number]

    def colour_of(name: str, box) -> str:
        return case["colors"][name][case["raw"][name].index(box)]

    rules = Rules(max_overlap=case.get("max_overlap", 1.0))
    verdict = judge(case["metadata"], case["raw"], colour_of, rules)

    objects = {name: [list(box) for box in boxes] for name, boxes in verdict.objects.items()}
    assert verdict.correct == case["correct"]
    assert plain("\n".join(verdict.reasons)) == plain(case["reason"])
    assert objects == case["detected"]


def test_overlaps_and_relations_of_the_original():
    for case in KNOWN["compute_iou"]:
        assert iou(case["a"], case["b"]) == pytest.approx(case["iou"], rel=1e-12)
    for case in KNOWN["relative_position"]:
        relations = relative_position(case["a"], case["b"], case["threshold"])
        assert sorted(relations) == case["relations_of_a_to_b"]


def test_scores_of_the_original():
    cases = KNOWN["random_cases"]
    text = KNOWN["summary_stdout_of_random_cases"]
    tags = [case["metadata"]["tag"] for case in cases]
    result = scores(tags, [case["correct"] for case in cases])

    for task in TASKS:
        share, right, count = re.search(rf"{task} += ([\d.]+)% \((\d+) / (\d+)\)", text).groups()
        assert 100 * result[task].mean == pytest.approx(float(share), abs=0.005)
        assert result[task].n == int(count)
        assert result[task].mean * result[task].n == pytest.approx(int(right))
    overall = float(re.search(r"over tasks\): ([\d.]+)", text)[1])
    assert result["overall"].mean == pytest.approx(overall, abs=5e-6)


@pytest.mark.slow
def test_95_percent_of_the_intervals_hold_the_true_overall_score():
    draw = np.random.default_rng(0)
    shares = np.array([0.95, 0.8, 0.7, 0.75, 0.2, 0.4])
    tags = np.repeat(TASKS, 80)

    inside = 0
    for _ in range(400):
        overall = scores(tags, draw.random(480) < np.repeat(shares, 80))["overall"]
        inside += overall.low <= shares.mean() <= overall.high

    assert 0.92 <= inside / 400 <= 0.98


def test_the_published_prompts_are_read():
    records = read_metadata(ORACLES / "geneval_prompts.jsonl")
    assert Counter(record["tag"] for record in records) == {
        "single_object": 80,
        "two_object": 99,
        "counting": 80,
        "colors": 94,
        "position": 100,
        "color_attr": 100,
    }
    names = set(json.loads((ORACLES / "geneval_object_names.json").read_text()))
    assert {clause["class"] for record in records for clause in record["include"]} <= names


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has 0 prompts"),
        ('{"tag": "single_object"}', "line 1: field `include` is missing"),
        (
            '{"tag": "x", "include": [{}], "prompt": "a"}',
            "line 1: field `tag` must be 'single_object', .*, got \"x\"",
        ),
        ("{", "line 1"),
        (
            '{"tag": "colors", "include": [], "prompt": "a"}',
            "field `include` must be a list of at least 1",
        ),
        (
            '{"tag": "position", "include": [{"class": "car", "count": 1, '
            '"position": ["above", 0]}], "prompt": "a"}',
            "field `include` must relate objects to those of an earlier clause",
        ),
        (
            '{"tag": "colors", "include": [{"class": "car", "count": "two"}], "prompt": "a"}',
            'field `include.0.count` must be a whole number, got "two"',
        ),
    ],
)
def test_other_files_are_refused(text, message, tmp_path):
    (tmp_path / "p.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_metadata(tmp_path / "p.jsonl")


def test_an_absent_file_is_named_with_its_source(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"evaluation_metadata\.jsonl from github"):
        read_metadata(tmp_path / "absent.jsonl")

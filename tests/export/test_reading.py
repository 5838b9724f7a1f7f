"""Lists of sigmas are read as people have them: typed, printed, from ComfyUI and from us."""

import json

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from oss_exp.export.comfyui import ComfyUI
from oss_exp.export.diffusers import Diffusers
from oss_exp.export.k_diffusion import KDiffusion
from oss_exp.export.numbers import save_in_numbers
from oss_exp.export.reading import read_sigmas
from oss_exp.export.sigmas import from_flow_sigmas, from_ratio_sigmas
from oss_exp.export.webui import WebUI
from oss_exp.schedule import StepSchedule

LIST = [1.0, 0.6, 0.0]


@pytest.mark.parametrize(
    "text",
    [
        "1.0, 0.6, 0.0",
        "1 .6 0",
        "1.;0.6;0.",
        "\ufeff1.0\r\n0.6\r\n0.0\r\n",
        "# noise first\n1.0, 0.6,  // the second call\n0.0",
        "sigmas = [1.0, 6e-1, 0]",
        "sigmas: 1.0, 0.6, 0.0",
        "(1.0, 0.6, 0.0)",
        str(torch.tensor(LIST)),
        repr(torch.tensor([LIST], dtype=torch.float64)),
        "tensor([1.0000, 0.6000, 0.0000], device='cuda:0', dtype=torch.float16)",
        "scheduler_sigmas = torch.tensor([1.0, 0.6, 0.0], requires_grad=True)",
        str(np.array(LIST)),
        repr(np.array(LIST, dtype=np.float32)).replace("e+00", ""),
        repr([np.float64(sigma) for sigma in LIST]),
        json.dumps({"sigmas": LIST}),
    ],
)
def test_typed_and_printed_lists_are_read(text, tmp_path):
    assert read_sigmas(text) == pytest.approx(LIST, abs=1e-7)
    file = tmp_path / "list.txt"
    file.write_text(text)
    assert read_sigmas(str(file)) == pytest.approx(LIST, abs=1e-7)


@pytest.mark.parametrize(
    ("make", "sigmas", "message"),
    [
        (
            from_flow_sigmas,
            [1.0, 0.9, 0.7, 0.4],
            r"ends at 0.4 and not at 0. If .* write 0 after it \(4 steps\); if .*3",
        ),
        (from_ratio_sigmas, [14.6, 0.9, 0.03], r"ends at 0.03 and not at 0"),
        (from_flow_sigmas, [1.0, 0.5, -0.1], "must be finite numbers of at least 0"),
        (from_ratio_sigmas, [14.0, float("nan"), 0.0], "must be finite"),
        (from_flow_sigmas, [], "must be finite"),
        (from_flow_sigmas, [0.0], "no sigma above 0"),
        (from_flow_sigmas, [0.0, 0.4, 1.0], "must strictly decrease, noise first"),
        (from_flow_sigmas, [1.0, 0.4, 0.4, 0.0], "must strictly decrease"),
        (
            from_flow_sigmas,
            [1000.0, 750.0, 0.0],
            "at most 1, the list begins at 1000; divide a clock's times",
        ),
        (
            from_ratio_sigmas,
            [999.0, 666.0, 333.0, 0.0],
            "looks like the indices of a training chain",
        ),
        (from_ratio_sigmas, [999.0, 749.25, 499.5, 249.75, 0.0], "looks like the indices"),
        (from_ratio_sigmas, [981.0, 481.0, 1.0, 0.0], "looks like the indices"),
    ],
)
def test_lists_that_cannot_be_sigmas_are_refused(make, sigmas, message):
    with pytest.raises(ValueError, match=message):
        make(sigmas)


def test_large_sigmas_are_no_indices():
    svd = [700.0, 54.5, 15.886, 1.789, 0.002, 0.0]
    assert from_ratio_sigmas(svd).times[0] == pytest.approx(700 / 701)
    assert from_ratio_sigmas([80.0, 10.0, 1.0, 0.0]).num_steps == 3


# --------------------------------------------------------------------------------------------------
# ComfyUI
# --------------------------------------------------------------------------------------------------


def saved(key: int, text: str, kind: str = "ManualSigmas", **more) -> dict:
    values = [text] if kind == "ManualSigmas" else [text, more.pop("steps", 2)]
    return {"id": key, "type": kind, "mode": 0, "widgets_values": values} | more


def api(text: object, kind: str = "ManualSigmas", **more) -> dict:
    name = "sigmas" if kind == "ManualSigmas" else "sigmas_string"
    return {"class_type": kind, "inputs": {name: text, **more}}


TEXT = "1., 0.6, 0.0"
GRAPH = {"id": "abc", "nodes": [{"id": 3, "type": "KSampler"}, saved(10, TEXT)]}
LINKED = [{"name": "sigmas", "widget": {"name": "sigmas"}, "link": 7}]
WORKFLOWS = {
    "saved": {
        "nodes": [{"id": 1, "type": "Note", "widgets_values": ["0.5"]}, saved(10, TEXT)],
        "version": 0.4,
    },
    "widgets by name": {"nodes": [saved(10, "") | {"widgets_values": {"sigmas": TEXT}}]},
    "subgraph": {"nodes": [{"id": 1, "type": "abc"}], "definitions": {"subgraphs": [GRAPH]}},
    "subgraph in a subgraph": {
        "nodes": [{"id": 1, "type": "out"}],
        "definitions": {"subgraphs": [{"id": "out", "nodes": [{"id": 2, "type": "abc"}]}, GRAPH]},
    },
    "one switched off": {
        "nodes": [saved(10, TEXT), saved(11, "0.8, 0.0", mode=4), saved(12, "0.7, 0.0", mode=2)]
    },
    "a subgraph that is not used": {
        "nodes": [saved(1, TEXT)],
        "definitions": {"subgraphs": [GRAPH | {"id": "x"}]},
    },
    "the same twice": {"nodes": [saved(10, TEXT), saved(11, TEXT)]},
    "api": {
        "4": api(TEXT),
        "5": {"class_type": "KSamplerSelect", "inputs": {"sampler_name": "euler"}},
    },
    "request": {"prompt": {"4": api(TEXT)}, "client_id": "me"},
    "KJNodes": {"4": api("1.0, 0.6, 0.029", "CustomSigmas", interpolate_to_steps=2)},
    "KJNodes, saved": {"nodes": [saved(4, TEXT, "CustomSigmas", steps=2)]},
    "KJNodes, as it is": {"nodes": [saved(4, TEXT, "CustomSigmas", steps=0)]},
}


@pytest.mark.parametrize("name", WORKFLOWS)
def test_workflows_are_read_as_they_are_saved(name, tmp_path):
    file = tmp_path / "workflow.json"
    file.write_text("\ufeff" + json.dumps(WORKFLOWS[name]))
    assert read_sigmas(str(file)) == LIST


TWO = {
    "nodes": [{"id": 1, "type": "abc"}, saved(11, "0.8, 0.45, 0.0")],
    "definitions": {"subgraphs": [GRAPH]},
}


def test_one_of_two_lists_is_chosen_by_its_node():
    with pytest.raises(
        ValueError,
        match=r"has 2 lists .* by node id 1:10: 1\., 0\.6, 0\.0; 11: 0\.8, .*task\.node=ID",
    ):
        read_sigmas(json.dumps(TWO))

    assert read_sigmas(json.dumps(TWO), node="1:10") == LIST
    assert read_sigmas(json.dumps(TWO), node=11) == [0.8, 0.45, 0.0]

    with pytest.raises(
        ValueError, match=r"no list of sigmas in task\.node=5; lists by node id: 1:10: 1\., "
    ):
        read_sigmas(json.dumps(TWO), node=5)

    with pytest.raises(ValueError, match=r"task\.node=5 is of a ComfyUI file"):
        read_sigmas("1.0, 0.0", node=5)


@pytest.mark.parametrize(
    ("workflow", "message"),
    [
        (
            {"4": api(["5", 0])},
            r"node 4 \(ManualSigmas\), gets `4\.inputs\.sigmas` from another node",
        ),
        ({"nodes": [saved(4, TEXT, inputs=LINKED)]}, "sigmas` from another node"),
        (
            {"4": api(TEXT, "CustomSigmas", interpolate_to_steps=10)},
            "interpolates its 3 numbers to 10 steps",
        ),
        (
            {"nodes": [saved(4, "1.0, high, 0.0")]},
            r"node 4 \(ManualSigmas\), is no list of sigmas \('high'\)",
        ),
        (
            {
                "nodes": [{"id": 1, "type": "abc"}],
                "definitions": {"subgraphs": [GRAPH | {"nodes": 3}]},
            },
            "has no node Man",
        ),
        (
            {
                "nodes": [{"id": 1, "type": "a"}],
                "definitions": {"subgraphs": [{"id": "a", "nodes": [{"type": "a"}]}]},
            },
            "has no node ManualSigmas",
        ),
        (
            {"nodes": [3, {"id": 1, "type": []}], "definitions": {"subgraphs": [7]}},
            "has no node ManualSigmas",
        ),
        (
            {"nodes": [saved(4, TEXT) | {"widgets_values": []}]},
            r"node 4 \(ManualSigmas\), has no list of sigmas in",
        ),
        (
            {"4": {"class_type": "ManualSigmas"}},
            "has no list of sigmas in `4.inputs.sigmas`; type one",
        ),
        ({"sigmas": [1.0, 0.0], "times": [1.0, 0.0]}, "has both `sigmas` and `times`"),
        ({"sigmas": [1.0, "x"]}, r"field `sigmas\.1` must be a number"),
    ],
)
def test_workflows_without_a_list_are_refused(workflow, message):
    with pytest.raises(ValueError, match=message):
        read_sigmas(json.dumps(workflow))


# --------------------------------------------------------------------------------------------------
# Our own
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("exporter", "clock"),
    [
        (ComfyUI(), "flow time"),
        (KDiffusion(), "DDPM index"),
        (WebUI(), "flow time"),
        (Diffusers("SHIFTED", mu=1.15), "flow time"),
        (Diffusers("EulerDiscreteScheduler"), "DDPM index"),
    ],
)
def test_our_own_exports_come_back(exporter, clock, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True).save_pretrained("SHIFTED")
    steps = StepSchedule([0.95, 0.7, 1e-5, 0.0], provenance={"native": {"clock": clock}})
    exporter.write(steps, tmp_path / "x.json")
    if clock == "flow time":
        result = from_flow_sigmas(read_sigmas("x.json", "flow"))
    else:
        result = from_ratio_sigmas(read_sigmas("x.json", "eps"))
    torch.testing.assert_close(result.times, steps.times, rtol=1e-9, atol=0)


def test_our_own_files_that_are_no_lists_are_refused(tmp_path):
    steps = StepSchedule([0.9, 0.5, 0.0], provenance={"native": {"clock": "flow time"}})
    with pytest.raises(ValueError, match="is a step schedule already"):
        read_sigmas(str(steps.save(tmp_path / "s.json")))

    with pytest.raises(ValueError, match="is made of a step schedule"):
        read_sigmas(str(save_in_numbers(steps, tmp_path / "n.json")))

    Diffusers("FlowMatchEulerDiscreteScheduler").write(steps, tmp_path / "d.json")
    with pytest.raises(ValueError, match=r"for a network of kind flow; set task\.network=flow"):
        read_sigmas(str(tmp_path / "d.json"), "eps")

    earlier = {"scheduler": "FlowMatchEulerDiscreteScheduler", "sigmas": [1.0, 0.5]}
    with pytest.raises(
        ValueError,
        match=r"field `runs` is missing; export it again, for earlier versions did not keep",
    ):
        read_sigmas(json.dumps(earlier))

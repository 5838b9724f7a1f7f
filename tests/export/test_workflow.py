"""Workflows of ComfyUI with our nodes in the place of their samplers."""

import json

import pytest
from helpers import run_cli

from oss_exp.export.workflow import with_schedule
from oss_exp.schedule import StepSchedule

KSAMPLER = {
    "model": ["4", 0],
    "seed": 7,
    "steps": 20,
    "cfg": 2.0,
    "sampler_name": "euler",
    "scheduler": "normal",
}
KSAMPLER |= {"positive": ["6", 0], "negative": ["7", 0], "latent_image": ["5", 0], "denoise": 1.0}
API = {
    "3": {"class_type": "KSampler", "inputs": KSAMPLER},
    "8": {"class_type": "KSampler", "inputs": KSAMPLER | {"denoise": 0.5}},
    "9": {"class_type": "KSamplerAdvanced", "inputs": {}},
    "10": {
        "class_type": "SamplerCustomAdvanced",
        "inputs": {
            "noise": ["1", 0],
            "guider": ["11", 0],
            "sampler": ["12", 0],
            "sigmas": ["13", 0],
        },
    },
    "11": {"class_type": "BasicGuider", "inputs": {"model": ["4", 0], "conditioning": ["6", 0]}},
    "12": {"class_type": "KSamplerSelect", "inputs": {"sampler_name": "euler"}},
    "13": {
        "class_type": "BasicScheduler",
        "inputs": {"model": ["4", 0], "scheduler": "beta", "steps": 20},
    },
    "14": {"class_type": "SplitSigmas", "inputs": {"sigmas": ["13", 0], "step": 3}},
    "15": {
        "class_type": "SamplerCustom",
        "inputs": {"sigmas": ["14", 0], "sampler": ["12", 0], "model": ["4", 0]},
    },
}


# A saved workflow. Node 4 gives a model, 6 conditions and latents, 12 a sampler, 13 sigmas.
KSAMPLER_NODE = {
    "id": 3,
    "type": "KSampler",
    "inputs": [
        {"name": "model", "type": "*", "link": 1},
        {"name": "positive", "type": "*", "link": 2},
        {"name": "negative", "type": "*", "link": 3},
        {"name": "latent_image", "type": "*", "link": 4},
        {"name": "steps", "type": "*", "link": 5},
    ],
    "widgets_values": [7, "fixed", 20, 2.0, "euler", "normal", 1],
    "properties": {"cnr_id": "comfy-core"},
}
CUSTOM_NODE = {
    "id": 10,
    "type": "SamplerCustom",
    "pos": [800, 100],
    "inputs": [
        {"name": "model", "type": "MODEL", "link": 6},
        {"name": "sampler", "type": "SAMPLER", "link": 7},
        {"name": "sigmas", "type": "SIGMAS", "link": 8},
    ],
}
LINKS_FROM = {2: [5], 4: [1, 6], 6: [2, 3, 4], 12: [7], 13: [8]}
LINKS = [
    [1, 4, 0, 3, 0, "MODEL"],
    [2, 6, 0, 3, 1, "*"],
    [3, 6, 0, 3, 2, "*"],
    [4, 6, 0, 3, 3, "*"],
    [5, 2, 0, 3, 4, "INT"],
    [6, 4, 0, 10, 0, "MODEL"],
    [7, 12, 0, 10, 1, "SAMPLER"],
    [8, 13, 0, 10, 2, "SIGMAS"],
]
LINK_FIELDS = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")


def saved(subgraph: bool) -> dict:
    """Return the saved workflow, or one with it as a subgraph, where links are objects."""
    nodes = [KSAMPLER_NODE, CUSTOM_NODE]
    for key, links in LINKS_FROM.items():
        nodes.append({"id": key, "type": "Other", "outputs": [{"name": "x", "links": links}]})
    graph = {"nodes": nodes, "links": LINKS, "last_node_id": 13, "last_link_id": 8}

    if subgraph:
        graph["links"] = [dict(zip(LINK_FIELDS, link, strict=True)) for link in LINKS]
        graph = {"nodes": [], "links": [], "definitions": {"subgraphs": [graph]}}
    return graph


@pytest.fixture(params=[API, {"prompt": API, "client_id": "x"}], ids=["prompt", "request"])
def replaced(request, tmp_path) -> tuple[dict, list[str]]:
    """The nodes of a workflow in API format after the replacement, and the report's lines."""
    file = tmp_path / "my.json"
    file.write_text(json.dumps(request.param))
    text, lines = with_schedule(file, "x.json")
    content = json.loads(text)
    return content.get("prompt", content), lines


def test_samplers_of_the_api_format_get_the_schedule(replaced):
    prompt, _ = replaced
    names = ("model", "seed", "cfg", "positive", "negative", "latent_image", "denoise")
    inputs = {name: KSAMPLER[name] for name in names}
    schedule = {"schedule": "x.json", "denoise": 1.0, "model": ["4", 0]}

    assert prompt["3"] == {"class_type": "OSSSampler", "inputs": inputs | {"schedule": "x.json"}}
    assert prompt["10"]["inputs"]["sigmas"] == ["16", 0]
    assert prompt["10"]["inputs"]["sampler"] == ["16", 1]
    assert prompt["16"] == {"class_type": "OSSSchedule", "inputs": schedule}


def test_other_nodes_of_the_api_format_stay(replaced):
    prompt, _ = replaced
    others = {key: node for key, node in API.items() if key not in ("3", "10")}
    assert {key: prompt[key] for key in prompt if key not in ("3", "10", "16")} == others


def test_every_sampler_of_a_workflow_has_a_line_in_the_report(replaced):
    _, lines = replaced
    assert lines == [
        "node 3: KSampler is now OSSSampler",
        "node 10: SamplerCustomAdvanced takes sigmas and sampler of the new node 16, OSSSchedule",
        "node 8: KSampler with denoise=0.5 is left as it is; the schedule is for denoise=1",
        "node 9: KSamplerAdvanced is left as it is; replace it by hand, by OSS Sampler",
        "node 15: SamplerCustom takes a part of its sigmas, by SplitSigmas; "
        "put OSS Schedule before that by hand",
    ]


@pytest.fixture(params=[False, True], ids=["workflow", "subgraph"])
def graph(request, tmp_path) -> dict:
    """A saved workflow after the replacement; links are lists, as in the file's main graph."""
    (tmp_path / "my.json").write_text(json.dumps(saved(request.param)))
    text, lines = with_schedule(tmp_path / "my.json", "x.json")
    assert [line.split(":")[0] for line in lines] == ["node 3", "node 10"]

    graph = json.loads(text)
    if request.param:
        graph = graph["definitions"]["subgraphs"][0]
        graph["links"] = [list(link.values()) for link in graph["links"]]
    return graph


def test_samplers_of_a_saved_workflow_get_the_schedule(graph):
    nodes = {node["id"]: node for node in graph["nodes"]}
    inputs = [slot["name"] for slot in nodes[3]["inputs"]]

    assert nodes[3]["type"] == "OSSSampler"
    assert nodes[3]["widgets_values"] == ["x.json", 7, "fixed", 2.0, 1.0, 0]
    assert nodes[3]["properties"] == {"Node name for S&R": "OSSSampler"}
    assert inputs == ["model", "positive", "negative", "latent_image"]
    assert nodes[14]["type"] == "OSSSchedule"
    assert (graph["last_node_id"], graph["last_link_id"]) == (14, 10)


def test_every_link_of_a_saved_workflow_is_known_at_both_of_its_ends(graph):
    nodes = {node["id"]: node for node in graph["nodes"]}
    for number, origin, slot, target, index, _ in graph["links"]:
        assert number in nodes[origin]["outputs"][slot]["links"]
        assert nodes[target]["inputs"][index]["link"] == number

    outgoing = []
    for node in graph["nodes"]:
        for slot in node.get("outputs", []):
            outgoing += slot["links"]
    assert sorted(outgoing) == sorted(number for number, *_ in graph["links"])
    kinds = {kind for _, origin, *_, kind in graph["links"] if origin == 14}
    assert kinds == {"SIGMAS", "SAMPLER"}


def test_sigmas_from_outside_of_a_subgraph_are_disconnected(tmp_path):
    """The subgraph's input forgets the link; new links are objects with new numbers."""
    slots = [
        {"name": "sigmas", "type": "SIGMAS", "link": 2},
        {"name": "sampler", "type": "SAMPLER", "link": None},
    ]
    outside = {
        "id": 2,
        "origin_id": -10,
        "origin_slot": 0,
        "target_id": 4,
        "target_slot": 0,
        "type": "SIGMAS",
    }

    graph = {"nodes": [{"id": 4, "type": "SamplerCustom", "inputs": slots}], "links": [outside]}
    graph |= {"inputs": [{"id": "a", "linkIds": [2]}], "state": {"lastNodeId": 7, "lastLinkId": 9}}
    content = {"nodes": [], "links": [], "definitions": {"subgraphs": [graph]}}
    (tmp_path / "my.json").write_text(json.dumps(content))
    text, _ = with_schedule(tmp_path / "my.json", "x.json")
    [graph] = json.loads(text)["definitions"]["subgraphs"]

    assert graph["inputs"] == [{"id": "a", "linkIds": []}]
    assert [(link["id"], link["target_slot"]) for link in graph["links"]] == [(10, 0), (11, 1)]
    assert graph["state"] == {"lastNodeId": 8, "lastLinkId": 11}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not complete JSON|invalid|not"),
        ("[]", "workflow"),
        ('{"1": {"class_type": "SaveImage", "inputs": {}}}', "has no sampler to replace"),
        (
            '{"nodes": [{"type": "KSampler", '
            '"widgets_values": [1, "fixed", 20, 2, "euler", "simple", 0.5]}]}',
            "denoise=0.5 is",
        ),
        (
            '{"nodes": [{"type": "SamplerCustom", "inputs": 7, "mode": 4}], "definitions": []}',
            "has no sampler",
        ),
        (
            '{"nodes": [{"type": "SamplerCustom", "pos": 7}]}',
            "my.json has damaged nodes or links; save",
        ),
        ('{"nodes": [], "definitions": "x"}', "my.json has damaged nodes or links; save"),
        (
            '{"1": {"class_type": "SamplerCustom", "inputs": {"sigmas": []}}}',
            "my.json has damaged nodes or links; save",
        ),
    ],
)
def test_files_that_are_no_workflows_are_refused(text, message, tmp_path):
    (tmp_path / "my.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        with_schedule(tmp_path / "my.json", "x.json")


def test_the_command_line_writes_the_workflow_beside_the_nodes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    StepSchedule([1.0, 0.5, 0.0], provenance={"native": {"clock": "flow time"}}).save("two.json")
    (tmp_path / "my.json").write_text(json.dumps(API))
    export = ["task=export", "task.schedule=two.json", "task.workflow=my.json", "hydra.run.dir=run"]
    run_cli(*export, "exporter=comfyui_nodes", "task.output=oss_exp")

    assert "node 3: KSampler is now OSSSampler" in capsys.readouterr().out
    assert '"OSSSampler"' in (tmp_path / "oss_exp" / "example_workflows" / "my.json").read_text()

    with pytest.raises(SystemExit):
        run_cli(*export, "exporter=comfyui")

    assert "task.workflow is for exporter=comfyui_nodes" in capsys.readouterr().err

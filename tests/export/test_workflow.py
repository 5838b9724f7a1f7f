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


def saved(links_as_objects: bool) -> dict:
    """Nodes 3 (KSampler, its steps from node 2) and 10 (SamplerCustom); 4 a model, 6 the rest."""
    slots = ("model", "positive", "negative", "latent_image", "steps")
    sampler = {
        "id": 3,
        "type": "KSampler",
        "inputs": [{"name": n, "type": "*", "link": i} for i, n in enumerate(slots, 1)],
    }
    sampler |= {
        "widgets_values": [7, "fixed", 20, 2.0, "euler", "normal", 1],
        "properties": {"cnr_id": "comfy-core"},
    }

    custom = {
        "id": 10,
        "type": "SamplerCustom",
        "pos": [800, 100],
        "inputs": [
            {"name": "model", "type": "MODEL", "link": 6},
            {"name": "sampler", "type": "SAMPLER", "link": 7},
            {"name": "sigmas", "type": "SIGMAS", "link": 8},
        ],
    }

    others = [(2, [5]), (4, [1, 6]), (6, [2, 3, 4]), (12, [7]), (13, [8])]
    nodes = [
        {"id": key, "type": "Other", "outputs": [{"name": "x", "links": links}]}
        for key, links in others
    ]
    links = [
        [1, 4, 0, 3, 0, "MODEL"],
        [2, 6, 0, 3, 1, "*"],
        [3, 6, 0, 3, 2, "*"],
        [4, 6, 0, 3, 3, "*"],
        [5, 2, 0, 3, 4, "INT"],
    ]

    links += [[6, 4, 0, 10, 0, "MODEL"], [7, 12, 0, 10, 1, "SAMPLER"], [8, 13, 0, 10, 2, "SIGMAS"]]
    graph = {
        "nodes": [sampler, custom, *nodes],
        "links": links,
        "last_node_id": 13,
        "last_link_id": 8,
    }
    if links_as_objects:
        names = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
        graph["links"] = [dict(zip(names, link, strict=True)) for link in links]
        graph = {"nodes": [], "links": [], "definitions": {"subgraphs": [graph]}}

    return graph


def test_api_format(tmp_path):
    file = tmp_path / "my.json"

    for content in (API, {"prompt": API, "client_id": "x"}):
        file.write_text(json.dumps(content))
        text, lines = with_schedule(file, "x.json")
        content_ = json.loads(text)
        prompt = content_.get("prompt", content_)

        assert prompt["3"]["class_type"] == "OSSSampler"

        inputs = {
            name: KSAMPLER[name]
            for name in ("model", "seed", "cfg", "positive", "negative", "latent_image", "denoise")
        }

        assert prompt["3"]["inputs"] == inputs | {"schedule": "x.json"}
        assert prompt["10"]["inputs"]["sigmas"] == ["16", 0]
        assert prompt["10"]["inputs"]["sampler"] == ["16", 1]

        schedule = {"schedule": "x.json", "denoise": 1.0, "model": ["4", 0]}
        assert prompt["16"] == {"class_type": "OSSSchedule", "inputs": schedule}
        assert {key: prompt[key] for key in prompt if key not in ("3", "10", "16")} == {
            key: node for key, node in API.items() if key not in ("3", "10")
        }
        assert lines == [
            "node 3: KSampler is now OSSSampler",
            "node 10: SamplerCustomAdvanced takes sigmas and sampler of the new node 16, OSSSchedule",
            "node 8: KSampler with denoise=0.5 is left as it is; the schedule is for denoise=1",
            "node 9: KSamplerAdvanced is left as it is; replace it by hand, by OSS Sampler",
            "node 15: SamplerCustom takes a part of its sigmas, by SplitSigmas; put OSS Schedule before that by hand",
        ]


@pytest.mark.parametrize("links_as_objects", [False, True], ids=["workflow", "subgraph"])
def test_as_saved(links_as_objects, tmp_path):
    """Every link is known at both of its ends, and nodes keep their other links."""
    (tmp_path / "my.json").write_text(json.dumps(saved(links_as_objects)))
    text, lines = with_schedule(tmp_path / "my.json", "x.json")
    graph = json.loads(text)
    graph = graph["definitions"]["subgraphs"][0] if links_as_objects else graph
    nodes = {node["id"]: node for node in graph["nodes"]}

    assert nodes[3]["type"] == "OSSSampler"
    assert nodes[3]["widgets_values"] == ["x.json", 7, "fixed", 2.0, 1.0, 0]
    assert nodes[3]["properties"] == {"Node name for S&R": "OSSSampler"}
    assert [slot["name"] for slot in nodes[3]["inputs"]] == [
        "model",
        "positive",
        "negative",
        "latent_image",
    ]
    assert nodes[14]["type"] == "OSSSchedule"
    assert (graph["last_node_id"], graph["last_link_id"]) == (14, 10)
    assert [line.split(":")[0] for line in lines] == ["node 3", "node 10"]

    ends = {}

    for link in graph["links"]:
        number, origin, slot, target, index, kind = link.values() if links_as_objects else link
        ends[number] = origin, kind
        assert number in nodes[origin]["outputs"][slot]["links"]
        assert nodes[target]["inputs"][index]["link"] == number

    outgoing = [
        number_
        for node in nodes.values()
        for slot in node.get("outputs", [])
        for number_ in slot["links"]
    ]

    assert sorted(outgoing) == sorted(ends)
    assert {kind for origin, kind in ends.values() if origin == 14} == {"SIGMAS", "SAMPLER"}


def test_sigmas_from_outside_of_a_subgraph(tmp_path):
    """The subgraph's input forgets the link, and new links are objects with numbers that no other has."""
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
    graph = json.loads(with_schedule(tmp_path / "my.json", "x.json")[0])["definitions"][
        "subgraphs"
    ][0]

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
            '{"nodes": [{"type": "KSampler", "widgets_values": [1, "fixed", 20, 2, "euler", "simple", 0.5]}]}',
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
def test_what_is_no_workflow_is_refused(text, message, tmp_path):
    (tmp_path / "my.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        with_schedule(tmp_path / "my.json", "x.json")


def test_by_the_command_line(tmp_path, monkeypatch, capsys):
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

"""A user's ComfyUI workflow with our nodes in the place of its sampler, as saved or in the API format.

KSampler becomes OSS Sampler, with its own model, prompts, latents, seed and guidance. SamplerCustom and
SamplerCustomAdvanced stay, and take sigmas and sampler from an OSS Schedule.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pydantic import JsonValue, TypeAdapter

from oss_exp.export.reading import MUTED, objects
from oss_exp.files import parse_record, read_text

REMEDY = "save the workflow again, by Save or by Save (API)"
CUSTOM = ("SamplerCustom", "SamplerCustomAdvanced")
CUTS = (
    "SplitSigmas",
    "SplitSigmasDenoise",
    "FlipSigmas",
    "SetFirstSigma",
    "ExtendIntermediateSigmas",
)
KEPT = (
    "model",
    "seed",
    "cfg",
    "positive",
    "negative",
    "latent_image",
    "denoise",
)  # of KSampler's inputs
WIDGETS = ("seed", "control_after_generate", "steps", "cfg", "sampler_name", "scheduler", "denoise")
OUTPUTS = (("sigmas", "SIGMAS"), ("sampler", "SAMPLER"), ("about", "STRING"))  # of OSS Schedule
Say = Callable[[str], None]


def with_schedule(file: str | Path, schedule: str, denoise: float = 1.0) -> tuple[str, list[str]]:
    """Return the text of a workflow's copy that samples by `schedule`, and a line on each node that it touched.

    schedule: its file's name, as the nodes list it. denoise: that the schedule is for; samplers with another stay.
    Raises ValueError where the file is no workflow, or where no node could be replaced.
    """
    name = f"workflow {file}"
    text = read_text(str(file), "workflow").lstrip("\ufeff")
    content: Any = copy.deepcopy(
        parse_record(text, TypeAdapter(dict[str, JsonValue]), name, REMEDY)
    )
    said, left = list[str](), list[str]()
    try:
        if isinstance(content.get("nodes"), list):
            for graph in [content, *objects((content.get("definitions") or {}).get("subgraphs"))]:
                _Saved(graph, schedule, denoise, said.append, left.append).replace()
        else:
            prompt = content.get("prompt")
            prompt = prompt if isinstance(prompt, dict) else content
            _replace_in_api(prompt, schedule, denoise, said.append, left.append)
    except (AttributeError, LookupError, TypeError, ValueError):  # not laid out as ComfyUI does
        raise ValueError(f"{name} has damaged nodes or links; {REMEDY}") from None
    if not said:
        raise ValueError(
            "\n".join([f"{name} has no sampler to replace (KSampler, {', '.join(CUSTOM)})", *left])
        )
    return json.dumps(content, indent=2), [*said, *left]


# --------------------------------------------------------------------------------------------------------------
# The API format: {id: {class_type, inputs}}, a link is [id, slot]
# --------------------------------------------------------------------------------------------------------------


def _replace_in_api(
    prompt: dict[str, Any], schedule: str, denoise: float, say: Say, leave: Say
) -> None:
    for key, node in [*prompt.items()]:
        if not isinstance(node, dict) or not isinstance(node.get("inputs"), dict):
            continue
        kind, inputs = node.get("class_type"), node["inputs"]
        if kind == "KSampler":
            if inputs.get("denoise", 1.0) != denoise:
                leave(_other_denoise(key, kind, inputs.get("denoise"), denoise))
                continue
            node["class_type"] = "OSSSampler"
            node["inputs"] = {name: inputs[name] for name in KEPT if name in inputs} | {
                "schedule": schedule
            }
            say(f"node {key}: KSampler is now OSSSampler")
        elif kind in CUSTOM:
            source = (
                prompt.get(inputs["sigmas"][0], {})
                if isinstance(inputs.get("sigmas"), list)
                else {}
            )
            if source.get("class_type") in CUTS:
                leave(_cut(key, kind, source["class_type"]))
                continue
            guider = (
                prompt.get(inputs["guider"][0], {})
                if isinstance(inputs.get("guider"), list)
                else node
            )
            new = str(
                1
                + max(
                    [int(each) for each in prompt if each.isdecimal() and len(each) < 20], default=0
                )
            )
            given = {"schedule": schedule, "denoise": denoise}
            if isinstance(model := (guider.get("inputs") or {}).get("model"), list):
                given["model"] = model
            prompt[new] = {"class_type": "OSSSchedule", "inputs": given}
            inputs |= {"sigmas": [new, 0], "sampler": [new, 1]}
            say(f"node {key}: {kind} takes sigmas and sampler of the new node {new}, OSSSchedule")
        elif str(kind).startswith("KSampler") and kind != "KSamplerSelect":
            leave(f"node {key}: {kind} is left as it is; replace it by hand, by OSS Sampler")


def _other_denoise(key: Any, kind: str, given: Any, wanted: float) -> str:
    return f"node {key}: {kind} with denoise={given} is left as it is; the schedule is for denoise={wanted:g}"


def _cut(key: Any, kind: str, by: str) -> str:
    return f"node {key}: {kind} takes a part of its sigmas, by {by}; put OSS Schedule before that by hand"


# --------------------------------------------------------------------------------------------------------------
# As saved: lists of nodes and of links, whose inputs and outputs know the links by number
# --------------------------------------------------------------------------------------------------------------


class _Saved:
    """A saved workflow, or a subgraph of one, in which links are objects and not lists."""

    def __init__(self, graph: dict[str, Any], schedule: str, denoise: float, say: Say, leave: Say):
        self.graph, self.schedule, self.denoise, self.say, self.leave = (
            graph,
            schedule,
            denoise,
            say,
            leave,
        )
        self.nodes = {node.get("id"): node for node in objects(graph.get("nodes"))}
        links = graph.get("links")
        self.links: list[Any] = links if isinstance(links, list) else []
        self.state = graph["state"] if isinstance(graph.get("state"), dict) else {}
        self.listed = (
            isinstance(self.links[0], list) if self.links else "state" not in graph
        )  # else objects
        counted = self.state.get("lastLinkId") or 0, graph.get("last_link_id") or 0
        self.last = max([*counted, *(_get(link, 0) for link in self.links)])

    def replace(self) -> None:
        for key, node in [*self.nodes.items()]:
            if node.get("mode") in MUTED:
                continue
            if node.get("type") == "KSampler":
                self._sampler(key, node)
            elif node.get("type") in CUSTOM:
                self._custom(key, node)
            elif str(node.get("type")).startswith("KSampler") and node["type"] != "KSamplerSelect":
                self.leave(
                    f"node {key}: {node['type']} is left as it is; replace it by hand, by OSS Sampler"
                )

    def _sampler(self, key: Any, node: dict[str, Any]) -> None:
        """KSampler -> OSSSampler."""
        values = node.get("widgets_values")
        told = (
            dict(zip(WIDGETS, values, strict=False))
            if isinstance(values, list)
            else dict(values or {})
        )
        if told.get("denoise", 1.0) != self.denoise:
            self.leave(_other_denoise(key, "KSampler", told.get("denoise"), self.denoise))
            return
        seed, control = told.get("seed", 0), told.get("control_after_generate", "randomize")
        node["widgets_values"] = [
            self.schedule,
            seed,
            control,
            told.get("cfg", 1.0),
            self.denoise,
            0,
        ]
        slots = objects(node.get("inputs"))
        for slot in slots:
            if slot.get("name") not in KEPT and slot.get("link") is not None:
                self._unlink(slot["link"])
        node["inputs"] = [slot for slot in slots if slot.get("name") in KEPT]
        for index, slot in enumerate(node["inputs"]):
            if (link := self._link(slot.get("link"))) is not None:
                _set(link, 4, index)
        self._named(node, "OSSSampler")
        self.say(f"node {key}: KSampler is now OSSSampler")

    def _custom(self, key: Any, node: dict[str, Any]) -> None:
        """Sigmas and sampler of a SamplerCustom from a new OSSSchedule."""
        slots = {
            slot.get("name"): (index, slot)
            for index, slot in enumerate(objects(node.get("inputs")))
        }
        wanted = {name: slots[name] for name, _ in OUTPUTS if name in slots}
        before = self._link((wanted.get("sigmas") or (0, {}))[1].get("link"))
        source = {} if before is None else self.nodes.get(_get(before, 1), {})
        if source.get("type") in CUTS:
            self.leave(_cut(key, node["type"], source["type"]))
            return
        new = 1 + max(
            [
                self.state.get("lastNodeId") or 0,
                *(each for each in self.nodes if isinstance(each, int)),
            ]
        )
        place = node.get("pos")
        x, y = [*place.values()][:2] if isinstance(place, dict) else (place or [0, 0])[:2]
        outputs: list[dict[str, Any]] = [
            {"name": name, "type": kind, "links": []} for name, kind in OUTPUTS
        ]
        for slot, (name, kind) in enumerate(OUTPUTS):
            if name not in wanted:
                continue
            index, given = wanted[name]
            if given.get("link") is not None:
                self._unlink(given["link"])
            self.last += 1
            self.links.append(self._new_link(self.last, new, slot, key, index, kind))
            given["link"] = self.last
            outputs[slot]["links"] = [self.last]
        made = {
            "id": new,
            "type": "OSSSchedule",
            "pos": [x - 340, y],
            "size": [315, 130],
            "flags": {},
            "order": 0,
            "mode": 0,
            "inputs": [{"name": "model", "type": "MODEL", "link": None}],
            "outputs": outputs,
            "properties": {},
            "widgets_values": [self.schedule, self.denoise, 0],
        }
        self._named(made, "OSSSchedule")
        self.graph["nodes"].append(made)
        self.nodes[new] = made
        for counts, name, value in self._counters(new):
            counts[name] = max(value, counts.get(name) or 0)
        self.say(
            f"node {key}: {node['type']} takes sigmas and sampler of the new node {new}, OSSSchedule"
        )

    def _counters(self, new: int) -> Iterator[tuple[dict[str, Any], str, int]]:
        if self.state:
            yield from ((self.state, "lastNodeId", new), (self.state, "lastLinkId", self.last))
        if "last_node_id" in self.graph:
            yield from ((self.graph, "last_node_id", new), (self.graph, "last_link_id", self.last))

    def _new_link(
        self, number: int, origin: int, slot: int, target: Any, index: int, kind: str
    ) -> Any:
        values = (number, origin, slot, target, index, kind)
        return [*values] if self.listed else dict(zip(PLACES, values, strict=True))

    def _link(self, number: Any) -> Any:
        return next(
            (link for link in self.links if number is not None and _get(link, 0) == number), None
        )

    def _unlink(self, number: Any) -> None:
        """Take a link away, at its origin too: a node's output, or an input of the subgraph."""
        self.links[:] = [link for link in self.links if _get(link, 0) != number]
        outputs = [slot for node in self.nodes.values() for slot in objects(node.get("outputs"))]
        for slot in [*outputs, *objects(self.graph.get("inputs"))]:
            for name in ("links", "linkIds"):
                if isinstance(slot.get(name), list):
                    slot[name] = [each for each in slot[name] if each != number]

    def _named(self, node: dict[str, Any], kind: str) -> None:
        node["type"] = kind
        node["properties"] = {**(node.get("properties") or {}), "Node name for S&R": kind}
        for name in ("cnr_id", "ver", "aux_id"):  # of the node that it was
            node["properties"].pop(name, None)


PLACES = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")


def _get(link: Any, place: int) -> Any:
    if isinstance(link, dict):
        return link.get(PLACES[place])
    return link[place] if isinstance(link, list) and len(link) > place else 0


def _set(link: Any, place: int, value: Any) -> None:
    link[PLACES[place] if isinstance(link, dict) else place] = value

"""Put a step schedule into a user's ComfyUI workflow, as saved or in the API format.

KSampler becomes OSS Sampler, with the same model, prompts, latents, seed and guidance.
SamplerCustom and SamplerCustomAdvanced stay, and take sigmas and sampler from a new OSS
Schedule.
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
CUTS = (  # nodes that change a list of sigmas
    *("SplitSigmas", "SplitSigmasDenoise", "FlipSigmas"),
    *("SetFirstSigma", "ExtendIntermediateSigmas"),
)
INPUTS = ("model", "seed", "cfg", "positive", "negative", "latent_image", "denoise")  # that stay
WIDGETS = ("seed", "control_after_generate", "steps", "cfg", "sampler_name", "scheduler", "denoise")
OUTPUTS = (("sigmas", "SIGMAS"), ("sampler", "SAMPLER"), ("about", "STRING"))  # of OSS Schedule
PLACES = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")  # of a link
Report = Callable[[str], None]


def with_schedule(file: str | Path, schedule: str, denoise: float = 1.0) -> tuple[str, list[str]]:
    """Return the text of a workflow's copy that samples by a schedule, and a report.

    Args:
        file: The workflow.
        schedule: Name of the schedule's file, as the nodes list it.
        denoise: Denoise that the schedule is for; samplers with another one stay.

    Returns:
        The text, and a line on each node that was changed or left.

    Raises:
        ValueError: The file is no workflow, or no node could be replaced.
    """
    # The file.
    name = f"workflow {file}"
    text = read_text(str(file), "workflow").lstrip("\ufeff")
    record = parse_record(text, TypeAdapter(dict[str, JsonValue]), name, REMEDY)
    content: Any = copy.deepcopy(record)

    # Its graphs.
    changes = list[str]()
    omissions = list[str]()
    reports = (changes.append, omissions.append)
    try:
        if isinstance(content.get("nodes"), list):
            subgraphs = (content.get("definitions") or {}).get("subgraphs")
            for graph in [content, *objects(subgraphs)]:
                _Saved(graph, schedule, denoise, *reports).replace()
        else:
            prompt = content.get("prompt")
            prompt = prompt if isinstance(prompt, dict) else content
            _Prompt(prompt, schedule, denoise, *reports).replace()
    except (AttributeError, LookupError, TypeError, ValueError):  # not laid out as ComfyUI does
        raise ValueError(f"{name} has damaged nodes or links; {REMEDY}") from None

    if not changes:
        problem = f"{name} has no sampler to replace (KSampler, {', '.join(CUSTOM)})"
        raise ValueError("\n".join([problem, *omissions]))
    return json.dumps(content, indent=2), [*changes, *omissions]


class _Graph:
    """A graph of nodes whose samplers are replaced.

    Args:
        graph: The graph, which is changed.
        schedule: Name of the schedule's file.
        denoise: Denoise that it is for.
        report: Called with a line on each node that is changed.
        omit: Called with a line on each sampler that is left as it is.
    """

    def __init__(
        self, graph: dict[str, Any], schedule: str, denoise: float, report: Report, omit: Report
    ):
        self.graph = graph
        self.schedule = schedule
        self.denoise = denoise
        self.report = report
        self.omit = omit

    def _matches(self, key: Any, denoise: Any) -> bool:
        """Return whether a KSampler has the schedule's denoise; report it if not."""
        if denoise == self.denoise:
            return True
        self.omit(
            f"node {key}: KSampler with denoise={denoise} is left as it is; "
            f"the schedule is for denoise={self.denoise:g}"
        )
        return False

    def _is_whole(self, key: Any, kind: str, source: Any) -> bool:
        """Return whether a node's sigmas come straight from a schedule; report it if not."""
        if source not in CUTS:
            return True
        self.omit(
            f"node {key}: {kind} takes a part of its sigmas, by {source}; "
            "put OSS Schedule before that by hand"
        )
        return False

    def _omit_other(self, key: Any, kind: str) -> None:
        """Report a node if it is a sampler that is not replaced."""
        if kind.startswith("KSampler") and kind != "KSamplerSelect":
            self.omit(f"node {key}: {kind} is left as it is; replace it by hand, by OSS Sampler")

    def _report_custom(self, key: Any, kind: str, number: Any) -> None:
        """Report a node that takes its sigmas from a new OSS Schedule."""
        self.report(
            f"node {key}: {kind} takes sigmas and sampler of the new node {number}, OSSSchedule"
        )


# ------------------------------------------------------------------------------
# The API format: {id: {class_type, inputs}}, where a link is [id, slot]
# ------------------------------------------------------------------------------


class _Prompt(_Graph):
    """A workflow in the API format."""

    def replace(self) -> None:
        """Replace the samplers."""
        for key, node in [*self.graph.items()]:
            if not isinstance(node, dict) or not isinstance(node.get("inputs"), dict):
                continue
            kind = node.get("class_type")
            if kind == "KSampler":
                self._sampler(key, node)
            elif kind in CUSTOM:
                self._custom(key, node)
            else:
                self._omit_other(key, str(kind))

    def _sampler(self, key: str, node: dict[str, Any]) -> None:
        """Turn a KSampler into an OSSSampler."""
        inputs = node["inputs"]
        if not self._matches(key, inputs.get("denoise", 1.0)):
            return
        stay = {name: inputs[name] for name in INPUTS if name in inputs}
        node["class_type"] = "OSSSampler"
        node["inputs"] = {**stay, "schedule": self.schedule}
        self.report(f"node {key}: KSampler is now OSSSampler")

    def _custom(self, key: str, node: dict[str, Any]) -> None:
        """Give a SamplerCustom sigmas and sampler from a new OSSSchedule."""
        kind, inputs = node["class_type"], node["inputs"]
        source = self._origin(inputs.get("sigmas"), {})
        if not self._is_whole(key, kind, source.get("class_type")):
            return

        # The new node.
        numbers = [int(name) for name in self.graph if name.isdecimal() and len(name) < 20]
        number = str(1 + max(numbers, default=0))
        schedule_inputs = {"schedule": self.schedule, "denoise": self.denoise}
        guider = self._origin(inputs.get("guider"), node)
        model = (guider.get("inputs") or {}).get("model")
        if isinstance(model, list):
            schedule_inputs["model"] = model
        self.graph[number] = {"class_type": "OSSSchedule", "inputs": schedule_inputs}

        # Its links.
        inputs |= {"sigmas": [number, 0], "sampler": [number, 1]}
        self._report_custom(key, kind, number)

    def _origin(self, link: Any, default: dict[str, Any]) -> dict[str, Any]:
        """Return the node that a link comes from."""
        return self.graph.get(link[0], {}) if isinstance(link, list) else default


# ------------------------------------------------------------------------------
# As saved: lists of nodes and of links, whose inputs and outputs know the links by number
# ------------------------------------------------------------------------------


class _Saved(_Graph):
    """A saved workflow, or a subgraph of one, in which links are objects and not lists."""

    def __init__(
        self, graph: dict[str, Any], schedule: str, denoise: float, report: Report, omit: Report
    ):
        super().__init__(graph, schedule, denoise, report, omit)
        self.nodes = {node.get("id"): node for node in objects(graph.get("nodes"))}
        links = graph.get("links")
        self.links: list[Any] = links if isinstance(links, list) else []
        self.state = graph["state"] if isinstance(graph.get("state"), dict) else {}

        # Whether links are lists, and the last one's number.
        self.as_lists = isinstance(self.links[0], list) if self.links else "state" not in graph
        counters = (self.state.get("lastLinkId") or 0, graph.get("last_link_id") or 0)
        self.last = max([*counters, *(_get(link, 0) for link in self.links)])

    def replace(self) -> None:
        """Replace the samplers."""
        for key, node in [*self.nodes.items()]:
            if node.get("mode") in MUTED:
                continue
            if node.get("type") == "KSampler":
                self._sampler(key, node)
            elif node.get("type") in CUSTOM:
                self._custom(key, node)
            else:
                self._omit_other(key, str(node.get("type")))

    def _sampler(self, key: Any, node: dict[str, Any]) -> None:
        """Turn a KSampler into an OSSSampler."""
        # Widgets.
        values = node.get("widgets_values")
        if isinstance(values, list):
            values = dict(zip(WIDGETS, values, strict=False))
        widgets = dict(values or {})
        if not self._matches(key, widgets.get("denoise", 1.0)):
            return
        seed = widgets.get("seed", 0)
        control = widgets.get("control_after_generate", "randomize")
        cfg = widgets.get("cfg", 1.0)
        node["widgets_values"] = [self.schedule, seed, control, cfg, self.denoise, 0]

        # Inputs.
        slots = objects(node.get("inputs"))
        for slot in slots:
            if slot.get("name") not in INPUTS and slot.get("link") is not None:
                self._unlink(slot["link"])
        node["inputs"] = [slot for slot in slots if slot.get("name") in INPUTS]
        for index, slot in enumerate(node["inputs"]):
            link = self._link(slot.get("link"))
            if link is not None:
                _set(link, 4, index)

        self._rename(node, "OSSSampler")
        self.report(f"node {key}: KSampler is now OSSSampler")

    def _custom(self, key: Any, node: dict[str, Any]) -> None:
        """Give a SamplerCustom sigmas and sampler from a new OSSSchedule."""
        # The present source of its sigmas.
        slots = {}
        for index, slot in enumerate(objects(node.get("inputs"))):
            slots[slot.get("name")] = (index, slot)
        _, sigmas = slots.get("sigmas", (0, {}))
        link = self._link(sigmas.get("link"))
        source = {} if link is None else self.nodes.get(_get(link, 1), {})
        if not self._is_whole(key, node["type"], source.get("type")):
            return

        # The new node's number and outputs.
        numbers = [name for name in self.nodes if isinstance(name, int)]
        number = 1 + max([self.state.get("lastNodeId") or 0, *numbers])
        outputs: list[dict[str, Any]] = []
        for place, (name, kind) in enumerate(OUTPUTS):
            output = {"name": name, "type": kind, "links": []}
            outputs.append(output)
            if name not in slots:
                continue

            index, slot = slots[name]
            if slot.get("link") is not None:
                self._unlink(slot["link"])
            self.last += 1
            self.links.append(self._new_link(self.last, number, place, key, index, kind))
            slot["link"] = self.last
            output["links"] = [self.last]

        self._add(number, node.get("pos"), outputs)
        self._report_custom(key, node["type"], number)

    def _add(self, number: int, position: Any, outputs: list[dict[str, Any]]) -> None:
        """Add an OSSSchedule to the left of a position, and count it."""
        if isinstance(position, dict):
            position = [*position.values()]
        x, y = (position or [0, 0])[:2]

        node = {
            "id": number,
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
        self._rename(node, "OSSSchedule")

        # The graph, which counts its nodes and links.
        self.graph["nodes"].append(node)
        self.nodes[number] = node
        for counts, name, value in self._counters(number):
            counts[name] = max(value, counts.get(name) or 0)

    def _counters(self, number: int) -> Iterator[tuple[dict[str, Any], str, int]]:
        """Yield the graph's counters of nodes and links with their new values."""
        if self.state:
            yield self.state, "lastNodeId", number
            yield self.state, "lastLinkId", self.last
        if "last_node_id" in self.graph:
            yield self.graph, "last_node_id", number
            yield self.graph, "last_link_id", self.last

    def _new_link(self, *values: Any) -> Any:
        """Return a link with the values of `PLACES`."""
        return [*values] if self.as_lists else dict(zip(PLACES, values, strict=True))

    def _link(self, number: Any) -> Any:
        """Return the link of this number, or None."""
        for link in self.links:
            if number is not None and _get(link, 0) == number:
                return link
        return None

    def _unlink(self, number: Any) -> None:
        """Remove a link, at its origin too: a node's output, or an input of the subgraph."""
        self.links[:] = [link for link in self.links if _get(link, 0) != number]
        origins = objects(self.graph.get("inputs"))
        for node in self.nodes.values():
            origins += objects(node.get("outputs"))
        for slot in origins:
            for name in ("links", "linkIds"):
                if isinstance(slot.get(name), list):
                    slot[name] = [link for link in slot[name] if link != number]

    def _rename(self, node: dict[str, Any], kind: str) -> None:
        """Set a node's type, and drop the names of its former package."""
        node["type"] = kind
        node["properties"] = {**(node.get("properties") or {}), "Node name for S&R": kind}
        for name in ("cnr_id", "ver", "aux_id"):
            node["properties"].pop(name, None)


def _get(link: Any, place: int) -> Any:
    """Return a value of a link, whichever form it has."""
    if isinstance(link, dict):
        return link.get(PLACES[place])
    return link[place] if isinstance(link, list) and len(link) > place else 0


def _set(link: Any, place: int, value: Any) -> None:
    """Set a value of a link, whichever form it has."""
    link[PLACES[place] if isinstance(link, dict) else place] = value

"""Lists of sigmas as people have them: typed, printed, or in the files of ComfyUI and of this package."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import JsonValue, TypeAdapter

from oss_exp.export.samplers import Network
from oss_exp.files import Record, parse_record, read_text

REMEDY = "give the list itself"

COMMENT = re.compile(r"(#|//).*")
SETTING = re.compile(r",\s*[a-z_]+\s*=\s*[^,()\[\]]*")  # device='cuda:0' in a printed tensor
WRAPPER = re.compile(
    r"(\b\w+\s*=)?\s*\b((torch|np|numpy)\.)?(tensor|array|float(16|32|64))\s*\(|^\s*\w+\s*[=:](?=[^=])"
)
NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", re.IGNORECASE)

# Nodes of ComfyUI that matter here -> the names of their widgets, in the order of a saved workflow.
WIDGETS = {
    "ManualSigmas": ("sigmas",),
    "CustomSigmas": ("sigmas_string", "interpolate_to_steps"),  # of KJNodes
    "KSamplerSelect": ("sampler_name",),
}
MUTED = (2, 4)  # modes of a saved node that is switched off, or passed by


class DiffusersFile(Record):
    """What exporter=diffusers wrote: the arguments of a call, and the times that they are for."""

    class Runs(Record):
        """sigmas: K + 1, as the scheduler runs them."""

        network: Network
        sigmas: list[float]

    scheduler: str
    runs: Runs


class ListFile(Record):
    """An object with a plain list."""

    sigmas: list[float]


@dataclass(frozen=True)
class Node:
    """A node of a ComfyUI file. values: of its widgets, without those that another node gives, the `linked`."""

    id: str
    kind: str
    values: Mapping[str, Any]
    linked: Collection[str] = ()

    @property
    def first(self) -> str | None:
        """The text of the first widget, None where it has none or another node gives it."""
        value = self.values.get(WIDGETS[self.kind][0])
        return value if isinstance(value, str) else None

    def sigmas(self, file: str) -> list[float]:
        """Return the list as ComfyUI runs it. ValueError, which names the file, where it is not in there."""
        where = f"{file}, node {self.id:.50} ({self.kind}),"
        if self.first is None:
            slot = f"{self.id:.50}.inputs.{WIDGETS[self.kind][0]}"
            if not self.linked:
                raise ValueError(
                    f"{where} has no list of sigmas in `{slot}`; type one into the node, or {REMEDY}"
                )
            raise ValueError(
                f"{where} gets `{slot}` from another node; give the list that comes out"
            )
        sigmas = numbers_in(self.first, where)
        if self.kind == "CustomSigmas":
            steps = self.values.get("interpolate_to_steps")
            if steps not in (0, None, len(sigmas) - 1):
                raise ValueError(
                    f"{where} interpolates its {len(sigmas)} numbers to {steps!r:.20} steps; give the list that comes "
                    f"out, or set interpolate_to_steps={len(sigmas) - 1} there"
                )
            if steps:
                sigmas[-1] = 0.0  # as the node does
        return sigmas


@dataclass(frozen=True)
class SigmaFile:
    """A list that was read. sampler: that its file runs it with, None where the file does not say."""

    sigmas: list[float]
    sampler: str | None = None


def read_sigmas(
    given: str | Sequence[float], network: Network = "flow", node: str | int | None = None
) -> list[float]:
    """Return the sigmas that are given, as a list, as text, or in a file. Arguments as of `read_list`."""
    return read_list(given, network, node).sigmas


def read_list(
    given: str | Sequence[float], network: Network = "flow", node: str | int | None = None
) -> SigmaFile:
    """Return the sigmas that are given, as a list, as text, or in a file.

    given:   numbers; text of them, with or without commas, brackets, `tensor(...)` and comments; or a file of such
             text, of ComfyUI (as saved, in its API format, or a request), or of exporter=diffusers.
    network: what the list is for, which a file of exporter=diffusers knows.
    node:    id of the node, for a ComfyUI file with several lists.
    """
    if not isinstance(given, str):
        return SigmaFile([float(sigma) for sigma in given])
    text, name = given, given if len(given) < 60 else f"{given[:57]}..."
    if given.endswith((".json", ".txt")) or (
        len(given) < 256 and "\n" not in given and Path(given).is_file()
    ):
        text, name = read_text(given, "list of sigmas"), f"list of sigmas {given}"
    if text.lstrip("\ufeff \t\r\n").startswith("{"):
        return _in_json(text, name, network, None if node is None else str(node))
    if node is not None:
        raise ValueError(f"task.node={node} is of a ComfyUI file, and {name} is none; leave it out")
    return SigmaFile(numbers_in(text, name))


def numbers_in(text: str, name: str) -> list[float]:
    """Return the numbers of a typed or printed list. ValueError where there is anything else in it."""
    lines = [COMMENT.sub("", line) for line in text.lstrip("\ufeff").splitlines()]
    plain = WRAPPER.sub(" ", SETTING.sub("", " ".join(lines)))
    words = re.sub(r"[\[\](){},;]", " ", plain).split()
    for word in words:
        if not NUMBER.fullmatch(word):
            raise ValueError(
                f"{name} is no list of sigmas ({word!r:.80}); give numbers with commas, noise first"
            )
    if not words:
        raise ValueError(f"{name} has no numbers; give numbers with commas, noise first")
    return [float(word) for word in words]


def _in_json(text: str, name: str, network: Network, chosen: str | None) -> SigmaFile:
    """Return the sigmas of an object in JSON."""
    text = text.lstrip("\ufeff")
    content = parse_record(text, TypeAdapter(dict[str, JsonValue]), name, REMEDY)
    if str(content.get("format")).startswith("oss_exp/"):
        what = (
            "a step schedule already"
            if content["format"] == "oss_exp/step_schedule"
            else "made of a step schedule"
        )
        raise ValueError(f"{name} is {what}, with more in it than a list; use the step schedule")
    if "scheduler" in content:
        remedy = "export it again, for earlier versions did not keep the scheduler's shift"
        runs = parse_record(text, DiffusersFile, name, remedy).runs
        if runs.network != network:
            raise ValueError(
                f"{name} is for a network of kind {runs.network}; set task.network={runs.network}"
            )
        return SigmaFile(runs.sigmas)
    if isinstance(content.get("sigmas"), list):
        if "times" in content:
            raise ValueError(
                f"{name} has both `sigmas` and `times`, of which one is a list to read; take out the other"
            )
        return SigmaFile(parse_record(text, ListFile, name, REMEDY).sigmas)
    return _in_workflow(content, name, chosen)


def _in_workflow(content: Mapping[str, Any], name: str, chosen: str | None) -> SigmaFile:
    """Return the sigmas of ComfyUI's node with this id, or of the only one, and the sampler beside it."""
    nodes = list(_nodes(content))
    lists = [node for node in nodes if node.kind != "KSamplerSelect"]
    if not lists:
        raise ValueError(
            f"{name} has no node ManualSigmas or CustomSigmas with a list of sigmas; {REMEDY}"
        )
    shown = "; ".join(
        f"{node.id:.20}: {node.first or ('from another node' if node.linked else 'no list'):.60}"
        for node in lists[:5]
    )
    candidates = [node for node in lists if chosen in (None, node.id)]
    if not candidates:
        raise ValueError(
            f"{name} has no list of sigmas in task.node={chosen:.50}; lists by node id: {shown}"
        )
    if len({(node.kind, *map(str, node.values.items())) for node in candidates}) > 1:
        raise ValueError(
            f"{name} has {len(lists)} lists of sigmas, by node id {shown}; choose one with task.node=ID"
        )
    samplers = {node.first for node in nodes if node.kind == "KSamplerSelect"}
    return SigmaFile(candidates[0].sigmas(name), samplers.pop() if len(samplers) == 1 else None)


def _nodes(content: Mapping[str, Any]) -> Iterator[Node]:
    """Yield the nodes that matter: of a saved workflow, of the API format, or of a request with that in `prompt`."""
    if isinstance(content.get("nodes"), list):
        definitions = content.get("definitions")
        subgraphs = definitions.get("subgraphs") if isinstance(definitions, dict) else None
        listed = subgraphs if isinstance(subgraphs, list) else []
        yield from _saved_nodes(
            content, {str(graph.get("id")): graph for graph in objects(listed)}, ""
        )
        return
    prompt = content.get("prompt")
    for key, node in (prompt if isinstance(prompt, dict) else content).items():
        if isinstance(node, dict) and str(node.get("class_type")) in WIDGETS:
            given = node.get("inputs")
            inputs = given if isinstance(given, dict) else {}
            linked = {name for name, value in inputs.items() if isinstance(value, list)}
            yield Node(key, str(node["class_type"]), inputs, linked)


def _saved_nodes(
    graph: Mapping[str, Any], subgraphs: Mapping[str, Any], prefix: str
) -> Iterator[Node]:
    """Yield the nodes of a saved workflow; those of a subgraph have the id of its place before their own, as 1:10."""
    for node in objects(graph.get("nodes")):
        key, kind = f"{prefix}{node.get('id')}", str(node.get("type"))
        if node.get("mode") in MUTED:
            continue
        if kind in WIDGETS:
            linked = {
                str(slot.get("name"))
                for slot in objects(node.get("inputs"))
                if slot.get("link") is not None
            }
            values = node.get("widgets_values")
            if isinstance(values, list):
                values = dict(zip(WIDGETS[kind], values, strict=False))
            values = values if isinstance(values, dict) else {}
            yield Node(
                key,
                kind,
                {name: value for name, value in values.items() if name not in linked},
                linked,
            )
        elif kind in subgraphs:
            others = {
                name: other for name, other in subgraphs.items() if name != kind
            }  # none holds itself
            yield from _saved_nodes(subgraphs[kind], others, f"{key}:")


def objects(values: Any) -> list[dict[str, Any]]:
    """Return the JSON objects of what should be a list of them."""
    return (
        [value for value in values if isinstance(value, dict)] if isinstance(values, list) else []
    )

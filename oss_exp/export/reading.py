"""Lists of sigmas as people have them: typed, printed, or in the files of ComfyUI and of this package."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
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

# Nodes of ComfyUI with a list of sigmas -> the name of the text, which is also their first widget.
SIGMA_NODES = {"ManualSigmas": "sigmas", "CustomSigmas": "sigmas_string"}
MUTED = (2, 4)  # modes of a saved node that is switched off, or passed by


class DiffusersFile(Record):
    """What exporter=diffusers wrote: the arguments of a call, and the times that they are for."""

    class Runs(Record):
        """sigmas: K + 1, as the scheduler runs them."""

        network: Network
        sigmas: list[float]

    scheduler: str
    runs: Runs


@dataclass(frozen=True)
class SigmaNode:
    """A node of a ComfyUI file: its list as text, None where another node gives it.

    steps: of CustomSigmas, to which it interpolates its list.
    """

    id: str
    kind: str
    text: str | None
    steps: int | None = None

    def sigmas(self) -> list[float]:
        """Return the list as ComfyUI runs it. ValueError where it is not in the file."""
        where = f"node {self.id} ({self.kind})"
        if self.text is None:
            raise ValueError(f"{where} gets its list from another node; give the list that comes out")
        sigmas = numbers_in(self.text, where)
        if self.kind == "CustomSigmas":
            if self.steps not in (0, None, len(sigmas) - 1):
                raise ValueError(
                    f"{where} interpolates its {len(sigmas)} numbers to {self.steps} steps; give the list that comes "
                    f"out, or set interpolate_to_steps={len(sigmas) - 1} there"
                )
            if self.steps:
                sigmas[-1] = 0.0  # as the node does
        return sigmas


def read_sigmas(given: str | Sequence[float], network: Network = "flow", node: str | int | None = None) -> list[float]:
    """Return the sigmas that are given, as a list, as text, or in a file.

    given:   numbers; text of them, with or without commas, brackets, `tensor(...)` and comments; or a file of such
             text, of ComfyUI (as saved, in its API format, or a request), or of exporter=diffusers.
    network: what the list is for, which a file of exporter=diffusers knows.
    node:    id of the node, for a ComfyUI file with several lists.
    """
    if not isinstance(given, str):
        return [float(sigma) for sigma in given]
    text, name = given, given if len(given) < 60 else f"{given[:57]}..."
    if given.endswith((".json", ".txt")) or (len(given) < 256 and "\n" not in given and Path(given).is_file()):
        text, name = read_text(given, "list of sigmas"), f"list of sigmas {given}"
    if text.lstrip("\ufeff \t\r\n").startswith("{"):
        return _in_json(text, name, network, None if node is None else str(node))
    if node is not None:
        raise ValueError(f"task.node={node} is of a ComfyUI file, and {name} is none; leave it out")
    return numbers_in(text, name)


def numbers_in(text: str, name: str) -> list[float]:
    """Return the numbers of a typed or printed list. ValueError where there is anything else in it."""
    lines = [COMMENT.sub("", line) for line in text.lstrip("\ufeff").splitlines()]
    plain = WRAPPER.sub(" ", SETTING.sub("", " ".join(lines)))
    words = re.sub(r"[\[\](){},;]", " ", plain).split()
    for word in words:
        if not NUMBER.fullmatch(word):
            raise ValueError(f"{name} is no list of sigmas ({word!r:.80}); give numbers with commas, noise first")
    if not words:
        raise ValueError(f"{name} has no numbers; give numbers with commas, noise first")
    return [float(word) for word in words]


def _in_json(text: str, name: str, network: Network, chosen: str | None) -> list[float]:
    """Return the sigmas of an object in JSON."""
    content = parse_record(text.lstrip("\ufeff"), TypeAdapter(dict[str, JsonValue]), name, REMEDY)
    if str(content.get("format")).startswith("oss_exp/"):
        what = "a step schedule already" if content["format"] == "oss_exp/step_schedule" else "made of a step schedule"
        raise ValueError(f"{name} is {what}, with more in it than a list; use the step schedule")
    if "scheduler" in content:
        remedy = "export it again, for earlier versions did not keep the scheduler's shift"
        runs = parse_record(text.lstrip("\ufeff"), DiffusersFile, name, remedy).runs
        if runs.network != network:
            raise ValueError(f"{name} is for a network of kind {runs.network}; set task.network={runs.network}")
        return runs.sigmas
    listed = content.get("sigmas")
    if isinstance(listed, list):
        return parse_record(text.lstrip("\ufeff"), TypeAdapter(Listed), name, REMEDY).sigmas

    # ComfyUI.
    nodes = list(_sigma_nodes(content))
    if chosen is not None:
        nodes = [node for node in nodes if node.id == chosen] or nodes[:0]
        if not nodes:
            ids = ", ".join(node.id for node in _sigma_nodes(content)) or "none"
            raise ValueError(f"{name} has no list of sigmas in task.node={chosen}; nodes with one: {ids}")
    if not nodes:
        raise ValueError(f"{name} has no node {' or '.join(SIGMA_NODES)} with a list of sigmas; {REMEDY}")
    if len(nodes) > 1 and len({(node.kind, node.text, node.steps) for node in nodes}) > 1:
        shown = "; ".join(f"{node.id}: {node.text or 'from another node':.100}" for node in nodes[:10])
        raise ValueError(f"{name} has {len(nodes)} lists of sigmas, by node id {shown}; choose one with task.node=ID")
    return nodes[0].sigmas()


class Listed(Record):
    """An object with a plain list."""

    sigmas: list[float]


def _sigma_nodes(content: Mapping[str, Any]) -> Iterator[SigmaNode]:
    """Yield the nodes with a list: of a saved workflow, of the API format, or of a request with that in `prompt`."""
    if isinstance(content.get("nodes"), list):
        definitions = content.get("definitions")
        subgraphs = definitions.get("subgraphs") if isinstance(definitions, dict) else None
        listed = subgraphs if isinstance(subgraphs, list) else []
        by_id = {str(graph.get("id")): graph for graph in listed if isinstance(graph, dict)}
        yield from _saved_nodes(content, by_id, "")
        return
    prompt = content.get("prompt")
    for key, node in (prompt if isinstance(prompt, dict) else content).items():
        kind = str(node.get("class_type")) if isinstance(node, dict) else ""
        if kind in SIGMA_NODES:
            inputs = node.get("inputs")
            inputs = inputs if isinstance(inputs, dict) else {}
            yield _node(key, kind, inputs.get(SIGMA_NODES[kind]), inputs.get("interpolate_to_steps"))


def _saved_nodes(graph: Mapping[str, Any], subgraphs: Mapping[str, Any], prefix: str) -> Iterator[SigmaNode]:
    """Yield the nodes of a saved workflow; those of a subgraph have the id of its place before their own, as 1:10."""
    nodes = graph.get("nodes")
    for node in nodes if isinstance(nodes, list) else ():
        if not isinstance(node, dict) or node.get("mode") in MUTED:
            continue
        key, kind = f"{prefix}{node.get('id')}", str(node.get("type"))
        if kind in SIGMA_NODES:
            text, steps = _widgets(node.get("widgets_values"), SIGMA_NODES[kind])
            slots = node.get("inputs")
            inputs = [slot for slot in slots if isinstance(slot, dict)] if isinstance(slots, list) else []
            linked = any(slot.get("name") == SIGMA_NODES[kind] and slot.get("link") is not None for slot in inputs)
            yield _node(key, kind, None if linked else text, steps)
        elif kind in subgraphs:
            others = {name: other for name, other in subgraphs.items() if name != kind}  # none holds itself
            yield from _saved_nodes(subgraphs[kind], others, f"{key}:")


def _widgets(values: Any, name: str) -> tuple[Any, Any]:
    """Return a saved node's list and its interpolate_to_steps: the first two widgets, or those of these names."""
    if isinstance(values, dict):
        return values.get(name), values.get("interpolate_to_steps")
    first, second, *_ = [*(values if isinstance(values, list) else ()), None, None]
    return first, second


def _node(key: str, kind: str, text: Any, steps: Any) -> SigmaNode:
    given = text if isinstance(text, str) else None
    whole = steps if kind == "CustomSigmas" and isinstance(steps, int) and not isinstance(steps, bool) else None
    return SigmaNode(key, kind, given, whole)

"""Read lists of sigmas: typed, printed, or in a file of ComfyUI or of this package."""

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
CALL = r"(\b\w+\s*=)?\s*\b((torch|np|numpy)\.)?(tensor|array|float(16|32|64))\s*\("
WRAPPER = re.compile(CALL + r"|^\s*\w+\s*[=:](?=[^=])")  # sigmas = torch.tensor( or sigmas:
NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", re.IGNORECASE)

# Nodes of ComfyUI that are read -> names of their widgets, in the order of a saved workflow.
WIDGETS = {
    "ManualSigmas": ("sigmas",),
    "CustomSigmas": ("sigmas_string", "interpolate_to_steps"),  # of KJNodes
    "KSamplerSelect": ("sampler_name",),
}
MUTED = (2, 4)  # modes of a saved node that is switched off or bypassed


class DiffusersFile(Record):
    """A file of exporter=diffusers: the arguments of a call, and the times that it runs."""

    class Runs(Record):
        """The K + 1 sigmas that the scheduler runs, and its kind of network."""

        network: Network
        sigmas: list[float]

    scheduler: str
    runs: Runs


class ListFile(Record):
    """A JSON object with a plain list."""

    sigmas: list[float]


@dataclass(frozen=True)
class Node:
    """A node of a ComfyUI file.

    Attributes:
        id: Its id; within a subgraph, after the id of that and a colon.
        kind: Its class.
        values: Values of its widgets, without those that another node gives.
        linked: Names of the inputs that another node gives.
    """

    id: str
    kind: str
    values: Mapping[str, Any]
    linked: Collection[str] = ()

    @property
    def first(self) -> str | None:
        """The text of the first widget; None if there is none or another node gives it."""
        value = self.values.get(WIDGETS[self.kind][0])
        return value if isinstance(value, str) else None

    def sigmas(self, file: str) -> list[float]:
        """Return the list as ComfyUI runs it.

        Args:
            file: Name of the file, for messages.

        Raises:
            ValueError: The node does not hold the list.
        """
        # The text.
        place = f"{file}, node {self.id:.50} ({self.kind}),"
        slot = f"{self.id:.50}.inputs.{WIDGETS[self.kind][0]}"
        if self.first is None and self.linked:
            raise ValueError(
                f"{place} gets `{slot}` from another node; give the list that comes out"
            )
        if self.first is None:
            raise ValueError(
                f"{place} has no list of sigmas in `{slot}`; type one into the node, or {REMEDY}"
            )

        # The numbers.
        sigmas = numbers_in(self.first, place)
        if self.kind != "CustomSigmas":
            return sigmas

        # The node's interpolation.
        count, steps = len(sigmas), self.values.get("interpolate_to_steps")
        if steps not in (0, None, count - 1):
            raise ValueError(
                f"{place} interpolates its {count} numbers to {steps!r:.20} steps; give the list "
                f"that comes out, or set interpolate_to_steps={count - 1} there"
            )
        if steps:
            sigmas[-1] = 0.0  # as the node does
        return sigmas


@dataclass(frozen=True)
class SigmaFile:
    """The content of a list's file.

    Attributes:
        sigmas: The list.
        sampler: The sampler that the file runs it with; None if it does not say.
    """

    sigmas: list[float]
    sampler: str | None = None


def read_sigmas(
    source: str | Sequence[float], network: Network = "flow", node: str | int | None = None
) -> list[float]:
    """Return the sigmas of a list, a text or a file; the arguments are those of `read_list`."""
    return read_list(source, network, node).sigmas


def read_list(
    source: str | Sequence[float], network: Network = "flow", node: str | int | None = None
) -> SigmaFile:
    """Return the sigmas of a list, a text or a file.

    Args:
        source: Numbers; a text of numbers, with or without commas, brackets,
            `tensor(...)` and comments; or a file of such text, of ComfyUI (as saved, in
            its API format, or a request), or of exporter=diffusers.
        network: Kind of network that the list is for; a file of exporter=diffusers has
            to agree.
        node: Id of the node, for a ComfyUI file with several lists.

    Raises:
        OSError: The file cannot be read.
        ValueError: The source holds no such list.
    """
    if not isinstance(source, str):
        return SigmaFile(list(map(float, source)))

    # The text and its name in messages.
    text, name = source, source if len(source) < 60 else f"{source[:57]}..."
    short = len(source) < 256 and "\n" not in source
    if source.endswith((".json", ".txt")) or (short and Path(source).is_file()):
        text, name = read_text(source, "list of sigmas"), f"list of sigmas {source}"

    # JSON, or numbers.
    if text.lstrip("\ufeff \t\r\n").startswith("{"):
        return _in_json(text, name, network, None if node is None else str(node))
    if node is not None:
        raise ValueError(f"task.node={node} is of a ComfyUI file, and {name} is none; leave it out")
    return SigmaFile(numbers_in(text, name))


def numbers_in(text: str, name: str) -> list[float]:
    """Return the numbers of a typed or printed list.

    Raises:
        ValueError: The text holds anything else.
    """
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
    return list(map(float, words))


def _in_json(text: str, name: str, network: Network, node: str | None) -> SigmaFile:
    """Return the sigmas of an object in JSON."""
    text = text.lstrip("\ufeff")
    content = parse_record(text, TypeAdapter(dict[str, JsonValue]), name, REMEDY)
    form = str(content.get("format"))
    if form.startswith("oss_exp/"):
        whole = form == "oss_exp/step_schedule"
        kind = "a step schedule already" if whole else "made of a step schedule"
        raise ValueError(f"{name} is {kind}, with more in it than a list; use the step schedule")

    # A file of exporter=diffusers.
    if "scheduler" in content:
        remedy = "export it again, for earlier versions did not keep the scheduler's shift"
        runs = parse_record(text, DiffusersFile, name, remedy).runs
        if runs.network != network:
            raise ValueError(
                f"{name} is for a network of kind {runs.network}; set task.network={runs.network}"
            )
        return SigmaFile(runs.sigmas)

    # A plain list, or a workflow.
    if isinstance(content.get("sigmas"), list):
        if "times" in content:
            raise ValueError(
                f"{name} has both `sigmas` and `times`, of which one is a list to read; "
                "take out the other"
            )
        return SigmaFile(parse_record(text, ListFile, name, REMEDY).sigmas)
    return _in_workflow(content, name, node)


def _in_workflow(content: Mapping[str, Any], name: str, choice: str | None) -> SigmaFile:
    """Return the sigmas of the node with this id, or of the only one, and the sampler beside it."""
    # All lists.
    nodes = list(_nodes(content))
    lists = [node for node in nodes if node.kind != "KSamplerSelect"]
    if not lists:
        raise ValueError(
            f"{name} has no node ManualSigmas or CustomSigmas with a list of sigmas; {REMEDY}"
        )

    excerpts = []
    for node in lists[:5]:
        missing = "from another node" if node.linked else "no list"
        excerpts.append(f"{node.id:.20}: {node.first or missing:.60}")
    excerpt = "; ".join(excerpts)

    # The chosen one.
    candidates = [node for node in lists if choice in (None, node.id)]
    if not candidates:
        raise ValueError(
            f"{name} has no list of sigmas in task.node={choice:.50}; lists by node id: {excerpt}"
        )
    if len({(node.kind, *map(str, node.values.items())) for node in candidates}) > 1:
        raise ValueError(
            f"{name} has {len(lists)} lists of sigmas, by node id {excerpt}; "
            "choose one with task.node=ID"
        )

    samplers = {node.first for node in nodes if node.kind == "KSamplerSelect"}
    return SigmaFile(candidates[0].sigmas(name), samplers.pop() if len(samplers) == 1 else None)


def _nodes(content: Mapping[str, Any]) -> Iterator[Node]:
    """Yield the nodes that are read, of a workflow as saved, in the API format, or in a request."""
    # As saved.
    if isinstance(content.get("nodes"), list):
        definitions = content.get("definitions")
        graphs = definitions.get("subgraphs") if isinstance(definitions, dict) else None
        subgraphs = {str(graph.get("id")): graph for graph in objects(graphs)}
        yield from _saved_nodes(content, subgraphs, "")
        return

    # The API format, which a request has in `prompt`.
    prompt = content.get("prompt")
    for key, node in (prompt if isinstance(prompt, dict) else content).items():
        if isinstance(node, dict) and str(node.get("class_type")) in WIDGETS:
            inputs = node.get("inputs")
            inputs = inputs if isinstance(inputs, dict) else {}
            linked = {name for name, value in inputs.items() if isinstance(value, list)}
            yield Node(key, str(node["class_type"]), inputs, linked)


def _saved_nodes(
    graph: Mapping[str, Any], subgraphs: Mapping[str, Any], prefix: str
) -> Iterator[Node]:
    """Yield the nodes of a saved workflow; `prefix` is the id of a subgraph's place, as "1:"."""
    for node in objects(graph.get("nodes")):
        key, kind = f"{prefix}{node.get('id')}", str(node.get("type"))
        if node.get("mode") in MUTED:
            continue
        if kind in WIDGETS:
            yield _saved_node(node, key, kind)
        elif kind in subgraphs:
            others = {**subgraphs}
            del others[kind]  # no subgraph holds itself
            yield from _saved_nodes(subgraphs[kind], others, f"{key}:")


def _saved_node(node: Mapping[str, Any], key: str, kind: str) -> Node:
    """Return a node of a saved workflow."""
    slots = objects(node.get("inputs"))
    linked = {str(slot.get("name")) for slot in slots if slot.get("link") is not None}
    values = node.get("widgets_values")
    if isinstance(values, list):
        values = dict(zip(WIDGETS[kind], values, strict=False))
    values = values if isinstance(values, dict) else {}
    free = {name: value for name, value in values.items() if name not in linked}
    return Node(key, kind, free, linked)


def objects(values: Any) -> list[dict[str, Any]]:
    """Return the JSON objects of what should be a list of them."""
    if not isinstance(values, list):
        return []
    return [value for value in values if isinstance(value, dict)]

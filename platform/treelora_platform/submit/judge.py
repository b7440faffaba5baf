"""What is made of a probe's report: a line for each thing that a job needs. Pure functions, nothing is asked here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from treelora_platform.config_sections import ClusterSettings
from treelora_platform.placement import room_for
from treelora_platform.submit.submission import SQLITE, Needs
from treelora_platform.submit.versions import at_odds, minor, public, satisfies

State = Literal["ok", "note", "failed"]
FREE_BYTES_NEEDED = 500_000_000
_HEADLINE = ("torch", "transformers", "peft", "deepspeed", "mlflow")


@dataclass(frozen=True)
class Check:
    """One line of the preflight."""

    name: str
    state: State
    text: str


def judge(
    report: Mapping[str, Any],
    needs: Needs,
    here: Mapping[str, str | None],
    conditions: Mapping[str, str],
    python: str,
) -> list[Check]:
    """All that the probe has seen, judged.

    Args:
        report: What `probe.look` returned.
        needs: What the job wants.
        here: This machine's versions, by package.
        conditions: What the project demands of versions, by package.
        python: This machine's Python.
    """
    known = sorted(report["nodes"], key=lambda node: (not node.get("head"), str(node.get("name"))))
    lost = [node for node in known if node.get("error")]
    nodes = [node for node in known if not node.get("error")]
    found = [Check("nodes", "failed", f"{_label(node)}: {node['error']}") for node in lost]
    if not nodes:
        return found
    found += python_check(nodes, python)
    found += package_checks(nodes, here, conditions)
    found += storage_check(report["head"], nodes, needs)
    found += data_checks(report["head"], nodes, needs)
    if needs.workers:
        found.append(resource_check(nodes, report.get("autoscaler"), needs))
    found.append(tracking_check(report["head"].get("tracking"), nodes, needs))
    return found


def python_check(nodes: Sequence[Mapping[str, Any]], python: str) -> list[Check]:
    """The same major and minor version everywhere."""
    others = [node for node in nodes if minor(node["python"]) != minor(python)]
    if others:
        text = ", ".join(f"{_label(node)} has {node['python']}" for node in others)
        return [
            Check("Python", "failed", f"{python} here, but {text}; install {minor(python)} there, or that one here")
        ]
    return [Check("Python", "ok", f"{minor(python)} here and on {_count(len(nodes), 'node')}")]


def package_checks(
    nodes: Sequence[Mapping[str, Any]], here: Mapping[str, str | None], conditions: Mapping[str, str]
) -> Iterator[Check]:
    """What the project requires is there, new enough, and the same on all nodes."""
    bad = False
    for node in nodes:
        missing = [name for name, version in node["packages"].items() if version is None]
        if missing:
            bad = True
            yield Check("packages", "failed", f"{_label(node)} has no {', '.join(missing)}; install them there")
        for name, version in node["packages"].items():
            if version is not None and not satisfies(version, conditions.get(name, "")):
                bad = True
                yield Check("packages", "failed", f"{_label(node)} has {name} {version}, needed is {conditions[name]}")
    for name, groups in at_odds({_label(node): node["packages"] for node in nodes}).items():
        bad = True
        text = ", ".join(f"{version} on {' and '.join(names)}" for version, names in groups.items())
        yield Check("packages", "failed", f"{name} differs between nodes: {text}; install one version")
    if bad:
        return
    there = nodes[0]["packages"]
    headline = ", ".join(f"{name} {there[name]}" for name in _HEADLINE if there.get(name))
    differing = [
        f"{name} {there[name]} (here {version})"
        for name, version in here.items()
        if version and there.get(name) and public(version) != public(there[name])
    ]
    if differing:
        yield Check("packages", "note", f"equal on all nodes, but not those of this machine: {', '.join(differing)}")
    else:
        yield Check("packages", "ok", f"{_count(len(there), 'package')} equal on all nodes and here: {headline}")


def storage_check(head: Mapping[str, Any], nodes: Sequence[Mapping[str, Any]], needs: Needs) -> Iterator[Check]:
    """The output folder takes what every node writes, and shows it to every other; or the storage answers on each."""
    where = needs.output_dir
    if head.get("error"):
        yield Check("storage", "failed", f"{where} can't be written to on the head ({head['error']}); mount it there")
        return
    if needs.storage:
        faults = [f"the head: {head['storage']}"] if head.get("storage") else []
        faults += [f"{_label(node)}: {node['storage']}" for node in nodes if node.get("storage")]
        if faults:
            yield Check("storage", "failed", "; ".join(faults))
        else:
            yield Check("storage", "ok", f"{needs.storage} answers on {_count(len(nodes), 'node')}")
        return
    faults = [f"{_label(node)} {node['why']}" for node in nodes if not node.get("wrote")]
    names = {node["id"]: _label(node) for node in nodes if "id" in node}
    faults += [
        f"{_label(node)} doesn't see what {', '.join(names.get(one, one) for one in node['missing'])} wrote"
        for node in nodes
        if node.get("missing")
    ]
    if faults:
        remedy = "mount one shared folder there on all nodes, give another with output_dir, or set cluster.storage"
        yield Check("storage", "failed", f"{where} isn't shared: {'; '.join(faults)}; {remedy}")
        return
    free = head["free_bytes"]
    if free < FREE_BYTES_NEEDED:
        yield Check(
            "storage", "failed", f"{where} has {free / 1e6:.0f} MB free, {FREE_BYTES_NEEDED / 1e6:.0f} MB are needed"
        )
        return
    how = "written on each node and read on all others" if len(nodes) > 1 else "written and read"
    yield Check("storage", "ok", f"{where}: {how}, {free / 1e9:.0f} GB free")


def data_checks(head: Mapping[str, Any], nodes: Sequence[Mapping[str, Any]], needs: Needs) -> Iterator[Check]:
    """Data where the driver reads them, the model's folder where the workers do."""
    for path in needs.head_paths:
        yield _seen("data", path, [("the head", head["paths"].get(path, False))])
    for path in needs.node_paths:
        yield _seen("model", path, [(_label(node), node["paths"].get(path, False)) for node in nodes])


def _seen(name: str, path: str, by: Sequence[tuple[str, bool | str]]) -> Check:
    blind = [f"{who} ({why})" if isinstance(why, str) else who for who, why in by if why is not True]
    if not blind:
        return Check(name, "ok", f"{path}: visible")
    only_here = " but by this machine" if Path(path).exists() else ""
    return Check(
        name, "failed", f"{path} isn't seen by {', '.join(blind)}{only_here}; copy it to storage that the cluster sees"
    )


def resource_check(nodes: Sequence[Mapping[str, Any]], autoscaler: Mapping[str, Any] | None, needs: Needs) -> Check:
    """Room for all workers, each of them whole on one node."""
    share = {"CPU": needs.cpus, "GPU": needs.gpus}
    wanted = f"{_count(needs.workers, 'worker')} of {_amounts(share)}"
    room = sum(fits(node["resources"], needs) for node in nodes)
    now = sum(fits(node["free"], needs) for node in nodes)
    if room >= needs.workers:
        if now < needs.workers:
            return Check("resources", "note", f"{wanted}: room for {room}, for {now} at the moment; the job will wait")
        return Check("resources", "ok", f"{wanted}: room for {room}")
    has = ", ".join(f"{_label(node)} {_amounts(node['resources'])}" for node in nodes)
    if needs.least_workers is not None and room >= needs.least_workers:
        return Check(
            "resources",
            "note",
            f"{wanted}: room for {room}; cluster.min_workers {needs.least_workers} lets it go on with fewer",
        )
    if autoscaler and autoscaler["kind"] == "KubeRay":
        return Check("resources", "note", f"{wanted}: room for {room} now; what KubeRay may add isn't known here")
    if autoscaler:
        later = room + added(autoscaler, needs)
        if later >= needs.workers:
            return Check(
                "resources", "ok", f"{wanted}: room for {room} now, for {later} when the autoscaler adds nodes"
            )
        has += f"; with the autoscaler {later} at most"
    return Check(
        "resources",
        "failed",
        f"{wanted}: room for {room} ({has}); lower cluster.workers, cluster.cpus_per_worker or "
        "cluster.gpus_per_worker, or add nodes",
    )


def fits(resources: Mapping[str, float], needs: Needs) -> int:
    """Workers that fit on one node."""
    share = ClusterSettings(cpus_per_worker=needs.cpus, gpus_per_worker=needs.gpus)
    return room_for(share, [resources])


def added(autoscaler: Mapping[str, Any], needs: Needs) -> int:
    """Workers for which nodes may be added, the roomiest kinds of nodes first."""
    left, found = autoscaler["most"], 0
    for kind in sorted(autoscaler["types"], key=lambda kind: fits(kind["resources"], needs), reverse=True):
        count = min(left, kind["most"])
        left -= count
        found += count * fits(kind["resources"], needs)
    return found


def tracking_check(uri: str | None, nodes: Sequence[Mapping[str, Any]], needs: Needs) -> Check:
    """MLflow answers every node that may log to it."""
    if uri is None:
        return Check("MLflow", "failed", "no address: give --uri, or set MLFLOW_TRACKING_URI on the cluster's nodes")
    deaf = [f"{_label(node)} ({node['tracking']})" for node in nodes if node.get("tracking")]
    if deaf:
        return Check("MLflow", "failed", f"{uri} can't be used by {', '.join(deaf)}; start it, or give another address")
    if uri.startswith(("http://", "https://")):
        return Check("MLflow", "ok", f"{uri}: answers {_count(len(nodes), 'node')}")
    if uri.startswith(SQLITE) and needs.workers and len(nodes) > 1:
        return Check(
            "MLflow",
            "note",
            f"{uri}: a file on shared storage, which network file systems may damage when several nodes write; better "
            "a server, in tracking.uri or MLFLOW_TRACKING_URI",
        )
    if uri.startswith(SQLITE):
        return Check("MLflow", "ok", uri)
    return Check("MLflow", "note", f"{uri}: whether the nodes reach it can't be tried from here")


def _label(node: Mapping[str, Any]) -> str:
    return f"{node.get('name', 'a node')} (head)" if node.get("head") else str(node.get("name", "a node"))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _amounts(resources: Mapping[str, float]) -> str:
    parts = [
        f"{amount:g} {kind}" if amount == 1 else f"{amount:g} {kind}s" for kind, amount in resources.items() if amount
    ]
    return " and ".join(parts) or "nothing"

"""Which runs are held against which: groups, their replicates, pairs across groups. Pure functions of records.

A group is all runs that agree in the fields of `--by`; its replicates differ in task order and seed. Two runs of two
groups are a pair if nothing parts them but what parts the groups as such.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from treelora.errors import DataError
from treelora_platform.experiments.fields import (
    DATA,
    MACHINE,
    ORDER,
    REPLICATE,
    check_keys,
    field,
    matching,
    settings,
    show_values,
    sort_key,
)
from treelora_platform.experiments.records import RunRecord

Settings = Mapping[str, Mapping[str, str]]
"""By run id: the fields that bear on scores and aren't the same in all runs."""
_NAMED = 4  # runs that a remark names


@dataclass(frozen=True)
class Group:
    """Runs that agree in the fields they are grouped by, each configuration, order and seed once."""

    label: str
    """For tables: `treelora, lora.rank=4`."""
    name: str
    """In full: `method=treelora, lora.rank=4`."""
    values: tuple[str | None, ...]
    runs: tuple[RunRecord, ...]


@dataclass(frozen=True)
class Selection:
    """Runs that may be compared, and what had to be left out."""

    by: tuple[str, ...]
    groups: tuple[Group, ...]
    settings: Settings
    remarks: tuple[str, ...]
    everyone: tuple[Group, ...] = ()
    """The groups with the runs on other tasks, where there are such; else empty."""
    common: tuple[str, ...] = ()
    """Slugs of the tasks that all runs of `everyone` have."""


@dataclass(frozen=True)
class Pairing:
    """Runs of two groups that differ in nothing else; each side has one run, or several that are averaged."""

    pairs: tuple[tuple[tuple[RunRecord, ...], tuple[RunRecord, ...]], ...]
    keys: tuple[str, ...]
    """What both sides of a pair have in common, beside all that is the same in all runs."""
    also: dict[str, tuple[str, str]]
    """What parts the groups beside the fields they are grouped by, and the values in either."""
    parted: tuple[str, ...]
    """Where there is no pair: the keys of which the groups share no value."""


def select(records: Sequence[RunRecord], by: Sequence[str], filters: Sequence[str] = ()) -> Selection:
    """Filter, leave out what can't be compared, and group.

    Raises:
        DataError: a field that no run has, a condition that no run fits, or no run with scores is left.
    """
    by = tuple(dict.fromkeys(by))
    check_keys(by, records, "--by")
    chosen, remarks = _measured(matching(records, filters))
    lacking = [run for run in chosen if all(field(run, key) is None for key in by)]
    if lacking:
        chosen = [run for run in chosen if any(field(run, key) is not None for key in by)]
        remarks.append(f"Left out, because they have no {' or '.join(by)}: {_listed(lacking)}.")
    if not chosen:
        raise DataError("; ".join(["no run is left to compare", *(remark.rstrip(".") for remark in remarks)]))
    table = _varying({run.run_id: settings(run) for run in chosen}, chosen)
    newest = _newest(chosen, by, table)
    if len(newest) < len(chosen):
        remarks.append(
            f"Left out, because they were done again later with the same settings: {_listed(_older(chosen, newest))}."
        )
    kept = _same_tasks(newest, by)
    everyone: tuple[Group, ...] = ()
    common: frozenset[str] = frozenset()
    if len(kept) < len(newest):
        common = frozenset.intersection(*(run.task_set for run in newest))
        everyone = _groups(newest, by)
        remarks.append(_other_tasks(kept, newest, common))
    groups = _groups(kept, by)
    remarks += _within(groups, by, table) + _machines(kept)
    return Selection(by, groups, table, tuple(remarks), everyone, tuple(sorted(common)))


def _measured(runs: Sequence[RunRecord]) -> tuple[list[RunRecord], list[str]]:
    unfinished = [run for run in runs if not run.finished]
    ended = [run for run in runs if run.finished]
    short = [run for run in ended if 0 < _learnt(run) < len(run.tasks)]
    bare = [run for run in ended if not any(found.op is not None for found in run.scores.values())]
    out = {run.run_id for run in (*unfinished, *short, *bare)}
    remarks = [
        f"Left out, because {why}: {_listed(found)}."
        for why, found in (
            ("they have not finished", unfinished),
            ("they ended before the last task", short),
            ("they have no scores", bare),
        )
        if found
    ]
    return [run for run in runs if run.run_id not in out], remarks


def _learnt(run: RunRecord) -> int:
    return max((len(scores) for scores in run.task_scores.values()), default=0)


def _listed(runs: Sequence[RunRecord]) -> str:
    states = {run.status for run in runs}
    named = ", ".join(run.name if states == {"FINISHED"} else f"{run.name} ({run.status})" for run in runs[:_NAMED])
    more = ", ..." if len(runs) > _NAMED else ""
    return f"{len(runs)} run{'s' if len(runs) > 1 else ''} ({named}{more})"


def _varying(found: Mapping[str, Mapping[str, str]], runs: Sequence[RunRecord]) -> Settings:
    """Only fields that aren't the same in all runs; a seed that follows the experiment's says nothing of its own."""
    keys = {key for own in found.values() for key in own}
    varying = {key for key in keys if len({own.get(key) for own in found.values()}) > 1}
    varying -= {
        key for key in varying
        if key.endswith(".seed") and all(own.get(key) in (None, own.get("seed")) for own in found.values())
    }  # fmt: skip
    return {run.run_id: {k: v for k, v in found[run.run_id].items() if k in varying} for run in runs}


def _newest(runs: Sequence[RunRecord], by: Sequence[str], table: Settings) -> list[RunRecord]:
    newest: dict[object, RunRecord] = {}
    for run in sorted(runs, key=lambda run: run.start_unix_ms):
        newest[_values(run, by), frozenset(table[run.run_id].items())] = run
    return sorted(newest.values(), key=lambda run: run.start_unix_ms)


def _older(runs: Sequence[RunRecord], newest: Sequence[RunRecord]) -> list[RunRecord]:
    ids = {run.run_id for run in newest}
    return [run for run in runs if run.run_id not in ids]


def _values(run: RunRecord, by: Sequence[str]) -> tuple[str | None, ...]:
    return tuple(field(run, key) for key in by)


def _same_tasks(runs: Sequence[RunRecord], by: Sequence[str]) -> list[RunRecord]:
    """The largest set of runs on the same tasks; one with something to compare goes first."""
    by_tasks: dict[frozenset[str], list[RunRecord]] = {}
    for run in runs:
        by_tasks.setdefault(run.stream_set, []).append(run)

    def worth(found: list[RunRecord]) -> tuple[bool, int, int]:
        return len({_values(run, by) for run in found}) > 1, len(found), found[-1].start_unix_ms

    return max(by_tasks.values(), key=worth)


def _other_tasks(kept: Sequence[RunRecord], runs: Sequence[RunRecord], common: frozenset[str]) -> str:
    """What was left out for its tasks, and whether anything of it can still be compared."""
    others: dict[frozenset[str], int] = {}
    for run in runs:
        if run.stream_set != kept[0].stream_set:
            others[run.stream_set] = others.get(run.stream_set, 0) + 1
    listed = "; ".join(
        f"{count} run{'s' if count > 1 else ''} on {', '.join(sorted(tasks)) or 'unknown tasks'}"
        for tasks, count in sorted(others.items(), key=lambda item: -item[1])
    )
    still = f"on {', '.join(sorted(common))}, which all have, their last scores are beside each other below"
    return (
        f"The runs are on different tasks. Compared are {len(kept)} on {', '.join(sorted(kept[0].stream_set))}. "
        f"Left out: {listed}; {still if common else 'no task is in all of them'}."
    )


def _groups(runs: Sequence[RunRecord], by: Sequence[str]) -> tuple[Group, ...]:
    found: dict[tuple[str | None, ...], list[RunRecord]] = {}
    for run in runs:
        found.setdefault(_values(run, by), []).append(run)
    ordered = sorted(found.items(), key=lambda item: tuple(map(sort_key, item[0])))
    return tuple(Group(_label(by, values), _name(by, values), values, tuple(own)) for values, own in ordered)


def _label(by: Sequence[str], values: Sequence[str | None]) -> str:
    shown = [(key, value) for key, value in zip(by, values, strict=True) if value is not None]
    return ", ".join(value if key == "method" else f"{key}={value}" for key, value in shown)


def _name(by: Sequence[str], values: Sequence[str | None]) -> str:
    return ", ".join(f"{key}={'none' if value is None else value}" for key, value in zip(by, values, strict=True))


def _within(groups: Sequence[Group], by: Sequence[str], table: Settings) -> list[str]:
    """Fields beside order and seed in which the runs of a group differ."""
    found: dict[str, list[str]] = {}
    for group in groups:
        own = [table[run.run_id] for run in group.runs]
        for key in sorted({key for one in own for key in one} - {*by, *REPLICATE}):
            values = {one.get(key) for one in own}
            if len(values) > 1:
                found.setdefault(key, []).append(f"{group.name} ({show_values(values)})")
    remarks = [
        f"{key} varies within {', '.join(where[:3])}{' and others' if len(where) > 3 else ''}: "
        "means are over all of these; add it to --by, or filter."
        for key, where in found.items()
    ]
    data: dict[object, set[str | None]] = {}
    for group in groups:
        for run in group.runs:
            alike = frozenset(item for item in table[run.run_id].items() if item[0] != DATA)
            data.setdefault((group.values, alike), set()).add(run.tags.get(DATA))
    if changed := sum(len(hashes) > 1 for hashes in data.values()):
        cases = f"{changed} case{'s' if changed > 1 else ''}"
        remarks.append(
            f"Runs that agree in all settings have different data (data_hash), in {cases}: all of them count."
        )
    return remarks


def _machines(runs: Sequence[RunRecord]) -> list[str]:
    """What makes times differ, and which states of the source made the runs."""
    remarks = []
    keys = sorted({key for run in runs for key in run.params if key.partition(".")[0] in MACHINE})
    for key in [*keys, "tags.version.hardware"]:
        values = {run.value(key) for run in runs} - {None}
        if len(values) > 1:
            remarks.append(f"{key.removeprefix('tags.')} differs ({show_values(values)}): compare scores, not times.")
    commits = {run.tags.get("version.commit", "unknown") for run in runs}
    if len(commits) > 1:
        remarks.append(f"The runs were made with {len(commits)} states of the source: {show_values(commits)}.")
    return remarks


def pair_up(group: Group, reference: Group, by: Sequence[str], table: Settings) -> Pairing:
    """Pair the runs of two groups.

    Runs are paired by order, seed, data, and by every field that varies within one of the groups; several runs of a
    group that agree in all these are one side of a pair. What the other group doesn't have at all, such as its
    method's settings, parts nothing.
    """
    mine, theirs = ([table[run.run_id] for run in side.runs] for side in (group, reference))
    skipped = set(by)
    if any(key in (*REPLICATE, "tasks") or key.startswith("stream.") for key in by):
        skipped |= {DATA} | ({ORDER} if "stream.order" in by else set())
    keys, also = [], {}
    for key in sorted({key for own in (*mine, *theirs) for key in own} - skipped):
        a, b = ({own.get(key) for own in side} for side in (mine, theirs))
        if key in REPLICATE:
            keys.append(key)
        elif {None} in (a, b):
            continue
        elif len(a) > 1 or len(b) > 1:
            keys.append(key)
        elif a != b:
            also[key] = show_values(a), show_values(b)

    def sides(side: Group) -> dict[tuple[str | None, ...], list[RunRecord]]:
        found: dict[tuple[str | None, ...], list[RunRecord]] = {}
        for run in side.runs:
            found.setdefault(tuple(table[run.run_id].get(key) for key in keys), []).append(run)
        return found

    ours, others = sides(group), sides(reference)
    shared = sorted(ours.keys() & others.keys(), key=lambda values: tuple(map(sort_key, values)))
    parted = [k for i, k in enumerate(keys) if not {v[i] for v in ours} & {v[i] for v in others}]
    pairs = tuple((tuple(ours[values]), tuple(others[values])) for values in shared)
    return Pairing(pairs, tuple(keys), also, () if pairs else tuple(parted or keys))

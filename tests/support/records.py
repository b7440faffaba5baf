"""Records of runs that nobody made, with as much said as a test needs."""

from __future__ import annotations

from itertools import count

from treelora_platform.experiments.records import RunRecord, record_from

_numbers = count(1)


def record(
    method: str = "treelora",
    order: str = "a, b",
    seed: int = 0,
    op: float | dict[str, float] | None = 50.0,
    *,
    bwt: float | None = None,
    seconds: float | None = None,
    tasks: dict[str, float] | None = None,
    status: str = "FINISHED",
    name: str | None = None,
    tags: dict[str, str] | None = None,
    start: int | None = None,
    **params: object,
) -> RunRecord:
    """A run; `op` of the mode `last`, or by mode; `tasks`: last scores by slug; `__` in a parameter is a dot.

    Later calls started later, unless `start` (ms) says otherwise. The data follow order and seed.
    """
    number = next(_numbers)
    by_mode = op if isinstance(op, dict) else {} if op is None else {"last": op}
    metrics = {f"final/op/{mode}": value for mode, value in by_mode.items()}
    metrics |= {f"score/last/{slug}": score for slug, score in (tasks or {}).items()}
    metrics |= {"final/bwt/last": bwt} if bwt is not None else {}
    metrics |= {"final/seconds": seconds, "final/tokens": 1000.0} if seconds is not None else {}
    own_tags = {"method": method, "order": order, "seed": str(seed), "data_hash": f"data of {order} {seed}"}
    return record_from(
        run_id=f"{number:032x}",
        name=name or f"{method}-{number}",
        status=status,
        start_unix_ms=number * 1000 if start is None else start,
        end_unix_ms=None,
        params={"method": method, "seed": str(seed)} | {k.replace("__", "."): str(v) for k, v in params.items()},
        tags=own_tags | (tags or {}),
        metrics=metrics,
        artifact_uri="",
    )

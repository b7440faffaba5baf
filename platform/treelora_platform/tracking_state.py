"""What tracking remembers of a run (`tracking.json`), and what it may tell a server. No MLflow here."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from treelora.data.parquet import write_bytes_atomically
from treelora.errors import DataError
from treelora_platform.config import MethodName
from treelora_platform.redaction import hide_credentials, is_secret

Status = Literal["FINISHED", "FAILED", "KILLED"]

STATE_FILE = "tracking.json"
VALUE_CHARS = 500
CUT = "…"
"""The last character of a value that was too long for MLflow."""
KEY_CHARS = 250  # MLflow refuses longer ones
# Sections that runs are compared by. Paths, addresses and the importers' free-form options, which may hold
# credentials, stay out.
PARAMETERS = (
    *("name", "seed", "method", "sweep", "stream", "model", "lora", "train", "engine"),
    *("vision", "evaluation", "checkpoint", "cluster"),
    *get_args(MethodName),
)
_LEFT_OUT = ("stream.options", "cluster.storage")


def order_tag(names: Sequence[str]) -> str:
    """Tasks in order as one tag: a plain list, or JSON where that could be misread."""
    plain = ", ".join(names)
    return plain if tasks_of(plain) == tuple(names) else json.dumps(list(names), ensure_ascii=False)


def tasks_of(order: str) -> tuple[str, ...]:
    """The tasks in such a tag; of one that was cut for its length those that are whole."""
    cut = order.endswith(CUT)
    if order.startswith("["):
        whole = order.removesuffix(CUT).rpartition(', "')[0] + "]" if cut else order
        try:
            return tuple(map(str, json.loads(whole)))
        except ValueError:
            return ()
    names = order.removesuffix(CUT).split(", ")
    return tuple(name for name in (names[:-1] if cut else names) if name)


@dataclass(frozen=True)
class RunPlan:
    """All that is needed to open a run later; `key` is what makes opening it twice harmless."""

    experiment: str
    run_name: str
    params: dict[str, str]
    tags: dict[str, str]
    parent_run_id: str | None = None
    key: str = field(default_factory=lambda: uuid.uuid4().hex)


@dataclass(frozen=True)
class Finish:
    """How a run ended; artifacts are relative to the run directory where they lie in it."""

    status: Status
    end_time_ms: int
    artifacts: tuple[str, ...]


@dataclass(frozen=True)
class State:
    """What `tracking.json` holds. `steps_until` is the last global step that the server has."""

    tracking_uri: str | None = None
    run_id: str | None = None
    steps_until: int = -1
    scores_rows: int = 0
    plan: RunPlan | None = None
    finish: Finish | None = None

    @classmethod
    def load(cls, run_dir: Path) -> State:
        """The stored state, or a new one.

        Raises:
            DataError: the file is damaged; it may be deleted, since the server knows what it has.
        """
        path = run_dir / STATE_FILE
        try:
            plain = json.loads(path.read_text(encoding="utf-8"))
            plan, finish = plain.pop("plan"), plain.pop("finish")
            if finish:
                finish["artifacts"] = tuple(finish["artifacts"])
            return cls(**plain, plan=RunPlan(**plan) if plan else None, finish=Finish(**finish) if finish else None)
        except FileNotFoundError:
            return cls()
        except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
            raise DataError(f"{path}: can't be read ({error}); put run.json's mlflow_run_id in a new one") from None

    def save(self, run_dir: Path) -> None:
        """Write atomically: a reader sees this state or the one before."""
        write_bytes_atomically(run_dir / STATE_FILE, json.dumps(asdict(self), indent=1).encode())


def loggable_params(params: Mapping[str, Any]) -> dict[str, str]:
    """What a server may see: known sections, flat, without secrets, values of 500 characters at most."""
    return {
        clean_key(key): _short(value)
        for key, value in flatten(params)
        if key.split(".")[0] in PARAMETERS and not key.startswith(_LEFT_OUT) and not is_secret(key)
    }


def loggable_tags(tags: Mapping[str, str]) -> dict[str, str]:
    """Tags without secrets, values of 500 characters at most."""
    return {clean_key(key): _short(value) for key, value in tags.items() if not is_secret(key)}


def clean_key(key: str) -> str:
    """`key` in the characters and the length that MLflow takes for names of parameters, tags and metrics."""
    return re.sub(r"[^\w.\- /]", "_", key).strip("./ ")[:KEY_CHARS] or "_"


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    text = hide_credentials(text)
    return text if len(text) <= VALUE_CHARS else text[: VALUE_CHARS - 1] + CUT


def flatten(params: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values; an empty mapping is a value."""
    for key, value in params.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value

"""Submitting a run that is kept in a storage: no folder need be shared, and every node must reach the storage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.streams import tiny_config
from treelora.errors import ConfigError
from treelora_platform.submit.judge import Check, storage_check
from treelora_platform.submit.probe import _storage_fault
from treelora_platform.submit.submission import Needs, load_submission

ADDRESS = "s3://bucket/runs"


def submitted(tmp_path: Path, *overrides: str) -> Needs:
    path = tmp_path / "config.yaml"
    path.write_text(tiny_config(Path("/shared/runs")).as_yaml())
    return load_submission(str(path), overrides).needs


def test_with_a_storage_each_node_may_have_a_folder_of_its_own(tmp_path: Path) -> None:
    assert submitted(tmp_path).storage is None
    needs = submitted(tmp_path, f"cluster.storage={ADDRESS}", "output_dir=~/runs")
    assert (needs.storage, needs.output_dir) == (ADDRESS, "~/runs")
    assert submitted(tmp_path, f"cluster.storage={ADDRESS}").output_dir == "/shared/runs"
    for overrides in (["output_dir=~/runs"], [f"cluster.storage={ADDRESS}", "output_dir=runs"]):
        with pytest.raises(ConfigError, match="would be lost with the job's folder"):
            submitted(tmp_path, *overrides)
    with pytest.raises(ConfigError, match=r"or by cluster\.storage"):
        submitted(tmp_path, f"output_dir={ADDRESS}")


def judged(head: str | None, *nodes: str | None) -> Check:
    found: dict[str, Any] = {"free_bytes": 5e9, "storage": head}
    [check] = storage_check(
        found,
        [{"id": str(i), "name": f"n{i}", "storage": fault} for i, fault in enumerate(nodes)],
        Needs("~/runs", storage=ADDRESS),
    )
    return check


def test_a_storage_that_a_node_does_not_reach_is_named_with_the_node() -> None:
    assert judged(None, None, None) == Check("storage", "ok", f"{ADDRESS} answers on 2 nodes")
    failed = judged("no answer", None, "access denied")
    assert failed.state == "failed"
    assert failed.text.startswith("the head: no answer; ")
    assert failed.text.endswith(": access denied")
    assert "n1" in failed.text


def test_a_node_says_why_a_storage_cannot_be_used(tmp_path: Path) -> None:
    assert _storage_fault(None) is None
    assert _storage_fault((tmp_path / "runs").as_uri()) is None
    (tmp_path / "file").write_text("")
    assert "not a directory" in (_storage_fault((tmp_path / "file" / "runs").as_uri()) or "")

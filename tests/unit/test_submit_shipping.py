"""What travels to the cluster, and what doesn't."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import treelora
import treelora_platform
from treelora.errors import ConfigError
from treelora_platform.submit import shipping
from treelora_platform.submit.shipping import (
    PACKAGES,
    runtime_env,
    stage_files,
    stage_package,
    travelling_tracking_uri,
)

ROOTS = {"treelora": Path(treelora.__file__).parent, "treelora_platform": Path(treelora_platform.__file__).parent}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An importable package `shipped_thing` with what must stay here."""
    root = tmp_path / "site" / "shipped_thing"
    for name in ("__init__.py", "part/code.py", "part/page.j2", "__pycache__/code.pyc", "tests/test_code.py"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    for name in (".env", "part/.secret", "old.pyc"):
        (root / name).write_text("hunter2")
    monkeypatch.syspath_prepend(tmp_path / "site")
    return root


def names(folder: Path) -> set[str]:
    """All files, with those in linked folders."""
    walk = os.walk(folder, followlinks=True)
    return {(Path(place) / file).relative_to(folder).as_posix() for place, _, files in walk for file in files}


def test_the_installed_package_is_shipped_whole(tmp_path: Path) -> None:
    staged = stage_package(tmp_path)
    assert [folder.name for folder in staged.folders] == list(PACKAGES)
    for folder in staged.folders:
        source = {name for name in names(ROOTS[folder.name]) if "__pycache__" not in name}
        assert names(folder) == source
        assert all((folder / name).read_bytes() == (ROOTS[folder.name] / name).read_bytes() for name in source)
    assert staged.files == sum(len(names(folder)) for folder in staged.folders)
    assert staged.bytes == sum((folder / name).stat().st_size for folder in staged.folders for name in names(folder))
    assert {"templates/report.html.j2", "configs/demo.yaml"} <= names(staged.folders[1])


def test_the_copy_can_be_imported_on_its_own(tmp_path: Path) -> None:
    staged = stage_package(tmp_path)
    code = "import treelora, treelora_platform.submit.entry as e; print(treelora.__file__); print(e.__file__)"
    path = {"PYTHONPATH": str(tmp_path), "PATH": "", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=path, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert all(line.startswith(str(tmp_path)) for line in done.stdout.splitlines())
    assert len(staged.folders) == len(done.stdout.splitlines())


def test_caches_tests_and_hidden_files_stay_here(package: Path, tmp_path: Path) -> None:
    staged = stage_package(tmp_path / "out", ("shipped_thing",))
    assert names(tmp_path / "out") == {
        f"shipped_thing/{name}" for name in ("__init__.py", "part/code.py", "part/page.j2")
    }
    assert staged.files == 3


def test_links_are_followed_and_circles_are_not(package: Path, tmp_path: Path) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "one.yaml").write_text("{}")
    (package / "configs").symlink_to(tmp_path / "recipes")
    (package / "part" / "again").symlink_to(package)
    stage_package(tmp_path / "out", ("shipped_thing",))
    found = names(tmp_path / "out" / "shipped_thing")
    assert "configs/one.yaml" in found
    assert not any(name.startswith("part/again") for name in found)


def test_the_digest_is_of_names_and_contents_alone(package: Path, tmp_path: Path) -> None:
    def digest(folder: str) -> str:
        return stage_package(tmp_path / folder, ("shipped_thing",)).digest

    first = digest("a")
    (package / "__init__.py").touch()
    (package / "tests" / "more.py").write_text("x")
    assert digest("b") == first
    (package / "part" / "code.py").write_text("changed")
    changed = digest("c")
    (package / "part" / "code.py").rename(package / "part" / "renamed.py")
    assert len({first, changed, digest("d")}) == 3


def test_a_large_package_is_refused_with_the_culprit(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shipping, "MOST_BYTES", 3_000_000)
    (package / "part" / "weights.bin").write_bytes(b"x" * 4_000_000)
    with pytest.raises(ConfigError, match=r"has 4 MB in 4 files, where 3 MB .*part/weights.bin \(4 MB\)"):
        stage_package(tmp_path / "out", ("shipped_thing",))
    assert not (tmp_path / "out").exists()


def test_what_is_not_there_cannot_be_shipped(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'no_such_package' isn't installed as a folder"):
        stage_package(tmp_path, ("no_such_package",))


def test_the_working_folder_holds_the_jobs_files_and_no_others(tmp_path: Path) -> None:
    folder = tmp_path / "job"
    folder.mkdir()
    (folder / "old").write_text("old")
    stage_files(folder, {"config.yaml": "name: ä\n", "recipes/base.yaml": "{}"})
    assert names(folder) == {"config.yaml", "recipes/base.yaml"}
    assert (folder / "config.yaml").read_text(encoding="utf-8") == "name: ä\n"


def test_credentials_in_a_file_are_refused_and_not_repeated(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        stage_files(tmp_path / "job", {"config.yaml": "stream:\n  path: s3://key:hunter2@bucket/tasks\n"})
    assert "config.yaml: s3://***@bucket/tasks has a user or password" in str(refused.value)
    assert "hunter2" not in str(refused.value)


def test_a_servers_address_travels_and_a_file_doesnt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert travelling_tracking_uri() == (None, None)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    assert travelling_tracking_uri() == ("http://mlflow:5000", None)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
    uri, remark = travelling_tracking_uri()
    assert uri is None
    assert "stays here" in str(remark)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:hunter2@mlflow")
    with pytest.raises(ConfigError, match="set it on the cluster's nodes") as refused:
        travelling_tracking_uri()
    assert "hunter2" not in str(refused.value)


def test_the_runtime_environment_names_what_matters_and_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hunter2")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "hunter2")
    staged = stage_package(tmp_path / "package")
    env = runtime_env(staged, tmp_path / "job", "http://mlflow:5000", "c0ffee")
    assert env["working_dir"] == str(tmp_path / "job")
    assert env["py_modules"] == [str(tmp_path / "package" / name) for name in PACKAGES]
    assert env["env_vars"]["RAY_TRAIN_V2_ENABLED"] == "1"
    assert env["env_vars"]["MLFLOW_TRACKING_URI"] == "http://mlflow:5000"
    assert int(env["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"]) > 60
    assert env["env_vars"]["TREELORA_COMMIT"] == "c0ffee"
    assert "hunter2" not in str(env)
    assert "MLFLOW_TRACKING_URI" not in runtime_env(staged, tmp_path, None, "c0ffee")["env_vars"]

"""What may import what, what must stay light, and what no file may hold."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
MAX_LINES = 400
# Folders of the machines that this is written on, but not the home in Ray's images. Assembled, so that this file
# doesn't hold them itself.
FORBIDDEN = re.compile("|".join(["/" + "work/", "/" + "root/", "/" + r"home/(?!ray\b)\w+/", "/" + r"tmp/\w"]))


def tracked() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    paths = [REPOSITORY / name for name in listed.stdout.split("\0") if name]
    return [path for path in paths if path.is_file() and not path.is_symlink()]


TEXT = {".py", ".md", ".yaml", ".yml", ".toml", ".txt", ".j2", ".cfg", ".sh", ".json", ".ipynb", ""}


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_contracts() -> None:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.search(r"Contracts: (\d+) kept, 0 broken", done.stdout)
    assert found
    assert int(found[1]) >= 3


def test_the_standard_librarys_platform_wins() -> None:
    """The folder `platform/` is a source root; as a package it would shadow the module and break torch and ray."""
    assert not (REPOSITORY / "platform" / "__init__.py").exists()
    code = "import sys; sys.path.insert(0, ''); import platform; print(platform.system(), platform.__file__)"
    system, file = run_python(code).split()
    assert system in ("Linux", "Darwin", "Windows")
    assert not Path(file).is_relative_to(REPOSITORY / "platform")


HEAVY = ("torch", "ray", "transformers", "deepspeed", "mlflow", "peft", "pyarrow", "datasets", "sklearn", "matplotlib")


def test_help_is_quick() -> None:
    code = f"""
import contextlib, io, json, sys
from treelora_platform.cli import app
out = io.StringIO()
with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
    app(["run", "--help"])
print(json.dumps([[name for name in {HEAVY} if name in sys.modules], "CONFIG" in out.getvalue()]))
"""
    assert json.loads(run_python(code).splitlines()[-1]) == [[], True]


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("treelora", HEAVY),
        ("treelora.memory", ("transformers", "ray", "sklearn")),
        ("treelora.loop", ("transformers", "ray", "deepspeed", "mlflow", "peft", "datasets", "sklearn", "matplotlib")),
        ("treelora.methods", ("transformers", "ray", "deepspeed", "mlflow", "peft", "datasets", "sklearn")),
        ("treelora_platform.config", HEAVY),
        ("treelora_platform.guardian", HEAVY),
        ("treelora_platform.attempts", ("torch", "deepspeed", "mlflow", "transformers")),  # driver and controller
        ("treelora_platform.trainer", ("torch", "deepspeed", "mlflow", "transformers")),
        ("treelora_platform.engine", ("mlflow",)),
        ("treelora_platform.checkpoint", ("ray", "deepspeed", "mlflow", "transformers")),
    ],
)
def test_imports_stay_light(module: str, forbidden: tuple[str, ...]) -> None:
    code = f"import sys, json, {module}; print(json.dumps([n for n in {forbidden} if n in sys.modules]))"
    assert json.loads(run_python(code).splitlines()[-1]) == []


def test_no_file_names_a_machines_folders() -> None:
    found = [
        f"{path.relative_to(REPOSITORY)}:{number}: {line.strip()[:100]}"
        for path in tracked()
        if path.suffix in TEXT
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if FORBIDDEN.search(line)
    ]
    assert found == []


def test_files_are_short() -> None:
    long = {
        str(path.relative_to(REPOSITORY)): lines
        for path in tracked()
        if path.suffix == ".py" and (lines := len(path.read_text(encoding="utf-8").splitlines())) > MAX_LINES
    }
    assert long == {}


def test_no_pickle_and_no_eval_in_the_sources() -> None:
    pattern = re.compile(r"^\s*(import|from) (pickle|cloudpickle|dill|marshal|shelve)\b|(?<![\w.])(eval|exec)\(")
    found = [
        f"{path.relative_to(REPOSITORY)}: {line.strip()}"
        for root in ("treelora", "platform", "jobs")
        for path in (REPOSITORY / root).rglob("*.py")
        for line in path.read_text(encoding="utf-8").splitlines()
        if pattern.search(line)
    ]
    assert found == []

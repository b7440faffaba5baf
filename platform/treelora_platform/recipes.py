"""Recipes by name: the configurations of `jobs/configs`, shipped with the package."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).resolve().parent / "configs"


def recipe_path(name: str, folder: str = ".") -> Path:
    """The file that is meant: a path as it is, or the recipe of that name where no such file exists.

    Args:
        name: A path or a name.
        folder: Of the recipes' own, such as `sweeps`.
    """
    path = Path(name).expanduser()
    packaged = FOLDER / folder / f"{name}.yaml"
    return packaged if not path.exists() and packaged.exists() else path

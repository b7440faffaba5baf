"""What a sweep costs beside its trials: n trials in one `treelora sweep` against the same n runs by hand, one by one.

Both sides run in turn, each in an empty folder with the same configurations; a trial takes the whole machine, so that
neither side runs two at once. `python benchmarks/sweep_overhead.py --trials 3`
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

from treelora_platform.sweep.space import grid
from treelora_platform.sweep.spec import parse_sweep, template, trial_config

TREELORA = [sys.executable, "-m", "treelora_platform"]


def main() -> None:
    """Print both sides and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=3, help="how many trials; default: %(default)s")
    parser.add_argument("--recipe", default="demo", help="what each of them runs; default: %(default)s")
    parser.add_argument("overrides", nargs="*", default=["train.steps=4"], help="fields of the configuration")
    args = parser.parse_args()
    overrides = {key: yaml.safe_load(value) for key, _, value in (text.partition("=") for text in args.overrides)}
    plain = {"name": "sweep", "recipe": args.recipe, "overrides": overrides, "search": "grid", "concurrency": 1}
    spec = parse_sweep(plain | {"space": {"seed": list(range(args.trials))}})
    base = template(spec)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        configs = [trial_config(base, values, str(folder / "by-hand")) for values in grid(spec)]
        print(f"{args.trials} runs of {args.recipe}, {configs[0].cluster.workers} workers each", flush=True)
        begin = time.monotonic()
        for config in configs:
            path = folder / f"{config.name}.yaml"
            path.write_text(config.as_yaml(), encoding="utf-8")
            run([*TREELORA, "run", str(path)])
        by_hand = time.monotonic() - begin
        print(f"  by hand, one after the other: {by_hand:7.1f} s", flush=True)
        recipe = folder / "recipe.yaml"
        recipe.write_text(yaml.safe_dump(base | {"output_dir": str(folder / "swept")}), encoding="utf-8")
        sweep = folder / "sweep.yaml"
        sweep.write_text(
            yaml.safe_dump(spec.model_dump(mode="json") | {"recipe": str(recipe), "overrides": {}}), encoding="utf-8"
        )
        begin = time.monotonic()
        run([*TREELORA, "sweep", str(sweep)])
        swept = time.monotonic() - begin
        print(f"  as one sweep:                 {swept:7.1f} s")
        print(f"  ratio:                        {swept / by_hand:7.2f}")


def run(command: list[str]) -> None:
    """Run a command; show what it said where it failed."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)


if __name__ == "__main__":
    main()

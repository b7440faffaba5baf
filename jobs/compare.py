"""A comparison as a cluster entry point: `python jobs/compare.py EXPERIMENT [--by KEY] --out FOLDER`.

It reads MLflow alone: give `--uri`, or set MLFLOW_TRACKING_URI.
"""

import sys

from treelora_platform.cli import app

if __name__ == "__main__":
    app(["compare", *sys.argv[1:]])

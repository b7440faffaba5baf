"""A sweep as a cluster entry point: `python jobs/sweep.py SWEEP [key=value ...]`.

`ray job submit` runs this on the head, with RAY_ADDRESS set; the recipe's output_dir must be storage that all nodes
see.
"""

import sys

from treelora_platform.cli import app

if __name__ == "__main__":
    app(["sweep", *sys.argv[1:]])

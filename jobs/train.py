"""One experiment as a cluster entry point: `python jobs/train.py CONFIG [key=value ...]`.

`ray job submit` runs this on the head, with RAY_ADDRESS set; output_dir must be storage that all nodes see.
"""

import sys

from treelora_platform.cli import app

if __name__ == "__main__":
    app(["run", *sys.argv[1:]])

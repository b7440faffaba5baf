"""Submit an experiment or a sweep to a Ray cluster: `python jobs/submit.py CONFIG --address http://HEAD:8265`.

It sends the package that is installed here and follows the job's log; its exit code is the job's.
"""

import sys

from treelora_platform.cli import app

if __name__ == "__main__":
    app(["submit", *sys.argv[1:]])

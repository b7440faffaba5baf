"""The tree actor with a scale under it. A file of its own, because its process imports what this imports."""

from __future__ import annotations

from pathlib import Path

from treelora_platform.tree_keeper import TreeKeeper


def resident() -> dict[str, float]:
    """MiB of this process: now, of that Ray's object store, which all processes of the node share, and at the peak."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    kib = {line[0].rstrip(":"): float(line[1]) for line in lines if len(line) == 3 and line[2] == "kB"}
    return {"resident": kib["VmRSS"] / 1024, "shared": kib["RssShmem"] / 1024, "peak": kib["VmHWM"] / 1024}


class MeasuredKeeper(TreeKeeper):
    """`TreeKeeper` that tells its size."""

    def resident(self) -> dict[str, float]:
        """See the function."""
        return resident()

    def nothing(self, call: bytes) -> bytes:
        """As many bytes as a step's call and answer, and no work: what Ray itself takes."""
        return call + call

    def changes(self) -> int:
        """Made since the memory was opened."""
        return self._number

"""Ends with 1 if pip is about to install CUDA packages on a machine without a GPU: gigabytes that nothing could use.

Run by the interpreter of the environment that is about to be filled; pip resolves torch and installs nothing.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

RESOLVE = ["install", "--dry-run", "--quiet", "--report", "-", "-c", "constraints.txt", "torch"]
WAY_OUT = """error: pip would install CUDA packages ({names}, ...), and this machine has no GPU
  name an index with torch's CPU builds (torch's own install page has its address), and run this again:
  PIP_EXTRA_INDEX_URL=ADDRESS make ...
"""


def main() -> int:
    """The exit code: 1 where CUDA packages would come and no GPU is here, pip's own where it cannot resolve torch."""
    if Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi"):
        return 0
    resolved = subprocess.run([sys.executable, "-m", "pip", *RESOLVE], capture_output=True, text=True)
    if resolved.returncode:
        sys.stderr.write(resolved.stderr)
        return resolved.returncode
    names = [package["metadata"]["name"] for package in json.loads(resolved.stdout)["install"]]
    cuda = [name for name in names if name.lower().startswith(("nvidia", "cuda", "triton"))]
    if cuda:
        sys.stderr.write(WAY_OUT.format(names=", ".join(cuda[:3])))
    return 1 if cuda else 0


if __name__ == "__main__":
    sys.exit(main())

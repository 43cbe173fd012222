"""`python3 -m dataplane.ebpf OBJECT`: prints as JSON which programs the kernel accepts.

The exit code is 0 if it accepts all, 1 if it refuses one, and 2 if they could not be loaded.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from dataplane.ebpf.probe import PROGRAMS, probe_kernel
from dataplane.errors import DataplaneError


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        sys.stderr.write("usage: python3 -m dataplane.ebpf OBJECT\n")
        return 2
    try:
        support = probe_kernel(Path(arguments[0]))
    except DataplaneError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    names = [name for group in PROGRAMS.values() for name in group]
    answer = {
        "kernel": os.uname().release,
        "programs": {name: support.refused.get(name, "accepted") for name in names},
        "refused": support.refused,
        "lacking": support.lacking,
        "stages": list(support.stages),
        "why_not": support.why_not,
    }
    sys.stdout.write(json.dumps(answer, indent=2) + "\n")
    return 1 if support.refused else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The probe's code as what a container is started with: a command, and variables with its text.

So an image needs Python and nothing of FreeFlow's, and all probes have this version's code.
"""

from __future__ import annotations

import base64
import json
import zlib
from pathlib import Path
from typing import Final

from plugin.network_test.probe.path_worker import BOOT, CODE, ROLE

_PACKAGE: Final = "plugin.network_test.probe"
_MODULES: Final = (
    "probe_wire",
    "own_interfaces",
    "data_server",
    "measurements",
    "spoof",
    "path_worker",
    "queue_pair",
    "probe_server",
    "probe_gateway",
)
"""Each after those that it imports."""
PROBE: Final = "probe"
GATEWAY: Final = "gateway"

_TEXT: Final = f"""
import base64, json, os, sys, types, zlib
def module(name, text):
    made = sys.modules[name] = types.ModuleType(name)
    above, _, own = name.rpartition(".")
    if above:
        setattr(sys.modules[above], own, made)
    if text is None:
        made.__path__ = []
    else:
        exec(compile(text, name, "exec"), made.__dict__)
for name, text in json.loads(zlib.decompress(base64.b64decode(os.environ["{CODE}"]))):
    module(name, text)
role = os.environ["{ROLE}"]
if role == "{PROBE}":
    from {_PACKAGE}.probe_server import main
    main()
elif role == "{GATEWAY}":
    from {_PACKAGE}.probe_gateway import main
    main()
else:
    from {_PACKAGE}.path_worker import main
    main(role)
"""

COMMAND: Final = ("python3", "-c", _TEXT)


def environment(role: str, key: bytes, name: str = "") -> dict[str, str]:
    """The variables of a container with this part; `name` is what it says to be."""
    packages = _PACKAGE.split(".")
    modules: list[tuple[str, str | None]] = [
        (".".join(packages[: depth + 1]), None) for depth in range(len(packages))
    ]
    folder = Path(__file__).with_name("probe")
    modules += [(f"{_PACKAGE}.{each}", (folder / f"{each}.py").read_text()) for each in _MODULES]
    return {
        # The library is for the processes that the probe starts with it.
        "FREEFLOW": "off",
        ROLE: role,
        # Docker would look for its templates ({{…}}) in plain text.
        CODE: base64.b64encode(zlib.compress(json.dumps(modules).encode())).decode(),
        BOOT: _TEXT,
        "FREEFLOW_TEST_KEY": key.hex(),
        "FREEFLOW_TEST_NAME": name,
        "PYTHONUNBUFFERED": "1",
    }

"""What two of our libraries agree on changes together with its version."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Final

LIBRARY: Final = Path(__file__).parents[2] / "dataplane/library"
AGREED: Final = ("services.h", "verbs_protocol.h", "place.h", "view.h")
"""The headers with structures that one passes to the other."""
DIGESTS: Final = {4: "fe5759d2dace281f"}
"""What those headers say, by SERVICES_VERSION."""


WRAPPED: Final = LIBRARY.parent / "verbs/virtual.h"
WRAPPED_DIGESTS: Final = {2: "253831e187020b49"}
"""What libibverbs.so.1 and its companion agree on, by the number at the end of VIRTUAL_NAME."""


def code(header: Path) -> str:
    """A header without its comments, and with single spaces only."""
    text = header.read_text(encoding="utf-8")
    return " ".join(re.sub(r"/\*.*?\*/", " ", text, flags=re.DOTALL).split())


def test_the_version_changes_with_what_it_names() -> None:
    """A program that has loaded one of the two before an update, and the other one after it, finds
    no device instead of structures that it misreads. If this fails, raise SERVICES_VERSION, and
    write down its digest in place of the one before.
    """
    agreed = {name: code(LIBRARY / name) for name in AGREED}
    version = re.search(r"\bSERVICES_VERSION = (\d+)", agreed["services.h"])
    assert version
    digest = hashlib.sha256("\n".join(agreed.values()).encode()).hexdigest()[:16]
    assert {int(version[1]): digest} == DIGESTS


def test_the_name_changes_with_the_calls_that_are_wrapped() -> None:
    """A program with another companion than its libibverbs.so.1 has none, instead of one that calls
    what is not there. If this fails, raise the number at the end of VIRTUAL_NAME.
    """
    said = code(WRAPPED)
    version = re.search(r'VIRTUAL_NAME "freeflow_virtual_files_(\d+)"', said)
    assert version
    assert {int(version[1]): hashlib.sha256(said.encode()).hexdigest()[:16]} == WRAPPED_DIGESTS

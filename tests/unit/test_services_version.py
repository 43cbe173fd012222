"""What libfreeflow.so and libibverbs.so.1 agree on changes together with its version."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Final

LIBRARY: Final = Path(__file__).parents[2] / "dataplane/library"
AGREED: Final = ("services.h", "verbs_protocol.h", "place.h", "view.h")
"""The headers with structures that one passes to the other."""
DIGESTS: Final = {3: "c98550eb4907ae4d"}
"""What those headers say, by SERVICES_VERSION."""


def code(name: str) -> str:
    """A header without its comments, and with single spaces only."""
    text = (LIBRARY / name).read_text(encoding="utf-8")
    return " ".join(re.sub(r"/\*.*?\*/", " ", text, flags=re.DOTALL).split())


def test_the_version_changes_with_what_it_names() -> None:
    """A program that has loaded one of the two before an update, and the other one after it, finds
    no device instead of structures that it misreads. If this fails, raise SERVICES_VERSION, and
    write down its digest in place of the one before.
    """
    agreed = {name: code(name) for name in AGREED}
    version = re.search(r"\bSERVICES_VERSION = (\d+)", agreed["services.h"])
    assert version
    digest = hashlib.sha256("\n".join(agreed.values()).encode()).hexdigest()[:16]
    assert {int(version[1]): digest} == DIGESTS

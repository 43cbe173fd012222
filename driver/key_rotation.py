"""When a host changes the key by which it encrypts, and when it makes the next one. Pure.

Of the two keys of a host one is active, the other is the standby key, which all peers know already.
A rotation makes the standby key the active one. The former key is kept for a while, for packets on
the way and for peers that hear of it late; then a new standby key takes its place. So a key is used
for one period and is destroyed soon after.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final

KEPT: Final = 300.0
"""Seconds for which a former key is kept, but at most half a period."""
GRACE: Final = 3600.0
"""Seconds, but at most a period, for which a step waits for peers that are not ready for it."""


class KeyStep(Enum):
    """What to do now."""

    NONE = 0
    RENEW = 1
    """Replace the former key by a new standby key."""
    ROTATE = 2
    """Make the standby key the active one."""


@dataclass(frozen=True, slots=True)
class KeyAge:
    """`rotated`: when the active key became active, in seconds. `former`: the other key is the
    former one, still to be replaced."""

    rotated: float
    former: bool = False


def step(age: KeyAge, now: float, period: float, *, ready: bool) -> KeyStep:
    """The step that is due. `period` 0: keys stay.

    `ready`: all peers have used the standby key; of a former key: all have been told that it is
    not used any more.
    """
    if not period:
        return KeyStep.NONE
    elapsed = now - age.rotated - (0.0 if ready else min(GRACE, period))
    if age.former:
        return KeyStep.RENEW if elapsed >= min(KEPT, period / 2) else KeyStep.NONE
    return KeyStep.ROTATE if elapsed >= period else KeyStep.NONE

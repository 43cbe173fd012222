"""What a container needs to load the libraries: a mount, and variables of its loader.

The libraries are preloaded, because so they also stand before those that an image has itself. musl
searches for a library of a name even if one is preloaded (ldso/dynlink.c, load_library), and would
load the image's own beside ours. There LD_LIBRARY_PATH leads the search to ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

FOLDER: Final = "/run/freeflow"
LIBRARY: Final = "libfreeflow.so"
VERBS_FOLDER: Final = f"{FOLDER}/verbs"
VERBS_LIBRARY: Final = "libibverbs.so.1"
PRELOAD: Final = f"{FOLDER}/{LIBRARY}"
VERBS: Final = (f"{VERBS_FOLDER}/{VERBS_LIBRARY}", f"{VERBS_FOLDER}/libibverbs.so")
"""The second one is for programs that open libibverbs by this name, or the files of its device."""


def variables(
    before: Mapping[str, str | None], image: Mapping[str, str], *, verbs: bool, musl: bool
) -> dict[str, str]:
    """The variables that a service needs, by name: those that aren't right yet.

    `before` are the service's own, None being the value where `docker stack deploy` runs; `image`
    are its image's, which a service's variable replaces.
    """
    wanted = {"LD_PRELOAD": (PRELOAD, *VERBS) if verbs else (PRELOAD,)}
    if verbs and musl:
        wanted["LD_LIBRARY_PATH"] = (VERBS_FOLDER,)
    found = {}
    for name, paths in wanted.items():
        # A dollar sign would begin a variable of the file.
        own = before.get(name, image.get(name, "").replace("$", "$$"))
        value = _with(f"${{{name}-}}" if own is None else own, paths)
        if before.get(name) != value:
            found[name] = value
    return found


def options(image: Mapping[str, str], *, verbs: bool = False, musl: bool = False) -> list[str]:
    """The options of `docker run` and `docker service create` for an image with these variables."""
    found = ["--mount", f"type=bind,src={FOLDER},dst={FOLDER}"]
    for name, value in variables({}, image, verbs=verbs, musl=musl).items():
        text = value.replace("$$", "$")
        found += ["--env", f"{name}={':'.join(text.split()) if name == 'LD_PRELOAD' else text}"]
    return found


def _with(before: str, paths: tuple[str, ...]) -> str:
    """A list of paths with those at its end that it lacks. Loaders accept blanks as well as
    colons in LD_PRELOAD.
    """
    there = before.replace(":", " ").split()
    lacking = [path for path in paths if path not in there]
    if not lacking:
        return before
    return ":".join([before, *lacking] if before.strip() else lacking)

"""Installs the `freeflow` command on the host: a script that runs the plugin's command.

The host needs no Python. The script makes a mount namespace, binds the host's /run, /proc and /sys
into the plugin's root file system and changes its root to that. So it also works while the plugin
is disabled, and leaves nothing behind.

Only the engine knows where that root file system is, and it answers after it has enabled the
plugin. Until then a script that waits is in its place, so that the command can be the next one
after `docker plugin install`.
"""

from __future__ import annotations

import contextlib
import os
import shlex
from pathlib import Path
from typing import Final

import structlog

from driver.kernel.bpffs import PINS
from driver.kernel.namespace import ENCRYPTION_PIN, OVERLAY_PIN
from driver.kernel.shared_dir import VISIBLE

log = structlog.get_logger()

NAME: Final = "freeflow"
MARK: Final = "# Written by the FreeFlow plugin; it is replaced at each start."

_SCRIPT: Final = """#!/bin/sh
{mark}
root={root}
if [ ! -d "$root" ]; then
    # Another plugin may install its own command at any moment: move the file first, then check it.
    id=$(basename "$(dirname "$root")")
    if mv -f -- "$0" "$0.$$" 2>/dev/null; then
        if grep -qF -- "$id" "$0.$$" || [ -e "$0" ]; then rm -f -- "$0.$$"; else mv -f -- "$0.$$" "$0"; fi
    fi
    [ ! -e "$0" ] || grep -qF -- "$id" "$0" || exec "$0" "$@"
    echo "freeflow: the plugin was removed from this host; so is this command now." >&2
    exit 2
fi
if [ "$(id -u)" != 0 ]; then
    echo "freeflow: must be run as root." >&2
    exit 2
fi
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
# shellcheck disable=SC2016
exec unshare --mount sh -c '
    root=$1 here=$2
    shift 2
    for each in proc sys dev; do mount --rbind "/$each" "$root/$each" || exit 2; done
    mkdir -p "$root/host/run" "$root/host/bin" && mount --rbind /run "$root/host/run" || exit 2
    mount --bind "$here" "$root/host/bin" || exit 2
    # Keep only the copy: neither path alone can unmount what is mounted twice.
    for each in {pin} {encryption} {public} {pins}; do umount -l "/run/$each" 2>/dev/null; done
    if [ -d "$root/../propagated-mount" ]; then
        mkdir -p "$root/state" && mount --bind "$root/../propagated-mount" "$root/state" || exit 2
    fi
    # Files that the user names are opened in the directory of the user: plugin/cli/user_files.py.
    [ -r . ] || cd / || exit 2
    FREEFLOW_PLACE=8:9 exec chroot "$root" /usr/bin/python3 -P -m plugin.cli "$@" 8<. 9</
' freeflow "$root" "$here" "$@"
"""


_WAITS: Final = "# It waits for the command of plugin "
_WAITING: Final = """#!/bin/sh
{mark}
{waits}{identifier}
tries=0
while [ "$tries" -lt 100 ]; do
    grep -qF -- '{waits}' "$0" 2>/dev/null || exec "$0" "$@"
    tries=$((tries + 1))
    sleep 0.1
done
echo "freeflow: the plugin has started, and the engine does not answer it: journalctl -u docker" >&2
exit 2
"""


def plugin_id(mountinfo: str) -> str | None:
    """The plugin's ID, from the source of its socket directory (/proc/self/mountinfo, proc(5))."""
    for line in mountinfo.splitlines():
        fields = line.split()
        if len(fields) > 4 and fields[4] == "/run/docker/plugins":
            name = fields[3].rstrip("/").rpartition("/")[2]
            if len(name) == 64 and all(character in "0123456789abcdef" for character in name):
                return name
    return None


def script(root: str) -> str:
    """The script for a plugin whose root file system is `root` on the host."""
    return _SCRIPT.format(
        pin=OVERLAY_PIN,
        encryption=ENCRYPTION_PIN,
        public=VISIBLE,
        pins=PINS,
        mark=MARK,
        root=shlex.quote(root),
    )


def announce(directory: Path, mountinfo: Path = Path("/proc/self/mountinfo")) -> bool:
    """Put a script that waits in the command's place, unless this plugin's is there.

    A failure is not logged: `install` does that.
    """
    identifier = plugin_id(mountinfo.read_text(errors="replace"))
    if identifier is None:
        return False
    with contextlib.suppress(OSError):
        if identifier in (directory / NAME).read_text(errors="replace"):
            return False
    text = _WAITING.format(mark=MARK, waits=_WAITS, identifier=identifier)
    return _replace(directory, text) is None


def install(
    directory: Path,
    engine_root: str,
    mountinfo: Path = Path("/proc/self/mountinfo"),
) -> bool:
    """Write the command into `directory`. If that fails, log it and return False.

    `engine_root` is the engine's root directory on the host.
    """
    identifier = plugin_id(mountinfo.read_text(errors="replace"))
    if identifier is None or not engine_root:
        log.info("the freeflow command is not installed", reason="not run by Docker as a plugin")
        return False
    reason = _replace(directory, script(f"{engine_root}/plugins/{identifier}/rootfs"))
    if reason is not None:
        log.warning("the freeflow command is not installed", reason=reason)
    return reason is None


def _replace(directory: Path, text: str) -> str | None:
    """Replace the command, in one step. Returns why it could not be done."""
    target = directory / NAME
    try:
        if target.is_symlink() or (
            target.exists() and MARK not in target.read_text(errors="replace")
        ):
            return f"{target.name} is another program's"
        temporary = target.with_name(f".{NAME}.new")
        temporary.write_text(text)
        temporary.chmod(0o755)
        temporary.replace(target)
    except OSError as error:
        return str(error)
    return None


def exists(directory: Path) -> bool:
    """Whether there is a command of that name, or no place for one."""
    return not directory.is_dir() or os.path.lexists(directory / NAME)


def remove(directory: Path) -> bool:
    """Remove the command if it is ours; false if there was none."""
    target = directory / NAME
    try:
        if target.is_symlink() or MARK not in target.read_text(errors="replace"):
            return False
        target.unlink()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return False
    return True

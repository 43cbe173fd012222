"""What the new version of the plugin may do that the installed one may not.

The engine makes the list of privileges from a plugin's configuration; here the same is done for the
installed one, so that both can be compared, value by value: another folder of the host is another
privilege.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any


def added_privileges(asked: Iterable[Mapping[str, Any]], installed: Mapping[str, Any]) -> list[str]:
    """Those of the asked ones that a plugin with this configuration does not have, as texts."""
    known = set(_privileges(installed))
    found = []
    for each in asked:
        values = [str(value) for value in each.get("Value") or ("",)]
        new = [value for value in values if (str(each.get("Name")), value) not in known]
        if new:
            found.append(privilege_text({**each, "Value": new}))
    return sorted(found)


def privilege_text(privilege: Mapping[str, Any]) -> str:
    """A privilege with its values: a name alone doesn't say which folder of the host is mounted."""
    return f"{privilege.get('Name')}: {', '.join(map(str, privilege.get('Value') or ()))}"


def _privileges(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Names and values, as the engine makes them from `Config` of a plugin (API, PluginInspect)."""
    network = str((config.get("Network") or {}).get("Type") or "")
    if network:
        yield "network", network
    for field, name in (("IpcHost", "host ipc namespace"), ("PidHost", "host pid namespace")):
        if config.get(field):
            yield name, "true"
    for mount in config.get("Mounts") or ():
        yield "mount", str(mount.get("Source") or "")
    linux = config.get("Linux") or {}
    for device in linux.get("Devices") or ():
        yield "device", str(device.get("Path") or "")
    if linux.get("AllowAllDevices"):
        yield "allow-all-devices", "true"
    for capability in linux.get("Capabilities") or ():
        yield "capabilities", str(capability)

"""Settings: code, config.json and documentation say the same, and what is wrong comes with the line
that mends it.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plugin.settings import SETTINGS, Settings, read
from tools import write_settings as settings_files

TOP = Path(__file__).parents[2]
DOCUMENT = (TOP / "docs/options.md").read_text()
NAMES = [setting.name for setting in SETTINGS]


def config() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((TOP / "config.json").read_text())
    return found


def test_generated_files_are_up_to_date() -> None:
    """config.json and docs/options.md are what `make settings` writes."""
    text = (TOP / settings_files.CONFIG).read_text()
    assert settings_files.config(text) == text
    assert settings_files.document(DOCUMENT) == DOCUMENT


def test_config_lists_the_settings_of_the_code() -> None:
    """config.json has each setting of the code with the same default and description, settable, and
    no other.
    """
    assert config()["env"] == [
        {
            "name": setting.name,
            "description": setting.description,
            "value": setting.default,
            "settable": ["value"],
        }
        for setting in SETTINGS
    ]


def test_defaults_are_in_code() -> None:
    """An upgrade keeps old settings: without any, all have the defaults of config.json."""
    from_config = {item["name"]: item["value"] for item in config()["env"]}
    assert read({}) == (Settings(), ())
    assert read(from_config) == (Settings(), ())


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_every_setting_is_documented(setting: Any) -> None:
    """The table of settings has a row for each, with its default."""
    row = re.search(rf"^\| `{setting.name}` \| (.*?) \|", DOCUMENT, re.MULTILINE)
    assert row is not None
    assert row[1].startswith(f"`{setting.default}`" if setting.default else "(empty")


@pytest.mark.parametrize("mount", config()["mounts"], ids=lambda mount: mount["name"])
def test_every_mount_is_settable_and_documented(mount: dict[str, Any]) -> None:
    """Each mount's source can be set, exists by default on any host, and is documented."""
    assert mount["settable"] == ["source"]
    assert f"`{mount['name']}.source` (`{mount['source']}`" in re.sub(r"\s+", " ", DOCUMENT)


def test_config_is_what_docker_takes() -> None:
    """The path of the socket fits into 108 bytes, and the plugin implements a network driver."""
    interface = config()["interface"]
    assert interface["types"] == ["docker.networkdriver/1.0"]
    assert len(interface["socket"]) <= 22
    assert config()["network"] == {"type": "host"}
    assert config()["propagatedMount"] == "/state"


def test_every_capability_is_explained() -> None:
    """SECURITY.md says what each privilege is for."""
    document = (TOP / "SECURITY.md").read_text()
    for capability in config()["linux"]["capabilities"]:
        assert capability in document
    for mount in config()["mounts"]:
        assert mount["destination"] in document or mount["source"] in document


GOOD = [
    ("SCOPE", "local", "scope", "local"),
    ("VXLAN_PORT", "5000", "vxlan_port", 5000),
    ("VXLAN_PORT", " 5000\n", "vxlan_port", 5000),
    ("UNDERLAY", "eth1", "underlay", "eth1"),
    ("UNDERLAY", "2001:db8::1", "underlay", "2001:db8::1"),
    ("MTU", "9000", "mtu", 9000),
    ("MTU", "", "mtu", None),
    ("METRICS_ADDR", "127.0.0.1:9477", "metrics_addr", ("127.0.0.1", 9477)),
    ("METRICS_ADDR", "[::1]:9477", "metrics_addr", ("::1", 9477)),
    ("UI_TOKEN", "k" * 32, "ui_token", "k" * 32),
    ("LOG_LEVEL", "debug", "log_level", "debug"),
    ("SYNC_INTERVAL", "2", "sync_interval", 2.0),
    ("REQUEST_DEADLINE", "1.5", "request_deadline", 1.5),
    ("ACCELERATION", "off", "acceleration", "off"),
    ("OTHER_NETWORKS", "on", "other_networks", "on"),
    ("EBPF", "off", "ebpf", "off"),
    ("RDMA", "off", "rdma", "off"),
    ("SESSION_PORT", "4800", "session_port", 4800),
    ("SESSION_PORT", "", "session_port", None),
    ("SESSION_KEY", "k" * 32, "session_key", "k" * 32),
    ("RELAY", "on", "relay", "on"),
    ("RELAY", "off", "relay", "off"),
    ("RELAY_RING", "1048576", "relay_ring", 1048576),
    ("RELAY_ENCRYPTION", "messages", "relay_encryption", "messages"),
    ("RELAY_ENCRYPTION", "all", "relay_encryption", "all"),
    ("RELAY_ENCRYPTION", "off", "relay_encryption", "off"),
    ("REMOTE_RING", "65536", "remote_ring", 65536),
    ("REMOTE_RING", "2097152", "remote_ring", 2097152),
    ("REMOTE_MEMORY", "0", "remote_memory", 0),
    ("RELAY_SPIN", "50", "relay_spin", 50),
    ("RELAY_BUSY", "7", "relay_busy", 7),
    ("RELAY_CONNECTIONS", "7", "relay_connections", 7),
    ("RELAY_MESSAGES", "7", "relay_messages", 7),
    ("RELAY_BULK", "7", "relay_bulk", 7),
    ("RELAY_BULK_RATE", "7", "relay_bulk_rate", 7),
    ("RELAY_BATCH", "7", "relay_batch", 7),
    ("RELAY_PAUSE", "7", "relay_pause", 7),
    ("RELAY_PAUSE_MOST", "7", "relay_pause_most", 7),
    ("RELAY_CPU", "7", "relay_cpu", 7),
    ("UPGRADE_OPERATIONS", "1", "upgrade_operations", 1),
    ("UPGRADE_AGE", "500", "upgrade_age", 500),
    ("UPGRADE_BYTES", "1000", "upgrade_bytes", 1000),
    ("UPGRADE_BULK", "1", "upgrade_bulk", 1),
    ("SPIN", "0", "spin", 0),
    ("SPIN", "1000", "spin", 1000),
    ("RING_LIMIT", "4096", "ring_limit", 4096),
    ("ENCRYPTED", "on", "encrypted", "on"),
    ("ENCRYPTION_PORT", "65534", "encryption_port", 65534),
    ("ENCRYPTION_ROTATION", "0", "encryption_rotation", 0),
    ("ENCRYPTION_ROTATION", "60", "encryption_rotation", 60),
    ("RDMA_ENCRYPTED", "on", "rdma_encrypted", "on"),
    ("SHM_LIMIT", "99999999999", "shm_limit", 99999999999),
    ("CONNECTIONS_LIMIT", "0", "connections_limit", 0),
    ("PROCESSES_LIMIT", "10", "processes_limit", 10),
    ("ASKS_LIMIT", "1", "asks_limit", 1),
    ("BELLS_LIMIT", "0", "bells_limit", 0),
    ("VERBS", "off", "verbs", "off"),
    ("VERBS_QPS", "65535", "verbs_qps", 65535),
    ("VERBS_MEMORY", "1048576", "verbs_memory", 1 << 20),
    ("VERBS_ZERO_COPY", "on", "verbs_zero_copy", "on"),
]


@pytest.mark.parametrize(("name", "text", "field", "value"), GOOD)
def test_good_values(name: str, text: str, field: str, value: object) -> None:
    """Each setting accepts the values of its description."""
    settings, errors = read({name: text})
    assert errors == ()
    assert getattr(settings, field) == value


def test_each_setting_is_tried() -> None:
    """Each setting has a good and a bad value in these tests."""
    assert {name for name, *_ in GOOD} == set(NAMES)
    assert {name for name, _ in BAD} == set(NAMES)


BAD = [
    ("ENCRYPTED", "true"),
    ("ENCRYPTION_PORT", "65535"),
    ("ENCRYPTION_ROTATION", "59"),
    ("RDMA_ENCRYPTED", "yes"),
    ("RELAY_SPIN", "1001"),
    ("RELAY_BUSY", "0"),
    ("RELAY_CONNECTIONS", "0"),
    ("RELAY_MESSAGES", "-1"),
    ("RELAY_BULK", "0"),
    ("RELAY_BULK_RATE", "0"),
    ("RELAY_BATCH", "65"),
    ("RELAY_PAUSE", "0"),
    ("RELAY_PAUSE_MOST", "0"),
    ("RELAY_CPU", "101"),
    ("SCOPE", "swarm"),
    ("SCOPE", ""),
    ("SCOPE", "Global"),
    ("VXLAN_PORT", "0"),
    ("VXLAN_PORT", "65536"),
    ("VXLAN_PORT", "many"),
    ("VXLAN_PORT", ""),
    ("VXLAN_PORT", "4_799"),
    ("VXLAN_PORT", "٤٧٩٩"),
    ("VXLAN_PORT", "9" * 5000),
    ("UNDERLAY", "eth 0"),
    ("UNDERLAY", "10.0.0.0/8"),
    ("UNDERLAY", "x" * 46),
    ("MTU", "1279"),
    ("MTU", "65536"),
    ("METRICS_ADDR", "9477"),
    ("METRICS_ADDR", ":9477"),
    ("METRICS_ADDR", "host:9477"),
    ("METRICS_ADDR", "127.0.0.1"),
    ("METRICS_ADDR", "127.0.0.1:0"),
    ("METRICS_ADDR", "127.0.0.1:+9477"),
    ("METRICS_ADDR", "::1:9477"),
    ("UI_TOKEN", "secret"),
    ("LOG_LEVEL", "loud"),
    ("SYNC_INTERVAL", "0"),
    ("SYNC_INTERVAL", "nan"),
    ("SYNC_INTERVAL", "61"),
    ("REQUEST_DEADLINE", "inf"),
    ("REQUEST_DEADLINE", "soon"),
    ("ACCELERATION", "yes"),
    ("OTHER_NETWORKS", "bridge"),
    ("EBPF", "auto"),
    ("RDMA", "auto"),
    ("SESSION_PORT", "0"),
    ("SESSION_KEY", "k" * 31),
    ("SESSION_KEY", "k" * 513),
    ("SESSION_KEY", "ü" * 40),
    ("RELAY", "tcp"),
    ("RELAY_RING", "1000000"),
    ("RELAY_ENCRYPTION", "on"),
    ("REMOTE_RING", "65535"),
    ("REMOTE_RING", "4194304"),
    ("REMOTE_RING", "100000"),
    ("REMOTE_MEMORY", "1G"),
    ("UPGRADE_OPERATIONS", "0"),
    ("UPGRADE_AGE", "-1"),
    ("UPGRADE_BYTES", "1k"),
    ("UPGRADE_BULK", "0"),
    ("SPIN", "1001"),
    ("RING_LIMIT", "4095"),
    ("RING_LIMIT", "4194305"),
    ("SHM_LIMIT", "1G"),
    ("CONNECTIONS_LIMIT", "all"),
    ("PROCESSES_LIMIT", "65536"),
    ("ASKS_LIMIT", "0"),
    ("BELLS_LIMIT", ""),
    ("VERBS", "yes"),
    ("VERBS_QPS", "65536"),
    ("VERBS_MEMORY", "1M"),
    ("VERBS_ZERO_COPY", "yes"),
]


@pytest.mark.parametrize(("name", "text"), BAD)
def test_bad_values(name: str, text: str) -> None:
    """A bad value is refused by name, with the allowed values and the command that corrects it; the
    default is used.
    """
    settings, errors = read({name: text})
    assert settings == Settings()
    (error,) = errors
    message = str(error)
    assert message.startswith(f"setting {name}=")
    assert "must be " in message
    default = next(setting.default for setting in SETTINGS if setting.name == name)
    assert message.endswith(
        f"docker plugin disable -f freeflow:latest && docker plugin set freeflow:latest {name}={default} && "
        "docker plugin enable freeflow:latest"
    )
    assert len(message) < 1000


def test_all_that_is_wrong_is_said() -> None:
    """Several bad settings are all reported, and the good ones among them are used."""
    settings, errors = read({"MTU": "1", "SCOPE": "x", "VXLAN_PORT": "5000"})
    assert len(errors) == 2
    assert settings == Settings(vxlan_port=5000)


def test_a_bad_key_is_not_shown() -> None:
    """The error of a bad secret doesn't show it: it may lack one character of the right one."""
    settings, (error,) = read({"SESSION_KEY": "only a few letters"})
    assert "only a few" not in str(error)
    assert str(error).startswith("setting SESSION_KEY=(not shown): ")
    assert "k" * 32 not in repr(read({"SESSION_KEY": "k" * 32}))
    assert settings.session_key == ""


def test_unknown_setting() -> None:
    """An unknown setting is refused by name, with a list of the known ones."""
    _, (error,) = read({"VXLANPORT": "5000"})
    assert "setting VXLANPORT is unknown" in str(error)
    assert all(name in str(error) for name in NAMES)
    assert "docker plugin" in str(error)


def test_what_every_process_has_is_no_setting() -> None:
    """Variables that the runtime sets are not taken for settings."""
    environment = {"PATH": "/usr/bin", "HOME": "/", "LC_ALL": "C", "PYTHONUNBUFFERED": "1"}
    assert read(environment) == (Settings(), ())


@given(st.dictionaries(st.sampled_from(NAMES), st.text(max_size=50)))
def test_no_value_is_fatal(environment: dict[str, str]) -> None:
    """The plugin can start with any values of its settings."""
    settings, errors = read(environment)
    assert isinstance(settings, Settings)
    assert len(errors) <= len(environment)

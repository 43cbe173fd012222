"""`freeflow inject`: which services of a stack get the library, and what the second file adds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML
from ruamel.yaml.parser import ParserError

from driver.errors import InvalidRequest
from driver.names import is_freeflow
from plugin.cli.client import Engine
from plugin.cli.commands import cli
from plugin.cli.inject import Outcome, inject_stack, pairs
from plugin.cli.preload import PRELOAD
from tests.unit.sockets import engine, served

MOUNT = {"type": "bind", "source": "/run/freeflow", "target": "/run/freeflow"}
NETWORKS = "networks:\n  n:\n    driver: freeflow:latest\n"


def injected(text: str, *only: str, read: Any = None, verbs: bool = False) -> Outcome:
    """On a host whose engine doesn't answer."""
    silent = Engine(Path("/nonexistent/docker.sock"))
    return inject_stack(text, "stack.yml", silent, only, read, verbs=verbs)


def services(text: str) -> Any:
    return YAML(typ="safe", pure=True).load(text)["services"]


def merged(text: str, second: str) -> Any:
    """The services of both files together, as `docker stack deploy` merges them."""
    found = services(text)
    for name, addition in services(second).items():
        service = found[name] = {**(found[name] or {})}
        mounts = {target(each): each for each in service.get("volumes") or ()}
        mounts |= {target(each): each for each in addition.get("volumes") or ()}
        service["volumes"] = list(mounts.values())
        before = pairs(service.get("environment"))
        service["environment"] = {**before, **(addition.get("environment") or {})}
    return found


def target(mount: Any) -> str:
    return str(mount["target"] if isinstance(mount, dict) else str(mount).split(":")[1])


def has_library(service: Any) -> bool:
    mounts = [each for each in service.get("volumes") or () if "/run/freeflow" in str(each)]
    preload = pairs(service.get("environment")).get("LD_PRELOAD") or ""
    return len(mounts) == 1 and preload.split(":").count(PRELOAD) == 1


FULL = """\
# Comment at the top
version: "3.8"   # and at the end of a line


services:
  # before the service
  web:
    image: 'nginx'   # quoted
    networks: [n]
    ports:
    - "80:80"
    # after the service

  cache:
      networks:
          n:
              aliases: [c]
      volumes:
          - data:/data   # kept
          # a comment below
      environment:
          B: "on"
          A: 0644   # octal
      image:   redis
      command: |
        redis-server
          --save ""

  # before the next
  job:
    image: x
    environment:
    - Z=1

    networks: [n]
volumes: {data: }
networks:
  n:
    driver: freeflow:latest
"""


SECOND = """\
# For docker stack deploy, with a second -c after the stack's own.
version: "3.8"
services:
  "web":
    volumes:
      - type: bind
        source: /run/freeflow
        target: /run/freeflow
    environment:
      LD_PRELOAD: "/run/freeflow/libfreeflow.so"
  "cache":
    volumes:
      - type: bind
        source: /run/freeflow
        target: /run/freeflow
    environment:
      LD_PRELOAD: "/run/freeflow/libfreeflow.so"
  "job":
    volumes:
      - type: bind
        source: /run/freeflow
        target: /run/freeflow
    environment:
      LD_PRELOAD: "/run/freeflow/libfreeflow.so"
"""


def test_only_what_is_added_is_written() -> None:
    """The second file has the stack's version, mount and variable of each service, and nothing
    else.
    """
    assert injected(FULL).text == SECOND
    together = merged(FULL, SECOND)
    assert all(has_library(each) for each in together.values())
    assert together["cache"]["environment"]["B"] == "on"


@pytest.mark.parametrize("version", ["", "version: '3.8'\n", "version: 3.10\n", 'version: "3"\n'])
def test_version(version: str) -> None:
    """Docker refuses to merge files of different versions: the second file has the first one's, or
    none.
    """
    lines = injected(version + FULL.partition("\n")[2].partition("\n")[2]).text.splitlines()
    wanted = version.strip().removeprefix("version: ").strip("'\"")
    assert [line for line in lines if "version" in line] == (
        [f'version: "{wanted}"'] if wanted else []
    )


def test_what_has_the_library_needs_nothing() -> None:
    """A service that has both already isn't in the second file."""
    text = (
        "services:\n  a:\n    image: x\n    networks: [n]\n    volumes: ['/run/freeflow:/run/freeflow']\n"
        f"    environment: {{LD_PRELOAD: {PRELOAD}}}\n{NETWORKS}"
    )
    outcome = injected(text)
    assert outcome.injected == ("a",)
    assert services(outcome.text) == {}


@pytest.mark.parametrize(
    "variables",
    [
        "    environment: {A: 1}\n",
        '    environment: {"A": "1", }\n',
        "    environment: [A=1]\n",
        "    environment: []\n",
        "    environment: {}\n",
        "    environment:\n",
        "    environment:   # none yet\n",
        "    environment: ~\n",
        "    environment:\n      A: 1\n",
        "    environment:\n      - A=1\n",
        "    environment:\n    - A=1\n",
        "    environment: [\n      A=1,   # one\n    ]\n",
        "    environment:\n      A: |\n        two\n        lines\n",
        "    environment:\n      A: >-\n        two\n        lines\n\n      # comment\n",
        "    environment: &e\n      A: 1\n",
        "",
    ],
)
@pytest.mark.parametrize(
    "volumes",
    [
        "    volumes: [a:/a]\n",
        "    volumes: []\n",
        "    volumes:\n",
        "    volumes:\n      - a:/a\n",
        "    volumes:\n    - a:/a\n    # end\n",
        "    volumes:\n      - {type: volume, source: a, target: /a}\n",
        "    volumes:\n      - type: volume\n        source: a\n        target: /a\n",
        "    volumes:\n      -\n        type: volume\n        source: a\n        target: /a\n",
        "",
    ],
)
def test_every_form(volumes: str, variables: str) -> None:
    """Volumes and variables in any form stay, and the library is added."""
    text = f"services:\n  a:\n    image: x\n{variables}{volumes}    networks: [n]\n{NETWORKS}"
    before = services(text)["a"]
    after = merged(text, injected(text).text)["a"]
    assert has_library(after)
    assert after["volumes"] == [*(before.get("volumes") or ()), MOUNT]
    assert pairs(after["environment"]) == {**pairs(before.get("environment")), "LD_PRELOAD": PRELOAD}  # fmt: skip


@pytest.mark.parametrize(
    ("variables", "value"),
    [
        ("{LD_PRELOAD: a.so}", f"a.so:{PRELOAD}"),
        ("[LD_PRELOAD=a.so]", f"a.so:{PRELOAD}"),
        ("\n      LD_PRELOAD: 'a.so'  # why", f"a.so:{PRELOAD}"),
        ('\n      - "LD_PRELOAD=a.so b.so"', f"a.so b.so:{PRELOAD}"),
        ("\n      LD_PRELOAD:", "${LD_PRELOAD-}:" + PRELOAD),
        ("\n      - LD_PRELOAD", "${LD_PRELOAD-}:" + PRELOAD),
        ("\n      LD_PRELOAD: ''", PRELOAD),
        (f"\n      LD_PRELOAD: {PRELOAD}:a.so", f"{PRELOAD}:a.so"),
        (f"\n      - LD_PRELOAD=a.so {PRELOAD}", f"a.so {PRELOAD}"),
    ],
)
def test_what_is_preloaded_stays(variables: str, value: str) -> None:
    """The library comes after other preloads, in whatever form they are written, and only once."""
    text = f"services:\n  a:\n    image: x\n    environment: {variables}\n    networks: [n]\n{NETWORKS}"
    assert merged(text, injected(text).text)["a"]["environment"]["LD_PRELOAD"] == value


SHARED = {
    "template": "x-e: &e\n  A: 1\nservices:\n  a: {image: x, networks: [n], environment: *e}\n"
    "  b:\n    image: x\n    environment: *e\n",
    "template in blocks": "x-e: &e\n  A: 1\nservices:\n  a:\n    image: x\n    networks: [n]\n"
    "    environment: *e   # all\n  b:\n    image: x\n    environment: *e\n",
    "defined in the chosen one": "services:\n  a:\n    image: x\n    networks: [n]\n    environment: &e\n      A: 1\n"
    "  b:\n    image: x\n    environment: *e\n",
    "list": "x-v: &v\n  - a:/a\nservices:\n  a:\n    image: x\n    networks: [n]\n    volumes: *v\n"
    "  b:\n    image: x\n    volumes: *v\n",
    "merged": "x-s: &s\n  image: x\n  environment:\n    A: 1\n  volumes: [a:/a]\nservices:\n  a:\n    <<: *s\n"
    "    networks: [n]\n  b:\n    <<: *s\n",
    "merged from the chosen one": "services:\n  a: &a\n    image: x\n    networks: [n]\n  b:\n    <<: *a\n    networks: [o]\n",
    "merged from the chosen one, with variables": "services:\n  a: &a\n    image: x\n    networks: [n]\n    environment:\n"
    "      A: 1\n  b:\n    <<: *a\n    networks: [o]\n",
    "merged from the other": "services:\n  b: &b\n    image: x\n    environment: [A=1]\n    networks: [o]\n  a:\n"
    "    <<: *b\n    networks: [n]\n",
    "several merged": "x-s: &s {A: 1}\nx-t: &t {B: 1}\nservices:\n  a:\n    image: x\n    networks: [n]\n    environment:\n"
    "      <<: [*s, *t]\n      C: 1\n  b:\n    image: x\n    environment:\n      <<: *s\n",
}


@pytest.mark.parametrize("name", SHARED)
def test_what_services_share(name: str) -> None:
    """If services share values by anchor, alias or merge, only the chosen one gets the library."""
    text = SHARED[name] + NETWORKS + "  o: {}\n"
    second = injected(text, "a").text
    assert list(services(second)) == ["a"]
    before, after = services(text), merged(text, second)
    assert has_library(after["a"])
    assert after["a"]["volumes"] == [*(before["a"].get("volumes") or ()), MOUNT]


@pytest.mark.parametrize("name", SHARED)
def test_all_that_share(name: str) -> None:
    """If all that share a value are chosen, each has the library once."""
    text = SHARED[name] + NETWORKS + "  o: {}\n"
    after = merged(text, injected(text, "a", "b").text)
    assert has_library(after["a"])
    assert has_library(after["b"])


def test_whole_service_by_alias() -> None:
    """A service that is an alias of another one can be left out."""
    text = f"services:\n  a: &a\n    image: x\n    networks: [n]\n  b: *a\n{NETWORKS}"
    assert list(services(injected(text, "a").text)) == ["a"]
    both = injected(text)
    assert both.injected == ("a", "b")
    assert all(has_library(each) for each in merged(text, both.text).values())


def test_json_is_read() -> None:
    """A stack may be written as JSON."""
    stack = {"services": {"a": {"image": "x", "networks": ["n"], "environment": {"A": "1"}}}, "networks": {"n": {"driver": "freeflow:latest"}}}  # fmt: skip
    text = json.dumps(stack, indent=1)
    assert has_library(merged(text, injected(text).text)["a"])


def test_old_format() -> None:
    """In Compose format 3.0 the mount has the short form."""
    text = f'version: "3"\nservices:\n  a:\n    image: x\n    networks: [n]\n{NETWORKS}'
    assert services(injected(text).text)["a"]["volumes"] == ["/run/freeflow:/run/freeflow"]


def test_mounts_that_are_there() -> None:
    """The folder may be mounted already, in either form; another mount in its place is an error."""
    text = "services:\n  a:\n    image: x\n    networks: [n]\n    volumes: ['%s']\n" + NETWORKS
    for mount in ("/run/freeflow:/run/freeflow", "/run/freeflow:/run/freeflow/:ro"):
        assert "volumes" not in services(injected(text % mount).text)["a"]
    with pytest.raises(InvalidRequest, match="service a has /other at /run/freeflow"):
        injected(text % "/other:/run/freeflow")


@pytest.mark.parametrize(
    ("driver", "own"),
    [
        ("freeflow:latest", True),
        ("freeflow", True),
        ("registry:5000/team/freeflow:0.1.0-amd64", True),
        ("overlay", False),
        ("notfreeflow:latest", False),
        ("weaveworks/net-plugin:latest", False),
    ],
)
def test_drivers(driver: str, own: bool) -> None:
    """FreeFlow is recognised by its name, with any registry and tag."""
    assert is_freeflow(driver) is own


def test_by_network(tmp_path: Path) -> None:
    """Services on a FreeFlow network get the library, others don't; a service without networks is
    on `default`.
    """
    text = (
        "services:\n  own: {image: x, networks: [n]}\n  both: {image: x, networks: {n: , o: }}\n"
        "  other: {image: x, networks: [o]}\n  none: {image: x}\n" + NETWORKS + "  o: {driver: overlay}\n"
    )  # fmt: skip
    assert injected(text).injected == ("own", "both")
    assert injected(text + "  default: {driver: freeflow:latest}\n").injected == ("own", "both", "none")  # fmt: skip


def test_external_networks(tmp_path: Path) -> None:
    """The engine tells the driver of an external network; if it can't, the library is added with a
    note.
    """
    text = (
        "services:\n  a: {image: x, networks: [one]}\n  b: {image: x, networks: [two]}\n  c: {image: x, networks: [three]}\n"
        "networks:\n  one: {external: true, name: mine}\n  two: {external: {name: theirs}}\n  three: {external: true}\n"
    )
    answers = {"/networks/mine": {"Driver": "freeflow:latest"}, "/networks/theirs": {"Driver": "overlay"}}  # fmt: skip
    with served(engine(answers), tmp_path / "docker.sock") as path:
        outcome = inject_stack(text, "stack.yml", Engine(path))
    assert outcome.injected == ("a", "c")
    assert any(note.startswith("c: this host doesn't know the driver of network three") for note in outcome.notes)  # fmt: skip
    assert not any("network one" in note for note in outcome.notes)


def test_labelled_networks(tmp_path: Path) -> None:
    """Services on a network whose label asks for acceleration get the library, be it the file's or
    external; not on one that can't have it.
    """
    text = (
        "services:\n  a: {image: x, networks: [one]}\n  b: {image: x, networks: [two]}\n  c: {image: x}\n  d: {image: x, networks: [three]}\n  e: {image: x, networks: [four]}\n"
        'networks:\n  one: {external: true, name: mine}\n  two: {labels: ["freeflow.accelerate=on"]}\n'
        '  three: {driver: macvlan, labels: {freeflow.accelerate: "on"}}\n'
        '  four: {driver_opts: {com.docker.network.bridge.enable_icc: false}, labels: {freeflow.accelerate: "on"}}\n'
    )
    answers = {"/networks/mine": {"Driver": "bridge", "Labels": {"freeflow.accelerate": "on"}}}
    with served(engine(answers), tmp_path / "docker.sock") as path:
        outcome = inject_stack(text, "stack.yml", Engine(path))
    assert outcome.injected == ("a", "b", "d")


def test_chosen_services() -> None:
    """--service chooses services on any network, notes useless ones, and refuses unknown names."""
    text = "services:\n  a: {image: x}\n  b: {image: x}\n"
    outcome = injected(text, "b")
    assert outcome.injected == ("b",)
    assert "b: is on no FreeFlow network, where the library does nothing" in outcome.notes
    with pytest.raises(InvalidRequest, match="has no service c; it has a, b"):
        injected(text, "c")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "line 1 is no YAML"),
        ("a: 1\n\tb: 2\n", "is no YAML"),
        ("services:\n  a: *b\n", "is no YAML"),
        ("", "has 0 YAML documents|has no services"),
        ("- 1\n", "has no services"),
        ("services: []\n", "has no services"),
        ("services: {a: 1}\n---\nservices: {}\n", "has 2 YAML documents"),
        ("services:\n  a: x\n", "service a is no mapping|no service is on a FreeFlow network"),
        ("services:\n  a: {image: x}\n", "no service is on a FreeFlow network"),
        (f"services:\n  a: {{image: x, networks: [n], volumes: 3}}\n{NETWORKS}", "volumes of service a is no list"),
        (f"services:\n  a: {{image: x, networks: [n], environment: 3}}\n{NETWORKS}", "environment of service a is neither"),
    ],
)  # fmt: skip
def test_what_is_wrong(text: str, message: str) -> None:
    """A text that is no stack is refused with file, cause and remedy."""
    with pytest.raises(InvalidRequest, match=message) as caught:
        injected(text)
    assert str(caught.value).startswith("stack.yml")
    assert "; " in str(caught.value)


def test_variables_file(tmp_path: Path) -> None:
    """An LD_PRELOAD in an env_file, which would be replaced, is noted."""
    text = f"services:\n  a: {{image: x, networks: [n], env_file: e.env}}\n{NETWORKS}"
    outcome = injected(text, read=lambda name: {"e.env": "A=1\nLD_PRELOAD=x.so\n"}[name])
    assert any("LD_PRELOAD in e.env is replaced" in note for note in outcome.notes)
    assert not any("is replaced" in note for note in injected(text, read=lambda _: "A=1\n").notes)


WORDS = st.text(st.characters(blacklist_categories=["Cs", "Cc"]), max_size=12)
VARIABLES = st.dictionaries(st.sampled_from(["A", "B_1", "LD_PRELOAD", "on"]), WORDS, max_size=3)
SERVICE = st.fixed_dictionaries(
    {"image": st.just("x"), "networks": st.sampled_from([["n"], {"n": None}])},
    optional={
        "environment": st.one_of(st.none(), VARIABLES, VARIABLES.map(lambda each: [f"{k}={v}" for k, v in each.items()])),
        "volumes": st.one_of(st.none(), st.lists(WORDS.map(lambda word: f"v:/{word}"), max_size=3)),
        "command": st.one_of(WORDS, st.lists(WORDS, max_size=3)),
    },
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(
    st.dictionaries(st.sampled_from("abc"), SERVICE, min_size=1), st.booleans(), st.integers(2, 6)
)
def test_whatever_a_writer_writes(content: Any, flow: bool, indent: int) -> None:
    """Any stack that a YAML writer makes gets the library, and is otherwise unchanged."""
    import io

    writer = YAML(typ="safe", pure=True)
    writer.default_flow_style = flow
    writer.indent = indent
    stream = io.StringIO()
    writer.dump({"services": content, "networks": {"n": {"driver": "freeflow:latest"}}}, stream)
    text = stream.getvalue()
    try:
        before = services(text)
    except ParserError:
        # ruamel.yaml writes plain scalars in flow style that it can't read, such as `:0`.
        reject()
    after = merged(text, injected(text).text)
    for name, service in after.items():
        assert MOUNT in service["volumes"]
        assert pairs(service["environment"])["LD_PRELOAD"] is not None
        old = pairs(before[name].get("environment"))
        kept = {k: v for k, v in pairs(service["environment"]).items() if k != "LD_PRELOAD"}
        assert kept == {k: v for k, v in old.items() if k != "LD_PRELOAD"}
        assert service.get("command") == before[name].get("command")


PLAIN = f"services:\n  web:\n    image: nginx\n    networks: [n]\n    environment:\n      - A=1\n{NETWORKS}"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("nginx", "nginx\t# a tab before a comment"),
        ("nginx", "nginx\t"),
        ("image: ", "image:\t"),
        ("image:", "image\t:"),
        ("- A=1", "- A=1\t# tab"),
        ("[n]", "[\tn\t]\t# tabs in flow style"),
        ("[n]", "!override [n]"),
        ("[n]", "!reset\t[n]"),
        ("nginx", "!custom nginx"),
        ("nginx", "!!str nginx"),
        ("nginx", "!<tag:example.com,2026:x> nginx"),
        ("    environment:", "    environment: !override\t# tag, tab, comment"),
        ("nginx", ">-\t# a tab after the indicator\n      nginx"),
        ("nginx", "two\twords"),
        ("nginx", "two\n\n      lines\t# tab"),
        ("services", "%YAML 1.1\n---\t# tab\nservices"),
        ("services", "%YAML 1.1\t# tab\n---\nservices"),
        ("services", "---\t\nservices"),
    ],
)
def test_what_docker_reads(old: str, new: str) -> None:
    """Tabs between tokens, tags of other programs and old versions are Docker's to read: the
    library gets in beside them.
    """
    text = PLAIN.replace(old, new, 1)
    assert injected(text).text == injected(PLAIN).text


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r", "\x85", "\u2028", "\u2029"])
def test_whatever_ends_a_line(newline: str) -> None:
    """Lines may end as YAML lets them, which Docker's reader does too."""
    assert injected(PLAIN.replace("\n", newline)) == injected(PLAIN)
    mixed = injected(
        PLAIN.replace("nginx\n", f"nginx{newline}", 1).replace("web:\n", "web: &w\u2028", 1)
    )
    assert mixed.injected == ("web",)


@pytest.mark.parametrize(
    "name", ["n", "y", "on", "off", "yes", "no", "null", "~", "1", "1.0", "true"]
)
@pytest.mark.parametrize("version", ["", "%YAML 1.1\n---\n", "%YAML 1.2\n---\n"])
def test_names_that_could_be_something_else(name: str, version: str) -> None:
    """A network or service may be called `on`, `no` or `1`: a key is its text, whatever YAML's
    version makes of it.
    """
    text = f"{version}services:\n  {name}:\n    image: x\n    networks: [{name}]\nnetworks:\n  {name}: {{driver: freeflow}}\n"
    if name in ("null", "~", "true"):
        text = text.replace(f"[{name}]", f"['{name}']")
    outcome = injected(text)
    assert outcome.injected == (name,)
    assert list(services(outcome.text)) == [name]


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20))
def test_whatever_a_service_is_called(name: str) -> None:
    """The second file names a service by the very characters of the stack, whatever they are."""
    stack = {"services": {name: {"image": "x", "networks": ["n"]}}, "networks": {"n": {"driver": "freeflow"}}}  # fmt: skip
    text = json.dumps(stack, ensure_ascii=False)
    try:
        outcome = injected(text)
    except InvalidRequest:
        # Characters that YAML doesn't have.
        return
    assert list(services(outcome.text)) == list(outcome.injected) == [name]


@pytest.mark.parametrize("text", ["\tservices: {}", "services:\n\ta: {}", "services:\n  - \t- a"])
def test_tabs_as_indentation(text: str) -> None:
    """A tab that would indent is refused, as Docker does."""
    with pytest.raises(InvalidRequest, match="is no YAML"):
        injected(text)


# --- verbs


ALL = (
    "/run/freeflow/libfreeflow.so:/run/freeflow/verbs/libibverbs.so.1:"
    "/run/freeflow/verbs/libibverbs.so"
)


@pytest.mark.parametrize(
    ("variables", "value"),
    [
        ("{A: x}", ALL),
        ("{LD_PRELOAD: /own.so}", f"/own.so:{ALL}"),
        ("[LD_PRELOAD]", "${LD_PRELOAD-}:" + ALL),
        (f"{{LD_PRELOAD: {PRELOAD}}}", ALL),
        (f"{{LD_PRELOAD: '{PRELOAD} /own.so'}}", f"{PRELOAD} /own.so:{ALL.partition(':')[2]}"),
        (f"{{LD_PRELOAD: '{ALL}'}}", None),
    ],
)
def test_verbs(variables: str, value: str | None) -> None:
    """With --verbs a service preloads all three libraries, each once, after its own; the mount is
    the same as without, and nothing else is added.
    """
    text = (
        f"services:\n  a:\n    image: x\n    environment: {variables}\n    networks: [n]\n"
        + NETWORKS
    )
    added = services(injected(text, verbs=True).text)["a"]
    wanted: dict[str, Any] = {"volumes": [MOUNT]}
    if value is not None:
        wanted["environment"] = {"LD_PRELOAD": value}
    assert added == wanted


def test_verbs_are_asked_for() -> None:
    """Without --verbs nothing of verbs is in the second file, nor among the remarks; with it each
    service with an unknown image is told of musl.
    """
    plain = injected(FULL)
    assert "verbs" not in plain.text + " ".join(plain.notes)
    notes = injected(FULL, verbs=True).notes
    assert sum("musl" in note and "/run/freeflow/verbs" in note for note in notes) == 3


def test_network_without_verbs() -> None:
    """A service on a network with verbs: off is told that it has no device there."""
    text = (
        "services:\n  a: {image: x, networks: [n, m]}\nnetworks:\n"
        "  n: {driver: freeflow, driver_opts: {verbs: off}}\n  m: {driver: freeflow}\n"
    )
    assert (
        "a: has no device of verbs on network n: verbs is off" in injected(text, verbs=True).notes
    )
    assert not any("has no device" in note for note in injected(text).notes)


# --- the command


def run(*arguments: str, given: str = "") -> Result:
    where = ["--engine", "/nonexistent/docker.sock"]
    return CliRunner(mix_stderr=False).invoke(cli, [*where, "inject", *arguments], input=given)


def test_command(tmp_path: Path) -> None:
    """The second file goes to stdout or to a file, from a file or stdin; remarks go to stderr."""
    file, out = tmp_path / "stack.yml", tmp_path / "out.yml"
    file.write_text(FULL)
    wanted = injected(FULL).text
    done = run(str(file))
    assert (done.exit_code, done.stdout) == (0, wanted)
    assert "freeflow: the library is added to web, cache, job" in done.stderr
    assert "web: its image was not examined: " in done.stderr
    assert run("-", given=FULL).stdout == wanted
    assert run(str(file), "-o", str(out)).stdout == ""
    assert out.read_text() == wanted
    done = run(str(file), "-o", str(file))
    assert done.exit_code == 2
    assert "is the stack itself" in done.stderr
    assert file.read_text() == FULL
    assert "library is added to job\n" in run(str(file), "--service", "job").stderr


def test_command_that_fails(tmp_path: Path) -> None:
    """A failure leaves the output file as it was, and shows a remedy."""
    file, out = tmp_path / "stack.yml", tmp_path / "out.yml"
    out.write_text("mine")
    done = run(str(file), "-o", str(out))
    assert (done.exit_code, done.stdout) == (2, "")
    assert "stack.yml can't be read (No such file or directory)\n    do: " in done.stderr
    file.write_bytes(b"\xff\xfe")
    assert "is no UTF-8 text" in run(str(file)).stderr
    file.write_text("a: [")
    assert run(str(file), "-o", str(out)).exit_code == 2
    assert out.read_text() == "mine"
    file.write_text(FULL)
    assert "can't be written" in run(str(file), "-o", str(tmp_path / "no/where")).stderr


def test_command_for_an_image() -> None:
    """--image prints options which a shell can take from the command; remarks go to stderr; it is
    no option beside those of a stack.
    """
    done = run("--image", "x")
    mount = "--mount type=bind,src=/run/freeflow,dst=/run/freeflow"
    assert (done.exit_code, done.stdout) == (0, f"{mount} --env LD_PRELOAD={PRELOAD}\n")
    assert "x: its image was not examined: " in done.stderr
    assert run("--image", "x", "--verbs").stdout == f"{mount} --env LD_PRELOAD={ALL}\n"
    for wrong in ((), ("a.yml", "--image", "x"), ("--image", "x", "--service", "a")):
        assert run(*wrong).exit_code == 2
        assert run(*wrong).stdout == ""

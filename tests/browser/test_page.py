"""The live page in a real browser: Debian's Chromium, without a screen.

One browser serves all tests; each opens the page of a Swarm of its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Final

import pytest

from dataplane.errors import RouterAway
from dataplane.router.reasons import Reason
from plugin import page_feed
from plugin.bounded_server import BoundedServer
from plugin.page_app import PageAccess, create_page
from plugin.page_feed import PageFeed, PageSource
from plugin.status import Finding
from plugin.traffic_names import TrafficReport
from testbed.browser import INSTALLED, Browser
from testbed.example_swarm import ExampleSwarm, crowd, shop, with_problem

pytestmark = pytest.mark.skipif(
    not INSTALLED, reason="missing: Debian's packages chromium and chromium-driver"
)

TOKEN: Final = "t" * 32
SHM: Final = ("rgb(11, 122, 117)", "rgb(63, 184, 175)")
"""Colours of the path on light and on dark pages."""
TURNED: Final = """
const edge = [...document.querySelectorAll(".edge")].find(
  (each) => each.ariaLabel.startsWith(arguments[0]));
return edge ? arguments[1].includes(getComputedStyle(edge.lastChild).stroke) : null;
"""
UPDATES: Final = "return Number(document.documentElement.dataset.updates ?? 0) >= arguments[0]"
FOCUSED: Final = "return document.activeElement.ariaLabel"
DETAILS: Final = "return document.getElementById('details').innerText"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as made:
        yield made


@contextlib.contextmanager
def serving(
    source: ExampleSwarm | PageSource, token: str = "", *, loopback: bool = True
) -> Iterator[str]:
    """The page of a Swarm, refreshed five times as often as usual."""
    found = source.source() if isinstance(source, ExampleSwarm) else source
    page = create_page(PageFeed(found), PageAccess(token, loopback))
    server = BoundedServer(("127.0.0.1", 0), page)
    server.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.stop()


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_feed, "INTERVAL", 0.3)
    monkeypatch.setattr(page_feed, "MAP_AGE", 0.3)
    monkeypatch.setattr("plugin.page_app.INTERVAL", 0.4)


def opened(browser: Browser, url: str, updates: int = 2) -> None:
    browser.messages()
    # Another address first: the same one but for its fragment would not be loaded anew.
    browser.open("about:blank")
    browser.open(url)
    browser.wait(UPDATES, updates)


def labels(browser: Browser, kind: str) -> list[str]:
    script = "return [...document.querySelectorAll(arguments[0])].map((e) => e.ariaLabel)"
    found: list[str] = browser.run(script, kind)
    return sorted(found)


def test_content(browser: Browser) -> None:
    """The page has hosts, containers, services, connections with their paths, and problems with
    what to do; nothing is written to the console.
    """
    with serving(with_problem(shop())) as url:
        opened(browser, url)
        text = browser.run("return document.body.innerText")
        assert browser.run("return document.title") == "FreeFlow on alpha"
        assert "1 problem" in text
        assert "the underlay's MTU of 1400 is too small" in text
        assert "Do: freeflow doctor" in text
        assert "shm: 6, 38.9 MiB/s" in text
        drawn = browser.run("return document.getElementById('drawing').textContent")
        for name in ("alpha (this host)", "beta", "gamma", "postgres.1", "backup", "VIP 10.0.0.2"):
            assert name in drawn
        assert labels(browser, ".node.service") == ["service api", "service redis", "service web"]
        assert "container postgres.1 of postgres, on beta" in labels(browser, ".node.container")
        assert "api.1 – postgres.1: rdma, 1 connection" in labels(browser, ".edge")
        width = (
            "return parseFloat(getComputedStyle(document.querySelector(arguments[0])).strokeWidth)"
        )
        busy = browser.run(width, '[aria-label^="backup – postgres.1"] .wire')
        quiet = browser.run(width, '[aria-label^="backup – redis.1"] .wire')
        assert busy > quiet > 0
        assert browser.messages() == []


def test_a_connection_that_moves_turns_its_colour(browser: Browser) -> None:
    """When a connection moves to shared memory, its line turns into that path's colour, as the same
    element.
    """
    swarm = ExampleSwarm()
    one, other = swarm.add("a", "alpha", "10.0.1.1"), swarm.add("b", "alpha", "10.0.1.2")
    link = swarm.connect(one, other, "overlay", 5000, Reason.SHORT)
    with serving(swarm) as url:
        opened(browser, url)
        assert browser.run(TURNED, "a.1 – b.1: overlay", SHM) is False
        browser.run("document.querySelector('.edge').dataset.same = 'yes'")
        swarm.move(link, "shm")
        browser.wait(TURNED, "a.1 – b.1: shm", SHM)
        assert browser.run("return document.querySelector('.edge').dataset.same") == "yes"
        assert browser.run("return document.querySelectorAll('.edge').length") == 1
        browser.click("#tab-connections")
        row = browser.run("return document.querySelector('#panel-connections tbody tr').innerText")
        assert row.split("\t")[:4] == ["a.1", "b.1", "shm", "1"]


def test_details_on_hover(browser: Browser) -> None:
    """Pointing at a container shows its connections with reasons, and only its lines stay bright; a
    click keeps that.
    """
    with serving(shop()) as url:
        opened(browser, url)
        browser.point('[aria-label^="container backup"]')
        text = browser.run(DETAILS)
        assert "postgres.1: overlay+ebpf" in text
        assert "no process of the container runs with the library" in text
        assert labels(browser, ".edge.active") == [
            "backup – postgres.1: overlay+ebpf, 1 connection",
            "backup – redis.1: overlay, 1 connection",
        ]
        browser.point("h1")
        assert "Point at a container" in browser.run(DETAILS)
        browser.click('[aria-label="service api"]')
        browser.point("h1")
        text = browser.run(DETAILS)
        assert "VIP\n10.0.0.3" in text
        assert "api.1, api.2, api.3, api.4, api.5" in text
        assert browser.run("return document.querySelectorAll('.member').length") == 5


def test_keyboard(browser: Browser) -> None:
    """Every view, container and connection can be reached and read by keyboard."""
    with serving(shop()) as url:
        opened(browser, url)
        browser.run("document.getElementById('tab-map').focus()")
        browser.press("Tab")
        assert browser.run(FOCUSED) == "service api"
        browser.press("ArrowRight")
        assert browser.run(FOCUSED) == "service redis"
        browser.run("document.querySelector('[aria-label^=\"container redis.1\"]').focus()")
        browser.press("ArrowDown")
        assert browser.run(FOCUSED) == "api.3 – redis.1: shm, 1 connection"
        assert "To redis.1\n7.2 MiB/s" in browser.run(DETAILS)
        browser.press("ArrowDown", "ArrowDown", "ArrowDown")
        assert browser.run(FOCUSED) == "backup – redis.1: overlay, 1 connection"
        assert "no-library (1): no process of the container" in browser.run(DETAILS)
        browser.press("Enter")
        assert labels(browser, ".edge.pinned") == ["backup – redis.1: overlay, 1 connection"]
        browser.press("Escape")
        assert labels(browser, ".edge.pinned") == []
        browser.press("ArrowUp")
        assert browser.run(FOCUSED).startswith("container redis.1 of redis")
        browser.run("document.getElementById('tab-map').focus()")
        browser.press("ArrowRight", "ArrowRight", "ArrowRight")
        assert browser.run("return document.activeElement.id") == "tab-hosts"
        assert "the other host has no RDMA device" in browser.run(
            "return document.getElementById('panel-hosts').innerText"
        )
        browser.press("ArrowRight", "Tab")
        assert browser.run(FOCUSED).startswith("container redis.1")


def test_a_screen_reader_gets_everything(browser: Browser) -> None:
    """The tree of accessibility has names for all that can be used, and tables with headings."""
    with serving(with_problem(shop())) as url:
        opened(browser, url)
        browser.click("#tab-connections")
        nodes = [each for each in browser.tree() if not each.get("ignored")]
        named = {
            (str(each["role"]["value"]), str(each.get("name", {}).get("value", "")))
            for each in nodes
        }
        assert ("tab", "Connections") in named
        assert ("button", "Pause") in named
        assert ("searchbox", "Filter") in named
        assert ("columnheader", "Why no faster path") in named
        assert ("rowheader", "backup") in named
        assert ("heading", "Problems") in named
        usable = ("button", "tab", "checkbox", "searchbox", "link", "textbox")
        assert not [each for each in named if each[0] in usable and not each[1]]
        browser.click("#tab-map")
        pictures = {
            each.get("name", {}).get("value", "")
            for each in browser.tree()
            if each["role"]["value"] in ("image", "img") and not each.get("ignored")
        }
        assert "container redis.1 of redis, on alpha" in pictures
        assert "api.1 – redis.1: shm, 1 connection" in pictures


HOSTILE: Final = "</text><script>document.title='owned'</script><img src=x onerror=alert(1)>"


def test_hostile_names(browser: Browser) -> None:
    """Names with markup are shown as text, and nothing of them runs or is loaded."""
    swarm = shop()
    swarm.containers[0].name = HOSTILE
    swarm.containers[0].service = HOSTILE
    swarm.problems.append(swarm.problems[0] if swarm.problems else _problem(HOSTILE))
    with serving(swarm) as url:
        opened(browser, url)
        browser.point('.node[aria-label*="owned"]')
        for view in ("map", "connections", "services", "hosts"):
            browser.click(f"#tab-{view}")
        assert HOSTILE in browser.run("return document.body.textContent")
        assert browser.run("return document.querySelectorAll('img, main script').length") == 0
        assert browser.run("return document.title") == "FreeFlow on alpha"
        assert browser.messages() == []


def _problem(text: str) -> Finding:
    return Finding("error", text, text, text)


def test_the_policy_holds(browser: Browser) -> None:
    """If a bug made markup of a name, the browser would not run it."""
    with serving(shop()) as url:
        opened(browser, url)
        script = """
        try { document.body.innerHTML = "<img src=x onerror=alert(1)>"; return "made"; }
        catch (error) { return error.name; }
        """
        assert browser.run(script) == "TypeError"
        inline = "const e = document.createElement('script'); e.textContent = 'x = 1'; return 1"
        assert browser.run(f"try {{ {inline} }} catch (error) {{ return error.name }}") == (
            "TypeError"
        )
        browser.messages()


def test_token(browser: Browser) -> None:
    """The page asks for the token; the link of `freeflow ui` brings it, and it doesn't stay in the
    address.
    """
    with serving(shop(), TOKEN) as url:
        browser.open(url)
        browser.wait("return !document.getElementById('login').hidden")
        assert browser.run("return document.getElementById('content').hidden")
        browser.press(*"wrong", "Enter")
        browser.wait("return document.getElementById('login-error').textContent")
        browser.press(*TOKEN, "Enter")
        browser.wait(UPDATES, 1)
        assert browser.run("return document.getElementById('login').hidden")
        browser.run("sessionStorage.clear()")
        opened(browser, f"{url}#token={TOKEN}")
        assert browser.run("return location.href") == url
        # Opened in a tab that has the page already, the link loads nothing anew.
        browser.run("sessionStorage.clear()")
        opened(browser, url, 0)
        browser.wait("return !document.getElementById('login').hidden")
        browser.open(f"{url}#token={TOKEN}")
        browser.wait(UPDATES, 1)
        assert browser.run("return location.href") == url
        browser.run("sessionStorage.clear()")
        browser.messages()


def test_a_page_that_is_off(browser: Browser) -> None:
    """Where the page needs a token and has none, it says how to set one, and shows nothing."""
    with serving(shop(), loopback=False) as url:
        browser.open(url)
        browser.wait("return document.getElementById('live').textContent.includes('UI_TOKEN=')")
        assert browser.run("return document.getElementById('content').hidden")
        assert "backup" not in browser.run("return document.body.textContent")
        browser.messages()


def test_dark_and_still(browser: Browser) -> None:
    """The page follows the system's colours, and its wish for less motion."""
    background = "return getComputedStyle(document.body).backgroundColor"
    motion = "return getComputedStyle(document.querySelector('.wire')).transitionDuration"
    with serving(shop()) as url:
        opened(browser, url)
        try:
            browser.emulate(prefers_color_scheme="light", prefers_reduced_motion="no-preference")
            light = browser.run(background)
            assert browser.run(motion) == "0.4s, 0.4s"
            browser.emulate(prefers_color_scheme="dark", prefers_reduced_motion="reduce")
            assert browser.run(background) != light
            assert browser.run(motion) == "0s"
        finally:
            browser.emulate()


def test_filter_and_legend(browser: Browser) -> None:
    """The filter leaves what has its text in name, host, network or reason; a path of the legend
    can be hidden.
    """
    with serving(shop()) as url:
        opened(browser, url)
        browser.click("#filter")
        browser.press(*"gamma")
        assert labels(browser, ".edge") == [
            "api.1 – search.1: relay, 1 connection",
            "api.1 – web.2: overlay+ebpf, 1 connection",
        ] or all("search.1" in each or "web.3" in each for each in labels(browser, ".edge"))
        assert "container postgres.1 of postgres, on beta" in labels(browser, ".node.out")
        browser.run("document.getElementById('filter').value = ''")
        browser.press("x")
        browser.press("\ue003")
        browser.click("#legend .shm input")
        assert not [each for each in labels(browser, ".edge") if ": shm" in each]
        assert [each for each in labels(browser, ".edge") if ": rdma" in each]


def test_pause_and_loss(browser: Browser) -> None:
    """A paused page stays as it is; without the router it says why there are no connections; when
    the plugin ends it says that it tries again.
    """
    swarm = shop()
    down: list[RouterAway] = []

    def traffic() -> TrafficReport:
        if down:
            raise down[0]
        return swarm.traffic()

    live = "return document.getElementById('live').textContent"
    with serving(PageSource(swarm.status, swarm.addresses, traffic)) as url:
        opened(browser, url)
        browser.click("#pause")
        assert browser.run(live) == "paused"
        down.append(RouterAway("the router does not answer"))
        browser.click("#pause")
        browser.wait(f"{live}.includes('the router does not answer')")
        assert labels(browser, ".edge") == []
        assert len(labels(browser, ".node.container")) == len(swarm.containers)
        down.clear()
        browser.wait("return document.querySelectorAll('.edge').length > 0")


COUNT: Final = """
window.work = {added: 0, removed: 0, set: 0};
new MutationObserver((records) => {
  for (const each of records) {
    window.work.added += each.addedNodes.length;
    window.work.removed += each.removedNodes.length;
    if (each.type !== "childList") window.work.set += 1;
  }
}).observe(document.getElementById("drawing"),
           {subtree: true, childList: true, attributes: true, characterData: true});
"""


def test_a_thousand_containers(browser: Browser) -> None:
    """With 1,000 containers and 900 connections the page has a bounded number of elements, and an
    update touches as many as have changed.
    """
    swarm = crowd(1000, 900)
    with serving(swarm) as url:
        opened(browser, url, 3)
        assert len(labels(browser, ".node.container")) == 1000
        drawn = len(labels(browser, ".edge"))
        assert drawn == 300
        assert "only in the view Connections" in browser.run("return document.body.innerText")
        assert browser.run("return document.querySelectorAll('*').length") < 6000
        browser.run(COUNT)
        seen = browser.run("return Number(document.documentElement.dataset.updates)")
        browser.wait(UPDATES, seen + 3)
        assert browser.run("return window.work") == {"added": 0, "removed": 0, "set": 0}
        for link in swarm.links[-10:]:
            swarm.move(link, "shm")
        browser.wait("return document.querySelectorAll('.edge.shm').length === 10")
        seen = browser.run("return Number(document.documentElement.dataset.updates)")
        browser.wait(UPDATES, seen + 2)
        work = browser.run("return window.work")
        assert work["added"] == work["removed"] == 0
        assert work["set"] <= 10 * 8
        browser.click("#tab-connections")
        rows = "return document.querySelectorAll('#panel-connections tbody tr').length"
        assert browser.run(rows) == 200

"""Takes the pictures of the live page, `docs/pictures/ui-*.png`: `python -m tools.screenshots`.

The page is real, in a real browser; the Swarm that it shows is the example of
`testbed/example_swarm.py`. Each picture carries the hash of what it was made from, so a test can
tell without a browser whether it is up to date.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from plugin.bounded_server import BoundedServer
from plugin.page_app import FOLDER, PageAccess, create_page
from plugin.page_feed import PageFeed
from testbed import example_swarm
from testbed.browser import Browser

PICTURES: Final = Path(__file__).parents[1] / "docs/pictures"
MARK: Final = "source"
COLOURS: Final = 96
"""As many tell all lines apart, and keep the files small."""


@dataclass(frozen=True)
class Screenshot:
    """A picture: its size, the colours of the page, and what is done before it is taken."""

    name: str
    width: int
    height: int
    scheme: str
    act: Callable[[Browser], None]


def _choose_redis(browser: Browser) -> None:
    browser.click('[aria-label^="container redis.1"]')


def _show_connections(browser: Browser) -> None:
    browser.click("#tab-connections")
    browser.point("h1")


SCREENSHOTS: Final = (
    Screenshot("ui-map", 1280, 860, "light", lambda browser: browser.point("h1")),
    Screenshot("ui-details", 1280, 860, "dark", _choose_redis),
    Screenshot("ui-connections", 1280, 860, "light", _show_connections),
)


def source_hash() -> str:
    """Of all that the pictures show."""
    found = hashlib.sha256()
    for path in (*sorted(FOLDER.iterdir()), Path(example_swarm.__file__), Path(__file__)):
        found.update(path.name.encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:16]


def stored_hash(path: Path) -> str:
    """Of what a stored picture was made from."""
    with Image.open(path) as picture:
        return str(picture.info.get(MARK, ""))


def small(png: bytes, source: str) -> bytes:
    """The same picture with few colours, and with the mark of its source."""
    marks = PngInfo()
    marks.add_text(MARK, source)
    out = io.BytesIO()
    with Image.open(io.BytesIO(png)) as picture:
        full = picture.convert("RGB")
        # The method that keeps rare colours: those of thin lines.
        few = full.quantize(COLOURS, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
        few.save(out, "PNG", optimize=True, pnginfo=marks)
    return out.getvalue()


def main() -> None:
    swarm = example_swarm.with_problem(example_swarm.shop())
    access = PageAccess("", loopback=True)
    server = BoundedServer(("127.0.0.1", 0), create_page(PageFeed(swarm.source()), access))
    server.start()
    try:
        for each in SCREENSHOTS:
            with Browser(each.width, each.height) as browser:
                browser.emulate(prefers_color_scheme=each.scheme, prefers_reduced_motion="reduce")
                browser.open(f"http://127.0.0.1:{server.server_port}/")
                browser.wait("return document.documentElement.dataset.updates >= 2")
                each.act(browser)
                path = PICTURES / f"{each.name}.png"
                path.write_bytes(small(browser.picture(), source_hash()))
                print(f"{path.name}: {path.stat().st_size // 1024} KiB")
    finally:
        server.stop()


if __name__ == "__main__":
    main()

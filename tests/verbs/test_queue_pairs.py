"""Queue pairs through the functions that programs call, without a router: see `queue_pairs.c`,
`queue_kinds.c`, `last_words.c` and `queue_torture.c`.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.verbs.conftest import SANITIZERS, SECONDS, compile_test, run_test, some_seed, sources


@pytest.fixture(scope="module", params=SANITIZERS)
def torture(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """`queue_torture`, built once for each sanitizer."""
    folder = tmp_path_factory.mktemp("torture")
    return compile_test("queue_torture", folder, request.param, *sources())


@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_operations_and_errors(tmp_path: Path, sanitizer: str) -> None:
    """Each operation arrives byte for byte, each error is told to both sides as a device tells it,
    and limits, order and attributes are those of a device.
    """
    run_test(compile_test("queue_pairs", tmp_path, sanitizer, *sources()))


@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_unreliable_and_shared(tmp_path: Path, sanitizer: str) -> None:
    """Queue pairs of type UC lose what can't be executed and go on, those with a shared receive
    queue take turns at its receives and don't wait for ever, and address handles lead where they
    say.
    """
    run_test(compile_test("queue_kinds", tmp_path, sanitizer, *sources()))


@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_peer_that_ends(tmp_path: Path, sanitizer: str) -> None:
    """What a process has executed completes at its peer, wherever the process ends once its program
    can see it: see `last_words.c`.
    """
    wrapped = (
        "-Wl,--wrap=completions_put",
        "-Wl,--wrap=key_release",
        "-Wl,--wrap=queue_publish_put",
    )
    run_test(compile_test("last_words", tmp_path, sanitizer, *sources(), *wrapped))


@pytest.mark.timeout(2 * int(SECONDS) + 200)
@pytest.mark.parametrize("kind", ["local", "remote", "direct"])
@pytest.mark.parametrize("mode", ["threads", "processes", "posters", "hostile"])
def test_torture(torture: Path, mode: str, kind: str) -> None:
    """Everything at once arrives byte for byte, also from threads that share a queue pair; and a
    hostile peer changes nothing but what it was given.
    """
    run_test(torture, mode, kind, SECONDS, str(some_seed()))

"""libbpf by ctypes: loads an object, reads and writes maps, pins, and runs a program once.

The library is the distribution's (1.1 in Debian 12, 1.5 in 13), and nothing newer than 1.0 is
called. Links to devices are made by the plain `bpf_link_create`, since the function for tcx came
with 1.3.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from dataplane.errors import KernelRefused

_LIBRARY: Final = "libbpf.so.1"
_LOG: Final = 1 << 20
TCX_INGRESS: Final = 46
"""BPF_TCX_INGRESS, linux/bpf.h from 6.6."""
NOEXIST: Final = 1
"""BPF_NOEXIST."""


class _MapInfo(ctypes.Structure):
    """The first fields of struct bpf_map_info (linux/bpf.h)."""

    _fields_ = tuple(
        (name, ctypes.c_uint32)
        for name in ("kind", "id", "key_size", "value_size", "max_entries", "flags")
    )


class _TestRun(ctypes.Structure):
    """The fields of struct bpf_test_run_opts (bpf/bpf.h) that are used."""

    _fields_ = (
        ("sz", ctypes.c_size_t),
        ("data_in", ctypes.c_void_p),
        ("data_out", ctypes.c_void_p),
        ("data_size_in", ctypes.c_uint32),
        ("data_size_out", ctypes.c_uint32),
        ("ctx_in", ctypes.c_void_p),
        ("ctx_out", ctypes.c_void_p),
        ("ctx_size_in", ctypes.c_uint32),
        ("ctx_size_out", ctypes.c_uint32),
        ("retval", ctypes.c_uint32),
        ("repeat", ctypes.c_int),
        ("duration", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("cpu", ctypes.c_uint32),
        ("batch_size", ctypes.c_uint32),
    )


@functools.cache
def _library() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(_LIBRARY, use_errno=True)
    except OSError as error:
        raise KernelRefused(
            f"{_LIBRARY} cannot be loaded", cause=str(error), remedy="install libbpf1"
        ) from error
    pointer = ctypes.c_void_p
    for name in (
        "bpf_object__open_file",
        "bpf_object__find_map_by_name",
        "bpf_object__find_program_by_name",
        "bpf_object__next_program",
        "bpf_object__next_map",
    ):
        getattr(library, name).restype = pointer
    for name, arguments in (
        ("bpf_object__open_file", [ctypes.c_char_p, pointer]),
        ("bpf_object__load", [pointer]),
        ("bpf_object__close", [pointer]),
        ("bpf_object__find_program_by_name", [pointer, ctypes.c_char_p]),
        ("bpf_object__next_program", [pointer, pointer]),
        ("bpf_object__next_map", [pointer, pointer]),
        ("bpf_program__name", [pointer]),
        ("bpf_program__fd", [pointer]),
        ("bpf_program__set_autoload", [pointer, ctypes.c_bool]),
        ("bpf_program__set_log_buf", [pointer, ctypes.c_char_p, ctypes.c_size_t]),
        ("bpf_program__set_log_level", [pointer, ctypes.c_uint32]),
        ("bpf_map__name", [pointer]),
        ("bpf_map__fd", [pointer]),
        ("bpf_map__reuse_fd", [pointer, ctypes.c_int]),
        ("bpf_map__key_size", [pointer]),
        ("bpf_map__value_size", [pointer]),
        ("bpf_map__max_entries", [pointer]),
    ):
        getattr(library, name).argtypes = arguments
    library.bpf_program__name.restype = ctypes.c_char_p
    library.bpf_map__name.restype = ctypes.c_char_p
    library.bpf_object__close.restype = None
    # It would print to stderr; errors are raised as exceptions instead.
    library.libbpf_set_print(None)
    return library


def _refused(what: str, number: int | None = None) -> KernelRefused:
    number = ctypes.get_errno() if number is None else number
    return KernelRefused(f"{what}: {os.strerror(number)}")


def possible_cpus() -> int:
    """The number of values in an element of a per-CPU map."""
    count = int(_library().libbpf_num_possible_cpus())
    if count < 1:
        raise _refused("counting CPUs", -count)
    return count


class Map:
    """One map; owns its descriptor. Keys and values are bytes of the map's sizes."""

    def __init__(self, name: str, descriptor: int) -> None:
        self.name = name
        self.descriptor = descriptor
        info, size = _MapInfo(), ctypes.c_uint32(ctypes.sizeof(_MapInfo))
        result = _library().bpf_obj_get_info_by_fd(
            descriptor, ctypes.byref(info), ctypes.byref(size)
        )
        if result:
            raise _refused(f"map {name}")
        self.key_size: int = info.key_size
        self.capacity: int = info.max_entries
        per_cpu = info.kind in (5, 6)
        # Values of a per-CPU map are padded to eight bytes each.
        self.value_size: int = (
            (info.value_size + 7 & ~7) * possible_cpus() if per_cpu else info.value_size
        )
        self.shape = (info.kind, info.key_size, info.value_size, info.max_entries)

    def get(self, key: bytes) -> bytes | None:
        value = ctypes.create_string_buffer(self.value_size)
        if _library().bpf_map_lookup_elem(self.descriptor, key, value) == 0:
            return value.raw
        number = ctypes.get_errno()
        if number != errno.ENOENT:
            raise _refused(f"map {self.name}", number)
        return None

    def put(self, key: bytes, value: bytes, flags: int = 0) -> bool:
        """False if `flags` is NOEXIST and the key exists."""
        result = _library().bpf_map_update_elem(self.descriptor, key, value, ctypes.c_uint64(flags))
        if result == 0:
            return True
        number = ctypes.get_errno()
        if number != errno.EEXIST:
            raise _refused(f"map {self.name}", number)
        return False

    def delete(self, key: bytes) -> bool:
        if _library().bpf_map_delete_elem(self.descriptor, key) == 0:
            return True
        number = ctypes.get_errno()
        if number != errno.ENOENT:
            raise _refused(f"map {self.name}", number)
        return False

    def keys(self) -> list[bytes]:
        """All keys. Those that are added or deleted meanwhile may be among them or not."""
        found: dict[bytes, None] = {}
        last: bytes | None = None
        following = ctypes.create_string_buffer(self.key_size)
        # If the last key was just deleted, the kernel starts again: bounded, and each key once.
        for _ in range(2 * self.capacity + 1):
            if _library().bpf_map_get_next_key(self.descriptor, last, following):
                break
            last = following.raw
            found[last] = None
        return list(found)

    def items(self) -> Iterator[tuple[bytes, bytes]]:
        for key in self.keys():
            value = self.get(key)
            if value is not None:
                yield key, value

    def pin(self, path: Path) -> None:
        pin(self.descriptor, path)

    def close(self) -> None:
        os.close(self.descriptor)


def pin(descriptor: int, path: Path) -> None:
    """Raises KernelRefused."""
    if _library().bpf_obj_pin(descriptor, str(path).encode()):
        raise _refused(f"pinning {path}")


def pinned(path: Path) -> int | None:
    """A descriptor of what is pinned there; None if nothing is."""
    descriptor = int(_library().bpf_obj_get(str(path).encode()))
    if descriptor >= 0:
        return descriptor
    number = ctypes.get_errno()
    if number != errno.ENOENT:
        raise _refused(f"opening {path}", number)
    return None


def link_device(program: int, index: int, kind: int = TCX_INGRESS) -> int:
    """Attach a program to a device of the calling thread's namespace; the link's descriptor.

    Raises:
        OSError: the kernel refused it.
    """
    descriptor = int(_library().bpf_link_create(program, index, kind, None))
    if descriptor < 0:
        raise OSError(ctypes.get_errno(), "linking a program to a device")
    return descriptor


def update_link(link: int, program: int) -> None:
    """Replace a link's program atomically. Raises OSError if the kernel refuses it."""
    if _library().bpf_link_update(link, program, None):
        raise OSError(ctypes.get_errno(), "replacing a link's program")


def detach_link(link: int) -> None:
    """Detach a link from its device at once.

    Without that the kernel detaches it some time after its last descriptor and pin are gone.
    """
    _library().bpf_link_detach(link)


class Object:
    """An object file: opened, loaded, then a source of descriptors, valid as long as it is open."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._object = _library().bpf_object__open_file(str(path).encode(), None)
        if not self._object:
            raise _refused(f"{path} cannot be opened as a BPF object")
        self._log = ctypes.create_string_buffer(_LOG)

    def _each(self, kind: str) -> Iterator[tuple[str, int]]:
        library = _library()
        following = getattr(library, f"bpf_object__next_{kind}")
        name = getattr(library, f"bpf_{kind}__name")
        item = following(self._object, None)
        while item:
            yield name(item).decode(), item
            item = following(self._object, item)

    def programs(self) -> list[str]:
        return [name for name, _ in self._each("program")]

    def only(self, *wanted: str) -> None:
        """Load only these programs."""
        for name, item in self._each("program"):
            _library().bpf_program__set_autoload(item, name in wanted)

    def reuse(self, name: str, descriptor: int) -> bool:
        """Use an existing map. False if it has another type or size."""
        library = _library()
        for listed, item in self._each("map"):
            if listed == name:
                present = Map(name, os.dup(descriptor))
                try:
                    wanted = (
                        int(library.bpf_map__type(ctypes.c_void_p(item))),
                        int(library.bpf_map__key_size(item)),
                        int(library.bpf_map__value_size(item)),
                        int(library.bpf_map__max_entries(item)),
                    )
                    same = present.shape == wanted
                finally:
                    present.close()
                return same and library.bpf_map__reuse_fd(item, descriptor) == 0
        return False

    def load(self) -> None:
        """Raises KernelRefused with the verifier's last lines."""
        for _, item in self._each("program"):
            _library().bpf_program__set_log_buf(item, self._log, _LOG)
        if _library().bpf_object__load(self._object):
            number = ctypes.get_errno()
            said = self._log.value.decode(errors="replace").strip().splitlines()
            hint = "; the limit of locked memory is too low" if number == errno.EPERM else ""
            tail = f" ({' / '.join(said[-3:])})" if said else ""
            raise KernelRefused(
                f"the kernel does not take {self.path.name}: {os.strerror(number)}{hint}{tail}"
            )

    def map(self, name: str) -> Map:
        """A map, with a new descriptor."""
        for listed, item in self._each("map"):
            if listed == name:
                return Map(name, os.dup(_library().bpf_map__fd(item)))
        raise KernelRefused(f"{self.path.name} has no map {name}")

    def program(self, name: str) -> int:
        """A program's descriptor; the object closes it."""
        item = _library().bpf_object__find_program_by_name(self._object, name.encode())
        if not item:
            raise KernelRefused(f"{self.path.name} has no program {name}")
        return int(_library().bpf_program__fd(item))

    def close(self) -> None:
        if self._object:
            _library().bpf_object__close(self._object)
            self._object = None

    def __enter__(self) -> Object:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def run_once(program: int, frame: bytes) -> int:
    """Run a program on a frame; its return value. Raises OSError if it cannot be run."""
    given = ctypes.create_string_buffer(frame, len(frame))
    taken = ctypes.create_string_buffer(len(frame) + 256)
    options = _TestRun(
        sz=ctypes.sizeof(_TestRun),
        data_in=ctypes.cast(given, ctypes.c_void_p),
        data_size_in=len(frame),
        data_out=ctypes.cast(taken, ctypes.c_void_p),
        data_size_out=len(taken),
        repeat=1,
    )
    if _library().bpf_prog_test_run_opts(program, ctypes.byref(options)):
        raise OSError(ctypes.get_errno(), "trying a program")
    return int(options.retval)

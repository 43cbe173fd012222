"""Which parts of the fast path the running kernel supports: loads each program, and runs some once.

Stages, each of which needs the one before it:

    same-host   from container to container of one host         bpf_redirect_peer (Linux 5.10)
    receive     from the VXLAN device to the container           the same
    tunnel      from container to NIC and from NIC to container  bpf_adjust_room with an Ethernet header (5.14)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from dataplane.ebpf import map_layout
from dataplane.ebpf.libbpf import Object, run_once
from dataplane.errors import KernelRefused

STAGES: Final = ("same-host", "receive", "tunnel")
PROGRAMS: Final = {
    "same-host": ("ff_port",),
    "receive": ("ff_vxlan",),
    "tunnel": ("ff_out", "ff_in", "ff_nic"),
}
TRIALS: Final = {
    "encap4": ("ff_try_encap", map_layout.ENCAP4),
    "encap6": ("ff_try_encap", map_layout.ENCAP6),
    "decap4": ("ff_try_decap4", map_layout.DECAP4),
    "decap6": ("ff_try_decap6", map_layout.DECAP6),
}
_MACS: Final = bytes.fromhex("020000000001020000000002")
_IP4: Final = bytes.fromhex("4500006400000000401100000a0000010a000002")
_IP6: Final = bytes.fromhex("6000000000501140") + bytes(32)
_VXLAN: Final = bytes.fromhex("8000 12bf 0050 0000 08000000 00000100")
FRAMES: Final = {
    "encap4": _MACS + b"\x08\x00" + _IP4 + bytes(80),
    "encap6": _MACS + b"\x86\xdd" + _IP6 + bytes(80),
    "decap4": _MACS + b"\x08\x00" + _IP4 + _VXLAN + _MACS + b"\x08\x00" + _IP4 + bytes(80),
    "decap6": _MACS + b"\x08\x00" + _IP4 + _VXLAN + _MACS + b"\x86\xdd" + _IP6 + bytes(80),
}
_ANSWERS: Final = {
    1: "the kernel does not encapsulate or decapsulate",
    2: "the kernel does not set the packet's protocol afterwards",
}


@dataclass(frozen=True, slots=True)
class KernelSupport:
    """What the kernel supports.

    `refused` maps programs and `lacking` trials to the reason; `flags` are as in `ff_settings`.
    """

    refused: dict[str, str] = field(default_factory=dict)
    lacking: dict[str, str] = field(default_factory=dict)
    flags: int = 0

    @property
    def why_not(self) -> dict[str, str]:
        """Stages that cannot be used, and why."""
        reasons: dict[str, str] = {}
        before = ""
        for stage in STAGES:
            missing = [self.refused[name] for name in PROGRAMS[stage] if name in self.refused]
            if stage == "tunnel":
                missing += [
                    self.lacking[name] for name in ("encap4", "decap4") if name in self.lacking
                ]
            if missing or before:
                before = reasons[stage] = missing[0] if missing else before
        return reasons

    @property
    def stages(self) -> tuple[str, ...]:
        return tuple(stage for stage in STAGES if stage not in self.why_not)


def try_out(opened: Object) -> tuple[dict[str, str], int]:
    """Run the trials of a loaded object: reasons of those that fail, flags of the others."""
    lacking: dict[str, str] = {}
    flags = 0
    for name, (program, flag) in TRIALS.items():
        try:
            answer = run_once(opened.program(program), FRAMES[name])
        except OSError as error:
            lacking[name] = f"the trial cannot run: {error.strerror}"
            continue
        if answer == 0:
            flags |= flag
        else:
            lacking[name] = _ANSWERS.get(answer, f"unknown answer {answer}")
    return lacking, flags


def probe_kernel(path: Path) -> KernelSupport:
    """Load each program alone, and run the trials. Nothing stays in the kernel.

    Raises:
        KernelRefused: the file is not a BPF object, or libbpf is missing.
    """
    refused: dict[str, str] = {}
    lacking: dict[str, str] = {}
    flags = 0
    with Object(path) as listed:
        programs = listed.programs()
    trials = tuple(name for name in programs if name.startswith("ff_try_"))
    for wanted in (*((name,) for name in programs if name not in trials), trials):
        with Object(path) as opened:
            opened.only(*wanted)
            try:
                opened.load()
            except KernelRefused as error:
                refused |= dict.fromkeys(wanted, str(error))
            else:
                if wanted == trials:
                    lacking, flags = try_out(opened)
    if set(trials) & refused.keys():
        lacking = dict.fromkeys(TRIALS, refused[trials[0]])
    return KernelSupport(refused, lacking, flags)

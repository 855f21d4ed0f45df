"""`tonnage.devices`: what there is to load to."""

from __future__ import annotations

from typing import NamedTuple

from tonnage._native import _device_memory, _devices


class DeviceInfo(NamedTuple):
    """One device."""

    #: Its name in `device=` arguments, such as `"cuda:0"`.
    device: str
    #: What its maker calls it.
    name: str
    #: Bytes of its memory.
    total_memory: int
    #: Whether it shares the host's memory.
    unified: bool

    @property
    def free_memory(self) -> int:
        """Bytes of its memory that are free now. Makes use of the device."""
        return _device_memory(self.device)[1]


class DeviceKind(NamedTuple):
    """One kind of devices."""

    #: `"cpu"`, `"cuda"`, `"rocm"`, `"vulkan"` or `"metal"`.
    kind: str
    #: Its driver, where that says what it is.
    driver: str | None
    #: The devices that were found.
    devices: tuple[DeviceInfo, ...]
    #: Why there is none, and what to do; `None` where there is one.
    missing: str | None


def devices() -> tuple[DeviceKind, ...]:
    """Every kind of device that tensors can be brought to, and what was found of it.

    Drivers are opened, and no memory is taken.
    """
    return tuple(
        DeviceKind(kind, driver, tuple(DeviceInfo(*row) for row in found), missing)
        for kind, driver, found, missing in _devices()
    )

"""Faults that give no wrong number: errors in the vendor's words, waiting, slowness."""

from __future__ import annotations

import math
from typing import Any

from torch._ops import OpOverload

from beringia.chips.emulated import fault_script as script
from beringia.chips.emulated import fault_words as words
from beringia.chips.emulated.device import Kernel
from beringia.chips.emulated.planted import ATTENTION, PRODUCTS, Host, Planted


class AtProduct(Planted):
    """Something that happens at one product of the step, attention counted."""

    def interpose(self, func: OpOverload, kernel: Kernel) -> Kernel:
        if func not in PRODUCTS and func is not ATTENTION:
            return kernel

        def product(*args: Any, **kwargs: Any) -> Any:
            number = self.count
            self.count += 1
            if self.present and number == getattr(self.fault, "operator", 0):
                self.report(func)
                self.happen()
            return kernel(*args, **kwargs)

        return product

    def happen(self) -> None:
        """What happens there."""
        raise NotImplementedError


class DeviceException(AtProduct):
    """See `script.DeviceException`."""

    fault: script.DeviceException

    def __init__(self, fault: script.DeviceException, position: int, device: Host) -> None:
        super().__init__(fault, position, device)
        self._dead = False
        # A script with a code that the vendor does not have is refused when it is opened, not at step 70.
        words.device_error(device.vendor, fault.code)

    def interpose(self, func: OpOverload, kernel: Kernel) -> Kernel:
        kernel = super().interpose(func, kernel)
        return self._while_alive(kernel) if self.fault.sticky else kernel

    def _while_alive(self, kernel: Kernel) -> Kernel:
        def compute(*args: Any, **kwargs: Any) -> Any:
            if self._dead:
                raise words.device_error(self.device.vendor, self.fault.code)
            return kernel(*args, **kwargs)

        return compute

    def happen(self) -> None:
        self._dead = self.fault.sticky
        raise words.device_error(self.device.vendor, self.fault.code)


class OutOfMemory(AtProduct):
    """See `script.OutOfMemory`."""

    def happen(self) -> None:
        raise words.out_of_memory(self.device.vendor)


class Hang(AtProduct):
    """See `script.Hang`."""

    fault: script.Hang

    def happen(self) -> None:
        end = math.inf if self.fault.seconds is None else self.device.now() + self.fault.seconds
        while (left := end - self.device.now()) > 0:
            self.device.sleep(min(0.1, left))


class CollectiveTimeout(Planted):
    """See `script.CollectiveTimeout`."""

    fault: script.CollectiveTimeout

    def interpose(self, func: OpOverload, kernel: Kernel) -> Kernel:
        if func.namespace != "c10d":
            return kernel

        def collective(*args: Any, **kwargs: Any) -> Any:
            if self.present:
                self.report(func)
                self.device.sleep(self.fault.seconds)
                raise words.collective_timeout(self.device.vendor)
            return kernel(*args, **kwargs)

        return collective


class Slowness(Planted):
    """Sleeps, at operators, `factor` - 1 times the time that has passed since it last slept."""

    fault: script.Slowness
    _LEAST_SECONDS = 0.002

    def begin_step(self, step: int) -> None:
        super().begin_step(step)
        self._awake_since = self.device.now()

    def interpose(self, func: OpOverload, kernel: Kernel) -> Kernel:
        def compute(*args: Any, **kwargs: Any) -> Any:
            result = kernel(*args, **kwargs)
            if self.present:
                awake = self.device.now() - self._awake_since
                if awake >= self._LEAST_SECONDS:
                    self.report(func)
                    self.device.sleep(awake * (self.fault.factor - 1.0))
                    self._awake_since = self.device.now()
            return result

        return compute

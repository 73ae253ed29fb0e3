"""Energy and CO2 of a stage, by codecarbon without a network (Courty et al., https://github.com/mlco2/codecarbon)."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rocket.config.errors import RocketError
from rocket.config.schema import ReportingConfig
from rocket.usage import Usage

COUNTERS = "CPU by its own counters (RAPL), memory estimated"
ESTIMATE = "CPU and memory estimated"
METHODS = {
    COUNTERS: "The CPU's energy was read from its own counters (RAPL). They cover the whole package, whoever uses it. "
    "Memory is an estimate from its size, a GPU is read by its driver.",
    ESTIMATE: "This machine shows no energy counters (RAPL). The CPU's energy is time x power: thermal design power "
    "times the share of the cores' time that this process used. Memory is an estimate from its size, a GPU is read by "
    "its driver. Where the CPU is not recognized, as in most virtual machines, codecarbon takes a few watts a core. "
    "Such figures compare stages and methods on one machine; taken absolutely they may be off by a factor of two or "
    "more.",
}


class EnergyMeter:
    """Adds a block's energy to its `Usage`; does nothing unless the config wants it.

    The figures are those of the electricity that the machine draws: no cooling, no manufacture. Raises RocketError
    where codecarbon is wanted and missing, or has no such country.
    """

    def __init__(self, config: ReportingConfig) -> None:
        self.config = config
        if not config.energy:
            return
        try:
            from codecarbon.input import DataSource
        except ImportError:
            raise RocketError("reporting.energy=true needs a package: pip install codecarbon") from None
        if config.country is not None and config.country not in DataSource().get_global_energy_mix_data():
            raise RocketError(f"reporting.country={config.country!r}: codecarbon knows no such country; write null")
        with self.measure(Usage()):  # the first time takes seconds, to find the hardware: no stage is charged for them
            pass

    @contextmanager
    def measure(self, usage: Usage) -> Iterator[None]:
        """Energy in kWh, and CO2 in kg where the country is known, of the block."""
        if not self.config.energy:
            yield
            return
        from codecarbon.core.cpu import is_rapl_available

        tracker = self._tracker()
        tracker.start_task()  # start() also measures in a thread, which counts twice when it meets the end
        try:
            yield
        finally:
            data = tracker.stop_task()
            usage.energy_kwh = float(data.energy_consumed)
            usage.co2_kg = float(data.emissions) if self.config.country else None
            usage.energy_source = COUNTERS if is_rapl_available() else ESTIMATE

    def _tracker(self) -> Any:
        """A tracker that writes and sends nothing, whatever a .codecarbon.config in the user's home says."""
        from codecarbon import OfflineEmissionsTracker

        logging.getLogger("codecarbon").setLevel(logging.CRITICAL)
        return OfflineEmissionsTracker(
            country_iso_code=self.config.country,
            force_carbon_intensity_g_co2e_kwh=None if self.config.country else 0.0,
            tracking_mode="process",
            output_methods=[],
            emissions_endpoint=None,
            electricitymaps_api_token=None,
            log_level="critical",
        )

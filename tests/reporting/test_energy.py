"""Energy: off unless wanted, plausible where it is, and without a network."""

from __future__ import annotations

import socket
import sys
import time

import pytest

from rocket.config.errors import RocketError
from rocket.config.schema import ReportingConfig
from rocket.reporting.energy import COUNTERS, ESTIMATE, METHODS, EnergyMeter
from rocket.usage import Usage


def test_off_costs_nothing(monkeypatch):
    monkeypatch.setitem(sys.modules, "codecarbon", None)
    usage = Usage()
    with EnergyMeter(ReportingConfig()).measure(usage):
        pass
    assert usage == Usage()


def test_without_the_package(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("codecarbon")] + ["codecarbon"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(RocketError, match=r"pip install codecarbon"):
        EnergyMeter(ReportingConfig(energy=True))


class TestWithCodecarbon:
    @pytest.fixture(autouse=True)
    def only_here(self, monkeypatch, tmp_path):
        """No network, and a home whose settings would send everything."""
        pytest.importorskip("codecarbon", reason="pip install codecarbon")

        def connect(self: socket.socket, address: object) -> None:
            if self.family != socket.AF_UNIX:
                pytest.fail(f"connected to {address}")

        monkeypatch.setattr(socket.socket, "connect", connect)
        (tmp_path / ".codecarbon.config").write_text(
            "[codecarbon]\nsave_to_api=true\nsave_to_file=true\nelectricitymaps_api_token=x\n"
            "emissions_endpoint=http://example.com\n"
        )
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.chdir(tmp_path)
        yield
        assert [path.name for path in tmp_path.iterdir()] == [".codecarbon.config"]

    def spent(self, seconds: float, country: str | None = None) -> Usage:
        usage = Usage()
        with EnergyMeter(ReportingConfig(energy=True, country=country)).measure(usage):
            end = time.perf_counter() + seconds
            while time.perf_counter() < end:
                sum(range(1000))
        return usage

    def test_energy_grows_with_time(self):
        short, long = self.spent(0.3), self.spent(2.5)  # longer than codecarbon's own intervals of a second
        assert 3 * short.energy_kwh < long.energy_kwh
        assert long.energy_kwh < 2.5 * 2000 / 3.6e6  # no machine for this draws two kilowatts
        assert short.co2_kg is None
        assert short.energy_source in METHODS

    def test_co2_is_energy_times_the_countrys_mean(self):
        usage = self.spent(0.3, "FRA")
        assert 0.01 < usage.co2_kg / usage.energy_kwh < 0.2  # nuclear, mostly
        dirtier = self.spent(0.3, "POL")
        assert dirtier.co2_kg / dirtier.energy_kwh > 3 * usage.co2_kg / usage.energy_kwh

    def test_a_block_that_fails_is_measured_and_fails(self):
        usage = Usage()
        with pytest.raises(KeyError), EnergyMeter(ReportingConfig(energy=True)).measure(usage):
            raise KeyError
        assert usage.energy_kwh >= 0

    def test_blocks_within_blocks(self):
        meter = EnergyMeter(ReportingConfig(energy=True))
        outer, inner = Usage(), Usage()
        with meter.measure(outer), meter.measure(inner):
            time.sleep(0.1)
        assert 0 < inner.energy_kwh <= outer.energy_kwh * 1.5

    @pytest.mark.parametrize(("counters", "source"), [(True, COUNTERS), (False, ESTIMATE)])
    def test_source(self, monkeypatch, counters, source):
        from codecarbon.core import cpu

        meter = EnergyMeter(ReportingConfig(energy=True))
        monkeypatch.setattr(meter, "_tracker", lambda: Recorded())
        monkeypatch.setattr(cpu, "is_rapl_available", lambda: counters)
        usage = Usage()
        with meter.measure(usage):
            pass
        assert (usage.energy_kwh, usage.co2_kg, usage.energy_source) == (0.25, None, source)

    def test_unknown_country(self):
        with pytest.raises(
            RocketError, match=r"reporting\.country='XYZ': codecarbon knows no such country; write null"
        ):
            EnergyMeter(ReportingConfig(energy=True, country="XYZ"))


class Recorded:
    """A tracker of a known block."""

    energy_consumed = 0.25
    emissions = 0.0

    def start_task(self) -> None: ...

    def stop_task(self) -> Recorded:
        return self

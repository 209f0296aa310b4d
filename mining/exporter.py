"""The miner's figures for Prometheus: what its status file says, and how old its work is, at the moment of each scrape."""

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, ProcessCollector, start_http_server
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from mining.figures import FILTERED, RATES, STEPS, ages
from trainer.errors import InputError

log = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"  # to serve other machines, put a proxy in front that can ask for a password
GAUGES = {
    "version": "version of the negatives at work",
    "done": "of the phase at work, on rank 0",
    "total": "of the phase at work, on rank 0",
    "recall": "of the index, audited, of the last version",
    "negatives_version": "newest version of the negatives",
    "num_refused": "versions refused since the service started",
    **RATES,
    **STEPS,
}


class FiguresCollector(Collector):
    """Turns the status into gauges `negpool_miner_…`; a figure that is not there yet is left out."""

    def __init__(self, run: Path, values: Mapping[str, Any]):
        """values: the status, which changes while the service is at work."""
        self._run, self._values = run, values

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Yield all figures of this moment."""
        values = dict(self._values)
        values |= ages(self._run, values)
        phase = GaugeMetricFamily("negpool_miner_phase", "1 for the phase at work", labels=["phase"])
        phase.add_metric([str(values.get("phase"))], 1)
        yield phase
        dropped = GaugeMetricFamily("negpool_miner_dropped", FILTERED, labels=["filter"])
        for name, count in values.get("dropped", {}).items():
            dropped.add_metric([name], count)
        yield dropped
        for name, what in GAUGES.items():
            if values.get(name) is not None:
                yield GaugeMetricFamily(f"negpool_miner_{name}", what, value=values[name])


def serve_figures(run: Path, values: Mapping[str, Any], port: int) -> None:
    """Serve the figures on this machine's loopback until the process ends; raises InputError if the port is taken."""
    registry = CollectorRegistry()
    registry.register(FiguresCollector(run, values))
    ProcessCollector(registry=registry)  # CPU seconds, memory, open files
    try:
        server, _ = start_http_server(port, LOOPBACK, registry)
        log.info("figures for Prometheus: http://%s:%d/metrics", LOOPBACK, server.server_port)
    except (OSError, OverflowError) as error:
        raise InputError(f"--metrics-port {port} cannot be opened on {LOOPBACK} ({error}); choose another port") from error

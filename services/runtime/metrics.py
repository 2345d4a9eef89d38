"""Meters of OpenTelemetry, exposed in the Prometheus text format.

`meter` may be used before `configure`: instruments made early start to count when it has run.
Counts that are kept anyway are better observed (`create_observable_counter`) than recorded: a
recording costs microseconds, an observation nothing until it is asked for.
"""

from __future__ import annotations

from typing import Final

import prometheus_client
from opentelemetry import metrics
from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.metrics import Meter
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.resources import Resource

CONTENT_TYPE: Final = prometheus_client.CONTENT_TYPE_LATEST


def meter(name: str) -> Meter:
    """One per part: `tessera.store`, `tessera.identityd`. Instruments carry the full name,
    `tessera_store_calls`, since the meter's name does not reach the exposition."""
    return metrics.get_meter(name)


def configure(service: str) -> None:
    """Once per process, by process.run."""
    resource = Resource.create({"service.name": f"tessera-{service}"})
    metrics.set_meter_provider(
        MeterProvider(resource=resource, metric_readers=[PrometheusMetricReader()])
    )


def exposition() -> bytes:
    """All meters of the process as Prometheus text."""
    return prometheus_client.generate_latest()

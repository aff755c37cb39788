"""Metrics, sinks, plots and the report of a run."""

from nemotron3.observe.metrics import MetricLog, MetricSink, MetricWindow, read_metrics
from nemotron3.observe.report import ReportSummary, TextSample, write_report
from nemotron3.observe.sinks import JsonlSink, TensorBoardSink

__all__ = [
    "JsonlSink",
    "MetricLog",
    "MetricSink",
    "MetricWindow",
    "ReportSummary",
    "TensorBoardSink",
    "TextSample",
    "read_metrics",
    "write_report",
]

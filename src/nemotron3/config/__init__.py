"""The record of a run: configuration to JSON and back, and units of duration."""

from nemotron3.config.record import from_record, to_record
from nemotron3.config.run import RUN_FILE, read_record, read_run, run_record, write_json, write_run
from nemotron3.config.units import Duration, Steps, Tokens, parse_duration

__all__ = [
    "RUN_FILE",
    "Duration",
    "Steps",
    "Tokens",
    "from_record",
    "parse_duration",
    "read_record",
    "read_run",
    "run_record",
    "to_record",
    "write_json",
    "write_run",
]

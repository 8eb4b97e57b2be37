"""Traces live in `slos_serve.traces`; this name of them stays for whoever wrote it down."""

from slos_serve.traces.trace import SMALL_TRACE, Trace, read_lengths, read_trace, small_trace, write_trace

__all__ = ["SMALL_TRACE", "Trace", "read_lengths", "read_trace", "small_trace", "write_trace"]

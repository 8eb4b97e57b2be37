"""One module for each format. See `slos_serve.traces.registry`."""

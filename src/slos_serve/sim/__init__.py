"""Serve requests on a virtual clock, with the same planners and the same rules as on a real engine."""

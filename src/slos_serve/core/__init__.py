"""The decision core: pure functions of what a replica holds."""

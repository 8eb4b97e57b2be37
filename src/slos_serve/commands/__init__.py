"""The verbs of `slos-serve`, one module each."""

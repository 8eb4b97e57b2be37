"""SLOs-Serve: multi-SLO serving for large language models, on vLLM."""

__version__ = "0.1.0"

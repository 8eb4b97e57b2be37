"""Load, grading and reports: how the promises are measured, against any OpenAI-compatible server."""

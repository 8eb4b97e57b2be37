"""The HTTP edge: read what a client asks, say what it gets, show how it went.

vLLM's own OpenAI server does the serving; this package is one ASGI middleware around it
(`--middleware slos_serve.http.middleware.SloMiddleware`) and a hub that what the engine publishes flows into.
"""

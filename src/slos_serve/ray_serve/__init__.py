"""Many replicas behind one OpenAI endpoint, on Ray Serve LLM: routed by plan, passed on, retried.

Ray Serve runs the replicas and its ingress serves HTTP; this package decides. `app.build_openai_app` takes
what Ray's own builder of that name takes and returns its application with our scheduler in every replica,
our request router before them, and an ingress that hands a request on where it gets no promise.
"""

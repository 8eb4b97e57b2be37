"""vLLM's side of the plug-in: every private name of vLLM that is read or hooked."""

"""The vLLM host: a scheduler class that steers vLLM's own `schedule()` by the planner's plan."""

"""When the planner does not steer, and what it may cost."""

"""What is asked of simulated replicas."""

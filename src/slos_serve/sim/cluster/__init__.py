"""Many replicas behind one front door."""

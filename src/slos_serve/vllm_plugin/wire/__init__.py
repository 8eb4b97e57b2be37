"""What leaves the engine process, and gets in."""

"""What a run leaves in files, and what reads it: step records and profiles."""

"""What a person at a terminal sees while they wait."""

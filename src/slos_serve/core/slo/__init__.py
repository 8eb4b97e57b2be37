"""What a promise means: when tokens are due, how they are graded."""

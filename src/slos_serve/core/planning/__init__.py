"""The parts of a plan, from what requests ask for to the batch."""

"""The rate up to which promises are kept, searched for."""

"""One replica on the virtual clock."""

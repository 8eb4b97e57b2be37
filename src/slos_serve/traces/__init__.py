"""Workload traces as people have them: recognised by content, read row by row, checked, and told about."""

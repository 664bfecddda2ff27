"""What calls of the operations cost in Python, on a machine without a GPU."""

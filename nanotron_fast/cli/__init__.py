"""The command `nanotron-fast`."""

"""Our operations under an installed Nanotron."""

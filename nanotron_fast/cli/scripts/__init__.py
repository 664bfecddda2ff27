"""The commands that Nanotron's users know, with their flags."""

"""The conversion commands that Nanotron's users know, with the flags that they know."""

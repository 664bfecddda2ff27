"""Plans: what a conversion or a comparison will do, byte by byte, before it does it."""

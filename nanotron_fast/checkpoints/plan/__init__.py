"""Plans: what moves where, known before the first byte is moved."""

"""flash_attn.layers, as far as Nanotron uses it."""

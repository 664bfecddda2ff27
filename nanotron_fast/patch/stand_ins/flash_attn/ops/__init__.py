"""flash_attn.ops, as far as Nanotron uses it."""

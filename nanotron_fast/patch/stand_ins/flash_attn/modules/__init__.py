"""flash_attn.modules, as far as Nanotron uses it."""

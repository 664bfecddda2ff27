"""flash_attn.ops.triton, as far as Nanotron uses it."""

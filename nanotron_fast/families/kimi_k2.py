"""Kimi-K2: a DeepSeek-V3 under another model_type, which transformers runs by code of its own."""

from __future__ import annotations

from dataclasses import replace

from nanotron_fast.families import deepseek_v3

FAMILY = replace(deepseek_v3.FAMILY, name="kimi_k2")

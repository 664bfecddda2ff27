"""Norms of queries and keys in some models of a family: the key that says so, and tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nanotron_fast.families.decoder import BLOCK, LAYER
from nanotron_fast.families.parts import Address, Cut, Param, Part, Seat
from nanotron_fast.families.quirk import OneKey, set_attention
from nanotron_fast.families.rules import Context, Rotary, Rule, runs
from nanotron_fast.formats.fields import Fields
from nanotron_fast.model.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class QkNorm(OneKey):
    """The `key` that says whether queries and keys are normalised, by norms of a `kind`."""

    kind: str
    expresses: frozenset[str] = frozenset({"qk_norm"})

    def read(self, reader: Fields, fields: dict[str, Any]) -> None:
        """Gives layers the norms. Raises ConfigError."""
        set_attention(fields, qk_norm=self.kind if reader.flag(self.key) else None)

    def write(self, config: dict[str, Any], spec: ModelSpec) -> None:
        """Adds its key."""
        config[self.key] = spec.qk_norm is not None


@dataclass(frozen=True, slots=True)
class WeightsOfHeads:
    """A vector for each head: a parameter (heads, head_dim), of which ranks get whole heads.

    A published model has one tensor of that shape or, with `{head}` in its name, one for each head.
    Where rotary pairs lie elsewhere in a head, so do the weights of their rows.
    """

    tensor: str
    param: str
    heads: str
    rotary: Rotary = ("rotary_first", "rotary_end")
    block: str = "layer"
    when: str | None = "qk_norm"
    layers: str = "all"

    def expand(self, name: str, context: Context) -> Param:
        heads, length = context.size(self.heads), context.size("head_dim")
        shape, unit = (heads, length), self.heads.replace("_", " ")
        copied = context.heads((self.heads, "head_dim"))
        parts: list[Part] = []
        for run in runs(name, context, self.rotary, length):
            first, steps = run.param.first, (1, run.param.step, 0)
            if "{head}" not in self.tensor:
                tensor = Address(
                    self.tensor.format(layer=context.layer),
                    shape,
                    (0, run.tensor.first),
                    (0, 1, 1),
                    (1, run.tensor.step, 0),
                )
                param = Address(name, shape, (0, first), (0, 1, 1), steps)
                sizes = (heads, run.length, 1)
                parts.append(Part((tensor,), param, sizes, cuts={"tp": Cut(0, unit, heads=copied)}))
                continue
            for head in range(heads):
                tensor = Address(
                    self.tensor.format(layer=context.layer, head=head),
                    (length,),
                    (run.tensor.first,),
                    (0, 0, 0),
                    (0, run.tensor.step, 0),
                )
                param = Address(name, shape, (head, first), (0, 1, 1), steps)
                seat = Seat(head, heads, unit, copied)
                parts.append(Part((tensor,), param, (1, run.length, 1), seats={"tp": seat}))
        of_all = () if copied is None else (copied,)
        return Param(name, shape, tuple(parts), context.layer, cuts={"tp": 0}, heads=of_all)


def norms_of_heads(query: str, key: str) -> tuple[Rule, ...]:
    """The two norms' weights, by what Hugging Face calls them within attention."""
    return (
        WeightsOfHeads(f"{LAYER}self_attn.{query}", f"{BLOCK}attn.q_norm.weight", "heads"),
        WeightsOfHeads(f"{LAYER}self_attn.{key}", f"{BLOCK}attn.k_norm.weight", "kv_heads"),
    )

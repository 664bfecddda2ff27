"""What a job is told about the run that it belongs to."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Context:
    """`dry`: tiny shapes on the CPU, the kernels interpreted. Ceilings as `machine` measured them:
    copy_gb_per_s and matmul_tflop_per_s."""

    dry: bool = False
    ceilings: dict[str, float] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        import torch

        return torch.device("cpu" if self.dry else "cuda")

    def dtype(self, *, multiplies: bool = False) -> torch.dtype:
        """bf16; fp32 for products where kernels are interpreted, which gets them wrong in bf16."""
        import torch

        return torch.float32 if self.dry and multiplies else torch.bfloat16

    def size(self, real: int, tiny: int) -> int:
        return tiny if self.dry else real

    @property
    def compiler(self) -> dict[str, str]:
        """How torch.compile is asked: without a compiler for its code where the run is dry."""
        return {"backend": "aot_eager" if self.dry else "inductor"}

    def synchronize(self) -> None:
        import torch

        if not self.dry:
            torch.cuda.synchronize()


@dataclass(frozen=True)
class Small(Context):
    """The tiny shapes of a dry run, on a GPU: for a tool that makes every access of memory slow."""

    dry: bool = True

    @property
    def device(self) -> torch.device:
        import torch

        return torch.device("cuda")

    def dtype(self, *, multiplies: bool = False) -> torch.dtype:
        import torch

        return torch.bfloat16

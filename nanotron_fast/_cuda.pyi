"""The packer on NVIDIA GPUs. nanotron_fast/kernels/pack.py is the way to call it.

It is there where the package was built with a CUDA compiler, and can be imported without a driver.
"""

ARCHITECTURES: tuple[int, ...]
MAX_INLINE_ITEMS: int

def launch_inline(items: bytes, *, num_tiles: int, device: int, stream: int) -> None: ...
def launch(items: int, *, num_items: int, num_tiles: int, device: int, stream: int) -> None: ...
def problem_of(device: int) -> str: ...

"""Fused training operations, a file or a folder each; installed as `nanotron_fast.kernels`.

With the repository root on `sys.path` it is found under the name `kernels`, the name of another
package, and then it must do nothing.
"""

if __name__ == "nanotron_fast.kernels":
    from nanotron_fast.extras import require

    require("kernels", __name__)
    del require

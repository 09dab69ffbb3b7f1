"""What has to happen before anything large is imported.

Only tests run in this process. Where there is no GPU, Triton's kernels are tested in its interpreter, which is chosen
when triton is imported.
"""

import os

from normfree.garbage import collect_less

collect_less()

import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

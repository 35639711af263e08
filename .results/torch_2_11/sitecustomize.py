# SPDX-License-Identifier: MIT
"""PyTorch 2.11 under the former hex.py (commit f319ae1): the two names of 2.14 that it lacks.

    PYTHONPATH=.results/torch_2_11 python hex.py ...
"""
import importlib.util

if importlib.util.find_spec("torch"):
    import torch.nn.parallel
    from torch.distributed import _functional_collectives as collectives

    if not hasattr(collectives, "all_gather_single"):
        collectives.all_gather_single = collectives.all_gather_tensor_autograd

        class DistributedDataParallel(torch.nn.parallel.DistributedDataParallel):
            def __init__(self, module, forward_sync_buffers=None, **more):
                super().__init__(module, broadcast_buffers=bool(forward_sync_buffers), **more)

        torch.nn.parallel.DistributedDataParallel = DistributedDataParallel

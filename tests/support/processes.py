"""How the workers of multi-process tests end."""

import os
import sys

import torch.distributed


def leave_together() -> None:
    """The last call of a worker: every rank has arrived and written what it has to write.

    Without the usual teardown, in which gloo's threads now and then abort a process that has done its work ("terminate
    called without an active exception").
    """
    torch.distributed.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)

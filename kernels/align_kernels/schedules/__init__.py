"""What a call does with its chunks: schedules over one set of tiles, one class each.

They differ in what is saved between the forward and the backward of a chunk:

    forward      log-probs only                                                  2NVD
    online       no gradient for the head, plain logits: dX beside the softmax   4NVD
    frozen       no gradient for the head: dX without its factor g, kept         4NVD
    one pass     the loss closes inside a chunk: g is known while the logits are 6NVD, head frozen 4NVD
    keep         all logits, or their exponentials, fit and wait for g           6NVD, head frozen 4NVD
    recompute    the logits are made again when g arrives                        8NVD, head frozen 6NVD
    compaction   the columns that carry all but drop_mass wait for g             (2 + 4d)NVD, head frozen (2 + 2d)NVD

`one pass` starts in memory that is there anyway: that of a dW which is still to be written (aliasing.py).

With a drop_mass, `frozen` and `one pass` compact the columns too: d is the share that is kept. Rows whose softmax is
too flat for it take every column. Plain logits are those whose gradient is their probability times a constant: no
clamp, softcap, entropy or bias gradient; `one pass` keeps their exponentials (exponentials.py).

A new schedule is a class (base.py) and a line of the table below.
"""

from align_kernels.schedules.base import Schedule
from align_kernels.schedules.compaction import CompactFrozen, Compaction, CompactOnePass
from align_kernels.schedules.dense import Forward, Frozen, Keep, OnePass, Recompute
from align_kernels.schedules.device_losses import OnePassOfTokens
from align_kernels.schedules.exponentials import Online, PlainKeep, PlainOnePass

# in the order in which they are asked; the last serves every call
SCHEDULES: dict[str, type[Schedule]] = {
    schedule.name: schedule
    for schedule in (
        Forward,
        Online,
        CompactFrozen,
        Frozen,
        Compaction,
        PlainKeep,
        Keep,
        CompactOnePass,
        OnePassOfTokens,
        PlainOnePass,
        OnePass,
        Recompute,
    )
}

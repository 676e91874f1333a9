"""One process of a labelling job under torchrun, of which rank 1 kills itself in its second shard, once.

Run: torchrun --max-restarts 1 restarted_job.py PHOTOS OUT; rank 1 writes the file `died` beside OUT
"""

import os
import signal
import sys
import time
from pathlib import Path

from tests.experts import jobs
from tests.experts.stand_ins import Brightness

IS_FIRST = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
PHOTOS, OUT = map(Path, sys.argv[1:])
DIED = OUT.with_name("died")


class Dying(Brightness):
    """Brightness for the first attempt: rank 1 kills itself, and rank 0 waits for that in its own second shard."""

    batches = 0

    def predict(self, images, earlier):
        self.batches += 1
        if IS_FIRST and self.batches == 2:
            if RANK == 1:
                DIED.write_text("1")
                os.kill(os.getpid(), signal.SIGKILL)
            while not DIED.exists():
                time.sleep(0.01)
            # until torchrun ends this process
            time.sleep(60)
        return super().predict(images, earlier)


jobs.Slow = Dying
jobs.run_job(PHOTOS, OUT, RANK, WORLD, per_shard=4)

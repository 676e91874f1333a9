"""Proves that the processes of a labelling job take over the shards of slow and dead ones: none lost, none done twice.

python -m pytest tests/experts/test_takeover.py
"""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from prismer.dataloading.experts.claims import CLAIMS_FILE, ShardClaims
from prismer.dataloading.experts.job import label_records
from prismer.dataloading.experts.job_costs import total_costs
from prismer.dataloading.experts.labeller import Labeller
from prismer.dataloading.sources.image_folders import folder_records
from prismer.dataloading.store.check import check_dataset
from tests.experts.jobs import CONTEXT, Slow, read_files, run_gated, run_job, write_photos
from tests.experts.stand_ins import Halves
from tests.experts.test_job import label

# eleven shards of four: the odd ones are those of rank 1 of 2
COUNT = 44
RESTARTED = Path(__file__).with_name("restarted_job.py")


@pytest.fixture(scope="module", autouse=True)
def restarted(tmp_path_factory):
    """A job under torchrun whose rank 1 kills itself after its first shard, in the background of the other tests."""
    folder = tmp_path_factory.mktemp("restarted")
    photos = write_photos(folder / "photos", COUNT)
    command = [Path(sys.executable).parent / "torchrun", "--standalone", "--nproc_per_node", "2", "--max-restarts", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(
            [*command, RESTARTED, photos, folder / "out"], stdout=log, stderr=log, env=environment
        )
    yield process, folder
    # torchrun ends its workers when it is terminated
    process.terminate()
    process.wait()


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("takeover") / "photos", COUNT)


@pytest.fixture(scope="module")
def alone(photos, tmp_path_factory):
    """The files of the same job, done by one process."""
    out = tmp_path_factory.mktemp("alone") / "out"
    run_job(photos, out, per_shard=4)
    return read_files(out)


@pytest.fixture
def waiting(photos, tmp_path):
    """Rank 1 of 2, which has written shard 1 and waits inside of shard 3: (process, event that opens, its reports)."""
    reached, opened, reports = CONTEXT.Event(), CONTEXT.Event(), CONTEXT.Queue()
    process = CONTEXT.Process(target=run_gated, args=(photos, tmp_path / "out", 1, 2, (2, reached, opened), reports))
    process.start()
    assert reached.wait(60)
    yield process, opened, reports
    process.kill()
    process.join()


def images_labelled(out: Path) -> int:
    """How many images all processes together have labelled, those of unfinished shards not included."""
    return sum(one["images"] for one in total_costs(out))


def first_rank(photos, out, **options):
    return label(photos, out, (Slow, Halves), per_shard=4, rank=0, world=2, **options)


def test_the_shards_of_a_killed_process_are_taken_over(photos, alone, waiting, tmp_path):
    process, _, _ = waiting
    kills = []

    class Killer(Slow):
        def predict(self, images, earlier):
            # while this process writes a shard of its own
            if not kills:
                process.kill()
                kills.append(process.join())
            return super().predict(images, earlier)

    report = label(photos, tmp_path / "out", (Killer, Halves), per_shard=4, rank=0, world=2)
    # the open shard 3, and 5, 7 and 9, which were not begun
    assert (report.labelled, report.taken_over, report.shards_missing) == (COUNT, 4, 0)
    assert read_files(tmp_path / "out") == alone
    assert images_labelled(tmp_path / "out") == COUNT


def test_a_stopped_process_keeps_its_open_shard_alone(photos, alone, waiting, tmp_path):
    process, opened, reports = waiting
    os.kill(process.pid, signal.SIGSTOP)
    report = first_rank(photos, tmp_path / "out")
    assert (report.labelled, report.taken_over, report.shards_missing) == (COUNT - 4, 3, 1)
    assert not (tmp_path / "out/index.json").exists()
    # in this order: an event waits for the processes that wait for it
    os.kill(process.pid, signal.SIGCONT)
    opened.set()
    late = reports.get(timeout=60)
    assert (late.labelled, late.taken_over, late.shards_missing) == (COUNT, 0, 0)
    assert read_files(tmp_path / "out") == alone
    # the process went on behind the shards that were taken over, and did none of them again
    assert images_labelled(tmp_path / "out") == COUNT


def test_a_stopped_process_that_is_killed_leaves_its_shard_to_the_next_start(photos, alone, waiting, tmp_path):
    process, _, _ = waiting
    os.kill(process.pid, signal.SIGSTOP)
    assert first_rank(photos, tmp_path / "out").shards_missing == 1
    process.kill()
    process.join()
    report = first_rank(photos, tmp_path / "out")
    assert (report.taken_over, report.shards_missing) == (1, 0)
    assert read_files(tmp_path / "out") == alone


def test_two_processes_share_the_shards_of_one_that_never_started(photos, alone, tmp_path):
    out = tmp_path / "out"
    ranks = [CONTEXT.Process(target=run_job, args=(photos, out, rank, 3, 4)) for rank in (0, 1)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
        assert process.exitcode == 0
    assert read_files(out) == alone
    assert images_labelled(out) == COUNT


def test_shards_of_processes_that_are_no_peers_are_left_alone(photos, tmp_path):
    report = label(photos, tmp_path / "out", per_shard=4, rank=0, world=4, peers=(0, 1))
    # shards 0, 4, 8 and 1, 5, 9 of eleven
    assert (report.taken_over, report.shards_missing) == (3, 5)


def test_the_claims_of_a_finished_job_are_removed(photos, tmp_path):
    assert label(photos, tmp_path / "out").shards_missing == 0
    assert not (tmp_path / "out" / CLAIMS_FILE).exists()
    assert check_dataset(tmp_path / "out", progress=False).ok


def hold(folder, held, release):
    with ShardClaims(folder) as claims, claims.claim(3) as ours:
        assert ours
        held.set()
        release.wait(60)


@pytest.mark.parametrize("end", ["released", "killed"])
def test_a_claim_holds_for_one_shard_and_ends_with_its_process(tmp_path, end):
    held, release = CONTEXT.Event(), CONTEXT.Event()
    process: multiprocessing.Process = CONTEXT.Process(target=hold, args=(tmp_path, held, release))
    process.start()
    assert held.wait(60)
    with ShardClaims(tmp_path) as claims:
        assert not claims.is_free(3) and claims.is_free(2) and claims.is_free(4)
        with claims.claim(3) as ours:
            assert not ours
        if end == "killed":
            # without `release`, which would wait for the dead process
            process.kill()
        else:
            release.set()
        process.join()
        assert claims.is_free(3)


def test_a_process_comes_back_to_its_own_shard_if_who_claimed_it_dies(photos, tmp_path):
    held, release = CONTEXT.Event(), CONTEXT.Event()
    (tmp_path / "out").mkdir()
    holder = CONTEXT.Process(target=hold, args=(tmp_path / "out", held, release))
    holder.start()
    assert held.wait(60)
    batches = []

    class Killer(Slow):
        def predict(self, images, earlier):
            # in the last of the shards 1, 5, 7 and 9
            batches.append(len(images))
            if len(batches) == 4:
                holder.kill()
                holder.join()
            return super().predict(images, earlier)

    report = label(photos, tmp_path / "out", (Killer, Halves), per_shard=4, rank=1, world=2, peers=())
    assert (report.taken_over, report.shards_missing, len(batches)) == (0, 6, 5)
    assert (tmp_path / "out/shard-000003.tar").exists()


def test_costs_are_those_of_the_job_alone(photos, tmp_path):
    labeller = Labeller([Slow(), Halves()], label_size=32, batch_size=4)
    # what another job has taken
    labeller.seconds.update({"brightness": 1000.0, "decoding": 1000.0})
    labeller.images = 1000
    label_records(folder_records(photos), tmp_path / "out", labeller, source="photos", progress=False)
    (costs,) = total_costs(tmp_path / "out")
    assert costs["images"] == COUNT and 0 < max(costs["seconds"].values()) < 1000


def test_torchrun_restarts_a_job_whose_process_died(restarted, tmp_path):
    process, folder = restarted
    assert process.wait(120) == 0, (folder / "log").read_text()
    assert (folder / "out/index.json").exists()
    assert (folder / "died").read_text() == "1", "the process did not die"
    run_job(folder / "photos", tmp_path / "alone", per_shard=4)
    assert read_files(folder / "out") == read_files(tmp_path / "alone")
    saved = json.loads((folder / "out/report.json").read_text())
    assert (saved["records"], saved["labelled"], saved["skipped"]) == (COUNT, COUNT, [])

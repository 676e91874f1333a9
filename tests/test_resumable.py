"""Proves that a resumable job gives the rows of an unbroken run, however it was killed and by however many processes.

pytest tests/test_resumable.py
"""

import json
import multiprocessing
import os
import random
import signal
import time

import pytest

from prismer.files import write_together
from prismer.reading import parse_json
from prismer.resumable import ResumableJob, json_line

CONTEXT = multiprocessing.get_context("fork")
NOTES = {"model": "a", "beams": 3}


def row_of(item):
    return {"item": item, "text": f"row {item}  \n é"}


def run(folder, out, count=23, rank=0, world=1, delay=0.0, notes=NOTES):
    """The whole job of one process; returns the number of parts that others have yet to make."""
    job = ResumableJob(folder, notes, count=count, part_size=4, rank=rank, world=world)
    for number in job.missing_parts():
        rows = []
        for item in job.items_of(number):
            time.sleep(delay)
            rows.append(row_of(item))
        job.write_part(number, rows)
    return job.finish(lambda rows: write_together(out, "".join(f"{json_line(row)}\n" for row in rows).encode()))


def expected(count=23):
    return [row_of(item) for item in range(count)]


def read(out):
    return [parse_json(line, out) for line in out.read_bytes().splitlines()]


@pytest.mark.parametrize("count", [1, 4, 5, 23])
def test_the_rows_come_in_the_order_of_the_items(tmp_path, count):
    assert run(tmp_path / "job", tmp_path / "out", count) == 0
    assert read(tmp_path / "out") == expected(count)
    assert os.listdir(tmp_path / "job") == ["job.json"]


@pytest.mark.parametrize("world", [2, 3, 9])
def test_any_number_of_processes_gives_the_same_bytes(tmp_path, world):
    run(tmp_path / "alone", tmp_path / "one")
    processes = [
        CONTEXT.Process(target=run, args=(tmp_path / "job", tmp_path / "out", 23, rank, world, 0.002))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert (tmp_path / "out").read_bytes() == (tmp_path / "one").read_bytes()
    assert os.listdir(tmp_path / "job") == ["job.json"]


def test_a_job_that_was_killed_again_and_again_gives_the_same_bytes(tmp_path):
    run(tmp_path / "alone", tmp_path / "one")
    draw = random.Random(0)
    kills = 0
    while not (tmp_path / "out").exists():
        world = draw.choice([1, 2, 3])
        rank = draw.randrange(world)
        process = CONTEXT.Process(target=run, args=(tmp_path / "job", tmp_path / "out", 23, rank, world, 0.005))
        process.start()
        process.join(draw.uniform(0.02, 0.06))
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            kills += 1
    run(tmp_path / "job", tmp_path / "out")
    assert kills > 1
    assert (tmp_path / "out").read_bytes() == (tmp_path / "one").read_bytes()
    assert os.listdir(tmp_path / "job") == ["job.json"]


def test_a_process_alone_says_how_many_parts_others_have_to_make(tmp_path):
    assert run(tmp_path / "job", tmp_path / "out", rank=1, world=3) == 4
    assert not (tmp_path / "out").exists()
    assert run(tmp_path / "job", tmp_path / "out") == 0


def test_the_missing_parts_of_all_processes_are_counted(tmp_path):
    run(tmp_path / "job", tmp_path / "out", rank=1, world=3)
    job = ResumableJob(tmp_path / "job", NOTES, count=23, part_size=4)
    assert (job.count_missing(), job.missing_parts()) == (4, [0, 2, 3, 5])
    run(tmp_path / "job", tmp_path / "out")
    assert job.count_missing() == 0


def test_a_finished_job_makes_nothing_again(tmp_path):
    run(tmp_path / "job", tmp_path / "out")
    (tmp_path / "out").unlink()
    assert run(tmp_path / "job", tmp_path / "out") == 0
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("renamed", [False, True])
def test_a_job_that_died_while_it_removed_its_parts_is_finished(tmp_path, monkeypatch, renamed):
    def die(path, **_):
        if path.exists() == renamed:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("prismer.resumable.shutil.rmtree", die)
        run(tmp_path / "job", tmp_path / "out")
    before = (tmp_path / "out").read_bytes()
    assert run(tmp_path / "job", tmp_path / "out") == 0
    assert (tmp_path / "out").read_bytes() == before
    assert os.listdir(tmp_path / "job") == ["job.json"]


@pytest.mark.parametrize("notes", [{"model": "b", "beams": 3}, {"model": "a"}, {**NOTES, "int8": True}])
def test_other_settings_are_refused_and_nothing_changes(tmp_path, notes):
    run(tmp_path / "job", tmp_path / "out", rank=0, world=2)
    with pytest.raises(ValueError, match="was begun with other (model|beams|int8)"):
        run(tmp_path / "job", tmp_path / "out", notes=notes)
    with pytest.raises(ValueError, match="was begun with other items"):
        run(tmp_path / "job", tmp_path / "out", count=24)
    run(tmp_path / "job", tmp_path / "out")
    assert read(tmp_path / "out") == expected()


def test_a_process_without_work_leaves_no_trace(tmp_path):
    assert run(tmp_path / "job", tmp_path / "out", count=4, rank=2, world=3) == 1
    assert not (tmp_path / "job").exists()


def test_a_text_that_utf8_cannot_hold_is_kept_in_escapes():
    row = {"image": b"caf\xe9.jpg".decode("utf-8", "surrogateescape"), "caption": "é"}
    line = json_line(row)
    assert line.isascii() and json.loads(line) == row
    assert "é" in json_line({"caption": "é"})


def test_a_part_that_fails_to_be_written_leaves_the_job_as_it_was(tmp_path):
    job = ResumableJob(tmp_path / "job", NOTES, count=8, part_size=4)
    with pytest.raises(ValueError):
        job.write_part(0, [{"score": float("nan")}])
    assert job.missing_parts() == [0, 1]

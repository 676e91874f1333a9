"""A stand-in for `java`: it answers as the programs of pycocoevalcap do, by rules that a test can compute.

`MODE` beside this file makes it fail: "hang", "die", "silent", "nan".
"""

import json
import os
import sys
import time
from pathlib import Path

here = Path(__file__).resolve().parent
mode = (here / "MODE").read_text() if (here / "MODE").exists() else ""
(here / "pids").open("a").write(f"{os.getpid()}\n")
arguments = sys.argv[1:]
program = next(name for name in ("PTBTokenizer", "meteor-1.5.jar", "spice-1.0.jar") if name in " ".join(arguments))
if mode == f"hang {program}":
    time.sleep(60)
if mode == f"die {program}":
    sys.exit('Exception in thread "main" java.lang.OutOfMemoryError: Java heap space\n\tat somewhere')
if mode == f"silent {program}":
    sys.exit(0)
score = "NaN" if mode == f"nan {program}" else None
if program == "PTBTokenizer":
    for line in sys.stdin.buffer.read().decode().removesuffix("\n").split("\n"):
        print(line.lower().replace(".", " ."))
elif program == "meteor-1.5.jar":
    assert Path.cwd().name == "meteor" and "-norm" in arguments
    for line in sys.stdin.read().splitlines():
        command, *parts = line.split(" ||| ")
        if command == "SCORE":
            # the share of the references that equal the candidate
            *references, candidate = parts
            print(sum(reference == candidate for reference in references) / len(references))
        else:
            for part in parts:
                print(part)
            print(score or sum(map(float, parts)) / len(parts))
else:
    given = json.loads(Path(arguments[3]).read_text())
    made = [{"image_id": e["image_id"], "scores": {"All": {"f": float(score or len(e["refs"]) / 10)}}} for e in given]
    Path(arguments[arguments.index("-out") + 1]).write_text(json.dumps(made[::-1]))

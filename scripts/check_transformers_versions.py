"""Run the tests of `apply_to` on several released versions of transformers: run it before a release.

    python scripts/check_transformers_versions.py 5.23.0 5.20.0 5.17.0

Each version is installed into a temporary folder, with the packages that it needs except torch, and precedes the
installed one on the path. Families that a version does not have are skipped, and the count of skipped tests is printed.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = ("tests/ops/test_patch_vision.py", "tests/ops/test_patch_towers.py")


def run_on(version: str, tests: list[str]) -> int:
    """Install a version, run the tests on it, and return pytest's exit code."""
    with tempfile.TemporaryDirectory() as folder:
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--target", folder, f"transformers=={version}"]
        subprocess.run(install, check=True)
        path = os.pathsep.join((folder, str(ROOT), os.environ.get("PYTHONPATH", "")))
        environment = dict(os.environ, PYTHONPATH=path)
        seen = subprocess.run(
            [sys.executable, "-c", "import transformers; print(transformers.__version__)"],
            env=environment,
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
        if seen != version:
            raise SystemExit(f"transformers {seen} was imported instead of {version}")
        print(f"transformers {version}", flush=True)
        command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", *tests]
        return subprocess.run(command, cwd=ROOT, env=environment).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("versions", nargs="+", help="released versions, such as 5.23.0")
    parser.add_argument("--tests", nargs="+", default=TESTS, help="what pytest runs")
    options = parser.parse_args()
    codes = {version: run_on(version, list(options.tests)) for version in options.versions}
    for version, code in codes.items():
        print(f"transformers {version}: {'passed' if code == 0 else f'failed (pytest exit code {code})'}")
    return max(codes.values())


if __name__ == "__main__":
    sys.exit(main())

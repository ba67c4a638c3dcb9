"""Kill builds and releases at random moments; the output must be the whole old or new one.

    python -m tests.builder.kill_trials --builds 100 --releases 100 --seed 1

Half of the trials end the process at a random instant, half at a random one of the operations that
it does on files (Python's audit events), where the interesting moments are.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from router_runtime.format.manifest import loads
from tests.builder.conftest import ROOT, Project, write_keys, write_project

#: One small kernel only: a trial is about files, not about compilers.
ONE_KERNEL = "KERNELS = KERNELS[:1]\n"
ONE_TARGET = 'DEFAULT_TARGETS = TARGETS = ("sm_90a",)\n'

OTHER_FACTOR = "__device__ inline float factor() { return FACTOR + 1.0f; }\n"

# Count the operations on files, and at the chosen one end with SIGKILL.
MAIN = """
import os, signal, sys

last, seen = int(sys.argv.pop(1)), 0
WATCHED = ("open", "os.", "shutil.", "tempfile.", "fcntl.", "subprocess.")

def hook(event, arguments):
    global seen
    if event.startswith(WATCHED):
        seen += 1
        if seen == last:
            os.kill(os.getpid(), signal.SIGKILL)

from build_kernels.release import release

from build_kernels.cli import main
sys.addaudithook(hook)
try:
    main(standalone_mode=False)
finally:
    print("operations", seen)
"""


class Trials:
    """The trials of one kind: how long and how many operations a run takes that is not killed."""

    def __init__(self, project: Project, arguments: list[str], random_: random.Random) -> None:
        self._project = project
        self._arguments = arguments
        self._random = random_
        self.outcomes: Counter[str] = Counter()
        self.seconds, self.operations = 0.0, 0

    def measure(self) -> None:
        started = time.monotonic()
        said = self._start(0).communicate()[0]
        self.seconds = time.monotonic() - started
        if "operations " not in said:
            raise AssertionError(f"a run that was not killed failed:\n{said}")
        self.operations = int(said.rsplit("operations ", 1)[1])

    def run(self) -> bool:
        """One trial; True if the process was ended before it was done."""
        if self._random.random() < 0.5:
            process = self._start(self._random.randint(1, self.operations))
            process.communicate()
        else:
            process = self._start(0)
            time.sleep(self._random.uniform(0, 1.1 * self.seconds))
            process.kill()
            process.communicate()
        if process.returncode not in (0, -signal.SIGKILL):
            raise AssertionError(f"expected success or a kill, found {process.returncode}")
        return process.returncode != 0

    def _start(self, last: int) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", MAIN, str(last), *self._arguments],
            cwd=self._project.root,
            env=self._project.environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )


def state(folder: Path) -> str | None:
    """The digest of what a reader finds in an artifacts folder, after checking that all of it is
    there; None if there is no manifest.
    """
    path = folder / "manifest.json"
    if not path.exists():
        return None
    data = path.read_bytes()
    for entry in loads(data).entries:
        found = hashlib.sha256((folder / entry.file).read_bytes()).hexdigest()
        if found != entry.sha256:
            raise AssertionError(f"{entry.file}: expected {entry.sha256}, found {found}")
    return hashlib.sha256(data).hexdigest()


def contents(out: Path) -> dict[str, bytes]:
    """What a reader finds below a folder of releases; names with a dot in front are ignored."""
    return {
        path.relative_to(out).as_posix(): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and not path.relative_to(out).parts[0].startswith(".")
    }


def builds(number: int, random_: random.Random) -> Counter[str]:
    """Rebuild a folder after a change of its source, repeatedly, each run killed at random."""
    with _project() as project:
        source = project.kernel_file("common/factor.cuh")
        texts = [source.read_text(), OTHER_FACTOR]
        states = []
        for index, text in enumerate(texts):
            source.write_text(text)
            project.build("--kernel", "scale", "--out", f"expected{index}")
            states.append(state(project.root / f"expected{index}"))
        out = project.root / "out"
        trials = Trials(project, ["build", "--kernel", "scale", "--out", str(out)], random_)
        for text in texts:
            source.write_text(text)
            trials.measure()
        old = 1
        for _ in range(number):
            new = 1 - old
            source.write_text(texts[new])
            killed = trials.run()
            found = state(out)
            if found not in (states[old], states[new]):
                raise AssertionError(f"expected the old or the new build, found {found}")
            if not killed and found != states[new]:
                raise AssertionError("expected a finished build to be published")
            trials.outcomes[_outcome(killed, found == states[new])] += 1
            old = states.index(found)
        # Whatever files remain, the next build's output equals that of a first build.
        source.write_text(texts[0])
        project.build("--kernel", "scale", "--out", str(out))
        if contents(out) != contents(project.root / "expected0"):
            raise AssertionError("expected a whole folder after the last build")
        if sorted(os.listdir(out)) != sorted(os.listdir(project.root / "expected0")):
            raise AssertionError(f"expected nothing left behind, found {sorted(os.listdir(out))}")
        return trials.outcomes


def releases(number: int, random_: random.Random) -> Counter[str]:
    """Add a release beside an older one, or a signature to it, each run killed at random."""
    with _project() as project:
        key, _ = write_keys(project.root.parent)
        out, expected = project.root.parent / "out", project.root.parent / "expected"
        project.build("--update-lock")
        project.commit()
        project.release("--out", expected)
        (project.root / "README.md").write_text("Another commit.\n")
        project.commit()
        before = contents(expected)
        project.release("--out", expected)
        unsigned = contents(expected)
        project.release("--out", expected, "--key", key)
        signed = contents(expected)
        if not len(before) < len(unsigned) < len(signed):
            raise AssertionError("expected each step to add files")
        trials = Trials(project, ["release", "--out", str(out), "--key", str(key)], random_)
        shutil.copytree(expected, out)
        (newest,) = {name.split("/")[0] for name in signed.keys() - before.keys()}
        (envelope,) = signed.keys() - unsigned.keys()
        shutil.rmtree(out / newest)
        trials.measure()
        for _ in range(number):
            # From no such release to a signed one, or from an unsigned one to a signed one.
            start = random_.choice([before, unsigned])
            if start is before:
                shutil.rmtree(out / newest)
            else:
                (out / envelope).unlink()
            killed = trials.run()
            found = contents(out)
            if found not in (start, signed):
                names = sorted({n for n in {*found, *signed} if found.get(n) != signed.get(n)})
                raise AssertionError(f"expected the old or the new release, found {names} mixed")
            if not killed and found != signed:
                raise AssertionError("expected a finished release to be published")
            trials.outcomes[_outcome(killed, found == signed)] += 1
            if found != signed:
                shutil.rmtree(out / newest, ignore_errors=True)
                shutil.copytree(expected / newest, out / newest)
        project.release("--out", out, "--key", key)
        if contents(out) != signed:
            raise AssertionError("expected both releases to be as they were made")
        return trials.outcomes


@contextmanager
def _project() -> Iterator[Project]:
    with tempfile.TemporaryDirectory(prefix="kill-trials-") as folder:
        root = Path(folder) / "project"
        write_project(root)
        project = Project(root)
        project.append("catalog/kernels.py", ONE_KERNEL)
        project.append("catalog/targets.py", ONE_TARGET)
        yield project


def _outcome(killed: bool, new: bool) -> str:
    return f"{'killed' if killed else 'finished'}, found the {'new' if new else 'old'}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--builds", type=int, default=100)
    parser.add_argument("--releases", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    for kind, number in ((builds, arguments.builds), (releases, arguments.releases)):
        outcomes = kind(number, random.Random(arguments.seed))
        print(f"{kind.__name__}: {sum(outcomes.values())} trials, {dict(sorted(outcomes.items()))}")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()

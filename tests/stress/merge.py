"""Kill a merging at random moments, let the same command go on, and compare every byte of the end.

`python -m tests.stress.merge --tries 50 [--seed N] [--only N]` in the repository's root, or `make stress`.
How it is killed is told in `tries.py`. In every other try an earlier result is there already, in every third
one nothing is proven. After each kill the output must be whole, or what it was, or, between two renames,
whole where the next run puts it back from; at the end it must be that of the unbroken run, and nothing else
may be left.
"""

import shutil
import sys
from pathlib import Path

from mdl_toolkit.config.train import MergeOptions
from mdl_toolkit.training.merge import merge_adapter
from tests.stress.files import Files, check_same, listing, write_listing
from tests.stress.processes import FailedError
from tests.stress.tries import OUT, Attempt, Try, main
from tests.support.adapters import adapted
from tests.support.paths import MODEL
from tests.support.weight_files import reshard


class Merging(Attempt):
    """A merging that is killed."""

    KINDS = ("clock", "operation", "end")
    MOST = 1

    @staticmethod
    def make_inputs(place: Path) -> None:
        """A base in shards, two adapters for it, and what comes of the second one."""
        shutil.copytree(MODEL, place / "base")
        reshard(place / "base")
        for seed, name in enumerate(("adapter", "other")):
            adapted(place / "base", place / name, seed=seed, target_modules=["q_proj", "down_proj", "qkv"])
        merge_adapter(
            MergeOptions(
                adapter=str(place / "other"), output=str(place / "previous"), model_name=str(place / "base")
            )
        )

    @classmethod
    def variant(cls, tried: Try) -> str:
        """Proven or not, with an earlier result or without."""
        proven = "not proven" if tried.number % 3 == 2 else "proven"
        return f"{proven}, {'an earlier result' if tried.number % 2 else 'a new one'}"

    def words(self) -> list[str]:
        """The command."""
        return [
            "merge", str(self.place / "adapter"), "--output", OUT, "--model-name", str(self.place / "base"),
            "--verify", str(self.tried.number % 3 != 2).lower(),
        ]  # fmt: skip

    def prepare(self) -> None:
        """Perhaps an earlier result is there."""
        if self._has_previous:
            write_listing(self.folder / OUT, self._previous)

    @property
    def _has_previous(self) -> bool:
        return self.tried.number % 2 == 1

    @property
    def _previous(self) -> Files:
        return listing(self.place / "previous")

    def result(self) -> Files:
        """All that lies in the folder."""
        return listing(self.folder)

    def check_broken(self) -> None:
        """The output is what it was or whole; or what it was lies beside it, and is put back."""
        output = self.folder / OUT
        beside = [path for path in self.folder.iterdir() if path != output]
        if len({path.name.rpartition("-")[2] for path in beside}) > 1:
            raise FailedError(f"what killed runs leave adds up: {beside}")
        if output.exists():
            self._check_output(listing(output))
        elif self._has_previous:
            self._check_beside(beside)

    def _check_output(self, found: Files) -> None:
        is_previous = self._has_previous and found == self._previous
        self.counts.found["the output in place"] += not is_previous
        if not is_previous:
            whole = {name.removeprefix(f"{OUT}/"): content for name, content in self.unbroken.files.items()}
            check_same(found, {name: content for name, content in whole.items() if name}, "the output")

    def _check_beside(self, beside: list[Path]) -> None:
        """Put back by a run that is killed when it has something new to write."""
        self.counts.found["the earlier result between two renames"] += 1
        (old,) = (path for path in beside if ".old-" in path.name)
        check_same(listing(old), self._previous, "what was moved away")
        jobs = self._start()
        if not jobs[0].until((self.folder / OUT).exists):
            raise FailedError(f"what was moved away was not put back: {jobs[0].said()}")
        jobs[0].kill()
        self._check_output(listing(self.folder / OUT))


if __name__ == "__main__":
    sys.exit(main(Merging, __doc__.splitlines()[0]))

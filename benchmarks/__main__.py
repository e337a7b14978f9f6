"""`python -m benchmarks [NAME ...]`: run all benchmarks, or those named, and print one table."""

import importlib
import os
import sys

from benchmarks import Figure
from benchmarks.processes import Others

NAMES = (
    "startup", "conversion", "conversion_memory", "encoder", "loss", "training", "merging", "answering",
)  # fmt: skip


def main(names: list[str]) -> int:
    """Run benchmarks by name, each a module with `figures`; `gpu` and `little_data` are other kinds."""
    if names[:1] == ["gpu"]:
        from benchmarks.gpu import main as of_gpu

        return of_gpu(names[1:])
    if names == ["little_data"]:
        from benchmarks.little_data import main as of_little_data

        return of_little_data()
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        sys.stderr.write(f"no benchmark {', '.join(unknown)}; there are {', '.join(NAMES)}\n")
        return 2
    import torch  # not above: worker processes load this module too

    torch.set_num_threads(1)  # one thread is disturbed least by whatever else runs
    print(f"{os.cpu_count()} CPUs, one thread, no GPU used; torch {torch.__version__}\n")
    others = Others()
    print("| what | ours | the other way | ratio |\n| --- | --- | --- | --- |")
    for name in names or NAMES:
        for figure in importlib.import_module(f"benchmarks.{name}").figures():
            print(_line(figure), flush=True)
    print(f"\nOther processes took {others.share():.0%} of all CPU time meanwhile.")
    return 0


def _line(figure: Figure) -> str:
    return f"| {figure.what} | {figure.ours} | {figure.other} | {figure.ratio:.2f} |"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

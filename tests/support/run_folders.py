"""What lies in the folder of a run, and files that were cut off."""

from mdl_toolkit.utils.ownership import RECORD

# What stands beside checkpoints.
AT_THE_END = ("final", "log.jsonl", "loss.png", "mdl-toolkit.json", "mdl-toolkit.yaml", "report.html")


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != RECORD)


def cut_off(file):
    file.write_bytes(file.read_bytes()[:-1])

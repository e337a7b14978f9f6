"""A conversion of addresses that is killed: nothing is asked for twice."""

from pathlib import Path

import numpy as np
import pytest

from tests.support.commands import convert_here, data_of, killing_all, names
from tests.support.processes import wait_for
from tests.support.recordings import pcm_wav
from tests.support.runs import write_csv
from tests.support.waves import wave


@pytest.mark.allow_hosts(["127.0.0.1"])
def test_killed_in_the_middle_of_a_download(tmp_path, monkeypatch, server):
    """Two shards: the second one has an address that does not answer."""
    place = tmp_path / "place"
    place.mkdir()
    monkeypatch.chdir(place)
    paths = [*(f"/{number}.wav" for number in range(7)), "/slow"]
    content = {path: pcm_wav(np.rint(wave(5000, seed) * 32768)) for seed, path in enumerate(paths)}
    server.files = content
    write_csv(Path("rows.csv"), [{"audio": server.url + path, "prediction": "x"} for path in paths])
    with killing_all() as start:
        command = start(place, "--num-workers", "1")
        wait_for(lambda: len(server.asked) == 8 and (place / ".out.partial/shards/0.json").exists())
        command.kill()
        assert names(place) == {"rows.csv", ".out.partial"}
        assert sorted(server.asked) == paths
        server.asked.clear()
        server.ends.set()
        status, said = start(place, "--num-workers", "1").end()
    assert (status, said.splitlines()[0]) == (
        0, "going on from an earlier run: 4 of 8 rows are converted already"
    )  # fmt: skip
    assert sorted(server.asked) == paths[4:]
    assert names(place) == {"rows.csv", "out"}
    for path in paths:
        Path(path[1:]).write_bytes(content[path])
    write_csv(Path("rows.csv"), [{"audio": path[1:], "prediction": "x"} for path in paths])
    assert convert_here("local") == data_of(Path("out"))

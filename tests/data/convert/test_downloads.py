"""A conversion of addresses that is killed or divided: nothing is asked for twice."""

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


@pytest.mark.allow_hosts(["127.0.0.1"])
def test_two_ranks_ask_once(tmp_path, server):
    (tmp_path / "place").mkdir()
    server.files = {"/0.wav": pcm_wav(np.rint(wave(5000, 0) * 32768))}
    row = {"audio": f"{server.url}/0.wav", "prediction": "x"}
    # Rows of one recording that follow one another would be one rank's.
    (tmp_path / "place/1.wav").write_bytes(server.files["/0.wav"])
    write_csv(tmp_path / "place/rows.csv", [row, {**row, "audio": "1.wav"}] * 4)
    with killing_all() as start:
        first = start(
            tmp_path / "place", rank=0, HOLD="mdl_toolkit.data.convert.work_folder:WorkFolder.commit:1"
        )
        first.wait_until_held()
        second = start(tmp_path / "place", rank=1)
        wait_for(second.written)
        first.go_on()
        assert [command.end()[0] for command in (first, second)] == [0, 0]
    assert server.asked == ["/0.wav"]

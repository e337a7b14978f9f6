"""Records and settings that are no files, or none of ours, keep nobody waiting and give nothing away."""

import os

import pytest

from mdl_toolkit.errors import InputError
from mdl_toolkit.utils.ownership import RECORD, SETTINGS, check_not_inside, check_output_folder


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", [RECORD, SETTINGS])
@pytest.mark.parametrize(
    "spoil",
    [
        os.mkfifo,
        lambda path: path.symlink_to("/dev/zero"),
        lambda path: path.write_text("[" * 100_000 + "]" * 100_000),
        lambda path: path.write_bytes(b"\xff\x00"),
    ],
    ids=["FIFO", "device", "deep", "junk"],
)
def test_what_is_no_record_is_passed_over(tmp_path, name, spoil):
    (tmp_path / "note.txt").write_text("mine")
    spoil(tmp_path / name)
    check_not_inside(tmp_path / "page.html")
    with pytest.raises(InputError, match="is there, which merge did not write"):
        check_output_folder(tmp_path, "merge")

"""A file is written whole, or what was there stays."""

import pytest

from dualbranch.whole_file import whole_file


def test_takes_the_place_of_the_old_file_and_makes_the_folder(tmp_path):
    path = tmp_path / "new" / "file"
    for text in ("first", "second"):
        with whole_file(path) as temporary:
            assert temporary.parent == path.parent, "a rename across disks is a copy, which can stop half-way"
            temporary.write_text(text)
            assert not path.exists() or path.read_text() == "first"
        assert path.read_text() == text
    assert [p.name for p in path.parent.iterdir()] == ["file"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(type(error)), whole_file(path) as temporary:
        temporary.write_text("half")
        raise error
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]

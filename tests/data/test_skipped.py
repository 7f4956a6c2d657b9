"""The list of unreadable images."""

from diffusion_moe.data import SkippedLog


def test_each_name_is_written_once_also_by_another_process_and_after_a_restart(tmp_path):
    path = tmp_path / "skipped.txt"
    log, other = SkippedLog(path), SkippedLog(path)
    log.note([])
    assert not path.exists()
    log.note(["a.png", "b.png", "a.png"])
    other.note(["b.png", "c.png"])
    log.note(["c.png", "a.png"])
    SkippedLog(path).note(["c.png", "d.png"])
    assert path.read_text().splitlines() == ["a.png", "b.png", "c.png", "d.png"]

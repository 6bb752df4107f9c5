"""Moving shapes: what the classes share, what distinguishes them, and the files."""

import sys
from itertools import combinations

import numpy as np
import pytest

from mingru_hf.data.moving_shapes import CLASSES, STEPS, make_moving_shape, trajectory, write_moving_shapes

AXES = {
    "left": 0,
    "right": 0,
    "up": 1,
    "down": 1,
    "clockwise": 2,
    "counter-clockwise": 2,
    "growing": 3,
    "shrinking": 3,
}
FORWARD = ("right", "down", "clockwise", "growing")


def around(turns):
    """Wrap differences on a circle to the range -0.5 to 0.5 turns."""
    return (turns + 0.5) % 1 - 0.5


@pytest.mark.parametrize("label", range(8), ids=CLASSES)
def test_one_coordinate_goes_on_and_the_others_stay(label):
    name = CLASSES[label]
    for seed in range(20):
        course = trajectory(label, 16, np.random.default_rng(seed))
        assert course.min() >= 0
        assert course.max() < 1
        steps = around(np.diff(course, axis=0))
        axis = AXES[name]
        ahead = steps[:, axis] if name in FORWARD else -steps[:, axis]
        low, high = STEPS[axis]
        np.testing.assert_allclose(ahead, ahead[0])
        assert low <= ahead[0] <= high
        assert not np.delete(steps, axis, axis=1).any()


def test_a_frame_alone_has_one_distribution_in_all_classes():
    """Each coordinate at each time is uniform: the mean of exp(2 pi i q) over N videos is of the order 1/sqrt(N)."""
    for label in range(8):
        courses = np.stack([trajectory(label, 4, np.random.default_rng((1, label, n))) for n in range(2000)])
        for harmonic in (1, 2):
            assert np.abs(np.exp(2j * np.pi * harmonic * courses).mean(0)).max() < 4 / 2000**0.5
        for i, j in combinations(range(4), 2):  # coordinates of a frame are pairwise independent
            for sign in (1, -1):
                both = courses[..., i] + sign * courses[..., j]
                assert np.abs(np.exp(2j * np.pi * both).mean(0)).max() < 4 / 2000**0.5


def test_frames_show_the_course():
    for label, name in enumerate(CLASSES):
        frames = make_moving_shape(label, 8, 64, seed=(3, label))
        assert frames.shape == (8, 64, 64, 3)
        assert frames.dtype == np.uint8
        assert len({frame.tobytes() for frame in frames}) == 8, name
        _, counts = np.unique(frames.reshape(-1, 3), axis=0, return_counts=True)
        assert np.sort(counts)[-2:].sum() > 0.9 * counts.sum(), name  # two colours; their blends at the shape's edge


def test_the_seed_alone_decides():
    one, same, other = (make_moving_shape(3, 6, 32, seed) for seed in ((0, 1), (0, 1), (0, 2)))
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((8, 4, 32), "label 8"), ((0, 1, 32), "num_frames is 1"), ((0, 4, 33), "even"), ((0, 4, 8), "at least 16")],
)
def test_bad_sizes_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_moving_shape(*arguments)


def test_files_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    av = pytest.importorskip("av", reason="videos are written by PyAV")
    first = write_moving_shapes(tmp_path / "a" / "set", 16, 8, 8, num_frames=5, size=32, fps=4)
    files = sorted(path.relative_to(first).as_posix() for path in first.rglob("*.mp4"))
    assert len(files) == 32
    assert first.stat().st_mode == (first / "test").stat().st_mode  # the permissions of any new folder of the user
    assert files[0] == "test/clockwise/000004.mp4"
    assert {name.split("/")[1] for name in files} == set(CLASSES)
    with av.open(str(first / files[0])) as container:
        stream = container.streams.video[0]
        assert (stream.average_rate, stream.width, stream.height) == (4, 32, 32)

    def decode(path):
        with av.open(str(path)) as container:
            return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]

    original = make_moving_shape(4, 5, 32, seed=(0, 2, 4))
    luma = np.array([0.299, 0.587, 0.114])  # H.264 keeps luma's full resolution and halves that of chroma
    assert np.abs(np.stack(decode(first / files[0])) @ luma - original @ luma).mean() < 4

    again = write_moving_shapes(tmp_path / "again", 24, 8, 8, num_frames=5, size=32, fps=4, num_proc=2)
    for name in files:  # `again` holds the same videos and more; the encoder does not always write the same bytes
        one, same = (np.stack(decode(folder / name)) for folder in (first, again))
        assert np.abs(one @ luma - same @ luma).mean() < 4

    with pytest.raises(ValueError, match=r"exists.*--overwrite_output_dir"):
        write_moving_shapes(first, 16, 8, 8)
    sizes = {"num_frames": 2, "size": 16}
    write_moving_shapes(first, 8, 8, 8, **sizes, overwrite=True)
    assert len(list(first.rglob("*.mp4"))) == 24  # the earlier files are gone
    (first / "test" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds other files, such as test/notes\.txt"):
        write_moving_shapes(first, 8, 8, 8, **sizes, overwrite=True)
    assert (first / "test" / "notes.txt").read_text() == "mine"
    (first / "test" / "notes.txt").unlink()
    (first / "mine").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="holds other files, such as mine"):
        write_moving_shapes(first, 8, 8, 8, **sizes, overwrite=True)
    (first / "mine").unlink()
    (tmp_path / "link").symlink_to(first)
    write_moving_shapes(tmp_path / "link", 8, 8, 8, **sizes, overwrite=True)
    assert (tmp_path / "link").resolve() == first.resolve()
    (tmp_path / "link").unlink()
    monkeypatch.setattr("mingru_hf.data.moving_shapes.write_video", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_moving_shapes(tmp_path / "broken", 16, 8, 8, num_frames=5, size=32)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "again"]
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["set"]


def test_without_pyav_the_error_names_the_command(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match="pip install av"):
        write_moving_shapes(tmp_path / "set", 8, 8, 8)


def test_too_few_videos_are_refused(tmp_path):
    with pytest.raises(ValueError, match="num_test is 7, expected at least one video per class"):
        write_moving_shapes(tmp_path / "set", 16, 8, 7)
    with pytest.raises(ValueError, match="num_proc and fps must be at least 0, 1 and 1, got 0, 0 and"):
        write_moving_shapes(tmp_path / "set", 16, 8, 8, num_proc=0)
    assert not (tmp_path / "set").exists()

"""Videos as clips: their sources, their splits, the frames of a clip, and the files that are left out."""

import json
import logging
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Video

pytest.importorskip("av", reason="videos are read and written by PyAV")
pytest.importorskip("torchvision", reason="transformers' video processors are built on torchvision")

from mingru_hf.data.av import write_video
from mingru_hf.data.video import (
    FitAndCrop,
    VideoClips,
    clip_positions,
    load_ucf101,
    load_video_datasets,
    make_augmentation,
)
from mingru_hf.video_processing_minconvgru import MinConvGRUVideoProcessor, VideoReadError


@pytest.fixture(autouse=True)
def _quiet():
    """Disable the progress bars of `datasets`."""
    import datasets

    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture
def processor():
    """Return a processor that keeps pixels in 0..255, so that they tell the number of a frame."""
    return MinConvGRUVideoProcessor(
        num_frames=3, do_resize=False, do_center_crop=False, do_rescale=False, do_normalize=False
    )


def write(path, num_frames=12, base=0):
    """Write a video whose frame t has the grey level base + 20 t."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(path, np.stack([np.full((16, 16, 3), base + 20 * t, np.uint8) for t in range(num_frames)]))


def numbers(item):
    """Return the frame numbers of an item of VideoClips."""
    return item["pixel_values_videos"][:, 0].float().mean((1, 2)).div(20).round().int().tolist()


@pytest.fixture
def videos(tmp_path):
    """Write four readable videos of 12 frames, with the labels 0 to 3."""
    for i in range(4):
        write(tmp_path / f"{i}.mp4")
    return rows([tmp_path / f"{i}.mp4" for i in range(4)])


def rows(paths):
    dataset = Dataset.from_dict({"video": [str(path) for path in paths], "label": list(range(len(paths)))})
    return dataset.cast_column("video", Video(decode=False))


# ---- clips ----


def test_clips_lie_evenly_over_a_video(videos, processor):
    assert clip_positions(1) == [0.5]
    clips = VideoClips(videos, processor, clips_per_video=4)
    assert len(list(clips)) == len(clips) == 16
    assert [numbers(clips[i]) for i in range(4, 8)] == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]
    assert [clips[i]["labels"] for i in (0, 3, 4, 15)] == [0, 0, 1, 3]
    assert numbers(VideoClips(videos, processor)[2]) == [4, 5, 6]
    pixels = VideoClips(videos, MinConvGRUVideoProcessor(num_frames=3, crop_size=8))[0]["pixel_values_videos"]
    assert (pixels.shape, pixels.dtype) == ((3, 3, 8, 8), torch.float32)


def test_training_clips_are_random_but_a_function_of_seed_and_index(videos, processor):
    clips = VideoClips(videos, processor, 2, training=True)
    first = [numbers(clips[i]) for i in range(8)]
    assert first == [numbers(clips[i]) for i in range(8)]
    assert all(start[0] <= 5 for start in first[::2])
    assert all(start[0] >= 4 for start in first[1::2])
    epochs = {tuple(map(tuple, (numbers(clips[i + 8 * e]) for i in range(8)))) for e in range(3)}
    assert len(epochs) == 3
    other = VideoClips(videos, processor, 2, training=True, seed=1)
    assert first != [numbers(other[i]) for i in range(8)]


def test_the_draws_of_a_clip_leave_the_global_generator_alone(videos, processor):
    clips = VideoClips(videos, processor, training=True, frame_order="shuffled")
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    clips[0]
    torch.testing.assert_close(torch.rand(3), expected, rtol=0, atol=0)


def test_workers_make_the_same_clips(videos, processor):
    clips = VideoClips(videos, processor, 2, training=True)
    batches = [
        torch.cat([b["pixel_values_videos"] for b in torch.utils.data.DataLoader(clips, batch_size=3, num_workers=n)])
        for n in (0, 2)
    ]
    torch.testing.assert_close(*batches, rtol=0, atol=0)


def test_shuffled_frames_are_the_same_frames(videos):
    processor = MinConvGRUVideoProcessor(
        num_frames=12, do_resize=False, do_center_crop=False, do_rescale=False, do_normalize=False
    )
    orders = [numbers(VideoClips(videos, processor, frame_order="shuffled", seed=seed)[0]) for seed in range(3)]
    assert all(sorted(order) == list(range(12)) for order in orders)
    assert len(set(map(tuple, orders))) == 3
    assert list(range(12)) not in orders


@pytest.mark.parametrize("training", [True, False])
def test_unreadable_and_short_videos_are_named_counted_and_replaced(videos, processor, tmp_path, caplog, training):
    """Outside training, the clips that replace them have the label -100."""
    (tmp_path / "1.mp4").write_bytes(b"nothing")
    write(tmp_path / "2.mp4", num_frames=2)
    clips = VideoClips(videos, processor, clips_per_video=2, training=training)
    with caplog.at_level(logging.WARNING):
        labels = [clips[i]["labels"] for i in range(8)]
    assert labels == ([0, 0, 3, 3, 3, 3, 3, 3] if training else [0, 0, -100, -100, -100, -100, 3, 3])
    assert clips.unreadable == [str(tmp_path / "1.mp4"), str(tmp_path / "2.mp4")]
    messages = [record.getMessage() for record in caplog.records if not record.name.startswith("libav")]
    assert len(messages) == 2
    assert messages[0].startswith(f"skipped {tmp_path / '1.mp4'}: it cannot be decoded")
    assert messages[1].startswith(f"skipped {tmp_path / '2.mp4'}: the video has 2 frames, too few")


def test_what_workers_find_unreadable_is_counted(videos, processor, tmp_path):
    (tmp_path / "3.mp4").unlink()
    clips = VideoClips(videos, processor)
    labels = [
        label
        for b in torch.utils.data.DataLoader(clips, batch_size=2, num_workers=2)
        for label in b["labels"].tolist()
    ]
    assert labels == [0, 1, 2, -100]
    assert clips.unreadable == [str(tmp_path / "3.mp4")]


def test_a_draw_that_failed_changes_no_later_one(videos, processor, tmp_path):
    """An item depends only on its seed and index, because a resumed run does not know of earlier failures."""
    clips = VideoClips(videos, processor, training=True)
    expected = clips[5]
    (tmp_path / "1.mp4").rename(tmp_path / "away")
    assert clips[1]["labels"] == 2
    (tmp_path / "away").rename(tmp_path / "1.mp4")
    assert clips[5]["labels"] == expected["labels"] == 1
    torch.testing.assert_close(clips[5]["pixel_values_videos"], expected["pixel_values_videos"], rtol=0, atol=0)
    assert clips.unreadable == [str(tmp_path / "1.mp4")]


def test_nothing_readable_is_an_error(videos, processor, tmp_path):
    for i in range(4):
        (tmp_path / f"{i}.mp4").write_bytes(b"")
    with pytest.raises(ValueError, match="all 4 videos are unreadable or too short for a clip"):
        VideoClips(videos, processor)[0]


def test_bytes_in_the_dataset_are_read_too(tmp_path, processor):
    write(tmp_path / "a.mp4")
    dataset = Dataset.from_dict({"video": [{"bytes": (tmp_path / "a.mp4").read_bytes(), "path": None}], "label": [0]})
    clips = VideoClips(dataset.cast_column("video", Video(decode=False)), processor)
    assert numbers(clips[0]) == [4, 5, 6]
    assert clips.name(0) == "video 0"
    with pytest.raises(VideoReadError):
        VideoClips(rows([tmp_path / "none.mp4"]), processor).read(0, [0.5])


def test_impossible_clips_are_refused(videos, processor):
    with pytest.raises(ValueError, match="clips_per_video"):
        VideoClips(videos, processor, 0)
    with pytest.raises(ValueError, match="frame_order must be one of forward, shuffled"):
        VideoClips(videos, processor, frame_order="backward")


# ---- augmentation and views ----


@pytest.fixture
def gradient():
    """Return two identical frames, (2, 3, 20, 30), that become brighter from left to right."""
    return torch.arange(30).mul(8).to(torch.uint8).expand(2, 3, 20, 30).contiguous()


def test_all_frames_of_a_clip_are_augmented_alike(gradient):
    processor = MinConvGRUVideoProcessor(crop_size=8)
    augment = make_augmentation(processor, min_crop_scale=0.3, flip=True, color_jitter=0.3)
    crops = [augment(gradient) for _ in range(20)]
    assert all(crop.shape == (2, 3, 8, 8) and crop.dtype == torch.uint8 for crop in crops)
    assert all(torch.equal(crop[0], crop[1]) for crop in crops)
    assert len({tuple(crop.flatten().tolist()) for crop in crops}) == 20
    rising = [bool(crop[0, 0, 4, -1] > crop[0, 0, 4, 0]) for crop in crops]
    assert 2 < sum(rising) < 18


def test_without_augmentation_training_sees_what_inference_sees(gradient, tmp_path):
    processor = MinConvGRUVideoProcessor(num_frames=2, size={"shortest_edge": 10}, crop_size=8)
    augment = make_augmentation(processor, min_crop_scale=1, flip=False)
    sizing = {"do_resize": False, "do_center_crop": False, "do_sample_frames": False, "return_tensors": "pt"}
    torch.testing.assert_close(
        processor(augment(gradient), **sizing).pixel_values_videos,
        processor(gradient, return_tensors="pt").pixel_values_videos,
        atol=0.01,  # the augmented frames are rounded to bytes in between
        rtol=0,
    )


def test_views_are_the_corners_the_middle_and_their_mirrors(gradient):
    processor = MinConvGRUVideoProcessor(size={"shortest_edge": 20}, crop_size=10)
    center = FitAndCrop(processor)(gradient)
    views = FitAndCrop(processor, "ten_crops")(gradient)
    torch.testing.assert_close(views[4], center)
    assert [view[0, 0, 0, 0].item() for view in views[:5]] == [0, 160, 0, 160, 80]  # left, right, left, right, middle
    for view, mirror in zip(views[:5], views[5:], strict=True):
        assert view.shape == (2, 3, 10, 10)
        expected = {v[0, 0, 0].tolist().__repr__() for v in (x.flip(-1) for x in views[:5])}
        assert repr(mirror[0, 0, 0].tolist()) in expected
    assert len(FitAndCrop(processor, "five_crops")(gradient)) == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"min_crop_scale": 0}, "min_crop_scale"),
        ({"min_crop_scale": 2}, "min_crop_scale"),
        ({"color_jitter": 1}, "color"),
    ],
)
def test_impossible_augmentations_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_augmentation(MinConvGRUVideoProcessor(), **arguments)
    with pytest.raises(ValueError, match="views must be one of center, five_crops, ten_crops"):
        FitAndCrop(MinConvGRUVideoProcessor(), "all")


# ---- folders and other datasets ----


def test_a_folder_of_classes_is_split_by_video(tmp_path):
    for name in "ab":
        for i in range(10):
            write(tmp_path / "set" / name / f"{i}.mp4", 3)
    splits = load_video_datasets(str(tmp_path / "set"), validation_split_percentage=20, cache_dir=str(tmp_path / "c"))
    assert {name: len(split) for name, split in splits.items()} == {"train": 16, "validation": 4}
    paths = [{row["video"]["path"] for row in split} for split in splits.values()]
    assert not paths[0] & paths[1]
    for split in splits.values():
        assert split.features["label"].names == ["a", "b"]
        assert all(row["video"]["path"].split("/")[-2] == "ab"[row["label"]] for row in split)


def test_a_folder_of_splits_is_taken_as_it_is(tmp_path):
    for split, count in (("train", 3), ("validation", 2), ("test", 1)):
        for name in ("left", "right"):
            for i in range(count):
                write(tmp_path / "set" / split / name / f"{i}.mp4", 3)
    splits = load_video_datasets(str(tmp_path / "set"), cache_dir=str(tmp_path / "c"))
    assert {name: len(split) for name, split in splits.items()} == {"train": 6, "validation": 4, "test": 2}


def load_folder(directory, **kwargs):
    """Load a folder, and return the relative paths and classes of each split."""
    splits = load_video_datasets(str(directory), cache_dir=str(directory.parent / "cache"), **kwargs)
    return {
        name: sorted(
            (str(Path(row["video"]["path"]).relative_to(directory)), split.features["label"].int2str(row["label"]))
            for row in split
        )
        for name, split in splits.items()
    }


def test_no_word_in_a_name_takes_videos_out_of_a_folder(tmp_path, caplog):
    """A class may be called "train", a video may have any container that PyAV reads, a folder may be a symlink."""
    names = ["a/train_1.mp4", "a/val[1].MP4", "bus/clip_test_0.webm", "bus/x.m4v", "train/0.mp4", "train/1.mp4"]
    for name in [*names, "c/.hidden.mp4", "c/notes.txt", "__MACOSX/a/x.mp4"]:
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name).touch()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "2.mp4").touch()
    (tmp_path / "set" / "linked").symlink_to(tmp_path / "elsewhere")
    found = load_folder(tmp_path / "set")
    assert list(found) == ["train", "validation"]
    assert sorted(found["train"] + found["validation"]) == sorted(
        (name, name.split("/")[0]) for name in [*names, "linked/2.mp4"]
    )
    assert not caplog.records


@pytest.mark.parametrize(("train", "dev", "root"), [("train", "dev", "a/b/"), ("training", "validation", "")])
def test_splits_in_one_folder_and_by_words(train, dev, root, tmp_path):
    for name in (f"{root}{train}/a/0.mp4", f"{root}{train}/b/1.mp4", f"{root}{dev}/b/2.mp4"):
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name).touch()
    assert load_folder(tmp_path / "set") == {
        "train": [(f"{root}{train}/a/0.mp4", "a"), (f"{root}{train}/b/1.mp4", "b")],
        "validation": [(f"{root}{dev}/b/2.mp4", "b")],
    }


@pytest.mark.parametrize("as_words", [False, True], ids=["folders", "words"])
def test_a_class_is_one_however_its_name_is_encoded(tmp_path, as_words):
    """macOS writes an ü as a u and a combining diaeresis."""
    composed, apart = (unicodedata.normalize(form, "müde") for form in ("NFC", "NFD"))
    for split, names in (("train", (composed, apart, "wach")), ("validation", (apart, "wach"))):
        for number, name in enumerate(names):
            path = tmp_path / "set" / split / ("clips" if as_words else name) / f"{number}.mp4"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        if as_words:
            lines = [json.dumps({"file_name": f"clips/{i}.mp4", "label": name}) for i, name in enumerate(names)]
            (tmp_path / "set" / split / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    splits = load_video_datasets(str(tmp_path / "set"), cache_dir=str(tmp_path / "cache"))
    for split, labels in (("train", [0, 0, 1]), ("validation", [0, 1])):
        assert splits[split].features["label"].names == [composed, "wach"]
        assert sorted(splits[split]["label"]) == labels


def test_what_a_folder_of_splits_leaves_out_is_said(tmp_path, caplog):
    for name in ("train/a/0.mp4", "train/b/test_1.mp4", "dev/a/0.mp4", "dev/c/0.mp4", "more/a/1.mp4", "2.mp4"):
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name).touch()
    found = load_folder(tmp_path / "set")
    assert found == {
        "train": [("train/a/0.mp4", "a"), ("train/b/test_1.mp4", "b")],
        "validation": [("dev/a/0.mp4", "a"), ("dev/c/0.mp4", "c")],
    }
    assert "2 files are left out, such as 2.mp4, because they belong to none of its splits: train, dev" in caplog.text
    caplog.clear()
    (tmp_path / "set" / "2.mp4").unlink()
    for old, new in (("train", "Train"), ("dev", "Test")):
        (tmp_path / "set" / old).rename(tmp_path / "set" / new)
    assert sum(map(len, load_folder(tmp_path / "set").values())) == 5
    assert "training data: Test, since a split must be a folder or file named exactly one of train" in caplog.text


def test_a_video_in_no_folder_of_a_class_is_named(tmp_path):
    for stray in ("0.mp4", "a/more/0.mp4"):
        for name in ("a/1.mp4", "b/1.mp4", stray):
            (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "set" / name).touch()
        with pytest.raises(ValueError, match=r"set: the class of .* is unclear, expected .* as CLASS/\*.mp4"):
            load_folder(tmp_path / "set")
        (tmp_path / "set" / stray).unlink()


@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_a_directory_of_tables_with_a_column_of_videos(tmp_path, kind):
    for i in range(10):
        write(tmp_path / f"{i}.mp4", 3)
    videos = [{"bytes": (tmp_path / f"{i}.mp4").read_bytes(), "path": None} for i in range(10)]
    table = Dataset.from_dict({"clip": videos, "action": ["run", "jump"] * 5}).cast_column("clip", Video(decode=False))
    (tmp_path / "set").mkdir()
    if kind == "parquet":
        table.to_parquet(tmp_path / "set" / "train.parquet")
        table.select(range(4)).to_parquet(tmp_path / "set" / "test.parquet")
    else:
        DatasetDict({"train": table, "test": table.select(range(4))}).save_to_disk(tmp_path / "set")
    options = {"label_column_name": "action", "cache_dir": str(tmp_path / "cache")}
    splits = load_video_datasets(str(tmp_path / "set"), validation_split_percentage=20, **options)
    assert {name: len(split) for name, split in splits.items()} == {"train": 8, "test": 4, "validation": 2}
    assert splits["test"].features["label"].names == ["jump", "run"]
    assert splits["test"][:]["video"][1]["bytes"] == videos[1]["bytes"]
    assert splits["test"]["label"][:] == [1, 0, 1, 0]


@pytest.mark.parametrize("in_splits", [False, True])
def test_metadata_says_what_a_folder_of_videos_shows(tmp_path, in_splits):
    for split in ("train", "test") if in_splits else ("",):
        for i in range(4):
            write(tmp_path / "set" / split / "clips" / f"val_{i}.mp4", 3)
        lines = [json.dumps({"file_name": f"clips/val_{i}.mp4", "label": "ab"[i % 2]}) for i in range(4)]
        (tmp_path / "set" / split / "metadata.jsonl").write_text("\n".join(lines))
    splits = load_video_datasets(str(tmp_path / "set"), cache_dir=str(tmp_path / "cache"))
    sizes = {"train": 3, "validation": 1} | ({"test": 4} if in_splits else {})
    assert {name: len(split) for name, split in splits.items()} == sizes
    assert splits["train"].features["label"].names == ["a", "b"]


def test_other_columns_and_labels_as_words(tmp_path, monkeypatch):
    for i in range(10):
        write(tmp_path / f"{i}.mp4", 3)
    table = Dataset.from_dict(
        {"clip": [str(tmp_path / f"{i}.mp4") for i in range(10)], "action": ["run", "jump"] * 5, "id": list(range(10))}
    ).cast_column("clip", Video(decode=False))
    monkeypatch.setattr("mingru_hf.data.video.load_dataset", lambda *_, **__: {"train": table, "val": table})
    splits = load_video_datasets("owner/name", label_column_name="action")
    assert set(splits) == {"train", "validation"}
    assert splits["train"].column_names == ["video", "label"]
    assert splits["train"].features["label"] == ClassLabel(names=["jump", "run"])
    assert splits["train"]["label"][:3] == [1, 0, 1]
    with pytest.raises(ValueError, match=r"no column that looks like the label: name one of clip, action, id"):
        load_video_datasets("owner/name")
    with pytest.raises(ValueError, match="no column film"):
        load_video_datasets("owner/name", video_column_name="film", label_column_name="action")


@pytest.mark.parametrize("unknown", [None, -1])
def test_videos_without_a_label_are_left_out(tmp_path, monkeypatch, caplog, unknown):
    labels = [0, 1] * 3 if unknown == -1 else ["a", "b"] * 3
    features = {"label": ClassLabel(names=["a", "b"])} if unknown == -1 else {}

    def table(labels):
        table = Dataset.from_dict({"video": [f"{i}.mp4" for i in range(6)], "label": labels})
        return table.cast(Features({**table.features, **features, "video": Video(decode=False)}))

    tables = {"train": table([*labels[:5], unknown]), "test": table([unknown] * 6)}
    monkeypatch.setattr("mingru_hf.data.video.load_dataset", lambda *_, **__: dict(tables))
    splits = load_video_datasets("owner/name", validation_split_percentage=20)
    assert {name: len(split) for name, split in splits.items()} == {"train": 4, "validation": 1}
    assert sorted(splits["train"]["label"][:] + splits["validation"]["label"][:]) == [0, 0, 0, 1, 1]
    assert "1 of 6 videos in train have no label" in caplog.text
    assert "6 of 6 videos in test have no label" in caplog.text
    tables["train"] = tables["test"]
    with pytest.raises(ValueError, match="no video to train on, or none with a label"):
        load_video_datasets("owner/name")


def test_folders_without_videos_or_classes_are_refused(tmp_path):
    (tmp_path / "empty" / "a").mkdir(parents=True)
    (tmp_path / "empty" / "a" / "notes.txt").touch()
    with pytest.raises(ValueError, match=r"empty contains no videos: expected CLASS/\*.mp4"):
        load_video_datasets(str(tmp_path / "empty"))
    for missing in (tmp_path / "missing", "~/missing", "./missing"):
        with pytest.raises(ValueError, match="no such directory"):
            load_video_datasets(str(missing))
    write(tmp_path / "one" / "a" / "0.mp4", 3)
    write(tmp_path / "one" / "a" / "1.mp4", 3)
    with pytest.raises(ValueError, match="class"):
        load_video_datasets(str(tmp_path / "one"), validation_split_percentage=50, cache_dir=str(tmp_path / "c"))
    with pytest.raises(ValueError, match="validation_split_percentage"):
        load_video_datasets(str(tmp_path / "one"), validation_split_percentage=100)


# ---- UCF101 ----


@pytest.fixture
def ucf101(tmp_path):
    """Write UCF101 with empty videos: two classes, five source videos each (one to test on), two clips per source."""
    videos, annotations = tmp_path / "UCF-101", tmp_path / "ucfTrainTestlist"
    annotations.mkdir()
    names = ("Archery", "YoYo")
    (annotations / "classInd.txt").write_text("1 Archery\r\n2 YoYo\r\n")
    train, test = [], []
    for number, name in enumerate(names, start=1):
        (videos / name).mkdir(parents=True)
        for group in range(1, 6):
            for clip in (1, 2):
                file = f"{name}/v_{name}_g{group:02}_c{clip:02}.avi"
                (videos / file).touch()
                (test if group == 1 else train).append(file + (f" {number}" if group > 1 else ""))
    (annotations / "trainlist01.txt").write_text("\n".join(train) + "\n")
    (annotations / "testlist01.txt").write_text("\n".join(test) + "\n")
    return videos, annotations


def test_ucf101_is_split_by_source_video(ucf101, monkeypatch):
    monkeypatch.setenv("UCF101_PATH", str(ucf101[0]))
    monkeypatch.setenv("UCF101_ANNPATH", str(ucf101[1]))
    splits = load_video_datasets("ucf101", validation_split_percentage=25)
    assert {name: len(split) for name, split in splits.items()} == {"train": 12, "validation": 4, "test": 4}
    sources = {name: {(row["label"], row["group"]) for row in split} for name, split in splits.items()}
    assert sources["test"] == {(0, 1), (1, 1)}
    assert len(sources["validation"]) == 2
    assert not sources["train"] & sources["validation"]
    assert {label for label, _ in sources["validation"]} == {0, 1}
    for row in splits["train"]:
        assert f"v_{('Archery', 'YoYo')[row['label']]}_g{row['group']:02}" in row["video"]["path"]
    again, other = (load_ucf101(*ucf101, validation_split_percentage=25, seed=seed) for seed in (0, 3))
    assert again["validation"]["video"] == splits["validation"]["video"]
    assert other["validation"]["video"] != splits["validation"]["video"]


def test_missing_videos_of_ucf101_are_counted(ucf101, caplog):
    (ucf101[0] / "YoYo" / "v_YoYo_g02_c01.avi").unlink()
    splits = load_ucf101(*ucf101)
    assert sum(map(len, splits.values())) == 19
    assert "1 listed videos are missing, among them YoYo/v_YoYo_g02_c01.avi" in caplog.text


def test_what_is_missing_of_ucf101_is_named(ucf101, tmp_path, monkeypatch):
    videos, annotations = ucf101
    monkeypatch.delenv("UCF101_PATH", raising=False)
    with pytest.raises(ValueError, match="set UCF101_PATH to the directory with the folders of the classes"):
        load_ucf101()
    with pytest.raises(ValueError, match="no such directory"):
        load_ucf101(tmp_path / "nowhere", annotations)
    with pytest.raises(ValueError, match=r"no annotation file .*trainlist02.txt"):
        load_ucf101(videos, annotations, fold=2)
    with pytest.raises(ValueError, match="folds 1, 2 and 3, not 4"):
        load_ucf101(videos, annotations, fold=4)
    (tmp_path / "bare").mkdir()
    with pytest.raises(ValueError, match=r"contains none of the videos in trainlist01.txt, such as YoYo"):
        load_ucf101(tmp_path / "bare", annotations)
    (annotations / "trainlist01.txt").write_text("Archery/v_Archery_g02_c01.avi 1\nsomething else\n")
    with pytest.raises(ValueError, match="line 2, has an unexpected format: 'something else'"):
        load_ucf101(videos, annotations)
    (annotations / "classInd.txt").write_text("1 Archery\n")
    (annotations / "trainlist01.txt").write_text("YoYo/v_YoYo_g02_c01.avi 2\n")
    with pytest.raises(ValueError, match="has no class YoYo"):
        load_ucf101(videos, annotations)
    (annotations / "classInd.txt").unlink()
    with pytest.raises(ValueError, match=r"no annotation file .*classInd.txt"):
        load_ucf101(videos, annotations)


def test_the_other_folds_have_lists_of_their_own(ucf101):
    videos, annotations = ucf101
    lines = {name: (annotations / f"{name}list01.txt").read_text().splitlines() for name in ("train", "test")}
    for fold in (2, 3):
        moved = [line for line in lines["train"] if f"_g{fold:02}" in line]
        rest = [line for line in lines["train"] if line not in moved] + lines["test"]
        (annotations / f"trainlist0{fold}.txt").write_text("\n".join(rest))
        (annotations / f"testlist0{fold}.txt").write_text("\n".join(moved))
        splits = load_video_datasets("ucf101", fold=fold, ucf101_path=videos, ucf101_annpath=annotations)
        assert set(splits["test"]["group"]) == {fold}


def test_each_class_of_ucf101_has_a_source_to_train_and_one_to_validate_on(ucf101):
    def sources(percentage, seed=0):
        options = {"ucf101_path": ucf101[0], "ucf101_annpath": ucf101[1]}
        splits = load_video_datasets("ucf101", validation_split_percentage=percentage, seed=seed, **options)
        return [{(row["label"], row["group"]) for row in splits[name]} for name in ("train", "validation")]

    assert [len(part) for part in sources(1)] == [6, 2]
    assert [len(part) for part in sources(99)] == [2, 6]
    assert len({tuple(sorted(sources(25, seed)[1])) for seed in range(4)}) > 1
    lists = ucf101[1] / "trainlist01.txt"
    lists.write_text("\n".join(line for line in lists.read_text().splitlines() if "_g02" in line))
    with pytest.raises(ValueError, match=r"no class of trainlist01.txt has two source videos on disk"):
        sources(25)


# ---- more about folders and other datasets ----


def test_the_seed_and_nothing_else_decides_what_is_held_out(tmp_path):
    for i in range(20):
        (tmp_path / "set" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / "ab"[i % 2] / f"{i}.mp4").touch()
    held_out = [tuple(load_folder(tmp_path / "set", seed=seed)["validation"]) for seed in (0, 0, 1, 2)]
    assert held_out[0] == held_out[1]
    assert len(set(held_out)) > 1


def test_a_dataset_of_the_hub_is_asked_for_by_its_configuration(tmp_path, monkeypatch):
    calls = []
    table = Dataset.from_dict({"video": ["a", "b"] * 5, "label": ["x", "y"] * 5}).cast_column(
        "video", Video(decode=False)
    )

    def load(*args, **kwargs):
        calls.append((args, kwargs))
        return {"train": table}

    monkeypatch.setattr("mingru_hf.data.video.load_dataset", load)
    load_video_datasets("owner/name", "small", cache_dir="there")
    assert calls == [(("owner/name", "small"), {"cache_dir": "there"})]


def test_a_clone_of_the_hub_has_the_configuration_that_is_asked_for(tmp_path):
    (tmp_path / "set").mkdir()
    for name in ("one", "two"):
        rows = [{"video": {"bytes": name.encode(), "path": None}, "label": "ab"[i % 2]} for i in range(10)]
        table = Dataset.from_list(rows).cast_column("video", Video(decode=False))
        table.to_parquet(tmp_path / "set" / f"{name}.parquet")
    configs = "".join(f"- config_name: {name}\n  data_files: {name}.parquet\n" for name in ("one", "two"))
    (tmp_path / "set" / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    splits = load_video_datasets(str(tmp_path / "set"), "two", cache_dir=str(tmp_path / "cache"))
    assert {row["video"]["bytes"] for row in splits["train"]} == {b"two"}


# ---- more about augmentation ----


def test_clips_of_one_epoch_lie_at_different_places(videos, processor):
    clips = VideoClips(videos, processor, training=True)
    assert len({tuple(numbers(clips[i])) for i in range(4)}) > 1


def test_augmented_clips_have_the_size_of_the_crop_and_the_processors_scale(videos, tmp_path):
    processor = MinConvGRUVideoProcessor(
        num_frames=2, size={"shortest_edge": 64}, crop_size={"height": 8, "width": 12}, do_normalize=False
    )
    clips = VideoClips(videos, processor, augment=make_augmentation(processor), training=True)
    pixels = clips[0]["pixel_values_videos"]
    assert pixels.shape == (2, 3, 8, 12)
    assert 0 <= pixels.min() <= pixels.max() <= 1
    seen = []
    clips = VideoClips(videos, processor, augment=lambda frames: seen.append(frames) or frames[..., :5, :7])
    assert clips[0]["pixel_values_videos"].shape == (2, 3, 5, 7)
    assert (seen[0].shape, seen[0].dtype) == ((2, 3, 16, 16), torch.uint8)


def test_each_part_of_the_augmentation_can_be_left_out(gradient):
    processor = MinConvGRUVideoProcessor(crop_size={"height": 20, "width": 30})
    whole = make_augmentation(processor, min_crop_scale=0.99, flip=False)
    for _ in range(20):
        crop = whole(gradient)[0, 0, 10].int()
        assert (crop.diff() >= 0).all()  # never mirrored
        assert crop[-1] - crop[0] > 150  # the crop is nearly the whole frame
    small = make_augmentation(processor, min_crop_scale=0.1, flip=False)
    assert min(int(crop[-1]) - int(crop[0]) for crop in (small(gradient)[0, 0, 10] for _ in range(20))) < 150
    torch.manual_seed(0)
    plain = make_augmentation(processor, 1, flip=False)(gradient)
    jittered = make_augmentation(processor, 1, flip=False, color_jitter=0.5)(gradient)
    assert (plain.int() - jittered.int()).abs().max() > 10


def test_a_processor_that_does_not_crop_is_followed(gradient):
    processor = MinConvGRUVideoProcessor(size={"shortest_edge": 10}, crop_size=8, do_center_crop=False)
    frames = FitAndCrop(processor)(gradient)
    assert (frames.shape, frames.dtype) == ((2, 3, 10, 15), torch.uint8)

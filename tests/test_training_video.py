"""Evaluation of whole videos: views, how their votes and probabilities decide, and which split is used."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from datasets import Dataset, Video

pytest.importorskip("av", reason="videos are read and written by PyAV")
pytest.importorskip("torchvision", reason="transformers' video processors are built on torchvision")

from mingru_hf.data.av import write_video
from mingru_hf.data.video import FitAndCrop, VideoClips, clip_positions
from mingru_hf.training import video as video_module
from mingru_hf.training.arguments import fixed_settings
from mingru_hf.training.loop import BatchStream, summary
from mingru_hf.training.plots import plot_confusion
from mingru_hf.training.video import (
    VideoDataArguments,
    confusion_matrix,
    evaluate_videos,
    split_as_in_training,
    views_as_in_training,
)
from mingru_hf.video_processing_minconvgru import MinConvGRUVideoProcessor


@pytest.fixture
def accelerator():
    """Return an accelerator for one CPU process, and reset the state of accelerate afterwards."""
    yield Accelerator(cpu=True)
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


class Reader(torch.nn.Module):
    """A classifier whose logits are the weights stored for the grey level of the first pixel."""

    def __init__(self, weights):
        super().__init__()
        self.weights = weights  # grey level / 20 -> logits
        self.seen = []

    def forward(self, pixel_values_videos):
        levels = pixel_values_videos[:, 0, 0, 0, 0].div(20).round().int().tolist()
        self.seen.append(levels)
        return SimpleNamespace(logits=torch.tensor([self.weights[level] for level in levels]))


@pytest.fixture
def clips(tmp_path):
    """Return a function that makes one-frame clips of 3-frame videos with grey levels 0, 20 and 40.

    Pixels stay in 0..255, and crops are 8 of 16 pixels wide.
    """

    def make(labels, clips_per_video=3, **kwargs):
        frames = np.stack([np.full((16, 16, 3), 20 * t, np.uint8) for t in range(3)])
        paths = [str(tmp_path / f"{i}.mp4") for i in range(len(labels))]
        for path in paths:
            write_video(path, frames)
        videos = Dataset.from_dict({"video": paths, "label": labels}).cast_column("video", Video(decode=False))
        processor = MinConvGRUVideoProcessor(
            num_frames=1, size={"shortest_edge": 16}, crop_size=8, do_rescale=False, do_normalize=False
        )
        return VideoClips(videos, processor, clips_per_video, **kwargs)

    return make


def test_the_vote_and_the_mean_of_the_views_decide(clips, accelerator):
    # Two views slightly prefer class 0, one strongly prefers class 1.
    model = Reader({0: [1.0, 0.0], 1: [1.0, 0.0], 2: [0.0, 9.0]})
    result = evaluate_videos(model, clips([0, 1]), accelerator, views="center")
    assert result["label"].tolist() == [0, 1]
    assert result["vote"].tolist() == [0, 0]
    assert result["mean"].tolist() == [1, 1]
    assert result["view_accuracy"] == pytest.approx(3 / 6)
    assert result["unreadable"] == 0
    assert not model.training


def test_the_mean_decides_a_tied_vote(clips, accelerator):
    model = Reader({0: [1.0, 0.0], 2: [0.0, 9.0]})
    result = evaluate_videos(model, clips([0], clips_per_video=2), accelerator, views="center")
    assert result["vote"].tolist() == [1]


def test_votes_are_counted_before_probabilities(clips, accelerator):
    """Three views slightly prefer class 0, and two are sure of class 1."""
    model = Reader({0: [0.1, 0.0], 1: [0.1, 0.0], 2: [0.0, 9.0]})
    result = evaluate_videos(model, clips([0], clips_per_video=5), accelerator, views="center")
    assert sorted(level for batch in model.seen for level in batch)[2:] == [1, 2, 2]
    assert (result["vote"].tolist(), result["mean"].tolist()) == ([0], [1])


@pytest.mark.parametrize("views", ["center", "five_crops"])
def test_views_are_upright(clips, accelerator, tmp_path, views):
    data, seen = clips([0], clips_per_video=1), []
    brighter_to_the_right = np.linspace(0, 200, 16).astype(np.uint8)[None, None, :, None]
    write_video(str(tmp_path / "0.mp4"), np.broadcast_to(brighter_to_the_right, (3, 16, 16, 3)).copy())

    class Watching(Reader):
        def forward(self, pixel_values_videos):
            seen.append(pixel_values_videos)
            return SimpleNamespace(logits=torch.zeros(len(pixel_values_videos), 2))

    evaluate_videos(Watching({}), data, accelerator, views=views)
    frames = torch.cat(seen).float()
    assert (frames[..., -1] - frames[..., 0] > 50).all()
    assert ((frames[..., -1, :] - frames[..., 0, :]).abs() < 20).all()


@pytest.mark.parametrize("views", ["center", "ten_crops"])
@pytest.mark.parametrize("size", [(60, 100), (102, 38), (20, 30)])
def test_frames_are_resized_before_clips_share_them(clips, accelerator, tmp_path, views, size):
    """Memory then holds only small frames, and the views equal those of clips that are resized as a whole."""
    data, seen = clips([0], clips_per_video=5), []
    noise = np.random.default_rng(0).integers(0, 256, (3, *size, 3), dtype=np.uint8)
    write_video(str(tmp_path / "0.mp4"), noise)
    data.processor.num_frames, data.processor.size = 2, {"shortest_edge": 24}

    class Watching(Reader):
        def forward(self, pixel_values_videos):
            seen.append(pixel_values_videos)
            return SimpleNamespace(logits=torch.zeros(len(pixel_values_videos), 2))

    evaluate_videos(Watching({}), data, accelerator, views=views)
    crop, expected = FitAndCrop(data.processor, views), []
    for clip in torch.from_numpy(data.read(0, clip_positions(5))).permute(0, 1, 4, 2, 3):
        cropped = crop(clip)
        expected += [cropped] if views == "center" else cropped
    assert torch.equal(torch.cat(seen), torch.stack(expected))
    frames = video_module._WholeVideos(data, range(1))[0][1]
    assert min(frames.shape[3:]) == 24
    assert frames.shape[:3] == (5, 2, 3)


@pytest.mark.parametrize(("views", "count"), [("center", 1), ("five_crops", 5), ("ten_crops", 10)])
def test_each_clip_is_seen_in_every_view_in_bounded_batches(clips, accelerator, views, count):
    model = Reader({level: [0.0, 1.0] for level in range(3)})
    evaluate_videos(model, clips([1]), accelerator, views=views, batch_size=2 * count)
    assert [len(batch) for batch in model.seen] == [2 * count, count]
    assert [level for batch in model.seen for level in batch] == [0] * count + [1] * count + [2] * count


def test_unreadable_videos_are_left_out(clips, accelerator, tmp_path, caplog):
    data = clips([0, 1, 1])
    (tmp_path / "1.mp4").write_bytes(b"")
    result = evaluate_videos(Reader({level: [0.0, 1.0] for level in range(3)}), data, accelerator, views="center")
    assert result["label"].tolist() == [0, -1, 1]
    assert result["unreadable"] == 1
    assert "1.mp4" in caplog.text
    assert confusion_matrix(result["label"], result["vote"], 2).tolist() == [[0, 1], [0, 1]]
    for i in (0, 2):
        (tmp_path / f"{i}.mp4").write_bytes(b"")
    with pytest.raises(ValueError, match="all 3 videos are unreadable or too short"):
        evaluate_videos(Reader({}), data, accelerator, views="center")


def test_a_model_is_tested_on_the_fold_and_the_split_of_its_training(tmp_path):
    trained = {"dataset_name": "ucf101", "seed": 3, "validation_split_percentage": 20, "fold": 2}
    (tmp_path / "metrics.json").write_text(json.dumps({"arguments": trained}))

    def split(name, percentage=None, fold=None, dataset="ucf101", seed=None, directory=tmp_path):
        asked = VideoDataArguments(dataset_name=dataset, validation_split_percentage=percentage, fold=fold)
        data_args, seed = split_as_in_training(asked, seed, name, directory)
        return data_args.validation_split_percentage, data_args.fold, seed

    assert split("test") == split("validation") == split("validation", 20, 2, seed=3) == (20, 2, 3)
    assert split("test", 50, seed=1) == (50, 2, 1)  # neither moves a video into the test split
    assert split("validation", 50, 1, "others", seed=1) == (50, 1, 1)  # the model has seen none of these videos
    with pytest.warns(UserWarning, match=r"with seed 3, not 0: .* validation videos differ.*Remove --seed"):
        assert split("validation", seed=0) == (20, 2, 0)
    with pytest.raises(ValueError, match=r"with fold 2, not 1: the test videos would differ.*Remove --fold"):
        split("test", fold=1)
    with pytest.warns(
        UserWarning, match=r"no metrics.json .*: set --seed, --validation_split_percentage as in training"
    ):
        assert split("validation", dataset="mine", directory=tmp_path / "missing") == (10, 1, 0)
    assert split("test", dataset="mine", directory=tmp_path / "missing") == (10, 1, 0)


@pytest.mark.parametrize("file", ["metrics.json", "trainer_state.json"])
def test_a_model_trained_without_mirror_images_is_tested_without_them(tmp_path, file):
    assert views_as_in_training(None, tmp_path) == views_as_in_training("ten_crops", "some/model") == "ten_crops"
    for no_flip, expected in ((False, "ten_crops"), (True, "center")):
        (tmp_path / file).write_text(json.dumps({"arguments": {"no_flip": no_flip}}))
        assert views_as_in_training(None, tmp_path) == expected
        assert views_as_in_training("five_crops", tmp_path) == "five_crops"
    with pytest.raises(ValueError, match=r"trained with no_flip.* mirror images: use --views center or five_crops"):
        views_as_in_training("ten_crops", tmp_path)


def test_the_confusion_matrix_has_the_truth_along_its_rows(tmp_path):
    labels, predictions = torch.tensor([0, 0, 0, 2, -1]), torch.tensor([0, 1, 1, 2, -1])
    matrix = confusion_matrix(labels, predictions, 3)
    assert matrix.tolist() == [[1, 2, 0], [0, 0, 0], [0, 0, 1]]
    plot_confusion(matrix, ["a", "b", "c"], tmp_path / "few.png")
    plot_confusion(torch.eye(30, dtype=torch.long), [str(i) for i in range(30)], tmp_path / "many.png")
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in ("few.png", "many.png"))


def test_the_stream_counts_across_epochs_if_a_dataset_redraws():
    plain, counting = (iter(BatchStream(5, seed=2, batch_size=4, redraws_each_epoch=anew)) for anew in (False, True))
    indices = [[i for _ in range(5) for i in next(stream)] for stream in (plain, counting)]
    assert [i % 5 for i in indices[1]] == indices[0]
    assert [i // 5 for i in indices[1]] == [n // 5 for n in range(20)]
    resumed = iter(BatchStream(5, seed=2, batch_size=4, first_batch=3, redraws_each_epoch=True))
    assert next(resumed) == indices[1][12:16]
    assert VideoClips.redraws_each_epoch


def test_a_loss_of_clips_is_called_so():
    scores = {"eval_loss": 0.5, "eval_perplexity": 1.6487, "eval_accuracy": 0.75}
    assert summary(scores, "clip") == "validation loss 0.5000 nats per clip, accuracy 0.7500"


def test_every_option_reaches_the_loader(monkeypatch):
    calls = []
    monkeypatch.setattr(video_module, "load_video_datasets", lambda **options: calls.append(options))
    options = {"video_column_name": "c", "label_column_name": "d", "validation_split_percentage": 20, "fold": 2}
    options |= {"ucf101_path": "e", "ucf101_annpath": "f", "cache_dir": "g", "dataset_name": "a"}
    options |= {"dataset_config_name": "b"}
    VideoDataArguments(**options).load(seed=3)
    assert calls == [options | {"seed": 3}]


def test_a_run_goes_on_with_the_order_of_frames_it_began_with():
    assert fixed_settings(VideoDataArguments(frame_order="shuffled")) == {"frame_order": "shuffled"}


def split_of(directory, dataset="ucf101", seed=None):
    """Return percentage and seed of the validation split on which a model in a directory is tested."""
    asked = VideoDataArguments(dataset_name=dataset, validation_split_percentage=None, fold=None)
    data_args, seed = split_as_in_training(asked, seed, "validation", directory)
    return data_args.validation_split_percentage, seed


def test_data_that_were_moved_are_known_by_their_folders_name(tmp_path):
    trained = {"dataset_name": "/data/mine", "seed": 3, "validation_split_percentage": 20}
    (tmp_path / "metrics.json").write_text(json.dumps({"arguments": trained}))
    with pytest.warns(UserWarning, match="with seed 3, not 4"):
        assert split_of(tmp_path, "elsewhere/mine/", seed=4) == (20, 4)


@pytest.mark.parametrize("metrics", [None, "half {", "{}", "[]", '{"arguments": null}'])
def test_a_checkpoint_tells_how_its_model_was_trained(metrics, tmp_path):
    trained = {"dataset_name": "mine", "seed": 3, "validation_split_percentage": 20}
    (tmp_path / "trainer_state.json").write_text(json.dumps({"arguments": trained}))
    if metrics is not None:
        (tmp_path / "metrics.json").write_text(metrics)
    assert split_of(tmp_path, "mine") == (20, 3)


def test_what_training_did_not_tell_is_given_without_a_warning(tmp_path, recwarn):
    (tmp_path / "metrics.json").write_text(json.dumps({"arguments": {"dataset_name": "mine", "seed": 3}}))
    asked = VideoDataArguments(dataset_name="mine", validation_split_percentage=30, fold=None)
    data_args, seed = split_as_in_training(asked, None, "validation", tmp_path)
    assert (data_args.validation_split_percentage, seed) == (30, 3)
    assert not recwarn.list


def test_shuffled_frames_depend_on_the_seed_and_the_video(clips, accelerator):
    def first_frames(**kwargs):
        data, model = clips([0] * 12, clips_per_video=1, **kwargs), Reader({level: [0.0, 1.0] for level in range(3)})
        data.processor.num_frames = 3
        evaluate_videos(model, data, accelerator, views="center")
        return [level for batch in model.seen for level in batch]

    shuffled = first_frames(frame_order="shuffled", seed=1)
    assert first_frames() == [0] * 12
    assert set(shuffled) == {0, 1, 2}
    assert shuffled == first_frames(frame_order="shuffled", seed=1) != first_frames(frame_order="shuffled", seed=2)


class ReadByWorkers(VideoClips):
    """Clips that the main process must not decode."""

    def read(self, video, positions, **kwargs):
        if torch.utils.data.get_worker_info() is None:
            raise RuntimeError("decoded by the main process")
        return super().read(video, positions, **kwargs)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_workers_decode_and_no_random_number_is_taken(clips, accelerator):
    data, model = clips([1, 1]), Reader({level: [0.0, 1.0] for level in range(3)})
    data = ReadByWorkers(data.videos, data.processor, 3)
    torch.manual_seed(5)
    result = evaluate_videos(model, data, accelerator, views="center", num_workers=1)
    assert result["vote"].tolist() == [1, 1]
    drawn = torch.rand(2)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(2))


def test_a_batch_smaller_than_the_views_of_a_clip_holds_one_clip(clips, accelerator):
    model = Reader({level: [0.0, 1.0] for level in range(3)})
    evaluate_videos(model, clips([1]), accelerator, views="ten_crops", batch_size=4)
    assert [len(batch) for batch in model.seen] == [10, 10, 10]


def test_mixed_precision_is_that_of_the_accelerator(clips):
    seen = []

    class Watching(Reader):
        def forward(self, pixel_values_videos):
            seen.append(torch.is_autocast_enabled("cpu"))
            return super().forward(pixel_values_videos)

    try:
        for precision in ("no", "bf16"):
            AcceleratorState._reset_state()
            model = Watching({level: [0.0, 1.0] for level in range(3)})
            evaluate_videos(model, clips([1], 1), Accelerator(cpu=True, mixed_precision=precision), views="center")
    finally:
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
    assert seen == [False, True]


def test_no_predicted_class_is_missing_from_the_confusion_matrix():
    matrix = confusion_matrix(torch.tensor([0, -1]), torch.tensor([1, 2]), 4)
    assert matrix.shape == (4, 4)
    assert matrix.sum() == matrix[0, 1] == 1


def test_views_are_not_resized_or_cropped_again(clips, accelerator):
    shapes = set()

    class Watching(Reader):
        def forward(self, pixel_values_videos):
            shapes.add(tuple(pixel_values_videos.shape[1:]))
            return super().forward(pixel_values_videos)

    data, model = clips([1]), Watching({level: [0.0, 1.0] for level in range(3)})
    evaluate_videos(model, data, accelerator, views="ten_crops")
    data.processor.do_center_crop, data.processor.crop_size = False, {"height": 12, "width": 12}
    evaluate_videos(model, data, accelerator, views="center")
    assert shapes == {(1, 3, 8, 8), (1, 3, 16, 16)}


def test_classes_that_no_view_chooses_get_no_vote(clips, accelerator):
    model = Reader({0: [2.0, 0.0, 1.0, 0.0], 1: [0.0, 2.0, 1.0, 0.0], 2: [2.0, 0.0, 1.0, 0.0]})
    assert evaluate_videos(model, clips([0]), accelerator, views="center")["vote"].tolist() == [0]

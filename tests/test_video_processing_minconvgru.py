"""The video processor: the frames and pixels that it gives, from arrays and from files."""

import json
import math
import struct
import subprocess
import sys
import wave
from fractions import Fraction

import numpy as np
import PIL.Image
import pytest
import torch
from transformers import AutoVideoProcessor, ResNetConfig, pipeline
from transformers.video_utils import VideoMetadata

from mingru_hf import MinConvGRUConfig, MinConvGRUForVideoClassification, video_processing_minconvgru

pytest.importorskip("torchvision", reason="transformers' video processors are built on torchvision")

from torchvision.transforms.v2 import functional as TF

from mingru_hf.data.moving_shapes import write_video
from mingru_hf.video_processing_minconvgru import (
    MinConvGRUVideoProcessor,
    VideoReadError,
    clip_indices,
    decode_frames,
    read_video,
)


@pytest.fixture
def frames():
    """Return (12, 24, 32, 3) bytes; frame t is 20 t everywhere except in a white corner."""
    video = np.full((12, 24, 32, 3), 20, np.uint8) * np.arange(12, dtype=np.uint8)[:, None, None, None]
    video[:, :8, :8] = 255
    return video


@pytest.fixture
def file(frames, tmp_path):
    pytest.importorskip("av", reason="videos are written by PyAV")
    write_video(tmp_path / "video.mp4", frames, fps=6)
    return tmp_path / "video.mp4"


def levels(pixels):
    """Return the frame numbers of (T, C, H, W) pixels in 0..255, read opposite the white corner."""
    return torch.as_tensor(pixels)[:, 0, -1, -1].float().div(20).round().int().tolist()


# ---- which frames ----


def test_clips_lie_where_they_are_asked_for():
    assert clip_indices(10, 4).tolist() == [3, 4, 5, 6]
    assert clip_indices(10, 4, position=0).tolist() == [0, 1, 2, 3]
    assert clip_indices(10, 4, position=1).tolist() == [6, 7, 8, 9]
    assert clip_indices(10, 4, frame_stride=3).tolist() == [0, 3, 6, 9]
    assert clip_indices(10, 3, frame_stride=2.5, position=0).tolist() == [0, 2, 5]
    assert clip_indices(10, 1).tolist() == [4]
    assert clip_indices(1, 1, frame_stride=7).tolist() == [0]


def test_a_short_video_is_refused():
    with pytest.raises(VideoReadError, match=r"too few for a clip of 4 frames with stride 3, which takes 10"):
        clip_indices(9, 4, frame_stride=3)


def test_frames_are_sampled_by_stride_and_by_rate(frames):
    plain = {"do_resize": False, "do_center_crop": False, "do_rescale": False, "do_normalize": False}

    def sampled(**kwargs):
        return levels(MinConvGRUVideoProcessor(**plain)(frames, return_tensors="pt", **kwargs).pixel_values_videos[0])

    assert sampled(num_frames=4) == [4, 5, 6, 7]
    assert sampled(num_frames=4, frame_stride=3) == [1, 4, 7, 10]
    assert sampled(do_sample_frames=False) == list(range(12))
    metadata = {"total_num_frames": 12, "fps": 30}
    assert sampled(num_frames=3, fps=10, video_metadata=metadata) == [2, 5, 8]
    assert sampled(num_frames=3, fps=60, video_metadata=metadata) == [4, 5, 6]  # no frame is repeated
    with pytest.raises(ValueError, match="rate is unknown"):
        sampled(num_frames=3, fps=10)


@pytest.mark.parametrize("name", ["num_frames", "frame_stride"])
def test_impossible_clips_are_refused(name):
    with pytest.raises(ValueError, match=name):
        MinConvGRUVideoProcessor(**{name: 0})


# ---- which pixels ----


def test_pixels_are_resized_cropped_scaled_and_normalised(frames):
    processor = MinConvGRUVideoProcessor(
        num_frames=2, size={"shortest_edge": 12}, crop_size=8, image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.4, 0.3]
    )
    pixels = processor([frames, frames[4:]], return_tensors="pt").pixel_values_videos
    assert pixels.shape == (2, 2, 3, 8, 8)
    assert pixels.dtype == torch.float32
    # 24 x 32 -> 12 x 16 -> its middle 8 x 8: the corner of 4 x 4 just misses it, but for its blurred edge.
    for clip, first in zip(pixels, (5, 7), strict=True):
        for frame, number in zip(clip, (first, first + 1), strict=True):
            expected = (torch.tensor([number * 20 / 255] * 3) - torch.tensor([0.1, 0.2, 0.3])) / torch.tensor(
                [0.5, 0.4, 0.3]
            )
            torch.testing.assert_close(frame[:, 4, 4], expected)


def test_the_saved_processor_does_the_same(frames, tmp_path):
    processor = MinConvGRUVideoProcessor(num_frames=3, frame_stride=2, size={"shortest_edge": 10}, crop_size=8)
    processor.save_pretrained(tmp_path)
    loaded = MinConvGRUVideoProcessor.from_pretrained(tmp_path)
    assert (loaded.num_frames, loaded.frame_stride, loaded.size, loaded.crop_size) == (
        3,
        2,
        processor.size,
        processor.crop_size,
    )
    torch.testing.assert_close(*(p(frames, return_tensors="pt").pixel_values_videos for p in (processor, loaded)))


# ---- files ----


def test_a_file_gives_what_its_frames_give(file, frames):
    processor = MinConvGRUVideoProcessor(num_frames=4, frame_stride=2, size={"shortest_edge": 24}, crop_size=24)
    from_file = processor(str(file), return_tensors="pt").pixel_values_videos
    from_array = processor(frames, return_tensors="pt").pixel_values_videos
    # H.264 changes pixels by a few grey levels, each of which is 0.017 after normalisation.
    torch.testing.assert_close(from_file, from_array, atol=0.15, rtol=0)


def test_any_frames_are_decoded_in_any_order(file):
    for source in (str(file), file.read_bytes()):
        video, metadata = read_video(source, lambda metadata: np.array([7, 2, 2, 11]))
        assert levels(video.transpose(0, 3, 1, 2)) == [7, 2, 2, 11]
        assert (metadata.total_num_frames, metadata.fps, metadata.height, metadata.width) == (12, 6.0, 24, 32)
        assert metadata.duration == 2.0
        assert metadata.frames_indices == [7, 2, 2, 11]


def test_frames_are_counted_where_the_header_does_not_say(frames, tmp_path):
    av = pytest.importorskip("av", reason="videos are written by PyAV")
    write_video(tmp_path / "video.mkv", frames, fps=6)
    with av.open(str(tmp_path / "video.mkv")) as container:
        assert container.streams.video[0].frames == 0
    video, metadata = read_video(str(tmp_path / "video.mkv"), lambda m: np.arange(m.total_num_frames)[-2:])
    assert metadata.total_num_frames == 12
    assert levels(video.transpose(0, 3, 1, 2)) == [10, 11]


def test_a_file_that_says_too_much_is_asked_again(file, monkeypatch):
    monkeypatch.setattr("mingru_hf.video_processing_minconvgru._count_frames", lambda video: 20)
    video, metadata = read_video(str(file), lambda metadata: clip_indices(metadata.total_num_frames, 3, position=1))
    assert levels(video.transpose(0, 3, 1, 2)) == [9, 10, 11]
    assert metadata.total_num_frames == 12


@pytest.mark.parametrize("content", [b"", b"not a video at all" * 100, None], ids=["empty", "text", "cut off"])
def test_a_broken_file_is_named(file, content, tmp_path):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(file.read_bytes()[: file.stat().st_size // 2] if content is None else content)
    with pytest.raises(VideoReadError, match=r"broken.mp4: it cannot be decoded"):
        MinConvGRUVideoProcessor(num_frames=2)(str(broken))


def damage(path, numbers):
    """Overwrite the packets of a file that have these numbers."""
    av = pytest.importorskip("av", reason="videos are written by PyAV")
    with av.open(str(path)) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    data = bytearray(path.read_bytes())
    for start, size in (packets[number] for number in numbers):
        data[start : start + size] = b"\xff" * size
    path.write_bytes(data)


def test_damaged_frames_are_skipped(file):
    damage(file, [6])
    for position in (0, 0.5, 1):
        video, metadata = read_video(str(file), lambda m, p=position: clip_indices(m.total_num_frames, 4, position=p))
        assert video.shape == (4, 24, 32, 3)
    assert metadata.total_num_frames == 11
    with pytest.raises(VideoReadError, match=r"video.mp4: the video has 11 frames, too few"):
        MinConvGRUVideoProcessor(num_frames=12)(str(file))
    damage(file, range(12))
    with pytest.raises(VideoReadError, match=r"video.mp4: 0 of 12 frames can be decoded"):
        MinConvGRUVideoProcessor(num_frames=2)(str(file))


# A container, a codec and its options, and whether late frames can be reached without decoding all before them.
LONG_FILES = {
    "video.mp4": ("libx264", {"g": "50"}, True),
    "video.mkv": ("libx264", {"g": "50"}, True),
    "video.ts": ("libx264", {"g": "50", "bf": "0"}, True),
    "hevc.mp4": ("libx265", {"x265-params": "keyint=50:open-gop=0:log-level=none:pools=none"}, True),
    "av1.mp4": ("libsvtav1", {"g": "50", "preset": "12", "svtav1-params": "lp=1"}, True),
    "open.mp4": ("libx264", {"x264-params": "open-gop=1:keyint=40:bframes=4"}, False),
    "interlaced.mp4": ("libx264", {"g": "50", "x264-params": "tff=1"}, False),
    "reordered.avi": ("libx264", {"g": "50"}, False),
    "video.h264": ("libx264", {"g": "50"}, False),
    "video.webm": ("libvpx-vp9", {"g": "50", "deadline": "realtime"}, False),
    "video.avi": ("mpeg4", {"g": "30"}, False),
    "video.mpg": ("mpeg2video", {"g": "15"}, False),
}


def write_long(path, codec, options, length=400):
    """Write a moving pattern, at a rate that varies where the container allows it."""
    av = pytest.importorskip("av", reason="videos are written by PyAV")
    random = np.random.default_rng(0)
    varies = path.suffix in (".mp4", ".mkv")
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=30, options={**options, "threads": "1"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        if varies:
            stream.codec_context.time_base = Fraction(1, 3000)
        pattern = random.integers(0, 256, (6, 100, 3)).astype(np.uint8).repeat(8, 0).repeat(8, 1)
        times = np.cumsum(random.integers(60, 300, length))
        for number, time in enumerate(times.tolist()):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pattern[:, number : number + 64]), format="rgb24")
            if varies:
                frame.pts, frame.time_base = time, Fraction(1, 3000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


@pytest.fixture
def decoded(monkeypatch):
    """Return a list that grows by an entry for every frame that `read_video` decodes."""
    seen = []

    def counting(container):
        for frame in decode_frames(container):
            seen.append(frame.pts)
            yield frame

    monkeypatch.setattr(video_processing_minconvgru, "decode_frames", counting)
    return seen


def decode_all(path):
    with pytest.importorskip("av").open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in decode_frames(container)])


@pytest.mark.parametrize("name", LONG_FILES)
def test_late_frames_are_those_that_counting_finds(name, decoded, tmp_path):
    codec, options, seeks = LONG_FILES[name]
    path = tmp_path / name
    write_long(path, codec, options)
    expected = decode_all(path)
    assert len(expected) == 400
    spread = list(range(10, 400, 39))
    for indices in ([399], [300, 301, 302], [380, 262, 262, 3], spread, [290 + 4 * i for i in range(9)]):
        decoded.clear()
        video, metadata = read_video(str(path), lambda metadata, indices=indices: np.array(indices))
        assert np.array_equal(video, expected[indices])
        assert metadata.frames_indices == indices
        if indices != spread:
            assert (len(decoded) < 200) == seeks
    decoded.clear()
    video, _ = read_video(path.read_bytes(), lambda metadata: np.array([350]))
    assert np.array_equal(video[0], expected[350])
    assert (len(decoded) < 200) == seeks


def test_videos_that_begin_between_two_keyframes(tmp_path):
    """The decoder drops the frames before the first keyframe, so they are not counted."""
    av = pytest.importorskip("av", reason="videos are written by PyAV")
    write_long(tmp_path / "whole.mp4", "libx264", {"g": "50"})
    with av.open(str(tmp_path / "whole.mp4")) as whole, av.open(str(tmp_path / "cut.mp4"), "w") as cut:
        stream = cut.add_stream_from_template(whole.streams.video[0])
        for number, packet in enumerate(whole.demux(video=0)):
            if number >= 20 and packet.size:
                packet.stream = stream
                cut.mux(packet)
    expected = decode_all(tmp_path / "cut.mp4")
    assert len(expected) == 350
    video, _ = read_video(str(tmp_path / "cut.mp4"), lambda metadata: np.array([300, 349]))
    assert np.array_equal(video, expected[[300, 349]])


def test_all_frames_are_decoded_where_seeking_fails(tmp_path, monkeypatch):
    path = tmp_path / "video.mp4"
    write_long(path, "libx264", {"g": "50"})
    expected = decode_all(path)

    class Container:
        def __init__(self, container):
            self.container = container

        def __getattr__(self, name):
            return getattr(self.container, name)

        def __enter__(self):
            return self

        def __exit__(self, *args):
            self.container.close()

        def seek(self, *args, **kwargs):
            raise PermissionError("Operation not permitted")

    original = video_processing_minconvgru._open
    monkeypatch.setattr(video_processing_minconvgru, "_open", lambda video: Container(original(video)))
    video, _ = read_video(str(path), lambda metadata: np.array([350]))
    assert np.array_equal(video[0], expected[350])


def test_frames_of_another_size_are_scaled_to_the_first(frames, tmp_path):
    av = pytest.importorskip("av", reason="videos are written by PyAV")
    path = tmp_path / "video.h264"
    with path.open("wb") as file:
        for part, video in (("large", frames), ("small", frames[:, ::2, ::2])):
            with av.open(str(tmp_path / f"{part}.h264"), "w") as container:
                stream = container.add_stream("libx264", rate=6, options={"threads": "1"})
                stream.height, stream.width, stream.pix_fmt = *video.shape[1:3], "yuv420p"
                for frame in np.ascontiguousarray(video):
                    container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
                container.mux(stream.encode())
            file.write((tmp_path / f"{part}.h264").read_bytes())
    video, _ = read_video(str(path), lambda metadata: np.array([3, 15, 23]))
    assert video.shape == (3, 24, 32, 3)
    assert levels(video.transpose(0, 3, 1, 2)) == [3, 3, 11]


def test_damaged_frames_among_late_ones_are_skipped(decoded, tmp_path):
    path = tmp_path / "video.mp4"
    write_long(path, "libx264", {"g": "20", "bf": "0"})
    whole = decode_all(path)
    damage(path, [310])
    video, _ = read_video(str(path), lambda metadata: np.array([305, 345]))
    assert np.array_equal(video, whole[[305, 345]])
    assert len(decoded) < 100
    video, _ = read_video(str(path), lambda metadata: np.array([305, 315, 345]))
    assert np.array_equal(video[::2], whole[[305, 346]])  # all were decoded, and those that can be were counted


def test_a_short_file_is_named(file):
    with pytest.raises(VideoReadError, match=r"video.mp4: the video has 12 frames, too few"):
        MinConvGRUVideoProcessor(num_frames=13)(str(file))


# ---- beside a model ----


@pytest.fixture
def model_dir(tmp_path):
    """Save a tiny classifier with its processor."""
    backbone = ResNetConfig(
        embedding_size=4, hidden_sizes=[4], depths=[1], layer_type="basic", out_features=["stage1"]
    )
    config = MinConvGRUConfig(
        backbone_config=backbone,
        num_frames=5,
        id2label=dict(enumerate("abc")),
        initializer_range=1.0,
    )
    MinConvGRUForVideoClassification(config).eval().save_pretrained(tmp_path / "model")
    processor = MinConvGRUVideoProcessor(num_frames=5, frame_stride=2, size={"shortest_edge": 24}, crop_size=16)
    processor.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_the_auto_class_knows_it(model_dir):
    assert type(AutoVideoProcessor.from_pretrained(model_dir)) is MinConvGRUVideoProcessor


@pytest.mark.clients("transformers")
def test_the_pipeline_takes_arrays_and_files(model_dir, file, frames):
    model = MinConvGRUForVideoClassification.from_pretrained(model_dir).eval()
    processor = AutoVideoProcessor.from_pretrained(model_dir)
    classify = pipeline("video-classification", model=str(model_dir), device="cpu")
    for video, given in ((frames, frames), (str(file), read_video(str(file), lambda m: np.arange(12))[0])):
        with torch.no_grad():
            probabilities = model(**processor(given, return_tensors="pt")).logits[0].softmax(-1)
        answers = classify(video, top_k=3)
        assert {answer["label"] for answer in answers} == set("abc")
        for answer in answers:
            assert answer["score"] == pytest.approx(probabilities["abc".index(answer["label"])].item(), abs=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_frames": 0}, "num_frames must be at least 1, got 0"),
        ({"frame_stride": 0}, "frame_stride must be at least 1, got 0"),
        ({"frame_stride": -1}, "frame_stride must be at least 1, got -1"),
        ({"fps": 0}, "fps must be above 0, got 0"),
    ],
)
def test_impossible_numbers_are_named_in_a_call_too(frames, options, message):
    with pytest.raises(ValueError, match=message):
        MinConvGRUVideoProcessor(num_frames=4)(frames, return_tensors="pt", **options)
    with pytest.raises(ValueError, match=message):
        MinConvGRUVideoProcessor(**options)


def test_frames_without_channels_are_named():
    images = [PIL.Image.fromarray(np.zeros((40, 50), dtype=np.uint8))] * 4
    with pytest.raises(ValueError, match=r"shape \(4, 40, 50\) has no channel axis.*convert\('RGB'\)"):
        MinConvGRUVideoProcessor(num_frames=4)(images, return_tensors="pt")


def test_it_loads_where_the_package_is_not_installed(model_dir, frames, tmp_path):
    np.save(tmp_path / "frames.npy", frames)
    expected = MinConvGRUVideoProcessor.from_pretrained(model_dir)(frames, return_tensors="pt").pixel_values_videos
    code = f"""
import sys
sys.modules["mingru_hf"] = None
import json, numpy, transformers
processor = transformers.AutoVideoProcessor.from_pretrained({str(model_dir)!r}, trust_remote_code=True)
assert "transformers_modules" in type(processor).__module__
model = transformers.AutoModelForVideoClassification.from_pretrained({str(model_dir)!r}, trust_remote_code=True)
inputs = processor(numpy.load("frames.npy"), return_tensors="pt")
assert model(**inputs).logits.shape == (1, 3)
processor.save_pretrained("again")
print(json.dumps(inputs["pixel_values_videos"].double().sum((2, 3, 4)).tolist()))
"""
    environment = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "PATH": "/usr/bin:/bin"}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert ran.returncode == 0, ran.stderr
    sums = torch.tensor(json.loads(ran.stdout.splitlines()[-1]), dtype=torch.float64)
    torch.testing.assert_close(sums, expected.double().sum((2, 3, 4)))
    assert (tmp_path / "again" / "video_processing_minconvgru.py").is_file()


# ---- more about which frames and pixels ----

PLAIN = {"do_resize": False, "do_center_crop": False, "do_rescale": False, "do_normalize": False}


def test_fractions_of_a_frame_add_up_to_whole_ones():
    assert clip_indices(200, 101, frame_stride=1.15, position=0)[100] == 115  # 1.15 * 100 is less in floating point
    assert clip_indices(10, 3, position=0.25).tolist() == [2, 3, 4]  # the start 1.75 is rounded to 2


def test_a_rate_between_whole_strides(frames):
    processor = MinConvGRUVideoProcessor(num_frames=4, fps=12, **PLAIN)
    metadata = {"total_num_frames": 12, "fps": 30}
    pixels = processor(frames, video_metadata=metadata, return_tensors="pt").pixel_values_videos[0]
    assert levels(pixels) == [2, 4, 7, 9]


def test_a_clip_has_the_frames_of_its_processor():
    """At any position, as training takes clips."""
    metadata = VideoMetadata(total_num_frames=12, fps=30)
    by_stride, by_rate = MinConvGRUVideoProcessor(frame_stride=3), MinConvGRUVideoProcessor(fps=15)
    for processor, stride in ((by_stride, 3), (by_rate, 2)):
        assert processor.sample_frames(metadata, num_frames=3, position=0).tolist() == [0, stride, 2 * stride]
        assert processor.sample_frames(metadata, num_frames=3, position=1)[-1] == 11


@pytest.mark.parametrize("options", [{"num_frames": None}, {"frame_stride": math.nan}, {"fps": math.nan}])
def test_what_is_no_number_is_refused(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
        MinConvGRUVideoProcessor(**options)


def test_the_defaults_are_those_of_backbones_for_imagenet():
    frames = torch.randint(256, (10, 3, 280, 300), dtype=torch.uint8)
    pixels = MinConvGRUVideoProcessor()(frames, return_tensors="pt").pixel_values_videos[0]
    resized = TF.center_crop(TF.resize(frames, [256], antialias=True), [224, 224]) / 255
    torch.testing.assert_close(pixels, TF.normalize(resized, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    with pytest.raises(VideoReadError, match="has 9 frames, too few for a clip of 10 frames"):
        MinConvGRUVideoProcessor()(frames[:9])


def test_one_size_is_that_of_the_shorter_edge():
    assert MinConvGRUVideoProcessor(size=20).size == {"shortest_edge": 20}


# ---- more about files ----


def test_several_files_are_sampled_each(file, frames, tmp_path):
    write_video(tmp_path / "short.mp4", frames[:6], fps=6)
    processor = MinConvGRUVideoProcessor(num_frames=2, **PLAIN)
    pixels = processor([str(file), str(tmp_path / "short.mp4")], return_tensors="pt").pixel_values_videos
    assert [levels(clip) for clip in pixels] == [[5, 6], [2, 3]]


def test_all_frames_of_a_file(file):
    processor = MinConvGRUVideoProcessor(do_sample_frames=False, **PLAIN)
    assert levels(processor(str(file), return_tensors="pt").pixel_values_videos[0]) == list(range(12))


@pytest.mark.parametrize("url", ["http://host/a.mp4", "https://host/a.mp4"])
def test_a_file_on_the_net_is_sampled_too(url, file, monkeypatch):
    def download(address, backend, sample_indices_fn):
        assert (address, backend) == (url, "pyav")
        return read_video(str(file), sample_indices_fn)

    monkeypatch.setattr("mingru_hf.video_processing_minconvgru.load_video", download)
    monkeypatch.setattr("mingru_hf.video_processing_minconvgru.is_torchcodec_usable", lambda **_: False)
    pixels = MinConvGRUVideoProcessor(num_frames=2, **PLAIN)(url, return_tensors="pt").pixel_values_videos[0]
    assert levels(pixels) == [5, 6]


def test_red_stays_red(tmp_path):
    pytest.importorskip("av", reason="videos are written by PyAV")
    write_video(tmp_path / "red.mp4", np.full((2, 32, 48, 3), (250, 20, 20), np.uint8), fps=6)
    video, _ = read_video(str(tmp_path / "red.mp4"), lambda metadata: np.arange(2))
    assert video.shape == (2, 32, 48, 3)
    assert (video[..., 0] > 200).all()
    assert (video[..., 2] < 70).all()


@pytest.mark.parametrize(
    ("matrix", "stored"),
    [
        ((0, 1, -1, 0), lambda frames: np.rot90(frames, 1, (1, 2))),
        ((0, -1, 1, 0), lambda frames: np.rot90(frames, -1, (1, 2))),
        ((-1, 0, 0, -1), lambda frames: np.rot90(frames, 2, (1, 2))),
        ((-1, 0, 0, 1), lambda frames: frames[:, :, ::-1]),
        ((0, 1, 1, 0), lambda frames: frames.swapaxes(1, 2)),
    ],
    ids=["clockwise", "counterclockwise", "upside down", "mirrored", "mirrored and turned"],
)
def test_a_video_that_players_turn_is_turned(matrix, stored, frames, tmp_path):
    pytest.importorskip("av", reason="videos are written by PyAV")
    path = tmp_path / "phone.mp4"
    write_video(path, stored(frames), fps=6)
    data = bytearray(path.read_bytes())
    start = data.index(b"tkhd") + 44  # the display matrix: a, b, u, c, d, v, x, y, w
    a, b, c, d = (value << 16 for value in matrix)
    data[start : start + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    sizes = []

    def choose(metadata):
        sizes.append((metadata.height, metadata.width))
        return np.arange(12)

    video, _ = read_video(str(path), choose)
    assert sizes == [(24, 32)]
    assert np.abs(video - frames.astype(int)).mean() < 2  # it is above 20 if the white corner is in another place


def test_frames_that_no_file_holds_are_an_error(file):
    with pytest.raises(VideoReadError, match="frame 50 was selected, but the video has 12 frames"):
        read_video(str(file), lambda metadata: np.array([50]))


def test_a_codec_that_is_not_known_is_named_as_the_reason(file):
    file.write_bytes(file.read_bytes().replace(b"avc1", b"none"))
    with pytest.raises(VideoReadError, match="its codec is unknown"):
        read_video(str(file), lambda metadata: np.array([0]))


def test_a_file_of_sound_alone_is_no_video(tmp_path):
    pytest.importorskip("av", reason="reads videos")
    with wave.open(str(tmp_path / "sound.wav"), "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(8000)
        sound.writeframes(bytes(1600))
    with pytest.raises(VideoReadError, match="it has no video stream"):
        read_video(str(tmp_path / "sound.wav"), lambda metadata: np.arange(2))


def test_without_pyav_the_error_names_it(file, monkeypatch):
    monkeypatch.setattr("mingru_hf.video_processing_minconvgru.av", None)
    with pytest.raises(ImportError, match="pip install av"):
        read_video(str(file), lambda metadata: np.arange(2))

"""MinConvGRUVideoProcessor: turn a video into the clip of frames that the model takes, as in training.

`clip_indices` chooses the frames of a clip, and `read_video` decodes them; training calls `read_video` directly.
Decoding needs PyAV or, for the processor only, torchcodec; frames that are already decoded need neither.

T frames of the video; N frames of a clip; H x W pixels.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator
from functools import partial
from io import BytesIO
from itertools import chain

import numpy as np
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from transformers.processing_utils import Unpack, VideosKwargs
from transformers.utils import requires_backends
from transformers.utils.import_utils import is_torchcodec_usable
from transformers.video_processing_utils import BaseVideoProcessor
from transformers.video_utils import VideoMetadata, load_video

try:
    import av
except ImportError:
    av = None


# Reading all timestamps of a video takes as long as decoding a twentieth of small frames, and less of larger ones; a
# keyframe may be some 250 frames away. Frames nearer to the beginning are reached sooner by decoding from there.
_SEEK_FROM = 256
_SEEK_FROM_PART = 1 / 20
# Codecs whose packets each hold one frame that is shown, and whose keyframes are known from the packets themselves.
# With other codecs a file may mark frames as keyframes that are not, or hold frames that are never shown.
_SEEKABLE_CODECS = ("h264", "hevc", "av1")


class VideoReadError(ValueError):
    """A video that cannot be read, or that is too short for a clip."""


def clip_indices(total_num_frames: int, num_frames: int, frame_stride: float = 1, position: float = 0.5) -> np.ndarray:
    """Return the indices of one clip's frames: N of them, every `frame_stride`-th.

    Args:
        total_num_frames: number T of frames in the video.
        num_frames: number N of frames in the clip.
        frame_stride: distance between consecutive frames of the clip, in frames of the video; with a fractional
            stride, the offset of each frame from the first is rounded down.
        position: where the clip lies, from 0 (at the beginning) to 1 (at the end).

    Returns:
        (N,) ascending indices.

    Raises:
        VideoReadError: if the video is shorter than the clip.
    """
    offsets = np.floor(np.arange(num_frames) * frame_stride + 1e-6).astype(int)
    room = total_num_frames - 1 - offsets[-1]
    if room < 0:
        raise VideoReadError(
            f"the video has {total_num_frames} frames, too few for a clip of {num_frames} frames with "
            f"stride {frame_stride:g}, which takes {offsets[-1] + 1}. Lower num_frames or frame_stride"
        )
    return offsets + round(position * room)


def decode_frames(container) -> Iterator:
    """Decode the frames of a PyAV container; skip damaged packets, as video players do.

    Yields:
        PyAV frames of the first video stream.
    """
    for packet in container.demux(video=0):
        try:
            yield from packet.decode()
        except av.error.InvalidDataError:
            continue


def upright(pixels: np.ndarray, frame) -> np.ndarray:
    """Rotate a frame upright, as video players do.

    A phone stores frames in the orientation of its sensor, and records separately how it was held.

    Args:
        pixels: (H, W, 3) pixels of the frame, as stored.
        frame: the PyAV frame, which holds the rotation.

    Returns:
        (H, W, 3) pixels, or (W, H, 3) after a quarter turn.
    """
    if not frame.rotation:
        return pixels
    a, b, _, c, d = np.frombuffer(frame.side_data["DISPLAYMATRIX"], np.int32)[:5].tolist()
    if a * d < b * c:  # the frame is mirrored before it is rotated
        pixels = pixels[::-1]
    return np.ascontiguousarray(np.rot90(pixels, round(frame.rotation / 90)))


def read_video(
    video: str | bytes,
    choose: Callable[[VideoMetadata], np.ndarray],
    fit: Callable[[np.ndarray], np.ndarray] = lambda frame: frame,
) -> tuple[np.ndarray, VideoMetadata]:
    """Decode the frames of a video that `choose` selects, with PyAV.

    Frames late in a video are found by their timestamps and decoded from the keyframe before them, if that gives the
    same frames as decoding the whole video; see `_decode_from_keyframes`. Otherwise all frames up to the last selected
    one are decoded and counted. If fewer frames can be decoded than the file declares, `choose` is called again with
    the actual number.

    Args:
        video: a path, or the bytes of a file.
        choose: function from the metadata (`total_num_frames`, `fps`, `height`, `width`) to the indices of the
            selected frames, in any order.
        fit: function that is called with each selected frame, (H, W, 3) uint8, as soon as it is decoded. It can
            return a smaller frame to save memory: all returned frames are held in memory at once.

    Returns:
        (N, H, W, 3) uint8 RGB frames, rotated `upright`, in the order of the indices, and the metadata with
        `frames_indices`. If the size changes within the video, all frames are scaled to that of the first.

    Raises:
        VideoReadError: if the file cannot be decoded, has no video stream or no frame, or has too few frames for
            `choose`.
        ImportError: if PyAV is missing.
    """
    if av is None:
        raise ImportError("reading videos needs PyAV: pip install av")
    try:
        total, counted = _count_frames(video), False
        while True:
            with _open(video) as container:
                stream = container.streams.video[0]
                decoded = decode_frames(container)
                first = next(decoded, None)  # only decoded frames hold the rotation
                if first is None:
                    raise VideoReadError(f"0 of {total} frames can be decoded")
                height, width, _ = upright(np.empty((stream.height, stream.width, 0)), first).shape
                metadata = VideoMetadata(
                    total_num_frames=total,
                    fps=float(stream.average_rate) if stream.average_rate else None,
                    width=width,
                    height=height,
                    video_backend="pyav",
                )
                if metadata.fps:
                    metadata.duration = total / metadata.fps
                indices = np.asarray(choose(metadata)).tolist()
                wanted = set(indices)
                convert = partial(
                    _convert, av.video.reformatter.VideoReformatter(), (stream.width, stream.height), fit
                )
                frames = None
                if max(wanted) >= max(_SEEK_FROM, _SEEK_FROM_PART * total):
                    frames = _decode_from_keyframes(video, wanted, convert)
                if frames is None:
                    frames, count = {}, 0
                    for frame in chain([first], decoded):
                        if count in wanted:
                            frames[count] = convert(frame)
                        count += 1
                        if len(frames) == len(wanted):
                            break
            if len(frames) == len(wanted):
                metadata.frames_indices = indices
                return np.stack([frames[index] for index in indices]), metadata
            if counted:
                missing = min(wanted - frames.keys())
                raise VideoReadError(f"frame {missing} was selected, but the video has {count} frames, counted from 0")
            total, counted = count, True
    except (av.FFmpegError, OSError) as error:
        raise VideoReadError(f"it cannot be decoded: {error or type(error).__name__}") from None


def _open(video: str | bytes):
    container = av.open(BytesIO(video) if isinstance(video, bytes) else video)
    for stream in container.streams.video[:1]:
        if stream.codec_context is None:
            container.close()
            raise VideoReadError("its codec is unknown")
        stream.codec_context.thread_count = 1  # DataLoader workers already decode in parallel
    return container


def _count_frames(video: str | bytes) -> int:
    """Return the number of frames from the file's header or, if the header has none, by counting the packets.

    Raises:
        VideoReadError: if the file has no video stream.
    """
    with _open(video) as container:
        if not container.streams.video:
            raise VideoReadError("it has no video stream: expected a video, not an audio file")
        stream = container.streams.video[0]
        return stream.frames or sum(packet.size > 0 for packet in container.demux(stream))


def _convert(reformatter, size: tuple[int, int], fit: Callable[[np.ndarray], np.ndarray], frame) -> np.ndarray:
    return fit(upright(reformatter.reformat(frame, *size, "rgb24", threads=1).to_ndarray(), frame))


def _decode_from_keyframes(
    video: str | bytes, wanted: set[int], convert: Callable[..., np.ndarray]
) -> dict[int, np.ndarray] | None:
    """Decode frames of a video by seeking to the keyframes before them.

    A packet's place among the timestamps is the number of its frame if every packet gives a frame. This is known of
    `_SEEKABLE_CODECS` if every packet can be decoded from the last keyframe stored before it, which must then be shown
    before it as well.

    Args:
        video: a path, or the bytes of a file.
        wanted: indices of the frames.
        convert: function from a PyAV frame to its pixels.

    Returns:
        The pixels by index. None if the above does not hold: for other codecs, files without timestamps, videos that
        begin between two keyframes or use open groups of pictures, interlaced ones, and where frames are missing.
    """
    frames, remaining = {}, sorted(wanted)
    try:
        with _open(video) as container:
            stream = container.streams.video[0]
            if stream.codec_context.codec.canonical_name not in _SEEKABLE_CODECS:
                return None
            stored, last_key = [], None
            for packet in container.demux(stream):
                if not packet.size:
                    continue
                if packet.is_keyframe:
                    last_key = packet.pts
                if packet.pts is None or last_key is None or packet.pts < last_key:
                    return None
                if not packet.is_discard:
                    stored.append((packet.pts, packet.is_keyframe))
            shown = sorted(stored)
            if (shown != stored) != stream.codec_context.has_b_frames:
                return None  # AVI, for example, numbers frames as they are stored, not as they are shown
            times = [time for time, _ in shown]
            index_of = {time: index for index, time in enumerate(times)}
            keys = [index for index, (_, is_keyframe) in enumerate(shown) if is_keyframe]
            if len(index_of) < len(times) or remaining[0] < 0 or remaining[-1] >= len(times):
                return None
            while remaining:
                number = bisect_right(keys, remaining[0])
                if number == 0:
                    return None
                key = expected = keys[number - 1]
                container.seek(times[key], stream=stream)
                for frame in decode_frames(container):
                    index = index_of.get(frame.pts, len(times))
                    if index < key:
                        continue
                    if index != expected or frame.interlaced_frame or (index == key and not frame.key_frame):
                        return None
                    expected += 1
                    if index == remaining[0]:
                        frames[index] = convert(frame)
                        del remaining[0]
                        if not remaining or keys[bisect_right(keys, remaining[0]) - 1] > index + 1:
                            break
                else:
                    return None
    except (av.FFmpegError, OSError):
        return None
    return frames


def _check_sampling(num_frames: int, frame_stride: float, fps: float | None) -> None:
    for name, value in (("num_frames", num_frames), ("frame_stride", frame_stride)):
        if value is None or not value >= 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    if fps is not None and not fps > 0:
        raise ValueError(f"fps must be above 0, got {fps}.")


class MinConvGRUVideoProcessorKwargs(VideosKwargs, total=False):
    """Arguments of video processors and `frame_stride`, the distance between consecutive frames of the clip."""

    frame_stride: int | float | None


class MinConvGRUVideoProcessor(BaseVideoProcessor):
    """Turn videos into clips for MinConvGRU: sample, resize, crop, rescale, normalise.

    A clip is `num_frames` frames from the middle of the video: every `frame_stride`-th frame, or `fps` frames per
    second. The shorter edge is resized to `size`, the centre is cropped to `crop_size`, and pixel values x in 0..255
    become (x / 255 - `image_mean`) / `image_std`. `do_sample_frames=False` keeps all frames: pass it with a single
    frame of a stream.

    Args:
        num_frames: number of frames per clip.
        frame_stride: distance between consecutive frames of the clip, in frames of the video, 1 or more; ignored if
            `fps` is given.
        fps: frames of the clip per second of video, instead of `frame_stride`; `video_metadata` must then hold the
            video's `fps`, as it does for files. If `fps` exceeds the video's own rate, consecutive frames are taken.
            The video's rate is assumed to be constant.
        kwargs: all arguments of transformers' video processors.

    Raises:
        VideoReadError: if a video is too short for the clip, or cannot be decoded (a ValueError).
    """

    resample = 2  # PIL.Image.Resampling.BILINEAR, without importing PIL
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    size = {"shortest_edge": 256}
    crop_size = {"height": 224, "width": 224}
    default_to_square = False
    do_resize = True
    do_center_crop = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True
    do_sample_frames = True
    num_frames = 10
    frame_stride = 1
    valid_kwargs = MinConvGRUVideoProcessorKwargs
    model_input_names = ["pixel_values_videos"]

    def __init__(self, **kwargs: Unpack[MinConvGRUVideoProcessorKwargs]):
        requires_backends(self, ("torchvision", "vision"))
        super().__init__(**kwargs)
        _check_sampling(self.num_frames, self.frame_stride, self.fps)

    def sample_frames(
        self,
        metadata: VideoMetadata,
        num_frames: int | None = None,
        frame_stride: float | None = None,
        fps: float | None = None,
        position: float = 0.5,
        **kwargs,
    ) -> np.ndarray:
        """Return the indices of a clip's frames.

        Args:
            metadata: metadata of the video: `total_num_frames`, and `fps` if frames per second are requested.
            num_frames, frame_stride, fps: as for the class; None for the processor's own values.
            position: where the clip lies, from 0 (at the beginning) to 1 (at the end).

        Raises:
            VideoReadError: if the video is too short.
            ValueError: if a number is out of range, or `fps` is requested and the video's own rate is not known.
        """
        num_frames = self.num_frames if num_frames is None else num_frames
        frame_stride = self.frame_stride if frame_stride is None else frame_stride
        fps = self.fps if fps is None else fps
        _check_sampling(num_frames, frame_stride, fps)
        if fps is not None:
            if not metadata.fps:
                raise ValueError(
                    f"a clip of {fps} frames per second was requested, but the video's own rate is unknown: pass "
                    "video_metadata with its fps, or use frame_stride"
                )
            frame_stride = max(1.0, metadata.fps / fps)
        return clip_indices(metadata.total_num_frames, num_frames, frame_stride, position)

    def fetch_videos(self, video_url_or_urls, sample_indices_fn=None):
        """Decode files or URLs with torchcodec if it works, as the base class does, and otherwise with PyAV.

        Raises:
            ValueError: if the argument is frames, which the base class passes here if they have no channel axis; or if
                PyAV cannot decode a file, or the file has too few frames.
        """
        if hasattr(video_url_or_urls, "shape"):
            raise ValueError(
                f"a video of shape {tuple(video_url_or_urls.shape)} has no channel axis: give (T, H, W, C) or "
                "(T, C, H, W), and convert PIL images with image.convert('RGB')"
            )
        if is_torchcodec_usable(decode="video"):
            return super().fetch_videos(video_url_or_urls, sample_indices_fn=sample_indices_fn)
        if isinstance(video_url_or_urls, list):
            return list(zip(*[self.fetch_videos(x, sample_indices_fn) for x in video_url_or_urls], strict=True))
        choose = sample_indices_fn or (lambda metadata: np.arange(metadata.total_num_frames))
        if video_url_or_urls.startswith(("http://", "https://")):
            return load_video(video_url_or_urls, backend="pyav", sample_indices_fn=choose)
        try:
            return read_video(video_url_or_urls, choose)
        except VideoReadError as error:
            raise VideoReadError(f"{video_url_or_urls}: {error}") from None


MinConvGRUVideoProcessor.register_for_auto_class("AutoVideoProcessor")  # its code is saved with a checkpoint

__all__ = ["MinConvGRUVideoProcessor"]

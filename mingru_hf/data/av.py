"""Import PyAV, an optional package that reads and writes video files, and write videos with it."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np


def import_av():
    """Import and return the package PyAV.

    Raises:
        ImportError: if PyAV is missing; the message says how to install it.
    """
    try:
        import av
    except ImportError:
        raise ImportError("reading and writing videos needs PyAV: pip install av") from None
    return av


def write_video(path: str | Path, frames: np.ndarray | Iterator[np.ndarray], fps: int = 8) -> None:
    """Write RGB frames as an H.264 file.

    Args:
        path: the file to write, for example *.mp4.
        frames: (T, H, W, 3) uint8, or an iterator over (H, W, 3); H and W even.
        fps: frames per second.

    Raises:
        ImportError: if PyAV is missing.
    """
    av = import_av()
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "16", "preset": "veryfast", "threads": "1"})
        stream.pix_fmt = "yuv420p"
        for number, frame in enumerate(frames):
            if number == 0:
                stream.height, stream.width = frame.shape[:2]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())

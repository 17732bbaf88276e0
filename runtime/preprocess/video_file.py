"""Frames of a video file, decoded by PyAV one at a time."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from deepstitch.errors import InputError, MissingDependency
from deepstitch.runtime.preprocess.images import MAX_IMAGE_PIXELS

__all__ = ["FileFrames"]

_CONTAINERS = (
    "mov",
    "mp4",
    "m4a",
    "3gp",
    "3g2",
    "mj2",
    "matroska",
    "webm",
    "avi",
    "mpeg",
    "mpegts",
    "gif",
    "flv",
    "ogg",
)


class FileFrames:
    """A video file. Nothing is decoded before :meth:`read`, and one frame at a time then.

    Attributes:
        num_frames: as the container says, or counted where it does not say.
        fps: average rate.
        size: ``(height, width)``.
        do_sample: None; see :class:`deepstitch.runtime.preprocess.video.Clip`.
    """

    def __init__(self, source: str | os.PathLike[str] | bytes, label: str) -> None:
        """Open; ``source`` is a path or what such a file holds."""
        try:
            import av
        except ImportError:
            raise MissingDependency("av", "video", "reading a video file") from None
        self._av, self._label = av, label
        self._source = source if isinstance(source, bytes) else Path(source)
        self.do_sample: bool | None = None
        if isinstance(self._source, Path) and not self._source.is_file():
            raise InputError(f"{label}: no such file")
        with self._open() as container:
            stream = self._stream(container)
            self.size = (int(stream.height), int(stream.width))
            if min(self.size) < 1 or self.size[0] * self.size[1] > MAX_IMAGE_PIXELS:
                raise InputError(f"{label}: frames of {self.size[1]}x{self.size[0]} pixels cannot be used")
            self.fps = float(stream.average_rate or 0)
            # Some containers do not say how many frames they hold. Packets are counted without decoding.
            self.num_frames = int(stream.frames) or self._guard(
                lambda: sum(packet.size > 0 for packet in container.demux(stream))
            )
        if self.num_frames < 1 or self.fps <= 0:
            raise InputError(f"{label}: {self.num_frames} frames at {self.fps:g} per second; is the file complete?")

    def read(self, indices: Sequence[int]) -> Iterator[Image.Image]:
        """Yield the RGB frames at ``indices``; where the file ends early, its last frame is repeated.

        Raises:
            InputError: nothing can be decoded.
        """
        with self._open() as container:
            frames = enumerate(container.decode(self._stream(container)))
            position, frame = -1, None
            for index in indices:
                while position < index:
                    following = self._guard(lambda: next(frames, None))
                    if following is None:
                        break
                    position, frame = following
                if frame is None:
                    raise InputError(f"{self._label}: no frame can be decoded; is the file damaged?")
                yield Image.fromarray(frame.to_ndarray(format="rgb24"))

    def _open(self) -> Any:
        if isinstance(self._source, Path):
            return self._guard(lambda: self._av.open(str(self._source)))
        # Bytes may come from anyone: formats that name other files or addresses are left out.
        options = {"protocol_whitelist": "none", "format_whitelist": ",".join(_CONTAINERS)}
        return self._guard(lambda: self._av.open(io.BytesIO(self._source), container_options=options))

    def _stream(self, container: Any) -> Any:
        if not container.streams.video:
            raise InputError(f"{self._label}: the file has no video stream")
        return container.streams.video[0]

    def _guard(self, call: Any) -> Any:
        """Run one PyAV call; its errors become ours."""
        try:
            return call()
        except (self._av.FFmpegError, ValueError, OSError) as error:
            raise InputError(f"{self._label}: cannot be decoded as a video ({error})") from None

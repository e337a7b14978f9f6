"""Decode a file with libsndfile or FFmpeg, block by block.

libsndfile decodes the formats that it knows, FFmpeg (by PyAV) all others. FFmpeg is lenient: every error that
it reports is checked here, and that all promised seconds came.
"""

import math
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import soundfile

from mdl_toolkit.audio.file_parts import Integrity
from mdl_toolkit.audio.resample import CONVERT, Floats
from mdl_toolkit.audio.segments import Cutter
from mdl_toolkit.audio.unreadable import explain_content
from mdl_toolkit.errors import AudioError, TooLongError
from mdl_toolkit.i18n import Localized

# Samples per channel that libsndfile decodes at once.
BLOCK_SAMPLES = 8_192
# libsndfile's number of frames for FLAC whose header does not say it.
UNKNOWN_LENGTH = 2**63 - 1
# libsndfile's codes for: format not recognised, encoding not supported, format not implemented; bad resource
# forks of the Mac. It looks for one where it recognises nothing, and takes any `._` or `.AppleDouble` in the
# current directory for it.
NOT_KNOWN = (1, 4, 18, *range(148, 155))
# Hz; libsndfile decodes Opus at no more than the rate in its header.
OPUS_LEAST = 16_000
# What libsndfile decodes: where FFmpeg finds this in a file that libsndfile refused, the file is damaged.
SNDFILE_FORMATS = {("flac", "flac"), ("ogg", "vorbis"), ("ogg", "opus")}
SNDFILE_CODECS = ("pcm_", "adpcm_ms", "adpcm_ima_wav")
# FFmpeg's formats whose duration stands in the file, and is not its own guess: per stream, or per file, which
# tells the length of the sound only if nothing else is in it.
STREAM_LENGTH = ("mov,mp4,m4a,3gp,3g2,mj2", "caf", "wv", "tta", "ape")
FILE_LENGTH = ("matroska,webm", "asf", "flv")
# Encoder delay makes decoded and promised length differ: by up to 3 frames of AAC (2,112 samples of priming
# and up to 1,023 of padding), by 1 frame of WMA. Codecs with a delay have frames of at most 2,048 samples.
DELAY_FRAMES, DELAY_FRAME = 4, 2_048
# Codecs without a delay, and seconds by which the clocks of containers round.
LOSSLESS, CLOCK = ("pcm_", "flac", "alac", "wavpack", "tta", "ape"), 0.002


@dataclass(frozen=True)
class Decoded:
    """Hold what a decoder says of a file.

    Attributes:
        format: the name of the file's format.
        missing: what was promised and did not come, of a file that was cut off.
        has_length: FFmpeg knows how long the sound should be.
    """

    format: str
    missing: Localized | None
    has_length: bool = False


def decode(file: BinaryIO, integrity: Integrity, cutter: Cutter, max_hours: float = math.inf) -> Decoded:
    """Decode into a cutter, by libsndfile, or by FFmpeg what that does not know or would read only in part.

    Raises:
        AudioError: the file is no recording, damaged, or longer than so many hours, by its header or as it
            is decoded. An error at the very end counts as cut off.
    """
    file.seek(0)
    try:
        if integrity.is_mpeg:
            decoded = _decode_with_ffmpeg(file, None, cutter, max_hours)
        else:
            with soundfile.SoundFile(file) as sound:
                if _reads_all(sound, integrity):
                    decoded = _decode_with_libsndfile(sound, file, cutter, max_hours)
                else:
                    decoded = _decode_with_ffmpeg(file, None, cutter, max_hours)
    except soundfile.LibsndfileError as refused:
        decoded = _decode_with_ffmpeg(file, refused, cutter, max_hours)
    if cutter.length < integrity.least_samples and not decoded.missing:
        raise _damaged(decoded.format, "decoder", "stopped early")
    return decoded


def _reads_all(sound: Any, integrity: Integrity) -> bool:
    """Tell whether libsndfile reads all the sound of a file that it knows.

    It does not read all of MPEG audio, where it stops at an estimate (WAV may hold it too); of Opus whose
    header names under 16 kHz, or 0, which is a mere remark on the source (RFC 7845, section 5.1); and of Opus
    that starts in the middle of a stream, where it plays what is to be skipped, and ends as much too early.
    """
    if sound.subtype == "OPUS":
        rate: int = sound.samplerate
        lost: float = integrity.opus_seconds - sound.frames / rate
        return rate >= OPUS_LEAST and lost < 1 / rate
    return not sound.subtype.startswith("MPEG")


def _damaged(name: str, decoder: str, problem: object) -> AudioError:
    """Return the error for a damaged file, with what a decoder says of it."""
    return AudioError(
        "{name}: {decoder} says: {words}; the file is damaged, get it again",
        name=name,
        decoder=decoder,
        words=_reason(problem),
    )


def _reason(problem: object) -> str:
    """Return the message of a decoder, without the text that Python adds to it."""
    words = getattr(problem, "error_string", None) or getattr(problem, "strerror", None) or problem
    return str(words).rstrip(".")


def _check_hours(seconds: float, most: float) -> None:
    """Raise TooLongError for a recording that is longer than some hours."""
    if seconds > most * 3600:
        raise TooLongError(
            "it is longer than {most:g} {most:hour|hours}; cut it, or set --max-audio-hours", most=most
        )


def _seconds_missing(promised: float, present: float) -> Localized:
    """Say how many seconds a header promises and how many are there."""
    return Localized(
        "the header promises {promised:.2f} s, {present:.2f} s are there", promised=promised, present=present
    )


def _breaks_off(seconds: float, decoder: str, problem: object) -> Localized:
    """Say where the sound breaks off, and what a decoder says of it."""
    return Localized(
        "it breaks off after {seconds:.2f} s ({decoder} says: {reason})",
        seconds=seconds,
        decoder=decoder,
        reason=_reason(problem),
    )


# --- libsndfile ------------------------------------------------------------------------------------------


def _decode_with_libsndfile(sound: Any, file: BinaryIO, cutter: Cutter, max_hours: float) -> Decoded:
    """Decode an open `soundfile.SoundFile` to its end, or up to an error at the end of the file."""
    if sound.frames != UNKNOWN_LENGTH:
        _check_hours(sound.frames / sound.samplerate, max_hours)
    # soundfile seeks after every block, at which libsndfile fails in FLAC of unknown length (from a pipe).
    sound.seekable = lambda: False
    problem = None
    try:
        while len(block := sound.read(BLOCK_SAMPLES, dtype="float32", always_2d=True)):
            cutter.add(sound.format, block.T, sound.samplerate)
            _check_hours(cutter.length / sound.samplerate, max_hours)
    except soundfile.LibsndfileError as error:
        problem = error
        if file.tell() < file.seek(0, 2):
            raise _damaged(sound.format, "libsndfile", error) from error
    present = cutter.length / sound.samplerate
    if problem:
        return Decoded(sound.format, _breaks_off(present, "libsndfile", problem))
    is_short = cutter.length < sound.frames != UNKNOWN_LENGTH
    return Decoded(
        sound.format, _seconds_missing(sound.frames / sound.samplerate, present) if is_short else None
    )


# --- FFmpeg ----------------------------------------------------------------------------------------------


def _decode_with_ffmpeg(file: BinaryIO, refused: Any, cutter: Cutter, max_hours: float) -> Decoded:
    """Decode with FFmpeg what libsndfile refused, with the error `refused`, or would read only in part."""
    import av

    # PyAV takes tags in any encoding from version 19 on, and before that if it is asked to.
    tags = {"metadata_errors": "replace"} if int(av.__version__.partition(".")[0]) < 19 else {}
    file.seek(0)
    try:
        # The file stands for itself alone: a playlist in it opens nothing else.
        container = av.open(file, options={"protocol_whitelist": "none"}, **tags)
    except (av.FFmpegError, OSError, ValueError, LookupError) as error:
        if known := explain_content(file):
            raise known from error
        if not refused:
            raise AudioError(
                "FFmpeg cannot read it ({words}): no recording, or damaged, or cut off; get it again",
                words=_reason(error),
            ) from error
        raise AudioError(
            "neither libsndfile nor FFmpeg can read it (libsndfile says: {words}): no recording, or damaged, "
            "or cut off; get it again",
            words=_reason(refused),
        ) from error
    with container:
        name, stream = container.format.long_name, container.streams.best("audio")
        if stream is None:
            raise explain_content(file) or AudioError(
                "{name}: there is no sound track in it; give a file with sound", name=name
            )
        if stream.codec_context is None:
            raise AudioError("{name}: FFmpeg lacks its codec; {convert}", name=name, convert=CONVERT)
        codec = stream.codec_context.name
        is_known = (container.format.name, codec) in SNDFILE_FORMATS or codec.startswith(SNDFILE_CODECS)
        if refused and refused.code not in NOT_KNOWN and is_known:
            raise _damaged(name, "libsndfile", refused)
        return _Reader(container, stream, cutter, max_hours).read(file)


class _Reader:
    """Decode one stream with FFmpeg, strictly."""

    def __init__(self, container: Any, stream: Any, cutter: Cutter, max_hours: float) -> None:
        self.container = container
        self.stream = stream
        self.name = f"{container.format.long_name}, {stream.codec_context.name}"
        self.cutter, self.max_hours = cutter, max_hours
        self.packets = self.longest = 0
        # What went wrong in the last packet so far.
        self.problem: object = None

    def read(self, file: BinaryIO) -> Decoded:
        """Decode to the end; an error after which nothing comes any more is a file that was cut off."""
        import av
        from av.codec.context import Flags2

        _check_hours(self._promised(), self.max_hours)
        codec = self.stream.codec_context
        # Errors are reported that FFmpeg would pass over: checksums, broken bit streams, short packets.
        codec.options = {"err_detect": "crccheck+bitstream+buffer+explode"}
        if (self.container.format.name, codec.name) == ("caf", "alac"):
            # FFmpeg 8 cuts the padding of the last frame off twice: 956 samples of 44,100 are lost.
            codec.flags2 |= Flags2.skip_manual
        try:
            for packet in self.container.demux(self.stream):
                self._decode_packet(packet)
        except (av.FFmpegError, OSError, ValueError, LookupError) as error:
            self.problem = error
            # A lack of memory says nothing of the file's end.
            if isinstance(error, MemoryError) or file.tell() < file.seek(0, 2):
                raise _damaged(self.name, "FFmpeg", self.problem) from error
        if self.problem and not self.cutter.length:
            raise _damaged(self.name, "FFmpeg", self.problem)
        promised, present = self._promised(), self.cutter.length / (self.cutter.rate or 1)
        frames = 0 if self.stream.codec_context.name.startswith(LOSSLESS) else DELAY_FRAMES
        tolerance = CLOCK + frames * min(self.longest, DELAY_FRAME) / (self.cutter.rate or 1)
        missing = None
        if self.problem:
            missing = _breaks_off(present, "FFmpeg", self.problem)
        elif present < promised - tolerance and not 0 < self.stream.frames <= self.packets:
            missing = _seconds_missing(promised, present)
        return Decoded(self.name, missing, has_length=promised > 0)

    def _decode_packet(self, packet: Any) -> None:
        """Decode a packet; after a bad one only the empty packet at the end may come."""
        import av

        if self.problem and packet.size:
            raise _damaged(self.name, "FFmpeg", self.problem)
        self.packets += bool(packet.size)
        # FFmpeg marks a packet that the file's end cuts short, and the last one of WAV of unknown length.
        if packet.is_corrupt and self.container.format.name != "wav":
            self.problem = "incomplete packet"
        try:
            for frame in packet.decode():
                if frame.is_corrupt:
                    self.problem = "incomplete frame"
                self.cutter.add(self.name, _floats(frame), frame.sample_rate)
                _check_hours(self.cutter.length / frame.sample_rate, self.max_hours)
                self.longest = max(self.longest, frame.samples)
        except MemoryError:
            raise
        except (av.FFmpegError, OSError, ValueError, LookupError) as error:
            self.problem = error

    def _promised(self) -> float:
        """Return the seconds that the file says it has; 0 if it does not."""
        container, stream = self.container, self.stream
        if container.format.name in STREAM_LENGTH and stream.duration:
            return float(stream.duration * stream.time_base)
        if container.format.name in FILE_LENGTH and container.duration and len(container.streams) == 1:
            return float((container.duration - max(0, container.start_time or 0)) / 1_000_000)
        return 0.0


def _floats(frame: Any) -> Floats:
    """Return an FFmpeg frame as `[channels, n]` between -1 and 1."""
    # numpy arrays are not made of these.
    if frame.format.name.startswith("s64"):
        import av

        (frame,) = av.AudioResampler("dblp").resample(frame)
    # [channels, n] if planar, else [1, n * channels].
    samples = frame.to_ndarray()
    if not frame.format.is_planar:
        samples = samples.reshape(frame.samples, -1).T
    floats: Floats = samples.astype(np.float32)
    if samples.dtype.kind == "u":
        floats -= 128
    if samples.dtype.kind in "iu":
        floats /= np.float32(2 ** (8 * samples.itemsize - 1))
    return floats

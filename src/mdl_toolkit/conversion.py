"""Rows to a converted dataset: decode, resample, tokenise and store, in parallel.

What comes out depends on the rows, the audio, the prompts and the tokenizer, never on the number of
processes. All bad rows are reported together, and then nothing is left behind.
"""

import multiprocessing
import os
import signal
import tempfile
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from mdl_toolkit import __version__
from mdl_toolkit.audio import SAMPLE_RATE, load
from mdl_toolkit.console import progress, say, warn
from mdl_toolkit.dataset import (
    ConvertedDataset,
    PackedAudio,
    Record,
    ShardWriter,
    check_output,
    pack_audio,
)
from mdl_toolkit.download import Downloads
from mdl_toolkit.errors import AudioError, DatasetError, RowProblem, RowsError
from mdl_toolkit.language import Text
from mdl_toolkit.loading import find_model, read_text_files
from mdl_toolkit.manifest import Manifest, Row, is_url, read_manifest
from mdl_toolkit.model.lengths import audio_token_count
from mdl_toolkit.options import ConversionOptions, ConvertOptions
from mdl_toolkit.outputs import check_apart, replacing
from mdl_toolkit.settings import SETTINGS_FILE, to_yaml
from mdl_toolkit.tokens import Encoder, Tokens

FEW_ROWS = 64  # below this, starting processes costs more than they save
MOST_WORKERS = 32
GROUPS_AHEAD = 4  # per worker, under way or waiting for an earlier one
CGROUP = Path("/sys/fs/cgroup")
# Microseconds of CPU time per period of so many: version 2 and version 1 of cgroups.
CPU_QUOTAS = (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"))


def convert_dataset(options: ConvertOptions) -> ConvertedDataset:
    """Convert a CSV into a dataset for training, replacing what is at the output.

    Raises:
        ToolkitError: bad rows (all of them in one message), a bad output folder, no model.
    """
    output = Path(options.output)
    place = output.absolute()  # found again even if it was the current directory
    _check_places(output, options)
    manifest = read_rows(options.input, options, needs_prediction=True)
    _check_recordings(output, manifest)
    folder = find_model(options.model_name, from_modelscope=options.from_modelscope, weights=False)
    with replacing(output) as work:
        record = convert_rows(manifest, work, Encoder(read_text_files(folder)), options)
        (work / SETTINGS_FILE).write_text(to_yaml(options), encoding="utf-8")
    say(
        f"{output}: {record.rows} rows, {record.seconds / 3600:.2f} hours, "
        f"{record.audio_tokens + record.text_tokens} tokens",
        f"{output}：{record.rows} 行，{record.seconds / 3600:.2f} 小时，"
        f"{record.audio_tokens + record.text_tokens} 个词元",
    )
    return ConvertedDataset(place)


def _check_places(output: Path, options: ConvertOptions) -> None:
    check_output(output)
    check_apart(output, Path(options.input))
    if Path(options.model_name).is_dir():
        check_apart(output, Path(options.model_name))


def _check_recordings(output: Path, manifest: Manifest) -> None:
    """Refuse an output with recordings in it: they would go with the dataset that it replaces."""
    folders = {Path(row.audio).parent.resolve() for row in manifest.rows if not is_url(row.audio)}
    for folder in sorted(folders):
        if output.resolve() in (folder, *folder.parents):
            check_apart(output, folder)


def read_rows(
    path: str, options: ConversionOptions, *, needs_prediction: bool, allow_empty: bool = False
) -> Manifest:
    """The rows of a CSV under the options' prompts and base folder."""
    return read_manifest(
        path, base_dir=options.base_dir, system_prompt=options.system_prompt, user_prompt=options.user_prompt,
        needs_prediction=needs_prediction, allow_empty_prediction=options.allow_empty_prediction,
        allow_empty=allow_empty,
    )  # fmt: skip


def convert_rows(
    manifest: Manifest,
    folder: Path,
    encoder: Encoder,
    options: ConversionOptions,
    *,
    with_answer: bool = True,
) -> Record:
    """Write the samples of all rows into an empty folder.

    Args:
        manifest: the rows.
        folder: where the dataset goes.
        encoder: the model's tokenizer and template.
        options: workers, downloads, tolerance for truncated files.
        with_answer: for training; otherwise prompts alone, and no labels.

    Raises:
        RowsError: recordings that cannot be used, all of them.
        DatasetError: a worker process died.
    """
    task = _Task(encoder, options.allow_truncated, with_answer)
    writer, tally = ShardWriter(folder), _Tally(encoder, options)
    problems = [*manifest.problems]
    _warn_early(manifest)
    with (
        _downloads(folder, options) as downloads,
        progress("converting", "转换中", len(manifest.rows)) as shown,
    ):
        groups = _groups(manifest.rows, downloads, options.tokenizing_batch_size, problems)
        with closing(_map(task, groups, _workers(options, len(manifest.rows)))) as mapped:
            for results in mapped:
                for result in results:
                    if isinstance(result, RowProblem):
                        problems.append(result)
                    elif not problems:
                        writer.append(result.tokens, result.audio)
                        tally.add(result)
                shown.advance(len(results))
    if problems:
        raise RowsError(str(manifest.path), problems)
    record = tally.record()
    writer.finish(record)
    tally.warn()
    return record


def _warn_early(manifest: Manifest) -> None:
    """Decoding takes long: who has bad rows already may not want to wait until the others are checked."""
    if manifest.problems and len(manifest.rows) >= FEW_ROWS:
        count = len(manifest.problems)
        warn(
            f"{count} rows cannot be used; checking the recordings of the others before all are reported",
            f"{count} 行无法使用；将检查其余行的音频，然后一并报告",
        )


# --- one row -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Source:
    """A row and the local file that holds its recording."""

    row: Row
    file: str


@dataclass(frozen=True)
class _Converted:
    """A row as it is stored, and what the summary counts."""

    row: Row
    tokens: Tokens
    audio: PackedAudio
    audio_tokens: int
    padded: bool
    silent: bool
    truncated: Text | None


_Results = list[_Converted | RowProblem]


@dataclass(frozen=True)
class _Task:
    """What a worker process does to each group of rows."""

    encoder: Encoder
    allow_truncated: bool
    with_answer: bool

    def __call__(self, group: list[_Source]) -> _Results:
        return [self._convert(source) for source in group]

    def _convert(self, source: _Source) -> _Converted | RowProblem:
        row = source.row
        try:
            clip = load(source.file, allow_truncated=self.allow_truncated)
        except AudioError as problem:
            return RowProblem(row.line, "audio", row.shown, problem.text)
        audio = pack_audio(clip.samples)
        count = audio_token_count(audio.length)
        tokens = self.encoder.encode_row(row, count, with_answer=self.with_answer)
        return _Converted(row, tokens, audio, count, clip.padded, clip.silent, clip.truncated)


# --- all rows ----------------------------------------------------------------------------------------


@contextmanager
def _downloads(folder: Path, options: ConversionOptions) -> Iterator[Downloads]:
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}.downloads-") as place:
        yield Downloads(Path(place), max_mb=options.max_download_mb)


def _groups(
    rows: Iterable[Row], downloads: Downloads, size: int, problems: list[RowProblem]
) -> Iterator[list[_Source]]:
    """Rows in groups that are sent to a worker together; what cannot be fetched goes to `problems`."""
    group: list[_Source] = []
    for row in rows:
        try:
            file = str(downloads.path_of(row.audio)) if is_url(row.audio) else row.audio
        except AudioError as problem:
            problems.append(RowProblem(row.line, "audio", row.shown, problem.text))
            continue
        group.append(_Source(row, file))
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def _workers(options: ConversionOptions, rows: int) -> int:
    return 1 if rows < FEW_ROWS else options.num_workers or default_workers()


def default_workers() -> int:
    """Half the CPUs that this process may use, at least 1, at most 32 (rule 20)."""
    return max(1, min(MOST_WORKERS, available_cpus() // 2))


def available_cpus() -> int:
    """CPUs that this process may use: by affinity and by cgroup quota."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([count, *_granted()]))


def _granted() -> Iterator[int]:
    """CPUs that this container's cgroup grants, if there is a limit."""
    for files in CPU_QUOTAS:
        with suppress(OSError, ValueError):  # no such file, or the word `max`
            text = " ".join((CGROUP / file).read_text(encoding="ascii") for file in files)
            quota, period = map(int, text.split())
            if quota > 0:
                yield quota // period


def _map(task: _Task, groups: Iterator[list[_Source]], workers: int) -> Generator[_Results, None, None]:
    """Results in the order of the groups."""
    if workers == 1:
        yield from map(task, groups)
        return
    pool = _Pool(task, workers)
    try:
        yield from pool.map(groups)
    finally:
        pool.close()


class _Pool:
    """Worker processes, each at a pipe of its own.

    When a process is killed its pipe ends, even in the middle of an answer. (With the shared queue of
    `ProcessPoolExecutor` the parent would then wait for the other half for ever.)
    """

    def __init__(self, task: _Task, count: int) -> None:
        context = multiprocessing.get_context("spawn")  # forked children of a process with threads may hang
        self._pipes: list[Any] = []
        self._processes: list[Any] = []
        for _ in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(task, theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def map(self, groups: Iterator[list[_Source]]) -> Iterator[_Results]:
        """Results in the order of the groups; only a few groups per worker are under way at once.

        Raises:
            DatasetError: a worker process died.
        """
        numbered, most = enumerate(groups), GROUPS_AHEAD * len(self._pipes)
        idle, busy, done = [*self._pipes], dict[Any, int](), dict[int, _Results]()
        wanted = 0
        while True:
            while idle and len(busy) + len(done) < most and (job := next(numbered, None)):
                pipe = idle.pop()
                busy[pipe], group = job
                _through(pipe.send, group)
            if wanted in done:
                yield done.pop(wanted)
                wanted += 1
            elif busy:
                ready: list[Any] = wait([*busy])
                for pipe in ready:
                    done[busy.pop(pipe)] = _through(pipe.recv)
                    idle.append(pipe)
            else:
                return

    def close(self) -> None:
        """End all processes, whatever they are at."""
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            pipe.close()
            process.terminate()
            process.join()


def _through(use_pipe: Callable[..., Any], *words: Any) -> Any:
    try:
        answer = use_pipe(*words)
    except (EOFError, OSError) as problem:
        raise DatasetError(
            "a worker process was ended by the system (out of memory?); try a smaller --num-workers",
            "工作进程被系统终止（内存不足？）；请减小 --num-workers",
        ) from problem
    if isinstance(answer, Exception):
        raise answer
    return answer


def _serve(task: _Task, pipe: Any) -> None:
    """What a worker process does, until the parent closes the pipe or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is interrupted too, and ends this process
    with suppress(EOFError, OSError):
        while True:
            group = pipe.recv()
            try:
                answer: _Results | Exception = task(group)
            except Exception as problem:  # noqa: BLE001 - the parent raises it
                answer = problem
            pipe.send(answer)


class _Tally:
    """What the record and the summary say of all rows together."""

    def __init__(self, encoder: Encoder, options: ConversionOptions) -> None:
        self._record = Record(
            encoder.files.tokenizer_fingerprint, encoder.files.template_fingerprint,
            options.system_prompt, options.user_prompt, toolkit=__version__,
        )  # fmt: skip
        self._samples = 0
        self._truncated: list[tuple[Row, Text]] = []

    def add(self, result: _Converted) -> None:
        """Count one row."""
        old = self._record
        self._samples += result.audio.length
        self._record = replace(
            old,
            rows=old.rows + 1,
            text_tokens=old.text_tokens + len(result.tokens.input_ids) - result.audio_tokens,
            audio_tokens=old.audio_tokens + result.audio_tokens,
            padded=old.padded + result.padded,
            silent=old.silent + result.silent,
        )
        if result.truncated is not None:
            self._truncated.append((result.row, result.truncated))

    def record(self) -> Record:
        """The dataset's record."""
        return replace(self._record, seconds=self._samples / SAMPLE_RATE)

    def warn(self) -> None:
        """Say what a user should know of the recordings."""
        for row, text in self._truncated:
            warn(
                f"line {row.line}: {row.shown}: {text.en}",
                f"第 {row.line} 行：{row.shown}：{text.zh}",
            )
        if self._record.padded:
            warn(
                f"{self._record.padded} clips are shorter than 0.2 s and were padded to one audio token",
                f"{self._record.padded} 个音频短于 0.2 秒，已补零至一个音频词元",
            )
        if self._record.silent:
            warn(f"{self._record.silent} clips are silent", f"{self._record.silent} 个音频是静音")

"""The figures of `check` in words, line by line, in both languages."""

import unicodedata
from collections.abc import Iterator

from mdl_toolkit.data.check.findings import Figures
from mdl_toolkit.errors import RowProblem, RowsError
from mdl_toolkit.i18n import Text

MOST_NAMED = 10  # lines, or pairs of prompts, of a finding
BAR = 40  # columns of the longest bar
LEARNT = ("\x1b[1;32m", "\x1b[0m")  # around what is learnt: bold green in a terminal ...
BRACKETS = ("[[", "]]")  # ... and brackets elsewhere

ROLES = {
    "training": Text("training", "训练"),
    "evaluation": Text("evaluation", "评估"),
    "inference": Text("inference", "推理"),
}
FINDINGS = {
    "silent": Text("silent", "静音"),
    "nearly_empty": Text(
        "nearly empty, less than 5 % of it above -50 dBFS", "几乎无声，高于 -50 dBFS 的部分不足 5%"
    ),
    "clipped": Text(
        "clipped, recorded too loud (share of samples at full scale)", "削波，录音过载（满幅采样的比例）"
    ),
    "padded": Text("shorter than 0.2 s, padded to one audio token", "短于 0.2 秒，补零至一个音频词元"),
    "truncated": Text("cut off, accepted by --allow-truncated", "不完整，因 --allow-truncated 而接受"),
    "empty_answer": Text("answer is empty", "回答为空"),
    "number_answer": Text(
        "answer is a number or a date that a spreadsheet would rewrite (0012, 1.0)",
        "回答为电子表格会改写的数字或日期（如 0012、1.0）",
    ),
    "space_answer": Text("white space around the answer", "回答首尾有空白"),
    "space_prompt": Text("white space around a prompt", "提示词首尾有空白"),
    "too_long": Text("longer than --max-length (its length)", "超过 --max-length（其长度）"),
    "duplicate": Text(
        "recording, prompt and answer of an earlier row again", "音频、提示词和回答与前面的行相同"
    ),
    "other_prompt": Text(
        "recording of an earlier row under another prompt", "音频与前面的行相同，提示词不同"
    ),
    "contradiction": Text(
        "recording and prompt of an earlier row with another answer: is one mislabelled?",
        "音频和提示词与前面的行相同，回答却不同：是否标注有误？",
    ),
    "identical_answers": Text(
        "all rows have one answer, so there is nothing else to learn", "所有行的回答都相同，学不到其他内容"
    ),
    "unbalanced": Text(
        "one answer has ten times the rows of another (rows of the most frequent)",
        "某个回答的行数达到另一个的十倍（最多者的行数）",
    ),
    "leak": Text(
        "recording, prompt and answer are also trained on (= line there)",
        "音频、提示词和回答同时出现在训练文件中（= 其行号）",
    ),
    "leak_other_text": Text(
        "recording is also trained on, with another prompt or answer (= line there)",
        "音频同时出现在训练文件中，提示词或回答不同（= 其行号）",
    ),
    "same_text": Text(
        "answer is also trained on, with another recording", "回答也出现在训练集中（音频不同）"
    ),
    "near_prompts": Text("prompts that differ in one letter", "仅差一个字符的提示词"),
}
DETAILS = {"clipped": " ({:.1%})", "too_long": " ({})"}  # of a row, behind its line
OTHER_LINE = " (= {})"  # for all others


def report_lines(figures: Figures, *, coloured: bool) -> Iterator[Text]:
    """The report; what is learnt is coloured, or in brackets."""
    for file in figures["files"]:
        yield from _file_lines(file, figures["counted"])
    if figures["sample"]:
        yield from _sample_lines(figures["sample"], LEARNT if coloured else BRACKETS)
    if figures["training"]:
        yield from _training_lines(figures["training"])
    if fixed := figures["fixed"]:
        yield _fixed_line(**fixed)


def _fixed_line(path: str, rows: int, left_out: int) -> Text:
    if not rows:
        return Text(f"{path}: not written, as no row can be used", f"{path}：没有可用的行，未写入")
    return Text(
        f"{path}: {rows:,} rows written, {left_out:,} left out",
        f"{path}：写入 {rows:,} 行，去掉 {left_out:,} 行",
    )


# --- one file ------------------------------------------------------------------------------------------


def _file_lines(file: Figures, counted: str) -> Iterator[Text]:
    role, hours = ROLES[file["role"]], file["seconds"] / 3600
    yield Text(
        f"{file['path']} ({role.en}): {file['rows']:,} rows, {hours:,.3f} hours",
        f"{file['path']}（{role.zh}）：{file['rows']:,} 行，{hours:,.3f} 小时",
    )
    if file["rows"]:
        yield from _amount_lines(file, counted)
    for each in file["findings"]:
        yield from _finding_lines(each)
    bad = file["bad"]
    if bad["rows"]:
        yield _bad_rows(file["path"], bad)


def _amount_lines(file: Figures, counted: str) -> Iterator[Text]:
    rates, channels, formats = (_counts(file[name]) for name in ("rates", "channels", "formats"))
    yield Text(
        f"  recordings: {rates} Hz; channels: {channels}; formats: {formats}",
        f"  音频：采样率（Hz）{rates}；声道数 {channels}；格式 {formats}",
    )
    yield from _histogram_lines(file["lengths"])
    audio, text = _spread(file["audio_tokens"]), _spread(file["text"])
    unit = Text("tokens", "词元") if counted == "tokens" else Text("characters", "字符")
    yield Text(f"  audio tokens of a row: {audio.en}", f"  每行的音频词元数：{audio.zh}")
    yield Text(f"  text {unit.en} of a row: {text.en}", f"  每行的文本{unit.zh}数：{text.zh}")
    size = f"{file['disk_bytes'] / 1e6:,.1f} MB"
    yield Text(f"  on disk after conversion: {size}", f"  转换后的磁盘占用：{size}")
    if answers := file.get("answers"):
        yield from _answer_lines(answers)


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{value} x {rows:,}" for value, rows in counts.items())


def _spread(values: Figures) -> Text:
    median, p95, most = (f"{values[name]:,}" for name in ("median", "p95", "max"))
    return Text(
        f"median {median}, 95 % up to {p95}, longest {most}",
        f"中位数 {median}，95% 不超过 {p95}，最长 {most}",
    )


def _histogram_lines(lengths: Figures) -> Iterator[Text]:
    """A bar for each range that has rows, in seconds."""
    shortest, longest = (f"{lengths[name]:.2f}" for name in ("shortest", "longest"))
    yield Text(f"  length: {shortest} s to {longest} s", f"  时长：{shortest} 秒至 {longest} 秒")
    most = max(lengths["rows"])
    below: float = 0
    for edge, rows in zip(lengths["below_seconds"], lengths["rows"], strict=True):
        label = f"{below:g} s -" if edge is None else f"{below:g} - {edge:g} s"
        if rows:
            bar = f"    {label:>12} {rows:>9,}  {'#' * max(1, round(BAR * rows / most))}"
            yield Text(bar, bar)
        below = edge or below


def _answer_lines(answers: Figures) -> Iterator[Text]:
    classes = ", ".join(f"{_shown(text)} x {rows:,}" for text, rows in answers["classes"])
    yield Text(
        f"  different answers: {answers['distinct']:,}" + (f" ({classes})" if classes else ""),
        f"  不同的回答：{answers['distinct']:,} 种" + (f"（{classes}）" if classes else ""),
    )


def _finding_lines(found: Figures) -> Iterator[Text]:
    words, named, rows = FINDINGS[found["name"]], _named(found), f"{found['rows']:,}"
    yield Text(
        f"  warning: {words.en}: {rows}" + (f", line {named}" if named else ""),
        f"  警告：{words.zh}：{rows} 行" + (f"，第 {named} 行" if named else ""),
    )
    for pair in found.get("pairs", ())[:MOST_NAMED]:
        one, other = (
            Text(
                f"{_shown(text)} ({rows:,} from line {line})",
                f"{_shown(text)}（{rows:,} 行，始于第 {line} 行）",
            )
            for text, rows, line in zip(pair["prompts"], pair["rows"], pair["lines"], strict=True)
        )
        yield Text(f"    {one.en}, {other.en}", f"    {one.zh}，{other.zh}")


def _named(found: Figures) -> str:
    """The first lines of a finding, each with its figure."""
    lines, form = found.get("lines", [])[:MOST_NAMED], DETAILS.get(found["name"], OTHER_LINE)
    details = [form.format(value) for value in found.get("details", [])] or [""] * len(lines)
    shown = ", ".join(f"{line}{detail}" for line, detail in zip(lines, details, strict=False))
    return f"{shown}, ..." if found["rows"] > len(lines) > 0 else shown


def _bad_rows(path: str, bad: Figures) -> Text:
    problems = [*map(RowProblem.from_json, bad["first"])]
    return RowsError(path, problems, bad["problems"]).text


def _shown(text: str, most: int = 60) -> str:
    """A text from a CSV in quotes, shortened, and harmless in a terminal."""
    return repr(text if len(text) <= most else text[: most - 1] + "…")


# --- a row, and what a training takes ------------------------------------------------------------------


def _sample_lines(sample: Figures, marks: tuple[str, str]) -> Iterator[Text]:
    begin, end = marks
    yield Text(
        f"line {sample['line']} as the model sees it ({begin}learnt{end}):",
        f"模型看到的第 {sample['line']} 行（{begin}学习内容{end}）：",
    )
    pieces, is_open = "", False
    for segment in sample["segments"]:
        is_answer = segment["kind"] == "answer"
        pieces += (begin if is_answer and not is_open else "") + (end if is_open and not is_answer else "")
        pieces += _harmless(segment["text"])
        is_open = is_answer
    shown = "\n".join(f"  {line}" for line in (pieces + end * is_open).splitlines())
    yield Text(shown, shown)


def _harmless(text: str) -> str:
    """A text without the control characters by which it could do something to a terminal."""
    return "".join(
        letter if letter in "\n\t" or unicodedata.category(letter)[0] != "C" else repr(letter)[1:-1]
        for letter in text
    )


def _training_lines(training: Figures) -> Iterator[Text]:
    if problem := training.get("problem"):
        yield Text(**problem)
        return
    yield Text(
        f"a training on a GPU in {training['dtype']}:",
        f"在 GPU 上以 {training['dtype']} 训练：",
    )
    for line in training["memory"]:
        yield Text(f"  {line['en']}", f"  {line['zh']}")
    if warning := training["warning"]:
        yield Text(f"  warning: {warning['en']}", f"  警告：{warning['zh']}")
    epochs = f"{training['epochs']:g}"
    steps, each, batch = (f"{training[name]:,}" for name in ("steps", "steps_per_epoch", "effective_batch"))
    yield Text(
        f"  steps: {steps} in {epochs} epochs of {each}, effective batch {batch} on one GPU",
        f"  步数：{epochs} 轮共 {steps} 步，每轮 {each} 步，单 GPU 有效批次 {batch}",
    )
    done = training["operations"]
    amount, hours = f"{done / 1e12:,.4g}", f"{done / (100e12 * 3600):.3g}"
    yield Text(
        f"  time: {amount} TFLOP in matrix products, {hours} hours for a GPU that sustains 100 TFLOP/s; "
        "how fast yours is, `train` says after three steps",
        f"  时间：矩阵乘法共 {amount} TFLOP，持续 100 TFLOP/s 的 GPU 需要 {hours} 小时；"
        "实际速度由 train 在三步之后给出",
    )

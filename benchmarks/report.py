"""From the newest records to the README and docs/benchmarks.md, between two markers, and to pictures."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from benchmarks.real import draw_real, read_real, real_table
from benchmarks.records import Device, Measured, read_devices
from benchmarks.tables import NOT_MEASURED, backend_table, goal_table, kernel_table, main_table, step_tables
from benchmarks.tasks import tasks_page

BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
REAL_BEGIN, REAL_END = "<!-- real:begin -->", "<!-- real:end -->"
TASKS_BEGIN, TASKS_END = "<!-- tasks:begin -->", "<!-- tasks:end -->"
NO_GPU = "GPU"
_EXPLANATION = (
    "x PEFT: median over interleaved rounds of PEFT's step time / the variant's. Token limit: how many times "
    "fewer FLOP the linear layers have without repeated prompts, pads and unlabelled head rows; attention, "
    "vector operations and PEFT's work on its logits are not in it, so more than 1 of the limit is possible. "
    "Floor: max(FLOP / peak, bytes of the weights / bandwidth), both measured in the same run. Peak memory: "
    "bytes that torch's allocator gave out in one forward and backward; on a GPU, private pools of CUDA "
    "graphs count as a whole."
)


class ReportError(RuntimeError):
    """A page cannot take the tables."""


def report(
    results: Path | Sequence[Path], readme: Path, docs: Path | None = None, tasks: Path | None = None
) -> list[Path]:
    """Writes the main tables into the README, all tables into the pages of the docs, and the pictures.

    Args:
        results: folders with one folder of records a device.
        readme: file with the two markers; what stands between them is replaced.
        docs: the same for all tables; None: left out.
        tasks: the same for the accuracies on real tables; None: left out.

    Returns:
        The files written.

    Raises:
        ReportError: a file or its markers are missing.
    """
    pages = [page for page in (readme, docs) if page is not None]
    for page in pages:
        _check(page)
    if tasks is not None:
        _check(tasks, TASKS_BEGIN, TASKS_END)
        pages.append(tasks)
    folders = [results] if isinstance(results, Path) else results
    real = _report_real(folders, readme)
    devices = read_devices(folders)
    pictures = {id(device): _pictures(device) for device in devices}
    measured_gpu = any(device.kind == "cuda" and not device.tiny for device in devices)
    blocks = [*devices, *([] if measured_gpu else [None])]
    more = None if docs is None else f"All variants, targets, kernels and conditions: [{docs.name}](%s)."

    def main(device: Device | None, page: Path) -> str:
        what = "Not measured." if device is None else main_table(device)
        return "\n\n".join([*_head(device, pictures, page, kernels=False), what])

    def full(device: Device | None, page: Path) -> str:
        parts = [*_head(device, pictures, page), "Targets:", goal_table(device), *step_tables(device)]
        if device is None or device.kind == "cuda" or device.kernels:
            parts.append(kernel_table(device))
            if device is not None and device.kernels:
                parts += ['What `backend="auto"` takes, and what was the fastest:', backend_table(device)]
        if device is not None:
            parts.append("\n".join(_legend(found) for found in (*device.steps, *_first(device.kernels))))
        return "\n\n".join(parts)

    _write(
        readme,
        [main(device, readme) for device in blocks] + ([] if more is None else [more % _link(docs, readme)]),
    )
    if docs is not None:
        _write(docs, [*(full(device, docs) for device in blocks), _EXPLANATION])
    if tasks is not None:
        _write(tasks, tasks_page(folders) or [f"{NOT_MEASURED.capitalize()} yet."], TASKS_BEGIN, TASKS_END)
    return [*(path for drawn in pictures.values() for path in drawn), *real, *pages]


def _report_real(folders: Sequence[Path], readme: Path) -> list[Path]:
    """Writes what the newest record of a real model says, where there is one and the README has its place."""
    found = read_real(folders)
    if found is None or REAL_BEGIN not in readme.read_text(encoding="utf-8"):
        return []
    folder, record = found
    picture = draw_real(record, folder / "real.png")
    link = f"![a real model, beside PEFT]({_link(picture, readme)})"
    _write(readme, [link, real_table(record)], REAL_BEGIN, REAL_END)
    return [picture]


def _check(page: Path, begin: str = BEGIN, end: str = END) -> None:
    if not page.is_file():
        raise ReportError(f"{page} is not there")
    text = page.read_text(encoding="utf-8")
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ReportError(f"{page} must have one {begin} and after it one {end}: the tables go between them")


def _pictures(device: Device) -> list[Path]:
    try:
        from benchmarks.charts import draw_kernels, draw_memory, draw_times
    except ModuleNotFoundError as error:
        print(f"no pictures: {error.name} is not installed")
        return []
    drawn = (
        draw_times(device.steps, device.folder / "time.png"),
        draw_memory(device.steps, device.folder / "memory.png"),
        draw_kernels(device.kernels, device.folder / "kernels.png"),
    )
    return [path for path in drawn if path is not None]


def _head(
    device: Device | None, pictures: dict[int, list[Path]], page: Path, *, kernels: bool = True
) -> list[str]:
    """Title and pictures; that of the kernels is long, and stands where their table stands."""
    if device is None:
        return [f"### {NO_GPU}"]
    shown = [path for path in pictures[id(device)] if kernels or path.stem != "kernels"]
    links = [f"![{path.stem}]({_link(path, page)})" for path in shown]
    return [f"### {device.title}", *links]


def _link(path: Path | None, page: Path) -> str:
    return "" if path is None else Path(os.path.relpath(path, page.parent)).as_posix()


def _write(page: Path, parts: Sequence[str], begin: str = BEGIN, end: str = END) -> None:
    head, rest = page.read_text(encoding="utf-8").split(begin)
    tail = rest.split(end)[1]
    partial = page.with_name(f".{page.name}.partial")
    body = "\n\n".join(part for part in parts if part)
    partial.write_text(f"{head}{begin}\n{body}\n{end}{tail}", encoding="utf-8")
    os.replace(partial, page)


def _first(found: Sequence[Measured]) -> Sequence[Measured]:
    return found[:1]


def _legend(found: Measured) -> str:
    case, record = found.case, found.record
    versions, device = record["versions"], record["device"]
    packages = ", ".join(f"{name} {version}" for name, version in versions.items() if name != "softprompt")
    threads = f", {device['threads']} threads" if "threads" in device else ""
    ceilings = case.get("ceilings") or record.get("ceilings")
    measured = (
        ""
        if ceilings is None
        else f"; {ceilings['flop_per_second'] / 1e9:,.0f} GFLOP/s and "
        f"{ceilings['bytes_per_second'] / 1e9:,.0f} GB/s"
    )
    where = f"{record['date'][:10]}, commit {record['commit']}, {packages}{threads}{measured}."
    if "kernels" in record:
        return f"- kernels: {record['dtype']}. {where}"
    if "batch" not in case:
        return f"- {case['name']}: {case['why']}. Not run: {case['reason']}. {where}"
    batch = case["batch"]
    truth = case.get("truth")
    compared = f" compared with {truth['source']};" if truth else ""
    return (
        f"- {case['name']}: {case['why']}. {case['shape']['name']}, {case['dtype']}, random weights; "
        f"{case['rows']} rows of {batch['padded_length']} with {sum(batch['lengths'])} text tokens "
        f"({batch['length_source']}) and {batch['labels']} labels, P = {case['num_virtual_tokens']};"
        f"{compared} {case['rounds']} rounds. {where}"
    )

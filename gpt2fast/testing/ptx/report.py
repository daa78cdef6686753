"""The launches of a machine as text: a paragraph for each launch, with its errors first."""

import functools

from .launches import Launch
from .machines import Machine


def text(machine: Machine) -> str:
    return "\n\n".join(_launch(i, launch) for i, launch in enumerate(machine.launches)) or "no launches"


def sectors_per_request(counters: dict[str, int], kind: str) -> tuple[float, float]:
    """The number of 32-byte sectors per warp request of global ``load``, ``store`` or ``atomic``, and the ideal."""
    requests = counters.get(f"global_{kind}_requests", 0) or 1
    return (
        counters.get(f"global_{kind}_sectors", 0) / requests,
        counters.get(f"global_{kind}_ideal_sectors", 0) / requests,
    )


def _launch(index: int, launch: Launch) -> str:
    counters = launch.counters
    title = f"[{index}] {launch.name} grid {launch.grid} block {launch.block}, {launch.shared} bytes dynamic shared"
    lines = [title, *(f"  {error}" for error in launch.errors)]
    if (more := launch.error_count - sum(error.count for error in launch.errors)) > 0:
        lines.append(f"  and {more} more")
    lines += [f"  note: {note}" for note in launch.notes]
    count = functools.partial(_count, counters)
    lines.append(f"  {count('thread_instructions')} thread instructions, {count('warp_instructions')} of warps")
    lines.append(f"  {count('divergent_branches')} divergent branches, {count('barriers')} barriers")
    for kind in ("load", "store", "atomic"):
        if requests := counters.get(f"global_{kind}_requests", 0):
            moved, ideal = sectors_per_request(counters, kind)
            lines.append(
                f"  global {kind}: {counters[f'global_{kind}_bytes']:,} bytes in {requests:,} requests, "
                f"{moved:.2f} sectors a request, ideal {ideal:.2f}"
            )
    for kind in ("load", "store"):
        if requests := counters.get(f"shared_{kind}_requests", 0):
            extra = counters.get(f"shared_{kind}_bank_conflicts", 0)
            wavefronts = counters.get(f"shared_{kind}_wavefronts", 0)
            lines.append(f"  shared {kind}: {wavefronts:,} wavefronts in {requests:,} requests, {extra:,} by conflicts")
    if flops := counters.get("tensor_flops", 0):
        lines.append(f"  tensor cores: {flops:,} operations")
    for name, moved in launch.per_buffer.items():
        if moved.get("read_bytes") or moved.get("written_bytes"):
            lines.append(f"  {name}: {moved['read_bytes']:,} bytes read, {moved['written_bytes']:,} written")
    lines += [f"  {source}: {text}" for source, text in launch.inefficient().items()]
    return "\n".join(lines)


def _count(counters: dict[str, int], name: str) -> str:
    return f"{counters.get(name, 0):,}"

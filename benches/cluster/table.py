"""The result as one table: a line for each scenario and cluster size, medians and the worst of the repetitions."""

from __future__ import annotations

import statistics

HEAD = ["scenario", "N", "runs", "origin", "worst", "failed", "timed", "bound s", "last s", "÷ bound", "worst", "idle", "stall ms", "chunks", "in order"]

IDLE_WANTED = 0.2
"""With less of the machine's CPU time to spare, what a run took is not what its links allow."""


def is_timed(row: dict) -> bool:
    """Whether the run says how long things take. What it says of the origin and of failures counts in any case."""
    return row["idle"] >= IDLE_WANTED


def of(result: dict) -> str:
    chunk_ms = {link["nodes"]: result["chunk_bytes"] * 8e-3 / link["quic_mbit"] for link in result["links"]}
    rows = [_row(name, nodes, runs, chunk_ms[nodes]) for (name, nodes), runs in grouped(result["rows"]).items()]
    widths = [max(len(row[column]) for row in [HEAD, *rows]) for column in range(len(HEAD))]
    lines = [
        "  ".join(cell.ljust(width) if column == 0 else cell.rjust(width) for column, (cell, width) in pairs)
        for pairs in (enumerate(zip(row, widths, strict=True)) for row in [HEAD, *rows])
    ]
    return "\n".join([*_notes(result), "", *lines])


def grouped(rows: list[dict]) -> dict[tuple[str, int], list[dict]]:
    groups: dict[tuple[str, int], list[dict]] = {}
    for row in rows:
        groups.setdefault((row["scenario"], row["nodes"]), []).append(row)
    return groups


def _row(name: str, nodes: int, runs: list[dict], chunk_ms: float) -> list[str]:
    origin, timed = [run["origin_ratio"] for run in runs], [run for run in runs if is_timed(run)]
    counted = [str(len(runs)), f"{statistics.median(origin):.4f}", f"{max(origin):.4f}"]
    failed = str(sum(len(run["failures"]) for run in runs))
    return [name, str(nodes), *counted, failed, str(len(timed)), *(_times(timed, chunk_ms) if timed else ["-"] * 8)]


def _times(runs: list[dict], chunk_ms: float) -> list[str]:
    """`chunk_ms` is what a link needs for a chunk: a stall in this unit says what it would be on other links."""
    stall_ms = statistics.median(run["longest_stall_ms"] for run in runs)
    over = [run["over_bound"] for run in runs]
    later = [run["in_order_later"] for run in runs if run["in_order_later"] is not None]
    return [
        f"{statistics.median(run['bound_s'] for run in runs):.2f}",
        f"{statistics.median(run['last_s'] for run in runs):.2f}",
        f"{statistics.median(over):.3f}",
        f"{max(over):.3f}",
        f"{min(run['idle'] for run in runs):.0%}",
        f"{stall_ms:.0f}",
        f"{stall_ms / chunk_ms:.0f}",
        f"{statistics.median(later):+.1%}" if later else "-",
    ]


def _notes(result: dict) -> list[str]:
    mib, kib = result["size"] >> 20, result["chunk_bytes"] >> 10
    lines = [f"{mib} MiB in chunks of {kib} KiB; {result['machine']}"]
    timed = sum(is_timed(row) for row in result["rows"])
    lines.append(
        f"{len(result['rows'])} runs, all of which count for what the origin sent and for failures; times are those of "
        f"the {timed} with at least {IDLE_WANTED:.0%} of the CPUs idle, idle the least of them; a stall's chunks are the "
        f"times that a link needs for one"
    )
    for link in result["links"]:
        lines.append(
            f"N={link['nodes']}: links of {link['set_mbit']:g} Mbit/s carry {link['tcp_mbit']:.1f} (TCP) and "
            f"{link['quic_mbit']:.1f} (QUIC); the origin's {link['origin_set_mbit']:g} to a node carry {link['origin_mbit']:.1f}"
        )
    if first := result["first_bytes"]:
        lines.append(
            f"first byte: {first['direct_ms']:.1f} ms from the origin, {first['mirror_ms']:.1f} cold through the mirror "
            f"(median of the differences {first['more_ms']:+.1f}), {first['peer_ms']:.1f} from a peer; of one piece from a "
            f"peer {first['peer_round_trips']:.1f} round trips ({first['peer_round_trips_least']:.1f} at best)"
        )
    return lines

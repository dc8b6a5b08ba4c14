"""The result as one table: a line for each scenario and cluster size, medians and the worst of the repetitions."""

from __future__ import annotations

import statistics

HEAD = ["scenario", "N", "runs", "bound s", "last s", "÷ bound", "worst", "origin", "worst", "idle", "stall ms", "in order", "failed"]


def of(result: dict) -> str:
    rows = [_row(name, nodes, runs) for (name, nodes), runs in grouped(result["rows"]).items()]
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


def _row(name: str, nodes: int, runs: list[dict]) -> list[str]:
    over, origin = [run["over_bound"] for run in runs], [run["origin_ratio"] for run in runs]
    later = [run["in_order_later"] for run in runs if run["in_order_later"] is not None]
    idle = min(run["idle"] for run in runs)
    return [
        name,
        str(nodes),
        str(len(runs)),
        f"{statistics.median(run['bound_s'] for run in runs):.2f}",
        f"{statistics.median(run['last_s'] for run in runs):.2f}",
        f"{statistics.median(over):.3f}",
        f"{max(over):.3f}",
        f"{statistics.median(origin):.4f}",
        f"{max(origin):.4f}",
        f"{idle:.0%}" + ("" if idle >= 0.2 else "!"),
        f"{statistics.median(run['longest_stall_ms'] for run in runs):.0f}",
        f"{statistics.median(later):+.1%}" if later else "",
        str(sum(len(run["failures"]) for run in runs)),
    ]


def _notes(result: dict) -> list[str]:
    mib, kib = result["size"] >> 20, result["chunk_bytes"] >> 10
    lines = [f"{mib} MiB in chunks of {kib} KiB; {result['machine']}; idle is the least of the runs, ! below 20 %"]
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

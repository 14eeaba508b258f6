"""What ran, in words: the figures at the head of a report and the lines at its foot. Owns: which they are.
Must not know: SQL, markup.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pipeline.insight.cards import count_text, visible
from pipeline.insight.questions import Answer

_FOUND_NAMES = 12
#: Keys of a record's `limits`, in the order in which an image meets them.
_STAGES = {
    "start": "starting", "none": "nothing measured", "list": "listing", "fetch": "fetch", "decode": "decode",
    "model": "model", "encode": "encode", "write": "writing Parts", "cores": "all on the CPU's cores",
}  # fmt: skip


def headline(
    totals: Mapping[str, Any], record: Mapping[str, Any], limit: tuple[str, str] | None
) -> list[tuple[str, str, str]]:
    """The figures at the top: (value, what it is, a remark)."""
    plan = record["plan"]
    rate = totals["errors"] / totals["images"] if totals["images"] else 0.0
    found = [
        (f"{totals['images']:,}", "images", f"of {plan['counts']['images']:,} in the corpus"),
        (f"{totals['errors']:,}", "errors", f"{rate:.2%}" if totals["errors"] else "none"),
    ]
    if totals["task"] == "instance":
        found.append((f"{totals['objects']:,}", "objects", f"{totals['objects'] / max(1, totals['ok']):,.1f} an image"))
    if totals["confidence"] is not None:
        found.append((f"{totals['confidence']:.3f}", "mean confidence", f"from {totals['least_confidence']:.3f}"))
    if totals["foreground"] is not None and plan["card"].get("background_id") is not None:
        found.append((f"{totals['foreground']:.0%}", "foreground", "mean share of an image"))
    if record.get("seconds"):
        found.append((f"{record['images_per_s']:,.1f}", "images a second", f"{record['seconds']:,.1f} s of work"))
    if limit:
        found.append((limit[0], "bound by", limit[1]))
    return found


def bound(record: Mapping[str, Any]) -> tuple[str, str] | None:
    """(What bounds the run, why), as its record says; None where that says nothing."""
    limits = record.get("limits")
    return (_STAGES.get(limits["bound_by"], limits["bound_by"]), limits["why"]) if limits else None


class Stage(NamedTuple):
    """A line of the table of limits: shares as text, and of the ceiling as a number, None where there is none."""

    name: str
    time: str
    ceiling: str
    reached: str
    share: float | None


def limits(record: Mapping[str, Any]) -> list[Stage]:
    """The stages of a run beside their ceilings, in the order in which an image meets them."""
    found = record.get("limits") or {"time": {}, "reached": {}, "ceilings": {}}
    lines = []
    for stage, name in _STAGES.items():
        time, share, ceiling = (found[key].get(stage) for key in ("time", "reached", "ceilings"))
        if time is None and share is None:
            continue
        lines.append(
            Stage(
                name,
                "" if time is None else f"{time:.1%}",
                "" if ceiling is None else f"{ceiling:,.1f}",
                "" if share is None else f"{share:.1%}",
                share,
            )
        )
    return lines


def limits_note(record: Mapping[str, Any]) -> str:
    """Of which machine the ceilings are, or why there are none."""
    measured = (record.get("limits") or {}).get("measured", "")
    if measured.startswith("not compared"):
        return visible(f"{measured[0].upper()}{measured[1:]}.")
    return visible(f"Ceilings of {measured}.") if measured else "No ceilings were given."


def facts(totals: Mapping[str, Any], record: Mapping[str, Any], formats: Answer) -> list[tuple[str, str]]:
    """What ran, line by line."""
    plan: Mapping[str, Any] = record["plan"]
    counts = plan["counts"]
    parts = [f"{counts[name]:,} {words}" for name, words in (
        ("new", "new"), ("changed", "changed"), ("failed_before", "failed before"), ("repeated", "done once more"),
        ("done", "done before"), ("held", "held by other runs"),
    ) if counts.get(name)]  # fmt: skip
    kinds = [f"{one['images']:,} {one['image_format']}" for one in formats.records()]
    lines = [
        ("Corpus", visible(plan["command"]["source"])),
        ("Its images", f"{counts['images']:,}: {', '.join(parts)}" if parts else f"{counts['images']:,}"),
        ("Formats", ", ".join(kinds)),
        ("Median size", f"{totals['median_megapixels']:.2f} megapixels" if totals["median_megapixels"] else ""),
        ("Model", f"{plan['model_name']} {plan['model_version']}"),
        ("Architecture", visible(str(plan["card"].get("architecture", "")))),
        ("Trained on", _trained(plan["card"])),
        ("Measured", _measured(plan["card"], plan["precision"])),
        ("Settings", f"{plan['settings_digest']}, {plan['precision']}"),
        ("Batches", f"{plan['batch_size']} images, {count_text(plan['threads'], 'thread')} a worker"),
        ("Workers", _workers(record.get("workers") or [])),
        ("Began", plan["created_at"][:19].replace("T", " ") + " UTC"),
        ("Ended", record["closed_at"][:19].replace("T", " ") + " UTC" if "closed_at" in record else "still open"),
        ("Table", f"{count_text(record['parts'], 'Part')}, {record['parts_bytes'] / 1e6:,.2f} MB"
         if "parts" in record else ""),
        ("Filed under", plan["run_date"]),
    ]  # fmt: skip
    return [(name, value) for name, value in lines if value]


def _trained(card: Mapping[str, Any]) -> str:
    about = card.get("provenance") or {}
    parts = [str(about[key]) for key in ("dataset", "source", "weights") if about.get(key)]
    if about.get("images"):
        parts.append(f"{about['images']:,} images")
    if about.get("trained_at"):
        parts.append(str(about["trained_at"])[:10])
    return visible(", ".join(parts))


def _measured(card: Mapping[str, Any], precision: str) -> str:
    """Figures of the card, nested or not, as `val bf16 foreground_iou 0.87`; of several precisions the run's own."""
    found: list[str] = []

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, inner in ({precision: value[precision]} if precision in value else value).items():
                walk(f"{prefix} {key}".strip(), inner)
        elif isinstance(value, float):
            found.append(f"{prefix} {value:.3g}")

    walk("", card.get("metrics") or {})
    return visible(", ".join(found[:_FOUND_NAMES]))


def _workers(workers: Sequence[Mapping[str, Any]]) -> str:
    kinds: dict[str, int] = {}
    for one in workers:
        kind = f"{one.get('name') or one.get('device')} on {one.get('node')}"
        kinds[kind] = kinds.get(kind, 0) + 1
    listed = [f"{number} × {kind}" for kind, number in list(kinds.items())[:_FOUND_NAMES]]
    more = len(kinds) - len(listed)
    return visible(", ".join(listed) + (f" and {more} more" if more > 0 else ""))

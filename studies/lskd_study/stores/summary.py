"""What a study says about its stores: before it runs, and on its page."""

from collections.abc import Sequence

from lskd.soft_labels.own_error import OwnError
from lskd_study.base.text import gigabytes
from lskd_study.plan.plan import Plan, Store
from lskd_study.stores.decide import training_images
from lskd_study.stores.state import record_of


def describe_stores(plan: Plan) -> list[str]:
    """Return lines for the terminal: what is stored, what that saves, and why the rest is not."""
    lines = []
    if plan.stores:
        size = sum(store.size for store in plan.stores)
        about = f", {gigabytes(size)}" if size else ""
        lines.append(f"  soft labels: {_stored(plan.stores)}{about}")
        if saved := _saved(plan):
            lines.append(f"    {saved}")
    return lines + [f"  no soft labels stored for {note}" for note in plan.store_notes]


def page_rows(plan: Plan) -> list[tuple[str, str]]:
    """Return what the page says under Provenance, as (name, value)."""
    rows = []
    if plan.stores:
        records = [record for store in plan.stores if "soft_labels" in (record := record_of(plan, store))]
        parts = [_stored(plan.stores), _saved(plan)]
        if records:
            size = sum(record["soft_labels"]["bytes"] for record in records)
            minutes = sum(record["wall_time_s"] for record in records) / 60
            removed = ", removed after use" if all(record.get("removed") for record in records) else ""
            parts.append(f"{gigabytes(size)}{removed}, written in {minutes:.1f} minutes")
            errors = [found for record in records if (found := record["soft_labels"].get("own_error"))]
            if errors:  # the store that lost most speaks for all
                worst = max((OwnError.of_json(error) for error in errors), key=lambda error: 1 - error.mass)
                parts.append(f"error {'of the worst ' if len(errors) > 1 else ''}{worst}")
        rows.append(("Teacher asked once", "; ".join(part for part in parts if part)))
    if plan.store_notes:
        rows.append(("Teacher asked in every run", "; ".join(plan.store_notes)))
    return rows


def loss_note(plan: Plan) -> str:
    """Return how stored soft labels change the loss; empty where they do not."""
    changed = {
        (store.top_k, store.values) for store in plan.stores if store.top_k or store.values != "float32"
    }
    views = {store.epochs for store in plan.stores if store.views}
    again = f"Students read {max(views)} stored views of each image in turn." if views else ""
    kept = [f"the {top_k} likeliest entries" if top_k else "all entries" for top_k, _ in sorted(changed)]
    if not changed:
        return again
    return (
        f"Students learn from {' and '.join(kept)} of what the teacher says, stored as "
        f"{' and '.join(sorted({values for _, values in changed}))}: their loss differs from that of asking "
        "the teacher itself." + f" {again}" * bool(again)
    )


def _stored(stores: Sequence[Store]) -> str:
    readers = sum(len(store.students) for store in stores)
    kept = {f"top {store.top_k}" if store.top_k else "all classes" for store in stores}
    exact = all(not store.top_k and store.values == "float32" for store in stores)
    note = ", as the teacher says it" if exact else ", which changes the loss"
    if views := {store.epochs for store in stores if store.views}:
        note += f"; {max(views)} views of each image are read in turn"
    values = ", ".join(sorted({store.values for store in stores}))
    return f"{len(stores)} stores, {', '.join(sorted(kept))} in {values}, serve {readers} students{note}"


def _saved(plan: Plan) -> str:
    """Return how often teachers are asked about a training image, with and without stores."""
    stored, asked = sum(store.epochs for store in plan.stores), sum(store.asked for store in plan.stores)
    if not asked:
        return ""
    count = training_images(plan)
    if not count:
        samples = "images" if plan.num_classes else "sentences"
        return f"teachers pass over the training {samples} {stored} times instead of {asked}"
    return (
        f"teachers are asked about {stored * count:,} images instead of {asked * count:,}: "
        f"{(asked - stored) * count:,} passes saved"
    )

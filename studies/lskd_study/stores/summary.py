"""What a study says about its stores: before it runs, and on its page."""

from lskd.soft_labels.own_error import OwnError
from lskd_study.base.text import gigabytes
from lskd_study.plan.plan import Plan, Store
from lskd_study.stores.decide import image_count
from lskd_study.stores.state import record_of


def describe_stores(plan: Plan) -> list[str]:
    """Return lines for the terminal: what is stored, what that saves, and why the rest is not."""
    lines = []
    if plan.stores:
        size = sum(store.size for store in plan.stores)
        about = f", {gigabytes(size)}" if size else ""
        lines.append(f"  soft labels: {_stored(plan)}{about}")
        if saved := _saved(plan):
            lines.append(f"    {saved}")
    return lines + [f"  no soft labels stored for {note}" for note in plan.store_notes]


def page_rows(plan: Plan) -> list[tuple[str, str]]:
    """Return what the page says under Provenance, as (name, value)."""
    rows = []
    if plan.stores:
        records = [record for store in plan.stores if "soft_labels" in (record := record_of(plan, store))]
        parts = [_stored(plan), _saved(plan)]
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
    views = {store.epochs for store in plan.stores if store.views}
    again = [f"Students read {max(views)} stored views of each image in turn."] if views else []
    if plan.stores and not _exact(one := plan.stores[0]):  # one study file, so all are alike
        kept = f"{one.top_k} {'drawn' if one.sampled else 'likeliest'}" if one.top_k else "all"
        rest = f", {plan.rest} the rest" if plan.rest else ""
        again.insert(
            0,
            f"Students learn from {kept} entries of what the teacher says{rest}, stored as {one.values}: "
            "their loss differs from that of asking the teacher itself.",
        )
    return " ".join(again)


def _exact(store: Store) -> bool:
    return not store.top_k and store.values == "float32"


def _stored(plan: Plan) -> str:
    stores, one = plan.stores, plan.stores[0]
    readers = sum(len(store.students) for store in stores)
    kept = f"{one.top_k} drawn" if one.sampled else f"top {one.top_k}" if one.top_k else "all classes"
    note = f", rest: {plan.rest}" if plan.rest else ""
    note += ", as the teacher says it" if _exact(one) else ", which changes the loss"
    if views := {store.epochs for store in stores if store.views}:
        note += f"; {max(views)} views of each image are read in turn"
    return f"{len(stores)} stores, {kept} in {one.values}, serve {readers} students{note}"


def _saved(plan: Plan) -> str:
    """Return how often teachers are asked about a training image, with and without stores."""
    stored, asked = sum(store.epochs for store in plan.stores), sum(store.asked for store in plan.stores)
    if not asked:
        return ""
    count = image_count(plan, "train")
    if not count:
        samples = "images" if plan.num_classes else "sentences"
        return f"teachers pass over the training {samples} {stored} times instead of {asked}"
    return (
        f"teachers are asked about {stored * count:,} images instead of {asked * count:,}: "
        f"{(asked - stored) * count:,} passes saved"
    )

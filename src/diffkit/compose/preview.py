"""The samples that a training shows of itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffkit.compose.model import Model

if TYPE_CHECKING:
    from diffkit.engine.store import Pixels, Store

IMAGES, TASK_IMAGES = 64, 24
PIXELS = 2**20


def preview(model: Model, store: Store, seed: int) -> tuple[Pixels, Pixels, int]:
    """Samples [N, H, W, C]; as they are laid out, a row or a column for each class; and in how many columns.

    Of a task, samples for held-out images, laid out in triples: what was shown, what was made, what was there.
    """
    spec = model.spec
    count = min(IMAGES, max(16, PIXELS // (spec.height * spec.width)))
    if spec.image_channels:
        images, shown = _with_inputs(model, store, min(count, TASK_IMAGES) // 8 * 8, seed)
        return images, shown, 12
    columns = min(len(spec.classes), 10) or 8
    count -= count % columns
    classes = spec.classes[:columns] or None
    images = model.sample(count, classes=classes, seed=seed)
    rows = count // columns
    if classes and columns < rows:  # few classes: a row for each makes the wider picture
        by_class = images.reshape(rows, columns, *images.shape[1:]).swapaxes(0, 1)
        return images, by_class.reshape(images.shape), rows
    return images, images, columns


def _with_inputs(model: Model, store: Store, count: int, seed: int) -> tuple[Pixels, Pixels]:
    """Samples, and the triples."""
    import numpy as np

    from diffkit.compose.wishes import Wishes
    from diffkit.engine.codec import encode
    from diffkit.engine.inputs import stored_pictures

    inputs = stored_pictures(store, model.spec)
    wishes = model.wishes(Wishes(inputs=inputs, seed=seed))
    made = model.collect(model.plan(seed=seed), count, wishes)
    image = wishes(range(count)).image
    assert image is not None
    shown = encode(image)[..., : model.spec.channels].numpy()
    shown = np.broadcast_to(shown[..., :1], made.shape) if shown.shape[-1] < model.spec.channels else shown
    part = "holdout" if store.holdout_count else "train"
    there = store.gather(np.arange(count) % len(inputs), part)[0]
    top, left = (there.shape[1] - made.shape[1]) // 2, (there.shape[2] - made.shape[2]) // 2
    there = there[:, top : top + made.shape[1], left : left + made.shape[2]]
    return made, np.stack([shown, made, there], 1).reshape(-1, *made.shape[1:])

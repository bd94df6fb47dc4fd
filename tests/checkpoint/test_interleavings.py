"""Any interleaving of saves, deaths amid a save, prunes and damage leaves the newest good checkpoint loadable."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from elastic_batch.checkpoint import CheckpointInfo, CheckpointStore
from elastic_batch.errors import CheckpointDamaged, StaleGeneration

Save = tuple[dict[str, Any], CheckpointInfo]

saves = st.tuples(st.just("save"), st.integers(1, 5), st.just(0))
deaths = st.tuples(st.just("die"), st.integers(1, 5), st.integers(0, 80))
takeovers = st.tuples(st.just("new generation"), st.just(1), st.integers(0, 80))
late_writers = st.tuples(st.just("old generation"), st.integers(1, 5), st.just(0))
damages = st.tuples(st.just("damage"), st.just(1), st.integers(0, 400))


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(st.one_of(saves, deaths, takeovers, late_writers, damages), max_size=12), keep=st.integers(1, 3))
def test_any_interleaving_of_saves_deaths_and_takeovers_leaves_a_loadable_newest(
    steps: list[tuple[str, int, int]],
    keep: int,
    make_save: Callable[[int], Save],
    dying: Callable[[int], AbstractContextManager[None]],
) -> None:
    with tempfile.TemporaryDirectory() as place:
        generation, position = 0, 0
        store = CheckpointStore(place, keep=keep)
        for action, samples, moment in steps:
            # A death may come after the commit: then the newest is one further.
            good = {position}
            if action == "save":
                position += samples
                store.save(*make_save(position))
                good = {position}
            elif action == "die":
                with dying(moment):
                    store.save(*make_save(position + samples))
                good = {position, position + samples}
            elif action == "new generation":
                generation += 1
                store = CheckpointStore(place, keep=keep, generation=generation)
                with dying(moment):
                    store.raise_fence()
            elif action == "old generation" and generation:
                # The fence may not have been raised yet; what a late writer then saves ranks behind the newer ones.
                stale = CheckpointStore(place, keep=keep, generation=generation - 1)
                try:
                    stale.save(*make_save(position + samples))
                    good.add(position + samples)
                except StaleGeneration:
                    pass
            elif action == "damage":
                position = _damage_newest(Path(place), store, moment)
                good = {position}
            position = _newest_position(store)
            assert position in good


def _newest_position(store: CheckpointStore) -> int:
    newest = store.load_newest(lambda damage: None) if store.manifests() else None
    return newest.manifest.position if newest else 0


def _damage_newest(place: Path, store: CheckpointStore, byte: int) -> int:
    """Flip a bit of the newest payload if there is an older good one; gives the position that must come up then."""
    good = [manifest for manifest in store.manifests() if _is_whole(store, manifest.name)]
    if len(good) < 2:
        return _newest_position(store)
    path = place / f"{good[0].name}.pt"
    content = bytearray(path.read_bytes())
    content[byte % len(content)] ^= 1
    path.write_bytes(content)
    return good[1].position


def _is_whole(store: CheckpointStore, name: str) -> bool:
    try:
        store.verify(name)
    except CheckpointDamaged:
        return False
    return True

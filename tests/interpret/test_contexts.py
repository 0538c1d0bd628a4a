"""The places kept for each expert, whatever the batches in which they come."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from peerlm.interpret.contexts import TopContexts


@given(
    firings=st.lists(st.lists(st.tuples(st.integers(0, 5), st.integers(-4, 4)), max_size=8), max_size=6),
    kept=st.integers(1, 4),
)
def test_they_are_the_largest_of_all(firings, kept):
    contexts = TopContexts(6, kept)
    position, all_of = 0, {expert: [] for expert in range(6)}
    for batch in firings:
        places = list(range(position, position + len(batch)))
        position += len(batch)
        ids, strengths = zip(*batch, strict=True) if batch else ((), ())
        contexts.add(torch.tensor(ids, dtype=torch.int64), torch.tensor(strengths).float(), torch.tensor(places))
        for expert, strength, place in zip(ids, strengths, places, strict=True):
            all_of[expert].append((-abs(strength), place, strength))
    for expert, found in all_of.items():
        best = sorted(found)[:kept]
        empty = kept - len(best)
        assert contexts.position_NC[expert].tolist() == [place for _, place, _ in best] + [-1] * empty
        assert contexts.strength_NC[expert].tolist() == [strength for *_, strength in best] + [0] * empty

"""Keys and values of generated tokens: attention to them is softmax attention, however often their room grows."""

from __future__ import annotations

import torch

from molmo2_nemo.attention import cache as module
from molmo2_nemo.attention.cache import KVCache

PROMPT, ANSWER, HEADS, GROUPS, SIZE = 5, 11, 4, 2, 8


def test_room_grows_with_the_answers(monkeypatch):
    monkeypatch.setattr(module, "FIRST", 2)
    draw = torch.Generator().manual_seed(0)
    visible = torch.tensor([[True] * 5, [True, False, True, True, False], [False, True, True, True, True]])
    cache = KVCache(visible, ANSWER)
    keys, values = (torch.randn(PROMPT, 3, GROUPS, SIZE, generator=draw) for _ in range(2))
    cache.fill(7, keys, values)
    room = []
    for step in range(ANSWER):
        if step == 6:  # the second prompt is answered
            kept = torch.tensor([0, 2])
            cache.keep(kept)
            keys, values, visible = keys[:, kept], values[:, kept], visible[kept]
        rows = len(visible)
        query, key, value = (torch.randn(1, rows, n, SIZE, generator=draw) for n in (HEADS, GROUPS, GROUPS))
        keys, values = torch.cat((keys, key)), torch.cat((values, value))
        visible = torch.cat((visible, torch.ones(rows, 1, dtype=torch.bool)), dim=1)
        cache.next_token()
        found = cache.attend(7, query, key, value, SIZE**-0.5)
        each = torch.empty_like(found)
        for row in range(rows):
            for head in range(HEADS):
                own = head // (HEADS // GROUPS)
                seen = visible[row]
                weights = torch.softmax(keys[seen, row, own] @ query[0, row, head] * SIZE**-0.5, 0)
                each[0, row, head] = weights @ values[seen, row, own]
        torch.testing.assert_close(found, each)
        room.append(cache.bytes // (2 * 4 * rows * GROUPS * SIZE) - PROMPT)
    assert room == [2, 2, 4, 4, 8, 8, 8, 8, 11, 11, 11]

"""A model of an inference server's prefix cache: which part of a prompt it need not compute again.

As in vLLM, prompts are cut into blocks, each known by its text and all before it, and the blocks used longest ago make
room. Pure; it must never keep a block's text, only its hash.
"""

from __future__ import annotations

from collections import OrderedDict
from hashlib import blake2b

BLOCK_TOKENS = 16
BLOCK_BYTES = 4 * BLOCK_TOKENS  # the simulator counts four bytes of a prompt's JSON as a token


class PrefixCache:
    """The blocks of prompts, the least recently used first.

    Args:
        blocks: how many are kept; 0 keeps none.
    """

    def __init__(self, blocks: int) -> None:
        self._most = blocks
        self._blocks: OrderedDict[bytes, None] = OrderedDict()

    def use(self, model: str, prompt: bytes) -> int:
        """A prompt is computed: the tokens at its beginning that were cached; all its whole blocks are afterwards.

        At least one token of a prompt is always computed, so its last byte is in no block.
        """
        if not self._most:
            return 0
        known, found = self._blocks, 0
        hashed = blake2b(model.encode(), digest_size=16)
        names = []
        for start in range(0, (len(prompt) - 1) // BLOCK_BYTES * BLOCK_BYTES, BLOCK_BYTES):
            hashed.update(prompt[start : start + BLOCK_BYTES])
            names.append(hashed.digest())
        for name in names:
            if name not in known:
                break
            found += 1
        # The last block first: of one prompt the end makes room before the beginning, which others may share.
        for name in reversed(names):
            known[name] = None
            known.move_to_end(name)
        while len(known) > self._most:
            known.popitem(last=False)
        return found * BLOCK_TOKENS

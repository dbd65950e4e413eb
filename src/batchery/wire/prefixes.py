"""Which requests of a file share the beginning of a prompt, learnt while the file streams by.

An inference server keeps the beginnings of prompts that it has seen lately (its prefix cache), so requests that begin
alike cost less when they come one after the other. `PrefixTree` takes each line once and files it under the longest
beginning that it shares with others, in steps of `BLOCK` bytes; at the end every line has a group, and groups have keys
that are alike in all files. It is a hint and never more: whatever it says, every request is sent once. Its memory does
not depend on the file; where the beginnings are too many, it forgets those that came once.
"""

from __future__ import annotations

from array import array
from zlib import crc32

import msgspec

BLOCK = 64
"""Bytes of a prompt's JSON in which beginnings are compared: about 16 tokens, the block of an engine's prefix cache."""

MAX_LABEL = 64 * BLOCK
MAX_TEXT = 4 * 1024 * 1024
MAX_NODES = 20_000

_Path = tuple[int, ...]

SAME = 0.75
"""A beginning that so large a share of a group has in common makes no group of its own."""

_FIELDS = {
    "/v1/chat/completions": (b'"messages"',),
    "/v1/completions": (b'"prompt"',),
    "/v1/responses": (b'"instructions"', b'"input"'),
    "/v1/messages": (b'"system"', b'"messages"'),
}


class Prefixes(msgspec.Struct, frozen=True):
    """What was learnt.

    Attributes:
        groups: for each line that was added its group, unsigned 16 bit; None where all are in group 0.
        keys: for each group its key, ascending but for the first, which is that of the lines that share little with
            others; unsigned 64 bit, and 0 where nothing is shared. The same beginnings have the same keys in all files.
    """

    groups: array[int] | None = None
    keys: array[int] = msgspec.field(default_factory=lambda: array("Q", (0,)))

    def key(self, request: int) -> int:
        """The key of a request."""
        return self.keys[0 if self.groups is None else self.groups[request]]

    def in_order(self, requests: array[int]) -> array[int]:
        """Requests with those side by side that begin alike; the order is otherwise kept."""
        if self.groups is None:
            return requests
        return array(requests.typecode, sorted(requests, key=self.groups.__getitem__))


_Leaf = tuple[bytes, int]
"""The rest of a line that is the only one to begin so, in whole blocks, and which line it is."""


class _Node:
    """A beginning that several lines share: its parent's and `label`, whose first block is its name there.

    Attributes:
        number: which one it is.
        label: a whole number of blocks; only the first once it is frozen.
        length: of the label, in bytes.
        crc: the CRC-32 of the whole beginning.
        count: lines that begin so.
        frozen: whether most of its text was let go, so that it cannot be parted any more.
        below: the longer beginnings, by their first block.
    """

    __slots__ = ("below", "count", "crc", "frozen", "label", "length", "number")

    def __init__(self, number: int, label: bytes, crc: int, count: int) -> None:
        self.number = number
        self.label = label
        self.length = len(label)
        self.crc = crc
        self.count = count
        self.frozen = False
        self.below: dict[bytes, _Node | _Leaf] = {}


class PrefixTree:
    """Learns the groups of one file.

    Args:
        max_text: bytes of beginnings that are kept.
        max_nodes: beginnings that are kept, those aside that came once.
    """

    def __init__(self, *, max_text: int = MAX_TEXT, max_nodes: int = MAX_NODES) -> None:
        self._max_text = max_text
        self._max_nodes = max_nodes
        self._root = _Node(0, b"", 0, 0)
        self._nodes = [self._root]
        self._thawed = 1  # the nodes from this number on are not frozen
        self._leaves: list[tuple[_Node, bytes]] = []  # under which node and name
        self._text = 0
        self._lines = array("I")  # for each line the number of its node

    def add(self, line: bytes, url: str) -> None:
        """File the next line. CPU-bound: about a microsecond.

        Args:
            line: a good line, whole.
            url: which it names.
        """
        root = self._root
        root.count += 1
        fields = _FIELDS.get(url)
        position = -1
        if fields is not None:
            position = line.find(fields[0])
            if len(fields) > 1:
                other = line.find(fields[1])
                position = other if position < 0 or 0 <= other < position else position
        self._lines.append(0 if position < 0 else self._file(line, position))

    def _file(self, line: bytes, position: int) -> int:
        """The number of the node for a line whose prompt begins at this byte."""
        node = self._root
        while True:
            block = line[position : position + BLOCK]
            known = node.below.get(block)
            if known is None:
                break
            if isinstance(known, _Node):
                child = known
            elif len(self._nodes) >= self._max_nodes:
                return node.number
            else:
                child = self._node(node, block, known)
            if child.frozen:
                if crc32(line[position : position + child.length], node.crc) != child.crc:
                    return node.number
            elif not line.startswith(child.label, position):
                if len(self._nodes) >= self._max_nodes:
                    return node.number
                child = self._part(node, block, child, line, position)
            child.count += 1
            position += child.length
            node = child
        left = len(line) - position
        if left >= BLOCK:
            if self._text >= self._max_text:
                self._forget()
            length = left - left % BLOCK if left < MAX_LABEL else MAX_LABEL
            self._text += length
            node.below[block] = (line[position : position + length], len(self._lines))
            self._leaves.append((node, block))
        return node.number

    def _node(self, parent: _Node, block: bytes, leaf: _Leaf) -> _Node:
        """Another line begins like one that was the only one."""
        label, line = leaf
        node = _Node(len(self._nodes), label, crc32(label, parent.crc), 1)
        self._nodes.append(node)
        parent.below[block] = node
        self._lines[line] = node.number
        return node

    def _part(self, parent: _Node, block: bytes, node: _Node, line: bytes, position: int) -> _Node:
        """Part a node where a line stops to be like it; the part that they share, which is new."""
        low, high = 1, min(node.length, len(line) - position) // BLOCK  # blocks that are alike, at least and at most
        while low < high:
            middle = (low + high + 1) // 2
            if line.startswith(node.label[: middle * BLOCK], position):
                low = middle
            else:
                high = middle - 1
        shared, rest = node.label[: low * BLOCK], node.label[low * BLOCK :]
        above = _Node(len(self._nodes), shared, crc32(shared, parent.crc), node.count)
        self._nodes.append(above)
        parent.below[block] = above
        node.label = rest
        node.length = len(rest)
        above.below[rest[:BLOCK]] = node
        return above

    def _forget(self) -> None:
        """Let go of the beginnings that came once, and, if that is not enough, of most of the text of the others."""
        for node, block in self._leaves:
            if type(node.below.get(block)) is tuple:
                del node.below[block]
        self._leaves.clear()
        self._text = sum(len(node.label) for node in self._nodes[self._thawed :])
        if 2 * self._text > self._max_text:
            for node in self._nodes[self._thawed :]:
                node.label = node.label[:BLOCK]
                node.frozen = True
            self._thawed = len(self._nodes)
            self._text = 0

    def finish(self) -> Prefixes:
        """The groups and their keys, after the last line."""
        paths = self._paths()
        known = sorted(set(paths) - {paths[0]}, key=_key)
        keys = array("Q", map(_key, (paths[0], *known)))
        if not known:
            return Prefixes(None, keys)
        places = {path: place for place, path in enumerate(known, 1)}
        group_of = [places.get(path, 0) for path in paths]
        return Prefixes(array("H", map(group_of.__getitem__, self._lines)), keys)

    def _paths(self) -> list[_Path]:
        """For each node the path of its group: the checksums of the groups that it is in, the outermost first."""
        root = self._root
        paths: list[_Path] = [()] * len(self._nodes)
        stack: list[tuple[_Node, int, _Path]] = [(root, root.count, ())]
        for child in root.below.values():
            if isinstance(child, _Node) and child.count >= SAME * root.count:
                stack = [(root, root.count, (child.crc,))]
        while stack:
            node, size, path = stack.pop()
            paths[node.number] = path
            for child in node.below.values():
                if not isinstance(child, _Node):
                    continue
                if child.count == 1 or child.count >= SAME * size:
                    stack.append((child, size, path))
                else:
                    stack.append((child, child.count, (*path, child.crc)))
        return paths


def _key(path: _Path) -> int:
    """A key such that groups within one group lie side by side: 20 bits each for the two outermost, 24 for the last."""
    first, second, last = (*path[:2], 0, 0)[0], (*path, 0, 0)[1], (path or (0,))[-1]
    return (first >> 12) << 44 | (second >> 12) << 24 | last & 0xFFFFFF

"""Masks that published models name: packed documents, local chunks, diffusion in blocks, trees."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jattn.functional import checks, dtypes, mask_parts
from jattn.functional.block import Block
from jattn.functional.mask_algebra import ImpliedShape, Mask, SlotMask
from jattn.functional.pytree import pytree

Array = jax.Array
LARGEST = 2**31 - 1


def documents(lengths: Array) -> Mask:
    """A query sees the keys of its own document, in a sequence packed from documents.

        d(i) = d(j) < M  with  d(i) = searchsorted(cumsum(lengths), i, side="right")

    The documents stand one after the other; what follows the last one sees nothing and is seen by
    nothing. It is a mask of self-attention, T = S. With ids in place of lengths, use `segments`.

    Args:
      lengths: of the documents, integers `[M]` (shared by all examples) or `[..., M]`, 0 for one
        that is not there. Traced ones are not checked: one below 0 counts as 0, and what lies
        beyond S is cut off.

    Raises:
      TypeError: lengths are not integers.
      ValueError: lengths have no axis; in `attend`, if T ≠ S, if a known length is negative, or if
        known ones add up to more than S.

    Paper: Krell et al. 2021, https://arxiv.org/abs/2107.02027

    Example:
      >>> print(documents(np.array([2, 1, 2])))
      documents([2, 1, 2])
      █ █ · · ·
      █ █ · · ·
      · · █ · ·
      · · · █ █
      · · · █ █
    """
    lengths = mask_parts.integers("lengths", lengths)
    if np.ndim(lengths) < 1:
        raise ValueError(f"lengths must be [M] or [..., M], got {lengths} of shape ()")
    return _Documents(lengths)


def chunked_local(size: int) -> Mask:
    """A query sees the keys of its own chunk, where every `size` positions are a chunk.

        ⌊i / size⌋ = ⌊j / size⌋

    Llama 4 has it with a size of 8192, `chunked_local(8192) & causal()`.

    Args:
      size: of a chunk, in positions; a Python integer of at least 1.

    Raises:
      TypeError: the size is not an integer.
      ValueError: the size is less than 1, or beyond 32 bits.

    Paper: the local attention of Liu et al. 2018, https://arxiv.org/abs/1801.10198

    Example:
      >>> print(chunked_local(2).draw(5, 5))
      █ █ · · ·
      █ █ · · ·
      · · █ █ ·
      · · █ █ ·
      · · · · █
    """
    return _ChunkedLocal(_static("size", size, LARGEST))


def block_diffusion(length: int, block_size: int) -> Mask:
    """A query sees its own block and the clean tokens of earlier ones, to train block diffusion.

        clean(i) = clean(j) and b(i) = b(j),  or  clean(j) and b(j) < b(i)
        with  clean(i) = (i ≥ length)  and  b(i) = ⌊(i mod length) / block_size⌋

    The sequence is a noised copy of the text, then the clean text: T = S = 2 · length.

    Args:
      length: tokens of the text; a Python integer of at least 1.
      block_size: tokens in a block; a Python integer of at least 1. The last block may be shorter.

    Raises:
      TypeError: the length or the block size is not an integer.
      ValueError: one of them is less than 1, or beyond 32 bits; in `attend`, if T or S is not
        2 · length.

    Paper: Arriola et al. 2025, https://arxiv.org/abs/2503.09573

    Example:
      >>> print(block_diffusion(4, 2))
      block_diffusion(4, 2)
      █ █ · · · · · ·
      █ █ · · · · · ·
      · · █ █ █ █ · ·
      · · █ █ █ █ · ·
      · · · · █ █ · ·
      · · · · █ █ · ·
      · · · · █ █ █ █
      · · · · █ █ █ █
    """
    n = _static("length", length, LARGEST // 2)
    return _BlockDiffusion(n, _static("block_size", block_size, LARGEST))


def tree(parents: Array, prefix: int | Array = 0) -> Mask:
    """A draft token sees the prefix, its ancestors and itself, to verify a tree of drafts at once.

        j < prefix  or  j − prefix ∈ {i, parents[i], parents[parents[i]], …}

    The queries are the drafts; the keys are the accepted tokens and then the drafts, as they lie in
    a cache. A root, whose parent is −1, follows the prefix.

    Args:
      parents: of the drafts, integers `[T]` or `[..., T]`: the index of each one's parent, which
        stands before it, or −1. Traced ones are not checked: one that does not stand before its
        child counts as −1.
      prefix: the number of accepted tokens; an integer, or an integer array `[]` or `[...]` with
        one number per example. A traced one below 0 counts as 0.

    Raises:
      TypeError: parents or the prefix are not integers.
      ValueError: parents have no axis, or a known one does not stand before its child; a known
        prefix is negative; in `attend`, if T is not the number of parents, or if known prefix + T
        is more than S.

    Paper: Miao et al. 2023, https://arxiv.org/abs/2305.09781; Cai et al. 2024,
    https://arxiv.org/abs/2401.10774

    Example:
      >>> print(tree(np.array([-1, 0, 0, 1]), prefix=2))
      tree([-1, 0, 0, 1], 2)
      █ █ █ · · ·
      █ █ █ █ · ·
      █ █ █ · █ ·
      █ █ █ █ · █
    """
    parents = mask_parts.integers("parents", parents)
    _check_parents(parents)
    prefix = mask_parts.integer("prefix", prefix)
    checks.assert_in_range("prefix", prefix, 0, LARGEST, "a number of tokens")
    if np.ndim(parents) > 1:
        mask_parts.check_per_example("prefix", prefix, np.shape(parents)[:-1])
    return _Tree(parents, prefix)


@pytree
class _Documents(SlotMask):
    lengths: Any

    def rule(self, block: Block) -> Array:
        ends = self._ends(block)
        q_document, k_document = _document(ends, block.q_slot), _document(ends, block.k_slot)
        return (q_document == k_document) & (q_document < self._number)

    @property
    def _number(self) -> int:
        return np.shape(self.lengths)[-1]

    def _ends(self, block: Block) -> Array:
        """The slot after each document, `[..., M, 1, 1, 1]`."""
        lengths = _of_examples(block, dtypes.lengths(self.lengths))
        return jax.lax.associative_scan(_add, lengths, axis=-4)

    def classify(self, block: Block) -> Array:
        # Documents ascend with the slots, and each that lies between two slots has slots between
        # them. So the first and last row and column tell which documents both of them hold.
        ends = self._ends(block)
        q_low, q_high = (_document(ends, slot) for slot in _first_and_last(block.rows))
        k_low, k_high = (_document(ends, slot) for slot in _first_and_last(block.columns))
        after_all = (q_low == self._number) | (k_low == self._number)
        apart = (q_high < k_low) | (k_high < q_low)
        all_equal = (q_low == q_high) & (k_low == k_high) & (q_low == k_low)
        return mask_parts.class_of(empty=after_all | apart, full=all_equal)

    def check(self, batch: tuple[int, ...], num_heads: int, T: int, S: int) -> None:
        if T != S:
            raise ValueError(f"documents is for self-attention, T = S, got T = {T} and S = {S}")
        if np.shape(self.lengths)[:-1] not in {(), batch}:
            raise ValueError(
                f"documents lengths must be [M] or [..., M] with [...] = {batch}, "
                f"got shape {np.shape(self.lengths)}"
            )
        why, total = "S, the number of slots", self._total()
        checks.assert_in_range("documents lengths", self.lengths, 0, S, why)
        if total is not None:
            checks.assert_in_range("the sum of documents lengths", total, 0, S, why)

    def _total(self) -> int | None:
        """The slots that documents take, in the example where they take most; None: not known."""
        lengths = checks.concrete(self.lengths)
        return None if lengths is None else int(lengths.sum(-1, dtype=np.int64).max(initial=0))

    def implied_shape(self) -> ImpliedShape:
        slots = self._total() or None
        return np.shape(self.lengths)[:-1], None, slots, slots

    def __repr__(self) -> str:
        return f"documents({mask_parts.show(self.lengths)})"


@pytree
class _ChunkedLocal(Mask):
    size: int

    def rule(self, block: Block) -> Array:
        return block.q_idx // self.size == block.k_idx // self.size

    def classify(self, block: Block) -> Array:
        q_low, q_high, k_low, k_high = dtypes.together(
            *(position // self.size for position in (*block.q_range, *block.k_range))
        )
        apart = (q_high < k_low) | (k_high < q_low)
        all_equal = (q_low == q_high) & (k_low == k_high) & (q_low == k_low)
        return mask_parts.class_of(empty=apart, full=all_equal)

    def __repr__(self) -> str:
        return f"chunked_local({self.size})"


@pytree
class _BlockDiffusion(SlotMask):
    length: int
    block_size: int

    def rule(self, block: Block) -> Array:
        (q_clean, q_block), (k_clean, k_block) = (
            (slot >= self.length, slot % self.length // self.block_size)
            for slot in (block.q_slot, block.k_slot)
        )
        own = (q_clean == k_clean) & (q_block == k_block)
        return own | (k_clean & (k_block < q_block))

    def classify(self, block: Block) -> Array:
        # Each pair of halves has a simple rule; a part of the block that holds no slot says nothing
        empty, full = jnp.asarray(True), jnp.asarray(True)
        for q_clean, k_clean in ((0, 0), (0, 1), (1, 0), (1, 1)):
            is_there, (q_low, q_high), (k_low, k_high) = self._part(block, q_clean, k_clean)
            if k_clean:
                none, all_seen = k_low >= q_high + q_clean, k_high < q_low + q_clean
            elif q_clean:
                none, all_seen = jnp.asarray(True), jnp.asarray(False)
            else:
                none = (q_high < k_low) | (k_high < q_low)
                all_seen = (q_low == q_high) & (k_low == k_high) & (q_low == k_low)
            empty, full = empty & (none | ~is_there), full & (all_seen | ~is_there)
        return mask_parts.class_of(empty=empty, full=full)

    def _part(self, block: Block, q_clean: int, k_clean: int) -> tuple[Array, Any, Any]:
        """Whether a block has slots in two halves; first and last blocks of its text there."""
        is_there, ranges = jnp.asarray(True), []
        for slots, clean in ((block.rows, q_clean), (block.columns, k_clean)):
            low, high = (slot - clean * self.length for slot in _first_and_last(slots))
            low, high = jnp.maximum(low, 0), jnp.minimum(high, self.length - 1)
            is_there &= low <= high
            ranges.append((low // self.block_size, high // self.block_size))
        return is_there, ranges[0], ranges[1]

    def check(self, batch: tuple[int, ...], num_heads: int, T: int, S: int) -> None:
        if not T == S == 2 * self.length:
            raise ValueError(
                f"block_diffusion needs T = S = 2 · length = {2 * self.length}, the noised half "
                f"and the clean half, got T = {T} and S = {S}"
            )

    def implied_shape(self) -> ImpliedShape:
        return (), None, 2 * self.length, 2 * self.length

    def __repr__(self) -> str:
        return f"block_diffusion({self.length}, {self.block_size})"


@pytree
class _Tree(SlotMask):
    parents: Any
    prefix: Any

    def rule(self, block: Block) -> Array:
        # A column of `is_key` is one-hot where a key is a draft and zero elsewhere, so the product
        # picks each key's column of the paths
        parents = _of_examples(block, dtypes.indices(self.parents))[..., 0, 0, 0]
        paths = jax.lax.dynamic_slice_in_dim(_paths(parents), *block.rows, axis=-2)
        draft = block.k_slot - self._prefix(block)
        is_key = jax.nn.one_hot(draft, self._number, dtype=jnp.float32, axis=-2)[..., 0, :, :]
        return (draft < 0) | (paths[..., None, :, :] @ is_key > 0)

    @property
    def _number(self) -> int:
        return np.shape(self.parents)[-1]

    def _prefix(self, block: Block) -> Array:
        prefix = dtypes.lengths(self.prefix)
        return block.of_example(prefix) if prefix.ndim else prefix

    def classify(self, block: Block) -> Array:
        prefix, last_row = self._prefix(block), _first_and_last(block.rows)[1]
        first, last = _first_and_last(block.columns)
        return mask_parts.class_of(empty=first - prefix > last_row, full=last < prefix)

    def check(self, batch: tuple[int, ...], num_heads: int, T: int, S: int) -> None:
        if np.shape(self.parents) not in {(T,), (*batch, T)}:
            raise ValueError(
                f"tree parents must be [T] = {(T,)} or [..., T] = {(*batch, T)}, one per query, "
                f"got shape {np.shape(self.parents)}"
            )
        mask_parts.check_per_example("tree prefix", self.prefix, batch)
        prefix = self._longest_prefix() or 0
        if prefix + T > S:
            raise ValueError(
                f"tree needs a key for each token of the prefix and each draft, prefix + T ≤ S, "
                f"got prefix = {prefix}, T = {T} and S = {S}"
            )

    def _longest_prefix(self) -> int | None:
        prefix = checks.concrete(self.prefix)
        return None if prefix is None else int(prefix.max(initial=0))

    def implied_shape(self) -> ImpliedShape:
        batch = np.broadcast_shapes(np.shape(self.parents)[:-1], np.shape(self.prefix))
        T, prefix = self._number, self._longest_prefix()
        return batch, None, T or None, None if prefix is None else prefix + T or None

    def __repr__(self) -> str:
        prefix = mask_parts.show(self.prefix)
        return f"tree({mask_parts.show(self.parents)}{'' if prefix == '0' else ', ' + prefix})"


def _static(name: str, value: Any, largest: int) -> int:
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be a Python integer, got {value!r}")
    checks.assert_in_range(name, value, 1, largest, "slots and positions are int32")
    return int(value)


def _check_parents(parents: Any) -> None:
    if np.ndim(parents) < 1:
        raise ValueError(f"parents must be [T] or [..., T], got {parents} of shape ()")
    known = checks.concrete(parents)
    if known is None:
        return
    wrong = (known < -1) | (known >= np.arange(known.shape[-1]))
    if wrong.any():
        at = tuple(np.argwhere(wrong)[0].tolist())
        raise ValueError(
            f"parents must stand before their children, −1 ≤ parents[t] < t, "
            f"got parents[{', '.join(map(str, at))}] = {known[at]}"
        )


def _of_examples(block: Block, array: Any) -> Array:
    """Pick `array [n]` or `[..., n]`, several values per example, as `[..., n, 1, 1, 1]`."""
    if jnp.ndim(array) > 1:
        return block.of_example(array)
    return jnp.reshape(array, (*(1,) * len(block.batch), -1, 1, 1, 1))


def _first_and_last(slots: Any) -> tuple[Any, Any]:
    start, size = slots
    return start, start + size - 1


def _add(first: Array, second: Array) -> Array:
    """The sum of lengths, or the highest int32 where it would overflow."""
    total = first + second
    return jnp.where(total < first, jnp.asarray(LARGEST, jnp.int32), total)


def _document(ends: Array, slot: Any) -> Array:
    """The number of documents that end at a slot or before: its own, or M after all of them."""
    slot = jnp.asarray(slot, jnp.int32)
    slot = jnp.expand_dims(slot, -4) if slot.ndim else slot
    return (ends <= slot).sum(-4, dtype=jnp.int32)


def _paths(parents: Array) -> Array:
    """`[..., T, T]`: 1 where a draft (column) is another one (row) or its ancestor, else 0."""
    T = parents.shape[-1]
    steps = jnp.tril(jax.nn.one_hot(parents, T, dtype=jnp.float32), -1)
    paths = steps + jnp.broadcast_to(jnp.eye(T, dtype=jnp.float32), steps.shape)
    for _ in range(max(T - 2, 0).bit_length()):  # each product doubles the steps of a path
        paths = jnp.minimum(paths @ paths, 1)
    return paths

# Copyright 2026 The jax_attn Authors
# SPDX-License-Identifier: Apache-2.0
"""Host-side bookkeeping of the pages of a `PagedKVCache`."""

import heapq

import numpy as np

from jax_attn._src import checks


class PageAllocator:
    """Hands out page ids and counts their users, so that sequences can share prefix pages.

    Lives on the host in NumPy: a decode loop asks it once in many steps, and the device only
    ever sees the page table. Always hands out the lowest free ids.
    """

    def __init__(self, num_pages: int):
        """Starts with all pages free.

        Args:
          num_pages: Pages in the pool.

        Raises:
          ValueError: If `num_pages` is negative.
        """
        checks.check_at_least("PageAllocator", "num_pages", num_pages, 0)
        self._users = np.zeros(num_pages, np.int32)
        self._free = list(range(num_pages))

    @property
    def num_free(self) -> int:
        """Pages that nobody uses."""
        return len(self._free)

    def alloc(self, num_pages: int) -> np.ndarray:
        """Takes free pages.

        Args:
          num_pages: How many.

        Returns:
          int32 `[num_pages]`, page ids.

        Raises:
          ValueError: If `num_pages` is negative.
          MemoryError: If fewer pages are free; none is taken then.
        """
        checks.check_at_least("PageAllocator.alloc", "num_pages", num_pages, 0)
        if num_pages > len(self._free):
            raise MemoryError(
                f"PageAllocator.alloc: {num_pages} pages wanted, {len(self._free)} of "
                f"{len(self._users)} are free."
            )
        pages = np.array([heapq.heappop(self._free) for _ in range(num_pages)], np.int32)
        self._users[pages] += 1
        return pages

    def share(self, pages: np.ndarray) -> np.ndarray:
        """Adds a user to pages that are in use, such as those of a common prefix.

        Args:
          pages: int32 `[num_pages]`, page ids.

        Returns:
          `pages`, for the page table of the new user.

        Raises:
          ValueError: If a page is not in use; nothing is changed then.
          TypeError: If `pages` are not integers.
        """
        pages = self._in_use("share", pages)
        np.add.at(self._users, pages, 1)
        return pages

    def free(self, pages: np.ndarray) -> None:
        """Removes a user from pages; those without any are free again.

        Args:
          pages: int32 `[num_pages]`, page ids.

        Raises:
          ValueError: If a page has fewer users than are to be removed; nothing is changed then.
          TypeError: If `pages` are not integers.
        """
        pages = self._in_use("free", pages)
        ids, removed = np.unique(pages, return_counts=True)
        if np.any(self._users[ids] < removed):
            page = ids[self._users[ids] < removed][0]
            raise ValueError(
                f"PageAllocator.free: page {page} is freed more often than it is used."
            )
        self._users[ids] -= removed.astype(np.int32)
        for page in ids[self._users[ids] == 0]:
            heapq.heappush(self._free, int(page))

    def _in_use(self, method: str, pages: np.ndarray) -> np.ndarray:
        pages = np.asarray(pages).reshape(-1)
        if pages.size == 0:
            return pages.astype(np.int32)  # an empty list is an array of floats
        if pages.dtype.kind not in "iu":
            raise TypeError(f"PageAllocator.{method}: `pages` must be integers, got {pages.dtype}.")
        outside = (pages < 0) | (pages >= len(self._users))
        if outside.any():
            raise ValueError(
                f"PageAllocator.{method}: page {pages[outside][0]} is outside the pool of "
                f"{len(self._users)} pages."
            )
        idle = self._users[pages] == 0
        if idle.any():
            raise ValueError(f"PageAllocator.{method}: page {pages[idle][0]} is not in use.")
        return pages.astype(np.int32)

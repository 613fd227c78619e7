"""The contracts that the kit checks, by name. A failure names the one that is broken:

    contract `lent buffers`: the backend changed a buffer after get_into had returned

Names are stable: they stand in failures, in `lmcachectl plugin test --json` and in docs/plugins.md.
"""

from __future__ import annotations

STORAGE: dict[str, str] = {
    "exact bytes": "A get fills its buffer with the bytes that were put under the key, and writes nothing behind them.",
    "exact sizes": "A get's result is the number of bytes put, not of their room; what exceeds its buffer is corrupt.",
    "results": "A batch returns a result per key, in their order, of the types the protocol names; keys may repeat.",
    "absent keys": "An absent key is an answer, not an error: None from get_into, nothing from delete.",
    "whole keys": "All 32 bytes of a key count, whatever their values: another identity is another object.",
    "own medium": "A backend sees, changes and clears the objects of its own path, prefix or bucket, and no others.",
    "contains": "`contains` is True for stored keys and False for all others; where it is local it never waits.",
    "put again": "Storing a present key again succeeds and changes nothing that a reader can see.",
    "acknowledged puts": "A put whose result is None is stored; a put that failed returns the exception.",
    "whole objects": "Beside writers and deleters a reader gets the old object, none, or the new one, never a mixture.",
    "threads": "Calls from several threads, at once or in turn, do what they do from one.",
    "lent buffers": "Buffers are lent for the call: afterwards they are neither read nor written.",
    "inputs": "Keys, and the objects that are put, are never changed.",
    "delete": "A deleted key is gone, also after a reopen, and can be stored anew.",
    "clear": "`clear` forgets every object, also those that a reopen would find.",
    "reopen": "`close` keeps what was stored: a backend opened on the same medium finds it.",
    "scan": "Just opened, `scan` lists every stored key once, however many, with its size; or it is None, always.",
    "books": "`usage` counts what is stored, and no object takes less than its bytes.",
    "capacity": "A full medium refuses with NoSpace, keeps what it has, and takes more after a delete.",
    "errors": "Calls on a healthy medium neither raise nor return exceptions.",
    "deadline": "Every call ends within `BuildContext.deadline` seconds.",
    "GIL": "A call releases the GIL while it waits.",
    "close": "`close` lets go of files, sockets and threads, and can be called twice.",
}

MEMORY: dict[str, str] = {
    "region size": "A region has exactly the bytes asked for: `nbytes`, and `len(view)`.",
    "region address": "`address` is where `view` begins, and a multiple of the page size.",
    "writable region": "Every byte of a region can be written and keeps what was written.",
    "faulted in": "A region is resident when `allocate` returns: no first fault is left for the hot path.",
    "own region": "Regions do not overlap.",
    "shared region": "With `BuildContext.shared` another process can map the very region by its `share`.",
    "refusal": "What cannot be allocated raises `BackendUnavailable`.",
    "close": "`close` can be called twice.",
}

SERDE: dict[str, str] = {
    "codec name": "`codec` is 1 to 32 ASCII characters, the same for the same settings and layout.",
    "bound": "No encoded chunk is longer than `bound()`, and encode writes nothing beyond it.",
    "encoded sizes": "encode returns the bytes each chunk takes: they alone decode, in a fresh serde too.",
    "round trip": "A lossless serde decodes to the very bytes; a lossy one is within its tolerance, at any scale.",
    "filled buffers": "decode fills its buffer to the last byte and writes nothing beyond it.",
    "order": "Chunk i of a batch is encoded into, and decoded from, buffer i.",
    "inputs": "Chunks and blobs are read, never changed.",
    "garbage": "Blobs that are cut, extended, changed or noise raise `CorruptChunk` or fill the buffer, nothing else.",
    "threads": STORAGE["threads"],
}

EVICTION: dict[str, str] = {
    "every key": "`coldest` yields every key that was added and not removed, once.",
    "removed keys": "Removed keys are not yielded any more, whatever is told of them late, until they are added again.",
    "unknown keys": "touch and remove ignore keys that the policy does not know.",
    "prefix order": "Of the keys of one call a deeper one is never warmer than a shallower one.",
    "iteration": "`coldest` changes nothing: stopped early, or called again, it yields the same.",
    "quick": "touch, add, remove and the first keys of `coldest` do not cost more because there are many keys.",
}

CONTRACTS: dict[str, str] = {**MEMORY, **SERDE, **EVICTION, **STORAGE}
"""Every contract; where plugins of several kinds share a name, the storage backends' words."""


class ContractBroken(AssertionError):
    """A plugin broke the contract named `contract`."""

    def __init__(self, contract: str, message: str) -> None:
        assert contract in CONTRACTS, contract
        self.contract = contract
        super().__init__(f"contract `{contract}`: {message}")


def demand(holds: bool, contract: str, message: str) -> None:
    """Raise `ContractBroken` unless it holds."""
    if not holds:
        raise ContractBroken(contract, message)

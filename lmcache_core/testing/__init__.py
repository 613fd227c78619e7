"""What plugin authors and this project's own tests run: an oracle engine, planted faults and conformance checks.

Nothing here imports pytest; `StorageBackendTests` is collected by it.
"""

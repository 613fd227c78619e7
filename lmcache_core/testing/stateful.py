"""The storage contract as a state machine: hypothesis makes up calls and finds the shortest sequence that fails.

    class TestMyBackend(StorageStateMachineTests):
        @pytest.fixture
        def open_backend(self, tmp_path):
            return lambda context: MyConfig(path=tmp_path).build(context)

The fixture is that of `StorageBackendTests`, which this class extends. Needs `hypothesis`.
"""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

from lmcache_core.testing.contracts import ContractBroken
from lmcache_core.testing.model import Model
from lmcache_core.testing.storage import OpenBackend, StorageBackendTests

KEYS = 10
_CALLS = st.sampled_from(("put", "put", "get", "contains", "delete", "delete", "clear", "check"))
_NUMBERS = st.lists(st.integers(0, KEYS - 1), min_size=1, max_size=6)


class StorageStateMachine(RuleBasedStateMachine):
    """Puts, gets, deletes, clears and reopens, each compared with a dict; each example starts with a clear."""

    def __init__(self, model: Callable[[], Model]) -> None:
        super().__init__()
        self.model = model()

    # One rule: with one for each call, hypothesis switches some off in every example, and few examples find little.
    @rule(call=_CALLS, numbers=_NUMBERS)
    def step(self, call: str, numbers: list[int]) -> None:
        known = [number % len(self.model.keys) for number in numbers]  # with few keys, calls meet often
        if call == "put":
            self.model.put(known)
        elif call == "get":
            self.model.get(known)
        elif call == "contains":
            self.model.contains(known)
        elif call == "delete":
            self.model.delete(known)
        elif call == "clear":
            self.model.clear()
        else:
            self.model.check()

    def teardown(self) -> None:
        self.model.close()


class StorageStateMachineTests(StorageBackendTests):
    """`StorageBackendTests`, and the state machine twice: with room for everything, and with room for part of it."""

    examples = 8
    """Sequences of calls to make up."""
    steps = 16
    """Calls in each."""
    shrink = True
    """Look for the shortest sequence that fails, which may take minutes on a slow medium."""

    def test_any_calls_agree_with_a_dict(self, open_backend: OpenBackend) -> None:
        self.run_machine(lambda: self.model(open_backend, 3))

    def test_any_calls_agree_with_a_dict_when_room_is_short(self, open_backend: OpenBackend) -> None:
        """Ten objects of 244 KiB in 2 MiB: a medium that keeps to its capacity refuses some."""
        self.payload_bytes, self.capacity = 240 << 10, 2 << 20
        self.run_machine(lambda: self.model(open_backend, KEYS, large=True))

    def run_machine(self, model: Callable[[], Model]) -> None:
        """Run the machine over media that `model` opens."""
        limits = settings(
            max_examples=self.examples,
            stateful_step_count=self.steps,
            deadline=None,
            database=None,
            phases=(Phase.generate, Phase.shrink) if self.shrink else (Phase.generate,),
            report_multiple_bugs=False,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        )

        class Machine(StorageStateMachine):
            def __init__(self) -> None:
                super().__init__(model)

        try:
            run_state_machine_as_test(Machine, settings=limits)
        except ContractBroken:
            raise
        except Exception as error:
            # What a broken backend leaves on its medium makes the next example differ: hypothesis then speaks of that.
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, ContractBroken):
                cause = cause.__cause__ or cause.__context__
            raise cause or error from None

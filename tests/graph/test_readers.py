"""Which calls are known to write into none of their arguments."""

from __future__ import annotations

import functools
import operator
from typing import Any

import numpy as np
import pandas as pd
import pytest
from dask._task_spec import List, Task, TaskRef, _execute_subgraph
from dask.utils import M

from celery_mem.graph.readers import is_reader, only_read


def mine(x: Any) -> Any:
    return x


class Mine:
    def __call__(self, x: Any) -> Any:
        return x

    def method(self, x: Any) -> Any:
        return x


@pytest.mark.parametrize(
    "func",
    [
        *(operator.add, np.add, np.sum, np.random.default_rng(1).random, sum, dict, pd.DataFrame, M.mean),
        *(
            functools.partial(np.sum, axis=0),
            functools.partial(np.apply_along_axis, np.sum),
            _execute_subgraph,
        ),
    ],
)
def test_functions_of_the_libraries_read(func: Any) -> None:
    assert is_reader(func)


@pytest.mark.parametrize(
    "func",
    [mine, lambda x: x, Mine(), Mine().method, functools.partial(mine), functools.partial(map, mine)],
)
def test_of_others_nobody_knows(func: Any) -> None:
    assert not is_reader(func)


def test_one_among_the_arguments_is_found_wherever_it_is() -> None:
    inner = Task("x", mine, TaskRef("y"))
    assert only_read([1, "a", np.zeros(3), [operator.add], {"k": (np.sum, None)}])
    assert only_read([{"a": Task("a", np.add, TaskRef("x"), 1)}, List(TaskRef("x"), TaskRef("y"))])
    for hidden in (mine, [mine], {"k": (mine,)}, functools.partial(mine), inner, List(inner), {"a": inner}):
        assert not only_read([1, hidden])
    assert not only_read([Task("a", np.apply_along_axis, mine, 0, TaskRef("x"))])
    assert not only_read([Task("a", np.add, inner, 1)])

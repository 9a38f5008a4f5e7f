"""Dask collections and raw Dask graphs become one flat, ordered graph of nodes, and collections again.

This is the only module that imports Dask's private modules (`dask._task_spec`, `dask._expr`,
`dask._collections`); a change in Dask's internals is repaired here. Importing it costs what `import dask`
costs and loads neither numpy nor pandas.

The words: a *node* is a `GraphNode` (a `Task`, an `Alias`, a `DataNode`) and names what it needs by key. A
*family* is the set of collections that one Dask optimizer handles. An *external* key is needed and has no
node: it belongs to a future.
"""

from __future__ import annotations

import dataclasses
import gc
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial, singledispatch
from itertools import chain, count
from operator import add, itemgetter
from typing import Any, TypeAlias

import dask.base
import dask.config
import dask.core
import dask.order
from dask import _expr as _dask_expr
from dask._collections import new_collection
from dask._task_spec import Alias, DataNode, GraphNode, Task, TaskRef, convert_legacy_task
from dask.delayed import Delayed
from dask.delayed import optimize as optimize_delayed
from dask.highlevelgraph import HighLevelGraph, Layer, MaterializedLayer
from dask.typing import Key

from celery_mem.errors import GraphCycleError, MissingKeyError

__all__ = [
    "TASK_SHUFFLES",
    "Key",
    "Lowered",
    "TaskRef",
    "call_of",
    "futures_of",
    "identity",
    "is_dask_collection",
    "lower",
    "lower_graph",
    "nest",
    "rebuild_persisted",
    "unpack",
]

TASK_SHUFFLES = {"dataframe.shuffle.method": "tasks", "array.rechunk.method": "tasks"}
"""Dask settings under which shuffles and rechunks are plain tasks.

Without a distributed client Dask shuffles over the local disk, with one over its workers' sockets; neither
works here. `lower` sets them around the optimizer. Bags, arrays and `x.compute()` choose before `lower` is
reached, so a client that becomes the default scheduler sets them for as long as it is the default.
"""

# Dask leaves these without types; the functions below state them.
_base: Any = dask.base
_expr: Any = _dask_expr
_flatten: Any = dask.core.flatten
_new_alias: Any = Alias
_new_data: Any = DataNode
_new_collection: Any = new_collection

_Graph: TypeAlias = dict[Key, Any]
_Annotated: TypeAlias = list[tuple[Mapping[str, Any], Iterable[Key]]]  # annotations, and whose they are
_Plan: TypeAlias = Callable[[Sequence[Any]], Any]


@dataclasses.dataclass(frozen=True)
class Lowered:
    """A graph that is ready to be submitted.

    Attributes:
        nodes: every node that an output needs, by key, each after all that it needs. In this order one worker
            alone would keep few results alive at a time.
        dependencies: the keys each node needs, with external ones.
        order: position of each key in `nodes`.
        outputs: for each collection, in the order given, the flat keys of its result.
        external: keys that outputs or nodes need and that have no node.
        futures: a future for each external key, where one was found. A key of `external` without one is most
            likely a mistake in the graph; the store knows for certain.
        annotations: name -> {key: value}, as set by `dask.annotate`. Only delayed objects keep them reliably.
        optimized: for each collection, what `rebuild_persisted` takes: the collection as the optimizer left
            it. Its keys are those in `outputs`; the collection's own are often others.
    """

    nodes: dict[Key, GraphNode]
    dependencies: dict[Key, frozenset[Key]]
    order: dict[Key, int]
    outputs: list[list[Key]]
    external: set[Key]
    futures: dict[Key, Any]
    annotations: dict[str, dict[Key, Any]]
    optimized: list[Any] = dataclasses.field(default_factory=list)

    @property
    def final_keys(self) -> list[Key]:
        """For each collection the one key of its finished value, after `lower(..., finalize=True)`.

        Raises:
            ValueError: a collection has more or fewer outputs; it was lowered with `finalize=False`.
        """
        for position, output in enumerate(self.outputs):
            if len(output) != 1:
                raise ValueError(f"collection {position} has {len(output)} outputs; lower with finalize=True")
        return [key for [key] in self.outputs]


def is_dask_collection(x: object) -> bool:
    """Tell whether `x` is a Dask collection.

    The answer of `dask.is_dask_collection`, which costs 20 microseconds for a delayed object: it asks for an
    attribute that is not there, and the object makes a new delayed object of it.
    """
    return isinstance(x, Delayed) or bool(_base.is_dask_collection(x))


# --- collections -> nodes -----------------------------------------------------------------------------------


def lower(collections: Iterable[Any], *, finalize: bool, optimize_graph: bool = True) -> Lowered:
    """Turn collections into one graph of nodes, optimized family by family.

    Families are never optimized together: Dask would then return the results grouped by optimizer instead of
    in the order asked for (`_HLGExprSequence._tune_down`, Dask 2026.8).

    Args:
        collections: Dask collections, of any mix of types.
        finalize: True gives one key per collection, whose result is the concrete value (for compute); False
            gives one key per chunk or partition (for persist).
        optimize_graph: False leaves arrays, bags and delayed objects as they are. Dataframes are optimized
            always.
    Raises:
        GraphCycleError: a task needs its own result.
    Note:
        The optimizer may itself compute something with the default scheduler (statistics of Parquet files):
        a client may be called again from within this call.
    """
    members = list(collections)
    outputs: list[list[Key]] = [[] for _ in members]
    optimized = list(members)
    graphs: list[_Graph] = []
    annotated: _Annotated = []
    families: dict[object, list[int]] = {}
    for position, member in enumerate(members):
        families.setdefault(_family(member), []).append(position)
    for family, positions in families.items():
        mine = [members[position] for position in positions]
        if _only_culls(family, optimize_graph) and all(isinstance(member, Delayed) for member in mine):
            graph, found = _graph_of_delayed(mine)
            keys: list[list[Key]] = [[member.key] for member in mine]
        else:
            with _task_shuffles:
                expr = _shuffled_by_tasks(_base.collections_to_expr(mine, optimize_graph))
                expr = (_expr.FinalizeCompute(expr) if finalize else expr).optimize()
                graph, found = _graph_of_expr(expr)
                keys = [list(_flatten(nested)) for nested in expr.__dask_keys__()]
            if family is _expr.Expr and not finalize:
                for position, operand in zip(positions, expr.operands, strict=True):
                    optimized[position] = _as_optimized(members[position], operand)
        for position, output in zip(positions, keys, strict=True):
            outputs[position] = output
        graphs.append(graph)
        annotated += found
    return _lowered(graphs, outputs, annotated, sources=members, optimized=optimized)


def lower_graph(dsk: Any, keys: Any, *, live: Container[Key] = ()) -> Lowered:
    """Turn a raw graph and the keys wanted from it into a graph of nodes, for `Client.get`.

    Args:
        dsk: a dict, a HighLevelGraph, or an expression that `dask.compute` has optimized.
        keys: one key, or keys in lists nested to any depth. All of them become `outputs[0]`, in order; `nest`
            puts the results back into the nesting.
        live: keys of which the caller holds futures. Dask's array optimizer replaces futures by their keys,
            and the caller is then the only one to know them.
    Raises:
        GraphCycleError: a task needs its own result.
        MissingKeyError: a key is wanted or needed that has neither a node nor a future. Not raised for an
            expression: it was made by Dask, which may have dropped the future itself.
    """
    wanted: list[Key] = list(_flatten([keys]))
    if isinstance(dsk, _expr.Expr):
        with _task_shuffles:
            graph, annotated = _graph_of_expr(dsk)
        return _lowered([graph], [wanted], annotated, sources=[dsk])
    if isinstance(dsk, HighLevelGraph):
        graph, annotated = _graph_of_layers(dsk.layers.values())
    else:
        graph, annotated = (dsk if isinstance(dsk, dict) else dict(dsk)), []
    lowered = _lowered([graph], [wanted], annotated, sources=[dsk])
    for key in lowered.external:
        if key not in lowered.futures and key not in live:
            needed_by = next((k for k, needs in lowered.dependencies.items() if key in needs), None)
            raise MissingKeyError(key, needed_by)
    return lowered


def nest(keys: Any, values: Mapping[Key, Any]) -> Any:
    """Arrange `values` in the nesting of `keys`: a list for each list, a value for each key."""
    return [nest(key, values) for key in keys] if isinstance(keys, list) else values[keys]


def _family(collection: Any) -> object:
    """Name what optimizes `collection`: `Expr` for expressions, else its `__dask_optimize__`."""
    # Delayed objects first: they answer getattr of any name with a new delayed object.
    if not isinstance(collection, Delayed) and _exprs(collection):
        family: object = _expr.Expr
        return family
    return getattr(collection, "__dask_optimize__", None)


def _exprs(collection: Any) -> tuple[Any, ...]:
    """Return the expressions a collection stands for: one, those inside a wrapper such as xarray's, or ()."""
    expr = getattr(collection, "expr", None)
    if isinstance(expr, _expr.Expr):
        return (expr,)
    inside = getattr(collection, "__dask_exprs__", None)
    return tuple(inside() or ()) if inside is not None else ()


def _only_culls(optimizer: object, optimize_graph: bool = True) -> bool:
    """Tell whether `optimizer` merely drops nodes that nobody needs, as `_cull` does in 1/30 of the time."""
    if optimizer is not optimize_delayed:
        return False
    return not optimize_graph or not dask.config.get("optimization.fuse.delayed", False)


class _TaskShuffles:
    """Holds `TASK_SHUFFLES` while anybody is within.

    Dask's settings belong to the process. Of two threads that each set and restore them at the same time one
    would run without, so the first one in sets them and the last one out restores them.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._restore = ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._restore.enter_context(dask.config.set(TASK_SHUFFLES))
            self._inside += 1

    def __exit__(self, *exc: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._restore.close()


_task_shuffles = _TaskShuffles()


def _shuffled_by_tasks(expr: Any) -> Any:
    """Undo a choice of disk or p2p that was made or found in the settings when the expression was written."""
    while True:
        for node in expr.walk():
            settings = zip(type(node)._parameters, node.operands, strict=False)
            names = [name for name, value in settings if name.endswith("method") and value in ("disk", "p2p")]
            if names:
                expr = expr.substitute(node, node.substitute_parameters(dict.fromkeys(names, "tasks")))
                break
        else:
            return expr


def _graph_of_delayed(collections: Iterable[Any]) -> tuple[_Graph, _Annotated]:
    """Merge the graphs of delayed objects as Dask does, but without its cull of every layer by itself."""
    layers: dict[str, Any] = {}
    plain: _Graph = {}
    for collection in collections:
        dsk = collection.dask
        if isinstance(dsk, HighLevelGraph):
            layers.update(dsk.layers)
        else:
            plain.update(dsk)
    graph, annotated = _graph_of_layers(layers.values())
    graph.update(plain)
    return graph, annotated


def _graph_of_layers(layers: Iterable[Any]) -> tuple[_Graph, _Annotated]:
    graph: _Graph = {}
    annotated: _Annotated = []
    for layer in layers:
        # The dict inside, where there is one: updating from another kind of mapping is 20 times slower.
        graph.update(layer.mapping if type(layer) is MaterializedLayer else layer)
        if layer.annotations:
            annotated.append((layer.annotations, layer))
    return graph, annotated


def _graph_of_expr(expr: Any) -> tuple[_Graph, _Annotated]:
    """Materialize an optimized expression, but leave out a low-level optimizer that would only cull."""
    operands = expr.operands if isinstance(expr, _expr._HLGExprSequence) else [expr]
    if all(isinstance(operand, _expr.HLGExpr) for operand in operands):
        graphs = []
        for operand in operands:
            dsk, optimizer = operand.hlg, operand.low_level_optimizer
            if optimizer is not None and not _only_culls(optimizer):
                dsk = optimizer(dsk, operand.__dask_keys__())
            graphs.append(dsk)
        return _graph_of_layers(HighLevelGraph.merge(*graphs).layers.values())
    per_key = expr.__dask_annotations__()
    return dict(expr.__dask_graph__()), [({name: of.__getitem__}, of) for name, of in per_key.items()]


# --- nodes: cull, convert, order ----------------------------------------------------------------------------


def _lowered(
    graphs: list[_Graph],
    outputs: list[list[Key]],
    annotated: _Annotated,
    *,
    sources: Collection[Any],
    optimized: list[Any] | None = None,
) -> Lowered:
    """Cull, convert and order the graphs of all families; search `sources` for futures of external keys."""
    futures: dict[Key, Any] = {}
    if len(graphs) == 1:
        [graph] = graphs
    else:
        # Each by itself: a text in one graph must not be taken for a key of another.
        graph = {}
        for part in graphs:
            graph.update(_converted(part, futures))
    wanted = list(dict.fromkeys(chain.from_iterable(outputs)))
    nodes, dependencies, external, met_again = _cull(graph, wanted, futures)
    if not met_again:
        ordered = _forest_order(list(nodes), wanted, dependencies)
    elif all(type(nodes[key]) is DataNode for key in met_again):
        # Data needs nothing, so what is used twice may come first; the rest is a forest.
        ordered = [*met_again, *_forest_order([k for k in nodes if k not in met_again], wanted, dependencies)]
    else:
        ordered = _general_order(nodes)
    if missing := external - futures.keys():
        needing = (nodes[key] for key, needs in dependencies.items() if not missing.isdisjoint(needs))
        futures.update(_find_futures(chain(needing, sources), missing))
    return Lowered(
        nodes={key: nodes[key] for key in ordered},
        dependencies=dependencies,
        order=dict(zip(ordered, range(len(ordered)), strict=True)),
        outputs=outputs,
        external=external,
        futures={key: future for key, future in futures.items() if key in external},
        annotations=_annotations(annotated, nodes),
        optimized=[] if optimized is None else optimized,
    )


def _cull(
    graph: _Graph, wanted: Iterable[Key], futures: dict[Key, Any]
) -> tuple[dict[Key, GraphNode], dict[Key, frozenset[Key]], set[Key], set[Key]]:
    """Walk from the wanted keys down, once; convert old-style values on the way.

    Returns:
        the nodes, in the order met; their dependencies; the keys that have no node; the keys met more than
        once. Where nothing is met twice, each node comes before all that it needs, branch after branch.
    """
    nodes: dict[Key, GraphNode] = {}
    dependencies: dict[Key, frozenset[Key]] = {}
    external: set[Key] = set()
    met_again: set[Key] = set()
    stack = list(wanted)
    while stack:
        key = stack.pop()
        if key in nodes:
            met_again.add(key)
            continue
        try:
            node = graph[key]
        except KeyError:
            external.add(key)
            continue
        if type(node) is not Task and (node := _node_of(key, node, graph, futures)) is None:
            external.add(key)
            continue
        nodes[key] = node
        needs = dependencies[key] = node.dependencies
        if needs:
            stack.extend(needs)
    return nodes, dependencies, external, met_again


def _converted(graph: _Graph, futures: dict[Key, Any]) -> _Graph:
    pairs = ((key, _node_of(key, value, graph, futures)) for key, value in graph.items())
    return {key: node for key, node in pairs if node is not None}


def _node_of(key: Key, value: Any, graph: _Graph, futures: dict[Key, Any]) -> Any:
    """Make a node of a value in a graph: a node, or old style a call in a tuple, a key, a future, data.

    Returns:
        a node, or None where the value is the future of this very key. Futures seen are added to `futures`.
    """
    if isinstance(value, GraphNode):
        # An alias of itself is how Dask writes a future where only nodes may stand.
        return None if type(value) is Alias and value.target == key else value
    if isinstance(value, TaskRef):
        if type(value) is not TaskRef:
            futures[value.key] = value
        return None if value.key == key else _new_alias(key, value.key)
    node = convert_legacy_task(key, value, graph)
    return node if isinstance(node, GraphNode) else _new_data(key, node)


def _forest_order(
    found: list[Key], roots: Iterable[Key], dependencies: Mapping[Key, frozenset[Key]]
) -> list[Key]:
    """Order a graph in which no node is needed twice: branch after branch, of siblings the neediest first.

    No order keeps fewer results alive (Sethi and Ullman, 1970); it takes 1/50 of the time of `dask.order`.

    Args:
        found: the nodes, in the order of `_cull`.
        roots: the wanted keys; their branches keep this order.
        dependencies: what each node needs; keys outside `found` do not count.
    """
    alive: dict[Key, int] = {}  # most results alive at once while the key is made, its own too; 1 if not here
    uneven = False
    for key in reversed(found):
        if needs := dependencies[key]:
            peak = len(needs) + 1
            if not alive.keys().isdisjoint(needs):
                peaks = sorted((alive.get(k, 1) for k in needs), reverse=True)
                uneven = uneven or peaks[0] != peaks[-1]
                peak = max(peak, *map(add, peaks, count()))
            alive[key] = peak
    if not uneven:
        return found[::-1]
    members = set(found)
    backwards = []
    stack = [key for key in roots if key in members]
    while stack:
        key = stack.pop()
        backwards.append(key)
        if needs := dependencies[key]:
            stack.extend(sorted(needs & members, key=lambda k: alive.get(k, 1), reverse=True))
    return backwards[::-1]


def _general_order(nodes: dict[Key, GraphNode]) -> list[Key]:
    try:
        with _collector_paused():
            rank = dask.order.order(nodes)
    except RuntimeError as error:
        getcycle: Any = dask.core.getcycle
        if cycle := getcycle(nodes, None):
            raise GraphCycleError(tuple(cycle)) from error
        raise
    return sorted(nodes, key=rank.__getitem__)


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Keep the cyclic collector out of a short computation that allocates much and leaves no cycles.

    Beside a graph of 10,000 nodes it doubles the time of `dask.order`: 0.21 s for 0.10 s.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _annotations(annotated: _Annotated, nodes: Container[Key]) -> dict[str, dict[Key, Any]]:
    """Spread the annotations of layers over their nodes."""
    by_name: dict[str, dict[Key, Any]] = {}
    for of_layer, keys in annotated:
        mine = [key for key in keys if key in nodes]
        for name, value in of_layer.items():
            for key in mine:
                actual = value(key) if callable(value) else value
                if not isinstance(actual, _expr._AnnotationsTombstone):
                    by_name.setdefault(name, {})[key] = actual
    return by_name


# --- results -> collections ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Composite:
    """A wrapper such as xarray's, with the expressions inside it as the optimizer left them."""

    collection: Any
    expr: Any


def _as_optimized(collection: Any, expr: Any) -> Any:
    return _Composite(collection, expr) if isinstance(expr, _expr.CompositeExpr) else _new_collection(expr)


def rebuild_persisted(optimized: Any, futures: Mapping[Key, Any]) -> Any:
    """Return a collection like the one that was lowered, whose graph is its futures.

    Args:
        optimized: the collection as it stands in `Lowered.optimized`. The original will not do for a
            dataframe: optimizing may change its partitions, as where small Parquet files are read together.
        futures: one per key of the collection's `outputs`, and no others.
    """
    if isinstance(optimized, _Composite):
        return _base._rebuild_composite_collection(
            optimized.collection, optimized.expr, futures, cull_to_child_keys=True
        )
    rebuild, extra = optimized.__dask_postpersist__()
    return rebuild(dict(futures), *extra)


# --- nested containers --------------------------------------------------------------------------------------


def unpack(
    args: Sequence[Any], traverse: bool = True
) -> tuple[list[Any], Callable[[Sequence[Any]], tuple[Any, ...]]]:
    """Take the collections out of `args`.

    The answer of `dask.base.unpack_collections`, which tokenizes every collection and runs a graph to put the
    results back: 160 microseconds per delayed object, here 1.

    Args:
        args: any objects.
        traverse: look into lists, tuples, sets, dicts and their keys, dataclasses and named tuples; an
            iterator is read and becomes a list.
    Returns:
        the collections, each object once, and `repack`. It takes their results, in the same order, and
        returns `args` with each collection replaced; what holds no collection comes back as it is.
    """
    collections: list[Any] = []
    positions: dict[int, int] = {}  # by id
    plans = [_plan(arg, collections, positions, traverse) for arg in args]
    return collections, partial(_rebuilt, tuple, list(args), plans)


def _plan(x: Any, collections: list[Any], positions: dict[int, int], traverse: bool) -> _Plan | None:
    """Say how to make `x` anew from the results of the collections in it; None: there are none."""
    if is_dask_collection(x):
        position = positions.setdefault(id(x), len(collections))
        if position == len(collections):
            collections.append(x)
        return itemgetter(position)
    taken = _taken_apart(x) if traverse else None
    if taken is None:
        return None
    make, parts = taken
    plans = [_plan(part, collections, positions, traverse) for part in parts]
    if any(plans) or isinstance(x, Iterator):
        return partial(_rebuilt, make, parts, plans)
    return None


def _taken_apart(x: Any) -> tuple[Callable[[list[Any]], Any], list[Any]] | None:
    """Return the parts of a container and what makes it from such a list; None: it is no container."""
    kind: Any = type(x)
    if kind in (list, tuple, set):
        return kind, list(x)
    if kind in (dict, OrderedDict):
        return lambda flat: kind(zip(flat[::2], flat[1::2], strict=True)), list(chain(*x.items()))
    if isinstance(x, Iterator):
        return list, list(x)
    if isinstance(x, tuple) and hasattr(kind, "_make"):
        return kind._make, list(x)
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        return lambda values: kind(*values), [getattr(x, field.name) for field in dataclasses.fields(x)]
    return None


def _rebuilt(
    make: Callable[[list[Any]], Any], parts: list[Any], plans: list[_Plan | None], results: Sequence[Any]
) -> Any:
    return make([p if plan is None else plan(results) for p, plan in zip(parts, plans, strict=True)])


# --- futures ------------------------------------------------------------------------------------------------


def futures_of(x: Any) -> list[Any]:
    """Return the futures in `x`, each object once, in the order met.

    Looks into builtin containers, and into the graphs of collections as they were written: the optimizers
    replace futures by their keys.
    """
    return [ref for ref in _special_refs([x]) if getattr(type(ref), "__celery_mem_future__", False)]


def _find_futures(sources: Iterable[Any], keys: set[Key]) -> dict[Key, Any]:
    """Search `sources` for one future of each of `keys`; stop when all are found."""
    found: dict[Key, Any] = {}
    for ref in _special_refs(sources):
        if ref.key in keys:
            found.setdefault(ref.key, ref)
            if len(found) == len(keys):
                break
    return found


def _special_refs(sources: Iterable[Any]) -> Iterator[Any]:
    """Yield the references in `sources` that are of a subclass of `TaskRef`: futures, of whatever client."""
    seen: dict[int, Any] = {}  # the objects too: an id may be used again when its object is gone
    for source in sources:
        stack = [source]
        while stack:
            x = stack.pop()
            if isinstance(x, TaskRef):
                if type(x) is not TaskRef and id(x) not in seen:
                    seen[id(x)] = x
                    yield x
            elif (parts := _parts(x)) and id(x) not in seen:
                seen[id(x)] = x
                stack.extend(reversed(parts))


@singledispatch
def _parts(x: Any) -> Sequence[Any]:
    """Return what is inside `x` and may be or hold a future; () for what is no container."""
    if not is_dask_collection(x):
        return ()
    return (not isinstance(x, Delayed) and _exprs(x)) or (x.__dask_graph__(),)


@_parts.register(str)
@_parts.register(bytes)
@_parts.register(int)
@_parts.register(float)
@_parts.register(type(None))
@_parts.register(GraphNode)
def _(x: Any) -> Sequence[Any]:
    return ()


@_parts.register(list)
@_parts.register(tuple)
@_parts.register(set)
@_parts.register(frozenset)
def _(x: Any) -> Sequence[Any]:
    return list(x)


@_parts.register(dict)
def _(x: Any) -> Sequence[Any]:
    return list(x.values())


@_parts.register(Task)
def _(x: Any) -> Sequence[Any]:
    return [*x.args, *x.kwargs.values()]


@_parts.register(DataNode)
def _(x: Any) -> Sequence[Any]:
    return [x.value]


@_parts.register(HighLevelGraph)
def _(x: Any) -> Sequence[Any]:
    return list(x.layers.values())


@_parts.register(MaterializedLayer)
def _(x: Any) -> Sequence[Any]:
    return list(x.mapping.values())


@_parts.register(Layer)
def _(x: Any) -> Sequence[Any]:
    # Not its nodes, which might have to be made first: what they are made from.
    return list(vars(x).values())


@_parts.register(_dask_expr.Expr)
def _(x: Any) -> Sequence[Any]:
    return list(x.operands)


# --- one node -> one call -----------------------------------------------------------------------------------


def identity(value: Any) -> Any:
    """Return `value`: the call of a node that merely has, names or arranges data."""
    return value


def call_of(node: GraphNode) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    """Split a node into a function and its arguments.

    Returns:
        `func, args, kwargs`. Directly among the arguments, not deeper, a `TaskRef` stands for the result of
        its key, and a `GraphNode` for what it returns when called with the results of its `dependencies`, by
        key. With these replaced, `func(*args, **kwargs)` is the result of `node`. `func` is the user's own
        object for a plain task, Dask's `_execute_subgraph` for tasks fused into one, and else `identity`.
    """
    if type(node) is not Task:
        return identity, (_plain(node),), {}
    args, kwargs = node.args, node.kwargs
    for arg in args:  # a loop: any() of a generator takes longer than all the rest of this function
        if isinstance(arg, GraphNode):
            args = tuple(map(_plain, args))
            break
    if kwargs:
        kwargs = {name: _plain(arg) for name, arg in kwargs.items()}
    return node.func, args, kwargs


def _plain(arg: Any) -> Any:
    """Write an argument the simplest way: an alias as a reference, a data node as its value."""
    if type(arg) is Alias:
        return TaskRef(arg.target)
    if type(arg) is DataNode and not isinstance(arg.value, (TaskRef, GraphNode)):
        return arg.value
    return arg
